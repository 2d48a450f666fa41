"""Damaged, truncated, oversized, mis-keyed and hostile files at every door: one clear line, and nothing happens."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import random
import resource
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import zoo
from zoo.cli import main
from zoo.registry import bundled_weights
from zoo.results.runs import read_run
from zoo.training.checkpointing import find_resumable

NAME = "test_grbf"
ROUNDS = 16  # draws of every random kind of damage
MEBIBYTES = 400  # the most that memory may grow over a whole sweep


def model() -> nn.Module:
    torch.manual_seed(0)
    return zoo.create_model(NAME, num_classes=3, in_chans=5)


def torch_bytes(content: Any, legacy: bool = False) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def forms() -> dict[str, bytes]:
    """The same weights in the three ways in which weights are written."""
    state = model().state_dict()
    return {"safetensors": safetensors.torch.save(state), "zip": torch_bytes(state), "legacy": torch_bytes(state, True)}


class Payload:
    """Writes a file when it is unpickled, by one of the usual ways."""

    def __init__(self, canary: Path, how: int) -> None:
        self.canary, self.how = canary, how

    def __reduce__(self) -> tuple[Any, ...]:
        command = f"open({str(self.canary)!r}, 'w').close()"
        shell = f"touch {self.canary}"
        import os
        import subprocess

        ways: list[tuple[Any, tuple[Any, ...]]] = [
            (exec, (command,)),
            (eval, (command,)),
            (os.system, (shell,)),
            (subprocess.check_call, (["touch", str(self.canary)],)),
            (Path.touch, (self.canary,)),
        ]
        return ways[self.how % len(ways)]


# ---- weights -----------------------------------------------------------------------------------------------


def truncated(draw: random.Random) -> Iterator[bytes]:
    for data in forms().values():
        for _ in range(ROUNDS):
            yield data[: draw.randrange(1, len(data) - 1)]


def header_lies(draw: random.Random) -> Iterator[bytes]:
    """Safetensors whose header length, shapes, types or offsets are not true."""
    data = forms()["safetensors"]
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    tensors = [k for k in header if k != "__metadata__"]

    def packed(changed: dict[str, Any]) -> bytes:
        text = json.dumps(changed).encode()
        return struct.pack("<Q", len(text)) + text + body

    for _ in range(ROUNDS):
        yield struct.pack("<Q", draw.choice([2**63, 2**40, length + draw.randrange(10**4, 10**9), 10**8])) + data[8:]
        key = draw.choice(tensors)
        lies: dict[str, Any] = {
            "shape": draw.choice([[2**40], [2**20, 2**20], [-1], [0.5], "x", [10**18, 10**18]]),
            "data_offsets": draw.choice([[0, 2**50], [-4, 0], [8, 4], [len(body), len(body) + 64], "x"]),
            "dtype": draw.choice(["F64", "F8", "I8", "PY", "", 3]),
        }
        for field, value in lies.items():
            yield packed({**header, key: {**header[key], field: value}})
        yield struct.pack("<Q", length) + bytes(draw.randrange(256) for _ in range(length)) + body


def mis_keyed(draw: random.Random) -> Iterator[bytes]:
    """Whole files of other names, shapes or kinds of values."""
    state = model().state_dict()
    keys = list(state)
    for i in range(ROUNDS):
        key = draw.choice([k for k in keys if state[k].ndim])
        rest = {k: v for k, v in state.items() if k != key}
        others: list[Any] = [
            rest,
            {**rest, f"{key}_": state[key]},
            {**rest, key: torch.zeros(*state[key].shape, 2)},
            {**rest, key: state[key].to(torch.int8)},
            {**state, f"extra.{i}": torch.zeros(2)},
            {f"other.{k}": v for k, v in state.items()},
            {"epoch": i, "state_dict": {}},
        ]
        yield torch_bytes(draw.choice(others[:3]), legacy=bool(i % 2))
        yield from (torch_bytes(content) for content in others[3:])


def noise(draw: random.Random) -> Iterator[bytes]:
    """What is no weight file at all, some of it with a promising beginning."""
    starts = (b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04\x95", b"\x89HDF\r\n", b"\x1f\x8b", b"<!DOCTYPE html>")
    starts += (b"version https://git-lfs.github.com/spec/v1\n", struct.pack("<Q", 40) + b"{")
    for start in starts:
        for _ in range(4):
            yield start + bytes(draw.randrange(256) for _ in range(draw.randrange(0, 400)))
    yield b""


def hostile(canary: Path) -> Iterator[bytes]:
    """Pickles that run code, in every wrapping, and archives that unpack to much more than they are."""
    for how in range(5):
        payload = Payload(canary, how)
        for protocol in range(2, 6):
            yield pickle.dumps(payload, protocol)
            yield pickle.dumps({"state_dict": payload}, protocol)
        for legacy in (False, True):
            yield torch_bytes({"model": payload, "w": torch.ones(2)}, legacy)
            yield torch_bytes([payload], legacy)
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(payload))
            archive.writestr("archive/version", "3\n")
        yield stream.getvalue()
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", method) as archive:
            archive.writestr("archive/data.pkl", b"\0" * 50_000_000)
        yield stream.getvalue()
    yield b"\x80\x04" + b"]" * 100_000  # deep nesting
    yield b"\x80\x04\x8e" + struct.pack("<Q", 2**62)  # claims a string of four exabytes
    yield pickle.dumps(nn.Linear(2, 2))


def weight_files(canary: Path) -> Iterator[bytes]:
    draw = random.Random(0)
    yield from truncated(draw)
    yield from header_lies(draw)
    yield from mis_keyed(draw)
    yield from noise(draw)
    yield from hostile(canary)


Door = Callable[[Path, nn.Module], object]

DOORS: dict[str, Door] = {
    "load_checkpoint": lambda path, own: zoo.load_checkpoint(own, path),
    "create_model": lambda path, own: zoo.create_model(NAME, num_classes=3, in_chans=5, checkpoint_path=path),
    "load_task": lambda path, own: zoo.load_task(path),
}


class Sweep:
    """Opens files at a door, and sees to it that nothing but one line comes out."""

    def __init__(self, tmp_path: Path) -> None:
        self.folder, self.canary, self.count = tmp_path, tmp_path / "canary", 0
        self.own = model()
        self.before = {k: v.clone() for k, v in self.own.state_dict().items()}
        self.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def refused(self, door: Callable[[], object], content: bytes) -> None:
        self.count += 1
        tree = snapshot(self.folder)
        with pytest.raises(Exception) as caught:  # noqa: PT011 (its kind is checked below)
            door()
        error, start = caught.value, content[:60]
        assert type(error).__module__.startswith("zoo."), f"{type(error).__name__}: {error} on {start!r}"
        assert "\n" not in str(error), start
        assert 20 < len(str(error)) < 800, start
        assert not self.canary.exists(), start
        assert snapshot(self.folder) == tree, start

    def finish(self, least: int) -> None:
        assert self.count >= least
        assert all(torch.equal(v, self.before[k]) for k, v in self.own.state_dict().items())
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.peak) / 1024
        assert grown < MEBIBYTES, f"memory grew by {grown:.0f} MiB"


def snapshot(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize("door", DOORS)
def test_weight_files(door: str, tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    suffixes = (".safetensors", ".pth", ".ckpt", ".bin")
    for i, content in enumerate(weight_files(sweep.canary)):
        if door != "load_checkpoint" and i % 4:  # they read files by the same code
            continue
        path = tmp_path / f"weights{suffixes[i % len(suffixes)]}"
        path.write_bytes(content)
        sweep.refused(lambda path=path: DOORS[door](path, sweep.own), content)
        path.unlink()
    sweep.finish(300 if door == "load_checkpoint" else 75)


def saved(folder: Path) -> Path:
    return zoo.save_pretrained(model(), folder, class_names=["a", "b", "c"])


def test_saved_folders(tmp_path: Path) -> None:
    """A changed byte anywhere in the weights, and configurations that lie."""
    sweep, draw = Sweep(tmp_path), random.Random(1)
    folder = saved(tmp_path / "saved")
    weights, config = folder / "model.safetensors", folder / "config.json"
    good, text = weights.read_bytes(), config.read_text()

    def load() -> object:
        return zoo.create_model(f"local-dir:{folder}", pretrained=True)

    load()
    for _ in range(40):
        place = draw.randrange(len(good))
        weights.write_bytes(good[:place] + bytes([good[place] ^ (1 << draw.randrange(8))]) + good[place + 1 :])
        sweep.refused(load, good[place : place + 1])
    weights.write_bytes(good)
    whole = json.loads(text)
    lies: list[Any] = [{**whole, "architecture": name} for name in ("", "no_such", "../../etc", 3, None, "resnet18;rm")]
    lies += [{**whole, key: value} for key in ("model_args", "pretrained_cfg", "sha256") for value in (3, "x", [1])]
    lies += [{**whole, "model_args": {**whole["model_args"], key: 1}} for key in ("surprise", "__class__")]
    lies += [{**whole, "sha256": {"model.safetensors": value}} for value in ("", "0" * 64, "g" * 64, 7)]
    lies += [{**whole, "pretrained_cfg": {**whole["pretrained_cfg"], "surprise": 1}}, [], 3, "text", None]
    contents = [json.dumps(lie) for lie in lies]
    contents += [text[: draw.randrange(1, len(text) - 3)] for _ in range(30)]
    contents += ["[" * 100_000, "", "\x00" * 50, '{"architecture": ' + '"x' * 500]
    for content in contents:
        config.write_text(content)
        sweep.refused(load, content.encode())
    sweep.finish(90)


def test_records_and_runs(tmp_path: Path) -> None:
    """Records of shipped weights, and run folders."""
    sweep, draw = Sweep(tmp_path), random.Random(2)
    text = (bundled_weights.folder() / "grbf.wine.json").read_text()
    path = tmp_path / "grbf.wine.json"
    whole = json.loads(text)
    contents = [text[: draw.randrange(1, len(text) - 3)] for _ in range(30)]
    contents += [json.dumps({k: v for k, v in whole.items() if k != key}) for key in bundled_weights.FIELDS]
    contents += [json.dumps({**whole, key: {"a": [object.__name__]} if isinstance(whole[key], str) else "x"})
                 for key in bundled_weights.FIELDS]  # fmt: skip
    contents += ["[" * 100_000, "", "{}", "[]", "1e999", "x" * 2_000_000]
    for content in contents:
        path.write_text(content)
        sweep.refused(lambda: bundled_weights.read_record(path), content.encode())
    run = tmp_path / "run"
    (run / ".hydra").mkdir(parents=True)
    (run / "summary.json").write_text('{"metrics": {}, "seconds": 1, "seed": 0}')
    for content in ("!!python/object/apply:os.system ['touch " + str(sweep.canary) + "']", "a: [", "\x00", ": :"):
        (run / ".hydra" / "config.yaml").write_text(content)
        sweep.refused(lambda: read_run(run), content.encode())
    sweep.refused(lambda: find_resumable(tmp_path / "nothing", None), b"")
    sweep.finish(80)


def test_files_to_predict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tables and images that are none, through the command line."""
    draw = random.Random(3)
    names = json.loads((bundled_weights.folder() / "grbf.wine.json").read_text())["feature_names"]
    header = ",".join(names)
    tables = [header + "\n" + ",".join([cell] * 13) for cell in ("", "x", "inf", "nan", "1e400", "=1+1", "0x10", '"')]
    tables += [
        header,
        "",
        "\n\n",
        "a,b\n1,2",
        header + "\n1,2,3",
        header.replace("alcohol", "x") + "\n" + "1," * 12 + "1",
    ]
    for i, content in enumerate(tables):
        path = tmp_path / f"{i}.csv"
        path.write_text(content)
        assert main(["predict", "grbf.wine", str(path)]) == 1, content
        assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "bytes.csv").write_bytes(bytes(draw.randrange(256) for _ in range(300)))
    assert main(["predict", "grbf.wine", str(tmp_path / "bytes.csv")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    png = b"\x89PNG\r\n\x1a\n"
    for i, content in enumerate((b"", b"text", png, png + b"\0" * 40, b"GIF89a" + b"\xff" * 9, b"\xff\xd8\xff\xe0")):
        path = tmp_path / f"{i}.png"
        path.write_bytes(content)
        assert main(["predict", "unireplknet_z.digits", str(path)]) == 1, content
        told = capsys.readouterr().err
        assert "cannot read the image" in told
        assert told.count("\n") == 1
