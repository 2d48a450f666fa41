"""SNNK on a pretrained text encoder: adapters against their peers, and feed-forward networks that are converted.

MiniLM-L6 is fine-tuned on the fine-food reviews. Every method works in the last two of its six layers, so that the
states below them are computed once; each has the same rows, the same epochs and two learning rates, of which the better
one on the validation part is run with three seeds and looked at on the test part.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.benchmarks.records import Records, markdown, mean_sd, put_section, surroundings
from zoo.data.text import fetch_minilm, load_reviews, split_rows, tokenize
from zoo.models.adapters import AdapterConfig, SavedModule, inject_adapters

__all__ = ["adapters"]

LENGTH, EPOCHS, BATCH, LAYERS = 64, 2, 32, 2
SEEDS = (0, 1, 2)


class Top(nn.Module):
    """The last layers of the encoder, the mean over tokens, and a classifier."""

    def __init__(self, layers: nn.ModuleList, width: int) -> None:
        super().__init__()
        self.layer = layers
        self.classifier = nn.Linear(width, 2)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """States (B, L, d) and mask (B, L) to logits (B, 2)."""
        weight = mask.to(hidden.dtype).unsqueeze(-1)
        return self.classifier((self.states(hidden, mask) * weight).sum(1) / weight.sum(1))

    def states(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """States behind the layers, (B, L, d)."""
        bias = torch.where(mask[:, None, None], 0.0, torch.finfo(hidden.dtype).min).to(hidden.dtype)
        for layer in self.layer:
            hidden = layer(hidden, bias)
        return hidden


class Reviews:
    """States below the trained layers, for training, validation and test rows."""

    def __init__(self, layers: int = LAYERS, length: int = LENGTH) -> None:
        from transformers import BertModel

        place = fetch_minilm()
        encoder = BertModel.from_pretrained(place, local_files_only=True, add_pooling_layer=False).eval()
        depth = len(encoder.encoder.layer) - layers
        self.width = encoder.config.hidden_size
        self.top = nn.ModuleList(encoder.encoder.layer[depth:])
        del encoder.encoder.layer[depth:]
        train, test = load_reviews()
        first, second = split_rows(train.targets, 0.2)
        self.states: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        rows = {"train": (train, first), "val": (train, second), "test": (test, range(len(test.texts)))}
        for part, (texts, chosen) in rows.items():
            ids = tokenize([texts.texts[i] for i in chosen], place / "tokenizer.json", length)
            with torch.no_grad():
                found = [encoder(i, (i > 0).long()).last_hidden_state.half() for i in ids.split(64)]
            self.states[part] = torch.cat(found), ids > 0, texts.targets[torch.as_tensor(list(chosen))]

    def fresh(self, seed: int) -> Top:
        """The pretrained top with a fresh classifier."""
        torch.manual_seed(seed)
        return Top(copy.deepcopy(self.top), self.width)

    @torch.no_grad()
    def through(self, layers: nn.ModuleList) -> Reviews:
        """The same rows behind frozen layers, with nothing left on top."""
        above = copy.copy(self)
        above.top, above.states = nn.ModuleList(), {}
        run = Top(layers, self.width).eval()
        for part, (hidden, mask, y) in self.states.items():
            pairs = zip(hidden.split(128), mask.split(128), strict=True)
            above.states[part] = torch.cat([run.states(h.float(), m).half() for h, m in pairs]), mask, y
        return above

    def accuracy(self, top: nn.Module, part: str) -> float:
        """Share of the rows that are classified rightly."""
        hidden, mask, y = self.states[part]
        top.eval()
        with torch.no_grad():
            found = [top(h.float(), m).argmax(-1) for h, m in zip(hidden.split(128), mask.split(128), strict=True)]
        return float((torch.cat(found) == y).double().mean())


# ---- methods -----------------------------------------------------------------------------------------------


def _head(top: Top, seed: int) -> int:
    top.requires_grad_(False)
    top.classifier.requires_grad_(True)
    return 0


def _full(top: Top, seed: int) -> int:
    return sum(p.numel() for p in top.layer.parameters())


def _adapter(**options: Any) -> Callable[[Top, int], int]:
    def prepare(top: Top, seed: int) -> int:
        inject_adapters(top, AdapterConfig(modules_to_save=("classifier",), seed=seed, **options))
        return _trained(top)

    return prepare


def _lora(top: Top, seed: int) -> int:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules=["query", "value"])
    inject_adapter_in_model(config, top)
    top.classifier.requires_grad_(True)
    return _trained(top)


def _trained(top: Top) -> int:
    """Parameters that are trained, without those of the classifier."""
    head = top.classifier
    own = head.adapters["default"] if isinstance(head, SavedModule) else head
    return sum(p.numel() for p in top.parameters() if p.requires_grad) - sum(p.numel() for p in own.parameters())


#: Method -> how it is prepared, and the learning rates tried.
METHODS: dict[str, tuple[Callable[[Top, int], int], tuple[float, float]]] = {
    "head only": (_head, (1e-2, 3e-2)),
    "Houlsby, r = 32": (_adapter(form="houlsby", bottleneck=32), (1e-3, 3e-3)),
    "SNNK vector, m = 16": (_adapter(form="vector", num_features=16), (3e-3, 1e-2)),
    "LoRA (PEFT), q and v, r = 8": (_lora, (1e-3, 3e-3)),
    "full, last two layers": (_full, (1e-4, 3e-4)),
}


def train(top: nn.Module, data: Reviews, rate: float, seed: int, epochs: int = EPOCHS) -> None:
    """AdamW on cross-entropy, linear warm-up over a tenth and linear decay."""
    hidden, mask, y = data.states["train"]
    draw = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # dropout
    trained = [p for p in top.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)
    total = epochs * math.ceil(len(y) / BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / (0.1 * total), 1 - s / total))
    top.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(y), generator=draw).split(BATCH):
            loss = F.cross_entropy(top(hidden[rows].float(), mask[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()


def adapters(folder: Path) -> Iterator[str]:
    """SNNK adapters, Houlsby adapters, LoRA, head only and full fine-tuning of the last two layers of MiniLM.

    What has been measured is not measured again.
    """
    records = Records(
        folder / "snnk_adapters.csv", ["method", "rate", "seed"], ["parameters", "validation", "test", "cpu_seconds"]
    )
    data: list[Reviews] = []

    def measure(method: str, rate: float, seed: int) -> str | None:
        key = {"method": method, "rate": rate, "seed": seed}
        if key in records:
            return None
        if not data:
            data.append(Reviews())
        prepare, _ = METHODS[method]
        if prepare is _head and len(data) < 2:
            data.append(data[0].through(data[0].top))
        rows = data[1] if prepare is _head else data[0]
        top = rows.fresh(seed)
        parameters = prepare(top, seed)
        start = time.process_time()
        train(top, rows, rate, seed)
        spent = time.process_time() - start
        found = {part: rows.accuracy(top, part) for part in ("val", "test")}
        records.add({**key, "parameters": parameters, "validation": found["val"], "test": found["test"],
                     "cpu_seconds": spent})  # fmt: skip
        return f"{method}, rate {rate:g}, seed {seed}: validation {found['val']:.3f} ({spent:.0f} s)"

    rows = []
    for method, (_, rates) in METHODS.items():
        yield from filter(None, (measure(method, rate, SEEDS[0]) for rate in rates))
        best = max(rates, key=lambda r: records.numbers("validation", method=method, rate=r, seed=SEEDS[0])[0])
        yield from filter(None, (measure(method, best, seed) for seed in SEEDS))
        test = records.numbers("test", method=method, rate=best)
        parameters = int(records.numbers("parameters", method=method, rate=best)[0])
        error = statistics.stdev(test) / math.sqrt(len(test))
        rows.append([method, f"{parameters:,}", f"{best:g}", mean_sd(test), f"{error:.4f}"])
    table = markdown(
        ["method", "trained, without the head", "rate", "test accuracy, mean (sd)", "standard error"], rows
    )
    put_section(folder.parent / "RESULTS.md", "snnk adapters", f"""
## SNNK: adapters on a pretrained encoder

`python -m zoo benchmark snnk adapters`. MiniLM-L6 on the fine-food reviews: 3,200 rows to train, 800 to choose between
two learning rates, 1,000 to test; {len(SEEDS)} seeds, {EPOCHS} epochs, {LENGTH} tokens, mean pooling; every method works
in the last two of six layers (adapters at four places). TF-IDF with logistic regression has 0.809 there. {surroundings()}.

{table}
""")  # fmt: skip
    yield table
