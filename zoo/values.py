"""Plain values out of files that may come from anyone: JSON and YAML, bounded, and every failure in one line."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

__all__ = ["DamagedFileError", "first_line", "read_json", "read_yaml"]

MAX_BYTES = 16_000_000  # of a configuration, a record or a summary


class DamagedFileError(ValueError):
    """A file of plain values that cannot be read as such; the message is one line."""


def read_json(path: Path, limit: int = MAX_BYTES) -> Any:
    """The values of a JSON file.

    Raises:
        FileNotFoundError: There is none.
        DamagedFileError: It is no regular file, larger than `limit` bytes, or no JSON.
    """
    try:
        return json.loads(_text(path, limit))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DamagedFileError):
            raise
        raise DamagedFileError(f"{path} is not valid JSON ({first_line(error)})") from None


def read_yaml(path: Path, limit: int = 1_000_000) -> Any:
    """The values of a YAML file: no tags that build objects, and no references, which can stand for far more than the
    file holds.

    Raises:
        FileNotFoundError: There is none.
        DamagedFileError: It is no regular file, larger than `limit` bytes, or not such YAML.
    """
    import yaml

    class Plain(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("it holds a reference (*name)")
            return super().compose_node(parent, index)

    try:
        return yaml.load(_text(path, limit), Plain)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, DamagedFileError):
            raise
        raise DamagedFileError(f"{path} is not valid YAML ({first_line(error)})") from None


def _text(path: Path, limit: int) -> str:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe or a device might never end
            raise DamagedFileError(f"{path} is not a regular file")
        if found.st_size > limit:
            raise DamagedFileError(f"{path} has {found.st_size:,} bytes, more than the {limit:,} that such a file has")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except UnicodeDecodeError as error:
        raise DamagedFileError(f"{path} is not UTF-8 text ({first_line(error)})") from None
    except OSError as error:
        raise DamagedFileError(f"{path} cannot be read ({first_line(error)})") from None


def first_line(error: BaseException, width: int = 160) -> str:
    """What an error says, in one line."""
    text = " ".join(str(error).split())
    return text[:width].rstrip(" .:") if text else type(error).__name__
