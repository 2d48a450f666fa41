"""Run tracking: Weights & Biases, offline when nobody is logged in, and never a network attempt then."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

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
