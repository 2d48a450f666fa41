"""Probes of the neural tangent kernel."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from zoo.analysis.ntk import alignment, effective_rank, kernel_distance, probe, top_eigenpairs
from zoo.kernels.empirical_ntk import empirical_ntk


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def test_top_eigenpairs_are_those_of_the_matrix() -> None:
    model, X = net().train(), torch.randn(12, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    full = empirical_ntk(model, X, outputs="full").permute(0, 2, 1, 3).reshape(36, 36)
    values, vectors = top_eigenpairs(model, X, 4, batch_size=5, tolerance=1e-10)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(full).flip(0)[:4], rtol=1e-8, atol=0)
    torch.testing.assert_close(full @ vectors.flatten(1).mT, vectors.flatten(1).mT * values, rtol=1e-6, atol=1e-7)
    assert model.training
    with pytest.raises(ValueError, match="ask for 1 to 35"):
        top_eigenpairs(model, X, 36)


def test_numbers_of_a_matrix() -> None:
    Y = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert alignment(Y @ Y.mT + 3, Y - 5) == pytest.approx(1)
    assert alignment(torch.eye(20), Y[:, 0]) == pytest.approx(1 / math.sqrt(19))
    assert alignment(torch.ones(20, 20), Y) == 0
    assert effective_rank(torch.eye(7)) == pytest.approx(7)
    assert effective_rank(torch.ones(7, 7)) == pytest.approx(1)
    assert kernel_distance(torch.eye(3), 4 * torch.eye(3)) == pytest.approx(0, abs=1e-12)
    assert kernel_distance(torch.eye(3), torch.ones(3, 3)) == pytest.approx(1 - 1 / math.sqrt(3))
    for call in (lambda: effective_rank(torch.zeros(2, 2)), lambda: kernel_distance(torch.eye(2), torch.eye(3))):
        with pytest.raises(ValueError, match=r"zero|cannot be compared"):
            call()
    with pytest.raises(ValueError, match="is square"):
        alignment(torch.ones(2, 3), torch.ones(2))


def test_probe() -> None:
    model, X = net(), torch.randn(10, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = probe(model, X, torch.arange(10) % 3, group=lambda name: name.split(".")[0])
    K = empirical_ntk(model, X)
    assert found["trace"] == pytest.approx(float(K.trace()) / 10)
    assert found["share/0"] + found["share/2"] == pytest.approx(1)
    assert found["condition"] == pytest.approx(float(torch.linalg.cond(K)), rel=1e-6)
    assert 1 <= found["effective_rank"] <= 10
    assert abs(found["alignment"]) <= 1
    assert probe(model, torch.cat([X, X]))["condition"] == math.inf
