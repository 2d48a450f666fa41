"""Freezing parts of a model by patterns of parameter names, for fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from zoo.registry.loading import classifier_names
from zoo.support.suggest import nearest

__all__ = ["FreezeError", "freeze"]

BACKBONE = "backbone"  # everything but the classifier


class FreezeError(ValueError):
    """A pattern that names nothing, or patterns that leave nothing to train."""


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[nn.Module]:
    """Freeze parameters, and put modules without any other parameter in evaluation mode.

    Frozen modules neither drop out nor update running statistics: as features they are the same in every step.

    Args:
        model: The model, changed in place.
        patterns: Shell wildcards of parameter names (`"*.bias"`), names of modules, which stand for all that is in
            them (`"stem"`, `"stages.[01]"`), or `"backbone"` for everything but the classifier.

    Returns:
        The modules in evaluation mode, which a later `model.train()` must not change.

    Raises:
        FreezeError: A pattern matches no parameter, or no parameter is left to train.
    """
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    frozen: set[str] = set()
    for pattern in patterns:
        found = _matches(model, pattern, names)
        if not found:
            raise FreezeError(f"task.freeze: {pattern!r} is the name of no parameter{_near(model, pattern, names)}")
        frozen |= found
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise FreezeError(f"task.freeze = {list(patterns)} leaves no parameter to train")
    modules = [module for name, module in model.named_modules() if _inside(name, module, frozen)]
    for module in modules:
        module.eval()
    return modules


def _matches(model: nn.Module, pattern: str, names: Sequence[str]) -> set[str]:
    """Names of the parameters and buffers that a pattern stands for."""
    heads = classifier_names(model)
    if pattern == BACKBONE and heads:
        return {name for name in names if not name.startswith(tuple(f"{head}." for head in heads))}
    return {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}


def _inside(name: str, module: nn.Module, frozen: set[str]) -> bool:
    """Whether all parameters of a module are frozen; for a module without any, its buffers."""
    own = [n for n, _ in module.named_parameters()] or [n for n, _ in module.named_buffers()]
    return bool(own) and all((f"{name}.{n}" if name else n) in frozen for n in own)


def _near(model: nn.Module, pattern: str, names: Sequence[str]) -> str:
    """The nearest names, or the first modules of the model."""
    modules = [name for name, module in model.named_modules() if name and next(module.parameters(), None) is not None]
    close = nearest(pattern, [*modules, *names])
    shown = [BACKBONE, *(name for name in modules if "." not in name)] if classifier_names(model) else modules[:8]
    return f"; did you mean {' or '.join(close)}?" if close else f"; parts of the model are {', '.join(shown)}"
