"""Tables of trained runs, generated from run folders: `python -m zoo results outputs/mnist5k/*`."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Annotated, Any, TypedDict

from annotated_types import Len
from pydantic import BaseModel, NonNegativeFloat, NonNegativeInt, ValidationError

from zoo.results.records import Records, code, has_section, markdown, mean_sd, plain, put_section
from zoo.support.files import CONFIG_NAME, WEIGHTS_NAME, sha256_of
from zoo.support.places import resolved
from zoo.support.quoting import command, override
from zoo.support.signatures import check_values
from zoo.support.suggest import suggestion
from zoo.support.values import DamagedFileError, check_closed, first_line, read_json, read_yaml

MEASURED = "model_sha256"  # in a summary: which weights its figures are of
_OWN = ("seed=", "experiment=", "hydra.", "hydra/", "logger", "resume=")  # overrides that do not change the result


class RunsError(ValueError):
    """A folder is not a finished run, or runs cannot be tabulated together."""


class Stage(BaseModel, extra="forbid", strict=True):
    """A part of a run that was resumed with changes: where it went on, and the overrides that were typed."""

    epoch: NonNegativeInt
    step: NonNegativeInt
    overrides: Annotated[list[Annotated[str, Len(1, 4000)]], Len(0, 100)]


def stage_problem(found: Any) -> str | None:
    """Why the `stages` of a run cannot be read; None if they can."""
    if not isinstance(found, list) or len(found) > 1000:
        return "stages is no list of the parts of a run"
    try:
        for stage in found:
            Stage.model_validate(stage)
    except ValidationError as error:
        return f"stages: {error.errors()[0]['msg']}"
    return None


@dataclass
class Run:
    """A finished run, read from its folder.

    Attributes:
        stages: The parts after the first one, where it was resumed with changes.
        rows, whole: Samples of each part that were used; and of the whole part, where only a share of it was.
        untrained: Whether it has taken no training step.
    """

    name: str
    model: str
    changes: tuple[str, ...]
    seed: int
    metrics: dict[str, float]
    seconds: float
    origin: tuple[str, ...] = ()
    experiment: str | None = None  # value of the override `experiment=`
    stages: tuple[Stage, ...] = ()
    rows: dict[str, int] = field(default_factory=dict)
    whole: dict[str, int] = field(default_factory=dict)
    untrained: bool = False

    @property
    def kind(self) -> tuple[Any, ...]:
        """What runs of one experiment that differ only in the seed share."""
        stages = tuple((stage.epoch, stage.step, *stage.overrides) for stage in self.stages)
        shares = tuple((part, self.rows[part], count) for part, count in sorted(self.whole.items()))
        return self.name, self.model, self.changes, stages, shares, self.untrained

    def command(self, seeds: Sequence[int], places: bool = True) -> str:
        """Shell command that trains it with these seeds, and resumes it as it was; RUN is its folder.

        Without `places`, of a path only the last name is kept.
        """
        several = ["-m"] if len(seeds) > 1 else []
        experiment = [f"experiment={self.experiment}"] if self.experiment else []

        def told(words: Sequence[str]) -> list[str]:
            return list(words) if places else list(map(_without_place, words))

        seed = f"seed={','.join(map(str, seeds))}"
        lines = [command("python train.py", *several, *experiment, *told(self.changes), seed)]
        lines += [command("python train.py", "resume=RUN", *told(stage.overrides)) for stage in self.stages]
        where = ", ".join(f"epoch {stage.epoch} (step {stage.step})" for stage in self.stages)
        return " && ".join(lines) + (f"  # resumed at {where}" if where else "")

    def caveat(self, metric: str) -> str:
        """What a figure is of, if not of a trained model on the whole part, such as `50 of 359 rows`; else empty."""
        part = metric.partition("/")[0]
        share = [of_whole(part, self.rows, self.whole)] if part in self.whole and part != "train" else []
        return ", ".join([*(f"on {text} rows" for text in share), *(["untrained"] if self.untrained else [])])


def of_whole(part: str, rows: Mapping[str, int], whole: Mapping[str, int]) -> str:
    """The samples of a part that were used: `359`, `50 of 359`, or of the training `200 of 1295 an epoch`."""
    if part not in whole:
        return str(rows[part])
    return f"{rows[part]} of {whole[part]}" + (" an epoch" if part == "train" and rows[part] else "")


def rows_of(record: Mapping[str, Any]) -> dict[str, str]:
    """Samples of every part that a record's run used, as `of_whole` tells them."""
    rows, whole = record["data"]["rows"], record["data"].get("whole") or {}
    return {part: of_whole(part, rows, whole) for part in rows}


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
    parts = config["name"], config["model"]["model_name"], changes, *numbers, _origin(summary), experiment
    stages = tuple(Stage.model_validate(stage) for stage in summary.get("stages") or ())
    rows = {part: count for part, count in (summary.get("data") or {}).items() if isinstance(count, int)}
    whole = {part: count for part, count in (summary.get("whole") or {}).items() if part in rows}
    return Run(*parts, stages, rows, whole, summary.get("untrained") is True)


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
    whole: dict[str, NonNegativeInt]
    untrained: bool
    versions: dict[str, str]
    hardware: dict[str, str | int | float | bool | None]
    finished: str
    commit: str
    model_sha256: Annotated[str, Len(64, 64)]


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
        strange = stage_problem(summary["stages"]) if summary.get("stages") is not None else None
        strange = strange or next(_impossible(summary["metrics"]), None)
        problems += [f"summary.json: {strange}"] if strange else []
    if not problems:
        known, found = summary.get(MEASURED), weights_of(folder)
        if known and found and known != found:
            problems += [
                f"summary.json is of other weights than those in model/ (sha256 {known:.12}..., and {found:.12}...)"
            ]
        config["name"] = _resolved_name(folder, config)
    if problems:
        again = f"; `python train.py resume={folder}` writes the summary again" if "summary" in problems[0] else ""
        raise RunsError(f"{folder}: {problems[0][:300]}{again}")
    return summary, config


def weights_of(folder: Path) -> str | None:
    """SHA-256 of the weights in the `model/` of a run, by its configuration, which loading compares with the file."""
    model = folder / "model"
    try:
        found = read_json(model / CONFIG_NAME)
        recorded = found.get("sha256") if isinstance(found, dict) else None
        digest = recorded.get(WEIGHTS_NAME) if isinstance(recorded, dict) else None
        if not digest and (model / WEIGHTS_NAME).is_file():
            digest = sha256_of(model / WEIGHTS_NAME)
        return str(digest) if digest else None
    except (DamagedFileError, OSError):  # told where the model is loaded
        return None


#: Smallest and largest value of a metric, by a word of its name.
_BOUNDS = {
    **dict.fromkeys(("acc", "acc5", "accuracy"), (0.0, 1.0, "accuracy")),
    **dict.fromkeys(("mse", "rmse", "mae"), (0.0, math.inf, "error")),
    "r2": (-math.inf, 1.0, "R2"),
}


def _impossible(metrics: Mapping[str, float]) -> Iterator[str]:
    """A sentence for each figure that its metric cannot have, but for rounding."""
    for name, value in metrics.items():
        for word in re.split("[/_]", name):
            low, high, what = _BOUNDS.get(word, (-math.inf, math.inf, ""))
            if not low - 1e-6 <= value <= high + 1e-6:
                yield f"{name:.80} = {value:g}, which is no {what}"


def _resolved_name(folder: Path, config: Mapping[str, Any]) -> str:
    """The name of a run, with the choices of its groups, of which it consists by default; nothing else is looked up."""
    if "${" not in config["name"]:
        return str(config["name"])
    chosen: Any = None
    with suppress(DamagedFileError, OSError):
        chosen = read_yaml(folder / ".hydra" / "hydra.yaml")
    for key in ("hydra", "runtime", "choices"):
        chosen = chosen.get(key) if isinstance(chosen, dict) else None

    def choice(found: re.Match[str]) -> str:
        value = chosen.get(found[1]) if isinstance(chosen, dict) else None
        return value if isinstance(value, str) else found[1]

    text = re.sub(r"\$\{hydra:runtime\.choices\.(\w+)\}", choice, config["name"])
    return re.sub(r"\$\{[\w.]+\}", lambda found: str(resolved(found[0], config)), text)


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
    _check_section(section, documents)
    groups: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
    for folder in dict.fromkeys(folder.resolve() for folder in folders):  # `latest` links to another one
        run = read_run(folder)
        same = groups[run.kind]
        if any(other.seed == run.seed for other in same):
            raise RunsError(f"{folder} is a second run of {run.name} with seed {run.seed}: name one of them")
        same.append(run)
    measured = Records(floors, ("experiment", "learner"), ("metric", "score", "train", "test"))
    rows = []
    for (name, model, changes, *_), runs in sorted(groups.items(), key=lambda group: group[0]):
        runs.sort(key=lambda run: run.seed)
        shared = [m for m in runs[0].metrics if all(m in run.metrics for run in runs)]
        metric = next((m for m in ("test/acc", "test/score", "test/mse", "val/acc", *shared) if m in shared), None)
        if metric is None:
            raise RunsError(f"the runs of {name} have no metric in common")
        line = runs[0].command([run.seed for run in runs])
        values = [run.metrics[metric] for run in runs]
        score = mean_sd(values, digits=4) if len(values) > 1 else f"{values[0]:.4f}"  # one run has no spread
        score += f", {caveat}" if (caveat := runs[0].caveat(metric)) else ""
        seconds = f"{sum(run.seconds for run in runs) / len(runs):.0f}"
        known = measured.numbers("score", experiment=" ".join([name, *changes]), metric=metric)
        floor = f"{known[0]:.4f}" if known else ""
        cells = [plain(name), plain(model), f"{plain(metric)} {score}", floor, str(len(runs)), seconds]
        rows.append([*cells, code(line)])
    header = ["experiment", "model", "mean (standard deviation)", "linear floor", "seeds", "seconds a run", "command"]
    if not any(row[3] for row in rows):
        header, rows = header[:3] + header[4:], [row[:3] + row[4:] for row in rows]
    table = markdown(header, rows)
    origins = dict.fromkeys(", ".join(run.origin) for runs in groups.values() for run in runs if run.origin)
    text = table + (f"\n\n{plain('; '.join(origins))}." if origins else "")
    shown = folders[0] / "summary.txt"
    examples = ["summary"] if section == "runs" and shown.is_file() else []
    found = {document: [name for name in (section, *examples) if has_section(document, name)] for document in documents}
    for i, (document, sections) in enumerate(found.items()):  # all of them are sound
        if i == 0 or section in sections:
            put_section(document, section, f"## Trained {section}\n\n{text}" if i == 0 else text)
        if "summary" in sections:
            put_section(document, "summary", f"```text\n{_quoted(shown)}\n```")
    yield text


def _check_section(section: str, documents: Sequence[Path]) -> None:
    """Refuse to write a section that no document has, or that another command writes.

    Raises:
        RunsError: The name is not that of a table of runs.
    """
    texts = [document.read_text(errors="replace") for document in documents if document.is_file()]
    found = [block for text in texts for block in re.findall("<!-- begin (.*?) -->\\n(.*?)<!-- end ", text, re.DOTALL)]
    known = {"runs", *(name for name, block in found if not block.strip() or block.startswith("## Trained "))}
    if not documents or section in known:
        return
    markers = f"<!-- begin {section} --> and <!-- end {section} -->"
    what = "is written by another command" if section in dict(found) else f"has no place in {documents[0]}"
    raise RunsError(
        f"--section {section!r:.80} {what}{suggestion(section, known)}; of tables of runs there are "
        f"{', '.join(sorted(known))}" + ("" if section in dict(found) else f"; a new one goes between {markers:.200}")
    )


def _quoted(path: Path) -> str:
    """A text file, escaped for a fenced code block."""
    return (
        path.read_text(encoding="utf-8", errors="replace")[:20_000]
        .strip()
        .replace("```", "'''")
        .replace("<!--", "<! --")
    )
