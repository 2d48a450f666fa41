"""Operators of a training step that sends the same few images through a perceptron every time.

A step of kernel continual learning pushes a batch of the stream and the whole coreset of the task through the
network. :class:`DualPerceptron` keeps the first layer of the network in dual form meanwhile, and makes one operator of
all up to the loss; :func:`minmax` and :func:`unit_rows` normalise with a backward pass of few
operators. All give what the plain formulas give, but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels import native
from zoo.kernels.base import no_autocast, plain_gradients
from zoo.kernels.ridge import KernelRidgeHead
from zoo.kernels.watching import is_ordinary, is_recorded

__all__ = ["ClassifierStep", "DualPerceptron", "minmax", "relu_dropout_", "relu_slopes_", "unit_rows"]

_EPS = 1e-12


def _minmax(h: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    if native.available(h, gradients=True):
        z, bounds = native.minmax(h, _EPS)
        return z, (h, z, bounds)
    low, high = torch.aminmax(h)
    spread = (high - low).clamp_min(_EPS)
    z = (h - low).div_(spread)
    return z, (h, z, torch.stack([low, high, spread]))


def _minmax_slopes(g: Tensor, h: Tensor, z: Tensor, bounds: Tensor) -> Tensor:
    if native.available(g, h, gradients=True):
        with suppress(native.Unsuited):
            return native.minmax_slopes(g, h, z, bounds)
    low, high, spread = bounds
    g = g / spread
    weighted, total = (g * z).sum(), g.sum()
    for extreme, d in ((low, weighted - total), (high, -weighted)):
        ties = (h == extreme).to(g.dtype)
        g.addcmul_(ties, d / ties.sum())
    return g


def _unit_rows(h: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    norm = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
    z = h / norm.clamp_min(_EPS)
    return z, (z, norm)


def _unit_rows_slopes(g: Tensor, z: Tensor, norm: Tensor) -> Tensor:
    along = (g * z).sum(-1, keepdim=True) * (norm > _EPS)
    return torch.addcmul(g, z, along, value=-1).div_(norm.clamp_min(_EPS))


class _MinMax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        z, kept = _minmax(h)
        ctx.save_for_backward(*kept)
        return z

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor | None:
        if torch.is_grad_enabled() or not is_ordinary(g):
            return plain_gradients(_plain_minmax, ctx.saved_tensors[:1], ctx.needs_input_grad, g)[0]
        return _minmax_slopes(g, *ctx.saved_tensors)


class _UnitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        z, kept = _unit_rows(h)
        ctx.save_for_backward(h, *kept)
        return z

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor | None:
        h, *kept = ctx.saved_tensors
        if torch.is_grad_enabled() or not is_ordinary(g):
            return plain_gradients(_plain_unit_rows, (h,), ctx.needs_input_grad, g)[0]
        return _unit_rows_slopes(g, *kept)


def _recording(h: Tensor) -> bool:
    return h.requires_grad and torch.is_grad_enabled() and not is_recorded(h)


def minmax(h: Tensor) -> Tensor:
    """Features (B, d) with the smallest number of the whole batch mapped to 0 and the largest to 1."""
    if h.dtype in (torch.float16, torch.bfloat16):  # which have no number as small as the least spread
        return minmax(h.float()).to(h.dtype)
    return _MinMax.apply(h) if _recording(h) else _plain_minmax(h)


def _plain_minmax(h: Tensor) -> Tensor:
    low = h.min()
    return (h - low) / (h.max() - low).clamp_min(_EPS)


def unit_rows(h: Tensor) -> Tensor:
    """Features (B, d) divided by the norm of their row."""
    if h.dtype in (torch.float16, torch.bfloat16):
        return unit_rows(h.float()).to(h.dtype)
    return _UnitRows.apply(h) if _recording(h) else _plain_unit_rows(h)


def _plain_unit_rows(h: Tensor) -> Tensor:
    return F.normalize(h, dim=-1, eps=_EPS)


def _once() -> None:
    """Refuse second derivatives, which would come out as zeros.

    Raises:
        RuntimeError: Somebody wants them.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("a training step in dual form has no second derivatives: use the layers themselves")


# ---- the first layer in dual form --------------------------------------------------------------------------


def _scattered(x: Tensor) -> Tensor:
    """Integers below 2^32 to others in which every bit depends on every bit; as the native loops do."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * factor & 0xFFFFFFFF
    return x ^ (x >> 16)


def relu_dropout_(h: Tensor, bias: Tensor, rate: float) -> Tensor:
    """Dropout(ReLU(h + bias)), in place.

    Args:
        h: (n, C), contiguous.
        bias: (C,).
        rate: Share that is dropped, below 1, to a multiple of 2^-32.
    """
    bar, scale = round(rate * 2**32), 1 / (1 - rate)
    seed = int(torch.randint(2**32, (), device="cpu")) if bar else 0
    if native.available(h, bias, gradients=True):
        with suppress(native.Unsuited):
            native.relu_dropout_(h, bias, scale, bar, seed)
            return h
    h.add_(bias).relu_()
    if bar:
        index = torch.arange(h.numel(), device=h.device).view_as(h)
        h.mul_((_scattered((index + seed) & 0xFFFFFFFF) >= bar).to(h.dtype)).mul_(scale)
    return h


def relu_slopes_(grad: Tensor, h: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """Gradient behind :func:`relu_dropout_` that left h, in place, and its sum over the rows (C,)."""
    if native.available(grad, h, gradients=True):
        with suppress(native.Unsuited):
            return grad, native.relu_slopes_(grad, h, 1 / (1 - rate))
    torch.ops.aten.threshold_backward.grad_input(grad, h, 0, grad_input=grad)
    if rate:
        grad.mul_(1 / (1 - rate))
    return grad, grad.sum(0)


def _momentum_step_(
    weight: Tensor, speed: Tensor, x: Tensor | None, grad: Tensor, rate: float, momentum: float
) -> None:
    """A step of SGD by the gradient x^T grad, or grad itself."""
    if native.available(weight, speed, grad, gradients=True):
        with suppress(native.Unsuited):
            native.momentum_step_(weight, speed, x, grad, rate, momentum)
            return
    with no_autocast(grad.device):
        if x is None:
            speed.mul_(momentum).add_(grad)
        else:
            speed.addmm_(x.mT, grad, beta=momentum)
    weight.add_(speed, alpha=-rate)


class _Perceptron(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, b1: Tensor, W2: Tensor, b2: Tensor, dual: DualPerceptron, x: Tensor) -> Tensor:
        h1, h2 = dual.hidden(x, b1, W2, b2)
        ctx.save_for_backward(h1, h2, W2)
        ctx.dual = dual
        return h2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        _once()
        g = g.clone(memory_format=torch.contiguous_format)
        return *ctx.dual.slopes_(g, *ctx.saved_tensors), None, None


class ClassifierStep(NamedTuple):
    """A batch and the classifier that it meets, for :meth:`DualPerceptron.cross_entropy`.

    Attributes:
        x: Images (B, D).
        y: Their classes (B,).
        targets: Of the images X, one-hot (N, C).
        head: The classifier.
        task: Whose ridge, scale and shift.
        active: Classes of the task (C,).
        feature_norm: `minmax_batch`, `l2` or `none`, of the features of x and of X each.
    """

    x: Tensor
    y: Tensor
    targets: Tensor
    head: KernelRidgeHead
    task: int
    active: Tensor
    feature_norm: str


_NORMS: dict[str, tuple[Callable[..., tuple[Tensor, tuple[Tensor, ...]]], Callable[..., Tensor]]] = {
    "minmax_batch": (_minmax, _minmax_slopes),
    "l2": (_unit_rows, _unit_rows_slopes),
    "none": (lambda h: (h, ()), lambda g: g),
}


class _CrossEntropy(torch.autograd.Function):
    """All of a step in one node: its many small operators would cost as much as the products of matrices."""

    @staticmethod
    def forward(
        ctx: Any,
        b1: Tensor,
        W2: Tensor,
        b2: Tensor,
        lam: Tensor,
        gamma: Tensor,
        beta: Tensor,
        dual: DualPerceptron,
        step: ClassifierStep,
    ) -> Tensor:
        h1, h2 = dual.hidden(step.x, b1, W2, b2)
        sizes, (normalise, norm_slopes) = [len(step.x), len(step.targets)], _NORMS[step.feature_norm]
        (zq, of_queries), (zs, of_support) = map(normalise, h2.split(sizes))
        loss, d_support, d_queries, ctx.d_head = step.head.loss_and_slopes(
            zs, step.targets, zq, step.y, step.task, step.active
        )
        ctx.slopes = torch.cat([norm_slopes(d_queries, *of_queries), norm_slopes(d_support, *of_support)])
        ctx.dual = dual
        ctx.save_for_backward(h1, h2, W2)
        return loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        _once()
        h1, h2, W2 = ctx.saved_tensors
        return *ctx.dual.slopes_(ctx.slopes * scale, h1, h2, W2), *(ctx.d_head * scale), None, None


class DualPerceptron:
    """Linear, ReLU, Dropout, twice, trained by SGD with momentum on batches to which the same images X always belong.

    The first layer is W = V + P^T X. A step that adds D^T X to W adds D, of N rows, to P; and X W^T = X V^T + X X^T P,
    of which X X^T never changes and X V^T changes with the steps of the other images only. Neither X nor its gradient
    meet a matrix of the size of W any more.

    Until :meth:`close` the weight of the layer is out of date.

    Args:
        first: The first layer, whose weight has no other use meanwhile.
        second: The second layer, trained by the optimizer as always.
        X: Images that belong to every batch (N, D).
        drop_rate: Dropout after each layer, below 1.
    """

    def __init__(self, first: nn.Linear, second: nn.Linear, X: Tensor, drop_rate: float = 0.0) -> None:
        self.layer, self.second, self.X, self.drop_rate = first, second, X, drop_rate
        hidden, inputs = first.weight.shape
        self.gradient: Tensor | None = None
        self.x = self.xX = X[:0]
        with torch.no_grad(), no_autocast(X.device):
            weight = first.weight.detach().mT
            self.gram = X @ X.mT
            # V^T, P and X V^T one below the other: a batch meets the first two in one product
            self.state = torch.cat([weight, X.new_zeros(len(X), hidden), X @ weight])
        self.momentum = torch.zeros_like(self.state)
        self.sizes = [inputs, len(X), len(X)]

    def __call__(self, x: Tensor) -> Tensor:
        """Features (B + N, hidden) of images (B, D) and of X, after each other."""
        with no_autocast(x.device):
            return _Perceptron.apply(self.layer.bias, self.second.weight, self.second.bias, self, x)

    def cross_entropy(self, step: ClassifierStep) -> Tensor:
        """Mean cross-entropy () of a batch under the kernel ridge classifier that X and its targets make.

        What :meth:`__call__`, the normalisation of features, the classifier and the loss give, as one operator.

        Args:
            step: The batch, and which classifier.

        Raises:
            SupportError: A feature is not finite.
        """
        with no_autocast(step.x.device):
            weights = self.layer.bias, self.second.weight, self.second.bias
            return _CrossEntropy.apply(*weights, step.head.lam, step.head.gamma, step.head.beta, self, step)

    def hidden(self, x: Tensor, b1: Tensor, W2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
        """What both layers make of images and X, (B + N, hidden) each; no graph is recorded."""
        h1 = relu_dropout_(self.first(x), b1, self.drop_rate)
        return h1, relu_dropout_(h1 @ W2.mT, b2, self.drop_rate)

    def slopes_(self, g: Tensor, h1: Tensor, h2: Tensor, W2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of b1, W2 and b2, from g, which is used up, in h2; :meth:`step` will use that of the weight."""
        # what was dropped is zero, like what the ReLU stopped: neither lets a gradient through
        g, d_b2 = relu_slopes_(g, h2, self.drop_rate)
        self.gradient, d_b1 = relu_slopes_(g @ W2, h1, self.drop_rate)
        return d_b1, g.mT @ h1, d_b2

    def first(self, x: Tensor) -> Tensor:
        """Images and X times the weight of the first layer (B + N, hidden)."""
        _, P, XV = self.state.split(self.sizes)
        self.x, self.xX = x, x @ self.X.mT
        out = x.new_empty(len(x) + len(P), P.shape[1])
        torch.mm(torch.cat([x, self.xX], 1), self.state[: -len(P)], out=out[: len(x)])
        torch.addmm(XV, self.gram, P, out=out[len(x) :])
        return out

    @torch.no_grad()
    def step(self, lr: float, momentum: float) -> None:
        """Move the first layer by the gradient of the last backward pass."""
        if self.gradient is None:
            return
        batch, own = self.gradient.split([len(self.x), len(self.X)])
        for part, speed, x, g in zip(
            self.state.split(self.sizes),
            self.momentum.split(self.sizes),
            (self.x, None, self.xX),
            (batch, own, batch),
            strict=True,
        ):
            _momentum_step_(part, speed, x, g, lr, momentum)
        self.gradient = None

    @torch.no_grad()
    def close(self) -> None:
        """Give the layer its weight."""
        V, P, _ = self.state.split(self.sizes)
        with no_autocast(self.X.device):
            self.layer.weight.copy_(torch.addmm(V, self.X.mT, P).mT)
