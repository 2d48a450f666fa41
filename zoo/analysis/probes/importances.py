"""How much each feature counts, for models that say so of themselves: those with `feature_importance()`."""

from __future__ import annotations

from typing import Any

from pydantic import PositiveInt

from zoo.analysis.plots import plot_importances
from zoo.analysis.probes import Finding, ProbeError, Subject, probe
from zoo.support import inputs


@probe("importances", "share of each feature, for models of tables that have importances")
def probe_importances(subject: Subject, *, top: PositiveInt = 15) -> Finding:
    """The `top` most important features."""
    importance: Any = getattr(subject.model, "feature_importance", None)
    if not callable(importance):
        raise ProbeError(f"{type(subject.model).__name__} has no importances of features; GRBF networks have")
    shares = importance().double().numpy()
    record = inputs.record_of(subject.model)
    names = record.get("columns") or [f"x{i}" for i in range(len(shares))]
    names = names if len(names) == len(shares) else None
    found = dict(zip(names or map(str, range(len(shares))), shares.tolist(), strict=True))
    best = max(found, key=lambda name: found[name])
    told = f"importances of {len(shares)} features of {subject.name}, most of all {best} with {found[best]:.1%}"
    return Finding(told, {"importances": found}, lambda: plot_importances(shares, names, top=top))
