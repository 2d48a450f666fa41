"""Evaluation of a model on the test part of its record's data, as in its training run."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import Tensor, nn

from zoo.models.deploy import to_deploy
from zoo.registry import bundled_weights
from zoo.registry.factory import MAY_BE, as_named, create_model, register
from zoo.registry.trust import TrustError, recorded_class
from zoo.results.runs import rows_of
from zoo.support import inputs as records
from zoo.support.files import RECORD_HASHES, offline, read_config, record_hashes
from zoo.support.places import names_place, not_vouched, places_in, unknown
from zoo.support.quoting import shown
from zoo.support.signatures import check_call, current_arguments
from zoo.support.values import first_line
from zoo.tools.errors import ToolError

if TYPE_CHECKING:
    from zoo.tasks import Task

__all__ = ["batches", "build_data", "build_task", "evaluate", "load", "record_of", "unusable", "validate"]


def record_of(model: str | Path, data: bool = True) -> dict[str, Any]:
    """The record of a shipped weight, or one built from the folder of a run or of a saved model.

    Args:
        model: `NAME.TAG` of a shipped weight, or the folder of a finished run or of a saved model, which becomes the
            record's `name` and `folder`. `places` of a run are where it had its data, and `vouched` those of them that
            a run of this user's had.
        data: Whether the training data and figures are needed, which a saved model outside its run does not have.

    Raises:
        ToolError: There is no such model, or it has no record of its data.
    """
    from zoo.tools.estimators import refuse
    from zoo.tools.release import describe, places_of, saved

    try:
        name = as_named(model)
        refuse(model)
    except ValueError as error:
        raise ToolError(str(error)) from None
    if bundled_weights.NAME.fullmatch(name):
        return bundled_weights.record(name)
    if not name.startswith(("local-dir:", "local_dir:")):
        register()
        if timm.is_model(name.partition(".")[0]):
            raise ToolError(f"{name} has no trained weights here, and so no record of data and figures: give {MAY_BE}")
        raise ToolError(f"there is no model {name!r:.200}: give {MAY_BE}")
    folder = Path(name.partition(":")[2])
    named = {"name": str(model), "folder": str(folder)}
    run = folder.parent
    if folder.name == "model" and (run == Path(model) or (run / "summary.json").is_file()):
        places, known = places_of(run)
        return describe([run], license="unknown") | named | {"places": places, "vouched": known}
    if data:
        raise ToolError(f"{model} is a saved model, without its run's record of data and figures: {_WITH_DATA}")
    return saved(folder) | named


_WITH_DATA = "give the folder of a run or a shipped weight (`validate` also takes a folder of images, with --data)"


_RECORDED = (
    "nothing is fetched for a run folder, which may come from anyone: fetch the data yourself, by starting its "
    "experiment once, or name their folder with --cache"
)


def _fetching(record: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Offline for records of run folders, which are untrusted; shipped records may download data."""
    return offline(_RECORDED) if "folder" in record else nullcontext()


def load(model: str | Path, deploy: bool = True) -> nn.Module:
    """Load a model in eval mode, by name, `local-dir:` or run folder; in deploy form by default.

    Raises:
        ToolError: The name or tag is unknown.
    """
    try:
        built = create_model(as_named(model), pretrained=True).eval()
    except (ValueError, TypeError) as error:  # an unknown name or tag
        raise ToolError(str(error)) from None
    return to_deploy(built, inplace=True) if deploy else built


def _build_section(section: Any, place: str, **offered: Any) -> Any:
    """Build a section of a record, which may only name a class of its kind and plain values."""
    if not isinstance(section, Mapping):
        raise ToolError(f"the {place} section of the record is a {type(section).__name__}; the record is damaged")
    try:
        build = recorded_class(section.get("_target_"), place)
    except TrustError as error:
        raise ToolError(str(error)) from None
    values = {k: v for k, v in section.items() if not str(k).startswith("_")}
    values = current_arguments(build, values) | current_arguments(build, offered)
    if problems := check_call(build, values, place, given=offered, nested=False):
        if problems == ["data.path has no value"]:
            raise ToolError(_NO_PLACE.format(build.__name__))
        raise ToolError(f"the record does not fit {build.__name__}: {problems[0]}")
    try:
        return build(**values)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        if type(error).__module__.startswith("zoo."):
            raise
        raise ToolError(f"the {place} section of the record is refused ({first_line(error)})") from None


def part_of(record: Mapping[str, Any]) -> str:
    """The part of the data that a record's figure is of: "validation" for runs without a test, else "test"."""
    return "validation" if record.get("metric", {}).get("name", "").startswith("val/") else "test"


#: Where the data of a record is: a folder, or by name `path` (own data), `cache` (what was fetched), `root` (either).
Places = str | Mapping[str, str]


_TOLD = {"path": {"path", "folder", "root"}, "cache": {"cache", "root"}, "root": {"path", "folder", "cache", "root"}}
_NO_PLACE = "the files of {} are not on record: name their folder with --path"


def build_data(record: Mapping[str, Any], root: Places | None = None, **changes: Any) -> Any:
    """Build and prepare the data module of a record.

    Args:
        record: From :func:`record_of`, with data.
        root: Where the data is, instead of where the run of a folder had it. No shipped record says it.
        **changes: Arguments of the data module to replace (`eval_batch_size`).

    Raises:
        ToolError: The record is invalid; or own data is not there, its place is not known, it has other classes than
            the model, or no part to measure on.
    """
    given = dict(root) if isinstance(root, Mapping) else {"root": root} if root else {}
    told = {key for name in given for key in _TOLD.get(name, {name})}
    places = {key: value for key, value in record.get("places", {}).items() if key not in told}
    config = {**record["data"]["config"], **changes, **places}
    _check_places(record, {key: value for key, value in config.items() if key not in given})
    if "path" in places and not Path(places["path"]).expanduser().exists():
        raise ToolError(f"the data of the run, {places['path']}, is not there any more: name its place with --path")
    if record["data"].get("own") and not {"path", "root"} & {*places, *given}:
        raise ToolError(_NO_PLACE.format(str(config["_target_"]).rpartition(".")[2]))
    config = {key: value for key, value in config.items() if value is not None or not names_place(key)}
    with _fetching(record):
        data = _build_section(config, "data", **given)
        data.prepare_data()
        data.setup("validate" if part_of(record) == "validation" else "test")
    _check_table(record, data)
    _check_classes(record, data)
    part = "val" if part_of(record) == "validation" else "test"
    if part not in getattr(data, "datasets", {part}) and not hasattr(data, "stream"):
        where = getattr(data, "path", None) or record["data"]["title"]
        raise ToolError(f"{where} has no {part} part, and is too small to split one off: add samples, or {part}/")
    return data


def _check_places(record: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Refuse places of data that a run folder names, and that were not named by this user."""
    if "folder" not in record:  # shipped with the zoo
        return
    used = places_in(config, Path(record["folder"]).parent)
    if odd := not_vouched(used, record.get("vouched", {})):
        own = [key for key in odd if key not in ("path", "folder", "cache", "root")]
        ways = f"name the data with --{'cache' if odd == ['cache'] else 'path'}"
        if own:
            ways = f"resume it once with {' '.join(f'data.{key}=...' for key in odd)}"
        raise ToolError(unknown(used, odd, ways))


def build_task(record: Mapping[str, Any], model: nn.Module) -> Task:
    """Build the task of a record around a model."""
    of_training = ("channels_last", "compile", "freeze", "class_weights")
    section = {k: v for k, v in record["task"].items() if k not in of_training}
    for key, value in (("class_names", record["class_names"]), ("preprocessing", record["preprocessing"])):
        if key in section:
            section[key] = section[key] or value or None
    return _build_section(section, "task", model=model)


def evaluate(record: Mapping[str, Any], model: nn.Module, progress: bool = False, **changes: Any) -> dict[str, float]:
    """Metrics on the test part, or on the validation part of runs without a test, computed by the record's task.

    Args:
        record: From :func:`record_of`.
        model: In eval mode, training or deploy form.
        progress: Show a progress bar.
        **changes: Arguments of the data module to replace.

    Raises:
        ToolError: The record is invalid, or outputs are not finite.
    """
    data = build_data(record, **changes)
    known = (record.get("input") or {}).get("tokenizer_sha256")
    if known and known != data.input_record().get("tokenizer_sha256"):
        raise ToolError(f"the tokenizer in {data.cache} is not that of the training (sha256 {known[:12]}...)")
    hook = model.register_forward_hook(_watch(str(record.get("name", "the model"))))
    try:
        with _fetching(record):
            return _measured(record, data, model, progress)
    finally:
        hook.remove()


def _check_table(record: Mapping[str, Any], data: Any) -> None:
    """Refuse a table whose columns, categories or fill values are no longer those that the model was trained with."""
    known = record.get("input") or {}
    if known.get("kind") == "table" and known.get("variables") and known != records.check(data.input_record()):
        path = record.get("places", {}).get("path", "the table")
        raise ToolError(f"{path} is no longer the one of the training: its columns or training rows "
                        "make other inputs; `validate --data FILE` measures on another table")  # fmt: skip


def _check_classes(record: Mapping[str, Any], data: Any) -> None:
    """Refuse a model whose labels are not the classes of its data, in their order, unless only they were changed.

    Labels of a saved model may be renamed by hand; what they were is on record as a hash.
    """
    labels = list(record.get("class_names") or ())
    classes = [shown(str(name), keep="") for name in getattr(data, "class_names", None) or ()]  # as saved
    if not labels or not classes or labels == classes:
        return
    if sorted(labels) == sorted(classes):
        first = next(i for i, pair in enumerate(zip(labels, classes, strict=True)) if len(set(pair)) == 2)
        raise ToolError(f"the labels of {record['name']} are in another order than the classes of its data: output "
                        f"{first} is {labels[first]!r:.60} there and {classes[first]!r:.60} here")  # fmt: skip
    if "folder" not in record or not record["data"].get("own"):  # data by name, which names its classes itself
        return
    saved = read_config(Path(record["folder"])).get(RECORD_HASHES, {}).get("label_names")
    if saved != record_hashes({"label_names": classes}).get("label_names"):
        strange = next((name for name in classes if name not in labels), classes[-1])
        raise ToolError(f"{getattr(data, 'path', 'the data')} has {len(classes)} classes, such as {strange!r:.60}, the "
                        f"model {len(labels)}, such as {labels[0]!r:.60}: name the classes by the labels of the model, "
                        "or measure with --data")  # fmt: skip


def unusable(outputs: Tensor) -> Tensor:
    """Mask (N,) of outputs (N, ...) with NaN or infinity; a logit of minus infinity beside finite ones is allowed."""
    judged = outputs.float().softmax(-1) if outputs.ndim == 2 and outputs.shape[1] > 1 else outputs
    return ~judged.isfinite().reshape(len(outputs), -1).all(1)


def _watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
    """Forward hook that raises ToolError at the first unusable output."""
    seen = 0

    def hook(module: nn.Module, given: Any, outputs: Any) -> None:
        nonlocal seen
        if not isinstance(outputs, Tensor) or not outputs.ndim:
            return
        if (bad := unusable(outputs)).any():
            row = seen + int(bad.nonzero()[0]) + 1
            raise ToolError(f"{name} gives NaN or infinity for row {row} of its data")
        seen += len(outputs)

    return hook


def _measured(record: Mapping[str, Any], data: Any, model: nn.Module, progress: bool) -> dict[str, float]:
    if hasattr(data, "stream"):  # continual learning: all tasks, task id unknown
        return {"test/acc_agnostic": _agnostic(data, model)}
    import lightning as L

    task = build_task(record, model)
    quiet = logging.getLogger("lightning.pytorch")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            trainer = L.Trainer(
                accelerator="cpu",
                devices=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=progress,
                enable_model_summary=False,
                use_distributed_sampler=False,
            )
            measure = trainer.validate if part_of(record) == "validation" else trainer.test
            measure(task, datamodule=data, verbose=False)
    finally:
        quiet.setLevel(level)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def batches(data: Any, size: int = 256, part: str = "test") -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over inputs and targets of the test or validation part (of a stream, of all tests), without padding.

    Raises:
        ToolError: The data is a time series.
    """
    if hasattr(data, "stream"):
        for images, targets in _stream_tests(data):
            yield from zip(images.split(size), targets.split(size), strict=True)
        return
    for inputs, targets in data.val_dataloader() if part == "validation" else data.test_dataloader():
        if not isinstance(inputs, Tensor):
            raise ToolError(f"{type(data).__name__} has windows and times; only classes and values are compared here")
        kept = ~targets.isnan() if targets.is_floating_point() else targets >= 0
        yield inputs[kept], targets[kept]


def _stream_tests(data: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Images, bytes as 0 to 1, and targets of the test part of every task."""
    for t in range(len(data.stream)):
        images, targets = data.stream[t].test
        yield images.float() / 255 if images.dtype == torch.uint8 else images.float(), targets


@torch.inference_mode()
def _agnostic(data: Any, model: nn.Module) -> float:
    """Mean task-agnostic accuracy over the tasks."""
    shares = [float((model(x).argmax(1) == y).double().mean()) for x, y in _stream_tests(data)]
    return sum(shares) / len(shares)


def _read_from(record: Mapping[str, Any], root: Places | None) -> str:
    """What a measurement read: the data on record, or the place that the user named instead."""
    given = {"root": root} if isinstance(root, str) else dict(root or {})
    place = given.get("path") or (given.get("root") if record["data"].get("own") else None)
    return str(place or record["data"]["title"])


def validate(model: str, root: Places | None = None, progress: bool = False, tolerance: float = 1e-3) -> dict[str, Any]:
    """Reproduce the metrics of a record, with its weights in deploy form on the test part of its data.

    Args:
        model: A shipped weight or the folder of a run.
        root: Where the data is, see :func:`build_data`.
        progress: Show a progress bar.
        tolerance: Largest difference from the record; absolute for values up to 1, relative above.

    Returns:
        `found` and `recorded` metrics by name, whether they are `reproduced` (None if the recorded ones are of a share
        of the part, which `on_record` tells), `name`, `data`, `part` ("test" or "validation"), `rows` and
        `preprocessing`.

    Raises:
        ToolError: The model has no record of its data, or the record is invalid.
    """
    record = record_of(model)
    metrics = evaluate(record, load(model), progress, root=root)
    judged = record["metric"]["name"]
    short = judged.partition("/")[0]
    recorded = {k: v for k, v in record["metrics"].items() if k.startswith(f"{short}/") and k in metrics}
    found = {k: metrics[k] for k in recorded}
    if judged not in found:
        raise ToolError(f"{record['name']} has {judged} on record, which {record['data']['title']} does not give again")
    close = all(abs(found[k] - recorded[k]) <= tolerance * max(1.0, abs(recorded[k])) for k in recorded)
    whole = record["data"].get("whole", {}).get(short)
    return {
        "name": record["name"],
        "data": _read_from(record, root),
        "part": part_of(record),
        "rows": whole or record["data"]["rows"].get(short),
        "found": found,
        "recorded": recorded,
        "reproduced": close if whole is None else None,
        "on_record": rows_of(record).get(short),
        "preprocessing": records.preparation(record),
    }
