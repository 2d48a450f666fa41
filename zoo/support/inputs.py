"""The input record: plain values that travel with the weights and describe a model's input, typed by kind of file.

A data module writes the record (`input_record()`); `config.json`, training checkpoints and exports keep it; evaluation
and prediction use it to prepare files. Records may come from untrusted files, so they are checked: plain values of the
types below, of bounded size.

>>> check({"kind": "sound", "rate": 8000, "samples": 8000, "channels": 1})["rate"]
8000
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from zoo.support.quoting import is_printable
from zoo.support.suggest import suggestion

__all__ = [
    "KINDS",
    "Clip",
    "Image",
    "InputError",
    "Points",
    "Series",
    "Sound",
    "Spectrum",
    "Table",
    "Text",
    "check",
    "derived",
    "in_units",
    "read",
    "record_of",
    "shape_of",
    "unit_of",
]

_MAX_BYTES = 1_000_000  # of a record
_MAX_NUMBERS = 2**28  # of one input


class InputError(ValueError):
    """An input record that is damaged or inconsistent; the message names the entry."""


Count = Annotated[int, Field(ge=1, le=_MAX_NUMBERS)]
Numbers = Annotated[list[float], Field(min_length=1)]
Positive = Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]
Byte = Annotated[int, Field(ge=0, le=255)]


def _name(name: str) -> str:
    if not is_printable(name):
        raise ValueError(f"the name {name[:60]!r} has characters that cannot be printed")
    return name


def _unique(names: list[str]) -> list[str]:
    if twice := next((name for name, count in Counter(names).items() if count > 1), None):
        raise ValueError(f"the name {twice[:60]!r} occurs twice")
    return names


Name = Annotated[str, AfterValidator(_name)]
Names = Annotated[list[Name], AfterValidator(_unique)]


class Record(BaseModel):
    """Base class of the kinds: exact types, finite numbers, and no unknown entries, which could change the input."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")

    def numbers(self) -> int:
        """Least number of values in one input."""
        return 1

    def before_crop(self) -> float:
        """Numbers of a picture that the input is cropped from; those of the input itself where nothing is."""
        return self.numbers()

    def lengths(self) -> dict[str, int]:
        """Allowed lengths of the entries `mean` and `std`, besides one."""
        return {}


class Picture(Record):
    """How a decoded picture, or a frame, becomes a tensor.

    Attributes:
        channels: 1 for grey, 3 for RGB.
        size: Height and width in pixels.
        mean: Subtracted from each channel on the scale [0, 1].
        std: Each channel is divided by this.
        interpolation: Used for resizing.
        crop_pct: Fraction of the resized picture that the crop keeps.
        crop_mode: `center` crops the middle, `squash` ignores the aspect ratio, `border` pads to the size.
        background: Grey value from 0 to 255 behind transparent pixels.
        rounded: Whether resized pixels are rounded to whole bytes before normalisation.
    """

    channels: Literal[1, 3]
    size: Annotated[list[Count], Field(min_length=2, max_length=2)]
    mean: Numbers = [0.0]
    std: Positive = [1.0]
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 1.0
    crop_mode: Literal["center", "squash", "border"] = "center"
    background: Byte = 255
    rounded: bool = True

    def numbers(self) -> int:
        """Pixels times channels."""
        return self.channels * self.size[0] * self.size[1]

    def before_crop(self) -> float:
        """Pixels times channels of one resized picture; infinity where that is beyond a float."""
        height, width = (side / self.crop_pct for side in self.size)
        return self.channels * height * width

    def lengths(self) -> dict[str, int]:
        """One value for each channel."""
        return {"mean": self.channels, "std": self.channels}


class Image(Picture):
    """A picture, (1, C, H, W).

    Attributes:
        tasks: What each task of training did to its pictures in a way of its own; None for nothing. Files are not.
    """

    kind: Literal["image"]
    tasks: Literal["permuted", "rotated"] | None = None


class Clip(Picture):
    """A video, (1, C, T, H, W).

    Attributes:
        frames: T, spread evenly over the file.
        place: Position of each frame within its step, in [0, 1).
    """

    kind: Literal["clip"]
    frames: Count
    place: Annotated[float, Field(ge=0, lt=1)] = 0.5

    def numbers(self) -> int:
        """Pixels times channels of all frames."""
        return self.frames * super().numbers()


class Sound(Record):
    """A recording, (1, samples).

    Attributes:
        rate: Samples per second; other recordings are resampled.
        samples: Length of the input.
        channels: Channels of the input; the channels of a recording are averaged.
        cut: Which part of a longer recording is kept.
        fill: How a shorter recording is padded.
    """

    kind: Literal["sound"]
    rate: Annotated[int, Field(ge=1, le=1_000_000)]
    samples: Count
    channels: Literal[1] = 1
    cut: Literal["middle"] = "middle"
    fill: Literal["repeat", "silence"] = "silence"

    def numbers(self) -> int:
        """Samples."""
        return self.samples


class Points(Record):
    """A point cloud, (1, points, channels).

    Attributes:
        points: Number of points, chosen by farthest-point sampling; those of a smaller cloud are repeated.
        channels: Values per point.
        extent: Largest absolute coordinate in the training clouds; None if unknown, or if they are fitted.
        fit: `sphere` moves the mean of a cloud's points to the origin and scales them into the unit sphere; None keeps
            the coordinates.
        mean: Subtracted from the chosen points, per channel; 0 for the coordinates.
        std: The differences are divided by this; 1 for the coordinates.
        further: Names of the values after the coordinates, in small letters; empty if unknown.
    """

    kind: Literal["points"]
    points: Count
    channels: Count = 3
    extent: Annotated[float, Field(gt=0)] | None = None
    fit: Literal["sphere"] | None = None
    mean: Numbers = [0.0]
    std: Positive = [1.0]
    further: Names = []

    def numbers(self) -> int:
        """Values of all points."""
        return self.points * self.channels

    def lengths(self) -> dict[str, int]:
        """One value for each channel."""
        return {"mean": self.channels, "std": self.channels}


class Spectrum(Record):
    """A patch of a hyperspectral scene, (1, bands, patch, patch).

    Attributes:
        bands: Number of bands.
        patch: Side length in pixels.
        mean: Per band over the training pixels.
        std: As `mean`.
    """

    kind: Literal["spectrum"]
    bands: Count
    patch: Count
    mean: Numbers = [0.0]
    std: Positive = [1.0]

    def lengths(self) -> dict[str, int]:
        """One value for each band."""
        return {"mean": self.bands, "std": self.bands}

    def numbers(self) -> int:
        """Pixels times bands."""
        return self.bands * self.patch**2


class Text(Record):
    """A text, (1, tokens).

    Attributes:
        tokens: Length after truncation or padding, with the special tokens at both ends.
        tokenizer: Its name.
        tokenizer_sha256: SHA-256 of its file; None if unknown (older weights).
        column: Column of the texts in a table; None for a model that was trained on text files.
    """

    kind: Literal["text"]
    tokens: Count
    tokenizer: Literal["minilm"] = "minilm"
    tokenizer_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    column: Name | None = None

    def numbers(self) -> int:
        """Tokens."""
        return self.tokens


class Variable(Record):
    """A column of a file that becomes one or more inputs.

    Attributes:
        name: Name of the column.
        values: Categories of a one-hot encoded column, in the model's order; None for numbers.
        truth: Whether the numbers are true and false, as 1 and 0.
        fill: Value of a missing number; None refuses one.
        required: Whether a missing cell of a one-hot encoded column is refused, not a category of its own.
        indicator: Whether a further input says that the number was missing, 1, or not, 0.
        unseen: What becomes of a category that is not among `values`: `zeros` for all of them; None refuses it.
    """

    name: Name
    values: Annotated[Names, Field(min_length=1)] | None = None
    truth: bool = False
    fill: float | None = None
    required: bool = False
    indicator: bool = False
    unseen: Literal["zeros"] | None = None

    def width(self) -> int:
        """Number of inputs."""
        return 1 + self.indicator if self.values is None else len(self.values)

    def inputs(self) -> list[str]:
        """Names of the inputs."""
        if self.values is not None:
            return [f"{self.name}={value}" for value in self.values]
        return [self.name, *([f"{self.name}={MISSING}"] if self.indicator else [])]


#: The category of a missing cell.
MISSING = "(missing)"


class Table(Record):
    """Rows of a table, (rows, columns).

    Attributes:
        columns: Feature names in the model's order; empty if unknown. A one-hot encoded feature is `variable=value`.
        count: Number of features.
        variables: The columns that the features come from; empty if they are the features, all of them numbers.
        header: Whether files start with a row of column names; without it, columns are in the model's order.
        missing_words: Words that mean a missing cell, beside an empty one.
        target: Name of the column that is predicted; None if unknown.
        target_mean: Added to the outputs of a regression, after they are multiplied by `target_scale`.
        target_scale: Size of an output of one, in units of the target.
        separator: Column separator; None detects it.
        encoding: Text encoding; None for UTF-8, or UTF-16 with a byte order mark.
    """

    kind: Literal["table"]
    columns: Names = []
    count: Count = 1
    variables: list[Variable] = []
    header: bool = True
    missing_words: list[str] = []
    target: Name | None = None
    target_mean: float = 0.0
    target_scale: Annotated[float, Field(gt=0)] = 1.0
    separator: str | None = None
    encoding: str | None = None

    @model_validator(mode="after")
    def _agree(self) -> Table:
        if self.columns and len(self.columns) != self.count:
            raise ValueError(f"there are {len(self.columns)} names for {self.count} columns")
        _unique([v.name for v in self.variables])
        width = sum(v.width() for v in self.variables)
        if self.variables and width != self.count:
            raise ValueError(f"the variables make {width} columns of {self.count}")
        if self.variables and self.columns:
            self._check_names()
        return self

    def _check_names(self) -> None:
        """Refuse columns that are not those of the variables; older records name a category by its word alone."""
        made = [(v, name) for v in self.variables for name in v.inputs()]
        for column, (variable, name) in zip(self.columns, made, strict=True):
            if column not in (name, name.removeprefix(f"{variable.name}=")):
                raise ValueError(f"the column {column[:60]!r} is where the variables have {name[:60]!r}")

    def measured(self) -> list[bool]:
        """Whether each feature is a measured number, not a category or a word about a missing cell."""
        if not self.variables:
            return [True] * self.count
        return [v.values is None and i == 0 for v in self.variables for i in range(v.width())]

    def numbers(self) -> int:
        """Columns."""
        return self.count


class Series(Record):
    """A window of a series, (1, steps, variables), and its calendar marks (1, steps, time_features).

    Attributes:
        columns: Variable names in the model's order; empty if unknown.
        count: Number of variables.
        steps: Length of a window.
        horizon: Steps to forecast; 0 if unknown.
        time_features: Calendar features per step.
        mean: Per variable over the training part.
        std: As `mean`; 1 for a variable that is constant there.
        step: Time from row to row, as text; None if there is none.
        time_column: Name of the time column; None for the first column.
        time_format: Format of the times, as for `strptime`; None for ISO 8601.
        fill: How missing times and empty cells are filled; None refuses them.
        regular: Whether times are equally spaced.
        separator: Column separator; None detects it.
        encoding: Text encoding; None for UTF-8, or UTF-16 with a byte order mark.
    """

    kind: Literal["series"]
    columns: Names = []
    count: Count = 1
    steps: Count
    horizon: Annotated[int, Field(ge=0, le=_MAX_NUMBERS)] = 0
    time_features: Annotated[int, Field(ge=0, le=4)] = 4
    mean: Numbers = [0.0]
    std: Positive = [1.0]
    step: str | None = None
    time_column: str | None = None
    time_format: str | None = None
    fill: Literal["forward"] | None = None
    regular: bool = True
    separator: str | None = None
    encoding: str | None = None

    @model_validator(mode="after")
    def _agree(self) -> Series:
        for name, allowed in {"columns": (0, self.count), "mean": (1, self.count), "std": (1, self.count)}.items():
            if (length := len(getattr(self, name))) not in allowed:
                raise ValueError(f"{name} has {length} entries for {self.count} variables")
        return self

    def lengths(self) -> dict[str, int]:
        """One value for each variable."""
        return {"mean": self.count, "std": self.count}

    def numbers(self) -> int:
        """Values of all steps."""
        return self.count * self.steps


#: Known kinds of input, by the record's `kind`.
KINDS: dict[str, type[Record]] = {
    "image": Image,
    "clip": Clip,
    "sound": Sound,
    "points": Points,
    "spectrum": Spectrum,
    "text": Text,
    "table": Table,
    "series": Series,
}


def check(record: Any) -> dict[str, Any]:
    """Validate a record and return it as a new mapping of plain values.

    Kinds that are not in :data:`KINDS` (from plug-ins) are returned unchanged: only prediction needs to know them.

    Raises:
        InputError: It is not an object of plain values, has no kind, or an entry has the wrong type.
    """
    if not isinstance(record, Mapping) or not isinstance(record.get("kind"), str):
        raise InputError(f"the record of the input must be an object with a kind, not {record!r:.60}")
    try:
        text = json.dumps(dict(record), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the record of the input holds more than plain values ({str(error)[:80]})") from None
    if len(text) > _MAX_BYTES:
        raise InputError("the record of the input is larger than any: it is damaged or hostile")
    plain: dict[str, Any] = json.loads(text)
    if plain["kind"] in KINDS:
        read(plain)
    return plain


def read(record: Mapping[str, Any]) -> Any:
    """The typed form of a record of :data:`KINDS`.

    Raises:
        InputError: The kind is unknown, an entry has the wrong type, or an input would be too large.
    """
    kind = record.get("kind")
    form = KINDS.get(kind) if isinstance(kind, str) else None
    if form is None:
        raise InputError(f"inputs of the kind {kind!r:.40} are not known; known are {', '.join(KINDS)}")
    try:
        found = form.model_validate(dict(record))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "its entries"
        if first["type"] == "extra_forbidden":
            name, known = first["loc"][-1], Variable if len(first["loc"]) > 1 else form
            close = suggestion(name, known.model_fields)
            raise InputError(f"the record of the input, {where:.60}: there is no such entry{close}") from None
        given = "" if first["type"] in ("missing", "value_error") else f", not {first['input']!r:.40}"
        raise InputError(
            f"the record of the input, {where}: {first['msg'][:1].lower()}{first['msg'][1:]}{given}"
        ) from None
    for name, length in found.lengths().items():
        if len(values := getattr(found, name)) not in (1, length):
            raise InputError(f"the record of the input, {name}: {len(values)} numbers where {length} belong")
    if found.numbers() > _MAX_NUMBERS:
        raise InputError(f"the record describes inputs of {found.numbers():,} numbers: it is damaged or hostile")
    if (whole := found.before_crop()) > _MAX_NUMBERS:
        told = f"the record describes pictures of {whole:.3g} numbers before the crop (crop_pct)"
        raise InputError(f"{told}: it is damaged or hostile")
    return found


def shape_of(record: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Shape of one input; None if the kind is unknown."""
    if record.get("kind") not in KINDS:
        return None
    found = read(record)
    match record["kind"]:
        case "image":
            return (found.channels, *found.size)
        case "clip":
            return (found.channels, found.frames, *found.size)
        case "sound":
            return (found.samples,)
        case "points":
            return (found.points, found.channels)
        case "spectrum":
            return (found.bands, found.patch, found.patch)
        case "text":
            return (found.tokens,)
        case "table":
            return (found.count,)
        case _:
            return (found.steps, found.count)


def record_of(model: Any) -> dict[str, Any]:
    """The model's own record, or one derived from its configuration."""
    return getattr(model, "input_record", None) or derived(model)


_OF_PICTURES = ("interpolation", "crop_pct", "crop_mode")


def preparation(record: Mapping[str, Any]) -> dict[str, Any]:
    """The `preprocessing` of a model's record, without what only pictures have if the model takes none."""
    known: Mapping[str, Any] = record.get("input") or {}
    pictures = known.get("kind", "image") in ("image", "clip")
    return {key: value for key, value in record["preprocessing"].items() if pictures or key not in _OF_PICTURES}


def in_units(record: Mapping[str, Any] | None, values: Any) -> Any:
    """Outputs, or targets, of a regression on a table in the units of its target; others as they are.

    Args:
        record: The model's input record, if it has one.
        values: A number, tensor or array.
    """
    scale, mean = unit_of(record)
    return values * scale + mean if (scale, mean) != (1.0, 0.0) else values


def unit_of(record: Mapping[str, Any] | None) -> tuple[float, float]:
    """Scale and mean of the target of a regression on a table; 1 and 0 if there are none."""
    if not record or record.get("kind") != "table":
        return 1.0, 0.0
    return float(record.get("target_scale", 1.0)), float(record.get("target_mean", 0.0))


def derived(model: Any) -> dict[str, Any]:
    """Input record from a model's own configuration, for weights that come without one."""
    cfg: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    shape = tuple(cfg.get("input_size") or (3, 224, 224))
    chans = getattr(model, "in_chans", None)
    chans = chans if isinstance(chans, int) else shape[0]
    if getattr(model, "vocab_size", None):
        return {"kind": "text", "tokens": getattr(model, "max_length", shape[-1])}
    if (hearing := _audio_front_end(model)) is not None:
        samples = shape[2] if shape[1] == 1 and shape[2] > 1 else hearing.samples
        return {"kind": "sound", "rate": hearing.sample_rate, "samples": samples}
    own = tuple(getattr(model, "input_shape", None) or ())
    looks = {key: _each(cfg.get(key), chans, other) for key, other in (("mean", 0.0), ("std", 1.0))}
    if len(own) == 4:
        return {"kind": "clip", "channels": chans, "frames": own[1], "size": list(own[2:]), **looks}
    if hasattr(model, "seq_len") and hasattr(model, "pred_len"):
        record = {"kind": "series", "count": chans, "steps": model.seq_len, "horizon": model.pred_len}
        record |= {"time_features": getattr(getattr(model, "adapter", None), "time_features", 4)}
        return record | {key: value for key, value in looks.items() if len(value) in (1, chans)}
    if len(own) == 2:
        return {"kind": "points", "points": own[0], "channels": own[1]}
    if shape[1:] == (1, 1):
        return {"kind": "table", "count": chans}
    if chans not in (1, 3):
        return {"kind": "spectrum", "bands": chans, "patch": shape[-1], **looks}
    usual = {"interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center"}  # timm's
    how = {key: cfg.get(key) or value for key, value in usual.items()}
    found = {"kind": "image", "channels": chans, "size": list(shape[1:]), **looks, **how}
    return found | {"background": 0 if chans == 1 else 255}


def _each(values: Any, channels: int, other: float) -> list[float]:
    """One value for all channels or one per channel; if the model has other channels than the record, their mean."""
    found = [float(v) for v in values or (other,)]
    return found if len(found) in (1, channels) else [sum(found) / len(found)]


def _audio_front_end(model: Any) -> Any:
    """The audio front end, which knows the sample rate and the number of samples; None if there is none."""
    modules = model.modules() if hasattr(model, "modules") else ()
    return next((m for m in modules if hasattr(m, "sample_rate") and hasattr(m, "samples")), None)
