"""What every learner of a sequence of tasks promises.

A :class:`ContinualLearner` is a plain module. It prepares itself for a task (`begin_task`), names the losses of a batch
(`losses`), closes the task (`end_task`), and answers with logits, with or without the id of the task:

>>> learner.begin_stream(5)                           # tasks to come; without it, as many as there is room for
>>> learner.begin_task(0, x, y)                       # what it returns is to be trained on
>>> sum(learner.losses(x[:10], y[:10], 0).values()).backward()
>>> learner.end_task(0, x, y)
>>> learner(x, task=0)                                # (B, num_classes); learner(x): the task is not known

Tasks are numbered from 0. Nothing here draws a random number except from torch's global generator.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg
from torch import Tensor, nn

from zoo.learners.kernel_ridge import SupportError, masked

__all__ = ["MLP", "ContinualLearner", "TaskError", "choose_per_class", "learner_cfg", "need_per_class", "one_hot"]


class TaskError(ValueError):
    """Images or a task that cannot be learnt, or a task that was never seen; the message says which and why."""


@torch.fx.wrap
def check_shape(x: Tensor, in_chans: int, side: int, origin: str = "the batch") -> Tensor:
    """Images as they are; raises TaskError unless they are (B, in_chans, side, side)."""
    if x.ndim != 4 or x.shape[1] != in_chans or x.shape[2] != side or x.shape[3] != side:
        raise TaskError(
            f"{origin} has images of shape {list(x.shape)}; the model takes (B, {in_chans}, {side}, {side})"
        )
    return x


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


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")


def one_hot(labels: Tensor, num_classes: int, like: Tensor) -> Tensor:
    """Targets (N, C); a row of zeros for an empty place, whose alpha is then zero."""
    return F.one_hot(labels.clamp_min(0), num_classes).to(like.dtype) * (labels >= 0).unsqueeze(-1)


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

    #: How its paper trains it, where that is not the usual way: fields of `zoo.tasks.continual.Recipe`.
    training_defaults: ClassVar[dict[str, Any]] = {}
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
        check_shape(x, self.in_chans, self.img_size, origin)
        own = next(t for t in self.state_dict().values() if t.is_floating_point())
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

    def end_task(self, task: int, x: Tensor, y: Tensor) -> None:
        """Close a task: keep what later tasks and evaluation need."""
        self.tasks_seen = max(self.tasks_seen, task + 1)
        self.seen.fill_(self.tasks_seen)

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
            TaskError: The task was never seen, or the images have another shape.
        """
        x = check_shape(x, self.in_chans, self.img_size)
        if not self.num_classes:
            return self.forward_features(x)
        if task is None:
            return self.task_logits(self.forward_features(x), None)
        self.check_seen(task)
        return self.mask(self.task_logits(self.forward_features(x), task), task)

    def predict_aware_and_agnostic(self, x: Tensor, task: int) -> tuple[Tensor, Tensor]:
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

    def memory_footprint(self) -> dict[str, int]:
        """What the learner keeps of the tasks seen: `samples`, and `bytes` of all state that evaluation needs."""
        state = [t for name, t in self.state_dict().items() if not name.startswith(("seen", "active"))]
        return {"samples": 0, "bytes": sum(t.numel() * t.element_size() for t in state)}

    def kept(self) -> dict[str, int]:
        """:meth:`memory_footprint`, as it was called."""
        warnings.warn("kept() is now memory_footprint()", DeprecationWarning, stacklevel=2)
        return self.memory_footprint()

    def answers(self, x: Tensor, task: int) -> tuple[Tensor, Tensor]:
        """:meth:`predict_aware_and_agnostic`, as it was called."""
        warnings.warn("answers() is now predict_aware_and_agnostic()", DeprecationWarning, stacklevel=2)
        return self.predict_aware_and_agnostic(x, task)

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


def create_learner(cls: type[nn.Module], variant: str, pretrained: bool, kwargs: dict[str, Any], **own: Any) -> Any:
    """A registered learner: the variant's own arguments, and those given in their place."""
    return build_model_with_cfg(cls, variant, pretrained, **{**own, **kwargs})


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
