"""The loops in C against torch's operators in float64, and who gets them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.kernels import native
from zoo.kernels.hyperzzw import LocalSlowNet, channel_interaction, gate, hyper_interaction
from zoo.kernels.large_kernel import depthwise_conv2d

needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler, or an OpenMP that torch lacks")


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * float(want.abs().max()))


@needs_compiler
@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 3, 7), (49, 24, 96), (107, 17, 68), (210, 330, 40), (12, 40, 1300)])
def test_feed_forward(batch: int, sizes: tuple[int, int, int]) -> None:
    pixels, chans, wide = sizes
    few = max(1, chans // 4)
    shapes = [(few, chans), (few,), (chans, few), (chans,), (wide, chans), (wide,), (wide,), (chans, wide), (chans,)]
    weights = [
        normal(*shape, seed=i) / max(1, shape[-1] if len(shape) > 1 else 1) ** 0.5 for i, shape in enumerate(shapes)
    ]
    x, shortcut = normal(batch, pixels, chans, seed=10), normal(batch, pixels, chans, seed=11)
    got = native.feed_forward(x, shortcut, weights)
    x, shortcut = x.double(), shortcut.double()
    down, d, up, u, w1, b1, gamma, w2, b2 = (w.double() for w in weights)
    gate = F.linear(F.linear(x.mean(1), down, d).relu(), up, u).sigmoid()
    hidden = F.gelu(F.linear(x * gate[:, None], w1, b1))
    norm = hidden.square().sum(1, keepdim=True).sqrt()
    hidden = hidden * (1 + gamma * norm / (norm.mean(-1, keepdim=True) + 1e-6))
    close(got, F.linear(hidden, w2, b2) + shortcut, 2e-6)


@needs_compiler
def test_gelu_of_every_size_of_number() -> None:
    def gelu(h: Tensor) -> Tensor:
        given = torch.zeros(1, 1), torch.ones(1, 1)
        return native.standardise(h.view(1, 1, 1, -1), None, torch.zeros(len(h)), given, 0.0)[0].flatten()

    h = torch.cat([torch.linspace(-12, 12, 20001), torch.logspace(-30, 30, 61), -torch.logspace(-30, 30, 61)])
    got = gelu(h)
    apart = (got.double() - F.gelu(h.double())).abs() / (1 + h.double().abs())
    assert float(apart.max()) < 2e-7
    assert got[h < -6].abs().max() == 0
    special = torch.tensor([torch.nan, torch.inf, -torch.inf] * 3)
    assert gelu(special).isnan().all()  # of infinity too, as the library has it on x86


@needs_compiler
@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (2, 5, 3, 4), (1, 40, 9, 7)])
def test_layer_norm(shape: tuple[int, ...], gelu: bool) -> None:
    x, weight, bias = 3 + normal(*shape), normal(shape[1], seed=2), normal(shape[1], seed=3)
    rows = x.double().movedim(1, -1)
    want = F.layer_norm(rows, rows.shape[-1:], weight.double(), bias.double(), 1e-6).movedim(-1, 1)
    close(native.layer_norm(x, weight, bias, 1e-6, gelu), F.gelu(want) if gelu else want, 1e-5)


@needs_compiler
@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 8, 7, 7), (1, 17, 3, 20), (3, 5, 15, 8), (3, 2, 5, 33)])
@pytest.mark.parametrize(
    "kernel", [(1, 1, 1), (3, 3, 1), (7, 7, 1), (13, 13, 1), (3, 9, 1), (31, 15, 1), (3, 3, 5), (5, 7, 2)]
)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_depthwise(shape: tuple[int, ...], kernel: tuple[int, int, int], order: torch.memory_format) -> None:
    *sizes, dilation = kernel
    x, weight, bias = normal(*shape), normal(shape[1], 1, *sizes, seed=2), normal(shape[1], seed=3)
    exact, grad = weight.double().requires_grad_(), normal(*shape, seed=4)
    padding = [dilation * (k // 2) for k in sizes]
    want = F.conv2d(x.double(), exact, bias.double(), 1, padding, dilation, shape[1])
    want.backward(grad.double())
    x, grad = (t.contiguous(memory_format=order) for t in (x, grad))
    close(native.depthwise(x, weight, bias, dilation), want.detach(), 1e-6)
    close(native.depthwise(x, weight, None, dilation), want.detach() - bias.double()[:, None, None], 1e-6)
    close(native.depthwise_weight_gradient(x, grad, (sizes[0], sizes[1]), dilation), exact.grad, 1e-6)


@needs_compiler
@pytest.mark.parametrize("dilation", [1, 2])
def test_second_derivatives(dilation: int) -> None:
    found = []
    for convolve in (depthwise_conv2d, lambda x, w, b, d: F.conv2d(x, w, b, 1, 3 * d, d, 4)):
        inputs = tuple(t.requires_grad_() for t in (normal(2, 4, 9, 8), normal(4, 1, 7, 7, seed=2), normal(4, seed=3)))
        slopes = torch.autograd.grad(convolve(*inputs, dilation).square().sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(s.square().sum() for s in slopes), inputs))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


@needs_compiler
def test_it_steps_aside_where_somebody_would_notice() -> None:
    x = normal(2, 3)
    parameter = nn.Parameter(normal(3))
    assert native.available(x, parameter.detach())
    assert not native.available(x, parameter)
    assert native.available(x, parameter, gradients=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert not native.available(x)
    with torch.no_grad():
        assert native.available(x, parameter)
        assert not native.available(x.double())
        assert not native.available(x.to("meta"))
        assert not native.available(x[:0])
        assert not native.available(x.as_subclass(type("Sub", (Tensor,), {})))
        with FlopCounterMode(display=False):
            assert not native.available(x)
    seen = []
    torch.func.vmap(lambda row: (seen.append(native.available(row)), row)[1])(x)
    assert seen == [False]


@pytest.mark.parametrize("setting", [("ZOO_NATIVE", "0"), ("CC", "no-such-compiler"), ("CC", "false")])
def test_without_it_the_numbers_are_the_same(setting: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.to_deploy(zoo.create_model("test_unireplknet").eval())
    images, x, weight = normal(3, 3, 64, 48), normal(2, 4, 9, 9), normal(4, 1, 7, 7)
    with torch.inference_mode():
        usual = model(images), depthwise_conv2d(x, weight)
        native.library.cache_clear()
        monkeypatch.delenv("ZOO_NATIVE", raising=False)
        monkeypatch.setenv(*setting)
        try:
            assert native.library() is None
            without = model(images), depthwise_conv2d(x, weight)
        finally:
            native.library.cache_clear()
    torch.testing.assert_close(usual, without, rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 5, 3, 7), (3, 12, 1, 300), (1, 40, 32, 32)])
def test_hyper_interaction(shape: tuple[int, ...]) -> None:
    y, x = normal(*shape) + 1, normal(*shape, seed=2)
    channel, space = normal(1, 1, shape[1], seed=3), normal(1, 1, *shape[2:], seed=4)
    want = hyper_interaction(*(t.double() for t in (y, x, channel, space)))
    close(native.hyper_interaction(y, x, channel, space), want, 2e-6)
    close(hyper_interaction(y.mT.contiguous().mT, x, channel, space), want, 2e-6)


@needs_compiler
@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (2, 5, 7, 7), (1, 3, 32, 32), (2, 2, 61, 61)])
def test_global_products(shape: tuple[int, ...]) -> None:
    w, *z = (normal(*shape, seed=i) for i in range(4))
    products = [w.double() @ part.double() for part in z]
    for got, want in zip(native.global_products(w, z), [*products, F.silu(products[0])], strict=True):
        close(got, want, 2e-6)


@needs_compiler
@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 5, 3, 7), (2, 3, 1, 300)])
@pytest.mark.parametrize("biased", [True, False])
def test_gate_and_channel_interaction(shape: tuple[int, ...], biased: bool) -> None:
    key, query, bias = normal(*shape), normal(*shape, seed=2), normal(*shape[2:], seed=3)
    biases = [normal(shape[1], seed=4), normal(shape[1], seed=5)] if biased else None
    exact = [b.double() for b in biases] if biases else None
    want = gate(key.double(), query.double(), bias.double(), exact)
    close(gate(key, query, bias, biases), want, 1e-5)
    channel = 3 * normal(1, 1, shape[1], seed=6)
    exactly = channel_interaction(key.double(), channel.double(), standardise=True)
    means: list[Tensor] = []
    close(channel_interaction(key, channel, standardise=True, means=means), exactly, 1e-5)
    for got, exact_map in zip(means, (key.double(), exactly), strict=True):
        close(got, exact_map.mean(0, keepdim=True), 1e-5)
    close(gate(key, query, bias, biases, overwrite=True), want, 1e-5)


@needs_compiler
@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, (9, 9)), (5, 7, (3, 5)), (3, 3, (5, 5)), (1, 50, (7,))])
def test_adaptive_mean(height: int, width: int, size: tuple[int, ...]) -> None:
    x = normal(5, height, width)
    want = F.adaptive_avg_pool2d(x.double(), (1, *size)[-2:]).flatten(1)
    close(native.adaptive_mean(x, size), want, 1e-6)


@needs_compiler
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize(("points", "dims", "chans"), [(3, 2, 5), (9, 2, 40), (7, 1, 12)])
def test_a_local_slow_network(points: int, dims: int, chans: int, layers: int) -> None:
    torch.manual_seed(0)
    net = LocalSlowNet(points, dims, 8, layers, chans, omega_0="grid").requires_grad_(False)
    for parameter in net.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    x = normal(3, chans, 1 if dims == 1 else 12, 12)
    got = net(x)
    close(got, net.double()(x.double()), 1e-5)
    assert got.shape == (chans, 1, *net.shape)


@needs_compiler
def test_sigmoid_of_every_size_of_number() -> None:
    def silu(x: Tensor) -> Tensor:
        x = x.view(-1, 1, 1, 1)
        return native.global_products(torch.ones_like(x), [x, x, x])[3].flatten()

    x = torch.cat([torch.linspace(-120, 120, 20001), torch.logspace(-30, 30, 61), -torch.logspace(-30, 30, 61)])
    apart = (silu(x).double() - F.silu(x.double())).abs() / (1 + x.double().abs())
    assert float(apart.max()) < 2e-7
    special = silu(torch.tensor([torch.nan, torch.inf, 0.0]))
    assert special.isnan().tolist() == [True, False, False]
    assert special[1:].tolist() == [torch.inf, 0]
