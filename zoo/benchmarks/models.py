"""Speed of whole models: the zoo's forms, the same network with reference operators ("plain"), and timm's models.

Calls of all forms are interleaved, so that load affects all alike; outputs, and gradients for training, are compared
before timing.
"""

from __future__ import annotations

import copy
import shlex
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.benchmarks import measurement
from zoo.models.deploy import to_deploy
from zoo.ops import reference
from zoo.registry.factory import create_model
from zoo.results.records import Provenance, Records, markdown, put_section, stamp
from zoo.results.timing import Times, best_policy, interleaved_times, under_policies

__all__ = ["BenchmarkError", "inference", "training"]

#: Two models of the zoo, each followed by a timm model of its size.
MODELS = ("unireplknet_a", "convnextv2_atto", "unireplknet_t", "convnext_tiny")
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
KEYS = ("date", "model", "form", "layout", "compiled", "threads", "batch", "size", "device")
VALUES = ("ms", "q1", "q3", "cpu_ms", "n", "times", "times_cpu")
MEASURES = ("zoo/models/unireplknet.py", "zoo/models/deploy.py", "zoo/ops")


class BenchmarkError(RuntimeError):
    """Two forms differ, or a model cannot be measured."""


class Cell(NamedTuple):
    """A timed form of a model in a memory layout."""

    model: str
    form: str
    layout: str
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.model}, {self.form}, {self.layout}{', compiled' if self.compiled else ''}"


@measurement("models", "inference", "forward passes: plain, zoo and timm's peers")
def inference(
    folder: Path,
    models: Sequence[str] = MODELS,
    batch: int = 8,
    size: int = 224,
    threads: Sequence[int] = (),
    rounds: int = 9,
    compile: bool = False,
    precision: Sequence[str] = ("float32",),
    device: str = "cpu",
    wait: Sequence[str] = (),
) -> Iterator[str]:
    """Time forward passes of training and deploy forms, plain and zoo, and of timm models.

    Larger models measured earlier leave a larger memory pool to the process, which favours forms that allocate much:
    measure a model only with models of its size.

    Args:
        folder: Folder of `models_inference.csv`; the table goes into RESULTS.md beside it.
        models: Names in the zoo or in timm; the latter have only one form.
        batch: Batch size.
        size: Side of the images, pixels.
        threads: Numbers of threads to measure with; empty means the current one.
        rounds: Timed calls of each form.
        compile: Also measure deploy forms with `torch.compile` (minutes per model).
        precision: `float32` and `bfloat16` (autocast); speed-ups are relative to the plain form in float32.
        device: `cpu` or `cuda`.
        wait: Policies as in :func:`~zoo.results.timing.policy`, each in a new process; empty means the current one.

    Yields:
        Lines of a table: median wall time per image with quartiles, CPU time, and the speed-ups of both over the plain
        deploy form in its faster layout (uncompiled).

    Raises:
        BenchmarkError: Two forms of a model give different outputs.
    """
    since, given = stamp()["date"], {"models": list(models), "batch": batch, "size": size, "rounds": rounds}
    given |= {"threads": list(threads), "compile": compile, "precision": list(precision), "device": device}
    yield from under_policies(wait, __name__, "measure_inference", folder=str(folder), **given)
    yield from _write_section("inference", folder, since, _options(given | {"wait": wait}), "plain deploy")


@measurement("models", "training", "a training step: plain and zoo")
def training(
    folder: Path,
    models: Sequence[str] = ("unireplknet_a", "unireplknet_t"),
    batch: int = 8,
    size: int = 224,
    threads: Sequence[int] = (),
    rounds: int = 7,
    device: str = "cpu",
    wait: Sequence[str] = (),
) -> Iterator[str]:
    """Time a training step (forward, cross-entropy, backward) of the training form in float32, plain and zoo.

    Arguments, lines and errors are those of :func:`inference`; the file is `models_training.csv`. Gradients of the
    forms are compared first.
    """
    since, given = stamp()["date"], {"models": list(models), "batch": batch, "size": size, "rounds": rounds}
    given |= {"threads": list(threads), "device": device}
    yield from under_policies(wait, __name__, "measure_training", folder=str(folder), **given)
    yield from _write_section("training", folder, since, _options(given | {"wait": wait}), "plain")


def _options(given: dict[str, Any]) -> str:
    """The arguments as command-line options, without defaults."""
    words = []
    for name, value in given.items():
        if value is True:
            words.append(f"--{name}")
        elif value and value not in (["float32"], "cpu"):
            many = value if isinstance(value, list | tuple) else [value]
            words.append(f"--{name} {shlex.join(map(str, many))}")
    return " ".join(words)


def measure_inference(
    folder: str,
    models: Sequence[str],
    batch: int,
    size: int,
    threads: Sequence[int],
    rounds: int,
    compile: bool,
    precision: Sequence[str],
    device: str,
) -> Iterator[str]:
    """The part of :func:`inference` that runs in each process."""
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    cells: dict[Cell, Callable[[], Any]] = {}
    for name in models:
        yield f"building {name}"
        cells |= _inference_cells(name, images, compile, precision)
    yield from _measured("inference", Path(folder), cells, images, threads, rounds, plain="plain deploy")


def measure_training(
    folder: str, models: Sequence[str], batch: int, size: int, threads: Sequence[int], rounds: int, device: str
) -> Iterator[str]:
    """The part of :func:`training` that runs in each process."""
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    cells: dict[Cell, Callable[[], Any]] = {}
    for name in models:
        yield f"building {name}"
        cells |= _training_cells(name, images)
    yield from _measured("training", Path(folder), cells, images, threads, rounds, plain="plain")


# ---- timed functions ---------------------------------------------------------------------------------------


def _inference_cells(
    name: str, images: Tensor, compile: bool, precision: Sequence[str] = ("float32",)
) -> dict[Cell, Callable[[], Tensor]]:
    model = _built(name).to(images.device).eval()
    forms: list[tuple[Cell, nn.Module]] = []
    if _is_ours(model):
        for kind in ("plain", "zoo"):
            forms += [(Cell(name, f"{kind} training form", "NCHW"), copy.deepcopy(model))]
            forms += [(Cell(name, f"{kind} deploy", layout), to_deploy(model)) for layout in LAYOUTS]
        if compile:
            deploys = ("plain deploy", "zoo deploy")
            forms += [(Cell(name, form, "channels_last", True), to_deploy(model)) for form in deploys]
    else:
        forms += [(Cell(name, "as it is", layout), copy.deepcopy(model)) for layout in LAYOUTS]
        if compile:
            forms += [(Cell(name, "as it is", "channels_last", True), copy.deepcopy(model))]
    cells = {cell: _forward(cell, module.to(images.device), images) for cell, module in forms}
    exact = {cell: run() for cell, run in cells.items()}
    _compare(exact, 1e-4)
    if "bfloat16" not in precision:
        return cells
    half = {c._replace(form=f"{c.form}, bf16"): _forward(c, m, images, torch.bfloat16) for c, m in forms}
    first = next(iter(exact))
    _compare({first: exact[first]} | {cell: run().float() for cell, run in half.items()}, 0.1)
    return half | (cells if "float32" in precision else {})


def _is_ours(model: nn.Module) -> bool:
    """Whether a model is of the zoo, and so has a plain form."""
    return type(model).__module__.split(".")[0] == "zoo"


def _operators(cell: Cell) -> AbstractContextManager[None]:
    """Context with reference operators for a plain form."""
    return reference() if cell.form.startswith("plain") else nullcontext()


def _built(name: str) -> nn.Module:
    """Build a network with fixed weights; the global random generator is not changed."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return lively(create_model(name, in_chans=3))
    except (ValueError, TypeError) as error:  # a mistyped name
        raise BenchmarkError(str(error)) from None


def _forward(cell: Cell, model: nn.Module, images: Tensor, dtype: torch.dtype | None = None) -> Callable[[], Tensor]:
    order = LAYOUTS[cell.layout]
    model, images = model.to(memory_format=order), images.to(memory_format=order)
    run: Any = torch.compile(model) if cell.compiled else model

    def call() -> Tensor:
        half = torch.autocast(images.device.type, dtype, enabled=dtype is not None)
        with _operators(cell), torch.inference_mode(), half:
            return _finished(run(images))

    return call


def _training_cells(name: str, images: Tensor) -> dict[Cell, Callable[[], Tensor]]:
    model = _built(name).train().to(images.device)
    if not _is_ours(model):
        raise BenchmarkError(f"{name} has no plain form to compare a training step with; choose a model of the zoo")
    _check_statistics(model, images)
    forms = {Cell(name, kind, layout): copy.deepcopy(model) for kind in ("plain", "zoo") for layout in LAYOUTS}
    cells = {cell: _step(cell, module, images) for cell, module in forms.items()}
    _compare({cell: step().clone() for cell, step in cells.items()}, 1e-3)
    return cells


FEWEST = 8  # values per channel: with two, a batch norm gives -1 and 1, and its gradient is rounding error


def _check_statistics(model: nn.Module, images: Tensor) -> None:
    """Refuse batches too small for stable batch norm gradients."""
    values: list[int] = []
    trial = copy.deepcopy(model)
    for norm in (m for m in trial.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.register_forward_pre_hook(lambda _, x: values.append(x[0][:, 0].numel()))
    with torch.no_grad():
        trial(images)
    if values and min(values) < FEWEST:
        raise BenchmarkError(
            f"a batch norm would see {min(values)} values of each channel, and its gradient would be rounding: "
            f"at least {FEWEST} are needed, choose a larger --batch or --size"
        )


def _step(cell: Cell, model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    order = LAYOUTS[cell.layout]
    model, images = model.to(memory_format=order), images.to(memory_format=order)
    targets = torch.arange(len(images), device=images.device)
    first = next(model.parameters())

    def call() -> Tensor:
        model.zero_grad(set_to_none=True)
        with _operators(cell):
            F.cross_entropy(model(images), targets).backward()
        assert first.grad is not None
        return _finished(first.grad)

    return call


def _finished(result: Tensor) -> Tensor:
    if result.is_cuda:
        torch.cuda.synchronize(result.device)
    return result


@torch.no_grad()
def lively(model: nn.Module) -> nn.Module:
    """Perturb all vectors and statistics in place: an initial layer scale of 1e-6 would hide errors inside a block."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator).to(value)
        if name.endswith("running_var"):
            value.copy_(1 + 0.1 * noise.abs())
        elif value.squeeze().ndim <= 1:
            value.add_(0.1 * noise)
    return model


def _compare(results: dict[Cell, Tensor], tolerance: float) -> None:
    """Raise BenchmarkError unless all results agree with the first one, relative to its largest entry."""
    (first, expected), *others = results.items()
    for cell, result in others:
        apart = float((result - expected).abs().max() / expected.abs().max())
        if not apart <= tolerance:
            raise BenchmarkError(
                f"{cell} differs from {first} by {apart:.1e} of the largest value, allowed {tolerance}"
            )


# ---- measuring and reporting -------------------------------------------------------------------------------


def _measured(
    name: str,
    folder: Path,
    cells: dict[Cell, Callable[[], Any]],
    images: Tensor,
    threads: Sequence[int],
    rounds: int,
    plain: str,
) -> Iterator[str]:
    records = Records(folder / f"models_{name}.csv", KEYS, VALUES)
    before, start = torch.get_num_threads(), stamp()
    if images.is_cuda:
        start["machine"] = f"{torch.cuda.get_device_name(images.device)}, {start['machine']}"
    shared = {"batch": len(images), "size": images.shape[-1], "device": images.device.type, "n": rounds}
    for count in threads or (before,):
        torch.set_num_threads(count)
        try:
            here = start | {"threads": str(count), "load": stamp()["load"]}  # load before the measurement
            found = interleaved_times(cells, rounds)
        finally:
            torch.set_num_threads(before)
        for row in _rows(found, len(images), plain):
            records.add(shared | row | here)
            yield "  ".join(f"{cell:>{width}}" for cell, width in zip(_shown(records.rows[-1]), WIDTHS, strict=True))


def _write_section(name: str, folder: Path, since: str, options: str, plain: str) -> Iterator[str]:
    """Write the section of RESULTS.md from the rows measured since `since`."""
    records = Records(folder / f"models_{name}.csv", KEYS, VALUES)
    rows = [row for row in records.rows if row["date"] >= since]
    models = " ".join(dict.fromkeys(row["model"] for row in rows))
    title = {"inference": "forward pass", "training": "training step (forward, loss, backward)"}[name]
    source = Provenance(rows, MEASURES)
    first = rows[0]
    text = (
        f"## {models.replace(' ', ', ')}: {title}\n\n`python -m zoo benchmark models {name} {options}`\n\n"
        f"Batch {first['batch']}, {first['size']} x {first['size']}, {first['device']}; {first['n']} interleaved "
        "rounds. Milliseconds an image: median on the clock [quartiles], and CPU time summed over threads. "
        "Times: against the plain form in its better layout in the same process, median over rounds; threads wait as "
        f"the column says. {source}\n\n" + markdown(HEADER, map(_shown, rows)) + f"\n\n{_headline(rows, plain)}"
    )
    put_section(folder.parent / "RESULTS.md", f"models {name} {models}", text.rstrip())
    yield f"{source} Rows in {records.path}"


def _headline(rows: Sequence[dict[str, str]], plain: str) -> str:
    """Speed-ups of the fastest rows of each form, over layouts and wait policies."""
    told = []
    for model in dict.fromkeys(row["model"] for row in rows if row["times"]):
        own = [row for row in rows if row["model"] == model and row["compiled"] == "no"]
        ours = "zoo" if plain == "plain" else "zoo deploy"
        slow, fast = (float(best_policy(own, form)["ms"]) for form in (plain, ours))
        told.append(f"{model}: {slow:.1f} to {fast:.1f} ms, **{slow / fast:.2f} times**")
    return f"Best against best, {plain} to ours, over layouts and policies: {'; '.join(told)}." if told else ""


HEADER = ("model", "form", "layout", "compiled", "threads", "wait", "ms an image", "CPU-ms", "times", "times, CPU")
WIDTHS = (16, 26, 13, 8, 7, 10, 22, 7, 6, 6)


def _rows(found: dict[Cell, Times], batch: int, plain: str) -> Iterator[dict[str, Any]]:
    for cell, times in found.items():
        quartiles = statistics.quantiles(times.wall, n=4) if len(times.wall) > 1 else times.wall * 3
        row = {**cell._asdict(), "compiled": "yes" if cell.compiled else "no"}
        row |= {"q1": 1e3 * quartiles[0] / batch, "q3": 1e3 * quartiles[2] / batch}
        row |= {"ms": 1e3 * statistics.median(times.wall) / batch, "cpu_ms": 1e3 * statistics.median(times.cpu) / batch}
        row |= {"times": "", "times_cpu": ""}
        rivals = [t for c, t in found.items() if c.model == cell.model and c.form == plain and not c.compiled]
        if rivals:
            by_clock = min(rivals, key=lambda t: statistics.median(t.wall))
            by_cpu = min(rivals, key=lambda t: statistics.median(t.cpu))
            row["times"] = _gain(by_clock.wall, times.wall)
            row["times_cpu"] = _gain(by_cpu.cpu, times.cpu)
        yield row


def _gain(plain: Sequence[float], ours: Sequence[float]) -> float:
    return statistics.median(p / o for p, o in zip(plain, ours, strict=True))


def _shown(row: dict[str, str]) -> list[str]:
    spread = f"{float(row['ms']):.1f} [{float(row['q1']):.1f}, {float(row['q3']):.1f}]"
    gains = [f"{float(row[k]):.2f}" if row[k] else "" for k in ("times", "times_cpu")]
    return [
        *(row[k] for k in ("model", "form", "layout", "compiled", "threads", "wait_policy")),
        spread,
        f"{float(row['cpu_ms']):.1f}",
        *gains,
    ]
