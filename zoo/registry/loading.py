"""From a checkpoint's content to a model's weights: unwrap, match, explain errors, and only then change the model.

A load is first tried on a copy of the model on the meta device, where the model's own load hooks run as usual. The
model itself is changed only after this succeeded, so a refused checkpoint leaves no trace.
"""

from __future__ import annotations

import copy
import itertools
import logging
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from zoo.models.deploy import to_deploy
from zoo.support.files import MAX_TENSORS, CheckpointError, check_plain
from zoo.support.tensors import all_finite, not_held

__all__ = ["Strict", "check_types", "classifier_names", "find_state_dict", "load_state", "skeleton", "warn_not_finite"]

_log = logging.getLogger(__name__)

Strict = bool | Literal["backbone", "adapt"]
Shape = tuple[int, ...]

#: Entries under which training scripts store weights; averaged weights first.
_ENTRIES = ("state_dict_ema", "model_ema", "state_dict", "model")
#: Name prefixes of wrappers: distributed training, a training task, a detector around a backbone.
_PREFIXES = ("module.", "model.", "backbone.")


# ---- content of a checkpoint ----------------------------------------------------------------------------


def find_state_dict(checkpoint: Mapping[str, Any], origin: str) -> dict[str, Tensor]:
    """The state dict inside a checkpoint, with or without wrappers.

    Averaged weights (`state_dict_ema`, `model_ema`) are preferred to `state_dict`, and that to `model`; entries may be
    nested. Other entries (epoch, optimizer) are dropped.

    Raises:
        CheckpointError: There are no tensors; the message lists the entries.
    """
    content: Any = checkpoint
    for _ in range(4):
        inner = next((content[k] for k in _ENTRIES if isinstance(content.get(k), Mapping) and content[k]), None)
        if inner is None:
            break
        content = inner
    state = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not state:
        there = ", ".join(map(str, itertools.islice(content, 8))) or "nothing"
        raise CheckpointError(f"{origin} holds no weights: its entries are {there}")
    if len(state) > MAX_TENSORS:
        raise CheckpointError(f"{origin} holds {len(state):,} tensors, more than the {MAX_TENSORS:,} that are read")
    check_plain(state, origin)
    return state


def strip_prefixes(state: Mapping[str, Tensor], wanted: Iterable[str]) -> dict[str, Tensor]:
    """Drop prefixes of wrappers, with the combination that matches most of the `wanted` names.

    Names without a dropped prefix (metrics beside `model.` in a training checkpoint, the decode head beside
    `backbone.`) are dropped too.
    """
    wanted = set(wanted)
    best = plain = {k.replace("_orig_mod.", ""): v for k, v in state.items()}
    fits = len(wanted & plain.keys())
    for depth in (1, 2, 3):
        for prefixes in itertools.product(_PREFIXES, repeat=depth):
            start = "".join(prefixes)
            inner = {k.removeprefix(start): v for k, v in plain.items() if k.startswith(start)}
            if len(wanted & inner.keys()) > fits:
                best, fits = inner, len(wanted & inner.keys())
    return best


# ---- matching --- -------------------------------------------------------------------------------------------


@dataclass
class Fit:
    """Result of a trial load."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)  # name -> (in the file, in the model)

    @property
    def complete(self) -> bool:
        return not (self.missing or self.unexpected or self.shapes)

    def outside(self, names: tuple[str, ...]) -> Fit:
        """The result without the layers `names`."""
        prefixes = tuple(f"{n}." for n in names)
        if not prefixes:
            return self
        return Fit(
            [k for k in self.missing if not k.startswith(prefixes)],
            [k for k in self.unexpected if not k.startswith(prefixes)],
            {k: s for k, s in self.shapes.items() if not k.startswith(prefixes)},
        )


def skeleton(model: nn.Module) -> Any:
    """A copy of a model on the meta device, with its structure and hooks."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    for b in (*model.buffers(), *_loose_tensors(model)):
        memo.setdefault(id(b), torch.empty_like(b, device="meta"))
    return copy.deepcopy(model, memo)


def _loose_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that modules keep outside of their state (losses of the last forward pass), which cannot be copied."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, dict):
                value = list(value.values())
            inside = value if isinstance(value, list | tuple) else [value]
            yield from (v for v in inside if isinstance(v, Tensor))


_SIZE_MISMATCH = re.compile(r"size mismatch for (\S+): copying a param with shape torch\.Size\(\[(.*?)\]\) from")


def _try(model: nn.Module, state: Mapping[str, Tensor]) -> Fit:
    """Load into a skeleton and report; mismatched shapes are removed first so that the rest is still compared."""
    on_meta = {k: torch.empty_like(v, device="meta") for k, v in state.items()}
    own = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    shapes: dict[str, tuple[Shape, Shape]] = {}
    for _ in range(2):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # some layers warn that nothing is copied
                result = model.load_state_dict(on_meta, strict=False)
        except RuntimeError as error:  # lists all mismatched shapes
            for name, sizes in _SIZE_MISMATCH.findall(str(error)):
                shapes[name] = (tuple(int(n) for n in sizes.split(",") if n.strip()), own.get(name, ()))
            if not any(name in on_meta for name in shapes):
                raise CheckpointError(" ".join(str(error).split())) from error
            on_meta = {k: v for k, v in on_meta.items() if k not in shapes}
        else:
            missing = [k for k in result.missing_keys if k not in shapes]
            return Fit(missing, list(result.unexpected_keys), shapes)
    raise CheckpointError("the model's own load hooks refuse this checkpoint")


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers that depend on the number of classes, from the model's timm configuration or itself."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    if not names and callable(own := getattr(model, "get_classifier", None)):  # of a backbone inside
        head = own()
        return tuple(name for name, module in model.named_modules() if module is head and name)
    return (names,) if isinstance(names, str) else tuple(names)


def load_state(
    model: nn.Module,
    checkpoint: Mapping[str, Any],
    *,
    strict: Strict = True,
    adapt_input: bool = False,
    surplus: bool = False,
    origin: str = "the state dict",
) -> None:
    """Load a checkpoint's weights into a model; on any error the model is unchanged.

    A file in deploy form converts the model to deploy form first (merged weights cannot be split again).

    Args:
        model: The model.
        checkpoint: A state dict, possibly wrapped, see :func:`find_state_dict`.
        strict: True: every name and shape must fit. `"backbone"`: the classifier is not loaded, everything else must
            fit. `"adapt"`: for training on other data, the classifier is not loaded where its number of classes
            differs, the first layer is adapted to other channels (both are logged), and everything else must fit.
            False: load what fits and log the rest.
        adapt_input: Adapt the first layer to another number of input channels.
        surplus: Whether the file may have further layers, which were removed from the model.
        origin: Name of the checkpoint in messages.

    Raises:
        CheckpointError: The checkpoint does not fit; the message names the keys and suggests a remedy.
    """
    if strict not in (True, False, "backbone", "adapt"):
        raise ValueError(f"strict={strict!r} is not one of True, False, 'backbone', 'adapt'")
    heads = classifier_names(model)
    adapt_input = adapt_input or strict == "adapt"
    content = find_state_dict(checkpoint, origin)
    trial = skeleton(model)
    state = _prepare(content, trial, adapt_input)
    fit = _try(trial, state)
    deploy = False
    if not fit.outside(heads).complete and _mergeable(model):
        to_deploy(trial, inplace=True)
        merged_state = _prepare(content, trial, adapt_input)
        merged_fit = _try(trial, merged_state)
        deploy = merged_fit.outside(heads).complete
        if deploy:
            state, fit = merged_state, merged_fit
    if strict == "adapt":
        _tell_adapted(model, content, state, fit, heads, origin)
        strict = "backbone" if fit != fit.outside(heads) else True
    if strict == "backbone":
        fit = fit.outside(heads)
    if surplus:
        state = {k: v for k, v in state.items() if k not in fit.unexpected}
        fit = replace(fit, unexpected=[])
    if strict and not fit.complete:
        raise CheckpointError(_explain(fit, heads, model, state, origin))
    check_types(model, state, origin)
    warn_not_finite(model, state, origin)
    kept = tuple(f"{h}." for h in heads) if strict == "backbone" else ()
    left_out = {*fit.shapes, *fit.unexpected}
    chosen = {k: v for k, v in state.items() if k not in left_out and not k.startswith(kept)}
    if not chosen:
        raise CheckpointError(_explain(fit, heads, model, state, origin))
    if deploy:
        _log.info("%s is in deploy form: the model was brought to deploy form to load it", origin)
        to_deploy(model, inplace=True)
    model.load_state_dict(chosen, strict=False)  # differences were checked above
    if not fit.complete:
        _log.warning("%s was loaded in part: %s", origin, _differences(fit))


def _prepare(content: Mapping[str, Tensor], model: nn.Module, adapt_input: bool) -> dict[str, Tensor]:
    """Unwrap the names, then apply the family's conversion of authors' names (timm's `checkpoint_filter_fn`)."""
    state = strip_prefixes(content, model.state_dict())
    remap = getattr(sys.modules.get(type(model).__module__), "checkpoint_filter_fn", None)
    if callable(remap):
        state = dict(remap(dict(state), model))
    return _adapt(state, model) if adapt_input else state


def _tell_adapted(
    model: nn.Module,
    content: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    fit: Fit,
    heads: tuple[str, ...],
    origin: str,
) -> None:
    """Log what of a checkpoint that fits otherwise is new or adapted in the model."""
    if not fit.outside(heads).complete:
        return  # it is refused
    if fit != fit.outside(heads):
        count = state[f"{heads[0]}.weight"].shape[0] if f"{heads[0]}.weight" in state else "no"
        own = getattr(model, "num_classes", "other")
        _log.warning("%s has %s classes, the model %s: the classifier is new, the rest is loaded", origin, count, own)
    before = strip_prefixes(content, model.state_dict())
    for name, tensor in state.items():
        if name in before and before[name].ndim == tensor.ndim == 4 and before[name].shape[1] != tensor.shape[1]:
            old, new = before[name].shape[1], tensor.shape[1]
            _log.warning("%s has %d input channels, the model %d: %s is summed or repeated", origin, old, new, name)


def _mergeable(model: nn.Module) -> bool:
    return any(callable(getattr(m, "reparameterize", None)) for m in model.modules())


def check_types(model: nn.Module, state: Mapping[str, Any], origin: str) -> None:
    """Refuse numbers that the types of the model's tensors do not hold; warn if float64 is rounded.

    Raises:
        CheckpointError: A tensor holds whole numbers for floating-point ones, or a number that would become infinite.
    """
    own = model.state_dict()
    if problem := not_held(own, state):
        raise CheckpointError(f"{origin}: {problem}")
    wide = (k for k, t in state.items() if k in own and isinstance(t, Tensor) and t.dtype == torch.float64)
    if any(own[k].dtype != torch.float64 for k in wide):
        _log.warning("%s holds float64 weights, rounded to the model's type: dtype=torch.float64 keeps them", origin)


def warn_not_finite(model: nn.Module, state: Mapping[str, Any], origin: str) -> None:
    """Warn, with the first name, about NaN in a file or infinite parameters: the outputs would be meaningless.

    Buffers may be infinite, such as the logarithm of the count of an unseen class.
    """
    learned = {name for name, _ in model.named_parameters()}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or all_finite(tensor):
            continue
        if name in learned or tensor.isnan().any():
            kind = "NaN" if tensor.isnan().any() else "infinity"
            warnings.warn(
                f"{origin}: {name} holds {kind}; the model's outputs mean nothing", RuntimeWarning, stacklevel=3
            )
            return


# ---- error messages ----------------------------------------------------------------------------------------


def _explain(fit: Fit, heads: tuple[str, ...], model: nn.Module, state: Mapping[str, Tensor], origin: str) -> str:
    name = type(model).__name__
    if fit.outside(heads).complete and heads:
        return _explain_classes(fit, heads[0], model, state, origin)
    own = list(model.state_dict())
    if not state.keys() & set(own):
        return (
            f"{origin} is of another architecture than {name}: it has no name in common with the model "
            f"(file: {', '.join(list(state)[:2])}, ...; model: {', '.join(own[:2])}, ...)"
        )
    return f"{origin} does not fit {name}: {_differences(fit)}; {_remedy(fit, model)}"


def _explain_classes(fit: Fit, head: str, model: nn.Module, state: Mapping[str, Tensor], origin: str) -> str:
    keep = "pass strict='backbone' to leave the classifier as the model has it"
    weight = state.get(f"{head}.weight")
    classes = int(weight.shape[0]) if weight is not None and weight.ndim else 0
    own = getattr(model, "num_classes", None)
    if weight is None:
        return f"{origin} has no classifier ({head}), the model has {own} classes; {keep}"
    if classes == own:
        return f"{origin} does not fit the model's classifier: {_differences(fit)}; {keep}"
    return f"{origin} has {classes} classes, the model {own}: build it with num_classes={classes}, or {keep}"


def _remedy(fit: Fit, model: nn.Module) -> str:
    first = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv")
    names = (first,) if isinstance(first, str) else tuple(first or ())
    inputs = [k for k in fit.shapes if k.removesuffix(".weight") in names]
    if inputs and len(fit.shapes) == len(inputs) and not fit.missing and not fit.unexpected:
        chans = fit.shapes[inputs[0]][0][1]
        return f"the file's input has {chans} channels: build the model with in_chans={chans}"
    if fit.shapes and not fit.missing and not fit.unexpected:
        return "the model was built with other sizes than the file's"
    return "build the model that the file is of, or pass strict=False to load only what fits"


def _differences(fit: Fit) -> str:
    shapes = [f"{k} is {_size(a)} in the file, {_size(b)} in the model" for k, (a, b) in fit.shapes.items()]
    parts = [
        _listing("missing", fit.missing),
        _listing("unexpected", fit.unexpected),
        _listing("of another shape", shapes),
    ]
    return ", ".join(p for p in parts if p)


def _listing(kind: str, names: list[str], shown: int = 3) -> str:
    if not names:
        return ""
    more = ", ..." if len(names) > shown else ""
    return f"{len(names)} {kind} ({', '.join(names[:shown])}{more})"


def _size(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "a scalar"


# ---- input channels ----------------------------------------------------------------------------------------


def _adapt(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Sum or repeat the first layer's weights for the model's number of input channels, as timm does."""
    first = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv") or ()
    own = model.state_dict()
    for name in (f"{n}.weight" for n in ((first,) if isinstance(first, str) else first)):
        if name in state and name in own and state[name].ndim == own[name].ndim == 4:
            state[name] = adapt_input_conv(own[name].shape[1], state[name], base_chans=state[name].shape[1])
    return state
