"""Loggers: a CSV table, TensorBoard, and Weights & Biases, which stays offline without credentials.

Training never waits for the service and never fails with it: one warning, and it goes on.
"""

from __future__ import annotations

import csv
import errno
import importlib.util
import inspect
import io
import netrc
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyExperiment, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from zoo.support.files import CheckpointError, write_atomic, writer_of
from zoo.support.suggest import suggestion
from zoo.support.values import first_line
from zoo.training.summary import tell

Mode = Literal["auto", "online", "offline", "disabled"]

_MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}
_ANSWER = 5.0  # timeout of a request, seconds
_PATIENCE = {"online": 10.0, "offline": 60.0, "disabled": 60.0}  # timeout of wandb.init, seconds
_KEY_LENGTH = 40  # of a W&B key, at least; W&B itself reports a shorter one
_ROUTES = ("WANDB_HTTP_PROXY", "WANDB_HTTPS_PROXY", "WANDB_X_EXTRA_HTTP_HEADERS")  # settings of W&B's client only


def _service() -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")


def _key() -> str | None:
    """The W&B API key, from the environment or the netrc file."""
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(urlparse(_service()).hostname or "")
    except (OSError, ValueError, netrc.NetrcParseError):
        return None
    return found[2] if found else None


def logged_in() -> bool:
    """Whether there are W&B credentials: an API key in the environment or in the netrc file."""
    return _key() is not None


def refusal() -> str | None:
    """Reason why W&B cannot be used online; None if it accepts the key, or only its client can tell.

    Checked without the client: after a failed online start, its offline start waits a minute.
    """
    key = _key() or ""
    if len(key) < _KEY_LENGTH or any(os.environ.get(name) for name in _ROUTES):
        return None
    try:
        return _bounded(partial(_ask, key), _ANSWER)
    except TimeoutError as error:
        return str(error)


def _ask(key: str) -> str | None:
    import requests

    try:
        answer = requests.post(
            f"{_service().rstrip('/')}/graphql",
            json={"query": "query { viewer { id } }"},
            auth=("api", key),
            timeout=_ANSWER,
        )
    except requests.exceptions.SSLError:  # the client may have certificates of its own
        return None
    except requests.Timeout:  # it counts from a later moment than the bound on the whole call
        return _no_answer(_ANSWER)
    except requests.ConnectionError as error:
        return f"no connection to {urlparse(_service()).hostname}, {type(error).__name__}"
    except requests.RequestException:
        return None
    return "it does not accept the key" if answer.status_code in (401, 403) else None


def titles(name: str, label: str, group: str) -> dict[str, str]:
    """Name and group of a run for its loggers, by W&B's environment variables or else by the run itself.

    Args:
        name: Name of the run.
        label: What sets it apart from the others of a multirun; empty for a single run.
        group: Name of the multirun; empty for a single run.
    """
    named = os.environ.get("WANDB_NAME") or name
    found = {"name": f"{named} {label}".strip()[:128]}
    return found if not group or os.environ.get("WANDB_RUN_GROUP") else found | {"group": group}


class TensorBoardRun(TensorBoardLogger):
    """Event files of TensorBoard in the run folder.

    Args:
        save_dir: The run folder.
        name: Folder in it.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, save_dir: str, name: str = "tensorboard") -> None:
        if not any(map(importlib.util.find_spec, ("tensorboard", "tensorboardX"))):
            raise ImportError("TensorBoard is not installed: `pip install tensorboard`, or choose logger=csv")
        super().__init__(save_dir=save_dir, name=name, version="", default_hp_metric=False)


class CsvRun(CSVLogger):
    """One CSV table of a run's metrics, `<save_dir>/<name>/version_<n>/metrics.csv`, continued by resumed runs.

    Rows are written at once and completely. Resuming rewinds the table to the checkpoint, so a resumed run has the same
    rows as an uninterrupted one. A new run overwrites the table of a failed start.

    Args:
        save_dir: The run folder.
        name: Folder in it.
        resumed: Continue the existing table.
    """

    def __init__(self, save_dir: str, name: str = "csv", resumed: bool = False) -> None:
        super().__init__(save_dir=save_dir, name=name, flush_logs_every_n_steps=1)
        self.resumed = resumed

    def _get_next_version(self) -> int:
        return max(super()._get_next_version() - 1, 0)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            table = _Table(Path(self.log_dir))
            if not self.resumed:
                table.rewind(0, None)
            self._experiment = table  # type: ignore[assignment]
        return self._experiment

    @rank_zero_only
    def rewind(self, rows: int, pending: Mapping[str, float] | None = None) -> None:
        """Keep the first `rows` rows, and add the row that was pending when the checkpoint was saved."""
        self.experiment.rewind(rows, pending)


class _Table:
    """A CSV file whose columns may grow."""

    def __init__(self, folder: Path) -> None:
        self.path, self.hparams = folder / "metrics.csv", folder / "hparams.yaml"
        self.metrics: list[dict[str, Any]] = []  # not yet written
        rows = self._read()
        self.columns, self.rows = sorted({name for row in rows for name in row}), len(rows)

    def log_metrics(self, metrics: Mapping[str, Any], step: int) -> None:
        self.metrics.append({**metrics, "step": step})

    def log_hparams(self, params: Mapping[str, Any]) -> None:
        write_atomic(self.hparams, writer_of(yaml.safe_dump(dict(params), sort_keys=False).encode()))

    def save(self) -> None:
        rows, self.metrics = self.metrics, []
        if not rows:
            return
        if {name for row in rows for name in row} <= set(self.columns) and self.path.is_file():
            self._append(self._text(rows))
            self.rows += len(rows)
        else:
            self._write([*self._read(), *rows])

    def rewind(self, rows: int, pending: Mapping[str, float] | None) -> None:
        found = self._read()
        if len(found) > rows or pending:
            self._write([*found[:rows], *([dict(pending)] if pending and len(found) >= rows else [])])

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        try:
            with self.path.open(newline="", encoding="utf-8") as file:
                return [{k: v for k, v in row.items() if k and v} for row in csv.DictReader(file)]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise CheckpointError(f"{self.path} is damaged ({first_line(error)}): move it away") from None

    def _write(self, rows: list[dict[str, Any]]) -> None:
        self.columns, self.rows = sorted({name for row in rows for name in row}), len(rows)
        write_atomic(self.path, writer_of(self._text([dict(zip(self.columns, self.columns, strict=True)), *rows])))

    def _text(self, rows: list[dict[str, Any]]) -> bytes:
        text = io.StringIO(newline="")
        csv.DictWriter(text, self.columns).writerows(rows)
        return text.getvalue().encode()

    def _append(self, text: bytes) -> None:
        """Append in one system call: after a kill, all rows are there or none."""
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0))
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path}: {error.strerror}") from error
        try:
            before = os.fstat(handle).st_size
            try:
                if os.write(handle, text) < len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                os.ftruncate(handle, before)
                raise CheckpointError(f"cannot write {self.path}: {error.strerror}") from error
        finally:
            os.close(handle)


class WandbRun(WandbLogger):
    """One W&B run for a training, continued when it is resumed.

    The caller chooses the run's id and stores it in the run folder. Upload offline runs later with `wandb sync <run
    folder>/wandb/offline-run-*`. If W&B fails, training continues with a warning: offline, or else untracked.

    None leaves a value to W&B's environment variables. W&B itself ignores entity, project and id in a sweep's run.

    Args:
        save_dir: The run folder; W&B writes into its `wandb/`, or into that of WANDB_DIR.
        run_id: Id of the run; None lets W&B choose one.
        project: W&B project; None for WANDB_PROJECT, or `kernel-zoo`.
        name: Display name; None for WANDB_NAME.
        entity: W&B user or team; None for WANDB_ENTITY, or the account's default.
        group: Group of runs; None for WANDB_RUN_GROUP.
        job_type: Kind of run; None for WANDB_JOB_TYPE.
        notes: Description; None for WANDB_NOTES.
        mode: `auto` follows WANDB_MODE, else is `online` with credentials and `offline` without; `disabled` logs
            nothing.
        tags: Tags of the run; none for WANDB_TAGS.
        log_model: Upload the best checkpoint as an artifact after training.
        init: Further arguments of `wandb.init`.
        resumed: Continue a run. Its folder is untrusted, so with `auto` it continues online only if the user's account
            already has the run, or WANDB_MODE is `online`.

    Attributes:
        mode: `online`, `offline` or `disabled`, as actually used.

    Raises:
        ValueError: `init` has an argument that `wandb.init` does not know, or that has a key of its own here.
    """

    def __init__(
        self,
        save_dir: str,
        run_id: str | None = None,
        project: str | None = None,
        name: str | None = None,
        mode: Mode = "auto",
        tags: list[str] | None = None,
        log_model: bool = True,
        resumed: bool = False,
        entity: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        notes: str | None = None,
        init: dict[str, Any] | None = None,
    ) -> None:
        self._warned = False
        asked = _MODES.get(os.environ.get("WANDB_MODE", "").strip().lower()) == "online"
        self._known_only = resumed and mode == "auto" and not asked
        self.mode, self.send_model = self._chosen(mode), log_model
        os.environ.setdefault("WANDB_SILENT", "true")
        save_dir = os.environ.get("WANDB_DIR") or save_dir
        project = project or os.environ.get("WANDB_PROJECT") or "kernel-zoo"
        options: dict[str, Any] = {"name": name, "save_dir": save_dir, "id": run_id, "project": project}
        further: dict[str, Any] = {
            "tags": tags or None,
            "entity": entity,
            "group": group,
            "job_type": job_type,
            "notes": notes,
        }
        further = {k: v for k, v in further.items() if v is not None}
        _check_init(init or {})
        try:
            super().__init__(**options, **further, **(init or {}), resume="allow")
            import wandb  # noqa: F401 (an installed package may be broken)

            Path(save_dir, "wandb").mkdir(parents=True, exist_ok=True)
        except OSError:  # about the run folder, not W&B
            raise
        except Exception as error:
            self._leave(f"wandb cannot be imported ({_reason(error)})")
        if self.mode != "online":
            self._stay_offline(save_dir)

    def _chosen(self, mode: Mode) -> str:
        wanted = os.environ.get("WANDB_MODE", "").strip().lower() if mode == "auto" else mode
        if wanted and wanted not in _MODES:
            self._warn(f"WANDB_MODE={wanted} is none of {', '.join(_MODES)}: the run is tracked offline")
            return "offline"
        chosen = _MODES[wanted] if wanted else "online" if logged_in() else "offline"
        if chosen == "online" and not logged_in():
            self._warn(
                "W&B has no credentials (`wandb login`, or WANDB_API_KEY, gives them): the run is tracked offline"
            )
            return "offline"
        return chosen

    def _stay_offline(self, save_dir: str) -> None:
        os.environ["WANDB_MODE"] = self.mode  # only these variables prevent W&B's telemetry connection
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        os.environ.setdefault("WANDB_DATA_DIR", str(Path(save_dir, "wandb")))

    def _warn(self, text: str) -> None:
        if not self._warned:
            tell(text)
        self._warned = True

    def _leave(self, why: str) -> None:
        """Stop tracking."""
        self._warn(f"{why}: the run is not tracked by W&B from here on")
        self.mode = "disabled"
        self._experiment: Any = DummyExperiment()

    # ---- starting ----------------------------------------------------------------------------------------------

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, started on first access."""
        if self._experiment is None and getattr(self, "_attach_id", None) is None:
            self._begin()
        return self._experiment if self._experiment is not None else super().experiment

    def _begin(self) -> None:
        import wandb

        if wandb.run is not None:  # started by other code in this process
            self._experiment = wandb.run
            return
        why = ""
        if self.mode == "online" and (refused := refusal()) is not None:
            self._fall_back(refused)
        attempts = [(self.mode, False), *([("offline", False)] if self.mode == "online" else []), ("offline", True)]
        for mode, clean in attempts:
            try:
                with _without_settings() if clean else nullcontext():
                    self._experiment = _bounded(partial(self._init, mode), _PATIENCE[mode])
                return
            except Exception as error:
                why = why or _reason(error)
                with suppress(Exception):  # the wandb service process keeps the run's id until it ends
                    _bounded(wandb.teardown, _ANSWER)
            if mode == "online":
                self._fall_back(why)
        self._leave(f"W&B cannot start ({why})")

    def _fall_back(self, why: str) -> None:
        told = f"W&B cannot be reached ({why}): the run is tracked offline"
        if self._known_only:
            told += "; a resumed run goes on online where the account has it, or with logger.wandb.mode=online"
        self._warn(told)
        self.mode = "offline"
        self._stay_offline(str(self._save_dir))

    def _init(self, mode: Any) -> Any:
        import wandb

        options: dict[str, Any] = {k: v for k, v in self._wandb_init.items() if k != "anonymous"}  # W&B deprecates it
        options["settings"] = settings = wandb.Settings()
        settings.silent = os.environ.get("WANDB_SILENT", "true").lower() not in ("false", "0", "no")
        if mode == "online":
            settings.init_timeout = _ANSWER
            options |= {"resume": "must"} if self._known_only else {}
        run = wandb.init(**options, mode=mode)
        if getattr(run, "define_metric", None):
            run.define_metric("trainer/global_step")
            run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return run

    # ---- logging -------------------------------------------------------------------------------------------------

    def _try(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if isinstance(self._experiment, DummyExperiment):
            return
        try:
            call(*args, **kwargs)
        except Exception as error:
            self._leave(f"W&B has stopped ({_reason(error)})")

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        self._try(super().log_hyperparams, params)

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self._try(super().log_metrics, metrics, step)

    @rank_zero_only
    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        self._try(super().log_image, key, images, step, **kwargs)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._try(super().finalize, status)

    @property
    def folder(self) -> Path | None:
        """Folder of the run's files; None if it is not tracked."""
        place = None if self.mode == "disabled" else getattr(self.experiment, "dir", None)
        return Path(place).parent if isinstance(place, str) else None

    @rank_zero_only
    def log_best(self, checkpoint: Path, metadata: dict[str, Any]) -> None:
        """Attach a checkpoint to the run as the artifact `<run id>-model`, alias `best`."""
        if self.send_model and self.mode != "disabled":
            self._try(self._log_artifact, checkpoint, metadata)

    def _log_artifact(self, checkpoint: Path, metadata: dict[str, Any]) -> None:
        import wandb

        artifact = wandb.Artifact(f"{self.experiment.id}-model", type="model", metadata=metadata)
        artifact.add_file(str(checkpoint), name="model.ckpt")
        self.experiment.log_artifact(artifact, aliases=["best"])

    @rank_zero_only
    def close(self, exit_code: int) -> None:
        """Finish the run, so that a later one in the same process is separate."""
        if self._experiment is not None:
            self._try(self._experiment.finish, exit_code=exit_code)
            self._experiment = None


_OWN_KEYS = ("entity", "group", "job_type", "notes", "name", "project", "tags", "mode")  # of the section
_RUNS = ("id", "dir", "resume", "settings")  # what the zoo gives itself


def _check_init(options: Mapping[str, Any]) -> None:
    """Refuse further arguments that `wandb.init` does not take, or not from there."""
    try:
        import wandb

        known = set(inspect.signature(wandb.init).parameters)
    except Exception:  # told where the logger starts
        return
    for name in options:
        if name in _OWN_KEYS:
            raise ValueError(f"init.{name}: it has a key of its own, logger.wandb.{name}")
        if name in _RUNS:
            raise ValueError(f"init.{name}: the run itself gives it")
        if name not in known:
            raise ValueError(
                f"init.{name} is no argument of wandb.init{suggestion(name, known - {*_OWN_KEYS, *_RUNS})}"
            )


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]


def _no_answer(seconds: float) -> str:
    return f"no answer within {seconds:g} s"


def _bounded(call: Callable[[], Any], seconds: float) -> Any:
    """Run a call in a thread with a timeout; after TimeoutError the thread is abandoned."""
    done: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            done.append((call(), None))
        except BaseException as error:
            done.append((None, error))

    thread = threading.Thread(target=run, daemon=True, name="wandb-init")
    thread.start()
    thread.join(seconds)
    if not done:
        raise TimeoutError(_no_answer(seconds))
    value, error = done[0]
    if error is not None:
        raise error if isinstance(error, Exception) else RuntimeError(_reason(error))
    return value


@contextmanager
def _without_settings() -> Iterator[None]:
    """Remove W&B's environment variables except our own: an invalid one may prevent its start."""
    kept = {k: os.environ.pop(k) for k in list(os.environ) if k.startswith("WANDB_")}
    own = ("WANDB_MODE", "WANDB_ERROR_REPORTING", "WANDB_DATA_DIR", "WANDB_SILENT")
    os.environ.update({k: v for k, v in kept.items() if k in own})
    try:
        yield
    finally:
        os.environ.update(kept)
