"""The run folder: locked by one writer at a time, cleaned of partial files, and written atomically."""

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
from zoo.support.renamed import renamed
from zoo.support.values import DamagedFileError, check_closed
from zoo.support.whole import clean, replace_link
from zoo.training.checkpointing import FOLDER

__all__ = ["RunFolderInUse", "check_new", "is_first_process", "link_latest", "write_texts", "writing_in"]

_LOCK = ".lock"
_held: dict[Path, int] = {}  # folders locked by this process, and their threads


class RunFolderInUse(RuntimeError):
    """Another run writes to the folder, or has left its results there."""


def is_first_process() -> bool:
    """Whether this is the process of a distributed run that writes files."""
    other_node = any(os.environ.get(key, "0") not in ("", "0") for key in ("NODE_RANK", "GROUP_RANK"))
    return getattr(rank_zero_only, "rank", 0) == 0 and not other_node


@contextlib.contextmanager
def writing_in(folder: Path, resumed: bool = False) -> Iterator[None]:
    """Lock a run folder for writing, and remove partial files of a killed run.

    The lock is the operating system's, so it ends with the process. Only the first process of a distributed run takes
    it. If the file system has no locks, a warning says so.

    Args:
        folder: The run folder.
        resumed: Whether the run is resumed from this folder, which is untrusted: links out of it are refused. In a new
            run they are a warning, because it could not be resumed.

    Raises:
        RunFolderInUse: Another process or thread writes to the folder.
        DamagedFileError: A link leads out of the folder of a resumed run.
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
        raise RunFolderInUse(_in_use_message(folder)) from None
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        warnings.warn(f"{folder} cannot be locked ({reason}): make sure that no second run writes there", stacklevel=3)
    _held[folder] = threading.get_ident()
    try:
        if lock.is_locked:
            _write_owner(folder)
        for place, inside, _ in os.walk(folder):
            inside[:] = [name for name in inside if name != "wandb" and not name.endswith(".tmp")]
            clean(Path(place))
        yield
    finally:
        del _held[folder]
        lock.release()


def check_new(folder: Path, command: str) -> None:
    """Refuse to start a run in the folder of another one.

    Args:
        folder: Folder of the new run.
        command: Command that started the program, for the message.

    Raises:
        RunFolderInUse: The folder contains checkpoints, a trained model or a summary.
    """
    found = [name for name in ("model", "summary.json") if (folder / name).exists()]
    found += sorted(path.name for path in (folder / FOLDER).glob("*.ckpt"))[:1]
    if found and is_first_process():
        line = shell_line(command, resume=os.path.relpath(folder))
        raise RunFolderInUse(
            f"{folder} holds a run already ({found[-1]}): continue it with `{line}`, or give this one another folder"
        )


def _write_owner(folder: Path) -> None:
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S")
    content = json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": now})
    with contextlib.suppress(OSError):  # a full disk is reported later
        (folder / _LOCK).write_text(content + "\n")  # in place: replacing the file would lose the lock


def _in_use_message(folder: Path) -> str:
    who: Any = None
    with contextlib.suppress(OSError, ValueError):
        who = json.loads((folder / _LOCK).read_text()[:1000])
    if isinstance(who, dict) and who.keys() >= {"process", "host", "since"}:
        named = f"process {who['process']!s:.20} on {who['host']!s:.100}, since {who['since']!s:.40}"
    else:
        named = "another process"
    return f"{folder} is being written by {named}: wait for its end, stop it, or give this run another folder"


def write_texts(folder: Path, files: Mapping[str, str]) -> None:
    """Write text files into a run folder, all or none."""
    write_all({folder / name: writer_of(text.encode()) for name, text in files.items()})


def link_latest(folder: Path, name: str) -> None:
    """Link `outputs/<name>/latest` to the newest run, if the run folder is in `outputs/<name>/`."""
    link = folder.parent / "latest"
    if folder.parent.name == name and (link.is_symlink() or not link.exists()):
        with contextlib.suppress(OSError, NotImplementedError):  # the file system may lack links
            replace_link(link, folder.name)


def __getattr__(name: str) -> Any:
    return renamed(f"{__name__}.{name}")
