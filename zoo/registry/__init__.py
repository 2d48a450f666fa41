"""Names, records, weights in and out, plug-ins: timm's registry with the zoo's own errors."""

import timm  # whose import registers every family, see `families`
