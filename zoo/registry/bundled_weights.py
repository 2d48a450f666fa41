"""Weights that ship with the zoo: small trained models and their metadata, registered in timm with the others.

Each consists of two files, `NAME.safetensors` and `NAME.json` (the record), where NAME is `<architecture>.<tag>`;
`python -m zoo ship` writes both from run folders. Reading a record only reads its JSON.

>>> create_model("unireplknet_z.mnist5k", pretrained=True)     # offline; the file's hash is checked
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypedDict

from timm.models import PretrainedCfg, is_model, resolve_pretrained_cfg
from timm.models import _registry as registry

from zoo.support import inputs
from zoo.support.files import RECORDS, CheckpointError, locate, sha256_of
from zoo.support.signatures import check_values
from zoo.support.suggest import suggestion
from zoo.support.values import DamagedFileError, first_line, read_json

__all__ = ["check", "check_record", "folder", "read_record", "record", "records", "register", "weights_path"]

_log = logging.getLogger(__name__)

_HERE = Path(__file__).resolve().parent.parent
NAME = re.compile(r"[a-z0-9_]+\.[a-z0-9_]+")
MAX_BYTES = 5_000_000  # of one weight file
MAX_FOLDER = 40_000_000
_MAX_RECORD = 1_000_000

#: Fields of a record and their types.
FIELDS: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "architecture": str,
    "tag": str,
    "model_args": dict,
    "pretrained_cfg": dict,
    "class_names": list,
    "feature_names": list,
    "preprocessing": dict,
    "parameters": int,
    "sha256": str,
    "bytes": int,
    "metric": dict,  # name, value and seed of this file, mean and sd over n seeds
    "metrics": dict,
    "data": dict,  # title, licence, source, config, rows of each part
    "task": dict,
    "license": str,  # of the weights
    "code_license": str,
    "experiment": str,
    "command": str,
    "seconds": (int, float),
    "versions": dict,
    "hardware": dict,
}
_NUMBER, _NO_SPREAD = (int, float), (type(None),)  # of one seed
_METRIC = {"name": str, "value": _NUMBER, "seed": int, "mean": _NUMBER, "sd": _NUMBER + _NO_SPREAD, "n": int}


def folder() -> Path:
    """Folder of the shipped weights: in the installed package, or beside it in a checkout."""
    inside = _HERE / "weights"
    return inside if inside.is_dir() else _HERE.parent / "checkpoints"


def records(where: Path | None = None) -> dict[str, dict[str, Any]]:
    """Every readable record by name, sorted; damaged ones are logged and skipped."""
    found = {}
    for path in sorted((where or folder()).glob("*.json")):
        try:
            found[path.stem] = read_record(path)
        except CheckpointError as error:
            _log.warning("%s", error)
    return found


def record(name: str, where: Path | None = None) -> dict[str, Any]:
    """Record of a shipped weight.

    Raises:
        CheckpointError: The name is unknown, or its record is damaged.
    """
    where = where or folder()
    if not NAME.fullmatch(name) or not (where / f"{name}.json").is_file():
        names = sorted(p.stem for p in where.glob("*.json"))
        raise CheckpointError(f"no weights named {name!r} ship with the zoo{suggestion(name, names)}")
    return read_record(where / f"{name}.json")


def read_record(path: Path) -> dict[str, Any]:
    """Read and check one record.

    Raises:
        CheckpointError: It is not a record, or a field is missing; the message names it.
    """
    try:
        content = read_json(path, _MAX_RECORD)
    except (OSError, DamagedFileError) as error:
        raise CheckpointError(f"{path} is not a readable record ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a record: it holds a {type(content).__name__}")
    check_record(path, content)
    if content["name"] != path.stem or not NAME.fullmatch(path.stem):
        raise CheckpointError(f"{path} is the record of {content['name']!r:.60}, which its file name must say")
    if content["name"] != f"{content['architecture']}.{content['tag']}":
        raise CheckpointError(f"{path}: name must be architecture.tag")
    if not re.fullmatch("[0-9a-f]{64}", content["sha256"]):
        raise CheckpointError(f"{path}: sha256 must be 64 hexadecimal digits")
    known = {f.name for f in fields(PretrainedCfg)}
    if unknown := content["pretrained_cfg"].keys() - known:
        raise CheckpointError(f"{path}: pretrained_cfg has entries timm does not know: {', '.join(sorted(unknown))}")
    if "input" in content:
        try:
            content["input"] = inputs.check(content["input"])
        except inputs.InputError as error:
            raise CheckpointError(f"{path}: {error}") from None
    return content


class _Inner(TypedDict, total=False):
    """Types of nested entries of a record."""

    class_names: list[str]
    feature_names: list[str]
    metrics: dict[str, float]
    versions: dict[str, str]
    hardware: dict[str, str | int | float | bool | None]


class _Data(TypedDict, total=False):
    title: str
    license: str
    source: str
    rows: dict[str, int]
    config: dict[str, Any]


class _Shares(TypedDict, total=False):
    whole: dict[str, int]  # samples of parts of the data that were used in part


class _Preprocessing(TypedDict, total=False):
    input_size: list[int]
    mean: list[float]
    std: list[float]
    interpolation: str
    crop_pct: float
    crop_mode: str


def check_record(path: Path, content: Mapping[str, Any]) -> None:
    """Check the types of all entries of a record.

    Raises:
        CheckpointError: An entry is missing or has the wrong type; the message names it.
    """
    _check_types(path, "", content, FIELDS)
    _check_types(path, "metric.", content["metric"], _METRIC)
    _check_types(path, "data.", content["data"], dict.fromkeys(_Data.__annotations__, (str, dict)))
    problems = check_values(_Inner, content) + check_values(_Data, content["data"], "data")
    problems += check_values(_Shares, content["data"], "data")
    problems += check_values(_Preprocessing, content["preprocessing"], "preprocessing")
    if problems:
        raise CheckpointError(f"{path}: {problems[0][:300]}")


def _check_types(path: Path, prefix: str, content: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for key, kind in expected.items():
        if key not in content:
            raise CheckpointError(f"{path} lacks {prefix}{key}: write it again with `python -m zoo ship`")
        if not isinstance(content[key], kind) or isinstance(content[key], bool):
            raise CheckpointError(f"{path}: {prefix}{key} has the wrong type, {type(content[key]).__name__}")


def weights_path(name: str, where: Path | None = None) -> Path:
    """The weight file of a name."""
    return (where or folder()) / f"{name}.safetensors"


def check(where: Path | None = None) -> list[str]:
    """Problems of a folder of shipped weights, one line each; empty if there are none."""
    where = where or folder()
    problems, total = [], 0
    for path in sorted(where.glob("*.json")):
        try:
            content = read_record(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        weights = weights_path(path.stem, where)
        if not weights.is_file():
            problems.append(f"{path} has no {weights.name} beside it")
            continue
        size = weights.stat().st_size
        total += size
        if size != content["bytes"] or sha256_of(weights) != content["sha256"]:
            problems.append(f"{weights} is not the file on record")
        if size > MAX_BYTES:
            problems.append(f"{weights} has {size} bytes, more than the {MAX_BYTES} that may ship")
        if not is_model(content["architecture"]):
            problems.append(f"{path} names {content['architecture']}, which is not registered")
    orphans = {p.stem for p in where.glob("*.safetensors")} - {p.stem for p in where.glob("*.json")}
    problems += [f"{weights_path(name, where)} has no record beside it" for name in sorted(orphans)]
    if total > MAX_FOLDER:
        problems.append(f"the weights in {where} have {total} bytes, more than {MAX_FOLDER}")
    return problems


def register(found: Iterable[Mapping[str, Any]] | None = None, where: Path | None = None) -> None:
    """Register shipped weights in timm, with the arguments of their architecture.

    The untagged name keeps its own configuration: a tag stands for a data set, and no data set is the default.
    """
    arguments: dict[str, dict[str, Mapping[str, Any]]] = {}
    for entry in found if found is not None else records(where).values():
        name, arch, tag = entry["name"], entry["architecture"], entry["tag"]
        if name in registry._model_pretrained_cfgs or not is_model(arch):
            continue
        cfg, file = PretrainedCfg(**entry["pretrained_cfg"]), weights_path(name, where)
        labels = tuple(entry["class_names"]) or None
        registry._model_pretrained_cfgs[name] = replace(
            cfg, architecture=arch, tag=tag, file=str(file), label_names=labels
        )
        registry._model_has_pretrained.add(name)
        registry._model_with_tags[arch].append(name)
        RECORDS.setdefault(file.name, {"sha256": entry["sha256"], "model": name})
        arguments.setdefault(arch, {})[tag] = entry["model_args"]
    for arch, by_tag in arguments.items():
        registry._model_entrypoints[arch] = _with_weights(registry._model_entrypoints[arch], by_tag)


def _with_weights(entry: Callable[..., Any], by_tag: Mapping[str, Mapping[str, Any]]) -> Callable[..., Any]:
    """An entry point that builds `arch.tag` with the arguments of that weight (which the caller may override), and
    verifies the file's hash before timm reads it.
    """

    @functools.wraps(entry)
    def build(
        pretrained: bool = False, pretrained_cfg: Any = None, pretrained_cfg_overlay: Any = None, **kwargs: Any
    ) -> Any:
        tag = pretrained_cfg if isinstance(pretrained_cfg, str) else getattr(pretrained_cfg, "tag", None)
        own = by_tag.get(tag or "", {})
        if pretrained and tag in by_tag:
            cfg = resolve_pretrained_cfg(entry.__name__, pretrained_cfg, pretrained_cfg_overlay)
            if cfg.file and not cfg.source and not cfg.state_dict:
                locate(cfg.file)
        given = {"pretrained_cfg": pretrained_cfg, "pretrained_cfg_overlay": pretrained_cfg_overlay}
        model = entry(pretrained, **given, **{**own, **kwargs})
        if own:
            model._model_args = {**own, **{k: v for k, v in kwargs.items() if v is not None}}
        return model

    return build
