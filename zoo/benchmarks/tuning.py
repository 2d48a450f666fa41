"""Choice of a learning rate on a grid that is extended until it brackets the best."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["bracketed"]


def bracketed(score: Callable[[float], float], rates: Sequence[float], most: int = 4) -> float:
    """The best of a grid of rates; while the best is at an end of the grid, the grid is extended there.

    Args:
        score: Score of a rate, higher is better; called once per rate.
        rates: Geometric grid in increasing order, at least two.
        most: Largest number of rates to add.

    Returns:
        The best rate, the smallest one in a tie.
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
