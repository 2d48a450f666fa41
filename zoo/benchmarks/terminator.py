"""Terminator against other networks of its size on MNIST and Fashion-MNIST, and the effect of its options.

Small enough for two cores: full data sets, images averaged to 14 x 14, a fixed number of training steps. Every network
is trained twice: with the same steps as Terminator (equal epochs), and with the same CPU time (equal time).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.convnext import ConvNeXtBlock
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

from zoo.benchmarks import measurement
from zoo.benchmarks.tuning import bracketed
from zoo.data import FashionMnist, Mnist
from zoo.ops.hyperzzw import causal_conv
from zoo.registry.factory import create_model
from zoo.results.records import Provenance, Records, markdown, mean_sd, put_section

__all__ = ["BenchmarkError", "options", "pixels"]

SEEDS = (0, 1, 2)
STATE_RATE = 1e-3  # largest learning rate of S4D's state parameters
SIDE, BATCH, WEIGHT_DECAY = 14, 64, 0.05
RATES, TRIAL_STEPS, HELD_OUT = (3e-3, 1e-2, 3e-2, 1e-1), 100, 5000
DATA: dict[str, type[Mnist]] = {"MNIST": Mnist, "Fashion-MNIST": FashionMnist}
KEYS = ("data", "task", "model", "equal", "steps", "seed")
VALUES = ("parameters", "rate", "accuracy", "taken", "cpu_seconds")
MEASURES = ("zoo/models/terminator.py", "zoo/models/slow_nets.py", "zoo/ops")


class BenchmarkError(RuntimeError):
    """The benchmark cannot run."""


# ---- the other networks ------------------------------------------------------------------------------------


def resnet(width: int) -> nn.Module:
    """Three basic residual blocks (He et al., 2016), at 14, 7 and 4 pixels."""
    widths = (width, width, 2 * width, 2 * width)
    layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    for i, (before, after) in enumerate(pairwise(widths)):
        stride = 2 if i else 1
        down = None
        if stride > 1 or before != after:
            down = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        layers.append(BasicBlock(before, after, stride, down))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


def convnext(width: int) -> nn.Module:
    """Four ConvNeXt blocks (Liu et al., 2022) with 7 x 7 depthwise kernels after a 2 x 2 patch stem."""
    blocks = [ConvNeXtBlock(width, ls_init_value=0.1) for _ in range(4)]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(width), nn.Linear(width, 10))
    return nn.Sequential(nn.Conv2d(1, width, 2, 2), *blocks, *head)


class DiagonalStateSpace(nn.Module):
    """S4D layer (Gu et al., 2022): a long convolution with the kernel of a diagonal state space, GELU and mixing.

    As in the paper, its state parameters (steps, decays and frequencies) have a learning rate of at most 0.001 and no
    weight decay.

    Args:
        width: Channels.
        states: Complex states per channel.
    """

    def __init__(self, width: int, states: int = 16) -> None:
        super().__init__()
        self.log_dt = nn.Parameter(torch.empty(width).uniform_(-6.9, -2.3))  # 0.001 to 0.1
        self.log_decay = nn.Parameter(torch.full((width, states), 0.5).log())
        self.frequency = nn.Parameter(torch.pi * torch.arange(states).float().repeat(width, 1))
        self.c = nn.Parameter(torch.randn(width, states, 2) * 0.5**0.5)
        self.skip = nn.Parameter(torch.ones(width))
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)
        for parameter in (self.log_dt, self.log_decay, self.frequency):
            parameter.own_rate = STATE_RATE  # type: ignore[attr-defined]

    def kernel(self, length: int) -> Tensor:
        """Convolution kernel (width, L)."""
        a = torch.complex(-self.log_decay.exp(), self.frequency)
        step = a * self.log_dt.exp()[:, None]
        c = torch.view_as_complex(self.c) * (step.exp() - 1) / a
        return 2 * torch.einsum("hn,hnl->hl", c, (step[..., None] * torch.arange(length)).exp()).real

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, L) -> (B, width, L)."""
        y = causal_conv(self.kernel(x.shape[-1]), x) + self.skip[:, None] * x
        return self.norm((x + self.mix(F.gelu(y).mT).mT).mT).mT


class S4D(nn.Module):
    """Four :class:`DiagonalStateSpace` layers over the sequence of an image's pixels."""

    def __init__(self, width: int, order: Tensor | None = None) -> None:
        super().__init__()
        self.order = order
        self.stem = nn.Conv1d(1, width, 1)
        self.layers = nn.Sequential(*(DiagonalStateSpace(width) for _ in range(4)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 1, N, N) -> logits (B, 10)."""
        x = x.flatten(2)
        x = x if self.order is None else x[..., self.order]
        return self.head(self.layers(self.stem(x)).mean(-1))


def parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def fitted(build: Callable[[int], nn.Module], target: int) -> nn.Module:
    """The network with the number of parameters closest to `target`, over widths from 4 to 64."""
    width = min(range(4, 65), key=lambda w: abs(parameters(build(w)) - target))
    return build(width)


TERMINATOR = {"images": "terminator_z", "pixel by pixel": "terminator_z_smnist", "permuted": "terminator_z_pmnist"}
RIVALS: dict[str, dict[str, Any]] = {
    "images": {"ResNet": resnet, "ConvNeXt": convnext},
    "pixel by pixel": {"S4D": S4D},
    "permuted": {"S4D": S4D},
}


def built(task: str, model: str) -> nn.Module:
    """Build a network by its name in the tables; rivals have about as many parameters as Terminator."""
    own = create_model(TERMINATOR[task])
    if model == "Terminator":
        return own
    build = RIVALS[task][model]
    if task == "permuted":
        build = partial(build, order=own.pixel_order)
    return fitted(build, parameters(own))


# ---- training ----------------------------------------------------------------------------------------------


@cache
def load(data: str, root: str | None) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test parts: standardised images (n, 1, 14, 14) and targets (n,)."""
    module = DATA[data](root=root)
    try:
        module.prepare_data()
        parts = module.load()
    except OSError as error:
        raise BenchmarkError(f"{data} is not there ({error}); give its folder with --root") from None
    images = [F.avg_pool2d(torch.as_tensor(x).view(-1, 1, 28, 28).float() / 255, 2) for x, _ in parts]
    mean, std = images[0].mean(), images[0].std()
    return tuple(((x - mean) / std, torch.as_tensor(y).long()) for x, (_, y) in zip(images, parts, strict=True))  # type: ignore[return-value]


def train(
    model: nn.Module, part: tuple[Tensor, Tensor], seed: int, steps: int, rate: float, seconds: float = 0.0
) -> tuple[int, float]:
    """Train with AdamW and a one-cycle schedule with peak `rate` over `steps`, or over CPU `seconds` if given.

    Returns:
        Number of steps and CPU seconds.
    """
    images, targets = part
    generator = torch.Generator().manual_seed(seed)
    of_states = [p for p in model.parameters() if hasattr(p, "own_rate")]
    decayed = [p for p in model.parameters() if p.ndim > 1 and not hasattr(p, "own_rate")]
    rest = [p for p in model.parameters() if p.ndim <= 1 and not hasattr(p, "own_rate")]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": WEIGHT_DECAY, "most": rate},
        {"params": rest, "weight_decay": 0.0, "most": rate},
        {"params": of_states, "weight_decay": 0.0, "most": min(rate, STATE_RATE)},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], rate)
    model.train()
    begin, step = time.process_time(), 0
    order = torch.empty(0, dtype=torch.long)
    while True:
        passed = (time.process_time() - begin) / seconds if seconds else step / steps
        if passed >= 1:
            return step, time.process_time() - begin
        rise, fall = min(1.0, passed / 0.1 + 0.01), 0.5 * (1 + torch.cos(torch.tensor(torch.pi * passed)).item())
        for group in optimizer.param_groups:
            group["lr"] = group["most"] * rise * fall
        if len(order) < BATCH:
            order = torch.randperm(len(images), generator=generator)
        rows, order = order[:BATCH], order[BATCH:]
        loss = F.cross_entropy(model(images[rows]), targets[rows], label_smoothing=0.09)
        if hasattr(model, "aux_losses"):
            loss = loss + torch.stack(list(model.aux_losses().values())).sum()  # type: ignore[operator]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1


@torch.no_grad()
def accuracy(model: nn.Module, part: tuple[Tensor, Tensor], batch: int = 500) -> float:
    """Accuracy on a part, in eval mode."""
    model.eval()
    images, targets = part
    right = [model(x).argmax(-1) == y for x, y in zip(images.split(batch), targets.split(batch), strict=True)]
    return torch.cat(right).float().mean().item()


class Rates:
    """Learning rates of the networks, chosen in short trials on held-out training images.

    The grid starts with four rates and is extended until it brackets the best.

    Args:
        folder: Folder of `terminator_rates.csv`.
    """

    def __init__(self, folder: Path) -> None:
        keys = ("data", "task", "model", "steps", "rate")
        self.records = Records(folder / "terminator_rates.csv", keys, ("accuracy", "cpu_seconds"))

    def __call__(
        self,
        part: tuple[Tensor, Tensor],
        data: str,
        task: str,
        model: str,
        build: Callable[[], nn.Module] | None = None,
    ) -> float:
        """Best learning rate of a network; existing trials are reused.

        Args:
            part: Training images and targets.
            data: Name of the data set.
            task: Name of the task in the tables.
            model: Name of the network in the rows.
            build: Builds the network; None builds the one of this name in the tables.
        """
        key = {"data": data, "task": task, "model": model, "steps": TRIAL_STEPS}
        first, last = [x[:-HELD_OUT] for x in part], [x[-HELD_OUT:] for x in part]

        def trial(rate: float) -> float:
            row = {**key, "rate": f"{rate:g}"}
            if row not in self.records:
                torch.manual_seed(100)
                network = build() if build else built(task, model)
                _, spent = train(network, (first[0], first[1]), 100, TRIAL_STEPS, rate)
                self.records.add({**row, "accuracy": accuracy(network, (last[0], last[1])), "cpu_seconds": spent})
            return self.records.numbers("accuracy", **row)[0]

        return bracketed(trial, RATES)


# ---- commands ----------------------------------------------------------------------------------------------


@measurement("terminator", "pixels", "digits and clothes beside other networks")
def pixels(
    folder: Path,
    data: Sequence[str] = tuple(DATA),
    root: str | None = None,
    steps: int = 300,
    seeds: Sequence[int] = SEEDS,
) -> Iterator[str]:
    """Accuracy on 14 x 14 images, as images and as pixel sequences, beside other networks of equal size.

    Args:
        folder: Folder of `terminator_pixels.csv`; the table goes into RESULTS.md beside it.
        data: Names of data sets.
        root: Folder of their files, as in `zoo.data.Mnist`.
        steps: Training steps of Terminator, with batches of 64 images.
        seeds: Seeds of weights and order.

    Yields:
        One line per run, then the table.

    Raises:
        BenchmarkError: A data set is missing.
    """
    records, rates = Records(folder / "terminator_pixels.csv", KEYS, VALUES), Rates(folder)
    for name in data:
        if name not in DATA:
            raise BenchmarkError(f"no data set {name!r}; choose from {', '.join(DATA)}")
        for seed in seeds:
            for task in TERMINATOR:
                for model in ("Terminator", *RIVALS[task]):
                    yield from _cell(records, rates, root, steps, data=name, task=task, model=model, seed=seed)
                table = _pixel_table(folder, records, steps)  # also after an interrupted command
    yield table


def _cell(records: Records, rates: Rates, root: str | None, steps: int, **key: Any) -> Iterator[str]:
    for equal in ("epochs",) if key["model"] == "Terminator" else ("epochs", "time"):
        row = {**key, "equal": equal, "steps": steps}
        if row in records:
            continue
        seconds, parts = 0.0, load(key["data"], root)
        if equal == "time":
            seconds = records.numbers("cpu_seconds", **{**row, "model": "Terminator", "equal": "epochs"})[0]
        rate = rates(parts[0], key["data"], key["task"], key["model"])
        torch.manual_seed(key["seed"])
        model = built(key["task"], key["model"])
        taken, spent = train(model, parts[0], key["seed"], steps, rate, seconds)
        row |= {"parameters": parameters(model), "rate": rate, "accuracy": accuracy(model, parts[1])}
        records.add(row | {"taken": taken, "cpu_seconds": spent})
        yield _line(records.rows[-1])


def _line(row: dict[str, str]) -> str:
    what = f"{row['data']}, {row['task']}: {row['model']}, {row['parameters']} parameters, seed {row['seed']}"
    return f"{what}: {100 * float(row['accuracy']):.2f} % after {row['taken']} steps, {float(row['cpu_seconds']):.0f} s"


def _pixel_table(folder: Path, records: Records, steps: int) -> str:
    rows, source = [], Provenance(records.select(steps=steps), MEASURES)
    groups = dict.fromkeys((r["data"], r["task"], r["model"]) for r in records.select(steps=steps))
    for data, task, model in sorted(groups, key=lambda g: (g[0], list(TERMINATOR).index(g[1]))):
        cells = [data, task, model + source.mark(records.select(data=data, task=task, model=model, steps=steps))]
        for equal in ("epochs", "time"):
            key = {"data": data, "task": task, "model": model, "steps": steps}
            key["equal"] = "epochs" if model == "Terminator" else equal
            percent = [100 * a for a in records.numbers("accuracy", **key)]
            taken = records.numbers("taken", **key)
            if equal == "epochs":
                cells += [f"{records.numbers(c, **key)[0]:g}" for c in ("parameters", "rate")] + [str(len(percent))]
            cells.append(f"{mean_sd(percent, 2)}, {sum(taken) / len(taken):.0f} steps" if percent else "")
        rows.append(cells)
    table = markdown(("data", "task", "model", "parameters", "rate", "seeds", "equal epochs", "equal time"), rows)
    seconds = records.numbers("cpu_seconds", model="Terminator", steps=steps)
    text = (
        f"## Terminator on pixels\n\n`python -m zoo benchmark terminator pixels --steps {steps}`\n\n"
        f"Whole training sets (60,000 images) averaged to 14 x 14 pixels, {steps} steps of {BATCH} images ("
        f"{steps * BATCH / 60000:.2f} epochs), AdamW; for each network the best rate in {TRIAL_STEPS} steps, judged on "
        f"{HELD_OUT:,} training images that are left out, on a grid that goes on until it brackets the best "
        f"(`results/terminator_rates.csv`); S4D's state parameters have a rate of at most {STATE_RATE:g} and no weight "
        "decay, as its authors train them; test accuracy in per cent, mean (standard deviation) over seeds. Equal "
        f"epochs: {steps} steps for all. Equal time: as many CPU seconds as Terminator's steps took "
        f"({min(seconds):.0f} to {max(seconds):.0f} on a busy machine). "
        f"{source}\n\n{table}"
    )
    put_section(folder.parent / "RESULTS.md", "terminator pixels", text)
    return table


#: Options of statistics, context and frequencies, from the published network to our recipe.
OPTIONS: dict[str, dict[str, Any]] = {
    "as published": {"standardise_eval": "batch", "local_context": "batch", "omega_0": 2000.0},
    "running statistics": {"standardise_eval": "running", "local_context": "batch", "omega_0": 2000.0},
    "running statistics, running context": {"omega_0": 2000.0},
    "running statistics, context by sample": {"local_context": "sample", "omega_0": 2000.0},
    "running statistics and context, matched frequencies": {},
}


@measurement("terminator", "options", "what its options do to accuracy")
def options(
    folder: Path,
    data: Sequence[str] = ("MNIST",),
    root: str | None = None,
    steps: int = 150,
    seeds: Sequence[int] = SEEDS,
) -> Iterator[str]:
    """Effect of running statistics, the context of local kernels and the frequency scale on accuracy.

    Arguments, lines and errors are those of :func:`pixels`; the file is `terminator_options.csv`. The learning rate is
    chosen for each option. Each trained network is tested in batches of 500 and of 10 images.
    """
    rates = Rates(folder)
    keys = ("data", "options", "steps", "seed")
    values = ("rate", "accuracy", "accuracy_by_10", "taken", "cpu_seconds")
    records = Records(folder / "terminator_options.csv", keys, values)
    for name in data:
        for seed in seeds:
            for what, given in OPTIONS.items():
                row = {"data": name, "options": what, "steps": steps, "seed": seed}
                if row in records:
                    continue
                parts = load(name, root)
                build = partial(create_model, "terminator_z", **given)
                rate = rates(parts[0], name, "images", f"Terminator, {what}", build)
                torch.manual_seed(seed)
                model = build()
                taken, spent = train(model, parts[0], seed, steps, rate)
                row |= {
                    "rate": rate,
                    "accuracy": accuracy(model, parts[1]),
                    "accuracy_by_10": accuracy(model, parts[1], 10),
                }
                records.add(row | {"taken": taken, "cpu_seconds": spent})
                yield f"{name}, {what}, seed {seed}: {100 * row['accuracy']:.2f} %, {spent:.0f} s"  # type: ignore[operator]
    rows, source = [], Provenance(records.select(steps=steps), MEASURES)
    for name, what in dict.fromkeys((r["data"], r["options"]) for r in records.select(steps=steps)):
        key = {"data": name, "options": what, "steps": steps}
        by = [[100 * a for a in records.numbers(column, **key)] for column in ("accuracy", "accuracy_by_10")]
        seconds = records.numbers("cpu_seconds", **key)
        own = records.select(**key)
        cells = [name, what + source.mark(own), own[0]["rate"], str(len(own)), *(mean_sd(b, 2) for b in by)]
        rows.append([*cells, f"{sum(seconds) / len(seconds):.0f}"])
    table = markdown(("data", "options", "rate", "seeds", "batches of 500", "batches of 10", "CPU-s"), rows)
    text = (
        f"## Terminator's options\n\n`python -m zoo benchmark terminator options --data "
        f"{' '.join(data)} --steps {steps}`\n\n"
        f'The images task and protocol of "Terminator on pixels", {steps} steps, the rate chosen for each option; test '
        "accuracy in per cent, mean (standard deviation) over seeds, of the same weights tested in two batch sizes. "
        f"{source}\n\n{table}"
    )
    put_section(folder.parent / "RESULTS.md", "terminator options", text)
    yield table
