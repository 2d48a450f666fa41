"""Measurements behind every figure that the zoo states: `python -m zoo benchmark FAMILY NAME`.

Each is a function with :func:`measurement` above it that takes a results folder and yields lines of text as it goes.
Rows are kept in CSV files, each with its date, commit, threads, how they wait, load and machine; a second run continues
where the first one stopped, and the table in RESULTS.md is written from the rows.
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
    """A measurement: family and name on the command line, what it shows, and the function that takes it."""

    family: str
    name: str
    shows: str
    module: str
    function: str


def measurement(family: str, name: str, shows: str) -> Callable[[Measure], Measure]:
    """Mark a function of a module here as a measurement; the arguments must be literal, they are read off the file."""
    return lambda measure: measure


@functools.cache
def measurements() -> Mapping[str, Mapping[str, Measurement]]:
    """Every measurement by family and name, read off the files: nothing heavy is imported for a list."""
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
