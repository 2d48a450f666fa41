"""Interleaved timing, robust on a shared machine, and peak memory in a separate process."""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from zoo.support.environment import SPINS

__all__ = [
    "POLICIES",
    "Times",
    "best_policy",
    "interleaved",
    "interleaved_times",
    "peak_memory",
    "policy",
    "under_policies",
]

Name = TypeVar("Name", bound=Hashable)


def interleaved(functions: Mapping[str, Callable[[], object]], rounds: int = 15, warmup: int = 2) -> dict[str, float]:
    """Median CPU seconds per call of each function; calls are interleaved, so that load affects all alike.

    Args:
        functions: Functions by name; a call should take at least a millisecond.
        rounds: Timed calls of each function.
        warmup: Untimed calls of each function.
    """
    return {name: statistics.median(times.cpu) for name, times in interleaved_times(functions, rounds, warmup).items()}


@dataclass
class Times:
    """Seconds of every timed call of a function: wall time, and CPU time of all threads."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def interleaved_times(
    functions: Mapping[Name, Callable[[], object]], rounds: int = 15, warmup: int = 2
) -> dict[Name, Times]:
    """As :func:`interleaved`, but all times; index i of each list is the same round."""
    times: dict[Name, Times] = {name: Times() for name in functions}
    for turn in range(warmup + rounds):
        for name, function in functions.items():
            clock, cpu = time.perf_counter(), time.process_time()
            function()
            if turn >= warmup:
                times[name].wall.append(time.perf_counter() - clock)
                times[name].cpu.append(time.process_time() - cpu)
    return times


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
    file.write("5")  # reset the peak
for _ in range(3):
    step()
sys.stdout.write(str(status("VmHWM") - before))
"""


def peak_memory(module: str, factory: str, small: tuple[object, ...], large: tuple[object, ...]) -> float:
    """Peak resident memory in MiB of `factory(*large)()`, in a new process; Linux only.

    Args:
        module: Module of the factory.
        factory: Name of a function that returns a callable.
        small: Arguments of a small first call, which loads the libraries.
        large: Arguments of the measured call.
    """
    code = _PROBE.format(module=module, factory=factory, small=small, large=large)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout) / 1024


# ---- OpenMP wait policies ----------------------------------------------------------------------------------

#: Wait policies that speed tables compare: endless spinning, sleeping, and what the commands set.
POLICIES = ("active", "passive", f"spin {SPINS}")


def policy(name: str) -> dict[str, str]:
    """Environment variables of a wait policy of OpenMP threads, which is fixed when a process starts.

    Args:
        name: `active`, `passive`, or `spin N`: spin N times, then sleep.

    Raises:
        ValueError: It is none of them.
    """
    if name in ("active", "passive"):
        return {"OMP_WAIT_POLICY": name.upper()}
    kind, _, times = name.partition(" ")
    if kind != "spin" or not times.isdecimal():
        raise ValueError(f"{name!r} is no wait policy; known: active, passive, 'spin N'")
    return {"GOMP_SPINCOUNT": times}


_CHILD = """
import json, sys
from {module} import {function}

try:
    for line in {function}(**json.loads({arguments!r})):
        sys.stdout.write(line + "\\n")
        sys.stdout.flush()
except (ValueError, RuntimeError) as error:
    sys.exit(f"error: {{error}}")
"""


def under_policies(policies: Sequence[str], module: str, function: str, **arguments: Any) -> Iterator[str]:
    """Run a measurement under each policy, in a new process.

    Args:
        policies: Names as in :func:`policy`; if empty, the measurement runs in this process.
        module: Module of the function.
        function: Name of a function that yields lines and writes its results to files.
        arguments: Arguments of the function, plain values.

    Yields:
        The lines of the measurements.

    Raises:
        ValueError: A policy is unknown.
        RuntimeError: A process failed.
    """
    if not policies:
        yield from getattr(importlib.import_module(module), function)(**arguments)
    environments = {name: policy(name) for name in policies}
    for name, own in environments.items():
        code = _CHILD.format(module=module, function=function, arguments=json.dumps(arguments))
        env = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
        with subprocess.Popen(
            [sys.executable, "-c", code],
            env=env | own,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            yield from (f"{name}: {line.rstrip()}" for line in process.stdout)
        if process.returncode:
            raise RuntimeError(f"the measurement under the policy {name!r} failed; its message is above")


def best_policy(rows: Sequence[Mapping[str, str]], form: str, column: str = "ms") -> Mapping[str, str]:
    """The fastest row of a form, over all policies and layouts."""
    return min((row for row in rows if row["form"] == form), key=lambda row: float(row[column]))
