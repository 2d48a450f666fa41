"""Analysis of the neural tangent kernel of a network: spectrum, alignment with targets, drift, shares of layers.

>>> K = empirical_ntk(model, X)
>>> effective_rank(K), alignment(K, Y), kernel_distance(K_before, K)
>>> values, vectors = top_eigenpairs(model, X, 10)                    # without the matrix
>>> describe(model, X, Y, group=lambda name: name.split(".")[0])
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from pydantic import PositiveFloat, PositiveInt

if TYPE_CHECKING:
    from torch import Tensor, nn

from zoo.analysis.plots import plot_spectrum
from zoo.analysis.probes import Finding, ProbeError, Subject, probe

__all__ = ["alignment", "describe", "effective_rank", "kernel_distance", "projected_ntk_by", "top_eigenpairs"]


def _square(K: Tensor) -> Tensor:
    if K.ndim != 2 or K.shape[0] != K.shape[1]:
        raise ValueError(f"a kernel matrix is square; this one has shape {tuple(K.shape)}")
    return K.detach().double()


def _centred(K: Tensor) -> Tensor:
    return K - K.mean(0) - K.mean(1, keepdim=True) + K.mean()


def alignment(K: Tensor, Y: Tensor) -> float:
    """Centred kernel-target alignment <HKH, HYY^T H> / (|HKH| |HYY^T H|), at most 1.

    Source: Cortes, Mohri and Rostamizadeh, "Algorithms for learning kernels based on centered alignment" (JMLR 2012).

    Args:
        K: (n, n).
        Y: Values (n,) or (n, C); one-hot rows for classes.

    Returns:
        0 if either is constant.
    """
    Y = (Y[:, None] if Y.ndim == 1 else Y).to(K.device).double()
    K, Y = _centred(_square(K)), Y - Y.mean(0)
    if len(K) != len(Y):
        raise ValueError(f"K has {len(K)} points, Y {len(Y)} rows")
    scale = float(K.norm() * (Y.mT @ Y).norm())
    return float((Y * (K @ Y)).sum()) / scale if scale else 0.0


def effective_rank(K: Tensor) -> float:
    """Exponential of the entropy of the normalised eigenvalues (Roy and Vetterli, 2007): from 1 to n.

    Args:
        K: (n, n), positive semidefinite.
    """
    import torch

    return _rank(torch.linalg.eigvalsh(_square(K)))


def _rank(values: Tensor) -> float:
    import torch

    values = values.clamp_min(0)
    if not bool(values.sum() > 0):
        raise ValueError("the kernel matrix is zero: its effective rank is undefined")
    return math.exp(float(torch.special.entr(values / values.sum()).sum()))


def kernel_distance(K: Tensor, L: Tensor) -> float:
    """1 - <K, L> / (|K| |L|): 0 for kernels that are multiples of each other.

    Args:
        K: (n, n).
        L: (n, n).
    """
    K, L = _square(K), _square(L)
    if K.shape != L.shape:
        raise ValueError(f"kernels of {len(K)} and of {len(L)} points cannot be compared")
    return 1 - float((K * L).sum() / (K.norm() * L.norm()))


def top_eigenpairs(
    model: nn.Module, X: Tensor, k: int = 10, *, batch_size: int = 256, tolerance: float = 1e-6, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Largest eigenvalues of the full NTK of n samples and C outputs, and eigenvectors, without building the matrix.

    Args:
        model: Inputs (n, ...) to outputs (n, C).
        X: Inputs.
        k: Number of eigenpairs, less than n C.
        batch_size: Samples per pass.
        tolerance: Relative tolerance of the eigenvalues; products in float32 allow about 1e-6.
        seed: Seed of the first vector.

    Returns:
        (k,), descending, and (k, n, C), normalised; float64, on the CPU.

    Raises:
        ValueError: k is out of range.
    """
    import torch
    from scipy.sparse.linalg import LinearOperator, eigsh

    from zoo.kernels.empirical_ntk import ntk_vector_product

    C = _outputs(model, X)
    n = len(X) * C
    if not 1 <= k < n:
        raise ValueError(f"k={k} eigenpairs of a matrix of {n} rows: ask for 1 to {n - 1}")

    def product(v: np.ndarray) -> np.ndarray:
        V = torch.from_numpy(np.ascontiguousarray(v)).view(len(X), C).to(X)
        return ntk_vector_product(model, X, V, batch_size=batch_size).flatten().double().cpu().numpy()

    operator = LinearOperator((n, n), matvec=product, dtype=np.float64)
    start = np.random.default_rng(seed).standard_normal(n)
    values, vectors = eigsh(operator, k, which="LA", v0=start, tol=tolerance)
    order = np.argsort(-values)
    return torch.from_numpy(values[order]), torch.from_numpy(vectors.T[order].copy()).view(k, len(X), C)


def _outputs(model: nn.Module, X: Tensor) -> int:
    """Number of outputs per sample; the mode of the model is restored."""
    import torch

    kept = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            return model.eval()(X[:1]).flatten(1).shape[1]
    finally:
        for module, training in kept.items():
            module.training = training


def projected_ntk_by(
    model: nn.Module, X: Tensor, *, group: Callable[[str], str | None], outputs: int, memory: int, seed: int = 0
) -> dict[str, Tensor]:
    """The NTK in parts, one output at a time, so that memory does not grow with the number of outputs.

    If there are more outputs, random-sign sums of them are used, whose kernels are unbiased.

    Args:
        model: Inputs (n, ...) to outputs (n, C).
        X: Inputs (n, ...).
        group: From a parameter's name to its part's; None excludes it.
        outputs: Maximum number of outputs, or sums.
        memory: Bytes for gradients.
        seed: Seed of the signs.

    Returns:
        (n, n), float64, for each part: the mean over outputs, or an estimate of it.

    Raises:
        ValueError: As for :func:`zoo.kernels.empirical_ntk.empirical_ntk_by`.
    """
    import torch

    from zoo.kernels.empirical_ntk import empirical_ntk_by

    C = _outputs(model, X)
    weights = torch.eye(C, dtype=torch.float64)
    if outputs < C:
        draw = torch.Generator().manual_seed(seed)
        weights = (torch.randint(0, 2, (outputs, C), generator=draw).double() * 2 - 1) / math.sqrt(C)
    found: dict[str, Tensor] = {}
    for row in weights:
        select = functools.partial(_combined, weights=row)
        parts = empirical_ntk_by(model, X, group=group, select=select, memory=memory)
        for name, part in parts.items():
            found[name] = found.get(name, 0) + part.double() / len(weights)
    return found


def _combined(y: Tensor, weights: Tensor) -> Tensor:
    return y.flatten(1) @ weights.to(y)


def describe(
    model: nn.Module,
    X: Tensor,
    Y: Tensor | None = None,
    *,
    group: Callable[[str], str | None] | None = None,
    memory: int = 2**30,
) -> dict[str, float]:
    """Summary statistics of the NTK of a network on some samples.

    Args:
        model: Inputs (n, ...) to outputs (n, C).
        X: At least two inputs.
        Y: Targets: values (n,) or (n, C), or classes (n,) as integers.
        group: From a parameter's name to its part's, for shares of the trace; None excludes it.
        memory: Bytes for gradients.

    Returns:
        `trace` (per sample), `largest` eigenvalue, `condition` (infinite if singular), `effective_rank`, with targets
        `alignment`, and `share/<part>` for each part.
    """
    from torch.nn import functional as F

    from zoo.kernels.empirical_ntk import empirical_ntk_by

    parts = empirical_ntk_by(model, X, group=group or (lambda _: ""), memory=memory)
    K = _sum(parts)
    found = _numbers(K, next(iter(parts.values())))
    if Y is not None:
        classes = not Y.is_floating_point()
        found["alignment"] = alignment(K, F.one_hot(Y.long()) if classes and Y.ndim == 1 else Y)
    if group is not None:
        found |= {f"share/{name}": share for name, share in _shares(parts, K).items()}
    return found


def _sum(parts: dict[str, Tensor]) -> Tensor:
    import torch

    return torch.stack([part.double() for part in parts.values()]).sum(0)


def _shares(parts: dict[str, Tensor], K: Tensor) -> dict[str, float]:
    """Shares of the trace."""
    return {name: float(part.double().trace() / K.trace()) for name, part in parts.items()}


def _numbers(K: Tensor, like: Tensor) -> dict[str, float]:
    """Trace, largest eigenvalue, condition number and rank of K, computed in the dtype of `like`."""
    import torch

    values = torch.linalg.eigvalsh(K)
    least, largest = float(values[0]), float(values[-1])
    singular = least <= len(K) * torch.finfo(like.dtype).eps * largest
    return {
        "trace": float(K.trace()) / len(K),
        "largest": largest,
        "condition": math.inf if singular else largest / least,
        "effective_rank": _rank(values),
    }


def _layer(name: str) -> str:
    """`stages.0` of `stages.0.blocks.1.weight`, `head` of `head.fc.weight`."""
    return re.match(r"[^.]+(\.\d+)?", name).group()  # type: ignore[union-attr]


@probe("ntk", "eigenvalues of the neural tangent kernel, and the layers' shares of it; images or noise")
def probe_ntk(
    subject: Subject, *, count: PositiveInt = 16, outputs: PositiveInt = 4, memory: PositiveFloat = 1.0
) -> Finding:
    """The NTK of `count` images and up to `outputs` sums of outputs; gradients take at most `memory` GiB."""
    import torch

    model = subject.model
    if hasattr(model, "bert"):
        raise ProbeError("the model takes texts; the kernel is that of images and of tables")
    X = subject.images(count)
    if len(X) < 2:
        raise ProbeError(f"a kernel needs two inputs at least; there is {len(X)}: give count=2 or more")
    like = next(model.parameters())
    parts = projected_ntk_by(model, X.to(like), group=_layer, outputs=outputs, memory=int(memory * 2**30))
    K = _sum(parts)
    numbers, shares = _numbers(K, like.detach()), _shares(parts, K)
    values = torch.linalg.eigvalsh(K).flip(0).clamp_min(0).cpu().numpy()
    if math.isinf(numbers["condition"]):
        del numbers["condition"]  # JSON has no infinity
    most = max(shares, key=lambda name: shares[name])
    told = (
        f"neural tangent kernel of {subject.name} on {len(X)} inputs: effective rank "
        f"{numbers['effective_rank']:.1f}, most of it from {most} ({shares[most]:.1%})"
    )
    found = {**numbers, "eigenvalues": values.tolist(), "shares": shares}
    return Finding(told, found, lambda: plot_spectrum(values, of="the tangent kernel"))
