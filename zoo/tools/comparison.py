"""Comparison of two models on one data set: accuracy, agreement and time.

>>> compare("unireplknet_z.mnist5k", "unireplknet_z.digits")["b"]["accuracy"]
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.data.checks import DataError
from zoo.data.twins import told_of, twins
from zoo.results.timing import interleaved_times
from zoo.support.inputs import in_units
from zoo.tools.errors import ToolError
from zoo.tools.evaluation import Places, batches, build_data, load, part_of, record_of

__all__ = ["compare", "outputs_of"]


def compare(a: str, b: str, data: str | None = None, rounds: int = 9, root: Places | None = None) -> dict[str, Any]:
    """Evaluate two models on the same test rows (or validation rows, if the data have no test), and time them
    alternately.

    Args:
        a: A shipped weight, or the folder of a run or of a saved model.
        b: Another one with the same classes, in the same order.
        data: Model whose data set is used; the first one with data on record by default. Images are resized and
            normalised by each model's record.
        rounds: Timed calls of each model, on one batch of 32.
        root: Where the data is, see :func:`zoo.tools.evaluation.build_data`.

    Returns:
        `a` and `b`, each with `name`, `parameters`, `ms` (median CPU time per input), and `accuracy` or `rmse` and
        `r2`; `agreement`; of classifiers `only_a`, `only_b` (rows that only one has right) and `p` (exact sign test on
        those rows); `n`, `data`, `part`; `notes`, whether one was trained on these rows; and the arrays `outputs_a`,
        `outputs_b`, `targets`.

    Raises:
        ToolError: The models have different classes or inputs, or no data on record.
    """
    records = [record_of(a, data=False), record_of(b, data=False)]
    names = [records[0]["class_names"], records[1]["class_names"]]
    if names[0] != names[1]:
        shown = [", ".join(n[:4]) + (", ..." if len(n) > 4 else "") or "values" for n in names]
        raise ToolError(f"{a} answers {shown[0]}; {b} answers {shown[1]}: they cannot be compared")
    source = record_of(data) if data else next((r for r in records if "data" in r), {}) or record_of(a)
    found: dict[str, Any] = {"data": source["data"]["title"], "part": part_of(source)}
    calls, outs = {}, []
    targets: Tensor = torch.empty(0)
    for key, name, record in zip("ab", (a, b), records, strict=True):
        network = load(name)
        outputs, targets, first = outputs_of(network, source, record, root)
        outs.append(outputs)
        found[key] = {"name": str(name), "parameters": sum(p.numel() for p in network.parameters())}
        calls[key] = _forward(network, first[:32])
        found[key] |= _scores(outputs, targets, record)
    times = interleaved_times(calls, rounds)
    for key in "ab":
        found[key]["ms"] = 1000 * statistics.median(times[key].cpu) / min(32, len(targets))
    found |= {"n": len(targets), "outputs_a": outs[0].numpy(), "outputs_b": outs[1].numpy()}
    found["notes"] = [note for record in records if (note := _trained_on(source, record, root))]
    return found | {"targets": targets.numpy()} | _agreement(outs[0], outs[1], targets, bool(names[0]))


def _trained_on(source: Mapping[str, Any], record: Mapping[str, Any], root: Places | None) -> str | None:
    """A note if a model was trained on rows of the part that it is compared on; None if not, or for other data."""
    if record is source or "data" not in record:
        return None
    mine, theirs = record["data"]["config"], source["data"]["config"]
    if mine.get("_target_") != theirs.get("_target_"):
        return None
    try:
        data = build_data(record, root)
        data.setup("fit")
    except (ToolError, DataError):
        return f"its own data cannot be read, so it is not known whether {record['name']} was trained on these rows"
    part = "val" if part_of(source) == "validation" else "test"
    test, train = (
        getattr(one, "datasets", {}).get(name) for one, name in ((build_data(source, root), part), (data, "train"))
    )
    if test is None or train is None or told_of(train, test, part) is None:
        return None
    count = f"{len(twins(train, test)):,} of the {len(test):,}"
    return f"{count} rows are training rows of {record['name']}, so its figures flatter"


def _forward(network: nn.Module, batch: Tensor) -> Any:
    def run() -> Tensor:
        with torch.inference_mode():
            return network(batch)

    return run


@torch.inference_mode()
def outputs_of(
    network: nn.Module, source: Mapping[str, Any], record: Mapping[str, Any], root: Places | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs on the test part (or else the validation part) of `source`'s data in `root`, with the preprocessing of
    `record`.

    Returns:
        Outputs (N, K), targets (N,), and the first batch of inputs.

    Raises:
        ToolError: The inputs cannot be converted.
    """
    theirs, ours = source["preprocessing"], record["preprocessing"]
    changes = {}
    size, other = (how.get("input_size") or [] for how in (ours, theirs))
    if not (size and other):
        raise ToolError(f"{(record if other else source)['name']} has no size of its inputs on record")
    if size[1:] != other[1:]:
        if "image_size" not in source["data"]["config"]:
            raise ToolError(f"{record['name']} takes inputs of {size}, the data set has {other}")
        changes["image_size"] = size[-1]
    if size[0] != other[0]:
        raise ToolError(f"{record['name']} takes {size[0]} channels, the data set has {other[0]}")
    _check_inputs(source.get("input"), record.get("input"), record["name"])
    same = all(theirs.get(k) == ours.get(k) for k in ("mean", "std"))
    outputs, targets, first = [], [], None
    for x, y in batches(build_data(source, root, **changes), part=part_of(source)):
        if not same:
            x = (
                x * _per_channel(theirs["std"], x) + _per_channel(theirs["mean"], x) - _per_channel(ours["mean"], x)
            ) / _per_channel(ours["std"], x)
        first = x if first is None else first
        outputs.append(network(x).float())
        targets.append(y)
    assert first is not None
    found, right = torch.cat(outputs), torch.cat(targets)
    if right.is_floating_point():
        found, right = in_units(record.get("input"), found), in_units(source.get("input"), right)
    return found, right, first


def _check_inputs(theirs: Mapping[str, Any] | None, ours: Mapping[str, Any] | None, name: str) -> None:
    """Refuse a data set whose input record differs from the model's in more than size and normalisation."""
    if not theirs or not ours:
        return
    free = {"size", "mean", "std", "background", "column"}
    if None in (theirs.get("tokenizer_sha256"), ours.get("tokenizer_sha256")):
        free.add("tokenizer_sha256")  # unknown in older records
    for key in sorted({*theirs, *ours} - free):
        if theirs.get(key) != ours.get(key):
            raise ToolError(
                f"{name} takes inputs with {key} {ours.get(key)!r:.60}, the data set has {theirs.get(key)!r:.60}"
            )


def _per_channel(values: Any, x: Tensor) -> Tensor:
    return torch.tensor(values).view(-1, *[1] * (x.ndim - 2)) if len(values) > 1 else torch.tensor(values)


def decide(outputs: Tensor) -> Tensor:
    """Predicted classes (N,) of outputs (N, K), or of single logits (N, 1)."""
    return (outputs[:, 0] > 0).long() if outputs.shape[1] == 1 else outputs.argmax(1)


def _scores(outputs: Tensor, targets: Tensor, record: Mapping[str, Any]) -> dict[str, float]:
    if record["class_names"]:
        return {"accuracy": float((decide(outputs) == targets).float().mean())}
    error = outputs.squeeze(-1) - targets
    spread = (targets - targets.mean()).square().sum()
    return {"rmse": float(error.square().mean().sqrt()), "r2": 1 - float(error.square().sum() / spread)}


def _agreement(a: Tensor, b: Tensor, targets: Tensor, classes: bool) -> dict[str, Any]:
    if not classes:
        pair = np.corrcoef(a.squeeze(-1).numpy(), b.squeeze(-1).numpy())
        return {"agreement": float(pair[0, 1])}
    right = [decide(o) == targets for o in (a, b)]
    only = [int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())]
    return {
        "agreement": float((decide(a) == decide(b)).float().mean()),
        "only_a": only[0],
        "only_b": only[1],
        "p": _sign_test(*only),
    }


def _sign_test(first: int, second: int) -> float:
    """P-value of the two-sided exact sign test."""
    n = first + second
    tail = sum(math.comb(n, k) for k in range(min(first, second) + 1)) / 2**n
    return min(1.0, 2 * tail)
