"""The stream as a scikit-learn classifier: any batches, new classes, forgetting, merging, rejecting."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits

from zoo.estimators.streams import KernelStreamClassifier
from zoo.learners.heads import lda, register_learner
from zoo.support.register import UnknownNameError

QUICK: dict[str, Any] = {"n_features": 24, "random_state": 0}


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    X, y = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(y))
    return X[order] / 16, np.array([f"digit {c}" for c in y[order]])


@pytest.fixture(scope="module")
def fitted(digits: tuple[np.ndarray, np.ndarray]) -> KernelStreamClassifier:
    X, y = digits
    return KernelStreamClassifier(n_features=150, lengthscale=1.5, standardize=False, random_state=0).fit(
        X[:1000], y[:1000]
    )


def test_digits_in_one_go_and_class_after_class(digits, fitted):
    X, y = digits
    assert fitted.score(X[1000:], y[1000:]) > 0.94
    stream = fitted.empty_copy()
    for c in sorted(set(y), reverse=True):
        stream.partial_fit(X[:1000][y[:1000] == c], y[:1000][y[:1000] == c])
    assert stream.classes_.tolist() == fitted.classes_.tolist()
    assert np.allclose(stream.predict_proba(X[1000:]), fitted.predict_proba(X[1000:]), rtol=0, atol=1e-7)
    assert stream.predict_proba(X[:5]).sum(1) == pytest.approx(np.ones(5))


def test_forgotten_rows_were_never_seen(digits, fitted):
    X, y = digits
    model = pickle.loads(pickle.dumps(fitted))
    gone = (np.arange(1000) % 3 == 0) | (y[:1000] == "digit 4")
    model.forget(X[:1000][gone], y[:1000][gone])
    refit = fitted.empty_copy().partial_fit(X[:1000][~gone], y[:1000][~gone])
    counts = {
        refit._labels[c]: n for c, n in zip(refit.statistics_.classes, refit.statistics_.by_class()[0], strict=True)
    }
    mine = {
        model._labels[c]: n for c, n in zip(model.statistics_.classes, model.statistics_.by_class()[0], strict=True)
    }
    assert mine == counts
    assert float((model.statistics_.gram - refit.statistics_.gram).abs().max()) < 1e-9 * float(
        refit.statistics_.gram.max()
    )
    assert "digit 4" not in model.classes_
    assert np.array_equal(model.predict(X[1000:]), refit.predict(X[1000:]))
    before = model.statistics_.fingerprint()
    for rows, labels, message in [
        (X[:1], ["digit 4"], "none were learned"),
        (X[:1], ["a cat"], "class 'a cat' was never seen"),
        (X[:1, :5], ["digit 1"], "features"),
        (X[:1] * np.nan, ["digit 1"], "NaN"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.forget(rows, labels)
        assert model.statistics_.fingerprint() == before


def test_parts_learned_apart_are_merged(digits, fitted):
    X, y = digits
    parts = [fitted.empty_copy().partial_fit(X[i:1000:3], y[i:1000:3]) for i in (0, 1, 2)]
    whole = parts[0].merge(parts[1]).merge(parts[2])
    assert np.allclose(whole.predict_proba(X[1000:]), fitted.predict_proba(X[1000:]), rtol=0, atol=1e-7)
    assert sum(sum(h.values()) for h in whole._histograms.values()) == 1000
    with pytest.raises(ValueError, match="empty_copy"):
        whole.merge(
            KernelStreamClassifier(n_features=150, lengthscale=2.0, standardize=False, random_state=0).fit(X, y)
        )


def test_rows_of_known_classes_are_kept_and_of_unknown_ones_refused(digits):
    X, y = digits
    unknown = np.isin(y, ["digit 3", "digit 7"])
    train = ~unknown & (np.arange(len(y)) < 1000)
    model = KernelStreamClassifier(n_features=150, lengthscale=1.5, standardize=False, random_state=0).fit(
        X[train], y[train]
    )
    test = ~unknown & (np.arange(len(y)) >= 1000)
    p = model.p_values(X[test])
    own = p[np.arange(test.sum()), np.searchsorted(model.classes_, y[test])]
    for alpha in (0.05, 0.1, 0.2):
        assert abs((own >= alpha).mean() - (1 - alpha)) < 0.03  # 640 rows: three standard deviations at .05
    known, strange = model.predict(X[test], reject=0.05), model.predict(X[unknown], reject=0.05)
    assert np.mean([c is None for c in known]) < 0.08
    assert np.mean([c is None for c in strange]) > 0.6
    assert set(model.predict(X[unknown], reject=0.3, unknown="none of these")) - set(model.classes_) == {
        "none of these"
    }
    with pytest.raises(ValueError, match="reject=2 must be"):
        model.predict(X[:2], reject=2)
    with pytest.raises(ValueError, match="has no distances"):
        KernelStreamClassifier(head="ridge", **QUICK).fit(X[train], y[train]).predict(X[:2], reject=0.1)


def test_tasks_have_means_of_their_own(digits):
    X, y = digits
    moved = X[:, np.random.RandomState(1).permutation(64)]
    model = KernelStreamClassifier(n_features=150, lengthscale=1.5, standardize=False, random_state=0).fit(
        X[:600], y[:600], task=1
    )
    model.partial_fit(moved[600:1200], y[600:1200], task=np.full(600, 5))
    assert (model.predict_task(X[1200:]) == 1).mean() > 0.9
    assert (model.predict_task(moved[1200:]) == 5).mean() > 0.9
    plain = clone(model).set_params(head="lda").fit(X[:600], y[:600]).partial_fit(moved[600:1200], y[600:1200])
    test = np.vstack([X[1200:], moved[1200:]]), np.append(y[1200:], y[1200:])
    assert model.score(*test) > plain.score(*test)
    assert model.sample("digit 3", 7, random_state=0).shape == (7, 300)


def test_a_learner_is_found_by_its_name(digits, monkeypatch):
    X, y = digits
    monkeypatch.setattr(register_learner, "_entries", dict(register_learner._entries))

    @register_learner("sharper", "discriminants with a tenth of the shrinkage")
    def sharper(statistics, shrinkage=None):
        return lda(statistics, (shrinkage or 1.0) / 10)

    mine = KernelStreamClassifier(head="sharper", shrinkage=0.5, **QUICK).fit(X[:600], y[:600])
    known = KernelStreamClassifier(head="lda", shrinkage=0.05, **QUICK).fit(X[:600], y[:600])
    assert np.array_equal(mine.predict_proba(X[600:]), known.predict_proba(X[600:]))
    assert np.array_equal(mine.p_values(X[600:700]), known.p_values(X[600:700]))
    with pytest.raises(UnknownNameError, match="there is no learner 'sharp'; did you mean sharper"):
        KernelStreamClassifier(head="sharp").fit(X, y)
    with pytest.raises(ValueError, match=r"'head' parameter .* must be an instance of 'str'"):
        KernelStreamClassifier(head=3).fit(X, y)
    with pytest.raises(ValueError, match=r"there is already a learner 'lda', in zoo\.learners\.heads"):
        register_learner("lda")(sharper)


def test_a_stream_that_begins_with_one_class_says_what_that_fixes(digits):
    X, y = digits
    zeros = y == y[0]
    with pytest.warns(UserWarning, match="the first rows are of one class") as told:
        KernelStreamClassifier(n_features=10, random_state=0).partial_fit(X[zeros], y[zeros])
    assert told[0].filename == __file__
    with warnings.catch_warnings(action="error"):
        given = {"n_features": 10, "standardize": False, "lengthscale": 1.5}
        KernelStreamClassifier(**given).partial_fit(X[zeros], y[zeros])
        KernelStreamClassifier(n_features=10).partial_fit(X, y).partial_fit(X[zeros], y[zeros])
