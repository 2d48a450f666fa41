"""Tracking never stops a training: what W&B cannot do is told once, and soon."""

from __future__ import annotations

import socket
import sys
import threading
import time
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import wandb
from lightning.pytorch.loggers.logger import DummyExperiment

from tests.conftest import train_here
from tests.training import offline_wandb
from zoo.training import loggers
from zoo.training.loggers import WandbRun

KEY = "0123456789" * 4


@pytest.fixture(autouse=True)
def _no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of this process' own settings, and no service that waits."""
    for name in ("WANDB_MODE", "WANDB_ERROR_REPORTING", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.setenv(name, "")  # so that what the logger sets goes again
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", "/nonexistent")


def online_fails(monkeypatch: pytest.MonkeyPatch, how: Any) -> None:
    """Have an online beginning do `how`; an offline one goes on as usual."""
    real = wandb.init
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(loggers, "refusal", lambda: None)
    monkeypatch.setattr(wandb, "init", lambda **options: how() if options["mode"] == "online" else real(**options))


def track(folder: Path) -> WandbRun:
    """A run of one value, from beginning to end."""
    run = WandbRun(str(folder), run_id="abc", name="test")
    run.log_hyperparams({"lr": 0.1})
    run.log_metrics({"train/loss": 1.0}, step=1)
    run.close(0)
    return run


def rows(folder: Path) -> list[Any]:
    """The logged rows; the service may write them a moment after the run has ended."""
    (file,) = [path for path in offline_wandb.run_files(folder) if "offline-run" in str(path)]
    end = time.monotonic() + 30
    while not (found := offline_wandb.history(file)) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def raises() -> Any:
    raise wandb.errors.CommError("nobody answers\nand more")


def hangs() -> Any:
    threading.Event().wait(60)


@pytest.mark.parametrize(("how", "told"), [(raises, "nobody answers"), (hangs, "no answer within 0.2 s")])
def test_a_service_that_fails_leaves_the_run_offline_with_one_warning(
    how: Any, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    online_fails(monkeypatch, how)
    monkeypatch.setitem(loggers._PATIENCE, "online", 0.2)
    began = time.perf_counter()
    run = track(tmp_path)
    assert time.perf_counter() - began < 30
    warned = capsys.readouterr().err
    assert warned.count("note:") == 1
    assert f"W&B cannot be reached ({told}): the run is tracked offline" in warned
    assert run.mode == "offline"
    assert any(row.get("train/loss") == 1.0 for row in rows(tmp_path))


class Answers(threading.Thread):
    """A service on a local socket that takes every connection; None never answers."""

    def __init__(self, status: int | None) -> None:
        super().__init__(daemon=True)
        self.status, self.socket, self.taken = status, socket.create_server(("127.0.0.1", 0)), []
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"

    def run(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.taken.append(connection)
            if self.status is not None:
                while b"viewer" not in (connection.recv(65536) or b"viewer"):
                    pass
                connection.sendall(b"HTTP/1.1 %d -\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % self.status)
                connection.close()


@pytest.mark.parametrize(
    ("status", "told"), [(None, "no answer within 0.3 s"), (401, "it does not accept the key"), (200, None)]
)
def test_a_service_is_asked_before_its_client(
    status: int | None,
    told: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """A hanging service, or a key that is not its own, costs one bounded question, and no online beginning."""
    service, begun = Answers(status), []
    service.start()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", service.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(loggers, "_ANSWER", 0.3 if status is None else 20.0)
    monkeypatch.setattr(wandb, "init", lambda **options: begun.append(options["mode"]) or DummyExperiment())
    try:
        run = WandbRun(str(tmp_path), run_id="abc")
        assert run.experiment is not None
    finally:
        service.socket.close()
    assert len(service.taken) == 1
    assert begun == [run.mode] == ["online" if told is None else "offline"]
    warned = capsys.readouterr().err
    assert warned.count("note:") == (told is not None)
    assert told is None or f"W&B cannot be reached ({told}): the run is tracked offline" in warned
    for connection in service.taken:
        connection.close()


@pytest.mark.parametrize(
    ("mode", "environment", "resumed", "expected"),
    [
        ("auto", None, False, "allow"),
        ("auto", None, True, "must"),  # the account has it, or it stays here
        ("auto", "online", True, "allow"),
        ("online", None, True, "allow"),  # typed
    ],
)
def test_a_resumed_run_goes_on_online_where_the_account_has_it(
    mode: Any, environment: str | None, resumed: bool, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: list[Any] = []
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    if environment:
        monkeypatch.setenv("WANDB_MODE", environment)
    monkeypatch.setattr(loggers, "refusal", lambda: None)
    monkeypatch.setattr(wandb, "init", lambda **options: given.append(options["resume"]) or DummyExperiment())
    assert WandbRun(str(tmp_path), run_id="abc", mode=mode, resumed=resumed).experiment is not None
    assert given == [expected]


def test_a_malformed_key_leaves_the_run_offline(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "nonsense")
    assert track(tmp_path).mode == "offline"
    warned = capsys.readouterr().err
    assert warned.count("note:") == 1
    assert "API key" in warned
    assert rows(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("WANDB_MODE", "garbage", "WANDB_MODE=garbage is none of online"),
        ("WANDB_MODE", "online", "W&B has no credentials"),
        ("WANDB_BASE_URL", "http://[", ""),
        ("WANDB_INIT_TIMEOUT", "soon", ""),
    ],
)
def test_settings_that_mean_nothing_leave_the_run_offline(
    name: str,
    value: str,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setenv(name, value)
    assert track(tmp_path).mode == "offline"
    warned = capsys.readouterr().err
    assert told in warned
    assert warned.count("note:") == bool(told)
    assert rows(tmp_path)


def test_without_wandb_nothing_is_tracked_and_training_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import error
    run = track(tmp_path)
    run.log_image("val/samples", [])
    run.log_best(tmp_path / "best.ckpt", {})
    assert (run.mode, run.folder) == ("disabled", None)
    assert capsys.readouterr().err.count("note: wandb cannot be imported") == 1


def test_a_service_that_dies_later_ends_the_tracking_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = WandbRun(str(tmp_path), mode="offline")
    real = run.experiment
    monkeypatch.setattr(type(real), "log", lambda *_, **__: raises())
    run.log_metrics({"train/loss": 1.0}, step=1)
    run.log_metrics({"train/loss": 2.0}, step=2)
    run.close(0)
    assert run.mode == "disabled"
    assert capsys.readouterr().err.count("note: W&B has stopped (nobody answers)") == 1
    real.finish()


def test_arguments_and_variables_of_the_service_keep_their_meaning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: list[dict[str, Any]] = []

    @wraps(wandb.init)
    def init(**options: Any) -> DummyExperiment:
        given.append(options)
        return DummyExperiment()

    monkeypatch.setattr(wandb, "init", init)
    own = {"entity": "team", "group": "g1", "job_type": "train", "notes": "wide", "tags": ["a"], "name": "mine"}
    for options in ({**own, "init": {"save_code": True}}, {}):
        assert WandbRun(str(tmp_path), run_id="abc", mode="offline", **options).experiment is not None
    assert {k: given[0][k] for k in own} == own
    assert given[0]["save_code"] is True
    assert not [k for k in own if given[1].get(k) is not None], "what is not given is left to the variables"
    assert given[1]["project"] == "kernel-zoo"
    monkeypatch.setenv("WANDB_PROJECT", "another")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    assert WandbRun(str(tmp_path), mode="offline").experiment is not None
    assert (given[2]["project"], given[2]["dir"]) == ("another", str(tmp_path / "elsewhere"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"gruop": "x"}, "init.gruop is no argument of wandb.init"),
        ({"group": "x"}, "it has a key of its own, logger.wandb.group"),
        ({"id": "x"}, "the run itself gives it"),
    ],
)
def test_further_arguments_that_are_none_are_told(options: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        WandbRun(str(tmp_path), mode="offline", init=options)


def test_names_of_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_NAME", "WANDB_RUN_GROUP"):
        monkeypatch.delenv(name, raising=False)
    assert loggers.titles("digits", "", "") == {"name": "digits"}
    assert loggers.titles("digits", "seed=1", "g") == {"name": "digits seed=1", "group": "g"}
    monkeypatch.setenv("WANDB_NAME", "mine")
    monkeypatch.setenv("WANDB_RUN_GROUP", "ours")
    assert loggers.titles("digits", "", "") == {"name": "mine"}
    assert loggers.titles("digits", "seed=1", "g") == {"name": "mine seed=1"}


def test_a_run_of_a_sweep_keeps_the_id_that_the_agent_gave(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As an agent starts it: its variables, and values as arguments; later resumed without it."""
    quick = ("experiment=digits", "model=test_unireplknet", "trainer.limit_train_batches=2", "test=false")
    quick += ("callbacks.progress=null", "trainer.limit_val_batches=1", "logger.wandb.log_model=false")
    agent = {"WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": "r1-of_s1", "WANDB_NAME": "sunny-1", "WANDB_MODE": "offline"}
    with monkeypatch.context() as patch:
        for name, value in agent.items():
            patch.setenv(name, value)
        wandb.teardown()  # its client reads them once in a process
        train_here(tmp_path, *quick, "trainer.max_epochs=1", "optimizer.lr=0.001", "hydra.run.dir=run")
    (file,) = offline_wandb.run_files(tmp_path)
    first = offline_wandb.run(file)
    assert (first.run_id, first.sweep_id, first.display_name) == ("r1-of_s1", "s1", "sunny-1")
    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "offline")
    train_here(tmp_path, "resume=run", "trainer.max_epochs=2")
    (other,) = [path for path in offline_wandb.run_files(tmp_path) if path != file]
    assert offline_wandb.run(other).run_id == "r1-of_s1"
