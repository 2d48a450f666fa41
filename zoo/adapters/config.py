"""Configuration of adapters, validated on construction."""

from __future__ import annotations

import functools
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from zoo.support.suggest import suggestion

__all__ = ["AdapterConfig"]
FORMS = ("vector", "bottleneck", "houlsby")

SEQUENTIAL = ("attention", "output")

PARALLEL = ("query", "key", "value")

INITS = ("mam", "bert")


@dataclass(frozen=True)
class AdapterConfig:
    """What to inject, and where. Names follow PEFT where it has an equivalent.

    Attributes:
        form: `"vector"`, `"bottleneck"` or `"houlsby"`.
        places: Any of `"attention"`, `"output"` (after attention and feed-forward network), `"query"`, `"key"`,
            `"value"` (parallel to them; form `"vector"` only).
        num_features: Number of random features m of an SNNK adapter.
        bottleneck: Hidden units r of the other two forms.
        layers_to_transform: Indices of the layers, negative from the end; None for all.
        exclude_modules: Regular expression of module names to exclude.
        modules_to_save: Last components of the names of modules that are trained and saved whole, with a copy per
            adapter: `("classifier",)`, `("pooler", "classifier")`, `("head",)`.
        init_weights: Initialisation of Psi or D: `"mam"`, Kaiming-uniform, or `"bert"`, normal with deviation 0.02.
        constant: Lower clip of the features.
        centered: Centred features, see `ReLUFeatures`.
        normalize: Rescale inputs to this norm before the features; None disables it.
        layer_norm: Apply a separate LayerNorm before the branch.
        projection: `"orthogonal"`, `"iid"` or `"hadamard"`.
        seed: Seed of the projections; each adapter of a model gets its own.
        save_projection: Save the random projections too. Otherwise they are regenerated, and checked on loading.
    """

    form: Literal["vector", "bottleneck", "houlsby"] = "vector"
    places: tuple[str, ...] = ("attention", "output")
    num_features: int = 16
    bottleneck: int = 48
    layers_to_transform: tuple[int, ...] | None = None
    exclude_modules: str | None = None
    modules_to_save: tuple[str, ...] = ()
    init_weights: Literal["mam", "bert"] = "mam"
    constant: float = 0.0
    centered: bool = False
    normalize: float | None = None
    layer_norm: bool = False
    projection: Literal["orthogonal", "iid", "hadamard"] = "orthogonal"
    seed: int = 0
    save_projection: bool = True

    def __post_init__(self) -> None:
        for name in ("places", "modules_to_save", "layers_to_transform"):
            value = getattr(self, name)
            listed = isinstance(value, Iterable) and not isinstance(value, str)
            if not listed and (value is not None or name == "places"):
                raise ValueError(f"{name}={value!r} must be a list")
            object.__setattr__(self, name, None if value is None else tuple(value))
        _one_of("form", self.form, FORMS)
        _one_of("init_weights", self.init_weights, INITS)
        for place in self.places:
            _one_of("places", place, (*SEQUENTIAL, *PARALLEL))
        if not self.places:
            raise ValueError("places is empty: name at least one")
        if self.form != "vector" and set(self.places) & set(PARALLEL):
            raise ValueError("query, key and value take adapters of form='vector' only")
        for name, kind in _kinds().items():
            value = getattr(self, name)
            try:
                kind.validate_python(value, strict=name != "normalize" and name != "constant")
            except ValidationError as error:
                reason = error.errors()[0]["msg"]
                raise ValueError(f"{name}={value!r}: {reason[:1].lower()}{reason[1:]}") from None
        for name in ("num_features", "bottleneck"):
            if not 1 <= getattr(self, name) <= 1_000_000:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1 and at most a million")
        try:
            re.compile(self.exclude_modules or "")
        except re.error as error:
            raise ValueError(f"exclude_modules={self.exclude_modules!r} is not a regular expression: {error}") from None


@functools.cache
def _kinds() -> dict[str, TypeAdapter[Any]]:
    """Validators of the configuration's fields, by name."""
    hints = typing.get_type_hints(AdapterConfig)
    return {name: TypeAdapter(hint) for name, hint in hints.items() if name not in ("form", "places", "init_weights")}


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: {value!r}{suggestion(value, allowed)}")


def config_from(content: Mapping[str, Any], origin: str) -> AdapterConfig:
    allowed = [f.name for f in fields(AdapterConfig)]
    unknown = [k for k in content if k not in allowed]
    if unknown:
        raise ValueError(f"{origin}: unknown entry {unknown[0]!r}{suggestion(unknown[0], allowed)}")
    return AdapterConfig(**content)
