"""How waiting threads should wait: a training step alone, and beside processes that keep every core busy."""

from __future__ import annotations

import contextlib
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from zoo.benchmarks import measurement, terminator_speed
from zoo.results.records import Provenance, Records, markdown, put_section, stamp
from zoo.results.timing import POLICIES, interleaved_times, under_policies

__all__ = ["waiting"]

KEYS, VALUES = ("turn", "beside", "wait_policy"), ("batch", "ms", "cpu_ms", "n")
MEASURES = ("zoo/ops", "zoo/models/terminator.py", "zoo/support/environment.py")
WAIT = (*POLICIES, "spin 30000")


@measurement("native", "waiting", "a training step under every wait policy, alone and on a busy machine")
def waiting(folder: Path, batch: int = 4, rounds: int = 5, turns: int = 3, wait: Sequence[str] = WAIT) -> Iterator[str]:
    """Time Terminator's training step under each wait policy, alone and beside one busy process for every core.

    Args:
        folder: Of `native_waiting.csv`; the table goes into RESULTS.md beside the folder.
        batch: Images a step.
        rounds: Timed steps of each process.
        turns: How often all policies take their turn, each time in new processes.
        wait: Policies as in :func:`~zoo.results.timing.policy`.

    Yields:
        A line for every process, then the table.
    """
    path = folder / "native_waiting.csv"
    if not Records.frozen:
        path.unlink(missing_ok=True)  # times of one run belong together
        for turn in range(turns):
            for busy in (0, os.cpu_count() or 1):
                given = {"folder": str(folder), "batch": batch, "rounds": rounds, "turn": turn, "busy": busy}
                with _beside(busy):
                    yield from under_policies(wait, __name__, "measure", **given)
    rows = Records(path, KEYS, VALUES).rows
    table = []
    for name in dict.fromkeys(row["wait_policy"] for row in rows):
        cells = [name]
        for beside in sorted({row["beside"] for row in rows}, key=int):
            own = [row for row in rows if (row["wait_policy"], row["beside"]) == (name, beside)]
            for column in ("ms", "cpu_ms"):
                values = sorted(float(row[column]) for row in own)
                cells.append(f"{statistics.median(values):.0f} [{values[0]:.0f}, {values[-1]:.0f}]")
        table.append(cells)
    shown = markdown(["threads wait", "alone, ms", "CPU ms", "beside busy processes, ms", "CPU ms"], table)
    options = f" --rounds {rounds}" + (f" --wait {shlex.join(wait)}" if tuple(wait) != WAIT else "")
    text = (
        f"## How threads wait\n\n`python -m zoo benchmark native waiting{options}`\n\nMilliseconds of a training step "
        f"of terminator_cifar10 on {batch} images, alone and beside one busy process for every core: median over "
        f"{turns} processes of each one's median [smallest, largest]. The commands set `{POLICIES[-1]}`, unless the "
        f"environment says otherwise. {Provenance(rows, MEASURES)}\n\n{shown}"
    )
    put_section(folder.parent / "RESULTS.md", "native waiting", text)
    yield shown


@contextlib.contextmanager
def _beside(count: int) -> Iterator[None]:
    """Run `count` processes that never rest."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(process.kill)
        yield


def measure(folder: str, batch: int, rounds: int, turn: int, busy: int) -> Iterator[str]:
    """What :func:`waiting` does in each process."""
    step = terminator_speed.training_step("zoo", batch)
    times = interleaved_times({"step": step}, rounds, warmup=1)["step"]
    ms, cpu_ms = (1e3 * statistics.median(values) for values in (times.wall, times.cpu))
    row = {"turn": turn, "beside": busy, "batch": batch, "ms": ms, "cpu_ms": cpu_ms, "n": rounds}
    Records(Path(folder, "native_waiting.csv"), KEYS, VALUES).add(row | stamp())
    yield f"{busy} busy processes beside: {ms:.0f} ms"
