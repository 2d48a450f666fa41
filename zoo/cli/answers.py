"""Commands that use weights: predict, compare, report, export, validate."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.cli.common import MODEL, columns, command, device, json_option, positive, told
from zoo.support.quoting import shown
from zoo.support.values import PAGES, PICTURES, check_output


class _Place(argparse.Action):
    """Stores where the data is, under the word of the option."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        word = str(option_string).lstrip("-")
        if not values:
            raise argparse.ArgumentError(self, "it is empty, as from an unset variable: name the path")
        namespace.root = {
            **(namespace.root or {}),
            next(w for w in ("path", "cache", "root") if w.startswith(word)): values,
        }


def _place_options(parser: argparse.ArgumentParser, when: str = "") -> None:
    """Add `--path`, `--cache`, and `--root`, the older word for both."""
    parser.add_argument("--path", dest="root", action=_Place, help=f"{when}where the run's own data lies now")
    parser.add_argument("--cache", dest="root", action=_Place, help=f"{when}where fetched data lies (the cache)")
    parser.add_argument("--root", dest="root", action=_Place, help=argparse.SUPPRESS)


@command("predict", "classes or values of files of any kind that the model takes")
def add_predict(parser: argparse.ArgumentParser) -> None:
    """Classify images, recordings, videos, point clouds, spectra and texts; predict rows of tables; forecast series."""
    parser.add_argument("model", help=MODEL)
    parser.add_argument(
        "files", nargs="+", type=Path, help="of the kind that the model takes, folders or lists of them"
    )
    parser.add_argument("--file-column", default="file", help="of a list, .csv: the column of the names (file)")
    parser.add_argument("--top", type=positive, default=5, help="classes to name (5)")
    parser.add_argument(
        "--no-header", action="store_true", help="tables begin with a row; their columns stand in the model's order"
    )
    parser.add_argument("--out", type=Path, help="a picture of the first answer: .png, .svg or .pdf")
    parser.add_argument("--csv", type=Path, help="also write the answers as a table, .csv")
    json_option(parser)
    parser.set_defaults(run=_predict)


def _predict(options: argparse.Namespace) -> int:
    if options.out:
        check_output(options.out, PICTURES, options.files)
    if options.csv:
        check_output(options.csv, (".csv",), options.files)
    from zoo.tools.prediction import draw, predict, write_table

    found = predict(
        options.model, options.files, options.top, header=not options.no_header, file_column=options.file_column
    )
    lines = []
    for entry in found:
        where = f"{entry['file']}{', row ' + str(entry['row']) if 'row' in entry else ''}"
        if "forecast" in entry:
            lines += _forecast_lines(where, entry)
        elif "value" in entry:
            lines.append(f"{where}: {entry['value']:.6g}")
        elif "values" in entry:
            lines.append(f"{where}: {', '.join(f'{value:.6g}' for value in entry['values'])}")
        else:
            answers = ", ".join(
                p["class"] + (f" {p['probability']:.1%}" if "probability" in p else "") for p in entry["predictions"]
            )
            lines.append(f"{where}: {answers}")
        if "note" in entry:
            print(f"note: {shown(entry['note'], keep='')}", file=sys.stderr)
    if options.out:
        from zoo.analysis.plots import save_figure

        save_figure(draw(found[0], options.model), options.out)
        lines.append(f"picture: {options.out}")
    if options.csv:
        write_table(options.csv, found)
        lines.append(f"table: {options.csv}")
    return told(options, found, [shown(line, keep="") for line in lines])  # an answer, a line, whatever the names hold


def _forecast_lines(where: str, entry: dict[str, Any]) -> list[str]:
    """Format a forecast: a line with the names of its values, then one line per step."""
    steps = entry["times"] or [f"step {i + 1}" for i in range(len(entry["forecast"]))]
    lines = [f"{where}: {', '.join(entry['columns'])}"]
    values = (", ".join(f"{value:.6g}" for value in row) for row in entry["forecast"])
    return [*lines, *(f"{step}: {row}" for step, row in zip(steps, values, strict=True))]


@command("compare", "two models on one data set")
def add_compare(parser: argparse.ArgumentParser) -> None:
    """Evaluate two models on the same test rows (validation rows of data without a test): accuracy, agreement, sign
    test, time.
    """
    parser.add_argument("a", help=MODEL)
    parser.add_argument("b", help="the other one")
    parser.add_argument("--data", help="the one whose data set is used (the first)")
    _place_options(parser)
    parser.add_argument("--html", type=Path, help="also write a report with the confusion matrices, .html")
    json_option(parser)
    parser.set_defaults(run=_compare)


def _compare(options: argparse.Namespace) -> int:
    if options.html:
        check_output(options.html, PAGES)
    from zoo.tools.comparison import compare

    found = compare(options.a, options.b, options.data, root=options.root)
    plain = {k: v for k, v in found.items() if k not in ("outputs_a", "outputs_b", "targets")}
    keys = [k for k in ("accuracy", "rmse", "r2", "parameters", "ms") if k in found["a"]]
    rows = [["", found["a"]["name"], found["b"]["name"]]]
    for key in keys:
        cells = [found[side][key] for side in "ab"]
        label = "CPU ms an input" if key == "ms" else key
        rows.append([label, *(f"{c:,}" if isinstance(c, int) else f"{c:.4f}" for c in cells)])
    lines = [f"{found['n']} {found['part']} rows of {found['data']}", *columns(rows)]
    if "p" in found:
        lines.append(
            f"agree on {found['agreement']:.1%}; only the first right on {found['only_a']}, only the second on "
            f"{found['only_b']}, sign test p = {found['p']:.3g}"
        )
    else:
        lines.append(f"values correlate at {found['agreement']:.4f}")
    lines += [f"note: {note}" for note in found["notes"]]
    if options.html:
        from zoo.tools.report import write_report

        report = write_report(options.html, options.a, options.b, options.root)
        for note in report["notes"]:
            print(f"note: {shown(note)}", file=sys.stderr)
        lines.append(f"report: {report['file']}")
    return told(options, plain, lines)


@command("report", "one HTML file about a run, a weight, or two of them")
def add_report(parser: argparse.ArgumentParser) -> None:
    """Write a self-contained HTML report: curves, confusion, mistakes, importances, kernels, accuracy matrix, facts."""
    parser.add_argument("model", help=MODEL)
    parser.add_argument("other", nargs="?", help="one to compare it with, on the data of the first")
    _place_options(parser)
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the file (report.html)")
    json_option(parser)
    parser.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    check_output(options.out, PAGES)
    from zoo.tools.report import write_report

    found = write_report(options.out, options.model, options.other, options.root)
    for note in found["notes"]:
        print(f"note: {shown(note)}", file=sys.stderr)
    return told(options, found, [f"{found['file']}: {', '.join(found['sections'])}"])


@command("export", "exported program and ONNX with a dynamic batch, checked")
def add_export(parser: argparse.ArgumentParser) -> None:
    """Export a model in deploy form as model.pt2 (torch.export) and model.onnx, with a dynamic batch size, and compare
    both with eager PyTorch.
    """
    parser.add_argument("model", help=MODEL)
    parser.add_argument("--out", type=Path, help="folder (MODEL-export)")
    parser.add_argument("--format", nargs="+", choices=("program", "onnx"), default=["program", "onnx"])
    parser.add_argument("--size", type=positive, help="side of the images in pixels (the record's own)")
    parser.add_argument(
        "--int8", action="store_true", help="also dynamic int8, kept if accuracy falls by at most 0.5 %%"
    )
    json_option(parser)
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
    return told(options, found, lines)


@command("validate", "the figure of a card again, or accuracy on a folder of images or a table")
def add_validate(parser: argparse.ArgumentParser) -> None:
    """Without --data: evaluate shipped weights, or a run, on the test part of their own data (without a test, on the
    validation part), and compare with the record. With --data: classify a folder of images, and print the accuracy
    beside the published one; or predict the rows of a table, and compare with its column of the target.
    """
    parser.add_argument("model", nargs="?", help=MODEL)
    parser.add_argument("--model", dest="named", metavar="MODEL", help=argparse.SUPPRESS)  # the older form
    parser.add_argument(
        "--data",
        type=Path,
        help="folder with val/, or with one folder per class; a list of images, .csv; of a model of tables: a table",
    )
    parser.add_argument("--target", help="of an estimator: column of the right answers (the one that is no input)")
    _place_options(parser, "without --data: ")
    parser.add_argument("--file-column", default="file", help="of a list in --data: the column of the names (file)")
    parser.add_argument("--class-column", default="class", help="of a list in --data: the column of classes (class)")
    parser.add_argument(
        "--checkpoint", type=Path, help="with --data: a file with the weights, instead of fetching them"
    )
    parser.add_argument("--batch", type=positive, default=64, help="images a step (64)")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images (0: this one)")
    parser.add_argument("--device", type=device, default="cpu", help="cpu (default) or cuda")
    json_option(parser)
    parser.set_defaults(run=lambda options: _validate(parser, options))


def _validate(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    model = options.model or options.named
    if model is None:
        parser.error("name a model")
    if options.data is None:
        return _validate_record(model, options)
    from zoo.tools.estimators import score
    from zoo.tools.pretrained import holds_estimator

    if holds_estimator(model):
        figures = score(model, options.data, options.target)
        numbers = ", ".join(f"{k} {figures[k]:.4f}" for k in ("accuracy", "rmse", "r2") if figures.get(k) is not None)
        return told(options, figures, [f"{figures['name']} on {figures['rows']} rows of {figures['data']}: {numbers}"])
    from zoo.tools.validation import validate

    found = validate(
        model,
        options.data,
        checkpoint=options.checkpoint,
        batch_size=options.batch,
        num_workers=options.workers,
        device=options.device,
        columns={"file": options.file_column, "class": options.class_column},
    )
    return told(options, vars(found), [str(found)])


def _verdict(found: Mapping[str, Any]) -> str:
    if found["reproduced"] is None:
        return f"not compared: the record is of {found['on_record']} rows, this of {found['rows']}"
    return "reproduced" if found["reproduced"] else "NOT reproduced"


def _validate_record(model: str, options: argparse.Namespace) -> int:
    from zoo.tools.evaluation import validate

    found = validate(model, root=options.root, progress=sys.stderr.isatty() and not options.json)
    lines = [f"{found['name']} on the {found['part']} part of {found['data']}, deploy form"]
    lines += [f"  {key} {value:.4f}; on record {found['recorded'][key]:.4f}" for key, value in found["found"].items()]
    how = ", ".join(f"{k} {v}" for k, v in found["preprocessing"].items())
    lines += [f"  prepared with {how}", _verdict(found)]
    told(options, found, lines)
    return 0 if found["reproduced"] else 1
