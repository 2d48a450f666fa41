"""KCL and GKCL: speed against the plain formulation, and every learner on the same streams of tasks."""

from __future__ import annotations

import itertools
import logging
import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.benchmarks import measurement
from zoo.data.task_streams import ContinualData
from zoo.kernels import Gaussian, Laplacian, Polynomial
from zoo.models.continual import KCL
from zoo.registry.factory import create_model
from zoo.results.records import Provenance, Records, markdown, mean_sd, put_section, stamp
from zoo.results.timing import POLICIES, Times, interleaved_times, under_policies
from zoo.support.suggest import suggestion
from zoo.tasks.continual import ContinualTask, Recipe

__all__ = ["ablations", "full", "speed", "split", "streams", "tuning"]


@dataclass(frozen=True)
class Method:
    """A learner, its settings, and the settings of its training."""

    model: str
    options: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


_DROP = {"drop_rate": 0.25}
_FAST = {"lr": 0.3}  # the classifier has few steps to learn in
_LATE = {"epochs": 60, "lr": 3e-3}  # the best of TUNED in `results/gkcl_tuning.csv`
#: The joint learner's passes and rate were chosen by :func:`tuning`; of the other settings no search is on record.
METHODS = {
    "naive": Method("naive_mlp", _DROP),
    "EWC": Method("ewc_mlp", {**_DROP, "fisher_samples": 256}),
    "LwF": Method("lwf_mlp", _DROP),
    "replay": Method("replay_mlp", _DROP),
    "KCL linear": Method("kcl_mlp", {**_DROP, "kernel": "linear"}, _FAST),
    "GKCL Gaussian": Method("gkcl_gaussian"),
    "AnalyticRidge": Method("analytic_ridge"),
    "joint": Method("joint_mlp", {"drop_rate": 0.1}, _LATE),
    "joint, one pass": Method("joint_mlp", {"drop_rate": 0.1}, {**_LATE, "epochs": 1}),
    # the recipe's rate, made for ten tasks of 3,000 images, would be spent before the twentieth
    "GKCL linear": Method("gkcl_mlp", {}, {"lr_decay": 0.9, "epochs": 12}),
    "GKCL linear, one pass": Method("gkcl_mlp", {}, {"lr_decay": 0.9, "epochs": 1}),
    "KCL poly": Method("kcl_mlp", {**_DROP, "kernel": "poly"}, _FAST),
    "KCL gaussian": Method("kcl_mlp", {**_DROP, "kernel": "gaussian"}, _FAST),
    "KCL laplacian": Method("kcl_mlp", {**_DROP, "kernel": "laplacian"}, _FAST),
    "KCL rff": Method("kcl_mlp", {**_DROP, "kernel": "rff", "num_bases": 512}, _FAST),
}
#: Richer settings that 60,000 images a task can fill.
WIDE = {
    "GKCL Gaussian, 4,000 features": Method(
        "gkcl_gaussian", {"num_bases": 4000, "rank": 100, "temperature": 80.0, "sharpness": 4.0}
    ),
    "AnalyticRidge, 4,000 features": Method("analytic_ridge", {"num_bases": 4000}),
}
KEYS = ("data", "scenario", "tasks", "train_samples", "method", "seed")
VALUES = (
    "passes", "acc", "acc_agnostic", "forgetting", "learning_accuracy", "backward_transfer", "forward_transfer",
    "seconds", "kept_samples", "kept_bytes",
)  # fmt: skip


def run(method: Method, seed: int, **data: Any) -> ContinualTask:
    """Take a learner through a stream; returns the task with its accuracy matrices."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    L.seed_everything(seed, verbose=False)
    stream = ContinualData(seed=seed, **data)
    stream.prepare_data()
    stream.setup()
    model = create_model(method.model, tasks=len(stream.stream), num_classes=stream.num_classes, **method.options)
    task = ContinualTask(model, **method.training)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            max_epochs=len(stream.stream),
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(task, datamodule=stream)
    return task


def measure(records: Records, methods: Mapping[str, Method], seeds: Iterable[int], **data: Any) -> Iterator[str]:
    """Run what has not been run, seed after seed, and say what came out."""
    stream = {k: data[k] for k in ("scenario", "tasks", "train_samples")} | {"data": data["name"]}
    for seed in seeds:
        for name, method in methods.items():
            key = {**stream, "method": name, "seed": seed}
            if key in records:
                continue
            task = run(method, seed, **data)
            found = task.summary(data["tasks"] - 1)
            found["seconds"] = float(task.seconds[: data["tasks"]].mean())
            found["passes"] = task.recipe.epochs
            records.add({**key, **{v: found[v] for v in VALUES}})
            shown = f"accuracy {found['acc']:.3f}, without task id {found['acc_agnostic']:.3f}"
            yield f"{data['scenario']}, {name}, seed {seed}: {shown}, forgetting {found['forgetting']:.3f}"


#: What a learner's figures depend on.
MEASURES = ("zoo/models/continual", "zoo/tasks/continual.py", "zoo/data/task_streams.py")


def table(records: Records, methods: Iterable[str], source: Provenance, **stream: Any) -> str:
    """One row for each method, in mean (standard deviation) over seeds."""
    rows = []
    for name in methods:
        chosen = {"method": name, **stream}
        if not records.select(**chosen):
            continue
        row = [name + source.mark(records.select(**chosen)), records.select(**chosen)[0]["passes"]]
        row += [mean_sd(records.numbers(column, **chosen)) for column in ("acc", "forgetting", "acc_agnostic")]
        row += [mean_sd(records.numbers("forward_transfer", **chosen))]
        row += [f"{records.numbers('kept_samples', **chosen)[0]:.0f}"]
        row += [f"{records.numbers('kept_bytes', **chosen)[0] / 1e6:.1f}", str(len(records.select(**chosen)))]
        rows.append(row)
    header = ["learner", "passes", "accuracy", "forgetting", "task id unknown", "forward transfer"]
    return markdown([*header, "images kept", "MB kept", "seeds"], rows)


def _chosen(models: list[str] | None, known: Mapping[str, Method]) -> dict[str, Method]:
    for name in models or ():
        if name not in known:
            raise BenchmarkError(f"no learner {name!r}{suggestion(name, known)}")
    return {name: method for name, method in known.items() if not models or name in models}


class BenchmarkError(ValueError):
    """A measurement that was asked for wrongly."""


_READING = (
    "Accuracy: mean over the tasks after the last one, the task id known. Forgetting: mean over tasks of the best "
    "accuracy so far less the last. In brackets: standard deviation over seeds, which also draw the stream. KCL is "
    "exact up to its options; GKCL linear is a reconstruction (its code was never published), GKCL Gaussian is ours. "
    "Replay keeps as many images as KCL. The joint learner sees all data at once, when the last task has come; it is "
    "no upper bound, since a closed form can beat it on few images. Passes: of each sample through the trained "
    "network; closed forms read a sample once."
)


@measurement("gkcl", "streams", "every learner on 20 tasks of MNIST-5k")
def streams(folder: Path, models: list[str] | None = None) -> Iterator[str]:
    """Permuted and rotated digits: 20 tasks, 1,000 images each, five seeds; passes are a column of the table.

    Args:
        folder: Of the CSV file.
        models: Names of learners; all if None.
    """
    records = Records(folder / "gkcl_streams.csv", KEYS, VALUES)
    data: dict[str, Any] = {"name": "mnist5k", "tasks": 20, "train_samples": 1000}
    for seed in range(5):
        for scenario in ("permuted", "rotated"):
            yield from measure(records, _chosen(models, METHODS), [seed], scenario=scenario, **data)
    _write_streams(records, folder)


def _write_streams(records: Records, folder: Path) -> None:
    stream = {"data": "mnist5k", "tasks": 20, "train_samples": 1000}
    parts, source = [], Provenance(records.rows, MEASURES)
    for scenario in ("permuted", "rotated"):
        parts.append(f"### {scenario.title()} digits\n\n{table(records, METHODS, source, scenario=scenario, **stream)}")
    text = (
        "## KCL and GKCL: 20 tasks of MNIST-5k\n\n`python -m zoo benchmark gkcl streams`\n\n"
        f"1,000 training and 1,000 test images a task. {_READING} {source}\n\n" + "\n\n".join(parts)
    )
    put_section(folder.parent / "RESULTS.md", "gkcl streams", text)


@measurement("gkcl", "split", "every learner on split digits")
def split(folder: Path, models: list[str] | None = None) -> Iterator[str]:
    """Split digits: 5 tasks of two classes of MNIST-5k, five seeds.

    Args:
        folder: Of the CSV file.
        models: Names of learners; all if None.
    """
    records = Records(folder / "gkcl_split.csv", KEYS, VALUES)
    known = {n: m for n, m in METHODS.items() if not n.startswith("KCL")}
    pairs = {**_DROP, "kernel": "linear", "task_classes": 2}
    known |= {"KCL linear": Method("kcl_mlp", pairs, _FAST), "GKCL linear": Method("gkcl_mlp")}
    known["GKCL linear, one pass"] = Method("gkcl_mlp", {}, {"epochs": 1})
    known["KCL linear, 6 passes"] = Method("kcl_mlp", pairs, {**_FAST, "epochs": 6})
    stream: dict[str, Any] = {"tasks": 5, "train_samples": None, "scenario": "split"}
    for seed in range(5):
        yield from measure(records, _chosen(models, known), [seed], name="mnist5k", **stream)
    source = Provenance(records.rows, MEASURES)
    found = table(records, known, source, data="mnist5k", **stream)
    text = f"## KCL and GKCL: split digits\n\n`python -m zoo benchmark gkcl split`\n\n5 tasks of 2 classes. {_READING}"
    put_section(folder.parent / "RESULTS.md", "gkcl split", f"{text} {source}\n\n{found}")


@measurement("gkcl", "full", "the streams on whole MNIST")
def full(folder: Path, models: list[str] | None = None) -> Iterator[str]:
    """The protocol of the papers on whole MNIST: 20 tasks, 60,000 images each; as many seeds as time allows.

    Args:
        folder: Of the CSV file.
        models: Names of learners; all if None.
    """
    records = Records(folder / "gkcl_full.csv", KEYS, VALUES)
    stream: dict[str, Any] = {"tasks": 20, "train_samples": None}
    once = {"lr_decay": 0.9, "epochs": 1}
    known = {n: m for n, m in METHODS.items() if n != "GKCL linear, one pass"} | WIDE  # here all but joint take one
    known["GKCL linear"] = replace(METHODS["GKCL linear"], training=once)
    known["joint"] = replace(METHODS["joint"], training={})
    known["joint, one pass"] = replace(METHODS["joint"], training={"epochs": 1})
    parts = []
    for seed in range(5):
        for scenario in ("permuted", "rotated"):
            yield from measure(records, _chosen(models, known), [seed], scenario=scenario, name="mnist", **stream)
            source = Provenance(records.rows, MEASURES)
            parts = [
                f"### {s.title()}\n\n{table(records, known, source, data='mnist', scenario=s, **stream)}"
                for s in ("permuted", "rotated")
            ]
            text = (
                "## KCL and GKCL: 20 tasks of whole MNIST\n\n`python -m zoo benchmark gkcl full`\n\n60,000 training "
                f"and 10,000 test images a task. {_READING} {source}\n\n" + "\n\n".join(parts)
            )
            put_section(folder.parent / "RESULTS.md", "gkcl full", text)


# ---- tuning of the joint learner ---------------------------------------------------------------------------

TUNED = {"lr": (3e-4, 1e-3, 3e-3, 1e-2), "epochs": (1, 4, 20, 60)}


@measurement("gkcl", "tuning", "passes and rate of the joint learner")
def tuning(folder: Path) -> Iterator[str]:
    """Passes and rate of the joint learner, on a stream of its own whose accuracies are those of images left out.

    Args:
        folder: Of the CSV file.
    """
    records = Records(folder / "gkcl_tuning.csv", ("scenario", "lr", "epochs"), ("validation",))
    for scenario in ("permuted", "rotated"):
        for lr, epochs in itertools.product(*TUNED.values()):
            key = {"scenario": scenario, "lr": lr, "epochs": epochs}
            if key in records:
                continue
            method = replace(METHODS["joint"], training={"lr": lr, "epochs": epochs, "agnostic": "never"})
            stream = {"name": "mnist5k", "tasks": 20, "train_samples": 1000, "evaluate_on": "val"}
            found = run(method, 100, scenario=scenario, **stream).summary(19)
            records.add({**key, "validation": found["acc"]})
            yield f"{scenario}, rate {lr:g}, {epochs} passes: {found['acc']:.4f}"
    mean = {
        pair: statistics.fmean(records.numbers("validation", lr=pair[0], epochs=pair[1]))
        for pair in itertools.product(*TUNED.values())
    }
    rows = [[lr, *(f"{mean[lr, n]:.4f}" for n in TUNED["epochs"])] for lr in TUNED["lr"]]
    source = Provenance(records.rows, MEASURES)
    text = (
        "## KCL and GKCL: the joint learner's passes and rate\n\n`python -m zoo benchmark gkcl tuning`\n\nMean over "
        "permuted and rotated digits of the accuracy on training images left out, a stream with a seed of its own. "
        f"{source}\n\n" + markdown(["rate", *(f"{n} passes" for n in TUNED["epochs"])], source.marked(rows, "lr"))
    )
    put_section(folder.parent / "RESULTS.md", "gkcl tuning", text)
    yield f"best: rate {max(mean, key=mean.__getitem__)[0]:g}, {max(mean, key=mean.__getitem__)[1]} passes"


# ---- ablations ---------------------------------------------------------------------------------------------

ABLATIONS = {
    "GKCL linear": Method("gkcl_mlp"),
    "no replay": Method("gkcl_mlp", {"replay": False}),
    "no drift control": Method("gkcl_mlp", {"delta": 0.0}),
    "no contrastive term": Method("gkcl_mlp", {"omega": 0.0}),
    "contrastive term x 4": Method("gkcl_mlp", {"omega": 0.2}),
    "prior per task and class": Method("gkcl_mlp", {"prior_index": "task_class"}),
    "encoder without task": Method("gkcl_mlp", {"encoder_task": False}),
    "GKCL linear, one pass": Method("gkcl_mlp", {}, {"epochs": 1}),
    **{f"KCL, {n} per class": Method("kcl_mlp", {**_DROP, "shots": n}, _FAST) for n in (1, 2, 5, 10, 20)},
    "KCL, 20 per class, 6 passes": Method("kcl_mlp", {**_DROP, "shots": 20}, {**_FAST, "epochs": 6}),
}
SHOTS = (1, 2, 5, 10, 20, 50)


@measurement("gkcl", "ablations", "what replay, contrast, drift control and samples do")
def ablations(folder: Path, models: list[str] | None = None) -> Iterator[str]:
    """Replay, drift control, contrastive weight, priors and samples per class: 5 tasks, 1,000 images each, two seeds.

    Args:
        folder: Of the CSV file.
        models: Names of variants; all if None.
    """
    shots = [f"acc_{n}" for n in SHOTS]
    values = ("passes", "acc", "forgetting", *shots)
    records = Records(folder / "gkcl_ablations.csv", ("scenario", "variant", "seed"), values)
    for seed in range(2):
        for scenario in ("permuted", "rotated"):
            for name, method in _chosen(models, ABLATIONS).items():
                key = {"scenario": scenario, "variant": name, "seed": seed}
                if key in records:
                    continue
                task = run(
                    replace(method, training={**method.training, "agnostic": "never"}),
                    seed,
                    name="mnist5k",
                    scenario=scenario,
                    tasks=5,
                    train_samples=1000,
                )
                found = task.summary(4)
                row = {**key, "acc": found["acc"], "forgetting": found["forgetting"]}
                row["passes"] = task.recipe.epochs
                row |= dict.fromkeys(shots, math.nan) | _by_shots(task)
                records.add(row)
                yield f"{scenario}, {name}, seed {seed}: {found['acc']:.3f}, forgetting {found['forgetting']:.3f}"
    _write_ablations(records, folder)


def _by_shots(task: ContinualTask) -> dict[str, float]:
    """Accuracy of a GKCL for other numbers of samples per class at test time, same weights."""
    learner: Any = task.learner
    if not hasattr(learner, "vae"):
        return {}
    trained, found = learner.shots, {}
    for n in SHOTS:
        learner.set_shots(n)
        found[f"acc_{n}"] = statistics.fmean(task.accuracy(j, j) for j in range(5))
    learner.set_shots(trained)
    return found


def _write_ablations(records: Records, folder: Path) -> None:
    def cell(column: str, **key: Any) -> str:
        numbers = [n for n in records.numbers(column, **key) if not math.isnan(n)]
        return mean_sd(numbers) if numbers else ""

    rows, source = [], Provenance(records.rows, MEASURES)
    for name in ABLATIONS:
        found = records.select(variant=name)
        if not found:
            continue
        row = [name + source.mark(found), found[0]["passes"]]
        for scenario in ("permuted", "rotated"):
            row += [cell(c, scenario=scenario, variant=name) for c in ("acc", "forgetting", "acc_1", "acc_5")]
        rows.append(row)
    head = [f"{s}, {c}" for s in ("permuted", "rotated") for c in ("accuracy", "forgetting", "1 sample", "5 samples")]
    text = (
        "## KCL and GKCL: ablations\n\n`python -m zoo benchmark gkcl ablations`\n\n5 tasks of MNIST-5k, 1,000 images "
        "each, two seeds. GKCL linear with its own recipe, and variants of one thing each; accuracy with 20 samples "
        f"per class, and with fewer at test time. {source}\n\n{markdown(['variant', 'passes', *head], rows)}"
    )
    put_section(folder.parent / "RESULTS.md", "gkcl ablations", text)


# ---- speed -------------------------------------------------------------------------------------------------


class PlainKCL:
    """KCL as one would first write it: batch and coreset one after the other, an explicit inverse, nothing kept."""

    def __init__(self, model: KCL) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.8, foreach=False, fused=False)

    def features(self, x: Tensor) -> Tensor:
        """Min-max features."""
        h = self.model.backbone(x)
        return (h - h.min()) / (h.max() - h.min())

    def logits(self, zq: Tensor, task: int) -> Tensor:
        """Logits of features, with the coreset's features and the inverse made anew."""
        m, head = self.model, self.model.head
        images, labels = m.coreset_x[task].to(zq.dtype) / 255, m.coreset_y[task]
        zs = self.features(images)
        if m.has_spectral_basis:
            rf = m.random_features
            mean, log_variance = rf.posterior(zs)
            if m.training:
                mp, lp = rf.prior(zq)
                ratio = (log_variance.exp() + (mp - mean) ** 2) / lp.exp()
                self.kl = 0.5 * (lp - log_variance + ratio - 1).sum()
            W = mean + torch.randn(rf.num_bases, rf.dim, dtype=mean.dtype) * torch.exp(log_variance / 2)
            zq, zs = (math.sqrt(2 / rf.num_bases) * torch.cos(z @ W.T + rf.phase) for z in (zq, zs))
        K = self._gram(zs, zs)
        inverse = torch.inverse(K + (head.lam[task].abs() + 0.01) * torch.eye(len(K), dtype=K.dtype))
        alpha = inverse @ F.one_hot(labels, m.num_classes).to(K.dtype)
        return head.gamma[task] * self._gram(zq, zs) @ alpha + head.beta[task]

    def _gram(self, a: Tensor, b: Tensor) -> Tensor:
        kernel = self.model.head.kernel
        if isinstance(kernel, Laplacian):
            return torch.exp(-0.25 * (a[:, None] - b[None]).abs().sum(-1))
        if isinstance(kernel, Gaussian):
            return torch.exp(-((a[:, None] - b[None]) ** 2).sum(-1))
        return (a @ b.T + 1) ** 3 if isinstance(kernel, Polynomial) else a @ b.T

    def step(self, x: Tensor, y: Tensor, task: int) -> None:
        """A training step."""
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.logits(self.features(x), task), y)
        if self.model.has_spectral_basis:
            loss = loss + 1e-4 * self.kl
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def evaluate(self, tests: list[Tensor], agnostic: bool) -> None:
        """Decisions for all test images of all tasks: told the task, and also not told it."""
        for task, images in enumerate(tests):
            for x in images.split(256):
                zq = self.features(x)
                if agnostic:
                    every = torch.stack([self.logits(zq, t) for t in range(len(tests))])
                    _ = every[task].argmax(-1), every.amax(0).argmax(-1)
                else:
                    self.logits(zq, task).argmax(-1)


def _learned(kernel: str, tasks: int) -> KCL:
    """A KCL with a coreset of noise for every task; values do not matter to time."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"kernel": kernel, "feature_norm": "minmax_batch", **_DROP}
    model: Any = create_model("kcl_mlp", tasks=tasks, **options)
    for t in range(tasks):
        model.begin_task(t, torch.rand(200, 1, 28, 28), torch.arange(200) % 10)
        model.end_task(t, torch.empty(0), torch.empty(0))
    return model


def zoo_evaluation(model: KCL, tests: list[Tensor], agnostic: bool) -> Callable[[], object]:
    """The zoo's evaluation of all tasks, with weights that have just changed."""

    @torch.no_grad()
    def evaluate() -> None:
        model.head.beta.add_(0)  # a new version of the weights: nothing kept from the last round may be used
        for task, images in enumerate(tests):
            for x in images.split(256):
                for logits in model.predict_aware_and_agnostic(x, task) if agnostic else (model(x, task),):
                    logits.argmax(-1)

    return evaluate


STEPS = 10  # in a row, as in training: a single step would find the memory of the other form in the caches


def zoo_steps(model: Any) -> Callable[[], None]:
    """Training steps in a row of a learner that has begun its first task."""
    x, y, optimizer = torch.rand(10, 1, 28, 28), torch.arange(10), Recipe().build(model.parameters())

    def step() -> None:
        torch.stack(list(model.losses(x, y, 0).values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return partial(_in_a_row, step)


def _in_a_row(step: Callable[[], None]) -> None:
    for _ in range(STEPS):
        step()


def _step_times(kernel: str, rounds: int) -> dict[str, Times]:
    model, twin = _learned(kernel, 1).train(), PlainKCL(_learned(kernel, 1).train())
    plain = partial(_in_a_row, partial(twin.step, torch.rand(10, 1, 28, 28), torch.arange(10), 0))
    return interleaved_times({"plain": plain, "zoo": zoo_steps(model)}, rounds)


_SPEED = ("kernel", "what", "wait_policy"), ("images", "plain_ms", "zoo_ms", "times")
FAST_CODE = ("zoo/models/continual", "zoo/learners", "zoo/kernels")


@measurement("gkcl", "speed", "a KCL step and an evaluation against the plain form")
def speed(folder: Path, rounds: int = 11, tasks: int = 20, wait: Sequence[str] = POLICIES) -> Iterator[str]:
    """A training step of KCL, and an evaluation of 20 tasks, against the plain form.

    Args:
        folder: Of the CSV file.
        rounds: Timed steps of each form; evaluations are timed a fifth as often.
        tasks: Tasks to evaluate.
        wait: Policies as in :func:`~zoo.results.timing.policy`, each in a process of its own.
    """
    path = folder / "gkcl_speed.csv"
    path.unlink(missing_ok=True)  # times of one run belong together
    yield from under_policies(wait, __name__, "measure_speed", folder=str(folder), rounds=rounds, tasks=tasks)
    records = Records(path, *_SPEED)
    rows, best = [], []
    for row in records.rows:
        ms = [f"{float(row[k]):.1f}" for k in ("plain_ms", "zoo_ms", "times")]
        rows.append([row["kernel"], row["what"], row["images"], row["wait_policy"], *ms])
    for kernel, what in dict.fromkeys((row["kernel"], row["what"]) for row in records.rows):
        plain, ours = (min(records.numbers(k, kernel=kernel, what=what)) for k in ("plain_ms", "zoo_ms"))
        best.append(f"{kernel}, {what} **{plain / ours:.1f}**")
    header = ["kernel", "what", "images (a task)", "wait", "plain ms", "zoo ms", "times"]
    text = (
        f"## KCL: speed\n\n`python -m zoo benchmark gkcl speed --rounds {rounds}`\n\nA training step (batch 10, "
        f"coreset 200, dropout, 784-256-256, 1024 bases), and the evaluation of {tasks} tasks after a change of the "
        "weights: told the task, and with the answers that are not told it as well, which ask the classifier of every "
        "task. Plain: batch and coreset through the network one after the other, differences of all pairs, an explicit "
        "inverse, everything anew for every test batch of 256. Median time on the clock and ratio of interleaved "
        f"calls, {STEPS} steps each. {Provenance(records.rows, FAST_CODE)}\n\n{markdown(header, rows)}\n\nBest "
        f"against best, over how threads wait: {'; '.join(best)} times."
    )
    put_section(folder.parent / "RESULTS.md", "gkcl speed", text)


def measure_speed(folder: str, rounds: int, tasks: int) -> Iterator[str]:
    """What :func:`speed` does in each process."""
    records = Records(Path(folder, "gkcl_speed.csv"), *_SPEED)
    for kernel in ("linear", "poly", "rff", "laplacian", "gaussian"):
        pairs = kernel in ("laplacian", "gaussian")  # the plain form takes seconds for differences of all pairs
        here = stamp()
        found = {"step": (10, _step_times(kernel, rounds))}
        model, twin = _learned(kernel, tasks).eval(), PlainKCL(_learned(kernel, tasks).eval())
        for agnostic in (False,) if pairs else (False, True):
            images = 256 if pairs or agnostic else 1000
            tests = [torch.rand(images, 1, 28, 28) for _ in range(tasks)]
            plain, ours = partial(twin.evaluate, tests, agnostic), zoo_evaluation(model, tests, agnostic)
            times = interleaved_times({"plain": plain, "zoo": ours}, max(1, rounds // 5), warmup=1)
            found["both answers" if agnostic else "told the task"] = images, times
        for what, (images, times) in found.items():
            calls = STEPS if what == "step" else 1
            before, now = (1e3 * statistics.median(times[name].wall) / calls for name in ("plain", "zoo"))
            ratio = statistics.median(p / z for p, z in zip(times["plain"].wall, times["zoo"].wall, strict=True))
            row = {"kernel": kernel, "what": what, "images": images, "plain_ms": before, "zoo_ms": now, "times": ratio}
            records.add(row | here)
            yield f"{kernel}, {what}: {before:.1f} to {now:.1f} ms, {ratio:.1f} x"
