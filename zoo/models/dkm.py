r"""Deep kernel machines: networks whose layers learn Gram matrices instead of features.

Yang, Robeyns, Milsom, Anson, Schoots and Aitchison, "A theory of representation learning gives a deep generalisation of
kernel methods", arXiv 2108.13097 (ICML 2023); Milsom, Anson and Aitchison, "Convolutional deep kernel machines", arXiv
2309.09814 (ICLR 2024), and "Stochastic kernel regularisation improves generalisation in deep kernel machines", arXiv
2410.06171 (NeurIPS 2024). The authors' code is public; this is an independent implementation, checked against it.

A layer works on three quantities (:class:`Gram`): the Gram matrix of P inducing points, the inner products of the data
with them, and the squared norms of the data. A kernel maps Gram matrices to Gram matrices; a layer then learns its own
Gram matrix G, and is penalised for the distance from the kernel K:

    K = kernel(G_before),   G = L W W^T L^T with K_ii = L L^T,     penalty  nu KL(N(0, G) | N(0, K_ii))
    G_ti = K_ti K_ii^-1 G,  G_t = K_t - diag(K_ti K_ii^-1 K_it) + diag(K_ti K_ii^-1 G K_ii^-1 K_it)

W is lower triangular and initially the identity: an untrained network is the kernel (NNGP) of an infinitely wide
network, as is any network with nu = infinity. The whitened parameters are ours; the authors train a root of G itself.

    objective = E[log p(y | f)] - (sum of penalties + KL of the output) / number of training points

Cholesky factors are computed in float64, everything else in at least float32. Choose nu on validation data: the
objective keeps rising when a small nu fits noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.kernels.infinite import arc_cosines
from zoo.kernels.linalg import solver_dtype
from zoo.ops.numerics import at_least_float32, autocast_disabled
from zoo.support.scaling import standardisation, standardised

__all__ = [
    "ConvDKM",
    "DeepKernelMachine",
    "FlattenMix",
    "Gram",
    "GramConv",
    "GramKernel",
    "GramLayer",
    "GramMean",
    "GramNorm",
    "GramOutput",
    "GramResidual",
    "InducingPatches",
    "InducingPoints",
    "ZCAWhitening",
    "categorical_log_likelihood",
    "categorical_probabilities",
    "gaussian_log_likelihood",
]

KernelKind = Literal["arccos1", "arccos0", "normalised_gaussian", "sqexp"]
Objective = Literal["exact", "taylor"]
InducingNorm = Literal["none", "global", "local"]
DataNorm = Literal["none", "global", "local", "image", "location"]


class Gram(NamedTuple):
    """State of a layer for P inducing points and N data points; images have a state at every pixel.

    Attributes:
        ii: Gram matrix of the inducing points (P, P).
        ti: Inner products of the data with the inducing points (N, *space, P).
        t: Squared norms of the data (N, *space).
    """

    ii: Tensor
    ti: Tensor
    t: Tensor


def _factor(K: Tensor) -> tuple[Tensor, Tensor]:
    """L and L^-1 (P, P) with K = L L^T, in float64; NaN if K is not positive definite."""
    K = K.to(solver_dtype(K.device))
    lower, info = torch.linalg.cholesky_ex(K)
    lower = torch.where(info > 0, torch.nan, lower)
    eye = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
    return lower, torch.linalg.solve_triangular(lower, eye, upper=False)


def _with_diagonal(K: Tensor, diagonal: Tensor) -> Tensor:
    eye = torch.eye(K.shape[-1], dtype=torch.bool, device=K.device)
    return torch.where(eye, diagonal, K)


def _one_of(name: str, value: str, kind: Any) -> None:
    if value not in get_args(kind):
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, get_args(kind)))}")


def _odd(size: int) -> int:
    if size < 1 or size % 2 == 0:
        raise ValueError(f"kernel_size={size} must be odd, so that a window has a middle")
    return size


# ---- inputs ------------------------------------------------------------------------------------------------


class InducingPoints(nn.Module):
    """Inner products of rows with learned inducing rows Z (P, D): Z Z^T / D, X Z^T / D and |x|^2 / D.

    Args:
        features: D.
        inducing: P.
    """

    def __init__(self, features: int, inducing: int, device=None, dtype=None) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.empty(inducing, features, device=device, dtype=dtype))
        nn.init.normal_(self.points)

    def forward(self, x: Tensor) -> Gram:
        """(N, D) -> Gram."""
        x, Z = at_least_float32(x), at_least_float32(self.points)
        D = Z.shape[1]
        return Gram(Z @ Z.mT / D, x @ Z.mT / D, x.square().mean(-1))


class InducingPatches(nn.Module):
    """Inner products of image patches with learned inducing patches Z (P, C, k, k), zero-padded.

    The squared norm of a patch is a mean over its pixels inside the image.

    Args:
        channels: C.
        inducing: P.
        kernel_size: k, odd.
    """

    def __init__(self, channels: int, inducing: int, kernel_size: int = 3, device=None, dtype=None) -> None:
        super().__init__()
        k = _odd(kernel_size)
        self.points = nn.Parameter(torch.empty(inducing, channels, k, k, device=device, dtype=dtype))
        nn.init.normal_(self.points)

    def forward(self, x: Tensor) -> Gram:
        """(N, C, H, W) -> Gram with a state at every pixel."""
        x, Z = at_least_float32(x), at_least_float32(self.points)
        P, k, numbers = len(Z), Z.shape[-1], Z[0].numel()
        ii = Z.flatten(1) @ Z.flatten(1).mT / numbers
        ti = F.conv2d(x, Z, padding=k // 2).movedim(1, -1) / numbers  # (N, H, W, P)
        t = F.avg_pool2d(x.square().mean(1, keepdim=True), k, 1, k // 2, count_include_pad=False).squeeze(1)
        assert ti.shape[-1] == P
        return Gram(ii, ti, t)

    @torch.no_grad()
    def draw(self, images: Tensor, generator: torch.Generator | None = None) -> None:
        """Initialise with random patches of images (n, C, H, W), zero-padded at the border."""
        P, _, k, _ = self.points.shape
        n, _, H, W = images.shape
        padded = F.pad(images, (k // 2,) * 4)
        places = torch.randint(n * H * W, (P,), generator=generator).tolist()
        for p, place in enumerate(places):
            i, y, x = place // (H * W), place // W % H, place % W
            self.points[p].copy_(padded[i, :, y : y + k, x : x + k])


class ZCAWhitening(nn.Module):
    """ZCA whitening of images, as used for training deep kernel machines on images.

    Channels are standardised, multiplied by (X^T X + eps (mean eigenvalue) I)^(-1/2) over all pixels and channels,
    and standardised again. X^T X is a sum over images, so the second standardisation also sets the scale.

    Args:
        shape: (channels, height, width).
        eps: Regularisation, relative to the mean eigenvalue.
    """

    matrix: Tensor
    mean: Tensor
    std: Tensor
    mean_after: Tensor
    std_after: Tensor

    def __init__(self, shape: tuple[int, int, int], eps: float = 0.1, device=None, dtype=None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.eps, numbers, C = eps, math.prod(shape), shape[0]
        self.register_buffer("matrix", torch.eye(numbers, **dd))
        for name, start in (("mean", 0.0), ("std", 1.0), ("mean_after", 0.0), ("std_after", 1.0)):
            self.register_buffer(name, torch.full((C,), start, **dd))

    @torch.no_grad()
    def fit(self, images: Tensor) -> ZCAWhitening:
        """Fit means, deviations and the matrix to images (n, C, H, W)."""
        x = images.to(solver_dtype(images.device))
        axes = (0, 2, 3)
        mean, std = x.mean(axes), x.std(axes)
        x = (x - mean[:, None, None]) / std[:, None, None]
        values, vectors = torch.linalg.eigh(x.flatten(1).mT @ x.flatten(1))
        root = (values + self.eps * values.mean()).rsqrt()
        matrix = (vectors * root) @ vectors.mT
        x = (x.flatten(1) @ matrix).view_as(x)
        for name, value in {
            "mean": mean,
            "std": std,
            "matrix": matrix,
            "mean_after": x.mean(axes),
            "std_after": x.std(axes),
        }.items():
            getattr(self, name).copy_(value)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        column = (slice(None), None, None)
        x = (x - self.mean[column]) / self.std[column]
        x = (x.flatten(1) @ self.matrix).view_as(x)
        return (x - self.mean_after[column]) / self.std_after[column]


# ---- kernels on Gram matrices ------------------------------------------------------------------------------


class GramKernel(nn.Module):
    """exp(log_w) k + exp(log_b) of a Gram matrix, with g = G_ii and u = G_ij / sqrt(g_i g_j).

    arccos1 is sqrt(g_i g_j) times the arc-cosine kernel of ReLU, normalised to preserve the diagonal; arccos0 that of
    the step function; normalised_gaussian is sqrt(g_i g_j) exp(u - 1); sqexp is exp(-(g_i + g_j - 2 G_ij) / 2), without
    weight and bias. The diagonals are then multiplied by 1 + mult_eps and increased by abs_eps, in `ii` and in all of
    `t`. (The authors' code also stabilises the arguments of the arc-cosine kernels.)

    Args:
        kind: Name of the kernel.
        mult_eps: Relative stabiliser.
        abs_eps: Absolute stabiliser.
    """

    log_w: nn.Parameter | None
    log_b: nn.Parameter | None

    def __init__(
        self,
        kind: KernelKind = "arccos1",
        mult_eps: float = 1e-4,
        abs_eps: float = 1e-4,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        _one_of("kind", kind, KernelKind)
        self.kind, self.mult_eps, self.abs_eps = kind, mult_eps, abs_eps
        for name, start in (("log_w", 0.0), ("log_b", math.log(0.1))):
            value = None if kind == "sqexp" else nn.Parameter(torch.full((), start, device=device, dtype=dtype))
            self.register_parameter(name, value)

    def _of(self, G: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Kernel of inner products G and squared norms a and b, which broadcast."""
        if self.kind == "sqexp":
            return torch.exp(G - (a + b) / 2)
        scale = (a * b).sqrt()
        u = G / scale
        if self.kind == "normalised_gaussian":
            return scale * torch.exp(u - 1)
        return scale * arc_cosines(u)[self.kind == "arccos0"]

    def forward(self, G: Gram) -> Gram:
        """Gram -> Gram."""
        g = G.ii.diagonal()
        own = torch.ones_like if self.kind == "sqexp" else torch.clone
        ii, ti, t = self._of(G.ii, g[:, None], g), self._of(G.ti, G.t[..., None], g), own(G.t)
        diagonal = own(g)
        if self.log_w is not None and self.log_b is not None:
            w, b = at_least_float32(self.log_w).exp(), at_least_float32(self.log_b).exp()
            ii, ti, t, diagonal = w * ii + b, w * ti + b, w * t + b, w * diagonal + b
        grown = 1 + self.mult_eps
        return Gram(_with_diagonal(ii, diagonal * grown + self.abs_eps), ti, t * grown + self.abs_eps)

    def extra_repr(self) -> str:
        """Kind."""
        return self.kind


class GramNorm(nn.Module):
    """Normalise Gram matrices by their mean diagonal (global) or by their own diagonal (local), then apply learned
    scales.

    Batch statistics are used in evaluation too. For the data, `image` and `local` (the default) use one sample only;
    `global` and `location` make predictions depend on the batch.

    Args:
        i_norm: For the inducing points.
        t_norm: For the data: by the overall mean, by each value, by image, or by location over the batch.
        i_scale: One learned scale (global), one per inducing point (local), or none.
        t_scale: One learned scale (global), one per pixel (location), or none.
        inducing: P, for local scales.
        size: (H, W), for scales by location.
    """

    i_logscale: nn.Parameter | None
    t_logscale: nn.Parameter | None

    def __init__(
        self,
        i_norm: InducingNorm = "global",
        t_norm: DataNorm = "local",
        i_scale: InducingNorm = "global",
        t_scale: Literal["none", "global", "location"] = "global",
        *,
        inducing: int | None = None,
        size: Sequence[int] | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        _one_of("i_norm", i_norm, InducingNorm)
        _one_of("t_norm", t_norm, DataNorm)
        _one_of("i_scale", i_scale, InducingNorm)
        _one_of("t_scale", t_scale, Literal["none", "global", "location"])
        if (i_scale == "local" and inducing is None) or (t_scale == "location" and size is None):
            raise ValueError("i_scale='local' needs inducing=<number>, t_scale='location' needs size=(height, width)")
        self.i_norm, self.t_norm = i_norm, t_norm
        shapes = {
            "i_logscale": None if i_scale == "none" else (1,) if i_scale == "global" else (inducing,),
            "t_logscale": None if t_scale == "none" else (1,) if t_scale == "global" else tuple(size or ()),
        }
        for name, shape in shapes.items():
            value = None if shape is None else nn.Parameter(torch.zeros(*shape, device=device, dtype=dtype))
            self.register_parameter(name, value)

    def _of_data(self, t: Tensor) -> Tensor:
        if self.t_norm == "global":
            return t.mean()
        if self.t_norm == "image":
            return t.mean(tuple(range(1, t.ndim)), keepdim=True) if t.ndim > 1 else t
        return t.mean(0, keepdim=True) if self.t_norm == "location" else t

    def forward(self, G: Gram) -> Gram:
        """Gram -> Gram."""
        a, b = torch.ones_like(G.ii.diagonal()), torch.ones_like(G.t)
        if self.i_norm != "none":
            g = G.ii.diagonal()
            a = a * (g.mean() if self.i_norm == "global" else g).rsqrt()
        if self.t_norm != "none":
            b = b * self._of_data(G.t).rsqrt()
        if self.i_logscale is not None:
            a = a * at_least_float32(self.i_logscale).exp()
        if self.t_logscale is not None:
            b = b * at_least_float32(self.t_logscale).exp()
        return Gram(G.ii * a[:, None] * a, G.ti * b[..., None] * a, G.t * b.square())


# ---- layers ------------------------------------------------------------------------------------------------


class _Penalised(nn.Module):
    """A layer that keeps the penalty of its last forward pass in train mode; it is not copied with the module."""

    def __init__(self) -> None:
        super().__init__()
        self._penalty: list[Tensor] = []

    @property
    def penalty(self) -> Tensor:
        """Penalty of the last forward pass in train mode."""
        if not self._penalty:
            raise RuntimeError("a penalty is that of the last pass in train mode; there was none")
        return self._penalty[0]

    def _keep(self, penalty: Tensor) -> None:
        if self.training:
            self._penalty = [penalty]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_penalty": []}


class _Whitened(nn.Module):
    """W (P, P), lower triangular with a positive diagonal, initially the identity."""

    def __init__(self, inducing: int, device=None, dtype=None) -> None:
        super().__init__()
        self.lower = nn.Parameter(torch.zeros(inducing, inducing, device=device, dtype=dtype))
        self.log_diagonal = nn.Parameter(torch.zeros(inducing, device=device, dtype=dtype))

    def forward(self, lower: Tensor) -> Tensor:
        """W for a kernel matrix with factor L (P, P), in its dtype; the parameters do not depend on it."""
        W, d = self.lower.to(lower.dtype), self.log_diagonal.to(lower.dtype)
        return W.tril(-1) + torch.diag(d.exp())

    @torch.no_grad()
    def set(self, W: Tensor) -> None:
        """Set W to a lower triangular matrix with a positive diagonal."""
        self.lower.copy_(W.tril(-1))
        self.log_diagonal.copy_(W.diagonal().log())


def _divergence(W: Tensor, lower: Tensor, inverse: Tensor, objective: Objective) -> Tensor:
    """KL(N(0, L W W^T L^T) | N(0, L L^T)), or its surrogate |G^-1 K - I|_F^2 / 4, which keeps G non-singular."""
    eye = torch.eye(len(W), dtype=W.dtype, device=W.device)
    if objective == "exact":
        return (W.square().sum() - len(W)) / 2 - W.diagonal().log().sum()
    root = torch.linalg.solve_triangular(W, eye, upper=False) @ lower.mT  # W^-1 L^T
    return ((torch.linalg.solve_triangular(W, inverse, upper=False)).mT @ root - eye).square().sum() / 4


def _residual(K: Gram, B: Tensor) -> Tensor:
    """Part of K_t that the inducing points do not explain, K_t - diag(K_ti K_ii^-1 K_it), clamped at zero.

    Args:
        K: State with kernels.
        B: Rows of L^-1 K_it (N, *space, P).
    """
    return (K.t - B.square().sum(-1)).clamp_min(0)


class GramLayer(_Penalised):
    """A learned Gram matrix G of the inducing points, and the resulting state of the data.

    Args:
        inducing: P.
        nu: Degrees of freedom, the weight of the penalty; infinity keeps the kernel.
        objective: `"exact"` divergence, or its second-order surrogate `"taylor"` (for float32).
        stochastic: Stochastic kernel regularisation: in training G is replaced by an estimate V V^T from random
            features, with V = chol(G) E / sqrt(columns); `jitter` is added to it, in evaluation too.
        divisor: columns = ceil(P / divisor).
        jitter: See `stochastic`.

    Attributes:
        penalty: nu times the divergence, from the last forward pass in train mode; without sampling and jitter.
    """

    def __init__(
        self,
        inducing: int,
        nu: float = 1.0,
        objective: Objective = "exact",
        *,
        stochastic: bool = False,
        divisor: float = 4.0,
        jitter: float = 0.1,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        _one_of("objective", objective, Objective)
        if not nu > 0 or not divisor > 0 or not jitter >= 0:
            raise ValueError(f"nu={nu} and divisor={divisor} must be positive, and jitter={jitter} not negative")
        self.nu, self.objective, self.stochastic, self.jitter = nu, objective, stochastic, jitter
        self.columns = math.ceil(inducing / divisor)
        self.factor = _Whitened(inducing, device, dtype) if nu < math.inf else None

    def noise(self, like: Tensor) -> Tensor:
        """E (P, columns)."""
        return torch.randn(len(like), self.columns, dtype=like.dtype, device=like.device)

    def forward(self, K: Gram) -> Gram:
        """Gram -> Gram."""
        if self.factor is None:
            self._keep(K.ii.new_zeros(()))
            return K
        lower, inverse = _factor(K.ii)
        W = self.factor(lower)
        self._keep(self.nu * _divergence(W, lower, inverse, self.objective))
        if self.stochastic and self.training:
            W = W @ self.noise(W) / math.sqrt(self.columns)
        V = lower @ W  # a root of G
        B = K.ti @ inverse.mT.to(K.ti.dtype)  # (N, *space, P): L^-1 K_it in rows
        C = B @ W.to(B.dtype)
        ii, ti = V @ V.mT, C @ V.mT.to(B.dtype)
        t = _residual(K, B) + C.square().sum(-1)
        if self.stochastic:
            A = B @ inverse.to(B.dtype)  # K_ti K_ii^-1
            eye = torch.eye(len(ii), dtype=ii.dtype, device=ii.device)
            ii, ti, t = ii + self.jitter * eye, ti + self.jitter * A, t + self.jitter * A.square().sum(-1)
        return Gram(ii.to(K.ii.dtype), ti, t)

    def extra_repr(self) -> str:
        """Weight and objective."""
        return f"nu={self.nu:g}, {self.objective}" + (", stochastic" if self.stochastic else "")


class GramConv(nn.Module):
    """A convolution of the features behind a Gram matrix, with new inducing points composed of the old ones.

    With C = weight / sqrt(P), offsets r and k k of them: ii' = mean_r C_r K C_r^T, ti' = conv(ti, C) / k^2, and t' is
    the mean of t over the window's pixels within the image.

    Args:
        in_inducing: P.
        out_inducing: P'.
        kernel_size: k, odd.
        stride: Stride of the window.
    """

    def __init__(
        self, in_inducing: int, out_inducing: int, kernel_size: int = 3, stride: int = 1, device=None, dtype=None
    ) -> None:
        super().__init__()
        k = _odd(kernel_size)
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(out_inducing, in_inducing, k, k, device=device, dtype=dtype))
        nn.init.normal_(self.weight)

    def forward(self, K: Gram) -> Gram:
        """Gram -> Gram; pixels (H, W) -> (ceil(H / stride), ceil(W / stride))."""
        k = self.weight.shape[-1]
        C = at_least_float32(self.weight).to(K.ii.dtype) / math.sqrt(self.weight.shape[1])
        CK = torch.einsum("oprs,pq->oqrs", C, K.ii)
        ii = CK.flatten(1) @ C.flatten(1).mT / k**2
        ti = F.conv2d(K.ti.movedim(-1, 1), C, stride=self.stride, padding=k // 2).movedim(1, -1) / k**2
        t = F.avg_pool2d(K.t[:, None], k, self.stride, k // 2, count_include_pad=False).squeeze(1)
        return Gram(ii, ti, t)


class GramMean(nn.Module):
    """Global average pooling: the mean over pixels.

    Args:
        nystrom: Estimate the squared norm of the mean feature from the inducing points, instead of the mean squared
            norm, which is too large.
        in_inducing: P; with `out_inducing`, also create new inducing points, C = weight / sqrt(P).
        out_inducing: P'.
    """

    weight: nn.Parameter | None

    def __init__(
        self,
        nystrom: bool = False,
        in_inducing: int | None = None,
        out_inducing: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if (in_inducing is None) != (out_inducing is None):
            raise ValueError("pass both in_inducing and out_inducing, or neither")
        self.nystrom = nystrom
        self.register_parameter("weight", None)
        if in_inducing is not None and out_inducing is not None:
            self.weight = nn.Parameter(torch.empty(out_inducing, in_inducing, device=device, dtype=dtype))
            nn.init.normal_(self.weight)

    def forward(self, K: Gram) -> Gram:
        """Gram with pixels -> Gram without pixels."""
        ii, ti, t = K.ii, K.ti.mean((1, 2)), K.t.mean((1, 2))
        if self.nystrom:
            _, inverse = _factor(ii)
            root = inverse.mT.to(ti.dtype)
            rest = _residual(K, K.ti @ root)
            t = (ti @ root).square().sum(-1) + rest.sum((1, 2)) / rest[0].numel() ** 2
        if self.weight is not None:
            C = at_least_float32(self.weight).to(ii.dtype) / math.sqrt(self.weight.shape[1])
            ii, ti = C @ ii @ C.mT, ti @ C.mT
        return Gram(ii, ti, t)


class FlattenMix(nn.Module):
    """A fully connected layer over all pixels: C = weight / sqrt(P), weight (P', H W P) with inducing points fastest.

    Args:
        in_inducing: P.
        out_inducing: P'.
        size: (H, W).
    """

    def __init__(self, in_inducing: int, out_inducing: int, size: Sequence[int], device=None, dtype=None) -> None:
        super().__init__()
        self.in_inducing, self.pixels = in_inducing, math.prod(size)
        self.weight = nn.Parameter(torch.empty(out_inducing, self.pixels * in_inducing, device=device, dtype=dtype))
        nn.init.normal_(self.weight)

    def forward(self, K: Gram) -> Gram:
        """Gram with pixels -> Gram without pixels."""
        if K.t[0].numel() != self.pixels:
            raise ValueError(f"the state has {tuple(K.t.shape[1:])} pixels; this layer was built for {self.pixels}")
        C = at_least_float32(self.weight).to(K.ii.dtype) / math.sqrt(self.in_inducing)
        ti = K.ti.flatten(1) @ C.mT / self.pixels
        C = C.unflatten(1, (self.pixels, self.in_inducing))
        ii = torch.einsum("opi,ij,qpj->oq", C, K.ii, C) / self.pixels
        return Gram(ii, ti, K.t.flatten(1).mean(1))


class GramResidual(nn.Module):
    """Mean of a shortcut and a branch.

    Args:
        branch: Layers from Gram to Gram.
        shortcut: Layers; empty for the identity.
    """

    def __init__(self, branch: Iterable[nn.Module], shortcut: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        self.shortcut, self.branch = nn.Sequential(*shortcut), nn.Sequential(*branch)

    def forward(self, G: Gram) -> Gram:
        """Gram -> Gram."""
        shortcut, branch = self.shortcut(G), self.branch(G)
        return Gram(*((a + b) / 2 for a, b in zip(shortcut, branch, strict=True)))


class GramOutput(_Penalised):
    """Gaussian processes on the last kernel: q(f) = N(mu_c, A) for each output c, with a shared covariance.

    mu = L m and A = L W W^T L^T, with K_ii = L L^T.

    Args:
        inducing: P.
        outputs: C.
        objective: As in :class:`GramLayer`.
        tempered: Divide the divergence by the number of outputs.

    Attributes:
        penalty: Divergence from the prior, from the last forward pass in train mode.
    """

    def __init__(
        self,
        inducing: int,
        outputs: int,
        objective: Objective = "exact",
        *,
        tempered: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        _one_of("objective", objective, Objective)
        self.objective, self.tempered = objective, tempered
        self.means = nn.Parameter(torch.empty(inducing, outputs, device=device, dtype=dtype))
        nn.init.normal_(self.means, std=0.01)
        self.factor: _Whitened | None = _Whitened(inducing, device, dtype)

    def whitened_means(self, lower: Tensor) -> Tensor:
        """The means m (P, C) for a kernel matrix with factor L (P, P), in its dtype."""
        return self.means.to(lower.dtype)

    def forward(self, K: Gram) -> tuple[Tensor, Tensor]:
        """Gram -> means (N, C) and variances (N,) of the outputs."""
        lower, inverse = _factor(K.ii)
        m = self.whitened_means(lower)
        B = K.ti @ inverse.mT.to(K.ti.dtype)
        return B @ m.to(B.dtype), self.variances(K, B, lower, inverse)

    def variances(self, K: Gram, B: Tensor, lower: Tensor, inverse: Tensor) -> Tensor:
        """Variances (N,), given the rows B = L^-1 K_it (N, P), L and L^-1; also stores the penalty."""
        if self.factor is None:
            raise RuntimeError("the deploy form has means, and no variances: ask the model that it was made of")
        W, m = self.factor(lower), self.whitened_means(lower)
        C = m.shape[1]
        divergence = C * _divergence(W, lower, inverse, self.objective) + m.square().sum() / 2
        self._keep(divergence / C if self.tempered else divergence)
        return _residual(K, B) + (B @ W.to(B.dtype)).square().sum(-1)

    def reparameterize(self) -> None:
        """Keep the means only, for `zoo.to_deploy`."""
        self.factor = None

    @torch.no_grad()
    def solve(self, K: Gram, y: Tensor, noise: float) -> None:
        """Set the optimal mu and A for Gaussian noise, given the kernels of all training points.

        With B = L^-1 K_it: W W^T = (I + B B^T / noise)^-1, m = W W^T B y / noise.

        Args:
            K: State with ti (N, P).
            y: Targets (N, C).
            noise: Noise variance.
        """
        _, inverse = _factor(K.ii)
        B = inverse @ K.ti.mT.to(inverse.dtype)
        eye = torch.eye(len(B), dtype=B.dtype, device=B.device)
        precision = eye + B @ B.mT / noise
        # flipping makes the factor of the precision upper triangular, and its inverse transpose lower
        root = torch.linalg.cholesky(precision.flip(0, 1)).flip(0, 1)
        W = torch.linalg.solve_triangular(root, eye, upper=True).mT
        assert self.factor is not None
        self.factor.set(W)
        self.means.copy_(W @ (W.mT @ (B @ y.to(B.dtype))) / noise)


# ---- likelihoods -------------------------------------------------------------------------------------------


def gaussian_log_likelihood(mean: Tensor, var: Tensor, y: Tensor, noise: Tensor | float) -> Tensor:
    """E[log N(y; f, noise)] under f ~ N(mean, var), summed over outputs, averaged over samples.

    Args:
        mean: (N, C).
        var: (N,), shared by all outputs.
        y: (N, C).
        noise: Noise variance.
    """
    noise = torch.as_tensor(noise, dtype=mean.dtype, device=mean.device)
    errors = (y - mean).square() + var[:, None]
    return -(errors / noise + torch.log(2 * math.pi * noise)).sum(1).mean() / 2


def categorical_log_likelihood(mean: Tensor, var: Tensor, y: Tensor, eps: Tensor | int = 32) -> Tensor:
    """Monte Carlo estimate of E[log softmax(f)_y] under f ~ N(mean, var), averaged over data and draws.

    Args:
        mean: (N, C).
        var: (N,).
        y: Classes (N,).
        eps: Standard normal numbers (S, N, C), or their number S.
    """
    noise = torch.randn(eps, *mean.shape, dtype=mean.dtype, device=mean.device) if isinstance(eps, int) else eps
    logs = torch.log_softmax(mean + var.sqrt()[:, None] * noise, -1).mean(0)
    return logs.gather(1, y[:, None].long()).mean()


def categorical_probabilities(mean: Tensor, var: Tensor, eps: Tensor | int = 32) -> Tensor:
    """Monte Carlo estimate of E[softmax(f)] under f ~ N(mean, var), (N, C); see :func:`categorical_log_likelihood`."""
    noise = torch.randn(eps, *mean.shape, dtype=mean.dtype, device=mean.device) if isinstance(eps, int) else eps
    return torch.softmax(mean + var.sqrt()[:, None] * noise, -1).mean(0)


# ---- networks ----------------------------------------------------------------------------------------------

Likelihood = Literal["categorical", "gaussian"]


class _Machine(nn.Module):
    """Base class of the deep kernel machines: features, outputs, losses. Subclasses define `state`.

    A forward pass in train mode stores what :meth:`aux_losses` adds to a task's loss: with cross-entropy or squared
    error on the outputs, the sum is the negative objective (for squared error times twice the noise), or for
    `samples=0` an upper bound of it: E log sum exp f <= log sum exp(mean) + var / 2.
    """

    head: nn.Module
    train_size: Tensor
    #: Parameters that are reached only by the family's own loss.
    training_only = ("head.factor",)

    def _set_up(
        self,
        num_classes: int,
        inducing: int,
        objective: Objective,
        likelihood: Likelihood,
        noise: float,
        samples: int,
        train_size: int,
        global_pool: str,
        dd: dict[str, Any],
    ) -> None:
        if global_pool:
            raise ValueError(f"global_pool={global_pool!r}: a deep kernel machine pools its own way; leave it empty")
        _one_of("likelihood", likelihood, Likelihood)
        self.num_classes, self.objective, self.likelihood = num_classes, objective, likelihood
        self.noise, self.samples = noise, samples
        self.num_features = self.head_hidden_size = inducing
        self.register_buffer("train_size", torch.tensor(train_size, device=dd["device"]))
        self.head = self._new_head(num_classes, **dd)
        self._extra: list[Tensor] = []

    def _new_head(self, num_classes: int, **dd: Any) -> nn.Module:
        if not num_classes:
            return nn.Identity()
        return GramOutput(self.num_features, num_classes, self.objective, **dd)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_extra": []}

    def state(self, x: Tensor) -> Gram:
        """Inputs to the kernel of the output layer, in at least float32."""
        raise NotImplementedError

    def _type(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def _features(self, x: Tensor) -> tuple[Gram, Tensor, Tensor, Tensor]:
        K = self.state(x)
        lower, inverse = _factor(K.ii)
        return K, K.ti @ inverse.mT.to(K.ti.dtype), lower, inverse

    def forward_features(self, x: Tensor) -> Tensor:
        """Features L^-1 K_it (B, P), whose inner products are the last kernel as explained by the inducing points."""
        with autocast_disabled(x.device):
            return self._features(x)[1].to(self._type())

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features (B, P) to output means (B, num_classes)."""
        if pre_logits or not isinstance(self.head, GramOutput):
            return x
        with autocast_disabled(x.device):
            return (at_least_float32(x) @ at_least_float32(self.head.means)).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Inputs to output means (B, num_classes); in train mode with `samples`, mean log-probabilities."""
        head = self.head
        if not self.training or not isinstance(head, GramOutput) or head.factor is None:
            return self.forward_head(self.forward_features(x))
        with autocast_disabled(x.device):
            K, B, lower, inverse = self._features(x)
            mean = B @ head.means.to(B.dtype)
            var = head.variances(K, B, lower, inverse)
            if self.likelihood == "gaussian":
                extra = var.mean() * self.num_classes
            elif not self.samples:
                extra = var.mean() / 2
            else:
                noise = torch.randn(self.samples, *mean.shape, dtype=mean.dtype, device=mean.device)
                mean = torch.log_softmax(mean + var.sqrt()[:, None] * noise, -1).mean(0)
                extra = -torch.logsumexp(mean, -1).mean()  # cross-entropy normalises them
            self._extra = [extra]
            return mean.to(self._type())

    def predict_distribution(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Means (B, num_classes) and variances (B,) of the latent outputs."""
        if not isinstance(self.head, GramOutput):
            raise ValueError("a network without outputs has no distribution")
        with autocast_disabled(x.device):
            mean, var = self.head(self.state(x))
            return mean.to(self._type()), var.to(self._type())

    def penalties(self) -> Tensor:
        """All penalties of the last forward pass in train mode, (layers,)."""
        return torch.stack([m.penalty for m in self.modules() if isinstance(m, _Penalised) and m._penalty])

    def aux_losses(self) -> dict[str, Tensor]:
        """Additional losses: penalties per training point, and the variance term."""
        if not self._extra:
            raise RuntimeError("the losses of a deep kernel machine are those of a pass in train mode; there was none")
        weight = 2 * self.noise / self.num_classes if self.likelihood == "gaussian" else 1.0
        extra = self._extra[0] / (self.num_classes if self.likelihood == "gaussian" else 1)
        return {"divergence": weight * self.penalties().sum() / self.train_size, "variance": extra}

    def no_weight_decay(self) -> set[str]:
        """All parameters: the penalties are the only regularisation."""
        return {name for name, _ in self.named_parameters()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Not supported: nothing is recomputed."""
        assert not enable, "a deep kernel machine has no blocks to checkpoint"

    def get_classifier(self) -> nn.Module:
        """The output layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the output layer by a new one; none for 0 outputs."""
        if global_pool:
            raise ValueError(f"global_pool={global_pool!r}: a deep kernel machine pools its own way; leave it empty")
        like = next(self.parameters())
        self.num_classes = num_classes
        self.head = self._new_head(num_classes, device=like.device, dtype=like.dtype).train(self.training)


class DeepKernelMachine(_Machine):
    """A fully connected deep kernel machine on flattened inputs.

    Inducing points, `depth` times kernel, Gram layer and normalisation, then a kernel and the outputs.

    Args:
        in_chans: Channels of an image, or features of a row.
        num_classes: Number of outputs; 0 returns the last features.
        inducing: Number of inducing points P.
        depth: Number of Gram layers.
        nu: Degrees of freedom of every Gram layer; infinity gives the kernel of an infinitely wide network, without
            representation learning.
        kernel: Kernel on Gram matrices, see :class:`GramKernel`.
        objective: `"exact"` or `"taylor"`, see :class:`GramLayer`.
        stochastic: Stochastic kernel regularisation.
        likelihood: `"categorical"`, or `"gaussian"` for squared error.
        noise: Variance of the Gaussian likelihood, in units of the targets.
        samples: Draws of the outputs in train mode, for classification; 0 uses a bound without sampling.
        train_size: Number of training points N; set by :meth:`initialize`.
        img_size: Side or (height, width) of image inputs; 1 for tables.
        global_pool: Only "" is accepted, there is nothing to pool.
        device: Device of the parameters and buffers.
        dtype: Their dtype; computations are in at least float32.

    Attributes:
        input_mean, input_scale: Subtracted from the flattened inputs, and their divisor.
    """

    input_mean: Tensor
    input_scale: Tensor

    def __init__(
        self,
        in_chans: PositiveInt = 16,
        num_classes: Annotated[int, Ge(0)] = 10,
        *,
        inducing: PositiveInt = 100,
        depth: NonNegativeInt = 2,
        nu: Annotated[float, Gt(0)] = 1.0,
        kernel: KernelKind = "arccos1",
        objective: Objective = "exact",
        stochastic: bool = False,
        likelihood: Likelihood = "categorical",
        noise: PositiveFloat = 0.1,
        samples: NonNegativeInt = 0,
        train_size: PositiveInt = 1000,
        img_size: PositiveInt | tuple[PositiveInt, PositiveInt] = 1,
        global_pool: str = "",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.in_chans, self.dim = in_chans, in_chans * height * width
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.register_buffer("input_mean", torch.zeros(self.dim, **dd))
        self.register_buffer("input_scale", torch.ones(self.dim, **dd))
        self.points = InducingPoints(self.dim, inducing, **dd)
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [GramKernel(kernel, **dd), GramLayer(inducing, nu, objective, stochastic=stochastic, **dd)]
            layers.append(GramNorm(**dd))
        self.layers = nn.Sequential(*layers, GramKernel(kernel, **dd))
        self.feature_info = [{"num_chs": inducing, "reduction": 1, "module": "layers"}]
        self._set_up(num_classes, inducing, objective, likelihood, noise, samples, train_size, global_pool, dd)

    def state(self, x: Tensor) -> Gram:
        """Rows or images (B, in_chans, ...) to the last kernel."""
        x = x.flatten(1)
        if x.shape[1] != self.dim:
            raise ValueError(f"expected a batch of {self.dim} features (or images of as many values), got {x.shape[1]}")
        x = standardised(x, self.input_mean, self.input_scale, torch.promote_types(self._type(), torch.float32))
        return self.layers(self.points(x))

    @torch.no_grad()
    def initialize(
        self, X: Tensor, y: Tensor | None = None, *, generator: torch.Generator | None = None, **_: Any
    ) -> None:
        """Standardise the inputs by the training rows, and choose random rows as inducing points.

        Args:
            X: All training rows (n, ...).
            y: Their classes or values; ignored.
            generator: Source of randomness.
            **_: Further arguments of the task, ignored.

        Raises:
            ValueError: There are fewer rows than inducing points.
        """
        n, P = len(X), len(self.points.points)
        if n < P:
            raise ValueError(
                f"inducing={P} points are taken from the training rows, of which there are {n}: ask for fewer"
            )
        mean, scale = standardisation(X.flatten(1))
        self.input_mean.copy_(mean)
        self.input_scale.copy_(scale.clamp_min(torch.finfo(self.input_scale.dtype).tiny))
        chosen = X[torch.randperm(n, generator=generator)[:P].to(X.device)].flatten(1).to(self.input_mean.device)
        self.points.points.copy_(standardised(chosen, self.input_mean, self.input_scale, self.input_mean.dtype))
        self.train_size.fill_(n)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The inducing points, then one parameter group per layer."""
        return {"stem": r"^input_|^points|^train_size", "blocks": r"^layers\.(\d+)"}


class ConvDKM(_Machine):
    """A residual convolutional deep kernel machine on images of any size.

    Inducing patches, kernel, convolution, Gram layer and normalisation; stages of residual blocks of two such layers
    each, where the first block halves height and width and has a normalised 1 x 1 convolution as shortcut; the mean
    over pixels, kernel, normalisation, outputs.

    Args:
        in_chans: Channels.
        num_classes: Number of outputs; 0 returns the last features.
        inducing: Inducing points P of the stem and of each stage: one more entry than `depths`.
        depths: Residual blocks of each stage.
        strides: Stride of the first block of each stage; None for 2 everywhere, as in the authors' code.
        nu: As in :class:`DeepKernelMachine`, as what follows.
        kernel: Kernel on Gram matrices.
        objective: For the Gram layers and the outputs.
        stochastic: Stochastic kernel regularisation.
        likelihood: For the outputs.
        noise: Variance of the Gaussian likelihood.
        samples: Draws of the outputs in train mode, for classification.
        train_size: Number of training images N.
        global_pool: Only "" is accepted, the mean over pixels is part of the network.
        device: Device of the parameters and buffers.
        dtype: Their dtype.
    """

    def __init__(
        self,
        in_chans: PositiveInt = 3,
        num_classes: Annotated[int, Ge(0)] = 10,
        *,
        inducing: Sequence[PositiveInt] = (64, 64, 128, 256),
        depths: Sequence[PositiveInt] = (3, 3, 3),
        strides: Sequence[PositiveInt] | None = None,
        nu: Annotated[float, Gt(0)] = 1e-3,
        kernel: KernelKind = "normalised_gaussian",
        objective: Objective = "taylor",
        stochastic: bool = False,
        likelihood: Likelihood = "categorical",
        noise: PositiveFloat = 0.1,
        samples: NonNegativeInt = 0,
        train_size: PositiveInt = 50_000,
        global_pool: str = "",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        strides = [2] * len(depths) if strides is None else list(strides)
        if len(inducing) != len(depths) + 1 or len(strides) != len(depths):
            raise ValueError(
                f"inducing={list(inducing)} must have one number more than depths={list(depths)}, "
                f"and strides={strides} as many"
            )
        self.in_chans = in_chans
        dd: dict[str, Any] = {"device": device, "dtype": dtype}

        def norm() -> GramNorm:
            return GramNorm("global", "image", **dd)

        def layer(before: int, after: int, stride: int = 1) -> Iterator[nn.Module]:
            yield GramKernel(kernel, **dd)
            yield GramConv(before, after, 3, stride, **dd)
            yield GramLayer(after, nu, objective, stochastic=stochastic, **dd)
            yield norm()

        self.points = InducingPatches(in_chans, inducing[0], **dd)
        self.stem = nn.Sequential(*layer(inducing[0], inducing[0]))
        stages: list[nn.Module] = []
        for before, after, depth, stride in zip(inducing[:-1], inducing[1:], depths, strides, strict=True):
            blocks: list[nn.Module] = []
            for i in range(depth):
                first = i == 0 and (stride > 1 or before != after)
                P, step = (before, stride) if first else (after, 1)
                shortcut = [GramConv(P, after, 1, step, **dd), norm()] if first else []
                blocks.append(GramResidual([*layer(P, after, step), *layer(after, after)], shortcut))
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.last = nn.Sequential(GramMean(), GramKernel(kernel, **dd), GramNorm(**dd))
        reductions = [math.prod(strides[: i + 1]) for i in range(len(depths))]
        self.feature_info = [
            {"num_chs": P, "reduction": r, "module": f"stages.{i}"}
            for i, (P, r) in enumerate(zip(inducing[1:], reductions, strict=True))
        ]
        self._set_up(num_classes, inducing[-1], objective, likelihood, noise, samples, train_size, global_pool, dd)

    def state(self, x: Tensor) -> Gram:
        """Images (B, in_chans, H, W) to the last kernel."""
        x = x.to(torch.promote_types(self._type(), torch.float32))
        return self.last(self.stages(self.stem(self.points(x))))

    @torch.no_grad()
    def initialize(
        self, X: Tensor, y: Tensor | None = None, *, generator: torch.Generator | None = None, **_: Any
    ) -> None:
        """Choose random patches of the training images (n, C, H, W) as inducing patches, and set `train_size`."""
        images = X.to(self.points.points)
        self.points.draw(images, generator)
        self.train_size.fill_(len(X))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The stem, then one parameter group per block."""
        return {
            "stem": r"^points|^stem|^train_size",
            "blocks": r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)",
        }


# ---- variants ----------------------------------------------------------------------------------------------


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 10,
        "input_size": (16, 1, 1),
        "pool_size": None,
        "fixed_input_size": True,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.0,),
        "std": (1.0,),
        "first_conv": (),
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2108.13097",
        "paper_name": "A theory of representation learning gives a deep generalisation of kernel methods",
        **kwargs,
    }


def _image_cfg(size: tuple[int, int, int]) -> dict[str, Any]:
    return _cfg(
        input_size=size,
        fixed_input_size=False,
        mean=(0.5,) * size[0],
        std=(0.5,) * size[0],
        paper_ids="arXiv:2309.09814",
        paper_name="Convolutional deep kernel machines",
    )


default_cfgs = generate_default_cfgs(
    {
        "dkm_mlp": _cfg(),
        "dkm_z": _image_cfg((1, 28, 28)),
        "dkm_resnet20": _image_cfg((3, 32, 32)),
        "test_dkm": _cfg(),
        "test_dkm_conv": _image_cfg((3, 8, 8)),
    }
)


def _create(cls: type[_Machine], variant: str, pretrained: bool, kwargs: dict[str, Any], **own: Any) -> Any:
    return build_model_with_cfg(cls, variant, pretrained, **{**own, **kwargs})


@register_model
def dkm_mlp(pretrained: bool = False, **kwargs: Any) -> DeepKernelMachine:
    """Two Gram layers on 100 inducing points, for tables and small images."""
    return _create(DeepKernelMachine, "dkm_mlp", pretrained, kwargs)


@register_model
def dkm_z(pretrained: bool = False, **kwargs: Any) -> ConvDKM:
    """Two stages of one block on 32, 32 and 64 inducing points, for digits on a CPU."""
    own = {"in_chans": 1, "inducing": (32, 32, 64), "depths": (1, 1)}
    return _create(ConvDKM, "dkm_z", pretrained, kwargs, **own)


@register_model
def dkm_resnet20(pretrained: bool = False, **kwargs: Any) -> ConvDKM:
    """The authors' network for CIFAR at half of their largest width: three stages of three blocks."""
    own = {"inducing": (256, 256, 512, 1024), "stochastic": True}
    return _create(ConvDKM, "dkm_resnet20", pretrained, kwargs, **own)


@register_model
def test_dkm(pretrained: bool = False, **kwargs: Any) -> DeepKernelMachine:  # noqa: PT028
    """Two Gram layers on six inducing points, for tests."""
    return _create(DeepKernelMachine, "test_dkm", pretrained, kwargs, inducing=6)


@register_model
def test_dkm_conv(pretrained: bool = False, **kwargs: Any) -> ConvDKM:  # noqa: PT028
    """One stage of one block on four inducing patches, for tests."""
    return _create(ConvDKM, "test_dkm_conv", pretrained, kwargs, inducing=(4, 5), depths=(1,))
