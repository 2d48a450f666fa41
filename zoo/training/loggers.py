"""Run tracking: rows of a CSV file, and Weights & Biases, offline when nobody is logged in and never a network attempt
then.
"""

from __future__ import annotations

import csv
import errno
import io
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import yaml
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from zoo.files import CheckpointError, write_atomic, writer_of

Mode = Literal["auto", "online", "offline", "disabled"]


def logged_in() -> bool:
    """Whether W&B credentials are at hand: an API key in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class CsvRun(CSVLogger):
    """One table of a run's metrics for its whole life, `<save_dir>/<name>/version_<n>/metrics.csv`.

    A row is on disk, whole, as soon as it is logged. A training that goes on from a state takes the table back to that
    state, so that a resumed run has every row of an unbroken one, and each of them once.

    Args:
        save_dir: The run folder.
        name: Folder in it.
        resumed: Go on with the newest table there instead of beginning another one.
    """

    def __init__(self, save_dir: str, name: str = "csv", resumed: bool = False) -> None:
        super().__init__(save_dir=save_dir, name=name, flush_logs_every_n_steps=1)
        self.resumed = resumed

    def _get_next_version(self) -> int:
        following = super()._get_next_version()
        return max(following - 1, 0) if self.resumed else following

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            self._experiment = _Table(Path(self.log_dir))  # type: ignore[assignment]
        return self._experiment

    @rank_zero_only
    def rewind(self, rows: int, pending: Mapping[str, float] | None = None) -> None:
        """Keep the first rows, and add the one that had not been logged yet when the state was saved."""
        self.experiment.rewind(rows, pending)


class _Table:
    """The rows of a CSV file whose columns grow."""

    def __init__(self, folder: Path) -> None:
        self.path, self.hparams = folder / "metrics.csv", folder / "hparams.yaml"
        self.metrics: list[dict[str, Any]] = []  # not on disk yet
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
        with self.path.open(newline="") as file:
            return [{k: v for k, v in row.items() if k and v} for row in csv.DictReader(file)]

    def _write(self, rows: list[dict[str, Any]]) -> None:
        self.columns, self.rows = sorted({name for row in rows for name in row}), len(rows)
        write_atomic(self.path, writer_of(self._text([dict(zip(self.columns, self.columns, strict=True)), *rows])))

    def _text(self, rows: list[dict[str, Any]]) -> bytes:
        text = io.StringIO(newline="")
        csv.DictWriter(text, self.columns).writerows(rows)
        return text.getvalue().encode()

    def _append(self, text: bytes) -> None:
        """In one call of the system: a kill leaves the whole rows or none of them."""
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND)
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
    """One W&B run for the whole life of a training, also over interruptions.

    The run's id is drawn by the caller before anything starts and kept in the run folder, so a resumed training
    continues the same run. Offline runs are sent later with `wandb sync <run folder>/wandb/offline-run-*`.

    Args:
        save_dir: The run folder; W&B writes into its `wandb/`.
        run_id: Id of the run; None lets W&B draw one.
        project: W&B project.
        name: Display name.
        mode: `auto` is what WANDB_MODE says, else `online` with credentials and `offline` without; `disabled` logs
            nothing.
        tags: Tags of the run.
        log_model: Send the best checkpoint as an artifact when training ends.
    """

    def __init__(
        self,
        save_dir: str,
        run_id: str | None = None,
        project: str = "kernel-zoo",
        name: str | None = None,
        mode: Mode = "auto",
        tags: list[str] | None = None,
        log_model: bool = True,
    ) -> None:
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")  # type: ignore[assignment]
        if mode == "online" and not logged_in():
            raise ValueError(
                "mode = online needs credentials: run `wandb login`, set WANDB_API_KEY, or choose mode=offline"
            )
        if mode != "online":  # only the environment variables keep W&B from opening a telemetry connection
            os.environ["WANDB_MODE"] = mode
            os.environ["WANDB_ERROR_REPORTING"] = "false"
            os.environ.setdefault("WANDB_DATA_DIR", str(Path(save_dir, "wandb")))
        os.environ.setdefault("WANDB_SILENT", "true")
        Path(save_dir, "wandb").mkdir(parents=True, exist_ok=True)
        self.mode, self.send_model = mode, log_model
        super().__init__(name=name, save_dir=save_dir, id=run_id, project=project, resume="allow", tags=tags, mode=mode)
        self._wandb_init.pop("anonymous", None)  # W&B warns about an option that we never chose

    @rank_zero_only
    def log_best(self, checkpoint: Path, metadata: dict[str, Any]) -> None:
        """Attach a checkpoint to the run as the artifact `<run id>-model`, alias `best`."""
        import wandb

        if self.send_model and self.mode != "disabled":
            artifact = wandb.Artifact(f"{self.experiment.id}-model", type="model", metadata=metadata)
            artifact.add_file(str(checkpoint), name="model.ckpt")
            self.experiment.log_artifact(artifact, aliases=["best"])

    @rank_zero_only
    def close(self, exit_code: int) -> None:
        """Finish the run; a later run in the same process then gets its own."""
        if self._experiment is not None:
            self.experiment.finish(exit_code=exit_code)
            self._experiment = None
