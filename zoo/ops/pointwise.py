"""1 x 1 convolutions: of one map, of a concatenation of maps, and of two layers in a row.

On a CPU one matrix product per image is faster than torch's convolution, the concatenation is never built, and nothing
is computed twice for repeated channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops import native
from zoo.ops.core import Saved, Unsuited, operator

__all__ = ["pointwise_conv", "pointwise_twice", "repeat_channels"]

CACHE_ELEMENTS = 2_400_000  # elements of a map processed at a time


@operator()
def pointwise_conv(maps: list[Tensor], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """1 x 1 convolution of the concatenation of several maps.

    Args:
        maps: n maps (B, C_i, H, W), each repeated over its channels to C = C_in / n of them.
        weight: (C_out, C_in).
        bias: (C_out,) or None.

    Returns:
        (B, C_out, H, W).
    """
    width = weight.shape[1] // len(maps)
    x = torch.cat([repeat_channels(x, width) for x in maps], 1) if len(maps) > 1 else maps[0]
    return F.conv2d(x, weight[:, :, None, None], bias)


@operator()
def pointwise_twice(x: Tensor, weight_1: Tensor, bias_1: Tensor, weight_2: Tensor, bias_2: Tensor) -> Tensor:
    """Two 1 x 1 convolutions in a row: W_2 (W_1 x + b_1) + b_2.

    Args:
        x: (B, C, H, W).
        weight_1: (D, C).
        bias_1: (D,).
        weight_2: (E, D).
        bias_2: (E,).

    Returns:
        (B, E, H, W).
    """
    return pointwise_conv([pointwise_conv([x], weight_1, bias_1)], weight_2, bias_2)


def repeat_channels(x: Tensor, channels: int) -> Tensor:
    """Repeat the whole block of channels until there are `channels` (the last copy may be cut)."""
    rounds = -(-channels // x.shape[1])
    return x if x.shape[1] == channels else torch.cat([x] * rounds, 1)[:, :channels]


# ---- on a CPU ----------------------------------------------------------------------------------------------


@pointwise_conv.on("cpu", torch.float32)
def _(maps: list[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    columns, first = _columns(maps, weight), maps[0]
    if bias is not None:
        native.fit("bias", bias, len(weight))
    y = first.new_empty(len(first), len(weight), *first.shape[2:])
    for chunk in iter_cache_chunks(y, *maps):
        out, *parts = (t.flatten(2) for t in chunk)
        if bias is not None:
            out.copy_(bias[:, None])
        for i, (x, w) in enumerate(zip(parts, columns, strict=True)):
            out.baddbmm_(w.expand(len(out), *w.shape), x, beta=1 if i or bias is not None else 0)
    return y


@pointwise_conv.gradient
def _(saved: Saved, grad: Tensor) -> tuple[list[Tensor] | None, Tensor | None, Tensor | None]:
    maps, weight, _ = saved.inputs
    return _backward(maps, weight, grad, saved.wanted)


@pointwise_twice.on("cpu", torch.float32)
def _(x: Tensor, weight_1: Tensor, bias_1: Tensor, weight_2: Tensor, bias_2: Tensor) -> Tensor:
    return pointwise_conv([x], weight_2 @ weight_1, weight_2 @ bias_1 + bias_2)


@pointwise_twice.gradient
def _(saved: Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight_1, bias_1, weight_2, _ = saved.inputs
    d_maps, d_weight, d_bias = _backward([x], weight_2 @ weight_1, grad, (saved.wanted[0], True, True))
    assert d_weight is not None
    assert d_bias is not None
    d_weight_2 = d_weight @ weight_1.mT + torch.outer(d_bias, bias_1)
    return d_maps[0] if d_maps else None, weight_2.mT @ d_weight, weight_2.mT @ d_bias, d_weight_2, d_bias


def _backward(
    maps: list[Tensor], weight: Tensor, grad: Tensor, wanted: Sequence[bool]
) -> tuple[list[Tensor] | None, Tensor | None, Tensor | None]:
    """Gradients of the maps, of the weight and of the bias."""
    columns, width = _columns(maps, weight), weight.shape[1] // len(maps)
    d_maps = [x.new_empty(x.shape) for x in maps] if wanted[0] else []
    d_columns = [x.new_zeros(len(weight), x.shape[1]) for x in maps] if wanted[1] else []
    d_bias = grad.new_zeros(len(weight)) if wanted[2] else None
    for chunk in iter_cache_chunks(grad.contiguous(), *maps, *d_maps):
        slope, *parts = (t.flatten(2) for t in chunk)
        if d_bias is not None:
            d_bias += slope.sum((0, 2))
        for x, d_column in zip(parts, d_columns, strict=False):
            d_column += (slope @ x.mT).sum(0)
        for w, d_x in zip(columns, parts[len(maps) :], strict=False):
            torch.bmm(w.mT.expand(len(slope), *w.mT.shape), slope, out=d_x)
    d_weight = torch.cat([repeat_channels(d, width) for d in d_columns], 1) if wanted[1] else None
    return d_maps or None, d_weight, d_bias


def _columns(maps: list[Tensor], weight: Tensor) -> list[Tensor]:
    """Columns of the weight for each map; those of repeated channels are summed."""
    native.fit("weight", weight, -1, -1)
    width, left = divmod(weight.shape[1], len(maps))
    for x in maps:
        native.fit("a map", x, len(maps[0]), -1, *maps[0].shape[2:])
        if left or x.ndim != 4 or width % x.shape[1]:
            raise Unsuited(f"{x.shape[1]} channels are not repeated to {weight.shape[1]} / {len(maps)}")
    columns = zip(maps, weight.split(width, 1), strict=True)
    return [w if x.shape[1] == width else w.unflatten(1, (-1, x.shape[1])).sum(1) for x, w in columns]


def iter_cache_chunks(*maps: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Slices of maps (B, ...) along the batch, each as many samples of the first map as fit the cache."""
    step = max(CACHE_ELEMENTS // maps[0][0].numel(), 1)
    return zip(*(m.split(step) for m in maps), strict=True)
