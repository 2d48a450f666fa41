"""timm's own test suite over our models. Its source distribution is fetched, run and thrown away."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import timm

from zoo.registry.factory import list_models

PLUGIN = Path(__file__).parents[1]
SPATIAL = [name for name in list_models("test_*") if timm.get_pretrained_cfg(name).pool_size]
RUN_IN_FULL = " or ".join([*SPATIAL, "test_grbf", "unireplknet_z"])


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of timm's tests, of the version that is installed."""
    folder = tmp_path_factory.mktemp("timm")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        f"timm=={timm.__version__}",
        "--no-deps",
        "--no-binary",
        "timm",
    ]
    done = subprocess.run([*command, "-d", str(folder)], capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        pytest.skip(f"timm's source distribution cannot be fetched: {done.stderr.strip().splitlines()[-1:]}")
    with tarfile.open(next(folder.glob("timm-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(path for path in folder.glob("timm-*/tests"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("selection", [["-k", RUN_IN_FULL], ["-m", "cfg"]], ids=["small models", "cfg of all models"])
def test_timm_suite(suite: Path, selection: list[str]) -> None:
    pytest.importorskip("expecttest", reason="timm's tests import expecttest")
    env = {**os.environ, "PYTHONPATH": str(PLUGIN)}
    options = ["-p", "timm_suite", "-p", "no:cacheprovider", "-c", "../pyproject.toml", "--rootdir", ".."]
    command = [sys.executable, "-m", "pytest", *options, "test_models.py", "-q", *selection]
    done = subprocess.run(command, cwd=suite, env=env, capture_output=True, text=True, timeout=1700, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    print(done.stdout.strip().splitlines()[-1])  # how many; shown by `pytest -rP`
