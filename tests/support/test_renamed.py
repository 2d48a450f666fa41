"""Names of 0.1.0 go on working: imports, dotted names of configurations, and names that a file recorded."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.utils import get_object

from zoo.registry.trust import KINDS, TrustError, recorded_class
from zoo.support.renamed import MOVED, current

OLD = json.loads((Path(__file__).parent / "names_0.1.0.json").read_text())

pytestmark = pytest.mark.filterwarnings("ignore:zoo:DeprecationWarning")


@pytest.mark.parametrize("module", OLD["names"])
def test_every_public_name_is_found_where_it_was(module: str) -> None:
    found = importlib.import_module(module)
    assert [name for name in OLD["names"][module] if not hasattr(found, name)] == []


@pytest.mark.parametrize("old", MOVED)
def test_old_modules_are_the_new_ones(old: str) -> None:
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {MOVED[old][0]}") as caught:
        module = importlib.import_module(old)
    assert module.__all__
    (told,) = [w for w in caught if f"{old} is now" in str(w.message)]
    assert told.filename != importlib.import_module("zoo.support.renamed").__file__
    for name in module.__all__:
        assert any(getattr(module, name) is getattr(sys.modules[home], name, None) for home in MOVED[old])
    with pytest.raises(AttributeError, match=f"{old}.*{MOVED[old][0]}.*nothing_of_this"):
        _ = module.nothing_of_this


def test_moved_modules_exist_and_are_not_moved_again() -> None:
    for homes in MOVED.values():
        for home in homes:
            assert home not in MOVED
            importlib.import_module(home)


@pytest.mark.parametrize("target", OLD["targets"])
def test_every_recorded_class_resolves(target: str) -> None:
    assert isinstance(get_object(target), type)
    for kind in KINDS:
        try:
            found = recorded_class(target, kind)
        except TrustError:
            continue
        assert found is get_object(target)
        return
    raise AssertionError(f"{target} is refused wherever it stands")


def test_an_old_dotted_name_passes_the_gate_without_a_word(recwarn: pytest.WarningsRecorder) -> None:
    assert current("zoo.data.streams.ContinualData") == "zoo.data.task_streams.ContinualData"
    assert current("zoo.data.Digits") == "zoo.data.Digits"
    found = recorded_class("zoo.data.streams.ContinualData", "data")
    assert found.__module__ == "zoo.data.task_streams"
    assert not [w for w in recwarn if issubclass(w.category, DeprecationWarning) and "is now" in str(w.message)]
    for target in ("zoo.files.write_atomic", "zoo.data.streams.np", "zoo.data.streams.nothing", "zoo.data.streams"):
        with pytest.raises(TrustError):
            recorded_class(target, "data")


def test_old_names_cost_nothing_until_they_are_used() -> None:
    code = "import sys, zoo; assert 'torch' not in sys.modules; from zoo.tasks.optim import create_optimizer as c; " \
           "from zoo.optim import create_optimizer as d; assert c is d"  # fmt: skip
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)
