"""Pictures of a model by name, as PNG files: what `python -m zoo figure` runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo import inputs
from zoo.data.checks import DataError
from zoo.data.folder import EXTENSIONS, IMAGES, FolderImages
from zoo.data.pictures import Fit
from zoo.data.sampling import SampleKey
from zoo.data.walk import below
from zoo.figures import (
    context_kernels,
    hyper_kernels,
    merged_kernels,
    plot_curves,
    plot_hyper_kernels,
    plot_kernels,
    plot_receptive_field,
    receptive_field,
)
from zoo.files import write_atomic
from zoo.models.registry import create_model
from zoo.values import PICTURES, check_closed, check_output, read_curves

__all__ = ["PictureError", "draw"]


class PictureError(ValueError):
    """A picture that cannot be drawn; the message says why."""


def draw(
    kind: Literal["receptive-field", "kernels", "hyper-kernels", "context-kernels", "losses"],
    model: str,
    out: str | Path,
    *,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    data: str | Path | None = None,
    count: int | None = None,
    stage: int = -1,
    layer: str | None = None,
) -> str:
    """Draw one picture of a model and save it.

    Args:
        kind: `receptive-field` (see :func:`zoo.figures.receptive_field`), `kernels`, the `hyper-kernels` of a
            Terminator, its `context-kernels` for an image, or the `losses` of a run.
        model: Name of the zoo or of timm, or `local-dir:<folder>`, which brings its weights.
        out: The PNG.
        checkpoint: A file with the model's weights.
        pretrained: Fetch the released weights.
        data: Folder of images (at any depth) to average the receptive field over, or whose first one makes the
            context-dependent kernels; None takes noise. For `losses` the folder of the run.
        count: Images to average over, 16 by default, or kernels to show, 32 by default.
        stage: Which feature map the receptive field belongs to.
        layer: Which layer's kernels.

    Returns:
        A line about the picture.

    Raises:
        PictureError: The model is unknown or has nothing of that kind.
        OutputError: `out` ends in no suffix of a picture, or lies in no folder.
        CheckpointError: The weights cannot be loaded, or the picture cannot be written.
        DataError: The folder has no readable images.
    """
    suffix = check_output(out, PICTURES).suffix.lower()
    try:
        pretrained = pretrained or model.startswith("local-dir:")
        network = create_model(model, pretrained=pretrained, checkpoint_path=checkpoint).eval()
        if kind == "losses":
            curves = _losses(data)
            ax, told = plot_curves(curves), f"{', '.join(curves)} of {data}"
        elif kind == "hyper-kernels":
            ax = plot_hyper_kernels(hyper_kernels(network), count=count or 12, title=f"{model}: hyper-kernels")
            told = f"global hyper-kernels of every block of {model}"
        elif kind == "context-kernels":
            images = _noise(network, 1) if data is None else _images(network, Path(data), 1)
            kernels = context_kernels(network, images[0])
            ax = plot_hyper_kernels(kernels, count=count or 12, title=f"{model}: kernels for one image")
            told = f"context-dependent kernels of every block of {model} for one image"
        elif kind == "kernels":
            name, merged = merged_kernels(network, layer)
            ax = plot_kernels(merged, count=count or 32, title=f"{model}: {name}, {_size(merged)}")
            told = f"{min(count or 32, len(merged))} of {len(merged)} merged {_size(merged)} kernels of {name}"
        else:
            images = _noise(network, count or 16) if data is None else _images(network, Path(data), count or 16)
            field = receptive_field(network, images, stage)
            ax = plot_receptive_field(field, title=model)
            told = f"effective receptive field of {model}, {len(images)} images of {_size(field)}"
    except (DataError, PictureError):
        raise
    except (ValueError, TypeError) as error:
        raise PictureError(str(error)) from None
    write_atomic(out, lambda file: ax.figure.savefig(file, format=suffix[1:], dpi=150))  # type: ignore[union-attr]
    untrained = kind != "losses" and not (pretrained or checkpoint)
    return f"{out}: {told}" + ("; the weights are untrained" if untrained else "")


def _losses(run: str | Path | None) -> dict[str, tuple[list[int], list[float]]]:
    """Training losses of a run, by name, from its metrics.csv."""
    if run is None:
        raise PictureError("the losses are those of a run: give its folder with --data")
    check_closed(Path(run).expanduser())
    paths = sorted(Path(run).expanduser().rglob("metrics.csv"))
    if not paths:
        raise PictureError(f"there is no metrics.csv below {run}; the run needs logger=csv or the default one")
    found, left_out = read_curves(paths[0])
    names = ("train/loss", "train/cross_entropy", "train/slow_loss", "train/norm_penalty")
    curves = {name.removeprefix("train/"): found[name] for name in names if name in found}
    if not curves:
        raise PictureError(left_out or f"{paths[0]} has no training losses")
    return curves


def _size(array: Any) -> str:
    return " x ".join(map(str, array.shape[-2:]))


def _preprocessing(network: nn.Module) -> dict[str, Any]:
    from timm.data import resolve_model_data_config

    return resolve_model_data_config(network)


def _noise(network: nn.Module, count: int) -> Tensor:
    return torch.randn(count, *_preprocessing(network)["input_size"], generator=torch.Generator().manual_seed(0))


def _images(network: nn.Module, folder: Path, count: int) -> Tensor:
    """The first images below a folder, prepared as the model's record says."""
    record = inputs.record_of(network)
    if record["kind"] != "image":
        raise PictureError("the model does not take images; leave --data out to draw it with noise")
    paths = below(folder.expanduser(), IMAGES)[:count]
    if not paths:
        raise DataError(f"there is no image ({' '.join(EXTENSIONS)}) below {folder}")
    pictures = FolderImages(paths, [0] * len(paths), Fit(inputs.read(record)), seed=None)
    return pictures.images([SampleKey(i) for i in range(len(paths))])
