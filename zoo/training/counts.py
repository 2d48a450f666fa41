"""How many samples of each part of the data a run has really used: the one source of the counts on record."""

from __future__ import annotations

import math
from collections.abc import Sized
from typing import Any, NamedTuple

import lightning as L

__all__ = ["Counts", "counts", "trained"]


class Counts(NamedTuple):
    """Samples by part; of `train`, those of an epoch.

    Attributes:
        used: What was trained on or measured on.
        whole: The whole part, where only a share of it was used.
    """

    used: dict[str, int]
    whole: dict[str, int]


def counts(engine: L.Trainer) -> Counts:
    """Samples that a run has used, after its training and test."""
    data: Any = getattr(engine, "datamodule", None)
    parts: dict[str, Any] = getattr(data, "datasets", None) or {}
    rows = {part: len(kept) for part, kept in parts.items() if part == "val" or kept is not parts.get("val")}
    if hasattr(data, "stream"):  # of tasks, which measure by themselves: all images that they are made of
        return Counts({"train": len(data.stream.train[1]), data.evaluate_on: len(data.stream.test[1])}, {})
    used = {part: _used(engine, data, part, count) for part, count in rows.items()}
    found = {part: count for part, count in used.items() if count is not None}
    return Counts(found, {part: rows[part] for part, count in found.items() if count < rows[part]})


def trained(engine: L.Trainer) -> bool:
    """Whether the run has taken a training batch."""
    return engine.fit_loop.epoch_loop.total_batch_idx >= 0


def _used(engine: L.Trainer, data: Any, part: str, rows: int) -> int | None:
    """Samples of a part that were used, of `rows`; None if that cannot be known."""
    limit: int | float = getattr(engine, f"limit_{part}_batches")
    taken = engine.fit_loop.epoch_loop.total_batch_idx + 1 if part == "train" else math.inf
    if not limit or not taken:
        return 0
    if part != "train" and isinstance(limit, float) and limit >= 1:
        return rows
    loader = getattr(data, f"{part}_dataloader")()
    if not isinstance(loader, Sized):
        return None
    batches = min(taken, limit if isinstance(limit, int) else int(limit * len(loader)))
    if batches >= len(loader):
        return rows
    order = getattr(loader, "batch_sampler", None)
    size = getattr(order, "global_batch", None) or (getattr(loader, "batch_size", None) or 0) * engine.world_size
    return min(int(batches * size), rows) if size else None
