"""Operators of a training step that sends the same few images through a perceptron every time.

A step of kernel continual learning pushes a batch of the stream and the whole coreset of the task through the
network. :class:`DualPerceptron` keeps the first layer of the network in dual form meanwhile; :func:`minmax` and
:func:`unit_rows` normalise with a backward pass of few operators. All give what the plain formulas give, but for
rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zoo.kernels.base import no_autocast

__all__ = ["DualPerceptron", "minmax", "unit_rows"]

_EPS = 1e-12


class _MinMax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        low, high = torch.aminmax(h)
        spread = (high - low).clamp_min(_EPS)
        z = (h - low).div_(spread)
        ctx.save_for_backward(h, z, low, high, spread)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        h, z, low, high, spread = ctx.saved_tensors
        g = g / spread
        weighted, total = (g * z).sum(), g.sum()
        for extreme, d in ((low, weighted - total), (high, -weighted)):
            ties = (h == extreme).to(g.dtype)
            g.addcmul_(ties, d / ties.sum())
        return g


class _UnitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
        length = norm.clamp_min(_EPS)
        z = h / length
        ctx.save_for_backward(z, norm, length)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        z, norm, length = ctx.saved_tensors
        along = (g * z).sum(-1, keepdim=True) * (norm > _EPS)
        return torch.addcmul(g, z, along, value=-1).div_(length)


def _recording(h: Tensor) -> bool:
    return h.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def minmax(h: Tensor) -> Tensor:
    """Features (B, d) with the smallest number of the whole batch mapped to 0 and the largest to 1."""
    if _recording(h):
        return _MinMax.apply(h)
    low = h.min()
    return (h - low) / (h.max() - low).clamp_min(_EPS)


def unit_rows(h: Tensor) -> Tensor:
    """Features (B, d) divided by the norm of their row."""
    return _UnitRows.apply(h) if _recording(h) else F.normalize(h, dim=-1, eps=_EPS)


# ---- the first layer in dual form --------------------------------------------------------------------------


class _Perceptron(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, b1: Tensor, W2: Tensor, b2: Tensor, dual: DualPerceptron, x: Tensor) -> Tensor:
        h1 = dual.first(x, b1)
        rate = dual.drop_rate
        dual.drop_(h1.relu_())
        h2 = torch.addmm(b2, h1, W2.mT, alpha=1 / (1 - rate)).relu_()
        if rate:
            dual.drop_(h2).mul_(1 / (1 - rate))
        ctx.save_for_backward(h1, h2, W2)
        ctx.dual = dual
        return h2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        h1, h2, W2 = ctx.saved_tensors
        scale = 1 / (1 - ctx.dual.drop_rate)
        # what was dropped is zero, like what the ReLU stopped: neither lets a gradient through
        g = torch.ops.aten.threshold_backward(g, h2, 0)
        if scale != 1:
            g.mul_(scale * scale)  # of both layers; the bias between them gets one of the two back
        d1 = g @ W2
        torch.ops.aten.threshold_backward.grad_input(d1, h1, 0, grad_input=d1)
        ctx.dual.gradient = d1
        return d1.sum(0), g.mT @ h1, g.sum(0) / scale, None, None


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
        drop_rate: Dropout after each layer, below 1, to a multiple of 2^-16.
    """

    def __init__(self, first: nn.Linear, second: nn.Linear, X: Tensor, drop_rate: float = 0.0) -> None:
        self.layer, self.second, self.X, self.drop_rate = first, second, X, drop_rate
        hidden, inputs = first.weight.shape
        self.gradient: Tensor | None = None
        self.x = self.xX = X[:0]
        with torch.no_grad(), no_autocast(X.device):
            weight = first.weight.detach().mT
            self.gram = X @ X.mT
            # V^T, P and X V^T one below the other, so that one operator moves all three
            self.state = torch.cat([weight, X.new_zeros(len(X), hidden), X @ weight])
        self.momentum = torch.zeros_like(self.state)
        self.sizes = [inputs, len(X), len(X)]

    def __call__(self, x: Tensor) -> Tensor:
        """Features (B + N, hidden) of images (B, D) and of X, after each other."""
        with no_autocast(x.device):
            return _Perceptron.apply(self.layer.bias, self.second.weight, self.second.bias, self, x)

    def first(self, x: Tensor, bias: Tensor) -> Tensor:
        """What the first layer makes of images and X (B + N, hidden)."""
        V, P, XV = self.state.split(self.sizes)
        self.x, self.xX = x, x @ self.X.mT
        out = x.new_empty(len(x) + len(P), len(bias))
        torch.addmm(bias, x, V, out=out[: len(x)]).addmm_(self.xX, P)
        torch.addmm(XV, self.gram, P, out=out[len(x) :]).add_(bias)
        return out

    def drop_(self, h: Tensor) -> Tensor:
        """Zeros in place of a random share of numbers that are not negative; the others are not rescaled."""
        if self.drop_rate:
            words = torch.empty(-(-h.numel() // 4), dtype=torch.int64, device=h.device).random_(-(2**63), None)
            bits = words.view(torch.int16)[: h.numel()].view_as(h)
            h.mul_((bits >= round(self.drop_rate * 2**16) - 2**15).to(h.dtype))
        return h

    @torch.no_grad()
    def step(self, lr: float, momentum: float) -> None:
        """Move the first layer by the gradient of the last backward pass."""
        if self.gradient is None:
            return
        batch, own = self.gradient.split([len(self.x), len(self.X)])
        V, P, XV = self.momentum.split(self.sizes)
        with no_autocast(own.device):
            V.addmm_(self.x.mT, batch, beta=momentum)
            P.mul_(momentum).add_(own)
            XV.addmm_(self.xX.mT, batch, beta=momentum)
        self.state.add_(self.momentum, alpha=-lr)
        self.gradient = None

    @torch.no_grad()
    def close(self) -> None:
        """Give the layer its weight."""
        V, P, _ = self.state.split(self.sizes)
        with no_autocast(self.X.device):
            self.layer.weight.copy_(torch.addmm(V, self.X.mT, P).mT)
