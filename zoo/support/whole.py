"""Atomic replacement of files and folders: after a crash at any moment, a reader finds all old files or all new ones.

A single file is written under a temporary name, synced to disk and renamed. Files that belong together (weights and
their configuration) switch in one step as well: for a moment their names are links through one pointer link, and
renaming the pointer switches all of them.

    model.safetensors -> .now.tmp/model.safetensors      .now.tmp -> .old.tmp/    (hard links to the old files)
    config.json       -> .now.tmp/config.json            .now.tmp -> .new.tmp/    one rename: both are new

Afterwards the names are plain files again. A writer killed in between leaves links, through which readers find all old
files or all new ones; the next writer turns them into plain files.

Temporary names are `.<what>.<12 hex digits>.tmp`. A writer holds a lock on its own, which the system releases when the
process ends, so that :func:`clean` can tell leftovers from files in use.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["clean", "replace_all", "replace_link", "staging", "still", "writing"]

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")
_POINTER, _KEPT, _STAGED = "now", "old", "new"
_TIMEOUT = 60.0  # seconds to wait for another writer to finish its switch
_MAX_AGE = 86_400.0  # seconds after which a temporary name counts as a leftover, on file systems without locks


def replace_all(files: Mapping[Path, Callable[[BinaryIO], object]]) -> None:
    """Write files, each atomically, and those of one folder all at once.

    Args:
        files: Final path -> writer, called with the open temporary file. Missing folders are created.

    Raises:
        OSError: The system's error, with the final path as `filename`; that folder is unchanged.
    """
    folders: dict[Path, dict[str, Callable[[BinaryIO], object]]] = {}
    for path, write in files.items():
        folders.setdefault(path.parent, {})[path.name] = write
    for folder, inside in folders.items():
        with _named(folder / next(iter(inside))):
            folder.mkdir(parents=True, exist_ok=True)
        if len(inside) == 1:
            ((name, write),) = inside.items()
            _replace(folder / name, write)
            continue
        with staging(folder) as place:
            for name, write in inside.items():
                with _named(folder / name), (place / name).open("xb") as file:
                    _fill(file, write)


def _replace(target: Path, write: Callable[[BinaryIO], object]) -> None:
    with _named(target):
        temporary, file = _temporary_file(target)
        try:
            with file:
                _fill(file, write)
                if fcntl is None:  # Windows cannot rename an open file
                    file.close()
                os.replace(temporary, target)  # the lock is held until the temporary name is gone
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    _sync(target.parent)


def _fill(file: BinaryIO, write: Callable[[BinaryIO], object]) -> None:
    write(file)
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def _named(target: Path) -> Iterator[None]:
    """Report errors with the final path, not the temporary one."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(target), None
        raise


@contextlib.contextmanager
def staging(folder: Path, without: Sequence[str] = ()) -> Iterator[Path]:
    """A temporary folder whose files replace those in `folder` all at once when the block ends without an error.

    Args:
        folder: Must exist. Its files without a new version stay.
        without: Names of files that do not stay; without a new version, they are removed in the same step.
    """
    clean(folder)
    place, handle = _temporary_folder(folder)
    try:
        yield place
        for path in place.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        _sync(place)
        _switch(folder, place, without)
    finally:
        if not _pointers(folder, place.name):
            shutil.rmtree(place, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _switch(folder: Path, place: Path, without: Sequence[str] = ()) -> None:
    new = sorted(path.name for path in place.iterdir())
    with writing(folder) as alone:
        if alone is False:
            raise BlockingIOError(errno.EAGAIN, "another process is writing into this folder", str(folder))
        _resolve_links(folder)
        old = [name for name in without if name not in new and os.path.lexists(folder / name)]
        names = [*new, *old]
        for name in names:
            if (folder / name).is_dir():
                raise IsADirectoryError(errno.EISDIR, "Is a directory", str(folder / name))
        kept = _temporary(folder, _KEPT)
        try:
            if len(names) > 1 and _switch_links(folder, kept, place, names):
                return
            for name in new:  # no links on this file system: rename one by one
                os.replace(place / name, folder / name)
            for name in old:
                (folder / name).unlink()
        finally:
            _resolve_links(folder)
            shutil.rmtree(kept, ignore_errors=True)
            _sync(folder)


def _switch_links(folder: Path, kept: Path, place: Path, names: list[str]) -> bool:
    """Switch the names to the new files; False, with nothing changed, where links are not supported."""
    kept.mkdir()
    pointer = _temporary(folder, _POINTER)
    try:
        pointer.symlink_to(kept.name, target_is_directory=True)
    except (OSError, NotImplementedError):
        return False
    for name in names:
        if (folder / name).exists():
            _copy(folder / name, kept / name)
    _sync(kept)
    for name in names:
        _link_to(folder / name, f"{pointer.name}/{name}")
    _sync(folder)
    _link_to(pointer, place.name)
    _sync(folder)
    return True


def replace_link(link: Path, target: str) -> None:
    """Point a symbolic link elsewhere, or replace a file by a link, in one step."""
    clean(link.parent)
    with writing(link.parent):
        _link_to(link, target)


def _link_to(link: Path, target: str) -> None:
    temporary = _temporary(link.parent, "link")
    try:
        temporary.symlink_to(target)
        os.replace(temporary, link)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _resolve_links(folder: Path) -> None:
    """Turn names that are links through a pointer into plain files, and remove the pointer and its target."""
    for pointer in _pointers(folder):
        for path in folder.iterdir():
            if not path.is_symlink() or not os.readlink(path).startswith(f"{pointer.name}/"):
                continue
            if not path.exists():  # there was no old file
                path.unlink()
                continue
            plain = _temporary(folder, "file")
            _copy(path, plain)
            os.replace(plain, path)
        _sync(folder)
        place = folder / os.readlink(pointer)
        pointer.unlink()
        shutil.rmtree(place, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    """Hard link a file under another name, or copy it where that is not possible."""
    source = Path(os.path.realpath(source))
    try:
        os.link(source, target)
    except (OSError, NotImplementedError):
        shutil.copy2(source, target)
        _sync(target)


def _pointers(folder: Path, target: str | None = None) -> list[Path]:
    """Pointers of a switch, or those to `target`. Their targets get removed, so links of other programs, to any other
    place, are not counted.
    """
    found = [p for p in folder.glob(f".{_POINTER}.*.tmp") if _TEMPORARY.fullmatch(p.name) and p.is_symlink()]
    found = [p for p in found if _TEMPORARY.fullmatch(os.readlink(p)) and not (folder / os.readlink(p)).is_symlink()]
    return [p for p in found if target is None or os.readlink(p) == target]


def still(folder: Path, names: Sequence[str]) -> tuple[tuple[int, ...] | None, ...]:
    """State of the files behind some names: if equal before and after reading them, no writer interfered."""
    found: list[tuple[int, ...] | None] = []
    for name in names:
        try:
            state = (folder / name).stat()
        except (OSError, ValueError):  # missing, or an invalid path
            found.append(None)
        else:
            found.append((state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns))
    return tuple(found)


# ---- temporary names ---------------------------------------------------------------------------------------


def _temporary(folder: Path, what: str) -> Path:
    return folder / f".{what[:100]}.{secrets.token_hex(6)}.tmp"


def _temporary_file(target: Path) -> tuple[Path, BinaryIO]:
    while True:
        path = _temporary(target.parent, target.name)
        file = path.open("xb")
        if _lock(file.fileno()) is None or os.fstat(file.fileno()).st_nlink:
            return path, file
        file.close()  # removed as a leftover before it was locked


def _temporary_folder(folder: Path) -> tuple[Path, int | None]:
    while True:
        path = _temporary(folder, _STAGED)
        path.mkdir()
        handle = _opened(path)
        if handle is None or _lock(handle) is None or path.exists():
            return path, handle
        os.close(handle)


def clean(folder: Path) -> list[str]:
    """Remove leftovers of killed writers from a folder; files in use stay.

    Returns:
        Names that were removed.
    """
    if not any(_TEMPORARY.fullmatch(p.name) for p in folder.glob(".*.tmp")):
        return []
    removed = []
    with contextlib.suppress(OSError), writing(folder) as alone:
        if alone is False:
            return []
        if alone:
            removed += [p.name for p in _pointers(folder)]
            _resolve_links(folder)
        for path in folder.glob(".*.tmp"):
            if _TEMPORARY.fullmatch(path.name) and _is_left_over(path, alone):
                shutil.rmtree(path, ignore_errors=True) if _is_folder(path) else path.unlink(missing_ok=True)
                removed.append(path.name)
    return removed


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _is_left_over(path: Path, alone: bool | None) -> bool:
    """Whether no process holds it; asked while no writer is in the middle of a switch, where that can be known."""
    with contextlib.suppress(OSError):
        if path.is_symlink() and alone:
            return True
        handle = None if path.is_symlink() else _opened(path)
        try:
            locked = _lock(handle) if handle is not None else None
        finally:
            if handle is not None:
                os.close(handle)
        old = time.time() - path.lstat().st_mtime > _MAX_AGE
        return old if locked is None else locked
    return False


# ---- locks -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[bool | None]:
    """Lock a folder against other writers. Yields True, False after a timeout, None without lock support."""
    handle, end = _opened(folder), time.monotonic() + _TIMEOUT
    locked: bool | None = None
    try:
        while handle is not None and (locked := _lock(handle)) is False and time.monotonic() < end:
            time.sleep(0.01)
        yield locked
    finally:
        if handle is not None:
            os.close(handle)


def _opened(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDONLY)
    except OSError:  # Windows cannot open folders
        return None


def _lock(handle: int) -> bool | None:
    """Whether we got the lock, released when this process ends; None where the file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


def _sync(path: Path) -> None:
    """Sync a file, or the names in a folder, to disk; some file systems refuse that for folders."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
