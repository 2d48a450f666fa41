"""Text for pasting: what the zoo prints as a command or a line of Python runs as printed, whatever the names are."""

from __future__ import annotations

import os
import re
import shlex
from typing import Any

_PLAIN = re.compile(r"[A-Za-z_./][A-Za-z0-9_./-]*")
_WORDS = {"null", "true", "false", "on", "off", "yes", "no", "y", "n", "inf", "nan", "none"}


def override(key: str, value: Any) -> str:
    """`key=value` in Hydra's grammar; a text comes back as it is, also with blanks, quotes, commas, `=` or `${`."""
    if isinstance(value, (str, os.PathLike)):
        return f"{key}={_hydra_text(os.fspath(value))}"
    return f"{key}={'null' if value is None else value}"


def _hydra_text(text: str) -> str:
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS:
        return text
    # OmegaConf looks for ${ in every text, and for backslashes only where it found one
    if "${" in text:
        text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    mark = "'" if '"' in text and "'" not in text else '"'
    text = re.sub(rf"(\\*)({mark})", r"\1\1\\\2", text)  # backslashes count before a quotation mark only,
    return mark + re.sub(r"(\\+)$", r"\1\1", text) + mark  # and before the closing one


def command(program: str, *words: str, **overrides: Any) -> str:
    """A line for the shell.

    Args:
        program: How the program is started, quoted already where needed.
        *words: Further words, quoted here for the shell.
        **overrides: Values of a configuration by key (`{"trainer.max_epochs": 3}`), quoted for Hydra and the shell.
    """
    return " ".join([program, *map(shlex.quote, [*words, *(override(k, v) for k, v in overrides.items())])])


def path_word(path: Any) -> str:
    """A path as a word of a shell command, which no option parser takes for an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def python_text(text: str) -> str:
    """A string literal of Python, in double quotes where it can be."""
    forced = repr("'" + text)  # an apostrophe makes repr choose double quotes, unless there are some inside
    return f'"{forced[2:]}' if forced[0] == '"' else repr(text)
