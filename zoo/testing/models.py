"""What every model keeps."""

from __future__ import annotations

import copy
import io
from functools import cache
from typing import Any, ClassVar

import pytest
import timm
import torch
from torch import Tensor

from zoo.models import to_deploy

__all__ = ["ModelTests", "ShapeTests", "on_meta"]


class ShapeTests:
    """Shapes, the deploy form's too, and what optimizers ask for, without a number: for models of any size.

    Attributes:
        model: Registered name. Or parametrize `name`.
    """

    model: ClassVar[str]

    @pytest.fixture
    def name(self) -> str:
        """Name of the model under test."""
        return self.model

    def test_meta_forward(self, name: str) -> None:
        """Built without memory: everything sits on the device asked for, and shapes come out right."""
        model = on_meta(name)
        assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
        x = _images(model, device="meta")
        assert model(x).shape == (2, model.num_classes)
        assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, model.head_hidden_size)

    def test_deploy_form_on_meta(self, name: str) -> None:
        model = on_meta(name)
        merged = to_deploy(model)
        assert merged is not model
        assert merged(_images(model, device="meta")).shape == (2, model.num_classes)
        again = to_deploy(merged, inplace=True)
        assert again is merged

    def test_unknown_argument_is_refused(self, name: str) -> None:
        with pytest.raises(TypeError, match="no_such_argument"):
            timm.create_model(name, device="meta", no_such_argument=1)

    def test_weight_decay_and_layers_name_parameters(self, name: str) -> None:
        model = on_meta(name)
        names = {key for key, _ in model.named_parameters()}
        if hasattr(model, "layer_ids"):
            ids, last = model.layer_ids()
            assert set(ids) == names
            assert set(ids.values()) <= set(range(last + 1))
        if hasattr(model, "no_weight_decay"):
            assert isinstance(model.no_weight_decay(), set)


class ModelTests(ShapeTests):
    """Gradients, heads, types, files, deploy form, export, compilers and checkpointing of one model that is run."""

    def test_every_parameter_gets_a_gradient(self, name: str) -> None:
        model = _build(name, num_classes=42).train()
        out = model(_images(model, batch=4))
        assert out.shape == (4, 42)
        out.square().mean().backward()
        others = getattr(model, "training_only", ())  # what only a loss of the family's own reaches
        found = {key: p.grad for key, p in model.named_parameters() if not key.startswith(others or "-")}
        assert not [key for key, grad in found.items() if grad is None]
        assert not [key for key, grad in found.items() if not grad.isfinite().all()]

    def test_a_batch_is_its_samples(self, name: str) -> None:
        model = _build(name).double().eval()
        x = _images(model, batch=3, dtype=torch.float64)
        with torch.no_grad():
            together, alone = model(x), torch.cat([model(image[None]) for image in x])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-11)

    def test_head_can_be_replaced(self, name: str) -> None:
        model = _build(name).double().eval()
        x = _images(model, dtype=torch.float64)
        hidden = model.forward_head(model.forward_features(x), pre_logits=True)
        model.reset_classifier(7)
        assert model.num_classes == 7
        assert model(x).shape == (2, 7)
        assert model(x).dtype == torch.float64
        assert not any(module.training for module in model.modules())
        model.reset_classifier(0)
        torch.testing.assert_close(model(x), hidden, rtol=0, atol=1e-12)
        assert timm.create_model(name, num_classes=0)(_images(model)).shape == hidden.shape

    def test_input_channels(self, name: str) -> None:
        in_chans = 2 + on_meta(name).in_chans
        model: Any = timm.create_model(name, in_chans=in_chans)
        assert model.in_chans == in_chans
        assert model(_images(model)).shape == (2, model.num_classes)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_type_moves(self, name: str, dtype: torch.dtype) -> None:
        """After a forward pass in float32: nothing may have been cached in the old type."""
        model = _build(name).eval()
        x = _images(model).to(dtype).float()  # so that the input itself is the same in both types
        for form in (model, to_deploy(model)):
            with torch.no_grad():
                expected = form(x).double()
                out = form.to(dtype)(x.to(dtype))
            assert out.dtype == dtype
            error = (out.double() - expected).abs().max() / expected.abs().max()
            assert error < {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float64: 1e-4}[dtype]

    def test_built_in_a_type(self, name: str) -> None:
        model = timm.create_model(name, dtype=torch.float64)
        assert {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()} == {torch.float64}

    def test_autocast(self, name: str) -> None:
        model = _build(name)
        for form in (model.train(), model.eval(), to_deploy(model)):
            with torch.autocast("cpu", torch.bfloat16):
                out = form(_images(model, batch=4))
                out.float().sum().backward()
            assert out.isfinite().all()

    def test_channels_last(self, name: str) -> None:
        model = _build(name).double().eval()
        x = _images(model, dtype=torch.float64)
        if x.ndim != 4:
            pytest.skip("takes no images")
        model_last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        for form, twin in ((model, model_last), (to_deploy(model), to_deploy(model_last))):
            out = twin(x.contiguous(memory_format=torch.channels_last))
            torch.testing.assert_close(out, form(x), rtol=0, atol=1e-11)

    def test_weights_survive_a_file(self, name: str) -> None:
        model = _build(name).eval()
        for form in (model, to_deploy(model)):
            file = io.BytesIO()
            torch.save(form.state_dict(), file)
            file.seek(0)
            twin = timm.create_model(name).eval()
            twin = twin if form is model else to_deploy(twin)
            twin.load_state_dict(torch.load(file, weights_only=True))
            assert torch.equal(twin(_images(model)), form(_images(model)))

    def test_deploy_form_is_equal(self, name: str) -> None:
        model = _build(name).double().eval()
        x = _images(model, dtype=torch.float64)
        expected = model(x)
        merged, close = to_deploy(model), 1e-12 * max(1, expected.abs().max().item())
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(merged(x), expected, rtol=0, atol=close)
        state = copy.deepcopy(merged.state_dict())
        again = to_deploy(merged)
        assert again.state_dict().keys() == state.keys()
        assert all(torch.equal(again.state_dict()[key], value) for key, value in state.items())
        assert torch.equal(model(x), expected), "the original must not change"

    def test_deploy_form_keeps_flags(self, name: str) -> None:
        model = _build(name).train().requires_grad_(False)
        merged = to_deploy(model)
        assert merged.training
        assert all(module.training for module in merged.modules())
        assert not [key for key, p in merged.named_parameters() if p.requires_grad]
        live = to_deploy(_build(name).eval())
        assert not any(module.training for module in live.modules())
        assert all(p.requires_grad for p in live.parameters())

    def test_deploy_form_can_be_trained(self, name: str) -> None:
        model = to_deploy(_build(name)).train()
        model(_images(model, batch=4)).square().mean().backward()
        assert not [key for key, p in model.named_parameters() if p.grad is None]

    @pytest.mark.parametrize("deploy", [False, True])
    def test_export_with_any_batch(self, name: str, deploy: bool) -> None:
        model = _build(name).eval()
        model = to_deploy(model) if deploy else model
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(model, (_images(model),), dynamic_shapes=({0: batch},)).module()
        x = _images(model, batch=5)
        with torch.no_grad():
            torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-4)

    def test_compiles_as_one_graph(self, name: str) -> None:
        """Dynamo must see the whole model; the backend that turns graphs into code is not ours to test."""
        model = _build(name).eval()
        for form in (model, to_deploy(model)):
            compiled = torch.compile(form, backend="eager", fullgraph=True)
            torch.testing.assert_close(compiled(_images(model)), form(_images(model)), rtol=1e-4, atol=1e-4)

    def test_checkpointing_changes_neither_values_nor_statistics(self, name: str) -> None:
        model = _build(name).train()
        if not hasattr(model, "set_grad_checkpointing"):
            pytest.skip("has no activation checkpointing")
        twin = copy.deepcopy(model)
        try:
            twin.set_grad_checkpointing()
        except AssertionError as reason:  # timm's way of saying that there is nothing to recompute
            pytest.skip(str(reason))
        outputs = []
        for m in (model, twin):
            out = m(_images(model, batch=4))
            out.square().mean().backward()
            outputs.append([out, *(p.grad for p in m.parameters()), *(b.float() for b in m.buffers())])
        for got, want in zip(*outputs, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)

    def test_training_is_reproducible(self, name: str) -> None:
        model = _build(name).train()
        a, b = (copy.deepcopy(model)(_images(model)) for _ in range(2))
        assert torch.equal(a, b)


# ---- a model and its inputs ---------------------------------------------------------------------------------


@cache
def on_meta(name: str) -> Any:
    """A model without numbers."""
    return timm.create_model(name, device="meta")


def _build(name: str, **kwargs: Any) -> Any:
    """A model whose every weight and statistic matters, reproducible."""
    model = timm.create_model(name, **kwargs)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator, dtype=torch.float64) * 0.1
                value.copy_(1 + noise.abs() if key.endswith(("running_var", ".lam")) else value.double() + noise)
    return model


def _images(model: Any, batch: int = 2, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    shape = (batch, *getattr(model, "input_shape", (model.in_chans, *model.pretrained_cfg["input_size"][1:])))
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
