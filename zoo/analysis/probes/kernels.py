"""Depthwise kernels in their merged form."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import PositiveInt

if TYPE_CHECKING:
    from torch import nn

from zoo.analysis.plots import plot_kernels
from zoo.analysis.probes import Finding, Subject, probe

__all__ = ["merged_kernels"]


def merged_kernels(model: nn.Module, layer: str | None = None) -> tuple[str, np.ndarray]:
    """Kernels of a depthwise layer as used in inference: with merged branches and normalisations.

    Args:
        model: Any model; its deploy form is inspected, the model is unchanged.
        layer: Name of a depthwise convolution or of the block that contains it, such as `stages.1.0`; None for the
            first one of the largest size.

    Returns:
        Name of the layer and its kernels (C, k, k).

    Raises:
        ValueError: There is no such layer, or no depthwise layer at all.
    """
    from torch import nn

    from zoo.models.deploy import to_deploy
    from zoo.support.suggest import suggestion

    found = {
        name: module.weight.detach()[:, 0].double().cpu().numpy()
        for name, module in to_deploy(model).named_modules()
        if isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels and max(module.kernel_size) > 1
    }
    if not found:
        raise ValueError(f"{type(model).__name__} has no depthwise convolution")
    if layer is None:
        layer = max(found, key=lambda name: found[name].shape[-1])
    name = next((name for name in found if name == layer or name.startswith(f"{layer}.")), None)
    if name is None:
        raise ValueError(f"no depthwise layer {layer!r}{suggestion(layer, found)}")
    return name, found[name]


@probe("kernels", "merged depthwise kernels of a layer")
def probe_kernels(subject: Subject, *, count: PositiveInt = 32, layer: str | None = None) -> Finding:
    """`count` merged kernels of a layer, by default the first large one."""
    name, merged = merged_kernels(subject.model, layer)
    size = " x ".join(map(str, merged.shape[-2:]))
    return Finding(
        f"{min(count, len(merged))} of {len(merged)} merged {size} kernels of {name}",
        {"layer": name, "shape": list(merged.shape)},
        lambda: plot_kernels(merged, count=count, title=f"{subject.name}: {name}, {size}"),
    )
