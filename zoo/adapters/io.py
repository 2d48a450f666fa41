"""Saving and loading of adapters: adapter_model.safetensors and adapter_config.json, read without trusting them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from zoo.adapters.api import (
    active_adapter,
    adapter_names,
    delete_adapter,
    inject_adapters,
    inner_module,
    known_config,
    saved_paths,
    set_adapter,
)
from zoo.adapters.config import config_from
from zoo.adapters.conversion import Inputs
from zoo.adapters.sites import SavedModule, sites
from zoo.support.files import (
    CheckpointError,
    as_path,
    check_inside,
    read_checkpoint,
    undisturbed,
    write_all,
    writer_of,
)
from zoo.support.tensors import not_held
from zoo.support.values import DamagedFileError, read_json

__all__ = ["load_adapter", "save_adapter"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FORMAT = "kernel-zoo adapter 1"


def _parts(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """The modules of a set of adapters, by site name.

    Raises:
        ValueError: One of `modules_to_save` was removed.
    """
    found = {place: site[name] for place, site in sites(model).items() if name in site}
    for path in saved_paths(model, name):
        module = inner_module(model, path)
        if path in found or (isinstance(module, SavedModule) and name in module.adapters):
            continue
        if name != active_adapter(model) or module is None or not any(True for _ in module.parameters()):
            raise ValueError(
                f"modules_to_save: the copy of {path} that adapter {name!r} had is gone, something else was put in its "
                "place: change the model before inject_adapters, or while that adapter is the active one"
            )
        found[path] = module  # put there while this adapter was active, as by timm's reset_classifier
    return found


def _state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Tensors of a set of adapters, by site name."""
    parts = _parts(model, name)
    return {f"{place}.{key}": value for place, part in parts.items() for key, value in part.state_dict().items()}


def save_adapter(model: nn.Module, folder: str | Path, name: str = "default") -> Path:
    """Write `adapter_model.safetensors` and `adapter_config.json`, atomically.

    Raises:
        ValueError: The name is unknown.
        CheckpointError: The folder cannot be written, or holds another kind of configuration.
    """
    config = known_config(model, name)
    state = {k: v.detach().cpu().contiguous().clone() for k, v in _state(model, name).items()}
    content = {"format": FORMAT, "base_model": type(model).__name__, **asdict(config)}
    folder = as_path(folder)
    if os.path.lexists(folder / CONFIG) or os.path.lexists(folder / WEIGHTS):
        _content_of(folder)  # keep files of other programs
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2).encode()
    write_all({folder / WEIGHTS: writer_of(to_safetensors(state)), folder / CONFIG: writer_of(text)})
    return folder


def load_adapter(
    model: nn.Module, folder: str | Path, name: str = "default", *, example: Inputs | None = None
) -> nn.Module:
    """Inject a saved set of adapters into the model that it was trained on, and activate it; in place.

    On an error the model is unchanged.

    Args:
        model: The base model, as before `inject_adapters`.
        folder: The folder written by `save_adapter`.
        name: New name of the set.
        example: See :func:`inject_adapters`.

    Raises:
        CheckpointError: A file is missing, damaged or not an adapter, or it was saved for another model.
        ValueError: The name is taken.
    """
    folder = as_path(folder)
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
    """The configuration of a saved set.

    Raises:
        CheckpointError: It is missing, or of another kind.
    """
    try:
        content = read_json(folder / CONFIG)
    except (OSError, DamagedFileError) as error:
        raise CheckpointError(
            f"{folder / CONFIG} cannot be read ({error}): it is not a saved adapter, or damaged"
        ) from None
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise CheckpointError(f"{folder / CONFIG} is not the configuration of an adapter ({FORMAT!r} is missing)")
    return content


def _read(folder: Path) -> tuple[Any, str, dict[str, Any]]:
    """Configuration, name of the base model and weights of a saved set."""
    content = _content_of(folder)
    base = content.pop("base_model", "another model")
    try:
        config = config_from(content, str(folder / CONFIG))
    except (ValueError, TypeError) as error:
        raise CheckpointError(str(error)) from None
    check_inside(folder / WEIGHTS, folder)
    return config, str(base), read_checkpoint(folder / WEIGHTS)


def _fill(model: nn.Module, name: str, state: Mapping[str, Tensor], other: str) -> None:
    own = _state(model, name)
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [k for k in own if k in state and own[k].shape != getattr(state[k], "shape", None)]
    if missing or unexpected or shapes:
        first = (
            f"{shapes[0]} has shape {_size(state[shapes[0]])} and should have {_size(own[shapes[0]])}"
            if shapes
            else f"{(missing or unexpected)[0]} is {'missing' if missing else 'not in this model'}"
        )
        raise CheckpointError(f"{other}: {first}")
    if problem := not_held(own, state):
        raise CheckpointError(f"{other}: {problem}")
    for place, module in _parts(model, name).items():
        part = {k.removeprefix(f"{place}."): v for k, v in state.items() if k.startswith(f"{place}.")}
        try:
            module.load_state_dict(part)
        except RuntimeError as error:
            raise CheckpointError(f"{place}: {error}") from None


def _size(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else f"none ({type(value).__name__})"


def _snapshot(model: nn.Module) -> tuple[dict[str, bool], str | None]:
    return {name: p.requires_grad for name, p in model.named_parameters()}, active_adapter(model)


def _restore(model: nn.Module, before: tuple[dict[str, bool], str | None]) -> None:
    trained, active = before
    if active is not None:
        set_adapter(model, active)
    for name, p in model.named_parameters():
        p.requires_grad_(trained.get(name, p.requires_grad))
