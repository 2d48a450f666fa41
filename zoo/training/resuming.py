"""What a resumed run changes, and whether it has anything left to train."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from lightning.pytorch.callbacks import Timer

from zoo.results.runs import RunsError, Stage, read_parts
from zoo.support.quoting import command as shell_line
from zoo.support.signatures import ConfigError
from zoo.training.callbacks import StopEarly
from zoo.training.finish import shown_path

__all__ = ["Changes", "Resumed", "resumed"]


class Changes(NamedTuple):
    """What a command line changes in a run that it resumes.

    Attributes:
        values: A text such as `data.batch_size = 40 (was 100)` of each changed value, by its key.
        lengths: Keys of changed values that only say how long the run goes on.
        words: The overrides that change them, as typed.
    """

    values: dict[str, str]
    lengths: tuple[str, ...] = ()
    words: tuple[str, ...] = ()


class Resumed(NamedTuple):
    """Where a resumed run goes on.

    Attributes:
        epoch, step: Epochs and optimizer steps behind it.
        over: What has ended its training, such as `trainer.max_epochs = 2`; None if something is left to train.
        summary: The summary of the run, if its training is over and it has one.
    """

    epoch: int
    step: int
    over: str | None
    summary: dict[str, Any] | None


#: What may differ where a run whose training is over is still to be tested and summed up: where its data is, what it
#: runs on, and callbacks, which act no more.
_UNSUMMED = ("data.path", "data.folder", "data.cache", "data.root", "trainer.accelerator", "trainer.devices",
             "trainer.strategy", "trainer.num_nodes", "test", "callbacks.")  # fmt: skip
_CHOOSES = ("callbacks.best", "callbacks.resume")  # these two know the best state, and the figures so far


def resumed(
    engine: L.Trainer, state: Mapping[str, Any], changes: Changes | None, seeds: tuple[int, int | None]
) -> Resumed:
    """Where a run goes on, after a check that what is changed has a meaning there.

    Args:
        engine: The trainer of the resumed run, before its training.
        state: Content of the state to resume from.
        changes: What the command line changes.
        seeds: The run's seed, and that of the configuration.

    Raises:
        ConfigError: The seed is changed; or the run is longer already; or nothing is left to train, and changed values
            would only change records.
    """
    folder, changes = Path(engine.default_root_dir), changes or Changes({})
    if "seed" in changes.values and seeds[1] not in (None, seeds[0]):
        raise ConfigError(
            f"seed = {seeds[1]}: a resumed run goes on with its own seed, {seeds[0]}; leave it out, or start a new run"
        )
    epochs, behind = engine.max_epochs, _processed(state)
    if epochs is not None and 0 <= epochs < behind:
        raise ConfigError(
            f"trainer.max_epochs = {epochs}, and the state that the run goes on from is after {behind} epochs: give at "
            f"least {behind}"
        )
    over, summary = _over(engine, state), None
    if over:
        with suppress(RunsError):
            summary, _ = read_parts(folder)
    free = _free(summary)
    may = {key for key in changes.values if key.startswith(free) and not key.startswith(_CHOOSES)}
    odd = [text for key, text in changes.values.items() if key not in (*changes.lengths, *may)]
    if over and odd:
        told = ", ".join(odd[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
        measure = shell_line("python -m zoo validate", str(shown_path(folder)), "--data", "DATA")
        raise ConfigError(
            f"nothing is left to train, with {over} the run is over, so {told} would only change what is recorded of "
            f"it: give a longer training too, start another run, or measure on other data with `{measure}`"
        )
    return Resumed(_processed(state), _whole(state.get("global_step")), over, summary)


def _free(summary: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Starts of the keys that may change where the training is over."""
    if summary is None:
        return _UNSUMMED
    return () if any(name.startswith("test/") for name in summary["metrics"]) else ("test",)


def _over(engine: L.Trainer, state: Mapping[str, Any]) -> str | None:
    """What ends the training at this state, as Lightning's loop decides it; None if something is left."""
    epochs, steps = engine.max_epochs, engine.max_steps
    if 0 < steps <= _whole(state.get("global_step")):
        return f"trainer.max_steps = {steps}"
    if epochs is not None and 0 <= epochs <= _processed(state):
        return f"trainer.max_epochs = {epochs}"
    for hook in engine.callbacks:  # type: ignore[attr-defined]
        own = _part(state, "callbacks", hook.state_key)
        followed = isinstance(hook, StopEarly) and hook.active and hook.monitor in ("", own.get("monitor"))
        if followed and hook.patience <= _whole(own.get("wait_count")):
            return f"callbacks.stop.patience = {hook.patience}"
        spent = _part(own, "time_elapsed").get("train")
        timed = isinstance(hook, Timer) and hook._duration is not None and isinstance(spent, int | float)
        if timed and spent >= hook._duration:
            return "trainer.max_time"
    return None


def _processed(state: Mapping[str, Any]) -> int:
    return _whole(_part(state, "loops", "fit_loop", "epoch_progress", "current").get("processed"))


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _part(values: Any, *keys: str) -> Mapping[str, Any]:
    """A nested mapping; empty where there is none."""
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values if isinstance(values, Mapping) else {}


def stages(notes: Mapping[str, Any], at: Resumed, words: tuple[str, ...]) -> list[dict[str, Any]]:
    """The stages of a run that goes on at a state with changes, each with its overrides.

    Stages from there on are left out: they have not led to this state.
    """
    before = [stage for stage in notes.get("stages") or [] if (stage["epoch"], stage["step"]) < (at.epoch, at.step)]
    last = before[-1]["overrides"] if before else []
    if list(words) == last:
        return before
    return [*before, Stage(epoch=at.epoch, step=at.step, overrides=list(words)).model_dump()]
