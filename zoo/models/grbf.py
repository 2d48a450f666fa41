"""GRBF: Gaussian radial basis function networks with a shared, learnable precision matrix.

D'Agostino, Ilievski, Shoemaker, "Learning Active Subspaces and Discovering Important Features with Gaussian Radial
Basis Functions Neural Networks", arXiv 2307.05639 (Neural Networks 176, 2024); the model is the HyperBF network of
Poggio and Girosi (1990) with a regularised, interpretable metric. The authors' code is MIT-licensed; this is an
independent implementation, with their losses and initialisation as well as ours.

    q_nm   = (x_n - c_m)^T P (x_n - c_m),   P = L L^T               one metric, shared by all centres
    phi_nm = exp(-q_nm / 2)
    f_n    = W phi_n + b                                            logits, or the regression value

Since q_nm = |L^T (x_n - c_m)|^2, this is an isotropic network on z = L^T x: the eigenvectors of P with large
eigenvalues span the directions along which the output changes, and penalising |L|^2 = tr P, the nuclear norm of P,
switches the others off.

Importances are in units of standardised features, shared between correlated features, and the same for all classes if
computed from P alone. The eigenvectors of P are not exactly those of the average gradient outer product
E[grad f grad f^T], which lies in the range of P and is available too (`kind="gradient"`).
"""

import math
import random
import warnings
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from annotated_types import Ge
from pydantic import PositiveInt
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, register_notrace_function
from torch import Tensor, nn

from zoo.kernels.metric import metric_gaussian, point_gradient, project, unpack_triangle
from zoo.support.renamed import renamed
from zoo.support.scaling import power_of_two, standardisation, standardised

__all__ = [
    "LOSSES",
    "GaussianRBFNetwork",
    "Spectrum",
    "eigen",
    "importance_from_precision",
    "network_loss",
    "penalty_term",
]

Precision = Literal["full", "diag", "isotropic"] | PositiveInt
Penalty = Literal["squared", "plain"]
NonNegative = Annotated[float, Ge(0)]

#: Below this median kernel value, the gradient of the data term is too small for training.
DEAD = 1e-6


# ---- the metric --------------------------------------------------------------------------------------------


def factor_of(precision: Tensor, dim: int, form: str) -> Tensor:
    """L with P = L L^T from the stored parameter: a packed triangle, a matrix, or log-scales.

    Leading dimensions are networks. Returns (..., D, R), or scales (..., 1, D) or (..., 1, 1) of the diagonal forms.
    """
    if form == "full":
        return unpack_triangle(precision, dim)
    return precision if form == "low_rank" else precision.exp().unsqueeze(-2)


# ---- losses ------------------------------------------------------------------------------------------------


def _one_hot(targets: Tensor, like: Tensor) -> Tensor:
    return F.one_hot(targets.long(), like.shape[-1]).to(like.dtype)


def _mse(f: Tensor, y: Tensor) -> Tensor:
    return (f - y).square().mean(-1)


def _cross_entropy(f: Tensor, y: Tensor) -> Tensor:
    if f.shape[-1] == 1:
        return F.binary_cross_entropy_with_logits(f, y, reduction="none").squeeze(-1)
    chosen = f.gather(-1, y.long().unsqueeze(-1)).squeeze(-1)
    return torch.logsumexp(f, -1) - chosen


#: Row losses by name. `f` are outputs (..., n, K); targets are values (..., n, K) for `mse` and for single-output
#: losses, otherwise class indices (..., n). The official losses are those of the authors' code, including their quirks:
#: `official_nll` is -p_y without a logarithm (2024), `official_ce` applies cross-entropy to probabilities (2023).
LOSSES = {
    "mse": _mse,
    "cross_entropy": _cross_entropy,
    "official_nll": lambda f, y: -f.softmax(-1).gather(-1, y.long().unsqueeze(-1)).squeeze(-1),
    "official_ce": lambda f, y: _cross_entropy(f.softmax(-1), y),
    "official_half_sse": lambda f, y: 0.5 * (f - y).square().sum(-1),
}


def network_loss(
    outputs: Tensor,
    targets: Tensor,
    kind: str = "cross_entropy",
    *,
    weight: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """Data term: mean squared error, cross-entropy on logits, or one of the authors' losses.

    The authors' classes of 2023 sum where those of 2024 average; use `reduction="sum"` for the former (a sum of squares
    divided by the size of the whole training set is `"sum"` with `weight=1 / n_train`).

    Args:
        outputs: (..., n, K) from the network.
        targets: Class indices (..., n), or values (..., n) or (..., n, K) for one output and for `mse`.
        kind: A name of :data:`LOSSES`.
        weight: Row weights (..., n); None for ones.
        reduction: Weighted mean or weighted sum over the rows.

    Returns:
        (...), one number per network.

    Raises:
        ValueError: The kind is unknown, or the shapes do not fit.
    """
    if kind not in LOSSES:
        raise ValueError(f"loss {kind!r} is not one of {', '.join(LOSSES)}")
    values = kind in ("mse", "official_half_sse") or outputs.shape[-1] == 1
    if values and targets.ndim == outputs.ndim - 1:
        targets = targets.unsqueeze(-1)
    wanted = outputs.shape if values else outputs.shape[:-1]
    if targets.shape != wanted:
        raise ValueError(f"targets of shape {tuple(targets.shape)} do not belong to outputs of shape "
                         f"{tuple(outputs.shape)}: give {tuple(wanted)}")  # fmt: skip
    targets = targets.to(outputs.dtype) if values else targets
    if kind == "cross_entropy" and outputs.shape[1:] == (1,) and weight is None:  # torch's, in one operator
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction=reduction)
    rows = LOSSES[kind](outputs, targets)
    if weight is None:
        return rows.sum(-1) if reduction == "sum" else rows.mean(-1)
    total = (weight * rows).sum(-1)
    return total if reduction == "sum" else total / weight.sum(-1)


def penalty_term(block: Tensor, kind: Penalty = "squared") -> Tensor:
    """Unweighted penalty (...) of a block of parameters (..., p, q), one number per network, or (p), of one network.

    `"squared"` sums squares (for L this is tr P, smooth everywhere); `"plain"` is the authors': the 2-norm of the whole
    block, whose gradient has constant length, and is 0 at 0.
    """
    dims = (-2, -1) if block.ndim > 2 else None
    block = block.to(torch.promote_types(block.dtype, torch.float32))  # squares overflow in half precision
    if kind == "squared":
        return block.square().sum(dims)
    if kind == "plain":
        return torch.linalg.vector_norm(block, dim=dims)
    raise ValueError(f"penalty={kind!r} is not one of 'squared', 'plain'")


# ---- interpretation of a metric ------------------------------------------------------------------------------------


class Spectrum(NamedTuple):
    """Eigenvalues (..., D), largest first, and their unit eigenvectors in the rows of (..., D, D)."""

    values: Tensor
    components: Tensor


def eigen(matrix: Tensor) -> Spectrum:
    """Eigendecomposition of symmetric positive semidefinite matrices (..., D, D), deterministic.

    Eigenvalues are in descending order and clamped at zero; the entry of largest magnitude of each eigenvector is
    positive.
    """
    values, vectors = torch.linalg.eigh(matrix)
    return Spectrum(values.flip(-1).clamp_min(0), _signed(vectors.flip(-1).mT))


def eigen_of_root(root: Tensor, complete: bool = False) -> Spectrum:
    """:func:`eigen` of root^T root for root (r, D), without building that matrix.

    The eigenvalues (D,) beyond the first r are zero; their eigenvectors are included only if `complete`.
    """
    _, sizes, rows = torch.linalg.svd(root, full_matrices=complete)
    values = root.new_zeros(root.shape[1])
    values[: len(sizes)] = sizes.square()
    return Spectrum(values, _signed(rows))


def _signed(rows: Tensor) -> Tensor:
    """Flip the sign of each row so that its entry of largest magnitude is positive."""
    top = rows.gather(-1, rows.abs().argmax(-1, keepdim=True))
    return rows * torch.where(top < 0, -1.0, 1.0).to(rows.dtype)


def gradient_shares(root: Tensor) -> Tensor:
    """Relative mean squared derivative (D) by each feature; root (r, D) is that of an average outer product."""
    raw = (root / power_of_two(root, (0, 1))).square().sum(0)
    return shares(raw, "the output does not change with any feature")


def importance_from_precision(precision: Tensor, kind: Literal["official", "trace"] = "official") -> Tensor:
    """Relative importance of each feature under a metric P (..., D, D); sums to 1 for each metric.

    `"official"` is the paper's sum_k gamma_k |v_jk| over the eigenpairs of P, which is not unique if eigenvalues
    coincide; `"trace"` is diag(P) / tr P = sum_k gamma_k v_jk^2 / sum_k gamma_k, which is unique.
    If P = 0 the importances are uniform, with a warning.
    """
    _check_kind(kind)
    if kind == "official":
        values, components = eigen(precision)
        raw = (values.unsqueeze(-1) * components.abs()).sum(-2)
    else:
        raw = precision.diagonal(dim1=-2, dim2=-1)
    return shares(raw, "the precision matrix is zero")


def _check_kind(kind: str) -> None:
    if kind not in ("official", "trace"):
        raise ValueError(f"importance kind={kind!r} is not one of 'official', 'trace'")


def shares(raw: Tensor, why: str) -> Tensor:
    """Non-negative numbers (..., D) divided by their sum; equal shares, with a warning, if all are zero."""
    total = raw.sum(-1, keepdim=True)
    if bool((total <= 0).any()):
        warnings.warn(f"{why}: every feature gets the same importance", RuntimeWarning, stacklevel=3)
    return torch.where(total > 0, raw / total.clamp_min(torch.finfo(raw.dtype).tiny), 1.0 / raw.shape[-1])


class Readout(nn.Linear):
    """Linear outputs in the units of the targets: (W phi + b) * scale + mean; scale and mean are buffers."""

    scale: Tensor
    mean: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.register_buffer("scale", torch.ones(out_features, device=device, dtype=dtype))
        self.register_buffer("mean", torch.zeros(out_features, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Activations (..., M) to outputs (..., K)."""
        return self.mean + F.linear(x, self.weight, self.bias) * self.scale


# ---- the network -------------------------------------------------------------------------------------------


class GaussianRBFNetwork(nn.Module):
    """M Gaussian units with one shared, learnable precision matrix, and a linear readout.

    Inputs are table rows (B, in_chans), or images (B, in_chans, H, W), which are flattened. Centres are initially
    standard normal, suitable for standardised inputs; :meth:`initialize` places them in the data.

    Args:
        in_chans: Features of a row, or channels of an image.
        num_classes: Outputs: classes, or 1 for regression or a single binary logit; 0 returns the unit activations.
        n_centers: Number of units M.
        img_size: Side or (height, width) of image inputs; 1 for tables.
        precision: `"full"` (a packed lower triangle), `"diag"` (one scale per feature), `"isotropic"` (one scale), or
            the rank of a D x rank factor, recommended above a few hundred features.
        learn_centers: Train the centres; otherwise they are a buffer.
        bias: Whether the readout has an intercept; the authors' networks have none.
        reg_precision: Weight of the penalty on L, the most important one.
        reg_weights: Weight of the penalty on the output weights.
        reg_centers: Weight of the penalty on the centres, if they are trained.
        penalty: `"squared"` norms, or the authors' `"plain"` norms.
        global_pool: Only "" is accepted, there is nothing to pool.
        device: Device of the parameters.
        dtype: Their dtype.

    Attributes:
        dim: Number of features D after flattening.
        input_mean: Subtracted from the inputs (D); 0 before :meth:`initialize`.
        input_scale: Divisor of the inputs (D); 1 before :meth:`initialize`.
    """

    centers: Tensor
    input_mean: Tensor
    input_scale: Tensor

    def __init__(
        self,
        in_chans: PositiveInt = 16,
        num_classes: Annotated[int, Ge(0)] = 10,
        n_centers: PositiveInt = 32,
        *,
        img_size: PositiveInt | tuple[PositiveInt, PositiveInt] = 1,
        precision: Precision = "full",
        learn_centers: bool = True,
        bias: bool = True,
        reg_precision: NonNegative = 0.01,
        reg_weights: NonNegative = 1e-4,
        reg_centers: NonNegative = 0.0,
        penalty: Penalty = "squared",
        global_pool: str = "",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_chans, self.num_classes, self.dim = in_chans, num_classes, in_chans * height * width
        self.num_features = self.head_hidden_size = n_centers
        self.form, self.rank = _form_of(precision, self.dim)
        self.bias, self.learn_centers, self.penalty = bias, learn_centers, penalty
        self.reg_precision, self.reg_weights, self.reg_centers = reg_precision, reg_weights, reg_centers
        self.feature_info = [{"num_chs": n_centers, "reduction": 1, "module": "head"}]
        if global_pool:
            raise ValueError(f"global_pool={global_pool!r}: the units have no positions to pool; leave it empty")
        if penalty not in ("squared", "plain"):
            raise ValueError(f"penalty={penalty!r} is not one of 'squared', 'plain'")

        self.register_buffer("input_mean", torch.zeros(self.dim, **dd))
        self.register_buffer("input_scale", torch.ones(self.dim, **dd))
        centers = torch.empty(n_centers, self.dim, **dd)
        if learn_centers:
            self.centers = nn.Parameter(centers)
        else:
            self.register_buffer("centers", centers)
        size = {"full": (self.dim * (self.dim + 1) // 2,), "low_rank": (self.dim, self.rank)}
        size |= {"diag": (self.dim,), "isotropic": (1,)}
        self.precision_elements = nn.Parameter(torch.empty(size[self.form], **dd))  # diag, isotropic: log-scales
        self.head: nn.Module = self._new_head(num_classes, **dd)
        self.init_weights()

    def _new_head(self, num_classes: int, **dd: Any) -> nn.Module:
        return Readout(self.num_features, num_classes, self.bias, **dd) if num_classes else nn.Identity()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Standard normal centres, a metric with median activation of about e^-1/2, and a small readout."""
        nn.init.normal_(self.centers, generator=generator)
        self._init_metric(1 / math.sqrt(2 * self.dim), generator)  # the mean squared distance of normal points is 2 D
        self._init_head(generator)

    def _init_head(self, generator: torch.Generator | None) -> None:
        if isinstance(self.head, Readout):
            if generator is None:
                nn.init.normal_(self.head.weight, std=0.1)
            else:  # the generator may be on another device
                with torch.no_grad():
                    self.head.weight.copy_(_normal_like(self.head.weight, generator, std=0.1))
            if self.head.bias is not None:
                nn.init.zeros_(self.head.bias)

    @torch.no_grad()
    def _init_metric(self, scale: float, generator: torch.Generator | None) -> None:
        """L = scale (I + 0.05 T / sqrt(D)), T standard normal; low rank: a random orthogonal frame, same trace."""
        elements, D = self.precision_elements, self.dim
        if elements.is_meta:
            return
        if self.form in ("diag", "isotropic"):
            elements.fill_(math.log(scale))
            return
        noise = torch.empty(elements.shape, dtype=elements.dtype).normal_(generator=generator)
        if self.form == "full":
            noise *= 0.05 / math.sqrt(D)
            diagonal = torch.arange(D)
            noise[diagonal * (diagonal + 3) // 2] += 1
        else:
            noise = torch.linalg.qr(noise.double()).Q.to(noise.dtype) * math.sqrt(D / self.rank)
        elements.copy_(scale * noise)

    # ---- initialisation from data --------------------------------------------------------------------------

    @torch.no_grad()
    def initialize(
        self,
        X: Tensor,
        y: Tensor | None = None,
        *,
        centers: Literal["kmeans", "random", "all"] | Tensor = "kmeans",
        init: Literal["median", "scale", "official"] | float = "median",
        standardize: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        """Initialise from a table: standardisation, centres, a metric that keeps units active, and the intercept.

        Args:
            X: Training rows (n, D) or images (n, C, H, W).
            y: Targets (n,): integer class indices set the intercepts to the log-odds; floating-point values for one
                output set mean and scale of the outputs; None changes neither.
            centers: `"kmeans"`, a `"random"` subset of the rows, `"all"` rows, or a tensor (M, D) in standardised
                units, which is copied.
            init: `"median"` scales the metric by the median squared distance between rows and centres; `"scale"` is the
                width of scikit-learn's `gamma="scale"`, narrower, for many centres; a positive number is the width of
                every unit in standardised units; `"official"` draws L and the weights from N(0, 1) as the authors do,
                where above some 13 features all units are inactive.
            standardize: Store the rows' mean and standard deviation; the scale of constant columns is 1.
            generator: Source of randomness.

        Raises:
            ValueError: There are fewer distinct rows than centres, or an option is unknown.
        """
        rows = X.reshape(len(X), -1).to(self.centers.device)
        _check_rows(rows.to(self.centers.dtype), self.dim)
        if standardize:
            mean, scale = standardisation(rows)
            self.input_mean.copy_(mean)
            self.input_scale.copy_(scale.clamp_min(torch.finfo(self.input_scale.dtype).tiny))
        rows = standardised(rows, self.input_mean, self.input_scale, self.centers.dtype)
        self.centers.copy_(choose_centers(rows, self.num_features, centers, generator))
        if init == "official":
            self.precision_elements.copy_(_normal_like(self.precision_elements, generator))
            if isinstance(self.head, Readout):
                self.head.weight.copy_(_normal_like(self.head.weight, generator))
        else:
            self._init_metric(starting_scale(rows, self.centers, init), generator)
            self._init_head(generator)
        if y is not None and isinstance(self.head, Readout):
            self._init_outputs(y)
        median = metric_gaussian(rows, self.centers, self.factor()).median()
        if median < DEAD:
            warnings.warn(
                f"the units are dead: their median activation is {float(median):.1e}, so the data has no gradient; "
                'use init="median"',
                RuntimeWarning,
                stacklevel=2,
            )

    def _init_outputs(self, y: Tensor) -> None:
        """Scale of regression targets, or intercepts from the classes' log-odds."""
        head = self.head
        assert isinstance(head, Readout)
        if y.is_floating_point() and self.num_classes == 1:
            mean, scale = standardisation(y.reshape(-1, 1).to(head.weight.device))
            head.scale.copy_(scale.clamp_min(torch.finfo(head.scale.dtype).tiny))
            head.mean.copy_(mean if self.bias else torch.zeros_like(mean))
        elif head.bias is not None:
            head.bias.copy_(starting_bias(y, self.num_classes, head.bias))

    # ---- forward ------------------------------------------------------------------------------------------

    def forward_features(self, x: Tensor) -> Tensor:
        """Unit activations phi (B, M) of rows (B, D) or images (B, C, H, W)."""
        return units(x, self.centers, self.precision_elements, self.input_mean, self.input_scale, self.form)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Activations (B, M) to outputs (B, num_classes); with `pre_logits` the activations themselves."""
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Rows (B, D) or images (B, C, H, W) to outputs (B, num_classes): logits or values, not probabilities."""
        return self.forward_head(self.forward_features(x))

    def factor(self) -> Tensor:
        """L (D, R) with P = L L^T; for diagonal and isotropic metrics its diagonal, (1, D) or (1, 1)."""
        return factor_of(self.precision_elements, self.dim, self.form)

    def precision(self) -> Tensor:
        """P (D, D), for standardised features."""
        L = self.factor()
        if L.shape[-2] == 1:
            return torch.diag(L.square().expand(1, self.dim).squeeze(0))
        return L @ L.mT

    # ---- training -----------------------------------------------------------------------------------------

    def penalties(self, kind: Penalty | None = None) -> dict[str, Tensor]:
        """The weighted penalty of each block with positive weight; `kind` overrides the model's own."""
        # the norm of a packed triangle is that of the matrix
        L = self.precision_elements if self.form == "full" else self.factor()
        blocks = {"precision": (self.reg_precision, L.expand(1, self.dim) if self.form == "isotropic" else L)}
        if isinstance(self.head, Readout):
            blocks["weights"] = (self.reg_weights, self.head.weight)
        if self.learn_centers:
            blocks["centers"] = (self.reg_centers, self.centers)
        kind = kind or self.penalty
        return {name: weight * penalty_term(block, kind) for name, (weight, block) in blocks.items() if weight}

    def aux_losses(self) -> dict[str, Tensor]:
        """The weighted penalties, for tasks that add them to the loss."""
        return {f"{name}_penalty": value for name, value in self.penalties().items()}

    def no_weight_decay(self) -> set[str]:
        """All parameters: the penalties are the only regularisation."""
        return {"precision_elements", "centers", "head.weight", "head.bias"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Two parameter groups: the units, then the readout."""
        return {"stem": r"^precision_elements|^centers|^input_", "blocks": [(r"^head", (0,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Not supported: there is nothing to recompute in a network of one layer."""
        assert not enable, "a network of one layer has no blocks to checkpoint"

    def get_classifier(self) -> nn.Module:
        """The readout."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the readout by a new one; none for 0 outputs."""
        if global_pool:
            raise ValueError(f"global_pool={global_pool!r}: the units have no positions to pool; leave it empty")
        training, self.num_classes = self.head.training, num_classes
        self.head = self._new_head(num_classes, device=self.centers.device, dtype=self.centers.dtype)
        self._init_head(None)
        self.head.train(training)

    # ---- interpretation ----------------------------------------------------------------------------------

    @torch.no_grad()
    def spectrum(self) -> Spectrum:
        """Active subspace: eigenvalues of P (D), descending, and its unit eigenvectors as rows.

        A metric of rank R has R eigenvectors (R, D), others D. Only a full metric needs an eigendecomposition.
        """
        if self.form == "full":
            return eigen(self.precision())
        L = self.factor()
        if self.form == "low_rank":
            return eigen_of_root(L.mT)
        values, order = L.square().expand(1, self.dim).squeeze(0).sort(stable=True)
        return Spectrum(values.flip(0), torch.eye(self.dim, dtype=L.dtype, device=L.device)[order.flip(0)])

    @torch.no_grad()
    def input_gradients(self, X: Tensor) -> Tensor:
        """Exact derivatives of every output with respect to every standardised feature, (n, K, D).

        df_k/dx = -P sum_m w_km phi_m (x - c_m), by matrix products only.
        """
        return point_gradient(self._coordinate_gradients(X), self.factor())

    def _coordinate_gradients(self, X: Tensor) -> Tensor:
        """Derivatives of every output in the coordinates of the metric, (n, K, R)."""
        assert isinstance(self.head, Readout), "a network without outputs has no gradients"
        rows = standardised(X.reshape(len(X), -1), self.input_mean, self.input_scale, self.centers.dtype)
        L, C = self.factor(), self.centers
        readout = self.head.weight * self.head.scale.to(C.dtype).unsqueeze(-1)
        weighted = metric_gaussian(rows, C, L).unsqueeze(1) * readout  # (n, K, M)
        return weighted @ project(C, L) - weighted.sum(-1, keepdim=True) * project(rows, L).unsqueeze(1)

    @torch.no_grad()
    def gradient_outer_product(self, X: Tensor, per_output: bool = False) -> Tensor:
        """Average of grad f grad f^T over rows, summed over outputs unless `per_output`: (D, D) or (K, D, D)."""
        if not per_output:
            root = self.gradient_root(X)
            return root.mT @ root
        g = _centre_outputs(self.input_gradients(X))
        return torch.einsum("nkd,nke->kde", g, g) / len(g)

    @torch.no_grad()
    def gradient_root(self, X: Tensor) -> Tensor:
        """A matrix (r, D) with :meth:`gradient_outer_product` = root^T root; r is at most the rank of P.

        Its size is linear in the number of features for low-rank metrics, and for others if there are few rows.
        """
        h = _centre_outputs(self._coordinate_gradients(X)).flatten(0, 1) / math.sqrt(len(X))  # (n K, R)
        if len(h) > h.shape[1]:
            unit = power_of_two(h, (0, 1))
            values, vectors = eigen((h / unit).mT @ (h / unit))
            h = unit * values.sqrt().unsqueeze(-1) * vectors
        return point_gradient(h, self.factor())

    @torch.no_grad()
    def feature_importance(
        self, kind: Literal["official", "trace", "gradient"] = "official", X: Tensor | None = None
    ) -> Tensor:
        """Relative importance of each (standardised) feature (D), summing to 1.

        Args:
            kind: `"official"`, the paper's sum_k gamma_k |v_jk|; `"trace"`, diag(P) / tr P; `"gradient"`, the mean
                squared derivative of the outputs over the rows X, the only one that also depends on centres, weights
                and data.
            X: Rows for `"gradient"`.

        Raises:
            ValueError: The kind is unknown, or `"gradient"` without rows.
        """
        if kind == "gradient":
            if X is None:
                raise ValueError('kind="gradient" averages over rows: pass X')
            return gradient_shares(self.gradient_root(X))
        _check_kind(kind)
        L = self.factor()
        if kind == "official" and self.form in ("full", "low_rank"):
            values, components = self.spectrum()
            raw = (values[: len(components)].unsqueeze(-1) * components.abs()).sum(0)
        else:  # the other forms are diagonal
            raw = (L.square().expand(1, self.dim) if L.shape[-2] == 1 else L.square().mT).sum(0)
        return shares(raw, "the precision matrix is zero")

    @torch.no_grad()
    def active_subspace(
        self, kind: Literal["precision", "gradient"] = "precision", X: Tensor | None = None
    ) -> Spectrum:
        """Important directions, in descending order: eigenpairs of P or of the average gradient outer product.

        Eigenvalues (D), and unit vectors as rows (D, D), or (R, D) for a metric of rank R.
        """
        if kind == "precision":
            return self.spectrum()
        if kind != "gradient":
            raise ValueError(f"kind={kind!r} is not one of 'precision', 'gradient'")
        if X is None:
            raise ValueError('kind="gradient" averages over rows: pass X')
        return eigen_of_root(self.gradient_root(X), complete=self.form != "low_rank")

    # ---- authors' checkpoints -------------------------------------------------------------------------------

    @classmethod
    def from_authors(
        cls, state_dict: Mapping[str, Tensor], centers: Tensor | None = None, **kwargs: Any
    ) -> "GaussianRBFNetwork":
        """A network from a `state_dict` of the authors' 2024 modules.

        Args:
            state_dict: `precision_elements`, `weights` and, if trained, `centers`.
            centers: Fixed centres (M, D), which the authors' files do not contain.
            **kwargs: Further arguments of the constructor (`reg_precision`, `penalty="plain"`, ...).

        Raises:
            ValueError: There are no centres in either place.
        """
        fixed = "centers" not in state_dict
        if fixed and centers is None:
            raise ValueError(
                "the file has no centers: they were fixed, and its authors do not save those; pass centers="
            )
        state: dict[str, Any] = {**state_dict, **({"centers": centers} if fixed else {})}
        M, D = state["centers"].shape
        outputs = 1 if state["weights"].ndim == 1 else state["weights"].shape[1]
        with torch.random.fork_rng(devices=[]):  # all parameters are overwritten
            network = cls(D, outputs, M, learn_centers=not fixed, bias=False, dtype=state["weights"].dtype, **kwargs)
        network.load_state_dict(state)
        return network

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Also accept the authors' names: `weights` (M,) or (M, K) is the readout, without scale and shift."""
        weights = state_dict.pop(f"{prefix}weights", None)
        if weights is not None:
            state_dict[f"{prefix}head.weight"] = weights.reshape(len(weights), -1).mT
            neutral = {"input_mean": torch.zeros(self.dim), "input_scale": torch.ones(self.dim)}
            neutral |= {"head.mean": torch.zeros(self.num_classes), "head.scale": torch.ones(self.num_classes)}
            if getattr(self.head, "bias", None) is not None:
                neutral["head.bias"] = torch.zeros(self.num_classes)
            for name, value in neutral.items():
                state_dict.setdefault(f"{prefix}{name}", value)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _centre_outputs(gradients: Tensor) -> Tensor:
    """Derivatives (n, K, ...) minus their mean over logits, which does not affect decisions."""
    return gradients - gradients.mean(1, keepdim=True) if gradients.shape[1] > 1 else gradients


def _form_of(precision: Precision, dim: int) -> tuple[str, int]:
    """Form and rank of a metric."""
    if isinstance(precision, int) and not isinstance(precision, bool):
        if not 1 <= precision <= dim:
            raise ValueError(f"precision={precision} is a rank; with {dim} features it lies between 1 and {dim}")
        return "low_rank", precision
    if precision not in ("full", "diag", "isotropic"):
        raise ValueError(f"precision={precision!r} is not 'full', 'diag', 'isotropic' or a rank")
    return precision, dim


@register_notrace_function
def units(x: Tensor, centers: Tensor, elements: Tensor, mean: Tensor, scale: Tensor, form: str) -> Tensor:
    """Activations (B, M) of raw inputs (B, ...), in the dtype of the centres.

    Half precision cannot represent squared distances, so they are computed in at least float32, also under autocast.
    """
    dim = centers.shape[1]
    rows = x.flatten(1) if x.dim() > 1 else x
    if x.dim() < 2 or rows.shape[1] != dim:
        raise ValueError(f"expected a batch of rows of {dim} features (or images of as many values), got {x.shape}")
    own = centers.dtype
    wide = torch.float32 if own == torch.float16 or own == torch.bfloat16 else own
    rows = standardised(rows, mean, scale, wide)
    return metric_gaussian(rows, centers.to(wide), factor_of(elements.to(wide), dim, form)).to(own)


def _check_rows(rows: Tensor, dim: int) -> None:
    if rows.shape[1] != dim:
        raise ValueError(
            f"the rows have {rows.shape[1]} features, the model {dim}: build it with in_chans={rows.shape[1]}"
        )
    if not bool(torch.isfinite(rows).all()):
        raise ValueError("Input X contains NaN or infinity.")


def _normal_like(like: Tensor, generator: torch.Generator | None, std: float = 1.0) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype).normal_(std=std, generator=generator)


def choose_centers(rows: Tensor, count: int, how: str | Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Choose centres (M, D) for standardised rows (n, D): k-means, a random subset of the distinct rows, or given."""
    if isinstance(how, Tensor):
        if how.shape != (count, rows.shape[1]):
            raise ValueError(f"centers have shape {tuple(how.shape)}; expected ({count}, {rows.shape[1]})")
        return how.to(rows).clone()
    if how == "all":
        if len(rows) != count:
            raise ValueError(f'centers="all" needs n_centers={len(rows)}, one per row; it is {count}')
        return rows.clone()
    if how not in ("kmeans", "random"):
        raise ValueError(f"centers={how!r} is not 'kmeans', 'random', 'all' or a tensor")
    distinct = torch.unique(rows, dim=0) if how == "kmeans" else rows[first_of_each(rows)]
    if len(distinct) < count:
        raise ValueError(f"n_centers={count} is more than the {len(distinct)} distinct rows; use fewer centres")
    if how == "random" or len(distinct) == count:
        order = torch.randperm(len(distinct), generator=generator)[:count]
        return distinct[order.to(distinct.device)]
    state = random.getstate()  # the first import of this module uses random numbers
    from sklearn.cluster import KMeans

    random.setstate(state)
    seed = int(torch.randint(2**31 - 1, (1,), generator=generator))
    found = KMeans(count, n_init=1, random_state=seed).fit(rows.detach().cpu().numpy())
    return torch.from_numpy(found.cluster_centers_).to(rows)


def first_of_each(rows: Tensor) -> Tensor:
    """Index of the first copy of every distinct row, in order of appearance."""
    _, inverse = torch.unique(rows, dim=0, return_inverse=True)
    first = torch.full((int(inverse.max()) + 1,), len(rows), device=rows.device)
    first.scatter_reduce_(0, inverse, torch.arange(len(rows), device=rows.device), "amin")
    return first.sort().values


def starting_scale(rows: Tensor, centers: Tensor, init: str | float) -> float:
    """Scale s of the initial metric s^2 I: from a width, or such that the median activation is e^-1/2."""
    if isinstance(init, int | float):
        if not init > 0:
            raise ValueError(f"init={init} is a width and must be positive")
        return 1.0 / init
    if init == "scale":
        return math.sqrt(2 / (rows.shape[1] * max(float(rows.var(correction=0)), 1e-12)))
    if init != "median":
        raise ValueError(f"init={init!r} is not 'median', 'scale', 'official' or a width")
    sample = rows[:: max(1, len(rows) // 2000)]  # two thousand rows suffice for the median
    q = (sample.unsqueeze(1) - centers).square().sum(-1) if sample.numel() * len(centers) < 2**22 else (
        torch.cdist(sample, centers).square())  # fmt: skip
    median = float(q.median())
    return 1.0 / math.sqrt(median) if median > 0 else 1.0


def starting_bias(y: Tensor, outputs: int, like: Tensor) -> Tensor:
    """Intercepts (K) from class indices: centred log priors, or the log-odds for one output."""
    if outputs == 1:
        return torch.logit(y.to(like).mean().clamp(1e-3, 1 - 1e-3)).reshape(1)
    counts = torch.bincount(y.long().flatten(), minlength=outputs).to(like) + 0.5
    prior = (counts / counts.sum()).log()
    return prior - prior.mean()


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
        "paper_ids": "arXiv:2307.05639",
        "paper_name": "Learning Active Subspaces and Discovering Important Features with Gaussian Radial Basis "
        "Functions Neural Networks",
        **kwargs,
    }


default_cfgs = generate_default_cfgs({name: _cfg() for name in ("grbf", "grbf_diag", "grbf_rank8", "test_grbf")})


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], **defaults: Any) -> GaussianRBFNetwork:
    return build_model_with_cfg(GaussianRBFNetwork, variant, pretrained, **{**defaults, **kwargs})


@register_model
def grbf(pretrained: bool = False, **kwargs: Any) -> GaussianRBFNetwork:
    """GRBF with a full precision matrix and 32 trained centres."""
    return _create("grbf", pretrained, kwargs)


@register_model
def grbf_diag(pretrained: bool = False, **kwargs: Any) -> GaussianRBFNetwork:
    """GRBF with one width per feature (automatic relevance determination)."""
    return _create("grbf_diag", pretrained, kwargs, precision="diag")


@register_model
def grbf_rank8(pretrained: bool = False, **kwargs: Any) -> GaussianRBFNetwork:
    """GRBF with a precision matrix of rank 8, for hundreds of features."""
    return _create("grbf_rank8", pretrained, kwargs, precision=8)


@register_model
def test_grbf(pretrained: bool = False, **kwargs: Any) -> GaussianRBFNetwork:  # noqa: PT028
    """GRBF with 4 centres, for tests."""
    return _create("test_grbf", pretrained, kwargs, n_centers=4)


def __getattr__(name: str) -> Any:
    return renamed(f"{__name__}.{name}")
