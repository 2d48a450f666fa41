"""Adapters on real architectures: timm's vision transformers and Hugging Face BERT, tiny and without weights."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from zoo.adapters import (
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
from zoo.adapters.conversion import convert_feed_forward, convert_pooler
from zoo.models import to_deploy
from zoo.support.files import CheckpointError

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
    assert names <= set(model.state_dict())
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


def test_an_adapter_of_another_library_keeps_its_files(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.safetensors").write_text("mine")
    with pytest.raises(CheckpointError, match="is not the configuration of an adapter"):
        save_adapter(inject_adapters(bert(1), AdapterConfig(num_features=4)), tmp_path)
    assert (tmp_path / "adapter_config.json").read_text() == '{"peft_type": "LORA"}'
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json cannot be read"):
        save_adapter(inject_adapters(bert(1), AdapterConfig(num_features=4)), tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_text() == "mine"


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


# ---- what a model calls ------------------------------------------------------------------------------------

TINY: dict[str, dict] = {
    "beit_base_patch16_224": {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 32},
    "eva02_tiny_patch14_224": {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 28},
    "eva02_base_patch14_224": {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 28},
    "swinv2_tiny_window8_256": {"depths": (1, 1), "embed_dim": 24, "num_heads": (1, 2), "img_size": 64},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1), "embed_dim": 24, "num_heads": (1, 2), "img_size": 56},
}
READ = {"beit_base_patch16_224": "blocks.0.attn.qkv", "eva02_tiny_patch14_224": "blocks.0.attn.qkv"}
READ["swinv2_tiny_window8_256"] = "layers.0.blocks.0.attn.qkv"


def tiny(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3, **TINY[name])


def image(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, *model.patch_embed.img_size, generator=generator)  # type: ignore[union-attr, misc]


@pytest.mark.parametrize("name", TINY)
def test_layers_that_are_read_and_not_called_are_refused(name: str) -> None:
    """BEiT, EVA-02 and Swin V2 read `qkv.weight` themselves; where the layer is called, every adapter is trained."""
    model = tiny(name)
    stir(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    config = {"num_features": 4, "places": ("query", "key", "value")}
    drawn = torch.get_rng_state()
    if name in READ:
        with pytest.raises(ValueError, match=rf"{READ[name]}.*never called in a forward pass"):
            inject_adapters(model, config)
        assert model.training
        assert all(not m._forward_hooks for m in model.modules())
        assert all(p.requires_grad for p in model.parameters())
        config["places"] = ("attention", "output")
    with torch.no_grad():  # how attention is computed depends on who has a gradient
        base = model.eval()(image(model))
    inject_adapters(model, config)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert {k: v for k, v in model.state_dict().items() if ".adapters." not in k}.keys() == before.keys()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    with torch.no_grad():
        assert torch.equal(model(image(model)), base)
    stir(model)
    model(image(model)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.requires_grad)
    with disable_adapters(model), torch.no_grad():
        assert torch.equal(model(image(model)), base)


def test_looking_at_a_model_leaves_no_trace() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls, self.extra = self.calls + 1, x
            self.seen += torch.rand(())
            return nn.functional.dropout(x, 0.5)

    model: nn.Module = vit().train()
    model.norm_pre, model.blocks[0].norm1 = Counting(), nn.BatchNorm1d(5)  # type: ignore[union-attr, operator]
    state, drawn = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    inject_adapters(model, {"num_features": 4})
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    assert model.norm_pre.calls == 0  # type: ignore[union-attr]
    assert not hasattr(model.norm_pre, "extra")
    assert all(m.training for m in model.modules())


class Wrapped(nn.Module):
    """Somebody's model: no example input of its own, and a layer that is never called."""

    def __init__(self, used: int) -> None:
        super().__init__()
        self.text, self.head = bert(2).bert, nn.Linear(16, 2)  # type: ignore[union-attr]
        self.used = used

    def forward(self, ids: Tensor, scale: float = 1.0) -> Tensor:
        h = self.text.embeddings(ids)
        for layer in self.text.encoder.layer[: self.used]:  # type: ignore[union-attr, index]
            h = layer(h, None)
        return self.head(h[:, 0]) * scale


def test_an_example_of_ones_own() -> None:
    ids = torch.ones(1, 4, dtype=torch.long)
    config = {"num_features": 4, "modules_to_save": ("head",)}
    for example in (ids, (ids, 2.0), {"ids": ids}):
        inject_adapters(Wrapped(2), config, example=example)
        with pytest.raises(ValueError, match=r"layer\.1\.attention\.output\.dropout.*never called"):
            inject_adapters(Wrapped(1), config, example=example)
    with pytest.raises(ValueError, match=r"could be run.*pass example="):
        inject_adapters(Wrapped(2), config, example=torch.ones(1, 4))
    with pytest.warns(RuntimeWarning, match="nothing shows that head is called"):
        inject_adapters(Wrapped(2), config)


# ---- any layer ---------------------------------------------------------------------------------------------


class LowRank(nn.Linear):
    """A linear layer with a part of its own."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.a, self.b = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.a.mT @ self.b.mT


class Eight(nn.Linear):
    """Weights in eight bits."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.weight = nn.Parameter((self.weight.detach() * 127).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT.to(x.dtype) / 127


def patched(inputs: int, outputs: int) -> nn.Module:
    layer = nn.Linear(inputs, outputs)
    layer.forward = lambda x: 2 * nn.Linear.forward(layer, x)  # type: ignore[method-assign]
    return layer


def dynamic(inputs: int, outputs: int) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = nn.Sequential(nn.Linear(inputs, outputs))
        return torch.ao.quantization.quantize_dynamic(layers, {nn.Linear}, dtype=torch.qint8)[0]


def normed(inputs: int, outputs: int) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(inputs, outputs))


LAYERS: dict[str, Any] = {
    "low rank": LowRank,
    "int8": Eight,
    "patched": patched,
    "dynamic int8": dynamic,
    "weight norm": normed,
    "parametrised": lambda i, o: nn.utils.parametrizations.weight_norm(nn.Linear(i, o)),
    "no bias": lambda i, o: nn.Linear(i, o, bias=False),
    "conv1d": lambda i, o: transformers.pytorch_utils.Conv1D(o, i),
}


@pytest.mark.parametrize("family", BUILD)
@pytest.mark.parametrize("kind", LAYERS)
def test_any_kind_of_layer_keeps_its_own_forward(kind: str, family: str) -> None:
    """Query, key, value, projections and head of any kind: start, disabled and unloaded state are the base model's."""
    build, head = BUILD[family]
    model = build()
    torch.manual_seed(2)
    for name, module in list(model.named_modules()):
        if name.endswith(("query", "value", "attn.qkv", "attn.proj", "output.dense", "mlp.fc2", head)):
            parent, _, last = name.rpartition(".")
            new = LAYERS[kind](module.in_features, module.out_features).eval()  # type: ignore[arg-type]
            setattr(model.get_submodule(parent), last, new)
    base, names, types = run(model), set(model.state_dict()), [type(m) for m in model.modules()]
    places = ("attention", "output", "query", "key", "value")
    saved = () if kind in ("dynamic int8", "patched") else (head,)  # nothing to train; its forward is one object's
    inject_adapters(model, AdapterConfig(places=places, num_features=4, modules_to_save=saved))
    assert torch.equal(run(model), base)
    assert names <= set(model.state_dict())
    stir(model)
    assert (run(model) - base).abs().max() > 1e-3
    if kind != "dynamic int8":  # torch gives no gradient through it
        run(model).square().sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with disable_adapters(model):
        assert torch.equal(run(model), base)
    unload_adapters(model)
    assert torch.equal(run(model), base)
    assert set(model.state_dict()) == names
    assert [type(m) for m in model.modules()] == types
    assert all(not m._forward_hooks for m in model.modules())


def test_adapters_have_the_type_of_their_own_layer() -> None:
    """A bfloat16 encoder behind float32 embeddings: types meet by a cast, or under autocast."""
    model: Any = bert()
    model.bert.encoder.to(torch.bfloat16)
    model.bert.embeddings.register_forward_hook(lambda _, args, y: y.bfloat16())
    model.classifier.register_forward_pre_hook(lambda _, args: args[0].float())
    model.bert.pooler.to(torch.bfloat16)
    base = run(model)
    inject_adapters(model, AdapterConfig(places=("output", "query"), num_features=4, layer_norm=True))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.bfloat16}
    assert torch.equal(run(model), base)
    stir(model)
    run(model).sum().backward()
    assert all(p.grad is not None for p in trained)

    mixed: Any = bert()
    for layer in mixed.bert.encoder.layer[1].modules():
        layer.to(torch.bfloat16 if isinstance(layer, nn.Linear) else None)
    with torch.autocast("cpu", torch.bfloat16):
        base = run(mixed)
    inject_adapters(mixed, AdapterConfig(num_features=4))
    kinds = {n.split("layer.")[1][0]: p.dtype for n, p in mixed.named_parameters() if p.requires_grad}
    assert kinds == {"0": torch.float32, "1": torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(mixed), base)


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_starts_as_the_base_model(form: str) -> None:
    """States near float16's end: features and sums of the adapters are beyond it, and times zero they are zero."""
    model = vit().half()
    for block in model.blocks:  # type: ignore[union-attr]
        nn.init.uniform_(block.attn.proj.bias, 2e4, 3e4)
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).half()
    base = model(x)
    assert torch.isfinite(base).all()
    config = AdapterConfig(num_features=4, **{"centered": form != "clipped", **FORMS[form]})
    inject_adapters(model, config)
    assert torch.equal(model(x), base)
    (1e-4 * model(x).float().mean()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    full = inject_adapters(vit(), config)
    with torch.autocast("cpu", torch.bfloat16):
        under = run(full)
        with disable_adapters(full):
            assert torch.equal(run(full), under)


def test_layers_of_another_width_get_adapters_of_theirs() -> None:
    """ConvBERT's query, key and value are narrower than its states."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "embedding_size": 16, "num_attention_heads": 4, "intermediate_size": 32}
    model = transformers.ConvBertModel(
        transformers.ConvBertConfig(vocab_size=40, num_hidden_layers=2, head_ratio=2, **sizes)
    ).eval()
    ids = torch.randint(1, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    base = model(input_ids=ids).last_hidden_state
    inject_adapters(model, AdapterConfig(places=("query", "value", "attention"), num_features=4))
    assert torch.equal(model(input_ids=ids).last_hidden_state, base)
    shapes = {tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad and n.endswith("query.scale")}
    assert shapes == {(16,)}
    stir(model)
    assert not torch.equal(model(input_ids=ids).last_hidden_state, base)


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 40}
OTHERS: dict[str, dict[str, Any]] = {
    "Roberta": {},
    "Electra": {"embedding_size": 8},
    "Longformer": {"attention_window": [4, 4], "max_position_embeddings": 64},
    "Esm": {"pad_token_id": 1, "mask_token_id": 3, "position_embedding_type": "rotary", "max_position_embeddings": 64},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_relatives_of_bert(kind: str) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL, **OTHERS[kind])
    model = getattr(transformers, f"{kind}Model")(config).eval()
    ids = torch.randint(4, 40, (2, 8), generator=torch.Generator().manual_seed(0))
    base = model(input_ids=ids).last_hidden_state
    inject_adapters(model, AdapterConfig(places=("attention", "output", "query", "value"), num_features=4))
    assert torch.equal(model(input_ids=ids).last_hidden_state, base)
    stir(model)
    model(input_ids=ids).last_hidden_state.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.requires_grad)
    with disable_adapters(model):
        assert torch.equal(model(input_ids=ids).last_hidden_state, base)


@pytest.mark.parametrize("head_first", [True, False])
def test_slices_of_query_key_and_value(head_first: bool) -> None:
    """What is added to the value is what a bias of the value's rows adds, however the heads are laid out."""
    from timm.layers import Mlp
    from timm.models.maxxvit import AttentionCl

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = AttentionCl(12, 12, dim_head=4, head_first=head_first)
            self.norm1, self.mlp = nn.LayerNorm(12), Mlp(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attn(self.norm1(x))

    torch.manual_seed(0)
    block = Block().eval()
    x, shift = torch.randn(2, 5, 12), torch.randn(12)
    twin = copy.deepcopy(block)
    inject_adapters(block, AdapterConfig(places=("value",), num_features=4), example=x)
    block.attn.qkv.adapters["default"]["value"].branch = lambda x: shift.expand_as(x)  # type: ignore[union-attr]
    rows = torch.arange(36).view(3, 3, 4)[:, 2].flatten() if head_first else torch.arange(24, 36)
    with torch.no_grad():
        twin.attn.qkv.bias[rows] += shift
    torch.testing.assert_close(block(x), twin(x))


# ---- modules that are saved whole ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "swin"])
@pytest.mark.parametrize("when", ["before adapters of another name", "at the end"])
def test_a_head_that_timm_resets_is_saved(name: str, when: str, tmp_path) -> None:
    def build() -> Any:
        return vit() if name == "vit" else tiny("swin_tiny_patch4_window7_224").eval()

    model = build()
    x = image(model)
    base = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("head")}
    inject_adapters(model, AdapterConfig(num_features=4, modules_to_save=("head",)))
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    trained = [p for p in model.parameters() if p.requires_grad]
    heads = {n for n, p in model.named_parameters() if p.requires_grad and n.startswith("head")}
    assert heads
    counts = count_parameters(model)
    assert counts.adapters + counts.saved_modules == sum(p.numel() for p in trained)
    stir(model)
    tuned = model(x)
    if when == "before adapters of another name":
        add_adapter(model, AdapterConfig(num_features=2), "other")
        set_adapter(model, "default")
        assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained}
        torch.testing.assert_close(model(x), tuned, rtol=0, atol=0)
    save_adapter(model, tmp_path)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in base.items())
    twin = build()
    twin.reset_classifier(7)
    load_adapter(twin, tmp_path)
    torch.testing.assert_close(twin(x), tuned, rtol=0, atol=0)
    with pytest.raises(CheckpointError, match="head"):
        load_adapter(build(), tmp_path)


def test_a_copy_that_is_gone_is_told(tmp_path) -> None:
    model = inject_adapters(vit(), AdapterConfig(num_features=4, modules_to_save=("head",)), "a")
    add_adapter(model, AdapterConfig(num_features=4, modules_to_save=("head",)), "b")
    model.reset_classifier(7)
    with pytest.raises(ValueError, match="head that adapter 'a' had is gone"):
        save_adapter(model, tmp_path / "a", "a")
    save_adapter(model, tmp_path / "b", "b")
    model.reset_classifier(0)
    with pytest.raises(ValueError, match="head that adapter 'b' had is gone"):
        save_adapter(model, tmp_path / "b", "b")


def test_state_dicts_with_saved_modules() -> None:
    """Base names and values in both directions, and the names that saved modules once had."""
    model = inject_adapters(bert(), AdapterConfig(num_features=4, modules_to_save=("classifier",)))
    stir(model)
    tuned, state = run(model), model.state_dict()
    assert torch.equal(state["classifier.weight"], bert().state_dict()["classifier.weight"])
    for names in (state, {k.replace("classifier.", "classifier.base.", 1): v for k, v in state.items()}):
        old = {k.replace("base.adapters.", "adapters."): v for k, v in names.items()}
        twin = inject_adapters(bert(), AdapterConfig(num_features=4, modules_to_save=("classifier",)))
        twin.load_state_dict(old)
        assert torch.equal(run(twin), tuned)
    assert model.classifier.out_features == 3  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="which has adapters"):
        inject_adapters(bert(), AdapterConfig(modules_to_save=("encoder",)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"exclude_modules": "("}, "not a regular expression"),
        ({"num_features": "16"}, "num_features='16'"),
        ({"layers_to_transform": ["first"]}, "layers_to_transform"),
        ({"places": "query"}, "must be a list"),
        ({"places": None}, "must be a list"),
        ({"layers_to_transform": 1}, "must be a list"),
        ({"num_features": 10**9}, "at most a million"),
        (3, "takes a module"),
        ({"seed": None}, "seed=None"),
        ({"normalize": "unit"}, "normalize='unit'"),
        ({"form": None}, "form: None; allowed: "),
        ({"init_weights": 3}, "init_weights: 3; allowed: "),
        ({3: 4}, "unknown entry 3; allowed: "),
    ],
)
def test_configurations_of_a_wrong_type_are_told(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inject_adapters(bert(1), config)
    with pytest.raises(ValueError, match="taken by torch"):
        inject_adapters(bert(1), {"num_features": 4}, "keys")
    with pytest.raises(ValueError, match="takes a module, not its name"):
        inject_adapters("vit", {"num_features": 4})  # type: ignore[arg-type]


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_fresh_adapter_in_half_precision_changes_nothing(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "depth": 1, "embed_dim": 32, "num_heads": 2, "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224", **sizes).eval().to(dtype)
    images = 100 * torch.randn(2, 3, 16, 16).to(dtype)
    with torch.no_grad():
        want = model(images)
        inject_adapters(model, {})
        got = model.to(dtype)(images)
    assert want.isfinite().all()
    assert torch.equal(got, want)
