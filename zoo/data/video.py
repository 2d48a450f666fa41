"""Video data: moving digits with eight motions, and class folders of video files.

Every batch is `(clips, targets)`: float32 (B, C, T, H, W), and int64 (B,).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor

from zoo.data import sources
from zoo.data.checks import DataError, extends, remedy, warn_once
from zoo.data.image import ImageDataModule, Part
from zoo.data.lists import FileParts
from zoo.data.pictures import MAX_PIXELS
from zoo.data.sampling import KeyedDataset, SampleKey, sample_seed, stratified_split
from zoo.data.transforms import fit_floats
from zoo.data.twins import file_content, file_size
from zoo.data.walk import Files
from zoo.support import inputs
from zoo.support.values import first_line

__all__ = ["MOTIONS", "MovingDigits", "MovingMnist", "VideoFolder", "read_video"]

Share = Annotated[float, Field(ge=0, lt=1)]

MOTIONS = ("right", "left", "down", "up", "clockwise", "anticlockwise", "grow", "shrink")


class MovingDigits(KeyedDataset):
    """Clips of a digit that moves with periodic boundaries.

    Start, speed and size are random for each clip and epoch, so no single frame reveals the motion. The motion of
    sample i is i mod 8.

    Args:
        digits: uint8 images (N, 1, 28, 28).
        frames: Frames T of a clip.
        size: Side of a frame, pixels.
        seed: Seed of the random paths.
    """

    def __init__(self, digits: Tensor, frames: int, size: int, seed: int) -> None:
        super().__init__(torch.arange(len(digits)) % len(MOTIONS))
        self.digits, self.frames, self.size, self.seed = digits, frames, size, seed

    def images(self, keys: Sequence[SampleKey]) -> Tensor:
        """Clips of `keys`, (B, 1, T, size, size), black 0 and white 1."""
        uniform = torch.empty(len(keys), 5)
        generator = torch.Generator()
        for row, key in zip(uniform, keys, strict=True):
            generator.manual_seed(sample_seed(self.seed, key.epoch, key.sample))
            torch.rand(row.shape, generator=generator, out=row)
        samples = [key.sample for key in keys]
        centre, scale = self._paths(uniform, self.targets[samples])  # B T 2 in frame widths, B T
        steps = (torch.arange(self.size) + 0.5) / self.size
        pixels = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1)  # H W 2: x, y
        offset = pixels - centre[:, :, None, None]
        offset = offset - offset.round()  # periodic boundaries
        grid = (2 * offset / scale[..., None, None, None]).flatten(1, 2)  # B (T H) W 2, in [-1, 1] across the digit
        digits = self.digits[samples].float() / 255
        return F.grid_sample(digits, grid, align_corners=False).unflatten(2, (self.frames, self.size))

    def _paths(self, uniform: Tensor, motion: Tensor) -> tuple[Tensor, Tensor]:
        """Centre (B, T, 2) and size (B, T) of the digit in every frame, as shares of the frame's side."""
        start, speed, phase = uniform[:, None, :2], 0.04 + 0.06 * uniform[:, 2:3], 2 * math.pi * uniform[:, 3:4]
        size = 0.45 + 0.15 * uniform[:, 4:5]
        time = torch.arange(self.frames).float()
        along = speed * time  # B T
        direction = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1], [0, 0], [0, 0], [0, 0], [0, 0]])[motion]
        centre = start + along[..., None] * direction[:, None]
        turn = torch.tensor([0.0, 0, 0, 0, 1, -1, 0, 0])[motion][:, None]
        angle = phase + turn * along * 5  # y points down, so increasing angles are clockwise
        circle = 0.2 * torch.stack([angle.cos(), angle.sin()], -1)
        centre = centre + circle * turn.abs()[..., None]
        growth = torch.tensor([0.0, 0, 0, 0, 0, 0, 1, -1])[motion][:, None]
        middle = time - (self.frames - 1) / 2
        return centre, size * torch.exp(growth * speed * middle)


class MovingMnist(ImageDataModule):
    """Moving digits of `Mnist5k`: 3,600 clips for training, 400 for validation and 1,000 for testing.

    The class is the motion, not the digit: right, left, down, up, clockwise, anticlockwise, growing or shrinking.
    Digits are split as in `Mnist5k`, so test digits do not appear in training.

    Args:
        cache: Folder of what is fetched; `None` means `$XDG_CACHE_HOME/kernel-zoo` or `~/.cache/kernel-zoo`.
        download: Fetch missing files with pip.
        frames: Frames T of a clip.
        size: Side of a frame, pixels.
        val_fraction: Share of the training part used for validation.
        **loader: Seed and loaders, see :class:`zoo.data.ImageDataModule`.

    Raises:
        ValueError: If an argument is outside its range.
        DataError: If the file cannot be fetched or is damaged.
    """

    in_chans = 1
    unit = "clips"

    @extends(ImageDataModule, eval_batch_size=128)
    def __init__(
        self,
        cache: str | Path | None = None,
        download: bool = True,
        frames: PositiveInt = 16,
        size: PositiveInt = 24,
        val_fraction: Share = 0.1,
        **loader: Any,
    ) -> None:
        super().__init__(**loader)
        self.cache = sources.cache_folder(cache)
        self.download, self.frames, self.size, self.val_fraction = download, frames, size, val_fraction

    @property
    def class_names(self) -> list[str]:
        """The eight motions."""
        return list(MOTIONS)

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, frames, and side of a frame."""
        return 1, self.frames, self.size

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Input size; pixels are in [0, 1]."""
        return {"input_size": list(self.input_size), "mean": [0.0], "std": [1.0]}

    def input_record(self) -> dict[str, Any]:
        """Number and size of the frames; pixels are in [0, 1]."""
        record = {"kind": "clip", "channels": 1, "frames": self.frames, "size": [self.size, self.size], "place": 0.5}
        return record | {"mean": [0.0], "std": [1.0], "background": 0}

    def prepare_data(self) -> None:
        """Fetch the digits unless they are cached."""
        sources.fetch_mnist5k(self.cache, self.download)

    def setup(self, stage: str | None = None) -> None:
        """Read the digits, once; validation and test clips are the same for every seed."""
        if self.datasets:
            return
        (images, targets), (test_images, _) = sources.load_mnist5k(self.cache)
        first, second = stratified_split(targets, self.val_fraction, sources.SPLIT_SEED)
        clips = partial(MovingDigits, frames=self.frames, size=self.size)
        self.datasets["train"] = clips(images[first], seed=self.seed)
        if len(second):
            self.datasets["val"] = clips(images[second], seed=sources.SPLIT_SEED)
        self.datasets["test"] = clips(test_images, seed=sources.SPLIT_SEED + 1)


# ---- files -------------------------------------------------------------------------------------------------

SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov")
VIDEOS = Files(
    "video",
    "videos",
    SUFFIXES,
    missing="{folder} has no folders with videos, one for each class: set data.path",
    empty="{folder} has no folders with videos, one for each class: set data.path",
)
# what FFmpeg may read: no playlists or scripts, and no other file
_CLOSED = {"format_whitelist": "avi,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2", "protocol_whitelist": "file"}


def _frames(path: Path) -> Iterator[Any]:
    """Iterate over the frames of a video file.

    Raises:
        DataError: PyAV is missing, or the file is not a regular file, has another format, or is damaged; or, after the
            last frame, clearly fewer came out than the file claims.
    """
    try:
        import av
    except ImportError as error:
        raise DataError("reading video files needs PyAV: pip install 'kernel-zoo[video]'") from error
    if not path.is_file():
        raise DataError(f"cannot read the video {path}: it is not a regular file")
    try:
        with path.open("rb") as file, av.open(file, options=_CLOSED) as container:
            if not container.streams.video:
                raise DataError(f"cannot read the video {path}: it holds no pictures")
            pixels = container.streams.video[0]
            _check_size(path, pixels)
            pixels.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # the header may be wrong
            count, end = 0, -math.inf  # seconds
            for packet in container.demux(pixels):  # type: ignore[union-attr]
                if (time := packet.dts if packet.pts is None else packet.pts) is not None:
                    end = max(end, float((time + (packet.duration or 0)) * packet.time_base))
                for frame in packet.decode():
                    _check_size(path, frame)
                    count += 1
                    yield frame
            if count and end > -math.inf:
                _check_whole(path, container, count, end)
    except DataError:
        raise
    except (av.FFmpegError, OSError, IndexError, ValueError) as error:
        told = getattr(error, "strerror", None) or first_line(error, 120)
        if isinstance(error, PermissionError):
            raise DataError(f"cannot read the video {path} ({told}): {remedy(error)}") from error
        raise DataError(f"cannot read the video {path}: it is damaged or of no known kind ({told})") from error


def _check_size(path: Path, pixels: Any) -> None:
    if pixels.width * pixels.height > MAX_PIXELS:
        raise DataError(f"{path} has frames of {pixels.width} x {pixels.height} pixels: make it smaller first")


_MISSING = 0.1  # share of a video; without more than this it is refused
_SLACK = 2.5  # frames, by which a claimed duration may be off


def _check_whole(path: Path, container: Any, count: int, end: float) -> None:
    """Refuse a video of which clearly fewer frames came out than it claims; warn if it is a few.

    The index of MP4 and MOV files claims the time of every frame, so the end of the last one is compared with the
    duration: a rate that varies and an edit list are in both. Others (AVI, MKV, WebM) may claim the duration of their
    sound, of a last frame that stays or of frames that repeat, so they are believed only where they are cut off or
    damaged. Files that claim no duration are used as they are.

    Args:
        path: The file.
        container: It, open.
        count: Frames that came out.
        end: Time of the end of the last one, seconds.
    """
    video, form = container.streams.video[0], container.format.name
    indexed, rate = "mov" in form, float(video.average_rate or 0)
    if indexed:
        start, length = (float((value or 0) * video.time_base) for value in (video.start_time, video.duration))
        expected, missing = length * rate, (start + length - end) * rate
    else:
        span = max(0, (container.duration or 0) - max(0, container.start_time or 0)) / 1e6
        expected = float(video.frames) or span * rate
        missing = expected - count
    if missing <= min(_SLACK if indexed else 1.5, expected / 2) or not (indexed or _is_damaged(path, form)):
        return
    told = f"it is damaged or cut off: {count:,} of about {max(round(expected), count + 1):,} frames can be read"
    if missing > _MISSING * expected:
        raise DataError(f"cannot read the video {path}: {told}")
    warn_once(f"the video {path} is used as it is, and {told}")


def _is_damaged(path: Path, form: str) -> bool:
    """Whether the structure of an AVI or a Matroska file reaches past its end, or is no structure."""
    if "matroska" in form:
        return not _is_nested(path)
    with path.open("rb") as file:
        head = file.read(8)
        return int.from_bytes(head[4:], "little") + 8 > path.stat().st_size


_SEGMENT, _CLUSTER, _BLOCK = 0x18538067, 0x1F43B675, 0xA3
_MOST_TRACKS, _MOST_ELEMENTS = 127, 5_000_000


def _is_nested(path: Path) -> bool:
    """Whether the elements of a Matroska file, down to the blocks of its clusters, end where those around them do."""
    ends = [path.stat().st_size]
    with path.open("rb") as file:
        for _ in range(_MOST_ELEMENTS):  # further ones are not looked at
            if (place := file.tell()) >= ends[0]:
                break
            while place >= ends[-1]:
                ends.pop()
            name, size = _number(file, 4, keep_mark=True), _number(file, 8)
            if name is None or size is None:
                return False
            after = file.tell() + size
            if size < 0 and name in (_SEGMENT, _CLUSTER):  # of unknown size: a stream
                continue
            if size < 0 or after > ends[-1] or (name == _BLOCK and not 1 <= (_number(file, 8) or 0) <= _MOST_TRACKS):
                return False
            if name in (_SEGMENT, _CLUSTER):
                ends.append(after)
            else:
                file.seek(after)
    return True


def _number(file: Any, longest: int, keep_mark: bool = False) -> int | None:
    """A number of EBML, whose first set bit marks its length; -1 if it is unknown (all ones), None if it is none."""
    first = file.read(1)
    length = 9 - first[0].bit_length() if first and first[0] else longest + 1
    rest = file.read(length - 1) if length <= longest else b""
    if length > longest or len(rest) < length - 1:
        return None
    number, mark = int.from_bytes(first + rest), 1 << (7 * length)
    if keep_mark:
        return number
    return -1 if number == 2 * mark - 1 else number - mark


def read_video(
    path: str | Path, frames: int, size: int | Sequence[int], start: float = 0.5, channels: int = 3
) -> Tensor:
    """Read evenly spaced frames of a video file as a uint8 clip (channels, frames, height, width); needs PyAV.

    Args:
        path: The file.
        frames: Number of frames T, evenly spaced over the file; a shorter file repeats frames.
        size: Height and width, or side, to which the centre of every frame is resized.
        start: Position of a frame within its step, in [0, 1).
        channels: 3 for RGB, 1 for grey.

    Raises:
        DataError: If PyAV is missing or the file cannot be decoded.
    """
    path, size = Path(path), (size, size) if isinstance(size, int) else tuple(size)
    total = sum(1 for _ in _frames(path))
    if not total:
        raise DataError(f"the video {path} has no frames")
    chosen = [int((i + start) * total / frames) for i in range(frames)]
    kept: dict[int, Tensor] = {}  # memory does not grow with the length of the file
    wanted = set(chosen)
    for i, frame in enumerate(_frames(path)):
        if i in wanted:
            array = frame.to_ndarray(format="rgb24" if channels == 3 else "gray")
            kept[i] = _fitted(np.rot90(array, round(getattr(frame, "rotation", 0) / 90)), size)
    return torch.stack([kept[i] for i in chosen], 1)


def _fitted(frame: np.ndarray, size: tuple[int, ...]) -> Tensor:
    """Centre crop of an upright frame (H, W) or (H, W, C) in the aspect ratio of `size`, resized to bytes (C, h, w)."""
    pixels = torch.from_numpy(frame.copy())
    pixels = pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels[None]
    scale = min(pixels.shape[-2] / size[0], pixels.shape[-1] / size[1])
    height, width = (max(1, round(side * scale)) for side in size)
    top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
    middle = pixels[:, top : top + height, left : left + width].float()[None]
    return fit_floats(middle, size)[0].round().clamp(0, 255).to(torch.uint8)


def clip_of(path: str | Path, record: inputs.Clip, start: float | None = None) -> Tensor:
    """Read a video file as a normalised clip (C, T, H, W).

    Args:
        path: The file.
        record: The clip's input record.
        start: Position of a frame within its step; that of the record by default.
    """
    clip = read_video(path, record.frames, record.size, record.place if start is None else start, record.channels)
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (record.mean, record.std))
    return clip.float().div_(255).sub_(mean).div_(std)


def prepare_clip(path: Path, record: inputs.Clip) -> tuple[Tensor, ...]:
    """Read a video as a model input (1, C, T, H, W).

    Raises:
        DataError: See :func:`read_video`.
    """
    return (clip_of(path, record)[None],)


class VideoFiles(KeyedDataset):
    """Video files, decoded on access; with a seed, frame positions are random, and flips with probability `flip`."""

    def __init__(
        self, paths: Sequence[str], targets: Sequence[int], record: inputs.Clip, flip: float, seed: int | None
    ) -> None:
        super().__init__(targets)
        self.paths, self.record, self.flip, self.seed = list(paths), record, flip, seed

    def images(self, keys: Sequence[SampleKey]) -> Tensor:
        """Normalised clips of `keys`, (B, 3, T, size, size)."""
        return torch.stack([self._clip(key) for key in keys])

    def sketch(self, index: int) -> int:
        """Bytes of the file."""
        return file_size(self.paths[index])

    def content(self, index: int) -> bytes:
        """Digest of the file."""
        return file_content(self.paths[index])

    def _clip(self, key: SampleKey) -> Tensor:
        if self.seed is None:
            return clip_of(self.paths[key.sample], self.record)
        generator = torch.Generator().manual_seed(sample_seed(self.seed, key.epoch, key.sample))
        start, flip = torch.rand(2, generator=generator).tolist()
        clip = clip_of(self.paths[key.sample], self.record, start)
        return clip.flip(-1) if flip < self.flip else clip


class VideoFolder(FileParts):
    """Video files in folders, one per class, or of a list, see :class:`zoo.data.lists.FileParts`.

    `path` contains `train/` and optionally `val/` (or `valid/`, `validation/`) and `test/`, each with one folder per
    class; or the class folders themselves. Without a validation folder, `val_fraction` of each class's training files
    is split off; without a test folder, the validation part is also the test part, with a warning. Nested folders,
    links and hidden files are treated as in :class:`ImageFolder`.

    Args:
        path: The folder, or a list.
        frames: Frames T of a clip, evenly spaced over the file.
        size: Side of a frame, pixels.
        hflip: Probability of a horizontal flip in training.
        val_fraction: Share of the training part used for validation if there is no `val/`.
        **loader: What is about lists, see :class:`zoo.data.lists.FileParts`; seed and loaders, see
            :class:`zoo.data.ImageDataModule`.

    Raises:
        ValueError: If an argument is outside its range.
        DataError: If the folder is missing or has no classes, PyAV is missing, or a file cannot be decoded.
    """

    tests_on_validation = True
    kind = VIDEOS
    unit = "videos"

    @extends(FileParts, batch_size=8, num_workers=4)
    def __init__(
        self,
        path: str | Path,
        frames: PositiveInt = 16,
        size: PositiveInt = 224,
        hflip: Share = 0.5,
        val_fraction: Share = 0.1,
        **loader: Any,
    ) -> None:
        super().__init__(path=path, val_fraction=val_fraction, **loader)
        self.frames, self.size, self.hflip = frames, size, hflip

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, frames, and side of a frame."""
        return 3, self.frames, self.size

    def input_record(self) -> dict[str, Any]:
        """Number, size and normalisation of the frames."""
        record = {"kind": "clip", "channels": 3, "frames": self.frames, "size": [self.size, self.size], "place": 0.5}
        return record | {"mean": list(self.mean), "std": list(self.std), "rounded": True}

    def prepare_data(self) -> None:
        """Check that the folder exists; nothing is fetched."""
        _ = self.class_names

    def setup(self, stage: str | None = None) -> None:
        """List the files, once."""
        if self.datasets:
            return
        record = inputs.read(self.input_record())
        parts: tuple[Part, ...] = ("train", "val", "test")
        for part in parts:
            if (found := self.part(part)) is not None:
                training = part == "train"
                flip, seed = (self.hflip, self.seed) if training else (0.0, None)
                self.datasets[part] = VideoFiles(*found, record, flip, seed)
        if "test" not in self.datasets and "val" in self.datasets:
            if stage not in ("fit", "validate"):  # a training run has its own message
                warn_once(f"{self.path} has no test part: the test is on the validation part")
            self.datasets["test"] = self.datasets["val"]

    def problem_of(self, path: str) -> str | None:
        """Why a video cannot be read, by its first frame."""
        try:
            next(_frames(Path(path)), None)
        except DataError as error:
            return str(error)
        return None
