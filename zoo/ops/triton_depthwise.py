"""Triton kernels for depthwise convolution with large kernels, forward and backward.

A program keeps a tile of pixels and channels in registers while it loops over the taps. The gradient of the input is
the same convolution with reversed taps.

Importing this file needs Triton; :mod:`zoo.ops.gpu` decides when. With TRITON_INTERPRET=1 in the environment the
kernels run on a CPU, for tests.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["convolve", "weight_gradient"]

#: Tile sizes (pixels, channels), and the number of programs that share the sum of a weight gradient.
PIXELS, CHANS, SHARES = 64, 32, 16


@triton.jit
def _convolve(
    x, taps, bias, y, chans, height, width,
    K_H: tl.constexpr, K_W: tl.constexpr, BIAS: tl.constexpr, PIXELS: tl.constexpr, CHANS: tl.constexpr,
):  # fmt: skip
    """y[b, p, c] = bias[c] + sum over taps of taps[t, c] x[b, p + t, c], maps in channels_last order."""
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    chan = tl.program_id(1) * CHANS + tl.arange(0, CHANS)
    start = tl.program_id(2).to(tl.int64) * height * width * chans
    row, col = pixel // width, pixel % width
    exists = chan < chans
    total = tl.zeros((PIXELS, CHANS), dtype=tl.float32)
    if BIAS:
        total += tl.load(bias + chan, mask=exists, other=0).to(tl.float32)[None, :]
    for k_y in range(K_H):
        for k_x in range(K_W):
            i, j = row + k_y - K_H // 2, col + k_x - K_W // 2
            inside = (i >= 0) & (i < height) & (j >= 0) & (j < width)
            where = x + start + (i * width + j)[:, None] * chans + chan[None, :]
            value = tl.load(where, mask=inside[:, None] & exists[None, :], other=0).to(tl.float32)
            tap = tl.load(taps + (k_y * K_W + k_x) * chans + chan, mask=exists, other=0).to(tl.float32)
            total += value * tap[None, :]
    to = y + start + pixel[:, None] * chans + chan[None, :]
    tl.store(to, total.to(y.dtype.element_ty), mask=(pixel < height * width)[:, None] & exists[None, :])


@triton.jit
def _weight_gradient(
    x, grad, out, batch, chans, height, width,
    K_H: tl.constexpr, K_W: tl.constexpr, SHARES: tl.constexpr, PIXELS: tl.constexpr, CHANS: tl.constexpr,
):  # fmt: skip
    """out[share, t, c] = sum over a share of all pixels of grad[b, p, c] x[b, p + t, c]."""
    tap, share = tl.program_id(0), tl.program_id(2)
    chan = tl.program_id(1) * CHANS + tl.arange(0, CHANS)
    exists = chan < chans
    total = tl.zeros((CHANS,), dtype=tl.float32)
    for tile in range(share, tl.cdiv(batch * height * width, PIXELS), SHARES):
        pixel = (tile * PIXELS + tl.arange(0, PIXELS)).to(tl.int64)
        i, j = (pixel // width) % height + tap // K_W - K_H // 2, pixel % width + tap % K_W - K_W // 2
        inside = (pixel < batch * height * width) & (i >= 0) & (i < height) & (j >= 0) & (j < width)
        mask = inside[:, None] & exists[None, :]
        from_pixel = pixel + (tap // K_W - K_H // 2) * width + tap % K_W - K_W // 2
        value = tl.load(x + from_pixel[:, None] * chans + chan[None, :], mask=mask, other=0).to(tl.float32)
        slope = tl.load(grad + pixel[:, None] * chans + chan[None, :], mask=mask, other=0).to(tl.float32)
        total += tl.sum(value * slope, axis=0)
    tl.store(out + (share * K_H * K_W + tap) * chans + chan, total, mask=exists)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Depthwise convolution with zero padding, output of the same size.

    Args:
        x: (B, C, H, W), float32, bfloat16 or float16.
        weight: (C, 1, k_h, k_w), both odd.
        bias: (C,) or None.

    Returns:
        (B, C, H, W) in channels_last order, accumulated in float32.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    batch, chans, height, width = x.shape
    y = torch.empty_like(x)
    taps = weight.flatten(1).t().contiguous()
    grid = (triton.cdiv(height * width, PIXELS), triton.cdiv(chans, CHANS), batch)
    has_bias = bias is not None
    sizes = (*weight.shape[-2:], has_bias, PIXELS, CHANS)
    _convolve[grid](x, taps, bias if has_bias else taps, y, chans, height, width, *sizes)
    return y


def weight_gradient(x: Tensor, grad: Tensor, kernel: tuple[int, int]) -> Tensor:
    """Gradient of the weight, (C, 1, k_h, k_w) float32, from the input and the gradient of the output, (B, C, H, W)."""
    x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    batch, chans, height, width = x.shape
    parts = torch.empty(SHARES, kernel[0] * kernel[1], chans, device=x.device)
    grid = (kernel[0] * kernel[1], triton.cdiv(chans, CHANS), SHARES)
    _weight_gradient[grid](x, grad, parts, batch, chans, height, width, *kernel, SHARES, PIXELS, CHANS)
    return parts.sum(0).t().reshape(chans, 1, *kernel)
