"""Predictions for files: images, recordings, videos, point clouds, spectra, texts, tables and series.

>>> predict("unireplknet_z.mnist5k", ["seven.png"])[0]["predictions"][0]     # {"class": "7", "probability": 0.998}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from zoo.data.checks import DataError
from zoo.data.pictures import Fit
from zoo.data.prepare import BY_ROW, SUFFIXES, far_out, form_for, other_tasks, other_units, prepare, says_nothing
from zoo.data.series import in_units, last_window
from zoo.registry.factory import answers_imagenet, as_named
from zoo.support import inputs
from zoo.tools.errors import ToolError
from zoo.tools.evaluation import load, record_of, unusable

__all__ = ["draw", "predict", "prepared"]

Found = TypeVar("Found")
_BATCH = 256  # rows at a time


@torch.inference_mode()
def predict(model: str, files: Sequence[str | Path], top: int = 5, header: bool = True) -> list[dict[str, Any]]:
    """Classify files, predict the rows of tables, or forecast series.

    Args:
        model: Name of shipped or published weights, `local-dir:<folder>`, or the folder of a run.
        files: Files of the kind the model takes. Columns of tables and series are matched by name, or taken in order
            if the input record has no names.
        top: Largest number of classes per prediction.
        header: Whether tables have a header line; without one, their columns must be in the model's order.

    Returns:
        One entry per file, or per row of a table: `file`, `row` of a table, and `predictions` (`class` and
        `probability`, most probable first) or `value`. For a series: `forecast` (a list of values per step, in the
        units of the file), `columns` (names of the values) and `times` (of the steps, if the step is constant). The
        first entry of a file has a `note` if the file is blank or silent, or its values are far outside the training
        data; the first entry of all has one if the tasks of training permuted or rotated their images.

    Raises:
        ToolError: A file is missing, damaged or of the wrong kind, or the model's output is not finite.
    """
    network = load(model)
    facts = _facts(model, network)
    if not header and facts["record"]["kind"] != "table":
        raise ToolError(
            f"only tables can be without a header line; the model takes a file of {facts['record']['kind']}"
        )
    facts["record"] |= {} if header else {"header": False}
    place, _, folder = as_named(model).partition(":")
    prepare_file = partial(prepare, folder=Path(folder) if place == "local-dir" else None)
    found = []
    for path in map(Path, files):
        if facts["record"]["kind"] == "series":
            found.append({"file": str(path)} | _forecast(path, network, facts["record"]))
            continue
        arguments = _checked(prepare_file, path, facts["record"])
        form = inputs.read(facts["record"])
        note = _note(path, arguments[0], form, first=not found)
        if form.kind == "table" and (told := far_out(path, arguments[0], network, form.columns)):
            note = {"note": told}
        parts = zip(*(argument.split(_BATCH) for argument in arguments), strict=True)  # memory stays bounded
        outputs = torch.cat([network(*part).float() for part in parts])
        bad = unusable(outputs)
        for i, out in enumerate(outputs):
            entry: dict[str, Any] = {"file": str(path)}
            if form.kind in BY_ROW and path.suffix.lower() in SUFFIXES["table"]:
                entry["row"] = i + 1
            if bad[i]:
                _refuse_answer(f"{path}, row {i + 1}" if "row" in entry else str(path))
            found.append(entry | _answer(out, facts, top) | (note if i == 0 else {}))
    return found


def _note(path: Path, values: Tensor, form: Any, first: bool = False) -> dict[str, str]:
    told = says_nothing(path, values, form) or other_units(path, values, form) or (other_tasks(form) if first else None)
    return {} if told is None else {"note": told}


def _refuse_answer(where: str) -> NoReturn:
    raise ToolError(f"{where}: the model gives NaN or infinity; its weights are damaged, "
                    "or the values are far from those that it was trained on")  # fmt: skip


def prepared(path: Path, network: nn.Module) -> tuple[Tensor, ...]:
    """The network's arguments for a file, by its input record or its configuration.

    Raises:
        ToolError: The file is missing, damaged or of the wrong kind.
    """
    return _checked(prepare, path, inputs.record_of(network))


def _checked(function: Callable[[Path, Mapping[str, Any]], Found], path: Path, record: Mapping[str, Any]) -> Found:
    try:
        return function(path, record)
    except DataError as error:
        raise ToolError(str(error)) from None


def _forecast(path: Path, network: nn.Module, record: Mapping[str, Any]) -> dict[str, Any]:
    """Forecast the end of a series, in the units of the file."""
    form = _checked(form_for, path, record)
    window = _checked(lambda file, _: last_window(file, form), path, record)
    values = in_units(network(window.values, window.marks)[0], form)
    if not np.isfinite(np.asarray(values)).all():
        _refuse_answer(str(path))
    return _note(path, window.values, form) | {
        "forecast": values.tolist(),
        "columns": window.names,
        "times": [time.isoformat(sep=" ") for time in window.times],
    }


def _facts(model: str, network: nn.Module) -> dict[str, Any]:
    cfg: Any = getattr(network, "pretrained_cfg", None) or {}
    classes = list(cfg.get("label_names") or ())
    if not classes and getattr(network, "num_classes", 0) == 1000 and answers_imagenet(model):
        from timm.data import ImageNetInfo

        names = ImageNetInfo("imagenet-1k")
        classes = [names.index_to_description(i) for i in range(1000)]
    features: list[str] = []
    if not model.startswith(("local-dir:", "hf-hub:")):
        try:
            features = record_of(model)["feature_names"]
        except (ValueError, RuntimeError):  # published weights have no training record
            features = []
    record = dict(inputs.record_of(network))
    if record["kind"] == "table" and features and not record.get("columns"):
        record["columns"] = list(features)
    return {"cfg": cfg, "classes": classes, "features": features, "record": record}


def _answer(out: Tensor, facts: Mapping[str, Any], top: int) -> dict[str, Any]:
    classes = facts["classes"]
    if len(out) == 1 and not classes:
        return {"value": float(out[0])}
    shares = torch.cat([-out, out]).sigmoid() if len(out) == 1 else out.softmax(-1)
    values, places = shares.topk(min(top, len(shares)))
    names = [classes[i] if i < len(classes) else str(i) for i in places.tolist()]
    pairs = zip(names, values.tolist(), strict=True)
    return {"predictions": [{"class": name, "probability": round(value, 6)} for name, value in pairs]}


# ---- plots -------------------------------------------------------------------------------------------------


def draw(entry: Mapping[str, Any], model: str) -> Any:
    """Plot an entry of `predict` as a matplotlib figure: the input (of a table, importances) and the output."""
    from zoo.analysis.plots import COLOR, new_figure, plot_importances

    figure = new_figure((8, 3.2))
    left, right = figure.subplots(1, 2)
    path = Path(entry["file"])
    network = load(model)
    kind = inputs.record_of(network)["kind"]
    if kind == "image":
        left.imshow(Fit(inputs.read(inputs.record_of(network))).open(path), cmap="gray", vmin=0, vmax=255)
        left.set_axis_off()
    elif kind == "sound":
        sampler: Any = next(m for m in network.modules() if hasattr(m, "sample_rate") and hasattr(m, "samples"))
        left.imshow(sampler(*prepared(path, network))[0, 0].numpy(), origin="lower", aspect="auto", cmap="magma")
        left.set(xlabel="frame", ylabel="mel bin")
    elif kind == "series":
        form = _checked(form_for, path, inputs.record_of(network))
        past = in_units(_checked(lambda file, _: last_window(file, form), path, {}).values[0], form)
        _draw_series(left, right, past, entry)
    else:
        importance = getattr(network, "feature_importance", None)
        if callable(importance):
            names = _facts(model, network)["features"] or None
            plot_importances(importance().double(), names, top=8, ax=left)
        else:
            left.set_axis_off()
    left.set_title(path.name + (f", row {entry['row']}" if "row" in entry else ""), fontsize=10)
    if "value" in entry:
        right.text(0.5, 0.5, f"{entry['value']:.4g}", ha="center", va="center", fontsize=28, color=COLOR)
        right.set_axis_off()
    elif "predictions" in entry:
        found = entry["predictions"][::-1]
        right.barh([p["class"][:24] for p in found], [p["probability"] for p in found], color=COLOR)
        right.set(xlim=(0, 1), xlabel="probability")
        right.spines[["top", "right"]].set_visible(False)
    figure.suptitle(model, fontsize=10)
    return figure


def _draw_series(left: Any, right: Any, past: Any, entry: Mapping[str, Any]) -> None:
    """Plot the input window and the forecast of up to eight variables, in the units of the file."""
    for axis, rows, first in ((left, past, -len(past)), (right, entry["forecast"], 0)):
        steps = range(first + 1, first + 1 + len(rows))
        for i, name in enumerate(entry["columns"][:8]):
            axis.plot(steps, [row[i] for row in rows], label=name[:24], linewidth=1)
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
    right.set_title("forecast", fontsize=10)
    right.legend(fontsize=7, frameon=False)
