"""What fast forms of operators, and their loops in C, are worth: every family with them and without.

The same computation is called in turn by the references of all operators; without the loops, as with ZOO_NATIVE=0, so
that fast forms in torch are left; with them; and with the references of a few operators only.
"""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from zoo.benchmarks import gkcl, grbf_speed, measurement, models, terminator_speed
from zoo.kernels.random_features import ReLUFeatures
from zoo.models.deploy import to_deploy
from zoo.models.snnk import SNNKLinear
from zoo.ops import reference, without_loops
from zoo.registry.factory import create_model
from zoo.results.records import Provenance, Records, markdown, put_section, stamp
from zoo.results.timing import best_policy, interleaved_times, under_policies

__all__ = ["gain"]

Call = Callable[[], Any]
REFERENCES, WITHOUT, WITH = "references", "without loops", "with loops"
FORMS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    REFERENCES: reference,
    WITHOUT: without_loops,
    WITH: nullcontext,
}


class Work(NamedTuple):
    """What is timed.

    Attributes:
        make: makes the call.
        operators: names, joined by +, of those with loops that it uses; each group is left to its references in turn.
        plain: makes the call by references, where that is another form of the model.
        many: steps in one call.
    """

    make: Callable[[], Call]
    operators: tuple[str, ...] = ()
    plain: Callable[[], Call] | None = None
    many: int = 1


# ---- the families ------------------------------------------------------------------------------------------


def _unireplknet(name: str, batch: int, learns: bool) -> Call:
    images = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    model = models._built(name).train(learns)
    if learns:
        return models._step(models.Cell(name, "zoo", "channels_last"), model, images)
    return models._forward(models.Cell(name, "zoo deploy", "channels_last"), to_deploy(model), images)


def _snnk() -> Call:
    torch.manual_seed(0)
    x, network = torch.randn(512, 768), nn.Sequential(SNNKLinear(ReLUFeatures(768, 64), 3072), nn.Linear(3072, 10))
    return lambda: F.cross_entropy(network(x), torch.arange(512) % 10).backward()


def _learner(name: str, **options: Any) -> Call:
    torch.manual_seed(0)
    learner: Any = create_model(name, tasks=1, **options)
    learner.begin_task(0, torch.rand(200, 1, 28, 28), torch.arange(200) % 10)
    return gkcl.zoo_steps(learner.train())


_DEPLOYED = ("channel_norm", "depthwise_conv2d", "feed_forward")
_TRAINED = ("depthwise_conv2d + depthwise_weight",)
_STANDARDISE = "standard_gelu + standardised_gate + instance_standardise"
_BLOCK = ("slow_fast_block", "local_kernel", _STANDARDISE)
_terminator, _terminator_step = terminator_speed.inference, terminator_speed.training_step

WORK: Mapping[tuple[str, str], Work] = {
    ("unireplknet_a", "deploy form, 8 images"): Work(partial(_unireplknet, "unireplknet_a", 8, False), _DEPLOYED),
    ("unireplknet_t", "deploy form, 4 images"): Work(partial(_unireplknet, "unireplknet_t", 4, False), _DEPLOYED),
    ("unireplknet_a", "training step, 4 images"): Work(partial(_unireplknet, "unireplknet_a", 4, True), _TRAINED),
    ("unireplknet_t", "training step, 2 images"): Work(partial(_unireplknet, "unireplknet_t", 2, True), _TRAINED),
    **{
        ("terminator_cifar10", f"deploy form, {images}"): Work(
            partial(_terminator, "zoo deploy", batch), _BLOCK, partial(_terminator, "plain", batch)
        )
        for batch, images in ((16, "16 images"), (1, "1 image"))
    },
    ("terminator_cifar10", "training step, 16 images"): Work(
        partial(_terminator_step, "zoo", 16), (*_TRAINED, _STANDARDISE)
    ),
    ("GRBF", "solver's step"): Work(partial(grbf_speed.solver, 1024, 64, 128, 5), many=5),
    ("GRBF", "module's step"): Work(partial(grbf_speed.module, 1024, 64, 128, 5), many=5),
    ("SNNK", "training step, m = 64"): Work(_snnk),
    ("KCL", "training step, linear"): Work(partial(_learner, "kcl_mlp", kernel="linear"), many=gkcl.STEPS),
    ("GKCL", "training step"): Work(partial(_learner, "gkcl_mlp"), many=gkcl.STEPS),
}

# ---- measuring and telling ---------------------------------------------------------------------------------

KEYS, VALUES = ("model", "what", "form", "wait_policy"), ("ms", "cpu_ms", "n")
MEASURES = ("zoo/ops", "zoo/models", "zoo/kernels")


@measurement("native", "gain", "every family by references, without loops in C, and with them")
def gain(folder: Path, rounds: int = 5, wait: Sequence[str] = ("active",)) -> Iterator[str]:
    """Time inference or a training step of every family: by references, without compiled loops, and with them.

    Args:
        folder: Of `native_gain.csv`; the table goes into RESULTS.md beside the folder.
        rounds: Timed calls of each form.
        wait: Policies as in :func:`~zoo.results.timing.policy`, each in a process of its own.

    Yields:
        A line for every form, and the tables.
    """
    path = folder / "native_gain.csv"
    if not Records.frozen:
        path.unlink(missing_ok=True)  # times of one run belong together
        yield from under_policies(wait, __name__, "measure", folder=str(folder), rounds=rounds)
    rows, whole, parts = Records(path, KEYS, VALUES).rows, [], []
    for model, what in dict.fromkeys((row["model"], row["what"]) for row in rows):
        own = [row for row in rows if (row["model"], row["what"]) == (model, what)]
        best = {form: best_policy(own, form) for form in dict.fromkeys(row["form"] for row in own)}
        slow, middle, fast = (best.pop(form) for form in FORMS)
        cells = [f"{float(row['ms']):.1f} ({float(row['cpu_ms']):.1f})" for row in (slow, middle, fast)]
        whole.append([model, what, *cells, _times(slow, fast), _times(slow, middle), _times(middle, fast)])
        parts += [[model, what, form, _times(row, fast)] for form, row in best.items()]
    head = ["model", "what", *FORMS, "references / with", "references / without", "without / with"]
    tables = markdown(head, whole), markdown(["model", "what", "by reference", "times as long"], parts)
    options = "".join([f" --rounds {rounds}", f" --wait {shlex.join(wait)}" if tuple(wait) != ("active",) else ""])
    text = (
        f"## Loops in C: what they are worth\n\n`python -m zoo benchmark native gain{options}`\n\nMilliseconds a step "
        "on the clock (and of CPU time, summed over threads): medians of interleaved calls, where each form is "
        "quickest over how threads wait; ratios likewise. References: plain torch for every operator (of Terminator "
        "the training form, which nothing prepares). Without loops: fast forms in torch, as with ZOO_NATIVE=0. "
        f"UniRepLKNet 224 x 224, channels_last. {Provenance(rows, MEASURES)}\n\n{tables[0]}\n\nThe same with "
        f"the loops, but a few operators by their references:\n\n{tables[1]}"
    )
    put_section(folder.parent / "RESULTS.md", "native gain", text)
    yield from tables


def _times(slow: Mapping[str, str], fast: Mapping[str, str]) -> str:
    clock, cpu = (float(slow[k]) / float(fast[k]) for k in ("ms", "cpu_ms"))
    return f"{clock:.2f} ({cpu:.2f})"


def measure(folder: str, rounds: int) -> Iterator[str]:
    """What :func:`gain` does in each process."""
    records = Records(Path(folder, "native_gain.csv"), KEYS, VALUES)
    for (model, what), work in WORK.items():
        call, here = work.make(), stamp()
        calls = {form: partial(_answered, form, call) for form in (*FORMS, *work.operators)}
        if work.plain:
            calls[REFERENCES] = partial(_answered, REFERENCES, work.plain())
        for form, times in interleaved_times(calls, rounds, warmup=1).items():
            ms, cpu_ms = (1e3 * statistics.median(values) / work.many for values in (times.wall, times.cpu))
            row = {"model": model, "what": what, "form": form, "ms": ms, "cpu_ms": cpu_ms, "n": rounds}
            records.add(row | here)
            yield f"{model}, {what}, {form}: {ms:.1f} ms"


def _answered(form: str, call: Call) -> None:
    with FORMS[form]() if form in FORMS else reference(*form.split(" + ")):
        call()
