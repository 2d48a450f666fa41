"""The command line of training: Hydra composes a configuration, `zoo.training.run` runs it.

Only Hydra is imported here, so that `--help` and `--cfg job` answer at once; everything heavy waits for a run that is
going to happen. This is also the only module that knows Hydra's overrides and error messages.
"""

from __future__ import annotations

import os
import signal
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zoo.suggest import suggestion

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # waiting threads that spin starve everything else on a small machine

_HERE = Path(__file__).resolve().parent
CONFIGS = next(path for path in (_HERE.parent / "configs", _HERE / "configs") if path.is_dir())


DEFAULT_EXPERIMENT = "mnist5k"  # where the command line chooses neither experiment nor model, data or task

_told: list[Exception] = []


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
def _job(cfg: DictConfig) -> float | None:
    from zoo.training.run import run_config

    config: Any = OmegaConf.to_container(cfg, resolve=True)
    multirun = HydraConfig.get().mode is RunMode.MULTIRUN
    try:
        return run_config(config, multirun=multirun, command=_command())
    except Exception as error:
        if multirun or not _is_ours(error):
            raise
        _told.append(error)  # raised again outside Hydra, which would announce it in its own words
        return None


def main() -> None:
    """Run `train.py`: exit 0 when training ends, 1 on an error told in words, 128 + signal when asked to stop."""
    try:
        if {"--help", "-h"} & set(sys.argv[1:]):
            print(help_text(_command()))
            return
        sys.argv[1:] = _prepare(sys.argv[1:])
        with _hydra_raises():
            _job()
        if _told:
            raise _told.pop()
    except (HydraException, OmegaConfBaseException) as error:
        _fail(_explain(error, sys.argv[1:]))
    except KeyboardInterrupt:
        print("\ninterrupted before there was anything to save", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except OSError as error:
        if not _is_about_a_file(error):
            raise
        _fail(f"{error.filename}: {os.strerror(error.errno or 0)}")
    except Exception as error:
        if not _is_ours(error):
            raise
        code = getattr(error, "exit_code", 1)
        _fail(str(error), code)


def _fail(message: str, code: int = 1) -> None:
    print(f"\n{message}" if code != 1 else f"\nerror: {message}", file=sys.stderr)
    sys.exit(code)


def _is_ours(error: Exception) -> bool:
    """Whether the zoo raised it, which means that its message is written for people."""
    return type(error).__module__.split(".")[0] == "zoo"


def _is_about_a_file(error: OSError) -> bool:
    return error.filename is not None and error.errno is not None


@contextmanager
def _hydra_raises() -> Iterator[None]:
    """Have Hydra raise its errors instead of printing them, so that ours can say more."""
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
    """The program as the user started it, for the commands that a summary prints."""
    script = Path(sys.argv[0])
    return f"python {script.name}" if script.suffix == ".py" else script.name


def help_text(command: str = "python train.py") -> str:
    """Examples, then every group with its choices, on one screen."""
    examples = {
        "": "the default experiment: UniRepLKNet, MNIST digits",
        "experiment=digits": "another experiment",
        "model=unireplknet_a data=cifar10 data.root=DIR": "any model on any data",
        "trainer.max_epochs=50 optimizer.lr=1e-3 seed=1": "any value of the configuration",
        "-m seed=0,1,2": "several runs; hydra/launcher=joblib: side by side",
        "resume=outputs/mnist5k/latest": "continue a run where it stopped",
        "--cfg job": "print the whole configuration, every key",
        "--cfg job -p model": "... of one section",
    }
    lines = ["Train a model of Kernel Zoo.", ""]
    lines += [f"  {command} {arguments:<47} {what}" for arguments, what in examples.items()]
    lines += ["", "Choices, as group=choice:", ""]
    for group in (
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
    ):
        choices = ", ".join(_compact(path.stem for path in (CONFIGS / group).glob("*.yaml")))
        lines += textwrap.wrap(choices, 110, initial_indent=f"  {group:<11} ", subsequent_indent=" " * 14)
    return "\n".join([*lines, "", "Hydra's own flags: --hydra-help"])


def _compact(names: Iterable[str]) -> Iterator[str]:
    """Sorted names, where three or more of a family are told as one: `imagenet_unireplknet_{a, f, n}`."""
    left = sorted(names)
    while left:
        prefixes = [left[0][: i + 1] for i, letter in enumerate(left[0]) if letter == "_"]
        shared = {prefix: [name for name in left if name.startswith(prefix)] for prefix in prefixes}
        prefix, family = max(shared.items(), key=lambda item: (len(item[1]), len(item[0])), default=("", left[:1]))
        family = family if len(family) > 2 else left[:1]
        left = [name for name in left if name not in family]
        yield prefix + "{" + ", ".join(name.removeprefix(prefix) for name in family) + "}" if family[1:] else family[0]


# --- resume and distributed starts: which overrides Hydra gets to see ---


def _prepare(arguments: list[str]) -> list[str]:
    resume = next((a.split("=", 1)[1].strip("'\"") for a in arguments if a.startswith("resume=")), None)
    if resume and resume != "null":
        arguments = _continue_run(Path(resume), arguments)
    if not {a.split("=", 1)[0] for a in arguments} & {"experiment", "model", "data", "task", "resume"}:
        arguments = [*arguments, f"experiment={DEFAULT_EXPERIMENT}"]
    if _is_secondary_process() and not any(a.startswith("hydra.run.dir=") for a in arguments):
        # every process of torchrun or srun would make a folder of its own; only the first one writes
        quiet = [
            "hydra.run.dir=.",
            "hydra.output_subdir=null",
            "hydra/job_logging=none",
            "hydra/hydra_logging=none",
        ]
        arguments = [*arguments, *quiet]
    return arguments


def _continue_run(target: Path, arguments: list[str]) -> list[str]:
    run = find_run(target)
    recorded = run / ".hydra" / "overrides.yaml"
    if not recorded.is_file():
        raise ResumeError(f"resume={target}: {run} is not the folder of a run (it has no .hydra/overrides.yaml)")
    merged = merge_overrides(_recorded_overrides(recorded, target, arguments), arguments)
    folder = [f"hydra.run.dir='{run}'", "hydra.output_subdir=null"]
    return merge_overrides(merged, folder)


class ResumeError(ValueError):
    """What `resume=` names is not a run, or asks for more than a run may."""


def _recorded_overrides(path: Path, target: Path, arguments: Sequence[str]) -> list[str]:
    """The overrides of a run, once each of them is plain data; what is typed again is the user's own and not judged.

    Raises:
        ResumeError: The file is damaged, or an override asks for code, another place or an address.
    """
    from zoo.trust import override_problem
    from zoo.values import DamagedFileError, read_yaml

    try:
        overrides = read_yaml(path)
    except (DamagedFileError, OSError) as error:
        raise ResumeError(f"resume={target}: {error}") from None
    if not isinstance(overrides, list) or not all(isinstance(override, str) for override in overrides):
        raise ResumeError(f"resume={target}: {path} holds no list of overrides")
    typed = {argument.split("=", 1)[0] for argument in arguments}
    for override in overrides:
        if override.split("=", 1)[0] in typed:
            continue
        if problem := override_problem(*_parsed(override), run=path.parent.parent.resolve()):
            raise ResumeError(
                f"resume={target}: the override {override[:200]!r} that the folder recorded is refused, {problem}; a run "
                "folder is data and may come from anyone: if this is your own, type the override again after resume=..."
            )
    return overrides


def _parsed(override: str) -> tuple[str, Any, bool]:
    """Key and value of an override as Hydra reads it, and whether it chooses a file of a group."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import QuotedString

    from zoo.trust import Untyped

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
        ResumeError: If the path does not exist or lies in no run.
    """
    path = target.expanduser().resolve()  # `latest` is a link
    if not path.exists():
        raise ResumeError(f"resume={target}: there is no such folder or file")
    if path.is_dir():
        return path.parent if path.name == "checkpoints" else path
    if path.parent.name != "checkpoints":
        raise ResumeError(
            f"resume={target}: a checkpoint is resumed inside its run folder (<run>/checkpoints/); "
            f"to start a new run from its weights use model.checkpoint_path='{target}'"
        )
    return path.parent.parent


def merge_overrides(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """Overrides of two command lines, the second one winning where both name a key."""
    by_key = {override.split("=", 1)[0]: override for override in [*first, *second]}
    return list(by_key.values())


def _is_secondary_process() -> bool:
    rank = os.environ.get("RANK") or (os.environ.get("SLURM_PROCID") if "SLURM_NTASKS" in os.environ else None)
    return int(rank or 0) > 0


# --- what went wrong, in words ---


def _explain(error: Exception, arguments: list[str]) -> str:
    if isinstance(error, MissingConfigException) and error.options is not None and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
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


def _bad_key(error: Exception, arguments: list[str]) -> str | None:
    """The overridden key that the configuration does not have, if that is what `error` says."""
    if not isinstance(error, ConfigCompositionException):
        return None
    text = f"{error} {error.__cause__ or ''}"
    if "struct" not in text and "No match in the defaults list" not in text and "Could not override" not in text:
        return None
    named = [a.split("=", 1)[0].lstrip("+~") for a in arguments if "=" in a]
    return next((key for key in sorted(named, key=len, reverse=True) if f"'{key}'" in text or f"{key}=" in text), None)


def _known_keys(arguments: list[str]) -> tuple[set[str], set[str]]:
    """Group names, and the dotted keys of the configuration that the valid choices on this command line compose."""
    from hydra import compose, initialize_config_dir

    from zoo.config import flatten

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
