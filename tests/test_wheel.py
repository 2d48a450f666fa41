"""A wheel that is built, installed elsewhere and used there."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.xdist_group("wheel")  # they share one


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the unpacked wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder / "dist"),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (wheel,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(code: str, installed: Path, tmp_path: Path) -> str:
    # -P and without the source tree: only the unpacked wheel and the environment's own packages can be imported
    script = f"import sys; sys.path[:] = [{str(installed)!r}, *(p for p in sys.path if p != {str(ROOT)!r})]\n{code}"
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        cwd=tmp_path,
        env={**os.environ},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_holds_what_is_needed(installed: Path) -> None:
    for name in (
        "zoo/py.typed",
        "zoo/configs/train.yaml",
        "zoo/configs/experiment/mnist5k.yaml",
        "zoo/models/unireplknet.py",
    ):
        assert (installed / name).is_file(), name
    assert not (installed / "tests").exists()


def test_wheel_models_work_outside_the_source_tree(installed: Path, tmp_path: Path) -> None:
    out = run(
        "import zoo; m = zoo.create_model('test_unireplknet', num_classes=3); print(zoo.__file__, m.num_classes)",
        installed,
        tmp_path,
    )
    assert out.split() == [str(installed / "zoo" / "__init__.py"), "3"]


def test_wheel_trains_outside_the_source_tree(installed: Path, tmp_path: Path) -> None:
    code = """
sys.argv = ["kernel-zoo-train", "experiment=digits", "model=test_unireplknet", "debug=fast", "hydra.run.dir=run"]
from zoo.training.launch import main
main()
"""
    assert "test/acc" in run(code, installed, tmp_path)


def test_wheel_brings_the_shipped_weights(installed: Path, tmp_path: Path) -> None:
    code = """
import zoo
from zoo.models import shipped
assert shipped.check() == [], shipped.check()
model = zoo.create_model("grbf.wine", pretrained=True, num_classes=5)
print(shipped.folder(), len(shipped.records()), model.num_classes)
"""
    where, count, classes = run(code, installed, tmp_path).split()
    assert (where, classes) == (str(installed / "zoo" / "weights"), "5")
    assert int(count) == len(list((ROOT / "checkpoints").glob("*.json")))
