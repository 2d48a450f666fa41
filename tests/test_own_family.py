"""`docs/add-a-family.md`, done: a family, a kernel and a learner in a package of their own, found, tested and used."""

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
    assert {name for name, _ in groups} == {
        f"kernel_zoo.{what}" for what in ("models", "kernels", "learners", "probes")
    }
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


def test_a_kernel_and_a_learner_of_another_package(package: Path, tmp_path: Path) -> None:
    code = """
import sys, numpy as np, torch, zoo
from zoo.estimators import GPRegressor, KernelStreamClassifier
from zoo.kernels import create_kernel
from zoo.learners.kernel_ridge import KernelRidgeHead
from zoo.cli import main
assert main(["list", "--of", "kernels"]) == main(["list", "shrunken*", "--of", "learners"]) == 0
X, y = np.random.RandomState(0).randn(40, 3), np.repeat(["a", "b"], 20)
X[20:] += 4
assert KernelStreamClassifier(head="shrunken_mean", shrinkage=2.0, random_state=0).fit(X, y).score(X, y) > 0.9
assert GPRegressor(create_kernel("cauchy"), max_iter=5, restarts=0).fit(X, X[:, 0]).score(X, X[:, 0]) > 0.9
assert KernelRidgeHead("cauchy")(torch.eye(4), torch.eye(4), torch.eye(4)).argmax(1).tolist() == [0, 1, 2, 3]
for name, made in (("caushy", lambda: create_kernel("caushy")), ("shrunk_mean", lambda: KernelStreamClassifier(
    head="shrunk_mean").fit(X, y))):
    try:
        made()
    except ValueError as error:
        print(error)
import pytest
assert pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:randomly", PACKAGE]) == 0
from zoo.training.launch import main as train
sys.argv = ["train.py", "experiment=gkcl_digits", "model=test_kcl", "model.kernel=cauchy", "logger=csv",
            "hydra.run.dir=run"]
train()
import json
assert json.load(open("run/summary.json"))
model = zoo.create_model("local-dir:run/model", pretrained=True)
assert type(model.head.kernel).__module__ == "my_kernels.cauchy"
"""
    out = run(package, tmp_path, "-c", code.replace("PACKAGE", repr(str(package))))
    assert "cauchy  1 / (1 + |x - z|^2)." in re.sub(" {3,}", "  ", out)
    assert "shrunken_mean  nearest class means, drawn to the mean of all rows" in out
    assert "unknown kernel 'caushy'; did you mean cauchy" in out
    assert "there is no learner 'shrunk_mean'; did you mean shrunken_mean" in out
    assert re.search(r"[4-9]\d passed", out)


def test_a_broken_family_is_told_and_left_out(package: Path, tmp_path: Path) -> None:
    (tmp_path / "bad_kernels.py").write_text("raise RuntimeError('half written')\n")
    info = tmp_path / "bad_kernels-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad-kernels\nVersion: 1\n")
    groups = [f"[kernel_zoo.{what}]\nbad = bad_kernels\n" for what in ("models", "kernels", "learners", "estimators")]
    (info / "entry_points.txt").write_text("".join(groups))
    code = """
import zoo
stream = zoo.create_estimator("kernel_stream_classifier")
print(len(zoo.list_models("grbf*")) > 0, zoo.create_model("test_kcl").head.kernel, stream._learner().__name__)
"""
    out = run(tmp_path, tmp_path, "-c", code)
    for what in ("models", "kernels", "learners", "estimators"):
        assert f"bad of kernel_zoo.{what}, bad_kernels, cannot be imported: half written" in out
    assert "True Linear() mixture_lda" in out


def test_only_packages_that_bring_models_may_be_named_by_a_file(package: Path, tmp_path: Path) -> None:
    """A package that registers kernels or learners alone opens no door: its classes are not built for a record."""
    (tmp_path / "small.py").write_text("import lightning\nclass Mine(lightning.pytorch.Callback): ...\n")
    info = tmp_path / "small-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: small\nVersion: 1\n")
    groups = [f"[kernel_zoo.{what}]\nsmall = small\n" for what in ("kernels", "learners", "estimators")]
    (info / "entry_points.txt").write_text("".join(groups))
    code = """
from zoo.kernels import kernel_names
from zoo.registry import families, trust
kernel_names(), families.load()
try:
    trust.recorded_class("small.Mine", "callbacks.*")
except trust.TrustError as error:
    print("refused:", error)
"""
    assert "refused: callbacks._target_ = 'small.Mine'" in run(tmp_path, tmp_path, "-c", code)
