"""Adapters on real architectures: timm's vision transformers and Hugging Face BERT, tiny and without weights."""

from __future__ import annotations

import copy
import json

import pytest
import timm
import torch
from torch import Tensor, nn

from zoo.files import CheckpointError
from zoo.models import to_deploy
from zoo.models.adapters import (
    AdapterConfig,
    adapter_names,
    add_adapter,
    count_parameters,
    delete_adapter,
    disable_adapters,
    inject_adapters,
    load_adapter,
    merge_adapters,
    save_adapter,
    set_adapter,
    unload_adapters,
)
from zoo.models.conversion import convert_feed_forward, convert_pooler

transformers = pytest.importorskip("transformers")


def bert(layers: int = 2, width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config).eval()


def vit() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=2, num_classes=5)
    return model.eval()


def run(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if hasattr(model, "patch_embed"):
        return model(torch.randn(2, 3, 32, 32, generator=generator))
    return model(input_ids=torch.randint(1, 40, (3, 7), generator=generator)).logits


def stir(model: nn.Module) -> None:
    """Make everything that is trained matter."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))


BUILD = {"bert": (bert, "classifier"), "vit": (vit, "head")}
FORMS = {
    "vector": {"form": "vector"},
    "bottleneck": {"form": "bottleneck", "bottleneck": 3, "layer_norm": True},
    "houlsby": {"form": "houlsby", "bottleneck": 3},
    "parallel": {"places": ("query", "value"), "centered": True},
    "all places": {"places": ("attention", "output", "query", "key", "value"), "projection": "hadamard"},
    "clipped": {"constant": -5.0, "normalize": 2.0, "init_weights": "bert", "save_projection": False},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", BUILD)
def test_life_of_an_adapter(family: str, form: str, tmp_path) -> None:
    """Identity at the start, names unchanged, only adapters trained; saved, loaded, disabled, deployed, unloaded."""
    build, head = BUILD[family]
    model = build()
    base, names = run(model), set(model.state_dict())
    config = AdapterConfig(num_features=6, modules_to_save=(head,), **FORMS[form])
    assert inject_adapters(model, config) is model
    torch.testing.assert_close(run(model), base, rtol=0, atol=0)
    renamed = {n for n in names if n.startswith(f"{head}.")}
    assert names - renamed <= set(model.state_dict())
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".adapters.default" in n for n in trained)
    counts = count_parameters(model)
    assert counts.adapters + counts.saved_modules == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (counts.random > 0) == (form != "houlsby")

    stir(model)
    tuned = run(model)
    assert (tuned - base).abs().max() > 1e-3
    run(model).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with disable_adapters(model):
        torch.testing.assert_close(run(model), base, rtol=0, atol=0)
    torch.testing.assert_close(run(copy.deepcopy(model)), tuned, rtol=0, atol=0)

    save_adapter(model, tmp_path / "saved")
    twin = load_adapter(build(), tmp_path / "saved")
    torch.testing.assert_close(run(twin), tuned, rtol=0, atol=0)
    torch.testing.assert_close(run(to_deploy(model)), tuned, rtol=1e-4, atol=1e-5)

    unload_adapters(model)
    assert set(model.state_dict()) == names
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(run(model), base, rtol=0, atol=0)
    with pytest.raises(TypeError, match="not linear"):
        merge_adapters(twin)


def test_several_adapters_of_one_model() -> None:
    model = bert()
    base = run(model)
    inject_adapters(model, {"num_features": 4, "modules_to_save": ["classifier"]}, "a")
    stir(model)
    a = run(model)
    add_adapter(model, AdapterConfig(form="houlsby", bottleneck=2, layers_to_transform=(-1,)), "b")
    torch.testing.assert_close(run(model), base, rtol=0, atol=0)
    stir(model)
    b = run(model)
    assert adapter_names(model) == ["a", "b"]
    assert count_parameters(model).adapters == 2 * (2 * 16 * 2 + 2 + 16)
    set_adapter(model, "a")
    torch.testing.assert_close(run(model), a, rtol=0, atol=0)
    delete_adapter(model, "a")
    torch.testing.assert_close(run(model), b, rtol=0, atol=0)
    delete_adapter(model, "b")
    assert adapter_names(model) == []
    torch.testing.assert_close(run(model), base, rtol=0, atol=0)


def test_adapters_train() -> None:
    """Both matrices move although one starts at zero, and the rest stands still."""
    model = inject_adapters(vit(), AdapterConfig(num_features=8, modules_to_save=("head",)))
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01)
    losses = []
    for _ in range(25):
        loss = nn.functional.cross_entropy(run(model), torch.tensor([1, 4]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.3 * losses[0]
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}


def test_timm_calls_keep_working() -> None:
    model = inject_adapters(vit(), AdapterConfig(num_features=4))
    model.set_grad_checkpointing()
    model.train()
    run(model).sum().backward()
    model.reset_classifier(7)
    assert run(model.eval()).shape == (2, 7)
    assert model.forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 5, 24)
    assert model.group_matcher(coarse=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(run(model)).all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"form": "vektor"}, "vector"),
        ({"places": ("atention",)}, "attention"),
        ({"places": ()}, "empty"),
        ({"num_features": 0}, "num_features=0"),
        ({"form": "houlsby", "places": ("query",)}, "form='vector'"),
        ({"layers_to_transform": (5,)}, "no layer 5"),
        ({"exclude_modules": "."}, "no module matches"),
        ({"modules_to_save": ("classifer",)}, "classifier"),
        ({"num_featurs": 4}, "num_features"),
    ],
)
def test_bad_configurations_are_told(config: dict, message: str) -> None:
    model = bert(1)
    names = set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        inject_adapters(model, config)
    assert set(model.state_dict()) == names


def test_models_and_names_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="no layer that adapters know"):
        inject_adapters(nn.Sequential(nn.Linear(3, 3)), AdapterConfig())
    model = inject_adapters(bert(1), AdapterConfig(num_features=4))
    with pytest.raises(ValueError, match="already an adapter"):
        inject_adapters(model, AdapterConfig())
    with pytest.raises(ValueError, match="default"):
        set_adapter(model, "defalt")
    with pytest.raises(ValueError, match="letters"):
        inject_adapters(model, AdapterConfig(), "a.b")


@pytest.mark.parametrize("damage", ["cut", "text", "config", "no file", "unknown entry", "pickle"])
def test_damaged_files_are_refused_and_nothing_changes(damage: str, tmp_path) -> None:
    folder = save_adapter(inject_adapters(bert(1), AdapterConfig(num_features=4)), tmp_path / "saved")
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-40])
    elif damage == "text":
        weights.write_text("no tensors")
    elif damage == "pickle":
        weights.write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    elif damage == "config":
        config.write_text(config.read_text()[:30])
    elif damage == "unknown entry":
        config.write_text(json.dumps({**json.loads(config.read_text()), "rank": 3}))
    else:
        weights.unlink()
    model = bert(1)
    base, names = run(model), set(model.state_dict())
    with pytest.raises(CheckpointError):
        load_adapter(model, folder)
    assert set(model.state_dict()) == names
    torch.testing.assert_close(run(model), base, rtol=0, atol=0)


@pytest.mark.parametrize("other", [lambda: bert(1, 8), lambda: bert(3), vit], ids=["width", "depth", "vit"])
def test_adapter_of_another_model_is_refused(other, tmp_path) -> None:
    folder = save_adapter(inject_adapters(bert(2), AdapterConfig(num_features=4)), tmp_path / "saved")
    model = inject_adapters(other(), AdapterConfig(num_features=3), "own")
    before = run(model)
    with pytest.raises(CheckpointError, match="another model"):
        load_adapter(model, folder)
    assert adapter_names(model) == ["own"]
    torch.testing.assert_close(run(model), before, rtol=0, atol=0)
    assert count_parameters(model).adapters > 0


# ---- conversion --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", BUILD)
@pytest.mark.parametrize("folded", [True, False])
def test_converted_feed_forwards(family: str, folded: bool) -> None:
    """Distinct layers, fewer parameters when folded, and an error that falls with the width."""
    build = BUILD[family][0]
    generator = torch.Generator().manual_seed(5)
    batches: list = [{"input_ids": torch.randint(1, 40, (40, 7), generator=generator)} for _ in range(3)]
    if family == "vit":
        batches = [torch.randn(40, 3, 32, 32, generator=generator) for _ in range(3)]
    errors = []
    for m in (4, 64):
        model = build()
        total = sum(p.numel() for p in model.parameters())
        base = run(model)
        report = convert_feed_forward(model, batches, num_features=m, folded=folded)
        assert [c.name for c in report] == [c.name for c in sorted(report)]
        errors.append(sum(c.error for c in report))
        after = sum(p.numel() for p in model.parameters())
        assert after - total == sum(c.after - c.before for c in report)
        assert run(model).shape == base.shape
    assert errors[1] < 0.5 * errors[0]
    with pytest.raises(ValueError, match="2 feed-forward"):
        convert_feed_forward(build(), batches, layers=(7,))


def test_converted_pooler() -> None:
    generator = torch.Generator().manual_seed(5)
    batches = [{"input_ids": torch.randint(1, 40, (60, 7), generator=generator)} for _ in range(3)]
    base = run(bert())
    logits = []
    for form in ("linear", "bundled"):
        model = convert_pooler(bert(), batches, num_features=64, form=form).eval()  # type: ignore[arg-type]
        logits.append(run(model))
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)
    assert (logits[0] - base).norm() < 0.3 * base.norm()
    assert run(convert_pooler(bert(), num_features=8)).shape == base.shape
    with pytest.raises(ValueError, match="0 poolers"):
        convert_pooler(vit(), batches)
    with pytest.raises(ValueError, match="'linear', 'bundled'"):
        convert_pooler(bert(), batches, form="folded")  # type: ignore[arg-type]


def test_nothing_to_convert() -> None:
    with pytest.raises(ValueError, match="no feed-forward"):
        convert_feed_forward(nn.Linear(3, 3), [])
    with pytest.raises(ValueError, match="no calibration"):
        convert_feed_forward(bert(1), [])
    with pytest.raises(ValueError, match="num_features=0"):
        convert_feed_forward(bert(1), [], num_features=0)
