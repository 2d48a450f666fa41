"""What every learner of sums keeps."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from zoo.estimators.streams import KernelStreamClassifier
from zoo.learners.heads import register_learner
from zoo.learners.statistics import ClassStatistics
from zoo.testing.kernels import points

__all__ = ["LearnerTests"]

Make = Callable[..., Any]


def stream() -> tuple[Tensor, Tensor, Tensor]:
    """Features (80, 4) in two tasks of the same three classes, which lie apart; classes; tasks."""
    g = torch.Generator().manual_seed(1)
    tasks, place = torch.randint(2, (80,), generator=g), torch.randint(3, (80,), generator=g)
    means = 8 * torch.eye(4, dtype=torch.float64)[:3]
    return means[place] + tasks[:, None] + points(80, 4), torch.tensor([3, 5, 8])[place], tasks


class LearnerTests:
    """Accuracy, any order and parts of rows, forgetting, files, types, and what is refused, of one registered learner.

    Attributes:
        name: Registered name. Or override the fixture `make`.
    """

    name: ClassVar[str]

    @pytest.fixture
    def make(self) -> Make:
        """The function under test, of :class:`~zoo.learners.statistics.ClassStatistics`."""
        return register_learner.get(self.name).made

    def test_classes_that_lie_apart_are_told_apart(self, make: Make) -> None:
        rows = stream()
        head = make(ClassStatistics().update(*rows))
        scores = head(rows[0])
        assert head.classes.tolist() == [3, 5, 8]
        assert scores.shape == (80, 3)
        assert torch.equal(head.predict(rows[0]), head.classes[scores.argmax(1)])
        assert (head.predict(rows[0]) == rows[1]).double().mean() > 0.95
        assert head.predict_proba(rows[0]).sum(1).sub(1).abs().max() < 1e-12

    def test_a_row_is_answered_alone(self, make: Make) -> None:
        rows = stream()
        head = make(ClassStatistics().update(*rows))
        alone = torch.cat([head(row[None]) for row in rows[0]])
        torch.testing.assert_close(head(rows[0]), alone, rtol=1e-9, atol=1e-9)
        assert head(rows[0][:0]).shape == (0, 3)

    def test_any_order_and_parts_of_rows_are_the_same(self, make: Make) -> None:
        rows = stream()
        order = torch.randperm(80, generator=torch.Generator().manual_seed(2))
        parts = [ClassStatistics().update(*(t[order[i::3]] for t in rows)) for i in range(3)]
        merged = parts[2].merge(parts[0]).merge(parts[1])
        whole = make(ClassStatistics().update(*rows))
        torch.testing.assert_close(make(merged)(rows[0]), whole(rows[0]), rtol=1e-6, atol=1e-6)

    def test_forgotten_rows_were_never_seen(self, make: Make) -> None:
        rows = stream()
        gone = torch.arange(80) % 3 == 0
        left = ClassStatistics().update(*rows).downdate(*(t[gone] for t in rows))
        never = ClassStatistics().update(*(t[~gone] for t in rows))
        torch.testing.assert_close(make(left)(rows[0]), make(never)(rows[0]), rtol=1e-6, atol=1e-6)

    def test_the_sums_stay_and_nothing_is_drawn(self, make: Make) -> None:
        rows = stream()
        statistics = ClassStatistics().update(*rows)
        before, state = copy.deepcopy(statistics.state_dict()), torch.get_rng_state()
        first, second = make(statistics)(rows[0]), make(statistics)(rows[0])
        assert torch.equal(first, second)
        assert torch.equal(state, torch.get_rng_state())
        assert all(torch.equal(value, before[key]) for key, value in statistics.state_dict().items())

    def test_a_head_is_a_module(self, make: Make) -> None:
        F, y, t = stream()
        head, other = make(ClassStatistics().update(F, y, t)), make(ClassStatistics().update(F.flip(1), y, t))
        file = io.BytesIO()
        torch.save(head.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(other(F), head(F))
        torch.testing.assert_close(head.float()(F.float()).double(), other(F), rtol=1e-3, atol=1e-3)

    def test_wrong_features_and_no_rows_are_told(self, make: Make) -> None:
        rows = stream()
        with pytest.raises(ValueError, match=r"takes features \(n, 4\)"):
            make(ClassStatistics().update(*rows))(rows[0][:, :2])
        with pytest.raises(ValueError, match="no rows were learned"):
            make(ClassStatistics())

    @pytest.mark.parametrize("n", [1, 2, 3])
    def test_a_handful_of_rows_is_enough(self, make: Make, n: int) -> None:
        F, y = 100 * torch.eye(4, dtype=torch.float64)[:n], torch.arange(n)
        head = make(ClassStatistics().update(F, y))
        assert head.predict(F).tolist() == y.tolist()

    def test_a_stream_takes_it_by_name(self, make: Make) -> None:
        """In `KernelStreamClassifier`, class after class."""
        rows = stream()
        (name,) = [entry.name for entry in register_learner.entries().values() if entry.made is make]
        X, y = rows[0].numpy(), np.array([f"class {c}" for c in rows[1].tolist()])
        whole = KernelStreamClassifier(head=name, n_features=50, random_state=0).fit(X, y)
        other = whole.empty_copy()
        for label in sorted(set(y), reverse=True):
            other.partial_fit(X[y == label], y[y == label])
        assert whole.score(X, y) > 0.9
        np.testing.assert_allclose(other.predict_proba(X), whole.predict_proba(X), rtol=0, atol=1e-6)
