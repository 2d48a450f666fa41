"""Adapters on pretrained transformers: small trained branches in a frozen network, and SNNK in place of its layers.

`inject_adapters` knows timm's vision transformers and BERT-style encoders of Hugging Face transformers, whose names it
reads off the modules; neither library is imported. Modules stay what and where they are, and adapters are hooks on what
they give, so that any kind of layer keeps its own forward pass, and the names in the base model's state dict do not
change. A forward pass of the model's example input shows first that every module is called, and with which widths.

    vector      y + v * Psi Phi(y)         SNNK, v = 0 at the start
    bottleneck  y + U Psi Phi(y) + c       SNNK with r hidden units, U = 0
    houlsby     y + U relu(D y + b) + c    Houlsby et al., 2019, the usual adapter, for comparison, U = 0

Phi are ReLU features of `zoo.kernels.random_features`. Sequential adapters sit behind attention and feed-forward
network, before the residual sum ("attention", "output"); parallel ones add v * Psi Phi(x) to a query, key or value
("query", "key", "value"). All start as the identity, and compute in float32 where their layer computes in float16.

>>> config = AdapterConfig(form="vector", num_features=16, modules_to_save=("classifier",))
>>> model = inject_adapters(model, config)
>>> count_parameters(model)                      # trained, random, all
>>> save_adapter(model, "my_adapter")            # adapter_model.safetensors, adapter_config.json
"""

import timm  # before the adapters, since it registers what lies here

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
