"""Every YAML file composes, passes the typed checks and builds what it names."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from tests.conftest import ROOT
from zoo.registry.factory import create_model
from zoo.support.signatures import ConfigError, check_call, flatten
from zoo.training.checks import check_config

CONFIGS = ROOT / "configs"
GROUPS = sorted(p.name for p in CONFIGS.iterdir() if p.is_dir() and p.name not in ("hydra", "local"))


def needed(choice: str) -> list[str]:
    """Values that only a user can give, as the tests give them."""
    own = ("imagefolder", "imagenet", "audiofolder", "videofolder", "own_tasks", "pointfolder", "texts", "finetune")
    return ["data.path=."] if choice.startswith(own) else []


#: What a choice is useless without: the checks say so.
BESIDE = {("callbacks", "forecasting"): ["task=forecasting"], ("task", "forecasting"): ["callbacks=forecasting"]}
BESIDE[("callbacks", "tabular")] = ["task=tabular"]
OPTUNA = pytest.mark.skipif(
    importlib.util.find_spec("hydra_plugins.hydra_optuna_sweeper") is None,
    reason="needs the extra: pip install -e '.[optuna]'",
)
CHOICES = [
    pytest.param(g, p.stem, marks=[OPTUNA] if p.stem == "optuna" else [], id=f"{g}-{p.stem}")
    for g in GROUPS
    for p in sorted((CONFIGS / g).glob("*.yaml"))
]


def composed(overrides: Sequence[str], folder: Path) -> dict[str, Any]:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", overrides=list(overrides), return_hydra_config=True)
        cfg.hydra.runtime.output_dir = str(folder)
        HydraConfig.instance().set_config(cfg)
        OmegaConf.set_readonly(cfg.hydra, None)
        config: Any = OmegaConf.to_container(
            OmegaConf.masked_copy(cfg, [k for k in cfg if k != "hydra"]), resolve=False
        )
        config["output_dir"] = str(folder)
        config["name"] = "test"
        return OmegaConf.to_container(OmegaConf.create(config), resolve=True)  # type: ignore[return-value]


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_yaml_composes_and_passes_the_checks(group: str, choice: str, tmp_path: Path) -> None:
    config = composed([f"{group}={choice}", *needed(choice), *BESIDE.get((group, choice), [])], tmp_path)
    check_config(config)


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_yaml_builds(group: str, choice: str, tmp_path: Path) -> None:
    config = composed([f"{group}={choice}", *needed(choice)], tmp_path)
    if group == "trainer":
        if choice in ("gpu", "bf16", "ddp", "fsdp", "slurm") and not torch.cuda.is_available():
            strategy = config["trainer"]["strategy"]
            assert isinstance(strategy, str) or hydra.utils.instantiate(strategy) is not None
            pytest.skip("the trainer itself can only be built where there is a GPU; its strategy was")
        if choice == "torchrun":
            pytest.skip("built inside torchrun: tests/training/test_distributed.py")
        assert hydra.utils.instantiate(config["trainer"], logger=False) is not None
    elif group == "data" and not needed(choice):
        data = hydra.utils.instantiate(config["data"])
        assert choice == "series" or data.num_classes > 1
    elif choice == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        with pytest.raises(hydra.errors.InstantiationException, match="TensorBoard is not installed: `pip install"):
            hydra.utils.instantiate(config[group]["tensorboard"])
    elif group in ("callbacks", "logger"):
        for section in config[group].values():
            assert section is None or hydra.utils.instantiate(section, _convert_="all") is not None
    elif group == "model":
        spec = {k: v for k, v in config["model"].items() if v is not None}
        with torch.device("meta"):
            assert sum(p.numel() for p in create_model(**spec).parameters()) > 0
    elif group == "optimizer" and config["optimizer"]:
        from zoo.tasks import create_optimizer

        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))  # the last one is an output layer
        assert create_optimizer(model, **config["optimizer"]).param_groups
    elif group == "scheduler" and config["scheduler"] is not None:
        from zoo.tasks import create_scheduler

        optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=1.0)
        create_scheduler(optimizer, 100, 10, **config["scheduler"]).step_update(5)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optimizer.lr=fast", "optimizer.lr = 'fast'"),
        ("optimizer.lr=-1", "optimizer.lr = -1: input should be greater than 0"),
        ("optimizer.betas=[0.9]", "optimizer.betas"),
        ("trainer.max_epochs=ten", "trainer.max_epochs = 'ten'"),
        ("trainer.max_epochs=true", "trainer.max_epochs = True is a boolean"),
        ("data.batch_size=0", "data.batch_size = 0"),
        ("data.batch_size=many", "data.batch_size = 'many'"),
        ("task.label_smoothing=1.5", "task.label_smoothing = 1.5"),
        ("seed=-1", "seed = -1"),
        ("seed=x", "seed = 'x'"),
        ("test=maybe", "test = 'maybe'"),
        ("model.drop_path_rate=a", "model.drop_path_rate = 'a'"),
        ("+model.dephts=[1,1,1,1]", "model.dephts is unknown; did you mean depths"),
        ("+task.labelsmoothing=0.1", "task.labelsmoothing is unknown; did you mean label_smoothing"),
        ("logger.wandb.mode=sometimes", "logger.wandb.mode = 'sometimes'"),
        ("callbacks.resume.every_n_steps=0", "callbacks.resume.every_n_steps = 0"),
        ("data._target_=zoo.data.Nothing", "data._target_ = 'zoo.data.Nothing' cannot be imported"),
        ("scheduler.sched=zigzag", "scheduler.sched = 'zigzag'"),
        ("data=imagefolder", "data.path"),
    ],
)
def test_wrong_values_are_named_before_anything_starts(override: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(composed([override], tmp_path))
    assert told in str(caught.value)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(composed(["optimizer.lr=a", "data.batch_size=b", "test=c"], tmp_path))
    assert len(str(caught.value).splitlines()) == 3


def test_multirun_with_processes_of_its_own_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="multirun cannot start processes"):
        check_config(composed(["trainer=ddp_cpu"], tmp_path), multirun=True)
    check_config(composed(["trainer=ddp_cpu"], tmp_path), multirun=False)
    monkeypatch.setenv("SLURM_NTASKS", "16")  # a job of the submitit launcher: SLURM has started every process
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    check_config(composed(["trainer=ddp_cpu"], tmp_path), multirun=True)


def test_check_call_admits_what_python_admits() -> None:
    def target(a: int, b: float | None = None, *, c: list[str] | str = "x") -> None: ...

    assert check_call(target, {"a": 1, "b": 2, "c": ["y"]}) == []
    assert check_call(target, {"b": 1.0}) == ["a has no value"]
    assert check_call(target, {"a": 1, "d": 2}) == ["d is unknown; allowed: a, b, c"]


def test_check_call_converts_nothing() -> None:
    def target(n: int = 0, rate: float = 0.0, on: bool = True, sizes: Sequence[int] = (), root: Path | str = "", *,
               epochs: int | str = 1, pair: tuple[float, float] = (0, 1)) -> None: ...  # fmt: skip

    fits = {"n": 3, "rate": 1, "on": False, "sizes": [1, 2], "root": "x", "epochs": "3", "pair": [0, 0.5]}
    assert check_call(target, fits) == []
    for name, value in {"n": "3", "rate": "0.1", "on": "yes", "sizes": [1, "2"], "pair": [0, "1"]}.items():
        (problem,) = check_call(target, {name: value})
        assert problem.startswith(f"{name} = {value!r}: input should be a valid ")
    assert check_call(target, {"n": 3.0}) == ["n = 3.0: input should be a valid integer"]


def test_flatten_keeps_empty_sections() -> None:
    assert dict(flatten({"a": {"b": 1, "c": {}}, "d": None})) == {"a.b": 1, "a.c": {}, "d": None}
