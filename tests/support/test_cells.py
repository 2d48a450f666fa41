"""Cells of tables as text."""

from __future__ import annotations

import datetime

import numpy as np
import pytest

from zoo.support.cells import cell_text, known_category


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "True"),
        (np.bool_(False), "False"),
        (datetime.datetime(2020, 1, 1), "2020-01-01"),
        (datetime.datetime(2020, 1, 1, 9, 30), "2020-01-01 09:30:00"),
        (datetime.date(2020, 1, 1), "2020-01-01"),
        (np.datetime64("2020-01-01T00:00:00.000000000"), "2020-01-01"),
        (np.datetime64("2020-01-01T09:30:00"), "2020-01-01 09:30:00"),
        (np.datetime64("NaT"), ""),
        (float("nan"), ""),
        (None, ""),
        (np.float32(3), "3.0"),
        (" a ", "a"),
    ],
)
def test_a_value_is_the_cell_that_a_file_has(value: object, text: str) -> None:
    assert cell_text(value) == text


@pytest.mark.parametrize(
    ("cell", "known", "found"),
    [
        ("True", ["0", "1"], "1"),
        ("0", ["False", "True", "(missing)"], "False"),
        ("TRUE", ["false", "true"], "true"),
        ("True", ["1", "2"], "True"),  # numbers, not truth values
        ("true", ["1", "True"], "True"),
        ("2020-01-01", ["2020-01-01 00:00:00"], "2020-01-01 00:00:00"),
        ("2020-01-01T00:00", ["2020-01-01"], "2020-01-01"),
        ("3.0", ["3"], "3"),
        ("3.0", ["3.0"], "3.0"),
        ("4.0", ["3"], "4"),
    ],
)
def test_a_category_is_known_in_other_spellings(cell: str, known: list[str], found: str) -> None:
    assert known_category(cell, known) == found
