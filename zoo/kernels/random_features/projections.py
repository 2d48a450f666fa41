"""Random projections: matrices with normal rows or random signs, from a generator with its own seed."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.support.suggest import suggestion

__all__ = ["Projection", "ProjectionKind", "draw_projection", "generator_of", "hadamard", "standard_normal"]

ProjectionKind = Literal["iid", "orthogonal", "hadamard", "signs"]
PROJECTIONS = ("iid", "orthogonal", "hadamard", "signs")


def draw_projection(
    m: int, d: int, kind: ProjectionKind = "orthogonal", *, antithetic: bool = False, generator: torch.Generator
) -> Tensor:
    """A random matrix (m, d) in float64 whose rows are standard normal (or random signs).

    Args:
        m: Rows.
        d: Columns.
        kind: `"iid"` rows; `"orthogonal"`: rows orthogonal within d x d blocks, with the norms of independent normal
            vectors; `"hadamard"`: the dense form of :class:`Projection`'s fast product; `"signs"`: 1 or -1.
        antithetic: The second half of the rows is minus the first half.
        generator: Source of randomness, on the CPU.

    Raises:
        ValueError: m or d is not positive, or the kind is unknown.
    """
    _check_sizes(m, d, kind)
    rows = -(-m // 2) if antithetic else m
    if kind == "iid":
        G = standard_normal((rows, d), generator)
    elif kind == "signs":
        G = _signs((rows, d), generator)
    elif kind == "orthogonal":
        G = torch.empty((rows, d), dtype=torch.float64, device="cpu")  # refused here if it is too large
        for block in G.split(d):
            block.copy_(_orthogonal(d, generator)[: len(block)])
        G *= standard_normal((rows, d), generator).norm(dim=1, keepdim=True)
    else:
        signs, gaussian, order, scale = _fast_blocks(rows, d, generator)
        G = _fast_product(torch.eye(d, dtype=torch.float64, device="cpu"), signs, gaussian, order, scale).mT
    return torch.cat([G, -G])[:m] if antithetic else G


def generator_of(seed: int) -> torch.Generator:
    """A generator for a seed, on a separate stream: data drawn with the same seed are not correlated with it."""
    return torch.Generator("cpu").manual_seed((seed + 0x9E3779B97F4A7C15) % 2**63)


def _check_sizes(m: int, d: int, kind: str) -> None:
    if m < 1 or d < 1:
        raise ValueError(f"num_features={m} and in_features={d} must both be at least 1")
    if kind not in PROJECTIONS:
        raise ValueError(f"projection={kind!r}{suggestion(kind, PROJECTIONS)}")


def standard_normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def _signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator, device="cpu").double() * 2 - 1


def _orthogonal(d: int, generator: torch.Generator) -> Tensor:
    """Uniform over the orthogonal group: QR prefers some signs, which the diagonal of R corrects."""
    Q, R = torch.linalg.qr(standard_normal((d, d), generator))
    return (Q * R.diagonal().sign()).mT


def hadamard(n: int, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
    """Sylvester's matrix (n, n) of ones and minus ones with orthogonal rows; n is a power of two."""
    if n < 1 or n & (n - 1):
        raise ValueError(f"n={n} is not a power of two")
    H = torch.ones(1, 1, dtype=dtype, device=device)
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H


def _hadamard_product(x: Tensor) -> Tensor:
    """H x along the last dimension n, as two products with matrices of about sqrt(n) columns: O(n sqrt(n))."""
    n = x.shape[-1]
    rows = 1 << (n.bit_length() - 1) // 2
    left, right = (hadamard(k, x.dtype, x.device) for k in (rows, n // rows))
    return (left @ x.unflatten(-1, (rows, -1)) @ right).flatten(-2)


def _fast_blocks(rows: int, d: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Signs (k, n), normal entries (k, n), permutations (k, n) and row scales (rows) of k blocks, n the next power of
    two (Le, Sarlos and Smola, 2013).
    """
    n = 1 << max(d - 1, 0).bit_length()
    k = -(-rows // n)
    signs = _signs((k, n), generator)
    gaussian = standard_normal((k, n), generator)
    order = torch.stack([torch.randperm(n, generator=generator, device="cpu") for _ in range(k)])
    norms = standard_normal((rows, n), generator).norm(dim=1)
    own = gaussian.norm(dim=1, keepdim=True).expand(k, n).flatten()[:rows]
    return signs, gaussian, order, norms / (own * math.sqrt(n))


def _fast_product(x: Tensor, signs: Tensor, gaussian: Tensor, order: Tensor, scale: Tensor) -> Tensor:
    """(..., d) -> (..., rows): S H G P H B x, where each row is exactly a standard normal vector."""
    x = F.pad(x, (0, signs.shape[-1] - x.shape[-1])).unsqueeze(-2) * signs
    x = _hadamard_product(x)
    x = x.gather(-1, order.expand(x.shape)) * gaussian
    return _hadamard_product(x).flatten(-2)[..., : len(scale)] * scale


class Projection(nn.Module):
    """The product G x with a fixed random matrix, saved in the state dict or regenerated from its seed.

    Args:
        m: Number of projections.
        d: Width of the input.
        kind: `"orthogonal"`, `"iid"`, or `"hadamard"`, which needs no matrix: O(m sqrt(d)) or less.
        antithetic: Use G and -G: half of the work, and less variance from m = 2 d on.
        seed: Random seed. The same seed gives the same projection on every device.
        persistent: Save the projection. Otherwise four numbers are saved, and loading refuses weights that were trained
            with a different projection.
        device: Device of its tensors.
        dtype: Its dtype.
    """

    check: Tensor
    matrix: Tensor
    signs: Tensor
    gaussian: Tensor
    order: Tensor
    scale: Tensor

    def __init__(
        self,
        m: int,
        d: int,
        kind: ProjectionKind = "orthogonal",
        *,
        antithetic: bool = False,
        seed: int = 0,
        persistent: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        _check_sizes(m, d, kind)
        self.m, self.d, self.kind, self.antithetic = m, d, kind, antithetic
        self.seed, self.persistent = seed, persistent
        generator = generator_of(seed)
        own = -(-m // 2) if antithetic else m
        dtype = dtype or torch.get_default_dtype()
        parts: dict[str, Tensor]
        if kind == "hadamard":
            names = ("signs", "gaussian", "order", "scale")
            parts = dict(zip(names, _fast_blocks(own, d, generator), strict=True))
        else:
            parts = {"matrix": draw_projection(own, d, kind, generator=generator)}
        for name, value in parts.items():
            value = value.to(device, dtype) if value.is_floating_point() else value.to(device)
            self.register_buffer(name, value, persistent=persistent)
        if not persistent:
            numbers = next(v for v in reversed(parts.values()) if v.is_floating_point()).flatten()
            check = torch.stack([numbers[0], numbers[-1], numbers.mean(), numbers.square().mean()])
            self.register_buffer("check", check.to(device, dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., m), computed in the dtype of x."""
        if self.kind == "hadamard":
            signs, gaussian, scale = (t.to(x.dtype) for t in (self.signs, self.gaussian, self.scale))
            half = _fast_product(x, signs, gaussian, self.order, scale)
        else:
            half = F.linear(x, self.matrix.to(x.dtype))
        return torch.cat([half, -half], -1)[..., : self.m] if self.antithetic else half

    def dense(self) -> Tensor:
        """G (m, d)."""
        own = next(b for b in self.buffers() if b.is_floating_point())
        return self(torch.eye(self.d, dtype=own.dtype, device=own.device)).mT

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        theirs = state_dict.get(f"{prefix}check")
        comparable = not self.persistent and theirs is not None and not (theirs.is_meta or self.check.is_meta)
        if comparable and not _nearly_equal(theirs, self.check):  # type: ignore[arg-type]
            args[-1].append(  # error messages of load_state_dict
                f"{prefix[:-1] or 'projection'}: the weights were trained with another random projection than "
                f"seed={self.seed}, {self.kind}, {self.m} x {self.d} gives"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Sizes and kind."""
        return f"{self.m} x {self.d}, {self.kind}{', antithetic' * self.antithetic}, seed={self.seed}"


def _nearly_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal up to rounding in half precision."""
    return a.shape == b.shape and torch.allclose(a.double().cpu(), b.double().cpu(), rtol=0.02, atol=0.02)
