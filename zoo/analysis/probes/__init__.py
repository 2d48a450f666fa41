"""Probes: analyses of any model, as a line of text, plain values and a picture. `python -m zoo probe NAME MODEL`.

>>> found = look("receptive-field", Subject("unireplknet_a.in1k", pretrained=True), count=8)
>>> found.values, found.draw()

A probe is a function of a :class:`Subject` decorated with `@probe(name, description)`, in a module of this package or
of a package that provides a family; its other arguments are its options.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.support.register import Register
from zoo.support.signatures import check_call
from zoo.support.values import PICTURES, check_output

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor, nn

__all__ = ["Finding", "PictureError", "ProbeError", "Subject", "draw", "look", "noise", "probe", "save"]


class ProbeError(ValueError):
    """A probe that is not applicable; the message says why."""


PictureError = ProbeError  # its name in 0.1.0


@dataclass(frozen=True)
class Finding:
    """Result of a probe.

    Attributes:
        told: One-line summary.
        values: Plain values, for JSON.
        draw: Draws the picture and returns its axes.
    """

    told: str
    values: dict[str, Any]
    draw: Callable[[], Axes]


@dataclass
class Subject:
    """The model that a probe analyses, and the images to use.

    Attributes:
        name: A name of the zoo or of timm, or a run folder or `local-dir:<folder>`, which include their weights.
        checkpoint: A file with the model's weights.
        pretrained: Load the released weights.
        data: Folder of images, searched recursively; None uses noise.
    """

    name: str
    checkpoint: str | Path | None = None
    pretrained: bool = False
    data: str | Path | None = None

    @classmethod
    def of(cls, model: nn.Module, name: str) -> Subject:
        """A subject for an existing model, with its weights."""
        subject = cls(name, pretrained=True)
        vars(subject)["model"] = model
        return subject

    @cached_property
    def model(self) -> nn.Module:
        """The model in eval mode."""
        from zoo.registry.factory import as_named, create_model

        name = as_named(self.name)
        self.pretrained = self.pretrained or name.startswith("local-dir:")
        return create_model(name, pretrained=self.pretrained, checkpoint_path=self.checkpoint).eval()

    @property
    def untrained(self) -> bool:
        """Whether the model has been built, with untrained weights."""
        return "model" in vars(self) and not (self.pretrained or self.checkpoint)

    def images(self, count: int) -> Tensor:
        """The first images of the folder, prepared by the model's input record, or noise, (count, C, H, W)."""
        from zoo.data.folder import first_images
        from zoo.support import inputs

        if self.data is None:
            return noise(self.model, count)
        record = inputs.record_of(self.model)
        if record["kind"] != "image":
            raise ProbeError("the model does not take images; omit --data to use noise")
        return first_images(Path(self.data).expanduser(), inputs.read(record), count)


def noise(model: nn.Module, count: int) -> Tensor:
    """Standard normal images of the model's input size, from a fixed seed, (count, C, H, W)."""
    import torch
    from timm.data import resolve_model_data_config

    size = resolve_model_data_config(model)["input_size"]
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(0))


#: Registers `probe(subject, **options) -> Finding`.
probe: Register[Callable[..., Finding]] = Register("probe", "zoo.analysis.probes")


def look(name: str, subject: Subject, **options: Any) -> Finding:
    """Apply a probe to a model.

    Raises:
        ProbeError: The probe or an option is unknown, or the probe is not applicable to the model.
        CheckpointError: The weights cannot be loaded.
        DataError: The folder has no readable images.
    """
    from zoo.data.checks import DataError

    try:
        made = probe.get(name).made
        if problems := check_call(made, options, given=("subject",)):
            raise ProbeError("; ".join(problems))
        return made(subject, **options)
    except (DataError, ProbeError):
        raise
    except (ValueError, TypeError) as error:
        raise ProbeError(str(error)) from None


def draw(
    name: str,
    model: str,
    out: str | Path,
    *,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    data: str | Path | None = None,
    **options: Any,
) -> str:
    """Apply a probe and save its picture.

    Args:
        name: Name of the probe.
        model: Name of the model, see :class:`Subject`; likewise the following.
        out: Picture file: .png, .svg or .pdf.
        checkpoint: A file with the model's weights.
        pretrained: Load the released weights.
        data: Folder of images.
        **options: Options of the probe.

    Returns:
        A one-line summary.

    Raises:
        ProbeError: As for :func:`look`, which may raise other errors too.
        OutputError: `out` has another suffix, or its folder does not exist.
        CheckpointError: The picture cannot be written.
    """
    out = check_output(out, PICTURES)
    subject = Subject(model, checkpoint, pretrained, data)
    return save(look(name, subject, **options), subject, out)


def save(found: Finding, subject: Subject, out: Path) -> str:
    """Write the picture of a finding; returns a one-line summary."""
    from zoo.analysis.plots import save_figure

    figure: Any = found.draw().figure
    save_figure(figure, out, dpi=150)
    return f"{out}: {found.told}" + ("; the weights are untrained" if subject.untrained else "")
