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
from zoo.data import FoodReviews
from zoo.registry.checkpoints import CheckpointError
from zoo.tasks import ClassificationTask, load_task
from zoo.tools.info import example

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
