"""What is on record of a run: the samples it used, the commands that made it, its time; and what resuming changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from tests.conftest import train_here
from zoo.data import DataError, Digits
from zoo.data.task_streams import _second
from zoo.results.runs import RunsError, read_run, tabulate, weights_of
from zoo.support.inputs import preparation
from zoo.support.signatures import ConfigError
from zoo.tools.cards import card
from zoo.tools.evaluation import record_of
from zoo.tools.release import ship
from zoo.training import launch
from zoo.training.build import build_task
from zoo.training.counts import counts
from zoo.training.launch import _recorded_overrides
from zoo.training.result import load_run
from zoo.training.resuming import Changes, Resumed, resumed, stages

pytestmark = pytest.mark.xdist_group("records")  # they share a run

SHORT = ("experiment=digits", "model=test_unireplknet", "logger=none", "callbacks.progress=null")
PARTLY = ("trainer.limit_train_batches=2", "trainer.limit_test_batches=1", "data.eval_batch_size=50")


@pytest.fixture(scope="module")
def partly(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of a run of one epoch that uses a share of its data."""
    folder = tmp_path_factory.mktemp("partly")
    done = train_here(folder, *SHORT, *PARTLY, "trainer.max_epochs=1", "hydra.run.dir=run")
    return folder / "run", done.stdout


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def all_files(folder: Path) -> dict[str, Any]:
    """The records and the model of a run."""
    kept = [folder / "summary.json", folder / "run.json", *sorted((folder / "model").iterdir())]
    return {path.name: json.loads(path.read_bytes()) if path.suffix == ".json" else path.read_bytes() for path in kept}


# ---- samples that were used ----------------------------------------------------------------------------------


def test_a_share_of_a_part_is_on_record_everywhere(partly: tuple[Path, str]) -> None:
    folder, told = partly
    summary = summary_of(folder)
    assert summary["data"] == {"train": 100, "val": 143, "test": 50}
    assert summary["whole"] == {"train": 1295, "test": 359}
    assert "epoch 0, 50 of 359 rows" in told
    record = record_of(folder)
    assert record["metric"]["caveat"] == "on 50 of 359 rows"
    page = card(record)
    assert ", on 50 of 359 rows" in page
    assert "100 of 1295 an epoch train, 143 val, 50 of 359 test" in page
    (table,) = tabulate([folder], [])
    assert ", on 50 of 359 rows" in table
    with pytest.raises(ValueError, match=r"of a model on 50 of 359 rows: that is no figure to ship"):
        ship([folder])


def test_a_share_is_not_compared_with_the_whole_part(partly: tuple[Path, str], capsys: Any) -> None:
    from zoo.cli import main

    assert main(["validate", str(partly[0])]) == 1
    told = capsys.readouterr().out
    assert "not compared: the record is of 50 of 359 rows, this of 359" in told
    assert "reproduced" not in told


@pytest.mark.parametrize(
    ("limits", "taken", "used", "whole"),
    [
        ({}, 99, {"train": 1295, "val": 143, "test": 359}, {}),
        ({}, 0, {"train": 0, "val": 143, "test": 359}, {"train": 1295}),
        ({}, 3, {"train": 300, "val": 143, "test": 359}, {"train": 1295}),
        ({"limit_val_batches": 0}, 99, {"train": 1295, "val": 0, "test": 359}, {"val": 143}),
        ({"limit_test_batches": 0.5}, 99, {"train": 1295, "val": 143, "test": 256}, {"test": 359}),
        ({"limit_test_batches": 7}, 99, {"train": 1295, "val": 143, "test": 359}, {}),
        ({"overfit_batches": 1}, 5, {"train": 100, "val": 143, "test": 359}, {"train": 1295}),
        ({"fast_dev_run": 1}, 1, {"train": 100, "val": 143, "test": 256}, {"train": 1295, "test": 359}),
    ],
)
def test_samples_are_counted_as_the_trainer_limits_them(
    limits: dict[str, Any], taken: int, used: dict[str, int], whole: dict[str, int]
) -> None:
    data = Digits(batch_size=100, eval_batch_size=256)
    data.prepare_data()
    data.setup()
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    engine = L.Trainer(accelerator="cpu", max_epochs=1, **quiet, **limits)
    named = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "world_size")
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=taken - 1))
    asked: Any = SimpleNamespace(**{name: getattr(engine, name) for name in named}, fit_loop=loop, datamodule=data)
    assert counts(asked) == (used, whole)


def test_an_untrained_run_says_so_and_offers_no_state(tmp_path: Path) -> None:
    done = train_here(tmp_path, *SHORT, "trainer.max_epochs=0", "hydra.run.dir=digits/run")
    train_here(tmp_path, *SHORT, "data.batch_size=99999", "hydra.run.dir=digits/without_a_start", check=False)
    assert (tmp_path / "digits" / "latest").resolve().name == "run", "the other one could not start"
    summary = summary_of(tmp_path / "digits" / "run")
    assert summary["untrained"] is True
    assert summary["epochs"] == {}
    assert summary["data"]["train"] == 0
    assert "untrained" in done.stdout
    assert "epoch 0" not in done.stdout
    assert "train on" not in done.stdout
    (table,) = tabulate([tmp_path / "digits" / "run"], [])
    assert ", untrained" in table


def test_a_run_without_states_and_validation_offers_no_resume_and_warns_once(tmp_path: Path) -> None:
    more = ("callbacks=none", "data.val_fraction=0", "trainer.max_epochs=1", "trainer.limit_train_batches=1")
    done = train_here(tmp_path, *SHORT[:3], *more, "hydra.run.dir=run", "test=false")
    assert "train on" not in done.stdout
    more = ("data.val_fraction=0", "trainer.max_epochs=1", "trainer.limit_train_batches=1", "test=false")
    done = train_here(tmp_path, *SHORT, *more, "hydra.run.dir=other")
    assert "train on" in done.stdout
    assert done.stderr.count("note: there is no validation, Digits has no validation part: the last state counts") == 1
    assert "warning" not in done.stderr.lower()


# ---- resuming ------------------------------------------------------------------------------------------------


def test_resuming_a_run_that_is_over_changes_nothing_or_is_refused(partly: tuple[Path, str]) -> None:
    folder, _ = partly
    before = all_files(folder)
    for typed in (
        ["data=mnist5k"],
        ["data.val_fraction=0.3", "trainer.max_epochs=1"],
        ["callbacks.best=null"],
        ["test=false"],
    ):
        done = train_here(folder.parent, "resume=run", *typed, check=False)
        assert done.returncode == 1
        assert "nothing is left to train, with trainer.max_epochs = 1 the run is over, so " in done.stderr, done.stderr
        assert all_files(folder) == before
    done = train_here(folder.parent, "resume=run", "seed=5", check=False)
    assert "a resumed run goes on with its own seed, 0" in done.stderr
    done = train_here(folder.parent, "resume=run")
    assert all_files(folder) == before, "not even its time"
    assert "epoch 0, 50 of 359 rows" in done.stdout


def test_the_command_on_record_names_what_was_resumed(partly: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(partly[0], tmp_path / "run")
    seconds = summary_of(tmp_path / "run")["seconds"]
    typed = ("trainer.max_epochs=2", "optimizer.lr=0.0007", "data.num_workers=0")
    train_here(tmp_path, "resume=run", *typed)
    summary = summary_of(tmp_path / "run")
    assert summary["stages"] == [{"epoch": 1, "step": 2, "overrides": ["trainer.max_epochs=2", "optimizer.lr=0.0007"]}]
    assert summary["data"]["train"] == 100
    assert summary["seconds"] > seconds
    line = read_run(tmp_path / "run").command([0])
    assert line.endswith(
        " seed=0 && python train.py resume=RUN trainer.max_epochs=2 optimizer.lr=0.0007  # resumed at epoch 1 (step 2)"
    )
    assert record_of(tmp_path / "run")["command"] == line
    assert read_run(partly[0]).kind != read_run(tmp_path / "run").kind, "they are not two seeds of one experiment"
    done = train_here(tmp_path, "resume=run")  # with its last values it is over
    assert summary_of(tmp_path / "run") == summary
    told = f"going on with trainer.max_epochs=2, optimizer.lr=0.0007, with which {tmp_path / 'run'} was last resumed"
    assert told in done.stderr
    assert "from here on" not in done.stderr


def test_a_run_killed_in_its_second_stage_goes_on_in_it_and_credits_no_other_weights(
    partly: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = tmp_path / "run"
    shutil.copytree(partly[0], run)
    first = summary_of(run)
    assert first.pop("model_sha256") == weights_of(run)
    (run / "summary.json").write_text(json.dumps(first))  # of an earlier release, which has no hash
    notes = json.loads((run / "run.json").read_text())
    begun = [{"epoch": 1, "step": 2, "overrides": ["trainer.max_epochs=2", "optimizer.lr=0.0007"]}]
    (run / "run.json").write_text(json.dumps(notes | {"stages": begun}))

    def killed(*_: Any) -> None:
        raise RuntimeError("killed between the model and the summary")

    with monkeypatch.context() as patch:
        patch.setattr("zoo.training.finish._summary", killed)
        with pytest.raises(RuntimeError, match="killed between"):
            launch.train(f"resume={run}")  # as it was last resumed
    assert summary_of(run)["metrics"] == first["metrics"], "nothing is lost"
    for read in (read_run, load_run, record_of):
        with pytest.raises(RunsError, match=r"summary\.json is of other weights than those in model/"):
            read(run)
    result = launch.train(f"resume={run}")
    assert summary_of(run)["model_sha256"] == weights_of(run)
    assert summary_of(run)["stages"] == begun
    assert read_run(run).metrics == result.metrics == load_run(run).metrics
    assert result.epochs["train"] == 1
    launch.train(f"resume={run} trainer.max_epochs=3")
    assert "from here on" not in capsys.readouterr().err, "its rate is as before"
    later = {"epoch": 2, "step": 4, "overrides": ["trainer.max_epochs=3", "optimizer.lr=0.0007"]}
    assert summary_of(run)["stages"] == [*begun, later]
    with pytest.raises(
        ConfigError, match=r"trainer\.max_epochs = 2, and the state .* is after 3 epochs: give at least 3"
    ):
        launch.train(f"resume={run} trainer.max_epochs=2")


def test_a_stage_counts_from_its_state_on_and_is_checked_as_what_the_run_began_with(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    with pytest.raises(launch.ResumeError, match=r"stopped before anything was on record: start it again"):
        launch._continue_run(tmp_path, [])
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_text("[trainer.max_epochs=3, optimizer.lr=1]")
    words = (["trainer.max_epochs=4"], ["trainer.max_epochs=5", "optimizer.lr=2"], ["hydra.run.dir=elsewhere"])
    found = [{"epoch": i, "step": 10 * i, "overrides": text} for i, text in enumerate(words, 1)]
    (tmp_path / "run.json").write_text(json.dumps({"stages": found}))
    (tmp_path / "checkpoints").mkdir()
    for step, kept in ((8, ["3", "1"]), (12, ["4", "1"]), (20, ["5", "2"])):
        state = tmp_path / "checkpoints" / f"step={step:08d}.ckpt"
        state.touch()
        for target in (tmp_path, state):
            assert launch._continue_run(target, [])[:2] == [f"trainer.max_epochs={kept[0]}", f"optimizer.lr={kept[1]}"]
    assert "trainer.max_epochs=9" in launch._continue_run(tmp_path, ["trainer.max_epochs=9"])
    (tmp_path / "checkpoints" / "step=00000030.ckpt").touch()
    with pytest.raises(launch.ResumeError, match=r"'hydra\.run\.dir=elsewhere' .* is refused, it configures Hydra"):
        launch._continue_run(tmp_path, [])


def test_stages_that_led_nowhere_are_dropped() -> None:
    notes = {"stages": [{"epoch": e, "step": s, "overrides": [f"optimizer.lr={s}"]} for e, s in ((1, 10), (2, 20))]}
    assert stages({}, Resumed(1, 10, None, None), ()) == []
    assert stages(notes, Resumed(2, 25, None, None), ("optimizer.lr=20",)) == notes["stages"]
    assert stages(notes, Resumed(2, 20, None, None), ("a=1",))[1:] == [{"epoch": 2, "step": 20, "overrides": ["a=1"]}]
    back = stages(notes, Resumed(3, 30, None, None), ())
    assert back == [*notes["stages"], {"epoch": 3, "step": 30, "overrides": []}], "on with its first values"


@pytest.mark.parametrize("found", ["x", [{"epoch": 1}], [{"epoch": -1, "step": 0, "overrides": []}], [3]])
def test_damaged_stages_are_told(found: Any, partly: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(partly[0], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary_of(partly[0]) | {"stages": found}))
    with pytest.raises(RunsError, match=r"summary\.json: stages"):
        read_run(tmp_path / "run")


def test_a_run_that_was_never_summed_up_may_have_its_data_elsewhere(tmp_path: Path) -> None:
    kept = {"global_step": 5, "loops": {"fit_loop": {"epoch_progress": {"current": {"processed": 2}}}}}
    engine: Any = SimpleNamespace(default_root_dir=tmp_path, max_epochs=2, max_steps=-1, callbacks=[])
    moved = Changes({"data.path": "data.path = b (was a)"})
    assert resumed(engine, kept, moved, (0, 0)) == (2, 5, "trainer.max_epochs = 2", None)
    with pytest.raises(ConfigError, match=r"so data\.name = b \(was a\) would only change what is recorded"):
        resumed(engine, kept, Changes({"data.name": "data.name = b (was a)"}), (0, 0))
    engine.max_epochs = 3
    assert resumed(engine, kept, Changes({"data.name": "x"}), (0, 0)).over is None
    engine.max_steps = 5
    assert resumed(engine, kept, None, (0, 0)).over == "trainer.max_steps = 5"


# ---- before the start ----------------------------------------------------------------------------------------


def test_channels_that_the_data_does_not_have_are_told_before_anything_is_built() -> None:
    data: Any = SimpleNamespace(in_chans=1, num_classes=10)
    spec = {"model_name": "test_unireplknet", "in_chans": 3}
    with pytest.raises(ConfigError, match=r"model\.in_chans = 3, and the data has 1: leave it at null"):
        build_task(spec, {"_target_": "zoo.tasks.ClassificationTask"}, data, None, None)


# ---- tables of runs ------------------------------------------------------------------------------------------


def test_a_section_that_no_document_has_is_not_invented(partly: tuple[Path, str], tmp_path: Path) -> None:
    page = tmp_path / "RESULTS.md"
    text = "<!-- begin my runs -->\n<!-- end my runs -->\n\n<!-- begin weights -->\nw\n<!-- end weights -->\n"
    page.write_text(text)
    for name, told in (("my rums", "did you mean my runs"), ("weights", "is written by another command")):
        with pytest.raises(RunsError, match=told):
            list(tabulate([partly[0]], [page], name))
        assert page.read_text() == text
    list(tabulate([partly[0]], [page], "my runs"))
    assert "## Trained my runs" in page.read_text()
    list(tabulate([partly[0]], [page]))
    assert "## Trained runs" in page.read_text()


# ---- notes and messages --------------------------------------------------------------------------------------


def test_only_pictures_are_prepared_as_pictures() -> None:
    how = {"input_size": [2, 1, 96], "mean": [0.0], "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}
    assert preparation({"preprocessing": how, "input": {"kind": "series"}}) == {"input_size": [2, 1, 96], "mean": [0.0]}
    assert preparation({"preprocessing": how, "input": {"kind": "image"}}) == how
    assert preparation({"preprocessing": how}) == how


def test_a_recorded_wish_to_send_is_told_not_to_be_followed(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "run" / ".hydra" / "overrides.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("- experiment=digits\n- logger.wandb.mode=online\n")
    assert _recorded_overrides(path, tmp_path, []) == ["experiment=digits", "logger.wandb.mode=auto"]
    told = capsys.readouterr().err
    assert told.startswith("note: logger.wandb.mode=online, which the folder recorded, is read as auto")
    _recorded_overrides(path, tmp_path, ["logger.wandb.mode=online"])
    assert not capsys.readouterr().err


def test_a_share_of_no_images_names_its_option() -> None:
    pair = torch.zeros(20, 1, 4, 4, dtype=torch.uint8), torch.arange(20) % 2
    with pytest.raises(DataError, match=r"give a larger val_fraction than 0"):
        _second(pair, "val_fraction", 0.0)
