"""The kernel ridge classifier: what it refuses, its gradients, and kernels that it finds by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from zoo.kernels import Gaussian, Kernel, create_kernel, kernel_names, register_kernel
from zoo.kernels.kernel import KERNELS
from zoo.learners.kernel_ridge import KernelRidgeHead, SupportError


def loss(kernel: str, **changes: Any) -> Tensor:
    given: dict[str, Any] = {
        "support": torch.eye(6, 4),
        "targets": torch.eye(10)[:6],
        "queries": torch.eye(3, 4),
        "task": 0,
        "active": torch.arange(10) < 6,
    }
    return F.cross_entropy(KernelRidgeHead(kernel)(**(given | changes)), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("kernel", ["linear", "poly", "laplacian"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"targets": torch.eye(10)[:5]}, "6 support points and 5 targets"),
        ({"targets": torch.eye(10)[:7]}, "6 support points and 7 targets"),
        ({"targets": torch.tensor([0, 1, 2, 3, 4, 77])}, "targets holds 77; classes are numbers from 0 to 9"),
        ({"targets": torch.tensor([0, 1, 2, 3, 4, 2**40])}, "targets holds 1099511627776"),
        ({"targets": torch.tensor([0, 1, 2, 3, 4, -5])}, "targets holds -5"),
        ({"targets": torch.arange(6, dtype=torch.int32)}, "targets is torch.int32"),
        ({"targets": torch.ones(6)}, "targets are torch.float32"),
        ({"active": torch.ones(10)}, "active is torch.float32"),
        ({"active": torch.ones(10, dtype=torch.uint8)}, "active is torch.uint8"),
        ({"active": torch.ones(9, dtype=torch.bool)}, "targets have 10 columns, there are 9 classes"),
        ({"queries": torch.eye(3, 5)}, "queries have 5 features, the support has 4"),
        ({"support": torch.ones(6, 4, dtype=torch.int64)}, "support is torch.int64"),
        ({"support": torch.ones(6)}, "support is"),
        ({"support": torch.full((6, 4), torch.inf)}, "6 of 6 support features hold NaN or infinity"),
        ({"queries": torch.tensor([[0, 0, 0, torch.nan]] * 3)}, "3 of 3 query features hold NaN or infinity"),
        ({"task": 1}, "task=1"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)
def test_it_refuses(kernel: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SupportError, match=words):
        loss(kernel, **changes)


def test_it_takes_what_fits() -> None:
    one_hot, indices = loss("linear"), loss("linear", targets=torch.arange(6))
    assert one_hot.isfinite()
    torch.testing.assert_close(one_hot, indices)
    head = KernelRidgeHead("linear")
    assert head.predict(torch.ones(0, 4), head.solve(torch.eye(4), torch.eye(4))).shape == (0, 4)


@pytest.mark.parametrize("kernel", ["linear", "poly", "laplacian", "gaussian", "exponential_power"])
def test_derivatives_of_any_order(kernel: str) -> None:
    generator = torch.Generator().manual_seed(0)
    head = KernelRidgeHead(kernel, lambda_init=0.3).double()
    support, queries = (torch.rand(n, 3, generator=generator, dtype=torch.float64, requires_grad=True) for n in (6, 4))
    Y = F.one_hot(torch.arange(6) % 3, 3).double()
    names = [name for name, _ in head.named_parameters()]

    def answers(s: Tensor, q: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(head, dict(zip(names, values, strict=True)), (s, Y, q))

    assert torch.autograd.gradcheck(answers, (support, queries, *head.parameters()))
    assert torch.autograd.gradgradcheck(answers, (support, queries, *head.parameters()))


# ---- kernels by name ---------------------------------------------------------------------------------------


@pytest.fixture
def cauchy(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(KERNELS, "_entries", dict(KERNELS._entries))

    @register_kernel("cauchy", "rational")
    class Cauchy(Kernel):
        def _gram(self, X: Tensor, Z: Tensor | None) -> Tensor:
            return 1 / (1 + torch.cdist(X, X if Z is None else Z).square())

        def _diag(self, X: Tensor) -> Tensor:
            return X.new_ones(X.shape[:-1])

    return "cauchy"


def test_a_kernel_is_usable_in_every_learner_once_it_is_registered(cauchy: str) -> None:
    assert cauchy in kernel_names()
    draw = torch.Generator().manual_seed(0)
    x, y = torch.rand(30, 1, 8, 8, generator=draw), torch.arange(30) % 3
    for name in ("test_kcl", "test_gkcl"):
        torch.manual_seed(0)
        model = zoo.create_model(name, num_classes=3, kernel="rational")
        images, labels = model.begin_task(0, x, y)
        torch.stack(list(model.train().losses(images, labels, 0).values())).sum().backward()
        model.end_task(0, x, y)
        expected = model.eval()(x, 0)
        torch.testing.assert_close(zoo.to_deploy(model)(x, 0), expected, rtol=1e-4, atol=1e-4)


def test_names_of_kernels() -> None:
    assert {"linear", "poly", "laplacian", "gaussian", "rff", "exponential_power"} <= set(kernel_names())
    assert isinstance(create_kernel("gauss", 0.5), Gaussian)
    torch.testing.assert_close(
        create_kernel("rbf")(torch.zeros(1, 2), torch.ones(1, 2)), torch.exp(torch.tensor([[-0.5]]))
    )
    with pytest.raises(ValueError, match=r"unknown kernel 'gausian'.*did you mean"):
        create_kernel("gausian")
    with pytest.raises(ValueError, match="width=-1 must be positive"):
        create_kernel("gaussian", -1)
    with pytest.raises(ValueError, match="there is already a kernel 'rbf'"):
        register_kernel("rbf")(Gaussian)
