"""Deep kernel machines: limits, consistency, precision, losses, and training."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo
from tests.learners.conftest import digits  # noqa: F401
from zoo.kernels.infinite import Dense, InfiniteNetwork
from zoo.models.dkm import (
    ConvDKM,
    DeepKernelMachine,
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
    categorical_log_likelihood,
    gaussian_log_likelihood,
)

KINDS = ["arccos1", "arccos0", "normalised_gaussian", "sqexp"]


def randomised(module: nn.Module, seed: int = 0, scale: float = 0.3) -> nn.Module:
    """Every parameter matters."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype))
    return module


def rows(n: int, d: int, seed: int = 1) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_without_learning_it_is_the_infinite_network() -> None:
    X, Z = rows(7, 5), rows(4, 5, 2)
    points = InducingPoints(5, 4, dtype=torch.float64)
    with torch.no_grad():
        points.points.copy_(Z)
    net = nn.Sequential(points)
    for _ in range(2):
        net.extend([GramKernel("arccos1", 0.0, 0.0, dtype=torch.float64), GramLayer(4, math.inf)])
    root = math.sqrt(0.1)
    nngp = InfiniteNetwork([Dense(1.0), *["relu", Dense(2.0, root)] * 2], kind="nngp")
    found = net(X)
    torch.testing.assert_close(found.ii, nngp(Z), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.ti, nngp(X, Z), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.t, nngp.diag(X), rtol=1e-10, atol=1e-12)
    learned = nn.Sequential(points)
    for kernel in (net[1], net[3]):
        learned.extend([kernel, GramLayer(4, dtype=torch.float64)])
    for one, two in zip(learned(X), found, strict=True):  # untrained, a learned layer is that too
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-10)
    assert learned[2].penalty == learned[4].penalty == 0


@pytest.mark.parametrize("kind", KINDS)
def test_inducing_points_that_are_the_data_give_the_full_machine(kind: str) -> None:
    X = rows(6, 9)
    points = InducingPoints(9, 6, dtype=torch.float64)
    layers = [GramKernel(kind, 0.0, 0.0, dtype=torch.float64), GramLayer(6, dtype=torch.float64)] * 2  # type: ignore[arg-type]
    net = randomised(nn.Sequential(points, *layers))
    with torch.no_grad():
        points.points.copy_(X)
    state = net(X)
    torch.testing.assert_close(state.ti, state.ii, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(state.t, state.ii.diagonal(), rtol=1e-8, atol=1e-8)


def conv_net(dtype: torch.dtype, kind: str, stochastic: bool) -> nn.Sequential:
    dd = {"dtype": dtype}

    def layer(stride: int) -> list[nn.Module]:
        parts = [GramKernel(kind, **dd), GramConv(6, 6, 3, stride, **dd)]  # type: ignore[arg-type]
        return [*parts, GramLayer(6, 0.1, stochastic=stochastic, **dd), GramNorm("global", "image", **dd)]

    residual = GramResidual(layer(2), [GramConv(6, 6, 1, 2, **dd), GramNorm(**dd)])
    last = [GramMean(nystrom=True), GramKernel(kind, **dd), GramOutput(6, 3, **dd)]  # type: ignore[arg-type]
    return nn.Sequential(InducingPatches(2, 6, **dd), *layer(1), residual, *last)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stochastic", [False, True])
def test_float32_is_enough(kind: str, stochastic: bool) -> None:
    double = randomised(conv_net(torch.float64, kind, stochastic)).eval()
    single = conv_net(torch.float32, kind, stochastic).eval()
    single.load_state_dict(double.state_dict())
    images = torch.randn(3, 2, 7, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for one, two in zip(single(images.float()), double(images), strict=True):
        assert one.dtype == torch.float32
        assert float((one - two).abs().max() / two.abs().max()) < 1e-3
    mean, var = double(images)
    assert mean.shape == (3, 3)
    assert (var > 0).all()


def test_variances_are_never_negative() -> None:
    for seed in range(5):
        for stochastic in (False, True):
            torch.manual_seed(seed)
            layer = randomised(GramLayer(8, stochastic=stochastic, dtype=torch.float32), seed, 1.0)
            for train in (True, False):
                state = layer.train(train)(GramKernel()(InducingPoints(3, 8)(torch.randn(50, 3))))
                assert (state.t >= 0).all()
                assert all(t.isfinite().all() for t in state)


def test_a_convolution_is_one_of_features() -> None:
    """With explicit features: new inducing points are sums of old ones at k x k places."""
    g = torch.Generator().manual_seed(0)
    old, image = torch.randn(3, 4, generator=g).double(), torch.randn(1, 4, 5, 5, generator=g).double()
    ti = torch.einsum("ncxy,pc->nxyp", image, old)
    conv = GramConv(3, 2, dtype=torch.float64)
    found = conv(Gram(old @ old.mT, ti, image.square().sum(1)))
    C = conv.weight.detach() / math.sqrt(3)
    new = torch.einsum("opxy,pc->ocxy", C, old) / 3  # divided by k: its squared norm is a mean over places
    torch.testing.assert_close(found.ii, new.flatten(1) @ new.flatten(1).mT)
    patches = F.unfold(image, 3, padding=1).unflatten(1, (4, 9)).unflatten(-1, (5, 5)) / 3
    wanted = torch.einsum("ncrxy,ocr->nxyo", patches, new.flatten(2))
    torch.testing.assert_close(found.ti, wanted)
    inside = patches.square().sum((1, 2))[:, 1:-1, 1:-1]
    torch.testing.assert_close(found.t[:, 1:-1, 1:-1], inside)


def test_stochastic_regularisation_is_right_on_average() -> None:
    torch.manual_seed(0)
    K = GramKernel(dtype=torch.float64)(InducingPoints(4, 8, dtype=torch.float64)(rows(5, 4)))
    layer = randomised(GramLayer(8, stochastic=True, dtype=torch.float64))
    plain = GramLayer(8, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    with torch.no_grad():
        runs = [layer(K) for _ in range(1500)]
        exact, still = plain(K), layer.eval()(K)
    eye = 0.1 * torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(still.ii, exact.ii + eye)
    torch.testing.assert_close(torch.stack([r.ii for r in runs]).mean(0), still.ii, rtol=0.1, atol=0.15)
    torch.testing.assert_close(torch.stack([r.t for r in runs]).mean(0), still.t, rtol=0.1, atol=0.1)
    torch.testing.assert_close(layer.penalty, plain.penalty.detach())


# ---- models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [0, 7])
def test_losses_of_a_task_make_the_objective(samples: int) -> None:
    model = randomised(DeepKernelMachine(5, 3, inducing=6, samples=samples, train_size=40, dtype=torch.float64)).train()
    x, y = rows(9, 5), torch.arange(9) % 3
    torch.manual_seed(3)
    loss = F.cross_entropy(model(x), y) + torch.stack(list(model.aux_losses().values())).sum()
    mean, var = model.predict_distribution(x)
    torch.manual_seed(3)
    exact = -categorical_log_likelihood(mean, var, y, samples or 20_000) + model.penalties().sum() / 40
    if samples:
        torch.testing.assert_close(loss, exact, rtol=1e-12, atol=0)
    else:
        assert float(exact) < float(loss) < float(exact) + float(var.mean())
    loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_squared_error_makes_the_objective_too() -> None:
    noise = 0.3
    model = DeepKernelMachine(5, 2, inducing=6, likelihood="gaussian", noise=noise, train_size=40, dtype=torch.float64)
    model = randomised(model).train()
    x, y = rows(9, 5), rows(9, 2, 4)
    loss = F.mse_loss(model(x), y) + torch.stack(list(model.aux_losses().values())).sum()
    mean, var = model.predict_distribution(x)
    exact = -gaussian_log_likelihood(mean, var, y, noise) + model.penalties().sum() / 40
    constant = math.log(2 * math.pi * noise)  # of two outputs, halved
    torch.testing.assert_close(loss, 2 * noise * (exact - constant) / 2, rtol=1e-12, atol=0)


def test_it_learns(digits: tuple[Tensor, Tensor]) -> None:  # noqa: F811
    torch.manual_seed(0)
    X, y = digits[0].float(), digits[1]
    model = zoo.create_model("dkm_mlp", in_chans=64, inducing=60, depth=1)
    assert isinstance(model, DeepKernelMachine)
    model.initialize(X[:400], y[:400], generator=torch.Generator().manual_seed(0))
    assert int(model.train_size) == 400
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(22):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X[:400]), y[:400]) + torch.stack(list(model.aux_losses().values())).sum()
        loss.backward()
        optimizer.step()
    assert float((model.eval()(X[400:800]).argmax(1) == y[400:800]).float().mean()) > 0.75
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X[:5]), model(X[:5]))
    with pytest.raises(RuntimeError, match="a pass in train mode"):
        twin.aux_losses()
    deployed = zoo.to_deploy(model)
    torch.testing.assert_close(deployed(X[:5]), model(X[:5]))
    with pytest.raises(RuntimeError, match="deploy form"):
        deployed.predict_distribution(X[:5])


def test_patches_come_from_images() -> None:
    model = zoo.create_model("test_dkm_conv")
    assert isinstance(model, ConvDKM)
    images = torch.arange(2 * 3 * 8 * 8).float().view(2, 3, 8, 8)
    model.initialize(images, generator=torch.Generator().manual_seed(0))
    padded = F.pad(images, (1, 1, 1, 1))
    possible = {
        tuple(p.flatten().tolist())
        for p in padded.unfold(2, 3, 1).unfold(3, 3, 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    }
    assert all(tuple(p.flatten().tolist()) in possible for p in model.points.points.detach())
    assert int(model.train_size) == 2


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="inducing=100 points are taken from the training rows, of which there are 5"):
        DeepKernelMachine(4).initialize(torch.ones(5, 4))
    with pytest.raises(ValueError, match="one number more than depths"):
        ConvDKM(inducing=(4, 4), depths=(1, 1))
    with pytest.raises(ValueError, match="must be odd"):
        GramConv(3, 3, 2)
    with pytest.raises(ValueError, match="kind='relu' is not one of"):
        GramKernel("relu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nu=0"):
        GramLayer(3, 0)
    with pytest.raises(ValueError, match="needs inducing"):
        GramNorm(i_scale="local")
    with pytest.raises(ValueError, match="expected a batch of 4 features"):
        DeepKernelMachine(4, inducing=3)(torch.ones(2, 5))
    with pytest.raises(RuntimeError, match="there was none"):
        _ = GramLayer(3).penalty
