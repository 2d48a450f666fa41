"""Sums of a stream: any order, any batches, forgetting, merging, files, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from zoo.kernels import Linear
from zoo.kernels.random_features import FourierFeatures
from zoo.learners.statistics import ClassStatistics
from zoo.support.files import CheckpointError


@pytest.fixture
def stream() -> tuple[Tensor, Tensor, Tensor]:
    """60 rows of 5 numbers, classes 2, 7 and 9, tasks 0, 1 and -3."""
    g = torch.Generator().manual_seed(0)
    X = torch.randn(60, 5, generator=g)
    labels = torch.tensor([2, 7, 9])[torch.randint(3, (60,), generator=g)]
    tasks = torch.tensor([0, 1, -3])[torch.randint(3, (60,), generator=g)]
    return X, labels, tasks


def fourier() -> FourierFeatures:
    return FourierFeatures(5, 8, seed=3)


def snapshot(learner: ClassStatistics) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in learner.state_dict().items()}


def unchanged(learner: ClassStatistics, before: dict[str, Tensor]) -> bool:
    now = learner.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in now)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_order_and_any_batches_give_the_sums_of_all_rows_at_once(stream, dtype):
    X, labels, tasks = stream[0].to(dtype), *stream[1:]
    at_once = ClassStatistics().update(X, labels, tasks)
    F = X.double()
    assert torch.allclose(at_once.gram, F.T @ F, rtol=0, atol=1e-12)
    for c, t in [(2, 0), (9, -3)]:
        mine = (labels == c) & (tasks == t)
        place = int((at_once.components == torch.tensor([t, c])).all(1).nonzero())
        assert torch.allclose(at_once.sums[place], F[mine].sum(0), rtol=0, atol=1e-12)
        assert at_once.count(c, t) == int(mine.sum())
    for seed, size in [(1, 1), (2, 7), (3, 60)]:
        order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
        other = ClassStatistics()
        for rows in order.split(size):
            other.update(X[rows], labels[rows], tasks[rows], batch_size=3)
        assert other.difference(at_once) < 1e-9
    assert at_once.classes.tolist() == [2, 7, 9]
    assert at_once.tasks.tolist() == [-3, 0, 1]
    assert at_once.rows == 60


def test_forgotten_rows_were_never_seen(stream):
    X, labels, tasks = stream
    learner = ClassStatistics(fourier()).update(X, labels, tasks)
    gone = (labels == 7) | (torch.arange(60) % 4 == 0)  # a whole class, and rows of the others
    learner.downdate(X[gone], labels[gone], tasks[gone])
    assert learner.difference(ClassStatistics(fourier()).update(X[~gone], labels[~gone], tasks[~gone])) < 1e-9
    assert learner.classes.tolist() == [2, 9]
    learner.downdate(X[~gone], labels[~gone], tasks[~gone])
    assert (learner.rows, learner.dim) == (0, 0)
    assert learner.fingerprint() == ClassStatistics(fourier()).fingerprint()


def test_exact_sums_leave_the_same_bits(stream):
    X, labels, tasks = stream

    def learner() -> ClassStatistics:
        return ClassStatistics(resolution=2**-20)

    all_rows = learner().update(X, labels, tasks)
    back = learner().update(X.flip(0)[:20], labels.flip(0)[:20], tasks.flip(0)[:20])
    back.update(X.flip(0)[20:], labels.flip(0)[20:], tasks.flip(0)[20:], batch_size=7)
    assert back.fingerprint() == all_rows.fingerprint()
    before = all_rows.fingerprint()
    all_rows.downdate(X[:9], labels[:9], tasks[:9])
    assert all_rows.fingerprint() == learner().update(X[9:], labels[9:], tasks[9:]).fingerprint() != before
    with pytest.raises(ValueError, match="not exact at this resolution"):
        learner().update(X * 1000, labels)
    with pytest.raises(ValueError, match="power of two"):
        ClassStatistics(resolution=0.1)


def test_merging_adds_and_splitting_takes_away(stream):
    X, labels, tasks = stream
    whole = ClassStatistics(fourier()).update(X, labels, tasks)
    first = ClassStatistics(fourier()).update(X[:20], labels[:20], tasks[:20])
    second = ClassStatistics(fourier()).update(X[20:], labels[20:], tasks[20:])
    merged = copy.deepcopy(first).merge(second)
    assert merged.difference(whole) < 1e-9
    assert merged.split(second).difference(first) < 1e-9
    assert ClassStatistics(fourier()).merge(whole).difference(whole) == 0
    for other, message in [
        (ClassStatistics(FourierFeatures(5, 8, seed=4)).update(X, labels), "another feature map"),
        (ClassStatistics(FourierFeatures(5, 4, seed=3)).update(X, labels), "8 dimensions"),
        (ClassStatistics(fourier(), gram=False).update(X, labels), "other settings"),
    ]:
        before = snapshot(first)
        with pytest.raises(ValueError, match=message):
            first.merge(other)
        assert unchanged(first, before)
    with pytest.raises(ValueError, match="rows of class"):
        first.split(whole)


def test_saved_mid_stream_and_continued(stream, tmp_path: Path):
    X, labels, tasks = stream
    whole = ClassStatistics(fourier()).update(X, labels, tasks)
    part = ClassStatistics(fourier()).update(X[:30], labels[:30], tasks[:30])
    path = tmp_path / "learner.safetensors"
    part.save(path)
    other_map = FourierFeatures(5, 8, seed=9)  # the file holds the right one
    back = ClassStatistics.load(path, other_map)
    assert back.fingerprint() == part.fingerprint()
    assert back.update(X[30:], labels[30:], tasks[30:]).difference(whole) < 1e-9
    assert path.stat().st_size < 16 * 17 // 2 * 8 + 9 * (16 * 8 + 24) + 5 * 16 * 8 + 2500  # G as one triangle
    empty = ClassStatistics(fourier())
    empty.save(path, features=False)
    assert ClassStatistics.load(path, fourier()).update(X, labels, tasks).fingerprint() == whole.fingerprint()
    without = ClassStatistics(gram=False, resolution=2**-10).update(X, labels)
    without.save(path)
    back = ClassStatistics.load(path)
    assert (back.has_gram, float(back.grid), back.fingerprint()) == (False, 2**-10, without.fingerprint())


def test_a_state_dict_brings_its_own_sizes(stream):
    X, labels, tasks = stream
    learner = ClassStatistics(fourier()).update(X, labels, tasks)
    back = ClassStatistics(fourier()).update(X[:1], [4])
    back.load_state_dict(learner.state_dict())
    assert back.fingerprint() == learner.fingerprint()
    wrong = learner.state_dict() | {"counts": learner.counts[:2]}
    with pytest.raises(CheckpointError, match="does not hold the sums"):
        back.load_state_dict(wrong)
    assert back.fingerprint() == learner.fingerprint()


def test_files_that_are_no_learner_are_refused(stream, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    X, labels, tasks = stream
    path, bad = tmp_path / "learner.safetensors", tmp_path / "bad.safetensors"
    ClassStatistics(fourier()).update(X, labels, tasks).save(path)
    good = load_file(path)
    for name, value, message in [
        ("counts", -good["counts"], "counts below one"),
        ("counts", good["counts"].double(), "damaged"),
        ("sums", good["sums"] * torch.nan, "finite"),
        ("gram", good["gram"][:-1], "for 16 dimensions"),
        ("components", good["components"].flip(0), "not in order"),
        ("more", torch.ones(2), "does not hold the sums"),
    ]:
        save_file({k: v.contiguous() for k, v in (good | {name: value}).items()}, bad)
        with pytest.raises(CheckpointError, match=message):
            ClassStatistics.load(bad, fourier())
    with pytest.raises(CheckpointError, match="another feature map"):
        ClassStatistics.load(path, FourierFeatures(5, 4))
    with pytest.raises(CheckpointError, match="no file"):
        ClassStatistics.load(tmp_path / "none.safetensors")


def test_what_cannot_be_used_is_refused_and_nothing_changes(stream):
    X, labels, tasks = stream
    learner = ClassStatistics().update(X[:40], labels[:40], tasks[:40])
    before = snapshot(learner)
    holed = X[40:].clone()
    holed[3, 1] = torch.nan
    unseen = torch.full((1, 5), 50.0)
    only = int(labels[0]), int(tasks[0])
    cases = [
        (lambda: learner.update(holed, labels[40:]), "of 1 of 20 rows are not finite, first in row 3"),
        (lambda: learner.update(X[:4] / 0, labels[:4]), "not finite"),
        (lambda: learner.update(X[:4, :3], labels[:4]), "3 dimensions, those learned before have 5"),
        (lambda: learner.update(X[:4], labels[:3]), "labels has shape"),
        (lambda: learner.update(X[:4], labels[:4] + 0.5), "labels must be integers"),
        (lambda: learner.update(X[:4], ["a", "b", "c", "d"]), "labels must be integers"),
        (lambda: learner.update(X[0], 1), "rows come as a tensor"),
        (lambda: learner.update(X[:4].double() * 1e200, labels[:4]), "not finite"),
        (lambda: learner.downdate(X[:1], 5), "cannot forget 1 rows of class 5 in task 0: none were learned"),
        (lambda: learner.downdate(X[:40], only[0], only[1]), "cannot forget 40 rows of class"),
        (lambda: learner.downdate(X[:4, :3], labels[:4], tasks[:4]), "3 dimensions"),
        (lambda: learner.downdate(unseen, *only), "were not learned here"),
        (lambda: learner.count(5), "class 5 was never seen; known classes: 2, 7, 9"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
        assert unchanged(learner, before), message
    assert unchanged(learner.update(X[:0], labels[:0]), before)  # no rows: nothing to learn


def test_the_last_row_of_a_class_must_be_the_one_that_was_learned(stream):
    X = stream[0]
    for gram in (True, False):
        learner = ClassStatistics(gram=gram).update(X[:10], 0).update(X[10:11], 1)
        with pytest.raises(ValueError, match="were not learned here"):
            learner.downdate(X[11:12], 1)
        assert learner.downdate(X[10:11], 1).classes.tolist() == [0]


def test_any_feature_map_serves(stream):
    X, labels, _ = stream
    kernel = Linear()
    assert torch.equal(
        ClassStatistics(kernel).update(X, labels).gram,
        ClassStatistics(kernel.features).phi(X).T @ (ClassStatistics(kernel.features).phi(X)),
    )
    network = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    learner = ClassStatistics(network).update(X, labels)
    assert network[1].training  # left as it was
    assert int(network[1].num_batches_tracked) == 0
    assert learner.difference(ClassStatistics(network.eval()).update(X, labels)) == 0
    learner.half()
    assert network[0].weight.dtype == torch.float16
    assert learner.gram.dtype == torch.float64
    with pytest.raises(ValueError, match="one real vector for each of 60 rows"):
        ClassStatistics(lambda x: x.sum(1)).update(X, labels)
