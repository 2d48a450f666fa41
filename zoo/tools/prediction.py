"""Predictions for files (images, recordings, videos, point clouds, spectra, texts, tables, series), arrays and frames.

>>> predict("unireplknet_z.mnist5k", ["seven.png"])[0]["predictions"][0]     # {"class": "7", "probability": 0.998}
>>> predict("wine", frame)                                                   # a folder of zoo.save_pretrained
>>> predict(model, images)                                                   # (n, C, H, W), as the model takes them
"""

from __future__ import annotations

import csv
import io
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from zoo.data.checks import DataError
from zoo.data.delimited import TableFile, is_number, read_table
from zoo.data.pictures import Fit
from zoo.data.prepare import (
    BY_ROW,
    SUFFIXES,
    WORDS,
    far_off,
    far_out,
    form_for,
    kind_of_file,
    other_tasks,
    other_units,
    prepare,
    says_nothing,
    without_colour,
)
from zoo.data.walk import Files, below
from zoo.registry.factory import answers_imagenet, as_named
from zoo.support import inputs
from zoo.support.files import write_atomic, writer_of
from zoo.support.quoting import shown
from zoo.support.tensors import unusual
from zoo.support.values import first_line
from zoo.tools.errors import ToolError
from zoo.tools.evaluation import load, record_of, unusable
from zoo.tools.pretrained import estimator_config

__all__ = ["draw", "predict", "prepared", "write_table"]

Found = TypeVar("Found")
_BATCH = 256  # rows at a time


def predict(
    model: Any, files: Any, top: int = 5, header: bool = True, file_column: str = "file"
) -> list[dict[str, Any]]:
    """Classify files or arrays, predict the rows of tables, or forecast series.

    Args:
        model: Name of shipped or published weights, the folder of a saved model or estimator or of a run,
            `local-dir:<folder>`; or a model or a fitted estimator itself, which is not changed.
        files: A file of the kind the model takes, a folder of such files (links in it that lead out of it are not
            followed), a table (.csv, .tsv) with a column of their
            names, or a list of these. Columns of tables and series are matched by name, or taken in order if the input
            record has no names. Or a data frame (pandas or polars), for a model of tables; or an array or tensor: rows
            (n, D) of a table, in the units of a file, or inputs (n, ...) prepared as the model takes them.
        top: Largest number of classes per prediction.
        header: Whether tables have a header line; without one, their columns must be in the model's order.
        file_column: Column of the names in a table of files, which start from its folder and stay in it.

    Returns:
        One entry per file, or per row of a table or array: `file` (not of an array), `row` (from 1) of a table or
        array, and `predictions` (`class` and `probability`, most probable first), `value`, or `values` of several
        targets. For a series: `forecast` (a list of values per step, in the units of the file), `columns` (names of the
        values) and `times` (of the steps, if the step is constant). The first entry of a file or array has a `note` if
        it is blank or silent, or its values are far outside the training data; the first entry of all has one if the
        tasks of training permuted or rotated their images.

    Raises:
        ToolError: A file is missing, damaged or of the wrong kind, an array has the wrong shape, or the model's output
            is not finite.
    """
    subject = _subject(model)
    kind = subject.record["kind"]
    if not header and kind != "table":
        raise ToolError(f"only tables can be without a header line; the model takes a file of {kind}")
    subject.record |= {} if header else {"header": False}
    found: list[dict[str, Any]] = []
    grey = False  # whether it is told that colours are dropped
    with subject.ready:
        for given in _batches(files, subject, file_column):
            if kind == "series":
                assert given.path is not None
                found.append({"file": str(given.path)} | _forecast(given.path, subject.network, subject.record))
                continue
            place = Path(given.name)
            form = inputs.read(subject.record)
            note = _note(place, given.arguments[0], form, first=not found) if given.first == 1 else {}
            far = kind == "table" and far_out(place, given.arguments[0], subject.scaling, form.columns, form.measured())
            note = {"note": far} if far and given.first == 1 else note
            if given.path and not (note or grey) and (told := without_colour(place, form)):
                note, grey = {"note": told}, True
            for i, answer in enumerate(subject.answers(given.arguments, top)):
                entry: dict[str, Any] = {"file": given.name} if given.path else {}
                if not given.path or (kind in BY_ROW and given.path.suffix.lower() in SUFFIXES["table"]):
                    entry["row"] = given.first + i
                if answer is None:
                    _refuse_answer(f"{given.name}, row {entry['row']}" if "row" in entry else given.name)
                found.append(entry | answer | (note if i == 0 else {}))
    return found


# ---- what answers ------------------------------------------------------------------------------------------


@dataclass
class _Subject:
    """A network or an estimator.

    Attributes:
        network: The network, or the estimator.
        record: Its input record.
        scaling: Has its `input_mean` and `input_scale`, if it standardises.
        prepare: A file or open table, and the record, as its arguments.
        tensor: A checked array as its first argument.
        answers: Arguments and the number of classes to entries, one per row; None for an answer that is not finite.
        ready: Context in which it answers.
    """

    network: Any
    record: dict[str, Any]
    scaling: Any
    prepare: Callable[[Any, Mapping[str, Any]], tuple[Tensor, ...]]
    tensor: Callable[[Tensor], Tensor]
    answers: Callable[[tuple[Tensor, ...], int], list[dict[str, Any] | None]]
    ready: Any


def _subject(model: Any) -> _Subject:
    if isinstance(model, nn.Module):
        return _of_network(model, str((getattr(model, "zoo_config", None) or {}).get("model_name", "")), None)
    if not isinstance(model, str | os.PathLike):
        return _of_estimator(model)
    name = str(model)
    try:
        config, (place, _, folder) = estimator_config(name), as_named(name).partition(":")
    except ValueError as error:  # no such model
        raise ToolError(str(error)) from None
    if config is not None:
        from zoo.estimators.saved import load_estimator

        return _of_estimator(load_estimator(as_named(name)), config.get("input"))
    return _of_network(load(name), name, Path(folder) if place == "local-dir" else None)


def _of_network(network: nn.Module, name: str, folder: Path | None) -> _Subject:
    check_answers(network, name)
    facts = _facts(name, network)
    like = next(network.parameters(), torch.empty(0))

    def prepare_file(file: Any, record: Mapping[str, Any]) -> tuple[Tensor, ...]:
        if isinstance(file, TableFile):  # a frame
            from zoo.data.rows import read_rows

            return (read_rows(file, inputs.read(record)).values,)
        return prepare(file, record, folder)

    def answers(arguments: tuple[Tensor, ...], top: int) -> list[dict[str, Any] | None]:
        parts = zip(*(argument.split(_BATCH) for argument in arguments), strict=True)  # memory stays bounded
        outputs = torch.cat([network(*(x.to(like.device) for x in part)).float().cpu() for part in parts])
        bad = unusable(outputs)
        return [None if bad[i] else _answer(out, facts, top) for i, out in enumerate(outputs)]

    def tensor(values: Tensor) -> Tensor:
        if vocabulary := getattr(network, "vocab_size", None):
            return _tokens(values, int(vocabulary))
        if facts["record"]["kind"] != "table" and not values.is_floating_point():
            raise ToolError(f"the array holds {values.dtype}: give inputs that are prepared (floats), or the files")
        return _held(values, like.dtype)

    return _Subject(network, facts["record"], network, prepare_file, tensor, answers, _evaluated(network))


def check_answers(network: nn.Module, name: str) -> None:
    """Refuse a network without a classifier, whose features are no answer.

    Raises:
        ToolError: It has `num_classes` = 0, or gives features of several stages.
    """
    if type(getattr(network, "num_classes", None)) is int and network.num_classes == 0:
        raise ToolError(
            f"{name or type(network).__name__} has no classifier (num_classes = 0) and gives features, which are no "
            "answer: call the model itself for them"
        )


@contextmanager
def _evaluated(network: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, and each module's own mode again afterwards."""
    before = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in before.items():
            module.training = training


def _of_estimator(estimator: Any, record: Mapping[str, Any] | None = None) -> _Subject:
    from sklearn.base import BaseEstimator, is_classifier
    from sklearn.exceptions import NotFittedError
    from sklearn.utils.validation import check_is_fitted

    from zoo.estimators.saved import input_record_of, of_inputs

    if not isinstance(estimator, BaseEstimator):
        raise ToolError(f"{type(estimator).__name__} is no model: give a name, a folder, a module or an estimator")
    try:
        check_is_fitted(estimator)
    except NotFittedError:
        raise ToolError(f"{type(estimator).__name__} is not fitted yet: call fit first") from None
    try:
        table, answering = input_record_of(estimator, record), of_inputs(estimator)
    except (ValueError, AttributeError) as error:
        raise ToolError(f"{type(estimator).__name__}: {first_line(error)}") from None

    def prepare_file(file: Any, record: Mapping[str, Any]) -> tuple[Tensor, ...]:
        from zoo.data.rows import read_rows

        form = inputs.read(record) if isinstance(file, TableFile) else form_for(file, record)
        return (read_rows(file, form, torch.float64, truth=True).values,)  # as fit reads them

    def answers(arguments: tuple[Tensor, ...], top: int) -> list[dict[str, Any] | None]:
        proba = getattr(answering, "predict_proba", None)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "X does not have valid feature names", UserWarning)
            try:  # of a package of its own, or of a folder that may come from anyone
                values = np.asarray((proba or answering.predict)(arguments[0].numpy()))
            except Exception as error:
                raise ToolError(f"{type(estimator).__name__} gives no answer: {first_line(error)}") from error
        if proba is not None:
            names = [str(label) for label in estimator.classes_.tolist()]
            return [_classes(shares, names, top) for shares in torch.from_numpy(values)]
        if is_classifier(estimator):
            return [{"predictions": [{"class": str(label)}]} for label in values.tolist()]
        if values.ndim == 2:
            return [{"values": row} if np.isfinite(row).all() else None for row in values.tolist()]
        if values.ndim != 1:
            raise ToolError(f"{type(estimator).__name__} gives {values.shape[1:]} values a row: call it yourself")
        return [{"value": value} if np.isfinite(value).all() else None for value in values.tolist()]

    network = getattr(estimator, "network_", None)
    if network is None:
        scaling = (getattr(estimator, name, None) for name in ("mean_", "scale_"))
        network = SimpleNamespace(
            **{
                key: None if value is None else torch.as_tensor(value)
                for key, value in zip(("input_mean", "input_scale"), scaling, strict=True)
            }
        )
    return _Subject(estimator, table, network, prepare_file, Tensor.double, answers, nullcontext())


def _classes(shares: Tensor, names: Sequence[str], top: int) -> dict[str, Any] | None:
    if not bool(shares.isfinite().all()):
        return None
    values, places = shares.sort(descending=True, stable=True)
    pairs = zip(places[:top].tolist(), values.tolist(), strict=False)
    return {"predictions": [{"class": names[i], "probability": round(value, 6)} for i, value in pairs]}


# ---- what is given -----------------------------------------------------------------------------------------


@dataclass
class _Given:
    """A file, or a part of an array: its name for messages, its arguments, and the number of its first row."""

    name: str
    path: Path | None
    arguments: tuple[Tensor, ...]
    first: int = 1


def _batches(given: Any, subject: _Subject, column: str) -> Iterator[_Given]:
    if isinstance(given, str | os.PathLike):
        given = [given]
    if hasattr(given, "columns") and (hasattr(given, "itertuples") or hasattr(given, "iter_rows")):
        if subject.record["kind"] != "table":
            raise ToolError(f"a data frame holds rows of a table; the model takes {subject.record['kind']}")
        from zoo.data.rows import FrameTable

        read = lambda frame, record: subject.prepare(FrameTable.of(frame), record)  # noqa: E731
        yield from _parts("the data frame", _checked(read, given, subject.record)[0])
    elif isinstance(given, Sequence) and all(isinstance(one, str | os.PathLike) for one in given):
        for path in [found for one in given for found in _files(Path(one), subject.record["kind"], column)]:
            series = subject.record["kind"] == "series"
            yield _Given(str(path), path, () if series else _checked(subject.prepare, path, subject.record))
    else:
        yield from _parts("the array", subject.tensor(_array(given, subject.record)))


def _parts(name: str, values: Tensor) -> Iterator[_Given]:
    for start in range(0, len(values), _BATCH):
        yield _Given(name, None, (values[start : start + _BATCH],), start + 1)


def _files(path: Path, kind: str, column: str) -> list[Path]:
    """A file itself; of a folder, the files of the model's kind in it and below, sorted; those that a table names."""
    suffix = path.suffix.lower()
    if suffix in SUFFIXES["table"] and kind not in (*BY_ROW, "series") and path.is_file():
        from zoo.data.lists import read_list

        table = _checked(lambda one, _: read_table(one, what="list"), path, {})
        if column not in (table.header or ()):
            if suffix in SUFFIXES.get(kind, ()):  # a point cloud
                return [path]
            try:
                kind_of_file(path, kind)
            except DataError as error:
                raise ToolError(f"{error}; a list of files needs a column {column!r} (--file-column)") from None
        listing = _checked(lambda one, _: read_list(one, _sort(kind), {"file": column}, whose="--"), path, {})
        return list(map(Path, listing.files))
    if not path.is_dir():
        return [path]
    if found := sorted(map(Path, _checked(lambda one, _: below(one, _sort(kind)), path, {}))):
        return found
    raise ToolError(f"{path} is a folder without a file that the model takes ({' '.join(SUFFIXES.get(kind, ()))})")


def _sort(kind: str) -> Files:
    return Files(WORDS.get(kind, kind).partition(" ")[2], kind, SUFFIXES.get(kind, ()))


def _array(given: Any, record: Mapping[str, Any]) -> Tensor:
    """Inputs (n, ...) of the shape that the record tells; a single one gets its first dimension."""
    if isinstance(given, Tensor) and (odd := unusual(given)):
        raise ToolError(f"the array is {odd}: give a plain (dense) one")
    if np.ma.is_masked(given):
        raise ToolError("the array has masked values, which the model cannot take: fill them, or leave out their rows")
    try:
        values = given.detach() if isinstance(given, Tensor) else torch.as_tensor(np.asarray(given))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ToolError(f"inputs are files, a data frame or numbers, not this ({first_line(error)})") from None
    if values.is_complex():
        raise ToolError("the array holds complex numbers; the model takes real ones")
    shape = inputs.shape_of(record)
    if record["kind"] == "series" or shape is None:
        raise ToolError(f"an input of the kind {record['kind']} is given as a file")
    values = values[None] if values.ndim == len(shape) else values
    if tuple(values.shape[1:]) != shape:
        right = ", ".join(map(str, ("n", *shape)))
        raise ToolError(f"the array has the shape {tuple(np.shape(given))}; the model takes ({right})")
    if not len(values):
        raise ToolError("the array has no rows")
    if values.is_floating_point() and not bool(values.isfinite().all()):
        raise ToolError("the array holds NaN or infinity")
    return values


def _held(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in a model's type, which must hold them."""
    found = values.to(dtype)
    if not bool(found.isfinite().all()):
        raise ToolError(f"the array holds numbers that are infinite in the model's {dtype}")
    return found


def _tokens(values: Tensor, vocabulary: int) -> Tensor:
    """Token numbers, checked."""
    whole = not values.is_floating_point() and values.dtype != torch.bool
    if not whole or not 0 <= int(values.min()) <= int(values.max()) < vocabulary:
        raise ToolError(f"the array must hold token numbers, whole numbers from 0 to {vocabulary - 1}")
    return values.long()


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
    from zoo.data.series import in_units, last_window

    form = _checked(form_for, path, record)
    window = _checked(lambda file, _: last_window(file, form), path, record)
    values = in_units(network(window.values, window.marks)[0], form)
    if not np.isfinite(np.asarray(values)).all():
        _refuse_answer(str(path))
    far = far_off(path, window, form)
    return ({"note": far} if far else _note(path, window.values, form)) | {
        "forecast": values.tolist(),
        "columns": window.names,
        "times": [time.isoformat(sep=" ") for time in window.times],
    }


def _facts(model: str, network: nn.Module) -> dict[str, Any]:
    cfg: Any = getattr(network, "pretrained_cfg", None) or {}
    classes = list(cfg.get("label_names") or ())
    if not classes and getattr(network, "num_classes", 0) == 1000 and model and answers_imagenet(model):
        from timm.data import ImageNetInfo

        names = ImageNetInfo("imagenet-1k")
        classes = [names.index_to_description(i) for i in range(1000)]
    features: list[str] = []
    if model and not model.startswith(("local-dir:", "hf-hub:")):
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
        return {"value": float(inputs.in_units(facts["record"], out[0].double()))}
    shares = torch.cat([-out, out]).sigmoid() if len(out) == 1 else out.softmax(-1)
    values, places = shares.topk(min(top, len(shares)))
    names = [classes[i] if i < len(classes) else str(i) for i in places.tolist()]
    pairs = zip(names, values.tolist(), strict=True)
    return {"predictions": [{"class": name, "probability": round(value, 6)} for name, value in pairs]}


def write_table(path: str | Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Write entries of :func:`predict` as a CSV file, whole or not at all.

    Columns: `file` and `row`, as far as the entries have them; then `class` and `probability`, and `class_2`,
    `probability_2`, ... of further classes; or `value`, or `value_1`, `value_2`, ... of several targets; or of a
    series, with a line for every step, `step`, `time` and a column for each variable.
    """
    rows: list[dict[str, Any]] = []
    for entry in entries:
        place = {key: entry[key] for key in ("file", "row") if key in entry}
        if "forecast" in entry:
            for i, values in enumerate(entry["forecast"]):
                time = {"time": entry["times"][i]} if entry["times"] else {}
                rows.append(place | {"step": i + 1} | time | dict(zip(entry["columns"], values, strict=True)))
            continue
        answers = {"value": entry["value"]} if "value" in entry else {}
        answers |= {f"value_{i}": value for i, value in enumerate(entry.get("values", ()), 1)}
        for i, found in enumerate(entry.get("predictions", ()), 1):
            answers |= {key if i == 1 else f"{key}_{i}": value for key, value in found.items()}
        rows.append(place | answers)
    text = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    # a file's name may be no text: its other bytes are written as in JSON, \udcff
    write_atomic(Path(path), writer_of(text.getvalue().encode(errors="backslashreplace")))


def _cell(value: Any) -> Any:
    """A cell that a spreadsheet does not take for a formula."""
    odd = isinstance(value, str) and value[:1] in tuple("=+-@\t\r") and not is_number(value)
    return f"'{value}" if odd else value


# ---- plots -------------------------------------------------------------------------------------------------


def draw(entry: Mapping[str, Any], model: str) -> Any:
    """Plot an entry of `predict` as a matplotlib figure: the input (of a table, importances) and the output."""
    from zoo.analysis.plots import COLOR, new_figure, plot_importances

    figure = new_figure((8, 3.2))
    left, right = figure.subplots(1, 2)
    path = Path(entry["file"])
    subject = _subject(model)
    network, kind = subject.network, subject.record["kind"]
    if kind == "image":
        left.imshow(Fit(inputs.read(inputs.record_of(network))).open(path), cmap="gray", vmin=0, vmax=255)
        left.set_axis_off()
    elif kind == "sound":
        sampler: Any = next(m for m in network.modules() if hasattr(m, "sample_rate") and hasattr(m, "samples"))
        left.imshow(sampler(*prepared(path, network))[0, 0].numpy(), origin="lower", aspect="auto", cmap="magma")
        left.set(xlabel="frame", ylabel="mel bin")
    elif kind == "series":
        from zoo.data.series import in_units, last_window

        form = _checked(form_for, path, inputs.record_of(network))
        past = in_units(_checked(lambda file, _: last_window(file, form), path, {}).values[0], form)
        _draw_series(left, right, past, entry)
    else:
        importance = getattr(network, "feature_importance", None)
        if callable(importance):
            shares = torch.as_tensor(importance()).double()
            columns = [variable["name"] for variable in subject.record.get("variables", ())]  # of an estimator
            names = columns if len(columns) == len(shares) else subject.record.get("columns") or None
            plot_importances(shares, names, top=8, ax=left)
        else:
            left.set_axis_off()
    left.set_title(shown(path.name, keep="") + (f", row {entry['row']}" if "row" in entry else ""), fontsize=10)
    if "value" in entry or "values" in entry:
        told = "\n".join(f"{value:.4g}" for value in entry.get("values", [entry.get("value")])[:8])
        right.text(0.5, 0.5, told, ha="center", va="center", fontsize=28, color=COLOR)
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
