"""Adapters against their definitions, the models around them, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
import torchaudio
from torch import Tensor, nn

import zoo
from zoo.models import to_deploy
from zoo.models.modalities import ForecastNet, LogMel, PointViews, SeriesImage, tile_frames


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- sound -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "bins", "length", "shift"), [(16000, 128, 25.0, 10.0), (8000, 40, 32.0, 20.0)])
def test_log_mel_is_kaldis(rate: int, bins: int, length: float, shift: float) -> None:
    adapter = LogMel(rate, bins, length, shift).eval()
    waves = 0.1 * random(2, 9000)
    for wave, found in zip(waves, adapter.fbank(waves - waves.mean(-1, keepdim=True)), strict=True):
        expected = torchaudio.compliance.kaldi.fbank(
            (wave - wave.mean())[None],
            htk_compat=True,
            sample_frequency=rate,
            use_energy=False,
            window_type="hanning",
            num_mel_bins=bins,
            dither=0.0,
            frame_length=length,
            frame_shift=shift,
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_spectrograms_are_cut_or_padded_and_standardised() -> None:
    adapter = LogMel().eval()
    short = adapter(random(2, 8000))
    assert short.shape == (2, 1, 128, 128)
    assert torch.equal(short[..., 48:], torch.full((2, 1, 128, 80), 6.845978 / (2 * 5.5654526)))
    assert adapter(random(2, 40000)).shape == (2, 1, 128, 128)
    assert adapter(random(2, 3, 8000)).shape == (2, 3, 128, 128)
    low = torch.sin(2 * math.pi * 300 * torch.arange(16000) / 16000)
    assert adapter(low[None])[0, 0].mean(-1).argmax() < 32, "rows are frequencies, low ones first"


def test_recordings_are_disturbed_in_training_only() -> None:
    adapter = LogMel(freq_mask=48, time_mask=48, noise=0.1, time_shift=10)
    wave = random(1, 20000)
    torch.manual_seed(0)
    first, second = adapter(wave), adapter(wave)
    assert not torch.equal(first, second)
    adapter.eval()
    assert torch.equal(adapter(wave), adapter(wave))
    assert torch.equal(adapter(wave), LogMel()(wave))


# ---- video -------------------------------------------------------------------------------------------------


def test_frames_side_by_side() -> None:
    clip = random(2, 3, 16, 8, 12)
    image = tile_frames(clip)
    assert image.shape == (2, 3, 32, 48)
    for t in range(16):
        row, column = 8 * (t // 4), 12 * (t % 4)
        assert torch.equal(image[:, :, row : row + 8, column : column + 12], clip[:, :, t])
    assert tile_frames(random(1, 1, 6, 4, 4)).shape == (1, 1, 8, 12)
    assert tile_frames(random(1, 1, 7, 4, 4)).shape == (1, 1, 4, 28)


def test_frames_in_the_authors_layout() -> None:
    """Pixel (r, s) is pixel (4 (r mod H/4) + s // W, s mod W) of frame r // (H/4)."""
    clip = random(2, 3, 16, 8, 12)
    image = tile_frames(clip, "reshape")
    assert image.shape == (2, 3, 32, 48)
    for r in range(32):
        for s in range(48):
            assert torch.equal(image[..., r, s], clip[:, :, r // 2, 4 * (r % 2) + s // 12, s % 12])


# ---- point clouds ------------------------------------------------------------------------------------------


def test_points_are_splatted_around_their_pixel() -> None:
    adapter = PointViews(num_views=1, size=16, dim=4, neighbours=2)
    points = torch.tensor([[[0.0, 0.0, 5.0], [1.0, 0.5, -5.0]]])
    maps = adapter.splat(points, torch.ones(1, 2, 4))
    lit = torch.nonzero(maps[0, 0])
    assert maps.shape == (1, 4, 16, 16)
    assert maps.sum() == 2 * 9 * 4
    assert lit.min() >= 0
    assert lit.max() <= 15
    assert {int(lit[:, 0].min()), int(lit[:, 0].max())} == {0, 15}, "the longer side fills the picture"
    centre = lit.float().mean(0)
    assert torch.allclose(centre, torch.full((2,), 7.5), atol=0.6), "the object is in the middle"


def test_views_are_turned() -> None:
    """About x by i * 90 degrees, then about z by 90 degrees; every one is a rotation."""
    turns = PointViews(num_views=4, size=16, dim=4, neighbours=2).turns
    for i, turn in enumerate(turns):
        angle = math.pi / 2 * i
        about_x = torch.tensor(
            [[1, 0, 0], [0, math.cos(angle), -math.sin(angle)], [0, math.sin(angle), math.cos(angle)]]
        )
        about_z = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
        torch.testing.assert_close(turn, about_z @ about_x, rtol=0, atol=1e-6)


def test_the_order_of_points_does_not_matter() -> None:
    model = zoo.create_model("test_unireplknet_point", num_classes=5).double().eval()
    points = random(2, 64, 3).double()
    with torch.no_grad():
        shuffled = model(points[:, torch.randperm(64)])
        torch.testing.assert_close(shuffled, model(points), rtol=0, atol=1e-9)


def test_shapes_of_the_papers_point_model() -> None:
    model = timm.create_model("unireplknet_point", device="meta")
    points = torch.empty(2, 4096, 3, device="meta")
    assert model.to_maps(points).shape == (8, 3, 224, 224)
    assert model.forward_features(points).shape == (2, 3072, 7, 7)
    assert model(points).shape == (2, 40)


# ---- time series -------------------------------------------------------------------------------------------


def test_an_image_row_lies_within_a_step() -> None:
    """Row r holds features 192 q to 192 q + 191 of step r // 4, q = r mod 4."""
    adapter = SeriesImage(11, seq_len=48, embed_dim=768, dropout=0.0)
    window, marks = random(2, 48, 11), random(2, 48, 4)
    image = adapter(window, marks)
    assert image.shape == (2, 1, 192, 192)
    embedded = adapter.value(window.transpose(1, 2)).transpose(1, 2) + adapter.time(marks)
    for r in (0, 1, 7, 191):
        torch.testing.assert_close(image[:, 0, r], embedded[:, r // 4, 192 * (r % 4) : 192 * (r % 4) + 192])


def test_the_series_is_a_circle_for_the_embedding() -> None:
    adapter = SeriesImage(2, seq_len=4, embed_dim=4, time_features=0, dropout=0.0)
    window = random(1, 4, 2)
    rolled = adapter(window.roll(1, 1))
    torch.testing.assert_close(rolled, adapter(window).view(1, 4, 4).roll(1, 1).view(1, 1, 4, 4))


def test_places_of_stations() -> None:
    adapter = SeriesImage(11, place_features=33, dropout=0.0)
    window, place = random(2, 48, 11), random(2, 33)
    difference = adapter(window, place=place) - adapter(window)
    expected = adapter.place(place)[:, None].expand(2, 48, 768).reshape(2, 1, 192, 192)
    torch.testing.assert_close(difference, expected, rtol=0, atol=1e-5)


def test_a_linear_forecast_is_where_the_correction_starts() -> None:
    model = zoo.create_model("test_unireplknet_forecast", in_chans=3, linear_skip=True).double().eval()
    assert isinstance(model, ForecastNet)
    windows = random(200, 12, 3).double()
    weight = random(6, 12, seed=1).double()
    targets = torch.einsum("hl,nld->nhd", weight, windows) + 0.5
    model.initialize(windows, targets, ridge=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(model(windows), targets, rtol=0, atol=1e-5)


def test_a_forecast_follows_the_windows_level_and_scale() -> None:
    model = zoo.create_model("test_unireplknet_forecast", in_chans=3).double().eval()
    window = random(2, 12, 3).double() * 10
    with torch.no_grad():
        torch.testing.assert_close(model(7 + 100 * window), 7 + 100 * model(window), rtol=1e-4, atol=1e-4)


def test_forecasts_learn_merge_and_move(tmp_path: Any) -> None:
    model = zoo.create_model("test_unireplknet_forecast", in_chans=3, linear_skip=True)
    window, marks = random(4, 12, 3), random(4, 12, 4)
    model(window, marks).square().mean().backward()
    nn.init.normal_(model.backbone.head.weight)
    model.zero_grad()
    model(window, marks).square().mean().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    model.eval().double()
    with torch.no_grad():
        expected = model(window.double(), marks.double())
        merged = to_deploy(model)
        torch.testing.assert_close(merged(window.double(), marks.double()), expected, rtol=0, atol=1e-12)
        zoo.save_pretrained(model, tmp_path)
        again = zoo.create_model(f"local-dir:{tmp_path}", pretrained=True).eval().double()
        torch.testing.assert_close(again(window.double(), marks.double()), expected, rtol=0, atol=1e-12)
        half = model.bfloat16()(window.bfloat16(), marks.bfloat16())
        assert half.dtype == torch.bfloat16
    assert timm.create_model("unireplknet_forecast", device="meta")(torch.empty(2, 48, 11, device="meta")).shape == (
        2,
        24,
        11,
    )


# ---- together ----------------------------------------------------------------------------------------------


def test_any_spatial_backbone_will_do() -> None:
    model = zoo.create_model("unireplknet_audio", num_classes=4, backbone="test_convnext2", num_frames=64)
    assert model(random(2, 8000)).shape == (2, 4)


@pytest.mark.parametrize("name", ["audio", "video", "point", "forecast"])
def test_layers_have_depths(name: str) -> None:
    model = timm.create_model(f"test_unireplknet_{name}")
    ids, last = model.layer_ids()
    assert set(ids) == {key for key, _ in model.named_parameters()}
    heads = [key for key in ids if "head" in key]
    assert heads
    assert all(ids[key] == last for key in heads)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("audio", (2, 2, 8000), r"waveforms of shape \(batch, 1, samples\), got \(2, 2, 8000\)"),
        ("audio", (2, 100), "clips of 100 samples are shorter than a frame of 400"),
        ("video", (2, 3, 24, 24), r"clips of shape \(batch, 3, frames, height, width\), got"),
        ("video", (2, 1, 4, 24, 24), r"clips of shape \(batch, 3, "),
        ("point", (2, 64, 4), r"points of shape \(batch, points, 3\), got \(2, 64, 4\)"),
        ("point", (2, 5, 3), "5 points have no 8 neighbours each"),
        ("forecast", (2, 11, 3), r"windows of shape \(batch, 12, 3\), got \(2, 11, 3\)"),
    ],
)
def test_wrong_inputs_are_told(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model(f"test_unireplknet_{name}")(random(*shape))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("audio", {"num_frames": 0}, "must be positive"),
        ("video", {"tiling": "rows"}, "tiling must be 'tile' or 'reshape', got 'rows'"),
        ("point", {"num_views": 5}, "num_views must be 1 to 4, got 5"),
        ("point", {"in_chans": 2}, "a point needs three coordinates"),
        ("point", {"dim": 6}, "dim a multiple of 4"),
        ("forecast", {"embed_dim": 50}, "12 \\* 50 is not a square.* use embed_dim = .*48"),
        ("forecast", {"backbone": "no_such_model"}, "no_such_model"),
    ],
)
def test_wrong_arguments_are_told(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        timm.create_model(f"test_unireplknet_{name}", **arguments)
