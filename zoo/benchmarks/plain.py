"""UniRepLKNet as one would first write it, from stock layers: the yardstick for the zoo's own form.

Same parameters, same names, same outputs. What differs is how: every branch is a library convolution, every
normalisation a library layer, the global response norm is `torch.norm` and two broadcasts, and nothing looks at the
device or the size of the map. It is what the authors' code does, less its printing.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels.large_kernel import DepthwiseConv2d, DilatedReparamBlock
from zoo.models.unireplknet import GlobalResponseNorm, LayerNorm2d, SqueezeExcite, UniRepLKNetBlock

__all__ = ["has_plain_form", "plain_copy"]


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy of a UniRepLKNet, in training or deploy form, that runs on stock layers only.

    Raises:
        ValueError: The model has none of the family's blocks.
    """
    if not has_plain_form(model):
        raise ValueError(f"{type(model).__name__} has no plain form; there is one for UniRepLKNet")
    return _plain(copy.deepcopy(model))


def has_plain_form(model: nn.Module) -> bool:
    """Whether a model consists of UniRepLKNet's blocks."""
    return any(isinstance(module, UniRepLKNetBlock) for module in model.modules())


def _plain(module: nn.Module) -> Any:
    for name, child in list(module.named_children()):
        module.add_module(name, _plain(child))
    for kind, build in _FORMS.items():
        if type(module) is kind:
            return build(module)
    return module


def _convolution(conv: DepthwiseConv2d) -> nn.Conv2d:
    """The same layer without the zoo's routing."""
    stock = nn.Conv2d.__new__(nn.Conv2d)
    stock.__dict__.update(conv.__dict__)
    return stock


class PlainReparamBlock(nn.ModuleDict):
    """Sum of convolutions, each with its normalisation; in deploy form one convolution."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        if "origin_bn" not in self:
            return self["lk_origin"](x)
        out = self["origin_bn"](self["lk_origin"](x))
        for name in self:
            if name.startswith("dil_conv"):
                out = out + self[name.replace("conv", "bn")](self[name](x))
        return out


class PlainLayerNorm(nn.Module):
    """The library's layer normalisation on channels moved last, and GELU as a step of its own."""

    def __init__(self, norm: LayerNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.gelu = norm.weight, norm.bias, norm.eps, norm.gelu

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps)
        x = x.permute(0, 3, 1, 2)
        return F.gelu(x) if self.gelu else x


class PlainSqueezeExcite(nn.Module):
    """Channel attention by two 1 x 1 convolutions."""

    def __init__(self, se: SqueezeExcite) -> None:
        super().__init__()
        self.down, self.up = se.down, se.up

    def forward(self, x: Tensor) -> Tensor:
        """Rescale the channels of (B, C, H, W)."""
        scale = F.adaptive_avg_pool2d(x, 1)
        scale = torch.sigmoid(self.up(F.relu(self.down(scale))))
        return x * scale.view(-1, x.shape[1], 1, 1)


class PlainResponseNorm(nn.Module):
    """Global response normalisation on (B, H, W, C), as its paper prints it."""

    def __init__(self, grn: GlobalResponseNorm) -> None:
        super().__init__()
        self.gamma, self.beta = grn.gamma, grn.beta

    def forward(self, x: Tensor) -> Tensor:
        """Rescale and shift (B, H, W, C)."""
        norm = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        relative = norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)
        if self.beta is None:
            return (self.gamma * relative + 1) * x
        return (self.gamma * relative + 1) * x + self.beta


class PlainBlock(nn.Module):
    """A block that calls its layers one after the other."""

    def __init__(self, block: UniRepLKNetBlock) -> None:
        super().__init__()
        self.dwconv, self.norm, self.se = block.dwconv, block.norm, block.se
        self.pwconv1, self.act, self.pwconv2 = block.pwconv1, block.act, block.pwconv2
        self.gamma, self.drop_path = block.gamma, block.drop_path

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        y = self.se(self.norm(self.dwconv(x)))
        y = self.pwconv2(self.act(self.pwconv1(y)))
        if self.gamma is not None:
            y = self.gamma.view(1, -1, 1, 1) * y
        return x + self.drop_path(y)


_FORMS: dict[type[nn.Module], Any] = {
    DepthwiseConv2d: _convolution,
    DilatedReparamBlock: lambda block: PlainReparamBlock(dict(block.items())),
    LayerNorm2d: PlainLayerNorm,
    SqueezeExcite: PlainSqueezeExcite,
    GlobalResponseNorm: PlainResponseNorm,
    UniRepLKNetBlock: PlainBlock,
}
