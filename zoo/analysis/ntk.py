"""What the neural tangent kernel of a network says about it: spectrum, alignment with targets, drift, shares of layers.

>>> K = empirical_ntk(model, X)
>>> effective_rank(K), alignment(K, Y), kernel_distance(K_before, K)
>>> values, vectors = top_eigenpairs(model, X, 10)                    # without the matrix
>>> probe(model, X, Y, group=lambda name: name.split(".")[0])
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from zoo.kernels.empirical_ntk import MEMORY, empirical_ntk_by, ntk_vector_product

__all__ = ["alignment", "effective_rank", "kernel_distance", "probe", "top_eigenpairs"]


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
        0 where one of both is constant.
    """
    Y = (Y[:, None] if Y.ndim == 1 else Y).to(K.device, torch.float64)
    K, Y = _centred(_square(K)), Y - Y.mean(0)
    if len(K) != len(Y):
        raise ValueError(f"K has {len(K)} points, Y {len(Y)} rows")
    scale = float(K.norm() * (Y.mT @ Y).norm())
    return float((Y * (K @ Y)).sum()) / scale if scale else 0.0


def effective_rank(K: Tensor) -> float:
    """Exp of the entropy of the normalised eigenvalues (Roy and Vetterli, 2007): from 1 to n.

    Args:
        K: (n, n), positive semidefinite.
    """
    return _rank(torch.linalg.eigvalsh(_square(K)))


def _rank(values: Tensor) -> float:
    values = values.clamp_min(0)
    if not bool(values.sum() > 0):
        raise ValueError("the kernel matrix is zero: it has no rank to speak of")
    p = values / values.sum()
    return math.exp(float(torch.special.entr(p).sum()))


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
    """The largest eigenvalues of the full NTK of n samples and C outputs, and their vectors, without the matrix.

    Args:
        model: Inputs (n, ...) to outputs (n, C).
        X: Inputs.
        k: How many, fewer than n C.
        batch_size: Samples in a pass.
        tolerance: Relative, of the eigenvalues; products in float32 allow about 1e-6.
        seed: Of the first vector.

    Returns:
        (k,), falling, and (k, n, C), of unit norm; float64, on the CPU.

    Raises:
        ValueError: k is out of range.
    """
    with torch.no_grad():
        training = model.training
        C = model.eval()(X[:1]).flatten(1).shape[1]
        model.train(training)
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


def probe(
    model: nn.Module,
    X: Tensor,
    Y: Tensor | None = None,
    *,
    group: Callable[[str], str | None] | None = None,
    memory: int = MEMORY,
) -> dict[str, float]:
    """Numbers about the NTK of a network on some samples.

    Args:
        model: Inputs (n, ...) to outputs (n, C).
        X: Inputs, two at least.
        Y: Targets: values (n,), (n, C), or classes (n,) as whole numbers.
        group: From a parameter's name to its part's, for shares of the trace; None leaves it out.
        memory: Bytes that gradients may take.

    Returns:
        `trace` (per sample), `largest` eigenvalue, `condition` (infinite if singular), `effective_rank`, with targets
        `alignment`, and `share/<part>` for each part.
    """
    parts = empirical_ntk_by(model, X, group=group or (lambda _: ""), memory=memory)
    K = torch.stack([part.double() for part in parts.values()]).sum(0)
    values = torch.linalg.eigvalsh(K)
    least, largest = float(values[0]), float(values[-1])
    singular = least <= len(K) * torch.finfo(next(iter(parts.values())).dtype).eps * largest
    found = {
        "trace": float(K.trace()) / len(K),
        "largest": largest,
        "condition": math.inf if singular else largest / least,
        "effective_rank": _rank(values),
    }
    if Y is not None:
        classes = not Y.is_floating_point()
        found["alignment"] = alignment(K, nn.functional.one_hot(Y.long()) if classes and Y.ndim == 1 else Y)
    if group is not None:
        found |= {f"share/{name}": float(part.double().trace() / K.trace()) for name, part in parts.items()}
    return found
