"""Model cards and tables of the shipped weights, generated from their records, and checks of the documents."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.registry import bundled_weights
from zoo.results.records import code, has_section, markdown, plain, put_section
from zoo.results.runs import rows_of
from zoo.support.files import write_atomic, writer_of
from zoo.support.inputs import preparation
from zoo.support.quoting import command, python_text

__all__ = ["card", "check", "score", "table", "write"]

_EXPERIMENT = re.compile(r"(?<![\w+])experiment=([\w,]+)")
SECTION = "weights"


def score(metric: Mapping[str, Any]) -> str:
    """The metric of the file, and its mean and standard deviation over the seeds, if there are several; and what it is
    of, if not of the whole part.
    """
    one = f"{metric['value']:.4f}"
    caveat = _caveat(metric)
    if metric["n"] < 2:
        return f"{one} (one seed){caveat}"
    return f"{one} (mean {metric['mean']:.4f}, s.d. {metric['sd']:.4f}, {metric['n']} seeds){caveat}"


def card(record: Mapping[str, Any], place: str = "") -> str:
    """Model card of a weight: Markdown with the front matter for model hubs; `place` is where it is loaded from.

    A run's card has no command that reproduces its figure, which would need the run's folder.
    """
    shipped, raw = "folder" not in record, record
    record, place = plain(record), place or record["name"]
    metric, data = record["metric"], record["data"]
    classes = record["class_names"]
    lines = [
        "---",
        f"license: {record['license']}",
        "library_name: kernel-zoo",
        f"tags: [kernel-zoo, timm, {record['architecture'].split('_')[0]}]",
        "---",
        f"# {record['name']}",
        "",
        f"`{record['architecture']}` trained on {data['title']}: {metric['name']} {score(metric)}.",
        "",
        *(line for note in record["pretrained_cfg"].get("notes", ()) for line in (note, "")),
        "```python",
        "import zoo",
        "",
        f"model = zoo.create_model({python_text(place)}, pretrained=True).eval()",
        "```",
        "",
    ]
    how = ", ".join(f"{k} {_short(v)}" for k, v in preparation(record).items())
    arguments = ", ".join(f"{k}={v!r}" for k, v in raw["model_args"].items() if k not in ("num_classes", "in_chans"))
    rows = [
        ("figure of this file", f"{metric['name']} {metric['value']:.4f}, seed {metric['seed']}{_caveat(metric)}"),
        *(_seeds(metric) if metric["n"] > 1 else []),
        *([("reproduced by", code(command("python -m zoo validate", raw["name"])))] if shipped else []),
        ("trained by", f"{code(raw['command'])}, {record['seconds']:.0f} s"),
        ("data", f"{data['title']}; {', '.join(f'{v} {k}' for k, v in rows_of(record).items())}"),
        ("data from", f"{data['source']}; terms: {data['license']}"),
        ("licence of the code", record["code_license"]),
        ("licence of the weights", record["license"]),
        ("parameters", f"{record['parameters']:,}"),
        ("file", f"{record['bytes']:,} bytes, sha256 `{record['sha256']}`"),
        ("arguments", code(arguments) if arguments else "the variant's own"),
        ("preprocessing", how),
        ("classes", ", ".join(classes) if classes else "none: it predicts a value"),
        *([("features", ", ".join(record["feature_names"]))] if record["feature_names"] else []),
        ("versions", ", ".join(f"{k} {v}" for k, v in record["versions"].items())),
        ("hardware", ", ".join(f"{k} {v}" for k, v in record["hardware"].items())),
    ]
    lines.append(markdown(["", ""], [(k, re.sub(r"(?<!\\)\|", "/", str(v))) for k, v in rows]))
    return "\n".join(lines) + "\n"


def _caveat(metric: Mapping[str, Any]) -> str:
    return f", {metric['caveat']}" if metric.get("caveat") else ""


def _seeds(metric: Mapping[str, Any]) -> list[tuple[str, str]]:
    spread = f"mean {metric['mean']:.4f}, s.d. {metric['sd']:.4f}, n = {metric['n']}"
    return [("over seeds", spread), ("seed chosen by", metric.get("chosen_by", ""))]


def _short(value: Any) -> str:
    return "x".join(f"{v:g}" if isinstance(v, int | float) else str(v) for v in value) if isinstance(
        value, list | tuple) else str(value)  # fmt: skip


def table(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown table with one row per weight."""
    header = ["weights", "data", "metric", "this file", "mean (s.d.) over seeds", "n", "parameters", "MB", "trained by"]
    rows = []
    for name, raw in sorted(records.items()):
        name, record = plain(name), plain(raw)
        m = record["metric"]
        seeds = f"{m['mean']:.4f} ({m['sd']:.4f})" if m["n"] > 1 else "one seed"
        size = f"{record['bytes'] / 1e6:.2f}"
        row = [f"[{name}](checkpoints/{name}.md)", record["data"]["title"], m["name"], f"{m['value']:.4f}", seeds]
        rows.append([*row, m["n"], f"{record['parameters']:,}", size, code(raw["command"])])
    return markdown(header, rows)


def _pages(root: Path) -> list[Path]:
    """Documents that quote results or commands."""
    found = [root / name for name in ("README.md", "RESULTS.md", "CONTRIBUTING.md")]
    return [p for p in (*found, *sorted((root / "docs").glob("**/*.md")), *sorted((root / "checkpoints").glob("*.md")))
            if p.is_file()]  # fmt: skip


def write(root: Path, documents: Sequence[str] = ("RESULTS.md", "README.md")) -> list[Path]:
    """Write the cards of all weights of a checkout, and their table into the documents.

    Args:
        root: The checkout, with `checkpoints/`.
        documents: The section is written into the first one, and into others that have its markers.

    Returns:
        The files written.
    """
    folder = root / "checkpoints"
    records = bundled_weights.records(folder)
    written = []
    for name, record in records.items():
        written.append(folder / f"{name}.md")
        write_atomic(written[-1], writer_of(card(record).encode()))
    for i, name in enumerate(documents):
        path = root / name
        if i == 0 or has_section(path, SECTION):
            put_section(path, SECTION, _section(records, title=i == 0))
            written.append(path)
    return written


def _section(records: Mapping[str, Mapping[str, Any]], title: bool) -> str:
    head = "## Shipped weights\n\n`python -m zoo cards`\n\n" if title else ""
    return f"{head}{table(records)}"


def check(root: Path) -> list[str]:
    """Check a checkout: weights, cards and tables against records, experiments and links against files.

    Returns:
        One line per problem.
    """
    folder = root / "checkpoints"
    problems = bundled_weights.check(folder)
    records = bundled_weights.records(folder)
    for name, record in records.items():
        path = folder / f"{name}.md"
        if not path.is_file() or path.read_text(encoding="utf-8") != card(record):
            problems.append(f"{path} is not the card of its record: run `python -m zoo cards`")
        if not (root / "configs" / "experiment" / f"{record['experiment']}.yaml").is_file():
            problems.append(f"{name} was trained by experiment={record['experiment']}, which has no file")
    for extra in {p.stem for p in folder.glob("*.md")} - set(records) - {"README"}:
        problems.append(f"{folder / extra}.md is the card of no weight")
    for name in ("RESULTS.md", "README.md"):
        problems += _check_table(root / name, records)
    known = {p.stem for p in (root / "configs" / "experiment").glob("*.yaml")}
    for page in _pages(root):
        text = page.read_text(encoding="utf-8")
        named = {n for found in _EXPERIMENT.findall(text) for n in found.split(",") if n}
        problems += [f"{page} names experiment={n}, which has no file" for n in sorted(named - known)]
        problems += [f"{page} links to {link}, which is not there" for link in _dead_links(page, text)]
    return problems


def _check_table(path: Path, records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if not path.is_file():
        return [f"there is no {path}"]
    found = re.search(f"<!-- begin {SECTION} -->\n(.*?)\n?<!-- end {SECTION} -->", path.read_text("utf-8"), re.DOTALL)
    if found is None:
        return [f"{path} has no table of weights: run `python -m zoo cards`"] if path.name == "RESULTS.md" else []
    if found[1].strip() != _section(records, title=path.name == "RESULTS.md").strip():
        return [f"{path}: the table of weights is not that of the records: run `python -m zoo cards`"]
    return []


def _dead_links(page: Path, text: str) -> list[str]:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    return sorted({link for link in links if "://" not in link and not (page.parent / link).exists()})
