"""A whole run on embedded data: trained, tracked, saved, loaded again."""

from __future__ import annotations

import json
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch

import zoo
from tests.conftest import Train, train_here
from tests.training import offline_wandb
from zoo.training.folder import link_latest
from zoo.training.launch import find_run

pytestmark = pytest.mark.xdist_group("run")  # they share a run

SHORT = ("experiment=digits", "model=test_unireplknet", "trainer.max_epochs=2", "hydra.run.dir=run")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of one short run, shared by the tests of this file."""
    folder = tmp_path_factory.mktemp("run")
    done = train_here(folder, *SHORT)
    return folder / "run", done.stdout


def test_summary_tells_results_places_and_commands(run: tuple[Path, str]) -> None:
    folder, output = run
    for told in (
        "test/acc",
        "val/acc",
        "parameters",
        "time",
        "run/checkpoints/best.ckpt",
        "resume=run",
        "run/wandb/offline-run",
    ):
        assert told in output, told
    assert 'zoo.create_model("local-dir:run/model", pretrained=True)' in output
    assert json.loads((folder / "summary.json").read_text())["metrics"]["test/acc"] > 0.1


def test_offline_wandb_run_holds_everything(run: tuple[Path, str]) -> None:
    folder, _ = run
    (file,) = offline_wandb.run_files(folder)
    rows = offline_wandb.history(file)
    logged = {key for row in rows for key in row}
    for key in (
        "train/loss",
        "val/acc",
        "val/loss",
        "test/acc",
        "train/lr",
        "train/grad_norm",
        "train/samples_per_second",
    ):
        assert key in logged, f"{key} not in {sorted(logged)}"
    assert "val/samples" in {key.split("/_type")[0] for key in logged} or any("val/samples" in key for key in logged)
    summary = json.loads((folder / "summary.json").read_text())["metrics"]
    assert next(row["test/acc"] for row in rows if "test/acc" in row) == pytest.approx(summary["test/acc"])
    assert offline_wandb.config(file)["model"]["model_name"] == "test_unireplknet"
    assert "artifact" in offline_wandb.kinds(file)
    assert "exit" in offline_wandb.kinds(file)  # finished, not lost


def test_csv_lies_beside_it(run: tuple[Path, str]) -> None:
    (table,) = run[0].glob("csv/*/metrics.csv")
    assert "val/acc" in table.read_text().splitlines()[0]


def test_checkpoint_alone_rebuilds_task_and_model(run: tuple[Path, str]) -> None:
    path = run[0] / "checkpoints" / "best.ckpt"
    raw = torch.load(path, weights_only=True)  # nothing but tensors and plain values
    task = zoo.load_task(path)
    assert task.hparams["class_names"] == [str(i) for i in range(10)]
    assert task.hparams["preprocessing"]["mean"]
    for name, value in task.state_dict().items():
        assert torch.equal(value, raw["state_dict"][name])
    again = type(task).load_from_checkpoint(path).eval()  # Lightning's own way, with its defaults
    x = torch.randn(2, *task.hparams["preprocessing"]["input_size"])
    assert torch.equal(task(x), again(x))
    assert task.model.input_record == again.model.input_record == raw["zoo"]["input"]


def test_exported_model_loads_by_name_and_equals_the_checkpoint(run: tuple[Path, str]) -> None:
    model = zoo.create_model(f"local-dir:{run[0] / 'model'}", pretrained=True).eval()
    task = zoo.load_task(run[0] / "checkpoints" / "best.ckpt")
    x = torch.randn(2, *task.hparams["preprocessing"]["input_size"])
    assert torch.equal(model(x), task(x))
    assert model.input_record["kind"] == "image"
    assert model.input_record == task.model.input_record, "a file is prepared as the run's own data was"


def test_same_seed_same_bits(run: tuple[Path, str], tmp_path: Path) -> None:
    train_here(tmp_path, *SHORT, "logger=none")
    first = torch.load(run[0] / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    second = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_seed_zero_is_a_seed(run: tuple[Path, str]) -> None:
    assert json.loads((run[0] / "run.json").read_text())["seed"] == 0


@pytest.mark.parametrize(
    ("what", "step", "told", "left"),
    [
        ("loss", 3, "the loss is not finite at step 3, ", [1, 2]),  # the state of step 3 gave that loss
        ("weights", 3, "have exploded, their norm was 26.4 at the start and is 2.64e+23 after step 3, ", [1, 2]),
        ("weight", 3, "the weights model.", [1, 2]),
        ("weights", 1, "after step 1, ", []),
    ],
)
def test_divergence_stops_and_keeps_the_last_good_checkpoint(
    what: str, step: int, told: str, left: list[int], tmp_path: Path
) -> None:
    spoil = f"{{_target_:tests.training.kill_at.SpoilAt,step:{step},what:{what}}}"
    quick = ("logger=none", "callbacks.resume.every_n_steps=1", "callbacks.pictures=null", f"+callbacks.spoil={spoil}")
    done = train_here(tmp_path, *SHORT, *quick, check=False)
    assert done.returncode == 1
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    states = sorted((tmp_path / "run" / "checkpoints").glob("step=*.ckpt"))
    assert [int(path.stem[5:]) for path in states] == left[what == "loss" :]
    if left:
        assert f"the last good checkpoint is step {left[-1]}; continue from it with: " in done.stderr
        zoo.load_task(states[-1])
    else:
        assert "no good checkpoint had been written yet: start the run again with optimizer.lr=" in done.stderr


def test_a_finished_run_that_is_resumed_sums_up_all_of_it(run: tuple[Path, str], tmp_path: Path) -> None:
    folder = shutil.copytree(run[0], tmp_path / "run", symlinks=True)
    before = json.loads((folder / "summary.json").read_text())["metrics"]
    (table,) = folder.glob("csv/*/metrics.csv")
    rows = table.read_text()
    done = train_here(folder.parent, "resume=run")
    assert json.loads((folder / "summary.json").read_text())["metrics"] == before
    assert "val/acc" in done.stdout
    assert table.read_text() == rows
    assert len(list(folder.glob("csv/*/metrics.csv"))) == 1


def test_wandb_is_finished_after_an_exception(train: Train, tmp_path: Path) -> None:
    train(*SHORT, "optimizer.lr=1e30", "scheduler=constant", check=False)
    (file,) = offline_wandb.run_files(tmp_path / "run")
    assert "exit" in offline_wandb.kinds(file)


def test_two_runs_in_one_process_have_their_own_wandb_runs(tmp_path: Path) -> None:
    quick = (
        "trainer.max_epochs=1",
        "trainer.limit_train_batches=2",
        "trainer.limit_val_batches=1",
        "test=false",
    )
    train_here(tmp_path, "-m", *SHORT[:2], *quick, "seed=0,1", "hydra.sweep.dir=sweep")
    files = offline_wandb.run_files(tmp_path / "sweep")
    assert len(files) == 2
    assert len({f.stem for f in files}) == 2


def test_full_disk_is_told_and_nothing_is_half_written(tmp_path: Path) -> None:
    from zoo.training.checkpointing import AtomicCheckpointIO

    target = tmp_path / "step=1.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(3)}, target)
    before = target.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # as a full disk: writing past it fails
    try:
        with pytest.raises(zoo.CheckpointError, match=re.escape(str(target))):
            AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(1_000_000)}, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]


def test_latest_leads_to_the_newest_run_of_a_name(tmp_path: Path) -> None:
    for folder in ("digits/a", "digits/b", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
        link_latest(tmp_path / folder, "digits")
    assert (tmp_path / "digits" / "latest").resolve() == tmp_path / "digits" / "b"
    assert find_run(tmp_path / "digits" / "latest") == tmp_path / "digits" / "b"
    assert not (tmp_path / "latest").is_symlink()
