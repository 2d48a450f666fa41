"""Folders of images, one folder per class, with timm's transforms: ImageNet and everything laid out like it.

Images are decoded and augmented one by one, each under its own seed, because timm's and torchvision's
transforms draw from three global generators: torch's, numpy's and that of `random`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field, PositiveInt
from torch import Tensor

from zoo.data.checks import DataError, extends, tell
from zoo.data.image import ImageDataModule, Probability, Share
from zoo.data.pictures import FORMATS, Fit, open_picture
from zoo.data.sampling import KeyedDataset, SampleKey, isolated_rng, sample_seed, seed_rng, stratified_split
from zoo.data.sources import SPLIT_SEED
from zoo.data.walk import Files, below, class_folders, parts, scan, scan_like
from zoo.support import inputs

__all__ = ["ImageFolder", "ImageNet"]

EXTENSIONS = tuple(FORMATS)
IMAGES = Files("image", "images", EXTENSIONS)

Range = Annotated[tuple[float, float], Field(description="lowest and highest value")]
Channels = tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]]
Transform = Callable[[Image.Image], Tensor]


class FolderImages(KeyedDataset):
    """Images in files, decoded, transformed and stacked into a batch.

    Args:
        paths: File of each image.
        targets: Class of each image.
        transform: From an opened picture to a tensor `(C, H, W)`.
        seed: Seed of the augmentation; `None` for a transform without randomness.
        opening: The evaluation transform, which knows how a file is opened; `transform` itself by default.
        least: Short side, in pixels, below which a large picture is not decoded; that of `opening` by default.
    """

    def __init__(
        self,
        paths: Sequence[str],
        targets: Sequence[int],
        transform: Transform,
        seed: int | None,
        opening: Fit | None = None,
        least: int | None = None,
    ) -> None:
        super().__init__(targets)
        # one block of bytes: of a million strings, each worker would get its own copy as it touches them
        self.paths = np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)
        self.transform, self.seed = transform, seed
        self.opening = opening or (transform if isinstance(transform, Fit) else None)
        self.least = least or (self.opening.least if self.opening else None)

    def images(self, keys: Sequence[SampleKey]) -> Tensor:
        """The transformed images of `keys`, `(B, C, H, W)`.

        Raises:
            DataError: If a file cannot be read as an image.
        """
        with nullcontext() if self.seed is None else isolated_rng():
            return torch.stack([self._image(key) for key in keys])

    def _image(self, key: SampleKey) -> Tensor:
        picture = self.picture(key.sample)
        if self.seed is not None:
            seed_rng(sample_seed(self.seed, key.epoch, key.sample))
        return self.transform(picture)

    def picture(self, index: int) -> Image.Image:
        """The decoded image, upright, grey or RGB.

        Raises:
            DataError: See :func:`zoo.data.pictures.open_picture`.
        """
        record: Any = self.opening.record if self.opening else None
        how = {"channels": record.channels, "background": record.background} if record else {}
        return open_picture(os.fsdecode(self.paths[index]), **how, least=self.least)


def first_images(folder: Path, form: Any, count: int) -> Tensor:
    """The first images below a folder, at any depth, prepared as a record of images says, (count, C, H, W).

    Raises:
        DataError: There are none, or one cannot be read.
    """
    paths = below(folder, IMAGES)[:count]
    if not paths:
        raise DataError(f"there is no image ({' '.join(EXTENSIONS)}) below {folder}")
    pictures = FolderImages(paths, [0] * len(paths), Fit(form), seed=None)
    return pictures.images([SampleKey(i) for i in range(len(paths))])


class ImageFolder(ImageDataModule):
    """Images in folders, one per class, augmented with timm's transforms.

    `root` holds `train/` and `val/` (or `valid/`, `validation/`), and perhaps `test/`, each with one folder
    per class; or the class folders themselves, or only `train/`. Without a validation folder, `val_fraction`
    of each class's training images is split off, the same for every seed. Without a test folder, the
    validation part is also the test part.

    For evaluation, an image smaller than 384 is resized so that its short side is `size / 0.875` and cropped
    in the centre; from 384 on it is squashed to the size without a crop (the rule of UniRepLKNet's
    checkpoints, after ConvNeXt). `crop_pct` and `crop_mode` override the rule.

    Args:
        root: Folder of the images.
        image_size: Side of the model's input in pixels.
        val_fraction: Share of the training images used for validation where there is no validation folder.
        crop_scale: Smallest and largest share of the image's area that a random crop covers.
        crop_ratio: Smallest and largest width / height of a random crop.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        auto_augment: timm's policy string, such as `rand-m9-mstd0.5-inc1`, `augmix-m3-w3`, `original`; `None`
            for none.
        color_jitter: Strength of brightness, contrast and saturation changes; unused while a policy is set,
            as in timm.
        re_prob: Probability of erasing a rectangle.
        re_mode: What it is filled with: `const` the mean, `rand` one random colour, `pixel` a random colour
            per pixel.
        re_count: Largest number of erased rectangles.
        interpolation: Of all resizing.
        crop_pct: Share of the resized image that the centre crop keeps; `None` follows the rule above.
        crop_mode: `center`, `squash` or `border`; `None` follows the rule above.
        mean: Mean of the red, green and blue channel on the scale [0, 1].
        std: Standard deviation of the channels.
        background: Grey value, 0 for black to 255 for white, that shows where a picture is transparent.
        **loader: Seed and loaders, see :class:`zoo.data.ImageDataModule`.

    Raises:
        ValueError: If an argument is outside its range.
        DataError: On the first look at the folders (`class_names`, `num_classes`, `setup`), if one is missing
            or empty or the parts' classes differ; while loading, if an image cannot be read.
    """

    tests_on_validation = True

    @extends(ImageDataModule, num_workers=4)
    def __init__(
        self,
        root: str | Path,
        image_size: PositiveInt = 224,
        val_fraction: Share = 0.1,
        crop_scale: Range = (0.08, 1.0),
        crop_ratio: Range = (3 / 4, 4 / 3),
        hflip: Probability = 0.5,
        vflip: Probability = 0.0,
        auto_augment: str | None = None,
        color_jitter: Annotated[float, Field(ge=0)] = 0.4,
        re_prob: Probability = 0.0,
        re_mode: Literal["const", "rand", "pixel"] = "pixel",
        re_count: PositiveInt = 1,
        interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic",
        crop_pct: Annotated[float, Field(gt=0, le=1)] | None = None,
        crop_mode: Literal["center", "squash", "border"] | None = None,
        mean: Channels = (0.485, 0.456, 0.406),
        std: Channels = (0.229, 0.224, 0.225),
        background: Annotated[int, Field(ge=0, le=255)] = 255,
        **loader: Any,
    ) -> None:
        super().__init__(**loader)
        for name, (low, high) in {"crop_scale": crop_scale, "crop_ratio": crop_ratio}.items():
            if not 0 < low <= high:
                raise ValueError(
                    f"{type(self).__name__}({name}=({low}, {high})): give two positive numbers, low <= high"
                )
        if crop_scale[1] > 1:
            raise ValueError(
                f"{type(self).__name__}(crop_scale={crop_scale}): a crop cannot be larger than the image, 1"
            )
        if not all(std):
            raise ValueError(f"{type(self).__name__}(std={std}): every value must be greater than 0")
        self.root = Path(root).expanduser()
        self.image_size, self.val_fraction = image_size, val_fraction
        self.mean, self.std, self.interpolation, self.background = mean, std, interpolation, background
        large = image_size >= 384
        self.crop_pct = crop_pct or (1.0 if large else 0.875)
        self.crop_mode = crop_mode or ("squash" if large else "center")
        self.train_options: dict[str, Any] = {
            "scale": crop_scale,
            "ratio": crop_ratio,
            "hflip": hflip,
            "vflip": vflip,
            "auto_augment": auto_augment,
            "color_jitter": color_jitter or None,
            "re_prob": re_prob,
            "re_mode": re_mode,
            "re_count": re_count,
        }
        self._class_names: list[str] = []

    @property
    def class_names(self) -> list[str]:
        """Names of the class folders, by target.

        Raises:
            DataError: If the folder is missing or has no class folders.
        """
        if not self._class_names:
            self._class_names = class_folders(parts(self.root)["train"], IMAGES)
        return list(self._class_names)

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of an image as the model sees it."""
        return 3, self.image_size, self.image_size

    def setup(self, stage: str | None = None) -> None:
        """List the images, once; none is opened. Training images are listed only if they are needed."""
        where = parts(self.root)
        evaluation = self.transform(training=False)
        assert isinstance(evaluation, Fit)
        if "train" not in self.datasets and (stage in (None, "fit") or "val" not in where):
            paths, targets = scan(where["train"], self.class_names, IMAGES)
            first, second = stratified_split(targets, 0.0 if "val" in where else self.val_fraction, SPLIT_SEED)
            self.datasets["train"] = FolderImages(
                [paths[i] for i in first],
                [targets[i] for i in first],
                self.transform(training=True),
                self.seed,
                evaluation,
                self._least,
            )
            if len(second):
                rest = [paths[i] for i in second], [targets[i] for i in second]
                self.datasets["val"] = FolderImages(*rest, evaluation, None)
        for part in ("val", "test"):
            if part not in self.datasets and part in where:
                found = scan_like(where[part], where["train"], self.class_names, IMAGES)
                self.datasets[part] = FolderImages(*found, evaluation, None)
        if "test" not in self.datasets and "val" in self.datasets:
            if stage != "fit":  # a run says in its own words what it will not test
                tell(f"{self.root} has no test part: the test is on the validation part")
            self.datasets["test"] = self.datasets["val"]

    @property
    def _least(self) -> int:
        """Short side from which even the smallest random crop need not be enlarged much."""
        return math.ceil(2 * self.image_size / math.sqrt(self.train_options["scale"][0]))

    def transform(self, training: bool, normalize: bool = True) -> Transform:
        """The transform from a picture to a tensor: normalised float32, or uint8 with `normalize=False`.

        Raises:
            ValueError: If timm does not know the `auto_augment` policy.
        """
        if not training:
            return Fit(inputs.read(self.input_record()), normalize)
        from timm.data import create_transform

        try:
            return create_transform(
                input_size=self.input_size,
                is_training=True,
                interpolation=self.interpolation,
                mean=self.mean,
                std=self.std,
                normalize=normalize,
                **self.train_options,
            )
        except (AssertionError, KeyError, ValueError) as error:
            policy = self.train_options["auto_augment"]
            raise ValueError(
                f"{type(self).__name__}(auto_augment={policy!r}): timm does not know this policy; "
                "examples are rand-m9-mstd0.5-inc1, augmix-m3-w3, original and v0"
            ) from error

    def _pictures(self, dataset: KeyedDataset, keys: Sequence[SampleKey], seed: int, augment: bool) -> Tensor:
        assert isinstance(dataset, FolderImages)
        view = FolderImages([], [], self.transform(augment, normalize=False), seed, dataset.opening, dataset.least)
        view.paths = dataset.paths
        return view.images(keys)


class ImageNet(ImageFolder):
    """ImageNet-1k in its usual layout: `root/train/n01440764/*.JPEG`, `root/val/n01440764/*.JPEG`.

    Arguments are those of `ImageFolder`, with the augmentation of ConvNeXt's and UniRepLKNet's recipes as the
    default. The classes are the folder names, so subsets such as ImageNet-100 work too.

    Raises:
        ValueError: If an argument is outside its range.
        DataError: As for `ImageFolder`.
    """

    @extends(ImageFolder, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25, batch_size=128, num_workers=8)
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
