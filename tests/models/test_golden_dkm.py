"""Deep kernel machines against numbers of the authors' code, of explicit formulas and of closed forms.

Every `dkm*` file in the folder named by the environment variable ZOO_GOLDEN_DIR (default: tests/golden) is one test.
What is checked follows from the fields of the file; a file without any known field fails, it is not skipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.learners.golden import Record, close, files, known, read, tensor
from zoo.models.dkm import (
    FlattenMix,
    Gram,
    GramConv,
    GramKernel,
    GramLayer,
    GramMean,
    GramNorm,
    GramOutput,
    GramResidual,
    InducingPatches,
    InducingPoints,
    ZCAWhitening,
    categorical_log_likelihood,
    categorical_probabilities,
    gaussian_log_likelihood,
)

FILES = files("dkm")
DD: dict[str, Any] = {"dtype": torch.float64}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"golden-{path.name}")
def test_golden_file(path: Path) -> None:
    for case in read(path)["cases"]:
        check = next((check for fields, check in KINDS if fields <= set(case)), None)
        if check is None:
            pytest.fail(f"{path.name}, {case['name']}: no known kind of case, fields {sorted(case)}")
        check(case)


def test_golden_folder_is_not_empty() -> None:
    assert FILES


# ---- states and modules of a file --------------------------------------------------------------------------


def gram(entry: Record) -> Gram:
    known(entry, Gram._fields, "a state")
    return Gram(*(tensor(entry[field]) for field in Gram._fields))


def close_gram(found: Gram, wanted: Record, what: str, tolerance: float) -> None:
    for field, value in zip(Gram._fields, found, strict=True):
        close(value.detach(), wanted[field], f"{what}, {field}", tolerance)


class AuthorsKernel(GramKernel):
    """The order of the authors' code: arguments of the arc-cosine kernels are stabilised as well."""

    def forward(self, G: Gram) -> Gram:
        if self.kind not in ("arccos0", "arccos1"):
            return super().forward(G)
        assert self.log_w is not None
        assert self.log_b is not None
        w, b = self.log_w.exp(), self.log_b.exp()
        g, t = self.stable(G.ii.diagonal()), self.stable(G.t)
        ii, ti = self._of(G.ii, g[:, None], g), self._of(G.ti, t[..., None], g)
        eye = torch.eye(len(g), dtype=torch.bool)
        ii = torch.where(eye, g, ii) if self.kind == "arccos1" else ii
        ii, ti, t = w * ii + b, w * ti + b, w * G.t + b
        return Gram(torch.where(eye, self.stable(ii.diagonal()), ii), ti, self.stable(t))

    def stable(self, diagonal: Tensor) -> Tensor:
        return diagonal * (1 + self.mult_eps) + self.abs_eps


class Fixed(nn.Module):
    """A given Gram matrix in place of whitened parameters: W = L^-1 chol(G), with the derivatives of L."""

    def __init__(self, G: Any) -> None:
        super().__init__()
        self.root = torch.linalg.cholesky(tensor(G))

    def forward(self, lower: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(lower, self.root, upper=False)


def place(parameter: nn.Parameter | None, values: Any) -> None:
    assert parameter is not None
    with torch.no_grad():
        parameter.copy_(tensor(values).reshape(parameter.shape))


def kernel_of(entry: Record, cls: type[GramKernel]) -> GramKernel:
    kernel = cls(entry["kernel"], entry["mult_eps"], entry["abs_eps"], **DD)
    if entry["log_w"] is None:
        assert kernel.log_w is None
        assert kernel.log_b is None
    else:
        place(kernel.log_w, entry["log_w"])
        place(kernel.log_b, entry["log_b"])
    return kernel


def mix_of(entry: Record) -> GramConv:
    C = tensor(entry["C_raw"])
    assert C.shape[-1] == entry["k"]
    layer = GramConv(C.shape[1], C.shape[0], entry["k"], entry["stride"], **DD)
    place(layer.weight, C)
    return layer


def norm_of(entry: Record) -> GramNorm:
    i, t = tensor(entry["i_logscale"]), tensor(entry["t_logscale"])
    modes = [entry[field] for field in ("i_norm", "t_norm", "i_scale", "t_scale")]
    norm = GramNorm(*modes, inducing=len(i), size=t.shape, **DD)
    for parameter, values in ((norm.i_logscale, i), (norm.t_logscale, t)):
        if parameter is None:
            assert not values.any()
        else:
            place(parameter, values)
    return norm


def gram_layer_of(entry: Record) -> GramLayer:
    layer = GramLayer(len(entry["G"]), entry["nu"], entry["objective"], **DD)
    layer.factor = Fixed(entry["G"])  # type: ignore[assignment]
    return layer


def output_of(entry: Record) -> GramOutput:
    mu = tensor(entry["mu"])
    tempered = entry.get("tempering", False)
    output = GramOutput(*mu.shape, entry.get("objective", "exact"), tempered=tempered, **DD)
    output.factor = Fixed(entry["A"])  # type: ignore[assignment]
    place(output.means, mu)
    output.whitened_means = lambda lower: torch.linalg.solve_triangular(  # type: ignore[method-assign]
        lower, output.means, upper=False
    )
    return output


def input_of(entry: Record) -> nn.Module:
    Z = tensor(entry["Z"])
    layer: InducingPoints | InducingPatches
    layer = (
        InducingPoints(Z.shape[1], len(Z), **DD) if Z.ndim == 2 else InducingPatches(*Z.shape[1::-1], Z.shape[-1], **DD)
    )
    place(layer.points, Z)
    return layer


FIELDS: dict[str, list[str]] = {
    "input_dense": ["Z"],
    "input_patch": ["Z", "k"],
    "kernel": ["kernel", "mult_eps", "abs_eps", "log_w", "log_b"],
    "mix": ["k", "stride", "C_raw"],
    "gram": ["nu", "G", "objective"],
    "norm": ["i_norm", "t_norm", "i_scale", "t_scale", "i_logscale", "t_logscale"],
    "residual": ["weights", "shortcut", "branch"],
    "mean": [],
    "nystrom_gap": [],
    "output": ["mu", "A", "tempering", "objective"],
}


def module_of(entry: Record, cls: type[GramKernel]) -> nn.Module:
    op = entry["op"]
    if op not in FIELDS:
        pytest.fail(f"no layer {op!r}")
    known(entry, ["op", *FIELDS[op]], op)
    if op == "residual":
        assert entry["weights"] == [0.5, 0.5]
        branch, shortcut = ([module_of(e, cls) for e in entry[side]] for side in ("branch", "shortcut"))
        return GramResidual(branch, shortcut)
    if op == "kernel":
        return kernel_of(entry, cls)
    simple: dict[str, Callable[[Record], nn.Module]] = {
        "input_dense": input_of,
        "input_patch": input_of,
        "mix": mix_of,
        "gram": gram_layer_of,
        "norm": norm_of,
        "mean": lambda _: GramMean(),
        "nystrom_gap": lambda _: GramMean(nystrom=True),
        "output": output_of,
    }
    return simple[op](entry)


# ---- parts -------------------------------------------------------------------------------------------------


def check_kernel(case: Record) -> None:
    name = case["name"]
    fields = ["kernel", "weight", "bias", "log_w", "log_b", "mult_eps", "abs_eps", "G"]
    known(case, ["name", *fields, "expected_plain", "expected_reference"], name)
    for cls, which in ((GramKernel, "plain"), (AuthorsKernel, "reference")):
        found = kernel_of(case, cls)(gram(case["G"]))
        close_gram(found, case[f"expected_{which}"], f"{name}, {which}", 1e-9)


def check_input(case: Record) -> None:
    known(case, ["name", "input", "layout", "k", "eps", "Z", "X", "X_fit", "expected"], case["name"])
    X = tensor(case["X"])
    if case["input"] == "zca":
        fit = tensor(case["X_fit"])
        whitening = ZCAWhitening(tuple(fit.shape[1:]), case["eps"], **DD).fit(fit)
        names = {"W_zca": "matrix", "mean": "mean", "std": "std", "mean_after": "mean_after", "std_after": "std_after"}
        known(case["expected"], [*names, "out"], case["name"])
        for field, buffer in names.items():
            wanted = tensor(case["expected"][field])
            scale = max(1.0, 1e-6 / float(wanted.abs().max()))  # a mean of nothing but rounding
            close(getattr(whitening, buffer), wanted, f"{case['name']}, {field}", 1e-9 * scale)
        close(whitening(X), case["expected"]["out"], case["name"], 1e-9)
        return
    if case["input"] not in ("dense", "patch"):
        pytest.fail(f"{case['name']}: no input {case['input']!r}")
    close_gram(input_of(case)(X), case["expected"], case["name"], 1e-10)


def check_conv(case: Record) -> None:
    op, K = case["op"], gram(case["K"])
    known(case, ["name", "op", "k", "stride", "C_raw", "K", "expected"], case["name"])
    layer: nn.Module
    if op == "mix":
        layer = mix_of(case)
    elif op == "mean":
        layer = GramMean()
    elif op == "nystrom_gap":
        layer = GramMean(nystrom=True)
    elif op in ("nystrom_gap_mix", "flatten_mix"):
        C = tensor(case["C_raw"])
        if op == "nystrom_gap_mix":
            layer = GramMean(True, C.shape[1], C.shape[0], **DD)
        else:
            layer = FlattenMix(K.ii.shape[0], C.shape[0], K.t.shape[1:], **DD)
        place(layer.weight, C)  # type: ignore[arg-type]
    else:
        pytest.fail(f"{case['name']}: no operation {op!r}")
    close_gram(layer(K), case["expected"], case["name"], 1e-10)


def check_norm(case: Record) -> None:
    known(case, ["name", *FIELDS["norm"], "K", "expected"], case["name"])
    close_gram(norm_of(case)(gram(case["K"])), case["expected"], case["name"], 1e-10)


def near(found: Tensor, wanted: float, what: str, absolute: float = 1e-10, relative: float = 1e-9) -> None:
    assert float(found.detach()) == pytest.approx(wanted, rel=relative, abs=absolute), what


def check_gram(case: Record) -> None:
    name, K, expected, mode = case["name"], gram(case["K"]), case["expected"], case["mode"]
    known(case, ["name", "mode", "nu", "K", "G", "E", "jitter", "columns", "whitened", "expected"], name)
    known(expected, [*Gram._fields, "penalty_exact", "penalty_taylor", "objective_reference"], name)
    known(case["whitened"], ["L", "W"], name)
    P = len(K.ii)
    close(torch.linalg.cholesky(K.ii), case["whitened"]["L"], f"{name}, L", 1e-10)
    W = tensor(case["whitened"]["W"])
    for objective in ("exact", "taylor"):
        stochastic = "jitter" in case
        divisor = P / case["columns"] if "columns" in case else 4.0
        layer = GramLayer(
            P, case["nu"], objective, stochastic=stochastic, divisor=divisor, jitter=case.get("jitter", 0.0), **DD
        )
        assert layer.factor is not None
        layer.factor.set(W)
        layer.train("E" in case)
        if "E" in case:
            E = tensor(case["E"])
            assert layer.columns == case["columns"] == E.shape[1]
            layer.noise = lambda _, E=E: E  # type: ignore[method-assign]
        elif "columns" in case:
            pytest.fail(f"{name}: columns without E")
        close_gram(layer(K), expected, f"{name}, {objective}", 1e-9)
        if "E" not in case:
            layer.train()(K)  # which keeps the penalty, that of the sample's mean
        near(layer.penalty, expected[f"penalty_{objective}"], f"{name}, {objective}")
        if objective == ("exact" if mode == "exact" else "taylor"):
            near(-layer.penalty, expected["objective_reference"], f"{name}, objective")
    if mode == "exact":
        fixed = gram_layer_of({**case, "objective": "exact"})
        close_gram(fixed(K), expected, f"{name}, given G", 1e-9)


def check_output(case: Record) -> None:
    name, K, expected = case["name"], gram(case["K"]), case["expected"]
    known(case, ["name", "K", "mu", "A", "noise_var", "y_regression", "y_class", "eps", "expected"], name)
    checked = ["mean", "var", "samples_first", "ell_gaussian_closed", "ell_gaussian_samples_reference"]
    checked += ["ell_categorical_samples_reference", "ell_categorical_quadrature", "predictive_probs_samples_reference"]
    penalties = {"sum_kl": ("exact", False), "sum_kl_tempered": ("exact", True)}
    penalties |= {"sum_taylor": ("taylor", False), "sum_taylor_tempered": ("taylor", True)}
    known(expected, [*checked, *penalties], name)
    for field, (objective, tempered) in penalties.items():
        output = output_of({**case, "objective": objective, "tempering": tempered})
        mean, var = (t.detach() for t in output(K))
        near(output.penalty, expected[field], f"{name}, {field}")
    close(mean, expected["mean"], f"{name}, mean", 1e-9)
    close(var, expected["var"], f"{name}, var", 1e-9)
    eps, y, labels, noise = (
        tensor(case["eps"]),
        tensor(case["y_regression"]),
        torch.tensor(case["y_class"]),
        case["noise_var"],
    )
    samples = mean + var.sqrt()[:, None] * eps
    close(samples[0], expected["samples_first"], f"{name}, sample", 1e-9)
    near(gaussian_log_likelihood(mean, var, y, noise), expected["ell_gaussian_closed"], f"{name}, Gaussian")
    logs = torch.distributions.Normal(samples, noise**0.5).log_prob(y).sum(-1).mean()
    near(logs, expected["ell_gaussian_samples_reference"], f"{name}, Gaussian, sampled")
    sampled = categorical_log_likelihood(mean, var, labels, eps)
    near(sampled, expected["ell_categorical_samples_reference"], f"{name}, categorical, sampled")
    close(categorical_probabilities(mean, var, eps), expected["predictive_probs_samples_reference"], name, 1e-9)
    many = torch.randn(4000, *mean.shape, generator=torch.Generator().manual_seed(0), dtype=mean.dtype)
    logs = (
        torch.log_softmax(mean + var.sqrt()[:, None] * many, -1)
        .gather(2, labels.expand(4000, -1)[..., None])
        .mean((1, 2))
    )
    allowed = 4 * float(logs.std()) / math.sqrt(len(logs)) + 1e-8
    near(categorical_log_likelihood(mean, var, labels, many), expected["ell_categorical_quadrature"], name, allowed)


# ---- networks ----------------------------------------------------------------------------------------------


def check_residual(case: Record) -> None:
    known(case, ["name", "ops", "K", "expected", "expected_plain"], case["name"])
    for cls, which in ((AuthorsKernel, "expected"), (GramKernel, "expected_plain")):
        stage = nn.Sequential(*(module_of(op, cls) for op in case["ops"]))
        expected = dict(case[which])
        penalty = expected.pop("penalty")
        close_gram(stage(gram(case["K"])), expected, f"{case['name']}, {which}", 1e-9)
        found = sum(layer.penalty for layer in stage.modules() if isinstance(layer, GramLayer))
        near(torch.as_tensor(found), penalty, f"{case['name']}, penalty")


def watch(net: nn.Sequential) -> list[Gram]:
    """The states after every layer but residual sums and the output, in order."""
    states: list[Gram] = []
    for module in net.modules():
        if not isinstance(module, nn.Sequential | GramResidual | GramOutput | Fixed):
            module.register_forward_hook(lambda _, __, state: states.append(state))
    return states


def summary(t: Tensor, wanted: Record, what: str) -> None:
    known(wanted, ["shape", "sum", "sumsq", "first6"], what)
    t = t.detach()
    assert list(t.shape) == wanted["shape"], what
    size = math.sqrt(wanted["sumsq"])
    near(t.sum(), wanted["sum"], what, 1e-9 * size)
    near(t.square().sum(), wanted["sumsq"], what)
    assert float((t.flatten()[:6] - tensor(wanted["first6"])).abs().max()) <= 1e-9 * size, what


def check_network(case: Record) -> None:
    name = case["name"]
    inputs = ["X", "y_class", "n_train", "eps", "ops"]
    known(case, ["name", "family", "depth", "nu", "layout", *inputs, "expected", "expected_plain"], name)
    for cls, which in ((AuthorsKernel, "expected"), (GramKernel, "expected_plain")):
        if which not in case:
            continue
        expected = case[which]
        known(expected, ["stages", "mean", "var", "ell_samples", "penalties", "objective", "grad_fixed_G_A"], name)
        net = nn.Sequential(*(module_of(op, cls) for op in case["ops"]))
        states = watch(net)
        mean, var = net(tensor(case["X"]))
        close(mean.detach(), expected["mean"], f"{name}, {which}, mean", 1e-9)
        close(var.detach(), expected["var"], f"{name}, {which}, var", 1e-9)
        ell = categorical_log_likelihood(mean, var, torch.tensor(case["y_class"]), tensor(case["eps"]))
        penalties = torch.stack([m.penalty for m in net.modules() if isinstance(m, GramLayer | GramOutput)])
        objective = ell - penalties.sum() / case["n_train"]
        near(ell, expected["ell_samples"], f"{name}, {which}, likelihood")
        close(penalties.detach(), expected["penalties"], f"{name}, {which}, penalties", 1e-9)
        near(objective, expected["objective"], f"{name}, {which}, objective")
        for i, wanted in enumerate(expected.get("stages", [])):
            close(states[i].ii.detach(), wanted["ii"], f"{name}, {which}, stage {i}", 1e-9)
            summary(states[i].ti, wanted["ti"], f"{name}, {which}, stage {i}, ti")
            summary(states[i].t, wanted["t"], f"{name}, {which}, stage {i}, t")
        assert len(expected.get("stages", states)) == len(states), f"{name}: {len(states)} stages"
        if "grad_fixed_G_A" in expected:
            objective.backward()
            check_gradients(net, expected["grad_fixed_G_A"], name)


def check_gradients(net: nn.Sequential, expected: Record, name: str) -> None:
    kernels = [m for m in net.modules() if isinstance(m, GramKernel)]
    mixes = [m for m in net.modules() if isinstance(m, GramConv)]
    first, last = net[0], net[-1]
    known(expected, ["Z", "mu", "log_w", "log_b", "C_raw"], name)
    close(first.points.grad, expected["Z"], f"{name}, gradient of Z", 1e-7)
    close(last.means.grad, expected["mu"], f"{name}, gradient of mu", 1e-7)
    for field in ("log_w", "log_b"):
        close(torch.stack([getattr(k, field).grad for k in kernels]), expected[field], f"{name}, {field}", 1e-7)
    assert len(mixes) == len(expected["C_raw"])
    for mix, wanted in zip(mixes, expected["C_raw"], strict=True):
        assert mix.weight.grad is not None
        entries = wanted if isinstance(wanted, dict) else {"norm": wanted[0], "first4": wanted[1]}
        (size, start) = (entries["norm"], next(v for k, v in entries.items() if k != "norm"))
        near(mix.weight.grad.norm(), size, f"{name}, C_raw", 0, 1e-7)
        assert float((mix.weight.grad.flatten()[: len(start)] - tensor(start)).abs().max()) <= 1e-7 * size


# ---- closed forms ------------------------------------------------------------------------------------------


def check_closed_form(case: Record) -> None:
    checks = {
        "deep linear": check_deep_linear,
        "kl": check_divergence,
        "optimal output layer (Gaussian likelihood)": check_optimal_output,
        "Gram layer with test points equal to inducing points": check_equal_points,
    }
    if case["model"] not in checks:
        pytest.fail(f"{case['name']}: no model {case['model']!r}")
    checks[case["model"]](case)


def check_deep_linear(case: Record) -> None:
    """The Gram matrices that maximise the joint density of a deep linear model, found by L-BFGS."""
    name, K, Y, expected = case["name"], tensor(case["K"]), tensor(case["Y"]), case["expected"]
    known(case, ["name", "model", "L", "nu", "n_outputs", "X", "K", "Y", "S", "expected"], name)
    known(expected, ["G", "log_joint", "kl_layers", "eigenvalues"], name)
    assert Y.shape[1] == case["n_outputs"]
    close(Y @ Y.mT / Y.shape[1], case["S"], f"{name}, S", 1e-9)
    values = torch.linalg.eigvals(torch.linalg.solve(K, tensor(case["S"]))).real.sort().values
    close(values, expected["eigenvalues"], f"{name}, eigenvalues", 1e-9)
    layers = [GramLayer(len(K), case["nu"], **DD) for _ in range(case["L"])]
    zero = Gram(K, K.new_zeros(1, len(K)), K.new_ones(1))

    def joint() -> tuple[Tensor, list[Gram]]:
        states = [zero]
        for layer in layers:
            states.append(layer(states[-1]))
        prior = torch.distributions.MultivariateNormal(torch.zeros(len(K), **DD), states[-1].ii)
        return prior.log_prob(Y.mT).sum() - torch.stack([layer.penalty for layer in layers]).sum(), states[1:]

    parameters = [p for layer in layers for p in layer.parameters()]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=1000, tolerance_grad=1e-11, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -joint()[0] / max(1.0, case["nu"])
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    found, states = joint()
    close(torch.stack([s.ii for s in states]).detach(), expected["G"], f"{name}, G", 1e-6)
    near(found, expected["log_joint"], f"{name}, joint density", 0, 1e-9)
    penalties = torch.stack([layer.penalty for layer in layers]).detach()
    close(penalties, expected["kl_layers"], f"{name}, penalties", 1e-5)
    exact = zero  # and at the given matrices
    for i, G in enumerate(expected["G"]):
        layer = gram_layer_of({"G": G, "nu": case["nu"], "objective": "exact"})
        exact = layer(exact)
        near(layer.penalty, expected["kl_layers"][i], f"{name}, penalty of the given G")


def check_divergence(case: Record) -> None:
    name, K, expected = case["name"], tensor(case["K"]), case["expected"]
    known(case, ["name", "model", "nu", "G", "K", "expected"], name)
    known(expected, ["kl", "taylor", "L", "W"], name)
    lower = torch.linalg.cholesky(K)
    close(lower, expected["L"], name, 1e-9)
    close(Fixed(case["G"])(lower), expected["W"], name, 1e-9)
    for objective, field in (("exact", "kl"), ("taylor", "taylor")):
        layer = gram_layer_of({**case, "objective": objective})
        layer(Gram(K, K, K.diagonal()))
        near(layer.penalty, expected[field], f"{name}, {field}")


def check_optimal_output(case: Record) -> None:
    name, K, Y, noise, expected = case["name"], gram(case["K"]), tensor(case["Y"]), case["noise_var"], case["expected"]
    known(case, ["name", "model", "kernel", "noise_var", "X", "Z", "Y", "K", "expected"], name)
    fields = ["mu", "A", "elbo_total", "elbo_per_datum", "mean_train", "log_marginal_likelihood"]
    known(expected, fields, name)
    output = GramOutput(len(K.ii), Y.shape[1], **DD)
    output.solve(K, Y, noise)
    mean, var = output(K)
    lower = torch.linalg.cholesky(K.ii)
    root = lower @ output.factor(lower)
    close((lower @ output.means).detach(), expected["mu"], f"{name}, mu", 1e-9)
    close((root @ root.mT).detach(), expected["A"], f"{name}, A", 1e-9)
    close(mean.detach(), expected["mean_train"], f"{name}, mean", 1e-9)
    elbo = len(Y) * gaussian_log_likelihood(mean, var, Y, noise) - output.penalty
    near(elbo, expected["elbo_total"], f"{name}, bound")
    near(elbo / len(Y), expected["elbo_per_datum"], f"{name}, bound per row")
    if "log_marginal_likelihood" in expected:
        near(elbo, expected["log_marginal_likelihood"], f"{name}, marginal likelihood")


def check_equal_points(case: Record) -> None:
    known(case, ["name", "model", "nu", "K", "G", "expected"], case["name"])
    layer = gram_layer_of({**case, "objective": "exact"})
    close_gram(layer(gram(case["K"])), case["expected"], case["name"], 1e-9)


KINDS: list[tuple[set[str], Callable[[Record], None]]] = [
    ({"model"}, check_closed_form),
    ({"kernel", "expected_plain"}, check_kernel),
    ({"whitened"}, check_gram),
    ({"input"}, check_input),
    ({"noise_var", "mu"}, check_output),
    ({"op"}, check_conv),
    ({"i_norm", "K"}, check_norm),
    ({"ops", "K"}, check_residual),
    ({"ops", "X"}, check_network),
]
