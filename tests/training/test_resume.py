"""Interrupted and resumed equals unbroken, bit for bit, wherever the interruption falls."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import ROOT, Train, train_here
from tests.training import offline_wandb
from tests.training.kill_at import MOMENTS
from zoo.training.checkpointing import EndRequested, EndWatch, ResumeCheckpoint, StopRequested
from zoo.training.launch import _SafeStream

pytestmark = pytest.mark.xdist_group("resume")  # they share a run

# small, and with everything that has a state: dropout, drop path, mixup, EMA, a schedule, drawn samples, data workers
SETUP = (
    "experiment=digits",
    "model=test_unireplknet",
    "callbacks=ema",
    "data.batch_size=100",
    "model.drop_rate=0.1",
    "model.drop_path_rate=0.2",
    "task.mixup_alpha=0.2",
    "trainer.max_epochs=3",
    "callbacks.resume.every_n_steps=5",
    "callbacks.stop.patience=9",
    "callbacks.pictures=null",
    "data.balanced=true",
    "task.class_weights=balanced",
    "hydra.run.dir=run",
)
STEPS_PER_EPOCH = 12  # 1,295 training digits in batches of 100, the last incomplete one left out


def final_state(run: Path) -> dict[str, Any]:
    newest = sorted((run / "checkpoints").glob("step=*.ckpt"))[-1]
    return torch.load(newest, weights_only=True)


def assert_same(a: Any, b: Any, where: str = "state") -> None:
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def assert_same_training(a: Path, b: Path) -> None:
    """Weights, averages, optimizer, schedule and random states of the newest checkpoints agree bit for bit."""
    first, second = final_state(a), final_state(b)
    assert first["global_step"] == second["global_step"]
    for part in (
        "state_dict",
        "current_model_state",
        "averaging_state",
        "optimizer_states",
        "lr_schedulers",
        "random_states",
    ):
        assert_same(first[part], second[part], part)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    train_here(folder, *SETUP, "logger=none")
    return folder / "run"


def interrupt(train: Train, step: int, moment: str, signum: int = signal.SIGKILL, **options: Any) -> Any:
    kill = f"{{_target_:tests.training.kill_at.KillAt,step:{step},moment:{moment},signum:{int(signum)}}}"
    return train(*SETUP, f"+callbacks.kill={kill}", check=False, PYTHONPATH=str(ROOT), **options)


def trials() -> list[Any]:
    """Twelve random (step, moment, workers); the first two always run, the others with the slow tests."""
    draw = random.Random(20261122)
    chosen = []
    for i in range(12):
        step, moment = draw.randrange(6, 3 * STEPS_PER_EPOCH - 1), MOMENTS[i % len(MOMENTS)]
        marks = [] if i < 2 else [pytest.mark.slow]
        chosen.append(pytest.param(step, moment, i % 3, id=f"{i}-step{step}-{moment}-{i % 3}workers", marks=marks))
    return chosen


@pytest.mark.parametrize(("step", "moment", "workers"), trials())
def test_killed_and_resumed_equals_unbroken(
    step: int, moment: str, workers: int, unbroken: Path, train: Train, tmp_path: Path
) -> None:
    killed = interrupt(train, step, moment)
    assert killed.returncode == -signal.SIGKILL
    train_here(tmp_path, "resume=run", "+callbacks.kill=null", f"data.num_workers={workers}")
    assert_same_training(tmp_path / "run", unbroken)


@pytest.mark.parametrize(
    ("signum", "moment"), [(signal.SIGTERM, "on_train_batch_end"), (signal.SIGINT, "on_validation_start")]
)
def test_asked_to_stop_saves_says_how_to_continue_and_does(
    signum: signal.Signals, moment: str, unbroken: Path, train: Train, tmp_path: Path
) -> None:
    stopped = interrupt(train, 8, moment, signum)
    assert stopped.returncode == 128 + signum, stopped.stderr
    assert f"stopped by {signum.name}" in stopped.stderr
    assert "resume=run" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    (file,) = offline_wandb.run_files(tmp_path / "run")
    assert "exit" in offline_wandb.kinds(file)
    train_here(tmp_path, "resume=run", "+callbacks.kill=null")
    assert_same_training(tmp_path / "run", unbroken)
    ids = {path.stem for path in offline_wandb.run_files(tmp_path / "run")}
    assert len(ids) == 1, "a resumed training continues the same W&B run"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["wandb_id"] in ids.pop()


TWICE_AN_EPOCH = (
    *SETUP[:2],
    "data.batch_size=160",
    "trainer.max_epochs=2",
    "+trainer.val_check_interval=0.5",
    "trainer.limit_val_batches=2",
    "trainer.log_every_n_steps=1",
    "callbacks.pictures=null",
    "logger=csv",
    "test=false",
    "hydra.run.dir=run",
)


def rows(folder: Path) -> list[dict[str, str]]:
    """The rows of the one table of a run, without how fast it was."""
    (table,) = folder.glob("run/csv/*/metrics.csv")
    with table.open(newline="") as file:
        return [{k: v for k, v in row.items() if v and "second" not in k} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def validated_twice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("twice")
    train_here(folder, *TWICE_AN_EPOCH)
    return folder


@pytest.mark.parametrize(
    ("signum", "moment", "saved"),
    [
        (signal.SIGTERM, "on_validation_start", 3),  # the step before the validation, which is repeated
        (signal.SIGHUP, "on_validation_end", 4),
    ],
)
def test_a_resumed_run_has_every_row_of_an_unbroken_one(
    signum: signal.Signals, moment: str, saved: int, validated_twice: Path, tmp_path: Path
) -> None:
    expected = rows(validated_twice)
    assert [int(row["step"]) + 1 for row in expected if "val/acc" in row] == [4, 8, 12, 16]
    assert [int(row["step"]) + 1 for row in expected if "train/loss" in row] == list(range(1, 17))
    kill = f"{{_target_:tests.training.kill_at.KillAt,step:4,moment:{moment},signum:{int(signum)}}}"
    stopped = train_here(tmp_path, *TWICE_AN_EPOCH, f"+callbacks.kill={kill}", check=False)
    assert stopped.returncode == 128 + signum
    assert f"stopped by {signum.name}; the state after step {saved} is saved" in stopped.stderr
    train_here(tmp_path, "resume=run", "+callbacks.kill=null")
    assert rows(tmp_path) == expected
    assert_same(final_state(tmp_path / "run")["state_dict"], final_state(validated_twice / "run")["state_dict"])


def test_a_signal_between_the_last_step_and_the_results_is_told(validated_twice: Path, tmp_path: Path) -> None:
    shutil.copytree(validated_twice / "run", tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    kill = f"{{_target_:tests.training.kill_at.KillAt,step:1,moment:on_test_start,signum:{int(signal.SIGTERM)}}}"
    stopped = train_here(tmp_path, "resume=run", "test=true", f"+callbacks.kill={kill}", check=False)
    assert stopped.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after the last step, before the results were written" in stopped.stderr
    assert "the last good checkpoint is step 16; continue from it with: " in stopped.stderr
    assert not (tmp_path / "run" / "summary.json").exists()
    train_here(tmp_path, "resume=run", "test=true")
    folders = validated_twice / "run", tmp_path / "run"
    whole, found = (json.loads((folder / "summary.json").read_text())["metrics"] for folder in folders)
    assert whole.items() <= found.items(), "of the whole run, though this part of it took no step"
    assert {"train/loss", "val/acc", "val/loss"} <= whole.keys()
    assert "test/acc" in found


def test_signals_after_the_last_step() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {n: signal.getsignal(n) for n in numbers}
    watch, state, seen = EndWatch(), ResumeCheckpoint("."), []
    try:
        signal.signal(signal.SIGTERM, lambda *_: seen.append("as before"))
        inner = {n: signal.getsignal(n) for n in numbers}
        with watch:
            state._handle(signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # while training goes on, of which no state is there yet
            state.on_train_end(SimpleNamespace(world_size=1), None)  # type: ignore[arg-type]
            state._saved_step = 7
            with pytest.raises(StopRequested) as stop:
                state.on_train_end(SimpleNamespace(world_size=1), None)  # type: ignore[arg-type]
            assert (stop.value.signum, stop.value.step) == (signal.SIGTERM, 7)
            os.kill(os.getpid(), signal.SIGTERM)
            assert seen == ["as before"]
            watch.on_train_end(None, None)  # type: ignore[arg-type]
            for signum in numbers:
                with pytest.raises(EndRequested):
                    os.kill(os.getpid(), signum)
        assert {n: signal.getsignal(n) for n in numbers} == inner
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def test_hang_ups_come_together_and_nohup_is_kept() -> None:
    callback = ResumeCheckpoint(".")
    before = {n: signal.getsignal(n) for n in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)}
    try:
        for signum in before:
            callback._handle(signum)
        for signum in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):  # as a logout sends them
            if signal.getsignal(signum) == callback._request_stop:
                os.kill(os.getpid(), signum)
            else:
                assert signum == signal.SIGTERM, "a second hang-up would end the process"
        assert callback._signum == signal.SIGHUP
        callback._restore_handlers()
        assert {n: signal.getsignal(n) for n in before} == before
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        callback._handle(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def test_a_terminal_that_is_gone_costs_what_is_written_to_it_and_no_more() -> None:
    for gone in ("terminal", "pipe"):
        master, slave = os.openpty() if gone == "terminal" else os.pipe()
        os.close(master)
        with os.fdopen(slave, "w") as stream:
            lasting = _SafeStream(stream)
            for _ in range(3):
                assert lasting.write("x" * 100_000) == 100_000
                lasting.flush()
            stream.flush()  # as the end of a process does


def test_finished_run_can_be_extended(unbroken: Path, tmp_path: Path) -> None:
    shutil.copytree(unbroken, tmp_path / "run")
    train_here(tmp_path, "resume=run", "trainer.max_epochs=4")
    assert final_state(tmp_path / "run")["global_step"] == 4 * STEPS_PER_EPOCH


def test_truncated_checkpoint_is_named_and_the_one_before_offered(unbroken: Path, tmp_path: Path) -> None:
    shutil.copytree(unbroken, tmp_path / "run")
    older, newest = sorted((tmp_path / "run" / "checkpoints").glob("step=*.ckpt"))
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    done = train_here(tmp_path, "resume=run", check=False)
    assert done.returncode == 1
    assert newest.name in done.stderr
    assert older.name in done.stderr.split("continue with")[1]
    assert "Traceback" not in done.stderr
    train_here(tmp_path, f"resume='run/checkpoints/{older.name}'")
    assert_same_training(tmp_path / "run", unbroken)


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("nowhere", "there is no such folder or file"),
        (".", "is not the folder of a run"),
        ("loose.ckpt", "model.checkpoint_path"),
    ],
)
def test_resume_of_something_else_is_told(target: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "loose.ckpt").write_bytes(b"x")
    done = train_here(tmp_path, f"resume={target}", check=False)
    assert done.returncode == 1
    assert told in done.stderr
    assert "Traceback" not in done.stderr
