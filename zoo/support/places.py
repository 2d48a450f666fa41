"""Places of data that a run folder names, and the signature that shows whose they are.

A run remembers where its data was, and a run folder may come from anyone: whoever writes one could name the folders of
its reader. So a run signs these places with a secret of the user who started it (HMAC-SHA256 with the 32 random bytes
of `kernel-zoo/secret` in `$XDG_CONFIG_HOME` or `~/.config`, which only this user may read). A recorded place outside of
the run folder is read only if the signature beside it is valid for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from zoo.support.signatures import flatten
from zoo.support.values import DamagedFileError, read_text, read_yaml

__all__ = [
    "SIGNATURE",
    "anchored",
    "data_section",
    "is_place",
    "names_place",
    "not_vouched",
    "places_in",
    "resolved",
    "sign",
    "unknown",
    "vouched",
]

SIGNATURE = ".hydra/places.sig"  # in a run folder
_HYDRA = ".hydra/hydra.yaml"  # in a run folder: where it was started, among others
_BYTES = 32

_NAMES = re.compile(r"(^|_)(folder|path|root|file|cache)$|dir$|dirpath$")


def is_place(key: str, value: Any) -> bool:
    """Whether an argument of a data module is a path, by its key."""
    return isinstance(value, str) and names_place(key)


def _leads_somewhere(key: str, value: Any) -> bool:
    """Whether a value is a path: by its key, or because it leads out of the working folder."""
    if not isinstance(value, str) or value in ("", "???"):
        return False
    if is_place(key, value) or (key == "name" and re.search(r"[./\\]", value)):
        return True
    return bool(re.match(r"[/~].|\\\\|[A-Za-z]:[/\\]", value)) or ".." in PureWindowsPath(value).parts


def names_place(key: str) -> bool:
    """Whether a dotted key is that of a path."""
    return _NAMES.search(key.rpartition(".")[2]) is not None


def resolved(value: Any, config: Mapping[str, Any]) -> Any:
    """A value of a recorded configuration, with `${key}` references resolved; nothing else is looked up."""
    if isinstance(value, dict):
        return {k: resolved(v, config) for k, v in value.items()}
    if isinstance(value, str) and (found := re.fullmatch(r"\$\{([\w.]+)\}", value)):
        node: Any = config
        for key in found[1].split("."):
            node = node.get(key) if isinstance(node, dict) else None
        return node
    return value


def data_section(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `data` section of a recorded configuration; own data is its `path`, which a series had as its name, too."""
    section = dict(resolved(config["data"], config))
    name = section.get("name")
    if isinstance(name, str) and re.search(r"[./\\]", name) and not section.get("path"):
        section["path"] = name
    if section.get("path"):  # not the published set of that name
        section.pop("name", None)
    return section


def anchored(section: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """A recorded data section whose relative places start where the run did, if this user's signature says so.

    Where that was is in the run folder, which may come from anyone: without the signature the section stays as it is,
    and so do places that the working folder of today has at the same place.
    """
    try:
        found = read_yaml(run / _HYDRA)
        start = Path(found["hydra"]["runtime"]["cwd"])
    except (DamagedFileError, OSError, KeyError, TypeError, ValueError):
        return dict(section)

    def moved(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: moved(name, one) for name, one in value.items()}
        if isinstance(value, list | tuple):
            return [moved(key, one) for one in value]
        if not _leads_somewhere(key, value) or value.startswith("~") or Path(value).is_absolute():
            return value
        return str(start / value)

    if not start.is_absolute() or _absolute(str(start)) == _absolute("."):
        return dict(section)
    section_there = {key: moved(key, value) for key, value in section.items()}
    return section_there if vouched(places_in(section_there, run), run) else dict(section)


def places_in(section: Mapping[str, Any], run: Path) -> dict[str, str]:
    """The places that a data section names outside of a run folder: key to absolute path, with links followed.

    A series' `name` that is a path counts as its `path`.
    """
    found: dict[str, str] = {}
    for key, value in flatten(section):
        parts = value if isinstance(value, list | tuple) else [value]
        for i, part in enumerate(parts):
            if not _leads_somewhere(key, part):
                continue
            name = "path" if key == "name" and not section.get("path") else key
            place = _absolute(part)
            if not place.is_relative_to(run.resolve()):
                found[name if part is value else f"{name}.{i}"] = str(place)
    return found


def _absolute(path: str) -> Path:
    try:
        return Path(path).expanduser().resolve()
    except (OSError, RuntimeError, ValueError):  # no home, a loop of links, a NUL character
        return Path(os.path.abspath(path.replace("\0", "?")))


# ---- the signature -----------------------------------------------------------------------------------------


def sign(places: Mapping[str, str]) -> str | None:
    """The signature of places; None if the user's secret can be neither read nor written."""
    secret = _secret(create=True)
    return None if secret is None else _signature(secret, places)


def vouched(recorded: Mapping[str, str], run: Path) -> dict[str, str]:
    """The recorded places of a run, if the signature in its folder is this user's; otherwise none."""
    try:
        signature = read_text(run / SIGNATURE, limit=1000).strip()
    except (DamagedFileError, OSError):
        return {}
    secret = _secret()
    valid = secret is not None and hmac.compare_digest(_signature(secret, recorded).encode(), signature.encode())
    return dict(recorded) if valid else {}


def not_vouched(used: Mapping[str, str], known: Mapping[str, str]) -> list[str]:
    """Keys of the places that will be used and are not among those vouched for."""
    return [key for key, place in used.items() if known.get(key) != place]


def unknown(places: Mapping[str, str], keys: Iterable[str], remedy: str) -> str:
    """The sentence for places that nobody vouches for."""
    named = " and ".join(dict.fromkeys(places[key][:200] for key in keys))
    return f"the run names data at {named}, and is not known to be made by you on this machine: {remedy}"


def _signature(secret: bytes, places: Mapping[str, str]) -> str:
    text = json.dumps(["data places of a run", sorted(places.items())])
    return hmac.new(secret, text.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()


def _secret(create: bool = False) -> bytes | None:
    """The user's secret, made at the first use; None if there is none, or others may read or replace it."""
    try:
        home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
        path = home.absolute() / "kernel-zoo" / "secret"
        if create and not path.exists():
            _create(path)
        with path.open("rb") as file:
            state = os.fstat(file.fileno())
            content = file.read(_BYTES + 1)
    except (OSError, RuntimeError, ValueError):
        return None
    private = os.name != "posix" or (state.st_uid == os.geteuid() and not state.st_mode & 0o077)
    return content if private and len(content) == _BYTES else None


def _create(path: Path) -> None:
    """Write a new secret; of several processes at once, the first one's counts."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".secret-{os.getpid()}-{secrets.token_hex(4)}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)  # unlike a renaming, it never replaces
    finally:
        temporary.unlink(missing_ok=True)
