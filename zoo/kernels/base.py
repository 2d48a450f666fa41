"""Names of :mod:`zoo.ops.numerics` as they were."""

from zoo.ops.numerics import autocast_disabled as no_autocast
from zoo.ops.numerics import differentiable_grad as plain_gradients

__all__ = ["no_autocast", "plain_gradients"]
