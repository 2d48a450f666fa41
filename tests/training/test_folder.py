"""One writer in a run folder at a time, and nothing left over from one that was killed."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import pytest

from tests.conftest import train_here
from zoo.support.files import CheckpointError
from zoo.support.values import DamagedFileError, check_closed
from zoo.training import folder as folders
from zoo.training.folder import RunFolderInUse, link_latest, writing_in
from zoo.training.loggers import _Table


@contextmanager
def another_writer(folder: Path) -> Iterator[tuple[int, Callable[[], None]]]:
    """A process that writes into a folder, and a worker of its own that outlives it; its number, and how to kill it."""
    receiver, sender = os.pipe()
    if (child := os.fork()) == 0:
        with writing_in(folder):
            worker = os.fork()
            if worker:
                os.write(sender, str(worker).encode())
            time.sleep(60)
        os._exit(1)
    worker, alive = int(os.read(receiver, 20)), True

    def kill() -> None:
        nonlocal alive
        if alive:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        alive = False

    try:
        yield child, kill
    finally:
        kill()
        os.kill(worker, signal.SIGKILL)


def test_a_second_run_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with another_writer(run) as (process, kill):
        before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
        done = train_here(tmp_path, "experiment=digits", "hydra.run.dir=run", "logger=none", check=False)
        assert done.returncode == 1
        (line,) = done.stderr.strip().splitlines()
        assert f"{run} is being written by process {process} on " in line
        assert ", since 20" in line
        assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.suffix != ".log"} == before
        kill()
        with writing_in(run):  # the lock ended with its process, though a worker of it lives
            pass


def test_a_thread_is_another_writer_and_a_part_of_the_same_run_is_not(tmp_path: Path) -> None:
    found: list[BaseException | None] = []

    def second() -> None:
        try:
            with writing_in(tmp_path):
                found.append(None)
        except RunFolderInUse as error:
            found.append(error)

    with writing_in(tmp_path):
        with writing_in(tmp_path / "." / ""):
            pass
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        with pytest.raises(ZeroDivisionError), writing_in(tmp_path):
            _ = 1 / 0
    second()
    assert [type(error) for error in found] == [RunFolderInUse, type(None)]
    assert f"process {os.getpid()} on" in str(found[0])


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"process": {}, "host": null, "since": "now"}', b"\xff"])
def test_whoever_it_is_the_second_is_refused(content: bytes, tmp_path: Path) -> None:
    with writing_in(tmp_path):
        (tmp_path / ".lock").write_bytes(content)
        thread_id = folders._held.pop(tmp_path)
        with pytest.raises(RunFolderInUse, match="is being written by") as caught, writing_in(tmp_path):
            pass
        folders._held[tmp_path] = thread_id
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("variables", [{"NODE_RANK": "1"}, {"GROUP_RANK": "2"}])
def test_other_processes_of_a_run_write_beside_the_first(
    variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with another_writer(tmp_path):
        for key, value in variables.items():
            monkeypatch.setenv(key, value)
        with writing_in(tmp_path):
            pass


def test_without_locks_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(95, os.strerror(95))

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with pytest.warns(UserWarning, match="cannot be locked"), writing_in(tmp_path):
        pass


def test_what_a_killed_run_left_over_goes(tmp_path: Path) -> None:
    places = [tmp_path, tmp_path / "checkpoints", tmp_path / "model", tmp_path / "csv" / "version_0"]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        (place / ".step=00000004.ckpt.0123456789ab.tmp").write_bytes(b"half")
        (place / ".new.0123456789ab.tmp").mkdir()
        (place / ".new.0123456789ab.tmp" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "mine.tmp").write_bytes(b"")
    with warnings.catch_warnings(action="error"), writing_in(tmp_path):
        left = {p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {Path(".lock"), Path("wandb/mine.tmp")}


def test_the_switch_of_a_killed_writer_is_finished_when_the_run_is_resumed(tmp_path: Path) -> None:
    model, names = tmp_path / "model", ("config.json", "model.safetensors")
    for place in (".old.0123456789ab.tmp", ".new.0123456789ab.tmp"):
        (model / place).mkdir(parents=True)
        for name in names:
            (model / place / name).write_text(place)
    (model / ".now.0123456789ab.tmp").symlink_to(".new.0123456789ab.tmp")
    for name in names:
        (model / name).symlink_to(f".now.0123456789ab.tmp/{name}")
    with writing_in(tmp_path, resumed=True):
        assert sorted(path.name for path in model.iterdir()) == sorted(names)
        for name in names:
            assert not (model / name).is_symlink()
            assert (model / name).read_text() == ".new.0123456789ab.tmp"


def test_latest_leads_to_the_newest_run(tmp_path: Path) -> None:
    for run in ("first", "second"):
        (tmp_path / "mine" / run).mkdir(parents=True)
        link_latest(tmp_path / "mine" / run, "mine")
        assert (tmp_path / "mine" / "latest").resolve().name == run
    link_latest(tmp_path / "mine" / "first", "another name")
    assert (tmp_path / "mine" / "latest").resolve().name == "second"


def test_a_new_run_takes_no_folder_that_holds_one(tmp_path: Path) -> None:
    """Else the old run's best state, model and summary would be gone, and its states mixed with the new ones."""
    quick = ("experiment=grbf_wine", "model=test_grbf", "trainer.max_epochs=1", "logger=none", "hydra.run.dir=run")
    train_here(tmp_path, *quick)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != ".lock"}
    again = train_here(tmp_path, *quick, "seed=7", check=False)
    assert again.returncode == 1
    assert "holds a run already" in again.stderr
    assert "resume=run" in again.stderr
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != ".lock"}
    train_here(tmp_path, "resume=run", "trainer.max_epochs=2")


def test_what_an_empty_attempt_noted_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"seed": 3, "wandb_id": "0badcafe", "seconds_before": 9.0}')
    quick = ("experiment=grbf_wine", "model=test_grbf", "trainer.max_epochs=1", "logger=none", "hydra.run.dir=run")
    train_here(tmp_path, *quick, "seed=7")
    notes = json.loads((tmp_path / "run" / "run.json").read_text())
    assert notes["seed"] == 7
    assert notes["wandb_id"] != "0badcafe"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("seed=5000000000", "seed = 5000000000"),
        ("model.n_centers=1000", "n_centers=1000"),
        ("~data", "data has no _target_"),
        ("~task", "task has no value"),
    ],
)
def test_values_that_only_the_run_can_judge_are_told_in_a_line(override: str, told: str, tmp_path: Path) -> None:
    done = train_here(tmp_path, "experiment=grbf_wine", "trainer.max_epochs=1", "logger=none", override, check=False)
    assert done.returncode == 1
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_links_out_of_the_place_of_a_new_run_are_told(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to("../elsewhere")
    told = r"run/checkpoints leads to .*, or the run cannot be resumed"
    with pytest.warns(UserWarning, match=told), writing_in(tmp_path / "run"):
        pass
    with pytest.raises(DamagedFileError, match="leads to"), writing_in(tmp_path / "run", resumed=True):
        pass


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="the system cannot tell links when it opens a file")
def test_rows_are_appended_to_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "victim.csv").write_text("a,step\n")
    (tmp_path / "version_0").mkdir()
    (tmp_path / "version_0" / "metrics.csv").symlink_to("../victim.csv")
    table = _Table(tmp_path / "version_0")
    table.columns = ["a", "step"]
    table.log_metrics({"a": 1}, 0)
    with pytest.raises(CheckpointError, match=r"cannot write .*metrics\.csv"):
        table.save()
    assert (tmp_path / "victim.csv").read_text() == "a,step\n"


def test_the_logs_of_wandb_may_lie_elsewhere(tmp_path: Path) -> None:
    """Its client links one out of each of its runs; the folder of its runs itself may not lead out."""
    logs = tmp_path / "run" / "wandb" / "offline-run-20261130_115712-386c5d18" / "logs"
    logs.mkdir(parents=True)
    (tmp_path / "core.log").touch()
    (logs / "debug-core.log").symlink_to(tmp_path / "core.log")
    check_closed(tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "run" / "wandb" / "run-x").symlink_to(tmp_path / "other")
    with pytest.raises(DamagedFileError, match="run-x leads to"):
        check_closed(tmp_path / "run")
