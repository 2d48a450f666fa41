"""A block of a slow-fast network for inference, as three operators that keep most data in the CPU cache.

Same computation as :class:`zoo.models.terminator.SlowFastBlock`: see there for the equations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops import native
from zoo.ops.core import Unsuited, operator
from zoo.ops.hyperzzw import (
    channel_interaction,
    hyper_interaction,
    linear_channels_first,
    local_conv,
    renormalise,
)
from zoo.ops.pointwise import pointwise_conv, pointwise_twice
from zoo.ops.standardise import (
    GROUPS,
    instance_standardise,
    standard_gelu,
    standard_gelu_into,
    standardised_gate,
)

__all__ = ["local_kernel", "slow_fast_block", "slow_fast_context"]

_INFINITE = "a variance is not finite"


@operator()
def local_kernel(context: Tensor, waves: Tensor, weights: list[Tensor], pos_bias: Tensor) -> Tensor:
    """Output of a local slow network for its context.

    Args:
        context: pooled activations, (C, P).
        waves: sin(F_l g) for every layer l = 0..L, (L + 1, h, P).
        weights: weight and bias of ctx_reduce, of ctx_fc, of mix and ctx_mix of every layer, and of out.
        pos_bias: (P,).

    Returns:
        (C, P).
    """
    layers = list(zip(weights[::2], weights[1::2], strict=True))
    c = F.gelu(linear_channels_first(linear_channels_first(context, *layers[0]), *layers[1]))
    h = waves[0]
    for wave, mix, ctx_mix in zip(waves[1:], layers[2:-1:2], layers[3:-1:2], strict=True):
        h = renormalise(wave * linear_channels_first(h, *mix) + pos_bias) * linear_channels_first(c, *ctx_mix)
    return linear_channels_first(h, *layers[-1])


@local_kernel.on("cpu", torch.float32)
def _(context: Tensor, waves: Tensor, weights: list[Tensor], pos_bias: Tensor) -> Tensor:
    native.fit("context", context, -1, -1)
    native.fit("waves", waves, -1, -1, context.shape[1])
    (layers, hidden, points), chans = waves.shape, len(context)
    square: list[tuple[int, ...]] = [(hidden, hidden), (hidden,)]
    _fit_all(weights, [(hidden, chans), (hidden,), *square, *square * 2 * (layers - 1), (chans, hidden), (chans,)])
    native.fit("pos_bias", pos_bias, points)
    context, waves = context.contiguous(), waves.contiguous()
    weights = [t.contiguous() for t in (*weights, pos_bias)]
    y = torch.empty_like(context)
    native.call("local_kernel", context, waves, weights, y, chans, hidden, layers - 1, points)
    return y


@operator()
def slow_fast_context(
    x: Tensor, channel: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The two maps that a block derives from its input, and batch means.

    Args:
        x: (B, C, H, W).
        channel: hyper-kernel of the channels, (C,).
        weight: of the mixer, (C, C).
        bias: (C,).

    Returns:
        Channel interaction of x and its mixture, both standardised by instance, (B, C, H, W); the means over the batch
        of x and of the former, (1, C, H, W).
    """
    hci = instance_standardise(channel_interaction(x, channel))
    mix = instance_standardise(pointwise_conv([x], weight, bias))
    return hci, mix, x.mean(0, keepdim=True), hci.mean(0, keepdim=True)


@slow_fast_context.on("cpu", torch.float32)
def _(x: Tensor, channel: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    native.fit("x", x, -1, -1, -1, -1)
    batch, chans, points = *x.shape[:2], x.shape[2:].numel()
    native.fit("channel", channel, chans)
    native.fit("weight", weight, chans, chans)
    _check_small([bias])
    x, channel, weight = x.contiguous(), channel.contiguous(), weight.contiguous()
    hci, mix, *means = torch.empty_like(x), torch.empty_like(x), x.new_empty(x[:1].shape), x.new_empty(x[:1].shape)
    strange = native.call("channel_interaction", x, channel, hci, *means, batch, chans, points, 1e-5)
    strange += native.call("standardised_mixer", x, weight, mix, batch, chans, points)
    if strange:
        raise Unsuited(_INFINITE)
    return hci, mix, means[0], means[1]


@operator()
def slow_fast_block(
    x: Tensor,
    hci: Tensor,
    mix: Tensor,
    earlier: list[Tensor],
    kernel: Tensor,
    slow: list[Tensor],
    fast: list[Tensor],
    interaction: list[Tensor],
    convolved: list[Tensor],
    kernels: list[Tensor],
    local_mix: list[Tensor],
    local_bias: list[Tensor],
    known: list[Tensor],
    columns: list[Tensor],
    bias: Tensor,
    out_bias: Tensor,
    out_known: list[Tensor],
) -> Tensor:
    """A block in eval mode: all paths, the bottleneck, its standardisation by G-IBS, and GELU.

    Args:
        x: input, (B, C, N, N).
        hci: from :func:`slow_fast_context`.
        mix: from :func:`slow_fast_context`.
        earlier: outputs of earlier blocks, at most two, (B, C_i, N, N).
        kernel: global hyper-kernel, (1, C, N, N).
        slow: weight and bias of k, v, q and y, and pos_bias, of the slow gated unit.
        fast: likewise of the fast one.
        interaction: hyper-kernels of the channels, (C,), and of the pixels, (N N,).
        convolved: the map convolved by each local branch, (B, C, N, N).
        kernels: its kernel, (C, 1, k, k).
        local_mix: its weight and bias, (C, C) and (C,).
        local_bias: its bias after GELU, (1,).
        known: mean and variance, (C,), for its standardisation; empty to use the batch's own.
        columns: of the bottleneck weight, (C_out, C), for fast, the hyper interaction, the three products, SiLU,
            `earlier` and the local branches.
        bias: of the bottleneck, (C_out,).
        out_bias: bias after GELU, (1,).
        out_known: mean and variance, (C_out / 2,), for its even groups; empty to use the batch's own.

    Returns:
        (B, C_out, N, N).
    """
    w = x * kernel
    gated = instance_standardise(_gated_unit(w, slow) + _gated_unit(x, fast))
    g1, g2, g3 = w @ gated, w @ mix, w @ hci
    paths = [gated, hyper_interaction(g1, x, interaction[0], interaction[1]), g1, g2, g3, F.silu(g1), *earlier]
    for j, (z, local) in enumerate(zip(convolved, kernels, strict=True)):
        z = pointwise_conv([local_conv(z, local)], local_mix[2 * j], local_mix[2 * j + 1])
        mean, var = known[2 * j : 2 * j + 2] or (None, None)
        paths.append(standard_gelu(z, local_bias[j], 1, mean, var)[0])
    mean, var = out_known or (None, None)
    return standard_gelu(pointwise_conv(paths, torch.cat(columns, 1), bias), out_bias, GROUPS, mean, var)[0]


def _gated_unit(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    k, k_bias, v, v_bias, q, q_bias, y, y_bias, pos_bias = weights
    gated = standardised_gate(pointwise_conv([x], k, k_bias), pointwise_twice(x, v, v_bias, q, q_bias), pos_bias)
    return pointwise_conv([gated], y, y_bias)


# ---- on a CPU: each thread processes whole images ----------------------------------------------------------------


@slow_fast_block.on("cpu", torch.float32)
def _(
    x: Tensor,
    hci: Tensor,
    mix: Tensor,
    earlier: list[Tensor],
    kernel: Tensor,
    slow: list[Tensor],
    fast: list[Tensor],
    interaction: list[Tensor],
    convolved: list[Tensor],
    kernels: list[Tensor],
    local_mix: list[Tensor],
    local_bias: list[Tensor],
    known: list[Tensor],
    columns: list[Tensor],
    bias: Tensor,
    out_bias: Tensor,
    out_known: list[Tensor],
) -> Tensor:
    _check_threads(x)
    (batch, chans, side, _), rows, more = x.shape, len(columns[0]), len(earlier)
    if more > 2 or len(columns) != 6 + more + len(kernels) or len(known) not in (0, 2 * len(kernels)):
        raise Unsuited(f"{len(columns)} columns and {len(known)} moments do not fit {len(kernels)} local branches")
    x, hci, mix, *convolved = _fit_maps(x.shape, [x, hci, mix, *convolved])
    if any(t.ndim != 4 or chans % t.shape[1] for t in earlier):
        raise Unsuited(f"earlier outputs cannot be repeated to {chans} channels")
    earlier = [_fit_maps((batch, t.shape[1], side, side), [t])[0] for t in earlier]
    for unit in (slow, fast):
        _fit_all(unit, [(chans, chans), (chans,)] * 4 + [(side, side)])
    _fit_all(interaction, [(chans,), (side * side,)])
    _fit_all(local_bias, [(1,)] * len(kernels))
    _fit_all(columns, [(rows, chans)] * len(columns))
    native.fit("kernel", kernel, 1, chans, side, side)
    native.fit("bias", bias, rows)
    _check_small([slow[7], fast[7], *([] if known else local_mix[1::2]), *([] if out_known else [bias])])

    y = x.new_empty(batch, rows, side, side)
    weights = [kernel, *slow[:6], slow[8], *fast[:6], fast[8], slow[6], fast[6], *interaction]
    given = [*(t.contiguous() for t in weights), bias.contiguous() if out_known else None]
    z, moments = _local_branches(convolved, kernels, local_mix, known)
    outer, local = columns[: 6 + more], columns[6 + more :]
    outer[6:] = [t.unflatten(1, (-1, e.shape[1])).sum(1) for t, e in zip(outer[6:], earlier, strict=True)]
    widths, sizes = [chans] * 6 + [t.shape[1] for t in earlier], (batch, chans, rows, side, more)
    if native.call("global_paths", given, x, hci, mix, earlier, outer, _row_strides(outer), widths, y, *sizes):
        raise Unsuited(_INFINITE)
    sizes = len(z), batch, chans, rows, side * side
    native.call("add_local_outputs", z, *moments, local_bias, local, _row_strides(local), y, *sizes)
    mean, var = out_known or (None, None)
    return standard_gelu_into(y, y, out_bias, GROUPS, mean, var, 1e-5)[0]


def _local_branches(
    maps: list[Tensor], kernels: list[Tensor], layers: list[Tensor], known: list[Tensor]
) -> tuple[list[Tensor], tuple[list[Tensor], list[Tensor]]]:
    """The local branches before standardisation, and their mean and 1 / standard deviation, (B, C) each."""
    batch, chans, height, width = maps[0].shape
    for kernel in kernels:
        native.fit("a kernel", kernel, chans, 1, -1, -1)
        if kernel.shape[-1] % 2 == 0 or kernel.shape[-2] % 2 == 0:
            raise Unsuited(f"a kernel has even sizes: {tuple(kernel.shape[2:])}")
    _fit_all(layers, [(chans, chans), (chans,)] * len(kernels))
    _fit_all(known, [(chans,)] * len(known))
    kernels, layers, known = ([t.contiguous() for t in part] for part in (kernels, layers, known))
    biases: Sequence[Tensor | None] = layers[1::2] if known else [None] * len(kernels)  # batch statistics cancel it
    z = [torch.empty_like(t) for t in maps]
    mean, scale = ([t.new_empty(batch, chans) for t in maps] for _ in range(2))
    k_h, k_w = ([t.shape[i] for t in kernels] for i in (-2, -1))
    sizes = len(maps), batch, chans, height, width
    if native.call("local_branches", maps, kernels, layers[::2], biases, z, mean, scale, k_h, k_w, *sizes):
        raise Unsuited("a kernel is not finite")
    for j, pair in enumerate(zip(mean, scale, strict=True)):
        native.call("shared_moments", *pair, *(known[2 * j : 2 * j + 2] or (None, None)), batch, chans, 1, 1e-5)
        if not bool(pair[1].min() > 0):
            raise Unsuited(_INFINITE)
    return z, (mean, scale)


def _check_small(biases: Sequence[Tensor]) -> None:
    """Refuse biases so large that omitting them before a standardisation, which cancels them, would change rounding."""
    if not bool(torch.cat(list(biases)).abs().max() < 1e6):
        raise Unsuited("a bias is too large to be left out")


def _row_strides(columns: Sequence[Tensor]) -> list[int]:
    """Row strides of columns of a larger matrix."""
    if any(t.stride(1) != 1 for t in columns):
        raise Unsuited("the numbers of a row must be neighbours")
    return [t.stride(0) for t in columns]


def _check_threads(x: Tensor) -> None:
    """Refuse sizes where some threads would be idle, or a map is too small or too large to be processed by itself."""
    native.fit("x", x, -1, -1, x.shape[-1], x.shape[-1])
    threads = torch.get_num_threads()
    if threads > 2 and len(x) < 4 * threads and len(x) % threads:
        raise Unsuited(f"{len(x)} images leave some of {threads} threads idle")
    if not 12 < x.shape[-1] <= 64 or not x.is_contiguous():
        raise Unsuited(f"maps of {x.shape[-1]} x {x.shape[-1]} pixels, strides {x.stride()}")


def _fit_maps(shape: Sequence[int], maps: Sequence[Tensor]) -> list[Tensor]:
    for t in maps:
        native.fit("a map", t, *shape)
    return [t.contiguous() for t in maps]


def _fit_all(tensors: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> None:
    if len(tensors) != len(shapes):
        raise Unsuited(f"{len(tensors)} tensors are not {len(shapes)}")
    for t, shape in zip(tensors, shapes, strict=True):
        native.fit("a weight", t, *shape)
