"""Times that can be trusted on a shared machine, and peak memory of a process of its own."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping

__all__ = ["interleaved", "peak_memory"]


def interleaved(functions: Mapping[str, Callable[[], object]], rounds: int = 15, warmup: int = 2) -> dict[str, float]:
    """Median CPU seconds of one call of each function, called in turn so that a busy machine is busy for all alike.

    Args:
        functions: What to time, by name; each call should take at least a millisecond.
        rounds: Timed calls of each.
        warmup: Calls of each before that.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warmup + rounds):
        for name, function in functions.items():
            begin = time.process_time()
            function()
            if turn >= warmup:
                times[name].append(time.process_time() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


_PROBE = """
import sys
from {module} import {factory}

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name + ":"))

{factory}(*{small})()
step = {factory}(*{large})
before = status("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # forget the peak so far
for _ in range(3):
    step()
sys.stdout.write(str(status("VmHWM") - before))
"""


def peak_memory(module: str, factory: str, small: tuple[object, ...], large: tuple[object, ...]) -> float:
    """Peak resident memory in MiB that `factory(*large)()` needs beyond that of `factory(*small)()`, in a new process;
    on Linux only.

    Args:
        module: Module that has the factory.
        factory: Name of a function that returns a callable.
        small: Arguments of a first, tiny call, which loads every library.
        large: Arguments of the measured call.
    """
    code = _PROBE.format(module=module, factory=factory, small=small, large=large)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout) / 1024
