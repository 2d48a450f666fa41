"""Operators: tensor functions with one name each, which run their fastest implementation that is safe to use.

Each is a documented function in plain torch, its reference; see :mod:`zoo.ops.core` for how to declare one.
"""

from zoo.ops.channel_norm import channel_norm
from zoo.ops.core import OPERATORS, Operator, Saved, Unsuited, operator, reference
from zoo.ops.depthwise import depthwise_conv2d
from zoo.ops.feed_forward import feed_forward, response_norm
from zoo.ops.hyperzzw import causal_conv, fold_product, global_product, local_conv, same_conv
from zoo.ops.pointwise import pointwise_conv, pointwise_twice
from zoo.ops.slow_fast import local_kernel, slow_fast_block, slow_fast_context
from zoo.ops.standardise import instance_standardise, standard_gelu, standardised_gate

__all__ = [
    "OPERATORS",
    "Operator",
    "Saved",
    "Unsuited",
    "causal_conv",
    "channel_norm",
    "depthwise_conv2d",
    "feed_forward",
    "fold_product",
    "global_product",
    "instance_standardise",
    "local_conv",
    "local_kernel",
    "operator",
    "pointwise_conv",
    "pointwise_twice",
    "reference",
    "response_norm",
    "same_conv",
    "slow_fast_block",
    "slow_fast_context",
    "standard_gelu",
    "standardised_gate",
]
