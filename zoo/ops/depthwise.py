"""Depthwise convolution with large kernels, stride 1, output of the same size.

Torch's own kernels are fast for small kernels only. For larger ones there are C loops (`cpu/depthwise.c`; float32 on a
CPU, channels_last or contiguous) and Triton kernels on a GPU (`triton_depthwise.py`, chosen by :mod:`zoo.ops.gpu`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from zoo.ops import gpu, native
from zoo.ops.core import Saved, Unsuited, operator

__all__ = ["crop_kernel", "depthwise_conv2d", "depthwise_weight", "dilate_kernel", "place_kernel", "toeplitz"]

#: CPU dtypes for which a better layout or kernel size than the given one is known for torch's convolution.
CPU_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

#: Largest map, in pixels, for which building the dense matrix is worthwhile.
SMALL_MAP = 64


# ---- kernel algebra ----------------------------------------------------------------------------------------


def dilate_kernel(weight: Tensor, dilation: int) -> Tensor:
    """Write a dilated k x k kernel as a dense kernel of size (k - 1) * dilation + 1, with zeros in between.

    Args:
        weight: (C_out, C_in / groups, k, k).
        dilation: distance r >= 1 between neighbouring weights, in pixels.

    Returns:
        Dense kernel whose convolution with dilation 1 equals that of `weight` with dilation r.
    """
    return place_kernel(weight, (weight.shape[-1] - 1) * dilation + 1, dilation)


def place_kernel(weight: Tensor, size: int | tuple[int, int], dilation: int = 1) -> Tensor:
    """Centre a (dilated) kernel of odd size on a grid of zeros.

    Args:
        weight: (..., k_h, k_w), both odd.
        size: odd size of the grid, pixels, or (height, width); at least (k - 1) * dilation + 1 each.
        dilation: distance between neighbouring weights, pixels.

    Returns:
        (..., height, width), differentiable in `weight`.

    Raises:
        ValueError: the dilated kernel cannot be centred on the grid.
    """
    sizes = (size, size) if isinstance(size, int) else size
    slices = []
    for k, n in zip(weight.shape[-2:], sizes, strict=True):
        reach = dilation * (k // 2)
        if reach > n // 2 or n % 2 == 0 or k % 2 == 0:
            raise ValueError(
                f"a kernel of {k} taps with dilation {dilation} cannot be centred on {n} pixels; "
                f"both must be odd and the grid at least {2 * reach + 1} wide"
            )
        slices.append(slice(n // 2 - reach, n // 2 + reach + 1, dilation))
    grid = weight.new_zeros(*weight.shape[:-2], *sizes)
    grid[..., slices[0], slices[1]] = weight
    return grid


def crop_kernel(weight: Tensor, height: int, width: int, dilation: int = 1) -> Tensor:
    """Crop a centred odd kernel to the weights that can reach beyond zero padding on a height x width map.

    Two pixels of a map of n pixels are at most n - 1 apart, so weights further from the centre are never used: a 13 x
    13 kernel on a 2 x 2 map has nine live weights, not 169.
    """
    (k_h, k_w), (n_h, n_w) = weight.shape[-2:], ((height - 1) // dilation, (width - 1) // dilation)
    trim_y, trim_x = max(k_h // 2 - n_h, 0), max(k_w // 2 - n_w, 0)
    return weight[..., trim_y : k_h - trim_y, trim_x : k_w - trim_x]


def live_weights(weight: Tensor, height: int, width: int, dilation: int = 1) -> Tensor:
    """Weights of a (dilated) depthwise kernel for all offsets within a map, (C, 2 height - 1, 2 width - 1)."""
    return place_kernel(crop_kernel(weight[:, 0], height, width, dilation), (2 * height - 1, 2 * width - 1), dilation)


def toeplitz(weights: Tensor, height: int, width: int) -> Tensor:
    """Dense matrix of a depthwise convolution on a small map of fixed size, including zero padding.

    M[p, q] = weights[q - p] maps input pixel q to output pixel p (pixels in C order, offsets from the centre).

    Args:
        weights: (..., 2 height - 1, 2 width - 1), see :func:`live_weights`.
        height: rows of the map.
        width: columns of the map.

    Returns:
        (..., height * width, height * width), differentiable in `weights`.
    """
    # windows[a, b, i, j] = weights[a + i, b + j]: output pixel (height - 1 - a, width - 1 - b) sees input (i, j)
    windows = weights.unfold(-2, height, 1).unfold(-2, width, 1)
    return windows.reshape(*weights.shape[:-2], height * width, height * width).flip(-2)


# ---- the operators -----------------------------------------------------------------------------------------


def _uses_planes(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> bool:
    """Whether a contiguous map is processed plane by plane instead of being converted to channels_last."""
    if x.ndim != 4 or not x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return False
    if x.device.type == "cpu":
        return x.dtype == torch.float32 and x.shape[-1] > 12 and dilation == 1 and bias is None
    return not gpu.suits(weight, dilation)


def _is_large(weight: Tensor, dilation: int) -> bool:
    """Whether a kernel reaches beyond direct neighbours, where torch's own kernels become slow."""
    return dilation * (weight.shape[-1] // 2) > 1


def _layout(x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1) -> torch.memory_format:
    return torch.contiguous_format if _uses_planes(x, weight, bias, dilation) else torch.channels_last


@operator(
    layout=_layout,
    whole=lambda x, weight, bias, dilation: x.ndim == 4 and _is_large(weight, dilation),
    autocast="cast",
)
def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1) -> Tensor:
    """Depthwise convolution, stride 1, zero padding, output of the same size.

    Args:
        x: (B, C, H, W), any memory format.
        weight: (C, 1, k_h, k_w), both odd.
        bias: (C,) or None.
        dilation: distance between neighbouring weights, pixels.

    Returns:
        (B, C, H, W), in the cheapest memory format.
    """
    padding = [dilation * (weight.shape[-2] // 2), dilation * (weight.shape[-1] // 2)]
    return F.conv2d(x, weight, bias, 1, padding, dilation, x.shape[1])


@depthwise_conv2d.gradient
def _depthwise_gradient(saved: Saved, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    """The gradient of the input is the convolution with the flipped kernel."""
    x, weight, _, dilation = saved.inputs
    wants_x, wants_weight, wants_bias, _ = saved.wanted
    d_x = depthwise_conv2d(grad, weight.flip(-2, -1), None, dilation) if wants_x else None
    d_weight = depthwise_weight(x, grad, list(weight.shape[-2:]), dilation) if wants_weight else None
    return d_x, d_weight, grad.sum((0, 2, 3)) if wants_bias else None, None


@operator(whole=lambda x, grad, kernel, dilation: dilation * (kernel[-1] // 2) > 1)
def depthwise_weight(x: Tensor, grad: Tensor, kernel: list[int], dilation: int = 1) -> Tensor:
    """Gradient of the weight of :func:`depthwise_conv2d`.

    Args:
        x: input of the convolution, (B, C, H, W).
        grad: gradient of its output, (B, C, H, W).
        kernel: (k_h, k_w), both odd.
        dilation: distance between neighbouring weights, pixels.

    Returns:
        (C, 1, k_h, k_w).
    """
    padding, chans = [dilation * (k // 2) for k in kernel], x.shape[1]
    return conv2d_weight(x, (chans, 1, *kernel), grad, 1, padding, dilation, chans)


# ---- on a CPU ----------------------------------------------------------------------------------------------


@depthwise_conv2d.on("cpu", *CPU_TYPES)
def _depthwise_on_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    _check(x, weight, bias, dilation)
    weight = crop_kernel(weight, x.shape[-2], x.shape[-1], dilation)
    layout = _layout(x, weight, bias, dilation)
    if x.dtype == torch.float32 and (_is_large(weight, dilation) or layout == torch.contiguous_format):
        try:
            return _by_loops(x, weight, bias, dilation)
        except Unsuited:
            pass
    if x.dtype == torch.float64 and x.shape[-2:].numel() <= SMALL_MAP:  # torch has no depthwise kernel for it
        return _by_matrix(x, weight, bias, dilation).contiguous(memory_format=layout)
    if x.dtype != torch.float64:
        # torch's contiguous kernels become very slow from width 11 (AVX2) or 14 (AVX-512) on
        x = x.contiguous(memory_format=torch.channels_last)
        weight, dilation = _avoid_slow_kernels(weight, dilation)
    return depthwise_conv2d.reference(x, weight, bias, dilation).contiguous(memory_format=layout)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> None:
    native.fit("x", x, -1, -1, -1, -1)
    native.fit("the kernel", weight, x.shape[1], 1, -1, -1)
    if bias is not None:
        native.fit("bias", bias, x.shape[1])
    if dilation < 1 or any(k % 2 == 0 for k in weight.shape[2:]):
        raise Unsuited(f"the kernel has even sizes, {tuple(weight.shape[2:])}, or dilation={dilation} is not positive")


def _by_loops(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    if _uses_planes(x, weight, bias, dilation):
        y = torch.empty_like(x)
        failed = native.call("depthwise_planes", x, weight.contiguous(), y, *x.shape, *weight.shape[-2:])
    else:
        x = x.contiguous(memory_format=torch.channels_last)
        y = torch.empty_like(x)
        rows = weight.flatten(1).t().contiguous()  # (k_h k_w, C)
        shift = x.new_zeros(len(weight)) if bias is None else bias.contiguous()
        failed = native.call("depthwise", x, rows, shift, y, *x.shape, *weight.shape[-2:], dilation)
    if failed:
        raise Unsuited("a weight is not finite")
    return y


def _by_matrix(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """One dense matrix product per channel."""
    height, width = x.shape[-2:]
    matrix = toeplitz(live_weights(weight, height, width, dilation), height, width)
    y = (x.flatten(2).transpose(0, 1) @ matrix.transpose(1, 2)).transpose(0, 1).unflatten(-1, (height, width))
    if not bool(y.sum().isfinite()):  # pixels are also multiplied with the zeros of the matrix
        raise Unsuited("an output is not finite")
    return y if bias is None else y + bias.view(-1, 1, 1)


def _avoid_slow_kernels(weight: Tensor, dilation: int) -> tuple[Tensor, int]:
    """Pad kernels with zeros to avoid slow cases of torch's channels_last kernels; the result is unchanged.

    With AVX-512, kernels of width 12 or 13 run at less than half the speed of wider ones; with AVX2, dilated kernels
    that reach five pixels or more run at a tenth of the speed of dense ones (oneDNN 3.12).
    """
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        if dilation == 1 and weight.shape[-1] == 13:
            return F.pad(weight, (1, 1)), dilation
    elif dilation > 1 and dilation * (weight.shape[-1] // 2) > 4:
        return dilate_kernel(weight, dilation), 1
    return weight, dilation


@depthwise_weight.on("cpu", torch.float32, torch.float64)
def _weight_on_cpu(x: Tensor, grad: Tensor, kernel: list[int], dilation: int) -> Tensor:
    native.fit("x", x, -1, -1, -1, -1)
    native.fit("grad", grad, *x.shape)
    height, width = x.shape[-2:]
    if dilation < 1 or any(k < 1 or k % 2 == 0 for k in kernel):
        raise Unsuited(f"kernel={kernel} must be odd and dilation={dilation} positive")
    live = [min(k, 2 * ((n - 1) // dilation) + 1) for k, n in zip(kernel, (height, width), strict=True)]
    small = height * width <= SMALL_MAP and dilation * (min(live) - 1) + 1 >= min(height, width)
    if x.dtype == torch.float32 and dilation * (live[-1] // 2) > 1 and native.library() is not None:
        d_weight = _weight_by_loops(x, grad, live, dilation)
    elif small or (x.dtype == torch.float64 and height * width <= SMALL_MAP):
        d_weight = _weight_by_matrix(x, grad, live, dilation)
    else:
        raise Unsuited("the library is as fast")
    if not bool(d_weight.sum().isfinite()):  # pixels are also multiplied with padding or zeros
        raise Unsuited("a gradient is not finite")
    (k_h, k_w), (n_h, n_w) = kernel, live
    return F.pad(d_weight, [(k_w - n_w) // 2] * 2 + [(k_h - n_h) // 2] * 2).contiguous()


def _weight_by_loops(x: Tensor, grad: Tensor, kernel: list[int], dilation: int) -> Tensor:
    chans, parts = x.shape[1], min(len(x), torch.get_num_threads())
    if _uses_planes(x, x, None, dilation):
        found = x.new_empty(parts, chans, 1, *kernel)
        native.call("depthwise_planes_taps", x, grad.contiguous(), found, *x.shape, *kernel, parts)
        return found.sum(0)
    x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    found = x.new_empty(parts, kernel[0] * kernel[1], chans)
    native.call("depthwise_taps", x, grad, found, *x.shape, *kernel, dilation, parts)
    return found.sum(0).t().reshape(chans, 1, *kernel)


def _weight_by_matrix(x: Tensor, grad: Tensor, kernel: list[int], dilation: int) -> Tensor:
    """Sums of the matrix's gradient over its diagonals: entries with the same offset share one weight."""
    height, width = x.shape[-2:]
    of_matrix = grad.flatten(2).permute(1, 2, 0) @ x.flatten(2).transpose(0, 1)  # (C, H W, H W)
    offsets = torch.arange((2 * height - 1) * (2 * width - 1), device=x.device).view(2 * height - 1, 2 * width - 1)
    of_offset = x.new_zeros(x.shape[1], offsets.numel())
    of_offset.index_add_(1, toeplitz(offsets, height, width).flatten(), of_matrix.flatten(1))
    reaches = [dilation * (k // 2) for k in kernel]
    rows, cols = (slice(n - 1 - r, n + r, dilation) for n, r in zip((height, width), reaches, strict=True))
    return of_offset.view(-1, 1, 2 * height - 1, 2 * width - 1)[..., rows, cols]


# ---- on a GPU ----------------------------------------------------------------------------------------------

GPU_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@depthwise_conv2d.on("cuda", *GPU_TYPES)
def _depthwise_on_gpu(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    if not gpu.suits(weight, dilation):
        raise Unsuited("the library is as fast")
    _check(x, weight, bias, dilation)
    return gpu.convolve(x, weight, bias)


@depthwise_weight.on("cuda", *GPU_TYPES)
def _weight_on_gpu(x: Tensor, grad: Tensor, kernel: list[int], dilation: int) -> Tensor:
    if dilation != 1 or min(kernel) < 7:
        raise Unsuited("the library is as fast")
    native.fit("x", x, -1, -1, -1, -1)
    native.fit("grad", grad, *x.shape)
    return gpu.weight_gradient(x, grad, kernel)
