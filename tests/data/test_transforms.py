"""Batched augmentation: each image's result depends on its own seed alone, and does what it says."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from zoo.data.transforms import Augmentation, ImagePipeline

EVERYTHING = Augmentation(shift=0.2, rotate=20, scale=0.2, elastic=0.1, flip=0.5, erase=0.5)


def pictures(n: int = 12, chans: int = 3, side: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, chans, side, side), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("size", [None, 12, 24])
def test_an_image_is_the_same_in_every_batch(size: int | None) -> None:
    pipeline = ImagePipeline(size, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), EVERYTHING)
    images, seeds = pictures(), list(range(12))
    together = pipeline(images, seeds)
    for i in range(12):
        assert torch.equal(pipeline(images[i : i + 1], seeds[i : i + 1])[0], together[i])
    backwards = pipeline(images.flip(0), seeds[::-1]).flip(0)
    assert torch.equal(backwards, together)
    assert not torch.equal(pipeline(images, list(range(1, 13))), together)


def test_no_augmentation_is_resizing_and_normalising() -> None:
    images = pictures()
    plain = ImagePipeline(8, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), Augmentation())
    expected = F.interpolate(images.float() / 255, (8, 8), mode="bilinear", antialias=True)
    expected = (expected - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    torch.testing.assert_close(plain(images, [0] * 12), expected)


@pytest.mark.parametrize("shape", [(16, 16), (9, 13)])
def test_flips_and_shifts_copy_pixels_exactly(shape: tuple[int, int]) -> None:
    height, width = shape
    image = torch.rand(1, 2, height, width)
    allowed = []
    for mirrored in (image, image.flip(-1)):
        padded = F.pad(mirrored, (width, width, height, height))
        for dy in range(-2, 3):
            for dx in range(-2, 3):
                allowed.append(padded[0, :, height + dy : 2 * height + dy, width + dx : 2 * width + dx])
    augmentation = Augmentation(shift=2.5 / max(shape), flip=0.5)
    seen = set()
    for seed in range(300):
        result = augmentation.warp(image, augmentation.draw([seed]))[0]
        matches = [i for i, candidate in enumerate(allowed) if torch.equal(candidate, result)]
        assert matches
        seen.add(matches[0])
    if height == width:
        assert len(seen) == 50, "both sides, and every shift by up to two pixels"


def test_rotation_turns_about_the_centre() -> None:
    side = 33
    image = torch.zeros(1, 1, side, side)
    image[..., side // 2, side - 5] = 1.0  # 12 pixels right of the centre
    augmentation = Augmentation(rotate=90)
    grid = torch.arange(side) - side // 2
    for seed in range(10):
        draws = augmentation.draw([seed])
        angle = math.radians((2 * float(draws[0, 3]) - 1) * 90)
        turned = augmentation.warp(image, draws)[0, 0]
        y = float((turned.sum(1) * grid).sum() / turned.sum())
        x = float((turned.sum(0) * grid).sum() / turned.sum())
        assert (x, y) == pytest.approx((12 * math.cos(angle), 12 * math.sin(angle)), abs=0.3)


def test_scale_enlarges_and_shrinks_by_the_drawn_factor() -> None:
    image = torch.zeros(1, 1, 64, 64)
    image[..., 20:44, 20:44] = 1.0
    augmentation = Augmentation(scale=0.3)
    for seed in range(10):
        draws = augmentation.draw([seed])
        factor = 1 + (2 * float(draws[0, 4]) - 1) * 0.3
        area = float(augmentation.warp(image, draws).sum())
        assert area == pytest.approx((24 * factor) ** 2, rel=0.03)


def test_elastic_bends_by_no_more_than_it_says() -> None:
    side, limit = 32, 0.1
    ramp = torch.arange(side).float().expand(1, 1, side, side)  # the value is the column
    augmentation = Augmentation(elastic=limit)
    for seed in range(20):
        moved = augmentation.warp(ramp, augmentation.draw([seed]))[0, 0] - ramp[0, 0]
        inner = moved[8:-8, 8:-8]
        assert inner.abs().max() <= 1.3 * limit * side, "bicubic interpolation overshoots a little"
        assert inner.abs().max() > 0.1


def test_erasing_covers_what_the_paper_says() -> None:
    augmentation = Augmentation(erase=0.7)
    images = torch.ones(4000, 1, 32, 32)
    shares = (augmentation.erase_(images, augmentation.draw(range(4000))) == 0).float().mean((1, 2, 3))
    hit = shares > 0
    assert float(hit.float().mean()) == pytest.approx(0.7, abs=0.03)
    assert float(shares[hit].min()) >= 0.01
    assert float(shares[hit].max()) <= 0.36
    assert float(shares[hit].mean()) == pytest.approx((0.02 + 1 / 3) / 2, abs=0.02)
    coloured = augmentation.erase_(
        torch.ones(1, 3, 8, 8), torch.zeros(1, 42), torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    )
    assert coloured[0, :, 0, 0].tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_one_setting_leaves_the_other_draws_alone() -> None:
    assert not Augmentation()
    assert Augmentation(erase=0.1)
    assert torch.equal(Augmentation(flip=0.5).draw([1, 2]), EVERYTHING.draw([1, 2]))
