"""SNNK against numbers from its authors' code and from closed forms.

Every `snnk_*.json` in the folder named by the environment variable ZOO_GOLDEN_DIR (default: tests/golden) is one test.
What is checked follows from the fields of the file; a file without any known field fails, it is not skipped.
"""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from zoo.adapters import AdapterConfig, HoulsbyAdapter, SNNKAdapter, count_parameters, inject_adapters
from zoo.kernels.random_features import (
    ACTIVATIONS,
    ExpFeatures,
    OscillatoryFeatures,
    ReLUFeatures,
    arc_cosine,
    arc_cosine_variance,
    clipped_linear,
    fourier_series,
    optimal_variance_parameter,
    softmax_features,
    urf_moments,
    urf_variance,
)
from zoo.learners.ridge import Head, LeastSquares, leave_one_out
from zoo.models.snnk import SNNKFeedForward, SNNKLinear, bundle, solve_head

FOLDER = Path(os.environ.get("ZOO_GOLDEN_DIR") or Path(__file__).parents[1] / "golden")
FILES = sorted(FOLDER.glob("snnk_*"))
Record = dict[str, Any]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"golden-{path.name}")
def test_golden_file(path: Path) -> None:
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        pytest.fail(f"{path.name}: not JSON ({error})")
    checks = [check for knows, check in KINDS if knows(record)]
    if not checks:
        pytest.fail(f"{path.name}: no known kind of golden file, fields {sorted(record)}")
    for check in checks:
        check(record)


def test_golden_folder_is_not_empty() -> None:
    assert FILES, f"no snnk_* in {FOLDER}"


# ---- reading -----------------------------------------------------------------------------------------------


def drawn(spec: Record) -> Tensor:
    """The array that a key stands for, checked against what the file says of it."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(spec["key"].encode())))
    array = generator.standard_normal(spec["shape"])
    if "rule" in spec:
        assert spec["rule"] == "abs(standard_normal)+0.1"
        array = np.abs(array) + 0.1
    else:
        array = array * spec["scale"] + spec["shift"]
    if "first3" in spec:
        np.testing.assert_allclose(array.ravel()[:3], spec["first3"], rtol=1e-12)
        np.testing.assert_allclose(array.sum(), spec["sum"], rtol=1e-9, atol=1e-9)
    return torch.from_numpy(array)


def packed(value: Record) -> Tensor:
    def part(name: str) -> Tensor:
        return torch.tensor(value[name], dtype=torch.float64).reshape(value["shape"])

    return torch.complex(part("re"), part("im")) if "re" in value else part("data")


def close(found: Tensor | float, wanted: Any, record: Record, name: str, factor: float = 1.0) -> None:
    tolerance = record["meta"]["tolerance"]
    wanted = packed(wanted) if isinstance(wanted, dict) else torch.as_tensor(wanted, dtype=torch.float64)
    found = torch.as_tensor(found, dtype=wanted.dtype).detach()
    torch.testing.assert_close(
        found,
        wanted,
        rtol=factor * tolerance["rtol"],
        atol=factor * tolerance["atol"],
        msg=lambda m: f"{name}: {m}",
    )


def set_projection(features: Any, G: Tensor) -> None:
    assert features.projection.matrix.shape == G.shape
    features.projection.matrix = G


# ---- ReLU maps and layers ----------------------------------------------------------------------------------


def relu_map(G: Tensor, kwargs: Record, augmented: bool = False) -> ReLUFeatures:
    """The authors' map: their `normalize` acts on dimension 1, whatever that is."""
    known = {"constant", "normalize", "normalization_constant"}
    assert set(kwargs) <= known, f"options {sorted(set(kwargs) - known)}"
    normalize = (kwargs.get("normalization_constant") or 1.0) if kwargs.get("normalize") else None
    features = ReLUFeatures(
        G.shape[1] - augmented,
        len(G),
        constant=kwargs.get("constant", 0.0),
        normalize=normalize,
        normalize_dim=1,
        projection="iid",
        bias=augmented,
        dtype=torch.float64,
    )
    set_projection(features, G)
    return features


def check_relu(record: Record) -> None:
    inputs = {name: drawn(spec) for name, spec in record["inputs"].items()}
    for name, case in record["cases"].items():
        features = relu_map(inputs["G"], case["kwargs"])
        x = inputs[case["input"]].clone().requires_grad_()
        if "converted_weights" not in case:
            close(features(x), case["output"], record, f"{name}.output")
            continue
        layer = SNNKLinear(features, len(inputs["W"]), dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(features.encode(inputs["W"]))
        close(layer.weight, case["converted_weights"], record, f"{name}.converted_weights")
        out = layer(x)
        close(out, case["output"], record, f"{name}.output")
        (out * drawn(case["cotangent"])).sum().backward()
        close(layer.weight.grad, case["grad_weights"], record, f"{name}.grad_weights")
        close(x.grad, case["grad_x"], record, f"{name}.grad_x")
        assert sum(p.numel() for p in layer.parameters()) == case["trainable_parameters"]


# ---- universal random features as published ----------------------------------------------------------------


def check_urf(record: Record) -> None:
    inputs = {name: drawn(spec) for name, spec in record["inputs"].items()}
    xi = torch.tensor(record["xi"]["data"], dtype=torch.float64)
    for name, case in record["cases"].items():
        if "steps" in case:
            check_asymmetric_layer(record, name, case, inputs)
        elif "x_plus" in case:
            check_asymmetric_maps(record, name, case, inputs)
        elif "A=a=sin" in case.get("what", ""):
            x = inputs["x3" if len(case["output"]["shape"]) == 3 else "x2"]
            a = xi.sin()
            one = [softmax_features(x * s, g[None]) for s, g in zip(a, inputs["G"], strict=True)]
            values = a * torch.cat(one, -1) / math.sqrt(len(xi))
            if x.ndim == 3:  # the published code lacks the factor 1/2 here
                values = values * torch.exp(-0.5 * a.square() * x.square().sum(-1, keepdim=True))
            close(values, case["output"], record, name)
        else:
            pytest.fail(f"{name}: no known kind of case, fields {sorted(case)}")


def check_asymmetric_maps(record: Record, name: str, case: Record, inputs: dict[str, Tensor]) -> None:
    found = re.search(r"M(-?[\d.]+)$", name)
    M = float(case["M"] if "M" in case else found[1] if found else 0.0)
    G, W, b = inputs["G"], inputs["W"], inputs["b"]
    bare = (1 + 4 * M) ** (-G.shape[1] / 4) * len(G) ** -0.5
    x = softmax_features(inputs["x2"] * 1j, G, M) * bare
    w = softmax_features(W, G, M) * bare * torch.exp(1j * b).unsqueeze(-1)
    for side, value in (("x_plus", x), ("w_plus", w)):
        for kind in ("official", "reference"):
            close(value, case[side][kind], record, f"{name}.{side}.{kind}")
    estimate = (x @ w.mT).real * (1 + 4 * M) ** (G.shape[1] / 2)
    close(estimate, case["cos_estimate_float64"], record, f"{name}.estimate", factor=0.01)
    close((inputs["x2"] @ W.mT + b).cos(), case["target_cos"], record, f"{name}.target", factor=0.01)
    ours = OscillatoryFeatures(G.shape[1], len(G), "cos", M=M, projection="iid", dtype=torch.float64)
    set_projection(ours, G)
    close(ours(inputs["x2"]) @ ours.encode(W, b).mT, case["cos_estimate_float64"], record, f"{name}.real form", 0.01)


def check_asymmetric_layer(record: Record, name: str, case: Record, inputs: dict[str, Tensor]) -> None:
    G, M = drawn(case["projection"]), float(case["M"])
    x, d = inputs["x2"].clone().requires_grad_(), G.shape[1]
    W, b = inputs["W"] / d**0.25, inputs["b"] / d**0.25

    def side(v: Tensor, factors: tuple[complex, complex], phases: list[Tensor]) -> Tensor:
        halves = [softmax_features(v * f, G, M) * p for f, p in zip(factors, phases, strict=True)]
        return torch.cat(halves, -1) * (2 * len(G)) ** -0.5

    one = torch.ones(1, dtype=torch.complex128)
    phases = [torch.exp(s * 1j * b).unsqueeze(-1) for s in (1, -1)]
    weight = side(W, (1.0 + 0j, 1.0 + 0j), phases).requires_grad_()
    out = (side(x / d, (1j, -1j), [one, one]) @ weight.mT).real
    close(weight, case["weights"], record, f"{name}.weights")
    close(out, case["output"], record, f"{name}.output")
    (out * drawn(case["cotangent"])).sum().backward()
    close(x.grad, case["grad_x"], record, f"{name}.grad_x")
    close(weight.grad, case["grad_weights"], record, f"{name}.grad_weights")


# ---- adapters ----------------------------------------------------------------------------------------------

OWN_NAMES = (
    (r"modulating_vector$", "scale"),
    (r"adapter_down\.\d\.weights$", "layer.weight"),
    (r"adapter_down\.\d\.projection_matrix$", "layer.features.projection.matrix"),
    (r"adapter_norm_before\.", "norm."),
    (r"adapter_up\.", "up."),
    (r"attention\.output\.mh_adapter\.", "attention.output.dropout.adapters.default."),
    (r"^output\.output_adapter\.", "output.dropout.adapters.default."),
)
TIMM_NAMES = (
    (r"^attention\.output\.dense", "attn.proj"),
    (r"^intermediate\.dense", "mlp.fc1"),
    (r"^output\.dense", "mlp.fc2"),
    (r"^layernorm_before", "norm1"),
    (r"^layernorm_after", "norm2"),
    (r"^attention_adapters\.", "attn.proj_drop.adapters.default."),
    (r"^output\.dropout\.adapters", "mlp.drop2.adapters"),
)


def renamed(name: str, *tables: tuple[tuple[str, str], ...]) -> str:
    for table in tables:
        for pattern, own in table:
            name = re.sub(pattern, own, name)
    return name


def adapter_config(options: Record, m: int, r: int | None) -> AdapterConfig:
    known = {"down_sample", "ln_before", "constant", "num_rfs", "init_weights"}
    assert set(options) <= known, f"options {sorted(set(options) - known)}"
    return AdapterConfig(
        form="vector" if options.get("down_sample") is None else "bottleneck",
        num_features=options.get("num_rfs", m),
        bottleneck=options.get("down_sample") or r or 1,
        layer_norm=options.get("ln_before", False),
        constant=options.get("constant", 0.0),
        projection="iid",
    )


def check_adapters(record: Record) -> None:
    dims = record["dims"]
    inputs = {name: drawn(spec) for name, spec in record["inputs"].items()}
    for name, case in record["cases"].items():
        if "config" in case:
            check_block(record, name, case, inputs["x"])
            continue
        config = adapter_config(case["kwargs"], dims["m"], dims.get("down_sample"))
        for init in ("mam", "bert"):
            fresh = SNNKAdapter(dims["d"], AdapterConfig(**{**vars(config), "init_weights": init}), dtype=torch.float64)
            assert torch.equal(fresh(inputs["x"]), inputs["x"]), f"{name}: not the identity at the start ({init})"
        adapter = SNNKAdapter(dims["d"], config, dtype=torch.float64)
        adapter.load_state_dict({renamed(k, OWN_NAMES): drawn(v) for k, v in case["parameters"].items()})
        x = inputs["x"].clone().requires_grad_()
        out = adapter(x)
        close(out, case["output"], record, f"{name}.output")
        (out * drawn(case["cotangent"])).sum().backward()
        close(x.grad, case["grad_x"], record, f"{name}.grad_x")
        own = dict(adapter.named_parameters())
        for key, grad in case["grads"].items():
            close(own[renamed(key, OWN_NAMES)].grad, grad, record, f"{name}.grads.{key}")
        assert sum(p.numel() for p in own.values()) == case["trainable_parameters"]


def bert_layer(config: Record) -> nn.Module:
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertLayer

    options = BertConfig(
        hidden_size=config["hidden"],
        num_attention_heads=config["heads"],
        intermediate_size=config["intermediate"],
        hidden_act="gelu",
        layer_norm_eps=config["layer_norm_eps"],
        hidden_dropout_prob=config["dropout"],
        attention_probs_dropout_prob=config["dropout"],
    )
    options._attn_implementation = "eager"
    return BertLayer(options).double()


def vit_layer(config: Record) -> nn.Module:
    from timm.models.vision_transformer import Block

    width = config["hidden"]
    norm = lambda dim, **_: nn.LayerNorm(dim, config["layer_norm_eps"])  # noqa: E731
    block = Block(width, config["heads"], config["intermediate"] / width, qkv_bias=True, norm_layer=norm)
    return block.double()


def check_block(record: Record, name: str, case: Record, x: Tensor) -> None:
    config = case["config"]
    assert config["act"] == "gelu (erf)"
    assert config["dropout"] == 0
    state = {renamed(k, OWN_NAMES): drawn(v) for k, v in case["parameters"].items()}
    if any("layernorm_before" in key for key in state):
        block, table = vit_layer(config), TIMM_NAMES
        state = {renamed(k, TIMM_NAMES): v for k, v in state.items()}
        for part in ("weight", "bias"):
            split = [state.pop(f"attention.attention.{n}.{part}") for n in ("query", "key", "value")]
            state[f"attn.qkv.{part}"] = torch.cat(split)
    else:
        block, table = bert_layer(config), ()
    inject_adapters(block, adapter_config(case["adapter"], 1, None))
    block.load_state_dict(state)
    x = x.clone().requires_grad_()
    out = block(x)
    out = out[0] if isinstance(out, tuple) else out
    close(out, case["output"], record, f"{name}.output")
    (out * drawn(case["cotangent"])).sum().backward()
    close(x.grad, case["grad_x"], record, f"{name}.grad_x")
    own = dict(block.named_parameters())
    for key, grad in case["grads"].items():
        close(own[renamed(key, OWN_NAMES, table)].grad, grad, record, f"{name}.grads.{key}")
    assert {k for k, p in own.items() if p.requires_grad} == {renamed(k, OWN_NAMES, table) for k in case["grads"]}


# ---- closed forms of kernels -------------------------------------------------------------------------------


def check_arc_cosine(record: Record) -> None:
    for i, case in enumerate(record["arc_cosine"]):
        x, w = drawn(case["x"]), drawn(case["w"])
        found = {
            "E_relu_relu": arc_cosine(x, w),
            "E_step_step": arc_cosine(x, w, 0),
            "E_square": arc_cosine(x, w, 2),
            "variance": arc_cosine_variance(x, w),
            "dot": x @ w,
            "theta": ((x @ w) / (x.norm() * w.norm())).acos(),
        }
        for key, value in found.items():
            if key in case:
                close(value, case[key], record, f"arc_cosine[{i}].{key}")
        for constant, value in case.get("E_max_const", {}).items():
            close(clipped_linear(x, w, float(constant)), value, record, f"arc_cosine[{i}] at {constant}")


def check_moments(record: Record) -> None:
    for i, case in enumerate(record["urf_moments"]):
        x, w, b, omega = drawn(case["x"]), drawn(case["w"]), case["b"], case["omega"]
        z = omega * (x @ w) + b
        close(z.cos(), case["target_cos"], record, f"urf_moments[{i}].target_cos")
        close(z.sin(), case["target_sin"], record, f"urf_moments[{i}].target_sin")
        for name, wanted in case["estimators"].items():
            split, _, M = name.rpartition("_M")
            close(urf_moments(x, w, omega, split, float(M))[0], wanted["E_abs_sq"], record, f"[{i}].{name}.E_abs_sq")
            for kind in ("cos", "sin"):
                value = urf_variance(kind, x, w, b, omega, split, float(M))
                close(value, wanted[f"var_{kind}"], record, f"urf_moments[{i}].{name}.{kind}")
        close(torch.exp(x @ w + b), case["target_exp"], record, f"urf_moments[{i}].target_exp")
        for name, wanted in case.get("var_exp", {}).items():
            features = ExpFeatures(len(x), 1, M=float(name[1:]))
            bias = torch.tensor([b], dtype=torch.float64)
            close(features.variance(x[None], w[None], bias)[0, 0], wanted, record, f"urf_moments[{i}].var_exp.{name}")


OWN_ACTIVATIONS = {"erf_sqrt2": "erf"}


def check_activations(record: Record) -> None:
    for i, case in enumerate(record["urf_activation"]):
        z = drawn(case["x"]) @ drawn(case["w"]) + case["b"]
        close(z, case["preactivation"], record, f"urf_activation[{i}].preactivation")
        for name, wanted in case["f"].items():
            own = OWN_ACTIVATIONS.get(name, name)
            known = ACTIVATIONS[own]
            close(known.function(z), wanted["target"], record, f"urf_activation[{i}].{name}.target")
            if "quadrature" in wanted:
                close(known.by_frequencies(z), wanted["quadrature"], record, f"urf_activation[{i}].{name}.quadrature")
                series = fourier_series(own, 3.2, 5) if own != "gaussian" else None
                if series is not None and abs(float(z)) <= 3.2:
                    assert abs(float(series(z) - wanted["target"])) <= series.error + 1e-12


def check_optimal(record: Record) -> None:
    for i, case in enumerate(record["optimal_M"]):
        d, s = case["d"], case["s"]
        M = optimal_variance_parameter(d, s)
        close(M, case["M"], record, f"optimal_M[{i}].M")
        moment = d / 2 * math.log((1 + 4 * M) ** 2 / (1 + 8 * M)) + s / (1 + 8 * M)
        close(moment, case["log_second_moment"], record, f"optimal_M[{i}].log_second_moment")


def check_series(record: Record) -> None:
    for name, wanted in record["maclaurin"].items():
        own = ACTIVATIONS[OWN_ACTIVATIONS.get(name, name)].series
        assert len(own) >= len(wanted), f"{name}: {len(wanted)} coefficients"
        close(torch.tensor(own[: len(wanted)], dtype=torch.float64), wanted, record, f"maclaurin.{name}")


# ---- bundling ----------------------------------------------------------------------------------------------


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], len(weight), bias is not None, dtype=torch.float64)
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


def check_bundle(record: Record) -> None:
    inputs = {name: drawn({"scale": 1.0, "shift": 0.0, **spec}) for name, spec in record["inputs"].items()}
    X = inputs["X"]
    one, two = relu_map(inputs["G1"], {}), relu_map(inputs["G2"], {})
    W1, W2 = (linear(inputs[f"W{i}"]) for i in (1, 2))
    W2b, W3b = linear(inputs["W2"], inputs["b2"]), linear(inputs["W3"], inputs["b3"])
    if "pair_bundle" in record:
        case = record["pair_bundle"]
        layer = SNNKLinear(one, len(W1.weight), dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(one.encode(W1.weight))
        folded = layer.fold(W2b)
        close(folded.weight, case["folded"], record, "pair_bundle.folded")
        close(folded(X), case["output"], record, "pair_bundle.output")
        tower, head = bundle([W1, W2b], [one])
        close(head(tower(X)), case["output"], record, "pair_bundle.output of bundle()")
        torch.testing.assert_close(folded(X), W2b(layer(X)), rtol=1e-12, atol=1e-12)
    if "two_level_bundle" in record:
        case = record["two_level_bundle"]
        tower, head = bundle([W1, W2, W3b], [one, two])
        close(tower(X), case["Phi2"], record, "two_level_bundle.Phi2")
        close(head.weight, case["folded_head"], record, "two_level_bundle.folded_head")
        close(head(tower(X)), case["output"], record, "two_level_bundle.output")
        close(two.encode(W2.weight @ one.encode(W1.weight)), case["Psi2"], record, "two_level_bundle.Psi2")
    if "bias_by_augmentation" in record:
        features = relu_map(inputs["Ga"], {}, augmented=True)
        found = features(X) @ features.encode(inputs["W1"], inputs["b1"]).mT
        close(found, record["bias_by_augmentation"]["output"], record, "bias_by_augmentation.output")
    if "closed_form" in record:
        check_closed_forms(record, record["closed_form"], inputs, nn.Sequential(one, two))
    if "least_squares_conversion" in record:
        check_conversion(record, record["least_squares_conversion"], one, W1, X)


def check_closed_forms(record: Record, case: Record, inputs: dict[str, Tensor], tower: nn.Module) -> None:
    X, Y, ridge = inputs["X"], inputs["Y"], case["lambda"]
    P = tower(X)
    batches = list(zip(X.split(7), Y.split(7), strict=True))

    def solved(loss: str = "mse", penalty: float = 0.0, bias: bool = False) -> Head:
        head, _ = solve_head(tower, batches, loss, penalty, bias=bias)  # type: ignore[arg-type]
        return head

    for name, penalty in (("ridge", ridge), ("ols", 0.0)):
        head = solved(penalty=penalty)
        close(head.weight, case[name]["A"], record, f"{name}.A")
        close((head(P) - Y).square().mean(), case[name]["train_mse"], record, f"{name}.train_mse")
    head = solved(penalty=ridge, bias=True)
    close(head.weight, case["ridge_with_bias"]["A"], record, "ridge_with_bias.A")
    close(head.bias, case["ridge_with_bias"]["c"], record, "ridge_with_bias.c")
    weighted = LeastSquares(bias=False)
    weighted.add(P, Y, inputs["wt"])
    close(weighted.ridge(ridge).weight, case["weighted_ridge"]["A"], record, "weighted_ridge.A")
    system = LeastSquares(bias=False)
    system.add(P, Y)
    errors = leave_one_out(system, lambda: zip(P.split(7), Y.split(7), strict=True), [ridge])
    close(errors.errors[0], case["press"], record, "press")
    residuals = torch.stack([row_left_out(P, Y, ridge, i) for i in range(len(P))])
    close(residuals, case["leave_one_out_residuals"], record, "leave_one_out_residuals")
    close(solved("procrustes").weight, case["procrustes"]["A"], record, "procrustes.A")
    close(solved("inner_product").weight, case["inner_product_loss"]["A"], record, "inner_product_loss.A")
    wide = case["wide"]
    G = drawn({"key": wide["key"], "shape": [wide["m"], X.shape[1]], "scale": 1.0, "shift": 0.0})
    Q = relu_map(G, {})(X)
    system = LeastSquares(bias=False)
    for q, y in zip(Q.split(9), Y.split(9), strict=True):
        system.add(q, y)
    head = system.ridge()
    close(head.weight.norm(), wide["min_norm_A_frobenius"], record, "wide.min_norm_A_frobenius")
    assert (head(Q) - Y).abs().max() < wide["min_norm_max_residual_below"]
    close(system.ridge(ridge).weight[0], wide["dual_ridge_first_row"], record, "wide.dual_ridge_first_row")


def row_left_out(P: Tensor, Y: Tensor, ridge: float, i: int) -> Tensor:
    """Residual of row i under the head that is fitted without it."""
    keep = torch.arange(len(P)) != i
    system = LeastSquares(bias=False)
    system.add(P[keep], Y[keep])
    return Y[i] - system.ridge(ridge)(P[i])


def check_conversion(record: Record, case: Record, one: ReLUFeatures, W1: nn.Linear, X: Tensor) -> None:
    found = re.search(r"ridge ([\d.e+-]+)", case["what"])
    assert found, case["what"]
    system = LeastSquares(bias=False)
    target = torch.relu(W1(X))
    system.add(one(X), target)
    Psi = system.ridge(float(found[1])).weight
    close(Psi, case["Psi"], record, "least_squares_conversion.Psi")
    error = (one(X) @ Psi.mT - target).norm() / target.norm()
    close(error, case["rel_fro_fitted"], record, "least_squares_conversion.rel_fro_fitted")
    mapped = one(X) @ one.encode(W1.weight).mT
    close((mapped - target).norm() / target.norm(), case["rel_fro_map_of_weights"], record, "rel_fro_map_of_weights")


# ---- counts ------------------------------------------------------------------------------------------------


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def check_counts(record: Record) -> None:
    size = {"hidden": 768, "layers": 12, "ffn": 3072, **record.get("dims", {})}
    d, layers, ffn = size["hidden"], size["layers"], size["ffn"]
    meta = {"device": "meta"}

    def adapters(**options: Any) -> int:
        config = AdapterConfig(projection="iid", **options)
        kind = HoulsbyAdapter if config.form == "houlsby" else SNNKAdapter
        return parameters(kind(d, config, **meta))

    def first_linear(m: int) -> int:
        features = ReLUFeatures(d, m, projection="iid", bias=False, **meta)
        return parameters(SNNKFeedForward(features, ffn, d, **meta))

    def bundled(m: int) -> int:
        return parameters(nn.Linear(m, d, **meta))

    block = parameters(nn.Linear(d, ffn, **meta)) + parameters(nn.Linear(ffn, d, **meta))

    def bert() -> int:
        from transformers import BertConfig, BertModel

        with torch.device("meta"):
            return parameters(BertModel(BertConfig(hidden_size=d, num_hidden_layers=layers, intermediate_size=ffn)))

    def bitfit() -> int:
        from transformers import BertConfig, BertModel

        with torch.device("meta"):
            model = BertModel(BertConfig(hidden_size=d, num_hidden_layers=layers, intermediate_size=ffn))
        names = dict(model.named_parameters())
        return sum(p.numel() for k, p in names.items() if k.endswith(".bias"))

    def vit() -> int:
        import timm

        model = timm.create_model("vit_base_patch16_224", num_classes=0, device="meta")
        return parameters(model)

    def uptrained(each: int, k: int) -> int:
        return bert() + k * (each - block)

    def compacter(r: int, n: int) -> int:
        """Two adapters a layer; low-rank factors and biases of their own, the n x n x n products shared."""
        return 2 * layers * (2 * (d + r) + r + d) + n**3

    rules: list[tuple[str, Callable[..., int]]] = [
        (r"houlsby_r(\d+)", lambda r: 2 * layers * adapters(form="houlsby", bottleneck=r)),
        (r"pfeiffer_r(\d+)", lambda r: layers * adapters(form="houlsby", bottleneck=r)),
        (r"snnk_vector_m(\d+)_two_per_layer", lambda m: 2 * layers * adapters(num_features=m)),
        (
            r"snnk_down(\d+)_m(\d+)_two_per_layer",
            lambda r, m: 2 * layers * adapters(form="bottleneck", bottleneck=r, num_features=m),
        ),
        (r"lora_qv_r(\d+)", lambda r: layers * 2 * 2 * d * r),
        (r"lora_qkvo_r(\d+)", lambda r: layers * 4 * 2 * d * r),
        (r"vera_qv_r(\d+)", lambda r: layers * 2 * (d + r)),
        (r"ia3_k_v_ff", lambda: layers * (2 * d + ffn)),
        (r"bitfit_encoder_all_bias_with_embedding_ln_and_pooler", bitfit),
        (r"compacter_r(\d+)_n(\d+)_two_per_layer_shared_phm", compacter),
        (r"pooler_(\d+)", lambda n: parameters(nn.Linear(n, n, **meta))),
        (r"classifier_(\d+)", lambda n: parameters(nn.Linear(d, n, **meta))),
        (r"ffn_block", lambda: block),
        (r"ffn_first_linear_as_snnk_m(\d+)", first_linear),
        (r"ffn_bundled_m(\d+)", bundled),
        (r"bert_base_uncased_encoder_with_pooler", bert),
        (r"vit_b16_in21k_encoder_no_pooler", vit),
        (r"bert_uptrain_unbundled_m(\d+)_k(\d+)", lambda m, k: uptrained(first_linear(m), k)),
        (r"bert_uptrain_bundled_m(\d+)_k(\d+)", lambda m, k: uptrained(bundled(m), k)),
    ]
    for name, wanted in record["counts"].items():
        matches = [(found, rule) for pattern, rule in rules if (found := re.fullmatch(pattern, name))]
        assert matches, f"{name}: no known kind of count"
        found, rule = matches[0]
        assert rule(*map(int, found.groups())) == wanted, name


def test_counts_of_an_injected_encoder() -> None:
    """What `count_parameters` says agrees with the golden rule of two adapters a layer."""
    model = nn.Sequential(*(bert_layer({"hidden": 24, "heads": 2, "intermediate": 48, "layer_norm_eps": 1e-12,
                                        "dropout": 0.0}) for _ in range(3)))  # fmt: skip
    inject_adapters(model, AdapterConfig(num_features=5))
    assert count_parameters(model)[:3] == (3 * 2 * (24 * 5 + 24), 0, 3 * 2 * 24 * 5)


KINDS: list[tuple[Callable[[Record], bool], Callable[[Record], None]]] = [
    (lambda r: "inputs" in r and {"G", "W"} <= r["inputs"].keys() and "xi" not in r and "cases" in r, check_relu),
    (lambda r: "xi" in r and "cases" in r, check_urf),
    (lambda r: "cases" in r and any("parameters" in c for c in r["cases"].values()), check_adapters),
    (lambda r: "arc_cosine" in r, check_arc_cosine),
    (lambda r: "urf_moments" in r, check_moments),
    (lambda r: "urf_activation" in r, check_activations),
    (lambda r: "optimal_M" in r, check_optimal),
    (lambda r: "maclaurin" in r, check_series),
    (
        lambda r: bool(
            {"pair_bundle", "two_level_bundle", "bias_by_augmentation", "closed_form", "least_squares_conversion"}
            & r.keys()
        ),
        check_bundle,
    ),
    (lambda r: "counts" in r, check_counts),
]
