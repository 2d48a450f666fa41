"""Real rows for the tests of learners."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor]:
    """Pixels (1797, 64) in [0, 1], float64, and classes; to be read, not changed."""
    X, y = load_digits(return_X_y=True)
    return torch.tensor(X / 16), torch.tensor(y)
