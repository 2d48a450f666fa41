"""One function that cuts, pads and resamples recordings, for evaluation and prediction."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from zoo import inputs
from zoo.data.audio import Clips, read_audio
from zoo.data.sampling import SampleKey

__all__ = ["prepare_sound"]


def prepare_sound(path: Path, record: inputs.Sound) -> tuple[Tensor, ...]:
    """One recording as the model's input, (1, samples)."""
    clip = read_audio(path, record.rate)
    return (Clips([clip], [0], record.samples, record.fill).images([SampleKey(0)]),)
