r"""Recursive feature machine: kernel ridge regression with a metric learned in closed form.

The metric of the next iterate is the average gradient outer product (AGOP) of the last predictor (Radhakrishnan,
Beaglehole, Pandit and Belkin, arXiv 2212.13881; Beaglehole and others, xRFM, arXiv 2508.10053). Iterates, ridges,
bandwidths and exponents can be compared by the exact leave-one-out error, a by-product of each ridge solve.

>>> for kernel, coefficients in iterate(X, Y, ExponentialPower(2.0), ridge=0.1, iterations=3):
...     errors = solve_left_out(kernel(X), Y, 0.1).residuals.square().mean()
>>> machine = MetricMachine().fit(X, Y)                         # chooses everything itself
>>> machine(Z), machine.setting, machine.feature_importance()
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from zoo.kernels.exponential_power import ExponentialPower
from zoo.kernels.linalg import cholesky
from zoo.learners.ridge import left_out, ridge_factor, solve_left_out, solve_ridge
from zoo.support.renamed import renamed
from zoo.support.scaling import block_scale, standardisation, standardised

__all__ = [
    "Iterate",
    "MetricMachine",
    "Setting",
    "best_temperature",
    "iterate",
    "median_distance",
]

Bandwidth = Literal["constant", "adaptive"]


class Iterate(NamedTuple):
    """A kernel and its coefficients from :func:`iterate`."""

    kernel: ExponentialPower
    coefficients: Tensor  # (n, C)


def median_distance(d: Tensor) -> Tensor:
    """Lower median of the off-diagonal distances of a symmetric matrix (n, n)."""
    n = len(d)
    if n < 2:
        return d.new_ones(())
    rows, columns = torch.tril_indices(n, n, -1)
    return d[rows, columns].median()


def iterate(
    X: Tensor,
    Y: Tensor,
    kernel: ExponentialPower,
    ridge: float,
    iterations: int = 3,
    *,
    diagonal: bool = False,
    bandwidth: Bandwidth = "constant",
    scale: float = 1e-30,
    jitter: float = 0.0,
) -> Iterator[Iterate]:
    """The published recursion: solve, average the gradient outer products, divide by the largest entry, repeat.

    Args:
        X: Rows (n, D).
        Y: Targets (n, C); centre them first if there is to be an intercept.
        kernel: The initial kernel, which is not modified.
        ridge: Added to the diagonal of the kernel matrix.
        iterations: Updates of the metric; one more solve than this is yielded.
        diagonal: Keep only the metric's diagonal.
        bandwidth: `constant`: the lengthscale is fixed. `adaptive`: before every solve it is multiplied by the median
            distance under the current metric.
        scale: Added to the largest entry before dividing the metric by it.
        jitter: Added to the diagonal of a full metric.

    Yields:
        Kernel and coefficients (K + ridge I)^-1 Y of every solve.
    """
    kernel, first = copy.deepcopy(kernel), float(kernel.lengthscale.detach())
    for k in range(iterations + 1):
        kernel = copy.deepcopy(kernel)
        d = kernel.distances(X)
        if bandwidth == "adaptive":
            kernel.lengthscale = first * float(median_distance(d))
        K = kernel.of_distances(d)
        A = solve_ridge(K, Y, ridge).to(Y)
        yield Iterate(kernel, A)
        if k < iterations:
            g = kernel.gradients_of(d, K, X, A).flatten(0, 1)
            M = g.square().sum(0) if diagonal else g.mT @ g
            M = M / (scale + M.max())
            kernel.set_metric(M if diagonal else M + jitter * torch.eye(len(M), dtype=M.dtype, device=M.device))


# ---- model selection by the exact leave-one-out error ------------------------------------------------------

Form = Literal["isotropic", "full", "diag"]

#: Candidates: exponents q, bandwidths L in median distances, and ridges.
EXPONENTS = (0.7, 1.0, 1.5, 2.0)
BANDWIDTHS = (0.5, 1.0, 2.0, 4.0, 8.0)
RIDGES = tuple(10 ** (k / 2) for k in range(-6, 4))  # 1e-3 ... 30
#: A full metric has D x D entries: above this number of features it is diagonal.
WIDEST = 256
_PRODUCTS = 2**24  # gradient elements of one block of outputs
_ROWS = 8192  # rows of one block of the approximation
_CACHED = 2**18  # elements of a kernel matrix processed at a time


class Setting(NamedTuple):
    """Settings selected by :class:`MetricMachine`."""

    form: Form
    shrinkage: float  # weight of the identity in the metric
    iterations: int  # updates of the metric
    exponent: float
    bandwidth: float  # L in median distances under the metric
    ridge: float  # for a mean row weight of 1
    error: float  # weighted mean of the squared leave-one-out residuals, summed over outputs


class _Rows(NamedTuple):
    """Rows of a fit, standardised, and in order."""

    X: Tensor  # (n, D)
    Y: Tensor  # (n, C), without the intercept
    weight: Tensor  # (n,)
    copies: Tensor | None  # (n,); None: each row is one

    def of(self, chosen: Tensor) -> _Rows:
        """Some of them, by their indices."""
        return _Rows(*(None if part is None else part[chosen] for part in self))  # type: ignore[arg-type]


class _Path(NamedTuple):
    """The sequence of solves that led to a metric."""

    form: Form
    shrinkage: float
    places: list[list[int]]  # grid indices of the settings of each solve


class _Space:
    """Rows under one metric, and leave-one-out errors of settings on them."""

    def __init__(self, rows: _Rows, metric: Tensor | None) -> None:
        self.rows, (X, self.Y, self.weight, self.copies) = rows, rows
        self.X = X
        self.kernel = ExponentialPower(1.0, metric=metric, dtype=torch.float64, device=X.device)
        self.d = self.kernel.distances(X)
        self.unit = float(median_distance(self.d)) or 1.0
        self._gram: tuple[tuple[float, float], Tensor] | None = None
        self._errors: dict[tuple[float, float, float], float] = {}

    def of(self, exponent: float, bandwidth: float) -> ExponentialPower:
        """The kernel of a setting; shared, so valid until the next call."""
        self.kernel.exponent, self.kernel.lengthscale = exponent, bandwidth * self.unit
        return self.kernel

    def gram(self, exponent: float, bandwidth: float) -> Tensor:
        """Its matrix (n, n); the last one is cached."""
        if self._gram is None or self._gram[0] != (exponent, bandwidth):
            self._gram = (exponent, bandwidth), self.of(exponent, bandwidth).of_distances(self.d)
        return self._gram[1]

    def solve(self, exponent: float, bandwidth: float, ridge: float) -> Tensor:
        """Coefficients (n, C)."""
        return ridge_factor(self.gram(exponent, bandwidth), ridge / self.weight).solve(self.Y)

    def residuals(self, exponent: float, bandwidth: float, ridge: float) -> tuple[Tensor, Tensor]:
        """Coefficients and leave-one-out residuals, both (n, C)."""
        return solve_left_out(self.gram(exponent, bandwidth), self.Y, ridge / self.weight, copies=self.copies)

    def error(self, exponent: float, bandwidth: float, ridge: float) -> float:
        """Weighted mean of the squared leave-one-out residuals, summed over outputs."""
        at = exponent, bandwidth, ridge
        if at not in self._errors:
            self._errors[at] = float(self.weight @ self.residuals(*at)[1].square().sum(1) / self.weight.sum())
        return self._errors[at]

    def descend(self, start: Sequence[int], grids: Sequence[Sequence[float]], axes: Sequence[int]) -> list[int]:
        """Coordinate descent: grid indices of a setting that no step along a single axis improves."""
        at = list(start)

        def error(places: Sequence[int]) -> float:
            q, L, ridge = (grid[i] for grid, i in zip(grids, places, strict=True))
            return self.error(q, L, ridge)

        while True:
            before = list(at)
            for axis in axes:
                for step in (1, -1):
                    moved = False
                    while 0 <= at[axis] + step < len(grids[axis]):
                        tried = list(at)
                        tried[axis] += step
                        if not error(tried) < error(at):
                            break
                        at, moved = tried, True
                    if moved:
                        break
            if at == before:
                return at


class MetricMachine(nn.Module):
    """Kernel ridge regression whose kernel, ridge and metric are chosen by the exact leave-one-out error.

    The metric after k updates is that of :func:`iterate`, scaled to mean diagonal 1 and shrunk towards the identity.
    The metric depends on every row's own target, which the leave-one-out error does not account for; so the error under
    a metric of p free parameters, shrunk by s and learned from n rows, is multiplied by 1 + `correction` (1 - s) p / n.
    There is no held-out set and no randomness, and the order of the rows does not matter.

    Settings without a metric are compared on `start_rows` rows, metrics and the settings near those on `search_rows`,
    and the selected ones are solved again on up to `solve_rows`. Subsets are evenly spaced in the order of the targets.
    More rows than `solve_rows` are fitted by the Nystroem approximation with `centers` of them, with the ridge chosen
    by leave-one-out on all rows.

    Args:
        forms: Candidates: `"isotropic"` (no metric), `"full"` and `"diag"` metrics. Above 256 features, full metrics
            are diagonal.
        exponents: Exponents q of the kernel.
        bandwidths: Lengthscales in median distances.
        ridges: Candidates, for a mean row weight of 1.
        iterations: Updates of the metric, at least 1.
        full_shrinkage: Candidate weights of the identity in a full metric, from 0 to 1.
        diag_shrinkage: The same for a diagonal metric.
        correction: Strength of the correction above.
        standardize: Standardise the features.
        intercept: Subtract the weighted mean of the targets first.
        start_rows: Rows for comparing settings without a metric.
        search_rows: Rows for comparing metrics.
        solve_rows: Rows for the final exact solve.
        centers: Centres of the Nystroem approximation.

    Attributes:
        setting: The selected settings.
        kernel: The kernel, for standardised rows.
        centers: Rows (m, D), standardised.
        coefficients: (m, C).
        intercept: (C,), the weighted mean of the targets.
        left_out: Leave-one-out predictions (n, C) of the last fit; zero for rows of weight 0.

    Raises:
        ValueError: An option is out of range.
    """

    input_mean: Tensor
    input_scale: Tensor
    centers: Tensor
    coefficients: Tensor
    intercept: Tensor

    def __init__(
        self,
        forms: Sequence[Form] = ("isotropic", "full", "diag"),
        *,
        exponents: Sequence[float] = EXPONENTS,
        bandwidths: Sequence[float] = BANDWIDTHS,
        ridges: Sequence[float] = RIDGES,
        iterations: int = 2,
        full_shrinkage: Sequence[float] = (0.5,),
        diag_shrinkage: Sequence[float] = (0.5, 0.1),
        correction: float = 0.6,
        standardize: bool = True,
        intercept: bool = True,
        start_rows: int = 400,
        search_rows: int = 1000,
        solve_rows: int = 2000,
        centers: int = 1000,
    ) -> None:
        super().__init__()
        unknown = [form for form in forms if form not in ("isotropic", "full", "diag")]
        if unknown or not forms:
            raise ValueError(f"forms={tuple(forms)!r} must be some of 'isotropic', 'full', 'diag'")
        for name, values in (("exponents", exponents), ("bandwidths", bandwidths), ("ridges", ridges)):
            if not values or not all(0 < value < float("inf") for value in values):
                raise ValueError(f"{name}={tuple(values)!r} must be positive numbers")
        if max(exponents) > 2:
            raise ValueError(f"exponents={tuple(exponents)!r} must be at most 2")
        self.shrinkage: dict[str, Sequence[float]] = {"full": tuple(full_shrinkage), "diag": tuple(diag_shrinkage)}
        if not all(values and 0 <= min(values) <= max(values) <= 1 for values in self.shrinkage.values()):
            raise ValueError(f"shrinkages are numbers from 0 to 1, not {self.shrinkage}")
        self.forms = tuple(forms)
        self.grids = tuple(tuple(sorted(map(float, grid))) for grid in (exponents, bandwidths, ridges))
        if iterations < 1 or correction < 0:
            raise ValueError(f"iterations={iterations} and correction={correction} must be at least 1 and 0")
        if not 2 <= start_rows <= search_rows <= solve_rows or centers < 2:
            raise ValueError(
                f"start_rows={start_rows}, search_rows={search_rows} and solve_rows={solve_rows} must be in this order "
                f"and, as centers={centers}, at least 2"
            )
        self.iterations, self.standardize, self.centred = iterations, standardize, intercept
        self.correction = float(correction)
        self.start_rows, self.search_rows, self.solve_rows = start_rows, search_rows, solve_rows
        self.most_centers = centers
        self.setting: Setting | None = None
        self.left_out: Tensor | None = None

    # ---- fitting --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fit(
        self,
        X: Tensor,
        Y: Tensor,
        sample_weight: Tensor | None = None,
        copies: Tensor | None = None,
        blocks: Tensor | None = None,
    ) -> MetricMachine:
        """Select the settings and solve.

        Args:
            X: Rows (n, D), finite.
            Y: Targets (n, C), or (n,) for one.
            sample_weight: (n,), non-negative, up to scale; rows of weight 0 are ignored. None weighs all rows equally.
            copies: Number of equal rows that each row stands for (n,), which have its weight together; leave-one-out
                leaves out one of them. None: each is one row.
            blocks: Columns that share a scale or have none (D,), see :func:`zoo.support.scaling.block_scale`.

        Returns:
            The fitted machine.

        Raises:
            ValueError: Shapes do not fit, a number is not finite, or all weights are zero.
        """
        X, Y, weight, copies = _checked(X, Y, sample_weight, copies)
        rows, order = len(X), _canonical(X, Y, weight)
        X, Y, weight = X[order], Y[order], weight[order] / weight[order].mean()
        copies = None if copies is None or bool((copies[order] == 1).all()) else copies[order]
        mean, scale = standardisation(X, weight)
        scale = block_scale(scale, blocks)
        if not self.standardize:
            mean, scale = torch.zeros_like(mean), torch.ones_like(scale)
        Z = standardised(X, mean, scale, torch.float64)
        offset = weight @ Y / weight.sum() * self.centred
        data = _Rows(Z, Y - offset, weight, copies)
        path, space = self._search(data.of(_part(len(Z), self.search_rows)))
        if len(Z) > self.search_rows:
            space = self._replay(path, data.of(_part(len(Z), self.solve_rows)))
        at = path.places[-1]
        if len(Z) <= self.solve_rows:
            if len(Z) > self.search_rows:
                at = space.descend(at, self.grids, (2,))
            q, L, ridge = self._values(at)
            coefficients, residuals = space.residuals(q, L, ridge)
            kernel, centers = copy.deepcopy(space.of(q, L)), Z
        else:
            q, L, _ = self._values(at)
            kernel = copy.deepcopy(space.of(q, L))
            centers = Z[_part(len(Z), self.most_centers)]
            coefficients, residuals, ridge = _nystroem(kernel, centers, data, self.grids[2])
        error = float(weight @ residuals.square().sum(1) / weight.sum())
        self.setting = Setting(path.form, path.shrinkage, len(path.places) - 1, q, L, ridge, error)
        self.kernel = kernel
        for name, value in (("input_mean", mean), ("input_scale", scale), ("centers", centers)):
            self.register_buffer(name, value.clone())
        self.register_buffer("coefficients", coefficients)
        self.register_buffer("intercept", offset)
        self.left_out = Y.new_zeros(rows, Y.shape[1])
        self.left_out[order] = Y - residuals
        return self

    def _values(self, at: Sequence[int]) -> tuple[float, float, float]:
        q, L, ridge = (grid[i] for grid, i in zip(self.grids, at, strict=True))
        return q, L, ridge

    def _search(self, rows: _Rows) -> tuple[_Path, _Space]:
        """The best metric, and the rows under it."""
        X = rows.X
        wanted = (1.0, 1.0, 0.1)
        start = [min(range(len(g)), key=lambda i: abs(g[i] - w)) for g, w in zip(self.grids, wanted, strict=True)]
        few = _part(len(X), self.start_rows)
        space = _Space(rows.of(few), None)
        at = space.descend(start, self.grids, (2, 1, 0))
        if len(few) < len(X):
            space = _Space(rows, None)
            at = space.descend(at, self.grids, (2,))
        first = (space.error(*self._values(at)), _Path("isotropic", 1.0, [at]), space)
        found = [first] if "isotropic" in self.forms else []
        forms = [form for form in ("full", "diag") if form in self.forms]
        D, count = X.shape[1], float(len(X) if rows.copies is None else rows.copies.sum())
        if D > WIDEST or D == 1:
            forms = forms and ["diag"]
        for form, shrinkage in [(kind, share) for kind in forms for share in self.shrinkage[kind]]:
            here, places = space, [at]
            free = (1 - shrinkage) * (D * (D + 1) / 2 if form == "full" else D)
            seen = 1 + self.correction * free / count
            for _ in range(self.iterations):  # compare the last only: choosing among many is optimistic
                here = _Space(rows, self._metric(here, at, form, shrinkage))
                places = [*places, at]
            places[-1] = here.descend(at, self.grids, (2, 1))
            found.append((here.error(*self._values(places[-1])) * seen, _Path(form, shrinkage, places), here))
        _, path, space = min(found or [first], key=lambda one: one[0])
        path.places[-1] = space.descend(path.places[-1], self.grids, (0, 2, 1))
        return path, space

    def _replay(self, path: _Path, rows: _Rows) -> _Space:
        """Rows under the metric at the end of a path."""
        space = _Space(rows, None)
        for at in path.places[:-1]:
            space = _Space(rows, self._metric(space, at, path.form, path.shrinkage))
        return space

    def _metric(self, space: _Space, at: Sequence[int], form: Form, shrinkage: float) -> Tensor:
        """The AGOP (D, D), or its diagonal (D,), scaled to mean diagonal 1 and shrunk."""
        q, L, ridge = self._values(at)
        A, kernel, K = space.solve(q, L, ridge), space.of(q, L), space.gram(q, L)
        D, total = space.X.shape[1], None
        for block in A.split(max(1, _PRODUCTS // space.X.numel()), 1):
            g = kernel.gradients_of(space.d, K, space.X, block) * space.weight.sqrt()[:, None]  # (C, n, D)
            g = g.flatten(0, 1)
            part = g.mT @ g if form == "full" else g.square().sum(0)
            total = part if total is None else total + part
        assert total is not None
        trace = total.diagonal().sum() if form == "full" else total.sum()
        eye = torch.eye(D, dtype=total.dtype, device=total.device) if form == "full" else torch.ones_like(total)
        if not bool(trace > 0):
            return eye
        return (1 - shrinkage) * D / trace * total + shrinkage * eye

    # ---- prediction -----------------------------------------------------------------------------------------

    def _rows(self, X: Tensor) -> Tensor:
        if self.setting is None:
            raise ValueError("the machine is not fitted: call fit(X, Y) first")
        return standardised(X, self.input_mean, self.input_scale, torch.float64)

    def forward(self, X: Tensor) -> Tensor:
        """Predictions (n, C) for rows (n, D), in float64."""
        step = max(1, _CACHED // len(self.centers)) if self.setting else max(1, len(X))
        return torch.cat([self.whole(x) for x in X.split(step)])

    def whole(self, X: Tensor) -> Tensor:
        """As :meth:`forward`, but all rows at once: a recorded program would keep the number of parts."""
        Z = self._rows(X)
        return self.kernel(Z, self.centers) @ self.coefficients + self.intercept

    def rescale(self, scale: Tensor | float, shift: Tensor | float) -> None:
        """Replace predictions f by scale * f + shift, both numbers or (C,), for a change of units or logits."""
        self.coefficients, self.intercept = self.coefficients * scale, self.intercept * scale + shift

    def precision(self) -> Tensor:
        """P (D, D) of k(x, z) = exp(-((x - z)^T P (x - z))^(q / 2)), for standardised rows."""
        L = self.factor()
        return L @ L.mT if L.shape[0] > 1 else L.square().expand(1, self.centers.shape[1]).squeeze(0).diag()

    def factor(self) -> Tensor:
        """L with P = L L^T: (D, D); (1, D) if P is diagonal, (1, 1) if isotropic."""
        unit = self.kernel.lengthscale.to(self.centers)
        root = self.kernel.root
        return (self.centers.new_ones(1, 1) if root is None else torch.atleast_2d(root)) / unit

    @torch.no_grad()
    def gradient_root(self, X: Tensor | None = None) -> Tensor:
        """A matrix (r, D) such that root^T root is the AGOP over the rows.

        Args:
            X: Rows (n, D); None for the centres. Very many rows are thinned evenly.

        Returns:
            In units of standardised features; r is at most the rank of the AGOP.
        """
        Z = self.centers if X is None else self._rows(X)
        C, D = self.coefficients.shape[1], Z.shape[1]
        Z = Z[_part(len(Z), max(1, 2 * _PRODUCTS // (C * D)))]
        if X is None and len(Z) == len(self.centers):
            g = self.kernel.gradients(Z, self.coefficients)
        else:
            g = self.kernel.gradients(self.centers, self.coefficients, Z)
        g = g.flatten(0, 1) / len(Z) ** 0.5
        _, sizes, rows = torch.linalg.svd(torch.linalg.qr(g, "r").R if len(g) > D else g, full_matrices=False)
        kept = sizes > 1e-10 * sizes.max()
        return sizes[kept, None] * rows[kept]

    def extra_repr(self) -> str:
        """Selected settings."""
        return (
            "not fitted" if self.setting is None else ", ".join(f"{k}={v}" for k, v in self.setting._asdict().items())
        )


def _checked(
    X: Tensor, Y: Tensor, weight: Tensor | None, copies: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    Y = Y[:, None] if Y.ndim == 1 else Y
    weight = X.new_ones(len(X)) if weight is None else weight
    if X.ndim != 2 or Y.ndim != 2 or len(Y) != len(X) or weight.shape != (len(X),):
        raise ValueError(
            f"rows (n, D), targets (n, C) and weights (n,) are needed, got {tuple(X.shape)}, {tuple(Y.shape)} and "
            f"{tuple(weight.shape)}"
        )
    X, Y, weight = X.detach().double(), Y.detach().double(), weight.detach().double()
    for name, values in (("rows", X), ("targets", Y), ("weights", weight)):
        if not bool(values.isfinite().all()):
            raise ValueError(f"the {name} have numbers that are not finite")
    if bool((weight < 0).any()) or not bool((weight > 0).any()):
        raise ValueError("weights must not be negative, and one must be above 0")
    if copies is not None:
        copies = copies.detach().to(weight)
        if copies.shape != weight.shape or not bool((copies[weight > 0] >= 1).all() & copies.isfinite().all()):
            raise ValueError(f"copies must be numbers from 1 on of shape ({len(X)},), got {tuple(copies.shape)}")
    return X, Y, weight, copies


def _canonical(X: Tensor, Y: Tensor, weight: Tensor) -> Tensor:
    """Indices of the rows of positive weight in a canonical order: by target, then by features."""
    order = torch.nonzero(weight > 0).flatten()
    for key in (weight, *X.unbind(1)[::-1], *Y.unbind(1)[::-1]):
        order = order[key[order].argsort(stable=True)]
    return order


def _part(n: int, count: int) -> Tensor:
    """Indices of at most `count` of n rows, evenly spaced."""
    return torch.arange(n) if n <= count else torch.arange(count) * n // count


def _nystroem(
    kernel: ExponentialPower,
    centers: Tensor,
    rows: _Rows,
    ridges: Sequence[float],
) -> tuple[Tensor, Tensor, float]:
    """Ridge regression in the span of the kernel functions at the centres.

    Returns:
        Coefficients (m, C), leave-one-out residuals (n, C), and the ridge of least squared residuals.
    """
    X, Y, weight, copies = rows
    lower = cholesky(kernel(centers)).lower
    blocks = list(zip(X.split(_ROWS), Y.split(_ROWS), weight.split(_ROWS), strict=True))
    counts = [None] * len(blocks) if copies is None else copies.split(_ROWS)
    products: Tensor | None = None  # weighted sum over features phi = L^-1 k(centres, x)
    targets: Tensor | None = None
    for x, y, w in blocks:
        phi = torch.linalg.solve_triangular(lower, kernel(centers, x), upper=False)
        weighted = phi * w
        products = weighted @ phi.mT if products is None else products.addmm_(weighted, phi.mT)
        targets = weighted @ y if targets is None else targets.addmm_(weighted, y)
    assert products is not None
    assert targets is not None
    values, vectors = torch.linalg.eigh(products)
    turned = vectors.mT @ targets  # (m, C)
    basis = torch.linalg.solve_triangular(lower.mT, vectors, upper=True)  # k(x, centres) @ basis: rotated features
    inverse = 1 / (values.clamp_min(0)[:, None] + torch.tensor(ridges, dtype=X.dtype, device=X.device))  # (m, R)
    solutions = inverse[:, :, None] * turned[:, None]  # (m, R, C)
    residuals = []
    for (x, y, w), m in zip(blocks, counts, strict=True):
        phi = kernel(x, centers) @ basis
        leverage = w[:, None] * (phi.square() @ inverse)  # (n, R)
        fitted = (phi @ solutions.flatten(1)).view(len(x), *solutions.shape[1:])
        residuals.append(left_out(y[:, None] - fitted, leverage, None if m is None else m[:, None]))
    found = torch.cat(residuals)  # (n, R, C)
    best = int(torch.einsum("n,nrc->r", weight, found.square()).argmin())
    return basis @ solutions[:, best], found[:, best].clone(), float(ridges[best])


def best_temperature(scores: Tensor, labels: Tensor, weight: Tensor | None = None) -> float:
    """Temperature t that minimises the log loss of softmax(t scores), with label noise of one in n + 1 rows.

    The noise prevents probabilities of 0 and 1 where the scores are right on every row.

    Args:
        scores: (n, C), for example leave-one-out predictions.
        labels: Class of each row (n,).
        weight: Row weights (n,).

    Returns:
        t, from 0.1 to 1000.
    """
    weight = torch.ones(len(scores)) if weight is None else weight
    weight = (weight / weight.sum()).to(scores)
    own = scores.gather(1, labels[:, None].long())
    gaps = scores - own
    wrong = 1 / ((len(scores) + 1) * scores.shape[1])
    low, high = -1.0, 3.0  # powers of ten
    for _ in range(40):  # the loss is convex in t: bisect for zero slope
        middle = (low + high) / 2
        slope = weight @ ((torch.softmax(10**middle * gaps, 1) - wrong) * gaps).sum(1)
        low, high = (middle, high) if float(slope) < 0 else (low, middle)
    return 10 ** ((low + high) / 2)


def __getattr__(name: str) -> Any:
    return renamed(f"{__name__}.{name}")
