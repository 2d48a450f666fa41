"""Which samples form a batch, and what randomness they get: pure functions of seed, epoch and position."""

from __future__ import annotations

import pickle
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from zoo.data import Digits
from zoo.data.checks import DataError
from zoo.data.sampling import (
    IGNORE_INDEX,
    EpochBatches,
    KeyedDataset,
    ResumableLoader,
    SampleKey,
    balanced_chances,
    isolated_rng,
    sample_seed,
    seed_rng,
    stratified_split,
)


class Noise(KeyedDataset):
    """Rows of `(sample, epoch)` and one draw from each of the three global generators."""

    def __init__(self, n: int, seed: int = 0, broken: int = -1) -> None:
        super().__init__(torch.arange(n) % 7)
        self.seed, self.broken = seed, broken

    def images(self, keys: Sequence[SampleKey]) -> Tensor:
        with isolated_rng():
            return torch.stack([self.row(key) for key in keys])

    def row(self, key: SampleKey) -> Tensor:
        if key.sample == self.broken:
            raise DataError(f"sample {key.sample} is broken")
        seed_rng(sample_seed(self.seed, key.epoch, key.sample))
        draws = [float(torch.rand(())), float(np.random.rand()), random.random()]
        return torch.tensor([key.sample, key.epoch, *draws], dtype=torch.float64)


def loader(
    n: int = 23, batch_size: int = 5, num_workers: int = 0, broken: int = -1, **order: object
) -> ResumableLoader:
    batches = EpochBatches(n, batch_size, **order)  # type: ignore[arg-type]
    return ResumableLoader(
        Noise(n, broken=broken), batches, num_workers=num_workers, persistent_workers=num_workers > 0
    )


def rows(batches: Iterator[tuple[Tensor, Tensor]] | ResumableLoader) -> list[Tensor]:
    return [images for images, _ in batches]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def global_states() -> tuple[bytes, bytes, object]:
    return torch.get_rng_state().numpy().tobytes(), pickle.dumps(np.random.get_state()), random.getstate()


# ---- seeds -------------------------------------------------------------------------------------------------


def test_seeds_are_fixed_and_unrelated() -> None:
    assert sample_seed(0, 0, 0) == 9617123944752223253, "changing this changes every published run"
    seeds = {sample_seed(s, e, i) for s in range(4) for e in range(10) for i in range(500)}
    assert len(seeds) == 4 * 10 * 500
    assert len({seed & 0xFFFFFFFF for seed in seeds}) > 4 * 10 * 500 - 5, "numpy and torch use 32 bits"


def test_isolated_rng_restores_all_three_generators() -> None:
    before = global_states()
    with isolated_rng():
        seed_rng(1)
        first = torch.rand(2), np.random.rand(), random.random()
        seed_rng(1)
        assert torch.equal(first[0], torch.rand(2))
        assert first[1:] == (np.random.rand(), random.random())
    assert global_states() == before


def test_seeding_costs_less_than_100_microseconds() -> None:
    def once(n: int = 200) -> float:
        began = time.perf_counter()
        with isolated_rng():
            for index in range(n):
                seed_rng(sample_seed(0, 0, index))
        return (time.perf_counter() - began) / n

    assert min(once() for _ in range(5)) < 100e-6


# ---- splits ------------------------------------------------------------------------------------------------


def test_stratified_split_keeps_proportions_and_is_frozen() -> None:
    targets = np.repeat([0, 1, 2], [100, 50, 10])
    first, second = stratified_split(targets, 0.2, seed=2024)
    assert np.bincount(targets[second]).tolist() == [20, 10, 2]
    assert np.array_equal(np.sort(np.concatenate([first, second])), np.arange(160))
    assert second[:8].tolist() == [5, 6, 14, 15, 16, 17, 19, 21], "part of the data sets' definition"
    assert len(stratified_split(targets, 0.0)[1]) == 0
    assert len(stratified_split([0, 1, 2], 0.9)[0]) == 3, "a class keeps at least one sample"


# ---- batches -----------------------------------------------------------------------------------------------


def test_order_depends_on_seed_and_epoch_only() -> None:
    one, two = EpochBatches(50, 5, seed=3), EpochBatches(50, 10, seed=3, world_size=2)
    assert torch.equal(one.order(4), two.order(4))
    assert sorted(one.order(4).tolist()) == list(range(50))
    assert not torch.equal(one.order(4), one.order(5))
    assert not torch.equal(one.order(4), EpochBatches(50, 5, seed=4).order(4))
    assert torch.equal(EpochBatches(50, 5, reshuffle=False).order(7), EpochBatches(50, 5).order(0))
    assert EpochBatches(5, 2, shuffle=False).order(9).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_share_the_global_batches(world_size: int, drop_last: bool) -> None:
    samples, global_batch = 50, 12
    whole = list(EpochBatches(samples, global_batch, seed=1, drop_last=drop_last))
    shares = [
        list(
            EpochBatches(
                samples,
                global_batch // world_size,
                seed=1,
                drop_last=drop_last,
                rank=rank,
                world_size=world_size,
            )
        )
        for rank in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1
    for step, batch in enumerate(whole):
        joined = [key for share in shares for key in share[step]]
        assert joined[: len(batch)] == batch
        assert len(joined) - len(batch) < world_size
        assert not any(key.padded for key in joined), "training repeats samples, it never pads"
        assert len({len(share[step]) for share in shares}) == 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_evaluation_sees_every_sample_once(world_size: int) -> None:
    parts = [loader(21, 4, shuffle=False, pad=True, rank=rank, world_size=world_size) for rank in range(world_size)]
    seen, lengths = [], set()
    for part in parts:
        batches = list(part)
        lengths.add(tuple(len(targets) for _, targets in batches))
        for images, targets in batches:
            real = targets != IGNORE_INDEX
            seen += images[real, 0].tolist()
            assert torch.equal(targets[real], images[real, 0].long() % 7)
    assert sorted(seen) == list(range(21))
    assert len(lengths) == 1, "every process takes the same steps"


def test_too_few_samples_say_so() -> None:
    with pytest.raises(DataError, match=r"10 samples make no batch of 8 on 2 process\(es\); .* data\.batch_size"):
        EpochBatches(10, 8, world_size=2, drop_last=True)
    with pytest.raises(DataError, match="empty"):
        EpochBatches(0, 8)


# ---- loaders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_position_resumes_exactly(num_workers: int) -> None:
    unbroken = loader()
    whole = [batch for _ in range(2) for batch in rows(unbroken)]  # epochs follow each other by themselves
    assert {float(batch[0, 1]) for batch in whole} == {0, 1}
    runner = loader()
    for step, _ in enumerate((batch for _ in range(2) for batch in runner), start=1):
        state = pickle.loads(pickle.dumps(runner.state_dict()))
        if num_workers and step % 3:  # starting processes takes its time
            continue
        resumed = loader(num_workers=num_workers)
        resumed.load_state_dict(state)
        rest = rows(resumed)
        while len(rest) < len(whole) - step:
            rest += rows(resumed)
        assert same(rest[: len(whole) - step], whole[step:])


def test_workers_change_nothing_and_nobody_touches_the_global_generators() -> None:
    before = global_states()
    alone, helped = loader(), loader(num_workers=2)
    for _ in range(2):
        assert same(rows(alone), rows(helped))
    assert len(list(iter(alone))) == len(alone) == 5
    assert global_states() == before


def test_state_counts_what_was_delivered_not_what_was_fetched() -> None:
    helped = loader(num_workers=2)
    batches = iter(helped)
    next(batches)
    time.sleep(0.2)
    assert helped.state_dict() == {"epoch": 0, "batches": 1, "seed": 0, "samples": 23, "global_batch": 5}


def test_iteration_starts_with_the_first_batch() -> None:
    """As Lightning does it: iterator first, then position and epoch."""
    expected = loader()
    expected.set_epoch(3)
    late = loader()
    batches = iter(late)
    late.set_epoch(3)
    assert same(rows(batches), rows(expected))


def test_set_epoch_keeps_a_position_of_the_same_epoch_only() -> None:
    order = EpochBatches(20, 5)
    order.load_state_dict({"epoch": 2, "batches": 3, "seed": 0, "samples": 20, "global_batch": 5})
    order.set_epoch(2)
    assert order.state_dict()["batches"] == 3
    order.set_epoch(3)
    assert order.state_dict() == {"epoch": 3, "batches": 0, "seed": 0, "samples": 20, "global_batch": 5}


def test_a_clock_overrules_announcements() -> None:
    now = 5
    clocked = loader(clock=lambda: now)
    clocked.set_epoch(9)
    assert {float(batch[0, 1]) for batch in rows(clocked)} == {5}


@pytest.mark.parametrize(
    ("name", "settings"), [("seed", {"seed": 1}), ("samples", {"n": 24}), ("global_batch", {"batch_size": 6})]
)
def test_a_position_of_other_settings_is_refused(name: str, settings: dict[str, int]) -> None:
    written = loader()
    next(iter(written))
    changed = loader(**settings)
    with pytest.raises(DataError, match=rf"after batch 1 of epoch 0 with {name}=.*this run has {name}="):
        changed.load_state_dict(written.state_dict())
    rows(written)
    changed.load_state_dict(written.state_dict())
    assert changed.state_dict()["epoch"] == 1, "at an epoch's end other settings are fine"


def test_the_same_global_batch_resumes_on_another_number_of_processes() -> None:
    written = EpochBatches(40, 8, drop_last=True)
    written.delivered = 2
    halves = [EpochBatches(40, 4, drop_last=True, rank=rank, world_size=2) for rank in range(2)]
    for half in halves:
        half.load_state_dict(written.state_dict())
    joined = [left + right for left, right in zip(*halves, strict=True)]
    assert joined == list(EpochBatches(40, 8, drop_last=True))[2:]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_sample_is_one_sentence(num_workers: int) -> None:
    with pytest.raises(DataError) as caught:
        rows(loader(num_workers=num_workers, broken=11))
    assert str(caught.value) == "sample 11 is broken"


def test_plain_indices_work_too() -> None:
    image, target = Noise(9)[4]
    assert image[0] == 4
    assert target == 4


# ---- balanced classes --------------------------------------------------------------------------------------


def test_balanced_draws_are_reproducible_and_resume() -> None:
    targets = torch.tensor([0] * 90 + [1] * 10)
    options: dict[str, Any] = {"seed": 3, "chances": balanced_chances(targets)}
    order = EpochBatches(100, 8, **options)
    drawn = torch.stack([order.order(epoch) for epoch in range(20)])
    share = (targets[drawn] == 1).double().mean()
    assert abs(share - 0.5) < 0.05
    assert torch.equal(order.order(4), EpochBatches(100, 8, **options).order(4))
    assert not torch.equal(order.order(4), order.order(5))
    whole = list(order)
    resumed = EpochBatches(100, 8, **options)
    order.start()
    for _ in range(5):
        order.deliver()
    resumed.load_state_dict(order.state_dict())
    resumed.start()
    assert list(resumed) == whole[5:]
    ranks = [list(EpochBatches(100, 4, rank=rank, world_size=2, **options)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == whole
    with pytest.raises(DataError, match="balanced=1, but this run has balanced=0"):
        EpochBatches(100, 8, seed=3).load_state_dict(order.state_dict())


def test_a_sample_that_is_drawn_again_is_augmented_anew() -> None:
    order = EpochBatches(10, 5, chances=balanced_chances(torch.tensor([0] * 9 + [1])))
    keys = [key for batch in order._batches(2, 0) for key in batch]
    assert len(set(keys)) == len(keys) == 10
    assert len({key.sample for key in keys}) < 10
    first = {key.sample: key for key in reversed(keys)}
    assert all(key.epoch == 2 for key in first.values()), "the first draw is augmented as without repetition"


def test_balanced_classes_of_a_data_module() -> None:
    data = Digits(batch_size=50, balanced=True)
    data.setup()
    targets = data.datasets["train"].targets
    rare = torch.cat([torch.where(targets == 3)[0], torch.where(targets == 5)[0][:10]])
    data.datasets["train"].targets, data.datasets["train"].pixels = targets[rare], data.datasets["train"].pixels[rare]
    found = torch.cat([batch[1] for _ in range(8) for batch in data.train_dataloader()])
    assert 0.3 < (found == 5).double().mean() < 0.7
