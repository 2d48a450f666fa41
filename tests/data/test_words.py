"""`path` is the user's data and `cache` what the zoo fetches, in every module; `root` stays as a word for either."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.utils import get_object

from tests.conftest import ROOT, train_here
from zoo.data import Forecast, ImageFolder, Mnist5k
from zoo.support.signatures import ConfigError, check_call, current_arguments

SECTIONS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "configs" / "data").glob("*.yaml"))}
MODULES = {name: get_object(section["_target_"]) for name, section in SECTIONS.items()}


@pytest.mark.parametrize("name", MODULES)
def test_every_module_has_the_same_words(name: str) -> None:
    module = MODULES[name]
    words = inspect.signature(module.__init__).parameters
    assert "root" not in words
    assert ("download" in words) <= ("cache" in words)
    if "cache" in words or "path" in words:
        meant = "cache" if "cache" in words else "path"
        assert module.__init__.older_names == {"root": meant}
        assert check_call(module, {"root": "x"}) == check_call(module, {meant: "x"})
        assert check_call(module, {"root": "x", meant: "y"}) == [
            f"root is the older word for {meant}: give one of them, not both"
        ]


def test_root_is_what_it_meant(tmp_path: Path) -> None:
    assert Mnist5k(root=tmp_path).cache == Mnist5k(cache=tmp_path).root == tmp_path
    assert ImageFolder(root=tmp_path).path == ImageFolder(path=tmp_path).root == ImageFolder(tmp_path).path == tmp_path
    assert Forecast(root=tmp_path).cache == tmp_path
    assert Mnist5k(root=None).cache == Mnist5k().cache, "as recorded configurations have it"
    with pytest.raises(ConfigError, match="ImageFolder: root is the older word for path: give one of them, not both"):
        ImageFolder(root="x", path="y")
    with pytest.raises(TypeError, match="missing a required argument: 'path'"):
        ImageFolder(root=None)
    assert current_arguments(ImageFolder, {"root": "???", "path": "x"}) == {"path": "x"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch, started by the older word."""
    folder = tmp_path_factory.mktemp("older")
    train_here(folder, "experiment=grbf_wine", "data.root=here", "trainer.max_epochs=1", "logger=csv", "name=older")
    return (folder / "outputs" / "older" / "latest").resolve()


def test_the_older_word_starts_and_resumes_a_run(run: Path) -> None:
    home = run.parents[2]
    config = yaml.safe_load((run / ".hydra" / "config.yaml").read_text())
    assert config["data"]["cache"] == "here"
    assert "root" not in config["data"]
    assert "data.root=here" in yaml.safe_load((run / ".hydra" / "overrides.yaml").read_text())
    (run / ".hydra" / "config.yaml").write_text(  # as an earlier release wrote it
        yaml.safe_dump(config | {"data": {"root": "here"} | {k: v for k, v in config["data"].items() if k != "cache"}})
    )
    done = train_here(home, f"resume={run}", "trainer.max_epochs=2")
    assert "no longer the run" not in done.stderr
    done = train_here(home, f"resume={run}", "data.cache=there", "trainer.max_epochs=3")
    assert "data.cache = there (was here)" in done.stderr
    done = train_here(home, f"resume={run}", "data.root=there", "trainer.max_epochs=4")
    assert "data.cache = there (was here)" in done.stderr


def test_both_words_are_one_sentence(tmp_path: Path) -> None:
    done = train_here(tmp_path, "experiment=grbf_wine", "data.root=a", "data.cache=b", check=False)
    assert done.returncode == 1
    told = "error: data.root is the older word for data.cache: give one of them, not both"
    assert done.stderr.strip().endswith(told)
    done = train_here(tmp_path, "data=digits", "data.root=a", check=False)
    assert "data.root is unknown" in done.stderr


def test_a_run_keeps_the_defaults_that_it_began_with(tmp_path: Path) -> None:
    from zoo.training.launch import _continue_run

    hydra = tmp_path / ".hydra"
    hydra.mkdir()
    (hydra / "overrides.yaml").write_text(json.dumps(["model=unireplknet_audio", "data=audiofolder", "data.root=x"]))
    config: dict[str, Any] = {"model": {"backbone": "unireplknet_s", "drop_path_rate": 0.4}, "data": {"root": "x"}}
    (hydra / "config.yaml").write_text(json.dumps(config))
    kept = _continue_run(tmp_path, [])
    assert {"model.backbone=unireplknet_s", "model.drop_path_rate=0.4", "data.root=x"} <= set(kept)
    assert "model.backbone=unireplknet_t" in (typed := _continue_run(tmp_path, ["model.backbone=unireplknet_t"]))
    assert "model.backbone=unireplknet_s" not in typed
    assert not any("backbone" in text for text in _continue_run(tmp_path, ["model=unireplknet_t"]))
    assert not any("data.root" in text for text in _continue_run(tmp_path, ["data.path=y"]))
    (hydra / "config.yaml").write_text(json.dumps({"model": {"backbone": "${oc.env:HOME}"}}))
    assert not any("backbone" in text for text in _continue_run(tmp_path, []))
