"""Plain values from untrusted files: JSON and YAML of bounded size, with one-line errors."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = [
    "MAKER",
    "PAGES",
    "PICTURES",
    "DamagedFileError",
    "OutputError",
    "check_closed",
    "check_output",
    "first_line",
    "is_of_memory",
    "leads_out",
    "read_curves",
    "read_json",
    "read_text",
    "read_yaml",
]

PICTURES, PAGES = (".png", ".svg", ".pdf"), (".html", ".htm")  # suffixes of plots and reports

#: Who wrote a file, in the metadata of pictures and reports.
MAKER = "Kernel Zoo"
_MARKED = 65_536  # bytes at the start and at the end, where the mark is
#: By suffix, what only files have that the zoo wrote: its name; the style of a report; the header of answers.
_OURS = {
    PICTURES: MAKER.encode(),
    PAGES: f'name="generator" content="{MAKER}"'.encode()
    + rb"|:root { color-scheme: light dark; --ink: #1d2733; --soft: #5b6a79",
    (".csv",): rb"\A(file,class,probability|(file,)?row,(class|value)|file,step)(,|\r?\n)",
}

MAX_BYTES = 16_000_000  # of a configuration, a record or a summary
MAX_CURVES = 200_000_000  # of a run's metrics


class DamagedFileError(ValueError):
    """A file of plain values that is damaged; the message is one line."""


class OutputError(ValueError):
    """A path that cannot, or must not, be written; the message is one line."""


def check_output(path: str | Path, suffixes: tuple[str, ...] = (), given: Iterable[str | Path] = ()) -> Path:
    """Check an output path before any work starts.

    Args:
        path: A file, or a folder if `suffixes` is empty. The folder itself is created later, its parent must exist.
        suffixes: Allowed suffixes: files of other types are never overwritten.
        given: Files that are read, which the output may not replace.

    Raises:
        OutputError: The suffix is not allowed, the parent folder does not exist, or there is a file of that name that
            the zoo did not write, or a link to nothing.
    """
    path = Path(path)
    if "\0" in str(path):
        raise OutputError(f"cannot write {str(path)!r:.200}: it holds a NUL character")
    if suffixes and path.suffix.lower() not in suffixes:
        raise OutputError(f"cannot write {path}: its name must end in {' or '.join(suffixes)}")
    if suffixes and path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder")
    folder = path.parent if suffixes else path
    for place in (path, folder):
        if place.is_symlink() and not place.exists():
            raise OutputError(f"cannot write {path}: {place} is a link to {os.readlink(place)}, which is not there")
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"cannot write {path}: {folder} is not a folder")
    if not folder.exists() and not folder.absolute().parent.is_dir():
        raise OutputError(f"cannot write {path}: there is no folder {folder.parent}; make it first")
    if suffixes and path.exists():
        if any(Path(one).exists() and path.samefile(one) for one in given):
            raise OutputError(f"cannot write {path}: it is one of the files that are read; name another one")
        if not _is_ours(path):
            raise OutputError(
                f"cannot write {path}: there is such a file, which the zoo did not write; name another, or remove it"
            )
    return path


def _is_ours(path: Path) -> bool:
    """Whether a file is empty, or by its content a picture, report or table of answers that the zoo wrote."""
    if not path.is_file():  # a pipe or a device
        return False
    try:
        with path.open("rb") as file:
            content = file.read(_MARKED)
            file.seek(max(0, path.stat().st_size - _MARKED))
            content += file.read(_MARKED)
    except OSError:
        return False
    known = next((mark for suffixes, mark in _OURS.items() if path.suffix.lower() in suffixes), b"")
    return not content or bool(known and re.search(known, content))


def read_json(path: Path, limit: int = MAX_BYTES) -> Any:
    """The values of a JSON file.

    Raises:
        FileNotFoundError: The file does not exist.
        DamagedFileError: Not a regular file, larger than `limit` bytes, invalid JSON, or a duplicate key in an object.
    """
    try:
        return json.loads(read_text(path, limit), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        if isinstance(error, DamagedFileError):
            raise
        raise DamagedFileError(f"{path} is not valid JSON ({first_line(error)})") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object without duplicate keys: of two values, it is unclear which was meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:60]!r} occurs twice")
    return found


def read_yaml(path: Path, limit: int = 1_000_000) -> Any:
    """The values of a YAML file without tags, which build objects, and without references, which can expand to far more
    than the size of the file.

    Raises:
        FileNotFoundError: The file does not exist.
        DamagedFileError: Not a regular file, larger than `limit` bytes, or not such YAML.
    """
    import yaml

    class Plain(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("it holds a reference (*name)")
            return super().compose_node(parent, index)

    try:
        return yaml.load(read_text(path, limit), Plain)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, DamagedFileError):
            raise
        raise DamagedFileError(f"{path} is not valid YAML ({first_line(error)})") from None


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a path is, or lies behind, a link out of a folder; hub caches, which link to a folder beside, pass."""
    real, home = path.resolve(), folder.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    return not any(place in real.parents for place in homes)


def check_closed(folder: Path) -> None:
    """Refuse a run folder with links out of it: it may be untrusted, and the run reads and writes through them.

    Raises:
        DamagedFileError: An entry is a link that leads out of the folder, or neither a file nor a folder.
    """
    home = os.path.realpath(folder)
    for place, folders, files in os.walk(home):  # does not follow links
        names = [*folders, *files]
        if os.path.basename(place) == "wandb":  # its client links a log out of each run, which is never read
            folders[:] = [name for name in folders if not name.startswith(("run-", "offline-run-"))]
        for name in names:
            path = os.path.join(place, name)
            found = Path(folder, os.path.relpath(path, home))
            if os.path.islink(path):
                if not os.path.realpath(path).startswith(home + os.sep):
                    raise DamagedFileError(
                        f"{found} leads to {os.path.realpath(path)}, out of the folder of the run, which must hold all "
                        "that is its own: put the file or the folder itself there"
                    )
            elif not os.path.isdir(path) and not os.path.isfile(path) and os.path.exists(path):
                raise DamagedFileError(f"{found} is neither a file nor a folder: take it out of the folder of the run")


def read_curves(path: Path) -> tuple[dict[str, tuple[list[int], list[float]]], str]:
    """Steps and values of every metric of a `metrics.csv`, and a one-line note of what was skipped.

    Damaged rows and cells are skipped, as is a file that cannot be read; the note is empty if nothing was skipped.
    NaN and infinity are valid values.
    """
    found: dict[str, tuple[list[int], list[float]]] = {}
    rows = odd = 0
    try:
        reader = csv.DictReader(io.StringIO(read_text(path, MAX_CURVES)))
        for row in reader:
            step = _number(row.get("step"))
            rows, odd = rows + 1, odd + (step is None or any(map(_is_odd, row.values())))
            for name, cell in row.items() if step is not None else ():
                value = _number(cell)
                if value is not None and isinstance(name, str) and name not in ("step", "epoch"):
                    steps, values = found.setdefault(name, ([], []))
                    steps.append(int(step or 0))
                    values.append(value)
    except (DamagedFileError, FileNotFoundError, csv.Error) as error:
        return found, f"{first_line(error)}: " + (f"the rows from {rows + 1} on are left out" if rows else "no curves")
    if not reader.fieldnames:
        return found, f"{path} is empty: no curves"
    return found, f"{path}: {odd} of {rows} rows are damaged and left out, whole or in part" if odd else ""


def _is_odd(cell: Any) -> bool:
    """Whether a cell is not a number, or lies outside of the columns."""
    try:
        float(cell or 0)
    except (TypeError, ValueError):
        return True
    return False


def _number(cell: Any) -> float | None:
    try:
        value = float(cell)
    except (TypeError, ValueError):
        return None
    return value if abs(value) < 1e15 else None


def read_text(path: Path, limit: int = MAX_BYTES, encoding: str = "utf-8") -> str:
    """The text of a file.

    Raises:
        FileNotFoundError: The file does not exist.
        DamagedFileError: Not a regular file, a link out of its folder, larger than `limit` bytes, or not valid text.
    """
    try:
        if leads_out(path, path.parent):
            raise DamagedFileError(f"{path} leads to {path.resolve()}, outside its folder: copy the file itself there")
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # reading a pipe or a device may never end
            raise DamagedFileError(f"{path} is not a regular file")
        if found.st_size > limit:
            raise DamagedFileError(f"{path} has {found.st_size:,} bytes, more than the {limit:,} that such a file has")
        return path.read_text(encoding=encoding)
    except FileNotFoundError:
        raise
    except UnicodeDecodeError as error:
        raise DamagedFileError(f"{path} is not UTF-8 text ({first_line(error)})") from None
    except OSError as error:
        raise DamagedFileError(f"{path} cannot be read ({first_line(error)})") from None


def first_line(error: BaseException, width: int = 160) -> str:
    """First line of an error message."""
    text = " ".join(str(error).split())
    return text[:width].rstrip(" .:") if text else type(error).__name__


def is_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, for which torch raises several types."""
    return isinstance(error, MemoryError) or (
        type(error).__module__ in ("builtins", "torch") and "memory" in str(error) and "allocate" in str(error)
    )
