"""The exception of the tools."""

from __future__ import annotations


class ToolError(ValueError):
    """A request that cannot be fulfilled; the message is one line and says why."""
