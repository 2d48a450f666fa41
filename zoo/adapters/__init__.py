"""SNNK layers inside other people's transformers."""

import timm  # before the adapters, since it registers what lies here

from zoo.adapters.adapters import *  # noqa: F403
