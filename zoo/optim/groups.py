"""Parameter groups that respect a model's weight decay exceptions and the depth of its parameters."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Any

from timm.optim._param_groups import param_groups_layer_decay
from torch import nn


def param_groups(model: nn.Module, weight_decay: float = 0.0, layer_decay: float | None = None) -> list[dict[str, Any]]:
    """Parameter groups with and without weight decay and, optionally, one learning rate scale per depth.

    Vectors (norm weights, layer scale), biases and the names in `model.no_weight_decay()` are not decayed. With
    `layer_decay`, a parameter with depth id `i` gets `lr_scale = layer_decay ** (max_id - i)`; ids come from
    `model.layer_ids()` if the model has it (UniRepLKNet's twelve groups), else from timm's `group_matcher`.

    Args:
        model: Any module; frozen parameters are left out.
        weight_decay: Decay of the decayed groups.
        layer_decay: Factor per depth id in (0, 1]; None for the same rate everywhere.

    Returns:
        Groups for a `torch.optim.Optimizer`, in a fixed order. `lr_scale` is applied by the schedule.
    """
    patterns = set(getattr(model, "no_weight_decay", set)())
    if layer_decay is not None and not hasattr(model, "layer_ids"):
        return param_groups_layer_decay(
            model, weight_decay, no_weight_decay_list=sorted(patterns), layer_decay=layer_decay
        )

    ids, max_id = getattr(model, "layer_ids")() if layer_decay is not None else ({}, 0)  # noqa: B009 (not a tensor)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        fixed = parameter.ndim <= 1 or name.endswith(".bias") or any(fnmatch(name, p) for p in patterns)
        depth = ids.get(name, max_id)
        if (depth, fixed) not in groups:
            groups[depth, fixed] = {"params": [], "weight_decay": 0.0 if fixed else weight_decay}
            if layer_decay is not None:
                groups[depth, fixed]["lr_scale"] = layer_decay ** (max_id - depth)
        groups[depth, fixed]["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]
