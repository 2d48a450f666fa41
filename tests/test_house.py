"""The plan of the house: imports point one way, importing is instant, nothing private leaks."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

ZOO = ROOT / "zoo"

# what each room may import from the zoo besides itself, imports inside functions included
BELOW_MODELS = {"support", "ops", "kernels", "learners"}
ON_MODELS = {*BELOW_MODELS, "models"}
ALLOWED = {
    "support": set(),
    "ops": {"support"},
    "kernels": {"support", "ops"},
    "learners": {"support", "ops", "kernels"},
    "models": BELOW_MODELS,
    "data": {"support"},
    "optim": {"support"},
    "results": {"support"},
    "adapters": ON_MODELS,
    "estimators": ON_MODELS,
    "registry": ON_MODELS,
    "analysis": {*ON_MODELS, "registry", "data"},
    "tasks": {*ON_MODELS, "registry", "optim"},
    "training": {*ON_MODELS, "registry", "optim", "data", "tasks", "analysis", "results"},
    "tools": {*ON_MODELS, "registry", "data", "tasks", "adapters", "estimators", "analysis", "results"},
}
ALLOWED["benchmarks"] = {*ALLOWED["tools"], "tools"}
ALLOWED["testing"] = {*ON_MODELS, "registry", "estimators"}
ALLOWED["cli"] = {*ALLOWED["benchmarks"], "benchmarks"}
ALLOWED["__main__"] = {"cli"}


def room_of(path: Path) -> str:
    return path.relative_to(ZOO).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "zoo" else [node.module]
        rooms |= {[*name.split("."), "zoo"][1] for name in names if name.split(".")[0] == "zoo"}
    return rooms


@pytest.mark.parametrize("path", sorted(ZOO.rglob("*.py")), ids=lambda p: str(p.relative_to(ZOO)))
def test_imports_point_one_way(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":  # the public API names every room, lazily
        return
    assert room in ALLOWED, f"{room} is a new room: say in this test what it may import"
    assert imported_rooms(path) - {room, "zoo"} <= ALLOWED[room]


def test_base_tests_are_a_room_that_alone_needs_pytest() -> None:
    """Outsiders inherit them, so they stand on nothing of tests/, and whoever does not test needs no pytest."""
    import zoo.testing

    assert {"KernelTests", "OperatorTests", "LearnerTests", "ModelTests"} <= set(zoo.testing.__all__)
    for path in ZOO.rglob("*.py"):
        named = set(re.findall(r"^\s*(?:import|from) (pytest|tests)\b", path.read_text(), re.M))
        assert named <= ({"pytest"} if room_of(path) == "testing" else set()), path


def test_every_room_is_in_the_page() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    rooms = {path.name for path in ZOO.iterdir() if (path / "__init__.py").is_file()}
    assert "testing" in rooms
    assert not [room for room in rooms if f"| `{room}` |" not in page]


def test_tests_mirror_the_rooms() -> None:
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/*.py")}
    assert folders <= {path.name for path in ZOO.iterdir() if path.is_dir()}


def test_import_is_instant_and_registers_the_models() -> None:
    code = """
import sys, zoo
assert not {"torch", "timm", "lightning"} & set(sys.modules), "import zoo imported something heavy"
import timm
assert "unireplknet_a" in timm.list_models("unireplknet*")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_import_after_timm_registers_too() -> None:
    code = "import timm, zoo; assert timm.is_model('unireplknet_a')"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_public_names_exist_and_unknown_ones_are_told() -> None:
    import zoo

    for name in zoo.__all__:
        assert getattr(zoo, name) is not None
    with pytest.raises(AttributeError, match="create_model"):
        _ = zoo.create_modle


def test_library_code_never_prints() -> None:
    talkers = {"launch.py", "summary.py"}
    for path in ZOO.rglob("*.py"):
        calls = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call))
        prints = [n.lineno for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]
        assert not prints or path.name in talkers or room_of(path) == "cli", f"{path} prints at lines {prints}"


def test_hydra_stays_at_the_door() -> None:
    """A DictConfig ends in `launch`; the rest of the zoo sees plain containers."""
    for path in ZOO.rglob("*.py"):
        if path.name != "launch.py":
            assert not re.search(r"omegaconf|HydraConfig|GlobalHydra", path.read_text()), path


def test_version_is_the_same_everywhere() -> None:
    import tomllib

    import zoo

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == zoo.__version__
    assert f"version: {zoo.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {zoo.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_nothing_built_is_under_version_control() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = [Path(name) for name in listed.stdout.splitlines()]
    assert not [path for path in tracked if path.suffix in {".o", ".so", ".pyc", ".ckpt", ".log", ".onnx"}]
    assert {path.parts[0] for path in tracked if path.suffix == ".c"} == {"zoo"}
