"""The command line of the zoo, `python -m zoo COMMAND`. Nothing heavy is imported before a command runs.

python -m zoo benchmark                     list the families and their measurements
python -m zoo benchmark grbf speed          measure, print, and write results/ and RESULTS.md
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from zoo.suggest import suggestion

#: Measurements of each family: name -> (what it shows, module, function).
BENCHMARKS: dict[str, dict[str, tuple[str, str, str]]] = {
    "grbf": {
        "speed": ("a training step against the original formulation", "zoo.benchmarks.grbf", "speed"),
        "examples": ("the authors' three examples", "zoo.benchmarks.grbf", "examples"),
        "synthetic": ("true features found on P1, P2, P3", "zoo.benchmarks.grbf", "select_features"),
        "tables": ("real tables against five other learners", "zoo.benchmarks.grbf_tables", "run"),
    },
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 when it is done, 1 on an error told in words, 2 on a wrong call."""
    parser = argparse.ArgumentParser(prog="python -m zoo", description="Kernel Zoo.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_benchmark(commands)
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        if not type(error).__module__.startswith("zoo"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1


def _add_benchmark(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    listing = "\n".join(
        f"  {family} {name:10} {shown}"
        for family, entries in BENCHMARKS.items()
        for name, (shown, _, _) in entries.items()
    )
    parser = commands.add_parser(
        "benchmark",
        help="measure a family and write the results",
        description="Measure a family and write the results. What has been measured is not measured again.",
        epilog=f"measurements:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("family", nargs="?", help="for example grbf; nothing lists them")
    parser.add_argument("name", nargs="?", help="which measurement; nothing takes all of the family")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the CSV files (results)")
    parser.set_defaults(run=lambda options: _benchmark(parser, options))


def _benchmark(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    if options.family is None:
        parser.print_help()
        return 0
    if options.family not in BENCHMARKS:
        parser.error(f"no family {options.family!r}{suggestion(options.family, BENCHMARKS)}")
    entries = BENCHMARKS[options.family]
    if options.name is not None and options.name not in entries:
        parser.error(f"{options.family} has no measurement {options.name!r}{suggestion(options.name, entries)}")
    for name in [options.name] if options.name else entries:
        _, module, function = entries[name]
        for line in getattr(importlib.import_module(module), function)(options.out.absolute()):
            print(line, flush=True)
    return 0
