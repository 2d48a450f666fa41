"""Depthwise convolution with large kernels, and the re-parameterisation that makes it trainable and cheap.

A large depthwise kernel sees far with one layer, but trains poorly on its own. The Dilated Reparam Block of
UniRepLKNet (Ding et al., 2024, arXiv 2311.15599, section 3.1 and figure 2) adds parallel branches of small
kernels with gaps between their taps (dilation), each with its own batch normalisation:

    D(x) = BN_0( DW_K(x) ) + sum over branches (k, r) of BN_kr( DW_{k, dilation r}(x) ).

All of it is linear once the normalisations are frozen, and a dilated k x k kernel *is* a dense kernel of size
(k - 1) r + 1 with zeros in between, so the whole block equals one K x K depthwise convolution with a bias.

This file has three layers, each usable on its own:

* the algebra of kernels: :func:`fuse_conv_bn`, :func:`dilate_kernel`, :func:`place_kernel`,
  :func:`merge_branches`;
* the operator :func:`depthwise_conv2d`, equal to the library's convolution but routed to whatever is fastest
  for the map at hand (:func:`crop_kernel`, :func:`toeplitz`);
* the modules :class:`DepthwiseConv2d` and :class:`DilatedReparamBlock`.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from zoo.kernels import gpu, native
from zoo.kernels.watching import is_exported, is_ordinary, is_recorded

__all__ = [
    "BRANCHES",
    "DepthwiseConv2d",
    "DilatedReparamBlock",
    "crop_kernel",
    "depthwise_conv2d",
    "dilate_kernel",
    "fuse_conv_bn",
    "merge_branches",
    "place_kernel",
    "toeplitz",
]

#: Branches (kernel size k, dilation r) that run beside a large kernel of size K, in the authors' order.
BRANCHES: dict[int, tuple[tuple[int, int], ...]] = {
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    7: ((5, 1), (3, 2), (3, 3)),
    5: ((3, 1), (3, 2)),
}


# ---- the algebra of kernels --------------------------------------------------------------------------------


def fuse_conv_bn(weight: Tensor, bias: Tensor | None, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Fold an eval-mode batch normalisation into the convolution before it.

    With t = bn.weight / sqrt(running_var + eps), the pair is (t * weight, bn.bias + (bias - running_mean) *
    t).

    Args:
        weight: convolution weight, (C_out, C_in / groups, k, k), or a linear weight (C_out, C_in).
        bias: convolution bias, (C_out,), or None for zero.
        bn: normalisation over the C_out output channels, with running statistics.

    Returns:
        Weight and bias of the equal convolution, **in float64**: merging is done once, so it can afford to be
        exact, and whoever stores the result rounds it once.

    Raises:
        ValueError: `bn` keeps no running statistics, so it is not a fixed affine map.
    """
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("cannot fold batch normalisation without running statistics; use track_running_stats=True")
    scale = (bn.running_var.double() + bn.eps).rsqrt()
    shift = -bn.running_mean.double()
    if bias is not None:
        shift = shift + bias.double()
    if bn.affine:
        scale = scale * bn.weight.double()
    fused_bias = shift * scale
    if bn.affine:
        fused_bias = fused_bias + bn.bias.double()
    return weight.double() * scale.view(-1, *(1,) * (weight.ndim - 1)), fused_bias


def dilate_kernel(weight: Tensor, dilation: int) -> Tensor:
    """Write a dilated k x k kernel as the dense kernel of size (k - 1) * dilation + 1 with zeros in between.

    Args:
        weight: (C_out, C_in / groups, k, k).
        dilation: distance r >= 1 between neighbouring taps, in pixels.

    Returns:
        Dense kernel whose convolution with dilation 1 equals that of `weight` with dilation r.
    """
    return place_kernel(weight, (weight.shape[-1] - 1) * dilation + 1, dilation)


def place_kernel(weight: Tensor, size: int | tuple[int, int], dilation: int = 1) -> Tensor:
    """Centre a (dilated) kernel with odd sizes on a grid of zeros.

    Args:
        weight: (..., k_h, k_w), both odd.
        size: odd size of the grid, pixels, or (height, width); at least (k - 1) * dilation + 1 each.
        dilation: distance between neighbouring taps, pixels.

    Returns:
        (..., height, width), differentiable in `weight`.

    Raises:
        ValueError: the dilated kernel cannot be centred on the grid.
    """
    sizes = (size, size) if isinstance(size, int) else size
    slices = []
    for k, n in zip(weight.shape[-2:], sizes, strict=True):
        reach = dilation * (k // 2)
        if reach > n // 2 or n % 2 == 0 or k % 2 == 0:
            raise ValueError(
                f"a kernel of {k} taps with dilation {dilation} cannot be centred on {n} pixels; "
                f"both must be odd and the grid at least {2 * reach + 1} wide"
            )
        slices.append(slice(n // 2 - reach, n // 2 + reach + 1, dilation))
    grid = weight.new_zeros(*weight.shape[:-2], *sizes)
    grid[..., slices[0], slices[1]] = weight
    return grid


def merge_branches(
    size: int, branches: Sequence[tuple[Tensor, int, nn.BatchNorm2d]], weight: Tensor, bn: nn.BatchNorm2d
) -> tuple[Tensor, Tensor]:
    """Sum a large kernel and its dilated branches, each with its normalisation, into one kernel and one bias.

    Args:
        size: size K of the merged kernel.
        branches: (weight, dilation, normalisation) of every branch.
        weight: the large kernel, (C, 1, K, K).
        bn: its normalisation.

    Returns:
        Kernel (C, 1, K, K) and bias (C,), both float64 (see :func:`fuse_conv_bn`).
    """
    kernel, bias = fuse_conv_bn(weight, None, bn)
    for branch_weight, dilation, branch_bn in branches:
        branch_kernel, branch_bias = fuse_conv_bn(branch_weight, None, branch_bn)
        kernel = kernel + place_kernel(branch_kernel, size, dilation)
        bias = bias + branch_bias
    return kernel, bias


def crop_kernel(weight: Tensor, height: int, width: int, dilation: int = 1) -> Tensor:
    """Drop the taps of a centred odd kernel that only ever meet zero padding on a height x width map.

    On a map of n pixels two pixels are at most n - 1 apart, so a tap further than that from the centre is
    never used: a 13 x 13 kernel on a 2 x 2 map has nine live taps, not 169.
    """
    (k_h, k_w), (n_h, n_w) = weight.shape[-2:], ((height - 1) // dilation, (width - 1) // dilation)
    trim_y, trim_x = max(k_h // 2 - n_h, 0), max(k_w // 2 - n_w, 0)
    return weight[..., trim_y : k_h - trim_y, trim_x : k_w - trim_x]


def live_taps(weight: Tensor, height: int, width: int, dilation: int = 1) -> Tensor:
    """Taps of a (dilated) depthwise kernel for all offsets on a map, (C, 2 height - 1, 2 width - 1)."""
    return place_kernel(crop_kernel(weight[:, 0], height, width, dilation), (2 * height - 1, 2 * width - 1), dilation)


def toeplitz(taps: Tensor, height: int, width: int) -> Tensor:
    """Dense matrix of a depthwise convolution on one fixed, small map, zero padding included.

    M[p, q] = taps[q - p], the tap through which output pixel p sees input pixel q (pixels in C order, offsets
    counted from the centre).

    Args:
        taps: (..., 2 height - 1, 2 width - 1), see :func:`live_taps`.
        height: rows of the map.
        width: columns of the map.

    Returns:
        (..., height * width, height * width), differentiable in `taps`.
    """
    return reversed_rows(taps, height, width).flip(-2)


def reversed_rows(taps: Tensor, height: int, width: int) -> Tensor:
    """:func:`toeplitz` with its rows, the output pixels, in reverse order; for sums over all of them."""
    # windows[a, b, i, j] = taps[a + i, b + j]: output pixel (height - 1 - a, width - 1 - b) sees input (i, j)
    windows = taps.unfold(-2, height, 1).unfold(-2, width, 1)
    return windows.reshape(*taps.shape[:-2], height * width, height * width)


# ---- the operator ------------------------------------------------------------------------------------------

#: Largest map, pixels, whose dense matrix is worth building.
SMALL_MAP = 64


@torch.fx.wrap
def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1) -> Tensor:
    """Depthwise convolution, stride 1, zero padding that keeps the map's size.

    Equal to `torch.nn.functional.conv2d` up to rounding, forward and backward, but computed the fastest way
    known for the device, the precision and the size of the map. Exporters and tracers see the library's
    convolution, and so do compilers, except for large kernels on a GPU or in inference on a CPU.

    Args:
        x: (B, C, H, W), any memory format.
        weight: (C, 1, k_h, k_w), both odd.
        bias: (C,) or None.
        dilation: distance between taps, pixels.

    Returns:
        (B, C, H, W), in whichever memory format is cheapest.
    """
    if not torch.jit.is_scripting():
        if not is_recorded(x):
            return _fastest_depthwise(x, weight, bias, dilation)
        if not is_exported(x):
            if _is_large(weight, dilation) and _is_inference(x, weight, bias):
                return _opaque_depthwise(x, weight, bias, dilation)
            if gpu.suits(x, weight, dilation):
                return gpu.depthwise(x, weight, bias)
    return _library_depthwise(x, weight, bias, dilation)


def _library_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    reach_y = dilation * (weight.shape[-2] // 2)
    reach_x = dilation * (weight.shape[-1] // 2)
    return F.conv2d(x, weight, bias, 1, [reach_y, reach_x], [dilation, dilation], x.shape[1])


def _is_inference(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a compiler sees float32 on a CPU and nobody who wants gradients."""
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    return not learns and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32


def _fastest_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    height, width = x.shape[-2:]
    weight = crop_kernel(weight, height, width, dilation)
    if gpu.suits(x, weight, dilation):
        return gpu.depthwise(x, weight, bias)
    if weight.shape[-2:] == (1, 1):  # one live tap
        y = x * weight.view(-1, 1, 1)
        return y if bias is None else y + bias.view(-1, 1, 1)
    given = (x, weight) if bias is None else (x, weight, bias)
    suits = _is_large(weight, dilation) or (bias is None and native.suits_planes(x, dilation))
    if suits and native.available(*given, gradients=True):
        with suppress(native.Unsuited):
            return _NativeDepthwise.apply(x, weight, bias, dilation)
    return _plain_depthwise(x, weight, bias, dilation)


def _plain_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """By the library's operators."""
    height, width = x.shape[-2:]
    if _matrix_is_faster(x, weight, dilation):
        matrix = toeplitz(live_taps(weight, height, width, dilation), height, width)
        y = channels_outer(x) @ matrix.transpose(1, 2)
        return channels_inner(y if bias is None else y + bias[:, None, None], x)
    if x.device.type == "cpu" and x.dtype != torch.float64:
        # the kernels for (B, C, H, W) in that order collapse from width 11 (AVX2) or 14 (AVX-512) on
        x = x.contiguous(memory_format=torch.channels_last)
        weight, dilation = _suit_cpu(weight, dilation)
    return _library_depthwise(x, weight, bias, dilation)


def _is_large(weight: Tensor, dilation: int) -> bool:
    """Whether a kernel reaches further than its neighbours, which is all that the library's kernels are good at."""
    return dilation * (weight.shape[-1] // 2) > 1


class _NativeDepthwise(torch.autograd.Function):
    """The convolution by the loops in C. The gradient of its input is the convolution with the taps reversed."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
        return native.depthwise(x, weight, bias, dilation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, int], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.dilation = inputs[3]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        d_bias = grad.sum((0, 2, 3)) if wants_bias else None
        reach = [ctx.dilation * (k // 2) for k in weight.shape[-2:]]
        how: dict[str, Any] = {"padding": reach, "dilation": ctx.dilation, "groups": len(weight)}
        if torch.is_grad_enabled() or not is_ordinary(grad):  # the library knows second derivatives and batches
            d_x = conv2d_input(x.shape, weight, grad, **how) if wants_x else None
            d_weight = conv2d_weight(x, weight.shape, grad, **how) if wants_weight else None
            return d_x, d_weight, d_bias, None
        d_x = depthwise_conv2d(grad, weight.flip(-2, -1), None, ctx.dilation) if wants_x else None
        d_weight = None
        if wants_weight:
            d_weight = native.depthwise_weight_gradient(x, grad, (weight.shape[-2], weight.shape[-1]), ctx.dilation)
            if not bool(d_weight.sum().isfinite()):  # the loops multiply what isn't finite with the padding too
                with torch.enable_grad():
                    taps = weight.detach().requires_grad_()
                    y = _plain_depthwise(x.detach(), taps, None, ctx.dilation)
                    (d_weight,) = torch.autograd.grad(y, taps, grad)
        return d_x, d_weight, d_bias, None


#: One node in the graph of a compiler.
_opaque_depthwise = torch.library.custom_op(
    "kernel_zoo::depthwise",
    lambda x, weight, bias, dilation: _fastest_depthwise(x, weight, bias, dilation).contiguous(
        memory_format=torch.channels_last
    ),
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, int dilation) -> Tensor",
)
_opaque_depthwise.register_fake(
    lambda x, weight, bias, dilation: torch.empty_like(x, memory_format=torch.channels_last)
)


def _matrix_is_faster(x: Tensor, weight: Tensor, dilation: int) -> bool:
    """Whether one dense matrix per channel beats the library's convolution.

    In float64 the CPU library has no depthwise kernel at all. In float32 its weight gradient is slow where
    most taps meet padding; its forward pass is fine.
    """
    height, width = x.shape[-2:]
    if x.device.type != "cpu" or height * width > SMALL_MAP:
        return False
    if x.dtype == torch.float64:
        return True
    extent = dilation * (min(weight.shape[-2:]) - 1) + 1
    learns = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return learns and x.dtype == torch.float32 and extent >= min(height, width)


def _suit_cpu(weight: Tensor, dilation: int) -> tuple[Tensor, int]:
    """Step around slow corners of the channels_last CPU kernels with zero taps, which change nothing.

    With AVX-512 kernels 12 or 13 taps wide run at less than half the speed of wider ones; with AVX2 dilated
    kernels that reach five pixels or more run at a tenth of the speed of dense ones (oneDNN 3.12).
    """
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        if dilation == 1 and weight.shape[-1] == 13:
            return F.pad(weight, (1, 1)), dilation
    elif dilation > 1 and dilation * (weight.shape[-1] // 2) > 4:
        return dilate_kernel(weight, dilation), 1
    return weight, dilation


class _Transpose(torch.autograd.Function):
    """Transposed copy of a matrix; its gradient is a transposed copy too, where autograd takes a view."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.t().contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Transpose.apply(grad)


def channels_outer(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (C, B, H W): one matrix of samples per channel."""
    if x.is_contiguous():
        return x.flatten(2).transpose(0, 1)
    # from channels_last one plain matrix transposition does it, the fastest copy there is
    rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    return _Transpose.apply(rows).view(x.shape[1], x.shape[0], -1)


def channels_inner(y: Tensor, like: Tensor) -> Tensor:
    """(C, B, H W) -> (B, C, H, W) in the memory format of `like`; the inverse of :func:`channels_outer`."""
    batch, chans, height, width = like.shape
    if like.is_contiguous():
        return y.transpose(0, 1).reshape(batch, chans, height, width)
    rows = _Transpose.apply(y.reshape(chans, -1))
    return rows.view(batch, height, width, chans).permute(0, 3, 1, 2)


# ---- modules -----------------------------------------------------------------------------------------------


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise k x k convolution (k odd) that keeps the map's size, by :func:`depthwise_conv2d`."""

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        *,
        dilation: int = 1,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd so that it has a centre, got {kernel_size}")
        padding = dilation * (kernel_size // 2)
        super().__init__(dim, dim, kernel_size, 1, padding, dilation, groups=dim, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, H, W) to the same shape."""
        return depthwise_conv2d(x, self.weight, self.bias, self.dilation[0])


class DilatedReparamBlock(nn.ModuleDict):
    """Large depthwise kernel with parallel dilated branches, mergeable into one convolution.

    D(x) = BN_0(DW_K(x)) + sum_(k, r) BN_kr(DW_k,r(x)), see the module's docstring. It is a dictionary of
    layers because the authors' checkpoints name them so: `lk_origin`, `origin_bn`, `dil_conv_k{k}_{r}`,
    `dil_bn_k{k}_{r}`.

    Args:
        dim: channels C.
        kernel_size: size K of the large kernel: 5, 7, 9, 11, 13, 15 or 17.
        deploy: build the merged form, one convolution with bias.
        device: where the parameters live.
        dtype: their type.

    Raises:
        ValueError: there is no branch set for this kernel size.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        *,
        deploy: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kernel_size not in BRANCHES:
            raise ValueError(
                f"kernel_size {kernel_size} has no set of dilated branches; choose one of {sorted(BRANCHES)}"
            )
        self.dim = dim
        self.kernel_size = kernel_size
        self["lk_origin"] = DepthwiseConv2d(dim, kernel_size, bias=deploy, device=device, dtype=dtype)
        if deploy:
            return
        self["origin_bn"] = nn.BatchNorm2d(dim, device=device, dtype=dtype)
        for k, r in BRANCHES[kernel_size]:
            self[f"dil_conv_k{k}_{r}"] = DepthwiseConv2d(dim, k, dilation=r, device=device, dtype=dtype)
            self[f"dil_bn_k{k}_{r}"] = nn.BatchNorm2d(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile the second half)
            if self._moments_are_faster(x):
                return self._forward_by_moments(x)
        # Each convolution is followed by its normalisation; the merged form is the first convolution alone.
        out = y = x
        terms = 0
        for name, layer in self.items():
            if "bn" in name:
                y = layer(y)
                out = y if terms == 0 else out + y
                terms += 1
            else:
                y = layer(x)
        return y if terms == 0 else out

    @torch.jit.ignore
    def _branches(self) -> list[tuple[DepthwiseConv2d, nn.Module]]:
        """Every convolution, the large one first, with its normalisation; empty in the merged form."""
        layers = list(self.values())
        return list(zip(layers[::2], layers[1::2], strict=False))  # type: ignore[arg-type]

    @torch.jit.ignore
    def _moments_are_faster(self, x: Tensor) -> bool:
        """Training on a small map with plain batch normalisations, and more samples than pixels."""
        if not self.training or is_recorded(x) or x.device.type != "cpu":
            return False
        batch, _, height, width = x.shape
        if not 1 < height * width <= min(SMALL_MAP, batch) or torch.is_autocast_enabled("cpu"):
            return False
        plain = [
            is_untouched(conv, DepthwiseConv2d)
            and is_untouched(bn, nn.BatchNorm2d)
            and (bn.training and bn.affine and bn.momentum is not None)
            for conv, bn in self._branches()
        ]
        return len(plain) > 0 and all(plain) and x.dtype == self["lk_origin"].weight.dtype

    @torch.jit.ignore
    def _forward_by_moments(self, x: Tensor) -> Tensor:
        """The same sum with one convolution instead of one per branch.

        On a map of P pixels branch b of a channel is y_b = T_b x with a P x P matrix T_b. Its batch
        statistics follow from the mean m and the covariance S of the channel's pixels over the batch,

            mean_b = mean_p (T_b m)_p,    var_b = mean_p (T_b S T_b')_pp + var_p (T_b m)_p,

        (both terms are sums of squares: nothing cancels), and with them the whole sum is one matrix,

            sum_b gamma_b (T_b x - mean_b) / sqrt(var_b + eps) + beta_b.
        """
        height, width = x.shape[-2:]
        convs, norms = zip(*self._branches(), strict=True)
        taps = torch.stack([live_taps(conv.weight, height, width, conv.dilation[0]) for conv in convs], 1)
        rows = reversed_rows(taps, height, width).flatten(1, 2)  # (C, K P, P): the rows of all K branches
        samples = channels_outer(x)  # (C, B, P)
        center = samples.mean(1, keepdim=True)  # (C, 1, P)
        spread = samples - center
        covariance = spread.transpose(1, 2) @ spread / samples.shape[1]  # (C, P, P)
        means = (rows @ center.transpose(1, 2)).unflatten(1, (len(convs), -1)).squeeze(-1)  # (C, K, P)
        mean = means.mean(-1)  # (C, K)
        within = ((rows @ covariance) * rows).sum(-1).view_as(means).mean(-1)
        var = within + (means - mean[..., None]).square().mean(-1)
        eps = torch.tensor([bn.eps for bn in norms], dtype=x.dtype, device=x.device)
        scale = torch.stack([bn.weight for bn in norms], 1) * (var + eps).rsqrt()
        shift = (torch.stack([bn.bias for bn in norms], 1) - scale * mean).sum(1)
        record_statistics(norms, mean.detach().t(), var.detach().t(), count=x.numel() // x.shape[1])
        matrix = toeplitz((scale[..., None, None] * taps).sum(1), height, width)
        return channels_inner(samples @ matrix.transpose(1, 2) + shift[:, None, None], x)

    @torch.jit.ignore
    def merged(self) -> tuple[Tensor, Tensor]:
        """Kernel (C, 1, K, K) and bias (C,) of the equal single convolution in eval mode, float64."""
        origin = self["lk_origin"]
        assert isinstance(origin, DepthwiseConv2d)
        if "origin_bn" not in self:
            assert origin.bias is not None
            return origin.weight.double(), origin.bias.double()
        (conv, bn), *others = self._branches()
        branches = [(c.weight, c.dilation[0], n) for c, n in others]
        return merge_branches(self.kernel_size, branches, conv.weight, bn)

    @torch.jit.ignore
    @torch.no_grad()
    def reparameterize(self) -> None:
        """Become the merged form, in place. A second call does nothing."""
        if "origin_bn" not in self:
            return
        kernel, bias = self.merged()
        origin = self["lk_origin"]
        for name in [name for name in self if name != "lk_origin"]:
            del self[name]
        store_convolution(origin, kernel, bias)


def is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a layer is of exactly this kind and nobody hooked into it, so that its call may be left out.

    Adapters, parametrisations, quantisation and synchronised normalisation change the kind.
    """
    return type(module) is kind and not (module._forward_hooks or module._forward_pre_hooks)


@torch.no_grad()
def record_statistics(norms: Sequence[nn.BatchNorm2d], mean: Tensor, var: Tensor, count: int) -> None:
    """Update the running statistics as the normalisations would; row i of `mean` and `var` is for norm i."""
    for bn, m, v in zip(norms, mean, var, strict=True):
        if bn.track_running_stats and bn.running_mean is not None:
            assert bn.running_var is not None
            assert bn.num_batches_tracked is not None
            assert bn.momentum is not None
            bn.running_mean.lerp_(m, bn.momentum)
            bn.running_var.lerp_(v * (count / (count - 1)), bn.momentum)  # unbiased, as the library records it
            bn.num_batches_tracked.add_(1)


def store_convolution(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Give a convolution or linear layer a merged weight and bias, in its dtype, frozen if its weight was."""
    old = layer.weight
    assert isinstance(old, nn.Parameter)
    layer.weight = nn.Parameter(weight.to(old), requires_grad=old.requires_grad)
    layer.bias = nn.Parameter(bias.to(old), requires_grad=old.requires_grad)
