"""Measurements behind all results of the zoo: `python -m zoo benchmark FAMILY NAME`.

A measurement is a function with the decorator :func:`measurement` that takes a results folder and yields lines of text.
Rows are stored in CSV files with date, commit, threads, wait policy, load and machine. A second run continues an
interrupted one; the tables in RESULTS.md are generated from the rows.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

__all__ = ["Measurement", "measurement", "measurements"]

Measure = TypeVar("Measure", bound=Callable[..., object])


class Measurement(NamedTuple):
    """A measurement: family and name on the command line, a description, and its function."""

    family: str
    name: str
    shows: str
    module: str
    function: str


def measurement(family: str, name: str, shows: str) -> Callable[[Measure], Measure]:
    """Declare a function of this package a measurement; the arguments must be literals, because they are parsed."""
    return lambda measure: measure


@functools.cache
def measurements() -> Mapping[str, Mapping[str, Measurement]]:
    """All measurements by family and name, parsed from the files, so that listing them imports nothing heavy."""
    found: dict[str, dict[str, Measurement]] = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        written = ast.parse(path.read_text(encoding="utf-8")).body
        for node in (node for node in written if isinstance(node, ast.FunctionDef)):
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Name) and mark.func.id == "measurement":
                    family, name, shows = (ast.literal_eval(argument) for argument in mark.args)
                    entry = Measurement(family, name, shows, f"{__name__}.{path.stem}", node.name)
                    found.setdefault(family, {})[name] = entry
    return found
