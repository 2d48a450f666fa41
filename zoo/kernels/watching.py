"""Names of :mod:`zoo.ops.dispatch` as they were."""

from torch import Tensor

from zoo.ops.dispatch import is_plain_eager, is_transformed, shared_value
from zoo.ops.dispatch import is_tracing as is_recorded

__all__ = ["is_ordinary", "is_recorded", "is_transformed", "shared_value"]


def is_ordinary(*tensors: Tensor) -> bool:
    """As :func:`zoo.ops.dispatch.is_plain_eager`."""
    return is_plain_eager(tensors)
