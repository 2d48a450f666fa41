"""Data: LightningDataModules whose every batch is a pure function of the seed, the epoch and the position.

>>> from zoo.data import Mnist5k
>>> data = Mnist5k(batch_size=128)
>>> data.prepare_data(); data.setup()
>>> images, targets = next(iter(data.train_dataloader()))  # (128, 1, 28, 28) float32, (128,) int64

Names are imported on first use, so that `import zoo.data` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "IGNORE_INDEX": "zoo.data.sampling",
    "Augmentation": "zoo.data.transforms",
    "Cifar10": "zoo.data.image",
    "Cifar100": "zoo.data.image",
    "DataError": "zoo.data.checks",
    "Digits": "zoo.data.image",
    "EpochBatches": "zoo.data.sampling",
    "FashionMnist": "zoo.data.image",
    "ImageDataModule": "zoo.data.image",
    "ImageFolder": "zoo.data.folder",
    "ImageNet": "zoo.data.folder",
    "Mnist": "zoo.data.image",
    "Mnist5k": "zoo.data.image",
    "ResumableLoader": "zoo.data.sampling",
    "cache_folder": "zoo.data.sources",
}
__all__ = list(_HOME)

if TYPE_CHECKING:
    from zoo.data.checks import DataError
    from zoo.data.folder import ImageFolder, ImageNet
    from zoo.data.image import Cifar10, Cifar100, Digits, FashionMnist, ImageDataModule, Mnist, Mnist5k
    from zoo.data.sampling import IGNORE_INDEX, EpochBatches, ResumableLoader
    from zoo.data.sources import cache_folder
    from zoo.data.transforms import Augmentation


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'zoo.data' has no attribute {name!r}; its public names are {', '.join(_HOME)}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
