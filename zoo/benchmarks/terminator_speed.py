"""Speed and memory of Terminator against the same network with reference operators ("plain")."""

from __future__ import annotations

import copy
import shlex
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.benchmarks import measurement
from zoo.models.deploy import to_deploy
from zoo.ops import reference
from zoo.registry.factory import create_model
from zoo.results.records import Provenance, Records, markdown, put_section, stamp
from zoo.results.timing import POLICIES, best_policy, interleaved_times, peak_memory, under_policies

__all__ = ["SpeedError", "speed"]

KEYS = ("date", "what", "form", "batch", "threads", "wait_policy")
VALUES = ("ms", "cpu_ms", "times", "times_cpu", "apart", "mib", "memory_share")
MEASURES = ("zoo/models/terminator.py", "zoo/models/slow_nets.py", "zoo/models/terminator_deploy.py", "zoo/ops")
TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4  # the latter of float32 against float64


class SpeedError(RuntimeError):
    """Two forms differ."""


def built() -> nn.Module:
    """The CIFAR-10 network without dropout, with frequencies that float32 resolves."""
    torch.manual_seed(0)
    return create_model("terminator_cifar10", omega_0="grid", block_drop_rate=0.0)


def operators(form: str) -> AbstractContextManager[None]:
    """Context with reference operators for the plain form."""
    return reference() if form == "plain" else nullcontext()


def images(batch: int) -> tuple[Tensor, Tensor]:
    """Random images (B, 3, 32, 32) and targets (B,)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, 32, 32, generator=generator), torch.arange(batch) % 10


def training_step(form: str, batch: int) -> Callable[[], Tensor]:
    """A training step (forward, all losses, backward) as a function that returns the logits."""
    model, (x, y) = built().train(), images(batch)

    def call() -> Tensor:
        model.zero_grad(set_to_none=True)
        with operators(form):
            logits = model(x)
            losses = [F.cross_entropy(logits, y, label_smoothing=0.09), *model.aux_losses().values()]  # type: ignore[operator]
            torch.stack(losses).sum().backward()
        return logits.detach()

    return call


def inference(form: str, batch: int) -> Callable[[], Tensor]:
    """A forward pass in inference mode as a function."""
    model, (x, _) = built().eval(), images(batch)
    if form == "zoo deploy":
        to_deploy(model, inplace=True)

    def call() -> Tensor:
        with operators(form), torch.inference_mode():
            return model(x)

    return call


WORK: dict[str, tuple[Callable[[str, int], Callable[[], Tensor]], tuple[str, ...]]] = {
    "training step": (training_step, ("plain", "zoo")),
    "inference": (inference, ("plain", "zoo", "zoo deploy")),
}


@measurement("terminator", "speed", "a training step and inference against the plain form")
def speed(
    folder: Path,
    batch: int = 16,
    threads: Sequence[int] = (2,),
    rounds: int = 7,
    wait: Sequence[str] = POLICIES,
) -> Iterator[str]:
    """Time a training step and inference of the CIFAR-10 network: plain, zoo and deploy form, interleaved.

    Args:
        folder: Folder of `terminator_speed.csv`; the table goes into RESULTS.md beside it.
        batch: Batch size; inference is also measured with 1 image.
        threads: Numbers of threads.
        rounds: Timed calls of each form.
        wait: Policies as in :func:`~zoo.results.timing.policy`, each in a new process.

    Yields:
        One line per form, then the table.

    Raises:
        SpeedError: Logits of two forms differ by more than 1e-5 of the largest, or gradients by more than 1e-4.
    """
    since = stamp()["date"]
    _check_gradients()
    yield from under_policies(
        wait, __name__, "measure", folder=str(folder), batch=batch, threads=list(threads), rounds=rounds
    )
    rows = [row for row in _records(folder).rows if row["date"] >= since]
    options = f"--batch {batch} --threads {' '.join(map(str, threads))} --rounds {rounds}"
    options += f" --wait {shlex.join(wait)}" if tuple(wait) != POLICIES else ""
    table = markdown(HEADER, map(_shown, rows))
    text = (
        f"## terminator_cifar10: speed\n\n`python -m zoo benchmark terminator speed {options}`\n\n"
        f"float32; {rounds} interleaved rounds, medians; times: against the plain form, the same network by the "
        "reference of every operator, in the same process, median over rounds. Training: forward, label-smoothed "
        "cross-entropy, slow loss, regulariser, backward. Logits apart: largest difference from the plain form, "
        f"relative. MiB: peak memory of a call beyond a tiny one. {Provenance(rows, MEASURES)}"
        f"\n\n{table}\n\n{_headline(rows)}"
    )
    put_section(folder.parent / "RESULTS.md", "terminator speed", text)
    yield table


def measure(folder: str, batch: int, threads: Sequence[int], rounds: int) -> Iterator[str]:
    """The part of :func:`speed` that runs in each process."""
    records, before = _records(Path(folder)), torch.get_num_threads()
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
                    here = stamp()
                    found = interleaved_times(calls, rounds)
                finally:
                    torch.set_num_threads(before)
                for form, times in found.items():
                    row: dict[str, Any] = {"what": what, "form": form, "batch": size}
                    row |= {"ms": 1e3 * statistics.median(times.wall), "cpu_ms": 1e3 * statistics.median(times.cpu)}
                    row |= {"times": _gain(found["plain"].wall, times.wall), "mib": mib[form]}
                    row |= {"times_cpu": _gain(found["plain"].cpu, times.cpu), "apart": apart[form]}
                    records.add(row | {"memory_share": mib[form] / mib["plain"]} | here)
                    yield "  ".join(_shown(records.rows[-1]))


def _records(folder: Path) -> Records:
    return Records(folder / "terminator_speed.csv", KEYS, VALUES)


def _headline(rows: Sequence[dict[str, str]]) -> str:
    """Speed-ups of the fastest rows of each form, over wait policies."""
    told = []
    for what, size in dict.fromkeys((row["what"], row["batch"]) for row in rows):
        own = [row for row in rows if (row["what"], row["batch"]) == (what, size)]
        slow = best_policy(own, "plain")
        fast = min((best_policy(own, form) for form in WORK[what][1][1:]), key=lambda row: float(row["ms"]))
        gain = float(slow["ms"]) / float(fast["ms"])
        told.append(
            f"{what}, batch {size}: {float(slow['ms']):.0f} ms ({slow['wait_policy']}) to {float(fast['ms']):.0f} ms "
            f"({fast['form']}, {fast['wait_policy']}), **{gain:.2f} times**"
        )
    return f"Best against best, over how threads wait: {'; '.join(told)}."


def _check_gradients() -> None:
    """Compare gradients of the zoo's form in float32 and the plain one in float64, relative to the largest."""
    model, (x, y) = built().train(), images(2)
    gradients = []
    for form, dtype in (("plain", torch.float64), ("zoo", torch.float32)):
        network = copy.deepcopy(model).to(dtype)
        with operators(form):
            losses = [F.cross_entropy(network(x.to(dtype)), y), *network.aux_losses().values()]  # type: ignore[operator]
            torch.stack(losses).sum().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters()})
    plain, zoo = gradients
    largest = max(g.abs().max() for g in plain.values())  # type: ignore[union-attr]
    apart = max(float((zoo[name] - g).abs().max() / largest) for name, g in plain.items())  # type: ignore[operator]
    if apart > GRADIENT_TOLERANCE:
        raise SpeedError(f"gradients differ by {apart:.1e} of the largest")


def _apart(out: Tensor, plain: Tensor) -> float:
    return float((out - plain).abs().max() / plain.abs().max())


def _memory(factory: Callable[..., Any], form: str, batch: int) -> float:
    return peak_memory(__name__, factory.__name__, (form, 1), (form, batch))


def _gain(plain: Sequence[float], own: Sequence[float]) -> float:
    return statistics.median(p / o for p, o in zip(plain, own, strict=True))


HEADER = (
    "what", "form", "batch", "threads", "wait", "ms", "CPU-ms", "times", "times, CPU", "logits apart", "MiB", "share",
)  # fmt: skip


def _shown(row: dict[str, str]) -> list[str]:
    numbers = [f"{float(row[k]):.0f}" for k in ("ms", "cpu_ms")] + [
        f"{float(row[k]):.2f}" for k in ("times", "times_cpu")
    ]
    memory = [f"{float(row['apart']):.1e}", f"{float(row['mib']):.0f}", f"{float(row['memory_share']):.2f}"]
    return [*(row[k] for k in ("what", "form", "batch", "threads", "wait_policy")), *numbers, *memory]
