"""Shipping weights: the weight file and its record, generated from run folders.

>>> ship([Path("outputs/digits/a"), Path("outputs/digits/b")])      # the seeds of one experiment
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.data.licenses import origin
from zoo.registry import bundled_weights
from zoo.registry.factory import create_model
from zoo.results.runs import read_parts, read_run
from zoo.support.files import WEIGHTS_NAME, locate, read_config, sha256_of, write_all, writer_of
from zoo.support.places import anchored, data_section, is_place, places_in, resolved, vouched
from zoo.tools.errors import ToolError

__all__ = ["METRICS", "describe", "places_of", "saved", "ship"]

#: Test metric of a weight, and validation metric that selects the seed; the first match counts.
METRICS = (
    ("test/acc_agnostic", None),  # continual learning, task id unknown
    ("test/acc", "val/acc"),
    ("test/r2", "val/r2"),
    ("test/score", "val/score"),
    ("test/accuracy", "val/accuracy"),
    ("test/mse", "val/mse"),
)
_SMALLER_IS_BETTER = re.compile("loss|mse|mae|rmse|error")
CODE_LICENSE = "Apache-2.0"


def describe(runs: Sequence[Path], tag: str | None = None, license: str = "apache-2.0") -> dict[str, Any]:
    """Record of the best run, selected by the validation metric.

    Its figure is a test metric, or the validation metric of runs that were not tested.

    Args:
        runs: Folders of finished runs of one experiment with different seeds.
        tag: Tag of the weight; the experiment's name without the family by default.
        license: Licence of the weights.

    Raises:
        ToolError: The runs are not seeds of one experiment, or have no known metric.
        RunsError: A folder is not that of a finished run.
    """
    found = {folder: read_run(folder) for folder in runs}
    kinds = {run.kind for run in found.values()}
    if len(kinds) != 1:
        raise ToolError("the runs differ in more than their seed: ship one experiment at a time")
    if len({run.seed for run in found.values()}) != len(found):
        raise ToolError("two of the runs have the same seed")
    first = next(iter(found.values()))
    optimized = read_parts(next(iter(found)))[1].get("optimized_metric")
    judged, chosen_by = _metric(next(iter(found)), first.metrics, str(optimized))
    sign = -1 if _SMALLER_IS_BETTER.search(judged) else 1
    chosen_by = chosen_by if chosen_by in first.metrics else None
    best = next(iter(found))
    if chosen_by:
        best = max(found, key=lambda folder: sign * found[folder].metrics[str(chosen_by)])
    values = [run.metrics[judged] for run in found.values()]
    run = found[best]
    summary, config = read_parts(best)
    model = saved(best / "model")
    tag = tag or _tag(model["architecture"], run.name)
    data = data_section(config)
    facts = summary.get("data", {})
    where = origin(data)
    parts = ("train", "val", "test") if judged.startswith("test/") else ("train", "val")
    record = {
        "name": f"{model['architecture']}.{tag}",
        "tag": tag,
        **model,
        "pretrained_cfg": {**model["pretrained_cfg"], "license": license},
        "feature_names": facts.get("feature_names", []),
        "metric": {
            "name": judged,
            "value": run.metrics[judged],
            "seed": run.seed,
            "mean": statistics.fmean(values),
            "sd": statistics.stdev(values) if len(values) > 1 else None,
            "n": len(values),
            "seeds": [r.seed for r in found.values()],
            "values": values,
            "chosen_by": chosen_by or "nothing: the first one",
            **({"caveat": caveat} if (caveat := run.caveat(judged)) else {}),
        },
        "metrics": {k: v for k, v in run.metrics.items() if k.startswith(("test/", "val/"))},
        "data": {
            "title": where.title,
            "license": where.license,
            "source": where.source,
            "rows": {part: run.rows[part] for part in parts if part in run.rows},
            **({"whole": whole} if (whole := {k: v for k, v in run.whole.items() if k in parts}) else {}),
            "config": _without_places(data) | {"seed": config.get("seed")},
            **({"own": True} if data.get("path") else {}),
        },
        "task": resolved(config["task"], config),
        "license": license,
        "code_license": CODE_LICENSE,
        "experiment": run.name,
        "command": run.command([run.seed], places=False),
        "seconds": summary["seconds"],
        "versions": summary.get("versions", {}),
        "hardware": summary.get("hardware", {}),
    }
    bundled_weights.check_record(best, record)
    return record


def ship(
    runs: Sequence[Path], tag: str | None = None, folder: Path | None = None, license: str = "apache-2.0"
) -> tuple[Path, dict[str, Any]]:
    """Write the weights and the record of the best run into `folder`, by default that of the shipped weights.

    Returns:
        The weight file and the record.

    Raises:
        ToolError: As :func:`describe`; or the runs were not tested, the weights are too large, or the name is invalid.
    """
    record = describe(runs, tag, license)
    if not record["metric"]["name"].startswith("test/"):
        raise ToolError(f"{runs[0]} was not tested: there is no figure to ship")
    if caveat := record["metric"].get("caveat"):
        raise ToolError(f"{runs[0]}: {record['metric']['name']} is of a model {caveat}: that is no figure to ship")
    folder = folder or bundled_weights.folder()
    if not bundled_weights.NAME.fullmatch(record["name"]):
        raise ToolError(f"{record['name']!r} cannot be the name of a weight: use a-z, 0-9 and _ in the tag")
    if record["bytes"] > bundled_weights.MAX_BYTES:
        raise ToolError(
            f"the weights have {record['bytes'] / 1e6:.1f} MB, more than the {bundled_weights.MAX_BYTES / 1e6:.0f} "
            "that may ship: train a smaller variant"
        )
    others = sum(p.stat().st_size for p in folder.glob("*.safetensors") if p.stem != record["name"])
    if others + record["bytes"] > bundled_weights.MAX_FOLDER:
        raise ToolError(
            f"{folder} would hold more than {bundled_weights.MAX_FOLDER / 1e6:.0f} MB: remove a weight first"
        )
    source = next(run for run in runs if sha256_of(run / "model" / WEIGHTS_NAME) == record["sha256"])
    target = bundled_weights.weights_path(record["name"], folder)
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"

    def copy(file: Any) -> None:
        with (source / "model" / WEIGHTS_NAME).open("rb") as weights:
            shutil.copyfileobj(weights, file)

    write_all({target: copy, target.with_suffix(".json"): writer_of(text.encode())})
    if folder == bundled_weights.folder():
        bundled_weights.register([record])
    return target, record


def saved(folder: Path) -> dict[str, Any]:
    """The part of a record that the folder of a saved model gives: what it is, without how it was trained.

    Raises:
        CheckpointError: The folder holds no model, or a damaged one.
    """
    parameters = sum(p.numel() for p in create_model(f"local-dir:{folder}", pretrained=True).parameters())
    model = {"model_args": {}, "pretrained_cfg": {}, **read_config(folder)}  # checked by building it
    weights = locate(f"local-dir:{folder}")
    how = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    return {
        **{key: model[key] for key in ("architecture", "model_args", "pretrained_cfg")},
        "class_names": model.get("label_names", []),
        "feature_names": model.get("input", {}).get("columns") or [],
        "preprocessing": {k: model["pretrained_cfg"][k] for k in how if k in model["pretrained_cfg"]},
        **({"input": model["input"]} if "input" in model else {}),
        "parameters": parameters,
        "sha256": sha256_of(weights),
        "bytes": weights.stat().st_size,
    }


def _metric(run: Path, metrics: dict[str, float], optimized: str) -> tuple[str, str | None]:
    """The metric that a run is judged by, and the one that selects its seed; validation metrics select none."""
    validation = [name for name in (optimized, *(pair[1] for pair in METRICS)) if name and name.startswith("val/")]
    for pair in (*METRICS, *((name, None) for name in validation)):
        if pair[0] in metrics:
            return pair
    names = dict.fromkeys([*(name for name, _ in METRICS), *validation])
    raise ToolError(f"{run} has no figure: its summary.json has none of {', '.join(names)}")


def _tag(architecture: str, experiment: str) -> str:
    family = architecture.split("_")[0]
    return experiment.removeprefix(f"{family}_").replace("-", "_") or experiment


def _without_places(section: dict[str, Any]) -> dict[str, Any]:
    """A `data` section without what depends on the machine."""
    return {key: None if is_place(key, value) else value for key, value in section.items()}


def places_of(run: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Where a run had its data, on the machine that it ran on.

    Returns:
        Arguments of its data module, as recorded; and those of them, as absolute paths outside of the run folder, that
        this user's signature in the folder vouches for.

    Raises:
        RunsError: The folder is not that of a finished run.
    """
    section = anchored(data_section(read_parts(run)[1]), run)
    return {k: v for k, v in section.items() if is_place(k, v)}, vouched(places_in(section, run), run)
