"""The one gate for pictures: which files are opened, how what is in them becomes grey or colour, and an input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from zoo import inputs
from zoo.data.checks import DataError

__all__ = ["prepare_image"]


def prepare_image(path: Path, record: inputs.Image) -> tuple[Tensor, ...]:
    """One picture as the model's input, (1, C, H, W)."""
    from timm.data import create_transform

    try:
        with Image.open(path) as file:
            picture = file.convert("L" if record.channels == 1 else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image ({str(error)[:100]})") from None
    keys = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    how = {k: getattr(record, k) for k in keys}
    transform: Any = create_transform((record.channels, *record.size), is_training=False, **how)
    return (torch.as_tensor(transform(picture)[None]),)
