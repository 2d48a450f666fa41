"""Public functions on the adapters of a model: inject, select, merge, disable, remove, count."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from zoo.adapters.branches import HoulsbyAdapter, SNNKAdapter
from zoo.adapters.calls import Call, model_generators_kept, watch_calls
from zoo.adapters.config import SEQUENTIAL, AdapterConfig, config_from
from zoo.adapters.conversion import Inputs
from zoo.adapters.sites import (
    HookedSite,
    ParallelSite,
    SavedModule,
    SequentialSite,
    Site,
    Target,
    copied,
    find_targets,
    replace_module,
    sites,
    train_only,
)
from zoo.kernels.random_features import ReLUFeatures
from zoo.support.suggest import suggestion

__all__ = [
    "Counts",
    "adapter_names",
    "add_adapter",
    "count_parameters",
    "delete_adapter",
    "disable_adapters",
    "inject_adapters",
    "merge_adapters",
    "set_adapter",
    "unload_adapters",
]


def inject_adapters(
    model: nn.Module, config: AdapterConfig | Mapping[str, Any], name: str = "default", *, example: Inputs | None = None
) -> nn.Module:
    """Add adapters to a pretrained transformer, freeze the rest, and activate them; in place.

    A forward pass in eval mode, without side effects, first verifies that every target module is called; each adapter
    gets the widths seen there, and dtype and device of its own layer. The global random state is preserved.

    Args:
        model: A timm vision transformer, or a BERT-style encoder or classifier of Hugging Face.
        config: The configuration; a mapping is passed to :class:`AdapterConfig`.
        name: Name of this set of adapters. Further sets may be added under other names.
        example: Inputs of the model: a tensor, positional arguments, or keyword arguments. None uses the example from
            timm (`pretrained_cfg`) or transformers (`dummy_inputs`), for the model or a part of it.

    Returns:
        `model` itself.

    Raises:
        ValueError: Nothing in the model matches, a module is never called or not supported, the name is taken, or the
            configuration is invalid. The model is unchanged.
    """
    if not isinstance(model, nn.Module) or not isinstance(config, AdapterConfig | Mapping):
        raise ValueError(
            "inject_adapters takes a module, not its name, and an AdapterConfig or a mapping of its fields"
        )
    config = config if isinstance(config, AdapterConfig) else config_from(config, "config")
    if not re.fullmatch(r"\w+", name):
        raise ValueError(f"name={name!r} of an adapter may hold letters, digits and _ only")
    if hasattr(Site(), name):
        raise ValueError(f"name={name!r} of an adapter is taken by torch's modules: choose another")
    if name in adapter_names(model):
        raise ValueError(f"there is already an adapter {name!r}: delete_adapter(model, {name!r}) first")
    chosen, saved = _choose(model, config)
    calls = watch_calls(model, chosen, saved, example)
    with model_generators_kept(model):
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
            replace_module(model, target_name, kept)
        kept.adapters[name] = copied(kept.base)
    configs, paths = dict(getattr(model, "adapter_configs", {})), dict(getattr(model, "adapter_saved", {}))
    model.adapter_configs = {**configs, name: config}  # type: ignore[assignment]
    model.adapter_saved = {**paths, name: tuple(saved)}  # type: ignore[assignment]
    activate(model, name)
    return model


add_adapter = inject_adapters


def _branches(config: AdapterConfig, target: Target, call: Call, seed: int) -> nn.Module:
    """An adapter, or one for each part of a fused layer."""
    dd: dict[str, Any] = {"device": call.device, "dtype": call.dtype}
    kind = HoulsbyAdapter if config.form == "houlsby" else SNNKAdapter
    if target.places[0] in SEQUENTIAL:
        return kind(cast("int", call.made), config, seed, **dd)
    width = cast("int", call.made) // len(target.places)
    parts = [p for p in target.places if p in config.places]
    return nn.ModuleDict({p: kind(cast("int", call.given), config, seed + i, width, **dd) for i, p in enumerate(parts)})


def _checked_call(model: nn.Module, target: Target, call: Call) -> Call:
    """The call, with the dtype of the target's layer.

    Raises:
        ValueError: The module does not support adapters.
    """
    module, layer = model.get_submodule(target.name), inner_module(model, target.like)
    if call.given is None or call.made is None:
        raise ValueError(f"{target.name} cannot take an adapter: it does not turn one tensor into one tensor")
    if isinstance(layer, nn.modules.conv._ConvNd):
        raise ValueError(f"{target.name} cannot take an adapter: its layer is a convolution, channels are not last")
    if hasattr(module, "adapters") and not isinstance(module.adapters, Site):
        raise ValueError(f"{target.name} cannot take an adapter: it has something named adapters already")
    parts = len(target.places) * target.heads
    split = hasattr(inner_module(model, target.name.rpartition(".")[0]), "key_dim")  # value and key widths differ
    if call.made % parts or (parts > 1 and split):
        raise ValueError(f"{target.name} cannot take an adapter: its output is not cut into {parts} equal parts")
    weight = getattr(layer, "weight", None)
    own = weight if isinstance(weight, Tensor) and weight.is_floating_point() and weight.dtype.itemsize > 1 else None
    dtype = cast("torch.dtype", call.dtype) if own is None else own.dtype
    if not dtype.is_floating_point:
        raise ValueError(f"{target.name} cannot take an adapter: its output is of type {dtype}")
    return call._replace(dtype=dtype)


def inner_module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _choose(model: nn.Module, config: AdapterConfig) -> tuple[list[Target], list[str]]:
    """The modules selected by a configuration."""
    every = find_targets(model)
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
    """Names of the modules selected by `modules_to_save`, outermost ones only."""
    names = [n for n, _ in model.named_modules() if n and "adapters" not in n.split(".")]
    names = [n for n in names if not isinstance(inner_module(model, n.rpartition(".")[0]), SavedModule)]
    saved: list[str] = []
    for last in config.modules_to_save:
        found = [n for n in names if n == last or n.endswith(f".{last}")]
        if not found:
            raise ValueError(f"modules_to_save: no module {last!r}{suggestion(last, names)}")
        saved += [n for n in found if n not in saved]
    saved = [n for n in saved if not any(n.startswith(f"{other}.") for other in saved)]
    for n in saved:
        inside = [c for c in [*chosen, *sites(model)] if c.startswith(f"{n}.") or n.startswith(f"{c}.") or c == n]
        inside = [c for c in inside if not isinstance(inner_module(model, c), SavedModule)]
        if inside:
            raise ValueError(f"modules_to_save: {n} holds {inside[0]}, which has adapters; it cannot be saved whole")
    return saved


def _adopt(model: nn.Module) -> None:
    """Give a module that replaced one of `modules_to_save` (timm's `reset_classifier`) to the active adapter."""
    active = active_adapter(model)
    for path in saved_paths(model, active):
        module = inner_module(model, path)
        if module is not None and not isinstance(module, SavedModule):
            kept = SavedModule(copied(module)).train(module.training)
            kept.adapters[cast("str", active)] = module
            replace_module(model, path, kept)


def active_adapter(model: nn.Module) -> str | None:
    return next((site.active for site in sites(model).values()), None)


def saved_paths(model: nn.Module, name: str | None) -> tuple[str, ...]:
    """Names of the modules that are trained and saved as a whole."""
    return cast("dict[str | None, tuple[str, ...]]", getattr(model, "adapter_saved", {})).get(name, ())


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the sets of adapters in a model."""
    return list(getattr(model, "adapter_configs", {}))


def known_config(model: nn.Module, name: str) -> AdapterConfig:
    names = adapter_names(model)
    if name not in names:
        raise ValueError(f"there is no adapter {name!r}{suggestion(name, names) or '; there is none at all'}")
    return model.adapter_configs[name]  # type: ignore[index,return-value]


def set_adapter(model: nn.Module, name: str) -> None:
    """Activate a set of adapters and make it the only trainable part.

    Raises:
        ValueError: The name is unknown.
    """
    known_config(model, name)
    _adopt(model)
    activate(model, name)


def activate(model: nn.Module, name: str) -> None:
    train_only(model, False)
    for site in sites(model).values():
        site.active = name
        if name in site:
            train_only(site[name], True)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove a set of adapters; another set, if any, becomes active.

    Raises:
        ValueError: The name is unknown.
    """
    known_config(model, name)
    _adopt(model)
    for site in sites(model).values():
        if name in site:
            del site[name]
    del cast("dict[str, AdapterConfig]", model.adapter_configs)[name]
    del cast("dict[str, tuple[str, ...]]", model.adapter_saved)[name]
    rest = adapter_names(model)
    if rest:
        activate(model, rest[-1])
    else:
        unload_adapters(model)


def unload_adapters(model: nn.Module) -> nn.Module:
    """Restore the base model, without adapters and fully trainable; in place."""
    for name, site in sites(model).items():
        module = model.get_submodule(name)
        if isinstance(site, HookedSite):
            site.detach(module)
        else:
            replace_module(model, name, cast("nn.Module", module.base))
    for record in ("adapter_configs", "adapter_saved"):
        if hasattr(model, record):
            delattr(model, record)
    train_only(model, True)
    return model


def merge_adapters(model: nn.Module) -> nn.Module:
    """Not supported: these adapters are not linear, so they cannot be merged into the base weights.

    Raises:
        TypeError: Always; the message names the alternatives.
    """
    raise TypeError(
        "these adapters are not linear and cannot be merged into the base weights; zoo.to_deploy(model) makes each one "
        "a single matrix on random features, unload_adapters(model) removes them"
    )


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Context in which the model computes exactly as the base model."""
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
    """Parameter counts: trained adapters, trained modules_to_save, fixed random numbers, and all parameters."""

    adapters: int
    saved_modules: int
    random: int
    total: int


def count_parameters(model: nn.Module) -> Counts:
    """Parameter counts for the active adapters. Random projections are buffers and not part of `total`."""
    adapters = saved = random = 0
    for path in saved_paths(model, active_adapter(model)):
        module = inner_module(model, path)
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
