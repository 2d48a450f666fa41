"""Plots of what a model has learned, as functions that draw on matplotlib axes and return them.

>>> ax = plot_importances(model.feature_importances_, names)
>>> ax = plot_output(model, X, y)                  # over the plane of the first two latent variables

With `ax=None`, functions draw on the axes of a new figure. Nothing is shown or saved.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from zoo.support.values import MAKER

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "as_array",
    "plot_accuracy_matrix",
    "plot_curves",
    "plot_hyper_kernels",
    "plot_image_grid",
    "plot_importance_image",
    "plot_importances",
    "plot_kernels",
    "plot_loadings",
    "plot_output",
    "plot_partial_dependence",
    "plot_receptive_field",
    "plot_spectrum",
    "plot_summary",
    "square_of_share",
]
COLOR, ACCENT, GREY = "#3b6ea5", "#c8553d", "#8a8a8a"


def new_figure(size: tuple[float, float]) -> Figure:
    """An empty figure (width, height) in inches, created without pyplot, which would keep it alive."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path, dpi: int = 120) -> None:
    """Write a picture (.png, .svg, .pdf), whole or not at all, with the name of the zoo in its metadata."""
    from zoo.support.files import write_atomic

    kind = path.suffix.lower()[1:]
    told: Any = {"Software" if kind == "png" else "Creator": MAKER}
    write_atomic(path, lambda file: figure.savefig(file, format=kind, dpi=dpi, metadata=told))


def given_or_new(ax: Axes | None, size: tuple[float, float] = (5.0, 3.6)) -> Axes:
    """The given axes, or those of a new figure."""
    return new_figure(size).add_subplot() if ax is None else ax


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
    """Bar chart of the `top` most important features, in descending order.

    Args:
        importances: Relative importances (D,).
        names: Names of the features.
        top: Number of bars.
        interval: Lower and upper ends (2, D) of each importance, or (3, D) with the median in between, as from
            `Bootstrap.interval`; drawn as whiskers.
        ax: Axes; None for a new figure, as in all plots.
    """
    shares = np.asarray(importances, dtype=float)
    labels = _names(names, len(shares))
    order = np.argsort(-shares, kind="stable")[:top]
    ax = given_or_new(ax, (5.0, 0.8 + 0.28 * len(order)))
    error = None
    if interval is not None:
        ends = np.asarray(interval, dtype=float)[[0, -1]][:, order]
        error = np.clip([shares[order] - ends[0], ends[1] - shares[order]], 0, None)
    ax.barh(range(len(order)), shares[order], color=COLOR, xerr=error, error_kw={"ecolor": GREY, "capsize": 2})
    ax.set_yticks(range(len(order)), [labels[i] for i in order])
    ax.invert_yaxis()
    ax.set_xlim(left=0)
    ax.set_xlabel("relative importance")
    _plain(ax)
    return ax


def plot_spectrum(
    eigenvalues: Any,
    *,
    top: int = 15,
    interval: Any = None,
    of: str = "the precision matrix",
    ax: Axes | None = None,
) -> Axes:
    """Relative size of each eigenvalue, in descending order, with the cumulative share as a line.

    Args:
        eigenvalues: Descending, (D,).
        top: Number of eigenvalues.
        interval: Lower and upper ends (2, D) or (3, D) of each eigenvalue, in their own units.
        of: Name of the matrix, for the label.
        ax: Axes.
    """
    values = np.asarray(eigenvalues, dtype=float)
    total = values.sum() or 1.0
    k = min(top, len(values))
    ax = given_or_new(ax)
    error = None
    if interval is not None:
        ends = np.asarray(interval, dtype=float)[[0, -1], :k]
        error = np.clip([values[:k] - ends[0], ends[1] - values[:k]], 0, None) / total
    where = np.arange(1, k + 1)
    ax.bar(where, values[:k] / total, color=COLOR, yerr=error, error_kw={"ecolor": GREY, "capsize": 2}, label="share")
    ax.plot(where, values.cumsum()[:k] / total, "o-", color=ACCENT, markersize=3, linewidth=1, label="cumulative")
    ax.set_xticks(where if k <= 20 else where[::5])
    ax.set_ylim(0, 1.05)
    ax.set_xlabel(f"eigenvalue of {of}")
    ax.set_ylabel("share of the trace")
    ax.legend(frameon=False, loc="center right")
    _plain(ax)
    return ax


def plot_loadings(components: Any, names: Sequence[str] | None = None, *, top: int = 5, ax: Axes | None = None) -> Axes:
    """Heat map of the first eigenvectors: the composition of the latent variables.

    Args:
        components: Eigenvectors as rows (k, D).
        names: Names of the features.
        top: Number of eigenvectors.
        ax: Axes.
    """
    rows = np.asarray(components, dtype=float)[:top]
    labels = _names(names, rows.shape[1])
    ax = given_or_new(ax, (max(4.0, 1.6 + 0.3 * rows.shape[1]), 1.6 + 0.35 * len(rows)))
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
    """Importances of pixels as an image.

    Args:
        importances: Relative importances (height * width,).
        shape: Height and width.
        ax: Axes.
    """
    shares = np.asarray(importances, dtype=float)
    if shares.size != shape[0] * shape[1]:
        raise ValueError(f"{shares.size} importances do not fill {shape[0]} x {shape[1]} pixels")
    ax = given_or_new(ax, (3.8, 3.2))
    image = ax.imshow(shares.reshape(shape), cmap="viridis", vmin=0)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.figure.colorbar(image, ax=ax, label="relative importance")
    return ax


def plot_summary(model: Any, X: Any, y: Any, *, component: int = 0, ax: Axes | None = None) -> Axes:
    """Sufficient-summary plot: one latent variable against the target.

    Args:
        model: A fitted estimator with `transform`.
        X: Rows (n, D).
        y: Targets (n,); classes are jittered to avoid overlap.
        component: Index of the latent variable.
        ax: Axes.
    """
    z, y = model.transform(X)[:, component], np.asarray(y)
    ax = given_or_new(ax)
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
    """The model's output over the plane of its first two latent variables, with data and centres.

    The plane is mapped back to features with all other latent variables at zero. Shown are the probability of the
    second class (binary), the decision (several classes), or the value (regression).

    Args:
        model: A fitted GRBF estimator with at least two features.
        X: Rows (n, D), drawn as points.
        y: Targets, for the colours of the points.
        resolution: Grid points per side.
        ax: Axes.
    """
    model, X = _on_numbers(model, X)
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
    ax = given_or_new(ax, (5.0, 4.0))
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


def _on_numbers(model: Any, X: Any) -> tuple[Any, Any]:
    """A model for rows of numbers, and the rows as such: categories and gaps are what they are encoded as."""
    if not hasattr(model, "of_inputs"):
        return model, X
    found = copy.copy(model.of_inputs())
    vars(found).pop("feature_names_in_", None)  # rows without names are meant
    return found, model.inputs(X)


def plot_partial_dependence(
    model: Any, X: Any, *, component: int = 0, resolution: int = 50, rows: int = 200, ax: Axes | None = None
) -> Axes:
    """Partial dependence on a direction: the mean output when all rows are moved to the same place along it.

    Shown are the probability of the second class (binary) or of each class, or the value (regression); with one curve,
    also those of single rows, whose mean it is. A tick below stands for every row.

    Args:
        model: A fitted GRBF estimator.
        X: Rows (n, D).
        component: Index of the latent variable, in decreasing order of importance.
        resolution: Places along it, from the 2nd to the 98th percentile of the rows.
        rows: Largest number of rows to average over, evenly spaced.
        ax: Axes.
    """
    model, X = _on_numbers(model, X)
    X = np.asarray(X, dtype=float)
    X = X[np.unique(np.linspace(0, len(X) - 1, rows).astype(int))]
    Z = model.transform(X)
    if not 0 <= component < Z.shape[1]:
        raise ValueError(f"component={component} must be from 0 to {Z.shape[1] - 1}")
    z = Z[:, component]
    low, high = np.quantile(z, [0.02, 0.98])
    grid = np.linspace(low, high, resolution)
    ends = model.inverse_transform(np.eye(Z.shape[1])[[component]]) - model.inverse_transform(np.zeros((1, Z.shape[1])))
    moved = X + (grid[:, None] - z)[:, :, None] * ends  # (resolution, n, D)
    classes = getattr(model, "classes_", None)
    function = model.predict if classes is None else model.predict_proba
    values = function(moved.reshape(-1, X.shape[1])).reshape(resolution, len(X), -1)
    values = values[:, :, 1:] if classes is not None and len(classes) == 2 else values
    ax = given_or_new(ax)
    curves = values.mean(1)
    if curves.shape[1] == 1:
        ax.plot(grid, values[:, :: max(1, len(X) // 30), 0], color=GREY, linewidth=0.5, alpha=0.4)
        ax.plot(grid, curves[:, 0], color=ACCENT, linewidth=2)
        ax.set_ylabel("prediction" if classes is None else f"probability of {classes[1]}")
    else:
        for i, curve in enumerate(curves.T):
            ax.plot(grid, curve, label=f"target {i + 1}" if classes is None else str(classes[i]))
        ax.set_ylabel("prediction" if classes is None else "probability")
        ax.legend(frameon=False)
    ax.plot(z, np.zeros_like(z), "|", color=GREY, markersize=8, transform=ax.get_xaxis_transform(), clip_on=False)
    ax.set_xlim(grid[0], grid[-1])
    ax.set_xlabel(f"z{component + 1}")
    _plain(ax)
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


def square_of_share(field: np.ndarray, share: float) -> tuple[int, int, int]:
    """The smallest square around a field's centre of mass that contains a given share of it.

    Returns:
        Row and column of the centre, and the odd side length in pixels; the square may extend over the border.
    """
    height, width = field.shape
    row = round(float(np.average(np.arange(height), weights=field.sum(1))))
    column = round(float(np.average(np.arange(width), weights=field.sum(0))))
    y, x = np.abs(np.arange(height) - row)[:, None], np.abs(np.arange(width) - column)[None, :]
    distance = np.maximum(y, x)  # half the side of the square with each pixel on its border
    held = np.cumsum(np.bincount(distance.ravel(), weights=field.ravel())) / field.sum()
    return row, column, 2 * int(np.searchsorted(held, share - 1e-12)) + 1


def plot_receptive_field(
    field: np.ndarray, *, shares: Sequence[float] = (0.5, 0.95), title: str | None = None, ax: Axes | None = None
) -> Axes:
    """Map of an effective receptive field on a logarithmic scale, with squares that contain given shares of it.

    Args:
        field: Field (H, W) that sums to one, as from :func:`receptive_field`.
        shares: Squares to draw; the legend gives their sides in pixels.
        title: Title.
        ax: Axes.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    ax = given_or_new(ax, (4.8, 4.2))
    height, width = field.shape
    relative = np.clip(field / field.max(), 1e-4, None)
    image = ax.imshow(relative, cmap="magma", norm=LogNorm(1e-4, 1), interpolation="nearest")
    for share, style in zip(shares, ("-", "--", ":", "-.") * len(shares), strict=False):
        row, column, side = square_of_share(field, share)
        corner = (column - side / 2, row - side / 2)
        label = f"{share:.0%} within {side} px"
        ax.add_patch(Rectangle(corner, side, side, fill=False, edgecolor="white", linestyle=style, label=label))
    ax.set_xlim(-0.5, width - 0.5)
    ax.set_ylim(height - 0.5, -0.5)
    ax.set_xticks([0, width // 2, width - 1])
    ax.set_yticks([0, height // 2, height - 1])
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=2, fontsize="small", facecolor=GREY, frameon=True)
    ax.figure.colorbar(image, ax=ax, label="gradient, share of the largest")
    if title:
        ax.set_title(title)
    return ax


def plot_kernels(kernels: np.ndarray, *, count: int = 32, title: str | None = None, ax: Axes | None = None) -> Axes:
    """Depthwise kernels side by side, each on its own scale: red is positive, blue negative, white zero.

    Args:
        kernels: (C, k, k).
        count: Number of kernels, spread evenly over the channels.
        title: Title.
        ax: Axes.
    """
    chosen = kernels[np.unique(np.linspace(0, len(kernels) - 1, min(count, len(kernels))).round().astype(int))]
    columns = int(np.ceil(np.sqrt(2 * len(chosen))))
    rows = -(-len(chosen) // columns)
    k_h, k_w = chosen.shape[-2:]
    mosaic = np.full((rows * (k_h + 1) - 1, columns * (k_w + 1) - 1), np.nan)  # separated by an empty pixel
    for i, kernel in enumerate(chosen):
        top, left = i // columns * (k_h + 1), i % columns * (k_w + 1)
        mosaic[top : top + k_h, left : left + k_w] = kernel / (np.abs(kernel).max() or 1.0)
    ax = given_or_new(ax, (max(0.85 * columns, 4.5), 0.85 * rows + 0.4))  # with room for the title
    ax.set_facecolor("black")
    ax.imshow(mosaic, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    if title:
        ax.set_title(title, fontsize="medium")
    return ax


def plot_hyper_kernels(kernels: Sequence[np.ndarray], *, count: int = 12, title: str | None = None) -> Axes:
    """Some kernels of every block, one panel per block, drawn as by :func:`plot_kernels`.

    Args:
        kernels: (C, h, w) for each block.
        count: Number of kernels per block.
        title: Title of the figure.

    Returns:
        Axes of the last panel.
    """
    figure = new_figure((2.6 * len(kernels), 2.9))
    for i, block in enumerate(kernels):
        ax = figure.add_subplot(1, len(kernels), i + 1)
        shown = f"block {i}: {min(count, len(block))} of {len(block)}"
        plot_kernels(block, count=count, title=shown, ax=ax)
    if title:
        figure.suptitle(title)
    return ax


def plot_curves(curves: dict[str, tuple[Any, Any]], *, ax: Axes | None = None) -> Axes:
    """Loss curves on a logarithmic scale.

    Args:
        curves: Steps and values by name.
        ax: Axes.
    """
    ax = given_or_new(ax)
    for i, (name, (steps, values)) in enumerate(curves.items()):
        ax.plot(np.asarray(steps), np.asarray(values), color=f"C{i}", linewidth=1.2, label=name)
    ax.set_yscale("log")
    ax.set_xlabel("optimizer step")
    ax.set_ylabel("loss")
    ax.legend(frameon=False)
    _plain(ax)
    return ax


def as_array(ax: Axes) -> np.ndarray:
    """The rendered figure of some axes as bytes (H, W, 3), for a logger."""
    canvas: Any = ax.figure.canvas
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def plot_accuracy_matrix(matrix: Any, *, title: str = "", ax: Axes | None = None) -> Axes:
    """Heat map for a continual learner: accuracy on each task (columns) after learning each task (rows).

    Args:
        matrix: (T, T) in [0, 1]; entries above the diagonal are ignored.
        title: Title.
        ax: Axes.
    """
    a = np.asarray(matrix, dtype=float)
    T = len(a)
    ax = given_or_new(ax, (2.0 + 0.28 * T, 1.6 + 0.26 * T))
    shown = np.where(np.tri(T, dtype=bool), a, np.nan)
    image = ax.imshow(shown, cmap="viridis", vmin=np.floor(10 * np.nanmin(shown, initial=0.9)) / 10, vmax=1.0)
    step = max(1, T // 10)
    ticks = range(0, T, step)
    ax.set_xticks(ticks, [str(t + 1) for t in ticks])
    ax.set_yticks(ticks, [str(t + 1) for t in ticks])
    if T <= 10:
        for i, j in np.argwhere(np.isfinite(shown)):
            ax.text(j, i, f"{100 * shown[i, j]:.0f}", ha="center", va="center", fontsize=7, color="white")
    ax.set_xlabel("accuracy on task")
    ax.set_ylabel("after task")
    ax.set_title(title, fontsize=9)
    ax.figure.colorbar(image, ax=ax)
    return ax


def plot_image_grid(images: Any, *, columns: int = 10, title: str = "", ax: Axes | None = None) -> Axes:
    """Grid of images, row by row.

    Args:
        images: (N, C, H, W) in [0, 1], grey or RGB.
        columns: Images per row.
        title: Title.
        ax: Axes.
    """
    a = np.clip(np.asarray(images, dtype=float), 0, 1)
    n, c, h, w = a.shape
    rows = -(-n // columns)
    grid = np.ones((rows * (h + 1) - 1, columns * (w + 1) - 1, c))
    for i in range(n):
        y, x = (i // columns) * (h + 1), (i % columns) * (w + 1)
        grid[y : y + h, x : x + w] = a[i].transpose(1, 2, 0)
    ax = given_or_new(ax, (0.45 * columns, 0.45 * rows + 0.3))
    ax.imshow(grid.squeeze(-1) if c == 1 else grid[..., :3], cmap="gray", vmin=0, vmax=1)
    ax.set_axis_off()
    ax.set_title(title, fontsize=9)
    return ax
