"""Depthwise convolution against textbook loops, path against path."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.models.layers.dilated_reparam import DepthwiseConv2d
from zoo.ops.depthwise import (
    crop_kernel,
    depthwise_conv2d,
    dilate_kernel,
    live_weights,
    place_kernel,
    toeplitz,
)


def textbook(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int = 1) -> Tensor:
    """y[c, i, j] = bias[c] + sum_uv weight[c, u, v] x[c, i + r (u - centre), j + r (v - centre)]."""
    height, width = x.shape[-2:]
    y = torch.zeros_like(x)
    k_h, k_w = weight.shape[-2:]
    for i in range(height):
        for j in range(width):
            for u in range(k_h):
                for v in range(k_w):
                    p, q = i + dilation * (u - k_h // 2), j + dilation * (v - k_w // 2)
                    if 0 <= p < height and 0 <= q < width:
                        y[:, :, i, j] += weight[:, 0, u, v] * x[:, :, p, q]
    return y if bias is None else y + bias.view(1, -1, 1, 1)


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---- the algebra of kernels --------------------------------------------------------------------------------


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (3, 4), (5, 2), (7, 2), (13, 1)])
def test_dilated_kernel_is_a_dense_kernel(kernel: int, dilation: int) -> None:
    x, weight = normal(2, 3, 9, 8), normal(3, 1, kernel, kernel, seed=2)
    dense = dilate_kernel(weight, dilation)
    assert dense.shape[-1] == (kernel - 1) * dilation + 1
    expected = textbook(x, weight, None, dilation)
    torch.testing.assert_close(textbook(x, dense, None), expected, rtol=0, atol=1e-12)


def test_place_kernel_refuses_what_does_not_fit() -> None:
    weight = normal(2, 1, 3, 3)
    with pytest.raises(ValueError, match="grid at least 11 wide"):
        place_kernel(weight, 9, dilation=5)
    with pytest.raises(ValueError, match="must be odd"):
        place_kernel(weight, 8)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (2, 3), (5, 5)])
@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (3, 2), (7, 2), (9, 1)])
def test_cropping_changes_nothing(shape: tuple[int, int], kernel: int, dilation: int) -> None:
    x, weight = normal(2, 3, *shape), normal(3, 1, kernel, kernel, seed=2)
    cropped = crop_kernel(weight, *shape, dilation)
    assert all(dilation * (k // 2) < n for k, n in zip(cropped.shape[-2:], shape, strict=True))
    expected = textbook(x, weight, None, dilation)
    torch.testing.assert_close(textbook(x, cropped, None, dilation), expected, rtol=0, atol=1e-12)
    matrix = toeplitz(live_weights(weight, *shape, dilation), *shape)
    dense = torch.einsum("cpq,bcq->bcp", matrix, x.flatten(2)).view_as(x)
    torch.testing.assert_close(dense, expected, rtol=0, atol=1e-12)


# ---- the operator ------------------------------------------------------------------------------------------

MAPS = [(1, 1), (2, 2), (1, 6), (4, 4), (7, 7), (8, 8), (9, 8), (14, 10)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", MAPS)
@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (3, 1), (3, 5), (5, 1), (7, 2), (13, 1)])
def test_every_path_equals_the_library(
    shape: tuple[int, int], kernel: int, dilation: int, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    """Values and gradients, on maps below, at and above the size where the path changes."""
    x = normal(3, 4, *shape, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
    weight = normal(4, 1, kernel, kernel, dtype=dtype, seed=2).requires_grad_()
    bias = normal(4, dtype=dtype, seed=3).requires_grad_()
    reach = dilation * (kernel // 2)
    expected = F.conv2d(x, weight, bias, 1, reach, dilation, 4)
    tolerance = {"rtol": 0, "atol": 1e-11 if dtype == torch.float64 else 2e-4}
    out = depthwise_conv2d(x, weight, bias, dilation)
    torch.testing.assert_close(out, expected, **tolerance)
    with torch.no_grad():
        torch.testing.assert_close(depthwise_conv2d(x, weight, bias, dilation), expected, **tolerance)
        torch.testing.assert_close(
            depthwise_conv2d(x, weight, None, dilation), expected - bias.view(-1, 1, 1), **tolerance
        )
    cotangent = normal(*out.shape, dtype=dtype, seed=4)
    got = torch.autograd.grad(out, (x, weight, bias), cotangent)
    want = torch.autograd.grad(expected, (x, weight, bias), cotangent)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=tolerance["atol"])


@pytest.mark.parametrize("shape", [(3, 3), (4, 2)])
def test_operator_against_the_textbook_loop(shape: tuple[int, int]) -> None:
    x, weight, bias = normal(2, 3, *shape), normal(3, 1, 5, 5, seed=2), normal(3, seed=3)
    torch.testing.assert_close(depthwise_conv2d(x, weight, bias), textbook(x, weight, bias), rtol=0, atol=1e-12)


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
@pytest.mark.parametrize(("kernel", "dilation"), [(13, 1), (7, 2), (3, 5), (3, 1)])
def test_zero_taps_for_the_cpu_change_nothing(
    capability: str, kernel: int, dilation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    x, weight = normal(2, 3, 17, 19, dtype=torch.float32), normal(3, 1, kernel, kernel, dtype=torch.float32)
    expected = F.conv2d(x, weight, None, 1, dilation * (kernel // 2), dilation, 3)
    torch.testing.assert_close(depthwise_conv2d(x, weight, None, dilation), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 2), (3, 2)])
def test_matrix_path_gradients(shape: tuple[int, int]) -> None:
    inputs = tuple(t.requires_grad_() for t in (normal(2, 2, *shape), normal(2, 1, 3, 3), normal(2)))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        args = (inputs[0].detach().contiguous(memory_format=memory_format).requires_grad_(), *inputs[1:])
        assert torch.autograd.gradcheck(depthwise_conv2d, args)
        assert torch.autograd.gradgradcheck(depthwise_conv2d, args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4, 4), (12, 12)])
def test_half_precision_keeps_its_type(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, weight = normal(2, 8, *shape), normal(8, 1, 7, 7, seed=2) / 7
    out = depthwise_conv2d(x.to(dtype), weight.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), textbook(x, weight, None), rtol=0.05, atol=0.05)


def test_tracers_and_compilers_see_one_convolution() -> None:
    """Sizes met while recording must not be baked in: a recorded program runs on maps of other sizes."""
    layer = DepthwiseConv2d(2, 7).double()
    small, large = normal(1, 2, 3, 3), normal(1, 2, 11, 12)
    programs: dict[str, Callable[[Tensor], Tensor]] = {
        "fx": torch.fx.symbolic_trace(layer),
        "script": torch.jit.script(layer),
        "trace": torch.jit.trace(layer, small),
        "compile": torch.compile(layer, backend="eager", fullgraph=True, dynamic=True),
    }
    for x in (small, large):
        for name, program in programs.items():
            torch.testing.assert_close(program(x), layer(x), rtol=0, atol=1e-12, msg=name)


def test_export_with_free_sizes() -> None:
    size = {i: torch.export.Dim(f"n{i}", min=2, max=64) for i in (0, 2, 3)}
    layer = DepthwiseConv2d(2, 5)
    program = torch.export.export(layer, (torch.randn(2, 2, 6, 7),), dynamic_shapes=({**size},)).module()
    x = torch.randn(5, 2, 3, 20)
    torch.testing.assert_close(program(x), layer(x))


def test_even_kernels_have_no_centre() -> None:
    with pytest.raises(ValueError, match="must be odd"):
        DepthwiseConv2d(4, 6)
