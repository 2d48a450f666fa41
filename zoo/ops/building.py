"""Compile the C loops to a shared library, once per machine, cached in a folder of the user.

The cache key is made of sources, flags, compiler and processor. The library lies in `native` inside the folder
ZOO_CACHE, or inside `kernel-zoo` in XDG_CACHE_HOME (`~/.cache`). A shared library is code, so the folder must belong to
the user and be closed to everybody else; without such a folder, a temporary one is used. Processes that start
together wait for the one that compiles.

Environment variables:

- ZOO_NATIVE: `1` (default) uses the loops if available, and warns once if not; `0` disables them; `require` raises
  :class:`NativeError` if they are not available.
- ZOO_NATIVE_ARCH: the processor to compile for, as the compiler's `-march`, such as `x86-64-v3` for AVX2; default
  `native`, this machine's.
- ZOO_CACHE: the cache folder.
- CC: the C compiler, with arguments if needed; default the first of `cc`, `gcc` and `clang`.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout

__all__ = ["NativeError", "build", "cache_folder", "load", "setting"]

# FMA contraction is on; NaN and infinity keep their meaning (no -ffast-math).
FLAGS = ["-std=gnu11", "-O3", "-fPIC", "-fno-trapping-math", "-fno-math-errno"]

# Linked without its own OpenMP, the library uses torch's and shares its threads; where loading it fails, the next
# variant is tried, without threads.
_VARIANTS: tuple[list[str], ...] = (["-fopenmp"], ["-fopenmp-simd"], [])
_TIMEOUT = 300  # seconds to compile, or to wait for another process that does; ample for a busy machine


class NativeError(RuntimeError):
    """The loops are not available; the message says why in one line."""


class _CompilerError(NativeError):
    """The compiler is missing or rejects the source."""


def setting() -> str:
    """Value of the environment variable ZOO_NATIVE: `0`, `1` or `require`.

    Raises:
        NativeError: It has another value.
    """
    value = os.environ.get("ZOO_NATIVE") or "1"
    if value not in ("0", "1", "require"):
        raise NativeError(f"the environment variable ZOO_NATIVE is {value!r}; it may be 0, 1 or require")
    return value


def load(source: Path) -> ctypes.CDLL | None:
    """Load the loops, compiling them if needed.

    Args:
        source: the folder of the C files.

    Returns:
        The library; None if ZOO_NATIVE is 0, or if it is 1 and the loops are not available, which is logged as a
        warning.

    Raises:
        NativeError: ZOO_NATIVE is `require` and the loops are not available, or it has an unknown value.
    """
    wanted = setting()
    if wanted == "0":
        return None
    try:
        return build(source)[0]
    except NativeError as error:
        if wanted == "require":
            raise
        logging.getLogger(__name__).warning(
            "without compiled loops everything runs, but slower: %s; install a C compiler (gcc or clang), or set "
            "ZOO_NATIVE=0 to do without silently",
            error,
        )
        return None


def build(source: Path) -> tuple[ctypes.CDLL, Path | None]:
    """Load the loops, compiling them if needed; also returns their path, None if no folder could be used.

    Args:
        source: the folder of the C files.

    Raises:
        NativeError: They cannot be compiled or loaded.
    """
    compiler = _compiler()
    try:
        folder = _private_folder(cache_folder())
        return _first_that_loads(source, compiler, folder)
    except _CompilerError:
        raise
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder, or a file system without locks
        logging.getLogger(__name__).info("the compiled loops are not kept: %s", error)
    try:
        with tempfile.TemporaryDirectory(prefix="kernel-zoo-") as name:
            return _first_that_loads(source, compiler, Path(name))[0], None
    except OSError as error:
        raise NativeError(_first_line(str(error))) from error


def cache_folder() -> Path:
    """The folder of compiled libraries."""
    own = os.environ.get("ZOO_CACHE")
    if own:
        return Path(own).expanduser().absolute() / "native"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "kernel-zoo" / "native"


# ---- the folder --------------------------------------------------------------------------------------------


def _private_folder(folder: Path) -> Path:
    """The folder, created if missing, which must belong to the user and be closed to everybody else.

    Raises:
        OSError: It cannot be created or used.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(f"{folder} belongs to another user or is open to others (chmod 700 makes it private)")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written")
    return folder


def _first_that_loads(source: Path, compiler: Sequence[str], folder: Path) -> tuple[ctypes.CDLL, Path]:
    reason = NativeError("")
    for variant in _VARIANTS:
        try:
            path = _compiled(source, compiler, [*FLAGS, f"-march={_architecture()}", *variant], folder)
        except _CompilerError as error:
            reason = error
            continue
        try:
            return ctypes.CDLL(str(path), mode=os.RTLD_NOW), path
        except OSError as error:
            reason = NativeError(_first_line(str(error)))
    raise reason


def _compiled(source: Path, compiler: Sequence[str], flags: Sequence[str], folder: Path) -> Path:
    """Path of the library for these inputs in the folder, compiled if needed."""
    key = _key(source, compiler, flags)
    found = _cached(folder, key)
    if found:
        return found
    try:
        with FileLock(folder / f"{key}.lock", timeout=_TIMEOUT):
            return _cached(folder, key) or _compile(source, compiler, flags, folder, key)
    except Timeout as error:
        raise OSError(f"another process holds {error.lock_file} for {_TIMEOUT} s") from error


def _cached(folder: Path, key: str) -> Path | None:
    """Path of the cached library for a key, or None; files that do not match the hash in their name are removed."""
    for path in folder.glob(f"{key}-*.so"):
        if path.stem == f"{key}-{_digest(path.read_bytes())}":
            return path
        path.unlink(missing_ok=True)
    return None


def _compile(source: Path, compiler: Sequence[str], flags: Sequence[str], folder: Path, key: str) -> Path:
    with tempfile.TemporaryDirectory(prefix="kernel-zoo-") as name:
        library, codes = Path(name, "native.so"), []
        for path in sorted(source.glob("*.c")):
            codes.append(str(Path(name, f"{path.stem}.o")))
            _run([*compiler, *flags, "-c", str(path), "-o", codes[-1]])
        _run([*compiler, "-shared", *codes, "-o", str(library), "-lm"])
        content = library.read_bytes()
    target = folder / f"{key}-{_digest(content)}.so"
    part = target.with_suffix(f".{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(target)  # whole or not at all
    finally:
        part.unlink(missing_ok=True)
    return target


# ---- the compiler ------------------------------------------------------------------------------------------


def _compiler() -> list[str]:
    """Command of the compiler, with the full path of the program.

    Raises:
        NativeError: No compiler was found.
    """
    given = os.environ.get("CC")
    if os.name != "posix" or ctypes.sizeof(ctypes.c_long) < 8:
        raise _CompilerError("they are for Linux and macOS on 64 bits")
    for command in [shlex.split(given)] if given else [["cc"], ["gcc"], ["clang"]]:
        program = shutil.which(command[0]) if command else None
        if program:
            return [program, *command[1:]]
    raise _CompilerError(f"there is no compiler {given!r} (CC)" if given else "there is no C compiler")


def _run(command: Sequence[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT)
    except subprocess.CalledProcessError as error:
        raise _CompilerError(_first_line(error.stderr) or f"{command[0]} ended with {error.returncode}") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise _CompilerError(_first_line(str(error))) from error


def _first_line(text: str) -> str:
    """The first line that mentions an error, else the first line."""
    lines = text.strip().splitlines()
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else "").strip()


# ---- the cache key -----------------------------------------------------------------------------------------


def _key(source: Path, compiler: Sequence[str], flags: Sequence[str]) -> str:
    """Cache key of the library. The compiler is identified by path, date and size, without running it."""
    program = Path(compiler[0]).resolve()
    file = program.stat()
    parts = [*compiler, *flags, str(program), str(file.st_mtime_ns), str(file.st_size), *platform.libc_ver()]
    parts += [platform.machine(), platform.system(), _processor()]
    content = b"\0".join(path.name.encode() + b"\0" + path.read_bytes() for path in sorted(source.glob("*.[ch]")))
    return _digest(content + "\0".join(parts).encode(errors="surrogateescape"))


def _architecture() -> str:
    return os.environ.get("ZOO_NATIVE_ARCH") or "native"


def _processor() -> str:
    """Identifies the processor: on Linux, model and features of the first one."""
    wanted = ("model", "cpu family", "flags", "Features", "CPU part", "CPU implementer", "isa")
    lines: list[str] = []
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if not line.strip() and lines:
                    break
                if line.startswith(wanted):
                    lines.append(line)
    except OSError:
        return platform.processor()
    return "".join(lines)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
