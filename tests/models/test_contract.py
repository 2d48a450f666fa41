"""What every model of the zoo promises, whatever its family: checked for each registered name.

Models small enough are run in full; the large ones are built on the meta device, where nothing is allocated.
"""

from __future__ import annotations

import pytest

from zoo.registry.factory import list_models
from zoo.testing.models import ModelTests, ShapeTests, on_meta

SMALL = 2_000_000  # parameters

# models that forecast have no classes, those of texts take whole numbers: see test_modalities.py and test_text.py
NAMES = [name for name in list_models(["*", "test_*"]) if not name.endswith("_forecast") and "minilm" not in name]
RUN = [name for name in NAMES if sum(p.numel() for p in on_meta(name).parameters()) < SMALL]
# many small operations, or large maps: the small ones run on request
SLOW = [name for name in RUN if name.startswith("terminator")]
RUN = [name for name in RUN if name not in SLOW or name.startswith("terminator_z")]


def test_there_are_models() -> None:
    assert RUN, "no model of the zoo is small enough to be run by this file"


@pytest.mark.parametrize("name", [name for name in NAMES if name not in RUN or name in SLOW])
class TestLargeModels(ShapeTests):
    """Those that are not run by default."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in RUN])
class TestSmallModels(ModelTests):
    """Those that are run."""

    test_compiles_as_one_graph = None  # takes long: one of each family, below


@pytest.mark.parametrize("name", [name for name in RUN if name.startswith("test_")])
class TestCompilers:
    """One of each family."""

    test_compiles_as_one_graph = ModelTests.test_compiles_as_one_graph
