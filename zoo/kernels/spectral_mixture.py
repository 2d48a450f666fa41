r"""Spectral mixtures: stationary kernels with a mixture of Gaussians as spectral density.

    k(x, z) = sum_q w_q prod_d exp(-2 pi^2 t_d^2 s_qd^2) cos(2 pi t_d m_qd),     t = x - z

Wilson and Adams, "Gaussian Process Kernels for Pattern Discovery and Extrapolation", ICML 2013, equation 12. With a
fixed grid of frequencies m and widths s only the weights are learned, and most become zero: Suwandi, Lin, Yin, Wang
and Theodoridis, "Sparsity-Aware Distributed Learning for Gaussian Processes with Linear Multiple Kernel" (SLIM-KL).
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from zoo.kernels.kernel import Kernel
from zoo.kernels.linalg import double
from zoo.kernels.positive import PositiveParameter, ScalarOrTensor, as_numbers

__all__ = ["GridSpectralMixture", "SpectralMixture", "components", "frequency_grid"]

Grid = Literal["diagonal", "random", "sobol"]

_BLOCK = 2**22  # elements of a block of components


def components(X: Tensor, Z: Tensor | None, means: Tensor, scales: Tensor) -> Tensor:
    """Matrices of the components (Q, ..., n, m), 1 at distance 0.

    Args:
        X: Points (..., n, D).
        Z: Points (..., m, D); X itself if None.
        means: Frequencies (Q, D).
        scales: Their widths (Q, D).
    """
    product: Tensor | None = None
    shape = (-1, *[1] * max(X.ndim, 0 if Z is None else Z.ndim))
    Y = X if Z is None else Z
    for d in range(X.shape[-1]):
        t = X[..., d].unsqueeze(-1) - Y[..., d].unsqueeze(-2)
        m, s = means[:, d].view(shape), scales[:, d].view(shape)
        factor = torch.exp(-2 * math.pi**2 * (t * s).square()) * torch.cos(2 * math.pi * t * m)
        product = factor if product is None else product * factor
    if product is None:
        raise ValueError("the points have no dimensions")
    return product


def mixture(X: Tensor, Z: Tensor | None, weights: Tensor, means: Tensor, scales: Tensor) -> Tensor:
    """Weighted sum of the components (..., n, m), computed in blocks of components."""
    n, m = X.shape[-2], (X if Z is None else Z).shape[-2]
    step = max(1, _BLOCK // max(1, n * m))
    total: Tensor | None = None
    for i in range(0, len(weights), step):
        block = components(X, Z, means[i : i + step], scales[i : i + step])
        part = torch.tensordot(weights[i : i + step], block, dims=1)
        total = part if total is None else total + part
    assert total is not None
    return total


def _matrix(name: str, value: ScalarOrTensor) -> Tensor:
    given = as_numbers(name, value)
    if given.ndim != 2 or not given.numel() or not bool(given.isfinite().all()):
        raise ValueError(f"{name} must be finite numbers (Q, D), got shape {tuple(given.shape)}")
    return given


class _Spectral(Kernel):
    """Shared by both kernels: shapes, and values in the points' dtype."""

    weights: Tensor
    means: Tensor
    scales: Tensor

    def _check(self, X: Tensor) -> None:
        if X.shape[-1] != self.means.shape[-1]:
            raise ValueError(
                f"the points have {X.shape[-1]} dimensions, the frequencies {self.means.shape[-1]}; they must agree"
            )

    def _gram(self, X: Tensor, Z: Tensor | None) -> Tensor:
        self._check(X)
        # float64: frequency times distance is a phase, which float32 would lose for distant points
        own = [double(t) for t in (self.weights, self.means, self.scales)]
        return mixture(double(X), None if Z is None else double(Z), *own).to(X.dtype)

    def _diag(self, X: Tensor) -> Tensor:
        self._check(X)
        return self.weights.to(X.dtype).sum() * X.new_ones(X.shape[:-1])


class SpectralMixture(_Spectral):
    """Spectral mixture with learned weights, frequencies and widths, see the module docstring.

    The sum over components is outside of the product over dimensions, as in the paper; gpytorch multiplies the sums.

    Args:
        weights: Positive (Q,).
        means: Frequencies (Q, D), in cycles per unit; their signs do not matter.
        scales: Positive widths (Q, D).
        learnable: Train all three.
        device: Device of the parameters.
        dtype: Their dtype; torch's default if None.

    Raises:
        ValueError: A shape or a value is invalid.
    """

    weights = PositiveParameter()
    scales = PositiveParameter()

    def __init__(
        self,
        weights: ScalarOrTensor,
        means: ScalarOrTensor,
        scales: ScalarOrTensor,
        *,
        learnable: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dtype = torch.get_default_dtype() if dtype is None else dtype
        frequencies, widths = _matrix("means", means), _matrix("scales", scales)
        found = as_numbers("weights", weights)
        if frequencies.shape != widths.shape or found.shape != frequencies.shape[:1]:
            raise ValueError(
                f"weights {tuple(found.shape)}, means {tuple(frequencies.shape)} and scales {tuple(widths.shape)} "
                "must be (Q,), (Q, D) and (Q, D)"
            )
        PositiveParameter.register(self, "weights", found, learnable=learnable, device=device, dtype=dtype)
        PositiveParameter.register(self, "scales", widths, learnable=learnable, device=device, dtype=dtype)
        frequencies = frequencies.to(device=device, dtype=dtype)
        if learnable:
            self.means = nn.Parameter(frequencies)
        else:
            self.register_buffer("means", frequencies)


def frequency_grid(
    count: int, dim: int = 1, kind: Grid = "diagonal", *, low: float = 0.0, high: float = 0.5, seed: int = 0
) -> Tensor:
    """Frequencies (count, dim) in float64, for inputs spaced one unit apart.

    Args:
        count: Number of frequencies.
        dim: Dimensions of the points.
        kind: `diagonal`: equally spaced with both ends, the same in every dimension. `random`, `sobol`: over the whole
            cube, which is needed for more than one dimension.
        low: Least frequency.
        high: Largest frequency, at most half a cycle per unit of the inputs' spacing.
        seed: For `random` and for the scrambling of `sobol`.

    Raises:
        ValueError: An option is out of range.
    """
    if count < 1 or dim < 1 or not 0 <= low < high < math.inf:
        raise ValueError(f"count={count} and dim={dim} must be at least 1, 0 <= low={low} < high={high} finite")
    if kind not in get_args(Grid):
        raise ValueError(f"kind={kind!r} must be one of {', '.join(get_args(Grid))}")
    if kind == "diagonal":
        return torch.linspace(low, high, count, dtype=torch.float64, device="cpu")[:, None].expand(-1, dim).clone()
    if kind == "sobol":
        unit = torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed).draw(count, dtype=torch.float64)
    else:
        unit = torch.rand(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu")
    return low + (high - low) * unit


class GridSpectralMixture(_Spectral):
    """Spectral mixture on a fixed grid, whose non-negative weights are learned by `zoo.learners.spectral`.

    Weights, frequencies and widths are buffers: gradient-based optimizers do not see them, and weights may be exactly
        0.

    Args:
        means: Frequencies (Q, D), see :func:`frequency_grid`.
        scales: Widths (Q, D), or one number for all.
        weights: Non-negative (Q,), or one number for all.
        device: Device of the parameters.
        dtype: Their dtype; torch's default if None.

    Raises:
        ValueError: The shapes do not fit, or a weight or width is negative.
    """

    def __init__(
        self,
        means: ScalarOrTensor,
        scales: ScalarOrTensor = 0.001,
        weights: ScalarOrTensor = 1.0,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dtype = torch.get_default_dtype() if dtype is None else dtype
        frequencies = _matrix("means", means)
        for name, value, shape in (("scales", scales, frequencies.shape), ("weights", weights, frequencies.shape[:1])):
            given = as_numbers(name, value)
            if given.ndim and given.shape != shape:
                raise ValueError(f"{name} has shape {tuple(given.shape)}; it must be {tuple(shape)} or one number")
            if not bool((given.isfinite() & (given >= 0)).all()):
                raise ValueError(f"{name} must be finite and at least 0")
            self.register_buffer(name, given.expand(shape).to(device=device, dtype=dtype, copy=True))
        self.register_buffer("means", frequencies.to(device=device, dtype=dtype))

    def components(self, X: Tensor, Z: Tensor | None = None) -> Tensor:
        """Component matrices without their weights (Q, ..., n, m), in float64."""
        self._check(X)
        return components(double(X), None if Z is None else double(Z), double(self.means), double(self.scales))
