"""Fine-tuning: parts that keep their weights, and classes that count more."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zoo
from zoo.registry.loading import classifier_names
from zoo.tasks import ClassificationTask, OptionError, TabularTask, load_task, param_groups
from zoo.tasks.freezing import FreezeError, freeze
from zoo.tasks.weights import WeightsError, balanced_weights, given_weights

SPEC = {"model_name": "test_unireplknet", "num_classes": 3, "in_chans": 1}


class Net(nn.Module):
    """A stem, two stages and a head, with all that behaves otherwise in training."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes = 2
        self.pretrained_cfg = {"classifier": "head"}
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.stages = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) for _ in range(2)])
        self.scale = nn.BatchNorm2d(4, affine=False)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(self.drop(self.scale(x).mean((2, 3))))


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        (["backbone"], {"head.weight", "head.bias"}),
        (["stem", "stages.[01]"], {"head.weight", "head.bias"}),
        (["stages.0"], {n for n, _ in Net().named_parameters() if not n.startswith("stages.0.")}),
        (["*.bias"], {n for n, _ in Net().named_parameters() if not n.endswith(".bias")}),
        (["stem.0.weight"], {n for n, _ in Net().named_parameters()} - {"stem.0.weight"}),
    ],
)
def test_patterns_freeze_what_they_name(patterns: list[str], left: set[str]) -> None:
    model = Net()
    freeze(model, patterns)
    assert trained(model) == left


def test_a_frozen_backbone_does_not_change_in_training() -> None:
    task = ClassificationTask(Net(), {"opt": "sgd", "lr": 0.1}, freeze="backbone")
    before = copy.deepcopy(task.model.state_dict())
    x, y = torch.randn(8, 1, 6, 6), torch.randint(0, 2, (8,))
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        task.eval()
        task.train()  # as after a validation
        assert not task.model.stem.training
        assert not task.model.scale.training, "statistics without parameters are of the backbone too"
        assert task.model.head.training
        task.losses((x, y))["cross_entropy"].backward()
        optimizer.step()
    changed = {name for name, value in task.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}
    assert task.model.drop.training, "a module without parameters is no part of the backbone"


def test_partly_frozen_modules_train_on() -> None:
    model = Net().train()
    freeze(model, ["stem.1.weight"])
    assert model.stem[1].training
    frozen = freeze(model, ["stem.1"])
    assert not model.stem[1].training
    assert frozen == [model.stem[1]]
    assert model.stem[2].training


@pytest.mark.parametrize(
    ("patterns", "told"),
    [
        (["stagse.0"], "'stagse.0' is the name of no parameter; did you mean stages.0"),
        (["qqq"], "'qqq' is the name of no parameter; parts of the model are backbone, stem, stages, head"),
        (["backbone", "head"], "leaves no parameter to train"),
        (["*"], "leaves no parameter to train"),
    ],
)
def test_what_cannot_be_frozen_is_told(patterns: list[str], told: str) -> None:
    with pytest.raises(FreezeError) as caught:
        freeze(Net(), patterns)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "test_unireplknet",
        "test_unireplknet_audio",
        "test_unireplknet_video",
        "test_unireplknet_point",
        "test_terminator",
    ],
)
def test_every_kind_of_model_has_a_backbone_and_rates_by_depth(name: str) -> None:
    model = zoo.create_model(name, num_classes=3)
    rates = [group["lr_scale"] for group in param_groups(model, 0.05, layer_decay=0.5)]
    assert max(rates) == 1
    assert len(set(rates)) > 1
    freeze(model, ["backbone"])
    (head,) = classifier_names(model)
    assert trained(model) == {f"{head}.{n}" for n, _ in model.get_submodule(head).named_parameters()}
    assert {id(p) for g in param_groups(model, 0.05, layer_decay=0.5) for p in g["params"]} == {
        id(p) for p in model.get_submodule(head).parameters()
    }


def test_depth_of_a_backbone_of_timm() -> None:
    model = zoo.create_model("test_unireplknet_audio", backbone="test_resnet", num_classes=3)
    assert len({group["lr_scale"] for group in param_groups(model, 0.05, layer_decay=0.5)}) > 1


def test_a_checkpoint_of_a_frozen_model_is_opened(tmp_path: Path) -> None:
    import lightning as L

    task = ClassificationTask(SPEC, {"opt": "sgd", "lr": 0.1}, freeze=["downsample*"], class_weights="balanced")
    trainer = L.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, max_steps=0)
    trainer.strategy.connect(task)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = load_task(tmp_path / "a.ckpt")
    assert trained(again.model) == trained(task.model) < {n for n, _ in task.model.named_parameters()}


# ---- weights of classes --------------------------------------------------------------------------------------


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    targets = torch.tensor([0] * 7 + [1] * 2 + [3])
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=targets.numpy())
    found = balanced_weights(targets, 4)
    torch.testing.assert_close(found[[0, 1, 3]].double(), torch.tensor(expected), rtol=1e-6, atol=0)
    assert found[2] == 1, "a class without samples"


def test_weights_by_name_and_in_order() -> None:
    assert given_weights({"dog": 3.0}, ["cat", "dog"], 2).tolist() == [1, 3]
    assert given_weights({1: 2.0}, None, 3).tolist() == [1, 2, 1]
    assert given_weights([1.0, 2.0], ["cat", "dog"], 2).tolist() == [1, 2]
    assert given_weights(None, ["cat", "dog"], 2) is None
    with pytest.raises(WeightsError, match="the class 'dgo'; did you mean dog"):
        given_weights({"dgo": 3.0}, ["cat", "dog"], 2)
    with pytest.raises(WeightsError, match="has 3 numbers for 2 classes"):
        given_weights([1.0, 2.0, 3.0], ["cat", "dog"], 2)


def with_data(task: Any, targets: torch.Tensor, **further: Any) -> Any:
    data = SimpleNamespace(datasets={"train": SimpleNamespace(targets=targets)}, **further)
    task._trainer = SimpleNamespace(datamodule=data)
    task.setup("fit")
    return task


def test_balanced_classes_count_the_same_in_the_loss() -> None:
    targets = torch.tensor([0, 0, 0, 1])
    task = with_data(ClassificationTask(Net(), class_weights="balanced"), targets).eval()
    x = torch.randn(4, 1, 6, 6)
    each = F.cross_entropy(task(x), targets, reduction="none")
    expected = (each[:3].mean() + each[3]) / 2
    torch.testing.assert_close(task.losses((x, targets))["cross_entropy"], expected)
    assert "class_weights" not in task.state_dict()
    half = ClassificationTask(Net().bfloat16(), class_weights=[1.0, 3.0]).eval()
    assert half.losses((x.bfloat16(), targets))["cross_entropy"].isfinite()


def test_weights_of_classes_in_tables() -> None:
    targets = torch.tensor([0, 0, 0, 1])
    rows = torch.randn(4, 5)
    for outputs in (1, 2):
        net = nn.Linear(5, outputs)
        net.num_classes = outputs
        task = TabularTask(net, class_weights="balanced", class_names=["no", "yes"])
        with_data(task, targets, training_table=lambda: (rows, targets))
        each = task._loss(task(rows), targets)
        torch.testing.assert_close(task.losses((rows, targets))["cross_entropy"], (each[:3].mean() + each[3]) / 2)
    net = nn.Linear(5, 1)
    net.num_classes = 1
    with pytest.raises(OptionError, match="a regression has no classes"):
        TabularTask(net, class_weights=[1.0])


def test_data_that_tells_no_classes_is_told() -> None:
    with pytest.raises(WeightsError, match="no classes to count"):
        with_data(ClassificationTask(Net(), class_weights="balanced"), torch.randn(4))
