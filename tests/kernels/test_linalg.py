"""Solvers against explicit inverses, scikit-learn, and their own promises about precision."""

from __future__ import annotations

import pytest
import torch
from sklearn.kernel_ridge import KernelRidge
from torch import Tensor

from zoo.kernels import (
    Gaussian,
    Laplacian,
    NotPositiveDefiniteError,
    PrecisionGaussian,
    cholesky,
    chunked_gram,
    gram_product,
    log_det,
    solve_spd,
)
from zoo.learners.ridge import solve_feature_ridge, solve_ridge


def points(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spd(*batch: int, n: int = 6, seed: int = 0) -> Tensor:
    A = points(*batch, n, n, seed=seed)
    return A @ A.mT + torch.eye(n, dtype=torch.float64)


# ---- the factor --------------------------------------------------------------------------------------------


def test_factor_and_what_follows_from_it() -> None:
    A, B, b = spd(), points(6, 3, seed=1), points(6, seed=2)
    factor = cholesky(A)
    assert factor.jitter == 0
    torch.testing.assert_close(factor.lower @ factor.lower.mT, A)
    inverse = torch.linalg.inv(A)
    torch.testing.assert_close(factor.solve(B), inverse @ B)
    torch.testing.assert_close(factor.solve(b), inverse @ b)
    torch.testing.assert_close(factor.whiten(b).square().sum(), b @ inverse @ b)
    torch.testing.assert_close(factor.whiten(B).mT @ factor.whiten(B), B.mT @ inverse @ B)
    torch.testing.assert_close(factor.log_det(), torch.logdet(A))
    torch.testing.assert_close(log_det(A), torch.logdet(A))


def test_batched_equals_looped() -> None:
    A, B = spd(2, 3), points(2, 3, 6, 4, seed=1)
    X, d = solve_spd(A, B), log_det(A)
    Y = solve_ridge(A, B, 0.3)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(X[i, j], solve_spd(A[i, j], B[i, j]))
            torch.testing.assert_close(Y[i, j], solve_ridge(A[i, j], B[i, j], 0.3))
            torch.testing.assert_close(d[i, j], log_det(A[i, j]))
    torch.testing.assert_close(solve_spd(A, B[..., 0]), X[..., 0])  # one vector per matrix
    torch.testing.assert_close(solve_spd(A, B[0, 0])[1, 2], solve_spd(A[1, 2], B[0, 0]))  # the same for all


def test_jitter_grows_until_the_factor_exists_and_is_reported_per_matrix() -> None:
    vector = points(6, 1)
    singular = vector @ vector.mT
    slightly_negative = singular - 1e-9 * torch.eye(6, dtype=torch.float64)
    batch = torch.stack([spd(), singular, slightly_negative])
    factor = cholesky(batch)
    jitter = factor.jitter
    scale = batch.diagonal(dim1=-2, dim2=-1).mean(-1)
    assert jitter[0] == 0
    assert 0 <= jitter[1] < 1e-10 * scale[1]
    assert 1e-9 < jitter[2] < 1e-7 * scale[2]
    eye = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(factor.lower @ factor.lower.mT, batch + jitter[:, None, None] * eye)
    torch.testing.assert_close(factor.lower[0], cholesky(spd()).lower, rtol=0, atol=0)  # neighbours do not matter


def test_a_kernel_matrix_of_repeated_points_is_solved() -> None:
    X = points(20, 2).repeat(3, 1)
    K = Gaussian(3.0, dtype=torch.float64)(X).detach()
    factor = cholesky(K)
    assert 0 < factor.jitter < 1e-9
    assert torch.isfinite(factor.solve(points(60))).all()


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (-torch.eye(3), r"smallest eigenvalue -1\).*larger ridge"),
        (torch.zeros(3, 3), "not positive definite"),
        (torch.full((3, 3), torch.nan), "not finite"),
        (torch.diag(torch.tensor([1.0, torch.inf, 1.0])), "not finite"),
    ],
)
def test_what_has_no_factor_is_told_in_one_line(matrix: Tensor, message: str) -> None:
    with pytest.raises(NotPositiveDefiniteError, match=message) as caught:
        cholesky(matrix)
    assert "\n" not in str(caught.value)
    with pytest.raises(NotPositiveDefiniteError):
        cholesky(torch.stack([torch.eye(3), matrix]))


def test_no_jitter_means_none() -> None:
    singular = torch.diag(torch.tensor([1.0, 0.0]))
    with pytest.raises(NotPositiveDefiniteError):
        cholesky(singular, max_jitter=0)
    assert cholesky(singular).jitter > 0


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="square"):
        cholesky(points(3, 4))
    with pytest.raises(ValueError, match="6 rows"):
        solve_spd(spd(), points(5, 2))
    with pytest.raises(ValueError, match="negative"):
        solve_ridge(spd(), points(6), -0.1)
    with pytest.raises(ValueError, match="negative"):
        solve_ridge(spd(), points(6), float("nan"))


def test_gradients() -> None:
    A, B = spd(n=4), points(4, 2, seed=1).requires_grad_()

    def symmetric(M: Tensor) -> Tensor:
        return (M + M.mT) / 2

    M = A.clone().requires_grad_()
    ridge = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m, b: solve_spd(symmetric(m), b), (M, B))
    assert torch.autograd.gradcheck(lambda m: log_det(symmetric(m)), (M,))
    assert torch.autograd.gradcheck(lambda m, b, r: solve_ridge(symmetric(m), b, r), (M, B, ridge))
    phi = points(5, 3).requires_grad_()
    Y = points(5, 2, seed=1)
    for features in (phi, points(5, 8).requires_grad_()):
        assert torch.autograd.gradcheck(lambda p, r: solve_feature_ridge(p, Y, r), (features, ridge))
    vector = points(4, 1)  # through jitter, too
    loss = cholesky(vector.requires_grad_() @ vector.mT - 1e-9 * torch.eye(4)).log_det()
    loss.backward()
    assert vector.grad is not None
    assert torch.isfinite(vector.grad).all()


def test_float64_inside_whatever_comes_in_and_back_on_request() -> None:
    X = points(60, 2)
    K = Gaussian(1.0, dtype=torch.float64)(X).detach()
    y = points(60, seed=1)
    exact = torch.linalg.solve(K + 1e-6 * torch.eye(60), y)
    for dtype in (torch.float32, torch.bfloat16):
        low = K.to(dtype)
        reference = torch.linalg.solve(low.double() + 0.1 * torch.eye(60).double(), y)
        answer = solve_ridge(low, y, 0.1)
        assert answer.dtype == torch.float64
        torch.testing.assert_close(answer, reference, rtol=1e-8, atol=1e-8)
        assert solve_ridge(low, y, 0.1, dtype=dtype).dtype == dtype
        assert solve_spd(low.double() + torch.eye(60), y, dtype=dtype).dtype == dtype
        assert log_det(low.double() + torch.eye(60), dtype=dtype).dtype == dtype
    torch.testing.assert_close(solve_ridge(K, y, 1e-6), exact, rtol=1e-6, atol=1e-6)


def test_autocast_has_no_effect() -> None:
    K, Y = spd(n=30).float(), points(30, 4).float()
    phi = points(30, 5).float()
    X = points(30, 3).float()
    expected = solve_ridge(K, Y, 0.1), solve_feature_ridge(phi, Y, 0.1), gram_product(Gaussian(), X, X, Y)
    with torch.autocast("cpu", torch.bfloat16):
        inside = solve_ridge(K, Y, 0.1), solve_feature_ridge(phi, Y, 0.1), gram_product(Gaussian(), X, X, Y)
    for a, b in zip(inside, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


# ---- ridge regression --------------------------------------------------------------------------------------


def test_kernel_ridge_as_in_scikit_learn() -> None:
    X, Y, Q = points(40, 3), points(40, 2, seed=1), points(15, 3, seed=2)
    kernel = Laplacian(4.0, dtype=torch.float64)
    with torch.no_grad():
        alpha = solve_ridge(kernel(X), Y, 0.11)
        prediction = gram_product(kernel, Q, X, alpha, chunk_size=4)
    reference = KernelRidge(alpha=0.11, kernel="laplacian", gamma=0.25).fit(X.numpy(), Y.numpy())
    torch.testing.assert_close(alpha, torch.from_numpy(reference.dual_coef_))
    torch.testing.assert_close(prediction, torch.from_numpy(reference.predict(Q.numpy())))


@pytest.mark.parametrize("features", [4, 50])
def test_primal_and_dual_ridge_agree(features: int) -> None:
    phi, Y = points(2, 20, features), points(2, 20, 3, seed=1)
    ridge = torch.tensor([0.2, 0.7], dtype=torch.float64)
    W = solve_feature_ridge(phi, Y, ridge)
    torch.testing.assert_close(phi @ W, phi @ phi.mT @ solve_ridge(phi @ phi.mT, Y, ridge))
    torch.testing.assert_close(solve_feature_ridge(phi, Y[..., 0], ridge), W[..., 0])
    assert solve_feature_ridge(phi.float(), Y, 0.1, dtype=torch.float32).dtype == torch.float32


# ---- in blocks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_blocks_equal_the_whole(chunk_size: int) -> None:
    X, Z, V = points(2, 23, 3), points(2, 11, 3, seed=1), points(2, 11, 4, seed=2)
    for kernel in (Gaussian(dtype=torch.float64), Laplacian(dtype=torch.float64)):
        torch.testing.assert_close(chunked_gram(kernel, X, Z, chunk_size=chunk_size), kernel(X, Z))
        torch.testing.assert_close(chunked_gram(kernel, X, chunk_size=chunk_size), kernel(X))
        torch.testing.assert_close(gram_product(kernel, X, Z, V, chunk_size=chunk_size), kernel(X, Z) @ V)
    v = points(11, seed=3)
    kernel = Gaussian(dtype=torch.float64)
    torch.testing.assert_close(gram_product(kernel, X[0], Z[0], v, chunk_size=chunk_size), kernel(X[0], Z[0]) @ v)
    assert chunked_gram(kernel, X[:, :0], Z, chunk_size=chunk_size).shape == (2, 0, 11)
    assert gram_product(kernel, X[:, :0], Z, V).shape == (2, 0, 4)


def test_blocks_have_the_gradients_of_the_whole() -> None:
    X, Z = points(9, 3).requires_grad_(), points(5, 3, seed=1).requires_grad_()
    kernel = PrecisionGaussian(3, dtype=torch.float64)
    inputs = (X, Z, *kernel.parameters())
    weight = points(9, 5, seed=2)
    whole = torch.autograd.grad((kernel(X, Z) * weight).sum(), inputs)
    blocks = torch.autograd.grad((chunked_gram(kernel, X, Z, chunk_size=4) * weight).sum(), inputs)
    for a, b in zip(blocks, whole, strict=True):
        torch.testing.assert_close(a, b)


def test_block_size_is_checked() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        chunked_gram(Gaussian(), points(3, 2).float(), chunk_size=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_as_on_the_cpu() -> None:
    X, Y = points(200, 3).float(), points(200, 2, seed=1).float()
    K = Gaussian(0.5)(X).detach()
    with torch.autocast("cuda", torch.bfloat16):
        alpha = solve_ridge(K.cuda(), Y.cuda(), 1e-3)
        product = gram_product(Gaussian(0.5).cuda(), X.cuda(), X.cuda(), alpha.float(), chunk_size=64)
    torch.testing.assert_close(alpha.cpu(), solve_ridge(K, Y, 1e-3), rtol=1e-6, atol=1e-6)
    expected = gram_product(Gaussian(0.5), X, X, alpha.float().cpu())
    torch.testing.assert_close(product.detach().cpu(), expected.detach(), rtol=1e-3, atol=1e-3)
