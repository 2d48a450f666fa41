"""Adapters on pretrained transformers: small trained branches in a frozen network, and SNNK in place of its layers.

`inject_adapters` knows timm's vision transformers and BERT-style encoders of Hugging Face transformers, whose names it
reads off the modules; neither library is imported. Modules stay what and where they are, and adapters are hooks on what
they give, so that any kind of layer keeps its own forward pass, and the names in the base model's state dict do not
change. A forward pass of the model's example input shows first that every module is called, and with which widths.

    vector      y + v * Psi Phi(y)         SNNK, v = 0 at the start
    bottleneck  y + U Psi Phi(y) + c       SNNK with r hidden units, U = 0
    houlsby     y + U relu(D y + b) + c    Houlsby et al., 2019, the usual adapter, for comparison, U = 0

Phi are ReLU features of `zoo.kernels.random_features`. Sequential adapters sit behind attention and feed-forward
network, before the residual sum ("attention", "output"); parallel ones add v * Psi Phi(x) to a query, key or value
("query", "key", "value"). All start as the identity, and compute in float32 where their layer computes in float16.

>>> config = AdapterConfig(form="vector", num_features=16, modules_to_save=("classifier",))
>>> model = inject_adapters(model, config)
>>> count_parameters(model)                      # trained, random, all
>>> save_adapter(model, "my_adapter")            # adapter_model.safetensors, adapter_config.json
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import json
import math
import os
import re
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from zoo.files import CheckpointError, check_inside, read_checkpoint, undisturbed, write_all, writer_of
from zoo.kernels.base import no_autocast
from zoo.kernels.random_features import ReLUFeatures
from zoo.models.conversion import Inputs, call_model
from zoo.models.snnk import SNNKLinear
from zoo.suggest import suggestion
from zoo.values import DamagedFileError, read_json

__all__ = [
    "Adapter",
    "AdapterConfig",
    "Counts",
    "HoulsbyAdapter",
    "SNNKAdapter",
    "SavedModule",
    "adapter_names",
    "add_adapter",
    "count_parameters",
    "delete_adapter",
    "disable_adapters",
    "inject_adapters",
    "load_adapter",
    "merge_adapters",
    "save_adapter",
    "set_adapter",
    "unload_adapters",
]

FORMS = ("vector", "bottleneck", "houlsby")
SEQUENTIAL = ("attention", "output")
PARALLEL = ("query", "key", "value")
INITS = ("mam", "bert")


@dataclass(frozen=True)
class AdapterConfig:
    """What to inject, and where. Names follow PEFT where it has them.

    Attributes:
        form: `"vector"`, `"bottleneck"` or `"houlsby"`.
        places: Any of `"attention"`, `"output"` (behind attention and feed-forward network), `"query"`, `"key"`,
            `"value"` (beside them; form `"vector"` only).
        num_features: Random features m of an SNNK adapter.
        bottleneck: Hidden units r of the other two forms.
        layers_to_transform: Numbers of the layers, negative from the last one; None: all.
        exclude_modules: Regular expression for names of modules that are left out.
        modules_to_save: Last parts of names of modules that are trained and saved whole, a copy for each adapter:
            `("classifier",)`, `("pooler", "classifier")`, `("head",)`.
        init_weights: Start of Psi or D: `"mam"`, Kaiming-uniform, or `"bert"`, normal with deviation 0.02.
        constant: Lower clip of the features.
        centered: Centred features, see `ReLUFeatures`.
        normalize: Norm that features are computed at; None: as it comes.
        layer_norm: A LayerNorm of its own in front of the branch.
        projection: `"orthogonal"`, `"iid"` or `"hadamard"`.
        seed: Of the projections; each adapter of a model has one of its own.
        save_projection: Save the random projections too. Otherwise they are drawn again, and checked on loading.
    """

    form: Literal["vector", "bottleneck", "houlsby"] = "vector"
    places: tuple[str, ...] = ("attention", "output")
    num_features: int = 16
    bottleneck: int = 48
    layers_to_transform: tuple[int, ...] | None = None
    exclude_modules: str | None = None
    modules_to_save: tuple[str, ...] = ()
    init_weights: Literal["mam", "bert"] = "mam"
    constant: float = 0.0
    centered: bool = False
    normalize: float | None = None
    layer_norm: bool = False
    projection: Literal["orthogonal", "iid", "hadamard"] = "orthogonal"
    seed: int = 0
    save_projection: bool = True

    def __post_init__(self) -> None:
        for name in ("places", "modules_to_save", "layers_to_transform"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ValueError(f"{name}={value!r} must be a list: [{value!r}]")
            object.__setattr__(self, name, None if value is None else tuple(value))
        _one_of("form", self.form, FORMS)
        _one_of("init_weights", self.init_weights, INITS)
        for place in self.places:
            _one_of("places", place, (*SEQUENTIAL, *PARALLEL))
        if not self.places:
            raise ValueError("places is empty: name at least one")
        if self.form != "vector" and set(self.places) & set(PARALLEL):
            raise ValueError("query, key and value take adapters of form='vector' only")
        for name, kind in _kinds().items():
            value = getattr(self, name)
            try:
                kind.validate_python(value, strict=name != "normalize" and name != "constant")
            except ValidationError as error:
                reason = error.errors()[0]["msg"]
                raise ValueError(f"{name}={value!r}: {reason[:1].lower()}{reason[1:]}") from None
        for name in ("num_features", "bottleneck"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        try:
            re.compile(self.exclude_modules or "")
        except re.error as error:
            raise ValueError(f"exclude_modules={self.exclude_modules!r} is no regular expression: {error}") from None


@functools.cache
def _kinds() -> dict[str, TypeAdapter[Any]]:
    """Validators of the fields of a configuration by name."""
    hints = typing.get_type_hints(AdapterConfig)
    return {name: TypeAdapter(hint) for name, hint in hints.items() if name not in ("form", "places", "init_weights")}


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: {value!r}{suggestion(value, allowed)}")


# ---- branches ----------------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """A branch from width d to width e, which is d behind a module; :meth:`branch` is what it adds."""

    def branch(self, x: Tensor) -> Tensor:
        """What is added to the module's output, (..., d) -> (..., e), in float32 for half precision."""
        with no_autocast(x.device):
            return self._branch(self._widened(x))

    def _branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _widened(self, x: Tensor) -> Tensor:
        """In the wider type of input and parameters, but not in float16, in which 0 * overflow would be NaN."""
        own = next((p.dtype for p in self.parameters()), x.dtype)
        wide = torch.promote_types(x.dtype, own)
        return x.to(torch.float32 if wide == torch.float16 else wide)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d): x + branch(x), in the type of x."""
        return x + self.branch(x).to(x.dtype)


def _linear(x: Tensor, layer: nn.Linear | SNNKLinear) -> Tensor:
    """The matrix and the bias of a layer, in the type of x."""
    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


def _normed(x: Tensor, norm: nn.Module) -> Tensor:
    """A LayerNorm in the type of x; x itself where there is none."""
    if not isinstance(norm, nn.LayerNorm):
        return x
    return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


class SNNKAdapter(Adapter):
    """The SNNK adapter: v * Psi Phi(x), or U Psi Phi(x) + c.

    Args:
        dim: Width d.
        config: `form`, `num_features`, `bottleneck` and how Phi and Psi are made.
        seed: Of the projection.
        out_dim: Width e of what is added; None: d.
        device: Where it lives.
        dtype: Its type.
    """

    def __init__(
        self, dim: int, config: AdapterConfig, seed: int = 0, out_dim: int | None = None, device=None, dtype=None
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        out_dim = dim if out_dim is None else out_dim
        features = ReLUFeatures(
            dim,
            config.num_features,
            constant=config.constant,
            centered=config.centered,
            normalize=config.normalize,
            projection=config.projection,
            persistent=config.save_projection,
            bias=False,
            seed=seed,
            **dd,
        )
        vector = config.form == "vector"
        self.norm = nn.LayerNorm(dim, **dd) if config.layer_norm else nn.Identity()
        self.layer = SNNKLinear(features, out_dim if vector else config.bottleneck, **dd)
        if config.init_weights == "bert" and not self.layer.weight.is_meta:
            with torch.no_grad():
                start = torch.empty(self.layer.out_features, dim, **dd).normal_(std=0.02)
                self.layer.weight.copy_(features.encode(start))
        self.scale = nn.Parameter(torch.zeros(out_dim, **dd)) if vector else None
        self.up: nn.Linear | None = None
        if not vector:
            self.up = nn.Linear(config.bottleneck, out_dim, **dd)
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def _branch(self, x: Tensor) -> Tensor:
        h = _linear(self.layer.features(_normed(x, self.norm)), self.layer)
        if self.up is not None:
            return _linear(h, self.up)
        return h if self.scale is None else h * self.scale

    @torch.no_grad()
    def reparameterize(self) -> None:
        """One matrix (d, m) in place of two, for `zoo.to_deploy`."""
        if self.up is not None:
            self.layer, self.up = self.layer.fold(self.up), None
        elif self.scale is not None:
            self.layer.weight.mul_(self.scale.unsqueeze(-1))
            self.scale = None


class HoulsbyAdapter(Adapter):
    """The bottleneck adapter of Houlsby et al. (arXiv 1902.00751): U relu(D x + b) + c.

    Args:
        dim: Width.
        config: `bottleneck`, `layer_norm` and `init_weights`.
        seed: Of no meaning here: nothing is random but the start.
        out_dim: Width of what is added; None: `dim`.
        device: Where it lives.
        dtype: Its type.
    """

    def __init__(
        self, dim: int, config: AdapterConfig, seed: int = 0, out_dim: int | None = None, device=None, dtype=None
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(dim, **dd) if config.layer_norm else nn.Identity()
        self.down = nn.Linear(dim, config.bottleneck, **dd)
        self.up = nn.Linear(config.bottleneck, dim if out_dim is None else out_dim, **dd)
        if config.init_weights == "bert":
            nn.init.normal_(self.down.weight, std=0.02)
        else:
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for p in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(p)

    def _branch(self, x: Tensor) -> Tensor:
        return _linear(F.relu(_linear(_normed(x, self.norm), self.down)), self.up)


# ---- where they sit ----------------------------------------------------------------------------------------


class Site(nn.ModuleDict):
    """The named adapters of one module, its child `adapters`; one or none of them is active."""

    def __init__(self) -> None:
        super().__init__()
        self.active: str | None = None
        self.enabled = True

    def current(self) -> Any:
        """The active adapter, or None."""
        return self[self.active] if self.enabled and self.active is not None and self.active in self else None


class HookedSite(Site):
    """Adapters on what a module gives: the module and its forward pass stay as they are."""

    def attach(self, module: nn.Module) -> None:
        """Become the child `adapters` of a module, and a hook on its output."""
        module.add_module("adapters", self)
        self.handle = module.register_forward_hook(self.added, with_kwargs=True)

    def detach(self, module: nn.Module) -> None:
        """Leave the module as it was."""
        self.handle.remove()
        del module._modules["adapters"]

    def added(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        """The module's output through the active adapter."""
        raise NotImplementedError


class SequentialSite(HookedSite):
    """Adapters behind a module."""

    def added(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        adapter = self.current()
        return y if adapter is None else adapter(y)


class ParallelSite(HookedSite):
    """Adapters from the input of a linear layer to slices of its output.

    Args:
        parts: What the slices are: `("query",)`, or `("query", "key", "value")`.
        heads: The slices come once for each of so many heads.
    """

    def __init__(self, parts: tuple[str, ...], heads: int = 1) -> None:
        super().__init__()
        self.parts, self.heads = parts, heads

    def added(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        """(..., out_features) -> (..., out_features)."""
        adapters = self.current()
        if adapters is None:
            return y
        x, width = _first(args, kwargs), y.shape[-1] // len(self.parts)
        zero = y.new_zeros(()).expand(*y.shape[:-1], width)
        added = [adapters[p].branch(x).to(y.dtype) if p in adapters else zero for p in self.parts]
        if len(added) > 1:
            added = [part.unflatten(-1, (self.heads, -1)) for part in added]
        return y + (torch.cat(added, -1).flatten(-2) if len(added) > 1 else added[0])


class SavedModule(nn.Module):
    """A module that every adapter has a trained copy of. In the state dict the module keeps its names."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.adapters = Site()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The active copy's output, or the original module's."""
        own = self.adapters.current()
        return (self.base if own is None else own)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """What the module has; its methods are called on all copies too, as timm's heads are reset by one."""
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
        _train(self, False)
        active = self.adapters.active
        if active is None or active not in results:
            return result
        _train(self.adapters[active], True)
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


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The first argument of a call."""
    return args[0] if args else next(iter(kwargs.values()), None)


def _train(module: nn.Module, wanted: bool) -> None:
    """As `requires_grad_`; whole numbers, as of quantised layers, have no gradient."""
    for p in module.parameters():
        p.requires_grad_(wanted and (p.is_floating_point() or p.is_complex()))


def _copied(module: nn.Module) -> nn.Module:
    """A deep copy, also of a module that keeps results, as that of a norm and a direction."""
    attributes = [value for m in module.modules() for value in m.__dict__.values()]
    results = [t for t in attributes if isinstance(t, Tensor) and not t.is_leaf]
    return copy.deepcopy(module, {id(t): t.detach().clone() for t in results})


class _Target(NamedTuple):
    """A module that takes adapters: its name, the places it stands for, its layer's number and name, the linear layer
    whose type they take, and the heads that its output is cut into first.
    """

    name: str
    places: tuple[str, ...]
    layer: int
    within: str
    like: str
    heads: int = 1


def _targets(model: nn.Module) -> list[_Target]:
    """Every place of every layer that is recognised."""
    found: list[_Target] = []
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
    found: list[_Target],
    start: str,
    layer: int,
    within: str,
    name: str,
    places: tuple[str, ...],
    like: str | None = None,
    heads: int = 1,
) -> None:
    found.append(_Target(start + name, places, layer, within, start + (like or name), heads))


def _has(module: nn.Module, *names: str) -> bool:
    for name in names:
        inner: Any = module
        for part in name.split("."):
            inner = getattr(inner, part, None)
            if not isinstance(inner, nn.Module):
                return False
    return True


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    model.get_submodule(parent)._modules[last] = new


def sites(model: nn.Module) -> dict[str, Site]:
    """Every place with adapters, by name."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, Site)}
    return {name.removesuffix(".adapters"): site for name, site in found.items()}


# ---- what a model calls ------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """A call of a module: widths of what it was given and gave, None where that is no tensor, and type and device."""

    given: int | None
    made: int | None
    dtype: torch.dtype | None
    device: torch.device | None


def _calls(model: nn.Module, targets: Sequence[_Target], saved: Sequence[str], example: Any) -> dict[str, _Call]:
    """The first call of every module in a forward pass of the example, by name.

    Raises:
        ValueError: A module is not called, no example can be run, or a module cannot take adapters.
    """
    names = [t.name for t in targets] + list(saved)
    found: dict[str, _Call] = {}
    undecided, problems = set(names), []
    for root, inputs in _examples(model, targets, example):
        inside = {n for n in undecided if not root or n == root or n.startswith(f"{root}.")}
        if not inside:
            continue
        try:
            seen = _watched(model, root, inputs, inside)
        except Exception as error:  # whatever a stranger's model says of an input
            problems.append(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")
            continue
        silent = sorted(inside - seen.keys(), key=names.index)
        if silent:
            raise ValueError(
                f"{_listed(silent)} never called in a forward pass of {type(model).__name__} on its example input, so "
                "that adapters there would do nothing (the model may read their weights itself, or not use them): "
                "leave them out by places, modules_to_save or exclude_modules, or pass example=<inputs that reach them>"
            )
        undecided -= inside
        found |= seen
    for name in [n for n in saved if n in undecided]:
        undecided.discard(name)
        warnings.warn(
            f"modules_to_save: nothing shows that {name} is called; pass example=<inputs of the model>",
            RuntimeWarning,
            stacklevel=3,
        )
    if undecided:
        first = sorted(undecided, key=names.index)
        reason = f"the last attempt ended with {problems[-1]}" if problems else "it has none of its own"
        raise ValueError(
            f"no example input of {type(model).__name__} could be run to see whether {_listed(first)} called "
            f"({reason}): pass example=<inputs of the model>"
        )
    return found


def _listed(names: Sequence[str]) -> str:
    """Names and their verb."""
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"


def _examples(model: nn.Module, targets: Sequence[_Target], example: Any) -> Iterator[tuple[str, Inputs]]:
    """Parts of a model, outermost first, and inputs of each; the layers themselves at last."""
    if example is not None:
        yield "", example
        return
    for name, module in model.named_modules():
        for inputs in _own_examples(module):
            yield name, inputs
    for within in dict.fromkeys(t.within for t in targets):
        layer = model.get_submodule(within)
        norm = next((m for m in layer.modules() if isinstance(m, nn.LayerNorm)), None)
        if norm is not None:
            yield within, _like(layer, torch.zeros(1, 16, norm.normalized_shape[-1], device="cpu"))


def _own_examples(module: Any) -> list[Inputs]:
    """What a model of transformers or timm says of its inputs; nothing for any other module."""
    config = getattr(module, "config", None)
    if hasattr(module, "dummy_inputs") and config is not None:
        if getattr(module, "main_input_name", "input_ids") == "pixel_values" and hasattr(config, "image_size"):
            side = config.image_size
            sides = side if isinstance(side, Sequence) else (side, side)
            return [{"pixel_values": _like(module, torch.zeros(1, config.num_channels, *sides, device="cpu"))}]
        tokens = dict(module.dummy_inputs)
        if "input_ids" in tokens:
            vocabulary, pad = getattr(config, "vocab_size", None) or 1, getattr(config, "pad_token_id", None)
            ids = tokens["input_ids"] % vocabulary
            tokens["input_ids"] = ids if pad is None else ids.where(ids != pad, (pad + 1) % vocabulary)
        return [{k: _like(module, v) if isinstance(v, Tensor) else v for k, v in tokens.items()}]
    record = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None)
    if record is None or not hasattr(module, "forward_features"):
        return []
    own = getattr(getattr(module, "patch_embed", None), "img_size", None)
    size = record.get("input_size") if isinstance(record, Mapping) else getattr(record, "input_size", None)
    first = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
    chans = first.in_channels if first is not None else size[0] if size else 3
    sizes = dict.fromkeys(tuple(s) for s in (own, size[-2:] if size else None) if s is not None)
    return [_like(module, torch.zeros(1, chans, *s, device="cpu")) for s in sizes]


def _like(module: nn.Module, x: Tensor) -> Tensor:
    """On the device of a module; floating-point numbers in its type."""
    p = next((p for p in module.parameters() if p.is_floating_point()), None)
    if p is None:
        return x
    return x.to(p.device, p.dtype if x.is_floating_point() and p.dtype.itemsize > 1 else x.dtype)


def _watched(model: nn.Module, root: str, inputs: Inputs, names: set[str]) -> dict[str, _Call]:
    """Run a part of the model and see which modules are called, and with what."""
    seen: dict[str, _Call] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], made: Any) -> None:
            given, tensor = (t if isinstance(t, Tensor) and t.ndim else None for t in (_first(args, kwargs), made))
            width = None if given is None else given.shape[-1]
            if tensor is None:
                seen.setdefault(name, _Call(width, None, None, None))
            else:
                seen.setdefault(name, _Call(width, tensor.shape[-1], tensor.dtype, tensor.device))

        return hook

    part = model.get_submodule(root)
    kinds = {p.dtype for p in part.parameters() if p.is_floating_point()}
    half = next((k for k in (torch.bfloat16, torch.float16) if k in kinds), None)
    device = next((p.device.type for p in part.parameters()), "cpu")
    modes: list[Any] = [contextlib.nullcontext()]
    if half is not None and len(kinds) > 1 and torch.amp.is_autocast_available(device):
        modes.append(torch.autocast(device, half))  # types that only mixed precision brings together
    with _undisturbed(model):
        handles = [model.get_submodule(n).register_forward_hook(watch(n), with_kwargs=True) for n in names]
        try:
            _first_that_runs(modes, lambda: call_model(part, inputs))
        finally:
            for handle in handles:
                handle.remove()
    return seen


def _first_that_runs(modes: Sequence[Any], run: Callable[[], Any]) -> None:
    for mode in modes:
        try:
            with mode:
                run()
            return
        except Exception:
            if mode is modes[-1]:
                raise


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation without gradients that leaves no trace in attributes, buffers and generators."""
    modules = list(model.modules())
    attributes = [dict(m.__dict__) for m in modules]
    tables = [dict(m._buffers) for m in modules]
    buffers = [(b, b.clone(), _version(b)) for table in tables for b in table.values() if b is not None]
    with _generators_kept(model), torch.no_grad():
        for m in modules:
            m.training = False
        try:
            yield
        finally:
            for m, own, table in zip(modules, attributes, tables, strict=True):
                m.__dict__.clear()
                m.__dict__.update(own)
                m._buffers.clear()
                m._buffers.update(table)
            for b, before, version in buffers:
                if version is None or version != _version(b):
                    b.copy_(before)


def _version(t: Tensor) -> int | None:
    """How often a tensor was written to; None where that is not counted."""
    return None if t.is_inference() else t._version


def _generators_kept(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """A context after which torch's global generators are where they were."""
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    return torch.random.fork_rng(sorted(devices))


# ---- the calls ---------------------------------------------------------------------------------------------


def inject_adapters(
    model: nn.Module, config: AdapterConfig | Mapping[str, Any], name: str = "default", *, example: Inputs | None = None
) -> nn.Module:
    """Put adapters into a pretrained transformer, freeze the rest, and make them the active ones; in place.

    A forward pass in eval mode, which leaves no trace, shows first that every module is called; each adapter has the
    widths seen there, and type and device of its own layer. Global generators are left where they were.

    Args:
        model: A timm vision transformer, or a BERT-style encoder or classifier of Hugging Face.
        config: What and where; a mapping is taken as the arguments of :class:`AdapterConfig`.
        name: Of this set of adapters. Further ones may be added under other names.
        example: Inputs of the model: a tensor, positional arguments, or keyword arguments. None takes the example that
            timm (`pretrained_cfg`) or transformers (`dummy_inputs`) give of the model or of a part of it.

    Returns:
        `model` itself.

    Raises:
        ValueError: Nothing in the model matches, a module is never called or cannot take adapters, the name is taken,
            or the configuration is not valid. The model is as it was.
    """
    config = config if isinstance(config, AdapterConfig) else _config_from(config, "config")
    if not re.fullmatch(r"\w+", name):
        raise ValueError(f"name={name!r} of an adapter may hold letters, digits and _ only")
    if hasattr(Site(), name):
        raise ValueError(f"name={name!r} of an adapter is taken by torch's modules: choose another")
    if name in adapter_names(model):
        raise ValueError(f"there is already an adapter {name!r}: delete_adapter(model, {name!r}) first")
    chosen, saved = _choose(model, config)
    calls = _calls(model, chosen, saved, example)
    with _generators_kept(model):
        made = [
            _branches(config, target, _checked_call(model, target, calls[target.name]), config.seed + 1000 * index)
            for index, target in enumerate(chosen)
        ]
    _adopt(model)
    for target, adapter in zip(chosen, made, strict=True):
        module = model.get_submodule(target.name)
        site: Any = module._modules.get("adapters")
        if not isinstance(site, Site):
            site = SequentialSite() if target.places[0] in SEQUENTIAL else ParallelSite(target.places, target.heads)
            site.attach(module)
        site[name] = adapter
        site.train(model.training)
    for target_name in saved:
        kept: Any = model.get_submodule(target_name)
        if not isinstance(kept, SavedModule):
            kept = SavedModule(kept).train(kept.training)
            _replace(model, target_name, kept)
        kept.adapters[name] = _copied(kept.base)
    configs, paths = dict(getattr(model, "adapter_configs", {})), dict(getattr(model, "adapter_saved", {}))
    model.adapter_configs = {**configs, name: config}  # type: ignore[assignment]
    model.adapter_saved = {**paths, name: tuple(saved)}  # type: ignore[assignment]
    _activate(model, name)
    return model


add_adapter = inject_adapters


def _branches(config: AdapterConfig, target: _Target, call: _Call, seed: int) -> nn.Module:
    """One adapter, or one for each part of a layer that has several."""
    dd: dict[str, Any] = {"device": call.device, "dtype": call.dtype}
    kind = HoulsbyAdapter if config.form == "houlsby" else SNNKAdapter
    if target.places[0] in SEQUENTIAL:
        return kind(cast("int", call.made), config, seed, **dd)
    width = cast("int", call.made) // len(target.places)
    parts = [p for p in target.places if p in config.places]
    return nn.ModuleDict({p: kind(cast("int", call.given), config, seed + i, width, **dd) for i, p in enumerate(parts)})


def _checked_call(model: nn.Module, target: _Target, call: _Call) -> _Call:
    """The call with the type of the target's layer.

    Raises:
        ValueError: The module cannot take adapters.
    """
    module, layer = model.get_submodule(target.name), _inner(model, target.like)
    if call.given is None or call.made is None:
        raise ValueError(f"{target.name} cannot take an adapter: it does not turn one tensor into one tensor")
    if isinstance(layer, nn.modules.conv._ConvNd):
        raise ValueError(f"{target.name} cannot take an adapter: its layer is a convolution, channels are not last")
    if hasattr(module, "adapters") and not isinstance(module.adapters, Site):
        raise ValueError(f"{target.name} cannot take an adapter: it has something named adapters already")
    parts = len(target.places) * target.heads
    split = hasattr(_inner(model, target.name.rpartition(".")[0]), "key_dim")  # value and key differ in width
    if call.made % parts or (parts > 1 and split):
        raise ValueError(f"{target.name} cannot take an adapter: its output is not cut into {parts} equal parts")
    weight = getattr(layer, "weight", None)
    own = weight if isinstance(weight, Tensor) and weight.is_floating_point() and weight.dtype.itemsize > 1 else None
    dtype = cast("torch.dtype", call.dtype) if own is None else own.dtype
    if not dtype.is_floating_point:
        raise ValueError(f"{target.name} cannot take an adapter: its output is of type {dtype}")
    return call._replace(dtype=dtype)


def _inner(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _choose(model: nn.Module, config: AdapterConfig) -> tuple[list[_Target], list[str]]:
    """The modules that a configuration selects."""
    every = _targets(model)
    count = len({t.layer for t in every})
    if not every:
        raise ValueError(
            f"{type(model).__name__} has no layer that adapters know: a BERT-style encoder (attention.self.query, "
            "intermediate, output) or a timm vision transformer (attn.proj, mlp) is needed"
        )
    wanted = range(count)
    if config.layers_to_transform is not None:
        bad = [i for i in config.layers_to_transform if not -count <= i < count]
        if bad:
            raise ValueError(f"layers_to_transform: the model has {count} layers, there is no layer {bad[0]}")
        wanted = [i % count for i in config.layers_to_transform]  # type: ignore[assignment]
    skip = re.compile(config.exclude_modules) if config.exclude_modules else None
    chosen = [
        t
        for t in every
        if t.layer in wanted and set(t.places) & set(config.places) and not (skip and skip.search(t.name))
    ]
    if not chosen:
        raise ValueError(
            f"no module matches places={list(config.places)}, layers_to_transform={config.layers_to_transform}, "
            f"exclude_modules={config.exclude_modules!r}; there are {', '.join(t.name for t in every[:5])}, ..."
        )
    missing = [p for p in config.places if not any(p in t.places for t in chosen)]
    if missing:
        raise ValueError(f"places: no module of {type(model).__name__} that is chosen stands for {missing[0]!r}")
    objects: dict[int, str] = {}
    for t in chosen:
        other = objects.setdefault(id(model.get_submodule(t.name)), t.name)
        if other != t.name:
            raise ValueError(f"{other} and {t.name} are one module: they cannot have adapters of their own")
    return chosen, _choose_saved(model, config, [t.name for t in chosen])


def _choose_saved(model: nn.Module, config: AdapterConfig, chosen: Sequence[str]) -> list[str]:
    """Names of the modules that `modules_to_save` means, outermost ones."""
    names = [n for n, _ in model.named_modules() if n and "adapters" not in n.split(".")]
    names = [n for n in names if not isinstance(_inner(model, n.rpartition(".")[0]), SavedModule)]
    saved: list[str] = []
    for last in config.modules_to_save:
        found = [n for n in names if n == last or n.endswith(f".{last}")]
        if not found:
            raise ValueError(f"modules_to_save: no module {last!r}{suggestion(last, names)}")
        saved += [n for n in found if n not in saved]
    saved = [n for n in saved if not any(n.startswith(f"{other}.") for other in saved)]
    for n in saved:
        inside = [c for c in [*chosen, *sites(model)] if c.startswith(f"{n}.") or n.startswith(f"{c}.") or c == n]
        inside = [c for c in inside if not isinstance(_inner(model, c), SavedModule)]
        if inside:
            raise ValueError(f"modules_to_save: {n} holds {inside[0]}, which has adapters; it cannot be saved whole")
    return saved


def _adopt(model: nn.Module) -> None:
    """Take a module that was put in the place of one of `modules_to_save`, as by timm's `reset_classifier`, for the
    active adapter's own.
    """
    active = _active(model)
    for path in _saved_paths(model, active):
        module = _inner(model, path)
        if module is not None and not isinstance(module, SavedModule):
            kept = SavedModule(_copied(module)).train(module.training)
            kept.adapters[cast("str", active)] = module
            _replace(model, path, kept)


def _active(model: nn.Module) -> str | None:
    return next((site.active for site in sites(model).values()), None)


def _saved_paths(model: nn.Module, name: str | None) -> tuple[str, ...]:
    """Where the modules are that are trained and saved whole."""
    return cast("dict[str | None, tuple[str, ...]]", getattr(model, "adapter_saved", {})).get(name, ())


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the sets of adapters in a model."""
    return list(getattr(model, "adapter_configs", {}))


def _known(model: nn.Module, name: str) -> AdapterConfig:
    names = adapter_names(model)
    if name not in names:
        raise ValueError(f"there is no adapter {name!r}{suggestion(name, names) or '; there is none at all'}")
    return model.adapter_configs[name]  # type: ignore[index,return-value]


def set_adapter(model: nn.Module, name: str) -> None:
    """Make one set of adapters the active one, and the only thing that is trained.

    Raises:
        ValueError: There is none of this name.
    """
    _known(model, name)
    _adopt(model)
    _activate(model, name)


def _activate(model: nn.Module, name: str) -> None:
    _train(model, False)
    for site in sites(model).values():
        site.active = name
        if name in site:
            _train(site[name], True)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove a set of adapters; another one, if there is any, becomes active.

    Raises:
        ValueError: There is none of this name.
    """
    _known(model, name)
    _adopt(model)
    for site in sites(model).values():
        if name in site:
            del site[name]
    del cast("dict[str, AdapterConfig]", model.adapter_configs)[name]
    del cast("dict[str, tuple[str, ...]]", model.adapter_saved)[name]
    rest = adapter_names(model)
    if rest:
        _activate(model, rest[-1])
    else:
        unload_adapters(model)


def unload_adapters(model: nn.Module) -> nn.Module:
    """The base model again, every parameter trained, without any adapter; in place."""
    for name, site in sites(model).items():
        module = model.get_submodule(name)
        if isinstance(site, HookedSite):
            site.detach(module)
        else:
            _replace(model, name, cast("nn.Module", module.base))
    for record in ("adapter_configs", "adapter_saved"):
        if hasattr(model, record):
            delattr(model, record)
    _train(model, True)
    return model


def merge_adapters(model: nn.Module) -> nn.Module:
    """Refused: these adapters are not linear, so that no weight of the base model can take them in.

    Raises:
        TypeError: Always; the message says what there is instead.
    """
    raise TypeError(
        "these adapters are not linear and cannot be merged into the base weights; zoo.to_deploy(model) makes each one "
        "a single matrix on random features, unload_adapters(model) removes them"
    )


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """A context in which the model computes exactly what the base model does."""
    found = list(sites(model).values())
    before = [site.enabled for site in found]
    for site in found:
        site.enabled = False
    try:
        yield
    finally:
        for site, enabled in zip(found, before, strict=True):
            site.enabled = enabled


class Counts(NamedTuple):
    """Numbers of a model: adapters that are trained, modules_to_save that are trained, fixed random ones, and all
    parameters.
    """

    adapters: int
    saved_modules: int
    random: int
    total: int


def count_parameters(model: nn.Module) -> Counts:
    """Count the active adapters of a model. Random projections are buffers; they are not part of `total`."""
    adapters = saved = random = 0
    for path in _saved_paths(model, _active(model)):
        module = _inner(model, path)
        own = module.adapters.current() if isinstance(module, SavedModule) else module
        saved += 0 if own is None else sum(p.numel() for p in own.parameters() if p.requires_grad)
    for site in sites(model).values():
        if site.active is None or site.active not in site or not isinstance(site, HookedSite):
            continue
        own = site[site.active]
        trained = sum(p.numel() for p in own.parameters() if p.requires_grad)
        adapters += trained
        random += sum(b.numel() for m in own.modules() if isinstance(m, ReLUFeatures) for b in m.buffers())
    return Counts(adapters, saved, random, sum(p.numel() for p in model.parameters()))


# ---- files -------------------------------------------------------------------------------------------------

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FORMAT = "kernel-zoo adapter 1"


def _parts(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """The modules of one set of adapters, by the name of their site.

    Raises:
        ValueError: One of `modules_to_save` is gone.
    """
    found = {place: site[name] for place, site in sites(model).items() if name in site}
    for path in _saved_paths(model, name):
        module = _inner(model, path)
        if path in found or (isinstance(module, SavedModule) and name in module.adapters):
            continue
        if name != _active(model) or module is None or not any(True for _ in module.parameters()):
            raise ValueError(
                f"modules_to_save: the copy of {path} that adapter {name!r} had is gone, something else was put in its "
                "place: change the model before inject_adapters, or while that adapter is the active one"
            )
        found[path] = module  # put there while this adapter was active, as by timm's reset_classifier
    return found


def _state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Tensors of one set of adapters, by the name of their site."""
    parts = _parts(model, name)
    return {f"{place}.{key}": value for place, part in parts.items() for key, value in part.state_dict().items()}


def save_adapter(model: nn.Module, folder: str | Path, name: str = "default") -> Path:
    """Write `adapter_model.safetensors` and `adapter_config.json`, both or neither.

    Raises:
        ValueError: There is no adapter of this name.
        CheckpointError: The folder cannot be written, or holds the configuration of something else.
    """
    config = _known(model, name)
    state = {k: v.detach().cpu().contiguous().clone() for k, v in _state(model, name).items()}
    content = {"format": FORMAT, "base_model": type(model).__name__, **asdict(config)}
    folder = Path(folder)
    if os.path.lexists(folder / CONFIG) or os.path.lexists(folder / WEIGHTS):
        _content_of(folder)  # files of something else stay
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2).encode()
    write_all({folder / WEIGHTS: writer_of(to_safetensors(state)), folder / CONFIG: writer_of(text)})
    return folder


def load_adapter(
    model: nn.Module, folder: str | Path, name: str = "default", *, example: Inputs | None = None
) -> nn.Module:
    """Inject a saved set of adapters into the model it was trained on, and make it active; in place.

    Nothing is changed if anything is wrong.

    Args:
        model: As it was before `inject_adapters`.
        folder: Where `save_adapter` wrote.
        name: What the adapter is to be called.
        example: See :func:`inject_adapters`.

    Raises:
        CheckpointError: A file is missing, damaged or no adapter, or it was saved for another model.
        ValueError: The name is taken.
    """
    folder = Path(folder)
    config, base, state = undisturbed(folder, lambda: _read(folder), (CONFIG, WEIGHTS))
    other = f"{folder} was saved for another model ({base}, this is {type(model).__name__})"
    before = _snapshot(model)
    try:
        inject_adapters(model, config, name, example=example)
    except ValueError as error:
        if name in adapter_names(model):
            raise
        raise CheckpointError(f"{other}: {error}") from None
    try:
        _fill(model, name, state, other)
    except CheckpointError:
        delete_adapter(model, name)
        _restore(model, before)
        raise
    return model


def _content_of(folder: Path) -> dict[str, Any]:
    """What a saved set's configuration says.

    Raises:
        CheckpointError: There is none, or it is that of something else.
    """
    try:
        content = read_json(folder / CONFIG)
    except (OSError, DamagedFileError) as error:
        raise CheckpointError(
            f"{folder / CONFIG} cannot be read ({error}): it is no saved adapter, or damaged"
        ) from None
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise CheckpointError(f"{folder / CONFIG} is not the configuration of an adapter ({FORMAT!r} is missing)")
    return content


def _read(folder: Path) -> tuple[Any, str, dict[str, Any]]:
    """Configuration, name of the base model and weights of a saved set."""
    content = _content_of(folder)
    base = content.pop("base_model", "another model")
    try:
        config = _config_from(content, str(folder / CONFIG))
    except (ValueError, TypeError) as error:
        raise CheckpointError(str(error)) from None
    check_inside(folder / WEIGHTS, folder)
    return config, str(base), read_checkpoint(folder / WEIGHTS)


def _fill(model: nn.Module, name: str, state: Mapping[str, Tensor], other: str) -> None:
    own = _state(model, name)
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or unexpected or shapes:
        first = (
            f"{shapes[0]} has shape {tuple(state[shapes[0]].shape)} and should have {tuple(own[shapes[0]].shape)}"
            if shapes
            else f"{(missing or unexpected)[0]} is {'missing' if missing else 'not in this model'}"
        )
        raise CheckpointError(f"{other}: {first}")
    for place, module in _parts(model, name).items():
        part = {k.removeprefix(f"{place}."): v for k, v in state.items() if k.startswith(f"{place}.")}
        try:
            module.load_state_dict(part)
        except RuntimeError as error:
            raise CheckpointError(f"{place}: {error}") from None


def _snapshot(model: nn.Module) -> tuple[dict[str, bool], str | None]:
    return {name: p.requires_grad for name, p in model.named_parameters()}, _active(model)


def _restore(model: nn.Module, before: tuple[dict[str, bool], str | None]) -> None:
    trained, active = before
    if active is not None:
        set_adapter(model, active)
    for name, p in model.named_parameters():
        p.requires_grad_(trained.get(name, p.requires_grad))


def _config_from(content: Mapping[str, Any], origin: str) -> AdapterConfig:
    allowed = [f.name for f in fields(AdapterConfig)]
    unknown = [k for k in content if k not in allowed]
    if unknown:
        raise ValueError(f"{origin}: unknown entry {unknown[0]!r}{suggestion(unknown[0], allowed)}")
    return AdapterConfig(**content)
