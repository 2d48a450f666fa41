"""Loading any checkpoint into a model, and saving a model so that its folder alone rebuilds it.

>>> load_checkpoint(model, "weights.pth")  # or a folder, an address, "hf-hub:org/name", a state dict
>>> save_pretrained(model, "runs/best", class_names=["cat", "dog"])
>>> create_model("local-dir:runs/best", pretrained=True)  # equal outputs, offline; so does timm.create_model

Loading never runs code from a file, verifies the file's hash if one is recorded, and leaves the model unchanged unless
every name and shape fits. Writing is atomic. Every failure is a :class:`CheckpointError` with a one-line message.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from timm.models import PretrainedCfg
from torch import Tensor, nn

from zoo.models.deploy import to_deploy
from zoo.registry.described import name_problems
from zoo.registry.factory import create_model, register
from zoo.registry.loading import Strict, classifier_names, load_state, skeleton
from zoo.support import inputs
from zoo.support.files import (
    CONFIG_NAME,
    RECORD_HASHES,
    WEIGHTS_NAME,
    CheckpointError,
    as_path,
    check_replaceable,
    check_same_model,
    locate,
    read_checkpoint,
    record_hashes,
    undisturbed,
    write_all,
    write_atomic,
    writer_of,
)
from zoo.support.quoting import shown

__all__ = [
    "CheckpointError",
    "load_checkpoint",
    "read_checkpoint",
    "save_pretrained",
    "write_atomic",
]

Model = TypeVar("Model", bound=nn.Module)


# ---- loading -----------------------------------------------------------------------------------------------


def load_checkpoint(model: Model, source: str | Path | Mapping[str, Any], *, strict: Strict = True) -> Model:
    """Load weights into a model.

    The weights may be under `state_dict_ema`, `model_ema`, `state_dict` or `model`, and their names may have prefixes
    of wrappers (`module.`, `model.`, `backbone.`, `_orig_mod.`): training checkpoints of the zoo's tasks, of timm's
    scripts or of a detector are accepted. So are training-form and deploy-form files: for a deploy-form file a
    training-form model is first converted to deploy form (and stays so), a training-form file is merged before loading
    it into a deploy-form model.

    Args:
        model: Any module; one built by :func:`zoo.create_model` gives the most helpful messages.
        source: A file (safetensors, or PyTorch's format with weights only), a folder written by
            :func:`save_pretrained`, an https address, `"hf-hub:<organisation>/<name>[/<file>]"`, or a state dict.
                Downloads go to torch's cache, where a file placed by hand is found too.
        strict: True: every name and shape must fit. `"backbone"`: the classifier is not loaded, everything else must
            fit. False: load what fits and log the rest; at least something must fit.

    Returns:
        The same model.

    Raises:
        CheckpointError: The source is missing, damaged, not the recorded file, would run code, or does not fit. The
            model is unchanged.
    """
    register()
    if isinstance(source, Mapping):
        checkpoint, origin = dict(source), "the state dict"
    else:
        folder = str(source).removeprefix("local-dir:")
        checkpoint, origin = undisturbed(folder, lambda: _read(source))
    inner = _unwrap(model)
    try:
        load_state(inner, checkpoint, strict=strict, origin=origin)
    except CheckpointError:
        twin = _training_twin(inner)
        if twin is None:
            raise
        _load_merged(inner, twin, checkpoint, strict, origin)
    return model


def _read(source: str | Path) -> tuple[dict[str, Any], str]:
    path = locate(source)
    return read_checkpoint(path), str(path)


def _unwrap(model: nn.Module) -> nn.Module:
    """The module inside wrappers of distributed training and compilation."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _training_twin(model: nn.Module) -> nn.Module | None:
    """Training form of a deploy-form model, with weights still to be loaded; None for any other model."""
    config = getattr(model, "zoo_config", None)
    if not config:
        return None
    with torch.random.fork_rng(devices=[]):
        twin = create_model(**{**config, "deploy": False})
    if _names(twin) == _names(model) or _names(to_deploy(skeleton(twin), inplace=True)) != _names(model):
        return None
    return twin


def _load_merged(model: nn.Module, twin: nn.Module, checkpoint: Mapping[str, Any], strict: Strict, origin: str) -> None:
    load_state(twin, checkpoint, strict=strict, origin=origin)
    kept = tuple(f"{n}." for n in classifier_names(model)) if strict == "backbone" else ()
    merged = to_deploy(twin, inplace=True).state_dict()
    model.load_state_dict({k: v for k, v in merged.items() if not k.startswith(kept)}, strict=False)


def _names(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in model.state_dict().items()}


# ---- saving ------------------------------------------------------------------------------------------------


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    input_record: Mapping[str, Any] | None = None,
    overwrite: bool | None = None,
) -> Path:
    """Save a model so that its folder alone rebuilds it, in timm's hub layout.

    The folder holds `model.safetensors` and `config.json` (architecture, arguments, classes, preprocessing, hash of the
    weights, training or deploy form). Both are replaced together and atomically: a concurrent reader, or one after a
    crash, finds either the old model or the new one.

    Args:
        model: A model built by :func:`zoo.create_model` or `timm.create_model`, in training or deploy form.
        folder: Created if missing.
        class_names: Names of the outputs, in order.
        preprocessing: Preprocessing of images in evaluation: `input_size` (C, H, W), `mean`, `std`, `interpolation`,
            `crop_pct`, `crop_mode`. Missing entries are taken from the model's own configuration.
        input_record: Description of the input (see :mod:`zoo.support.inputs`), from a data module's `input_record()`;
            None keeps the model's own.
        overwrite: Whether a model saved by the zoo may be replaced; None: only one of the same architecture and
            classes. Other files never are.

    Returns:
        The folder.

    Raises:
        CheckpointError: The folder cannot be written, already holds a model or other files, or the model cannot be
            rebuilt from its name and arguments. Nothing is left half-written.
        ValueError: `class_names`, `preprocessing` or `input_record` does not fit the model.
    """
    folder, model = as_path(folder), _unwrap(model)
    check_replaceable(folder)
    taken = [n for n in (WEIGHTS_NAME, CONFIG_NAME) if (folder / n).exists()]
    if taken and overwrite is False:
        raise CheckpointError(f"{folder} holds {' and '.join(taken)} already: choose another folder, or overwrite=True")
    config = _configuration(model, class_names, preprocessing)
    if not overwrite:
        check_same_model(folder, config)
    if record := input_record or getattr(model, "input_record", None):
        config["input"] = inputs.check(record)
    weights = _serialise(model)
    config[RECORD_HASHES] = record_hashes(config)
    config["sha256"] = {WEIGHTS_NAME: hashlib.sha256(weights).hexdigest()}
    text = json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"
    write_all({folder / WEIGHTS_NAME: writer_of(weights), folder / CONFIG_NAME: writer_of(text)})
    return folder


def _serialise(model: nn.Module) -> bytes:
    import safetensors.torch

    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{name} of the state dict is a {type(tensor).__name__}; only tensors can be saved")
        if tensor.is_meta:
            raise CheckpointError(f"{name} is on the meta device and has no values to save")
        tensor = tensor.detach().cpu().contiguous()
        if (place := tensor.untyped_storage().data_ptr()) in seen:
            tensor = tensor.clone()  # tied weights: in this format every name needs its own storage
        seen.add(place)
        state[name] = tensor
    return safetensors.torch.save(state, metadata={"format": "pt"})


def _configuration(
    model: nn.Module, class_names: Sequence[str] | None, preprocessing: Mapping[str, Any] | None
) -> dict[str, Any]:
    import zoo

    cfg = getattr(model, "pretrained_cfg", None)
    if not isinstance(cfg, dict) or not cfg.get("architecture"):
        raise CheckpointError(
            f"{type(model).__name__} has no name in the registry, so its folder could not rebuild it; "
            "build the model with zoo.create_model, or save model.state_dict() yourself"
        )
    arguments = _arguments(model)
    deploy = _form(model, cfg["architecture"], arguments)
    if deploy and "deploy" in inspect.signature(type(model).__init__).parameters:
        arguments["deploy"] = True  # so that timm alone also builds the deploy form
    classes = int(getattr(model, "num_classes", None) or cfg.get("num_classes") or 0)
    config: dict[str, Any] = {"architecture": cfg["architecture"], "num_classes": classes}
    if isinstance(features := getattr(model, "num_features", None), int):
        config["num_features"] = features
    names = _label_names(class_names, cfg, classes)
    if names:
        config["label_names"] = names
    config["model_args"] = arguments
    config["pretrained_cfg"] = _pretrained_cfg(model, cfg, preprocessing, classes)
    config["zoo"] = {"version": zoo.__version__, "form": "deploy" if deploy else "training"}
    return config


def _arguments(model: nn.Module) -> dict[str, Any]:
    """Constructor arguments as plain values, updated for later changes of the model."""
    arguments = {k: v for k, v in getattr(model, "_model_args", {}).items() if k not in ("device", "dtype", "deploy")}
    arguments.pop("pretrained_model_args", None)
    for key in ("num_classes", "in_chans"):
        if isinstance(value := getattr(model, key, None), int):
            arguments[key] = value
    pool = getattr(model, "global_pool", None)
    pool = getattr(pool, "pool_type", pool)
    if isinstance(pool, str) and "global_pool" in inspect.signature(type(model).__init__).parameters:
        arguments["global_pool"] = pool
    for key, value in arguments.items():
        try:
            arguments[key] = json.loads(json.dumps(value))
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"the model was built with {key}={value!r:.60}, which cannot be written to {CONFIG_NAME}; "
                "use a name or a plain value for it"
            ) from error
    return arguments


def _form(model: nn.Module, architecture: str, arguments: dict[str, Any]) -> bool:
    """Whether the model is in deploy form, found by rebuilding it on the meta device.

    Raises:
        CheckpointError: Neither form has the model's names and shapes, so the folder could not be loaded.
    """
    with torch.random.fork_rng(devices=[]):  # saving must not change the random state of training
        try:
            with torch.device("meta"):
                again = create_model(architecture, **arguments)
        except NotImplementedError:  # the constructor needs actual values
            again = skeleton(create_model(architecture, **arguments))
    names, kinds = _names(model), [type(m) for m in model.modules()]
    fits = _names(again) == names
    if fits and [type(m) for m in again.modules()] == kinds:
        return False
    again = to_deploy(again, inplace=True)
    if _names(again) == names and (not fits or [type(m) for m in again.modules()] == kinds):
        return True
    if fits:  # a module was replaced by another with the same weights
        return False
    odd = sorted(set(names.items()) ^ set(_names(again).items()))
    raise CheckpointError(
        f"create_model({architecture!r}, ...) with the model's arguments builds other weights than it has "
        f"(for example {odd[0][0]}): it was changed after it was built; save model.state_dict() yourself"
    )


def _label_names(class_names: Sequence[str] | None, cfg: Mapping[str, Any], classes: int) -> list[str] | None:
    if class_names is None:
        kept = cfg.get("label_names")
        return list(kept) if kept and len(kept) == classes else None
    if isinstance(class_names, str):
        raise ValueError(f"class_names = {class_names!r:.60} is one text; give a list of names, one per class")
    names = [shown(name, keep="") for name in class_names]
    if len(names) != classes:
        raise ValueError(f"class_names has {len(names)} names, the model {classes} classes; give one name per class")
    if problems := name_problems(names, classes):
        raise ValueError(problems[0].replace("label_names", "class_names"))
    return names


_NOT_SAVED: tuple[str, ...] = (
    "url",
    "file",
    "state_dict",
    "hf_hub_id",
    "hf_hub_filename",
    "source",
    "architecture",
    "custom_load",
)
_NOT_SAVED += ("label_names", "label_descriptions", "label_offset")


def _pretrained_cfg(
    model: nn.Module, cfg: Mapping[str, Any], preprocessing: Mapping[str, Any] | None, classes: int
) -> dict[str, Any]:
    allowed = {f.name for f in fields(PretrainedCfg)} - set(_NOT_SAVED)
    given = dict(preprocessing or {})
    if unknown := [k for k in given if k not in allowed]:
        raise ValueError(
            f"preprocessing has unknown entries {', '.join(unknown)}; allowed: {', '.join(sorted(allowed))}"
        )
    kept = {k: v for k, v in cfg.items() if k not in _NOT_SAVED}
    kept["notes"] = [n for n in kept.get("notes") or () if not n.startswith("sha256:")]  # of the previous weights
    if "input_size" in given and tuple(given["input_size"]) != tuple(kept.get("input_size", ())):
        kept["pool_size"] = None
        for key in ("test_input_size", "test_pool_size", "test_crop_pct"):
            kept.pop(key, None)
    chans = getattr(model, "in_chans", None)
    size = list(given.get("input_size", kept.get("input_size", (chans, 224, 224))))
    if "input_size" in given and isinstance(chans, int) and size[0] != chans:
        raise ValueError(f"preprocessing['input_size'] has {size[0]} channels, the model takes {chans}")
    given["input_size"] = [chans, *size[1:]] if isinstance(chans, int) else size
    return json.loads(json.dumps({**kept, **given, "num_classes": classes}))
