"""UniRepLKNet: its equations against textbook code, its published sizes, its options and its errors."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from zoo.models import to_deploy
from zoo.models.unireplknet import (
    GlobalResponseNorm,
    LayerNorm2d,
    SqueezeExcite,
    UniRepLKNet,
    UniRepLKNetBlock,
    checkpoint_filter_fn,
    default_cfgs,
)

# name: parameters in training form, in deploy form, and in training form with the 21841 classes of
# ImageNet-22K
PUBLISHED = {
    "unireplknet_a": (4_649_060, 4_437_300, None),
    "unireplknet_f": (6_489_328, 6_235_216, None),
    "unireplknet_p": (11_080_520, 10_741_704, None),
    "unireplknet_n": (18_818_880, 18_318_560, None),
    "unireplknet_t": (31_693_420, 31_037_980, None),
    "unireplknet_s": (56_456_704, 55_645_984, 72_483_433),
    "unireplknet_b": (99_089_416, 98_008_456, 120_451_441),
    "unireplknet_l": (220_076_056, 218_454_616, 252_108_673),
    "unireplknet_xl": (388_690_984, 386_529_064, 431_394_193),
}


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomised(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
                value.copy_(1 + 0.2 * noise.abs() if name.endswith("var") else 0.3 * noise)
    return module


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def tiny(**kwargs: Any) -> UniRepLKNet:
    return randomised(timm.create_model("test_unireplknet", num_classes=6, **kwargs)).double().eval()


# ---- sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    train, deploy, train_22k = PUBLISHED[name]
    model = timm.create_model(name, num_classes=1000, device="meta")
    assert count(model) == train
    assert count(to_deploy(model)) == deploy
    built = timm.create_model(name, num_classes=1000, device="meta", deploy=True)
    assert built.state_dict().keys() == to_deploy(model).state_dict().keys()
    assert count(built) == deploy
    if train_22k:
        assert count(timm.create_model(name, num_classes=21841, device="meta")) == train_22k


def test_zepto_is_small() -> None:
    assert 200_000 < count(timm.create_model("unireplknet_z", device="meta")) < 1_000_000


def test_maps_of_odd_images() -> None:
    maps = tiny().stage_maps(normal(1, 3, 75, 101))
    assert [tuple(m.shape[2:]) for m in maps] == [(19, 26), (10, 13), (5, 7), (3, 4)]
    assert tiny()(normal(1, 3, 1, 3)).shape == (1, 6)


@pytest.mark.parametrize(("strides", "side"), [((2, 2), 7), ((2, 1), 14), ((1, 1), 28)])
def test_stem_strides(strides: tuple[int, int], side: int) -> None:
    model = tiny(stem_strides=strides)
    assert model.stage_maps(normal(1, 3, 28, 28))[0].shape[-1] == side
    assert [info["reduction"] for info in model.feature_info] == [strides[0] * strides[1] * 2**i for i in range(4)]


# ---- equations ---------------------------------------------------------------------------------------------


def test_layer_norm_over_channels() -> None:
    norm, x = randomised(LayerNorm2d(5).double()), normal(2, 5, 3, 4)
    mean, var = x.mean(1, keepdim=True), x.var(1, correction=0, keepdim=True)
    expected = (x - mean) / torch.sqrt(var + 1e-6) * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=1e-12)


def test_layer_norm_survives_large_half_precision_values() -> None:
    """The squares of these deviations overflow float16; the result must not become the bias alone."""
    norm = LayerNorm2d(4).half()
    x = torch.tensor([-600.0, -200.0, 200.0, 600.0]).view(1, 4, 1, 1)
    torch.testing.assert_close(norm(x.half()).float(), LayerNorm2d(4)(x), rtol=0, atol=2e-3)


def test_squeeze_excite() -> None:
    se, x = randomised(SqueezeExcite(8).double()), normal(2, 8, 3, 5)
    s = F.conv2d(x.mean((2, 3), keepdim=True), se.down.weight, se.down.bias).clamp_min(0)
    s = 1 / (1 + torch.exp(-F.conv2d(s, se.up.weight, se.up.bias)))
    torch.testing.assert_close(se(x), x * s, rtol=0, atol=1e-12)


def test_global_response_norm() -> None:
    grn, x = randomised(GlobalResponseNorm(6).double()), normal(2, 4, 3, 6)
    expected = torch.empty_like(x)
    for b in range(2):
        energy = [math.sqrt(sum(float(v) ** 2 for v in x[b, :, :, c].flatten())) for c in range(6)]
        for c in range(6):
            relative = energy[c] / (sum(energy) / 6 + 1e-6)
            expected[b, :, :, c] = x[b, :, :, c] * (1 + grn.gamma.flatten()[c] * relative) + grn.beta.flatten()[c]
    torch.testing.assert_close(grn(x), expected, rtol=0, atol=1e-12)


def test_global_response_norm_gradients() -> None:
    grn, x = randomised(GlobalResponseNorm(4).double()), normal(2, 3, 2, 4).requires_grad_()
    weights = {name: p.detach().requires_grad_() for name, p in grn.named_parameters()}

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(grn, dict(zip(weights, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *weights.values()))
    assert torch.autograd.gradgradcheck(run, (x, *weights.values()))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # operators without a batching rule
def test_gradients_per_sample() -> None:
    """`torch.func` goes through: vmap over grad equals one sample after the other."""
    model, x = to_deploy(tiny()), normal(3, 3, 32, 32)
    weights = dict(model.named_parameters())

    def loss(weights: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (image[None],)).square().sum()

    together = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    alone = torch.func.grad(loss)(weights, x[1])
    for name in weights:
        torch.testing.assert_close(together[name][1], alone[name], rtol=1e-8, atol=1e-10)


def test_silent_channels_have_a_gradient_of_zero() -> None:
    x = torch.zeros(2, 3, 3, 4, requires_grad=True)
    randomised(GlobalResponseNorm(4))(x).sum().backward()
    assert x.grad.isfinite().all()


def textbook_block(block: UniRepLKNetBlock, x: Tensor) -> Tensor:
    """The block as the paper writes it, one pixel-wise operation after the other."""
    y = block.se(block.norm(block.dwconv(x)))
    h = torch.einsum("nchw,fc->nhwf", y, block.pwconv1[1].weight) + block.pwconv1[1].bias
    h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
    norm = torch.linalg.vector_norm(h, dim=(1, 2), keepdim=True)
    h = h * (1 + block.act[1].gamma * norm / (norm.mean(-1, keepdim=True) + 1e-6)) + block.act[1].beta
    z = block.pwconv2[2](torch.einsum("nhwf,cf->nchw", h, block.pwconv2[0].weight))
    return x + (z if block.gamma is None else block.gamma.view(-1, 1, 1) * z)


@pytest.mark.parametrize("kernel_size", [0, 3, 5, 7, 9, 11, 13, 15, 17])
@pytest.mark.parametrize("layer_scale", [1e-6, None])
def test_block_and_its_merged_form(kernel_size: int, layer_scale: float | None) -> None:
    block = UniRepLKNetBlock(8, kernel_size, layer_scale_init_value=layer_scale)
    assert (block.gamma is None) == (layer_scale is None)
    block = randomised(block.double()).eval()
    for size in ((3, 2), (16, 14)):  # on the larger one the hidden layer is computed sample by sample
        x = normal(2, 8, *size)
        expected = textbook_block(block, x)
        torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-11)
        merged = to_deploy(block)
        torch.testing.assert_close(merged(x), expected, rtol=0, atol=1e-11)
        with torch.no_grad():
            torch.testing.assert_close(merged(x), expected, rtol=0, atol=1e-11)
            before = x.clone()
            merged(x)
            assert torch.equal(x, before), "the input must not be overwritten"


def test_nobody_is_left_out_by_the_fast_path() -> None:
    """Hooks run, replaced layers are used, and drop path acts, with and without gradients alike."""
    block, x = randomised(UniRepLKNetBlock(8, 7, drop_path=0.5).double()).eval(), normal(64, 8, 3, 3)
    seen = []
    handle = block.act[0].register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        expected = block(x)
        assert len(seen) == 1
        handle.remove()
        torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-11)
        assert len(seen) == 1
        merged = to_deploy(block)
        torch.testing.assert_close(merged(x), expected, rtol=0, atol=1e-11)
        for form in (block, merged):
            dropped = (form.train()(x) == x).flatten(1).all(1)
            assert 0 < int(dropped.sum()) < 64
        block.eval().act[0] = nn.ReLU()
        assert not torch.allclose(block(x), expected)
    # what is left of the layers in deploy form cannot be called, hooked or replaced
    assert not [m for m in merged.modules() if isinstance(m, (nn.Linear, nn.GELU, GlobalResponseNorm))]


def test_a_block_with_another_layer_stays_as_it_is() -> None:
    block, x = randomised(UniRepLKNetBlock(8, 7).double()).eval(), normal(2, 8, 5, 4)
    block.pwconv1[1] = nn.Sequential(block.pwconv1[1], nn.Linear(32, 32).double())
    for merged in (to_deploy(block), timm.utils.reparameterize_model(nn.Sequential(block))):
        torch.testing.assert_close(merged(x), block(x), rtol=0, atol=1e-11)
    assert isinstance(to_deploy(block), UniRepLKNetBlock)


def test_only_modules_have_a_deploy_form() -> None:
    for other in (3, "grbf.wine", object()):
        with pytest.raises(TypeError, match=r"to_deploy takes a model \(torch\.nn\.Module\), not "):
            to_deploy(other)


def test_deploy_form_is_scripted_traced_and_quantised() -> None:
    model, x = to_deploy(tiny()), normal(2, 3, 37, 50)
    for program in (torch.jit.script(model), torch.jit.trace(model, x), torch.fx.symbolic_trace(model)):
        torch.testing.assert_close(program(x), model(x), rtol=0, atol=1e-11)
    small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model).float(), {nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        found, expected = small(x.float()), model(x).float()
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * float(expected.abs().max()))


def test_timm_finds_the_blocks() -> None:
    model, x = tiny(), normal(1, 3, 40, 33)
    merged = timm.utils.reparameterize_model(model)
    assert merged.state_dict().keys() == to_deploy(model).state_dict().keys()
    torch.testing.assert_close(merged(x), model(x), rtol=0, atol=1e-11)


# ---- construction ------------------------------------------------------------------------------------------


def test_initial_weights() -> None:
    model = timm.create_model("unireplknet_a", head_init_scale=0.001)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            std = 0.02 * (0.001 if name == "head" else 1)
            if module.weight.numel() > 2000:
                assert abs(module.weight.std().item() / std - 1) < 0.1, name
            assert module.bias is None or not module.bias.any(), name
    block = model.stages[2][0]
    assert (block.gamma == 1e-6).all()
    assert not block.act[1].gamma.any()
    assert not block.act[1].beta.any()


def test_drop_path_grows_linearly() -> None:
    model = timm.create_model("unireplknet_a", drop_path_rate=0.22, device="meta")
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage]
    assert rates == pytest.approx([0.22 * i / 11 for i in range(12)])
    assert isinstance(model.stages[0][0].drop_path, nn.Identity)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"depths": (2, 2, 2)}, "four numbers each"),
        (
            {"depths": (1, 1, 1, 1), "kernel_sizes": None},
            r"no published kernel sizes for depths \(1, 1, 1, 1\)",
        ),
        ({"kernel_sizes": ((3,), (3,), (3, 3), (3,))}, r"lengths \(1, 2, 2, 1\), got lengths \(1, 1, 2, 1\)"),
        (
            {"kernel_sizes": ((3,), (13, 4), (0, 9), (7,))},
            r"kernel size 4 is not supported; choose one of \[0, 3, 5, 7",
        ),
        ({"global_pool": "fast"}, "global_pool must be"),
    ],
)
def test_construction_errors(kwargs: dict[str, Any], message: str) -> None:
    given = {"depths": (1, 2, 2, 1), "dims": (8, 16, 24, 32), "kernel_sizes": ((3,), (13, 5), (0, 9), (7,))}
    with pytest.raises(ValueError, match=message):
        UniRepLKNet(**{**given, **kwargs}, device="meta")


def test_input_errors() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="got a 3-D tensor"):
        model(normal(3, 32, 32))
    with pytest.raises(ValueError, match="build the model with in_chans=1"):
        model(normal(2, 1, 32, 32))
    with pytest.raises(ValueError, match="stages 0 to 3"):
        model.forward_intermediates(normal(1, 3, 32, 32), [4])
    with pytest.raises(ValueError, match="stages 0 to 3"):
        model.prune_intermediate_layers(5)
    with pytest.raises(ValueError, match="'NCHW'"):
        model.forward_intermediates(normal(1, 3, 32, 32), output_fmt="NLC")


# ---- features ----------------------------------------------------------------------------------------------


def test_intermediates_are_the_stage_maps() -> None:
    model, x = tiny(), normal(2, 3, 37, 50)
    maps = model.stage_maps(x)
    last, taken = model.forward_intermediates(x, [0, -1])
    assert torch.equal(last, maps[3])
    assert torch.equal(taken[0], maps[0])
    assert torch.equal(taken[1], maps[3])
    early = model.forward_intermediates(x, [1], stop_early=True, intermediates_only=True)
    assert torch.equal(early[0], maps[1])
    backbone = timm.create_model("test_unireplknet", features_only=True, out_indices=(1, 3)).double().eval()
    assert [m.shape[1] for m in backbone(x)] == backbone.feature_info.channels() == [16, 32]


def test_pruning_keeps_what_is_left() -> None:
    model, x = tiny(), normal(2, 3, 37, 50)
    expected = model.stage_maps(x)
    assert model.prune_intermediate_layers([0, 2]) == [0, 2]
    assert len(model.stages) == len(model.downsample_layers) == 3
    assert model.num_features == 24
    torch.testing.assert_close(model(x), expected[2])


def test_dense_output() -> None:
    model = timm.create_model("test_unireplknet", dense_output=True)
    assert {"norm0.weight", "norm3.bias"} < model.state_dict().keys()
    assert not {"norm.weight", "head.weight"} & model.state_dict().keys()
    model, x = randomised(model).double().eval(), normal(2, 3, 37, 50)
    raw, out = model.stage_maps(x), model(x)
    for i in range(4):
        torch.testing.assert_close(out[i], getattr(model, f"norm{i}")(raw[i]), rtol=0, atol=0)
    for got, want in zip(to_deploy(model)(x), out, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
    for program in (torch.jit.script(model), torch.fx.symbolic_trace(model)):
        torch.testing.assert_close(program(x)[2], out[2], rtol=0, atol=1e-11)
    with pytest.raises(ValueError, match="dense_output=False"):
        model.reset_classifier(3)


@pytest.mark.parametrize("pooling", ["avg", "max", "avgmax", ""])
def test_pooling(pooling: str) -> None:
    model, x = tiny(global_pool=pooling), normal(2, 3, 70, 40)
    shape = (2, 6) if pooling else (2, 6, 3, 2)
    assert model(x).shape == shape
    if not pooling:  # the head works per pixel; its mean over one pixel is the pooled result
        image = normal(1, 3, 20, 20)
        pooled = copy.deepcopy(model)
        pooled.reset_classifier(0, "avg")
        pooled.head = model.head
        torch.testing.assert_close(model(image)[:, :, 0, 0], pooled(image))


# ---- optimisation ------------------------------------------------------------------------------------------


def test_layer_ids_of_a_long_network() -> None:
    ids, last = timm.create_model("unireplknet_s", device="meta").layer_ids()
    assert last == 13
    assert ids["stages.2.26.pwconv1.1.weight"] == 11
    assert ids["downsample_layers.3.0.weight"] == ids["stages.3.2.gamma"] == 12
    assert ids["norm.weight"] == ids["head.bias"] == 13


def test_timm_layer_decay() -> None:
    optimizer = create_optimizer_v2(tiny(), "adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5)
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert max(scales) == 1
    assert len(scales) == 8  # stem, six blocks (with the convolution before them), norm and head


def test_checkpointed_statistics_are_counted_once() -> None:
    model = tiny().train()
    model.set_grad_checkpointing()
    model(normal(4, 3, 32, 32)).sum().backward()
    counters = {key: int(b) for key, b in model.named_buffers() if key.endswith("num_batches_tracked")}
    assert set(counters.values()) == {1}
    assert all(p.grad is not None for p in model.parameters())


# ---- weights -----------------------------------------------------------------------------------------------


def test_records_of_published_weights() -> None:
    tags = {
        f"{arch}.{tag}": cfg for arch, row in default_cfgs.items() for tag, cfg in row.cfgs.items() if cfg.hf_hub_id
    }
    assert len(tags) == 14
    assert len({cfg.hf_hub_filename for cfg in tags.values()}) == 14
    for name, cfg in tags.items():
        assert cfg.hf_hub_id == "DingXiaoH/UniRepLKNet"
        assert cfg.license == "apache-2.0"
        assert cfg.origin_url
        assert cfg.num_classes == (21841 if name.endswith(".in22k") else 1000)
        if "_ft_" in name:
            assert cfg.input_size == (3, 384, 384)
            assert (cfg.crop_pct, cfg.crop_mode) == (1.0, "squash")
        for note in cfg.notes:
            assert not note.startswith("sha256: ") or len(note) == 8 + 64


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s, "epoch": 3}, lambda s: {"state_dict": s}])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone."])
def test_packaging_of_checkpoints_is_taken_off(wrap: Any, prefix: str) -> None:
    state = {f"{prefix}{key}": value for key, value in tiny().state_dict().items()}
    if prefix == "backbone.":
        state["decode_head.weight"] = torch.zeros(1)
    tiny().load_state_dict(checkpoint_filter_fn(wrap(state), tiny()))


def test_pretrained_weights_adapt_to_classes_and_channels(tmp_path: Path) -> None:
    """What `pretrained=True` does once the published file is there, with a file of our own in its place."""
    source = randomised(timm.create_model("test_unireplknet")).eval()
    path = tmp_path / "published.pth"
    torch.save({"model": source.state_dict()}, path)
    overlay = {"file": str(path)}
    same = timm.create_model("test_unireplknet", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    x = normal(2, 3, 64, 64).float()
    assert torch.equal(same(x), source(x))
    other = timm.create_model(
        "test_unireplknet", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5, in_chans=1
    ).eval()
    assert other(x[:, :1]).shape == (2, 5)
    assert torch.equal(other.stages[3][0].pwconv1[1].weight, source.stages[3][0].pwconv1[1].weight)
    grey = source.downsample_layers[0][0].weight.sum(1, keepdim=True)
    torch.testing.assert_close(other.downsample_layers[0][0].weight, grey)
