"""Operators: functions of tensors with one name each, whose fastest implementation answers where nobody would notice.

Each is a documented function in plain torch, its reference; :mod:`zoo.ops.core` tells how one is declared.
"""

from zoo.ops.channel_norm import channel_norm
from zoo.ops.core import OPERATORS, Operator, Saved, Unsuited, operator, reference
from zoo.ops.depthwise import depthwise_conv2d
from zoo.ops.feed_forward import feed_forward, response_norm

__all__ = [
    "OPERATORS",
    "Operator",
    "Saved",
    "Unsuited",
    "channel_norm",
    "depthwise_conv2d",
    "feed_forward",
    "operator",
    "reference",
    "response_norm",
]
