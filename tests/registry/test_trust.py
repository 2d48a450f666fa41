"""The gate between what is recorded and what is built: everything of the zoo's own passes, by kind."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from zoo.registry import plugins
from zoo.registry.trust import TrustError, kind_at, override_problem, recorded_class
from zoo.support.values import DamagedFileError, read_json, read_yaml
from zoo.tasks import ClassificationTask
from zoo.training import launch


def named(key: str, values: Any) -> Iterator[tuple[str, str]]:
    if isinstance(values, dict):
        if "_target_" in values:
            yield key, values["_target_"]
        for name, value in values.items():
            yield from named(f"{key}.{name}" if key else name, value)


def of_the_configurations() -> list[tuple[str, str]]:
    found = set()
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        group = path.relative_to(ROOT / "configs").parts[0]
        whole = group in ("experiment", "debug", "sweep", "train.yaml")
        found |= set(named("" if whole else group, yaml.safe_load(path.read_text()) or {}))
    return sorted((key, target) for key, target in found if not key.startswith("hydra."))  # nothing records those


def test_every_class_of_the_configurations_passes() -> None:
    found = of_the_configurations()
    assert len(found) > 30
    for key, target in found:
        place = "callbacks.*" if key.startswith("callbacks.") else "logger.*" if key.startswith("logger.") else key
        assert kind_at(key) is not None, key
        assert recorded_class(target, place).__name__ == target.rpartition(".")[2]


@pytest.mark.parametrize(
    ("place", "target"),
    [
        ("task", "zoo.data.Digits"),
        ("data", "zoo.tasks.ClassificationTask"),
        ("callbacks.*", "lightning.pytorch.loggers.CSVLogger"),
        ("logger.*", "zoo.training.callbacks.Throughput"),
        ("trainer", "lightning.pytorch.callbacks.EarlyStopping"),
        ("trainer.strategy", "lightning.Trainer"),
        ("task", "zoo.tasks.base.L.LightningModule"),
        ("task", "zoo.tasks.base.Task.forward"),
    ],
)
def test_a_class_of_another_kind_is_refused(place: str, target: str) -> None:
    with pytest.raises(TrustError, match=r"_target_ = .* is no "):
        recorded_class(target, place)


def test_an_installed_package_may_bring_classes_of_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("other_kernels")
    module.Mine = type("Mine", (ClassificationTask,), {"__module__": "other_kernels"})  # type: ignore[attr-defined]
    module.call = print  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "other_kernels", module)
    with pytest.raises(TrustError):
        recorded_class("other_kernels.Mine", "task")
    monkeypatch.setattr(plugins, "_modules", ["other_kernels"])
    assert recorded_class("other_kernels.Mine", "task") is module.Mine
    for target in ("other_kernels.call", "other_kernels.nothing"):
        with pytest.raises(TrustError):
            recorded_class(target, "task")
    with pytest.raises(TrustError):
        recorded_class("other_kernels.Mine", "data")


def test_plain_overrides_pass(tmp_path: Path) -> None:
    plain: list[tuple[str, Any, bool]] = [
        ("seed", 3, False),
        ("model", "unireplknet_a", True),
        ("callbacks", ["ema", "tabular"], True),
        ("data.root", "/home/me/pictures", False),
        ("scheduler.warmup_epochs", "${trainer.max_epochs}", False),
        ("logger.wandb.tags", ["a b", "c"], False),
        ("callbacks.best.folder", f"{tmp_path}/elsewhere/inside", False),
        ("output_dir", str(tmp_path), False),
        ("model.tuning_args", {"r": 4, "target_modules": ["query"]}, False),
    ]
    for key, value, choice in plain:
        assert override_problem(key, value, choice, run=tmp_path) is None, key


def test_a_folder_does_not_say_what_is_sent(tmp_path: Path) -> None:
    """A recorded `online` becomes `auto`, which asks the account of the person who resumes; what is typed stays."""
    (tmp_path / ".hydra").mkdir()
    recorded = ["seed=1", "logger.wandb.mode=online", "++logger.other.mode='online'", "+logger.third.mode=offline"]
    (tmp_path / ".hydra" / "overrides.yaml").write_text(json.dumps(recorded))
    kept = launch._continue_run(tmp_path, [])
    assert kept[:4] == ["seed=1", "logger.wandb.mode=auto", "++logger.other.mode=auto", recorded[3]]
    assert "logger.wandb.mode=online" in launch._continue_run(tmp_path, ["logger.wandb.mode=online"])
    told = override_problem("logger.wandb", {"mode": "online"}, False, run=tmp_path)
    assert told is not None
    assert "would send the run to a service" in told


def test_values_are_plain_and_bounded(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("a: [1, {b: c}]")
    assert read_yaml(path) == {"a": [1, {"b": "c"}]}
    path.write_text("a: &x [1]\nb: *x")
    with pytest.raises(DamagedFileError, match="reference"):
        read_yaml(path)
    path.write_text("[" + " " * 100 + "]")
    with pytest.raises(DamagedFileError, match="102 bytes, more than the 50"):
        read_json(path, 50)
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "link").symlink_to(path)
    with pytest.raises(DamagedFileError, match="outside its folder"):
        read_json(tmp_path / "inside" / "link")
    with pytest.raises(DamagedFileError, match="not a regular file"):
        read_json(tmp_path)


def test_a_state_names_only_files_of_its_own_folder(tmp_path: Path) -> None:
    from zoo.training.checkpointing import AtomicCheckpointIO, BestCheckpoint

    folder, other = tmp_path / "run" / "checkpoints", tmp_path / "thesis.ckpt"
    folder.mkdir(parents=True)
    other.write_text("mine")
    best = BestCheckpoint(folder, "val/acc")
    outside = f"{folder}/../../thesis.ckpt"
    names = {"best_model_path": outside, "kth_best_model_path": outside, "last_model_path": outside}
    best.load_state_dict({**best.state_dict(), **names, "best_k_models": {outside: 0.5}, "kept_loss": 1.0})
    assert best.best_model_path == best.kth_best_model_path == str(folder / "thesis.ckpt")
    assert list(best.best_k_models) == [str(folder / "thesis.ckpt")]
    AtomicCheckpointIO().remove_checkpoint(outside)
    assert other.exists()
