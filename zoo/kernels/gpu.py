"""Depthwise convolution with large kernels on a GPU: ours in Triton or the library's, whichever is faster.

The library's depthwise kernels become slow as the kernel grows, in training most of all. How much depends on the card,
the type and the map, so the first call with new sizes times both, as cuDNN's benchmark mode does, and remembers.
"""

import functools
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from zoo.kernels.watching import is_ordinary

__all__ = ["depthwise", "suits"]


def suits(x: Tensor, weight: Tensor, dilation: int) -> bool:
    """Whether :func:`depthwise` is worth a try: a large, dense kernel on a GPU, and nobody counting operators."""
    if not (x.is_cuda and dilation == 1 and min(weight.shape[-2:]) >= 7 and x.numel() > 0):
        return False
    known = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    same = x.dtype == weight.dtype or torch.is_autocast_enabled("cuda")
    return known and same and (torch.compiler.is_compiling() or is_ordinary(x, weight))


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Depthwise convolution with zero padding that keeps the size of the map, differentiable, under autocast as well.

    Args:
        x: (B, C, H, W), float32, bfloat16 or float16.
        weight: (C, 1, k_h, k_w), both odd, in the type of `x`.
        bias: (C,) or None.

    Returns:
        (B, C, H, W) in channels_last order.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _operator(x, weight, bias)


# ---- which is faster ---------------------------------------------------------------------------------------


@functools.cache
def _loops() -> ModuleType | None:
    """The loops in Triton, imported when a first tensor needs them; None without Triton."""
    try:
        from zoo.kernels import triton_depthwise
    except ImportError:
        return None
    return triton_depthwise


_ours_is_faster: dict[tuple[Any, ...], bool] = {}


def _fastest(
    kind: str, x: Tensor, weight: Tensor, ours: Callable[[ModuleType], Tensor], library: Callable[[], Tensor]
) -> Tensor:
    """Result of `ours` or of `library`: a first call with these sizes and this type times both."""
    loops = _loops()
    if loops is None:
        return library()
    if not x.is_cuda:  # Triton's interpreter
        return ours(loops)
    key = (kind, x.shape, weight.shape, x.dtype, x.is_contiguous(), x.device.index)
    if key not in _ours_is_faster:
        if torch.cuda.is_current_stream_capturing():
            return library()
        try:
            _ours_is_faster[key] = _milliseconds(lambda: ours(loops)) < _milliseconds(library)
        except Exception as error:  # whatever Triton raises on a card that it does not know
            logging.getLogger(__name__).warning("large kernels run without Triton: %s", error)
            _ours_is_faster[key] = False
    return ours(loops) if _ours_is_faster[key] else library()


def _milliseconds(function: Callable[[], Tensor], calls: int = 5) -> float:
    function()  # compiles, and chooses algorithms
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


# ---- the operators -----------------------------------------------------------------------------------------


@torch.library.custom_op("kernel_zoo::gpu_depthwise", mutates_args=())
def _operator(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    def library() -> Tensor:
        return F.conv2d(x, weight, bias, padding=_padding(weight), groups=len(weight))

    y = _fastest("y", x, weight, lambda loops: loops.convolve(x, weight, bias), library)
    return y.contiguous(memory_format=torch.channels_last)


@torch.library.custom_op("kernel_zoo::gpu_depthwise_weight", mutates_args=())
def _weight_operator(x: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    """Gradient of the weight."""

    def ours(loops: ModuleType) -> Tensor:
        return loops.weight_gradient(x, grad, weight.shape[-2:]).to(weight.dtype)

    return _fastest("weight", x, weight, ours, lambda: _library_weight(x, weight, grad)).contiguous()


def _library_weight(x: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    return conv2d_weight(x, weight.shape, grad, padding=_padding(weight), groups=len(weight))


def _padding(weight: Tensor) -> tuple[int, int]:
    return weight.shape[-2] // 2, weight.shape[-1] // 2


_operator.register_fake(lambda x, weight, bias: torch.empty_like(x, memory_format=torch.channels_last))
_weight_operator.register_fake(lambda x, weight, grad: torch.empty_like(weight, memory_format=torch.contiguous_format))


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad
    d_x = _operator(grad, weight.flip(-2, -1), None) if wants_x else None
    # who wants second derivatives gets the library, which knows them
    gradient = _library_weight if torch.is_grad_enabled() else _weight_operator
    d_weight = gradient(x, weight, grad) if wants_weight else None
    return d_x, d_weight, grad.sum((0, 2, 3)) if wants_bias else None


_operator.register_autograd(_backward, setup_context=_setup)
