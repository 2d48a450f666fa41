r"""Kernels of infinitely wide networks: covariance of a random network (NNGP) and neural tangent kernel (NTK).

A network is a list of layers; every linear layer computes sqrt(gain / fan_in) W x + bias b with W, b ~ N(0, 1):

>>> kernel = InfiniteNetwork([Dense(2.0), "relu", Dense(2.0)])                     # two-layer ReLU, NTK
>>> K = kernel(X, Z)                                                              # (n, m)
>>> conv = [Conv(3), "relu", GlobalAvgPool(), Dense()]
>>> kernel = InfiniteNetwork(conv, kind="nngp", shape=(3, 32, 32))                # points are flattened images
>>> InfiniteNetwork(read_layers(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1))))

With the covariance S and the NTK T of a layer's input (initially S = x.x'/d, T = 0):

    linear        S' = gain S + bias^2,      T' = S' + gain T
    activation f  S' = E[f(u) f(v)],         T' = T E[f'(u) f'(v)],      (u, v) ~ N(0, [[S_xx, S], [S, S_x'x']])
    convolution   the linear rule on means over the filter window;  residual: the sum of both sides

Sources: Jacot, Gabriel and Hongler, "Neural tangent kernel" (NeurIPS 2018); Lee et al., "Deep neural networks as
Gaussian processes" (ICLR 2018); Arora et al., "On exact computation with an infinitely wide neural net" (NeurIPS 2019)
for convolutions; Cagnetta, Favero and Wyart, "What can be learnt with wide convolutional neural networks?" (ICML 2023)
for :class:`Hierarchical`. The conventions are those of neural-tangents (`W_std^2` = gain, `b_std` = bias).

Everything is computed in float64: for nearly equal points an arc cosine turns a rounding error e into sqrt(e).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels.kernel import Kernel, _check
from zoo.kernels.linalg import solver_dtype
from zoo.support.suggest import suggestion

__all__ = [
    "DUALS",
    "Activation",
    "AvgPool",
    "Conv",
    "Dense",
    "Flatten",
    "GlobalAvgPool",
    "Hierarchical",
    "InfiniteNetwork",
    "Kernels",
    "Residual",
    "arc_cosines",
    "dual_activation",
    "read_layers",
]

Kind = Literal["ntk", "nngp"]
Padding = int | tuple[tuple[int, int], tuple[int, int]]


class Kernels(NamedTuple):
    """Both kernels of a network: covariance of its outputs, and neural tangent kernel."""

    nngp: Tensor
    ntk: Tensor


# ---- activations -------------------------------------------------------------------------------------------


def arc_cosines(u: Tensor) -> tuple[Tensor, Tensor]:
    """Arc-cosine kernels of order one and zero for a cosine u, both 1 at u = 1.

    (sqrt(1 - u^2) + (pi - arccos u) u) / pi and (pi - arccos u) / pi. Within rounding of 1, u is treated as 1; there
    the derivative of the first is 1, and that of the second, which is infinite, is set to zero.
    """
    one = u.detach() >= 1 - 8 * torch.finfo(u.dtype).eps
    inner = torch.where(one, 0.0, u.clamp(-1, 1))
    opposite = inner.detach() <= -1
    angle = math.pi - torch.acos(torch.where(opposite, 0.0, inner))
    root = (1 - torch.where(opposite, 0.0, inner).square()).sqrt()
    first, zeroth = (root + angle * inner) / math.pi, angle / math.pi
    first, zeroth = torch.where(opposite, 0.0, first), torch.where(opposite, 0.0, zeroth)
    return torch.where(one, 1 + u - u.detach(), first), torch.where(one, 1.0, zeroth)


def _cosine(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(a b) and the cosine c / sqrt(a b), 0 where a variance is 0."""
    product = a * b
    some = product.detach() > 0
    scale = torch.where(some, torch.where(some, product, 1.0).sqrt(), 0.0)
    return scale, torch.where(some, c / torch.where(some, scale, 1.0), 0.0)


def _leaky(slope: float) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """max(x, 0) + slope min(x, 0) = (1 - slope) relu(x) + slope x; slope -1 is |x|."""

    def dual(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        scale, u = _cosine(a, b, c)
        first, zeroth = arc_cosines(u)
        share = (1 - slope) ** 2 / 2
        return share * scale * first + slope * c, share * zeroth + slope

    return dual


def _erf(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    product = (1 + 2 * a) * (1 + 2 * b)
    value = 2 / math.pi * torch.asin(2 * c / product.sqrt())
    return value, 4 / math.pi / (product - 4 * c.square()).sqrt()


def _sine(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    plus, minus = torch.exp(c - (a + b) / 2), torch.exp(-c - (a + b) / 2)
    return (plus - minus) / 2, (plus + minus) / 2


def _gelu(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """X Phi(x): Stein's lemma leaves p = E[Phi Phi] and q = E[phi phi], of the normal cdf and density."""
    product = (1 + a) * (1 + b)
    determinant = product - c.square()
    p = 0.25 + torch.asin(c / product.sqrt()) / (2 * math.pi)
    q = 1 / (2 * math.pi * determinant.sqrt())
    shares = 1 / (1 + a) + 1 / (1 + b)
    value = c * p + q * (a * b - c.square() + c.square() * shares)
    return value, p + q * c * (shares + 1 / determinant)


def _identity(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return c, torch.ones_like(c)


#: Activations by name: functions of both variances and the covariance that return E[f f] and E[f' f'].
DUALS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "relu": _leaky(0.0),
    "abs": _leaky(-1.0),
    "erf": _erf,
    "sin": _sine,
    "cos": lambda a, b, c: _sine(a, b, c)[::-1],
    "gelu": _gelu,
    "identity": _identity,
}


def dual_activation(name: str, a: Tensor, b: Tensor, c: Tensor, *, slope: float = 0.01) -> tuple[Tensor, Tensor]:
    """E[f(u) f(v)] and E[f'(u) f'(v)] for (u, v) normal with variances a, b and covariance c.

    Args:
        name: relu, leaky_relu, abs, erf, sin, cos, gelu (exact, with the normal cdf) or identity.
        a: Variances of u; all three broadcast.
        b: Variances of v.
        c: Covariances.
        slope: Negative slope of leaky_relu.

    Raises:
        ValueError: The activation is unknown.
    """
    if name == "leaky_relu":
        return _leaky(slope)(a, b, c)
    if name not in DUALS:
        raise ValueError(f"activation {name!r} has no kernel{suggestion(name, [*DUALS, 'leaky_relu'])}")
    return DUALS[name](a, b, c)


# ---- layers ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dense:
    """A fully connected layer: sqrt(gain / fan_in) W x + bias b.

    Args:
        gain: Variance factor of the weights; 2 keeps the variance of ReLU networks.
        bias: Standard deviation of the biases.
    """

    gain: float = 2.0
    bias: float = 0.0


@dataclass(frozen=True)
class Conv:
    """A convolution, zero-padded: fan_in is the number of entries of a filter.

    Args:
        kernel_size: An integer, or (height, width).
        stride: An integer, or (vertical, horizontal).
        padding: An integer, or ((top, bottom), (left, right)). TensorFlow's SAME for even sizes and stride 2 is
            ((0, 1), (0, 1)).
        gain: Variance factor of the weights.
        bias: Standard deviation of the biases.
    """

    kernel_size: int | tuple[int, int] = 3
    stride: int | tuple[int, int] = 1
    padding: Padding = 0
    gain: float = 2.0
    bias: float = 0.0


@dataclass(frozen=True)
class Activation:
    """An elementwise function by name, see :func:`dual_activation`; in a list of layers, the name suffices."""

    name: str = "relu"
    slope: float = 0.01


@dataclass(frozen=True)
class AvgPool:
    """Mean over square windows, without padding."""

    window: int = 2
    stride: int | None = None


@dataclass(frozen=True)
class Flatten:
    """Pixels become features; for the kernel, the mean over pairs of equal pixels."""


@dataclass(frozen=True)
class GlobalAvgPool:
    """Mean over all pixels; for the kernel, the mean over all pairs of pixels."""


@dataclass(frozen=True)
class Residual:
    """The sum of a branch and a shortcut; an empty shortcut is the identity."""

    branch: tuple[Layer, ...]
    shortcut: tuple[Layer, ...] = ()

    def __init__(self, branch: Iterable[Layer | str], shortcut: Iterable[Layer | str] = ()) -> None:
        object.__setattr__(self, "branch", _checked(branch))
        object.__setattr__(self, "shortcut", _checked(shortcut))


Layer = Dense | Conv | Activation | AvgPool | Flatten | GlobalAvgPool | Residual


def _checked(layers: Iterable[Layer | str]) -> tuple[Layer, ...]:
    """Validated layers, with names replaced by activations."""
    found: list[Layer] = []
    for i, layer in enumerate(layers):
        layer = Activation(layer) if isinstance(layer, str) else layer
        if not isinstance(layer, get_args(Layer)):
            raise ValueError(f"layer {i} is a {type(layer).__name__}; layers are {_names()}")
        if isinstance(layer, Activation) and layer.name != "leaky_relu":
            dual_activation(layer.name, *torch.ones(3, dtype=torch.float64, device="cpu"))
        if isinstance(layer, Dense | Conv) and not (0 < layer.gain < math.inf and 0 <= layer.bias < math.inf):
            raise ValueError(f"layer {i}: gain={layer.gain} must be positive and bias={layer.bias} not negative")
        if isinstance(layer, Conv) and min(*_pair(layer.kernel_size), *_pair(layer.stride), 1 + _least(layer)) < 1:
            raise ValueError(f"layer {i}: {layer} needs sizes and strides of 1 at least and paddings of 0 at least")
        if isinstance(layer, AvgPool) and min(layer.window, layer.window if layer.stride is None else layer.stride) < 1:
            raise ValueError(f"layer {i}: {layer} needs a window and a stride of 1 at least")
        found.append(layer)
    return tuple(found)


def _names() -> str:
    return ", ".join(kind.__name__ for kind in get_args(Layer)) + " or the name of an activation"


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _pads(layer: Conv) -> tuple[tuple[int, int], tuple[int, int]]:
    p = layer.padding
    return ((p, p), (p, p)) if isinstance(p, int) else p


def _least(layer: Conv) -> int:
    return min(n for side in _pads(layer) for n in side)


def _outputs(size: int, window: int, stride: int, pad: tuple[int, int], what: str) -> int:
    if size + sum(pad) < window:
        raise ValueError(f"{what}: a window of {window} does not fit into {size + sum(pad)} pixels")
    return (size + sum(pad) - window) // stride + 1


Space = tuple[int, int] | None


def _space_after(layers: Sequence[Layer], space: Space) -> Space:
    """Height and width after some layers, None for vectors.

    Raises:
        ValueError: A layer does not fit its input.
    """
    for layer in layers:
        what = type(layer).__name__
        if isinstance(layer, Conv | AvgPool | GlobalAvgPool) and space is None:
            raise ValueError(f"{what} needs images: pass shape=(channels, height, width), and flatten only after it")
        if isinstance(layer, Dense) and space is not None:
            raise ValueError("Dense gets an image: put Flatten() or GlobalAvgPool() before it")
        if isinstance(layer, Conv):
            assert space is not None
            sizes = zip(space, _pair(layer.kernel_size), _pair(layer.stride), _pads(layer), strict=True)
            height, width = (_outputs(*numbers, what) for numbers in sizes)
            space = height, width
        elif isinstance(layer, AvgPool):
            assert space is not None
            stride = layer.window if layer.stride is None else layer.stride
            height, width = (_outputs(size, layer.window, stride, (0, 0), what) for size in space)
            space = height, width
        elif isinstance(layer, Flatten | GlobalAvgPool):
            space = None
        elif isinstance(layer, Residual):
            branch, shortcut = _space_after(layer.branch, space), _space_after(layer.shortcut, space)
            if branch != shortcut:
                raise ValueError(f"the branch of a Residual ends with pixels {branch}, its shortcut with {shortcut}")
            space = branch
    return space


def _pools(layers: Sequence[Layer]) -> bool:
    """Whether covariances between different pixels are needed."""
    return any(
        isinstance(layer, AvgPool | GlobalAvgPool)
        or (isinstance(layer, Residual) and (_pools(layer.branch) or _pools(layer.shortcut)))
        for layer in layers
    )


# ---- propagation through the layers -------------------------------------------------------------------------


class _Pairs(NamedTuple):
    """Covariances and NTK (None: not needed) of pairs of points: (...), (..., H, W) or (..., H, W, H', W').

    `sides` is the number of pairs of pixel axes: 0, 1 (equal pixels only) or 2.
    """

    cov: Tensor
    ntk: Tensor | None
    sides: int

    def map(self, function: Callable[[Tensor], Tensor], sides: int | None = None) -> _Pairs:
        ntk = None if self.ntk is None else function(self.ntk)
        return _Pairs(function(self.cov), ntk, self.sides if sides is None else sides)


class _Variances:
    """Variances of single points before each activation, in order of computation.

    A pass over pairs (x, x) stores them; a pass over pairs (x, z) reads those of x and of z.
    """

    def __init__(self, left: Iterator[Tensor] | None = None, right: Iterator[Tensor] | None = None) -> None:
        self.left, self.right = left, right
        self.found: list[Tensor] = []

    def of(self, pairs: _Pairs) -> tuple[Tensor, Tensor]:
        if self.left is None or self.right is None:
            own = pairs.cov
            if pairs.sides == 2:  # (n, H, W, H, W) -> (n, H, W)
                own = own.flatten(-4, -3).flatten(-2, -1).diagonal(dim1=-2, dim2=-1).reshape(own.shape[:-2])
            self.found.append(own)
            left = right = own
        else:
            left, right = next(self.left)[:, None], next(self.right)[None]
        if pairs.sides == 2:
            return left[..., None, None], right[..., None, None, :, :]
        return left, right


def _slide(t: Tensor, axes: Sequence[int], window: int, stride: int, pad: tuple[int, int]) -> Tensor:
    """Sum over a window that slides along several (negative) axes at once, with zero padding."""
    if any(pad):
        sides = [0] * (2 * max(-axis for axis in axes))
        for axis in axes:
            sides[2 * (-axis - 1)], sides[2 * (-axis - 1) + 1] = pad
        t = F.pad(t, sides)
    total: Tensor | None = None
    for offset in range(window):
        part = t
        for axis in axes:
            length = (t.shape[axis] - window) // stride * stride + 1
            part = part.narrow(axis, offset, length)
            if stride > 1:
                part = part[(..., slice(None, None, stride)) + (slice(None),) * (-axis - 1)]
        total = part if total is None else total + part
    assert total is not None
    return total


def _convolve(t: Tensor, layer: Conv, sides: int) -> Tensor:
    """Mean over the filter window, which moves over both pixels of a pair together."""
    kernel, stride, pads = _pair(layer.kernel_size), _pair(layer.stride), _pads(layer)
    for i in range(2):  # rows, columns
        axes = [i - 2 * (side + 1) for side in range(sides)]
        t = _slide(t, axes, kernel[i], stride[i], pads[i])
    return t / (kernel[0] * kernel[1])


def _pool(t: Tensor, layer: AvgPool) -> Tensor:
    stride = layer.window if layer.stride is None else layer.stride
    for axis in (-4, -3, -2, -1):
        t = _slide(t, [axis], layer.window, stride, (0, 0)) / layer.window
    return t


def _equal_pixels(t: Tensor) -> Tensor:
    return t.flatten(-4, -3).flatten(-2, -1).diagonal(dim1=-2, dim2=-1)


def _linear(pairs: _Pairs, layer: Dense | Conv) -> _Pairs:
    cov = layer.gain * pairs.cov + layer.bias**2
    return _Pairs(cov, None if pairs.ntk is None else cov + layer.gain * pairs.ntk, pairs.sides)


def _propagate(layers: Sequence[Layer], pairs: _Pairs, variances: _Variances) -> _Pairs:
    for layer in layers:
        if isinstance(layer, Dense):
            pairs = _linear(pairs, layer)
        elif isinstance(layer, Conv):
            pairs = _linear(pairs.map(functools.partial(_convolve, layer=layer, sides=pairs.sides)), layer)
        elif isinstance(layer, Activation):
            left, right = variances.of(pairs)
            cov, slopes = dual_activation(layer.name, left, right, pairs.cov, slope=layer.slope)
            pairs = _Pairs(cov, None if pairs.ntk is None else pairs.ntk * slopes, pairs.sides)
        elif isinstance(layer, AvgPool):
            pairs = pairs.map(functools.partial(_pool, layer=layer))
        elif isinstance(layer, GlobalAvgPool):
            pairs = pairs.map(lambda t: t.mean((-4, -3, -2, -1)), 0)
        elif isinstance(layer, Flatten):
            if pairs.sides:
                pairs = (pairs.map(_equal_pixels) if pairs.sides == 2 else pairs.map(lambda t: t.flatten(-2))).map(
                    lambda t: t.mean(-1), 0
                )
        else:
            branch, shortcut = _propagate(layer.branch, pairs, variances), _propagate(layer.shortcut, pairs, variances)
            assert branch.sides == shortcut.sides
            ntk = None if branch.ntk is None or shortcut.ntk is None else branch.ntk + shortcut.ntk
            pairs = _Pairs(branch.cov + shortcut.cov, ntk, branch.sides)
    return pairs


# ---- the kernel --------------------------------------------------------------------------------------------


class InfiniteNetwork(Kernel):
    """NTK or NNGP kernel of an infinitely wide network.

    Images are points too: (n, C * H * W), in the order of `images.flatten(1)`. Without pooling the cost is n m H W;
    average pooling, local or global, needs all pairs of pixels, n m (H W)^2.

    Args:
        layers: From input to output; names stand for activations.
        kind: The kernel returned by a call: `"ntk"` or `"nngp"` (see :meth:`both`).
        shape: (channels, height, width) of images; None for vectors.
        block: Elements of the largest intermediate result: larger matrices are computed in blocks.

    Raises:
        ValueError: A layer is unknown or does not fit its input, or the last layer returns an image.
    """

    def __init__(
        self,
        layers: Iterable[Layer | str],
        *,
        kind: Kind = "ntk",
        shape: tuple[int, int, int] | None = None,
        block: int = 2**24,
    ) -> None:
        super().__init__()
        if kind not in get_args(Kind):
            raise ValueError(f"kind={kind!r} is not one of 'ntk', 'nngp'")
        if block < 1 or (shape is not None and (len(shape) != 3 or min(shape) < 1)):
            raise ValueError(f"block={block} must be positive and shape={shape} be (channels, height, width) or None")
        self.layers, self.kind, self.block = _checked(layers), kind, block
        self.shape = None if shape is None else tuple(shape)
        self.full = _pools(self.layers)
        if _space_after(self.layers, None if shape is None else (shape[1], shape[2])) is not None:
            raise ValueError("the layers end with an image: put Flatten() or GlobalAvgPool() after them")

    def both(self, X: Tensor, Z: Tensor | None = None) -> Kernels:
        """NNGP and NTK matrices in one pass.

        Args:
            X: Points (..., n, D).
            Z: Points (..., m, D); X itself if None.

        Returns:
            Two matrices (..., n, m), in the inputs' dtype.
        """
        _check(X, Z)
        return Kernels(*self._computed(lambda x, z: torch.stack(self._grams(x, z, True)), X, Z))

    def _gram(self, X: Tensor, Z: Tensor | None) -> Tensor:
        return self._grams(X, Z, self.kind == "ntk")[-1]

    def _diag(self, X: Tensor) -> Tensor:
        points = self._points(X).flatten(0, -2)
        return self._single_points(points, self.kind == "ntk")[1][-1].reshape(X.shape[:-1]).to(X.dtype)

    def _points(self, X: Tensor) -> Tensor:
        """Points in the solvers' dtype, after a check of their size."""
        if self.shape is not None and X.shape[-1] != math.prod(self.shape):
            raise ValueError(
                f"the points have {X.shape[-1]} dimensions; images of shape {self.shape} have {math.prod(self.shape)}"
            )
        return X.to(solver_dtype(X.device))

    def _grams(self, X: Tensor, Z: Tensor | None, ntk: bool) -> list[Tensor]:
        """Covariance and, if requested, NTK (..., n, m)."""
        if X.ndim == 2 and (Z is None or Z.ndim == 2):
            return [t.to(X.dtype) for t in self._matrices(self._points(X), None if Z is None else self._points(Z), ntk)]
        lead = X.shape[:-2] if Z is None else torch.broadcast_shapes(X.shape[:-2], Z.shape[:-2])
        xs = X.expand(*lead, *X.shape[-2:]).reshape(-1, *X.shape[-2:])
        zs = [None] * len(xs) if Z is None else Z.expand(*lead, *Z.shape[-2:]).reshape(-1, *Z.shape[-2:])
        single = [self._grams(x, z, ntk) for x, z in zip(xs, zs, strict=True)]
        if not single:
            return [X.new_zeros(*lead, X.shape[-2], (X if Z is None else Z).shape[-2]) for _ in range(1 + ntk)]
        return [torch.stack(parts).reshape(*lead, *parts[0].shape) for parts in zip(*single, strict=True)]

    def _matrices(self, X: Tensor, Z: Tensor | None, ntk: bool) -> list[Tensor]:
        """The same for point sets (n, D) and (m, D), tile by tile."""
        n, m = len(X), len(X if Z is None else Z)
        if not n or not m:
            return [X.new_zeros(n, m) for _ in range(1 + ntk)]
        variances, own = self._single_points(X, ntk)
        others = variances if Z is None else self._single_points(Z, ntk)[0]
        side = max(1, math.isqrt(self.block // self._pixels(2)))
        tiles: dict[tuple[int, int], list[Tensor]] = {}
        for i in range(0, n, side):
            for j in range(0, m, side):
                if Z is None and j < i:
                    tiles[i, j] = [t.mT for t in tiles[j, i]]
                    continue
                here, there = slice(i, i + side), slice(j, j + side)
                book = _Variances(iter([v[here] for v in variances]), iter([v[there] for v in others]))
                pairs = self._input_pairs(X[here], (X if Z is None else Z)[there], ntk)
                tiles[i, j] = _wanted(_propagate(self.layers, pairs, book))
                if Z is None and i == j:  # make it symmetric: sums over pixels depend on their order
                    tiles[i, j] = [(t + t.mT) / 2 for t in tiles[i, j]]
        rows = [[tiles[i, j] for j in range(0, m, side)] for i in range(0, n, side)]
        found = [torch.cat([torch.cat([t[k] for t in row], 1) for row in rows]) for k in range(1 + ntk)]
        if Z is None:  # exact diagonal, without the rounding of a matrix product
            eye = torch.eye(n, dtype=torch.bool, device=X.device)
            found = [torch.where(eye, d[:, None], t) for d, t in zip(own, found, strict=True)]
        return found

    def _single_points(self, X: Tensor, ntk: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Variances of points before each activation (n, ...), and their own covariance and NTK (n,)."""
        books, ends = [], []
        for x in X.split(max(1, self.block // self._pixels(2))):
            book = _Variances()
            books.append(book)
            ends.append(_wanted(_propagate(self.layers, self._input_pairs(x, None, ntk), book)))
        variances = [torch.cat(parts) for parts in zip(*(book.found for book in books), strict=True)]
        return variances, [torch.cat(parts) for parts in zip(*ends, strict=True)]

    def _input_pairs(self, X: Tensor, Z: Tensor | None, ntk: bool) -> _Pairs:
        """Input covariance, a mean over features: of each point with itself if Z is None, else of all pairs."""
        if self.shape is None:
            cov = X.square().mean(-1) if Z is None else X @ Z.mT / X.shape[-1]
            return _Pairs(cov, torch.zeros_like(cov) if ntk else None, 0)
        x = X.unflatten(-1, self.shape)
        z = x if Z is None else Z.unflatten(-1, self.shape)
        left, right = ("ichw", "ic") if Z is None else ("ichw", "jc")
        pixels = "uv" if self.full else "hw"
        out = ("i" if Z is None else "ij") + "hw" + ("uv" if self.full else "")
        cov = torch.einsum(f"{left},{right}{pixels}->{out}", x, z) / self.shape[0]
        return _Pairs(cov, torch.zeros_like(cov) if ntk else None, 1 + self.full)

    def _pixels(self, sides: int) -> int:
        """Elements needed per pair of points."""
        if self.shape is None:
            return 1
        return (self.shape[1] * self.shape[2]) ** (sides if self.full else 1)

    def extra_repr(self) -> str:
        """Kind and layers."""
        return f"{self.kind}, " + ", ".join(repr(layer) for layer in self.layers)


def _wanted(pairs: _Pairs) -> list[Tensor]:
    return [pairs.cov] if pairs.ntk is None else [pairs.cov, pairs.ntk]


# ---- reading a module --------------------------------------------------------------------------------------


def read_layers(module: nn.Module, *, gain: float = 2.0, bias: float = 0.0) -> tuple[Layer, ...]:
    """Layers of an `nn.Sequential`, for :class:`InfiniteNetwork`: its architecture, not its weights.

    Supported: Linear, Conv2d, ReLU, LeakyReLU, GELU, Flatten, AvgPool2d, AdaptiveAvgPool2d(1), Identity, Dropout (as in
    eval mode) and nested Sequentials. Convolutions must be zero-padded.

    Args:
        module: The network.
        gain: Variance factor of the weights of every linear layer.
        bias: Standard deviation of the biases of the layers that have one.

    Raises:
        ValueError: A layer, or its settings, are not supported; the message names it.
    """
    if isinstance(module, nn.Sequential):
        found: list[Layer] = []
        for name, child in module.named_children():
            try:
                found += read_layers(child, gain=gain, bias=bias)
            except ValueError as error:
                raise ValueError(
                    f"{name}.{error}" if isinstance(child, nn.Sequential) else f"{name}: {error}"
                ) from None
        return tuple(found)
    what = type(module).__name__
    if isinstance(module, nn.Linear):
        return (Dense(gain, bias if module.bias is not None else 0.0),)
    if isinstance(module, nn.Conv2d):
        return (_read_conv(module, gain, bias if module.bias is not None else 0.0),)
    if isinstance(module, nn.LeakyReLU):
        return (Activation("leaky_relu", module.negative_slope),)
    if isinstance(module, nn.GELU) and module.approximate == "none":
        return (Activation("gelu"),)
    if isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)):
        return (GlobalAvgPool(),)
    if isinstance(module, nn.AvgPool2d):
        window, stride = _pair(module.kernel_size), _pair(module.stride)
        plain = module.padding in (0, (0, 0)) and not module.ceil_mode and module.divisor_override is None
        if window[0] == window[1] and stride[0] == stride[1] and plain:
            return (AvgPool(window[0], stride[0]),)
    if isinstance(module, nn.Flatten) and module.start_dim == 1 and module.end_dim == -1:
        return (Flatten(),)
    if isinstance(module, nn.ReLU):
        return (Activation("relu"),)
    if isinstance(module, nn.Identity | nn.Dropout):
        return ()
    raise ValueError(f"{what} has no kernel with these settings; layers are {_names()}")


def _read_conv(module: nn.Conv2d, gain: float, bias: float) -> Conv:
    if module.groups != 1 or module.dilation != (1, 1) or module.padding_mode != "zeros":
        raise ValueError("Conv2d has a kernel without groups, without dilation and with zero padding only")
    height, width = _pair(module.kernel_size)  # type: ignore[arg-type]
    if module.padding == "same":
        sides = tuple(((k - 1) // 2, k - 1 - (k - 1) // 2) for k in (height, width))
    else:
        sides = tuple((p, p) for p in ((0, 0) if module.padding == "valid" else module.padding))  # type: ignore[misc]
    return Conv((height, width), _pair(module.stride), sides, gain, bias)  # type: ignore[arg-type]


# ---- hierarchical kernels ----------------------------------------------------------------------------------


class Hierarchical(Kernel):
    """Kernel of a deep convolutional network with non-overlapping filters, on patches of unit norm.

    Level one compares patches of `patches[0]` numbers by their cosine; each further level takes the mean over
    `patches[l]` neighbours, then S <- k1(mean S) and T <- k1(mean S) + mean(T) k0(mean S), with arc-cosine kernels
    normalised to k(1) = 1. Source: Cagnetta, Favero and Wyart (ICML 2023).

    Args:
        patches: Sizes, from input to output; their product is the dimension of the points. (2, 2) has two leaves on
            circles.
        kind: `"ntk"` or `"nngp"`.

    Raises:
        ValueError: A size is not positive.
    """

    def __init__(self, patches: Sequence[int], *, kind: Kind = "ntk") -> None:
        super().__init__()
        self.patches, self.kind = tuple(patches), kind
        if not self.patches or min(self.patches) < 1 or kind not in get_args(Kind):
            raise ValueError(f"patches={self.patches} must be positive sizes, and kind={kind!r} 'ntk' or 'nngp'")

    def _leaves(self, X: Tensor) -> Tensor:
        """Split into patches of unit norm, (..., n, D) -> (..., n, leaves, patch)."""
        if X.shape[-1] != math.prod(self.patches):
            raise ValueError(
                f"the points have {X.shape[-1]} dimensions; patches of {self.patches} make {math.prod(self.patches)}"
            )
        leaves = X.to(solver_dtype(X.device)).unflatten(-1, (-1, self.patches[0]))
        return F.normalize(leaves, dim=-1, eps=torch.finfo(leaves.dtype).tiny)

    def _gram(self, X: Tensor, Z: Tensor | None) -> Tensor:
        x = self._leaves(X)
        z = x if Z is None else self._leaves(Z)
        cov = torch.einsum("...ilp,...jlp->...ijl", x, z)
        gram = self._levels(cov)
        if Z is None:
            eye = torch.eye(X.shape[-2], dtype=torch.bool, device=X.device)
            gram = torch.where(eye, self._levels(x.square().sum(-1))[..., None], gram)
        return gram.to(X.dtype)

    def _diag(self, X: Tensor) -> Tensor:
        return self._levels(self._leaves(X).square().sum(-1)).to(X.dtype)

    def _levels(self, cov: Tensor) -> Tensor:
        """From cosines of the leaves (..., leaves) to the kernel at the root (...)."""
        ntk = cov
        for level, size in enumerate(self.patches):
            if level:
                cov, ntk = (t.unflatten(-1, (-1, size)).mean(-1) for t in (cov, ntk))
            first, zeroth = arc_cosines(cov)
            cov, ntk = first, first + ntk * zeroth
        return (ntk if self.kind == "ntk" else cov).squeeze(-1)

    def extra_repr(self) -> str:
        """Sizes and kind."""
        return f"patches={self.patches}, {self.kind}"
