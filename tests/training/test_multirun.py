"""Several runs of one command: names that tell them apart, and a table at the end, whatever became of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.conftest import train_here
from tests.training import offline_wandb
from zoo.training import multirun

QUICK = (
    *("experiment=digits", "model=test_unireplknet", "trainer.max_epochs=1", "trainer.limit_train_batches=2"),
    *("trainer.limit_val_batches=1", "callbacks.progress=null", "test=false", "hydra.sweep.dir=sweep"),
)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("swept")
    done = train_here(folder, "-m", *QUICK, "seed=0,1", "data.batch_size=50,99999", check=False)
    assert done.returncode == 1, "the command has failed, as two of its runs have"
    return folder, done.stdout


def test_a_table_ends_a_multirun_also_where_runs_failed(swept: tuple[Path, str]) -> None:
    folder, told = swept
    with (folder / "sweep" / multirun.NAME).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["data.batch_size"], row["seed"]) for row in rows] == [
        ("0", "50", "0"), ("1", "99999", "0"), ("2", "50", "1"), ("3", "99999", "1"),
    ]  # fmt: skip
    assert [row["status"].partition(":")[0] for row in rows] == ["finished", "failed", "finished", "failed"]
    assert "smaller data.batch_size" in rows[1]["status"]
    for row in rows[::2]:
        found = json.loads((Path(row["folder"]) / "summary.json").read_text())["metrics"]
        assert float(row["val/acc"]) == found["val/acc"]
        assert row["partial"] == "train 100 of 1295 an epoch"
    table = told[told.index("runs of sweep/multirun.csv") :]
    assert table.count("finished") == 2
    assert "mean (standard deviation) over seeds" in table
    assert not list((folder / "sweep").glob(".runs*"))


def test_runs_of_a_multirun_have_names_of_their_own_and_one_group(swept: tuple[Path, str]) -> None:
    found = {}
    for job in ("0", "2"):
        (file,) = offline_wandb.run_files(swept[0] / "sweep" / job)
        found[job] = offline_wandb.run(file)
        config = offline_wandb.config(file)
        assert config["experiment"] == "digits"
        assert config["callbacks"]["best"]["monitor"] == "val/acc"
        assert "model=test_unireplknet" in config["overrides"]
    assert {job: run.display_name for job, run in found.items()} == {
        "0": "digits seed=0 data.batch_size=50", "2": "digits seed=1 data.batch_size=50",
    }  # fmt: skip
    assert len({run.run_id for run in found.values()}) == 2
    (group,) = {run.run_group for run in found.values()}
    assert group.endswith("-sweep")
    notes = json.loads((swept[0] / "sweep" / "2" / "run.json").read_text())
    assert (notes["label"], notes["group"]) == ("seed=1 data.batch_size=50", group), "a resumed run keeps both"


def test_a_run_that_was_killed_is_in_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 0):
        (tmp_path / str(number)).mkdir()
        multirun.note_run(str(tmp_path), number, folder=str(tmp_path / str(number)), overrides=[f"+a={number}", "b=1"])
    with (tmp_path / ".runs.jsonl").open("a") as file:
        file.write('{"run": 2, "fol')
    multirun.conclude(tmp_path, ["a"])
    assert capsys.readouterr().out.count("not finished") == 2
    assert [row[:2] for row in csv.reader((tmp_path / multirun.NAME).open())] == [["run", "a"], ["0", "0"], ["1", "1"]]
    multirun.conclude(tmp_path / "nothing", ["a"])
    assert capsys.readouterr().out == ""


def test_an_extra_that_is_missing_is_named(tmp_path: Path) -> None:
    try:
        import hydra_plugins.hydra_optuna_sweeper
    except ImportError:
        told = train_here(tmp_path, "-m", "experiment=digits", "sweep=optuna", check=False).stderr
        assert "hydra/sweeper=optuna needs the extra optuna: pip install 'kernel-zoo[optuna]'" in told
    try:
        import hydra_plugins.hydra_submitit_launcher  # noqa: F401
    except ImportError:
        told = train_here(tmp_path, "-m", "seed=0,1", "hydra/launcher=submitit_slurm", check=False).stderr
        assert "needs the extra slurm: pip install 'kernel-zoo[slurm]'" in told
