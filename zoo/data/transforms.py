"""Batched augmentation of small images, with one random seed per image.

Applied image by image, torchvision's transforms cost more than a small network's training step. Here a single
`grid_sample` warps the whole batch, and the result for an image does not depend on its batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Augmentation", "ImagePipeline", "fit_floats"]

_GRID = 4  # control points of the elastic warp along each side
_AREA = (0.02, 1 / 3)  # erased share of the image, as in the paper
_LOG_RATIO = math.log(3.3)  # aspect ratio of the erased rectangle: 1/3.3 to 3.3
_PARAMETERS = ("flip", "shift_x", "shift_y", "rotate", "scale", "erase", "area", "ratio", "top", "left")


@dataclass(frozen=True)
class Augmentation:
    """Random augmentation of images; zero disables each transformation.

    Args:
        shift: Largest shift along each axis, as a share of the side; whole pixels, zero padding.
        rotate: Largest rotation in both directions, degrees.
        scale: Largest relative change of size: the factor is uniform in [1 - scale, 1 + scale].
        elastic: Largest displacement of a 4 x 4 grid of control points, as a share of the side, with bicubic
            interpolation in between (Ronneberger et al., U-Net, 2015, section 3.1).
        flip: Probability of a horizontal flip.
        erase: Probability of setting a rectangle of 2 to 33 % of the image to the mean colour (Zhong et al., Random
            Erasing Data Augmentation, 2020).
    """

    shift: float = 0.0
    rotate: float = 0.0
    scale: float = 0.0
    elastic: float = 0.0
    flip: float = 0.0
    erase: float = 0.0

    def __bool__(self) -> bool:
        return any(getattr(self, f.name) for f in fields(self))

    def draw(self, seeds: Sequence[int]) -> Tensor:
        """Uniform random numbers in [0, 1), `(B, numbers)`: row i depends on `seeds[i]` only.

        All numbers are drawn, used or not, so that changing one setting does not change the others' randomness.
        """
        generator = torch.Generator()
        numbers = torch.empty(len(seeds), len(_PARAMETERS) + 2 * _GRID * _GRID)
        for row, seed in zip(numbers, seeds, strict=True):
            generator.manual_seed(seed)
            torch.rand(row.shape, generator=generator, out=row)
        return numbers

    def warp(self, images: Tensor, draws: Tensor) -> Tensor:
        """Flip, shift, rotate, scale and warp images `(B, C, H, W)` by the numbers of `draw`."""
        if not (self.shift or self.rotate or self.scale or self.elastic or self.flip):
            return images
        height, width = images.shape[-2:]
        numbers = draws[:, : len(_PARAMETERS)].tolist()
        affine = torch.tensor([self._inverse_affine(row, height, width) for row in numbers])
        a, b, c, d, e, f = affine[:, :, None, None].unbind(1)  # each B 1 1
        y = (torch.arange(height) - (height - 1) / 2)[:, None]  # H 1, in pixels from the centre
        x = (torch.arange(width) - (width - 1) / 2)[None, :]  # 1 W
        grid_x = (a * x + b * y + c) * (2 / width)  # B H W, in [-1, 1] from border to border
        grid_y = (d * x + e * y + f) * (2 / height)
        if self.elastic:
            # in [-2, 2] times `elastic`: grid coordinates span 2
            bend = (draws[:, len(_PARAMETERS) :] * 4 - 2).view(-1, 2, _GRID, _GRID) * self.elastic
            bend = F.interpolate(bend, (height, width), mode="bicubic", align_corners=True)  # B 2 H W
            grid_x, grid_y = grid_x + bend[:, 0], grid_y + bend[:, 1]
        # "nearest" copies whole pixels exactly
        mode = "bilinear" if self.rotate or self.scale or self.elastic else "nearest"
        return F.grid_sample(images, torch.stack((grid_x, grid_y), dim=-1), mode=mode, align_corners=False)

    def _inverse_affine(self, draws: list[float], height: int, width: int) -> tuple[float, ...]:
        """The 2 x 3 affine map, row by row, from output to input pixels, relative to the centre."""
        flip, shift_x, shift_y, rotate, scale = draws[:5]
        mirror = -1.0 if flip < self.flip else 1.0
        angle = math.radians((2 * rotate - 1) * self.rotate)
        zoom = 1 + (2 * scale - 1) * self.scale
        cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
        dx, dy = _whole_pixels(shift_x, self.shift * width), _whole_pixels(shift_y, self.shift * height)
        return mirror * cos, mirror * sin, mirror * dx, -sin, cos, dy

    def erase_(self, images: Tensor, draws: Tensor, value: float | Tensor = 0.0) -> Tensor:
        """Set a rectangle of each chosen image `(B, C, H, W)` to `value`, in place."""
        height, width = images.shape[-2:]
        for image, row in zip(images, draws.tolist(), strict=True):
            hit, area, ratio, top, left = row[5 : len(_PARAMETERS)]
            if hit >= self.erase:
                continue
            pixels = (_AREA[0] + area * (_AREA[1] - _AREA[0])) * height * width
            stretch = math.exp((2 * ratio - 1) * _LOG_RATIO)
            h = min(height, max(1, round(math.sqrt(pixels * stretch))))
            w = min(width, max(1, round(math.sqrt(pixels / stretch))))
            y, x = int(top * (height - h + 1)), int(left * (width - w + 1))
            image[:, y : y + h, x : x + w] = value
        return images


def _whole_pixels(uniform: float, limit: float) -> int:
    """Map a uniform number in [0, 1) to a uniform integer in [-limit, limit]."""
    most = int(limit)
    return int(uniform * (2 * most + 1)) - most


def fit_floats(images: Tensor, size: Sequence[int]) -> Tensor:
    """Resize images (B, C, H, W) to `size` (height, width) unless they have it; bilinear with antialiasing."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, tuple(size), mode="bilinear", antialias=True, align_corners=False)


class ImagePipeline:
    """Stored images to model inputs: augment, resize, normalise.

    Args:
        size: Side of the result, pixels; `None` keeps the stored size. Bilinear with antialiasing.
        mean: Mean of each channel, on the scale [0, 1].
        std: Standard deviation of each channel.
        augmentation: Random augmentation, for training.
    """

    def __init__(
        self,
        size: int | None,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: Augmentation | None = None,
    ) -> None:
        self.size = size
        self.mean, self.std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
        self.augmentation = augmentation or None

    def __call__(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """Transform uint8 images `(B, C, H, W)` with their seeds to normalised float32 ones `(B, C, size, size)`."""
        return self.pictures(images, seeds).sub_(self.mean).div_(self.std)

    def pictures(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """As `__call__`, but not normalised: values in [0, 1]."""
        result = images.float().div_(255)
        augmentation = self.augmentation
        draws = augmentation.draw(seeds) if augmentation else None
        if augmentation and draws is not None:
            result = augmentation.warp(result, draws)
        if self.size:
            result = fit_floats(result, (self.size, self.size))
        if augmentation and augmentation.erase and draws is not None:
            augmentation.erase_(result, draws, self.mean)
        return result
