"""The rate of every optimizer step, as Lightning takes the steps: accumulated, limited, distributed, resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from zoo.tasks import ClassificationTask, ForecastingTask, ScheduleError, TabularTask, Task

STEP = {"sched": "step", "decay_epochs": 2.0}


class Tiny(nn.Module):
    num_classes = 2

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Rates(L.Callback):
    """Notes the rate of every optimizer step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, task: L.LightningModule, optimizer: Any) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


def rates(
    folder: Path,
    schedule: dict[str, Any] | None,
    *,
    task: type[Task] = ClassificationTask,
    batches: int = 3,
    lr: float = 0.004,
    resume: Path | None = None,
    keep: Path | None = None,
    **options: Any,
) -> list[float]:
    """Train a linear model on `batches` batches an epoch; the rates of its steps."""
    rows = torch.randn(batches * 4, 4, generator=torch.Generator().manual_seed(0))
    targets: Any = rows[:, :2] if task is ForecastingTask else (rows[:, 0] > 0).long()
    watched = Rates()
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(
        default_root_dir=folder, accelerator="cpu", logger=False, callbacks=[watched], **quiet, **options
    )
    trainer.fit(
        task(Tiny(), {"opt": "sgd", "lr": lr}, schedule),
        DataLoader(TensorDataset(rows, targets), 4),
        ckpt_path=resume and str(resume),
    )
    if keep is not None:
        trainer.save_checkpoint(keep)
    return watched.seen


DECAYED = [0.004] * 4 + [0.0004] * 4


@pytest.mark.parametrize("task", [ClassificationTask, TabularTask, ForecastingTask])
def test_an_epoch_ends_with_a_step_of_what_is_left(task: type[Task], tmp_path: Path) -> None:
    assert rates(tmp_path, STEP, task=task, max_epochs=4, accumulate_grad_batches=2) == pytest.approx(DECAYED)


@pytest.mark.parametrize(
    "options",
    [
        {"batches": 9, "limit_train_batches": 3, "max_epochs": 4},
        {"batches": 10, "limit_train_batches": 0.31, "max_epochs": 4},
        {"max_steps": 8, "max_epochs": -1},
        {"max_steps": 8, "max_epochs": 20},
    ],
    ids=str,
)
def test_steps_are_counted_as_lightning_takes_them(options: dict[str, Any], tmp_path: Path) -> None:
    assert rates(tmp_path, STEP, accumulate_grad_batches=2, **options) == pytest.approx(DECAYED)


@pytest.mark.parametrize(
    ("sched", "expected"),
    [  # two steps an epoch, one epoch of warm-up, three after it
        ("constant", [0, 0.5, 1, 1, 1, 1, 1, 1]),
        ("step", [0, 0.5, 1, 1, 0.1, 0.1, 0.01, 0.01]),
        ("multistep", [0, 0.5, 1, 1, 0.1, 0.1, 0.01, 0.01]),
        ("cosine", [0, 0.5, 1, 0.9330127, 0.75, 0.5, 0.25, 0.0669873]),
        ("poly", [0, 0.5, *(((6 - t) / 6) ** 0.1 for t in range(6))]),
        ("wsd", [0, 0.5, 1, 1, 1, 1, 1, 1 - 0.5**0.5]),
    ],
)
def test_every_form_over_partial_accumulations(sched: str, expected: list[float], tmp_path: Path) -> None:
    schedule = {"sched": sched, "warmup_epochs": 1.0, "min_lr": 0.0}
    schedule |= {"decay_milestones": [1, 2]} if sched == "multistep" else {}
    schedule |= {"decay_epochs": 1.0} if sched in ("step", "wsd") else {}
    found = rates(tmp_path, schedule, lr=1.0, max_epochs=4, accumulate_grad_batches=2)
    assert found == pytest.approx(expected, abs=1e-6)


def test_a_training_that_goes_on_has_the_rates_of_an_unbroken_one(tmp_path: Path) -> None:
    cosine = {"sched": "cosine", "warmup_epochs": 1.0}
    unbroken = rates(tmp_path, cosine, max_epochs=6, accumulate_grad_batches=2)
    rates(tmp_path, cosine, max_epochs=3, accumulate_grad_batches=2, keep=tmp_path / "half.ckpt")
    went_on = rates(tmp_path, cosine, max_epochs=6, accumulate_grad_batches=2, resume=tmp_path / "half.ckpt")
    assert went_on == unbroken[6:]


@pytest.mark.parametrize("schedule", [None, {"sched": "constant"}])
def test_a_training_that_goes_on_takes_another_rate(schedule: dict[str, Any] | None, tmp_path: Path) -> None:
    rates(tmp_path, schedule, max_epochs=1, keep=tmp_path / "first.ckpt")
    assert rates(tmp_path, schedule, lr=0.001, max_epochs=2, resume=tmp_path / "first.ckpt") == [0.001] * 3


@pytest.mark.parametrize(
    ("schedule", "options", "told"),
    [
        ({"warmup_epochs": 1.0}, {"max_steps": 2}, "warmup_epochs = 1 is longer than the whole training of 0.666667"),
        ({"min_lr": 0.1}, {}, "min_lr = 0.1 is above the rate 0.004"),
        ({"warmup_epochs": 1.0, "warmup_lr": 0.1}, {}, "warmup_lr = 0.1 is above the rate 0.004"),
        ({"sched": "wsd", "decay_epochs": 4.0}, {}, "decay_epochs = 4 is longer than the 3 epochs"),
        ({"sched": "wsd"}, {"max_steps": 2}, "sched = wsd"),
        ({"sched": "multistep"}, {}, r"decay_milestones = \[\] must be epochs in rising order"),
        ({"sched": "multistep", "decay_milestones": [2, 1]}, {}, "in rising order"),
        ({}, {"max_epochs": -1}, "a schedule needs an end"),
    ],
    ids=str,
)
def test_a_schedule_that_does_not_fit_is_told(
    schedule: dict[str, Any], options: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(ScheduleError, match=told):
        rates(tmp_path, schedule, **{"max_epochs": 3, **options})
