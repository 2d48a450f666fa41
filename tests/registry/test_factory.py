"""Models by name: what is listed, what is built, what is said when it cannot be."""

from __future__ import annotations

import json
import re
import sys
import types
import typing
from pathlib import Path

import pytest
import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

import zoo
from zoo.models import to_deploy
from zoo.registry.factory import create_model, list_models
from zoo.support.files import RECORDS, CheckpointError, cache_folder, sha256_of

NAME = "test_unireplknet"
FILE = "unireplknet_a_in1k_224_acc77.03.pth"


# ---- listing -----------------------------------------------------------------------------------------------


def test_only_the_zoos_own_models_are_listed() -> None:
    names = list_models()
    assert "unireplknet_a" in names
    assert not [name for name in names if name.startswith("test_")], "models for tests are listed if asked for"
    assert NAME in list_models("test_*")
    assert NAME in list_models(["*", "test_*"])
    assert "resnet18" not in names
    assert set(names) < set(timm.list_models())
    assert names == sorted(names, key=lambda n: timm.list_models().index(n))
    assert zoo.list_models is list_models


def test_wildcards_and_tags() -> None:
    assert "unireplknet_a" in list_models("unireplknet_*")
    assert list_models("resnet*") == []
    assert NAME in list_models([NAME, "unireplknet_?"])
    released = list_models(pretrained=True)
    assert "unireplknet_a.in1k" in released
    assert NAME not in released
    assert list_models("unireplknet_a*", pretrained=True) == ["unireplknet_a.in1k"]


# ---- building ----------------------------------------------------------------------------------------------


def test_a_model_remembers_its_name_and_arguments_as_plain_values() -> None:
    model = create_model(NAME, num_classes=5, in_chans=1, depths=(1, 1, 1, 1), kernel_sizes=((3,), (5,), (3,), (0,)))
    assert model.zoo_config == {
        "model_name": NAME,
        "num_classes": 5,
        "in_chans": 1,
        "depths": [1, 1, 1, 1],
        "kernel_sizes": [[3], [5], [3], [0]],
    }
    assert json.loads(json.dumps(model.zoo_config)) == model.zoo_config
    again = create_model(**model.zoo_config)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert create_model("unireplknet_a.in1k", drop_path_rate=None).zoo_config == {"model_name": "unireplknet_a.in1k"}
    assert "device" not in create_model(NAME, device="meta").zoo_config


def test_deploy_form_is_built_on_request() -> None:
    torch.manual_seed(0)
    model = create_model(NAME)
    torch.manual_seed(0)
    merged = create_model(NAME, deploy=True)
    assert merged.zoo_config == {"model_name": NAME, "deploy": True}
    expected = to_deploy(model.eval()).state_dict()
    assert merged.state_dict().keys() == expected.keys()
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(merged.eval()(x), model(x), rtol=1e-3, atol=1e-4)
    assert create_model(**merged.zoo_config).state_dict().keys() == expected.keys()


def test_timms_own_models_and_options_work_too() -> None:
    assert create_model("test_resnet", num_classes=2).zoo_config == {
        "model_name": "test_resnet",
        "num_classes": 2,
    }
    maps = create_model(NAME, features_only=True, out_indices=(0, 2))(torch.randn(1, 3, 64, 64))
    assert len(maps) == 2


# ---- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unireplknt_a", "unknown model 'unireplknt_a'; did you mean unireplknet_a"),
        ("resnet81", "unknown model 'resnet81'; did you mean resnet"),
        ("qqq", "unknown model 'qqq'; allowed: .*unireplknet_a"),
        ("", "unknown model ''"),
        ("unireplknet_a.in2k", "unireplknet_a has no weights tagged 'in2k'; did you mean in1k"),
        ("runs/best", "'local-dir:<folder>'.*'hf-hub:<organisation>/<name>'.*checkpoint_path"),
        ("local:best", "looks like a place"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(name)


def test_unknown_arguments() -> None:
    with pytest.raises(
        TypeError,
        match=rf"{NAME} takes no argument 'num_clases'; did you mean num_classes.*; accepted: .*dims",
    ) as e:
        create_model(NAME, num_clases=3)
    assert e.value.__suppress_context__
    assert "\n" not in str(e.value)
    with pytest.raises(TypeError, match="did you mean deploy"):
        create_model(NAME, deploi=True)
    with pytest.raises(TypeError, match="'bogus'"):
        create_model("resnet18", bogus=True)


def test_errors_inside_a_constructor_are_not_disguised() -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 (whatever the model says)
        create_model(NAME, dims="wide")
    assert "takes no argument" not in str(caught.value)


def test_two_sources_of_weights_are_one_too_many() -> None:
    with pytest.raises(ValueError, match="choose one"):
        create_model(NAME, pretrained=True, checkpoint_path="x.pth")


def test_no_released_weights() -> None:
    with pytest.raises(CheckpointError, match=f"no weights were released for {NAME}: pass checkpoint_path"):
        create_model(NAME, pretrained=True)


@pytest.mark.parametrize("place", ["gone", "empty"])
def test_folders_that_hold_no_model(place: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"there is no folder|has no config\.json"):
        create_model(f"local-dir:{tmp_path / place}", pretrained=True)


# ---- weights -----------------------------------------------------------------------------------------------


@pytest.fixture
def released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A stand-in for the authors' file of UniRepLKNet-A, placed by hand in the cache."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    torch.manual_seed(1)
    model = create_model("unireplknet_a").eval()
    cache_folder().mkdir()
    torch.save({"model": model.state_dict()}, cache_folder() / FILE)
    monkeypatch.setitem(RECORDS, FILE, {"sha256": sha256_of(cache_folder() / FILE)})
    return model


def test_released_weights(released: nn.Module) -> None:
    x = torch.randn(1, 3, 64, 64)
    for name in ("unireplknet_a", "unireplknet_a.in1k"):
        torch.testing.assert_close(create_model(name, pretrained=True).eval()(x), released(x), rtol=0, atol=0)
    merged = create_model("unireplknet_a", pretrained=True, deploy=True)
    torch.testing.assert_close(merged.eval()(x), released(x), rtol=1e-3, atol=1e-4)
    assert merged.zoo_config == {"model_name": "unireplknet_a", "deploy": True}


def test_released_weights_for_other_classes_and_channels(released: nn.Module) -> None:
    model = create_model("unireplknet_a", pretrained=True, num_classes=10, in_chans=1).eval()
    x = torch.randn(1, 1, 64, 64)
    features = released.forward_features(x.expand(1, 3, 64, 64))  # summed weights see three equal channels
    torch.testing.assert_close(model.forward_features(x), features, rtol=1e-3, atol=1e-3)
    assert model.head.weight.shape == (10, released.num_features)


def test_weights_from_a_file(released: nn.Module, tmp_path: Path) -> None:
    model = create_model("unireplknet_a", checkpoint_path=cache_folder() / FILE)
    assert torch.equal(model.head.weight, released.head.weight)
    with pytest.raises(CheckpointError, match="has 1000 classes, the model 10"):
        create_model("unireplknet_a", num_classes=10, checkpoint_path=cache_folder() / FILE)
    (tmp_path / "empty.pth").touch()
    with pytest.raises(CheckpointError, match="empty"):
        create_model("unireplknet_a", checkpoint_path=tmp_path / "empty.pth")


def test_a_new_family_needs_nothing_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file registers a name, a record with a hash, and a map of the authors' names."""
    module = types.ModuleType("zoo.models.toy_family")
    monkeypatch.setitem(sys.modules, module.__name__, module)

    class Toy(nn.Module):
        def __init__(self, in_chans: int = 3, num_classes: int = 4, device=None, dtype=None) -> None:
            super().__init__()
            self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, 5
            self.stem = nn.Linear(in_chans, 5, device=device, dtype=dtype)
            self.head = nn.Linear(5, num_classes, device=device, dtype=dtype)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.stem(x))

    state = {f"authors_{k}": v for k, v in Toy().state_dict().items()}
    torch.save(state, tmp_path / "toy.pth")
    cfg = {"num_classes": 4, "input_size": (3, 8, 8), "first_conv": "stem", "classifier": "head"}
    cfg |= {"file": str(tmp_path / "toy.pth"), "notes": (f"sha256: {sha256_of(tmp_path / 'toy.pth')}",)}

    def checkpoint_filter_fn(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        return {k.removeprefix("authors_"): v for k, v in state.items()}

    def toy_family(pretrained: bool = False, **kwargs: object) -> nn.Module:
        return build_model_with_cfg(Toy, "toy_family", pretrained, **kwargs)

    module.__dict__.update(default_cfgs=generate_default_cfgs({"toy_family.ours": cfg}), Toy=Toy)
    module.__dict__["checkpoint_filter_fn"] = checkpoint_filter_fn
    toy_family.__module__ = Toy.__module__ = module.__name__
    register_model(toy_family)
    try:
        assert "toy_family.ours" in list_models(pretrained=True)
        assert RECORDS["toy.pth"]["model"] == "toy_family.ours"
        model = create_model("toy_family", pretrained=True)
        assert torch.equal(model.head.weight, state["authors_head.weight"])
        folder = zoo.save_pretrained(model, tmp_path / "saved")
        again = create_model(f"local-dir:{folder}", pretrained=True, num_classes=2)
        assert torch.equal(again.stem.weight, model.stem.weight)
        with pytest.raises(TypeError, match="accepted: in_chans, num_classes, device, dtype"):
            create_model("toy_family", width=3)
        torch.save(Toy().state_dict(), tmp_path / "toy.pth")
        with pytest.raises(CheckpointError, match="not the file on record"):
            create_model("toy_family", pretrained=True)
    finally:
        RECORDS.pop("toy.pth", None)
        timm.models._registry._clear_model_entries("toy_family")
        timm.models._registry._model_entrypoints.pop("toy_family")


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("test_unireplknet", {"in_chans": 0}),
        ("test_unireplknet", {"num_classes": -1}),
        ("test_snnk", {"in_chans": 0}),
        ("test_grbf", {"num_classes": -1}),
        ("test_grbf", {"img_size": (0, 2)}),
    ],
)
def test_sizes_are_checked_before_building(name: str, sizes: dict, tmp_path: Path) -> None:
    (key,) = sizes
    for build in (create_model, timm.create_model):
        with pytest.raises(ValueError, match=f"{name}: {key}.* = .*greater than"):
            build(name, **sizes)
    if key == "num_classes":
        config = {"architecture": name, "model_args": sizes, "pretrained_cfg": sizes, **sizes}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=key):
            create_model(f"local-dir:{tmp_path}")


@pytest.mark.parametrize("kwargs", [{}, {"num_classes": 3}], ids=["as described", "own classes"])
@pytest.mark.parametrize(
    "description",
    [
        {"architecture": "vit_giant_patch14_dinov2"},
        {"architecture": "unireplknet_xl"},
        {"architecture": "test_unireplknet", "model_args": {"dims": [10**9] * 4}},
    ],
    ids=["timm", "ours", "dims"],
)
def test_a_folder_describes_no_more_than_its_weights_fill(
    description: dict, kwargs: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo.save_pretrained(create_model("test_unireplknet", num_classes=2), tmp_path)
    assert create_model(f"local-dir:{tmp_path}", pretrained=True, **kwargs) is not None
    config = json.loads((tmp_path / "config.json").read_text())
    config = {"sha256": config["sha256"], "model_args": {}, "pretrained_cfg": {}, **description}
    (tmp_path / "config.json").write_text(json.dumps(config))
    drawn: list[int] = []
    plain = Tensor.normal_
    monkeypatch.setattr(Tensor, "normal_", lambda self, *a, **k: (drawn.append(self.numel()), plain(self, *a, **k))[1])
    with pytest.raises(CheckpointError, match=r"far more than its .* bytes of weights|needs more memory than there is"):
        create_model(f"local-dir:{tmp_path}", pretrained=True, **kwargs)
    assert sum(drawn) < 1e8


def test_every_value_of_a_description_has_the_declared_type(tmp_path: Path) -> None:
    """A text, where an architecture takes a number, is refused before the model is built."""
    checked, kinds = 0, {int: "3", float: "0.5", bool: "yes"}
    for arch in {type_of(name): name for name in reversed(list_models(["*", "test_*"]))}.values():
        config = {"architecture": arch, "model_args": {}}
        hints = typing.get_type_hints(type_of(arch).__init__)
        for name, wrong in {n: kinds[h] for n, h in hints.items() if h in kinds}.items():
            config["model_args"] = {name: wrong}
            (tmp_path / "config.json").write_text(json.dumps(config))
            with pytest.raises(
                CheckpointError, match=rf"config\.json: model_args\.{name} = '{wrong}': input should be"
            ):
                create_model(f"local-dir:{tmp_path}")
            checked += 1
    assert checked > 100
    for entries, told in (
        ({"num_classes": "3"}, "num_classes = '3'"),
        ({"num_features": "32"}, "num_features = '32'"),
        ({"pretrained_cfg": {"crop_pct": "1"}}, "pretrained_cfg.crop_pct = '1'"),
        ({"architecture": "resnet18", "model_args": {"in_chans": "3"}}, "model_args.in_chans = '3'"),
        ({"model_args": {"dims": ["8", 8, 8, 8]}}, "model_args.dims = "),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"architecture": "unireplknet_z"} | entries))
        with pytest.raises(CheckpointError, match=re.escape(f"config.json: {told}")):
            create_model(f"local-dir:{tmp_path}")


def type_of(arch: str) -> type:
    """The class that an architecture's entry point returns."""
    return typing.get_type_hints(timm.models.model_entrypoint(arch))["return"]
