"""The pages: all in the navigation, no link to nowhere, and commands and code that can be read as they stand."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir

from tests.conftest import ROOT
from zoo.cli import build_parser

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
READ = [*PAGES, ROOT / "README.md", ROOT / "AGENTS.md"]
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def entries(nav: list[Any]) -> Iterator[str]:
    for entry in nav:
        inner = next(iter(entry.values())) if isinstance(entry, dict) else entry
        yield from entries(inner) if isinstance(inner, list) else [inner]


def test_every_page_is_in_the_navigation() -> None:
    listed = list(entries(yaml.safe_load((DOCS / "site" / "mkdocs.yml").read_text())["nav"]))
    assert len(listed) == len(set(listed))
    written = {"commands/", "reference/", "checkpoints/", "RESULTS.md", "CHANGELOG.md"}
    assert set(listed) == {path.name for path in PAGES} | written
    home = (DOCS / "README.md").read_text()
    assert all(f"]({path.name})" in home for path in PAGES if path.name != "README.md")


@cache
def anchors(path: Path) -> set[str]:
    """Anchors of a document's headings, as GitHub and the site make them."""
    titles = re.findall(r"^#{1,6} (.+)$", FENCE.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", READ, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_link_leads_nowhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", path.read_text())):
        if not link.startswith("https://"):
            name, _, anchor = link.partition("#")
            target = (path.parent / name).resolve() if name else path
            assert target.exists(), link
            assert target.is_relative_to(ROOT), link
            assert not anchor or anchor in anchors(target), link


def told(text: str, start: str) -> list[str]:
    """Command lines of the code blocks and of the text that begin with `start`, without their comments."""
    lines = re.findall(rf"(?:^\$ |`){re.escape(start)} ([^\n`]*)", text, re.MULTILINE)
    return [" ".join(shlex.split(line, comments=True)) and line for line in lines]


def test_commands_of_the_pages_are_understood() -> None:
    parser, lines = build_parser(), {line: path for path in READ for line in told(path.read_text(), "python -m zoo")}
    assert len(lines) > 40
    for line, path in lines.items():
        words = shlex.split(line, comments=True)
        if words in (["results", "RUN", "..."], ["--help"]):
            continue
        problem = io.StringIO()
        with contextlib.redirect_stderr(problem), contextlib.suppress(SystemExit):
            parser.parse_args(words)
        complete = not re.search(r"unrecognized|invalid", problem.getvalue()) if "`" else True
        assert complete, f"{path.name}: {line}\n{problem.getvalue()}"


def test_training_commands_of_the_pages_compose() -> None:
    flags = {"-m", "--cfg", "job", "-p", "--help"}
    lines = {line: path for path in READ for line in told(path.read_text(), "python train.py")}
    assert len(lines) > 40
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        for line, path in lines.items():
            pass
