"""A Terminator's hyper-kernels, and its context-dependent kernels for an image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import PositiveInt

if TYPE_CHECKING:
    from torch import Tensor, nn

from zoo.analysis.plots import plot_hyper_kernels
from zoo.analysis.probes import Finding, Subject, probe

__all__ = ["context_kernels", "hyper_kernels"]


def hyper_kernels(model: nn.Module) -> list[np.ndarray]:
    """Global hyper-kernels of every block of a Terminator, (C, N, N) each; sequences are folded, or (C, 1, L).

    Raises:
        ValueError: The model has no hyper-kernels.
    """
    import torch

    if not hasattr(model, "global_kernels"):
        raise ValueError(f"{type(model).__name__} has no hyper-kernels; a Terminator has")
    with torch.no_grad():
        return [_as_maps(kernel[0]) for kernel in model.global_kernels()]  # type: ignore[operator]


def context_kernels(model: nn.Module, image: Tensor) -> list[np.ndarray]:
    """Context-dependent kernels for an image: input of every block times its hyper-kernel.

    Args:
        model: A Terminator; it is run in eval mode, and its mode restored.
        image: An input without the batch axis.

    Returns:
        As :func:`hyper_kernels`.

    Raises:
        ValueError: The model has no hyper-kernels.
    """
    import torch

    kernels = hyper_kernels(model)
    kept = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            maps = model.forward_intermediates(image[None], intermediates_only=True)  # type: ignore[operator]
    finally:
        for module, training in kept.items():
            module.training = training
    inputs = [image[None], *maps[:-1]]
    return [_as_maps(x[0]).reshape(k.shape) * k for x, k in zip(inputs, kernels, strict=True)]


def _as_maps(x: Tensor) -> np.ndarray:
    """(C, ...) as images (C, h, w)."""
    array = x.detach().double().cpu().numpy()
    if array.ndim == 3:
        return array
    side = int(np.sqrt(array.shape[-1]) + 0.5)
    return array.reshape(len(array), side, side) if side * side == array.shape[-1] else array[:, None]


@probe("hyper-kernels", "global hyper-kernels of every block of a Terminator")
def probe_hyper_kernels(subject: Subject, *, count: PositiveInt = 12) -> Finding:
    """`count` hyper-kernels of every block."""
    return _found(hyper_kernels(subject.model), subject, count, "hyper-kernels", "global hyper-kernels", "")


@probe("context-kernels", "a Terminator's context-dependent kernels for one image")
def probe_context_kernels(subject: Subject, *, count: PositiveInt = 12) -> Finding:
    """`count` context-dependent kernels of every block, for the first image of a folder, or for noise."""
    kernels = context_kernels(subject.model, subject.images(1)[0])
    return _found(kernels, subject, count, "kernels for one image", "context-dependent kernels", " for one image")


def _found(kernels: list[np.ndarray], subject: Subject, count: int, title: str, what: str, when: str) -> Finding:
    return Finding(
        f"{what} of every block of {subject.name}{when}",
        {"shapes": [list(block.shape) for block in kernels]},
        lambda: plot_hyper_kernels(kernels, count=count, title=f"{subject.name}: {title}"),
    )
