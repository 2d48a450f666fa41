"""Docstrings as the site shows them: ``:class:`name``` is a link where a page has the name, `>>>` begins code."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`(~?)([\w.]+)`")
_SESSION = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)


def _link(role: re.Match[str]) -> str:
    short, name = role.groups()
    shown = name.rsplit(".", 1)[-1] if short else name
    return f'<autoref optional identifier="{name}"><code>{shown}</code></autoref>'


class Docstrings(griffe.Extension):
    """Rewrites every docstring; a link that leads nowhere is no warning here, and shows as code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring:
            text = _SESSION.sub(lambda session: f"```pycon\n{session[0]}\n```", obj.docstring.value)
            obj.docstring.value = _ROLE.sub(_link, text)
