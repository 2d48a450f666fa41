"""Validation on a folder of images, beside the published accuracy, or on the rows of a table.

>>> result = validate("unireplknet_a.in1k", "imagenet")     # imagenet/val/n01440764/*.JPEG
>>> result.top1, result.published                           # percent
>>> validate("outputs/grbf-tabular/latest", "test.csv")
"""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.data.checks import DataError
from zoo.data.folder import IMAGES, FolderImages
from zoo.data.lists import is_list, read_list
from zoo.data.own_tables import open_table, read_targets
from zoo.data.pictures import Fit
from zoo.data.prepare import WORDS, far_out, form_for
from zoo.data.rows import read_rows
from zoo.data.sampling import EpochBatches, ResumableLoader
from zoo.data.walk import class_folders, scan
from zoo.models.deploy import to_deploy
from zoo.registry.factory import answers_imagenet, as_named, create_model
from zoo.support import inputs
from zoo.support.quoting import shown
from zoo.support.suggest import nearest
from zoo.tools.listing import published

__all__ = ["TableValidation", "Validation", "ValidationError", "published", "validate"]

_log = logging.getLogger(__name__)
_PARTS = ("val", "valid", "validation", "test")


class ValidationError(ValueError):
    """Images and weights do not match."""


@dataclass
class Validation:
    """Result of a validation; accuracies in percent, `top5` None for at most five classes."""

    model: str
    images: int
    top1: float
    top5: float | None
    published: float | None
    preprocessing: dict[str, Any]

    def __str__(self) -> str:
        size = "x".join(map(str, self.preprocessing["input_size"][1:]))
        how = ", ".join(f"{key} {self.preprocessing[key]}" for key in ("interpolation", "crop_pct", "crop_mode"))
        beside = "no accuracy was published" if self.published is None else f"published {self.published:.2f} %"
        top5 = "" if self.top5 is None else f", top-5 {self.top5:.2f} %"
        return f"{self.model} on {self.images} images at {size} ({how}): top-1 {self.top1:.2f} %{top5}; {beside}"


@dataclass
class TableValidation:
    """Result of a validation on a table.

    Attributes:
        model: As given.
        data: The file.
        rows: Its rows.
        target: The column that is predicted.
        metrics: `accuracy` and `most_frequent`, the accuracy of always answering the file's most frequent class; or
            `r2` and `rmse`.
        notes: What was done with missing cells, unseen categories and other columns; and which values lie far outside
            of the training rows.
    """

    model: str
    data: str
    rows: int
    target: str
    metrics: dict[str, float]
    notes: list[str]

    def __str__(self) -> str:
        told = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in self.metrics.items())
        return f"{self.model} on {self.rows:,} rows of {self.data}, column {self.target}: {told}"


@torch.inference_mode()
def validate(
    model: str,
    data: str | Path,
    *,
    checkpoint: str | Path | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str = "cpu",
    columns: Mapping[str, str] | None = None,
) -> Validation | TableValidation:
    """Accuracy of weights, in deploy form, on a folder of images or on a table with the column of the target.

    Images: size, crop, interpolation, mean and standard deviation are those of the weights' record, and the published
    accuracy is beside. Tables: columns are found and encoded as in prediction.

    Args:
        model: Name with its tag, for example `unireplknet_a.in1k`, `local-dir:<folder>` of `zoo.save_pretrained`, or
            the folder of a run.
        data: A table, for a model of tables; or a folder with one folder per class, or with such a `val/`, `valid/`,
            `validation/` or `test/`; or a list of images and classes, see :func:`zoo.data.lists.read_list`. Classes
            are named by the model's labels (for ImageNet `n01440764`, ...), all of them or some; only for a model
            without labels are they its outputs: by number if they are named `0`, `1`, ..., else in sorted order,
            which is told.
        checkpoint: Weights to use instead of fetching the released ones.
        batch_size: Batch size.
        num_workers: Worker processes that decode images; 0 decodes in this process.
        device: Device, for example `cuda`.
        columns: Of a list: names of the columns `file` and `class`, which have these names by default.

    Raises:
        CheckpointError: The weights are missing and cannot be fetched (the message says which file to place where), or
            do not have the recorded hash.
        DataError: The folder or its images are missing or damaged.
        ValidationError: The name has no weights, or the classes do not match; or the table's target is not known.
    """
    folder, listing, network = Path(data).expanduser(), None, None
    if folder.is_file():
        network = _load(model, checkpoint)
        if inputs.record_of(network)["kind"] == "table":
            return _on_table(model, network, folder, device)
    elif not is_list(folder):
        folder = _image_folder(folder)
    network = network if network is not None else _load(model, checkpoint)
    fit = _fit(model, network)  # before files are read, and refused for being no images
    if is_list(folder):
        listing = read_list(folder, IMAGES, columns or {"file": "file", "class": "class"}, whose="--")
    cfg: dict[str, Any] = dict(network.pretrained_cfg)  # type: ignore[arg-type]
    preprocessing, classes = _preprocessing(cfg), int(network.num_classes)  # type: ignore[arg-type]
    if listing is None:
        names = class_folders(folder, IMAGES)
        paths, places = scan(folder, names, IMAGES)
    else:
        names, paths = sorted(set(listing.columns["class"])), listing.files
        places = [names.index(label) for label in listing.columns["class"]]
    labels = list(cfg.get("label_names") or ()) or _imagenet(model, classes)
    outputs = torch.tensor(_outputs(names, labels, classes, folder))
    images = FolderImages(paths, places, fit, seed=None)
    network = to_deploy(network.eval(), inplace=True).to(device)
    done = hits1 = hits5 = 0
    batches = EpochBatches(len(images), batch_size, seed=0, shuffle=False)
    for batch, targets in ResumableLoader(images, batches, num_workers=num_workers):
        logits = network(batch.to(device)).float().cpu()
        if (bad := ~logits.softmax(-1).isfinite().all(1)).any():
            where = paths[done + int(bad.nonzero()[0])]
            raise ValidationError(f"{where}: the model gives NaN or infinity")
        done += len(logits)
        right = logits.topk(min(5, classes), dim=1).indices == outputs[targets][:, None]
        hits1 += int(right[:, 0].sum())
        hits5 += int(right.any(1).sum())
    count = len(images)
    top5 = 100 * hits5 / count if classes > 5 else None
    return Validation(model, count, 100 * hits1 / count, top5, published(cfg.get("notes")), preprocessing)


def _on_table(model: str, network: nn.Module, path: Path, device: str) -> TableValidation:
    network = to_deploy(network.eval(), inplace=True).to(device)
    form = form_for(path, inputs.record_of(network))
    if form.target is None:
        raise ValidationError(f"the record of {model} does not name the column that it predicts")
    read = read_rows(path, form)
    table = open_table(path, form.separator, form.encoding)
    cfg: Any = getattr(network, "pretrained_cfg", None) or {}
    classes = list(cfg.get("label_names") or ())
    names = [variable.name for variable in form.variables] or form.columns
    place = table.match([*names, form.target], also=table.header or ()).places[-1]
    if far := far_out(path, read.values, network, form.columns, form.measured()):
        _log.warning("%s", far)
    y = read_targets(table, table.name(place), classes)
    outputs = torch.cat([network(rows.to(device)).float().cpu() for rows in read.values.split(4096)])
    if not outputs.isfinite().all():
        raise ValidationError(f"{path}: the model gives NaN or infinity")
    if not classes:
        outputs = inputs.in_units(form.model_dump(), outputs.double())
    metrics = _metrics(outputs, y, bool(classes))
    return TableValidation(model, str(path), len(y), form.target, metrics, [*read.notes, *([far] if far else [])])


def _metrics(outputs: Tensor, y: np.ndarray, classes: bool) -> dict[str, float]:
    if classes:
        decided = (outputs[:, 0] > 0).long() if outputs.shape[1] == 1 else outputs.argmax(1)
        right = float((decided.numpy() == y).mean())
        return {"accuracy": right, "most_frequent": float(np.bincount(y).max() / len(y))}
    error, spread = outputs.squeeze(-1).double().numpy() - y, float(np.square(y - y.mean()).sum())
    metrics = {"r2": 1 - float(np.square(error).sum()) / spread} if spread else {}
    return metrics | {"rmse": float(np.sqrt(np.square(error).mean()))}


def _image_folder(data: Path) -> Path:
    if not data.is_dir():
        raise DataError(f"there is no folder {data}; give the one that holds val/, or the class folders themselves")
    return next((data / part for part in _PARTS if (data / part).is_dir()), data)


def _load(model: str, checkpoint: str | Path | None) -> nn.Module:
    from zoo.tools.prediction import check_answers

    try:
        network = create_model(as_named(model), pretrained=checkpoint is None, checkpoint_path=checkpoint)
    except (ValueError, TypeError) as error:  # an unknown name or tag
        raise ValidationError(str(error)) from None
    check_answers(network, model)
    return network


def _preprocessing(cfg: dict[str, Any]) -> dict[str, Any]:
    from timm.data import resolve_data_config

    resolved = resolve_data_config({}, pretrained_cfg=cfg)
    return {key: resolved[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")}


def _fit(model: str, network: nn.Module) -> Fit:
    record = inputs.record_of(network)
    if (kind := record["kind"]) == "image":
        return Fit(inputs.read(record))
    ways = "with --data it is measured on a table" if kind == "table" else "without --data its own figure is measured"
    raise ValidationError(f"{model} takes {WORDS.get(kind, f'inputs of the kind {kind!r:.40}')}, no images: {ways}")


def _imagenet(model: str, classes: int) -> list[str]:
    """ImageNet's labels if the weights predict them, else an empty list."""
    if classes != 1000 or not answers_imagenet(model):
        return []
    from timm.data import ImageNetInfo

    return ImageNetInfo("imagenet-1k").label_names()


def _outputs(names: Sequence[str], labels: Sequence[str], classes: int, folder: Path) -> list[int]:
    """Index of the model's output for each class folder; in order only if the model has no labels."""
    names = [_spelling(shown(name, keep="")) for name in names]  # as saved
    if not labels and sorted(names) == sorted(map(str, range(classes))):
        return [int(name) for name in names]
    place = {_spelling(label): i for i, label in enumerate(labels)}
    if all(name in place for name in names):
        return [place[name] for name in names]
    if not labels and len(names) == classes:
        told = ", ".join(f"{i} {name}" for i, name in enumerate(names[:5])) + ", ..." * (len(names) > 5)
        _log.warning("the model has no names of its classes: they are taken in order, output %s", told)
        return list(range(classes))
    strange = next(name for name in names if name not in place)
    close = f" (did you mean {near[0]!r:.60}?)" if (near := nearest(strange, labels, 1)) else ""
    raise ValidationError(
        f"{folder} has {len(names)} {'class folders' if folder.is_dir() else 'classes'}, the model {classes} classes, "
        f"and {strange!r:.60} is not a label of the model{close}: name {'the folders' if folder.is_dir() else 'them'} "
        "by their labels (n01440764, ... for ImageNet), one a class"
    )


def _spelling(name: str) -> str:
    """Accents as part of their letters: a folder copied from another system may have them beside."""
    return unicodedata.normalize("NFC", name)
