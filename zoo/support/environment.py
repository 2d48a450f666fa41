"""What a result depends on besides the code: versions and hardware, as plain values for records and tables."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

__all__ = ["bound_waiting", "chip", "commit", "git", "hardware", "versions", "wait_policy"]

_PACKAGES = ("kernel-zoo", "torch", "timm", "lightning", "numpy", "scikit-learn")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # the source tree is on the path without being installed
            continue
    return found


def chip() -> str:
    """The processor as the system names it."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux: the short name will do
        return name
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)


@functools.cache
def git(*arguments: str) -> str:
    """What git says of the source tree; nothing where it is no clone of the zoo or git does not know what is asked."""
    source = Path(__file__).resolve().parents[2]
    if not (source / ".git").exists():
        return ""
    try:
        done = subprocess.run(["git", *arguments], cwd=source, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


@functools.cache
def commit() -> str:
    """The commit of the source tree, with a `+` where files of the zoo differ from it; nothing outside a clone."""
    found = git("rev-parse", "--short=9", "HEAD")
    return found and found + ("+" if git("status", "--porcelain", "--", "zoo", "configs") else "")


def hardware() -> dict[str, str | int]:
    """Processor, cores, threads in use, and the first GPU if there is one."""
    import torch

    found: dict[str, str | int] = {"cpu": chip(), "cores": os.cpu_count() or 1, "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def wait_policy() -> str:
    """What threads do while they wait for each other, as the environment of the process says it."""
    spin = os.environ.get("GOMP_SPINCOUNT")
    return f"spin {spin}" if spin else os.environ.get("OMP_WAIT_POLICY", "default").lower()


SPINS = 30_000  # about 0.1 ms: longer than the gaps between loops, too short to starve anybody


def bound_waiting() -> None:
    """Have threads that wait for each other spin for a moment and then sleep, unless the environment says otherwise.

    Threads that never spin are woken for every loop, which costs a training step a third; threads that always do starve
    whatever else runs on the machine. It has to be said before torch is imported, and GNU's OpenMP listens.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
