"""scikit-learn estimators of the zoo's models and learners."""

from zoo.estimators.gaussian_processes import GPClassifier, GPRegressor
from zoo.estimators.grbf import Bootstrap, GRBFClassifier, GRBFRegressor
from zoo.estimators.grbf_fits import fit_many
from zoo.estimators.streams import KernelStreamClassifier

__all__ = [
    "Bootstrap",
    "GPClassifier",
    "GPRegressor",
    "GRBFClassifier",
    "GRBFRegressor",
    "KernelStreamClassifier",
    "fit_many",
]
