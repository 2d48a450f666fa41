"""Class folders of images with timm's transforms: ImageNet and data laid out like it.

Each image is augmented under its own seed, because timm's and torchvision's transforms use the global generators of
torch, numpy and `random`.
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

from zoo.data.checks import DataError, extends, warn_once
from zoo.data.image import Part, Probability, Share
from zoo.data.lists import LIST_WORDS, FileParts
from zoo.data.pictures import FORMATS, Fit, open_picture, picture_problem
from zoo.data.sampling import KeyedDataset, SampleKey, isolated_rng, sample_seed, seed_rng
from zoo.data.twins import file_content, file_size
from zoo.data.walk import Files, below
from zoo.support import inputs

__all__ = ["ImageFolder", "ImageNet"]

EXTENSIONS = tuple(FORMATS)
IMAGES = Files("image", "images", EXTENSIONS)

Range = Annotated[tuple[float, float], Field(description="lowest and highest value")]
Channels = tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]]
Transform = Callable[[Image.Image], Tensor]


class FolderImages(KeyedDataset):
    """Image files, decoded, transformed and stacked into batches.

    Args:
        paths: File of each image.
        targets: Class of each image.
        transform: Maps a PIL image to a tensor `(C, H, W)`.
        seed: Seed of the augmentation; `None` for a deterministic transform.
        opening: The evaluation transform, whose input record says how a file is opened; `transform` by default.
        least: Smallest short side, in pixels, that a reduced decoding may have; that of `opening` by default.
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
        # one array of bytes: a list of strings would be copied into every worker, as reference counts change
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

    def sketch(self, index: int) -> int:
        """Bytes of the file."""
        return file_size(os.fsdecode(self.paths[index]))

    def content(self, index: int) -> bytes:
        """Digest of the file."""
        return file_content(os.fsdecode(self.paths[index]))

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
    """The first images below a folder, at any depth, prepared by an image input record, (count, C, H, W).

    Raises:
        DataError: There are no images, or one cannot be read.
    """
    paths = below(folder, IMAGES)[:count]
    if not paths:
        raise DataError(f"there is no image ({' '.join(EXTENSIONS)}) below {folder}")
    pictures = FolderImages(paths, [0] * len(paths), Fit(form), seed=None)
    return pictures.images([SampleKey(i) for i in range(len(paths))])


class ImageFolder(FileParts):
    """Images in folders, one per class, or of a list, augmented with timm's transforms.

    `path` contains `train/`, `val/` (or `valid/`, `validation/`) and `test/`, each with one folder per class; only
    `train/` is required. Or it contains the class folders themselves; or it is a list, see
    :class:`zoo.data.lists.FileParts`. Without a validation part, `val_fraction` of each class's training images is
    split off, the same for every seed. Without a test part and with `test_fraction=0`, the validation part is also the
    test part, and training runs are not tested.

    For evaluation at `image_size` below 384, the short side is resized to `image_size / 0.875` and the centre is
    cropped; from 384 on, the image is squashed to the size without a crop (as UniRepLKNet's checkpoints are evaluated,
    after ConvNeXt). `crop_pct` and `crop_mode` override this rule.

    Args:
        path: Folder of the images, or a list of them.
        image_size: Side of the model's input, pixels.
        val_fraction: Share of the training images used for validation if there is no validation part.
        crop_scale: Smallest and largest area of a random crop, relative to the image.
        crop_ratio: Smallest and largest aspect ratio (width / height) of a random crop.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        auto_augment: timm's policy string, such as `rand-m9-mstd0.5-inc1`, `augmix-m3-w3`, `original`; `None` for none.
        color_jitter: Strength of brightness, contrast and saturation jitter; unused if `auto_augment` is set, as in
            timm.
        re_prob: Probability of random erasing.
        re_mode: Fill of erased rectangles: `const` the mean, `rand` one random colour, `pixel` random pixels.
        re_count: Largest number of erased rectangles.
        interpolation: Interpolation of all resizing.
        crop_pct: Share of the resized image that the centre crop keeps; `None` follows the rule above.
        crop_mode: `center`, `squash` or `border`; `None` follows the rule above.
        mean: Mean of the red, green and blue channels, on the scale [0, 1].
        std: Standard deviation of the channels.
        background: Grey value behind transparent pixels, 0 (black) to 255 (white).
        **loader: What is about lists, see :class:`zoo.data.lists.FileParts`; seed and loaders, see
            :class:`zoo.data.ImageDataModule`.

    Raises:
        ValueError: If an argument is outside its range.
        DataError: When the folders are listed (`class_names`, `num_classes`, `setup`), if one is missing or empty or
            the parts have different classes; while loading, if an image cannot be read.
    """

    tests_on_validation = True
    kind = IMAGES
    unit = "images"

    @extends(FileParts, num_workers=4)
    def __init__(
        self,
        path: str | Path,
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
        super().__init__(path=path, val_fraction=val_fraction, **loader)
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
        self.image_size = image_size
        self.mean, self.std, self.interpolation, self.background = mean, std, interpolation, background
        large = image_size >= 384
        self.crop_pct = crop_pct or (1.0 if large else 0.875)
        self.crop_mode = crop_mode or ("squash" if large else "center")
        try:
            inputs.read(self.input_record())
        except inputs.InputError as error:
            given = f"image_size={image_size}, crop_pct={self.crop_pct:g}"
            raise ValueError(f"{type(self).__name__}({given}): {error}") from None
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

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of the model's input."""
        return 3, self.image_size, self.image_size

    def setup(self, stage: str | None = None) -> None:
        """List the images, once, without opening them; training images only if they are needed."""
        evaluation = self.transform(training=False)
        assert isinstance(evaluation, Fit)
        parts: tuple[Part, ...] = ("train", "val", "test") if stage in (None, "fit") else ("val", "test")
        for part in parts:
            if part not in self.datasets and (found := self.part(part)) is not None:
                own = (evaluation, None)
                if part == "train":
                    own = (self.transform(training=True), self.seed, evaluation, self._least)  # type: ignore[assignment]
                self.datasets[part] = FolderImages(*found, *own)
        if "test" not in self.datasets and "val" in self.datasets:
            if stage not in ("fit", "validate"):  # a training run has its own message
                warn_once(f"{self.path} has no test part: the test is on the validation part")
            self.datasets["test"] = self.datasets["val"]

    def problem_of(self, path: str) -> str | None:
        """Why an image cannot be read, by its header."""
        return picture_problem(path)

    @property
    def _least(self) -> int:
        """Short side at which the smallest random crop still has about twice the input size."""
        return math.ceil(2 * self.image_size / math.sqrt(self.train_options["scale"][0]))

    def transform(self, training: bool, normalize: bool = True) -> Transform:
        """The transform from a PIL image to a tensor: normalised float32, or uint8 with `normalize=False`.

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
    """ImageNet-1k in its usual layout: `path/train/n01440764/*.JPEG`, `path/val/n01440764/*.JPEG`.

    Arguments are those of `ImageFolder`; the default augmentation is that of ConvNeXt and UniRepLKNet. Classes are
    folder names, so subsets such as ImageNet-100 work too.

    Raises:
        ValueError: If an argument is outside its range.
        DataError: As for `ImageFolder`.
    """

    @extends(
        ImageFolder,
        without=LIST_WORDS,
        auto_augment="rand-m9-mstd0.5-inc1",
        re_prob=0.25,
        batch_size=128,
        num_workers=8,
    )
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
