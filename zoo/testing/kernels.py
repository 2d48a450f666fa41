"""What every kernel keeps."""

from __future__ import annotations

import copy
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from zoo.kernels import Kernel, create_kernel

__all__ = ["KernelTests", "points"]


def points(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers, always the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class KernelTests:
    """Symmetry, positive semidefiniteness, batches, derivatives, types, and what is refused.

    Attributes:
        name: Registered name of the kernel. Or override the fixture `kernel`, with hyper-parameters in float64.
        dim: Dimension D of the points.
    """

    name: ClassVar[str]
    dim: ClassVar[int] = 3

    @pytest.fixture
    def kernel(self) -> Kernel:
        """The kernel under test."""
        return create_kernel(self.name, dtype=torch.float64)

    def test_symmetric_positive_semidefinite_with_its_own_diagonal(self, kernel: Kernel) -> None:
        X = points(40, self.dim)
        K = kernel(X)
        torch.testing.assert_close(K, K.mT)
        torch.testing.assert_close(K, kernel(X, X.clone()))
        torch.testing.assert_close(K.diagonal(), kernel.diag(X))
        assert torch.linalg.eigvalsh(K)[0] > -1e-9 * K.diagonal().max()

    def test_batched_equals_looped(self, kernel: Kernel) -> None:
        X, Z = points(2, 4, 5, self.dim), points(2, 4, 7, self.dim, seed=1)
        K, d = kernel(X, Z), kernel.diag(X)
        assert K.shape == (2, 4, 5, 7)
        for i in range(2):
            for j in range(4):
                torch.testing.assert_close(K[i, j], kernel(X[i, j], Z[i, j]))
                torch.testing.assert_close(d[i, j], kernel.diag(X[i, j]))
        torch.testing.assert_close(kernel(X, Z[0, 0])[1, 2], kernel(X[1, 2], Z[0, 0]))  # leading dimensions broadcast

    def test_each_entry_is_the_function_of_two_points(self, kernel: Kernel) -> None:
        X, Z = points(4, self.dim), points(3, self.dim, seed=1)
        one_by_one = torch.stack([torch.cat([kernel(x[None], z[None])[0] for z in Z]) for x in X])
        torch.testing.assert_close(kernel(X, Z), one_by_one)

    def test_features_reproduce_the_kernel_or_say_that_there_are_none(self, kernel: Kernel) -> None:
        X, Z = points(2, 6, self.dim), points(2, 4, self.dim, seed=1)
        if kernel.has_features:
            torch.testing.assert_close(kernel.features(X) @ kernel.features(Z).mT, kernel(X, Z))
        else:
            with pytest.raises(NotImplementedError, match="no finite feature map"):
                kernel.features(X)

    def test_gradients(self, kernel: Kernel) -> None:
        X, Z = points(4, self.dim).requires_grad_(), points(3, self.dim, seed=1).requires_grad_()
        names, parameters = [name for name, _ in kernel.named_parameters()], list(kernel.parameters())

        def gram(X: Tensor, Z: Tensor, *values: Tensor) -> Tensor:
            return torch.func.functional_call(kernel, dict(zip(names, values, strict=True)), (X, Z))

        inputs = (X, Z, *(p.detach().requires_grad_() for p in parameters))
        assert torch.autograd.gradcheck(gram, inputs)
        assert torch.autograd.gradgradcheck(gram, inputs)
        kernel(X, Z).sum().backward()
        assert all(p.grad is not None for p in parameters)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_low_precision_in_low_precision_out_computed_in_full(self, kernel: Kernel, dtype: torch.dtype) -> None:
        X, Z = points(5, self.dim, dtype=dtype), points(4, self.dim, seed=1, dtype=dtype)
        K = kernel(X, Z)
        assert K.dtype == kernel.diag(X).dtype == dtype
        exact = kernel(X.double(), Z.double())  # the inputs as rounded
        torch.testing.assert_close(K, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)

    def test_autocast_has_no_effect(self, kernel: Kernel) -> None:
        kernel.float()
        X, Z = points(5, self.dim, dtype=torch.float32), points(4, self.dim, seed=1, dtype=torch.float32)
        expected = kernel(X, Z)
        with torch.autocast("cpu", torch.bfloat16):
            inside = kernel(X, Z)
        assert inside.dtype == torch.float32
        torch.testing.assert_close(inside, expected, rtol=0, atol=0)

    def test_moves_copies_and_saves(self, kernel: Kernel) -> None:
        X = points(5, self.dim)
        other = copy.deepcopy(kernel)
        with torch.no_grad():
            for p in other.parameters():
                p.add_(0.3)
        other.load_state_dict(kernel.state_dict())
        torch.testing.assert_close(other(X), kernel(X), rtol=0, atol=0)
        assert kernel.float()(X.float()).dtype == torch.float32
        assert kernel.bfloat16()(X).dtype == torch.float64
        assert kernel.to("meta")(X.to("meta")).shape == (5, 5)

    def test_empty_sets(self, kernel: Kernel) -> None:
        X = points(3, self.dim)
        assert kernel(X[:0], X).shape == (0, 3)
        assert kernel(X, X[:0]).shape == (3, 0)
        assert kernel.diag(X[:0]).shape == (0,)

    def test_wrong_inputs_are_told(self, kernel: Kernel) -> None:
        with pytest.raises(ValueError, match=r"\(\.\.\., n, D\)"):
            kernel(points(self.dim))
        with pytest.raises(ValueError, match="floating point"):
            kernel(torch.ones(2, self.dim, dtype=torch.long))
        with pytest.raises(ValueError, match=f"{self.dim} dimensions, Z of {self.dim + 1}"):
            kernel(points(2, self.dim), points(2, self.dim + 1))
