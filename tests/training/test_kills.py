"""Killed at any moment and resumed, a training ends with the bits and the rows of one that nobody disturbed."""

from __future__ import annotations

import csv
import importlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import train_here

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a process that uses CUDA cannot fork")

COMMON = ("logger=csv", "hydra.run.dir=run", "trainer.log_every_n_steps=1", "trainer.enable_progress_bar=false")
KINDS: dict[str, tuple[str, ...]] = {
    "classification": (
        "experiment=digits",
        "model=test_unireplknet",
        "callbacks=ema",
        "callbacks.pictures=null",
        "callbacks.resume.every_n_steps=3",
        "data.batch_size=160",
        "model.drop_rate=0.1",
        "task.mixup_alpha=0.2",
        "trainer.max_epochs=2",
        "+trainer.val_check_interval=0.5",
    ),
    "stream": (
        "experiment=split_mnist5k",
        "model=test_kcl",
        "data.name=digits",
        "task.epochs=2",
    ),
    "forecasting": (
        "experiment=victoria_electricity",
        "data.name=series.csv",
        "data.seq_len=24",
        "data.pred_len=6",
        "data.batch_size=16",
        "model.backbone_args={dims:[8,8,8,8]}",
        "model.embed_dim=24",
        "callbacks.resume.every_n_steps=2",
        "trainer.limit_train_batches=6",
        "trainer.max_epochs=2",
    ),
    "grbf": (
        "experiment=grbf_wine",
        "model=test_grbf",
        "callbacks.resume.every_n_steps=2",
        "trainer.max_epochs=4",
    ),
    "closed_form": (
        "experiment=gkcl_digits",
        "model.num_bases=50",
    ),
}
#: What no two runs have in common: how long things took.
TIMES = ("seconds", "samples_per_second")


def arguments(kind: str, folder: Path) -> list[str]:
    if kind == "forecasting":
        draw = np.random.default_rng(0)
        hours = np.datetime64("2020-01-01T00:00:00") + np.arange(300) * np.timedelta64(1, "h")
        values = np.sin(np.arange(300) / 4)[:, None] + 0.1 * draw.standard_normal((300, 2))
        rows = [f"{h},{a:.4f},{b:.4f}" for h, (a, b) in zip(hours, values, strict=True)]
        (folder / "series.csv").write_text("time,a,b\n" + "\n".join(rows) + "\n")
    return [*KINDS[kind], *COMMON]


def begin(act: Callable[[], Any]) -> int:
    """Do something in a child of this process; its number."""
    for heavy in ("zoo.training.run", "zoo.registry.factory", "zoo.data", "matplotlib.pyplot", "wandb"):
        importlib.import_module(heavy)  # once here, not in every child
    torch.set_num_threads(1)
    if (child := os.fork()) == 0:
        code = 1
        try:
            act()
            code = 0
        except AssertionError as error:
            os.write(2, f"{error}\n"[-3000:].encode())
        finally:
            os._exit(code)
    return child


def end(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outcome(folder: Path) -> dict[str, Any]:
    """Everything that a run came to, without the times."""
    run = folder / "run"
    (table,) = run.glob("csv/*/metrics.csv")
    with table.open(newline="") as file:
        rows = [{k: v for k, v in row.items() if v and not k.endswith(TIMES)} for row in csv.DictReader(file)]
    state = torch.load(sorted((run / "checkpoints").glob("step=*.ckpt"))[-1], weights_only=True)
    metrics = json.loads((run / "summary.json").read_text())["metrics"]
    left = [str(p.relative_to(run)) for p in run.rglob(".*.tmp")]
    return {
        "weights": {k: v for k, v in state["state_dict"].items() if k != "seconds"},
        "optimizer": state["optimizer_states"] if "matrix" not in state["state_dict"] else None,
        "step": state["global_step"],
        "model": (run / "model" / "model.safetensors").read_bytes(),
        "rows": rows,
        "metrics": {k: v for k, v in metrics.items() if not k.endswith(TIMES)},
        "left over": left,
    }


def assert_same(a: Any, b: Any, where: str) -> None:
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}, {key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}, {i}")
    else:
        assert a == b, where


def go_on(kind: str, folder: Path) -> None:
    """Resume, or start again where nothing had been saved."""
    states = list((folder / "run" / "checkpoints").glob("step=*.ckpt"))
    known = (folder / "run" / ".hydra" / "overrides.yaml").is_file()
    again = ["resume=run"] if states and known else arguments(kind, folder)
    assert end(begin(lambda: train_here(folder, *again))) == 0


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[dict[str, Any], float]]:
    """What a kind of training comes to undisturbed, and how many seconds it takes."""
    known: dict[str, tuple[dict[str, Any], float]] = {}

    def of(kind: str) -> tuple[dict[str, Any], float]:
        if kind not in known:
            folder = tmp_path_factory.mktemp(kind)
            began = time.monotonic()
            assert end(begin(lambda: train_here(folder, *arguments(kind, folder)))) == 0
            known[kind] = outcome(folder), time.monotonic() - began
        return known[kind]

    return of


@pytest.mark.parametrize("moment", [0.3, 0.6, 0.9])
def test_killed_at_a_call_of_the_file_system(moment: float, unbroken: Any, tmp_path: Path) -> None:
    """The call is chosen among those that write, from the first checkpoint on."""
    expected, _ = unbroken("closed_form")

    def act() -> None:
        left = int(moment * 60)

        def count(event: str, given: Any) -> None:
            nonlocal left
            if event in ("os.rename", "os.link", "os.symlink", "os.mkdir", "os.remove"):
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        train_here(tmp_path, *arguments("closed_form", tmp_path))

    assert end(begin(act)) == -signal.SIGKILL
    go_on("closed_form", tmp_path)
    assert_same(outcome(tmp_path), expected, "after the kill")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trial", range(4))
def test_killed_at_a_random_moment(kind: str, trial: int, unbroken: Any, tmp_path: Path) -> None:
    """Twenty kills: four moments of each of five kinds, uniform over the time that the training takes."""
    expected, seconds = unbroken(kind)
    share = random.Random(f"{kind} {trial}").uniform(0.1, 0.95)
    for attempt in range(6):
        (folder := tmp_path / str(attempt)).mkdir()
        child = begin(lambda folder=folder: train_here(folder, *arguments(kind, folder)))  # type: ignore[misc]
        time.sleep(share * seconds / 1.5**attempt)
        os.kill(child, signal.SIGKILL)
        if end(child) == -signal.SIGKILL:
            break
    else:  # a machine whose speed changes that much
        pytest.fail("the training always ended before it was killed")
    go_on(kind, folder)
    assert_same(outcome(folder), expected, f"{kind}, {trial}")
