"""Model registry: names, weight metadata, weights in and out, and plug-ins, on top of timm's registry."""

import timm  # its import registers every family, see `families`
