"""Training losses of a run."""

from __future__ import annotations

from pathlib import Path

from zoo.analysis.plots import plot_curves
from zoo.analysis.probes import Finding, ProbeError, Subject, probe
from zoo.support.values import check_closed, read_curves

_NAMES = ("train/loss", "train/cross_entropy", "train/slow_loss", "train/norm_penalty")


@probe("losses", "training losses of a run, given its folder as the model")
def probe_losses(subject: Subject) -> Finding:
    """Losses over steps, from the metrics.csv of a run."""
    run = Path(subject.data or subject.name).expanduser()
    if not run.is_dir():
        raise ProbeError("the losses are those of a run: give its folder as the model, or with --data")
    check_closed(run)
    paths = sorted(run.rglob("metrics.csv"))
    if not paths:
        raise ProbeError(f"there is no metrics.csv below {run}; the run needs logger=csv or the default one")
    found, left_out = read_curves(paths[0])
    curves = {name.removeprefix("train/"): found[name] for name in _NAMES if name in found}
    if not curves:
        raise ProbeError(left_out or f"{paths[0]} has no training losses")
    last = {name: values[-1] for name, (_, values) in curves.items()}
    return Finding(f"{', '.join(curves)} of {run}", {"last": last}, lambda: plot_curves(curves))
