"""Fitted estimators as folders of plain data: `model.safetensors` and `config.json`, without pickle.

>>> save_estimator(GRBFClassifier(random_state=0).fit(X, y), "wine")
>>> load_estimator("wine").predict(X)                    # equal to the bit; `fit` works too

The state of an estimator is what its method `state()` returns, which `set_state(state)` takes back; without these
methods, it is every attribute beside the parameters of the constructor. It may hold plain values, arrays, tensors,
modules and records (named tuples and dataclasses). A module or record is described by the name of its class and its
attributes, and rebuilt without a call of it. A folder may come from anyone: it can name only the zoo's own kernels and
learners, torch's layers, and classes beside a registered estimator, kernel or learner; the files run nothing.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from zoo.estimators.named import register_estimator
from zoo.kernels.kernel import KERNELS
from zoo.learners.heads import register_learner
from zoo.support import inputs
from zoo.support.files import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    CheckpointError,
    check_replaceable,
    fetch_hub,
    locate,
    read_checkpoint,
    read_config,
    undisturbed,
    write_all,
    writer_of,
)
from zoo.support.quoting import shown
from zoo.support.register import UnknownNameError, import_all
from zoo.support.signatures import check_call
from zoo.support.values import first_line

__all__ = ["input_record_of", "load_estimator", "save_estimator"]

_FORMAT = 1
_HOMES = ("zoo.kernels", "zoo.learners", "zoo.models.grbf", "torch.nn.modules")
_OWN = vars(nn.Module()).keys()  # attributes that every module has
_WIDEST = 1_000_000  # features


def save_estimator(
    estimator: BaseEstimator,
    folder: str | Path,
    *,
    input_record: Mapping[str, Any] | None = None,
    overwrite: bool = True,
) -> Path:
    """Save a fitted estimator so that its folder alone rebuilds it. Both files are replaced together and atomically.

    Args:
        estimator: Fitted, of a registered class.
        folder: Created if missing.
        input_record: Description of the table that it takes (see :mod:`zoo.support.inputs`), for example of a data
            module; None: the names of its features, or their number.
        overwrite: Whether a model or estimator saved by the zoo may be replaced; other files never are.

    Returns:
        The folder.

    Raises:
        CheckpointError: The estimator is not fitted, not registered, or holds something that cannot be described as
            plain data; or the folder cannot be written, or holds other files. Nothing is left half-written.
        ValueError: `input_record` does not fit the estimator.
    """
    import zoo

    folder, kind = Path(folder), type(estimator)
    check_replaceable(folder)
    if not overwrite and (folder / CONFIG_NAME).exists():
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
    writer = _Writer()
    content: dict[str, Any] = {"format": _FORMAT}
    given = estimator.get_params(deep=False)
    content["parameters"] = {key: writer.value(value, key) for key, value in given.items()}
    content["state"] = {key: writer.value(value, key) for key, value in _state(estimator).items()}
    content["answers"] = _answer(estimator) is not None
    content = json.loads(json.dumps(content))
    _check_same(estimator, _rebuilt(name, content, dict(writer.tensors)))
    labels = np.asarray(getattr(estimator, "classes_", ()))
    config: dict[str, Any] = {"architecture": name, "num_classes": len(labels) or 1}
    if len(labels):
        config["label_names"] = [shown(str(label), keep="") for label in labels.tolist()]
    config |= {"input": input_record_of(estimator, input_record), "estimator": content}
    config["zoo"] = {"version": zoo.__version__, "form": "estimator"}
    weights = _serialised(writer.tensors)
    config["sha256"] = {WEIGHTS_NAME: hashlib.sha256(weights).hexdigest()}
    text = json.dumps(config, indent=1, ensure_ascii=False).encode() + b"\n"
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
    folder = Path(rest if place in ("local-dir", "local_dir") else source).expanduser()
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
    tensors = read_checkpoint(locate(folder))
    try:
        found = _rebuilt(name, content, tensors)
        if content["answers"] and _answer(found) is None:
            raise ValueError("it answers no row")
    except UnknownNameError as error:
        raise CheckpointError(f"{folder}: {error}; install the package that registers it") from None
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    except Exception as error:  # untrusted values can make anything raise
        raise CheckpointError(
            f"{folder} does not describe a fitted {name[:60]!r} ({first_line(error)}): save the estimator again"
        ) from error
    return found


def _rebuilt(name: str, content: Mapping[str, Any], tensors: Mapping[str, Any]) -> Any:
    """The estimator of the content of a folder."""
    made = register_estimator.get(name).made
    if content.get("format") != _FORMAT:
        raise CheckpointError(f"its format is {content.get('format')!r:.40}; this version of the zoo reads {_FORMAT}")
    reader = _Reader(tensors)
    given = reader.values(content["parameters"])
    if problems := check_call(made, given):
        raise CheckpointError(f"{name}: {problems[0]}")
    estimator: Any = made(**given)
    if hasattr(made, "_parameter_constraints"):  # scikit-learn's protocol, which not every package follows
        estimator._validate_params()
    state = reader.values(content["state"])
    _check_names(made, state)
    if callable(put := getattr(estimator, "set_state", None)):
        put(state)
    else:
        vars(estimator).update(state)
    if left := sorted(reader.tensors.keys() - reader.used):
        raise CheckpointError(f"{WEIGHTS_NAME} holds {left[0]!r:.60}, which the estimator does not")
    return estimator


def _state(estimator: Any) -> dict[str, Any]:
    if callable(own := getattr(estimator, "state", None)):
        return own()
    return {key: value for key, value in vars(estimator).items() if key not in estimator.get_params(deep=False)}


def _answer(estimator: Any) -> Any:
    """Its prediction for a row of zeros; None if it makes none, as one that has forgotten all rows."""
    count = getattr(estimator, "n_features_in_", None)
    if type(count) is not int or not 0 < count <= _WIDEST:
        raise CheckpointError(f"n_features_in_ is {count!r:.60}, not a number of features")
    function = getattr(estimator, "predict_proba", None) or getattr(estimator, "predict", None)
    with warnings.catch_warnings(action="ignore"):  # about the names of the features
        try:
            return None if function is None else np.asarray(function(np.zeros((1, count))))
        except ValueError:
            return None


def _check_same(estimator: Any, again: Any) -> None:
    before, after = _answer(estimator), _answer(again)
    if not (before is after is None or np.array_equal(before, after, equal_nan=before.dtype.kind == "f")):
        raise CheckpointError(
            f"{type(estimator).__name__} rebuilt from its attributes answers otherwise: give it the methods state() "
            "and set_state(state)"
        )


def input_record_of(estimator: Any, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The record of the table that a fitted estimator takes: as given, or by the names or number of its features.

    Raises:
        ValueError: The given one describes another input.
    """
    count = estimator.n_features_in_
    if given is not None:
        record = inputs.check(given)
        if record["kind"] != "table" or inputs.shape_of(record) != (count,):
            raise ValueError(f"the record describes another input than the {count} features of the estimator")
        return record
    record = {"kind": "table", "count": count}
    try:  # names that no header can hold are left out, and columns taken in order
        return inputs.check(record | {"columns": list(map(str, getattr(estimator, "feature_names_in_", ())))})
    except inputs.InputError:
        return inputs.check(record)


def _serialised(tensors: dict[str, Tensor]) -> bytes:
    import safetensors.torch

    try:
        return safetensors.torch.save(tensors, metadata={"format": "pt"})
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{WEIGHTS_NAME} cannot hold numbers of this type ({first_line(error)})") from error


# ---- classes -----------------------------------------------------------------------------------------------


def _name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _class(name: Any) -> type | None:
    """The class of a module or record that a file may name; nothing is imported for it but the zoo's own learners."""
    module, _, own = name.rpartition(".") if isinstance(name, str) else ("", "", "")
    registered = [e.made for r in (register_estimator, KERNELS, register_learner) for e in r.entries().values()]
    homes = {made.__module__ for made in registered}
    if module not in homes and not any(module == home or module.startswith(f"{home}.") for home in _HOMES):
        return None
    if module not in sys.modules and module.startswith("zoo.learners."):
        import_all("zoo.learners")
    found = getattr(sys.modules.get(module), own, None)
    if not isinstance(found, type) or found.__module__ != module:
        return None
    return found if issubclass(found, nn.Module) or _fields(found) is not None else None


def _fields(kind: type) -> tuple[str, ...] | None:
    """Names of the fields of a named tuple or dataclass; None for another class."""
    if issubclass(kind, tuple):
        return getattr(kind, "_fields", None)
    return tuple(f.name for f in fields(kind)) if is_dataclass(kind) else None


def _check_names(kind: type, names: Mapping[str, Any]) -> None:
    """Refuse attributes that stand for a method or a property of the class, or for what every object has."""
    for name in names:
        plain = name.isidentifier() or name.isdecimal()  # the members of a list of modules are numbers
        known = inspect.getattr_static(kind, name, None)
        if not plain or name.startswith("__") or callable(known) or hasattr(known, "__get__"):
            raise CheckpointError(f"{name!r:.60} is no attribute that a {kind.__name__} is described by")


# ---- values to JSON and tensors ----------------------------------------------------------------------------


class _Writer:
    """Describes values as JSON; the numbers of arrays go to `tensors`, by the path of their attribute."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        # of modules and records, which may be shared, by identity; kept alive, or another could get the same one
        self._places: dict[int, tuple[int, Any]] = {}

    def value(self, value: Any, place: str) -> Any:
        """A value in JSON; CheckpointError with its place if it is not plain."""
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"type": "float", "value": repr(value)}
        if isinstance(value, np.ndarray):
            return self._array(value, place)
        if isinstance(value, Tensor):
            return {"type": "tensor", **self._tensor(value, place)}
        if isinstance(value, np.random.RandomState):
            kind, keys, *rest = value.get_state(legacy=True)
            return {"type": "random_state", "values": [kind, np.asarray(keys).tolist(), *rest]}
        if isinstance(value, nn.Module) or _fields(type(value)) is not None:
            return self._object(value, place)
        if isinstance(value, list | tuple):
            parts = [self.value(part, f"{place}.{i}") for i, part in enumerate(value)]
            return parts if isinstance(value, list) else {"type": "tuple", "values": parts}
        if isinstance(value, dict):
            pairs = enumerate(value.items())
            items = [[self.value(k, f"{place}.{i}.key"), self.value(v, f"{place}.{i}")] for i, (k, v) in pairs]
            return {"type": "dict", "items": items}
        raise CheckpointError(f"{place} is a {_name_of(type(value))}, which cannot be saved as plain data")

    def _array(self, value: np.ndarray, place: str) -> dict[str, Any]:
        if value.dtype.kind in "biufc":
            native = value.astype(value.dtype.newbyteorder("="), order="K")
            return {"type": "array", **self._tensor(torch.from_numpy(native), place)}
        if value.dtype.kind not in "OU":
            raise CheckpointError(f"{place} is an array of {value.dtype}, which cannot be saved as plain data")
        cells = [self.value(cell, f"{place}.{i}") for i, cell in enumerate(value.ravel().tolist())]
        return {"type": "words", "values": cells, "dtype": value.dtype.str.lstrip("<>|"), "shape": list(value.shape)}

    def _tensor(self, value: Tensor, place: str) -> dict[str, Any]:
        """Store a tensor in its own order in memory: products of another order differ in their last bits."""
        value = value.detach().cpu()
        order = list(range(value.ndim))
        if not value.is_contiguous():
            order.sort(key=lambda i: -value.stride(i))
        self.tensors[place] = value.permute(order).clone(memory_format=torch.contiguous_format)
        return {"name": place, "order": order}

    def _object(self, value: Any, place: str) -> dict[str, Any]:
        if id(value) in self._places:
            return {"type": "same", "index": self._places[id(value)][0]}
        kind = type(value)
        if _class(_name_of(kind)) is not kind:
            raise CheckpointError(
                f"{place} is a {_name_of(kind)}; a folder may name kernels, learners and torch's layers only, so "
                "register it, or define it beside a registered class"
            )
        self._places[id(value)] = len(self._places), value
        found = {"type": "module" if isinstance(value, nn.Module) else "record", "class": _name_of(kind)}
        if not isinstance(value, nn.Module):
            named = {name: getattr(value, name) for name in _fields(kind) or ()}
            return found | {"values": self._values(named, place)}
        learned = {key: p is not None and p.requires_grad for key, p in value._parameters.items()}
        found |= {"training": value.training, "learned": learned}
        found["loose"] = sorted(value._non_persistent_buffers_set)
        for part in ("parameters", "buffers", "modules"):
            found[part] = self._values(getattr(value, f"_{part}"), place)
        return found | {"values": self._values({k: v for k, v in vars(value).items() if k not in _OWN}, place)}

    def _values(self, named: Mapping[str, Any], place: str) -> dict[str, Any]:
        return {name: self.value(value, f"{place}.{name}") for name, value in named.items()}


class _Reader:
    """The inverse of :class:`_Writer`, for content that may come from anyone."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self.tensors, self.used = tensors, set[str]()
        self._objects: list[Any] = []

    def values(self, named: Any) -> dict[str, Any]:
        """The values of an object in JSON."""
        return {name: self.value(value) for name, value in named.items()}

    def value(self, value: Any) -> Any:
        """A described value."""
        if isinstance(value, list):
            return [self.value(part) for part in value]
        if not isinstance(value, dict):
            return value
        kinds: dict[Any, Callable[[dict[str, Any]], Any]] = {
            "array": lambda v: self._tensor(v).numpy(),
            "dict": lambda v: {self.value(key): self.value(part) for key, part in v["items"]},
            "float": lambda v: float(v["value"]),
            "module": self._module,
            "random_state": _random_state,
            "record": self._record,
            "same": lambda v: self._objects[v["index"]],
            "tensor": self._tensor,
            "tuple": lambda v: tuple(map(self.value, v["values"])),
            "words": self._words,
        }
        kind = value.get("type")
        if not isinstance(kind, str) or kind not in kinds:
            raise CheckpointError(f"{CONFIG_NAME} describes a value of the type {kind!r:.60}, which is not known")
        return kinds[kind](value)

    def _tensor(self, value: dict[str, Any]) -> Tensor:
        name, order = value["name"], value["order"]
        found = self.tensors.get(name)
        if not isinstance(found, Tensor):
            raise CheckpointError(f"{WEIGHTS_NAME} lacks {name!r:.60}")
        self.used.add(name)
        return found.clone().permute([order.index(i) for i in range(len(order))])  # aligned as any new tensor

    def _words(self, value: dict[str, Any]) -> np.ndarray:
        if not re.fullmatch(r"U\d{1,5}|O", value["dtype"]):
            raise CheckpointError(f"{CONFIG_NAME} describes an array of {value['dtype']!r:.60}")
        cells = self.value(value["values"])
        found = np.empty(len(cells), value["dtype"])
        found[:] = cells
        return found.reshape(value["shape"])

    def _kind(self, value: dict[str, Any], module: bool) -> type:
        kind = _class(value["class"])
        if kind is None or issubclass(kind, nn.Module) is not module:
            raise CheckpointError(
                f"it names the class {value['class']!r:.100}, which is no kernel, learner or layer that a file may name"
            )
        return kind

    def _module(self, value: dict[str, Any]) -> nn.Module:
        kind = self._kind(value, True)
        module: Any = kind.__new__(kind)
        nn.Module.__init__(module)
        self._objects.append(module)
        module.training = bool(value["training"])
        for part in ("parameters", "buffers", "modules"):
            found = self.values(value[part])
            _check_names(kind, found)
            right = nn.Module if part == "modules" else Tensor
            if wrong := [name for name, one in found.items() if one is not None and not isinstance(one, right)]:
                raise CheckpointError(f"{wrong[0]!r:.60} is not of the kind that the {part} of a module are")
            if part == "parameters":
                learned = value["learned"]
                found = {
                    name: one if one is None else nn.Parameter(one, requires_grad=bool(learned[name]))
                    for name, one in found.items()
                }
            getattr(module, f"_{part}").update(found)
        module._non_persistent_buffers_set.update(name for name in value["loose"] if name in module._buffers)
        own = self.values(value["values"])
        _check_names(kind, own)
        if clash := own.keys() & _OWN:
            raise CheckpointError(f"{min(clash)!r:.60} is no attribute that a {kind.__name__} is described by")
        vars(module).update(own)
        return module

    def _record(self, value: dict[str, Any]) -> Any:
        kind = self._kind(value, False)
        place = len(self._objects)
        self._objects.append(None)
        found = self.values(value["values"])
        if set(found) != set(_fields(kind) or ()):
            raise CheckpointError(f"a {kind.__name__} has other fields than {', '.join(found)[:100]}")
        record: Any
        if issubclass(kind, tuple):
            record = kind(**found)
        else:
            record = object.__new__(kind)
            for name, part in found.items():
                object.__setattr__(record, name, part)  # also of a frozen one
        self._objects[place] = record
        return record


def _random_state(value: dict[str, Any]) -> np.random.RandomState:
    kind, keys, *rest = value["values"]
    state = np.random.RandomState()
    state.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    return state
