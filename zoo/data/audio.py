"""Recordings by class: folders of one's own, real telephone prompts in five languages, and digits spoken by a machine.

Every batch is `(waveforms, targets)`: float32 (B, samples) in [-1, 1], and int64 (B,). A clip that is longer than
`duration` is cut, at random in training and in the middle otherwise; a shorter one is repeated or followed by silence.
"""

from __future__ import annotations

import ctypes
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
from zoo.data.checks import DataError, extends, tell
from zoo.data.delimited import listed
from zoo.data.image import ImageDataModule
from zoo.data.sampling import KeyedDataset, SampleKey, sample_seed, stratified_split
from zoo.data.walk import Files, class_folders, parts, scan, scan_like
from zoo.support import inputs
from zoo.support.files import CheckpointError, write_atomic
from zoo.support.values import DamagedFileError, first_line, read_text

__all__ = ["AudioFolder", "Clips", "Prompts", "SpokenDigits", "read_audio"]

Share = Annotated[float, Field(ge=0, lt=1)]
Fill = Literal["repeat", "silence"]
Part = Literal["train", "val", "test"]
Parts = dict[Part, tuple[list[Tensor], list[int]]]  # clips and targets

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
CONTAINERS = ("WAV", "WAVEX", "RF64", "W64", "FLAC", "OGG", "MP3", "MPEG")  # by content, whatever a file is called
MAX_SECONDS = 600.0
MAX_SAMPLES = 120_000_000
RATES = (100, 1_000_000)  # Hz, of a file
_SIMPLE, _FINE = 1000, 50_000  # terms of a ratio of two rates
_LOUDEST = 8.0  # times full scale: more than any recorder's headroom, less than whole numbers kept as floats have
_MAX_LIST = 100_000_000  # bytes

RECORDINGS = Files(
    "recording",
    "recordings",
    SUFFIXES,
    hidden=(".", "_"),  # Speech Commands keeps noise in `_background_noise_`
    missing="there is no folder {folder}",
    empty="{folder} has no folders, one for each class",
)


def read_audio(path: str | Path, sample_rate: int, longest: float = MAX_SECONDS) -> Tensor | None:
    """A recording as mono int16 samples (n,) at `sample_rate`; WAV, FLAC, OGG and MP3.

    Args:
        path: The file.
        sample_rate: Hz of the result.
        longest: Seconds; a longer recording is not read.

    Returns:
        The samples, or None where the recording is longer.

    Raises:
        DataError: It is no regular file, not of a known format, damaged, or holds no samples.
    """
    import soundfile

    path = Path(path)
    if not path.is_file():
        raise DataError(f"cannot read the recording {path}: it is no regular file")
    name: Any = os.fsencode(path) if os.name == "posix" else path  # a name need not be text
    try:
        with soundfile.SoundFile(name) as file:
            if file.format not in CONTAINERS:
                raise DataError(f"cannot read the recording {path}: {file.format} is none of WAV, FLAC, OGG and MP3")
            if not file.seekable():
                raise DataError(f"cannot read the recording {path}: convert it from {file.subtype} to PCM first")
            if not RATES[0] <= file.samplerate <= RATES[1]:
                raise DataError(f"cannot read the recording {path}: it claims {file.samplerate} samples a second")
            if file.frames > longest * file.samplerate:
                return None
            if file.frames > MAX_SAMPLES:
                raise DataError(f"cannot read the recording {path}: {file.frames:,} samples are too many, cut it first")
            rate = file.samplerate
            # a piece at a time: what a header claims, and hundreds of channels, need no memory
            pieces, loudest = [np.zeros(0, np.float32)], 0.0
            for block in file.blocks(1 << 16, dtype="float32", always_2d=True):
                pieces.append(block.mean(1))
                loudest = max(loudest, float(np.abs(block).max()))
            values = np.concatenate(pieces)
            if _is_cut_off(file.extra_info):
                _tell_of(path, "it ends before what its header claims, and is taken as it is")
    except (OSError, RuntimeError, ValueError, MemoryError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"cannot read the recording {path}: it is damaged or of no known kind ({first_line(error, 120)})"
        ) from error
    if not len(values):
        raise DataError(f"cannot read the recording {path}: it holds no samples")
    if not np.isfinite(values).all():
        raise DataError(f"cannot read the recording {path}: it holds values that are no numbers")
    if (peak := float(np.abs(values).max())) > _LOUDEST:
        raise DataError(f"cannot read the recording {path}: it holds values up to {peak:.4g}, where full scale is 1")
    if peak < loudest / 1000:
        _tell_of(path, "its channels cancel each other, so that their mean is silence")
    return resampled(torch.from_numpy(values), rate, sample_rate)


def _is_cut_off(log: str) -> bool:
    """Whether the log of a WAV tells of fewer bytes than its header claims; that of a stream claims the most."""
    found = re.search(r"^data *: (\d+) \(should be (\d+)\)", log, re.MULTILINE)
    return found is not None and int(found[2]) < int(found[1]) < 2**31 - 2**16


@functools.cache
def _first_of(folder: Path, what: str) -> list[Path]:
    """The recording of a folder of which this was told, once it was."""
    return []


def _tell_of(path: Path, what: str) -> None:
    """Tell something of a recording, of the first of a folder only."""
    first = _first_of(path.parent, what)
    if not first:
        first.append(path)
        tell(f"{path}: {what}; of others in its folder this is not said again")


def resampled(waveform: Tensor, rate: int, sample_rate: int) -> Tensor:
    """A float waveform (n,) as int16 samples at another rate.

    The cost is that of the result, whatever the two rates have in common: a windowed sinc for each phase of a simple
    ratio, polyphase filtering for any other; one of terms above 50,000 is rounded, by less than 1/50,000 of itself.
    """
    ratio = Fraction(sample_rate, rate)
    if ratio != 1 and max(ratio.numerator, ratio.denominator) <= _SIMPLE:
        from torchaudio.functional import resample

        waveform = resample(waveform, ratio.denominator, ratio.numerator)
    elif ratio != 1:
        from scipy.signal import resample_poly

        rounded = ratio.limit_denominator(_FINE) if ratio < 1 else 1 / (1 / ratio).limit_denominator(_FINE)
        made = resample_poly(waveform.numpy(), rounded.numerator, rounded.denominator)
        waveform = torch.from_numpy(np.asarray(made, np.float32))
    return waveform.mul(32767).round().clamp(-32768, 32767).to(torch.int16)


def fitted(clip: Tensor, length: int, fill: Fill, place: float = 0.5, before: int | None = None) -> Tensor:
    """A clip (n,) cut or filled to `length` samples.

    Args:
        clip: Samples; none stay silence.
        length: Samples of the result.
        fill: How a shorter clip is filled: `repeat` it, or let `silence` surround it.
        place: Where a longer clip is cut, from 0 (its beginning) to 1; the middle by default.
        before: Silent samples before a shorter clip; half of them by default.
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
    """One recording as the model's input, (1, samples).

    Raises:
        DataError: See :func:`read_audio`, or it is longer than ten minutes.
    """
    clip = read_audio(path, record.rate)
    if clip is None:
        raise DataError(f"{path} is longer than {MAX_SECONDS:.0f} seconds: cut it first")
    return (Clips([clip], [0], record.samples, record.fill).images([SampleKey(0)]),)


class Clips(KeyedDataset):
    """Recordings held in memory, cut or filled to one length.

    Args:
        clips: int16 samples of each clip, (n,).
        targets: Class of each clip.
        length: Samples of an answer.
        fill: How a shorter clip is filled: `repeat` it, or let `silence` follow.
        seed: Seed of the cuts; None cuts in the middle.
        gain: Largest change of loudness, in dB; drawn with the cut.
        min_cut: Samples; with a seed, every longer clip is first cut at random to between this and `length`.
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
    """Loaders over clips; subclasses provide `class_names` and `load`."""

    in_chans = 1

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
        """One channel, and the samples."""
        return 1, 1, self.samples

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Waveforms go into the model as they are."""
        return {"input_size": list(self.input_size), "mean": [0.0], "std": [1.0]}

    def input_record(self) -> dict[str, Any]:
        """Rate, length, cut and filling of every waveform."""
        record = {"kind": "sound", "rate": self.sample_rate, "samples": self.samples, "channels": 1}
        return record | {"cut": "middle", "fill": self.fill}

    def load(self) -> Parts:
        """Clips and targets of each part; validation is split off the training part where it has none of its own."""
        raise NotImplementedError(f"{type(self).__name__} must implement load()")

    def setup(self, stage: str | None = None) -> None:
        """Read the recordings into memory, once."""
        if self.datasets:
            return
        parts = self.load()
        if "val" not in parts:
            split_off(parts, "val", self.val_fraction)
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


class AudioFolder(AudioDataModule):
    """Recordings in folders, one per class.

    `root` holds a folder for each class, or `train/`, `test/` and perhaps `val/` that do. Without them a quarter of
    each class is for testing; in the layout of Speech Commands the files named in `testing_list.txt` and
    `validation_list.txt` are, one path a line. Folders, links and hidden files count as for :class:`ImageFolder`.
    Validation is taken out of the training part where it has no folder; fixed splits.

    Args:
        root: The folder.
        sample_rate: Hz that everything is resampled to.
        duration: Length of every waveform, seconds.
        fill: How shorter clips are filled: `repeat` them, or let `silence` surround them.
        gain: Largest change of loudness in training, dB.
        min_cut: Training clips are first cut to a random length between this and `duration`, seconds; `None` does not.
        min_seconds: Shorter recordings are left out.
        max_seconds: Longer recordings are left out.
        val_fraction: Share of the training part that is used for validation.
        **loader: Seed and loaders, see :class:`zoo.data.ImageDataModule`.

    Raises:
        ValueError: If an argument is outside its range.
        DataError: If the folder is missing, has no classes, or holds a damaged file.
    """

    @extends(ImageDataModule, eval_batch_size=256)
    def __init__(
        self,
        root: str | Path,
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
            sample_rate=sample_rate,
            duration=duration,
            fill=fill,
            gain=gain,
            min_cut=min_cut,
            val_fraction=val_fraction,
            **loader,
        )
        self.root = Path(root).expanduser()
        self.min_seconds, self.max_seconds = min_seconds, max_seconds

    @property
    def class_names(self) -> list[str]:
        """Names of the class folders, sorted; one that begins with an underscore holds no class."""
        try:
            return class_folders(parts(self.root)["train"], RECORDINGS)
        except DataError as error:
            raise DataError(f"{error}{self._help}") from None

    @property
    def _help(self) -> str:
        return "; set data.root to a folder with a folder of recordings for each class"

    def prepare_data(self) -> None:
        """Nothing to fetch; a missing folder is told now."""
        _ = self.class_names

    def load(self) -> Parts:
        """Read every recording."""
        names = self.class_names
        found: Parts = {}
        for part, files in self._files(names).items():
            kept: tuple[list[Tensor], list[int]] = ([], [])
            for path, target in zip(*files, strict=True):
                clip = read_audio(path, self.sample_rate, self.max_seconds)
                if clip is not None and len(clip) >= self.min_seconds * self.sample_rate:
                    kept[0].append(clip)
                    kept[1].append(target)
            lost = set(range(len(names))) - set(kept[1])
            if part == "train" and lost:
                raise DataError(
                    f"{self.root}: class {names[min(lost)]!r} has no recording for training of {self.min_seconds:g} to "
                    f"{self.max_seconds:g} seconds"
                )
            elif lost:
                tell(f"{self.root}: the {part} part has no recording of {listed([names[i] for i in sorted(lost)], 5)}")
            if kept[0]:
                found[part] = kept
        if "test" not in found:
            split_off(found, "test", 0.25)
        return found

    def _files(self, names: Sequence[str]) -> dict[Part, tuple[list[str], list[int]]]:
        """Recordings and their classes of each part that has its own folder, or is listed."""
        where = parts(self.root)
        found: Any = {"train": scan(where["train"], names, RECORDINGS)}
        for part in ("val", "test"):
            if part in where:
                found[part] = scan_like(where[part], where["train"], names, RECORDINGS)
        return found if len(where) > 1 or where["train"] != self.root else self._listed(*found["train"])

    def _listed(self, paths: Sequence[str], targets: Sequence[int]) -> dict[Part, tuple[list[str], list[int]]]:
        """The files of a root without parts, shared out by the lists of Speech Commands.

        Raises:
            DataError: A list names a file that is not there, or one that another list has.
        """
        known = {Path(path).relative_to(self.root).as_posix(): path for path in paths}
        part_of: dict[str, Part] = {}
        lists: tuple[tuple[str, Part], ...] = (("validation_list.txt", "val"), ("testing_list.txt", "test"))
        for name, part in lists:
            for number, line in _lines(self.root / name):
                path = known.get(line.removeprefix("./"))
                if path is None:
                    raise DataError(f"{self.root / name}, line {number}: there is no recording {line[:100]!r}")
                if part_of.setdefault(path, part) != part:
                    raise DataError(f"{self.root / name}, line {number}: {line[:100]!r} is in validation_list.txt too")
        found: dict[Part, tuple[list[str], list[int]]] = {}
        for path, target in zip(paths, targets, strict=True):
            share = found.setdefault(part_of.get(path, "train"), ([], []))
            share[0].append(path)
            share[1].append(target)
        return found


def _lines(path: Path) -> list[tuple[int, str]]:
    """Numbers and contents of the lines of a list, each a path that may have blanks; nothing where there is no list."""
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
    """Telephone prompts of five languages, one voice each: which language is spoken?

    2,717 real recordings of 0.3 to 20 s at 8 kHz, from the Debian packages `asterisk-core-sounds-{en,es,fr,it,ru}-wav`
    (CC-BY-SA-3.0). The ten clips of plain silence that every package has are left out: nothing tells them apart. A
    quarter of each language is for testing, drawn at random, so that the same voices are in all parts.

    Arguments are those of `AudioFolder`; `root` holds `en`, `es`, `fr`, `it` and `ru`.

    Raises:
        ValueError: If an argument is outside its range.
        DataError: If the packages are not installed.
    """

    names = ("en", "es", "fr", "it", "ru")

    @extends(
        AudioFolder,
        root="/usr/share/asterisk/sounds",
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
        return f"; install the recordings ({packages}), or set data.root to the folder that holds them"

    def prepare_data(self) -> None:
        """Nothing to fetch; a missing language is told now."""
        for name in self.names:
            if not (self.root / name).is_dir():
                raise DataError(f"there is no folder {self.root / name}{self._help}")

    def _files(self, names: Sequence[str]) -> dict[Part, tuple[list[str], list[int]]]:
        paths, targets = scan(self.root, names, RECORDINGS)
        spoken = [
            (path, target) for path, target in zip(paths, targets, strict=True) if Path(path).parent.name != "silence"
        ]
        return {"train": ([path for path, _ in spoken], [target for _, target in spoken])}


# ---- a machine that speaks ---------------------------------------------------------------------------------

ESPEAK = sources.Wheel(
    "espeakng_loader",
    "0.2.4",
    "08721baf27d13d461f6be6eed9a65277e70d68234ff484fd8b9897b222cdcb6d",
    "",
    "py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64",
)
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
#: Accent and timbre; no voice, and no timbre, is in two parts.
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
    """Library and voices of eSpeak NG: the installed package's, or the published wheel's for as long as it takes."""
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
    """Every voice saying every digit at every speed and pitch: int16 samples and the digit.

    Raises:
        DataError: If the engine cannot be loaded here, or lacks a voice.
    """
    try:
        engine = ctypes.CDLL(str(library))
    except OSError as error:
        raise DataError(
            f"eSpeak NG cannot be loaded ({error}); elsewhere than on x86_64 Linux: pip install espeakng-loader"
        ) from error
    rate = engine.espeak_Initialize(1, 0, str(data).encode(), 0x8000)  # hand samples over, do not exit on errors
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
                    engine.espeak_Synth(text, len(text), 0, 1, 0, 1, None, None)  # from 0, by character, UTF-8
                    engine.espeak_Synchronize()
                    clip = torch.from_numpy(np.concatenate(pieces)).float() / 32768
                    spoken.setdefault(voice, []).append((resampled(clip, rate, sample_rate).numpy(), digit))
    engine.espeak_Terminate()
    return spoken


class SpokenDigits(AudioDataModule):
    """Synthetic: ten digits, spoken by eSpeak NG in 15 voices, 3 speeds and 2 pitches; 900 clips of 0.2 to 0.9 s.

    Nine voices are for training, two for validation and four, which the model never hears, for testing. The engine
    (GPL-3) comes out of the wheel `espeakng_loader` 0.2.4, or is the installed package's; the clips are made once.

    Args:
        root: Folder of the files; `None` means the cache folder, `$XDG_CACHE_HOME/kernel-zoo` or `~/.cache/kernel-zoo`.
        download: Fetch the engine with pip where neither clips nor engine are there.
        duration: Length of every waveform, seconds, at 16 kHz.
        fill: How shorter clips are filled: `repeat` them, or let `silence` surround them.
        gain: Largest change of loudness in training, dB.
        **loader: Seed and loaders, see :class:`zoo.data.ImageDataModule`.

    Raises:
        ValueError: If an argument is outside its range.
        DataError: In `prepare_data`, if the engine cannot be had or run.
    """

    @extends(ImageDataModule, batch_size=32, eval_batch_size=256)
    def __init__(
        self,
        root: str | Path | None = None,
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
        self.root = sources.cache_folder(root)
        self.download = download

    @property
    def class_names(self) -> list[str]:
        """The ten words."""
        return list(WORDS)

    @property
    def _path(self) -> Path:
        return self.root / "spoken_digits.npz"

    def prepare_data(self) -> None:
        """Synthesise the clips unless the cache has them."""
        if self._path.is_file():
            return
        with _espeak(self.root, self.download) as (library, data):
            spoken = synthesise(library, data, self.sample_rate)
        said = [(voice, i, *clip) for voice, clips in spoken.items() for i, clip in enumerate(clips)]
        arrays: dict[str, Any] = {f"{voice}/{i}/{digit}": samples for voice, i, samples, digit in said}
        try:
            write_atomic(self._path, lambda file: np.savez_compressed(file, **arrays))
        except CheckpointError as error:
            raise DataError(f"{error}; choose another folder with root=...") from error

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
                        raise ValueError(f"{name} is no recording of 16 bits")
                    parts[part_of[voice]][0].append(clip)
                    parts[part_of[voice]][1].append(int(digit))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{self._path} is damaged ({first_line(error)}): delete it and run again") from error
        return parts
