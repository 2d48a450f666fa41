"""States that are damaged or edited: named in a sentence before anything is trained, with the intact one before."""

from __future__ import annotations

import copy
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import train_here
from zoo.registry.checkpoints import CheckpointError, read_checkpoint
from zoo.support.quoting import override
from zoo.tasks import load_task
from zoo.training.checkpointing import check_weights, find_resumable, step_files
from zoo.training.states import inexact, state_problem

QUICK = ("experiment=grbf_wine", "model=test_grbf", "trainer.max_epochs=3", "scheduler=cosine", "callbacks=ema")
QUICK += ("scheduler.warmup_epochs=0", "logger=csv", "data.batch_size=60", "hydra.run.dir=run")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    train_here(folder, *QUICK)
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="module")
def whole(finished: Path) -> dict[str, Any]:
    return read_checkpoint(step_files(finished / "checkpoints")[0][1])


def put(*keys: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of a nested state."""

    def change(state: dict[str, Any]) -> None:
        place: Any = state
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


LOADER = {"epoch": 1, "batches": 10**9, "seed": 0, "samples": 100, "global_batch": 50}
DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no random states": (lambda s: s.pop("random_states"), "it has no random_states"),
    "an empty list of them": (put("random_states", value=[]), "random_states are none that can be restored"),
    "random states of text": (put("random_states", value=[{"python": "x"}]), "random_states are none"),
    "no schedule": (put("lr_schedulers", value=[]), "lr_schedulers are empty"),
    "another schedule": (put("lr_schedulers", value=[{"step": "x", "base_values": "no"}]), "not those of a schedule"),
    "a method": (put("lr_schedulers", 0, "step_update", value=[]), "not those of a schedule"),
    "no position": (
        put("loops", "fit_loop", "state_dict", value={"combined_loader": "zz"}),
        "combined_loader is no position",
    ),
    "a far position": (
        put("loops", "fit_loop", "state_dict", value={"combined_loader": [LOADER]}),
        "after batch 1,000,000,000 of an epoch of 2",
    ),
    "a negative count": (
        put("loops", "fit_loop", "epoch_progress", "current", "completed", value=-4),
        "completed = -4",
    ),
    "another epoch": (put("epoch", value=1), "its epoch is 1"),
    "an epoch of text": (put("epoch", value="x"), "its epoch are not of the kind"),
    "a negative step": (put("global_step", value=-5), "global_step = -5"),
    "averages": (put("averaging_state", value={"n_averaged": torch.tensor(-3)}), "averaging_state counts no averages"),
    "no notes": (put("zoo", value=None), "does not say which run wrote it"),
    "another seed": (put("zoo", "run", "seed", value=123), "of a run with seed 123, and this one has 0"),
    "an empty optimizer": (put("optimizer_states", value=[{}]), "not those of an optimizer"),
    "no optimizer": (put("optimizer_states", value=[]), "optimizer_states are empty"),
    "metrics": (put("so_far", "metrics", value={"val/acc": "good"}), "more than metrics and their numbers"),
    "rows": (put("so_far", "rows", value=["a"]), "counts rows"),
    "weights": (put("state_dict", value={"model.x": 3}), "more than named weights"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_damaged_is_named(whole: dict[str, Any], name: str) -> None:
    state = copy.deepcopy(whole)
    assert state_problem(state, seed=0) is None
    change, told = DAMAGE[name]
    change(state)
    assert told in str(state_problem(state, seed=0))


def test_one_inverted_byte_is_told_with_the_state_before(run: Path) -> None:
    (_, newest), (_, before) = step_files(run / "checkpoints")
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 0xFF
    newest.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged: .* does not have its checksum") as raised:
        find_resumable(run)
    line = f"the checkpoint before it is intact, continue with: {shlex.quote(override('resume', before))}"
    assert str(raised.value).splitlines()[1] == line
    done = train_here(run.parent, "resume=run", "trainer.max_epochs=4", check=False)
    assert done.returncode == 1
    assert "does not have its checksum" in done.stderr
    assert "Traceback" not in done.stderr


def test_weights_that_are_not_finite_are_told_before_training(run: Path) -> None:
    (_, newest), (_, before) = step_files(run / "checkpoints")
    state = read_checkpoint(newest)
    averaged = state["current_model_state"].items()
    name = next(key for key, value in averaged if key.startswith("model.") and value.is_floating_point())
    state["current_model_state"][name] = torch.full_like(state["current_model_state"][name], torch.nan)
    torch.save(state, newest)
    task = load_task(before)
    with pytest.raises(CheckpointError, match=f"its current_model_state {re.escape(name)} is not finite"):
        check_weights(find_resumable(run), run, task)
    check_weights(find_resumable(run, before), run, task)
    done = train_here(run.parent, "resume=run", "trainer.max_epochs=4", check=False)
    assert done.returncode == 1
    assert done.stderr.strip().endswith(f"is intact, continue with: {shlex.quote(override('resume', before))}")
    assert "going on" not in done.stderr
    assert "optimizer.lr" not in done.stderr


def test_a_state_of_another_task_is_refused(run: Path) -> None:
    newest = step_files(run / "checkpoints")[0][1]
    state = read_checkpoint(newest)
    state["zoo"]["task"] = "os.system"
    torch.save(state, newest)
    done = train_here(run.parent, "resume=run", "trainer.max_epochs=4", check=False)
    assert done.returncode == 1
    assert "the state is of the task 'os.system', and this run's is TabularTask" in done.stderr


def test_which_state_is_resumed_is_told(run: Path) -> None:
    best = read_checkpoint(run / "checkpoints" / "best.ckpt")
    done = train_here(run.parent, "resume=run/checkpoints/best.ckpt", "trainer.max_epochs=4")
    epochs = "1 epoch" if best["epoch"] == 0 else f"{best['epoch'] + 1} epochs"
    told = f"note: going on from best.ckpt, the state after step {best['global_step']} and {epochs}"
    assert told in done.stderr.splitlines()


def test_a_state_inside_a_step_or_an_epochs_end_is_no_start(whole: dict[str, Any]) -> None:
    assert inexact(whole, 1) is None
    state = copy.deepcopy(whole)
    state["loops"]["fit_loop"]["epoch_progress"]["current"]["ready"] += 1
    assert inexact(state, 1) == "it was written before the end of its epoch"
    inside = state["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    inside["is_last_batch"], inside["current"]["completed"] = False, 3
    assert inexact(state, 1) is None
    assert inexact(state, 3) is None
    assert inexact(state, 2) == "it was written while gradients were accumulated"
