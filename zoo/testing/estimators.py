"""What every registered estimator keeps: its folder, without pickle, is the estimator."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from sklearn.base import is_classifier

import zoo
from zoo.estimators.named import create_estimator

__all__ = ["EstimatorTests"]


def rows() -> tuple[np.ndarray, np.ndarray]:
    """Rows (60, 4), and targets (60,) that depend on two of their columns."""
    X = np.random.default_rng(0).normal(size=(60, 4))
    return X, 2 * X[:, 0] + np.sin(X[:, 1])


class EstimatorTests:
    """Saving, loading, and fitting again, of one registered estimator.

    Attributes:
        name: Registered name.
        options: Of its constructor, for a short fit that a seed repeats.
    """

    name: ClassVar[str]
    options: ClassVar[dict[str, Any]] = {}

    def fitted(self, labels: Any = ("cat", "dog", "eel")) -> tuple[Any, np.ndarray, np.ndarray]:
        """The estimator, and the rows and targets that it was fitted on."""
        X, y = rows()
        estimator: Any = create_estimator(self.name, **self.options)
        if is_classifier(estimator):
            y = np.asarray(labels)[np.digitize(y, np.quantile(y, [0.3, 0.7][: len(labels) - 1]))]
        return estimator.fit(X, y), X, y

    @pytest.mark.parametrize("labels", [("cat", "dog", "eel"), (3, 5, 8), (False, True)])
    def test_a_saved_one_answers_the_same_to_the_bit(self, labels: Any, tmp_path: Path) -> None:
        estimator, X, _ = self.fitted(labels)
        zoo.save_pretrained(estimator, tmp_path / "saved")
        again = zoo.load_estimator(tmp_path / "saved")
        assert type(again) is type(estimator)
        assert again.n_features_in_ == 4
        for name in ("predict", "predict_proba", "decision_function"):
            if hasattr(estimator, name):
                answers, found = getattr(estimator, name)(X), getattr(again, name)(X)
                assert answers.dtype == found.dtype
                assert np.array_equal(answers, found), name
        if is_classifier(estimator):
            assert again.classes_.dtype == estimator.classes_.dtype
            assert again.classes_.tolist() == estimator.classes_.tolist()

    def test_a_loaded_one_is_fitted_again_and_saved_again(self, tmp_path: Path) -> None:
        estimator, X, y = self.fitted()
        folder = zoo.save_pretrained(estimator, tmp_path / "saved")
        before = (folder / "model.safetensors").read_bytes()
        zoo.save_pretrained(zoo.load_estimator(folder), folder)
        assert (folder / "model.safetensors").read_bytes() == before
        again = zoo.load_estimator(folder)
        assert str(again) == str(estimator)  # its parameters
        assert np.array_equal(again.fit(X, y).predict(X), estimator.fit(X, y).predict(X))

    def test_its_pipeline_answers_as_it_does(self) -> None:
        estimator, X, _ = self.fitted()
        if not hasattr(estimator, "to_pipeline"):
            return
        given = torch.from_numpy(X).float()  # as a deployed model is given them
        found = estimator.to_pipeline().eval()(given)
        right = getattr(estimator, "predict_proba", estimator.predict)(given.double().numpy()).reshape(len(X), -1)
        assert found.dtype == torch.float32
        assert found.shape == right.shape
        assert np.abs(found.numpy() - right).max() <= 1e-5

    def test_what_is_not_fitted_is_not_saved(self, tmp_path: Path) -> None:
        with pytest.raises(zoo.CheckpointError, match="not fitted yet"):
            zoo.save_pretrained(create_estimator(self.name), tmp_path / "saved")
        assert not (tmp_path / "saved").exists()
