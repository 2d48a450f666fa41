"""Data modules under Lightning: exact resume at every step, several processes, overfitting, prediction."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn import functional as F

from tests.data.test_sampling import Noise
from zoo.data import IGNORE_INDEX, Digits, ImageDataModule

EPOCHS, STEPS = 3, 4  # of the little trainings below


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        yield
    logger.setLevel(level)


class NoiseData(ImageDataModule):
    """Rows of `(sample, epoch)` and random draws: what a step saw can be read off its batch."""

    class_names = [str(i) for i in range(7)]  # noqa: RUF012
    input_size = (1, 1, 5)

    def __init__(self, num_workers: int = 0, batch_size: int = 5) -> None:
        super().__init__(
            seed=1,
            batch_size=batch_size,
            eval_batch_size=None,
            num_workers=num_workers,
            drop_last=True,
            pin_memory=False,
        )

    def setup(self, stage: str | None = None) -> None:
        self.datasets = {"train": Noise(23, seed=1), "val": Noise(7), "test": Noise(7)}


class Reader(L.LightningModule):
    """Learns something from every batch, and writes down each batch."""

    def __init__(self, asks_for_length: bool = False) -> None:
        super().__init__()
        self.asks_for_length = asks_for_length
        self.net = torch.nn.Linear(5, 7).double()
        self.seen: list[tuple[int, int, str]] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, targets = batch
        self.seen.append((self.current_epoch, batch_idx, str(images.tolist())))
        return F.cross_entropy(self.net(images), targets)

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return batch[0][:, 0]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.asks_for_length:
            assert self.trainer.estimated_stepping_batches == EPOCHS * STEPS
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class SaveEverywhere(Callback):
    """Saves at the end of every step, and after every validation and every epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step:02d}-step.ckpt")

    def on_validation_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step:02d}-validation.ckpt")

    def on_train_epoch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step:02d}-epoch.ckpt")


def make_trainer(**options: Any) -> L.Trainer:
    return L.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": EPOCHS,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "use_distributed_sampler": False,
            "num_sanity_val_steps": 0,
            **options,
        }
    )


def fit(num_workers: int = 0, resume: Path | None = None, asks_for_length: bool = False, **options: Any) -> Reader:
    torch.manual_seed(0)
    reader = Reader(asks_for_length)
    trainer = make_trainer(**options)
    trainer.fit(reader, NoiseData(num_workers), ckpt_path=resume, weights_only=True if resume else None)
    return reader


@pytest.mark.parametrize(
    ("num_workers", "options"),
    [
        (0, {}),
        (0, {"max_epochs": -1, "max_steps": EPOCHS * STEPS}),
        (0, {"limit_train_batches": 3}),
        (0, {"asks_for_length": True}),
        (0, {"asks_for_length": True, "max_epochs": -1, "max_steps": EPOCHS * STEPS}),
        (2, {}),
    ],
    ids=["epochs", "steps", "limited", "schedule", "schedule-steps", "workers"],
)
def test_resuming_anywhere_changes_nothing(tmp_path: Path, num_workers: int, options: dict[str, Any]) -> None:
    whole = fit(num_workers, callbacks=[SaveEverywhere(tmp_path)], **options)
    length = options.get("limit_train_batches", STEPS)
    assert len(whole.seen) >= EPOCHS * length
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) == len(whole.seen) + 2 * (len(whole.seen) // length)
    for checkpoint in checkpoints:
        step = int(checkpoint.name[:2])
        resumed = fit(num_workers, resume=checkpoint, **options)
        assert resumed.seen == whole.seen[step:], checkpoint.name
        assert torch.equal(resumed.net.weight, whole.net.weight), checkpoint.name


def test_resuming_a_resumed_run_changes_nothing(tmp_path: Path) -> None:
    whole = fit(callbacks=[SaveEverywhere(tmp_path)])
    fit(callbacks=[SaveEverywhere(tmp_path)], resume=tmp_path / "02-step.ckpt")
    for name in ("03-step", "04-epoch", "06-step", "08-validation", "11-step"):
        resumed = fit(resume=tmp_path / f"{name}.ckpt")
        assert resumed.seen == whole.seen[int(name[:2]) :], name
        assert torch.equal(resumed.net.weight, whole.net.weight), name


def test_overfitting_repeats_the_same_batches() -> None:
    reader = fit(overfit_batches=2)
    assert len(reader.seen) == 2 * EPOCHS
    samples = [[row[0] for row in eval(text)] for _, _, text in reader.seen]
    assert samples[:2] == samples[2:4] == samples[4:]


def test_no_validation_part_is_fine() -> None:
    digits = Digits(val_fraction=0, batch_size=500)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(_Linear(), digits)
    assert digits.val_dataloader() == []
    assert trainer.global_step == 2


class _Linear(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(64, 10)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0].flatten(1)), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_prediction_goes_through_the_test_part_in_order() -> None:
    predictions = make_trainer().predict(Reader(), NoiseData(batch_size=4))
    assert predictions is not None
    assert torch.cat(predictions).tolist() == list(range(7))  # type: ignore[arg-type]


class Ranks(Reader):
    """Writes down what each process saw; learns nothing, as autograd may not run in a fork of every process."""

    automatic_optimization = False

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.rows: dict[str, list[list[Tensor]]] = {"train": [], "val": []}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:  # type: ignore[override]
        self.rows["train"].append([batch[0], batch[1]])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.rows["val"].append(list(batch))

    def on_fit_end(self) -> None:
        torch.save(self.rows, self.folder / f"{self.global_rank}.pt")


def test_two_processes_see_what_one_sees(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_epochs": 1, "limit_val_batches": 1.0}
    (tmp_path / "one").mkdir()
    make_trainer(**options).fit(Ranks(tmp_path / "one"), NoiseData(batch_size=4))
    make_trainer(**options, strategy="ddp_fork", devices=2).fit(Ranks(tmp_path), NoiseData(batch_size=2))
    one = torch.load(tmp_path / "one" / "0.pt")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert len(one["train"]) == len(ranks[0]["train"]) == len(ranks[1]["train"]) == 5
    for (images, targets), left, right in zip(one["train"], *(r["train"] for r in ranks), strict=True):
        assert torch.equal(images, torch.cat([left[0], right[0]]))
        assert torch.equal(targets, torch.cat([left[1], right[1]]))
    images, targets = (torch.cat([batch[i] for r in ranks for batch in r["val"]]) for i in range(2))
    assert len(targets) == 8, "seven samples and one that fills up"
    real = targets != IGNORE_INDEX
    assert sorted(images[real, 0].tolist()) == list(range(7))
