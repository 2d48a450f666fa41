"""The gate for pictures: what is opened and as what, upright, scaled, composed, cropped at the cost of the result."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import resource
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from tests.registry.test_checkpoints import in_child
from zoo.data import DataError
from zoo.data.arrays import read_array
from zoo.data.pictures import FORMATS, Fit, open_picture
from zoo.data.prepare import SUFFIXES, prepare
from zoo.support import inputs

RAMP = np.linspace(0, 255, 48 * 40).reshape(40, 48).astype(np.uint8)  # height 40, width 48
GREY: dict[str, Any] = {"kind": "image", "channels": 1, "size": [40, 40], "background": 0}


def opened(path: Path, **options: Any) -> np.ndarray:
    return np.asarray(open_picture(path, **{"channels": 1, **options}))


# ---- formats -----------------------------------------------------------------------------------------------


def test_the_listed_formats_are_those_that_are_opened() -> None:
    Image.init()
    assert tuple(FORMATS) == SUFFIXES["image"]
    assert {suffix: Image.registered_extensions()[suffix] for suffix in FORMATS} == FORMATS


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_listed_format_is_read_by_content(suffix: str, tmp_path: Path) -> None:
    made, path = tmp_path / f"x{suffix}", tmp_path / "x.png"
    Image.fromarray(RAMP).save(made)
    made.rename(path)
    assert np.abs(opened(path).astype(int) - RAMP).max() <= (12 if suffix in (".jpg", ".jpeg", ".webp") else 0)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(x) (w) file\nshowpage\n"
REFUSED = ("GIF", "PCX", "ICNS", "TGA", "SGI", "PDF", "EPS", "MSP", "JPEG2000", "DDS", "XBM")


@pytest.mark.parametrize("kind", ["postscript", *REFUSED])
def test_other_formats_start_nothing(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("an external program was started")

    path = tmp_path / "x.png"
    if kind == "postscript":
        path.write_bytes(POSTSCRIPT)
    else:
        picture = Image.fromarray(RAMP).convert("1" if kind in ("MSP", "XBM") else "RGB")
        picture.save(path, format=kind)
    monkeypatch.setattr("subprocess.Popen", started)
    monkeypatch.setattr(os, "system", started)
    with pytest.raises(DataError, match=r"cannot read the image .*\(no known image format\): repair or remove it$"):
        open_picture(path)


def test_damaged_pictures_are_told_in_a_sentence(tmp_path: Path) -> None:
    draw, told = np.random.default_rng(0), []
    for kind in ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "PPM"):
        buffer = io.BytesIO()
        Image.fromarray(RAMP).save(buffer, format=kind)
        for i in range(12):
            content = bytearray(buffer.getvalue())
            for place in draw.integers(0, min(len(content), 200), 4):
                content[place] = draw.integers(0, 256)
            path = tmp_path / f"{kind}{i}.png"
            path.write_bytes(bytes(content[: len(content) // 2] if i % 3 == 0 else content))
            with contextlib.suppress(DataError):
                open_picture(path)
                continue
            with pytest.raises(DataError, match=re.escape(str(path))) as caught:
                open_picture(path)
            told.append(str(caught.value))
    assert len(told) > 20
    assert not any("\n" in message for message in told)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match="not a regular file"):
        open_picture(tmp_path / "pipe.png")


# ---- ranges ------------------------------------------------------------------------------------------------


def test_more_than_eight_bits_are_scaled_by_their_range(tmp_path: Path) -> None:
    wide = np.linspace(0, 65535, RAMP.size).reshape(RAMP.shape).astype(np.uint16)
    expected = np.round(wide / 65535 * 255)
    Image.fromarray(wide).save(tmp_path / "a.png")
    Image.fromarray(wide).save(tmp_path / "b.tif")
    Image.fromarray(wide).save(tmp_path / "c.tif", tiffinfo={262: 0})  # white is zero
    (tmp_path / "d.pgm").write_bytes(b"P5\n48 40\n65535\n" + wide.astype(">u2").tobytes())
    Image.fromarray((wide / 65535).astype(np.float32)).save(tmp_path / "e.tif")
    for name in ("a.png", "b.tif", "d.pgm", "e.tif"):
        found = opened(tmp_path / name)
        assert np.abs(found - expected).max() <= 1, name
        assert abs(found.mean() - 127.5) < 0.6
    assert np.abs(opened(tmp_path / "c.tif") - (255 - expected)).max() <= 1
    assert opened(tmp_path / "a.png", channels=3).shape == (40, 48, 3)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (np.full((4, 4), 255, np.float32), "floating-point values from 255 to 255"),
        (np.full((4, 4), -0.5, np.float32), "floating-point values from -0.5 to -0.5"),
        (np.full((4, 4), np.nan, np.float32), "values that are not a number"),
        (np.full((4, 4), 70000, np.int32), "whole numbers of 32 bits or with a sign, whose range is not known"),
    ],
)
def test_unknown_ranges_are_refused(values: np.ndarray, told: str, tmp_path: Path) -> None:
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match=told):
        open_picture(tmp_path / "x.tif")


def test_few_bits_in_sixteen_are_refused(tmp_path: Path) -> None:
    for name in ("x.png", "x.tif"):
        for largest in (1, 255, 4095):
            Image.fromarray(np.full((4, 4), largest, np.uint16)).save(tmp_path / name)
            with pytest.raises(DataError, match=rf"its largest value, {largest}, uses less .*or as 8 bits"):
                open_picture(tmp_path / name)
        for largest in (0, 8192):
            Image.fromarray(np.full((4, 4), largest, np.uint16)).save(tmp_path / name)
            assert opened(tmp_path / name)[0, 0] == round(largest / 65535 * 255)
    (tmp_path / "x.pgm").write_bytes(b"P5\n2 2\n65535\n" + b"\0\xff" * 4)
    with pytest.raises(DataError, match="its largest value, 255,"):
        open_picture(tmp_path / "x.pgm")


def deep_picture(path: Path, values: np.ndarray) -> Path:
    """Write 16-bit colours (H, W, 2 to 4) as PNG, or (H, W, 3) as TIFF or PPM, none of which Pillow writes."""
    height, width, channels = values.shape
    if path.suffix == ".ppm":
        path.write_bytes(b"P6\n%d %d\n65535\n" % (width, height) + values.astype(">u2").tobytes())
    elif path.suffix == ".tif":
        pixels = values.astype("<u2").tobytes()
        tags = {256: width, 257: height, 258: 122, 259: 1, 262: 2, 273: 128, 277: 3, 278: height, 279: len(pixels)}
        entries = b"".join(struct.pack("<HHII", t, 3, 3 if t == 258 else 1, v) for t, v in tags.items())
        path.write_bytes(struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + b"\x10\0" * 3 + pixels)
    else:
        rows = b"".join(b"\0" + row.tobytes() for row in values.astype(">u2"))
        kind = {2: 4, 3: 2, 4: 6}[channels]
        parts = {b"IHDR": struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0), b"IDAT": zlib.compress(rows)}
        found = b"\x89PNG\r\n\x1a\n"
        for name, content in {**parts, b"IEND": b""}.items():
            found += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        path.write_bytes(found)
    return path


@pytest.mark.parametrize("name", ["rgb.png", "rgba.png", "la.png", "rgb.tif", "rgb.ppm"])
def test_few_bits_in_sixteen_are_refused_in_colour_too(name: str, tmp_path: Path) -> None:
    for largest in (255, 1000, 4080, 8000) if name in ("rgb.png", "rgba.png", "rgb.tif") else (1000, 4080):
        values = np.full((4, 5, {"rgba": 4, "la": 2}.get(name[:-4], 3)), largest, np.uint16)
        if name in ("rgba.png", "la.png"):
            values[..., -1] = 65535
            values[0] = 0
            values[0, :, 0] = 65535  # not seen
        path = deep_picture(tmp_path / name, values)
        with pytest.raises(DataError, match=r"has 16 bits a channel, and no value above .*save it scaled .* as 8 bits"):
            open_picture(path)
    for largest in (0, 8192, 65535):
        values = np.full((4, 5, {"rgba": 4, "la": 2}.get(name[:-4], 3)), largest, np.uint16)
        if name in ("rgba.png", "la.png"):
            values[..., -1] = 65535
        found = opened(deep_picture(tmp_path / name, values), channels=3)
        assert abs(int(found[0, 0, 0]) - largest / 257) <= 1


def test_a_file_without_permission_is_to_be_made_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(RAMP).save(tmp_path / "x.png")

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(DataError, match=r"cannot read the image .*\(Permission denied\): make it readable$"):
        open_picture(tmp_path / "x.png")
    (tmp_path / "x.npy").touch()
    with pytest.raises(DataError, match=r"as rows \(Permission denied\): make it readable$"):
        read_array(tmp_path / "x.npy", "rows")


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "RGBA", "LA", "YCbCr"])
def test_modes_become_grey_and_colour(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("x.tif" if mode in ("CMYK", "YCbCr") else "x.png")
    Image.fromarray(RAMP).convert("RGB").convert(mode).save(path)
    assert opened(path).shape == (40, 48)
    colour = opened(path, channels=3)
    assert colour.shape == (40, 48, 3)
    if mode not in ("1", "P"):
        assert np.abs(colour[..., 0].astype(int) - RAMP).max() <= 2


# ---- transparency ------------------------------------------------------------------------------------------


def ink(mode: str) -> Image.Image:
    """A white bar on nothing, in several ways of saying so."""
    alpha = np.zeros((40, 48), np.uint8)
    alpha[10:20] = 255
    if mode == "P":
        picture = Image.fromarray((alpha > 0).astype(np.uint8), "P")
        picture.putpalette([9, 9, 9, 255, 255, 255])
        picture.info["transparency"] = 0
        return picture
    if mode == "L":
        picture = Image.fromarray(alpha)
        picture.info["transparency"] = 0
        return picture
    white = Image.new(mode.replace("A", "").replace("GB", "RGB")[-3:] if mode == "RGBA" else "L", (48, 40), "white")
    white.putalpha(Image.fromarray(alpha))
    return white


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_transparent_pixels_show_the_background(mode: str, tmp_path: Path) -> None:
    picture = ink(mode)
    picture.save(tmp_path / "x.png", **({"transparency": 0} if mode in ("P", "L") else {}))
    black, grey = opened(tmp_path / "x.png", background=0), opened(tmp_path / "x.png", background=200)
    assert (black[10:20] == 255).all()
    assert (np.delete(black, range(10, 20), 0) == 0).all()
    assert (np.delete(grey, range(10, 20), 0) == 200).all()


def test_a_transparent_grey_value_of_sixteen_bits(tmp_path: Path) -> None:
    wide = np.zeros((8, 8), np.uint16)
    wide[2:4] = 65535
    Image.fromarray(wide).save(tmp_path / "x.png", transparency=0)
    found = opened(tmp_path / "x.png", background=100)
    assert (found[2:4] == 255).all()
    assert (found[4:] == 100).all()


# ---- upright -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_pictures_are_turned_upright(suffix: str, tmp_path: Path) -> None:
    upright = np.zeros((40, 48), np.uint8)
    upright[:20, :24] = 255  # the upper left quarter
    back: dict[int, Any] = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud}
    back |= {5: np.transpose, 6: np.rot90, 7: lambda a: np.rot90(a, 2).T, 8: lambda a: np.rot90(a, 3)}
    for orientation, stored in back.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}{suffix}"
        options: dict[str, Any] = {"lossless": True} if suffix == ".webp" else {}
        Image.fromarray(np.ascontiguousarray(stored(upright))).save(path, exif=exif, **options)
        found = opened(path)
        assert found.shape == (40, 48), orientation
        assert np.abs(found.astype(int) - upright).max() < 40, orientation


def test_a_picture_with_a_second_one_for_other_screens_is_a_jpeg(tmp_path: Path) -> None:
    Image.fromarray(RAMP).save(tmp_path / "x.jpg", format="MPO", save_all=True, append_images=[Image.new("L", (9, 9))])
    assert opened(tmp_path / "x.jpg").shape == (40, 48), "as telephones write them"


def test_a_damaged_exif_block_says_nothing(tmp_path: Path) -> None:
    Image.fromarray(RAMP).save(tmp_path / "x.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" + b"\1" * 20)
    assert opened(tmp_path / "x.jpg").shape == (40, 48)


def test_the_first_of_several_pictures_is_taken_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = Image.fromarray(RAMP), Image.fromarray(255 - RAMP)
    for name in ("x.tif", "x.png"):
        first.save(tmp_path / name, save_all=True, append_images=[second])
        for _ in range(2):
            assert (opened(tmp_path / name) == RAMP).all()
        assert caplog.text.count(f"{name} holds several pictures: the first one is used") == 1


# ---- fitting -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_pictures_are_fitted_as_timm_fits_them(mode: str, interpolation: str) -> None:
    draw = np.random.default_rng(0)
    for height, width, pct in ((40, 48, 0.875), (61, 33, 0.9), (24, 24, 1.0), (17, 90, 0.8), (300, 200, 0.875)):
        picture = Image.fromarray(draw.integers(0, 256, (height, width, 3)).astype(np.uint8))
        for size in ([32, 32], [24, 36]):
            how: dict[str, Any] = {"interpolation": interpolation, "crop_pct": pct, "crop_mode": mode}
            how |= {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
            theirs: Any = create_transform((3, size[0], size[1]), is_training=False, **how)
            ours = Fit(inputs.read({"kind": "image", "channels": 3, "size": size, **how}))(picture)
            assert torch.equal(ours, theirs(picture)), (height, width, size)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_long_pictures_are_cropped_first_with_an_equal_result(interpolation: str, monkeypatch: Any) -> None:
    pixels = np.random.default_rng(0).normal(128, 30, (30, 700)).clip(0, 255).astype(np.uint8)
    fit = Fit(inputs.read({**GREY, "crop_pct": 0.875, "interpolation": interpolation}))
    for picture in (Image.fromarray(pixels), Image.fromarray(pixels.T.copy())):
        first = fit(picture)
        with monkeypatch.context() as patch:
            patch.setattr("zoo.data.pictures._CROP_FIRST", 1e9)
            torch.testing.assert_close(first, fit(picture), atol=2 / 255, rtol=0)


def test_what_the_crop_leaves_out_costs_nothing(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    thin = draw.integers(0, 256, (3000, 2, 3)).astype(np.uint8)
    for name, pixels in (("tall.png", thin), ("wide.png", thin.transpose(1, 0, 2))):
        Image.fromarray(pixels).save(tmp_path / name)
        for how in ({}, {"crop_mode": "border"}, {"crop_mode": "squash"}, {"rounded": False}):
            record = {"kind": "image", "channels": 3, "size": [224, 224], "crop_pct": 0.875, **how}
            began = time.process_time()
            (found,) = prepare(tmp_path / name, record)
            assert time.process_time() - began < 0.5, "3.4 s where the whole length is resized"
            assert found.shape == (1, 3, 224, 224)


def test_thin_pictures_and_odd_rates_need_the_memory_of_their_results(tmp_path: Path) -> None:
    """Not 400 MiB for a picture of 6,000 pixels, and not 2.3 GiB for a second of sound."""
    from scipy.signal import resample_poly

    from zoo.data.audio import resampled

    assert callable(resample_poly)  # imported here, so that it does not count
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (3000, 2, 3)).astype(np.uint8)).save(tmp_path / "x.png")
    record = {"kind": "image", "channels": 3, "size": [224, 224], "crop_pct": 0.875}

    def kibibytes() -> str:
        torch.set_num_threads(1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        prepare(tmp_path / "x.png", record)
        resampled(torch.zeros(11127), 11127, 8000)
        return str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

    assert int(in_child(kibibytes)) < 100_000


def test_large_pictures_are_decoded_small(tmp_path: Path) -> None:
    y, x = np.mgrid[:1200, :1300]
    Image.fromarray((127 + 60 * np.sin(x / 300) + 60 * np.cos(y / 200)).astype(np.uint8)).save(tmp_path / "x.jpg")
    small, whole = open_picture(tmp_path / "x.jpg", 1, least=80), open_picture(tmp_path / "x.jpg", 1)
    assert whole.size == (1300, 1200)
    assert 80 <= min(small.size) < 170
    fit = Fit(inputs.read({**GREY, "size": [20, 20]}))
    torch.testing.assert_close(fit(small), fit(whole), atol=0.02, rtol=0)


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    (tmp_path / "x.pgm").write_bytes(b"P5\n10001 10001\n255\n")
    (tmp_path / "y.pgm").write_bytes(b"P5\n100001 100001\n255\n")
    with pytest.raises(DataError, match="10001 x 10001 pixels, more than 100 million"):
        open_picture(tmp_path / "x.pgm")
    with pytest.raises(DataError, match=r"cannot read the image .*pixels"):
        open_picture(tmp_path / "y.pgm")
