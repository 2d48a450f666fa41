"""The command line of the zoo, `python -m zoo COMMAND`. Nothing heavy is imported before a command runs.

python -m zoo benchmark                     list the families and their measurements
python -m zoo benchmark grbf speed          measure, print, and write results/ and RESULTS.md
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from zoo.suggest import suggestion

#: Measurements of each family: name -> (what it shows, module, function).
BENCHMARKS: dict[str, dict[str, tuple[str, str, str]]] = {
    "grbf": {
        "speed": ("a training step against the original formulation", "zoo.benchmarks.grbf", "speed"),
        "examples": ("the authors' three examples", "zoo.benchmarks.grbf", "examples"),
        "synthetic": ("true features found on P1, P2, P3", "zoo.benchmarks.grbf", "select_features"),
        "tables": ("real tables against five other learners", "zoo.benchmarks.grbf_tables", "run"),
    },
    "models": {
        "inference": ("forward passes: plain, zoo and timm's peers", "zoo.benchmarks.models", "inference"),
        "training": ("a training step: plain and zoo", "zoo.benchmarks.models", "training"),
    },
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 when it is done, 1 on an error told in words, 2 on a wrong call."""
    parser = argparse.ArgumentParser(prog="python -m zoo", description="Kernel Zoo.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_benchmark(commands)
    _add_validate(commands)
    _add_figure(commands)
    _add_results(commands)
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
    own = parser.add_argument_group("of `models`, which measures anew each time")
    own.add_argument("--models", nargs="+", metavar="MODEL", help="names of the zoo or of timm")
    own.add_argument("--batch", type=_positive, help="images a call (8)")
    own.add_argument("--size", type=_positive, help="side of the images in pixels (224)")
    own.add_argument("--threads", type=_positive, nargs="+", help="numbers of threads, one after the other")
    own.add_argument("--rounds", type=_positive, help="timed calls of each form")
    own.add_argument("--compile", action="store_true", default=None, help="also after torch.compile")
    own.add_argument("--device", type=_device, help="cpu (default) or cuda")
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
        measure = getattr(importlib.import_module(module), function)
        for line in measure(options.out.absolute(), **_given(parser, options, measure)):
            print(line, flush=True)
    return 0


def _given(parser: argparse.ArgumentParser, options: argparse.Namespace, measure: Callable[..., Any]) -> dict[str, Any]:
    """The options that were given, if the measurement has them; with several measurements, those that it has."""
    given = {k: v for k, v in vars(options).items() if k in _OPTIONS and v is not None}
    accepted = inspect.signature(measure).parameters
    unknown = [k for k in given if k not in accepted]
    if unknown and (options.name or options.family != "models"):
        what = f"{options.family} {options.name or measure.__name__}"
        parser.error(f"{what} has no option --{unknown[0]}")
    return {k: v for k, v in given.items() if k in accepted}


_OPTIONS = ("models", "batch", "size", "threads", "rounds", "compile", "device")


def _add_results(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "results",
        help="table of finished runs, written into RESULTS.md and README.md",
        description="Tabulate run folders, the seeds of an experiment in one row, and write the table into RESULTS.md "
        "and, between its marks, into README.md.",
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs, for example outputs/mnist5k/*")
    parser.set_defaults(run=_results)


def _results(options: argparse.Namespace) -> int:
    from zoo.benchmarks.runs import tabulate

    for line in tabulate(options.runs, [Path("RESULTS.md"), Path("README.md")]):
        print(line)
    return 0


def _add_validate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "validate",
        help="accuracy of released weights on a folder of images",
        description="Classify a folder of images, prepared as the weights' record says, and print the accuracy beside "
        "the published one.",
    )
    parser.add_argument("--model", required=True, help="name with its tag (unireplknet_a.in1k), or local-dir:FOLDER")
    parser.add_argument("--data", required=True, type=Path, help="folder with val/, or with one folder per class")
    parser.add_argument("--checkpoint", type=Path, help="a file with the weights, instead of fetching them")
    parser.add_argument("--batch", type=_positive, default=64, help="images a step (64)")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images (0: this one)")
    parser.add_argument("--device", type=_device, default="cpu", help="cpu (default) or cuda")
    parser.set_defaults(run=_validate)


def _validate(options: argparse.Namespace) -> int:
    from zoo.validation import validate

    print(
        validate(
            options.model,
            options.data,
            checkpoint=options.checkpoint,
            batch_size=options.batch,
            num_workers=options.workers,
            device=options.device,
        )
    )
    return 0


def _add_figure(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "figure",
        help="a picture of what a model looks at, as PNG",
        description="Draw the effective receptive field of a model, or the merged kernels of one of its layers.",
    )
    parser.add_argument("kind", choices=("receptive-field", "kernels"))
    parser.add_argument("--model", required=True, help="name of the zoo or of timm, or local-dir:FOLDER")
    parser.add_argument("--checkpoint", type=Path, help="a file with the weights of a model given by name")
    parser.add_argument("--pretrained", action="store_true", help="fetch the released weights")
    parser.add_argument("--data", type=Path, help="receptive-field: folder of images to average over; else noise")
    parser.add_argument("--count", type=_positive, help="images to average over (16), or kernels to show (32)")
    parser.add_argument("--stage", type=int, default=-1, help="receptive-field: which feature map (-1, the last)")
    parser.add_argument("--layer", help="kernels: name of the layer (the first large one)")
    parser.add_argument("--out", type=Path, help="the PNG (MODEL-KIND.png)")
    parser.set_defaults(run=_figure)


def _figure(options: argparse.Namespace) -> int:
    from zoo.gallery import draw

    out = options.out or Path(f"{options.model.rpartition('/')[2].replace(':', '-')}-{options.kind}.png")
    print(draw(options.kind, options.model, out, **{k: v for k, v in vars(options).items() if k in _DRAWN}))
    return 0


_DRAWN = ("checkpoint", "pretrained", "data", "count", "stage", "layer")


# ---- values ------------------------------------------------------------------------------------------------


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _device(text: str) -> str:
    if text == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise argparse.ArgumentTypeError("torch sees no GPU here; leave --device out to use the CPU")
    elif text != "cpu":
        raise argparse.ArgumentTypeError(f"{text!r} is neither cpu nor cuda")
    return text
