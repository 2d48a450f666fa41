"""The environment of a result: versions and hardware, as plain values for records and tables."""

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
        except importlib.metadata.PackageNotFoundError:  # run from the source tree without installation
            continue
    return found


def chip() -> str:
    """Processor name as the operating system reports it."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux: use the short name below
        return name
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)


@functools.cache
def git(*arguments: str) -> str:
    """Output of a git command in the source tree; empty outside a clone of the zoo, or where git fails."""
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
    """Hash of the current commit, with a `+` if files of the zoo are modified; empty outside a clone."""
    found = git("rev-parse", "--short=9", "HEAD")
    return found and found + ("+" if git("status", "--porcelain", "--", "zoo", "configs") else "")


def hardware() -> dict[str, str | int]:
    """Processor, cores, threads in use, and the first GPU if any."""
    import torch

    found: dict[str, str | int] = {"cpu": chip(), "cores": os.cpu_count() or 1, "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def wait_policy() -> str:
    """How OpenMP threads wait for each other, from the environment variables of the process."""
    spin = os.environ.get("GOMP_SPINCOUNT")
    return f"spin {spin}" if spin else os.environ.get("OMP_WAIT_POLICY", "default").lower()


SPINS = 10_000  # about 0.1 ms: longer than the gaps between loops, too short to starve other processes


def bound_waiting() -> None:
    """Make waiting OpenMP threads spin briefly and then sleep, unless the environment already sets a policy.

    Without spinning, threads are woken for every loop, which costs a third of a training step; with endless spinning
    they starve other processes. Must be called before torch is imported; read by GNU's OpenMP (libgomp) only.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
