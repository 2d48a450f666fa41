r"""Transductive few-shot heads: unrolled expectation maximisation on support and query, with learned constants.

A task has a few labelled rows per class (the support set) and a query set in which only some classes, unknown how many,
are present. Each layer alternates assignments U, class proportions and class parameters; the class balance strength
lam and the temperature T of each layer are learned on other tasks (Zhou and others, UNEM, CVPR 2025, arXiv 2412.16739).
With one strength for all layers and T = 1 this is PADDLE (Martin and others, NeurIPS 2022) for Gaussian classes, and
EM-Dirichlet (Martin and others, CVPR 2024) for probabilities.

Shapes: support (..., s, d), its labels (..., s), query (..., q, d); leading dimensions are tasks. Features of half
precision are computed, and answered, in float32.

>>> head = UNEMGaussian(layers=10)
>>> fit(head, episodes(X, y, ways=10, present=3, shots=1, queries=45), lr=0.1)
>>> head(support, labels, query).argmax(-1)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from zoo.ops.numerics import autocast_disabled

__all__ = [
    "DirichletLayer",
    "Episode",
    "GaussianLayer",
    "UNEMDirichlet",
    "UNEMGaussian",
    "dirichlet_layers",
    "em_dirichlet",
    "episodes",
    "fit",
    "fit_dirichlet",
    "gaussian_layers",
    "min_max_scaled",
    "nll",
    "paddle",
    "prototypes",
]

_TINY = 1e-15  # lower bound inside the logarithm of a probability
_SERIES = 1e-3  # below, the curvature uses a series: the formula loses digits


class GaussianLayer(NamedTuple):
    """Output of one layer of :func:`gaussian_layers`."""

    assignments: Tensor  # U (..., q, K)
    balance: Tensor  # V (..., K)
    means: Tensor  # W (..., K, d)


class DirichletLayer(NamedTuple):
    """Output of one layer of :func:`dirichlet_layers`."""

    assignments: Tensor  # U (..., q, K)
    balance: Tensor  # V (..., K)
    alpha: Tensor  # (..., K, d)
    mean_log: Tensor  # m (..., K, d), weighted means of log p
    steps: int  # updates of alpha


class Episode(NamedTuple):
    """A task, or a batch of tasks."""

    support: Tensor  # (..., s, d)
    support_labels: Tensor  # (..., s)
    query: Tensor  # (..., q, d)
    query_labels: Tensor  # (..., q)


# ---- Gaussian classes --------------------------------------------------------------------------------------


def gaussian_layers(
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    lam: Tensor,
    temperature: Tensor,
    classes: int | None = None,
    *,
    eps: float = 1e-6,
    offset: float = 1.0,
) -> Iterator[GaussianLayer]:
    """Soft k-means on support and query that favours large classes.

    Every layer: U = softmax((-|z - W|^2 / 2 + lam V) / T), V = log(mean U + eps) + offset, W = means of all rows, where
    the query is weighted by U. Initially W are the support's means, and V = `offset`.

    Args:
        support: (..., s, d).
        labels: 0 to K - 1 (..., s); every class needs a row.
        query: (..., q, d).
        lam: Class balance strength of each layer (L,).
        temperature: T of each layer (L,).
        classes: K; None for the largest label plus one.
        eps: Added inside the logarithm.
        offset: Added to V; does not affect the assignments.

    Yields:
        U, V and W of every layer.

    Raises:
        ValueError: The shapes do not fit, a number is not finite or so large that distances are not, or a class has no
            row.
    """
    support, query = _features(support, query)
    R = _one_hot(support, labels, classes, every=True)  # (..., s, K)
    _check_size(support, query)
    known = R.mT @ support
    W = known / R.sum(-2)[..., None]
    V = torch.full_like(W[..., 0], offset)
    for strength, T in zip(lam, temperature, strict=True):
        logits = -_squared_distances(query, W) / 2
        U = ((logits + strength * V[..., None, :]) / T).softmax(-1)
        V = (U.mean(-2) + eps).log() + offset
        W = (U.mT @ query + known) / (U.sum(-2) + R.sum(-2))[..., None]
        yield GaussianLayer(U, V, W)


class _Unrolled(nn.Module):
    """Learned parameters of both heads: a class balance strength and a temperature for each of L layers."""

    def __init__(
        self,
        layers: int,
        lam: float,
        temperature: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        _check_positive(**{"layers": layers, "lam": lam, "temperature - 1": temperature - 1})
        like = torch.ones(layers, device=device, dtype=dtype)
        self.a = nn.Parameter(_inverse_softplus(like * lam))
        self.b = nn.Parameter(_inverse_softplus(like * (temperature - 1)))

    @property
    def lam(self) -> Tensor:
        """Class balance strengths (L,)."""
        return F.softplus(self.a)

    @property
    def temperature(self) -> Tensor:
        """Temperatures (L,), above 1."""
        return 1 + F.softplus(self.b)


class UNEMGaussian(_Unrolled):
    """The Gaussian head: :func:`gaussian_layers` on scaled features, with 2 L + 1 learned parameters.

    Args:
        layers: L.
        lam: Initial class balance strength; parameterised as softplus(a).
        temperature: Initial T, above 1; parameterised as 1 + softplus(b).
        scale: Initial factor t of the features; parameterised as softplus(c).
        eps: Added inside the logarithm of V.
        device: Device of the parameters.
        dtype: Their dtype.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        layers: int = 10,
        *,
        lam: float = 1.0,
        temperature: float = 1.5,
        scale: float = 1.0,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(layers, lam, temperature, device, dtype)
        _check_positive(scale=scale)
        self.c = nn.Parameter(_inverse_softplus(torch.ones_like(self.a[0]) * scale))
        self.eps = eps

    @property
    def scale(self) -> Tensor:
        """Factor of the features."""
        return F.softplus(self.c)

    def layers(
        self, support: Tensor, labels: Tensor, query: Tensor, classes: int | None = None
    ) -> Iterator[GaussianLayer]:
        """Output of every layer; see :func:`gaussian_layers`."""
        support, query = _scaled(*_features(support, query, self.a), self.scale)
        return gaussian_layers(support, labels, query, self.lam, self.temperature, classes, eps=self.eps)

    def forward(self, support: Tensor, labels: Tensor, query: Tensor, classes: int | None = None) -> Tensor:
        """Class probabilities for every query row, (..., q, K), from the last layer."""
        _check_tensors(support=support, labels=labels, query=query)
        with autocast_disabled(query.device):
            *_, last = self.layers(support, labels, query, classes)
        return last.assignments


def paddle(
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    classes: int | None = None,
    *,
    lam: float = 1.0,
    iterations: int = 100,
    eps: float = 1e-6,
    scale_features: bool = True,
) -> Tensor:
    """PADDLE: probabilities (..., q, K) after a fixed number of steps; `lam` = 0 is soft k-means.

    Args:
        support: (..., s, d).
        labels: (..., s).
        query: (..., q, d).
        classes: K; None for the largest label plus one.
        lam: Class balance strength.
        iterations: Number of steps.
        eps: Added inside the logarithm of V.
        scale_features: Scale each task's features with :func:`min_max_scaled` first.
    """
    _check_positive(iterations=iterations)
    support, query = _features(support, query)
    if scale_features:
        support, query = min_max_scaled(support, query)
    lams = torch.full((iterations,), float(lam), dtype=query.dtype, device=query.device)
    *_, last = gaussian_layers(support, labels, query, lams, torch.ones_like(lams), classes, eps=eps, offset=0.0)
    return last.assignments


def min_max_scaled(support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Min-max scaling of both by the query, per task and feature; a constant feature is only shifted.

    Raises:
        ValueError: The shapes do not fit, a number is not finite, or one cannot be scaled.
    """
    support, query = _features(support, query)
    low, high = query.amin(-2, keepdim=True), query.amax(-2, keepdim=True)
    width = torch.where(high > low, high - low, torch.ones_like(low))
    support, query = (support - low) / width, (query - low) / width
    if not bool(support.detach().isfinite().all() & width.detach().isfinite().all()):
        raise ValueError(f"the features are too far apart to be scaled in {query.dtype}: use float64, or scale them")
    return support, query


def prototypes(support: Tensor, labels: Tensor, query: Tensor, classes: int | None = None) -> Tensor:
    """Probabilities (..., q, K) from distances to the support's class means; the query is not used for fitting."""
    support, query = _features(support, query)
    one = torch.ones(1, dtype=query.dtype, device=query.device)
    return next(gaussian_layers(support, labels, query, 0 * one, one, classes)).assignments


# ---- Dirichlet classes -------------------------------------------------------------------------------------


def dirichlet_layers(
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    lam: Tensor,
    temperature: Tensor,
    *,
    eps: float = 1e-15,
    max_steps: int = 1000,
    tolerance: float = 1e-11,
    check_every: int = 50,
) -> Iterator[DirichletLayer]:
    """Expectation maximisation with a Dirichlet distribution per class, on rows that are probabilities.

    Every layer: alpha fitted to the rows weighted by the last U (:func:`fit_dirichlet`, starting from the last alpha),
    V = log(mean U + eps) + 1 of that U, U = softmax((log density + lam V) / T). Initially U is the query itself, so its
    columns are the classes: d = K. The support may be empty.

    Args:
        support: Probabilities (..., s, K).
        labels: (..., s).
        query: Probabilities (..., q, K).
        lam: Class balance strength of each layer (L,).
        temperature: T of each layer (L,).
        eps: Added inside the logarithm of V.
        max_steps: Maximum number of updates of alpha per layer.
        tolerance: For the squared relative change of alpha, over all tasks together.
        check_every: Updates between two convergence checks.

    Yields:
        U, V, alpha, m and the number of updates of every layer.

    Raises:
        ValueError: The shapes do not fit, or a number is not finite, or negative.
    """
    support, query = _features(support, query)
    for name, values in (("support", support), ("query", query)):
        if bool((values.detach() < 0).any()):
            raise ValueError(f"the {name} has negative numbers, which are no probabilities")
    R = _one_hot(support, labels, query.shape[-1])
    log_support, log_query = (support + _TINY).log(), (query + _TINY).log()
    known = R.mT @ log_support
    alpha, U = torch.ones_like(known), query
    for strength, T in zip(lam, temperature, strict=True):
        m = (U.mT @ log_query + known) / (U.sum(-2) + R.sum(-2))[..., None]
        alpha, steps = fit_dirichlet(m, alpha, max_steps=max_steps, tolerance=tolerance, check_every=check_every)
        V = (U.mean(-2) + eps).log() + 1
        constant = torch.lgamma(alpha.sum(-1)) - torch.lgamma(alpha).sum(-1)  # (..., K)
        logits = constant[..., None, :] + log_query @ (alpha - 1).mT
        U = ((logits + strength * V[..., None, :]) / T).softmax(-1)
        yield DirichletLayer(U, V, alpha, m, steps)


def fit_dirichlet(
    mean_log: Tensor,
    alpha: Tensor | None = None,
    *,
    max_steps: int = 1000,
    tolerance: float = 1e-11,
    check_every: int = 50,
) -> tuple[Tensor, int]:
    """Maximum likelihood of Dirichlet parameters by majorisation-minimisation, differentiable through all steps.

    Convergence is checked after updates 1 + check_every, 1 + 2 check_every and so on.

    Args:
        mean_log: Means of log p (..., d).
        alpha: Initial value (..., d); ones if None.
        max_steps: Maximum number of updates.
        tolerance: Stop when |change|^2 / |alpha|^2, over all leading dimensions together, is smaller.
        check_every: Updates between two checks.

    Returns:
        Parameters (..., d) and the number of updates.
    """
    _check_positive(max_steps=max_steps, check_every=check_every)
    alpha = torch.ones_like(mean_log) if alpha is None else alpha
    recorded = torch.is_grad_enabled() and (mean_log.requires_grad or alpha.requires_grad)
    alpha, done = _minorise(alpha, mean_log), 1
    while done < max_steps:
        some = min(check_every, max_steps - done)
        alpha, before = _Recomputed.apply(alpha, mean_log, some) if recorded else _updates(alpha, mean_log, some)
        done += some
        change = (alpha.detach() - before.detach()).square().sum() / before.detach().square().sum()
        if some == check_every and bool(change < tolerance):
            break
    return alpha, done


def _updates(alpha: Tensor, mean_log: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Alpha after a number of updates, and before the last of them."""
    before = alpha
    for _ in range(steps):
        before, alpha = alpha, _minorise(alpha, mean_log)
    return alpha, before


class _Recomputed(torch.autograd.Function):
    """:func:`_updates` with recomputation: only the initial alpha is stored for the backward pass."""

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, mean_log: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(alpha, mean_log)
        ctx.steps = steps
        alpha, before = _updates(alpha, mean_log, steps)
        ctx.mark_non_differentiable(before)
        return alpha, before

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
        start, mean_log = (value.detach().requires_grad_() for value in ctx.saved_tensors)
        with torch.enable_grad():
            alpha, _ = _updates(start, mean_log, ctx.steps)
            to_start, to_mean = torch.autograd.grad(alpha, (start, mean_log), grad)
        return to_start, to_mean, None


def _minorise(a: Tensor, m: Tensor) -> Tensor:
    """Positive root of the quadratic that minorises the derivative of the likelihood."""
    psi = torch.digamma(a + 1)
    curvature = 2 * (psi * a - torch.lgamma(a + 1)).abs() / a.square()
    # zeta(2) - 4/3 zeta(3) a + 3/2 zeta(4) a^2
    small = 1.6449340668482264 + a * (-1.6027425375461265 + a * 1.6234848505667073)
    curvature = torch.where(a < _SERIES, small, curvature)
    b = psi - torch.digamma(a.sum(-1, keepdim=True)) - curvature * a - m
    root = (b.square() + 4 * curvature).sqrt()
    return torch.where(b > 0, 2 / (b + root), (root - b) / (2 * curvature))  # the same, without cancellation


class UNEMDirichlet(_Unrolled):
    """The Dirichlet head: :func:`dirichlet_layers` on softmax(t z), with 2 L + 1 learned parameters.

    Args:
        layers: L.
        lam: Initial class balance strength; parameterised as softplus(a).
        temperature: Initial T, above 1; parameterised as 1 + softplus(b).
        scale: Initial factor t of the features (similarities of an image to the class names); unconstrained.
        max_steps: Maximum number of updates of alpha per layer.
        device: Device of the parameters.
        dtype: Their dtype.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        layers: int = 10,
        *,
        lam: float = 1.0,
        temperature: float = 1.5,
        scale: float = 30.0,
        max_steps: int = 1000,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(layers, lam, temperature, device, dtype)
        _check_positive(scale=scale, max_steps=max_steps)
        self.t = nn.Parameter(torch.ones_like(self.a[0]) * scale)
        self.max_steps = max_steps

    def layers(self, support: Tensor, labels: Tensor, query: Tensor) -> Iterator[DirichletLayer]:
        """Output of every layer; see :func:`dirichlet_layers`."""
        p, q = (x.softmax(-1) for x in _scaled(*_features(support, query, self.a), self.t))
        return dirichlet_layers(p, labels, q, self.lam, self.temperature, max_steps=self.max_steps)

    def forward(self, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        """Class probabilities for every query row, (..., q, K), from the last layer."""
        _check_tensors(support=support, labels=labels, query=query)
        with autocast_disabled(query.device):
            *_, last = self.layers(support, labels, query)
        return last.assignments


def em_dirichlet(
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    *,
    present: int,
    scale: float = 30.0,
    iterations: int = 20,
    max_steps: int = 1000,
) -> Tensor:
    """EM-Dirichlet: probabilities (..., q, K), computed from softmax(scale z) of features z.

    Args:
        support: (..., s, K).
        labels: (..., s).
        query: (..., q, K).
        present: Number of classes in a query; the class balance strength is floor(K / present).
        scale: Factor of the features.
        iterations: Number of layers.
        max_steps: Maximum number of updates of alpha per layer.
    """
    _check_positive(present=present, iterations=iterations, scale=scale)
    support, query = _features(support, query)
    lam = torch.full((iterations,), float(query.shape[-1] // present), dtype=query.dtype, device=query.device)
    p, q = (x.softmax(-1) for x in _scaled(support, query, scale))
    *_, last = dirichlet_layers(p, labels, q, lam, torch.ones_like(lam), max_steps=max_steps)
    return last.assignments


# ---- training on episodes ----------------------------------------------------------------------------------


def nll(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log probability (..., q, K) of the true class (..., q): the training loss of the heads."""
    _check_tensors(probabilities=probabilities, labels=labels)
    if probabilities.ndim < 1 or not probabilities.is_floating_point():
        raise ValueError(f"probabilities must be floating-point numbers (..., q, K), got {_told(probabilities)}")
    _check_labels(labels, probabilities.shape[:-1], probabilities.shape[-1])
    labels = labels.long()
    tiny = torch.finfo(probabilities.dtype).tiny
    return -probabilities.gather(-1, labels[..., None]).clamp_min(tiny).log().mean()


def episodes(
    X: Tensor,
    y: Tensor,
    *,
    ways: int,
    present: int,
    shots: int,
    queries: int,
    tasks: int = 100,
    generator: torch.Generator | None = None,
) -> Episode:
    """Sample tasks from labelled features: some classes, a support of each, and a query with only a few of them.

    Args:
        X: Features (n, d).
        y: Classes (n,).
        ways: Classes per task, relabelled 0 to ways - 1 at random.
        present: Classes in its query.
        shots: Support rows per class.
        queries: Query rows, drawn from the present classes at random, disjoint from the support.
        tasks: Number of tasks.
        generator: Source of randomness.

    Returns:
        All tasks, stacked along a leading dimension.

    Raises:
        ValueError: There are not enough classes or rows.
    """
    _check_positive(ways=ways, present=present, shots=shots, queries=queries, tasks=tasks)
    _check_tensors(X=X, y=y)
    if X.ndim != 2 or y.shape != X.shape[:1]:
        raise ValueError(f"X (n, d) and y (n,) must agree, got {tuple(X.shape)} and {tuple(y.shape)}")
    rows = {int(c): (y == c).nonzero().flatten() for c in y.unique()}
    if not present <= ways <= len(rows):
        raise ValueError(f"present={present} and ways={ways} must not be more than the {len(rows)} classes at hand")
    fewest = min(len(mine) for mine in rows.values())
    if fewest <= shots:
        raise ValueError(f"a class has {fewest} rows: too few for shots={shots} and a query")
    found: list[list[Tensor]] = [[], [], [], []]
    names = torch.tensor(sorted(rows))
    for _ in range(tasks):
        chosen = names[torch.randperm(len(names), generator=generator)[:ways]].tolist()
        mixed = [rows[c][torch.randperm(len(rows[c]), generator=generator)] for c in chosen]
        here = torch.randperm(ways, generator=generator)[:present]
        room = torch.cat([torch.stack([mixed[int(k)][shots:], k.expand(len(mixed[int(k)]) - shots)]) for k in here], 1)
        if room.shape[1] < queries:
            raise ValueError(
                f"the {present} classes present have {room.shape[1]} rows left: too few for {queries} queries"
            )
        drawn = room[:, torch.randperm(room.shape[1], generator=generator)[:queries]]
        support = torch.cat([mine[:shots] for mine in mixed])
        for place, value in enumerate((X[support], torch.arange(ways).repeat_interleave(shots), X[drawn[0]], drawn[1])):
            found[place].append(value)
    return Episode(*(torch.stack(values) for values in found))


def fit(
    head: UNEMGaussian | UNEMDirichlet,
    tasks: Episode | Iterable[Episode],
    *,
    epochs: int = 100,
    lr: float = 0.1,
    halve_every: int = 50,
) -> list[float]:
    """Train a head's parameters on tasks from other classes or rows, with Adam on :func:`nll`.

    Args:
        head: Modified in place.
        tasks: One batch of tasks, or several; each is one step per epoch.
        epochs: Passes.
        lr: Initial learning rate.
        halve_every: Epochs after which the learning rate is halved.

    Returns:
        Mean loss of every epoch.

    Raises:
        RuntimeError: The loss becomes infinite or NaN.
    """
    _check_positive(epochs=epochs, lr=lr, halve_every=halve_every)
    batches = [tasks] if isinstance(tasks, Episode) else list(tasks)
    optimizer = torch.optim.Adam(head.parameters(), lr)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, halve_every, 0.5)
    losses = []
    for epoch in range(epochs):
        total = 0.0
        for task in batches:
            optimizer.zero_grad()
            loss = nll(head(task.support, task.support_labels, task.query), task.query_labels)
            if not bool(loss.isfinite()):
                raise RuntimeError(f"the loss is not finite in epoch {epoch}: use a smaller lr than {lr:g}")
            loss.backward()
            optimizer.step()
            total += float(loss.detach())
        schedule.step()
        losses.append(total / len(batches))
    return losses


# ---- helpers -----------------------------------------------------------------------------------------------


def _squared_distances(z: Tensor, W: Tensor) -> Tensor:
    """|z_q - W_k|^2 (..., q, K), centred at the mean of W to limit cancellation."""
    centre = W.detach().mean(-2, keepdim=True)
    z, W = z - centre, W - centre
    return z.square().sum(-1, keepdim=True) + W.square().sum(-1)[..., None, :] - 2 * z @ W.mT


def _features(support: Tensor, query: Tensor, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Checked support and query in a common floating-point dtype, at least float32 and that of `like`."""
    _check_tensors(support=support, query=query)
    lead, d = query.shape[:-2], query.shape[-1] if query.ndim >= 2 else 0
    if query.ndim < 2 or support.ndim != query.ndim or support.shape[:-2] != lead or support.shape[-1] != d:
        raise ValueError(
            f"support (..., s, d) and query (..., q, d) must agree, got {tuple(support.shape)} and {tuple(query.shape)}"
        )
    if not query.shape[-2]:
        raise ValueError("the query has no rows")
    for name, values in (("support", support), ("query", query)):
        if values.is_complex():
            raise ValueError(f"the {name} has complex numbers; features are real ones")
        if not bool(values.detach().isfinite().all()):
            raise ValueError(f"the {name} has numbers that are not finite")
    dtype = torch.promote_types(support.dtype, query.dtype)
    if like is not None:
        dtype = torch.promote_types(dtype, like.dtype)
    dtype = torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else torch.get_default_dtype()
    return support.to(dtype), query.to(dtype)


def _scaled(support: Tensor, query: Tensor, factor: Tensor | float) -> tuple[Tensor, Tensor]:
    """Both times the factor of a head."""
    support, query = support * factor, query * factor
    if not bool(support.detach().isfinite().all() & query.detach().isfinite().all()):
        raise ValueError(f"the features are too large for {query.dtype} when scaled: use float64, or scale them")
    return support, query


def _check_size(support: Tensor, query: Tensor) -> None:
    """Refuse features whose squared distances or sums are infinite."""
    most, rows = torch.finfo(query.dtype).max, support.shape[-2] + query.shape[-2]
    largest = max(float(x.detach().abs().max()) for x in (support, query) if x.numel()) if query.numel() else 0.0
    if largest * rows > most or 16 * query.shape[-1] * largest**2 > most:
        raise ValueError(
            f"the features are too large for distances in {query.dtype} (up to {largest:.3g}): use float64, or scale "
            "them"
        )


def _one_hot(support: Tensor, labels: Tensor, classes: int | None, *, every: bool = False) -> Tensor:
    """Validated one-hot labels (..., s, K) in the features' dtype; `every`: all classes need a row."""
    _check_tensors(labels=labels)
    if classes is not None and (isinstance(classes, bool) or not isinstance(classes, int) or classes < 1):
        raise ValueError(f"classes={classes!r} must be a whole number above 0, or None")
    _check_labels(labels, support.shape[:-1], classes)
    K = classes if classes is not None else int(labels.max()) + 1 if labels.numel() else 0
    if every and labels.shape[-1] < K:  # before memory is taken for them
        there = set((labels.flatten(0, -2)[:1].flatten() if labels.ndim > 1 else labels).tolist())
        _refuse_missing(next(k for k in range(K) if k not in there))
    R = F.one_hot(labels.long(), max(K, 1)).to(support)
    if every and not bool(R.sum(-2).all()):
        _refuse_missing(int((R.sum(-2) == 0).nonzero()[0, -1]))
    return R


def _refuse_missing(label: int) -> NoReturn:
    raise ValueError(f"class {label} has no row in the support of a task: means need one row of every class")


def _check_labels(labels: Tensor, shape: torch.Size, classes: int | None) -> None:
    if labels.shape != shape or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers {tuple(shape)}, got {labels.dtype} {tuple(labels.shape)}")
    if labels.numel():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or (classes is not None and high >= classes):
            raise ValueError(
                f"labels must be 0 to {(high + 1 if classes is None else classes) - 1}, got {low} to {high}"
            )


def _check_tensors(**values: Tensor) -> None:
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is a {type(value).__name__}, not a tensor: use torch.as_tensor")
    devices = {str(value.device) for value in values.values()}
    if len(devices) > 1:
        raise ValueError(f"{' and '.join(values)} are on different devices: {' and '.join(sorted(devices))}")


def _told(values: Tensor) -> str:
    return f"{values.dtype} {tuple(values.shape)}"


def _inverse_softplus(x: Tensor) -> Tensor:
    return x + torch.log(-torch.expm1(-x))


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name}={value} must be above 0")
