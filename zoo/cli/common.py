"""Shared parts of the commands: registration, printing, argument types."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

from zoo.support.quoting import shown
from zoo.support.register import Register

#: Registers `add(parser)` under the name of a command; its docstring is the command's description.
command: Register[Callable[[argparse.ArgumentParser], None]] = Register("command", "zoo.cli")

MODEL = "name with its tag (grbf.wine), local-dir:FOLDER, or the folder of a run"


def json_option(parser: argparse.ArgumentParser) -> None:
    """Add the option `--json`."""
    parser.add_argument("--json", action="store_true", help="print JSON, for machines")


def told(options: argparse.Namespace, content: Any, lines: Sequence[str]) -> int:
    """Print a result as text lines, or as JSON; returns exit status 0."""
    if options.json:
        print(shown(json.dumps(content, indent=2, ensure_ascii=False)))
    else:
        print("\n".join(map(shown, lines)))
    return 0


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Format rows as aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def positive(text: str) -> int:
    """Parse a positive integer argument."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def device(text: str) -> str:
    """Parse a device argument, cpu or an available cuda."""
    if text == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise argparse.ArgumentTypeError("torch finds no GPU here; leave --device out to use the CPU")
    elif text != "cpu":
        raise argparse.ArgumentTypeError(f"{text!r} is neither cpu nor cuda")
    return text
