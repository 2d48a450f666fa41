"""The continual task: the matrix, its summaries, resume between tasks, pictures, and what is refused."""

from __future__ import annotations

import csv
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch.utils.data import DataLoader

from tests.data.test_image import write_cifar
from tests.training.test_configs import composed
from zoo.data.task_streams import ContinualData, TaskOfEpoch, TaskStream
from zoo.models.continual import TaskError, baselines, gkcl, incremental_ridge, kcl
from zoo.registry.factory import create_model
from zoo.tasks import ContinualTask, NonFiniteLossError, OptionError, load_task
from zoo.tasks.continual import batches_of, continual_metrics, forward_transfer, per_sample_mean
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


def run(
    task: ContinualTask,
    stream: ContinualData | DataLoader[Any],
    epochs: int,
    callbacks: Any = (),
    resume: Path | None = None,
) -> ContinualTask:
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
        trainer.fit(task, stream, ckpt_path=resume)
    task.logged = dict(trainer.callback_metrics)  # type: ignore[assignment]
    return task


def fit(
    task: ContinualTask, epochs: int, callbacks: Any = (), resume: Path | None = None, **data: Any
) -> ContinualTask:
    options = {"name": "digits", "scenario": "permuted", "tasks": 3, "train_samples": 200, "seed": 3} | data
    stream = ContinualData(**options)
    stream.prepare_data()
    return run(task, stream, epochs, callbacks, resume)


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


class Tinted(TaskStream):
    """A stream of one's own: colour pictures, of another brightness in each task."""

    def transform(self, images: torch.Tensor, task: int) -> torch.Tensor:
        return images // (task + 1)


def tinted(tasks: int = 2) -> Tinted:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 8, 8), generator=draw, dtype=torch.uint8)
    return Tinted((images, torch.arange(40) % 4), (images[:8], torch.arange(8) % 4), tasks)


@pytest.mark.parametrize("channels_last", [False, True])
def test_what_is_learnt_is_the_batch_of_the_loader(channels_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any loader of any stream will do; pictures come in the order of the weights."""
    stream, seen = tinted(), []
    options = {"num_classes": 4, "in_chans": 3, "img_size": 8, "tasks": 2, "hidden": 2, "shots": 2, "task_classes": 4}
    task = ContinualTask(create_model("kcl_resnet", **options), channels_last=channels_last)
    losses = task.learner.losses
    monkeypatch.setattr(task.learner, "losses", lambda x, y, t: (seen.append((t, x)), losses(x, y, t))[1])
    run(task, DataLoader(stream, batch_size=None, sampler=TaskOfEpoch(lambda: task.current_epoch)), 2)
    for t in range(2):
        shown = torch.cat([x for number, x in seen if number == t])
        assert len(shown) == 40 - 4 * 2
        rows = {row.numpy().tobytes() for row in (stream[t].train[0] / 255).contiguous()}
        assert {row.contiguous().numpy().tobytes() for row in shown} <= rows
    assert all(x.is_contiguous(memory_format=torch.channels_last) == channels_last for _, x in seen)
    assert torch.isfinite(task.matrix[1]).all()


def test_loaders_that_do_not_give_a_task_an_epoch_are_told() -> None:
    def start(loader: DataLoader[Any]) -> None:
        run(ContinualTask(create_model("naive_mlp", num_classes=4, in_chans=3, img_size=8, tasks=2)), loader, 2)

    class Parts(Tinted):
        def __getitem__(self, task: int) -> Any:
            return super().__getitem__(task).train

    with pytest.raises(OptionError, match="a loader of a stream of tasks"):
        start(DataLoader(list(tinted()), batch_size=None))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="one task an epoch; epoch 0 got task 1: use"):
        start(DataLoader(tinted(), batch_size=None, sampler=[1]))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="one task an epoch; epoch 0 got a list: use"):
        start(DataLoader(Parts(tinted().train, tinted().test, 2), batch_size=None))  # type: ignore[arg-type]


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
    assert (task.recipe.lr, task.recipe.epochs, task.recipe.batch_size) == (0.02, 3, 10)


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


MODULES = (baselines, gkcl, incremental_ridge, kcl)
LEARNERS: dict[str, dict[str, Any]] = {
    "kcl_mlp": {"hidden": 16, "shots": 1},
    "kcl_resnet": {"hidden": 2, "shots": 1, "in_chans": 1, "task_classes": 10},
    "gkcl_mlp": {"hidden": 16, "latent": 4, "shots": 2},
    "gkcl_mixture": {"hidden": 16, "latent": 4, "shots": 2},
    "gkcl_resnet": {"hidden": 32, "latent": 4, "shots": 2, "in_chans": 1, "profile": "input"},
    "gkcl_gaussian": {"num_bases": 40, "rank": 10},
    "analytic_ridge": {"num_bases": 40},
    "naive_mlp": {"hidden": 16},
    "joint_mlp": {"hidden": 16},
    "ewc_mlp": {"hidden": 16, "fisher_samples": 8},
    "replay_mlp": {"hidden": 16, "per_class": 1},
    "lwf_mlp": {"hidden": 16},
    "test_kcl": {"shots": 1},
    "test_gkcl": {"profile": "input"},
}


@pytest.fixture(scope="module")
def digits() -> ContinualData:
    """31 rows a task: in batches of ten the last one is odd."""
    data = ContinualData("digits", tasks=3, train_samples=31, seed=3)
    data.prepare_data()
    data.setup()
    return data


def test_no_learner_is_forgotten() -> None:
    assert {name.split(".")[0] for room in MODULES for name in room.default_cfgs} == LEARNERS.keys()


@pytest.mark.parametrize("name", LEARNERS)
def test_every_learner_on_a_stream_of_any_length(name: str, digits: ContinualData) -> None:
    """The room for tasks may be larger than the stream; what a learner does last it does at the stream's end."""
    room = {} if name.startswith("test_") else {"tasks": 5, "img_size": 8}
    for length in (1, 2, 3):
        data = ContinualData("digits", tasks=length, train_samples=31)
        data._stream = type(digits.stream)(digits.stream.train, digits.stream.test, length, 3, 31)
        L.seed_everything(1, verbose=False)
        task = ContinualTask(create_model(name, num_classes=10, **{**room, **LEARNERS[name]}), batch_size=10, epochs=1)
        before = {k: v.clone() for k, v in task.learner.state_dict().items() if k != "seen"}
        run(task, data, length)
        assert task.learner.tasks_seen == length
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        assert bool(torch.isfinite(task.matrix[:length, :length][seen]).all())
        assert bool(torch.isfinite(task.matrix_agnostic[length - 1, :length]).all())
        state = task.learner.state_dict()
        weights = [k for k in before if "active" not in k and "coreset" not in k and "memory" not in k]
        assert any(not torch.equal(state[k], before[k]) for k in weights)


def test_what_comes_last_comes_at_the_end_of_the_stream() -> None:
    """Joint learns nothing before, whatever room it has; the shared ridge classifier knows every task seen."""
    L.seed_everything(0, verbose=False)
    build_joint = partial(create_model, "joint_mlp", img_size=8, hidden=32)
    joint = fit(ContinualTask(build_joint(), epochs=20), 2, tasks=2, train_samples=500)
    assert float(joint.matrix[1, :2].min()) > 0.7
    assert float(joint.matrix_agnostic[1, :2].min()) > 0.7
    cut = fit(ContinualTask(build_joint(), epochs=20), 2, tasks=4, train_samples=500)
    assert float(cut.matrix[1, :2].min()) > 0.7
    ridge = fit(ContinualTask(create_model("analytic_ridge", img_size=8, tasks=5, num_bases=2100)), 2, tasks=2)
    assert float(ridge.matrix_agnostic[1, :2].min()) > 0.5


def test_what_cannot_be_learnt_is_told_before_anything_is() -> None:
    def start(name: str, epochs: int = 2, **options: Any) -> ContinualTask:
        data = {k: options.pop(k) for k in ("tasks", "scenario", "train_samples") if k in options}
        task = ContinualTask(create_model(name, **{"img_size": 8, **options}))
        try:
            return fit(task, epochs, **{"tasks": 2, **data})
        finally:
            assert task.learner.tasks_seen == 0

    with pytest.raises(ValueError, match=r"an epoch learns one: trainer\.max_epochs = 3"):
        start("naive_mlp", 3)
    with pytest.raises(
        TaskError, match=r"train part has images of shape \[1, 1, 8, 8\]; the model takes \(B, 1, 28, 28\)"
    ):
        start("naive_mlp", img_size=28)
    with pytest.raises(TaskError, match="task 0 has class 9; the model has num_classes=5"):
        start("ewc_mlp", num_classes=5)
    with pytest.raises(TaskError, match="samples; 20 of each class are needed"):
        start("replay_mlp", train_samples=100)
    with pytest.raises(TaskError, match="samples; 20 of each class are needed"):
        start("kcl_mlp", train_samples=100)
    with pytest.raises(TaskError, match="only: nothing can be told apart"):
        start("analytic_ridge", train_samples=1)


@pytest.mark.parametrize("name", [n for n in LEARNERS if not n.startswith("test_")])
def test_images_and_labels_of_the_wrong_kind(name: str) -> None:
    learner = create_model(name, num_classes=10, img_size=8, tasks=2, **LEARNERS[name])
    draw = torch.Generator().manual_seed(0)
    x, y = torch.rand(40, 1, 8, 8, generator=draw), torch.arange(40) % 10
    bad: list[tuple[torch.Tensor, torch.Tensor, str]] = [
        ((255 * x).byte(), y, "type torch.uint8; the model takes torch.float32"),
        (x.double(), y, "type torch.float64; the model takes torch.float32"),
        (x[..., :7], y, "images of shape"),
        (x.expand(-1, 3, -1, -1), y, "images of shape"),
        (x / 0, y, "NaN or infinity"),
        (x, y - 1, "has class -1; the model has num_classes=10"),
        (x, y.double(), "labels of type torch.float64"),
        (x, y[:, None], r"and shape \(40, 1\)"),
        (x, y[:20], "40 images and 20 labels"),
    ]
    assert learner.unit_range == name.startswith(("kcl", "gkcl", "replay")), "who keeps or draws images"
    if learner.unit_range:
        bad += [(x - 0.5, y, r"must be in \[0, 1\]"), (2 * x, y, r"must be in \[0, 1\]")]
    for images, labels, message in bad:
        with pytest.raises(ValueError, match=message):
            learner.begin_task(0, images, labels)
    assert learner.tasks_seen == 0
    learner.begin_task(0, x, y)


def test_a_last_batch_that_is_too_small_joins_the_one_before() -> None:
    order = torch.arange(31)
    assert [len(b) for b in batches_of(order, 10)] == [10, 10, 10, 1]
    assert [len(b) for b in batches_of(order, 10, 2)] == [10, 10, 11]
    assert [len(b) for b in batches_of(order[:1], 10, 2)] == [1]
    assert [len(b) for b in batches_of(order[:4], 1, 2)] == [2, 2]


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
