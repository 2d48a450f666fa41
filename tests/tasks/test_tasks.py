"""What a task promises: losses by name, groups, schedules, and freedom from `loss = criterion(model(x), y)`."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import zoo
from zoo.tasks import (
    ClassificationTask,
    NonFiniteLossError,
    Task,
    create_optimizer,
    create_scheduler,
    load_task,
    param_groups,
)

SPEC = {"model_name": "test_unireplknet", "num_classes": 3, "in_chans": 1}


class Tiny(nn.Module):
    """A model with an auxiliary loss of its own."""

    num_classes = 2

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def aux_losses(self) -> dict[str, Tensor]:
        return {"weight_norm": 0.1 * self.linear.weight.square().sum()}


def loader(batch_size: int = 8, n: int = 32) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=batch_size)


def trainer(folder: Path, **options: Any) -> L.Trainer:
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    return L.Trainer(**{"max_epochs": 3, "default_root_dir": folder, "accelerator": "cpu", **quiet, **options})


def test_auxiliary_losses_join_the_total_and_are_logged_by_name(tmp_path: Path) -> None:
    task = ClassificationTask(Tiny(), {"opt": "sgd", "lr": 0.1})
    engine = trainer(tmp_path)
    engine.fit(task, loader())
    logged = engine.callback_metrics
    assert logged["train/loss"] == pytest.approx(float(logged["train/cross_entropy"] + logged["train/weight_norm"]))


def test_an_optimizer_that_was_built_to_see_its_options_is_the_one_that_trains(tmp_path: Path) -> None:
    task = ClassificationTask(Tiny(), {"opt": "sgd", "lr": 0.1})
    task.build_optimizer()
    first = task._built
    engine = trainer(tmp_path)
    engine.fit(task, loader())
    assert engine.optimizers[0] is first
    again = trainer(tmp_path)
    again.fit(task, loader())
    assert again.optimizers[0] is not first, "the next training begins without a state"
    task.build_optimizer()
    task.model.linear.bias.requires_grad_(False)  # as a callback does in its setup
    frozen = trainer(tmp_path)
    frozen.fit(task, loader())
    assert [p for group in frozen.optimizers[0].param_groups for p in group["params"]] == [task.model.linear.weight]


def test_closed_form_learner_needs_no_optimizer(tmp_path: Path) -> None:
    class Ridge(Task):
        """Accumulates normal equations over the epoch and solves them on its last batch."""

        def training_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            self.gram = getattr(self, "gram", 0) + x.T @ x
            self.moment = getattr(self, "moment", 0) + x.T @ nn.functional.one_hot(y, 2).float()

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self.trainer.is_last_batch:
                self.model.linear.weight.data = torch.linalg.solve(self.gram + torch.eye(4), self.moment).T
                self.model.linear.bias.data.zero_()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/acc", (self(batch[0]).argmax(-1) == batch[1]).float().mean())

    engine = trainer(tmp_path, max_epochs=1)
    engine.fit(Ridge(Tiny()), loader(), loader())
    assert engine.callback_metrics["val/acc"] > 0.8


def test_full_batch_objective_with_lbfgs(tmp_path: Path) -> None:
    class FullBatch(ClassificationTask):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), line_search_fn="strong_wolfe")

    task = FullBatch(Tiny())
    engine = trainer(tmp_path, max_epochs=5)
    engine.fit(task, loader(batch_size=32))
    assert engine.callback_metrics["train/cross_entropy"] < 0.5


def test_manual_optimisation_with_two_loaders(tmp_path: Path) -> None:
    class Alternating(Task):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.automatic_optimization = False
            self.log_strength = nn.Parameter(torch.zeros(()))

        def configure_optimizers(self) -> Any:
            return [
                torch.optim.SGD(self.model.parameters(), lr=0.1),
                torch.optim.SGD([self.log_strength], lr=0.1),
            ]

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer, (x, y) in zip(self.optimizers(), (batch["train"], batch["hyper"]), strict=True):
                loss = nn.functional.cross_entropy(self(x) * self.log_strength.exp(), y)
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

    task = Alternating(model=Tiny())
    before = task.log_strength.item()
    trainer(tmp_path, max_epochs=1).fit(task, {"train": loader(), "hyper": loader(batch_size=16)})
    assert task.log_strength.item() != before


def test_non_finite_loss_is_raised_before_the_optimizer_steps(tmp_path: Path) -> None:
    model = Tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    task = ClassificationTask(model, {"opt": "sgd", "lr": 0.1})
    data = DataLoader(TensorDataset(torch.full((4, 4), torch.nan), torch.zeros(4, dtype=torch.long)), batch_size=4)
    with pytest.raises(NonFiniteLossError, match="step 0, epoch 0: cross_entropy = nan"):
        trainer(tmp_path).fit(task, data)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_padding_rows_count_nowhere() -> None:
    task = ClassificationTask(Tiny())
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 0, 1, -100, -100])
    assert torch.equal(task.losses((x, y))["cross_entropy"], task.losses((x[:4], y[:4]))["cross_entropy"])
    task._evaluate((x, y), task.val_metrics, task.val_loss)
    other = ClassificationTask(task.model)
    other._evaluate((x[:4], y[:4]), other.val_metrics, other.val_loss)
    assert task.val_metrics.compute() == other.val_metrics.compute()
    assert task.val_loss.compute() == pytest.approx(other.val_loss.compute())


@pytest.mark.parametrize(
    "mix", [{"mixup_alpha": 0.5}, {"cutmix_alpha": 1.0}, {"mixup_alpha": 0.5, "cutmix_alpha": 1.0}]
)
def test_mixed_labels_train(mix: dict[str, float]) -> None:
    task = ClassificationTask(SPEC, label_smoothing=0.1, **mix)
    loss = task.losses((torch.randn(6, 1, 32, 32), torch.tensor([0, 1, 2, 0, 1, -100])))["cross_entropy"]
    loss.backward()
    assert torch.isfinite(loss)


def test_channels_last_and_compile_keep_parameter_names() -> None:
    plain = ClassificationTask(SPEC)
    assert ClassificationTask(SPEC, channels_last=True, compile=True).state_dict().keys() == plain.state_dict().keys()


def test_class_names_must_fit() -> None:
    with pytest.raises(ValueError, match="model has 3 classes and the data has 2"):
        ClassificationTask(SPEC, class_names=["a", "b"])


def test_load_task_refuses_what_is_not_a_task(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "weights.ckpt")
    with pytest.raises(zoo.CheckpointError, match="not a training checkpoint of the zoo"):
        load_task(tmp_path / "weights.ckpt")


def test_load_task_cannot_be_talked_into_other_classes(tmp_path: Path) -> None:
    hostile = {"zoo": {"task": "os.system"}, "hyper_parameters": {"command": "true"}, "state_dict": {}}
    torch.save(hostile, tmp_path / "hostile.ckpt")
    with pytest.raises(zoo.CheckpointError):
        load_task(tmp_path / "hostile.ckpt")


def test_groups_leave_vectors_and_biases_undecayed() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    decayed, fixed = sorted(param_groups(model, weight_decay=0.1), key=lambda g: -g["weight_decay"])
    assert [p.ndim for p in decayed["params"]] == [4]
    assert {p.ndim for p in fixed["params"]} == {1}


def test_groups_leave_frozen_parameters_out() -> None:
    model = nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    assert [p.ndim for group in param_groups(model) for p in group["params"]] == [1]


def test_layer_decay_scales_the_rate_by_depth() -> None:
    model = zoo.create_model("test_unireplknet")
    optimizer = create_optimizer(model, lr=1.0, layer_decay=0.5)
    create_scheduler(optimizer, total_steps=10, steps_per_epoch=5, sched="constant")
    rates = {group["lr"] for group in optimizer.param_groups}
    assert max(rates) == 1.0
    assert len(rates) > 3


def test_cosine_warms_up_peaks_and_ends_at_the_minimum() -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    schedule = create_scheduler(optimizer, 100, 10, warmup_epochs=2, min_lr=0.01)
    rates = []
    for step in range(1, 101):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.05)
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) == pytest.approx(19, abs=1)
    assert rates[-1] == pytest.approx(0.01, abs=1e-3)
    assert all(a >= b for a, b in pairwise(rates[20:]))


def test_wrong_names_are_told_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean adamw"):
        create_optimizer(nn.Linear(1, 1), opt="adamwx")
    with pytest.raises(ValueError, match="longer than the whole training"):
        create_scheduler(torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0), 10, 10, warmup_epochs=2)
