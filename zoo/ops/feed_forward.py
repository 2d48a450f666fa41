"""Feed-forward network with global response normalisation (GRN), as in UniRepLKNet and ConvNeXt V2.

GRN lets channels compete by their energy (Woo et al., ConvNeXt V2, 2023, section 3): on (B, H, W, C)

    G_c = sqrt(sum_hw x_c^2),    N_c = G_c / (mean_c G + 1e-6),    out = x (1 + gamma N) + beta.

The hidden layer is four times as wide as the map, so memory passes dominate on a CPU. :func:`response_norm` needs few
of them, forward and backward; :func:`feed_forward` is the whole network for inference.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops import native
from zoo.ops.core import Saved, operator

__all__ = ["feed_forward", "response_norm"]


# ---- normalisation -----------------------------------------------------------------------------------------


def response_norm(x: Tensor, gamma: Tensor, beta: Tensor | None = None) -> Tensor:
    """GRN of x (B, H, W, C), with gamma and beta (1, 1, 1, C); beta may be None."""
    return response_norm_and_energy(x, gamma, beta)[0]


def _scale(energy: Tensor, gamma: Tensor) -> Tensor:
    """1 + gamma N for the energies G: (..., C) and a gamma that broadcasts with it."""
    return 1 + gamma * (energy / (energy.mean(-1, keepdim=True) + 1e-6))


@operator(autocast="ignore", saves=(1,))
def response_norm_and_energy(x: Tensor, gamma: Tensor, beta: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """GRN, and the energies that its gradient needs.

    Args:
        x: (B, H, W, C).
        gamma: (1, 1, 1, C).
        beta: (1, 1, 1, C), or None for zero.

    Returns:
        (B, H, W, C) in the type of x; the energies G, (B, 1, 1, C), float32 for half precision.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    energy = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=dtype)
    y = x * _scale(energy, gamma).to(x.dtype)
    return (y if beta is None else y + beta.to(x.dtype)), energy


FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@response_norm_and_energy.on("cuda", *FLOATS)
@response_norm_and_energy.on("cpu", *FLOATS)
def _response_norm_fast(x: Tensor, gamma: Tensor, beta: Tensor | None) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    energy = wide.square().sum((1, 2), keepdim=True).sqrt()  # 1.6 to 8 times as fast as torch's norm
    scale = _scale(energy, gamma).to(x.dtype)
    return x * scale if beta is None else torch.addcmul(beta.to(x.dtype), x, scale), energy


@response_norm_and_energy.gradient
def _response_norm_gradient(
    saved: Saved, grad: Tensor | None, of_energy: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    (x, gamma, beta), (_, energy) = saved.inputs, saved.outputs
    assert energy is not None
    grad = torch.zeros_like(x) if grad is None else grad
    mean = energy.mean(-1, keepdim=True) + 1e-6
    relative = energy / mean
    d_scale = (grad * x).sum((1, 2), keepdim=True, dtype=energy.dtype)  # (B, 1, 1, C)
    d_relative = d_scale * gamma
    d_energy = (d_relative - (d_relative * relative).mean(-1, keepdim=True)) / mean
    d_energy = d_energy if of_energy is None else d_energy + of_energy
    slope = torch.where(energy > 0, d_energy / energy, 0)  # no gradient for a channel that is zero everywhere
    d_x = (grad * (1 + gamma * relative).to(x.dtype)).addcmul_(x, slope.to(x.dtype))
    d_beta = grad.sum((0, 1, 2), keepdim=True).to(beta.dtype) if saved.wanted[2] else None
    return d_x, (d_scale * relative).sum(0, keepdim=True).to(gamma.dtype), d_beta


# ---- inference ---------------------------------------------------------------------------------------------


@operator(layout=lambda x, *_: torch.channels_last, whole=lambda *_: True)
def feed_forward(x: Tensor, weights: list[Tensor], shortcut: Tensor | None = None) -> Tensor:
    """(shortcut +) W2 GRN(GELU(W1 (g * x) + b1)) + b2 for every pixel, with channel attention g.

    The attention g = sigmoid(U relu(D mean(x) + d) + u) uses the mean over the map.

    Args:
        x: (B, C, H, W), ideally channels_last.
        weights: D (E, C), d (E,), U (C, E), u (C,), W1 (F, C), b1 (F,), gamma (F,) of the GRN without bias, W2 (C, F),
            b2 (C,).
        shortcut: (B, C, H, W), or None for zero.

    Returns:
        (B, C, H, W) in channels_last order.
    """
    down, d, up, u, w1, b1, gamma, w2, b2 = weights
    gate = F.linear(F.linear(x.mean((2, 3)), down, d).relu(), up, u).sigmoid()  # (B, C)
    hidden = F.gelu(F.linear((x * gate[:, :, None, None]).permute(0, 2, 3, 1), w1, b1))  # (B, H, W, F)
    y = F.linear(response_norm(hidden, gamma.view(1, 1, 1, -1)), w2, b2).permute(0, 3, 1, 2)
    return y if shortcut is None else y + shortcut


@feed_forward.on("cpu", torch.float32)
def _feed_forward_on_cpu(x: Tensor, weights: list[Tensor], shortcut: Tensor | None) -> Tensor:
    """One sample after the other, so that the hidden layer stays in the cache."""
    native.fit("x", x, -1, -1, -1, -1)
    shortcut = torch.zeros_like(x) if shortcut is None else shortcut
    native.fit("shortcut", shortcut, *x.shape)
    batch, chans, height, width = x.shape
    few, wide, threads = len(weights[0]), len(weights[4]), torch.get_num_threads()
    shapes = (few, chans), (few,), (chans, few), (chans,), (wide, chans), (wide,), (wide,), (chans, wide), (chans,)
    for weight, shape in zip(weights, shapes, strict=True):
        native.fit("a weight", weight, *shape)
    x, shortcut = (t.contiguous(memory_format=torch.channels_last) for t in (x, shortcut))
    y, hidden = torch.empty_like(x), x.new_empty(min(batch, threads), height * width, wide)
    given = (t.contiguous() for t in weights)
    native.call("feed_forward", x, *given, shortcut, y, hidden, batch, height * width, chans, few, wide, threads)
    return y
