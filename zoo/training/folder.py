"""The folder of a run: one writer at a time, nothing left over from a killed one, and what a run records there."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
from lightning.pytorch.utilities import rank_zero_only

from zoo.support.files import write_all, writer_of
from zoo.support.quoting import command as shell_line
from zoo.support.values import DamagedFileError, check_closed
from zoo.support.whole import clean, replace_link
from zoo.training.checkpointing import FOLDER

__all__ = ["RunFolderInUse", "check_new", "is_first_process", "link_latest", "record", "writing_in"]

_LOCK = ".lock"
_held: dict[Path, int] = {}  # folder, and the thread that writes into it


class RunFolderInUse(RuntimeError):
    """Another run writes into the folder, or has left its results there; the message says which."""


def is_first_process() -> bool:
    """Whether this process writes for all processes of its run."""
    other_node = any(os.environ.get(key, "0") not in ("", "0") for key in ("NODE_RANK", "GROUP_RANK"))
    return getattr(rank_zero_only, "rank", 0) == 0 and not other_node


@contextlib.contextmanager
def writing_in(folder: Path, resumed: bool = False) -> Iterator[None]:
    """Be the one writer of a run folder, and remove what a killed one left half written.

    The lock is the system's and ends with its process, however that ends. Only the first process of a distributed run
    takes it. Where the file system has no locks, a warning says so.

    Args:
        folder: Of the run.
        resumed: It goes on with what is there, which may come from anyone. Of a new run the place is the user's own:
            that links lead out of it, so that it cannot be resumed as it is, is a warning.

    Raises:
        RunFolderInUse: Another process, or another thread of this one, writes there.
        DamagedFileError: A link in the folder of a resumed run leads out of it.
    """
    folder = Path(os.path.realpath(folder))
    if not is_first_process() or _held.get(folder) == threading.get_ident():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        check_closed(folder)
    except DamagedFileError as error:
        if resumed:
            raise
        warnings.warn(f"{error}, or the run cannot be resumed", stacklevel=3)
    lock = filelock.FileLock(folder / _LOCK, timeout=0, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise RunFolderInUse(_in_use(folder)) from None
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        warnings.warn(
            f"{folder} cannot be locked ({reason}): see to it yourself that no second run writes there", stacklevel=3
        )
    _held[folder] = threading.get_ident()
    try:
        if lock.is_locked:
            _sign(folder)
        for place, inside, _ in os.walk(folder):
            inside[:] = [name for name in inside if name != "wandb" and not name.endswith(".tmp")]
            clean(Path(place))
        yield
    finally:
        del _held[folder]
        lock.release()


def check_new(folder: Path, command: str) -> None:
    """Refuse to begin a run where another one has got somewhere: its files would be lost or mixed with the new ones.

    Args:
        folder: Of the new run.
        command: How the program was started, for the printed line.

    Raises:
        RunFolderInUse: The folder holds states, a trained model or a summary.
    """
    found = [name for name in ("model", "summary.json") if (folder / name).exists()]
    found += sorted(path.name for path in (folder / FOLDER).glob("*.ckpt"))[:1]
    if found and is_first_process():
        line = shell_line(command, resume=os.path.relpath(folder))
        raise RunFolderInUse(
            f"{folder} holds a run already ({found[-1]}): continue it with `{line}`, or give this one another folder"
        )


def _sign(folder: Path) -> None:
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S")
    content = json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": now})
    with contextlib.suppress(OSError):  # a full disk has its own message later
        (folder / _LOCK).write_text(content + "\n")  # the very file that is locked: not to be replaced


def _in_use(folder: Path) -> str:
    who: Any = None
    with contextlib.suppress(OSError, ValueError):
        who = json.loads((folder / _LOCK).read_text()[:1000])
    if isinstance(who, dict) and who.keys() >= {"process", "host", "since"}:
        named = f"process {who['process']!s:.20} on {who['host']!s:.100}, since {who['since']!s:.40}"
    else:
        named = "another process"
    return f"{folder} is being written by {named}: wait for its end, stop it, or give this run another folder"


def record(folder: Path, files: Mapping[str, str]) -> None:
    """Write what a run is started from, all of it or nothing."""
    write_all({folder / name: writer_of(text.encode()) for name, text in files.items()})


def link_latest(folder: Path, name: str) -> None:
    """Let `outputs/<name>/latest` lead to the newest run, where the runs of a name lie side by side."""
    link = folder.parent / "latest"
    if folder.parent.name == name and (link.is_symlink() or not link.exists()):
        with contextlib.suppress(OSError, NotImplementedError):  # not every file system has links
            replace_link(link, folder.name)
