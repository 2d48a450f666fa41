r"""Kernel functions k(x, z) as modules: one protocol for every learner that needs a Gram matrix.

A :class:`Kernel` maps X (..., n, D) and Z (..., m, D) to the matrix k(x_i, z_j) of shape (..., n, m); kernels
add, multiply and scale, and a kernel whose feature space is finite says so with `features`. Hyper-parameters
that must be positive are stored as free numbers `raw_<name>` and read as `<name>` (:class:`Positive`).

>>> kernel = 2.0 * Gaussian(lengthscale=[1.0, 3.0]) + Linear()
>>> K = kernel(X, Z)                                            # (..., n, m)

Numerics, once for all kernels: they compute in float32 or better, also under autocast and for half-precision
inputs, and answer in the inputs' dtype; squared distances are centred before they are expanded, and those of points
that spread far are computed in float64 (:func:`squared_distances`).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels.watching import is_recorded, is_transformed

__all__ = [
    "FeatureKernel",
    "Gaussian",
    "Kernel",
    "Laplacian",
    "Linear",
    "Polynomial",
    "Positive",
    "PrecisionGaussian",
    "Product",
    "Scaled",
    "Sum",
    "distances",
    "no_autocast",
    "plain_gradients",
    "spreads",
    "squared_distances",
]

Transform = Literal["softplus", "exp"]
Value = float | Sequence[float] | Tensor


# ---- positive hyper-parameters -----------------------------------------------------------------------------


class Positive:
    """A positive hyper-parameter, declared in a module's class body and kept as a free parameter
    `raw_<name>`.

    Reading gives the positive view (differentiable), assigning sets the raw number behind it:

        class Gaussian(nn.Module):
            lengthscale = Positive()

            def __init__(self):
                super().__init__()
                Positive.register(self, "lengthscale", 1.0)

        kernel.lengthscale            # softplus(kernel.raw_lengthscale) + floor
        kernel.lengthscale = 2.5      # kernel.raw_lengthscale changes

    Args:
        transform: `"softplus"` (linear for large values) or `"exp"` (steps are relative; for quantities that
            span orders of magnitude).
        floor: Added to the positive function, so that training stays away from 0; values below twice the floor
            are twice the function instead. Any positive number whose square float64 can hold is possible.
        optional: Allow 0 at registration, which then stays 0 and has no raw number.
    """

    def __init__(self, transform: Transform = "softplus", floor: float = 1e-6, *, optional: bool = False) -> None:
        if transform not in ("softplus", "exp"):
            raise ValueError(f"transform={transform!r} is not one of 'softplus', 'exp'")
        self.transform, self.floor, self.optional = transform, floor, optional

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, module: None, owner: Any = None) -> Positive: ...
    @overload
    def __get__(self, module: nn.Module, owner: Any = None) -> Tensor: ...
    def __get__(self, module: nn.Module | None, owner: Any = None) -> Positive | Tensor:
        if module is None:
            return self
        raw = getattr(module, f"raw_{self.name}")
        if raw is None:
            return torch.zeros((), device="cpu", dtype=torch.float32)
        return self._view(raw, torch.promote_types(raw.dtype, torch.float32))

    def of(self, module: nn.Module, dtype: torch.dtype) -> Tensor:
        """The positive view in a type, which may hold smaller numbers than the raw number's own, or not as small."""
        view = self.__get__(module)
        if view.dtype == dtype:
            return view
        if dtype == torch.float32:
            return view.to(dtype).clamp_min(_SMALLEST[dtype])
        wide = self._view(getattr(module, f"raw_{self.name}"), dtype)
        return torch.where(view > _SMALLEST[view.dtype], view.to(dtype), wide)

    def _view(self, raw: Tensor, dtype: torch.dtype) -> Tensor:
        raw = raw.to(dtype)
        # the default threshold of 20 would cost float64 nine digits there
        soft = torch.exp(raw) if self.transform == "exp" else F.softplus(raw, threshold=40)
        return (soft + soft.clamp_max(self.floor)).clamp_min(_SMALLEST[dtype]) if self.floor else soft

    def __set__(self, module: nn.Module, value: Value) -> None:
        raw = getattr(module, f"raw_{self.name}")
        if raw is None:
            raise ValueError(f"{self.name} was fixed at 0 when {type(module).__name__} was built; build another")
        new = self.inverse(torch.as_tensor(value, dtype=torch.float64, device="cpu"))
        try:
            new = new.expand(raw.shape)
        except RuntimeError:
            raise ValueError(
                f"{self.name} has shape {tuple(raw.shape)}; a value of shape {tuple(new.shape)} does not fit"
            ) from None
        with torch.no_grad():
            raw.copy_(self._fitting(new, raw.dtype))

    def _fitting(self, raw: Tensor, dtype: torch.dtype) -> Tensor:
        """The raw number in a type that can hold it."""
        if not bool(raw.to(dtype).isfinite().all()):
            raise ValueError(f"{self.name} is too large for {dtype}; build it with dtype=torch.float64")
        return raw.to(dtype)

    def inverse(self, value: Tensor) -> Tensor:
        """The raw number behind a positive value.

        Raises:
            ValueError: A value is not positive and finite, or, of one that has a floor, its square in float64.
        """
        size = value.square() if self.floor else value
        if not bool(torch.all((value > 0) & (size > 0) & torch.isfinite(size))):
            squared = ", and so must its square (1.6e-162 to 1.3e154)" if self.floor else ""
            raise ValueError(f"{self.name} must be positive and finite{squared}, got {_shown(value)}")
        soft = torch.where(value < 2 * self.floor, value / 2, value - self.floor)
        return soft.log() if self.transform == "exp" else soft + torch.log(-torch.expm1(-soft))

    @staticmethod
    def register(
        module: nn.Module, name: str, value: Value, *, learnable: bool = True, device=None, dtype=None
    ) -> None:
        """Give a module the raw number behind its declared hyper-parameter `name`.

        Args:
            module: The owner, inside its `__init__`.
            name: The declared name.
            value: Initial (positive) value or values.
            learnable: A parameter if True; otherwise a buffer, saved with the state but not trained.
            device: Where the raw number lives.
            dtype: Its type; torch's default if None.
        """
        descriptor = getattr(type(module), name)
        if descriptor.optional and isinstance(value, int | float) and value == 0:
            module.register_parameter(f"raw_{name}", None)
            return
        raw = descriptor.inverse(torch.as_tensor(value, dtype=torch.float64, device="cpu").detach())
        if dtype is None:  # float64 where the default cannot hold it
            dtype = torch.get_default_dtype()
            dtype = dtype if bool(raw.to(dtype).isfinite().all()) else torch.float64
        raw = descriptor._fitting(raw, dtype).to(device)
        if learnable:
            module.register_parameter(f"raw_{name}", nn.Parameter(raw))
        else:
            module.register_buffer(f"raw_{name}", raw)


#: Least positive view by type: a division by it stays finite, and float64 can hold its square.
_SMALLEST = {torch.float32: 1e-30, torch.float64: 1.6e-162}


def _shown(value: Tensor) -> str:
    return f"{value.item():g}" if value.numel() == 1 else f"{[round(v, 6) for v in value.flatten().tolist()[:8]]}"


# ---- distances ---------------------------------------------------------------------------------------------

#: Below this many differences the direct formula is as fast as the expansion, and exact.
_DIRECT = 2**16


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which mixed precision is off on a device, for sums that half precision would ruin."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def plain_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], wanted: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of function(*inputs) as operators that can be differentiated again and may stand for many.

    Args:
        function: Of operators that autograd knows.
        inputs: Its arguments; one tensor may be given twice.
        wanted: Which gradients are.
        grad: Gradient of the result.
    """
    with torch.enable_grad():
        own = [None if t is None else t.view_as(t) for t in inputs]  # apart, where one tensor is given twice
        y = function(*own)
    chosen = [t for t, wants in zip(own, wanted, strict=True) if wants and t is not None]
    found = iter(torch.autograd.grad(y, chosen, grad, create_graph=True))
    return tuple(next(found) if wants else None for wants in wanted)


def squared_distances(
    X: Tensor, Z: Tensor | None = None, *, method: Literal["auto", "expand", "direct"] = "auto"
) -> Tensor:
    """Squared Euclidean distances |x_i - z_j|^2 between two sets of points.

    `"expand"` uses |x|^2 + |z|^2 - 2 x.z after moving the origin into the data, so that data far from zero
    lose no digits; small negative results of rounding become zero, yet keep the derivative of the formula, so
    that first and second derivatives at coinciding points are right. No square root is taken. Its absolute
    error is about eps * (largest |x - mean|)^2, so it is evaluated in float64 where that square is above 64, and in
    float64 pairs near each other are summed directly where the error would show: tight clusters may lie far from each
    other. `"direct"` sums the squares of the differences and needs memory for
    n * m * D numbers. A compiled or exported graph decides nothing by the data and stays in the type of the points.

    Args:
        X: Points (..., n, D).
        Z: Points (..., m, D); X itself if None, and then the diagonal is exactly zero.
        method: `"auto"` is direct where n * m * D <= 65536.

    Returns:
        (..., n, m), at least float32; autocast has no effect.
    """
    dtype = _compute_dtype(X, Z)
    with no_autocast(X.device):
        X = X.to(dtype)
        Y = X if Z is None else Z.to(dtype)
        if method == "auto":
            method = "direct" if X.shape[-2] * Y.shape[-2] * X.shape[-1] <= _DIRECT else "expand"
        if method == "direct":
            return (X.unsqueeze(-2) - Y.unsqueeze(-3)).square().sum(-1)
        if method != "expand":
            raise ValueError(f"method={method!r} is not one of 'auto', 'expand', 'direct'")
        origin = _origin(Y)
        if spreads(X - origin, Y - origin):
            double = squared_distances(X.double(), None if Z is None else Y.double(), method="expand")
            return double.to(dtype)
        given = X, Y
        X, Y = X - origin, Y - origin
        squares = X.square().sum(-1, keepdim=True) + Y.square().sum(-1).unsqueeze(-2)
        q = squares - 2 * _exact_product(X, Y.mT)
        q = torch.where(q < 0, q - q.detach(), q)  # zero, with the derivative of q
        if Z is None:
            eye = torch.eye(q.shape[-1], dtype=torch.bool, device=q.device)
            q = torch.where(eye, q - q.detach(), q)
        return _sharpened(q, float(squares.detach().max()), *given) if _may_look(q) else q


#: Errors of squared distances in units of a lengthscale that no kernel shows.
_VISIBLE = 1e-9


def _may_look(q: Tensor) -> bool:
    """Whether decisions may be taken by the values of squared distances, and there are any to take."""
    return q.dtype == torch.float64 and q.numel() > 0 and not q.is_meta and not is_recorded(q)


def _sharpened(q: Tensor, largest: float, X: Tensor, Y: Tensor) -> Tensor:
    """Squared distances whose near pairs are summed from their differences, where the error of the expansion shows.

    That is so where points spread over more than about a thousand lengthscales.

    Args:
        q: What the expansion gave, (..., n, m).
        largest: The largest sum of two squared norms that it began with.
        X: Points (..., n, D).
        Y: Points (..., m, D).
    """
    error = 16 * torch.finfo(q.dtype).eps * largest
    if error <= _VISIBLE:
        return q
    near = ~(q.detach() > 1500 + 1e6 * error)  # beyond, a Gaussian is zero, and others have six digits
    if 8 * int(near.sum()) > near.numel():
        step = max(1, _DIRECT // max(1, Y.shape[-2] * Y.shape[-1]))
        parts = [(x.unsqueeze(-2) - Y.unsqueeze(-3)).square().sum(-1) for x in X.split(step, dim=-2)]
        return torch.cat(parts, -2)
    places = near.nonzero(as_tuple=True)
    X, Y = X.expand(*q.shape[:-2], *X.shape[-2:]), Y.expand(*q.shape[:-2], *Y.shape[-2:])
    apart = X[(*places[:-2], places[-2])] - Y[(*places[:-2], places[-1])]
    return q.index_put(places, apart.square().sum(-1))


def distances(X: Tensor, Z: Tensor | None = None, *, method: Literal["auto", "expand", "direct"] = "auto") -> Tensor:
    """Euclidean distances (..., n, m); the derivative at coinciding points is zero instead of infinite.

    Args:
        X: Points (..., n, D).
        Z: Points (..., m, D); X itself if None.
        method: As in :func:`squared_distances`.
    """
    q = squared_distances(X, Z, method=method)
    apart = q > 0
    return torch.where(apart, torch.where(apart, q, 1.0).sqrt(), 0.0)


def _origin(Y: Tensor) -> Tensor:
    """A point inside the data. Distances do not depend on it, so neither do derivatives."""
    return Y.detach().mean(-2, keepdim=True) if Y.shape[-2] else Y.detach().sum(-2, keepdim=True)


#: Squared norms above which the expansion in float32 has errors that a kernel shows.
_SPREAD = 64.0


def spreads(*points: Tensor | None) -> bool:
    """Whether centred points (..., n, D) lie so far out that differences between them lose digits in float32.

    Where the data cannot be asked, the answer is yes under transforms, which are rare, and no in compiled graphs.
    """
    first = points[0]
    assert first is not None
    if first.dtype != torch.float32 or first.is_meta or first.device.type == "mps":
        return False
    if is_recorded(first):
        return is_transformed(first)
    if first.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    with torch.no_grad():
        return any(bool(p.square().sum(-1).max() > _SPREAD) for p in points if p is not None and p.numel())


class _CityBlock(torch.autograd.Function):
    """The library's city-block distances, with second derivatives, which it lacks."""

    @staticmethod
    def forward(ctx: Any, X: Tensor, Y: Tensor) -> Tensor:
        with torch.enable_grad():
            ctx.given = X.detach().requires_grad_(), Y.detach().requires_grad_()
            ctx.found = torch.cdist(ctx.given[0], ctx.given[1], p=1.0)
        ctx.save_for_backward(X, Y)
        return ctx.found.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or is_transformed(grad):
            return plain_gradients(_direct_city_block, ctx.saved_tensors, ctx.needs_input_grad, grad)
        return torch.autograd.grad(ctx.found, ctx.given, grad, retain_graph=True)


def _direct_city_block(X: Tensor, Y: Tensor) -> Tensor:
    return (X.unsqueeze(-2) - Y.unsqueeze(-3)).abs().sum(-1)


def city_block_distances(X: Tensor, Z: Tensor | None = None) -> Tensor:
    """Sums of absolute differences (..., n, m) of points (..., n, D) and (..., m, D), X itself if None."""
    Y = X if Z is None else Z
    if is_transformed(X, Y):
        return _direct_city_block(X, Y)
    if is_recorded(X) or not (torch.is_grad_enabled() and (X.requires_grad or Y.requires_grad)):
        return torch.cdist(X, Y, p=1.0)
    return _CityBlock.apply(X, Y)


def _exact_product(A: Tensor, B: Tensor) -> Tensor:
    """A matrix product that is about to be subtracted from numbers of its own size.

    Where the process allows TF32 or bfloat16 inside float32 products, three digits would remain: such
    products are computed in float64.
    """
    if A.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return (A.double() @ B.double()).float()
    return A @ B


def _compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    dtype = torch.float32
    for t in tensors:
        if t is not None:
            dtype = torch.promote_types(dtype, t.dtype)
    return dtype


# ---- the protocol ------------------------------------------------------------------------------------------


class Kernel(nn.Module):
    """A positive semidefinite function of two points.

    A kernel implements `_gram`, `_diag` and, where its feature space is finite, `_features` (with
    `has_features`); all three receive at least float32 tensors with autocast off. Users call the kernel,
    `diag` and `features`.
    """

    #: Whether `features` exists.
    has_features: bool = False

    def forward(self, X: Tensor, Z: Tensor | None = None) -> Tensor:
        """The Gram matrix k(x_i, z_j).

        Args:
            X: Points (..., n, D).
            Z: Points (..., m, D) with broadcastable leading dimensions; X itself if None.

        Returns:
            (..., n, m) in the inputs' dtype.

        Raises:
            ValueError: The shapes do not fit.
        """
        _check(X, Z)
        return self._in_full(lambda x, z: self._gram(x, z), X, Z)

    def diag(self, X: Tensor) -> Tensor:
        """The values k(x_i, x_i), (..., n), without the rest of the matrix."""
        _check(X)
        return self._in_full(lambda x, _: self._diag(x), X)

    def features(self, X: Tensor) -> Tensor:
        """A feature map phi (..., n, F) with k(x, z) = phi(x) . phi(z).

        Raises:
            NotImplementedError: The kernel's feature space is not finite (`has_features` is False).
        """
        _check(X)
        if not self.has_features:
            raise NotImplementedError(f"{type(self).__name__} has no finite feature map; call the kernel itself")
        return self._in_full(lambda x, _: self._features(x), X)

    def _gram(self, X: Tensor, Z: Tensor | None) -> Tensor:
        if not self.has_features:
            raise NotImplementedError(f"{type(self).__name__} must define _gram(X, Z) or _features(X)")
        phi = self._features(X)
        return phi @ (phi if Z is None else self._features(Z)).mT

    def _diag(self, X: Tensor) -> Tensor:
        if not self.has_features:
            raise NotImplementedError(f"{type(self).__name__} must define _diag(X) or _features(X)")
        return self._features(X).square().sum(-1)

    def _features(self, X: Tensor) -> Tensor:
        raise NotImplementedError

    def _in_full(
        self, function: Callable[[Tensor, Tensor | None], Tensor], X: Tensor, Z: Tensor | None = None
    ) -> Tensor:
        """Call in at least float32 and without autocast, then go back to the inputs' dtype."""
        answer = X.dtype if Z is None else torch.promote_types(X.dtype, Z.dtype)
        numbers = itertools.chain(self.parameters(), self.buffers())
        own = next((p.dtype for p in numbers if p.is_floating_point()), None)
        dtype = torch.promote_types(_compute_dtype(X, Z), own) if own else _compute_dtype(X, Z)
        with no_autocast(X.device):
            return function(X.to(dtype), None if Z is None else Z.to(dtype)).to(answer)

    def __add__(self, other: Kernel) -> Kernel:
        if not isinstance(other, Kernel):
            return NotImplemented
        return Sum(*_parts(self, Sum), *_parts(other, Sum))

    def __mul__(self, other: Kernel | float) -> Kernel:
        if isinstance(other, Kernel):
            return Product(*_parts(self, Product), *_parts(other, Product))
        if isinstance(other, int | float):
            like = next(itertools.chain(self.parameters(), self.buffers()), torch.empty((), device="cpu"))
            return Scaled(self, float(other), device=like.device, dtype=like.dtype)
        return NotImplemented

    __rmul__ = __mul__


def _parts(kernel: Kernel, kind: type[Sum] | type[Product]) -> list[Kernel]:
    return kernel.parts if type(kernel) is kind else [kernel]


def _check(X: Tensor, Z: Tensor | None = None) -> None:
    for name, points in (("X", X), ("Z", Z)):
        if points is None:
            continue
        if points.ndim < 2:
            raise ValueError(
                f"{name} has shape {tuple(points.shape)}; points come as (..., n, D): use {name}.unsqueeze()"
            )
        if not points.is_floating_point():
            raise ValueError(f"{name} is {points.dtype}; points must be floating point: use {name}.float()")
    if Z is not None and X.shape[-1] != Z.shape[-1]:
        raise ValueError(f"X has points of {X.shape[-1]} dimensions, Z of {Z.shape[-1]}; they must agree")


def _check_dim(X: Tensor, dim: int, what: str) -> None:
    if X.shape[-1] != dim:
        raise ValueError(f"the points have {X.shape[-1]} dimensions, {what} has {dim}; they must agree")


# ---- kernels -----------------------------------------------------------------------------------------------


class Gaussian(Kernel):
    """k(x, z) = exp(-|(x - z) / lengthscale|^2 / 2).

    Args:
        lengthscale: One positive number, or one per dimension. scikit-learn's `gamma` is 1 / (2
            lengthscale^2).
        learnable: Train the lengthscale.
        device: Where the hyper-parameter lives.
        dtype: Its type; torch's default if None.
    """

    lengthscale = Positive()

    def __init__(self, lengthscale: Value = 1.0, *, learnable: bool = True, device=None, dtype=None) -> None:
        super().__init__()
        _register_scales(self, "lengthscale", lengthscale, learnable, device, dtype)

    def _gram(self, X: Tensor, Z: Tensor | None) -> Tensor:
        return torch.exp(-0.5 * squared_distances(*_rescale(self, X, Z)).to(X.dtype))

    def _diag(self, X: Tensor) -> Tensor:
        return X.new_ones(X.shape[:-1])


class PrecisionGaussian(Kernel):
    """k(x, z) = exp(-(x - z)^T P (x - z) / 2) with a full, learnable precision matrix P = L L^T.

    L is lower triangular and stored row by row in `precision_elements` (the order of `torch.tril_indices`),
    with an unconstrained diagonal: P is symmetric positive semidefinite by construction and may be singular,
    which is how a regulariser switches directions off. P is also a metric: |L^T (x - z)|^2 is a plain squared
    distance.
    Source: HyperBF networks (Poggio and Girosi, 1990); the parameterisation follows Gaussian RBF networks
        with a
    learnable precision matrix.

    Args:
        dim: Number of dimensions D.
        precision: Initial P (D, D), symmetric positive semidefinite; the identity if None. Do not start at
            zero: the gradient in L vanishes there.
        rank: Number of columns of L; D if None. The cost of a Gram matrix grows with it.
        learnable: Train the elements of L.
        device: Where they live.
        dtype: Their type; torch's default if None.
    """

    def __init__(
        self,
        dim: int,
        precision: Tensor | None = None,
        *,
        rank: int | None = None,
        learnable: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        rank = dim if rank is None else rank
        if dim < 1 or not 1 <= rank <= dim:
            raise ValueError(f"dim={dim}, rank={rank}: dim must be positive and rank between 1 and dim")
        self.dim, self.rank = dim, rank
        elements = torch.zeros(torch.tril_indices(dim, rank, device="cpu").shape[1], device=device, dtype=dtype)
        if learnable:
            self.precision_elements = nn.Parameter(elements)
        else:
            self.register_buffer("precision_elements", elements)
        self.precision = torch.eye(dim, device="cpu") if precision is None else precision

    @property
    def factor(self) -> Tensor:
        """L (D, rank), lower triangular."""
        rows, columns = torch.tril_indices(self.dim, self.rank, device=self.precision_elements.device)
        return self.precision_elements.new_zeros(self.dim, self.rank).index_put(
            (rows, columns), self.precision_elements
        )

    @property
    def precision(self) -> Tensor:
        """P = L L^T (D, D)."""
        with no_autocast(self.precision_elements.device):
            return self.factor @ self.factor.mT

    @precision.setter
    def precision(self, value: Tensor) -> None:
        value = torch.as_tensor(value, device="cpu").detach().to(torch.float64)
        if value.shape != (self.dim, self.dim):
            raise ValueError(f"precision has shape {tuple(value.shape)}; it must be ({self.dim}, {self.dim})")
        scale = value.abs().max()
        symmetric = bool(torch.isfinite(scale)) and bool((value - value.mT).abs().max() <= 1e-6 * scale)
        value = (value + value.mT) / 2 if symmetric else -torch.eye(self.dim, dtype=value.dtype, device="cpu")
        eigenvalues, vectors = torch.linalg.eigh(value)
        if eigenvalues[0] < -1e-6 * scale or not symmetric:
            raise ValueError("precision must be symmetric positive semidefinite and finite")
        # the leading eigenpairs give P (or its best approximation of this rank); QR makes their root
        # triangular
        root = vectors[:, -self.rank :] * eigenvalues[-self.rank :].clamp_min(0).sqrt()
        upper = torch.linalg.qr(root.mT).R
        lower = (upper * torch.where(upper.diagonal() < 0, -1.0, 1.0).unsqueeze(-1)).mT
        rows, columns = torch.tril_indices(self.dim, self.rank, device="cpu")
        with torch.no_grad():
            self.precision_elements.copy_(lower[rows, columns])

    def _gram(self, X: Tensor, Z: Tensor | None) -> Tensor:
        _check_dim(X, self.dim, "the precision matrix")
        L, dtype = self.factor.to(X.dtype), X.dtype
        origin = _origin(X if Z is None else Z)  # first, or the product would round far from zero
        if spreads(*(None if p is None else (p - origin).detach().abs() @ L.detach().abs() for p in (X, Z))):
            X, Z, origin, L = X.double(), None if Z is None else Z.double(), origin.double(), L.double()
        projected = None if Z is None else _exact_product(Z - origin, L)
        return torch.exp(-0.5 * squared_distances(_exact_product(X - origin, L), projected).to(dtype))

    def _diag(self, X: Tensor) -> Tensor:
        return X.new_ones(X.shape[:-1])

    def extra_repr(self) -> str:
        return f"dim={self.dim}, rank={self.rank}"


class Laplacian(Kernel):
    """k(x, z) = exp(-sum_d |x_d - z_d| / lengthscale_d), with the city-block distance.

    Args:
        lengthscale: One positive number, or one per dimension. scikit-learn's `gamma` is 1 / lengthscale.
        learnable: Train the lengthscale.
        device: Where the hyper-parameter lives.
        dtype: Its type; torch's default if None.
    """

    lengthscale = Positive()

    def __init__(self, lengthscale: Value = 1.0, *, learnable: bool = True, device=None, dtype=None) -> None:
        super().__init__()
        _register_scales(self, "lengthscale", lengthscale, learnable, device, dtype)

    def _gram(self, X: Tensor, Z: Tensor | None) -> Tensor:
        return torch.exp(-city_block_distances(*_rescale(self, X, Z)).to(X.dtype))

    def _diag(self, X: Tensor) -> Tensor:
        return X.new_ones(X.shape[:-1])


class Linear(Kernel):
    """k(x, z) = x . z, whose features are the points themselves."""

    has_features = True

    def _features(self, X: Tensor) -> Tensor:
        return X


class Polynomial(Kernel):
    """k(x, z) = (gamma x . z + offset)^degree.

    Args:
        degree: Whole number of at least 1.
        gamma: Positive factor of the product.
        offset: Positive constant, or 0 for the homogeneous kernel, which has no offset to learn.
        learnable: Train gamma and offset.
        device: Where the hyper-parameters live.
        dtype: Their type; torch's default if None.
    """

    gamma = Positive()
    offset = Positive(floor=0.0, optional=True)

    has_features = True

    def __init__(
        self,
        degree: int = 3,
        gamma: float = 1.0,
        offset: float = 1.0,
        *,
        learnable: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if degree < 1 or degree != int(degree):
            raise ValueError(f"degree={degree} is not a whole number of at least 1")
        self.degree = int(degree)
        Positive.register(self, "gamma", gamma, learnable=learnable, device=device, dtype=dtype)
        Positive.register(self, "offset", offset, learnable=learnable, device=device, dtype=dtype)

    def _gram(self, X: Tensor, Z: Tensor | None) -> Tensor:
        product = X @ (X if Z is None else Z).mT
        return (self.gamma.to(X.dtype) * product + self.offset.to(X.dtype)) ** self.degree

    def _diag(self, X: Tensor) -> Tensor:
        return (self.gamma.to(X.dtype) * X.square().sum(-1) + self.offset.to(X.dtype)) ** self.degree

    def _features(self, X: Tensor) -> Tensor:
        """Tensor power of (sqrt(gamma) x, sqrt(offset)): (D + 1)^degree columns, or D^degree without
        offset.
        """
        base = self.gamma.to(X.dtype).sqrt() * X
        if self.raw_offset is not None:
            constant = self.offset.to(X.dtype).sqrt().expand(*X.shape[:-1], 1)
            base = torch.cat([base, constant], -1)
        phi = base
        for _ in range(self.degree - 1):
            phi = _outer(phi, base)
        return phi

    def extra_repr(self) -> str:
        return f"degree={self.degree}"


class FeatureKernel(Kernel):
    """k(x, z) = phi(x) . phi(z) for any feature map: random features, or a network's last layer.

    Args:
        feature_map: A module from (..., n, D) to (..., n, F).
    """

    has_features = True

    def __init__(self, feature_map: nn.Module) -> None:
        super().__init__()
        self.feature_map = feature_map

    def _features(self, X: Tensor) -> Tensor:
        own = next((p.dtype for p in self.feature_map.parameters() if p.is_floating_point()), X.dtype)
        return self.feature_map(X.to(own)).to(X.dtype)  # a half-precision network computes as it is


def _register_scales(module: nn.Module, name: str, value: Value, learnable: bool, device: Any, dtype: Any) -> None:
    if torch.as_tensor(value, device="cpu").ndim > 1:
        raise ValueError(
            f"{name} must be one number or one per dimension, got shape {tuple(torch.as_tensor(value).shape)}"
        )
    Positive.register(module, name, value, learnable=learnable, device=device, dtype=dtype)


def _rescale(kernel: Gaussian | Laplacian, X: Tensor, Z: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Centred points in units of the lengthscale, in float64 where they spread far."""
    lengthscale = type(kernel).lengthscale.of(kernel, X.dtype)
    if lengthscale.ndim:
        _check_dim(X, lengthscale.shape[0], "the lengthscale")
    origin = _origin(X if Z is None else Z)
    scaled = (X - origin) / lengthscale, None if Z is None else (Z - origin) / lengthscale
    return _rescale(kernel, X.double(), None if Z is None else Z.double()) if spreads(*scaled) else scaled


# ---- composition -------------------------------------------------------------------------------------------


class _Several(Kernel):
    """A kernel made of others."""

    def __init__(self, *kernels: Kernel) -> None:
        super().__init__()
        if not kernels or not all(isinstance(k, Kernel) for k in kernels):
            names = [type(k).__name__ for k in kernels]
            raise ValueError(f"{type(self).__name__} is made of one or more Kernels, got {names}")
        self.kernels = nn.ModuleList(kernels)

    @property
    def has_features(self) -> bool:  # type: ignore[override]
        return all(k.has_features for k in self.parts)

    @property
    def parts(self) -> list[Kernel]:
        """The kernels, in order."""
        return cast("list[Kernel]", list(self.kernels))


class Sum(_Several):
    """k(x, z) = k_1(x, z) + k_2(x, z) + ...; features are laid side by side."""

    def _gram(self, X: Tensor, Z: Tensor | None) -> Tensor:
        return _fold(torch.add, [k(X, Z) for k in self.parts])

    def _diag(self, X: Tensor) -> Tensor:
        return _fold(torch.add, [k.diag(X) for k in self.parts])

    def _features(self, X: Tensor) -> Tensor:
        return torch.cat([k.features(X) for k in self.parts], -1)


class Product(_Several):
    """k(x, z) = k_1(x, z) * k_2(x, z) * ...; features are all products of one feature of each."""

    def _gram(self, X: Tensor, Z: Tensor | None) -> Tensor:
        return _fold(torch.mul, [k(X, Z) for k in self.parts])

    def _diag(self, X: Tensor) -> Tensor:
        return _fold(torch.mul, [k.diag(X) for k in self.parts])

    def _features(self, X: Tensor) -> Tensor:
        return _fold(_outer, [k.features(X) for k in self.parts])


class Scaled(Kernel):
    """k(x, z) = scale * k_1(x, z) with a positive scale.

    Args:
        kernel: The kernel to scale.
        scale: Initial positive factor; one number, or (...) for a batch of matrices.
        learnable: Train the factor.
        device: Where it lives.
        dtype: Its type; torch's default if None.
    """

    scale = Positive("exp", floor=0.0)
    kernel: Kernel

    def __init__(self, kernel: Kernel, scale: Value = 1.0, *, learnable: bool = True, device=None, dtype=None) -> None:
        super().__init__()
        self.kernel = kernel
        Positive.register(self, "scale", scale, learnable=learnable, device=device, dtype=dtype)

    @property
    def has_features(self) -> bool:  # type: ignore[override]
        return self.kernel.has_features

    def _gram(self, X: Tensor, Z: Tensor | None) -> Tensor:
        return self.scale.to(X.dtype)[..., None, None] * self.kernel(X, Z)

    def _diag(self, X: Tensor) -> Tensor:
        return self.scale.to(X.dtype)[..., None] * self.kernel.diag(X)

    def _features(self, X: Tensor) -> Tensor:
        return self.scale.to(X.dtype).sqrt()[..., None, None] * self.kernel.features(X)


def _fold(combine: Callable[[Tensor, Tensor], Tensor], terms: list[Tensor]) -> Tensor:
    result = terms[0]
    for term in terms[1:]:
        result = combine(result, term)
    return result


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """All products of a column of one with a column of the other: (..., n, A), (..., n, B) -> (..., n, A
    B).
    """
    return (a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(-2)
