"""Commands for measurements: benchmark, results, build."""

from __future__ import annotations

import argparse
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zoo.benchmarks import measurements
from zoo.cli.common import command, device, json_option, positive, told
from zoo.support.quoting import shown
from zoo.support.suggest import suggestion
from zoo.support.values import check_output


@command("benchmark", "measure a family and write the results")
def add_benchmark(parser: argparse.ArgumentParser) -> None:
    """Run the measurements of a family and write the results. Existing rows are not measured again."""
    rows = [f"  {m.family} {m.name:10} {m.shows}" for entries in measurements().values() for m in entries.values()]
    parser.epilog, parser.formatter_class = "\n".join(["measurements:", *rows]), argparse.RawDescriptionHelpFormatter
    parser.add_argument("family", nargs="?", help="for example grbf; nothing lists them")
    parser.add_argument("name", nargs="?", help="which measurement; nothing takes all of the family")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the CSV files (results)")
    parser.add_argument("--table", action="store_true", help="measure nothing, write the table of the rows there are")
    parser.add_argument(
        "--models", nargs="+", metavar="MODEL", help="models: names of the zoo or of timm; gkcl: learners of its tables"
    )
    own = parser.add_argument_group("of `models`, which measure again each time")
    own.add_argument("--batch", type=positive, help="images a call (8)")
    own.add_argument("--size", type=positive, help="side of the images in pixels (224)")
    own.add_argument("--threads", type=positive, nargs="+", help="numbers of threads, one after the other")
    own.add_argument("--rounds", type=positive, help="timed calls of each form")
    own.add_argument("--compile", action="store_true", default=None, help="also after torch.compile")
    own.add_argument("--precision", nargs="+", choices=("float32", "bfloat16"), help="of forward passes (float32)")
    own.add_argument("--device", type=device, help="cpu (default) or cuda")
    own.add_argument(
        "--wait",
        nargs="+",
        type=_policy,
        metavar="POLICY",
        help="how threads wait, one after the other: active, passive, 'spin N'",
    )
    trained = parser.add_argument_group("of measurements that train")
    trained.add_argument("--data", nargs="+", metavar="NAME", help="which data sets")
    trained.add_argument("--root", help="where their files lie (the cache)")
    trained.add_argument("--steps", type=positive, help="training steps of each run")
    parser.set_defaults(run=lambda options: _benchmark(parser, options))


def _policy(name: str) -> str:
    from zoo.results.timing import policy

    try:
        policy(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


def _benchmark(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    if options.family is None:
        parser.print_help()
        return 0
    families = measurements()
    if options.family not in families:
        parser.error(f"no family {options.family!r}{suggestion(options.family, families)}")
    entries = families[options.family]
    if options.name is not None and options.name not in entries:
        parser.error(f"{options.family} has no measurement {options.name!r}{suggestion(options.name, entries)}")
    check_output(options.out)
    if options.table and options.name in ("speed", "inference", "training"):
        parser.error(f"{options.name} always measures again, and writes its table afterwards")
    from zoo.results.records import Records

    Records.frozen = options.table
    try:
        for name in [options.name] if options.name else entries:
            measure = getattr(importlib.import_module(entries[name].module), entries[name].function)
            for line in measure(options.out.absolute(), **_given(parser, options, measure)):
                print(shown(line), flush=True)
    finally:
        Records.frozen = False
    return 0


def _given(parser: argparse.ArgumentParser, options: argparse.Namespace, measure: Callable[..., Any]) -> dict[str, Any]:
    """The given options that a measurement accepts; a single measurement must accept all of them."""
    given = {k: v for k, v in vars(options).items() if k in _OPTIONS and v is not None}
    accepted = inspect.signature(measure).parameters
    unknown = [k for k in given if k not in accepted]
    if unknown and (options.name or options.family != "models"):
        what = f"{options.family} {options.name or measure.__name__}"
        parser.error(f"{what} has no option --{unknown[0]}")
    return {k: v for k, v in given.items() if k in accepted}


_OPTIONS = (
    "models", "batch", "size", "threads", "rounds", "compile", "precision", "device", "wait", "data", "root", "steps",
)  # fmt: skip


@command("results", "table of finished runs")
def add_results(parser: argparse.ArgumentParser) -> None:
    """Tabulate run folders, with one row for the seeds of an experiment. With --write, the table is also written into
    RESULTS.md and between its markers into README.md of this folder.
    """
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs, for example outputs/mnist5k/*")
    parser.add_argument(
        "--write",
        action="store_true",
        help="write the table into RESULTS.md and README.md, and the first run's summary where a file has its markers",
    )
    parser.add_argument("--section", default="runs", help="section of the documents that is written (runs)")
    parser.set_defaults(run=_results)


def _results(options: argparse.Namespace) -> int:
    from zoo.results.runs import tabulate

    documents = [Path("RESULTS.md"), Path("README.md")] if options.write else []
    for line in tabulate(options.runs, documents, options.section):
        print(shown(line))
    return 0


@command("build", "compile the loops in C ahead of time")
def add_build(parser: argparse.ArgumentParser) -> None:
    """Compile the loops in C for this machine ahead of their first use, and print the path of the library. The
    environment variable ZOO_CACHE sets the folder, CC the compiler, ZOO_NATIVE_ARCH the processor.
    """
    json_option(parser)
    parser.set_defaults(run=_build)


def _build(options: argparse.Namespace) -> int:
    from zoo.ops import building, native

    path = building.build(native.SOURCES)[1]
    if path is None:
        folder = building.cache_folder()
        raise building.NativeError(f"{folder} cannot be used, not writable or not private; ZOO_CACHE names another")
    return told(options, {"library": str(path)}, [str(path)])
