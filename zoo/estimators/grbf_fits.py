"""Fitting GRBF estimators, one or many at once: preparation, initialisation, and joint training of equal shapes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from torch import Tensor

from zoo.estimators.grbf_solvers import Fit, Networks, Objective, fit_adam, fit_lbfgs, fit_varpro
from zoo.estimators.threads import few_threads
from zoo.learners.agop import Form, MetricMachine, best_temperature
from zoo.models.grbf import GaussianRBFNetwork
from zoo.support.scaling import block_scale, standardisation, standardised

__all__ = ["fit_all", "fit_many"]
#: Above this many rows, Adam uses mini-batches of `BATCH` rows by default.
FULL_BATCH, BATCH = 4096, 1024
#: Rows per block in prediction.
BLOCK = 8192
#: Parameters that may differ between networks trained together, if the actual number of centres is the same.
_PER_NETWORK = (
    *("reg_precision", "reg_weights", "reg_centers", "random_state", "init", "centers", "n_centers", "class_weight"),
)
#: Metrics compared by `solver="agop"`.
_FORMS: dict[str, tuple[Form, ...]] = {
    "full": ("isotropic", "full", "diag"),
    "diag": ("isotropic", "diag"),
    "isotropic": ("isotropic",),
}


def fit_many(
    estimator: Any,
    X,
    y,
    settings: Sequence[Mapping[str, Any]],
    *,
    sample_weight: np.ndarray | None = None,
    leave_copies: bool = True,
) -> list[Any]:
    """Fit one clone of an estimator per setting, training networks of equal shape together.

    Networks that differ only in regularisation, seed, initialisation or row weights are trained with batched matrix
    products; others in separate groups, and with mini-batches one by one. Results equal separate fits up to rounding.
    For cross-validation, set the weights of the rows outside a fold's training part to 0.

    Args:
        estimator: Provides the parameters that a setting lacks.
        X: Rows (n, D).
        y: Targets (n,).
        settings: Parameters of each fit.
        sample_weight: (fits, n), or (n,) for all; None for ones.
        leave_copies: Of `solver="agop"`: equal rows, and whole weights as copies, are left out one at a time by
            leave-one-out; False: a row leaves with its weight.

    Returns:
        Fitted estimators in the order of the settings; their classes are those of all rows.
    """
    members = [clone(estimator).set_params(**setting) for setting in settings]
    weights = np.ones(len(X)) if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
    if weights.shape not in ((len(X),), (len(members), len(X))):
        raise ValueError(f"sample_weight has shape {weights.shape}; expected ({len(X)},) or ({len(members)}, {len(X)})")
    weights = np.broadcast_to(weights, (len(members), len(X)))
    if members:
        validated = [member._validate(X, y, weight) for member, weight in zip(members, weights, strict=True)]
        rows, targets, *_ = validated[0]
        copies = np.stack([one if leave_copies else one > 0 for *_, one in validated])
        weights = np.stack([weight for *_, weight, _ in validated])
        if any(not one.encoding_.is_plain for one in members):  # inputs by the rows of positive weight
            for i, (member, (own, *_)) in enumerate(zip(members, validated, strict=True)):
                fit_all([member], own, targets, weights[[i]], copies[[i]])
        else:
            fit_all(members, rows, targets, weights, copies)
    return members


@dataclass(frozen=True)
class _Prepared:
    """A fit before its training.

    Attributes:
        estimator: The estimator.
        present: Indices of its rows in the table (n,).
        training: Training weights of the rows, summing to 1 (n,).
        validation: Validation weights for early stopping, summing to 1 (n,); None without it.
        scaling: Mean and scale of the features and of a regression's targets, float64.
        network: The initial network, with a leading dimension of 1.
        generator: Generator of the mini-batches.
    """

    estimator: Any
    present: np.ndarray
    training: Tensor
    validation: Tensor | None
    scaling: dict[str, Tensor]
    network: Networks
    generator: torch.Generator

    @property
    def batch_size(self) -> int | None:
        """Mini-batch size of Adam; None for all rows."""
        if self.estimator.solver != "adam":
            return None
        n = len(self.present)
        size = (BATCH if n > FULL_BATCH else None) if self.estimator.batch_size is None else self.estimator.batch_size
        return None if size is None or size >= n else size

    def shape(self, i: int) -> tuple[Any, ...]:
        """Key of the group of networks to train together; with mini-batches, fit `i` is its own group."""
        own = self.estimator.get_params(deep=False)
        alone = i if self.batch_size else None
        return (
            *(f"{k}={v!r}" for k, v in own.items() if k not in _PER_NETWORK),
            *self.network.centers.shape,
            alone,
        )


def fit_all(members: list[Any], X: np.ndarray, y: np.ndarray, weights: np.ndarray, copies: np.ndarray) -> None:
    """Fit estimators on the same rows with their own weights (B, n), networks of equal shape together.

    Args:
        members: The estimators.
        X: Rows (n, D).
        y: Encoded targets (n,), or (n, outputs).
        weights: Row weights of each estimator (B, n).
        copies: Number of rows that each row stands for (B, n).
    """
    X, y, weights, copies = _merge_copies(X, y, weights, copies)
    groups: dict[Any, list[_Prepared]] = {}
    with torch.device("cpu"):  # not the default device; training sets its own
        for i, (member, weight, count) in enumerate(zip(members, weights, copies, strict=True)):
            if member.solver == "agop":
                _fit_agop(member, X, y, weight, count)
                continue
            prepared = _prepare(member, X, y, weight)
            groups.setdefault(prepared.shape(i), []).append(prepared)
        for group in groups.values():
            _train(group, X, y)


def _fit_agop(member: Any, X: np.ndarray, y: np.ndarray, weight: np.ndarray, copies: np.ndarray) -> None:
    """Fit one estimator with `solver="agop"`."""
    present = np.flatnonzero(weight)
    own = torch.from_numpy(np.ldexp(weight[present], -np.frexp(weight.max())[1]))
    rows, targets = (torch.from_numpy(part[present]).to(member.device) for part in (X, y))
    own = own.to(rows)
    if member._is_regressor:
        Y = targets.reshape(len(targets), -1)
        mean, scale = standardisation(Y, own)
        level = mean * bool(member.fit_intercept)
        Y = (Y - level) / scale
    elif len(member.classes_) == 2:
        Y = targets[:, None].double()
    else:
        Y = torch.nn.functional.one_hot(targets, len(member.classes_)).double()
    machine = MetricMachine(
        _FORMS[member.precision], standardize=bool(member.standardize), intercept=bool(member.fit_intercept)
    )
    with few_threads(len(rows) ** 2 * rows.shape[1]):
        machine.fit(rows, Y, own, torch.from_numpy(copies[present]).to(rows), _blocks(member))
        left_out = None
        if member._is_regressor:
            assert machine.left_out is not None
            left_out = ((Y - machine.left_out) * scale).cpu().numpy(), weight[present]
            machine.rescale(scale, level)
        else:
            _calibrate(machine, targets, own)
        member._set_fitted_machine(machine, left_out)


def _blocks(member: Any) -> Tensor | None:
    blocks = member.encoding_.blocks
    return None if blocks is None else torch.from_numpy(blocks).to(member.device)


def _calibrate(machine: MetricMachine, labels: Tensor, weight: Tensor) -> None:
    """Turn a machine's scores into logits by the temperature that fits the leave-one-out scores best."""
    scores = machine.left_out
    assert scores is not None
    if scores.shape[1] == 1:
        temperature = best_temperature(torch.cat([1 - scores, scores], 1), labels, weight)
        machine.rescale(2 * temperature, -temperature)  # log-odds of class 1
    else:
        machine.rescale(best_temperature(scores, labels, weight), 0.0)


def _prepare(member: Any, X: np.ndarray, y: np.ndarray, weight: np.ndarray) -> _Prepared:
    """Split, scale and initialise a fit, from the rows of non-zero weight only."""
    present = np.flatnonzero(weight)
    generator = torch.Generator().manual_seed(int(check_random_state(member.random_state).randint(2**31 - 1)))
    rows, targets = torch.from_numpy(X[present]), torch.from_numpy(y[present])
    own = np.ldexp(weight[present], -np.frexp(weight.max())[1])  # scaled so that the sum is finite
    training, validation = _hold_out(member, targets, torch.from_numpy(own / own.sum()), generator)
    scaling = _scaling(member, rows, targets, training)
    with few_threads(rows.numel() * member.n_centers):
        network = _start(member, rows, targets, training, scaling, generator)
    return _Prepared(member, present, training, validation, scaling, network, generator)


def _train(group: list[_Prepared], X: np.ndarray, y: np.ndarray) -> None:
    """Train networks of equal shape, and set the fitted attributes of their estimators."""
    lead = group[0].estimator
    device, dtype = torch.device(lead.device), getattr(torch, lead.dtype)
    seen = np.unique(np.concatenate([one.present for one in group]))
    rows, targets = torch.from_numpy(X[seen]), torch.from_numpy(y[seen])

    def spread(one: _Prepared, values: Tensor) -> Tensor:
        return values.new_zeros(len(seen)).index_copy(0, torch.from_numpy(np.searchsorted(seen, one.present)), values)

    Z = torch.stack([standardised(rows, one.scaling["mean"], one.scaling["scale"], dtype) for one in group]).to(device)
    values = torch.stack([_targets(one.estimator, targets, one.scaling, dtype) for one in group]).to(device)
    weight = torch.stack([spread(one, one.training) for one in group]).to(device, dtype)
    regs = {
        name: torch.tensor([float(getattr(one.estimator, name)) for one in group], dtype=dtype, device=device)
        for name in ("reg_precision", "reg_weights", "reg_centers")
    }
    if not lead.learn_centers:
        regs["reg_centers"] = torch.zeros_like(regs["reg_centers"])
    networks = _stacked([one.network for one in group], device)
    loss = "mse" if lead._is_regressor else "cross_entropy"
    objective = Objective(Z, values, weight, loss, penalty=lead.penalty, **regs)
    if lead.shrink_to == "start":
        objective = replace(objective, anchor=networks.factor().detach())
    held_out = None
    if lead.early_stopping:
        parts = [spread(one, one.validation) for one in group if one.validation is not None]
        held_out = replace(objective, weight=torch.stack(parts).to(device, dtype))
    M, D = networks.centers.shape[1:]
    size = len(group) * (group[0].batch_size or len(seen))
    with few_threads(size * D * (M + networks.factor().shape[-1])):
        fit = _solve(group[0], networks, objective, held_out)
        for i, one in enumerate(group):
            own = _stacked([fit.networks.one(i)], torch.device("cpu"))
            raw = torch.from_numpy(X[one.present[: 4 * BLOCK]])
            one.estimator._set_fitted(own, raw, one.scaling, fit.histories[i], fit.steps[i])
    if lead.verbose and not fit.converged:
        warnings.warn(f"Stopped after max_iter={lead.max_iter} steps.", ConvergenceWarning, stacklevel=4)


def _stacked(networks: list[Networks], device: torch.device) -> Networks:
    """Concatenate networks of equal shape into one batch."""
    found: dict[str, Any] = {
        name: torch.cat([one.tensors()[name] for one in networks]).to(device) for name in networks[0].tensors()
    }
    return replace(networks[0], **found)


def _merge_copies(
    X: np.ndarray, y: np.ndarray, weights: np.ndarray, copies: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Distinct (row, target) pairs, sorted, with the sums of their weights and numbers.

    This makes a fit independent of the order of the rows, and weights equivalent to copies.
    """
    D, table = X.shape[1], np.column_stack([X, y])
    distinct, place = np.unique(table, axis=0, return_inverse=True)
    merged = np.zeros((2, len(weights), len(distinct)))
    for total, values in zip(merged, (weights, copies), strict=True):
        for whole, part in zip(total, values, strict=True):
            np.add.at(whole, place.ravel(), part)
    seen = (merged[0] > 0).any(0)
    distinct, (weights, copies) = distinct[seen], merged[:, :, seen]
    targets = distinct[:, D:].reshape(-1, *y.shape[1:]).astype(y.dtype)
    return np.ascontiguousarray(distinct[:, :D]), targets, weights, copies


def _hold_out(member: Any, y: Tensor, weight: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """Training and validation weights (n,); the latter None without early stopping.

    Validation rows are stratified, and every class keeps at least one training row. A class too small for a validation
    row is validated on its training rows, with the total weight of one: else training would stop before it is learned.
    """
    if not member.early_stopping:
        return weight, None
    n = len(weight)
    count = max(1, round(member.validation_fraction * n))
    groups = [torch.arange(n)] if member._is_regressor else [torch.nonzero(y == k).flatten() for k in y.unique()]
    room = np.array([len(places) - 1 for places in groups])
    if room.sum() < (1 if len(groups) > 1 else count):
        raise ValueError(
            f"early_stopping needs at least 2 distinct rows; there are {n}"
            if len(groups) == 1
            else f"early_stopping needs a class of at least 2 distinct rows; there are {n} rows of {n} classes"
        )
    held = torch.zeros(n, dtype=torch.bool)
    stand_in = torch.zeros_like(weight)
    for places, share in zip(groups, _apportioned(count, room), strict=True):
        held[places[torch.randperm(len(places), generator=generator)[:share]]] = True
        if not share:
            stand_in[places] = weight[places] / len(places)
    training, validation = torch.where(held, 0.0, weight), torch.where(held, weight, stand_in)
    return training / training.sum(), validation / validation.sum()


def _apportioned(count: int, room: np.ndarray) -> list[int]:
    """Apportion `count` rows to groups of sizes room + 1, at most `room` each."""
    wanted = np.minimum(count * (room + 1) / (room + 1).sum(), room)
    seats = np.floor(wanted).astype(int)
    while seats.sum() < min(count, room.sum()):
        seats[np.argmax(np.where(seats < room, wanted - seats, -np.inf))] += 1
    return seats.tolist()


def _scaling(member: Any, rows: Tensor, y: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Mean and scale of the features (D,), and of a regression's targets (1,), in float64."""
    D = rows.shape[1]
    found = {"mean": rows.new_zeros(D), "scale": rows.new_ones(D)}
    found |= {"y_mean": rows.new_zeros(1), "y_scale": rows.new_ones(1)}
    kept = weight > 0
    if member._is_warm and member.network_.form == "isotropic":  # an isotropic metric cannot absorb new scales
        found |= {"mean": member.network_.input_mean, "scale": member.network_.input_scale}
    elif member.standardize:
        found["mean"], scale = standardisation(rows[kept], weight[kept])
        found["scale"] = block_scale(scale, _blocks(member))
    if member._is_regressor:
        mean, found["y_scale"] = standardisation(y[kept].unsqueeze(-1), weight[kept])
        if member.fit_intercept:
            found["y_mean"] = mean
    else:  # targets are not scaled
        dtype = getattr(torch, member.dtype)
        found |= {"y_mean": found["y_mean"].to(dtype), "y_scale": found["y_scale"].to(dtype)}
    return found


def _targets(member: Any, y: Tensor, scaling: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Training targets: standardised values (n, 1), zeros and ones (n, 1), or class indices (n,)."""
    if member._is_regressor:
        return standardised(y.unsqueeze(-1), scaling["y_mean"], scaling["y_scale"], dtype)
    return y.to(dtype).unsqueeze(-1) if len(member.classes_) == 2 else y


def _start(
    member: Any, rows: Tensor, y: Tensor, weight: Tensor, scaling: dict[str, Tensor], generator: torch.Generator
) -> Networks:
    """The initial network."""
    dtype, D = getattr(torch, member.dtype), rows.shape[1]
    if member._is_warm:
        return _continued(member.network_, scaling, dtype)
    kept = weight > 0
    Z, weight = standardised(rows[kept], scaling["mean"], scaling["scale"], dtype), weight[kept].to(dtype)
    targets = _targets(member, y[kept], scaling, dtype)
    outputs = 1 if targets.ndim > 1 else len(member.classes_)
    M, how = _start_of_centers(member, Z)
    if how == "kmeans":
        how = _kmeans(Z, weight, M, generator)
    precision: Any = member.precision if isinstance(member.precision, str) else min(member.precision, D)
    with torch.random.fork_rng(devices=[]):  # keep the global generator; `initialize` overwrites random values
        network = GaussianRBFNetwork(D, outputs, M, precision=precision, bias=bool(member.fit_intercept), dtype=dtype)
    network.initialize(Z, centers=how, init=member.init, standardize=False, generator=generator)
    state = {name: value[None] for name, value in network.state_dict().items()}
    bias = state.get("head.bias")
    if bias is not None and not member._is_regressor:
        bias = _priors(targets, weight, outputs)[None]
    return Networks(state["precision_elements"], state["centers"], state["head.weight"], bias, network.form)


def _start_of_centers(member: Any, Z: Tensor) -> tuple[int, Any]:
    """Number of centres, at most that of distinct rows, and their initialisation."""
    if not isinstance(member.centers, str):
        given = np.shape(member.centers)
        if len(given) != 2 or given[1] != Z.shape[1]:
            raise ValueError(f"centers has shape {given}; expected (n_centers, {Z.shape[1]})")
        centers = to_tensor(member.centers)
        if not bool(centers.isfinite().all()):
            raise ValueError("centers contains NaN or infinity")
        return len(centers), centers
    if member.centers == "all":
        return len(Z), "all"
    distinct = len(Z)
    if distinct <= 4 * member.n_centers:  # equal rows may have different targets
        distinct = len(torch.unique(Z, dim=0))
    if distinct < member.n_centers:
        warnings.warn(
            f"n_centers={member.n_centers} is more than the {distinct} distinct rows; {distinct} centres are used.",
            UserWarning,
            stacklevel=6,
        )
    return min(member.n_centers, distinct), member.centers


def _kmeans(rows: Tensor, weight: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Weighted k-means on at most ten thousand random rows."""
    if len(rows) > 10_000:
        kept = torch.randperm(len(rows), generator=generator)[:10_000].to(rows.device)
        rows, weight = rows[kept], weight[kept]
    seed = int(torch.randint(2**31 - 1, (1,), generator=generator))
    weights = (weight / weight.mean()).cpu().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct clusters: duplicates are harmless
        found = KMeans(count, n_init=1, max_iter=50, random_state=seed).fit(rows.cpu().numpy(), sample_weight=weights)
    return torch.from_numpy(found.cluster_centers_).to(rows)


def _priors(targets: Tensor, weight: Tensor, outputs: int) -> Tensor:
    """Log-odds, or centred log-priors, of the classes (K,)."""
    if outputs == 1:
        return torch.logit((weight @ targets).clamp(1e-3, 1 - 1e-3))
    prior = (weight @ torch.nn.functional.one_hot(targets, outputs).to(weight)).clamp_min(1e-3).log()
    return prior - prior.mean()


def _continued(network: GaussianRBFNetwork, scaling: dict[str, Tensor], dtype: torch.dtype) -> Networks:
    """Rewrite the last fit's network in new standardised units: the same function of the original rows."""
    state = {name: value.double() for name, value in network.state_dict().items()}
    ratio = scaling["scale"] / state["input_scale"]
    shift = (state["input_mean"] - scaling["mean"]) / scaling["scale"]
    elements = state["precision_elements"]
    if network.form == "full":
        elements = elements * ratio[torch.tril_indices(network.dim, network.dim)[0]]
    elif network.form == "low_rank":
        elements = elements * ratio.unsqueeze(-1)
    elif network.form == "diag":
        elements = elements + ratio.log()
    y_ratio = state["head.scale"] / scaling["y_scale"]
    bias = state.get("head.bias")
    if bias is not None:
        bias = bias * y_ratio + (state["head.mean"] - scaling["y_mean"]) / scaling["y_scale"]
    centers, weights = state["centers"] / ratio + shift, state["head.weight"] * y_ratio.unsqueeze(-1)
    elements, centers, weights = (part[None].to(dtype) for part in (elements, centers, weights))
    return Networks(elements, centers, weights, None if bias is None else bias[None].to(dtype), network.form)


def _solve(one: _Prepared, networks: Networks, objective: Objective, validation: Objective | None) -> Fit:
    lead = one.estimator
    common = {"learn_centers": bool(lead.learn_centers), "max_iter": lead.max_iter, "tol": lead.tol}
    if lead.solver != "adam":
        return (fit_lbfgs if lead.solver == "lbfgs" else fit_varpro)(networks, objective, **common)
    return fit_adam(
        networks,
        objective,
        learning_rate=lead.learning_rate,
        batch_size=one.batch_size,
        n_iter_no_change=lead.n_iter_no_change,
        validation=validation,
        generator=one.generator,
        **common,
    )


def to_tensor(values: Any) -> Tensor:
    """Copy array-like values to a contiguous float64 tensor, whatever their memory layout."""
    return torch.from_numpy(np.array(values, dtype=np.float64, order="C"))
