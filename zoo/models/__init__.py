"""Architectures, one family per file; each registers its models when timm is imported."""

import timm  # which imports every file of this folder

from zoo.models.deploy import to_deploy

__all__ = ["to_deploy"]
