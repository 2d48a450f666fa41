"""Depthwise convolution with large kernels on a GPU: ours in Triton or the library's, whichever is faster.

The library's depthwise kernels become slow as the kernel grows, in training most of all. How much depends on the card,
the type and the map, so the first call with new sizes times both, as cuDNN's benchmark mode does, and remembers.
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
    """Whether a kernel is large and dense, so that :func:`convolve` is worth a try."""
    return dilation == 1 and min(weight.shape[-2:]) >= 7


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Depthwise convolution with zero padding that keeps the size of the map.

    Args:
        x: (B, C, H, W), float32, bfloat16 or float16.
        weight: (C, 1, k_h, k_w), both odd, in the type of `x`.
        bias: (C,) or None.

    Returns:
        (B, C, H, W) in channels_last order.
    """

    def library() -> Tensor:
        return F.conv2d(x, weight, bias, padding=_padding(weight.shape), groups=len(weight))

    y = _fastest("y", x, weight.shape, lambda loops: loops.convolve(x, weight, bias), library)
    return y.contiguous(memory_format=torch.channels_last)


def weight_gradient(x: Tensor, grad: Tensor, kernel: Sequence[int]) -> Tensor:
    """Gradient of the weight in :func:`convolve`, (C, 1, k_h, k_w), from its input and the gradient of its output."""
    shape = (x.shape[1], 1, *kernel)

    def ours(loops: ModuleType) -> Tensor:
        return loops.weight_gradient(x, grad, tuple(kernel)).to(x.dtype)

    def library() -> Tensor:
        return conv2d_weight(x, shape, grad, padding=_padding(shape), groups=shape[0])

    return _fastest("weight", x, shape, ours, library).contiguous()


def _padding(shape: Sequence[int]) -> tuple[int, int]:
    return shape[-2] // 2, shape[-1] // 2


# ---- which is faster ---------------------------------------------------------------------------------------


@functools.cache
def _loops() -> ModuleType | None:
    """The loops in Triton, imported when a first tensor needs them; None without Triton."""
    try:
        from zoo.ops import triton_depthwise
    except ImportError:
        return None
    return triton_depthwise


_ours_is_faster: dict[tuple[Any, ...], bool] = {}


def _fastest(
    kind: str, x: Tensor, shape: Sequence[int], ours: Callable[[ModuleType], Tensor], library: Callable[[], Tensor]
) -> Tensor:
    """Result of `ours` or of `library`: a first call with these sizes and this type times both."""
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
