"""The command line of training: Hydra composes a configuration, `zoo.training.run` runs it.

Only Hydra is imported at the top, which keeps `--help` and `--cfg job` fast. Only this module reads Hydra's global
state, overrides and error messages.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shlex
import shutil
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.experimental.callback import Callback as HydraCallback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from zoo.support.environment import bound_waiting
from zoo.support.quoting import one_line_warnings, override, path_word, shown
from zoo.support.suggest import suggestion

if TYPE_CHECKING:
    from zoo.training.result import RunResult
    from zoo.training.resuming import Changes

bound_waiting()  # before torch is imported

_HERE = Path(__file__).resolve().parents[1]
CONFIGS = next(path for path in (_HERE.parent / "configs", _HERE / "configs") if path.is_dir())

DEFAULT_EXPERIMENT = "mnist5k"  # if the command line chooses no experiment, model, data or task

_caught: list[Exception] = []  # error of the job, raised again outside Hydra
_results: list[RunResult] = []  # of the jobs
_lasting: list[str] = []  # words of this command line for printed ones: configuration flags, changes of a resumed run
_inherited: list[str] = []  # overrides that a resumed run was last resumed with


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
def _job(cfg: DictConfig) -> float | None:
    from zoo.training.folder import check_new, writing_in
    from zoo.training.multirun import note_run
    from zoo.training.run import run_config

    multirun, folder = HydraConfig.get().mode is RunMode.MULTIRUN, Path(HydraConfig.get().runtime.output_dir)
    sweep = _sweep() if multirun else None
    note = partial(note_run, sweep.folder, HydraConfig.get().job.num) if sweep else None
    try:
        if note:
            note(folder=str(folder), overrides=list(HydraConfig.get().overrides.task))
        with writing_in(folder, resumed=cfg.get("resume") is not None):
            _use_current_words(cfg)
            changes = None
            if cfg.get("resume") is None:
                check_new(folder, _command())
            else:
                _start_where_it_was(cfg, folder)
                _check_places(cfg, folder)
                changes = _changes(cfg, folder)
            _write_hydra_files(cfg)
            config: Any = OmegaConf.to_container(cfg, resolve=True)
            told: Any = {"origin": _origin(sweep), "changes": changes}
            result = run_config(config, multirun=multirun, command=_command(), **told)
            _results.append(result)
            return result.metrics.get(config.get("optimized_metric") or "")  # for a sweeper
    except Exception as error:
        if note:
            note(failed=str(error) or type(error).__name__)
        if multirun or not (_is_ours(error) or isinstance(error, OmegaConfBaseException)):
            raise
        _caught.append(error)  # Hydra would wrap it in its own message
        return None


def _use_current_words(cfg: DictConfig) -> None:
    """Put an older word of the `data` section in the place of the current one, whatever the files say there.

    Raises:
        ConfigError: The current word was typed, too.
    """
    from hydra.utils import get_object

    from zoo.support.signatures import ConfigError

    data, new = cfg.get("data"), None
    if not isinstance(data, DictConfig) or "root" not in data:
        return
    with suppress(ImportError, ValueError, AttributeError, OmegaConfBaseException):  # the section's check tells
        new = getattr(get_object(data["_target_"]).__init__, "older_names", {}).get("root")
    if new is None:
        return
    given: Any = OmegaConf.to_container(data)
    with open_dict(data):
        del data["root"]
        if given["root"] not in (None, "???"):
            if "data.root" in map(_key, _typed()):  # what is typed now replaces what was typed before
                earlier = [word for word in _inherited if _key(word) == f"data.{new}"]
                _inherited[:] = [word for word in _inherited if word not in earlier]
            else:
                earlier = []
            if any(_key(text) == f"data.{new}" and text not in earlier for text in HydraConfig.get().overrides.task):
                raise ConfigError(f"data.root is the older word for data.{new}: give one of them, not both")
            data[new] = given["root"]


def _known_word(argument: str) -> str:
    """`data.root=...`, which no file lists any more, as an override that adds it; see `_use_current_words`."""
    return f"++{argument}" if argument.startswith("data.root=") else argument


# --- several runs of a command ---

_SWEEP = "KERNEL_ZOO_MULTIRUN"  # environment variable: the fields of `_Sweep` as JSON, for jobs in other processes


class _Sweep(NamedTuple):
    """A multirun: its folder, and the keys that its overrides vary."""

    folder: str
    varied: list[str]


class Multirun(HydraCallback):
    """Tells the runs of a multirun, before the first one starts, what sets them apart."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        from hydra.core.override_parser.overrides_parser import OverridesParser

        from zoo.training.multirun import begin

        words = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
        varied = [word.key_or_group for word in words if word.is_sweep_override()]
        varied += [str(key).lstrip("+") for key in config.hydra.sweeper.get("params") or ()]
        folder = Path(config.hydra.sweep.dir).absolute()
        begin(folder)
        os.environ[_SWEEP] = json.dumps(_Sweep(str(folder), list(dict.fromkeys(varied)))._asdict())


def _sweep() -> _Sweep | None:
    """The multirun that this process works for; None outside of one."""
    text = os.environ.get(_SWEEP)
    return _Sweep(**json.loads(text)) if text else None


def _end_multirun() -> None:
    """Print and write the table of the runs, whether they have finished or not."""
    if (sweep := _sweep()) is not None:
        from zoo.training.multirun import conclude

        del os.environ[_SWEEP]
        conclude(Path(sweep.folder), sweep.varied)


def _origin(sweep: _Sweep | None) -> dict[str, Any]:
    """What the command line chose, for the record of the run."""
    job = HydraConfig.get()
    chosen: Any = OmegaConf.to_container(job.runtime.choices)
    choices = {k: v for k, v in chosen.items() if v is not None and not k.startswith("hydra/")}
    overrides = [text for text in job.overrides.task if _key(text) != "resume"]  # a resumed run is the same run
    origin = {"experiment": choices.get("experiment"), "choices": choices, "overrides": overrides}
    if sweep is not None:
        label = " ".join(text.lstrip("+") for text in overrides if _key(text) in sweep.varied)
        folder = Path(sweep.folder)
        origin |= {"label": label, "group": f"{folder.parent.name}-{folder.name}"}
    return origin


def _write_hydra_files(cfg: DictConfig) -> None:
    """Write `.hydra/` as Hydra does, but atomically, and only after the run folder is locked."""
    from zoo.training.folder import is_first_process, write_texts

    job = HydraConfig.get()
    if cfg.get("resume") is None and is_first_process():
        typed = [text.removeprefix("++") if _known_word(text[2:]) == text else text for text in job.overrides.task]
        files = {"config": cfg, "hydra": OmegaConf.create({"hydra": job}), "overrides": typed}
        texts = {f".hydra/{name}.yaml": OmegaConf.to_yaml(content) for name, content in files.items()}
        folder = Path(job.runtime.output_dir)
        write_texts(folder, texts | _signed(_places(cfg, folder)))


def _places(cfg: DictConfig, folder: Path) -> dict[str, str]:
    """Where the data of a configuration is, outside of the run folder; see `zoo.support.places`."""
    from zoo.support.places import places_in

    found: Any = OmegaConf.to_container(cfg, resolve=True)
    return places_in(found["data"], folder) if isinstance(found.get("data"), dict) else {}


def _signed(places: Mapping[str, str]) -> dict[str, str]:
    """The file with the signature of places, if there are any and this user can sign."""
    from zoo.support.places import SIGNATURE, sign

    signature = sign(places) if places else None
    return {SIGNATURE: f"{signature}\n"} if signature else {}


def _recorded_config(folder: Path) -> dict[str, Any] | None:
    """The configuration that a run folder recorded; None if it cannot be read. Places of data are as in `anchored`."""
    from zoo.support.places import anchored
    from zoo.support.values import DamagedFileError, read_yaml

    with suppress(DamagedFileError, OSError):
        found = read_yaml(folder / ".hydra" / "config.yaml")
        data = found.get("data") if isinstance(found, dict) else None
        if isinstance(data, dict):
            return found | {"data": anchored(data, folder)}
        return found if isinstance(found, dict) else None
    return None


def _start_where_it_was(cfg: DictConfig, folder: Path) -> None:
    """Let the relative places of data that a resumed run recorded start where the run did, see `anchored`."""
    found = _recorded_config(folder)
    data = _in_current_words(found, cfg).get("data") if found else None
    typed = {_key(text) for text in [*_lasting, *_inherited]}
    for key, place in data.items() if isinstance(data, dict) else ():
        now = cfg.data.get(key)
        if now == place or not isinstance(now, str) or not isinstance(place, str) or f"data.{key}" in typed:
            continue
        if Path(place).is_absolute() and Path(place).parts[-len(Path(now).parts) :] == Path(now).parts:
            cfg.data[key] = place


def _check_places(cfg: DictConfig, folder: Path) -> None:
    """Let a resumed run read only data that its user typed, or that a run of this user's on this machine had.

    Raises:
        ResumeError: A place comes from the folder alone.
    """
    from zoo.support.places import data_section, not_vouched, places_in, unknown, vouched
    from zoo.training.folder import is_first_process, write_texts

    if not is_first_process():  # the folder is the first one's
        return
    found, recorded = _recorded_config(folder), {}
    if found is not None and isinstance(found.get("data"), dict):
        recorded = places_in(data_section(_in_current_words(found, cfg)), folder)
    typed = {_key(text).removeprefix("data.") for text in _lasting if _key(text).startswith("data.")}
    typed |= {"path", "cache"} if "root" in typed else {"path"} if "name" in typed else set()
    used = _places(cfg, folder)
    odd = not_vouched({key: place for key, place in used.items() if key not in typed}, vouched(recorded, folder))
    if odd:
        ways = " ".join(f"data.{key}=..." for key in odd)
        raise ResumeError(f"resume={cfg.resume}: {unknown(used, odd, f'name the data with {ways}')}")
    if used == recorded and typed:  # as the user has just said where they are
        write_texts(folder, _signed(used))


#: Values that a resumed run may change without becoming another one.
_FREE = ("resume", "logger.", "trainer.enable_", "callbacks.progress.", "data.num_workers")
_LENGTHS = ("trainer.max_", "callbacks.stop.patience")  # for going on


def _in_current_words(found: dict[str, Any], cfg: DictConfig) -> dict[str, Any]:
    """A recorded configuration whose `data` section has the words of today, if the run still has that data module."""
    from hydra.utils import get_object

    from zoo.support.signatures import current_arguments

    data = found.get("data")
    if isinstance(data, dict) and data.get("_target_") == cfg.data.get("_target_"):
        with suppress(ImportError, ValueError, AttributeError):  # an earlier release had other words
            return found | {"data": current_arguments(get_object(cfg.data["_target_"]), data)}
    return found


def _changes(cfg: DictConfig, folder: Path) -> Changes:
    """Which values of a resumed run are not those of its folder, which is told; all typed ones if that is not known."""
    import yaml

    from zoo.support.signatures import flatten
    from zoo.training.resuming import Changes
    from zoo.training.summary import tell

    found = _recorded_config(folder)
    if found is None:
        path = folder / ".hydra" / "config.yaml"
        tell(f"{path} cannot be read: whether the resumed run has other values than before is not known")
        unknown = {_key(text): text for text in _typed() if not _key(text).startswith(_FREE)}
        words = merge_overrides(_inherited, list(unknown.values()))
        return Changes(unknown, tuple(key for key in unknown if key.startswith(_LENGTHS)), tuple(words))
    found = _in_current_words(found, cfg)
    first, now = dict(flatten(found)), dict(flatten(yaml.safe_load(OmegaConf.to_yaml(cfg))))
    typed = set(map(_key, HydraConfig.get().overrides.task))
    keys = [key for key in {**first, **now} if key in first or key in typed]  # others are of a later release
    keys = [key for key in keys if not key.startswith(_FREE)]
    before = _last_values(first, now)
    texts = {
        key: f"{key:.80} = {now.get(key)!s:.60} (was {before.get(key)!s:.60})"
        for key in keys
        if before.get(key) != now.get(key)
    }
    again = set(map(_key, _typed()))
    if kept := [word for word in _inherited if _key(word) not in again]:
        tell(f"going on with {', '.join(f'{word:.80}' for word in kept)}, with which {folder} was last resumed")
    if values := [text for key, text in texts.items() if not key.startswith("trainer.max_")]:
        more = f" and {len(values) - 5} more" if len(values) > 5 else ""
        tell(f"from here on with {', '.join(values[:5])}{more}: no longer the run that {folder} began")
    changed = {key for key in keys if first.get(key) != now.get(key)}
    words = merge_overrides(_inherited, _typed())  # all that sets it apart from the run that began
    words = [text for text in words if _key(text) in changed or (changed and _key(text) not in now)]
    words = [text for text in words if not _key(text).startswith(_FREE)]
    return Changes(texts, tuple(key for key in texts if key.startswith(_LENGTHS)), tuple(words))


#: Groups whose choices set values anywhere in the configuration.
_EVERYWHERE = ("experiment", "debug", "sweep")


def _last_values(first: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a run had when it was last resumed, by their keys, as far as this command line tells.

    Args:
        first: Those that it began with.
        now: Those of this command line, which are the last ones but for what it types.
    """
    import yaml

    again, last = set(map(_key, _typed())), dict(first)
    for word in _inherited:
        key, value = _key(word), _parsed(word)[1]
        if word.startswith("~"):
            last = {name: part for name, part in last.items() if name != key and not name.startswith(f"{key}.")}
        elif key in now:
            plain = isinstance(value, str | int | float | list | None)
            last[key] = yaml.safe_load(OmegaConf.to_yaml({"value": value}))["value"] if plain else now[key]
        elif key not in again:  # a choice of a group, or a section
            start = "" if key in _EVERYWHERE else key.replace("/", ".") + "."
            last |= {name: part for name, part in now.items() if name.startswith(start) and name not in again}
    return last


def _typed() -> list[str]:
    """The overrides of this command line, without `resume=` and flags."""
    return [word for word in _lasting if not word.startswith("-")]


class _SafeStream:
    """A stream whose reader may disappear, such as a closed terminal: later output is discarded without an error."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Callable[..., Any], *arguments: Any) -> None:
        try:
            act(*arguments)
        except OSError:
            with suppress(OSError, ValueError):  # buffered output must not fail again at exit
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


@contextmanager
def _safe_streams() -> Iterator[None]:
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_SafeStream(stream) if stream is not None else stream for stream in before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, _SafeStream):
                stream.flush()
        sys.stdout, sys.stderr = before


@_safe_streams()
def main() -> None:
    """Run `train.py`: exit code 0 after training, 1 after an error with a message, 128 + signal if stopped by one."""
    try:
        if {"--help", "-h"} & set(sys.argv[1:]):
            script = Path(sys.argv[0])  # without its folder, to keep the examples short
            print(help_text(f"python {script.name}" if script.suffix == ".py" else script.name))
            return
        _run()
    except (HydraException, OmegaConfBaseException) as error:
        _fail(_explain(error, sys.argv[1:]))
    except KeyboardInterrupt:
        print("\ninterrupted before there was anything to save", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        cause = error if isinstance(error, OSError) else error.__cause__  # of a log file that Hydra cannot open
        if not _is_ours(error) and isinstance(cause, OSError) and cause.filename is not None and cause.errno:
            _fail(f"{cause.filename}: {os.strerror(cause.errno)}")
        if not _is_ours(error) and not _is_hydras(error):
            raise
        code = getattr(error, "exit_code", 1)
        _fail(str(error), code)


def _run() -> None:
    """Run what `sys.argv` says."""
    sys.argv[1:] = _prepare(sys.argv[1:])
    with _hydra_raises(), one_line_warnings():
        try:
            _job()
        finally:
            _end_multirun()
    if _caught:
        raise _caught.pop()


def train(overrides: str | Sequence[str] | Mapping[str, Any] = ()) -> RunResult:
    """Train as `python train.py OVERRIDES` does, in this process.

    >>> train("experiment=grbf_wine trainer.max_epochs=5").metrics["test/acc"]
    >>> train({"experiment": "grbf_wine", "name": "wine, again", "seed": 1})

    `sys.argv`, the root logger and torch's number of threads are afterwards as they were.

    Args:
        overrides: As on the command line: one text, or a list of `key=value`; or a mapping from keys to values, whose
            texts need no quotation marks.

    Returns:
        Metrics, time and paths of the run.

    Raises:
        UsageError: An override or its value is not understood, or a flag is given.
        ConfigError: The configuration does not fit; before anything is built.
        RunStopped: After a signal, with the state saved.
        RunFailed: The run could not continue; the last good checkpoint is kept.
    """
    import torch

    if isinstance(overrides, Mapping):
        words = [override(key, value) for key, value in overrides.items()]
    else:
        words = shlex.split(overrides) if isinstance(overrides, str) else [str(word) for word in overrides]
    if flag := next((word for word in words if word.startswith("-")), None):
        raise UsageError(f"{flag} is a flag of the command line; from Python one run is started, by key=value")
    root = logging.getLogger()
    argv, threads, handlers, level = sys.argv, torch.get_num_threads(), root.handlers[:], root.level
    program = "train.py" if Path("train.py").is_file() else "kernel-zoo-train"  # of printed commands
    sys.argv = [program, *words]
    _results.clear()
    try:
        _run()
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(_explain(error, sys.argv[1:])) from None
    finally:
        sys.argv = argv
        torch.set_num_threads(threads)
        for handler in set(root.handlers) - set(handlers):
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
    return _results.pop()


def _fail(message: str, code: int = 1) -> None:
    message = shown(message)
    print(f"\n{message}" if code != 1 else f"\nerror: {message}", file=sys.stderr)
    sys.exit(code)


def _is_ours(error: Exception) -> bool:
    """Whether the error is one of the zoo's own types, whose messages are meant for users."""
    return type(error).__module__.split(".")[0] == "zoo"


def _is_hydras(error: Exception) -> bool:
    """Whether Hydra, OmegaConf or yaml raised the error: it is about a value or a file of the user's."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and str(frames[-1].f_globals.get("__name__")).split(".")[0] in ("hydra", "omegaconf", "yaml")


@contextmanager
def _hydra_raises() -> Iterator[None]:
    """Let Hydra raise its errors instead of printing them."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


def _command() -> str:
    """The command that started the program, with its configuration flags, for printed commands."""
    script = Path(sys.argv[0])
    words = [_python(), path_word(sys.argv[0])] if script.suffix == ".py" else [path_word(script.name)]
    return " ".join([*words, *map(shlex.quote, _lasting)])


def _python() -> str:
    """The shortest shell command for this Python."""
    mine = Path(sys.prefix)
    for name in ("python", "python3"):
        found = shutil.which(name)
        if found and mine in Path(found).absolute().parents:
            return name
    return shlex.quote(sys.executable or "python")


#: What `--help` shows: arguments and what they do.
EXAMPLES = {
    "": "the default experiment: UniRepLKNet, MNIST digits",
    "experiment=digits": "another experiment",
    "model=unireplknet_a data=cifar10 data.cache=DIR": "any model on any data",
    "trainer.max_epochs=50 optimizer.lr=1e-3 seed=1": "any value of the configuration",
    "-m seed=0,1,2": "several runs; hydra/launcher=joblib: side by side",
    "resume=outputs/mnist5k/latest": "continue a run where it stopped",
    "--cfg job": "print the whole configuration, every key",
    "--cfg job -p model": "... of one section",
}
#: Groups whose choices it lists.
GROUPS = (
    "experiment",
    "model",
    "data",
    "task",
    "optimizer",
    "scheduler",
    "trainer",
    "callbacks",
    "logger",
    "debug",
)


def help_text(command: str = "python train.py") -> str:
    """Text of `--help`: examples, then the choices of every group."""
    lines = ["Train a model of Kernel Zoo.", ""]
    lines += [f"  {command} {arguments:<47} {what}" for arguments, what in EXAMPLES.items()]
    lines += ["", "Choices, as group=choice:", ""]
    for group in GROUPS:
        lines += textwrap.wrap(choices_of(group), 110, initial_indent=f"  {group:<11} ", subsequent_indent=" " * 14)
    return "\n".join([*lines, "", "Hydra's own flags: --hydra-help"])


def choices_of(group: str) -> str:
    """Names of the choices of a group, as a list in words."""
    return ", ".join(_compact(path.stem for path in (CONFIGS / group).glob("*.yaml")))


def _compact(names: Iterable[str]) -> Iterator[str]:
    """Sorted names; three or more with a common prefix are joined: `imagenet_unireplknet_{a, f, n}`."""
    left = sorted(names)
    while left:
        prefixes = [left[0][: i + 1] for i, letter in enumerate(left[0]) if letter == "_"]
        shared = {prefix: [name for name in left if name.startswith(prefix)] for prefix in prefixes}
        prefix, family = max(shared.items(), key=lambda item: (len(item[1]), len(item[0])), default=("", left[:1]))
        family = family if len(family) > 2 else left[:1]
        left = [name for name in left if name not in family]
        yield prefix + "{" + ", ".join(name.removeprefix(prefix) for name in family) + "}" if family[1:] else family[0]


# --- flags and overrides ---


class UsageError(ValueError):
    """A command line that cannot be parsed."""


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into Hydra's flags, with their values, and overrides, which may be interleaved.

    Raises:
        UsageError: A flag is unknown or lacks its value.
    """
    from hydra._internal.utils import get_args_parser

    known = {option: action for action in get_args_parser()._actions for option in action.option_strings}
    flags: list[str] = []
    overrides: list[str] = []
    left = list(arguments)
    while left:
        word = left.pop(0)
        if word == "--":
            overrides += left
            break
        if not word.startswith("-") or word == "-":
            overrides.append(word)
            continue
        option, glued, value = _option(word, known)
        action = known[option]
        flags.append(option)
        if action.nargs == 0:
            if glued:
                raise UsageError(f"{option} takes no value, got {word}")
        elif glued:
            flags[-1] = f"{option}={value}" if option.startswith("--") else option
            flags += [] if option.startswith("--") else [value]
        elif action.nargs == "?":
            flags.append(left.pop(0) if left and left[0] in (action.choices or ()) else str(action.const))
        elif left and not left[0].startswith("-") and not (action.choices and left[0] not in action.choices):
            flags.append(left.pop(0))
        else:
            choices = f": one of {', '.join(action.choices)}" if action.choices else ""
            raise UsageError(f"{option} needs a value{choices}")
    return flags, overrides


def _option(word: str, known: Mapping[str, argparse.Action]) -> tuple[str, bool, str]:
    """The flag of a word, whether the word contains its value, and that value."""
    if word in known:
        return word, False, ""
    name, equals, value = word.partition("=")
    if name.startswith("--"):
        meant = [option for option in known if option.startswith(name)]
        if name in known or len(meant) == 1:
            return name if name in known else meant[0], bool(equals), value
    else:
        for option in sorted(known, key=len, reverse=True):
            if not option.startswith("--") and word.startswith(option) and known[option].nargs != 0:
                return option, True, word.removeprefix(option).removeprefix("=")
    raise UsageError(
        f"{name} is not a flag{suggestion(name, known)}; values are given without dashes: trainer.max_epochs=5"
    )


def _check_flags(flags: Sequence[str]) -> None:
    """Raise UsageError for incompatible flags."""
    given = [flag.split("=", 1)[0] for flag in flags if flag.startswith("-")]
    actions = [("--run", "-r"), ("--multirun", "-m"), ("--cfg", "-c"), ("--info", "-i"), ("--shell-completion", "-sc")]
    chosen = [names[0] for names in actions if set(names) & set(given)]
    if len(chosen) > 1:
        raise UsageError(f"choose one of {' and '.join(chosen)}")
    for flag, short in (("--resolve", "--resolve"), ("--package", "-p")):
        if {flag, short} & set(given) and chosen != ["--cfg"]:
            raise UsageError(f"{flag} belongs to --cfg: --cfg job {flag}{' model' if short == '-p' else ''}")
    if "--experimental-rerun" in given:
        raise UsageError("--experimental-rerun would run a pickled file; continue a run with resume=<its folder>")


def _value(flags: Sequence[str], *names: str) -> str | None:
    """The value of a flag, given by any of its names."""
    for i, flag in enumerate(flags):
        if flag in names and i + 1 < len(flags):
            return flags[i + 1]
        if flag.split("=", 1)[0] in names and "=" in flag:
            return flag.split("=", 1)[1]
    return None


def _key(argument: str) -> str:
    """The key of an override without its prefix and package."""
    return argument.split("=", 1)[0].lstrip("+~").split("@", 1)[0]


# --- overrides of resumed and distributed runs ---


def _prepare(arguments: list[str]) -> list[str]:
    flags, overrides = split_arguments(arguments)
    _check_flags(flags)
    named = {"--config-dir": "-cd", "--config-name": "-cn", "--config-path": "-cp"}
    _inherited.clear()
    _lasting[:] = [f"{flag}={value}" for flag, short in named.items() if (value := _value(flags, flag, short))]
    if {"--shell-completion", "-sc", "--version", "--hydra-help"} & set(flags):
        return [*flags, *overrides]
    for text in overrides:
        if not _key(text) or ("=" not in text and not text.startswith("~")):
            raise UsageError(f"{text!r} is not understood: values are given as key=value, like trainer.max_epochs=5")
        _check_filled(text)
    resume = next((_plain_value(a) for a in overrides if a.startswith("resume=")), None)
    if resume is not None:
        typed = merge_overrides([], [a for a in overrides if not a.startswith("resume=")])
        _lasting.extend(typed)
        overrides = _continue_run(Path(resume), typed)
        overrides.append(override("resume", resume))
    overrides = list(map(_known_word, overrides))
    own = _value(flags, "--config-name", "-cn") is not None
    if not own and not set(map(_key, overrides)) & {"experiment", "model", "data", "task", "resume"}:
        overrides.append(f"experiment={DEFAULT_EXPERIMENT}")
    if _is_secondary_process() and not any(a.startswith("hydra.run.dir=") for a in overrides):
        # only the first process of torchrun or srun makes a run folder
        overrides += [
            "hydra.run.dir=.",
            "hydra.output_subdir=null",
            "hydra/job_logging=none",
            "hydra/hydra_logging=none",
        ]
    return [*flags, *overrides]


def _check_filled(argument: str) -> None:
    """Refuse an empty path, which an unset variable of the shell leaves, and which would name the working folder.

    Raises:
        UsageError: The override names a path, or the run to resume, and has no value.
    """
    from zoo.support.places import names_place

    key, equals, value = argument.partition("=")
    if equals and (names_place(_key(key)) or _key(key) == "resume") and not value.strip(" \t'\""):
        raise UsageError(f"{key}= is empty, as from an unset variable: name the path, or give {key}=null for none")


def _plain_value(argument: str) -> str | None:
    """The path given by an override; None for null.

    A path that Hydra's grammar rejects, for example with a blank, a comma or an `=`, is taken literally.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    text = argument.split("=", 1)[1]
    try:
        value = OverridesParser.create().parse_override(argument).value()
    except HydraException:
        return text
    if value is None or value == "":
        return None
    return str(OmegaConf.create({"value": value})["value"]) if isinstance(value, str) else text


def _continue_run(target: Path, arguments: list[str]) -> list[str]:
    from zoo.support.values import DamagedFileError, check_closed

    run = find_run(target)
    try:
        check_closed(run)  # before anything in it is opened
    except DamagedFileError as error:
        raise ResumeError(f"resume={target}: {error}") from None
    if "${" in str(run):
        raise ResumeError(f"resume={target}: Hydra would look up what stands in ${{...}}; give the folder another name")
    recorded = run / ".hydra" / "overrides.yaml"
    if not recorded.is_file():
        began = (run / ".lock").is_file()  # the first file of a run
        why = f"{run} is not the folder of a run (it has no .hydra/overrides.yaml)"
        if began:
            why = f"{run} has nothing to go on from, the run stopped before anything was on record: start it again"
        raise ResumeError(f"resume={target}: {why}")
    _inherited[:] = _last_stage(run, target.expanduser())
    before = _recorded_overrides(recorded, target, arguments, _inherited)
    _inherited[:] = map(_not_sent, _inherited)
    if {"data.path", "data.cache"} & set(map(_key, [*_inherited, *arguments])):
        before = [text for text in before if _key(text) != "data.root"]  # what was typed later replaces the older word
    if {"data.path", "data.cache"} & set(map(_key, arguments)):
        _inherited[:] = [text for text in _inherited if _key(text) != "data.root"]
    merged = merge_overrides([*before, *_former_defaults(run, before, arguments)], arguments)
    return merge_overrides(merged, [override("hydra.run.dir", run), "hydra.output_subdir=null"])


def _last_stage(run: Path, target: Path) -> list[str]:
    """The overrides that a run was resumed with where it last went on before a state; none if it never was.

    Args:
        run: The run folder.
        target: A state in it, or any folder for its newest one.
    """
    from zoo.registry.checkpoints import CheckpointError, read_checkpoint
    from zoo.results.runs import Stage, stage_problem
    from zoo.support.values import DamagedFileError, read_json
    from zoo.training.checkpointing import FOLDER, step_files

    notes: Any = None
    with suppress(DamagedFileError, OSError):  # told where the notes are read
        notes = read_json(run / "run.json")
    found = notes.get("stages") if isinstance(notes, dict) else None
    if not found or stage_problem(found):
        return []
    stages, steps = [Stage.model_validate(stage) for stage in found], step_files(run / FOLDER)
    step: Any = steps[0][0] if steps else None
    if target.is_file():
        step = next((number for number, path in steps if path.name == target.name), None)
        with suppress(CheckpointError):
            step = read_checkpoint(target).get("global_step") if step is None else step
    led = [stage for stage in stages if not isinstance(step, int) or stage.step <= step]
    return list(led[-1].overrides) if led else []


#: Keys whose default was another one in an earlier release.
_NEW_DEFAULTS = ("model.backbone", "model.drop_path_rate", "data.scenario", "data.tasks")


def _former_defaults(run: Path, recorded: Sequence[str], typed: Sequence[str]) -> list[str]:
    """Overrides that give a resumed run the defaults that it began with, where they are others today."""
    found = _recorded_config(run) or {}
    given, kept = set(map(_key, [*recorded, *typed])), []
    for key in _NEW_DEFAULTS:
        section, _, name = key.partition(".")
        values = found.get(section)
        value = values.get(name) if isinstance(values, dict) else None
        if key in given or {section, "experiment"} & set(map(_key, typed)):
            continue
        if isinstance(value, int | float) or (isinstance(value, str) and re.fullmatch(r"\w+", value)):
            kept.append(override(key, value))
    return kept


class ResumeError(ValueError):
    """`resume=` does not name a run, or the run has unsafe overrides."""


def _recorded_overrides(path: Path, target: Path, arguments: Sequence[str], stage: Sequence[str] = ()) -> list[str]:
    """Read the overrides of a run, which must be plain data; those typed again by the user are not checked.

    Args:
        path: The file of those that it began with.
        target: What is resumed, for messages.
        arguments: What was typed.
        stage: Recorded ones that it was last resumed with, which follow.

    Raises:
        ResumeError: The file is damaged, or an override refers to code, another folder or an address.
    """
    from zoo.registry.trust import override_problem
    from zoo.support.values import DamagedFileError, read_yaml

    try:
        overrides = read_yaml(path)
    except (DamagedFileError, OSError) as error:
        raise ResumeError(f"resume={target}: {error}") from None
    if not isinstance(overrides, list) or not all(isinstance(text, str) for text in overrides):
        raise ResumeError(f"resume={target}: {path} holds no list of overrides")
    overrides, given = [*overrides, *stage], set(map(_key, arguments))
    _tell_not_sent([text for text in overrides if _not_sent(text) != text and _key(text) not in given])
    overrides = [_not_sent(text) for text in overrides]
    left = set(merge_overrides(overrides, arguments)) - set(arguments)
    for text in overrides:
        if text not in left:
            continue
        if problem := override_problem(*_parsed(text), run=path.parent.parent.resolve()):
            raise ResumeError(
                f"resume={target}: the override {text[:200]!r} that the folder recorded is refused, {problem}; a run "
                "folder is data and may come from anyone: if this is your own, type the override again after resume=..."
            )
    return overrides


def _not_sent(override: str) -> str:
    """A recorded override, with `logger.*.mode=online` replaced by `auto`: a folder must not decide to send data."""
    key, _, value = override.partition("=")
    sent = re.fullmatch(r"\+{0,2}logger\.\w+\.mode", key) and value.strip("'\" ").lower() == "online"
    return f"{key}=auto" if sent else override


def _tell_not_sent(recorded: Sequence[str]) -> None:
    """Tell that a recorded wish to send data is not followed."""
    from zoo.support.quoting import shown

    for text in recorded:
        print(
            f"note: {shown(text)[:80]}, which the folder recorded, is read as auto, as a folder must not decide to "
            f"send data: type {shown(text)[:80]} again to send it",
            file=sys.stderr,
        )


def _parsed(override: str) -> tuple[str, Any, bool]:
    """Key and value of an override parsed by Hydra, and whether it chooses an option of a config group."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import QuotedString

    from zoo.registry.trust import Untyped

    def plain(value: Any) -> Any:
        if isinstance(value, QuotedString):
            return value.text
        if isinstance(value, dict):
            return {str(plain(key)): plain(part) for key, part in value.items()}
        if isinstance(value, list):
            return [plain(part) for part in value]
        return value if isinstance(value, str | int | float | None) else Untyped()

    try:
        (parsed,) = OverridesParser.create().parse_overrides([override])
    except (HydraException, RecursionError):
        return "", Untyped(), False
    key = parsed.key_or_group + ("@" if parsed.package is not None else "")
    value = Untyped() if parsed.is_sweep_override() else None if parsed.is_delete() else plain(parsed.value())
    return key, value, "/" in key or (CONFIGS / key).is_dir()


def find_run(target: Path) -> Path:
    """The run folder that a folder or a checkpoint path belongs to.

    Raises:
        ResumeError: If the path does not exist or is not in a run.
    """
    named = target.expanduser().absolute()
    path = named.resolve()  # `latest` is a link
    if not path.exists():
        raise ResumeError(f"resume={target}: there is no such folder or file")
    if path.is_dir():
        path = named if named.name == "checkpoints" else path  # a link in a run must not lead to another run
        return path.parent.resolve() if path.name == "checkpoints" else path
    path = named if named.parent.name == "checkpoints" else path
    if path.parent.name != "checkpoints":
        raise ResumeError(
            f"resume={target}: a checkpoint is resumed inside its run folder (<run>/checkpoints/); "
            f"to start a new run from its weights use {shlex.quote(override('model.checkpoint_path', target))}"
        )
    return path.parent.parent.resolve()


def merge_overrides(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """Merge the overrides of two command lines; the second one takes precedence."""
    by_key: dict[str, str] = {}
    for text in [*first, *second]:
        prefix = "+" if text.startswith("+") else ""  # the second `+key` or `++key` replaces the first
        by_key[prefix + text.split("=", 1)[0].lstrip("+")] = text
    return list(by_key.values())


def _is_secondary_process() -> bool:
    rank = os.environ.get("RANK") or (os.environ.get("SLURM_PROCID") if "SLURM_NTASKS" in os.environ else None)
    return rank is not None and rank.isdecimal() and int(rank) > 0


# --- error messages ---


#: Choices of Hydra that come with an extra of the zoo.
_EXTRAS = {
    "hydra/sweeper/optuna": "optuna",
    "hydra/launcher/joblib": "sweep",
    "hydra/launcher/submitit_local": "slurm",
    "hydra/launcher/submitit_slurm": "slurm",
}


def _explain(error: Exception, arguments: list[str]) -> str:
    if isinstance(error, OverrideParseException):
        return _unquoted(error)
    if isinstance(error, MissingConfigException) and error.options is not None and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        if error.missing_cfg_file in _EXTRAS:
            extra = _EXTRAS[error.missing_cfg_file]
            return f"{group}={choice} needs the extra {extra}: pip install 'kernel-zoo[{extra}]'"
        return (
            f"{group}={choice}: there is no such choice{suggestion(choice, error.options)}\n"
            f"choices of {group}: {', '.join(sorted(error.options))}\n"
            f"to add one, write {CONFIGS.name}/{group}/{choice}.yaml"
        )
    text = " ".join(str(part) for part in (error, error.__cause__) if part)
    key = _bad_key(error, arguments)
    if key is not None:
        groups, keys = _known_keys(arguments)
        hint = suggestion(key, {*groups, *keys}) if key.count(".") or not groups else suggestion(key, groups | keys)
        close = hint if hint.startswith("; did you mean") else ""
        return (
            f"{key} is not a key of this configuration{close}\n"
            f"to see every key: {_command()} --cfg job\n"
            f"to add a key that a class accepts but no file lists: +{key}=..."
        )
    return text.replace("\n", " ").strip()


def _unquoted(error: OverrideParseException) -> str:
    """Message for an override that Hydra cannot parse, with the quoted form of its value."""
    typed = error.override.replace("++data.root=", "data.root=", 1)
    key, _, value = typed.partition("=")
    return (
        f"{typed} is not understood by Hydra's grammar; if the value is meant as it stands, quote it: "
        f"{shlex.quote(override(key, value.strip(chr(34) + chr(39))))}"
    )


def _bad_key(error: Exception, arguments: list[str]) -> str | None:
    """The overridden key that the configuration lacks, if `error` is about one."""
    if not isinstance(error, ConfigCompositionException):
        return None
    text = f"{error} {error.__cause__ or ''}"
    if "struct" not in text and "No match in the defaults list" not in text and "Could not override" not in text:
        return None
    named = [a.split("=", 1)[0].lstrip("+~") for a in arguments if "=" in a]
    return next((key for key in sorted(named, key=len, reverse=True) if f"'{key}'" in text or f"{key}=" in text), None)


def _known_keys(arguments: list[str]) -> tuple[set[str], set[str]]:
    """Group names, and the dotted keys of the configuration composed from the valid choices on the command line."""
    from hydra import compose, initialize_config_dir

    from zoo.support.signatures import flatten

    groups = {path.name for path in CONFIGS.iterdir() if path.is_dir() and path.name != "hydra"}
    choices = [a for a in arguments if a.split("=", 1)[0] in groups and "," not in a]
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            composed: Any = OmegaConf.to_container(compose("train", overrides=choices), resolve=False)
    except (HydraException, OmegaConfBaseException, ValueError):
        return groups, set()
    leaves = {key for key, _ in flatten(composed)}
    inner = {key.rsplit(".", n)[0] for key in leaves for n in range(1, key.count(".") + 1)}
    return groups, leaves | inner
