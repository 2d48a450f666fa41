r"""Streaming kernel classifier for scikit-learn: class-incremental, with exact forgetting and a reject option.

>>> model = KernelStreamClassifier(random_state=0).fit(X, y)
>>> model.partial_fit(X_new, ["a class never seen"] * len(X_new))
>>> model.forget(X[:3], y[:3])
>>> model.predict(X_test, reject=0.05)
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, _fit_context
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from zoo.estimators.encoding import without_times
from zoo.estimators.fitting import all_or_nothing
from zoo.estimators.labels import joined
from zoo.estimators.named import check_columns, register_estimator
from zoo.estimators.pipelines import OfStream
from zoo.estimators.threads import threads_for
from zoo.kernels.random_features import FourierFeatures
from zoo.learners.heads import Discriminant, Mixture, register_learner
from zoo.learners.statistics import ClassStatistics
from zoo.support.scaling import standardisation
from zoo.support.tensors import without_grad

__all__ = ["KernelStreamClassifier"]

_OF_ONE_CLASS = (
    "the first rows are of one class, and the scaling of the columns and the lengthscale are theirs from here on, "
    "which may suit no other class: begin with rows of several classes, or set standardize=False and a lengthscale"
)
_STEPS = 200  # histogram bins per factor e of the squared distance
_NEAR = 0.7  # default lengthscale, relative to the median distance between rows


@register_estimator("kernel_stream_classifier", "streams of rows, tasks and classes in closed form")
class KernelStreamClassifier(ClassifierMixin, BaseEstimator):
    """Closed-form classification of streams with random Fourier features of the Gaussian kernel.

    The first call fixes the feature map; its scaling and default lengthscale come from the rows of that call, which
    should be of several classes (a warning says so), or be given: `standardize=False` and a lengthscale. After that
    only counts, sums and second moments of the features are stored, no rows. New classes may appear at any time.
    Learning in batches, or separately and merging, gives the same result as learning everything at once.

    Args:
        n_features: Number of random frequencies, with a cosine and a sine each.
        lengthscale: Lengthscale of the kernel on standardised rows; `"median"`: 0.7 times the median distance.
        head: A registered learner: `"mixture"`, `"lda"`, `"ridge"`, `"mean"` of `zoo.learners.heads`, or your own.
        shrinkage: Covariance shrinkage of the discriminants; None: estimated.
        ridge: Ridge parameter of the ridge head; None: estimated.
        standardize: Standardise the columns to mean 0 and standard deviation 1, by the rows of the first call.
        random_state: Seed of the frequencies.

    Attributes:
        classes_: Classes with rows, sorted.
        statistics_: Sufficient statistics, a :class:`~zoo.learners.statistics.ClassStatistics` with integer classes.
        lengthscale_: The lengthscale used.
        mean_: Mean of each column (d,).
        scale_: Standard deviation of each column (d,).
        n_features_in_: Columns of X.
    """

    statistics_: ClassStatistics
    _labels: np.ndarray  # by code, the integer of a class in the statistics
    _histograms: dict[int, dict[int, int]]  # counts of leave-one-out distances, by code and bin
    _made: list[Any]  # the fitted head, or nothing
    _discriminant: dict[str, bool]  # whether a head has distances, by its name

    _parameter_constraints: dict[str, list[Any]] = {  # noqa: RUF012 (scikit-learn's protocol)
        "n_features": [Interval(Integral, 1, 2**15, closed="both")],  # second moments of 32 GiB
        "lengthscale": [StrOptions({"median"}), Interval(Real, 0, None, closed="neither")],
        "head": [str],
        "shrinkage": [None, Interval(Real, 0, None, closed="left")],
        "ridge": [None, Interval(Real, 0, None, closed="left")],
        "standardize": ["boolean"],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        *,
        n_features=500,
        lengthscale="median",
        head="mixture",
        shrinkage=None,
        ridge=None,
        standardize=True,
        random_state=None,
    ):
        self.n_features = n_features
        self.lengthscale = lengthscale
        self.head = head
        self.shrinkage = shrinkage
        self.ridge = ridge
        self.standardize = standardize
        self.random_state = random_state

    # ---- learning ------------------------------------------------------------------------------------------

    @_fit_context(prefer_skip_nested_validation=True)
    @threads_for(lambda self, n, d: n * self.n_features * (d + 4 * self.n_features))
    @all_or_nothing
    def fit(self, X, y, task=None):
        """Discard everything learned and learn rows.

        Args:
            X: Rows (n, d).
            y: Classes (n,).
            task: Task of each row (n,), or of all; the mixture head has one mean per class and task. None: 0.
        """
        for name in ("statistics_", "classes_"):
            self.__dict__.pop(name, None)
        return self._learn(X, y, task)

    @_fit_context(prefer_skip_nested_validation=True)
    @threads_for(lambda self, n, d: n * self.n_features * (d + 4 * self.n_features))
    @all_or_nothing
    def partial_fit(self, X, y, classes=None, task=None):
        """Learn more rows, of any classes.

        Args:
            X: Rows (n, d).
            y: Classes (n,).
            classes: Ignored; for compatibility with scikit-learn.
            task: As in :meth:`fit`.
        """
        return self._learn(X, y, task)

    def _learn(self, X, y, task):
        first, _ = not hasattr(self, "statistics_"), self._learner()
        X, y = validate_data(self, without_times(without_grad(X)), y, dtype=np.float64, reset=first)
        check_classification_targets(y)
        if first:
            self._draw_map(X)
            if len(np.unique(y)) == 1 and (self.standardize or self.lengthscale == "median"):
                warnings.warn(_OF_ONE_CLASS, stacklevel=6)  # beyond the decorators
        codes = self._codes_of(y, learn=True)
        F = self.statistics_.phi(torch.from_numpy(self._standard(X)))
        self._labels, self.statistics_ = self._known(y), self.statistics_.snapshot()
        self.statistics_.update(torch.from_numpy(self._standard(X)), codes, _tasks(task))
        self._changed()
        for code, values in self._held_out(F, codes).items():
            self._count(code, Counter(_bins(values).tolist()))
        return self

    def _count(self, code: int, bins: Mapping[int, int]) -> None:
        """Add counts to the histogram of a class."""
        found = dict(self._histograms.get(code, {}))
        for place, count in bins.items():
            found[place] = found.get(place, 0) + count
        self._histograms = self._histograms | {code: found}

    def _draw_map(self, X: np.ndarray) -> None:
        self.mean_, self.scale_ = np.zeros(X.shape[1]), np.ones(X.shape[1])
        if self.standardize:
            self.mean_, self.scale_ = standardisation(X)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        rows = torch.from_numpy(
            ((X - self.mean_) / self.scale_)[np.linspace(0, len(X) - 1, min(len(X), 500)).astype(int)]
        )
        distances = torch.pdist(rows)
        distances = distances[distances > 0]
        median = float(distances.median()) if len(distances) else 1.0
        self.lengthscale_ = _NEAR * median if self.lengthscale == "median" else float(self.lengthscale)
        phi = FourierFeatures(
            X.shape[1], self.n_features, lengthscale=self.lengthscale_, seed=seed, dtype=torch.float64
        )
        self.statistics_ = ClassStatistics(phi)
        self._labels, self._histograms, self._discriminant = np.empty(0), {}, {}

    @threads_for(lambda self, n, d: n * self.n_features * (d + 4 * self.n_features))
    @all_or_nothing
    def forget(self, X, y, task=None):
        """Forget rows exactly: the statistics become those of never having seen them, with the same feature map.

        The histograms behind `reject` are only approximately restored: the entries nearest to the rows' scores are
        removed.

        Args:
            X: Rows (n, d) that were learned.
            y: Their classes (n,).
            task: Their tasks, as in :meth:`fit`.

        Raises:
            ValueError: These rows cannot have been learned; nothing is forgotten.
        """
        check_is_fitted(self, "statistics_")
        X, y = validate_data(self, without_times(without_grad(X)), y, dtype=np.float64, reset=False)
        codes = self._codes_of(y)
        F = self.statistics_.phi(torch.from_numpy(self._standard(X)))
        scores = self._held_out(F, codes)
        self.statistics_ = self.statistics_.snapshot()
        self.statistics_.downdate(torch.from_numpy(self._standard(X)), codes, _tasks(task))
        self._changed()
        left = set(self.statistics_.classes.tolist())
        kept = {code: dict(histogram) for code, histogram in self._histograms.items() if code in left}
        for code, values in scores.items():
            _remove(kept.get(code, {}), _bins(values).tolist())
        self._histograms = kept
        return self

    @all_or_nothing
    def merge(self, other: KernelStreamClassifier) -> KernelStreamClassifier:
        """Add what another estimator with the same feature map has learned; see :meth:`empty_copy`.

        Raises:
            ValueError: The feature maps differ.
        """
        check_is_fitted(self, "statistics_")
        check_is_fitted(other, "statistics_")
        same = self.lengthscale_ == other.lengthscale_ and np.array_equal(self.mean_, other.mean_)
        if not same or not np.array_equal(self.scale_, other.scale_):
            raise ValueError("the other estimator has another scaling or lengthscale: start both by empty_copy()")
        codes = self._codes_of(other._labels, learn=True)
        theirs = copy.deepcopy(other.statistics_)
        if theirs.rows:
            theirs.components[:, 1] = codes[theirs.components[:, 1]]
        self._labels, self.statistics_ = self._known(other._labels), self.statistics_.snapshot()
        self.statistics_.merge(theirs)
        for code, histogram in other._histograms.items():
            self._count(int(codes[code]), histogram)
        self._changed()
        return self

    def empty_copy(self) -> KernelStreamClassifier:
        """An estimator with the same feature map that has learned nothing, to be merged later."""
        check_is_fitted(self, "statistics_")
        other = copy.copy(self)
        other.statistics_ = ClassStatistics(copy.deepcopy(self.statistics_.features))
        other._labels, other._histograms = self._labels[:0], {}
        other._changed()
        return other

    def state(self) -> dict[str, Any]:
        """The fitted attributes, for :mod:`zoo.estimators.saved`, without the head, which the statistics determine."""
        parameters = self.get_params(deep=False)
        return {k: v for k, v in vars(self).items() if k not in parameters} | {"_made": []}

    def set_state(self, state: dict[str, Any]) -> None:
        """Take back fitted attributes, for :mod:`zoo.estimators.saved`; ValueError if they do not fit."""
        check_columns(state, "mean_", "scale_")
        if isinstance(state.get("_labels"), list):  # as releases before 0.2 saved them
            state = state | {"_labels": np.array(state["_labels"])}
        kinds = {"statistics_": ClassStatistics, "_labels": np.ndarray, "_histograms": dict, "_discriminant": dict}
        if wrong := next((name for name, kind in kinds.items() if not isinstance(state.get(name), kind)), None):
            raise ValueError(f"{wrong} is not a {kinds[wrong].__name__}")
        codes, count = state["statistics_"].classes.tolist(), len(state["_labels"])
        if any(not 0 <= code < count for code in codes):
            raise ValueError(f"the statistics are of the classes {codes!s:.60}, and there are labels of {count}")
        self.__dict__.update(state | {"_made": []})

    # ---- predicting ----------------------------------------------------------------------------------------

    def decision_function(self, X):
        """Scores (n, C); for two classes the difference of the second and the first (n,)."""
        scores = self._scores(X).numpy()
        return scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores

    def predict_proba(self, X):
        """Probabilities (n, C): of the Gaussian model for discriminants, the softmax of the scores for other heads."""
        return self._scores(X).softmax(1).numpy()

    def predict(self, X, reject=None, unknown=None):
        """Classes (n,).

        Args:
            X: Rows (n, d).
            reject: Reject rows whose p-values of all classes are below this, in (0, 1): about this share of the rows of
                known classes. Needs head `"mixture"` or `"lda"`.
            unknown: Label of rejected rows; the result is then an object array.
        """
        best = self._scores(X).argmax(1).numpy()
        chosen = self.classes_[best]
        if reject is None:
            return chosen
        if not 0 < reject < 1:
            raise ValueError(f"reject={reject} must be above 0 and below 1")
        answers = chosen.astype(object)
        answers[self.p_values(X).max(1) < reject] = unknown
        return answers

    def predict_task(self, X):
        """Task (n,) of the nearest mixture component, a pair of task and class."""
        head = self._head()
        if not isinstance(head, Mixture):
            raise ValueError(f"head={self.head!r} knows no tasks: use head='mixture'")
        return head.predict_task(self._phi(X)).numpy()

    @threads_for(lambda self, n, d: n * self.n_features * (d + 4 * self.n_features))
    def p_values(self, X):
        """Conformal p-values (n, C): share of a class's own rows with at least this (leave-one-out) distance to it."""
        found, F = np.empty((0, 0)), self._phi(X)
        distances = self._distances(F)
        found = np.empty(tuple(distances.shape))
        for column, code in enumerate(self._order()):
            histogram = self._histograms.get(code, {})
            places = np.array(sorted(histogram), dtype=np.int64)
            counts = np.array([histogram[place] for place in places.tolist()], dtype=np.float64)
            tail = np.append(counts[::-1].cumsum()[::-1], 0.0)
            mine = np.searchsorted(places, _bins(distances[:, column]).numpy(), side="left")
            found[:, column] = (1 + tail[mine]) / (1 + counts.sum())
        return found

    def sample(self, label, n=1, random_state=None):
        """Sample features (n, D) of a class from its Gaussian or mixture."""
        head = self._head()
        if not isinstance(head, Discriminant):
            raise ValueError(f"head={self.head!r} has no density: use head='mixture' or 'lda'")
        (code,) = self._codes_of(np.array([label])).tolist()
        seed = int(check_random_state(random_state).randint(2**31 - 1))
        return head.sample(code, n, torch.Generator().manual_seed(seed)).numpy()

    def to_pipeline(self) -> nn.Module:
        """A torch module from rows in their own units to probabilities (n, K)."""
        head = self._head()
        columns = {int(code): column for column, code in enumerate(head.classes)}
        order = [columns[code] for code in self._order()]
        features: Any = copy.deepcopy(self.statistics_.features)
        return OfStream(features, copy.deepcopy(head), order, self.mean_, self.scale_)

    # ---- helpers -------------------------------------------------------------------------------------------

    def _standard(self, X: np.ndarray) -> np.ndarray:
        return (X - self.mean_) / self.scale_

    def _phi(self, X) -> Tensor:
        check_is_fitted(self, "statistics_")
        X = validate_data(self, without_times(without_grad(X)), dtype=np.float64, reset=False)
        if not self.statistics_.rows:
            raise ValueError("no rows are left: call fit or partial_fit first")
        return self.statistics_.phi(torch.from_numpy(self._standard(X)))

    def _order(self) -> list[int]:
        """Codes in the order of `classes_`."""
        codes = self.statistics_.classes.numpy()
        return [int(code) for code in codes[np.argsort(self._labels[codes], kind="stable")]]

    @threads_for(lambda self, n, d: n * self.n_features * (d + 4 * self.n_features))
    def _scores(self, X) -> Tensor:
        F = self._phi(X)
        head = self._head()
        columns = {int(code): column for column, code in enumerate(head.classes)}
        return head(F)[:, [columns[code] for code in self._order()]]

    def _learner(self) -> Callable[..., Any]:
        return register_learner.get(self.head).made

    def _head(self) -> Any:
        check_is_fitted(self, "statistics_")
        if not self._made:
            make = self._learner()
            taken = inspect.signature(make).parameters.keys() & {"shrinkage", "ridge"}
            self._made.append(make(self.statistics_, **{name: getattr(self, name) for name in taken}))
        return self._made[0]

    def _changed(self) -> None:
        self._made = []
        self.classes_ = np.unique(self._labels[self.statistics_.classes.numpy()])

    def _known(self, y: np.ndarray) -> np.ndarray:
        """Labels known so far and new ones of y, by code; see :func:`joined`."""
        known, found = joined(self._labels, np.unique(y))
        seen = set(known.tolist())
        return np.concatenate([known, found[[label not in seen for label in found.tolist()]]])

    def _codes_of(self, y: np.ndarray, *, learn: bool = False) -> Tensor:
        known, labels = joined(self._known(y) if learn else self._labels, y)
        place = {label: code for code, label in enumerate(known.tolist())}
        unknown = [label for label in labels.tolist() if label not in place]
        if unknown:
            raise ValueError(f"class {unknown[0]!r} was never seen; known classes: {self.classes_.tolist()}")
        return torch.tensor([place[label] for label in labels.tolist()], dtype=torch.int64)

    def _distances(self, F: Tensor) -> Tensor:
        """Squared Mahalanobis distances to the nearest mean of every class (n, C), in the order of `classes_`."""
        head = self._head()
        if not isinstance(head, Discriminant):
            raise ValueError(f"head={self.head!r} has no distances: use head='mixture' or 'lda'")
        owners = head.components[:, 1] if isinstance(head, Mixture) else head.classes
        distances = head.mahalanobis(F)
        return torch.stack([distances[:, owners == code].amin(1) for code in self._order()], 1)

    def _held_out(self, F: Tensor, codes: Tensor) -> dict[int, Tensor]:
        """Leave-one-out squared distances of learned rows to their class, by class.

        Leaving out a row with offset r from its mean moves the mean by -r / (n_c - 1) and reduces the scatter by
        n_c / (n_c - 1) r r^T, so the distance q becomes (n_c / (n_c - 1))^2 q / (1 - n_c q / ((n_c - 1) N)).
        """
        if self.head not in self._discriminant:  # asked once: to make a head can cost more than to learn a batch
            self._discriminant[self.head] = isinstance(self._head(), Discriminant)
        if not self._discriminant[self.head]:
            return {}
        found, rows = {}, self.statistics_.rows
        distances, order = self._distances(F), self._order()
        for code in codes.unique().tolist():
            if code in order and (n := self.statistics_.count(code)) > 1:
                q = distances[codes == code, order.index(code)]
                grown = n / (n - 1)
                found[code] = grown**2 * q / (1 - grown * q / rows).clamp_min(1e-6)
        return found


def _tasks(task: Any) -> int | Tensor:
    if task is None:
        return 0
    return int(task) if isinstance(task, Integral) else torch.as_tensor(np.asarray(task))


def _bins(distances: Tensor) -> Tensor:
    """Histogram bins of squared distances, of equal width on a log scale."""
    return (distances.clamp_min(math.exp(-100)).log() * _STEPS).floor().to(torch.int64)


def _remove(histogram: dict[int, int], places: Sequence[int]) -> None:
    """Take one count from the bin nearest to each place."""
    for place in places:
        if not histogram:
            return
        nearest = min(histogram, key=lambda bin_: abs(bin_ - place))
        histogram[nearest] -= 1
        if not histogram[nearest]:
            del histogram[nearest]
