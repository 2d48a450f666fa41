"""Models by name: timm's registry with a list of the zoo's own models, helpful errors, and verified weights.

>>> create_model("unireplknet_a", num_classes=10)
>>> create_model("local-dir:runs/best", pretrained=True)      # a folder of zoo.save_pretrained, no network
>>> list_models("unireplknet_*")
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import re
import sys
import typing
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, model_entrypoint
from timm.models._features import FeatureGetterNet
from torch import nn

from zoo.models.deploy import to_deploy
from zoo.registry import bundled_weights, closed, families, plugins
from zoo.registry.described import Beside, Described, Shared, name_problems
from zoo.registry.loading import Strict, load_state
from zoo.support import lean
from zoo.support.files import (
    CONFIG_NAME,
    RECORDS,
    CheckpointError,
    fetch_hub,
    fetch_url,
    hub_config,
    locate,
    read_checkpoint,
    read_config,
    undisturbed,
    weights_size,
)
from zoo.support.signatures import check_call, check_values
from zoo.support.suggest import nearest, suggestion
from zoo.support.values import check_closed, first_line, is_of_memory

__all__ = ["RECORDS", "create_model", "list_models"]

_log = logging.getLogger(__name__)

#: Arguments of `create_model` for timm itself; all others go to the architecture.
_FACTORY = (
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "cache_dir",
    "scriptable",
    "exportable",
    "no_jit",
    "features_only",
    "out_indices",
    "feature_cls",
)
_NOT_KEPT = ("device", "dtype", "pretrained_model_args")


def list_models(filter: str | Iterable[str] = "", pretrained: bool = False) -> list[str]:
    """Names of the zoo's own models, sorted; those for tests (`test_*`) only if a filter begins so.

    Args:
        filter: One or several shell wildcards: `"unireplknet_*"`.
        pretrained: Only models with weights, with their tags: `"unireplknet_a.in1k"` (published by the authors,
            downloaded), `"unireplknet_z.mnist5k"` (trained by an experiment of the zoo, shipped with it).
    """
    register()
    wanted = [filter] if isinstance(filter, str) else list(filter)
    names = timm.list_models(wanted if any(wanted) else "", pretrained=pretrained)
    asked = any(pattern.startswith("test") for pattern in wanted)
    return [name for name in names if _is_ours(name) and (asked or not name.startswith("test_"))]


def create_model(
    model_name: str,
    pretrained: bool = False,
    checkpoint_path: str | Path | None = None,
    *,
    deploy: bool = False,
    strict: Strict = True,
    **kwargs: Any,
) -> nn.Module:
    """Build a model by its registered name, with released weights, with weights from a file, or newly initialised.

    Args:
        model_name: `"arch"` or `"arch.tag"` of the zoo or of timm, `"local-dir:<folder>"` for a folder
            written by :func:`zoo.save_pretrained`, or `"hf-hub:<organisation>/<name>"`.
        pretrained: Load the weights of that name. Their hash is verified if known. With a different `num_classes` the
            classifier is newly initialised; with a different `in_chans` the first layer is summed or repeated.
        checkpoint_path: Load these weights instead: a file or a folder, also that of a finished run.
        deploy: Return the model in deploy form (see :func:`zoo.to_deploy`); training-form weights are merged.
        strict: What of `checkpoint_path` must fit: everything (True), everything but the classifier (`"backbone"`),
            everything but another number of classes or input channels (`"adapt"`), or nothing (False).
        **kwargs: Arguments of the architecture (`num_classes`, `in_chans`, `drop_path_rate`, ...) and of timm
            (`features_only`, `out_indices`, ...). None means the default.

    Returns:
        The model, in training mode. `model.zoo_config` holds the name and the arguments as plain values, so that
        `create_model(**model.zoo_config)` builds it again; `model.input_record` describes the input (see
        :mod:`zoo.support.inputs`), or is None if the weights have no record.

    Raises:
        ValueError: The name or its tag is unknown; the message suggests the nearest ones.
        TypeError: An argument is unknown; the message suggests the nearest ones and lists all.
        CheckpointError: The weights are missing, damaged, not the recorded file, or do not fit.
    """
    if not isinstance(model_name, str):
        raise TypeError(f"model_name = {model_name!r:.60} is not a text; a model is {MAY_BE}")
    if pretrained and checkpoint_path:
        raise ValueError("pretrained=True and checkpoint_path both name weights; choose one of them")
    register()
    if closed.active():  # nested in a file's description, whose weights are loaded later
        pretrained, checkpoint_path = False, None
        closed.check_name(model_name)
    given = {k: v for k, v in kwargs.items() if v is not None}
    folder = model_name.partition(":")[2] if model_name.startswith(("local-dir:", "local_dir:")) else ""
    create = partial(_create, model_name, pretrained, checkpoint_path, deploy, strict, given)
    return undisturbed(folder, create) if folder else create()


def _create(
    model_name: str,
    pretrained: bool,
    checkpoint_path: str | Path | None,
    deploy: bool,
    strict: Strict,
    given: dict[str, Any],
) -> nn.Module:
    source, name = _parse(model_name)
    theirs = pretrained and not source and not _is_ours(name)  # timm's weights use timm's loader
    with _sized(model_name, source, pretrained, given):
        model = _build(model_name, source, name, pretrained=theirs, kwargs=given)
    if pretrained and not theirs:
        _load_pretrained(model, source, model_name.partition(":")[2] if source else name)
    if checkpoint_path:
        path = locate(checkpoint_path)
        load_state(model, read_checkpoint(path), strict=strict, origin=str(path))
    deploy = deploy or (pretrained and _saved_config(source, model_name).get("zoo", {}).get("form") == "deploy")
    if deploy:
        to_deploy(model, inplace=True)
    model.zoo_config = _config(model, name, deploy)  # type: ignore[assignment]
    model.input_record = _input_record(model, source, model_name)  # type: ignore[assignment]
    return model


#: What commands accept as a model.
MAY_BE = "a name with its tag (grbf.wine), local-dir:FOLDER of a saved model, or the folder of a finished run"


def as_named(model: str | Path) -> str:
    """Convert a command's model argument for :func:`create_model`: a run folder stands for the model in it, the folder
    of a saved model for itself.

    Raises:
        ValueError: It is a file, an unrelated folder, or a run folder with links out of it.
    """
    name = str(model)
    if os.path.isfile(os.path.join(name, "model", CONFIG_NAME)):
        check_closed(Path(name))
        return f"local-dir:{Path(name) / 'model'}"
    if ":" in name or ("/" not in name and "\\" not in name and not os.path.exists(name)):
        return name
    if timm.is_model(name.partition(".")[0]):
        return name
    if os.path.isfile(os.path.join(name, CONFIG_NAME)):
        return f"local-dir:{name}"
    if not os.path.exists(name):
        what = "is not there"
    else:
        what = "is a folder, but of no model and no finished run" if os.path.isdir(name) else "is a file, not a model"
    raise ValueError(f"{name[:200]} {what}: a model is {MAY_BE}")


def answers_imagenet(model: str) -> bool:
    """Whether weights are known to predict the classes of ImageNet-1k, by their tag or metadata.

    A thousand outputs alone are no evidence, and a folder may keep the tag of the weights that its training started
    from.

    Args:
        model: As given to a command, see :func:`as_named`.
    """
    name = re.sub(r"^hf[-_]hub:timm/", "", as_named(model))
    register()
    try:
        cfg = get_pretrained_cfg(name) if timm.is_model(name.partition(".")[0]) else None
    except RuntimeError:  # no such tag
        return False
    return cfg is not None and cfg.num_classes == 1000 and "in1k" in (cfg.tag or "").split("_")


# ---- names -------------------------------------------------------------------------------------------------


def register() -> None:
    """Import every family, and register the hashes in their configurations (a note `sha256: <digits>`)."""
    families.load()
    closed.install(plugins.modules())
    for name in timm.list_models(include_tags=True):
        if name not in _NOTED and _is_ours(name):
            _NOTED.add(name)
            cfg = get_pretrained_cfg(name)
            notes = (cfg.notes if cfg else None) or ()
            digest = next((n.removeprefix("sha256:").strip() for n in notes if n.startswith("sha256:")), None)
            place = cfg and (cfg.hf_hub_filename or cfg.file or cfg.url)
            if digest and isinstance(place, str):
                RECORDS.setdefault(place.rsplit("/", 1)[-1], {"sha256": digest, "model": name})


_NOTED: set[str] = set()


def _is_ours(name: str) -> bool:
    return model_entrypoint(name.split(".")[0]).__module__.startswith(plugins.modules())


def _parse(model_name: str) -> tuple[str, str]:
    """Split off `local-dir:` or `hf-hub:`, and check that the architecture exists."""
    source, colon, rest = model_name.partition(":")
    source = source.replace("_", "-")
    if colon and source == "local-dir":
        name = _check_config(Path(rest))
    elif colon and source == "hf-hub":
        return source, rest
    elif "/" in model_name or "\\" in model_name or colon:
        raise ValueError(
            f"model_name={model_name!r} looks like a place: write 'local-dir:<folder>' for a folder or "
            "'hf-hub:<organisation>/<name>' for the hub, or pass a file as checkpoint_path"
        )
    else:
        source, name = "", model_name
    arch, _, tag = name.partition(".")
    if not timm.is_model(arch):
        ours, theirs = list_models(), lean.names()
        possible = ours if set(nearest(arch, [*ours, *theirs])[:1]) <= set(ours) else theirs
        raise ValueError(f"unknown model {arch!r}{suggestion(arch, possible)} (zoo.list_models() lists all)")
    if tag:
        tags = [n.partition(".")[2] for n in timm.list_models(arch, include_tags=True) if "." in n]
        if tag not in tags:
            if (bundled_weights.folder() / f"{name}.json").is_file():
                bundled_weights.record(name)  # raises the error for a damaged record
            raise ValueError(f"{arch} has no weights tagged {tag!r}{suggestion(tag, tags) or '; it has no tags'}")
    return source, name


def _check_config(folder: Path) -> str:
    """The architecture named by a saved folder, after a check of its configuration."""
    from timm.models import PretrainedCfg

    config = read_config(folder)
    arch, where = config["architecture"], Path(folder) / CONFIG_NAME
    cfg = config.get("pretrained_cfg", {})
    known = {f.name for f in fields(PretrainedCfg)}
    if unknown := [k for k in cfg if k not in known]:
        raise CheckpointError(f"{where}: pretrained_cfg has entries timm does not know: {', '.join(unknown)}")
    if "estimator" in config:
        raise CheckpointError(f"{folder} holds an estimator, {arch!r:.60}: zoo.load_estimator reads it")
    if not re.fullmatch(r"\w+", arch) or not timm.is_model(arch):
        raise CheckpointError(f"{where} names the architecture {arch!r:.100}, which is not registered")
    problems = check_values(Described, cfg, "pretrained_cfg") + check_values(Beside, config)
    arguments = {k: v for k, v in config.get("model_args", {}).items() if v is not None}
    problems += check_values(Shared, arguments, "model_args")
    problems += [f"model_args.{k} is not an argument of an architecture" for k in arguments if k in _OUTSIDE]
    returned = typing.get_type_hints(model_entrypoint(arch)).get("return") if _is_ours(arch) else None
    if inspect.isclass(returned) and returned is not nn.Module:
        own = inspect.signature(returned).parameters  # unknown ones are reported when the model is built
        taken = {k: v for k, v in arguments.items() if k in own}
        problems += check_call(returned, taken, "model_args", given=own, nested=False)
    if not problems:
        classes = config.get("num_classes", cfg.get("num_classes"))
        for names in (config.get("label_names"), cfg.get("label_names")):
            problems += name_problems(names or (), classes)
    if problems:
        raise CheckpointError(f"{where}: {problems[0][:300]}")
    return arch


#: Arguments that determine where weights come from, allowed from the caller only.
_OUTSIDE = [
    p for p in inspect.signature(timm.create_model).parameters if p not in ("scriptable", "exportable", "no_jit")
]


# ---- building ----------------------------------------------------------------------------------------------


def _build(model_name: str, source: str, name: str, *, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    if source:
        return _build_described(model_name, source, name, kwargs)
    try:
        return timm.create_model(model_name, pretrained=pretrained, **kwargs)
    except TypeError as error:
        argument, message = _unknown_argument(error, name)
        if argument in kwargs:
            raise TypeError(message) from None
        raise


@contextlib.contextmanager
def _sized(model_name: str, source: str, pretrained: bool, kwargs: dict[str, Any]) -> Iterator[None]:
    """Context that ends the building of a folder's model if it is larger than its file of weights can fill.

    The caller's own arguments are not limited: with any, only what the folder describes is checked, without values.
    """
    place = model_name.partition(":")[2]
    size = weights_size(place) if source == "local-dir" and not closed.active() else 0
    if source == "local-dir" and pretrained and not size:
        locate(f"local-dir:{place}")  # raises the error for weights that are not there
    if not size:
        yield
    elif not kwargs:
        with closed.sized(model_name, size):
            yield
    else:
        try:
            with (
                torch.random.fork_rng(devices=[]),
                warnings.catch_warnings(action="ignore"),
                torch.device("meta"),
                closed.closed(model_name),
                closed.sized(model_name, size),
            ):
                timm.create_model(model_name, pretrained=False)
        except closed.TooLargeError:
            raise
        except Exception as error:  # the caller's arguments may be what is missing
            _log.debug("%s alone builds no model (%s)", model_name, first_line(error))
        yield


def _build_described(model_name: str, source: str, name: str, kwargs: dict[str, Any]) -> nn.Module:
    """Build what a folder or repository describes; errors of the constructor become one-line messages."""
    elsewhere = "download the repository's files elsewhere and use 'local-dir:<folder>'"
    if source == "hf-hub" and not closed.active() and not hub_config(name):  # timm's client would try for long
        raise CheckpointError(f"cannot fetch {CONFIG_NAME} of {model_name}: {elsewhere}")
    try:
        with contextlib.nullcontext() if closed.active() else closed.closed(model_name):
            return timm.create_model(model_name, pretrained=False, **kwargs)
    except CheckpointError:
        raise
    except Exception as error:
        argument, message = _unknown_argument(error, name) if isinstance(error, TypeError) else ("", "")
        if argument in kwargs:
            raise TypeError(message) from None
        if kwargs and isinstance(error, ValueError | TypeError) and not message:
            raise  # the caller's arguments may be the problem
        if isinstance(error, OSError) and source == "hf-hub":
            raise CheckpointError(f"cannot fetch {model_name} ({type(error).__name__}); {elsewhere}") from error
        why = "it needs more memory than there is" if is_of_memory(error) else message or first_line(error)
        raise CheckpointError(f"{model_name}: its {CONFIG_NAME} describes no model that can be built: {why}") from error


def _unknown_argument(error: TypeError, name: str) -> tuple[str, str]:
    """The misspelt argument and a sentence about it; empty for any other error."""
    found = re.search(r"(\w+)(?:\.__init__)?\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if not found or not timm.is_model(arch := name.partition(".")[0]):
        return "", ""
    owner = getattr(sys.modules[model_entrypoint(arch).__module__], found[1], None)
    accepted = [p for p in inspect.signature(owner).parameters if p != "self"] if callable(owner) else []
    if "kwargs" in accepted:  # the class passes its arguments on: its signature is incomplete
        accepted = []
    close = suggestion(found[2], [*accepted, *_FACTORY, "deploy"])
    close = close if "did you mean" in close else ""
    everything = f"; accepted: {', '.join(accepted)}" if accepted else ""
    return found[2], f"{name} takes no argument {found[2]!r}{close}{everything}"


def _config(model: nn.Module, name: str, deploy: bool) -> dict[str, Any]:
    """Name and arguments as plain values, without those that JSON cannot represent (a class, a device)."""
    arch = (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or name
    kept = {k: v for k, v in getattr(model, "_model_args", {}).items() if k not in _NOT_KEPT}
    plain: dict[str, Any] = {"model_name": name if name.partition(".")[0] == arch else arch}
    for key, value in kept.items():
        try:
            plain[key] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            continue
    return {**plain, "deploy": True} if deploy else plain


def _saved_config(source: str, model_name: str) -> dict[str, Any]:
    """The configuration of a folder or a repository; empty for a name."""
    place = model_name.partition(":")[2]
    return read_config(place) if source == "local-dir" else hub_config(place) if source == "hf-hub" else {}


def _input_record(model: nn.Module, source: str, model_name: str) -> dict[str, Any] | None:
    """Input record of the weights; None if they have none, or if the model has another number of channels."""
    if source:
        record = _saved_config(source, model_name).get("input")
    elif bundled_weights.NAME.fullmatch(model_name) and (bundled_weights.folder() / f"{model_name}.json").is_file():
        record = bundled_weights.record(model_name).get("input")
    else:
        record = None
    chans = getattr(model, "in_chans", None)
    return None if record and chans and record.get("channels", chans) != chans else record


# ---- weights -----------------------------------------------------------------------------------------------


def _load_pretrained(model: nn.Module, source: str, name: str) -> None:
    cfg = model.pretrained_cfg
    assert isinstance(cfg, dict)
    path = _pretrained_path(cfg, source, name)
    state = read_checkpoint(path)
    if isinstance(model, FeatureGetterNet):  # contains the whole model except its last layers
        load_state(model.model, state, adapt_input=True, surplus=True, origin=str(path))
        return
    same = cfg.get("num_classes") == getattr(model, "num_classes", cfg.get("num_classes"))
    strict: Strict = True if same else "backbone"
    load_state(model, state, strict=strict, adapt_input=True, origin=str(path))


def _pretrained_path(cfg: dict[str, Any], source: str, name: str) -> Path:
    if source == "local-dir":  # the folder given by the caller, whatever the description says
        return locate(f"local-dir:{name}")
    if source == "hf-hub":
        return fetch_hub(name)
    if cfg.get("file"):
        return locate(cfg["file"])
    if cfg.get("hf_hub_id"):
        return fetch_hub(cfg["hf_hub_id"], cfg.get("hf_hub_filename"))
    if cfg.get("url"):
        return fetch_url(cfg["url"])
    arch = name.partition(".")[0]
    tagged = [n for n in list_models(pretrained=True) if n.partition(".")[0] == arch]
    instead = f"choose one of {', '.join(tagged)}" if tagged else "pass checkpoint_path=<file>, or pretrained=False"
    raise CheckpointError(f"no weights were released for {name}: {instead}")
