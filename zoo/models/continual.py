"""Learners of a sequence of tasks: what they all promise, and the baselines that any new one is compared with.

A :class:`ContinualLearner` is a plain module. It says how it wants to be trained (`recipe`), prepares itself for a task
(`begin_task`), names the losses of a batch (`losses`), closes the task (`end_task`), and answers with logits, with or
without the id of the task:

>>> learner.begin_stream(5)                           # tasks to come; without it, as many as there is room for
>>> learner.begin_task(0, x, y)                       # what it returns is to be trained on
>>> sum(learner.losses(x[:10], y[:10], 0).values()).backward()
>>> learner.end_task(0, x, y)
>>> learner(x, task=0)                                # (B, num_classes); learner(x): the task is not known

Tasks are numbered from 0. Nothing here draws a random number except from torch's global generator.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.kernels.ridge import SupportError, masked

__all__ = [
    "EWC",
    "MLP",
    "ContinualLearner",
    "Joint",
    "LwF",
    "Naive",
    "Recipe",
    "Replay",
    "TaskError",
    "choose_per_class",
]


class TaskError(ValueError):
    """A task that cannot be learnt or was never seen; the message says which and why."""


@dataclass(frozen=True)
class Recipe:
    """How a learner is trained on one task.

    The rate of task t, counted from 0, is max(lr * decay^(t + offset), floor).

    Attributes:
        optimizer: `sgd`, or `adam`.
        lr: First rate.
        decay: Factor from task to task.
        offset: 1 where the first task already gets a decayed rate, as in KCL.
        floor: Smallest rate.
        momentum: Of SGD.
        keep_state: Carry momentum or moments over task borders.
        batch_size: Samples of a step.
        epochs: Passes through a task.
    """

    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: float = 0.1
    decay: float = 0.8
    offset: int = 1
    floor: float = 5e-5
    momentum: float = 0.8
    keep_state: bool = False
    batch_size: int = 10
    epochs: int = 1

    def rate(self, task: int) -> float:
        """The learning rate of a task."""
        return max(self.lr * self.decay ** (task + self.offset), self.floor)


class MLP(nn.Sequential):
    """Linear, ReLU, Dropout, twice: images (B, C, H, W) to features (B, hidden)."""

    def __init__(self, inputs: int, hidden: int = 256, drop_rate: float = 0.0, *, device=None, dtype=None) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        first = [nn.Flatten(), nn.Linear(inputs, hidden, **dd), nn.ReLU(), nn.Dropout(drop_rate)]
        super().__init__(*first, nn.Linear(hidden, hidden, **dd), nn.ReLU(), nn.Dropout(drop_rate))


def need_per_class(labels: Tensor, per_class: int) -> None:
    """Raise TaskError if a class among labels (N,) has fewer than `per_class` samples."""
    for label, count in zip(*labels.unique(return_counts=True), strict=True):
        if count < per_class:
            raise TaskError(f"class {int(label)} has {int(count)} samples; {per_class} of each class are needed")


def choose_per_class(
    labels: Tensor, per_class: int, generator: torch.Generator | None = None, *, shuffle: bool = True
) -> Tensor:
    """Indices of `per_class` random samples of each class, without replacement, in rising order.

    Args:
        labels: Classes (N,).
        per_class: Samples of each.
        generator: Source of the draws.
        shuffle: False takes the first ones.

    Raises:
        TaskError: A class has fewer samples.
    """
    need_per_class(labels, per_class)
    chosen = []
    for label in labels.unique().tolist():
        found = (labels == label).nonzero().squeeze(-1)
        if shuffle:
            found = found[torch.randperm(len(found), generator=generator).to(found.device)]
        chosen.append(found[:per_class])
    return torch.cat(chosen).sort().values


class ContinualLearner(nn.Module):
    """Base of every learner; subclasses define `losses`, `forward_features` and `task_logits`.

    Args:
        num_classes: Output columns; 0 gives features.
        in_chans: Channels of the images.
        img_size: Side of the images in pixels.
        tasks: Most tasks that can be learnt.
        device: Where everything lives.
        dtype: Its type.
    """

    recipe = Recipe()
    #: Prefixes of parameters that only `losses` trains; the logits do not depend on them.
    training_only: tuple[str, ...] = ()
    #: Whether the logits depend on the task id beyond masking the classes of other tasks.
    uses_task = False
    #: Whether images must lie in [0, 1]: they are stored in bytes, or a generator makes such images.
    unit_range = False
    #: Samples of a step at least; batch normalisation of a single one has no variance.
    smallest_batch = 1
    seen: Tensor
    active: Tensor

    def __init__(self, num_classes: int, in_chans: int, img_size: int, tasks: int, *, device=None, dtype=None) -> None:
        super().__init__()
        if min(in_chans, img_size, tasks) < 1 or num_classes < 0:
            raise ValueError(
                f"num_classes={num_classes}, in_chans={in_chans}, img_size={img_size}, tasks={tasks} must be positive"
            )
        self.num_classes, self.in_chans, self.img_size, self.tasks = num_classes, in_chans, img_size, tasks
        self.dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.length = tasks
        self.tasks_seen = 0  # `seen` as a number, which a graph can hold
        self.register_buffer("seen", torch.zeros((), dtype=torch.long, device=device))
        self.register_buffer("active", torch.ones(tasks, num_classes, dtype=torch.bool, device=device))

    @property
    def inputs(self) -> int:
        """Numbers of an image."""
        return self.in_chans * self.img_size**2

    # ---- a task -------------------------------------------------------------------------------------------

    def begin_stream(self, length: int) -> None:
        """Say how many tasks will come; without it, as many as there is room for.

        Raises:
            TaskError: There is no room for so many.
        """
        if not 1 <= length <= self.tasks:
            raise TaskError(f"the stream has {length} tasks, the model room for tasks={self.tasks}")
        self.length = length

    def begin_task(self, task: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Prepare for a task; tasks come in order.

        Args:
            task: Its number, from 0.
            x: All its training images (N, C, H, W), in [0, 1].
            y: Their classes (N,).

        Returns:
            Images and classes to train on.

        Raises:
            TaskError: The task is out of order, or its images or classes cannot be learnt; the message says why.
            SupportError: The learner needs images in [0, 1], and these are not.
        """
        if not 0 <= task < self.tasks:
            raise TaskError(f"task {task} does not fit: the model was built for tasks={self.tasks}")
        if task > self.tasks_seen:
            raise TaskError(f"task {task} comes before task {self.tasks_seen}: tasks are learnt in order")
        if len(x) != len(y) or not len(x):
            raise TaskError(f"task {task} has {len(x)} images and {len(y)} labels")
        self.check_images(x, f"task {task}")
        self.check_labels(task, y)
        self.active[task] = False
        self.active[task, y.unique()] = True
        return x, y

    def check_images(self, x: Tensor, origin: str) -> None:
        """Raise TaskError, or SupportError for the range, unless images (N, C, H, W) can be learnt."""
        shape, own = tuple(x.shape[1:]), next(t for t in self.state_dict().values() if t.is_floating_point())
        if shape != (self.in_chans, self.img_size, self.img_size):
            side = self.img_size
            raise TaskError(f"{origin} has images of shape {shape}; the model takes ({self.in_chans}, {side}, {side})")
        if x.dtype != own.dtype:
            raise TaskError(f"{origin} has images of type {x.dtype}; the model takes {own.dtype}, bytes divided by 255")
        if not bool(torch.isfinite(x).all()):
            raise TaskError(f"{origin} has images with NaN or infinity")
        if self.unit_range and bool((x < 0).any() | (x > 1).any()):
            low, high = float(x.min()), float(x.max())
            raise SupportError(
                f"{origin} has images in [{low:g}, {high:g}]; for {type(self).__name__} images must be in [0, 1]"
            )

    def check_labels(self, task: int, y: Tensor) -> None:
        """Raise TaskError unless a task of these classes (N,) can be learnt."""
        if y.ndim != 1 or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise TaskError(
                f"task {task} has labels of type {y.dtype} and shape {tuple(y.shape)}; classes (N,) are needed"
            )
        classes = y.unique()
        if len(classes) < 2:
            raise TaskError(f"task {task} has samples of class {classes.tolist()} only: nothing can be told apart")
        wrong = [c for c in classes.tolist() if not 0 <= c < self.num_classes]
        if wrong:
            raise TaskError(f"task {task} has class {wrong[-1]}; the model has num_classes={self.num_classes}")

    def losses(self, x: Tensor, y: Tensor, task: int) -> dict[str, Tensor]:
        """Losses of a batch by name; their sum is minimised. A learner without gradient steps returns {}."""
        raise NotImplementedError(f"{type(self).__name__} must define losses")

    def steps(self, task: int, optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
        """Around the steps of one task, each of which is `losses`, a backward pass and a step of this optimizer.

        A learner may keep weights in another form meanwhile.
        """
        return nullcontext()

    def end_task(self, task: int, x: Tensor, y: Tensor) -> None:
        """Close a task: keep what later tasks and evaluation need."""
        self.tasks_seen = max(self.tasks_seen, task + 1)
        self.seen.fill_(self.tasks_seen)

    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the recipe over all parameters."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        if self.recipe.optimizer == "adam":
            return torch.optim.Adam(parameters, lr=self.recipe.rate(0), fused=True)
        return torch.optim.SGD(parameters, lr=self.recipe.rate(0), momentum=self.recipe.momentum, fused=True)

    # ---- answers ------------------------------------------------------------------------------------------

    def forward_features(self, x: Tensor) -> Tensor:
        """Features (B, F) of images (B, C, H, W)."""
        raise NotImplementedError(f"{type(self).__name__} must define forward_features")

    def task_logits(self, features: Tensor, task: int | None) -> Tensor:
        """Logits (B, num_classes) of features for a task, or without knowing it."""
        raise NotImplementedError(f"{type(self).__name__} must define task_logits")

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, num_classes), the task unknown, of features; the features themselves with `pre_logits`."""
        return x if pre_logits or not self.num_classes else self.task_logits(x, None)

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        """Logits (B, num_classes) of images (B, C, H, W).

        Args:
            x: Images in [0, 1].
            task: Number of their task, which picks its parameters and its classes; None where it is not known.

        Raises:
            TaskError: The task was never seen.
        """
        if not self.num_classes:
            return self.forward_features(x)
        if task is None:
            return self.task_logits(self.forward_features(x), None)
        self.check_seen(task)
        return self.mask(self.task_logits(self.forward_features(x), task), task)

    def answers(self, x: Tensor, task: int) -> tuple[Tensor, Tensor]:
        """Logits (B, num_classes) twice: told the task, and not."""
        return self(x, task), self(x)

    def check_seen(self, task: int) -> None:
        """Raise TaskError unless the task was learnt."""
        if not 0 <= task < self.tasks_seen:
            known = f"tasks 0 to {self.tasks_seen - 1} were" if self.tasks_seen else "none was"
            raise TaskError(f"task {task} was never seen: {known}")

    def mask(self, logits: Tensor, task: int) -> Tensor:
        """Logits with the classes of other tasks at -1e11."""
        return masked(logits, self.active[task])

    def kept(self) -> dict[str, int]:
        """What the learner keeps of the tasks seen: `samples`, and `bytes` of all state that evaluation needs."""
        state = [t for name, t in self.state_dict().items() if not name.startswith(("seen", "active"))]
        return {"samples": 0, "bytes": sum(t.numel() * t.element_size() for t in state)}

    # ---- timm's side --------------------------------------------------------------------------------------

    @property
    def head_hidden_size(self) -> int:
        """Number of features."""
        return self.num_features

    num_features: int = 0

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Forget every task and start with other classes; 0: features only."""
        if global_pool:
            raise ValueError(f"global_pool={global_pool!r}: there is nothing to pool")
        self.num_classes, self.tasks_seen = num_classes, 0
        self.seen.zero_()
        self.active = self.active.new_ones(self.tasks, num_classes)
        training, like = self.training, next(t for t in (*self.parameters(), *self.buffers()) if t.is_floating_point())
        self.dd = {"device": like.device, "dtype": like.dtype}
        self.build_head()
        self.train(training)

    def build_head(self) -> None:
        """Make what depends on the number of classes."""

    def get_classifier(self) -> nn.Module:
        """The module that turns features into logits."""
        return getattr(self, "head", nn.Identity())

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """One group for the trunk, one for the head."""
        return {"stem": r"^backbone", "blocks": [(r"^head", (0,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """There is nothing to recompute in networks of two layers."""
        assert not enable, "a network of two layers has no blocks to checkpoint"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if prefix + "seen" in state_dict and not state_dict[prefix + "seen"].is_meta:
            self.tasks_seen = int(state_dict[prefix + "seen"])


# ---- baselines ---------------------------------------------------------------------------------------------


class Naive(ContinualLearner):
    """A network trained on one task after the other, with nothing against forgetting.

    The rate decays from task to task and dropout is on, as in stable SGD (Mirzadeh et al., 2020), which forgets less
    than a constant rate.

    Args:
        num_classes: Classes.
        in_chans: Channels of the images.
        img_size: Side of the images.
        tasks: Most tasks.
        hidden: Width of the two layers.
        drop_rate: Dropout.
        device: Where the weights live.
        dtype: Their type.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: int = 28,
        tasks: int = 20,
        hidden: int = 256,
        drop_rate: float = 0.0,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(num_classes, in_chans, img_size, tasks, device=device, dtype=dtype)
        self.num_features = hidden
        self.backbone = MLP(self.inputs, hidden, drop_rate, **self.dd)
        self.build_head()

    def build_head(self) -> None:
        """A fresh linear layer."""
        self.head = nn.Linear(self.num_features, self.num_classes, **self.dd) if self.num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """Features (B, hidden)."""
        return self.backbone(x)

    def task_logits(self, features: Tensor, task: int | None) -> Tensor:
        """Logits of one head for all tasks."""
        return self.head(features)

    def losses(self, x: Tensor, y: Tensor, task: int) -> dict[str, Tensor]:
        """Cross-entropy over the task's classes."""
        return {"cross_entropy": F.cross_entropy(self.mask(self.task_logits(self.backbone(x), task), task), y)}


class Joint(Naive):
    """All tasks at once: keeps all data, and trains on the union when the last task of the stream has come.

    Args:
        cumulative: Train anew on the union after every task instead.
        **kwargs: Of :class:`Naive`.
    """

    recipe = Recipe("adam", lr=1e-3, decay=1.0, offset=0, batch_size=64, epochs=4)

    def __init__(self, *args: Any, cumulative: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cumulative = cumulative
        self._data: list[tuple[Tensor, Tensor, Tensor]] = []

    def begin_task(self, task: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """All samples so far; none before the last task."""
        super().begin_task(task, x, y)
        del self._data[task:]
        if len(self._data) < task:
            raise TaskError("the joint learner keeps its data in memory and cannot go on from a checkpoint")
        self._data.append((x, y, torch.full_like(y, task)))
        if task + 1 < self.length and not self.cumulative:
            return x[:0], y[:0]
        images, labels, of = (torch.cat(parts) for parts in zip(*self._data, strict=True))
        return images, labels + self.num_classes * of  # the task of a sample travels with its label

    def losses(self, x: Tensor, y: Tensor, task: int) -> dict[str, Tensor]:
        """Cross-entropy over the classes of each sample's own task."""
        labels, of = y % self.num_classes, y // self.num_classes
        logits = masked(self.head(self.backbone(x)), self.active[of])
        return {"cross_entropy": F.cross_entropy(logits, labels)}

    def kept(self) -> dict[str, int]:
        """Weights and all images, a byte per pixel."""
        samples = sum(len(y) for _, y, _ in self._data)
        return {"samples": samples, "bytes": super().kept()["bytes"] + samples * self.inputs}


class EWC(Naive):
    """Elastic weight consolidation with one running diagonal Fisher matrix (Kirkpatrick et al., 2017; Schwarz et al.,
    2018).

    Args:
        strength: Weight of the quadratic penalty.
        fisher_samples: Samples that the Fisher matrix is estimated from after each task.
        **kwargs: Of :class:`Naive`.
    """

    def __init__(self, *args: Any, strength: float = 10.0, fisher_samples: int = 512, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.strength, self.fisher_samples = strength, fisher_samples
        for name, p in self._weights():
            self.register_buffer(f"fisher_{name}", torch.zeros_like(p))
            self.register_buffer(f"anchor_{name}", torch.zeros_like(p))

    def _weights(self) -> list[tuple[str, Tensor]]:
        return [(name.replace(".", "_"), p) for name, p in self.named_parameters()]

    def build_head(self) -> None:
        """A fresh linear layer, without memory."""
        super().build_head()
        for name, p in self._weights() if "fisher_head_weight" in self._buffers else ():
            self.register_buffer(f"fisher_{name}", torch.zeros_like(p.detach()))
            self.register_buffer(f"anchor_{name}", torch.zeros_like(p.detach()))
        if not self.num_classes:
            for name in [n for n in self._buffers if n.startswith(("fisher_head", "anchor_head"))]:
                delattr(self, name)

    def losses(self, x: Tensor, y: Tensor, task: int) -> dict[str, Tensor]:
        """Cross-entropy and the pull towards the weights of the tasks before."""
        losses = super().losses(x, y, task)
        if task:
            pull = [
                (getattr(self, f"fisher_{n}") * (p - getattr(self, f"anchor_{n}")).square()).sum()
                for n, p in self._weights()
            ]
            losses["ewc"] = 0.5 * self.strength * torch.stack(pull).sum()
        return losses

    def end_task(self, task: int, x: Tensor, y: Tensor) -> None:
        """Add this task's Fisher diagonal, of labels drawn from the model, and move the anchor."""
        chosen = torch.randperm(len(x))[: self.fisher_samples].to(x.device)
        training = self.training
        self.eval()
        fisher = {n: torch.zeros_like(p) for n, p in self._weights()}
        weights = [p for _, p in self._weights()]
        for image in x[chosen].split(1):
            logits = self.mask(self.task_logits(self.backbone(image), task), task)
            drawn = torch.multinomial(logits.detach().float().softmax(-1), 1).squeeze(-1)
            grads = torch.autograd.grad(F.cross_entropy(logits, drawn), weights)
            for total, g in zip(fisher.values(), grads, strict=True):
                total.addcmul_(g, g, value=1 / len(chosen))
        with torch.no_grad():
            for name, p in self._weights():
                getattr(self, f"fisher_{name}").add_(fisher[name])
                getattr(self, f"anchor_{name}").copy_(p)
        self.train(training)
        super().end_task(task, x, y)


class Replay(Naive):
    """Experience replay: some images of each class of each task are kept and mixed into later batches.

    Args:
        per_class: Images kept per class and task.
        **kwargs: Of :class:`Naive`.
    """

    unit_range = True
    memory_x: Tensor
    memory_y: Tensor

    def __init__(self, *args: Any, per_class: int = 20, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.per_class = per_class
        self._build_memory()

    def _build_memory(self) -> None:
        size = (self.tasks, self.per_class * self.num_classes)
        device = self.dd["device"]
        self.register_buffer("memory_x", torch.zeros(*size, self.inputs, dtype=torch.uint8, device=device))
        self.register_buffer("memory_y", torch.full(size, -1, dtype=torch.long, device=device))

    def build_head(self) -> None:
        """A fresh linear layer and an empty memory."""
        super().build_head()
        if hasattr(self, "per_class"):
            self._build_memory()

    def check_labels(self, task: int, y: Tensor) -> None:
        """As the base class; each class needs as many images as will be kept."""
        super().check_labels(task, y)
        need_per_class(y, self.per_class)

    def losses(self, x: Tensor, y: Tensor, task: int) -> dict[str, Tensor]:
        """Cross-entropy of the batch and of as many kept images."""
        losses = super().losses(x, y, task)
        if task:
            places = (self.memory_y[:task] >= 0).nonzero()
            chosen = places[torch.randint(len(places), (len(x),)).to(places.device)].unbind(-1)
            images = self.memory_x[chosen].view(-1, *x.shape[1:]).to(x.dtype) / 255
            logits = masked(self.head(self.backbone(images)), self.active[chosen[0]])
            losses["replay"] = F.cross_entropy(logits, self.memory_y[chosen])
        return losses

    def end_task(self, task: int, x: Tensor, y: Tensor) -> None:
        """Keep images of this task."""
        chosen = choose_per_class(y, self.per_class)
        self.memory_x[task, : len(chosen)] = (x[chosen].flatten(1) * 255).round().to(torch.uint8)
        self.memory_y[task, : len(chosen)] = y[chosen]
        super().end_task(task, x, y)

    def kept(self) -> dict[str, int]:
        """Weights, and the images kept so far, a byte per pixel."""
        samples = int((self.memory_y >= 0).sum())
        weights = sum(p.numel() * p.element_size() for p in self.parameters())
        return {"samples": samples, "bytes": weights + samples * self.inputs}


class LwF(Naive):
    """Learning without forgetting: the network before the task teaches its answers to the new images (Li and Hoiem,
    2016).

    Args:
        strength: Weight of the distillation.
        temperature: Of both soft-maxes.
        **kwargs: Of :class:`Naive`.
    """

    def __init__(self, *args: Any, strength: float = 1.0, temperature: float = 2.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.strength, self.temperature = strength, temperature
        self._teacher: list[nn.Module] = []  # in a list: not a part of the state

    def begin_task(self, task: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Freeze a copy of the network as it is now."""
        chosen = super().begin_task(task, x, y)
        if task:
            self._teacher = []
            frozen = nn.Sequential(copy.deepcopy(self.backbone), copy.deepcopy(self.head))
            self._teacher = [frozen.eval().requires_grad_(False)]
        return chosen

    def losses(self, x: Tensor, y: Tensor, task: int) -> dict[str, Tensor]:
        """Cross-entropy and distillation."""
        logits = self.head(self.backbone(x))
        losses = {"cross_entropy": F.cross_entropy(self.mask(logits, task), y)}
        if task:
            t = self.temperature
            with torch.no_grad():
                taught = (self._teacher[0](x) / t).softmax(-1)
            losses["distillation"] = self.strength * t * t * F.cross_entropy(logits / t, taught)
        return losses

    def end_task(self, task: int, x: Tensor, y: Tensor) -> None:
        """The teacher is not needed any more."""
        self._teacher = []
        super().end_task(task, x, y)


# ---- registry ----------------------------------------------------------------------------------------------


def learner_cfg(**kwargs: Any) -> dict[str, Any]:
    """Configuration of a learner of images in [0, 1] for timm's registry."""
    return {
        "num_classes": 10,
        "input_size": (1, 28, 28),
        "mean": (0.0,),
        "std": (1.0,),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "first_conv": "",
        "classifier": "head",
    } | kwargs


default_cfgs = generate_default_cfgs(
    {f"{name}_mlp": learner_cfg() for name in ("naive", "joint", "ewc", "replay", "lwf")}
)


def _create(cls: type[nn.Module], variant: str, pretrained: bool, kwargs: dict[str, Any], **own: Any) -> Any:
    return build_model_with_cfg(cls, variant, pretrained, **{**own, **kwargs})


@register_model
def naive_mlp(pretrained: bool = False, **kwargs: Any) -> Naive:
    """One task after the other, nothing against forgetting."""
    return _create(Naive, "naive_mlp", pretrained, kwargs)


@register_model
def joint_mlp(pretrained: bool = False, **kwargs: Any) -> Joint:
    """All tasks at once."""
    return _create(Joint, "joint_mlp", pretrained, kwargs)


@register_model
def ewc_mlp(pretrained: bool = False, **kwargs: Any) -> EWC:
    """Elastic weight consolidation."""
    return _create(EWC, "ewc_mlp", pretrained, kwargs)


@register_model
def replay_mlp(pretrained: bool = False, **kwargs: Any) -> Replay:
    """Experience replay of 20 images per class and task."""
    return _create(Replay, "replay_mlp", pretrained, kwargs)


@register_model
def lwf_mlp(pretrained: bool = False, **kwargs: Any) -> LwF:
    """Learning without forgetting."""
    return _create(LwF, "lwf_mlp", pretrained, kwargs)
