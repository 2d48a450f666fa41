"""`torch.func` over every family: mapped over images and over networks, forward-mode and second derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacfwd, jvp, stack_module_state, vmap

import zoo
from zoo.models.continual import ContinualLearner

NAMES = sorted(zoo.list_models("test_*"))
WORDS = "test_minilm"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    return


def network(name: str) -> Any:
    if name == WORDS:
        pytest.importorskip("transformers")
    return zoo.create_model(name).eval()


def inputs(model: Any, count: int = 3) -> Tensor:
    shape = getattr(model, "input_shape", None) or model.pretrained_cfg["input_size"]
    if hasattr(model, "bert"):
        return torch.randint(1, model.vocab_size, (count, *shape))
    return torch.rand(count, *shape)


def close(got: Tensor, want: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(want.abs().max()) + 1e-7)


@pytest.mark.parametrize("deploy", [False, True], ids=["", "deploy"])
@pytest.mark.parametrize("name", NAMES)
def test_mapped_over_inputs(name: str, deploy: bool) -> None:
    model = network(name)
    model = zoo.to_deploy(model) if deploy else model
    x = inputs(model)
    with torch.no_grad():
        got = vmap(lambda one: model(one.unsqueeze(0)).squeeze(0))(x)
        want = torch.cat([model(one.unsqueeze(0)) for one in x])  # alone: some answers depend on the whole batch
    close(got, want)


@pytest.mark.parametrize("name", NAMES)
def test_mapped_over_networks(name: str) -> None:
    models = [network(name), network(name)]
    x, base = inputs(models[0]), models[0]
    parameters, buffers = stack_module_state(models)
    with torch.no_grad():
        got = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
        close(got, torch.stack([model(x) for model in models]))


def test_learners_that_know_other_classes_are_not_mapped_together() -> None:
    models = [network("test_gkcl"), network("test_gkcl")]
    assert isinstance(models[0], ContinualLearner)
    models[0].active[0] = torch.arange(models[0].num_classes) < 2
    models[1].active[0] = torch.arange(models[0].num_classes) < 3
    parameters, buffers = stack_module_state(models)
    x = inputs(models[0])
    with torch.no_grad(), pytest.raises(ValueError, match="different classes"):
        vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(parameters, buffers)


def gradients(model: nn.Module, x: Tensor, s: Tensor) -> Tensor:
    s = s.clone().requires_grad_()
    return torch.autograd.grad(model(x * s[0] + s[1]).square().sum(), s)[0]


@pytest.mark.parametrize("name", [name for name in NAMES if name != WORDS])
def test_forward_mode_and_second_derivatives(name: str) -> None:
    model = network(name).double()
    x, s, step = inputs(model).double(), torch.tensor([1.0, 0.1]).double(), 1e-5
    tangent = torch.randn_like(x)
    value, slope = jvp(model, (x,), (tangent,))
    close(value, model(x).detach())
    with torch.no_grad():
        close(slope, (model(x + step * tangent) - model(x - step * tangent)) / (2 * step), 1e-3)
    unit = torch.eye(2).double()
    second = torch.stack([(gradients(model, x, s + step * e) - gradients(model, x, s - step * e)) for e in unit])
    second = second / (2 * step)
    close(hessian(lambda s: model(x * s[0] + s[1]).square().sum())(s).detach(), second, 1e-3)
    close(jacfwd(lambda s: gradients_of(model, x, s))(s).detach(), second, 1e-3)
    if "point" in name:
        return  # the library's fused attention has no second derivatives outside of `torch.func`, and says so
    s.requires_grad_()  # and the classic way
    (first,) = torch.autograd.grad(model(x * s[0] + s[1]).square().sum(), s, create_graph=True)
    close(torch.stack([torch.autograd.grad(g, s, retain_graph=True)[0] for g in first]), second, 1e-3)


def gradients_of(model: nn.Module, x: Tensor, s: Tensor) -> Tensor:
    return torch.func.grad(lambda s: model(x * s[0] + s[1]).square().sum())(s)


@pytest.mark.parametrize("name", [name for name in NAMES if name != WORDS])
def test_many_gradients_at_once(name: str) -> None:
    model = network(name).requires_grad_(True)
    x = inputs(model).requires_grad_()
    y = model(x).flatten()[:2]
    unit = torch.eye(len(y))
    (many,) = torch.autograd.grad(y, x, unit, is_grads_batched=True, retain_graph=True)
    close(many, torch.stack([torch.autograd.grad(y, x, e, retain_graph=True)[0] for e in unit]))
