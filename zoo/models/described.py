"""What a model's description in a file may say, by type: inputs and outputs as timm's configurations name them."""

from __future__ import annotations

from typing import Annotated, Literal, TypedDict

from annotated_types import Ge, Gt, Le
from pydantic import FiniteFloat

__all__ = ["Beside", "Described"]

_Side = Annotated[int, Gt(0), Le(1_000_000)]
_Share = Annotated[float, Ge(0.05), Le(20)]


class Described(TypedDict, total=False):
    """What a folder's `pretrained_cfg` may say of inputs and outputs."""

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
    num_classes: Annotated[int, Ge(-1), Le(1_000_000)]  # -1: not of classes
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
    """What stands beside it."""

    num_classes: Annotated[int, Ge(-1), Le(1_000_000)]  # -1: not of classes
    num_features: Annotated[int, Ge(0)]
    label_names: list[str]
    label_descriptions: dict[str, str]
