"""KCL: kernel continual learning, tasks learnt one after the other by kernel ridge classifiers.

Derakhshani, Zhen, Shao, Snoek, "Kernel Continual Learning", ICML 2021, arXiv 2107.05757. A few images of each task
are stored and become the support of a kernel ridge classifier on the features of a shared network; what follows from
the paper's code is exact, and its quirks are options (`feature_norm="minmax_batch"`, `eval_task_params="current"`,
`eval_basis="sample"`, `second_conv=False`).

    logits(x) = gamma_t k(f(x), S_t) (k(S_t, S_t) + lambda_t I)^-1 Y_t + beta_t,   S_t = f(images stored of task t)
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.kernels import Linear
from zoo.kernels.random_features import VariationalRandomFeatures, diagonal_gaussian_kl
from zoo.learners.kernel_ridge import KernelRidgeHead, Solution, SolutionCache, SupportError, masked
from zoo.models.continual.base import (
    MLP,
    ContinualLearner,
    check_choice,
    choose_per_class,
    create_learner,
    learner_cfg,
    need_per_class,
    one_hot,
)
from zoo.ops.dispatch import known_value
from zoo.ops.numerics import at_least_float32, autocast_disabled

__all__ = ["KCL", "KernelLearner", "ReducedResNet", "normalise_features"]

FeatureNorm = Literal["minmax_batch", "l2", "none"]


def normalise_features(h: Tensor, how: FeatureNorm) -> Tensor:
    """Normalise features (B, d).

    Args:
        h: Features.
        how: `minmax_batch` maps the smallest number of the whole batch to 0 and the largest to 1, so that a sample
            depends on its batch (the KCL code); `l2` divides each row by its norm; `none`.

    Raises:
        ValueError: `how` is none of these.
    """
    wide = at_least_float32(h)  # half precision has no number as small as the least spread or norm
    if how == "minmax_batch":
        low = wide.min()
        return ((wide - low) / (wide.max() - low).clamp_min(1e-12)).to(h.dtype)
    if how == "l2":
        return F.normalize(wide, dim=-1).to(h.dtype)
    if how != "none":
        raise ValueError(f"feature_norm={how!r} is not one of 'minmax_batch', 'l2', 'none'")
    return h


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


class KernelLearner(ContinualLearner):
    """A learner whose classifier of a task is kernel ridge regression on a support.

    In eval mode without gradients the solution of each task is kept until a weight changes. `reparameterize` keeps
    only the solutions: for the linear kernel and for random features one matrix per task.
    """

    head: KernelRidgeHead
    weight: Tensor
    bias: Tensor
    has_spectral_basis = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.deployed = False
        self._solutions = SolutionCache()

    def support(self, task: int) -> tuple[Tensor, Tensor]:
        """Features (N, d) and labels (N,) of a task's support."""
        raise NotImplementedError(f"{type(self).__name__} must define support")

    def spectral_basis(self, support: Tensor) -> Tensor | None:
        """What the kernel's own feature map takes from the support; None where it has none."""
        return None

    def feature_map(self, z: Tensor, basis: Tensor | None) -> Tensor:
        """Features as the kernel sees them."""
        return z

    def solution(self, task: int) -> tuple[Tensor | None, Solution]:
        """The basis of a task and its fitted classifier, from the weights as they are now."""
        return self._solutions.get(self, [task], self._solve)[0]

    def _solve(self, task: int) -> tuple[Tensor | None, Solution]:
        z, labels = self.support(task)
        basis, targets = self.spectral_basis(z), one_hot(labels, self.num_classes, z)
        return basis, self.head.solve(self.feature_map(z, basis), targets, task, gamma_of=self._parameters_of(task))

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
            return self.head.predict(self.feature_map(features, basis), solved)
        lifted = self.feature_map(features, self.bases[task]) if hasattr(self, "bases") else features  # type: ignore[index]
        if self.weight.numel():
            return lifted @ self.weight[task].mT + self.bias[task]
        kernel = self.kernel(lifted, self.supports[task])  # type: ignore[index]
        return kernel @ self.alphas[task] + self.bias[task]  # type: ignore[index]

    def _every(self, features: Tensor, tasks: range) -> Tensor | None:
        """Masked logits (B, T, C) of all tasks in one product, where all are linear in the same features."""
        if self.has_spectral_basis or (self.deployed and not self.weight.numel()):
            return None
        if self.deployed:
            weight, bias = self.weight[: len(tasks)], self.bias[: len(tasks)]
        elif isinstance(self.head.kernel, Linear):
            solved = [s for _, s in self._solutions.get(self, tasks, self._solve)]
            weight = torch.stack([s.gamma * s.weight for s in solved if s.weight is not None])
            bias = torch.stack([s.beta for s in solved])
        else:
            return None
        with autocast_disabled(features.device):
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

        def padded(parts: list[Tensor]) -> Tensor:  # with zeros for the tasks to come
            return torch.stack(parts + [torch.zeros_like(parts[0])] * (self.tasks - len(parts)))

        self.register_buffer("bias", padded([s.beta for _, s in solved]))
        if isinstance(self.head.kernel, Linear):
            weights = [(s.gamma * (s.support.mT @ s.alpha)).mT for _, s in solved]
            self.register_buffer("weight", padded(weights).to(self._dtype()))
        else:
            self.register_buffer("weight", solved[0][1].support.new_zeros(0))
            self.register_buffer("supports", padded([s.support for _, s in solved]))
            self.register_buffer("alphas", padded([s.gamma * s.alpha for _, s in solved]))
            self.kernel = self.head.kernel
        bases = [basis for basis, _ in solved if basis is not None]
        if bases:
            self.register_buffer("bases", padded(bases))
        self._drop()
        del self.head
        self.deployed, self._solutions = True, SolutionCache()
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
        kernel: Name of a registered kernel: `linear`, `poly`, `laplacian` (alias `rbf`), `gaussian`, `rff`, ...
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
        check_choice("backbone", backbone, ("mlp", "resnet"))
        check_choice("feature_norm", feature_norm, ("minmax_batch", "l2", "none"))
        check_choice("eval_basis", eval_basis, ("fixed_seed", "mean", "sample"))
        check_choice("eval_task_params", eval_task_params, ("own", "current"))
        if shots < 1:
            raise SupportError(
                f"shots={shots}: the coreset would be empty; a kernel classifier needs points of each class"
            )
        self.shots, self.task_classes, self.tau = shots, task_classes, tau
        self.feature_norm: FeatureNorm = feature_norm
        self.eval_basis, self.eval_task_params = eval_basis, eval_task_params
        self.options: dict[str, Any] = {
            **{"kernel": kernel, "width": width, "lambda_init": lambda_init, "learn": learn_head}
        }
        if backbone == "mlp":
            self.num_features = hidden or 256
            self.backbone: nn.Module = MLP(self.inputs, self.num_features, drop_rate, **self.dd)
        else:
            self.num_features = 8 * (hidden or 20)
            self.backbone = ReducedResNet(in_chans, hidden or 20, drop_rate, second_conv, **self.dd)
        self.features_of_batches = backbone == "resnet"  # batch statistics: batch and coreset pass one after the other
        self.smallest_batch = 2 if self.features_of_batches else 1
        if num_classes:
            self.build_head()
        build: Any = self.head.kernel.support_features if num_classes else None
        if build is not None:
            self.random_features = build(self.num_features, num_bases, variational=variational, **self.dd)
            self.training_only = ("random_features.prior",)
            self.has_spectral_basis = True

    def build_head(self) -> None:
        """A fresh head and a coreset of noise, until the first task brings one."""
        self._solutions = SolutionCache()
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
        if self.task_classes is not None and (known := known_value(labels)) is not None:
            images, labels = images[known >= 0], labels[known >= 0]
        images = images.view(-1, self.in_chans, self.img_size, self.img_size)
        return images.to(self._dtype()) / 255, labels

    def losses(self, x: Tensor, y: Tensor, task: int) -> dict[str, Tensor]:
        """Cross-entropy of the stream batch under the classifier of the coreset, and the weighted KL for `rff`."""
        return self.support_losses(x, y, *self.coreset(task), task)

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
        targets = one_hot(labels, self.num_classes, zs)
        terms: dict[str, Tensor] = {}
        if self.has_spectral_basis:
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

    def predict_aware_and_agnostic(self, x: Tensor, task: int) -> tuple[Tensor, Tensor]:
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

    def spectral_basis(self, support: Tensor) -> Tensor | None:
        """The spectral basis (D, d), for `rff`."""
        if not self.has_spectral_basis:
            return None
        features = self.random_features
        if not features.variational:
            return features.eps
        eps = {"fixed_seed": features.eps, "mean": torch.zeros_like(features.eps), "sample": None}[self.eval_basis]
        mean, log_variance = features.posterior(support)
        return features.sample(mean, log_variance, eps)

    def feature_map(self, z: Tensor, basis: Tensor | None) -> Tensor:
        """Random features, for `rff`."""
        return z if basis is None else self.random_features.features(z, basis)

    def _drop(self) -> None:
        if self.has_spectral_basis and self.random_features.variational:
            del self.random_features.posterior, self.random_features.prior, self.random_features.eps
        del self.coreset_x, self.coreset_y

    def memory_footprint(self) -> dict[str, int]:
        """Weights and the images stored so far, a byte per pixel."""
        samples = int((self.coreset_y[: self.tasks_seen] >= 0).sum())
        weights = sum(p.numel() * p.element_size() for p in self.parameters())
        return {"samples": samples, "bytes": weights + samples * self.inputs}


# ---- registry ----------------------------------------------------------------------------------------------

_PAPER = "arXiv:2107.05757"
default_cfgs = generate_default_cfgs(
    {
        "kcl_mlp": learner_cfg(paper_ids=_PAPER),
        "kcl_resnet": learner_cfg(input_size=(3, 32, 32), num_classes=100, paper_ids=_PAPER),
        "test_kcl": learner_cfg(input_size=(1, 8, 8)),
    }
)


@register_model
def kcl_mlp(pretrained: bool = False, **kwargs: Any) -> KCL:
    """KCL on digits: a perceptron of two layers, 20 stored images per class and task, linear kernel."""
    return create_learner(KCL, "kcl_mlp", pretrained, kwargs)


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
    return create_learner(KCL, "kcl_resnet", pretrained, kwargs, **own)


@register_model
def test_kcl(pretrained: bool = False, **kwargs: Any) -> KCL:  # noqa: PT028
    """KCL of 8 x 8 images, for tests."""
    return create_learner(KCL, "test_kcl", pretrained, kwargs, img_size=8, tasks=3, shots=2, hidden=16, drop_rate=0.0)
