"""Folders of estimators from someone who means harm, at every door: one sentence, and nothing else happens."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

import zoo
from tests.test_hostile import Gadget, Trap, trap  # noqa: F401 (a fixture)
from zoo.cli import main
from zoo.estimators import GPClassifier, GPRegressor, GRBFClassifier, GRBFRegressor, KernelStreamClassifier
from zoo.kernels import Gaussian, Linear
from zoo.support.files import RECORD_HASHES, record_hashes
from zoo.testing.estimators import rows
from zoo.tools import comparison, estimators, evaluation, export, hub, info, prediction, report

Config = dict[str, Any]
Change = Callable[[Config, dict[str, Tensor]], object]
NAMES = ["a", "b", "c", "d"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved estimator of each kind."""
    X, y = rows()
    labels = np.array(["cat", "dog", "eel"])[np.digitize(y, [-1, 1])]
    root = tmp_path_factory.mktemp("saved")
    kernel = Gaussian([1.0] * 4, dtype=torch.float64) + Linear()
    made: dict[str, Any] = {
        "grbf": GRBFClassifier(solver="adam", n_centers=5, max_iter=3, random_state=np.random.RandomState(0)).fit(
            X, labels
        ),
        "values": GRBFRegressor(solver="agop").fit(X, y),
        "columns": GRBFRegressor(categorical_features=[0]).fit(X.round(), y),
        "gp": GPRegressor(kernel, optimize=False, random_state=0).fit(X, y),
        "gpc": GPClassifier(optimize=False, random_state=0).fit(X, labels),
        "stream": KernelStreamClassifier(n_features=8, random_state=0).fit(X, labels),
    }
    for name, estimator in made.items():
        estimator.feature_names_in_ = np.array(NAMES, dtype=object)
        zoo.save_pretrained(estimator, root / name)
    return {name: root / name for name in made}


def written(folder: Path, to: Path, change: Change) -> Path:
    """A copy of a folder with changes, and the hash that they need."""
    config = json.loads((folder / "config.json").read_text())
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    digest, hashes = config["sha256"]["model.safetensors"], config[RECORD_HASHES]
    change(config, tensors)
    if config.get(RECORD_HASHES) == hashes:  # so that what is refused is the change itself
        config[RECORD_HASHES] = record_hashes(config)
    weights = safetensors.torch.save({name: t.contiguous().clone() for name, t in tensors.items()})
    if config.get("sha256") == {"model.safetensors": digest}:
        config["sha256"] = {"model.safetensors": hashlib.sha256(weights).hexdigest()}
    to.mkdir(exist_ok=True)
    (to / "model.safetensors").write_bytes(weights)
    (to / "config.json").write_text(json.dumps(config))
    return to


# ---- changes -----------------------------------------------------------------------------------------------


def state(**values: Any) -> Change:
    return lambda c, t: c["estimator"]["state"].update(copy.deepcopy(values))


def given(**values: Any) -> Change:
    return lambda c, t: c["estimator"]["parameters"].update(values)


def beside(**values: Any) -> Change:
    return lambda c, t: c.update(values)


def network(part: str = "values", **values: Any) -> Change:
    return lambda c, t: c["estimator"]["state"]["network_"][part].update(copy.deepcopy(values))


def named(kind: str) -> Change:
    return lambda c, t: c["estimator"]["state"]["network_"].update({"class": kind})


def tensor(name: str, value: Callable[[Tensor], Tensor]) -> Change:
    """Change the first tensor whose name holds `name`."""

    def change(c: Config, t: dict[str, Tensor]) -> None:
        found = next(key for key in sorted(t) if name in key)
        t[found] = value(t[found])
        order = json.dumps(c).count(found)
        assert order, found

    return change


def words(values: list[Any], dtype: str = "U3", shape: list[Any] | None = None) -> Config:
    return {"type": "words", "values": values, "dtype": dtype, "shape": [len(values)] if shape is None else shape}


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def laughs(c: Config, t: dict[str, Tensor]) -> None:
    """Forty sums, each of the one before, twice: a million million kernels in a few lines."""
    text = json.dumps(c["estimator"])
    count = text.count('"type": "module"') + text.count('"type": "record"')
    part: Config = {"training": False, "learned": {}, "loose": [], "parameters": {}, "buffers": {}, "values": {}}
    sums = []
    for depth in range(40):
        before = {str(i): {"type": "same", "index": count + 2 * depth - 2} for i in range(2 if depth else 0)}
        inner = {"type": "module", "class": "torch.nn.modules.container.ModuleList", **part, "modules": before}
        sums.append({"type": "module", "class": "zoo.kernels.compose.Sum", **part, "modules": {"kernels": inner}})
    c["estimator"]["state"]["more_"] = sums


def itself(c: Config, t: dict[str, Tensor]) -> None:
    c["estimator"]["state"]["network_"]["modules"]["more"] = {"type": "same", "index": 0}


def twice(c: Config, t: dict[str, Tensor]) -> None:
    found = c["estimator"]["state"]["weights_"]
    c["estimator"]["state"]["more_"] = [found] * 10_000


def generator(place: int, value: Any) -> Change:
    def change(c: Config, t: dict[str, Tensor]) -> None:
        c["estimator"]["parameters"]["random_state"]["values"][place] = value

    return change


def spread(c: Config, t: dict[str, Tensor]) -> None:
    """Variances and points that broadcast to a hundred million numbers."""
    text = json.dumps(c["estimator"])
    for name in [name for name in t if name.startswith("posteriors_")]:
        if name.endswith("points"):
            t[name] = torch.zeros(3000, 4, dtype=torch.float64)
        elif name.endswith("raw_scale"):
            t[name] = torch.ones(30_000, dtype=torch.float64)
            text = text.replace(f'"name": "{name}", "order": []', f'"name": "{name}", "order": [0]')
    c["estimator"] = json.loads(text)


def levels(change: Callable[[list[Any]], object]) -> Change:
    """Change the categories of a column: its index and their list."""
    return lambda c, t: change(c["estimator"]["state"]["encoding_"]["values"]["levels"]["items"][0])


#: What is done to the folder of which estimator.
HOSTILE: dict[str, tuple[str, Change]] = {
    # the configuration
    "no state": ("grbf", lambda c, t: c["estimator"].pop("state")),
    "a state that is a list": ("grbf", lambda c, t: c["estimator"].update(state=[1])),
    "no parameters": ("grbf", lambda c, t: c["estimator"].pop("parameters")),
    "another format": ("grbf", lambda c, t: c["estimator"].update(format=2)),
    "a format that is a text": ("grbf", lambda c, t: c["estimator"].update(format="1")),
    "another estimator": ("grbf", beside(architecture="gp_classifier")),
    "a function as estimator": ("grbf", beside(architecture="os.system")),
    "an estimator with control characters": ("grbf", beside(architecture="\x1b[2Jgrbf")),
    "an estimator that is a list": ("grbf", beside(estimator=[1])),
    "no hash": ("grbf", lambda c, t: c.pop("sha256")),
    "another hash": ("grbf", lambda c, t: c["sha256"].update({"model.safetensors": "0" * 64})),
    "the hash of another file": ("grbf", beside(sha256={"config.json": "0" * 64})),
    "the hash of a file elsewhere": ("grbf", beside(sha256={"../secret/weights.pth": "0" * 64})),
    "other names of classes": ("grbf", beside(label_names=["x", "y", "z"])),
    "names of classes that are numbers": ("grbf", beside(label_names=[1, 2, 3])),
    "another number of classes": ("grbf", beside(num_classes=10**9)),
    "another number of columns": ("grbf", beside(input={"kind": "table", "count": 5})),
    "another kind of input": ("grbf", beside(input={"kind": "image", "channels": 1, "size": [2, 2]})),
    "an input that is huge": ("grbf", beside(input={"kind": "table", "count": 10**12})),
    # parameters
    "a parameter that is unknown": ("grbf", given(oddity=1)),
    "a parameter of another type": ("grbf", given(n_centers="many")),
    "a parameter of everything": ("grbf", given(__class__="x")),
    "a head that is a function": ("stream", given(head="os.system")),
    "a head that is a list": ("stream", given(head=["mixture"])),
    "a kernel that is no kernel": ("gp", given(kernel="rbf")),
    "a kernel that is another module": (
        "gp", given(kernel={"type": "module", "class": "torch.nn.modules.linear.Identity", "training": False,
                            "learned": {}, "loose": [], "parameters": {}, "buffers": {}, "modules": {}, "values": {}})
    ),
    # values
    "a type that is unknown": ("grbf", state(intercept_={"type": "pickle", "value": "gASV"})),
    "a type that is a list": ("grbf", state(intercept_={"type": ["array"]})),
    "no type": ("grbf", state(intercept_={"value": 1})),
    "a tensor that is not there": ("grbf", state(intercept_={"type": "array", "name": "gone", "order": [0]})),
    "a tensor with a list as its name": ("grbf", state(intercept_={"type": "array", "name": [1], "order": [0]})),
    "an order of other axes": ("grbf", state(intercept_={"type": "array", "name": "intercept_", "order": [3, 4]})),
    "an order with an axis twice": ("grbf", state(centers_={"type": "array", "name": "centers_", "order": [0, 0]})),
    "an order that is huge": ("grbf", state(centers_={"type": "array", "name": "centers_", "order": [0] * 10**5})),
    "a tensor used ten thousand times": ("grbf", twice),
    "a tensor too many": ("grbf", lambda c, t: t.update(surplus=torch.ones(1))),
    "a tensor too few": ("grbf", lambda c, t: t.pop("weights_")),
    "values two hundred deep": ("grbf", state(more_=nested(200))),
    "values three hundred deep": ("grbf", state(more_=nested(300))),
    "a mapping with a key twice": ("grbf", state(more_={"type": "dict", "items": [["a", 1], ["a", 2]]})),
    "a mapping with a list as key": ("grbf", state(more_={"type": "dict", "items": [[["a"], 1]]})),
    "a mapping without pairs": ("grbf", state(more_={"type": "dict", "items": [1]})),
    "a number that is code": ("grbf", state(more_={"type": "float", "value": "__import__('os')"})),
    "a number of many digits": ("grbf", state(n_features_in_=10**4000)),
    "texts of records": ("grbf", state(classes_=words(["a", "b"], "V8"))),
    "texts of objects": ("grbf", state(classes_=words([{"type": "tuple", "values": []}], "O"))),
    "texts of ten gigabytes": ("grbf", state(classes_=words(["a"] * 30_000, "U99999"))),
    "texts longer than told": ("grbf", state(classes_=words(["cat", "dog", "tortoise"], "U3"))),
    "texts of a negative shape": ("grbf", state(classes_=words(["cat"], "U3", [-1]))),
    "texts of a huge shape": ("grbf", state(classes_=words([], "O", [0, 2**62]))),
    "texts of another shape": ("grbf", state(classes_=words(["cat", "dog", "eel"], "U3", [2]))),
    # random states
    "a random state out of range": ("grbf", generator(2, 10**9)),
    "a random state before its keys": ("grbf", generator(2, -5)),
    "a random state with few keys": ("grbf", generator(1, [1, 2, 3])),
    "a random state with wide keys": ("grbf", generator(1, [2**40] * 624)),
    "a random state of another kind": ("grbf", generator(0, "PCG64")),
    "a random state with a text": ("grbf", generator(3, "x")),
    # names of attributes
    "a method": ("grbf", state(predict="x")),
    "a property": ("grbf", state(precision_="x")),
    "the class": ("grbf", state(__class__="x")),
    "the attributes": ("grbf", state(__dict__={"type": "dict", "items": []})),
    "a reduction": ("grbf", state(__reduce__="x")),
    "the checks of parameters": ("grbf", state(_parameter_constraints={"type": "dict", "items": []})),
    "a method of scikit-learn": ("grbf", state(_validate_params=None)),
    "a parameter as state": ("grbf", state(n_centers=10**9)),
    "a name with a dot": ("grbf", state(**{"network_.forward": 1})),
    "a name with a line break": ("grbf", state(**{"a\nb": 1})),
    "a name of a megabyte": ("grbf", state(**{"a" * 10**6: 1})),
    # classes
    "a function": ("grbf", named("os.system")),
    "a builtin": ("grbf", named("builtins.eval")),
    "a program": ("grbf", named("subprocess.Popen")),
    "a loader": ("grbf", named("torch.hub.load")),
    "a module of Python": ("grbf", named("zoo.kernels.kernel.torch")),
    "an imported class": ("grbf", named("zoo.learners.statistics.Path")),
    "a way through a class": ("grbf", named("zoo.models.grbf.nn.Linear")),
    "a payload": ("grbf", named("payload.Task")),
    "a class that is a number": ("grbf", named(3)),  # type: ignore[arg-type]
    "the base of all modules": ("grbf", named("torch.nn.modules.module.Module")),
    "a layer that enlarges": ("grbf", named("torch.nn.modules.upsampling.Upsample")),
    "a layer by another name": ("grbf", named("torch.nn.Linear")),
    "another network": ("grbf", named("zoo.learners.agop.MetricMachine")),
    "a record in place of a module": ("grbf", named("zoo.learners.agop.Setting")),
    "a class of control characters": ("grbf", named("\x1b[2J\n")),
    "fields of control characters": (
        "values", lambda c, t: c["estimator"]["state"]["network_"]["values"]["setting"].update(values={"\x1b[2J\n": 1})
    ),
    # modules
    "a hook": ("grbf", network(_forward_hooks={"type": "dict", "items": [[0, "x"]]})),
    "a compiled call": ("grbf", network(_compiled_call_impl="x")),
    "a forward pass": ("grbf", network(forward="x")),
    "a class of a module": ("grbf", network(__class__="x")),
    "a value in place of a parameter": ("grbf", network(precision_elements=1)),
    "a module among parameters": ("grbf", network("parameters", head={"type": "same", "index": 0})),
    "a number among modules": ("grbf", network("modules", more=3)),
    "a module inside of itself": ("grbf", itself),
    "an object that comes later": ("grbf", state(network_={"type": "same", "index": 99})),
    "an object before the first": ("grbf", state(more_={"type": "same", "index": -1})),
    "an object by a text": ("grbf", state(more_={"type": "same", "index": "0"})),
    "a rank that is huge": ("grbf", network(form="low_rank", rank=10**9)),
    "a form that is unknown": ("grbf", network(form="os.system")),
    "sums of sums of sums": ("gp", laughs),
    # what does not fit together
    "columns that are huge": ("grbf", state(n_features_in_=10**15)),
    "columns that are true": ("grbf", state(n_features_in_=True)),
    "columns that are negative": ("gp", state(n_features_in_=-4)),
    "other columns": ("grbf", state(n_features_in_=7)),
    "other columns of a process": ("gp", state(n_features_in_=7)),
    "more classes than outputs": ("grbf", state(classes_=words(["a", "b", "c", "d"]))),
    "fewer classes than outputs": ("grbf", state(classes_=words(["a", "b"]))),
    "a class twice": ("grbf", state(classes_=words(["cat", "cat", "eel"]))),
    "classes in another order": ("grbf", state(classes_=words(["eel", "dog", "cat"]))),
    "classes in two dimensions": ("grbf", state(classes_=words(["cat", "dog", "eel"], "U3", [3, 1]))),
    "classes that are a text": ("grbf", state(classes_="cat")),
    "no classes": ("grbf", lambda c, t: c["estimator"]["state"].pop("classes_")),
    "names of features that are numbers": ("grbf", state(feature_names_in_=words([1, 2, 3, 4], "O"))),
    "a name of a feature twice": ("grbf", state(feature_names_in_=words(["a", "a", "c", "d"], "O"))),
    "fewer names of features": ("grbf", state(feature_names_in_=words(["a"], "O"))),
    "labels of a stream that are gone": ("stream", state(_labels=["cat"])),
    "statistics that are none": ("stream", state(statistics_=None)),
    "centres of another network": ("values", tensor("centers_", lambda t: t[:-1])),
    # columns
    "an encoding that is a text": ("columns", state(encoding_="x")),
    "an encoding that is another record": (
        "columns", lambda c, t: c["estimator"]["state"]["encoding_"].update({"class": "zoo.learners.agop.Setting"})
    ),
    "an encoding that is a function": (
        "columns",
        lambda c, t: c["estimator"]["state"]["encoding_"].update({"class": "zoo.estimators.encoding.check_array"}),
    ),
    "no encoding": ("columns", lambda c, t: c["estimator"]["state"].pop("encoding_")),
    "a median that is no number": ("columns", tensor("encoding_.fill", lambda t: t * torch.nan)),
    "a median too few": ("columns", tensor("encoding_.fill", lambda t: t[:-1])),
    "gaps that are numbers": ("columns", tensor("encoding_.indicator", lambda t: t.double())),
    "gaps of categories": ("columns", tensor("encoding_.indicator", torch.ones_like)),
    "categories of a column that is not there": ("columns", levels(lambda part: part.__setitem__(0, 10**9))),
    "categories that are numbers": ("columns", levels(lambda part: part.__setitem__(1, [1, 2, 3]))),
    "a category twice": ("columns", levels(lambda part: part[1].__setitem__(0, part[1][1]))),
    "a category too many": ("columns", levels(lambda part: part[1].append("more"))),
    "categories too many": ("columns", levels(lambda part: part[1].extend(map(str, range(10**5))))),
    "other categories on record": (
        "columns", lambda c, t: c["input"]["variables"][0]["values"].__setitem__(0, "other")
    ),
    "another median on record": ("columns", lambda c, t: c["input"]["variables"][1].update(fill=7.5)),
    "residuals that are no numbers": ("columns", tensor("left_out_residuals_", lambda t: t * torch.inf)),
    "residuals of other rows": ("columns", tensor("left_out_residuals_", lambda t: t[:-1])),
    "residuals of other targets": ("columns", tensor("left_out_residuals_", lambda t: t.repeat(1, 2))),
    "weights of rows that are zero": ("columns", tensor("left_out_weights_", torch.zeros_like)),
    # numbers
    "a scale of zero": ("gp", tensor("scale_", torch.zeros_like)),
    "a mean that is no number": ("gp", tensor("mean_", lambda t: t * torch.nan)),
    "a mean in two dimensions": (
        "stream", lambda c, t: (t.update(mean_=torch.zeros(9999, 1, dtype=torch.float64)),
                                c["estimator"]["state"]["mean_"].update(order=[0, 1]))
    ),
    "weights that are no numbers": ("grbf", tensor("head.weight", lambda t: t * torch.nan)),
    "weights that are infinite": ("gpc", tensor("slopes", lambda t: t * torch.inf)),
    "weights of another shape": ("grbf", tensor("head.weight", lambda t: t[:, :-1])),
    "weights that are complex": ("values", tensor("coefficients", lambda t: t.to(torch.complex64))),
    "weights that are bytes": ("grbf", tensor("precision_elements", lambda t: t.to(torch.uint8))),
    "sums of another shape": ("stream", tensor("gram", lambda t: t[:-1])),
    "codes out of range": ("stream", tensor("components", lambda t: t + 10**6)),
    "arrays that spread": ("gpc", spread),
}  # fmt: skip


def doors(folder: Path, table: Path) -> dict[str, Callable[[], object]]:
    """What takes the folder of an estimator."""
    place = str(folder)
    return {
        "load_estimator": lambda: zoo.load_estimator(folder),
        "load_estimator by its place": lambda: zoo.load_estimator(f"local-dir:{folder}"),
        "predict": lambda: prediction.predict(place, [table]),
        "info": lambda: info.describe(place),
        "validate": lambda: estimators.score(place, table, "y"),
        "validate without data": lambda: evaluation.validate(place),
        "export": lambda: export.export(place, folder / "out"),
        "compare": lambda: comparison.compare(place, place),
        "report": lambda: report.write_report(folder / "report.html", place),
        "push": lambda: hub.push(place, f"local-dir:{folder}/mirror"),
        "create_model": lambda: zoo.create_model(f"local-dir:{folder}", pretrained=True),
    }


def test_a_hostile_estimator_is_refused_at_every_door(trap: Trap, folders: dict[str, Path]) -> None:  # noqa: F811
    table = trap.folder / "rows.csv"
    table.write_text("a,b,c,d,y\n1,2,3,4,cat\n")
    assert len(HOSTILE) >= 100
    for i, (what, (which, change)) in enumerate(HOSTILE.items()):
        folder = written(folders[which], trap.folder / "saved", change)
        for door, enter in list(doors(folder, table).items())[: 1 if i % 2 else None]:  # all load it in the same way
            trap.refused(enter, f"{what}: {door}")
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"], what


def test_files_of_an_estimator_that_are_damaged_or_others(
    trap: Trap,  # noqa: F811
    folders: dict[str, Path],
) -> None:
    table, folder = trap.folder / "rows.csv", trap.folder / "saved"
    table.write_text("a,b,c,d\n1,2,3,4\n")
    shutil.copytree(folders["grbf"], folder)
    weights, config = ((folder / name).read_bytes() for name in ("model.safetensors", "config.json"))
    tensors = safetensors.torch.load(weights)
    spread_out = trap.folder / "spread.pt"  # a file of some bytes, whose tensors claim a terabyte
    torch.save({name: torch.zeros(()).expand(10**6, 10**6) for name in tensors}, spread_out)
    contents = [
        b"",
        weights[:-8],
        weights[: len(weights) // 2],
        pickle.dumps(Gadget(os.system, f"touch {trap.canary}")),
        spread_out.read_bytes(),
    ]
    contents += [b"PK\x03\x04" + weights, b"\xff" * 64, (2**40).to_bytes(8, "little") + b"{}"]
    for content in contents:
        (folder / "model.safetensors").write_bytes(content)
        for right in (False, True):  # with the hash on record, and with its own
            found = json.loads(config)
            if right:
                found["sha256"]["model.safetensors"] = hashlib.sha256(content).hexdigest()
            (folder / "config.json").write_text(json.dumps(found))
            for door, enter in doors(folder, table).items():
                trap.refused(enter, f"{content[:20]!r}: {door}")
    (folder / "model.safetensors").write_bytes(weights)
    text = config.decode()
    for content in (
        b"", b"[" * 50_000, b"\xff\xfe", b"{" * 9000, text.replace('"format": 1', '"format": 1, "format": 1').encode(),
        text.replace('"n_features_in_": 4', f'"n_features_in_": {"9" * 6000}').encode(), b"nan",
        text.replace('"n_features_in_": 4', '"n_features_in_": ' + "[" * 5000 + "]" * 5000).encode(),
    ):  # fmt: skip
        assert content != config
        (folder / "config.json").write_bytes(content)
        for door, enter in doors(folder, table).items():
            trap.refused(enter, f"{content[:20]!r}: {door}")
    for name in ("config.json", "model.safetensors"):
        (folder / "config.json").write_bytes(config)
        (folder / "model.safetensors").write_bytes(weights)
        (folder / name).unlink()
        for make in (
            lambda path: path.symlink_to(trap.root / "secret" / "weights.pth"),
            lambda path: path.symlink_to("/etc/hostname"),
            lambda path: os.mkfifo(path),
            lambda path: path.mkdir(),
        ):
            make(folder / name)
            for door, enter in doors(folder, table).items():
                trap.refused(enter, f"{name}: {door}")
            (folder / name).rmdir() if (folder / name).is_dir() else (folder / name).unlink()


def test_commands_tell_one_line_about_a_hostile_estimator(
    trap: Trap,  # noqa: F811
    folders: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = trap.folder / "rows.csv"
    table.write_text("a,b,c,d,y\n1,2,3,4,cat\n")
    for what in ("fields of control characters", "a class of control characters", "sums of sums of sums", "a builtin"):
        folder = str(written(folders[HOSTILE[what][0]], trap.folder / "saved", HOSTILE[what][1]))
        for arguments in (
            ("info", folder), ("predict", folder, str(table)), ("validate", folder), ("compare", folder, folder),
            ("validate", folder, "--data", str(table), "--target", "y"), ("report", folder), ("export", folder),
            ("push", folder, f"local-dir:{trap.folder}/out"), ("ship", folder), ("results", folder),
        ):  # fmt: skip
            assert main(list(arguments)) == 1, arguments
            told = capsys.readouterr().err
            assert told.startswith("error: "), arguments
            assert told.count("\n") == 1, arguments
            assert "\x1b" not in told
    assert not trap.canary.exists()


def test_what_an_estimator_says_of_itself_is_shown_as_text(
    trap: Trap,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Names of columns and classes are of whoever made the table."""
    X, y = rows()
    estimator = GRBFClassifier(solver="adam", n_centers=5, max_iter=2, random_state=0).fit(
        X, np.where(y > 0, "<b>|`x`", "\x1b[2J")
    )
    estimator.feature_names_in_ = np.array(["<script>", "a|b", "`c`", "d\x1b[2J"], dtype=object)
    folder = zoo.save_pretrained(estimator, trap.folder / "saved")
    assert main(["info", str(folder)]) == 0
    told = capsys.readouterr().out
    assert "\x1b" not in told
    assert main(["push", str(folder), f"local-dir:{trap.folder}/mirror"]) == 0
    card = (trap.folder / "mirror" / "README.md").read_text()
    assert "\x1b" not in card
    assert "<script>" not in card
    assert "<b>" not in card
