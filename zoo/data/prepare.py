"""Files to model inputs, as the input record stored with the weights describes: one function per kind of file.

The data modules evaluate with the same functions, so evaluation, prediction and exports treat a file alike.

>>> prepare("seven.png", {"kind": "image", "channels": 1, "size": [28, 28]})[0].shape
torch.Size([1, 1, 28, 28])
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.data.checks import DataError
from zoo.data.delimited import listed
from zoo.support import inputs

__all__ = [
    "SUFFIXES",
    "far_off",
    "far_out",
    "form_for",
    "kind_of_file",
    "other_tasks",
    "other_units",
    "prepare",
    "says_nothing",
    "without_colour",
]

#: Function of each kind: takes the file and the typed record, and returns the model's arguments.
PREPARERS = {
    "image": "pictures:prepare_image",
    "sound": "audio:prepare_sound",
    "clip": "video:prepare_clip",
    "points": "points:prepare_points",
    "spectrum": "hyperspectral:prepare_spectrum",
    "text": "text:prepare_text",
    "table": "rows:prepare_table",
    "series": "series:prepare_series",
}

#: File suffixes of each kind; a suffix of several kinds is told by the first.
SUFFIXES: dict[str, tuple[str, ...]] = {
    "image": (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),
    "sound": (".wav", ".flac", ".ogg", ".mp3"),
    "clip": (".mp4", ".avi", ".mkv", ".webm", ".mov"),
    "table": (".csv", ".tsv", ".parquet"),
    "text": (".txt", ".csv", ".tsv"),
    "series": (".csv", ".tsv", ".txt"),
    "points": (".npy", ".xyz", ".ply", ".txt", ".csv", ".tsv"),
    "spectrum": (".npy",),
}

#: Kinds of which each row of a table is an input.
BY_ROW = ("table", "text")

WORDS = {
    "image": "an image",
    "sound": "a recording",
    "clip": "a video",
    "points": "a point cloud",
    "spectrum": "a patch of a scene",
    "text": "a text",
    "table": "a table",
    "series": "a series",
}


def prepare(path: str | Path, record: Mapping[str, Any], folder: Path | None = None) -> tuple[Tensor, ...]:
    """Read a file as the model's arguments, batch dimension first.

    Args:
        path: The file; its suffix must be one of the record's kind.
        record: Input record, see :mod:`zoo.support.inputs`.
        folder: Folder of the model, which contains the tokenizer of a text model.

    Returns:
        One tensor; for a series, a window (1, L, D) and its marks (1, L, F). The batch size is the number of rows of a
        table, or of texts in one, and 1 for any other file.

    Raises:
        DataError: The file is missing, damaged or of another kind, or the record is invalid.
    """
    path = Path(path)
    form = form_for(path, record)
    module, _, name = PREPARERS[form.kind].partition(":")
    own = (folder,) if form.kind == "text" else ()
    return getattr(importlib.import_module(f"zoo.data.{module}"), name)(path, form, *own)


FAR = 50.0  # standard deviations; fewer than 2,500 training rows cannot contain such an outlier
SHIFTED = 3.0  # standard deviations of the median of a column, in a file of some rows
_SOME = 5
UNITS = 10.0  # factor between two units of length, at least
_LOOK = 64  # pixels of the short side that are enough to see whether a picture has colours
_TINT, _TINTED = 32, 0.02  # largest difference of the channels of a grey pixel, of 255; share of others that may be
_EVEN = 1e-5  # tolerance for rounding; half a step of 16-bit sound


def says_nothing(path: Path, values: Tensor, form: Any) -> str | None:
    """Warning for a file without content: a constant signal, or a text without a known word; None otherwise.

    Args:
        path: The file.
        values: The first of the model's arguments for it.
        form: The typed record; tables are not checked.
    """
    if form.kind == "table":
        return None
    if form.kind == "text":
        from zoo.data.text import MARKS

        rows = (values[..., None] == values.new_tensor(MARKS)).any(-1).all(-1).nonzero()[:, 0] + 1
        if not len(rows):
            return None
        if len(values) == 1:
            return f"{path} holds no word that the model knows, so the prediction says nothing about it"
        told = f"{len(rows):,} of its {len(values):,} texts hold no word that the model knows (row {int(rows[0])}"
        return f"{path}: {told}{', ...' if len(rows) > 1 else ''}), so the predictions say nothing about them"
    if form.kind == "spectrum":  # compared in raw units, over pixels and bands
        mean, std = (values.new_tensor(v).view(1, -1, 1, 1) for v in (form.mean, form.std))
        values = (values * std + mean).flatten(1)[:, None]
    elif form.kind in ("points", "series"):
        values = values.transpose(1, 2)
    elif form.kind == "sound":
        heard = values.nonzero()[:, 1]  # without the silence around it
        values = values[:, int(heard.min()) : int(heard.max()) + 1] if len(heard) else values
        values = values.expand(-1, max(2, values.shape[1]))[:, None]  # a single sample is a click
    places = values.flatten(2)
    if places.shape[2] < 2 or bool((places.amax(2) - places.amin(2) > _EVEN).any()):
        return None
    what = {"image": "pixels", "clip": "pixels", "sound": "samples", "points": "points", "series": "steps"}
    if form.kind == "sound" and bool(values.any()):
        what["sound"] = "samples outside of silence"
    clear = f" (transparent ones show the background, {form.background})" if form.kind == "image" else ""
    return (
        f"{path}: once prepared for the model all its {what.get(form.kind, 'values')}{clear} are the same, so the "
        "prediction says nothing about it"
    )


def far_out(
    path: Path, rows: Tensor, model: Any, names: Sequence[str] = (), measured: Sequence[bool] = ()
) -> str | None:
    """Warning for table values far outside the training data, or columns that are elsewhere as a whole; else None.

    Checked for models that standardise, by their mean and standard deviation of the training rows.

    Args:
        path: The file.
        rows: Its rows as the model takes them (n, D).
        model: A model with `input_mean` and `input_scale` (D,) if it standardises.
        names: Column names in the model's order; columns without one are numbered.
        measured: Whether each column holds numbers that can lie far outside; all by default.
    """
    mean, scale = getattr(model, "input_mean", None), getattr(model, "input_scale", None)
    if not isinstance(mean, Tensor) or not isinstance(scale, Tensor) or mean.shape != rows.shape[1:]:
        return None
    if bool((mean == 0).all()) and bool((scale == 1).all()):  # no standardisation
        return None
    places = [f"row {i + 1}" for i in range(len(rows))]
    return _unlike(path, rows.double(), mean.double(), scale.double(), "rows", places, names, measured)


def far_off(path: Path, window: Any, form: Any) -> str | None:
    """Warning for a series of which a variable is far from the training part in the window that is seen; else None.

    Args:
        path: The file.
        window: Its last window, see :func:`zoo.data.series.last_window`.
        form: The typed record.
    """
    mean, scale = (torch.tensor(values, dtype=torch.float64) for values in (form.mean, form.std))
    rows = window.values[0].double().cpu() * scale + mean
    return _unlike(path, rows, mean, scale, "steps", [str(time) for time in window.past], window.names)


def _unlike(
    path: Path,
    rows: Tensor,
    mean: Tensor,
    scale: Tensor,
    what: str,
    places: Sequence[str],
    names: Sequence[str],
    measured: Sequence[bool] = (),
) -> str | None:
    """What `far_out` says of rows (n, D), by the mean and scale (D,) of the training rows, which are called `what`.

    `places` says where each row is.
    """
    distance = (rows - mean) / scale
    if measured:
        distance = distance * torch.tensor(measured)
    names = [names[i][:60] if i < len(names) else f"column {i + 1}" for i in range(len(mean))]
    training = [f"training had {a:.4g} ± {b:.2g}" for a, b in zip(mean.tolist(), scale.tolist(), strict=True)]
    shifted = (distance.median(0).values.abs() > SHIFTED) & (len(rows) >= _SOME)
    worst, at = distance.abs().max(0)
    told, middle = [], rows.median(0).values
    if found := shifted.nonzero()[:, 0].tolist():
        columns = listed([f"{names[i]} (median {middle[i]:.6g}; {training[i]})" for i in found], 5, 200)
        told.append(f"most values are unlike those of training, are the units the same? {columns}")
    if found := ((worst > FAR) & ~shifted).nonzero()[:, 0].tolist():
        columns = listed(
            [f"{names[i]} ({places[int(at[i])]}: {rows[at[i], i]:.6g}; {training[i]})" for i in found], 5, 200
        )
        told.append(f"values lie far outside of the training {what}, so answers there are guesses: {columns}")
    return f"{path}: {'; '.join(told)}" if told else None


def other_units(path: Path, values: Tensor, form: Any) -> str | None:
    """Warning for a point cloud that seems to be in other units than the training clouds; None otherwise.

    Args:
        path: The file.
        values: The first of the model's arguments for it, (1, points, channels).
        form: The typed record, with the `extent` of the training clouds if it is known.
    """
    if form.kind != "points" or form.extent is None:
        return None
    found = float(values[..., :3].abs().amax())
    if form.extent / UNITS <= found <= form.extent * UNITS:
        return None
    return (
        f"{path}: its coordinates reach {found:.4g}, those of training {form.extent:.4g}, and the model takes them as "
        "they are: are the units the same?"
    )


def without_colour(path: Path, form: Any) -> str | None:
    """One sentence about a picture in colour for a model of grey ones; None for any other file, or an array."""
    if form.kind != "image" or form.channels != 1 or not path.is_file():
        return None
    from zoo.data.pictures import open_picture

    pixels = torch.from_numpy(np.array(open_picture(path, 3, form.background, _LOOK), np.int16))
    if float((pixels.amax(2) - pixels.amin(2) > _TINT).float().mean()) < _TINTED:
        return None
    return f"{path} is in colour and the model takes grey pictures: it sees how bright each pixel is, and no colour"


def other_tasks(form: Any) -> str | None:
    """One sentence where each task of training showed its pictures in a way of its own; None for any other model."""
    if getattr(form, "tasks", None) is None:
        return None
    how = {"permuted": "with their pixels in another order", "rotated": "at another angle"}[form.tasks]
    return f"each task of training showed the pictures {how}; a file is taken as it is, as one of the first task"


def form_for(path: Path, record: Mapping[str, Any]) -> Any:
    """Parse a record, and check that the file exists and is of its kind.

    Raises:
        DataError: The file is missing or of another kind, or the record is invalid.
    """
    try:
        form = inputs.read(record)
    except inputs.InputError as error:
        raise DataError(str(error)) from None
    if not path.is_file():
        if path.exists():
            raise DataError(
                f"{path} is {'a folder' if path.is_dir() else 'not a regular file'}: give the files themselves"
            )
        raise DataError(f"there is no file {path}")
    kind_of_file(path, form.kind)
    return form


def kind_of_file(path: Path, wanted: str) -> None:
    """Check by the suffix that a file is of the kind that a model takes.

    Raises:
        DataError: The file is of another or an unknown kind.
    """
    suffix = path.suffix.lower()
    if suffix in SUFFIXES[wanted]:
        return
    given = next((kind for kind, suffixes in SUFFIXES.items() if suffix in suffixes), None)
    if given is None:
        known = " ".join(dict.fromkeys(s for suffixes in SUFFIXES.values() for s in sorted(suffixes)))
        raise DataError(f"{path}: {suffix or 'no suffix'} is none of {known}")
    raise DataError(f"{path} is {WORDS[given]}, the model takes {WORDS[wanted]} ({' '.join(SUFFIXES[wanted])})")
