"""Run folders become the table of the results and the README's example."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from zoo.results.records import code, plain
from zoo.results.runs import Run, RunsError, read_run, tabulate


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


def change(folder: Path, **entries: Any) -> None:
    path = folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_a_run_without_a_name_is_called_by_its_choices(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", 0, 0.9)
    config = run / ".hydra" / "config.yaml"
    name = "${hydra:runtime.choices.model}-${hydra:runtime.choices.data}"
    config.write_text(config.read_text().replace("digits", f"'{name}'"))
    chosen = "hydra: {runtime: {choices: {model: unireplknet_z, data: mnist}}}"
    (run / ".hydra" / "hydra.yaml").write_text(chosen)
    assert read_run(run).name == "unireplknet_z-mnist"
    (table,) = tabulate([run], [])
    assert "| unireplknet_z-mnist |" in table
    config.write_text(config.read_text().replace(name, "${model.model_name}, ${oc.env:HOME}"))
    assert read_run(run).name == "unireplknet_z, ${oc.env:HOME}", "nothing else is looked up"


@pytest.mark.parametrize(
    ("metrics", "told"),
    [
        ({"test/acc": 1.5}, "summary.json: test/acc = 1.5, which is no accuracy"),
        ({"val/acc_agnostic": -0.1}, "val/acc_agnostic = -0.1, which is no accuracy"),
        ({"test/mse": -1.0}, "test/mse = -1, which is no error"),
        ({"test/acc": True}, "metrics.test/acc = True is a boolean; allowed: float"),
        ({"test/loss": 0.1, "test/acc": "x" * 900, "val/acc": 0.5}, f"summary.json: metrics.test/acc = '{'x' * 99}"),
        ([0.5] * 300, "summary.json: metrics = [0.5, 0.5,"),
    ],
)
def test_figures_that_cannot_be_are_told_shortly(metrics: Any, told: str, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", 0, 0.9)
    change(run, metrics=metrics)
    with pytest.raises(RunsError) as raised:
        list(tabulate([run], [tmp_path / "RESULTS.md"]))
    assert told in str(raised.value)
    assert len(str(raised.value)) - 2 * len(str(run)) < 300
    assert not (tmp_path / "RESULTS.md").exists()


def test_figures_are_of_the_weights_that_are_there(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", 0, 0.9)
    change(run, model_sha256="a" * 64)
    assert read_run(run).metrics["test/acc"] == 0.9, "without its model"
    (run / "model").mkdir()
    for digest in ("a" * 64, "b" * 64):
        (run / "model" / "config.json").write_text(json.dumps({"sha256": {"model.safetensors": digest}}))
        if digest[0] == "a":
            assert read_run(run)
    with pytest.raises(RunsError, match=r"of other weights than those in model/ \(sha256 aaaaaaaaaaaa\.\.\., and bbbb"):
        read_run(run)
    (run / "model" / "config.json").write_text("{}")
    (run / "model" / "model.safetensors").write_bytes(b"w")
    with pytest.raises(RunsError, match=r"`python train.py resume=.*` writes the summary again"):
        read_run(run)
    change(run, model_sha256=None)
    assert read_run(run), "of an earlier release"


def test_a_chain_of_commands_can_be_copied_from_a_table(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", 0, 0.9, ", '+x=a|`b`<script>'")
    change(run, stages=[{"epoch": 1, "step": 2, "overrides": ["trainer.max_epochs=2"]}])
    (table,) = tabulate([run], [])
    assert " && python train.py resume=RUN trainer.max_epochs=2  # resumed at epoch 1 (step 2) `` |" in table
    assert "| `` python train.py experiment=digits '+x=a\\|`b`&lt;script>' seed=0 && " in table


def test_control_characters_are_written_out() -> None:
    assert plain({"a\x1b[31m": ["b\x07"]}) == {"a\\u001b[31m": ["b\\u0007"]}
    assert code("a\x1bb") == "`a\\u001bb`"


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
