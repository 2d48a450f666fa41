"""Terminator for images as one would first write it from its description: the yardstick for the zoo's own form.

It borrows the parameters of a :class:`zoo.models.terminator.Terminator` and computes with stock layers only: 1 x 1
convolutions, the library's normalisations, a concatenation of ten branches and tiled earlier maps, twelve slices for
the group standardisation, every kernel written anew for every call.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels.hyperzzw import LocalSlowNet, SlowNet
from zoo.models.terminator import RecursiveGatedUnit, SlowFastBlock, Terminator

__all__ = ["PlainTerminator"]


class PlainTerminator(nn.Module):
    """The plain form of a 2-D network with published (batch) statistics; `network` keeps the parameters.

    Raises:
        ValueError: The network is one-dimensional, or not as published.
    """

    def __init__(self, network: Terminator) -> None:
        super().__init__()
        first: SlowFastBlock = network.blocks[0]  # type: ignore[assignment]
        if network.ndim != 2 or not network.batch_dependent or len(first.roles) != 4:
            raise ValueError("the plain form is the released 2-D network: batch statistics and ten branches")
        self.network = network
        self.kernels: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, N, N) to logits."""
        self.kernels = []
        maps: list[Tensor] = []
        for block, earlier in zip(self.network.blocks, self.network.reuse, strict=True):
            x, kernel = plain_block(block, x, [maps[j] for j in earlier])  # type: ignore[arg-type]
            maps.append(x)
            self.kernels.append(kernel)
        return self.network.head(x.mean((2, 3)))

    def aux_losses(self) -> dict[str, Tensor]:
        """Slow loss in its `tile` form, from the kernels of the last forward pass, and the regulariser."""
        loss = x = self.kernels[0].new_zeros(())
        for i, deep in enumerate(self.kernels):
            for x in self.kernels[:i]:
                loss = loss + (x.repeat(1, deep.shape[1] // x.shape[1], 1, 1) - deep).square().mean()
        return {"slow_loss": loss, "norm_penalty": self.network.norm_penalty * plain_norms(self.network)}


def plain_norms(network: Terminator) -> Tensor:
    """The regulariser, tensor by tensor."""
    full = ("local_bias.", "local_mix.", "mixer.", "bottleneck.")
    little = ("rgu_fast.", "rgu_slow.", "global_net.", "local_nets.", "hi_spatial_net.")
    total = torch.zeros(())
    for block in network.blocks:
        for name, p in block.named_parameters():
            if name.startswith(full):
                total = total + p.norm()
            elif name.startswith(little) and name.endswith(".weight"):
                total = total + 1e-6 * p.norm()
    return total


def pointwise(layer: nn.Module, x: Tensor) -> Tensor:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return F.conv2d(x, weight[:, :, None, None], layer.bias)  # type: ignore[arg-type]


def plain_kernel(net: SlowNet) -> Tensor:
    grid = net.grid.view(1, net.dims, *net.shape)
    if net.dims == 1:
        grid = grid.unsqueeze(-1)
    h = torch.sin(pointwise(net.filters[0], grid))
    bias = net.pos_bias if net.dims == 2 else net.pos_bias[:, None]
    for i, mix in enumerate(net.mix):
        h = torch.sin(pointwise(net.filters[i + 1], grid)) * pointwise(mix, h) + bias
    return pointwise(net.out, h)


def plain_local_kernel(net: LocalSlowNet, x: Tensor) -> Tensor:
    c = pointwise(net.ctx_reduce, F.adaptive_avg_pool2d(x, (net.points, net.points))).mean(0, keepdim=True)
    c = F.gelu(pointwise(net.ctx_fc, c))
    grid = net.grid.view(1, net.dims, *net.shape)
    h = torch.sin(pointwise(net.filters[0], grid))
    for i, (mix, ctx_mix) in enumerate(zip(net.mix, net.ctx_mix, strict=True)):
        h = torch.sin(pointwise(net.filters[i + 1], grid)) * pointwise(mix, h) + net.pos_bias
        norm = h.flatten(2).norm(dim=2).clamp(min=1e-12)[:, :, None, None]
        h = h.detach() + 0.1 * h / norm
        h = h * pointwise(ctx_mix, c)
    return pointwise(net.out, h).transpose(0, 1)


def plain_unit(unit: RecursiveGatedUnit, x: Tensor) -> Tensor:
    k, v = pointwise(unit.k, x), pointwise(unit.v, x)
    return pointwise(unit.y, F.gelu(F.instance_norm(k * pointwise(unit.q, v))) + unit.pos_bias)


def plain_block(block: SlowFastBlock, x: Tensor, pre: list[Tensor]) -> tuple[Tensor, Tensor]:
    kernel = plain_kernel(block.global_net)
    w = x * kernel
    fast = F.instance_norm(plain_unit(block.rgu_slow, w) + plain_unit(block.rgu_fast, x))
    mix = F.instance_norm(pointwise(block.mixer, x))
    channel = plain_kernel(block.hci_net).transpose(1, 2)
    hci = F.instance_norm(x * torch.sigmoid(channel * F.adaptive_avg_pool2d(x, 1) ** 2))
    g1, g2, g3 = w @ fast, w @ mix, w @ hci
    scores = plain_kernel(block.hi_channel_net).transpose(1, 2) * F.adaptive_avg_pool2d(g1, 1) ** 2
    scores = scores * (plain_kernel(block.hi_spatial_net) * g1.mean(1, keepdim=True) ** 2)
    maps = {"x": x, "hci": hci, "mix": mix}
    local = []
    for j, (source, convolved) in enumerate(block.roles):
        taps = plain_local_kernel(block.local_nets[j], maps[source])  # type: ignore[arg-type]
        y = F.conv2d(maps[convolved], taps, padding=taps.shape[-1] // 2, groups=block.dim)
        y = F.batch_norm(pointwise(block.local_mix[j], y), None, None, training=True)
        local.append(F.gelu(y) + block.local_bias[j])
    tiled = [p.repeat(1, block.dim // p.shape[1], 1, 1) for p in pre]
    parts = [g1, local[1], *tiled[:1], fast, g2, local[0], torch.sigmoid(g1) * g1, local[2], g3, local[3], *tiled[1:]]
    out = pointwise(block.bottleneck, torch.cat([*parts, x * torch.sigmoid(scores)], 1))
    groups = [
        F.instance_norm(group) if i % 2 else F.batch_norm(group, None, None, training=True)
        for i, group in enumerate(out.chunk(12, 1))
    ]
    out = F.gelu(torch.cat(groups, 1)) + block.out_bias
    return F.dropout2d(out, block.drop_rate, block.training), kernel
