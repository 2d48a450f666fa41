"""Inner loops in C for float32 on a CPU, compiled in half a second when they are first needed.

They do in one pass over memory what takes torch's operators several. Without a C compiler (`cc`, or what the
environment variable CC names), or with ZOO_NATIVE=0, callers use those operators instead, which give the same numbers
up to rounding.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from zoo.kernels.watching import is_ordinary

__all__ = ["available", "depthwise", "depthwise_weight_gradient", "gelu_energy_", "layer_norm"]

# Products and sums are contracted to one instruction; not-a-numbers pass through the formulas as they are written.
FLAGS = ["-std=gnu11", "-O3", "-march=native", "-fopenmp", "-fPIC"]
FLAGS += ["-ffinite-math-only", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno"]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled loops, or None where they cannot be had (the reason is logged at level INFO)."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if os.environ.get("ZOO_NATIVE") == "0" or compiler is None:
        return None
    try:
        with tempfile.TemporaryDirectory() as folder:
            code, library = str(Path(folder, "native.o")), str(Path(folder, "native.so"))
            source = str(Path(__file__).with_suffix(".c"))
            for command in ([*FLAGS, "-c", source, "-o", code], ["-shared", code, "-o", library]):
                subprocess.run([compiler, *command], check=True, capture_output=True, text=True, timeout=60)
            # linked without an OpenMP of its own: it finds torch's, whose threads it shares, or is refused here
            return ctypes.CDLL(library, mode=os.RTLD_NOW)
    except (OSError, AttributeError, subprocess.SubprocessError) as error:  # no RTLD_NOW on Windows
        logging.getLogger(__name__).info("no native loops: %s %s", error, getattr(error, "stderr", ""))
        return None


def available(*tensors: Tensor, gradients: bool = False) -> bool:
    """Whether the loops may run on the memory of these tensors: ordinary, float32, on the CPU, nobody recording.

    Args:
        tensors: what a loop would read.
        gradients: whether the caller supplies gradients; otherwise nobody may want any.
    """
    return (
        all(t.dtype == torch.float32 and t.device.type == "cpu" and t.numel() > 0 for t in tensors)
        and (gradients or not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)))
        and not torch.is_autocast_enabled("cpu")
        and is_ordinary(*tensors)
        and library() is not None
    )


def gelu_energy_(h: Tensor, bias: Tensor) -> Tensor:
    """GELU of h + bias, in place, and the sum of its squares over the pixels.

    Args:
        h: (B, P, C), contiguous, :func:`available`.
        bias: (C,).

    Returns:
        Energies, (B, C).
    """
    batch, pixels, chans = h.shape
    threads = torch.get_num_threads()
    parts = threads * max(1, pixels // (256 * threads))  # long sums in one float would lose digits
    energy = torch.empty(batch, parts, chans)
    _call("gelu_energy", h, bias.contiguous(), energy, batch, pixels, chans, parts)
    return energy.sum(1)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, gelu: bool = False) -> Tensor:
    """Layer normalisation over the channels of each pixel, and GELU if wanted.

    Args:
        x: (B, C, H, W), :func:`available`.
        weight: (C,).
        bias: (C,).
        eps: added to the variance.
        gelu: whether GELU follows.

    Returns:
        (B, C, H, W) in channels_last order.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.empty_like(x)
    chans = x.shape[1]
    _call("layer_norm", x, weight.contiguous(), bias.contiguous(), y, x.numel() // chans, chans, eps, int(gelu))
    return y


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int = 1) -> Tensor:
    """Depthwise convolution with zero padding that keeps the size of the map.

    Args:
        x: (B, C, H, W), :func:`available`.
        weight: (C, 1, k_h, k_w), both odd.
        bias: (C,) or None.
        dilation: distance between taps, pixels.

    Returns:
        (B, C, H, W) in channels_last order.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.empty_like(x)
    taps = weight.flatten(1).t().contiguous()
    bias = torch.zeros(len(weight)) if bias is None else bias.contiguous()
    _call("depthwise", x, taps, bias, y, *x.shape, *weight.shape[-2:], dilation)
    return y


def depthwise_weight_gradient(x: Tensor, grad: Tensor, kernel: tuple[int, int], dilation: int = 1) -> Tensor:
    """Gradient of the weight of :func:`depthwise`.

    Args:
        x: its input, (B, C, H, W), :func:`available`.
        grad: gradient of its output, as well.
        kernel: (k_h, k_w).
        dilation: distance between taps, pixels.

    Returns:
        (C, 1, k_h, k_w).
    """
    x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    chans, parts = x.shape[1], min(len(x), torch.get_num_threads())
    taps = torch.empty(parts, kernel[0] * kernel[1], chans)
    _call("depthwise_taps", x, grad, taps, *x.shape, *kernel, dilation, parts)
    return taps.sum(0).t().reshape(chans, 1, *kernel)


def _call(name: str, *arguments: Tensor | int | float) -> None:
    loops = library()
    assert loops is not None
    getattr(loops, name)(*map(_as_c, arguments))


def _as_c(value: Tensor | int | float) -> ctypes.c_void_p | ctypes.c_long | ctypes.c_float:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_long(value) if isinstance(value, int) else ctypes.c_float(value)
