"""The plain yardstick is the same network, and the measurement tells what it measured."""

from __future__ import annotations

import csv
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from zoo.benchmarks.models import BenchmarkError, Cell, _built, _compare, inference, lively, training
from zoo.cli import main
from zoo.models.deploy import to_deploy
from zoo.ops import reference
from zoo.registry.factory import create_model


@pytest.mark.parametrize("deploy", [False, True])
def test_plain_form_is_the_same_function(deploy: bool) -> None:
    model = lively(create_model("test_unireplknet")).double().eval()
    model = to_deploy(model) if deploy else model
    images = torch.randn(2, 3, 64, 48, dtype=torch.float64)
    with reference():
        plain = model(images)
    torch.testing.assert_close(plain, model(images), rtol=1e-12, atol=1e-12)


def test_plain_form_trains_alike() -> None:
    model = lively(create_model("test_unireplknet")).double().train()
    images, found = torch.randn(4, 3, 64, 64, dtype=torch.float64), []
    for mode in (reference(), nullcontext()):
        model.zero_grad()
        with mode:
            model(images).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], rtol=1e-8, atol=1e-8)


def test_a_model_without_plain_form_is_refused() -> None:
    with pytest.raises(BenchmarkError, match="has no plain form"):
        list(training(Path(), models=["test_convnext"], size=32, batch=2))


def test_inference_is_measured_told_and_kept(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    models = ["test_unireplknet", "test_convnext"]
    lines = list(inference(tmp_path / "results", models, batch=2, size=32, threads=[1, 2], rounds=2))
    assert torch.get_num_threads() == before
    with (tmp_path / "results" / "models_inference.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (6 + 2)
    assert {row["threads"] for row in rows} == {"1", "2"}
    assert all(float(row["ms"]) > 0 and row["n"] == "2" and "torch" in row["machine"] for row in rows)
    assert sum(float(row["times"]) == 1 for row in rows if row["form"] == "plain deploy") >= 2
    assert all(row["times"] == "" for row in rows if row["model"] == "test_convnext")
    table = (tmp_path / "RESULTS.md").read_text()
    assert "zoo deploy" in table
    options = "--models test_unireplknet test_convnext --batch 2 --size 32 --rounds 2 --threads 1 2"
    assert f"`python -m zoo benchmark models inference {options}`" in table
    assert "2 interleaved rounds" in table
    assert "best against best" in table.lower()
    assert "models_inference.csv" in lines[-1]


def test_training_is_measured(tmp_path: Path) -> None:
    list(training(tmp_path / "results", ["test_unireplknet"], batch=2, size=64, threads=[1], rounds=1))
    with (tmp_path / "results" / "models_training.csv").open() as file:
        forms = [(row["form"], row["layout"]) for row in csv.DictReader(file)]
    assert forms == [(form, layout) for form in ("plain", "zoo") for layout in ("NCHW", "channels_last")]


def test_a_measured_network_does_not_depend_on_what_was_drawn_before() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = _built("test_unireplknet").state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    second = _built("test_unireplknet").state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_gradients_that_would_be_rounding_are_not_compared(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"2 values of each channel.*--batch or --size"):
        list(training(tmp_path, ["test_unireplknet"], batch=2, size=32, threads=[1], rounds=1))


def test_forms_that_differ_are_not_timed() -> None:
    results = {Cell("m", "plain", "NCHW"): torch.ones(3), Cell("m", "zoo", "NCHW"): torch.tensor([1.0, 1.0, 1.1])}
    with pytest.raises(BenchmarkError, match=r"m, zoo, NCHW differs from m, plain, NCHW by 1\.0e-01"):
        _compare(results, 1e-4)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["models", "inference", "--models", "unireplknet_aa"], "did you mean unireplknet_a"),
        (["models", "training", "--compile"], "models training has no option --compile"),
        (["grbf", "speed", "--batch", "3"], "grbf speed has no option --batch"),
        (["models", "inference", "--rounds", "0"], "'0' is not a whole number above 0"),
        (["models", "inference", "--device", "gpu"], "'gpu' is neither cpu nor cuda"),
        (["model"], "did you mean models"),
    ],
)
def test_mistakes_are_told(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    try:
        status = main(["benchmark", *arguments, "--out", str(tmp_path)])
    except SystemExit as ended:
        status = ended.code  # type: ignore[assignment]
    assert status in (1, 2)
    assert told in capsys.readouterr().err
