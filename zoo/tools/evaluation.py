"""Measure a model on the test part of a record's own data, the way its training run did."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from zoo.models.deploy import to_deploy
from zoo.registry import bundled_weights
from zoo.registry.factory import MAY_BE, as_named, create_model
from zoo.registry.trust import TrustError, recorded_class
from zoo.support.files import offline
from zoo.support.signatures import check_call
from zoo.support.values import first_line
from zoo.tasks import Task
from zoo.tools.errors import ToolError

__all__ = ["batches", "build_data", "build_task", "evaluate", "load", "record_of", "unusable", "validate"]


def record_of(model: str | Path) -> dict[str, Any]:
    """The record behind a name: a shipped weight's own, or one put together from a run folder.

    Args:
        model: `NAME.TAG` of a shipped weight, or the folder of a finished run, which the record then names as `folder`.
    """
    if isinstance(model, str) and bundled_weights.NAME.fullmatch(model):
        return bundled_weights.record(model)
    from zoo.tools.release import describe

    if not Path(model).is_dir():
        raise ToolError(f"there is no model {str(model)!r:.200}: give {MAY_BE}")
    return describe([Path(model)]) | {"folder": str(model)}


_RECORDED = (
    "nothing is fetched for a run folder, which may come from anyone: fetch the data yourself, by starting its "
    "experiment once, and for `validate` name their folder with --root"
)


def _fetching(record: Mapping[str, Any]) -> AbstractContextManager[None]:
    """What a folder records opens no address; the records that come with the zoo may."""
    return offline(_RECORDED) if "folder" in record else nullcontext()


def load(model: str | Path, deploy: bool = True) -> nn.Module:
    """A model in eval mode with its weights, by name, `local-dir:` or run folder; merged for inference by default."""
    try:
        built = create_model(as_named(model), pretrained=True).eval()
    except (ValueError, TypeError) as error:  # an unknown name or tag
        raise ToolError(str(error)) from None
    return to_deploy(built, inplace=True) if deploy else built


def _call(section: Any, place: str, **offered: Any) -> Any:
    """Build a section of a record, which may name only a class of its kind and give it plain values."""
    if not isinstance(section, Mapping):
        raise ToolError(f"the {place} section of the record is a {type(section).__name__}; the record is damaged")
    try:
        build = recorded_class(section.get("_target_"), place)
    except TrustError as error:
        raise ToolError(str(error)) from None
    values = {k: v for k, v in section.items() if not str(k).startswith("_")} | offered
    if problems := check_call(build, values, place, given=offered, nested=False):
        raise ToolError(f"the record does not fit {build.__name__}: {problems[0]}")
    try:
        return build(**values)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        if type(error).__module__.startswith("zoo."):
            raise
        raise ToolError(f"the {place} section of the record is refused ({first_line(error)})") from None


def build_data(record: Mapping[str, Any], **changes: Any) -> Any:
    """The data module of a record, prepared; `changes` replace arguments (`root`, `eval_batch_size`)."""
    with _fetching(record):
        data = _call({**record["data"]["config"], **changes}, "data")
        data.prepare_data()
        data.setup("test")
    return data


def build_task(record: Mapping[str, Any], model: nn.Module) -> Task:
    """The task of a record around a model."""
    section = {k: v for k, v in record["task"].items() if k not in ("channels_last", "compile")}
    for key, value in (("class_names", record["class_names"]), ("preprocessing", record["preprocessing"])):
        if key in section:
            section[key] = section[key] or value or None
    return _call(section, "task", model=model)


def evaluate(record: Mapping[str, Any], model: nn.Module, progress: bool = False, **changes: Any) -> dict[str, float]:
    """Metrics on the test part, computed by the record's own task.

    Args:
        record: From :func:`record_of`.
        model: In eval mode, training or deploy form.
        progress: Show a bar.
        **changes: Replaced arguments of the data module.
    """
    data = build_data(record, **changes)
    hook = model.register_forward_hook(_watch(str(record.get("name", "the model"))))
    try:
        with _fetching(record):
            return _measured(record, data, model, progress)
    finally:
        hook.remove()


def unusable(outputs: Tensor) -> Tensor:
    """Which rows of outputs (N, ...) give no answer: NaN, or infinity that makes no probabilities. Shape (N,), bool.

    One class of several may be impossible, with a logit of minus infinity.
    """
    judged = outputs.float().softmax(-1) if outputs.ndim == 2 and outputs.shape[1] > 1 else outputs
    return ~judged.isfinite().reshape(len(outputs), -1).all(1)


def _watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
    """A hook that stops at the first answer that is no number; it counts the rows of all batches."""
    seen = 0

    def look(module: nn.Module, given: Any, outputs: Any) -> None:
        nonlocal seen
        if not isinstance(outputs, Tensor) or not outputs.ndim:
            return
        if (bad := unusable(outputs)).any():
            row = seen + int(bad.nonzero()[0]) + 1
            raise ToolError(f"{name} answers row {row} of its test data with NaN or infinity, which means nothing")
        seen += len(outputs)

    return look


def _measured(record: Mapping[str, Any], data: Any, model: nn.Module, progress: bool) -> dict[str, float]:
    if hasattr(data, "stream"):  # continual learning: every task, its id unknown
        return {"test/acc_agnostic": _agnostic(data, model)}
    task = build_task(record, model)
    quiet = logging.getLogger("lightning.pytorch")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            trainer = L.Trainer(
                accelerator="cpu",
                devices=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=progress,
                enable_model_summary=False,
                use_distributed_sampler=False,
            )
            trainer.test(task, datamodule=data, verbose=False)
    finally:
        quiet.setLevel(level)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def batches(data: Any, size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets of the test part of a data module, without padding; of all tasks of a stream."""
    if hasattr(data, "stream"):
        for t in range(len(data.stream)):
            images, targets = data.stream[t].test
            images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
            yield from zip(images.split(size), targets.split(size), strict=True)
        return
    for inputs, targets in data.test_dataloader():
        if not isinstance(inputs, Tensor):
            raise ToolError(f"{type(data).__name__} has windows and times; only classes and values are compared here")
        kept = ~targets.isnan() if targets.is_floating_point() else targets >= 0
        yield inputs[kept], targets[kept]


@torch.inference_mode()
def _agnostic(data: Any, model: nn.Module) -> float:
    """Mean over tasks of the accuracy among all classes."""
    shares = []
    for t in range(len(data.stream)):
        images, targets = data.stream[t].test
        images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        shares.append(float((model(images).argmax(1) == targets).double().mean()))
    return sum(shares) / len(shares)


def validate(model: str, root: str | None = None, progress: bool = False, tolerance: float = 1e-3) -> dict[str, Any]:
    """Reproduce the figures of a record: its weights, in deploy form, on the test part of its data.

    Args:
        model: A shipped weight or the folder of a run.
        root: Where the data set lies, if it is not one that the zoo fetches itself.
        progress: Show a bar.
        tolerance: Largest difference from the record, absolute for shares and relative above one.

    Returns:
        `found` and `recorded` metrics by name, `reproduced`, and what was measured how.
    """
    record = record_of(model)
    metrics = evaluate(record, load(model), progress, **({"root": root} if root else {}))
    recorded = {k: v for k, v in record["metrics"].items() if k.startswith("test/") and k in metrics}
    found = {k: metrics[k] for k in recorded}
    judged = record["metric"]["name"]
    close = abs(found[judged] - recorded[judged]) <= tolerance * max(1.0, abs(recorded[judged]))
    return {
        "name": record["name"],
        "data": record["data"]["title"],
        "rows": record["data"]["rows"].get("test"),
        "found": found,
        "recorded": recorded,
        "reproduced": close,
        "preprocessing": record["preprocessing"],
    }
