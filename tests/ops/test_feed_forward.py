"""The feed-forward network with response normalisation against its formula."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.benchmarks.models import lively
from zoo.ops import feed_forward, reference, response_norm


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def textbook(x: Tensor, weights: list[Tensor]) -> Tensor:
    down, d, up, u, w1, b1, gamma, w2, b2 = weights
    gate = torch.sigmoid(torch.relu(x.mean((2, 3)) @ down.T + d) @ up.T + u)
    h = F.gelu((x * gate[:, :, None, None]).movedim(1, -1) @ w1.T + b1)
    energy = h.square().sum((1, 2), keepdim=True).sqrt()
    h = h * (1 + gamma * energy / (energy.mean(-1, keepdim=True) + 1e-6))
    return (h @ w2.T + b2).movedim(-1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loops", [True, False], ids=["native", "plain"])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (5, 4, 3, 5), (3, 2, 4, 5)])
def test_every_path_equals_the_formula(
    shape: tuple[int, ...], order: torch.memory_format, loops: bool, dtype: torch.dtype
) -> None:
    chans = shape[1]
    x, shortcut = normal(*shape), normal(*shape, seed=2)
    shapes = [(3, chans), (3,), (chans, 3), (chans,), (16, chans), (16,), (16,), (chans, 16), (chans,)]
    weights = [normal(*s, seed=i) for i, s in enumerate(shapes)]
    expected = shortcut + textbook(x, weights)
    given = [t.to(dtype).contiguous(memory_format=order) for t in (x, shortcut)] + [w.to(dtype) for w in weights]
    kept = copy.deepcopy(given)
    with torch.inference_mode(), nullcontext() if loops else reference():
        out = feed_forward(given[0], given[2:], given[1])
        alone = feed_forward(given[0], given[2:])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(alone.double(), textbook(x, weights), rtol=0, atol=tolerance)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(given, kept, rtol=0, atol=0)  # nothing is overwritten


def test_response_norm_gradients() -> None:
    inputs = tuple(t.requires_grad_() for t in (normal(2, 2, 3, 4), normal(1, 1, 1, 4), normal(1, 1, 1, 4)))
    assert torch.autograd.gradcheck(response_norm, inputs)
    assert torch.autograd.gradgradcheck(response_norm, inputs)
    assert torch.autograd.gradcheck(response_norm, inputs[:2])  # without a bias


# ---- inside a model ----------------------------------------------------------------------------------------


def deployed() -> torch.nn.Module:
    return zoo.to_deploy(lively(zoo.create_model("test_unireplknet")).eval())


def test_compilers_keep_our_operators_whole() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph)

    model, images = deployed(), normal(2, 3, 64, 96, dtype=torch.float32)
    program = torch.compile(model, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(program(images), model(images), rtol=1e-5, atol=1e-5)
    assert "zoo.feed_forward" in str(graphs[0].graph)
    assert "zoo.depthwise_conv2d" in str(graphs[0].graph)
    learning = program(images)
    assert "zoo.feed_forward" not in str(graphs[-1].graph)  # which has no gradient of its own
    assert "zoo.depthwise_conv2d" in str(graphs[-1].graph)
    assert learning.requires_grad


def test_export_sees_the_library_only() -> None:
    model, images = deployed(), normal(2, 3, 64, 64, dtype=torch.float32)
    with torch.no_grad():
        program = torch.export.export(model, (images,))
        torch.testing.assert_close(program.module()(images), model(images), rtol=1e-4, atol=1e-4)
    assert "zoo." not in str(program.graph)


def test_operations_are_counted_in_full() -> None:
    model, images = deployed(), normal(1, 3, 64, 64, dtype=torch.float32)
    counts = []
    for mode in (reference, torch.no_grad, torch.inference_mode):
        with mode(), FlopCounterMode(display=False) as counter:
            model(images)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == counts[2] > 0


@pytest.mark.slow
def test_compiled_for_real() -> None:
    model, images = deployed(), normal(2, 3, 64, 64, dtype=torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(torch.compile(model)(images), model(images), rtol=1e-4, atol=1e-4)
