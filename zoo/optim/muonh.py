"""MuonH: Muon with matrices on a sphere, and HyperP, the rules for transferring its learning rate.

The authors' code is microsoft/ArchScale (MIT); orthogonalisation by Newton-Schulz steps is from Muon (Jordan et al.,
2024). This is an independent implementation, checked against that code in float64.

    M <- beta M + G,   U = NS5(G + beta M),   W' = W - lr (|W| / |U|) U,   W <- W' |W| / |W'|

|.| is the Frobenius norm. The learning rate is thus the angle of a step, whatever the shape of the matrix: there is no
weight decay, warm-up or factor by shape. The radius is the norm of the initial matrix.

>>> optimizer = MuonH(muonh_groups(model), lr=0.05)
>>> optimizer = MuonH(muonh_groups(model, head="sphere"), lr=transferred_lr(0.05, depth=16, base_depth=8))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args, overload

import torch
from timm.optim import OptimInfo
from timm.optim._optim_factory import default_registry
from torch import Tensor, nn

__all__ = ["COEFFICIENTS", "MuonH", "by_method", "muonh_groups", "newton_schulz", "residual_factor", "transferred_lr"]

Method = Literal["muon", "adam_sphere", "adam"]
Head = Literal["plain", "sphere"]

#: Coefficients (a, b, c) of the five steps X <- a X + (b A + c A A) X, A = X X^T.
COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def newton_schulz(
    G: Tensor, eps: float = 1e-7, *, dtype: torch.dtype | None = None, iterates: list[Tensor] | None = None
) -> Tensor:
    """A matrix with the singular vectors of G and singular values near 1; zero is mapped to zero.

    Args:
        G: (..., m, n).
        eps: Added to the Frobenius norm before dividing G by it.
        dtype: Dtype of the products; None: that of G, but bfloat16 on CUDA for float32 and below.
        iterates: If given, the start and each iterate are appended, transposed if G is tall.

    Returns:
        (..., m, n), in the dtype of G.
    """
    if dtype is None:
        wide = G.dtype == torch.float64
        half = G.dtype in (torch.float16, torch.bfloat16)
        dtype = torch.bfloat16 if G.is_cuda and not wide else torch.float32 if half else G.dtype
    X = (G.mT if G.shape[-2] > G.shape[-1] else G).to(torch.promote_types(G.dtype, torch.float32))
    X = (X / (X.norm(dim=(-2, -1), keepdim=True) + eps)).to(dtype)
    if iterates is not None:
        iterates.append(X)
    for a, b, c in COEFFICIENTS:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
        if iterates is not None:
            iterates.append(X)
    return (X.mT if G.shape[-2] > G.shape[-1] else X).to(G.dtype)


class MuonH(torch.optim.Optimizer):
    """Muon on Frobenius spheres for matrices, AdamW for everything else, by each group's `method`.

    Filters (out, in, ...) are treated as matrices (out, in * ...). With zero gradients a matrix stops moving once its
    momentum has decayed. Optimizer states have the parameter's dtype, at least float32.

    Args:
        params: Parameters, or groups, such as those of :func:`muonh_groups`.
        lr: Learning rate: for matrices an angle; also for other groups unless `adam_lr` is given.
        adam_lr: Learning rate of `adam` and `adam_sphere` groups without their own; None: `lr`.
        beta: Decay of the momentum.
        betas: Decays of Adam's two moments.
        eps: Adam's epsilon.
        ns_eps: See :func:`newton_schulz`.
        norm_eps: Lower bound of the norm that a step is divided by.
        weight_decay: Decoupled weight decay; for matrices it is applied before the radius is computed, as in the
            authors' code, so that the radius shrinks by (1 - lr weight_decay) per step.
        method: Default for groups: `"muon"`, `"adam_sphere"` (Adam's direction with the same step) or `"adam"`.

    Raises:
        ValueError: An argument is out of range, a method is unknown, or a parameter on a sphere is not a matrix or is
            zero: on a sphere of radius 0 it could never move.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.05,
        adam_lr: float | None = None,
        beta: float = 0.95,
        betas: Sequence[float] = (0.9, 0.95),
        eps: float = 1e-8,
        ns_eps: float = 1e-8,
        norm_eps: float = 1e-8,
        weight_decay: float = 0.0,
        method: Method = "muon",
    ) -> None:
        if not lr > 0 or (adam_lr is not None and not adam_lr > 0) or not weight_decay >= 0:
            raise ValueError(
                f"lr={lr} and adam_lr={adam_lr} must be positive, weight_decay={weight_decay} not negative"
            )
        if not 0 <= beta < 1 or len(betas) != 2 or not all(0 <= b < 1 for b in betas):
            raise ValueError(f"beta={beta} and both of betas={tuple(betas)} must lie in [0, 1)")
        if not eps > 0 or not ns_eps > 0 or not norm_eps > 0:
            raise ValueError(f"eps={eps}, ns_eps={ns_eps} and norm_eps={norm_eps} must be positive")
        self.adam_lr = adam_lr
        defaults = {"lr": lr, "beta": beta, "betas": tuple(betas), "eps": eps, "ns_eps": ns_eps}
        super().__init__(params, {**defaults, "norm_eps": norm_eps, "weight_decay": weight_decay, "method": method})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, after a check of its method and parameters."""
        method = param_group.get("method", self.defaults["method"])
        if method not in get_args(Method):
            raise ValueError(f"method={method!r} is not one of {', '.join(map(repr, get_args(Method)))}")
        if method != "muon" and self.adam_lr is not None:
            param_group.setdefault("lr", self.adam_lr)
        super().add_param_group(param_group)
        if method == "adam":
            return
        for p in self.param_groups[-1]["params"]:
            if p.ndim < 2:
                raise ValueError(f"a parameter of shape {tuple(p.shape)} is not a matrix: give its group method='adam'")
            if not p.is_meta and not bool(p.detach().any()):
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} is zero, and on a sphere of radius 0 it never moves: "
                    "initialise it otherwise, or give its group method='adam'"
                )

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform a step; `closure`, if given, computes the loss and its gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise ValueError("MuonH takes no sparse gradients")
                direction = self._muon(p, group) if group["method"] == "muon" else self._adam(p, group)
                decay = 1 - group["lr"] * group["weight_decay"]
                if group["method"] == "adam":
                    p.mul_(decay).sub_((group["lr"] * direction).to(p.dtype))
                else:
                    p.copy_(sphere_step(p.to(direction.dtype) * decay, direction, group["lr"], group["norm_eps"]))
        return loss

    def _muon(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """Muon's direction U, with the parameter's shape."""
        state, g = self.state[p], _wide(p.grad)
        if not state:
            state["momentum_buffer"] = torch.zeros_like(g)
        M = state["momentum_buffer"].mul_(group["beta"]).add_(g)
        U = newton_schulz((g + group["beta"] * M).flatten(1), group["ns_eps"])
        return U.view_as(p)

    def _adam(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """Adam's direction, with the parameter's shape."""
        state, g = self.state[p], _wide(p.grad)
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(g), torch.zeros_like(g)
        state["step"] += 1
        step, (beta1, beta2) = float(state["step"]), group["betas"]
        m = state["exp_avg"].mul_(beta1).add_(g, alpha=1 - beta1)
        v = state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        return (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + group["eps"])


def _wide(g: Tensor | None) -> Tensor:
    assert g is not None
    return g.to(torch.promote_types(g.dtype, torch.float32))


def sphere_step(W: Tensor, U: Tensor, lr: float, eps: float = 1e-8) -> Tensor:
    """W - lr (|W| / |U|) U, projected back to the sphere of radius |W|.

    Args:
        W: A parameter.
        U: A direction of the same shape; if it is zero, W is unchanged.
        lr: Angle, approximately.
        eps: Lower bound of the norm of U in the division.
    """
    radius = W.norm()
    moved = W - (lr * radius / U.norm().clamp_min(eps)) * U
    return moved * (radius / moved.norm().clamp_min(torch.finfo(W.dtype).tiny))


# ---- parameter groups -------------------------------------------------------------------------------------


def muonh_groups(
    model: nn.Module, *, head: Head = "plain", depthwise: bool = False, adam_lr: float | None = None
) -> list[dict[str, Any]]:
    """Groups for :class:`MuonH`: weights of linear layers and dense convolutions by Muon, the rest by Adam.

    The rest are vectors, norms, embeddings, depthwise filters (orthogonalising across channels would mix unrelated
    filters), the output head, and every parameter that is not the weight of a linear or convolutional layer, such as
    kernel hyper-parameters and inducing points.

    Args:
        model: Frozen parameters are left out, shared ones are counted once.
        head: The classifier (`model.get_classifier()`, else the last linear layer): `"plain"` Adam, or Adam's direction
            on the `"sphere"`.
        depthwise: Also train filters of grouped convolutions with Muon.
        adam_lr: Learning rate of the groups not trained by Muon; None: the optimizer's.

    Returns:
        One to three groups, each with its `method` and parameter names.

    Raises:
        ValueError: There is no matrix for Muon, or `head` is unknown.
    """
    if head not in get_args(Head):
        raise ValueError(f"head={head!r} is not one of 'plain', 'sphere'")
    outputs = _head_weights(model)
    matrices = set()
    for module in model.modules():
        if isinstance(module, nn.Linear) or (
            isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and (module.groups == 1 or depthwise)
        ):
            matrices.add(id(module.weight))
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    named: dict[str, list[tuple[str, nn.Parameter]]] = {method: [] for method in get_args(Method)}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if id(p) in outputs and head == "sphere":
            named["adam_sphere"].append((name, p))
        elif id(p) in matrices - embedded - outputs:
            named["muon"].append((name, p))
        else:
            named["adam"].append((name, p))
    if not named["muon"]:
        raise ValueError(
            f"{type(model).__name__} has no matrix for Muon: no linear or dense convolutional weight to train"
        )
    rate = {} if adam_lr is None else {"lr": adam_lr}
    return [
        {
            "params": [p for _, p in found],
            "param_names": [name for name, _ in found],
            "method": method,
            **({} if method == "muon" else rate),
        }
        for method, found in named.items()
        if found
    ]


def by_method(groups: list[dict[str, Any]], model: nn.Module) -> list[dict[str, Any]]:
    """Split groups of parameters with equal decay and rate by the method of :class:`MuonH`.

    Args:
        groups: From `zoo.optim.param_groups`.
        model: Owner of the parameters.

    Raises:
        ValueError: As for :func:`muonh_groups`.
    """
    methods = {p: group["method"] for group in muonh_groups(model) for p in group["params"]}
    split = []
    for group in groups:
        for method in dict.fromkeys(methods[p] for p in group["params"]):
            split.append({**group, "params": [p for p in group["params"] if methods[p] == method], "method": method})
    return split


def _head_weights(model: nn.Module) -> set[int]:
    """Weights of the classifier if the model names it, else of the last linear layer."""
    get_classifier: Any = getattr(model, "get_classifier", None)
    chosen = get_classifier() if callable(get_classifier) else None
    linear = [m for m in (chosen if isinstance(chosen, nn.Module) else model).modules() if isinstance(m, nn.Linear)]
    if not linear:
        return set()
    return {id(m.weight) for m in (linear if isinstance(chosen, nn.Module) else linear[-1:])}


# ---- learning rate transfer-----------------------------------------------------------------------------------------


def transferred_lr(
    lr: float,
    *,
    depth: float = 1,
    base_depth: float = 1,
    batch: float = 1,
    base_batch: float = 1,
    data: float = 1,
    base_data: float = 1,
    exponent: float = -0.32,
) -> float:
    """HyperP's rate for another size: lr sqrt(batch / base) sqrt(base depth / depth) (data / base)^exponent.

    It does not depend on the width. The exponent was measured on language models (with tokens as data).

    Args:
        lr: Best rate at the base size.
        depth: Number of residual blocks.
        base_depth: The same for the base.
        batch: Samples (or tokens) per step.
        base_batch: The same for the base.
        data: Samples (or tokens) of the whole training.
        base_data: The same for the base.
        exponent: Exponent of the data.

    Raises:
        ValueError: A number is not positive.
    """
    if not all(x > 0 for x in (lr, depth, base_depth, batch, base_batch, data, base_data)):
        raise ValueError("rates, depths, batches and amounts of data must be positive")
    return lr * math.sqrt(batch / base_batch) * math.sqrt(base_depth / depth) * (data / base_data) ** exponent


def residual_factor(depth: float, branches: int = 2) -> float:
    """HyperP's factor for the branches of a residual network: 1 / sqrt(branches * depth).

    Args:
        depth: Number of blocks.
        branches: Residual branches per block.
    """
    return 1 / math.sqrt(branches * depth)


default_registry.register(
    OptimInfo(
        name="muonh",
        opt_class=MuonH,
        description="Muon on Frobenius spheres for matrices, AdamW for everything else",
        has_eps=True,
        has_betas=True,
    )
)
