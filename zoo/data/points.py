"""Point clouds: PointMNIST, the lit pixels of real digits as points in space.

Every batch is `(points, targets)`: float32 (B, num_points, 3), and int64 (B,).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from zoo.data import sources
from zoo.data.arrays import read_array
from zoo.data.checks import DataError, extends
from zoo.data.image import ImageDataModule
from zoo.data.sampling import KeyedDataset, SampleKey, sample_seed, stratified_split
from zoo.support import inputs

__all__ = ["PointMnist", "Points", "farthest_points"]

Share = Annotated[float, Field(ge=0, lt=1)]


def farthest_points(points: Tensor, number: int) -> Tensor:
    """Indices of points that lie as far apart as can be, chosen greedily from the first one, (B, P, 3) -> (B, number).

    With fewer points than asked for, the choice begins again from the first point.
    """
    batch = torch.arange(len(points))
    distance = torch.full(points.shape[:2], torch.inf)
    chosen = torch.zeros(len(points), number, dtype=torch.int64)
    for i in range(1, number):
        last = points[batch, chosen[:, i - 1]][:, None]
        distance = torch.minimum(distance, (points - last).square().sum(-1))
        chosen[:, i] = distance.argmax(1)
        distance[distance.amax(1) == 0] = torch.inf  # all are taken
    return chosen


def prepare_points(path: Path, record: inputs.Points) -> tuple[Tensor, ...]:
    """One cloud as the model's input, (1, points, channels): an array of rows in a `.npy` file, or numbers in lines.

    Raises:
        DataError: The file is damaged, too large, or holds other rows.
    """
    cloud = torch.from_numpy(read_array(path, f"rows of {record.channels} numbers"))
    if cloud.ndim != 2 or cloud.shape[1] != record.channels or not len(cloud):
        raise DataError(
            f"{path} holds an array of {tuple(cloud.shape)}, the model takes rows of {record.channels} numbers"
        )
    return (cloud[farthest_points(cloud[None, :, :3], record.points)[0]][None],)


class Points(KeyedDataset):
    """Clouds held in memory.

    Args:
        points: (N, P, 3).
        targets: Class of each cloud.
        stretch: Largest factor by which training stretches or squeezes each axis, at least 1.
        shift: Largest shift of training along each axis.
        seed: Seed of both; None leaves the clouds alone.
    """

    def __init__(
        self, points: Tensor, targets: Tensor, stretch: float = 1.0, shift: float = 0.0, seed: int | None = None
    ) -> None:
        super().__init__(targets)
        self.points, self.stretch, self.shift, self.seed = points, stretch, shift, seed

    def images(self, keys: Sequence[SampleKey]) -> Tensor:
        """Points of `keys`, (B, P, 3)."""
        x = self.points[[key.sample for key in keys]]
        if self.seed is None:
            return x
        draws = torch.empty(len(keys), 2, 1, 3)
        generator = torch.Generator()
        for row, key in zip(draws, keys, strict=True):
            generator.manual_seed(sample_seed(self.seed, key.epoch, key.sample))
            torch.rand(row.shape, generator=generator, out=row)
        low = 1 / self.stretch
        return x * (low + draws[:, 0] * (self.stretch - low)) + (2 * draws[:, 1] - 1) * self.shift


class PointMnist(ImageDataModule):
    """5,000 digits as point clouds: x and y of the lit pixels in [-1, 1], and the brightness, 0 to 0.5, as z.

    The digits are those of `Mnist5k`, with its split; of the lit pixels, `num_points` that lie far apart are kept.

    Args:
        root: Folder of the files; `None` means the cache folder, `$XDG_CACHE_HOME/kernel-zoo` or `~/.cache/kernel-zoo`.
        download: Fetch missing files with pip.
        num_points: Points of a cloud.
        stretch: Largest factor by which training stretches or squeezes each axis, at least 1.
        shift: Largest shift of training along each axis.
        val_fraction: Share of the training part that is used for validation.
        **loader: Seed and loaders, see :class:`zoo.data.ImageDataModule`.

    Raises:
        ValueError: If an argument is outside its range.
        DataError: If the file cannot be had or is damaged.
    """

    in_chans = 3

    @extends(ImageDataModule, eval_batch_size=256)
    def __init__(
        self,
        root: str | Path | None = None,
        download: bool = True,
        num_points: PositiveInt = 96,
        stretch: Annotated[float, Field(ge=1)] = 1.5,
        shift: Annotated[float, Field(ge=0)] = 0.2,
        val_fraction: Share = 0.1,
        **loader: Any,
    ) -> None:
        super().__init__(**loader)
        self.root = sources.cache_folder(root)
        self.download, self.num_points = download, num_points
        self.stretch, self.shift, self.val_fraction = stretch, shift, val_fraction

    @property
    def class_names(self) -> list[str]:
        """The ten digits."""
        return list("0123456789")

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Three coordinates of every point."""
        return 3, 1, self.num_points

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Points go into the model as they are."""
        return {"input_size": list(self.input_size), "mean": [0.0], "std": [1.0]}

    def input_record(self) -> dict[str, Any]:
        """How many points of a cloud are kept, and how far from 0 their coordinates lie."""
        return {"kind": "points", "points": self.num_points, "channels": 3, "extent": 1.0}

    def prepare_data(self) -> None:
        """Fetch the digits unless the cache has them."""
        sources.fetch_mnist5k(self.root, self.download)

    def setup(self, stage: str | None = None) -> None:
        """Turn the digits into clouds, once."""
        if self.datasets:
            return
        (images, targets), (test_images, test_targets) = sources.load_mnist5k(self.root)
        first, second = stratified_split(targets, self.val_fraction, sources.SPLIT_SEED)
        points = self.clouds(images)
        self.datasets["train"] = Points(points[first], targets[first], self.stretch, self.shift, self.seed)
        if len(second):
            self.datasets["val"] = Points(points[second], targets[second])
        self.datasets["test"] = Points(self.clouds(test_images), test_targets)

    def clouds(self, images: Tensor) -> Tensor:
        """Images (N, 1, 28, 28) of bytes to clouds (N, num_points, 3)."""
        found = []
        for image in images[:, 0]:
            y, x = torch.nonzero(image > 32, as_tuple=True)
            found.append(torch.stack([x / 13.5 - 1, 1 - y / 13.5, image[y, x] / 510], 1))
        most = max(map(len, found))
        # a padded point repeats the first one: its distance is 0, so it is never chosen before the others
        padded = torch.stack([torch.cat([cloud, cloud[:1].expand(most - len(cloud), 3)]) for cloud in found])
        return padded[torch.arange(len(padded))[:, None], farthest_points(padded, self.num_points)]
