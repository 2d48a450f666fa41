"""A pytest plugin that points timm's own test suite at this package's models: `pytest -p timm_suite`.

timm's tests (in its source distribution, not in the wheel) build their parameter lists from
`timm.list_models` while they are imported. A plugin named on the command line is imported earlier, so it can
narrow that function to our models.

Environment variables, all optional:

* `ZOO_NON_STD`: comma-separated name patterns of models without spatial features (vectors in, vectors out);
* `ZOO_INTERMEDIATES`: last components of the modules of ours that have `forward_intermediates()`.

Proved with timm 1.0.31. See `tests/models/test_timm_suite.py` for how it is run.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable
from typing import Any

import pytest
import timm

importlib.import_module("zoo.models")  # registers them

OURS = {
    name for name in timm.list_models() if timm.model_entrypoint(name).__module__.split(".")[:2] == ["zoo", "models"]
}
all_models = timm.list_models


def words(variable: str) -> list[str]:
    return [word for word in os.environ.get(variable, "").split(",") if word]


def as_list(value: str | Iterable[str]) -> list[str]:
    return [value] if isinstance(value, str) and value else list(value or [])


def ours(name: object) -> bool:
    return isinstance(name, str) and name.split(".")[0] in OURS


def list_models(
    filter: str | list[str] = "",
    module: str | list[str] = "",
    pretrained: bool = False,
    exclude_filters: str | list[str] = "",
    **kwargs: Any,
) -> list[str]:
    """`timm.list_models`, ours only, with our names added to the suite's two lists of special models."""
    filters, modules, excluded = as_list(filter), as_list(module), as_list(exclude_filters)
    for patterns in (filters, excluded):
        if "vit_*" in patterns:  # the suite's sign for "models without spatial features"
            patterns += words("ZOO_NON_STD")
    if modules:  # the suite's allow-list of modules with forward_intermediates()
        modules += words("ZOO_INTERMEDIATES")
    return [name for name in all_models(filters, modules, pretrained, excluded, **kwargs) if ours(name)]


timm.list_models = list_models
timm.list_pretrained = lambda *args, **kwargs: []  # its only user compares with files on the hub


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that name timm's own models."""

    def keep(item: pytest.Item) -> bool:
        call = getattr(item, "callspec", None)
        return call is not None and ours(call.params.get("model_name"))

    config.hook.pytest_deselected(items=[item for item in items if not keep(item)])
    items[:] = [item for item in items if keep(item)]
