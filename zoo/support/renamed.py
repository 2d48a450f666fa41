"""Names of earlier releases: old dotted names and where they are now, for imports and saved configurations.

Importing an old name works for one release, with a DeprecationWarning; an old `_target_` in a saved configuration is
translated silently (`zoo.registry.trust`).
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Sequence
from typing import Any

__all__ = ["MOVED", "RENAMED", "current", "install", "renamed"]

#: Old module -> the modules that hold its names now.
MOVED: dict[str, tuple[str, ...]] = {
    "zoo.checkpoints": ("zoo.registry.checkpoints",),
    "zoo.config": ("zoo.support.signatures",),
    "zoo.facts": ("zoo.support.environment",),
    "zoo.figures": (
        "zoo.analysis.plots",
        "zoo.analysis.probes.receptive_field",
        "zoo.analysis.probes.kernels",
        "zoo.analysis.probes.hyper_kernels",
    ),
    "zoo.files": ("zoo.support.files",),
    "zoo.fitting": ("zoo.estimators.grbf_solvers",),
    "zoo.gallery": ("zoo.analysis.probes",),
    "zoo.inputs": ("zoo.support.inputs",),
    "zoo.launch": ("zoo.training.launch",),
    "zoo.quoting": ("zoo.support.quoting",),
    "zoo.scaling": ("zoo.support.scaling",),
    "zoo.suggest": ("zoo.support.suggest",),
    "zoo.trust": ("zoo.registry.trust",),
    "zoo.validation": ("zoo.tools.validation",),
    "zoo.values": ("zoo.support.values",),
    "zoo.whole": ("zoo.support.whole",),
    "zoo.kernels.base": (
        "zoo.kernels.positive",
        "zoo.kernels.distances",
        "zoo.kernels.kernel",
        "zoo.kernels.stationary",
        "zoo.kernels.metric",
        "zoo.kernels.dot_product",
        "zoo.kernels.compose",
        "zoo.ops.numerics",
    ),
    "zoo.kernels.heads": ("zoo.learners.ridge", "zoo.learners.logistic"),
    "zoo.kernels.ridge": (
        "zoo.learners.kernel_ridge",
        "zoo.learners.ridge",
        "zoo.kernels",
        "zoo.kernels.random_features",
    ),
    "zoo.models.gkcl": (
        "zoo.models.continual",
        "zoo.models.continual.vae",
        "zoo.models.continual.losses",
    ),
    "zoo.benchmarks.records": ("zoo.results.records",),
    "zoo.benchmarks.runs": ("zoo.results.runs",),
    "zoo.benchmarks.timing": ("zoo.results.timing",),
    "zoo.data.origins": ("zoo.data.licenses",),
    "zoo.data.streams": ("zoo.data.task_streams",),
    "zoo.kernels.building": ("zoo.ops.building",),
    "zoo.kernels.feed_forward": ("zoo.ops.feed_forward",),
    "zoo.kernels.hyperzzw": (
        "zoo.models.slow_nets",
        "zoo.ops.hyperzzw",
        "zoo.ops.standardise",
        "zoo.models.terminator",
    ),
    "zoo.kernels.large_kernel": ("zoo.models.layers.dilated_reparam", "zoo.ops.depthwise"),
    "zoo.learners.estimator": ("zoo.estimators.streams",),
    "zoo.models.adapters": ("zoo.adapters",),
    "zoo.models.closed": ("zoo.registry.closed",),
    "zoo.models.conversion": ("zoo.adapters.conversion",),
    "zoo.models.described": ("zoo.registry.described",),
    "zoo.models.loading": ("zoo.registry.loading",),
    "zoo.models.plugins": ("zoo.registry.plugins",),
    "zoo.models.registry": ("zoo.registry.factory",),
    "zoo.models.shipped": ("zoo.registry.bundled_weights",),
    "zoo.models.text": ("zoo.adapters.text",),
    "zoo.tasks.kar": ("zoo.optim.kar",),
    "zoo.tasks.optim": ("zoo.optim", "zoo.optim.optimizers", "zoo.optim.schedules"),
    "zoo.tools.compose": ("zoo.benchmarks.cross_family",),
    "zoo.tools.deployment": ("zoo.benchmarks.deployment",),
}

#: Old dotted name -> new one, where only the name changed or moved out of a module that stays.
RENAMED: dict[str, str] = {
    "zoo.kernels.DepthwiseConv2d": "zoo.models.layers.dilated_reparam.DepthwiseConv2d",
    "zoo.kernels.DilatedReparamBlock": "zoo.models.layers.dilated_reparam.DilatedReparamBlock",
    "zoo.kernels.Head": "zoo.learners.ridge.Head",
    "zoo.kernels.LeastSquares": "zoo.learners.ridge.LeastSquares",
    "zoo.kernels.Positive": "zoo.kernels.positive.PositiveParameter",
    "zoo.kernels.LocalSlowNet": "zoo.models.slow_nets.LocalSlowNet",
    "zoo.kernels.SlowNet": "zoo.models.slow_nets.SlowNet",
    "zoo.kernels.causal_conv": "zoo.ops.hyperzzw.causal_conv",
    "zoo.kernels.fold_product": "zoo.ops.hyperzzw.fold_product",
    "zoo.kernels.global_product": "zoo.ops.hyperzzw.global_product",
    "zoo.kernels.local_conv": "zoo.ops.hyperzzw.local_conv",
    "zoo.kernels.same_conv": "zoo.ops.hyperzzw.same_conv",
    "zoo.kernels.fit_logistic": "zoo.learners.logistic.fit_logistic",
    "zoo.kernels.leave_one_out": "zoo.learners.ridge.leave_one_out",
    "zoo.kernels.solve_feature_ridge": "zoo.learners.ridge.solve_feature_ridge",
    "zoo.kernels.solve_ridge": "zoo.learners.ridge.solve_ridge",
    "zoo.kernels.base.Positive": "zoo.kernels.positive.PositiveParameter",
    "zoo.kernels.base.no_autocast": "zoo.ops.numerics.autocast_disabled",
    "zoo.kernels.base.plain_gradients": "zoo.ops.numerics.differentiable_grad",
    "zoo.kernels.linalg.solve_feature_ridge": "zoo.learners.ridge.solve_feature_ridge",
    "zoo.kernels.linalg.solve_ridge": "zoo.learners.ridge.solve_ridge",
    "zoo.kernels.ridge.RIDGE_KERNELS": "zoo.kernels.kernel.KERNELS",
    "zoo.kernels.ridge.leave_one_out_ridge": "zoo.learners.ridge.best_ridge",
    "zoo.kernels.ridge.ridge_coefficients": "zoo.learners.ridge.solve_ridge",
    "zoo.data.checks.tell": "zoo.data.checks.warn_once",
    "zoo.learners.agop.leave_one_out_residuals": "zoo.learners.ridge.leave_one_out_residuals",
    "zoo.models.continual.Recipe": "zoo.tasks.continual.Recipe",
    "zoo.models.gkcl.AnalyticRidge": "zoo.models.continual.IncrementalRidge",
    "zoo.models.grbf.activations": "zoo.kernels.metric.metric_gaussian",
    "zoo.training.folder.record": "zoo.training.folder.write_texts",
}


def renamed(old: str) -> Any:
    """Resolve a name of an earlier release, with a DeprecationWarning; for a module's `__getattr__`.

    Args:
        old: Its old dotted name.

    Raises:
        AttributeError: The name is unknown.
    """
    module, _, name = old.rpartition(".")
    if old not in RENAMED:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    home, _, new = RENAMED[old].rpartition(".")
    warnings.warn(f"{old} is now {RENAMED[old]}", DeprecationWarning, stacklevel=3)
    return getattr(importlib.import_module(home), new)


def current(target: str) -> str:
    """Current dotted name of a class or function, given a current or an old one."""
    module, _, name = RENAMED.get(target, target).rpartition(".")
    homes = MOVED.get(module, ())
    home = next((home for home in homes if hasattr(importlib.import_module(home), name)), module)
    return f"{home}.{name}"


class _Moved(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Last finder on `sys.meta_path`: fills an old module from the new ones."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self) if name in MOVED else None

    def exec_module(self, module: types.ModuleType) -> None:
        homes = MOVED[module.__name__]
        warnings.warn(f"{module.__name__} is now {' and '.join(homes)}", DeprecationWarning, stacklevel=2)
        modules = [importlib.import_module(home) for home in homes]

        def find(name: str) -> Any:
            if f"{module.__name__}.{name}" in RENAMED:
                return renamed(f"{module.__name__}.{name}")
            for home in modules:
                if hasattr(home, name):
                    return getattr(home, name)
            raise AttributeError(f"module {module.__name__!r}, now {' and '.join(homes)}, has no attribute {name!r}")

        names = [name for home in modules for name in getattr(home, "__all__", vars(home)) if not name.startswith("_")]
        module.__dict__.update(__getattr__=find, __all__=names)


def install() -> None:
    """Support imports of old names from now on; idempotent."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
