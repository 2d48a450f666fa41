"""UniRepLKNet against numbers computed by the authors' implementation.

Every `unireplknet*.json` in the folder named by the environment variable ZOO_GOLDEN_DIR (default:
tests/golden) is one test. What is checked follows from the fields of the file; a file without any known field
fails, it is not skipped. Weights and inputs are drawn from a generator seeded by their names, so the files
hold results only.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm import create_model
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from zoo.models import to_deploy
from zoo.models.layers.dilated_reparam import BRANCHES, DilatedReparamBlock
from zoo.models.unireplknet import UniRepLKNet, default_cfgs

FOLDER = Path(os.environ.get("ZOO_GOLDEN_DIR") or Path(__file__).parents[1] / "golden")
FILES = sorted(FOLDER.glob("unireplknet*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"golden-{path.name}")
def test_golden_file(path: Path) -> None:
    record = json.loads(path.read_text())
    if "branch_dilations" in record:
        check_block(record)
    elif "depths" in record and ("float64_train" in record or "keys_train" in record):
        check_model(record)
    elif "grad_norm" in record.get("float64", {}):
        check_training_step(record)
    elif "per_param" in record:
        check_optimizer_groups(record)
    else:
        pytest.fail(f"{path.name}: no known kind of golden file, fields {sorted(record)}")


def test_golden_folder_is_not_empty() -> None:
    assert FILES, f"no unireplknet*.json in {FOLDER}"


# ---- the recipe of weights and inputs ----------------------------------------------------------------------


def draw(name: str, shape: Any) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(tuple(shape))


def fill(module: nn.Module) -> nn.Module:
    """Set every entry of the state dict to the value its name stands for."""
    state = {}
    for key, value in module.state_dict().items():
        leaf = key.rsplit(".", 1)[-1]
        if leaf == "num_batches_tracked":
            state[key] = torch.zeros_like(value)
            continue
        n = draw(key, value.shape)
        if leaf == "running_var":
            n = 1 + 0.1 * abs(n)
        elif leaf == "weight":
            n = 1 + 0.1 * n if n.ndim == 1 else n / math.sqrt(math.prod(n.shape[1:]))
        else:
            n = 0.1 * n
        state[key] = torch.from_numpy(np.asarray(n, np.float32)).to(value.dtype)
    module.load_state_dict(state)
    return module


def make_input(record: dict[str, Any], dtype: torch.dtype = torch.float64) -> Tensor:
    name, shape = record["input"]["name"], record["input"]["shape"]
    x = torch.from_numpy(draw(name, shape).astype(np.float32))
    if "first4" in record["input"]:
        assert x.flatten()[:4].tolist() == record["input"]["first4"]
    return x.to(dtype)


# ---- comparisons -------------------------------------------------------------------------------------------


def check_summary(value: Tensor, summary: dict[str, Any], name: str, tol: float = 1e-9) -> None:
    assert list(value.shape) == summary["shape"], name
    flat = value.detach().double().flatten().numpy()
    found = {
        "mean": flat.mean(),
        "std": flat.std(),
        "absmax": abs(flat).max(),
        "first8": flat[:8],
        "last8": flat[-8:],
        "proj": flat @ draw(f"proj:{name}", [flat.size]) / math.sqrt(flat.size),
    }
    for field, number in found.items():
        np.testing.assert_allclose(number, summary[field], rtol=0, atol=tol, err_msg=f"{name}.{field}")
    np.testing.assert_allclose(np.linalg.norm(flat), summary["l2"], rtol=tol, err_msg=f"{name}.l2")


def check_keys(module: nn.Module, keys: list[Any]) -> None:
    assert sorted([key, list(value.shape)] for key, value in module.state_dict().items()) == sorted(keys)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ---- whole models ------------------------------------------------------------------------------------------


def build(record: dict[str, Any], **kwargs: Any) -> UniRepLKNet:
    dense = record["mode"] == "features"
    assert dense or record["mode"] == "logits", f"unknown mode {record['mode']!r}"
    return UniRepLKNet(
        in_chans=record["in_chans"],
        num_classes=record["num_classes"] or 0,
        depths=record["depths"],
        dims=record["dims"],
        kernel_sizes=record["kernel_sizes"],
        dense_output=dense,
        **kwargs,
    ).eval()


def check_model(record: dict[str, Any]) -> None:
    model = build(record)
    assert count(model) == record.get("n_params_train", count(model))
    fill(model)
    if "keys_train" in record:
        check_keys(model, record["keys_train"])
    if "float64_train" in record:
        check_float32(model, record)
    model.double()
    if "float64_train" in record:
        check_outputs(model, make_input(record), record["float64_train"])
    check_deploy(to_deploy(model), record)


def check_outputs(model: UniRepLKNet, x: Tensor, expected: dict[str, Any], tol: float = 1e-9) -> None:
    unknown = set(expected) - {"stages", "logits", "logits_summary", "features"}
    assert not unknown, f"unknown outputs {unknown}"
    with torch.no_grad():
        maps, out = model.stage_maps(x), model(x)
    for i, summary in enumerate(expected.get("stages", [])):
        check_summary(maps[i], summary, f"stage{i}", tol)
    for i, summary in enumerate(expected.get("features", [])):
        check_summary(out[i], summary, f"feature{i}", tol)
    if "logits_summary" in expected:
        check_summary(out, expected["logits_summary"], "logits", tol)
    if "logits" in expected:
        np.testing.assert_allclose(out.double().numpy(), expected["logits"], rtol=0, atol=tol)


def check_float32(model: UniRepLKNet, record: dict[str, Any]) -> None:
    """Single precision stays near the float64 numbers, in both memory formats and both forms."""
    x = make_input(record, torch.float32)
    for form in (model, to_deploy(model)):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            check_outputs(form, x.contiguous(memory_format=memory_format), record["float64_train"], tol=1e-4)


def check_deploy(model: UniRepLKNet, record: dict[str, Any]) -> None:
    assert count(model) == record.get("n_params_deploy", count(model))
    if "keys_deploy" in record:
        check_keys(model, record["keys_deploy"])
    for key, expected in record.get("deploy_tensors", {}).items():
        value = model.state_dict()[key].flatten().numpy()
        assert list(model.state_dict()[key].shape) == expected["shape"], key
        np.testing.assert_allclose(value[:4], expected["first4"], rtol=0, atol=1e-9, err_msg=key)
        np.testing.assert_allclose(np.linalg.norm(value), expected["l2"], rtol=1e-9, err_msg=key)
        np.testing.assert_allclose(value.sum(), expected["sum"], rtol=0, atol=1e-8, err_msg=key)
    if "float64_deploy" in record:
        check_outputs(model, make_input(record), record["float64_deploy"])
        twin = build(record, deploy=True, dtype=torch.float64)
        twin.load_state_dict(model.state_dict())
        check_outputs(twin, make_input(record), record["float64_deploy"])


# ---- the Dilated Reparam Block -----------------------------------------------------------------------------


def check_block(record: dict[str, Any]) -> None:
    size = record["kernel_size"]
    branches = tuple(zip(record["branch_kernel_sizes"], record["branch_dilations"], strict=True))
    assert BRANCHES[size] == branches
    block = DilatedReparamBlock(record["channels"], size).eval()
    fill(block).double()
    check_keys(block, record["keys_train"])
    x = make_input(record)
    with torch.no_grad():
        check_summary(block(x), record["float64_train"], "block")
        weight, bias = block.merged()
        check_summary(weight, record["merged_weight"], "merged")
        if "channel0" in record["merged_weight"]:
            np.testing.assert_allclose(weight[0, 0].numpy(), record["merged_weight"]["channel0"], rtol=0, atol=1e-9)
        np.testing.assert_allclose(bias.numpy(), record["merged_bias"], rtol=0, atol=1e-9)
        block.reparameterize()
        check_keys(block, record["keys_deploy"])
        check_summary(block(x), record["float64_deploy"], "block")


# ---- one training step -------------------------------------------------------------------------------------


def variant(record: dict[str, Any], **kwargs: Any) -> UniRepLKNet:
    name = f"unireplknet_{record['variant']}"
    assert name in default_cfgs, f"unknown variant {record['variant']!r}"
    return create_model(name, **kwargs)


def check_training_step(record: dict[str, Any]) -> None:
    assert record["loss"] == "mean over all elements of logits squared"
    assert record["drop_path"] == 0, "a random drop path cannot be compared"
    zero = set(record["zero_by_construction"])
    limits = {
        "float64": {"loss": 1e-10, "grad": 1e-7, "bn": 1e-10, "out": 1e-9, "zero": 1e-12},
        "float32": {"loss": 1e-5, "grad": 1e-3, "bn": 1e-5, "out": 1e-4, "zero": 1e-6},
    }
    for precision, limit in limits.items():
        if precision in record:
            check_gradients(record, record[precision], getattr(torch, precision), limit, zero)


def check_gradients(
    record: dict[str, Any],
    expected: dict[str, Any],
    dtype: torch.dtype,
    limit: dict[str, float],
    zero: set[str],
) -> None:
    shape = record["input"]["shape"]
    model = variant(record, num_classes=record["num_classes"], in_chans=shape[1])
    fill(model).to(dtype).train()
    logits = model(make_input(record, dtype))
    loss = logits.square().mean()
    loss.backward()

    np.testing.assert_allclose(loss.item(), expected["loss"], rtol=limit["loss"])
    if dtype == torch.float64:
        check_summary(logits, expected["logits"], "logits")
    for end, part in (("first8", slice(8)), ("last8", slice(-8, None))):
        got = logits.detach().flatten()[part].tolist()
        np.testing.assert_allclose(got, expected["logits"][end], rtol=0, atol=limit["out"])

    grads = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    assert len(grads) == len(list(model.parameters())), "a parameter got no gradient"
    total = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
    np.testing.assert_allclose(total, expected["total_grad_norm"], rtol=limit["grad"])
    for name in zero:
        assert float(grads[name].norm()) / total < limit["zero"], name
    for name, norm in expected["grad_norm"].items():
        if name not in zero:
            np.testing.assert_allclose(float(grads[name].norm()), norm, rtol=limit["grad"], err_msg=name)
    for name, first in expected["grad_first4"].items():
        if name not in zero:
            atol = limit["grad"] * max(map(abs, first))
            np.testing.assert_allclose(grads[name].flatten()[:4].tolist(), first, rtol=0, atol=atol, err_msg=name)

    for name, after in expected["bn_after"].items():
        bn = model.get_submodule(name)
        for field in ("running_mean", "running_var"):
            got = getattr(bn, field)[: len(after[field])].tolist()
            np.testing.assert_allclose(got, after[field], rtol=0, atol=limit["bn"], err_msg=f"{name}.{field}")
        assert int(bn.num_batches_tracked) == after["num_batches_tracked"]


# ---- optimiser groups --------------------------------------------------------------------------------------


def check_optimizer_groups(record: dict[str, Any]) -> None:
    model = variant(record, device="meta")
    names = {id(p): name for name, p in model.named_parameters()}
    weight_decay = record["weight_decay"]
    decayed = {
        names[id(p)]: group["weight_decay"]
        for group in param_groups_weight_decay(model, weight_decay, no_weight_decay_list=model.no_weight_decay())
        for p in group["params"]
    }
    if "plain" in record:
        assert {name for name, value in decayed.items() if value} == set(record["plain"]["decay"])
        assert {name for name, value in decayed.items() if not value} == set(record["plain"]["no_decay"])

    ids, last = model.layer_ids()
    columns = record["per_param_columns"]
    assert set(record["per_param"]) == set(ids)
    for name, row in record["per_param"].items():
        expected = dict(zip(columns, row, strict=True))
        assert ids[name] == expected["layer_id"], name
        assert decayed[name] == expected["weight_decay"], name
        np.testing.assert_allclose(record["layer_decay"] ** (last - ids[name]), expected["lr_scale"], rtol=1e-12)
