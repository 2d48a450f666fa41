"""Run folders become the table of the results and the README's example."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zoo.results.runs import Run, RunsError, tabulate


def run_folder(folder: Path, seed: int, accuracy: float, changes: str = "") -> Path:
    (folder / ".hydra").mkdir(parents=True)
    config = "{name: digits, model: {model_name: unireplknet_z}, data: {}, task: {}}"
    (folder / ".hydra" / "config.yaml").write_text(config)
    (folder / ".hydra" / "overrides.yaml").write_text(f"[experiment=digits, seed={seed}{changes}]")
    summary = {"metrics": {"test/acc": accuracy, "val/acc": 0.5}, "seconds": 60.0, "seed": seed}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "summary.txt").write_text(f"test/acc {accuracy}\n")
    return folder


def test_seeds_share_a_row_and_changes_have_their_own(tmp_path: Path) -> None:
    first = run_folder(tmp_path / "runs" / "a", 0, 0.96)
    second = run_folder(tmp_path / "runs" / "b", 1, 0.98)
    other = run_folder(tmp_path / "runs" / "c", 0, 0.9, ", optimizer.lr=0.1")
    (tmp_path / "runs" / "latest").symlink_to("c")  # `outputs/digits/*` names it too
    (table,) = tabulate([first, second, other, tmp_path / "runs" / "latest"], [tmp_path / "RESULTS.md"])
    rows = [line for line in table.splitlines() if line.startswith("| digits")]
    assert len(rows) == 2
    assert "test/acc 0.9700 (0.0141) | 2 | 60 | `python train.py -m experiment=digits seed=0,1`" in rows[0]
    assert "test/acc 0.9000 | 1 |" in rows[1]
    assert "`python train.py experiment=digits optimizer.lr=0.1 seed=0`" in rows[1]
    assert table in (tmp_path / "RESULTS.md").read_text()


def test_readme_takes_the_table_and_what_the_first_run_printed(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    sections = [f"<!-- begin {name} -->\nold\n<!-- end {name} -->" for name in ("summary", "runs")]
    readme.write_text("\n\n".join(["before", *sections, "after"]))
    runs = [run_folder(tmp_path / "a", 0, 0.96), run_folder(tmp_path / "b", 1, 0.98)]
    (table,) = tabulate(runs, [tmp_path / "RESULTS.md", readme])
    text = readme.read_text()
    assert "```text\ntest/acc 0.96\n```" in text
    assert table in text
    assert "old" not in text
    assert text.startswith("before")
    assert text.endswith("after")


def test_unfinished_and_repeated_runs_are_told(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunsError, match="empty is not the folder of a finished run"):
        list(tabulate([tmp_path / "empty"], [tmp_path / "RESULTS.md"]))
    runs = [run_folder(tmp_path / name, 0, 0.9) for name in ("a", "b")]
    with pytest.raises(RunsError, match="b is a second run of digits with seed 0"):
        list(tabulate(runs, [tmp_path / "RESULTS.md"]))
    assert not (tmp_path / "RESULTS.md").exists()


def test_a_command_for_others_has_no_path_of_this_machine() -> None:
    changes = {
        "data.root=/home/ann/my photos/": "data.root=",
        "model.checkpoint_path=../ann/a/model": "model.checkpoint_path=model",
        "model.model_name=local-dir:/home/ann/net": "local-dir:net",
        "callbacks.best.folder='~/ann/x'": "callbacks.best.folder=x",
        "data.columns=[bread,milk]": "data.columns=[bread,milk]",
        "data.name=sales.csv": "data.name=sales.csv",
        "+x={a: /home/ann/b, c: d/e}": "+x={a: b, c: d/e}",
        "data.path=C:\\Users\\ann\\data": "data.path=data",
    }
    run = Run("mine", "net", tuple(changes), 0, {}, 1.0, (), "digits")
    told = run.command([0], places=False)
    assert "ann" not in told
    assert "my photos" in told
    for kept in changes.values():
        assert kept in told, (kept, told)
    assert "/home/ann" in run.command([0]), "for oneself it is as it was"
