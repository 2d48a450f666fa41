"""Large-kernel depthwise convolution and re-parameterisation against textbook loops, path against path."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels import large_kernel
from zoo.kernels.large_kernel import (
    BRANCHES,
    DepthwiseConv2d,
    DilatedReparamBlock,
    crop_kernel,
    depthwise_conv2d,
    dilate_kernel,
    fuse_conv_bn,
    live_taps,
    place_kernel,
    toeplitz,
)

SIZES = sorted(BRANCHES)


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


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fill a module with numbers that keep activations of order one and every normalisation non-trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
                value.copy_(1 + 0.2 * noise.abs() if name.endswith("var") else 0.3 * noise)
    return module


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


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_fused_conv_and_norm(bias: bool, affine: bool) -> None:
    conv = randomised(nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=bias).double())
    bn = randomised(nn.BatchNorm2d(6, affine=affine).double(), seed=3).eval()
    x = normal(2, 4, 5, 6)
    weight, shift = fuse_conv_bn(conv.weight, conv.bias, bn)
    torch.testing.assert_close(F.conv2d(x, weight, shift, 1, 1, 1, 2), bn(conv(x)), rtol=0, atol=1e-12)


def test_fusing_is_exact_in_half_precision() -> None:
    bn = randomised(nn.BatchNorm2d(2)).half().eval()
    weight, bias = fuse_conv_bn(normal(2, 1, 3, 3, dtype=torch.float16), None, bn)
    assert weight.dtype == bias.dtype == torch.float64


def test_fusing_needs_running_statistics() -> None:
    with pytest.raises(ValueError, match="track_running_stats=True"):
        fuse_conv_bn(normal(2, 1, 3, 3), None, nn.BatchNorm2d(2, track_running_stats=False))


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (2, 3), (5, 5)])
@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (3, 2), (7, 2), (9, 1)])
def test_cropping_changes_nothing(shape: tuple[int, int], kernel: int, dilation: int) -> None:
    x, weight = normal(2, 3, *shape), normal(3, 1, kernel, kernel, seed=2)
    cropped = crop_kernel(weight, *shape, dilation)
    assert all(dilation * (k // 2) < n for k, n in zip(cropped.shape[-2:], shape, strict=True))
    expected = textbook(x, weight, None, dilation)
    torch.testing.assert_close(textbook(x, cropped, None, dilation), expected, rtol=0, atol=1e-12)
    matrix = toeplitz(live_taps(weight, *shape, dilation), *shape)
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


# ---- the Dilated Reparam Block -----------------------------------------------------------------------------


def textbook_block(block: DilatedReparamBlock, x: Tensor) -> Tensor:
    """The definition: every convolution, its normalisation, the sum."""
    total = block["origin_bn"](
        F.conv2d(x, block["lk_origin"].weight, padding=block.kernel_size // 2, groups=x.shape[1])
    )
    for k, r in BRANCHES[block.kernel_size]:
        conv = block[f"dil_conv_k{k}_{r}"]
        y = F.conv2d(x, conv.weight, padding=r * (k // 2), dilation=r, groups=x.shape[1])
        total = total + block[f"dil_bn_k{k}_{r}"](y)
    return total


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", [(2, 3), (19, 18)])
def test_merged_block_equals_its_branches(size: int, shape: tuple[int, int]) -> None:
    block = randomised(DilatedReparamBlock(4, size).double()).eval()
    x = normal(2, 4, *shape)
    expected = textbook_block(block, x)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-11)
    block.reparameterize()
    assert sorted(block.state_dict()) == ["lk_origin.bias", "lk_origin.weight"]
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-11)
    weight = block["lk_origin"].weight
    block.reparameterize()
    assert block["lk_origin"].weight is weight
    built = DilatedReparamBlock(4, size, deploy=True).double()
    built.load_state_dict(block.state_dict())
    torch.testing.assert_close(built(x), expected, rtol=0, atol=1e-11)


def test_merging_keeps_type_training_flag_and_freezing() -> None:
    block = randomised(DilatedReparamBlock(4, 7).bfloat16()).train()
    block["lk_origin"].weight.requires_grad_(False)
    block.reparameterize()
    conv = block["lk_origin"]
    assert conv.weight.dtype == conv.bias.dtype == torch.bfloat16
    assert not conv.weight.requires_grad
    assert not conv.bias.requires_grad
    assert block.training


def test_unknown_kernel_size_is_named() -> None:
    with pytest.raises(ValueError, match=r"kernel_size 19 has no set of dilated branches; choose one of \[5, 7, 9"):
        DilatedReparamBlock(4, 19)


@pytest.mark.parametrize(
    ("size", "shape", "batch"), [(13, (7, 7), 60), (9, (4, 4), 40), (7, (2, 2), 8), (5, (3, 5), 16)]
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_statistics_from_moments_equal_those_of_the_branches(
    size: int, shape: tuple[int, int], batch: int, memory_format: torch.memory_format
) -> None:
    """One training step on a small map: outputs, gradients and running statistics, in float64."""
    fast = randomised(DilatedReparamBlock(3, size).double()).train()
    slow = copy.deepcopy(fast)
    x = (normal(batch, 3, *shape) + 2).contiguous(memory_format=memory_format)
    cotangent = normal(batch, 3, *shape, seed=5)
    results = []
    for block, forward in ((fast, fast), (slow, lambda x: textbook_block(slow, x))):
        z = x.clone().requires_grad_()
        y = forward(z)
        y.backward(cotangent)
        results.append([y, z.grad, *(p.grad for p in block.parameters()), *(b.double() for b in block.buffers())])
    assert fast._moments_are_faster(x)
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_moments_do_not_cancel() -> None:
    """A large mean with a small spread costs E[y^2] - E[y]^2 all its digits, but not this formula."""
    block = randomised(DilatedReparamBlock(2, 7)).train()
    double = copy.deepcopy(block).double()
    x = normal(64, 2, 4, 4, dtype=torch.float32) * 0.01 + 30
    torch.testing.assert_close(block(x).double(), textbook_block(double, x.double()), rtol=0, atol=2e-3)


def test_moments_gradcheck() -> None:
    block = randomised(DilatedReparamBlock(1, 5).double()).train()
    x = normal(6, 1, 2, 2).requires_grad_()
    weights = {name: p.detach().requires_grad_() for name, p in block.named_parameters()}

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(weights, values, strict=True)), (x,))

    with torch.no_grad():
        assert block._moments_are_faster(x)
    assert torch.autograd.gradcheck(run, (x, *weights.values()))


def test_moments_step_aside_where_they_are_not_equal_or_not_faster() -> None:
    x = torch.randn(32, 2, 3, 3)
    assert randomised(DilatedReparamBlock(2, 5)).train()._moments_are_faster(x)
    assert not DilatedReparamBlock(2, 5).eval()._moments_are_faster(x)
    assert not DilatedReparamBlock(2, 5)._moments_are_faster(x[:4])  # fewer samples than pixels
    assert not DilatedReparamBlock(2, 5)._moments_are_faster(torch.randn(32, 2, 30, 30))
    assert not nn.SyncBatchNorm.convert_sync_batchnorm(DilatedReparamBlock(2, 5))._moments_are_faster(x)
    frozen = DilatedReparamBlock(2, 5)
    frozen["origin_bn"].eval()
    assert not frozen._moments_are_faster(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not DilatedReparamBlock(2, 5)._moments_are_faster(x)


def test_block_scripts_and_traces_in_both_forms() -> None:
    block = randomised(DilatedReparamBlock(2, 9).double()).eval()
    x = normal(1, 2, 12, 5)
    expected = block(x)
    for _ in range(2):
        for program in (torch.jit.script(block), torch.fx.symbolic_trace(block)):
            torch.testing.assert_close(program(x), expected, rtol=0, atol=1e-11)
        block.reparameterize()


def test_library_module_lists_what_it_exports() -> None:
    assert all(hasattr(large_kernel, name) for name in large_kernel.__all__)
