"""Numbers for operators, and what tells two results apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

SPECIAL = (torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 0.0, -0.0, 1e-40)

HERE: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}  # whatever the defaults

Results = Sequence[Tensor]


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(seed), **HERE)


def differs(got: Results | str, want: Results | str, tolerance: float) -> str:
    """What tells them apart, or nothing; results, or how they were refused."""
    if isinstance(got, str) or isinstance(want, str):
        return "" if got == want else f"{got} is not {want}"
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if a.dtype != b.dtype or a.shape != b.shape:
            return f"result {i} has another type or shape"
        if not torch.equal(a.isnan(), b.isnan()):
            return f"result {i} has {int(a.isnan().sum())} NaN, plain {int(b.isnan().sum())} of {b.numel()}"
        if not torch.equal(a.isinf() * a.sign(), b.isinf() * b.sign()):
            return f"result {i} has {int(a.isinf().sum())} infinities, plain {int(b.isinf().sum())} of {b.numel()}"
        finite = b.isfinite()
        scale = 1 + float(b[finite].abs().max()) if bool(finite.any()) else 1.0
        apart = float((a - b)[finite].abs().max()) if bool(finite.any()) else 0.0
        if apart > tolerance * scale:
            return f"result {i} differs by {apart:.3g} of {scale:.3g}"
    return ""


def places(count: int) -> Iterator[int]:
    yield from sorted({0, count // 2, count - 1})
