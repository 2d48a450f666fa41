"""KCL, GKCL, analytic ridge and the baselines: what they promise beyond the common contract."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models import get_pretrained_cfg
from torch import Tensor

from zoo.kernels import create_kernel
from zoo.learners.kernel_ridge import KernelRidgeHead, SupportError
from zoo.learners.ridge import best_ridge, leave_one_out_errors, solve_ridge
from zoo.models import to_deploy
from zoo.models.continual import ConvolutionalVAE, GaussianGenerator, TaskError, choose_per_class
from zoo.registry.factory import create_model


def task_data(task: int = 0, n: int = 60, classes: int = 3, size: int = 8) -> tuple[Tensor, Tensor]:
    """Images whose class is a bright row, shifted by the task."""
    draw = torch.Generator().manual_seed(task)
    y = torch.arange(n) % classes
    x = 0.3 * torch.rand(n, 1, size, size, generator=draw)
    x[torch.arange(n), 0, (y + task) % size] += 0.7
    return x.clamp(0, 1), y


def learn(learner: Any, tasks: int = 2, steps: int = 30) -> Any:
    torch.manual_seed(0)
    optimizer = torch.optim.Adam([p for p in learner.parameters() if p.requires_grad], lr=3e-3)
    for t in range(tasks):
        x, y = task_data(t)
        x = x.to(next(v for v in learner.state_dict().values() if v.is_floating_point()).dtype)
        stream = learner.begin_task(t, x, y)
        learner.train()
        for _ in range(steps if len(stream[1]) else 0):
            chosen = torch.randperm(len(stream[1]))[:16]
            losses = learner.losses(stream[0][chosen], stream[1][chosen], t)
            optimizer.zero_grad()
            torch.stack(list(losses.values())).sum().backward()
            optimizer.step()
        learner.end_task(t, x, y)
    return learner.eval()


LEARNERS = {
    "kcl": ("test_kcl", {"shots": 4}),
    "kcl rff": ("test_kcl", {"shots": 4, "kernel": "rff", "num_bases": 64}),
    "kcl laplacian": ("test_kcl", {"shots": 4, "kernel": "rbf"}),
    "gkcl": ("test_gkcl", {"shots": 5}),
    "gkcl gaussian kernel": ("test_gkcl", {"kernel": "gaussian", "prior_index": "task_class"}),
    "gkcl input": ("test_gkcl", {"profile": "input"}),
    "gkcl mixture": ("test_gkcl", {"mixture": True}),
    "gkcl conv": ("test_gkcl", {"generator": "conv", "hidden": 32}),
    "gkcl input generated": ("test_gkcl", {"profile": "input", "train_support": "generated"}),
    "closed form": ("gkcl_gaussian", {"img_size": 8, "num_bases": 50, "rank": 8, "tasks": 3}),
    "ridge": ("analytic_ridge", {"img_size": 8, "num_bases": 50, "tasks": 3}),
    "naive": ("naive_mlp", {"img_size": 8, "hidden": 16, "tasks": 3}),
    "ewc": ("ewc_mlp", {"img_size": 8, "hidden": 16, "tasks": 3, "fisher_samples": 8}),
    "replay": ("replay_mlp", {"img_size": 8, "hidden": 16, "tasks": 3, "per_class": 4}),
    "lwf": ("lwf_mlp", {"img_size": 8, "hidden": 16, "tasks": 3}),
    "joint": ("joint_mlp", {"img_size": 8, "hidden": 16, "tasks": 3, "cumulative": True}),
}
every_learner = pytest.mark.parametrize("kind", LEARNERS)


def build(kind: str, **more: Any) -> Any:
    torch.manual_seed(1)
    name, options = LEARNERS[kind]
    return create_model(name, num_classes=3, **{**options, **more})


@every_learner
def test_learns_and_survives_a_file_before_and_after(kind: str) -> None:
    fresh = build(kind)
    build(kind).load_state_dict(fresh.state_dict())
    learner = learn(fresh, steps=60)
    x, y = task_data(1)
    assert (learner(x, 1).argmax(-1) == y).float().mean() > 0.6
    assert learner(x).shape == (60, 3)
    twin = build(kind).eval()
    twin.load_state_dict(learner.state_dict())
    with torch.no_grad():
        assert torch.equal(twin(x, 0), learner(x, 0))
    kept = learner.memory_footprint()
    assert kept["bytes"] > 0
    assert (kept["samples"] > 0) == (kind.split()[0] in ("kcl", "replay", "joint"))


@pytest.mark.parametrize("kind", [k for k in LEARNERS if "kcl" in k or k in ("closed form", "ridge")])
def test_deploy_form_has_the_solutions_only(kind: str) -> None:
    learner = learn(build(kind).double(), steps=3) if "kcl" in kind else learn(build(kind), steps=3).double()
    x = task_data(1)[0].double()
    merged = to_deploy(learner)
    for task in (0, 1, None):
        torch.testing.assert_close(merged(x, task), learner(x, task), rtol=1e-9, atol=1e-9)
    size = [sum(t.numel() for t in m.state_dict().values()) for m in (merged, learner)]
    assert size[0] < size[1] or kind == "closed form"
    with pytest.raises(TaskError, match="task 2 was never seen"):
        merged(x, 2)


def test_solutions_are_kept_until_a_weight_changes() -> None:
    learner = learn(build("kcl"), steps=3)
    x = task_data(0)[0]
    calls: list[int] = []
    solve = learner.head.solve
    learner.head.solve = lambda *a, **k: (calls.append(1), solve(*a, **k))[1]
    with torch.no_grad():
        first = learner(x, 0)
        assert torch.equal(learner(x, 0), first)
        assert len(calls) == 1
        learner.backbone[1].weight.mul_(1.1)
        assert not torch.equal(learner(x, 0), first)
    assert len(calls) == 2


@pytest.mark.parametrize("kind", ["kcl", "kcl rff", "kcl laplacian", "gkcl", "ridge"])
def test_both_answers_are_the_two_answers(kind: str) -> None:
    model = learn(build(kind), steps=5)
    x = task_data(1)[0]
    with torch.no_grad():
        for ours, plain in zip(model.predict_aware_and_agnostic(x, 1), (model(x, 1), model(x)), strict=True):
            torch.testing.assert_close(ours, plain)
    with pytest.raises(TaskError):
        model.predict_aware_and_agnostic(x, 2)


def test_current_parameters_are_the_quirk() -> None:
    own, current = (learn(build("kcl", eval_task_params=how), steps=3) for how in ("own", "current"))
    for learner in (own, current):
        with torch.no_grad():
            learner.head.gamma[1] = 3.0
    x = task_data(0)[0]
    torch.testing.assert_close(
        current(x, 0), 3.0 / own.head.gamma[0] * (own(x, 0) - own.head.beta[0]), rtol=0.2, atol=0.2
    )
    assert not torch.equal(own(x, 0), current(x, 0))


@pytest.mark.parametrize("kernel", ["linear", "poly", "laplacian", "gaussian"])
def test_gradients_of_the_head(kernel: str) -> None:
    head = KernelRidgeHead(kernel, dtype=torch.float64)
    s, q = (torch.rand(n, 3, dtype=torch.float64, requires_grad=True) for n in (6, 4))
    y = F.one_hot(torch.arange(6) % 3, 3).double()
    torch.autograd.gradcheck(lambda s, q, lam: (setattr(head, "_x", lam), head(s, y, q))[1], (s, q, head.lam))
    K = head.kernel(s)
    torch.testing.assert_close(solve_ridge(K, y, 0.3), torch.linalg.inv(K + 0.3 * torch.eye(6)) @ y)


def test_autocast_solves_in_full_precision() -> None:
    head = KernelRidgeHead("linear")
    s, y = torch.rand(40, 20), torch.arange(40) % 4
    with torch.autocast("cpu", torch.bfloat16):
        found = head(s, y, s)
    torch.testing.assert_close(found.float(), head(s, y, s), rtol=1e-4, atol=1e-4)


def test_leave_one_out_is_exact() -> None:
    torch.manual_seed(0)
    z, y = torch.randn(12, 4, dtype=torch.float64), F.one_hot(torch.arange(12) % 3, 3).double()
    K = create_kernel("gaussian", 0.2, dtype=torch.float64)(z)
    ridges = [0.01, 0.3, 5.0]
    errors, wrong = leave_one_out_errors(K, y, ridges)
    for r, error, share in zip(ridges, errors, wrong, strict=True):
        residuals = []
        for i in range(12):
            rest = [j for j in range(12) if j != i]
            alpha = solve_ridge(K[rest][:, rest], y[rest], r)
            residuals.append(y[i] - K[i, rest] @ alpha)
        torch.testing.assert_close(error, torch.stack(residuals).square().mean())
        assert float(share) == sum(int((y[i] - e).argmax() != y[i].argmax()) for i, e in enumerate(residuals)) / 12
    assert best_ridge(K, y, ridges) == ridges[int(errors.argmin())]


def test_incremental_ridge_is_joint_ridge() -> None:
    learner = learn(build("ridge", ridge=0.1).double(), tasks=3)
    x, y = (torch.cat(parts) for parts in zip(*(task_data(t) for t in range(3)), strict=True))
    phi = learner.forward_features(x.double())
    W = torch.linalg.solve(phi.mT @ phi + 0.1 * torch.eye(50), phi.mT @ F.one_hot(y, 3).double())
    torch.testing.assert_close(learner.head.weight, W.mT, rtol=1e-8, atol=1e-10)
    before = learner.task_weight[0].clone()
    assert torch.equal(learner.task_weight[0], before)


def test_replay_reaches_the_generator_only() -> None:
    """No cross-entropy on replayed images, and no gradient of the support into the priors by the classifier."""
    learner = learn(build("gkcl", eta=1.0, omega=0.0), tasks=1)
    x, y = task_data(1)
    learner.begin_task(1, x, y)
    terms = learner.train().losses(x[:16], y[:16], 1)
    assert {k for k in terms if k.startswith("replay")} == {"replay_vae", "replay_drift"}
    (gradient,) = torch.autograd.grad(terms["classifier"], learner.vae.prior_mean, allow_unused=True)
    assert gradient is None
    learner.end_task(1, x, y)
    assert not learner._old


def test_the_convolutional_generator_has_the_networks_of_the_notes() -> None:
    vae = ConvolutionalVAE(10, 3, stem="imagenet", latent=512, device="meta")
    tables = ("prior", "condition", "task")
    count = sum(p.numel() for name, p in vae.named_parameters() if not name.startswith(tables))
    assert count == 14_756_909 - 5_130  # that code has a linear classifier on z as well


@pytest.mark.parametrize(("size", "stem"), [(8, "cifar"), (28, "cifar"), (32, "imagenet"), (96, "imagenet")])
def test_the_convolutional_generator_takes_any_even_size(size: int, stem: Any) -> None:
    vae = ConvolutionalVAE(4, 2, 3, size, stem, latent=5, hidden=32, components=4).train()
    x, y = torch.rand(2, 3 * size * size), torch.tensor([0, 3])
    mean, log_variance, guess = vae.posterior(x, torch.tensor([0, 1]))
    assert mean.shape == log_variance.shape == (2, 5)
    assert guess is not None
    assert guess.shape == (2, 4)
    assert vae.generate(1, y).shape == x.shape


def test_the_input_profile_of_colour_images() -> None:
    model = create_model("gkcl_resnet", img_size=8, tasks=2, num_classes=3, hidden=32, latent=4, profile="input")
    x, y = task_data()
    x = x.expand(-1, 3, -1, -1)
    model.begin_task(0, x, y)
    torch.stack(list(model.train().losses(x, y, 0).values())).sum().backward()
    assert all(p.grad is not None for p in model.backbone.parameters())
    model.end_task(0, x, y)
    assert model.eval()(x, 0).shape == (60, 3)
    assert model.forward_features(x).shape == (60, model.num_features)


def test_a_guess_of_the_class_is_sampled_in_the_losses_only() -> None:
    model = create_model("test_gkcl", mixture=True)
    x = task_data()[0]
    assert not torch.equal(model.vae.encode(x)[0], model.vae.encode(x)[0])
    assert torch.equal(model.vae.embed(x), model.vae.embed(x))
    model.eval()
    assert torch.equal(model.vae.encode(x)[0], model.vae.embed(x))
    model.begin_task(0, *task_data())
    model.train()
    model.losses(*task_data(), 0)["vae"].backward()
    assert all(bool((p.grad != 0).any()) for p in model.vae.enc_class.parameters())


def test_class_incremental_mode() -> None:
    learner = build("gkcl", tasks=3)
    for t, classes in enumerate(([0, 1], [1, 2])):
        x, y = task_data(t)
        kept = torch.isin(y, torch.tensor(classes))
        learner.begin_task(t, x[kept], y[kept])
        learner.end_task(t, x[kept], y[kept])
    x, _ = task_data(0)
    assert learner.eval().class_incremental(x).shape == (60, 3)
    assert bool((learner(x, 0)[:, 2] < -1e10).all())
    images = learner.generate(1, torch.tensor([1, 2, 2]))
    assert images.shape == (3, 1, 8, 8)
    assert bool(((images > 0) & (images < 1)).all())


def test_gaussian_generator_is_the_density_it_says() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(200, 6, dtype=torch.float64) * torch.arange(1.0, 7), torch.arange(200) % 2
    generator = GaussianGenerator(6, 2, 1, rank=6, dtype=torch.float64)
    generator.fit(0, x, y, floor=1e-6)
    centred = x - torch.stack([x[y == k].mean(0) for k in (0, 1)])[y]
    covariance = centred.mT @ centred / 200
    for k in (0, 1):
        normal = torch.distributions.MultivariateNormal(x[y == k].mean(0), covariance)
        difference = generator.log_density(x, 0)[:, k] - normal.log_prob(x)
        torch.testing.assert_close(difference, difference[:1].expand(200), rtol=1e-5, atol=1e-5)


def test_coresets_are_drawn_without_replacement_and_left_out() -> None:
    learner = build("kcl")
    x, y = task_data(0)
    rest = learner.begin_task(0, x, y)
    images, labels = learner.coreset(0)
    assert labels.bincount().tolist() == [4, 4, 4]
    assert len(rest[1]) == 48
    everything = torch.cat([(rest[0] * 255).round(), images * 255]).flatten(1).round().unique(dim=0)
    assert len(everything) == 60


@every_learner
def test_batches_of_any_size(kind: str) -> None:
    """A last batch of one, two or three; batch normalisation alone needs two."""
    learner = build(kind)
    x, y = task_data()
    images, labels = learner.begin_task(0, x, y)
    if not len(labels):
        return
    learner.train()
    for n in range(learner.smallest_batch, 4):
        losses = learner.losses(images[:n], labels[:n], 0)
        assert all(torch.isfinite(loss) for loss in losses.values())
        torch.stack(list(losses.values())).sum().backward()


def test_ours_says_so_and_is_the_ridge_classifier_where_the_task_is_known() -> None:
    cfg = get_pretrained_cfg("gkcl_gaussian")
    assert cfg is not None
    assert not cfg.paper_ids
    assert "Ours" in cfg.notes[0]
    assert get_pretrained_cfg("gkcl_mlp").paper_ids == "arXiv:2112.13410"
    closed, plain = learn(build("closed form", shared=True)), build("ridge")
    plain.projection, plain.offset = closed.projection, closed.offset
    plain = learn(plain)
    x = task_data(1)[0]
    for task in (0, 1):
        assert torch.equal(closed(x, task), plain(x, task))


# ---- what is refused ---------------------------------------------------------------------------------------


def test_bad_input_has_one_clear_error_each() -> None:
    with pytest.raises(ValueError, match="img_size=7 must be even"):
        ConvolutionalVAE(4, 2, 3, 7)
    learner = learn(build("kcl"), tasks=1, steps=2)
    x, y = task_data(1)
    for kernel in ("rfb", "linaer"):
        with pytest.raises(ValueError, match=r"unknown kernel.*did you mean"):
            create_model("test_kcl", kernel=kernel)
    with pytest.raises(TaskError, match="class \\[0\\] only"):
        learner.begin_task(1, x[y == 0], y[y == 0])
    with pytest.raises(SupportError, match="empty"):
        create_model("test_kcl", shots=0)
    with pytest.raises(SupportError, match="empty"):
        KernelRidgeHead()(torch.empty(0, 3), torch.empty(0, dtype=torch.long), torch.rand(2, 3))
    with pytest.raises(TaskError, match="task 1 was never seen: tasks 0 to 0 were"):
        learner(x, 1)
    with pytest.raises(TaskError, match="learnt in order"):
        learner.begin_task(2, x, y)
    with pytest.raises(SupportError, match="NaN"):
        KernelRidgeHead()(torch.full((4, 3), torch.nan), torch.tensor([0, 1, 0, 1]), torch.rand(2, 3))
    with pytest.raises(SupportError, match="1 of 60 query features hold NaN"):
        learner(torch.cat([torch.full_like(x[:1], torch.nan), x[1:]]), 0)
    with pytest.raises(TaskError, match="NaN"):
        learner.begin_task(1, x / 0, y)
    with pytest.raises(TaskError, match="class 5"):
        learner.begin_task(1, x, y + 3)
    with pytest.raises(TaskError, match="2 samples; 4 of each"):
        learner.begin_task(1, x[:6], y[:6])
    with pytest.raises(ValueError, match="belongs to KCL"):
        create_model("test_gkcl", kernel="rff")
    for option in ({"profile": "pixel"}, {"prior_index": "x"}, {"likelihood": "x"}):
        with pytest.raises(ValueError, match="is not one of"):
            create_model("test_gkcl", **option)
    ridge = learn(build("ridge"), tasks=1)
    with pytest.raises(SupportError, match="learnt already"):
        ridge.end_task(0, x, y)


def test_choose_per_class_follows_its_generator() -> None:
    labels = torch.arange(30) % 3
    draws = [choose_per_class(labels, 4, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert copy.copy(labels[draws[0]]).bincount().tolist() == [4, 4, 4]


@every_learner
def test_images_of_another_shape_are_told(kind: str) -> None:
    learner = build(kind).eval()
    for shape in ((1, 8, 8), (2, 64), (2, 1, 9, 9), (2, 3, 8, 8)):
        with pytest.raises(TaskError, match=rf"shape \[{', '.join(map(str, shape))}\]; the model takes \(B, 1, 8, 8\)"):
            learner(torch.zeros(shape))


def test_an_image_alone_has_the_same_density_as_in_a_batch() -> None:
    model = create_model("gkcl_gaussian.digits", pretrained=True).eval()
    x = torch.linspace(0, 1, 32 * 64).view(32, 1, 8, 8).roll(7, 0)
    with torch.no_grad():
        together, alone = model(x), torch.cat([model(image) for image in x.split(1)])
    torch.testing.assert_close(together, alone, rtol=0, atol=3e-5)
    assert together.dtype == torch.float32
