"""`python -m zoo`: quick, lazy, and clear about what it can do; the records that measurements are kept in."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import ROOT
from zoo.benchmarks import measurements
from zoo.cli import main
from zoo.results.records import Records, markdown, mean_sd, put_section


def test_listing_imports_nothing_heavy(capsys: pytest.CaptureFixture[str]) -> None:
    heavy = "{'torch', 'sklearn', 'numpy'}"
    code = f"import sys; from zoo.cli import main; main(['benchmark']); assert not {heavy} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    for family, entries in measurements().items():
        for name in entries:
            assert f"{family} {name}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "told"), [(["grbff"], "did you mean grbf"), (["grbf", "sped"], "did you mean speed")]
)
def test_mistakes_are_told(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["benchmark", *arguments])
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err


def test_every_measurement_exists() -> None:
    import importlib

    for entries in measurements().values():
        for entry in entries.values():
            assert callable(getattr(importlib.import_module(entry.module), entry.function))


def test_every_measurement_of_a_document_can_be_asked_for_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    from zoo.cli import measurements as module

    def asked(parser: Any, options: Any) -> int:
        entries = measurements()[options.family]
        for entry in [entries[options.name]] if options.name else entries.values():
            module._given(parser, options, getattr(importlib.import_module(entry.module), entry.function))
        return 0

    monkeypatch.setattr(module, "_benchmark", asked)
    documents = [ROOT / "README.md", ROOT / "RESULTS.md", *(ROOT / "docs").glob("*.md")]
    lines = [line for path in documents for line in re.findall(r"python -m zoo (benchmark [^`#\n]+)", path.read_text())]
    assert len(lines) > 20
    for line in lines:
        assert main(shlex.split(line)) == 0, line


def test_records_go_on_where_they_stopped(tmp_path: Path) -> None:
    records = Records(tmp_path / "x.csv", ("table", "fold"), ("score",))
    records.add({"table": "iris", "fold": 0, "score": 0.5})
    again = Records(tmp_path / "x.csv", ("table", "fold"), ("score",))
    assert {"table": "iris", "fold": 0} in again
    assert {"table": "iris", "fold": 1} not in again
    assert again.numbers("score", table="iris") == [0.5]
    with pytest.raises(ValueError, match="other columns"):
        Records(tmp_path / "x.csv", ("table",), ("score",))


def test_sections_replace_themselves_only(tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    put_section(path, "a", "first")
    put_section(path, "b", markdown(["x"], [[mean_sd([1.0, 2.0])]]))
    put_section(path, "a", "second")
    text = path.read_text()
    assert "first" not in text
    assert text.index("second") < text.index("1.500 (0.707)")


def test_interleaved_medians() -> None:
    from zoo.results.timing import interleaved

    found = interleaved({"none": lambda: None, "some": lambda: sum(range(20_000))}, rounds=3)
    assert 0 <= found["none"] < found["some"]


def test_steps_of_the_speed_benchmark_are_the_same_step() -> None:
    """What is timed must compute the same thing: the objective before a second step of Adam, from one start."""
    from zoo.benchmarks.grbf_speed import FORMS

    found = {name: float(make(32, 4, 3, steps=2)()) for name, make in FORMS.items()}
    assert found["module"] == pytest.approx(found["original"], rel=1e-5)
    assert found["solver"] == pytest.approx(found["original"], rel=1e-5)
    assert found["original"] != pytest.approx(float(FORMS["original"](32, 4, 3)()), rel=1e-5)


def finished_run(folder: Path, seed: int, accuracy: float, overrides: str = "[experiment=digits]") -> Path:
    (folder / ".hydra").mkdir(parents=True)
    (folder / "summary.json").write_text(f'{{"metrics": {{"test/acc": {accuracy}}}, "seconds": 10, "seed": {seed}}}')
    (folder / ".hydra" / "config.yaml").write_text(
        "name: digits\nmodel: {model_name: unireplknet_z}\ndata: {}\ntask: {}\n"
    )
    (folder / ".hydra" / "overrides.yaml").write_text(overrides)
    return folder


def test_results_puts_the_seeds_of_an_experiment_in_one_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("# x\n\n<!-- begin runs -->\n<!-- end runs -->\n\nthe rest\n")
    runs = [finished_run(tmp_path / str(seed), seed, 0.9 + seed / 10) for seed in (0, 1)]
    runs.append(finished_run(tmp_path / "other", 0, 0.5, "[experiment=digits, optimizer.lr=1]"))
    assert main(["results", *map(str, runs)]) == 0
    assert not (tmp_path / "RESULTS.md").exists(), "nothing is written unless it is asked for"
    assert "0.9500" not in (tmp_path / "README.md").read_text()
    capsys.readouterr()
    assert main(["results", "--write", *map(str, runs)]) == 0
    printed = capsys.readouterr().out
    assert "test/acc 0.9500 (0.0707) | 2 | 10 | `python train.py -m experiment=digits seed=0,1`" in printed
    assert "`python train.py experiment=digits optimizer.lr=1 seed=0`" in printed
    for name in ("README.md", "RESULTS.md"):
        assert "0.9500 (0.0707)" in (tmp_path / name).read_text()
    assert (tmp_path / "README.md").read_text().endswith("the rest\n")


def test_results_tells_what_is_not_a_run_and_what_is_there_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["results", "nowhere"]) == 1
    assert "nowhere is not the folder of a finished run" in capsys.readouterr().err
    twice = [finished_run(tmp_path / name, 0, 0.9) for name in ("a", "b")]
    assert main(["results", *map(str, twice)]) == 1
    assert "second run of digits with seed 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "ending"),
    [
        (["report", "no-such", "--out"], ".html or .htm"),
        (["compare", "no-such", "no-such", "--html"], ".html or .htm"),
        (["predict", "no-such", "x.csv", "--out"], ".png or .svg or .pdf"),
        (["figure", "kernels", "--model", "no-such", "--out"], ".png or .svg or .pdf"),
    ],
)
def test_a_file_of_another_kind_is_never_replaced(
    arguments: list[str], ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, right = tmp_path / "ok.csv", ending.split()[0]
    table.write_text("a,b\n1,2\n")
    (tmp_path / f"folder{right}").mkdir()
    for place, told in [
        (table, f"ok.csv: its name must end in {ending}"),
        (tmp_path / "ok", f"its name must end in {ending}"),
        (tmp_path / "a" / "b" / f"x{right}", "there is no folder"),
        (table / f"x{right}", "is not a folder"),
        (tmp_path / f"folder{right}", "it is a folder"),
    ]:
        assert main([*arguments, str(place)]) == 1
        assert told in (error := capsys.readouterr().err)
        assert error.count("\n") == 1
    assert table.read_text() == "a,b\n1,2\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"folder{right}", "ok.csv"]


def test_folders_to_write_into_are_checked_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    for command in (
        ["export", "no-such", "--out"],
        ["benchmark", "grbf", "speed", "--out"],
        ["ship", "no-such", "--folder"],
    ):
        for place, told in [("a/b", "there is no folder"), ("file", "is not a folder")]:
            assert main([*command, str(tmp_path / place)]) == 1
            assert told in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_pictures_are_of_the_kind_that_their_names_say(tmp_path: Path) -> None:
    for suffix, begins in {".png": b"\x89PNG", ".svg": b"<?xml", ".PDF": b"%PDF"}.items():
        out = tmp_path / "new" / f"x{suffix}"
        assert main(["figure", "kernels", "--model", "test_unireplknet", "--count", "1", "--out", str(out)]) == 0
        assert out.read_bytes().startswith(begins)


def test_sizes_that_do_not_go_are_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert main(["info", "test_unireplknet", "--size", "1"]) == 0, "an image of one pixel is no table"
    for model, size in (("test_unireplknet", "100000000"), ("test_vit", "100")):
        capsys.readouterr()
        assert main(["info", model, "--size", size]) == 1
        told = capsys.readouterr().err
        assert f"takes no images of {size} pixels here: " in told
    for words in (["info", "grbf.wine"], ["export", "snnk_mlp2.digits", "--out", str(tmp_path / "out")]):
        capsys.readouterr()
        assert main([*words, "--size", "12"]) == 1
        assert "and no other size: leave out size = 12" in capsys.readouterr().err
        assert told.count("\n") == 1
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")):

        def fail(*args: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("zoo.tools.info.describe", fail)
        assert main(["info", "grbf"]) == 1
        assert capsys.readouterr().err == "error: there is not enough memory for this\n"
    monkeypatch.setattr("zoo.tools.info.describe", lambda *args: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):  # a mistake of the zoo's own
        main(["info", "grbf"])


def test_folders_of_something_else_keep_their_files(tmp_path: Path) -> None:
    import zoo
    from zoo.registry.checkpoints import CheckpointError
    from zoo.tools.errors import ToolError
    from zoo.tools.export import export
    from zoo.tools.hub import push

    def kept(write: Callable[[], object], error: type[Exception], told: str) -> None:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(error, match=told):
            write()
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    model = zoo.create_model("test_grbf", num_classes=3, in_chans=5)
    for content in ('{"model_type": "bert", "architectures": ["Bert"]}', "[1]", "{", '{"architecture": 3}'):
        (tmp_path / "config.json").write_text(content)
        (tmp_path / "model.safetensors").write_text("another model")
        for write in (lambda: zoo.save_pretrained(model, tmp_path), lambda: push("grbf.wine", f"local-dir:{tmp_path}")):
            kept(write, CheckpointError, "is not the configuration of a model and stays")
    (tmp_path / "config.json").unlink()
    (tmp_path / "README.md").write_text("mine")
    kept(lambda: push("grbf.wine", f"local-dir:{tmp_path}"), ToolError, r"holds a README\.md and no model")
    (tmp_path / "model.onnx").write_text("mine")
    kept(lambda: export(model, tmp_path), ToolError, r"holds model\.onnx, which no export wrote")
    (tmp_path / "model.safetensors").write_text("mine")
    kept(lambda: zoo.save_pretrained(model, tmp_path), CheckpointError, r"model\.safetensors is not of a model that")


def test_a_saved_model_is_replaced_and_what_others_put_beside_it_is_not(tmp_path: Path) -> None:
    import zoo
    from zoo.registry.checkpoints import CheckpointError
    from zoo.tools.errors import ToolError
    from zoo.tools.hub import push

    place, readme = f"local-dir:{tmp_path / 'mirror'}", tmp_path / "mirror" / "README.md"
    push("grbf.wine", place)
    card = readme.read_text()
    with pytest.raises(CheckpointError, match="holds another model, 'grbf', which is no earlier push of this one"):
        push("grbf.diabetes", place)
    assert readme.read_text() == card
    assert "# grbf.wine" in card
    for text in ("MY OWN", card.replace("trained on", "never trained on"), card[:-80], f"{card}\nMy notes.\n", "\x00"):
        readme.write_text(text)
        with pytest.raises(ToolError, match=r"README\.md is not a card as the zoo wrote it and stays"):
            push("grbf.wine", place)
        assert readme.read_text() == text
        assert json.loads((tmp_path / "mirror" / "config.json").read_text())["architecture"] == "grbf"
    readme.write_bytes(card.replace("\n", "\r\n").encode())  # as some systems check it out
    push("grbf.wine", place)
    readme.write_text(readme.read_text().partition("\n<!-- ")[0])  # as earlier versions wrote it
    push("grbf.wine", place)
    assert "<!-- written by Kernel Zoo" in readme.read_text()
    (tmp_path / "victim").write_text("victim")
    readme.unlink()
    readme.symlink_to("../victim")
    with pytest.raises(ToolError, match="stays"):
        push("grbf.wine", place)
    readme.unlink()
    weights = tmp_path / "mirror" / "model.safetensors"
    weights.unlink()
    weights.symlink_to("../victim")
    model = zoo.create_model("test_grbf", num_classes=3, in_chans=5)
    with pytest.raises(CheckpointError, match="stays"):
        zoo.save_pretrained(model, tmp_path / "mirror")
    assert weights.is_symlink()
    assert (tmp_path / "victim").read_text() == "victim"
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "config.json").write_text('{"architecture": "resnet18", "pretrained_cfg": {}}')
    with pytest.raises(CheckpointError, match="was not written by the zoo and stays"):
        zoo.save_pretrained(model, tmp_path / "timm")


def test_a_folder_holds_one_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zoo
    from zoo.registry.checkpoints import CheckpointError
    from zoo.tools import export as module
    from zoo.tools.errors import ToolError

    def content() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    model, count = zoo.create_model("test_grbf", num_classes=3, in_chans=5), iter(range(99))
    for name in ("_write_program", "_write_onnx"):  # exporting itself is slow, and tested elsewhere
        monkeypatch.setattr(module, name, lambda program, inputs: module.writer_of(f"{next(count)}".encode()))
    monkeypatch.setattr(module, "_program", lambda network, inputs: network)

    def run(kind: str, path: Path, batches: dict[int, tuple[torch.Tensor, ...]]) -> dict[int, np.ndarray]:
        with torch.no_grad():
            return {n: model.eval()(*inputs).numpy() for n, inputs in batches.items()}

    monkeypatch.setattr(module, "_run", run)
    module.export(model, tmp_path)
    before = content()
    assert sorted(before) == ["deployment.json", "model.onnx", "model.pt2"]
    with pytest.raises(ToolError, match=r"holds model\.onnx of an earlier export, which this one would leave there"):
        module.export(model, tmp_path, ("program",))
    assert content() == before
    told = json.loads(before["deployment.json"])
    (tmp_path / "model.int8.onnx").write_bytes(b"small")
    with pytest.raises(ToolError, match=r"holds model\.int8\.onnx, which no export wrote"):
        module.export(model, tmp_path)
    told["int8"] = module._entry(tmp_path / "model.int8.onnx")
    (tmp_path / "deployment.json").write_text(json.dumps(told))
    module.export(model, tmp_path)
    assert sorted(content()) == ["deployment.json", "model.onnx", "model.pt2"], "int8 was of the file before"
    (tmp_path / "model.pt2").write_bytes(b"mine")
    with pytest.raises(ToolError, match=r"holds model\.pt2, which no export wrote"):
        module.export(model, tmp_path)
    assert (tmp_path / "model.pt2").read_bytes() == b"mine"
    for path in tmp_path.iterdir():
        path.unlink()
    module.export(model, tmp_path)
    before, model = content(), zoo.create_model("test_grbf", num_classes=3, in_chans=4)
    with pytest.raises(ToolError, match="holds the export of another model, 'GaussianRBFNetwork', which has other inp"):
        module.export(model, tmp_path)
    assert content() == before
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text("{}")
    for place in ("run", "run/model"):
        with pytest.raises(CheckpointError, match="is in the folder of a run"):
            module.export(model, tmp_path / place)
