"""Types of a model's description in a file: inputs and outputs, named as in timm's configurations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypedDict

import numpy as np
from annotated_types import Ge, Gt, Le
from pydantic import FiniteFloat

from zoo.support.quoting import is_printable
from zoo.support.signatures import check_values

__all__ = ["Beside", "Described", "Shared", "Sizes", "name_problems", "size_problems"]

_Side = Annotated[int, Gt(0), Le(1_000_000)]
_Share = Annotated[float, Ge(0.05), Le(20)]


class Described(TypedDict, total=False):
    """Allowed entries of a folder's `pretrained_cfg` about inputs and outputs."""

    input_size: tuple[_Side, _Side, _Side]
    test_input_size: tuple[_Side, _Side, _Side]
    min_input_size: tuple[_Side, _Side, _Side]
    fixed_input_size: bool
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random"]
    crop_pct: _Share
    test_crop_pct: _Share
    crop_mode: Literal["center", "squash", "border"]
    mean: tuple[FiniteFloat, ...]
    std: tuple[FiniteFloat, ...]
    num_classes: Annotated[int, Ge(-1), Le(1_000_000)]  # -1: no classes
    label_offset: int
    label_names: list[str]
    label_descriptions: dict[str, str]
    pool_size: tuple[int, ...]
    test_pool_size: tuple[int, ...]
    first_conv: str | list[str]
    classifier: str | list[str]
    architecture: str
    tag: str
    license: str
    description: str
    origin_url: str
    paper_name: str
    paper_ids: str | list[str]
    notes: list[str]


class Beside(TypedDict, total=False):
    """Allowed entries beside `pretrained_cfg`."""

    num_classes: Annotated[int, Ge(-1), Le(1_000_000)]  # -1: no classes
    num_features: Annotated[int, Ge(0)]
    label_names: list[str]
    label_descriptions: dict[str, str]


class Shared(TypedDict, total=False):
    """Arguments that architectures have in common, also those of timm, whose annotations are not exact."""

    num_classes: Annotated[int, Ge(-1), Le(1_000_000)]
    in_chans: Annotated[int, Gt(0), Le(1_000_000)]
    drop_rate: Annotated[float, Ge(0), Le(1)]
    drop_path_rate: Annotated[float, Ge(0), Le(1)]


class Sizes(TypedDict, total=False):
    """Arguments that every model of the zoo checks before it is built."""

    num_classes: Annotated[int, Ge(0), Le(1_000_000)]
    in_chans: _Side
    img_size: _Side | tuple[_Side, ...]


def size_problems(values: Mapping[str, Any]) -> list[str]:
    """Problems of the sizes among the arguments of a model, one sentence each; NumPy's numbers count as numbers."""
    return check_values(Sizes, {name: _plain(value) for name, value in values.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value


def name_problems(names: Sequence[str], outputs: int | None) -> list[str]:
    """Problems of class names, one sentence each.

    Args:
        names: In the order of the outputs; empty if classes have no names.
        outputs: Number of outputs; None or below 1 if unknown. A single output can separate two classes.
    """
    if odd := next((name for name in names if not is_printable(name)), None):
        return [f"label_names holds {odd[:60]!r}, with characters that cannot be printed"]
    if twice := next((name for name, count in Counter(names).items() if count > 1), None):
        return [f"label_names holds {twice[:60]!r} twice; every class has a name of its own"]
    if names and outputs is not None and outputs > 0 and len(names) not in ({1, 2} if outputs == 1 else {outputs}):
        return [f"label_names has {len(names)} names for {outputs} classes"]
    return []
