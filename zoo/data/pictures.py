"""Reading image files: decoding, conversion to grey or RGB, and the evaluation transform.

Only the formats of :data:`FORMATS` are opened, by content, whatever the suffix. EXIF orientation is applied. 16-bit
grey is divided by 65535 (12-bit by 4095); pictures of 16 bits, in grey or colour, must use an eighth of their range;
floating point must lie in [0, 1]. Transparent pixels show the background of the input record. Of a multi-frame file,
the first frame is used.
"""

from __future__ import annotations

import math
import re
import stat
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from zoo.data.checks import DataError, remedy, warn_once
from zoo.data.transforms import fit_floats
from zoo.support import inputs

__all__ = ["FORMATS", "MAX_PIXELS", "Fit", "open_picture", "picture_problem", "prepare_image"]

#: Pillow's format of each supported suffix; no other decoder is used.
FORMATS = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".ppm": "PPM",
    ".bmp": "BMP",
    ".pgm": "PPM",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
}
_READERS = sorted(set(FORMATS.values()))
MAX_PIXELS = 100_000_000
_REDUCE_ABOVE = 1_000_000  # pixels above which an image may be decoded at reduced size
_CROP_FIRST = 8  # times the crop's area: above it, only the crop is resized; equal up to rounding
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # TIFF tags
_MIN_RANGE = 8  # 16-bit values below 1/8 of their range are probably not scaled to 16 bits
_RESCALE = "their range: save it scaled to its range (0 to 65535), or as 8 bits"
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


# ---- opening -----------------------------------------------------------------------------------------------


def open_picture(path: str | Path, channels: int = 3, background: int = 255, least: int | None = None) -> Image.Image:
    """Read an image file as 8-bit grey or RGB, upright.

    Args:
        path: The file.
        channels: 1 for grey, 3 for RGB.
        background: Grey value behind transparent pixels, 0 to 255.
        least: Short side needed, pixels: a much larger image is decoded at an integer fraction of its size, still above
            this. None keeps all pixels.

    Returns:
        An image in Pillow's mode `L` or `RGB`.

    Raises:
        DataError: The file is not a regular file, has an unknown format, is damaged, has more than 100 million pixels,
            or values of unknown range.
    """
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise DataError(f"cannot read the image {path}: it is not a regular file")
        # not by path: Pillow would memory-map the file, and misread rotated TIFF files
        with (
            Path(path).open("rb") as stream,
            warnings.catch_warnings(action="ignore"),
            Image.open(stream, formats=_READERS) as file,
        ):
            if least and file.width * file.height > _REDUCE_ABOVE:
                file.draft(None, (least, least))  # decodes a JPEG at 1/2, 1/4 or 1/8
            if file.width * file.height > MAX_PIXELS:
                raise DataError(
                    f"the image {path} has {file.width} x {file.height} pixels, more than "
                    f"{MAX_PIXELS // 10**6} million: make it smaller first"
                )
            deep = _is_deep(file)
            file.load()
            if deep:
                _check_range(file, path)
            picture = _converted(file, path, channels, background)
            orientation = _orientation(file)
            if file.format in ("PNG", "TIFF", "WEBP") and _has_frames(file):
                warn_once(f"{path} holds several pictures: the first one is used")
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise errors of many kinds on damaged files
        raise DataError(f"cannot read the image {path} ({_reason(error)}): {remedy(error)}") from error
    if least and picture.width * picture.height > _REDUCE_ABOVE and (factor := min(picture.size) // least) > 1:
        picture = picture.reduce(factor)
    return picture.transpose(orientation) if orientation is not None else picture


def _reason(error: Exception) -> str:
    unknown = isinstance(error, UnidentifiedImageError)
    reason = "no known image format" if unknown else getattr(error, "strerror", None) or str(error)
    return " ".join(reason.split())[:120] or type(error).__name__


def picture_problem(path: str | Path) -> str | None:
    """Why an image file cannot be read, by its header alone; None if nothing is wrong there."""
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            return f"{path} (not a regular file)"
        with Path(path).open("rb") as stream, warnings.catch_warnings(action="ignore"):
            Image.open(stream, formats=_READERS).close()
    except Exception as error:  # as above
        return f"{path} ({_reason(error)})"
    return None


def _has_frames(file: Image.Image) -> bool:
    try:
        file.seek(1)
    except Exception:  # no second frame, or a damaged one
        return False
    return True


#: Transposition that turns an image upright, by EXIF orientation.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(file: Image.Image) -> Image.Transpose | None:
    """Transposition by EXIF orientation; None if there is none or the EXIF block is damaged."""
    try:
        return _UPRIGHT.get(file.getexif().get(0x0112, 1))
    except Exception:  # EXIF parsers raise anything on damaged blocks; the pixels are intact
        return None


def _converted(file: Image.Image, path: str | Path, channels: int, background: int) -> Image.Image:
    """Convert a loaded image of any mode to 8-bit grey or RGB."""
    mode = "L" if channels == 1 else "RGB"
    if file.mode.startswith("I") or file.mode == "F":
        values = _scaled_to_bytes(file, path)
        if (clear := _transparent(file)) is not None:
            values[clear] = background
        return Image.fromarray(values).convert(mode)
    if file.has_transparency_data:
        above = file.convert("LA").convert("RGBA") if file.mode == "La" else file.convert("RGBA")
        below = Image.new("RGBA", file.size, (background, background, background, 255))
        return Image.alpha_composite(below, above).convert("RGB").convert(mode)
    return file.convert(mode)


def _transparent(file: Image.Image) -> np.ndarray | None:
    """Mask of the transparent pixels of a 16-bit grey image; None if it declares no transparent value."""
    clear = file.info.get("transparency")
    return np.asarray(file) == clear if isinstance(clear, int) else None


def _scaled_to_bytes(file: Image.Image, path: str | Path) -> np.ndarray:
    """Scale a grey image of more than 8 bits to bytes, by the range of its type."""
    values = np.asarray(file)
    tags: Any = getattr(file, "tag_v2", None) or {}
    white_is_zero = tags.get(_PHOTOMETRIC) == 0
    if file.mode == "F":
        if np.isnan(values).any():
            raise DataError(f"the image {path} holds values that are not a number (NaN): give each pixel a value")
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 1):
            raise DataError(
                f"the image {path} holds floating-point values from {low:g} to {high:g}: only those in [0, 1] have a "
                "known range; rescale it"
            )
        return _to_bytes(values, 1, white_is_zero)
    if file.mode == "I" and file.format not in ("PNG", "PPM"):
        raise DataError(
            f"the image {path} holds whole numbers of 32 bits or with a sign, whose range is not known: save it as 16 "
            "bits"
        )
    said = tags.get(_BITS_PER_SAMPLE, (16,))
    bits = int(said[0] if isinstance(said, tuple) else said)
    seen = values if (clear := _transparent(file)) is None else values[~clear]
    if bits == 16 and 0 < (largest := int(seen.max(initial=0))) * _MIN_RANGE < 2**bits - 1:  # 8 or 12 bits, in 16
        raise DataError(
            f"the image {path} has {bits} bits a pixel, and its largest value, {largest}, uses less than an eighth of "
            f"{_RESCALE}"
        )
    return _to_bytes(values, 2**bits - 1, white_is_zero)


def _is_deep(file: Image.Image) -> bool:
    """Whether a picture that is not loaded yet has 16 bits in each of its channels, of which Pillow keeps eight."""
    if file.mode not in ("LA", "RGB", "RGBA", "RGBX", "RGBa") or not (tiles := getattr(file, "tile", None)):
        return False
    raw, *rest = _told(tiles[0])
    return ";16" in raw or (file.format == "PPM" and rest[-1:] == [2**16 - 1])


def _told(tile: Any) -> tuple[Any, ...]:
    """What Pillow tells a decoder; the layout of the bytes first."""
    return tile[3] if isinstance(tile[3], tuple) else (tile[3],)


def _check_range(file: Image.Image, path: str | Path) -> None:
    """Refuse a colour picture of 16 bits a channel that uses less than an eighth of them, as a grey one is.

    Raises:
        DataError: Its largest value is too small; the upper bytes are all that is known, so a black one is opened again
            to see whether the lower bytes hold something.
    """
    values = np.asarray(file)
    seen = values if file.mode in ("RGB", "RGBX") else values[..., :-1][values[..., -1] > 0]
    largest = int(seen[..., :3].max(initial=0))
    if largest * _MIN_RANGE < 255 and (largest or _has_low_bytes(path)):
        told = f"no value above {256 * largest + 255:,}, which uses less than an eighth of {_RESCALE}"
        raise DataError(f"the image {path} has 16 bits a channel, and {told}")


def _has_low_bytes(path: str | Path) -> bool:
    """Whether the lower bytes of a picture of 16-bit colours hold something; False where they cannot be reached."""
    ends = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}  # the other byte order
    with Path(path).open("rb") as stream, Image.open(stream, formats=_READERS) as file:
        if not all(re.fullmatch("RGB[AXa]?;16[LBN]", _told(tile)[0]) for tile in file.tile):
            return False
        made = [(tile, (_told(tile)[0][:-1] + ends[_told(tile)[0][-1]], *_told(tile)[1:])) for tile in file.tile]
        file.tile = [tile._replace(args=how if isinstance(tile.args, tuple) else how[0]) for tile, how in made]
        file.load()
        return bool(np.asarray(file)[..., :3].any())


def _to_bytes(values: np.ndarray, largest: int, white_is_zero: bool) -> np.ndarray:
    shares = np.clip(values / largest, 0, 1)
    return np.round(255 * (1 - shares if white_is_zero else shares)).astype(np.uint8)


# ---- evaluation transform ----------------------------------------------------------------------------------


class Fit:
    """Evaluation transform of an image: crop, resize, normalise, as timm does.

    Of a very long image only the crop is resized.

    Args:
        record: The image's input record.
        normalize: False returns unnormalised bytes, for display.
    """

    def __init__(self, record: inputs.Picture, normalize: bool = True) -> None:
        self.record, self.normalize = record, normalize
        self.mean, self.std = (torch.tensor(v).view(-1, 1, 1) for v in (record.mean, record.std))

    @property
    def least(self) -> int:
        """Smallest short side, in pixels, for reduced decoding: four times the resized image's longer side."""
        return 4 * max(self._scale())

    def open(self, path: str | Path) -> Image.Image:
        """Open an image file with the record's channels and background.

        Raises:
            DataError: See :func:`open_picture`.
        """
        return open_picture(path, self.record.channels, self.record.background, self.least)

    def __call__(self, picture: Image.Image) -> Tensor:
        """Transform an image to (C, H, W): normalised float32, or bytes."""
        pixels = self._rounded(picture) if self.record.rounded else self._exact(picture)
        if self.normalize:
            return pixels.sub_(self.mean).div_(self.std)
        return pixels.mul_(255).round_().clamp_(0, 255).to(torch.uint8)

    def _scale(self) -> tuple[int, int]:
        """Height and width of the area that the crop is taken from."""
        height, width = (math.floor(side / self.record.crop_pct) for side in self.record.size)
        return height, width

    def _resized(self, picture: Image.Image) -> tuple[int, int]:
        """Width and height of the whole image after resizing; `squash` changes the aspect ratio."""
        height, width = self._scale()
        if self.record.crop_mode == "squash":
            return width, height
        across, down = picture.width / width, picture.height / height
        if self.record.crop_mode == "border":
            ratio = max(across, down)
            return max(1, round(picture.width / ratio)), max(1, round(picture.height / ratio))
        if width == height:  # the long side is rounded down
            short = min(picture.size)
            return int(width * picture.width / short), int(height * picture.height / short)
        ratio = min(across, down)
        return max(width, round(picture.width / ratio)), max(height, round(picture.height / ratio))

    def _rounded(self, picture: Image.Image) -> Tensor:
        """Resize in bytes with Pillow, as timm does."""
        height, width = self.record.size
        whole, how = self._resized(picture), _RESAMPLING[self.record.interpolation]
        if self.record.crop_mode == "border":
            fill = tuple(round(255 * v) for v in self.record.mean)
            fitted = Image.new(picture.mode, (width, height), fill[0] if len(fill) == 1 else fill)
            fitted.paste(picture.resize(whole, how), (_place(whole[0], width), _place(whole[1], height)))
            return _pixels(fitted)
        left, top = -_place(whole[0], width), -_place(whole[1], height)
        if whole[0] * whole[1] <= min(_CROP_FIRST * math.prod(self._scale()), MAX_PIXELS):
            return _pixels(picture.resize(whole, how).crop((left, top, left + width, top + height)))
        across, down = picture.width / whole[0], picture.height / whole[1]
        right, bottom = min((left + width) * across, picture.width), min((top + height) * down, picture.height)
        return _pixels(picture.resize((width, height), how, box=(left * across, top * down, right, bottom)))

    def _exact(self, picture: Image.Image) -> Tensor:
        """Resize in floating point: the centre, in the result's aspect ratio unless it is squashed."""
        height, width = self.record.size
        across, down = picture.width / width, picture.height / height
        if self.record.crop_mode != "squash":
            across = down = min(across, down)
        seen = [max(1, round(side * scale * self.record.crop_pct)) for side, scale in ((width, across), (height, down))]
        left, top = (picture.width - seen[0]) // 2, (picture.height - seen[1]) // 2
        middle = picture.crop((left, top, left + seen[0], top + seen[1]))
        return fit_floats(_pixels(middle)[None], (height, width))[0]


def _place(whole: int, seen: int) -> int:
    """Offset of a length `whole` centred in `seen`, rounded as in timm."""
    return (seen - whole) // 2 if whole < seen else -round((whole - seen) / 2)


def _pixels(picture: Image.Image) -> Tensor:
    """(C, H, W) float32 in [0, 1]."""
    array = np.array(picture, np.uint8)
    array = array[..., None] if array.ndim == 2 else array
    return torch.from_numpy(array).permute(2, 0, 1).contiguous().float().div_(255)


def prepare_image(path: Path, record: inputs.Image) -> tuple[Tensor, ...]:
    """Read an image as a model input (1, C, H, W).

    Raises:
        DataError: See :func:`open_picture`.
    """
    fit = Fit(record)
    return (fit(fit.open(path))[None],)
