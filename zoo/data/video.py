"""Clips: digits that move in one of eight ways, and video files in folders, one per class.

Every batch is `(clips, targets)`: float32 (B, C, T, H, W), and int64 (B,).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from zoo.data import sources
from zoo.data.checks import DataError, checked
from zoo.data.image import ImageDataModule
from zoo.data.sampling import KeyedDataset, SampleKey, sample_seed, stratified_split

__all__ = ["MOTIONS", "MovingDigits", "MovingMnist", "VideoFolder", "read_video"]

Share = Annotated[float, Field(ge=0, lt=1)]

MOTIONS = ("right", "left", "down", "up", "clockwise", "anticlockwise", "grow", "shrink")


class MovingDigits(KeyedDataset):
    """Clips of a digit in motion on a torus: what leaves on one side comes back on the other.

    Start, speed and size are drawn for each clip, anew in every epoch of training, so that no single frame tells the
    motion; sample i moves in way i mod 8.

    Args:
        digits: uint8 images (N, 1, 28, 28).
        frames: T.
        size: Side of a frame.
        seed: Seed of the draws.
    """

    def __init__(self, digits: Tensor, frames: int, size: int, seed: int) -> None:
        super().__init__(torch.arange(len(digits)) % len(MOTIONS))
        self.digits, self.frames, self.size, self.seed = digits, frames, size, seed

    def images(self, keys: Sequence[SampleKey]) -> Tensor:
        """Clips of `keys`, (B, 1, T, size, size), black 0 and white 1."""
        draws = torch.empty(len(keys), 5)
        generator = torch.Generator()
        for row, key in zip(draws, keys, strict=True):
            generator.manual_seed(sample_seed(self.seed, key.epoch, key.sample))
            torch.rand(row.shape, generator=generator, out=row)
        samples = [key.sample for key in keys]
        centre, scale = self._paths(draws, self.targets[samples])  # B T 2 in frame widths, B T
        steps = (torch.arange(self.size) + 0.5) / self.size
        pixels = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1)  # H W 2: x, y
        offset = pixels - centre[:, :, None, None]
        offset = offset - offset.round()  # the shorter way around the torus
        grid = (2 * offset / scale[..., None, None, None]).flatten(1, 2)  # B (T H) W 2, in [-1, 1] across the digit
        digits = self.digits[samples].float() / 255
        return F.grid_sample(digits, grid, align_corners=False).unflatten(2, (self.frames, self.size))

    def _paths(self, draws: Tensor, motion: Tensor) -> tuple[Tensor, Tensor]:
        """Centre and size of the digit in every frame, as shares of the frame's side."""
        start, speed, phase = draws[:, None, :2], 0.04 + 0.06 * draws[:, 2:3], 2 * math.pi * draws[:, 3:4]
        size = 0.45 + 0.15 * draws[:, 4:5]
        time = torch.arange(self.frames).float()
        along = speed * time  # B T
        direction = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1], [0, 0], [0, 0], [0, 0], [0, 0]])[motion]
        centre = start + along[..., None] * direction[:, None]
        turn = torch.tensor([0.0, 0, 0, 0, 1, -1, 0, 0])[motion][:, None]
        angle = phase + turn * along * 5  # y points down: a growing angle is clockwise
        circle = 0.2 * torch.stack([angle.cos(), angle.sin()], -1)
        centre = centre + circle * turn.abs()[..., None]
        growth = torch.tensor([0.0, 0, 0, 0, 0, 0, 1, -1])[motion][:, None]
        middle = time - (self.frames - 1) / 2
        return centre, size * torch.exp(growth * speed * middle)


class MovingMnist(ImageDataModule):
    """Digits of `Mnist5k` in motion: 3,600 clips for training, 400 and 1,000 for validation and testing.

    The question is how a digit moves, not which one it is: right, left, down, up, clockwise, anticlockwise, growing or
    shrinking. Digits are split as in `Mnist5k`, so those of the test have never been seen.

    Args:
        root: Folder of the files; `None` means the cache folder, `$XDG_CACHE_HOME/kernel-zoo` or `~/.cache/kernel-zoo`.
        download: Fetch missing files with pip.
        frames: Frames T of a clip.
        size: Side of a frame in pixels.
        val_fraction: Share of the training part that is used for validation.
        seed: Decides the order of the training clips and their motions.
        batch_size: Training clips of one step of one process.
        eval_batch_size: Clips of one evaluation step of one process; `None` means `batch_size`.
        num_workers: Processes that make clips; 0 makes them in the training process.
        drop_last: Leave out the last, incomplete training batch.
        pin_memory: Load into page-locked memory; `None` does so where a GPU is present.

    Raises:
        ValueError: If an argument is outside its range.
        DataError: If the file cannot be had or is damaged.
    """

    in_chans = 1

    @checked
    def __init__(
        self,
        root: str | Path | None = None,
        download: bool = True,
        frames: PositiveInt = 16,
        size: PositiveInt = 24,
        val_fraction: Share = 0.1,
        seed: NonNegativeInt = 0,
        batch_size: PositiveInt = 64,
        eval_batch_size: PositiveInt | None = 128,
        num_workers: NonNegativeInt = 0,
        drop_last: bool = True,
        pin_memory: bool | None = None,
    ) -> None:
        super().__init__(seed, batch_size, eval_batch_size, num_workers, drop_last, pin_memory)
        self.root = sources.cache_folder(root)
        self.download, self.frames, self.size, self.val_fraction = download, frames, size, val_fraction

    @property
    def class_names(self) -> list[str]:
        """The eight motions."""
        return list(MOTIONS)

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, frames, and the side of a frame."""
        return 1, self.frames, self.size

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Frames go into the model with black 0 and white 1."""
        return {"input_size": list(self.input_size), "mean": [0.0], "std": [1.0]}

    def input_record(self) -> dict[str, Any]:
        """Frames and their size; black is 0 and white 1."""
        record = {"kind": "clip", "channels": 1, "frames": self.frames, "size": [self.size, self.size], "place": 0.5}
        return record | {"mean": [0.0], "std": [1.0], "background": 0}

    def prepare_data(self) -> None:
        """Fetch the digits unless the cache has them."""
        sources.fetch_mnist5k(self.root, self.download)

    def setup(self, stage: str | None = None) -> None:
        """Read the digits, once; validation and test clips are the same for every seed."""
        if self.datasets:
            return
        (images, targets), (test_images, _) = sources.load_mnist5k(self.root)
        first, second = stratified_split(targets, self.val_fraction, sources.SPLIT_SEED)
        clips = partial(MovingDigits, frames=self.frames, size=self.size)
        self.datasets["train"] = clips(images[first], seed=self.seed)
        if len(second):
            self.datasets["val"] = clips(images[second], seed=sources.SPLIT_SEED)
        self.datasets["test"] = clips(test_images, seed=sources.SPLIT_SEED + 1)


# ---- files -------------------------------------------------------------------------------------------------

SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov")


def read_video(path: Path, frames: int, size: int, start: float = 0.5) -> Tensor:
    """Frames of a video file at even steps, as a uint8 clip (3, frames, size, size); needs PyAV.

    Args:
        path: The file.
        frames: Frames T, spread over the whole file; a shorter file shows frames twice.
        size: Side to which the middle square of every frame is resized.
        start: Where in its step each frame is taken, in [0, 1).

    Raises:
        DataError: If PyAV is missing or the file cannot be decoded.
    """
    try:
        import av
    except ImportError as error:
        raise DataError("reading video files needs PyAV: pip install 'kernel-zoo[video]'") from error
    try:
        with av.open(str(path)) as container:
            decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (av.FFmpegError, OSError, IndexError) as error:
        raise DataError(f"cannot read the video {path}: {error}") from error
    if not decoded:
        raise DataError(f"the video {path} has no frames")
    chosen = [decoded[int((i + start) * len(decoded) / frames)] for i in range(frames)]
    clip = torch.stack([torch.from_numpy(frame) for frame in chosen]).permute(0, 3, 1, 2).float()  # T 3 H W
    side = min(clip.shape[-2:])
    top, left = (clip.shape[-2] - side) // 2, (clip.shape[-1] - side) // 2
    clip = clip[..., top : top + side, left : left + side]
    clip = F.interpolate(clip, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return clip.round().clamp(0, 255).to(torch.uint8).transpose(0, 1)


class VideoFiles(KeyedDataset):
    """Video files, decoded when asked for; training draws where in its step a frame is taken, and flips."""

    def __init__(
        self, paths: Sequence[Path], targets: Sequence[int], frames: int, size: int, flip: float, seed: int | None
    ) -> None:
        super().__init__(targets)
        self.paths, self.frames, self.size, self.flip, self.seed = list(paths), frames, size, flip, seed

    def images(self, keys: Sequence[SampleKey]) -> Tensor:
        """Normalised clips of `keys`, (B, 3, T, size, size)."""
        clips = torch.stack([self._clip(key) for key in keys]).float().div_(255)
        mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in (VideoFolder.mean, VideoFolder.std))
        return clips.sub_(mean).div_(std)

    def _clip(self, key: SampleKey) -> Tensor:
        start, flip = 0.5, 1.0
        if self.seed is not None:
            generator = torch.Generator().manual_seed(sample_seed(self.seed, key.epoch, key.sample))
            start, flip = torch.rand(2, generator=generator).tolist()
        clip = read_video(self.paths[key.sample], self.frames, self.size, start)
        return clip.flip(-1) if flip < self.flip else clip


class VideoFolder(ImageDataModule):
    """Video files in folders, one per class: `root/train/CLASS/*.mp4`, likewise `test/` and perhaps `val/`.

    Args:
        root: The folder.
        frames: Frames T of a clip, spread over the whole file.
        size: Side of a frame in pixels.
        hflip: Probability of a horizontal flip in training.
        val_fraction: Share of the training part that is used for validation where there is no `val/`.
        seed: Decides the order of the training clips, their flips and where frames are taken.
        batch_size: Training clips of one step of one process.
        eval_batch_size: Clips of one evaluation step of one process; `None` means `batch_size`.
        num_workers: Processes that decode clips; 0 decodes in the training process.
        drop_last: Leave out the last, incomplete training batch.
        pin_memory: Load into page-locked memory; `None` does so where a GPU is present.

    Raises:
        ValueError: If an argument is outside its range.
        DataError: If the folder is missing or has no classes, PyAV is missing, or a file cannot be decoded.
    """

    @checked
    def __init__(
        self,
        root: str | Path,
        frames: PositiveInt = 16,
        size: PositiveInt = 224,
        hflip: Share = 0.5,
        val_fraction: Share = 0.1,
        seed: NonNegativeInt = 0,
        batch_size: PositiveInt = 8,
        eval_batch_size: PositiveInt | None = None,
        num_workers: NonNegativeInt = 4,
        drop_last: bool = True,
        pin_memory: bool | None = None,
    ) -> None:
        super().__init__(seed, batch_size, eval_batch_size, num_workers, drop_last, pin_memory)
        self.root = Path(root).expanduser()
        self.frames, self.size, self.hflip, self.val_fraction = frames, size, hflip, val_fraction

    @property
    def class_names(self) -> list[str]:
        """Names of the class folders, sorted."""
        folder = self.root / "train"
        names = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
        if not names:
            raise DataError(f"{folder} has no folders with videos, one for each class: set data.root")
        return names

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, frames, and the side of a frame."""
        return 3, self.frames, self.size

    def input_record(self) -> dict[str, Any]:
        """Frames, their size and normalisation."""
        record = {"kind": "clip", "channels": 3, "frames": self.frames, "size": [self.size, self.size], "place": 0.5}
        return record | {"mean": list(self.mean), "std": list(self.std), "rounded": True}

    def prepare_data(self) -> None:
        """Nothing to fetch; a missing folder is told now."""
        _ = self.class_names

    def setup(self, stage: str | None = None) -> None:
        """List the files, once."""
        if self.datasets:
            return
        found: dict[str, tuple[list[Path], list[int]]] = {}
        for part in ("train", "val", "test"):
            for target, name in enumerate(self.class_names):
                for path in sorted((self.root / part / name).glob("*")):
                    if path.suffix.lower() in SUFFIXES:
                        paths, targets = found.setdefault(part, ([], []))
                        paths.append(path)
                        targets.append(target)
        if "train" not in found:
            raise DataError(f"{self.root / 'train'} has no videos; known are {', '.join(SUFFIXES)}")
        if "val" not in found:
            paths, targets = found["train"]
            for part, chosen in zip(
                ("train", "val"), stratified_split(targets, self.val_fraction, sources.SPLIT_SEED), strict=True
            ):
                if len(chosen):
                    found[part] = [paths[i] for i in chosen], [targets[i] for i in chosen]
        for part, (paths, targets) in found.items():
            training = part == "train"
            self.datasets[part] = VideoFiles(  # type: ignore[index]
                paths, targets, self.frames, self.size, self.hflip if training else 0.0, self.seed if training else None
            )
