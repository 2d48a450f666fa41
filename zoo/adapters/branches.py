"""Branches: the computation of an adapter, after or parallel to a layer."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.adapters.config import AdapterConfig
from zoo.kernels.random_features import ReLUFeatures
from zoo.models.snnk import SNNKLinear
from zoo.ops.numerics import autocast_disabled

__all__ = ["Adapter", "HoulsbyAdapter", "SNNKAdapter"]


class Adapter(nn.Module):
    """A branch from width d to width e (e = d for sequential adapters); :meth:`branch` is what it adds."""

    def branch(self, x: Tensor) -> Tensor:
        """Added to the module's output, (..., d) -> (..., e); in float32 for half precision."""
        with autocast_disabled(x.device):
            return self._branch(self._promote(x))

    def _branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _promote(self, x: Tensor) -> Tensor:
        """Convert to the promoted dtype of input and parameters, except float16, where 0 * overflow would be NaN."""
        own = next((p.dtype for p in self.parameters()), x.dtype)
        wide = torch.promote_types(x.dtype, own)
        return x.to(torch.float32 if wide == torch.float16 else wide)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d): x + branch(x), in the dtype of x."""
        return x + self.branch(x).to(x.dtype)


def _linear(x: Tensor, layer: nn.Linear | SNNKLinear) -> Tensor:
    """Apply a linear layer in the dtype of x."""
    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


def _normed(x: Tensor, norm: nn.Module) -> Tensor:
    """LayerNorm in the dtype of x; x itself if there is none."""
    if not isinstance(norm, nn.LayerNorm):
        return x
    return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


class SNNKAdapter(Adapter):
    """The SNNK adapter: v * Psi Phi(x), or U Psi Phi(x) + c.

    Args:
        dim: Width d.
        config: `form`, `num_features`, `bottleneck`, and settings of Phi and Psi.
        seed: Seed of the projection.
        out_dim: Output width e; None for d.
        device: Device of the parameters and buffers.
        dtype: Their dtype.
    """

    def __init__(
        self, dim: int, config: AdapterConfig, seed: int = 0, out_dim: int | None = None, device=None, dtype=None
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        out_dim = dim if out_dim is None else out_dim
        features = ReLUFeatures(
            dim,
            config.num_features,
            constant=config.constant,
            centered=config.centered,
            normalize=config.normalize,
            projection=config.projection,
            persistent=config.save_projection,
            bias=False,
            seed=seed,
            **dd,
        )
        vector = config.form == "vector"
        self.norm = nn.LayerNorm(dim, **dd) if config.layer_norm else nn.Identity()
        self.layer = SNNKLinear(features, out_dim if vector else config.bottleneck, **dd)
        if config.init_weights == "bert" and not self.layer.weight.is_meta:
            with torch.no_grad():
                start = torch.empty(self.layer.out_features, dim, **dd).normal_(std=0.02)
                self.layer.weight.copy_(features.encode(start))
        self.scale = nn.Parameter(torch.zeros(out_dim, **dd)) if vector else None
        self.up: nn.Linear | None = None
        if not vector:
            self.up = nn.Linear(config.bottleneck, out_dim, **dd)
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def _branch(self, x: Tensor) -> Tensor:
        h = _linear(self.layer.features(_normed(x, self.norm)), self.layer)
        if self.up is not None:
            return _linear(h, self.up)
        return h if self.scale is None else h * self.scale

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Merge the two matrices into one (d, m), for `zoo.to_deploy`."""
        if self.up is not None:
            self.layer, self.up = self.layer.fold(self.up), None
        elif self.scale is not None:
            self.layer.weight.mul_(self.scale.unsqueeze(-1))
            self.scale = None


class HoulsbyAdapter(Adapter):
    """The bottleneck adapter of Houlsby et al. (arXiv 1902.00751): U relu(D x + b) + c.

    Args:
        dim: Width.
        config: `bottleneck`, `layer_norm` and `init_weights`.
        seed: Unused; only the initialisation is random.
        out_dim: Output width; None for `dim`.
        device: Device of the parameters.
        dtype: Their dtype.
    """

    def __init__(
        self, dim: int, config: AdapterConfig, seed: int = 0, out_dim: int | None = None, device=None, dtype=None
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(dim, **dd) if config.layer_norm else nn.Identity()
        self.down = nn.Linear(dim, config.bottleneck, **dd)
        self.up = nn.Linear(config.bottleneck, dim if out_dim is None else out_dim, **dd)
        if config.init_weights == "bert":
            nn.init.normal_(self.down.weight, std=0.02)
        else:
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for p in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(p)

    def _branch(self, x: Tensor) -> Tensor:
        return _linear(F.relu(_linear(_normed(x, self.norm), self.down)), self.up)
