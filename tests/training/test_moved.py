"""A run folder that was moved, copied or renamed goes on as in its place, and its record names what it measured."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import train_here
from tests.training.test_resume import assert_same, final_state

pytestmark = pytest.mark.xdist_group("moved")  # they share a run

START = (
    "experiment=grbf_wine",
    "logger=csv",
    "trainer.max_epochs=3",
    "hydra.run.dir=run",
    "callbacks.explanations=null",
)
MORE = "+callbacks.more={_target_:lightning.pytorch.callbacks.ModelCheckpoint,monitor:val/loss,"
MORE += "save_top_k:2,filename:'{epoch}-{val/loss:.3f}'}"
WORSE = ("trainer.max_epochs=5", "optimizer.lr=50")  # epochs that cannot be the best


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moved")
    train_here(folder, *START, MORE)
    return folder / "run"


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def best(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)


def weights(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in [*run.glob("model/*"), run / "checkpoints" / "best.ckpt"]}


def test_a_moved_run_goes_on_as_in_its_place(run: Path, tmp_path: Path) -> None:
    moved, home, score = tmp_path / "moved", tmp_path / "home", summary(run)["metrics"]["val/score"]
    shutil.copytree(run, moved)
    shutil.copytree(run, home)
    try:  # in place: the folder that the checkpoints name
        train_here(run.parent, "resume=run", *WORSE)
        shutil.copytree(run, tmp_path / "in_place")
    finally:
        shutil.rmtree(run)
        shutil.move(home, run)
    here = tmp_path / "in_place"
    done = train_here(tmp_path, "resume=moved", *WORSE)
    assert "dirpath has changed" not in done.stderr
    assert "optimizer.lr = 50 (was 0." in done.stderr
    assert summary(moved)["metrics"]["val/score"] == score
    assert_same(best(moved)["state_dict"], best(run)["state_dict"])
    for key in ("metrics", "epochs"):
        first, second = ({k: v for k, v in summary(r)[key].items() if "second" not in k} for r in (moved, here))
        assert first == second
    told = [(folder / "csv/version_0/metrics.csv").read_text().count("\n") for folder in (moved, here)]
    assert told[0] == told[1] > 8
    assert sorted(p.name for p in moved.rglob("*.ckpt")) == sorted(p.name for p in here.rglob("*.ckpt"))
    first, second = final_state(moved), final_state(here)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "random_states"):
        assert_same(first[part], second[part], part)
    assert first["callbacks"].keys() == second["callbacks"].keys()
    for name, state in first["callbacks"].items():
        there = second["callbacks"][name]
        if "dirpath" in state:
            state, there = ({k: relative(v, Path(s["dirpath"])) for k, v in s.items()} for s in (state, there))
        assert_same(state, there, name)


def relative(value: Any, folder: Path) -> Any:
    """A value of a callback's state with its paths relative to the callback's folder."""
    if isinstance(value, dict):
        return {relative(key, folder): score for key, score in value.items()}
    return str(Path(value).relative_to(folder)) if isinstance(value, str) and value.startswith("/") else value


def test_a_copy_with_nothing_left_to_train_keeps_its_record(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "copy")
    train_here(tmp_path, "resume=copy")
    assert summary(tmp_path / "copy")["metrics"] == summary(run)["metrics"]
    assert summary(tmp_path / "copy")["epochs"] == summary(run)["epochs"]
    assert weights(tmp_path / "copy") == weights(run)


def test_a_missing_best_state_is_told_and_its_model_is_not_replaced(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "checkpoints" / "best.ckpt").unlink()
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path.parent.name != "copy"}
    resume = ("resume=copy",)
    refused = train_here(tmp_path, *resume, check=False)
    assert refused.returncode == 1
    assert "best.ckpt, the best state by val/score, is missing: put it back; or move " in refused.stderr
    assert {path: path.read_bytes() for path in before if path.suffix != ".log"} == {
        path: content for path, content in before.items() if path.suffix != ".log"
    }
    shutil.move(copy / "model", tmp_path / "model")
    done = train_here(tmp_path, *resume, "trainer.max_epochs=4")
    assert "best.ckpt is missing: of the states from here on, the best by val/score counts" in done.stderr
    assert best(copy)["epoch"] == 3
    assert summary(copy)["epochs"] == {"train": 3, "val": 3, "test": 3}
    (copy / "checkpoints" / "best.ckpt").unlink()
    shutil.rmtree(copy / "model")
    done = train_here(tmp_path, *resume, "trainer.max_epochs=4")
    assert "no state with a finite val/score is kept: the best by val/loss counts" in done.stderr
    assert "checkpoint   copy/csv/version_0/checkpoints/epoch=" in done.stdout


def test_every_figure_is_of_the_state_that_counts(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "copy")
    epoch = best(run)["epoch"]
    assert summary(run)["epochs"] == {"train": 2, "val": epoch, "test": epoch}
    done = train_here(tmp_path, "resume=copy", *WORSE)
    found = summary(tmp_path / "copy")
    assert found["epochs"] == {"train": 4, "val": epoch, "test": epoch}
    assert {k: v for k, v in found["metrics"].items() if not k.startswith("train/")} == {
        k: v for k, v in summary(run)["metrics"].items() if not k.startswith("train/")
    }
    with (tmp_path / "copy/csv/version_0/metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    row = next(row for row in rows if row["val/score"] and int(row["epoch"]) == epoch)
    for name in ("val/acc", "val/score", "val/loss"):
        assert found["metrics"][name] == pytest.approx(float(row[name]), rel=1e-6), name
    lines = [line for line in done.stdout.splitlines() if "epoch" in line and "/" in line]
    assert any("val/acc" in line and f"epoch {epoch}" in line for line in lines)
    assert any("train/loss" in line and "epoch 4" in line for line in lines)


def test_values_that_change_when_a_run_is_resumed_are_told(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    done = train_here(tmp_path, "resume=run", "data.batch_size=16", "trainer.max_epochs=4")
    assert (
        f"note: from here on with data.batch_size = 16 (was 32): no longer the run that {tmp_path}/run" in done.stderr
    )
    (train_on,) = [line for line in done.stdout.splitlines() if line.startswith("train on")]
    assert train_on.endswith(" data.batch_size=16 resume=run trainer.max_epochs=8")
    assert "from here on" not in train_here(tmp_path, "resume=run", "trainer.max_epochs=4").stderr
    (tmp_path / "run/.hydra/config.yaml").write_text("- 1")
    done = train_here(tmp_path, "resume=run")
    assert (
        "config.yaml cannot be read: whether the resumed run has other values than before is not known" in done.stderr
    )
