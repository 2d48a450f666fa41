"""Pages of the site that are written from something else: commands from their parsers, the reference from docstrings.

Results, changes, examples and the cards of the shipped weights stay where they are in the repository; a link to one of
them leads to its page of the site. Neither torch nor a model is imported.
"""

from __future__ import annotations

import argparse
import ast
import html
import inspect
import json
import logging
import os
import posixpath
import re
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from zoo.cli import build_parser  # noqa: E402 (this copy of the zoo, installed or not)
from zoo.training.launch import EXAMPLES, GROUPS, choices_of  # noqa: E402

logger = logging.getLogger("mkdocs.hooks")  # its warnings count

#: Packages of the reference, in the order of the navigation; a name is shown on the first page that has it.
PACKAGES = ("zoo", "estimators", "kernels", "learners", "models", "adapters", "ops", "data", "optim", "tasks", "tools", "testing")  # fmt: skip  # noqa: E501
#: Pages and folders of pages that lie elsewhere in the repository, at the same place as in the site.
OUTSIDE = ("RESULTS.md", "CHANGELOG.md", "checkpoints/", "examples/")
#: In a built page: what a tag leads to, and what can be led to.
TARGET = re.compile(r'<(?:a|img|link|script)\b[^>]*?\s(?:href|src)="([^"]*)"')
ANCHOR = re.compile(r'<[^>]*?\s(?:id|name)="([^"]+)"')
NOTEBOOKS = ROOT / "examples" / "notebooks"
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[)#])")


def on_config(config: Any) -> Any:
    """Fill in the sections of the navigation that end in a slash, and the names of files that stay outside `docs/`."""
    config.extra["pages"] = pages = {**_commands(), **_reference(), **_weights(), **_examples()}
    pages |= {name: (ROOT / name).read_text() for name in ("RESULTS.md", "CHANGELOG.md")}
    for section in _sections(config.nav):
        ((title, folder),) = section.items()
        if isinstance(folder, str) and folder.endswith("/"):
            section[title] = [_entry(name) for name in pages if name.startswith(folder)]
    return config


def _entry(name: str) -> str | dict[str, str]:
    """A page in the navigation: by its title, or a notebook, whose title is long, by its file's name."""
    return {f"{Path(name).stem}.ipynb": name} if name.startswith("examples/notebooks/") else name


def _sections(nav: list[Any]) -> list[dict[str, Any]]:
    inner = [entry for section in nav for entry in next(iter(section.values())) if isinstance(entry, dict)]
    return [*nav, *inner]


def on_files(files: Any, config: Any) -> Any:
    """Add the written pages, the pictures that they show, and the notebooks themselves."""
    for name, text in config.extra["pages"].items():
        files.append(File.generated(config, name, content=text))
    for path in sorted([*(ROOT / "results").glob("*.png"), *NOTEBOOKS.glob("*.ipynb")]):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    here = page.file.src_uri
    place = here if here.startswith(OUTSIDE) else f"docs/{here}"

    def lead(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(place), link[1]))
        target = f"{target}/README.md" if f"{target}/" in OUTSIDE else target.removeprefix("docs/")
        shown = f"{posixpath.splitext(target)[0]}.md" if target.startswith("examples/") else target
        target = target if shown == here else shown  # a notebook's page leads to its file
        return (
            posixpath.relpath(target, posixpath.dirname(here) or ".") if files.get_file_from_path(target) else link[1]
        )

    return markdown if here.startswith(("commands/", "reference/")) else LINK.sub(lead, markdown)


def on_post_build(config: Any) -> None:
    """Look once more in the pages as they were built: links of raw HTML and of docstrings have not been checked."""
    site = Path(config.site_dir).resolve()
    pages = {path: path.read_text() for path in sorted(site.rglob("*.html"))}
    anchors = {path: set(ANCHOR.findall(text)) for path, text in pages.items()}
    for path, text in pages.items():
        for link in sorted(set(TARGET.findall(text))):
            address = urlsplit(html.unescape(link))
            if address.scheme or address.netloc:
                continue
            start = site if address.path.startswith("/") else path.parent
            target = (start / unquote(address.path).lstrip("/")).resolve() if address.path else path
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(address.fragment)
            if not target.is_file() or (anchor and target in anchors and anchor not in anchors[target]):
                logger.warning("%s has a link to nowhere: %s", path.relative_to(site), link)


# ---- commands ----------------------------------------------------------------------------------------------


def _commands() -> dict[str, str]:
    os.environ["COLUMNS"] = "90"  # argparse breaks its lines there
    parser = build_parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    shown = {action.dest: action.help for action in commands._choices_actions}
    pages = {f"commands/{name}.md": _command(name, command) for name, command in commands.choices.items()}
    rows = "\n".join(f"| [{name}]({name}.md) | {_cell(shown[name] or '')} |" for name in commands.choices)
    first = (
        "# Commands\n\nInstalled, `python -m zoo` is also `kernel-zoo`, `python train.py` `kernel-zoo-train`.\n\n"
        f"| command | what it does |\n| --- | --- |\n| [train.py](train.md) | train a model |\n{rows}\n"
    )
    return {"commands/README.md": first, "commands/train.md": _train(), **pages}


def _train() -> str:
    """What `train.py --help` tells."""
    lines = [f"python train.py {arguments}".strip() for arguments in EXAMPLES]
    shown = "".join(f"| `{line}` | {what} |\n" for line, what in zip(lines, EXAMPLES.values(), strict=True))
    listed = "".join(f"| {group} | `{choices_of(group)}` |\n" for group in GROUPS)
    return (
        f"# train.py\n\nTrain a model.\n\n| command | what it does |\n| --- | --- |\n{shown}\n"
        f"Choices, as `group=choice`:\n\n| group | choices |\n| --- | --- |\n{listed}\n"
        "`python train.py --hydra-help` tells Hydra's own flags. [Your own data](../own-data.md),\n"
        "[fine-tune](../fine-tuning.md) and [follow](../following.md) have commands for each purpose.\n"
    )


def _command(name: str, parser: argparse.ArgumentParser) -> str:
    usage = parser.format_usage().replace("\n       ", "\n").removeprefix("usage: ").strip()
    text = f"# {name}\n\n{parser.description}\n\n```text\n{usage}\n```\n\n| argument | meaning |\n| --- | --- |\n"
    for action in parser._actions:
        if action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction):
            names = ", ".join(f"`{o}`" for o in action.option_strings) or f"`{action.metavar or action.dest}`"
            choices = f"one of {', '.join(map(str, action.choices))}" if action.choices else ""
            told = "; ".join(filter(None, [action.help and action.help % {"default": action.default}, choices]))
            text += f"| {names} | {_cell(told)} |\n"
    return f"{text}\n{parser.epilog or ''}\n"


def _cell(text: str) -> str:
    return inspect.cleandoc(text).replace("\n", " ").replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


# ---- reference ---------------------------------------------------------------------------------------------


def _reference() -> dict[str, str]:
    shown: dict[str, str] = {}
    pages = {}
    for package in PACKAGES:
        dotted = package if package == "zoo" else f"zoo.{package}"
        tree = ast.parse((ROOT / dotted.replace(".", "/") / "__init__.py").read_text())
        text = f"# {dotted}\n\n{(ast.get_docstring(tree) or '').partition(chr(10) * 2)[0]}\n\n"
        text = re.sub(r":\w+:(`[^`]*`)", r"\1", text)
        homes = _homes(tree, dotted)
        known = [f"[`{name}`]({shown[home]}.md#{home})" for name, home in homes.items() if home in shown]
        text += f"Also here: {', '.join(known)}.\n\n" if known else ""
        new = {name: home for name, home in homes.items() if home not in shown} or {m: m for m in _modules(dotted)}
        shown |= dict.fromkeys(new.values(), dotted)
        blocks = (
            f"::: {home}\n    options:\n      heading: {name if home == name else f'{dotted}.{name}'}\n"
            for name, home in new.items()
        )
        pages[f"reference/{dotted}.md"] = text + "\n".join(blocks)
    return pages


def _homes(tree: ast.Module, package: str) -> dict[str, str]:
    """Public names of a package, and where each is defined; empty for a package that has only modules."""
    homes = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and re.match(r"zoo\.(?!support)", node.module or "")
        for alias in node.names
    }
    listed = next((n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__"), None)
    if listed is None:
        return {}
    names = (
        [e.value for e in listed.elts]
        if isinstance(listed, ast.List)
        else sorted(homes, key=lambda n: (n[0].isupper(), n))
    )
    return {name: homes[name] for name in names if name in homes} if len(names) > 2 else {}


def _modules(package: str) -> list[str]:
    """Modules of a package that name their public names."""
    folder = ROOT / package.replace(".", "/")
    files = [path for path in sorted(folder.rglob("*.py")) if path != folder / "__init__.py"]
    named = [path.relative_to(ROOT).with_suffix("") for path in files if "\n__all__ = " in path.read_text()]
    return [".".join(path.parts).removesuffix(".__init__") for path in named]


# ---- shipped weights ---------------------------------------------------------------------------------------


def _weights() -> dict[str, str]:
    cards = {f"checkpoints/{path.name}": path.read_text() for path in sorted((ROOT / "checkpoints").glob("*.md"))}
    rows = "\n".join(f"- [{Path(name).stem}]({Path(name).name})" for name in cards)
    first = f"# Shipped weights\n\nEach has a card: its figure, its data, its licence and how to load it.\n\n{rows}\n"
    return {"checkpoints/README.md": first, **cards}


# ---- examples ----------------------------------------------------------------------------------------------


def _examples() -> dict[str, str]:
    pages = {"examples/README.md": (ROOT / "examples" / "README.md").read_text()}
    pages |= {f"examples/notebooks/{path.stem}.md": _notebook(path) for path in sorted(NOTEBOOKS.glob("*.ipynb"))}
    return pages | {f"examples/{path.stem}.md": _script(path) for path in sorted((ROOT / "examples").glob("*.py"))}


def _notebook(path: Path) -> str:
    """Text and code of a notebook, which is kept without outputs; so its links are checked and its words found."""
    cells = json.loads(path.read_text())["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    shown = [t if c["cell_type"] == "markdown" else f"```python\n{t}\n```" for c, t in zip(cells, texts, strict=True)]
    shown.insert(1, f"The notebook itself: [{path.name}]({path.name}). Its pictures appear when it runs.")
    return "\n\n".join(shown) + "\n"


def _script(path: Path) -> str:
    text = path.read_text()
    return f"# {path.name}\n\n{ast.get_docstring(ast.parse(text))}\n\n```python\n{text}```\n"
