"""Two processes, started by Lightning or by torchrun on two simulated nodes, reach what one process reaches."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, Train, train_here

pytestmark = pytest.mark.xdist_group("distributed")  # they share a run

# 100 images a step in every case: one process with 100, or two with 50 each
COMMON = (
    "experiment=digits",
    "model=test_unireplknet",
    "trainer.max_epochs=3",
    "optimizer.lr=2e-3",
    "hydra.run.dir=run",
)
TOLERANCE = 0.05  # batch-norm statistics are per process on a CPU, so the runs are alike, not equal


DDP = ("trainer=ddp_cpu", "data.batch_size=50", "callbacks=ema", "callbacks.resume.every_n_steps=4")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    folder = tmp_path_factory.mktemp("single")
    train_here(folder, *COMMON, "callbacks=ema", "data.batch_size=100", "logger=none")
    return metrics(folder / "run")


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which two processes have trained without interruption."""
    folder = tmp_path_factory.mktemp("ddp")
    command = [sys.executable, str(ROOT / "train.py"), *COMMON, *DDP]
    env = {k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def metrics(run: Path) -> dict[str, float]:
    return json.loads((run / "summary.json").read_text())["metrics"]


def assert_one_tidy_folder(folder: Path) -> None:
    assert [p.name for p in folder.iterdir()] == ["run"]
    assert len(list((folder / "run").glob("wandb/offline-run-*"))) == 1
    assert len(list((folder / "run").glob("csv/version_*"))) == 1


def test_ddp_on_two_cpu_processes(single: dict[str, float], ddp: Path) -> None:
    assert_one_tidy_folder(ddp)
    assert metrics(ddp / "run")["test/acc"] == pytest.approx(single["test/acc"], abs=TOLERANCE)


def test_torchrun_with_two_nodes(single: dict[str, float], tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for node in (0, 1):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes=2",
            f"--node-rank={node}",
            "--nproc-per-node=1",
        ]
        command += ["--master-addr=127.0.0.1", f"--master-port={port}", str(ROOT / "train.py"), *COMMON[:-1]]
        command += [
            "trainer=torchrun",
            "trainer.accelerator=cpu",
            "trainer.num_nodes=2",
            "data.batch_size=50",
            "callbacks=ema",
            "hydra.run.dir=run",
        ]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        env.pop("WANDB_SERVICE", None)
        processes.append(
            subprocess.Popen(
                command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert_one_tidy_folder(tmp_path)
    assert metrics(tmp_path / "run")["test/acc"] == pytest.approx(single["test/acc"], abs=TOLERANCE)


def test_interrupted_ddp_run_resumes(ddp: Path, train: Train, tmp_path: Path) -> None:
    kill = "{_target_:tests.training.kill_at.KillAt,step:21,signum:15}"
    setup = (*COMMON, *DDP, "logger=none")
    stopped = train(*setup, f"+callbacks.kill={kill}", check=False, PYTHONPATH=str(ROOT))
    assert "stopped by SIGTERM" in stopped.stderr, stopped.stderr
    train("resume=run", "+callbacks.kill=null", PYTHONPATH=str(ROOT))
    whole, resumed = last_weights(ddp / "run"), last_weights(tmp_path / "run")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    newest = sorted((run / "checkpoints").glob("step=*.ckpt"))[-1]
    return torch.load(newest, weights_only=True)["current_model_state"]
