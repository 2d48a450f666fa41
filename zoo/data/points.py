"""Point clouds: PointMNIST, the bright pixels of MNIST digits as 3-D points; and clouds of one's own in class folders.

Every batch is `(points, targets)`: float32 (B, num_points, 3) or with further values for a point, and int64 (B,).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from zoo.data import sources
from zoo.data.arrays import read_cloud
from zoo.data.checks import DataError, extends
from zoo.data.delimited import listed
from zoo.data.image import ImageDataModule, Part, Share
from zoo.data.lists import FileParts
from zoo.data.own import check_classes
from zoo.data.sampling import KeyedDataset, SampleKey, sample_seed, stratified_split
from zoo.data.walk import Files
from zoo.support import inputs
from zoo.support.quoting import is_printable

__all__ = ["PointFolder", "PointMnist", "Points", "farthest_points"]

Stretch = Annotated[float, Field(ge=1)]
Shift = Annotated[float, Field(ge=0)]

CLOUDS = Files(
    "point cloud",
    "point clouds",
    (".npy", ".xyz", ".txt", ".csv", ".tsv", ".ply"),
    missing="there is no folder {folder} ({reason})",
)
_MAX_CHANNELS = 16


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
    """Read a point cloud, see :func:`zoo.data.arrays.read_cloud`, as a model input (1, points, channels).

    Raises:
        DataError: The file is damaged, too large, its rows have another length, or all its points are in one place.
    """
    cloud = _rows_of(path, record.channels, "the model takes", record.further)
    return (standardised(drawn(cloud, record, path), record)[None],)


def _rows_of(path: Path, channels: int, who: str, further: Sequence[str] = ()) -> np.ndarray:
    """A cloud (P, channels), float64; its further values are in the order of `further` where both have names."""
    cloud, names = read_cloud(path)
    if cloud.ndim != 2 or cloud.shape[1] != channels or not len(cloud):
        raise DataError(f"{path} holds an array of {cloud.shape}, {who} rows of {channels} numbers")
    if not names or not further or names == list(further):
        return cloud
    if set(names) != set(further):
        raise DataError(f"{path} has the values {listed(names)} after x, y and z, {who} {listed(further)}")
    return cloud[:, [0, 1, 2, *(3 + names.index(name) for name in further)]]


def drawn(cloud: np.ndarray, record: inputs.Points, path: Path) -> Tensor:
    """Fit the coordinates of a cloud (P, channels) as the record tells, and choose its points: (points, channels)."""
    places = np.ascontiguousarray(cloud[:, :3])  # of one order, so that sums have the same bits
    if record.fit == "sphere":  # in numpy, whose sums do not depend on the number of threads
        centred = places - places.mean(0)
        extent = float(np.sqrt(np.square(centred).sum(1).max()))
        if extent <= _SAME * float(np.abs(places).max()):
            raise DataError(f"{path}: all of its points ({len(cloud)}) are in one place, so it has no shape")
        places = centred / extent
    points = torch.from_numpy(np.concatenate([places, cloud[:, 3:]], 1)).float()
    return points[farthest_points(points[None, :, :3], record.points)[0]]


def standardised(points: Tensor, record: inputs.Points) -> Tensor:
    """Points (..., channels) less the mean of the record, over its standard deviation."""
    return (points - torch.tensor(record.mean)) / torch.tensor(record.std)


_SAME = 1e-12  # of the largest coordinate: the rounding of a mean


class Points(KeyedDataset):
    """Point clouds held in memory.

    Args:
        points: (N, P, C), the coordinates first.
        targets: Class of each cloud, (N,).
        stretch: Largest random scale factor of each axis, at least 1; the smallest is its inverse.
        shift: Largest random shift along each axis.
        seed: Seed of the augmentation; None for none.
    """

    def __init__(
        self,
        points: Tensor,
        targets: Sequence[int] | Tensor,
        stretch: float = 1.0,
        shift: float = 0.0,
        seed: int | None = None,
    ) -> None:
        super().__init__(targets)
        self.points, self.stretch, self.shift, self.seed = points, stretch, shift, seed

    def sketch(self, index: int) -> int:
        """Hash of the stored cloud."""
        return hash(self.content(index))

    def content(self, index: int) -> bytes:
        """The stored cloud."""
        return self.points[index].numpy().tobytes()

    def images(self, keys: Sequence[SampleKey]) -> Tensor:
        """Points of `keys`, (B, P, C)."""
        x = self.points[[key.sample for key in keys]]
        if self.seed is None:
            return x
        uniform = torch.empty(len(keys), 2, 1, 3)
        generator = torch.Generator()
        for row, key in zip(uniform, keys, strict=True):
            generator.manual_seed(sample_seed(self.seed, key.epoch, key.sample))
            torch.rand(row.shape, generator=generator, out=row)
        low = 1 / self.stretch
        places = x[..., :3] * (low + uniform[:, 0] * (self.stretch - low)) + (2 * uniform[:, 1] - 1) * self.shift
        return torch.cat([places, x[..., 3:]], -1)


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
        stretch: Stretch = 1.5,
        shift: Shift = 0.2,
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


class PointFolder(FileParts):
    """Point clouds of one's own in folders, one per class, or of a list, see :class:`zoo.data.lists.FileParts`.

    `path` holds `train/` and optionally `test/` and `val/`, each with one folder per class, or the class folders
    themselves. A cloud is a `.npy` array, a text (`.xyz`, `.txt`, `.csv`, `.tsv`) or an ASCII `.ply`, with one row for
    a point: its coordinates, then up to 13 further values, such as a normal or a colour. A line of names must have x,
    y and z, in any order, and further values are then matched by their names. What is not given is taken
    from the training part: first `test_fraction` of each class for testing, then `val_fraction` of the rest for
    validation, the same for every seed. Nested folders, links and hidden files are treated as in :class:`ImageFolder`.

    `num_points` points are chosen by farthest point sampling, in training too; those of a smaller cloud are repeated.
    Further values are standardised by their mean and standard deviation over the training part.

    Args:
        path: The folder, or a list.
        num_points: Points of every cloud that the model sees.
        normalize: Move every cloud to the origin and scale it into the unit sphere; `False` keeps the coordinates.
        stretch: Largest random scale factor of each axis in training, at least 1; the smallest is its inverse.
        shift: Largest random shift along each axis in training.
        val_fraction: Share of the training clouds used for validation if there is no validation part.
        test_fraction: Share kept for testing if there is no test part; 0 tests nothing.
        **loader: What is about lists, see :class:`zoo.data.lists.FileParts`; seed and loaders, see
            :class:`zoo.data.ImageDataModule`.

    Raises:
        ValueError: If an argument is outside its range.
        DataError: If the folder is missing or has fewer than two classes, or a file is no cloud or has other columns.
    """

    kind = CLOUDS
    unit = "point clouds"

    @extends(FileParts, test_fraction=0.2, batch_size=16, eval_batch_size=64, drop_last=False)
    def __init__(
        self,
        path: str | Path,
        num_points: PositiveInt = 256,
        normalize: bool = True,
        stretch: Stretch = 1.5,
        shift: Shift = 0.2,
        val_fraction: Share = 0.1,
        **loader: Any,
    ) -> None:
        super().__init__(path=path, val_fraction=val_fraction, **loader)
        self.num_points, self.normalize, self.stretch, self.shift = num_points, normalize, stretch, shift
        self._clouds: dict[Part, tuple[Tensor, list[int]]] = {}
        self._record: dict[str, Any] = {}
        self._lengths: list[int] = []  # points of each file

    @property
    def in_chans(self) -> int:  # type: ignore[override]
        """Values of a point."""
        self._read()
        return int(self._record["channels"])

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(in_chans, 1, num_points)."""
        return self.in_chans, 1, self.num_points

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Input size; how points are normalised is in the input record."""
        return {"input_size": list(self.input_size), "mean": [0.0], "std": [1.0]}

    def input_record(self) -> dict[str, Any]:
        """Number of points and values, how clouds are fitted, and the mean and scale of further values."""
        self._read()
        return dict(self._record)

    def prepare_data(self) -> None:
        """Read the clouds; nothing is fetched."""
        self._read()

    def setup(self, stage: str | None = None) -> None:
        """Standardise the clouds, once."""
        if self.datasets:
            return
        self._read()
        form = inputs.read(self._record)
        for part, (clouds, targets) in self._clouds.items():
            training = (self.stretch, self.shift, self.seed) if part == "train" else ()
            self.datasets[part] = Points(standardised(clouds, form), targets, *training)
        self._clouds = {}

    def describe(self) -> list[str]:
        """That of the base, and the number of points."""
        self.setup()
        few = sum(length < self.num_points for length in self._lengths)
        low, middle, high = (int(np.quantile(self._lengths, q, method="lower")) for q in (0, 0.5, 1))
        told = f"points: {low:,} to {high:,} in a file, {middle:,} in the middle, of {self.in_chans} values"
        told += f"; {self.num_points} of them are used" + (f", repeated in {few:,} smaller files" if few else "")
        return [*super().describe(), told]

    def _read(self) -> None:
        """Read every file, once; of each only the chosen points are kept."""
        if self._record:
            return
        names: tuple[Part, ...] = ("train", "val", "test")
        files = {part: found for part in names if (found := self.part(part)) is not None}
        check_classes(files, self.class_names, self.path)
        first = Path(files["train"][0][0])
        fit: Literal["sphere"] | None = "sphere" if self.normalize else None
        form = inputs.Points(kind="points", points=self.num_points, fit=fit, **_values(first))
        lengths = []
        for part, (paths, targets) in files.items():
            chosen = []
            for path in map(Path, paths):
                cloud = _rows_of(path, form.channels, f"{first} has", form.further)
                lengths.append(len(cloud))
                chosen.append(drawn(cloud, form, path))
            self._clouds[part] = torch.stack(chosen), targets
        self._lengths = lengths
        record = form.model_dump(exclude_none=True, exclude=None if form.further else {"further"})
        self._record = record | _statistics(self._clouds["train"][0], self.normalize)


def _values(path: Path) -> dict[str, Any]:
    """Number of values of a point, and the names of the further ones if there are some, told by the first file."""
    cloud, names = read_cloud(path)
    if cloud.ndim != 2 or not 3 <= cloud.shape[1] <= _MAX_CHANNELS:
        raise DataError(
            f"{path} holds an array of {cloud.shape}: a point cloud has a row for each point, of 3 coordinates and up "
            f"to {_MAX_CHANNELS - 3} further values"
        )
    if odd := next((name for name in names or () if not is_printable(name)), None):
        raise DataError(f"{path}: the column {odd[:60]!r} has characters in its name that cannot be printed; rename it")
    return {"channels": int(cloud.shape[1]), **({"further": names} if names else {})}


def _statistics(points: Tensor, fitted: bool) -> dict[str, Any]:
    """Entries of the record from the training clouds (N, P, C): mean and scale of further values, and the extent."""
    found: dict[str, Any] = {}
    if not fitted and (extent := float(points[..., :3].abs().max())):
        found["extent"] = extent
    if points.shape[-1] > 3:
        further = points[..., 3:].flatten(0, 1).double().numpy()
        std = further.std(0)
        found["mean"] = [0.0] * 3 + further.mean(0).tolist()
        found["std"] = [1.0] * 3 + np.where(std > 1e-12 * np.abs(further).max(0), std, 1.0).tolist()
    return found
