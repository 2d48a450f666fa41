"""Dilated Reparam Block: a large depthwise convolution, trained with parallel dilated convolutions.

A large depthwise kernel has a large receptive field in one layer, but trains poorly on its own. The Dilated Reparam
Block of UniRepLKNet (Ding et al., 2024, arXiv 2311.15599, section 3.1 and figure 2) adds parallel branches of small
dilated kernels, each with its own batch normalisation:

    D(x) = BN_0( DW_K(x) ) + sum over branches (k, r) of BN_kr( DW_{k, dilation r}(x) ).

All of it is linear once the normalisations are frozen, and a dilated k x k kernel equals a dense kernel of size
(k - 1) r + 1 with zeros in between, so the whole block equals one K x K depthwise convolution with a bias.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.ops.depthwise import depthwise_conv2d, place_kernel

__all__ = ["BRANCHES", "DepthwiseConv2d", "DilatedReparamBlock", "fuse_conv_bn", "merge_branches", "store_convolution"]

#: Branches (kernel size k, dilation r) beside a large kernel of size K, in the authors' order.
BRANCHES: dict[int, tuple[tuple[int, int], ...]] = {
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    7: ((5, 1), (3, 2), (3, 3)),
    5: ((3, 1), (3, 2)),
}


# ---- merging -----------------------------------------------------------------------------------------------


def fuse_conv_bn(weight: Tensor, bias: Tensor | None, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Fold an eval-mode batch normalisation into the convolution before it.

    With t = bn.weight / sqrt(running_var + eps): t * weight and bn.bias + (bias - running_mean) * t.

    Args:
        weight: convolution weight, (C_out, C_in / groups, k, k), or a linear weight (C_out, C_in).
        bias: convolution bias, (C_out,), or None for zero.
        bn: normalisation over the C_out output channels, with running statistics.

    Returns:
        Weight and bias of the merged convolution, **in float64**: merging is done once, so it can afford to be exact,
            and
        the result is rounded only once, when it is stored.

    Raises:
        ValueError: `bn` has no running statistics, so it is not a fixed affine map.
    """
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("cannot fold batch normalisation without running statistics; use track_running_stats=True")
    scale = (bn.running_var.double() + bn.eps).rsqrt()
    shift = -bn.running_mean.double()
    if bias is not None:
        shift = shift + bias.double()
    if bn.affine:
        scale = scale * bn.weight.double()
    fused_bias = shift * scale
    if bn.affine:
        fused_bias = fused_bias + bn.bias.double()
    return weight.double() * scale.view(-1, *(1,) * (weight.ndim - 1)), fused_bias


def merge_branches(
    size: int, branches: Sequence[tuple[Tensor, int, nn.BatchNorm2d]], weight: Tensor, bn: nn.BatchNorm2d
) -> tuple[Tensor, Tensor]:
    """Sum a large kernel and its dilated branches, each with its normalisation, into one kernel and one bias.

    Args:
        size: size K of the merged kernel.
        branches: (weight, dilation, normalisation) of every branch.
        weight: the large kernel, (C, 1, K, K).
        bn: its normalisation.

    Returns:
        Kernel (C, 1, K, K) and bias (C,), both float64 (see :func:`fuse_conv_bn`).
    """
    kernel, bias = fuse_conv_bn(weight, None, bn)
    for branch_weight, dilation, branch_bn in branches:
        branch_kernel, branch_bias = fuse_conv_bn(branch_weight, None, branch_bn)
        kernel = kernel + place_kernel(branch_kernel, size, dilation)
        bias = bias + branch_bias
    return kernel, bias


def store_convolution(layer: nn.Module, weight: Tensor, bias: Tensor, like: nn.Module | None = None) -> None:
    """Set merged weights of a layer, with the dtype and `requires_grad` of the layer that they come from.

    Args:
        layer: the layer to set.
        weight: the merged weight.
        bias: the merged bias.
        like: the layer that was merged; None for `layer` itself.
    """
    old = (like or layer).weight
    assert isinstance(old, nn.Parameter)
    layer.weight = nn.Parameter(weight.to(old), requires_grad=old.requires_grad)
    layer.bias = nn.Parameter(bias.to(old), requires_grad=old.requires_grad)


# ---- modules -----------------------------------------------------------------------------------------------


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise k x k convolution (k odd) with output of the same size, by :func:`depthwise_conv2d`."""

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        *,
        dilation: int = 1,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd so that it has a centre, got {kernel_size}")
        padding = dilation * (kernel_size // 2)
        super().__init__(dim, dim, kernel_size, 1, padding, dilation, groups=dim, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, H, W) to the same shape."""
        return depthwise_conv2d(x, self.weight, self.bias, self.dilation[0])


class DilatedReparamBlock(nn.ModuleDict):
    """Large depthwise kernel with parallel dilated branches, mergeable into one convolution.

    D(x) = BN_0(DW_K(x)) + sum_(k, r) BN_kr(DW_k,r(x)), see the module docstring. It is a dictionary with the names of
    the authors' checkpoints: `lk_origin`, `origin_bn`, `dil_conv_k{k}_{r}`, `dil_bn_k{k}_{r}`.

    Args:
        dim: channels C.
        kernel_size: size K of the large kernel: 5, 7, 9, 11, 13, 15 or 17.
        deploy: build the merged form, a single convolution with bias.
        device: device of the parameters.
        dtype: their dtype.

    Raises:
        ValueError: there is no branch set for this kernel size.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        *,
        deploy: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kernel_size not in BRANCHES:
            raise ValueError(
                f"kernel_size {kernel_size} has no set of dilated branches; choose one of {sorted(BRANCHES)}"
            )
        self.dim = dim
        self.kernel_size = kernel_size
        self["lk_origin"] = DepthwiseConv2d(dim, kernel_size, bias=deploy, device=device, dtype=dtype)
        if deploy:
            return
        self["origin_bn"] = nn.BatchNorm2d(dim, device=device, dtype=dtype)
        for k, r in BRANCHES[kernel_size]:
            self[f"dil_conv_k{k}_{r}"] = DepthwiseConv2d(dim, k, dilation=r, device=device, dtype=dtype)
            self[f"dil_bn_k{k}_{r}"] = nn.BatchNorm2d(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        # Each convolution is followed by its normalisation; the merged form is the first convolution alone.
        out = y = x
        terms = 0
        for name, layer in self.items():
            if "bn" in name:
                y = layer(y)
                out = y if terms == 0 else out + y
                terms += 1
            else:
                y = layer(x)
        return y if terms == 0 else out

    def merged(self) -> tuple[Tensor, Tensor]:
        """Kernel (C, 1, K, K) and bias (C,) of the equivalent single convolution in eval mode, float64."""
        origin = self["lk_origin"]
        assert isinstance(origin, DepthwiseConv2d)
        if "origin_bn" not in self:
            assert origin.bias is not None
            return origin.weight.double(), origin.bias.double()
        layers: list[Any] = list(self.values())
        (conv, bn), *others = zip(layers[::2], layers[1::2], strict=True)
        branches = [(c.weight, c.dilation[0], n) for c, n in others]
        return merge_branches(self.kernel_size, branches, conv.weight, bn)

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Convert to the merged form, in place. A second call does nothing."""
        if "origin_bn" not in self:
            return
        kernel, bias = self.merged()
        origin = self["lk_origin"]
        for name in [name for name in self if name != "lk_origin"]:
            del self[name]
        store_convolution(origin, kernel, bias)
