"""SNNK on a pretrained text encoder: adapters against other methods, and converted feed-forward networks.

MiniLM-L6 is fine-tuned on the fine-food reviews. All methods use the last three of its six layers, so that the states
below are computed once, with the same rows and epochs. The learning rate with the best short trial on the validation
part, on a grid that brackets it, is run with three seeds and tested.
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

from zoo.adapters import AdapterConfig, SavedModule, inject_adapters
from zoo.adapters.conversion import convert_feed_forward, feed_forwards
from zoo.adapters.text import TUNINGS
from zoo.benchmarks import measurement
from zoo.benchmarks.tuning import bracketed
from zoo.data.text import fetch_minilm, load_reviews, split_rows, tokenize
from zoo.kernels.random_features import ReLUFeatures
from zoo.results.records import Provenance, Records, markdown, mean_sd, put_section

__all__ = ["adapters", "conversion"]

TEXT = ("zoo/adapters", "zoo/kernels/random_features")
LENGTH, EPOCHS, BATCH, LAYERS = 128, 1, 8, 3
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
        """Outputs of the layers, (B, L, d)."""
        bias = torch.where(mask[:, None, None], 0.0, torch.finfo(hidden.dtype).min).to(hidden.dtype)
        for layer in self.layer:
            hidden = layer(hidden, bias)
        return hidden


class Reviews:
    """Encoder states below the trained layers, for training, validation and test rows."""

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
            mask = ids > 0
            found = torch.zeros(*ids.shape, self.width, dtype=torch.half)
            for some, kept in _batches_by_length(mask, 64):
                with torch.no_grad():
                    states = encoder(ids[some, :kept], mask[some, :kept].long()).last_hidden_state
                found[some, :kept] = states.half()
            self.states[part] = found, mask, texts.targets[torch.as_tensor(list(chosen))]

    def fresh(self, seed: int) -> Top:
        """A copy of the pretrained top layers with a new classifier."""
        torch.manual_seed(seed)
        return Top(copy.deepcopy(self.top), self.width)

    @torch.no_grad()
    def through(self, layers: nn.ModuleList) -> Reviews:
        """The same rows after frozen layers, without top layers."""
        above = copy.copy(self)
        above.top, above.states = nn.ModuleList(), {}
        run = Top(layers, self.width).eval()
        for part, (hidden, mask, y) in self.states.items():
            pairs = zip(hidden.split(128), mask.split(128), strict=True)
            above.states[part] = torch.cat([run.states(h.float(), m).half() for h, m in pairs]), mask, y
        return above

    def accuracy(self, top: nn.Module, part: str) -> float:
        """Accuracy on a part."""
        hidden, mask, y = self.states[part]
        top.eval()
        right = 0
        for some, kept in _batches_by_length(mask, 128):
            with torch.no_grad():
                found = top(hidden[some, :kept].float(), mask[some, :kept]).argmax(-1)
            right += int((found == y[some]).sum())
        return right / len(y)


def _batches_by_length(mask: Tensor, count: int) -> Iterator[tuple[Tensor, int]]:
    """Batches of row indices, sorted by length to reduce padding, and the largest length of each."""
    length = mask.sum(1)
    for rows in length.argsort().split(count):
        yield rows, int(length[rows].max())


# ---- methods -----------------------------------------------------------------------------------------------


def _head(top: Top, seed: int) -> int:
    top.requires_grad_(False)
    top.classifier.requires_grad_(True)
    return 0


def _full(top: Top, seed: int) -> int:
    return sum(p.numel() for p in top.layer.parameters())


def _adapter(tuning: str) -> Callable[[Top, int], int]:
    def prepare(top: Top, seed: int) -> int:
        config = AdapterConfig(modules_to_save=("classifier",), seed=seed, **TUNINGS[tuning])
        states = torch.zeros(1, 4, top.classifier.in_features)
        inject_adapters(top, config, example=(states, torch.ones(1, 4, dtype=torch.bool)))
        return _trained(top)

    return prepare


def _lora(top: Top, seed: int) -> int:
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(**TUNINGS["lora"]), top)
    top.classifier.requires_grad_(True)
    return _trained(top)


def _trained(top: Top) -> int:
    """Number of trained parameters without the classifier."""
    head = top.classifier
    own = head.adapters["default"] if isinstance(head, SavedModule) else head
    return sum(p.numel() for p in top.parameters() if p.requires_grad) - sum(p.numel() for p in own.parameters())


#: Method -> function that prepares the model, and initial grid of learning rates.
METHODS: dict[str, tuple[Callable[[Top, int], int], tuple[float, float]]] = {
    "head only": (_head, (3e-3, 1e-2)),
    "Houlsby, r = 32": (_adapter("houlsby"), (1e-3, 3e-3)),
    "SNNK vector, m = 16": (_adapter("snnk"), (3e-3, 1e-2)),
    "LoRA (PEFT), q and v, r = 8": (_lora, (1e-3, 3e-3)),
    "all of these layers": (_full, (5e-5, 2e-4)),
}


def train(top: nn.Module, data: Reviews, rate: float, seed: int, epochs: int = EPOCHS) -> None:
    """Train with AdamW, cross-entropy, linear warm-up over a tenth and linear decay."""
    hidden, mask, y = data.states["train"]
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # dropout
    trained = [p for p in top.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)
    total = epochs * math.ceil(len(y) / BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / (0.1 * total), 1 - s / total))
    top.train()
    length = mask.sum(1)
    for _ in range(epochs):
        for batch in _batches(length, generator):
            kept = int(length[batch].max())
            loss = F.cross_entropy(top(hidden[batch, :kept].float(), mask[batch, :kept]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()


def _batches(length: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Random batches of rows of similar length, in random order."""
    groups = torch.randperm(len(length), generator=generator).split(10 * BATCH)
    batches = [b for g in groups for b in g[length[g].argsort()].split(BATCH)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


TFIDF = "TF-IDF of words and pairs, logistic regression"


def _tfidf(records: Records) -> float:
    """Test accuracy without a pretrained network; the penalty is chosen on the validation part."""
    key = {"method": TFIDF, "rows": "all", "rate": "", "seed": ""}
    if key not in records:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression

        train, test = load_reviews()
        first, second = split_rows(train.targets, 0.2)
        vectors = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
        x = vectors.fit_transform([train.texts[i] for i in first])
        y, z = train.targets[torch.as_tensor(first)].numpy(), train.targets[torch.as_tensor(second)].numpy()
        start = time.process_time()
        models = [LogisticRegression(C=c, max_iter=1000).fit(x, y) for c in (1, 3, 10)]
        validation = vectors.transform([train.texts[i] for i in second])
        best = max(models, key=lambda m: m.score(validation, z))
        score = best.score(vectors.transform(test.texts), test.targets.numpy())
        found = {"parameters": best.coef_.size, "validation": best.score(validation, z), "test": score}
        records.add({**key, **found, "cpu_seconds": time.process_time() - start})
    return records.numbers("test", **key)[0]


@measurement("snnk", "adapters", "adapters on a text encoder")
def adapters(folder: Path) -> Iterator[str]:
    """SNNK adapters, Houlsby adapters, LoRA, head only and full fine-tuning of the last three layers of MiniLM."""
    keys = ["method", "rows", "rate", "seed"]
    records = Records(folder / "snnk_adapters.csv", keys, ["parameters", "validation", "test", "cpu_seconds"])
    data: list[Reviews] = []

    def measure(method: str, rate: float, seed: int) -> str | None:
        key = {"method": method, "rows": "all", "rate": f"{rate:g}", "seed": seed}
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
        found, test = rows.accuracy(top, "val"), rows.accuracy(top, "test")
        records.add({**key, "parameters": parameters, "validation": found, "test": test, "cpu_seconds": spent})
        return f"{method}, rate {rate:g}, seed {seed}: validation {found:.3f} ({spent:.0f} s)"

    rows = [[TFIDF, "", "", f"{_tfidf(records):.3f}", ""]]
    for method, (_, rates) in METHODS.items():
        trials = {"method": method, "rows": "all", "seed": SEEDS[0]}
        told: list[str | None] = []

        def trial(rate: float, method: str = method, trials: Any = trials, told: Any = told) -> float:
            told.append(measure(method, rate, SEEDS[0]))
            return records.number("validation", **trials, rate=f"{rate:g}")

        best = bracketed(trial, rates)
        yield from filter(None, told)
        yield from filter(None, (measure(method, best, seed) for seed in SEEDS))
        whole = {"method": method, "rows": "all", "rate": f"{best:g}"}
        test = records.numbers("test", **whole)
        parameters = int(records.numbers("parameters", **whole)[0])
        error = statistics.stdev(test) / math.sqrt(len(test))
        rows.append([method, f"{parameters:,}", f"{best:g}", mean_sd(test), f"{error:.4f}"])
        source = Provenance(records.rows, TEXT)
        header = ["method", "trained, without the head", "rate", "test accuracy, mean (sd)", "standard error"]
        table = markdown(header, source.marked(rows, "method"))
        put_section(folder.parent / "RESULTS.md", "snnk adapters", f"{ADAPTERS}{source}\n\n{table}")
    yield table


ADAPTERS = f"""
## SNNK: adapters on a pretrained encoder

`python -m zoo benchmark snnk adapters`. MiniLM-L6 on the fine-food reviews: 3,200 rows to train, 800 to choose the
learning rate (in the same training with the first seed, on a grid that goes on until it brackets the best), 1,000 to
test; {len(SEEDS)} seeds, {EPOCHS} epoch of batches of {BATCH}, {LENGTH} tokens, mean pooling; every method works in
the last {LAYERS} of six layers.
"""


# ---- conversion --------------------------------------------------------------------------------------------

CONVERTED = (32, 128, 512)


def _svd(top: Top, m: int) -> None:
    """Truncate both matrices of every feed-forward network to the rank of equal cost, m d / (d + l)."""
    for ffn in feed_forwards(top):
        d, wide = ffn.first.in_features, ffn.first.out_features
        for layer in (ffn.first, ffn.second):
            U, S, Vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
            r = max(1, m * d // (d + wide))
            with torch.no_grad():
                layer.weight.copy_((U[:, :r] * S[:r]) @ Vh[:r])


def _linear_map(width: int, m: int, seed: int) -> ReLUFeatures:
    """Random projections without a nonlinearity: the threshold is below all values."""
    return ReLUFeatures(width, m, constant=-1e6, seed=seed)


@measurement("snnk", "conversion", "feed-forward networks of a text encoder, converted")
def conversion(folder: Path) -> Iterator[str]:
    """Convert the feed-forward networks of the last two layers: error and accuracy against m, with two baselines."""
    records = Records(folder / "snnk_conversion.csv", ["method", "m", "seed"], ["parameters", "error", "test"])
    methods = ("SNNK, least squares", "random projection, least squares", "truncated SVD")
    wanted = [("none", 0, s) for s in SEEDS] + [(n, m, s) for n in methods for m in CONVERTED for s in SEEDS]
    if any({"method": n, "m": m, "seed": s} not in records for n, m, s in wanted):
        data = Reviews(2)
        above = data.through(data.top)
        heads: dict[int, Top] = {}
        for method, m, seed in wanted:
            if {"method": method, "m": m, "seed": seed} in records:
                continue
            if seed not in heads:
                heads[seed] = above.fresh(seed)
                train(heads[seed], above, 1e-2, seed, 5)
            top = data.fresh(seed)
            top.classifier.load_state_dict(heads[seed].classifier.state_dict())
            records.add({"method": method, "m": m, "seed": seed, **_converted(top, data, method, m, seed)})
            yield f"{method}, m = {m}, seed {seed}: done"
    rows = []
    for method, m in dict.fromkeys((n, m) for n, m, _ in wanted):
        found = {c: records.numbers(c, method=method, m=m) for c in ("parameters", "error", "test")}
        rows.append([method, m, f"{int(found['parameters'][0]):,}", mean_sd(found["error"]), mean_sd(found["test"])])
    source, header = Provenance(records.rows, TEXT), ["method", "m", "parameters of both networks", "relative error"]
    table = markdown([*header, "test accuracy"], source.marked(rows, "method", "m"))
    put_section(folder.parent / "RESULTS.md", "snnk conversion", f"""
## SNNK: converting the feed-forward networks of a pretrained encoder

`python -m zoo benchmark snnk conversion`. MiniLM-L6 with a linear head on the fine-food reviews ({len(SEEDS)} seeds);
the feed-forward networks (384-1536-384) of its last two layers are replaced without any further training. SNNK and
random projections (the same, without the nonlinearity) are fitted on 600 training reviews; both matrices are folded to
one. The rank of the truncated SVD has the same cost a token. The error is that of the encoder's last states on 300 test
reviews, relative to their spread. {source}

{table}
""")  # fmt: skip
    yield table


def _converted(top: Top, data: Reviews, method: str, m: int, seed: int) -> dict[str, Any]:
    hidden, mask, _ = data.states["train"]
    rows = torch.randperm(len(hidden), generator=torch.Generator().manual_seed(seed))[:600]
    batches = [(hidden[r].float(), mask[r]) for r in rows.split(100)]
    original = copy.deepcopy(top).eval()
    if method == "truncated SVD":
        _svd(top, m)
        dense = feed_forwards(top)[0].first
        d, wide = dense.in_features, dense.out_features
        parameters = len(top.layer) * (2 * (m * d // (d + wide)) * (d + wide) + d + wide)
    elif method == "none":
        parameters = sum(p.numel() for f in feed_forwards(top) for k in (f.first, f.second) for p in k.parameters())
    else:
        build = _linear_map if method.startswith("random") else None
        report = convert_feed_forward(top, batches, num_features=m, seed=100 * seed, features=build)
        parameters = sum(c.after for c in report)
    top.eval()
    h, k = data.states["test"][0][:300].float(), data.states["test"][1][:300]
    with torch.no_grad():
        y, z = original.states(h, k)[k], top.states(h, k)[k]
    error = float((y - z).norm() / (y - y.mean(0)).norm())
    return {"parameters": parameters, "error": error, "test": data.accuracy(top, "test")}
