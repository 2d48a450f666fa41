"""Weight files: read without trusting them, written atomically.

This module works on paths and bytes and knows no model. The type of a file is decided by its content, not by its
suffix; nothing in a file is ever executed; every way in which a file can be wrong raises a one-line
:class:`CheckpointError`. Weights from a hub or an https address are downloaded to torch's cache; a file placed there
by hand is used without network access.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import json
import os
import pickle
import pickletools
import re
import urllib.error
import urllib.parse
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch

from zoo.support import inputs
from zoo.support.tensors import not_plain
from zoo.support.values import DamagedFileError, leads_out, read_json
from zoo.support.whole import replace_all, still, writing

__all__ = [
    "CONFIG_NAME",
    "MAX_TENSORS",
    "RECORDS",
    "RECORD_HASHES",
    "WEIGHTS_NAME",
    "CheckpointError",
    "as_path",
    "check_inside",
    "check_plain",
    "check_recorded",
    "check_replaceable",
    "check_same_model",
    "fetch_hub",
    "hub_config",
    "is_safetensors",
    "locate",
    "offline",
    "offline_reason",
    "read_checkpoint",
    "read_config",
    "record_hashes",
    "sha256_of",
    "undisturbed",
    "weights_size",
    "write_all",
    "write_atomic",
    "writer_of",
]

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"

#: Known weight files by name: `{"sha256": ...}` and further metadata. Each model family adds its own entries; a file
#: with a known name is compared with its hash before it is read.
RECORDS: dict[str, dict[str, Any]] = {}

_WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".tar")
_HUB_NAMES = (WEIGHTS_NAME, "pytorch_model.bin", "pytorch_model.pth", "model.pth")
_PICKLES = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))  # first bytes of a pickle, by protocol
_LEGACY_PICKLES = 4  # pickles at the start of torch's legacy format: magic number, version, system info, tensors
_MAX_HEADER = 16_000_000  # bytes
MAX_TENSORS = 20_000  # in one file; the largest models of the zoo have under 4,000, a training state four times that
_MAX_CONFIG = 16_000_000
_SCANNED = 64_000_000


_TRIES = 4
_PATIENCE = 5.0  # seconds to wait for the hub's first answer

Result = TypeVar("Result")
Place = TypeVar("Place", bound=str | Path)  # a mapping of paths is not one of `str | Path`


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, written or matched; the message is one line and says what to do."""


# ---- writing -----------------------------------------------------------------------------------------------


def write_atomic(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file completely or not at all.

    The bytes go to a temporary name in the same folder, reach the disk, and only then take the final name; a
    crash leaves the old file or the new one, never a mixture. Missing folders are created.

    Args:
        path: The final name.
        write: Called with the open temporary file.

    Raises:
        CheckpointError: The folder cannot be written or the disk is full. Nothing is left behind.
    """
    write_all({path: write})


def write_all(files: Mapping[Place, Callable[[BinaryIO], object]]) -> None:
    """Write several files that belong together: those of one folder take their names all at once.

    Raises:
        CheckpointError: As :func:`write_atomic`; the folder keeps what it had.
    """
    try:
        replace_all({as_path(path): write for path, write in files.items()})
    except OSError as error:
        place = error.filename or next(iter(files))
        raise CheckpointError(f"cannot write {place}: {_reason(error)}") from error


def check_replaceable(folder: Path) -> None:
    """Refuse a folder with files of these names that the zoo did not write, so that they are not overwritten.

    Raises:
        CheckpointError: `config.json` is unreadable, names no architecture or was not written by the zoo, or weights
            exist without it or behind a link.
    """
    path, weights = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    if os.path.lexists(weights) and (not os.path.lexists(path) or leads_out(weights, folder)):
        raise CheckpointError(f"{weights} is not of a model that the zoo saved and stays: choose another folder")
    if not os.path.lexists(path):
        return
    try:
        found = read_json(path)
    except (OSError, DamagedFileError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("architecture"), str):
        raise CheckpointError(f"{path} is not the configuration of a model and stays: choose another folder")
    if not isinstance(found.get("zoo"), dict):
        raise CheckpointError(f"{path} was not written by the zoo and stays: choose another folder")


def check_same_model(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a folder with a saved model of another kind: only the same one, trained further, takes its place unasked.

    Args:
        folder: Passed :func:`check_replaceable`.
        config: Configuration of the model that would be written.

    Raises:
        CheckpointError: The folder holds another architecture or class of estimator, or a model of other classes.
    """
    if not os.path.lexists(folder / CONFIG_NAME):
        return
    found = read_json(folder / CONFIG_NAME)
    what = f"{found['architecture']!r:.60}"
    if found["architecture"] == config["architecture"] and ("estimator" in found) == ("estimator" in config):
        if _same_classes(found, config):
            return
        what += f" of {found.get('num_classes')!r:.20} classes or targets that are not this model's"
    raise CheckpointError(f"{folder} holds another model, {what}: choose another folder, or overwrite=True replaces it")


def _same_classes(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether a model has the classes of an older one; it may have learned others since."""
    before, after = old.get("label_names"), new.get("label_names")
    if isinstance(before, list) and isinstance(after, list):
        return set(map(str, before)) <= set(map(str, after))
    return bool(old.get("num_classes") == new.get("num_classes"))


def writer_of(content: bytes) -> Callable[[BinaryIO], None]:
    """The `write` argument of :func:`write_atomic` for content that is already in memory."""

    def write(file: BinaryIO) -> None:
        file.write(content)

    return write


def _reason(error: OSError) -> str:
    words = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "the file would be larger than the system allows",
        errno.EACCES: "permission denied",
        errno.EPERM: "permission denied",
        errno.EROFS: "the file system is read-only",
        errno.ENOTDIR: "a part of its path is a file, not a folder",
        errno.EEXIST: "a part of its path is a file, not a folder",
        errno.EISDIR: "it is a folder",
        errno.ENOENT: "its folder does not exist",
        errno.ENAMETOOLONG: "the name is too long",
    }
    return words.get(error.errno or 0, error.strerror or str(error) or type(error).__name__)


# ---- reading -----------------------------------------------------------------------------------------------


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file, whatever its suffix: safetensors, or PyTorch's format (weights only).

    Args:
        path: A file. Tensors come back on the CPU.

    Returns:
        The mapping in the file: a state dict, or a training checkpoint with its nested entries.

    Raises:
        CheckpointError: The file is missing, empty, truncated, of another type, or would run code; the message says
            which in one line.
    """
    path = as_path(path)
    size, head = _first_bytes(path)
    try:
        if _looks_like_safetensors(path, head):
            return _read_safetensors(path, size, head)
        if head.startswith(b"PK\x03\x04"):
            _check_archive(path, size)
        elif head.startswith(_PICKLES):
            with path.open("rb") as file:
                _check_pickle(path, file, _LEGACY_PICKLES)
        else:
            raise CheckpointError(f"{path} is not a checkpoint: {_guess_type(head)}")
        content = _unpickle(path)
    except CheckpointError:
        raise
    except MemoryError as error:
        raise CheckpointError(f"{path} claims more memory than this machine has: it is damaged or hostile") from error
    except Exception as error:  # untrusted bytes can make a parser raise anything
        raise CheckpointError(
            f"{path} is damaged or cut off ({_first_line(error)}); copy or download it again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a mapping of names to weights")
    check_plain(content, str(path))
    return content


def check_plain(content: Mapping[Any, Any], origin: str) -> None:
    """Refuse tensors without plain values, at any depth: torch has no common operations for the others.

    Args:
        content: Content of a file, or a state dict.
        origin: Its name in the message.

    Raises:
        CheckpointError: A tensor is sparse, quantised, nested, on the meta device or of another special kind.
    """
    if odd := not_plain(content):
        raise CheckpointError(f"{origin}: {odd}, and only plain (dense) tensors are read: convert it and save it again")


def _first_bytes(path: Path) -> tuple[int, bytes]:
    try:
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder, not a checkpoint file; name the file inside it")
        if path.exists() and not path.is_file():  # reading a pipe or a device may never end
            raise CheckpointError(f"{path} is not a regular file")
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise CheckpointError(f"there is no file {path}{_neighbours(path)}") from None
        raise CheckpointError(f"cannot read {path}: {_reason(error)}") from error
    if not head:
        raise CheckpointError(f"{path} is empty (0 bytes); copy or download it again")
    return size, head


def _neighbours(path: Path) -> str:
    from zoo.support.suggest import nearest

    try:
        names = [p.name for p in path.parent.iterdir() if p.suffix in _WEIGHT_SUFFIXES]
    except OSError:
        return f": its folder {path.parent} does not exist either"
    close = nearest(path.name, names)
    return f"; that folder has {', '.join(close)}" if close else ""


def is_safetensors(path: str | Path) -> bool:
    """Whether a file is read as safetensors, by its content.

    Raises:
        CheckpointError: It is missing, empty, or not a regular file.
    """
    path = as_path(path)
    return _looks_like_safetensors(path, _first_bytes(path)[1])


def _looks_like_safetensors(path: Path, head: bytes) -> bool:
    if head[8:9] == b"{":
        return True
    return path.suffix == ".safetensors" and not head.startswith((b"PK\x03\x04", *_PICKLES))


def _read_safetensors(path: Path, size: int, head: bytes) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    length = int.from_bytes(head[:8], "little")
    if _MAX_HEADER < length <= size - 8:
        raise CheckpointError(f"{path} has a header of {length:,} bytes, more than the {_MAX_HEADER:,} that are read")
    if size < 8 or length > size - 8:
        kind = _guess_type(head)
        why = f"it claims a header of {length} bytes in a file of {size}" if kind == _UNKNOWN else kind
        raise CheckpointError(f"{path} is not a whole safetensors file: {why}; copy or download it again")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            _check_count(path, len(file.keys()))
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is a damaged safetensors file ({_first_line(error)}); copy or download it again"
        ) from error


def _check_count(path: Path, count: int) -> None:
    if count > MAX_TENSORS:
        raise CheckpointError(f"{path} holds {count:,} tensors, more than the {MAX_TENSORS:,} that are read")


def _check_archive(path: Path, size: int) -> None:
    """Refuse archives that PyTorch would not have written, before they are unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(
            f"{path} is cut off or damaged ({_first_line(error)}); copy or download it again"
        ) from error
    names = [entry.filename for entry in entries]
    _check_count(path, len(names))
    if any(n.endswith("constants.pkl") or "/code/" in n for n in names):
        raise CheckpointError(f"{path} is a TorchScript program, not weights; save its state_dict() and load that file")
    if not any(n.rsplit("/", 1)[-1] == "data.pkl" for n in names):
        kind = "a NumPy archive" if any(n.endswith(".npy") for n in names) else "a zip archive without weights"
        raise CheckpointError(f"{path} is not a checkpoint: it is {kind}")
    if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or sum(e.file_size for e in entries) > size:
        raise CheckpointError(f"{path} has compressed entries, which torch.save never writes: it is refused")
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():  # torch does not compare the checksums
            raise CheckpointError(f"{path} is damaged: {damaged} does not have its checksum; copy or download it again")
        for entry in entries:
            if entry.filename.rsplit("/", 1)[-1] == "data.pkl":
                data = archive.read(entry)
                if data.count(pickle.BINPERSID) > MAX_TENSORS:  # an upper bound of their number
                    _check_pickle(path, BytesIO(data))


def _check_pickle(path: Path, file: BinaryIO, pickles: int = 1) -> None:
    """Refuse a pickle with too many tensors, counted by opcodes: each tensor refers to a storage.

    Unpickling first would cost ten times as much, most of it in torch's pure Python reader, which builds a storage
    and a tensor for each and checks every call against an allow list.

    Args:
        path: Name of the file for the message.
        file: Open at the first opcode.
        pickles: How many are concatenated.
    """
    count = 0
    with contextlib.suppress(ValueError):  # truncated, or a single pickle: torch's reader raises a clear error
        for _ in range(pickles):
            for opcode, _, _ in pickletools.genops(file):
                count += opcode.name == "BINPERSID"
                if count > MAX_TENSORS:
                    raise CheckpointError(f"{path} holds more than the {MAX_TENSORS:,} tensors that are read")


def _unpickle(path: Path) -> Any:
    try:
        # argparse.Namespace holds plain values; many training scripts store one beside the weights
        # (the file is passed open: given a path, torch.load decides by its suffix)
        with (
            torch.serialization.safe_globals([argparse.Namespace]),
            warnings.catch_warnings(action="ignore"),
            path.open("rb") as file,
        ):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        names = _refused_globals(path)
        if not names:
            raise
        raise CheckpointError(
            f"{path} wants to call {', '.join(names[:3])} while it is read; only weights and plain values "
            "are accepted, nothing was run (re-save it as a state_dict from a source you trust)"
        ) from error


def _refused_globals(path: Path) -> list[str]:
    """Functions and classes that a pickle refers to and weights-only loading refuses."""
    import torch._weights_only_unpickler as unpickler

    allowed = {*unpickler._get_allowed_globals(), "argparse.Namespace"}
    with contextlib.suppress(Exception):  # used for the message only: the file is refused in any case
        return [name for name in dict.fromkeys(_globals(_pickle_bytes(path))) if name not in allowed]
    return []


def _pickle_bytes(path: Path) -> bytes:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            name = next(n for n in archive.namelist() if n.rsplit("/", 1)[-1] == "data.pkl")
            with archive.open(name) as file:
                return file.read(_SCANNED)
    with path.open("rb") as file:
        return file.read(_SCANNED)


def _globals(data: bytes) -> Iterator[str]:
    """List what a pickle would import, from its opcodes: inline names (old protocols) or names on the stack (new)."""
    stream = BytesIO(data)
    strings: list[str] = []
    memo: dict[Any, str] = {}
    previous = ""
    with contextlib.suppress(ValueError):  # end of a truncated or concatenated pickle
        while stream.tell() < len(data):  # torch's legacy format is several concatenated pickles
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name in ("GLOBAL", "INST"):
                    yield str(argument).replace(" ", ".")
                elif opcode.name == "STACK_GLOBAL":
                    yield ".".join(strings[-2:])
                elif "UNICODE" in opcode.name or opcode.name.endswith("STRING"):
                    strings.append(str(argument))
                elif opcode.name == "MEMOIZE" or opcode.name.endswith("PUT"):
                    slot = int(argument) if isinstance(argument, int) else len(memo)
                    memo[slot] = strings[-1] if "UNICODE" in previous else ""
                elif opcode.name.endswith("GET") and memo.get(argument):
                    strings.append(memo[argument])
                previous = opcode.name


_UNKNOWN = "its content is not one of safetensors or torch.save"


def _guess_type(head: bytes) -> str:
    """Recognise common mistakes by the first bytes."""
    start = head.lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; run `git lfs pull` to get the file itself"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page; the download went wrong"
    if head.startswith(b"\x89HDF"):
        return "it is an HDF5 (Keras) file"
    if head.startswith(b"\x1f\x8b"):
        return "it is a gzip archive; unpack it first"
    if all(32 <= b < 127 or b in (9, 10, 13) for b in head):
        return "it is a text file"
    return _UNKNOWN


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:160].rstrip(" .:") if text else type(error).__name__


def read_config(folder: str | Path) -> dict[str, Any]:
    """The `config.json` of a folder written by :func:`zoo.save_pretrained` or in timm's hub layout.

    Raises:
        CheckpointError: The file is missing, or not a JSON object that names an architecture.
    """
    folder = as_path(folder)
    path = folder / CONFIG_NAME
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}")
    check_inside(path, folder)
    try:
        config = read_json(path, _MAX_CONFIG)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {CONFIG_NAME}; write such a folder with zoo.save_pretrained") from None
    except DamagedFileError as error:
        raise CheckpointError(f"{error}; write the folder again with zoo.save_pretrained") from None
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise CheckpointError(f"{path} names no architecture; write the folder again with zoo.save_pretrained")
    for key in ("pretrained_cfg", "model_args", "sha256", "zoo"):
        if not isinstance(config.get(key, {}), dict):
            raise CheckpointError(f"{path}: {key} must be an object, not {config[key]!r:.60}")
    for name, digest in config.get("sha256", {}).items():
        if not name or "\0" in name or Path(name).name != name:
            raise CheckpointError(f"{path}: sha256 names {name!r:.60}, which is not a file of the folder")
        if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
            raise CheckpointError(f"{path}: sha256 of {name} must be 64 hexadecimal digits, not {digest!r:.60}")
    if "input" in config:
        try:
            config["input"] = inputs.check(config["input"])
        except inputs.InputError as error:
            raise CheckpointError(f"{path}: {error}; write the folder again with zoo.save_pretrained") from None
    _check_record(config, path)
    return config


#: Entry of a configuration with the hashes of :func:`record_hashes`.
RECORD_HASHES = "record_sha256"


def record_hashes(config: Mapping[str, Any]) -> dict[str, str]:
    """Hashes of what a configuration says about inputs, answers and a fitted estimator, so that a change is found.

    The names of the classes have one in their order, `label_names`, and one in sorted order, `labels`.
    """
    parts: dict[str, Any] = {key: config[key] for key in ("input", "estimator") if config.get(key)}
    if names := config.get("label_names"):
        parts |= {"label_names": list(names), "labels": sorted(names)}
    return {key: hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest() for key, part in parts.items()}


def _check_record(config: Mapping[str, Any], path: Path) -> None:
    """Refuse an input record that was changed, or classes in another order; classes may be given other names."""
    known = config.get(RECORD_HASHES, {})
    names = config.get("label_names")
    found = record_hashes({**config, "label_names": names if _are_words(names) else None})
    if not isinstance(known, dict):
        raise CheckpointError(f"{path}: {RECORD_HASHES} must be an object, not {known!r:.60}")
    odd = ""
    if "input" in known and found.get("input") != known["input"]:
        odd = "input, which says how files are prepared, is"
    elif "estimator" in known and found.get("estimator") != known["estimator"]:
        odd = "estimator, which says what was fitted, is"
    elif (
        "labels" in found
        and found["labels"] == known.get("labels")
        and found["label_names"] != known.get("label_names")
    ):
        odd = "label_names, which say what each output means, are"
    if odd:
        raise CheckpointError(
            f"{path}: {odd} not as saved: write the folder again with zoo.save_pretrained, or take {RECORD_HASHES} out "
            "of the file if the change is meant"
        )


def _are_words(names: Any) -> bool:
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def undisturbed(folder: str | Path, read: Callable[[], Result], names: Sequence[str] = ()) -> Result:
    """Result of `read`, with all files of a folder from before a concurrent write or all from after it.

    Args:
        folder: The folder to read.
        read: Called again if the files were replaced meanwhile, with the random state restored.
        names: The files that belong together; default: those of a saved model.
    """
    drawn = torch.get_rng_state()
    for i in range(_TRIES):
        if i == _TRIES - 1:  # last attempt: block the writers
            with writing(Path(folder)) as alone:
                if alone:
                    return read()
        before = still(Path(folder), names or (WEIGHTS_NAME, CONFIG_NAME))
        try:
            result = read()
        except Exception:  # possibly caused by a mixture of old and new files
            if still(Path(folder), names or (WEIGHTS_NAME, CONFIG_NAME)) == before:
                raise
        else:
            if still(Path(folder), names or (WEIGHTS_NAME, CONFIG_NAME)) == before:
                return result
        torch.set_rng_state(drawn)
    raise CheckpointError(f"{folder} is being written again and again: read it when its writer has ended")


def check_inside(path: Path, folder: Path) -> None:
    """Refuse a link that leads out of a model folder, except in hub caches, which link to a folder beside it.

    Raises:
        CheckpointError: The link leads elsewhere.
    """
    if leads_out(path, folder):
        raise CheckpointError(f"{path} leads to {path.resolve()}, outside its folder: copy the file itself there")


def as_path(source: object) -> Path:
    """The source as a path that the operating system accepts.

    Raises:
        CheckpointError: It is not a text or a path, or holds a NUL character.
    """
    if not isinstance(source, str | os.PathLike):
        raise CheckpointError(f"{source!r:.60} is not a path: give a text or a pathlib.Path")
    if "\0" in str(source):
        raise CheckpointError(f"{str(source)!r:.200} is not a path: it holds a NUL character")
    return Path(source)


# ---- hashes ------------------------------------------------------------------------------------------------


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file, as 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: Path, expected: str | None = None) -> None:
    """Compare a file with its expected hash, if there is one.

    Raises:
        CheckpointError: The hashes differ.
    """
    expected = expected or RECORDS.get(path.name, {}).get("sha256")
    if expected is None:
        return
    try:
        found = sha256_of(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {_reason(error)}") from error
    if not found.startswith(expected.lower()):
        raise CheckpointError(
            f"{path} is not the file on record: its sha256 is {found[:12]}..., expected {expected[:12]}...; "
            "copy or download it again, or rename it if it is meant to be another file"
        )


def check_recorded(path: Path) -> None:
    """Compare a weight file with the hash in the `config.json` beside it, if it has one.

    Raises:
        CheckpointError: The hashes differ, or the configuration is damaged.
    """
    path = as_path(path)
    if path.is_file() and (path.parent / CONFIG_NAME).is_file():
        with contextlib.suppress(DamagedFileError, FileNotFoundError):  # configuration of another program
            config = read_json(path.parent / CONFIG_NAME, _MAX_CONFIG)
            hashes = config.get("sha256") if isinstance(config, dict) else None
            digest = hashes.get(path.name) if isinstance(hashes, dict) else None
            if isinstance(digest, str):
                verify(path, digest)


# ---- finding -----------------------------------------------------------------------------------------------

_offline: ContextVar[str] = ContextVar("offline", default="")


@contextlib.contextmanager
def offline(reason: str) -> Iterator[None]:
    """Context in which nothing is downloaded: a file that is not available locally raises an error with the reason.

    Args:
        reason: A clause that says why, and how else to get the files.
    """
    token = _offline.set(reason)
    try:
        yield
    finally:
        _offline.reset(token)


def offline_reason() -> str:
    """Why downloads are disabled now; empty where they are allowed. Every function that opens an address asks."""
    return _offline.get()


def locate(source: str | Path) -> Path:
    """Path of the file for a source, downloaded if necessary and compared with its recorded hash.

    Args:
        source: A file, a folder (of a model or of a run), `local-dir:<folder>`, an https address, or
            `hf-hub:<organisation>/<name>[@revision][/<file>]`.

    Raises:
        CheckpointError: The file does not exist, cannot be downloaded (the message names it and where to place it by
            hand), or differs from its recorded hash.
    """
    text = str(source)
    prefix, _, rest = text.partition(":")
    if prefix in ("hf-hub", "hf_hub"):
        organisation, _, place = rest.partition("/")
        name, _, filename = place.partition("/")
        return fetch_hub(f"{organisation}/{name}", filename or None)
    if prefix == "local-dir":
        return _weights_of(Path(rest))
    if "://" in text:
        return fetch_url(text)
    path = as_path(source).expanduser()
    if path.is_dir():
        return _weights_of(path)
    _first_bytes(path)  # report a missing or empty file before a wrong hash
    verify(path)
    check_recorded(path)
    return path


def _weights_of(folder: Path) -> Path:
    """The only weight file of a folder, compared with the hash in its configuration; of a run folder, its model's."""
    folder = as_path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}")
    if not (folder / CONFIG_NAME).exists() and (folder / "model" / CONFIG_NAME).is_file():
        check_inside(folder / "model" / CONFIG_NAME, folder)
        folder = folder / "model"
    hashes = read_config(folder).get("sha256", {}) if (folder / CONFIG_NAME).exists() else {}
    found = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in _WEIGHT_SUFFIXES)
    preferred = [p for name in (*hashes, *_HUB_NAMES) if (p := folder / name) in found]
    if not preferred and (len(found) != 1 or hashes):
        has = f"it has {', '.join(p.name for p in found[:5])}" if found else "it has no weight file at all"
        wanted = next(iter(hashes), WEIGHTS_NAME)
        raise CheckpointError(f"{folder} has no {wanted} ({has}); name the file itself, or place {wanted} there")
    path = (preferred or found)[0]
    check_inside(path, folder)
    verify(path, hashes.get(path.name))
    return path


def weights_size(folder: str | Path) -> int:
    """Bytes of the largest weight file of a folder, 0 if it has none; nothing is read."""
    found = [p for p in as_path(folder).iterdir() if p.suffix in _WEIGHT_SUFFIXES and p.is_file()]
    return max((path.stat().st_size for path in found), default=0)


def fetch_url(url: str) -> Path:
    """Download a file once into torch's cache and compare it with its recorded hash."""
    parts = urllib.parse.urlsplit(url)
    name = Path(urllib.parse.unquote(parts.path)).name
    if parts.scheme != "https" or not name:
        raise CheckpointError(f"{url} cannot be used: weights come from https addresses that end in a file name")
    # two addresses may end in the same file name; known names are unique
    key = "" if name in RECORDS else hashlib.sha256(url.encode()).hexdigest()[:10] + "-"
    target = cache_folder() / f"{key}{name}"
    if not target.exists():
        if why := offline_reason():
            raise CheckpointError(f"{name} of {url} is not here, and {why}, or place it at {target}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(target), progress=False)
        except (OSError, urllib.error.URLError, ValueError) as error:
            raise CheckpointError(
                f"cannot download {url} ({_first_line(error)}); fetch it elsewhere and place it at {target}"
            ) from error
    tag = re.search(r"-([0-9a-f]{8,64})\.", name)  # torch's convention: the hash's first digits end the name
    _verify_fetched(target, tag.group(1) if tag else None)
    return target


def fetch_hub(repository: str, filename: str | None = None) -> Path:
    """Download a hub repository's weight file (safetensors preferred) once, and compare it with its recorded hash.

    Args:
        repository: `<organisation>/<name>`, with an optional `@revision`.
        filename: The file in the repository; default: the usual names are tried.
    """
    identifier, _, revision = repository.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", identifier):
        raise CheckpointError(f"hf-hub:{repository} is not of the form hf-hub:<organisation>/<name>")
    names = (filename,) if filename else _HUB_NAMES
    if filename and (by_hand := cache_folder() / filename).exists():
        _verify_fetched(by_hand, None)
        return by_hand
    for name in names:
        if (path := _hub_file(identifier, name, revision or None)) is not None:
            expected = None
            if (config := _hub_file(identifier, CONFIG_NAME, revision or None)) is not None:
                expected = read_config(config.parent).get("sha256", {}).get(name) if filename is None else None
            verify(path, expected)
            return path
    other = "" if filename else f"; name another one as hf-hub:{repository}/<file>"
    raise CheckpointError(f"hf-hub:{repository} has no file {' or '.join(names)}{other}")


def hub_config(repository: str) -> dict[str, Any]:
    """The `config.json` of a hub repository; empty if there is none.

    Args:
        repository: `<organisation>/<name>`, with an optional `@revision`.
    """
    identifier, _, revision = repository.partition("@")
    path = _hub_file(identifier, CONFIG_NAME, revision or None)
    return read_config(path.parent) if path is not None else {}


def _hub_file(repository: str, name: str, revision: str | None) -> Path | None:
    """A file of a hub repository, or None if the repository does not have it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    cached = bool(offline_reason()) or not _hub_answers(repository, name, revision)
    try:
        return Path(hf_hub_download(repository, name, revision=revision, local_files_only=cached))
    except Exception as error:  # the client passes on errors of several libraries
        absent = isinstance(error, LocalEntryNotFoundError)
        if name == CONFIG_NAME or (isinstance(error, EntryNotFoundError) and not absent):
            return None
        why = offline_reason() or "no connection, and it is not in the cache" if absent else _first_line(error)
        by_hand = f"place it at {cache_folder() / name}" if name not in _HUB_NAMES else "pass the path of its folder"
        raise CheckpointError(
            f"cannot download {name} of hf-hub:{repository} ({why}); fetch it elsewhere and {by_hand}"
        ) from error


def _hub_answers(repository: str, name: str, revision: str | None) -> bool:
    """Whether the hub can be reached, by one short attempt: its client repeats failed ones for half a minute."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(hf_hub_url(repository, name, revision=revision), timeout=_PATIENCE)
    except HfHubHTTPError:  # an answer, which the download tells
        return True
    except Exception:  # no connection, of several libraries
        return False
    return True


def _verify_fetched(path: Path, expected: str | None) -> None:
    try:
        verify(path, expected)
    except CheckpointError as error:
        raise CheckpointError(f"{error} (remove {path} first)") from None


def cache_folder() -> Path:
    """Where downloads are cached: torch's own folder (`TORCH_HOME` moves it)."""
    return Path(torch.hub.get_dir()) / "checkpoints"
