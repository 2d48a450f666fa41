"""Terminator against numbers computed by the author's code, or, in 1-D, by plain loops over the formulas.

Every `terminator*.json` and `terminator*.npz` in the folder named by the environment variable ZOO_GOLDEN_DIR (default:
tests/golden) is one test. What is checked follows from the fields of the file; a file or a field that is not understood
fails. Weights and inputs are drawn from generators seeded by their names. An npz describes the network of the JSON file
of the same folder that it fits.
"""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.models.terminator import SlowFastBlock, Terminator
from zoo.ops import hyperzzw as ops
from zoo.ops.pointwise import pointwise_conv
from zoo.ops.standardise import batch_standardise, group_standardise, instance_standardise
from zoo.optim.kar import Kar2, Kar3, chained_factor

FOLDER = Path(os.environ.get("ZOO_GOLDEN_DIR") or Path(__file__).parents[1] / "golden")
FILES = sorted([*FOLDER.glob("terminator*.json"), *FOLDER.glob("terminator*.npz")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"golden-{path.name}")
def test_golden_file(path: Path) -> None:
    if path.suffix == ".npz":
        arrays = dict(np.load(path))
        if "logits" in arrays:
            check_arrays(path, arrays)
        elif "global_kernel" in arrays:
            check_modules(path, arrays)
        else:
            pytest.fail(f"{path.name}: no known kind of golden file, arrays {sorted(arrays)}")
        return
    record = json.loads(path.read_text())
    if "config" in record:
        check_network(record)
    elif any(key.startswith(("kar", "lr_factor")) for key in record):
        check_optimizers(record)
    elif all("inputs" in value and "outputs" in value for key, value in record.items() if key[0] != "_"):
        check_operators(record)
    else:
        pytest.fail(f"{path.name}: no known kind of golden file, fields {sorted(record)}")


def test_golden_folder_is_not_empty() -> None:
    assert FILES, f"no terminator* in {FOLDER}"


# ---- the recipe of weights and inputs ----------------------------------------------------------------------


def generator(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))


def draw(name: str, shape: Any) -> np.ndarray:
    return generator(name).standard_normal(tuple(shape))


def fill(model: nn.Module, prefix: str = "") -> nn.Module:
    with torch.no_grad():
        for key, value in model.state_dict().items():
            n = draw(prefix + key, value.shape)
            if re.search(r"filters\.\d+\.weight$", key):
                n = 6 * n
            elif re.search(r"filters\.\d+\.bias$", key):
                n = 0.3 * n
            elif key.endswith(".weight"):
                n = n / math.sqrt(value.shape[1])
            elif re.search(r"(mix|ctx_mix)\.\d+\.bias$", key) and "local_mix" not in key:
                n = 1 + 0.1 * n
            else:
                n = 0.1 * n
            value.copy_(torch.from_numpy(np.asarray(n)))
    return model


KNOWN = {
    "channels", "factors", "size", "num_classes", "g_hidden", "g_layers", "l_hidden", "l_layers", "l_sizes",
    "c_hidden", "c_layers", "hc_hidden", "hc_layers", "hs_hidden", "hs_layers",
}  # fmt: skip


def build(record: dict[str, Any], dtype: torch.dtype = torch.float64) -> Terminator:
    config = record["config"]
    assert set(config) <= KNOWN, f"unknown options {set(config) - KNOWN}"
    dims = [c * f for c, f in zip(config["channels"], config["factors"], strict=True)]
    assert dims[:-1] == config["channels"][1:]
    names = {"g": "global", "l": "local", "c": "hci", "hc": "hi_channel", "hs": "hi_spatial"}
    model = Terminator(
        in_chans=config["channels"][0],
        num_classes=config["num_classes"],
        img_size=config["size"],
        dims=dims,
        local_sizes=config["l_sizes"],
        hidden={name: config[f"{short}_hidden"] for short, name in names.items()},
        layers={name: config[f"{short}_layers"] for short, name in names.items()},
        dtype=dtype,
    )
    model = fill(model, record.get("key_prefix_for_crc", ""))
    return model.eval()  # type: ignore[return-value]


def parse_input(record: dict[str, Any], dtype: torch.dtype = torch.float64) -> Tensor:
    """From a description such as `input:net_small shape (4,3,12,12)`."""
    name, _, shape = record["input"].partition(" shape ")
    sizes = [int(n) for n in re.findall(r"\d+", shape)]
    assert sizes[0] == record["batch"]
    return torch.from_numpy(draw(name, sizes)).to(dtype)


def close(got: Tensor | float, want: Any, tol: float, name: str = "") -> None:
    """Within `tol` of the largest expected value."""
    got = got.detach().double().numpy() if isinstance(got, Tensor) else np.asarray(got)
    want = np.asarray(want, dtype=float)
    assert got.shape == want.shape, name
    np.testing.assert_allclose(got, want, rtol=0, atol=tol * max(abs(want).max(initial=0), 1e-300), err_msg=name)


# ---- whole networks ----------------------------------------------------------------------------------------

FIELDS = {
    "config", "mode", "batch", "input", "labels", "key_prefix_for_crc", "num_params", "keys", "logits", "losses",
    "grad_norm_of_total", "keys_with_zero_data_gradient", "block_output_summary", "kar3_three_steps",
    "logits_first_half_of_batch_alone",
}  # fmt: skip


def check_network(record: dict[str, Any]) -> None:
    assert {k for k in record if k[0] != "_"} <= FIELDS, f"unknown fields {set(record) - FIELDS}"
    assert record["mode"].startswith("eval")
    model, x = build(record), parse_input(record)
    labels = torch.tensor(record["labels"])
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == record["keys"]
    assert sum(p.numel() for p in model.parameters()) == record["num_params"]

    logits = model(x)
    close(logits, record["logits"], 1e-9, "logits")
    check_losses(model, logits, labels, record["losses"])
    check_gradients(model, logits, labels, record)
    with torch.no_grad():
        check_blocks(model.block_maps(x), record.get("block_output_summary", []))
        if "logits_first_half_of_batch_alone" in record:
            first = max(2, record["batch"] // 2)
            close(model(x[:first]), record["logits_first_half_of_batch_alone"], 1e-9, "half a batch")
    if "kar3_three_steps" in record:
        check_steps(model, x, labels, record["kar3_three_steps"])

    single = build(record, torch.float32)
    with torch.no_grad():
        close(single(x.float()), record["logits"], 2e-5, "float32")


def total_loss(model: Terminator, logits: Tensor, labels: Tensor) -> Tensor:
    data = F.cross_entropy(logits, labels, label_smoothing=0.09)
    return data + sum(model.aux_losses().values())


def check_losses(model: Terminator, logits: Tensor, labels: Tensor, losses: dict[str, float]) -> None:
    kernels = model.global_kernels()
    total = total_loss(model, logits, labels)
    for name, want in losses.items():
        if name.startswith("label_smoothing_ce_eps"):
            epsilon = float(name.removeprefix("label_smoothing_ce_eps").replace("_", "."))
            got = F.cross_entropy(logits, labels, label_smoothing=epsilon)
        elif name.startswith("slow_"):
            got = ops.slow_loss(kernels, name.removeprefix("slow_"))
        elif name.startswith("reg_"):
            got = model.weight_norms() * float(name.removeprefix("reg_").replace("_", "-"))
        elif name == "total":
            got = total
        else:
            pytest.fail(f"unknown loss {name}")
        close(got.item(), want, 1e-9, name)


def check_gradients(model: Terminator, logits: Tensor, labels: Tensor, record: dict[str, Any]) -> None:
    dead = record["keys_with_zero_data_gradient"]
    params = dict(model.named_parameters())
    data = F.cross_entropy(logits, labels, label_smoothing=0.09)
    grads = dict(zip(params, torch.autograd.grad(data, params.values(), retain_graph=True), strict=True))
    for name in dead:
        assert grads[name].norm() < 1e-12, name
    model.zero_grad()
    total_loss(model, logits, labels).backward()
    assert set(record["grad_norm_of_total"]) == set(params)
    for name, want in record["grad_norm_of_total"].items():
        if want > 1e-12:
            got = params[name].grad.norm().item()
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-15, err_msg=name)


def check_blocks(maps: list[Tensor], summaries: list[dict[str, Any]]) -> None:
    for i, (value, summary) in enumerate(zip(maps, summaries, strict=False)):
        found: dict[str, Callable[[], Any]] = {
            "shape": lambda v=value: list(v.shape),
            "mean": lambda v=value: v.mean().item(),
            "std": lambda v=value: v.std(correction=0).item(),
            "absmax": lambda v=value: v.abs().max().item(),
        }
        for field, want in summary.items():
            assert field in found, f"unknown field {field}"
            if field == "std":  # the record does not say which divisor it used
                either = [value.std(correction=c).item() for c in (0, 1)]
                assert min(abs(s - want) for s in either) < 1e-9 * want, f"block {i}"
            else:
                np.testing.assert_allclose(found[field](), want, rtol=1e-9, err_msg=f"block {i} {field}")


def check_steps(model: Terminator, x: Tensor, labels: Tensor, record: dict[str, Any]) -> None:
    optimizer = Kar3(model.parameters(), lr=record["lr"], betas=tuple(record["betas"]))
    for want in record["losses_before_each_step"]:
        optimizer.zero_grad()
        loss = total_loss(model, model(x), labels)
        close(loss.item(), want, 1e-8, "loss")
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        close(model(x), record["logits_after"], 1e-8, "logits after the steps")


# ---- arrays of a network, and its modules ------------------------------------------------------------------


@cache
def networks() -> list[tuple[Path, dict[str, Any]]]:
    records = [(path, json.loads(path.read_text())) for path in sorted(FOLDER.glob("terminator*.json"))]
    return [(path, record) for path, record in records if "config" in record]


def check_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    fitting = [r for p, r in networks() if p.stem == path.stem] or [
        r for _, r in networks() if np.shape(r["logits"]) == arrays["logits"].shape
        and np.allclose(r["logits"], arrays["logits"])
    ]  # fmt: skip
    assert fitting, f"no network in {FOLDER} has the logits of {path.name}"
    record = fitting[0]
    model, x = build(record), parse_input(record)
    logits = model(x)
    total_loss(model, logits, torch.tensor(record["labels"])).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    with torch.no_grad():
        maps = model.block_maps(x)
    for name, want in arrays.items():
        tol = 1e-9 if want.dtype == np.float64 else 2e-7  # rounded copies
        if name == "logits":
            got = logits
        elif found := re.fullmatch(r"block(\d+)_out", name):
            got = maps[int(found[1])][: len(want)]
        elif found := re.fullmatch(r"global_kernel(\d+)", name):
            got = model.global_kernels()[int(found[1])]
        elif name.startswith("grad/"):
            got, tol = grads[name.removeprefix("grad/")], max(tol, 1e-6 if "bottleneck.bias" in name else tol)
        else:
            pytest.fail(f"unknown array {name}")
        close(got, want, tol, name)


def check_modules(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Single modules of block 2 (and block 4) of a network."""
    chans, size = arrays["global_kernel"].shape[1:3]
    sizes = {
        int(k.removeprefix("local_kernel")): v.shape[-1]
        for k, v in arrays.items()
        if re.fullmatch(r"local_kernel\d", k)
    }
    fitting = [
        record
        for _, record in networks()
        if record["config"]["channels"][2] == chans
        and record["config"]["size"] == size
        and all(record["config"]["l_sizes"][j] == k for j, k in sizes.items())
    ]
    assert fitting, f"no network in {FOLDER} has a block 2 like that of {path.name}"
    model = build(fitting[0])
    block: SlowFastBlock = model.blocks[2]  # type: ignore[assignment]
    config = fitting[0]["config"]
    batch = arrays["rgu_fast"].shape[0]

    def given(name: str, *shape: int) -> Tensor:
        return torch.from_numpy(draw(f"input:mod.{name}", shape))

    x, y = given("x", batch, chans, size, size), given("y", batch, chans, size, size)
    pre = given("pre", batch, config["channels"][1], size, size)

    def kernel(j: int, of: Tensor) -> Tensor:
        return block.local_nets[j](of)

    def branch(j: int) -> Tensor:
        mix = block.local_mix[j]
        mixed = pointwise_conv([ops.local_conv(y, kernel(j, x))], mix.weight, mix.bias)
        return block.local_norm[j](mixed, torch.zeros(1, dtype=mixed.dtype))

    def kernel_gradient(j: int) -> Tensor:
        leaf = x.clone().requires_grad_()
        weight = given("ct", *arrays[f"local_kernel{j}"].shape)
        return torch.autograd.grad((kernel(j, leaf) * weight).sum(), leaf)[0]

    def last_block() -> Tensor:
        batch, widths = arrays["block4_with_two_pres"].shape[0], config["channels"]
        # of the two earlier maps the file keeps names, not widths: block 2's output and one of the earlier ones
        outputs = [
            model.blocks[4](
                given("x4", batch, widths[4], size, size),
                [given("p1", batch, widths[3], size, size), given("p2", batch, other, size, size)],
            )
            for other in widths[1:4]
        ]
        want = torch.from_numpy(arrays["block4_with_two_pres"])
        return min(outputs, key=lambda out: float((out.detach() - want).abs().max()))

    found: dict[str, Callable[[], Tensor]] = {
        "global_kernel": lambda: block.global_net(),
        "hci_kernel": lambda: block.hci_net(),
        "hi_channel_kernel": lambda: block.hi_channel_net(),
        "hi_spatial_kernel": lambda: block.hi_spatial_net(),
        "rgu_fast": lambda: block.rgu_fast(x),
        "rgu_slow": lambda: block.rgu_slow(x),
        "hci": lambda: ops.channel_interaction(x, block.hci_net()),
        "hi": lambda: block.hi(y, x),
        "layer_with_one_pre": lambda: block.layer(x, [pre]),
        "block_with_one_pre": lambda: block(x, [pre]),
        "block4_with_two_pres": last_block,
    }
    for j in range(len(config["l_sizes"])):
        found[f"local_kernel{j}"] = lambda j=j: kernel(j, x)
        found[f"local_branch{j}"] = lambda j=j: branch(j)
        found[f"local_kernel{j}_grad_x"] = lambda j=j: kernel_gradient(j)
    for name, want in arrays.items():
        assert name in found, f"unknown array {name}"
        close(found[name](), want, 1e-9 if want.dtype == np.float64 else 2e-7, name)


# ---- operators ---------------------------------------------------------------------------------------------


def renormalised(h: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    flat = h.flatten(2).requires_grad_()
    out = ops.renormalise(flat)
    (grad,) = torch.autograd.grad(out, flat, cotangent.flatten(2))
    return {"out": out.view(h.shape), "grad_h": grad.view(h.shape)}


def slow_losses(**kernels: Tensor) -> dict[str, Tensor]:
    ordered = [kernels[name] for name in sorted(kernels, key=lambda k: int(k[1:]))]
    return {form: ops.slow_loss(ordered, form) for form in ("tile", "channel_sum")}


OPERATORS: dict[str, Callable[..., Any]] = {
    "global_2d": lambda z1, z2, w: ops.global_product(w, z1, z2),
    "local_2d": lambda kernel, z: ops.local_conv(z, kernel),
    "elementwise_channel": lambda w, z: ops.elementwise_score(w, z),
    "elementwise_spatial": lambda w, z: ops.elementwise_score(w, z),
    "si_glu": lambda x: F.silu(x),
    "instance_std": lambda x: instance_standardise(x),
    "batch_std": lambda x: batch_standardise(x),
    "g_ibs": lambda x: group_standardise(x),
    "s_renorm": renormalised,
    "slow_loss": slow_losses,
    "global_1d_causal_conv": lambda z1, z2, w: ops.causal_conv(w * z1, z2),
    "global_1d_same_conv": lambda z1, z2, w: ops.same_conv(w * z1, z2),
    "global_1d_fold": lambda z1, z2, w: ops.fold_product(w * z1, z2),
    "local_1d_same": lambda kernel, z: ops.local_conv(z, kernel),
    "local_1d_causal": lambda kernel, z: ops.local_conv(z, kernel, causal=True),
}


def check_operators(record: dict[str, Any]) -> None:
    for name, case in record.items():
        if name[0] == "_":
            continue
        inputs = {k: torch.tensor(v, dtype=None if k == "labels" else torch.float64) for k, v in case["inputs"].items()}
        if name.startswith("label_smoothing_ce"):
            for key, want in case["outputs"].items():
                epsilon = float(key.removeprefix("eps"))
                got = F.cross_entropy(inputs["logits"], inputs["labels"], label_smoothing=epsilon)
                close(got.item(), want, 1e-9, f"{name} {key}")
            continue
        fitting = [key for key in OPERATORS if name.startswith(key)]
        assert fitting, f"unknown operator {name}"
        found = OPERATORS[max(fitting, key=len)](**inputs)
        found = found if isinstance(found, dict) else {"out": found}
        assert set(found) == set(case["outputs"]), name
        for key, want in case["outputs"].items():
            close(found[key] if found[key].ndim else found[key].item(), want, 1e-9, f"{name} {key}")


# ---- optimizers and the schedule ---------------------------------------------------------------------------


def check_optimizers(record: dict[str, Any]) -> None:
    for name, want in record.items():
        if isinstance(want, str) or name in ("grads", "p0"):
            continue
        if name.startswith("kar"):
            check_trajectory(record, name, want)
        elif name.startswith("lr_factor"):
            per_epoch, epochs, warm = map(int, re.fullmatch(r"lr_factor_(\d+)x(\d+)_warm(\d+)", name).groups())  # type: ignore[union-attr]
            steps = enumerate(want) if isinstance(want, list) else want.items()
            for step, factor in steps:
                got = chained_factor(int(step), per_epoch * epochs, per_epoch * warm)
                np.testing.assert_allclose(got, factor, rtol=1e-9, atol=1e-15, err_msg=f"{name} {step}")
        else:
            pytest.fail(f"unknown field {name}")


#: The files name neither rate nor decays: the rate is the first step's length, the decays are published ones.
DECAYS: dict[str, list[tuple[float, ...]]] = {"kar3": [(0.5, 0.95), (0.75, 0.99)], "kar2": [(0.95,)]}


def check_trajectory(record: dict[str, Any], name: str, want: list[list[float]]) -> None:
    start, grads = np.array(record["p0"]), torch.tensor(record["grads"], dtype=torch.float64)
    lr = record.get(f"{name}_lr", abs(np.array(want[0]) - start).max())
    assert lr > 0
    kind = {"kar3": Kar3, "kar2": Kar2}[name.split("_")[0]]

    def run(betas: tuple[float, ...]) -> np.ndarray:
        p = nn.Parameter(torch.from_numpy(start.copy()))
        optimizer = kind([p], lr=lr, betas=betas)
        path = []
        for grad in grads:
            p.grad = grad.clone()
            optimizer.step()
            path.append(p.detach().numpy().copy())
        return np.array(path)

    paths = [run(betas) for betas in DECAYS[name.split("_")[0]]]
    apart = min(abs(path - np.array(want)).max() for path in paths)
    assert apart < 1e-9, f"{name} is {apart:.1e} away from the nearest trajectory"
