"""The pages: all in the navigation, no link to nowhere, and commands and code that can be read as they stand."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

import zoo
from tests.conftest import ROOT
from zoo.cli import build_parser

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
READ = [*PAGES, ROOT / "README.md", ROOT / "AGENTS.md", ROOT / "examples" / "README.md", *NOTEBOOKS]
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


@cache
def text_of(path: Path) -> str:
    """Text of a page; of a notebook its cells, as the site shows them."""
    if path.suffix != ".ipynb":
        return path.read_text()
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(path.read_text())["cells"]]
    return "\n\n".join(text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in cells) + "\n"


def entries(nav: list[Any]) -> Iterator[str]:
    for entry in nav:
        inner = next(iter(entry.values())) if isinstance(entry, dict) else entry
        yield from entries(inner) if isinstance(inner, list) else [inner]


def test_every_page_is_in_the_navigation() -> None:
    listed = list(entries(yaml.safe_load((DOCS / "site" / "mkdocs.yml").read_text())["nav"]))
    assert len(listed) == len(set(listed))
    written = {"commands/", "reference/", "checkpoints/", "examples/", "RESULTS.md", "CHANGELOG.md"}
    assert set(listed) == {path.name for path in PAGES} | written
    home = (DOCS / "README.md").read_text()
    assert all(f"]({path.name})" in home for path in PAGES if path.name != "README.md")


@cache
def anchors(path: Path) -> set[str]:
    """Anchors of a document's headings, as GitHub and the site make them."""
    titles = re.findall(r"^#{1,6} (.+)$", FENCE.sub("", text_of(path)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", READ, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_link_leads_nowhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text_of(path))):
        if not link.startswith("https://"):
            name, _, anchor = link.partition("#")
            target = (path.parent / name).resolve() if name else path
            assert target.exists(), link
            assert target.is_relative_to(ROOT), link
            assert not anchor or anchor in anchors(target), link


def commands(start: str) -> dict[str, str]:
    """Command lines of the pages' shell sessions that begin with `start`, without their comments, and their page."""
    lines = {}
    for path in READ:
        for line in re.findall(rf"^\$ {re.escape(start)} (.*)$", text_of(path), re.MULTILINE):
            lines[shlex.join(shlex.split(line, comments=True))] = path.name
    return lines


def test_commands_of_the_pages_are_understood(capsys: pytest.CaptureFixture[str]) -> None:
    parser, lines = build_parser(), commands("python -m zoo")
    assert len(lines) > 25
    for line, page in lines.items():
        try:
            parser.parse_args(shlex.split(line))
        except SystemExit:
            pytest.fail(f"{page}: {line}: {capsys.readouterr().err}")
    named = {name for path in READ for name in re.findall(r"`python -m zoo ([a-z]+)", text_of(path))}
    (known,) = (action.choices for action in parser._actions if isinstance(action.choices, dict))
    assert named <= set(known)


ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`~?([^`]+)`")
NAMED = re.compile(r"^\s*(?:def|class) (\w+)|^\s*(?:self\.)?(\w+)(?:: [^=\n]+)? = |^    +(\w+): ", re.MULTILINE)


def home_of(dotted: str) -> tuple[Path, list[str]]:
    """File of a dotted name of the zoo, and what is left of the name inside it."""
    place, rest = ROOT / "zoo", dotted.split(".")[1:]
    while rest and (place / rest[0]).is_dir():
        place, rest = place / rest[0], rest[1:]
    if rest and (place / f"{rest[0]}.py").is_file():
        return place / f"{rest[0]}.py", rest[1:]
    return place / "__init__.py", rest


def test_docstrings_refer_to_what_there_is() -> None:
    texts = {path: path.read_text() for path in sorted((ROOT / "zoo").rglob("*.py"))}
    known = {name for text in texts.values() for found in NAMED.findall(text) for name in found}
    for path, text in texts.items():
        for name in ROLE.findall(text):
            if name.startswith("zoo."):
                home, rest = home_of(name)
                assert all(re.search(rf"\b{part}\b", texts[home]) for part in rest), f"{path.name}: {name}"
            else:
                assert set(name.split(".")) <= known, f"{path.name}: {name}"


@cache
def group(name: str, choice: str) -> dict[str, Any]:
    """A YAML file of a configuration group, with those of the group that it builds on; `defaults` has the rest."""
    read = yaml.load((ROOT / "configs" / name / f"{choice}.yaml").read_text(), yaml.CSafeLoader) or {}
    entries = read.pop("defaults", [])
    others = [{"defaults": {k.split("/")[1]: v for k, v in e.items()}} for e in entries if isinstance(e, dict)]
    return merged(*(group(name, base) for base in entries if isinstance(base, str) and base != "_self_"), *others, read)


def merged(*parts: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            inner = isinstance(value, dict) and isinstance(found.get(key), dict)
            found[key] = merged(found[key], value) if inner else value
    return found


@cache
def plain() -> dict[str, Any]:
    return yaml.load((ROOT / "configs" / "train.yaml").read_text(), yaml.CSafeLoader)


def known_keys(given: dict[str, str]) -> dict[str, Any]:
    """The configuration of a command line: its own choices, else those of its experiment, else the defaults."""
    choices = {k: v for entry in plain()["defaults"] if isinstance(entry, dict) for k, v in entry.items()}
    run = group("experiment", given["experiment"]) if "experiment" in given else {}
    choices |= run.get("defaults", {})
    choices |= {k: v for k, v in given.items() if (ROOT / "configs" / k).is_dir()}
    chosen = {k: group(k, v) for k, v in choices.items() if v is not None and "optional" not in k}
    return merged(plain(), chosen, run)


def trainings() -> dict[str, str]:
    return {line: page for line, page in commands("python train.py").items() if "hydra.searchpath" not in line}


def test_training_commands_of_the_pages_name_what_there_is() -> None:
    assert len(trainings()) > 40
    for line, page in trainings().items():
        given = dict(word.split("=", 1) for word in shlex.split(line) if "=" in word)
        known = known_keys(given)
        for key in given:
            node: Any = known
            for part in [] if key.startswith(("+", "hydra")) else key.split("."):
                assert node is not None, f"{page}: {line}: {key}"
                assert part in node, f"{page}: {line}: {key}"
                node = node[part]


@pytest.mark.slow
def test_training_commands_of_the_pages_pass_the_checks(tmp_path: Path) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from tests.training.test_configs import composed
    from zoo.training.checks import check_config

    overrides = OverridesParser.create()
    for line, page in trainings().items():
        words = overrides.parse_overrides([word for word in shlex.split(line) if "=" in word])
        first = [f"{o.key_or_group}={next(o.sweep_string_iterator())}" for o in words if o.is_sweep_override()]
        config = composed([*first, *(o.input_line for o in words if not o.is_sweep_override())], tmp_path)
        if config["resume"] is None:
            try:
                check_config(config)
            except ValueError as error:
                pytest.fail(f"{page}: {line}: {error}")


def test_code_of_the_pages_is_python_and_imports_what_there_is() -> None:
    for path in READ:
        for code in re.findall(r"^```python\n(.*?)^```$", text_of(path), re.MULTILINE | re.DOTALL):
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("zoo"):
                    place = ROOT / str(node.module).replace(".", "/")
                    text = (place / "__init__.py" if place.is_dir() else place.with_suffix(".py")).read_text()
                    for alias in node.names:
                        assert re.search(rf"\b{alias.name}\b", text), f"{path.name}: {node.module}.{alias.name}"
                elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "zoo":
                    assert node.attr in {*zoo.__all__, "kernels", "testing"}, f"{path.name}: zoo.{node.attr}"
