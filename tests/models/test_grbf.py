"""The network, its losses, what is read from it, and the solvers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor

import zoo
from zoo.data.tabular import Tabular
from zoo.estimators.grbf_solvers import Networks, Objective, fit_adam, fit_lbfgs, fit_varpro, project_weights
from zoo.kernels import metric_gaussian
from zoo.models.grbf import (
    GaussianRBFNetwork,
    eigen,
    importance_from_precision,
    network_loss,
)
from zoo.tasks import TabularTask, load_task

F64 = torch.float64
FORMS: list[Any] = ["full", "diag", "isotropic", 2]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def network(precision: Any = "full", outputs: int = 3, **kwargs: Any) -> GaussianRBFNetwork:
    model = GaussianRBFNetwork(4, outputs, 5, precision=precision, dtype=F64, **kwargs)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(0.5 * torch.randn(value.shape, generator=generator, dtype=F64))
        model.input_mean.copy_(draw(4, seed=1))
        model.input_scale.copy_(draw(4, seed=2).exp())
        if outputs:
            model.head.scale.copy_(draw(outputs, seed=3).exp())
    return model


# ---- the module --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", FORMS)
def test_forward_is_the_textbook_loop(precision: Any) -> None:
    model, X = network(precision), draw(7, 4, seed=5)
    P = model.precision()
    assert torch.linalg.eigvalsh(P)[0] > -1e-12
    for x, outputs in zip(X, model(X), strict=True):
        x = (x - model.input_mean) / model.input_scale
        phi = torch.stack([torch.exp(-0.5 * (x - c) @ P @ (x - c)) for c in model.centers])
        wanted = (model.head.weight @ phi + model.head.bias) * model.head.scale + model.head.mean
        torch.testing.assert_close(outputs, wanted)


@pytest.mark.parametrize("precision", FORMS)
def test_gradients_are_right(precision: Any) -> None:
    model = network(precision, 2)
    x = draw(3, 4, seed=6).requires_grad_()
    names = [name for name, _ in model.named_parameters()]

    def value(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(value, (x, *model.parameters()))
    assert torch.autograd.gradgradcheck(value, (x, *model.parameters()))


@pytest.mark.parametrize("precision", FORMS)
def test_input_gradients_are_those_of_autograd(precision: Any) -> None:
    model, X = network(precision), draw(6, 4)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x: model(x[None])[0]))(X)
    torch.testing.assert_close(model.input_gradients(X), jacobian * model.input_scale)


def test_points_far_from_zero_lose_no_digits() -> None:
    x, c, factor = draw(20, 3), draw(4, 3, seed=1), draw(3, 3, seed=2)
    exact = metric_gaussian(x, c, factor)
    shifted = metric_gaussian((x + 1000).float(), (c + 1000).float(), factor.float()).double()
    direct = torch.exp(
        -0.5 * (((x + 1000).float().double()[:, None] - (c + 1000).float().double()) @ factor).square().sum(-1)
    )
    torch.testing.assert_close(shifted, direct, rtol=1e-4, atol=1e-5)
    assert (exact <= 1).all()
    assert metric_gaussian(c, c, factor).diagonal().eq(1).all() or torch.allclose(
        metric_gaussian(c, c, factor).diagonal(), torch.ones(4, dtype=F64)
    )


def test_images_and_rows_and_mistakes() -> None:
    model = zoo.create_model("grbf", in_chans=1, img_size=8, num_classes=10)
    assert model.dim == 64
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(model(x), model(x.flatten(1)))
    with pytest.raises(ValueError, match="rows of 64 features"):
        model(torch.rand(2, 63))
    with pytest.raises(ValueError, match="rank"):
        zoo.create_model("grbf", in_chans=4, precision=5)
    with pytest.raises(ValueError, match="'full', 'diag', 'isotropic' or a rank"):
        zoo.create_model("grbf", precision="fulll")
    with pytest.raises(ValueError, match="no positions to pool"):
        zoo.create_model("grbf", global_pool="avg")
    with pytest.raises(TypeError, match="n_centers"):
        zoo.create_model("grbf", n_centres=4)


@pytest.mark.parametrize("learn", [True, False])
def test_fixed_centres_are_a_buffer_and_moves_carry_everything(learn: bool) -> None:
    model = GaussianRBFNetwork(4, 2, 5, learn_centers=learn)
    assert ("centers" in dict(model.named_parameters())) == learn
    assert {"centers", "input_mean", "input_scale"} <= set(model.state_dict())
    model.to(torch.float64)
    assert all(t.dtype == F64 for t in model.state_dict().values())
    assert model.to(torch.bfloat16)(torch.rand(3, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    meta = GaussianRBFNetwork(4, 2, 5, learn_centers=learn, device="meta")
    assert all(t.is_meta for t in meta.state_dict().values())


def test_half_precision_and_autocast_keep_the_kernel() -> None:
    model = GaussianRBFNetwork(30, 3, 8)
    x = 3 * torch.randn(16, 30, generator=torch.Generator().manual_seed(0))
    exact = model.forward_features(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model.forward_features(x), exact)


def test_export() -> None:
    model, x = GaussianRBFNetwork(6, 3, 4).eval(), torch.rand(5, 6)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    torch.testing.assert_close(program.module()(x[:3]), model(x[:3]))


def test_saved_folder_gives_the_same_model(tmp_path: Path) -> None:
    model = zoo.create_model("grbf", in_chans=4, num_classes=3, precision="diag", n_centers=6, reg_precision=0.5)
    model.initialize(draw(30, 4).float(), torch.arange(30) % 3)
    zoo.save_pretrained(model, tmp_path / "m")
    again = zoo.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True)
    x = torch.rand(5, 4)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    assert again.reg_precision == 0.5


# ---- the start ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["full", "diag", "isotropic", 2])
@pytest.mark.parametrize("D", [2, 13, 64, 256])
def test_units_are_alive_at_the_start(D: int, precision: Any) -> None:
    model = GaussianRBFNetwork(D, 1, 16, precision=precision)
    X = 5 + 3 * draw(200, D).float()
    model.initialize(X, generator=torch.Generator().manual_seed(0))
    phi = model.forward_features(X)
    assert 0.3 < phi.median() < 0.9


def test_official_start_is_dead_above_thirteen_features_and_says_so() -> None:
    model = GaussianRBFNetwork(64, 1, 8)
    with pytest.warns(RuntimeWarning, match='dead.*init="median"'):
        model.initialize(draw(100, 64).float(), init="official")


def test_start_depends_on_the_generator_alone() -> None:
    X, states = draw(50, 4), []
    for noise in (1, 2):
        torch.manual_seed(noise)
        model = GaussianRBFNetwork(4, 1, 6, dtype=F64)
        before = torch.get_rng_state()
        model.initialize(X, X[:, 0], generator=torch.Generator().manual_seed(3))
        assert torch.equal(before, torch.get_rng_state())
        states.append(model.state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_start_of_the_outputs() -> None:
    X = draw(40, 4)
    model = GaussianRBFNetwork(4, 1, 6, dtype=F64)
    model.initialize(X, 100 + 7 * X[:, 0])
    assert 90 < model(X).mean() < 110
    model = GaussianRBFNetwork(4, 1, 6, dtype=F64)
    model.initialize(X, (torch.arange(40) < 10).long())
    assert model.head.bias.item() == pytest.approx(math.log(1 / 3))


@pytest.mark.parametrize(("level", "width"), [(52.5, 1e-5), (589e-9, 1e-13), (1.7e12, 3e5), (0.3, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_rows_are_rounded_after_they_are_standardised(level: float, width: float, dtype: torch.dtype) -> None:
    u = torch.rand(60, 2, generator=torch.Generator().manual_seed(0), dtype=F64) * 2 - 1
    X = torch.stack([level + width * u[:, 0], u[:, 1]], 1)
    spread = X.std(0, correction=0)
    Z = (X - X.mean(0)) / torch.where(torch.tensor([width > 0, True]), spread, 1.0)
    outputs = []
    for rows in (X, Z):
        model = GaussianRBFNetwork(2, 1, 8, dtype=dtype)
        model.initialize(rows, 1e9 + 500 * u[:, 1], generator=torch.Generator().manual_seed(1))
        outputs.append(model.forward_features(rows).double())
        assert model.head.scale.item() == pytest.approx(float(500 * u[:, 1].std(correction=0)), rel=1e-6)
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-3 if dtype == torch.float32 else 1e-6)
    if level == 1.7e12:  # whole milliseconds as they come
        whole = X.long()
        model.initialize(whole)
        torch.testing.assert_close(model.forward_features(whole), model.forward_features(whole.double()))


def test_centres() -> None:
    X = draw(20, 4)
    model = GaussianRBFNetwork(4, 1, 5, dtype=F64)
    model.initialize(X, centers="random", standardize=False)
    assert all(any(torch.equal(c, x) for x in X) for c in model.centers)
    given = draw(5, 4, seed=9)
    model.initialize(X, centers=given, standardize=False)
    model.centers.data.add_(1)
    assert torch.equal(given, draw(5, 4, seed=9)), "the caller's array is not changed by training"
    with pytest.raises(ValueError, match="n_centers=5 is more than the 3 distinct rows"):
        model.initialize(X[:3].repeat(4, 1))
    with pytest.raises(ValueError, match="'kmeans', 'random', 'all' or a tensor"):
        model.initialize(X, centers="grid")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="init=-1 is a width and must be positive"):
        model.initialize(X, init=-1)
    with pytest.raises(ValueError, match="NaN or infinity"):
        model.initialize(X * math.inf)


# ---- losses and penalties ----------------------------------------------------------------------------------


def test_shapes_of_targets_are_checked() -> None:
    outputs = draw(6, 1)
    torch.testing.assert_close(network_loss(outputs, draw(6), "mse"), network_loss(outputs, draw(6, 1), "mse"))
    with pytest.raises(ValueError, match=r"do not belong to outputs"):
        network_loss(outputs, draw(5), "mse")
    with pytest.raises(ValueError, match="not one of"):
        network_loss(outputs, draw(6), "mae")


def test_weights_of_rows_are_copies() -> None:
    f, y, copies = draw(4, 3), torch.tensor([0, 1, 2, 1]), torch.tensor([1, 3, 0, 2])
    repeated = network_loss(f.repeat_interleave(copies, 0), y.repeat_interleave(copies))
    torch.testing.assert_close(network_loss(f, y, weight=copies.double()), repeated)
    torch.testing.assert_close(
        repeated, torch.nn.functional.cross_entropy(f.repeat_interleave(copies, 0), y.repeat_interleave(copies))
    )


@pytest.mark.parametrize("precision", FORMS)
def test_penalty_on_the_factor_is_the_trace(precision: Any) -> None:
    model = network(precision, reg_precision=2.0, reg_weights=0.0)
    trace = model.precision().trace()
    torch.testing.assert_close(model.penalties("squared")["precision"], 2 * trace)
    torch.testing.assert_close(model.penalties("plain")["precision"], 2 * trace.sqrt())
    assert set(model.aux_losses()) == {"precision_penalty"}


# ---- reading -----------------------------------------------------------------------------------------------


def test_rank_one_importances() -> None:
    v = torch.tensor([3.0, -1.0, 0.0, 2.0], dtype=F64)
    P = torch.outer(v, v)
    torch.testing.assert_close(importance_from_precision(P), v.abs() / v.abs().sum())
    torch.testing.assert_close(importance_from_precision(P, "trace"), v.square() / v.square().sum())
    values, components = eigen(P)
    torch.testing.assert_close(components[0], v / v.norm())
    assert values[0] == pytest.approx(14)


def test_nothing_learned_is_said() -> None:
    with pytest.warns(RuntimeWarning, match="the precision matrix is zero"):
        assert importance_from_precision(torch.zeros(4, 4)).tolist() == [0.25] * 4


def test_gradient_subspace_lies_in_the_range_of_the_precision() -> None:
    model, X = network(2), draw(50, 4)
    kernel = eigen(model.precision()).components[2:]
    G = model.gradient_outer_product(X)
    assert (kernel @ G).abs().max() < 1e-12
    assert model.gradient_outer_product(X, per_output=True).shape == (3, 4, 4)
    assert model.active_subspace("gradient", X).values[2] < 1e-12
    assert model.feature_importance("gradient", X).sum() == pytest.approx(1)
    with pytest.raises(ValueError, match="pass X"):
        model.feature_importance("gradient")


def test_authors_files_load_and_missing_centres_are_told() -> None:
    state = {"precision_elements": draw(10), "weights": draw(5)}
    centers = draw(5, 4, seed=4)
    with pytest.raises(ValueError, match="pass centers="):
        GaussianRBFNetwork.from_authors(state)
    fixed = GaussianRBFNetwork.from_authors(state, centers)
    learned = zoo.create_model("grbf", in_chans=4, num_classes=1, n_centers=5).double()
    zoo.load_checkpoint(learned, {**state, "centers": centers})
    X = draw(6, 4, seed=8)
    torch.testing.assert_close(fixed(X), learned(X))
    with pytest.raises(zoo.CheckpointError, match="centers"):
        zoo.load_checkpoint(learned, state)


# ---- solvers -----------------------------------------------------------------------------------------------


def problem(form: str, outputs: int, loss: str, penalty: Any = "squared", B: int = 2) -> tuple[Networks, Objective]:
    size = {"full": (10,), "low_rank": (4, 2), "diag": (4,), "isotropic": (1,)}[form]
    networks = Networks(
        0.5 * draw(B, *size), draw(B, 5, 4, seed=1), draw(B, outputs, 5, seed=2), draw(B, outputs, seed=3), form
    )
    X, weight = draw(11, 4, seed=4), draw(B, 11, seed=5).exp()
    y = (
        (torch.arange(11) % outputs)
        if loss == "cross_entropy" and outputs > 1
        else (draw(11, outputs, seed=6) > 0).double()
    )
    regs = [draw(B, seed=7 + i).exp() * 0.1 for i in range(3)]
    return networks, Objective(X, y, weight / weight.sum(1, keepdim=True), loss, *regs, penalty)


@pytest.mark.parametrize("penalty", ["squared", "plain"])
@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize(
    ("form", "outputs", "loss"),
    [
        ("full", 1, "mse"),
        ("full", 3, "cross_entropy"),
        ("low_rank", 1, "cross_entropy"),
        ("diag", 3, "cross_entropy"),
        ("isotropic", 2, "mse"),
    ],
)
def test_gradient_by_hand_is_that_of_autograd(form: str, outputs: int, loss: str, anchored: bool, penalty: Any) -> None:
    networks, objective = problem(form, outputs, loss, penalty)
    if anchored:
        objective = replace(objective, anchor=draw(*networks.factor().shape, seed=11))
    tracked = networks.detached(learn=True)
    value = objective(tracked)
    value.sum().backward()
    by_hand, gradients = objective.gradient(networks)
    torch.testing.assert_close(by_hand, value.detach())
    for name, tensor in tracked.tensors().items():
        torch.testing.assert_close(gradients[name], tensor.grad, msg=name)


def test_networks_trained_together_are_those_trained_alone() -> None:
    networks, objective = problem("full", 3, "cross_entropy", B=3)
    options: dict[str, Any] = {"max_iter": 40, "tol": 0.0}
    together = fit_adam(networks, objective, **options)
    for i in range(3):
        alone = fit_adam(networks.one(i), objective.one(i), **options)
        for name, value in alone.networks.tensors().items():
            torch.testing.assert_close(value[0], together.networks.tensors()[name][i])
    assert (together.history[-1] < together.history[0]).all()


def test_projected_weights_are_optimal() -> None:
    networks, objective = problem("full", 1, "mse")
    solved = project_weights(networks, objective, objective.y)
    _, gradients = objective.gradient(solved)
    assert gradients["weights"].abs().max() < 1e-10
    assert gradients["bias"].abs().max() < 1e-10


@pytest.mark.parametrize("solver", [fit_lbfgs, fit_varpro])
@pytest.mark.parametrize(("outputs", "loss"), [(1, "mse"), (1, "cross_entropy"), (3, "cross_entropy")])
def test_second_order_solvers_descend(solver: Any, outputs: int, loss: str) -> None:
    networks, objective = problem("full", outputs, loss)
    fit = solver(networks, objective, max_iter=60)
    assert (objective(fit.networks) < objective(networks)).all()
    assert fit.n_iter >= 1


def test_variable_projection_refuses_plain_norms() -> None:
    with pytest.raises(ValueError, match='penalty="squared"'):
        fit_varpro(*problem("full", 1, "mse", "plain"))


# ---- the task ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "metric", "floor"), [("iris", "acc", 0.85), ("diabetes", "r2", 0.3)])
def test_task_learns_from_a_table_and_its_checkpoint_stands_alone(
    name: str, metric: str, floor: float, tmp_path: Path
) -> None:
    data = Tabular(name=name, batch_size=64)
    spec = {
        "model_name": "grbf",
        "n_centers": 8,
        "num_classes": data.num_classes,
        "in_chans": data.in_chans,
        "reg_precision": 0.05,
    }
    torch.manual_seed(0)
    task = TabularTask(spec, {"opt": "adamw", "lr": 0.03}, class_names=data.class_names)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    options: dict[str, Any] = {**quiet, "accelerator": "cpu", "use_distributed_sampler": False}
    engine = L.Trainer(max_epochs=25, default_root_dir=tmp_path, **options)
    engine.fit(task, datamodule=data)
    assert engine.callback_metrics[f"val/{metric}"] == engine.callback_metrics["val/score"]
    engine.test(task, datamodule=data, verbose=False)
    assert engine.callback_metrics[f"test/{metric}"] > floor
    engine.save_checkpoint(tmp_path / "x.ckpt")
    X, _ = data.training_table()
    torch.testing.assert_close(load_task(tmp_path / "x.ckpt")(X), task.eval()(X))
    assert task.predict_step((X, None), 0).shape == ((len(X), 3) if name == "iris" else (len(X),))


def test_explanations_draw_what_the_network_says() -> None:
    from zoo.training.explanations import Explanations

    data = Tabular(name="wine")
    data.setup("fit")
    model = zoo.create_model("grbf", in_chans=13, num_classes=3)
    pictures = Explanations().pictures(model, data)
    assert set(pictures) == {"importances", "spectrum", "loadings", "summary", "output"}
    labels = [t.get_text() for t in pictures["importances"].get_yticklabels()]
    assert set(labels) <= set(data.feature_names)
    widths = [bar.get_width() for bar in pictures["importances"].patches]
    np.testing.assert_allclose(sorted(widths), sorted(model.feature_importance().tolist()), rtol=1e-6)


def test_a_metric_of_rank_one_has_no_plane_to_draw() -> None:
    from zoo.training.explanations import Explanations

    data = Tabular(name="wine")
    data.setup("fit")
    model = zoo.create_model("grbf", in_chans=13, num_classes=3, precision=1)
    assert set(Explanations().pictures(model, data)) == {"importances", "spectrum", "loadings", "summary"}


@pytest.mark.parametrize(("name", "outputs"), [("diabetes", 1), ("P1", 1), ("iris", 3)])
def test_pictures_of_rows_are_those_of_an_estimator(name: str, outputs: int) -> None:
    """What the callback draws from a module agrees with an estimator's own projection and predictions."""
    from zoo.estimators.grbf import GRBFClassifier, GRBFRegressor
    from zoo.training.explanations import Fitted

    data = Tabular(name=name, rows=200)
    data.setup("fit")
    rows, targets = (part.numpy() for part in data.training_table())
    model = (GRBFClassifier if data.class_names else GRBFRegressor)(
        solver="adam", n_centers=5, max_iter=20, random_state=0
    )
    model.fit(rows, targets)
    fitted = Fitted(model.to_module(), data.class_names)
    assert fitted.model.num_classes == outputs
    np.testing.assert_allclose(fitted.transform(rows), model.transform(rows), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(fitted.inverse_transform(fitted.transform(rows)), rows, rtol=1e-6, atol=1e-6)
    if data.class_names:
        np.testing.assert_allclose(fitted.predict_proba(rows), model.predict_proba(rows), rtol=1e-9)
    else:
        np.testing.assert_allclose(fitted.predict(rows), model.predict(rows), rtol=1e-9)


def test_importances_of_square_images_are_drawn_as_one() -> None:
    from zoo.training.explanations import Explanations

    model = zoo.create_model("grbf", in_chans=2, img_size=5, num_classes=3)
    pictures = Explanations().pictures(model)
    assert set(pictures) == {"importances", "spectrum", "loadings", "importance_image"}
    drawn = pictures["importance_image"].images[0].get_array()
    wanted = model.feature_importance().reshape(2, 5, 5).sum(0)
    np.testing.assert_allclose(drawn, wanted.numpy(), rtol=1e-5)
