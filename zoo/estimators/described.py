"""Values of fitted estimators as JSON and tensors, and back, for files that may come from anyone.

What a file may describe is closed: plain values, arrays of numbers and of texts, tensors, random states, and modules
and records (named tuples and dataclasses) by the name of their class, which must be a kernel, a learner, one of
:data:`LAYERS`, or be defined beside a registered estimator, kernel or learner. Modules and records are rebuilt from
their attributes, without a call of their class. Depth, sizes, shared parts and the names of attributes are checked.
"""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.estimators.named import register_estimator
from zoo.kernels.kernel import KERNELS
from zoo.learners.heads import register_learner
from zoo.support.files import CONFIG_NAME, WEIGHTS_NAME, CheckpointError
from zoo.support.register import import_all

__all__ = ["LAYERS", "Reader", "Writer", "check_names"]

#: Layers of torch that a file may name: containers, and what answers rows of a table.
LAYERS = frozenset({
    "BatchNorm1d", "Dropout", "ELU", "Flatten", "GELU", "Identity", "LayerNorm", "LeakyReLU", "Linear", "ModuleDict",
    "ModuleList", "ParameterDict", "ParameterList", "RMSNorm", "ReLU", "SELU", "Sequential", "SiLU", "Sigmoid",
    "Softmax", "Softplus", "Tanh",
})  # fmt: skip
_HOMES = ("zoo.kernels", "zoo.learners", "zoo.models.grbf", "zoo.estimators.encoding")
_OWN = vars(nn.Module()).keys()  # attributes that every module has
_DEEPEST = 50  # values inside of values
_MOST_OBJECTS = 20_000  # modules and records, a shared one counted wherever it stands
_MOST_LETTERS = 2**24  # of an array of texts
_PLAIN = (str, int, float, type(None))  # of an array of texts

# ---- classes -----------------------------------------------------------------------------------------------


def _name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _class(name: Any) -> type | None:
    """The class of a module or record that a file may name; nothing is imported for it but the zoo's own learners."""
    module, _, own = name.rpartition(".") if isinstance(name, str) else ("", "", "")
    if module.startswith("torch."):
        found = getattr(nn, own, None) if own in LAYERS else None
        return found if found is not None and _name_of(found) == name else None
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


def check_names(kind: type, names: Mapping[str, Any]) -> None:
    """Refuse attributes that stand for a method, a property or a setting of the class, or for what every object has."""
    for name in names:
        plain = name.isidentifier() or name.isdecimal()  # the members of a list of modules are numbers
        known = inspect.getattr_static(kind, name, None)
        if not plain or len(name) > 100 or name.startswith("__") or callable(known) or hasattr(known, "__get__"):
            raise CheckpointError(f"{name!r:.60} is no attribute that a {kind.__name__} is described by")
        base = nn.Module if issubclass(kind, nn.Module) else kind
        if name != "training" and inspect.getattr_static(base, name, _missing) is not _missing:
            raise CheckpointError(f"{name!r:.60} is a setting of the class {base.__name__}, not of one that is fitted")


_missing = object()


# ---- values to JSON and tensors ----------------------------------------------------------------------------


class Writer:
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
            strides = value.stride()
            order.sort(key=lambda i: -strides[i])
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
        found: dict[str, Any] = {
            "type": "module" if isinstance(value, nn.Module) else "record",
            "class": _name_of(kind),
        }
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


class Reader:
    """The inverse of :class:`Writer`, for content that may come from anyone."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self.tensors, self.used = tensors, set[str]()
        self.modules: list[nn.Module] = []  # that were described
        self._objects: list[tuple[Any, int]] = []  # modules and records, and how many each holds
        self._depth = self._count = 0
        self._kinds: dict[str, Callable[[dict[str, Any]], Any]] = {
            "array": lambda v: self._tensor(v).numpy(),
            "dict": self._dict,
            "float": lambda v: _float(v["value"]),
            "module": self._module,
            "random_state": _random_state,
            "record": self._record,
            "same": self._same,
            "tensor": self._tensor,
            "tuple": lambda v: tuple(map(self.value, _list(v["values"]))),
            "words": _words,
        }

    def values(self, named: Any) -> dict[str, Any]:
        """The values of an object in JSON."""
        return {name: self.value(value) for name, value in named.items()}

    def value(self, value: Any) -> Any:
        """A described value.

        Raises:
            CheckpointError: It is nested too deeply, or of a type that is not known.
        """
        if not isinstance(value, list | dict):
            return value
        self._depth += 1
        if self._depth > _DEEPEST:
            raise CheckpointError(f"{CONFIG_NAME} describes values inside of values, more than {_DEEPEST} deep")
        try:
            if isinstance(value, list):
                return [self.value(part) for part in value]
            kind = value.get("type")
            if not isinstance(kind, str) or kind not in self._kinds:
                raise CheckpointError(f"{CONFIG_NAME} describes a value of the type {kind!r:.60}, which is not known")
            return self._kinds[kind](value)
        finally:
            self._depth -= 1

    def _dict(self, value: dict[str, Any]) -> dict[Any, Any]:
        found = {}
        for key, part in _list(value["items"]):
            name = self.value(key)
            if name in found:
                raise CheckpointError(f"{CONFIG_NAME} describes a mapping with the key {name!r:.60} twice")
            found[name] = self.value(part)
        return found

    def _tensor(self, value: dict[str, Any]) -> Tensor:
        name, order = value["name"], value["order"]
        found = self.tensors.get(name)
        if not isinstance(found, Tensor):
            raise CheckpointError(f"{WEIGHTS_NAME} lacks {name!r:.60}")
        if name in self.used:  # each use would be another copy
            raise CheckpointError(f"{CONFIG_NAME} uses {name!r:.60} of {WEIGHTS_NAME} twice")
        self.used.add(name)
        return found.clone().permute([order.index(i) for i in range(len(order))])  # aligned as any new tensor

    # ---- modules and records

    def _kind(self, value: dict[str, Any], module: bool) -> type:
        kind = _class(value["class"])
        if kind is None or issubclass(kind, nn.Module) is not module:
            raise CheckpointError(
                f"it names the class {value['class']!r:.100}, which is no kernel, learner or layer that a file may name"
            )
        return kind

    @contextmanager
    def _counted(self, made: Any = None) -> Iterator[list[Any]]:
        """Takes a place for an object, and counts what is described in it; the yielded list gets the object."""
        place, before, holder = len(self._objects), self._count, [made]
        self._objects.append((None, 0))
        self._count = 1
        yield holder
        self._objects[place] = holder[0], self._count
        self._count += before
        if self._count > _MOST_OBJECTS:
            raise CheckpointError(f"{CONFIG_NAME} describes more than {_MOST_OBJECTS:,} modules and records")

    def _same(self, value: dict[str, Any]) -> Any:
        place = value["index"]
        if type(place) is not int or not 0 <= place < len(self._objects) or self._objects[place][0] is None:
            raise CheckpointError(f"{CONFIG_NAME} refers to object {place!r:.60}, which is not described before")
        found, count = self._objects[place]
        self._count += count
        return found

    def _module(self, value: dict[str, Any]) -> nn.Module:
        kind: Any = self._kind(value, True)
        module = kind.__new__(kind)
        nn.Module.__init__(module)
        with self._counted(module):
            module.training = bool(value["training"])
            for part in ("parameters", "buffers", "modules"):
                getattr(module, f"_{part}").update(self._part(kind, part, value))
            module._non_persistent_buffers_set.update(name for name in value["loose"] if name in module._buffers)
            own = self.values(value["values"])
            check_names(kind, own)
            taken = {*_OWN, *module._parameters, *module._buffers, *module._modules}
            if clash := own.keys() & taken:
                raise CheckpointError(f"{min(clash)!r:.60} is no attribute that a {kind.__name__} is described by")
            vars(module).update(own)
        self.modules.append(module)
        return module

    def _part(self, kind: type, part: str, value: dict[str, Any]) -> dict[str, Any]:
        """Parameters, buffers or modules of a module."""
        found = self.values(value[part])
        check_names(kind, found)
        right = nn.Module if part == "modules" else Tensor
        if wrong := [name for name, one in found.items() if one is not None and not isinstance(one, right)]:
            raise CheckpointError(f"{wrong[0]!r:.60} is not of the kind that the {part} of a module are")
        if part != "parameters":
            return found
        learned = value["learned"]
        return {
            name: one if one is None else nn.Parameter(one, requires_grad=bool(learned[name]))
            for name, one in found.items()
        }

    def _record(self, value: dict[str, Any]) -> Any:
        kind = self._kind(value, False)
        with self._counted() as holder:
            found = self.values(value["values"])
            if set(found) != set(_fields(kind) or ()):
                raise CheckpointError(f"a {kind.__name__} has other fields than {list(found)!r:.100}")
            if issubclass(kind, tuple):
                holder[0] = kind(**found)
            else:
                holder[0] = object.__new__(kind)
                for name, part in found.items():
                    object.__setattr__(holder[0], name, part)  # also of a frozen one
        return holder[0]


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise CheckpointError(f"{CONFIG_NAME} describes {value!r:.60} where a list belongs")
    return value


def _float(value: Any) -> float:
    if value not in ("nan", "inf", "-inf"):
        raise CheckpointError(f"{CONFIG_NAME} describes the number {value!r:.60}, which is not nan, inf or -inf")
    return float(value)


def _words(value: dict[str, Any]) -> np.ndarray:
    """An array of texts, or of plain values: texts take the width of the longest that the array may hold."""
    known = re.fullmatch(r"U(\d{1,5})|O", str(value["dtype"]))
    if not known:
        raise CheckpointError(f"{CONFIG_NAME} describes an array of {value['dtype']!r:.60}")
    cells: list[Any] = [_float(cell["value"]) if isinstance(cell, dict) else cell for cell in _list(value["values"])]
    width = known[1] and int(known[1])
    if not all(isinstance(cell, str if width else _PLAIN) for cell in cells):
        raise CheckpointError(f"{CONFIG_NAME} describes an array of texts that holds more than texts and plain values")
    if width and (len(cells) * width > _MOST_LETTERS or max((len(cell) for cell in cells), default=0) > width):
        raise CheckpointError(
            f"{CONFIG_NAME} describes {len(cells):,} texts of {width:,} letters each, which is refused"
        )
    shape = _list(value["shape"])
    if not all(type(side) is int and 0 <= side <= 2**31 for side in shape) or math.prod(shape) != len(cells):
        raise CheckpointError(f"{CONFIG_NAME} describes an array of the shape {shape!r:.60} with {len(cells):,} cells")
    found = np.empty(len(cells), value["dtype"])
    found[:] = cells
    return found.reshape(shape)


def _random_state(value: dict[str, Any]) -> np.random.RandomState:
    """A random state of numpy, which reads out of range if its position lies outside of its keys."""
    kind, keys, place, *rest = _list(value["values"])
    found = np.asarray(_list(keys))
    whole = found.dtype.kind == "i" and found.shape == (624,) and 0 <= found.min() <= found.max() < 2**32
    if kind != "MT19937" or not whole or type(place) is not int or not 0 <= place <= 624 or len(rest) != 2:
        raise CheckpointError(f"{CONFIG_NAME} describes a random state that is damaged")
    if rest[0] not in (0, 1) or not isinstance(rest[1], int | float) or not math.isfinite(rest[1]):
        raise CheckpointError(f"{CONFIG_NAME} describes a random state that is damaged")
    state = np.random.RandomState()
    state.set_state((kind, found.astype(np.uint32), place, int(rest[0]), float(rest[1])))
    return state
