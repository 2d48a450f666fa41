"""Point clouds: PointMNIST, the bright pixels of MNIST digits as 3-D points.

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
    """Farthest point sampling from the first point (Qi et al., PointNet++, 2017), (B, P, 3) -> indices (B, number).

    With fewer than `number` distinct points, points are repeated.
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
    """Read a point cloud, a `.npy` array or text with one point per row, as a model input (1, points, channels).

    Raises:
        DataError: The file is damaged, too large, or its rows have another length.
    """
    cloud = torch.from_numpy(read_array(path, f"rows of {record.channels} numbers"))
    if cloud.ndim != 2 or cloud.shape[1] != record.channels or not len(cloud):
        raise DataError(
            f"{path} holds an array of {tuple(cloud.shape)}, the model takes rows of {record.channels} numbers"
        )
    return (cloud[farthest_points(cloud[None, :, :3], record.points)[0]][None],)


class Points(KeyedDataset):
    """Point clouds held in memory.

    Args:
        points: (N, P, 3).
        targets: Class of each cloud, (N,).
        stretch: Largest random scale factor of each axis, at least 1; the smallest is its inverse.
        shift: Largest random shift along each axis.
        seed: Seed of the augmentation; None for none.
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
        uniform = torch.empty(len(keys), 2, 1, 3)
        generator = torch.Generator()
        for row, key in zip(uniform, keys, strict=True):
            generator.manual_seed(sample_seed(self.seed, key.epoch, key.sample))
            torch.rand(row.shape, generator=generator, out=row)
        low = 1 / self.stretch
        return x * (low + uniform[:, 0] * (self.stretch - low)) + (2 * uniform[:, 1] - 1) * self.shift


class PointMnist(ImageDataModule):
    """5,000 digits as point clouds: x and y of the bright pixels in [-1, 1], and the brightness, 0 to 0.5, as z.

    Digits and split are those of `Mnist5k`; `num_points` pixels are kept by farthest point sampling.

    Args:
        cache: Folder of what is fetched; `None` means `$XDG_CACHE_HOME/kernel-zoo` or `~/.cache/kernel-zoo`.
        download: Fetch missing files with pip.
        num_points: Points per cloud.
        stretch: Largest random scale factor of each axis in training, at least 1; the smallest is its inverse.
        shift: Largest random shift along each axis in training.
        val_fraction: Share of the training part used for validation.
        **loader: Seed and loaders, see :class:`zoo.data.ImageDataModule`.

    Raises:
        ValueError: If an argument is outside its range.
        DataError: If the file cannot be fetched or is damaged.
    """

    in_chans = 3

    @extends(ImageDataModule, eval_batch_size=256)
    def __init__(
        self,
        cache: str | Path | None = None,
        download: bool = True,
        num_points: PositiveInt = 96,
        stretch: Annotated[float, Field(ge=1)] = 1.5,
        shift: Annotated[float, Field(ge=0)] = 0.2,
        val_fraction: Share = 0.1,
        **loader: Any,
    ) -> None:
        super().__init__(**loader)
        self.cache = sources.cache_folder(cache)
        self.download, self.num_points = download, num_points
        self.stretch, self.shift, self.val_fraction = stretch, shift, val_fraction

    @property
    def class_names(self) -> list[str]:
        """The ten digits."""
        return list("0123456789")

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(3, 1, num_points)."""
        return 3, 1, self.num_points

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Input size; points are not normalised."""
        return {"input_size": list(self.input_size), "mean": [0.0], "std": [1.0]}

    def input_record(self) -> dict[str, Any]:
        """Number of points per cloud and their largest absolute coordinate."""
        return {"kind": "points", "points": self.num_points, "channels": 3, "extent": 1.0}

    def prepare_data(self) -> None:
        """Fetch the digits unless they are cached."""
        sources.fetch_mnist5k(self.root, self.download)

    def setup(self, stage: str | None = None) -> None:
        """Convert the digits to point clouds, once."""
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
        """Convert uint8 images (N, 1, 28, 28) to clouds (N, num_points, 3)."""
        found = []
        for image in images[:, 0]:
            y, x = torch.nonzero(image > 32, as_tuple=True)
            found.append(torch.stack([x / 13.5 - 1, 1 - y / 13.5, image[y, x] / 510], 1))
        most = max(map(len, found))
        # padding repeats the first point: at distance 0, it is never chosen before the others
        padded = torch.stack([torch.cat([cloud, cloud[:1].expand(most - len(cloud), 3)]) for cloud in found])
        return padded[torch.arange(len(padded))[:, None], farthest_points(padded, self.num_points)]
