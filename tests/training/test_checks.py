"""What is asked before a run's first step, and that its last step is measured."""

from __future__ import annotations

import csv
import json
import shlex
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from torch import Tensor, nn

from tests.conftest import train_here
from zoo.data import Digits
from zoo.data.sampling import KeyedDataset
from zoo.support.quoting import override
from zoo.tasks import ClassificationTask, ContinualTask, OptionError
from zoo.training.checks import REFUSED, no_test, together

pytestmark = pytest.mark.xdist_group("checks")  # they share a run

TINY = (
    *("experiment=digits", "model=test_unireplknet", "logger=csv", "callbacks=classes", "callbacks.progress=null"),
    *("trainer.limit_val_batches=1", "trainer.limit_test_batches=1", "hydra.run.dir=run"),
)


def validated(run: Path) -> list[int]:
    """Steps after which the run validated."""
    (table,) = run.glob("csv/*/metrics.csv")
    rows = csv.DictReader(table.read_text().splitlines())
    return [int(row["step"]) + 1 for row in rows if row.get("val/acc")]


# ---- values together -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "values", "told"),
    [
        ("trainer", {"min_steps": 99, "max_steps": 4}, "trainer.min_steps = 99 is above trainer.max_steps = 4"),
        ("trainer", {"min_epochs": 9}, "trainer.min_epochs = 9 is above trainer.max_epochs = 2"),
        ("trainer", {"max_steps": 2, "limit_train_batches": 3}, "warmup_epochs = 1 is longer than the whole training"),
        ("trainer", {"val_check_interval": 7, "limit_train_batches": 3}, "val_check_interval = 7 is above"),
        ("trainer", {"val_check_interval": 0}, "trainer.val_check_interval = 0 must be above 0"),
        ("trainer", {"check_val_every_n_epoch": 0}, "check_val_every_n_epoch = 0 must be 1 at least"),
        ("trainer", {"accumulate_grad_batches": 0}, "accumulate_grad_batches = 0 must be 1 at least"),
        ("trainer", {"limit_train_batches": 0}, "limit_train_batches = 0 must be above 0"),
        ("trainer", {"gradient_clip_val": -1.0}, "gradient_clip_val = -1.0 must not be negative"),
        ("scheduler", {"warmup_epochs": 3}, "scheduler.warmup_epochs = 3 is longer than the whole training of 2"),
        ("scheduler", {"min_lr": 1.0}, "scheduler.min_lr = 1 is above the rate 0.01"),
        ("scheduler", {"sched": "multistep"}, "scheduler.decay_milestones = [] must be epochs in rising order"),
    ],
    ids=str,
)
def test_values_that_do_not_go_together_are_told(section: str, values: dict[str, Any], told: str) -> None:
    config: dict[str, Any] = {"trainer": {"max_epochs": 2}, "scheduler": {"warmup_epochs": 1.0}}
    config["optimizer"] = {"lr": 0.01}
    assert together(config) == []
    config[section] |= values
    assert any(told in problem for problem in together(config)), together(config)


def test_a_warm_up_that_only_the_data_can_judge_is_told_before_the_first_step(tmp_path: Path) -> None:
    """The default warm-up is one epoch, and 25 batches make one."""
    done = train_here(tmp_path, *TINY, "trainer.max_steps=5", check=False)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "scheduler: warmup_epochs = 1 is longer than the whole training of 0.2 epochs" in line
    assert not list((tmp_path / "run").glob("checkpoints/step=*"))


def callback_problems(*sections: dict[str, Any], scheduler: Any = None) -> list[str]:
    task = {"_target_": "zoo.tasks.ClassificationTask"}
    named = {f"c{i}": section for i, section in enumerate(sections)}
    return together({"task": task, "callbacks": named, "scheduler": scheduler})


def by_name(name: str, **values: Any) -> dict[str, Any]:
    return {"_target_": f"lightning.pytorch.callbacks.{name}", **values}


def test_callbacks_that_a_run_cannot_have_are_told() -> None:
    for kind, why in REFUSED.items():
        assert callback_problems(by_name(kind.__name__)) == [f"callbacks.c0: {kind.__name__} {why}"]
    twice = callback_problems(by_name("EMAWeightAveraging"), by_name("WeightAveraging"))
    assert twice == ["callbacks.c0 and callbacks.c1 both average the weights: choose one"]
    accumulating = by_name("GradientAccumulationScheduler", scheduling={4: 2})
    assert "use trainer.accumulate_grad_batches" in callback_problems(accumulating, scheduler={"sched": "cosine"})[0]
    assert callback_problems(accumulating, scheduler={"sched": "constant"}) == []
    stopping = by_name("EarlyStopping", monitor="val/nope", patience=-1)
    assert [problem.split("; ")[0] for problem in callback_problems(stopping)] == [
        "callbacks.c0.patience = -1 must not be negative",
        "callbacks.c0.monitor = 'val/nope' is never measured",
    ]


NEEDS: dict[str, dict[str, Any]] = {
    "EarlyStopping": {"monitor": "val/acc"},
    "StochasticWeightAveraging": {"swa_lrs": 0.01},
    "ModelPruning": {"pruning_fn": "l1_unstructured"},
    "GradientAccumulationScheduler": {"scheduling": {0: 2}},
    "ModelCheckpoint": {"dirpath": "more"},
    "OnExceptionCheckpoint": {"dirpath": "more"},
    "Timer": {"duration": "00:00:00:30"},
}
TRAIN = ("LearningRateMonitor", "WeightAveraging", "EMAWeightAveraging", "Timer", "ModelCheckpoint", "EarlyStopping")


QUICK = {*TRAIN, "BackboneFinetuning", "BaseFinetuning", "GradientAccumulationScheduler", "DeviceStatsMonitor"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow], id=name)
        for name in lightning_callbacks.__all__
    ],
)
def test_every_callback_of_lightning_trains_or_is_told(name: str, tmp_path: Path) -> None:
    values = ",".join(f"{key}:{value}" for key, value in NEEDS.get(name, {}).items())
    quick = ("trainer.max_epochs=1", "trainer.limit_train_batches=2", "test=false", "scheduler=constant")
    section = f"+callbacks.x={{_target_:lightning.pytorch.callbacks.{name},{values}}}".replace(": ", ":")
    done = train_here(tmp_path, *TINY, *quick, section.replace(",}", "}"), check=False)
    assert done.returncode in ((0,) if name in TRAIN else (0, 1))
    if done.returncode:
        assert done.stderr.strip().startswith(("error: callbacks.x", "error: trainer or callbacks: ")), done.stderr


# ---- the last state ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (["trainer.max_steps=7", "trainer.limit_train_batches=5"], [5, 7]),
        (["trainer.max_epochs=2", "trainer.limit_train_batches=2", "trainer.check_val_every_n_epoch=5"], [4]),
        (["trainer.max_epochs=1", "trainer.limit_train_batches=5", "+trainer.val_check_interval=2"], [2, 4, 5]),
        (["trainer.max_epochs=2", "trainer.limit_train_batches=2"], [2, 4]),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_the_last_state_is_validated_once(options: list[str], steps: list[int], tmp_path: Path) -> None:
    done = train_here(tmp_path, *TINY, *options, "callbacks.best.mode=min", "scheduler=constant")
    assert validated(tmp_path / "run") == steps
    states = sorted((tmp_path / "run" / "checkpoints").glob("step=*.ckpt"))
    assert states[-1].name == f"step={steps[-1]:08d}.ckpt"
    longer = "trainer.max_steps=14" if "max_steps" in options[0] else "trainer.max_epochs="
    assert longer in done.stdout.split("train on")[1]


# ---- what the data has ---------------------------------------------------------------------------------------


class Tone(Digits):
    """Digits without a test part; as waveforms, clips, points or tokens."""

    def __init__(self, shape: tuple[int, ...] = (1, 8, 8), keep_test: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.shape, self.keep_test = shape, keep_test

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        if not self.keep_test:
            self.datasets.pop("test", None)


def test_a_run_without_a_test_part_says_so_first_and_has_no_test_figure(tmp_path: Path) -> None:
    target = "data._target_=tests.training.test_checks.Tone"
    done = train_here(tmp_path, *TINY, target, "trainer.max_epochs=1", "trainer.limit_train_batches=2")
    assert "note: there will be no test, Tone has no test part, only train and val" in done.stderr
    assert "not tested   Tone has no test part" in done.stdout
    metrics = json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]
    assert "val/acc" in metrics
    assert not any(name.startswith("test/") for name in metrics)


def test_validation_data_is_no_test_part() -> None:
    class Data(L.LightningDataModule):
        test_fraction: float | None = None

        def __init__(self, **datasets: Any) -> None:
            super().__init__()
            self.datasets = datasets

        def test_dataloader(self) -> Any:
            raise AssertionError("nobody asks for it")

    task = ClassificationTask.__new__(ClassificationTask)
    assert no_test(Data(train=[1], val=[2], test=[3]), task) is None
    same = [2]
    assert "only the validation part" in str(no_test(Data(train=[1], val=same, test=same), task))
    assert "no test part, only train" in str(no_test(Data(train=[1]), task))
    asked = Data(train=[1])
    for share, told in (
        (0.0, "data.test_fraction=0.2 would keep a fifth"),
        (0.3, "data.test_fraction=0.3 could keep no"),
    ):
        asked.test_fraction = share
        assert told in str(no_test(asked, task)), "what is given already is no advice"
    assert no_test(L.LightningDataModule(), task) == "LightningDataModule has no test part"
    assert "measures by itself" in str(no_test(Data(test=[1]), ContinualTask.__new__(ContinualTask)))


class Mean(nn.Module):
    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1).mean(1, keepdim=True))


@pytest.mark.parametrize("shape", [(100,), (3, 8, 8), (3, 4, 8, 8)], ids=["sounds", "pictures", "clips"])
def test_mixup_takes_sounds_pictures_and_clips(shape: tuple[int, ...]) -> None:
    task = ClassificationTask(Mean(), mixup_alpha=0.5)
    inputs = torch.randn(6, *shape, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    mixed, targets = task._mix(inputs, torch.arange(6) % 3)
    share = targets[0, 0]  # the first input is of class 0, the one rolled onto it of class 2
    assert 0 < share < 1
    torch.testing.assert_close(mixed, share * inputs + (1 - share) * inputs.roll(1, 0))
    assert torch.isfinite(task.losses((inputs, torch.arange(6) % 3))["cross_entropy"])


def test_cutmix_cuts_one_rectangle_out_of_all_frames() -> None:
    task = ClassificationTask(Mean(), cutmix_alpha=1.0)
    inputs = torch.arange(4.0).view(4, 1, 1, 1, 1).expand(4, 3, 5, 8, 8).contiguous()
    torch.manual_seed(3)
    mixed, targets = task._mix(inputs, torch.tensor([0, 1, 2, 0]))
    cut = mixed != inputs
    assert cut.any()
    assert (cut == cut[:1, :1, :1]).all()
    assert targets[1, 1] == pytest.approx(1 - float(cut[0, 0, 0].float().mean()))


@pytest.mark.parametrize(
    ("option", "inputs"),
    [
        ("mixup_alpha", torch.zeros(2, 64, 3)),
        ("mixup_alpha", torch.zeros(2, 64, dtype=torch.long)),
        ("mixup_alpha", (torch.zeros(2, 4), torch.zeros(2, 4))),
        ("cutmix_alpha", torch.zeros(2, 100)),
    ],
    ids=["points", "tokens", "several", "sounds"],
)
def test_mixing_what_cannot_be_mixed_is_told(option: str, inputs: Any) -> None:
    chosen: dict[str, Any] = {option: 0.2}
    task = ClassificationTask(Mean(), **chosen)
    with pytest.raises(OptionError, match=f"task.{option} mixes pictures"):
        task.check_inputs(inputs)


def test_mixing_is_refused_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Points(KeyedDataset):
        def images(self, keys: Any) -> Tensor:
            return torch.zeros(len(keys), 64, 3)

    monkeypatch.setattr(Tone, "setup", lambda self, stage=None: self.datasets.update(train=Points([0, 1] * 100)))
    target = "data._target_=tests.training.test_checks.Tone"
    done = train_here(tmp_path, *TINY, target, "task.mixup_alpha=0.2", check=False)
    assert done.returncode == 1
    assert (
        "error: task.mixup_alpha mixes pictures, clips and waveforms; these inputs are of shape (64, 3)" in done.stderr
    )


# ---- commands ------------------------------------------------------------------------------------------------


def test_what_a_run_prints_runs_as_printed(tmp_path: Path) -> None:
    """Also with values that refer to others, which a resumed run looks up again."""
    name = "-it's a ünï run, a=1 [x] $y"
    quick = ("trainer.limit_train_batches=2", "trainer.max_epochs=${data.eval_batch_size}", "data.eval_batch_size=2")
    warm = "scheduler.warmup_epochs=${trainer.max_epochs}"
    done = train_here(tmp_path, *TINY[:-1], *quick, warm, override("hydra.run.dir", name), "test=false")
    printed = done.stdout.split("train on")[1].strip().splitlines()[0]
    words = shlex.split(printed)
    assert words[1] == "train.py"
    train_here(tmp_path, *words[2:])
    states = sorted((tmp_path / name / "checkpoints").glob("step=*.ckpt"))
    assert states[-1].name == "step=00000008.ckpt"
    train_here(tmp_path, f"resume={name}", "trainer.max_epochs=5")  # typed as it is: nothing but a path is meant
    states = sorted((tmp_path / name / "checkpoints").glob("step=*.ckpt"))
    assert states[-1].name == "step=00000010.ckpt"
    load = next(line for line in done.stdout.splitlines() if "create_model" in line)
    namespace: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        exec(f"import zoo\n{load.strip()}", namespace)
    assert namespace["model"].num_classes == 10


def test_a_number_that_is_none_is_told_by_its_key_alone(tmp_path: Path) -> None:
    for word in ("optimizer.lr", "data.val_fraction", "callbacks.ema.decay"):
        done = train_here(tmp_path, "experiment=digits", f"{word}=nan", check=False)
        assert done.stderr.strip() == f"error: {word} = nan: only finite numbers are allowed"
