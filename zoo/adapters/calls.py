"""Inputs and outputs of a model's modules, observed in one forward pass: widths, dtypes, devices."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.adapters.conversion import Inputs, call_model
from zoo.adapters.sites import Target, first_argument


class Call(NamedTuple):
    """A call of a module: widths of its input and output (None if not a tensor), dtype and device."""

    given: int | None
    made: int | None
    dtype: torch.dtype | None
    device: torch.device | None


def watch_calls(model: nn.Module, targets: Sequence[Target], saved: Sequence[str], example: Any) -> dict[str, Call]:
    """First call of every module in a forward pass on the example, by name.

    Raises:
        ValueError: A module is not called, no example can be run, or a module does not support adapters.
    """
    names = [t.name for t in targets] + list(saved)
    found: dict[str, Call] = {}
    undecided, problems = set(names), []
    for root, inputs in _examples(model, targets, example):
        inside = {n for n in undecided if not root or n == root or n.startswith(f"{root}.")}
        if not inside:
            continue
        try:
            seen = _observe(model, root, inputs, inside)
        except Exception as error:  # an arbitrary model may raise anything
            problems.append(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")
            continue
        silent = sorted(inside - seen.keys(), key=names.index)
        if silent:
            raise ValueError(
                f"{listed(silent)} never called in a forward pass of {type(model).__name__} on its example input, so "
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
            f"no example input of {type(model).__name__} could be run to see whether {listed(first)} called "
            f"({reason}): pass example=<inputs of the model>"
        )
    return found


def listed(names: Sequence[str]) -> str:
    """Names and their verb, for messages."""
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"


def _examples(model: nn.Module, targets: Sequence[Target], example: Any) -> Iterator[tuple[str, Inputs]]:
    """Parts of a model, outermost first and the layers last, with inputs for each."""
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
    """Example inputs of a model of transformers or timm; none for other modules."""
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
    """Move to the device of a module, and floating-point tensors to its dtype."""
    p = next((p for p in module.parameters() if p.is_floating_point()), None)
    if p is None:
        return x
    return x.to(p.device, p.dtype if x.is_floating_point() and p.dtype.itemsize > 1 else x.dtype)


def _observe(model: nn.Module, root: str, inputs: Inputs, names: set[str]) -> dict[str, Call]:
    """Run part of the model and observe the calls of its modules."""
    seen: dict[str, Call] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], made: Any) -> None:
            given, tensor = (
                t if isinstance(t, Tensor) and t.ndim else None for t in (first_argument(args, kwargs), made)
            )
            width = None if given is None else given.shape[-1]
            if tensor is None:
                seen.setdefault(name, Call(width, None, None, None))
            else:
                seen.setdefault(name, Call(width, tensor.shape[-1], tensor.dtype, tensor.device))

        return hook

    part = model.get_submodule(root)
    kinds = {p.dtype for p in part.parameters() if p.is_floating_point()}
    half = next((k for k in (torch.bfloat16, torch.float16) if k in kinds), None)
    device = next((p.device.type for p in part.parameters()), "cpu")
    modes: list[Any] = [contextlib.nullcontext()]
    if half is not None and len(kinds) > 1 and torch.amp.is_autocast_available(device):
        modes.append(torch.autocast(device, half))  # dtypes that only fit together under autocast
    with _without_side_effects(model):
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
def _without_side_effects(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients that leaves attributes, buffers and generators unchanged."""
    modules = list(model.modules())
    attributes = [dict(m.__dict__) for m in modules]
    tables = [dict(m._buffers) for m in modules]
    buffers = [(b, b.clone(), _version(b)) for table in tables for b in table.values() if b is not None]
    with model_generators_kept(model), torch.no_grad():
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
    """Version counter of a tensor; None if it has none."""
    return None if t.is_inference() else t._version


def model_generators_kept(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Context that preserves the state of torch's global generators."""
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    return torch.random.fork_rng(sorted(devices))
