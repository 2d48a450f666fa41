"""The loops in C against torch's operators in float64, and what they are given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops import channel_norm, depthwise_conv2d, feed_forward
from zoo.ops.core import Unsuited
from zoo.ops.depthwise import depthwise_weight
from zoo.ops.native import _function, call, library, signatures

needs_compiler = pytest.mark.skipif(library() is None, reason="no C compiler, or an OpenMP that torch lacks")


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
    x, shortcut = (normal(batch, pixels, chans, seed=i).mT.unsqueeze(-1) for i in (10, 11))  # channels_last
    got = feed_forward.fast["cpu"].function(x, weights, shortcut).squeeze(-1).mT
    x, shortcut = x.squeeze(-1).mT.double(), shortcut.squeeze(-1).mT.double()
    down, d, up, u, w1, b1, gamma, w2, b2 = (w.double() for w in weights)
    gate = F.linear(F.linear(x.mean(1), down, d).relu(), up, u).sigmoid()
    hidden = F.gelu(F.linear(x * gate[:, None], w1, b1))
    norm = hidden.square().sum(1, keepdim=True).sqrt()
    hidden = hidden * (1 + gamma * norm / (norm.mean(-1, keepdim=True) + 1e-6))
    close(got, F.linear(hidden, w2, b2) + shortcut, 2e-6)


@needs_compiler
@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (2, 5, 3, 4), (1, 40, 9, 7)])
def test_layer_norm(shape: tuple[int, ...], gelu: bool) -> None:
    x, weight, bias = 3 + normal(*shape), normal(shape[1], seed=2), normal(shape[1], seed=3)
    rows = x.double().movedim(1, -1)
    want = F.layer_norm(rows, rows.shape[-1:], weight.double(), bias.double(), 1e-6).movedim(-1, 1)
    close(channel_norm.fast["cpu"].function(x, weight, bias, 1e-6, gelu), F.gelu(want) if gelu else want, 1e-5)


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
    close(depthwise_conv2d(x, weight, bias, dilation), want.detach(), 1e-6)
    close(depthwise_conv2d(x, weight, None, dilation), want.detach() - bias.double()[:, None, None], 1e-6)
    close(depthwise_weight(x, grad, [sizes[0], sizes[1]], dilation), exact.grad, 1e-6)


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


# ---- what a loop is given ----------------------------------------------------------------------------------


@needs_compiler
def test_every_loop_has_declared_types() -> None:
    assert signatures()
    for name, (kinds, answers) in signatures().items():
        function = _function(name)
        assert len(function.argtypes) == len(kinds)
        assert (function.restype is not None) == answers


@needs_compiler
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({7: None}, TypeError, "takes 8 arguments, got 7"),
        ({4: 6.0}, TypeError, "number of type int"),
        ({4: True}, TypeError, "number of type int"),
        ({4: 2**70}, TypeError, "64 bits"),
        ({6: "1"}, TypeError, "number of type"),
        ({3: 3}, TypeError, "takes a tensor"),
        ({0: torch.ones(2, 3).double()}, Unsuited, "float64"),
        ({0: torch.ones(2, 3).int()}, Unsuited, "int32"),
        ({0: torch.ones(2, 3, device="meta")}, Unsuited, "meta"),
        ({0: torch.ones(3, 2).T}, Unsuited, "strides"),
        ({0: torch.ones(2, 3).to_sparse()}, Unsuited, "without gaps"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_loop_does_not_take_is_refused(changes: dict[int, object], error: type[Exception], words: str) -> None:
    x, weight = torch.ones(2, 3), torch.ones(3)
    given: dict[int, Any] = dict(enumerate([x, weight, weight, torch.empty_like(x), 2, 3, 1e-6, 0])) | changes
    arguments = [value for value in given.values() if value is not None]
    with pytest.raises(error, match=words):
        call("layer_norm", *arguments)
