"""`zoo.train` and `zoo.load_run`: the command line's run, from Python."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch

import zoo
from zoo.results.runs import RunsError
from zoo.training.launch import UsageError

SMALL = {
    "experiment": "grbf_wine",
    "trainer.max_epochs": 1,
    "logger": "none",
    "callbacks.progress": None,
}


def test_a_run_from_python_is_that_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    argv, threads, root = sys.argv, torch.get_num_threads(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    folder = tmp_path / "a run, mine"
    run = zoo.train({**SMALL, "hydra.run.dir": folder})
    assert (sys.argv, torch.get_num_threads(), root.handlers, root.level) == (argv, threads, handlers, level)
    assert run.output_dir == folder
    assert "kernel-zoo-train 'resume=" in (folder / "summary.txt").read_text(), "there is no train.py in this folder"
    assert 0 <= run.metrics["test/acc"] <= 1
    again = zoo.load_run(folder)
    assert again.metrics == run.metrics
    assert (again.model_dir, again.checkpoint) == (run.model_dir, run.checkpoint)
    assert not again.load_model().training
    (answer,) = zoo.predict(folder, [[13.0] * 13])
    assert len(answer["predictions"]) == 3
    with pytest.raises(UsageError, match=r"trainer\.max_epoch is not a key"):
        zoo.train(["experiment=grbf_wine", "trainer.max_epoch=1"])
    with pytest.raises(UsageError, match="-m is a flag"):
        zoo.train("-m seed=1,2")
    assert (sys.argv, root.handlers) == (argv, handlers)
    with pytest.raises(RunsError, match="is not the folder of a finished run"):
        zoo.load_run(tmp_path)
