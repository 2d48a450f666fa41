"""What the measurements of KCL compare is the same computation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from tests.conftest import ROOT
from zoo.benchmarks import gkcl
from zoo.benchmarks.gkcl import PlainKCL, zoo_evaluation
from zoo.models.continual import KCL

KERNELS = ["linear", "poly", "laplacian", "gaussian", "rff"]


@pytest.fixture
def learned(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a KCL without dropout, in double precision: the plain form's inverse loses most digits of a float."""
    monkeypatch.setattr(gkcl, "_DROP", {"drop_rate": 0.0})
    return lambda kernel, tasks: gkcl._learned(kernel, tasks).double()


@pytest.mark.parametrize("kernel", KERNELS)
def test_plain_step_does_what_ours_does(learned: Any, kernel: str) -> None:
    model, plain = learned(kernel, 1).train(), PlainKCL(learned(kernel, 1).train())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.8)
    for number in range(3):
        x, y = torch.rand(10, 1, 28, 28, dtype=torch.float64), torch.arange(10)
        torch.manual_seed(number)  # of the draw of random features
        plain.step(x, y, 0)
        torch.manual_seed(number)
        sum(model.losses(x, y, 0).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    before = dict(learned(kernel, 1).named_parameters())
    moved = 0.0
    for (name, ours), theirs in zip(model.named_parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)
        moved = max(moved, float((theirs - before[name]).detach().abs().max()))
    assert moved > 1e-4


@pytest.mark.parametrize("kernel", KERNELS)
def test_plain_answers_are_ours(learned: Any, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: KCL = learned(kernel, 3).eval()
    plain = PlainKCL(model)
    if kernel == "rff":
        monkeypatch.setattr(torch, "randn", lambda *shape, dtype: model.random_features.eps)
    x = torch.rand(50, 1, 28, 28, dtype=torch.float64)
    with torch.no_grad():
        zq = plain.features(x)
        every = torch.stack([plain.logits(zq, t) for t in range(3)])
        told, untold = model.predict_aware_and_agnostic(x, 1)
        torch.testing.assert_close(told, every[1], rtol=0, atol=1e-7)
        torch.testing.assert_close(untold, every.amax(0), rtol=0, atol=1e-7)


def test_what_is_timed_runs(learned: Any) -> None:
    model, tests = learned("linear", 2).eval(), [torch.rand(30, 1, 28, 28, dtype=torch.float64)] * 2
    for agnostic in (False, True):
        PlainKCL(model).evaluate(tests, agnostic)
        zoo_evaluation(model, tests, agnostic)()


def test_wide_settings_are_those_of_the_configuration() -> None:
    shipped = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "model" / "gkcl_gaussian_4000.yaml"))
    assert isinstance(shipped, dict)
    del shipped["defaults"]
    assert shipped == gkcl.WIDE["GKCL Gaussian, 4,000 features"].options
