"""Audio classification data: class folders, telephone prompts in five languages, and synthetic spoken digits.

Every batch is `(waveforms, targets)`: float32 (B, samples) in [-1, 1], and int64 (B,). A clip that is longer than
`duration` is cut, at random in training and in the middle otherwise; a shorter one is repeated or followed by silence.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import importlib.util
import io
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from zoo.data import sources
from zoo.data.checks import DataError, extends, remedy, warn_once
from zoo.data.delimited import listed
from zoo.data.image import ImageDataModule
from zoo.data.lists import LIST_WORDS, FileParts, is_list, split_note
from zoo.data.sampling import KeyedDataset, SampleKey, sample_seed, stratified_split
from zoo.data.walk import Files, parts, scan, scan_like
from zoo.support import inputs
from zoo.support.files import CheckpointError, write_atomic
from zoo.support.values import DamagedFileError, first_line, read_text

__all__ = ["AudioFolder", "Clips", "Prompts", "SpokenDigits", "read_audio"]

Share = Annotated[float, Field(ge=0, lt=1)]
Fill = Literal["repeat", "silence"]
Part = Literal["train", "val", "test"]
Parts = dict[Part, tuple[list[Tensor], list[int]]]  # clips and targets

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
CONTAINERS = ("WAV", "WAVEX", "RF64", "W64", "FLAC", "OGG", "MP3", "MPEG")  # detected from the content, not the name
MAX_SECONDS = 600.0
MAX_SAMPLES = 120_000_000
RATES = (100, 1_000_000)  # Hz, accepted in a file
_MAX_SINC_TERM, _MAX_TERM = 1000, 50_000  # largest numerator or denominator of a ratio of sampling rates
_MAX_PEAK = 8.0  # times full scale; louder means integers that were stored as floats
_OVER = 0.001  # above full scale, from rounding
_WHOLE = 0.98  # share of the samples that a header claims; those of compressed formats may be estimates
_MAX_CHUNKS = 10_000  # of a WAV file
_MAX_LIST = 100_000_000  # bytes

RECORDINGS = Files(
    "recording",
    "recordings",
    SUFFIXES,
    hidden=(".", "_"),  # Speech Commands keeps noise in `_background_noise_`
    missing="there is no folder {folder}",
    empty="{folder} has no folders, one for each class",
)


def read_audio(
    path: str | Path, sample_rate: int, longest: float = MAX_SECONDS, shortest: float = 0.0
) -> Tensor | None:
    """Read a WAV, FLAC, OGG or MP3 file as mono int16 samples (n,).

    Args:
        path: The file.
        sample_rate: Hz of the result.
        longest: Maximum duration, seconds.
        shortest: Minimum duration, seconds; an empty recording is damaged only where this is 0.

    Returns:
        The samples, or None if the recording is longer than `longest` or shorter than `shortest`.

    Raises:
        DataError: The file is not a regular file, has an unknown format, is damaged, or has no samples.
    """
    import soundfile

    path = Path(path)
    if not path.is_file():
        raise DataError(f"cannot read the recording {path}: it is not a regular file")
    name: Any = os.fsencode(path) if os.name == "posix" else path  # POSIX names need not be valid text
    try:
        with soundfile.SoundFile(name) as file:
            if file.format not in CONTAINERS:
                raise DataError(f"cannot read the recording {path}: {file.format} is none of WAV, FLAC, OGG and MP3")
            if not file.seekable():
                raise DataError(f"cannot read the recording {path}: convert it from {file.subtype} to PCM first")
            if not RATES[0] <= file.samplerate <= RATES[1]:
                raise DataError(f"cannot read the recording {path}: it claims {file.samplerate} samples a second")
            if not shortest * file.samplerate <= file.frames <= longest * file.samplerate:
                return None
            if file.frames > MAX_SAMPLES:
                raise DataError(f"cannot read the recording {path}: {file.frames:,} samples are too many, cut it first")
            rate = file.samplerate
            # in blocks, so that memory depends neither on the header nor on the number of channels
            pieces, loudest, floats = [np.zeros(0, np.float32)], 0.0, file.subtype in ("FLOAT", "DOUBLE")
            # not file.blocks(), which fills what a cut-off file lacks with the memory's old content
            while len(block := file.read(1 << 16, dtype="float32", always_2d=True)):
                with np.errstate(all="ignore"):  # not finite, or large: told below
                    pieces.append(block.mean(1))
                loudest = max(loudest, float(np.abs(block).max()))
            values = np.concatenate(pieces)
            if _is_cut_off(file.extra_info) or len(values) < _WHOLE * file.frames:
                _warn_per_folder(path, "it is shorter than its header claims, and is used as it is")
            if file.format in ("WAV", "WAVEX") and _has_unclaimed(path):
                _warn_per_folder(path, "it is longer than its header claims, and what the header claims is used")
    except (OSError, RuntimeError, ValueError, MemoryError) as error:
        if isinstance(error, DataError):
            raise
        if not os.access(path, os.R_OK):
            denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            raise DataError(f"cannot read the recording {path} ({denied.strerror}): {remedy(denied)}") from error
        raise DataError(
            f"cannot read the recording {path}: it is damaged or of no known kind ({first_line(error, 120)})"
        ) from error
    if not len(values):
        raise DataError(f"cannot read the recording {path}: it holds no samples")
    if not np.isfinite(values).all():
        what = "it holds values that are not numbers" if floats else "it is damaged or cut off"
        raise DataError(f"cannot read the recording {path}: {what}")
    if (peak := float(np.abs(values).max())) > 1 + _OVER and floats and peak <= _MAX_PEAK:
        _warn_per_folder(path, "it goes beyond full scale (from -1 to 1), and is clipped there")
    if peak > _MAX_PEAK:
        raise DataError(f"cannot read the recording {path}: it holds values up to {peak:.4g}, where full scale is 1")
    if peak < loudest / 1000:
        _warn_per_folder(path, "its channels cancel each other, so that their mean is silence")
    return resampled(torch.from_numpy(values), rate, sample_rate)


def _is_cut_off(log: str) -> bool:
    """Whether libsndfile's log reports less data than the WAV header claims; streams claim the maximum."""
    found = re.search(r"^data *: (\d+) \(should be (\d+)\)", log, re.MULTILINE)
    return found is not None and int(found[2]) < int(found[1]) < 2**31 - 2**16


def _has_unclaimed(path: Path) -> bool:
    """Whether the data of a WAV file are followed by more than other chunks, tags and zeros."""
    with path.open("rb") as file:
        size = path.stat().st_size
        place, known = 12, False
        for _ in range(_MAX_CHUNKS):
            if place >= size or (found := _chunk(file, place, size)) is None:
                break
            known, place = known or found[0] == b"data", found[1]
        file.seek(place)
        rest = file.read(1 << 16).lstrip(b"\0")
    return known and len(rest) > 8 and not rest.startswith((b"TAG", b"ID3"))


def _chunk(file: Any, place: int, size: int) -> tuple[bytes, int] | None:
    """Name of the chunk of a WAV file at `place`, and the place after it; None if there is none inside the file."""
    file.seek(place)
    head = file.read(8)
    after = place + 8 + int.from_bytes(head[4:], "little")
    if len(head) < 8 or after > size or not all(32 <= byte < 127 for byte in head[:4]):
        return None
    return head[:4], after + after % 2


@functools.cache
def _warned(folder: Path, what: str) -> list[Path]:
    """The recording of this folder that the warning was given for; empty until then."""
    return []


def _warn_per_folder(path: Path, what: str) -> None:
    """Warn about a recording, once per folder and message."""
    warned = _warned(path.parent, what)
    if not warned:
        warned.append(path)
        warn_once(f"{path}: {what}; others in its folder are not reported")


def resampled(waveform: Tensor, rate: int, sample_rate: int) -> Tensor:
    """Resample a float waveform (n,) from `rate` to `sample_rate`, as int16 samples.

    Windowed-sinc interpolation for ratios with terms up to 1,000, polyphase filtering otherwise. Terms above 50,000
    are rounded, which changes the ratio by less than 1/50,000.
    """
    ratio = Fraction(sample_rate, rate)
    if ratio != 1 and max(ratio.numerator, ratio.denominator) <= _MAX_SINC_TERM:
        from torchaudio.functional import resample

        waveform = resample(waveform, ratio.denominator, ratio.numerator)
    elif ratio != 1:
        from scipy.signal import resample_poly

        rounded = ratio.limit_denominator(_MAX_TERM) if ratio < 1 else 1 / (1 / ratio).limit_denominator(_MAX_TERM)
        made = resample_poly(waveform.numpy(), rounded.numerator, rounded.denominator)
        waveform = torch.from_numpy(np.asarray(made, np.float32))
    return waveform.mul(32767).round().clamp(-32768, 32767).to(torch.int16)


def fitted(clip: Tensor, length: int, fill: Fill, place: float = 0.5, before: int | None = None) -> Tensor:
    """Crop or pad a clip (n,) to `length` samples.

    Args:
        clip: Samples; an empty clip becomes silence.
        length: Samples of the result.
        fill: How a shorter clip is padded: `repeat` it, or surround it with `silence`.
        place: Position of the crop of a longer clip, from 0 (start) to 1 (end); the centre by default.
        before: Silent samples before a shorter clip; half of the padding by default.
    """
    spare = len(clip) - length
    if spare >= 0:
        start = round(place * spare)
        return clip[start : start + length]
    if fill == "repeat" and len(clip):
        return clip.repeat(-(-length // len(clip)))[:length]
    before = -spare // 2 if before is None else before
    return torch.nn.functional.pad(clip, (before, -spare - before))


def prepare_sound(path: Path, record: inputs.Sound) -> tuple[Tensor, ...]:
    """Read a recording as a model input (1, samples).

    Raises:
        DataError: See :func:`read_audio`; or the recording is longer than ten minutes.
    """
    clip = read_audio(path, record.rate)
    if clip is None:
        raise DataError(f"{path} is longer than {MAX_SECONDS:.0f} seconds: cut it first")
    return (Clips([clip], [0], record.samples, record.fill).images([SampleKey(0)]),)


class Clips(KeyedDataset):
    """Recordings held in memory, cropped or padded to one length.

    Args:
        clips: int16 samples of each clip, (n,).
        targets: Class of each clip.
        length: Samples of a returned waveform.
        fill: How a shorter clip is padded: `repeat` it, or surround it with `silence`.
        seed: Seed of the random crops and gains; None crops the centre.
        gain: Largest random change of loudness, dB.
        min_cut: Samples; with a seed, every longer clip is first cropped to a random length from this to `length`.
    """

    def __init__(
        self,
        clips: Sequence[Tensor],
        targets: Sequence[int] | np.ndarray | Tensor,
        length: int,
        fill: Fill,
        seed: int | None = None,
        gain: float = 0.0,
        min_cut: int | None = None,
    ) -> None:
        super().__init__(targets)
        self.clips, self.length, self.fill, self.seed, self.gain = list(clips), length, fill, seed, gain
        self.min_cut = min_cut

    def images(self, keys: Sequence[SampleKey]) -> Tensor:
        """Waveforms of `keys`, (B, length)."""
        return torch.stack([self._waveform(key) for key in keys])

    def sketch(self, index: int) -> tuple[int, bytes]:
        """Length of the recording, and some of its samples."""
        clip = self.clips[index]
        return len(clip), clip[:: len(clip) // 16 + 1].numpy().tobytes()

    def content(self, index: int) -> bytes:
        """The samples."""
        return self.clips[index].numpy().tobytes()

    def _waveform(self, key: SampleKey) -> Tensor:
        clip = self.clips[key.sample]
        place, loudness = 0.5, 0.0
        if self.seed is not None:
            generator = torch.Generator().manual_seed(sample_seed(self.seed, key.epoch, key.sample))
            place, loudness = torch.rand(2, generator=generator).tolist()
            loudness = self.gain * (2 * loudness - 1)
            if self.min_cut is not None and len(clip) > self.min_cut:
                share, begin = torch.rand(2, generator=generator).tolist()
                kept = round(self.min_cut * (min(len(clip), self.length) / self.min_cut) ** share)
                clip = clip[round(begin * (len(clip) - kept)) :][:kept]
        before = round(place * (self.length - len(clip))) if self.seed is not None else None
        clip = fitted(clip, self.length, self.fill, place, before)
        return clip.float() * (10 ** (loudness / 20) / 32768)


class AudioDataModule(ImageDataModule):
    """Data module of audio clips; subclasses provide `class_names` and `load`."""

    in_chans = 1
    unit = "recordings"

    def __init__(
        self,
        *,
        sample_rate: int,
        duration: float,
        fill: Fill,
        gain: float,
        min_cut: float | None = None,
        val_fraction: float,
        **loading: Any,
    ) -> None:
        if min_cut is not None and min_cut > duration:
            raise ValueError(f"min_cut={min_cut} s must not be longer than duration={duration} s")
        super().__init__(**loading)
        self.sample_rate, self.duration, self.fill, self.gain = sample_rate, duration, fill, gain
        self.min_cut, self.val_fraction = min_cut, val_fraction

    @property
    def samples(self) -> int:
        """Samples of every waveform."""
        return round(self.sample_rate * self.duration)

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(1, 1, samples)."""
        return 1, 1, self.samples

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Input size; waveforms are not normalised."""
        return {"input_size": list(self.input_size), "mean": [0.0], "std": [1.0]}

    def input_record(self) -> dict[str, Any]:
        """Sampling rate, length, crop and padding of every waveform."""
        record = {"kind": "sound", "rate": self.sample_rate, "samples": self.samples, "channels": 1}
        return record | {"cut": "middle", "fill": self.fill}

    def load(self) -> Parts:
        """Clips and targets of each part; without a validation part, one is split off the training part."""
        raise NotImplementedError(f"{type(self).__name__} must implement load()")

    def setup(self, stage: str | None = None) -> None:
        """Read the recordings into memory, once."""
        if self.datasets:
            return
        parts = self.load()
        if "val" not in parts:
            split_off(parts, "val", self.val_fraction)
            if "val" in parts:
                self.notes.append(split_note("val", self.val_fraction))
        for part, (clips, targets) in parts.items():
            training: dict[str, Any] = {}
            if part == "train":
                shortest = None if self.min_cut is None else max(1, round(self.min_cut * self.sample_rate))
                training = {"seed": self.seed, "gain": self.gain, "min_cut": shortest}
            self.datasets[part] = Clips(clips, targets, self.samples, self.fill, **training)


def split_off(parts: Parts, name: Part, share: float) -> None:
    """Move a fixed, stratified share of the training part into a part of its own."""
    clips, targets = parts["train"]
    for part, chosen in zip(("train", name), stratified_split(targets, share, sources.SPLIT_SEED), strict=True):
        if len(chosen):
            parts[part] = [clips[i] for i in chosen], [targets[i] for i in chosen]


# ---- folders -----------------------------------------------------------------------------------------------


class AudioFolder(AudioDataModule, FileParts):
    """Recordings in folders, one per class, or of a list, see :class:`zoo.data.lists.FileParts`.

    `path` holds one folder per class, or `train/`, `test/` and optionally `val/`, each with one folder per class.
    Without a test part, `test_fraction` of each class is held out; in the layout of Speech Commands the test and
    validation parts are the files named in `testing_list.txt` and `validation_list.txt`, one path per line. Nested
    folders, links and hidden files are treated as in :class:`ImageFolder`. All splits are the same for every seed.

    Args:
        path: The folder, or a list.
        sample_rate: Sampling rate of the waveforms, Hz; recordings are resampled to it.
        duration: Length of every waveform, seconds.
        fill: How shorter clips are padded: `repeat` them, or surround them with `silence`.
        gain: Largest random change of loudness in training, dB.
        min_cut: Training clips are first cropped to a random length from this to `duration`, seconds; `None`: no crop.
        min_seconds: Shorter recordings are skipped.
        max_seconds: Longer recordings are skipped.
        val_fraction: Share of the training part used for validation.
        test_fraction: Share of the recordings kept for testing if there is no test part.
        **loader: What is about lists, see :class:`zoo.data.lists.FileParts`; seed and loaders, see
            :class:`zoo.data.ImageDataModule`.

    Raises:
        ValueError: If an argument is outside its range.
        DataError: If the folder is missing, has no classes, or contains a damaged file.
    """

    kind = RECORDINGS

    @extends(FileParts, test_fraction=0.25, eval_batch_size=256)
    def __init__(
        self,
        path: str | Path,
        sample_rate: PositiveInt = 16000,
        duration: PositiveFloat = 1.0,
        fill: Fill = "silence",
        gain: Annotated[float, Field(ge=0)] = 6.0,
        min_cut: PositiveFloat | None = None,
        min_seconds: Annotated[float, Field(ge=0)] = 0.0,
        max_seconds: PositiveFloat = 60.0,
        val_fraction: Share = 0.1,
        **loader: Any,
    ) -> None:
        if min_seconds > max_seconds:
            raise ValueError(f"min_seconds={min_seconds} above max_seconds={max_seconds} leaves no recording")
        super().__init__(
            path=path,
            sample_rate=sample_rate,
            duration=duration,
            fill=fill,
            gain=gain,
            min_cut=min_cut,
            val_fraction=val_fraction,
            **loader,
        )
        self.min_seconds, self.max_seconds = min_seconds, max_seconds

    @property
    def class_names(self) -> list[str]:
        """Names of the class folders, sorted; folders that begin with an underscore are ignored."""
        try:
            return super().class_names
        except DataError as error:
            raise error if is_list(self.path) else DataError(f"{error}{self._help}") from None

    @property
    def _help(self) -> str:
        return "; set data.path to a folder with a folder of recordings for each class"

    def prepare_data(self) -> None:
        """Check that the folder exists; nothing is fetched."""
        _ = self.class_names

    def check_files(self) -> None:
        """Nothing is left to check: all recordings are read before training."""

    def load(self) -> Parts:
        """Read every recording."""
        names = self.class_names
        found: Parts = {}
        for part, files in self._files(names).items():
            kept: tuple[list[Tensor], list[int]] = ([], [])
            skipped, silent = 0, []
            for path, target in zip(*files, strict=True):
                clip = read_audio(path, self.sample_rate, self.max_seconds, self.min_seconds)
                if clip is not None and int(clip.max()) - int(clip.min()) <= 1:  # a step: the rounding of a constant
                    silent.append(path)
                if clip is not None and len(clip) >= self.min_seconds * self.sample_rate:
                    kept[0].append(clip)
                    kept[1].append(target)
                else:
                    skipped += 1
            if skipped:
                spans = f"{self.min_seconds:g} to {self.max_seconds:g} seconds"
                self.notes.append(f"{part}: {skipped:,} recordings are not of {spans} and left out")
            if silent:
                told = f"nothing can be heard in {len(silent):,} recordings of the {part} part"
                warn_once(f"{self.path}: {told}, all samples of each are the same (the first is {silent[0]})")
            lost = set(range(len(names))) - set(kept[1])
            if part == "train" and lost:
                raise DataError(
                    f"{self.path}: class {names[min(lost)]!r} has no recording for training of {self.min_seconds:g} to "
                    f"{self.max_seconds:g} seconds"
                )
            elif lost:
                warn_once(
                    f"{self.path}: the {part} part has no recording of {listed([names[i] for i in sorted(lost)], 5)}"
                )
            if kept[0]:
                found[part] = kept
        if "test" not in found and self._divided is None:
            split_off(found, "test", self.test_fraction)
            self.notes.append(split_note("test", self.test_fraction))
        return found

    def _files(self, names: Sequence[str]) -> dict[Part, tuple[list[str], list[int]]]:
        """Paths and targets of each part that has a folder or a list."""
        if self._divided is not None:
            return self._divided[1]
        where = parts(self.path)
        found: Any = {"train": scan(where["train"], names, RECORDINGS)}
        for part in ("val", "test"):
            if part in where:
                found[part] = scan_like(where[part], where["train"], names, RECORDINGS)
        return found if len(where) > 1 or where["train"] != self.path else self._listed(*found["train"])

    def _listed(self, paths: Sequence[str], targets: Sequence[int]) -> dict[Part, tuple[list[str], list[int]]]:
        """Split files without part folders by the lists of Speech Commands.

        Raises:
            DataError: A list names a missing file, or both lists name the same file.
        """
        known = {Path(path).relative_to(self.path).as_posix(): path for path in paths}
        part_of: dict[str, Part] = {}
        lists: tuple[tuple[str, Part], ...] = (("validation_list.txt", "val"), ("testing_list.txt", "test"))
        for name, part in lists:
            for number, line in _lines(self.path / name):
                path = known.get(line.removeprefix("./"))
                if path is None:
                    raise DataError(f"{self.path / name}, line {number}: there is no recording {line[:100]!r}")
                if part_of.setdefault(path, part) != part:
                    raise DataError(f"{self.path / name}, line {number}: {line[:100]!r} is in validation_list.txt too")
        found: dict[Part, tuple[list[str], list[int]]] = {}
        for path, target in zip(paths, targets, strict=True):
            share = found.setdefault(part_of.get(path, "train"), ([], []))
            share[0].append(path)
            share[1].append(target)
        return found


def _lines(path: Path) -> list[tuple[int, str]]:
    """Line numbers and paths of a list file; empty if there is no such file."""
    if not os.path.lexists(path):
        return []
    try:
        lines = read_text(path, _MAX_LIST, "utf-8-sig").splitlines()
    except (DamagedFileError, FileNotFoundError) as error:
        raise DataError(f"cannot read the list: {first_line(error)}") from None
    found = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise DataError(f"the list {path} is empty: name some recordings in it, or remove it")
    return found


class Prompts(AudioFolder):
    """Language identification: telephone prompts in five languages, one speaker each.

    2,717 recordings of 0.3 to 20 s at 8 kHz, from the Debian packages `asterisk-core-sounds-{en,es,fr,it,ru}-wav`
    (CC-BY-SA-3.0). The ten clips of pure silence in every package are excluded. The test part is a random quarter of
    each language, so every speaker is in all parts.

    Arguments are those of `AudioFolder`; `path` contains `en`, `es`, `fr`, `it` and `ru`.

    Raises:
        ValueError: If an argument is outside its range.
        DataError: If the packages are not installed.
    """

    names = ("en", "es", "fr", "it", "ru")

    @extends(
        AudioFolder,
        without=LIST_WORDS,
        path="/usr/share/asterisk/sounds",
        sample_rate=8000,
        duration=2.0,
        fill="repeat",
        min_seconds=0.3,
        max_seconds=20.0,
    )
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)

    @property
    def class_names(self) -> list[str]:
        """The five languages."""
        return list(self.names)

    @property
    def _help(self) -> str:
        packages = f"apt-get install asterisk-core-sounds-{{{','.join(self.names)}}}-wav"
        return f"; install the recordings ({packages}), or set data.path to the folder that holds them"

    def prepare_data(self) -> None:
        """Check that every language's folder exists; nothing is fetched."""
        for name in self.names:
            if not (self.path / name).is_dir():
                raise DataError(f"there is no folder {self.path / name}{self._help}")

    def _files(self, names: Sequence[str]) -> dict[Part, tuple[list[str], list[int]]]:
        paths, targets = scan(self.path, names, RECORDINGS)
        spoken = [
            (path, target) for path, target in zip(paths, targets, strict=True) if Path(path).parent.name != "silence"
        ]
        return {"train": ([path for path, _ in spoken], [target for _, target in spoken])}


# ---- speech synthesis --------------------------------------------------------------------------------------

ESPEAK = sources.Wheel(
    "espeakng_loader",
    "0.2.4",
    "08721baf27d13d461f6be6eed9a65277e70d68234ff484fd8b9897b222cdcb6d",
    "",
    "py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64",
)
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
#: Accent and timbre of each voice; the parts share no voice and no timbre.
VOICES: dict[Part, tuple[str, ...]] = {
    "train": (
        "en-us+m1",
        "en+f1",
        "en-gb-scotland+m2",
        "en-us+f2",
        "en-gb-x-rp+m3",
        "en+m4",
        "en-029+f3",
        "en-us+Andy",
        "en-gb-x-gbcwmd+m7",
    ),
    "val": ("en-us+m5", "en+Annie"),
    "test": ("en-gb-x-rp+f4", "en-us+m6", "en-029+Reed", "en-gb-scotland+f5"),
}
SPEEDS, PITCHES = (130, 175, 220), (35, 65)  # words a minute; 0 to 99


@contextmanager
def _espeak(folder: Path, download: bool) -> Iterator[tuple[Path, Path]]:
    """Paths of eSpeak NG's library and voices: from the installed package, or unpacked from its wheel meanwhile."""
    found = importlib.util.find_spec("espeakng_loader")
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        if found is not None and found.submodule_search_locations:
            place = Path(next(iter(found.submodule_search_locations))).parent
        else:
            with zipfile.ZipFile(io.BytesIO(ESPEAK.content(folder, download))) as archive:
                archive.extractall(place)
        place = place / "espeakng_loader"
        library = next((p for p in sorted(place.glob("*espeak-ng.*")) if p.suffix in (".so", ".dylib", ".dll")), place)
        yield library, place


def synthesise(library: Path, data: Path, sample_rate: int) -> dict[str, list[tuple[np.ndarray, int]]]:
    """Synthesise every digit with every voice, speed and pitch.

    Returns:
        By voice, the int16 samples (n,) and the digit of each clip.

    Raises:
        DataError: The engine cannot be loaded on this machine, or lacks a voice.
    """
    try:
        engine = ctypes.CDLL(str(library))
    except OSError as error:
        raise DataError(
            f"eSpeak NG cannot be loaded ({error}); elsewhere than on x86_64 Linux: pip install espeakng-loader"
        ) from error
    rate = engine.espeak_Initialize(1, 0, str(data).encode(), 0x8000)  # AUDIO_OUTPUT_RETRIEVAL, DONT_EXIT
    pieces: list[np.ndarray] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def receive(samples: Any, count: int, _: Any) -> int:
        if samples and count > 0:
            pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    engine.espeak_SetSynthCallback(receive)
    spoken: dict[str, list[tuple[np.ndarray, int]]] = {}
    for voice in (voice for voices in VOICES.values() for voice in voices):
        if engine.espeak_SetVoiceByName(voice.encode()):
            raise DataError(f"this eSpeak NG has no voice {voice}")
        for speed in SPEEDS:
            engine.espeak_SetParameter(1, speed, 0)
            for pitch in PITCHES:
                engine.espeak_SetParameter(3, pitch, 0)
                for digit, word in enumerate(WORDS):
                    pieces.clear()
                    text = word.encode() + b"\0"
                    engine.espeak_Synth(text, len(text), 0, 1, 0, 1, None, None)  # POS_CHARACTER, CHARS_UTF8
                    engine.espeak_Synchronize()
                    clip = torch.from_numpy(np.concatenate(pieces)).float() / 32768
                    spoken.setdefault(voice, []).append((resampled(clip, rate, sample_rate).numpy(), digit))
    engine.espeak_Terminate()
    return spoken


class SpokenDigits(AudioDataModule):
    """Ten digits synthesised by eSpeak NG in 15 voices, 3 speeds and 2 pitches: 900 clips of 0.2 to 0.9 s.

    Nine voices are used for training, two for validation and four for testing. The engine (GPL-3) is the installed
    package `espeakng_loader` or its wheel 0.2.4; the clips are synthesised once and cached.

    Args:
        cache: Folder of what is fetched; `None` means `$XDG_CACHE_HOME/kernel-zoo` or `~/.cache/kernel-zoo`.
        download: Fetch the engine with pip if neither the clips nor the engine are present.
        duration: Length of every waveform, seconds, at 16 kHz.
        fill: How shorter clips are padded: `repeat` them, or surround them with `silence`.
        gain: Largest random change of loudness in training, dB.
        **loader: Seed and loaders, see :class:`zoo.data.ImageDataModule`.

    Raises:
        ValueError: If an argument is outside its range.
        DataError: In `prepare_data`, if the engine cannot be fetched or run.
    """

    @extends(ImageDataModule, batch_size=32, eval_batch_size=256)
    def __init__(
        self,
        cache: str | Path | None = None,
        download: bool = True,
        duration: PositiveFloat = 0.9,
        fill: Fill = "silence",
        gain: Annotated[float, Field(ge=0)] = 6.0,
        **loader: Any,
    ) -> None:
        super().__init__(
            sample_rate=16000,
            duration=duration,
            fill=fill,
            gain=gain,
            val_fraction=0.0,
            **loader,
        )
        self.cache = sources.cache_folder(cache)
        self.download = download

    @property
    def class_names(self) -> list[str]:
        """The ten words."""
        return list(WORDS)

    @property
    def _path(self) -> Path:
        return self.cache / "spoken_digits.npz"

    def prepare_data(self) -> None:
        """Synthesise the clips unless they are cached."""
        if self._path.is_file():
            return
        with _espeak(self.cache, self.download) as (library, data):
            spoken = synthesise(library, data, self.sample_rate)
        said = [(voice, i, *clip) for voice, clips in spoken.items() for i, clip in enumerate(clips)]
        arrays: dict[str, Any] = {f"{voice}/{i}/{digit}": samples for voice, i, samples, digit in said}
        try:
            write_atomic(self._path, lambda file: np.savez_compressed(file, **arrays))
        except CheckpointError as error:
            raise DataError(f"{error}; choose another folder with cache=...") from error

    def load(self) -> Parts:
        """The clips of each part, by voice."""
        if not self._path.is_file():
            raise DataError(f"{self._path} is missing: call prepare_data() first, with download=true")
        part_of = {voice: part for part, voices in VOICES.items() for voice in voices}
        parts: Parts = {part: ([], []) for part in VOICES}
        try:
            with np.load(self._path) as arrays:
                for name in arrays.files:
                    voice, _, digit = name.split("/")
                    clip = torch.from_numpy(arrays[name])
                    if clip.ndim != 1 or clip.dtype != torch.int16:
                        raise ValueError(f"{name} is not a 16-bit recording")
                    parts[part_of[voice]][0].append(clip)
                    parts[part_of[voice]][1].append(int(digit))
        except Exception as error:  # zip files and the parser of numpy's headers raise errors of many kinds
            raise DataError(f"{self._path} is damaged ({first_line(error)}): delete it and run again") from error
        return parts
