"""GRBF as scikit-learn estimators: prediction, feature importances and the active subspace from one fit.

>>> model = GRBFClassifier(random_state=0).fit(X, y)
>>> model.predict_proba(X)
>>> model.feature_importances_, model.eigenvalues_
>>> model.transform(X)[:, :2]                          # coordinates along which the prediction changes most
>>> model.bootstrap(X, y).interval()                   # stability of the importances over refits

Importances and directions are in units of standardised features; correlated features share importance.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
)
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, InvalidParameterError, StrOptions
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, check_X_y, validate_data
from torch import Tensor

from zoo.estimators.encoding import (
    Columns,
    Encoding,
    categorical_mask,
    check_encoding,
    fit_encoding,
    read_columns,
    without_times,
)
from zoo.estimators.grbf_fits import BLOCK, fit_all, fit_many, to_tensor
from zoo.estimators.grbf_solvers import Networks
from zoo.estimators.named import check_columns, register_estimator
from zoo.estimators.pipelines import OfClasses, OfValues
from zoo.estimators.threads import few_threads
from zoo.learners.agop import MetricMachine
from zoo.models.grbf import (
    GaussianRBFNetwork,
    Spectrum,
    eigen,
    eigen_of_root,
    gradient_shares,
    importance_from_precision,
    shares,
)
from zoo.support.scaling import power_of_two, standardisation
from zoo.support.suggest import suggestion
from zoo.support.tensors import without_grad

__all__ = ["Bootstrap", "GRBFClassifier", "GRBFRegressor"]
_LARGEST_TARGET = 1e304  # sums of targets are numbers
#: Parameters of the initialisation, which a warm start cannot change.
_START = ("precision", "n_centers", "centers", "init", "fit_intercept", "standardize", "categorical_features")
#: Parameters of networks that are trained in steps, which a closed form does not use.
_OF_STEPS = (
    *("n_centers", "centers", "learn_centers", "reg_precision", "reg_weights", "reg_centers", "penalty", "shrink_to"),
    *("init", "learning_rate", "max_iter", "batch_size", "tol", "n_iter_no_change", "validation_fraction", "dtype"),
)


def _check_device(estimator: Any) -> None:
    """Refuse a device that torch does not know or this machine lacks, as scikit-learn refuses a parameter."""
    try:
        found = torch.empty(0, device=estimator.device)
        usable = found.device.type != "meta"
    except (RuntimeError, AssertionError, NotImplementedError):  # an assertion says that torch has no CUDA
        usable = False
    if not usable:
        raise InvalidParameterError(
            f"The 'device' parameter of {type(estimator).__name__} must be a device of torch that this machine has, "
            f"such as 'cpu' or 'cuda'. Got {estimator.device!r} instead."
        )


class _GRBF(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Base of both estimators."""

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
        "solver": [StrOptions({"adam", "lbfgs", "varpro", "agop"})],
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
        "categorical_features": ["array-like", StrOptions({"from_dtype"}), None],
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
        solver="agop",
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
        categorical_features="from_dtype",
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
        self.categorical_features = categorical_features

    # ---- fitting ------------------------------------------------------------------------------------------

    def fit(self, X, y, sample_weight=None):
        """Train the network.

        Args:
            X: Rows (n, D): numbers, NaN where one is missing, and categories, see `categorical_features`. Constant
                columns have no influence; a warning names them.
            y: Targets (n,); of a regression with `solver="agop"`, also (n, outputs).
            sample_weight: Weight of each row (n,). If all are whole numbers they are counts: 2 is equivalent to two
                copies, 0 to absence, and leave-one-out (`solver="agop"`) leaves out one copy only. Otherwise each row
                is one row, the weights are its share of the loss, and leave-one-out leaves out whole rows: divide whole
                weights that are no counts by their mean, or multiply them by a number such as 0.123.

        Returns:
            The estimator.

        Raises:
            ValueError: The data or a parameter is invalid.
        """
        before = self.__dict__.copy()
        try:
            X, y, sample_weight, copies = self._validate(without_grad(X), without_grad(y), sample_weight)
            fit_all([self], X, y, sample_weight[None], copies[None])
        except BaseException:  # keep the previous fit
            self.__dict__.clear()
            self.__dict__.update(before)
            raise
        return self

    def _validate(self, X, y, sample_weight) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Rows, encoded targets, row weights, and the number of copies that each row stands for."""
        self._validate_params()
        _check_device(self)
        again = self._is_warm
        if again:
            self._check_start()
        columns, y = self._read(X, y, again)
        y = self._encode(y)
        if self.early_stopping and self.solver != "adam":
            raise ValueError(f'early_stopping=True works with solver="adam"; it is {self.solver!r}')
        if self.solver == "agop":
            self._check_closed_form()
        sample_weight = _check_sample_weight(sample_weight, columns.numbers, dtype=np.float64, ensure_non_negative=True)
        if not sample_weight.any():
            raise ValueError("Sample weights must contain at least one non-zero number.")
        weight = self._row_weights(y, sample_weight)
        if not again or getattr(self, "encoding_", None) is None:
            self.encoding_ = fit_encoding(columns, weight)
        X = self.encoding_.inputs(columns)
        free = np.setdiff1d(np.arange(len(X[0])), _constant(X[sample_weight > 0]))
        fixed = np.setdiff1d(np.arange(self.n_features_in_), self.encoding_.owners[free])
        if len(fixed) and len(X) > 1:
            warnings.warn(f"Features {fixed} are constant.", UserWarning, stacklevel=3)
        whole = (sample_weight == np.round(sample_weight)).all() and sample_weight.max() < 2**31
        copies = sample_weight if whole else (sample_weight > 0).astype(np.float64)
        return X, y, weight, copies

    def _read(self, X, y, again: bool) -> tuple[Columns, np.ndarray]:
        """The columns of training rows, and their targets, checked."""
        shape = np.asarray(y).shape  # numpy's own functions refuse what is only convertible
        several = self._is_regressor and self.solver == "agop" and len(shape) == 2 and shape[1] > 1
        mask = self._categories() if again else categorical_mask(X, self.categorical_features)
        X = without_times(X, mask)
        checks: dict[str, Any] = {"dtype": np.float64, "ensure_all_finite": "allow-nan"}
        checks |= {"y_numeric": self._is_regressor, "multi_output": several, "ensure_min_samples": 1 + (not again)}
        if mask is None:
            X, y = validate_data(self, X, y, reset=not again, **checks)
            return Columns(X, {}), y
        validate_data(self, X, reset=not again, skip_check_array=True)
        columns = read_columns(X, mask, input_name="X", estimator=self)
        _, y = check_X_y(np.where(mask, 0.0, columns.numbers), y, estimator=self, **checks)
        return columns, y

    def _categories(self) -> np.ndarray | None:
        """Which columns of the last fit hold categories; None if none do."""
        encoding: Encoding | None = getattr(self, "encoding_", None)
        return None if encoding is None or not encoding.levels else encoding.categorical

    def _check_closed_form(self) -> None:
        """Refuse parameters that `solver="agop"` does not support, and warn of those without effect."""
        if self.warm_start:
            raise ValueError('warm_start=True goes on with steps, and solver="agop" takes none: set solver="adam"')
        if not isinstance(self.precision, str):
            raise ValueError(
                f'precision={self.precision!r} is a rank, which solver="agop" does not have: "full", "diag" and '
                '"isotropic" are allowed, or set solver="adam"'
            )
        defaults = inspect.signature(_GRBF.__init__).parameters
        unused = [name for name in _OF_STEPS if not _same(getattr(self, name), defaults[name].default)]
        if unused:
            warnings.warn(
                f"{', '.join(unused)} only matter{'s' * (len(unused) == 1)} to networks trained in steps and "
                f'{"has" if len(unused) == 1 else "have"} no effect with solver="agop": set solver="adam"',
                UserWarning,
                stacklevel=4,
            )

    @property
    def _is_warm(self) -> bool:
        return bool(self.warm_start) and hasattr(self, "network_")

    def _check_start(self) -> None:
        """Refuse parameters that differ from the last fit's and need a new network."""
        for name, last in self._started_with.items():
            now = getattr(self, name)
            if np.shape(now) != np.shape(last) or not np.all(np.asarray(now) == np.asarray(last)):
                raise ValueError(
                    f"warm_start=True goes on with the network of the last fit, which has {_named(name, last)}; "
                    f"{_named(name, now)} needs a new one: set warm_start=False"
                )

    @property
    def _is_regressor(self) -> bool:
        return isinstance(self, RegressorMixin)

    def _row_weights(self, y: np.ndarray, sample_weight: np.ndarray) -> np.ndarray:
        return sample_weight

    def _encode(self, y: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def _set_fitted(
        self, networks: Networks, rows: Tensor, scaling: dict[str, Tensor], losses: list[float], steps: int
    ) -> None:
        """Set the fitted attributes from a batch of one network; `rows` are not standardised, float64."""
        M, D = networks.centers.shape[1:]
        K = networks.weights.shape[1]
        precision: Any = self.precision if isinstance(self.precision, str) else min(self.precision, D)
        network = GaussianRBFNetwork(
            D,
            K,
            M,
            precision=precision,
            learn_centers=bool(self.learn_centers),
            bias=bool(self.fit_intercept),
            reg_precision=float(self.reg_precision),
            reg_weights=float(self.reg_weights),
            reg_centers=float(self.reg_centers),
            penalty=self.penalty,
            device="meta",
            dtype=networks.centers.dtype,
        )
        state = {"precision_elements": networks.elements[0], "centers": networks.centers[0]}
        state |= {"head.weight": networks.weights[0], "head.scale": scaling["y_scale"].expand(K).clone()}
        state["head.mean"] = scaling["y_mean"].expand(K).clone()
        if networks.bias is not None:
            state["head.bias"] = networks.bias[0]
        state |= {"input_mean": scaling["mean"], "input_scale": scaling["scale"]}
        network.load_state_dict({name: value.contiguous() for name, value in state.items()}, assign=True)
        self.network_: Any = network.eval().requires_grad_(False)
        self._started_with = {name: copy.deepcopy(getattr(self, name)) for name in _START}
        values, components = network.spectrum()
        self.centers_ = network.centers.numpy().copy()
        head: Any = network.head
        self.weights_ = (head.weight * head.scale.unsqueeze(-1)).numpy().T.copy()
        self.intercept_ = (head.mean if head.bias is None else head.bias * head.scale + head.mean).numpy().copy()
        self.eigenvalues_ = values.numpy().astype(np.float64)
        self.n_components_ = min(self.n_components or D, len(components))
        # of a diagonal metric they are a permutation of the axes: computed on access
        axes = network.form in ("diag", "isotropic")
        self._components = None if axes else components[: self.n_components_].numpy().astype(np.float64)
        total = self.eigenvalues_.sum()
        self.explained_ratio_ = self.eigenvalues_ / total if total > 0 else np.full(D, 1 / D)
        self._gradient_root = network.gradient_root(rows).numpy().astype(np.float64)
        self.feature_importances_ = np.asarray(self.feature_importance("official"), dtype=np.float64)
        self.loss_curve_ = losses
        self.n_iter_ = steps
        self._n_features_out = self.n_components_

    def _set_fitted_machine(self, machine: MetricMachine, left_out: tuple[np.ndarray, np.ndarray] | None) -> None:
        """Set the fitted attributes from a rescaled machine, and a regression's residuals and weights left out."""
        assert machine.setting is not None
        machine.left_out = None  # to save memory
        self.network_ = machine.cpu().eval()
        self._started_with = {name: copy.deepcopy(getattr(self, name)) for name in _START}
        D = machine.centers.shape[1]
        self.centers_ = machine.centers.numpy().copy()
        self.weights_ = machine.coefficients.numpy().copy()
        self.intercept_ = machine.intercept.numpy().copy()
        root = machine.gradient_root()
        self._gradient_root = root.numpy()
        unit = power_of_two(root, (0, 1))
        values, components = eigen_of_root(root / unit, complete=len(root) >= D or D <= 256)
        self.eigenvalues_ = (values * unit.square()).flatten().numpy()
        self.n_components_ = min(self.n_components or D, len(components))
        wide = len(root) < D  # computed from the root on access
        self._components = None if wide else components[: self.n_components_].numpy().copy()
        total = values.sum()
        self.explained_ratio_ = (values / total).numpy() if total > 0 else np.full(D, 1 / D)
        self.feature_importances_ = np.asarray(self.feature_importance("gradient"), dtype=np.float64)
        self.loss_curve_ = [machine.setting.error]
        self.n_iter_ = machine.setting.iterations + 1
        self._n_features_out = self.n_components_
        if left_out is not None:
            self.left_out_residuals_, self.left_out_weights_ = left_out

    @property
    def _closed(self) -> bool:
        """Whether the last fit used `solver="agop"`."""
        return isinstance(self.network_, MetricMachine)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also read pickles of older versions, which stored the matrices."""
        state = {"categorical_features": "from_dtype", **state}
        if "network_" in state and "_gradient_root" not in state:
            values, vectors = np.linalg.eigh(state.pop("gradient_outer_product_"))
            state["_gradient_root"] = np.sqrt(values.clip(0))[:, None] * vectors.T
            state["_components"] = state.pop("components_")
            state["_started_with"] = {name: state[name] for name in _START}
            for name in ("precision_", "factor_"):
                del state[name]
        super().__setstate__(state)

    def set_state(self, state: dict[str, Any]) -> None:
        """Take back fitted attributes, for :mod:`zoo.estimators.saved`; ValueError if they do not fit."""
        check_columns(state, "feature_importances_")
        network, count = state.get("network_"), state["n_features_in_"]
        if "encoding_" in state:
            check_encoding(state["encoding_"], count)
            count = len(state["encoding_"].owners)
        if isinstance(network, GaussianRBFNetwork):
            network = _checked(network, count)
        elif not isinstance(network, MetricMachine):
            raise ValueError(f"network_ is a {type(network).__name__}, not a network of GRBF")
        _check_left_out(state, network)
        if state["centers_"].shape != network.centers.shape or network.centers.shape[1] != count:
            raise ValueError("centers_ are not the centres of network_")
        self.__dict__.update(state | {"network_": network})

    # (D, D) matrices are computed on access, so that low-rank metrics need memory linear in D.

    @property
    def factor_(self) -> np.ndarray:
        """Factor L of precision_ = L L^T: (D, D), or (D, rank); of diagonal metrics only the diagonal."""
        check_is_fitted(self)
        return self.network_.factor().numpy().copy()

    @property
    def precision_(self) -> np.ndarray:
        """Precision matrix P (D, D)."""
        check_is_fitted(self)
        return self.network_.precision().numpy().copy()

    @property
    def components_(self) -> np.ndarray:
        """Eigenvectors of P as rows (n_components_, D), largest entry positive."""
        check_is_fitted(self)
        if self._components is not None:
            return self._components
        if self._closed:
            found = eigen_of_root(torch.from_numpy(self._gradient_root), complete=self.centers_.shape[1] <= 256)
            return found.components[: self.n_components_].numpy()
        return self.network_.spectrum().components[: self.n_components_].numpy().astype(np.float64)

    @property
    def gradient_outer_product_(self) -> np.ndarray:
        """Average of grad f grad f^T over the training rows (D, D)."""
        check_is_fitted(self)
        return self._gradient_root.T @ self._gradient_root

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.categorical = True
        tags.target_tags.multi_output = self._is_regressor and self.solver == "agop"
        return tags

    # ---- prediction ---------------------------------------------------------------------------------------

    def inputs(self, X):
        """Rows of the table (n, D) as the numbers that the network takes: gaps filled, categories one input each.

        Returns:
            (n, inputs), float64; for a table of numbers without gaps, the rows themselves. Their names are in
            `input_names_`.
        """
        check_is_fitted(self)
        encoding: Encoding | None = getattr(self, "encoding_", None)  # older fits have none
        mask = self._categories()
        X = without_times(without_grad(X), mask)
        if mask is None:
            finite: Any = True if encoding is None else "allow-nan"
            X = validate_data(self, X, dtype=np.float64, ensure_all_finite=finite, reset=False)
            return X if encoding is None else encoding.inputs(Columns(X, {}))
        validate_data(self, X, reset=False, skip_check_array=True)
        return self.encoding_.inputs(read_columns(X, mask, input_name="X", estimator=self))

    _rows = inputs

    @property
    def input_names_(self) -> list[str]:
        """Names of the network's inputs: of a category `column=level`, of a gap `column=(missing)`."""
        check_is_fitted(self)
        names = list(map(str, getattr(self, "feature_names_in_", [f"x{i}" for i in range(self.n_features_in_)])))
        encoding: Encoding | None = getattr(self, "encoding_", None)
        return names if encoding is None else encoding.names(names)

    def of_inputs(self):
        """This estimator for rows that are encoded already, as :meth:`inputs` gives them; itself where there is no
        difference.
        """
        check_is_fitted(self)
        encoding: Encoding | None = getattr(self, "encoding_", None)
        if encoding is None or encoding.is_plain:
            return self
        found: Any = copy.copy(self)
        vars(found).pop("feature_names_in_", None)
        found.n_features_in_ = len(encoding.owners)
        found.encoding_ = Encoding.of_numbers(found.n_features_in_)
        found.feature_importances_ = found.feature_importance("gradient" if self._closed else "official")
        return found

    def _blocks(self, X: np.ndarray) -> Iterator[Tensor]:
        """Iterate over blocks of rows, as tensors."""
        for start in range(0, len(X), BLOCK):
            yield to_tensor(X[start : start + BLOCK])

    def _outputs(self, X) -> np.ndarray:
        """Outputs (n, K), float64, computed in blocks."""
        X = self._rows(X)
        with torch.inference_mode(), few_threads(min(len(X), BLOCK) * self.centers_.size, pools=False):
            return torch.cat([self.network_(block) for block in self._blocks(X)]).numpy().astype(np.float64)

    def transform(self, X):
        """Coordinates (n, n_components) of standardised rows along the eigenvectors of the precision matrix."""
        Z = (self._rows(X) - self._mean) / self._scale
        return Z @ self.components_.T

    def inverse_transform(self, Z):
        """Rows (n, D) of the active subspace with coordinates Z (n, n_components), in the units of the features."""
        if self.of_inputs() is not self:
            raise ValueError(
                "a direction leaves the categories and gaps of a table: of_inputs().inverse_transform(Z) gives the "
                "numbers that they are encoded as"
            )
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

    def to_module(self) -> GaussianRBFNetwork | MetricMachine:
        """A copy of the trained network as a torch module: rows that are not standardised to logits or values."""
        check_is_fitted(self)
        return copy.deepcopy(self.network_)

    def to_pipeline(self) -> OfValues:
        """A torch module from rows in their own units to probabilities (n, K), or values (n, 1)."""
        return (OfValues if self._is_regressor else OfClasses)(self.to_module())

    # ---- explanations -------------------------------------------------------------------------------------

    def feature_importance(
        self,
        kind: Literal["official", "trace", "gradient"] = "official",
        *,
        X=None,
        groups: Sequence[Any] | Mapping[Any, Any] | None = None,
    ) -> np.ndarray | dict[Any, float]:
        """Importance of each feature, summing to 1.

        Args:
            kind: `"official"`, the paper's sum over eigenpairs gamma_k |v_jk|; `"trace"`, diag(P) / tr P;
                `"gradient"`, the mean squared derivative of the output with respect to each standardised feature.
            X: Rows that `"gradient"` averages over; None for the training rows.
            groups: Group of each column (for example, the variable of a one-hot column), or a mapping from feature
                names to groups. Importances are summed within groups.

        Returns:
            (D,), or a dictionary from group to importance in order of appearance.
        """
        check_is_fitted(self)
        if kind == "gradient":
            root = torch.from_numpy(self._gradient_root)
            if X is not None:
                root = self.network_.gradient_root(to_tensor(self._rows(X)))
            importance = gradient_shares(root).numpy().astype(np.float64)
        elif self._closed:
            L = self.network_.factor()
            wide = len(L) == 1  # diagonal metric
            if wide:
                found = shares(L.square().expand(1, self.centers_.shape[1])[0], "the metric is zero")
            else:
                found = importance_from_precision(L @ L.mT, kind)
            importance = found.numpy().astype(np.float64)
        else:
            importance = self.network_.feature_importance(kind).numpy().astype(np.float64)
        encoding: Encoding | None = getattr(self, "encoding_", None)
        if encoding is not None and not encoding.is_plain:
            importance = encoding.by_column(importance)
        return importance if groups is None else self._grouped(importance, groups)

    def _grouped(self, importance: np.ndarray, groups: Sequence[Any] | Mapping[Any, Any]) -> dict[Any, float]:
        if isinstance(groups, Mapping):
            names = getattr(self, "feature_names_in_", [f"x{i}" for i in range(len(importance))])
            unknown = [name for name in groups if name not in names]
            if unknown:
                raise ValueError(f"groups names {unknown[0]!r}, which is not a feature{suggestion(unknown[0], names)}")
            groups = [groups.get(name, name) for name in names]
        if len(groups) != len(importance):
            raise ValueError(f"groups has {len(groups)} entries for {len(importance)} features; give one each")
        total: dict[Any, float] = {}
        for group, share in zip(groups, importance, strict=True):
            total[group] = total.get(group, 0.0) + float(share)
        return total

    def active_subspace(self, kind: Literal["precision", "gradient"] = "precision") -> Spectrum:
        """Directions in standardised features, in decreasing order of importance.

        Args:
            kind: `"precision"` for the eigenpairs of P; `"gradient"` for those of the average gradient outer product on
                the training rows (Constantine, Active Subspaces, 2015), which lie in the range of P.

        Returns:
            Eigenvalues (D,) and unit vectors as rows (D, D); (rank,) and (rank, D) for a metric of low rank.
        """
        check_is_fitted(self)
        if kind not in ("precision", "gradient"):
            raise ValueError(f"kind={kind!r} is not one of 'precision', 'gradient'")
        if kind == "precision":
            found = eigen(self.network_.precision()) if self._closed else self.network_.spectrum()
            return Spectrum(*(part.double() for part in found))
        complete = self._closed or self.network_.form != "low_rank"
        return eigen_of_root(torch.from_numpy(self._gradient_root), complete=complete)

    def bootstrap(self, X, y, *, n_samples: int = 32, sample_weight=None, random_state=None) -> Bootstrap:
        """Refit on bootstrap samples, all networks at once, to assess the stability of the explanation.

        Args:
            X: The training rows.
            y: Their targets.
            n_samples: Number of refits.
            sample_weight: Weights of the rows.
            random_state: Seed of the resampling; None for that of the estimator.

        Returns:
            Importances of all kinds and eigenvalues of every refit.
        """
        rng = check_random_state(self.random_state if random_state is None else random_state)
        n = len(X)
        counts = rng.multinomial(n, np.full(n, 1 / n), size=n_samples).astype(np.float64)
        if sample_weight is not None:
            counts = counts * np.asarray(sample_weight)
        seeds = rng.randint(2**31 - 1, size=n_samples).tolist()
        # a drawn row leaves with all of its copies: beside one of them, its own target would be known
        settings = [{"random_state": s} for s in seeds]
        fits = fit_many(self, X, y, settings, sample_weight=counts, leave_copies=False)
        kinds = ("official", "trace", "gradient")
        importances = {kind: np.stack([f.feature_importance(kind) for f in fits]) for kind in kinds}
        names = getattr(fits[0], "feature_names_in_", np.array([f"x{i}" for i in range(fits[0].n_features_in_)]))
        most = max(len(f.eigenvalues_) for f in fits)  # a refit may lack a category
        values = [np.pad(f.eigenvalues_, (0, most - len(f.eigenvalues_))) for f in fits]
        return Bootstrap(importances, np.stack(values), list(map(str, names)))


@dataclass(frozen=True)
class Bootstrap:
    """Explanations of networks refitted on bootstrap samples.

    Attributes:
        importances: By kind, (refits, D).
        eigenvalues: (refits, D), decreasing in each row.
        feature_names: Names of the D features.
    """

    importances: dict[str, np.ndarray]
    eigenvalues: np.ndarray
    feature_names: list[str]

    def interval(self, kind: str = "official", level: float = 0.9) -> np.ndarray:
        """Lower end, median and upper end (3, D) of the interval of an importance, or of the `"eigenvalues"`."""
        if not 0 < level < 1:
            raise ValueError(f"level={level} must lie between 0 and 1")
        values = self.eigenvalues if kind == "eigenvalues" else self.importances[kind]
        return np.quantile(values, [(1 - level) / 2, 0.5, (1 + level) / 2], axis=0)

    def rank_frequency(self, k: int, kind: str = "official") -> np.ndarray:
        """Frequency (D,) with which each feature is among the k most important."""
        ranks = (-self.importances[kind]).argsort(1).argsort(1)
        return (ranks < k).mean(0)


@register_estimator("grbf_regressor", "Gaussian RBF networks for regression")
class GRBFRegressor(RegressorMixin, _GRBF):
    """Regression by Gaussian units with one learnable precision matrix (arXiv 2307.05639).

    Targets are standardised for training; predictions are in their original units. With `solver="agop"` rows may have
    several targets, which share the metric. Ordered classes are predicted as their ranks 0, 1, 2, ..., rounded.

    Args:
        n_centers: Number of Gaussian units M; reduced, with a warning, if there are fewer distinct rows.
        centers: Initial centres: `"kmeans"`, `"random"` rows, `"all"` rows, or an array (M, D) in standardised units.
        learn_centers: Train the centres; worth tuning.
        precision: `"full"`, `"diag"`, `"isotropic"`, or a rank, advisable above a few hundred features.
        reg_precision: Penalty on the precision factor, the most important hyper-parameter; 1e-2 to 1e-1 for noisy data.
        reg_weights: Penalty on the output weights.
        reg_centers: Penalty on trained centres.
        penalty: `"squared"` norms, or the authors' `"plain"` norms.
        shrink_to: Target of the penalty on the factor: `"zero"`, as in the paper, which removes directions; or
            `"start"`, an isotropic metric, as in a Gaussian-kernel machine: often more accurate on small tables with
            many relevant features and many centres.
        fit_intercept: Fit an intercept.
        init: Initial width: the `"median"` distance; `"scale"`, scikit-learn's `gamma="scale"`, narrower, for many
            centres; a positive number; or the authors' `"official"` random one, useless above 13 features.
        solver: `"agop"` (default), kernel ridge regression whose metric is the average gradient outer product of the
            model, without steps or tuning, see below; or training in steps: `"adam"`; `"lbfgs"` on all parameters;
            `"varpro"`, L-BFGS on the metric with output weights in closed form, by far the fastest of these for
            regression, but with its own best regularisation.
        learning_rate: Initial learning rate of Adam, with cosine decay to 0.
        max_iter: Largest number of steps.
        batch_size: Mini-batch size of Adam; None: all rows up to 4096, 1024 above.
        tol: Stop Adam when the relative improvement of the objective over `n_iter_no_change` steps is below this.
        n_iter_no_change: Number of steps for `tol`.
        early_stopping: Hold out rows, stratified by class, stop by their loss and keep the best network.
        validation_fraction: Share of the rows held out.
        standardize: Standardise the features inside the model.
        n_components: Columns of `transform`; None for all: the number of features, or the rank of the precision matrix.
        random_state: Seed of all randomness.
        device: Device of the training; the fitted network is on the CPU.
        dtype: `"float64"` or `"float32"`; rows are always standardised in float64.
        verbose: With 1, warn if training stopped at `max_iter`.
        warm_start: Start from the same function as the last fit, also if the rows' mean and scale change. Features,
            classes and the parameters of the initialisation must be those of the last fit.
        categorical_features: Columns that hold categories: `"from_dtype"`, those of a data frame whose type is category
            or text (of objects, if one is a text); or a mask, indices or names; None for none. Each of the 100 most
            frequent categories is an input of 0 and 1; these share one scale, so a column varies as much as a number.
            Missing is a category of its own. What is rarer, or was not in the training rows, is 0 in all of them.

    A missing number (NaN) is the median of the training rows; a column with gaps in these has a further input that
    says where. Means, scales, medians and categories are those of all rows, also when leave-one-out leaves one out. The
    network's attributes (`centers_`, `components_`, `precision_` and so on) are those of its inputs, see
    `input_names_`; importances are summed over the inputs of each column.

    With `solver="agop"` the kernel is exp(-|x - z|_P^q), P the average gradient outer product (Radhakrishnan and
    others, arXiv 2212.13881); q, the metric and the ridge are chosen by leave-one-out. Every row is a centre (1000
    rows if there are more than 2000), in float64. Only `precision` (not a rank: the best metric that is at most as
    complex), `fit_intercept`, `standardize`, `n_components`, `device` and class weights are used; a warning names what
    else was set. The fit is deterministic and independent of the order of the rows. `eigenvalues_`, `components_`,
    `transform` and `feature_importances_` (the diagonal) are then of the average gradient outer product, not of P.

    Attributes:
        network_: The trained `GaussianRBFNetwork`; with `solver="agop"` a `MetricMachine`, whose `setting` holds the
            chosen hyper-parameters.
        centers_: (M, D), standardised.
        weights_: (M, 1).
        intercept_: (1,).
        precision_: P (D, D), with D the number of inputs; factor_: L with P = L L^T.
        eigenvalues_: Of P, decreasing (D,); `explained_ratio_`: divided by their sum.
        components_: Eigenvectors as rows (n_components, D), largest entry positive; at most as many as the rank of P.
        gradient_outer_product_: Average of grad f grad f^T over the training rows (D, D).
        feature_importances_: The paper's importance (D,), summing to 1; see `feature_importance` for others.
        loss_curve_: Objective before every step.
        n_iter_: Number of steps.
        encoding_: How columns become inputs; input_names_: their names.
        left_out_residuals_: Targets less the leave-one-out predictions, in units of the targets, of the different rows
            of the fit, sorted by features (m, outputs); left_out_weights_: their weights (m,).
        n_features_in_: D; feature_names_in_: their names, if the rows had any.
    """

    def _encode(self, y: np.ndarray) -> np.ndarray:
        y = np.asarray(y, dtype=np.float64)
        if not (largest := np.abs(y).max(initial=0.0)) < _LARGEST_TARGET:
            raise ValueError(f"y has values up to {largest:.3g}, whose sums may be infinite: give it in other units")
        return y

    @property
    def n_outputs_(self) -> int:
        """Number of targets of a row."""
        check_is_fitted(self)
        return len(self.intercept_)

    def predict(self, X):
        """Predictions (n,); (n, outputs) after a fit to several."""
        found = self._outputs(X)
        return found[:, 0] if found.shape[1] == 1 else found

    def predict_interval(self, X, coverage=0.9):
        """Intervals that hold the target of a new row with a given probability, whatever the noise is distributed as.

        The predictions less and plus the quantile of the absolute leave-one-out residuals (the jackknife; Barber and
        others, 2021), which the solve gives for nothing. They are as wide everywhere. Only with `solver="agop"`.

        Args:
            X: Rows (n, D).
            coverage: Probability, between 0 and 1.

        Returns:
            Lower and upper ends (n, 2); (n, outputs, 2) after a fit to several.

        Raises:
            ValueError: The coverage is out of range, or needs more rows than the fit had; or the fit has no residuals.
        """
        check_is_fitted(self)
        if not isinstance(coverage, Real) or not 0 < float(coverage) < 1:
            raise ValueError(f"coverage={coverage!r} must lie between 0 and 1")
        residuals = getattr(self, "left_out_residuals_", None)
        if residuals is None or not self._closed:
            raise ValueError('intervals are made of leave-one-out residuals: fit with solver="agop"')
        half = _quantiles(np.abs(residuals), self.left_out_weights_, float(coverage))
        found = self._outputs(X)
        found = np.stack([found - half, found + half], -1)
        return found[:, 0] if found.shape[1] == 1 else found


@register_estimator("grbf_classifier", "Gaussian RBF networks for classification")
class GRBFClassifier(ClassifierMixin, _GRBF):
    """Classification by Gaussian units with one learnable precision matrix (arXiv 2307.05639).

    Two classes have one logit. Arguments and attributes are those of :class:`GRBFRegressor`, and:

    Args:
        class_weight: None, `"balanced"`, or a mapping from classes to weights; 1 for classes that it lacks.

    Attributes:
        classes_: The classes, sorted.
        weights_: (M, 1) for two classes, else (M, K).
    """

    classes_: np.ndarray

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
        solver="agop",
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
        categorical_features="from_dtype",
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
            categorical_features=categorical_features,
        )
        self.class_weight = class_weight

    def _encode(self, y: np.ndarray) -> np.ndarray:
        check_classification_targets(y)
        classes, encoded = np.unique(y, return_inverse=True)
        if self._is_warm:
            unknown = sorted(set(classes.tolist()) - set(self.classes_.tolist()))
            if unknown:
                raise ValueError(
                    f"warm_start=True goes on with the classes of the last fit, {self.classes_.tolist()}; y also has "
                    f"{unknown}: set warm_start=False"
                )
            return np.searchsorted(self.classes_, classes)[encoded]
        if len(classes) < 2:
            raise ValueError(
                "This solver needs samples of at least 2 classes in the data, but the data contains only one class: "
                f"{classes.tolist()[0]!r}"
            )
        self.classes_ = classes
        return encoded

    def _row_weights(self, y: np.ndarray, sample_weight: np.ndarray) -> np.ndarray:
        if self.class_weight is None:
            return sample_weight
        if isinstance(self.class_weight, Mapping):
            weights = sample_weight * self._given_weights()[y]
            if not weights.any():
                raise ValueError("class_weight leaves no row with a weight; one of its classes needs more than 0")
            return weights
        mass = np.bincount(y, weights=sample_weight)
        return sample_weight * (mass.sum() / (len(mass) * np.maximum(mass, np.finfo(float).tiny)))[y]

    def _given_weights(self) -> np.ndarray:
        """Weight of each class, (K,); 1 for classes not in `class_weight`."""
        classes, given = self.classes_.tolist(), dict(self.class_weight)
        for name, weight in given.items():
            if not isinstance(weight, Real) or not 0 <= float(weight) < np.inf:
                raise ValueError(f"class_weight of {name!r} is {weight!r}; it must be a finite number, not negative")
        unknown, rest = ([c for c in a if c not in b] for a, b in ((given, classes), (classes, given)))
        if unknown and rest:  # as in scikit-learn: a fold may lack a class
            raise ValueError(f"The classes, {rest}, are not in class_weight, which names {unknown} instead")
        return np.array([float(given.get(c, 1.0)) for c in classes])

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


def _checked(network: GaussianRBFNetwork, dim: int) -> GaussianRBFNetwork:
    """A network with the settings and tensors of one from a file; an error if they do not fit."""
    head: Any = network.head
    again = GaussianRBFNetwork(
        dim,
        len(head.weight),
        len(network.centers),
        precision=network.rank if network.form == "low_rank" else network.form,  # type: ignore[arg-type]
        learn_centers=bool(network.learn_centers),
        bias=head.bias is not None,
        reg_precision=float(network.reg_precision),
        reg_weights=float(network.reg_weights),
        reg_centers=float(network.reg_centers),
        penalty=network.penalty,
        device="meta",
        dtype=network.centers.dtype,
    )
    again.load_state_dict(network.state_dict(), assign=True)
    return again.eval().requires_grad_(False)


def _check_left_out(state: Mapping[str, Any], network: GaussianRBFNetwork | MetricMachine) -> None:
    """Refuse residuals and weights from a file that no fit gives."""
    if "left_out_residuals_" not in state and "left_out_weights_" not in state:
        return
    outputs = network.coefficients.shape[1] if isinstance(network, MetricMachine) else 0
    residuals: Any = state.get("left_out_residuals_")
    weights: Any = state.get("left_out_weights_")
    for value, shape in ((weights, np.shape(weights)[:1]), (residuals, (*np.shape(weights)[:1], outputs))):
        fine = isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.shape == shape and value.size
        if not fine or not np.isfinite(value).all():
            raise ValueError("left_out_residuals_ and left_out_weights_ do not hold one row for each row of a fit")
    if not (weights > 0).all():
        raise ValueError("left_out_weights_ holds numbers that no fit gives")


def _quantiles(values: np.ndarray, weight: np.ndarray, coverage: float) -> np.ndarray:
    """The conformal quantile of each column of values (n, C): the least that a share `coverage` of n + 1 rows is below,
    the further one being above all.
    """
    weight = weight / weight.max()
    share = weight / (weight.sum() + weight.sum() / len(weight))
    order = values.argsort(0)
    place = (share[order].cumsum(0) < coverage - 1e-12).sum(0)
    if place.max() >= len(values):
        raise ValueError(f"coverage={coverage} needs more than the {len(values)} different rows of the fit")
    return np.take_along_axis(values, np.take_along_axis(order, place[None], 0), 0)[0]


def _constant(X: np.ndarray) -> np.ndarray:
    """Indices of columns that are constant up to rounding."""
    _, scale = standardisation(X)
    spread = np.ptp(X, axis=0)
    return np.flatnonzero((spread == 0) | ((scale == 1) & (spread < 1)))


def _same(value: Any, other: Any) -> bool:
    """Whether two parameters are equal; arrays differ from everything else."""
    return np.ndim(value) == np.ndim(other) == 0 and value == other


def _named(name: str, value: Any) -> str:
    """A parameter for messages."""
    return f"other {name} of shape {np.shape(value)}" if np.ndim(value) else f"{name}={value!r}"
