"""`docs/add-a-family.md`, done: a family in a package of its own, found, trained, saved, loaded and exported."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGE = ROOT / "docs" / "add-a-family.md"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the page in a folder, with the metadata that installing it would write."""
    folder = tmp_path_factory.mktemp("my-kernels")
    for name, content in re.findall(r"<!-- file (\S+) -->\n```\w+\n(.*?)```", PAGE.read_text(), re.DOTALL):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (folder / "my_kernels" / "__init__.py").touch()
    (folder / "my_kernels" / "configs" / "__init__.py").touch()
    project = (folder / "pyproject.toml").read_text()
    groups = re.findall(r"^\[project\.entry-points\.\"(.*)\"\]\n((?:.+\n)+)", project, re.M)
    assert len(groups) == 2
    info = folder / "my_kernels-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-kernels\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(
        "\n".join(f"[{name}]\n{entries}" for name, entries in groups).replace('"', "")
    )
    return folder


def run(package: Path, folder: Path, *command: str, check: bool = True) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{package}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_family_of_another_package(package: Path, tmp_path: Path) -> None:
    searchpath = "hydra.searchpath=[pkg://my_kernels.configs]"
    out = run(
        package,
        tmp_path,
        str(ROOT / "train.py"),
        searchpath,
        "experiment=gaussian_digits",
        "logger=csv",
        "hydra.run.dir=run",
    )
    assert "test/acc" in out
    accuracy = json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]["test/acc"]
    assert accuracy > 0.5
    code = """
import zoo, torch, timm
assert "gaussian_mlp" in zoo.list_models() and timm.is_model("gaussian_mlp")
model = zoo.create_model("local-dir:run/model", pretrained=True, num_classes=4).eval()
assert type(model).__module__ == "my_kernels.gaussian_mlp"
assert model(torch.randn(2, 1, 8, 8)).shape == (2, 4)
from zoo.cli import main
assert main(["validate", "run"]) == 0
assert main(["probe", "centers", "run", "count=3", "--out", "centers.png"]) == 0
assert main(["export", "run", "--out", "deployed", "--format", "onnx"]) == 0
try:
    zoo.create_model("gaussian_mlp", unit=3)
except TypeError as error:
    assert "did you mean units" in str(error)
"""
    out = run(package, tmp_path, "-c", code)
    assert "reproduced" in out
    assert "largest difference" in out
    assert "centers.png: 3 centres" in out


def test_a_broken_family_is_told_and_left_out(package: Path, tmp_path: Path) -> None:
    (tmp_path / "bad_kernels.py").write_text("raise RuntimeError('half written')\n")
    info = tmp_path / "bad_kernels-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad-kernels\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[kernel_zoo.models]\nbad = bad_kernels\n")
    out = run(tmp_path, tmp_path, "-c", "import zoo; print(len(zoo.list_models('grbf*')) > 0)")
    assert "bad_kernels, cannot be imported: half written" in out
    assert "True" in out
