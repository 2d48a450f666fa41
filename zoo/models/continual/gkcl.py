"""GKCL: generative kernel continual learning, where a generative model takes the place of KCL's stored images.

Derakhshani, Zhen, Shao, Snoek, "Generative Kernel Continual Learning", arXiv 2112.13410. No code of it was ever
published: :class:`GKCL` is a reconstruction from its abstract, not a reproduction of its numbers.

    support of task t = latents z ~ p(z | y) of a conditional VAE, or images that it makes
    logits(x)         = gamma_t k(f(x), support) (k(support, support) + lambda_t I)^-1 Y + beta_t
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.kernels.random_features import diagonal_gaussian_kl
from zoo.learners.kernel_ridge import KernelRidgeHead, SolutionCache, SupportError
from zoo.models.continual.base import MLP, check_choice, check_shape, create_learner, learner_cfg
from zoo.models.continual.kcl import KernelLearner, ReducedResNet
from zoo.models.continual.losses import replay_weight, supervised_contrastive
from zoo.models.continual.vae import (
    ConditionalVAE,
    ConvolutionalVAE,
    categorical_kl_uniform,
    log_normal,
    reconstruction_loss,
)
from zoo.ops.dispatch import known_value

__all__ = ["GKCL"]


class GKCL(KernelLearner):
    """Generative kernel continual learning: a conditional VAE makes the support; no image is stored.

    A reconstruction: the paper's code was never published. Replay trains the generator only; the classifier has no
    weights of its own.

    Args:
        num_classes: Output columns.
        in_chans: Channels of the images.
        img_size: Side of the images.
        tasks: Most tasks.
        shots: Samples per class that the kernel gets, in training and at test time.
        profile: `latent`: features are the encoder's means, support are latents of the class priors. `input`: support
            are decoded images, features come from a network of its own, trained on real images (`train_support`).
        kernel: Name of a registered kernel whose features do not depend on the support.
        width: Of the kernels that have one.
        generator: `mlp` (:class:`ConditionalVAE`), or `conv` for colour images (:class:`ConvolutionalVAE`).
        mixture: The encoder guesses the class, see :class:`ConditionalVAE`. Its loss takes log q(z | x, y) - log p(z |
            y) of the sampled z in place of the exact KL, and adds KL(q(y | x) || uniform). After the second unfinished
            generator in KCL's code; that p(z | y) takes the true class is a reconstruction, as is everything else.
        stem: Of the `conv` generator.
        latent: Size of z; None for 32, or 128 with `conv`.
        hidden: Width of encoder and decoder; None for 400, or 512 with `conv`.
        encoder_task: Tell the encoder the task; without an id the most confident task answers.
        prior_index: See :class:`ConditionalVAE`.
        likelihood: Of the pixels, `bernoulli` or `gaussian`.
        beta_kl: Weight of the KL term.
        eta: Weight of the classifier's cross-entropy.
        omega: Weight of the contrastive term.
        temperature: Of the contrastive term.
        delta: Pull of the encoder's means on replayed images towards those of the encoder before the task.
        replay: Replay generated images of earlier tasks.
        replay_contrast_label: Labels of replayed images in the contrastive term: `condition` or `class`.
        train_support: Of the `input` profile: `real` or `generated`.
        deterministic: The support is one point per class, the prior's mean.
        lambda_init: Start of lambda; the ridge is |lambda| + 0.01.
        learn_head: Train lambda, gamma and beta.
        device: Where the weights live.
        dtype: Their type.

    Raises:
        ValueError: An option is unknown, or the kernel is one that only KCL can have.
    """

    training_defaults: ClassVar[dict[str, Any]] = {
        **{"optimizer": "adam", "lr": 1e-3, "decay": 0.8, "offset": 0, "floor": 0.0, "keep_state": True},
        **{"batch_size": 64, "epochs": 6},
    }
    unit_range = True
    eps: Tensor
    training_only = ("vae.log_variance", "vae.dec", "vae.condition")

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: int = 28,
        tasks: int = 20,
        shots: int = 20,
        profile: Literal["latent", "input"] = "latent",
        kernel: str = "linear",
        width: float | None = None,
        generator: Literal["mlp", "conv"] = "mlp",
        mixture: bool = False,
        stem: Literal["cifar", "imagenet"] = "cifar",
        latent: int | None = None,
        hidden: int | None = None,
        encoder_task: bool = True,
        prior_index: Literal["class", "task_class"] = "class",
        likelihood: Literal["bernoulli", "gaussian"] = "bernoulli",
        beta_kl: float = 1.0,
        eta: float = 1.0,
        omega: float = 0.05,
        temperature: float = 0.5,
        delta: float = 0.1,
        replay: bool = True,
        replay_contrast_label: Literal["condition", "class"] = "condition",
        train_support: Literal["real", "generated"] = "real",
        deterministic: bool = False,
        lambda_init: float = 0.1,
        learn_head: bool = False,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(num_classes, in_chans, img_size, tasks, device=device, dtype=dtype)
        check_choice("profile", profile, ("latent", "input"))
        check_choice("generator", generator, ("mlp", "conv"))
        check_choice("prior_index", prior_index, ("class", "task_class"))
        check_choice("likelihood", likelihood, ("bernoulli", "gaussian"))
        check_choice("replay_contrast_label", replay_contrast_label, ("condition", "class"))
        check_choice("train_support", train_support, ("real", "generated"))
        if shots < 1:
            raise SupportError(
                f"shots={shots}: the support would be empty; a kernel classifier needs points of each class"
            )
        self.shots, self.profile, self.deterministic = shots, profile, deterministic
        self.likelihood: Any = likelihood
        self.beta_kl, self.eta, self.omega, self.temperature, self.delta = beta_kl, eta, omega, temperature, delta
        self.replay, self.replay_contrast_label, self.train_support = replay, replay_contrast_label, train_support
        self.options: dict[str, Any] = {
            **{"kernel": kernel, "width": width, "lambda_init": lambda_init, "learn": learn_head}
        }
        convolutional = generator == "conv"
        self.smallest_batch = 2 if convolutional else 1
        self.vae_options: dict[str, Any] = {
            "latent": latent or (128 if convolutional else 32),
            "hidden": hidden or (512 if convolutional else 400),
            "encoder_task": encoder_task,
            "prior_index": prior_index,
            "components": num_classes if mixture else 0,
        }
        if convolutional:
            self.vae_options |= {"in_chans": in_chans, "img_size": img_size, "stem": stem}
        self.uses_task = encoder_task and profile == "latent"
        self._old: list[ConditionalVAE] = []  # in a list: not a part of the state
        self.build_head()
        self.num_features = self.vae.latent
        if profile == "input":
            self.num_features = 160 if convolutional else 256
            self.backbone = (
                ReducedResNet(in_chans, **self.dd) if convolutional else MLP(self.inputs, self.num_features, **self.dd)
            )

    def build_head(self) -> None:
        """A fresh generator, whose priors know the classes, and a fresh head."""
        self._solutions, self._old = SolutionCache(), []
        old = getattr(self, "vae", None)
        size, options = (max(self.num_classes, 1), self.tasks), {**self.vae_options, **self.dd}
        if "stem" in options:
            self.vae: ConditionalVAE = ConvolutionalVAE(*size, **options)
        else:
            self.vae = ConditionalVAE(self.inputs, *size, **options)
        if old is not None:  # the encoder stays: another head on the same features
            kept = {k: v for k, v in old.state_dict().items() if k.startswith(("enc", "mean", "task"))}
            self.vae.load_state_dict(kept, strict=False)
        if self.num_classes:
            self.head = KernelRidgeHead(n_tasks=self.tasks, **self.options, **self.dd)
            if self.head.kernel.support_features is not None:
                raise ValueError(
                    f"kernel={self.options['kernel']!r} belongs to KCL: its features depend on stored images"
                )
        else:
            self.head = nn.Identity()  # type: ignore[assignment]
        self.set_shots(self.shots)

    def set_shots(self, shots: int) -> None:
        """Change the samples per class that the kernel gets.

        Their normal numbers are part of the state, so that the support of a task is the same in every type and on
        every device.
        """
        self.shots, self._solutions = shots, SolutionCache()
        size = shots * max(self.num_classes, 1), self.vae.latent
        eps = torch.randn(size, generator=torch.Generator().manual_seed(1000), dtype=torch.float64, device="cpu")
        like = self.vae.prior_mean
        self.register_buffer("eps", eps.to(like.device, like.dtype))

    # ---- learning -----------------------------------------------------------------------------------------

    def begin_task(self, task: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Freeze a copy of the generator, which replays the tasks before."""
        super().begin_task(task, x, y)
        self._old = []
        if task and self.replay:
            self._old = [copy.deepcopy(self.vae).eval().requires_grad_(False)]
        return x, y

    def losses(self, x: Tensor, y: Tensor, task: int) -> dict[str, Tensor]:
        """The generator's losses on the batch and on replayed images, and the classifier's on the batch alone."""
        weight = replay_weight(task) if self._old else 1.0
        flat = x.flatten(1)
        mean, z, current = self._vae_loss(flat, y, task)
        terms = {"vae": weight * current}
        if self.omega:
            terms["contrastive"] = weight * self.omega * supervised_contrastive(z, y, self.temperature)
        if self.eta:
            labels = self._support_labels(task)
            if self.profile == "latent":
                with torch.no_grad():
                    support = self.vae.sample_prior(task, labels)
                terms["classifier"] = weight * self.eta * self._classify(support, labels, mean, y, task)
            else:
                terms["classifier"] = self.eta * self._input_step(x, y, task)
        if self._old:
            terms |= {f"replay_{k}": (1 - weight) * v for k, v in self._replay(len(x), task).items()}
        return terms

    def _classify(self, support: Tensor, labels: Tensor, queries: Tensor, y: Tensor, task: int) -> Tensor:
        targets = F.one_hot(labels, self.num_classes).to(support.dtype)
        return F.cross_entropy(self.mask(self.head(support, targets, queries, task), task), y)

    def _input_step(self, x: Tensor, y: Tensor, task: int) -> Tensor:
        """A KCL step of the `input` profile: half of the batch, or generated images, are the support; a batch of one
        has no half.
        """
        if self.train_support == "generated" or len(x) < 2:
            labels = self._support_labels(task)
            images = self.vae.generate(task, labels)
        else:
            half = len(x) // 2
            images, labels, x, y = x[:half].flatten(1), y[:half], x[half:], y[half:]
        h = self._normalised(torch.cat([x.flatten(1), images]))
        return self._classify(h[len(x) :], labels, h[: len(x)], y, task)

    def _normalised(self, x: Tensor) -> Tensor:
        """Features of the `input` profile."""
        return F.normalize(self.backbone(x.view(-1, self.in_chans, self.img_size, self.img_size)), dim=-1)

    def _vae_loss(self, flat: Tensor, y: Tensor, task: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance, guess = self.vae.posterior(flat, task)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        reconstruction = reconstruction_loss(self.vae.decode(z, task, y), flat, self.likelihood)
        prior = self.vae.prior(task, y)
        if guess is None:
            kl = diagonal_gaussian_kl(mean, log_variance, *prior)
        else:
            kl = log_normal(z, mean, log_variance) - log_normal(z, *prior) + categorical_kl_uniform(guess)
        return mean, z, (reconstruction + self.beta_kl * kl).mean() / self.inputs

    def _replay(self, count: int, task: int) -> dict[str, Tensor]:
        """Losses on images that the generator before this task makes of the tasks before it."""
        old = self._old[0]
        places = self.active[:task].nonzero()
        tasks, y = places[torch.randint(len(places), (count,)).to(places.device)].unbind(-1)
        images = old.generate(tasks, y)
        mean, z, loss = self._vae_loss(images, y, tasks)
        terms = {"vae": loss}
        if self.omega:
            labels = y if self.replay_contrast_label == "class" else tasks * self.num_classes + y
            terms["contrastive"] = self.omega * supervised_contrastive(z, labels, self.temperature)
        if self.delta:
            with torch.no_grad():
                before = old.embed(images, tasks)
            terms["drift"] = self.delta * (mean - before).square().sum(-1).mean()
        return terms

    def end_task(self, task: int, x: Tensor, y: Tensor) -> None:
        """The frozen copy has done its work."""
        self._old = []
        super().end_task(task, x, y)

    # ---- answers ------------------------------------------------------------------------------------------

    def _support_labels(self, task: int) -> Tensor:
        """`shots` of each class of the task; all classes where that cannot be asked."""
        active = known_value(self.active)
        if active is None:
            classes = torch.arange(self.num_classes, device=self.active.device)
        else:
            classes = active[task].nonzero().squeeze(-1)
        return classes.repeat_interleave(1 if self.deterministic else self.shots)

    def support(self, task: int) -> tuple[Tensor, Tensor]:
        """Latents of the task's classes, or features of generated images: always the same for the same weights."""
        labels = self._support_labels(task)
        if self.deterministic and self.profile == "latent":
            return self.vae.prior(task, labels)[0], labels
        eps = self.eps[: len(labels)]
        if self.profile == "latent":
            return self.vae.sample_prior(task, labels, eps=eps), labels
        return self.forward_features(self.vae.generate(task, labels, eps=eps)), labels

    def forward_features(self, x: Tensor, task: int | None = None) -> Tensor:
        """The encoder's means (B, latent), or the normalised features of the `input` profile."""
        if self.profile == "latent":
            return self.vae.embed(x, task)
        return self._normalised(x)

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        """Logits (B, num_classes) of images; see the base class."""
        x = check_shape(x, self.in_chans, self.img_size)
        if not self.num_classes or not self.uses_task:
            return super().forward(x, task)
        if task is None:
            if not self.tasks_seen:
                return self.task_logits(self.forward_features(x), None)
            tasks = range(self.tasks_seen)
            every = [self.mask(self.task_logits(self.forward_features(x, t), t), t) for t in tasks]
            return torch.stack(every).amax(0)
        self.check_seen(task)
        return self.mask(self.task_logits(self.forward_features(x, task), task), task)

    def class_incremental(self, x: Tensor, task: int | None = None) -> Tensor:
        """Logits of one classifier over all classes seen: the task's id is not needed for the support.

        Args:
            x: Images.
            task: Tells the encoder the task; None does not.
        """
        self.check_seen(self.tasks_seen - 1)
        places = self.active[: self.tasks_seen].nonzero()
        if self.vae.prior_index == "class":
            labels = places[:, 1].unique()
            tasks = torch.zeros_like(labels)
        else:
            tasks, labels = places.unbind(-1)
        labels, tasks = labels.repeat_interleave(self.shots), tasks.repeat_interleave(self.shots)
        source = torch.Generator(labels.device).manual_seed(999)
        if self.profile == "latent":
            support = self.vae.sample_prior(tasks, labels, source)
        else:
            support = self.forward_features(self.vae.generate(tasks, labels, source))
        return self.head(support, F.one_hot(labels, self.num_classes).to(support.dtype), self.forward_features(x, task))

    @torch.no_grad()
    def generate(self, task: int, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images (N, C, H, W) of classes (N,) of a task that was seen."""
        self.check_seen(task)
        return self.vae.generate(task, labels, generator).view(-1, self.in_chans, self.img_size, self.img_size)

    def _drop(self) -> None:
        for name in [n for n, _ in self.vae.named_children() if n.startswith("dec")]:
            delattr(self.vae, name)
        for name in ("log_variance", "prior_mean", "prior_log_variance", "condition"):
            delattr(self.vae, name)
        del self.eps
        if self.profile == "input":
            del self.vae


# ---- registry ----------------------------------------------------------------------------------------------

_PAPER = "arXiv:2112.13410"
default_cfgs = generate_default_cfgs(
    {
        "gkcl_mlp": learner_cfg(paper_ids=_PAPER),
        "gkcl_mixture": learner_cfg(paper_ids=_PAPER),
        "gkcl_resnet": learner_cfg(input_size=(3, 32, 32), num_classes=100, paper_ids=_PAPER),
        "test_gkcl": learner_cfg(input_size=(1, 8, 8)),
    }
)


@register_model
def gkcl_mlp(pretrained: bool = False, **kwargs: Any) -> GKCL:
    """GKCL on digits: latents of a conditional VAE are the support (a reconstruction)."""
    return create_learner(GKCL, "gkcl_mlp", pretrained, kwargs)


@register_model
def gkcl_mixture(pretrained: bool = False, **kwargs: Any) -> GKCL:
    """GKCL on digits whose encoder guesses the class: a mixture of Gaussians (a reconstruction)."""
    return create_learner(GKCL, "gkcl_mixture", pretrained, kwargs, mixture=True)


@register_model
def gkcl_resnet(pretrained: bool = False, **kwargs: Any) -> GKCL:
    """GKCL on split CIFAR-100: residual encoder, transposed convolutions as decoder (a reconstruction)."""
    own = {"in_chans": 3, "img_size": 32, "num_classes": 100, "generator": "conv"}
    return create_learner(GKCL, "gkcl_resnet", pretrained, kwargs, **own)


@register_model
def test_gkcl(pretrained: bool = False, **kwargs: Any) -> GKCL:  # noqa: PT028
    """GKCL of 8 x 8 images, for tests."""
    return create_learner(GKCL, "test_gkcl", pretrained, kwargs, img_size=8, tasks=3, shots=2, latent=4, hidden=16)
