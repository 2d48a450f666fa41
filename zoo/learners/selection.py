r"""Which points to label: subsets of rows on which least squares is nearly as good as on all rows.

A pool of N rows has features F (N, m), such as polynomials, eigenvectors of a kernel or Nystroem features. With the
rows q_i of an orthonormal basis of their span, h_i = |q_i|^2 is the leverage and w_i = m / h_i the Christoffel weight;
the labels f of a selection S are fitted by minimising the sum over S of w_i (f_i - a . q_i)^2.

>>> chosen = select(F, 30, "repeated", generator=torch.Generator().manual_seed(0))
>>> a = weighted_least_squares(F, chosen, f[chosen.indices])

- `uniform`: uniformly, with replacement.
- `leverage`: rows independently, with probability h_i / m (Cohen and Migliorati 2017).
- `dpp`: m rows by the projection determinantal point process (DPP): no redundant rows.
- `volume`: m rows by the DPP and the others by leverage; the estimate is unbiased (volume-rescaled sampling,
Derezinski,
  Warmuth and Hsu 2018).
- `repeated`: independent samples of the DPP, pooled (Nouy and Michel 2023); needs the fewest labels if n is a few m.

Use them where labels are expensive. For choosing centres among rows that are labelled anyway, they gain nothing.
"""

from __future__ import annotations

import math
from itertools import combinations_with_replacement
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from zoo.kernels.linalg import solver_dtype
from zoo.learners.volume_sampling import leverage_scores

__all__ = [
    "Selection",
    "christoffel_weights",
    "draw_dpp",
    "fixed_size_inclusion",
    "marginal_kernel",
    "orthonormal",
    "projection_dpp",
    "select",
    "size_distribution",
    "volume_rescaled_probabilities",
    "weighted_least_squares",
]

Method = Literal["uniform", "leverage", "dpp", "volume", "repeated"]

_TRIES = 1000  # attempts of a conditioned selection


class Selection(NamedTuple):
    """Rows to label, in no particular order; a row may occur twice, and is then labelled or counted twice."""

    indices: Tensor  # (n,), int64
    weights: Tensor  # (n,), for least squares
    tries: int  # number of attempts


def orthonormal(features: Tensor) -> Tensor:
    """Orthonormal basis (N, m) of the span of features (N, m), in float64.

    Raises:
        ValueError: The features are linearly dependent or not finite, or there are fewer rows than features.
    """
    leverage_scores(features)  # validates the features
    return torch.linalg.qr(features.to(solver_dtype(features.device))).Q


def christoffel_weights(features: Tensor) -> Tensor:
    """Weights m / h_i (N,); infinite for rows with zero features, which are never selected.

    Args:
        features: F (N, m), of full column rank.
    """
    return features.shape[1] / leverage_scores(features)


def select(
    features: Tensor,
    n: int | None = None,
    method: Method = "repeated",
    *,
    delta: float | None = None,
    generator: torch.Generator | None = None,
) -> Selection:
    """Select rows to label.

    Args:
        features: F (N, m), of full column rank.
        n: Number of rows, at least m, and exactly m for `dpp`; m if None.
        method: See the module docstring. If n is not a multiple of m, `repeated` ends with part of a further sample.
        delta: Repeat until the smallest eigenvalue of the sum of w_i q_i q_i^T / n is at least 1 - delta, which bounds
            the error of this very selection and not only the expected one; between 0 and 1.
        generator: Source of randomness.

    Raises:
        ValueError: An option is out of range, the features are linearly dependent, or no attempt satisfied the
            condition.
    """
    if method not in get_args(Method):
        raise ValueError(f"method={method!r} must be one of {', '.join(get_args(Method))}")
    Q = orthonormal(features)
    N, m = Q.shape
    n = m if n is None else n
    if n < m or (method == "dpp" and n != m):
        raise ValueError(f"n={n} must be {'' if method == 'dpp' else 'at least '}{m}, the number of features")
    if delta is not None and not 0 < delta < 1:
        raise ValueError(f"delta={delta} must be between 0 and 1")
    weights = Q.new_full((N,), float(N)) if method == "uniform" else m / Q.square().sum(1)
    if delta is None:
        S = _sample(Q, n, method, generator)
        return Selection(S, weights[S], 1)
    best = -math.inf
    for tries in range(1, _TRIES + 1):
        S = _sample(Q, n, method, generator)
        gram = (weights[S][:, None] * Q[S]).mT @ Q[S] / n
        smallest = float(torch.linalg.eigvalsh(gram)[0])
        if smallest >= 1 - delta:
            return Selection(S, weights[S], tries)
        best = max(best, smallest)
    raise ValueError(
        f"no draw of {_TRIES} had a smallest eigenvalue of {1 - delta:g}, the best had {best:.3g}: "
        "use a larger n or delta"
    )


def _sample(Q: Tensor, n: int, method: Method, generator: torch.Generator | None) -> Tensor:
    N, m = Q.shape
    if method == "uniform":
        return torch.randint(N, (n,), generator=generator, device="cpu").to(Q.device)
    if method == "leverage":
        return _by_leverage(Q, n, generator)
    if method == "volume":
        parts = [projection_dpp(Q, generator), _by_leverage(Q, n - m, generator)]
    else:
        parts = [projection_dpp(Q, generator) for _ in range(n // m)]
        if n % m:
            more = projection_dpp(Q, generator)
            parts.append(more[torch.randperm(m, generator=generator, device="cpu").to(more.device)[: n % m]])
    S = torch.cat(parts)
    return S[torch.randperm(len(S), generator=generator, device="cpu").to(S.device)]


def _by_leverage(Q: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    if not n:
        return torch.empty(0, dtype=torch.int64, device=Q.device)
    chances = Q.square().sum(1).cpu()
    return torch.multinomial(chances, n, replacement=True, generator=generator).to(Q.device)


def projection_dpp(Q: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Sample m rows with probability det(Q_S)^2, sequentially: each by the part orthogonal to the earlier ones.

    Args:
        Q: Orthonormal columns (N, m).
        generator: Source of randomness.

    Returns:
        Indices (m,), in the order of sampling.
    """
    left, chosen = Q.square().sum(1), []
    along = Q.new_zeros(len(Q), 0)
    for _ in range(Q.shape[1]):
        j = int(torch.multinomial(left.cpu(), 1, generator=generator))
        column = Q @ Q[j] - along @ along[j]
        column = column / column[j].clamp_min(1e-300).sqrt()
        along = torch.cat([along, column[:, None]], 1)
        left = (left - column.square()).clamp_min(0)
        chosen.append(j)
        left[chosen] = 0
    return torch.tensor(chosen, device=Q.device)


def weighted_least_squares(features: Tensor, chosen: Selection, values: Tensor) -> Tensor:
    """Coefficients (m,) or (m, k) of the features, from labels (n,) or (n, k) of the chosen rows."""
    root = chosen.weights.sqrt().unsqueeze(-1)
    F = features.to(root)[chosen.indices]
    Y = values.to(root)
    solution = torch.linalg.lstsq(root * F, root * (Y if Y.ndim == 2 else Y[:, None]), driver="gelsd").solution
    return solution if Y.ndim == 2 else solution[:, 0]


def volume_rescaled_probabilities(features: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Every multiset of n rows and its probability under `volume`, by enumeration, for small pools.

    Ordered samples have a density proportional to prod(h_i / m) det(sum of q_i q_i^T / h_i).

    Args:
        features: F (N, m).
        n: At least m.

    Returns:
        Multisets (K, n) in lexicographic order, each sorted, and probabilities (K,).
    """
    Q = orthonormal(features)
    N, m = Q.shape
    if n < m:
        raise ValueError(f"n={n} must be at least {m}, the number of features")
    sets = torch.tensor(list(combinations_with_replacement(range(N), n)), device=Q.device)
    h = Q.square().sum(1)
    U = Q / h.sqrt()[:, None]
    volumes = torch.linalg.svdvals(U[sets]).square().prod(-1)  # more accurate than a determinant of squares
    counts = torch.nn.functional.one_hot(sets, N).sum(1)
    orders = (math.lgamma(n + 1) - torch.lgamma(counts.double() + 1).sum(1)).exp()
    total = math.exp(math.lgamma(n + 1) - math.lgamma(n - m + 1) - m * math.log(m))
    return sets, orders * (h / m)[sets].prod(1) * volumes / total


# ---- L-ensembles -------------------------------------------------------------------------------------------


def marginal_kernel(L: Tensor) -> Tensor:
    """K = L (L + I)^-1 (N, N): its minors are the inclusion probabilities of a DPP with kernel L."""
    values, vectors = _spectrum(L)
    return (vectors * (values / (1 + values))) @ vectors.mT


def size_distribution(L: Tensor) -> Tensor:
    """Probabilities (N + 1,) of the sizes of a sample of the DPP with kernel L."""
    values, _ = _spectrum(L)
    return _symmetric(values, len(values)) / (1 + values).prod()


def fixed_size_inclusion(L: Tensor, n: int) -> Tensor:
    """Inclusion probabilities (N,) of the DPP with kernel L, conditioned on n rows."""
    values, vectors = _spectrum(L)
    _check_size(n, len(values))
    total = _symmetric(values, n)[n]
    others = torch.stack([_symmetric(torch.cat([values[:k], values[k + 1 :]]), n)[n - 1] for k in range(len(values))])
    return vectors.square() @ (values * others / total)


def draw_dpp(L: Tensor, n: int | None = None, generator: torch.Generator | None = None) -> Tensor:
    """Sample a DPP with kernel L: sets S with probability proportional to det(L_S), such as Nystroem landmarks.

    Args:
        L: Positive semidefinite (N, N).
        n: Number of rows; None leaves it random.
        generator: Source of randomness.

    Returns:
        Sorted indices.

    Raises:
        ValueError: L is invalid, or has fewer than n positive eigenvalues.
    """
    values, vectors = _spectrum(L)
    draws = torch.rand(len(values), generator=generator, dtype=values.dtype, device="cpu").to(values.device)
    if n is None:
        kept = draws < values / (1 + values)
    else:
        _check_size(n, int((values > 1e-12 * values.max()).sum()))
        kept = _fixed_number(values, n, draws)
    return projection_dpp(torch.linalg.qr(vectors[:, kept]).Q, generator).sort().values


def _fixed_number(values: Tensor, n: int, draws: Tensor) -> Tensor:
    """Select n eigenvectors, from the last to the first."""
    values = values / values.max()
    sums = [values.new_zeros(n + 1).index_fill(0, torch.zeros(1, dtype=torch.long, device=values.device), 1.0)]
    for value in values:
        before = sums[-1]
        sums.append(before + value * torch.cat([before.new_zeros(1), before[:-1]]))
    kept, left = torch.zeros(len(values), dtype=torch.bool, device=values.device), n
    for k in range(len(values) - 1, -1, -1):
        if left and bool(draws[k] * sums[k + 1][left] < values[k] * sums[k][left - 1]):
            kept[k] = True
            left -= 1
    return kept


def _symmetric(values: Tensor, most: int) -> Tensor:
    """Elementary symmetric polynomials of orders 0 to `most`."""
    sums = values.new_zeros(most + 1)
    sums[0] = 1
    for value in values:
        sums = sums + value * torch.cat([sums.new_zeros(1), sums[:-1]])
    return sums


def _spectrum(L: Tensor) -> tuple[Tensor, Tensor]:
    if L.ndim != 2 or L.shape[0] != L.shape[1] or not bool(L.isfinite().all()):
        raise ValueError(f"L must be finite and (N, N), got {tuple(L.shape)}")
    values, vectors = torch.linalg.eigh(L.to(solver_dtype(L.device)))
    if float(values[0]) < -1e-9 * float(values[-1].abs()):
        raise ValueError(f"L must be positive semidefinite; its smallest eigenvalue is {float(values[0]):.3g}")
    return values.clamp_min(0), vectors


def _check_size(n: int, most: int) -> None:
    if not 1 <= n <= most:
        raise ValueError(f"n={n} must be between 1 and {most}")
