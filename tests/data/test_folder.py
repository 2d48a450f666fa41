"""Image folders: layouts, transforms under exact seeds, the evaluation rule, and all that can be wrong."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.test_sampling import global_states
from zoo.data import DataError, ImageFolder, ImageNet
from zoo.data.sampling import SampleKey

STRONG = {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.5, "re_mode": "pixel"}


def write_images(folder: Path, classes: tuple[str, ...] = ("cat", "dog"), n: int = 6, side: int = 40) -> None:
    rng = np.random.RandomState(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(n):
            pixels = rng.randint(0, 256, (side, side + 10, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.{('png', 'jpg')[i % 2]}")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_images(tmp_path / "train")
    write_images(tmp_path / "val", n=2)
    return tmp_path


def make(root: Path, **arguments: Any) -> ImageFolder:
    data = ImageFolder(**{"root": str(root), "image_size": 32, "batch_size": 4, "num_workers": 0, **arguments})
    data.prepare_data()
    data.setup()
    return data


def sizes(data: ImageFolder) -> dict[str, int]:
    return {part: len(dataset) for part, dataset in data.datasets.items()}


# ---- layouts -----------------------------------------------------------------------------------------------


def test_train_and_val_folders(root: Path) -> None:
    data = ImageFolder(root=str(root), image_size=32)
    assert (data.class_names, data.num_classes, data.in_chans, data.input_size) == (
        ["cat", "dog"],
        2,
        3,
        (3, 32, 32),
    )
    data = make(root)
    assert sizes(data) == {"train": 12, "val": 4, "test": 4}
    images, targets = next(iter(data.train_dataloader()))
    assert (images.dtype, images.shape, targets.dtype) == (torch.float32, (4, 3, 32, 32), torch.int64)
    write_images(root / "test", n=3)
    assert sizes(make(root)) == {"train": 12, "val": 4, "test": 6}


def test_class_folders_alone_are_split(root: Path) -> None:
    data = make(root / "train", val_fraction=0.34)
    assert sizes(data) == {"train": 8, "val": 4, "test": 4}
    assert torch.bincount(data.datasets["val"].targets).tolist() == [2, 2]
    assert sizes(make(root / "train", val_fraction=0)) == {"train": 12}
    with pytest.raises(DataError, match="ImageFolder has no test part, only train: set val_fraction above 0"):
        make(root / "train", val_fraction=0).test_dataloader()


def test_evaluation_does_not_list_the_training_images(root: Path) -> None:
    data = ImageFolder(root=root, image_size=32)
    data.setup("test")
    assert sizes(data) == {"val": 4, "test": 4}
    data.setup("fit")
    assert sizes(data) == {"val": 4, "test": 4, "train": 12}


def test_grey_and_transparent_images_become_rgb(root: Path) -> None:
    Image.new("L", (50, 40), 200).save(root / "train" / "cat" / "grey.png")
    Image.new("RGBA", (50, 40), (255, 0, 0, 10)).save(root / "train" / "cat" / "clear.png")
    (root / "train" / "cat" / "notes.txt").write_text("not an image")
    data = make(root, batch_size=14)
    assert next(iter(data.train_dataloader()))[0].shape == (14, 3, 32, 32)


# ---- randomness --------------------------------------------------------------------------------------------


def test_augmentation_is_a_function_of_seed_epoch_and_sample(root: Path) -> None:
    data = make(root, **STRONG)
    train = data.datasets["train"]
    before = global_states()
    one = train[SampleKey(3, 1)][0]
    together = train.batch([SampleKey(0, 1), SampleKey(3, 1)])[0][1]
    assert torch.equal(one, together)
    assert not torch.equal(one, train[SampleKey(3, 2)][0])
    assert not torch.equal(one, make(root, seed=1, **STRONG).datasets["train"][SampleKey(3, 1)][0])
    assert global_states() == before


def test_workers_change_nothing(root: Path) -> None:
    alone, helped = (make(root, num_workers=n, **STRONG).train_dataloader() for n in (0, 2))
    before = global_states()
    for _ in range(2):
        for (left, classes), (right, others) in zip(alone, helped, strict=True):
            assert torch.equal(left, right)
            assert torch.equal(classes, others)
    assert global_states() == before


def test_parts_can_be_sent_to_another_process(root: Path) -> None:
    parts = make(root, **STRONG).datasets
    copies = pickle.loads(pickle.dumps(parts))
    assert torch.equal(copies["train"][SampleKey(1, 1)][0], parts["train"][SampleKey(1, 1)][0])


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "augmix-m3-w3", "original", "v0", "3a", None])
def test_policies(root: Path, policy: str | None) -> None:
    images, _ = next(iter(make(root, auto_augment=policy, batch_size=12).train_dataloader()))
    assert images.isfinite().all()


def test_sample_images_are_pictures(root: Path) -> None:
    data = make(root, **STRONG)
    before = global_states()
    images, names = data.sample_images(3, seed=1, augment=True)
    assert images.dtype == torch.uint8
    assert images.shape == (3, 3, 32, 32)
    assert len(names) == 3
    assert torch.equal(images, data.sample_images(3, seed=1, augment=True)[0])
    assert not torch.equal(images, data.sample_images(3, seed=1)[0])
    assert global_states() == before


# ---- evaluation --------------------------------------------------------------------------------------------


def test_small_sizes_are_cropped_and_large_ones_squashed(root: Path) -> None:
    image = Image.new("RGB", (600, 300))
    image.paste((255, 255, 255), (0, 0, 150, 300))  # the left quarter: outside a centre crop
    small, large = ImageFolder(root=root, image_size=224), ImageFolder(root=root, image_size=384)
    assert (small.preprocessing["crop_pct"], small.preprocessing["crop_mode"]) == (0.875, "center")
    assert (large.preprocessing["crop_pct"], large.preprocessing["crop_mode"]) == (1.0, "squash")
    cropped, squashed = (d.transform(training=False, normalize=False)(image) for d in (small, large))
    assert (cropped.shape, squashed.shape) == ((3, 224, 224), (3, 384, 384))
    assert int(cropped.max()) == 0
    assert float((squashed > 127).float().mean()) == pytest.approx(0.25, abs=0.01)
    other = ImageFolder(root=root, image_size=384, crop_pct=0.95, crop_mode="center").preprocessing
    assert (other["crop_pct"], other["crop_mode"]) == (0.95, "center")


def test_normalisation_and_channels(root: Path) -> None:
    data = make(root, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    white = data.transform(training=False)(Image.new("RGB", (60, 60), (255, 255, 255)))
    torch.testing.assert_close(white, torch.full((3, 32, 32), 2.0))
    assert data.preprocessing["mean"] == [0.5, 0.5, 0.5]


def test_imagenet_is_the_same_with_the_usual_recipe(root: Path) -> None:
    data = ImageNet(root=root, image_size=32, batch_size=4, num_workers=0)
    data.setup()
    assert data.train_options["auto_augment"] == "rand-m9-mstd0.5-inc1"
    assert data.train_options["re_prob"] == 0.25
    assert next(iter(data.train_dataloader()))[0].shape == (4, 3, 32, 32)


# ---- everything that can be wrong --------------------------------------------------------------------------


def test_missing_and_empty_folders(root: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no data folder .*nowhere \(No such file or directory\): set data\.path=\.\.\."
    ):
        _ = ImageFolder(root=tmp_path / "nowhere").class_names
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no class folders: put the images of each class"):
        make(tmp_path / "empty")
    (root / "train" / "emu").mkdir()
    (root / "train" / "emu" / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"class folder .*train/emu holds no image .*add some or remove the folder"):
        make(root)


def test_different_classes_are_named(root: Path) -> None:
    write_images(root / "train", ("emu", "fox"))
    with pytest.raises(DataError, match=r"2 class folder\(s\) of .*train are missing in .*val: emu, fox; both need"):
        make(root)
    write_images(root / "val", ("emu", "fox", "gnu"))
    with pytest.raises(DataError, match=r"1 class folder\(s\) of .*val are missing in .*train: gnu; both need"):
        make(root)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("damage", ["text", "empty", "truncated", "missing"])
def test_an_unreadable_image_is_named_in_one_sentence(root: Path, num_workers: int, damage: str) -> None:
    victim = root / "train" / "dog" / "3.jpg"
    content = victim.read_bytes()
    data = make(root, num_workers=num_workers)
    victim.write_bytes({"text": b"hello", "empty": b"", "truncated": content[: len(content) // 2]}.get(damage, b""))
    if damage == "missing":
        victim.unlink()
    with pytest.raises(DataError) as caught:
        list(data.train_dataloader())
    message = str(caught.value)
    assert message.startswith(f"cannot read the image {victim} (")
    assert message.endswith("): repair or remove it")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"crop_scale": (0.5, 0.1)},
            r"ImageFolder\(crop_scale=\(0.5, 0.1\)\): give two positive numbers, low <= high",
        ),
        ({"crop_scale": (0.5, 1.5)}, r"a crop cannot be larger than the image"),
        ({"crop_ratio": (0.0, 1.0)}, r"ImageFolder\(crop_ratio=\(0.0, 1.0\)\)"),
        (
            {"crop_mode": "stretch"},
            r"ImageFolder\(crop_mode='stretch'\): input should be 'center', 'squash' or 'border'",
        ),
        ({"crop_pct": 1e-9}, r"ImageFolder\(image_size=\d+, crop_pct=1e-09\): .* numbers before the crop"),
        ({"crop_pct": 0}, r"ImageFolder\(crop_pct=0\): input should be greater than 0"),
        ({"std": (0.1, 0.0, 0.1)}, r"every value must be greater than 0"),
        ({"mean": (0.5,)}, r"ImageFolder\(mean=\(0.5,\)\): field required"),
        ({"interpolation": "magic"}, r"'nearest', 'bilinear', 'bicubic' or 'lanczos'"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageFolder(root="anywhere", **arguments)


@pytest.mark.parametrize("policy", ["nonsense", "rand-q9", "rand-m9-nonsense3"])
def test_unknown_policies(root: Path, policy: str) -> None:
    with pytest.raises(ValueError, match=f"auto_augment='{policy}'.: timm does not know this policy"):
        make(root, auto_augment=policy)


def test_a_path_is_required() -> None:
    with pytest.raises(TypeError, match="ImageFolder: missing a required argument: 'path'"):
        ImageFolder()  # type: ignore[call-arg]
