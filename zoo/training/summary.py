"""The summary that a run prints: results, files, and the commands to continue."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table
from rich.text import Text

from zoo.support.quoting import python_text, shown


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; cells are escaped."""
    table = Table(title=title, title_justify="left")
    for name in header:
        table.add_column(Text(shown(name)), overflow="fold")
    for row in rows:
        table.add_row(*(Text(shown(cell)) for cell in row))
    Console().print(table)


@rank_zero_only
def tell(text: str) -> None:
    """Print a note to stderr, from the first process only."""
    print(f"note: {shown(text)}", file=sys.stderr, flush=True)


@rank_zero_only
def tell_data(lines: Sequence[str]) -> None:
    """Print the report of the data before training, from the first process only."""
    print("\n".join(["data", *(f"  {shown(line)}" for line in lines)]), flush=True)


def print_summary(
    *,
    metrics: Mapping[str, float],
    epochs: Mapping[str, int],
    shares: Mapping[str, str],
    seconds: float,
    parameters: int,
    checkpoint: Path | None,
    model_dir: Path,
    tracked: Sequence[str],
    resume: str | None,
    untested: str | None = None,
    stopped: str | None = None,
) -> str:
    """Print a run's results as a table, and its files and commands as plain lines to copy.

    Args:
        metrics: Final values by name.
        epochs: Epoch of the values by the first part of their names, from 0; without one, nothing was trained.
        shares: Samples that they are of, such as `50 of 359`, where it is not the whole part.
        seconds: Time of the training, including the parts before resuming.
        parameters: Number of parameters of the model.
        checkpoint: The best checkpoint.
        model_dir: Folder of the exported model.
        tracked: Folders of the tracked runs.
        resume: Command that continues the run; None if it cannot be continued.
        untested: Reason why there is no test result, if one was expected.
        stopped: Reason why the training ended early.

    Returns:
        The printed text, without colours.
    """
    table = Table(title="results", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column()
    for name, value in sorted(metrics.items()):
        if name.startswith(("test/", "val/")) or name == "train/loss":
            part = name.partition("/")[0]
            of = f", {shares[part]} rows" if part in shares and part != "train" else ""
            table.add_row(name, f"{value:.4f}", (f"epoch {epochs[part]}" if part in epochs else "untrained") + of)
    table.add_row("parameters", f"{parameters:,}")
    table.add_row("time", "{} min {} s".format(*divmod(round(seconds), 60)))
    console = Console(record=True)
    console.print(table)
    lines = [f"ended early  {stopped}"] if stopped else []
    lines += [f"not tested   {untested}"] if untested else []
    lines += [f"checkpoint   {checkpoint}"] if checkpoint else []
    lines += [f"tracked run  {folder}" for folder in tracked]
    lines += [
        "load it      import zoo",
        f"             model = zoo.create_model({python_text(f'local-dir:{model_dir}')}, pretrained=True)",
    ]
    lines += [f"train on     {resume}"] if resume else []
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    return console.export_text()
