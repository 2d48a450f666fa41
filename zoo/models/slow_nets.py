"""Slow networks: small networks that map coordinates to the kernels of a fast network.

Zhang: "HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction", 2024, arXiv 2401.17948.
:class:`SlowNet` generates a hyper-kernel that depends on its parameters only, :class:`LocalSlowNet` one that depends on
activations as well (section 3). Their frequencies can be so high that half precision would return noise: they compute
in at least float32, also under autocast, and stay in float32 when a model is cast to half precision.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.ops.hyperzzw import linear_channels_first, pooled_mean, pooled_samples, renormalise, sine_waves

__all__ = ["LocalSlowNet", "SlowNet", "coordinate_grid", "matched_omega"]

HALF = (torch.float16, torch.bfloat16)


class SlowNet(nn.Module):
    """Coordinates g -> hyper-kernel W, a multiplicative filter network of sines.

        h = sin(F_0 g);   h = sin(F_l g) * (M_l h) + pos_bias  for l = 1..L;   W = out(h)

    Args:
        points: grid points n per axis.
        dims: number of axes d, 1 or 2.
        hidden: width h.
        layers: L >= 1.
        out: output channels o.
        omega_0: frequency scale; the authors' 2000 gives white noise initially, `"grid"` is :func:`matched_omega`.
        alpha: shape of the Gamma distribution of frequencies, divided by l + 1 in layer l.
        beta: its rate.
        device: device of the parameters.
        dtype: their dtype; half precision is raised to float32.

    Raises:
        ValueError: a size is not positive.
    """

    grid: Tensor

    def __init__(
        self,
        points: int,
        dims: int,
        hidden: int,
        layers: int,
        out: int,
        *,
        omega_0: float | Literal["grid"] = 2000.0,
        alpha: float = 6.0,
        beta: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(points, dims, hidden, layers, out) < 1:
            raise ValueError(
                f"sizes of a slow network must be positive, got {points=}, {dims=}, {hidden=}, {layers=}, {out=}"
            )
        dtype = torch.float32 if dtype in HALF else dtype
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.points, self.dims, self.layers = points, dims, layers
        self.omega_0 = matched_omega(points, dims, alpha, beta) if omega_0 == "grid" else float(omega_0)
        self.alpha, self.beta = alpha, beta
        self.shape = [points] * dims
        self.filters = nn.ModuleList(nn.Linear(dims, hidden, **dd) for _ in range(layers + 1))
        self.mix = nn.ModuleList(nn.Linear(hidden, hidden, **dd) for _ in range(layers))
        self.out = nn.Linear(hidden, out, **dd)
        self.pos_bias = nn.Parameter(torch.zeros(self.shape, **dd))
        self.register_buffer("grid", coordinate_grid(points, dims, **dd), persistent=False)
        if type(self) is SlowNet:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as the authors do, including the factor 1 / sqrt(number of grid points)."""
        for layer, linear in enumerate(cast("list[nn.Linear]", list(self.filters))):
            shape, rate = (torch.tensor(v, device="cpu") for v in (self.alpha / (layer + 1), self.beta))
            gamma = torch.distributions.Gamma(shape, rate).sample(linear.weight.shape)
            bound = 2 * math.pi * self.omega_0 / math.sqrt(self.dims)
            linear.weight.uniform_(-bound, bound).mul_(gamma.to(linear.weight))
            linear.bias.zero_()
        for linear in cast("list[nn.Linear]", [*self.mix, *getattr(self, "ctx_mix", [])]):
            uniform_(linear)
            linear.bias.fill_(1.0)
        uniform_(self.out)
        self.out.weight.mul_(self.points ** (-self.dims / 2))
        self.pos_bias.zero_()

    def forward(self) -> Tensor:
        """The hyper-kernel (1, o, n, ..., n)."""
        waves, bias = self.waves(), self.pos_bias.flatten()
        h = waves[0]
        for i, mix in enumerate(self.mix):
            h = waves[i + 1] * linear_channels_first(h, mix.weight, mix.bias) + bias  # type: ignore[arg-type]
        return linear_channels_first(h, self.out.weight, self.out.bias).view([1, -1] + self.shape)  # noqa: RUF005

    def waves(self) -> Tensor:
        """sin(F_l g) for every layer l = 0..L, (L + 1, h, n^d)."""
        return sine_waves(self.grid, [f.weight for f in self.filters], [f.bias for f in self.filters])  # type: ignore[misc]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SlowNet":
        """Move or convert, but keep at least float32, and recompute the grid."""

        def at_least_single(t: Tensor) -> Tensor:
            moved = fn(t)
            return t.to(moved.device) if moved.dtype in HALF and t.dtype not in HALF else moved

        super()._apply(at_least_single, recurse)
        like = self.out.weight
        self.grid = coordinate_grid(self.points, self.dims, device=like.device, dtype=like.dtype)
        return self


class LocalSlowNet(SlowNet):
    """Coordinates g and activations x -> kernel of a depthwise convolution that depends on the context.

        c = GELU(ctx_fc(mean over the batch of ctx_reduce(pool(x))))
        h = sin(F_0 g);   h = renormalise(sin(F_l g) * (M_l h) + pos_bias) * ctx_mix_l(c)  for l = 1..L;   W = out(h)

    Args:
        points: kernel size k.
        dims: axes, 1 or 2.
        hidden: width h.
        layers: L.
        out: channels C, also of the context.
        context: `"batch"`: the batch mean, as published, so that a prediction depends on its batch; `"running"`: in
            eval mode a moving average over training (momentum 0.1); `"sample"`: a separate kernel for every sample.

        **kwargs: see :class:`SlowNet`.
    """

    context_mean: Tensor | None

    def __init__(
        self,
        points: int,
        dims: int,
        hidden: int,
        layers: int,
        out: int,
        *,
        context: Literal["batch", "running", "sample"] = "batch",
        **kwargs: Any,
    ) -> None:
        super().__init__(points, dims, hidden, layers, out, **kwargs)
        dd: dict[str, Any] = {"device": self.out.weight.device, "dtype": self.out.weight.dtype}
        self.context = context
        self.ctx_reduce = nn.Linear(out, hidden, **dd)
        self.ctx_fc = nn.Linear(hidden, hidden, **dd)
        self.ctx_mix = nn.ModuleList(nn.Linear(hidden, hidden, **dd) for _ in range(layers))
        mean = torch.zeros(out, points**dims, **dd) if context == "running" else None
        self.register_buffer("context_mean", mean)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the parameters; `ctx_reduce` and `ctx_fc` as torch does."""
        super().reset_parameters()
        self.ctx_reduce.reset_parameters()
        self.ctx_fc.reset_parameters()
        if self.context_mean is not None:
            self.context_mean.zero_()

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Activations (B, C, N, ...) -> kernels (C, 1, k, ...), or by sample (B, C, k, ...)."""
        c = linear_channels_first(self.pooled(x), self.ctx_reduce.weight, self.ctx_reduce.bias)
        c = F.gelu(linear_channels_first(c, self.ctx_fc.weight, self.ctx_fc.bias))
        waves, bias = self.waves(), self.pos_bias.flatten()
        h = waves[0]
        for i, (mix, ctx_mix) in enumerate(zip(self.mix, self.ctx_mix)):  # noqa: B905 (their lengths are equal)
            h = renormalise(waves[i + 1] * linear_channels_first(h, mix.weight, mix.bias) + bias)  # type: ignore[arg-type]
            h = h * linear_channels_first(c, ctx_mix.weight, ctx_mix.bias)  # type: ignore[arg-type]
        return self.as_kernel(linear_channels_first(h, self.out.weight, self.out.bias))

    def pooled(self, x: Tensor) -> Tensor:
        """Context at the points of the kernel, (C, k^d), or (B, C, k^d) by sample."""
        x = x.to(self.out.weight.dtype)
        if self.context == "sample":
            return pooled_samples(x, self.shape)
        mean = self.context_mean
        if mean is None:
            return pooled_mean(x, self.shape)
        if self.training:
            pooled = pooled_mean(x, self.shape)
            mean.lerp_(pooled.detach(), 0.1)
            return pooled
        return mean

    def as_kernel(self, h: Tensor) -> Tensor:
        """(C, k^d) -> (C, 1, k, ...), or (B, C, k^d) -> (B, C, k, ...)."""
        leading = [-1, h.shape[-2]] if self.context == "sample" else [-1, 1]
        return h.view(leading + self.shape)


@torch.inference_mode(False)  # a model may be moved in inference mode and trained later
def coordinate_grid(points: int, dims: int, *, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
    """Coordinates of a regular grid on [-1, 1]^dims, including both ends: (dims, points^dims), rows first ("ij").

    Computed in float64 on the CPU and rounded once, so that they are the same on every device.
    """
    axis = torch.linspace(-1, 1, points, dtype=torch.float64, device="cpu")
    axes = torch.meshgrid([axis] * dims, indexing="ij")
    return torch.stack(axes).flatten(1).to(device=device, dtype=dtype or torch.get_default_dtype())


def matched_omega(points: int, dims: int, alpha: float = 6.0, beta: float = 1.0) -> float:
    """Frequency scale for which the mean |frequency| of the first layer is half the Nyquist frequency of the grid.

    The Nyquist frequency of `points` samples on [-1, 1] is pi (points - 1) / 2; a weight is
    U(-1 / sqrt(dims), 1 / sqrt(dims)) 2 pi omega gamma with mean gamma = alpha / beta.
    """
    return max(points - 1, 1) * math.sqrt(dims) * beta / (4 * alpha)


def uniform_(linear: nn.Linear) -> None:
    """Weight from U(+-sqrt(3 / fan_in)), bias 0."""
    bound = math.sqrt(3 / linear.in_features)
    nn.init.uniform_(linear.weight, -bound, bound)
    nn.init.zeros_(linear.bias)
