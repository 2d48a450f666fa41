"""The loops in Triton against the library: in Triton's interpreter everywhere, on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.conftest import ROOT
from zoo.ops import depthwise_conv2d, gpu

INTERPRETED = """
import torch
from tests.ops.test_gpu import compare
from zoo.ops import gpu, triton_depthwise

triton_depthwise.SHARES = 2
compare("cpu", torch.float32, (2, 3, 5, 6), (7, 9), 1e-5)
compare("cpu", torch.bfloat16, (1, 33, 3, 2), (7, 7), 2e-2)
"""


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compare(device: str, dtype: torch.dtype, shape: tuple[int, ...], kernel: tuple[int, int], tolerance: float) -> None:
    """Output and the three gradients of ours and of the library, relative to the largest value of each."""
    x, weight, bias = (normal(*shape), normal(shape[1], 1, *kernel, seed=2), normal(shape[1], seed=3))
    inputs = tuple(t.to(device, dtype) for t in (x, weight, bias))
    exact = tuple(t.double().requires_grad_() for t in inputs)
    want = F.conv2d(*exact, padding=(kernel[0] // 2, kernel[1] // 2), groups=shape[1])
    cotangent = normal(*shape, seed=4).to(device, dtype)
    expected = (want, *torch.autograd.grad(want, exact, cotangent.double()))
    y = gpu.convolve(*inputs)
    assert y.is_contiguous(memory_format=torch.channels_last)
    d_x, d_weight = gpu.convolve(cotangent, inputs[1].flip(-2, -1)), gpu.weight_gradient(inputs[0], cotangent, kernel)
    found = [(y, d_x, d_weight, cotangent.sum((0, 2, 3)))]
    if device == "cuda":
        given = tuple(t.requires_grad_() for t in inputs)
        y = depthwise_conv2d(*given)
        found.append((y, *torch.autograd.grad(y, given, cotangent)))
    for got in found:
        for g, w in zip(got, expected, strict=True):
            assert g.dtype == dtype
            torch.testing.assert_close(g.double(), w, rtol=0, atol=tolerance * float(w.detach().abs().max()))


def test_loops_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_without_triton_it_is_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_loops", lambda: None)
    compare("cpu", torch.float32, (2, 3, 5, 6), (7, 9), 1e-5)


class Clock:
    """Stands in for a GPU: tensors that call themselves one, and events that read a given time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ours: float, library: float) -> None:
        self.calls: list[str] = []
        self.times = {"ours": ours, "library": library}
        monkeypatch.setattr(gpu, "_loops", lambda: types.ModuleType("loops"))
        monkeypatch.setattr(gpu, "_ours_is_faster", {})
        monkeypatch.setattr(gpu, "_milliseconds", lambda function: self.times[self.calls_of(function)])
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def calls_of(self, function: Any) -> str:
        function()
        return self.calls.pop()

    def run(self, width: int = 5) -> str:
        x = types.SimpleNamespace(
            is_cuda=True,
            shape=(2, 3, 4, width),
            dtype=torch.float16,
            is_contiguous=lambda: True,
            device=types.SimpleNamespace(index=0),
        )
        ours, library = (lambda *_, name=name: self.calls.append(name) for name in ("ours", "library"))
        gpu._fastest("y", x, (3, 1, 7, 7), ours, library)  # type: ignore[arg-type]
        return self.calls.pop()


@pytest.mark.parametrize(("ours", "library", "winner"), [(1.0, 2.0, "ours"), (2.0, 1.0, "library")])
def test_the_faster_one_is_chosen_once(
    ours: float, library: float, winner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, ours, library)
    assert [clock.run(), clock.run(), clock.run(width=6)] == [winner] * 3
    assert len(gpu._ours_is_faster) == 2


def test_a_card_that_triton_refuses_gets_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 1.0, 2.0)

    def refuse(function: Any) -> float:
        raise RuntimeError("no such card")

    monkeypatch.setattr(gpu, "_milliseconds", refuse)
    assert clock.run() == "library"


# ---- on a GPU ----------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)], ids=str
)
@pytest.mark.parametrize("shape", [(2, 80, 28, 28), (3, 33, 14, 9), (1, 5, 7, 7)])
@pytest.mark.parametrize("kernel", [(7, 7), (13, 13), (9, 17)])
@pytest.mark.parametrize("faster", [True, False], ids=["ours", "library"])
@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu(
    faster: bool,
    kernel: tuple[int, int],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu, "_ours_is_faster", {})
    monkeypatch.setattr(gpu, "_milliseconds", alternating(faster))
    compare("cuda", dtype, shape, kernel, tolerance)


def alternating(ours_is_faster: bool) -> Any:
    """Times as if ours, which is always asked first, were faster or slower."""
    times = [1.0, 2.0] if ours_is_faster else [2.0, 1.0]

    def milliseconds(function: Any) -> float:
        function()
        times.append(times.pop(0))
        return times[-1]

    return milliseconds


@pytest.mark.gpu
@needs_gpu
def test_a_whole_layer_on_a_gpu() -> None:
    x, weight = normal(2, 40, 28, 28).cuda(), normal(40, 1, 13, 13, seed=2).cuda()
    want = F.conv2d(x, weight, padding=6, groups=40)
    torch.testing.assert_close(depthwise_conv2d(x, weight), want, rtol=1e-4, atol=1e-3)
    with torch.autocast("cuda", torch.bfloat16):
        assert depthwise_conv2d(x, weight).dtype == torch.bfloat16
    compiled = torch.compile(lambda x, w: depthwise_conv2d(x, w), fullgraph=True)
    torch.testing.assert_close(compiled(x, weight), want, rtol=1e-4, atol=1e-3)
