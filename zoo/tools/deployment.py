"""Proof of deployment: every shipped weight exported, run in a process without the zoo, and made smaller where that
costs nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from zoo.benchmarks.records import Records, markdown, put_section, surroundings
from zoo.models import shipped
from zoo.tools.errors import ToolError
from zoo.tools.evaluation import load
from zoo.tools.export import FORMATS, export, quantize, run_elsewhere
from zoo.tools.info import example

__all__ = ["run"]

VALUES = (
    "largest_output",
    "program",
    "onnx",
    "accuracy",
    "int8_accuracy",
    "n",
    "int8_kept",
    "int8_bytes",
    "int8_times",
)


def run(folder: Path) -> Iterator[str]:
    """Export every shipped weight, and compare it with eager PyTorch in another process.

    Args:
        folder: Where `deployment.csv` is kept; the table goes into RESULTS.md beside the folder.

    Yields:
        One line a weight, then the table.
    """
    records = Records(folder / "deployment.csv", ("model", "sha256"), VALUES)
    for name, record in shipped.records().items():
        key = {"model": name, "sha256": record["sha256"]}
        if key not in records:
            records.add(key | _measure(name))
        yield f"{name} done"
    rows = [r for r in records.rows if shipped.records().get(r["model"], {}).get("sha256") == r["sha256"]]
    header = [
        "weights",
        "program",
        "ONNX",
        "accuracy",
        "int8",
        "n",
        "int8 kept",
        "ONNX bytes, int8",
        "int8, times as fast",
    ]
    shown = [
        [r["model"], *(_small(r[k]) for k in FORMATS), *(r[k] for k in VALUES[3:5]), *(r[k] for k in VALUES[5:])]
        for r in sorted(rows, key=lambda r: r["model"])
    ]
    text = (
        "## Deployment\n\n`python -m zoo benchmark deploy`\n\nLargest difference from eager PyTorch of the exported "
        "program and of the ONNX file, each loaded in a new process in which the zoo, timm and Lightning cannot be "
        "imported, on five inputs. Int8: weights quantised, activations at run time (onnxruntime), kept "
        "where the accuracy falls by at most half a point; CPU time of a batch of 32, interleaved. "
        f"{surroundings()}.\n\n"
    )
    put_section(folder.parent / "RESULTS.md", "deployment", text + markdown(header, shown))
    yield markdown(header, shown)


def _measure(name: str) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as place:
        where = Path(place)
        told = export(name, where)
        network = load(name)
        inputs = example(network, 5)
        with torch.no_grad():
            expected = network(inputs).numpy()
        row: dict[str, object] = {"largest_output": float(np.abs(expected).max())}
        for kind in FORMATS:
            found = run_elsewhere(kind, where / told[kind]["file"], inputs.numpy(), where)
            row[kind] = float(np.abs(found - expected).max())
        try:
            small = quantize(name, where)
        except ToolError:  # a regression
            return row | dict.fromkeys(VALUES[3:], "")
    kept = "yes" if small["kept"] else "no"
    return row | {
        "accuracy": small["accuracy"],
        "int8_accuracy": small["accuracy_int8"],
        "n": small["n"],
        "int8_kept": kept,
        "int8_bytes": small["bytes_int8"],
        "int8_times": small["times_faster"],
    }


def _small(cell: str) -> str:
    return f"{float(cell):.1e}"
