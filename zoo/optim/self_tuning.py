"""Self-tuning networks: the strength of regularisers is tuned on the validation loss while the network trains.

MacKay, Vicol, Lorraine, Duvenaud and Grosse, "Self-tuning networks: bilevel optimization of hyperparameters using
structured best-response functions", arXiv 1903.03088 (ICLR 2019); the authors' code is
asteroidhouse/self-tuning-networks. Weights become functions of the hyper-parameters l (unconstrained):

    out = s (W x + b) + a(l) * (H x) + c(l) * h,        [a, c] = A l

Train steps sample l_i = l + sigma n_i for every row, regularise it by value(l_i), and train the weights; tuning steps
hold the weights and train l and sigma on the validation loss. By default a and c depend on l_i - l instead of l_i, as
in the follow-up (Bae and Grosse, "Delta-STN", 2020): the response then is to the perturbation only, and l cannot
exploit weights that it changes itself.

>>> model = nn.Sequential(nn.Dropout(), nn.Linear(64, 256), nn.ReLU(), nn.Dropout(), nn.Linear(256, 10))
>>> tuner = SelfTuning(model, {"dropout": Hyperparameter(0.05, 0.0, 0.9)}, lr=0.01)
>>> history = tuner.fit(train_batches, validation_batches, epochs=200)
>>> tuner.values()
{'dropout': 0.31...}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "Hyperparameter",
    "Hyperparameters",
    "Response",
    "ResponseConv2d",
    "ResponseLinear",
    "SelfTuning",
    "TunedDropout",
    "replace_layers",
]


# ---- hyper-parameters --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hyperparameter:
    """A tuned hyper-parameter, with its range.

    Args:
        start: Initial value, inside the range.
        lo: Lower bound; None for none.
        hi: Upper bound; None for none.
        integer: Round down; the gradient then comes from the responses alone.
    """

    start: float
    lo: float | None = 0.0
    hi: float | None = None
    integer: bool = False

    def __post_init__(self) -> None:
        lo, hi = (-math.inf if self.lo is None else self.lo), (math.inf if self.hi is None else self.hi)
        if not lo < self.start < hi:
            raise ValueError(f"start={self.start} must lie inside of the range ({lo}, {hi})")

    def value(self, free: Tensor) -> Tensor:
        """Value for an unconstrained number: a sigmoid between two bounds, a softplus from one."""
        value = self.smooth(free)
        return value.floor() if self.integer else value

    def smooth(self, free: Tensor) -> Tensor:
        """The value before rounding."""
        if self.lo is not None and self.hi is not None:
            return self.lo + (self.hi - self.lo) * torch.sigmoid(free)
        if self.lo is not None:
            return self.lo + F.softplus(free, threshold=40)
        return free if self.hi is None else self.hi - F.softplus(free, threshold=40)

    def free(self) -> float:
        """Unconstrained number for the initial value."""
        if self.lo is not None and self.hi is not None:
            share = (self.start - self.lo) / (self.hi - self.lo)
            return math.log(share) - math.log1p(-share)
        if self.lo is not None:
            return _inverse_softplus(self.start - self.lo)
        return self.start if self.hi is None else _inverse_softplus(self.hi - self.start)


def _inverse_softplus(value: float) -> float:
    return value + math.log(-math.expm1(-value))


class Hyperparameters(nn.Module):
    """Named hyper-parameters, and the scales of their perturbations.

    Args:
        named: Hyper-parameters by name.
        scale: Initial sigma, in unconstrained units.

    Attributes:
        free: l (H,).
        raw_scale: sigma = softplus(raw_scale) (H,).
    """

    def __init__(self, named: Mapping[str, Hyperparameter], scale: float = 0.5, device=None, dtype=None) -> None:
        super().__init__()
        if not named or not scale > 0:
            raise ValueError(f"one hyper-parameter at least is needed, and scale={scale} must be positive")
        self.named = dict(named)
        free = torch.tensor([h.free() for h in named.values()], dtype=torch.float64)
        self.free = nn.Parameter(free.to(device, dtype or torch.get_default_dtype()))
        self.raw_scale = nn.Parameter(torch.full_like(self.free.detach(), _inverse_softplus(scale)))

    @property
    def scale(self) -> Tensor:
        """Sigma (H,)."""
        return F.softplus(self.raw_scale, threshold=40)

    def perturbed(self, noise: Tensor) -> Tensor:
        """L + sigma n (n, H), for standard normal noise (n, H)."""
        return self.free + self.scale * noise

    def entropy(self) -> Tensor:
        """Entropy of the perturbations: sum log(sigma sqrt(2 pi e))."""
        return (self.scale.log() + 0.5 * math.log(2 * math.pi * math.e)).sum()

    def values(self, free: Tensor | None = None) -> dict[str, Tensor]:
        """Values by name, (...) for l (..., H); default: the current l."""
        free = self.free if free is None else free
        return {name: h.value(free[..., i]) for i, (name, h) in enumerate(self.named.items())}


# ---- layers ------------------------------------------------------------------------------------------------


@dataclass
class Response:
    """State shared by the layers of a network during a forward pass; set by :class:`SelfTuning`.

    Attributes:
        free: Inputs of a and c, (B, H), one row per sample; None for no response.
        values: Strengths of the regularisers by name, (B,); used in train mode.
    """

    free: Tensor | None = None
    values: dict[str, Tensor] = field(default_factory=dict)


class _ResponseLayer(nn.Module):
    """A layer with a second set of weights, weighted by hyper-parameters.

    Args:
        layer: Provides the initial weight W and bias b.
        response: Shared by all layers of a network.
        hypers: Number of hyper-parameters H.
        std: Initial standard deviation of the entries of A.
    """

    elastic_bias: nn.Parameter | None

    def __init__(self, layer: nn.Linear | nn.Conv2d, response: Response, hypers: int, std: float = 0.01) -> None:
        super().__init__()
        self.layer, self.response = layer, response
        weight = layer.weight
        self.elastic_weight = nn.Parameter(weight.detach().clone())
        self.register_parameter("elastic_bias", None)
        bound = 1 / math.sqrt(weight[0].numel())
        with torch.no_grad():
            self.elastic_weight.uniform_(-bound, bound)
            if layer.bias is not None:
                self.elastic_bias = nn.Parameter(torch.empty_like(layer.bias).uniform_(-bound, bound))
        self.mixing = nn.Parameter(weight.new_empty(2 * len(weight), hypers).normal_(std=std))
        self.scale = nn.Parameter(weight.new_ones(()))

    def _elastic(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _columns(self, factors: Tensor, like: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with its response; without hyper-parameters, s (W x + b)."""
        out = self.scale * self.layer(x)
        free = self.response.free
        if free is None:
            return out
        if len(free) != len(x):
            raise ValueError(f"the batch has {len(x)} samples, but hyper-parameters were drawn for {len(free)}")
        a, c = (free.to(self.mixing.dtype) @ self.mixing.mT).chunk(2, dim=-1)  # (B, out) each
        out = out + self._columns(a, out) * self._elastic(x)
        if self.elastic_bias is not None:
            out = out + self._columns(c * self.elastic_bias, out)
        return out


class ResponseLinear(_ResponseLayer):
    """A linear layer (B, ..., in) -> (B, ..., out) with a response; see :class:`_ResponseLayer`."""

    def _elastic(self, x: Tensor) -> Tensor:
        return F.linear(x, self.elastic_weight)

    def _columns(self, factors: Tensor, like: Tensor) -> Tensor:
        return factors.view(len(factors), *(1,) * (like.ndim - 2), -1)


class ResponseConv2d(_ResponseLayer):
    """A convolution (B, in, H, W) -> (B, out, H', W') with a response; see :class:`_ResponseLayer`."""

    def _elastic(self, x: Tensor) -> Tensor:
        assert isinstance(self.layer, nn.Conv2d)
        return self.layer._conv_forward(x, self.elastic_weight, None)

    def _columns(self, factors: Tensor, like: Tensor) -> Tensor:
        return factors[..., None, None]


class TunedDropout(nn.Module):
    """Dropout with a separate rate per sample; the identity outside of a training pass.

    Args:
        response: Provides the rates.
        name: Name of the rate.
    """

    def __init__(self, response: Response, name: str) -> None:
        super().__init__()
        self.response, self.name = response, name

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, ...)."""
        rate = self.response.values.get(self.name)
        if not self.training or rate is None:
            return x
        kept = (1 - rate.to(x.dtype)).view(len(x), *(1,) * (x.ndim - 1))
        return x * (torch.rand_like(x) < kept) / kept

    def extra_repr(self) -> str:
        """Name."""
        return self.name


def replace_layers(
    model: nn.Module, response: Response, hypers: int, *, dropout: Mapping[str, str] | str | None = None
) -> int:
    """Add responses to the linear and convolutional layers of a model, and tuned rates to its dropouts, in place.

    Args:
        model: The network, which keeps its class and weights.
        response: Shared by the new layers.
        hypers: Number of hyper-parameters H.
        dropout: Hyper-parameter for every `nn.Dropout`, or for each by its module name.

    Returns:
        Number of layers with a response.

    Raises:
        ValueError: No layer can have a response, or `dropout` names a module that is not a dropout.
    """
    names = dict(model.named_modules())
    rates = dropout if isinstance(dropout, Mapping) else {}
    unknown = [name for name in rates if not isinstance(names.get(name), nn.Dropout)]
    if unknown:
        known = [name for name, module in names.items() if isinstance(module, nn.Dropout)]
        raise ValueError(f"{unknown[0]!r} is not a dropout of the model; there are {', '.join(known) or 'none'}")
    count = 0
    for name, module in names.items():
        new: nn.Module | None = None
        if type(module) is nn.Linear:
            new = ResponseLinear(module, response, hypers)
        elif type(module) is nn.Conv2d:
            new = ResponseConv2d(module, response, hypers)
        elif isinstance(module, nn.Dropout) and (isinstance(dropout, str) or name in rates):
            new = TunedDropout(response, dropout if isinstance(dropout, str) else rates[name])
        if new is None:
            continue
        if not name:
            raise ValueError("the model is a single layer: put it into an nn.Sequential")
        parent, _, child = name.rpartition(".")
        setattr(names[parent], child, new.train(module.training))
        count += isinstance(new, _ResponseLayer)
    if not count:
        raise ValueError(f"{type(model).__name__} has no linear or convolutional layer to replace")
    return count


# ---- training ----------------------------------------------------------------------------------------------

Batch = tuple[Tensor, Tensor]
Losses = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]


def cross_entropy(logits: Tensor, y: Tensor, values: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy; a hyper-parameter `label_smoothing` (B,) smooths each sample's target."""
    logs = torch.log_softmax(logits, -1)
    right = -logs.gather(1, y[:, None]).squeeze(1)
    smoothing = values.get("label_smoothing")
    if smoothing is None:
        return right.mean()
    return ((1 - smoothing) * right - smoothing * logs.mean(1)).mean()


class SelfTuning:
    """Train a network and its regularisers together.

    Args:
        model: Modified in place: its layers get responses, its dropouts tuned rates.
        named: Hyper-parameters. `"dropout"` is the rate of every `nn.Dropout`, unless `dropout` is given;
            `"label_smoothing"` and `"input_noise"` (standard deviation) are built in, others are for `loss` or
            `augment`.
        lr: Learning rate of SGD with momentum 0.9 for the weights.
        tune_lr: Learning rate of Adam for l and sigma.
        centred: a and c depend on l_i - l; False is the paper's form.
        scale: Initial sigma.
        entropy: Weight of the entropy of the perturbations in the tuning loss.
        dropout: As in :func:`replace_layers`.
        loss: Scalar loss from outputs, targets and values by name (B,); no values are passed in tuning steps.
        augment: New inputs from inputs and values by name (B,), in train steps.
        optimizer: Creates the optimizer of the weights from their parameters, instead of SGD.
        generator: Source of the perturbations.

    Attributes:
        hypers: The hyper-parameters.
        history: One row per epoch of :meth:`fit`.
    """

    def __init__(
        self,
        model: nn.Module,
        named: Mapping[str, Hyperparameter],
        *,
        lr: float = 0.01,
        tune_lr: float = 3e-3,
        centred: bool = True,
        scale: float = 0.5,
        entropy: float = 1e-3,
        dropout: Mapping[str, str] | str | None = None,
        loss: Losses = cross_entropy,
        augment: Callable[[Tensor, dict[str, Tensor]], Tensor] | None = None,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        like = next(model.parameters())
        self.model, self.centred, self.entropy, self.loss, self.augment = model, centred, entropy, loss, augment
        self.generator, self.response = generator, Response()
        self.hypers = Hyperparameters(named, scale, like.device, like.dtype)
        rates = "dropout" if dropout is None and "dropout" in named else dropout
        wanted = set(rates.values()) if isinstance(rates, Mapping) else {rates} if rates else set()
        if wanted - set(named):
            raise ValueError(
                f"no hyper-parameter is called {sorted(wanted - set(named))[0]!r}; there are {', '.join(named)}"
            )
        replace_layers(model, self.response, len(named), dropout=rates)
        parameters = list(model.parameters())
        self.optimizer = torch.optim.SGD(parameters, lr, momentum=0.9) if optimizer is None else optimizer(parameters)
        self.tuner = torch.optim.Adam(self.hypers.parameters(), tune_lr)
        self.history: list[dict[str, float]] = []

    def _sample(self, n: int) -> Tensor:
        free = self.hypers.free
        noise = torch.randn(n, len(free), generator=self.generator, dtype=free.dtype, device="cpu")
        return self.hypers.perturbed(noise.to(free.device))

    def _respond(self, free: Tensor) -> Tensor:
        return free - self.hypers.free.detach() if self.centred else free

    def train_step(self, x: Tensor, y: Tensor) -> float:
        """One step of the weights on a batch, with perturbed hyper-parameters; l and sigma are fixed."""
        self.model.train()
        with torch.no_grad():
            free = self._sample(len(x))
            values = self.hypers.values(free)
            if "input_noise" in values:
                x = x + values["input_noise"].view(-1, *(1,) * (x.ndim - 1)) * torch.randn_like(x)
            if self.augment is not None:
                x = self.augment(x, values)
            self.response.free, self.response.values = self._respond(free), values
        try:
            loss = self.loss(self.model(x), y, values)
        finally:
            self.response.free, self.response.values = None, {}
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def tune_step(self, x: Tensor, y: Tensor) -> float:
        """One step of l and sigma on a validation batch, without regularisation; the weights are fixed."""
        self.model.eval()
        self.response.free = self._respond(self._sample(len(x)))
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        try:
            for p in parameters:
                p.requires_grad_(False)
            loss = self.loss(self.model(x), y, {}) - self.entropy * self.hypers.entropy()
        finally:
            self.response.free = None
            for p in parameters:
                p.requires_grad_()
        self.tuner.zero_grad()
        loss.backward()
        self.tuner.step()
        return float(loss.detach())

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Mean loss without perturbation or regularisation, at the current l."""
        self.model.eval()
        total, count = 0.0, 0
        for x, y in batches:
            free = self.hypers.free.detach().expand(len(x), -1)
            self.response.free = self._respond(free)
            try:
                total += float(self.loss(self.model(x), y, {})) * len(x)
            finally:
                self.response.free = None
            count += len(x)
        if not count:
            raise ValueError("there are no batches")
        return total / count

    def values(self) -> dict[str, float]:
        """Current values of the hyper-parameters."""
        return {name: float(value.detach()) for name, value in self.hypers.values().items()}

    def fit(
        self,
        train: Iterable[Batch],
        validation: Iterable[Batch],
        epochs: int,
        *,
        warmup: int = 5,
        train_steps: int = 2,
        tune_steps: int = 1,
    ) -> list[dict[str, float]]:
        """Alternate train and tuning steps.

        Args:
            train: Batches (x, y), iterated once per epoch.
            validation: Batches (x, y), restarted as needed.
            epochs: Passes over `train`.
            warmup: Initial epochs without tuning steps.
            train_steps: Train steps between tuning steps.
            tune_steps: Tuning steps each time.

        Returns:
            `history`: for each epoch its number, mean training loss, validation loss, and values and scales by name.
        """
        if min(epochs, train_steps, tune_steps) < 1 or warmup < 0:
            raise ValueError("epochs, train_steps and tune_steps must be at least 1, and warmup not negative")
        others = _cycle(validation)
        for _ in range(epochs):
            epoch, losses = len(self.history), []
            for i, (x, y) in enumerate(train, 1):
                losses.append(self.train_step(x, y))
                if epoch >= warmup and i % train_steps == 0:
                    for _ in range(tune_steps):
                        self.tune_step(*next(others))
            if not losses:
                raise ValueError("there are no training batches")
            scales = dict(zip(self.hypers.named, self.hypers.scale.detach().tolist(), strict=True))
            row = {"epoch": float(epoch), "train_loss": sum(losses) / len(losses)}
            row |= {"validation_loss": self.evaluate(validation)} | self.values()
            self.history.append(row | {f"{name}_scale": value for name, value in scales.items()})
        return self.history


def _cycle(batches: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError("there are no validation batches")
