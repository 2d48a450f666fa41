"""Standardisation: normalisation without affine parameters, by instance (IS), by batch (BS), or both in turn (G-IBS).

On a CPU one pass over memory replaces several of torch's, forward and backward: moments of a plane are computed while
it is in the cache, and the derivative of GELU is recomputed instead of stored.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops import native
from zoo.ops.core import Saved, Unsuited, operator

__all__ = [
    "GROUPS",
    "batch_standardise",
    "group_standardise",
    "instance_standardise",
    "join_groups",
    "split_groups",
    "standard_gelu",
    "standard_gelu_into",
    "standardised_gate",
]

GROUPS = 12  # of group_standardise
_INFINITE = "a variance is not finite"


# ---- by instance -------------------------------------------------------------------------------------------


@operator()
def instance_standardise(x: Tensor, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(var + eps) of every plane (sample and channel), biased variance; (B, C, ...) -> same."""
    points = x.flatten(2)
    return F.layer_norm(points, points.shape[-1:], eps=eps).view(x.shape)


@instance_standardise.on("cpu", torch.float32)
def _(x: Tensor, eps: float) -> Tensor:
    return _standardise(x, None, None, eps)


@instance_standardise.gradient
def _(saved: Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, eps = saved.inputs
    return _instance_backward(x, None, grad, eps)[0], None


@operator()
def standardised_gate(key: Tensor, query: Tensor, bias: Tensor) -> Tensor:
    """GELU( IS( key * query ) ) + bias.

    Args:
        key: (B, C, H, W).
        query: (B, C, H, W).
        bias: one value per pixel, (H, W) or (W,).
    """
    return F.gelu(instance_standardise(key * query)) + bias


@standardised_gate.on("cpu", torch.float32)
def _(key: Tensor, query: Tensor, bias: Tensor) -> Tensor:
    return _standardise(key, query, _expand_bias(bias, key), 1e-5)


@standardised_gate.gradient
def _(saved: Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
    key, query, bias = saved.inputs
    d_key, d_query = _instance_backward(key, query, grad, 1e-5)
    return d_key, d_query, _bias_grad(grad, bias) if saved.wanted[2] else None


# ---- by batch, and both in turn ----------------------------------------------------------------------------


def batch_standardise(x: Tensor, mean: Tensor | None = None, var: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(var + eps) of every channel over batch and space, biased variance.

    Args:
        x: (B, C, ...).
        mean: (C,), used instead of the batch's own.
        var: (C,), likewise.
        eps: added to the variance.
    """
    return F.batch_norm(x, mean, var, training=mean is None, eps=eps)


def group_standardise(x: Tensor, mean: Tensor | None = None, var: Tensor | None = None) -> Tensor:
    """G-IBS: twelve contiguous groups of channels, standardised by batch (even groups) and by instance (odd groups).

    Args:
        x: (B, C, ...), C divisible by 12.
        mean: (C / 2,), for the channels of the even groups instead of the batch's own.
        var: (C / 2,), likewise.
    """
    even, odd = split_groups(x)
    return join_groups(batch_standardise(even, mean, var), instance_standardise(odd))


def split_groups(x: Tensor, groups: int = GROUPS) -> tuple[Tensor, Tensor]:
    """Channels of the even and of the odd groups, (B, C / 2, ...) each."""
    pairs = x.unflatten(1, (groups // 2, 2, -1))
    return pairs[:, :, 0].flatten(1, 2), pairs[:, :, 1].flatten(1, 2)


def join_groups(even: Tensor, odd: Tensor, groups: int = GROUPS) -> Tensor:
    """The inverse of :func:`split_groups`."""
    pairs = [half.unflatten(1, (groups // 2, 1, -1)) for half in (even, odd)]
    return torch.cat(pairs, 2).flatten(1, 3)


@operator(saves=(1, 2))
def standard_gelu(
    x: Tensor,
    bias: Tensor,
    groups: int = 1,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """GELU( BS(x) ) + bias, or GELU( G-IBS(x) ) + bias.

    Args:
        x: (B, C, H, W).
        bias: one value, (1,).
        groups: 1 for BS; 12 for G-IBS, of which only the even groups are standardised by batch.
        mean: of the channels standardised by batch, (C,) or (C / 2,), used instead of the batch's own.
        var: their biased variance, likewise.
        eps: added to the variance.

    Returns:
        (B, C, H, W); mean and 1 / standard deviation used for every plane, (B, C), without gradients.
    """
    even, odd = (x, x) if groups == 1 else split_groups(x, groups)
    if mean is None or var is None:
        y, middle, scale = torch.native_batch_norm(even, None, None, None, None, True, 0.0, eps)
        if y.dtype in (torch.float16, torch.bfloat16):  # torch then returns the moments in it too
            spread, middle = torch.var_mean(even.detach().float(), (0, 2, 3), correction=0)
            scale = (spread + eps).rsqrt()
    else:
        mean, var = mean.detach(), var.detach()
        y, middle, scale = F.batch_norm(even, mean, var, eps=eps), mean, (var + eps).rsqrt()
    middle, scale = (t.detach().repeat(x.shape[0], 1) for t in (middle, scale))
    if groups > 1:
        points = odd.flatten(2)
        rest, *own = torch.native_layer_norm(points, points.shape[-1:], None, None, eps)
        y = join_groups(y, rest.view(odd.shape), groups)
        own = [t.detach().squeeze(-1).to(middle.dtype) for t in own]
        middle, scale = join_groups(middle, own[0], groups), join_groups(scale, own[1], groups)
    return F.gelu(y) + bias, middle, scale


@standard_gelu.on("cpu", torch.float32)
def _(
    x: Tensor, bias: Tensor, groups: int, mean: Tensor | None, var: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    x = _planes(x)
    return standard_gelu_into(torch.empty_like(x), x, bias, groups, mean, var, eps)


@standard_gelu.gradient
def _(saved: Saved, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    x, bias, groups, mean, _var, _eps = saved.inputs
    x, (_y, middle, scale) = _planes(x), saved.outputs
    assert middle is not None
    assert scale is not None
    d_x, flat, tilt = torch.empty_like(x), torch.empty_like(middle), torch.empty_like(middle)
    sizes = middle.numel(), _points(x)
    native.call("shared_slopes", x, middle, scale, grad.contiguous(), d_x, flat, tilt, *sizes)
    for means in (flat, tilt):
        native.call("shared_means", means, *middle.shape, groups, int(mean is not None))
    native.call("shared_backward", x, middle, scale, flat, tilt, d_x, *sizes)
    return d_x, _bias_grad(grad, bias) if saved.wanted[1] else None, None, None, None, None


# ---- on a CPU ----------------------------------------------------------------------------------------------


def _points(x: Tensor) -> int:
    return x.shape[2:].numel()


def _planes(x: Tensor) -> Tensor:
    if x.ndim < 3:
        raise Unsuited(f"x has shape {tuple(x.shape)}, not (batch, channels, ...)")
    return x.contiguous()


def _expand_bias(bias: Tensor, like: Tensor) -> Tensor:
    """Expand a bias to all pixels of a map."""
    try:
        return bias.expand(like.shape[2:]).contiguous()
    except RuntimeError as error:
        raise Unsuited(str(error)) from error


def _bias_grad(grad: Tensor, bias: Tensor) -> Tensor:
    """Gradient of a bias shared by all planes."""
    return grad.sum((0, 1)).sum_to_size(bias.shape)


def _standardise(x: Tensor, times: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Standardise planes of x, or of x * times, by their own moments; with a bias, apply GELU and add it."""
    x = _planes(x)
    if times is not None:
        native.fit("times", times, *x.shape)
        times = times.contiguous()
    y = torch.empty_like(x)
    if native.call("standardise", x, times, bias, y, None, None, x.shape[:2].numel(), _points(x), eps):
        raise Unsuited(_INFINITE)
    return y


def standard_gelu_into(
    y: Tensor, x: Tensor, bias: Tensor, groups: int, mean: Tensor | None, var: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Result of :func:`standard_gelu`, written to y, which may be x; both contiguous."""
    chans, planes, points = x.shape[1], x.shape[:2].numel(), _points(x)
    if groups != 1 and (groups < 2 or groups % 2 or chans % groups):
        raise Unsuited(f"{chans} channels do not make {groups} groups")
    for known in (mean, var) if mean is not None or var is not None else ():
        native.fit("a known moment", known, chans if groups == 1 else chans // 2)
    middle, scale = x.new_zeros(x.shape[:2]), x.new_zeros(x.shape[:2])
    if mean is None or groups > 1:
        native.call("moments", x, middle, scale, planes, points)
    known_moments = (None if t is None else t.contiguous() for t in (mean, var))
    native.call("shared_moments", middle, scale, *known_moments, *middle.shape, groups, eps)
    if not bool(scale.min() > 0):
        raise Unsuited(_INFINITE)
    native.call("standardise", x, None, _expand_bias(bias, x), y, middle, scale, planes, points, eps)
    return y, middle, scale


def _instance_backward(x: Tensor, times: Tensor | None, grad: Tensor, eps: float) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and of `times`; the moments are recomputed while the plane is in the cache."""
    x, grad = _planes(x), grad.contiguous()
    d_x, d_times = torch.empty_like(x), None if times is None else torch.empty_like(x)
    times = None if times is None else times.contiguous()
    sizes = x.shape[:2].numel(), _points(x)
    if native.call("standardise_backward", x, times, grad, d_x, d_times, *sizes, eps):
        raise Unsuited(_INFINITE)
    return d_x, d_times
