"""What the golden tests of learners share: the folder, the comparison, and a failure for what nobody checks."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

FOLDER = Path(os.environ.get("ZOO_GOLDEN_DIR") or Path(__file__).parents[1] / "golden")
Record = dict[str, Any]


def files(prefix: str) -> list[Path]:
    return sorted(FOLDER.glob(f"{prefix}*.json"))


def read(path: Path) -> Record:
    record = json.loads(path.read_text())
    assert record["cases"], f"{path.name} has no cases"
    return record


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found: Any, wanted: Any, what: str, tolerance: float) -> None:
    """Largest difference relative to the largest wanted entry."""
    expected = wanted.double() if isinstance(wanted, Tensor) else tensor(wanted)
    found = torch.as_tensor(found, dtype=torch.float64)
    assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, wanted {tuple(expected.shape)}"
    if expected.numel():
        apart = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-300))
        assert apart <= tolerance, f"{what}: {apart:.1e} apart"


def known(fields: Iterable[str], checked: Iterable[str], what: str) -> None:
    """Fail where a file has fields that no check reads."""
    unknown = sorted(set(fields) - set(checked))
    if unknown:
        pytest.fail(f"{what}: unknown fields {unknown}")
