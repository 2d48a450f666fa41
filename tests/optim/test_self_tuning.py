"""Self-tuning networks: layers, surgery, what each step moves, and a strength found by training once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.learners.conftest import digits  # noqa: F401
from zoo.optim.self_tuning import (
    Hyperparameter,
    Response,
    ResponseConv2d,
    ResponseLinear,
    SelfTuning,
    TunedDropout,
    cross_entropy,
    replace_layers,
)


def perceptron(hidden: int = 32) -> nn.Sequential:
    return nn.Sequential(nn.Dropout(), nn.Linear(64, hidden), nn.ReLU(), nn.Dropout(), nn.Linear(hidden, 10))


def test_without_response_a_layer_is_itself() -> None:
    torch.manual_seed(0)
    x, image, response = torch.randn(5, 3, 8), torch.randn(5, 4, 6, 7), Response()
    linear, conv = nn.Linear(8, 6), nn.Conv2d(4, 6, 3, 2, 1, groups=2, bias=False)
    for layer, kind, inputs in ((linear, ResponseLinear, x), (conv, ResponseConv2d, image)):
        wrapped = kind(layer, response, 2)  # type: ignore[operator]
        assert torch.equal(wrapped(inputs), layer(inputs))
        response.free = torch.zeros(5, 2)
        assert torch.equal(wrapped(inputs), layer(inputs))
        response.free = torch.randn(5, 2)
        together = wrapped(inputs)
        response.free, kept = response.free[2:3], response.free
        torch.testing.assert_close(wrapped(inputs[2:3]), together[2:3])
        response.free = kept[:3]
        with pytest.raises(ValueError, match="5 samples"):
            wrapped(inputs)
        response.free = None


def test_surgery() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Dropout(), nn.Flatten(), nn.Linear(16, 3))
    kept, response = copy.deepcopy(model), Response()
    assert replace_layers(model, response, 1, dropout={"1": "rate"}) == 2
    assert isinstance(model[1], TunedDropout)
    x = torch.randn(2, 1, 4, 4)
    assert torch.equal(model(x), kept.eval()(x))
    assert isinstance(copy.deepcopy(model)[1], TunedDropout)
    with pytest.raises(ValueError, match="'0' is not a dropout of the model; there are 1"):
        replace_layers(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), response, 1, dropout={"0": "rate"})
    with pytest.raises(ValueError, match="no linear or convolutional"):
        replace_layers(nn.Sequential(nn.ReLU()), response, 1)
    with pytest.raises(ValueError, match="single layer"):
        replace_layers(nn.Linear(2, 2), response, 1)


def test_dropout_has_a_rate_for_each_sample() -> None:
    torch.manual_seed(0)
    response = Response(values={"rate": torch.tensor([0.0, 0.5, 0.9])})
    drop, x = TunedDropout(response, "rate"), torch.ones(3, 20, 500)
    y = drop(x)
    torch.testing.assert_close(
        (y == 0).double().mean((1, 2)), torch.tensor([0.0, 0.5, 0.9]).double(), atol=0.02, rtol=0
    )
    torch.testing.assert_close(y.mean((1, 2)), torch.ones(3), atol=0.1, rtol=0)
    assert torch.equal(drop.eval()(x), x)


def test_each_step_moves_its_own() -> None:
    torch.manual_seed(0)
    tuner = SelfTuning(perceptron(), {"dropout": Hyperparameter(0.3, 0.0, 0.9)})
    x, y = torch.randn(16, 64), torch.randint(10, (16,))

    def state() -> tuple[list[Tensor], list[Tensor]]:
        return [p.detach().clone() for p in tuner.model.parameters()], [
            p.detach().clone() for p in tuner.hypers.parameters()
        ]

    weights, hypers = state()
    tuner.train_step(x, y)
    trained, same = state()
    assert all(torch.equal(a, b) for a, b in zip(hypers, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(weights, trained, strict=True) if a.ndim == 2)
    tuner.optimizer.zero_grad()
    tuner.tune_step(x, y)
    assert all(p.grad is None for p in tuner.model.parameters())
    assert all(p.requires_grad for p in tuner.model.parameters())
    held, moved = state()
    assert all(torch.equal(a, b) for a, b in zip(trained, held, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(hypers, moved, strict=True))


@pytest.mark.parametrize("start", [0.3, 3.0])
def test_the_best_ridge_penalty_is_found(start: float) -> None:
    """A linear model whose penalty is tuned comes to the validation loss of the best penalty on a grid."""
    g = torch.Generator().manual_seed(3)
    w = torch.randn(12, 1, generator=g, dtype=torch.float64) / 12**0.5
    X, V = (torch.randn(n, 12, generator=g, dtype=torch.float64) for n in (16, 200))
    y, v = (M @ w + 0.7 * torch.randn(len(M), 1, generator=g, dtype=torch.float64) for M in (X, V))

    def validation(penalty: float) -> float:
        found = torch.linalg.solve(X.mT @ X / len(X) + penalty * torch.eye(12), X.mT @ y / len(X))
        return float((V @ found - v).square().mean())

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 1, bias=False)).double()

    def loss(out: Tensor, target: Tensor, values: dict[str, Tensor]) -> Tensor:
        fit = (out - target).square().mean()
        if "penalty" not in values:
            return fit
        layer = model[0]
        assert isinstance(layer, ResponseLinear)
        assert tuner.response.free is not None
        a, _ = (tuner.response.free @ layer.mixing.mT).chunk(2, -1)
        weight = layer.scale * layer.layer.weight + a[:, :, None] * layer.elastic_weight
        return fit + (values["penalty"] * weight.square().sum((1, 2))).mean()

    hyper = {"penalty": Hyperparameter(start)}
    draws = torch.Generator().manual_seed(0)
    tuner = SelfTuning(model, hyper, lr=0.05, tune_lr=0.02, scale=0.5, loss=loss, generator=draws)
    tuner.fit([(X.repeat(8, 1), y.repeat(8, 1))], [(V, v)], 400, warmup=50, train_steps=1)
    best = min(validation(p) for p in torch.logspace(-4, 1, 60).tolist())
    assert validation(0.01) > 1.5 * best
    assert validation(tuner.values()["penalty"]) < 1.02 * best


def test_history_and_values(digits: tuple[Tensor, Tensor]) -> None:  # noqa: F811
    torch.manual_seed(0)
    X, y = digits[0].float(), digits[1]
    named = {"dropout": Hyperparameter(0.1, 0.0, 0.9), "label_smoothing": Hyperparameter(0.1, 0.0, 0.5)}
    tuner = SelfTuning(perceptron(), named | {"input_noise": Hyperparameter(0.1)}, lr=0.1)
    batches = list(zip(X[:256].split(64), y[:256].split(64), strict=True))
    history = tuner.fit(batches, [(X[256:400], y[256:400])], 8, warmup=2)
    assert len(history) == 8
    assert history[-1]["validation_loss"] < history[0]["validation_loss"]
    assert history[1]["dropout"] == pytest.approx(0.1, abs=1e-6)
    assert history[-1]["dropout"] != history[1]["dropout"]
    assert {"epoch", "train_loss", "validation_loss", *named, "input_noise", "dropout_scale"} <= set(history[0])
    assert tuner.evaluate(batches) < history[0]["train_loss"]


def test_label_smoothing_is_torchs() -> None:
    torch.manual_seed(0)
    logits, y = torch.randn(6, 4), torch.randint(4, (6,))
    found = cross_entropy(logits, y, {"label_smoothing": torch.full((6,), 0.2)})
    torch.testing.assert_close(found, nn.functional.cross_entropy(logits, y, label_smoothing=0.2))


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"start=0\.95"):
        Hyperparameter(0.95, 0.0, 0.9)
    with pytest.raises(ValueError, match="no hyper-parameter is called 'rate'"):
        SelfTuning(perceptron(), {"dropout": Hyperparameter(0.1, 0.0, 0.9)}, dropout="rate")
    tuner = SelfTuning(perceptron(), {"dropout": Hyperparameter(0.1, 0.0, 0.9)})
    with pytest.raises(ValueError, match="no validation batches"):
        tuner.fit([(torch.randn(4, 64), torch.zeros(4).long())] * 2, [], 1, warmup=0)
    with pytest.raises(ValueError, match="no training batches"):
        tuner.fit([], [], 1)
