"""Architectures, one file per family, registered by name in timm's registry when this package is imported."""

from zoo.models import (
    closed,
    continual,
    dkm,
    gkcl,
    grbf,
    modalities,
    plugins,
    shipped,
    snnk,
    terminator,
    text,
    unireplknet,
)
from zoo.models.deploy import to_deploy

__all__ = ["continual", "dkm", "gkcl", "grbf", "modalities", "snnk", "terminator", "text", "to_deploy", "unireplknet"]

plugins.load()
shipped.register()
closed.install(plugins.modules())
