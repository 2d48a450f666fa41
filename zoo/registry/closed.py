"""Model folders are closed: building from a file's description opens no address and no file outside of its folder.

A folder's `config.json` names an architecture and its arguments, and an argument may describe a nested model
(`backbone`, `backbone_args`), at any depth. All of them go through timm's factory, so the rule is enforced there: while
a folder's model is built, only the folder's own weights are loaded, and no nested model comes from another location.
Weights with a recorded hash are verified here too, also for `timm.create_model`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.models import _builder, _factory
from timm.models import _registry as registry
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.parameter import is_lazy

from zoo.registry.described import Sizes, size_problems
from zoo.support.files import (
    CONFIG_NAME,
    MAX_TENSORS,
    WEIGHTS_NAME,
    CheckpointError,
    check_inside,
    check_recorded,
    read_config,
)
from zoo.support.whole import still

__all__ = ["active", "check_name", "closed", "install", "sized"]

_log = logging.getLogger(__name__)


@dataclass
class _Folder:
    """The model being built: its name, the location that timm may load weights from, and whether its file was read."""

    name: str
    place: str = ""
    opened: bool = False


_TOGETHER = (CONFIG_NAME, WEIGHTS_NAME)
_found: dict[str, Any] = {}  # what timm read from a folder's configuration, before loading the weights
_current: ContextVar[_Folder | None] = ContextVar("closed", default=None)


@contextlib.contextmanager
def closed(name: str, place: str = "", opened: bool = False) -> Iterator[None]:
    """Context for building a model that a file describes.

    Args:
        name: Name of the file for messages.
        place: The folder or repository whose own weights timm may load; default: none.
        opened: Whether the description was already read, so that no `local-dir:` or `hf-hub:` may follow.
    """
    token = _current.set(_Folder(name, place, opened))
    try:
        yield
    finally:
        _current.reset(token)


_enforced_for: dict[tuple[str, ...], int] = {}  # number of entry points at that time


def install(ours: tuple[str, ...]) -> None:
    """Enforce the rule in timm's factory and in the entry points of some modules; once for each."""
    if not getattr(_builder.load_pretrained, "_closed", False):
        _builder.load_pretrained = _inside_only(_builder.load_pretrained)
        _factory._resolve_model_source = _one_source(_factory._resolve_model_source)
        _factory.load_checkpoint = _verified(_factory.load_checkpoint)
        _builder.load_state_dict_from_path = _whole(_builder.load_state_dict_from_path)
    if len(registry._model_entrypoints) == _enforced_for.get(ours):
        return
    _enforced_for[ours] = len(registry._model_entrypoints)
    for name, entry in registry._model_entrypoints.items():
        if entry.__module__.startswith(ours) and not getattr(entry, "_closed", False):
            registry._model_entrypoints[name] = _enforced(entry)


def _enforced(entry: Callable[..., Any]) -> Callable[..., Any]:
    """An entry point that enforces the rule when timm calls it for a folder or repository."""

    @functools.wraps(entry)
    def build(pretrained: bool = False, pretrained_cfg: Any = None, **kwargs: Any) -> Any:
        given = {k: kwargs[k] for k in Sizes.__annotations__ if kwargs.get(k) is not None}
        described = dict(pretrained_cfg) if isinstance(pretrained_cfg, dict) else {}
        if described.get("num_classes") == -1:  # of a model without classes
            del described["num_classes"]
        if problems := size_problems({k: described[k] for k in Sizes.__annotations__ if k in described} | given):
            raise ValueError(f"{entry.__name__}: {problems[0]}")
        source = pretrained_cfg.get("source") if isinstance(pretrained_cfg, dict) else None
        if source not in ("local-dir", "hf-hub") or _current.get() is not None:
            return entry(pretrained, pretrained_cfg=pretrained_cfg, **kwargs)
        place = str(pretrained_cfg.get("file" if source == "local-dir" else "hf_hub_id"))
        with closed(f"{source}:{place}", place, opened=True):
            return entry(pretrained, pretrained_cfg=pretrained_cfg, **kwargs)

    build._closed = True  # type: ignore[attr-defined]
    return build


def active() -> bool:
    """Whether the model being built is described by a file."""
    return _current.get() is not None


def check_name(model_name: object) -> None:
    """Refuse a model from another location inside a file's description.

    Raises:
        CheckpointError: The name refers to a folder or repository.
    """
    folder = _current.get()
    if folder is None:
        return
    place = not isinstance(model_name, str) or ":" in model_name or "/" in model_name
    if place and (folder.opened or not str(model_name).startswith(("local-dir:", "local_dir:"))):
        raise CheckpointError(
            f"{folder.name} is built on {model_name!r:.100}, which lies outside it: a file names architectures only"
        )


# ---- size ------------------------------------------------------------------------------------------------------


class TooLargeError(CheckpointError):
    """A description of more than its weights can fill."""


_FORMS = 4  # numbers of a model for each byte of its file: one-byte numbers, and a training form beside a merged one
_SPARE, _SPARE_BUFFERS = 2**20, 2**26  # numbers that need not be in the file; tables that are computed


@contextlib.contextmanager
def sized(name: str, size: int) -> Iterator[None]:
    """Context for building a model that a file describes, which ends when the model has more than its file can fill.

    Modules register their parameters before the values are drawn, so a description costs little more than its file.

    Args:
        name: Name of the file for messages.
        size: Bytes of its weights.

    Raises:
        TooLargeError: The model is larger.
    """
    limits = {"parameter": _FORMS * size + _SPARE, "buffer": _FORMS * size + _SPARE_BUFFERS}
    left, count, here = dict(limits), 0, threading.get_ident()

    def hook(kind: str, module: nn.Module, key: str, tensor: Tensor | None) -> None:
        nonlocal count
        if tensor is None or is_lazy(tensor) or threading.get_ident() != here:
            return
        left[kind] -= tensor.numel()
        count += 1
        if left[kind] < 0 or count > _FORMS * MAX_TENSORS:
            what = f"over {limits[kind]:,} numbers" if left[kind] < 0 else f"over {count - 1:,} tensors"
            raise TooLargeError(f"{name} describes a model of {what}, far more than its {size:,} bytes of weights")

    handles = (
        register_module_parameter_registration_hook(functools.partial(hook, "parameter")),
        register_module_buffer_registration_hook(functools.partial(hook, "buffer")),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ---- timm's loaders --------------------------------------------------------------------------------------------


def _inside_only(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_pretrained(model: Any, pretrained_cfg: Any = None, *args: Any, **kwargs: Any) -> Any:
        folder = _current.get()
        if folder is not None:
            cfg = pretrained_cfg or getattr(model, "pretrained_cfg", None) or {}
            own = {"local-dir": cfg.get("file"), "hf-hub": cfg.get("hf_hub_id")}.get(str(cfg.get("source")))
            if not folder.place or own != folder.place:
                _log.debug("%s: weights of a model inside it were not looked for", folder.name)
                return None
        return load(model, pretrained_cfg, *args, **kwargs)

    load_pretrained._closed = True  # type: ignore[attr-defined]
    return load_pretrained


def _one_source(resolve: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(resolve)
    def resolve_model_source(model_name: str, *args: Any, **kwargs: Any) -> Any:
        folder = _current.get()
        if folder is not None:
            if folder.opened or model_name != folder.name:  # the first one is from the caller
                check_name(model_name)
            folder.opened = True
        elif isinstance(model_name, str) and model_name.startswith("local-dir:"):
            place = str(Path(model_name.partition(":")[2]))
            _found[place] = still(Path(place), _TOGETHER)
            read_config(place)  # timm would follow links out of the folder
        return resolve(model_name, *args, **kwargs)

    return resolve_model_source


def _verified(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_checkpoint(model: Any, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        if _current.get() is not None:
            return None
        check_recorded(Path(checkpoint_path))
        return load(model, checkpoint_path, *args, **kwargs)

    return load_checkpoint


def _whole(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_state_dict_from_path(path: Any, *args: Any, **kwargs: Any) -> Any:
        folder, hashes = Path(path), read_config(path).get("sha256", {})
        if _found.pop(str(path), now := still(folder, _TOGETHER)) != now:
            raise CheckpointError(f"{folder} was written anew while it was being read: load it again")
        for file in folder.iterdir():
            if file.is_symlink():
                check_inside(file, folder)
            if file.name in hashes:
                check_recorded(file)
        return load(path, *args, **kwargs)

    return load_state_dict_from_path
