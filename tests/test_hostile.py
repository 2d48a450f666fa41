"""Files and folders of someone who means harm, at every door: nothing runs, connects or reaches outside its folder.

What a payload would do is watched from inside the interpreter: starting a program, looking up an address, importing a
module that lies beside the file, and touching anything outside the hostile folder, whose neighbours are traps. The
answer is a right result or one sentence.
"""

from __future__ import annotations

import builtins
import copy
import functools
import importlib
import importlib.util
import inspect
import io
import json
import os
import pickle
import re
import runpy
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from torch import nn

import zoo
from tests.conftest import train_here
from zoo.cli import main
from zoo.data import AudioFolder, Forecast, ImageFolder, Mnist5k, PointMnist, SpokenDigits, VideoFolder
from zoo.data.frames import read_frame
from zoo.data.tabular import Tabular
from zoo.results.runs import read_run, tabulate
from zoo.support.files import locate, offline
from zoo.tools import evaluation, export, info, prediction, release, report
from zoo.tools.comparison import compare
from zoo.training.checkpointing import find_resumable
from zoo.training.launch import find_run

NAME, CLASSES = "test_grbf", 3


# ---- the watch ---------------------------------------------------------------------------------------------


class Watch:
    """Notes what no file may cause, and the files that are opened, while it is on."""

    FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty")
    FORBIDDEN += ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request", "ftplib.connect")
    FORBIDDEN += ("smtplib.connect", "webbrowser.open", "pty.spawn")
    TOUCHED = ("open", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "shutil.rmtree")

    def __init__(self) -> None:
        self.on, self.root, self.inside = False, "", ""
        self.seen: list[str] = []

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in self.FORBIDDEN:
            self.seen.append(f"{event}{arguments[:2]}")
        elif event in self.TOUCHED and isinstance(place := arguments[event == "os.symlink"], str | bytes | Path):
            inside = (
                arguments[-1] if event != "open" and isinstance(arguments[-1], int) and arguments[-1] >= 0 else None
            )
            base = "" if inside is None else os.readlink(f"/proc/self/fd/{inside}")
            path = os.path.realpath(os.path.join(base, os.fsdecode(place)))
            if path.startswith(self.root) and not f"{path}/".startswith(self.inside):
                self.seen.append(f"{event} {path}")
        elif event == "import" and str(arguments[0]).startswith("payload"):
            self.seen.append(f"imported {arguments[0]}")


_watch = Watch()
sys.addaudithook(_watch.hook)


class Trap:
    """A hostile folder in a larger one, whose other files nobody may open, and the file that a payload would make."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder, self.canary = root, root / "hostile", root / "canary"
        self.folder.mkdir()
        (root / "secret").mkdir()
        torch.save(network().state_dict(), root / "secret" / "weights.pth")
        zoo.save_pretrained(network(), root / "secret" / "model")
        (root / "secret" / "config.yaml").write_text("task: {_target_: os.system}\n")
        code = f"open({str(self.canary)!r}, 'w').close()\ndef Task(*a, **k): open({str(self.canary)!r}, 'w').close()\n"
        for place in (root, self.folder):
            (place / "payload.py").write_text(code)
            (place / "hubconf.py").write_text(code)
        _watch.root, _watch.inside = f"{root}/", f"{self.folder}/"

    def refused(self, door: Callable[[], object], what: object, right: bool = False) -> str:
        """Pass a door: one sentence of the zoo's, or (where `right`) any result; and nothing else happens."""
        count, error = len(_watch.seen), None
        _watch.on = True
        try:
            with warnings.catch_warnings(action="ignore"):
                door()
        except Exception as raised:
            error = raised
        finally:
            _watch.on = False
        told = "" if error is None else str(error)
        if error is not None:
            assert type(error).__module__.startswith("zoo."), f"{type(error).__name__}: {told:.300} on {what!r:.300}"
            assert "\n" not in told, f"{told!r} on {what!r:.200}"
            assert 15 < len(told) < 1200, f"{told!r} on {what!r:.200}"
        assert _watch.seen[count:] == [], f"{what!r:.300}"
        assert not self.canary.exists(), f"{what!r:.300}"
        assert right or told, f"{what!r:.300} was accepted"
        return told

    def resume(self, *arguments: str, right: bool = False) -> str:
        """Resume the run in the folder, as the command line does."""

        class Told(Exception):
            pass

        Told.__module__ = "zoo.told"

        def door() -> None:
            done = train_here(self.root, "resume=hostile", *arguments, check=False)
            if done.returncode:
                assert "Traceback" not in done.stderr
                raise Told(done.stderr.strip().splitlines()[-1].removeprefix("error: "))

        return self.refused(door, arguments or (self.folder / ".hydra" / "overrides.yaml").read_bytes(), right)


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Trap]:
    yield Trap(tmp_path)
    _watch.on = False


def network() -> nn.Module:
    torch.manual_seed(0)
    return zoo.create_model(NAME, num_classes=CLASSES, in_chans=5)


def test_the_watch_sees_what_it_should(trap: Trap) -> None:
    import socket

    def attacks() -> Iterator[Callable[[], object]]:
        yield lambda: os.system("true")
        yield lambda: subprocess.run(["true"], check=False)
        yield lambda: (trap.root / "secret" / "config.yaml").read_text()
        yield lambda: socket.getaddrinfo("127.0.0.1", 9)
        yield lambda: trap.canary.touch()

    for attack in attacks():
        with pytest.raises(AssertionError):
            trap.refused(attack, "an attack", right=True)
        trap.canary.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has ended, as small as it can be."""
    folder = tmp_path_factory.mktemp("finished")
    quick = ("experiment=grbf_wine", "model=test_grbf", "trainer.max_epochs=1", "logger=csv")
    train_here(folder, *quick, "callbacks.explanations=null", "hydra.run.dir=run")
    return folder / "run"


@pytest.fixture
def run(trap: Trap, finished: Path) -> Path:
    return shutil.copytree(finished, trap.folder, dirs_exist_ok=True)


# ---- run folders ---------------------------------------------------------------------------------------------

#: Functions that would run code, read pickles, open addresses or delete, and classes where others belong.
FOREIGN = (
    "torch.hub.load", "torch.hub.load_state_dict_from_url", "torch.load", "torch.package.PackageImporter", "os.system",
    "os.popen", "posix.system", "subprocess.run", "subprocess.Popen", "builtins.eval", "builtins.exec",
    "builtins.__import__", "importlib.import_module", "runpy.run_path", "functools.partial",
    "operator.methodcaller", "pickle.loads", "numpy.load", "joblib.load", "pandas.read_pickle", "shutil.rmtree",
    "pathlib.Path.touch", "pty.spawn", "timeit.timeit", "webbrowser.open", "pydoc.locate", "hydra.utils.instantiate",
    "hydra.utils.get_method",
    "payload.Task", "hubconf.Task", "zoo.cli.main", "zoo.create_model", "zoo.data.sources.subprocess.run",
    "zoo.data.frames.pickle.loads", "zoo.tasks.base.torch.hub.load", "zoo.training.build.hydra.utils.instantiate",
    "zoo.support.files.write_atomic", "lightning.pytorch.cli.LightningCLI", "lightning.pytorch.loggers.MLFlowLogger",
    "lightning.pytorch.callbacks.model_checkpoint.os.remove", "lightning", "zoo", "", "a b", "__main__.x", "..",
)  # fmt: skip
PLACES = (
    "task._target_={}",
    "data._target_={}",
    "trainer._target_={}",
    "callbacks.best._target_={}",
    "++callbacks.best._target_={}",
    "+callbacks.x={{_target_:{},command:'touch canary'}}",
    "+logger.x={{_target_:{},_args_:['payload.py']}}",
    "+trainer.strategy={{_target_:{}}}",
    "+trainer.profiler={{_target_:{}}}",
    "+model.norm_layer={{_target_:{}}}",
    "+model.backbone_args={{deep:[[{{_target_:{}}}]]}}",
    "+data.nested={{a:{{b:[1,{{_target_:{},_partial_:true}}]}}}}",
    "+optimizer.kwargs={{x:{{_target_:{}}}}}",
    "+anything={{_target_:{}}}",
)

#: Overrides that reach for Hydra, other places, addresses or the environment.
REACHING = (
    "hydra.searchpath=[file:///tmp]", "hydra.run.dir=/tmp/x", "hydra/launcher=joblib", "hydra.job.chdir=true",
    "+hydra.callbacks.x={_target_:os.system}", "hydra.output_subdir=..", "--config-dir=/tmp", "--config-path=/tmp",
    "-cd", "--multirun", "-m", "--help", "--info", "experiment=../../../secret/config", "experiment=/tmp/evil",
    "model=..", "model='../../secret/config'", "+experiment@task=digits", "callbacks@task=default", "+../x=1",
    "task.class_names=${oc.env:HOME}", "name=${oc.env:HOME}", "name='${oc.env:HOME}'", "name=${hydra:runtime.cwd}",
    "name=${oc.decode:x}", "seed=${oc.create:{}}", "name=${now:%Y}", "name=${a.${oc.env:HOME}}",
    "data.x=${oc.select:x}",
    "callbacks.best.folder=/etc", "callbacks.best.folder=~/x", "callbacks.best.folder=../secret",
    "callbacks.best.folder='${output_dir}/../../secret'", "callbacks.resume.folder=secret",
    "logger.csv.save_dir=secret",
    "logger.csv.name=../../secret", "output_dir=/tmp/x", "output_dir=secret", "+trainer.default_root_dir=/tmp/x",
    "+logger.wandb.settings={api_key:'0'}", "+logger.wandb.settings.api_key=x", "+logger.wandb.settings={base_url:x}", "+logger.x.tracking_uri='http://evil.example'",
    "model.model_name=hf-hub:a/b", "model.model_name='https://evil.example/x'", "+model.backbone=hf-hub:a/b",
    "task._partial_=true", "task._args_=[1]", "task._recursive_=false", "task._convert_=all", "+data._args_=[x]",
    "seed=1,2,3", "seed=range(9)", "seed=glob(*)", "seed=choice(1,2)", "seed=shuffle(1,2)", "a=b=c", "=", "", "x",
    "seed",
    "\x00=1", "seed=\ud7ff$", "{a:1}", "[1]", "seed=[", "seed={", "seed=(", "a" * 5000,
)  # fmt: skip

OVERRIDES_FILES: tuple[bytes, ...] = (
    b"", b"null", b"3", b"text", b"{a: 1}", b"[1, 2]", b"[[seed=1]]", b"[null]", b"[{seed: 1}]", b"[", b"\x00",
    b"\xff\xfe",
    b"!!python/object/apply:os.system ['touch canary']", b"- !!python/name:os.system", b"[&a seed=1, *a]",
    b"a: &a [x]\nb: &b [*a, *a, *a]\n", b"[" * 20_000, b"- " * 20_000, b"- seed=1\n" * 200_000, b"%YAML 9.9\n---\n[]",
    b"!!set {seed=1}", b"- !x seed=1", b"- seed=1\n--- \n- seed=2",
)  # fmt: skip


def run_folder(folder: Path, overrides: list[str]) -> None:
    (folder / ".hydra").mkdir(exist_ok=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))


def test_recorded_overrides_name_no_code(trap: Trap) -> None:
    count = 0
    for i, target in enumerate(FOREIGN):
        for j, place in enumerate(PLACES):
            if (i + j) % 2 and i > 3:  # every target at half of the places, every place with half of the targets
                continue
            run_folder(trap.folder, ["experiment=digits", place.format(target)])
            told = trap.resume()
            assert "override" in told or "overrides.yaml" in told
            count += 1
    assert count > 300


def test_recorded_overrides_reach_nowhere(trap: Trap) -> None:
    for override in REACHING:
        run_folder(trap.folder, ["experiment=digits", override])
        trap.resume()
    for content in OVERRIDES_FILES:
        (trap.folder / ".hydra" / "overrides.yaml").write_bytes(content)
        told = trap.resume()
        assert "overrides.yaml" in told or "checkpoints" in told  # an empty list of overrides is one


FETCHING = (
    ["model=unireplknet_z", "data=mnist", "data.root=d"],
    ["experiment=digits", "data=cifar10", "data.root=d", "data.download=true"],
    ["experiment=mnist5k", "data.root=d"],
    ["experiment=food_reviews_snnk", "data.root=d"],
)


def test_a_resumed_run_fetches_nothing(trap: Trap, run: Path) -> None:
    there = sorted(path for path in trap.root.rglob("*") if path.is_dir())
    for overrides in FETCHING:
        run_folder(trap.folder, overrides)
        told = trap.resume("logger=csv", "data.cache=d")
        assert "a resumed run fetches nothing: start the same experiment once without resume=" in told, overrides
    assert sorted(path for path in trap.root.rglob("*") if path.is_dir()) == there


def test_every_door_is_shut_while_nothing_may_be_fetched(trap: Trap, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)  # no eSpeak installed
    empty = trap.folder / "empty"
    monkeypatch.setattr(zoo.data.sources, "DEBIAN_FASHION_MNIST", empty)
    modules = [getattr(zoo.data, name) for name in zoo.data.__all__]
    fetching = [
        module
        for module in modules
        if inspect.isclass(module) and {"cache", "download"} <= inspect.signature(module.__init__).parameters.keys()
    ]
    (trap.folder / "texts.csv").write_text("text,class\n" + "tea,good\nale,bad\n" * 2)
    own = {"path": str(trap.folder / "texts.csv"), "text": "text", "target": "class"}
    asked: dict[str, dict[str, str]] = {"Forecast": {"name": "chicago"}, "TextFolder": own}
    assert len(fetching) > 8
    shut = "there is no network here"
    for module in fetching:
        given = asked.get(module.__name__, {})

        def door(module: Any = module, given: dict[str, str] = given) -> None:
            with offline(shut):
                data = module(cache=str(empty), **given)
                data.prepare_data()

        assert shut in trap.refused(door, module)
    monkeypatch.setenv("TORCH_HOME", str(empty))
    for source in ("https://evil.example/x.pth", "hf-hub:no-such/model-at-all"):

        def fetch(source: str = source) -> None:
            with offline(shut):
                locate(source)

        assert shut in trap.refused(fetch, source)
    assert not empty.exists()


def test_what_a_person_types_is_trusted(trap: Trap, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same override, recorded: refused with the way to allow it; typed again: it is the user's own."""
    (trap.root / "own_parts.py").write_text(
        "from lightning.pytorch.callbacks import Callback\n\n\nclass Mine(Callback):\n"
        "    def on_fit_start(self, trainer, task):\n        raise KeyboardInterrupt\n"
    )
    monkeypatch.syspath_prepend(trap.root)
    own = "+callbacks.mine={_target_:own_parts.Mine}"
    recorded = yaml.safe_load((run / ".hydra" / "overrides.yaml").read_text())
    run_folder(trap.folder, [*recorded, own])
    told = trap.resume("trainer.max_epochs=2")
    assert "own_parts.Mine" in told
    assert "type the override again" in told
    assert "own_parts" not in sys.modules
    train_here(trap.root, "resume=hostile", "trainer.max_epochs=2", own, check=False)
    assert "own_parts" in sys.modules


def test_a_run_of_ones_own_goes_on(trap: Trap, run: Path) -> None:
    """What the zoo's own command lines record is allowed, and nothing outside the folder is touched."""
    recorded = yaml.safe_load((run / ".hydra" / "overrides.yaml").read_text())
    stop = "{_target_:lightning.pytorch.callbacks.EarlyStopping,monitor:val/loss}"
    own = [
        f"+callbacks.early={stop}",
        "scheduler.warmup_epochs=0",
        "model.checkpoint_path='https://evil.example/x.pth'",
    ]
    own += ["name=${data.name}", "callbacks.best.folder=${output_dir}/checkpoints", "~callbacks.throughput"]
    run_folder(trap.folder, [*recorded, *own])
    assert trap.resume("trainer.max_epochs=2", right=True) == ""
    assert json.loads((run / "summary.json").read_text())["metrics"]


# ---- model folders ---------------------------------------------------------------------------------------------


def nested(config: dict[str, Any], depth: int, **arguments: Any) -> dict[str, Any]:
    """Arguments of the backbone at some depth of backbones that are models with a backbone."""
    found = copy.deepcopy(config)
    place = found["model_args"]
    for _ in range(depth):
        place["backbone"] = "test_unireplknet_audio"
        place["backbone_args"] = {}
        place = place["backbone_args"]
    place["backbone"], place["backbone_args"] = "test_unireplknet", arguments
    return found


def hostile_models(config: dict[str, Any], root: Path) -> Iterator[tuple[dict[str, Any] | bytes, bool]]:
    """Configurations that reach outside (which may be built without what they reach for), or are none."""
    secret = str(root / "secret" / "weights.pth")
    reaching: list[dict[str, Any]] = [
        {"pretrained": True, "pretrained_cfg": {"url": "https://evil.example/x.pth"}},
        {"pretrained": True, "pretrained_cfg": {"url": f"file://{secret}"}},
        {"pretrained": True, "pretrained_cfg": {"file": secret}},
        {"pretrained": True, "pretrained_cfg": {"hf_hub_id": "a/b"}},
        {"pretrained": True, "pretrained_cfg": {"hf_hub_id": "a/b", "hf_hub_filename": "x.bin"}},
        {"pretrained": True, "pretrained_cfg": {"source": "local-dir", "file": str(root / "secret" / "model")}},
        {"pretrained": True, "pretrained_cfg": {"source": "hf-hub", "hf_hub_id": "a/b"}},
        {"pretrained": True, "pretrained_cfg": {"file": secret, "custom_load": True}},
        {"pretrained": True, "pretrained_cfg_overlay": {"url": "https://evil.example/x.pth"}},
        {"pretrained": True, "pretrained_cfg_overlay": {"file": secret}},
        {"pretrained": True, "cache_dir": str(root / "secret")},
        {"checkpoint_path": secret},
        {"checkpoint_path": "https://evil.example/x.pth"},
    ]
    for i, arguments in enumerate(reaching):
        for depth in (0, 1, 2) if i % 6 == 0 else (1,):
            yield nested(config, depth, **arguments), True
    for place in (
        "hf-hub:a/b",
        "hf_hub:a/b",
        "HF-HUB:a/b",
        f"local-dir:{root}/secret/model",
        "../secret",
        secret,
        3,
        ["x"],
    ):
        found = nested(config, 0)
        found["model_args"]["backbone"] = place
        yield found, False
    for key, value in {
        "checkpoint_path": secret,
        "pretrained": True,
        "pretrained_cfg": {"file": secret},
        "pretrained_cfg_overlay": {"file": secret},
        "cache_dir": "/tmp",
        "no_such": 1,
        "backbone": {"_target_": "os.system"},
        "sample_rate": "fast",
        "num_frames": -3,
        "num_mel_bins": [1],
        "num_classes": None,
        "in_chans": {},
        "device": "tpu:9",
        "dtype": "object",
        "features_only": "yes",
        "feature_cls": "os.system",
    }.items():
        yield {**config, "model_args": {**config["model_args"], key: value}}, value is None
    for key, value in {
        "url": "https://evil.example/x.pth",
        "file": secret,
        "hf_hub_id": "a/b",
        "source": "hf-hub",
        "state_dict": {"a": 1},
        "custom_load": True,
        "input_size": "large",
        "mean": "x",
        "std": [None],
        "crop_pct": 1e-9,
        "interpolation": "os.system",
        "crop_mode": 3,
        "num_classes": [7],
        "label_names": 3,
        "label_descriptions": [1],
        "first_conv": 3,
        "classifier": {},
        "notes": {"a": 1},
        "pool_size": "x",
        "input_size ": [1],
    }.items():
        fine = key in ("url", "file", "hf_hub_id", "source", "state_dict", "custom_load")
        yield {**config, "pretrained_cfg": {**config["pretrained_cfg"], key: value}}, fine
    for key in ("architecture", "num_classes", "num_features", "label_names", "model_args", "pretrained_cfg", "sha256"):
        for value in ([1], {"a": {"b": [1]}}, 3.5, "os.system", True):
            yield {**config, key: value}, False
    for name in (
        "../../secret",
        "unireplknet_a.nope",
        "resnet18;rm",
        "torch.hub.load",
        "x" * 10_000,
        "\x00",
        "nn.Module",
    ):
        yield {**config, "architecture": name}, False
    for name in ("../secret/weights.pth", "/etc/hostname", "model.safetensors\x00", ""):
        yield {**config, "sha256": {name: "0" * 64}}, False
    for content in (b"", b"[" * 50_000, b"\xff\xfe", b"nan", b'{"architecture": 1e999}', b"1" * 6000, b"{" * 9000):
        yield content, False


def test_model_folders_are_closed(trap: Trap) -> None:
    torch.manual_seed(0)
    zoo.save_pretrained(zoo.create_model("test_unireplknet_audio", num_classes=CLASSES), trap.folder)
    path = trap.folder / "config.json"
    config = json.loads(path.read_text())
    doors: list[Callable[[], object]] = [
        lambda: zoo.create_model(f"local-dir:{trap.folder}", pretrained=True),
        lambda: zoo.create_model(f"local-dir:{trap.folder}"),
        lambda: info.describe(f"local-dir:{trap.folder}"),
        lambda: prediction.predict(f"local-dir:{trap.folder}", [trap.folder / "no.wav"]),
        lambda: export.export(f"local-dir:{trap.folder}", trap.folder / "out", ("onnx",)),
        lambda: zoo.load_checkpoint(zoo.create_model("test_unireplknet_audio", num_classes=CLASSES), trap.folder),
    ]
    cases = list(hostile_models(config, trap.root))
    assert len(cases) > 100
    for i, (content, right) in enumerate(cases):
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        trap.refused(doors[i % 2] if right else doors[0], content, right)
        if not right and i % 6 == 0:  # the other doors lead to the same room
            trap.refused(doors[1 + i // 6 % 3], content, right)
    path.write_bytes(b"{}")
    for door in doors[:-1]:
        trap.refused(door, "an empty configuration")
    if hasattr(os, "mkfifo"):
        path.unlink()
        os.mkfifo(path)
        trap.refused(doors[0], "a pipe")


def test_nested_models_of_a_folder_are_closed_for_timm_too(trap: Trap) -> None:
    zoo.save_pretrained(zoo.create_model("test_unireplknet_audio", num_classes=CLASSES), trap.folder)
    config = json.loads((trap.folder / "config.json").read_text())
    content = nested(config, 1, pretrained=True, pretrained_cfg={"url": "https://evil.example/x.pth"})
    (trap.folder / "config.json").write_text(json.dumps(content))
    trap.refused(lambda: timm.create_model(f"local-dir:{trap.folder}"), content, right=True)


def test_links_lead_nowhere(trap: Trap) -> None:
    zoo.save_pretrained(network(), trap.folder)
    for name in ("model.safetensors", "config.json"):
        kept = (trap.folder / name).read_bytes()
        (trap.folder / name).unlink()
        (trap.folder / name).symlink_to(trap.root / "secret" / "model" / name)
        for door in (zoo.create_model, timm.create_model):
            told = trap.refused(lambda door=door: door(f"local-dir:{trap.folder}", pretrained=True), f"a link {name}")
            assert "outside" in told
        (trap.folder / name).unlink()
        (trap.folder / name).write_bytes(kept)
    zoo.create_model(f"local-dir:{trap.folder}", pretrained=True)


def test_a_flipped_bit_is_noticed_at_every_door(trap: Trap) -> None:
    weights = zoo.save_pretrained(network(), trap.folder) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 4
    weights.write_bytes(bytes(data))
    folder, same = f"local-dir:{trap.folder}", {"num_classes": CLASSES, "in_chans": 5}
    for door in (
        lambda: zoo.create_model(folder, pretrained=True),
        lambda: timm.create_model(folder, pretrained=True),
        lambda: zoo.create_model(NAME, checkpoint_path=weights, **same),
        lambda: timm.create_model(NAME, checkpoint_path=weights, **same),
        lambda: zoo.load_checkpoint(network(), weights),
        lambda: zoo.load_checkpoint(network(), trap.folder),
    ):
        assert "not the file on record" in trap.refused(door, "a flipped bit")


# ---- weights ---------------------------------------------------------------------------------------------------


class Gadget:
    """A pickle that calls a function when it is read."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def gadgets(trap: Trap) -> Iterator[Gadget]:
    code, shell = f"open({str(trap.canary)!r}, 'w').close()", f"touch {trap.canary}"
    inner = trap.folder / "inner.npy"
    np.save(inner, np.array([Gadget(os.system, shell)], object), allow_pickle=True)
    torch.save(Gadget(os.system, shell), trap.folder / "inner.pt")
    yield from (Gadget(os.system, shell), Gadget(os.popen, shell), Gadget(builtins.eval, code), Gadget(exec, code))
    yield from (Gadget(subprocess.run, shell), Gadget(subprocess.Popen, ["touch", str(trap.canary)]))
    yield from (Gadget(__import__, "payload"), Gadget(importlib.import_module, "payload"))
    yield from (Gadget(runpy.run_path, str(trap.folder / "payload.py")), Gadget(functools.partial, exec, code))
    yield from (Gadget(torch.hub.load, str(trap.folder), "Task", "local"), Gadget(Path.touch, trap.canary))
    yield Gadget(torch.hub.load_state_dict_from_url, "https://evil.example/x.pth")
    yield from (Gadget(np.load, str(inner), None, True), Gadget(torch.load, str(trap.folder / "inner.pt")))
    yield from (Gadget(shutil.rmtree, str(trap.root / "secret")), Gadget(os.remove, str(trap.root / "payload.py")))
    yield from (Gadget(open, str(trap.canary), "w"), Gadget(getattr, os.system, "__call__"), Gadget(map, exec, [code]))
    yield from (Gadget(pickle.loads, b"."), Gadget(nn.Linear, 2, 2), Gadget(zoo.create_model, "hf-hub:a/b"))


def wrapped(payload: Any) -> Iterator[bytes]:
    """A payload in every form in which weights are written."""
    state = {
        "state_dict": {"a.weight": torch.ones(2), "x": payload},
        "hyper_parameters": payload,
        "zoo": {"task": "Task"},
    }
    for legacy in (False, True):
        stream = io.BytesIO()
        torch.save(state, stream, _use_new_zipfile_serialization=not legacy)
        yield stream.getvalue()
    yield pickle.dumps(payload, 2)
    yield pickle.dumps({"model": [payload]}, 4)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps(payload))
        archive.writestr("x/version", "3\n")
    yield stream.getvalue()


def bombs() -> Iterator[bytes]:
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", method) as archive:
            archive.writestr("x/data.pkl", b"\0" * 20_000_000)
        yield stream.getvalue()
    header = {f"t{i}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i in range(30_000)}
    text = json.dumps(header).encode()
    yield struct.pack("<Q", len(text)) + text + b"\0" * 4 * len(header)
    for shape, offsets in (([2**40], [0, 4]), ([1], [0, 2**50]), ([-1], [0, 4]), ("x", [0, 4]), ([1.5], [0, 4])):
        text = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
        yield struct.pack("<Q", len(text)) + text + b"\0" * 4
    for length in (0, 3, 2**31, 2**63, 10**8):
        yield struct.pack("<Q", length) + b"{}" + b" " * 60
    text = b'{"a":' * 3000
    yield struct.pack("<Q", len(text)) + text
    yield b"\x80\x04" + b"]" * 50_000
    yield b"\x80\x04\x8e" + struct.pack("<Q", 2**62)


def test_weight_files_run_nothing(trap: Trap) -> None:
    own = network()
    before = {k: v.clone() for k, v in own.state_dict().items()}
    run = trap.folder / "checkpoints"
    run.mkdir()
    (trap.folder / "state").mkdir()
    files = [content for gadget in gadgets(trap) for content in wrapped(gadget)] + list(bombs())
    assert len(files) > 120
    for i, content in enumerate(files):
        path = run / f"step={i:08}.ckpt"
        path.write_bytes(content)
        doors: list[Callable[[], object]] = [
            lambda path=path: zoo.load_checkpoint(own, path),
            lambda path=path: zoo.load_task(path),
            lambda path=path: zoo.create_model(NAME, num_classes=CLASSES, in_chans=5, checkpoint_path=path),
            lambda path=path: zoo.load_checkpoint(own, path, strict=False),
        ]
        trap.refused(doors[i % 4], content[:80])
        if i % 5 == 0:
            run_folder(trap.folder, ["experiment=digits", "logger=none"])
            with pytest.raises(zoo.CheckpointError):
                find_resumable(trap.folder)
        path.unlink()
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())


def test_a_state_that_a_run_cannot_continue_from(trap: Trap, run: Path) -> None:
    """Checkpoints of plain values, wrong ones, through `resume=` and `load_task`."""
    newest = sorted((trap.folder / "checkpoints").glob("step=*.ckpt"))[-1]
    for other in (trap.folder / "checkpoints").glob("*.ckpt"):
        if other != newest:
            other.unlink()
    whole = torch.load(newest, weights_only=True)
    assert whole["zoo"]["run"]["seed"] == 0
    spec = whole["hyper_parameters"]["model"]
    changes: list[dict[str, Any]] = [
        {"hyper_parameters": {**whole["hyper_parameters"], "model": {**spec, "model_name": name}}}
        for name in ("hf-hub:a/b", f"local-dir:{trap.root}/secret/model", "nope", 3, None, ["x"])
    ]
    changes += [{"hyper_parameters": value} for value in (3, None, [], {"model": 3}, {"model": {"model_name": NAME}})]
    changes += [{"hyper_parameters": {**whole["hyper_parameters"], "surprise": 1}}]
    changes += [{"zoo": value} for value in (3, [], {"task": ["Task"]}, {"task": "os.system"}, {"task": 3}, None)]
    changes += [{"state_dict": value} for value in (3, [], {}, {"model.x": torch.ones(2)}, None)]
    for change in changes:
        torch.save({**whole, **change}, newest)
        trap.refused(lambda: zoo.load_task(newest), change)
    for key, value in {
        "state_dict": {"model.x": torch.ones(2)},
        "loops": {"fit_loop": 3},
        "random_states": [7],
    }.items():
        torch.save({**whole, key: value}, newest)
        told = trap.resume("trainer.max_epochs=2")
        assert newest.name in told or "state" in told, key


def test_weights_that_are_not_numbers_are_told(trap: Trap) -> None:
    model = network()
    name = next(n for n, p in model.named_parameters() if p.ndim == 2)
    with torch.no_grad():
        model.get_parameter(name)[0, 0] = torch.nan
    folder = zoo.save_pretrained(model, trap.folder)
    for door in (
        lambda: zoo.create_model(f"local-dir:{folder}", pretrained=True),
        lambda: zoo.load_checkpoint(network(), folder / "model.safetensors"),
    ):
        with pytest.warns(RuntimeWarning, match=f"{name} holds NaN"):
            door()
    for path in ("a\0b", "hf-hub:a/b\0", "local-dir:a\0b", "https://x/\0.pth"):
        for door in (lambda path=path: zoo.load_checkpoint(network(), path), lambda path=path: zoo.load_task(path)):
            trap.refused(door, path)
    trap.refused(lambda: zoo.create_model("local-dir:a\0b", pretrained=True), "NUL")
    trap.refused(lambda: zoo.create_model(NAME, checkpoint_path="a\0b"), "NUL")


# ---- records of runs -------------------------------------------------------------------------------------------

MARK = "<script>alert(1)</script>"


def other_values(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A record with one of its values, at any depth, replaced by others of every type, or missing."""
    for key, value in values.items():
        yield {k: v for k, v in values.items() if k != key}
        for other in (None, [], {}, MARK, [[1]], {"a": [1]}, -7, 1e999, True):
            yield {**values, key: other}
        if isinstance(value, dict):
            for inner in other_values(value):
                yield {**values, key: inner}


def test_summaries_and_notes_of_other_types(trap: Trap, run: Path) -> None:
    """Reading a run: a result, or one sentence, whatever its summary and its configuration hold."""
    summary, config = run / "summary.json", run / ".hydra" / "config.yaml"
    whole, settings = summary.read_text(), config.read_text()
    doors = (
        lambda: release.describe([run]),
        lambda: list(tabulate([run], [trap.folder / "R.md"])),
        lambda: read_run(run),
    )
    texts = [json.dumps(values) for values in other_values(json.loads(whole))][::7]
    texts += ["", "{", "[]", "null", "3", "[" * 50_000, "\x00", '{"metrics": NaN}', "1" * 6000, whole[:50]]
    for i, text in enumerate(texts):
        summary.write_text(text)
        trap.refused(doors[i % 3], text[:100], right=True)
    summary.write_text(whole)
    values = yaml.safe_load(settings)
    texts = [yaml.safe_dump(other) for key in ("name", "model", "data", "task", "seed")
             for other in other_values({key: values[key]}) for other in [{**values, **other}]][::7]  # fmt: skip
    texts += [
        "",
        "[",
        "null",
        "a: &a [1]\nb: *a",
        "!!python/object/apply:os.system ['touch canary']",
        "\x00",
        "[" * 20_000,
    ]
    for i, text in enumerate(texts):
        config.write_text(text)
        trap.refused(doors[i % 3], text[:100], right=True)
    config.write_text(settings)
    record = release.describe([run])
    for name in FOREIGN:
        asked = {**record, "data": {**record["data"], "config": {"_target_": name}}, "task": {"_target_": name}}
        trap.refused(functools.partial(evaluation.build_data, asked), ("data", name))
        trap.refused(functools.partial(evaluation.build_task, asked, network()), ("task", name))
    changed = {**values, "data": {**values["data"], "name": {"_target_": "payload.Task"}}}
    config.write_text(yaml.safe_dump(changed))
    for door in (
        lambda: evaluation.validate(str(run)),
        lambda: compare(str(run), "grbf.wine"),
        lambda: report.write_report(trap.folder / "r.html", str(run)),
    ):
        trap.refused(door, changed["data"])
    config.unlink()
    for door in (lambda: evaluation.validate(str(run)), lambda: report.write_report(trap.folder / "r.html", str(run))):
        trap.refused(door, "no configuration")


def test_a_report_shows_what_files_say_as_text(trap: Trap, run: Path) -> None:
    summary, config = json.loads((run / "summary.json").read_text()), (run / ".hydra" / "config.yaml")
    summary["versions"], summary["hardware"] = {MARK: MARK}, {MARK: f"'{MARK}\""}
    summary["metrics"][f"test/{MARK}"] = 1.0
    (run / "summary.json").write_text(json.dumps(summary))
    values = yaml.safe_load(config.read_text())
    values["name"] = f"{MARK}${{x}}$"
    config.write_text(yaml.safe_dump(values))
    model = json.loads((run / "model" / "config.json").read_text())
    model["label_names"] = [MARK, "$\\frac{", "&"]
    model["pretrained_cfg"]["label_names"] = model["label_names"]
    (run / "model" / "config.json").write_text(json.dumps(model))
    (run / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump([f"+x='{MARK}`'"]))
    (run / "csv" / "version_9").mkdir(parents=True)
    (run / "csv" / "version_9" / "metrics.csv").write_text(
        f"step,{MARK},train/loss\nx,1,2\n1,{MARK},3\n2,1e999,4,5,6\n"
    )
    (run / "accuracy_matrix.csv").write_text(f"{MARK},1\n=1+1\n")
    (run / "summary.txt").write_text(f"```\n{MARK}\n<!-- end summary -->")
    page = trap.folder / "report.html"
    trap.refused(lambda: report.write_report(page, str(run)), "a report", right=True)
    text = page.read_text()
    assert "&lt;script&gt;" in text
    assert "<script" not in text
    document = trap.folder / "R.md"
    document.write_text("<!-- begin summary -->\n<!-- end summary -->\n")
    trap.refused(lambda: list(tabulate([run], [document])), "a table", right=True)
    table = document.read_text().split("```text")[0]
    assert "<script" not in table
    assert document.read_text().count("<!-- end summary -->") == 1


def test_every_value_of_a_page_is_shown_as_text() -> None:
    figure, cells = (f'"{MARK}', f'"{MARK}'), [[MARK, {"code": MARK}]]
    whole = report.Part(MARK, MARK, text=MARK, figures=[figure], header=[MARK], rows=cells, notes=[MARK])
    parts = [report.Part(MARK, heading=MARK, text=MARK), report.Part(MARK, tiles=[(MARK, MARK)]), whole]
    page = report.render(MARK, parts)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 1 + 2 + 2 + 9
    assert page.count(f"&#34;{MARK.replace('<', '&lt;').replace('>', '&gt;')}") == 3


def test_run_folders_are_closed(trap: Trap, run: Path) -> None:
    """No link in them leads out when they are resumed, reported or used: what it leads to stays as it is."""
    victim, doors = (
        trap.root / "secret" / "victim",
        [
            lambda: report.write_report(trap.folder / "r.html", str(run)),
            lambda: evaluation.validate(str(run)),
            lambda: compare(str(run), str(run)),
            lambda: evaluation.load(str(run)),
            lambda: list(tabulate([run], [])),
        ],
    )
    places = ["csv", "csv/version_0/metrics.csv", "checkpoints", ".hydra", ".hydra/overrides.yaml", "model", "run.json"]
    places += [".lock", "train.log", "pytest.log", "summary.json", "accuracy_matrix.csv", "wandb", "new/deep/er"]
    for k, name in enumerate(places):
        path, kept = run / name, run.parent / "kept"
        path.parent.mkdir(parents=True, exist_ok=True)
        there = path.exists()
        if there:
            shutil.copytree(path, victim) if path.is_dir() else shutil.copy(path, victim)
            path.rename(kept)
        elif k % 2:
            victim.write_text("precious")  # the others lead to what is not there yet
        path.symlink_to(os.path.relpath(victim, path.parent))
        before = {p: (p.stat().st_mtime_ns, p.is_dir() or p.read_bytes()) for p in (trap.root / "secret").rglob("*")}
        for door in doors:
            assert f"{name} leads to " in trap.refused(door, name)
        told = trap.resume("trainer.max_epochs=2")
        assert told.startswith("resume=hostile: ")
        assert f"{name} leads to " in told
        after = {p: (p.stat().st_mtime_ns, p.is_dir() or p.read_bytes()) for p in (trap.root / "secret").rglob("*")}
        assert after == before
        path.unlink()
        if there:
            kept.rename(path)
            shutil.rmtree(victim) if victim.is_dir() else victim.unlink()
        victim.unlink(missing_ok=True)
    if hasattr(os, "mkfifo"):
        os.mkfifo(run / "train.log")
        assert "train.log is neither a file nor a folder" in trap.resume()
        (run / "train.log").unlink()
    (run / "latest").symlink_to("checkpoints")
    trap.refused(doors[-2], "a link inside", right=True)
    evaluation.load(str(run))


def test_a_link_in_a_run_resumes_no_other_run(trap: Trap, run: Path) -> None:
    other = shutil.copytree(run, trap.root / "secret" / "run")
    (other / "checkpoints").mkdir(exist_ok=True)
    (other / "checkpoints" / "step=00000009.ckpt").write_bytes(b"x")
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    (run / "checkpoints").symlink_to("../secret/run/checkpoints")
    for target in (run / "checkpoints", run / "checkpoints" / "step=00000009.ckpt"):
        assert find_run(target) == run
    (run / "checkpoints").unlink()
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "best.ckpt").symlink_to("../../secret/run/checkpoints/step=00000009.ckpt")
    assert find_run(run / "checkpoints" / "best.ckpt") == run
    (trap.root / "mine").symlink_to("secret/run/checkpoints")
    assert find_run(trap.root / "mine") == other, "a link of the user's own"


def test_a_damaged_note_is_told_and_the_run_goes_on(trap: Trap, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed = json.loads((run / "run.json").read_text())["seed"]
    from zoo.training.notes import read_notes

    contents = ["", "{", "null", "[]", "3", '{"seed": "x"}', '{"seed": 3, "wandb_id": [1]}', "[" * 50_000, "\x00"]
    contents += ['{"seed": -1, "wandb_id": "a"}', '{"seed": 1, "wandb_id": "../x"}', '{"seconds_before": NaN}']
    state = {"zoo": {"task": "TabularTask", "run": {"seed": 5, "wandb_id": "abcd1234"}}}
    for content in contents:
        (run / "run.json").write_text(content)
        notes = read_notes(run, seed, None)
        assert notes is not None
        assert notes["seed"] == seed
        assert re.fullmatch(r"note: .*run\.json.*the seed is 0, by the configuration.*\n", capsys.readouterr().err)
        notes = read_notes(run, None, state)
        assert notes is not None
        assert (notes["seed"], notes["wandb_id"]) == (5, "abcd1234")
        assert "by the checkpoint" in capsys.readouterr().err
        trap.refused(lambda: read_notes(run, None, None), content)


# ---- data ------------------------------------------------------------------------------------------------------


def pictures() -> dict[str, bytes]:
    """Bytes that are no picture of the listed formats, or want more than one is worth."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PDF")
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(canary) (w) file closefile\nshowpage\n%%EOF\n"
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    import zlib

    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return {
        "postscript": script,
        "dos postscript": b"\xc5\xd0\xd3\xc6" + struct.pack("<IIIIIIH", 30, len(script), 0, 0, 0, 0, 0) + script,
        "svg": f'<svg xmlns="http://www.w3.org/2000/svg">{MARK}<image href="file:///etc/passwd"/></svg>'.encode(),
        "pdf": stream.getvalue(),
        "wmf": b"\xd7\xcd\xc6\x9a" + b"\0" * 60,
        "bomb": b"\x89PNG\r\n\x1a\n" + chunk,
        "pickle": pickle.dumps(Gadget(os.system, "touch canary")),
        "html": b"<html><img src=http://evil.example>",
        "mvg": b"push graphic-context\nimage over 0,0 0,0 'https://evil.example'\n",
        "fits": b"SIMPLE  =                    T" + b" " * 2000,
        "empty": b"",
        "msp": b"DanM" + b"\0" * 60,
        "fpx": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 600,
        "grib": b"GRIB" + b"\0" * 60,
        "hdf": b"\x89HDF\r\n\x1a\n" + b"\0" * 60,
        "sgi": b"\x01\xda" + b"\xff" * 60,
        "xpm": b'/* XPM */ "9999999 9999999 9999999 1"',
        "ppm": b"P6 99999999 99999999 255\n",
        "truncated": b"\xff\xd8\xff\xe0\0\x10JFIF\0",
    }


def test_pictures_run_nothing(trap: Trap, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import EpsImagePlugin

    fake = trap.folder / "bin"
    fake.mkdir()
    for name in ("gs", "gswin64c", "inkscape", "convert", "djpeg", "xv"):
        (fake / name).write_text(f"#!/bin/sh\ntouch {trap.canary}\n")
        (fake / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    for i, (name, content) in enumerate(pictures().items()):
        for suffix in (".png", ".jpg", ".eps", ".svg")[: 4 if i < 3 else 1]:
            path = trap.folder / f"x{suffix}"
            path.write_bytes(content)
            trap.refused(lambda path=path: prediction.predict("unireplknet_z.digits", [path]), (name, suffix))
            path.unlink()
        root = trap.folder / "images"
        for kind in ("a", "b"):
            for part in ("train", "val"):
                (root / part / kind).mkdir(parents=True, exist_ok=True)
                (root / part / kind / "0.png").write_bytes(content)
        data = ImageFolder(root=root, image_size=16, batch_size=2, num_workers=0)

        def door(data: Any = data) -> None:
            data.setup()
            next(iter(data.train_dataloader()))

        trap.refused(door, name)


SOUNDS = {
    "empty": b"",
    "postscript": b"%!PS\n",
    "pickle": b"\x80\x04cposix\nsystem\n(S'touch canary'\ntR.",
    "riff": b"RIFF" + struct.pack("<I", 2**32 - 1) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 65535, 1, 1, 1, 1),
    "long": b"RIFF" + struct.pack("<I", 60) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 1, 2, 2, 16)
    + b"data" + struct.pack("<I", 2**31) + b"\0" * 16,
    "flac": b"fLaC" + b"\xff" * 60,
    "ogg": b"OggS" + b"\0" * 60,
    "id3": b"ID3\x04\0\0\x7f\x7f\x7f\x7f" + b"\0" * 60,
    "playlist": b"#EXTM3U\nhttps://evil.example/x.ts\nfile:///etc/passwd\n",
    "concat": b"ffconcat version 1.0\nfile '/etc/passwd'\n",
    "dash": b'<?xml version="1.0"?><MPD><BaseURL>https://evil.example</BaseURL></MPD>',
    "sdp": b"v=0\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
    "text": b"hello",
}  # fmt: skip


def folder_of(root: Path, suffix: str, content: bytes) -> Path:
    for part in ("train", "test"):
        for kind in ("a", "b"):
            (root / part / kind).mkdir(parents=True, exist_ok=True)
            for i in range(2):
                (root / part / kind / f"{i}{suffix}").write_bytes(content)
    return root


def test_sounds_and_clips_run_nothing(trap: Trap) -> None:
    pytest.importorskip("av")

    def all_of(data: Any) -> None:
        data.prepare_data()
        data.setup()
        for batch in data.train_dataloader():
            assert len(batch)

    torch.manual_seed(0)
    record = {"kind": "sound", "rate": 8000, "samples": 5360}
    model = zoo.create_model("test_unireplknet_audio", num_classes=2)
    zoo.save_pretrained(model, trap.folder / "model", input_record=record)
    for i, (name, content) in enumerate(SOUNDS.items()):
        for suffix in (".wav", ".mp3", ".flac", ".ogg")[i % 2 :: 2]:
            path = trap.folder / f"x{suffix}"
            path.write_bytes(content)
            trap.refused(lambda path=path: prediction.predict(f"local-dir:{trap.folder}/model", [path]), (name, suffix))
        suffix = (".wav", ".flac", ".ogg")[i % 3]
        sounds = folder_of(trap.folder / f"sounds{i}", suffix, content)
        trap.refused(
            lambda sounds=sounds: all_of(AudioFolder(sounds, sample_rate=8000, batch_size=2)), (name, "sounds")
        )
        clips = folder_of(trap.folder / f"clips{i}", (".mp4", ".avi", ".webm", ".mkv")[i % 4], content)
        data = VideoFolder(clips, frames=2, size=8, batch_size=2, num_workers=0)
        trap.refused(lambda data=data: all_of(data), (name, "clips"))


#: Tables: formulas, odd bytes, fields that are too long or too many, numbers that are none.
TABLES: tuple[bytes, ...] = (
    b"", b"\0" * 200, b"\xff\xfe\0a", b"a,b\n", b"a,b\n=1+1,=cmd|'/c calc'!A0\n", b'a,b\n"' + b"x" * 200_000,
    b"a\n" + b"9" * 200_000, b"a,a,a\n1,2,3\n", b"," * 70_000 + b"\n", b"\n" * 5000, b"a,b\n1\n1,2,3\n",
    b"a,b\nnan,inf\n",
    b"a,b\n1e999,0x10\n", b"a,b\n1_0,\xd9\xa1\n", b"a;b\n1;2", b"a\tb\n1\t2", b'"a\n1', b"a,b\r1,2\r",
    b"PK\x03\x04" + b"\0" * 60,
    b"\x80\x04cposix\nsystem\n(S'touch canary'\ntR.", b"<html>", b"a,b\n${oc.env:HOME},!!python/name:os.system\n",
    b"a,b\n__import__('payload'),1\n", b"\xef\xbb\xbf", b"date,x\n2020-01-01,1\n2020-01-01,2\n",
    b"date,x\n99999-01-01,1\n",
    b"date,x\n" + b"2020-01-01,1\n" * 3, b"date\n2020-01-01\n", b"date,x\n2020-01-01,file:///etc/passwd\n",
)  # fmt: skip


def test_tables_and_series_run_nothing(trap: Trap) -> None:
    path = trap.folder / "x.csv"
    for content in TABLES:
        path.write_bytes(content)
        trap.refused(lambda: prediction.predict("grbf.wine", [path]), content[:60])

        def door() -> None:
            data = Forecast(str(path), seq_len=2, pred_len=1, time_features=0, batch_size=1)
            data.prepare_data()
            data.setup()
            next(iter(data.train_dataloader()))

        trap.refused(door, content[:60])
        for target in ("a", "b", "x"):
            trap.refused(lambda target=target: Tabular(path=path, target=target).setup(), (target, content[:60]))
    for name in ("x.tsv", "x.parquet", "x.xlsx", "x.pkl", "x.npy", "x.json"):
        (trap.folder / name).write_bytes(pickle.dumps(Gadget(os.system, f"touch {trap.canary}")))
        trap.refused(lambda name=name: prediction.predict("grbf.wine", [trap.folder / name]), name)
        trap.refused(lambda name=name: Forecast(str(trap.folder / name)).setup(), name)
        trap.refused(lambda name=name: Tabular(path=trap.folder / name, target="x").setup(), name)


def test_data_caches_run_nothing(trap: Trap) -> None:
    """Arrays, frames and tokenizers in the folders where data is kept."""
    gadget = Gadget(os.system, f"touch {trap.canary}")
    stream = io.BytesIO()
    np.savez(
        stream, images=np.array([gadget], object), targets=np.array([gadget], object), **{"a/b/1": np.array([gadget])}
    )
    contents = [
        stream.getvalue(),
        b"",
        b"PK\x03\x04",
        pickle.dumps(gadget),
        b"\x93NUMPY\x01\0" + b"\xff" * 80,
        b"x" * 300,
    ]
    stream = io.BytesIO()
    np.savez(stream, images=np.zeros(3), targets=np.zeros((2, 2)), **{"who/b/c": np.zeros(2)})
    contents.append(stream.getvalue())
    caches: dict[str, Callable[[], Any]] = {
        "mnist5k.npz": lambda: Mnist5k(root=trap.folder, download=False),
        "spoken_digits.npz": lambda: SpokenDigits(root=trap.folder, download=False),
    }
    frame = trap.folder / "frame.pkl"
    for content in contents:
        for name, data in caches.items():
            (trap.folder / name).write_bytes(content)
            trap.refused(lambda data=data: data().setup(), (name, content[:40]))
        trap.refused(lambda: PointMnist(root=trap.folder, download=False).setup(), content[:40])
        frame.write_bytes(content)
        trap.refused(lambda: read_frame(frame), content[:40])
    for other in gadgets(trap):
        frame.write_bytes(pickle.dumps(other))
        trap.refused(lambda: read_frame(frame), other.call[0])
    pytest.importorskip("tokenizers")
    from zoo.data.text import tokenize

    for content in (
        b"",
        b"{}",
        b"[1]",
        b'{"model": {"type": "os.system"}}',
        b"\xff",
        b"[" * 9000,
        pickle.dumps(gadget),
    ):
        (trap.folder / "tokenizer.json").write_bytes(content)
        trap.refused(lambda: tokenize(["a"], trap.folder / "tokenizer.json"), content[:40])


def test_commands_tell_one_line(trap: Trap, capsys: pytest.CaptureFixture[str]) -> None:
    (trap.folder / "config.json").write_text('{"architecture": ["grbf"]}')
    (trap.folder / ".hydra").mkdir()
    (trap.folder / ".hydra" / "config.yaml").write_text("!!python/object/apply:os.system ['touch canary']")
    (trap.folder / "summary.json").write_text("[1]")
    picture = trap.folder / "x.png"
    picture.write_bytes(pictures()["postscript"])
    run, folder = str(trap.folder), f"local-dir:{trap.folder}"
    for arguments in (
        ("info", folder), ("predict", folder, str(picture)), ("predict", "unireplknet_z.digits", str(picture)),
        ("validate", run), ("compare", run, "grbf.wine"), ("report", run), ("export", folder), ("results", run),
        ("push", run, f"local-dir:{trap.folder}/out"), ("ship", run, "--folder", f"{trap.folder}/out"),
        ("export", run), ("validate", folder, "--data", run), ("figure", "losses", "--model", run, "--data", run),
    ):  # fmt: skip
        assert main(list(arguments)) == 1, arguments
        told = capsys.readouterr().err
        assert told.startswith("error: "), arguments
        assert told.count("\n") == 1, arguments
    assert not trap.canary.exists()
