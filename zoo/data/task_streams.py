"""Task streams for continual learning, from images in memory: permuted pixels, rotated images, split classes.

>>> stream = PermutedTasks(train, test, tasks=20, seed=1)     # pairs of images (N, C, H, W) and classes (N,)
>>> task = stream[3]                                          # indexable and iterable
>>> images, classes = task.train

Tasks are numbered from 0. All random choices are in `state_dict()`, which :class:`ContinualData` stores in checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from zoo.data import image
from zoo.data.checks import DataError, checked
from zoo.data.image import Share
from zoo.data.sampling import sample_seed, stratified_split
from zoo.data.sources import SPLIT_SEED, Split

__all__ = [
    "ContinualData",
    "PermutedTasks",
    "RotatedTasks",
    "SplitTasks",
    "StreamTask",
    "TaskStream",
    "rotation_degrees",
]


class StreamTask(NamedTuple):
    """A task: its number, its classes, and pairs of images (N, C, H, W) and classes (N,) for training and testing."""

    number: int
    classes: list[int]
    train: Split
    test: Split


class TaskStream:
    """Base of the task streams.

    Args:
        train: Training images (N, C, H, W), uint8 or floating point, and classes (N,).
        test: Test images and classes.
        tasks: Number of tasks.
        seed: Seed of all random choices.
        train_samples: Training images per task, sampled anew for each task; None for all.

    Raises:
        DataError: The images and classes do not match, or a number is out of range.
    """

    def __init__(self, train: Split, test: Split, tasks: int, seed: int = 0, train_samples: int | None = None) -> None:
        for part, (images, classes) in (("train", train), ("test", test)):
            if images.ndim != 4 or classes.ndim != 1 or len(images) != len(classes) or not len(images):
                shapes = f"{tuple(images.shape)} and {tuple(classes.shape)}"
                raise DataError(f"the {part} part needs images (N, C, H, W) and as many classes (N,), got {shapes}")
            if images.dtype != torch.uint8 and not images.is_floating_point():
                raise DataError(
                    f"the {part} part has images of type {images.dtype}; bytes or floating point are needed"
                )
            if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool or classes.min() < 0:
                raise DataError(f"the {part} part needs whole numbers from 0 as classes, got {_class_list(classes)}")
        if tasks < 1:
            raise DataError(f"tasks={tasks} must be at least 1")
        if train_samples is not None and not 0 < train_samples <= len(train[0]):
            raise DataError(f"train_samples={train_samples} must be between 1 and {len(train[0])}")
        self.train, self.test, self.tasks, self.seed, self.train_samples = train, test, tasks, seed, train_samples
        self._tests: dict[int, Split] = {}

    def __len__(self) -> int:
        return self.tasks

    def __iter__(self) -> Iterator[StreamTask]:
        return (self[t] for t in range(len(self)))

    def __getitem__(self, task: int) -> StreamTask:
        if not -self.tasks <= task < self.tasks:
            raise IndexError(f"task {task} of a stream of {self.tasks}")
        task %= self.tasks
        images, classes = self.select(self.train, task)
        chosen = self._subset(task, len(classes))
        if chosen is not None:
            images, classes = images[chosen], classes[chosen]
        train = self.transform(images, task), classes
        return StreamTask(task, classes.unique().tolist(), train, self.test_part(task))

    def _subset(self, task: int, count: int) -> Tensor | None:
        """Indices of the `train_samples` training images of a task; None for all."""
        if self.train_samples is None:
            return None
        generator = torch.Generator().manual_seed(sample_seed(self.seed, f"task {task}"))
        return torch.randperm(count, generator=generator)[: self.train_samples].sort().values

    def labels(self, task: int) -> Tensor:
        """Classes (N,) of a task's training images, without transforming the images."""
        classes = self.train[1][self.chosen(self.train, task)]
        subset = self._subset(task, len(classes))
        return classes if subset is None else classes[subset]

    def test_part(self, task: int) -> Split:
        """Test images and classes of a task, cached."""
        if task not in self._tests:
            images, classes = self.select(self.test, task)
            self._tests[task] = self.transform(images, task), classes
        return self._tests[task]

    def select(self, part: Split, task: int) -> Split:
        """Images and classes of a task, not transformed."""
        chosen = self.chosen(part, task)
        return part[0][chosen], part[1][chosen]

    def chosen(self, part: Split, task: int) -> Any:
        """Index of the images of a task: a slice or a boolean mask (N,)."""
        return slice(None)

    def transform(self, images: Tensor, task: int) -> Tensor:
        """Transform images for a task."""
        return images

    def state_dict(self) -> dict[str, Any]:
        """The seed and all random choices."""
        return {"seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the seed and the random choices of another stream."""
        self._tests, self.seed = {}, state["seed"]


class PermutedTasks(TaskStream):
    """Permuted pixels: a fixed permutation per task, the identity for the first one.

    Args:
        train, test, tasks, seed, train_samples: See :class:`TaskStream`.
        permutations: Source pixel of each pixel, (tasks, H W), the same for all channels; None for random ones.
    """

    def __init__(
        self,
        train: Split,
        test: Split,
        tasks: int = 20,
        seed: int = 0,
        train_samples: int | None = None,
        permutations: Tensor | None = None,
    ) -> None:
        super().__init__(train, test, tasks, seed, train_samples)
        pixels = train[0].shape[-2] * train[0].shape[-1]
        if permutations is None:
            generator = torch.Generator().manual_seed(sample_seed(seed, "permutations"))
            rows = [torch.arange(pixels)] + [torch.randperm(pixels, generator=generator) for _ in range(tasks - 1)]
            permutations = torch.stack(rows)
        self._take(permutations)

    def _take(self, permutations: Tensor) -> None:
        pixels = self.train[0].shape[-2] * self.train[0].shape[-1]
        wanted = torch.arange(pixels).expand(self.tasks, pixels)
        if permutations.shape != wanted.shape or not torch.equal(permutations.sort(-1).values, wanted):
            raise DataError(
                f"permutations must be {self.tasks} orders of {pixels} pixels, got {tuple(permutations.shape)}"
            )
        self.permutations = permutations

    def transform(self, images: Tensor, task: int) -> Tensor:
        """Permute the pixels."""
        return images.flatten(-2)[..., self.permutations[task]].view_as(images)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"permutations": self.permutations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._take(state["permutations"])


def rotation_degrees(uniform: Tensor) -> Tensor:
    """Rotation of each task from uniform numbers u in [0, 1): 10 t - 10 u_t degrees for t = 0, 1, ..."""
    return 10 * torch.arange(len(uniform), dtype=uniform.dtype) - 10 * uniform


class RotatedTasks(TaskStream):
    """Images rotated counter-clockwise by a fixed angle per task (nearest neighbour, zero padding).

    Args:
        train, test, tasks, seed, train_samples: See :class:`TaskStream`.
        degrees: Angle of each task, (tasks,); None for random :func:`rotation_degrees`.
    """

    def __init__(
        self,
        train: Split,
        test: Split,
        tasks: int = 20,
        seed: int = 0,
        train_samples: int | None = None,
        degrees: Tensor | None = None,
    ) -> None:
        super().__init__(train, test, tasks, seed, train_samples)
        if degrees is None:
            generator = torch.Generator().manual_seed(sample_seed(seed, "rotations"))
            degrees = rotation_degrees(torch.rand(tasks, generator=generator, dtype=torch.float64))
        if degrees.shape != (tasks,):
            raise DataError(f"{tuple(degrees.shape)} degrees for {tasks} tasks")
        self.degrees = degrees

    def transform(self, images: Tensor, task: int) -> Tensor:
        """Rotate the images."""
        return transforms.rotate(images, float(self.degrees[task]), interpolation=InterpolationMode.NEAREST)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"degrees": self.degrees}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.degrees = state["degrees"]


class SplitTasks(TaskStream):
    """Class-incremental split: each task has the next `classes_per_task` classes, with their original labels.

    Args:
        train, test, tasks, seed, train_samples: See :class:`TaskStream`. `tasks=None` uses all classes; with fewer
            tasks, the last classes are not used.
        order: Order of the classes: None for ascending, `"random"`, or a tensor that names each class once.
        classes_per_task: Classes per task.

    Raises:
        DataError: The classes cannot be divided like this, or a task has no training or test images.
    """

    def __init__(
        self,
        train: Split,
        test: Split,
        tasks: int | None = None,
        seed: int = 0,
        train_samples: int | None = None,
        order: Tensor | Literal["random"] | None = None,
        classes_per_task: int = 2,
    ) -> None:
        super().__init__(train, test, 1 if tasks is None else tasks, seed, None)
        if classes_per_task < 1:
            raise DataError(f"classes_per_task={classes_per_task} must be at least 1")
        classes = train[1].unique()
        self.tasks = len(classes) // classes_per_task if tasks is None else tasks
        if isinstance(order, str):
            if order != "random":
                raise DataError(f"order={order!r} is not one of None, 'random', or a tensor of classes")
            generator = torch.Generator().manual_seed(sample_seed(seed, "classes"))
            order = classes[torch.randperm(len(classes), generator=generator)]
        self.classes_per_task, self.train_samples = classes_per_task, train_samples
        order = classes if order is None else torch.as_tensor(order)
        _check_shares(order if order.shape == classes.shape else classes, classes_per_task, self.tasks)
        self._take(order)

    def _take(self, order: Tensor) -> None:
        """Assign the classes to tasks in this order.

        Raises:
            DataError: The order does not name each class once, or a task lacks images.
        """
        classes = self.train[1].unique()
        if order.ndim != 1 or order.is_floating_point() or not torch.equal(order.sort().values.to(classes), classes):
            raise DataError(f"order must name each of {_class_list(classes)} once, got {_class_list(order)}")
        self.order = order.to(classes)
        for t in range(self.tasks):
            lacking = self.classes(t)[~torch.isin(self.classes(t), self.test[1])]
            if len(lacking):
                raise DataError(f"the test part has no image of {_class_list(lacking)}, which belongs to task {t}")
            count = int(torch.isin(self.train[1], self.classes(t)).sum())
            if self.train_samples is not None and not 0 < self.train_samples <= count:
                raise DataError(
                    f"train_samples={self.train_samples} must be between 1 and {count}, the images of task {t}"
                )

    def classes(self, task: int) -> Tensor:
        """The classes of a task."""
        return self.order[task * self.classes_per_task : (task + 1) * self.classes_per_task]

    def chosen(self, part: Split, task: int) -> Tensor:
        """Mask (N,) of the images of the task's classes."""
        return torch.isin(part[1], self.classes(task))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"order": self.order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._take(state["order"])


def _check_shares(order: Tensor, classes_per_task: int, tasks: int) -> None:
    """Raise DataError unless the classes (C,) fill `tasks` tasks, without a remainder if that is the largest number."""
    most, rest = divmod(len(order), classes_per_task)
    if not 1 <= tasks <= most:
        raise DataError(f"{len(order)} classes make {most} tasks of {classes_per_task} each, not {max(tasks, 1)}")
    if rest and tasks == most:
        raise DataError(
            f"{len(order)} classes cannot be shared out in tasks of {classes_per_task}, {_class_list(order[-rest:])} "
            f"would never be seen: take classes_per_task that divides {len(order)}"
        )


def _class_list(classes: Tensor) -> str:
    """Up to a dozen classes, for a message."""
    if classes.ndim != 1 or classes.is_floating_point():
        return f"{classes.dtype} of shape {tuple(classes.shape)}"
    found = [str(c) for c in classes.unique().tolist()]
    shown = ", ".join(found[:12]) + (", ..." if len(found) > 12 else "")
    return f"class{'es' if len(found) > 1 else ''} {shown}"


SCENARIOS = {"permuted": PermutedTasks, "rotated": RotatedTasks}
_SETS = {
    "mnist5k": image.Mnist5k,
    "mnist": image.Mnist,
    "fashion_mnist": image.FashionMnist,
    "digits": image.Digits,
    "cifar10": image.Cifar10,
    "cifar100": image.Cifar100,
}


class ContinualData(LightningDataModule):
    """Task stream for `zoo.tasks.ContinualTask`, in which an epoch is a task.

    Images are uint8; the task divides them by 255.

    Args:
        name: `mnist5k`, `mnist`, `fashion_mnist`, `digits`, `cifar10` or `cifar100`.
        scenario: `permuted`, `rotated` or `split`.
        root: Folder of the files; None means the cache folder.
        download: Fetch missing files.
        tasks: Number of tasks.
        classes_per_task: Classes per task of a split stream.
        train_samples: Training images per task; None for all.
        evaluate_on: `test`, or `val` for held-out training images, to choose hyperparameters with.
        val_fraction: Share of the training images held out with `evaluate_on="val"`.
        seed: Seed of all random choices.

    Raises:
        ValueError: An argument is out of range, or the classes of a split stream cannot be divided into the tasks.
        DataError: In `prepare_data` or `setup`: files are missing or damaged, or do not give these tasks.
    """

    @checked
    def __init__(
        self,
        name: Literal["mnist5k", "mnist", "fashion_mnist", "digits", "cifar10", "cifar100"] = "mnist5k",
        scenario: Literal["permuted", "rotated", "split"] = "permuted",
        root: str | Path | None = None,
        download: bool = True,
        tasks: PositiveInt = 20,
        classes_per_task: PositiveInt = 2,
        train_samples: PositiveInt | None = None,
        evaluate_on: Literal["test", "val"] = "test",
        val_fraction: Share = 0.2,
        seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {} if name == "digits" else {"root": root, "download": download}
        self.source: image.SmallImages = _SETS[name](**place)
        self.scenario, self.tasks, self.classes_per_task = scenario, tasks, classes_per_task
        if scenario == "split":
            _check_shares(torch.arange(self.num_classes), classes_per_task, tasks)
        self.train_samples, self.evaluate_on, self.val_fraction, self.seed = (
            train_samples,
            evaluate_on,
            val_fraction,
            seed,
        )
        self._stream: TaskStream | None = None
        self._restored: dict[str, Any] | None = None

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, by target."""
        return self.source.class_names

    @property
    def num_classes(self) -> int:
        """Number of classes of all tasks together."""
        return len(self.class_names)

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return self.source.in_chans

    @property
    def preprocessing(self) -> dict[str, Any]:
        """That of the data set, without its normalisation, in timm's format."""
        chans = self.source.in_chans
        return self.source.preprocessing | {"mean": [0.0] * chans, "std": [1.0] * chans}

    def input_record(self) -> dict[str, Any]:
        """That of the data set, without its normalisation."""
        return self.source.input_record() | {k: self.preprocessing[k] for k in ("mean", "std")}

    @property
    def stream(self) -> TaskStream:
        """The task stream; `setup` must have been called."""
        if self._stream is None:
            raise DataError(f"{type(self).__name__} is not loaded: call prepare_data() and setup() first")
        return self._stream

    def prepare_data(self) -> None:
        """Fetch missing files."""
        self.source.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Load the images and build the stream, once."""
        if self._stream is not None:
            return
        train, test = self.source.load()
        if self.evaluate_on == "val":
            first, second = stratified_split(train[1], self.val_fraction, SPLIT_SEED)
            train, test = (train[0][first], train[1][first]), (train[0][second], train[1][second])
        options: dict[str, Any] = {"tasks": self.tasks, "seed": self.seed, "train_samples": self.train_samples}
        if self.scenario == "split":
            self._stream = SplitTasks(train, test, **options, classes_per_task=self.classes_per_task)
        else:
            self._stream = SCENARIOS[self.scenario](train, test, **options)
        if self._restored is not None:
            self._stream.load_state_dict(self._restored)

    def train_dataloader(self) -> DataLoader[int]:
        """One placeholder batch per epoch: the task takes its images from `stream`."""
        own = torch.Generator()  # otherwise the loader draws from the global generator, which breaks exact resuming
        return DataLoader(range(1), batch_size=None, generator=own)  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """The stream's random choices, for the checkpoint."""
        return self.stream.state_dict() if self._stream is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the stream of a checkpoint."""
        self._restored = state_dict
        if self._stream is not None and state_dict:
            self._stream.load_state_dict(state_dict)
