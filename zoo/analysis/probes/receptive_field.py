"""The effective receptive field of a unit in the middle of a feature map."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import PositiveInt

if TYPE_CHECKING:
    from torch import Tensor, nn

from zoo.analysis.plots import plot_receptive_field, square_of_share
from zoo.analysis.probes import Finding, Subject, probe

__all__ = ["receptive_field"]


def receptive_field(model: nn.Module, images: Tensor, stage: int = -1) -> np.ndarray:
    """Effective receptive field of a unit in the middle of a feature map (Luo et al., 2016).

    The channels of the middle pixel are summed with random signs, from a fixed seed for each image, and the magnitude
    of the gradient with respect to the input is averaged over images and input channels. (Without the signs, a map that
    ends in a layer normalisation would have a constant sum and no gradient.) In an untrained model a tiny layer scale
    or a zero last weight hides the blocks; the result is most meaningful for trained weights.

    Args:
        model: Any model with feature maps: with timm's `forward_intermediates`, or with a `forward_features` that
            returns (B, C, H, W). It is run in eval mode, and its mode restored.
        images: Normalised images (B, C, H, W).
        stage: Index of the feature map, as in timm; -1 is the last one.

    Returns:
        Field (H, W) that sums to one.

    Raises:
        ValueError: The model has no maps or no such stage, or its middle does not depend on the input.
    """
    import torch

    kept = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode(False), torch.enable_grad():  # Lightning validates in inference mode
            inputs = images.detach().clone().requires_grad_()
            maps = _feature_map(model, inputs, stage)
            middle = maps[:, :, maps.shape[2] // 2, maps.shape[3] // 2]
            draw = torch.Generator().manual_seed(0)
            signs = torch.randint(0, 2, middle.shape, generator=draw).to(middle) * 2 - 1
            (gradient,) = torch.autograd.grad((middle * signs).sum(), inputs)
    finally:
        for module, training in kept.items():
            module.training = training
    field = gradient.abs().double().mean((0, 1)).cpu().numpy()
    if not field.sum() > 0:
        raise ValueError("the middle of the feature map does not depend on the images; are the weights finite?")
    return field / field.sum()


def _feature_map(model: nn.Module, images: Tensor, stage: int) -> Tensor:
    name = type(model).__name__
    if hasattr(model, "forward_intermediates"):
        try:
            maps = model.forward_intermediates(images, indices=[stage], intermediates_only=True)[0]  # type: ignore[operator]
        except (AssertionError, IndexError) as error:
            raise ValueError(f"{name} has no feature map {stage}; -1 is the last one") from error
    elif hasattr(model, "forward_features"):
        maps = model.forward_features(images)  # type: ignore[operator]
    else:
        raise ValueError(f"{name} has neither forward_intermediates nor forward_features, so no map to look at")
    if maps.ndim != 4:
        raise ValueError(f"{name} makes features of shape {tuple(maps.shape)}, not maps (B, C, H, W)")
    return maps


@probe("receptive-field", "effective receptive field in the middle of a feature map; images or noise")
def probe_receptive_field(subject: Subject, *, count: PositiveInt = 16, stage: int = -1) -> Finding:
    """The effective receptive field over `count` images, of feature map `stage` (-1: the last)."""
    images = subject.images(count)
    field = receptive_field(subject.model, images, stage)
    told = f"effective receptive field of {subject.name}, {len(images)} images of {field.shape[0]} x {field.shape[1]}"
    sides = {f"{share:.0%}": square_of_share(field, share)[2] for share in (0.5, 0.95)}
    return Finding(told, {"sides": sides}, lambda: plot_receptive_field(field, title=subject.name))
