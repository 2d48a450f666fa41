"""Listing class folders of images, recordings or videos.

A class is a folder with files at any depth. Hidden files (leading dot) are ignored; other suffixes too, with a note. A
link is followed only if it stays in its class folder and leads to nothing already visited: otherwise it would give this
class's label to other files.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zoo.data.checks import DataError, warn_once
from zoo.support.quoting import shown

__all__ = ["PARTS", "Files", "below", "check_spelling", "class_folders", "parts", "scan", "scan_like"]

PARTS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


@dataclass(frozen=True)
class Files:
    """A kind of file.

    Attributes:
        one: Singular, for messages.
        many: Plural, for messages.
        suffixes: File suffixes, lower case.
        hidden: Prefixes of folder names to ignore.
        missing: Message for a missing folder; `{folder}` and `{reason}` are filled in.
        empty: Message for a folder without class folders; `{folder}` and `{many}` are filled in.
    """

    one: str
    many: str
    suffixes: tuple[str, ...]
    hidden: tuple[str, ...] = (".",)
    missing: str = (
        "no data folder {folder} ({reason}): set data.path=... to a folder with train/ and val/, or to one with a "
        "folder for each class"
    )
    empty: str = "{folder} holds no class folders: put the {many} of each class into a folder of its name"


def class_folders(folder: Path, files: Files) -> list[str]:
    """Names of the class folders in `folder`, sorted.

    Raises:
        DataError: The folder is missing, has no folders, or two whose names look the same.
    """
    try:
        with os.scandir(folder) as entries:
            found = [e for e in entries if e.is_dir() and not e.name.startswith(files.hidden)]
    except OSError as error:
        raise DataError(files.missing.format(folder=folder, reason=error.strerror)) from error
    left_out = _not_followed(folder, sorted(e.name for e in found if e.is_symlink()))
    links = f"links that lead out of the data, or back into it, are not followed: {_first_names(left_out)}"
    if left_out:
        warn_once(f"{folder}: {links}")
    names = sorted(e.name for e in found if e.name not in left_out)
    if not names:
        message = files.empty.format(folder=folder, many=files.many)
        raise DataError(f"{message}; {links}" if left_out else message)
    check_spelling(names, str(folder), "class folders")
    return names


def check_spelling(names: Sequence[str], place: str, what: str) -> None:
    """Warn of names that differ in capital letters only.

    Args:
        names: Names of classes.
        place: Where they are, for messages.
        what: What has the names.

    Raises:
        DataError: Two names look the same.
    """
    seen: dict[str, str] = {}
    cases: dict[str, str] = {}
    for name in names:
        look = unicodedata.normalize("NFC", shown(name, keep=""))  # as saved with the weights
        twin = seen.setdefault(look, name)
        if twin != name:
            raise DataError(f"{place} holds two {what} that look the same, {_spelled(twin, name)}: merge them")
        twin = cases.setdefault(look.casefold(), name)
        if twin != name:
            warn_once(f"{place}: the {what} {twin!a} and {name!a} differ in capital letters only: two classes")


def _not_followed(folder: Path, links: Sequence[str]) -> list[str]:
    """Linked class folders that lead out of the data root, into a part, or into another linked folder."""
    here, named = folder.resolve(), {name for names in PARTS.values() for name in names}
    root = here.parent if folder.name in named else here
    taken = [here, *((root / name).resolve() for name in named if (root / name).is_dir())]
    left_out = []
    for name in links:
        place = (folder / name).resolve()
        if not place.is_relative_to(root) or _overlaps(place, taken):
            left_out.append(name)
        else:
            taken.append(place)
    return left_out


def _overlaps(place: Path, others: Sequence[Path]) -> bool:
    """Whether a folder equals, contains or lies in one of the others."""
    return any(place.is_relative_to(other) or other.is_relative_to(place) for other in others)


def _spelled(one: str, other: str) -> str:
    """Two spellings of a name in ASCII, so that they can be told apart."""
    same = unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other)
    return f"{one!a} and {other!a}" + (" (accents as part of the letter, or as a sign of their own)" if same else "")


def _first_names(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(sorted(names)[:most]) + (", ..." if len(names) > most else "")


def scan(folder: Path, names: Sequence[str], files: Files) -> tuple[list[str], list[int]]:
    """Files below each class folder, sorted, and the index of their class in `names`.

    Raises:
        DataError: A class has no files.
    """
    paths: list[str] = []
    targets: list[int] = []
    unused = [e.path for e in _entries(str(folder)) if e.name.lower().endswith(files.suffixes) and e.is_file()]
    unused = [path for path in unused if not os.path.basename(path).startswith(".")]
    for target, name in enumerate(names):
        found = below(folder / name, files, unused)
        if not found:
            kinds = " ".join(files.suffixes)
            raise DataError(
                f"class folder {folder / name} holds no {files.one} ({kinds}): add some or remove the folder"
            )
        paths += found
        targets += [target] * len(found)
    if unused:
        counted = Counter(os.path.splitext(path)[1].lower() or "no suffix" for path in unused).most_common()
        told = ", ".join(f"{n} {kind}" for kind, n in counted[:5]) + (", ..." if len(counted) > 5 else "")
        warn_once(
            f"{folder}: {len(unused)} file(s) beside the {len(paths)} {files.many} in class folders are not used: "
            f"{told}, such as {min(unused)} (used are {' '.join(files.suffixes)})"
        )
    return paths, targets


def below(folder: Path, files: Files, unused: list[str] | None = None) -> list[str]:
    """Files at any depth, sorted. Links are followed last, and only to unvisited places below `folder`.

    Args:
        folder: The folder.
        files: Their kind.
        unused: Takes the files of other suffixes.

    Raises:
        DataError: A folder cannot be read.
    """
    top = os.path.realpath(folder)
    visited, found, left_out, waiting, links = {top}, [], [], [str(folder)], []  # type: ignore[var-annotated]
    others: list[str] = [] if unused is None else unused
    while waiting or links:
        if waiting:
            for entry in _entries(waiting.pop()):
                if entry.name.startswith("."):
                    continue
                if entry.is_symlink():
                    links.append(entry.path)
                elif entry.is_dir():
                    visited.add(os.path.realpath(entry.path))
                    waiting.append(entry.path)
                elif entry.is_file():
                    (found if entry.name.lower().endswith(files.suffixes) else others).append(entry.path)
            continue
        link = links.pop()
        real = os.path.realpath(link)
        if not real.startswith(top + os.sep) or not os.path.exists(real):
            left_out.append(os.path.basename(link))
        elif os.path.isdir(real) and real not in visited:
            visited.add(real)
            waiting.append(link)
        elif os.path.isfile(real) and not _is_listed(real, top, files):
            (found if link.lower().endswith(files.suffixes) else others).append(link)
    if left_out:
        warn_once(
            f"{folder}: links that lead out of this folder, or nowhere, are not followed: {_first_names(left_out)}"
        )
    return sorted(found)


def _is_listed(path: str, top: str, files: Files) -> bool:
    """Whether a file below `top` is listed without links."""
    inside = Path(path).relative_to(top).parts
    return path.lower().endswith(files.suffixes) and not any(part.startswith(".") for part in inside)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(f"cannot read the folder {folder} ({error.strerror})") from error


def scan_like(folder: Path, training: Path, names: Sequence[str], files: Files) -> tuple[list[str], list[int]]:
    """Files of another part, which must have the class folders of the training part.

    Raises:
        DataError: The parts have different classes, or share a folder.
    """
    mine, theirs = set(names), set(class_folders(folder, files))
    written = {unicodedata.normalize("NFC", name): name for name in mine - theirs}
    for name in sorted(theirs - mine):
        if (twin := written.get(unicodedata.normalize("NFC", name))) is not None:
            raise DataError(
                f"a class folder is spelled differently in {training} and in {folder}, {_spelled(twin, name)}: "
                "rename one"
            )
    for missing, there, where in ((mine - theirs, training, folder), (theirs - mine, folder, training)):
        if missing:
            raise DataError(
                f"{len(missing)} class folder(s) of {there} are missing in {where}: {_first_names(list(missing))}; "
                "both need the same classes"
            )
    for name in names:
        if _overlaps((folder / name).resolve(), [(training / name).resolve()]):
            raise DataError(
                f"{folder / name} and {training / name} are the same folder: give each part files of its own"
            )
    return scan(folder, names, files)


def parts(root: Path) -> dict[str, Path]:
    """Folders of the parts that exist: `train`, `val` (or `valid`, `validation`) and `test`.

    Without `train/`, the root is the training part, and every folder in it a class; a class that is named as a part
    is told.

    Raises:
        DataError: A part is a link out of the root or to another part; or there are parts, but no training part.
    """
    places = {part: next((root / n for n in names if (root / n).is_dir()), None) for part, names in PARTS.items()}
    found = {part: folder for part, folder in places.items() if folder is not None}
    names = {folder.name for folder in found.values()}
    beside = [] if not found else [e.name for e in _entries(str(root)) if e.is_dir() and not e.name.startswith(".")]
    beside = [name for name in beside if name not in names]
    if "train" not in found:
        if found and not beside:
            there = " and ".join(f"{name}/" for name in sorted(names))
            raise DataError(f"{root} has {there} and no train/: the classes are those of the training part")
        for name in sorted(names):
            warn_once(f"{root}: {name}/ is taken as a class, as there is no train/")
        return {"train": root}
    if beside:
        known = ", ".join(" or ".join(names) for names in PARTS.values())
        warn_once(f"{root}: not used beside train/: {_first_names(beside)}; the folders of the parts are {known}")
    for folder in found.values():
        if folder.is_symlink() and not _is_apart(folder, root, [other for other in found.values() if other != folder]):
            raise DataError(
                f"{folder} is a link that leads out of {root}, or to another part: put the folder itself there"
            )
    return found


def _is_apart(link: Path, root: Path, others: Sequence[Path]) -> bool:
    """Whether a linked part lies below `root` and overlaps no other part."""
    place, home = link.resolve(), root.resolve()
    if place == home or not place.is_relative_to(home):
        return False
    return not _overlaps(place, [other.resolve() for other in others])
