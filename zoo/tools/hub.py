"""Publishing weights in the hub layout: `config.json`, `model.safetensors`, `README.md`.

>>> push("unireplknet_z.mnist5k", "local-dir:mirror")              # or "hf-hub:<organisation>/<name>"
>>> zoo.create_model("local-dir:mirror", pretrained=True)          # so does timm.create_model
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from zoo.registry.checkpoints import save_pretrained
from zoo.support.files import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    CheckpointError,
    as_path,
    check_replaceable,
    write_all,
    writer_of,
)
from zoo.support.values import DamagedFileError, check_output, read_json, read_text
from zoo.tools import estimators
from zoo.tools.cards import card
from zoo.tools.errors import ToolError
from zoo.tools.evaluation import load, record_of
from zoo.tools.pretrained import check_outside_runs

__all__ = ["push"]

_MARK = "\n<!-- written by Kernel Zoo; a text that was changed is kept; sha256 "


def push(model: str, target: str, *, private: bool = False, api: Any = None) -> str:
    """Publish a shipped weight, the model of a run, or a saved estimator, with its card.

    Args:
        model: Name of a shipped weight, the folder of a finished run (or `local-dir:` of the model in it), or the
            folder of a saved estimator.
        target: `hf-hub:<organisation>/<name>`, or `local-dir:<folder>`.
        private: Whether a new repository is private.
        api: Client of the hub; `huggingface_hub.HfApi()` by default.

    Returns:
        The name for `zoo.create_model`.

    Raises:
        CheckpointError: The target is a run's, or holds another model than an earlier push of this one.
        ToolError: The target is invalid, has a README.md not written by the zoo, or is refused by the hub. Nothing is
            changed.
    """
    place, _, rest = target.partition(":")
    place = place.replace("_", "-")
    if place == "hf-hub" and not re.fullmatch(r"[\w.-]+/[\w.-]+", rest):
        raise ToolError(f"{target} is not of the form hf-hub:<organisation>/<name>")
    if place not in ("hf-hub", "local-dir") or not rest:
        raise ToolError(f"{target!r} is not a valid target: write hf-hub:<organisation>/<name> or local-dir:<folder>")
    if place == "local-dir":
        check_outside_runs(as_path(rest))
    saved = estimators.open_estimator(model)
    with tempfile.TemporaryDirectory() as folder:
        if saved is None:
            text, name, files = _of_model(model, place, rest, Path(folder))
        else:
            text, name, files = _of_estimator(saved, place, rest, Path(folder))
        files["README.md"] = f"{text}{_MARK}{_digest(text)} -->\n".encode()
        if place == "local-dir":
            _check_own(check_output(rest), text)
            _check_same(Path(rest), text, files[CONFIG_NAME])
            write_all({Path(rest) / file: writer_of(content) for file, content in files.items()})
        else:
            for file, content in files.items():
                (Path(folder) / file).write_bytes(content)
            _upload(Path(folder), rest, name, private, api)
    return f"{place}:{rest}"


def _of_model(model: str, place: str, rest: str, folder: Path) -> tuple[str, str, dict[str, bytes]]:
    """Card, name and files of a model, which `folder` is free for."""
    record = record_of(model)
    if "folder" in record:  # of a run, whose own folder says nothing to others
        record["name"] = Path(rest).name
    text = card(record, f"{place}:{rest}")
    staged = save_pretrained(load(model, deploy=False), folder, class_names=record["class_names"] or None)
    files = {name: (staged / name).read_bytes() for name in (WEIGHTS_NAME, CONFIG_NAME)}
    tokenizer = Path(record.get("folder", folder)) / "tokenizer.json"  # of a text model's run
    if tokenizer.is_file():
        files[tokenizer.name] = tokenizer.read_bytes()
    return text, record["name"], files


def _of_estimator(
    saved: estimators.SavedEstimator, place: str, rest: str, folder: Path
) -> tuple[str, str, dict[str, bytes]]:
    """Card, name and files of an estimator, written anew: nothing else of its folder is published."""
    from zoo.estimators.saved import save_estimator

    name = Path(rest).name
    staged = save_estimator(saved.estimator, folder, input_record=saved.config["input"])
    files = {file: (staged / file).read_bytes() for file in (WEIGHTS_NAME, CONFIG_NAME)}
    written = replace(saved, weights=staged / WEIGHTS_NAME)
    return estimators.card(written, name if place == "local-dir" else f"{place}:{rest}"), name, files


def _check_own(folder: Path, text: str) -> None:
    """Refuse a folder with files that the zoo did not write; `text` is the new card."""
    path = folder / "README.md"
    if os.path.lexists(path) and not (folder / CONFIG_NAME).exists():
        raise ToolError(f"{folder} holds a README.md and no model: choose another folder")
    check_replaceable(folder)
    if not os.path.lexists(path):
        return
    try:
        found = read_text(path)
    except (OSError, DamagedFileError):
        found = ""
    body, _, mark = found.rpartition(_MARK)
    if found != text and mark.rstrip("\n") != f"{_digest(body)} -->":
        raise ToolError(f"{path} is not a card as the zoo wrote it and stays: move it away, or choose another folder")


#: What a card says that a model keeps when it is trained again: its name, data, command and columns.
_LASTING = ("# ", "| data |", "| trained by |", "| classes |", "| features |", "| columns |", "| answers |")
_SECONDS = re.compile(r", \d+ s \|$")


def _check_same(folder: Path, text: str, config: bytes) -> None:
    """Refuse a folder with a model that is neither the same nor an earlier push from the same source.

    Args:
        folder: Passed :func:`_check_own`, so that its card, if any, is one of the zoo's.
        text: The new card.
        config: The new `config.json`.
    """
    if not os.path.lexists(folder / CONFIG_NAME):
        return
    found, new = read_json(folder / CONFIG_NAME), json.loads(config)
    same = all(found.get(key) == new.get(key) for key in ("architecture", "num_classes", "label_names"))
    if same and found.get("sha256") == new.get("sha256"):
        return
    card = folder / "README.md"
    if same and os.path.lexists(card) and _lasting(read_text(card)) == _lasting(text):
        return
    raise CheckpointError(
        f"{folder} holds another model, {found['architecture']!r:.60}, which is no earlier push of this one: choose "
        "another folder, or remove that one"
    )


def _lasting(text: str) -> list[str]:
    return [_SECONDS.sub(" |", line) for line in text.splitlines() if line.startswith(_LASTING)]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _upload(folder: Path, repository: str, name: str, private: bool, api: Any) -> None:
    from huggingface_hub import HfApi

    client = api or HfApi()
    try:
        client.create_repo(repository, private=private, exist_ok=True)
        client.upload_folder(repo_id=repository, folder_path=str(folder), commit_message=f"{name} of Kernel Zoo")
    except Exception as error:  # the client raises errors of several libraries
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ToolError(
            f"the hub refuses {repository} ({reason}); log in with `hf auth login`, or check the name"
        ) from (error)
