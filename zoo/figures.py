"""Pictures of what a model has learned, as functions that draw on matplotlib axes and return them.

>>> ax = plot_importances(model.feature_importances_, names)
>>> ax = plot_output(model, X, y)                  # the model over the plane of its first two latent variables

Every function takes `ax=None` and draws on the current figure's new axes then. Nothing is shown or saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "plot_importance_image",
    "plot_importances",
    "plot_loadings",
    "plot_output",
    "plot_spectrum",
    "plot_summary",
]

COLOR, ACCENT, GREY = "#3b6ea5", "#c8553d", "#8a8a8a"


def _axes(ax: Axes | None, size: tuple[float, float] = (5.0, 3.6)) -> Axes:
    if ax is not None:
        return ax
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")  # outside pyplot, which would keep it alive
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def _names(names: Sequence[str] | None, count: int) -> list[str]:
    if names is None:
        return [f"x{i}" for i in range(count)]
    if len(names) != count:
        raise ValueError(f"{len(names)} names for {count} features; give one each")
    return list(map(str, names))


def _plain(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)


def plot_importances(
    importances: Any,
    names: Sequence[str] | None = None,
    *,
    top: int = 15,
    interval: Any = None,
    ax: Axes | None = None,
) -> Axes:
    """Bars of the `top` most important features, most important first.

    Args:
        importances: Shares (D,).
        names: Names of the features.
        top: Number of bars.
        interval: Lower and upper end (2, D) of each share, or (3, D) with the median between them, as from
            `Bootstrap.interval`; drawn as whiskers.
        ax: Where to draw.
    """
    shares = np.asarray(importances, dtype=float)
    labels = _names(names, len(shares))
    order = np.argsort(-shares, kind="stable")[:top]
    ax = _axes(ax, (5.0, 0.8 + 0.28 * len(order)))
    error = None
    if interval is not None:
        ends = np.asarray(interval, dtype=float)[[0, -1]][:, order]
        error = np.clip([shares[order] - ends[0], ends[1] - shares[order]], 0, None)
    ax.barh(range(len(order)), shares[order], color=COLOR, xerr=error, error_kw={"ecolor": GREY, "capsize": 2})
    ax.set_yticks(range(len(order)), [labels[i] for i in order])
    ax.invert_yaxis()
    ax.set_xlim(left=0)
    ax.set_xlabel("share of importance")
    _plain(ax)
    return ax


def plot_spectrum(eigenvalues: Any, *, top: int = 15, interval: Any = None, ax: Axes | None = None) -> Axes:
    """Share of each eigenvalue, decreasing, with the cumulative share as a line.

    Args:
        eigenvalues: Decreasing, (D,).
        top: Number of eigenvalues.
        interval: Lower and upper end (2, D) or (3, D) of each eigenvalue, in their own units.
        ax: Where to draw.
    """
    values = np.asarray(eigenvalues, dtype=float)
    total = values.sum() or 1.0
    k = min(top, len(values))
    ax = _axes(ax)
    error = None
    if interval is not None:
        ends = np.asarray(interval, dtype=float)[[0, -1], :k]
        error = np.clip([values[:k] - ends[0], ends[1] - values[:k]], 0, None) / total
    where = np.arange(1, k + 1)
    ax.bar(where, values[:k] / total, color=COLOR, yerr=error, error_kw={"ecolor": GREY, "capsize": 2}, label="share")
    ax.plot(where, values.cumsum()[:k] / total, "o-", color=ACCENT, markersize=3, linewidth=1, label="cumulative")
    ax.set_xticks(where if k <= 20 else where[::5])
    ax.set_ylim(0, 1.05)
    ax.set_xlabel("eigenvalue of the precision matrix")
    ax.set_ylabel("share of the trace")
    ax.legend(frameon=False, loc="center right")
    _plain(ax)
    return ax


def plot_loadings(components: Any, names: Sequence[str] | None = None, *, top: int = 5, ax: Axes | None = None) -> Axes:
    """Heat map of the first eigenvectors: what each latent variable is made of.

    Args:
        components: Eigenvectors in rows (k, D).
        names: Names of the features.
        top: Number of eigenvectors.
        ax: Where to draw.
    """
    rows = np.asarray(components, dtype=float)[:top]
    labels = _names(names, rows.shape[1])
    ax = _axes(ax, (max(4.0, 1.6 + 0.3 * rows.shape[1]), 1.6 + 0.35 * len(rows)))
    limit = np.abs(rows).max() or 1.0
    image = ax.imshow(rows, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    ax.set_yticks(range(len(rows)), [f"z{i + 1}" for i in range(len(rows))])
    if len(labels) <= 40:
        ax.set_xticks(range(len(labels)), labels, rotation=90)
    else:
        ax.set_xlabel("feature")
    ax.figure.colorbar(image, ax=ax, label="loading")
    return ax


def plot_importance_image(importances: Any, shape: tuple[int, int], *, ax: Axes | None = None) -> Axes:
    """Importances of pixels in their places.

    Args:
        importances: Shares (height * width,).
        shape: Height and width.
        ax: Where to draw.
    """
    shares = np.asarray(importances, dtype=float)
    if shares.size != shape[0] * shape[1]:
        raise ValueError(f"{shares.size} importances do not fill {shape[0]} x {shape[1]} pixels")
    ax = _axes(ax, (3.8, 3.2))
    image = ax.imshow(shares.reshape(shape), cmap="viridis", vmin=0)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.figure.colorbar(image, ax=ax, label="share of importance")
    return ax


def plot_summary(model: Any, X: Any, y: Any, *, component: int = 0, ax: Axes | None = None) -> Axes:
    """One latent variable against the target: a sufficient-summary plot.

    Args:
        model: A fitted estimator with `transform`.
        X: Rows (n, D).
        y: Targets (n,); classes are spread a little so that points do not cover each other.
        component: Which latent variable.
        ax: Where to draw.
    """
    z, y = model.transform(X)[:, component], np.asarray(y)
    ax = _axes(ax)
    if hasattr(model, "classes_"):
        place = np.searchsorted(model.classes_, y)
        spread = np.random.default_rng(0).uniform(-0.25, 0.25, len(z))
        ax.scatter(z, place + spread, s=8, c=place, cmap="tab10", vmax=9, alpha=0.7, linewidths=0)
        ax.set_yticks(range(len(model.classes_)), map(str, model.classes_))
        ax.set_ylabel("class")
    else:
        order = np.argsort(z)
        ax.scatter(z, y, s=8, color=GREY, alpha=0.6, linewidths=0, label="target")
        ax.scatter(z[order], model.predict(X)[order], s=5, color=ACCENT, linewidths=0, label="prediction")
        ax.legend(frameon=False)
        ax.set_ylabel("target")
    ax.set_xlabel(f"z{component + 1}")
    _plain(ax)
    return ax


def plot_output(model: Any, X: Any, y: Any = None, *, resolution: int = 80, ax: Axes | None = None) -> Axes:
    """The model's output over the plane of its first two latent variables, with the rows and the centres.

    The plane is mapped back to features with all other latent variables at zero. A binary classifier shows the
    probability of its second class, several classes show the decision, a regression its value.

    Args:
        model: A fitted GRBF estimator of at least two features.
        X: Rows (n, D), drawn as points.
        y: Targets, which colour the points.
        resolution: Grid points of each side.
        ax: Where to draw.
    """
    Z = model.transform(X)
    if Z.shape[1] < 2:
        raise ValueError("the picture needs two latent variables; fit with n_components=None or at least 2")
    z = Z[:, :2]
    low, high = z.min(0), z.max(0)
    low, high = low - 0.08 * (high - low), high + 0.08 * (high - low)
    first, second = np.meshgrid(*(np.linspace(low[i], high[i], resolution) for i in (0, 1)))
    plane = np.zeros((first.size, Z.shape[1]))
    plane[:, 0], plane[:, 1] = first.ravel(), second.ravel()
    rows = model.inverse_transform(plane)
    ax = _axes(ax, (5.0, 4.0))
    classes = getattr(model, "classes_", None)
    if classes is None:
        levels = model.predict(rows).reshape(first.shape)
        drawn = ax.contourf(first, second, levels, 20, cmap="viridis")
        ax.figure.colorbar(drawn, ax=ax, label="prediction")
    elif len(classes) == 2:
        levels = model.predict_proba(rows)[:, 1].reshape(first.shape)
        drawn = ax.contourf(first, second, levels, np.linspace(0, 1, 11), cmap="RdBu_r", alpha=0.8)
        ax.figure.colorbar(drawn, ax=ax, label=f"probability of {classes[1]}")
    else:
        place = model.predict_proba(rows).argmax(1).reshape(first.shape)
        ax.contourf(
            first, second, place, np.arange(len(classes) + 1) - 0.5, cmap="tab10", vmin=-0.5, vmax=9.5, alpha=0.35
        )
    _points(ax, model, z, y)
    centers = model.centers_ @ model.components_[:2].T
    ax.scatter(centers[:, 0], centers[:, 1], marker="x", s=28, color="black", linewidths=1.2, label="centres")
    ax.set_xlim(low[0], high[0])
    ax.set_ylim(low[1], high[1])
    ax.set_xlabel("z1")
    ax.set_ylabel("z2")
    ax.legend(frameon=True, fontsize="small", loc="best")
    return ax


def _points(ax: Axes, model: Any, z: np.ndarray, y: Any) -> None:
    """The rows, coloured by class or value."""
    common: dict[str, Any] = {"s": 12, "edgecolors": "white", "linewidths": 0.4}
    first, second = z.T
    if y is None:
        ax.scatter(first, second, color=GREY, **common)
    elif not hasattr(model, "classes_"):
        ax.scatter(first, second, c=np.asarray(y), cmap="viridis", **common)
    else:
        for i, label in enumerate(model.classes_):
            color = ("#2166ac", "#b2182b")[i] if len(model.classes_) == 2 else f"C{i % 10}"
            own = np.asarray(y) == label
            ax.scatter(first[own], second[own], color=color, label=str(label), **common)
