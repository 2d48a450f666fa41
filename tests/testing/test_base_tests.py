"""Every base test can fail: each is shown something that is right, and passes, and something wrong, and does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.kernels import Kernel, squared_distances
from zoo.learners.heads import NearestMean, nearest_mean, register_learner
from zoo.learners.statistics import ClassStatistics
from zoo.ops import operator
from zoo.testing import Case, KernelTests, LearnerTests, ModelTests, OperatorTests, models


def fails(test: Callable[..., None], **given: Any) -> bool:
    try:
        test(**given)
    except (Exception, pytest.fail.Exception):
        return True
    return False


def names_of(kind: type) -> list[str]:
    return sorted(name for name in dir(kind) if name.startswith("test_"))


def but(right: type, **changed: Any) -> Any:
    """The same class with some methods that are wrong."""
    return type("Wrong", (right,), changed)


# ---- kernels -----------------------------------------------------------------------------------------------


class Cauchy(Kernel):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def _gram(self, X: Tensor, Z: Tensor | None) -> Tensor:
        return self.scale / (1 + squared_distances(X, Z))

    def _diag(self, X: Tensor) -> Tensor:
        return self.scale.expand(X.shape[:-1])


gram, call = Cauchy._gram, Cauchy.forward
of_all_points = but(Cauchy, _gram=lambda k, X, Z: gram(k, X, Z) / gram(k, X, Z).max())
WRONG_KERNELS = {
    "test_symmetric_positive_semidefinite_with_its_own_diagonal": but(
        Cauchy, _gram=lambda k, X, Z: gram(k, X, Z) * X[..., :1]
    ),
    "test_batched_equals_looped": but(Cauchy, _gram=lambda k, X, Z: gram(k, X, Z) * X.ndim),
    "test_each_entry_is_the_function_of_two_points": of_all_points,
    "test_features_reproduce_the_kernel_or_say_that_there_are_none": but(
        Cauchy, has_features=True, _features=lambda k, X: X
    ),
    "test_gradients": but(Cauchy, _gram=lambda k, X, Z: gram(k, X, Z).detach() + 0 * X.sum()),
    "test_low_precision_in_low_precision_out_computed_in_full": but(
        Cauchy, forward=lambda k, X, Z=None: call(k, X, Z) * (1 if X.dtype == torch.float64 else 1.001)
    ),
    "test_autocast_has_no_effect": but(Cauchy, forward=lambda k, X, Z=None: X @ (X if Z is None else Z).mT),
    "test_moves_copies_and_saves": but(Cauchy, forward=lambda k, X, Z=None: call(k, X, Z).double()),
    "test_empty_sets": of_all_points,
    "test_wrong_inputs_are_told": but(Cauchy, forward=lambda k, X, Z=None: X.new_zeros(len(X), len(X))),
}


@pytest.mark.parametrize("test", names_of(KernelTests))
def test_a_wrong_kernel_fails(test: str) -> None:
    given = {"dtype": torch.float32} if "precision" in test else {}
    assert not fails(getattr(KernelTests(), test), kernel=Cauchy(), **given)
    assert fails(getattr(KernelTests(), test), kernel=WRONG_KERNELS[test](), **given)


# ---- learners ----------------------------------------------------------------------------------------------

scores = NearestMean.forward


def head_of(forward: Callable[[Any, Tensor], Tensor]) -> Callable[[ClassStatistics], Any]:
    def make(statistics: ClassStatistics) -> Any:
        head = nearest_mean(statistics)
        return but(NearestMean, forward=forward)(head.classes, head.means)

    return make


def drawn(statistics: ClassStatistics) -> NearestMean:
    head = nearest_mean(statistics)
    head.means += torch.randn_like(head.means)
    return head


def unsaved(statistics: ClassStatistics) -> NearestMean:
    head = nearest_mean(statistics)
    del head._buffers["means"]
    head.means = nearest_mean(statistics).means
    return head


def demanding(statistics: ClassStatistics) -> NearestMean:
    if statistics.rows < 10:
        raise ValueError("ten rows at least")
    return nearest_mean(statistics)


backwards = head_of(lambda head, F: -scores(head, F))
WRONG_LEARNERS: dict[str, Callable[[ClassStatistics], Any]] = {
    "test_classes_that_lie_apart_are_told_apart": backwards,
    "test_a_row_is_answered_alone": head_of(lambda head, F: scores(head, F - F.mean(0))),
    "test_any_order_and_parts_of_rows_are_the_same": drawn,
    "test_forgotten_rows_were_never_seen": drawn,
    "test_the_sums_stay_and_nothing_is_drawn": drawn,
    "test_a_head_is_a_module": unsaved,
    "test_wrong_features_and_no_rows_are_told": head_of(lambda head, F: -torch.cdist(F, head.means[:, : F.shape[1]])),
    "test_a_handful_of_rows_is_enough": demanding,
    "test_a_stream_takes_it_by_name": backwards,
}


@pytest.mark.parametrize("test", names_of(LearnerTests))
def test_a_wrong_learner_fails(test: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(register_learner, "_entries", dict(register_learner._entries))
    register_learner("wrong")(WRONG_LEARNERS[test])
    given = {"n": 3} if "handful" in test else {}
    assert not fails(getattr(LearnerTests(), test), make=nearest_mean, **given)
    assert fails(getattr(LearnerTests(), test), make=WRONG_LEARNERS[test], **given)


# ---- operators ---------------------------------------------------------------------------------------------


def square(x: Tensor) -> Tensor:
    return x * x


def declare(
    name: str, plain: Callable[[Tensor], Tensor], fast: Callable[[Tensor], Tensor] | None = None, **options: Any
) -> str:
    def function(x: Tensor) -> Tensor:
        return plain(x)

    function.__name__ = f"zoo_test_{name}"
    made = operator(**options)(function)
    if fast is not None:
        made.on("cpu", torch.float32)(fast)
    return made.name


RIGHT_OPERATOR = declare("square", square, torch.square)
WRONG_OPERATORS = {
    "test_torch_finds_it_well_formed": declare("alias", lambda x: x.view(x.shape)),
    "test_it_answers_as_its_reference": declare("inexact", square, lambda x: 1.001 * x * x),
    "test_special_values": declare("finite", square, lambda x: x.square().nan_to_num()),
    "test_it_may_be_transformed": declare("looked_at", lambda x: x * float(x.sum())),
    "test_the_defaults_of_a_process_change_nothing": declare("zeros", lambda x: x + torch.zeros(x.shape)),
    "test_autocast": declare("full", lambda x: x @ x.mT, lambda x: (x[:, None] * x).sum(-1), autocast="ignore"),
}


@pytest.mark.parametrize("test", names_of(OperatorTests))
def test_a_wrong_operator_fails(test: str) -> None:
    argument = {"test_it_answers_as_its_reference": "case", "test_special_values": "special"}.get(test, "first")
    given = {"order": torch.contiguous_format, "dtype": torch.float32} if argument == "case" else {}
    right, wrong = (Case(name, ((3, 4),)) for name in (RIGHT_OPERATOR, WRONG_OPERATORS[test]))
    assert not fails(getattr(OperatorTests(), test), **{argument: right}, **given)
    assert fails(getattr(OperatorTests(), test), **{argument: wrong}, **given)


# ---- models ------------------------------------------------------------------------------------------------


class Perceptron(nn.Module):
    pretrained_cfg = {"input_size": (2, 4, 4)}  # noqa: RUF012 (as timm has it)
    switched, factor = False, 1.0
    kept: Tensor | None = None

    def __init__(self, num_classes: int = 3, in_chans: int = 2, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.in_chans, self.num_features, self.head_hidden_size = in_chans, 5, 5
        self.body = nn.Linear(16 * in_chans, 5, device=device, dtype=dtype)
        self.unsaved = float(torch.rand(()))
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(x.flatten(1)).tanh()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.forward_head(self.forward_features(x))

    def reset_classifier(self, num_classes: int) -> None:
        like = {"device": self.body.weight.device, "dtype": self.body.weight.dtype}
        self.num_classes = num_classes
        self.head = (nn.Linear(5, num_classes, **like) if num_classes else nn.Identity()).train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Nothing to recompute."""

    def no_weight_decay(self) -> set[str]:
        return {"body.bias"}


def extra(model: Any, **options: Any) -> None:
    """A parameter of its own place and type, which nothing uses."""
    Perceptron.__init__(model, **options)
    model.extra = nn.Parameter(torch.zeros(1))


def single_head(model: Any, num_classes: int) -> None:
    model.num_classes, model.head = num_classes, nn.Linear(5, num_classes, device=model.body.weight.device)


def cached(model: Any, x: Tensor) -> Tensor:
    if model.kept is None:
        model.kept = model.body.weight.detach().clone()
    return (x.flatten(1) @ model.kept.mT).tanh()


def as_it_lies(model: Any, x: Tensor) -> Tensor:
    count = x.shape[1:].numel()
    return model.body(torch.as_strided(x, (len(x), count), (count, 1))).tanh()


features, answer = Perceptron.forward_features, Perceptron.forward
WRONG_MODELS: dict[str, Any] = {
    "test_meta_forward": but(Perceptron, __init__=extra),
    "test_deploy_form_on_meta": but(Perceptron, reparameterize=lambda m: setattr(m, "head", nn.Identity())),
    "test_unknown_argument_is_refused": but(
        Perceptron, __init__=lambda m, no_such_argument=0, **options: Perceptron.__init__(m, **options)
    ),
    "test_weight_decay_and_layers_name_parameters": but(Perceptron, no_weight_decay=lambda m: ["body.bias"]),
    "test_every_parameter_gets_a_gradient": but(Perceptron, __init__=extra),
    "test_a_batch_is_its_samples": but(Perceptron, forward_features=lambda m, x: features(m, x - x.mean(0))),
    "test_head_can_be_replaced": but(Perceptron, reset_classifier=single_head),
    "test_input_channels": but(Perceptron, __init__=lambda m, in_chans=2, **options: Perceptron.__init__(m, **options)),
    "test_type_moves": but(Perceptron, forward_features=cached),
    "test_built_in_a_type": but(Perceptron, __init__=extra),
    "test_autocast": but(
        Perceptron, forward=lambda m, x: answer(m, x) / (0 if torch.is_autocast_enabled("cpu") else 1)
    ),
    "test_channels_last": but(Perceptron, forward_features=as_it_lies),
    "test_weights_survive_a_file": but(Perceptron, forward=lambda m, x: m.unsaved * answer(m, x)),
    "test_deploy_form_is_equal": but(
        Perceptron, reparameterize=lambda m: m.head.weight.data.mul_(1.001).dim() and None
    ),
    "test_deploy_form_keeps_flags": but(Perceptron, reparameterize=lambda m: setattr(m, "head", nn.Linear(5, 3))),
    "test_deploy_form_can_be_trained": but(
        Perceptron, reparameterize=lambda m: setattr(m, "extra", nn.Parameter(torch.zeros(1)))
    ),
    "test_export_with_any_batch": but(Perceptron, forward=lambda m, x: answer(m, x) * (1 if len(x) == 2 else 2)),
    "test_compiles_as_one_graph": but(Perceptron, forward=lambda m, x: answer(m, x) * (1 if float(x.sum()) > 0 else 2)),
    "test_checkpointing_changes_neither_values_nor_statistics": but(
        Perceptron,
        set_grad_checkpointing=lambda m: setattr(m, "switched", True),
        forward=lambda m, x: answer(m, x) * (2 if m.switched else 1),
    ),
    "test_training_is_reproducible": but(Perceptron, forward=lambda m, x: answer(m, x + torch.randn_like(x))),
}


@pytest.mark.parametrize("test", names_of(ModelTests))
def test_a_wrong_model_fails(test: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {"right": Perceptron, test: WRONG_MODELS[test]}
    monkeypatch.setattr(models.timm, "create_model", lambda name, **options: kinds[name](**options))
    given = {"dtype": torch.float64} if "moves" in test else {"deploy": False} if "export" in test else {}
    models.on_meta.cache_clear()
    assert not fails(getattr(ModelTests(), test), name="right", **given)
    assert fails(getattr(ModelTests(), test), name=test, **given)
    models.on_meta.cache_clear()
