"""Kernel Zoo: a PyTorch model zoo of kernel-based architectures.

>>> import zoo
>>> model = zoo.create_model("unireplknet_a", num_classes=10)
>>> zoo.list_models("unireplknet_*")

Importing the package is instant: every public name is imported on first use, and the models enter timm's registry as
soon as timm itself is imported, before or after the zoo.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

from zoo.support import renamed

__version__ = "0.1.0"

_HOME = {
    "CheckpointError": "zoo.registry.checkpoints",
    "GPClassifier": "zoo.estimators.gaussian_processes",
    "GPRegressor": "zoo.estimators.gaussian_processes",
    "GRBFClassifier": "zoo.estimators.grbf",
    "GRBFRegressor": "zoo.estimators.grbf",
    "GaussianRBFNetwork": "zoo.models.grbf",
    "create_estimator": "zoo.estimators.named",
    "create_model": "zoo.registry.factory",
    "list_models": "zoo.registry.factory",
    "load_checkpoint": "zoo.registry.checkpoints",
    "load_estimator": "zoo.estimators.saved",
    "load_run": "zoo.training.result",
    "load_task": "zoo.tasks",
    "predict": "zoo.tools.prediction",
    "save_pretrained": "zoo.tools.pretrained",
    "to_deploy": "zoo.models.deploy",
    "train": "zoo.training.launch",
}
__all__ = list(_HOME)

if TYPE_CHECKING:
    from zoo.estimators.gaussian_processes import GPClassifier, GPRegressor
    from zoo.estimators.grbf import GRBFClassifier, GRBFRegressor
    from zoo.estimators.named import create_estimator
    from zoo.estimators.saved import load_estimator
    from zoo.models.deploy import to_deploy
    from zoo.models.grbf import GaussianRBFNetwork
    from zoo.registry.checkpoints import CheckpointError, load_checkpoint
    from zoo.registry.factory import create_model, list_models
    from zoo.tasks import load_task
    from zoo.tools.prediction import predict
    from zoo.tools.pretrained import save_pretrained
    from zoo.training.launch import train
    from zoo.training.result import load_run


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'zoo' has no attribute {name!r}; its public names are {', '.join(_HOME)}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


renamed.install()


@wrapt.when_imported("timm")
def _register_models(timm: Any) -> None:
    importlib.import_module("zoo.registry.families").load()
