"""A configuration as objects: sections through their `_target_`, a task with what its data knows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import hydra
import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from zoo.support import inputs
from zoo.support.signatures import ConfigError
from zoo.tasks import Task
from zoo.training.checks import is_lightnings


def build(key: str, make: Callable[[], Any]) -> Any:
    """What `make` returns; its error says which section it is about."""
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
    """Say which section an error is about, unless it is the zoo's own and says so itself."""
    return error if type(error).__module__.startswith("zoo.") else ConfigError(f"{key}: {error}")


def instantiate(section: Mapping[str, Any], **offered: Any) -> Any:
    """Build a section through its `_target_`; `offered` fills what the target takes and the section leaves open."""
    accepted = inspect.signature(hydra.utils.get_object(section["_target_"])).parameters
    extra = {k: v for k, v in offered.items() if k in accepted and section.get(k) is None}
    return hydra.utils.instantiate({**section}, **extra, _convert_="all")


def build_task(
    model: dict[str, Any],
    task: dict[str, Any],
    datamodule: L.LightningDataModule,
    optimizer: dict[str, Any] | None,
    scheduler: dict[str, Any] | None,
) -> Task:
    spec = {**model}
    for key in ("num_classes", "in_chans", *(k for k, value in model.items() if value is None)):
        if spec.get(key) is None and getattr(datamodule, key, None) is not None:
            spec[key] = getattr(datamodule, key)
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
