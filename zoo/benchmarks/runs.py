"""Tables of trained runs, from the run folders themselves: `python -m zoo results outputs/mnist5k/*`."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from zoo.benchmarks.records import Records, markdown, mean_sd, put_section, surroundings
from zoo.quoting import command

_OWN = ("seed=", "experiment=", "hydra.", "hydra/", "logger", "resume=")  # what does not change a result


class RunsError(ValueError):
    """Folders that cannot be tabulated; the message names the first one and why."""


@dataclass
class Run:
    """One finished run, as its folder tells it."""

    name: str
    model: str
    changes: tuple[str, ...]
    seed: int
    metrics: dict[str, float]
    seconds: float
    experiment: str | None = None  # the choice of that name, where the run has one

    def command(self, seeds: Sequence[int]) -> str:
        """The command, for a shell, that trains it with these seeds."""
        several = ["-m"] if len(seeds) > 1 else []
        experiment = [f"experiment={self.experiment}"] if self.experiment else []
        return command("python train.py", *several, *experiment, *self.changes, f"seed={','.join(map(str, seeds))}")


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        RunsError: If it is not a finished run.
    """
    try:
        summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
        config: dict[str, Any] = yaml.safe_load((folder / ".hydra" / "config.yaml").read_text())
        overrides: list[str] = yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunsError(
            f"{folder} is not the folder of a finished run ({' '.join(str(error).split())[:200]})"
        ) from None
    changes = tuple(sorted(o for o in overrides if not o.startswith(_OWN)))
    experiment = next((o.partition("=")[2] for o in overrides if o.startswith("experiment=")), None)
    return Run(
        config["name"],
        config["model"]["model_name"],
        changes,
        summary["seed"],
        summary["metrics"],
        summary["seconds"],
        experiment,
    )


def tabulate(
    folders: Sequence[Path], documents: Sequence[Path], section: str = "runs", floors: Path = Path("results/floors.csv")
) -> Iterator[str]:
    """Write the table of some runs into documents, seeds of the same experiment in one row.

    Args:
        folders: Run folders. What the first one printed when it ended goes into the section `summary` of the documents
            that have its marks.
        documents: Markdown files; the section is written between its marks, where a file has them, and appended to
            the first file where it does not.
        section: Name of the section.
        floors: What linear models reach (`python -m zoo benchmark modalities floors`), shown beside the experiments
            that have such a floor.

    Yields:
        The table, to be printed.

    Raises:
        RunsError: If a folder is not a finished run, or two of them are the same experiment with the same seed.
    """
    groups: dict[tuple[str, str, tuple[str, ...]], list[Run]] = defaultdict(list)
    for folder in dict.fromkeys(folder.resolve() for folder in folders):  # `latest` is a link to one of them
        run = read_run(folder)
        same = groups[run.name, run.model, run.changes]
        if any(other.seed == run.seed for other in same):
            raise RunsError(f"{folder} is a second run of {run.name} with seed {run.seed}: name one of them")
        same.append(run)
    measured = Records(floors, ("experiment", "learner"), ("metric", "score", "train", "test"))
    rows = []
    for (name, model, changes), runs in sorted(groups.items()):
        runs.sort(key=lambda run: run.seed)
        metric = next(
            m for m in ("test/acc", "test/score", "test/mse", "val/acc", *runs[0].metrics) if m in runs[0].metrics
        )
        line = runs[0].command([run.seed for run in runs])
        values = [run.metrics[metric] for run in runs]
        score = mean_sd(values, digits=4) if len(values) > 1 else f"{values[0]:.4f}"  # one run has no spread
        seconds = f"{sum(run.seconds for run in runs) / len(runs):.0f}"
        known = measured.numbers("score", experiment=" ".join([name, *changes]), metric=metric)
        floor = f"{known[0]:.4f}" if known else ""
        rows.append([name, model, f"{metric} {score}", floor, str(len(runs)), seconds, f"`{line}`"])
    header = ["experiment", "model", "mean (standard deviation)", "linear floor", "seeds", "seconds a run", "command"]
    if not any(row[3] for row in rows):
        header, rows = header[:3] + header[4:], [row[:3] + row[4:] for row in rows]
    table = markdown(header, rows)
    text = f"{table}\n\n{surroundings()}."
    shown = folders[0] / "summary.txt"
    for i, document in enumerate(documents):
        before = document.read_text() if document.is_file() else ""
        if i == 0 or f"<!-- begin {section} -->" in before:
            put_section(document, section, f"## Trained {section}\n\n{text}" if i == 0 else text)
        if section == "runs" and shown.is_file() and "<!-- begin summary -->" in before:
            put_section(document, "summary", f"```text\n{shown.read_text().strip()}\n```")
    yield text
