"""Adapters for pretrained transformers: small trained branches in a frozen network, or SNNK replacing its layers.

`inject_adapters` supports timm's vision transformers and BERT-style encoders of Hugging Face transformers, recognised
by their module names; neither library is imported. Adapters are forward hooks: modules keep their class, name and
forward pass, and the state-dict names of the base model do not change. A forward pass on an example input first
verifies that every target module is called, and records the widths.

        vector      y + v * Psi Phi(y)         SNNK, v = 0 initially
        bottleneck  y + U Psi Phi(y) + c       SNNK with r hidden units, U = 0 initially
        houlsby     y + U relu(D y + b) + c    Houlsby et al., 2019, the usual adapter, for comparison, U = 0 initially

Phi are ReLU features of `zoo.kernels.random_features`. Sequential adapters follow the attention and the feed-forward
network, before the residual sum ("attention", "output"); parallel ones add v * Psi Phi(x) to a query, key or value
("query", "key", "value"). All are initially the identity, and compute in float32 where their layer uses float16.

>>> config = AdapterConfig(form="vector", num_features=16, modules_to_save=("classifier",))
>>> model = inject_adapters(model, config)
>>> count_parameters(model)                      # trained, random, all
>>> save_adapter(model, "my_adapter")            # adapter_model.safetensors, adapter_config.json
"""

import timm  # first: its import registers the models of this package

from zoo.adapters.api import (
    Counts,
    adapter_names,
    add_adapter,
    count_parameters,
    delete_adapter,
    disable_adapters,
    inject_adapters,
    merge_adapters,
    set_adapter,
    unload_adapters,
)
from zoo.adapters.branches import Adapter, HoulsbyAdapter, SNNKAdapter
from zoo.adapters.config import AdapterConfig
from zoo.adapters.io import load_adapter, save_adapter
from zoo.adapters.sites import SavedModule
