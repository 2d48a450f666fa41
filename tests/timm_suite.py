"""A pytest plugin that points timm's own test suite at this package's models: `pytest -p timm_suite`.

timm's tests (in its source distribution, not in the wheel) build their parameter lists from
`timm.list_models` while they are imported. A plugin named on the command line is imported earlier, so it can
narrow that function to our models.

Models of sounds, clips, points and series are left out: their inputs are no images of a free size.

Two of the suite's lists are hard-coded names of timm's: models without spatial features, and modules that have
`forward_intermediates()`. Ours are added: the former have no `pool_size` in their configuration.

Proved with timm 1.0.31. See `tests/models/test_timm_suite.py` for how it is run.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from typing import Any

import pytest
import timm

importlib.import_module("zoo.models")  # registers them

all_models = timm.list_models


def takes_images(name: str) -> bool:
    """Whether the suite can make an input: a map (`pool_size` is known), or an array of one fixed size."""
    cfg = timm.get_pretrained_cfg(name)
    ours = timm.model_entrypoint(name).__module__.split(".")[:2] == ["zoo", "models"]
    return ours and (cfg is None or cfg.pool_size is not None or bool(cfg.fixed_input_size))


# without its head a bundled network has no parameter, and the suite asks for one
HEAD_ONLY = {"snnk_bundled"}
OURS = {name for name in all_models() if takes_images(name)} - HEAD_ONLY


def has_intermediates(name: str) -> bool:
    module = sys.modules[timm.model_entrypoint(name).__module__]
    own = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__]
    return any(hasattr(value, "forward_intermediates") for value in own)


# a shipped weight for images of its own size does not say its map's either
TAGGED = [name for name in all_models(include_tags=True) if name.split(".")[0] in OURS]
FLAT = [name for name in {*OURS, *TAGGED} if timm.get_pretrained_cfg(name).pool_size is None]
STAGED = sorted({timm.model_entrypoint(name).__module__.split(".")[-1] for name in OURS if has_intermediates(name)})


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
            patterns += FLAT
    if modules:  # the suite's allow-list of modules with forward_intermediates()
        modules += STAGED
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
