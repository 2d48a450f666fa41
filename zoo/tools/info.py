"""Facts about models: parameters, multiply-adds, memory, receptive field, and the record of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from zoo.models.deploy import to_deploy
from zoo.registry import bundled_weights
from zoo.registry.factory import as_named, create_model
from zoo.support import inputs
from zoo.support.files import locate, read_config
from zoo.support.values import first_line
from zoo.tools import estimators
from zoo.tools.errors import ToolError
from zoo.tools.listing import FRESH, PUBLISHED, SHIPPED, listing, published

__all__ = ["describe", "example", "listing"]


def example(model: nn.Module, batch: int = 2, size: int | None = None) -> Tensor:
    """Random inputs of the shape of a model's input record, or of the model.

    Images (B, C, H, W), waveforms (B, samples), tokens (B, L), or rows (B, D) with the mean and scale of the model's
    standardisation.

    Raises:
        ToolError: The model does not take images of that size, or there is no memory for one.
    """
    if size is None:
        return _random_inputs(model, batch, None)
    try:
        with torch.no_grad():
            images = _random_inputs(model, batch, size)
            model(images[:1])
    except Exception as error:  # models raise many kinds of errors for a wrong size
        raise ToolError(f"{type(model).__name__} takes no images of {size} pixels here: {first_line(error)}") from None
    if images.ndim < 4 or images.shape[-2:] != (size, size):
        shape = " x ".join(map(str, images.shape[1:]))
        raise ToolError(f"{type(model).__name__} takes inputs of {shape}, and no other size: leave out size = {size}")
    return images


def _random_inputs(model: nn.Module, batch: int, size: int | None) -> Tensor:
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    generator = torch.Generator().manual_seed(0)
    record = getattr(model, "input_record", None)
    known = inputs.shape_of(record) if record else None
    if words := getattr(model, "vocab_size", None):
        return torch.randint(1, words, (batch, *(known or model.input_shape)), generator=generator)  # type: ignore[misc]
    if shape := getattr(model, "input_shape", None):
        return torch.randn(batch, *(known or shape), generator=generator)
    shape = tuple(cfg.get("input_size") or (3, 224, 224))
    chans = getattr(model, "in_chans", None)
    shape = (chans if isinstance(chans, int) else shape[0], *shape[1:])
    table = shape[1:] == (1, 1)
    if size and len(shape) == 3 and not table:
        shape = (shape[0], size, size)
    if table:
        rows = torch.randn(batch, shape[0], generator=generator)
        if isinstance(mean := getattr(model, "input_mean", None), Tensor):
            return rows * model.input_scale + mean  # type: ignore[operator]
        return rows
    if set(cfg.get("mean") or (1,)) == {0} and set(cfg.get("std") or ()) == {1}:  # not normalised: pixels in [0, 1]
        return torch.rand(batch, *shape, generator=generator)
    return torch.randn(batch, *shape, generator=generator)


def describe(name: str, size: int | None = None, **kwargs: Any) -> dict[str, Any]:
    """Facts about a model; the weights of shipped tags and folders are loaded.

    Args:
        name: Name in the zoo or timm, with or without a tag, or the folder of a run or of a saved model.
        size: Side of the images, pixels; that of the model's configuration by default.
        **kwargs: Arguments of :func:`zoo.create_model`.

    Returns:
        `parameters` and `parameters_deploy`; `macs` of one input in deploy form (convolutions and matrix products,
        without FFTs); `weights_mib`; `largest_layer_mib` (inputs and outputs of the largest layer, one input);
        `receptive_field`: sides in pixels of the squares with 50 % and 90 % of the effective receptive field, None for
        a model without feature maps; `weights`: their source, empty for random ones; `record` of shipped weights.

    Raises:
        ToolError: The name or an argument is unknown, or the size does not suit the model.

    Of an estimator's folder the facts are those of :func:`zoo.tools.estimators.describe`.
    """
    if (saved := estimators.open_estimator(name)) is not None:
        return estimators.describe(saved)
    record = bundled_weights.records().get(name)
    try:
        given, name = name, as_named(name)
        local = name.startswith("local-dir:")
        model = create_model(name, pretrained=bool(record) or local, **kwargs).eval()
    except (ValueError, TypeError) as error:  # an unknown name or argument
        raise ToolError(str(error)) from None
    shown = example(model, 1, size)
    merged = to_deploy(model)
    facts: dict[str, Any] = {
        "name": given,
        "class": type(model).__name__,
        "input": list(shown.shape[1:]),
        "num_classes": getattr(model, "num_classes", None),
        "num_features": getattr(model, "num_features", None),
        "parameters": _count(model),
        "parameters_deploy": _count(merged),
        "macs": _macs(merged, shown),
        "weights_mib": round(sum(p.numel() * p.element_size() for p in merged.state_dict().values()) / 2**20, 3),
        "largest_layer_mib": round(_largest(merged, shown) / 2**20, 3),
        "receptive_field": _field(merged, shown),
        "weights": _of_folder(name) if local else SHIPPED if record else PUBLISHED if "." in name else FRESH,
    }
    facts |= _of_table(inputs.record_of(model))
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    facts |= {key: cfg[key] for key in ("license", "paper_name", "paper_ids", "origin_url") if cfg.get(key)}
    if (top1 := published(cfg.get("notes"))) is not None:
        facts["published_top1"] = top1
    return facts | ({"record": record} if record else {})


def _of_table(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the columns of a user's table are, as text by name, and which one is predicted."""
    if record["kind"] != "table" or not record.get("target"):
        return {}
    found = {}
    for variable in inputs.read(record).variables:
        filled = "" if variable.fill is None else f", {variable.fill:.6g} if missing"
        many = len(variable.values or ())
        what = f"{many} categories" if many else f"{'true or false' if variable.truth else 'numbers'}{filled}"
        found[variable.name] = what
    return {"columns": found, "target": record["target"]}


def _of_folder(name: str) -> str:
    """The file of the weights of a `local-dir:` name, and its recorded hash."""
    folder = name.removeprefix("local-dir:")
    path, hashes = locate(name), read_config(folder).get("sha256", {})
    told = f"sha256 {hashes[path.name][:12]} as recorded" if path.name in hashes else "no sha256 on record"
    return f"{path}, {told}"


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _macs(model: nn.Module, given: Tensor) -> int:
    with _Flops() as counter:  # with gradients: inference kernels of our own are not counted
        model(given)
    return counter.total // 2


class _Flops(TorchDispatchMode):
    """Counts as torch's own counter does, without its import of the compiler, which takes seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, count = kwargs or {}, flop_registry.get(func._overloadpacket)
        if count is None and func is not torch.ops.prim.device.default:
            with self:
                if (made := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return made
        made = func(*args, **kwargs)
        self.total += 0 if count is None else count(*args, **kwargs, out_val=made)
        return made


def _largest(model: nn.Module, given: Tensor) -> int:
    sizes = [0]

    def note(_module: nn.Module, taken: tuple[Any, ...], made: Any) -> None:
        outs = made if isinstance(made, list | tuple) else (made,)
        sizes.append(sum(t.numel() * t.element_size() for t in (*taken, *outs) if isinstance(t, Tensor)))

    hooks = [m.register_forward_hook(note) for m in model.modules() if not list(m.children())]
    try:
        with torch.no_grad():
            model(given)
    finally:
        for hook in hooks:
            hook.remove()
    return max(sizes)


def _field(model: nn.Module, given: Tensor) -> dict[str, int] | None:
    if given.ndim != 4:
        return None
    from zoo.analysis.plots import square_of_share
    from zoo.analysis.probes.receptive_field import receptive_field

    try:
        field = receptive_field(model, torch.randn(4, *given.shape[1:], generator=torch.Generator().manual_seed(0)))
    except (ValueError, RuntimeError):
        return None
    return {f"{share:.0%}": square_of_share(field, share)[2] for share in (0.5, 0.9)}
