"""A file means the same in a data module, in prediction, in a saved model and beside an export, for every modality.

Each model is given a data module and a file that holds one of its test inputs. What the module hands to evaluation and
what prediction prepares from the file, by the record that travelled with the weights, must be the same tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import zoo
from tests.data.test_text import folder as tokenizer_folder  # noqa: F401 (a fixture)
from tests.data.test_text import table as reviews
from zoo.data import (
    AudioFolder,
    ContinualData,
    Digits,
    FoodReviews,
    Forecast,
    ImageFolder,
    IndianPines,
    Mnist5k,
    PointFolder,
    PointMnist,
    TextFolder,
    VideoFolder,
)
from zoo.data.prepare import PREPARERS, prepare
from zoo.data.sampling import SampleKey
from zoo.data.tabular import Tabular
from zoo.registry import bundled_weights
from zoo.support import inputs
from zoo.tasks import ClassificationTask, load_task
from zoo.tools.evaluation import batches, build_data
from zoo.tools.prediction import prepared


class Case(NamedTuple):
    """A prepared data module, a file, and the module's input for what the file holds."""

    data: Any
    path: Path
    expected: tuple[Tensor, ...]
    model_args: Mapping[str, Any] = MappingProxyType({})


# ---- files of every kind -----------------------------------------------------------------------------------


def first_of(data: Any, part: str = "test") -> Tensor:
    return data.datasets[part].images([SampleKey(0)])


def ready(data: Any) -> Any:
    data.prepare_data()
    data.setup()
    return data


def small_images(data: Any, place: Path) -> Case:
    pixels = data.datasets["test"].pixels[0]
    Image.fromarray(pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy()).save(place / "x.png")
    return Case(data, place / "x.png", (first_of(data),))


def digits(place: Path, **options: Any) -> Case:
    return small_images(ready(Digits(**options)), place)


def stream(place: Path) -> Case:
    data = ready(ContinualData("digits", "split", tasks=5))
    images, _ = next(batches(data, 1))
    Image.fromarray(data.stream[0].test[0][0, 0].numpy()).save(place / "x.png")
    return Case(data, place / "x.png", (images,))


def mnist(place: Path, **options: Any) -> Case:
    write_mnist(place)
    return small_images(ready(Mnist5k(place, download=False, **options)), place)


def write_mnist(place: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (200, 1, 28, 28)).astype(np.uint8)
    np.savez(place / "mnist5k.npz", images=images, targets=np.repeat(np.arange(10), 20))


def image_folder(place: Path) -> Case:
    draw = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a", "b"):
        (place / "train" / name).mkdir(parents=True)
        (place / "test" / name).mkdir(parents=True)
        for part in ("train", "test"):
            pixels = draw.integers(0, 256, (45, 60, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(place / part / name / "x.jpg", exif=exif)
    data = ready(ImageFolder(place, image_size=32, num_workers=0, val_fraction=0, background=0))
    return Case(data, place / "test" / "a" / "x.jpg", (first_of(data),), {"in_chans": 3})


def table(name: str, place: Path) -> Case:
    data = ready(Tabular(name=name))
    names = data.feature_names[::-1]
    rows = first_of(data)
    cells = [repr(float(v)) for v in rows[0].flip(0)]
    (place / "x.csv").write_text(",".join(names) + "\n" + ",".join(cells) + "\n")
    return Case(data, place / "x.csv", (rows,), {"in_chans": data.in_chans})


def series(place: Path) -> Case:
    draw = np.random.default_rng(0).normal(5, 2, (120, 3))
    lines = [f"{datetime(2020, 1, 1) + timedelta(hours=i)},{a:.4f},{b:.4f},{c:.4f}" for i, (a, b, c) in enumerate(draw)]
    (place / "all.csv").write_text("\n".join(["date,a,b,c", *lines]) + "\n")
    data = ready(Forecast(str(place / "all.csv"), seq_len=12, pred_len=6))
    part = data.datasets["test"]
    expected, _ = part.batch([len(part) - 1])
    (place / "x.csv").write_text("\n".join(["date,a,b,c", *lines[:-6]]) + "\n")
    return Case(data, place / "x.csv", expected)


def tone(path: Path, seconds: float, rate: int, begin: float = 0.0, end: float = 60.0, channels: int = 1) -> None:
    import soundfile

    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(int(seconds * rate)) / rate
    wave = 0.5 * np.sin(2 * np.pi * 440 * time) * ((begin <= time) & (time < end))
    soundfile.write(path, np.stack([wave, wave / 2][:channels], 1), rate)


def sounds(place: Path, seconds: float, rate: int, fill: str) -> Case:
    pytest.importorskip("soundfile")
    for part in ("train", "test"):
        for name in ("a", "b"):
            tone(place / part / name / "x.wav", seconds, rate, seconds / 3, 2 * seconds / 3, channels=2)
    data = ready(AudioFolder(place, sample_rate=8000, duration=1.0, fill=fill, val_fraction=0.0))  # type: ignore[arg-type]
    return Case(data, place / "test" / "a" / "x.wav", (first_of(data),), {"sample_rate": 8000})


def clips(place: Path) -> Case:
    av = pytest.importorskip("av", reason="reads and writes video files")
    draw = np.random.default_rng(0)
    for name in ("a", "b"):
        path = place / "train" / name / "x.mp4"
        path.parent.mkdir(parents=True)
        with av.open(str(path), "w") as container:
            video = container.add_stream("mpeg4", rate=10)
            video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
            for _ in range(7):
                frame = av.VideoFrame.from_ndarray(draw.integers(0, 256, (32, 48, 3)).astype(np.uint8), format="rgb24")
                container.mux(video.encode(frame))
            container.mux(video.encode())
        path.with_name("y.mp4").write_bytes(path.read_bytes())
    data = ready(VideoFolder(place, frames=4, size=24, num_workers=0, val_fraction=0.5))
    return Case(data, Path(data.datasets["test"].paths[0]), (first_of(data),))


def clouds(place: Path) -> Case:
    write_mnist(place)
    data = ready(PointMnist(place, download=False, num_points=64))
    with np.load(place / "mnist5k.npz") as content:
        images = torch.from_numpy(content["images"])
    wanted = first_of(data)
    found = next(image for image in images if torch.equal(data.clouds(image[None]), wanted))[0]
    y, x = torch.nonzero(found > 32, as_tuple=True)
    np.save(place / "x.npy", torch.stack([x / 13.5 - 1, 1 - y / 13.5, found[y, x] / 510], 1).numpy())
    return Case(data, place / "x.npy", (wanted,))


def patches(place: Path) -> Case:
    draw = np.random.default_rng(0)
    scene = draw.normal(5, 2, (145, 145, 200)).astype(np.float32)
    np.save(place / "Indian_pines_corrected.npy", scene)
    np.save(place / "Indian_pines_gt.npy", draw.integers(0, 17, (145, 145)).astype(np.uint8))
    data = ready(IndianPines(place, patch=5))
    part = data.datasets["test"]
    inside = int(((part.places >= 2) & (part.places < 143)).all(1).nonzero()[0])
    row, column = part.places[inside].tolist()
    np.save(place / "x.npy", scene[row - 2 : row + 3, column - 2 : column + 3])
    return Case(data, place / "x.npy", (part.images([SampleKey(inside)]),), {"in_chans": 200})


def texts(place: Path) -> Case:
    pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    data = ready(FoodReviews(download=False, max_length=8))
    (place / "x.txt").write_text(str(reviews("", "testing_data", place, False)["review"][0]))
    return Case(data, place / "x.txt", (first_of(data),))


def own_clouds(place: Path) -> Case:
    draw = np.random.default_rng(0)
    for part, name in ((part, name) for part in ("train", "test") for name in ("a", "b")):
        (place / part / name).mkdir(parents=True)
        np.savetxt(place / part / name / "x.csv", draw.normal(9, 2, (90, 5)), delimiter=",")
    data = ready(PointFolder(place, num_points=64, val_fraction=0))
    return Case(data, place / "test" / "a" / "x.csv", (first_of(data),), {"in_chans": 5})


def own_texts(place: Path) -> Case:
    pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    rows = "".join(f"{'good' if i % 2 else 'bad'} tea,{i % 2}\n" for i in range(8))
    (place / "train.csv").write_text(f"words,class\n{rows}")
    (place / "test.csv").write_text("words,class\ngood tea .,1\nbad,0\n")
    data = ready(TextFolder(place, text="words", target="class", download=False, max_length=8))
    return Case(data, place / "test.csv", (data.datasets["test"].ids,))


#: A file for every tiny model, and for every modality at least one.
TINY: dict[str, dict[str, Callable[[Path], Case]]] = {
    "test_dkm": {"wine": lambda place: table("wine", place)},
    "test_dkm_conv": {"digits": digits},
    "test_gkcl": {"stream": stream},
    "test_kcl": {"stream": stream},
    "test_grbf": {"wine": lambda place: table("wine", place)},
    "test_snnk": {"diabetes": lambda place: table("diabetes", place)},
    "test_terminator": {"digits": lambda place: digits(place, image_size=12)},
    "test_unireplknet": {
        "digits": digits,
        "digits enlarged": lambda place: digits(place, image_size=32),
        "digits reduced": lambda place: mnist(place, image_size=20),
        "folder": image_folder,
        "spectrum": patches,
    },
    "test_unireplknet_audio": {
        "cut": lambda place: sounds(place, 3.0, 11127, "silence"),
        "repeated": lambda place: sounds(place, 0.3, 16000, "repeat"),
        "surrounded": lambda place: sounds(place, 0.3, 8000, "silence"),
    },
    "test_unireplknet_video": {"clips": clips},
    "test_unireplknet_point": {"clouds": clouds, "own clouds": own_clouds},
    "test_unireplknet_forecast": {"series": series},
    "test_minilm": {"texts": texts, "own texts": own_texts},
}


def test_every_tiny_model_and_every_kind_has_a_case() -> None:
    assert set(TINY) == set(zoo.list_models("test_*"))
    made = {"image", "sound", "clip", "points", "spectrum", "text", "table", "series"}
    assert set(PREPARERS) == set(inputs.KINDS) == made


# ---- the same tensor ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, cases in TINY.items() for kind in cases])
def test_tiny_models(
    name: str, kind: str, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    tokenizer_folder.joinpath("minilm").rename(tmp_path / "moved")
    (tmp_path / "cache" / "kernel-zoo").mkdir()
    (tmp_path / "moved").rename(tmp_path / "cache" / "kernel-zoo" / "minilm")
    monkeypatch.setattr("zoo.data.text.read_rdataset", reviews)
    (tmp_path / "data").mkdir()
    case = TINY[name][kind](tmp_path / "data")
    record = inputs.check(case.data.input_record())
    torch.manual_seed(0)
    known = {k: getattr(case.data, k) for k in ("num_classes", "in_chans") if getattr(case.data, k, None)}
    model = zoo.create_model(name, **{**known, **case.model_args}).eval()
    assert model.input_record is None
    zoo.save_pretrained(model, tmp_path / "model", preprocessing=case.data.preprocessing, input_record=record)
    again = zoo.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    assert again.input_record == zoo.to_deploy(again).input_record == record == json.loads(json.dumps(record))
    found = prepared(case.path, again)
    assert len(found) == len(case.expected)
    for ours, theirs in zip(found, case.expected, strict=True):
        assert torch.equal(ours, theirs), "to the bit"
    with torch.no_grad():
        assert torch.isfinite(again(*found)).all(), "and the model takes it"


SHIPPED: dict[str, Callable[[Path], Case]] = {
    "gkcl_gaussian.digits": stream,
    "grbf.diabetes": lambda place: table("diabetes", place),
    "grbf.wine": lambda place: table("wine", place),
    "snnk_mlp2.digits": lambda place: table("digits", place),
    "terminator_z.digits": lambda place: digits(place, image_size=14),
    "terminator_z.mnist5k": lambda place: mnist(place, image_size=14),
    "unireplknet_z.digits": digits,
    "unireplknet_z.mnist5k": mnist,
}


@pytest.mark.parametrize("name", sorted(bundled_weights.records()))
def test_shipped_weights(name: str, tmp_path: Path) -> None:
    case = SHIPPED[name](tmp_path)
    model = zoo.create_model(name, pretrained=True).eval()
    assert model.input_record == inputs.check(case.data.input_record()) == bundled_weights.record(name)["input"]
    (found,) = prepared(case.path, model)
    assert torch.equal(found, case.expected[0]), "to the bit"
    if "mnist" not in name:
        again = build_data(bundled_weights.record(name))
        rows, _ = next(batches(again, 1)) if hasattr(again, "stream") else (first_of(again), None)
        assert torch.equal(found, rows), "nor does the record's own data differ"


def test_older_folders_without_a_record_keep_their_preparation(tmp_path: Path) -> None:
    """Their configuration says what timm's does; recordings are cut and filled as evaluation always did."""
    from timm.data import create_transform

    model = zoo.create_model("test_unireplknet", num_classes=2)
    how: dict[str, Any] = {"interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center"}
    how |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    zoo.save_pretrained(model, tmp_path / "model", preprocessing={"input_size": (3, 32, 32), **how})
    again = zoo.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    assert again.input_record is None
    pixels = np.random.default_rng(0).integers(0, 256, (45, 60, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    theirs: Any = create_transform((3, 32, 32), is_training=False, **how)
    assert torch.equal(prepared(tmp_path / "x.png", again)[0][0], theirs(Image.fromarray(pixels)))
    hearing = zoo.create_model("test_unireplknet_audio")
    assert inputs.record_of(hearing) == {"kind": "sound", "rate": 16000, "samples": 5360}
    for name in zoo.list_models("test_*"):
        assert inputs.read(inputs.record_of(zoo.create_model(name)))


# ---- the record travels ------------------------------------------------------------------------------------


def test_a_checkpoint_keeps_the_record(tmp_path: Path) -> None:
    import lightning as L

    data = Digits(batch_size=256)
    task = ClassificationTask({"model_name": "test_unireplknet", "num_classes": 10, "in_chans": 1}, {"opt": "sgd"})
    task.model.input_record = data.input_record()  # type: ignore[assignment]
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "default_root_dir": tmp_path}
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, limit_train_batches=1, limit_val_batches=0, **quiet)
    trainer.fit(task, datamodule=data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert load_task(tmp_path / "x.ckpt").model.input_record == data.input_record()
    theirs = ClassificationTask.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert theirs.model.input_record == data.input_record()
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    content["zoo"]["input"]["size"] = "large"
    torch.save(content, tmp_path / "bad.ckpt")
    with pytest.raises(zoo.CheckpointError, match="the record of the input, size: input should be a valid list"):
        load_task(tmp_path / "bad.ckpt")


def test_another_number_of_channels_drops_the_record() -> None:
    assert zoo.create_model("unireplknet_z.digits", pretrained=True, in_chans=3).input_record is None


HOSTILE: dict[str, tuple[Any, str]] = {
    "a list": ([1], "must be an object with a kind"),
    "no kind": ({"size": 3}, "must be an object with a kind"),
    "a list as kind": ({"kind": ["image"]}, "must be an object with a kind"),
    "a word as size": (
        {"kind": "image", "channels": 1, "size": "big"},
        "size: input should be a valid list, not 'big'",
    ),
    "a long size": ({"kind": "image", "channels": 1, "size": [1, 2, 3]}, "size: list should have at most 2 items"),
    "huge": ({"kind": "image", "channels": 1, "size": [10**8, 10**8]}, "inputs of 10,000,000,000,000,000 numbers"),
    "no size": ({"kind": "image", "channels": 1}, "size: field required"),
    "two channels": ({"kind": "image", "channels": 2, "size": [1, 1]}, "channels: input should be 1 or 3, not 2"),
    "zero deviation": (
        {"kind": "image", "channels": 1, "size": [1, 1], "std": [0.0]},
        "std.0: input should be greater",
    ),
    "two means": ({"kind": "image", "channels": 3, "size": [1, 1], "mean": [0.0, 0.0]}, "mean: 2 numbers where 3"),
    "a crop of nothing": ({"kind": "image", "channels": 1, "size": [1, 1], "crop_pct": 0.0}, "crop_pct: input should"),
    "next to nothing": (
        {"kind": "image", "channels": 1, "size": [9, 9], "crop_pct": 1e-9},
        "before the crop (crop_pct)",
    ),
    "a small crop": ({"kind": "image", "channels": 3, "size": [224, 224], "crop_pct": 0.002}, "damaged or hostile"),
    "a rate of 0": ({"kind": "sound", "rate": 0, "samples": 1}, "rate: input should be greater than or equal to 1"),
    "a rate in words": ({"kind": "sound", "rate": "8000", "samples": 1}, "rate: input should be a valid integer"),
    "true as samples": ({"kind": "sound", "rate": 8000, "samples": True}, "samples: input should be a valid integer"),
    "a film": ({"kind": "clip", "channels": 3, "size": [512, 512], "frames": 10**6}, "it is damaged or hostile"),
    "a tokenizer": ({"kind": "text", "tokens": 8, "tokenizer": "/etc/passwd"}, "tokenizer: input should be 'minilm'"),
    "too long": ({"kind": "table", "count": 1, "x": "y" * 2_000_000}, "larger than any"),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_a_damaged_record_is_told_in_a_sentence(how: str, tmp_path: Path) -> None:
    record, told = HOSTILE[how]
    folder = zoo.save_pretrained(zoo.create_model("test_unireplknet"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "input": record}))
    with pytest.raises(zoo.CheckpointError) as caught:
        zoo.create_model(f"local-dir:{folder}", pretrained=True)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_kind_loads_and_is_refused_by_prediction(tmp_path: Path) -> None:
    model = zoo.create_model("test_unireplknet")
    zoo.save_pretrained(model, tmp_path / "model", input_record={"kind": "smell", "nose": 3})
    again = zoo.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    assert again.input_record == {"kind": "smell", "nose": 3}
    with pytest.raises(ValueError, match="inputs of the kind 'smell' are not known; known are image, clip, sound"):
        prepare(tmp_path / "x.png", again.input_record)
    with pytest.raises(ValueError, match="the record of the input"):
        zoo.save_pretrained(model, tmp_path / "other", input_record={"kind": "image", "channels": 3, "size": [0, 1]})
    assert not (tmp_path / "other").exists()
