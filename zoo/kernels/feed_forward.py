"""Feed-forward network with global response normalisation (GRN), as UniRepLKNet and ConvNeXt V2 have it.

GRN lets the channels of a map compete by their energy (Woo et al., ConvNeXt V2, 2023, section 3): on (B, H, W, C)

    G_c = sqrt(sum_hw x_c^2),    N_c = G_c / (mean_c G + 1e-6),    out = x (1 + gamma N) + beta.

The hidden layer is four times as wide as the map, so passes over its memory decide the speed on a CPU.
:func:`response_norm` needs few of them, forward and backward; :func:`feed_forward` is the whole network in inference.
"""

from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels import native
from zoo.kernels.watching import is_transformed

__all__ = ["feed_forward", "map_norm", "response_norm", "response_scale"]


# ---- the normalisation -------------------------------------------------------------------------------------


def response_norm(x: Tensor, gamma: Tensor, beta: Tensor | None) -> Tensor:
    """GRN of x (B, H, W, C), with gamma and beta (1, 1, 1, C); beta may be None."""
    if is_transformed(x, gamma):
        norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        y = x * response_scale(norm, gamma).to(x.dtype)
        return y if beta is None else y + beta.to(x.dtype)
    return _ResponseNorm.apply(x, gamma, beta)[0]


def response_scale(norm: Tensor, gamma: Tensor) -> Tensor:
    """1 + gamma N for the energies G: (..., C) and a gamma that broadcasts with it."""
    return 1 + gamma * (norm / (norm.mean(-1, keepdim=True) + 1e-6))


def map_norm(x: Tensor) -> Tensor:
    """L2 norm of every channel over its map, (B, H, W, C) -> (B, 1, 1, C), float32 for half precision.

    The library's own norm takes 1.6 to 8 times as long on a CPU. Not differentiable where a channel is zero.
    """
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return x.square().sum((1, 2), keepdim=True).sqrt()


class _ResponseNorm(torch.autograd.Function):
    """Forward and backward pass of GRN in as few passes over memory as there can be."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, gamma: Tensor, beta: Tensor | None) -> tuple[Tensor, Tensor]:
        norm = map_norm(x)
        scale = response_scale(norm, gamma).to(x.dtype)
        return x * scale if beta is None else torch.addcmul(beta.to(x.dtype), x, scale), norm

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], inputs[1], output[1])
        ctx.beta_dtype = None if inputs[2] is None else inputs[2].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, gamma, norm = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants second derivatives: the norm must depend on x again
            norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=norm.dtype)
        mean = norm.mean(-1, keepdim=True) + 1e-6
        relative = norm / mean
        d_scale = (grad * x).sum((1, 2), keepdim=True, dtype=norm.dtype)  # (B, 1, 1, C)
        d_relative = d_scale * gamma
        d_norm = (d_relative - (d_relative * relative).mean(-1, keepdim=True)) / mean
        slope = torch.where(norm > 0, d_norm / norm, 0)  # a channel that is zero everywhere stays put
        d_x = grad * (1 + gamma * relative).to(x.dtype)
        d_x = d_x.addcmul_(x, slope.to(x.dtype))
        d_gamma = (d_scale * relative).sum(0, keepdim=True).to(gamma.dtype)
        if ctx.beta_dtype is None:
            return d_x, d_gamma, None
        return d_x, d_gamma, grad.sum((0, 1, 2), keepdim=True).to(ctx.beta_dtype)


# ---- the network in inference ------------------------------------------------------------------------------


def feed_forward(x: Tensor, shortcut: Tensor, weights: list[Tensor]) -> Tensor:
    """Pixel by pixel shortcut + W2 GRN(GELU(W1 (g * x) + b1)) + b2, for inference on a CPU.

    The channel attention g = sigmoid(U relu(D mean(x) + d) + u) is made of the mean over the map. In float32 by
    :func:`zoo.kernels.native.feed_forward`, whose hidden layer stays in the cache, sample after sample.

    Args:
        x: (B, C, H, W), float32 or float64, best in channels_last order.
        shortcut: (B, C, H, W).
        weights: D (E, C), d (E,), U (C, E), u (C,), W1 (F, C), b1 (F,), gamma (F,) of the GRN without bias, W2 (C, F),
            b2 (C,).

    Returns:
        (B, C, H, W) in channels_last order; no gradients.
    """
    compute = _opaque if torch.compiler.is_compiling() else _compute
    return compute(x, shortcut, weights)


def _compute(x: Tensor, shortcut: Tensor, weights: list[Tensor]) -> Tensor:
    x, shortcut = x.permute(0, 2, 3, 1).contiguous(), shortcut.permute(0, 2, 3, 1).contiguous()
    if native.available(x, shortcut, *weights):
        with suppress(native.Unsuited):
            out = native.feed_forward(x.flatten(1, 2), shortcut.flatten(1, 2), weights)
            return out.view(x.shape).permute(0, 3, 1, 2)
    down, d, up, u, w1, b1, gamma, w2, b2 = weights
    gate = F.linear(F.linear(x.mean((1, 2)), down, d).relu(), up, u).sigmoid()
    hidden = F.gelu(F.linear(x * gate[:, None, None], w1, b1))
    hidden *= response_scale(map_norm(hidden), gamma)
    return F.linear(hidden, w2, b2).add_(shortcut).permute(0, 3, 1, 2)


#: One node in the graph of a compiler, which would need more passes over memory.
_opaque = torch.library.custom_op("kernel_zoo::feed_forward", _compute, mutates_args=())
_opaque.register_fake(lambda x, *others: torch.empty_like(x, memory_format=torch.channels_last))
