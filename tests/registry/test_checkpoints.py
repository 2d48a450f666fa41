"""Weights in and out: every form is read, every accident is told in one line, and nothing is half done."""

from __future__ import annotations

import argparse
import copy
import errno
import itertools
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import struct
import urllib.error
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

import zoo
from tests.support.test_whole import beside, killed_at
from zoo.models import to_deploy
from zoo.registry.checkpoints import CheckpointError, load_checkpoint, read_checkpoint, save_pretrained, write_atomic
from zoo.results.runs import RunsError
from zoo.support import files
from zoo.support.files import RECORDS, cache_folder, sha256_of, write_all
from zoo.support.values import OutputError, check_output

NAME = "test_unireplknet"
NAMES = [list("abcdefg"), list("hijklmn")]  # of classes


def build(seed: int = 0, **kwargs: Any) -> nn.Module:
    """A model whose statistics and layer scales are not those of initialisation."""
    torch.manual_seed(seed)
    model = zoo.create_model(NAME, **{"num_classes": 7, **kwargs})
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.1 * torch.rand_like(tensor))
    return model.eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def source() -> nn.Module:
    return build(seed=1)


@pytest.fixture
def model() -> nn.Module:
    return build(seed=2)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def refused(model: nn.Module, where: Any, match: str, **kwargs: Any) -> str:
    """Loading fails with one line, and the model is as it was."""
    before, modules = snapshot(model), [type(m) for m in model.modules()]
    with pytest.raises(CheckpointError, match=match) as caught:
        load_checkpoint(model, where, **kwargs)
    after = model.state_dict()
    assert [type(m) for m in model.modules()] == modules
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) for k in before)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


def same(a: nn.Module, b: nn.Module, images: Tensor, **tolerance: float) -> None:
    with torch.no_grad():
        torch.testing.assert_close(a.eval()(images), b.eval()(images), **(tolerance or {"rtol": 0, "atol": 0}))


# ---- reading every form ------------------------------------------------------------------------------------

WRAPPED = {
    "bare": lambda s: s,
    "ordered": OrderedDict,
    "model": lambda s: {"model": s, "epoch": 3},
    "state_dict": lambda s: {"state_dict": s, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
    "ema_wins": lambda s: {"state_dict": {k: torch.zeros_like(v) for k, v in s.items()}, "state_dict_ema": s},
    "empty_ema": lambda s: {"state_dict": s, "state_dict_ema": None},
    "data_parallel": lambda s: {"module." + k: v for k, v in s.items()},
    "compiled": lambda s: {"_orig_mod." + k: v for k, v in s.items()},
    "compiled_parallel": lambda s: {"model": {"module._orig_mod." + k: v for k, v in s.items()}},
    "compiled_part": lambda s: {k.replace("stages.0.", "stages.0._orig_mod."): v for k, v in s.items()},
    "detector": lambda s: {
        "state_dict": {**{"backbone." + k: v for k, v in s.items()}, "decode_head.weight": torch.ones(2)}
    },
    "lightning": lambda s: {
        "state_dict": {**{"model." + k: v for k, v in s.items()}, "train_accuracy.correct": torch.tensor(3)},
        "pytorch-lightning_version": "2.6.6",
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}}],
        "hyper_parameters": {"lr": 0.1, "betas": (0.9, 0.95)},
        "epoch": 3,
    },
}


@pytest.mark.parametrize("form", WRAPPED)
def test_wrapped_forms(form: str, source: nn.Module, model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    content = WRAPPED[form](source.state_dict())
    torch.save(content, tmp_path / "weights.pth")
    assert load_checkpoint(model, tmp_path / "weights.pth") is model
    same(model, source, images)
    same(load_checkpoint(build(seed=3), content), source, images)


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.ckpt", "w.safetensors", "w.strange"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_the_content_decides_not_the_suffix(
    kind: str, name: str, source: nn.Module, model: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    path, state = tmp_path / name, source.state_dict()
    if kind == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    same(load_checkpoint(model, str(path)), source, images)


def test_a_real_training_checkpoint(source: nn.Module, model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = copy.deepcopy(source)
            self.loss = nn.CrossEntropyLoss(weight=torch.ones(7))
            self.save_hyperparameters({"lr": 0.1})

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.loss(self.model.eval()(batch[0]), batch[1])

    data = torch.utils.data.DataLoader([(images[0], 1), (images[1], 2)], batch_size=2)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(max_steps=1, accelerator="cpu", enable_checkpointing=False, default_root_dir=tmp_path, **quiet)
    trainer.fit(Module(), data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    same(load_checkpoint(model, tmp_path / "last.ckpt"), source, images)
    assert {"state_dict", "optimizer_states", "hyper_parameters"} <= read_checkpoint(tmp_path / "last.ckpt").keys()


def test_wrapped_models_are_loaded_inside(source: nn.Module, images: Tensor) -> None:
    wrapped = nn.DataParallel(build(seed=3))
    assert load_checkpoint(wrapped, source.state_dict()) is wrapped
    same(wrapped.module, source, images)
    compiled = torch.compile(build(seed=4))
    load_checkpoint(compiled, source.state_dict())
    same(compiled._orig_mod, source, images)


def test_weights_take_the_models_precision_and_flags(source: nn.Module) -> None:
    model = build(seed=3).double().requires_grad_(False)
    load_checkpoint(model, {k: v.half() if v.is_floating_point() else v for k, v in source.state_dict().items()})
    assert next(model.parameters()).dtype == torch.float64
    assert not any(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model.head.weight.float(), source.head.weight, rtol=1e-3, atol=1e-3)


# ---- training form and deploy form -------------------------------------------------------------------------


def test_deploy_weights_bring_the_model_to_deploy_form(source: nn.Module, model: nn.Module, images: Tensor) -> None:
    merged = to_deploy(source)
    load_checkpoint(model, {"state_dict": {"model." + k: v for k, v in merged.state_dict().items()}})
    assert model.state_dict().keys() == merged.state_dict().keys()
    same(model, merged, images)


def test_training_weights_are_merged_into_a_deploy_model(source: nn.Module, images: Tensor) -> None:
    model = zoo.create_model(NAME, num_classes=7, deploy=True)
    head = model.head.weight.clone()
    load_checkpoint(model, source.state_dict(), strict="backbone")
    torch.testing.assert_close(model.head.weight, head, rtol=0, atol=0)
    load_checkpoint(model, source.state_dict())
    same(model, to_deploy(source), images)
    same(model, source, images, rtol=1e-3, atol=1e-4)


# ---- what does not fit -------------------------------------------------------------------------------------


def test_other_classes(source: nn.Module, images: Tensor, tmp_path: Path) -> None:
    torch.save(source.state_dict(), tmp_path / "seven.pth")
    model = build(seed=2, num_classes=5)
    refused(
        model,
        tmp_path / "seven.pth",
        r"seven.pth has 7 classes, the model 5: .*num_classes=7, or .*'backbone'",
    )
    head = model.head.weight.clone()
    load_checkpoint(model, tmp_path / "seven.pth", strict="backbone")
    torch.testing.assert_close(model.head.weight, head, rtol=0, atol=0)
    torch.testing.assert_close(model.forward_features(images), source.forward_features(images), rtol=0, atol=0)
    features = build(seed=2, num_classes=0)
    refused(features, tmp_path / "seven.pth", "has 7 classes, the model 0")
    load_checkpoint(features, tmp_path / "seven.pth", strict="backbone")
    same(features, build_features(source), images)
    refused(
        model,
        features.state_dict(),
        r"no classifier \(head\), the model has 5 classes; pass strict='backbone'",
    )


def build_features(source: nn.Module) -> nn.Module:
    model = copy.deepcopy(source)
    model.reset_classifier(0)
    return model


def test_backbone_still_means_all_of_it(source: nn.Module, model: nn.Module) -> None:
    state = source.state_dict()
    state.pop("norm.weight")
    refused(model, state, r"1 missing \(norm.weight\)", strict="backbone")


def test_missing_unexpected_and_misshapen_names(source: nn.Module, model: nn.Module) -> None:
    state = dict(source.state_dict())
    gone = next(k for k in state if k.startswith("stages.0"))
    state["extra.weight"] = state.pop(gone)
    refused(model, state, rf"1 missing \({gone}\), 1 unexpected \(extra.weight\); .*strict=False")
    state = dict(source.state_dict())
    state["norm.weight"] = torch.ones(5)
    refused(model, state, "norm.weight is 5 in the file, 32 in the model")
    state = {k: v for k, v in source.state_dict().items() if not k.startswith("stages")}
    assert len(refused(model, state, r"missing \(.*, \.\.\.\)")) < 400


def test_other_channels_and_other_architectures(source: nn.Module) -> None:
    one = build(in_chans=1)
    refused(one, source.state_dict(), "input has 3 channels: build the model with in_chans=3")
    refused(
        timm.create_model("resnet18"),
        source.state_dict(),
        "another architecture than ResNet.*file: downsample",
    )
    refused(nn.Linear(2, 2), source.state_dict(), "another architecture than Linear")


def test_whole_numbers_are_not_weights(source: nn.Module, model: nn.Module) -> None:
    state = {k: v.to(torch.int8) if k == "head.weight" else v for k, v in source.state_dict().items()}
    refused(model, state, "head.weight is torch.int8")


def test_loading_in_part_is_asked_for_and_logged(source: nn.Module, model: nn.Module, caplog) -> None:
    state = dict(source.state_dict())
    state.pop("norm.weight")
    state["head.weight"], state["extra"] = torch.ones(2, 2), torch.ones(1)
    norm = model.norm.weight.clone()
    load_checkpoint(model, state, strict=False)
    assert torch.equal(model.norm.weight, norm)
    assert torch.equal(model.head.bias, source.head.bias)
    for name in ("norm.weight", "head.weight", "extra"):
        assert name in caplog.text
    refused(model, {"a": torch.ones(1)}, "another architecture", strict=False)
    with pytest.raises(ValueError, match="'backbone'"):
        load_checkpoint(model, state, strict="head")  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [{}, {"epoch": 1}, {"state_dict": {}}, {"model": {"a": 1}}, {1: torch.ones(1)}])
def test_no_weights_inside(content: dict, model: nn.Module, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "odd.pth")
    refused(model, tmp_path / "odd.pth", "holds no weights")


# ---- accidents and attacks ---------------------------------------------------------------------------------


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


def _attack_zip(path: Path, marker: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(1)}, "x": Attack(marker)}, path)


def _attack_legacy(path: Path, marker: Path) -> None:
    torch.save({"x": Attack(marker)}, path, _use_new_zipfile_serialization=False)


def _attack_plain(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps({"x": Attack(marker)}))


def _attack_protocol_2(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps({"x": Attack(marker)}, protocol=2))


@pytest.mark.parametrize("write", [_attack_zip, _attack_legacy, _attack_plain, _attack_protocol_2])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".ckpt"])
def test_code_in_a_file_is_named_and_never_run(write, suffix: str, model: nn.Module, tmp_path: Path) -> None:
    path, marker = tmp_path / f"evil{suffix}", tmp_path / "executed"
    write(path, marker)
    refused(model, path, rf"evil{suffix} wants to call (posix|nt)\.system while it is read.*nothing was run")
    assert not marker.exists()


def test_a_whole_model_is_not_a_checkpoint(source: nn.Module, model: nn.Module, tmp_path: Path) -> None:
    torch.save(source, tmp_path / "model.pth")
    refused(model, tmp_path / "model.pth", r"wants to call zoo\.models\.unireplknet\.UniRepLKNet")


def _header(length: int, text: bytes = b"{}") -> bytes:
    return struct.pack("<Q", length) + text


def _safetensors(entries: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return _header(len(text), text) + data


HUGE = {"dtype": "F32", "shape": [2**40, 2**10], "data_offsets": [0, 4]}
FILES: dict[str, tuple[bytes, str]] = {
    "empty.pth": (b"", "empty"),
    "empty.safetensors": (b"", "empty"),
    "one.safetensors": (b"\x01", "not a whole safetensors file"),
    "huge_header.safetensors": (
        _header(2**62),
        "claims a header of 4611686018427387904 bytes in a file of 10",
    ),
    "long_header.safetensors": (_header(90_000_000), "claims a header of 90000000 bytes in a file of 10"),
    "negative.safetensors": (b"\xff" * 8 + b"{}", "claims a header"),
    "huge_tensor.safetensors": (_safetensors({"a": HUGE}, b"0000"), "damaged safetensors"),
    "beyond.safetensors": (
        _safetensors({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}, b"0000"),
        "damaged safetensors",
    ),
    "not_json.safetensors": (_header(2, b"{]"), "damaged safetensors"),
    "deep.safetensors": (_header(20001, b"{" + b"[" * 20000), "damaged safetensors"),
    "text.pth": (b"these are not the weights", "it is a text file"),
    "text.safetensors": (b"these are not the weights", "it is a text file"),
    "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "page.pth": (b"<!DOCTYPE html><html>404</html>", "web page"),
    "keras.pth": (b"\x89HDF\r\n\x1a\n" + b"\0" * 99, "HDF5"),
    "tar.pth": (b"\x1f\x8b\x08" + b"\0" * 99, "gzip"),
    "noise.pth": (bytes(range(128, 256)) * 3, "not a checkpoint|damaged"),
    "half_pickle.pth": (pickle.dumps({"a": 1})[:-3], "damaged or cut off"),
    "half_zip.pth": (b"PK\x03\x04" + b"\0" * 200, "cut off or damaged"),
    "long_string.pth": (b"\x80\x02X\xff\xff\xff\x7fabc", "damaged or cut off"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_something_else(name: str, model: nn.Module, tmp_path: Path) -> None:
    content, message = FILES[name]
    (tmp_path / name).write_bytes(content)
    assert name in refused(model, tmp_path / name, message)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.999])
def test_cut_off_files(kind: str, kept: float, source: nn.Module, model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    if kind == "safetensors":
        safetensors.torch.save_file(source.state_dict(), path)
    else:
        torch.save(source.state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    refused(model, path, "damaged|cut off|not a whole")


@pytest.mark.parametrize("kind", ["legacy", "legacy, shared", "zip", "zip, shared", "safetensors"])
def test_more_tensors_than_are_read(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are counted before one is read: to unpickle them costs ten times as much."""
    path, storage = tmp_path / "weights", torch.ones(30)
    for count in (30, 31):
        state = {f"{i}.weight": storage[:1] if "shared" in kind else torch.ones(1) for i in range(count)}
        if kind == "safetensors":
            safetensors.torch.save_file(state, path)
        else:
            torch.save(state, path, _use_new_zipfile_serialization="zip" in kind)
        allowed = count + 8 * (kind == "zip")  # entries of the archive that are no tensors
        monkeypatch.setattr(files, "MAX_TENSORS", allowed)
        assert len(read_checkpoint(path)) == count
    with monkeypatch.context() as patch:
        patch.setattr(files, "MAX_TENSORS", 30)
        patch.setattr(torch, "load", None)  # nothing is unpickled
        with pytest.raises(CheckpointError, match=r"holds .*30 (tensors )?that are read"):
            read_checkpoint(path)


def test_folders_and_missing_files(source: nn.Module, model: nn.Module, tmp_path: Path) -> None:
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    refused(model, tmp_path / "weight.pth", r"there is no file .*; that folder has weights.pth")
    refused(model, tmp_path / "no" / "weights.pth", "its folder .* does not exist")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_checkpoint(tmp_path)
    same(load_checkpoint(model, tmp_path), source, torch.zeros(1, 3, 64, 64))  # the only weights in it
    shutil.copy(tmp_path / "weights.pth", tmp_path / "other.pth")
    refused(model, tmp_path, r"has no model.safetensors \(it has other.pth, weights.pth\)")
    (tmp_path / "bare").mkdir()
    refused(model, tmp_path / "bare", "no weight file at all")
    refused(model, f"local-dir:{tmp_path / 'gone'}", "there is no folder")
    os.mkfifo(tmp_path / "pipe.pth")
    refused(model, tmp_path / "pipe.pth", "not a regular file")  # and does not wait for a writer


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TorchScript is on its way out, its files are still around
def test_other_archives(source: nn.Module, model: nn.Module, tmp_path: Path, images: Tensor) -> None:
    import numpy as np

    np.savez(tmp_path / "arrays.npz", a=np.ones(2))
    refused(model, tmp_path / "arrays.npz", "NumPy archive")
    with zipfile.ZipFile(tmp_path / "any.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(model, tmp_path / "any.zip", "zip archive without weights")
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "script.pt")
    refused(model, tmp_path / "script.pt", "TorchScript program")
    torch.save([1, 2], tmp_path / "list.pth")
    refused(model, tmp_path / "list.pth", "holds a list")


def _bomb(path: Path) -> None:
    """A compressed archive that would unpack to 512 MB."""
    torch.save({"a": torch.ones(4)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            if name.endswith("data/0"):
                with archive.open(name, "w", force_zip64=True) as file:
                    for _ in range(32):
                        file.write(bytes(1 << 24))
            else:
                archive.writestr(name, data)


def _overclaim(path: Path) -> None:
    """A pickle that says its four numbers are 2^34 (64 GB)."""
    torch.save({"a": torch.ones(4)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = next(n for n in entries if n.endswith("data.pkl"))
    claim = b"\x8a\x05" + (2**34).to_bytes(5, "little")
    entries[name] = entries[name].replace(b"K\x04", claim)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for key, data in entries.items():
            archive.writestr(key, data)


def in_child(function: Callable[[], str]) -> str:
    """Run in a forked process, whose memory and limits are its own."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=lambda: sender.send(function()))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    return receiver.recv()


@pytest.mark.parametrize("make", [_bomb, _overclaim])
def test_small_files_do_not_fill_the_memory(make, tmp_path: Path) -> None:
    path = tmp_path / "small.pth"
    make(path)
    assert path.stat().st_size < 10_000_000

    def read() -> str:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            read_checkpoint(path)
            message = "read"
        except CheckpointError as error:
            message = str(error)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB
        return message

    message = in_child(read)
    assert "small.pth" in message
    assert "\n" not in message


# ---- saving ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["training", "deploy"])
@pytest.mark.parametrize("create", [zoo.create_model, timm.create_model], ids=["zoo", "timm"])
def test_a_saved_folder_rebuilds_the_model(
    form: str, create, source: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    model = to_deploy(source) if form == "deploy" else source
    names = [f"class {i}" for i in range(7)]
    chosen = {
        "input_size": (3, 32, 48),
        "mean": (0.1, 0.2, 0.3),
        "std": (1.0, 1.0, 1.0),
        "interpolation": "bilinear",
    }
    chosen |= {"crop_pct": 0.9, "crop_mode": "squash"}
    assert save_pretrained(model, tmp_path / "new" / "best", class_names=names, preprocessing=chosen) == (
        tmp_path / "new" / "best"
    )
    again = create(f"local-dir:{tmp_path / 'new' / 'best'}", pretrained=True)
    same(again, model, images)
    assert again.state_dict().keys() == model.state_dict().keys()
    cfg = again.pretrained_cfg
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in cfg.items() if k in chosen} == chosen
    assert list(cfg["label_names"]) == names
    config = json.loads((tmp_path / "new" / "best" / "config.json").read_text())
    assert config["architecture"] == NAME
    assert config["zoo"] == {"version": zoo.__version__, "form": form}
    assert config["sha256"] == {"model.safetensors": sha256_of(tmp_path / "new" / "best" / "model.safetensors")}
    assert sorted(p.name for p in (tmp_path / "new" / "best").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    same(load_checkpoint(build(seed=5), tmp_path / "new" / "best"), model, images)


def test_what_changed_after_building_is_saved(source: nn.Module, images: Tensor, tmp_path: Path) -> None:
    model = build(drop_path_rate=0.1, in_chans=1)
    model.reset_classifier(4, "max")
    save_pretrained(model, tmp_path)
    again = zoo.create_model(f"local-dir:{tmp_path}", pretrained=True)
    same(again, model, images[:, :1])
    assert again.zoo_config["num_classes"] == 4
    assert again.zoo_config["drop_path_rate"] == 0.1
    model.norm = nn.Identity()
    with pytest.raises(CheckpointError, match=r"builds other weights .* norm\."):
        save_pretrained(model, tmp_path)
    same(zoo.create_model(f"local-dir:{tmp_path}", pretrained=True), again, images[:, :1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_precision_memory_order_and_tied_weights_survive(dtype: torch.dtype, tmp_path: Path) -> None:
    model = build().to(dtype).to(memory_format=torch.channels_last)
    model.norm.bias = model.norm.weight
    save_pretrained(nn.DataParallel(model), tmp_path)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_numbers_that_the_model_cannot_hold_are_refused(source: nn.Module, model: nn.Module) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    large = {k: v.double() * 1e300 if v.is_floating_point() else v for k, v in source.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"which the model's torch\.float32 cannot hold"):
        load_checkpoint(model, large)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda x: x.flatten(1).to_sparse(), "of the layout sparse_coo"),
        (lambda x: x.flatten(1).to_sparse_csr(), "of the layout sparse_csr"),
        (lambda x: x.to("meta"), "on the meta device"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "quantised"),
        (lambda x: torch.nested.nested_tensor([x[0], x[1]]), "nested"),
    ],
    ids=["sparse", "csr", "meta", "quantised", "nested"],
)
def test_only_plain_tensors_are_read(change, told: str, source: nn.Module, model: nn.Module, tmp_path: Path) -> None:
    state = source.state_dict()
    name = next(iter(state))
    given = {**state, name: change(state[name].detach())}
    with pytest.raises(CheckpointError, match=f"the state dict: {name} is {told}"):
        load_checkpoint(model, given)
    if told != "nested":  # refused by torch's reader
        torch.save({"epoch": 3, "state_dict": given}, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match=f"a.pt: state_dict.{name} is {told}"):
            load_checkpoint(model, tmp_path / "a.pt")


def test_rounded_weights_are_told(model: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_pretrained(model.half(), tmp_path)
    zoo.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert "rounded" not in caplog.text
    save_pretrained(model.double(), tmp_path)
    zoo.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert "holds float64 weights, rounded to the model's type: dtype=torch.float64 keeps them" in caplog.text
    caplog.clear()
    again = zoo.create_model(f"local-dir:{tmp_path}", pretrained=True, dtype=torch.float64)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert "rounded" not in caplog.text


def test_saving_again_replaces_or_refuses(source: nn.Module, model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    save_pretrained(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors and config\.json already"):
        save_pretrained(source, tmp_path, overwrite=False)
    same(zoo.create_model(f"local-dir:{tmp_path}", pretrained=True), model, images)
    mapped = read_checkpoint(tmp_path / "model.safetensors")  # still open while it is replaced
    save_pretrained(source, tmp_path)
    same(zoo.create_model(f"local-dir:{tmp_path}", pretrained=True), source, images)
    assert torch.equal(mapped["head.weight"], model.head.weight)


def test_saving_says_what_cannot_be_saved(source: nn.Module, tmp_path: Path) -> None:
    for wrong, match in [
        ({"class_names": ["a"]}, "1 names, the model 7 classes"),
        ({"class_names": "abcdefg"}, "is one text; give a list of names"),
        ({"preprocessing": {"meen": 1}}, "unknown entries meen; allowed: .*mean"),
        ({"preprocessing": {"input_size": (1, 28, 28)}}, "1 channels, the model takes 3"),
    ]:
        with pytest.raises(ValueError, match=match):
            save_pretrained(source, tmp_path / "x", **wrong)
    with pytest.raises(CheckpointError, match=r"Linear has no name in the registry.*zoo\.create_model"):
        save_pretrained(nn.Linear(2, 2), tmp_path / "x")
    odd = timm.create_model("resnet18", act_layer=nn.SiLU)
    with pytest.raises(CheckpointError, match=r"act_layer=.*cannot be written"):
        save_pretrained(odd, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_what_is_no_path_or_name_is_told(source: nn.Module) -> None:
    with pytest.raises(CheckpointError, match="is not a path: it holds a NUL character"):
        save_pretrained(source, "a\0b")
    with pytest.raises(OutputError, match="it holds a NUL character"):
        check_output("a\0b")
    for place in (None, 5):
        for call in (
            lambda: load_checkpoint(source, place),  # noqa: B023
            lambda: save_pretrained(source, place),  # noqa: B023
            lambda: zoo.load_estimator(place),  # noqa: B023
            lambda: zoo.load_task(place),  # noqa: B023
            lambda: zoo.load_run(place),  # noqa: B023
        ):
            with pytest.raises((CheckpointError, RunsError), match=f"{place} is not a path: give a text"):
                call()
    with pytest.raises(TypeError, match="model_name = 5 is not a text"):
        zoo.create_model(5)  # type: ignore[arg-type]


def test_saving_and_loading_draw_no_random_numbers(source: nn.Module, tmp_path: Path) -> None:
    merged = zoo.create_model(NAME, num_classes=7, deploy=True)
    before = torch.get_rng_state()
    save_pretrained(source, tmp_path)
    load_checkpoint(merged, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_in_the_middle_of_training_is_loaded_and_saved(
    source: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    model = build(seed=3).train()
    model.last_loss = model(images).sum()  # part of a graph: not copyable
    model.losses = {"aux": model.last_loss * 2}
    load_checkpoint(model, source.state_dict())
    save_pretrained(model, tmp_path)
    assert model.training
    same(zoo.create_model(f"local-dir:{tmp_path}", pretrained=True), source, images)


def test_a_timm_model_is_saved_too(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=3).eval()
    save_pretrained(model, tmp_path)
    x = torch.randn(1, 3, 64, 64)
    same(zoo.create_model(f"local-dir:{tmp_path}", pretrained=True), model, x)


def _full(file: Any) -> None:
    file.write(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_write_atomic(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.bin"
    write_atomic(path, lambda file: file.write(b"first") and None)
    assert path.read_bytes() == b"first"
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    with pytest.raises(CheckpointError, match=r"cannot write .*file.bin: the disk is full"):
        write_atomic(path, _full)
    with pytest.raises(ZeroDivisionError):
        write_atomic(path, lambda file: 1 / 0)  # type: ignore[arg-type, return-value]
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, lambda file: (_ for _ in ()).throw(KeyboardInterrupt))
    assert path.read_bytes() == b"first"
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]


def test_unwritable_places(source: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "deeper", Path("/proc/nowhere")):
        with pytest.raises(CheckpointError, match="cannot write") as caught:
            save_pretrained(source, place)
        assert "\n" not in str(caught.value)
    save_pretrained(source, tmp_path / "good")
    before = {p.name: p.read_bytes() for p in (tmp_path / "good").iterdir()}

    def denied(*args: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "fsync", denied)
    with pytest.raises(CheckpointError, match="permission denied"):
        save_pretrained(build(seed=9), tmp_path / "good")
    assert {p.name: p.read_bytes() for p in (tmp_path / "good").iterdir()} == before


def test_a_full_disk_leaves_the_old_model(source: nn.Module, tmp_path: Path) -> None:
    """The operating system itself refuses to write more than a few kilobytes."""
    save_pretrained(source, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def save() -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            save_pretrained(build(seed=9), tmp_path)
        except CheckpointError as error:
            return str(error)
        return "saved"

    assert in_child(save).endswith("model.safetensors: the file would be larger than the system allows")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_killed_at_any_call_a_folder_has_the_old_model_or_the_new_one(
    source: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, written = build(seed=9), []
    monkeypatch.setattr(zoo.registry.checkpoints, "write_all", written.append)
    for model in (source, other):
        save_pretrained(model, tmp_path)
    monkeypatch.undo()
    expected = [m.state_dict() for m in (source, other)]
    seen = []
    for k in itertools.count():
        (folder := tmp_path / str(k)).mkdir()
        old, new = ({folder / path.name: write for path, write in files.items()} for files in written)
        write_all(old)
        if not killed_at(k, lambda new=new: write_all(new)):  # type: ignore[misc]
            break
        for create in (zoo.create_model, timm.create_model) if k % 8 == 0 else ():
            read = create(f"local-dir:{folder}", pretrained=True).state_dict()
            which = int(all(torch.equal(read[name], expected[1][name]) for name in read))
            same_state(read, expected[which])
            seen.append(which)
    assert seen == sorted(seen)
    assert set(seen) == {0, 1}


def same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_reader_beside_a_writer_gets_one_of_the_two(source: nn.Module, tmp_path: Path) -> None:
    other = build(seed=9)
    expected = [m.state_dict() for m in (source, other)]
    save_pretrained(source, tmp_path, class_names=NAMES[0])

    def act() -> None:
        save_pretrained(other, tmp_path, class_names=NAMES[1])
        save_pretrained(source, tmp_path, class_names=NAMES[0])

    with beside(act):
        for _ in range(6):
            model = zoo.create_model(f"local-dir:{tmp_path}", pretrained=True)
            which = NAMES.index(model.pretrained_cfg["label_names"])
            same_state(model.state_dict(), expected[which])


# ---- hashes ------------------------------------------------------------------------------------------------


def test_a_changed_file_is_noticed_wherever_it_is_loaded(source: nn.Module, model: nn.Module, tmp_path: Path) -> None:
    save_pretrained(source, tmp_path)
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(model, tmp_path, r"not the file on record: its sha256 is \w{12}\.\.\., expected \w{12}")
    with pytest.raises(CheckpointError, match="not the file on record"):
        zoo.create_model(f"local-dir:{tmp_path}", pretrained=True)
    path.rename(tmp_path / "renamed.safetensors")
    refused(model, tmp_path, r"has no model.safetensors \(it has renamed.safetensors\)")


def test_known_names_are_compared_with_their_record(
    source: nn.Module, model: nn.Module, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(source.state_dict(), tmp_path / "known.pth")
    monkeypatch.setitem(RECORDS, "known.pth", {"sha256": "0" * 64})
    refused(model, tmp_path / "known.pth", "not the file on record.*rename it")
    monkeypatch.setitem(RECORDS, "known.pth", {"sha256": sha256_of(tmp_path / "known.pth").upper()})
    same(load_checkpoint(model, tmp_path / "known.pth"), source, images)


def test_the_authors_files_are_on_record() -> None:
    zoo.list_models()
    record = RECORDS["unireplknet_a_in1k_224_acc77.03.pth"]
    assert record["sha256"].startswith("a0ef11d8514590413a11493850e4882bb2c15c4c0203f97481158c7c58d76128")
    assert record["model"] == "unireplknet_a.in1k"
    assert all(len(r["sha256"]) == 64 for r in RECORDS.values())


# ---- folders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: "{", "not valid JSON"),
        (lambda c: "[]", "names no architecture"),
        (
            lambda c: json.dumps({**c, "architecture": "unireplknet_zz"}),
            "'unireplknet_zz', which is not registered",
        ),
        (
            lambda c: json.dumps({**c, "pretrained_cfg": {**c["pretrained_cfg"], "bogus": 1}}),
            "does not know: bogus",
        ),
        (lambda c: json.dumps({**c, "model_args": [1]}), "model_args must be an object"),
        (lambda c: json.dumps({**c, "model_args": {"bogus": 1}}), "no argument 'bogus'"),
        (lambda c: "[" * 100_000, "not valid JSON"),
        (lambda c: json.dumps({**c, "sha256": {"model.safetensors": ""}}), "must be 64 hexadecimal digits"),
        (lambda c: json.dumps({**c, "sha256": {"model.safetensors": 5}}), "must be 64 hexadecimal digits"),
    ],
)
def test_damaged_configurations(change, message: str, source: nn.Module, tmp_path: Path) -> None:
    save_pretrained(source, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(CheckpointError, match=message):
        zoo.create_model(f"local-dir:{tmp_path}", pretrained=True)


# ---- without a network -------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No connection, and an empty cache in a place of its own."""

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return cache_folder()


def test_an_address_that_cannot_be_reached(source: nn.Module, model: nn.Module, images: Tensor, offline: Path) -> None:
    url = "https://example.org/weights/best.pth?download=1"
    message = refused(model, url, r"cannot download https://example.org/.* place it at .*-best\.pth")
    place = Path(message.rsplit(" place it at ", 1)[1])
    assert place.parent == offline
    torch.save(source.state_dict(), place)
    same(load_checkpoint(model, url), source, images)
    refused(model, "https://elsewhere.org/best.pth", "cannot download")  # the same name, another file
    refused(model, "http://example.org/best.pth", "https addresses")
    refused(model, "ftp://example.org/best.pth", "https addresses")
    refused(model, "https://example.org/", "https addresses")


def test_an_address_that_names_its_hash(source: nn.Module, model: nn.Module, offline: Path, monkeypatch) -> None:
    def download(url: str, target: str, **kwargs: Any) -> None:
        torch.save(source.state_dict(), target)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    refused(model, "https://example.org/best-0123456789.pth", r"not the file on record.*remove .* first")
    load_checkpoint(model, "https://example.org/best.pth")


def test_released_weights_that_cannot_be_reached(source: nn.Module, offline: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"no connection.*place it at .*unireplknet_a_in1k_224_acc77.03.pth"
    ) as caught:
        zoo.create_model("unireplknet_a", pretrained=True)
    place = Path(str(caught.value).rsplit(" place it at ", 1)[1])
    torch.save(source.state_dict(), place.parent.mkdir(parents=True) or place)
    with pytest.raises(CheckpointError, match="not the file on record"):
        zoo.create_model("unireplknet_a", pretrained=True)


def test_the_hub_is_tried_once(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    tried: list[Any] = []

    def unreachable(url: str, timeout: float | None = None, **kwargs: Any) -> None:
        tried.append(timeout)
        raise ConnectionError("no route to host")

    def cached(*args: Any, local_files_only: bool = False, **kwargs: Any) -> None:
        assert local_files_only
        raise huggingface_hub.errors.LocalEntryNotFoundError("nothing in the cache")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", cached)
    with pytest.raises(CheckpointError, match="no connection, and it is not in the cache"):
        zoo.create_model("unireplknet_a", pretrained=True)
    assert len(tried) == 1
    assert tried[0] <= 10
    with pytest.raises(CheckpointError, match=r"cannot fetch config\.json of hf-hub:somebody/something"):
        zoo.create_model("hf-hub:somebody/something", pretrained=True)
    assert len(tried) <= 3


def test_a_hub_name_that_cannot_be_reached(model: nn.Module, offline: Path) -> None:
    refused(model, "hf-hub:somebody/something", "cannot download model.safetensors of hf-hub:somebody/something")
    refused(model, "hf-hub:something", "hf-hub:<organisation>/<name>")
    with pytest.raises(CheckpointError, match="local-dir"):
        zoo.create_model("hf-hub:somebody/something", pretrained=True)


def test_a_hub_repository(source: nn.Module, model: nn.Module, images: Tensor, tmp_path: Path, monkeypatch) -> None:
    """The layout of `save_pretrained` is the hub's: such a repository loads, hash and all."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError
    from timm.models import _hub

    save_pretrained(source, tmp_path / "repository")

    def download(repository: str, filename: str, revision: str | None = None, **kwargs: Any) -> str:
        assert (repository, revision) == ("somebody/something", "v1")
        if not (tmp_path / "repository" / filename).exists():
            raise EntryNotFoundError(filename)
        return str(tmp_path / "repository" / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(_hub, "hf_hub_download", download)
    same(load_checkpoint(model, "hf-hub:somebody/something@v1"), source, images)
    same(zoo.create_model("hf-hub:somebody/something@v1", pretrained=True), source, images)
    path = tmp_path / "repository" / "model.safetensors"
    safetensors.torch.save_file(build(seed=8).state_dict(), path)
    refused(model, "hf-hub:somebody/something@v1", "not the file on record")
    path.rename(path.with_name("unusual.safetensors"))
    refused(model, "hf-hub:somebody/something@v1", "has no file model.safetensors or")
    refused(model, "hf-hub:somebody/something@v1", "hf-hub:somebody/something@v1/<file>")
    load_checkpoint(model, "hf-hub:somebody/something@v1/unusual.safetensors")
    refused(model, "hf-hub:somebody/something@v1/absent.pth", "has no file absent.pth")
