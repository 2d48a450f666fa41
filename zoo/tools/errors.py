"""The one error of the tools."""

from __future__ import annotations


class ToolError(ValueError):
    """Something that cannot be done; the message is one line and says why and what would do."""
