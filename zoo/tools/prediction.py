"""A model's answer to a file: an image, a recording or a table of rows.

>>> predict("unireplknet_z.mnist5k", ["seven.png"])[0]["predictions"][0]     # {"class": "7", "probability": 0.998}
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.data.folder import EXTENSIONS
from zoo.tools.errors import ToolError
from zoo.tools.evaluation import load, record_of

__all__ = ["SOUNDS", "draw", "predict", "read_rows"]

SOUNDS = (".wav", ".flac", ".ogg", ".mp3")
TABLES = (".csv", ".tsv")
_MAX_PIXELS = 100_000_000
_MAX_SECONDS = 600
_MAX_TABLE = 200_000_000  # bytes


@torch.inference_mode()
def predict(model: str, files: Sequence[str | Path], top: int = 5) -> list[dict[str, Any]]:
    """Classify images and recordings, or classify or evaluate the rows of CSV files.

    Args:
        model: Name of shipped or published weights, `local-dir:<folder>`, or the folder of a run.
        files: Images, recordings or tables, by suffix. A table has one header line; its columns are matched by name
            with the features that the weights were trained on, or taken in order where the record has no names.
        top: Classes to name.

    Returns:
        One entry a file, or a row of a table: `file`, `row` of a table, and `predictions` (`class` and `probability`,
        most probable first) or `value`.

    Raises:
        ToolError: A file is missing, damaged, or nothing that this model takes.
    """
    network = load(model)
    facts = _facts(model, network)
    found = []
    for path in map(Path, files):
        inputs = _read(path, network, facts)
        outputs = network(inputs).float()
        for i, out in enumerate(outputs):
            entry: dict[str, Any] = {"file": str(path)}
            if path.suffix.lower() in TABLES:
                entry["row"] = i + 1
            found.append(entry | _answer(out, facts, top))
    return found


def _facts(model: str, network: nn.Module) -> dict[str, Any]:
    cfg: Any = getattr(network, "pretrained_cfg", None) or {}
    classes = list(cfg.get("label_names") or ())
    if not classes and getattr(network, "num_classes", 0) == 1000:
        from timm.data import ImageNetInfo

        names = ImageNetInfo("imagenet-1k")
        classes = [names.index_to_description(i) for i in range(1000)]
    features: list[str] = []
    if not model.startswith(("local-dir:", "hf-hub:")):
        try:
            features = record_of(model)["feature_names"]
        except (ValueError, RuntimeError):  # published weights have no record of their training here
            features = []
    return {"cfg": cfg, "classes": classes, "features": features}


def _answer(out: Tensor, facts: Mapping[str, Any], top: int) -> dict[str, Any]:
    classes = facts["classes"]
    if len(out) == 1 and not classes:
        return {"value": float(out[0])}
    shares = torch.cat([-out, out]).sigmoid() if len(out) == 1 else out.softmax(-1)
    values, places = shares.topk(min(top, len(shares)))
    names = [classes[i] if i < len(classes) else str(i) for i in places.tolist()]
    pairs = zip(names, values.tolist(), strict=True)
    return {"predictions": [{"class": name, "probability": round(value, 6)} for name, value in pairs]}


# ---- reading -----------------------------------------------------------------------------------------------


def _read(path: Path, network: nn.Module, facts: Mapping[str, Any]) -> Tensor:
    if not path.is_file():
        raise ToolError(f"there is no file {path}")
    kind = path.suffix.lower()
    wanted = "recording" if hasattr(network, "log_mel") or _sampler(network) is not None else (
        "table" if tuple(facts["cfg"].get("input_size", ()))[1:] == (1, 1) else "image")  # fmt: skip
    given = "recording" if kind in SOUNDS else "table" if kind in TABLES else "image" if kind in EXTENSIONS else None
    if given is None:
        raise ToolError(f"{path}: {kind or 'no suffix'} is none of {' '.join((*sorted(EXTENSIONS), *SOUNDS, *TABLES))}")
    if given != wanted:
        article = {"image": "an image", "recording": "a recording", "table": "a table"}
        raise ToolError(f"{path} is {article[given]}, the model takes {article[wanted]}")
    if kind in TABLES:
        return read_rows(path, int(network.in_chans), facts["features"])  # type: ignore[arg-type]
    return _sound(path, network) if given == "recording" else _image(path, facts["cfg"])


def _image(path: Path, cfg: Mapping[str, Any]) -> Tensor:
    from PIL import Image
    from timm.data import create_transform, resolve_data_config

    try:
        with Image.open(path) as file:
            if file.width * file.height > _MAX_PIXELS:
                raise ToolError(f"{path} has {file.width} x {file.height} pixels: make it smaller first")
            how: dict[str, Any] = resolve_data_config({}, pretrained_cfg=dict(cfg))
            picture = file.convert("L" if how["input_size"][0] == 1 else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, ToolError):
            raise
        raise ToolError(f"{path} cannot be read as an image ({str(error)[:100]})") from None
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    transform: Any = create_transform(is_training=False, **{k: how[k] for k in keys})
    return transform(picture)[None]


def _sampler(network: nn.Module) -> nn.Module | None:
    """The module that hears, which knows the sample rate and how many samples fill its frames."""
    return next((m for m in network.modules() if hasattr(m, "sample_rate") and hasattr(m, "samples")), None)


def _sound(path: Path, network: nn.Module) -> Tensor:
    import soundfile
    from torchaudio.functional import resample

    sampler: Any = _sampler(network)
    try:
        with soundfile.SoundFile(path) as file:
            if file.frames > _MAX_SECONDS * file.samplerate:
                raise ToolError(f"{path} is longer than {_MAX_SECONDS} seconds: cut it first")
            rate = file.samplerate
            wave = torch.from_numpy(file.read(dtype="float32", always_2d=True)).mean(1)
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise ToolError(f"{path} cannot be read as a recording ({str(error)[:100]})") from None
    wave = resample(wave, rate, sampler.sample_rate) if rate != sampler.sample_rate else wave
    missing = sampler.samples - len(wave)
    return torch.nn.functional.pad(wave, (0, max(0, missing)))[None, : sampler.samples]


def read_rows(path: Path, count: int, features: Sequence[str] = ()) -> Tensor:
    """Rows (n, count) of a CSV or TSV file with a header line.

    Raises:
        ToolError: A column is missing, or a cell is no number; the message names line and column.
    """
    if path.stat().st_size > _MAX_TABLE:
        raise ToolError(f"{path} is larger than {_MAX_TABLE // 10**6} MB: split it first")
    rows: list[list[float]] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            header = [name.strip() for name in next(lines, [])]
            places = _places(path, header, count, features)
            for line in lines:
                if not line:
                    continue
                try:
                    rows.append([_number(line[i]) for i in places])
                except (ValueError, IndexError):
                    bad = next((i for i in places if i >= len(line) or not _is_number(line[i])), places[0])
                    cell = repr(line[bad])[:40] if bad < len(line) else "missing"
                    raise ToolError(f"{path}, line {lines.line_num}: {header[bad]} is {cell}, not a number") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ToolError(f"{path} cannot be read as a table ({str(error)[:100]})") from None
    if not rows:
        raise ToolError(f"{path} has no rows below its header")
    return torch.tensor(rows)


def _places(path: Path, header: Sequence[str], count: int, features: Sequence[str]) -> list[int]:
    if features and set(features) & set(header):
        if missing := [name for name in features if name not in header]:
            raise ToolError(f"{path} has no column {missing[0]!r}; the model takes {', '.join(features)}"[:600])
        return [header.index(name) for name in features]
    if len(header) != count:
        named = f" ({', '.join(features)})" if features else ""
        raise ToolError(f"{path} has {len(header)} columns, the model takes {count}{named}"[:600])
    return list(range(count))


def _number(cell: str) -> float:
    value = float(cell)
    if not -3.4e38 < value < 3.4e38:
        raise ValueError
    return value


def _is_number(cell: str) -> bool:
    try:
        _number(cell)
    except ValueError:
        return False
    return True


# ---- a picture ---------------------------------------------------------------------------------------------


def draw(entry: Mapping[str, Any], model: str) -> Any:
    """One answer as a matplotlib figure: the input beside the classes, or what the model looks at in a table."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from zoo.figures import COLOR, plot_importances

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    path = Path(entry["file"])
    if path.suffix.lower() in EXTENSIONS:
        from PIL import Image

        left.imshow(Image.open(path).convert("RGB"))
        left.set_axis_off()
    elif path.suffix.lower() in SOUNDS:
        network = load(model)
        sampler: Any = _sampler(network)
        left.imshow(sampler(_sound(path, network))[0, 0].numpy(), origin="lower", aspect="auto", cmap="magma")
        left.set(xlabel="frame", ylabel="mel bin")
    else:
        network = load(model)
        importance = getattr(network, "feature_importance", None)
        if callable(importance):
            names = _facts(model, network)["features"] or None
            plot_importances(importance().double(), names, top=8, ax=left)
        else:
            left.set_axis_off()
    left.set_title(path.name + (f", row {entry['row']}" if "row" in entry else ""), fontsize=10)
    if "value" in entry:
        right.text(0.5, 0.5, f"{entry['value']:.4g}", ha="center", va="center", fontsize=28, color=COLOR)
        right.set_axis_off()
    else:
        found = entry["predictions"][::-1]
        right.barh([p["class"][:24] for p in found], [p["probability"] for p in found], color=COLOR)
        right.set(xlim=(0, 1), xlabel="probability")
        right.spines[["top", "right"]].set_visible(False)
    figure.suptitle(model, fontsize=10)
    return figure
