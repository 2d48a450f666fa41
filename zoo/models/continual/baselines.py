"""Baselines that any learner of a sequence of tasks is compared with."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.learners.kernel_ridge import masked
from zoo.models.continual.base import (
    MLP,
    ContinualLearner,
    TaskError,
    choose_per_class,
    create_learner,
    learner_cfg,
    need_per_class,
)

__all__ = ["EWC", "Joint", "LwF", "Naive", "Replay"]


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

    training_defaults: ClassVar[dict[str, Any]] = {
        **{"optimizer": "adam", "lr": 1e-3, "decay": 1.0, "offset": 0, "batch_size": 64, "epochs": 4}
    }

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

    def memory_footprint(self) -> dict[str, int]:
        """Weights and all images, a byte per pixel."""
        samples = sum(len(y) for _, y, _ in self._data)
        return {"samples": samples, "bytes": super().memory_footprint()["bytes"] + samples * self.inputs}


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

    def memory_footprint(self) -> dict[str, int]:
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


default_cfgs = generate_default_cfgs(
    {f"{name}_mlp": learner_cfg() for name in ("naive", "joint", "ewc", "replay", "lwf")}
)


@register_model
def naive_mlp(pretrained: bool = False, **kwargs: Any) -> Naive:
    """One task after the other, nothing against forgetting."""
    return create_learner(Naive, "naive_mlp", pretrained, kwargs)


@register_model
def joint_mlp(pretrained: bool = False, **kwargs: Any) -> Joint:
    """All tasks at once."""
    return create_learner(Joint, "joint_mlp", pretrained, kwargs)


@register_model
def ewc_mlp(pretrained: bool = False, **kwargs: Any) -> EWC:
    """Elastic weight consolidation."""
    return create_learner(EWC, "ewc_mlp", pretrained, kwargs)


@register_model
def replay_mlp(pretrained: bool = False, **kwargs: Any) -> Replay:
    """Experience replay of 20 images per class and task."""
    return create_learner(Replay, "replay_mlp", pretrained, kwargs)


@register_model
def lwf_mlp(pretrained: bool = False, **kwargs: Any) -> LwF:
    """Learning without forgetting."""
    return create_learner(LwF, "lwf_mlp", pretrained, kwargs)
