"""Learners of a sequence of tasks: KCL, GKCL, incremental ridge, and baselines."""

from typing import Any

from zoo.models.continual.base import MLP, ContinualLearner, TaskError, choose_per_class
from zoo.models.continual.baselines import EWC, Joint, LwF, Naive, Replay
from zoo.models.continual.gkcl import GKCL
from zoo.models.continual.incremental_ridge import GaussianGenerator, GaussianGKCL, IncrementalRidge
from zoo.models.continual.kcl import KCL, KernelLearner, ReducedResNet, normalise_features
from zoo.models.continual.vae import ConditionalVAE, ConvolutionalVAE
from zoo.support.renamed import renamed

__all__ = [
    "EWC",
    "GKCL",
    "KCL",
    "MLP",
    "ConditionalVAE",
    "ContinualLearner",
    "ConvolutionalVAE",
    "GaussianGKCL",
    "GaussianGenerator",
    "IncrementalRidge",
    "Joint",
    "KernelLearner",
    "LwF",
    "Naive",
    "ReducedResNet",
    "Replay",
    "TaskError",
    "choose_per_class",
    "normalise_features",
]


def __getattr__(name: str) -> Any:
    return renamed(f"{__name__}.{name}")
