"""Saving and loading whatever the zoo makes: models and scikit-learn estimators, in one layout."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from zoo.registry import checkpoints
from zoo.registry.factory import as_named
from zoo.support.files import CheckpointError, as_path, hub_config, read_config

__all__ = ["check_outside_runs", "estimator_config", "holds_estimator", "save_pretrained"]


def save_pretrained(model: Any, folder: str | Path, **options: Any) -> Path:
    """Save a model or a fitted estimator so that its folder alone rebuilds it, in timm's hub layout, without pickle.

    `zoo.create_model("local-dir:<folder>", pretrained=True)` builds a model again, `zoo.load_estimator` an estimator.
    The folder holds `model.safetensors` and `config.json`, replaced together and atomically. A model that the zoo saved
    there is replaced if it is of the same architecture and classes (a training loop saves again and again), another one
    only with `overwrite=True`; the model of a run, which its records describe, never is.

    Args:
        model: A model built by :func:`zoo.create_model` or `timm.create_model`, or a fitted estimator.
        folder: Created if missing.
        **options: Of a model: `class_names`, `preprocessing`, `input_record`, `overwrite`; see
            :func:`zoo.registry.checkpoints.save_pretrained`. Of an estimator: `input_record`, `overwrite`; see
            :func:`zoo.estimators.saved.save_estimator`.

    Returns:
        The folder.

    Raises:
        CheckpointError: The folder cannot be written, holds another model or other files, is in a run, or could not
            rebuild what was given. Nothing is left half-written.
        ValueError: An option does not fit.
    """
    check_outside_runs(as_path(folder))
    if isinstance(model, nn.Module):
        return checkpoints.save_pretrained(model, folder, **options)
    from sklearn.base import BaseEstimator

    from zoo.estimators.saved import save_estimator

    if not isinstance(model, BaseEstimator):
        raise CheckpointError(f"{type(model).__name__} is neither a model (torch.nn.Module) nor an estimator")
    if surplus := options.keys() - {"input_record", "overwrite"}:
        raise ValueError(f"an estimator knows its own classes and scaling: leave out {', '.join(sorted(surplus))}")
    return save_estimator(model, folder, **options)


def check_outside_runs(folder: Path) -> None:
    """Refuse the places from which a run is read: its records describe the weights that are there.

    Raises:
        CheckpointError: The folder is that of a run, or the one of its model or its checkpoints.
    """
    place = Path(os.path.realpath(folder))
    for run in (place, *([place.parent] if place.name in ("model", "checkpoints") else [])):
        recorded = (run / "summary.json").is_file() and (run / ".hydra").is_dir()
        if recorded or (run / "run.json").is_file():
            raise CheckpointError(
                f"{folder} is in the folder of a run, whose model stays as trained: choose another folder"
            )


def estimator_config(model: str | Path) -> dict[str, Any] | None:
    """The configuration of a folder or repository that holds an estimator; None for any other model.

    Args:
        model: As given to a command, see :func:`zoo.registry.factory.as_named`.
    """
    place, _, rest = as_named(model).partition(":")
    config: dict[str, Any] = {}
    if place in ("local-dir", "local_dir"):
        config = read_config(Path(rest))
    elif place in ("hf-hub", "hf_hub"):
        config = hub_config(rest)
    return config if "estimator" in config else None


def holds_estimator(model: str | Path) -> bool:
    """Whether a command's model is a saved estimator; of an unknown model False, which what opens it refuses."""
    try:
        return estimator_config(model) is not None
    except ValueError:
        return False
