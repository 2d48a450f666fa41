"""The empirical neural tangent kernel (NTK) of any module: inner products of its gradients.

        Theta(x, z)_cd = sum_p df_c(x)/dp df_d(z)/dp        over all trained parameters p

>>> K = empirical_ntk(model, X)                                           # (n, n): mean over outputs of Theta_cc
>>> T = empirical_ntk(model, X, Z, outputs="full")                        # (n, m, C, C)
>>> parts = empirical_ntk_by(model, X, group=lambda name: name.split(".")[0])       # one matrix per layer; they add up
>>> y = ntk_vector_product(model, X, V)                                   # Theta V without Theta
>>> kernel = EmpiricalNTK(model)                                          # a Kernel, for ridge, SVM, GP ...

The module is evaluated in eval mode with its current buffers, and its mode is restored. Gradients of a block of rows
are kept and those of the other points computed block by block, so that memory is bounded. Sources: Jacot, Gabriel and
Hongler (NeurIPS 2018); Novak, Sohl-Dickstein and Schoenholz, "Fast finite width neural tangent kernel" (ICML 2022) for
the cost of such products.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vjp, vmap

from zoo.kernels.kernel import Kernel
from zoo.kernels.linalg import solver_dtype
from zoo.ops.numerics import autocast_disabled

__all__ = ["EmpiricalNTK", "empirical_ntk", "empirical_ntk_by", "ntk_vector_product"]

Outputs = Literal["trace", "full"]
Group = Callable[[str], str | None]
Weights = dict[str, Tensor]

#: Default memory for gradients, bytes.
MEMORY = 2**30


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put every submodule in eval mode, and restore its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Network:
    """A module as a function of its selected parameters.

    Args:
        model: Inputs (n, ...) to outputs (n, ...).
        group: From a parameter's name to its group; None excludes it.
        select: Takes the outputs from the module's return value.
    """

    def __init__(self, model: nn.Module, group: Group, select: Callable[[Any], Tensor] | None) -> None:
        self.model, self.select = model, select
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.groups = {name: label for name, _ in named if (label := group(name)) is not None}
        self.weights: Weights = {name: p.detach() for name, p in named if name in self.groups}
        if not self.weights:
            raise ValueError("no parameters are selected: none requires a gradient, or `group` excludes all")
        # detached, excluded parameters record no graph
        others = itertools.chain(model.named_parameters(), model.named_buffers())
        self.others = {name: t.detach() for name, t in others if name not in self.weights}

    def __call__(self, weights: Weights, x: Tensor) -> Tensor:
        """Inputs (n, ...) to outputs (n, C)."""
        y = functional_call(self.model, {**self.others, **weights}, (x,))
        y = y if self.select is None else self.select(y)
        if not isinstance(y, Tensor) or y.ndim < 1 or y.shape[0] != x.shape[0]:
            what = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
            raise ValueError(f"the model returns {what}; outputs must be a tensor (n, ...): pass select=<function>")
        return y.flatten(1) if y.ndim > 1 else y[:, None]

    def jacobian(self, x: Tensor) -> Weights:
        """Gradients of every output of every sample, (n, C, ...) by name, one output at a time."""

        def alone(weights: Weights, one: Tensor) -> Tensor:
            return self(weights, one[None])[0]

        return vmap(jacrev(alone, chunk_size=1), (None, 0))(self.weights, x)

    def outputs(self, x: Tensor) -> int:
        with torch.no_grad():
            return self(self.weights, x[:1]).shape[1]


def empirical_ntk(
    model: nn.Module,
    X: Tensor,
    Z: Tensor | None = None,
    *,
    outputs: Outputs = "trace",
    select: Callable[[Any], Tensor] | None = None,
    memory: int = MEMORY,
) -> Tensor:
    """The NTK of a network at its current weights.

    Args:
        model: Inputs (n, ...) to outputs (n, C); frozen parameters are excluded.
        X: Inputs (n, ...), of the model's dtype and on its device.
        Z: Inputs (m, ...); X itself if None.
        outputs: `"full"`: every pair of outputs; `"trace"`: the mean of Theta_cc over the outputs c.
        select: Takes the outputs (n, ...) from the module's return value, if that is not the tensor itself.
        memory: Bytes for gradients.

    Returns:
        (n, m), or (n, m, C, C), accumulated in float64, in the dtype of the parameters.

    Raises:
        ValueError: There are no parameters, the outputs are not a tensor, or the memory is too small for two samples.
    """
    return empirical_ntk_by(model, X, Z, group=lambda _: "", outputs=outputs, select=select, memory=memory)[""]


def empirical_ntk_by(
    model: nn.Module,
    X: Tensor,
    Z: Tensor | None = None,
    *,
    group: Group,
    outputs: Outputs = "trace",
    select: Callable[[Any], Tensor] | None = None,
    memory: int = MEMORY,
) -> dict[str, Tensor]:
    """The NTK as a sum of parts: by layer, by role, or of some parameters only.

    Args:
        model: As in :func:`empirical_ntk`.
        X: Inputs (n, ...).
        Z: Inputs (m, ...); X itself if None.
        group: From a parameter's name to its part's; None excludes it.
        outputs: As in :func:`empirical_ntk`.
        select: As in :func:`empirical_ntk`.
        memory: As in :func:`empirical_ntk`.

    Returns:
        A matrix for each part, in order of first appearance.

    Raises:
        ValueError: As for :func:`empirical_ntk`.
    """
    if outputs not in get_args(Outputs):
        raise ValueError(f"outputs={outputs!r} is not one of 'trace', 'full'")
    network = _Network(model, group, select)
    n, m = len(X), len(X if Z is None else Z)
    if not n or not m:
        raise ValueError(f"X has {n} rows and Z {m}; one at least is needed of each")
    with _evaluating(model), autocast_disabled(X.device):
        C = network.outputs(X)
        held, passed = _blocks(network, C, memory, n, m)
        size = (n, m, C, C) if outputs == "full" else (n, m)
        found = {
            label: X.new_zeros(size, dtype=solver_dtype(X.device)) for label in dict.fromkeys(network.groups.values())
        }
        for i in range(0, n, held):
            left = network.jacobian(X[i : i + held])
            if Z is None:
                _accumulate(found, network.groups, left, left, i, i)
            for j in range(i + held if Z is None else 0, m, passed):
                right = network.jacobian((X if Z is None else Z)[j : j + passed])
                _accumulate(found, network.groups, left, right, i, j)
                if Z is None:
                    _accumulate(found, network.groups, right, left, j, i)
                del right
            del left
    dtype = torch.promote_types(next(iter(network.weights.values())).dtype, torch.float32)
    return {label: t.to(dtype) for label, t in found.items()}


def _blocks(network: _Network, C: int, memory: int, n: int, m: int) -> tuple[int, int]:
    """Number of samples whose gradients are kept, and of those computed at a time beside them, at most half as many."""
    each = 2 * C * sum(w.numel() * w.element_size() for w in network.weights.values())  # twice while computed
    possible = memory // each
    if possible < 2:
        raise ValueError(
            f"memory={memory} bytes is too small: gradients of two samples take {2 * each} bytes "
            f"({C} outputs, {sum(w.numel() for w in network.weights.values())} parameters)"
        )
    held = min(n, max(1, possible * 2 // 3))
    return held, min(m, possible - held)


def _accumulate(
    found: dict[str, Tensor], groups: dict[str, str], left: Weights, right: Weights, row: int, column: int
) -> None:
    """Add products of gradients to a tile of every part."""
    for name, label in groups.items():
        a, b = (t[name].reshape(*t[name].shape[:2], -1) for t in (left, right))  # (rows, C, numbers)
        dtype = torch.promote_types(a.dtype, torch.float32)
        a, b = a.to(dtype), b.to(dtype)
        part = found[label][row : row + len(a), column : column + len(b)]
        if part.ndim == 2:
            part += a.flatten(1) @ b.flatten(1).mT / a.shape[1]
        else:
            part += torch.einsum("icp,jdp->ijcd", a, b)


def ntk_vector_product(
    model: nn.Module,
    X: Tensor,
    V: Tensor,
    Z: Tensor | None = None,
    *,
    select: Callable[[Any], Tensor] | None = None,
    batch_size: int = 256,
) -> Tensor:
    """Theta(X, Z) V, by a backward pass over Z and a forward-mode pass over X; no per-sample gradients are stored.

    Args:
        model: As in :func:`empirical_ntk`.
        X: Inputs (n, ...).
        V: (m, C): one value for each output of each sample of Z.
        Z: Inputs (m, ...); X itself if None.
        select: As in :func:`empirical_ntk`.
        batch_size: Samples per pass.

    Returns:
        (n, C): sum over samples j and outputs d of Theta(x_i, z_j)_cd V_jd.

    Raises:
        ValueError: V does not fit, or as in :func:`empirical_ntk`.
    """
    network, Z = _Network(model, lambda _: "", select), X if Z is None else Z
    with _evaluating(model), autocast_disabled(X.device):
        C = network.outputs(Z)
        if V.shape != (len(Z), C):
            raise ValueError(f"V has shape {tuple(V.shape)}; {len(Z)} samples with {C} outputs need {(len(Z), C)}")
        total = {name: torch.zeros_like(w) for name, w in network.weights.items()}
        for z, v in zip(Z.split(batch_size), V.split(batch_size), strict=True):
            y, pull, *_ = vjp(lambda weights, z=z: network(weights, z), network.weights)
            for name, g in pull(v.to(y))[0].items():
                total[name] += g
        parts = [
            jvp(lambda weights, x=x: network(weights, x), (network.weights,), (total,))[1] for x in X.split(batch_size)
        ]
    return torch.cat(parts).detach()


class EmpiricalNTK(Kernel):
    """The NTK of a network at its current weights as a kernel, the mean over outputs; points are flattened inputs.

    Args:
        model: Inputs (n, *shape) to outputs (n, C).
        shape: Shape of one input; None for vectors.
        select: As in :func:`empirical_ntk`.
        memory: Bytes for gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        shape: tuple[int, ...] | None = None,
        *,
        select: Callable[[Any], Tensor] | None = None,
        memory: int = MEMORY,
    ) -> None:
        super().__init__()
        self.model, self.shape, self.select, self.memory = model, shape, select, memory

    def _inputs(self, X: Tensor) -> Tensor:
        if X.ndim != 2:
            raise ValueError(f"X has shape {tuple(X.shape)}; an empirical NTK takes points (n, D)")
        like = next(p for p in self.model.parameters())
        X = X.to(like)
        return X if self.shape is None else X.unflatten(-1, self.shape)

    def _gram(self, X: Tensor, Z: Tensor | None) -> Tensor:
        other = None if Z is None else self._inputs(Z)
        return empirical_ntk(self.model, self._inputs(X), other, select=self.select, memory=self.memory).to(X)

    def _diag(self, X: Tensor) -> Tensor:
        network = _Network(self.model, lambda _: "", self.select)
        with _evaluating(self.model):
            x = self._inputs(X)
            C = network.outputs(x)
            step = sum(_blocks(network, C, self.memory, len(x), len(x)))
            parts = []
            for some in x.split(step):
                squares = [g.double().square().flatten(1).sum(1) for g in network.jacobian(some).values()]
                parts.append(torch.stack(squares).sum(0) / C)
        return torch.cat(parts).to(X)
