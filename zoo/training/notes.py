"""`run.json` of a run: seed, W&B id and training time, recovered from elsewhere if the file is damaged."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

from annotated_types import Len
from pydantic import NonNegativeFloat, NonNegativeInt

from zoo.registry.checkpoints import CheckpointError
from zoo.results.runs import stage_problem
from zoo.support.signatures import check_values
from zoo.support.values import DamagedFileError, read_json
from zoo.training.folder import is_first_process, write_texts
from zoo.training.summary import tell

__all__ = ["NAME", "note_seconds", "read_notes", "run_notes"]

NAME = "run.json"
_log = logging.getLogger(__name__)


Words = Annotated[str, Len(0, 128)]


class _Notes(TypedDict, total=False):
    seed: NonNegativeInt
    wandb_id: str
    label: Words
    group: Words
    seconds_before: NonNegativeFloat
    stages: list[dict[str, Any]]


def read_notes(folder: Path, seed: int | None, state: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Seed, W&B id and training time so far of a resumed run; None if it has none yet.

    If the file is damaged, seed and id are taken from the checkpoint or the configuration, with a message.

    Args:
        folder: The run folder.
        seed: Seed of the configuration; None if it was chosen at random.
        state: Content of the checkpoint to resume from.

    Raises:
        CheckpointError: The file is damaged, and the random seed is in no checkpoint.
    """
    path = folder / NAME
    try:
        found = read_json(path)
        problem = _problem(found)
    except FileNotFoundError:
        if state is None:
            return None
        found, problem = None, f"{path} is missing"
    except DamagedFileError as error:
        found, problem = None, str(error)
    if problem is None:
        return {"seconds_before": 0.0, **found}
    kept = _notes_of(state)
    source = "checkpoint" if "seed" in kept else "configuration"
    kept = {"seed": kept.get("seed", seed), "wandb_id": kept.get("wandb_id") or _wandb_id(folder)}
    if kept["seed"] is None:
        raise CheckpointError(
            f"{problem}, and the seed that was drawn is in no checkpoint: name it as seed=N, or start the run again"
        )
    lost = "" if kept["wandb_id"] else "; W&B gets a new run"
    tell(f"{problem}: the seed is {kept['seed']}, by the {source}; the time spent before is not known{lost}")
    return {**kept, "seconds_before": 0.0}


def _problem(found: Any) -> str | None:
    if not isinstance(found, dict):
        return f"{NAME} holds a {type(found).__name__}, not the notes of a run"
    missing = [key for key in ("seed", "wandb_id") if found.get(key) is None]
    if missing:
        return f"{NAME} has no {missing[0]}"
    if problems := check_values(_Notes, found):
        return f"{NAME}: {problems[0]}"
    if found.get("stages") is not None and (strange := stage_problem(found["stages"])):
        return f"{NAME}: {strange}"
    return None if _is_id(found["wandb_id"]) else f"{NAME}: wandb_id = {found['wandb_id']!r:.60} is not an id"


def _notes_of(state: Mapping[str, Any] | None) -> Mapping[str, Any]:
    about = state.get("zoo") if state is not None else None
    notes = about.get("run") if isinstance(about, Mapping) else None
    return notes if isinstance(notes, Mapping) and _problem(dict(notes)) is None else {}


def _wandb_id(folder: Path) -> str | None:
    """The W&B id in the names of the run's `wandb/` folders, if they agree."""
    ids = {path.name.rpartition("-")[2] for path in (folder / "wandb").glob("*run-*-*")}
    return ids.pop() if len(ids) == 1 and _is_id(next(iter(ids))) else None


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w-]{1,64}", value) is not None


def run_notes(
    folder: Path, seed: int | None, state: Mapping[str, Any] | None, origin: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Seed, W&B id and training time so far: chosen when the run starts, kept when it is resumed.

    The id is that of the environment (`WANDB_RUN_ID`, which an agent of a sweep sets) unless the run is one of several,
    whose label and group are kept too.
    """
    of_several = {key: str(origin[key])[:128] for key in ("label", "group") if origin and origin.get(key)}
    begins = state is None and is_first_process()  # the notes of a failed start are ignored
    kept = None if begins else read_notes(folder, seed, state)
    if kept is not None and state is None and seed is not None:
        kept["seed"] = seed
    if kept is not None and kept["wandb_id"]:
        return kept
    if kept is not None:
        kept["wandb_id"] = _new_id(of_several)
        return kept
    seed = secrets.randbelow(2**31) if seed is None else seed
    notes = {"seed": seed, "wandb_id": _new_id(of_several), "seconds_before": 0.0, **of_several}
    if is_first_process():
        write_texts(folder, {NAME: json.dumps(notes, indent=2) + "\n"})
    return notes


def _new_id(of_several: Mapping[str, str]) -> str:
    asked = os.environ.get("WANDB_RUN_ID")
    return asked if asked and not of_several and _is_id(asked) else secrets.token_hex(4)


def note_seconds(folder: Path, notes: dict[str, Any], seconds: float) -> None:
    """Add training time to `run.json`, with all notes."""
    notes = {**notes, "seconds_before": notes["seconds_before"] + seconds}
    try:
        write_texts(folder, {NAME: json.dumps(notes, indent=2) + "\n"})
    except CheckpointError as error:  # a full disk has been reported already
        _log.debug("%s not updated: %s", NAME, error)
