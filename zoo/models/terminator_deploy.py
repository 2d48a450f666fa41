"""Terminator for inference: the same outputs with fewer memory passes. Used by :func:`zoo.to_deploy`.

Kernels that depend on parameters only are cached, and a block is a few operators (:mod:`zoo.ops.slow_fast`). In
training mode a fused block runs as before.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.models.slow_nets import LocalSlowNet, SlowNet
from zoo.models.terminator import RecursiveGatedUnit, SlowFastBlock, StandardGELU
from zoo.ops.cache import KernelCache
from zoo.ops.slow_fast import local_kernel, slow_fast_block, slow_fast_context

__all__ = ["FusedBlock", "fuse"]


class FixedSlowNet(SlowNet):
    """A slow network whose output is cached."""

    cache: KernelCache

    def forward(self) -> Tensor:
        """The hyper-kernel (1, o, n, ..., n)."""
        return self.cache(self, lambda: SlowNet.forward(self))

    prepare = forward


class FixedLocalSlowNet(LocalSlowNet):
    """A local slow network that caches everything that does not depend on the activations."""

    cache: KernelCache

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Activations (B, C, N, ...), or their mean (1, C, N, ...), to kernels as in :class:`LocalSlowNet`."""
        if self.training or self.context == "sample":
            return super().forward(x)
        kept = self.prepare()
        if self.context == "running":
            return kept
        return self.as_kernel(local_kernel(self.pooled(x), kept, self.weights(), self.pos_bias.flatten()))

    def prepare(self) -> Tensor:
        """The kernel for the running context, or the sine waves of every layer."""
        if self.context == "running":
            return self.cache(self, lambda: LocalSlowNet.forward(self, self.grid))  # only the dtype of the grid is used
        return self.cache(self, self.waves)

    def weights(self) -> list[Tensor]:
        """Weight and bias of ctx_reduce, of ctx_fc, of mix and ctx_mix of every layer, and of out."""
        pairs = [linear for pair in zip(self.mix, self.ctx_mix, strict=True) for linear in pair]
        return [t for layer in (self.ctx_reduce, self.ctx_fc, *pairs, self.out) for t in (layer.weight, layer.bias)]  # type: ignore[misc]


class FusedBlock(SlowFastBlock):
    """Inference form of a :class:`SlowFastBlock`."""

    def forward(self, x: Tensor, pre: list[Tensor]) -> Tensor:
        """Map (B, C, H, W) and earlier outputs to (B, out_dim, H, W)."""
        if self.training or self.ndim == 1 or self.local_context == "sample":
            return super().forward(x, pre)
        channel = self.hci_net().to(x.dtype).flatten()
        hci, mix, x_mean, hci_mean = slow_fast_context(x, channel, self.mixer.weight, self.mixer.bias)
        maps, contexts = {"x": x, "hci": hci, "mix": mix}, {"x": x_mean, "hci": hci_mean, "mix": mix}
        kernels = [net(contexts[name]).to(x.dtype) for net, (name, _) in zip(self.local_nets, self.roles, strict=True)]
        columns = dict(zip(self.order, self.bottleneck.weight.split(self.dim, 1), strict=True))
        names = ["fast", "hi", "g1", "g2", "g3", "silu", *(f"pre{i}" for i in range(len(pre)))]
        names += [f"l{j}" for j in range(len(kernels))]
        return slow_fast_block(
            x,
            hci,
            mix,
            pre,
            self.global_kernel(x),
            _unit_weights(self.rgu_slow),
            _unit_weights(self.rgu_fast),
            [net().to(x.dtype).flatten() for net in (self.hi_channel_net, self.hi_spatial_net)],
            [maps[name] for _, name in self.roles],
            kernels,
            [t for layer in self.local_mix for t in (layer.weight, layer.bias)],  # type: ignore[misc]
            list(self.local_bias),
            [t for norm in self.local_norm for t in _known_moments(norm)],  # type: ignore[arg-type]
            [columns[name] for name in names],
            self.bottleneck.bias,
            self.out_bias,
            _known_moments(self.out_norm),
        )


def _unit_weights(unit: RecursiveGatedUnit) -> list[Tensor]:
    weights = [t for layer in (unit.k, unit.v, unit.q, unit.y) for t in (layer.weight, layer.bias)]
    return [*weights, unit.pos_bias]


def _known_moments(norm: StandardGELU) -> list[Tensor]:
    return [] if norm.running_mean is None or norm.running_var is None else [norm.running_mean, norm.running_var]


@torch.no_grad()
def fuse(block: nn.Module) -> None:
    """Convert a block to its fused form in place, keeping parameters, names and flags; a second call does nothing."""
    block.__class__ = FusedBlock
    for net in [m for m in block.modules() if type(m) in (SlowNet, LocalSlowNet)]:
        net.__class__ = FixedSlowNet if type(net) is SlowNet else FixedLocalSlowNet
        net.cache = KernelCache()  # type: ignore[assignment]
        if not net.training:
            net.prepare()  # type: ignore[operator]
