"""The command line of the zoo, `python -m zoo COMMAND`. Nothing heavy is imported before a command runs.

python -m zoo list --pretrained                     the weights, and what they reach
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

from zoo.facts import bound_waiting
from zoo.quoting import one_line_warnings, python_text, shown
from zoo.suggest import suggestion
from zoo.values import PAGES, PICTURES, check_output

#: Measurements of each family: name -> (what it shows, module, function).
BENCHMARKS: dict[str, dict[str, tuple[str, str, str]]] = {
    "grbf": {
        "speed": ("a training step against the original formulation", "zoo.benchmarks.grbf_speed", "speed"),
        "examples": ("the authors' three examples", "zoo.benchmarks.grbf", "examples"),
        "synthetic": ("true features found on P1, P2, P3", "zoo.benchmarks.grbf", "select_features"),
        "tables": ("real tables against five other learners", "zoo.benchmarks.grbf_tables", "run"),
        "defaults": ("real tables, every learner with its defaults", "zoo.benchmarks.grbf_defaults", "run"),
    },
    "snnk": {
        "speed": ("folded and unfolded layers against dense ones", "zoo.benchmarks.snnk", "speed"),
        "approximation": ("error of every map against its width", "zoo.benchmarks.snnk", "approximation"),
        "mlp": ("a perceptron in layers, bundled, in closed form", "zoo.benchmarks.snnk", "mlp"),
        "conversion": ("feed-forward networks of a text encoder, converted", "zoo.benchmarks.snnk_text", "conversion"),
        "adapters": ("adapters on a text encoder", "zoo.benchmarks.snnk_text", "adapters"),
    },
    "modalities": {
        "floors": ("what linear models reach on the modalities' data", "zoo.benchmarks.modalities", "floors"),
    },
    "gkcl": {
        "speed": ("a KCL step and an evaluation against the plain form", "zoo.benchmarks.gkcl", "speed"),
        "streams": ("every learner on 20 tasks of MNIST-5k", "zoo.benchmarks.gkcl", "streams"),
        "split": ("every learner on split digits", "zoo.benchmarks.gkcl", "split"),
        "ablations": ("what replay, contrast, drift control and samples do", "zoo.benchmarks.gkcl", "ablations"),
        "full": ("the streams on whole MNIST", "zoo.benchmarks.gkcl", "full"),
        "tuning": ("passes and rate of the joint learner", "zoo.benchmarks.gkcl", "tuning"),
    },
    "models": {
        "inference": ("forward passes: plain, zoo and timm's peers", "zoo.benchmarks.models", "inference"),
        "training": ("a training step: plain and zoo", "zoo.benchmarks.models", "training"),
    },
    "terminator": {
        "speed": ("a training step and inference against the plain form", "zoo.benchmarks.terminator_speed", "speed"),
        "pixels": ("digits and clothes beside other networks", "zoo.benchmarks.terminator", "pixels"),
        "options": ("what its options do to accuracy", "zoo.benchmarks.terminator", "options"),
    },
    "compose": {
        "heads": ("GRBF, kernel ridge and linear heads on frozen features", "zoo.tools.compose", "heads"),
        "continual": ("AnalyticRidge on frozen features, class by class", "zoo.tools.compose", "continual"),
        "adapters": ("SNNK adapters in a ConvNet and a transformer", "zoo.tools.compose", "adapters"),
    },
    "deploy": {
        "export": ("shipped weights exported, run without the zoo, and in int8", "zoo.tools.deployment", "run"),
    },
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 when it is done, 1 on an error told in words, 2 on a wrong call."""
    bound_waiting()
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
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        memory = _is_of_memory(error)
        if not memory and not type(error).__module__.startswith("zoo"):
            raise
        print(f"error: {'there is not enough memory for this' if memory else shown(error)}", file=sys.stderr)
        return 1


def _is_of_memory(error: Exception) -> bool:
    """Whether memory has run out, which torch tells as an error of any kind."""
    return isinstance(error, MemoryError) or (
        type(error).__module__ in ("builtins", "torch") and "memory" in str(error) and "allocate" in str(error)
    )


Commands = Any  # argparse's own name for it is private


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    parser = argparse.ArgumentParser(
        prog="python -m zoo",
        description="Kernel Zoo: look at models, use their weights, measure and deploy them. Training is train.py.",
        epilog="`python -m zoo COMMAND --help` tells more; --json prints for machines where a command has it.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in (
        _add_list,
        _add_info,
        _add_predict,
        _add_validate,
        _add_compare,
        _add_report,
        _add_figure,
        _add_export,
        _add_benchmark,
        _add_results,
        _add_build,
        _add_ship,
        _add_cards,
        _add_push,
        _add_completion,
    ):
        add(commands)
    return parser


# ---- looking at models -------------------------------------------------------------------------------------

_MODEL = "name with its tag (grbf.wine), local-dir:FOLDER, or the folder of a run"


def _json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, for machines")


def _told(options: argparse.Namespace, content: Any, lines: Sequence[str]) -> int:
    """Print a result for people, or as JSON."""
    if options.json:
        print(shown(json.dumps(content, indent=2, ensure_ascii=False)))
    else:
        print("\n".join(map(shown, lines)))
    return 0


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as aligned text."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _add_list(commands: Commands) -> None:
    parser = commands.add_parser("list", help="models and weights", description="List the zoo's models or weights.")
    parser.add_argument("filter", nargs="?", default="", help="with wildcards: 'unireplknet_*'")
    parser.add_argument("--pretrained", action="store_true", help="weights instead of architectures")
    _json_option(parser)
    parser.set_defaults(run=_list)


def _list(options: argparse.Namespace) -> int:
    from zoo.tools.info import listing

    rows = listing(options.filter, options.pretrained)
    if not rows:
        print(f"nothing matches {options.filter!r}", file=sys.stderr)
        return 1
    if not options.pretrained:
        return _told(options, rows, [row["name"] for row in rows])
    shown = [["name", "figure", "data", "weights"]]
    for row in rows:
        figure = f"published top-1 {row['published_top1']:.2f} %" if "published_top1" in row else ""
        if "value" in row:
            figure = f"{row['metric']} {row['value']:.4f} ({row['n']} seeds: {row['mean']:.4f})"
        shown.append([row["name"], figure, row.get("data", ""), row["weights"]])
    return _told(options, rows, _columns(shown))


def _add_info(commands: Commands) -> None:
    parser = commands.add_parser(
        "info",
        help="parameters, multiply-adds, memory, receptive field, card",
        description="Tell what a model is and costs.",
    )
    parser.add_argument("model", help="name of the zoo or of timm, with or without a tag, or local-dir:FOLDER")
    parser.add_argument("--size", type=_positive, help="side of the images in pixels (the record's own)")
    parser.add_argument("--card", action="store_true", help="print the card of shipped weights instead")
    _json_option(parser)
    parser.set_defaults(run=_info)


def _info(options: argparse.Namespace) -> int:
    if options.card:
        from zoo.models import shipped
        from zoo.tools.cards import card

        record = shipped.record(options.model)
        return _told(options, record, [card(record)])
    from zoo.tools.info import describe

    facts = describe(options.model, options.size)
    field = facts["receptive_field"]
    rows = [
        ["model", f"{facts['name']} ({facts['class']})"],
        ["input", " x ".join(map(str, facts["input"]))],
        ["outputs", f"{facts['num_classes']}, from {facts['num_features']} features"],
        ["parameters", f"{facts['parameters']:,}; {facts['parameters_deploy']:,} in deploy form"],
        ["multiply-adds", f"{facts['macs']:,} an input, deploy form"],
        ["memory", f"weights {facts['weights_mib']} MiB, largest layer {facts['largest_layer_mib']} MiB an input"],
        ["effective field", ", ".join(f"{k} within {v} px" for k, v in field.items()) if field else "no maps"],
        ["weights", facts["weights"] or "fresh"],
    ]
    rows += [["published", f"top-1 {facts['published_top1']:.2f} %"]] if "published_top1" in facts else []
    rows += [[key, str(facts[key])] for key in ("license", "paper_ids", "origin_url") if key in facts]
    if "record" in facts:
        record = facts["record"]
        metric = record["metric"]
        rows += [["trained on", record["data"]["title"]], ["trained by", record["command"]]]
        rows += [["figure", f"{metric['name']} {metric['value']:.4f}; {metric['n']} seeds: mean {metric['mean']:.4f}, "
                  f"s.d. {metric['sd']:.4f}"]]  # fmt: skip
    return _told(options, facts, _columns(rows))


# ---- using weights -----------------------------------------------------------------------------------------


def _add_predict(commands: Commands) -> None:
    parser = commands.add_parser(
        "predict",
        help="classes or values of images, recordings, tables or series",
        description="Classify images or recordings, classify or evaluate the rows of CSV files, or forecast a series.",
    )
    parser.add_argument("model", help=_MODEL)
    parser.add_argument("files", nargs="+", type=Path, help="images, recordings (wav, flac, ogg, mp3) or CSV files")
    parser.add_argument("--top", type=_positive, default=5, help="classes to name (5)")
    parser.add_argument(
        "--no-header", action="store_true", help="tables begin with a row; their columns stand in the model's order"
    )
    parser.add_argument("--out", type=Path, help="a picture of the first answer: .png, .svg or .pdf")
    _json_option(parser)
    parser.set_defaults(run=_predict)


def _predict(options: argparse.Namespace) -> int:
    if options.out:
        check_output(options.out, PICTURES)
    from zoo.tools.prediction import draw, predict

    found = predict(options.model, options.files, options.top, header=not options.no_header)
    lines = []
    for entry in found:
        where = f"{entry['file']}{', row ' + str(entry['row']) if 'row' in entry else ''}"
        if "forecast" in entry:
            lines += _forecast_lines(where, entry)
        elif "value" in entry:
            lines.append(f"{where}: {entry['value']:.6g}")
        else:
            answers = ", ".join(f"{p['class']} {p['probability']:.1%}" for p in entry["predictions"])
            lines.append(f"{where}: {answers}")
        if "note" in entry:
            print(f"note: {shown(entry['note'])}", file=sys.stderr)
    if options.out:
        from zoo.files import write_atomic

        figure = draw(found[0], options.model)
        write_atomic(options.out, lambda file: figure.savefig(file, format=options.out.suffix.lower()[1:], dpi=120))
        lines.append(f"picture: {options.out}")
    return _told(options, found, lines)


def _forecast_lines(where: str, entry: dict[str, Any]) -> list[str]:
    """A forecast as lines: the names of its values, then one line for each step."""
    steps = entry["times"] or [f"step {i + 1}" for i in range(len(entry["forecast"]))]
    lines = [f"{where}: {', '.join(entry['columns'])}"]
    values = (", ".join(f"{value:.6g}" for value in row) for row in entry["forecast"])
    return [*lines, *(f"{step}: {row}" for step, row in zip(steps, values, strict=True))]


def _add_compare(commands: Commands) -> None:
    parser = commands.add_parser(
        "compare",
        help="two models on one data set",
        description="Run two models over the same test rows: accuracy, agreement, sign test, cost.",
    )
    parser.add_argument("a", help=_MODEL)
    parser.add_argument("b", help="the other one")
    parser.add_argument("--data", help="the one whose data set is used (the first)")
    parser.add_argument("--html", type=Path, help="also write a report with the confusion matrices, .html")
    _json_option(parser)
    parser.set_defaults(run=_compare)


def _compare(options: argparse.Namespace) -> int:
    if options.html:
        check_output(options.html, PAGES)
    from zoo.tools.comparison import compare

    found = compare(options.a, options.b, options.data)
    plain = {k: v for k, v in found.items() if k not in ("outputs_a", "outputs_b", "targets")}
    keys = [k for k in ("accuracy", "rmse", "r2", "parameters", "ms") if k in found["a"]]
    rows = [["", found["a"]["name"], found["b"]["name"]]]
    for key in keys:
        cells = [found[side][key] for side in "ab"]
        label = "CPU ms an input" if key == "ms" else key
        rows.append([label, *(f"{c:,}" if isinstance(c, int) else f"{c:.4f}" for c in cells)])
    lines = [f"{found['n']} test rows of {found['data']}", *_columns(rows)]
    if "p" in found:
        lines.append(
            f"agree on {found['agreement']:.1%}; only the first right on {found['only_a']}, only the second on "
            f"{found['only_b']}, sign test p = {found['p']:.3g}"
        )
    else:
        lines.append(f"values correlate at {found['agreement']:.4f}")
    if options.html:
        from zoo.tools.report import write_report

        report = write_report(options.html, options.a, options.b)
        for note in report["notes"]:
            print(f"note: {shown(note)}", file=sys.stderr)
        lines.append(f"report: {report['file']}")
    return _told(options, plain, lines)


def _add_report(commands: Commands) -> None:
    parser = commands.add_parser(
        "report",
        help="one HTML file about a run, a weight, or two of them",
        description="Write one HTML file with everything in it: curves, confusion, mistakes, importances, kernels, "
        "accuracy matrix, facts.",
    )
    parser.add_argument("model", help=_MODEL)
    parser.add_argument("other", nargs="?", help="one to compare it with, on the data of the first")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the file (report.html)")
    _json_option(parser)
    parser.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    check_output(options.out, PAGES)
    from zoo.tools.report import write_report

    found = write_report(options.out, options.model, options.other)
    for note in found["notes"]:
        print(f"note: {shown(note)}", file=sys.stderr)
    return _told(options, found, [f"{found['file']}: {', '.join(found['sections'])}"])


def _add_export(commands: Commands) -> None:
    parser = commands.add_parser(
        "export",
        help="exported program and ONNX with a dynamic batch, checked",
        description="Write model.pt2 (torch.export) and model.onnx in deploy form, with a dynamic batch, and compare "
        "both with eager PyTorch.",
    )
    parser.add_argument("model", help=_MODEL)
    parser.add_argument("--out", type=Path, help="folder (MODEL-export)")
    parser.add_argument("--format", nargs="+", choices=("program", "onnx"), default=["program", "onnx"])
    parser.add_argument("--size", type=_positive, help="side of the images in pixels (the record's own)")
    parser.add_argument(
        "--int8", action="store_true", help="also dynamic int8, kept if accuracy falls by at most 0.5 %%"
    )
    _json_option(parser)
    parser.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> int:
    folder = check_output(options.out or f"{Path(options.model.removeprefix('local-dir:')).name}-export")
    from zoo.tools.export import export, quantize

    found = export(options.model, folder, tuple(options.format), options.size)
    lines = [
        f"{folder / found[kind]['file']}: {found[kind]['bytes']:,} bytes, largest difference "
        f"{found[kind]['max_difference']:.2g} on batches of {', '.join(map(str, found[kind]['batches']))}"
        for kind in options.format
    ]
    if options.int8:
        small = found["int8"] = quantize(options.model, folder)
        lines.append(
            f"int8: accuracy {small['accuracy']:.4f} -> {small['accuracy_int8']:.4f} (n = {small['n']}), "
            f"{small['bytes']:,} -> {small['bytes_int8']:,} bytes, {small['times_faster']:.2f} times as fast; "
            + ("kept" if small["kept"] else "not kept")
        )
    return _told(options, found, lines)


# ---- measuring ---------------------------------------------------------------------------------------------


def _add_benchmark(commands: Commands) -> None:
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
    parser.add_argument("--table", action="store_true", help="measure nothing, write the table of the rows there are")
    parser.add_argument(
        "--models", nargs="+", metavar="MODEL", help="models: names of the zoo or of timm; gkcl: learners of its tables"
    )
    own = parser.add_argument_group("of `models`, which measures anew each time")
    own.add_argument("--batch", type=_positive, help="images a call (8)")
    own.add_argument("--size", type=_positive, help="side of the images in pixels (224)")
    own.add_argument("--threads", type=_positive, nargs="+", help="numbers of threads, one after the other")
    own.add_argument("--rounds", type=_positive, help="timed calls of each form")
    own.add_argument("--compile", action="store_true", default=None, help="also after torch.compile")
    own.add_argument("--precision", nargs="+", choices=("float32", "bfloat16"), help="of forward passes (float32)")
    own.add_argument("--device", type=_device, help="cpu (default) or cuda")
    own.add_argument(
        "--wait", nargs="+", choices=("active", "passive", "spin 30000"), help="how threads wait, one after the other"
    )
    trained = parser.add_argument_group("of measurements that train")
    trained.add_argument("--data", nargs="+", metavar="NAME", help="which data sets")
    trained.add_argument("--root", help="where their files lie (the cache)")
    trained.add_argument("--steps", type=_positive, help="training steps of each run")
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
    check_output(options.out)
    if options.table and options.name in ("speed", "inference", "training"):
        parser.error(f"{options.name} measures anew each time, and writes its table when it has")
    from zoo.benchmarks.records import Records

    Records.frozen = options.table
    try:
        for name in [options.name] if options.name else entries:
            _, module, function = entries[name]
            measure = getattr(importlib.import_module(module), function)
            for line in measure(options.out.absolute(), **_given(parser, options, measure)):
                print(shown(line), flush=True)
    finally:
        Records.frozen = False
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


_OPTIONS = (
    "models", "batch", "size", "threads", "rounds", "compile", "precision", "device", "wait", "data", "root", "steps",
)  # fmt: skip


def _add_results(commands: Commands) -> None:
    parser = commands.add_parser(
        "results",
        help="table of finished runs, written into RESULTS.md and README.md",
        description="Tabulate run folders, the seeds of an experiment in one row, and write the table into RESULTS.md "
        "and, between its marks, into README.md.",
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs, for example outputs/mnist5k/*")
    parser.add_argument("--section", default="runs", help="section of the documents that is written (runs)")
    parser.set_defaults(run=_results)


def _results(options: argparse.Namespace) -> int:
    from zoo.benchmarks.runs import tabulate

    for line in tabulate(options.runs, [Path("RESULTS.md"), Path("README.md")], options.section):
        print(shown(line))
    return 0


def _add_validate(commands: Commands) -> None:
    parser = commands.add_parser(
        "validate",
        help="the figure of a card again, or accuracy on a folder of images",
        description="Without --data: evaluate shipped weights, or a run, on the test part of their own data, prepared "
        "as the record says, and compare with the record. With --data: classify a folder of images and print the "
        "accuracy beside the published one.",
    )
    parser.add_argument("model", nargs="?", help=_MODEL)
    parser.add_argument("--model", dest="named", metavar="MODEL", help=argparse.SUPPRESS)  # the older form
    parser.add_argument("--data", type=Path, help="folder with val/, or with one folder per class")
    parser.add_argument("--root", help="without --data: where the data set of the record lies (the cache)")
    parser.add_argument(
        "--checkpoint", type=Path, help="with --data: a file with the weights, instead of fetching them"
    )
    parser.add_argument("--batch", type=_positive, default=64, help="images a step (64)")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images (0: this one)")
    parser.add_argument("--device", type=_device, default="cpu", help="cpu (default) or cuda")
    _json_option(parser)
    parser.set_defaults(run=lambda options: _validate(parser, options))


def _validate(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    model = options.model or options.named
    if model is None:
        parser.error("name a model")
    if options.data is None:
        return _validate_record(model, options)
    from zoo.validation import validate

    found = validate(
        model,
        options.data,
        checkpoint=options.checkpoint,
        batch_size=options.batch,
        num_workers=options.workers,
        device=options.device,
    )
    return _told(options, vars(found), [str(found)])


def _validate_record(model: str, options: argparse.Namespace) -> int:
    from zoo.tools.evaluation import validate

    found = validate(model, root=options.root, progress=sys.stderr.isatty() and not options.json)
    lines = [f"{found['name']} on the test part of {found['data']}, deploy form"]
    lines += [f"  {key} {value:.4f}; on record {found['recorded'][key]:.4f}" for key, value in found["found"].items()]
    how = ", ".join(f"{k} {v}" for k, v in found["preprocessing"].items())
    lines += [f"  prepared with {how}", "reproduced" if found["reproduced"] else "NOT reproduced"]
    _told(options, found, lines)
    return 0 if found["reproduced"] else 1


def _add_figure(commands: Commands) -> None:
    parser = commands.add_parser(
        "figure",
        help="a picture of what a model looks at, as PNG",
        description="Draw the effective receptive field of a model, the merged kernels of one of its layers, the "
        "hyper-kernels of a Terminator, as they are or for one image, or the losses of a run.",
    )
    kinds = ("receptive-field", "kernels", "hyper-kernels", "context-kernels", "losses")
    parser.add_argument("kind", choices=kinds)
    parser.add_argument("--model", required=True, help="name of the zoo or of timm, or local-dir:FOLDER")
    parser.add_argument("--checkpoint", type=Path, help="a file with the weights of a model given by name")
    parser.add_argument("--pretrained", action="store_true", help="fetch the released weights")
    parser.add_argument("--data", type=Path, help="folder of images to use instead of noise; losses: the run")
    parser.add_argument("--count", type=_positive, help="images to average over (16), or kernels to show (32)")
    parser.add_argument("--stage", type=int, default=-1, help="receptive-field: which feature map (-1, the last)")
    parser.add_argument("--layer", help="kernels: name of the layer (the first large one)")
    parser.add_argument("--out", type=Path, help="the picture: .png, .svg or .pdf (MODEL-KIND.png)")
    parser.set_defaults(run=_figure)


def _figure(options: argparse.Namespace) -> int:
    out = options.out or Path(f"{options.model.rpartition('/')[2].replace(':', '-')}-{options.kind}.png")
    check_output(out, PICTURES)
    from zoo.gallery import draw

    print(shown(draw(options.kind, options.model, out, **{k: v for k, v in vars(options).items() if k in _DRAWN})))
    return 0


_DRAWN = ("checkpoint", "pretrained", "data", "count", "stage", "layer")


# ---- weights that ship -------------------------------------------------------------------------------------


def _add_ship(commands: Commands) -> None:
    parser = commands.add_parser(
        "ship",
        help="weights, record and card from run folders",
        description="Of the runs of one experiment with several seeds, ship the one with the best validation metric: "
        "copy its weights and write their record, card and row of the tables.",
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs that differ in the seed")
    parser.add_argument("--tag", help="what follows the dot of the name (the experiment's name)")
    parser.add_argument("--license", default="apache-2.0", help="of the weights (apache-2.0)")
    parser.add_argument("--folder", type=Path, default=Path("checkpoints"), help="where they go (checkpoints)")
    _json_option(parser)
    parser.set_defaults(run=_ship)


def _ship(options: argparse.Namespace) -> int:
    check_output(options.folder)
    from zoo.tools.cards import write
    from zoo.tools.release import ship

    path, record = ship(options.runs, options.tag, options.folder, options.license)
    if options.folder == Path("checkpoints"):
        write(Path())
    metric = record["metric"]
    line = f"{path}: {metric['name']} {metric['value']:.4f}, seed {metric['seed']} of {metric['n']}"
    return _told(options, record, [line])


def _add_cards(commands: Commands) -> None:
    parser = commands.add_parser(
        "cards",
        help="write the cards and tables of the shipped weights, or check them",
        description="Write the card of every shipped weight, and the tables of RESULTS.md and README.md, from the "
        "records.",
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if anything disagrees")
    parser.add_argument("--root", type=Path, default=Path(), help="the checkout (here)")
    _json_option(parser)
    parser.set_defaults(run=_cards)


def _cards(options: argparse.Namespace) -> int:
    from zoo.tools.cards import check, write

    if not options.check:
        written = list(map(str, write(options.root)))
        return _told(options, written, written)
    problems = check(options.root)
    _told(options, problems, problems or ["pages, cards and records agree"])
    return 1 if problems else 0


def _add_push(commands: Commands) -> None:
    parser = commands.add_parser(
        "push",
        help="publish weights with their card in the standard hub layout",
        description="Write config.json, model.safetensors and README.md to a hub repository or a folder.",
    )
    parser.add_argument("model", help="shipped weight, or the folder of a run")
    parser.add_argument("target", help="hf-hub:ORGANISATION/NAME or local-dir:FOLDER")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.set_defaults(run=_push)


def _push(options: argparse.Namespace) -> int:
    from zoo.tools.hub import push

    place = push(options.model, options.target, private=options.private)
    print(f"zoo.create_model({python_text(place)}, pretrained=True)")
    return 0


# ---- compiled loops ----------------------------------------------------------------------------------------


def _add_build(commands: Commands) -> None:
    parser = commands.add_parser(
        "build",
        help="compile the loops in C ahead of time",
        description="Compile the loops in C for this machine, which the first model to need them does otherwise, and "
        "say where they are kept. The environment variable ZOO_CACHE names another folder, CC another compiler, "
        "ZOO_NATIVE_ARCH another processor.",
    )
    _json_option(parser)
    parser.set_defaults(run=_build)


def _build(options: argparse.Namespace) -> int:
    import torch  # noqa: F401  its threads are found when the library is loaded

    from zoo.kernels import building, native

    path = building.build(native.SOURCE)[1]
    if path is None:
        folder = building.cache_folder()
        raise building.NativeError(f"{folder} cannot be used, not writable or not private; ZOO_CACHE names another")
    return _told(options, {"library": str(path)}, [str(path)])


# ---- completion --------------------------------------------------------------------------------------------


def _add_completion(commands: Commands) -> None:
    parser = commands.add_parser(
        "completion",
        help="completion of commands, options and models for bash or zsh",
        description="Print a script that completes `kernel-zoo` and `python -m zoo`: eval it in your shell's start-up "
        'file, `eval "$(python -m zoo completion bash)"`.',
    )
    parser.add_argument("shell", choices=("bash", "zsh"))
    parser.set_defaults(run=_completion)


def _completion(options: argparse.Namespace) -> int:
    import zoo

    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    models = " ".join([*zoo.list_models(pretrained=True), *zoo.list_models()])
    cases = []
    for name, parser in commands.choices.items():
        flags = " ".join(o for a in parser._actions for o in a.option_strings if o.startswith("--"))
        extra = " $models" if name in ("info", "predict", "validate", "compare", "report", "export", "push") else ""
        if name == "benchmark":
            extra = " " + " ".join([*BENCHMARKS, *(n for entries in BENCHMARKS.values() for n in entries)])
        cases.append(f'    {name}) words="{flags}{extra}" ;;')
    script = _SCRIPT.format(commands=" ".join(commands.choices), cases="\n".join(cases), models=models)
    print(("autoload -U +X bashcompinit && bashcompinit\n" if options.shell == "zsh" else "") + script)
    return 0


_SCRIPT = """_kernel_zoo() {{
  local at=1 words models="{models}"
  [[ ${{COMP_WORDS[0]}} == python* ]] && at=3
  if [[ $at == 3 && ( ${{COMP_WORDS[1]}} != -m || ${{COMP_WORDS[2]}} != zoo ) ]]; then return; fi
  local now="${{COMP_WORDS[COMP_CWORD]}}"
  if (( COMP_CWORD == at )); then words="{commands}"; else case "${{COMP_WORDS[at]}}" in
{cases}
  esac; fi
  COMPREPLY=( $(compgen -W "$words" -- "$now") )
}}
complete -o default -F _kernel_zoo kernel-zoo python python3"""


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
