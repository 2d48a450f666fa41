"""Choice of a learning rate on a grid that goes on until it brackets the best."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["bracketed"]


def bracketed(score: Callable[[float], float], rates: Sequence[float], most: int = 4) -> float:
    """The best of some rates; while the best is the first or the last, the grid grows on that side.

    Args:
        score: Higher is better; asked once for each rate.
        rates: Geometric grid in rising order, at least two.
        most: Rates that may be added. The best may be an end of the grid only when they are used up.

    Returns:
        The best rate; the smaller one of equals.
    """
    found = {rate: score(rate) for rate in sorted(rates)}
    for _ in range(most):
        grid = sorted(found)
        best = max(grid, key=found.__getitem__)
        if best not in (grid[0], grid[-1]):
            break
        new = grid[-1] ** 2 / grid[-2] if best == grid[-1] else grid[0] ** 2 / grid[1]
        new = float(f"{new:.2g}")
        found[new] = score(new)
    return max(sorted(found), key=found.__getitem__)
