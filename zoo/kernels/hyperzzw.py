"""HyperZ·Z·W: kernels that a small network writes and the input completes, in two dimensions and in one.

Zhang: "HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction", 2024, arXiv 2401.17948. A *slow
network* maps coordinates to a *hyper-kernel* W; multiplied by an activation Z1 it becomes a context-dependent kernel,
which is then applied to another activation Z2 of the *fast network*:

    global, 2-D     (W * Z1) Z2, a matrix product over rows and columns      :func:`global_product`
    global, 1-D     a long convolution (ours; no definition was published)   :func:`causal_conv`, :func:`same_conv`,
                                                                             :func:`fold_product`
    local           depthwise convolution, the context inside the kernel     :func:`local_conv`
    channel, space  W * z * z, the score of a gate                           :func:`elementwise_score`

Activations are (B, C, N, N) or (B, C, L). The slow networks are :class:`SlowNet` and :class:`LocalSlowNet`. Their
frequencies can be so high that half precision would return noise: they compute in float32 or better, also under
autocast, and stay there when a model is cast to half precision. So do the Fourier transforms.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels import native
from zoo.kernels.watching import is_ordinary, is_recorded
from zoo.ops import depthwise_conv2d
from zoo.ops.numerics import autocast_disabled as no_autocast
from zoo.ops.numerics import differentiable_grad as plain_gradients

__all__ = [
    "LocalSlowNet",
    "SlowNet",
    "StandardGELU",
    "batch_standardise",
    "causal_conv",
    "channel_interaction",
    "coordinate_grid",
    "elementwise_score",
    "fold_product",
    "gate",
    "global_product",
    "global_products",
    "group_standardise",
    "hyper_interaction",
    "instance_standardise",
    "local_conv",
    "mix_channels",
    "renormalise",
    "same_conv",
    "slow_loss",
]

GROUPS = 12  # of group_standardise
CACHED = 2_400_000  # numbers in the part of a map that is worked on at a time
HALF = (torch.float16, torch.bfloat16)
SLOW_LOSSES = ("tile", "channel_sum", "none")


# ---- standardisation: normalisation without affine parameters ----------------------------------------------


def instance_standardise(x: Tensor, eps: float = 1e-5, overwrite: bool = False) -> Tensor:
    """(x - mean) / sqrt(var + 1e-5) of every map of every sample, biased variance; (B, C, ...) -> same.

    Args:
        x: (B, C, ...).
        eps: added to the variance.
        overwrite: the memory of `x` may be used for the answer where no gradient is wanted.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile the second half)
        if not is_recorded(x) and native.available(x, gradients=True):
            with suppress(native.Unsuited):
                return _standardise(x, None, None, eps=eps, overwrite=overwrite)
    points = x.flatten(2)
    return F.layer_norm(points, points.shape[-1:], eps=eps).view(x.shape)


def gate(
    key: Tensor, query: Tensor, bias: Tensor, biases: list[Tensor] | None = None, overwrite: bool = False
) -> Tensor:
    """GELU( IS( key * query ) ) + bias.

    Args:
        key: (B, C, H, W).
        query: likewise.
        bias: one number for each pixel, (H, W) or (W,).
        biases: what is added to the channels of `key` and of `query` first, (C,) each.
        overwrite: the memory of `key` may be used for the answer where no gradient is wanted.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile the second half)
        if not is_recorded(key):
            with suppress(native.Unsuited):
                if biases is None and native.available(key, query, bias, gradients=True):
                    return _standardise(key, query, _everywhere(bias, key), overwrite=overwrite)
                if biases is not None and native.available(key, query, bias, *biases):
                    return native.gate(key, query, _everywhere(bias, key), biases, overwrite)
    if biases is not None:
        key, query = key + biases[0][:, None, None], query + biases[1][:, None, None]
    return F.gelu(instance_standardise(key * query)).add_(bias)


class StandardGELU(nn.BatchNorm2d):
    """GELU( BS(x) ) + bias, or GELU( G-IBS(x) ) + bias.

    Args:
        dim: channels C.
        groups: 1, or 12 for G-IBS, of which only the even groups are standardised by batch.
        running: keep running statistics, (C,) or (C / 2,), for eval mode; otherwise the batch's own serve there too.
        **dd: device and dtype.
    """

    def __init__(self, dim: int, groups: int = 1, running: bool = False, **dd: Any) -> None:
        super().__init__(dim if groups == 1 else dim // 2, affine=False, track_running_stats=running, **dd)
        self.groups = groups

    def forward(  # type: ignore[override]
        self, x: Tensor, bias: Tensor, overwrite: bool = False, moments: list[Tensor] | None = None
    ) -> Tensor:
        """Map (B, C, H, W) to the same shape.

        Args:
            x: the map.
            bias: one number.
            overwrite: as in :func:`instance_standardise`.
            moments: mean and biased variance of every plane, (B, C) each, or nothing where they are not known.
        """
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile the second half)
            if not is_recorded(x) and native.available(x, bias, gradients=True):
                with suppress(native.Unsuited):
                    return self._by_loops(x, _everywhere(bias, x), overwrite, moments)
        if self.groups == 1:
            return F.gelu(self._by_batch(x)).add_(bias)
        even, odd = split_groups(x, self.groups)
        return F.gelu(join_groups(self._by_batch(even), instance_standardise(odd), self.groups)).add_(bias)

    def _by_batch(self, x: Tensor) -> Tensor:
        learns = self.training or self.running_mean is None
        return F.batch_norm(x, self.running_mean, self.running_var, None, None, learns, 0.1, self.eps)

    @torch.jit.ignore
    def _by_loops(self, x: Tensor, bias: Tensor, overwrite: bool, moments: list[Tensor] | None) -> Tensor:
        if not self.training and native.available(x, bias):
            given = self.scales(moments or native.moments(x))
            return native.standardise(x, None, bias, given, self.eps, overwrite)[0]
        shared, given = self._moments(x, moments)
        return _standardise(x, None, bias, shared, given, overwrite=overwrite)

    @torch.jit.ignore
    def scales(self, moments: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and 1 / standard deviation that eval mode uses for every plane, given its own mean and variance.

        Args:
            moments: (B, C) each, :func:`zoo.kernels.native.available`.
        """
        known = None
        if self.running_mean is not None and self.running_var is not None:
            known = self.running_mean, self.running_var
        return native.shared_scales(moments, known, self.groups, self.eps)

    @torch.jit.ignore
    @torch.no_grad()
    def _moments(self, x: Tensor, moments: list[Tensor] | None) -> tuple["SharedMoments", tuple[Tensor, Tensor]]:
        """How the channels of a map share their moments, and those."""
        channel = torch.arange(x.shape[1], device=x.device)
        even = channel * self.groups // len(channel) % 2 == 0
        running = None
        if self.running_mean is not None and self.running_var is not None:
            running = self.running_mean, self.running_var
        shared = SharedMoments(even, None if self.training else running)
        mean, var = shared(*(moments or native.moments(x)))
        if not bool(var.max().isfinite()):
            raise native.Unsuited("a variance is not finite")
        if self.training and running is not None:
            count = x.numel() // len(channel)
            running[0].lerp_(mean[0, even], 0.1)
            running[1].lerp_(var[0, even] * (count / (count - 1)), 0.1)
        return shared, (mean, (var + self.eps).rsqrt())


class SharedMoments:
    """Moments of planes that some channels share over the batch.

    Args:
        shares: which channels do, (C,).
        known: mean and variance of just those to use whatever the batch.
    """

    def __init__(self, shares: Tensor, known: tuple[Tensor, Tensor] | None) -> None:
        self.shares, self.known = shares, known

    def __call__(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of every plane, (B, C), to those to use."""
        if self.known is not None:
            mean, var = mean.clone(), var.clone()
            mean[:, self.shares], var[:, self.shares] = self.known
            return mean, var
        middle = torch.where(self.shares, mean.mean(0), mean)
        spread = var + (mean - middle).square()
        return middle, torch.where(self.shares, spread.mean(0), spread)

    def slope(self, mean: Tensor) -> Tensor:
        """What becomes of means over planes, (B, C), that the gradient of the standardisation needs."""
        over_batch = mean.mean(0) if self.known is None else mean.new_zeros(())
        own = torch.where(mean.isfinite(), mean, torch.nan)  # as in the library's order of sums
        return torch.where(self.shares, over_batch, own)


def _everywhere(bias: Tensor, like: Tensor) -> Tensor:
    """A bias for every pixel of a map."""
    try:
        return bias.expand(like.shape[2:])
    except RuntimeError as error:
        raise native.Unsuited(str(error)) from error


def _standardise(
    x: Tensor,
    times: Tensor | None,
    bias: Tensor | None,
    shared: SharedMoments | None = None,
    given: tuple[Tensor, Tensor] | None = None,
    *,
    eps: float = 1e-5,
    overwrite: bool = False,
) -> Tensor:
    """:func:`zoo.kernels.native.standardise` with gradients."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, times, bias)):
        return _Standardise.apply(x, times, bias, shared, given, eps)
    return native.standardise(x, times, bias, given, eps, overwrite)[0]


class _Standardise(torch.autograd.Function):
    """It keeps its inputs and moments only; the standardised values and the slope of GELU are computed anew."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        times: Tensor | None,
        bias: Tensor | None,
        shared: SharedMoments | None,
        given: tuple[Tensor, Tensor] | None,
        eps: float,
    ) -> Tensor:
        y, mean, scale = native.standardise(x, times, bias, given, eps)
        if given is None and not bool(scale.min() > 0):
            raise native.Unsuited("a variance is not finite")
        ctx.save_for_backward(x, times, bias, mean, scale)
        ctx.shared, ctx.eps = shared, eps
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, times, bias, mean, scale = ctx.saved_tensors
        if torch.is_grad_enabled() or not is_ordinary(grad):  # somebody wants second derivatives, or many at once
            plain = partial(_standardise_plainly, shared=ctx.shared, eps=ctx.eps)
            return *plain_gradients(plain, (x, times, bias), ctx.needs_input_grad[:3], grad), None, None, None
        slope = None if ctx.shared is None else ctx.shared.slope
        d_x, d_times = native.standardise_gradient(x, times, mean, scale, grad, bias is not None, slope)
        d_bias = grad.sum((0, 1)) if ctx.needs_input_grad[2] else None
        return d_x, d_times, d_bias, None, None, None


def _standardise_plainly(
    x: Tensor, times: Tensor | None, bias: Tensor | None, shared: SharedMoments | None, eps: float
) -> Tensor:
    x = x if times is None else x * times
    var, mean = torch.var_mean(x, (2, 3), correction=0)
    if shared is not None:
        mean, var = shared(mean, var)
    z = (x - mean[..., None, None]) * (var + eps).rsqrt()[..., None, None]
    return z if bias is None else F.gelu(z) + bias


def batch_standardise(x: Tensor, mean: Tensor | None = None, var: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(var + 1e-5) of every channel over batch and space, biased variance.

    Args:
        x: (B, C, ...).
        mean: (C,), used instead of the batch's own.
        var: (C,), likewise.
        eps: added to the variance.
    """
    if mean is not None and var is not None:
        return F.batch_norm(x, mean, var, training=False, eps=eps)
    return F.batch_norm(x, None, None, training=True, eps=eps)


def group_standardise(x: Tensor, mean: Tensor | None = None, var: Tensor | None = None) -> Tensor:
    """G-IBS: twelve contiguous groups of channels, standardised by batch (even groups) and by instance (odd ones).

    Args:
        x: (B, C, ...), C divisible by 12.
        mean: (C / 2,), statistics of the even groups' channels used instead of the batch's own.
        var: (C / 2,), likewise.

    Raises:
        ValueError: C is not divisible by 12.
    """
    even, odd = split_groups(x)
    return join_groups(batch_standardise(even, mean, var), instance_standardise(odd))


def split_groups(x: Tensor, groups: int = GROUPS) -> tuple[Tensor, Tensor]:
    """Channels of the even and of the odd groups, (B, C / 2, ...) each."""
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile the second half)
        if not isinstance(x, torch.fx.Proxy) and x.shape[1] % groups:
            raise ValueError(f"group standardisation needs a multiple of {groups} channels, got {x.shape[1]}")
    pairs = x.unflatten(1, (groups // 2, 2, -1))
    return pairs[:, :, 0].flatten(1, 2), pairs[:, :, 1].flatten(1, 2)


def join_groups(even: Tensor, odd: Tensor, groups: int = GROUPS) -> Tensor:
    """The inverse of :func:`split_groups`."""
    pairs = [half.unflatten(1, (groups // 2, 1, -1)) for half in [even, odd]]
    return torch.cat(pairs, 2).flatten(1, 3)


def renormalise(h: Tensor) -> Tensor:
    """Answer h + 0.1 h / max(|h|, 1e-12), norms over the last axis; the gradient flows through the second term only."""
    return h.detach() + 0.1 * F.normalize(h, dim=-1, eps=1e-12)


# ---- the operators -----------------------------------------------------------------------------------------


def global_product(w: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """Global operator in 2-D: out[b, c] = (w[c] * z1[b, c]) z2[b, c], a matrix product of N x N maps.

    It mixes position (i, k) with (k, j), so it is neither equivariant to shifts nor to a transposition of the image.

    Args:
        w: hyper-kernel (1, C, N, N).
        z1: context (B, C, N, N).
        z2: what it is applied to, (B, C, N, N).
    """
    return torch.matmul(w * z1, z2)


def global_products(w: Tensor, z: list[Tensor]) -> list[Tensor]:
    """Matrix products of one map with three others, and SiLU of the first.

    Args:
        w: context-dependent hyper-kernel (B, C, N, N).
        z: what it is applied to, (B, C, N, N) each.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile the second half)
        if not is_recorded(w) and native.available(w, *z) and w.shape[-1] <= 64:
            with suppress(native.Unsuited):
                return native.global_products(w, z)
    products = [torch.matmul(w, part) for part in z]
    return products + [F.silu(products[0])]  # noqa: RUF005 (TorchScript)


@torch.fx.wrap
def causal_conv(kernel: Tensor, z: Tensor) -> Tensor:
    """out[t] = sum over s <= t of kernel[s] z[t - s], by a real Fourier transform of length 2 L.

    Computed in float32 or better whatever the inputs and autocast; answers in the type of `z`.

    Args:
        kernel: (..., L), for example a context-dependent kernel w * z1, (B, C, L).
        z: (..., L); leading axes broadcast, so several right-hand sides can be stacked in front.
    """
    return _long_conv(kernel, z, 0)


@torch.fx.wrap
def same_conv(kernel: Tensor, z: Tensor) -> Tensor:
    """out[t] = sum over s of kernel[s] z[t - s + L // 2], zeros outside; otherwise as :func:`causal_conv`."""
    return _long_conv(kernel, z, z.shape[-1] // 2)


def _long_conv(kernel: Tensor, z: Tensor, start: int) -> Tensor:
    length = z.shape[-1]
    spectrum = torch.fft.rfft(full(kernel), 2 * length) * torch.fft.rfft(full(z), 2 * length)
    return torch.fft.irfft(spectrum, 2 * length)[..., start : start + length].to(z.dtype)


def full(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


@torch.fx.wrap
def fold_product(kernel: Tensor, z: Tensor) -> Tensor:
    """Both sequences folded row by row to squares, and their matrix product.

    Args:
        kernel: (..., L), L a square number.
        z: (..., L).

    Raises:
        ValueError: L is not a square number.
    """
    side = square_side(z.shape[-1])
    return (kernel.unflatten(-1, (side, side)) @ z.unflatten(-1, (side, side))).flatten(-2)


def square_side(length: int) -> int:
    """The square root of a square number; a ValueError otherwise."""
    side = int(length**0.5 + 0.5)
    if side * side != length:
        raise ValueError(f"a sequence of {length} points cannot be folded to a square; use another global_1d")
    return side


@torch.fx.wrap
def local_conv(z: Tensor, kernel: Tensor, causal: bool = False) -> Tensor:
    """Depthwise cross-correlation, stride 1, that keeps the map's size.

    Args:
        z: (B, C, N, N) or (B, C, L), any memory format.
        kernel: (C, 1, k, k) or (C, 1, k), k odd; or one per sample, (B, C, k, k) or (B, C, k).
        causal: in 1-D, k - 1 zeros on the left instead of (k - 1) // 2 on either side.
    """
    if z.dim() == 4 and kernel.dim() == 4:
        return _local_conv2d(z, kernel)
    if causal:  # nothing to the right of the centre
        kernel = F.pad(kernel, (0, kernel.shape[-1] - 1))
    return _local_conv2d(z.unsqueeze(2), kernel.unsqueeze(2)).squeeze(2)


def _local_conv2d(z: Tensor, kernel: Tensor) -> Tensor:
    if kernel.shape[1] == 1 and kernel.shape[0] == z.shape[1]:
        return depthwise_conv2d(z, kernel)
    maps = z.reshape(1, -1, z.shape[2], z.shape[3])
    taps = kernel.reshape(-1, 1, kernel.shape[2], kernel.shape[3])
    return depthwise_conv2d(maps, taps).view(z.shape)


def elementwise_score(w: Tensor, z: Tensor) -> Tensor:
    """The channel and the spatial operator, w * z * z: pooled activations z against their hyper-kernel w."""
    return w * z * z


def channel_interaction(
    x: Tensor, channel: Tensor, standardise: bool = False, means: list[Tensor] | None = None
) -> Tensor:
    """HCI, hyper-channel interaction: every channel of x times a gate of its own mean.

    Args:
        x: (B, C, H, W).
        channel: hyper-kernel of the channels, C numbers in any shape.
        standardise: standardise the result by instance.
        means: a list to which the means of x and of the result over the batch are added, (1, C, H, W) each, if they
            cost little.

    Returns:
        (B, C, H, W).
    """
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile the second half)
        if standardise and not is_recorded(x) and native.available(x, channel):
            with suppress(native.Unsuited):
                y, *found = native.channel_interaction(x, channel, 1e-5)
                if means is not None:
                    means += found
                return y
    gated = x * elementwise_score(channel.view(1, -1, 1, 1), mean_over(x, [2, 3])).sigmoid()
    return instance_standardise(gated, overwrite=True) if standardise else gated


def hyper_interaction(y: Tensor, x: Tensor, channel: Tensor, space: Tensor) -> Tensor:
    """HI, hyper interaction: x times a gate, the sigmoid of a score of every channel of y times one of every pixel.

    Args:
        y: what the gate is made of, (B, C, H, W).
        x: what is gated, likewise.
        channel: hyper-kernel of the channels, C numbers in any shape.
        space: hyper-kernel of the pixels, H W numbers in any shape.

    Returns:
        (B, C, H, W).
    """
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile the second half)
        if not is_recorded(y) and native.available(y, x, channel, space):
            with suppress(native.Unsuited):
                return native.hyper_interaction(y, x, channel, space)
    by_channel = elementwise_score(channel.view(1, -1, 1, 1), mean_over(y, [2, 3]))
    by_pixel = elementwise_score(space.view([1, 1, y.shape[2], y.shape[3]]), mean_over(y, [1]))
    return x * (by_pixel * by_channel).sigmoid()


def mean_over(x: Tensor, dims: list[int], keepdim: bool = True) -> Tensor:
    """The mean over some axes; its gradient takes no memory of the size of x, unlike that of torch's own."""
    count = 1
    for d in dims:
        count *= x.shape[d]
    return (x.sum(dims, keepdim, dtype=torch.promote_types(x.dtype, torch.float32)) / count).to(x.dtype)


def slow_loss(kernels: list[Tensor], form: str = "tile") -> Tensor:
    """How far the global hyper-kernels of the blocks are from each other: the slow networks' own loss.

    `"tile"`: over all pairs i > j the mean of (K_j repeated to C_i channels - K_i)^2, whole blocks of channels
    repeated. `"channel_sum"`: the mean of (sum of K_j over channels - sum of K_i over channels)^2.

    Args:
        kernels: (1, C_i, N, N) or (1, C_i, L).
        form: `"tile"` or `"channel_sum"`.
    """
    loss = kernels[0].new_zeros(())
    if form == "channel_sum":
        kernels = [k.sum(1) for k in kernels]
    elif form != "tile":
        raise ValueError(f"form={form!r} is not one of {', '.join(map(repr, SLOW_LOSSES[:2]))}")
    for i, deep in enumerate(kernels):
        for shallow in kernels[:i]:
            if form == "tile":
                shallow = repeat_channels(shallow, deep.shape[1])
            loss = loss + (shallow - deep).square().mean()
    return loss


def repeat_channels(x: Tensor, channels: int) -> Tensor:
    """The whole block of channels again and again until there are `channels` (the last round may be cut)."""
    rounds = -(-channels // x.shape[1])
    return torch.cat([x] * rounds, 1)[:, :channels]


# ---- a linear map over channels ----------------------------------------------------------------------------


def mix_channels(
    parts: list[Tensor],
    weights: list[Tensor],
    bias: Tensor | None = None,
    onto: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Sum over parts of W_i x_i, plus bias: a 1 x 1 convolution of concatenated maps without the concatenation.

    Args:
        parts: maps (B, C_i, H, W).
        weights: (C_out, C_i) each.
        bias: (C_out,), or None for zero.
        onto: a map (B, C_out, H, W) of no further use, to which the sum is added in place, instead of a bias.
        out: a map for the answer, where no gradient is wanted.

    Returns:
        (B, C_out, H, W), contiguous.
    """
    first = parts[0]
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile the second half)
        if not is_recorded(first) and first.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
            if torch.is_grad_enabled():
                return _MixChannels.apply(bias, onto, len(parts), *parts, *weights)
            return _mix(parts, weights, bias, onto, out)
    x, weight = torch.cat(parts, 1), torch.cat(weights, 1)
    y = F.conv2d(x, weight[:, :, None, None], bias)
    if onto is not None:
        y += onto
    return y if out is None else out.copy_(y)


def _mix(
    parts: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    onto: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    batch, _, *size = parts[0].shape
    if out is None:
        out = parts[0].new_empty(batch, len(weights[0]), *size) if onto is None else onto
    for y, *chunk in few_samples(out, *parts):
        y = y.flatten(2)
        if bias is not None and onto is None:
            y.copy_(bias[:, None])
        fresh = bias is None and onto is None
        for x, w in zip(chunk, weights, strict=True):
            y.baddbmm_(w.expand(len(y), *w.shape), x.flatten(2), beta=0 if fresh else 1)
            fresh = False
    return out


class _MixChannels(torch.autograd.Function):
    """:func:`mix_channels`, one product an image."""

    @staticmethod
    def forward(bias: Tensor | None, onto: Tensor | None, count: int, *tensors: Tensor) -> Tensor:
        return _mix(tensors[:count], tensors[count:], bias, onto)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.count = inputs[2]
        if inputs[1] is not None:
            ctx.mark_dirty(inputs[1])
        ctx.save_for_backward(*inputs[3:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: activation checkpointing unpacks them one time
        parts, weights = saved[: ctx.count], saved[ctx.count :]
        wants_bias, wants_onto, _, *wanted = ctx.needs_input_grad
        wants_parts, wants_weights = wanted[: ctx.count], wanted[ctx.count :]
        d_onto = grad if wants_onto else None
        if torch.is_grad_enabled() or not is_ordinary(grad):  # somebody wants second derivatives, or many at once
            d_bias = grad.sum((0, 2, 3)) if wants_bias else None
            slope = grad.reshape(*grad.shape[:2], -1)
            d_x = [(w.mT @ slope).reshape(x.shape) for x, w in zip(parts, weights, strict=True)]
            d_w = [(slope @ x.flatten(2).mT).sum(0) for x in parts]
            return d_bias, d_onto, None, *d_x, *d_w
        d_bias = grad.new_zeros(grad.shape[1]) if wants_bias else None
        d_parts = [x.new_empty(x.shape) if wants else None for x, wants in zip(parts, wants_parts, strict=True)]
        d_weights = [torch.zeros_like(w) if wants else None for w, wants in zip(weights, wants_weights, strict=True)]
        for maps in few_samples(grad, *parts, *(d for d in d_parts if d is not None)):
            slope, *chunk = (m.flatten(2) for m in maps)
            d_chunk = iter(chunk[ctx.count :])
            if d_bias is not None:
                d_bias += slope.sum((0, 2))
            for x, w, d_part, d_weight in zip(chunk, weights, d_parts, d_weights, strict=False):
                if d_part is not None:
                    torch.bmm(w.mT.expand(len(x), *w.mT.shape), slope, out=next(d_chunk))
                if d_weight is not None:
                    d_weight += (slope @ x.mT).sum(0)
        return d_bias, d_onto, None, *d_parts, *d_weights


def few_samples(*maps: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Slices of maps (B, ...), some samples at a time, as many as the cache holds of the first."""
    step = max(CACHED // maps[0][0].numel(), 1)
    return zip(*(m.split(step) for m in maps), strict=True)


def by_samples(
    function: Callable[..., Tensor], maps: list[Tensor], chans: int, moments: list[Tensor] | None = None
) -> Tensor:
    """function(maps), a few samples at a time where no gradient is wanted: all that it makes then stays in the cache.

    Args:
        function: treats every sample alike and on its own; its argument `out` is memory for the answer.
        maps: (B, ...) each.
        chans: channels of the answer.
        moments: a list to which mean and biased variance of every plane are added, (B, C) each, if they cost little.
    """
    x = maps[0]
    if is_recorded(x) or x.device.type != "cpu" or torch.is_grad_enabled():
        return function(maps)
    y = x.new_empty(len(x), chans, *x.shape[2:])
    found = []
    for out, *chunk in few_samples(y, *maps):
        function(chunk, out=out)
        if moments is not None and native.available(out):
            found.append(native.moments(out))
    if found and moments is not None:
        moments += [torch.cat(part) for part in zip(*found, strict=True)]
    return y


# ---- slow networks -----------------------------------------------------------------------------------------


@torch.inference_mode(False)  # a model may be moved where nobody wants gradients, and be trained later
def coordinate_grid(points: int, dims: int, *, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
    """Coordinates of a regular grid on [-1, 1]^dims, both ends included: (dims, points^dims), rows first ("ij").

    They are drawn up in float64 on the CPU and rounded once, so that they are the same everywhere.
    """
    axis = torch.linspace(-1, 1, points, dtype=torch.float64, device="cpu")
    axes = torch.meshgrid([axis] * dims, indexing="ij")
    return torch.stack(axes).flatten(1).to(device=device, dtype=dtype or torch.get_default_dtype())


def matched_omega(points: int, dims: int, alpha: float = 6.0, beta: float = 1.0) -> float:
    """The frequency scale whose first layer has a mean |frequency| of half the Nyquist frequency of the grid.

    The Nyquist frequency of `points` samples on [-1, 1] is pi (points - 1) / 2; a weight is
    U(-1 / sqrt(dims), 1 / sqrt(dims)) 2 pi omega gamma with mean gamma = alpha / beta.
    """
    return max(points - 1, 1) * math.sqrt(dims) * beta / (4 * alpha)


class SlowNet(nn.Module):
    """Slow network: coordinates to a hyper-kernel, a multiplicative filter network of sines (paper, section 3).

        h = sin(F_0 g);   h = sin(F_l g) * (M_l h) + pos_bias  for l = 1..L;   W = out(h)

    The kernel is a function of the parameters only. After `reparameterize()` it is computed once and kept while no
    gradient is asked for; a change of a parameter, of the mode, the type or the device drops it.

    Args:
        points: grid points n of every axis.
        dims: axes d, 1 or 2.
        hidden: width h.
        layers: L >= 1.
        out: output channels o.
        omega_0: frequency scale; the authors' 2000 makes white noise at first, `"grid"` is :func:`matched_omega`.
        alpha: shape of the Gamma distribution of frequencies, divided by l + 1 in layer l.
        beta: its rate.
        device: where the parameters live.
        dtype: their type; half precision is raised to float32.

    Raises:
        ValueError: a size is not positive.
    """

    kept: Tensor | None
    grid: Tensor

    def __init__(
        self,
        points: int,
        dims: int,
        hidden: int,
        layers: int,
        out: int,
        *,
        omega_0: float | Literal["grid"] = 2000.0,
        alpha: float = 6.0,
        beta: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(points, dims, hidden, layers, out) < 1:
            raise ValueError(
                f"sizes of a slow network must be positive, got {points=}, {dims=}, {hidden=}, {layers=}, {out=}"
            )
        dtype = torch.float32 if dtype in HALF else dtype
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.points, self.dims, self.layers = points, dims, layers
        self.omega_0 = matched_omega(points, dims, alpha, beta) if omega_0 == "grid" else float(omega_0)
        self.alpha, self.beta = alpha, beta
        self.shape = (points,) * dims
        self.filters = nn.ModuleList(nn.Linear(dims, hidden, **dd) for _ in range(layers + 1))
        self.mix = nn.ModuleList(nn.Linear(hidden, hidden, **dd) for _ in range(layers))
        self.out = nn.Linear(hidden, out, **dd)
        self.pos_bias = nn.Parameter(torch.zeros(self.shape, **dd))
        self.register_buffer("grid", coordinate_grid(points, dims, **dd), persistent=False)
        self.deploy = False
        self.kept = None
        self._versions: list[tuple[int, int]] = []
        if type(self) is SlowNet:
            self.reset_parameters()

    @torch.jit.ignore
    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters as the authors do, the factor 1 / sqrt(number of grid points) included."""
        for layer, linear in enumerate(cast("list[nn.Linear]", list(self.filters))):
            shape, rate = (torch.tensor(v, device="cpu") for v in (self.alpha / (layer + 1), self.beta))
            gamma = torch.distributions.Gamma(shape, rate).sample(linear.weight.shape)
            bound = 2 * math.pi * self.omega_0 / math.sqrt(self.dims)
            linear.weight.uniform_(-bound, bound).mul_(gamma.to(linear.weight))
            linear.bias.zero_()
        for linear in cast("list[nn.Linear]", [*self.mix, *getattr(self, "ctx_mix", [])]):
            uniform_(linear)
            linear.bias.fill_(1.0)
        uniform_(self.out)
        self.out.weight.mul_(self.points ** (-self.dims / 2))
        self.pos_bias.zero_()

    def forward(self) -> Tensor:
        """The hyper-kernel (1, o, n, ..., n)."""
        if torch.jit.is_scripting():  # an outer autocast does not reach into TorchScript
            return self._kernel()
        if self.deploy and not self.training:
            return self._kept_kernel()
        with no_autocast(self.out.weight.device):
            return self._kernel()

    def _kernel(self) -> Tensor:
        waves, bias = self._waves(), self.pos_bias.flatten()
        h = waves[0]
        for i, mix in enumerate(self.mix):
            h = waves[i + 1] * affine(mix.weight, mix.bias, h) + bias  # type: ignore[arg-type]
        leading = [1, -1]
        return affine(self.out.weight, self.out.bias, h).view(leading + list(self.shape))

    def _waves(self) -> list[Tensor]:
        """sin(F_l g) of every layer, (h, P) each; angles of many turns lose their fraction in single precision."""
        grid = self.grid if self.grid.device.type == "mps" else self.grid.double()
        waves: list[Tensor] = []
        for f in self.filters:
            angle = affine(f.weight.to(grid.dtype), f.bias.to(grid.dtype), grid)  # type: ignore[arg-type]
            waves.append(torch.sin(angle).to(self.grid.dtype))
        return waves

    # ---- the deploy form

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Keep the hyper-kernel from now on while no gradient is asked for (deploy form)."""
        if not self.deploy:
            self.deploy = True
            if not self.training:
                self._keep()

    @torch.jit.ignore
    def _kept_kernel(self) -> Tensor:
        if torch.compiler.is_compiling():
            if self.kept is not None:
                return self.kept
        elif not (torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())):
            if self.kept is None or self._versions != self._state():
                self._keep()
            return cast("Tensor", self.kept)
        with no_autocast(self.out.weight.device):
            return self._kernel()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _keep(self) -> None:
        with no_autocast(self.out.weight.device):
            self.kept = self._kernel()
        self._versions = self._state()

    def _state(self) -> list[tuple[int, int]]:
        """What changes when a parameter or statistic is replaced or written to."""
        owned = [t for m in self.modules() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        return [(id(t), 0 if t.is_inference() else t._version) for t in owned]

    def _drop(self) -> None:
        self.kept = None

    def train(self, mode: bool = True) -> "SlowNet":
        self._drop()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._drop()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SlowNet":
        """Move or convert, but never below float32, and with a grid rounded anew."""

        def at_least_single(t: Tensor) -> Tensor:
            moved = fn(t)
            return t.to(moved.device) if moved.dtype in HALF and t.dtype not in HALF else moved

        self._drop()
        super()._apply(at_least_single, recurse)
        like = self.out.weight
        self.grid = coordinate_grid(self.points, self.dims, device=like.device, dtype=like.dtype)
        return self


class LocalSlowNet(SlowNet):
    """Slow network of a local kernel, with the context inside the generation (paper, section 3).

        c = GELU(ctx_fc(mean over the batch of ctx_reduce(pool(x))))
        h = sin(F_0 g);   h = ctx_mix_l(c) * renormalise(sin(F_l g) * (M_l h) + pos_bias)   for l = 1..L;   out(h)

    After `reparameterize()` the kernel of a running context is kept, or else all that the context does not change.

    Args:
        points: kernel size k.
        dims: axes, 1 or 2.
        hidden: width h.
        layers: L.
        out: channels C, of the context too.
        context: `"batch"`: the mean of the batch at hand, as published, so that a prediction depends on its batch;
            `"running"`: in eval mode a moving average over training (momentum 0.1); `"sample"`: a kernel for every
            sample.
        **kwargs: as of :class:`SlowNet`.
    """

    context_mean: Tensor | None

    def __init__(
        self,
        points: int,
        dims: int,
        hidden: int,
        layers: int,
        out: int,
        *,
        context: Literal["batch", "running", "sample"] = "batch",
        **kwargs: Any,
    ) -> None:
        super().__init__(points, dims, hidden, layers, out, **kwargs)
        dd: dict[str, Any] = {"device": self.out.weight.device, "dtype": self.out.weight.dtype}
        self.context = context
        self.ctx_reduce = nn.Linear(out, hidden, **dd)
        self.ctx_fc = nn.Linear(hidden, hidden, **dd)
        self.ctx_mix = nn.ModuleList(nn.Linear(hidden, hidden, **dd) for _ in range(layers))
        mean = torch.zeros(out, points**dims, **dd) if context == "running" else None
        self.register_buffer("context_mean", mean)
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draw the parameters; `ctx_reduce` and `ctx_fc` as the library does."""
        super().reset_parameters()
        self.ctx_reduce.reset_parameters()
        self.ctx_fc.reset_parameters()
        if self.context_mean is not None:
            self.context_mean.zero_()

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Local kernels of a batch of activations or of its mean.

        Args:
            x: activations (B, C, N, ...); (1, C, N, ...), their mean over the batch, gives the same unless the context
                is by sample.

        Returns:
            (C, 1, k, ...), or (B, C, k, ...) by sample.
        """
        if torch.jit.is_scripting():
            return self._local_kernel(self._context(x), self._start())
        kept = self._kept_kernel() if self.deploy and not self.training else None
        if kept is not None and self.context == "running":
            return kept
        with no_autocast(x.device):
            return self._local_kernel(self._context(x), self._start() if kept is None else kept)

    def _context(self, x: Tensor) -> Tensor:
        """Pooled activations (C, P), or (B, C, P) by sample."""
        running = self.context_mean
        if running is not None and not self.training:
            return running
        x = x.to(self.out.weight.dtype)
        if self.context != "sample" and x.shape[0] > 1:  # the mean first: pooling and ctx_reduce are linear too
            x = x.mean(0, keepdim=True)
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile the second half)
            if self.context == "batch" and not is_recorded(x) and native.available(x):
                with suppress(native.Unsuited):
                    return native.adaptive_mean(x[0].reshape(x.shape[1], -1, x.shape[-1]), self.shape)
        if self.dims == 1:
            pooled = F.adaptive_avg_pool1d(x.flatten(2), self.points)
        else:
            pooled = F.adaptive_avg_pool2d(x, self.shape).flatten(2)  # type: ignore[arg-type]
        if self.context == "sample":
            return pooled
        if running is not None:
            with torch.no_grad():
                running.lerp_(pooled[0], 0.1)
        return pooled[0]

    def _start(self) -> Tensor:
        """What no context changes, (L, h, P): layer 1 before its context, and the waves of the later ones."""
        waves = self._waves()
        first = waves[1] * affine(self.mix[0].weight, self.mix[0].bias, waves[0])  # type: ignore[arg-type]
        return torch.stack([renormalise(first + self.pos_bias.flatten())] + waves[2:])  # noqa: RUF005 (TorchScript)

    def _local_kernel(self, context: Tensor, start: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile the second half)
            if context.dim() == 2 and not is_recorded(context):
                weights = self._local_weights()
                if native.available(context, start, *weights):
                    with suppress(native.Unsuited):
                        return native.local_kernel(context, start, weights).view(-1, 1, *self.shape)
        c = affine(self.ctx_reduce.weight, self.ctx_reduce.bias, context)
        c = F.gelu(affine(self.ctx_fc.weight, self.ctx_fc.bias, c))
        h, bias = start[0], self.pos_bias.flatten()
        for i, (mix, ctx_mix) in enumerate(zip(self.mix, self.ctx_mix)):  # noqa: B905 (not in TorchScript)
            if i > 0:
                h = renormalise(start[i] * affine(mix.weight, mix.bias, h) + bias)  # type: ignore[arg-type]
            h = h * affine(ctx_mix.weight, ctx_mix.bias, c)  # type: ignore[arg-type]
        kernel = affine(self.out.weight, self.out.bias, h)
        leading = [-1, kernel.shape[-2]] if context.dim() == 3 else [-1, 1]
        return kernel.view(leading + list(self.shape))

    @torch.jit.ignore
    def _local_weights(self) -> list[Tensor]:
        hidden = [linear for pair in zip(self.mix, self.ctx_mix, strict=True) for linear in pair]
        linears = cast("list[nn.Linear]", [self.ctx_reduce, self.ctx_fc, *hidden, self.out])
        return [*(t for linear in linears for t in (linear.weight, linear.bias)), self.pos_bias]

    @torch.jit.ignore
    def _kernel(self) -> Tensor:
        """What the deploy form keeps: the kernel of the running context, or what :meth:`_start` answers."""
        if self.context_mean is None:
            return self._start()
        return self._local_kernel(self.context_mean, self._start())


def affine(weight: Tensor, bias: Tensor, h: Tensor) -> Tensor:
    """A linear layer on features first: (..., C_in, P) -> (..., C_out, P)."""
    return weight @ h + bias[:, None]


def uniform_(linear: nn.Linear) -> None:
    """Weight from U(+-sqrt(3 / fan_in)), bias 0."""
    bound = math.sqrt(3 / linear.in_features)
    nn.init.uniform_(linear.weight, -bound, bound)
    nn.init.zeros_(linear.bias)
