"""Self-contained HTML report of a run, a weight or a comparison, without scripts or external resources.

>>> write_report("report.html", "outputs/digits/DATE")
>>> write_report("report.html", "unireplknet_z.mnist5k", "unireplknet_z.digits")
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.analysis.plots import ACCENT, COLOR, GREY, given_or_new, new_figure
from zoo.analysis.probes import Subject, look, probe
from zoo.data.series import in_units
from zoo.results.runs import rows_of
from zoo.support import inputs
from zoo.support.files import write_atomic, writer_of
from zoo.support.quoting import shown
from zoo.support.values import MAKER, PAGES, check_output, read_curves, read_text
from zoo.tools.comparison import compare, decide, outputs_of
from zoo.tools.evaluation import Places, batches, build_data, load, part_of, record_of

__all__ = ["curves", "plot_accuracy_matrix", "plot_confusion", "write_report"]

Picture = tuple[str, str]  # base64-encoded PNG and caption

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --soft: #5b6a79; --line: #d9e0e7; --paper: #fff; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9aa7b4; --line: #30363d; --paper: #0d1117; --card: #161b22; }
  img { background: #fff; }
}
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 68rem; padding: 2rem 1.2rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p, figcaption { color: var(--soft); margin: 0 0 .8rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
td, th { text-align: left; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; }
td:first-child { color: var(--soft); white-space: nowrap; }
code { font-size: .88em; background: var(--card); padding: .1em .3em; border-radius: 4px; }
.row { display: flex; flex-wrap: wrap; gap: 1.2rem; } figure { margin: 0; flex: 1 1 24rem; min-width: 0; }
img { max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: 6px; display: block; }
figcaption { font-size: .85rem; margin: .4rem 0 0; }
.tiles { display: flex; gap: .8rem; flex-wrap: wrap; margin: 1.2rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .6rem 1rem; }
.tile b { display: block; font-size: 1.35rem; } .tile span { color: var(--soft); font-size: .85rem; }
"""


#: The page. All values are auto-escaped; nothing is marked as safe.
_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{{ title }}</title>
<meta name="generator" content="{{ maker }}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{{ style }}</style>
<body>
{% for part in parts %}
{% if part.heading %}<h1>{{ part.heading }}</h1>
<p>{{ part.text }}</p>
{% elif part.tiles %}<div class="tiles">
{% for value, name in part.tiles %}<div class="tile"><b>{{ value }}</b><span>{{ name }}</span></div>{% endfor %}
</div>
{% else %}<section><h2>{{ part.title }}</h2>
{% if part.text %}<p>{{ part.text }}</p>{% endif %}
{% for note in part.notes %}<p>{{ note }}</p>{% endfor %}
{% if part.figures %}<div class="row">{% for image, text in part.figures %}<figure><img alt="{{ text }}" \
src="data:image/png;base64,{{ image }}"><figcaption>{{ text }}</figcaption></figure>{% endfor %}</div>{% endif %}
{% if part.rows %}<table>
{% if part.header %}<tr>{% for name in part.header %}<th>{{ name }}</th>{% endfor %}</tr>{% endif %}
{% for row in part.rows %}<tr>{% for cell in row %}<td>\
{% if cell is mapping %}<code>{{ cell.code }}</code>{% else %}{{ cell }}{% endif %}</td>{% endfor %}</tr>
{% endfor %}</table>{% endif %}
</section>
{% endif %}
{% endfor %}
</body>
</html>
""".replace("\\\n", "")


@dataclass
class Part:
    """A part of the page: a heading, tiles, or a section with text, pictures, a table, and notes on missing data."""

    name: str
    title: str = ""
    heading: str = ""
    text: str = ""
    tiles: Sequence[tuple[str, str]] = ()
    figures: Sequence[Picture] = ()
    header: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()
    notes: Sequence[str] = ()


def write_report(path: str | Path, model: str, other: str | None = None, root: Places | None = None) -> dict[str, Any]:
    """Write a report.

    Args:
        path: The HTML file, written atomically.
        model: A shipped weight, or the folder of a finished run or of a saved model (which has no data on record: its
            report has no curves and no answers).
        other: A model to compare it with, on the data of the first one that has data on record.
        root: Where the data is, see :func:`zoo.tools.evaluation.build_data`.

    Returns:
        `file`, `bytes`, the names of its `sections`, and `notes` on unreadable files of the run.

    Raises:
        ToolError, RunsError, CheckpointError: The models cannot be read or compared.
        OutputError: `path` does not end in .html, or its folder does not exist.
    """
    import matplotlib as mpl

    check_output(path, PAGES)

    with mpl.rc_context({"text.parse_math": False}):  # names may contain dollar signs
        parts = list(_compared(model, other, root) if other else _single(model, root))
    page = render(f"{model} and {other}" if other else str(model), parts).encode()
    write_atomic(path, writer_of(page))
    sections, notes = [part.name for part in parts], [note for part in parts for note in part.notes]
    return {"file": str(path), "bytes": len(page), "sections": sections, "notes": notes}


def render(title: str, parts: Sequence[Part]) -> str:
    """Render parts as an HTML page."""
    import jinja2

    text = lambda value: shown(value) if isinstance(value, str) else value  # noqa: E731  # no control characters
    pages = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, finalize=text)
    return pages.from_string(_PAGE).render(title=title, style=_STYLE, maker=MAKER, parts=parts)


# ---- sections ----------------------------------------------------------------------------------------------


def _single(model: str, root: Places | None) -> Iterator[Part]:
    record, network = record_of(model, data=False), load(model, deploy=False)
    known = "data" in record
    on = f" on {record['data']['title']}" if known else ", a saved model without a record of its data and figures"
    yield Part("head", heading=record["name"], text=f"{record['architecture']}{on}")
    tiles = [(f"{record['parameters']:,}", "parameters")]
    if known:
        metric = record["metric"]
        spread = f"{metric['mean']:.4f} ± {metric['sd']:.4f}" if metric["n"] > 1 else ""
        seeds = [(spread, f"mean ± s.d. of {metric['n']} seeds")] if spread else []
        named = f"{metric['name']}, {metric['caveat']}" if metric.get("caveat") else metric["name"]
        tiles = [(f"{metric['value']:.4f}", named), *seeds, *tiles, (f"{record['seconds']:.0f} s", "to train")]
    yield Part("figures", tiles=tiles)
    yield from _curves_section([model])
    if known and (record.get("input") or {}).get("kind") == "series":
        yield _forecasts_section(network.eval(), record, root)
    elif known:
        outputs, targets, _ = outputs_of(network.eval(), record, record, root)
        yield from _outcome_section([(record["name"], outputs, targets)], record, root)
    yield from _insight_section(network, record)
    yield from _matrix_section(model)
    yield Part("facts", "Facts", rows=_facts(record))


def _compared(a: str, b: str, root: Places | None) -> Iterator[Part]:
    found = compare(a, b, root=root)
    records = [record_of(a, data=False), record_of(b, data=False)]
    heading = f"{records[0]['name']} and {records[1]['name']}"
    yield Part("head", heading=heading, text=f"{found['n']} {found['part']} rows of {found['data']}")
    keys = [k for k in ("accuracy", "rmse", "r2", "parameters", "ms") if k in found["a"]]
    labels = {"ms": "CPU ms an input"}
    shown = [[labels.get(key, key), *(_number(found[side][key]) for side in "ab")] for key in keys]
    names = [found["a"]["name"], found["b"]["name"]]
    text = f"They agree on {found['agreement']:.1%} of the rows." if "p" in found else (
        f"Their values correlate at {found['agreement']:.3f}.")  # fmt: skip
    if "p" in found:
        text += f" Only the first is right on {found['only_a']}, only the second on {found['only_b']}"
        text += f" (sign test p = {found['p']:.3g})."
    yield Part("comparison", "Comparison", text=text, header=["", *names], rows=shown, notes=found["notes"])
    yield from _curves_section([a, b])
    sides = [
        (name, torch.from_numpy(found[f"outputs_{s}"]), torch.from_numpy(found["targets"]))
        for name, s in zip(names, "ab", strict=True)
    ]
    yield from _outcome_section(sides, records[0])
    for record in records:
        yield Part(f"facts of {record['name']}", f"Facts: {record['name']}", rows=_facts(record))


def _curves_section(models: Sequence[str]) -> Iterator[Part]:
    notes: list[str] = []
    found = {name: curves(Path(name), notes) for name in models if Path(name).is_dir()}
    found = {name: lines for name, lines in found.items() if lines}
    if not found and not notes:
        return
    names = [
        n for n in ("train/loss", "val/loss", "val/acc", "val/score", "val/r2") if any(n in c for c in found.values())
    ]
    figures = []
    for metric in names[:4]:
        ax = given_or_new(None, (4.6, 3.0))
        for color, (name, lines) in zip((COLOR, ACCENT, GREY), found.items(), strict=False):
            if metric in lines:
                ax.plot(*lines[metric], color=color, label=Path(name).name, linewidth=1.4)
        ax.set(xlabel="step", title=metric)
        ax.spines[["top", "right"]].set_visible(False)
        if len(found) > 1:
            ax.legend(frameon=False)
        figures.append(_figure(ax, f"{metric} over steps"))
    yield Part("curves", "Curves", figures=figures, notes=notes)


def curves(run: Path, notes: list[str] | None = None) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of every metric that a run logged to CSV; invalid rows and cells are skipped.

    Args:
        run: The run folder.
        notes: Receives a line for each file with skipped content.
    """
    found: dict[str, tuple[list[int], list[float]]] = {}
    for path in sorted(run.glob("csv/**/metrics.csv")):
        lines, left_out = read_curves(path)
        if left_out and notes is not None:
            notes.append(left_out)
        for name, (steps, values) in lines.items():
            kept = found.setdefault(name, ([], []))
            kept[0].extend(steps)
            kept[1].extend(values)
    return found


def _outcome_section(
    sides: Sequence[tuple[str, Tensor, Tensor]], record: Mapping[str, Any], root: Places | None = None
) -> Iterator[Part]:
    figures = []
    classes = record["class_names"]
    for name, outputs, targets in sides:
        if classes:
            ax = plot_confusion(decide(outputs).numpy(), targets.numpy(), classes)
            figures.append(_figure(ax, f"{name}: rows are the truth, columns the answer"))
        else:
            ax = given_or_new(None, (4.2, 3.8))
            ax.scatter(targets, outputs.squeeze(-1), s=10, color=COLOR, alpha=0.7)
            ends = [float(targets.min()), float(targets.max())]
            ax.plot(ends, ends, color=GREY, linewidth=1)
            ax.set(xlabel="true value", ylabel="predicted value")
            ax.spines[["top", "right"]].set_visible(False)
            figures.append(_figure(ax, f"{name}: predicted over true values"))
    title = "Confusion" if classes else "Predictions"
    if classes and len(record["preprocessing"].get("input_size") or ()) == 3 and len(sides) == 1:
        figures += _mistakes(sides[0], record, root)
    yield Part(title.lower(), title, text=f"on {len(sides[0][2]):,} {part_of(record)} rows", figures=figures)


@torch.inference_mode()
def _forecasts_section(network: nn.Module, record: Mapping[str, Any], root: Places | None) -> Part:
    """Forecasts of three windows beside what came, and the error of every step over (up to 256) windows."""
    data, part = build_data(record, root), "val" if part_of(record) == "validation" else "test"
    rows, form = data.datasets[part], inputs.read(data.input_record())
    chosen = np.linspace(0, len(rows) - 1, min(256, len(rows))).round().astype(int).tolist()
    (windows, marks), targets = rows.batch(chosen)
    found = network(windows, marks)
    figures = []
    for i in (0, len(chosen) // 2, len(chosen) - 1):
        ax = given_or_new(None, (4.6, 3.0))
        past, came, told = (in_units(x[i], form) for x in (windows, targets, found))
        for column, color in zip(range(min(3, form.count)), (COLOR, ACCENT, GREY), strict=False):
            steps = np.arange(1 - len(past), len(came) + 1)
            ax.plot(steps, np.concatenate([past, came])[:, column], color=color, linewidth=1)
            ax.plot(steps[-len(told) :], told[:, column], color=color, linestyle="--", label=form.columns[column][:24])
        ax.set(xlabel="step", title=f"{part} window {chosen[i] + 1}")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(fontsize=7, frameon=False)
        figures.append(_figure(ax, f"window {chosen[i] + 1} of {len(rows)}: what came, and dashed the forecast"))
    ax = given_or_new(None, (4.6, 3.0))
    for name, answers in (("forecast", found), ("last value", windows[:, -1:].expand_as(targets))):
        error = (answers - targets).square().mean((0, 2)).sqrt()
        ax.plot(range(1, len(error) + 1), error, label=name, color=COLOR if name == "forecast" else GREY)
    ax.set(xlabel="step ahead", ylabel="RMSE, standardised")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    figures.append(_figure(ax, f"error of each step over {len(chosen)} {part} windows"))
    return Part("forecasts", "Forecasts", figures=figures)


def _mistakes(
    side: tuple[str, Tensor, Tensor], record: Mapping[str, Any], root: Places | None, count: int = 16
) -> list[Picture]:
    """The misclassified images with the largest loss."""
    _, outputs, targets = side
    if record["preprocessing"]["input_size"][1:] == [1, 1]:
        return []
    wrong = (decide(outputs) != targets).nonzero()[:, 0]
    if not len(wrong) or outputs.shape[1] == 1:
        return []
    losses = torch.nn.functional.cross_entropy(outputs[wrong], targets[wrong], reduction="none")
    worst = wrong[losses.argsort(descending=True)[:count]]
    images = torch.cat([x for x, _ in batches(build_data(record, root), part=part_of(record))])[worst]
    if images.ndim != 4 or images.shape[1] not in (1, 3):  # texts, point clouds, spectra
        return []
    figure, axes = _grid(len(worst))
    for ax, image, i in zip(axes, images, worst.tolist(), strict=False):
        low, high = image.min(), image.max()
        shown = ((image - low) / (high - low).clamp_min(1e-9)).permute(1, 2, 0).squeeze(-1).numpy()
        ax.imshow(shown, cmap="gray" if shown.ndim == 2 else None)
        truth, answer = record["class_names"][int(targets[i])], record["class_names"][int(decide(outputs[i][None]))]
        ax.set_title(f"{truth} as {answer}", fontsize=8)
    return [_picture(figure, f"the {len(worst)} worst of {len(wrong)} mistakes: truth as answer")]


def _insight_section(network: nn.Module, record: Mapping[str, Any]) -> Iterator[Part]:
    """Results of all probes that apply to the model."""
    figures: list[Picture] = []
    subject = Subject.of(network, record["name"])
    for name in probe.entries():
        try:
            found = look(name, subject)
            figures.append(_figure(found.draw(), found.told))
        except (ValueError, RuntimeError, AttributeError, TypeError):
            continue  # the probe does not apply
    if figures:
        yield Part("insight", "What it looks at", figures=figures)


def _matrix_section(model: str) -> Iterator[Part]:
    """Accuracy matrix of a continual run, from its `accuracy_matrix.csv`."""
    path = next(iter(sorted(Path(model).glob("**/accuracy_matrix*.csv"))), None) if Path(model).is_dir() else None
    if path is None:
        return
    try:
        matrix = np.atleast_2d(np.genfromtxt(io.StringIO(read_text(path)), delimiter=","))
    except (OSError, ValueError):
        matrix = np.empty((0, 0))
    matrix = matrix[1:, 1:] if matrix.shape[0] > 1 and np.isnan(matrix[0, 0]) else matrix
    if not matrix.size or max(matrix.shape) > 1000 or not np.isfinite(matrix).any():
        yield Part("accuracy matrix", "Accuracy matrix", notes=[f"{path} is not a table of accuracies: it is left out"])
        return
    text = "accuracy on each task (column) after each task (row)"
    yield Part("accuracy matrix", "Accuracy matrix", figures=[_figure(plot_accuracy_matrix(matrix), text)])


def _facts(record: Mapping[str, Any]) -> list[tuple[str, Any]]:
    own = [("preprocessing", _pairs(inputs.preparation(record))), ("sha256", {"code": record["sha256"]})]
    if "data" not in record:
        return own
    data, part = record["data"], part_of(record)
    short = record["metric"]["name"].partition("/")[0]
    return [
        ("command", {"code": record["command"]}),
        ("seed", record["metric"]["seed"]),
        (f"{part} metrics", _pairs({k: f"{v:.4g}" for k, v in record["metrics"].items() if k.startswith(short)})),
        ("data", f"{data['title']}, {data['source']}; {data['license']}"),
        ("rows", _pairs(rows_of(record))),
        ("licence", f"weights {record['license']}, code {record['code_license']}"),
        *own,
        ("versions", _pairs(record["versions"])),
        ("hardware", _pairs(record["hardware"])),
    ]


# ---- pictures ----------------------------------------------------------------------------------------------


def plot_confusion(answers: np.ndarray, targets: np.ndarray, names: Sequence[str], ax: Any = None) -> Any:
    """Confusion matrix: counts by true (row) and predicted class (column), shaded by their share of the row.

    Args:
        answers: Predicted classes (N,).
        targets: True classes (N,).
        names: Class names, K of them.
        ax: Where to draw.
    """
    k = len(names)
    counts = np.bincount(targets * k + answers, minlength=k * k).reshape(k, k)
    ax = given_or_new(ax, (0.42 * k + 1.6, 0.42 * k + 1.2) if k <= 20 else (8, 8))
    ax.imshow(counts / np.maximum(counts.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    if k <= 20:
        for i, j in np.argwhere(counts):
            color = "white" if 2 * counts[i, j] > counts[i].sum() else "black"
            ax.text(j, i, counts[i, j], ha="center", va="center", fontsize=8, color=color)
        ax.set_xticks(range(k), names, rotation=45 if max(map(len, names)) > 3 else 0)
        ax.set_yticks(range(k), names)
    ax.set(xlabel="answer", ylabel="truth")
    return ax


def plot_accuracy_matrix(matrix: np.ndarray, ax: Any = None) -> Any:
    """Accuracy on each task (column) after learning each task (row), NaN where not measured."""
    ax = given_or_new(ax, (0.32 * matrix.shape[1] + 1.8, 0.32 * matrix.shape[0] + 1.2))
    image = ax.imshow(matrix, cmap="viridis", vmin=0, vmax=1 if np.nanmax(matrix) <= 1 else 100)
    ax.figure.colorbar(image, ax=ax, shrink=0.8)
    ax.set(xlabel="task", ylabel="after task")
    return ax


def _grid(count: int) -> tuple[Any, list[Any]]:
    figure = new_figure((4.6, 4.6))
    columns = int(np.ceil(np.sqrt(count)))
    axes = list(figure.subplots(-(-count // columns), columns, squeeze=False).ravel())
    for ax in axes:
        ax.set_axis_off()
    return figure, axes


def _figure(ax: Any, text: str) -> Picture:
    return _picture(ax.figure, text)


def _picture(figure: Any, text: str) -> Picture:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return base64.b64encode(stream.getvalue()).decode(), text


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in values.items())


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
