"""SNNK: speed of layers, error of feature maps, and a perceptron: layered, bundled, and in closed form."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.analysis.plots import new_figure
from zoo.benchmarks import measurement
from zoo.benchmarks.tuning import bracketed
from zoo.kernels.random_features import ExpFeatures, FeatureMap, OscillatoryFeatures, ReLUFeatures
from zoo.models.snnk import SNNK, SNNKLinear
from zoo.results.records import Provenance, Records, markdown, mean_sd, put_section, stamp
from zoo.results.timing import POLICIES, interleaved_times, under_policies
from zoo.support.files import write_atomic

__all__ = ["approximation", "mlp", "speed"]


# ---- speed -------------------------------------------------------------------------------------------------


class Original(nn.Module):
    """The layer as published: a full-size constant, separate scaling, Psi on the features."""

    def __init__(self, weight: Tensor, projection: Tensor) -> None:
        super().__init__()
        self.weight, self.projection = nn.Parameter(weight), projection

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., l)."""
        z = torch.einsum("...d,md->...m", x, self.projection)
        z = torch.maximum(z, torch.zeros(z.shape, dtype=z.dtype)) / math.sqrt(len(self.projection))
        return z @ self.weight.t()


DENSE, WHOLE = "dense and GELU", "dense, GELU, dense"
_SPEED = ("layer", "wait_policy"), ("ms", "cpu_ms", "times", "times_whole", "n")
FEATURES = ("zoo/kernels/random_features", "zoo/models/snnk.py")


@measurement("snnk", "speed", "folded and unfolded layers against dense ones")
def speed(folder: Path, rounds: int = 11, wait: Sequence[str] = POLICIES) -> Iterator[str]:
    """Time dense 768 -> 3072 layers with GELU against SNNK layers, unfolded and folded, on 2,048 tokens.

    Args:
        folder: Folder of `snnk_speed.csv`; the table goes into RESULTS.md beside it.
        rounds: Timed calls of each form.
        wait: Policies as in :func:`~zoo.results.timing.policy`, each in a new process.
    """
    path = folder / "snnk_speed.csv"
    path.unlink(missing_ok=True)  # times of one run belong together
    yield from under_policies(wait, __name__, "measure_speed", folder=str(folder), rounds=rounds)
    records = Records(path, *_SPEED)
    rows = [
        [row["layer"], row["wait_policy"], *(f"{float(row[k]):.1f}" for k in ("ms", "cpu_ms", "times")),
         row["times_whole"] and f"{float(row['times_whole']):.1f}"]
        for row in records.rows
    ]  # fmt: skip
    header = ["layer", "wait", "ms", "CPU ms", f"times as fast as {DENSE}", "against the whole network"]
    table = markdown(header, rows)
    best = {name: min(records.numbers("ms", layer=name)) for name in dict.fromkeys(r["layer"] for r in records.rows)}
    rival = {name: best[WHOLE if name.startswith("folded") else DENSE] for name in best}
    told = [f"{name} **{rival[name] / ms:.1f}**" for name, ms in best.items() if "m =" in name]
    put_section(folder.parent / "RESULTS.md", "snnk speed", f"""
## SNNK: speed of a layer

`python -m zoo benchmark snnk speed --rounds {rounds}`

Width {_WIDTH}, hidden {_HIDDEN}, {_TOKENS} tokens, float32, inference; medians of {rounds} interleaved calls, the
feature map included; ratios on the clock, in the same process. A folded layer has taken in the next linear layer
({_HIDDEN} to {_WIDTH}), so that it does the work of the whole network. {Provenance(records.rows, FEATURES)}

{table}

Best against best, over how threads wait: {", ".join(told)} times (folded layers against {WHOLE}).
""")  # fmt: skip
    yield table


_WIDTH, _HIDDEN, _TOKENS = 768, 3072, 2048


def measure_speed(folder: str, rounds: int) -> Iterator[str]:
    """The part of :func:`speed` that runs in each process."""
    records = Records(Path(folder, "snnk_speed.csv"), *_SPEED)
    torch.manual_seed(0)
    x = torch.randn(_TOKENS, _WIDTH, generator=torch.Generator().manual_seed(0))
    dense, second = nn.Sequential(nn.Linear(_WIDTH, _HIDDEN), nn.GELU()), nn.Linear(_HIDDEN, _WIDTH)
    functions: dict[str, nn.Module] = {DENSE: dense, WHOLE: nn.Sequential(dense, second)}
    for m in (16, 64, 256, 512):
        layer = SNNKLinear(ReLUFeatures(_WIDTH, m, antithetic=True), _HIDDEN)
        original = Original(layer.weight.detach().clone(), ReLUFeatures(_WIDTH, m, bias=False).projection.matrix)
        functions |= {f"original, m = {m}": original, f"layer, m = {m}": layer, f"folded, m = {m}": layer.fold(second)}
    here = stamp()
    with torch.inference_mode():
        times = interleaved_times({k: functools.partial(f, x) for k, f in functions.items()}, rounds)

    def ratio(slow: str, fast: str) -> float:
        return statistics.median(a / b for a, b in zip(times[slow].wall, times[fast].wall, strict=True))

    for name, found in times.items():
        row = {"layer": name, "n": rounds, "times": ratio(DENSE, name), "times_whole": ""}
        row |= {k: 1e3 * statistics.median(v) for k, v in (("ms", found.wall), ("cpu_ms", found.cpu))}
        if name.startswith(("folded", WHOLE)):
            row["times_whole"] = ratio(WHOLE, name)
        records.add(row | here)
        yield f"{name}: {row['ms']:.1f} ms"


# ---- approximation -----------------------------------------------------------------------------------------

WIDTHS = (16, 64, 256, 1024, 4096)
#: Name -> map of (d, m, seed).
MAPS: dict[str, Callable[..., FeatureMap]] = {
    "relu map": lambda d, m, **o: ReLUFeatures(d, m, **o),
    "step map": lambda d, m, **o: ReLUFeatures(d, m, order=0, **o),
    "exp": lambda d, m, **o: ExpFeatures(d, m, **o),
    **{
        name: (lambda d, m, name=name, **o: OscillatoryFeatures(d, m, name, **o))
        for name in ("cos", "sin", "gaussian", "tanh", "sigmoid", "softplus", "erf", "gelu", "silu")
    },
}
#: Activations that the maps of these names approximate.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "erf": torch.erf,
    "gelu": F.gelu,
    "silu": F.silu,
}
KINDS: dict[str, dict[str, Any]] = {
    "iid": {"projection": "iid"},
    "orthogonal": {"projection": "orthogonal"},
    "orthogonal, antithetic": {"projection": "orthogonal", "antithetic": True},
    "hadamard": {"projection": "hadamard"},
}


@measurement("snnk", "approximation", "error of every map against its width")
def approximation(folder: Path) -> Iterator[str]:
    """Error of every feature map against its width, beside the theoretical variance: a table and a plot.

    Maps of bounded and smooth activations approximate a short trigonometric series, whose difference from the
    activation is a bias for any width; both errors are measured.
    """
    d, draws = 64, 8
    values = ["error", "error_activation", "theory"]
    records = Records(folder / "snnk_approximation.csv", ["map", "projection", "m"], values)
    generator = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(100, d, generator=generator, dtype=torch.float64), dim=1)
    w = F.normalize(torch.randn(50, d, generator=generator, dtype=torch.float64), dim=1)
    for name, build in MAPS.items():
        for kind, options in KINDS.items():
            for m in WIDTHS:
                if {"map": name, "projection": kind, "m": m} in records:
                    continue
                errors, biased = [], []
                for seed in range(draws):
                    features = build(d, m, seed=seed, dtype=torch.float64, bias=False, **options)
                    found, truth = features(x) @ features.encode(w).mT, features.expectation(x, w)
                    errors.append(float((found - truth).square().mean()))
                    if name in ACTIVATIONS:
                        biased.append(float((found - ACTIVATIONS[name](x @ w.mT)).square().mean()))
                theory = math.sqrt(float(features.variance(x, w).mean()))
                row = {"map": name, "projection": kind, "m": m, "error": math.sqrt(statistics.fmean(errors))}
                row["error_activation"] = math.sqrt(statistics.fmean(biased)) if biased else ""
                records.add({**row, "theory": theory})
        yield f"{name}: done"
    picture = folder / "snnk_approximation.png"
    _plot(records, picture)

    def cell(column: str, name: str, kind: str, m: int) -> str:
        found = records.select(map=name, projection=kind, m=m)[0][column]
        return f"{float(found):.4f}" if found else ""

    rows = [
        [name, *(cell("error", name, "iid", m) for m in WIDTHS), cell("theory", name, "iid", 256),
         *(cell("error", name, kind, 256) for kind in list(KINDS)[1:]),
         *(cell("error_activation", name, "iid", m) for m in (256, 4096))]
        for name in MAPS
    ]  # fmt: skip
    header = ["kernel", *(f"iid, m = {m}" for m in WIDTHS), "theory, 256", *(f"{k}, 256" for k in list(KINDS)[1:])]
    header += [f"from the activation, iid, {m}" for m in (256, 4096)]
    source = Provenance(records.rows, FEATURES)
    table = markdown(header, source.marked(rows, "map"))
    put_section(folder.parent / "RESULTS.md", "snnk approximation", f"""
## SNNK: point-wise error of the feature maps

`python -m zoo benchmark snnk approximation`

Root mean square of estimate minus closed form, unit vectors in {d} dimensions, {draws} draws; m projections are m real
features for the ReLU and exp maps and 2 m for the others. The closed form of tanh, sigmoid, softplus, erf, GELU and
SiLU is a series of few harmonics, not the activation itself: the last columns are the errors from the activation, which
stay where the series ends. The picture, with the theory's line for independent projections, is
`results/{picture.name}`. {source}

![error against width](results/{picture.name})

{table}
""")  # fmt: skip
    yield table


def _plot(records: Records, path: Path) -> None:
    figure = new_figure((11, 7.5))
    for ax, name in zip(figure.subplots(3, 4, sharex=True).flat, MAPS, strict=True):
        for kind, mark in zip(KINDS, "os^d", strict=True):
            errors = [records.numbers("error", map=name, projection=kind, m=m)[0] for m in WIDTHS]
            ax.loglog(WIDTHS, errors, marker=mark, markersize=4, linewidth=1, label=kind)
        theory = [records.numbers("theory", map=name, projection="iid", m=m)[0] for m in WIDTHS]
        ax.loglog(WIDTHS, theory, color="black", linestyle="--", linewidth=1, label="theory, iid")
        ax.set_title(name, fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5)
    figure.supxlabel("random projections m")
    figure.supylabel("root mean square error")
    write_atomic(path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=110))


# ---- a perceptron ------------------------------------------------------------------------------------------

HIDDEN, EPOCHS, SEEDS, RATES = 256, 15, (0, 1, 2), (1e-3, 4e-3)


def plain(seed: int) -> nn.Module:
    """A perceptron with two hidden layers."""
    layers = [nn.Linear(784, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10)]
    return nn.Sequential(nn.Flatten(), *layers)


#: Name -> network by seed, and whether its head is solved in closed form.
NETWORKS: dict[str, tuple[Callable[[int], nn.Module], bool]] = {
    "plain, 784-256-256-10": (plain, False),
    "SNNK layers, m = 256, 256": (lambda s: _snnk(s, (256, 256)), False),
    "SNNK layers, m = 512, 512": (lambda s: _snnk(s, (512, 512)), False),
    "bundled, m = 512, Adam": (lambda s: _snnk(s, (512,), bundled=True), False),
    "bundled, m = 512, closed form": (lambda s: _snnk(s, (512,), bundled=True), True),
    "bundled, m = 2048, closed form": (lambda s: _snnk(s, (2048,), bundled=True), True),
    "fully bundled, m = 1024, 2048, closed form": (lambda s: _snnk(s, (1024, 2048), bundled=True), True),
}


def _snnk(seed: int, m: tuple[int, ...], **options: Any) -> SNNK:
    return SNNK(1, 10, (HIDDEN,) * len(m), m, img_size=28, antithetic=True, seed=1000 * seed, **options)


@measurement("snnk", "mlp", "a perceptron in layers, bundled, in closed form")
def mlp(folder: Path) -> Iterator[str]:
    """Perceptrons on 5,000 MNIST digits: plain, with SNNK layers, bundled, and fully bundled in closed form."""
    from zoo.data.image import Mnist5k

    records = Records(
        folder / "snnk_mlp.csv", ["network", "rate", "seed"], ["parameters", "validation", "test", "cpu_seconds"]
    )
    data = Mnist5k(augment=False)
    data.prepare_data()
    data.setup()
    parts = {p: _arrays(data, p) for p in ("train", "val", "test")}
    rows = []
    for name, (build, closed) in NETWORKS.items():
        best: float = 0
        if not closed:

            def trial(rate: float, name: str = name, build: Callable[[int], nn.Module] = build) -> float:
                list(_measured(records, parts, name, build, rate, SEEDS[0]))
                return records.number("validation", network=name, rate=f"{rate:g}", seed=SEEDS[0])

            best = bracketed(trial, RATES)
        for seed in SEEDS:
            yield from _measured(records, parts, name, build, best, seed)
        chosen = {"network": name, "rate": f"{best:g}"}
        rows.append([name, f"{int(records.numbers('parameters', **chosen)[0]):,}",
                     mean_sd(records.numbers("test", **chosen)),
                     f"{statistics.median(records.numbers('cpu_seconds', **chosen)):.2f}"])  # fmt: skip
    source, header = Provenance(records.rows, FEATURES), ["network", "trained parameters", "test accuracy, mean (sd)"]
    table = markdown([*header, "CPU seconds to fit"], source.marked(rows, "network"))
    put_section(folder.parent / "RESULTS.md", "snnk mlp", f"""
## SNNK: a perceptron on MNIST digits

`python -m zoo benchmark snnk mlp`. 3,600 digits to train, 400 to choose the learning rate on a grid that brackets the
best, 1,000 to test; {len(SEEDS)} seeds; Adam for {EPOCHS} epochs without augmentation, or least squares on one-hot
targets with the ridge of smallest leave-one-out error. {source}

{table}
""")  # fmt: skip
    yield table


def _arrays(data: Any, part: str) -> tuple[Tensor, Tensor]:
    dataset = data.datasets[part]
    x, y = dataset.batch(range(len(dataset)))
    return x.float(), y


def _measured(
    records: Records,
    parts: dict[str, tuple[Tensor, Tensor]],
    name: str,
    build: Callable[[int], nn.Module],
    rate: float,
    seed: int,
) -> Iterator[str]:
    key = {"network": name, "rate": f"{rate:g}", "seed": seed}
    if key in records:
        return
    torch.manual_seed(seed)
    model = build(seed)
    X, y = parts["train"]
    start = time.process_time()
    if rate:
        _adam(model, X, y, rate, seed)
        parameters = sum(p.numel() for p in model.parameters())
    else:
        assert isinstance(model, SNNK)
        model.solve(list(zip(X.split(512), y.split(512), strict=True)))
        parameters = sum(p.numel() for p in model.head.parameters())
    spent = time.process_time() - start
    model.eval()
    with torch.no_grad():
        found = {p: float((model(parts[p][0]).argmax(-1) == parts[p][1]).double().mean()) for p in ("val", "test")}
    row = {**key, "parameters": parameters, "validation": found["val"], "test": found["test"], "cpu_seconds": spent}
    records.add(row)
    yield f"{name}, rate {rate:g}, seed {seed}: validation {found['val']:.3f} ({spent:.1f} s)"


def _adam(model: nn.Module, X: Tensor, y: Tensor, rate: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate, weight_decay=0.01)
    total = EPOCHS * math.ceil(len(X) / 64)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / (0.1 * total), 1 - s / total))
    model.train()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(X), generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(X[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
