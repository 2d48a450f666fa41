"""Layer normalisation over the channels of each pixel."""

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops import native
from zoo.ops.core import Unsuited, operator

__all__ = ["channel_norm"]


@operator(layout=lambda x, *_: torch.channels_last)
def channel_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, gelu: bool = False) -> Tensor:
    """Layer normalisation over the channels of each pixel, optionally followed by GELU.

    Args:
        x: (B, C, H, W).
        weight: (C,).
        bias: (C,).
        eps: added to the variance.
        gelu: whether to apply GELU afterwards.

    Returns:
        (B, C, H, W) in channels_last order.
    """
    x = F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, eps)  # (B, H, W, C)
    return (F.gelu(x) if gelu else x).permute(0, 3, 1, 2)


@channel_norm.on("cpu", torch.float32)
def _channel_norm_on_cpu(x: Tensor, weight: Tensor, bias: Tensor, eps: float, gelu: bool) -> Tensor:
    native.fit("x", x, -1, -1, -1, -1)
    chans = x.shape[1]
    native.fit("weight", weight, chans)
    native.fit("bias", bias, chans)
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.empty_like(x)
    rows = x.numel() // chans
    if native.call("layer_norm", x, weight.contiguous(), bias.contiguous(), y, rows, chans, eps, int(gelu)):
        raise Unsuited("a variance is not finite")
    return y
