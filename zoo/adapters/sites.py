"""Sites: the modules that hold adapters, and the places of a transformer where they attach."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from zoo.adapters.config import PARALLEL

__all__ = ["SavedModule"]


class Site(nn.ModuleDict):
    """Named adapters of one module, its child `adapters`; at most one of them is active."""

    def __init__(self) -> None:
        super().__init__()
        self.active: str | None = None
        self.enabled = True

    def current(self) -> Any:
        """The active adapter, or None."""
        return self[self.active] if self.enabled and self.active is not None and self.active in self else None


class HookedSite(Site):
    """Adapters on a module's output, attached by a forward hook."""

    def attach(self, module: nn.Module) -> None:
        """Register as the child `adapters` of a module, and a hook on its output."""
        module.add_module("adapters", self)
        self.handle = module.register_forward_hook(self.added, with_kwargs=True)

    def detach(self, module: nn.Module) -> None:
        """Undo :meth:`attach`."""
        self.handle.remove()
        del module._modules["adapters"]

    def added(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        """The module's output after the active adapter."""
        raise NotImplementedError


class SequentialSite(HookedSite):
    """Adapters after a module."""

    def added(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        adapter = self.current()
        return y if adapter is None else adapter(y)


class ParallelSite(HookedSite):
    """Adapters from the input of a linear layer to slices of its output.

    Args:
        parts: Names of the slices: `("query",)`, or `("query", "key", "value")`.
        heads: The slices are repeated for each of this many heads.
    """

    def __init__(self, parts: tuple[str, ...], heads: int = 1) -> None:
        super().__init__()
        self.parts, self.heads = parts, heads

    def added(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        """(..., out_features) -> (..., out_features)."""
        adapters = self.current()
        if adapters is None:
            return y
        x, width = first_argument(args, kwargs), y.shape[-1] // len(self.parts)
        zero = y.new_zeros(()).expand(*y.shape[:-1], width)
        added = [adapters[p].branch(x).to(y.dtype) if p in adapters else zero for p in self.parts]
        if len(added) > 1:
            added = [part.unflatten(-1, (self.heads, -1)) for part in added]
        return y + (torch.cat(added, -1).flatten(-2) if len(added) > 1 else added[0])


class SavedModule(nn.Module):
    """A module with a trained copy per adapter. In the state dict the module keeps its names."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.adapters = Site()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Output of the active copy, or of the original module."""
        own = self.adapters.current()
        return (self.base if own is None else own)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Attributes of the module; methods are called on all copies too, such as timm's reset of a head."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base", "adapters"):
                raise
        found = getattr(self.base, name)
        return functools.partial(self._on_all, name) if inspect.ismethod(found) else found

    def _on_all(self, name: str, *args: Any, **kwargs: Any) -> Any:
        result = getattr(self.base, name)(*args, **kwargs)
        results = {key: getattr(module, name)(*args, **kwargs) for key, module in self.adapters.items()}
        train_only(self, False)
        active = self.adapters.active
        if active is None or active not in results:
            return result
        train_only(self.adapters[active], True)
        return results[active]

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The base module under its own names, and the copies under `adapters`."""
        state = self.base.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        return self.adapters.state_dict(destination=state, prefix=f"{prefix}adapters.", keep_vars=keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self.base.state_dict():
            if prefix + name in state_dict:
                state_dict[f"{prefix}base.{name}"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args)


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The first argument of a call."""
    return args[0] if args else next(iter(kwargs.values()), None)


def train_only(module: nn.Module, wanted: bool) -> None:
    """`requires_grad_` for floating-point parameters; integers, as in quantised layers, have no gradient."""
    for p in module.parameters():
        p.requires_grad_(wanted and (p.is_floating_point() or p.is_complex()))


def copied(module: nn.Module) -> nn.Module:
    """A deep copy, also of a module that holds non-leaf tensors, such as the result of weight normalisation."""
    attributes = [value for m in module.modules() for value in m.__dict__.values()]
    results = [t for t in attributes if isinstance(t, Tensor) and not t.is_leaf]
    return copy.deepcopy(module, {id(t): t.detach().clone() for t in results})


class Target(NamedTuple):
    """A module that supports adapters: its name, its places, its layer's index and name, the linear layer that
    determines the dtype, and the number of heads of its output.
    """

    name: str
    places: tuple[str, ...]
    layer: int
    within: str
    like: str
    heads: int = 1


def find_targets(model: nn.Module) -> list[Target]:
    """All places of all recognised layers."""
    found: list[Target] = []
    layer = 0
    for name, module in model.named_modules():
        start, inner = f"{name}." if name else "", cast("Any", module)
        add = functools.partial(_target, found, start, layer, name)
        if _has(module, "attention.self.query", "attention.output.dropout", "output.dropout", "intermediate"):  # BERT
            add("attention.output.dropout", ("attention",), "attention.output.dense")
            add("output.dropout", ("output",), "output.dense")
            for place in PARALLEL:
                if _has(module, f"attention.self.{place}"):
                    add(f"attention.self.{place}", (place,))
            layer += 1
        elif _has(module, "attn.proj", "attn.proj_drop", "mlp.drop2", "norm1"):  # timm
            add("attn.proj_drop", ("attention",), "attn.proj")
            add("mlp.drop2", ("output",), "mlp.fc2")
            if _has(module, "attn.qkv"):
                heads = inner.attn.num_heads if getattr(inner.attn, "head_first", False) else 1
                add("attn.qkv", PARALLEL, heads=heads)
            for place in PARALLEL:
                if _has(module, f"attn.{place[0]}_proj"):
                    add(f"attn.{place[0]}_proj", (place,))
            layer += 1
    return found


def _target(
    found: list[Target],
    start: str,
    layer: int,
    within: str,
    name: str,
    places: tuple[str, ...],
    like: str | None = None,
    heads: int = 1,
) -> None:
    found.append(Target(start + name, places, layer, within, start + (like or name), heads))


def _has(module: nn.Module, *names: str) -> bool:
    for name in names:
        inner: Any = module
        for part in name.split("."):
            inner = getattr(inner, part, None)
            if not isinstance(inner, nn.Module):
                return False
    return True


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    model.get_submodule(parent)._modules[last] = new


def sites(model: nn.Module) -> dict[str, Site]:
    """All sites with adapters, by module name."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, Site)}
    return {name.removesuffix(".adapters"): site for name, site in found.items()}
