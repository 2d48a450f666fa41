"""One HTML file about a run, a weight or a comparison: everything inside it, nothing fetched, nothing executed.

>>> write_report("report.html", "outputs/digits/DATE")
>>> write_report("report.html", "unireplknet_z.mnist5k", "unireplknet_z.digits")
"""

from __future__ import annotations

import base64
import csv
import html
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.figures import (
    ACCENT,
    COLOR,
    GREY,
    merged_kernels,
    plot_importances,
    plot_kernels,
    plot_loadings,
    plot_receptive_field,
    plot_spectrum,
    receptive_field,
)
from zoo.files import write_atomic, writer_of
from zoo.tools.comparison import compare, decide, outputs_of
from zoo.tools.evaluation import batches, build_data, load, record_of

__all__ = ["curves", "plot_accuracy_matrix", "plot_confusion", "write_report"]

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


def write_report(path: str | Path, model: str, other: str | None = None) -> dict[str, Any]:
    """Write the report.

    Args:
        path: The HTML file; replaced once it is whole.
        model: A shipped weight or the folder of a finished run.
        other: One to compare it with, on the data of the first.

    Returns:
        `file`, `bytes` and the titles of its `sections`.

    Raises:
        ToolError, RunsError, CheckpointError: The models cannot be read or compared.
    """
    parts = list(_compared(model, other) if other else _single(model))
    title = f"{model} and {other}" if other else str(model)
    body = "\n".join(content for _, content in parts)
    page = (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style>\n'
        f"<body>\n{body}\n</body>\n</html>\n"
    )
    write_atomic(path, writer_of(page.encode()))
    return {"file": str(path), "bytes": len(page.encode()), "sections": [name for name, _ in parts]}


# ---- what is told ------------------------------------------------------------------------------------------


def _single(model: str) -> Iterator[tuple[str, str]]:
    record, network = record_of(model), load(model, deploy=False)
    metric = record["metric"]
    yield "head", _head(record["name"], f"{record['architecture']} on {record['data']['title']}")
    tiles = [(f"{metric['value']:.4f}", metric["name"]), (f"{record['parameters']:,}", "parameters")]
    if metric["n"] > 1:
        tiles.insert(1, (f"{metric['mean']:.4f} ± {metric['sd']:.4f}", f"mean ± s.d. of {metric['n']} seeds"))
    yield "figures", _tiles([*tiles, (f"{record['seconds']:.0f} s", "to train")])
    yield from _curves_section([model])
    outputs, targets, _ = outputs_of(network.eval(), record, record)
    yield from _outcome_section([(record["name"], outputs, targets)], record)
    yield from _insight_section(network, record)
    yield from _matrix_section(model)
    yield "facts", _section("Facts", _facts(record))


def _compared(a: str, b: str) -> Iterator[tuple[str, str]]:
    found = compare(a, b)
    records = [record_of(a), record_of(b)]
    yield "head", _head(f"{records[0]['name']} and {records[1]['name']}", f"{found['n']} test rows of {found['data']}")
    keys = [k for k in ("accuracy", "rmse", "r2", "parameters", "ms") if k in found["a"]]
    labels = {"ms": "CPU ms an input"}
    shown = [[labels.get(key, key), *(_number(found[side][key]) for side in "ab")] for key in keys]
    names = [found["a"]["name"], found["b"]["name"]]
    text = f"They agree on {found['agreement']:.1%} of the rows." if "p" in found else (
        f"Their values correlate at {found['agreement']:.3f}.")  # fmt: skip
    if "p" in found:
        text += f" Only the first is right on {found['only_a']}, only the second on {found['only_b']}"
        text += f" (sign test p = {found['p']:.3g})."
    yield "comparison", _section("Comparison", f"<p>{text}</p>" + _html_table(["", *names], shown))
    yield from _curves_section([a, b])
    sides = [
        (name, torch.from_numpy(found[f"outputs_{s}"]), torch.from_numpy(found["targets"]))
        for name, s in zip(names, "ab", strict=True)
    ]
    yield from _outcome_section(sides, records[0])
    for record in records:
        yield f"facts of {record['name']}", _section(f"Facts: {record['name']}", _facts(record))


def _curves_section(models: Sequence[str]) -> Iterator[tuple[str, str]]:
    found = {name: curves(Path(name)) for name in models if Path(name).is_dir()}
    found = {name: lines for name, lines in found.items() if lines}
    if not found:
        return
    names = [
        n for n in ("train/loss", "val/loss", "val/acc", "val/score", "val/r2") if any(n in c for c in found.values())
    ]
    figures = []
    for metric in names[:4]:
        ax = _blank((4.6, 3.0))
        for color, (name, lines) in zip((COLOR, ACCENT, GREY), found.items(), strict=False):
            if metric in lines:
                ax.plot(*lines[metric], color=color, label=Path(name).name, linewidth=1.4)
        ax.set(xlabel="step", title=metric)
        ax.spines[["top", "right"]].set_visible(False)
        if len(found) > 1:
            ax.legend(frameon=False)
        figures.append(_figure(ax, f"{metric} over steps"))
    yield "curves", _section("Curves", f'<div class="row">{"".join(figures)}</div>')


def curves(run: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of every metric that a run logged to CSV."""
    files = sorted(run.glob("csv/**/metrics.csv"))
    found: dict[str, tuple[list[int], list[float]]] = {}
    for path in files:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                for name, cell in row.items():
                    if cell and name not in ("step", "epoch"):
                        steps, values = found.setdefault(name, ([], []))
                        steps.append(int(row["step"]))
                        values.append(float(cell))
    return found


def _outcome_section(
    sides: Sequence[tuple[str, Tensor, Tensor]], record: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    figures = []
    classes = record["class_names"]
    for name, outputs, targets in sides:
        if classes:
            ax = plot_confusion(decide(outputs).numpy(), targets.numpy(), classes)
            figures.append(_figure(ax, f"{name}: rows are the truth, columns the answer"))
        else:
            ax = _blank((4.2, 3.8))
            ax.scatter(targets, outputs.squeeze(-1), s=10, color=COLOR, alpha=0.7)
            ends = [float(targets.min()), float(targets.max())]
            ax.plot(ends, ends, color=GREY, linewidth=1)
            ax.set(xlabel="true value", ylabel="predicted value")
            ax.spines[["top", "right"]].set_visible(False)
            figures.append(_figure(ax, f"{name}: predicted over true values of the test part"))
    title = "Confusion" if classes else "Predictions"
    if classes and len(record["preprocessing"].get("input_size", ())) == 3 and len(sides) == 1:
        figures += _mistakes(sides[0], record)
    yield title.lower(), _section(title, f'<div class="row">{"".join(figures)}</div>')


def _mistakes(side: tuple[str, Tensor, Tensor], record: Mapping[str, Any], count: int = 16) -> list[str]:
    """The test images that the model is most wrong about."""
    _, outputs, targets = side
    if record["preprocessing"]["input_size"][1:] == [1, 1]:
        return []
    wrong = (decide(outputs) != targets).nonzero()[:, 0]
    if not len(wrong) or outputs.shape[1] == 1:
        return []
    losses = torch.nn.functional.cross_entropy(outputs[wrong], targets[wrong], reduction="none")
    worst = wrong[losses.argsort(descending=True)[:count]]
    images = torch.cat([x for x, _ in batches(build_data(record))])[worst]
    figure, axes = _grid(len(worst))
    for ax, image, i in zip(axes, images, worst.tolist(), strict=False):
        low, high = image.min(), image.max()
        shown = ((image - low) / (high - low).clamp_min(1e-9)).permute(1, 2, 0).squeeze(-1).numpy()
        ax.imshow(shown, cmap="gray" if shown.ndim == 2 else None)
        truth, answer = record["class_names"][int(targets[i])], record["class_names"][int(decide(outputs[i][None]))]
        ax.set_title(f"{truth} as {answer}", fontsize=8)
    return [_picture(figure, f"the {len(worst)} worst of {len(wrong)} mistakes: truth as answer")]


def _insight_section(network: nn.Module, record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    figures: list[str] = []
    names = record["feature_names"] or None

    def attempt(make: Callable[[], Any], text: str) -> None:
        try:
            ax = make()
        except (ValueError, RuntimeError, AttributeError, TypeError):
            return  # the model has nothing of that kind
        figures.append(_figure(ax, text))

    spectrum: Any = getattr(network, "spectrum", None)
    importance: Any = getattr(network, "feature_importance", None)
    if callable(importance):
        attempt(lambda: plot_importances(importance().double(), names), "importance of each feature")
    if callable(spectrum):
        attempt(lambda: plot_spectrum(spectrum()[0].double()), "spectrum of the precision matrix")
        attempt(lambda: plot_loadings(spectrum()[1].double(), names), "what each latent variable is made of")
    attempt(lambda: plot_kernels(merged_kernels(network)[1]), "merged kernels of the first large layer")
    size = record["preprocessing"].get("input_size", [])
    if len(size) == 3 and size[1:] != [1, 1]:
        images = torch.randn(8, *size, generator=torch.Generator().manual_seed(0))
        attempt(lambda: plot_receptive_field(receptive_field(network, images)), "effective receptive field, noise")
    if figures:
        yield "insight", _section("What it looks at", f'<div class="row">{"".join(figures)}</div>')


def _matrix_section(model: str) -> Iterator[tuple[str, str]]:
    """Accuracy on each task after each task, where a run wrote `accuracy_matrix.csv`."""
    path = next(iter(sorted(Path(model).glob("**/accuracy_matrix*.csv"))), None) if Path(model).is_dir() else None
    if path is None:
        return
    matrix = np.genfromtxt(path, delimiter=",")
    matrix = matrix[1:, 1:] if np.isnan(matrix[0, 0]) and matrix.shape[0] > 1 else np.atleast_2d(matrix)
    text = "accuracy on each task (column) after each task (row)"
    yield "accuracy matrix", _section("Accuracy matrix", _figure(plot_accuracy_matrix(matrix), text))


def _facts(record: Mapping[str, Any]) -> str:
    rows = [
        ("command", f"<code>{html.escape(record['command'])}</code>"),
        ("seed", str(record["metric"]["seed"])),
        ("test metrics", _pairs({k: f"{v:.4g}" for k, v in record["metrics"].items() if k.startswith("test/")})),
        ("data", html.escape(f"{record['data']['title']}, {record['data']['source']}; {record['data']['license']}")),
        ("rows", _pairs(record["data"]["rows"])),
        ("licence", f"weights {html.escape(record['license'])}, code {html.escape(record['code_license'])}"),
        ("preprocessing", _pairs(record["preprocessing"])),
        ("sha256", f"<code>{record['sha256']}</code>"),
        ("versions", _pairs(record["versions"])),
        ("hardware", _pairs(record["hardware"])),
    ]
    return "<table>" + "".join(f"<tr><td>{k}</td><td>{v}</td></tr>" for k, v in rows) + "</table>"


# ---- pictures ----------------------------------------------------------------------------------------------


def plot_confusion(answers: np.ndarray, targets: np.ndarray, names: Sequence[str], ax: Any = None) -> Any:
    """Counts of every pair of truth (row) and answer (column), shaded by their share of the row.

    Args:
        answers: Predicted classes (N,).
        targets: True classes (N,).
        names: Class names, K of them.
        ax: Where to draw.
    """
    k = len(names)
    counts = np.bincount(targets * k + answers, minlength=k * k).reshape(k, k)
    ax = _blank((0.42 * k + 1.6, 0.42 * k + 1.2) if k <= 20 else (8, 8)) if ax is None else ax
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
    ax = _blank((0.32 * matrix.shape[1] + 1.8, 0.32 * matrix.shape[0] + 1.2)) if ax is None else ax
    image = ax.imshow(matrix, cmap="viridis", vmin=0, vmax=1 if np.nanmax(matrix) <= 1 else 100)
    ax.figure.colorbar(image, ax=ax, shrink=0.8)
    ax.set(xlabel="task", ylabel="after task")
    return ax


def _blank(size: tuple[float, float]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def _grid(count: int) -> tuple[Any, list[Any]]:
    figure = _blank((4.6, 4.6)).figure
    figure.clear()
    columns = int(np.ceil(np.sqrt(count)))
    axes = list(figure.subplots(-(-count // columns), columns, squeeze=False).ravel())
    for ax in axes:
        ax.set_axis_off()
    return figure, axes


def _figure(ax: Any, text: str) -> str:
    return _picture(ax.figure, text)


def _picture(figure: Any, text: str) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    data = base64.b64encode(stream.getvalue()).decode()
    told = html.escape(text)
    return f'<figure><img alt="{told}" src="data:image/png;base64,{data}"><figcaption>{told}</figcaption></figure>'


# ---- HTML --------------------------------------------------------------------------------------------------


def _head(title: str, text: str) -> str:
    return f"<h1>{html.escape(title)}</h1>\n<p>{html.escape(text)}</p>"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>\n{content}\n</section>"


def _tiles(pairs: Iterable[tuple[str, str]]) -> str:
    tiles = (f'<div class="tile"><b>{html.escape(v)}</b><span>{html.escape(k)}</span></div>' for v, k in pairs)
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _html_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(h)}</th>" for h in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _pairs(values: Mapping[str, Any]) -> str:
    return html.escape(", ".join(f"{k} {v}" for k, v in values.items()))


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
