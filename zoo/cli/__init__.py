"""The command line of the zoo, `python -m zoo COMMAND`. Nothing heavy is imported before a command runs.

python -m zoo list --pretrained                     the weights and their results
python -m zoo predict grbf.wine wine.csv            classes or values of a file
python -m zoo benchmark grbf speed                  measure, print, and write results/ and RESULTS.md
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from zoo.cli.common import command
from zoo.support import lean
from zoo.support.environment import bound_waiting
from zoo.support.quoting import one_line_warnings, python_text, shown
from zoo.support.suggest import suggestion
from zoo.support.values import PAGES, PICTURES, check_output, is_of_memory


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 on success, 1 after an error with a message, 2 on wrong usage."""
    bound_waiting()
    lean.install()
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        with one_line_warnings():
            status = options.run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("\nstopped; the same command continues from here", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        memory = is_of_memory(error)
        if not memory and not type(error).__module__.startswith("zoo"):
            raise
        print(f"error: {'there is not enough memory for this' if memory else shown(error)}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="python -m zoo",
        description="Kernel Zoo: look at models, use their weights, measure and deploy them. Training is train.py.",
        epilog="`python -m zoo COMMAND --help` tells more; --json prints for machines where a command has it.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, entry in command.entries().items():
        entry.made(commands.add_parser(name, help=entry.shows, description=inspect.getdoc(entry.made)))
    return parser
