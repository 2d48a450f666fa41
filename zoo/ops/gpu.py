"""Depthwise convolution with large kernels on a GPU: our Triton kernels or torch's, whichever is faster.

Torch's depthwise kernels become slow as the kernel grows, especially in training. How much depends on the card, the
dtype and the map, so the first call with new sizes times both and remembers the faster, as cuDNN's benchmark mode.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

__all__ = ["convolve", "suits", "weight_gradient"]


def suits(weight: Tensor, dilation: int) -> bool:
    """Whether a kernel is large and dense, so that :func:`convolve` may be faster than torch."""
    return dilation == 1 and min(weight.shape[-2:]) >= 7


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Depthwise convolution with zero padding, output of the same size.

    Args:
        x: (B, C, H, W), float32, bfloat16 or float16.
        weight: (C, 1, k_h, k_w), both odd, same dtype as `x`.
        bias: (C,) or None.

    Returns:
        (B, C, H, W) in channels_last order.
    """

    def library() -> Tensor:
        return F.conv2d(x, weight, bias, padding=_padding(weight.shape), groups=len(weight))

    y = _fastest("y", x, weight.shape, lambda loops: loops.convolve(x, weight, bias), library)
    return y.contiguous(memory_format=torch.channels_last)


def weight_gradient(x: Tensor, grad: Tensor, kernel: Sequence[int]) -> Tensor:
    """Gradient of the weight of :func:`convolve`, (C, 1, k_h, k_w), from its input and the gradient of its output."""
    shape = (x.shape[1], 1, *kernel)

    def ours(loops: ModuleType) -> Tensor:
        return loops.weight_gradient(x, grad, tuple(kernel)).to(x.dtype)

    def library() -> Tensor:
        return conv2d_weight(x, shape, grad, padding=_padding(shape), groups=shape[0])

    return _fastest("weight", x, shape, ours, library).contiguous()


def _padding(shape: Sequence[int]) -> tuple[int, int]:
    return shape[-2] // 2, shape[-1] // 2


# ---- choosing the faster one -------------------------------------------------------------------------------


@functools.cache
def _loops() -> ModuleType | None:
    """The Triton kernels, imported on first use; None without Triton."""
    try:
        from zoo.ops import triton_depthwise
    except ImportError:
        return None
    return triton_depthwise


_ours_is_faster: dict[tuple[Any, ...], bool] = {}


def _fastest(
    kind: str, x: Tensor, shape: Sequence[int], ours: Callable[[ModuleType], Tensor], library: Callable[[], Tensor]
) -> Tensor:
    """Result of `ours` or of `library`; the first call with these sizes and dtype times both."""
    loops = _loops()
    if loops is None:
        return library()
    if not x.is_cuda:  # Triton's interpreter
        return ours(loops)
    key = (kind, x.shape, tuple(shape), x.dtype, x.is_contiguous(), x.device.index)
    if key not in _ours_is_faster:
        if torch.cuda.is_current_stream_capturing():
            return library()
        try:
            _ours_is_faster[key] = _milliseconds(lambda: ours(loops)) < _milliseconds(library)
        except Exception as error:  # Triton may raise anything on unsupported cards
            logging.getLogger(__name__).warning("large kernels run without Triton: %s", error)
            _ours_is_faster[key] = False
    return ours(loops) if _ours_is_faster[key] else library()


def _milliseconds(function: Callable[[], Tensor], calls: int = 5) -> float:
    function()  # compiles and selects algorithms
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
