"""Conditional variational autoencoders: what generative kernel continual learning keeps in place of images."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from zoo.models.continual.base import check_choice

__all__ = ["ConditionalVAE", "ConvolutionalVAE", "categorical_kl_uniform", "log_normal", "reconstruction_loss"]


def reconstruction_loss(
    logits: Tensor, x: Tensor, likelihood: Literal["bernoulli", "gaussian"] = "bernoulli"
) -> Tensor:
    """Negative log-likelihood (B,) of images (B, D), up to a constant: cross-entropy, or half the squared error."""
    if likelihood == "gaussian":
        return 0.5 * (logits.sigmoid() - x).square().sum(-1)
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)


def categorical_kl_uniform(logits: Tensor) -> Tensor:
    """KL (B,) of soft-max probabilities (B, C) from the uniform distribution."""
    log_q = logits.log_softmax(-1)
    return (log_q.exp() * log_q).sum(-1) + math.log(logits.shape[-1])


def log_normal(z: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log-density (B,) of z (B, d) under N(mean, exp(log_variance))."""
    return -0.5 * (math.log(2 * math.pi) + log_variance + (z - mean).square() / log_variance.exp()).sum(-1)


class ConditionalVAE(nn.Module):
    """Encoder q(z | x, t), class priors p(z | y), decoder p(x | z, y, t): what replaces stored images.

    The encoder never sees the label. Priors are shared between tasks (`prior_index="class"`): with one prior per task
    and class, images of similar tasks are drawn to the newest of two priors, and rotated digits collapse.

    Args:
        inputs: Numbers of an image.
        num_classes: K.
        tasks: T.
        latent: Size of z.
        hidden: Width of the layers.
        encoder_task: Add a task embedding to the encoder's first layer.
        prior_index: `class`, or `task_class`.
        components: If not 0, the encoder first guesses which of so many classes it sees, q(y | x) q(z | x, y): a soft
            sample of the Gumbel soft-max in the losses of training, the probabilities everywhere else.
        device: Where the weights live.
        dtype: Their type.
    """

    def __init__(
        self,
        inputs: int,
        num_classes: int,
        tasks: int,
        latent: int = 32,
        hidden: int = 400,
        encoder_task: bool = True,
        prior_index: Literal["class", "task_class"] = "class",
        components: int = 0,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.inputs, self.num_classes, self.tasks, self.latent = inputs, num_classes, tasks, latent
        self.prior_index, self.components = prior_index, components
        entry, start = self.build_networks(hidden, dd)
        priors = num_classes if prior_index == "class" else tasks * num_classes
        self.prior_mean = nn.Parameter(torch.randn(priors, latent, **dd))
        self.prior_log_variance = nn.Parameter(torch.zeros(priors, latent, **dd))
        self.condition = nn.Parameter(0.05 * torch.randn(tasks * num_classes, start, **dd))
        self.task = nn.Parameter(0.5 * torch.randn(tasks, entry, **dd)) if encoder_task else None
        if components:
            guess = [nn.Linear(hidden, hidden, **dd), nn.ReLU(), nn.Linear(hidden, components, **dd)]
            self.enc_class = nn.Sequential(*guess)
            self.enc_joint = nn.Sequential(nn.Linear(hidden + components, hidden, **dd), nn.ReLU())

    def build_networks(self, hidden: int, dd: dict[str, Any]) -> tuple[int, int]:
        """Make encoder and decoder; returns the widths of their first layers, which task and condition add to."""
        self.enc1, self.enc2 = nn.Linear(self.inputs, hidden, **dd), nn.Linear(hidden, hidden, **dd)
        self.mean, self.log_variance = nn.Linear(hidden, self.latent, **dd), nn.Linear(hidden, self.latent, **dd)
        self.dec1: nn.Module = nn.Linear(self.latent, hidden, **dd)
        self.dec2: nn.Module = nn.Linear(hidden, hidden, **dd)
        self.dec3 = nn.Linear(hidden, self.inputs, **dd)
        return hidden, hidden

    def trunk(self, x: Tensor, shift: Tensor | None) -> Tensor:
        """What the encoder sees in images (B, hidden); `shift` (entry,) or (B, entry) is the task's."""
        h = self.enc1(x.flatten(1))
        return self.enc2((h if shift is None else h + shift).relu()).relu()

    def pixels(self, h: Tensor) -> Tensor:
        """Logits (B, inputs) of the pixels, of the decoder's first layer (B, start)."""
        return self.dec3(self.dec2(h.relu()).relu())

    def encode(self, x: Tensor, task: int | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (B, latent) of images, of a known task (one number, or one each) or of none."""
        return self.posterior(x, task)[:2]

    def posterior(self, x: Tensor, task: int | Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `encode`, and the logits (B, K) of q(y | x), where the encoder guesses the class."""
        h, guess = self._encode(x, task, sample=self.training)
        return self.mean(h), self.log_variance(h), guess

    def _encode(self, x: Tensor, task: int | Tensor | None, sample: bool = False) -> tuple[Tensor, Tensor | None]:
        shift = None if self.task is None else self.task.mean(0) if task is None else self.task[task]
        h = self.trunk(x, shift)
        if not self.components:
            return h, None
        guess = self.enc_class(h)
        y = F.gumbel_softmax(guess) if sample else guess.softmax(-1)
        return self.enc_joint(torch.cat([h, y], -1)), guess

    def embed(self, x: Tensor, task: int | Tensor | None = None) -> Tensor:
        """The mean alone."""
        return self.mean(self._encode(x, task)[0])

    def decode(self, z: Tensor, task: int | Tensor, y: Tensor) -> Tensor:
        """Logits (B, inputs) of the pixels."""
        return self.pixels(self.dec1(z) + self.condition[task * self.num_classes + y])

    def prior(self, task: int | Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (B, latent) of p(z | y)."""
        index = y if self.prior_index == "class" else task * self.num_classes + y
        return self.prior_mean[index], self.prior_log_variance[index]

    def sample_prior(
        self, task: int | Tensor, y: Tensor, generator: torch.Generator | None = None, eps: Tensor | None = None
    ) -> Tensor:
        """Latents (B, latent) of classes (B,), from normal numbers `eps` or drawn ones."""
        mean, log_variance = self.prior(task, y)
        if eps is None:
            eps = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return mean + eps * (0.5 * log_variance).exp()

    @torch.no_grad()
    def generate(
        self, task: int | Tensor, y: Tensor, generator: torch.Generator | None = None, eps: Tensor | None = None
    ) -> Tensor:
        """Images (B, inputs) in (0, 1), the decoder's means, of conditions: tasks and classes (B,)."""
        return self.decode(self.sample_prior(task, y, generator, eps), task, y).sigmoid()


class ConvolutionalVAE(ConditionalVAE):
    """The conditional VAE of colour images: an 18-layer residual network, and transposed convolutions.

    After the unfinished generator in KCL's code; where task and condition enter is a reconstruction. The task is added
    to the channels of the stem, behind its normalisation, which would take it out again.

    Args:
        in_chans: Channels of the images.
        img_size: Side of the images, even: up to five halvings lead to the side that the decoder starts with.
        stem: `cifar`, a 3 x 3 convolution, or `imagenet`, 7 x 7 of stride 2 and max-pooling.
        hidden: Channels of the last stage and of the decoder's first, a multiple of 32.
        **kwargs: Of :class:`ConditionalVAE`.

    Raises:
        ValueError: A size does not fit.
    """

    def __init__(
        self,
        num_classes: int,
        tasks: int,
        in_chans: int = 3,
        img_size: int = 32,
        stem: Literal["cifar", "imagenet"] = "cifar",
        latent: int = 128,
        hidden: int = 512,
        **kwargs: Any,
    ) -> None:
        check_choice("stem", stem, ("cifar", "imagenet"))
        if img_size % 2 or hidden % 32:
            raise ValueError(f"img_size={img_size} must be even, and hidden={hidden} a multiple of 32")
        self.shape, self.stem = (in_chans, img_size, img_size), stem
        super().__init__(in_chans * img_size**2, num_classes, tasks, latent, hidden, **kwargs)

    def build_networks(self, hidden: int, dd: dict[str, Any]) -> tuple[int, int]:
        """Make encoder and decoder."""
        in_chans, side, _ = self.shape
        widths = tuple(hidden // 2**k for k in (3, 2, 1, 0))
        block: Any = BasicBlock
        net: Any = ResNet(block, (2, 2, 2, 2), 0, in_chans, channels=widths, zero_init_last=False, **dd)
        if self.stem == "cifar":
            net.conv1 = nn.Conv2d(in_chans, 64, 3, 1, 1, bias=False, **dd)
            net.maxpool = nn.Identity()
        self.enc = net
        self.mean, self.log_variance = nn.Linear(hidden, self.latent, **dd), nn.Linear(hidden, self.latent, **dd)
        channels: list[int] = []
        while side % 2 == 0 and len(channels) < 5:
            channels.append(hidden // 2 ** len(channels))
            side //= 2
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise([*channels, in_chans]):
            layers += [nn.ReLU(), nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, **dd)]
        self.start = (hidden, side, side)
        self.dec1 = nn.Linear(self.latent, math.prod(self.start), **dd)
        self.dec2 = nn.Sequential(*layers)
        return 64, math.prod(self.start)

    def trunk(self, x: Tensor, shift: Tensor | None) -> Tensor:
        """Pooled features (B, hidden)."""
        net: Any = self.enc
        h = net.bn1(net.conv1(x.view(-1, *self.shape)))
        h = net.maxpool(net.act1(h if shift is None else h + shift[..., None, None]))
        return net.global_pool(net.layer4(net.layer3(net.layer2(net.layer1(h)))))

    def pixels(self, h: Tensor) -> Tensor:
        """Logits (B, inputs) of the pixels, row by row of each channel."""
        return self.dec2(h.view(-1, *self.start)).flatten(1)
