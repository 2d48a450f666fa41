"""What fast forms and loops are worth is measured form by form, and told of every family."""

from __future__ import annotations

import contextlib
import csv
import os
from pathlib import Path

import pytest
import torch

from zoo.benchmarks import native, waiting
from zoo.cli import main
from zoo.ops import OPERATORS, channel_norm, reference, without_loops
from zoo.ops import native as loops


def test_every_form_is_timed_told_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[tuple[bool, bool]] = []

    def make() -> native.Call:
        def call() -> None:
            norm, library = OPERATORS["channel_norm"]._find_fast([torch.ones(1)]), loops.library()
            answers.append((norm is not None, library is not None))

        return call

    parts = native.Work(make, ("channel_norm + feed_forward",))
    monkeypatch.setattr(native, "WORK", {("a", "step"): parts, ("b", "step"): native.Work(make, plain=make, many=10)})
    list(native.gain(tmp_path / "results", rounds=2, wait=()))
    there = loops.library() is not None
    assert answers[:4] == [(False, there), (True, False), (True, there), (False, there)]
    assert len(answers) == 3 * (4 + 3)
    with (tmp_path / "results" / "native_gain.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["form"] for row in rows] == [*native.FORMS, "channel_norm + feed_forward", *native.FORMS]
    assert all(row["n"] == "2" and row["date"] and row["threads"] for row in rows)
    before = (tmp_path / "RESULTS.md").read_text()
    assert "| a | step | channel_norm + feed_forward |" in before
    assert main(["benchmark", "native", "gain", "--table", "--out", str(tmp_path / "results")]) == 0
    assert len(answers) == 3 * (4 + 3)
    assert (tmp_path / "RESULTS.md").read_text().count("begin native gain") == 1


def test_a_step_is_timed_alone_and_beside_busy_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    busy: list[int] = []

    def beside(count: int) -> contextlib.AbstractContextManager[None]:
        busy.append(count)
        return contextlib.nullcontext()

    monkeypatch.setattr(waiting, "_beside", beside)
    monkeypatch.setattr(waiting.terminator_speed, "training_step", lambda form, batch: lambda: None)
    list(waiting.waiting(tmp_path / "results", rounds=2, turns=2, wait=()))
    assert busy == [0, os.cpu_count()] * 2
    assert main(["benchmark", "native", "waiting", "--table", "--out", str(tmp_path / "results")]) == 0
    assert len(busy) == 4
    assert (tmp_path / "RESULTS.md").read_text().count("begin native waiting") == 1


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="not Linux")
def test_busy_processes_end_with_what_they_stand_beside() -> None:
    def children() -> set[int]:
        return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}

    before = children()
    with waiting._beside(2):
        assert len(children() - before) == 2
    assert children() <= before


def test_every_operator_with_loops_is_among_the_parts() -> None:
    """Whatever has loops must show what they are worth; the others are written with torch."""
    parts = {name for work in native.WORK.values() for form in work.operators for name in form.split(" + ")}
    torch_only = {"pointwise_conv", "pointwise_twice", "response_norm_and_energy"}
    fast = {n for n, op in OPERATORS.items() if "cpu" in op.fast and op.reference.__module__.startswith("zoo.")}
    assert parts == fast - torch_only


def test_an_operator_that_is_not_there_is_refused() -> None:
    with pytest.raises(KeyError), reference("channel_morn"):
        pass


def test_without_loops_numbers_are_the_same() -> None:
    x, w = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0)), torch.ones(5)
    usual = channel_norm(x, w, w)
    with without_loops(), without_loops():
        torch.testing.assert_close(channel_norm(x, w, w), usual)
        assert loops.library() is None
    with reference("feed_forward"):
        assert torch.equal(channel_norm(x, w, w), usual)
