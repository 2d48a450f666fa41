"""HyperZ·Z·W: kernels that a small network writes and the input completes, in two dimensions and in one.

Zhang: "HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction", 2024, arXiv 2401.17948. A *slow
network* maps coordinates to a *hyper-kernel* W; multiplied by an activation Z1 it becomes a context-dependent kernel,
which is then applied to another activation Z2 of the *fast network*:

    global, 2-D     (W * Z1) Z2, a matrix product over rows and columns      :func:`global_product`
    global, 1-D     a long convolution (ours; no definition was published)   :func:`causal_conv`, :func:`same_conv`,
                                                                             :func:`fold_product`
    local           depthwise convolution, the context inside the kernel     :func:`local_conv`
    channel, space  W * z * z, the score of a gate                           :func:`elementwise_score`

Activations are (B, C, N, N) or (B, C, L). The slow networks are in :mod:`zoo.models.slow_nets`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops.core import operator
from zoo.ops.depthwise import depthwise_conv2d
from zoo.ops.numerics import at_least_float32, autocast_disabled
from zoo.ops.pointwise import repeat_channels

__all__ = [
    "SLOW_LOSSES",
    "causal_conv",
    "channel_interaction",
    "elementwise_score",
    "fold_product",
    "global_product",
    "hyper_interaction",
    "linear_channels_first",
    "local_conv",
    "mean_over",
    "pooled_mean",
    "pooled_samples",
    "renormalise",
    "same_conv",
    "sine_waves",
    "slow_loss",
    "square_side",
]

SLOW_LOSSES = ("tile", "channel_sum", "none")


# ---- the operators of the paper ----------------------------------------------------------------------------


def global_product(w: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """Global operator in 2-D: out[b, c] = (w[c] * z1[b, c]) z2[b, c], a matrix product of N x N maps.

    It mixes position (i, k) with (k, j), so it is neither equivariant to shifts nor to a transposition of the image.

    Args:
        w: hyper-kernel (1, C, N, N).
        z1: context (B, C, N, N).
        z2: what it is applied to, (B, C, N, N).
    """
    return torch.matmul(w * z1, z2)


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
    spectrum = torch.fft.rfft(at_least_float32(kernel), 2 * length) * torch.fft.rfft(at_least_float32(z), 2 * length)
    return torch.fft.irfft(spectrum, 2 * length)[..., start : start + length].to(z.dtype)


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
        z: (B, C, H, W) or (B, C, L), any memory format.
        kernel: (C, 1, k, ...), k odd; or one per sample, (B, C, k, ...). (C, 1, k) means (C, 1, 1, k) for a map.
        causal: in 1-D, k - 1 zeros on the left instead of (k - 1) // 2 on either side.
    """
    if kernel.dim() == 3:
        if causal:  # nothing to the right of the centre
            kernel = F.pad(kernel, (0, kernel.shape[-1] - 1))
        kernel = kernel.unsqueeze(2)
    maps = z if z.dim() == 4 else z.unsqueeze(2)
    if kernel.shape[1] == 1 and kernel.shape[0] == maps.shape[1]:
        return depthwise_conv2d(maps, kernel).view(z.shape)
    kernels = kernel.reshape(-1, 1, kernel.shape[2], kernel.shape[3])
    return depthwise_conv2d(maps.reshape(1, -1, maps.shape[2], maps.shape[3]), kernels).view(z.shape)


def elementwise_score(w: Tensor, z: Tensor) -> Tensor:
    """The channel and the spatial operator, w * z * z: pooled activations z against their hyper-kernel w."""
    return w * z * z


def channel_interaction(x: Tensor, channel: Tensor) -> Tensor:
    """HCI, hyper-channel interaction: every channel of x times a gate of its own mean.

    Args:
        x: (B, C, H, W).
        channel: hyper-kernel of the channels, C numbers in any shape.
    """
    return x * elementwise_score(channel.view(1, -1, 1, 1), mean_over(x, [2, 3])).sigmoid()


def hyper_interaction(y: Tensor, x: Tensor, channel: Tensor, space: Tensor) -> Tensor:
    """HI, hyper interaction: x times a gate, the sigmoid of a score of every channel of y times one of every pixel.

    Args:
        y: what the gate is made of, (B, C, H, W).
        x: what is gated, likewise.
        channel: hyper-kernel of the channels, C numbers in any shape.
        space: hyper-kernel of the pixels, H W numbers in any shape.
    """
    by_channel = elementwise_score(channel.view(1, -1, 1, 1), mean_over(y, [2, 3]))
    by_pixel = elementwise_score(space.view([1, 1, y.shape[2], y.shape[3]]), mean_over(y, [1]))
    return x * (by_pixel * by_channel).sigmoid()


def mean_over(x: Tensor, dims: list[int], keepdim: bool = True) -> Tensor:
    """The mean over some axes; its gradient takes no memory of the size of x, unlike that of torch's own."""
    count = 1
    for d in dims:
        count *= x.shape[d]
    return (x.sum(dims, keepdim, dtype=torch.promote_types(x.dtype, torch.float32)) / count).to(x.dtype)


# ---- parts of slow networks --------------------------------------------------------------------------------


def sine_waves(grid: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """sin(F_l g) of every layer l; angles of many turns, which lose their fraction in single precision, are in double.

    Args:
        grid: coordinates g, (d, P).
        weights: of n layers F_l, (h, d) each.
        biases: (h,) each.

    Returns:
        (n, h, P).
    """
    exact = grid if grid.device.type == "mps" else grid.double()
    angles = linear_channels_first(exact, torch.cat(weights).to(exact.dtype), torch.cat(biases).to(exact.dtype))
    return torch.sin(angles).to(grid.dtype).view(len(weights), -1, grid.shape[1])


@operator()
def linear_channels_first(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer on features first, in the type of the features whatever autocast says.

    Args:
        h: (..., C_in, P).
        weight: (C_out, C_in).
        bias: (C_out,).

    Returns:
        (..., C_out, P).
    """
    with autocast_disabled(h.device):
        return weight @ h + bias[:, None]


def renormalise(h: Tensor) -> Tensor:
    """H + 0.1 h / max(|h|, 1e-12), norms over the last axis; the gradient flows through the second term only."""
    return h.detach() + 0.1 * F.normalize(h, dim=-1, eps=1e-12)


def pooled_samples(x: Tensor, size: list[int]) -> Tensor:
    """Adaptive average pooling of every sample.

    Args:
        x: (B, C, H, W), or (B, C, ...) where `size` is one number.
        size: (k_h, k_w), or (k,) for the points of a sequence.

    Returns:
        (B, C, k_h k_w) or (B, C, k).
    """
    if len(size) == 1:
        return F.adaptive_avg_pool1d(x.flatten(2), size[0])
    return F.adaptive_avg_pool2d(x, size).flatten(2)  # type: ignore[arg-type]


def pooled_mean(x: Tensor, size: list[int]) -> Tensor:
    """The mean over the samples of :func:`pooled_samples`: (B, C, H, W) to (C, k_h k_w)."""
    return pooled_samples(x, size).mean(0)


# ---- the slow networks' own loss ---------------------------------------------------------------------------


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
