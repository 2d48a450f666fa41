"""Families put together: heads find what there is to find, adapters start as nothing, classes learnt in turn are not
forgotten.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import zoo
from zoo.benchmarks import cross_family
from zoo.benchmarks.models import inference


@pytest.mark.parametrize("head", cross_family.HEADS)
def test_heads_learn_a_problem_that_can_be_learnt(head: str) -> None:
    draw = torch.Generator().manual_seed(0)
    X = torch.randn(240, 12, generator=draw, dtype=torch.float64)
    y = (X[:, 0] > 0).long() + 2 * (X[:, 1] > 0).long()
    decide, told = cross_family.HEADS[head](X[:120], y[:120], X[120:160], y[120:160])
    assert float((decide(X[160:]) == y[160:]).double().mean()) > 0.6
    if head == "GRBF":
        assert told["top_share"] > 0.9  # ten of twelve


def test_classes_learnt_in_turn_are_not_forgotten() -> None:
    draw = torch.Generator().manual_seed(0)
    centers = 3 * torch.randn(10, 20, generator=draw, dtype=torch.float64)
    y = torch.arange(10).repeat(12)
    X = centers[y] + torch.randn(120, 20, generator=draw, dtype=torch.float64)
    parts = {"train": (X[:80], y[:80]), "test": (X[80:], y[80:])}
    found = cross_family.learn_in_turn(parts, seed=0, num_bases=200)
    assert found["accuracy"] == found["all_at_once"] > 0.8


def test_adapters_start_as_nothing_and_leave_the_rest_frozen() -> None:
    model = zoo.create_model("test_unireplknet", num_classes=3, in_chans=1).eval()
    images = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    before = model(images).detach()
    adapted = cross_family.adapt_maps(model, num_features=4)
    torch.testing.assert_close(adapted(images), before)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained
    assert all(".adapter." in name or name.startswith("head") for name in trained)
    score = cross_family.tune(adapted, (images, torch.tensor([0, 1])), (images, torch.tensor([0, 1])), 0.05, 12)
    assert score == 1.0
    assert not torch.allclose(adapted(images), before)


def test_half_precision_is_a_form_of_its_own(tmp_path: Path) -> None:
    options = {"models": ["test_unireplknet"], "batch": 1, "size": 32, "rounds": 1}
    lines = list(inference(tmp_path / "results", **options, precision=("float32", "bfloat16")))  # type: ignore[arg-type]
    forms = [line for line in lines if "bf16" in line]
    assert len(forms) == 6
    assert "--precision float32 bfloat16" in (tmp_path / "RESULTS.md").read_text()
