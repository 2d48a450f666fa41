"""Fitted estimators as folders of plain data: `model.safetensors` and `config.json`, without pickle.

>>> save_estimator(GRBFClassifier(random_state=0).fit(X, y), "wine")
>>> load_estimator("wine").predict(X)                    # equal to the bit; `fit` works too

The state of an estimator is what its method `state()` returns, which `set_state(state)` takes back; without these
methods, it is every attribute beside the parameters of the constructor. What it may hold is closed, see
:mod:`zoo.estimators.described`. A folder may come from anyone: its files run nothing. After loading, the estimator must
answer a row of zeros within the memory and the steps that such a row can need.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from sklearn.base import BaseEstimator, is_classifier
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from zoo.estimators.described import Reader, Writer, check_names
from zoo.estimators.named import register_estimator
from zoo.support import inputs
from zoo.support.files import (
    CONFIG_NAME,
    RECORD_HASHES,
    WEIGHTS_NAME,
    CheckpointError,
    as_path,
    check_replaceable,
    check_same_model,
    fetch_hub,
    is_safetensors,
    locate,
    read_checkpoint,
    read_config,
    record_hashes,
    undisturbed,
    write_all,
    writer_of,
)
from zoo.support.quoting import shown
from zoo.support.register import UnknownNameError
from zoo.support.signatures import check_call
from zoo.support.values import first_line, is_of_memory

__all__ = ["input_record_of", "load_estimator", "of_inputs", "save_estimator"]

_FORMAT = 1
_WIDEST = 1_000_000  # features
_MOST_STEPS = 100_000  # operations of torch for one row; the largest of the zoo take under 5,000
_SPARE = 2**21  # numbers of a result for one row, beside a multiple of those in the file


def save_estimator(
    estimator: BaseEstimator,
    folder: str | Path,
    *,
    input_record: Mapping[str, Any] | None = None,
    overwrite: bool | None = None,
) -> Path:
    """Save a fitted estimator so that its folder alone rebuilds it. Both files are replaced together and atomically.

    Args:
        estimator: Fitted, of a registered class.
        folder: Created if missing.
        input_record: Description of the table that it takes (see :mod:`zoo.support.inputs`), for example of a data
            module; None: the names of its features, or their number.
        overwrite: Whether a model or estimator saved by the zoo may be replaced; None: only an estimator of the same
            class. Other files never are.

    Returns:
        The folder.

    Raises:
        CheckpointError: The estimator is not fitted, not registered, or holds something that cannot be described as
            plain data; or the folder cannot be written, or holds other files. Nothing is left half-written.
        ValueError: `input_record` does not fit the estimator.
    """
    import zoo

    folder, kind = as_path(folder), type(estimator)
    check_replaceable(folder)
    if overwrite is False and (folder / CONFIG_NAME).exists():
        raise CheckpointError(f"{folder} holds a model already: choose another folder, or overwrite=True")
    name = next((name for name, entry in register_estimator.entries().items() if entry.made is kind), None)
    if name is None:
        raise CheckpointError(
            f"{kind.__name__} is not a registered estimator, so its folder could not rebuild it: register it with "
            "zoo.estimators.register_estimator"
        )
    try:
        check_is_fitted(estimator)
    except NotFittedError as error:
        raise CheckpointError(f"{kind.__name__} is not fitted yet: call fit before it is saved") from error
    config: dict[str, Any] = {"architecture": name, **_outputs(estimator)}
    if not overwrite:
        check_same_model(folder, {**config, "estimator": {}})
    writer = Writer()
    content: dict[str, Any] = {"format": _FORMAT}
    given = estimator.get_params(deep=False)
    content["parameters"] = {key: writer.value(value, key) for key, value in given.items()}
    content["state"] = {key: writer.value(value, key) for key, value in _state(estimator).items()}
    content = json.loads(json.dumps(content))
    try:
        _check_same(estimator, _rebuilt(name, content, dict(writer.tensors)), _numbers(writer.tensors))
    except CheckpointError:
        raise
    except Exception as error:  # of a package of its own
        raise CheckpointError(f"{kind.__name__} could not be rebuilt from its state ({first_line(error)})") from error
    config |= {"input": input_record_of(estimator, input_record), "estimator": content}
    config["zoo"] = {"version": zoo.__version__, "form": "estimator"}
    weights = _serialised(writer.tensors)
    config[RECORD_HASHES] = record_hashes(config)
    config["sha256"] = {WEIGHTS_NAME: hashlib.sha256(weights).hexdigest()}
    text = json.dumps(config, indent=1).encode() + b"\n"
    write_all({folder / WEIGHTS_NAME: writer_of(weights), folder / CONFIG_NAME: writer_of(text)})
    return folder


def load_estimator(source: str | Path) -> Any:
    """The estimator that a folder describes, fitted; its predictions are equal to those of the saved one to the bit.

    Args:
        source: A folder of :func:`zoo.save_pretrained`, with or without `local-dir:`, or
            `hf-hub:<organisation>/<name>`.

    Raises:
        CheckpointError: The folder is missing, damaged, holds no estimator, names a class that a file may not name, or
            does not fit the estimator of that name. Nothing in it is run.
    """
    place, _, rest = str(source).partition(":")
    folder = as_path(rest if place in ("local-dir", "local_dir") else source).expanduser()
    if place in ("hf-hub", "hf_hub"):
        folder = fetch_hub(rest, None).parent
    return undisturbed(folder, lambda: _load(folder))


def _load(folder: Path) -> Any:
    config = read_config(folder)
    name, content = config["architecture"], config.get("estimator")
    if not isinstance(content, dict):
        raise CheckpointError(f"{folder} holds the model {name!r:.60}, not an estimator: zoo.create_model builds it")
    if list(config.get("sha256", {})) != [WEIGHTS_NAME]:
        raise CheckpointError(f"{folder / CONFIG_NAME} records no sha256 of {WEIGHTS_NAME} alone: it is damaged")
    weights = locate(folder)
    if not is_safetensors(weights):  # other formats can describe more numbers than the file holds
        raise CheckpointError(f"{weights} is no safetensors file, the only kind that an estimator is read from")
    tensors = read_checkpoint(weights)
    try:
        found = _rebuilt(name, content, tensors)
        _answer(found, _numbers(tensors))
        _check_beside(found, config)
    except UnknownNameError as error:
        raise CheckpointError(f"{folder}: {error}; install the package that registers it") from None
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    except Exception as error:  # untrusted values can make anything raise
        missing = f"it lacks {error}" if isinstance(error, KeyError) else first_line(error)
        why = "it needs more memory than there is" if is_of_memory(error) else shown(missing)[:200]
        raise CheckpointError(
            f"{folder} does not describe a fitted {name[:60]!r} ({why}): save the estimator again"
        ) from error
    return found


def _rebuilt(name: str, content: Mapping[str, Any], tensors: Mapping[str, Any]) -> Any:
    """The estimator of the content of a folder."""
    made = register_estimator.get(name).made
    if content.get("format") != _FORMAT:
        raise CheckpointError(f"its format is {content.get('format')!r:.40}; this version of the zoo reads {_FORMAT}")
    reader = Reader(tensors)
    given = reader.values(content["parameters"])
    if problems := check_call(made, given):
        raise CheckpointError(f"{name}: {problems[0]}")
    estimator: Any = made(**given)
    if hasattr(made, "_parameter_constraints"):  # scikit-learn's protocol, which not every package follows
        estimator._validate_params()
    state = reader.values(content["state"])
    check_names(made, state)
    if clash := state.keys() & given.keys():
        raise CheckpointError(f"{min(clash)!r:.60} is a parameter, which fitting does not change")
    if callable(put := getattr(estimator, "set_state", None)):
        put(state)
    else:
        vars(estimator).update(state)
    if left := sorted(reader.tensors.keys() - reader.used):
        raise CheckpointError(f"{WEIGHTS_NAME} holds {left[0]!r:.60}, which the estimator does not")
    check_is_fitted(estimator)
    with _bounded(_numbers(tensors)), torch.random.fork_rng(devices=[]):
        for module in reader.modules:
            _check_made(module)
    return estimator


def _check_made(module: nn.Module) -> None:
    """Refuse a kernel or feature map with plain values that its constructor refuses, such as a negative exponent."""
    kind = type(module)
    if not kind.__module__.startswith("zoo.kernels."):
        return
    own, parameters = vars(module), inspect.signature(kind).parameters.values()
    given = {p.name: own[p.name] for p in parameters if isinstance(own.get(p.name), bool | int | float | str)}
    if any(p.default is p.empty and p.name not in given and p.kind is not p.VAR_KEYWORD for p in parameters):
        return  # such as a sum, made of other kernels
    try:
        kind(**given)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"it describes a {kind.__name__} that cannot be: {first_line(error)}") from None


def _state(estimator: Any) -> dict[str, Any]:
    if callable(own := getattr(estimator, "state", None)):
        return own()
    return {key: value for key, value in vars(estimator).items() if key not in estimator.get_params(deep=False)}


def _numbers(tensors: Mapping[str, Any]) -> int:
    return sum(values.numel() for values in tensors.values() if isinstance(values, Tensor))


# ---- an answer, within bounds ------------------------------------------------------------------------------


class _Bounds(TorchDispatchMode):
    """Refuses an operation before it makes a result that is far larger than the file, and too many operations."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.most, self.steps = 8 * numbers + _SPARE, 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: the compiler, whose import takes seconds, is not needed to leave this class alone."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        self.steps += 1
        if self.steps > _MOST_STEPS:
            raise CheckpointError(f"an answer to one row takes more than {_MOST_STEPS:,} steps")
        if all(r.alias_info is None for r in func._schema.returns):  # views and what is done in place take no memory
            self._check(func, args, kwargs)
        return func(*args, **kwargs)

    def _check(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        place = {"device": "meta"} if any(a.name == "device" for a in func._schema.arguments) else {}
        without = lambda part: part.to("meta") if isinstance(part, Tensor) else part  # noqa: E731
        try:
            made = func(*tree_map(without, args), **{**tree_map(without, kwargs), **place})
        except Exception:  # an operation whose size depends on values, or that fails in any case
            return
        for part in made if isinstance(made, list | tuple) else (made,):
            if isinstance(part, Tensor) and part.numel() > self.most:
                raise CheckpointError(f"an answer to one row would need {part.numel():,} numbers at a time")


@contextmanager
def _bounded(numbers: int) -> Iterator[None]:
    with _Bounds(numbers), warnings.catch_warnings(action="ignore"):  # about the names of the features
        yield


def _answer(estimator: Any, numbers: int) -> list[np.ndarray]:
    """Its answers to a row of zeros, checked; none from a classifier without classes, which has forgotten all rows.

    Args:
        estimator: Fitted, possibly from a file.
        numbers: Of its state.

    Raises:
        CheckpointError: An answer has another shape than the outputs, or is not finite.
    """
    count = getattr(estimator, "n_features_in_", None)
    if type(count) is not int or not 0 < count <= _WIDEST:
        raise CheckpointError(f"n_features_in_ is {count!r:.60}, not a number of features")
    _check_labels(estimator)
    classes: Any = getattr(estimator, "classes_", None)
    if is_classifier(estimator) and not len(classes):
        return []
    row, found = np.zeros((1, count)), []
    for name in ("predict_proba", "predict"):
        if callable(function := getattr(estimator, name, None)):
            with _bounded(numbers), warnings.catch_warnings(action="ignore"):  # about the names of the features
                value = np.asarray(function(row))
            right = (1, len(classes)) if name == "predict_proba" else (1,)
            if value.shape[: len(right)] != right:
                raise CheckpointError(f"{name} gives values of the shape {value.shape} for one row, not {right}")
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                raise CheckpointError(f"{name} gives NaN or infinity for a row of zeros")
            found.append(value)
    return found


def _check_labels(estimator: Any) -> None:
    """Refuse classes that are not distinct and sorted, and names that are not one per feature."""
    if is_classifier(estimator):
        classes = getattr(estimator, "classes_", None)
        if not isinstance(classes, np.ndarray) or classes.ndim != 1 or not np.array_equal(np.unique(classes), classes):
            told = " ".join(repr(classes).split())[:60]
            raise CheckpointError(f"classes_ is {told}, not an array of distinct classes in order")
    names = getattr(estimator, "feature_names_in_", None)
    if names is None:
        return
    fine = isinstance(names, np.ndarray) and names.shape == (estimator.n_features_in_,)
    if not fine or not all(isinstance(name, str) for name in names.tolist()) or len(set(names.tolist())) < len(names):
        raise CheckpointError("feature_names_in_ does not hold one name for each feature")


def _outputs(estimator: Any) -> dict[str, Any]:
    """Number of outputs and names of classes, as a configuration has them."""
    if not is_classifier(estimator):
        return {"num_classes": int(getattr(estimator, "n_outputs_", 1))}
    names = [shown(str(label), keep="") for label in estimator.classes_.tolist()]
    if len(set(names)) < len(names):
        raise CheckpointError("classes_ holds two classes of the same name")
    return {"num_classes": len(names), "label_names": names} if names else {"num_classes": 1}


def _check_beside(estimator: Any, config: Mapping[str, Any]) -> None:
    """Refuse a configuration that says something else about inputs and outputs than its estimator."""
    right = _outputs(estimator)
    if {key: config.get(key) for key in ("num_classes", "label_names")} != {"label_names": None, **right}:
        raise CheckpointError(f"{CONFIG_NAME} has other classes than the estimator, which has {right['num_classes']}")
    try:
        input_record_of(estimator, config.get("input"))
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def _check_same(estimator: Any, again: Any, numbers: int) -> None:
    before, after = _answer(estimator, numbers), _answer(again, numbers)
    if not all(np.array_equal(one, other) for one, other in zip(before, after, strict=True)):
        raise CheckpointError(
            f"{type(estimator).__name__} rebuilt from its attributes answers otherwise: give it the methods state() "
            "and set_state(state)"
        )


# ---- the files ---------------------------------------------------------------------------------------------


def input_record_of(estimator: Any, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The record of the table that a fitted estimator takes: as given, or by the names or number of its features.

    Raises:
        ValueError: The given one describes another input.
    """
    count = of_inputs(estimator).n_features_in_
    variables = _variables(estimator)
    if given is not None:
        record = inputs.check(given)
        if record["kind"] != "table" or inputs.shape_of(record) != (count,):
            raise ValueError(f"the record describes another input than the {count} features of the estimator")
        if variables and [_numbers_of(one) for one in record.get("variables", [])] != list(map(_numbers_of, variables)):
            raise ValueError("the record encodes the columns otherwise than the estimator")
        return record
    record = {"kind": "table", "count": count}
    if variables:
        return inputs.check(record | {"columns": estimator.input_names_, "variables": variables})
    try:  # names that no header can hold are left out, and columns taken in order
        return inputs.check(record | {"columns": list(map(str, getattr(estimator, "feature_names_in_", ())))})
    except inputs.InputError:
        return inputs.check(record)


def of_inputs(estimator: Any) -> Any:
    """The estimator of the numbers that a table's columns are encoded as: itself, if it encodes none."""
    own = getattr(estimator, "of_inputs", None)
    return own() if callable(own) else estimator


def _variables(estimator: Any) -> list[dict[str, Any]]:
    """The columns of an estimator that encodes them, as a record has them; empty for any other.

    Raises:
        ValueError: A category or name cannot be printed.
    """
    if of_inputs(estimator) is estimator:
        return []
    count = estimator.n_features_in_
    names = list(map(str, getattr(estimator, "feature_names_in_", [f"x{i}" for i in range(count)])))
    try:
        return [one.model_dump(exclude_defaults=True) for one in estimator.encoding_.variables(names)]
    except ValidationError as error:
        told = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ValueError(
            f"the columns of the estimator cannot be saved: {shown(' '.join(told.split()))[:200]}"
        ) from None


def _numbers_of(variable: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a variable of a record becomes as inputs."""
    return variable.get("values"), variable.get("fill"), variable.get("indicator", False)


def _serialised(tensors: dict[str, Tensor]) -> bytes:
    import safetensors.torch

    try:
        return safetensors.torch.save(tensors, metadata={"format": "pt"})
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{WEIGHTS_NAME} cannot hold numbers of this type ({first_line(error)})") from error
