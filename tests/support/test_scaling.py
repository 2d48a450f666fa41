"""Means and scales of columns: what rounding makes of equal values, of small differences and of extreme sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zoo.support.scaling import standardisation

#: Level and half-width of a column, as a stranger's table has them: a temperature, a wavelength in metres, unix
#: milliseconds within ten minutes, a large count, and the ends of what float64 holds.
LEVELS = [(52.5, 1e-5), (589e-9, 1e-13), (1.7e12, 3e5), (1e9, 500.0), (1e-200, 1e-201), (1e300, 1e299), (0.0, 1e-300)]


def moments(column: np.ndarray) -> tuple[float, float]:
    """Mean and deviation in exact arithmetic."""
    from fractions import Fraction

    exact = [Fraction(float(v)) for v in column]
    mean = sum(exact) / len(exact)
    variance = sum((v - mean) ** 2 for v in exact) / len(exact)
    shift = -int(np.floor(np.log2(float(max(abs(v - mean) for v in exact)))))
    return float(mean), float(np.sqrt(float(variance * Fraction(2) ** (2 * shift))) * 2.0**-shift)


@pytest.mark.parametrize(("level", "width"), LEVELS)
def test_small_differences_on_any_level(level: float, width: float) -> None:
    column = level + width * np.random.default_rng(0).uniform(-1, 1, 300)
    mean, scale = standardisation(column[:, None])
    assert mean.dtype == scale.dtype == np.float64
    expected = moments(column)
    np.testing.assert_allclose(mean, expected[0], rtol=4e-16, atol=1e-15 * width)
    np.testing.assert_allclose(scale, expected[1], rtol=1e-12)
    found = (column - mean) / scale
    np.testing.assert_allclose([found.mean(), found.std()], [0, 1], atol=max(1e-12, 4e-16 * level / width))


@pytest.mark.parametrize("value", [0.1, 0.3, -7.3, 3.0, 0.0, 1e9 + 0.1, 589e-9, 1e300, 5e-324])
@pytest.mark.parametrize("n", [1, 3, 10, 1001, 70001])
def test_what_is_constant_has_scale_one(value: float, n: int) -> None:
    rows = np.full((n, 2), value)
    mean, scale = standardisation(rows)
    assert mean.tolist() == [value] * 2, "equal values are their own mean, to the bit"
    assert scale.tolist() == [1.0] * 2
    weight = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    mean, scale = standardisation(torch.from_numpy(rows), weight)
    assert mean.tolist() == [value] * 2
    assert scale.tolist() == [1.0] * 2


def test_what_is_constant_up_to_rounding_has_scale_one() -> None:
    """Sums of tenths in another order: equal on paper, one unit in the last place apart."""
    column = np.array([0.1 + 0.2, 0.3] * 50)
    assert column.std() > 0
    assert standardisation(column[:, None])[1] == 1.0


def test_weights_are_repetitions() -> None:
    draw = np.random.default_rng(1)
    rows, weight = draw.normal(5, 2, (40, 3)), draw.integers(0, 4, 40)
    rows[weight == 0] = 1e12  # a row without weight is no row
    found = standardisation(rows, weight)
    repeated = np.repeat(rows, weight, 0)
    np.testing.assert_allclose(found[0], repeated.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found[1], repeated.std(0), rtol=1e-7)
    many = torch.stack([torch.from_numpy(weight), torch.ones(40, dtype=torch.int64)])
    mean, scale = standardisation(torch.from_numpy(rows), many)
    assert mean.shape == scale.shape == (2, 3)
    np.testing.assert_allclose(mean[0], found[0], rtol=1e-12)
    np.testing.assert_allclose(scale[1], rows.std(0), rtol=1e-12)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.uint8]
)
def test_any_type_is_summed_in_float64(dtype: torch.dtype) -> None:
    values = torch.arange(200).remainder(50)[:, None].to(dtype)
    mean, scale = standardisation(values)
    assert mean.dtype == scale.dtype == torch.float64
    torch.testing.assert_close(mean.item(), 24.5)
    torch.testing.assert_close(scale.item(), float(np.arange(50).std()))


def test_gaps_show_and_nothing_is_no_data() -> None:
    mean, scale = standardisation(np.array([[1.0, np.nan], [2.0, 3.0]]))
    assert np.isfinite(mean[0])
    assert np.isnan(mean[1])
    assert np.isnan(scale[1])
    with pytest.raises(ValueError, match="at least one row"):
        standardisation(np.zeros((0, 2)))
