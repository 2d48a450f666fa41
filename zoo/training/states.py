"""The structure of a training state, checked before a run goes on from it: a damaged or edited one is not continued."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from typing import Any, TypedDict

import numpy as np
import torch
from pydantic import NonNegativeInt
from timm.scheduler.scheduler import Scheduler
from torch import Tensor

from zoo.support.signatures import check_values

__all__ = ["generators", "inexact", "state_problem"]

_PARTS: dict[str, type | tuple[type, ...]] = {
    "state_dict": Mapping,
    "loops": Mapping,
    "callbacks": Mapping,
    "optimizer_states": list,
    "lr_schedulers": list,
    "random_states": list,
    "global_step": int,
    "epoch": int,
}
_COUNTS = ("ready", "started", "processed", "completed", "_batches_that_stepped")
_POSITION = ("epoch", "batches", "samples", "global_batch")


class _Position(TypedDict):
    global_step: NonNegativeInt
    epoch: NonNegativeInt


def state_problem(state: Mapping[str, Any], seed: int | None = None) -> str | None:
    """What is wrong with a training state, in a few words; None if it has all that a run goes on from.

    Args:
        state: The content of a checkpoint.
        seed: Seed of the run that it belongs to, by its notes; None if it is not known.
    """
    try:
        return next(_problems(state, seed), None)
    except RecursionError:
        return "it is nested too deeply"


def _problems(state: Mapping[str, Any], seed: int | None) -> Iterator[str]:
    for name, kind in _PARTS.items():
        if name not in state:
            yield f"it has no {name}"
        elif not isinstance(state[name], kind):
            yield f"its {name} are not of the kind that a run writes"
    yield from (problem[:200] for problem in check_values(_Position, state))
    for name in ("state_dict", "current_model_state"):
        if not _is_weights(state.get(name, {})):
            yield f"its {name} holds more than named weights"
    yield from _of_optimizers(state)
    yield from _of_loops(state)
    for part in _mappings(state):
        if all(name in part for name in _POSITION):
            yield from _of_position(part)
    for own in state["random_states"] or [None]:
        try:
            generators(own)
        except Exception:  # whatever a library says of what is no state of its own
            yield "its random_states are none that can be restored"
    yield from _of_notes(state, seed)


def _is_weights(found: Any) -> bool:
    return isinstance(found, Mapping) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _of_optimizers(state: Mapping[str, Any]) -> Iterator[str]:
    given: Any = state.get("hyper_parameters")
    given = given if isinstance(given, Mapping) else {}
    groups = 0
    for own in state["optimizer_states"]:
        found = own.get("param_groups") if isinstance(own, Mapping) else None
        sound = isinstance(found, list) and found and isinstance(own.get("state"), Mapping)
        if not sound or not all(isinstance(group, Mapping) and "params" in group for group in found or ()):
            yield "its optimizer_states are not those of an optimizer"
            return
        groups = len(found or ())
    if given.get("optimizer") and not groups:
        yield "its optimizer_states are empty"
    if given.get("optimizer") and given.get("scheduler") and not state["lr_schedulers"]:
        yield "its lr_schedulers are empty"
    for own in state["lr_schedulers"]:
        values = own.get("base_values", own.get("base_lrs", ())) if isinstance(own, Mapping) else None
        sound = isinstance(values, list | tuple) and all(_is_number(v) and math.isfinite(v) for v in values)
        sound = sound and len(values or ()) in (0, groups) and bool(own)
        if not sound or any(not isinstance(key, str) or callable(getattr(Scheduler, key, None)) for key in own):
            yield "its lr_schedulers are not those of a schedule"


def _of_loops(state: Mapping[str, Any]) -> Iterator[str]:
    for part in _mappings(state["loops"]):
        for key in _COUNTS:
            if key in part and not _is_count(part[key]):
                yield f"its loops count {key} = {part[key]!r:.60}"
                return
    fit = state["loops"].get("fit_loop")
    progress = fit.get("epoch_progress") if isinstance(fit, Mapping) else None
    current = progress.get("current") if isinstance(progress, Mapping) else None
    if not isinstance(current, Mapping) or "completed" not in current:
        yield "its loops have no epoch_progress"
    elif current["completed"] != state["epoch"]:
        yield f"its loops have completed {current['completed']} epochs, and its epoch is {state['epoch']}"
    inner = fit.get("state_dict") if isinstance(fit, Mapping) else None
    loaders = inner.get("combined_loader", []) if isinstance(inner, Mapping) else []
    if not isinstance(loaders, list) or not all(isinstance(own, Mapping) for own in loaders):
        yield "its combined_loader is no position in the data"


def _of_position(part: Mapping[str, Any]) -> Iterator[str]:
    """A position in the training data, which no epoch can be shorter than."""
    if not all(_is_count(part[name]) for name in _POSITION) or not part["global_batch"]:
        yield "its position in the data is not in whole numbers"
    elif part["batches"] > (most := -(-part["samples"] // part["global_batch"])):
        yield f"its position in the data is after batch {part['batches']:,} of an epoch of {most:,}"


def _of_notes(state: Mapping[str, Any], seed: int | None) -> Iterator[str]:
    so_far = state.get("so_far") or {}
    metrics = so_far.get("metrics") or {} if isinstance(so_far, Mapping) else None
    pending = so_far.get("pending") or {} if isinstance(so_far, Mapping) else None
    tables = (metrics, pending)
    if not all(isinstance(t, Mapping) and all(isinstance(k, str) for k in t) for t in tables) or not all(
        _is_number(value) for table in tables for value in (table or {}).values()
    ):
        yield "its so_far holds more than metrics and their numbers"
        return
    norm, rows = so_far.get("norm"), so_far.get("rows") or []
    if not (norm is None or (_is_number(norm) and norm >= 0)):
        yield f"its so_far has the norm {norm!r:.60}"
    if not isinstance(rows, list) or not all(map(_is_count, rows)):
        yield "its so_far counts rows that are no numbers"
    average = state.get("averaging_state", {})
    count: Any = average.get("n_averaged", 0) if isinstance(average, Mapping) else None
    if not (_is_number(count) or (isinstance(count, Tensor) and count.numel() == 1)) or not count >= 0:
        yield "its averaging_state counts no averages"
    about = state.get("zoo")
    notes = about.get("run") if isinstance(about, Mapping) else None
    own = notes.get("seed") if isinstance(notes, Mapping) else None
    if not isinstance(notes, Mapping):
        yield "it does not say which run wrote it"
    elif seed is not None and own is not None and own != seed:
        yield f"it is of a run with seed {own!r:.60}, and this one has {seed}"


def _mappings(value: Any) -> Iterator[Mapping[str, Any]]:
    """All mappings in nested containers."""
    if isinstance(value, Mapping):
        yield value
    if isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _mappings(part)


def generators(states: Mapping[str, Any]) -> tuple[random.Random, np.random.RandomState, torch.Generator]:
    """Generators of their own with the states of Python, NumPy and torch (CPU) that a run writes."""
    version, keys, gauss = states["python"]
    name, words, position, has_gauss, cached = states["numpy"]
    python, numpy, own = random.Random(), np.random.RandomState(), torch.Generator()
    python.setstate((version, tuple(keys), gauss))
    numpy.set_state((name, words.numpy().astype(np.uint32), position, has_gauss, cached))
    own.set_state(states["torch"].cpu())
    if not all(isinstance(other, Tensor) for other in states["cuda"]):
        raise TypeError("states of GPUs are tensors")
    return python, numpy, own


def inexact(state: Mapping[str, Any], accumulated: int) -> str | None:
    """Why a run cannot go on exactly from a sound state; None if it can.

    The best state is written after a validation, which may lie between the last step of an epoch and its end, or
    between two steps while gradients are accumulated.
    """
    fit = state["loops"].get("fit_loop") or {}
    batches, epochs = fit.get("epoch_loop.batch_progress") or {}, fit.get("epoch_progress") or {}
    inside, outside = batches.get("current") or {}, epochs.get("current") or {}
    if batches.get("is_last_batch"):
        ended = outside.get("processed") == outside.get("ready")
        return None if ended else "it was written before the end of its epoch"
    if accumulated > 1 and inside.get("completed", 0) % accumulated:
        return "it was written while gradients were accumulated"
    return None
