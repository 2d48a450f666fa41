"""MuonH: norms, groups, states, what it refuses, and that a rate found for one width serves another."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import zoo
from tests.conftest import train_here
from zoo.optim import create_optimizer
from zoo.optim.muonh import MuonH, muonh_groups, newton_schulz, transferred_lr


class Mixed(nn.Module):
    """A little of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.conv = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Linear(8, 8)
        self.centers = nn.Parameter(torch.randn(5, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.depthwise(self.conv(x))).mean((2, 3)) + self.embed.weight[0]
        return self.head(torch.relu(self.inner(x)) @ self.centers.mT @ self.centers)


def names(groups: list[dict]) -> dict[str, set[str]]:
    return {group["method"]: set(group["param_names"]) for group in groups}


def test_groups_are_a_partition() -> None:
    torch.manual_seed(0)
    model = Mixed()
    model.norm.bias.requires_grad_(False)
    plain, sphere = names(muonh_groups(model)), names(muonh_groups(model, head="sphere"))
    assert plain["muon"] == {"conv.weight", "inner.weight"}
    assert sphere["adam_sphere"] == {"head.weight"}
    assert names(muonh_groups(model, depthwise=True))["muon"] == plain["muon"] | {"depthwise.weight"}
    for found in (plain, sphere):
        everything = [name for group in found.values() for name in group]
        assert sorted(everything) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    assert [group.get("lr") for group in muonh_groups(model, adam_lr=1e-3)] == [None, 1e-3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_norms_stay_and_nothing_else_is_disturbed(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Mixed().to(dtype)
    optimizer = MuonH(muonh_groups(model, head="sphere"), lr=0.05, adam_lr=1e-3)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 1e-3, 1e-3]
    spheres = [p for group in optimizer.param_groups[:2] for p in group["params"]]
    before = [p.detach().double().norm() for p in spheres]
    x, y = torch.randn(16, 3, 6, 6, dtype=dtype), torch.randint(4, (16,))
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    drift = max(abs(float(p.detach().double().norm() / n) - 1) for p, n in zip(spheres, before, strict=True))
    assert drift < {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 2e-2}[dtype]
    assert losses[-1] < losses[0] / 2
    assert all(p.isfinite().all() for p in model.parameters())


def test_singular_values() -> None:
    generator = torch.Generator().manual_seed(0)
    tall = torch.linalg.svdvals(newton_schulz(torch.randn(256, 64, generator=generator)))
    assert tall.min() > 0.97
    assert tall.max() < 1.04
    square = torch.linalg.svdvals(newton_schulz(torch.randn(64, 64, generator=generator)))
    assert square.min() > 0.01
    assert square.max() < 1.15
    assert not newton_schulz(torch.zeros(3, 5)).any()
    many = torch.randn(3, 8, 5, generator=generator)
    torch.testing.assert_close(newton_schulz(many)[1], newton_schulz(many[1]))


def test_a_zero_gradient_moves_nothing() -> None:
    W = nn.Parameter(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))
    before = W.detach().clone()
    optimizer = MuonH([W])
    W.grad = torch.zeros_like(W)
    optimizer.step()
    torch.testing.assert_close(W.detach(), before)


def test_a_resumed_run_is_the_same() -> None:
    torch.manual_seed(0)
    model = Mixed().double()
    optimizer = MuonH(muonh_groups(model, head="sphere"))
    inputs = torch.randn(4, 8, 3, 5, 5, dtype=torch.float64)

    def run(model: nn.Module, optimizer: MuonH, batches: Tensor) -> None:
        for x in batches:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    run(model, optimizer, inputs[:2])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(model)
    other = MuonH(muonh_groups(twin, head="sphere"))
    other.load_state_dict(torch.load(file, weights_only=True))
    run(model, optimizer, inputs[2:])
    run(twin, other, inputs[2:])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="is zero"):
        MuonH([nn.Parameter(torch.zeros(3, 3))])
    with pytest.raises(ValueError, match="not a matrix"):
        MuonH([nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="method='sgd'"):
        MuonH([{"params": [nn.Parameter(torch.ones(3, 3))], "method": "sgd"}])
    with pytest.raises(ValueError, match="lr=-1"):
        MuonH([nn.Parameter(torch.ones(3, 3))], lr=-1)
    with pytest.raises(ValueError, match="BatchNorm1d has no matrix"):
        muonh_groups(nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="head='round'"):
        muonh_groups(Mixed(), head="round")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="positive"):
        transferred_lr(0.1, depth=0)


def test_by_name_decay_and_rate_of_a_group_stay() -> None:
    model = zoo.create_model("test_unireplknet")
    optimizer = create_optimizer(model, "muonh", lr=0.1, weight_decay=0.2, layer_decay=0.5, kwargs={"adam_lr": 0.01})
    assert isinstance(optimizer, MuonH)
    groups = optimizer.param_groups
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in model.parameters()}
    assert {group["method"]: group["lr"] for group in groups} == {"muon": 0.1, "adam": 0.01}
    assert all(p.ndim >= 2 for group in groups if group["method"] == "muon" for p in group["params"])
    assert all(group["weight_decay"] == 0 for group in groups for p in group["params"] if p.ndim < 2)
    assert {group["weight_decay"] for group in groups} == {0.0, 0.2}
    assert len({group["lr_scale"] for group in groups if group["method"] == "muon"}) > 2
    with pytest.raises(ValueError, match="Linear has no matrix for Muon"):
        create_optimizer(nn.Linear(2, 2), "muonh")


def test_it_trains_an_epoch(tmp_path: Path) -> None:
    options = ("optimizer=muonh", "trainer.max_epochs=1", "trainer.limit_train_batches=8", "hydra.run.dir=run")
    quick = ("logger=csv", "callbacks=classes", "callbacks.progress=null", "test=false", "scheduler=constant")
    train_here(tmp_path, "experiment=digits", "model=test_unireplknet", *options, *quick)
    assert list((tmp_path / "run" / "checkpoints").glob("*.ckpt"))
