"""Parquet tables, whose cells are read as those of a delimited text file; needs pyarrow."""

from __future__ import annotations

import datetime
import decimal
import importlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from zoo.data.checks import DataError
from zoo.data.delimited import MAX_BYTES, TableFile, check_names
from zoo.support.values import first_line

__all__ = ["ParquetTable", "read_parquet"]

_MAX_CELLS = 2**28
_BATCH = 4096  # rows decoded at a time


@dataclass(frozen=True)
class ParquetTable(TableFile):
    """A Parquet file of known columns; rows are read on demand.

    Attributes:
        source: pyarrow's reader.
    """

    source: Any = None
    unit: ClassVar[str] = "row"

    def rows(self, used: Collection[int] | None = None) -> Iterator[tuple[int, list[str]]]:
        """Number of each row, from 1, and its cells as text; a missing value is an empty cell, as are all not used.

        Args:
            used: Indices of the columns whose cells are looked at; the others may hold anything. None: all.

        Raises:
            DataError: The file is damaged, or a cell is neither a number, a text, a truth value nor a time.
        """
        row, wanted = 0, sorted(set(range(self.width) if used is None else used))
        try:
            for batch in self.source.iter_batches(batch_size=_BATCH):
                for values in zip(*(batch.columns[i].to_pylist() for i in wanted), strict=True):
                    row += 1
                    cells = [""] * self.width
                    for i, value in zip(wanted, values, strict=True):
                        cells[i] = self._cell(value, row, i)
                    yield row, cells
        except DataError:
            raise
        except (OSError, ValueError, OverflowError, NotImplementedError) as error:  # pyarrow's errors are of these
            raise DataError(f"{self.path} is damaged or of an unknown form ({first_line(error)})") from None

    def _cell(self, value: Any, row: int, column: int) -> str:
        if value is None or value != value:
            return ""
        if isinstance(value, str):
            return value.strip()
        if isinstance(value, bool | int | float):
            return repr(value)
        if isinstance(value, decimal.Decimal):
            return format(value, "f")
        if isinstance(value, datetime.datetime):
            return value.isoformat(sep=" ")
        if isinstance(value, datetime.date | datetime.time):
            return value.isoformat()
        raise DataError(
            f"{self.where(row)}: {self.name(column)} holds a {type(value).__name__}, not a number or a text"
        )


def read_parquet(path: str | Path) -> ParquetTable:
    """Open a Parquet file.

    Raises:
        DataError: pyarrow is not installed; the file is missing, damaged or too large, or two columns share a name.
    """
    path = Path(path)
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise DataError(
            f"{path} is a Parquet file, which needs pyarrow: pip install 'kernel-zoo[parquet]', or save it as CSV"
        ) from None
    if not path.is_file():
        raise DataError(f"cannot read the table {path}: it is {'a folder' if path.is_dir() else 'no file'}")
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"{path} is larger than {MAX_BYTES // 10**6} MB: split it first")
    try:
        source = parquet.ParquetFile(path, page_checksum_verification=True)
        names, rows = [str(name).strip() for name in source.schema_arrow.names], source.metadata.num_rows
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as Parquet ({first_line(error)})") from None
    if not names:
        raise DataError(f"{path} is empty: it has 0 columns")
    if rows * len(names) > _MAX_CELLS:
        raise DataError(
            f"{path} has {rows:,} rows of {len(names)} cells, more than can be read at once: split it first"
        )
    check_names(path, names)
    return ParquetTable(path, ",", "utf-8", names, len(names), source=source)
