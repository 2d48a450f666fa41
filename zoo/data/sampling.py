"""Exact, stateless sampling: which images form a batch, and what randomness each of them gets.

Three pure functions replace hidden random state:

* the order of an epoch is a function of `(seed, epoch)`;
* the randomness of one image is a function of `(seed, epoch, index)`;
* the batches of a process are a function of the order, its rank and the number of processes.

Nothing therefore depends on the number of workers, on the global random generators (which loaders never
touch), or on where a run was interrupted: a resumed epoch is the tail of the uninterrupted one.
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
    "isolated_rng",
    "sample_seed",
    "seed_rng",
    "stratified_split",
]

Batch = tuple[Tensor, Tensor]


# Randomness -------------------------------------------------------------------------------------------------


def sample_seed(seed: int, *position: int | str) -> int:
    """A 64-bit seed for one place of one run, for example `sample_seed(seed, epoch, index)`.

    A cryptographic hash keeps neighbours unrelated: `seed=0, epoch=1` shares nothing with `seed=1, epoch=0`.
    """
    words = "/".join(map(str, (seed, *position)))
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "little")


def seed_rng(seed: int) -> None:
    """Seed the CPU generators that image transforms draw from: torch's, numpy's legacy one and `random`.

    `torch.manual_seed` is not used because it would also restart the generators of every GPU.
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
    """Split indices in two parts with the same class proportions.

    Args:
        targets: Class of every sample, `(N,)`.
        fraction: Share of the second part, in [0, 1). Every class gives `round(fraction * count)` of its
            samples, but keeps at least one.
        seed: Seed of the choice. The draw uses numpy's frozen `RandomState`, so it is the same in every
            version.

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


# Which samples form a batch ---------------------------------------------------------------------------------


class SampleKey(NamedTuple):
    """What a dataset is asked for.

    Attributes:
        sample: Index in the data set.
        epoch: The epoch, which decides the sample's randomness.
        padded: Whether the row only fills up a batch.
    """

    sample: int
    epoch: int = 0
    padded: bool = False


class EpochBatches(Sampler[list[SampleKey]]):
    """Batches of sample keys for one process, with a position that can be saved and restored.

    A global batch holds `world_size * batch_size` consecutive samples of the epoch's order; process `rank`
    takes the `rank`-th slice of it. Four processes with batches of 32 thus see what one process with batches
    of 128 sees. A last, incomplete global batch is shared out evenly, so that every process does the same
    number of steps; what is missing for an even share is repeated from the epoch's start (training) or padded
    (evaluation).

    Args:
        samples: Number of samples in the data set.
        batch_size: Samples of one batch of one process.
        seed: Seed of the order.
        shuffle: Draw a new order for every epoch; otherwise 0, 1, 2, ...
        reshuffle: With `shuffle`, `False` keeps the order of epoch 0 for all epochs.
        drop_last: Leave out the last, incomplete global batch.
        pad: Fill up with padded keys, whose target becomes `IGNORE_INDEX`, instead of repeated samples.
        rank: Index of this process.
        world_size: Number of processes.
        clock: Tells the epoch when a pass starts. `None` counts complete passes, or follows `set_epoch`.

    Raises:
        DataError: If there is not a single batch.
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        reshuffle: bool = True,
        drop_last: bool = False,
        pad: bool = False,
        rank: int = 0,
        world_size: int = 1,
        clock: Callable[[], int] | None = None,
    ) -> None:
        self.samples, self.seed = samples, seed
        self.shuffle, self.reshuffle, self.pad = shuffle, reshuffle, pad
        self.rank, self.world_size, self.clock = rank, world_size, clock
        self.global_batch = batch_size * world_size
        self.length = samples // self.global_batch if drop_last else -(-samples // self.global_batch)
        if self.length == 0:
            raise DataError(
                f"{samples} samples make no batch of {batch_size} on {world_size} process(es)"
                + ("; use a smaller batch_size or drop_last=false" if samples else "; the data set is empty")
            )
        self.epoch = 0
        self.delivered = 0  # batches of this epoch that have reached the training loop, not just the workers
        self._resume_at = 0

    @property
    def sampler(self) -> EpochBatches:
        """Itself: Lightning announces a new epoch to `loader.batch_sampler.sampler`."""
        return self

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`; a position inside the same epoch is kept.

        With a clock this does nothing. Lightning calls it with the number of epochs that it has processed;
        under `max_steps`, a run resumed from the end of an epoch counts that epoch twice, hence the clock.
        """
        if self.clock is None:
            self._go_to(epoch)

    def _go_to(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.delivered, self._resume_at = epoch, 0, 0

    def start(self) -> None:
        """Begin a pass: where a restored position says, otherwise with the epoch's first batch."""
        if self.clock is not None:
            self._go_to(self.clock())
        self.delivered, self._resume_at = self._resume_at, 0

    def deliver(self) -> None:
        """Count one batch that has reached the training loop; the last one moves on to the next epoch."""
        self.delivered += 1
        if self.delivered == self.length:
            self.epoch, self.delivered = self.epoch + 1, 0

    def order(self, epoch: int) -> Tensor:
        """The order of an epoch, `(samples,)` int64: a pure function of seed and epoch."""
        if not self.shuffle:
            return torch.arange(self.samples)
        moment = epoch if self.reshuffle else 0
        generator = torch.Generator().manual_seed(sample_seed(self.seed, "order", moment))
        return torch.randperm(self.samples, generator=generator)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        # the position is read now, not with the first batch: workers fetch ahead of the training loop
        return self._batches(self.epoch, self.delivered)

    def _batches(self, epoch: int, start: int) -> Iterator[list[SampleKey]]:
        order = self.order(epoch)
        for batch in range(start, self.length):
            yield self._share(order, epoch, batch * self.global_batch)

    def _share(self, order: Tensor, epoch: int, begin: int) -> list[SampleKey]:
        present = order[begin : begin + self.global_batch].tolist()
        per_rank = -(-len(present) // self.world_size)
        missing = per_rank * self.world_size - len(present)
        keys = [SampleKey(sample, epoch) for sample in present]
        if self.pad:
            keys += [SampleKey(0, epoch, padded=True)] * missing
        else:
            keys += [SampleKey(int(order[i % self.samples]), epoch) for i in range(missing)]
        return keys[self.rank * per_rank : (self.rank + 1) * per_rank]

    def state_dict(self) -> dict[str, int]:
        """The position, and the settings that give it its meaning; the same integers on every rank."""
        return {
            "epoch": self.epoch,
            "batches": self.delivered,
            "seed": self.seed,
            "samples": self.samples,
            "global_batch": self.global_batch,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a saved position: the next batch is the one after the last delivered one.

        Raises:
            DataError: If the position is inside an epoch that other settings would order differently.
        """
        epoch, batches = state["epoch"], state["batches"]
        mine = self.state_dict()
        changed = [name for name in ("seed", "samples", "global_batch") if state[name] != mine[name]]
        if batches and changed:
            raise DataError(
                f"the checkpoint was written after batch {batches} of epoch {epoch} with "
                + ", ".join(f"{name}={state[name]}" for name in changed)
                + ", but this run has "
                + ", ".join(f"{name}={mine[name]}" for name in changed)
                + ": resume with the same data settings, or from a checkpoint of an epoch's end"
            )
        self.epoch, self.delivered, self._resume_at = epoch, batches, batches


# What a loader asks, and how --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Failure:
    """A `DataError` on its way out of a worker; torch would wrap the exception itself in a traceback."""

    message: str


class KeyedDataset(Dataset[Batch]):
    """A data set that answers a list of keys with one batch.

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


def _as_it_is(batch: Any) -> Any:
    return batch  # a KeyedDataset has put the batch together already


class ResumableLoader(DataLoader[Batch]):
    """A `DataLoader` over `EpochBatches` that Lightning can save and restore inside an epoch.

    `state_dict()` counts the batches that were handed out, not those that workers have fetched ahead.
    Iteration starts when the first batch is asked for: Lightning creates the iterator before it restores the
    position and announces the epoch. Without Lightning, each complete pass moves on to the next epoch.

    Args:
        dataset: The data set, which answers lists of keys.
        order: Which keys form the batches of this process.
        batch_sampler: Replaces `order` as the source of the batches (Lightning wraps it for prediction).
        **kwargs: Further arguments of `torch.utils.data.DataLoader`: `num_workers`, `pin_memory`, ...
    """

    def __init__(self, dataset: KeyedDataset, order: EpochBatches, batch_sampler: Any = None, **kwargs: Any) -> None:
        # a generator of its own: otherwise every pass would draw the workers' base seed from the global one
        kwargs.setdefault("generator", torch.Generator().manual_seed(sample_seed(order.seed, "workers")))
        kwargs.setdefault("collate_fn", _as_it_is)
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
    """One pass over a loader that looks at the loader's position only when the first batch is asked for."""

    def __init__(self, loader: ResumableLoader) -> None:
        self.loader = loader
        self.batches: Iterator[Batch] | None = None

    def __next__(self) -> Batch:
        if self.batches is None:
            self.batches = self.loader.start()
        batch = next(self.batches)
        if isinstance(batch, _Failure):
            # end the workers now: left to the collector, together with the traceback, each takes seconds
            self.batches = self.loader._iterator = None
            raise DataError(batch.message)
        self.loader.order.deliver()
        return batch
