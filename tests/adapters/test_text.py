"""Fine-tuning of a text encoder: a tiny one, on reviews of which one word decides the class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file, save_file

import zoo
from tests.data.test_text import folder, table  # noqa: F401 (a fixture)
from zoo.adapters.text import TUNINGS
from zoo.data import DataError, FoodReviews
from zoo.data.prepare import prepare
from zoo.registry.checkpoints import CheckpointError
from zoo.support import inputs
from zoo.tasks import ClassificationTask, OptionError, load_task
from zoo.tools.errors import ToolError
from zoo.tools.evaluation import evaluate
from zoo.tools.info import example
from zoo.tools.prediction import predict
from zoo.training.run import run

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

OPTIMIZER = {"opt": "adamw", "lr": 0.03, "weight_decay": 0.0}


def tiny(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    return zoo.create_model("test_minilm", **kwargs)


@pytest.fixture
def reviews(folder: Path, monkeypatch: pytest.MonkeyPatch) -> FoodReviews:  # noqa: F811
    """Reviews with a tokenizer and an encoder of eight words."""
    monkeypatch.setattr("zoo.data.text.read_rdataset", table)
    save_file(tiny(tuning="head").bert.state_dict(), folder / "minilm" / "model.safetensors")
    return FoodReviews(root=folder, download=False, max_length=8, batch_size=5, val_fraction=0.25)


@pytest.mark.parametrize("tuning", TUNINGS)
def test_every_tuning_learns_and_trains_only_what_it_should(tuning: str, reviews: FoodReviews, tmp_path: Path) -> None:
    if tuning == "lora":
        pytest.importorskip("peft")
    task = ClassificationTask({"model_name": "test_minilm", "tuning": tuning}, OPTIMIZER)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", devices=1, max_epochs=6, enable_checkpointing=False, **quiet)
    encoder = load_file(reviews.encoder)
    trainer.fit(task, datamodule=reviews)
    assert trainer.test(task, datamodule=reviews, verbose=False)[0]["test/acc"] == 1.0

    trained = {name for name, p in task.model.named_parameters() if p.requires_grad}
    assert {"classifier.weight", "classifier.bias"} <= trained
    marks = {"snnk": ".adapters.", "houlsby": ".adapters.", "lora": ".lora_", "full": "bert.", "head": "classifier"}
    assert all(marks[tuning] in name or name.startswith("classifier") for name in trained)
    assert (len(trained) > 2) == (tuning != "head")
    state = {k.replace(".base_layer.", ".").removeprefix("bert."): v for k, v in task.model.state_dict().items()}
    moved = [name for name, value in encoder.items() if not torch.equal(state[name], value)]
    assert bool(moved) == (tuning == "full")

    trainer.save_checkpoint(tmp_path / "run.ckpt")
    described = {"class_names": reviews.class_names, "preprocessing": reviews.preprocessing}
    zoo.save_pretrained(task.model, tmp_path / "model", **described)
    tokens = example(task.model, 3)
    task.eval()
    loaded = zoo.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    for again in (loaded, load_task(tmp_path / "run.ckpt")):
        torch.testing.assert_close(again.eval()(tokens), task(tokens), rtol=0, atol=0)


def test_the_tokenizer_travels_with_the_model(
    reviews: FoodReviews, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained with a tokenizer of `data.root`, which is not the cache: prediction uses that one, or refuses."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    data = {"_target_": "zoo.data.FoodReviews", "root": str(reviews.root), "download": False, "max_length": 8}
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    run(
        output_dir=str(tmp_path / "run"),
        name="reviews",
        model={"model_name": "test_minilm", "tuning": "head", "num_classes": None},
        data={**data, "batch_size": 5},
        task={"_target_": "zoo.tasks.ClassificationTask"},
        trainer={"_target_": "lightning.Trainer", "accelerator": "cpu", "devices": 1, "max_epochs": 1, **quiet},
        optimizer=OPTIMIZER,
    )
    carried, file = tmp_path / "run" / "model" / "tokenizer.json", tmp_path / "x.txt"
    file.write_text("Good tea.")
    reviews.setup()
    loaded = zoo.create_model(f"local-dir:{carried.parent}", pretrained=True).eval()
    (tokens,) = prepare(file, loaded.input_record, carried.parent)
    assert tokens.tolist() == [[2, 4, 6, 7, 3, 0, 0, 0]]
    best = loaded(tokens).softmax(-1).max().item()
    (found,) = predict(str(tmp_path / "run"), [file])
    assert found["predictions"][0]["probability"] == pytest.approx(best, abs=1e-5)

    carried.write_text(carried.read_text().replace('"tea"', '"pie"'))  # another one
    with pytest.raises(ToolError, match=r"tokenizer that the model was trained with .* is not at .*tokenizer\.json"):
        predict(str(tmp_path / "run"), [file])
    carried.unlink()
    carried.symlink_to(reviews.model_files["tokenizer.json"])  # the right one, out of the folder
    with pytest.raises(ToolError, match="is not at"):
        predict(f"local-dir:{carried.parent}", [file])
    with pytest.raises(DataError, match="is not at"):
        prepare(file, loaded.input_record)
    cached = tmp_path / "empty" / "kernel-zoo" / "minilm"
    cached.mkdir(parents=True)
    (cached / "tokenizer.json").write_bytes(reviews.model_files["tokenizer.json"].read_bytes())
    assert torch.equal(prepare(file, loaded.input_record)[0], tokens)

    other = reviews.input_record() | {"tokenizer_sha256": "0" * 64}
    with pytest.raises(ToolError, match=r"the tokenizer in .* is not that of the training \(sha256 000000000000"):
        evaluate({"name": "x", "data": {"config": data}, "input": other}, loaded)
    task = ClassificationTask({"model_name": "test_minilm"}, OPTIMIZER)
    task.model.input_record = inputs.check(reviews.input_record())
    task._trainer = L.Trainer(accelerator="cpu", logger=False, **quiet)
    task.on_load_checkpoint({"zoo": {"input": reviews.input_record()}})
    with pytest.raises(OptionError, match="another tokenizer than the checkpoint"):
        task.on_load_checkpoint({"zoo": {"input": other}})


def test_padding_changes_nothing() -> None:
    model = tiny().eval()
    tokens = torch.tensor([[2, 4, 6, 3, 0, 0, 0, 0], [2, 5, 6, 7, 7, 3, 0, 0]])
    with torch.no_grad():
        together = model(tokens)
        torch.testing.assert_close(model(tokens[:1, :4]), together[:1])
        torch.testing.assert_close(model(tokens[:, :6]), together)
        assert model.forward_head(model.forward_features(tokens), pre_logits=True).shape == (2, 16)
        model.reset_classifier(0)
        assert model(tokens).shape == (2, 16)
        model.reset_classifier(3)
        assert model(tokens).shape == (2, 3)


def test_few_parameters_are_trained() -> None:
    model = zoo.create_model("minilm_l6", device="meta", tuning_args={"layers_to_transform": [-2, -1]})
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 2 * 2 * 17 * 384 + 2 * 385  # layers x places x (m + 1) d, and the classifier
    assert sum(p.numel() for p in model.parameters()) > 22_000_000


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean snnk"):
        tiny(tuning="snkn")
    with pytest.raises(ValueError, match="unknown entry 'num_feature'"):
        tiny(tuning_args={"num_feature": 3})
    with pytest.raises(ValueError, match="has no adapters"):
        tiny(tuning="head", tuning_args={"r": 3})
    other = tiny(vocab_size=9)
    save_file(other.bert.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"word_embeddings\.weight is missing or of another shape"):
        tiny().load_encoder(tmp_path / "other.safetensors")
