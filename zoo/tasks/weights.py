"""Weights of classes in a loss: given by name or in order, or balanced by the training part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from annotated_types import Gt, Len
from torch import Tensor

from zoo.support.suggest import suggestion

__all__ = ["ClassWeights", "balanced_weights", "given_weights", "training_classes"]

Weight = Annotated[float, Gt(0)]
ClassWeights = Literal["balanced"] | dict[str | int, Weight] | Annotated[list[Weight], Len(1)]


class WeightsError(ValueError):
    """Weights that do not fit the classes."""


def given_weights(wanted: ClassWeights | None, names: Sequence[str] | None, count: int) -> Tensor | None:
    """Weights (count,) that a configuration gives; classes that it does not name have 1. None for none or `balanced`.

    Args:
        wanted: The configuration's value.
        names: Names of the classes, in order, if they are known.
        count: Number of classes.

    Raises:
        WeightsError: They name a class that is not there, or are not one for each class.
    """
    if wanted is None or wanted == "balanced":
        return None
    if isinstance(wanted, Mapping):
        known = [str(name) for name in names or range(count)]
        if unknown := [name for name in wanted if str(name) not in known]:
            raise WeightsError(f"task.class_weights names the class {unknown[0]!r}{suggestion(unknown[0], known)}")
        given = {str(name): weight for name, weight in wanted.items()}
        weights = torch.tensor([float(given.get(name, 1.0)) for name in known])
    else:
        weights = torch.tensor(list(wanted), dtype=torch.float32)
    if len(weights) != count:
        raise WeightsError(f"task.class_weights has {len(weights)} numbers for {count} classes")
    return weights


def balanced_weights(targets: Tensor, count: int) -> Tensor:
    """Weights (count,) such that every class has the same total, and the mean over the samples is 1.

    As scikit-learn's `class_weight="balanced"`; a class without samples has 1.

    Args:
        targets: Class of every training sample, (N,).
        count: Number of classes.
    """
    present = torch.bincount(targets, minlength=count).double()
    return torch.where(present > 0, len(targets) / ((present > 0).sum() * present.clamp(min=1)), 1.0).float()


def training_classes(data: Any) -> Tensor:
    """Classes of a data module's training part, (N,) int64.

    Raises:
        WeightsError: The data module does not tell them.
    """
    parts = getattr(data, "datasets", None) or {}
    targets = getattr(parts.get("train"), "targets", None)
    if not isinstance(targets, Tensor) or targets.is_floating_point():
        raise WeightsError(
            f"task.class_weights = balanced: {type(data).__name__} has no classes to count; give the weights as a list"
        )
    return targets
