"""Modules that wait, and a quick import of timm that leaves nothing out."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from timm.models import _registry as registry

from zoo.support import lean
from zoo.support.deferred import defer, load

ROOT = Path(__file__).resolve().parents[2]
HEAVY = "{'lightning', 'torch._dynamo', 'torchmetrics', 'wandb', 'matplotlib', 'sklearn', 'scipy'}"


def run(code: str) -> str:
    """What code prints, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_module_waits_until_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "waits_here").mkdir()
    (tmp_path / "waits_here" / "__init__.py").write_text("print('package')\nfrom waits_here.inner import *\nx = 1\n")
    (tmp_path / "waits_here" / "inner.py").write_text("print('inner')\n__all__ = ['y']\ny = x = 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", sys.meta_path[:])
    defer(lambda name: name == "waits_here")
    waits_here = importlib.import_module("waits_here")
    inner = importlib.import_module("waits_here.inner")  # a part of it alone

    assert capsys.readouterr().out == "inner\n"
    with pytest.raises(AttributeError):
        waits_here.__version__  # noqa: B018
    assert (waits_here.x, waits_here.y, inner.x) == (1, 2, 2)
    assert capsys.readouterr().out == "package\n"
    load(waits_here)
    assert capsys.readouterr().out == ""
    with pytest.raises(AttributeError, match="no attribute 'z'"):
        waits_here.z  # noqa: B018


def test_every_model_of_timm_is_found_in_its_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean, "_installed", lambda: True)
    lean._sources.cache_clear()
    try:
        found = lean._sources()
    finally:
        lean._sources.cache_clear()
    own = {name for name, entry in registry._model_entrypoints.items() if entry.__module__.startswith("timm.")}
    assert len(own) > 1000
    assert own <= found.keys()
    for name in own:
        assert found[name] == f"timm.models.{registry._model_to_module[name]}", name


def test_a_command_finds_models_of_timm_when_they_are_named() -> None:
    code = f"""
import sys
from zoo.support import lean
lean.install()
import zoo, timm
zoo.list_models()
assert len([n for n, m in sys.modules.items() if type(m).__name__ == "_Deferred" and n.startswith("timm.models.")]) > 60
assert not {HEAVY} & {{n for n, m in sys.modules.items() if type(m).__name__ == "module"}}
assert timm.is_model("convnext_atto") and not timm.is_model("convnext_at")
assert zoo.create_model("mobilenetv3_small_050", num_classes=3).num_classes == 3
assert timm.create_model("resnet18", num_classes=2).num_classes == 2
from timm.models import Beit  # by its class
assert Beit is timm.models.beit.Beit
try:
    zoo.create_model("convnext_ato")
except ValueError as error:
    assert "did you mean convnext_atto" in str(error)
assert timm.models._registry.is_model("vit_tiny_patch16_224_in21k")  # of an older name
"""
    run(code)


def test_commands_import_only_what_they_need(tmp_path: Path) -> None:
    from sklearn.datasets import load_wine

    data = load_wine()
    (tmp_path / "rows.csv").write_text("\n".join([",".join(data.feature_names), ",".join(map(str, data.data[0]))]))
    code = f"""
import contextlib, io, sys
from zoo.cli import main
for command in ("list", "list --pretrained", "info unireplknet_q", "info test_unireplknet", "predict grbf.wine"):
    words = command.split() + ["{tmp_path}/rows.csv"] * command.startswith("predict")
    with contextlib.redirect_stdout(io.StringIO()) as told:
        assert main(words) == (command == "info unireplknet_q"), command
    heavy = {HEAVY} & {{n for n, m in sys.modules.items() if type(m).__name__ == "module"}}
    assert not heavy, (command, heavy)
"""
    run(code)
