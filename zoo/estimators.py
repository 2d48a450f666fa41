"""GRBF for tables, as scikit-learn estimators: one fit predicts, ranks the features and shows the active subspace.

>>> model = GRBFClassifier(random_state=0).fit(X, y)
>>> model.predict_proba(X)
>>> model.feature_importances_, model.eigenvalues_
>>> model.transform(X)[:, :2]                          # coordinates along which the prediction changes most
>>> model.bootstrap(X, y).interval()                   # how sure the ranking is: refits, all at once

Importances and directions are in units of standardised features; correlated features share importance.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
import torch
from sklearn.base import (
    BaseEstimator,
    ClassifierMixin,
    ClassNamePrefixFeaturesOutMixin,
    RegressorMixin,
    TransformerMixin,
    clone,
)
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor

from zoo.fitting import Fit, Networks, Objective, fit_adam, fit_lbfgs, fit_varpro
from zoo.models.grbf import GaussianRBFNetwork, Spectrum, eigen, shares, standardisation
from zoo.suggest import suggestion

__all__ = ["Bootstrap", "GRBFClassifier", "GRBFRegressor", "fit_many"]

#: Above this many rows Adam works with mini-batches of `BATCH` rows unless told otherwise.
FULL_BATCH, BATCH = 4096, 1024
#: Rows of one block in `predict`, `transform` and their kin.
BLOCK = 8192
#: Parameters that may differ between networks that are trained together.
_PER_NETWORK = ("reg_precision", "reg_weights", "reg_centers", "random_state", "init", "centers")


class _GRBF(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """What both estimators share."""

    _parameter_constraints: dict[str, list[Any]] = {  # noqa: RUF012 (scikit-learn's protocol)
        "n_centers": [Interval(Integral, 1, None, closed="left")],
        "centers": [StrOptions({"kmeans", "random", "all"}), "array-like"],
        "learn_centers": ["boolean"],
        "precision": [StrOptions({"full", "diag", "isotropic"}), Interval(Integral, 1, None, closed="left")],
        "reg_precision": [Interval(Real, 0, None, closed="left")],
        "reg_weights": [Interval(Real, 0, None, closed="left")],
        "reg_centers": [Interval(Real, 0, None, closed="left")],
        "penalty": [StrOptions({"squared", "plain"})],
        "shrink_to": [StrOptions({"zero", "start"})],
        "fit_intercept": ["boolean"],
        "init": [StrOptions({"median", "scale", "official"}), Interval(Real, 0, None, closed="neither")],
        "solver": [StrOptions({"adam", "lbfgs", "varpro"})],
        "learning_rate": [Interval(Real, 0, None, closed="neither")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "batch_size": [None, Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left")],
        "early_stopping": ["boolean"],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "standardize": ["boolean"],
        "n_components": [None, Interval(Integral, 1, None, closed="left")],
        "random_state": ["random_state"],
        "device": [str],
        "dtype": [StrOptions({"float32", "float64"})],
        "verbose": ["verbose"],
        "warm_start": ["boolean"],
    }

    def __init__(
        self,
        *,
        n_centers=32,
        centers="kmeans",
        learn_centers=True,
        precision="full",
        reg_precision=3e-2,
        reg_weights=1e-4,
        reg_centers=0.0,
        penalty="squared",
        shrink_to="zero",
        fit_intercept=True,
        init="median",
        solver="adam",
        learning_rate=0.02,
        max_iter=500,
        batch_size=None,
        tol=1e-6,
        n_iter_no_change=50,
        early_stopping=False,
        validation_fraction=0.1,
        standardize=True,
        n_components=None,
        random_state=None,
        device="cpu",
        dtype="float64",
        verbose=0,
        warm_start=False,
    ):
        self.n_centers = n_centers
        self.centers = centers
        self.learn_centers = learn_centers
        self.precision = precision
        self.reg_precision = reg_precision
        self.reg_weights = reg_weights
        self.reg_centers = reg_centers
        self.penalty = penalty
        self.shrink_to = shrink_to
        self.fit_intercept = fit_intercept
        self.init = init
        self.solver = solver
        self.learning_rate = learning_rate
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.tol = tol
        self.n_iter_no_change = n_iter_no_change
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.standardize = standardize
        self.n_components = n_components
        self.random_state = random_state
        self.device = device
        self.dtype = dtype
        self.verbose = verbose
        self.warm_start = warm_start

    # ---- fitting ------------------------------------------------------------------------------------------

    def fit(self, X, y, sample_weight=None):
        """Train the network.

        Args:
            X: Rows (n, D), finite numbers. Constant columns are named in a warning and have no influence.
            y: Targets (n,).
            sample_weight: Weight of each row (n,): a weight of 2 counts as two copies, 0 as absence.

        Returns:
            The estimator.

        Raises:
            ValueError: The data or a parameter cannot be used; the message says why, in scikit-learn's words.
        """
        X, y, sample_weight = self._validate(X, y, sample_weight)
        _fit_group([self], X, y, sample_weight[None])
        return self

    def _validate(self, X, y, sample_weight) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self._validate_params()
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=self._is_regressor, ensure_min_samples=2)
        y = self._encode(y)
        sample_weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        if sample_weight.sum() == 0:
            raise ValueError("Sample weights must contain at least one non-zero number.")
        constant = np.flatnonzero(np.ptp(X[sample_weight > 0], axis=0) == 0)
        if len(constant) and len(X) > 1:
            warnings.warn(f"Features {constant} are constant.", UserWarning, stacklevel=3)
        return X, y, self._row_weights(y, sample_weight)

    @property
    def _is_regressor(self) -> bool:
        return isinstance(self, RegressorMixin)

    def _row_weights(self, y: np.ndarray, sample_weight: np.ndarray) -> np.ndarray:
        return sample_weight

    def _encode(self, y: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def _take(self, networks: Networks, rows: Tensor, scaling: dict[str, Tensor], fit: Fit, losses: np.ndarray) -> None:
        """Set the fitted attributes from the only network of `networks`."""
        M, D = networks.centers.shape[1:]
        precision: Any = self.precision if isinstance(self.precision, str) else min(self.precision, D)
        network = GaussianRBFNetwork(
            D,
            networks.weights.shape[1],
            M,
            precision=precision,
            learn_centers=bool(self.learn_centers),
            bias=bool(self.fit_intercept),
            reg_precision=float(self.reg_precision),
            reg_weights=float(self.reg_weights),
            reg_centers=float(self.reg_centers),
            penalty=self.penalty,
            dtype=networks.centers.dtype,
        )
        state = {"precision_elements": networks.elements[0], "centers": networks.centers[0]}
        K = networks.weights.shape[1]
        state |= {"head.weight": networks.weights[0], "head.scale": scaling["y_scale"].expand(K)}
        state["head.mean"] = scaling["y_mean"].expand(K)
        if networks.bias is not None:
            state["head.bias"] = networks.bias[0]
        state |= {"input_mean": scaling["mean"], "input_scale": scaling["scale"]}
        network.load_state_dict(state)
        self.network_ = network.eval().requires_grad_(False)
        values, components = network.spectrum()
        self.centers_ = network.centers.numpy().copy()
        head: Any = network.head
        self.weights_ = (head.weight * head.scale.unsqueeze(-1)).numpy().T.copy()
        self.intercept_ = (head.mean if head.bias is None else head.bias * head.scale + head.mean).numpy().copy()
        self.factor_ = network.factor().numpy().copy()
        self.precision_ = network.precision().numpy().copy()
        self.eigenvalues_ = values.numpy().astype(np.float64)
        self.n_components_ = min(self.n_components or D, D)
        self.components_ = components[: self.n_components_].numpy().astype(np.float64)
        total = self.eigenvalues_.sum()
        self.explained_ratio_ = self.eigenvalues_ / total if total > 0 else np.full(D, 1 / D)
        self.gradient_outer_product_ = network.gradient_outer_product(rows).numpy().astype(np.float64)
        self.feature_importances_ = network.feature_importance("official").numpy().astype(np.float64)
        self.loss_curve_ = losses.tolist()
        self.n_iter_ = fit.n_iter
        self._n_features_out = self.n_components_

    # ---- using a fitted network ---------------------------------------------------------------------------

    def _rows(self, X) -> np.ndarray:
        check_is_fitted(self)
        return validate_data(self, X, dtype=np.float64, reset=False)

    def _blocks(self, X: np.ndarray) -> Iterator[Tensor]:
        """Rows as tensors of the network's type, a block at a time."""
        for start in range(0, len(X), BLOCK):
            yield torch.tensor(X[start : start + BLOCK], dtype=self.network_.centers.dtype)

    def _outputs(self, X) -> np.ndarray:
        """Raw outputs (n, K), float64; memory does not grow with n."""
        X = self._rows(X)
        with torch.inference_mode():
            return torch.cat([self.network_(block) for block in self._blocks(X)]).numpy().astype(np.float64)

    def transform(self, X):
        """Coordinates (n, n_components) of standardised rows along the eigenvectors of the precision matrix."""
        Z = (self._rows(X) - self._mean) / self._scale
        return Z @ self.components_.T

    def inverse_transform(self, Z):
        """Rows (n, D), in the features' own units, that lie in the active subspace at the coordinates Z."""
        check_is_fitted(self)
        Z = np.asarray(Z, dtype=np.float64)
        if Z.ndim != 2 or Z.shape[1] != self.n_components_:
            raise ValueError(f"Z has shape {Z.shape}; expected (n, {self.n_components_})")
        return (Z @ self.components_) * self._scale + self._mean

    @property
    def _mean(self) -> np.ndarray:
        return self.network_.input_mean.numpy().astype(np.float64)

    @property
    def _scale(self) -> np.ndarray:
        return self.network_.input_scale.numpy().astype(np.float64)

    def to_module(self) -> GaussianRBFNetwork:
        """A copy of the trained network as a torch module that takes raw rows and returns logits or values."""
        import copy

        check_is_fitted(self)
        return copy.deepcopy(self.network_)

    # ---- explaining it ------------------------------------------------------------------------------------

    def feature_importance(
        self,
        kind: Literal["official", "trace", "gradient"] = "official",
        *,
        X=None,
        groups: Sequence[Any] | Mapping[Any, Any] | None = None,
    ) -> np.ndarray | dict[Any, float]:
        """Share of each feature, adding up to 1.

        Args:
            kind: `"official"`, the paper's sum over eigenpairs gamma_k |v_jk|; `"trace"`, diag(P) / tr P;
                `"gradient"`, the mean squared derivative of the output in each standardised feature.
            X: Rows over which `"gradient"` averages; None for those of the training.
            groups: Group of each column in order (the variable that a one-hot column came from), or a mapping from a
                feature's name to its group. The shares of a group are added.

        Returns:
            (D,), or a dictionary from group to share in order of appearance.
        """
        check_is_fitted(self)
        if kind == "gradient":
            G = self.gradient_outer_product_
            if X is not None:
                rows = torch.tensor(self._rows(X), dtype=self.network_.centers.dtype)
                G = self.network_.gradient_outer_product(rows).numpy()
            raw = torch.from_numpy(np.diag(G).copy())
            importance = shares(raw, "the output does not change with any feature").numpy().astype(np.float64)
        else:
            importance = self.network_.feature_importance(kind).numpy().astype(np.float64)
        return importance if groups is None else self._grouped(importance, groups)

    def _grouped(self, importance: np.ndarray, groups: Sequence[Any] | Mapping[Any, Any]) -> dict[Any, float]:
        if isinstance(groups, Mapping):
            names = getattr(self, "feature_names_in_", [f"x{i}" for i in range(len(importance))])
            unknown = [name for name in groups if name not in names]
            if unknown:
                raise ValueError(
                    f"groups names {unknown[0]!r}, which is no feature{suggestion(str(unknown[0]), map(str, names))}"
                )
            groups = [groups.get(name, name) for name in names]
        if len(groups) != len(importance):
            raise ValueError(f"groups has {len(groups)} entries for {len(importance)} features; give one each")
        total: dict[Any, float] = {}
        for group, share in zip(groups, importance, strict=True):
            total[group] = total.get(group, 0.0) + float(share)
        return total

    def active_subspace(self, kind: Literal["precision", "gradient"] = "precision") -> Spectrum:
        """Directions in standardised features, most important first: eigenvalues (D,) and unit vectors in rows (D, D).

        `"precision"` are the eigenpairs of P; `"gradient"` those of the average gradient outer product on the training
        rows, which is what the literature calls the active subspace. The latter lies in the range of P.
        """
        check_is_fitted(self)
        if kind not in ("precision", "gradient"):
            raise ValueError(f"kind={kind!r} is not one of 'precision', 'gradient'")
        matrix = self.precision_ if kind == "precision" else self.gradient_outer_product_
        return eigen(torch.from_numpy(matrix.astype(np.float64)))

    def bootstrap(self, X, y, *, n_samples: int = 32, sample_weight=None, random_state=None) -> Bootstrap:
        """Refit on resampled rows, all networks at once, to see how stable the explanation is.

        Args:
            X: The training rows.
            y: Their targets.
            n_samples: Number of refits.
            sample_weight: Weights of the rows.
            random_state: Seed of the resampling; None for the estimator's own.

        Returns:
            Importances of every kind and eigenvalues of every refit.
        """
        seed = self.random_state if random_state is None else random_state
        draw = check_random_state(seed)
        n = len(X)
        counts = draw.multinomial(n, np.full(n, 1 / n), size=n_samples).astype(np.float64)
        if sample_weight is not None:
            counts = counts * np.asarray(sample_weight)
        seeds = draw.randint(2**31 - 1, size=n_samples).tolist()
        fits = fit_many(self, X, y, [{"random_state": s} for s in seeds], sample_weight=counts)
        kinds = ("official", "trace", "gradient")
        importances = {kind: np.stack([f.feature_importance(kind) for f in fits]) for kind in kinds}
        names = getattr(fits[0], "feature_names_in_", np.array([f"x{i}" for i in range(fits[0].n_features_in_)]))
        return Bootstrap(importances, np.stack([f.eigenvalues_ for f in fits]), list(map(str, names)))


@dataclass(frozen=True)
class Bootstrap:
    """Explanations of networks refitted on resampled rows.

    Attributes:
        importances: By kind, (refits, D).
        eigenvalues: (refits, D), decreasing in each row.
        feature_names: Names of the D features.
    """

    importances: dict[str, np.ndarray]
    eigenvalues: np.ndarray
    feature_names: list[str]

    def interval(self, kind: str = "official", level: float = 0.9) -> np.ndarray:
        """Lower end, median and upper end (3, D) of an importance, or of the `"eigenvalues"`."""
        if not 0 < level < 1:
            raise ValueError(f"level={level} must lie between 0 and 1")
        values = self.eigenvalues if kind == "eigenvalues" else self.importances[kind]
        return np.quantile(values, [(1 - level) / 2, 0.5, (1 + level) / 2], axis=0)

    def rank_frequency(self, k: int, kind: str = "official") -> np.ndarray:
        """Share of refits (D,) in which each feature is among the k most important."""
        ranks = (-self.importances[kind]).argsort(1).argsort(1)
        return (ranks < k).mean(0)


class GRBFRegressor(RegressorMixin, _GRBF):
    """Regression by Gaussian units with one learnable precision matrix (arXiv 2307.05639).

    Targets are standardised while training and given back in their own units. One target per row.

    Args:
        n_centers: Gaussian units; reduced, with a warning, where there are fewer distinct rows.
        centers: Start of the centres: `"kmeans"`, `"random"` rows, `"all"` rows, or an array (M, D) in standardised
            units.
        learn_centers: Train the centres; worth having in every grid.
        precision: `"full"`, `"diag"`, `"isotropic"`, or a rank, advisable above a few hundred features.
        reg_precision: Penalty on the precision factor: the decisive parameter. Noisy data wants 1e-2 to 1e-1.
        reg_weights: Penalty on the output weights.
        reg_centers: Penalty on trained centres.
        penalty: `"squared"` norms, or the authors' `"plain"` ones.
        shrink_to: What the penalty on the factor pulls it to: `"zero"`, the paper's, which switches directions off; or
            the `"start"`, an isotropic metric, which makes a Gaussian-kernel machine that bends only where the data
            insists: often the more accurate on small tables with many relevant features, with many centres.
        fit_intercept: Give the readout an intercept.
        init: `"median"` distance; the narrower width of `gamma="scale"`, for many centres; a positive width of the
            units; or the authors' `"official"` draw, dead above 13 features.
        solver: `"adam"`; `"lbfgs"` on everything; or `"varpro"`, L-BFGS on the metric with output weights in closed
            form, by far the quickest for regression, with a regularisation of its own to tune.
        learning_rate: First rate of Adam; it decays to 0 as a cosine.
        max_iter: Most steps.
        batch_size: Rows of a step of Adam; None for all, or 1024 where there are more than 4096.
        tol: Least relative improvement of the objective...
        n_iter_no_change: ... in so many steps of Adam, or training stops.
        early_stopping: Hold out `validation_fraction` of the rows, stop by their loss and keep the best network.
        validation_fraction: Share of the rows held out.
        standardize: Standardise the features inside the model.
        n_components: Columns of `transform`; None for all.
        random_state: Seed of every draw.
        device: Where to train; a fitted network lives on the CPU.
        dtype: `"float64"` or `"float32"`.
        verbose: With 1, say when training stopped at `max_iter`.
        warm_start: Start from the network of the last fit.

    Attributes:
        network_: The trained `GaussianRBFNetwork`.
        centers_: (M, D), standardised.
        weights_: (M, 1).
        intercept_: (1,).
        precision_: P (D, D); factor_: L with P = L L^T.
        eigenvalues_: Of P, decreasing (D,); `explained_ratio_` are their shares.
        components_: Eigenvectors in rows (n_components, D), largest entry positive.
        gradient_outer_product_: Average of grad f grad f^T over the training rows (D, D).
        feature_importances_: The paper's importance (D,), adding up to 1; see `feature_importance` for others.
        loss_curve_: Objective before every step.
        n_iter_: Steps taken.
        n_features_in_: D; feature_names_in_: their names, if the rows had any.
    """

    def _encode(self, y: np.ndarray) -> np.ndarray:
        return np.asarray(y, dtype=np.float64)

    def predict(self, X):
        """Values (n,)."""
        return self._outputs(X)[:, 0]


class GRBFClassifier(ClassifierMixin, _GRBF):
    """Classification by Gaussian units with one learnable precision matrix (arXiv 2307.05639).

    Two classes share one logit. Arguments and attributes are those of :class:`GRBFRegressor`, and:

    Args:
        class_weight: None, `"balanced"`, or a weight for each class.

    Attributes:
        classes_: The classes, sorted.
        weights_: (M, 1) for two classes, else (M, K).
    """

    _parameter_constraints: dict[str, list[Any]] = {  # noqa: RUF012
        **_GRBF._parameter_constraints,
        "class_weight": [StrOptions({"balanced"}), dict, None],
    }

    def __init__(
        self,
        *,
        n_centers=32,
        centers="kmeans",
        learn_centers=True,
        precision="full",
        reg_precision=3e-2,
        reg_weights=1e-4,
        reg_centers=0.0,
        penalty="squared",
        shrink_to="zero",
        fit_intercept=True,
        init="median",
        solver="adam",
        learning_rate=0.02,
        max_iter=500,
        batch_size=None,
        tol=1e-6,
        n_iter_no_change=50,
        early_stopping=False,
        validation_fraction=0.1,
        standardize=True,
        n_components=None,
        class_weight=None,
        random_state=None,
        device="cpu",
        dtype="float64",
        verbose=0,
        warm_start=False,
    ):
        super().__init__(
            n_centers=n_centers,
            centers=centers,
            learn_centers=learn_centers,
            precision=precision,
            reg_precision=reg_precision,
            reg_weights=reg_weights,
            reg_centers=reg_centers,
            penalty=penalty,
            shrink_to=shrink_to,
            fit_intercept=fit_intercept,
            init=init,
            solver=solver,
            learning_rate=learning_rate,
            max_iter=max_iter,
            batch_size=batch_size,
            tol=tol,
            n_iter_no_change=n_iter_no_change,
            early_stopping=early_stopping,
            validation_fraction=validation_fraction,
            standardize=standardize,
            n_components=n_components,
            random_state=random_state,
            device=device,
            dtype=dtype,
            verbose=verbose,
            warm_start=warm_start,
        )
        self.class_weight = class_weight

    def _encode(self, y: np.ndarray) -> np.ndarray:
        check_classification_targets(y)
        self.classes_, encoded = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                "This solver needs samples of at least 2 classes in the data, but the data contains only one class: "
                f"{self.classes_.tolist()[0]!r}"
            )
        return encoded

    def _row_weights(self, y: np.ndarray, sample_weight: np.ndarray) -> np.ndarray:
        if self.class_weight is None:
            return sample_weight
        by_class = self.class_weight
        if isinstance(by_class, Mapping):
            index = {label: i for i, label in enumerate(self.classes_.tolist())}
            by_class = {index[k]: v for k, v in by_class.items() if k in index}
            return sample_weight * compute_sample_weight(by_class, y)
        mass = np.bincount(y, weights=sample_weight)
        return sample_weight * (mass.sum() / (len(mass) * np.maximum(mass, np.finfo(float).tiny)))[y]

    def decision_function(self, X):
        """Logits: (n,) of the second class for two classes, else (n, K)."""
        outputs = self._outputs(X)
        return outputs[:, 0] if outputs.shape[1] == 1 else outputs

    def predict_proba(self, X):
        """Class probabilities (n, K)."""
        return np.exp(self.predict_log_proba(X))

    def predict_log_proba(self, X):
        """Logarithms of the class probabilities (n, K)."""
        outputs = self._outputs(X)
        if outputs.shape[1] == 1:
            outputs = np.hstack([np.zeros_like(outputs), outputs])
        return outputs - np.logaddexp.reduce(outputs, axis=1, keepdims=True)

    def predict(self, X):
        """Classes (n,)."""
        outputs = self._outputs(X)
        chosen = (outputs[:, 0] > 0).astype(int) if outputs.shape[1] == 1 else outputs.argmax(1)
        return self.classes_[chosen]


# ---- many fits at once -------------------------------------------------------------------------------------


def fit_many(
    estimator: _GRBF, X, y, settings: Sequence[Mapping[str, Any]], *, sample_weight: np.ndarray | None = None
) -> list[Any]:
    """Fit one clone of an estimator per setting, training those of one shape together.

    Networks that differ only in regularisation, seed, start or row weights share every matrix product; the settings
    may also differ in anything else, which makes another group. A fold is a row of weights that is 0 where the network
    must not see a row.

    Args:
        estimator: Gives the parameters that a setting does not name.
        X: Rows (n, D).
        y: Targets (n,).
        settings: Parameters of each fit.
        sample_weight: (fits, n), or (n,) for all; None for ones.

    Returns:
        Fitted estimators in the order of the settings. Classes are those of all rows.
    """
    members = [clone(estimator).set_params(**setting) for setting in settings]
    weights = np.ones((len(members), len(X))) if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
    weights = np.broadcast_to(weights, (len(members), len(X)))
    groups: dict[Any, list[int]] = {}
    for i, member in enumerate(members):
        shape = {k: v for k, v in member.get_params().items() if k not in _PER_NETWORK}
        groups.setdefault(tuple(map(str, shape.items())), []).append(i)
    for places in groups.values():
        validated = [members[i]._validate(X, y, weights[i]) for i in places]
        rows, targets = validated[0][:2]
        _fit_group([members[i] for i in places], rows, targets, np.stack([w for _, _, w in validated]))
    return members


def _fit_group(members: list[Any], X: np.ndarray, y: np.ndarray, weights: np.ndarray) -> None:
    """Train the networks of estimators that have the same shape, on the same rows with their own weights (B, n)."""
    lead = members[0]
    X, y, weights = _merge_copies(X, y, weights)
    device, dtype = torch.device(lead.device), getattr(torch, lead.dtype)
    rows = torch.from_numpy(X).to(device, dtype)
    weight = torch.from_numpy(weights / weights.sum(1, keepdims=True)).to(device, dtype)
    generators = [
        torch.Generator().manual_seed(int(check_random_state(m.random_state).randint(2**31 - 1))) for m in members
    ]

    training, validation = _hold_out(lead, weight, generators)
    scaling = _scaling(lead, rows, y, training)
    Z = (rows - scaling["mean"].unsqueeze(-2)) / scaling["scale"].unsqueeze(-2)  # (B, n, D)
    if lead._is_regressor:
        targets = (torch.from_numpy(y).to(device, dtype) - scaling["y_mean"]) / scaling["y_scale"]
        targets, outputs = targets.unsqueeze(-1), 1
    else:
        outputs = len(lead.classes_) if len(lead.classes_) > 2 else 1
        targets = torch.from_numpy(y).to(device)
        targets = targets.to(dtype).unsqueeze(-1) if outputs == 1 else targets
    networks = _start(members, Z, targets, training, generators, outputs)
    regs = {
        name: torch.tensor([float(getattr(m, name)) for m in members], dtype=dtype, device=device)
        for name in ("reg_precision", "reg_weights", "reg_centers")
    }
    if not lead.learn_centers:
        regs["reg_centers"] = torch.zeros_like(regs["reg_centers"])
    loss = "mse" if lead._is_regressor else "cross_entropy"
    objective = Objective(Z, targets, training, loss, penalty=lead.penalty, **regs)
    if lead.shrink_to == "start":
        objective = replace(objective, anchor=networks.factor().detach())
    held_out = None if validation is None else replace(objective, weight=validation)
    fit = _solve(lead, networks, objective, held_out, generators[0])

    if lead.verbose and not fit.converged:
        warnings.warn(f"Stopped after max_iter={lead.max_iter} steps.", ConvergenceWarning, stacklevel=4)
    fitted, rows = fit.networks, rows.cpu()
    for i, member in enumerate(members):
        own = {name: value[i].cpu() for name, value in scaling.items()}
        one = Networks(**{k: v.cpu() for k, v in fitted.one(i).tensors().items()}, **_missing(fitted), form=fitted.form)
        seen = rows[(weight[i] > 0).cpu()]
        member._take(one, seen[: 4 * BLOCK], own, fit, fit.history[:, i].cpu().numpy().astype(np.float64))


def _missing(networks: Networks) -> dict[str, Any]:
    return {} if networks.bias is not None else {"bias": None}


def _merge_copies(X: np.ndarray, y: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct (row, target) pairs in a fixed order with their added weights.

    A fit is then a function of the weighted rows alone: their order, and copies in place of weights, change nothing.
    """
    table = np.column_stack([X, y])
    distinct, place = np.unique(table, axis=0, return_inverse=True)
    merged = np.zeros((len(weights), len(distinct)))
    for total, weight in zip(merged, weights, strict=True):
        np.add.at(total, place.ravel(), weight)
    seen = (merged > 0).any(0)
    distinct, merged = distinct[seen], merged[:, seen]
    return np.ascontiguousarray(distinct[:, :-1]), distinct[:, -1].astype(y.dtype), merged


def _hold_out(lead: Any, weight: Tensor, generators: list[torch.Generator]) -> tuple[Tensor, Tensor | None]:
    """Weights of training and of validation (B, n); the latter None without early stopping."""
    if not lead.early_stopping:
        return weight, None
    held = torch.zeros_like(weight, dtype=torch.bool)
    for i, generator in enumerate(generators):
        present = torch.nonzero(weight[i] > 0).flatten().cpu()
        count = max(1, round(lead.validation_fraction * len(present)))
        if count >= len(present):
            raise ValueError(f"early_stopping needs at least 2 distinct rows; there are {len(present)}")
        held[i, present[torch.randperm(len(present), generator=generator)[:count]]] = True
    parts = [torch.where(mask, weight, 0.0) for mask in (~held, held)]
    training, validation = (part / part.sum(1, keepdim=True) for part in parts)
    return training, validation


def _scaling(lead: Any, rows: Tensor, y: np.ndarray, weight: Tensor) -> dict[str, Tensor]:
    """Mean and scale of the features (B, D), and of a regression's targets (B, 1)."""
    B, D = len(weight), rows.shape[1]
    found = {"mean": rows.new_zeros(B, D), "scale": rows.new_ones(B, D)}
    if lead.standardize:
        found["mean"], found["scale"] = standardisation(rows, weight)
    found |= {"y_mean": rows.new_zeros(B, 1), "y_scale": rows.new_ones(B, 1)}
    if lead._is_regressor:
        mean, found["y_scale"] = standardisation(torch.from_numpy(y).to(rows).unsqueeze(-1), weight)
        if lead.fit_intercept:
            found["y_mean"] = mean
    return found


def _start(
    members: list[Any], Z: Tensor, targets: Tensor, weight: Tensor, generators: list[torch.Generator], outputs: int
) -> Networks:
    """The networks before training."""
    lead, (B, _, D) = members[0], Z.shape
    again = _continue(lead, D, outputs, Z.device) if lead.warm_start and B == 1 else None
    if again is not None:
        return again
    M = _center_count(members, Z, weight)
    precision: Any = lead.precision if isinstance(lead.precision, str) else min(lead.precision, D)
    states: list[dict[str, Tensor]] = []
    for i, member in enumerate(members):
        present = weight[i] > 0
        network = GaussianRBFNetwork(
            D, outputs, M, precision=precision, bias=bool(lead.fit_intercept), device=Z.device, dtype=Z.dtype
        )
        how = member.centers
        if not isinstance(how, str):
            how = torch.as_tensor(np.asarray(how, dtype=np.float64)).to(Z)
        elif how == "all":
            how = Z[i][present]
        elif how == "kmeans":
            how = _kmeans(Z[i][present], weight[i][present], M, generators[i])
        network.initialize(Z[i][present], centers=how, init=member.init, standardize=False, generator=generators[i])
        states.append(network.state_dict())
    stacked = {name: torch.stack([s[name] for s in states]) for name in states[0]}
    bias = stacked.get("head.bias")
    if bias is not None and not lead._is_regressor:
        bias = _priors(targets, weight, outputs)
    return Networks(stacked["precision_elements"], stacked["centers"], stacked["head.weight"], bias, network.form)


def _center_count(members: list[Any], Z: Tensor, weight: Tensor) -> int:
    """Centres of every network of the group; no more than distinct rows."""
    lead = members[0]
    if not isinstance(lead.centers, str):
        given = np.shape(lead.centers)
        if len(given) != 2 or given[1] != Z.shape[2]:
            raise ValueError(f"centers has shape {given}; expected (n_centers, {Z.shape[2]})")
        return given[0]
    present = int((weight > 0).sum(1).min())
    if lead.centers == "all":
        if present != int((weight > 0).sum(1).max()):
            raise ValueError('centers="all" cannot be trained together on different rows; fit one at a time')
        return present
    distinct = present
    if present <= 4 * lead.n_centers:  # rows may coincide where targets differ
        distinct = min(len(torch.unique(z[w > 0], dim=0)) for z, w in zip(Z, weight, strict=True))
    if distinct < lead.n_centers:
        warnings.warn(
            f"n_centers={lead.n_centers} is more than the {distinct} distinct rows; {distinct} centres are used.",
            UserWarning,
            stacklevel=5,
        )
    return min(lead.n_centers, distinct)


def _kmeans(rows: Tensor, weight: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Weighted k-means of at most ten thousand of the rows."""
    from sklearn.cluster import KMeans

    if len(rows) > 10_000:
        kept = torch.randperm(len(rows), generator=generator)[:10_000].to(rows.device)
        rows, weight = rows[kept], weight[kept]
    seed = int(torch.randint(2**31 - 1, (1,), generator=generator))
    weights = (weight / weight.mean()).cpu().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct clusters than asked: copies are harmless
        found = KMeans(count, n_init=1, max_iter=50, random_state=seed).fit(rows.cpu().numpy(), sample_weight=weights)
    return torch.from_numpy(found.cluster_centers_).to(rows)


def _priors(targets: Tensor, weight: Tensor, outputs: int) -> Tensor:
    """Log-odds or centred log priors of the classes (B, K)."""
    if outputs == 1:
        return torch.logit((weight @ targets[..., 0]).clamp(1e-3, 1 - 1e-3)).unsqueeze(-1)
    prior = (weight @ torch.nn.functional.one_hot(targets, outputs).to(weight)).clamp_min(1e-3).log()
    return prior - prior.mean(-1, keepdim=True)


def _continue(lead: Any, D: int, outputs: int, device: torch.device) -> Networks | None:
    """The last fit's network, if it has the shape that this fit needs."""
    network = getattr(lead, "network_", None)
    if (
        network is None
        or network.dim != D
        or network.num_classes != outputs
        or network.bias != bool(lead.fit_intercept)
    ):
        return None
    state = {k: v[None].to(device).clone() for k, v in network.state_dict().items()}
    return Networks(
        state["precision_elements"], state["centers"], state["head.weight"], state.get("head.bias"), network.form
    )


def _solve(
    lead: Any, networks: Networks, objective: Objective, validation: Objective | None, generator: torch.Generator
) -> Fit:
    common = {"learn_centers": bool(lead.learn_centers), "max_iter": lead.max_iter, "tol": lead.tol}
    if lead.solver == "adam":
        n = objective.weight.shape[1]
        size = (BATCH if n > FULL_BATCH else None) if lead.batch_size is None else lead.batch_size
        return fit_adam(
            networks,
            objective,
            learning_rate=lead.learning_rate,
            batch_size=size,
            n_iter_no_change=lead.n_iter_no_change,
            validation=validation,
            generator=generator,
            **common,
        )
    if validation is not None:
        raise ValueError(f'early_stopping=True works with solver="adam"; it is {lead.solver!r}')
    return (fit_lbfgs if lead.solver == "lbfgs" else fit_varpro)(networks, objective, **common)
