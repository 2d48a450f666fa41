"""Ridge classifiers on frozen random features, whose statistics add up over tasks, so that nothing can be forgotten.

:class:`IncrementalRidge` is the simple baseline that every claim is to be compared with. :class:`GaussianGKCL` is ours:
the idea of GKCL, a generator and a kernel classifier for each task, in closed form.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.learners.kernel_ridge import SupportError
from zoo.learners.ridge import best_ridge, solve_feature_ridge, solve_ridge
from zoo.models.continual.base import ContinualLearner, check_shape, create_learner, learner_cfg
from zoo.ops.numerics import autocast_disabled

__all__ = ["GaussianGKCL", "GaussianGenerator", "IncrementalRidge"]

CHOOSING_ROWS = 1500  # of the first task, by which the ridge is chosen


class IncrementalRidge(ContinualLearner):
    """Ridge regression on frozen random ReLU features: one classifier per task, and one shared by all.

    phi(x) = ReLU(R x + b) / sqrt(M) with R, b drawn once. The Gram matrix sum phi phi^T and the products sum phi y^T
    add up over tasks, so the shared classifier is exactly the one that all data together would give, and the
    classifier of a task never changes. One pass, no gradient steps.

    Args:
        num_classes: Output columns.
        in_chans: Channels of the images.
        img_size: Side of the images.
        tasks: Most tasks.
        num_bases: Random features M.
        ridge: Positive number; None chooses it on the first task, by leave-one-out.
        bias_scale: Standard deviation of b, in units of that of R x for an image of unit norm.
        shared: Keep the M x M Gram matrix and the shared classifier.
        device: Where everything lives.
        dtype: Its type.

    Raises:
        ValueError: A number is not positive.
    """

    training_defaults: ClassVar[dict[str, Any]] = {"lr": 1e-9, "decay": 1.0, "offset": 0, "floor": 0.0, "momentum": 0.0}
    task_weight: Tensor
    gram: Tensor
    cross: Tensor
    ridge_used: Tensor
    projection: Tensor
    offset: Tensor

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: int = 28,
        tasks: int = 20,
        num_bases: int = 1000,
        ridge: float | None = None,
        bias_scale: float = 1.0,
        shared: bool = True,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(num_classes, in_chans, img_size, tasks, device=device, dtype=dtype)
        if num_bases < 1 or (ridge is not None and not ridge > 0):
            raise ValueError(f"num_bases={num_bases} and ridge={ridge} must be positive")
        self.num_features, self.ridge, self.shared = num_bases, ridge, shared
        self.register_buffer("projection", torch.randn(num_bases, self.inputs, **self.dd))
        self.register_buffer("offset", bias_scale * torch.randn(num_bases, **self.dd))
        self.build_head()

    def build_head(self) -> None:
        """No data yet: all statistics are zero."""
        M, C = self.num_features, self.num_classes
        self.register_buffer("task_weight", torch.zeros(self.tasks, C, M, **self.dd))
        self.register_buffer("ridge_used", torch.full((), self.ridge or 0.0, **self.dd))
        if self.shared and C:
            self.register_buffer("gram", torch.zeros(M, M, **self.dd))
            self.register_buffer("cross", torch.zeros(M, C, **self.dd))
        self.head = nn.Linear(M, C, bias=False, **self.dd) if C else nn.Identity()
        if C and not self.head.weight.is_meta:
            nn.init.zeros_(self.head.weight)  # type: ignore[arg-type]

    def forward_features(self, x: Tensor) -> Tensor:
        """Random features (B, M)."""
        return F.linear(x.flatten(1), self.projection, self.offset).relu() / math.sqrt(self.num_features)

    def losses(self, x: Tensor, y: Tensor, task: int) -> dict[str, Tensor]:
        """None: everything happens in `end_task`."""
        return {}

    def begin_task(self, task: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing is to be trained."""
        self._check_new(task)
        super().begin_task(task, x, y)
        return x[:0], y[:0]

    def _check_new(self, task: int) -> None:
        if task < self.tasks_seen:
            raise SupportError(f"task {task} was learnt already: its statistics cannot be added twice")

    @torch.no_grad()
    def end_task(self, task: int, x: Tensor, y: Tensor) -> None:
        """Add the task's statistics and solve."""
        self._check_new(task)
        C = self.num_classes
        phi = self.forward_features(x)
        Y = F.one_hot(y, C).to(phi.dtype)
        if float(self.ridge_used) == 0:
            self.ridge_used.fill_(best_ridge(phi[:CHOOSING_ROWS] @ phi[:CHOOSING_ROWS].mT, Y[:CHOOSING_ROWS]))
        self.task_weight[task] = solve_feature_ridge(phi, Y, self.ridge_used, dtype=phi.dtype).mT
        if self.shared:
            with autocast_disabled(phi.device):
                self.gram += phi.mT @ phi
                self.cross += phi.mT @ Y
        super().end_task(task, x, y)
        if self.shared:
            self.solve_shared()

    @torch.no_grad()
    def solve_shared(self) -> None:
        """Put the shared classifier of all tasks so far into `head`."""
        self.head.weight.copy_(solve_ridge(self.gram, self.cross, self.ridge_used).mT)  # type: ignore[operator]

    def task_logits(self, features: Tensor, task: int | None) -> Tensor:
        """The task's own classifier, or the shared one."""
        if task is not None:
            return features @ self.task_weight[task].mT
        return self.head(features)

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Drop the statistics: no further task can be learnt."""
        for name in ("gram", "cross"):
            if name in self._buffers:
                delattr(self, name)
        self.shared = False


class GaussianGenerator(nn.Module):
    """Images of a class of a task as a Gaussian: its mean, and the task's covariance of low rank plus noise.

    Fitted in closed form, so nothing drifts (probabilistic principal components, Tipping and Bishop, 1999).

    Args:
        inputs: Numbers of an image D.
        num_classes: K.
        tasks: T.
        rank: Of the covariance.
        device: Where the numbers live.
        dtype: Their type.
    """

    mean: Tensor
    basis: Tensor
    variance: Tensor
    noise: Tensor
    log_prior: Tensor

    def __init__(self, inputs: int, num_classes: int, tasks: int, rank: int, *, device=None, dtype=None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        rank = min(rank, inputs)
        self.register_buffer("mean", torch.zeros(tasks, num_classes, inputs, **dd))
        self.register_buffer("basis", torch.zeros(tasks, inputs, rank, **dd))
        self.register_buffer("variance", torch.ones(tasks, rank, **dd))
        self.register_buffer("noise", torch.ones(tasks, **dd))
        self.register_buffer("log_prior", torch.zeros(tasks, num_classes, **dd))

    @torch.no_grad()
    def fit(self, task: int, x: Tensor, y: Tensor, floor: float = 1e-3) -> None:
        """Estimate a task's Gaussians from images (N, D) and classes (N,)."""
        K, rank = self.mean.shape[1], self.variance.shape[1]
        one_hot = F.one_hot(y, K).to(torch.float64)
        count, x = one_hot.sum(0), x.double()
        mean = (one_hot.mT @ x) / count.clamp_min(1).unsqueeze(-1)
        centred = x - mean[y]
        values, vectors = torch.linalg.eigh(centred.mT @ centred / len(x))
        self.mean[task] = mean.to(self.mean)
        self.basis[task] = vectors[:, -rank:].to(self.basis)
        noise = values[:-rank].clamp_min(0).mean() if rank < len(values) else values.new_zeros(())
        self.noise[task] = noise.clamp_min(floor)
        self.variance[task] = (values[-rank:] - self.noise[task].double()).clamp_min(0)
        self.log_prior[task] = (count / len(x)).log().to(self.log_prior)

    def log_density(self, x: Tensor, task: int) -> Tensor:
        """Log p(x, y | task) (B, K) of images (B, D), without the constant that all tasks share.

        In float64: differences of large squares are divided by a small variance.
        """
        U, s, noise, mean = (t[task].double() for t in (self.basis, self.variance, self.noise, self.mean))
        origin = mean.mean(0)
        x, m = x.double() - origin, mean - origin
        xu, mu = x @ U, m @ U
        shrink = s / (s + noise)
        inner = x @ m.mT - (xu * shrink) @ mu.mT
        square = (x.square().sum(-1) - (xu.square() * shrink).sum(-1)).unsqueeze(-1) - 2 * inner
        square = square + m.square().sum(-1) - (mu.square() * shrink).sum(-1)
        log_det = (s + noise).log().sum() + (x.shape[-1] - len(s)) * noise.log()
        return self.log_prior[task] - 0.5 * (square / noise + log_det)

    @torch.no_grad()
    def generate(self, task: int, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images (N, D) in [0, 1] of classes (N,), without the pixel noise."""
        eps = torch.randn(len(y), self.variance.shape[1], generator=generator, device=y.device, dtype=self.mean.dtype)
        return (self.mean[task][y] + (eps * self.variance[task].sqrt()) @ self.basis[task].mT).clamp(0, 1)


class GaussianGKCL(IncrementalRidge):
    """GKCL in closed form: a Gaussian generator per task, and a kernel ridge classifier on frozen random features.

    Ours, not the paper's. The generator says which task an image belongs to, so the task id is not needed; the
    classifier of a task is the ridge solution on its features, kept in place of its support. No image is stored,
    nothing is trained by gradients, and nothing can be forgotten: the only loss over time is confusion of tasks.

    With the paper it shares that each task has a generator and a kernel classifier, and that no image is kept. Its
    classifier sees the task's images and none that were generated: with the task known it answers as
    :class:`IncrementalRidge`, to the digit.

        p(y | x) = sum_t p(t | x) softmax_y(sharpness f_t(x)),    p(t | x) ~ p(x | t)^(1 / temperature)

    Args:
        rank: Of each task's covariance.
        temperature: Of the choice of tasks; larger asks more tasks for their opinion.
        sharpness: Factor of the ridge scores, which lie about 0 and 1.
        **kwargs: Of :class:`IncrementalRidge`.
    """

    unit_range = True

    def __init__(
        self,
        *args: Any,
        rank: int = 50,
        temperature: float = 10.0,
        sharpness: float = 10.0,
        shared: bool = False,
        **kwargs: Any,
    ) -> None:
        self.rank, self.temperature, self.sharpness = rank, temperature, sharpness
        super().__init__(*args, **{**kwargs, "shared": shared})

    def build_head(self) -> None:
        """No data yet: statistics and generator are empty."""
        super().build_head()
        if self.num_classes:
            self.generator = GaussianGenerator(self.inputs, self.num_classes, self.tasks, self.rank, **self.dd)

    def end_task(self, task: int, x: Tensor, y: Tensor) -> None:
        """Fit the task's generator and its classifier."""
        self.generator.fit(task, x.flatten(1), y)
        super().end_task(task, x, y)

    def task_scores(self, x: Tensor) -> Tensor:
        """Log p(t | x) (B, tasks seen) with equal priors."""
        flat = x.flatten(1)
        low = torch.finfo(torch.float64).min / 2  # onnxruntime's logsumexp cannot take -inf, of classes of other tasks
        every = [self.generator.log_density(flat, t).clamp_min(low).logsumexp(-1) for t in range(self.tasks_seen)]
        return (torch.stack(every, -1) / self.temperature).log_softmax(-1).to(x.dtype)

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        """Logits (B, num_classes); log-probabilities where the task is not known."""
        x = check_shape(x, self.in_chans, self.img_size)
        if task is not None or not self.num_classes or not self.tasks_seen:
            return super().forward(x, task)
        phi = self.forward_features(x)
        weights = self.task_weight[: self.tasks_seen]
        scores = torch.einsum("bm,tcm->btc", phi, weights).masked_fill(~self.active[: self.tasks_seen], -1e4)
        log_p = (self.sharpness * scores).log_softmax(-1) + self.task_scores(x).unsqueeze(-1)
        return log_p.logsumexp(1)

    @torch.no_grad()
    def generate(self, task: int, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images (N, C, H, W) of classes (N,) of a task that was seen."""
        self.check_seen(task)
        return self.generator.generate(task, labels, generator).view(-1, self.in_chans, self.img_size, self.img_size)


# ---- registry ----------------------------------------------------------------------------------------------


_OURS = (
    "Ours, not the paper's GKCL. What it shares with it: a generator and a kernel classifier for each task, and no "
    "stored image. With the task known it answers as analytic_ridge does, to the digit; no generated sample reaches "
    "its classifier."
)


default_cfgs = generate_default_cfgs({"gkcl_gaussian": learner_cfg(notes=(_OURS,)), "analytic_ridge": learner_cfg()})


@register_model
def gkcl_gaussian(pretrained: bool = False, **kwargs: Any) -> GaussianGKCL:
    """GKCL in closed form, ours: Gaussian generators and ridge classifiers on random features."""
    return create_learner(GaussianGKCL, "gkcl_gaussian", pretrained, kwargs)


@register_model
def analytic_ridge(pretrained: bool = False, **kwargs: Any) -> IncrementalRidge:
    """Ridge regression on 1000 frozen random features, per task and shared."""
    return create_learner(IncrementalRidge, "analytic_ridge", pretrained, kwargs)
