"""The feed-forward network with response normalisation against its formula."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.benchmarks.models import lively
from zoo.benchmarks.plain import plain_copy
from zoo.kernels import native
from zoo.kernels.feed_forward import feed_forward, response_norm


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
    shape: tuple[int, ...], order: torch.memory_format, loops: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not loops:
        monkeypatch.setattr(native, "available", lambda *_, **__: False)
    chans = shape[1]
    x, shortcut = normal(*shape), normal(*shape, seed=2)
    shapes = [(3, chans), (3,), (chans, 3), (chans,), (16, chans), (16,), (16,), (chans, 16), (chans,)]
    weights = [normal(*s, seed=i) for i, s in enumerate(shapes)]
    expected = shortcut + textbook(x, weights)
    given = [t.to(dtype).contiguous(memory_format=order) for t in (x, shortcut)] + [w.to(dtype) for w in weights]
    kept = copy.deepcopy(given)
    with torch.inference_mode():
        out = feed_forward(given[0], given[1], given[2:])
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-4)
    torch.testing.assert_close(given, kept, rtol=0, atol=0)  # nothing is overwritten


def test_response_norm_gradients() -> None:
    inputs = tuple(t.requires_grad_() for t in (normal(2, 2, 3, 4), normal(1, 1, 1, 4), normal(1, 1, 1, 4)))
    assert torch.autograd.gradcheck(response_norm, inputs)
    assert torch.autograd.gradgradcheck(response_norm, inputs)


# ---- inside a model ----------------------------------------------------------------------------------------


def deployed() -> torch.nn.Module:
    return zoo.to_deploy(lively(zoo.create_model("test_unireplknet")).eval())


def test_compilers_keep_our_operators_whole() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    model, images = deployed(), normal(2, 3, 64, 96, dtype=torch.float32)
    program = torch.compile(model, backend=keep, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(program(images), model(images), rtol=1e-5, atol=1e-5)
    assert "kernel_zoo.feed_forward" in str(graphs[0].graph)
    assert "kernel_zoo.depthwise" in str(graphs[0].graph)
    learning = torch.compile(model, backend=keep, fullgraph=True)(images)
    assert "kernel_zoo" not in str(graphs[-1].graph)
    assert learning.requires_grad


def test_operators_are_well_formed() -> None:
    x, shortcut = (normal(2, 4, 3, 5, dtype=torch.float32, seed=i) for i in (1, 2))
    sizes = [(3, 4), (3,), (4, 3), (4,), (16, 4), (16,), (16,), (4, 16), (4,)]
    weights = [normal(*s, dtype=torch.float32, seed=i) for i, s in enumerate(sizes)]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.kernel_zoo.feed_forward, (x, shortcut, weights), test_utils=tests)
    weight = normal(4, 1, 7, 7, dtype=torch.float32)
    for bias in (None, weights[-1]):
        torch.library.opcheck(torch.ops.kernel_zoo.depthwise, (x, weight, bias, 1), test_utils=tests)


def test_export_sees_the_library_only() -> None:
    model, images = deployed(), normal(2, 3, 64, 64, dtype=torch.float32)
    with torch.no_grad():
        program = torch.export.export(model, (images,))
        torch.testing.assert_close(program.module()(images), model(images), rtol=1e-4, atol=1e-4)
    assert "kernel_zoo" not in str(program.graph)


def test_operations_are_counted_in_full() -> None:
    model, images = deployed(), normal(1, 3, 64, 64, dtype=torch.float32)
    counts = []
    for form in (model, plain_copy(model)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            form(images)
        counts.append(counter.get_total_flops())
    assert counts[0] == pytest.approx(counts[1], rel=0.01)


@pytest.mark.slow
def test_compiled_for_real() -> None:
    model, images = deployed(), normal(2, 3, 64, 64, dtype=torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(torch.compile(model)(images), model(images), rtol=1e-4, atol=1e-4)
