"""Task streams for continual learning, from images in memory: permuted or rotated images, split classes, own tasks.

>>> stream = PermutedTasks(train, test, tasks=20, seed=1)     # pairs of images (N, C, H, W) and classes (N,)
>>> task = stream[3]                                          # indexable and iterable
>>> images, classes = task.train
>>> stream = GivenTasks([(images, classes), ...])             # any iterable of tasks

Tasks are numbered from 0. All random choices are in `state_dict()`, which :class:`ContinualData` stores in checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from zoo.data import image
from zoo.data.checks import DataError, checked
from zoo.data.delimited import listed
from zoo.data.folder import IMAGES
from zoo.data.image import Share, balance
from zoo.data.lists import Listing, is_list, read_list, split_note
from zoo.data.pictures import Fit
from zoo.data.sampling import sample_seed, stratified_split
from zoo.data.sources import SPLIT_SEED, Split
from zoo.data.walk import PARTS, check_spelling, class_folders, parts, scan
from zoo.support import inputs

__all__ = [
    "ContinualData",
    "GivenTasks",
    "PermutedTasks",
    "RotatedTasks",
    "SplitTasks",
    "StreamTask",
    "TaskOfEpoch",
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


class GivenTasks(TaskStream):
    """Tasks as they are given: any iterable of pairs of images and classes, which is read once.

    A class that comes in several tasks is the same class in all of them. So tasks may bring new classes, new images of
    known classes, or both.

    Args:
        tasks: Pairs of images (N, C, H, W), uint8 or floating point, and classes (N,): whole numbers from 0. Tensors,
            or what `torch.as_tensor` takes. All tasks have images of the same size and type.
        tests: As many pairs of test images and classes, each of classes of its task or of those before it; None keeps
            `test_fraction` of each task's classes for testing.
        test_fraction: Share of each class of a task, in (0, 1); one image at least stays for training.
        seed: Seed of the choice of `train_samples`.
        train_samples: Training images per task; None for all.

    Raises:
        DataError: There are no tasks, a task is no such pair, or the tasks do not fit together; the message names it.
    """

    def __init__(
        self,
        tasks: Iterable[tuple[Any, Any]],
        tests: Iterable[tuple[Any, Any]] | None = None,
        test_fraction: float = 0.2,
        seed: int = 0,
        train_samples: int | None = None,
    ) -> None:
        train = [_pair(pair, f"task {t}") for t, pair in enumerate(tasks)]
        if not train:
            raise DataError("there are no tasks")
        if tests is None:
            train, test = _held_out(train, test_fraction)
        else:
            test = [_pair(pair, f"the test of task {t}") for t, pair in enumerate(tests)]
            if len(test) != len(train):
                raise DataError(f"{len(test)} tests for {len(train)} tasks")
        _check_tests(train, test)
        self._bounds = {name: _bounds(pairs) for name, pairs in (("train", train), ("test", test))}
        first = train[0][0]
        for name, pairs in (("task", train), ("the test of task", test)):
            for t, (images, _) in enumerate(pairs):
                if images.shape[1:] != first.shape[1:] or images.dtype != first.dtype:
                    kinds = [f"{x.dtype} of shape (N, {', '.join(map(str, x.shape[1:]))})" for x in (images, first)]
                    raise DataError(f"{name} {t} has images {kinds[0]}, and task 0 {kinds[1]}")
        whole = [(torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])) for pairs in (train, test)]
        super().__init__(whole[0], whole[1], len(train), seed, None)
        least = min(len(y) for _, y in train)
        if train_samples is not None and not 0 < train_samples <= least:
            raise DataError(f"train_samples={train_samples} must be between 1 and {least}, the images of a task")
        self.train_samples = train_samples

    def chosen(self, part: Split, task: int) -> slice:
        """The images of a task, which lie side by side."""
        bounds = self._bounds["train" if part is self.train else "test"]
        return slice(bounds[task], bounds[task + 1])

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"bounds": {name: list(bounds) for name, bounds in self._bounds.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the seed.

        Raises:
            DataError: The tasks have other numbers of images than those of the saved stream.
        """
        if state.get("bounds") != self._bounds:
            raise DataError("the tasks are not those of the checkpoint: they have other numbers of images")
        super().load_state_dict(state)


def _pair(pair: Any, place: str) -> Split:
    try:
        images, classes = pair
        images, classes = torch.as_tensor(images), torch.as_tensor(classes)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{place} is no pair of images and classes ({' '.join(str(error).split())[:100]})") from None
    if images.ndim != 4 or classes.ndim != 1 or len(images) != len(classes) or not len(images):
        shapes = f"{tuple(images.shape)} and {tuple(classes.shape)}"
        raise DataError(f"{place} needs images (N, C, H, W) and as many classes (N,), got {shapes}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise DataError(f"{place} needs images of uint8 or floating point, got {images.dtype}")
    if images.is_floating_point() and not images.isfinite().all():
        wrong = int((~images.isfinite().flatten(1).all(1)).nonzero()[0])
        raise DataError(f"{place}: image {wrong} holds values that are not finite numbers")
    if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool or classes.min() < 0:
        raise DataError(f"{place} needs whole numbers from 0 as classes, got {_class_list(classes)}")
    return images, classes.long()


def _check_tests(train: Sequence[Split], test: Sequence[Split]) -> None:
    """Refuse a test of classes that neither its task nor one before it has."""
    known = torch.tensor([], dtype=torch.long)
    for t, ((_, classes), (_, tested)) in enumerate(zip(train, test, strict=True)):
        known = torch.cat([known, classes]).unique()
        if len(strange := tested[~torch.isin(tested, known)]):
            has = f"task {t} has" if t == 0 else f"the tasks 0 to {t} have"
            asked = f"the test of task {t} asks for {_class_list(strange)}"
            raise DataError(f"{asked}, and {has} only {_class_list(known)}")


def _held_out(tasks: Sequence[Split], fraction: float) -> tuple[list[Split], list[Split]]:
    """Training and test images of each task, by a fixed stratified split."""
    if not 0 < fraction < 1:
        raise DataError(f"test_fraction={fraction} must lie between 0 and 1, where the tasks have no tests")
    train, test = [], []
    for t, (images, classes) in enumerate(tasks):
        kept, held = _second((images, classes), "test_fraction", fraction, f"task {t}: ")
        train.append(kept)
        test.append(held)
    return train, test


def _second(pair: Split, option: str, fraction: float, place: str = "") -> tuple[Split, Split]:
    """Images and classes in two parts, by a fixed stratified split; `option` names the fraction of the second.

    Raises:
        DataError: Nothing is left for the second part.
    """
    images, classes = pair
    first, second = (torch.from_numpy(rows) for rows in stratified_split(classes, fraction, SPLIT_SEED))
    if not len(second):
        raise DataError(
            f"{place}there are too few images of each class to keep {fraction:.0%} of them apart: give a larger "
            f"{option} than {fraction:g}"
        )
    return (images[first], classes[first]), (images[second], classes[second])


def _bounds(pairs: Sequence[Split]) -> list[int]:
    return [0, *torch.tensor([len(y) for _, y in pairs]).cumsum(0).tolist()]


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


class TaskOfEpoch(Sampler[int]):
    """The one index of an epoch: its task.

    Args:
        clock: Tells the epoch, from 0, when its task is asked for.
    """

    def __init__(self, clock: Callable[[], int]) -> None:
        self.clock = clock

    def __iter__(self) -> Iterator[int]:
        yield self.clock()  # not sooner: Lightning makes an iterator before it knows the epoch of a resumed run

    def __len__(self) -> int:
        return 1


SCENARIOS = {"permuted": PermutedTasks, "rotated": RotatedTasks}
_SETS = {
    "mnist5k": image.Mnist5k,
    "mnist": image.Mnist,
    "fashion_mnist": image.FashionMnist,
    "digits": image.Digits,
    "cifar10": image.Cifar10,
    "cifar100": image.Cifar100,
}


_OWN_SIZE = 28  # side of own images where none is given
_MAX_OWN = 4_000_000_000  # bytes of all own images
_TASKS_SHOWN = 10


@dataclass(frozen=True)
class _Files:
    """Files of one task: paths and names of their classes."""

    name: str
    train: tuple[list[str], list[str]]
    test: tuple[list[str], list[str]] | None


def _natural(text: str) -> list[Any]:
    """Sort key by which `task2` comes before `task10`."""
    return [(1, int(word), "") if word.isdecimal() else (0, 0, word) for word in re.split(r"(\d+)", text) if word]


def _task_folders(path: Path) -> list[_Files]:
    """The tasks of a folder: its folders, each with class folders, or with `train/` and `test/` of class folders."""
    tasks = sorted(class_folders(path, IMAGES), key=_natural)
    told = f"each folder of {path} is a task and holds class folders; data.scenario=split makes tasks of class folders"
    if "train" in tasks:
        raise DataError(f"{path} holds train/, where {told}")
    try:
        return [_files_of(path / name, name) for name in tasks]
    except DataError as error:
        raise DataError(f"{error}; {told}") from None


def _files_of(path: Path, name: str) -> _Files:
    """The files of a folder with class folders, or with `train/` and `test/` of class folders."""
    where = parts(path)
    if "val" in where:
        raise DataError(f"{where['val']}: a stream has train/ and test/; validation is data.evaluate_on=val")
    files: dict[str, tuple[list[str], list[str]]] = {}
    for part, folder in where.items():
        classes = class_folders(folder, IMAGES)
        paths, targets = scan(folder, classes, IMAGES)
        files[part] = paths, [classes[i] for i in targets]
    return _Files(name, files["train"], files.get("test"))


def _listed_tasks(listing: Listing) -> list[_Files]:
    """The tasks of a list, by its column of tasks; of a list without one, a single task."""
    tasks = listing.columns.get("task", [""] * len(listing.files))
    part = listing.columns.get("part", ["train"] * len(listing.files))
    found = []
    for name in sorted(set(tasks), key=_natural):
        rows = {p: [i for i, own in enumerate(tasks) if own == name and part[i] == p] for p in PARTS}
        if rows["val"]:
            raise DataError(
                f"{listing.place(rows['val'][0])}: a task has train and test rows; validation is data.evaluate_on=val"
            )
        files = {
            p: ([listing.files[i] for i in rows[p]], [listing.columns["class"][i] for i in rows[p]])
            for p in ("train", "test")
        }
        if not rows["train"] or ("part" in listing.columns and not rows["test"]):
            lacking = "test" if rows["train"] else "training"
            raise DataError(
                f"{listing.path}: {listing.names.get('task', 'the list')} {name!r:.60} has no {lacking} row"
            )
        found.append(_Files(name, files["train"], files["test"] if "part" in listing.columns else None))
    return found


class ContinualData(LightningDataModule):
    """Task stream for `zoo.tasks.ContinualTask`, in which an epoch is a task.

    Images are uint8; the task divides them by 255. The training loader gives one task per epoch, as a
    :class:`StreamTask`.

    The images are those of a published set, `name`, or own ones, `path`: a folder with a folder for each task, in the
    order of their names (`task2` before `task10`), each of which holds class folders, or `train/` and `test/` with
    class folders; or a list with a column of tasks. With a `scenario`, `path` is one folder of class folders (or with
    `train/` and `test/`), or a list without tasks, from which the tasks are made. A class that comes in several tasks
    is the same class. Own images are resized as :class:`zoo.data.pictures.Fit` does, and kept in memory.

    Args:
        name: `mnist5k`, `mnist`, `fashion_mnist`, `digits`, `cifar10` or `cifar100`; not used with `path`.
        scenario: `permuted`, `rotated` or `split`; None: the tasks of `path`, or `permuted` without it.
        cache: Folder of what is fetched; None means `$XDG_CACHE_HOME/kernel-zoo` or `~/.cache/kernel-zoo`.
        download: Fetch missing files.
        tasks: Number of tasks; None: all of `path`, all that a split makes, or else 20.
        classes_per_task: Classes per task of a split stream.
        train_samples: Training images per task; None for all.
        evaluate_on: `test`, or `val` for held-out training images, to choose hyperparameters with.
        val_fraction: Share of the training images held out with `evaluate_on="val"`.
        seed: Seed of all random choices.
        path: Folder or list of own images.
        folder: Of a list: where relative names start, and out of which none may lead; None: the list's own.
        file_column: Of a list: column of the names.
        class_column: Of a list: column of the classes.
        part_column: Of a list: column that says `train` or `test`; None: a share is kept for testing.
        task_column: Of a list: column of the tasks.
        test_fraction: Share of each class of a task of own images kept for testing, if there is no test part.
        image_size: Side to which own images are resized, pixels; None: 28.
        channels: 3 for colour, 1 for grey own images; None: 3.

    Raises:
        ValueError: An argument is out of range, or the classes of a split stream cannot be divided into the tasks.
        DataError: In `prepare_data` or `setup` (for own images, when they are first listed): files are missing or
            damaged, or do not give these tasks.
    """

    @checked
    def __init__(
        self,
        name: Literal["mnist5k", "mnist", "fashion_mnist", "digits", "cifar10", "cifar100"] = "mnist5k",
        scenario: Literal["permuted", "rotated", "split"] | None = None,
        cache: str | Path | None = None,
        download: bool = True,
        tasks: PositiveInt | None = None,
        classes_per_task: PositiveInt = 2,
        train_samples: PositiveInt | None = None,
        evaluate_on: Literal["test", "val"] = "test",
        val_fraction: Share = 0.2,
        seed: NonNegativeInt = 0,
        path: str | Path | None = None,
        folder: str | Path | None = None,
        file_column: str = "file",
        class_column: str = "class",
        part_column: str | None = None,
        task_column: str | None = None,
        test_fraction: Share = 0.2,
        image_size: PositiveInt | None = None,
        channels: Literal[1, 3] | None = None,
    ) -> None:
        super().__init__()
        self.path = None if path is None else Path(path).expanduser()
        self.folder = None if folder is None else Path(folder).expanduser()
        self.columns = {"file": file_column, "class": class_column, "part": part_column, "task": task_column}
        self.test_fraction, self.own_size, self.own_channels = test_fraction, image_size or _OWN_SIZE, channels or 3
        own: dict[str, Any] = {"folder": folder, "part_column": part_column, "task_column": task_column}
        own |= {"image_size": image_size, "channels": channels}
        if path is None and (given := next((key for key, value in own.items() if value is not None), None)):
            raise DataError(f"{given} is for own images, given by path=...; {name} is taken as it is")
        place: dict[str, Any] = {} if name == "digits" else {"cache": cache, "download": download}
        self.source: image.SmallImages = _SETS[name](**place)
        self.scenario = scenario if path or scenario else "permuted"
        self.classes_per_task, self.train_samples = classes_per_task, train_samples
        self.evaluate_on, self.val_fraction, self.seed = evaluate_on, val_fraction, seed
        self._tasks = tasks
        if self.path is None and self.scenario == "split":
            _check_shares(torch.arange(self.num_classes), classes_per_task, self.tasks)
        self._stream: TaskStream | None = None
        self._restored: dict[str, Any] | None = None

    @cached_property
    def _files(self) -> list[_Files]:
        """The tasks of own images, listed once; a single one if a scenario makes tasks of it."""
        assert self.path is not None
        if is_list(self.path):
            columns = self.columns | ({"task": None} if self.scenario else {})
            if columns["task"] is None and not self.scenario:
                raise DataError(
                    f"{self.path} is a list: name its column of tasks with data.task_column=..., or make tasks of it "
                    "with data.scenario=split, permuted or rotated"
                )
            found = _listed_tasks(read_list(self.path, IMAGES, columns, self.folder))
        elif self.scenario:
            found = [_files_of(self.path, "")]
        else:
            found = _task_folders(self.path)
        if self._tasks is not None and not self.scenario:
            if self._tasks > len(found):
                raise DataError(f"{self.path} has {len(found)} tasks, not data.tasks = {self._tasks}")
            found = found[: self._tasks]
        return found

    @property
    def tasks(self) -> int:
        """Number of tasks."""
        if self.path is not None and not self.scenario:
            return len(self._files)
        if self._tasks is None and self.scenario == "split":
            return max(1, self.num_classes // self.classes_per_task)
        return self._tasks or 20

    @cached_property
    def class_names(self) -> list[str]:
        """Names of the classes, by target; of own images in the order of the tasks, and sorted within one."""
        if self.path is None:
            return self.source.class_names
        names: dict[str, None] = {}
        for task in self._files:
            names |= dict.fromkeys(sorted(set(task.train[1])))
        check_spelling(list(names), str(self.path), "classes")
        known: set[str] = set()
        for task in self._files:
            known |= set(task.train[1])
            if strange := set((task.test or ([], []))[1]) - known:
                never = strange - set(names)
                told = f"{listed(sorted(never or strange), 5)}, which {'no' if never else 'only a later'} task trains"
                raise DataError(f"{self.path}: task {task.name} tests {told}")
        return list(names)

    @property
    def num_classes(self) -> int:
        """Number of classes of all tasks together."""
        return len(self.class_names)

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return self.source.in_chans if self.path is None else self.own_channels

    @property
    def img_size(self) -> int:
        """Side of the images, pixels."""
        return self.source.image_size if self.path is None else self.own_size

    @property
    def preprocessing(self) -> dict[str, Any]:
        """That of the data set, without its normalisation, in timm's format."""
        chans = self.in_chans
        looks = {"mean": [0.0] * chans, "std": [1.0] * chans}
        if self.path is None:
            return self.source.preprocessing | looks
        how = {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}
        return {"input_size": [chans, self.own_size, self.own_size], **looks, **how}

    def input_record(self) -> dict[str, Any]:
        """That of the set, without its normalisation, and what the tasks do to the pictures."""
        changed = {"tasks": self.scenario} if self.scenario in SCENARIOS else {}
        looks = {k: v for k, v in self.preprocessing.items() if k != "input_size"}
        if self.path is None:
            return self.source.input_record() | {k: looks[k] for k in ("mean", "std")} | changed
        size = [self.own_size, self.own_size]
        return {"kind": "image", "channels": self.own_channels, "size": size, **looks, "background": 255} | changed

    @property
    def stream(self) -> TaskStream:
        """The task stream; `setup` must have been called."""
        if self._stream is None:
            raise DataError(f"{type(self).__name__} is not loaded: call prepare_data() and setup() first")
        return self._stream

    def prepare_data(self) -> None:
        """Fetch missing files; of own images, check that they are there."""
        if self.path is None:
            self.source.prepare_data()
        else:
            _ = self.class_names

    def setup(self, stage: str | None = None) -> None:
        """Load the images and build the stream, once."""
        if self._stream is not None:
            return
        if self.path is not None and not self.scenario:
            self._stream = self._given()
        else:
            self._stream = self._made(*(self.source.load() if self.path is None else self._pairs(self._files[0])))
        if self._restored is not None:
            self._stream.load_state_dict(self._restored)

    def _made(self, train: Split, test: Split) -> TaskStream:
        """The stream that the scenario makes of training and test images."""
        if self.evaluate_on == "val":
            train, test = _second(train, "val_fraction", self.val_fraction)
        options: dict[str, Any] = {"tasks": self.tasks, "seed": self.seed, "train_samples": self.train_samples}
        if self.scenario == "split":
            return SplitTasks(train, test, **options, classes_per_task=self.classes_per_task)
        return SCENARIOS[str(self.scenario)](train, test, **options)

    def _given(self) -> GivenTasks:
        """The stream of own tasks."""
        pairs = [self._pairs(task) for task in self._files]
        if self.evaluate_on == "val":
            pairs = [_second(train, "val_fraction", self.val_fraction) for train, _ in pairs]
        train, test = zip(*pairs, strict=True)
        return GivenTasks(train, test, seed=self.seed, train_samples=self.train_samples)

    def _pairs(self, task: _Files) -> tuple[Split, Split]:
        """Training and test images of a task; without a test part, a share of the training images is kept for it."""
        train = self._read(*task.train)
        if task.test is not None:
            return train, self._read(*task.test)
        return _second(train, "test_fraction", self.test_fraction, f"task {task.name}: " if task.name else "")

    def _read(self, paths: Sequence[str], labels: Sequence[str]) -> Split:
        """Images (N, C, S, S) as bytes, and their classes."""
        total = sum(len(t.train[0]) + len((t.test or ([],))[0]) for t in self._files)
        if total * self.own_channels * self.own_size**2 > _MAX_OWN:
            raise DataError(f"{self.path}: {total:,} images of {self.own_size} pixels are more than fit in memory")
        fit, number = Fit(inputs.read(self.input_record()), normalize=False), self.class_names
        places = {name: i for i, name in enumerate(number)}
        images = torch.stack([fit(fit.open(path)) for path in paths])
        return images, torch.tensor([places[label] for label in labels])

    def describe(self) -> list[str]:
        """A short report of the tasks."""
        names = [task.name for task in self._files] if self.path is not None and not self.scenario else []
        lines = []
        for t in range(min(len(self.stream), _TASKS_SHOWN)):
            labels, tests = self.stream.labels(t), self.stream.test[1][self.stream.chosen(self.stream.test, t)]
            there = sorted(set(labels.tolist()))
            own = torch.tensor([there.index(label) for label in labels.tolist()])
            told = balance(own, [self.class_names[i] for i in there])
            name = f" ({names[t]:.40})" if names else ""
            lines.append(
                f"task {t}{name}: {len(labels):,} images for training, {len(tests):,} for {self.evaluate_on}: {told}"
            )
        if len(self.stream) > _TASKS_SHOWN:
            lines.append(f"... {len(self.stream)} tasks, {self.num_classes} classes")
        if self.evaluate_on == "val":
            lines.append(split_note("val", self.val_fraction))
        elif self.path is not None and any(task.test is None for task in self._files):
            lines.append(split_note("test", self.test_fraction))
        return lines

    @property
    def root(self) -> Path:
        """The older name of `cache`."""
        return self.source.cache

    def train_dataloader(self) -> DataLoader[StreamTask]:
        """One batch an epoch, which is its task."""
        clock = partial(getattr, self.trainer, "current_epoch") if self.trainer else partial(next, count())
        own = torch.Generator()  # a loader without one draws from the global generator, which a resumed run would miss
        return DataLoader(self.stream, batch_size=None, sampler=TaskOfEpoch(clock), generator=own)  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """The stream's random choices, for the checkpoint."""
        return self.stream.state_dict() if self._stream is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the stream of a checkpoint."""
        self._restored = state_dict
        if self._stream is not None and state_dict:
            self._stream.load_state_dict(state_dict)
