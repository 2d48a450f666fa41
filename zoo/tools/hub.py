"""Publishing weights in the hub layout: `config.json`, `model.safetensors`, `README.md`.

>>> push("unireplknet_z.mnist5k", "local-dir:mirror")              # or "hf-hub:<organisation>/<name>"
>>> zoo.create_model("local-dir:mirror", pretrained=True)          # so does timm.create_model
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from zoo.registry.checkpoints import save_pretrained
from zoo.support.files import CONFIG_NAME, WEIGHTS_NAME, check_replaceable, write_all, writer_of
from zoo.support.values import DamagedFileError, check_output, read_text
from zoo.tools.cards import card
from zoo.tools.errors import ToolError
from zoo.tools.evaluation import load, record_of

__all__ = ["push"]

_MARK = "\n<!-- written by Kernel Zoo; a text that was changed is kept; sha256 "


def push(model: str, target: str, *, private: bool = False, api: Any = None) -> str:
    """Publish a shipped weight, or the model of a run, with its model card.

    Args:
        model: Name of a shipped weight, or the folder of a finished run (or `local-dir:` of the model in it).
        target: `hf-hub:<organisation>/<name>`, or `local-dir:<folder>`.
        private: Whether a new repository is private.
        api: Client of the hub; `huggingface_hub.HfApi()` by default.

    Returns:
        The name for `zoo.create_model`.

    Raises:
        ToolError: The target is invalid, has a README.md not written by the zoo, or is refused by the hub. Nothing is
            changed.
    """
    place, _, rest = target.partition(":")
    place = place.replace("_", "-")
    if place == "hf-hub" and not re.fullmatch(r"[\w.-]+/[\w.-]+", rest):
        raise ToolError(f"{target} is not of the form hf-hub:<organisation>/<name>")
    if place not in ("hf-hub", "local-dir") or not rest:
        raise ToolError(f"{target!r} is not a valid target: write hf-hub:<organisation>/<name> or local-dir:<folder>")
    record = record_of(model)
    if "folder" in record:  # of a run, whose own folder says nothing to others
        record["name"] = Path(rest).name
    text = card(record, f"{place}:{rest}")
    if place == "local-dir":
        _check_own(check_output(rest), text)
    network = load(model, deploy=False)
    with tempfile.TemporaryDirectory() as folder:
        staged = save_pretrained(network, folder, class_names=record["class_names"] or None)
        files = {name: (staged / name).read_bytes() for name in (WEIGHTS_NAME, CONFIG_NAME)}
        tokenizer = Path(record.get("folder", folder)) / "tokenizer.json"  # of a text model's run
        if tokenizer.is_file():
            files[tokenizer.name] = tokenizer.read_bytes()
        files["README.md"] = f"{text}{_MARK}{_digest(text)} -->\n".encode()
        if place == "local-dir":
            write_all({Path(rest) / name: writer_of(content) for name, content in files.items()})
        else:
            for name, content in files.items():
                (staged / name).write_bytes(content)
            _upload(staged, rest, record["name"], private, api)
    return f"{place}:{rest}"


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
