"""Terminator: what it promises beyond the golden files."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo
from tests.analysis.test_pictures import FakeWandb
from zoo.analysis.probes import PictureError, draw
from zoo.analysis.probes.hyper_kernels import context_kernels, hyper_kernels
from zoo.models import to_deploy
from zoo.models.slow_nets import SlowNet
from zoo.models.terminator import StandardGELU, Terminator
from zoo.models.terminator_deploy import FixedSlowNet
from zoo.ops import hyperzzw as ops
from zoo.ops import native, pointwise, reference
from zoo.ops.pointwise import pointwise_conv, pointwise_twice
from zoo.ops.standardise import instance_standardise, standardised_gate
from zoo.optim.kar import Kar2, Kar3
from zoo.training.callbacks import ModelPictures

AS_PUBLISHED = {"standardise_eval": "batch", "local_context": "batch"}


def tiny(**kwargs: Any) -> Terminator:
    torch.manual_seed(0)
    return zoo.create_model("test_terminator", **kwargs)  # type: ignore[return-value]


def batch(count: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def trained(model: Terminator) -> Terminator:
    """With running statistics that say something."""
    with torch.no_grad():
        for seed in range(3):
            model.train()(batch(8, seed))
    return model.eval()


# ---- sizes and forms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("terminator_cifar10", 1_336_855),
        ("terminator_cifar100", 1_362_865),
        ("terminator_mnist", 1_331_031),
        ("terminator_stl10", 1_500_695),
        ("terminator_scifar10", 1_332_251),
        ("terminator_smnist", 1_326_427),
        ("terminator_pmnist", 1_326_427),
    ],
)
def test_parameter_counts(name: str, count: int) -> None:
    model = zoo.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == count


def test_paper_preset_has_nine_branches_and_no_earlier_outputs() -> None:
    model = zoo.create_model("terminator_paper", device="meta")
    for block in model.blocks:
        assert block.bottleneck.in_features == 9 * block.dim
        assert [net.points for net in block.local_nets] == [5, 7, 9]
    assert model.reuse == [[]] * 5


@pytest.mark.parametrize("options", [{"layout": "paper", "reuse": ((), (), ())}, {}, AS_PUBLISHED, {"ndim": 1}])
@pytest.mark.parametrize("size", [12, 16])
def test_equals_the_plain_form_with_gradients(options: dict[str, Any], size: int) -> None:
    """The loops in C against the references of all operators in float64."""
    model = tiny(img_size=size, **options).train()
    plain = copy.deepcopy(model).double()
    x = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))
    logits = model(x)
    (F.cross_entropy(logits, torch.arange(4)) + sum(model.aux_losses().values())).backward()
    with reference():
        exact = plain(x.double())
        (F.cross_entropy(exact, torch.arange(4)) + sum(plain.aux_losses().values())).backward()
    torch.testing.assert_close(logits.double(), exact, rtol=1e-4, atol=1e-5)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=2e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for b, c in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(b.double(), c.double(), rtol=1e-4, atol=1e-6)


def test_initial_scale_is_that_of_the_released_network() -> None:
    """Bands that hold for every seed."""
    torch.manual_seed(3)
    model = zoo.create_model("terminator_cifar10").eval()
    with torch.no_grad():
        x = torch.randn(2, 3, 32, 32)
        for kernel in model.global_kernels():
            assert 0.024 < kernel.std() < 0.036
        for out in model.block_maps(x)[1:]:
            assert 0.17 < out.mean() < 0.33
            assert 0.5 < out.std() < 0.7
        losses = model.train().aux_losses()
    assert 0.0165 < losses["slow_loss"] < 0.0185
    assert 0.0150 < losses["norm_penalty"] < 0.0158


def test_initialisation_is_not_applied_again_by_loading() -> None:
    model, other = tiny(**AS_PUBLISHED).eval(), zoo.create_model("test_terminator", **AS_PUBLISHED).eval()
    first = model(batch())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other(batch())
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(batch()), first)
    assert torch.equal(model(batch()), first)


# ---- one image and its batch -------------------------------------------------------------------------------


def test_published_statistics_make_predictions_depend_on_the_batch() -> None:
    model, x = tiny(**AS_PUBLISHED).double().eval(), batch().double()
    out, order = model(x), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(model(x[order]), out[order], rtol=0, atol=1e-12)
    assert (model(x[:2]) - out[:2]).abs().max() > 1e-4
    assert model.batch_dependent


@pytest.mark.parametrize("context", ["running", "sample"])
@pytest.mark.parametrize("chans", [1, 3])
def test_options_make_them_independent(context: str, chans: int) -> None:
    model = tiny(local_context=context, in_chans=chans).double()
    x = batch()[:, :chans].double()
    model.train()(x)
    model.eval()
    alone = torch.cat([model(image[None]) for image in x])
    torch.testing.assert_close(model(x), alone, rtol=0, atol=1e-12)
    assert not model.batch_dependent


def test_a_batch_of_one_trains() -> None:
    model = tiny(**AS_PUBLISHED).train()
    out = model(batch(1))
    assert out.shape == (1, 10)
    out.sum().backward()


def test_context_by_sample_of_equal_samples_is_that_of_the_batch() -> None:
    x = batch(1).double().expand(3, -1, -1, -1)
    a = tiny(standardise_eval="batch", local_context="sample").double()
    b = tiny(**AS_PUBLISHED).double()
    b.load_state_dict(a.state_dict())
    torch.testing.assert_close(a(x), b(x), rtol=0, atol=1e-11)


# ---- deploy form -------------------------------------------------------------------------------------------


def nets(model: nn.Module) -> list[SlowNet]:
    return [m for m in model.modules() if isinstance(m, SlowNet)]


@pytest.mark.parametrize("context", ["running", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_deploy_form_computes_kernels_once(context: str, dtype: torch.dtype) -> None:
    model = trained(tiny(local_context=context)).to(dtype)
    merged = to_deploy(model)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    with torch.no_grad():
        expected = model(batch().to(dtype)), model(batch(3).to(dtype))
        for net in nets(merged):
            net.waves = lambda: pytest.fail("a kept kernel was computed again")  # type: ignore[method-assign]
        for x, outputs in zip((batch(), batch(3)), expected, strict=True):
            torch.testing.assert_close(merged(x.to(dtype)), outputs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("context", ["running", "batch", "sample"])
def test_kept_kernels_are_dropped_by_any_change(context: str) -> None:
    model = to_deploy(trained(tiny(local_context=context)))
    other = trained(tiny(local_context=context, omega_0=1.0))

    def check() -> None:
        fresh = tiny(local_context=context).eval().to(next(model.parameters()).dtype)
        fresh.load_state_dict(model.state_dict())
        fresh = to_deploy(fresh)
        with torch.no_grad():
            x = batch().to(next(model.parameters()).dtype)
            assert torch.equal(model(x), fresh(x))

    check()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(batch()).square().sum().backward()
    optimizer.step()
    check()
    model.load_state_dict(other.state_dict())
    check()
    with torch.no_grad():
        model.train()(batch(8))
    model.eval()
    check()
    with torch.no_grad():
        model.blocks[0].global_net.out.weight.mul_(2)
    check()
    model.double()
    check()
    assert all(net.cache.value is not None for net in nets(model) if context != "sample" or type(net) is FixedSlowNet)


@pytest.mark.parametrize("context", ["running", "batch", "sample"])
def test_deploy_form_still_has_exact_gradients(context: str) -> None:
    model = trained(tiny(local_context=context)).double()
    merged = to_deploy(model)
    inputs = [batch().double().requires_grad_() for _ in range(2)]
    for form, x in zip((model, merged), inputs, strict=True):
        form(x).square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-9, atol=1e-12)
    for a, b in zip(model.parameters(), merged.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("context", ["running", "batch", "sample"])
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_scripts(context: str) -> None:
    model = trained(tiny(local_context=context))
    scripted = torch.jit.script(model)
    with torch.no_grad():
        torch.testing.assert_close(scripted(batch()), model(batch()), rtol=0, atol=1e-5)


# ---- precision and memory order ----------------------------------------------------------------------------


def test_half_precision_leaves_the_slow_networks_in_float32() -> None:
    model = trained(tiny())
    expected = model(batch())
    half = copy.deepcopy(model).to(torch.bfloat16)
    for net, original in zip(nets(half), nets(model), strict=True):
        assert all(p.dtype == torch.float32 for p in net.parameters())
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), original.parameters(), strict=True))
    assert half.head.weight.dtype == torch.bfloat16
    assert half(batch().bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        kernels = model.global_kernels()
        out = model(batch())
    assert all(k.dtype == torch.float32 for k in kernels)
    assert all(torch.equal(a, b) for a, b in zip(kernels, model.global_kernels(), strict=True))
    assert (out.float() - expected).abs().max() < 0.1
    assert zoo.create_model("test_terminator", dtype=torch.float16).blocks[0].hci_net.out.weight.dtype == torch.float32


@pytest.mark.parametrize("shape", [(2, 12, 3, 5), (3, 24, 1, 20), (2, 36, 32, 32)])
@pytest.mark.parametrize("groups", [1, 12])
@pytest.mark.parametrize("running", [False, True])
def test_standardisation_in_one_pass(shape: tuple[int, ...], groups: int, running: bool) -> None:
    """The loops in C against the library's operators in float64: outputs, gradients, running statistics."""
    leaves = {}
    for dtype in (torch.float32, torch.float64):
        draw = [torch.randn(*s, generator=torch.Generator().manual_seed(i)) for i, s in enumerate((shape, shape, (1,)))]
        x, key, bias = (t.to(dtype).requires_grad_() for t in (3 * draw[0] + 1, *draw[1:]))
        pixels = draw[0][0, 0].to(dtype).requires_grad_()
        norm = StandardGELU(shape[1], groups, running).to(dtype)
        found = [norm(x, bias), standardised_gate(key, x, pixels), instance_standardise(x)]
        weights = [torch.linspace(-1, 2, y.numel(), dtype=dtype).view(shape).cos() for y in found]
        sum((w * y).sum() for w, y in zip(weights, found, strict=True)).backward()
        with torch.no_grad():
            found += [standardised_gate(key, x, pixels), norm.eval()(x, bias)]
        found += [t.grad for t in (x, key, bias, pixels)] + [b.to(dtype) for b in norm.buffers()]
        found += [torch.autograd.grad((weights[0] * norm(x, bias)).sum(), x)[0]]
        leaves[dtype] = found
    for got, want in zip(leaves[torch.float32], leaves[torch.float64], strict=True):
        torch.testing.assert_close(
            got.double(), want, rtol=1e-4, atol=3e-6 * max(1.0, float(want.detach().abs().max()))
        )


def test_second_derivatives_of_one_pass() -> None:
    found = []
    for dtype in (torch.float32, torch.float64):
        key, x, pixels = (
            torch.randn(2, 12, 4, 5, generator=torch.Generator().manual_seed(i)).to(dtype).requires_grad_()
            for i in range(3)
        )
        y = StandardGELU(12, 12)(standardised_gate(key, x, pixels[0, 0]), torch.ones(1, dtype=dtype))
        weight = x[0, :, 0, :1].mT @ x[0, :, 0, :1] + x[1, :, 0, :4] @ x[1, :, 1, :4].mT
        y = pointwise_conv([y], weight, x[0, :, 0, 0])
        (slope,) = torch.autograd.grad(y.square().sum(), key, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), (key, x, pixels)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("elements", [1, 2_400_000])
def test_pointwise_convolutions(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several maps, one repeated, some samples at a time, and of two in a row; with gradients."""
    monkeypatch.setattr(pointwise, "CACHE_ELEMENTS", elements)
    maps = [torch.randn(3, 6, 2, 5), torch.randn(3, 2, 2, 5).contiguous(memory_format=torch.channels_last)]
    weight, bias = torch.randn(8, 12), torch.randn(8)
    layers = [torch.randn(4, 8), torch.randn(4), torch.randn(5, 4), torch.randn(5)]
    found = []
    for dtype in (torch.float32, torch.float64):
        given = [t.to(dtype).requires_grad_() for t in (*maps, weight, bias, *layers)]
        y = pointwise_conv(given[:2], given[2], given[3])
        z = pointwise_twice(y, *given[4:])
        want = F.conv2d(torch.cat([given[0], *[given[1]] * 3], 1), given[2][..., None, None], given[3])
        want = F.conv2d(F.conv2d(want, given[4][..., None, None], given[5]), given[6][..., None, None], given[7])
        torch.testing.assert_close(z, want, rtol=1e-4, atol=1e-4)
        found.append([y, z, *torch.autograd.grad(z.cos().sum(), given)])
        torch.testing.assert_close(
            pointwise_conv(given[:1], given[2][:, :6]),
            y - pointwise_conv(given[:2], torch.cat([torch.zeros_like(given[2][:, :6]), given[2][:, 6:]], 1), given[3]),
            rtol=1e-4,
            atol=1e-4,
        )
    for got, exact in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-3, atol=1e-4)


def test_without_the_loops_in_c_the_numbers_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        model = zoo.create_model("terminator_z").train()
        logits = model(torch.randn(4, 1, 14, 14, generator=torch.Generator().manual_seed(1)))
        logits.square().sum().backward()
        found.append([logits.detach(), model.blocks[0].mixer.weight.grad, model.blocks[0].rgu_slow.pos_bias.grad])
        found[-1] += [b for name, b in model.named_buffers() if "norm" in name]
        monkeypatch.setattr(native, "library", lambda: None)
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


@pytest.mark.skipif(native.library() is None, reason="no C compiler, or an OpenMP that torch lacks")
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize(("size", "count"), [(13, 1), (32, 4), (40, 9)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layout": "paper", "reuse": ((), (), ()), "local_sizes": (3, 11, 9)},
        {"standardise_eval": "batch"},
        {"local_context": "batch", "dims": (36, 72, 144)},
    ],
    ids=["test", "paper", "batch statistics", "batch context"],
)
def test_inference_with_images_by_thread(
    options: dict[str, Any], size: int, count: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(img_size=size, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.05 * torch.randn_like(parameter) * ("weight" not in name)
        x = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))
        model.train()(x[:4])
    exact, done, call = copy.deepcopy(model).double().eval(), [], native.call
    monkeypatch.setattr(native, "call", lambda name, *a: (done.append(name), call(name, *a))[1])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            got, want = to_deploy(model.eval())(x), exact(x.double())
    finally:
        torch.set_num_threads(before)
    shared = threads < 4 or count == 4
    for name in ("global_paths", "local_branches", "add_local_outputs"):
        assert done.count(name) == (3 if shared else 0)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_long_convolutions_under_autocast_and_in_half() -> None:
    kernel, z = (torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    loops = torch.stack([sum(kernel[..., s] * z[..., t - s] for s in range(t + 1)) for t in range(50)], -1)
    torch.testing.assert_close(ops.causal_conv(kernel, z), loops, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.causal_conv(kernel, z), ops.causal_conv(kernel, z.clone()))
        torch.testing.assert_close(ops.causal_conv(kernel, z), loops, rtol=1e-4, atol=1e-5)
    half = ops.same_conv(kernel.bfloat16(), z.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), ops.same_conv(kernel, z), rtol=0.1, atol=0.1)


# ---- sequences ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("global_1d", ["causal_conv", "same_conv", "fold"])
@pytest.mark.parametrize("local_causal", [False, True])
def test_sequences(global_1d: str, local_causal: bool) -> None:
    model = tiny(ndim=1, global_1d=global_1d, local_causal=local_causal).eval()
    x = batch(2)
    torch.testing.assert_close(model(x), model(x.flatten(2)), rtol=0, atol=0)
    assert model.forward_features(x).shape == (2, 24, 12, 12)
    assert model.forward_features(x.flatten(2)).shape == (2, 24, 144)


def test_pixels_in_a_random_order() -> None:
    plain, permuted = tiny(ndim=1).eval(), tiny(ndim=1, permute_seed=5).eval()
    plain.load_state_dict(permuted.state_dict(), strict=False)
    x = batch(2).flatten(2)
    assert sorted(permuted.pixel_order.tolist()) == list(range(144))
    torch.testing.assert_close(permuted(x), plain(x[..., permuted.pixel_order]), rtol=0, atol=1e-6)
    features = permuted.forward_features(x)
    torch.testing.assert_close(
        features[..., permuted.pixel_order], plain.forward_features(x[..., permuted.pixel_order])
    )


# ---- losses and optimizers ---------------------------------------------------------------------------------


def test_slow_loss_of_copies_is_zero() -> None:
    kernel = torch.randn(1, 3, 4, 4)
    assert ops.slow_loss([kernel, kernel.repeat(1, 4, 1, 1), kernel.repeat(1, 8, 1, 1)]) == 0
    assert ops.slow_loss([kernel, kernel.flip(1)], "channel_sum") < 1e-10


def test_losses_need_no_forward_pass() -> None:
    model = tiny().train()
    first = model.aux_losses()
    model(batch())
    copy.deepcopy(model)
    second = model.aux_losses()
    assert set(first) == {"slow_loss", "norm_penalty"}
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
    assert tiny(slow_loss="none", norm_penalty=0.0).aux_losses() == {}


def test_parameters_before_a_standardisation_get_no_gradient() -> None:
    model = tiny(**AS_PUBLISHED).double().train()
    model(batch().double()).square().sum().backward()
    dead = ("bottleneck.bias", "mixer.bias", "local_mix.", "local_bias.", "rgu_fast.y.bias", "rgu_slow.y.bias")
    for block in model.blocks:
        for name, p in block.named_parameters():
            zero = name.startswith(dead) and (name.endswith("bias") or "local_bias" in name)
            assert (p.grad.norm() < 1e-13) == zero, name


def test_kar_refuses_nonsense() -> None:
    p = [nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match="two averages"):
        Kar3(p, betas=(0.9,))
    with pytest.raises(ValueError, match="one average"):
        Kar2(p, betas=(0.5, 0.9))
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        Kar3(p, betas=(0.5, 1.0))
    with pytest.raises(ValueError, match="positive"):
        Kar3(p, lr=0)
    optimizer = Kar3(p, lr=0.1, weight_decay=1.0)
    p[0].grad = torch.tensor([2.0, 0.0])
    optimizer.step()
    torch.testing.assert_close(p[0].data, torch.tensor([0.8, 0.9]))


# ---- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3, 12, 13), (2, 3, 13, 13), (2, 1, 12, 12), (3, 12, 12), (2, 3, 144)])
def test_wrong_inputs_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images \(batch, 3, 12, 12\) only"):
        tiny()(torch.zeros(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": (12, 30)}, "multiples of 12"),
        ({"dims": (24, 36), "reuse": ((), ())}, "multiple of the one before"),
        ({"dims": (12, 24, 24), "reuse": ((), (), (2,))}, "cannot see block 2"),
        ({"img_size": (12, 14)}, "square"),
        ({"img_size": 1}, "square"),
        ({"local_sizes": (3, 4, 5, 7)}, "odd"),
        ({"local_sizes": (3, 5)}, "4 odd"),
        ({"layout": "figure"}, "'code', 'paper'"),
        ({"layout": "paper"}, "no room"),
        ({"ndim": 1, "seq_len": 140, "global_1d": "fold"}, "cannot be folded"),
        ({"seq_len": 100}, "ndim=1"),
        ({"permute_seed": 1}, "ndim=1"),
        ({"ndim": 3}, "ndim"),
        ({"slow_loss": "mse"}, "'tile'"),
        ({"hidden": {"globl": 3}}, "did you mean"),
        ({"layers": {"global": (2,)}}, "each of 3 blocks"),
        ({"layers": {"local": 0}}, "positive"),
        ({"local_context": "self"}, "'sample'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_channels_of_any_number_come_in() -> None:
    model = tiny(in_chans=5).train()
    assert model(torch.randn(2, 5, 12, 12)).shape == (2, 10)
    assert model.aux_losses()["slow_loss"].isfinite()


# ---- pictures ----------------------------------------------------------------------------------------------


def test_context_kernels_are_input_times_hyper_kernel() -> None:
    model, image = trained(tiny()), batch(1)[0]
    own, made = hyper_kernels(model), context_kernels(model.train(), image)
    assert model.training
    assert [k.shape for k in made] == [(3, 12, 12), (12, 12, 12), (12, 12, 12)]
    torch.testing.assert_close(torch.from_numpy(made[0]), image.double() * torch.from_numpy(own[0]))
    assert hyper_kernels(tiny(ndim=1, seq_len=10))[0].shape == (3, 1, 10)
    with pytest.raises(ValueError, match="no hyper-kernels"):
        hyper_kernels(nn.Identity())


def test_pictures_as_files_and_in_wandb(tmp_path: Path) -> None:
    for kind in ("hyper-kernels", "context-kernels"):
        draw(kind, "test_terminator", tmp_path / f"{kind}.png")  # type: ignore[arg-type]
    (tmp_path / "metrics.csv").write_text("step,train/loss,train/slow_loss\n0,2.5,0.1\n1,,\n2,2.0,0.01\n")
    told = draw("losses", "test_terminator", tmp_path / "losses.png", data=tmp_path)
    assert "loss, slow_loss of" in told
    assert "untrained" not in told
    assert {p.read_bytes()[:4] for p in tmp_path.glob("*.png")} == {b"\x89PNG"}
    with pytest.raises(PictureError, match="--data"):
        draw("losses", "test_terminator", tmp_path / "no.png")
    with pytest.raises(PictureError, match="no hyper-kernels"):
        draw("hyper-kernels", "test_unireplknet", tmp_path / "no.png")

    logger = FakeWandb()
    trainer: Any = SimpleNamespace(loggers=[logger], sanity_checking=False, is_global_zero=True, current_epoch=0)
    module: Any = SimpleNamespace(model=tiny())
    with torch.inference_mode():
        ModelPictures(count=2).on_validation_batch_end(trainer, module, None, (batch(2), torch.zeros(2)), 0)
    assert {"model/hyper_kernels", "model/context_kernels"} <= set(logger.sent)


def test_a_saved_deploy_form_answers_to_the_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = zoo.create_model("test_terminator").eval()
    x = torch.randn(3, *model.pretrained_cfg["input_size"])
    for saved in (zoo.to_deploy(model), model):
        again = zoo.create_model(f"local-dir:{zoo.save_pretrained(saved, tmp_path)}", pretrained=True).eval()
        with torch.no_grad():
            assert torch.equal(again(x), saved(x))
        assert [type(m) for m in again.modules()] == [type(m) for m in saved.modules()]
