"""Speed and memory of Terminator against the same network written straightforwardly."""

from __future__ import annotations

import datetime
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.benchmarks.models import surroundings
from zoo.benchmarks.records import Records, markdown, put_section
from zoo.benchmarks.terminator_plain import PlainTerminator
from zoo.benchmarks.timing import interleaved_times, peak_memory
from zoo.models.deploy import to_deploy
from zoo.models.registry import create_model

__all__ = ["SpeedError", "speed"]

KEYS = ("date", "what", "form", "batch", "threads")
VALUES = ("ms", "cpu_ms", "times", "times_cpu", "apart", "mib", "memory_share", "machine")
TOLERANCE = 1e-5


class SpeedError(RuntimeError):
    """Two forms that should agree do not."""


def built(form: str) -> nn.Module:
    """The CIFAR-10 network in one of its forms; dropout off, frequencies that float32 resolves."""
    torch.manual_seed(0)
    network = create_model("terminator_cifar10", omega_0="grid", block_drop_rate=0.0)
    return PlainTerminator(network) if form == "plain" else network  # type: ignore[arg-type]


def images(batch: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, 32, 32, generator=draw), torch.arange(batch) % 10


def training_step(form: str, batch: int) -> Callable[[], Tensor]:
    """Forward, all losses, backward; the call returns the logits."""
    model, (x, y) = built(form).train(), images(batch)

    def call() -> Tensor:
        model.zero_grad(set_to_none=True)
        logits = model(x)
        losses = [F.cross_entropy(logits, y, label_smoothing=0.09), *model.aux_losses().values()]  # type: ignore[operator]
        torch.stack(losses).sum().backward()
        return logits.detach()

    return call


def inference(form: str, batch: int) -> Callable[[], Tensor]:
    """Forward without gradients."""
    model, (x, _) = built(form).eval(), images(batch)
    if form == "zoo deploy":
        to_deploy(model, inplace=True)

    def call() -> Tensor:
        with torch.inference_mode():
            return model(x)

    return call


WORK: dict[str, tuple[Callable[[str, int], Callable[[], Tensor]], tuple[str, ...]]] = {
    "training step": (training_step, ("plain", "zoo")),
    "inference": (inference, ("plain", "zoo", "zoo deploy")),
}


def speed(folder: Path, batch: int = 16, threads: Sequence[int] = (2,), rounds: int = 7) -> Iterator[str]:
    """Time a training step and inference of the CIFAR-10 network: plain, zoo and deploy form, interleaved.

    Args:
        folder: Where `terminator_speed.csv` is kept; the table goes into RESULTS.md beside the folder.
        batch: Images a call; inference is measured with 1 image too.
        threads: Numbers of threads.
        rounds: Timed calls of each form.

    Yields:
        The table.

    Raises:
        SpeedError: Logits or gradients of two forms differ by more than 1e-5 of the largest.
    """
    records = Records(folder / "terminator_speed.csv", KEYS, VALUES)
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
    machine, before, rows = surroundings(torch.device("cpu")), torch.get_num_threads(), []
    _check_gradients()
    for what, (factory, forms) in WORK.items():
        for size in (batch,) if what == "training step" else (batch, 1):
            calls = {form: factory(form, size) for form in forms}
            logits = {form: call().clone() for form, call in calls.items()}
            apart = {form: _apart(out, logits["plain"]) for form, out in logits.items()}
            if max(apart.values()) > TOLERANCE:
                raise SpeedError(f"{what}: logits differ by {max(apart.values()):.1e} of the largest")
            mib = {form: _memory(factory, form, size) for form in forms}
            for count in threads:
                torch.set_num_threads(count)
                try:
                    found = interleaved_times(calls, rounds)
                finally:
                    torch.set_num_threads(before)
                for form, times in found.items():
                    row: dict[str, Any] = {"date": date, "what": what, "form": form, "batch": size, "threads": count}
                    row |= {"ms": 1e3 * statistics.median(times.wall), "cpu_ms": 1e3 * statistics.median(times.cpu)}
                    row |= {"times": _gain(found["plain"].wall, times.wall), "mib": mib[form]}
                    row |= {"times_cpu": _gain(found["plain"].cpu, times.cpu), "apart": apart[form]}
                    row |= {"memory_share": mib[form] / mib["plain"], "machine": machine}
                    records.add(row)
                    rows.append(_shown(row))
    header = ("what", "form", "batch", "threads", "ms", "CPU-ms", "times", "times, CPU", "logits apart", "MiB", "share")
    table = markdown(header, rows)
    text = (
        f"## terminator_cifar10: speed\n\n`python -m zoo benchmark terminator speed --batch {batch} --threads "
        f"{' '.join(map(str, threads))}`\n\nfloat32; {rounds} interleaved rounds, medians; times: against the plain "
        "form, the network as one would first write it, median over rounds. Training: forward, label-smoothed "
        "cross-entropy, slow loss, regulariser, backward. Logits apart: largest difference from the plain form, "
        "relative. MiB: peak memory of a call beyond a tiny one. Threads that wait are "
        f"{os.environ.get('OMP_WAIT_POLICY', 'as the library has them')} (OMP_WAIT_POLICY; the zoo's commands set "
        f"PASSIVE where nothing is set). {machine}.\n\n{table}"
    )
    put_section(folder.parent / "RESULTS.md", "terminator speed", text)
    yield table


def _check_gradients() -> None:
    """Compare the gradients of plain and zoo form in float64, relative to the largest."""
    x, y = images(2)
    gradients = []
    for form in ("plain", "zoo"):
        model = built(form).double().train()
        losses = [F.cross_entropy(model(x.double()), y), *model.aux_losses().values()]  # type: ignore[operator]
        torch.stack(losses).sum().backward()
        network = model.network if form == "plain" else model
        gradients.append({name: p.grad for name, p in network.named_parameters()})  # type: ignore[union-attr]
    plain, zoo = gradients
    largest = max(g.abs().max() for g in plain.values())  # type: ignore[union-attr]
    apart = max(float((zoo[name] - g).abs().max() / largest) for name, g in plain.items())  # type: ignore[operator]
    if apart > TOLERANCE:
        raise SpeedError(f"gradients differ by {apart:.1e} of the largest")


def _apart(out: Tensor, plain: Tensor) -> float:
    return float((out - plain).abs().max() / plain.abs().max())


def _memory(factory: Callable[..., Any], form: str, batch: int) -> float:
    return peak_memory(__name__, factory.__name__, (form, 1), (form, batch))


def _gain(plain: Sequence[float], own: Sequence[float]) -> float:
    return statistics.median(p / o for p, o in zip(plain, own, strict=True))


def _shown(row: dict[str, Any]) -> list[str]:
    numbers = [f"{row[k]:.0f}" for k in ("ms", "cpu_ms")] + [f"{row[k]:.2f}" for k in ("times", "times_cpu")]
    memory = [f"{row['mib']:.0f}", f"{row['memory_share']:.2f}"]
    return [*(str(row[k]) for k in ("what", "form", "batch", "threads")), *numbers, f"{row['apart']:.1e}", *memory]
