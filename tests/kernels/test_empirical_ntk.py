"""The NTK of finite networks: against a double loop, in blocks, in parts, as products, as a kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo.kernels.empirical_ntk import EmpiricalNTK, empirical_ntk, empirical_ntk_by, ntk_vector_product


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.5)]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 3)).double()
    net(torch.randn(8, 2, 4, 4, dtype=torch.float64))  # statistics that matter
    return net


def images(n: int, seed: int = 1) -> Tensor:
    return torch.randn(n, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def double_loop(net: nn.Module, X: Tensor, Z: Tensor) -> Tensor:
    net.eval()
    parameters = [p for p in net.parameters() if p.requires_grad]

    def rows(x: Tensor) -> Tensor:
        out = net(x[None])[0]
        grads = [torch.autograd.grad(o, parameters, retain_graph=True) for o in out]
        return torch.stack([torch.cat([g.flatten() for g in grad]) for grad in grads])

    return torch.stack([torch.stack([rows(x) @ rows(z).mT for z in Z]) for x in X])


def test_it_is_the_product_of_gradients() -> None:
    net, X, Z = network(), images(5), images(3, 2)
    full = double_loop(net, X, Z)
    net.train()
    net[3].eval()
    size = 2 * 3 * 8 * sum(p.numel() for p in net.parameters())
    for memory in (2**30, 2 * size, 4 * size):
        torch.testing.assert_close(
            empirical_ntk(net, X, Z, outputs="full", memory=memory), full, rtol=1e-12, atol=1e-12
        )
        trace = full.diagonal(dim1=2, dim2=3).mean(-1)
        torch.testing.assert_close(empirical_ntk(net, X, Z, memory=memory), trace, rtol=1e-12, atol=1e-12)
        own = empirical_ntk(net, X, outputs="full", memory=memory)
        torch.testing.assert_close(own, double_loop(net, X, X), rtol=1e-12, atol=1e-12)
        net.train()
        net[3].eval()
    empirical_ntk(net, X)
    assert [m.training for m in net] == [True, True, True, False, True, True]
    with pytest.raises(ValueError, match=f"gradients of two samples take {2 * size} bytes"):
        empirical_ntk(net, X, memory=2 * size - 1)


def test_parts_add_up_and_frozen_parameters_do_not_count() -> None:
    net, X = network(), images(4)
    parts = empirical_ntk_by(net, X, group=lambda name: name.split(".")[0])
    assert list(parts) == ["0", "1", "5"]
    torch.testing.assert_close(sum(parts.values()), empirical_ntk(net, X), rtol=1e-12, atol=0)
    last = empirical_ntk_by(net, X, group=lambda name: "last" if name.startswith("5") else None)
    torch.testing.assert_close(last["last"], parts["5"], rtol=1e-12, atol=0)
    net[0].requires_grad_(False)
    torch.testing.assert_close(empirical_ntk(net, X), parts["1"] + parts["5"], rtol=1e-12, atol=0)
    net.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameters are selected"):
        empirical_ntk(net, X)


def test_products_need_no_matrix() -> None:
    net, X, Z = network(), images(5), images(3, 2)
    full, V = empirical_ntk(net, X, Z, outputs="full"), images(3, 3).flatten(1)[:, :3]
    wanted = torch.einsum("ijcd,jd->ic", full, V)
    for batch_size in (2, 100):
        found = ntk_vector_product(net, X, V, Z, batch_size=batch_size)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="need \\(3, 3\\)"):
        ntk_vector_product(net, X, V[:2], Z)


def test_as_a_kernel() -> None:
    net, X = network().float(), images(5).flatten(1)
    kernel = EmpiricalNTK(net, (2, 4, 4))
    K = kernel(X)
    assert K.dtype == torch.float64
    torch.testing.assert_close(K.float(), empirical_ntk(net, images(5).float()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kernel.diag(X), K.diagonal(), rtol=1e-5, atol=1e-5)
    assert kernel(X, X[:2]).shape == (5, 2)
    with pytest.raises(ValueError, match="takes points"):
        kernel(X[None])


def test_outputs_that_are_no_tensor_are_selected() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net(x)}

    model, X = Two(), images(3)
    with pytest.raises(ValueError, match="returns a dict"):
        empirical_ntk(model, X)
    found = empirical_ntk(model, X, select=lambda out: out["logits"])
    torch.testing.assert_close(found, empirical_ntk(model.net, X))
    with pytest.raises(ValueError, match="outputs='all'"):
        empirical_ntk(model.net, X, outputs="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one at least"):
        empirical_ntk(model.net, X[:0])


@pytest.mark.parametrize("name", ["test_unireplknet", "test_terminator", "test_grbf", "test_dkm"])
def test_of_the_zoos_own_models(name: str) -> None:
    torch.manual_seed(0)
    model = zoo.create_model(name, num_classes=3).double().eval()
    shape = getattr(model, "input_shape", None) or model.pretrained_cfg["input_size"]
    X = torch.rand(3, *shape, dtype=torch.float64)
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for x in X:
        grads = [torch.autograd.grad(o, parameters, retain_graph=True, allow_unused=True) for o in model(x[None])[0]]
        flat = [torch.cat([g.flatten() for g in grad if g is not None]) for grad in grads]
        rows.append(torch.cat(flat))
    J = torch.stack(rows)
    K = empirical_ntk(model, X)
    torch.testing.assert_close(K, J @ J.mT / 3, rtol=1e-8, atol=1e-8 * float(K.abs().max()))
