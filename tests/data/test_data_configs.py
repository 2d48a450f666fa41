"""Every file of configs/data names a class and exactly its arguments, each with a comment, and builds it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf

from tests.conftest import ROOT
from zoo.data.image import SmallImages
from zoo.support.signatures import check_section

FILES = sorted((ROOT / "configs" / "data").glob("*.yaml"))


def test_every_set_has_a_file() -> None:
    names = {path.stem for path in FILES}
    assert names >= {
        "mnist5k", "digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "imagefolder", "imagenet"
    }  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_file_fits_its_class(path: Path) -> None:
    config = OmegaConf.merge({"seed": 7}, {"data": OmegaConf.load(path)})
    if OmegaConf.is_missing(config.data, "path"):
        config.data.path = "somewhere"
    section: Any = OmegaConf.to_container(config.data, resolve=True)
    section.pop("defaults", None)  # choices of other groups
    words = list(inspect.signature(get_object(section["_target_"])).parameters)
    assert list(section)[1:] == words, "the same words in the same order"
    assert check_section(section, "data") == []
    data = instantiate(section)
    assert data.seed == 7
    for line in path.read_text().splitlines():
        assert line.startswith(("#", "_target_")) or " # " in line, line


AUGMENTED = [p for p in FILES if issubclass(get_object(OmegaConf.load(p)._target_), SmallImages)]


@pytest.mark.parametrize("path", AUGMENTED, ids=lambda p: p.stem)
def test_augmentation_in_the_file_is_the_default_of_the_class(path: Path) -> None:
    section: Any = OmegaConf.to_container(OmegaConf.load(path))
    section["seed"] = 0
    built = instantiate(section)
    assert built.train_augmentation == type(built).augmentation
