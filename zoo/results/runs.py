"""Tables of trained runs, generated from run folders: `python -m zoo results outputs/mnist5k/*`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, TypedDict

from pydantic import NonNegativeFloat, NonNegativeInt

from zoo.results.records import Records, markdown, mean_sd, plain, put_section
from zoo.support.quoting import command, override
from zoo.support.signatures import check_values
from zoo.support.values import DamagedFileError, check_closed, first_line, read_json, read_yaml

_OWN = ("seed=", "experiment=", "hydra.", "hydra/", "logger", "resume=")  # overrides that do not change the result


class RunsError(ValueError):
    """A folder is not a finished run, or runs cannot be tabulated together."""


@dataclass
class Run:
    """A finished run, read from its folder."""

    name: str
    model: str
    changes: tuple[str, ...]
    seed: int
    metrics: dict[str, float]
    seconds: float
    origin: tuple[str, ...] = ()
    experiment: str | None = None  # value of the override `experiment=`

    def command(self, seeds: Sequence[int], places: bool = True) -> str:
        """Shell command that trains it with these seeds; without `places`, of a path only the last name is kept."""
        several = ["-m"] if len(seeds) > 1 else []
        experiment = [f"experiment={self.experiment}"] if self.experiment else []
        changes = self.changes if places else map(_without_place, self.changes)
        return command("python train.py", *several, *experiment, *changes, f"seed={','.join(map(str, seeds))}")


def _without_place(change: str) -> str:
    """An override in which paths of this machine are the names of their files or folders."""
    key, equals, value = change.partition("=")
    start, path = re.fullmatch(r"(local[-_]dir:)?(.*)", value.strip("'\""), re.DOTALL).groups()  # type: ignore[union-attr]
    if _is_place(path):
        return override(key, f"{start or ''}{PureWindowsPath(path).name or 'FOLDER'}")
    inside = re.sub(r"[^\s,:'\"\[\]{}]*[/\\][^\s,:'\"\[\]{}]*", lambda found: _name_in(found[0]), value)
    return f"{key}{equals}{inside}" if value[:1] in "[{" else change


def _is_place(path: str) -> bool:
    """Whether a text is a path that leads out of the working folder."""
    parts = PureWindowsPath(path).parts
    return path.startswith(("/", "~", "\\")) or bool(PureWindowsPath(path).drive) or ".." in parts


def _name_in(path: str) -> str:
    return PureWindowsPath(path).name if _is_place(path) else path


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        RunsError: If it is not a finished run.
    """
    summary, config = read_parts(folder)
    try:
        overrides = read_yaml(folder / ".hydra" / "overrides.yaml")
    except (DamagedFileError, OSError) as error:
        raise RunsError(f"{folder} is not the folder of a finished run ({first_line(error)})") from None
    if not isinstance(overrides, list) or not all(isinstance(override, str) for override in overrides):
        raise RunsError(f"{folder}/.hydra/overrides.yaml holds no list of overrides")
    changes = tuple(sorted(o for o in overrides if not o.startswith(_OWN)))
    experiment = next((o.partition("=")[2] for o in overrides if o.startswith("experiment=")), None)
    numbers = summary["seed"], summary["metrics"], summary["seconds"]
    return Run(config["name"], config["model"]["model_name"], changes, *numbers, _origin(summary), experiment)


def _origin(summary: dict[str, Any]) -> tuple[str, ...]:
    """Date, commit, hardware and versions of a run, as far as its summary has them."""
    versions, hardware = summary.get("versions") or {}, summary.get("hardware") or {}
    found = [str(summary.get("finished") or "")[:10], summary.get("commit") and f"commit {summary['commit']}"]
    found += [
        hardware.get("gpu") or hardware.get("cpu"),
        hardware.get("threads") and f"{hardware['threads']} thread(s)",
    ]
    found += [f"{name} {versions[name]}" for name in ("torch", "timm", "python") if name in versions]
    return tuple(str(value) for value in found if value)


class _Summary(TypedDict):
    metrics: dict[str, float]
    seconds: NonNegativeFloat
    seed: NonNegativeInt


class _Extra(TypedDict, total=False):
    data: dict[str, Any]
    versions: dict[str, str]
    hardware: dict[str, str | int | float | bool | None]
    finished: str
    commit: str


class _Config(TypedDict):
    name: str
    model: dict[str, Any]
    data: dict[str, Any]
    task: dict[str, Any]


class _Model(TypedDict):
    model_name: str


def read_parts(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read and check the summary and the configuration of a finished run.

    Raises:
        RunsError: One is missing or damaged; resuming the run writes the summary again.
    """
    try:
        check_closed(folder)
    except DamagedFileError as error:
        raise RunsError(str(error)) from None
    try:
        config = read_yaml(folder / ".hydra" / "config.yaml")
        summary = read_json(folder / "summary.json")
    except (DamagedFileError, OSError) as error:
        raise RunsError(f"{folder} is not the folder of a finished run ({first_line(error, 200)})") from None
    problems = _checked(config, _Config, ".hydra/config.yaml")
    if not problems:
        problems = _checked(config["model"], _Model, ".hydra/config.yaml: model")
    problems += _checked(summary, _Summary, "summary.json")
    if not problems:
        problems += [f"summary.json: {problem}" for problem in check_values(_Extra, summary)]
    if problems:
        again = f"; `python train.py resume={folder}` writes the summary again" if "summary" in problems[0] else ""
        raise RunsError(f"{folder}: {problems[0][:300]}{again}")
    return summary, config


def _checked(values: Any, schema: type, what: str) -> list[str]:
    if not isinstance(values, dict):
        return [f"{what} holds a {type(values).__name__}"]
    missing = [f"{what} has no {key}" for key in schema.__annotations__ if values.get(key) is None]
    return missing or [f"{what}: {problem}" for problem in check_values(schema, values)]


def tabulate(
    folders: Sequence[Path], documents: Sequence[Path], section: str = "runs", floors: Path = Path("results/floors.csv")
) -> Iterator[str]:
    """A table of runs, with one row for the seeds of an experiment, written into documents if there are any.

    Args:
        folders: Run folders. The printed summary of the first one goes into the section `summary` of documents that
            have its markers.
        documents: Markdown files; the section is written between its markers, or appended to the first file.
        section: Name of the section.
        floors: CSV file of linear baselines (`python -m zoo benchmark modalities floors`), shown where available.

    Yields:
        The table, for printing.

    Raises:
        RunsError: A folder is not a finished run, or two runs have the same experiment and seed.
    """
    groups: dict[tuple[str, str, tuple[str, ...]], list[Run]] = defaultdict(list)
    for folder in dict.fromkeys(folder.resolve() for folder in folders):  # `latest` links to another one
        run = read_run(folder)
        same = groups[run.name, run.model, run.changes]
        if any(other.seed == run.seed for other in same):
            raise RunsError(f"{folder} is a second run of {run.name} with seed {run.seed}: name one of them")
        same.append(run)
    measured = Records(floors, ("experiment", "learner"), ("metric", "score", "train", "test"))
    rows = []
    for (name, model, changes), runs in sorted(groups.items()):
        runs.sort(key=lambda run: run.seed)
        shared = [m for m in runs[0].metrics if all(m in run.metrics for run in runs)]
        metric = next((m for m in ("test/acc", "test/score", "test/mse", "val/acc", *shared) if m in shared), None)
        if metric is None:
            raise RunsError(f"the runs of {name} have no metric in common")
        line = runs[0].command([run.seed for run in runs])
        values = [run.metrics[metric] for run in runs]
        score = mean_sd(values, digits=4) if len(values) > 1 else f"{values[0]:.4f}"  # one run has no spread
        seconds = f"{sum(run.seconds for run in runs) / len(runs):.0f}"
        known = measured.numbers("score", experiment=" ".join([name, *changes]), metric=metric)
        floor = f"{known[0]:.4f}" if known else ""
        cells = [plain(name), plain(model), f"{plain(metric)} {score}", floor, str(len(runs)), seconds]
        rows.append([*cells, f"`{plain(line)}`"])
    header = ["experiment", "model", "mean (standard deviation)", "linear floor", "seeds", "seconds a run", "command"]
    if not any(row[3] for row in rows):
        header, rows = header[:3] + header[4:], [row[:3] + row[4:] for row in rows]
    table = markdown(header, rows)
    origins = dict.fromkeys(", ".join(run.origin) for runs in groups.values() for run in runs if run.origin)
    text = table + (f"\n\n{plain('; '.join(origins))}." if origins else "")
    shown = folders[0] / "summary.txt"
    for i, document in enumerate(documents):
        before = document.read_text() if document.is_file() else ""
        if i == 0 or f"<!-- begin {section} -->" in before:
            put_section(document, section, f"## Trained {section}\n\n{text}" if i == 0 else text)
        if section == "runs" and shown.is_file() and "<!-- begin summary -->" in before:
            put_section(document, "summary", f"```text\n{_quoted(shown)}\n```")
    yield text


def _quoted(path: Path) -> str:
    """A text file, escaped for a fenced code block."""
    return (
        path.read_text(encoding="utf-8", errors="replace")[:20_000]
        .strip()
        .replace("```", "'''")
        .replace("<!--", "<! --")
    )
