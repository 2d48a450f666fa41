"""Random Fourier features with a spectral basis drawn from a learned posterior."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from zoo.kernels.dot_product import Linear
from zoo.kernels.kernel import register_kernel
from zoo.ops.dispatch import is_plain_eager, is_tracing
from zoo.ops.numerics import autocast_disabled, differentiable_grad

__all__ = ["GaussianNet", "SupportFeatureKernel", "VariationalRandomFeatures", "diagonal_gaussian_kl"]


def diagonal_gaussian_kl(mean: Tensor, log_variance: Tensor, prior_mean: Tensor, prior_log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(prior_mean, exp(prior_log_variance))), summed over the last dimension."""
    ratio = (log_variance.exp() + (prior_mean - mean).square()) / prior_log_variance.exp()
    return 0.5 * (prior_log_variance - log_variance + ratio - 1).sum(-1)


class _DrawnFeatures(torch.autograd.Function):
    """sqrt(2 / D) cos(W z + b) with W = mean + eps sigma, without building W or its gradient.

    With g the gradient in W z + b and t = g eps, the gradients in z, mean and log sigma^2 are (g 1) mean^T + t sigma,
    Z^T g 1 and sigma 1^T (Z * t) / 2.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, mean: Tensor, log_variance: Tensor, eps: Tensor, phase: Tensor) -> Tensor:
        sigma = (0.5 * log_variance).exp()
        angle = torch.addmm(phase, z * sigma, eps.mT).add_((z @ mean).unsqueeze(-1))
        ctx.save_for_backward(z, mean, sigma, eps, angle, log_variance, phase)
        return angle.cos().mul_(math.sqrt(2 / len(phase)))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        z, mean, sigma, eps, angle, log_variance, phase = ctx.saved_tensors
        if torch.is_grad_enabled() or not is_plain_eager([g]):
            return differentiable_grad(_plain_drawn, (z, mean, log_variance, eps, phase), ctx.needs_input_grad, g)
        g = angle.sin().mul_(g).mul_(-math.sqrt(2 / len(eps)))
        total, t = g.sum(-1), g @ eps
        return torch.outer(total, mean).addcmul_(t, sigma), total @ z, 0.5 * sigma * (z * t).sum(0), None, None


def _plain_drawn(z: Tensor, mean: Tensor, log_variance: Tensor, eps: Tensor, phase: Tensor) -> Tensor:
    basis = mean + eps * (0.5 * log_variance).exp()
    return math.sqrt(2 / len(phase)) * torch.cos(z @ basis.mT + phase)


class GaussianNet(nn.Module):
    """Mean and log-variance (d,) from the mean feature of a batch, by two separate networks."""

    def __init__(self, dim: int, *, device=None, dtype=None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}

        def network() -> nn.Sequential:
            inner = [nn.Linear(dim, dim, **dd), nn.ELU(), nn.Linear(dim, dim, **dd), nn.ELU()]
            return nn.Sequential(*inner, nn.Linear(dim, dim, **dd))

        self.mean, self.log_variance = network(), network()

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Of features (N, d)."""
        center = z.mean(0)
        return self.mean(center), self.log_variance(center)


class VariationalRandomFeatures(nn.Module):
    """Random Fourier features with a spectral basis drawn from a posterior given the support set.

    phi(z) = sqrt(2 / D) cos(W z + b), rows of W from q = N(mean, exp(log_variance)), predicted from the mean support
    feature; the prior is predicted from the mean query feature, and their KL is added to the loss. The phases b are
    drawn once. Source: Zhen et al., "Learning to Learn Kernels with Variational Random Features", 2020, as used by KCL.

    Args:
        dim: Features d.
        num_bases: Number of features D.
        variational: Learn posterior and prior; False draws W from N(0, I) once.
        device: Device of its tensors.
        dtype: Its dtype.
    """

    phase: Tensor
    eps: Tensor

    def __init__(self, dim: int, num_bases: int = 1024, *, variational: bool = True, device=None, dtype=None) -> None:
        super().__init__()
        if dim < 1 or num_bases < 1:
            raise ValueError(f"dim={dim} and num_bases={num_bases} must be positive")
        self.dim, self.num_bases, self.variational = dim, num_bases, variational
        self.register_buffer("phase", 2 * math.pi * torch.rand(num_bases, device=device, dtype=dtype))
        # normal numbers of the fixed basis and of evaluation, reproducible
        self.register_buffer("eps", torch.randn(num_bases, dim, device=device, dtype=dtype))
        if variational:
            self.posterior = GaussianNet(dim, device=device, dtype=dtype)
            self.prior = GaussianNet(dim, device=device, dtype=dtype)

    def sample(
        self, mean: Tensor, log_variance: Tensor, eps: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """A basis W (D, d) from N(mean, exp(log_variance)).

        Args:
            mean: (d,).
            log_variance: (d,).
            eps: Standard normal numbers (D, d); drawn if None.
            generator: Source of randomness.
        """
        if eps is None:
            shape = (self.num_bases, self.dim)
            eps = torch.randn(shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return mean + eps * (0.5 * log_variance).exp()

    def drawn_features(self, z: Tensor, mean: Tensor, log_variance: Tensor, eps: Tensor | None = None) -> Tensor:
        """Phi (N, D) for a basis that is drawn, or given by `eps` (D, d), and not stored; for training steps."""
        if eps is None:
            eps = torch.randn(self.num_bases, self.dim, device=mean.device, dtype=mean.dtype)
        if is_tracing(z):
            return self.features(z.to(mean.dtype), self.sample(mean, log_variance, eps))
        with autocast_disabled(z.device):
            return _DrawnFeatures.apply(z.to(mean.dtype), mean, log_variance, eps, self.phase)

    def features(self, z: Tensor, basis: Tensor) -> Tensor:
        """Phi (N, D) of features (N, d) for a given basis (D, d)."""
        scale, z = math.sqrt(2 / self.num_bases), z.to(basis.dtype)
        with autocast_disabled(z.device):
            if torch.is_grad_enabled() or torch.compiler.is_compiling():
                return scale * torch.cos(z @ basis.mT + self.phase)
            return torch.addmm(self.phase, z, basis.mT).cos_().mul_(scale)

    def kl(self, support: Tensor, queries: Tensor) -> Tensor:
        """KL divergence of the posterior from the prior, summed over d."""
        return diagonal_gaussian_kl(*self.posterior(support), *self.prior(queries))


@register_kernel("rff")
class SupportFeatureKernel(Linear):
    """Dot product of random features that depend on the support set; the points are these features."""

    support_features = VariationalRandomFeatures
