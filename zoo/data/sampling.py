"""Stateless, reproducible sampling: the order of an epoch, and the random seed of each sample.

* The order of an epoch is a function of `(seed, epoch)`, also where samples are drawn by chance.
* The augmentation of a sample is a function of `(seed, epoch, index)`, and of how often it was drawn before.
* The batches of a process are a function of the order, its rank and the number of processes.

So batches do not depend on the number of workers, on global random generators (which loaders do not use), or on
interruptions: a resumed epoch continues the uninterrupted one exactly.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from zoo.data.checks import DataError
from zoo.support.padding import IGNORE_INDEX

__all__ = [
    "IGNORE_INDEX",
    "EpochBatches",
    "KeyedDataset",
    "ResumableLoader",
    "SampleKey",
    "balanced_chances",
    "isolated_rng",
    "sample_seed",
    "seed_rng",
    "stratified_split",
]

Batch = tuple[Tensor, Tensor]


# Randomness -------------------------------------------------------------------------------------------------


def sample_seed(seed: int, *position: int | str) -> int:
    """Derive a 64-bit seed from a run's seed and a position, for example `sample_seed(seed, epoch, index)`.

    The BLAKE2 hash makes neighbouring seeds and positions independent.
    """
    words = "/".join(map(str, (seed, *position)))
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "little")


def seed_rng(seed: int) -> None:
    """Seed the global CPU generators that image transforms use: torch's, numpy's legacy one and `random`.

    Unlike `torch.manual_seed`, this does not seed the GPU generators.
    """
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


@contextlib.contextmanager
def isolated_rng() -> Iterator[None]:
    """Restore the global CPU generators (torch, numpy, `random`) on leaving the block."""
    saved = torch.default_generator.get_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.default_generator.set_state(saved[0])
        np.random.set_state(saved[1])
        random.setstate(saved[2])


def stratified_split(
    targets: Sequence[int] | np.ndarray | Tensor, fraction: float, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Split indices into two parts with the same class proportions.

    Args:
        targets: Class of every sample, `(N,)`.
        fraction: Share of the second part, in [0, 1): `round(fraction * count)` samples of each class, but never all.
        seed: Seed of the split; numpy's frozen `RandomState` gives the same split in every version.

    Returns:
        The sorted indices of the first and of the second part.
    """
    classes = np.asarray(targets)
    chooser = np.random.RandomState(seed)
    second = [np.empty(0, dtype=np.int64)]
    for label in np.unique(classes):
        members = chooser.permutation(np.flatnonzero(classes == label))
        second.append(members[: min(round(fraction * len(members)), len(members) - 1)])
    chosen = np.sort(np.concatenate(second))
    return np.setdiff1d(np.arange(len(classes)), chosen), chosen


def balanced_chances(targets: Tensor) -> Tensor:
    """Chance of each sample, (N,) float64, such that all classes that occur are drawn equally often.

    Args:
        targets: Class of every sample, (N,).
    """
    return torch.bincount(targets)[targets].double().reciprocal()


# Batches ----------------------------------------------------------------------------------------------------

_AGAIN = 2**32  # added to the epoch of a key each time that its sample is drawn again


class SampleKey(NamedTuple):
    """Index of a sample in a data set and an epoch.

    Attributes:
        sample: Index in the data set.
        epoch: Epoch, which seeds the sample's augmentation; a sample that is drawn again gets another number.
        padded: Whether the row is padding.
    """

    sample: int
    epoch: int = 0
    padded: bool = False


class EpochBatches(Sampler[list[SampleKey]]):
    """Batches of sample keys for one process, with a position that can be saved and restored.

    A global batch is `world_size * batch_size` consecutive samples of the epoch's order; process `rank` takes its
    `rank`-th slice. So four processes with batches of 32 see the same global batches as one process with 128. The last,
    incomplete global batch is split evenly; missing samples are repeated from the start of the epoch (training) or
    padded (evaluation), so all processes do the same number of steps.

    Args:
        samples: Number of samples in the data set.
        batch_size: Batch size per process.
        seed: Seed of the order.
        shuffle: Use a new random order in every epoch; otherwise 0, 1, 2, ...
        reshuffle: With `shuffle`, `False` keeps the order of epoch 0 for all epochs.
        chances: With `shuffle`, chance of each sample, (samples,): an epoch is as many independent draws, so that
            samples are repeated or left out. `None` takes every sample once.
        drop_last: Drop the last, incomplete global batch.
        pad: Fill up with padding keys, whose target is `IGNORE_INDEX`, instead of repeated samples.
        rank: Index of this process.
        world_size: Number of processes.
        clock: Returns the epoch when a pass starts. `None` counts complete passes, or follows `set_epoch`.

    Raises:
        DataError: If the samples do not fill one batch.
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        reshuffle: bool = True,
        chances: Tensor | None = None,
        drop_last: bool = False,
        pad: bool = False,
        rank: int = 0,
        world_size: int = 1,
        clock: Callable[[], int] | None = None,
    ) -> None:
        self.samples, self.seed = samples, seed
        self.shuffle, self.reshuffle, self.chances, self.pad = shuffle, reshuffle, chances, pad
        self.rank, self.world_size, self.clock = rank, world_size, clock
        self.global_batch = batch_size * world_size
        self.length = samples // self.global_batch if drop_last else -(-samples // self.global_batch)
        if self.length == 0:
            raise DataError(
                f"{samples} samples make no batch of {batch_size} on {world_size} process(es)"
                + ("; use a smaller data.batch_size or data.drop_last=false" if samples else "; the data set is empty")
            )
        self.epoch = 0
        self.delivered = 0  # batches of this epoch that have reached the training loop, not just the workers
        self._resume_at = 0

    @property
    def sampler(self) -> EpochBatches:
        """Itself: Lightning calls `set_epoch` of `loader.batch_sampler.sampler`."""
        return self

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`; a position inside the same epoch is kept.

        With a clock this does nothing. Lightning calls it with its number of processed epochs, which is wrong under
        `max_steps` after resuming from the end of an epoch.
        """
        if self.clock is None:
            self._go_to(epoch)

    def _go_to(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.delivered, self._resume_at = epoch, 0, 0

    def start(self) -> None:
        """Start a pass at the restored position, if any, or at the first batch of the epoch."""
        if self.clock is not None:
            self._go_to(self.clock())
        self.delivered, self._resume_at = self._resume_at, 0

    def deliver(self) -> None:
        """Count a batch that has reached the training loop; the last one of an epoch advances the epoch."""
        self.delivered += 1
        if self.delivered == self.length:
            self.epoch, self.delivered = self.epoch + 1, 0

    def order(self, epoch: int) -> Tensor:
        """The order of an epoch, `(samples,)` int64: a pure function of seed and epoch."""
        if not self.shuffle:
            return torch.arange(self.samples)
        moment = epoch if self.reshuffle else 0
        generator = torch.Generator().manual_seed(sample_seed(self.seed, "order", moment))
        if self.chances is not None:
            return torch.multinomial(self.chances, self.samples, replacement=True, generator=generator)
        return torch.randperm(self.samples, generator=generator)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        # read the position now, not at the first batch: workers prefetch
        return self._batches(self.epoch, self.delivered)

    def _batches(self, epoch: int, start: int) -> Iterator[list[SampleKey]]:
        order = self.order(epoch)
        moments = torch.full_like(order, epoch) if self.chances is None else epoch + _AGAIN * _draws_before(order)
        for batch in range(start, self.length):
            yield self._slice(order, moments, epoch, batch * self.global_batch)

    def _slice(self, order: Tensor, moments: Tensor, epoch: int, begin: int) -> list[SampleKey]:
        place = slice(begin, begin + self.global_batch)
        keys = [SampleKey(*key) for key in zip(order[place].tolist(), moments[place].tolist(), strict=True)]
        per_rank = -(-len(keys) // self.world_size)
        missing = per_rank * self.world_size - len(keys)
        if self.pad:
            keys += [SampleKey(0, epoch, padded=True)] * missing
        else:
            first = [i % self.samples for i in range(missing)]
            keys += [SampleKey(int(order[i]), int(moments[i])) for i in first]
        return keys[self.rank * per_rank : (self.rank + 1) * per_rank]

    def state_dict(self) -> dict[str, int]:
        """The position, and the settings that it depends on; the same integers on every rank."""
        position = {
            "epoch": self.epoch,
            "batches": self.delivered,
            "seed": self.seed,
            "samples": self.samples,
            "global_batch": self.global_batch,
        }
        return position if self.chances is None else position | {"balanced": 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a saved position: the next batch is the one after the last delivered one.

        Raises:
            DataError: If the position is inside an epoch and seed, data set size, global batch size or balance differ.
        """
        epoch, batches = state["epoch"], state["batches"]
        state, mine = {"balanced": 0, **state}, {"balanced": 0, **self.state_dict()}
        changed = [name for name in ("seed", "samples", "global_batch", "balanced") if state[name] != mine[name]]
        if batches and changed:
            raise DataError(
                f"the checkpoint was written after batch {batches} of epoch {epoch} with "
                + ", ".join(f"{name}={state[name]}" for name in changed)
                + ", but this run has "
                + ", ".join(f"{name}={mine[name]}" for name in changed)
                + ": resume with the same data settings, or from a checkpoint of an epoch's end"
            )
        self.epoch, self.delivered, self._resume_at = epoch, batches, batches


def _draws_before(order: Tensor) -> Tensor:
    """How often each entry of an order occurs before its place, (samples,)."""
    by_sample = torch.sort(order, stable=True)
    place = torch.arange(len(order))
    starts = torch.searchsorted(by_sample.values, by_sample.values)  # first place of each sample
    return torch.empty_like(place).scatter_(0, by_sample.indices, place - starts)


# Data sets and loaders --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Failure:
    """A `DataError` passed from a worker to the main process; torch would wrap the exception in a traceback."""

    message: str


class KeyedDataset(Dataset[Batch]):
    """A data set that maps a list of keys to one batch.

    Subclasses implement `images(keys)`. A plain integer is accepted as a key of epoch 0.

    Args:
        targets: Class of every sample, `(N,)`.
    """

    def __init__(self, targets: Sequence[int] | np.ndarray | Tensor) -> None:
        self.targets = torch.as_tensor(targets, dtype=torch.int64)

    def images(self, keys: Sequence[SampleKey]) -> Tensor:
        """The images of `keys`, `(B, C, H, W)`."""
        raise NotImplementedError(f"{type(self).__name__} must implement images(keys)")

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, key: SampleKey | int) -> Batch:
        images, targets = self.batch([key])
        return images[0], targets[0]

    def batch(self, keys: Sequence[SampleKey | int]) -> Batch:
        """Images `(B, C, H, W)` and targets `(B,)`; padded keys get the target `IGNORE_INDEX`."""
        asked = [key if isinstance(key, SampleKey) else SampleKey(int(key)) for key in keys]
        targets = self.targets[[key.sample for key in asked]]
        targets[torch.tensor([key.padded for key in asked])] = IGNORE_INDEX
        return self.images(asked), targets

    def __getitems__(self, keys: Sequence[SampleKey | int]) -> Batch | _Failure:
        try:
            return self.batch(keys)
        except DataError as error:
            if get_worker_info() is None:
                raise
            return _Failure(str(error))


def _identity(batch: Any) -> Any:
    return batch  # KeyedDataset returns whole batches


class ResumableLoader(DataLoader[Batch]):
    """A `DataLoader` over `EpochBatches` whose position can be saved and restored within an epoch.

    `state_dict()` counts delivered batches, not prefetched ones. Iteration starts at the first batch, because Lightning
    creates the iterator before it restores the position and sets the epoch. Without Lightning, each complete pass
    advances the epoch.

    Args:
        dataset: The data set, which maps lists of keys to batches.
        order: The batches of keys of this process.
        batch_sampler: Replaces `order` as the source of the batches (Lightning wraps it for prediction).
        **kwargs: Further arguments of `torch.utils.data.DataLoader`: `num_workers`, `pin_memory`, ...
    """

    def __init__(self, dataset: KeyedDataset, order: EpochBatches, batch_sampler: Any = None, **kwargs: Any) -> None:
        # otherwise every pass would draw the workers' base seed from the global generator
        kwargs.setdefault("generator", torch.Generator().manual_seed(sample_seed(order.seed, "workers")))
        kwargs.setdefault("collate_fn", _identity)
        super().__init__(dataset, batch_sampler=order if batch_sampler is None else batch_sampler, **kwargs)
        self.order = order

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        return _LazyEpoch(self)

    def start(self) -> Iterator[Batch]:
        """Start the workers on the rest of the current epoch."""
        self.order.start()
        return super().__iter__()

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`; a position inside the same epoch is kept."""
        self.order.set_epoch(epoch)

    def state_dict(self) -> dict[str, int]:
        """The position: epoch and batches delivered, as plain integers."""
        return self.order.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue after the last delivered batch; see `EpochBatches.load_state_dict`."""
        self.order.load_state_dict(state_dict)


class _LazyEpoch(Iterator[Batch]):
    """One pass over a loader, which starts when the first batch is requested."""

    def __init__(self, loader: ResumableLoader) -> None:
        self.loader = loader
        self.batches: Iterator[Batch] | None = None

    def __next__(self) -> Batch:
        if self.batches is None:
            self.batches = self.loader.start()
        batch = next(self.batches)
        if isinstance(batch, _Failure):
            # stop the workers now: garbage collection with the traceback takes seconds per worker
            self.batches = self.loader._iterator = None
            raise DataError(batch.message)
        self.loader.order.deliver()
        return batch
