r"""Kernel ridge regression as a classifier with a small support set, of real or generated points.

    alpha  = (K(Z_s, Z_s) + lambda I)^-1 Y                            support (N, d), one-hot labels Y (N, C)
    logits = gamma K(Z_q, Z_s) alpha + beta                           queries (Q, d)

Derakhshani, Zhen, Shao, Snoek, "Kernel Continual Learning", ICML 2021. One Cholesky factor serves all classes, in
float64 and with autocast off; the backward pass reuses it instead of differentiating through the factorisation.

>>> head = KernelRidgeHead("laplacian")
>>> logits = head(support, labels, queries)                           # (Q, C), differentiable in everything
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels import Kernel, Linear, create_kernel
from zoo.kernels.linalg import solver_dtype
from zoo.learners.ridge import solve_ridge
from zoo.ops.dispatch import values_known
from zoo.ops.numerics import at_least_float32, autocast_disabled

__all__ = ["KernelRidgeHead", "Solution", "SolutionCache", "SupportError", "check_finite", "masked"]

_MASKED = -1e11  # logit of a class that does not belong to the task


class SupportError(ValueError):
    """Invalid support points or features; the message names the problem."""


class Solution(NamedTuple):
    """A fitted classifier without its training data, kept for each task in evaluation."""

    support: Tensor  # (N, d)
    alpha: Tensor  # (N, C), at least float32
    gamma: Tensor  # ()
    beta: Tensor  # ()
    weight: Tensor | None = None  # (C, d): alpha^T support, for the linear kernel


def masked(logits: Tensor, active: Tensor | None) -> Tensor:
    """Logits (B, C) with columns outside of `active` (C,) or (B, C) at -1e11, or the lowest number of the dtype."""
    return logits if active is None else logits.masked_fill(~active, max(_MASKED, torch.finfo(logits.dtype).min))


def check_finite(features: Tensor, what: str) -> None:
    """Refuse features (B, d) that hold NaN or infinity.

    Args:
        features: Features to check.
        what: Their name in the message.

    Raises:
        SupportError: A feature is not finite.
    """
    if not values_known(features) or bool(features.detach().sum().isfinite()):
        return  # the sum of finite numbers may overflow, so check each only if it is not finite
    bad = ~torch.isfinite(features.detach())
    if bool(bad.any()):
        rows = int(bad.any(-1).sum())
        raise SupportError(
            f"{rows} of {len(features)} {what} features hold NaN or infinity: check the inputs and the rate"
        )


def _check_features(name: str, points: Tensor) -> None:
    if points.ndim != 2 or not points.is_floating_point():
        raise SupportError(f"{name} is {points.dtype} of shape {tuple(points.shape)}; features are floating (N, d)")


def _check_targets(targets: Tensor, count: int) -> None:
    if targets.ndim != (2 if targets.is_floating_point() else 1):
        raise SupportError(f"targets are {targets.dtype} of shape {tuple(targets.shape)}; give floating (N, C) or "
                           "classes (N,)")  # fmt: skip
    if len(targets) != count:
        raise SupportError(f"there are {count} support points and {len(targets)} targets")


def _check_active(active: Tensor, columns: int) -> None:
    if active.dtype != torch.bool or active.shape[-1:] != (columns,) or active.ndim > 2:
        raise SupportError(
            f"active is {active.dtype} of shape {tuple(active.shape)}; it must be torch.bool, one for each of the "
            f"{columns} classes"
        )


def _check_classes(name: str, classes: Tensor, count: int, columns: int | None) -> None:
    """Refuse classes that are not (count,) integers from 0 to columns - 1 of dtype int64."""
    if classes.dtype != torch.int64 or classes.shape != (count,):
        raise SupportError(f"{name} is {classes.dtype} of shape {tuple(classes.shape)}; it must be int64 ({count},)")
    if not values_known(classes) or not count:
        return
    low, high = (int(v) for v in torch.aminmax(classes))
    if low < 0 or (columns is not None and high >= columns):
        allowed = "of at least 0" if columns is None else f"from 0 to {columns - 1}"
        raise SupportError(f"{name} holds {low if low < 0 else high}; classes are numbers {allowed}")


class KernelRidgeHead(nn.Module):
    """Kernel ridge regression with one ridge, scale and shift per task.

    The ridge is |lambda_t| + 0.01, as in the authors' KCL code. Columns of classes without support points are exactly
    beta_t.

    Args:
        kernel: Name of a registered kernel (:func:`zoo.kernels.create_kernel`), or a kernel.
        n_tasks: Length of the vectors `lam`, `gamma`, `beta`.
        lambda_init: Initial value of `lam`.
        width: For kernels that have one.
        learn: Train the three vectors; otherwise they are buffers.
        floor: Added to |lambda_t|.
        device: Device of the numbers.
        dtype: Their dtype.

    Raises:
        ValueError: The kernel is unknown.
    """

    lam: Tensor
    gamma: Tensor
    beta: Tensor

    def __init__(
        self,
        kernel: str | Kernel = "linear",
        n_tasks: int = 1,
        lambda_init: float = 0.1,
        *,
        width: float | None = None,
        learn: bool = True,
        floor: float = 0.01,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.floor = floor
        self.kernel = create_kernel(kernel, width, device=device, dtype=dtype) if isinstance(kernel, str) else kernel
        for name, value in (("lam", lambda_init), ("gamma", 1.0), ("beta", 0.0)):
            start = torch.full((n_tasks,), value, device=device, dtype=dtype)
            if learn:
                self.register_parameter(name, nn.Parameter(start))
            else:
                self.register_buffer(name, start)

    def ridge(self, task: int = 0) -> Tensor:
        """|lambda_t| + floor, shape ()."""
        return self.lam[task].abs() + self.floor

    def solve(
        self,
        support: Tensor,
        targets: Tensor,
        task: int = 0,
        num_classes: int | None = None,
        *,
        gamma_of: int | None = None,
    ) -> Solution:
        """Fit the support points.

        Args:
            support: Features (N, d).
            targets: One-hot or any other targets (N, C), or class indices (N,).
            task: Selects ridge, scale and shift.
            num_classes: Number of columns if targets are indices; default: the largest index + 1.
            gamma_of: Task whose scale and shift are used instead; the authors' KCL code uses the current task in
                evaluation.

        Raises:
            SupportError: The support is empty, or a feature is not finite.
        """
        Y = self._targets(support, targets, task, num_classes)
        task = task if gamma_of is None else gamma_of
        support = at_least_float32(support)
        # without gradients float64 is cheap for the Gram matrix, whose errors are amplified by 1 / ridge
        points = support if torch.is_grad_enabled() else support.to(solver_dtype(support.device))
        alpha = solve_ridge(self.kernel(points), Y, self.ridge(task))
        weight = None
        if isinstance(self.kernel, Linear):
            with autocast_disabled(support.device):
                weight = (alpha.mT @ points.to(alpha.dtype)).to(support.dtype)
        return Solution(support, alpha.to(support.dtype), self.gamma[task], self.beta[task], weight)

    def predict(self, queries: Tensor, solution: Solution, active: Tensor | None = None) -> Tensor:
        """Logits (Q, C) of features (Q, d); with `active` (C,) the columns of other classes are -1e11.

        Raises:
            SupportError: A feature is not finite.
        """
        _check_features("queries", queries)
        if queries.shape[1] != solution.support.shape[1]:
            raise SupportError(f"queries have {queries.shape[1]} features, the support has {solution.support.shape[1]}")
        if active is not None:
            _check_active(active, solution.alpha.shape[-1])
        check_finite(queries, "query")
        with autocast_disabled(queries.device):
            points = at_least_float32(queries)
            if solution.weight is not None:
                scores = points @ solution.weight.mT.to(points.dtype)
            else:
                scores = self.kernel(points, at_least_float32(solution.support)) @ solution.alpha.to(points.dtype)
            logits = (solution.gamma * scores + solution.beta).to(queries.dtype)
        return masked(logits, active)

    def forward(
        self, support: Tensor, targets: Tensor, queries: Tensor, task: int = 0, active: Tensor | None = None
    ) -> Tensor:
        """Fit and predict: see :meth:`solve` and :meth:`predict`."""
        columns = None if active is None else len(active)
        return self.predict(queries, self.solve(support, targets, task, columns), active)

    def _targets(self, support: Tensor, targets: Tensor, task: int, num_classes: int | None) -> Tensor:
        """Validated targets (N, C) of a support."""
        self._check_task(task)
        _check_features("support", support)
        if not len(support):
            raise SupportError(f"the coreset of task {task} is empty: a kernel classifier needs points of each class")
        _check_targets(targets, len(support))
        check_finite(support, "support")
        if targets.is_floating_point():
            if num_classes is not None and targets.shape[-1] != num_classes:
                raise SupportError(f"targets have {targets.shape[-1]} columns, there are {num_classes} classes")
            return targets
        _check_classes("targets", targets, len(support), num_classes)
        return F.one_hot(targets, num_classes or int(targets.max()) + 1)

    def _check_task(self, task: int) -> None:
        if not -len(self.lam) <= task < len(self.lam):
            raise SupportError(f"task={task}: the classifier was built for {len(self.lam)} tasks")

    def extra_repr(self) -> str:
        return f"n_tasks={len(self.lam)}"


class SolutionCache:
    """Cache of solutions by task, for evaluation; valid until a weight of the module changes."""

    def __init__(self) -> None:
        self._kept: dict[int, Any] = {}
        self._stamp: tuple[Any, ...] = ()  # state of the weights that the solutions belong to

    def get(self, module: nn.Module, tasks: Iterable[int], solve: Callable[[int], Any]) -> list[Any]:
        """Solutions of tasks; solved anew in training, with gradients, and while tracing.

        Args:
            module: Its weights determine the solutions.
            tasks: Tasks, used as keys.
            solve: From a task to its solution.
        """
        groups = (group for m in module.modules() for group in (m._parameters, m._buffers))
        tensors = [t for group in groups for t in group.values() if t is not None]
        if module.training or torch.is_grad_enabled() or not values_known(*tensors[:1]):
            return [solve(task) for task in tasks]
        if any(t.is_inference() for t in tensors):  # weights made in inference mode do not tell when they change
            return [solve(task) for task in tasks]
        stamp = tuple((t.data_ptr(), t._version) for t in tensors)
        if stamp != self._stamp:
            self._kept, self._stamp = {}, stamp
        return [self._kept[t] if t in self._kept else self._kept.setdefault(t, solve(t)) for t in tasks]
