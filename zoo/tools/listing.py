"""The table of models and weights, and what the authors published about theirs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from timm.models import get_pretrained_cfg

from zoo.registry import bundled_weights
from zoo.registry.factory import list_models

__all__ = ["FRESH", "PUBLISHED", "SHIPPED", "listing", "published"]

SHIPPED, PUBLISHED, FRESH = "shipped, trained by the zoo", "published by the authors, fetched, not retrained", ""
_PUBLISHED = re.compile(r"published ImageNet-1K top-1: ([\d.]+) %")


def listing(filter: str = "", pretrained: bool = False) -> list[dict[str, Any]]:
    """Table of the zoo's models, or of its weights.

    Args:
        filter: Pattern of the names, as in `zoo.list_models`.
        pretrained: List weights instead of models.

    Returns:
        Rows with `name`, `weights` (their source; empty without), `published_top1` of the authors' ImageNet weights in
        percent, and `metric`, `value`, `n`, `mean`, `sd` and `data` of shipped ones.
    """
    records = bundled_weights.records()
    rows: list[dict[str, Any]] = []
    for name in list_models(filter, pretrained=pretrained):
        row: dict[str, Any] = {"name": name, "weights": PUBLISHED if "." in name else FRESH}
        if "." in name and (top1 := published(getattr(get_pretrained_cfg(name), "notes", None))) is not None:
            row["published_top1"] = top1
        if record := records.get(name):
            metric = record["metric"]
            row |= {"weights": SHIPPED, "metric": metric["name"], "value": metric["value"], "n": metric["n"]}
            row |= {"mean": metric["mean"], "sd": metric["sd"], "data": record["data"]["title"]}
        rows.append(row)
    return rows


def published(notes: Sequence[str] | None) -> float | None:
    """ImageNet top-1 accuracy in percent published by the authors, as noted in a configuration; None if missing."""
    return next((float(found[1]) for note in notes or () if (found := _PUBLISHED.match(note))), None)
