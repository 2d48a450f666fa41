"""SNNK: scalable neural network kernels, layers in which inputs and weights interact only through a dot product.

Sehanobish, Choromanski, Zhao, Dubey and Likhosherstov, "Scalable Neural Network Kernels", arXiv 2310.13225 (ICLR 2024).
The authors' code is Apache-2.0; this is an independent implementation, with their ReLU map, bundling and adapters (see
`zoo.adapters`), and better ways to set the weights.

    f(W x + b)  ~  Psi Phi(x),    Phi: d -> m without parameters,    Psi = Psi_f(W, b): l x m, trained

- the layer has l m parameters instead of l (d + 1), and costs m d + l m;
- Psi and the next linear layer are multiplied to a single matrix, which removes the hidden width l;
- a whole network bundles into random features and one matrix, with a closed-form optimum for squared error.

The outputs lie in the span of m random features: the best conversion of a layer is a least-squares fit to its outputs
(`method="lstsq"`). Mapping its weights (`method="map"`) is the paper's idea; it is accurate only where the kernel
equals the activation and norms are small.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge
from pydantic import PositiveInt
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.kernels.random_features import (
    FeatureMap,
    OscillatoryFeatures,
    ProjectionKind,
    ReLUFeatures,
    find_activation,
)
from zoo.learners.logistic import fit_logistic
from zoo.learners.ridge import Head, LeastSquares, LeaveOneOut, leave_one_out
from zoo.support.scaling import standardisation, standardised

__all__ = ["SNNK", "SNNKFeedForward", "SNNKLinear", "Tower", "bundle", "relative_ridge", "solve_head"]

Method = Literal["lstsq", "map"]


def generators_kept(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Context that restores the random state, for layers whose initial weights will be replaced."""
    return torch.random.fork_rng([device.index or 0] if device.type == "cuda" else [])


# ---- the layer ---------------------------------------------------------------------------------------------


class SNNKLinear(nn.Module):
    """A feed-forward layer on random features, Psi Phi(x) + c, for any leading dimensions.

    Args:
        features: The map Phi, from `zoo.kernels.random_features`.
        out_features: Width l of the output.
        bias: Add a trained c. The bias of a converted layer is part of Psi; `method="lstsq"` sets c.
        device: Device of the parameters.
        dtype: Their dtype.

    Attributes:
        weight: Psi (l, m), initialised as if a Kaiming-uniform linear layer had been converted.
    """

    def __init__(self, features: FeatureMap, out_features: int, bias: bool = False, device=None, dtype=None) -> None:
        super().__init__()
        if out_features < 1:
            raise ValueError(f"out_features={out_features} must be at least 1")
        self.features, self.in_features, self.out_features = features, features.in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, features.out_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise Psi from a Kaiming-uniform matrix, and c with zeros."""
        if not self.weight.is_meta:
            start = self.weight.new_empty(self.out_features, self.in_features)
            nn.init.kaiming_uniform_(start, a=math.sqrt(5))
            self.weight.copy_(self.features.encode(start))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return F.linear(self.features(x), self.weight, self.bias)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        activation: str = "relu",
        method: Method = "lstsq",
        *,
        calibration: Tensor | Iterable[Tensor] | None = None,
        features: FeatureMap | None = None,
        num_features: int = 256,
        ridge: float = 1e-4,
        seed: int = 0,
    ) -> SNNKLinear:
        """Convert a linear layer and the activation that follows it.

        Args:
            linear: W and b.
            activation: The activation: a name of `zoo.kernels.random_features.ACTIVATIONS`.
            method: `"lstsq"` fits Psi to the layer's outputs on the calibration inputs, in one pass of float64 normal
                equations; `"map"` takes Psi = Psi_f(W, b).
            calibration: Inputs (..., d), or batches of them, for `"lstsq"`.
            features: The map Phi; None: ReLU features for `"lstsq"` and for relu, otherwise those of the activation.
            num_features: Width of the default map.
            ridge: Relative to the mean of the diagonal of Phi^T Phi.
            seed: Seed of the default map.

        Returns:
            A layer with the dtype and device of `linear`.

        Raises:
            ValueError: The activation or method is unknown, widths do not match, there are no calibration inputs, or
                Psi cannot estimate this activation.
        """
        function = find_activation(activation).function
        weight = linear.weight.detach()
        like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        if method not in ("lstsq", "map"):
            raise ValueError(f"method={method!r} is not one of 'lstsq', 'map'")
        if method == "lstsq" and calibration is None:
            raise ValueError("method='lstsq' fits the layer's outputs: pass calibration=<inputs, or batches of them>")
        if features is None:
            seeds: dict[str, Any] = {"seed": seed, "bias": True, **like}
            if method == "lstsq" or activation == "relu":
                features = ReLUFeatures(linear.in_features, num_features, antithetic=method == "lstsq", **seeds)
            else:
                norm = float(weight.float().norm(dim=1).mean())
                features = OscillatoryFeatures(linear.in_features, num_features, activation, weight_norm=norm, **seeds)
        if features.in_features != linear.in_features:
            raise ValueError(f"the map takes {features.in_features} features, the linear layer {linear.in_features}")
        layer = cls(features, linear.out_features, method == "lstsq", **like)
        if method == "map":
            if activation == "relu" and isinstance(features, ReLUFeatures):
                warnings.warn(
                    "the map of ReLU features estimates an arc-cosine kernel, not relu(W x + b): train on, or use "
                    "method='lstsq'",
                    RuntimeWarning,
                    stacklevel=2,
                )
            bias = None if linear.bias is None else linear.bias.detach()
            with torch.no_grad():
                layer.weight.copy_(features.encode(weight, bias))
            return layer
        assert calibration is not None
        system = LeastSquares()
        with torch.no_grad():
            for x in [calibration] if isinstance(calibration, Tensor) else calibration:
                x = x.to(**like)
                system.add(features(x), function(linear(x).double()))
        layer.load_head(relative_ridge(system, ridge))
        return layer

    @torch.no_grad()
    def load_head(self, head: Head) -> None:
        """Set Psi and c from a closed-form solution."""
        self.weight.copy_(head.weight)
        if self.bias is not None:
            self.bias.copy_(head.bias)

    @torch.no_grad()
    def fold(self, following: nn.Linear) -> SNNKLinear:
        """The layer multiplied with the next linear one: (W2 Psi) Phi(x) + (W2 c + b2), equal up to rounding.

        Raises:
            ValueError: The widths do not match.
        """
        if following.in_features != self.out_features:
            raise ValueError(f"the next layer takes {following.in_features} features; this one has {self.out_features}")
        folded = copy.deepcopy(self)
        W2, b2 = following.weight.double(), following.bias
        folded.out_features = following.out_features
        folded.weight = nn.Parameter((W2 @ self.weight.double()).to(self.weight.dtype), self.weight.requires_grad)
        if self.bias is not None or b2 is not None:
            bias = W2.new_zeros(len(W2)) if b2 is None else b2.double()
            bias = bias if self.bias is None else bias + W2 @ self.bias.double()
            folded.bias = nn.Parameter(bias.to(self.weight.dtype), self.weight.requires_grad)
        return folded

    def extra_repr(self) -> str:
        """Widths."""
        return f"{self.in_features} -> {self.features.out_features} -> {self.out_features}"


def relative_ridge(system: LeastSquares, ridge: float) -> Head:
    """The head for a ridge relative to the mean squared norm of the feature columns."""
    return system.ridge(ridge * system.scale())


class SNNKFeedForward(nn.Module):
    """Psi Phi(x), then a linear layer: the feed-forward network of a transformer on random features.

    In deploy form (`zoo.to_deploy`) the two matrices are merged into one: m (d + d2) multiplications per token.

    Args:
        features: The map Phi.
        hidden: Width between the two matrices.
        out_features: Width of the output.
        drop: Dropout between the two matrices.
    """

    def __init__(
        self, features: FeatureMap, hidden: int, out_features: int, drop: float = 0.0, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.layer: SNNKLinear = SNNKLinear(features, hidden, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop)
        self.out: nn.Linear | None = nn.Linear(hidden, out_features, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., out_features)."""
        x = self.layer(x)
        return x if self.out is None else self.out(self.drop(x))

    def reparameterize(self) -> None:
        """Merge the two matrices, for `zoo.to_deploy`."""
        if self.out is not None:
            self.layer, self.out = self.layer.fold(self.out), None
            self.drop = nn.Dropout(0.0)


# ---- whole networks ----------------------------------------------------------------------------------------


class Tower(nn.Sequential):
    """Random features of random features: the parameter-free input side of a bundled network."""

    out_features: int

    def __init__(self, *maps: FeatureMap) -> None:
        super().__init__(*maps)
        for one, two in itertools.pairwise(maps):
            if one.out_features != two.in_features:
                raise ValueError(f"a map of {one.out_features} features feeds one that takes {two.in_features}")
        self.out_features = maps[-1].out_features


@torch.no_grad()
def bundle(layers: Sequence[nn.Linear], maps: Sequence[FeatureMap]) -> tuple[Tower, nn.Linear]:
    """Bundle a whole network f_L(W_L ... f_1(W_1 x + b_1)) [+ a linear head] into a tower of maps and one matrix.

    With V_1 = W_1 and V_(i+1) = W_(i+1) Psi_i(V_i, b_i), the weights are collapsed from input to output. The maps
    determine the activations. The error grows with depth: give later maps more features, or refit the matrix
    (:func:`solve_head`). A map with `bias=False` drops the bias of its layer, as in the authors' code.

    Args:
        layers: Linear layers in order: as many as maps, or one more, the head.
        maps: One per activation; the first takes the input, each other one the features of the one before.

    Returns:
        The tower and the linear layer on top.

    Raises:
        ValueError: Numbers or widths do not match.
    """
    if len(layers) - len(maps) not in (0, 1) or not maps:
        raise ValueError(f"{len(layers)} linear layers need as many maps, or one less with a head; got {len(maps)}")
    for first, second in itertools.pairwise(layers):
        if first.out_features != second.in_features:
            raise ValueError(f"a layer of {first.out_features} outputs feeds one that takes {second.in_features}")
    V: Tensor = layers[0].weight
    bias: Tensor | None = layers[0].bias
    for i, features in enumerate(maps):
        if V.shape[1] != features.in_features:
            raise ValueError(f"map {i} takes {features.in_features} features and should take {V.shape[1]}")
        V = features.encode(V, bias if features.bias else None)
        bias = None
        if i + 1 < len(layers):
            V, bias = layers[i + 1].weight @ V, layers[i + 1].bias
    with generators_kept(V.device):
        head = nn.Linear(V.shape[1], V.shape[0], bias is not None, device=V.device, dtype=V.dtype)
    head.weight.copy_(V)
    if bias is not None:
        head.bias.copy_(bias)
    return Tower(*maps), head


def solve_head(
    tower: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    loss: Literal["mse", "classification", "inner_product", "procrustes", "logistic"] = "mse",
    ridge: float | Literal["loo"] = "loo",
    *,
    num_classes: int | None = None,
    bias: bool = True,
    ridges: Sequence[float] | None = None,
) -> tuple[Head, LeaveOneOut | None]:
    """Optimal linear head on fixed features, in one pass over a data loader.

    Args:
        tower: Inputs (n, ...) to features (n, F).
        loader: Batches `(x, y)`, read once; the features are kept only if the choice of the ridge needs them.
        loss: `"mse"`; `"classification"`: squared error on one-hot targets; `"logistic"`: softmax regression (Newton's
            method, several passes over stored features); `"inner_product"` or `"procrustes"`: maximise sum_i y_i . A
            p_i subject to |A|_F = 1 or orthonormal rows.
        ridge: Penalty on |A|^2, or `"loo"` to minimise the leave-one-out error.
        num_classes: Number of classes if y are class indices.
        bias: Fit an unpenalised intercept (not for the two maximisation losses).
        ridges: Candidates for `"loo"`.

    Returns:
        The head, and the leave-one-out errors if they selected the ridge.

    Raises:
        ValueError: The loss is unknown, or `num_classes` is missing for class indices.
    """
    losses = ("mse", "classification", "inner_product", "procrustes", "logistic")
    if loss not in losses:
        raise ValueError(f"loss={loss!r} is not one of {', '.join(losses)}")
    if loss in ("classification", "logistic") and not num_classes:
        raise ValueError(f"loss={loss!r} needs num_classes")
    maxima = loss in ("inner_product", "procrustes")
    system, kept = LeastSquares(bias and not maxima), []
    training = tower.training
    tower.eval()
    with torch.no_grad():
        for x, y in loader:
            p = tower(x)
            target = F.one_hot(y.long(), num_classes or -1).double() if loss == "classification" else y
            if loss != "logistic":
                system.add(p, target)
            if loss == "logistic" or (ridge == "loo" and not maxima):
                kept.append((p, target))
    tower.train(training)
    if maxima:
        return (system.inner_product() if loss == "inner_product" else system.procrustes()), None
    if loss == "logistic":
        return fit_logistic(lambda: kept, num_classes or 2, 1e-3 if ridge == "loo" else ridge, bias=bias), None
    if ridge != "loo":
        return system.ridge(ridge), None
    errors = leave_one_out(system, lambda: kept, ridges)
    return system.ridge(errors.best), errors


class SNNK(nn.Module):
    """A multilayer perceptron of SNNK layers on flattened inputs, layer by layer or fully bundled.

    Args:
        in_chans: Channels of an image, or features of a row.
        num_classes: Number of outputs; 0 returns the last features.
        hidden: Widths of the hidden layers.
        num_features: Random features per layer; one number for all or one for each.
        img_size: Side or (height, width) of image inputs; 1 for tables.
        bundled: Train only the last matrix, on a tower of random features; :meth:`solve` computes its optimum.
        projection: `"orthogonal"`, `"iid"` or `"hadamard"`.
        antithetic: Use every projection with both signs.
        normalize: Rescale the input of every layer to this norm first, usually the root of the width; None disables it.
        drop_rate: Dropout before the head.
        seed: Seed of the projections; layer i uses seed + i.
        persistent: Save the projections with the weights; otherwise they are regenerated and checked on loading.
        global_pool: Only "" is accepted, there is nothing to pool.
        device: Device of the parameters and buffers.
        dtype: Their dtype.

    Attributes:
        input_mean, input_scale: Subtracted from the flattened inputs, and their divisor.
    """

    input_mean: Tensor
    input_scale: Tensor

    def __init__(
        self,
        in_chans: PositiveInt = 16,
        num_classes: Annotated[int, Ge(0)] = 10,
        hidden: Sequence[PositiveInt] = (256,),
        num_features: PositiveInt | Sequence[PositiveInt] = 256,
        *,
        img_size: PositiveInt | tuple[PositiveInt, PositiveInt] = 1,
        bundled: bool = False,
        projection: ProjectionKind = "orthogonal",
        antithetic: bool = False,
        normalize: float | None = None,
        drop_rate: float = 0.0,
        seed: int = 0,
        persistent: bool = True,
        global_pool: str = "",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if global_pool:
            raise ValueError(f"global_pool={global_pool!r}: a perceptron has no positions to pool; leave it empty")
        counts = [num_features] * len(hidden) if isinstance(num_features, int) else list(num_features)
        if not hidden or len(counts) != len(hidden):
            raise ValueError(
                f"hidden={list(hidden)} needs one number of features each, not num_features={num_features}"
            )
        self.in_chans, self.num_classes, self.dim = in_chans, num_classes, in_chans * height * width
        self.bundled = bundled
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        options: dict[str, Any] = {"projection": projection, "antithetic": antithetic, "persistent": persistent, **dd}
        self.register_buffer("input_mean", torch.zeros(self.dim, **dd))
        self.register_buffer("input_scale", torch.ones(self.dim, **dd))
        layers: list[nn.Module] = []
        size = self.dim
        for i, (wide, m) in enumerate(zip(hidden, counts, strict=True)):
            features = ReLUFeatures(size, m, seed=seed + i, normalize=normalize, **options)
            layers.append(features if bundled else SNNKLinear(features, wide, **dd))
            size = m if bundled else wide
        self.layers = nn.Sequential(*layers)
        self.num_features = self.head_hidden_size = size
        self.feature_info = [{"num_chs": size, "reduction": 1, "module": "layers"}]
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = self._new_head(num_classes, **dd)

    def _new_head(self, num_classes: int, **dd: Any) -> nn.Module:
        return nn.Linear(self.num_features, num_classes, **dd) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, ...) -> (B, num_features)."""
        if x.ndim < 2 or math.prod(x.shape[1:]) != self.dim:
            given = "x".join(map(str, x.shape)) or "a single number"
            raise ValueError(f"expected a batch of {self.dim} features (or images of as many values), got {given}")
        return self.layers(standardised(x.flatten(1), self.input_mean, self.input_scale, self.input_mean.dtype))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, num_features) -> (B, num_classes)."""
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, ...) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    @torch.no_grad()
    def initialize(self, X: Tensor, y: Tensor | None = None, **_: Any) -> None:
        """Standardise the inputs by the training rows (n, ...); if bundled, with targets, also solve for the head.

        Args:
            X: All training rows.
            y: Their class indices, or values (n,) for one output.
            **_: Further arguments of the task, ignored.
        """
        mean, scale = standardisation(X.flatten(1))
        self.input_mean.copy_(mean)
        self.input_scale.copy_(scale.clamp_min(torch.finfo(self.input_scale.dtype).tiny))
        if self.bundled and y is not None and self.num_classes:
            device = self.input_mean.device
            if self.num_classes > 1:
                self.solve([(X.to(device), y.to(device))])
                return
            values = y.reshape(-1, 1).to(device)
            mean, scale = standardisation(values)
            self.solve([(X.to(device), standardised(values, mean, scale, torch.float64))])
            head: Any = self.head
            head.weight.mul_(scale)
            head.bias.copy_(head.bias.double() * scale + mean)

    def solve(
        self, loader: Iterable[tuple[Tensor, Tensor]], ridge: float | Literal["loo"] = "loo", **options: Any
    ) -> LeaveOneOut | None:
        """Set the optimal head for the current layers, see :func:`solve_head`.

        Raises:
            ValueError: The network has no head.
        """
        if not isinstance(self.head, nn.Linear):
            raise ValueError("a network without outputs has no head to solve")
        body = nn.Sequential(_Body(self))
        options = {
            "loss": "classification" if self.num_classes > 1 else "mse",
            "num_classes": self.num_classes,
            **options,
        }
        head, errors = solve_head(body, loader, ridge=ridge, **options)
        with torch.no_grad():
            self.head.weight.copy_(head.weight)
            self.head.bias.copy_(head.bias)
        return errors

    def reparameterize(self) -> None:
        """Fold the last layer's matrix into the head, for `zoo.to_deploy`; exact up to rounding."""
        last = self.layers[-1]
        if isinstance(last, SNNKLinear) and isinstance(self.head, nn.Linear):
            folded = last.fold(self.head)
            self.layers[-1] = folded.features
            assert folded.bias is not None  # the head's own
            head = nn.Linear(folded.features.out_features, self.num_classes, device="meta")
            head.weight, head.bias = folded.weight, folded.bias
            self.head = head.train(self.training)
            self.num_features = self.head_hidden_size = folded.features.out_features

    def no_weight_decay(self) -> set[str]:
        """Empty: no exceptions besides the usual ones."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """One parameter group per layer."""
        return {"stem": r"^input_", "blocks": r"^layers\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Not supported: there is nothing worth recomputing."""
        assert not enable, "an SNNK perceptron has no blocks to checkpoint"

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one; none for 0 outputs."""
        if global_pool:
            raise ValueError(f"global_pool={global_pool!r}: a perceptron has no positions to pool; leave it empty")
        like = self.input_mean
        self.num_classes = num_classes
        self.head = self._new_head(num_classes, device=like.device, dtype=like.dtype).train(self.training)


class _Body(nn.Module):
    """The features of a network, as a module."""

    def __init__(self, network: SNNK) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network.forward_features(x)


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
        "paper_ids": "arXiv:2310.13225",
        "paper_name": "Scalable Neural Network Kernels",
        **kwargs,
    }


default_cfgs = generate_default_cfgs({name: _cfg() for name in ("snnk_mlp", "snnk_mlp2", "snnk_bundled", "test_snnk")})


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], **defaults: Any) -> SNNK:
    return build_model_with_cfg(SNNK, variant, pretrained, **{**defaults, **kwargs})


@register_model
def snnk_mlp(pretrained: bool = False, **kwargs: Any) -> SNNK:
    """One SNNK layer of 256 units on 256 random features, and a head."""
    return _create("snnk_mlp", pretrained, kwargs)


@register_model
def snnk_mlp2(pretrained: bool = False, **kwargs: Any) -> SNNK:
    """Two SNNK layers of 256 units on 256 and 512 random features, and a head."""
    return _create("snnk_mlp2", pretrained, kwargs, hidden=(256, 256), num_features=(256, 512))


@register_model
def snnk_bundled(pretrained: bool = False, **kwargs: Any) -> SNNK:
    """512 random features and one matrix, whose optimum has a closed form."""
    return _create("snnk_bundled", pretrained, kwargs, bundled=True, num_features=512)


@register_model
def test_snnk(pretrained: bool = False, **kwargs: Any) -> SNNK:  # noqa: PT028
    """Two tiny SNNK layers, for tests."""
    return _create("test_snnk", pretrained, kwargs, hidden=(6, 5), num_features=8)
