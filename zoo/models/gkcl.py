"""KCL, GKCL and analytic ridge: tasks learnt one after the other by kernel ridge classifiers.

KCL: Derakhshani, Zhen, Shao, Snoek, "Kernel Continual Learning", ICML 2021, arXiv 2107.05757. A few images of each task
are stored and become the support of a kernel ridge classifier on the features of a shared network; what follows from
the paper's code is exact, and its quirks are options (`feature_norm="minmax_batch"`, `eval_task_params="current"`,
`eval_basis="sample"`, `second_conv=False`).

GKCL: the same authors, "Generative Kernel Continual Learning", arXiv 2112.13410. A generative model takes the place of
the stored images. No code of it was ever published: :class:`GKCL` is a reconstruction from its abstract, not a
reproduction of its numbers. :class:`GaussianGKCL` is ours: the same idea in closed form.

    support of task t = images stored (KCL), or latents z ~ p(z | y) of a conditional VAE (GKCL)
    logits(x)         = gamma_t k(f(x), support) (k(support, support) + lambda_t I)^-1 Y + beta_t

:class:`AnalyticRidge` is the simple baseline that every claim is to be compared with: a ridge classifier on frozen
random features, whose sufficient statistics add up, so that nothing can be forgotten.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from zoo.kernels.base import no_autocast
from zoo.kernels.coreset import ClassifierStep, DualPerceptron, minmax, unit_rows
from zoo.kernels.linalg import cholesky
from zoo.kernels.ridge import (
    KernelRidgeHead,
    Solution,
    SupportError,
    VariationalRandomFeatures,
    diagonal_gaussian_kl,
    leave_one_out_ridge,
    masked,
)
from zoo.kernels.watching import is_recorded, shared_value
from zoo.models.continual import (
    MLP,
    ContinualLearner,
    Recipe,
    choose_per_class,
    learner_cfg,
    need_per_class,
)

__all__ = [
    "GKCL",
    "KCL",
    "AnalyticRidge",
    "ConditionalVAE",
    "ConvolutionalVAE",
    "GaussianGKCL",
    "GaussianGenerator",
    "ReducedResNet",
    "categorical_kl_uniform",
    "log_normal",
    "normalise_features",
    "reconstruction_loss",
    "replay_weight",
    "supervised_contrastive",
]

FeatureNorm = Literal["minmax_batch", "l2", "none"]


# ---- functions ---------------------------------------------------------------------------------------------


def normalise_features(h: Tensor, how: FeatureNorm) -> Tensor:
    """Normalise features (B, d).

    Args:
        h: Features.
        how: `minmax_batch` maps the smallest number of the whole batch to 0 and the largest to 1, so that a sample
            depends on its batch (the KCL code); `l2` divides each row by its norm; `none`.

    Raises:
        ValueError: `how` is none of these.
    """
    if how == "minmax_batch":
        return minmax(h)
    if how == "l2":
        return unit_rows(h)
    if how != "none":
        raise ValueError(f"feature_norm={how!r} is not one of 'minmax_batch', 'l2', 'none'")
    return h


def supervised_contrastive(z: Tensor, labels: Tensor, temperature: float = 0.5, *, reduce: bool = True) -> Tensor:
    """Supervised contrastive loss, the form with the sum outside the logarithm (Khosla et al., 2020, eq. 2).

    Args:
        z: Representations (B, d), normalised here.
        labels: (B,).
        temperature: Of the soft-max.
        reduce: Mean over the anchors that have a positive, 0 if none has; else each anchor's loss (B,), NaN where
            there is no positive.
    """
    u = F.normalize(z, dim=-1)
    similarity = u @ u.mT / temperature
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_p = similarity - similarity.masked_fill(itself, -torch.inf).logsumexp(-1, keepdim=True)
    positive = (labels.unsqueeze(0) == labels.unsqueeze(1)) & ~itself
    count = positive.sum(-1)
    anchors = -log_p.masked_fill(~positive, 0).sum(-1) / count.clamp_min(1)
    if not reduce:
        return anchors.masked_fill(count == 0, torch.nan)
    return (anchors * (count > 0)).sum() / (count > 0).sum().clamp_min(1)


def reconstruction_loss(
    logits: Tensor, x: Tensor, likelihood: Literal["bernoulli", "gaussian"] = "bernoulli"
) -> Tensor:
    """Negative log-likelihood (B,) of images (B, D), up to a constant: cross-entropy, or half the squared error."""
    if likelihood == "gaussian":
        return 0.5 * (logits.sigmoid() - x).square().sum(-1)
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)


def categorical_kl_uniform(logits: Tensor) -> Tensor:
    """KL (B,) of soft-max probabilities (B, C) from the uniform distribution."""
    log_q = logits.log_softmax(-1)
    return (log_q.exp() * log_q).sum(-1) + math.log(logits.shape[-1])


def log_normal(z: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log-density (B,) of z (B, d) under N(mean, exp(log_variance))."""
    return -0.5 * (math.log(2 * math.pi) + log_variance + (z - mean).square() / log_variance.exp()).sum(-1)


def replay_weight(task: int) -> float:
    """Weight of the current task's loss against the replayed one's: 1 / t for the t-th task, `task` from 0."""
    return 1 / (task + 1)


# ---- networks ----------------------------------------------------------------------------------------------


class ReducedBlock(nn.Module):
    """ReLU(conv) - BN - dropout, shortcut, ReLU - BN - dropout: the block as KCL's code executes it.

    That code also builds a second convolution and never calls it; `second_conv` gives it its place.
    """

    def __init__(
        self, inputs: int, outputs: int, stride: int, drop_rate: float, second_conv: bool, dd: dict[str, Any]
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False, **dd)
        self.bn, self.bn_out = nn.BatchNorm2d(outputs, **dd), nn.BatchNorm2d(outputs, **dd)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False, **dd) if second_conv else nn.Identity()
        alike = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if alike else nn.Conv2d(inputs, outputs, 1, stride, bias=False, **dd)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H / stride, W / stride)."""
        y = self.conv2(self.drop(self.bn(self.conv(x).relu())))
        return self.drop(self.bn_out((y + self.shortcut(x)).relu()))


class ReducedResNet(nn.Sequential):
    """The narrow residual network of KCL on CIFAR: images (B, C, H, W) to features (B, 8 width)."""

    def __init__(
        self,
        in_chans: int = 3,
        width: int = 20,
        drop_rate: float = 0.0,
        second_conv: bool = False,
        *,
        device=None,
        dtype=None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        layers: list[nn.Module] = [
            nn.Conv2d(in_chans, width, 3, 1, 1, bias=False, **dd),
            nn.BatchNorm2d(width, **dd),
            nn.ReLU(),
        ]
        inputs = width
        for stage, stride in enumerate((1, 2, 2, 2)):
            outputs = width * 2**stage
            layers.append(ReducedBlock(inputs, outputs, stride, drop_rate, second_conv, dd))
            layers.append(ReducedBlock(outputs, outputs, 1, drop_rate, second_conv, dd))
            inputs = outputs
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


# ---- kernel learners ---------------------------------------------------------------------------------------


class KernelLearner(ContinualLearner):
    """A learner whose classifier of a task is kernel ridge regression on a support.

    In eval mode without gradients the solution of each task is kept until a weight changes. `reparameterize` keeps
    only the solutions: for the linear kernel and for random features one matrix per task.
    """

    head: KernelRidgeHead
    weight: Tensor
    bias: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.deployed = False
        self._solutions: dict[int, tuple[Tensor | None, Solution]] = {}
        self._solved_for: tuple[Any, ...] = ()  # the weights that these solutions belong to

    def support(self, task: int) -> tuple[Tensor, Tensor]:
        """Features (N, d) and labels (N,) of a task's support."""
        raise NotImplementedError(f"{type(self).__name__} must define support")

    def basis(self, support: Tensor) -> Tensor | None:
        """What the kernel's own feature map takes from the support; None where it has none."""
        return None

    def lift(self, z: Tensor, basis: Tensor | None) -> Tensor:
        """Features as the kernel sees them."""
        return z

    def _stamp(self) -> tuple[Any, ...]:
        groups = (group for m in self.modules() for group in (m._parameters, m._buffers))
        return tuple((t.data_ptr(), t._version) for group in groups for t in group.values() if t is not None)

    def solution(self, task: int) -> tuple[Tensor | None, Solution]:
        """The basis of a task and its fitted classifier, from the weights as they are now."""
        return next(self.solutions([task]))

    def solutions(self, tasks: Iterable[int]) -> Iterator[tuple[Tensor | None, Solution]]:
        """As `solution`, of several tasks."""
        keep = not (self.training or torch.is_grad_enabled() or is_recorded(self.seen) or self.seen.is_meta)
        if keep and self._solved_for != (now := self._stamp()):
            self._solutions, self._solved_for = {}, now
        for task in tasks:
            if not keep or task not in self._solutions:
                z, labels = self.support(task)
                basis, targets = self.basis(z), _one_hot(labels, self.num_classes, z)
                solved = basis, self.head.solve(self.lift(z, basis), targets, task, gamma_of=self._parameters_of(task))
                if not keep:
                    yield solved
                    continue
                self._solutions[task] = solved
            yield self._solutions[task]

    def _parameters_of(self, task: int) -> int:
        return task

    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def task_logits(self, features: Tensor, task: int | None) -> Tensor:
        """Logits (B, C); without a task id those of the most confident task."""
        if task is None:
            tasks = range(max(self.tasks_seen, 1))
            every = self._every(features, tasks)
            if every is None:
                return torch.stack([self.mask(self.task_logits(features, t), t) for t in tasks]).amax(0)
            return every.amax(1)
        if not self.deployed:
            basis, solved = self.solution(task)
            return self.head.predict(self.lift(features, basis), solved)
        lifted = self.lift(features, self.bases[task]) if hasattr(self, "bases") else features  # type: ignore[index]
        if self.weight.numel():
            return lifted @ self.weight[task].mT + self.bias[task]
        kernel = self.kernel(lifted, self.supports[task])  # type: ignore[index]
        return kernel @ self.alphas[task] + self.bias[task]  # type: ignore[index]

    def _every(self, features: Tensor, tasks: range) -> Tensor | None:
        """Masked logits (B, T, C) of all tasks in one product, where all are linear in the same features."""
        if hasattr(self, "bases") or (self.deployed and not self.weight.numel()):
            return None
        if self.deployed:
            weight, bias = self.weight[: len(tasks)], self.bias[: len(tasks)]
        elif self.head.name == "linear":
            solved = [s for _, s in self.solutions(tasks)]
            weight = torch.stack([s.gamma * s.weight for s in solved if s.weight is not None])
            bias = torch.stack([s.beta for s in solved])
        else:
            return None
        with no_autocast(features.device):
            scores = (features.to(weight.dtype) @ weight.flatten(0, 1).mT).unflatten(-1, weight.shape[:2])
            return masked((scores + bias.unsqueeze(-1)).to(features.dtype), self.active[: len(tasks)])

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Keep the solutions of the tasks seen and drop everything that only training needs."""
        if self.deployed or not self.num_classes:
            return
        training = self.training
        self.eval()
        solved = [self.solution(t) for t in range(max(self.tasks_seen, 1))]
        pad = self.tasks - len(solved)
        like = solved[0][1].support
        self.register_buffer(
            "bias", torch.stack([s.beta for _, s in solved] + [torch.zeros_like(solved[0][1].beta)] * pad)
        )
        if self.head.name in ("linear", "rff"):
            weights = [(s.gamma * (s.support.mT @ s.alpha)).mT for _, s in solved]
            self.register_buffer(
                "weight", torch.stack(weights + [torch.zeros_like(weights[0])] * pad).to(self._dtype())
            )
        else:
            alphas = [s.gamma * s.alpha for _, s in solved]
            self.register_buffer("weight", like.new_zeros(0))
            self.register_buffer(
                "supports", torch.stack([s.support for _, s in solved] + [torch.zeros_like(like)] * pad)
            )
            self.register_buffer("alphas", torch.stack(alphas + [torch.zeros_like(alphas[0])] * pad))
            self.kernel = self.head.kernel
        bases = [basis for basis, _ in solved if basis is not None]
        if bases:
            self.register_buffer("bases", torch.stack(bases + [torch.zeros_like(bases[0])] * pad))
        self._drop()
        del self.head
        self.deployed, self._solutions = True, {}
        self.train(training)

    def _drop(self) -> None:
        """Remove what only training needs."""


class KCL(KernelLearner):
    """Kernel continual learning: a stored coreset per task is the support of a kernel ridge classifier.

    Args:
        num_classes: Output columns.
        in_chans: Channels of the images.
        img_size: Side of the images.
        tasks: Most tasks.
        shots: Images stored per class and task; they are not trained on.
        task_classes: Classes of one task; None for all, fewer for split streams.
        kernel: `linear`, `poly`, `laplacian` (alias `rbf`), `gaussian`, or `rff`.
        width: Of the Laplacian (0.25) and the Gaussian kernel (1).
        backbone: `mlp` (784-256-256 for digits), or `resnet` (the reduced residual network for colour images).
        hidden: Width of the perceptron, or of the first stage of the residual network.
        drop_rate: Dropout.
        feature_norm: See :func:`normalise_features`.
        num_bases: Random features D, for `rff`.
        variational: Learn the spectral basis' distribution; False draws it from N(0, I) once.
        tau: Weight of the KL term.
        eval_basis: `fixed_seed`, `mean` (the posterior mean), or `sample`, which is random at evaluation too.
        eval_task_params: `own`, or `current`: old tasks use those of the newest one, as the KCL code does.
        lambda_init: Start of lambda; the ridge is |lambda| + 0.01.
        learn_head: Train lambda, gamma and beta.
        second_conv: Of the residual blocks, see :class:`ReducedBlock`.
        device: Where the weights live.
        dtype: Their type.

    Raises:
        ValueError: An option is unknown.
    """

    recipe = Recipe("sgd", lr=0.1, decay=0.8, offset=1, floor=5e-5, momentum=0.8, batch_size=10, epochs=1)
    unit_range = True
    coreset_x: Tensor
    coreset_y: Tensor
    random_features: VariationalRandomFeatures

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: int = 28,
        tasks: int = 20,
        shots: int = 20,
        task_classes: int | None = None,
        kernel: str = "linear",
        width: float | None = None,
        backbone: Literal["mlp", "resnet"] = "mlp",
        hidden: int | None = None,
        drop_rate: float = 0.0,
        feature_norm: FeatureNorm = "l2",
        num_bases: int = 1024,
        variational: bool = True,
        tau: float = 1e-4,
        eval_basis: Literal["fixed_seed", "mean", "sample"] = "fixed_seed",
        eval_task_params: Literal["own", "current"] = "own",
        lambda_init: float = 0.1,
        learn_head: bool = True,
        second_conv: bool = False,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(num_classes, in_chans, img_size, tasks, device=device, dtype=dtype)
        _one_of("backbone", backbone, ("mlp", "resnet"))
        _one_of("feature_norm", feature_norm, ("minmax_batch", "l2", "none"))
        _one_of("eval_basis", eval_basis, ("fixed_seed", "mean", "sample"))
        _one_of("eval_task_params", eval_task_params, ("own", "current"))
        if shots < 1:
            raise SupportError(
                f"shots={shots}: the coreset would be empty; a kernel classifier needs points of each class"
            )
        self.shots, self.task_classes, self.tau = shots, task_classes, tau
        self.feature_norm: FeatureNorm = feature_norm
        self.eval_basis, self.eval_task_params = eval_basis, eval_task_params
        self.options: dict[str, Any] = {
            "kernel": kernel,
            "width": width,
            "lambda_init": lambda_init,
            "learn": learn_head,
        }
        if backbone == "mlp":
            self.num_features = hidden or 256
            self.backbone: nn.Module = MLP(self.inputs, self.num_features, drop_rate, **self.dd)
        else:
            self.num_features = 8 * (hidden or 20)
            self.backbone = ReducedResNet(in_chans, hidden or 20, drop_rate, second_conv, **self.dd)
        self._dual: tuple[DualPerceptron, Tensor] | None = None  # of a task that is being trained
        self.features_of_batches = backbone == "resnet"  # batch statistics: batch and coreset pass one after the other
        self.smallest_batch = 2 if self.features_of_batches else 1
        if num_classes:
            self.build_head()
        if num_classes and self.head.name == "rff":
            self.random_features = VariationalRandomFeatures(
                self.num_features, num_bases, variational=variational, **self.dd
            )
            self.training_only = ("random_features.prior",)

    def build_head(self) -> None:
        """A fresh head and a coreset of noise, until the first task brings one."""
        self._solutions, self._stream = {}, None
        if not self.num_classes:
            self.head = nn.Identity()  # type: ignore[assignment]
            self.coreset_x = self.coreset_y = torch.empty(0, device=self.dd["device"])
            return
        device, size = self.dd["device"], self.shots * (self.task_classes or self.num_classes)
        noise = torch.randint(0, 256, (size, self.inputs), generator=torch.Generator().manual_seed(0), device="cpu")
        pixels = noise.to(device or torch.get_default_device(), torch.uint8)
        labels = torch.arange(size, device=device) % self.num_classes
        self.register_buffer("coreset_x", pixels.repeat(self.tasks, 1, 1))
        self.register_buffer("coreset_y", labels.repeat(self.tasks, 1))
        self.head = KernelRidgeHead(n_tasks=self.tasks, **self.options, **self.dd)

    # ---- learning -----------------------------------------------------------------------------------------

    def begin_task(self, task: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Store the coreset; what remains is trained on.

        Raises:
            TaskError: See the base class; or a class has fewer than `shots` images.
            SupportError: The images are not in [0, 1], or there are more classes than the coreset has room for.
        """
        super().begin_task(task, x, y)
        chosen = choose_per_class(y, self.shots)
        self.coreset_x[task].zero_()
        self.coreset_y[task] = -1
        self.coreset_x[task, : len(chosen)] = (x[chosen].flatten(1) * 255).round().to(torch.uint8)
        self.coreset_y[task, : len(chosen)] = y[chosen]
        stream = torch.ones(len(y), dtype=torch.bool, device=y.device)
        stream[chosen] = False
        return x[stream], y[stream]

    def check_labels(self, task: int, y: Tensor) -> None:
        """As the base class; each class needs as many images as the coreset takes, and the coreset room for all."""
        super().check_labels(task, y)
        need_per_class(y, self.shots)
        classes = len(y.unique())
        if classes * self.shots > self.coreset_y.shape[1]:
            raise SupportError(f"task {task} has {classes} classes; the coreset has room for {self.task_classes}")

    def coreset(self, task: int) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) in [0, 1] and labels (N,) stored for a task."""
        images, labels = self.coreset_x[task], self.coreset_y[task]
        if self.task_classes is not None and not labels.is_meta and not torch.compiler.is_compiling():
            images, labels = images[labels >= 0], labels[labels >= 0]
        images = images.view(-1, self.in_chans, self.img_size, self.img_size)
        return images.to(self._dtype()) / 255, labels

    def losses(self, x: Tensor, y: Tensor, task: int) -> dict[str, Tensor]:
        """Cross-entropy of the stream batch under the classifier of the coreset, and the weighted KL for `rff`."""
        if self._dual is None:
            return self.support_losses(x, y, *self.coreset(task), task)
        dual, targets = self._dual
        if self.head.name in ("linear", "poly") and self._dtype() in (torch.float32, torch.float64):
            step = ClassifierStep(x.flatten(1), y, targets, self.head, task, self.active[task], self.feature_norm)
            return {"cross_entropy": dual.cross_entropy(step)}
        h = dual(x.flatten(1)).split([len(x), len(targets)])
        zq, zs = (normalise_features(part, self.feature_norm) for part in h)
        return self._losses_of_features(zq, y, zs, targets, task)

    @contextmanager
    def steps(self, task: int, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """The perceptron's first layer is kept in dual form while its task is trained by plain SGD with momentum."""
        plain = isinstance(optimizer, torch.optim.SGD) and not any(
            g["weight_decay"] or g["nesterov"] or g["dampening"] or g["maximize"] for g in optimizer.param_groups
        )
        if not plain or self.recipe.keep_state or not isinstance(self.backbone, MLP) or self._drop_rate() >= 1:
            yield
            return
        images, labels = self.coreset(task)
        first, second = (layer for layer in self.backbone if isinstance(layer, nn.Linear))
        dual = DualPerceptron(first, second, images.flatten(1), self._drop_rate())
        group = next(g for g in optimizer.param_groups if any(p is first.weight for p in g["params"]))
        hook = optimizer.register_step_post_hook(lambda *_: dual.step(group["lr"], group["momentum"]))
        self._dual = dual, _one_hot(labels, self.num_classes, images)
        try:
            yield
        finally:
            self._dual = None
            hook.remove()
            dual.close()

    def _drop_rate(self) -> float:
        return max(layer.p for layer in self.backbone.modules() if isinstance(layer, nn.Dropout))

    def support_losses(
        self, x: Tensor, y: Tensor, images: Tensor, labels: Tensor, task: int, eps: Tensor | None = None
    ) -> dict[str, Tensor]:
        """As `losses`, for any support.

        Args:
            x: Stream images.
            y: Their classes.
            images: Support images.
            labels: Their classes; -1 marks an empty place.
            task: Whose ridge, scale, shift and classes.
            eps: Normal numbers (D, d) of the spectral basis; drawn if None.
        """
        if self.features_of_batches:
            zq, zs = self.forward_features(x), self.forward_features(images)
        else:
            h = self.backbone(torch.cat([x, images]))
            zq, zs = (normalise_features(part, self.feature_norm) for part in h.split([len(x), len(images)]))
        return self._losses_of_features(zq, y, zs, _one_hot(labels, self.num_classes, zs), task, eps)

    def _losses_of_features(
        self, zq: Tensor, y: Tensor, zs: Tensor, targets: Tensor, task: int, eps: Tensor | None = None
    ) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        if self.head.name == "rff":
            features, sizes = self.random_features, [len(zq), len(zs)]
            if features.variational:
                mean, log_variance = features.posterior(zs)
                if self.tau:
                    terms["kl"] = self.tau * diagonal_gaussian_kl(mean, log_variance, *features.prior(zq))
                phi = features.drawn_features(torch.cat([zq, zs]), mean, log_variance, eps)
            else:
                phi = features.features(torch.cat([zq, zs]), features.eps)
            zq, zs = phi.split(sizes)
        logits = self.head(zs, targets, zq, task)
        return {"cross_entropy": F.cross_entropy(self.mask(logits, task), y)} | terms

    # ---- answers ------------------------------------------------------------------------------------------

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised features (B, d)."""
        return normalise_features(self.backbone(x), self.feature_norm)

    def answers(self, x: Tensor, task: int) -> tuple[Tensor, Tensor]:
        """Logits told the task, and not, of the same features."""
        self.check_seen(task)
        features = self.forward_features(x)
        every = self._every(features, range(self.tasks_seen))
        if every is None:
            return self.mask(self.task_logits(features, task), task), self.task_logits(features, None)
        return every[:, task], every.amax(1)

    def support(self, task: int) -> tuple[Tensor, Tensor]:
        """The coreset's features through the network as it is now."""
        images, labels = self.coreset(task)
        return self.forward_features(images), labels

    def _parameters_of(self, task: int) -> int:
        return max(self.tasks_seen - 1, 0) if self.eval_task_params == "current" else task

    def basis(self, support: Tensor) -> Tensor | None:
        """The spectral basis (D, d), for `rff`."""
        if self.head.name != "rff":
            return None
        features = self.random_features
        if not features.variational:
            return features.eps
        eps = {"fixed_seed": features.eps, "mean": torch.zeros_like(features.eps), "sample": None}[self.eval_basis]
        mean, log_variance = features.posterior(support)
        return features.sample(mean, log_variance, eps)

    def lift(self, z: Tensor, basis: Tensor | None) -> Tensor:
        """Random features, for `rff`."""
        return z if basis is None else self.random_features.features(z, basis)

    def _drop(self) -> None:
        if self.head.name == "rff" and self.random_features.variational:
            del self.random_features.posterior, self.random_features.prior, self.random_features.eps
        del self.coreset_x, self.coreset_y

    def kept(self) -> dict[str, int]:
        """Weights and the images stored so far, a byte per pixel."""
        samples = int((self.coreset_y[: self.tasks_seen] >= 0).sum())
        weights = sum(p.numel() * p.element_size() for p in self.parameters())
        return {"samples": samples, "bytes": weights + samples * self.inputs}


# ---- the generator -----------------------------------------------------------------------------------------


class ConditionalVAE(nn.Module):
    """Encoder q(z | x, t), class priors p(z | y), decoder p(x | z, y, t): what replaces stored images.

    The encoder never sees the label. Priors are shared between tasks (`prior_index="class"`): with one prior per task
    and class, images of similar tasks are drawn to the newest of two priors, and rotated digits collapse.

    Args:
        inputs: Numbers of an image.
        num_classes: K.
        tasks: T.
        latent: Size of z.
        hidden: Width of the layers.
        encoder_task: Add a task embedding to the encoder's first layer.
        prior_index: `class`, or `task_class`.
        components: If not 0, the encoder first guesses which of so many classes it sees, q(y | x) q(z | x, y): a soft
            sample of the Gumbel soft-max in the losses of training, the probabilities everywhere else.
        device: Where the weights live.
        dtype: Their type.
    """

    def __init__(
        self,
        inputs: int,
        num_classes: int,
        tasks: int,
        latent: int = 32,
        hidden: int = 400,
        encoder_task: bool = True,
        prior_index: Literal["class", "task_class"] = "class",
        components: int = 0,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.inputs, self.num_classes, self.tasks, self.latent = inputs, num_classes, tasks, latent
        self.prior_index, self.components = prior_index, components
        entry, start = self.build_networks(hidden, dd)
        priors = num_classes if prior_index == "class" else tasks * num_classes
        self.prior_mean = nn.Parameter(torch.randn(priors, latent, **dd))
        self.prior_log_variance = nn.Parameter(torch.zeros(priors, latent, **dd))
        self.condition = nn.Parameter(0.05 * torch.randn(tasks * num_classes, start, **dd))
        self.task = nn.Parameter(0.5 * torch.randn(tasks, entry, **dd)) if encoder_task else None
        if components:
            guess = [nn.Linear(hidden, hidden, **dd), nn.ReLU(), nn.Linear(hidden, components, **dd)]
            self.enc_class = nn.Sequential(*guess)
            self.enc_joint = nn.Sequential(nn.Linear(hidden + components, hidden, **dd), nn.ReLU())

    def build_networks(self, hidden: int, dd: dict[str, Any]) -> tuple[int, int]:
        """Make encoder and decoder; returns the widths of their first layers, which task and condition add to."""
        self.enc1, self.enc2 = nn.Linear(self.inputs, hidden, **dd), nn.Linear(hidden, hidden, **dd)
        self.mean, self.log_variance = nn.Linear(hidden, self.latent, **dd), nn.Linear(hidden, self.latent, **dd)
        self.dec1: nn.Module = nn.Linear(self.latent, hidden, **dd)
        self.dec2: nn.Module = nn.Linear(hidden, hidden, **dd)
        self.dec3 = nn.Linear(hidden, self.inputs, **dd)
        return hidden, hidden

    def trunk(self, x: Tensor, shift: Tensor | None) -> Tensor:
        """What the encoder sees in images (B, hidden); `shift` (entry,) or (B, entry) is the task's."""
        h = self.enc1(x.flatten(1))
        return self.enc2((h if shift is None else h + shift).relu()).relu()

    def pixels(self, h: Tensor) -> Tensor:
        """Logits (B, inputs) of the pixels, of the decoder's first layer (B, start)."""
        return self.dec3(self.dec2(h.relu()).relu())

    def encode(self, x: Tensor, task: int | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (B, latent) of images, of a known task (one number, or one each) or of none."""
        return self.posterior(x, task)[:2]

    def posterior(self, x: Tensor, task: int | Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `encode`, and the logits (B, K) of q(y | x), where the encoder guesses the class."""
        h, guess = self._encode(x, task, sample=self.training)
        return self.mean(h), self.log_variance(h), guess

    def _encode(self, x: Tensor, task: int | Tensor | None, sample: bool = False) -> tuple[Tensor, Tensor | None]:
        shift = None if self.task is None else self.task.mean(0) if task is None else self.task[task]
        h = self.trunk(x, shift)
        if not self.components:
            return h, None
        guess = self.enc_class(h)
        y = F.gumbel_softmax(guess) if sample else guess.softmax(-1)
        return self.enc_joint(torch.cat([h, y], -1)), guess

    def embed(self, x: Tensor, task: int | Tensor | None = None) -> Tensor:
        """The mean alone."""
        return self.mean(self._encode(x, task)[0])

    def decode(self, z: Tensor, task: int | Tensor, y: Tensor) -> Tensor:
        """Logits (B, inputs) of the pixels."""
        return self.pixels(self.dec1(z) + self.condition[task * self.num_classes + y])

    def prior(self, task: int | Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (B, latent) of p(z | y)."""
        index = y if self.prior_index == "class" else task * self.num_classes + y
        return self.prior_mean[index], self.prior_log_variance[index]

    def sample_prior(
        self, task: int | Tensor, y: Tensor, generator: torch.Generator | None = None, eps: Tensor | None = None
    ) -> Tensor:
        """Latents (B, latent) of classes (B,), from normal numbers `eps` or drawn ones."""
        mean, log_variance = self.prior(task, y)
        if eps is None:
            eps = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return mean + eps * (0.5 * log_variance).exp()

    @torch.no_grad()
    def generate(
        self, task: int | Tensor, y: Tensor, generator: torch.Generator | None = None, eps: Tensor | None = None
    ) -> Tensor:
        """Images (B, inputs) in (0, 1), the decoder's means, of conditions: tasks and classes (B,)."""
        return self.decode(self.sample_prior(task, y, generator, eps), task, y).sigmoid()


class ConvolutionalVAE(ConditionalVAE):
    """The conditional VAE of colour images: an 18-layer residual network, and transposed convolutions.

    After the unfinished generator in KCL's code; where task and condition enter is a reconstruction. The task is added
    to the channels of the stem, behind its normalisation, which would take it out again.

    Args:
        in_chans: Channels of the images.
        img_size: Side of the images, even: up to five halvings lead to the side that the decoder starts with.
        stem: `cifar`, a 3 x 3 convolution, or `imagenet`, 7 x 7 of stride 2 and max-pooling.
        hidden: Channels of the last stage and of the decoder's first, a multiple of 32.
        **kwargs: Of :class:`ConditionalVAE`.

    Raises:
        ValueError: A size does not fit.
    """

    def __init__(
        self,
        num_classes: int,
        tasks: int,
        in_chans: int = 3,
        img_size: int = 32,
        stem: Literal["cifar", "imagenet"] = "cifar",
        latent: int = 128,
        hidden: int = 512,
        **kwargs: Any,
    ) -> None:
        _one_of("stem", stem, ("cifar", "imagenet"))
        if img_size % 2 or hidden % 32:
            raise ValueError(f"img_size={img_size} must be even, and hidden={hidden} a multiple of 32")
        self.shape, self.stem = (in_chans, img_size, img_size), stem
        super().__init__(in_chans * img_size**2, num_classes, tasks, latent, hidden, **kwargs)

    def build_networks(self, hidden: int, dd: dict[str, Any]) -> tuple[int, int]:
        """Make encoder and decoder."""
        in_chans, side, _ = self.shape
        widths = tuple(hidden // 2**k for k in (3, 2, 1, 0))
        block: Any = BasicBlock
        net: Any = ResNet(block, (2, 2, 2, 2), 0, in_chans, channels=widths, zero_init_last=False, **dd)
        if self.stem == "cifar":
            net.conv1 = nn.Conv2d(in_chans, 64, 3, 1, 1, bias=False, **dd)
            net.maxpool = nn.Identity()
        self.enc = net
        self.mean, self.log_variance = nn.Linear(hidden, self.latent, **dd), nn.Linear(hidden, self.latent, **dd)
        channels: list[int] = []
        while side % 2 == 0 and len(channels) < 5:
            channels.append(hidden // 2 ** len(channels))
            side //= 2
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise([*channels, in_chans]):
            layers += [nn.ReLU(), nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, **dd)]
        self.start = (hidden, side, side)
        self.dec1 = nn.Linear(self.latent, math.prod(self.start), **dd)
        self.dec2 = nn.Sequential(*layers)
        return 64, math.prod(self.start)

    def trunk(self, x: Tensor, shift: Tensor | None) -> Tensor:
        """Pooled features (B, hidden)."""
        net: Any = self.enc
        h = net.bn1(net.conv1(x.view(-1, *self.shape)))
        h = net.maxpool(net.act1(h if shift is None else h + shift[..., None, None]))
        return net.global_pool(net.layer4(net.layer3(net.layer2(net.layer1(h)))))

    def pixels(self, h: Tensor) -> Tensor:
        """Logits (B, inputs) of the pixels, row by row of each channel."""
        return self.dec2(h.view(-1, *self.start)).flatten(1)


class GKCL(KernelLearner):
    """Generative kernel continual learning: a conditional VAE makes the support; no image is stored.

    A reconstruction: the paper's code was never published. Replay trains the generator only; the classifier has no
    weights of its own.

    Args:
        num_classes: Output columns.
        in_chans: Channels of the images.
        img_size: Side of the images.
        tasks: Most tasks.
        shots: Samples per class that the kernel gets, in training and at test time.
        profile: `latent`: features are the encoder's means, support are latents of the class priors. `input`: support
            are decoded images, features come from a network of its own, trained on real images (`train_support`).
        kernel: `linear`, `poly`, `laplacian` or `gaussian`.
        width: Of the kernels that have one.
        generator: `mlp` (:class:`ConditionalVAE`), or `conv` for colour images (:class:`ConvolutionalVAE`).
        mixture: The encoder guesses the class, see :class:`ConditionalVAE`. Its loss takes log q(z | x, y) - log p(z |
            y) of the sampled z in place of the exact KL, and adds KL(q(y | x) || uniform). After the second unfinished
            generator in KCL's code; that p(z | y) takes the true class is a reconstruction, as is everything else.
        stem: Of the `conv` generator.
        latent: Size of z; None for 32, or 128 with `conv`.
        hidden: Width of encoder and decoder; None for 400, or 512 with `conv`.
        encoder_task: Tell the encoder the task; without an id the most confident task answers.
        prior_index: See :class:`ConditionalVAE`.
        likelihood: Of the pixels, `bernoulli` or `gaussian`.
        beta_kl: Weight of the KL term.
        eta: Weight of the classifier's cross-entropy.
        omega: Weight of the contrastive term.
        temperature: Of the contrastive term.
        delta: Pull of the encoder's means on replayed images towards those of the encoder before the task.
        replay: Replay generated images of earlier tasks.
        replay_contrast_label: Labels of replayed images in the contrastive term: `condition` or `class`.
        train_support: Of the `input` profile: `real` or `generated`.
        deterministic: The support is one point per class, the prior's mean.
        lambda_init: Start of lambda; the ridge is |lambda| + 0.01.
        learn_head: Train lambda, gamma and beta.
        device: Where the weights live.
        dtype: Their type.

    Raises:
        ValueError: An option is unknown, or the kernel is `rff`.
    """

    recipe = Recipe("adam", lr=1e-3, decay=0.8, offset=0, floor=0.0, keep_state=True, batch_size=64, epochs=6)
    unit_range = True
    eps: Tensor
    training_only = ("vae.log_variance", "vae.dec", "vae.condition")

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: int = 28,
        tasks: int = 20,
        shots: int = 20,
        profile: Literal["latent", "input"] = "latent",
        kernel: str = "linear",
        width: float | None = None,
        generator: Literal["mlp", "conv"] = "mlp",
        mixture: bool = False,
        stem: Literal["cifar", "imagenet"] = "cifar",
        latent: int | None = None,
        hidden: int | None = None,
        encoder_task: bool = True,
        prior_index: Literal["class", "task_class"] = "class",
        likelihood: Literal["bernoulli", "gaussian"] = "bernoulli",
        beta_kl: float = 1.0,
        eta: float = 1.0,
        omega: float = 0.05,
        temperature: float = 0.5,
        delta: float = 0.1,
        replay: bool = True,
        replay_contrast_label: Literal["condition", "class"] = "condition",
        train_support: Literal["real", "generated"] = "real",
        deterministic: bool = False,
        lambda_init: float = 0.1,
        learn_head: bool = False,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(num_classes, in_chans, img_size, tasks, device=device, dtype=dtype)
        _one_of("profile", profile, ("latent", "input"))
        _one_of("generator", generator, ("mlp", "conv"))
        _one_of("prior_index", prior_index, ("class", "task_class"))
        _one_of("likelihood", likelihood, ("bernoulli", "gaussian"))
        _one_of("replay_contrast_label", replay_contrast_label, ("condition", "class"))
        _one_of("train_support", train_support, ("real", "generated"))
        if kernel == "rff":
            raise ValueError("kernel='rff' belongs to KCL; a generator takes linear, poly, laplacian or gaussian")
        if shots < 1:
            raise SupportError(
                f"shots={shots}: the support would be empty; a kernel classifier needs points of each class"
            )
        self.shots, self.profile, self.deterministic = shots, profile, deterministic
        self.likelihood: Any = likelihood
        self.beta_kl, self.eta, self.omega, self.temperature, self.delta = beta_kl, eta, omega, temperature, delta
        self.replay, self.replay_contrast_label, self.train_support = replay, replay_contrast_label, train_support
        self.options: dict[str, Any] = {
            "kernel": kernel,
            "width": width,
            "lambda_init": lambda_init,
            "learn": learn_head,
        }
        convolutional = generator == "conv"
        self.smallest_batch = 2 if convolutional else 1
        self.vae_options: dict[str, Any] = {
            "latent": latent or (128 if convolutional else 32),
            "hidden": hidden or (512 if convolutional else 400),
            "encoder_task": encoder_task,
            "prior_index": prior_index,
            "components": num_classes if mixture else 0,
        }
        if convolutional:
            self.vae_options |= {"in_chans": in_chans, "img_size": img_size, "stem": stem}
        self.uses_task = encoder_task and profile == "latent"
        self._old: list[ConditionalVAE] = []  # in a list: not a part of the state
        self.build_head()
        self.num_features = self.vae.latent
        if profile == "input":
            self.num_features = 160 if convolutional else 256
            self.backbone = (
                ReducedResNet(in_chans, **self.dd) if convolutional else MLP(self.inputs, self.num_features, **self.dd)
            )

    def build_head(self) -> None:
        """A fresh generator, whose priors know the classes, and a fresh head."""
        self._solutions, self._old = {}, []
        old = getattr(self, "vae", None)
        size, options = (max(self.num_classes, 1), self.tasks), {**self.vae_options, **self.dd}
        if "stem" in options:
            self.vae: ConditionalVAE = ConvolutionalVAE(*size, **options)
        else:
            self.vae = ConditionalVAE(self.inputs, *size, **options)
        if old is not None:  # the encoder stays: another head on the same features
            kept = {k: v for k, v in old.state_dict().items() if k.startswith(("enc", "mean", "task"))}
            self.vae.load_state_dict(kept, strict=False)
        if self.num_classes:
            self.head = KernelRidgeHead(n_tasks=self.tasks, **self.options, **self.dd)
        else:
            self.head = nn.Identity()  # type: ignore[assignment]
        self.set_shots(self.shots)

    def set_shots(self, shots: int) -> None:
        """Change the samples per class that the kernel gets.

        Their normal numbers are part of the state, so that the support of a task is the same in every type and on
        every device.
        """
        self.shots, self._solutions = shots, {}
        size = shots * max(self.num_classes, 1), self.vae.latent
        eps = torch.randn(size, generator=torch.Generator().manual_seed(1000), dtype=torch.float64, device="cpu")
        like = self.vae.prior_mean
        self.register_buffer("eps", eps.to(like.device, like.dtype))

    # ---- learning -----------------------------------------------------------------------------------------

    def begin_task(self, task: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Freeze a copy of the generator, which replays the tasks before."""
        super().begin_task(task, x, y)
        self._old = []
        if task and self.replay:
            self._old = [copy.deepcopy(self.vae).eval().requires_grad_(False)]
        return x, y

    def losses(self, x: Tensor, y: Tensor, task: int) -> dict[str, Tensor]:
        """The generator's losses on the batch and on replayed images, and the classifier's on the batch alone."""
        weight = replay_weight(task) if self._old else 1.0
        flat = x.flatten(1)
        mean, z, current = self._vae_loss(flat, y, task)
        terms = {"vae": weight * current}
        if self.omega:
            terms["contrastive"] = weight * self.omega * supervised_contrastive(z, y, self.temperature)
        if self.eta:
            labels = self._support_labels(task)
            if self.profile == "latent":
                with torch.no_grad():
                    support = self.vae.sample_prior(task, labels)
                terms["classifier"] = weight * self.eta * self._classify(support, labels, mean, y, task)
            else:
                terms["classifier"] = self.eta * self._input_step(x, y, task)
        if self._old:
            terms |= {f"replay_{k}": (1 - weight) * v for k, v in self._replay(len(x), task).items()}
        return terms

    def _classify(self, support: Tensor, labels: Tensor, queries: Tensor, y: Tensor, task: int) -> Tensor:
        targets = F.one_hot(labels, self.num_classes).to(support.dtype)
        return F.cross_entropy(self.mask(self.head(support, targets, queries, task), task), y)

    def _input_step(self, x: Tensor, y: Tensor, task: int) -> Tensor:
        """A KCL step of the `input` profile: half of the batch, or generated images, are the support; a batch of one
        has no half.
        """
        if self.train_support == "generated" or len(x) < 2:
            labels = self._support_labels(task)
            images = self.vae.generate(task, labels)
        else:
            half = len(x) // 2
            images, labels, x, y = x[:half].flatten(1), y[:half], x[half:], y[half:]
        h = self._normalised(torch.cat([x.flatten(1), images]))
        return self._classify(h[len(x) :], labels, h[: len(x)], y, task)

    def _normalised(self, x: Tensor) -> Tensor:
        """Features of the `input` profile."""
        return F.normalize(self.backbone(x.view(-1, self.in_chans, self.img_size, self.img_size)), dim=-1)

    def _vae_loss(self, flat: Tensor, y: Tensor, task: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance, guess = self.vae.posterior(flat, task)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        reconstruction = reconstruction_loss(self.vae.decode(z, task, y), flat, self.likelihood)
        prior = self.vae.prior(task, y)
        if guess is None:
            kl = diagonal_gaussian_kl(mean, log_variance, *prior)
        else:
            kl = log_normal(z, mean, log_variance) - log_normal(z, *prior) + categorical_kl_uniform(guess)
        return mean, z, (reconstruction + self.beta_kl * kl).mean() / self.inputs

    def _replay(self, count: int, task: int) -> dict[str, Tensor]:
        """Losses on images that the generator before this task makes of the tasks before it."""
        old = self._old[0]
        places = self.active[:task].nonzero()
        tasks, y = places[torch.randint(len(places), (count,)).to(places.device)].unbind(-1)
        images = old.generate(tasks, y)
        mean, z, loss = self._vae_loss(images, y, tasks)
        terms = {"vae": loss}
        if self.omega:
            labels = y if self.replay_contrast_label == "class" else tasks * self.num_classes + y
            terms["contrastive"] = self.omega * supervised_contrastive(z, labels, self.temperature)
        if self.delta:
            with torch.no_grad():
                before = old.embed(images, tasks)
            terms["drift"] = self.delta * (mean - before).square().sum(-1).mean()
        return terms

    def end_task(self, task: int, x: Tensor, y: Tensor) -> None:
        """The frozen copy has done its work."""
        self._old = []
        super().end_task(task, x, y)

    # ---- answers ------------------------------------------------------------------------------------------

    def _support_labels(self, task: int) -> Tensor:
        """`shots` of each class of the task; all classes where that cannot be asked."""
        if self.active.is_meta or torch.compiler.is_compiling():
            classes = torch.arange(self.num_classes, device=self.active.device)
        else:
            classes = shared_value(self.active)[task].nonzero().squeeze(-1)
        return classes.repeat_interleave(1 if self.deterministic else self.shots)

    def support(self, task: int) -> tuple[Tensor, Tensor]:
        """Latents of the task's classes, or features of generated images: always the same for the same weights."""
        labels = self._support_labels(task)
        if self.deterministic and self.profile == "latent":
            return self.vae.prior(task, labels)[0], labels
        eps = self.eps[: len(labels)]
        if self.profile == "latent":
            return self.vae.sample_prior(task, labels, eps=eps), labels
        return self.forward_features(self.vae.generate(task, labels, eps=eps)), labels

    def forward_features(self, x: Tensor, task: int | None = None) -> Tensor:
        """The encoder's means (B, latent), or the normalised features of the `input` profile."""
        if self.profile == "latent":
            return self.vae.embed(x, task)
        return self._normalised(x)

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        """Logits (B, num_classes) of images; see the base class."""
        if not self.num_classes or not self.uses_task:
            return super().forward(x, task)
        if task is None:
            if not self.tasks_seen:
                return self.task_logits(self.forward_features(x), None)
            tasks = range(self.tasks_seen)
            every = [self.mask(self.task_logits(self.forward_features(x, t), t), t) for t in tasks]
            return torch.stack(every).amax(0)
        self.check_seen(task)
        return self.mask(self.task_logits(self.forward_features(x, task), task), task)

    def class_incremental(self, x: Tensor, task: int | None = None) -> Tensor:
        """Logits of one classifier over all classes seen: the task's id is not needed for the support.

        Args:
            x: Images.
            task: Tells the encoder the task; None does not.
        """
        self.check_seen(self.tasks_seen - 1)
        places = self.active[: self.tasks_seen].nonzero()
        if self.vae.prior_index == "class":
            labels = places[:, 1].unique()
            tasks = torch.zeros_like(labels)
        else:
            tasks, labels = places.unbind(-1)
        labels, tasks = labels.repeat_interleave(self.shots), tasks.repeat_interleave(self.shots)
        source = torch.Generator(labels.device).manual_seed(999)
        if self.profile == "latent":
            support = self.vae.sample_prior(tasks, labels, source)
        else:
            support = self.forward_features(self.vae.generate(tasks, labels, source))
        return self.head(support, F.one_hot(labels, self.num_classes).to(support.dtype), self.forward_features(x, task))

    @torch.no_grad()
    def generate(self, task: int, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images (N, C, H, W) of classes (N,) of a task that was seen."""
        self.check_seen(task)
        return self.vae.generate(task, labels, generator).view(-1, self.in_chans, self.img_size, self.img_size)

    def _drop(self) -> None:
        for name in [n for n, _ in self.vae.named_children() if n.startswith("dec")]:
            delattr(self.vae, name)
        for name in ("log_variance", "prior_mean", "prior_log_variance", "condition"):
            delattr(self.vae, name)
        del self.eps
        if self.profile == "input":
            del self.vae


# ---- closed form -------------------------------------------------------------------------------------------


class AnalyticRidge(ContinualLearner):
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

    recipe = Recipe("sgd", lr=1e-9, decay=1.0, offset=0, floor=0.0, momentum=0.0)
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
            self.ridge_used.fill_(self._choose_ridge(phi, Y))
        with no_autocast(phi.device):
            gram, cross = phi.mT @ phi, phi.mT @ Y
            if self.shared:
                self.gram += gram
                self.cross += cross
            if len(phi) < self.num_features:
                factor = cholesky(self._ridged(phi @ phi.mT))
                weight = phi.mT @ factor.solve(Y).to(phi.dtype)
            else:
                weight = cholesky(self._ridged(gram)).solve(cross)
        self.task_weight[task] = weight.mT.to(phi.dtype)
        super().end_task(task, x, y)
        if self.shared:
            self.solve_shared()

    def _ridged(self, gram: Tensor) -> Tensor:
        gram = gram.clone()
        gram.diagonal().add_(self.ridge_used)
        return gram

    def _choose_ridge(self, phi: Tensor, Y: Tensor, rows: int = 1500) -> float:
        return leave_one_out_ridge(phi[:rows] @ phi[:rows].mT, Y[:rows])

    @torch.no_grad()
    def solve_shared(self) -> None:
        """Put the shared classifier of all tasks so far into `head`."""
        ridged = self._ridged(self.gram)
        self.head.weight.copy_(cholesky(ridged).solve(self.cross).mT)  # type: ignore[operator]

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
        """Log p(x, y | task) (B, K) of images (B, D), without the constant that all tasks share."""
        U, s, noise = self.basis[task], self.variance[task], self.noise[task]
        origin = self.mean[task].mean(0)
        x, m = x - origin, self.mean[task] - origin
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


class GaussianGKCL(AnalyticRidge):
    """GKCL in closed form: a Gaussian generator per task, and a kernel ridge classifier on frozen random features.

    Ours, not the paper's. The generator says which task an image belongs to, so the task id is not needed; the
    classifier of a task is the ridge solution on its features, kept in place of its support. No image is stored,
    nothing is trained by gradients, and nothing can be forgotten: the only loss over time is confusion of tasks.

    With the paper it shares that each task has a generator and a kernel classifier, and that no image is kept. Its
    classifier sees the task's images and none that were generated: with the task known it answers as
    :class:`AnalyticRidge`, to the digit.

        p(y | x) = sum_t p(t | x) softmax_y(sharpness f_t(x)),    p(t | x) ~ p(x | t)^(1 / temperature)

    Args:
        rank: Of each task's covariance.
        temperature: Of the choice of tasks; larger asks more tasks for their opinion.
        sharpness: Factor of the ridge scores, which lie about 0 and 1.
        **kwargs: Of :class:`AnalyticRidge`.
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
        low = torch.finfo(flat.dtype).min / 2  # onnxruntime's logsumexp cannot take -inf, of classes of other tasks
        every = [self.generator.log_density(flat, t).clamp_min(low).logsumexp(-1) for t in range(self.tasks_seen)]
        return (torch.stack(every, -1) / self.temperature).log_softmax(-1)

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        """Logits (B, num_classes); log-probabilities where the task is not known."""
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


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")


def _one_hot(labels: Tensor, num_classes: int, like: Tensor) -> Tensor:
    """Targets (N, C); a row of zeros for an empty place, whose alpha is then zero."""
    return F.one_hot(labels.clamp_min(0), num_classes).to(like.dtype) * (labels >= 0).unsqueeze(-1)


# ---- registry ----------------------------------------------------------------------------------------------


_OURS = (
    "Ours, not the paper's GKCL. What it shares with it: a generator and a kernel classifier for each task, and no "
    "stored image. With the task known it answers as analytic_ridge does, to the digit; no generated sample reaches "
    "its classifier."
)
_PAPERS = {"kcl": "arXiv:2107.05757", "gkcl": "arXiv:2112.13410"}
default_cfgs = generate_default_cfgs(
    {
        "kcl_mlp": learner_cfg(paper_ids=_PAPERS["kcl"]),
        "kcl_resnet": learner_cfg(input_size=(3, 32, 32), num_classes=100, paper_ids=_PAPERS["kcl"]),
        "gkcl_mlp": learner_cfg(paper_ids=_PAPERS["gkcl"]),
        "gkcl_mixture": learner_cfg(paper_ids=_PAPERS["gkcl"]),
        "gkcl_resnet": learner_cfg(input_size=(3, 32, 32), num_classes=100, paper_ids=_PAPERS["gkcl"]),
        "gkcl_gaussian": learner_cfg(notes=(_OURS,)),
        "analytic_ridge": learner_cfg(),
        "test_kcl": learner_cfg(input_size=(1, 8, 8)),
        "test_gkcl": learner_cfg(input_size=(1, 8, 8)),
    }
)


def _create(cls: type[nn.Module], variant: str, pretrained: bool, kwargs: dict[str, Any], **own: Any) -> Any:
    return build_model_with_cfg(cls, variant, pretrained, **{**own, **kwargs})


@register_model
def kcl_mlp(pretrained: bool = False, **kwargs: Any) -> KCL:
    """KCL on digits: a perceptron of two layers, 20 stored images per class and task, linear kernel."""
    return _create(KCL, "kcl_mlp", pretrained, kwargs)


@register_model
def kcl_resnet(pretrained: bool = False, **kwargs: Any) -> KCL:
    """KCL on split CIFAR-100: the reduced residual network."""
    own = {
        "in_chans": 3,
        "img_size": 32,
        "num_classes": 100,
        "task_classes": 5,
        "backbone": "resnet",
    }
    return _create(KCL, "kcl_resnet", pretrained, kwargs, **own)


@register_model
def gkcl_mlp(pretrained: bool = False, **kwargs: Any) -> GKCL:
    """GKCL on digits: latents of a conditional VAE are the support (a reconstruction)."""
    return _create(GKCL, "gkcl_mlp", pretrained, kwargs)


@register_model
def gkcl_mixture(pretrained: bool = False, **kwargs: Any) -> GKCL:
    """GKCL on digits whose encoder guesses the class: a mixture of Gaussians (a reconstruction)."""
    return _create(GKCL, "gkcl_mixture", pretrained, kwargs, mixture=True)


@register_model
def gkcl_resnet(pretrained: bool = False, **kwargs: Any) -> GKCL:
    """GKCL on split CIFAR-100: residual encoder, transposed convolutions as decoder (a reconstruction)."""
    own = {"in_chans": 3, "img_size": 32, "num_classes": 100, "generator": "conv"}
    return _create(GKCL, "gkcl_resnet", pretrained, kwargs, **own)


@register_model
def gkcl_gaussian(pretrained: bool = False, **kwargs: Any) -> GaussianGKCL:
    """GKCL in closed form, ours: Gaussian generators and ridge classifiers on random features."""
    return _create(GaussianGKCL, "gkcl_gaussian", pretrained, kwargs)


@register_model
def analytic_ridge(pretrained: bool = False, **kwargs: Any) -> AnalyticRidge:
    """Ridge regression on 1000 frozen random features, per task and shared."""
    return _create(AnalyticRidge, "analytic_ridge", pretrained, kwargs)


@register_model
def test_kcl(pretrained: bool = False, **kwargs: Any) -> KCL:  # noqa: PT028
    """KCL of 8 x 8 images, for tests."""
    return _create(KCL, "test_kcl", pretrained, kwargs, img_size=8, tasks=3, shots=2, hidden=16, drop_rate=0.0)


@register_model
def test_gkcl(pretrained: bool = False, **kwargs: Any) -> GKCL:  # noqa: PT028
    """GKCL of 8 x 8 images, for tests."""
    return _create(GKCL, "test_gkcl", pretrained, kwargs, img_size=8, tasks=3, shots=2, latent=4, hidden=16)
