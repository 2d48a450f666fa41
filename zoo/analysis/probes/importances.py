"""Learned metrics, for models with `feature_importance()` and `spectrum()`."""

from __future__ import annotations

from typing import Any

from pydantic import PositiveInt

from zoo.analysis.plots import plot_importances, plot_loadings, plot_spectrum
from zoo.analysis.probes import Finding, ProbeError, Subject, probe
from zoo.support import inputs


@probe("importances", "relative importance of each feature, for table models that provide it")
def probe_importances(subject: Subject, *, top: PositiveInt = 15) -> Finding:
    """The `top` most important features."""
    importance: Any = getattr(subject.model, "feature_importance", None)
    if not callable(importance):
        raise ProbeError(f"{type(subject.model).__name__} has no feature importances; GRBF networks have")
    shares = importance().double().numpy()
    names = _names(subject, len(shares))
    found = dict(zip(names, shares.tolist(), strict=True))
    best = max(found, key=lambda name: found[name])
    told = f"importances of {len(shares)} features of {subject.name}, highest {best} with {found[best]:.1%}"
    return Finding(told, {"importances": found}, lambda: plot_importances(shares, names, top=top))


@probe("spectrum", "eigenvalues of the learned metric of a GRBF network")
def probe_spectrum(subject: Subject, *, top: PositiveInt = 15) -> Finding:
    """The `top` largest eigenvalues."""
    values = _spectrum(subject)[0].double().numpy()
    told = f"spectrum of the precision matrix of {subject.name}, the first of {len(values)} holds {_share(values):.1%}"
    return Finding(told, {"eigenvalues": values.tolist()}, lambda: plot_spectrum(values, top=top))


@probe("loadings", "composition of the latent variables of a GRBF network")
def probe_loadings(subject: Subject, *, top: PositiveInt = 5) -> Finding:
    """The `top` eigenvectors of the largest eigenvalues."""
    rows = _spectrum(subject)[1].double().numpy()
    names = _names(subject, rows.shape[1])
    told = f"composition of the first {min(top, len(rows))} latent variables of {subject.name}"
    return Finding(told, {"components": rows[:top].tolist()}, lambda: plot_loadings(rows, names, top=top))


def _spectrum(subject: Subject) -> Any:
    spectrum: Any = getattr(subject.model, "spectrum", None)
    if not callable(spectrum):
        raise ProbeError(f"{type(subject.model).__name__} has no learned metric; GRBF networks have")
    return spectrum()


def _share(values: Any) -> float:
    return float(values[0] / (values.sum() or 1.0))


def _names(subject: Subject, count: int) -> list[str]:
    """Feature names, from the model's input record."""
    names = inputs.record_of(subject.model).get("columns") or []
    return list(names) if len(names) == count else [f"x{i}" for i in range(count)]
