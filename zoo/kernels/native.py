"""Inner loops in C for float32 on a CPU, compiled in a few seconds when a machine first needs them.

They do in one pass over memory what takes torch's operators several. Without a C compiler, or with ZOO_NATIVE=0,
callers use those operators instead, which give the same numbers up to rounding. :mod:`zoo.ops.building` tells where
the compiled loops are kept, and what the environment variables ZOO_NATIVE, ZOO_NATIVE_ARCH, ZOO_CACHE and CC do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.watching import is_ordinary
from zoo.ops.core import Unsuited
from zoo.ops.native import call as _call
from zoo.ops.native import fit as _fit
from zoo.ops.native import library

__all__ = [
    "Unsuited",
    "adaptive_mean",
    "available",
    "channel_interaction",
    "gate",
    "global_part",
    "global_products",
    "hyper_interaction",
    "local_branches",
    "local_kernel",
    "local_outputs_",
    "moments",
    "shared_scales",
    "standardise",
    "standardise_gradient",
]

_INFINITE = "a variance is not finite"


def available(*tensors: Tensor, gradients: bool = False) -> bool:
    """Whether the loops may run on the memory of these tensors: ordinary, float32, on the CPU, nobody recording.

    Args:
        tensors: what a loop would read.
        gradients: whether the caller supplies gradients; otherwise nobody may want any.
    """
    return (
        all(_has_numbers(t) and t.dtype == torch.float32 for t in tensors)
        and (gradients or not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)))
        and not torch.is_autocast_enabled("cpu")
        and is_ordinary(*tensors)
        and library() is not None
    )


def _has_numbers(t: Tensor) -> bool:
    """Whether its memory holds its numbers as they are, at least one, on the CPU."""
    return t.device.type == "cpu" and t.layout is torch.strided and not (t.is_nested or t.is_neg()) and t.numel() > 0


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every plane of (B, C, H, W), (B, C) each."""
    x = _planes("x", x).contiguous()
    mean, var = x.new_empty(x.shape[:2]), x.new_empty(x.shape[:2])
    _call("moments", x, mean, var, mean.numel(), _points(x))
    return mean, var


def shared_scales(
    moments: Sequence[Tensor], known: tuple[Tensor, Tensor] | None, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation to standardise every plane with, (B, C) each.

    Args:
        moments: mean and biased variance of every plane, (B, C), :func:`available`, as all that follows.
        known: mean and variance of the channels of the even groups to use whatever the batch, contiguous.
        groups: of channels; those of the even ones share their moments over the batch.
        eps: added to the variance.
    """
    mean, var = (t.clone(memory_format=torch.contiguous_format) for t in moments)
    _fit("mean", mean, -1, -1)
    _fit("var", var, *mean.shape)
    chans = mean.shape[1]
    if groups != 1 and (groups < 2 or groups % 2 or chans % groups):
        raise Unsuited(f"{chans} channels do not make {groups} groups")
    for name, t in zip(("the known mean", "the known variance"), known or (), strict=False):
        _fit(name, t, chans if groups == 1 else chans // 2)
    _call("shared_moments", mean, var, *(known or (None, None)), *mean.shape, groups, eps)
    if not bool(var.min() > 0):
        raise Unsuited(_INFINITE)
    return mean, var


def gate(key: Tensor, query: Tensor, bias: Tensor, biases: Sequence[Tensor], overwrite: bool) -> Tensor:
    """What :func:`zoo.kernels.hyperzzw.gate` computes of maps (B, C, H, W) and biases, all :func:`available`."""
    _planes("key", key)
    _fit("query", query, *key.shape)
    _fit("bias", bias, *key.shape[2:])
    for t in biases:
        _fit("the bias of a factor", t, key.shape[1])
    key, query, bias = key.contiguous(), query.contiguous(), bias.contiguous()
    y = key if overwrite else torch.empty_like(key)
    sizes = key.shape[:2].numel(), key.shape[1], _points(key)
    scale = key.new_empty(key.shape[:2])
    if _call("gate", key, query, *(t.contiguous() for t in biases), bias, y, scale, *sizes, 1e-5):
        left = scale == 0
        y[left] = _standardised(y[left], bias, 1e-5)
    return y


def global_products(w: Tensor, z: Sequence[Tensor]) -> list[Tensor]:
    """Matrix products of (B, C, N, N) with three others, and SiLU of the first, all :func:`available`."""
    _fit("w", w, -1, -1, w.shape[-1], w.shape[-1])
    for t in z:
        _fit("z", t, *w.shape)
    w, z = w.contiguous(), [t.contiguous() for t in z]
    y = [torch.empty_like(w) for _ in range(4)]
    _call("global_products", w, *z, *y, w.shape[:2].numel(), w.shape[-1])
    return y


def global_part(
    x: Tensor,
    hci: Tensor,
    earlier: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    columns: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """What the bottleneck of a slow-fast block makes of all but its local branches, a sample by one thread.

    Args:
        x: (B, C, N, N), N at most 64, :func:`available`, as all that follows.
        hci: likewise.
        earlier: outputs of earlier blocks, at most two, (B, C_i, N, N).
        weights: of the mixer; the kernel (C, N, N); weight and bias of key, value and query, and pos_bias, of the
            slow and of the fast gated unit; their output weights; the hyper-kernels of channels (C,) and of pixels
            (N, N); bias of the bottleneck or None.
        columns: columns of the bottleneck for fast, the hyper interaction, the three products, SiLU and `earlier`,
            (C_out, C_i) each.

    Returns:
        The mixed map (B, C, N, N), and (B, C_out, N, N).
    """
    chans, side, rows = x.shape[1], x.shape[-1], len(columns[0])
    _fit("x", x, -1, chans, side, side)
    _fit("hci", hci, *x.shape)
    if side > 64 or len(earlier) > 2 or len(columns) != 6 + len(earlier):
        raise Unsuited(f"{side} x {side} pixels, {len(earlier)} earlier outputs and {len(columns)} parts do not fit")
    unit = [(chans, chans), (chans,)] * 3 + [(side, side)]
    shapes: list[tuple[int, ...]] = [(chans, chans), (chans * side * side,), *unit, *unit]
    shapes += [(chans, chans), (chans, chans), (chans,), (side * side,), (rows,)]
    for i, (weight, shape) in enumerate(zip(weights, shapes, strict=True)):
        flat = weight.flatten() if weight is not None and i in (1, 18, 19) else weight
        if flat is not None or i < len(shapes) - 1:
            _fit("a weight", flat, *shape)
    widths = [chans] * 6 + [t.shape[1] for t in earlier]
    for t in earlier:
        _fit("an earlier output", t, len(x), t.shape[1], side, side)
    for t, width in zip(columns, widths, strict=True):
        _fit_rows(t, rows, width)
    x, hci, earlier = x.contiguous(), hci.contiguous(), [t.contiguous() for t in earlier]
    weights = [None if t is None else t.contiguous() for t in weights]
    down = [t.stride(0) for t in columns]
    mixed, y = torch.empty_like(x), x.new_empty(len(x), rows, side, side)
    sizes = *x.shape[:2], rows, side, len(earlier)
    if _call("global_part", weights, x, hci, earlier, columns, down, widths, mixed, y, *sizes):
        raise Unsuited(_INFINITE)
    return mixed, y


def local_branches(
    maps: Sequence[Tensor], taps: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Depthwise convolutions with linear layers over the channels behind them.

    Args:
        maps: for every branch (B, C, H, W), :func:`available` and :func:`suits_planes`, as all that follows.
        taps: (C, 1, k_h, k_w).
        weights: (C, C).
        biases: (C,) or None.

    Returns:
        For every branch (B, C, H, W), and mean and biased variance of its planes, (B, C) each.
    """
    x = maps[0]
    _fit("a map", x, -1, -1, -1, -1)
    for t, tap, weight, bias in zip(maps, taps, weights, biases, strict=True):
        _fit("a map", t, *x.shape)
        _fit_taps(tap, x.shape[1])
        _fit("a weight", weight, x.shape[1], x.shape[1])
        if bias is not None:
            _fit("a bias", bias, x.shape[1])
    maps, taps, weights = ([t.contiguous() for t in part] for part in (maps, taps, weights))
    y = [torch.empty_like(x) for _ in maps]
    mean, var = ([x.new_empty(x.shape[:2]) for _ in maps] for _ in range(2))
    k_h, k_w = ([t.shape[i] for t in taps] for i in (-2, -1))
    if _call("local_branches", maps, taps, weights, biases, y, mean, var, k_h, k_w, len(maps), *x.shape):
        raise Unsuited("a tap is not finite")
    return y, [list(pair) for pair in zip(mean, var, strict=True)]


def local_outputs_(
    z: Sequence[Tensor],
    moments: Sequence[tuple[Tensor, Tensor]],
    biases: Sequence[Tensor],
    columns: Sequence[Tensor],
    y: Tensor,
) -> Tensor:
    """Add linear layers over the channels of GELU of standardised maps, plus a bias, to y.

    Args:
        z: for every branch (B, C, H, W), :func:`available`, as all that follows; overwritten.
        moments: mean and 1 / standard deviation of its planes, (B, C) each.
        biases: one number.
        columns: (C_out, C).
        y: (B, C_out, H, W).

    Returns:
        y.
    """
    _planes("a map", z[0])
    _fit("y", y, len(z[0]), -1, *z[0].shape[2:])
    for t, pair, bias, column in zip(z, moments, biases, columns, strict=True):
        _fit("a map", t, *z[0].shape)
        for moment in pair:
            _fit("a moment", moment, *t.shape[:2])
        _fit("a bias", bias.flatten(), 1)
        _fit_rows(column, y.shape[1], t.shape[1])
    if not all(t.is_contiguous() for t in (y, *z)):
        raise Unsuited("maps that are written to must be contiguous")
    mean, scale = ([pair[i].contiguous() for pair in moments] for i in range(2))
    down, sizes = [t.stride(0) for t in columns], (*z[0].shape[:2], y.shape[1], _points(y))
    _call("local_outputs", z, mean, scale, biases, columns, down, y, len(z), *sizes)
    return y


def hyper_interaction(y: Tensor, x: Tensor, channel: Tensor, space: Tensor) -> Tensor:
    """What :func:`zoo.kernels.hyperzzw.hyper_interaction` computes, for (B, C, H, W), :func:`available`."""
    _planes("y", y)
    _fit("x", x, *y.shape)
    _fit("channel", channel.flatten(), y.shape[1])
    _fit("space", space.flatten(), _points(y))
    y, x, channel, space = (t.contiguous() for t in (y, x, channel, space))
    out = torch.empty_like(x)
    _call("hyper_interaction", y, x, channel, space, out, *x.shape[:2], _points(x))
    return out


def channel_interaction(x: Tensor, channel: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Planes times the gate of their channel, standardised; see :func:`zoo.kernels.hyperzzw.channel_interaction`.

    Args:
        x: (B, C, H, W), :func:`available`.
        channel: (C,).
        eps: added to the variance of every plane.

    Returns:
        (B, C, H, W); means of x and of that over the batch, (1, C, H, W) each.
    """
    _planes("x", x)
    _fit("channel", channel.flatten(), x.shape[1])
    x = x.contiguous()
    y, means = torch.empty_like(x), [x.new_empty(1, *x.shape[1:]) for _ in range(2)]
    if _call("channel_interaction", x, channel.contiguous(), y, *means, *x.shape[:2], _points(x), eps):
        raise Unsuited(_INFINITE)
    return y, means[0], means[1]


def adaptive_mean(x: Tensor, size: Sequence[int]) -> Tensor:
    """Means over the windows of a coarser grid, as torch's adaptive pooling has them.

    Args:
        x: (C, H, W), :func:`available`.
        size: (k_h, k_w), or (k,): with H = 1.

    Returns:
        (C, k_h k_w).
    """
    size = (1, *size)[-2:]
    _fit("x", x, -1, -1, -1)
    if min(size) < 1:
        raise Unsuited(f"size={tuple(size)} is not positive")
    y = x.new_empty(len(x), size[0] * size[1])
    _call("adaptive_mean", x.contiguous(), y, *x.shape, *size)
    return y


def local_kernel(context: Tensor, start: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """What a :class:`zoo.kernels.hyperzzw.LocalSlowNet` writes.

    Args:
        context: pooled activations, (C, P), :func:`available`, as all that follows.
        start: what no context changes, (L, h, P).
        weights: weight and bias of ctx_reduce, of ctx_fc, of mix and ctx_mix of every layer, and of out; pos_bias.

    Returns:
        (C, P).
    """
    _fit("context", context, -1, -1)
    _fit("start", start, -1, -1, context.shape[1])
    (layers, hidden, points), chans = start.shape, len(context)
    square: list[tuple[int, ...]] = [(hidden, hidden), (hidden,)]
    shapes = [(hidden, chans), (hidden,), *square, *(square * 2 * layers), (chans, hidden), (chans,), (points,)]
    if len(weights) != len(shapes):
        raise Unsuited(f"{len(weights)} weights do not make a network of {layers} layers")
    for i, (weight, shape) in enumerate(zip(weights, shapes, strict=True)):
        _fit("a weight", weight if i < len(shapes) - 1 else weight.flatten(), *shape)
    context, start, weights = context.contiguous(), start.contiguous(), [t.contiguous() for t in weights]
    taps = torch.empty_like(context)
    _call("local_kernel", context, start, weights, taps, len(context), start.shape[1], len(start), start.shape[2])
    return taps


def standardise(
    x: Tensor,
    times: Tensor | None,
    bias: Tensor | None,
    given: tuple[Tensor, Tensor] | None,
    eps: float,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Planes of x, or of x * times, standardised; where there is a bias, then GELU and the bias.

    Args:
        x: (B, C, H, W), :func:`available`.
        times: as x, or None for ones.
        bias: (H, W) or None; needed with `times`.
        given: mean and 1 / standard deviation to use, (B, C) each; None for those of every plane.
        eps: added to the variance of every plane.
        overwrite: answer in the memory of x.

    Returns:
        (B, C, H, W); mean and 1 / standard deviation, (B, C), the latter 0 where a variance of its own is not finite.
    """
    _planes("x", x)
    _fit_standardise(x, times, bias, given)
    x = x.contiguous()
    y = x if overwrite else torch.empty_like(x)
    mean, scale = (t.contiguous() for t in given or (x.new_empty(x.shape[:2]), x.new_empty(x.shape[:2])))
    times, bias = (None if t is None else t.contiguous() for t in (times, bias))
    if _call("standardise", x, times, bias, y, mean, scale, mean.numel(), _points(x), eps, int(given is None)):
        left = scale == 0
        y[left] = _standardised(x[left] if times is None else x[left] * times[left], bias, eps)
    return y, mean, scale


def _standardised(planes: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """By the library, for planes (n, ...) whose variance is not finite: the answer depends on the order of sums."""
    rows = planes.flatten(1)
    z = F.layer_norm(rows, rows.shape[-1:], eps=eps).view(planes.shape)
    return z if bias is None else F.gelu(z) + bias


def standardise_gradient(
    x: Tensor,
    times: Tensor | None,
    mean: Tensor,
    scale: Tensor,
    grad: Tensor,
    activated: bool,
    shared: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and `times` in :func:`standardise`.

    Args:
        x: what it was given.
        times: likewise.
        mean: what it answered, (B, C).
        scale: likewise.
        grad: gradient of its result.
        activated: whether GELU followed.
        shared: None where every plane had its own moments. Otherwise what became of two means over every plane, (B, C),
            on the way to those that were used: of the gradient behind the standardisation, and of that times its value.
    """
    _planes("x", x)
    _fit_standardise(x, times, None, (mean, scale))
    _fit("grad", grad, *x.shape)
    x, mean, scale = x.contiguous(), mean.contiguous(), scale.contiguous()
    times = None if times is None else times.contiguous()
    d_x, d_times = torch.empty_like(x), None if times is None else torch.empty_like(x)
    flat, tilt, planes, points = torch.empty_like(mean), torch.empty_like(mean), mean.numel(), _points(x)
    sizes = planes, points, int(shared is None), int(activated)
    _call("standardise_slopes", x, times, mean, scale, grad.contiguous(), d_x, d_times, flat, tilt, *sizes)
    if shared is not None:
        flat, tilt = shared(flat).contiguous(), shared(tilt).contiguous()
        _fit("a mean", flat, *mean.shape)
        _fit("a mean", tilt, *mean.shape)
        _call("standardise_gradient", x, mean, scale, flat, tilt, d_x, planes, points)
    return d_x, d_times


def _points(x: Tensor) -> int:
    return x.shape[2:].numel()


# ---- what the loops are given ------------------------------------------------------------------------------


def _planes(name: str, x: Tensor) -> Tensor:
    if x.ndim < 3:
        raise Unsuited(f"{name} has shape {tuple(x.shape)}, not (batch, channels, ...)")
    return x


def _fit_taps(weight: Tensor, chans: int) -> None:
    _fit("the kernel", weight, chans, 1, -1, -1)
    if any(k % 2 == 0 for k in weight.shape[2:]):
        raise Unsuited(f"the kernel has even sizes: {tuple(weight.shape[2:])}")


def _fit_rows(weight: Tensor, rows: int, width: int) -> None:
    """Columns of a larger matrix, whose rows may lie apart."""
    _fit("columns", weight, rows, width)
    if width > 1 and weight.stride(1) != 1:
        raise Unsuited("the numbers of a row must be neighbours")


def _fit_standardise(
    x: Tensor, times: Tensor | None, bias: Tensor | None, moments: tuple[Tensor, Tensor] | None
) -> None:
    if times is not None:
        _fit("times", times, *x.shape)
    if bias is not None:
        _fit("bias", bias.flatten(), _points(x))
    for moment in moments or ():
        _fit("a moment", moment, *x.shape[:2])
