"""Deployment: every shipped weight exported, run in a process without the zoo, and quantised to int8."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from zoo.benchmarks import measurement
from zoo.registry import bundled_weights
from zoo.results.records import Provenance, Records, markdown, put_section
from zoo.tools.errors import ToolError
from zoo.tools.evaluation import load
from zoo.tools.export import FORMATS, export, quantize, run_elsewhere
from zoo.tools.info import example

__all__ = ["run"]

MEASURES = ("zoo/tools/export.py", "zoo/models")
VALUES = (
    "largest_output", *FORMATS, "accuracy", "int8_accuracy", "n", "int8_kept", "onnx_bytes", "int8_bytes", "int8_times",
)  # fmt: skip
_INT8 = VALUES[3:]
_FASTER = 1.1  # smaller speed-ups are noise


@measurement("deploy", "export", "shipped weights exported, run without the zoo, and in int8")
def run(folder: Path) -> Iterator[str]:
    """Export every shipped weight, and compare it with eager PyTorch in another process.

    Args:
        folder: Folder of `deployment.csv`; the table goes into RESULTS.md beside it.

    Yields:
        One line per weight, then the table.
    """
    records = Records(folder / "deployment.csv", ("model", "sha256"), VALUES)
    for name, record in bundled_weights.records().items():
        key = {"model": name, "sha256": record["sha256"]}
        if key not in records:
            records.add(key | _measure(name))
        yield f"{name} done"
    rows = [r for r in records.rows if bundled_weights.records().get(r["model"], {}).get("sha256") == r["sha256"]]
    header = ["weights", "program", "ONNX", "accuracy", "int8", "n", "int8 kept", "bytes", "int8"]
    source = Provenance(rows, MEASURES)
    lines = source.marked(map(_line, sorted(rows, key=lambda r: r["model"])), "model")
    table = markdown([*header, "int8, times as fast"], lines)
    text = (
        "## Deployment\n\n`python -m zoo benchmark deploy`\n\nLargest difference from eager PyTorch of the exported "
        "program and of the ONNX file, as a share of the largest output (or of one, if that is larger), each loaded in "
        "a new process in which the zoo, timm and Lightning cannot be imported, on five inputs. Int8: weights of "
        "matrix products quantised, their activations at run time (onnxruntime), kept where the accuracy falls by at "
        "most half a point; bytes of the ONNX files; how many times as fast int8 is, in CPU time of a batch of 32, "
        f"interleaved. {source}\n\n{table}\n\n{_verdict(rows)}"
    )
    put_section(folder.parent / "RESULTS.md", "deployment", text)
    yield f"{table}\n\n{_verdict(rows)}"


def _line(row: Mapping[str, str]) -> list[str]:
    """A row of the table; only classifiers have an int8 form."""
    scale = max(1.0, float(row["largest_output"]))
    shown = [row["model"], *(f"{float(row[kind]) / scale:.1e}" for kind in FORMATS)]
    if not row["accuracy"]:
        return [*shown, *[""] * len(_INT8)]
    accuracies = (f"{float(row[k]):.4f}" for k in ("accuracy", "int8_accuracy"))
    sizes = (row[k] for k in ("n", "int8_kept", "onnx_bytes", "int8_bytes"))
    return [*shown, *accuracies, *sizes, f"{float(row['int8_times']):.2f}"]


def _verdict(rows: Sequence[Mapping[str, str]]) -> str:
    """Summary of the int8 results."""
    judged = [r for r in rows if r["accuracy"]]
    kept = [r for r in judged if r["int8_kept"] == "yes"]
    said = f"Int8 keeps the accuracy of {len(kept)} of {len(judged)} classifiers."
    for good, told in ((True, "faster"), (False, "no faster: only the smaller file speaks for it there")):
        if names := sorted(r["model"] for r in kept if (float(r["int8_times"]) > _FASTER) == good):
            said += f" It makes {', '.join(names)} {told}."
    return said


def _measure(name: str) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as place:
        where = Path(place)
        told = export(name, where)
        network = load(name)
        inputs = example(network, 5)
        with torch.no_grad():
            expected = network(inputs).numpy()
        row: dict[str, object] = {"largest_output": float(np.abs(expected).max())}
        files = {kind: where / told[kind]["file"] for kind in FORMATS}
        found = run_elsewhere(dict.fromkeys(files.values(), inputs.numpy()))
        row |= {kind: float(np.abs(found[path] - expected).max()) for kind, path in files.items()}
        try:
            small = quantize(name, where)
        except ToolError:  # a regression
            return row | dict.fromkeys(_INT8, "")
    kept = "yes" if small["kept"] else "no"
    return row | {
        "accuracy": small["accuracy"],
        "int8_accuracy": small["accuracy_int8"],
        "n": small["n"],
        "int8_kept": kept,
        "onnx_bytes": small["bytes"],
        "int8_bytes": small["bytes_int8"],
        "int8_times": small["times_faster"],
    }
