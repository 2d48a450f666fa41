"""The ImageNet recipes: the published numbers are in them, and every one of them trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.training.test_configs import composed
from zoo.training.checks import check_config
from zoo.training.run import run_config

RECIPES = sorted(path.stem for path in (ROOT / "configs" / "experiment").glob("imagenet*.yaml"))
SMALL = [
    "+model.depths=[1,1,1,1]",
    "+model.dims=[8,16,24,32]",
    "+model.kernel_sizes=[[3],[13],[13],[13]]",
    "model.pretrained=false",
    "data.image_size=32",
    "data.batch_size=2",
    "data.num_workers=0",
    "trainer=cpu",
    "trainer.accumulate_grad_batches=1",
    "trainer.enable_progress_bar=false",
    "debug=fast",
    "scheduler.warmup_epochs=0",
    "callbacks.progress=null",
]

# name: drop path, mixup, CutMix, smoothing, rate, decay, layer decay, epochs, warm-up, side, images of 8 GPUs a step
NUMBERS: dict[str, tuple[Any, ...]] = {
    "imagenet_unireplknet_a": (0.0, 0.3, 0.3, 0.1, 4e-3, 0.05, None, 300, 20, 224, 8192),
    "imagenet_unireplknet_f": (0.0, 0.3, 0.3, 0.1, 4e-3, 0.05, None, 300, 20, 224, 8192),
    "imagenet_unireplknet_p": (0.1, 0.3, 0.3, 0.1, 4e-3, 0.05, None, 300, 20, 224, 8192),
    "imagenet_unireplknet_n": (0.1, 0.5, 0.5, 0.1, 4e-3, 0.05, None, 300, 20, 224, 8192),
    "imagenet_unireplknet_t": (0.2, 0.8, 1.0, 0.1, 4e-3, 0.05, None, 300, 20, 224, 8192),
    "imagenet_unireplknet_s": (0.4, 0.8, 1.0, 0.1, 4e-3, 0.05, None, 300, 20, 224, 4096),
    "imagenet22k_unireplknet_s": (0.1, 0.8, 1.0, 0.1, 4e-3, 0.05, None, 90, 5, 224, 8192),
    "imagenet22k_unireplknet_b": (0.1, 0.8, 1.0, 0.1, 4e-3, 0.05, None, 90, 5, 224, 8192),
    "imagenet22k_unireplknet_l": (0.1, 0.8, 1.0, 0.1, 1e-3, 0.05, None, 90, 5, 192, 8192),
    "imagenet22k_unireplknet_xl": (0.2, 0.8, 1.0, 0.1, 1e-3, 0.05, None, 90, 5, 192, 8192),
    "imagenet384_unireplknet_s": (0.2, 0, 0, 0.1, 5e-5, 1e-8, 0.8, 30, 0, 384, 512),
    "imagenet384_unireplknet_b": (0.2, 0, 0, 0.1, 5e-5, 1e-8, 0.8, 30, 0, 384, 512),
    "imagenet384_unireplknet_l": (0.3, 0, 0, 0.3, 5e-5, 1e-8, 0.8, 20, 0, 384, 512),
    "imagenet384_unireplknet_xl": (0.3, 0, 0, 0.3, 5e-5, 1e-8, 0.8, 20, 0, 384, 512),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("cat", "dog", "emu"):
            (folder / part / name).mkdir(parents=True)
            for i in range(2):
                picture = draw.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(picture).save(folder / part / name / f"{i}.png")
    return folder


def test_every_recipe_has_its_numbers_here() -> None:
    assert set(RECIPES) == set(NUMBERS)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_holds_the_published_numbers(name: str, tmp_path: Path) -> None:
    config = composed([f"experiment={name}", "data.path=."], tmp_path)
    check_config(config)
    model, task, optimizer, trainer = (config[key] for key in ("model", "task", "optimizer", "trainer"))
    variant = name.rpartition("_")[2]
    assert model["model_name"].split(".")[0] == f"unireplknet_{variant}"
    found = (model["drop_path_rate"], task["mixup_alpha"], task["cutmix_alpha"], task["label_smoothing"])
    found += (optimizer["lr"], optimizer["weight_decay"], optimizer["layer_decay"])
    found += (trainer["max_epochs"], config["scheduler"]["warmup_epochs"], config["data"]["image_size"])
    assert (*found, 8 * config["data"]["batch_size"] * trainer["accumulate_grad_batches"]) == NUMBERS[name]
    assert config["data"]["re_prob"] == 0.25
    assert config["data"]["auto_augment"] == "rand-m9-mstd0.5-inc1"
    fine_tuning = name.startswith("imagenet384")
    assert bool(model["pretrained"]) == fine_tuning
    assert model.get("head_init_scale") == (0.001 if fine_tuning else None)
    ema = config["callbacks"]["ema"]
    assert (ema and ema["decay"]) == (0.9999 if fine_tuning and variant in ("l", "xl") else None)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains(name: str, images: Path, tmp_path: Path) -> None:
    """One step, one validation and one test batch of the recipe with a small network and small images."""
    run_config(composed([f"experiment={name}", f"data.path={images}", *SMALL], tmp_path))
    assert (tmp_path / "model" / "model.safetensors").is_file()
