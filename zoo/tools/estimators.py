"""Saved estimators at the commands: facts, figures on a table, a module to export, and a card.

>>> score("wine", "new_wines.csv", "colour")["accuracy"]
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.data.checks import DataError
from zoo.data.delimited import TableFile, listed
from zoo.registry.factory import as_named
from zoo.results.records import markdown, plain
from zoo.support import inputs
from zoo.support.files import WEIGHTS_NAME, locate, sha256_of
from zoo.support.quoting import command, python_text, shown
from zoo.support.suggest import suggestion
from zoo.support.values import first_line
from zoo.tools.errors import ToolError
from zoo.tools.pretrained import estimator_config, holds_estimator

__all__ = ["SavedEstimator", "card", "describe", "open_estimator", "pipeline", "refuse", "score"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedEstimator:
    """An estimator from its folder.

    Attributes:
        name: As given to the command.
        estimator: Fitted.
        config: The folder's configuration.
        weights: The file of its arrays.
    """

    name: str
    estimator: Any
    config: dict[str, Any]
    weights: Path


def open_estimator(model: str | Path) -> SavedEstimator | None:
    """The estimator of a folder or repository; None for any other model.

    Raises:
        CheckpointError: The folder is damaged.
        ToolError: There is no such model.
    """
    try:
        config, name = estimator_config(model), as_named(model)
    except ValueError as error:
        raise ToolError(str(error)) from None
    if config is None:
        return None
    from zoo.estimators.saved import load_estimator

    return SavedEstimator(str(model), load_estimator(name), config, locate(name))


def refuse(model: str | Path) -> None:
    """Refuse an estimator where the record of a run is needed.

    Raises:
        ToolError: It is one.
    """
    if holds_estimator(model):
        raise ToolError(
            f"{model} is a saved estimator, which has no record of its data: `validate --data TABLE --target COLUMN` "
            "measures it, and predict, info, export and push take it"
        )


def describe(saved: SavedEstimator) -> dict[str, Any]:
    """Facts: `name`, `class`, `input`, `columns`, `num_classes`, `classes`, `numbers` (of its fitted arrays),
    `weights` (their file and its hash) and `settings` (parameters that differ from the defaults, as text).
    """
    from zoo.support.files import read_checkpoint

    estimator, config = saved.estimator, saved.config
    default = type(estimator)().get_params(deep=False)
    given = estimator.get_params(deep=False)
    return {
        "name": saved.name,
        "class": type(estimator).__name__,
        "input": [estimator.n_features_in_],
        "columns": _names(config["input"], estimator.n_features_in_),
        "num_classes": config["num_classes"],
        "classes": config.get("label_names", []),
        "numbers": sum(values.numel() for values in read_checkpoint(saved.weights).values()),
        "weights": f"{saved.weights}, sha256 {config['sha256'][WEIGHTS_NAME][:12]} as recorded",
        "settings": {k: _short(v) for k, v in given.items() if repr(v) != repr(default.get(k))},
    }


def _names(record: Mapping[str, Any], count: int) -> list[str]:
    """Names of an estimator's columns, which the record may have encoded; empty if unknown."""
    names = [variable["name"] for variable in record.get("variables", ())]
    return names if len(names) == count else record.get("columns") or []


def _short(value: Any) -> str:
    return shown(" ".join(repr(value).split())[:100])


# ---- figures -----------------------------------------------------------------------------------------------


def score(model: str | Path, data: str | Path, target: str | None = None) -> dict[str, Any]:
    """Figures of a saved estimator on the rows of a table.

    Args:
        model: Folder of the estimator.
        data: A table with a header; its columns are matched by name.
        target: Column of the right answers; the only one that is no input by default.

    Returns:
        `name`, `data`, `rows`, and `accuracy`, or `rmse` and `r2` (None if all targets are equal).

    Raises:
        DataError: The table is missing or damaged, or an answer is no class; the message names line and column.
        ToolError: The target is not named, or a prediction is not finite.
    """
    from zoo.data.own_tables import open_table
    from zoo.data.prepare import far_out, form_for
    from zoo.data.rows import read_rows
    from zoo.estimators.saved import of_inputs

    saved = open_estimator(model)
    if saved is None:
        raise ToolError(f"{model} is not a saved estimator")
    path, estimator, record = Path(data), saved.estimator, dict(saved.config["input"])
    if path.is_dir():
        raise DataError(f"{path} is a folder; an estimator takes a table (.csv, .tsv)")
    form_for(path, record)
    table = open_table(path, header=True)
    target = _target(table, record, target)
    if not record.get("columns") and len(names := [n for n in table.header or () if n != target]) == record["count"]:
        record["columns"] = names  # without names on record, in order
    rows = read_rows(table, inputs.read(record | {"target": target}), torch.float64, truth=True)
    form = inputs.read(record)
    mean, scale = _place(estimator)
    scaling = SimpleNamespace(input_mean=mean, input_scale=scale)
    if far := far_out(path, rows.values, scaling, form.columns, form.measured()):
        _log.warning("%s", far)
    places = _column(table, target)
    found = _predicted(of_inputs(estimator), rows.values)
    told: dict[str, Any] = {"name": saved.name, "data": str(path), "rows": len(found)}
    if hasattr(estimator, "classes_"):
        right = _classes(table, target, places, estimator.classes_.tolist())
        return told | {"accuracy": float(np.mean([a == b for a, b in zip(found, right, strict=True)]))}
    values = np.array([_value(table, target, line, cell) for line, cell in places])
    error = np.asarray(found, dtype=np.float64) - values
    spread = float(np.square(values - values.mean()).sum())
    r2 = 1 - float(np.square(error).sum()) / spread if spread > 0 else None
    return told | {"rmse": float(np.sqrt(np.square(error).mean())), "r2": r2}


def _target(table: TableFile, record: Mapping[str, Any], target: str | None) -> str:
    header = table.header or []
    if target is not None:
        table.column(target)
        return target
    variables = [variable["name"] for variable in record.get("variables", ())] or record.get("columns") or []
    left = [name for name in header if name not in variables]
    if not variables or len(left) != 1:
        raise ToolError(
            f"name the column of the right answers with --target; {table.path} has {listed(left or header)}"
        )
    return left[0]


def _column(table: TableFile, name: str) -> list[tuple[int, str]]:
    place = table.column(name)
    return [(line, row[place].strip()) for line, row in table.rows([place])]


def _predicted(estimator: Any, rows: Tensor) -> list[Any]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "X does not have valid feature names", UserWarning)
        try:  # of a package of its own, or of a folder that may come from anyone
            found = np.asarray(estimator.predict(rows.numpy()))
        except Exception as error:
            raise ToolError(f"{type(estimator).__name__} gives no answer: {shown(first_line(error))}") from error
    if found.shape != (len(rows),) or (found.dtype.kind == "f" and not np.isfinite(found).all()):
        raise ToolError(f"{type(estimator).__name__} gives NaN or infinity, or more than one value a row")
    return found.tolist()


def _classes(table: TableFile, target: str, places: Sequence[tuple[int, str]], classes: Sequence[Any]) -> list[Any]:
    """The class of each cell: by its name, or by its number."""
    names = {str(label): label for label in classes}
    numbers = {float(label): label for label in classes if isinstance(label, int | float)}
    found = []
    for line, cell in places:
        label = names.get(cell)
        if label is None and (label := numbers.get(_float(cell))) is None:
            known = suggestion(cell, names) or f"; its classes are {listed(list(names))}"
            raise DataError(f"{table.where(line)}, column {target}: {cell!r:.60} is no class of the estimator{known}")
        found.append(label)
    return found


def _float(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("nan")


def _value(table: TableFile, target: str, line: int, cell: str) -> float:
    value = _float(cell)
    if not np.isfinite(value):
        raise DataError(f"{table.where(line)}, column {target}: {cell!r:.60} is not a number")
    return value


# ---- export ------------------------------------------------------------------------------------------------


class Pipeline(nn.Module):
    """The module that is exported, and what the estimator itself answers.

    Attributes:
        input_mean: Where random rows for the comparison lie, (D,).
        input_scale: Their spread, (D,).
    """

    input_mean: Tensor
    input_scale: Tensor

    def __init__(self, module: nn.Module, saved: SavedEstimator) -> None:
        super().__init__()
        self.module, self._estimator = module, saved.estimator
        mean, scale = _place(saved.estimator)
        self.register_buffer("input_mean", mean, persistent=False)
        self.register_buffer("input_scale", scale, persistent=False)
        self.in_chans = saved.estimator.n_features_in_
        self.pretrained_cfg = {"input_size": (self.in_chans, 1, 1), "label_names": saved.config.get("label_names", [])}
        self.input_record = saved.config["input"]

    def forward(self, rows: Tensor) -> Tensor:
        """Rows (n, D) to probabilities (n, K), or values (n, 1)."""
        return self.module(rows)

    def expected(self, rows: Tensor) -> np.ndarray:
        """The estimator's own answers, (n, K) or (n, 1)."""
        proba = getattr(self._estimator, "predict_proba", None)
        with warnings.catch_warnings(action="ignore"):  # about the names of the features
            found = np.asarray((proba or self._estimator.predict)(rows.double().numpy()))
        return found.reshape(len(rows), -1)


def _place(estimator: Any) -> tuple[Tensor, Tensor]:
    """Mean and scale of the columns as fitted; 0 and 1 where the estimator has none."""
    holder, count = getattr(estimator, "network_", None), estimator.n_features_in_
    for owner, names in ((holder, ("input_mean", "input_scale")), (estimator, ("mean_", "scale_"))):
        found = [torch.as_tensor(value) for name in names if (value := getattr(owner, name, None)) is not None]
        if [tuple(one.shape) for one in found] == [(count,)] * 2:
            return found[0].float(), found[1].float()
    return torch.zeros(count), torch.ones(count)


def pipeline(saved: SavedEstimator) -> Pipeline:
    """The module of an estimator, from rows in their own units to probabilities or values.

    Raises:
        ToolError: It has none.
    """
    if not callable(made := getattr(saved.estimator, "to_pipeline", None)):
        raise ToolError(
            f"{type(saved.estimator).__name__} has no method to_pipeline(), the torch module that an export records"
        )
    from zoo.estimators.saved import of_inputs

    try:
        return Pipeline(
            made().eval().requires_grad_(False), replace(saved, estimator=of_inputs(saved.estimator))
        ).eval()
    except ValueError as error:
        raise ToolError(f"{type(saved.estimator).__name__} cannot be exported: {shown(first_line(error))}") from None


# ---- card --------------------------------------------------------------------------------------------------


def card(saved: SavedEstimator, place: str) -> str:
    """Model card: Markdown with the front matter for model hubs.

    Args:
        saved: The estimator.
        place: Where it is loaded from, `hf-hub:<organisation>/<name>` or the name of a folder.
    """
    facts = plain(describe(saved))
    classes, columns = facts["classes"], facts["columns"]
    task = "tabular-classification" if classes else "tabular-regression"
    answers = f"one of {len(classes)} classes" if classes else "a value"
    settings = ", ".join(f"{key} {value}" for key, value in facts["settings"].items())
    rows = [
        ("estimator", facts["class"]),
        ("columns", ", ".join(columns) if columns else f"{facts['input'][0]}, without names: in order"),
        ("answers", ", ".join(classes) if classes else "a value"),
        ("settings", settings or "the defaults"),
        ("fitted numbers", f"{facts['numbers']:,}"),
        ("file", f"{saved.weights.stat().st_size:,} bytes, sha256 `{sha256_of(saved.weights)}`"),
        ("figures", "none on record: measure it on a table of your own"),
        ("saved by", f"Kernel Zoo {saved.config.get('zoo', {}).get('version', '')}".strip()),
    ]
    lines = [
        "---",
        "library_name: kernel-zoo",
        f"tags: [kernel-zoo, {task}]",
        "---",
        f"# {plain(place.rpartition('/')[2])}",
        "",
        f"A fitted `{facts['class']}` of Kernel Zoo: rows of {facts['input'][0]} columns to {answers}.",
        "",
        "```python",
        "import zoo",
        "",
        f"estimator = zoo.load_estimator({python_text(place)})",
        "estimator.predict(rows)",
        "```",
        "",
        "```",
        command("python -m zoo predict", place, "rows.csv"),
        command("python -m zoo validate", place, "--data", "rows.csv", "--target", "COLUMN"),
        "```",
        "",
        markdown(["", ""], [(key, str(value).replace("|", "/")) for key, value in rows]),
    ]
    return "\n".join(lines) + "\n"
