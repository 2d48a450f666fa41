"""The continual task: the matrix, its summaries, resume between tasks, pictures, and what is refused."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint

from tests.data.test_image import write_cifar
from tests.test_configs import composed
from zoo.data.streams import ContinualData
from zoo.models.registry import create_model
from zoo.tasks import ContinualTask, NonFiniteLossError, load_task
from zoo.tasks.continual import continual_metrics, forward_transfer, per_sample_mean
from zoo.training.checkpointing import ResumeCheckpoint
from zoo.training.continual import ContinualPictures

SMALL: dict[str, dict[str, Any]] = {
    "kcl": {"model_name": "test_kcl", "kernel": "rff", "num_bases": 32, "shots": 5},
    "gkcl": {"model_name": "test_gkcl"},
    "ewc": {"model_name": "ewc_mlp", "hidden": 16, "img_size": 8, "fisher_samples": 16},
    "replay": {"model_name": "replay_mlp", "hidden": 16, "img_size": 8, "per_class": 4},
    "lwf": {"model_name": "lwf_mlp", "hidden": 16, "img_size": 8},
    "ridge": {"model_name": "gkcl_gaussian", "num_bases": 40, "img_size": 8, "rank": 10},
}


def fit(
    task: ContinualTask, epochs: int, callbacks: Any = (), resume: Path | None = None, **data: Any
) -> ContinualTask:
    options = {"name": "digits", "scenario": "permuted", "tasks": 3, "train_samples": 200, "seed": 3} | data
    stream = ContinualData(**options)
    stream.prepare_data()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            callbacks=list(callbacks),
            enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(task, datamodule=stream, ckpt_path=resume)
    task.logged = dict(trainer.callback_metrics)  # type: ignore[assignment]
    return task


def build(kind: str, **options: Any) -> ContinualTask:
    L.seed_everything(1, verbose=False)
    return ContinualTask(dict(SMALL[kind], tasks=3), **options)


@pytest.mark.parametrize("kind", SMALL)
def test_resume_between_tasks_is_the_unbroken_run(kind: str, tmp_path: Path) -> None:
    whole = fit(build(kind), 3)
    saved = ResumeCheckpoint(tmp_path, every_n_steps=10**6, keep=5)
    fit(build(kind), 2, [saved])
    newest = max(tmp_path.glob("step=*.ckpt"))
    L.seed_everything(99, verbose=False)
    again = ContinualTask(dict(SMALL[kind], tasks=3))
    fit(again, 3, [ResumeCheckpoint(tmp_path / "b", every_n_steps=10**6)], resume=newest, seed=7)
    assert torch.equal(again.matrix.nan_to_num(-1), whole.matrix.nan_to_num(-1))
    assert torch.equal(again.matrix_agnostic.nan_to_num(-1), whole.matrix_agnostic.nan_to_num(-1))
    for key, value in whole.learner.state_dict().items():
        assert torch.equal(again.learner.state_dict()[key], value), key
    rebuilt = load_task(newest)
    assert isinstance(rebuilt, ContinualTask)
    assert rebuilt.learner.tasks_seen == 2


def test_matrix_summaries_and_pictures(tmp_path: Path) -> None:
    task = fit(build("ridge", agnostic="every"), 3, [ContinualPictures(tmp_path)])
    seen = torch.ones(3, 3, dtype=torch.bool).tril()
    assert not bool(task.matrix[seen].isnan().any())
    assert bool(task.matrix[~seen].isnan().all())
    assert float(task.matrix[2].mean()) > 0.5
    logged = {k: float(v) for k, v in task.logged.items()}  # type: ignore[operator, union-attr]
    assert logged["test/acc"] == pytest.approx(float(task.matrix[2].mean()), abs=1e-6)
    assert logged["test/acc_agnostic"] == pytest.approx(float(task.matrix_agnostic[2].mean()), abs=1e-6)
    assert logged["test/kept_samples"] == 0
    assert {"test/forgetting", "test/backward_transfer", "test/forward_transfer", "test/seconds"} <= logged.keys()
    assert (tmp_path / "accuracy_matrix.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "samples.png").read_bytes()[:4] == b"\x89PNG"
    with (tmp_path / "accuracy_matrix.csv").open() as file:
        rows = list(csv.reader(file))
    assert [len(row) for row in rows] == [3, 3, 3]
    assert rows[0][1:] == ["", ""]
    assert float(rows[2][0]) == pytest.approx(float(task.matrix[2, 0]), abs=1e-6)


def test_accuracy_is_per_sample_and_by_own_task() -> None:
    task = fit(build("ridge", eval_batch_size=7), 3)
    images, labels = task.stream.test_part(1)
    with torch.no_grad():
        right = task.learner.eval()(images.float() / 255, 1).argmax(-1) == labels
    assert float(task.matrix[2, 1]) == pytest.approx(float(right.double().mean()))
    assert per_sample_mean(torch.tensor([0.5, 1.0]), torch.tensor([3, 1])) == pytest.approx(0.625)


def test_forward_transfer() -> None:
    matrix = torch.tensor([[0.9, 0.4, 0.0], [0.8, 0.9, 0.5], [0.7, 0.8, 0.9]])
    assert forward_transfer(matrix, torch.tensor([0.1, 0.2, 0.1])) == pytest.approx(0.3)
    assert forward_transfer(matrix[:1, :1], torch.zeros(1)) == 0
    with pytest.raises(ValueError, match="is \\(T, T\\)"):
        continual_metrics(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="max_before_last"):
        continual_metrics(matrix, "mean")  # type: ignore[arg-type]


def test_recipe_can_be_replaced() -> None:
    task = build("ewc", lr=0.02, epochs=3)
    assert (task.learner.recipe.lr, task.learner.recipe.epochs, task.learner.recipe.batch_size) == (0.02, 3, 10)


def test_a_split_stream_masks_the_classes_of_other_tasks() -> None:
    task = fit(build("replay", epochs=3), 3, scenario="split", train_samples=None)
    assert float(task.matrix[2].mean()) > float(task.matrix_agnostic[2].mean())


@pytest.mark.parametrize(
    ("experiment", "small"),
    [("split_cifar100", {"shots": 1, "hidden": 4}), ("split_cifar100_gkcl", {"shots": 2, "hidden": 32, "latent": 4})],
)
def test_split_cifar100_from_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experiment: str, small: dict[str, Any]
) -> None:
    write_cifar(tmp_path, monkeypatch, "CIFAR100")
    config = composed([f"experiment={experiment}", "data.tasks=2"], tmp_path)
    place = {"root": tmp_path, "download": False}
    given = {k: v for k, v in config["data"].items() if k != "_target_"} | place
    settings = {k: v for k, v in config["task"].items() if v is not None and not k.startswith("_")}
    model = {**config["model"], **small, "num_classes": 100, "in_chans": 3}
    task = ContinualTask(model, **(settings | {"epochs": 1}))
    fit(task, 2, **{k: given[k] for k in ("name", "scenario", "tasks", "classes_per_task", *place)}, train_samples=None)
    assert task.learner.tasks_seen == 2
    assert not bool(task.matrix[1].isnan().any())
    assert task.learner.active[1].nonzero().flatten().tolist() == [5, 6, 7, 8, 9]


def test_what_cannot_run_is_told() -> None:
    with pytest.raises(ValueError, match="recipe of its own"):
        build("kcl", optimizer={"opt": "sgd"})
    with pytest.raises(ValueError, match="no continual learner"):
        ContinualTask({"model_name": "test_grbf"})
    with pytest.raises(ValueError, match="room for tasks=3"):
        fit(build("ridge"), 5, tasks=5)
    with pytest.raises(NonFiniteLossError, match="task 0"):
        fit(build("replay", lr=1e38, epochs=5), 3)


def test_naive_forgets_more_than_kcl_and_gkcl_in_closed_form() -> None:
    found = {}
    for name, options in (
        ("naive_mlp", {"hidden": 64, "img_size": 8}),
        ("kcl_mlp", {"hidden": 64, "img_size": 8, "shots": 10}),
        ("gkcl_gaussian", {"num_bases": 300, "img_size": 8, "rank": 20}),
    ):
        L.seed_everything(0, verbose=False)
        task = ContinualTask(create_model(name, tasks=4, **options))
        fit(task, 4, tasks=4, train_samples=600)
        found[name] = task.summary(3)["acc"]
    assert found["naive_mlp"] < found["kcl_mlp"]
    assert found["naive_mlp"] < found["gkcl_gaussian"]
