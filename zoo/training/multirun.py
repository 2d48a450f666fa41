"""The table at the end of a multirun: its runs, and mean and standard deviation over their seeds."""

from __future__ import annotations

import csv
import io
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.results.runs import of_whole
from zoo.support.files import CheckpointError, write_atomic, writer_of
from zoo.support.values import DamagedFileError, first_line, read_json
from zoo.training.summary import print_table, tell

__all__ = ["NAME", "begin", "conclude", "note_run"]

NAME = "multirun.csv"
_NOTES = ".runs.jsonl"  # while the runs go on: a line for each beginning and each failure


@dataclass
class _Run:
    number: int
    folder: str = ""
    varied: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    seed: int | None = None
    seconds: float | None = None
    status: str = "not finished"
    partial: str = ""  # what the figures are of, where it is not the whole part


def begin(folder: Path) -> None:
    """Forget the notes that a killed multirun has left in the folder."""
    with suppress(OSError):
        (folder / _NOTES).unlink()


def note_run(home: str, number: int, /, **values: Any) -> None:
    """Note that a run has begun (`folder`, `overrides`) or failed (`failed`); several processes may write at once.

    Args:
        home: Folder of the multirun.
        number: Number of the run.
        **values: Plain values.
    """
    Path(home).mkdir(parents=True, exist_ok=True)
    line = json.dumps({"run": number, **values}) + "\n"
    handle = os.open(Path(home) / _NOTES, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, line.encode())
    finally:
        os.close(handle)


def conclude(folder: Path, varied: Sequence[str]) -> None:
    """Write `multirun.csv` and print its figures, whether all runs have finished or not.

    Args:
        folder: Folder of the multirun.
        varied: Keys that the overrides of its runs vary.
    """
    runs = _read(folder, varied)
    if not runs:
        return
    measured = sorted({name for run in runs for name in run.metrics})
    keys = [key for key in varied if key != "seed"]
    partial = ["partial"] if any(run.partial for run in runs) else []
    header = ["run", *keys, "seed", "status", *partial, *measured, "seconds", "folder"]
    rows = [
        [run.number, *(run.varied.get(key, "") for key in keys), run.seed, run.status]
        + [run.partial for _ in partial]
        + [run.metrics.get(name, "") for name in measured]
        + [run.seconds, run.folder]
        for run in runs
    ]
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    try:
        write_atomic(folder / NAME, writer_of(text.getvalue().encode()))
        (folder / _NOTES).unlink(missing_ok=True)
    except (CheckpointError, OSError) as error:
        tell(f"the table of the runs is not written: {first_line(error)}")
    shown = [name for name in measured if name.startswith("test/")]
    shown = shown or [name for name in measured if name.startswith("val/")]
    cells = [
        [str(run.number), *(run.varied.get(key, "") for key in keys), "" if run.seed is None else str(run.seed)]
        + [f"{run.metrics[name]:.4f}" if name in run.metrics else "" for name in shown]
        + [run.status + (f" ({run.partial})" if run.partial else "")]
        for run in runs
    ]
    print_table(f"runs of {_relative(folder / NAME)}", ["run", *keys, "seed", *shown, "status"], cells)
    _print_means(runs, keys, shown)


def _print_means(runs: Sequence[_Run], keys: Sequence[str], shown: Sequence[str]) -> None:
    """Print mean and standard deviation over the runs that differ in their seed only, if there are such."""
    groups: dict[tuple[str, ...], list[_Run]] = {}
    for run in runs:
        if run.metrics:
            groups.setdefault(tuple(run.varied.get(key, "") for key in keys), []).append(run)
    if all(len(group) < 2 for group in groups.values()):
        return
    rows = []
    for values, group in groups.items():
        spreads = [_spread([run.metrics[name] for run in group if name in run.metrics]) for name in shown]
        rows.append([*values, str(len(group)), *spreads])
    print_table("mean (standard deviation) over seeds", [*keys, "seeds", *shown], rows)


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.4f}" if values else ""
    return f"{statistics.mean(values):.4f} ({statistics.stdev(values):.4f})"


def _read(folder: Path, varied: Sequence[str]) -> list[_Run]:
    """The runs by number, from their notes and summaries."""
    runs: dict[int, _Run] = {}
    try:
        lines = (folder / _NOTES).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        with suppress(ValueError, TypeError, KeyError):  # a torn line of a killed process
            _take(runs, json.loads(line), varied)
    for run in runs.values():
        if run.status == "not finished":
            with suppress(DamagedFileError, OSError, KeyError, TypeError, ValueError):
                summary = read_json(Path(run.folder) / "summary.json")
                run.metrics = {str(name): float(value) for name, value in summary["metrics"].items()}
                run.seed, run.seconds, run.status = summary["seed"], summary["seconds"], "finished"
                run.partial = _partial(summary)
    return [runs[number] for number in sorted(runs)]


def _partial(summary: Mapping[str, Any]) -> str:
    """Which of the figures are of a share of their part, in rows, such as `test 50 of 359`."""
    rows, whole = summary.get("data") or {}, summary.get("whole") or {}
    measured = {name.partition("/")[0] for name in summary["metrics"]}
    parts = [part for part in whole if part in rows and part in measured]
    return ", ".join(f"{part} {of_whole(part, rows, whole)}" for part in parts)


def _take(runs: dict[int, _Run], note: Mapping[str, Any], varied: Sequence[str]) -> None:
    run = runs.setdefault(int(note["run"]), _Run(int(note["run"])))
    if "failed" in note:
        run.status = f"failed: {first_line(ValueError(note['failed']))}"
        return
    given = dict(str(text).lstrip("+").split("=", 1) for text in note["overrides"] if "=" in str(text))
    run.folder, run.varied = str(note["folder"]), {key: given[key] for key in varied if key in given}
    run.seed = int(given["seed"]) if given.get("seed", "").isdecimal() else None


def _relative(path: Path) -> Path:
    with suppress(ValueError):
        return path.relative_to(Path.cwd())
    return path
