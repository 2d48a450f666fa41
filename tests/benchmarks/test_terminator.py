"""The measurements of Terminator run, go on where they stopped, and write their tables."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from zoo.benchmarks import terminator, terminator_speed
from zoo.benchmarks.terminator import DiagonalStateSpace, built, options, parameters, pixels
from zoo.benchmarks.tuning import bracketed


@pytest.fixture
def little_data(monkeypatch: pytest.MonkeyPatch) -> None:
    part = torch.randn(70, 1, 14, 14), torch.arange(70) % 10
    monkeypatch.setattr(terminator, "load", lambda *args: (part, part))
    monkeypatch.setattr(terminator, "HELD_OUT", 6)
    monkeypatch.setattr(terminator, "TRIAL_STEPS", 1)
    monkeypatch.setattr(terminator, "bracketed", lambda score, rates: max(rates[:2], key=score))


@pytest.mark.parametrize(
    ("task", "rivals"), [("images", ["ResNet", "ConvNeXt"]), ("pixel by pixel", ["S4D"]), ("permuted", ["S4D"])]
)
def test_rivals_have_as_many_parameters(task: str, rivals: list[str]) -> None:
    own = parameters(built(task, "Terminator"))
    for rival in rivals:
        assert abs(parameters(built(task, rival)) / own - 1) < 0.1


def test_state_space_kernel_is_that_of_the_recurrence() -> None:
    torch.manual_seed(0)
    layer = DiagonalStateSpace(2, states=3).double()
    a = torch.complex(-layer.log_decay.exp(), layer.frequency)
    step = (a * layer.log_dt.exp()[:, None]).exp()
    state = (step - 1) / a
    c = torch.view_as_complex(layer.c)
    for t in range(5):
        torch.testing.assert_close(layer.kernel(5)[:, t], 2 * (c * state).sum(-1).real)
        state = state * step


def test_pixels_go_on_where_they_stopped(tmp_path: Path, little_data: None) -> None:
    first = list(pixels(tmp_path / "results", ("MNIST",), steps=1, seeds=(0,)))
    assert len(first) == 3 * 1 + 2 * 4 + 1
    assert list(pixels(tmp_path / "results", ("MNIST",), steps=1, seeds=(0,))) == first[-1:]
    assert "| MNIST | permuted | S4D |" in (tmp_path / "RESULTS.md").read_text()


def test_rate_is_the_best_of_the_trials(tmp_path: Path, little_data: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminator, "bracketed", bracketed)
    rates, part = terminator.Rates(tmp_path), terminator.load("MNIST", None)[0]
    scores = iter((0.1, 0.2, 0.7, 0.3))
    monkeypatch.setattr(terminator, "accuracy", lambda *args: next(scores))
    assert rates(part, "MNIST", "images", "ResNet") == 3e-2
    assert [float(r["rate"]) for r in rates.records.select()] == list(terminator.RATES)
    assert rates(part, "MNIST", "images", "ResNet") == 3e-2  # what was tried is not tried again


def test_states_of_s4d_are_trained_as_its_authors_do(little_data: None) -> None:
    model = built("pixel by pixel", "S4D")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    terminator.train(model, terminator.load("MNIST", None)[0], 0, steps=1, rate=1.0)
    moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in model.named_parameters()}
    of_states = {n: m for n, m in moved.items() if n.endswith(("log_dt", "log_decay", "frequency"))}
    assert len(of_states) == 12
    assert max(of_states.values()) <= 1.01 * terminator.STATE_RATE
    assert max(m for n, m in moved.items() if n not in of_states) > terminator.STATE_RATE


def test_options_are_tabulated(tmp_path: Path, little_data: None) -> None:
    lines = list(options(tmp_path / "results", ("MNIST",), steps=1, seeds=(0,)))
    assert len(lines) == len(terminator.OPTIONS) + 1
    assert "running statistics and context, matched frequencies" in (tmp_path / "RESULTS.md").read_text()


def test_missing_data_is_told(tmp_path: Path) -> None:
    with pytest.raises(terminator.BenchmarkError, match="no data set"):
        list(pixels(tmp_path, ("EMNIST",)))


@pytest.mark.slow
def test_speed_forms_agree_in_their_gradients() -> None:
    terminator_speed._check_gradients()
