"""Weights that ship: every record is whole, every file is the one on record, and each loads in every way."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg

import zoo
from tests.conftest import ROOT
from zoo.registry import bundled_weights
from zoo.registry.checkpoints import CheckpointError
from zoo.support.files import RECORDS
from zoo.tools.info import example, listing

NAMES = sorted(p.stem for p in (ROOT / "checkpoints").glob("*.json"))
FAMILIES = {"gkcl", "grbf", "snnk", "terminator", "unireplknet"}


def test_every_family_ships_and_nothing_is_wrong_with_the_folder() -> None:
    assert bundled_weights.folder() == ROOT / "checkpoints"
    assert bundled_weights.check() == []
    assert {name.split("_")[0].split(".")[0] for name in NAMES} >= FAMILIES
    assert {n for n in zoo.list_models(pretrained=True) if n in bundled_weights.records()} == set(NAMES)


def test_published_weights_stand_in_the_same_list_and_are_marked() -> None:
    rows = {row["name"]: row for row in listing(pretrained=True)}
    assert "not retrained" in rows["unireplknet_a.in1k"]["weights"]
    assert rows["unireplknet_a.in1k"]["published_top1"] == 77.03
    for name in NAMES:
        assert rows[name]["weights"].startswith("shipped")
        assert rows[name]["n"] >= 1


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_offline_by_name_in_the_zoo_and_in_timm(name: str) -> None:
    model = zoo.create_model(name, pretrained=True).eval()
    record = bundled_weights.record(name)
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]
    inputs = example(model)
    with torch.no_grad():
        expected = model(inputs)
        torch.testing.assert_close(timm.create_model(name, pretrained=True).eval()(inputs), expected)
        torch.testing.assert_close(zoo.create_model(**model.zoo_config, pretrained=True).eval()(inputs), expected)
    assert list(model.pretrained_cfg.get("label_names") or ()) == record["class_names"]
    fresh = zoo.create_model(name).eval()  # the tag without its weights
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.mark.parametrize("name", NAMES)
def test_other_classes_keep_the_features(name: str) -> None:
    if name.startswith("gkcl"):  # its classes are what it has learnt
        with pytest.raises(CheckpointError, match="other sizes"):
            zoo.create_model(name, pretrained=True, num_classes=7)
        return
    model, other = (zoo.create_model(name, pretrained=True, num_classes=n).eval() for n in (None, 7))
    inputs = example(model)
    with torch.no_grad():
        assert other(inputs).shape == (2, 7)
        for made in (model, other):
            made.reset_classifier(0)
        torch.testing.assert_close(model(inputs), other(inputs))


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("unireplknet_z")])
def test_other_channels_and_feature_maps(name: str) -> None:
    size = bundled_weights.record(name)["preprocessing"]["input_size"]
    colour = zoo.create_model(name, pretrained=True, in_chans=3).eval()
    assert colour(torch.randn(1, 3, *size[1:])).shape == (1, 10)
    maps = zoo.create_model(name, pretrained=True, features_only=True).eval()
    assert len(maps(torch.randn(1, *size))) == len(maps.feature_info)


def copied(tmp_path: Path, **changes: Any) -> Path:
    """A folder with one weight of our own and a changed record."""
    name = "grbf.wine"
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    shutil.copy(bundled_weights.weights_path(name), folder)
    record = json.loads((bundled_weights.folder() / f"{name}.json").read_text())
    (folder / f"{name}.json").write_text(json.dumps({**record, **changes}))
    return folder


DAMAGE: dict[str, tuple[dict[str, Any], str]] = {
    "another name": ({"name": "grbf.other"}, "which its file name must say"),
    "another architecture": ({"architecture": "other"}, "architecture.tag"),
    "a hash that is none": ({"sha256": "12"}, "64 hexadecimal"),
    "no metric": ({"metric": {}}, "lacks metric.name"),
    "a wrong type": ({"class_names": "abc"}, "wrong type, str"),
    "an unknown entry": ({"pretrained_cfg": {"colour": 1}}, "timm does not know: colour"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_records_are_told(kind: str, tmp_path: Path) -> None:
    changes, told = DAMAGE[kind]
    folder = copied(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=told):
        bundled_weights.record("grbf.wine", folder)
    assert any(told in problem for problem in bundled_weights.check(folder))


def test_a_damaged_record_leaves_the_others_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = copied(tmp_path)
    (folder / "grbf.bad.json").write_text("[1]")
    with caplog.at_level(logging.WARNING):
        assert list(bundled_weights.records(folder)) == ["grbf.wine"]
    assert "grbf.bad.json" in caplog.text


def test_a_changed_weight_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copied(tmp_path)
    path = folder / "grbf.wine.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert any("not the file on record" in problem for problem in bundled_weights.check(folder))
    assert RECORDS[path.name]["sha256"] == bundled_weights.record("grbf.wine")["sha256"]
    with pytest.raises(CheckpointError, match="not the file on record"):
        zoo.create_model("grbf.wine", pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    with pytest.raises(CheckpointError, match="not the file on record"):
        timm.create_model("grbf.wine", pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    cfg = replace(get_pretrained_cfg("grbf.wine"), file=str(path))
    monkeypatch.setitem(timm.models._registry._model_pretrained_cfgs, "grbf.wine", cfg)
    with pytest.raises(CheckpointError, match="not the file on record"):
        timm.create_model("grbf.wine", pretrained=True)
    timm.create_model("grbf.wine")  # fresh: no file is looked at
    path.unlink()
    with pytest.raises(CheckpointError, match="no file"):
        timm.create_model("grbf.wine", pretrained=True)


def test_timm_takes_other_weights_that_the_caller_names(tmp_path: Path) -> None:
    own = zoo.create_model("grbf.wine")
    zoo.save_pretrained(own, tmp_path)
    file = {"file": str(tmp_path / "model.safetensors")}
    model = timm.create_model("grbf.wine", pretrained=True, pretrained_cfg_overlay=file)
    torch.testing.assert_close(model.state_dict(), own.state_dict())


def test_orphans_and_sizes_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copied(tmp_path)
    (folder / "grbf.lost.safetensors").write_bytes(b"x")
    monkeypatch.setattr(bundled_weights, "MAX_BYTES", 10)
    monkeypatch.setattr(bundled_weights, "MAX_FOLDER", 10)
    problems = " ".join(bundled_weights.check(folder))
    assert "no record beside it" in problems
    assert problems.count("more than") == 2


def test_unknown_weights_name_the_nearest() -> None:
    with pytest.raises(CheckpointError, match=r"grbf\.wine"):
        bundled_weights.record("grbf.wien")
    with pytest.raises(CheckpointError, match="no weights named"):
        bundled_weights.record("../grbf.wine")
    with pytest.raises(ValueError, match="did you mean mnist5k"):
        zoo.create_model("unireplknet_z.mnist5", pretrained=True)


def test_an_unknown_entry_of_an_input_record_is_refused_with_the_nearest() -> None:
    from zoo.support import inputs

    record = {"kind": "image", "channels": 1, "size": [8, 8], "meen": [0.5]}
    with pytest.raises(inputs.InputError, match="meen: there is no such entry; did you mean mean"):
        inputs.check(record)
    columns = {"kind": "table", "count": 2, "variables": [{"name": "a", "valeus": ["x", "y"]}]}
    with pytest.raises(inputs.InputError, match=r"variables\.0\.valeus: there is no such entry; did you mean values"):
        inputs.check(columns)
    assert inputs.check({"kind": "of a plug-in", "anything": 1})
