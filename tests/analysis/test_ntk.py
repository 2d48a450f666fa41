"""Probes of the neural tangent kernel."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from zoo.analysis.probes import ProbeError, Subject, look
from zoo.analysis.probes.ntk import (
    alignment,
    describe,
    effective_rank,
    kernel_distance,
    projected_ntk_by,
    top_eigenpairs,
)
from zoo.cli import main
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


def test_numbers_of_a_network() -> None:
    model, X = net(), torch.randn(10, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = describe(model, X, torch.arange(10) % 3, group=lambda name: name.split(".")[0])
    K = empirical_ntk(model, X)
    assert found["trace"] == pytest.approx(float(K.trace()) / 10)
    assert found["share/0"] + found["share/2"] == pytest.approx(1)
    assert found["condition"] == pytest.approx(float(torch.linalg.cond(K)), rel=1e-6)
    assert 1 <= found["effective_rank"] <= 10
    assert abs(found["alignment"]) <= 1
    assert describe(model, torch.cat([X, X]))["condition"] == math.inf


def test_one_output_at_a_time() -> None:
    model, X = net(), torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    full = empirical_ntk(model, X, outputs="full")
    size = 2 * 8 * sum(p.numel() for p in model.parameters())  # of one output's gradients: three do not fit
    exact = projected_ntk_by(model, X, group=lambda _: "", outputs=3, memory=2 * size)[""]
    torch.testing.assert_close(exact, full.diagonal(dim1=2, dim2=3).mean(-1), rtol=1e-12, atol=1e-12)
    some = projected_ntk_by(model, X, group=lambda _: "", outputs=2, memory=2 * size)[""]
    signs = torch.randint(0, 2, (2, 3), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    wanted = torch.einsum("kc,ijcd,kd->ij", signs, full, signs) / 6
    torch.testing.assert_close(some, wanted, rtol=1e-12, atol=1e-12)


def test_probe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "ntk.png"
    assert main(["probe", "ntk", "test_unireplknet", "count=3", "outputs=2", "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert out.is_file()
    assert len(found["eigenvalues"]) == 3
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert sum(found["eigenvalues"]) == pytest.approx(3 * found["trace"], rel=1e-4)
    assert 1 <= found["effective_rank"] <= 3 + 1e-6
    assert "head" in found["shares"]
    table = look("ntk", Subject("test_grbf"), count=4).values
    assert len(table["eigenvalues"]) == 4
    for options, told in (({"count": 1}, "two inputs at least"), ({"memory": 1e-9}, "bytes is too small")):
        with pytest.raises(ProbeError, match=told):
            look("ntk", Subject("test_dkm"), **options)
