"""Few-shot heads: their limits, symmetries, gradients, and what training on episodes gains."""

from __future__ import annotations

import itertools

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from zoo.learners.few_shot import (
    Episode,
    UNEMDirichlet,
    UNEMGaussian,
    dirichlet_layers,
    em_dirichlet,
    episodes,
    fit,
    fit_dirichlet,
    gaussian_layers,
    nll,
    paddle,
    prototypes,
)


def task(seed: int = 0, tasks: int = 3, K: int = 4, d: int = 4, queries: int = 9) -> Episode:
    g = torch.Generator().manual_seed(seed)
    means = 2 * torch.randn(tasks, K, d, generator=g, dtype=torch.float64)
    labels = torch.arange(K).repeat(tasks, 2)
    wanted = torch.randint(2, (tasks, queries), generator=g)
    noise = [torch.randn(tasks, n, d, generator=g, dtype=torch.float64) for n in (2 * K, queries)]
    return Episode(
        means.gather(1, labels[..., None].expand(-1, -1, d)) + noise[0],
        labels,
        means.gather(1, wanted[..., None].expand(-1, -1, d)) + noise[1],
        wanted,
    )


def heads() -> list[torch.nn.Module]:
    return [UNEMGaussian(3, dtype=torch.float64), UNEMDirichlet(2, scale=1.0, max_steps=40, dtype=torch.float64)]


def test_without_balance_and_temperature_one_layer_is_the_nearest_prototype():
    support, labels, query, _ = task()
    one = torch.ones(1, dtype=torch.float64)
    U = next(gaussian_layers(support * 100, labels, query * 100, 0 * one, one)).assignments
    means = torch.stack([support[:, k::4].mean(1) for k in range(4)], 1)
    nearest = torch.cdist(query, means).argmin(-1)
    assert torch.equal(U.argmax(-1), nearest)
    assert torch.equal(prototypes(support, labels, query).argmax(-1), nearest)
    soft = (-torch.cdist(query, means).square() / 2).softmax(-1)
    assert torch.allclose(prototypes(support, labels, query), soft, rtol=0, atol=1e-12)


@pytest.mark.parametrize("head", heads(), ids=["gaussian", "dirichlet"])
def test_order_of_queries_and_names_of_classes_do_not_matter(head):
    support, labels, query, _ = task()
    with torch.no_grad():
        U = head(support, labels, query)
        shuffled = torch.randperm(9, generator=torch.Generator().manual_seed(1))
        assert torch.allclose(head(support, labels, query[:, shuffled]), U[:, shuffled], rtol=0, atol=1e-9)
        renamed = torch.tensor([2, 0, 3, 1])
        if isinstance(head, UNEMDirichlet):  # its columns are the classes
            support, query = support[..., renamed.argsort()], query[..., renamed.argsort()]
        found = head(support, renamed[labels], query)
    assert torch.allclose(found[..., renamed], U, rtol=0, atol=1e-9)


@pytest.mark.parametrize("head", heads(), ids=["gaussian", "dirichlet"])
def test_a_batch_of_tasks_is_task_after_task(head):
    support, labels, query, _ = task()
    with torch.no_grad():
        U = head(support, labels, query)
        for i in range(3):
            assert torch.allclose(head(support[i], labels[i], query[i]), U[i], rtol=0, atol=1e-9)


@pytest.mark.parametrize("head", heads(), ids=["gaussian", "dirichlet"])
def test_gradients_reach_every_number(head):
    found = task(tasks=2)
    support = found.support.requires_grad_()
    nll(head(support, found.support_labels, found.query), found.query_labels).backward()
    assert bool(support.grad.isfinite().all())
    assert float(support.grad.abs().sum()) > 0
    for name, number in head.named_parameters():
        assert bool(number.grad.isfinite().all()), name
        assert float(number.grad.abs().sum()) > 0, name


def test_parameters_of_a_dirichlet_distribution_are_recovered():
    alpha = torch.tensor([[0.4, 2.0, 7.0], [1.0, 1.0, 0.05]], dtype=torch.float64)
    torch.manual_seed(0)
    samples = torch.distributions.Dirichlet(alpha).sample((100_000,)).clamp_min(1e-300)
    found, _ = fit_dirichlet(samples.log().mean(0), max_steps=1000)
    assert torch.allclose(found, alpha, rtol=0.02, atol=0)
    m, likelihoods = samples.log().mean(0), []
    for steps in (1, 2, 5, 20, 100):
        a, done = fit_dirichlet(m, max_steps=steps)
        assert done <= steps
        likelihoods.append(torch.lgamma(a.sum(-1)) - torch.lgamma(a).sum(-1) + ((a - 1) * m).sum(-1))
    assert all(bool((b >= a - 1e-12).all()) for a, b in itertools.pairwise(likelihoods))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiny_and_huge_parameters_stay_finite(dtype):
    m = torch.tensor([[-200.0, -0.01, -90.0], [-1.1, -1.0988, -1.0988]], dtype=dtype)  # spiky, nearly constant
    found, _ = fit_dirichlet(m)
    assert bool(found.isfinite().all())
    assert bool((found > 0).all())


def test_half_precision_and_plain_floats():
    found = task()
    for head in (UNEMGaussian(3), UNEMDirichlet(2, scale=1.0, max_steps=60)):
        wanted = head.double()(found.support, found.support_labels, found.query)
        for dtype, apart in [(torch.float32, 1e-3), (torch.bfloat16, 0.3)]:
            U = head.float()(found.support.to(dtype), found.support_labels, found.query.to(dtype))
            assert U.dtype == torch.float32
            assert float((U - wanted).detach().abs().max()) < apart


def test_a_dirichlet_head_needs_no_support():
    g = torch.Generator().manual_seed(0)
    p = torch.randn(1, 20, 4, generator=g).double().mul(3).softmax(-1)
    lam = torch.ones(3, dtype=torch.float64)
    *_, last = dirichlet_layers(p[:, :0], torch.zeros(1, 0, dtype=torch.long), p, lam, lam)
    assert last.assignments.shape == (1, 20, 4)
    assert bool(last.assignments.isfinite().all())


def test_what_cannot_be_used_is_refused():
    support, labels, query, wanted = task()
    head = UNEMGaussian(2, dtype=torch.float64)
    cases = [
        (lambda: head(support, labels.clamp_max(2) * 2, query, 5), "class 1 has no row in the support"),
        (lambda: head(support, labels, query, 2), "labels must be 0 to 1, got 0 to 3"),
        (lambda: head(support, labels, query[..., :2]), "must agree"),
        (lambda: head(support, labels[:, 1:], query), "labels must be integers"),
        (lambda: head(support, labels, query / 0), "the query has numbers that are not finite"),
        (lambda: head(support, labels, query[:, :0]), "the query has no rows"),
        (lambda: UNEMGaussian(0), "layers=0 must be above 0"),
        (lambda: prototypes(support.float() * 1e30, labels, query.float() * 1e30), "too large for distances"),
        (lambda: head.float()(support.float() * 1e30, labels, query.float() * 1e30), "too large for distances"),
        (lambda: head(support * 1e307, labels, query * 1e307), "the features are too large"),
        (lambda: paddle(support, labels, query / 0), "the query has numbers that are not finite"),
        (lambda: paddle(support / 0, labels, query), "the support has numbers that are not finite"),
        (lambda: paddle(support, labels, query[:, :0]), "the query has no rows"),
        (lambda: paddle(support, labels, query[..., :2]), "must agree"),
        (lambda: prototypes(support, labels * 10**13, query), "class 1 has no row in the support"),
        (lambda: prototypes(support, labels, query, 10**13), "class 4 has no row in the support"),
        (lambda: prototypes(support.tolist(), labels, query), "support is a list, not a tensor"),
        (lambda: head(support, labels, query.tolist()), "query is a list, not a tensor"),
        (lambda: em_dirichlet(support, labels.tolist(), query, present=1), "labels is a list, not a tensor"),
        (lambda: prototypes(support + 1j, labels, query), "the support has complex numbers"),
        (lambda: next(dirichlet_layers(-support.abs(), labels, query.abs(), wanted, wanted)), "no probabilities"),
        (lambda: nll(query, wanted * 100), "labels must be 0 to 3"),
        (lambda: UNEMDirichlet(temperature=1.0), "temperature - 1=0.0 must be above 0"),
        (lambda: em_dirichlet(support, labels, query, present=0), "present=0"),
        (lambda: episodes(query[0], wanted[0], ways=5, present=1, shots=1, queries=1), "classes at hand"),
        (lambda: episodes(query[0], wanted[0], ways=2, present=1, shots=8, queries=1), "too few for shots=8"),
        (lambda: episodes(query[0], wanted[0], ways=2, present=1, shots=1, queries=9), "too few for 9 queries"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_precisions_of_support_and_query_may_differ():
    support, labels, query, _ = task()
    for answer in (prototypes, paddle, UNEMGaussian(2, dtype=torch.float64)):
        mixed, whole = answer(support.float(), labels, query), answer(support.float().double(), labels, query)
        assert torch.equal(mixed, whole)


def features(X: Tensor, units: int, seed: int) -> Tensor:
    W = torch.randn(64, units, generator=torch.Generator().manual_seed(seed), dtype=X.dtype)
    return torch.nn.functional.normalize((X @ W).relu(), dim=-1)


def accuracy(U: Tensor, found: Episode) -> float:
    return float((U.argmax(-1) == found.query_labels).double().mean())


def test_training_on_episodes_beats_prototypes_and_every_constant_setting():
    X, y = (torch.tensor(v) for v in load_digits(return_X_y=True))
    Z = features((X / 16).float(), 64, 0)
    draw = {"ways": 10, "present": 3, "shots": 1, "queries": 45}
    g = torch.Generator().manual_seed(0)
    train = episodes(Z[:900], y[:900], **draw, tasks=40, generator=g)
    test = episodes(Z[900:], y[900:], **draw, tasks=60, generator=g)
    support, labels, query, _ = test
    head = UNEMGaussian(10, scale=8.0)
    losses = fit(head, train, epochs=50, lr=0.3)
    assert losses[-1] < losses[0]
    learned = accuracy(head(support, labels, query), test)
    grid = []
    for lam, scale in itertools.product([0.0, 1.0, 4.0], [1.0, 5.0, 10.0]):
        lams = torch.full((10,), lam)
        *_, last = gaussian_layers(scale * support, labels, scale * query, lams, torch.ones(10))
        grid.append(accuracy(last.assignments, test))
    assert learned > max(grid) + 0.01
    assert learned > accuracy(prototypes(support, labels, query), test) + 0.05
    assert learned > accuracy(paddle(support, labels, query, iterations=20), test) + 0.05


def test_episodes_hold_what_they_promise():
    y = torch.arange(6).repeat_interleave(7)
    X = torch.arange(42).float()[:, None]
    found = episodes(X, y, ways=4, present=2, shots=2, queries=8, tasks=5, generator=torch.Generator().manual_seed(0))
    assert [tuple(v.shape) for v in found] == [(5, 8, 1), (5, 8), (5, 8, 1), (5, 8)]
    for i in range(5):
        names = {int(c): int(y[int(x)]) for x, c in zip(found.support[i], found.support_labels[i], strict=True)}
        assert len(set(names.values())) == 4
        assert len(set(found.query_labels[i].tolist())) <= 2
        assert all(int(y[int(x)]) == names[int(c)] for x, c in zip(found.query[i], found.query_labels[i], strict=True))
        assert not set(found.support[i].flatten().tolist()) & set(found.query[i].flatten().tolist())
