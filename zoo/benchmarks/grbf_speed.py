"""GRBF: speed and memory of training steps, of batched networks, and of an estimator's fit.

This module does not import Lightning, which makes every step of torch's optimizers 0.2 ms slower without a GPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.benchmarks import measurement
from zoo.estimators.grbf_solvers import Networks, Objective, fit_adam
from zoo.models.grbf import GaussianRBFNetwork, network_loss
from zoo.results.records import Provenance, Records, markdown, put_section, stamp
from zoo.results.timing import interleaved, peak_memory

__all__ = ["speed"]

#: A timed function; training steps return the objective before the last step.
Run = Callable[[], Any]


# ---- training steps ----------------------------------------------------------------------------------------


def original(n: int, D: int, M: int, steps: int = 1) -> Run:
    """Training steps as published: an einsum over the n x M x D differences, probabilities, plain norms, Adam."""
    X, y, network = _problem(n, D, M)
    elements = network.elements[0].clone().requires_grad_()
    weights = network.weights[0, 0].clone().requires_grad_()
    centers = network.centers[0]
    optimizer = torch.optim.Adam([elements, weights], lr=0.01, fused=True)
    rows, columns = torch.tril_indices(D, D)

    def objective() -> Tensor:
        L = torch.zeros(D, D).index_put((rows, columns), elements)
        difference = X.unsqueeze(1) - centers  # (n, M, D)
        q = torch.einsum("nmi,ij,nmj->nm", difference, L @ L.T, difference)
        p = torch.sigmoid(torch.exp(-0.5 * q) @ weights)
        return F.binary_cross_entropy(p, y.squeeze(-1)) + 0.01 * elements.norm() + 1e-5 * weights.norm()

    return _training(objective, optimizer, steps)


def module(n: int, D: int, M: int, steps: int = 1) -> Run:
    """Training steps with the zoo's module, autograd and Adam."""
    X, y, start = _problem(n, D, M)
    network = GaussianRBFNetwork(D, 1, M, learn_centers=False, penalty="plain", reg_weights=1e-5, bias=False)
    state = {"precision_elements": start.elements[0], "centers": start.centers[0], "head.weight": start.weights[0]}
    network.load_state_dict(state, strict=False)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01, fused=True)

    def objective() -> Tensor:
        return network_loss(network(X), y) + sum(network.penalties().values())

    return _training(objective, optimizer, steps)


def solver(n: int, D: int, M: int, steps: int = 1) -> Run:
    """Training steps with the estimators' solver, including its preparation and stopping rule."""
    X, y, network = _problem(n, D, M)
    reg = torch.tensor([0.01])
    objective = Objective(X, y, torch.full((1, n), 1 / n), "cross_entropy", reg, reg / 1000, 0 * reg, "plain")

    def run() -> Tensor:
        return fit_adam(network, objective, learn_centers=False, learning_rate=0.01, max_iter=steps).history[-1, 0]

    return run


def _training(objective: Callable[[], Tensor], optimizer: torch.optim.Optimizer, steps: int) -> Run:
    """A plain training loop."""

    def run() -> Tensor:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = objective()
            loss.backward()
            optimizer.step()
        return loss.detach()

    return run


def _problem(n: int, D: int, M: int) -> tuple[Tensor, Tensor, Networks]:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(n, D, generator=generator)
    y = (X[:, :1] > 0).float()
    eye = torch.eye(D) / math.sqrt(2 * D)  # active units, to avoid slow denormal numbers
    rows, columns = torch.tril_indices(D, D)
    weights = 0.1 * torch.randn(1, 1, M, generator=generator)
    return X, y, Networks(eye[rows, columns][None], X[None, :M].clone(), weights, None, "full")


# ---- fits --------------------------------------------------------------------------------------------------


def batched_fits(B: int, together: bool) -> Run:
    """Thirty steps of B small networks (n = 150, D = 10, M = 16) on shared rows, batched or one by one."""
    generator = torch.Generator().manual_seed(0)
    n, D, M = 150, 10, 16
    X, y, one = _problem(n, D, M)
    many = Networks(
        one.elements.repeat(B, 1),
        torch.randn(B, M, D, generator=generator),
        one.weights.repeat(B, 1, 1),
        torch.zeros(B, 1),
        "full",
    )
    reg = torch.logspace(-3, -1, B)
    objective = Objective(X, y, torch.full((B, n), 1 / n), "cross_entropy", reg, 0.01 * reg, 0 * reg)
    options: dict[str, Any] = {"max_iter": 30, "tol": 0.0, "n_iter_no_change": 10**9}

    def run() -> None:
        if together:
            fit_adam(many, objective, **options)
        else:
            for i in range(B):
                fit_adam(many.one(i), objective.one(i), **options)

    return run


def estimator_fits(n: int = 10_000, D: int = 50) -> dict[str, float]:
    """Wall seconds of a default fit of each estimator on a table of n x D."""
    from zoo.estimators.grbf import GRBFClassifier, GRBFRegressor

    generator = torch.Generator().manual_seed(0)
    X = torch.randn(n, D, generator=generator)
    y = torch.sin(2 * X[:, 0]) + X[:, 1] * X[:, 2] + 0.3 * torch.randn(n, generator=generator)
    found = {}
    for learner, targets in ((GRBFClassifier, y > 0), (GRBFRegressor, y)):
        begin = time.perf_counter()
        learner(random_state=0).fit(X.numpy(), targets.numpy())
        found[learner.__name__] = time.perf_counter() - begin
    return found


# ---- the command -------------------------------------------------------------------------------------------

MEASURES = ("zoo/models/grbf.py", "zoo/estimators", "zoo/kernels/metric.py")
FORMS = {"original": original, "module": module, "solver": solver}
#: n, D, M, steps per timed call, and the promised speed-up.
SIZES = ((256, 64, 32, 10, 5.0), (1024, 64, 128, 2, 25.0), (2048, 64, 128, 1, None), (4096, 64, 128, 1, None))


@measurement("grbf", "speed", "a training step against the original formulation")
def speed(folder: Path) -> Iterator[str]:
    """Time training steps, their scaling with n, peak memory and batched fits with one thread; estimators with all."""
    threads = torch.get_num_threads()
    path = folder / "grbf_speed.csv"
    path.unlink(missing_ok=True)  # times of one run belong together
    records = Records(path, ("n", "D", "M"), tuple(f"{name}_ms" for name in FORMS))
    torch.set_num_threads(1)
    try:
        steps = yield from _steps(records)
        memory = yield from _memory()
        fits = yield from _fits()
    finally:
        torch.set_num_threads(threads)
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in estimator_fits().items())
    defaults = f"Default fits on a table of 10,000 x 50, {threads} thread(s): {seconds}"
    yield defaults
    text = (
        "## GRBF: speed\n\n`python -m zoo benchmark grbf speed`\n\nOne training step (forward, backward, fused Adam), "
        "float32, median CPU time of interleaved calls, of ten steps each at the first size and two at the second. "
        "Original: einsum over the n x M x D differences; module: `GaussianRBFNetwork` with autograd; solver: "
        f"`fit_adam`, what the estimators run, its preparation and stopping rule included. "
        f"{Provenance(records.rows, MEASURES)}\n\n{steps}\n\n{memory}. {fits}. {defaults}."
    )
    put_section(folder.parent / "RESULTS.md", "grbf speed", text)


def _steps(records: Records) -> Generator[str, None, str]:
    rows, growth = [], {}
    for n, D, M, steps, promised in SIZES:
        here = stamp()
        found = interleaved({name: make(n, D, M, steps) for name, make in FORMS.items()})
        ms = growth[n] = {name: 1e3 * seconds / steps for name, seconds in found.items()}
        records.add({"n": n, "D": D, "M": M} | {f"{name}_ms": value for name, value in ms.items()} | here)
        gains = {name: ms["original"] / ms[name] for name in ("module", "solver")}
        rows.append([f"{n}, {D}, {M}", *(f"{ms[name]:.2f}" for name in FORMS), *(f"{g:.1f}" for g in gains.values())])
        rows[-1].append(f"{promised:g}" if promised else "")
        yield f"n, D, M = {n}, {D}, {M}: " + ", ".join(f"{name} {value:.2f} ms" for name, value in ms.items()) + (
            "; " + ", ".join(f"{name} {gain:.1f} times" for name, gain in gains.items()))  # fmt: skip
    times = ", ".join(f"{name} {growth[4096][name] / growth[1024][name]:.1f}" for name in FORMS)
    times = f"Four times the rows (1024 to 4096) cost {times} times"
    yield times
    header = ["n, D, M", *(f"{name}, ms" for name in FORMS), "module, times", "solver, times", "promised"]
    return f"{markdown(header, rows)}\n\n{times}."


def _memory() -> Generator[str, None, str]:
    peaks = {name: peak_memory(__name__, name, (8, 4, 2), (1024, 64, 128)) for name in FORMS}
    found = ", ".join(f"{name} {peak:.1f} MiB" for name, peak in peaks.items())
    found = f"Peak memory at n, D, M = 1024, 64, 128, beyond a tiny problem's: {found}"
    yield found
    return found


def _fits() -> Generator[str, None, str]:
    found = interleaved({"together": batched_fits(32, True), "one by one": batched_fits(32, False)}, rounds=5, warmup=1)
    together, alone = 1e3 * found["together"], 1e3 * found["one by one"]
    text = f"32 networks (n, D, M = 150, 10, 16) together {together:.0f} ms, one by one {alone:.0f} ms: " \
           f"{alone / together:.1f} times"  # fmt: skip
    yield text
    return text
