"""Architectures, one file per family, registered by name in timm's registry when this package is imported."""

from zoo.models import grbf, plugins, shipped, terminator, unireplknet
from zoo.models.deploy import to_deploy

__all__ = ["grbf", "terminator", "to_deploy", "unireplknet"]

plugins.load()
shipped.register()
