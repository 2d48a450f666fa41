"""LightningDataModules whose batches are pure functions of the seed, the epoch and the position.

>>> from zoo.data import Mnist5k
>>> data = Mnist5k(batch_size=128)
>>> data.prepare_data(); data.setup()
>>> images, targets = next(iter(data.train_dataloader()))  # (128, 1, 28, 28) float32, (128,) int64

Names are imported on first use, which keeps `import zoo.data` fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "IGNORE_INDEX": "sampling",
    "AudioFolder": "audio",
    "Augmentation": "transforms",
    "Cifar10": "image",
    "Cifar100": "image",
    "ContinualData": "task_streams",
    "DataError": "checks",
    "Digits": "image",
    "EpochBatches": "sampling",
    "FashionMnist": "image",
    "FoodReviews": "text",
    "Forecast": "series",
    "GivenTasks": "task_streams",
    "ImageDataModule": "image",
    "ImageFolder": "folder",
    "ImageNet": "folder",
    "IndianPines": "hyperspectral",
    "Mnist": "image",
    "Mnist5k": "image",
    "MovingMnist": "video",
    "PermutedTasks": "task_streams",
    "PointFolder": "points",
    "PointMnist": "points",
    "Prompts": "audio",
    "ResumableLoader": "sampling",
    "RotatedTasks": "task_streams",
    "SplitTasks": "task_streams",
    "SpokenDigits": "audio",
    "TextFolder": "text",
    "VideoFolder": "video",
    "cache_folder": "sources",
    "fetch_weights": "wheel_weights",
}
__all__ = list(_HOME)

if TYPE_CHECKING:
    from zoo.data.audio import AudioFolder, Prompts, SpokenDigits
    from zoo.data.checks import DataError
    from zoo.data.folder import ImageFolder, ImageNet
    from zoo.data.hyperspectral import IndianPines
    from zoo.data.image import Cifar10, Cifar100, Digits, FashionMnist, ImageDataModule, Mnist, Mnist5k
    from zoo.data.points import PointFolder, PointMnist
    from zoo.data.sampling import IGNORE_INDEX, EpochBatches, ResumableLoader
    from zoo.data.series import Forecast
    from zoo.data.sources import cache_folder
    from zoo.data.task_streams import ContinualData, GivenTasks, PermutedTasks, RotatedTasks, SplitTasks
    from zoo.data.text import FoodReviews, TextFolder
    from zoo.data.transforms import Augmentation
    from zoo.data.video import MovingMnist, VideoFolder
    from zoo.data.wheel_weights import fetch_weights


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'zoo.data' has no {name!r}; its public names are {', '.join(_HOME)}")
    return getattr(importlib.import_module(f"zoo.data.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
