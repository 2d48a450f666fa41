"""KCL and GKCL against numbers computed by the authors' functions and by independent formulas, in float64.

Every `kcl*.json` and `gkcl*.json` in the folder named by the environment variable ZOO_GOLDEN_DIR (default:
tests/golden) is one test. What is checked follows from the fields of its records; a record with an unknown set of
fields fails, it is not skipped. Inputs are made from the recipes in the records, whatever their sizes are.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.data.task_streams import PermutedTasks, RotatedTasks, SplitTasks, rotation_degrees
from zoo.kernels.random_features import GaussianNet, VariationalRandomFeatures, diagonal_gaussian_kl
from zoo.learners.kernel_ridge import KernelRidgeHead
from zoo.models.continual import KCL, MLP, ReducedResNet, choose_per_class, normalise_features
from zoo.models.continual.losses import replay_weight, supervised_contrastive
from zoo.models.continual.vae import categorical_kl_uniform, log_normal, reconstruction_loss
from zoo.tasks.continual import Recipe, continual_metrics, per_sample_mean

FOLDER = Path(os.environ.get("ZOO_GOLDEN_DIR") or Path(__file__).parents[1] / "golden")
FILES = sorted({*FOLDER.glob("kcl*.json"), *FOLDER.glob("gkcl*.json")})
Record = dict[str, Any]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"golden-{path.name}")
def test_golden_file(path: Path) -> None:
    content = json.loads(path.read_text())
    records = [(key, record) for key, value in content.items() for record in records_of(value)]
    assert records, f"{path.name} has no records"
    for key, record in records:
        known = [check for fields, check in KINDS if fields <= record.keys()]
        if all(isinstance(value, int) for value in record.values()):
            known = [check_counts]
        if not known:
            pytest.fail(f"{path.name}, {key}: no known kind of record, fields {sorted(record)}")
        known[0](record)


def test_golden_folder_is_not_empty() -> None:
    assert FILES, f"no kcl*.json in {FOLDER}"


def records_of(value: Any) -> list[Record]:
    if isinstance(value, dict):
        return [value]
    return [record for record in value if isinstance(record, dict)] if isinstance(value, list) else []


# ---- numbers from a seed -----------------------------------------------------------------------------------


def uniform(seed: int, *shape: int) -> Tensor:
    u, values = seed % 2**32, []
    for _ in range(math.prod(shape)):
        u = (1664525 * u + 1013904223) % 2**32
        values.append(u / 2**32)
    return torch.tensor(values, dtype=torch.float64).view(shape)


def symmetric(seed: int, *shape: int) -> Tensor:
    return 2 * uniform(seed, *shape) - 1


def labels_from(seed: int, n: int, classes: int) -> Tensor:
    return (classes * uniform(seed, n)).floor().long()


def normal(seed: int, *shape: int) -> Tensor:
    return math.sqrt(3) * symmetric(seed, *shape)


def close(found: Any, wanted: Any, name: str, rtol: float = 1e-8) -> None:
    found = torch.as_tensor(found, dtype=torch.float64).detach()
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=rtol / 100, msg=lambda m: f"{name}: {m}")


# ---- kernel ridge regression -------------------------------------------------------------------------------


def head_of(kernel: str, recipe: Record) -> KernelRidgeHead:
    width = recipe.get("kernel_param")
    width = width if isinstance(width, int | float) else None
    head = KernelRidgeHead(kernel, lambda_init=recipe["lambda_raw"], width=width, dtype=torch.float64)
    with torch.no_grad():
        head.gamma.fill_(recipe["gamma"])
        head.beta.fill_(recipe["beta"])
    return head


def random_features_of(seed: int, d: int, D: int) -> tuple[VariationalRandomFeatures, Tensor, Tensor, Tensor]:
    """The module, and the spectral basis with its mean and log-variance, of recipe seed `seed`."""
    module = VariationalRandomFeatures(d, D, variational=False, dtype=torch.float64)
    module.phase.copy_(2 * math.pi * uniform(seed + 7, D))
    mean, log_variance = 0.5 * symmetric(seed + 4, d), symmetric(seed + 5, d)
    return module, module.sample(mean, log_variance, normal(seed + 6, D, d)), mean, log_variance


def check_ridge(record: Record) -> None:
    r = record["recipe"]
    q, N, Q, d, C = (r[k] for k in ("seed", "N", "Q", "d", "C"))
    support, queries = uniform(q, N, d), uniform(q + 1, Q, d)
    ys = torch.tensor(record["support_labels"])
    generated = torch.arange(N) % C if r.get("support_labels", "cyclic") == "cyclic" else labels_from(q + 2, N, C)
    assert torch.equal(ys, generated)
    yq = labels_from(q + 3, Q, C)
    assert yq.tolist() == record["query_labels"]
    if record["kernel"] == "rff":
        features, basis, _, _ = random_features_of(q, d, r["kernel_param"]["D"])
        support, queries = features.features(support, basis), features.features(queries, basis)
    head = head_of(record["kernel"], r)
    K = head.kernel(support)
    close(head.ridge(), record["lambda_eff"], "lambda_eff")
    close(K.trace(), record["K_trace"], "K_trace")
    close(K[0], record["K_first_row"], "K_first_row")
    solution = head.solve(support, ys, 0, C)
    close(solution.alpha, record["alpha"], "alpha")
    logits = head.predict(queries, solution)
    close(logits, record["logits"], "logits")
    assert logits.argmax(-1).tolist() == record["pred"]
    loss = F.cross_entropy(logits, yq)
    close(loss, record["ce"], "ce")
    loss.backward()
    for ours, theirs in (("lam", "d_lambda_raw"), ("gamma", "d_gamma"), ("beta", "d_beta")):
        close(getattr(head, ours).grad[0], record[theirs], theirs)
    single = KernelRidgeHead.solve(head.float(), support.float(), ys, 0, C)
    close(head.predict(queries.float(), single), record["logits"], "logits in float32", rtol=2e-3)


def check_masked(record: Record) -> None:
    r = record["recipe"]
    q, active = r["seed"], torch.tensor(r["active"])
    n, C = len(active), r["C"]
    support, queries = uniform(q, r["N"], r["d"]), uniform(q + 1, r["Q"], r["d"])
    ys, yq = active[torch.arange(r["N"]) % n], active[labels_from(q + 3, r["Q"], n)]
    assert (ys.tolist(), yq.tolist()) == (record["support_labels"], record["query_labels"])
    head = head_of(record["kernel"], r)
    columns = torch.zeros(C, dtype=torch.bool)
    columns[active] = True
    unmasked = head.predict(queries, head.solve(support, ys, 0, C))
    masked = head(support, ys, queries, 0, columns)
    close(unmasked, record["logits_unmasked"], "logits_unmasked")
    assert bool((unmasked[:, ~columns] == head.beta[0]).all())
    close(F.cross_entropy(masked, yq), record["ce_masked"], "ce_masked")
    places = torch.searchsorted(active, yq)
    close(F.cross_entropy(unmasked[:, active], places), record["ce_active_only"], "ce_active_only")
    assert masked.argmax(-1).tolist() == record["pred"]


def check_features(record: Record) -> None:
    r = record["recipe"]
    q, n, d, D = (r[k] for k in ("seed", "n", "d", "D"))
    z = 3 * symmetric(q, n, d)
    minmax = normalise_features(z, "minmax_batch")
    close(minmax, record["minmax"], "minmax")
    close(minmax.mean(0), record["minmax_mean"], "minmax_mean")
    close(normalise_features(z, "l2"), record["l2"], "l2")
    features, basis, mean, log_variance = random_features_of(q, d, D)
    close(basis[0], record["W_row0"], "W_row0")
    close(features.features(minmax, basis), record["phi"], "phi")
    prior = 0.3 * symmetric(q + 8, d), 0.5 * symmetric(q + 9, d)
    close(diagonal_gaussian_kl(mean, log_variance, *prior), record["kl"], "kl")


# ---- generator and contrastive loss ------------------------------------------------------------------------


def check_elbo(record: Record) -> None:
    r = record["recipe"]
    q, n, dx, dz, C = (r[k] for k in ("seed", "n", "dx", "dz", "C"))
    x, logits = uniform(q, n, dx), 2 * symmetric(q + 1, n, dx)
    mean, log_variance = symmetric(q + 2, n, dz), symmetric(q + 3, n, dz)
    y = labels_from(q + 4, n, C)
    assert y.tolist() == record["cond"]
    prior = symmetric(q + 5, C, dz)[y], 0.5 * symmetric(q + 6, C, dz)[y]
    standard = torch.zeros_like(mean), torch.zeros_like(mean)
    z = mean + normal(q + 7, n, dz) * (0.5 * log_variance).exp()
    rec = reconstruction_loss(logits, x)
    kl, kl_standard = (diagonal_gaussian_kl(mean, log_variance, *p) for p in (prior, standard))
    found = {
        "z": z,
        "bce_sum": rec,
        "sq_sum": 2 * reconstruction_loss(logits, x, "gaussian"),
        "kl_standard": kl_standard,
        "kl_class_prior": kl,
        "neg_elbo_bce_class": (rec + r["beta"] * kl).mean(),
        "neg_elbo_bce_standard": (rec + r["beta"] * kl_standard).mean(),
        "cat_kl_uniform": categorical_kl_uniform(symmetric(q + 8, n, C)),
        "logq_minus_logp_mc": log_normal(z, mean, log_variance) - log_normal(z, *prior),
    }
    check_all(found, record, {"recipe", "cond"})


def check_all(found: dict[str, Any], record: Record, others: set[str]) -> None:
    unknown = record.keys() - found.keys() - others
    assert not unknown, f"fields that nothing checks: {sorted(unknown)}"
    for name in found.keys() & record.keys():
        close(found[name], record[name], name)


def check_contrastive(record: Record) -> None:
    r = record["recipe"]
    z = symmetric(r["seed"], r["n"], r["d"]).requires_grad_()
    y = torch.tensor(record["labels"])
    assert r.get("labels") != "lcg" or torch.equal(y, labels_from(r["seed"] + 1, r["n"], r["C"]))
    anchors = supervised_contrastive(z, y, r["tau"], reduce=False)
    for found, wanted in zip(anchors.tolist(), record["per_anchor"], strict=True):
        if wanted is None:
            assert math.isnan(found)
        else:
            close(found, wanted, "per_anchor")
    loss = supervised_contrastive(z, y, r["tau"])
    close(loss, record["loss"], "loss")
    (gradient,) = torch.autograd.grad(loss, z)
    close(gradient.norm(), record["grad_norm"], "grad_norm")
    close(gradient[0], record["grad_row0"], "grad_row0")


def check_replay_weight(record: Record) -> None:
    w = replay_weight(record["task"] - 1)
    close(w, record["weight_current"], "weight_current")
    close(w * record["loss_current"] + (1 - w) * record["loss_replay"], record["weighted"], "weighted")


# ---- metrics, schedules, streams ---------------------------------------------------------------------------


def check_metrics(record: Record) -> None:
    matrix = torch.tensor(record["matrix"], dtype=torch.float64)
    if "recipe" in record:
        T = record["recipe"]["T"]
        torch.testing.assert_close(
            matrix, (0.5 + 0.5 * uniform(record["recipe"]["seed"], T, T)).mul(1e4).round().div(1e4).tril()
        )
    found = continual_metrics(matrix)
    found["forgetting_max_including_last"] = found.pop("forgetting")
    found["forgetting_max_before_last"] = continual_metrics(matrix, "max_before_last")["forgetting"]
    above = continual_metrics(matrix + torch.ones_like(matrix).triu(1))
    assert above["average_accuracy"] == found["average_accuracy"], "entries above the diagonal were read"
    check_all(found, record, {"name", "recipe", "matrix"})


def check_batches(record: Record) -> None:
    values = torch.tensor(record["batch_acc"], dtype=torch.float64)
    close(per_sample_mean(values, torch.tensor(record["batch_sizes"])), record["per_sample"], "per_sample")
    close(values.mean(), record["mean_of_batches"], "mean_of_batches")


def check_rates(record: Record) -> None:
    recipe = Recipe(lr=record["lr0"], decay=record["gamma"])
    close([recipe.rate(t) for t in range(len(record["lrs"]))], record["lrs"], "lrs")


def images(*shape: int) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float64).view(shape)


def check_rotation(record: Record) -> None:
    degrees = rotation_degrees(uniform(record["seed"], len(record["degrees"])))
    close(degrees, record["degrees"], "degrees")
    part = images(1, 1, 3, 3), torch.zeros(1, dtype=torch.long)
    assert len(RotatedTasks(part, part, len(degrees), degrees=degrees)) == len(degrees)


def check_permutation(record: Record) -> None:
    pixels = record.get("pixels", 784)
    order = uniform(record["seed"], pixels).argsort(stable=True)
    part = images(1, 1, 1, pixels), torch.zeros(1, dtype=torch.long)
    orders = torch.arange(pixels).repeat(record["task"], 1)
    orders[-1] = order
    stream = PermutedTasks(part, part, record["task"], permutations=orders)
    shown = stream[record["task"] - 1].train[0].flatten().long()
    assert shown[:10].tolist() == record["first10"]
    assert shown[-5:].tolist() == record["last5"]
    assert int((shown * torch.arange(1, pixels + 1)).sum()) == record["checksum"]
    assert torch.equal(stream[0].train[0].flatten().long(), torch.arange(pixels))


def check_coreset(record: Record) -> None:
    labels = torch.tensor(record["labels"])
    chosen = choose_per_class(labels, record["per_class"], shuffle=False)
    assert chosen.tolist() == record["indices_first_k"]
    assert len(chosen) == record["size"]
    drawn = choose_per_class(labels, record["per_class"], torch.Generator().manual_seed(0))
    assert torch.equal(labels[drawn].sort().values, labels[chosen].sort().values)


def check_split(record: Record) -> None:
    task, classes = record["task"], record["classes"]
    labels = torch.arange(task * len(classes))
    part = images(len(labels), 1, 1, 1), labels
    assert SplitTasks(part, part, classes_per_task=len(classes))[task - 1].classes == classes


def check_counts(record: Record) -> None:
    for name, wanted in record.items():
        numbers = [int(n) for n in re.findall(r"\d+", name)]
        module: Any
        if name.startswith("kcl_mlp_backbone"):
            module = [MLP(784, 256)] if not numbers else [MLP(numbers[0], numbers[1])]
        elif name.startswith("kcl_mlp") and "posterior" in name:
            module = [MLP(numbers[0], numbers[1]), GaussianNet(numbers[1]), GaussianNet(numbers[1])]
        elif name.startswith("inference_block"):
            module = [GaussianNet(numbers[0]).mean]
        elif name.startswith("amortized"):
            module = [GaussianNet(numbers[0])]
        elif "cifar" in name or "resnet" in name:
            module = [ReducedResNet(second_conv=True)]
            module += [GaussianNet(160), GaussianNet(160)] if "posterior" in name else []
        else:
            pytest.fail(f"no known module has the parameter count {name!r}")
        assert sum(p.numel() for m in module for p in m.parameters()) == wanted, name


# ---- training steps ----------------------------------------------------------------------------------------


def check_steps(record: Record) -> None:
    r, kernel = record["recipe"], record["kernel"]
    q, din, H, C, N, Q, D = (r[k] for k in ("seed", "din", "hidden", "C", "N", "Q", "D"))
    width = r.get("kernel_param")
    model = KCL(
        C, din, 1, tasks=1, hidden=H, kernel=kernel, width=width if isinstance(width, int | float) else None,
        drop_rate=0.0, feature_norm="minmax_batch", num_bases=D, tau=r["tau"], dtype=torch.float64,
    )  # fmt: skip
    model.load_state_dict(step_state(model, q, din, H, D, kernel), strict=False)
    images, labels = uniform(q + 4, N, din)[..., None, None], torch.arange(N) % C
    x, y = uniform(q + 5, Q, din)[..., None, None], labels_from(q + 6, Q, C)
    eps = normal(q + 8, D, H) if kernel == "rff" else None
    optimizer = torch.optim.SGD(model.parameters(), lr=r["lr"], momentum=r["momentum"])
    head, found = model.head, []

    def losses() -> tuple[Tensor, Tensor]:
        terms = model.train().support_losses(x, y, images, labels, 0, eps)
        kl = terms.get("kl", torch.zeros(())) / (r["tau"] or 1)
        return torch.stack(list(terms.values())).sum(), kl

    for step in range(len(record["losses"])):
        optimizer.zero_grad()
        loss, kl = losses()
        loss.backward()
        found.append(loss.item())
        if step == 0:
            close(kl, record["kl0"], "kl0")
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            close(torch.nn.utils.get_total_norm(gradients), record["grad_norm0"], "grad_norm0")
            close(
                [p.grad.item() for p in (head.lam, head.gamma, head.beta)], record["grad_lambda_gamma_beta0"], "grads"
            )
            with torch.no_grad():
                close(step_logits(model, x, images, labels, eps), record["logits0"], "logits0")
        optimizer.step()
    close(found[0], record["loss0"], "loss0")
    close(found, record["losses"], "losses", rtol=1e-6)
    close(losses()[0], record["final_loss"], "final_loss", rtol=1e-6)
    close([p.item() for p in (head.lam, head.gamma, head.beta)], record["final_lambda_gamma_beta"], "final", rtol=1e-6)
    close(model.backbone[1].weight[0], record["final_W1_row0"], "final_W1_row0", rtol=1e-6)  # type: ignore[index]
    close(model.backbone[4].bias, record["final_b2"], "final_b2", rtol=1e-6)  # type: ignore[index]


def step_state(model: KCL, q: int, din: int, H: int, D: int, kernel: str) -> dict[str, Tensor]:
    state = {
        "backbone.1.weight": 0.6 * symmetric(q, H, din),
        "backbone.1.bias": 0.1 * symmetric(q + 1, H),
        "backbone.4.weight": 0.6 * symmetric(q + 2, H, H),
        "backbone.4.bias": 0.1 * symmetric(q + 3, H),
    }
    if kernel == "rff":
        state["random_features.phase"] = 2 * math.pi * uniform(q + 7, D)
        for b, name in enumerate(("posterior.mean", "posterior.log_variance", "prior.mean", "prior.log_variance")):
            for j in range(3):
                place = f"random_features.{name}.{2 * j}"
                state[f"{place}.weight"] = 0.5 * symmetric(q + 20 + 10 * b + 2 * j, H, H)
                state[f"{place}.bias"] = 0.1 * symmetric(q + 21 + 10 * b + 2 * j, H)
    missing = set(state) - set(model.state_dict())
    assert not missing, missing
    return state


def step_logits(model: KCL, x: Tensor, images: Tensor, labels: Tensor, eps: Tensor | None) -> Tensor:
    zq, zs = model.forward_features(x), model.forward_features(images)
    if eps is not None:
        features = model.random_features
        basis = features.sample(*features.posterior(zs), eps)
        zq, zs = features.features(zq, basis), features.features(zs, basis)
    return model.head(zs, F.one_hot(labels, model.num_classes).double(), zq)


KINDS: list[tuple[set[str], Callable[[Record], None]]] = [
    ({"recipe", "alpha", "logits"}, check_ridge),
    ({"recipe", "ce_masked"}, check_masked),
    ({"recipe", "minmax", "phi"}, check_features),
    ({"recipe", "cond", "bce_sum"}, check_elbo),
    ({"recipe", "per_anchor"}, check_contrastive),
    ({"weight_current", "weighted"}, check_replay_weight),
    ({"matrix"}, check_metrics),
    ({"batch_sizes", "batch_acc"}, check_batches),
    ({"lr0", "gamma", "lrs"}, check_rates),
    ({"seed", "degrees"}, check_rotation),
    ({"task", "seed", "first10", "checksum"}, check_permutation),
    ({"labels", "per_class", "indices_first_k"}, check_coreset),
    ({"task", "classes"}, check_split),
    ({"recipe", "losses", "final_loss"}, check_steps),
]
