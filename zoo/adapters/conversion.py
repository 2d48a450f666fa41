"""SNNK replacing layers of a pretrained transformer: feed-forward networks and poolers, fitted to the originals.

Every layer gets its own random features and is fitted by least squares, in one pass over calibration inputs, on the
states produced by the layers converted before it. The hidden width disappears: the features are multiplied with a
single matrix (`folded=True`), and 2 d l multiplications per token become 2 d m.

>>> report = convert_feed_forward(model, batches, num_features=256, layers=(-2, -1))
>>> [(c.name, c.error) for c in report]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from zoo.kernels.random_features import FeatureMap, ReLUFeatures
from zoo.learners.ridge import Head, LeastSquares
from zoo.models.snnk import SNNKLinear, generators_kept, relative_ridge

__all__ = ["Conversion", "SNNKPooler", "convert_feed_forward", "convert_pooler", "feed_forwards"]

#: Inputs of a model: a tensor, positional arguments, or keyword arguments.
Inputs = Tensor | Sequence[Any] | Mapping[str, Any]


class Conversion(NamedTuple):
    """A converted module: its name, relative error on the calibration inputs, and parameters before and after."""

    name: str
    error: float
    before: int
    after: int


class FeedForward(NamedTuple):
    """A feed-forward network of a transformer: linear, activation, linear, and a function that replaces it."""

    name: str
    first: nn.Linear
    act: Callable[[Tensor], Tensor]
    second: nn.Linear
    replace: Callable[[nn.Module, nn.Linear], None]


def feed_forwards(model: nn.Module) -> list[FeedForward]:
    """Feed-forward networks of a BERT-style encoder of Hugging Face or a timm vision transformer, in order."""
    found = []
    for name, module in model.named_modules():
        inner: Any = module
        dense = getattr(getattr(module, "intermediate", None), "dense", None)
        if isinstance(dense, nn.Linear) and isinstance(getattr(inner.output, "dense", None), nn.Linear):

            def bert(new: nn.Module, out: nn.Linear, layer: Any = inner) -> None:
                layer.intermediate, layer.output.dense = new, out

            found.append(FeedForward(name, dense, inner.intermediate.intermediate_act_fn, inner.output.dense, bert))
        elif isinstance(getattr(module, "fc1", None), nn.Linear) and isinstance(
            getattr(module, "fc2", None), nn.Linear
        ):
            if not isinstance(getattr(module, "norm", None), nn.Identity | type(None)):
                continue  # a normalisation of the hidden units cannot be folded

            def timm(new: nn.Module, out: nn.Linear, mlp: Any = inner) -> None:
                mlp.fc1, mlp.act, mlp.fc2 = new, nn.Identity(), out

            found.append(FeedForward(name, inner.fc1, inner.act, inner.fc2, timm))
    return found


def convert_feed_forward(
    model: nn.Module,
    calibration: Iterable[Inputs] | Callable[[], Iterable[Inputs]],
    *,
    num_features: int = 256,
    layers: Sequence[int] | None = None,
    folded: bool = True,
    ridge: float = 1e-4,
    seed: int = 0,
    features: Callable[[int, int, int], FeatureMap] | None = None,
) -> list[Conversion]:
    """Replace feed-forward networks by random features and a fitted matrix; in place.

    Args:
        model: A BERT-style encoder of Hugging Face, a timm vision transformer, or a part of one.
        calibration: Batches of inputs of the model; a list, or a function that returns them again for every layer.
        num_features: Number of features m.
        layers: Indices, negative from the end; None for all.
        folded: A single matrix after the features; otherwise only the first linear layer and its activation are
            replaced.
        ridge: Relative to the mean of the diagonal of Phi^T Phi.
        seed: Random seed; layer i uses seed + i.
        features: Builds a map from (width, num_features, seed); None: antithetic ReLU features with a bias.

    Returns:
        A report for each layer.

    Raises:
        ValueError: There is no such network or layer in the model, or no calibration inputs.
    """
    if num_features < 1:
        raise ValueError(f"num_features={num_features} must be at least 1")
    every = feed_forwards(model)
    if not every:
        raise ValueError(
            f"{type(model).__name__} has no feed-forward network that can be converted: intermediate.dense and "
            "output.dense, or fc1 and fc2, are looked for"
        )
    chosen = range(len(every)) if layers is None else [i if i >= 0 else len(every) + i for i in layers]
    if any(not 0 <= i < len(every) for i in chosen):
        raise ValueError(f"layers={list(layers or ())}: the model has {len(every)} feed-forward networks")
    batches = calibration if callable(calibration) else lambda kept=list(calibration): kept
    training = model.training
    model.eval()
    done = []
    for i in sorted(chosen):
        ffn = every[i]
        like: dict[str, Any] = {"device": ffn.first.weight.device, "dtype": ffn.first.weight.dtype}
        build = features or _relu
        phi = build(ffn.first.in_features, num_features, seed + i).to(**like)
        target = (lambda x, f=ffn: f.second(f.act(f.first(x)))) if folded else (lambda x, f=ffn: f.act(f.first(x)))
        head, error = _fit(model, ffn.first, phi, target, batches, ridge)
        before = sum(p.numel() for m in (ffn.first, ffn.second) for p in m.parameters())
        if folded:
            with generators_kept(like["device"]):
                out = nn.Linear(phi.out_features, ffn.second.out_features, **like)
            _fill(out, head)
            ffn.replace(phi, out)
            after = sum(p.numel() for p in out.parameters())
        else:
            with generators_kept(like["device"]):
                layer = SNNKLinear(phi, ffn.first.out_features, bias=True, **like)
            layer.load_head(head)
            ffn.replace(layer, ffn.second)
            after = sum(p.numel() for m in (layer, ffn.second) for p in m.parameters())
        done.append(Conversion(ffn.name, error, before, after))
    model.train(training)
    return done


def _relu(width: int, num_features: int, seed: int) -> FeatureMap:
    return ReLUFeatures(width, num_features, antithetic=True, seed=seed)


@torch.no_grad()
def _fit(
    model: nn.Module,
    place: nn.Module,
    phi: FeatureMap,
    target: Callable[[Tensor], Tensor],
    batches: Callable[[], Iterable[Inputs]],
    ridge: float,
) -> tuple[Head, float]:
    """Least squares on the inputs of `place` while the model runs over the batches."""
    system, squares = LeastSquares(), [0.0, 0.0]

    def collect(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if place in busy:
            return
        busy.append(place)  # the target calls the module itself
        y = target(arguments[0]).double()
        system.add(phi(arguments[0]), y)
        squares[0] += float(y.square().sum())
        squares[1] += y[..., 0].numel()
        busy.clear()

    busy: list[nn.Module] = []
    handle = place.register_forward_pre_hook(collect)
    try:
        for inputs in batches():
            call_model(model, inputs)
    finally:
        handle.remove()
    if not system.rows:
        raise ValueError("there were no calibration inputs, or they did not reach the layer")
    head = relative_ridge(system, ridge)
    return head, (system.residual(head) / squares[0]) ** 0.5


def call_model(model: nn.Module, inputs: Inputs) -> Any:
    """The model's output for a tensor, positional arguments, or keyword arguments."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def _fill(linear: nn.Linear, head: Head) -> None:
    with torch.no_grad():
        linear.weight.copy_(head.weight)
        linear.bias.copy_(head.bias)


# ---- poolers -----------------------------------------------------------------------------------------------


class SNNKPooler(nn.Module):
    """Psi Phi(h) of the first token's state h, replacing tanh(W h + b).

    Args:
        layer: An SNNK layer, or a feature map whose features go directly to the classifier.
    """

    def __init__(self, layer: SNNKLinear | FeatureMap) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, L, d) -> (B, d), or (B, m)."""
        return self.layer(hidden_states[:, 0])


def convert_pooler(
    model: nn.Module,
    calibration: Iterable[Inputs] | None = None,
    *,
    num_features: int = 256,
    form: Literal["linear", "bundled"] = "linear",
    ridge: float = 1e-4,
    seed: int = 0,
) -> nn.Module:
    """Replace the pooler of a BERT-style model; in place.

    Args:
        model: A model with one module named `pooler` (dense, activation) and, for `"bundled"`, one named `classifier`.
        calibration: Batches of inputs for fitting Psi; None uses the map of the pooler's weights, as an initialisation
            for training.
        num_features: Number of features m.
        form: `"linear"` keeps the pooled width; `"bundled"` multiplies Psi into the classifier, which then takes m
            features.
        ridge: Relative to the mean of the diagonal of Phi^T Phi.
        seed: Random seed of the features.

    Returns:
        `model` itself.

    Raises:
        ValueError: There is no pooler, no linear classifier, or the form is unknown.
    """
    if form not in ("linear", "bundled"):
        raise ValueError(f"form={form!r} is not one of 'linear', 'bundled'")
    names = [n for n, m in model.named_modules() if n.rpartition(".")[2] == "pooler" and hasattr(m, "dense")]
    if len(names) != 1:
        raise ValueError(f"{type(model).__name__} has {len(names)} poolers with a dense layer; one is needed")
    classifier = getattr(model, "classifier", None)
    if form == "bundled" and not isinstance(classifier, nn.Linear):
        raise ValueError(f"form='bundled' needs a linear classifier, {type(model).__name__} has none")
    pooler: Any = model.get_submodule(names[0])
    dense, like = pooler.dense, {"device": pooler.dense.weight.device, "dtype": pooler.dense.weight.dtype}
    phi = _relu(dense.in_features, num_features, seed).to(**like)
    with generators_kept(like["device"]):
        layer = SNNKLinear(phi, dense.out_features, bias=True, **like)
    if calibration is None:
        with torch.no_grad():
            layer.weight.copy_(phi.encode(dense.weight, dense.bias))
    else:
        head, _ = _fit(model, dense, phi, lambda x: pooler.activation(dense(x)), lambda: calibration, ridge)
        layer.load_head(head)
    if form == "bundled":
        assert isinstance(classifier, nn.Linear)
        folded = layer.fold(classifier)
        with generators_kept(like["device"]):
            out = nn.Linear(phi.out_features, classifier.out_features, **like)
        _fill(out, Head(folded.weight, out.bias if folded.bias is None else folded.bias))
        model.classifier = out
    parent, _, last = names[0].rpartition(".")
    setattr(model.get_submodule(parent), last, SNNKPooler(phi if form == "bundled" else layer))
    return model
