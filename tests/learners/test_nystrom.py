"""Streaming dictionaries: one pass, bounded memory, guarantees, resuming; and volume sampling's draws."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor

from zoo.kernels import Gaussian
from zoo.learners.heads import ridge
from zoo.learners.nystrom import StreamingDictionary, effective_dimension, growth, nystrom, ridge_leverage_scores
from zoo.learners.ridge import solve_feature_ridge, solve_ridge
from zoo.learners.statistics import ClassStatistics
from zoo.learners.volume_sampling import leverage_scores, subset_probabilities, volume_sample
from zoo.support.files import CheckpointError


def gaussian(lengthscale: float) -> Gaussian:
    return Gaussian(lengthscale, dtype=torch.float64).requires_grad_(False)


@pytest.fixture(scope="module")
def diabetes() -> tuple[Tensor, Tensor]:
    X, y = (torch.tensor(v) for v in load_diabetes(return_X_y=True))
    return (X - X.mean(0)) / X.std(0, correction=0), (y - y.mean()) / y.std()


@pytest.mark.parametrize(
    ("mode", "budget", "bound"), [("budget", 30, 60), ("budget", 60, 120), ("unnormalised", 8, 96)]
)
def test_one_pass_over_diabetes(diabetes, mode, budget, bound):
    X, y = diabetes
    kernel, g = gaussian(5.0), 10.0
    dictionary, largest = StreamingDictionary(kernel, g, budget, mode=mode, seed=1), 0
    for x in (row for row in X[:342]):  # a generator: nothing can be read twice
        dictionary.step(x)
        largest = max(largest, len(dictionary))
    K = kernel(X[:342])
    assert largest <= bound
    assert float(dictionary.effective_dimension) == pytest.approx(float(effective_dimension(K, g)), rel=0.15)
    apart = torch.linalg.eigvalsh(K - dictionary.approximation(X[:342]))
    assert float(apart[0]) > -1e-9
    assert float(apart[-1]) <= 2 * g  # g / (1 - eps)
    phi = dictionary.features()
    found = phi(X[342:]) @ solve_feature_ridge(phi(X[:342]), y[:342], 1.0)
    exact = kernel(X[342:], X[:342]) @ solve_ridge(K, y[:342], 1.0)
    left = [float((p - y[342:]).square().mean()) for p in (found, exact)]
    assert left[0] < 1.1 * left[1]


def test_rows_that_matter_are_kept():
    g = torch.Generator().manual_seed(0)
    blob, far = 0.05 * torch.randn(200, 2, generator=g), 4 * torch.randn(8, 2, generator=g)
    order = torch.randperm(208, generator=g)
    dictionary = StreamingDictionary(gaussian(1.0), 1.0, 60, seed=0).update(torch.cat([blob, far])[order].double())
    kept = order[dictionary.positions]
    assert int((kept >= 200).sum()) == 8
    assert len(dictionary) < 50  # chosen uniformly, about two of eight would be there


def test_the_same_seed_and_a_file_in_between_give_the_same_dictionary(diabetes, tmp_path: Path):
    X = diabetes[0][:80]

    def fresh(seed: int = 3) -> StreamingDictionary:
        return StreamingDictionary(gaussian(5.0), 5.0, 10, seed=seed)

    whole, path = fresh().update(X), tmp_path / "dictionary.safetensors"
    fresh().update(X[:40]).save(path)
    for back in (fresh(99).restore(path), fresh(99)):
        if not len(back):
            back.load_state_dict(fresh().update(X[:40]).state_dict())
        back.update(X[40:])
        for name, value in whole.state_dict().items():
            assert torch.equal(back.state_dict()[name], value), name
    assert not torch.equal(fresh(4).update(X).positions, whole.positions)
    fresh().update(X[:3]).save(path)
    with pytest.raises(CheckpointError, match="copies outside 1 to 2"):
        StreamingDictionary(gaussian(5.0), 5.0, 2).restore(path)


def test_with_all_rows_kept_the_scores_are_exact(diabetes):
    X = diabetes[0][:30]
    K = gaussian(3.0)(X)
    dictionary = StreamingDictionary(gaussian(3.0), 2.0, 5, eps=0.0, mode="unnormalised", keep_all=True)
    for t, x in enumerate(X):
        found = dictionary.step(x)
        assert torch.allclose(found.scores, ridge_leverage_scores(K[: t + 1, : t + 1], 2.0), rtol=0, atol=1e-10)
        assert torch.allclose(found.delta, growth(K[:t, :t], K[:t, t], K[t, t], 2.0).delta, rtol=0, atol=1e-12)
    assert torch.allclose(dictionary.effective_dimension, effective_dimension(K, 2.0), rtol=0, atol=1e-10)
    everything = nystrom(K, torch.arange(30), torch.ones(30).double(), 2.0)
    assert torch.allclose(dictionary.approximation(X), everything, rtol=0, atol=1e-10)


def test_a_dictionary_feeds_the_sums_of_a_stream(diabetes):
    X, y = diabetes
    labels = (y > 0).long()
    phi = StreamingDictionary(gaussian(5.0), 10.0, 30).update(X[:342]).features()
    learner = ClassStatistics(phi).update(X[:342], labels[:342])
    right = (ridge(learner).predict(learner.phi(X[342:])) == labels[342:]).double().mean()
    assert float(right) > 0.7
    assert phi(X[:2].float()).dtype == torch.float64
    assert "weight" in phi.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_types_and_equal_rows(dtype):
    X = torch.ones(20, 3, dtype=dtype)  # one point, twenty times
    dictionary = StreamingDictionary(Gaussian(1.0), 1.0, 5).update(X)
    assert dictionary.points.dtype == dtype
    assert 0.9 < float(dictionary.effective_dimension) < 2.5
    assert float((dictionary.approximation(X).detach() - 1).abs().max()) < 0.7
    zero = StreamingDictionary(lambda a, b: a @ b.mT, 1.0, 5).update(0 * X)  # nothing to represent
    assert len(zero) == 0
    assert int(zero.seen) == 20


def test_what_cannot_be_used_is_refused(diabetes):
    X = diabetes[0]
    dictionary = StreamingDictionary(gaussian(5.0), 5.0, 10).update(X[:20])
    before = {name: value.clone() for name, value in dictionary.state_dict().items()}
    cases = [
        (lambda: dictionary.step(X[0] / 0), "vector of finite numbers"),
        (lambda: dictionary.step(X[0, :3]), r"shape \(3,\), those before have \(10,\)"),
        (lambda: dictionary.update(torch.stack([X[0], X[1] * torch.nan])), "rows must be finite"),
        (lambda: StreamingDictionary(gaussian(1.0), 0.0, 5), "ridge=0.0 must be above 0"),
        (lambda: StreamingDictionary(gaussian(1.0), 1.0, 0), "budget=0 must be at least 1"),
        (lambda: StreamingDictionary(gaussian(1.0), 1.0, 5, mode="other"), "must be one of budget, unnormalised"),
        (lambda: StreamingDictionary(gaussian(1.0), 1.0, 5).features(), "dictionary is empty"),
        (lambda: ridge_leverage_scores(torch.eye(2), -1.0), "ridge=-1.0"),
        (lambda: leverage_scores(torch.ones(4, 2)), "linearly dependent"),
        (lambda: volume_sample(X, 5), "size=5 must be between the 10 features and the 442 rows"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    assert all(torch.equal(dictionary.state_dict()[name], value) for name, value in before.items())


def test_volume_samples_have_their_probabilities():
    g = torch.Generator().manual_seed(0)
    F, y = torch.randn(5, 2, generator=g).double(), torch.randn(5, 1, generator=g).double()
    sets, chance = subset_probabilities(F, 3)
    counts = {tuple(s): 0 for s in sets.tolist()}
    for _ in range(1500):
        counts[tuple(volume_sample(F, 3, g).tolist())] += 1
    share = torch.tensor(list(counts.values())).double() / 1500
    assert float((share - chance).abs().max()) < 4 * (0.25 / 1500) ** 0.5
    mean = sum(p * torch.linalg.lstsq(F[s], y[s]).solution for s, p in zip(sets, chance, strict=True))
    assert torch.allclose(mean, torch.linalg.lstsq(F, y).solution, rtol=0, atol=1e-12)
