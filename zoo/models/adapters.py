"""Adapters on pretrained transformers: small trained branches in a frozen network, and SNNK in place of its layers.

`inject_adapters` knows timm's vision transformers and BERT-style encoders of Hugging Face transformers, whose names it
reads off the modules; neither library is imported. What is injected wraps modules without parameters, or shares the
parameters of the linear layer it stands beside: the names in the base model's state dict do not change.

    vector      y + v * Psi Phi(y)         SNNK, v = 0 at the start
    bottleneck  y + U Psi Phi(y) + c       SNNK with r hidden units, U = 0
    houlsby     y + U relu(D y + b) + c    Houlsby et al., 2019, the usual adapter, for comparison, U = 0

Phi are ReLU features of `zoo.kernels.random_features`. Sequential adapters sit behind attention and feed-forward
network, before the residual sum ("attention", "output"); parallel ones add v * Psi Phi(x) to a query, key or value
("query", "key", "value"). All start as the identity.

>>> config = AdapterConfig(form="vector", num_features=16, modules_to_save=("classifier",))
>>> model = inject_adapters(model, config)
>>> count_parameters(model)                      # trained, random, all
>>> save_adapter(model, "my_adapter")            # adapter_model.safetensors, adapter_config.json
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from zoo.files import CheckpointError, read_checkpoint, undisturbed, write_all, writer_of
from zoo.kernels.random_features import ReLUFeatures
from zoo.models.snnk import SNNKLinear
from zoo.suggest import suggestion

__all__ = [
    "Adapter",
    "AdapterConfig",
    "Counts",
    "HoulsbyAdapter",
    "SNNKAdapter",
    "adapter_names",
    "add_adapter",
    "count_parameters",
    "delete_adapter",
    "disable_adapters",
    "inject_adapters",
    "load_adapter",
    "merge_adapters",
    "save_adapter",
    "set_adapter",
    "unload_adapters",
]

FORMS = ("vector", "bottleneck", "houlsby")
SEQUENTIAL = ("attention", "output")
PARALLEL = ("query", "key", "value")
INITS = ("mam", "bert")


@dataclass(frozen=True)
class AdapterConfig:
    """What to inject, and where. Names follow PEFT where it has them.

    Attributes:
        form: `"vector"`, `"bottleneck"` or `"houlsby"`.
        places: Any of `"attention"`, `"output"` (behind attention and feed-forward network), `"query"`, `"key"`,
            `"value"` (beside them; form `"vector"` only).
        num_features: Random features m of an SNNK adapter.
        bottleneck: Hidden units r of the other two forms.
        layers_to_transform: Numbers of the layers, negative from the last one; None: all.
        exclude_modules: Regular expression for names of modules that are left out.
        modules_to_save: Last parts of names of modules that are trained and saved whole, a copy for each adapter:
            `("classifier",)`, `("pooler", "classifier")`, `("head",)`.
        init_weights: Start of Psi or D: `"mam"`, Kaiming-uniform, or `"bert"`, normal with deviation 0.02.
        constant: Lower clip of the features.
        centered: Centred features, see `ReLUFeatures`.
        normalize: Norm that features are computed at; None: as it comes.
        layer_norm: A LayerNorm of its own in front of the branch.
        projection: `"orthogonal"`, `"iid"` or `"hadamard"`.
        seed: Of the projections; each adapter of a model has one of its own.
        save_projection: Save the random projections too. Otherwise they are drawn again, and checked on loading.
    """

    form: Literal["vector", "bottleneck", "houlsby"] = "vector"
    places: tuple[str, ...] = ("attention", "output")
    num_features: int = 16
    bottleneck: int = 48
    layers_to_transform: tuple[int, ...] | None = None
    exclude_modules: str | None = None
    modules_to_save: tuple[str, ...] = ()
    init_weights: Literal["mam", "bert"] = "mam"
    constant: float = 0.0
    centered: bool = False
    normalize: float | None = None
    layer_norm: bool = False
    projection: Literal["orthogonal", "iid", "hadamard"] = "orthogonal"
    seed: int = 0
    save_projection: bool = True

    def __post_init__(self) -> None:
        for name in ("places", "modules_to_save", "layers_to_transform"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
        _one_of("form", self.form, FORMS)
        _one_of("init_weights", self.init_weights, INITS)
        for place in self.places:
            _one_of("places", place, (*SEQUENTIAL, *PARALLEL))
        if not self.places:
            raise ValueError("places is empty: name at least one")
        if self.form != "vector" and set(self.places) & set(PARALLEL):
            raise ValueError("query, key and value take adapters of form='vector' only")
        for name in ("num_features", "bottleneck"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: {value!r}{suggestion(value, allowed)}")


# ---- branches ----------------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """A branch from width d to width d; :meth:`branch` is what it adds."""

    def branch(self, x: Tensor) -> Tensor:
        """What is added to the module's output, (..., d) -> (..., d)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d): x + branch(x)."""
        return x + self.branch(x)


class SNNKAdapter(Adapter):
    """The SNNK adapter: v * Psi Phi(x), or U Psi Phi(x) + c.

    Args:
        dim: Width d.
        config: `form`, `num_features`, `bottleneck` and how Phi and Psi are made.
        seed: Of the projection.
        device: Where it lives.
        dtype: Its type.
    """

    def __init__(self, dim: int, config: AdapterConfig, seed: int = 0, device=None, dtype=None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        features = ReLUFeatures(
            dim,
            config.num_features,
            constant=config.constant,
            centered=config.centered,
            normalize=config.normalize,
            projection=config.projection,
            persistent=config.save_projection,
            bias=False,
            seed=seed,
            **dd,
        )
        vector = config.form == "vector"
        self.norm = nn.LayerNorm(dim, **dd) if config.layer_norm else nn.Identity()
        self.layer = SNNKLinear(features, dim if vector else config.bottleneck, **dd)
        if config.init_weights == "bert" and not self.layer.weight.is_meta:
            with torch.no_grad():
                start = torch.empty(self.layer.out_features, dim, **dd).normal_(std=0.02)
                self.layer.weight.copy_(features.encode(start))
        self.scale = nn.Parameter(torch.zeros(dim, **dd)) if vector else None
        self.up: nn.Linear | None = None
        if not vector:
            self.up = nn.Linear(config.bottleneck, dim, **dd)
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def branch(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        h = self.layer(self.norm(x))
        if self.up is not None:
            return self.up(h)
        return h if self.scale is None else h * self.scale

    @torch.no_grad()
    def reparameterize(self) -> None:
        """One matrix (d, m) in place of two, for `zoo.to_deploy`."""
        if self.up is not None:
            self.layer, self.up = self.layer.fold(self.up), None
        elif self.scale is not None:
            self.layer.weight.mul_(self.scale.unsqueeze(-1))
            self.scale = None


class HoulsbyAdapter(Adapter):
    """The bottleneck adapter of Houlsby et al. (arXiv 1902.00751): U relu(D x + b) + c."""

    def __init__(self, dim: int, config: AdapterConfig, seed: int = 0, device=None, dtype=None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(dim, **dd) if config.layer_norm else nn.Identity()
        self.down = nn.Linear(dim, config.bottleneck, **dd)
        self.up = nn.Linear(config.bottleneck, dim, **dd)
        if config.init_weights == "bert":
            nn.init.normal_(self.down.weight, std=0.02)
        else:
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for p in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(p)

    def branch(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        return self.up(F.relu(self.down(self.norm(x))))


# ---- where they sit ----------------------------------------------------------------------------------------


class _Switched:
    """Several named adapters, of which one or none is active."""

    adapters: nn.ModuleDict
    active: str | None
    enabled: bool

    def _current(self) -> Any:
        return self.adapters[self.active] if self.enabled and self.active and self.active in self.adapters else None


class SequentialSite(nn.Module, _Switched):
    """A module without parameters (a dropout), and the adapter behind it."""

    def __init__(self, base: nn.Module, dim: int) -> None:
        super().__init__()
        self.base, self.dim = base, dim
        self.adapters = nn.ModuleDict()
        self.active, self.enabled = None, True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives, through the active adapter."""
        y = self.base(*args, **kwargs)
        adapter = self._current()
        return y if adapter is None else adapter(y)


class ParallelSite(nn.Linear, _Switched):
    """A linear layer under its own parameter names, and adapters from its input to slices of its output."""

    dim: int
    kind: type[nn.Linear]
    parts: tuple[str, ...]  # what the slices of the output are: ("query",), or ("query", "key", "value")

    @classmethod
    def beside(cls, linear: nn.Linear, parts: tuple[str, ...]) -> ParallelSite:
        site = cls.__new__(cls)
        site.__dict__.update({k: dict(v) if isinstance(v, dict) else v for k, v in linear.__dict__.items()})
        site.parts, site.dim, site.kind = parts, linear.in_features, type(linear)
        site.adapters = nn.ModuleDict()
        site.active, site.enabled = None, True
        return site

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., out_features)."""
        y = super().forward(x)
        adapters = self._current()
        if adapters is None:
            return y
        width = self.out_features // len(self.parts)
        zero = y.new_zeros(())
        added = [adapters[p].branch(x) if p in adapters else zero.expand(*y.shape[:-1], width) for p in self.parts]
        return y + (torch.cat(added, -1) if len(added) > 1 else added[0])

    def restored(self) -> nn.Linear:
        linear: nn.Linear = self.kind.__new__(self.kind)
        kept = {k: v for k, v in self.__dict__.items() if k not in ("parts", "dim", "kind", "active", "enabled")}
        linear.__dict__.update({k: dict(v) if isinstance(v, dict) else v for k, v in kept.items()})
        linear._modules.pop("adapters")
        return linear


class SavedModule(nn.Module, _Switched):
    """A module that every adapter has a trained copy of."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.active, self.enabled = None, True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The active copy's output, or the original module's."""
        own = self._current()
        return (self.base if own is None else own)(*args, **kwargs)


Site = SequentialSite | ParallelSite | SavedModule


class _Target(NamedTuple):
    """A module to be replaced: its name, the place it stands for, its layer, and the width there."""

    name: str
    places: tuple[str, ...]
    layer: int
    dim: int


def _targets(model: nn.Module) -> list[_Target]:
    """Every place of every layer that is recognised."""
    found: list[_Target] = []
    layer = 0
    for name, module in model.named_modules():
        start, inner = f"{name}." if name else "", cast("Any", module)
        if _has(module, "attention.self.query", "attention.output.dropout", "output.dropout", "intermediate"):  # BERT
            dim = inner.attention.self.query.in_features
            found.append(_Target(f"{start}attention.output.dropout", ("attention",), layer, dim))
            found.append(_Target(f"{start}output.dropout", ("output",), layer, dim))
            found += [_Target(f"{start}attention.self.{p}", (p,), layer, dim) for p in PARALLEL]
            layer += 1
        elif _has(module, "attn.proj", "attn.proj_drop", "mlp.drop2", "norm1"):  # timm
            dim = inner.attn.proj.out_features
            found.append(_Target(f"{start}attn.proj_drop", ("attention",), layer, dim))
            found.append(_Target(f"{start}mlp.drop2", ("output",), layer, dim))
            if _has(module, "attn.qkv"):
                found.append(_Target(f"{start}attn.qkv", PARALLEL, layer, dim))
            layer += 1
    return found


def _has(module: nn.Module, *names: str) -> bool:
    for name in names:
        inner: Any = module
        for part in name.split("."):
            inner = getattr(inner, part, None)
            if not isinstance(inner, nn.Module):
                return False
    return True


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)


def sites(model: nn.Module) -> dict[str, Site]:
    """Every place with adapters, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, SequentialSite | ParallelSite | SavedModule)}


# ---- the calls ---------------------------------------------------------------------------------------------


def inject_adapters(model: nn.Module, config: AdapterConfig | Mapping[str, Any], name: str = "default") -> nn.Module:
    """Put adapters into a pretrained transformer, freeze the rest, and make them the active ones; in place.

    Args:
        model: A timm vision transformer, or a BERT-style encoder or classifier of Hugging Face.
        config: What and where; a mapping is taken as the arguments of :class:`AdapterConfig`.
        name: Of this set of adapters. Further ones may be added under other names.

    Returns:
        `model` itself.

    Raises:
        ValueError: Nothing in the model matches, the name is taken, or the configuration is not valid.
    """
    config = config if isinstance(config, AdapterConfig) else _config_from(config, "config")
    if not re.fullmatch(r"\w+", name):
        raise ValueError(f"name={name!r} of an adapter may hold letters, digits and _ only")
    if name in adapter_names(model):
        raise ValueError(f"there is already an adapter {name!r}: delete_adapter(model, {name!r}) first")
    chosen, saved = _choose(model, config)
    like = next(p for p in model.parameters() if p.is_floating_point())
    dd: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
    kind = HoulsbyAdapter if config.form == "houlsby" else SNNKAdapter
    for index, target in enumerate(chosen):
        seed = config.seed + 1000 * index
        if target.places[0] in SEQUENTIAL:
            site: Any = model.get_submodule(target.name)
            if not isinstance(site, SequentialSite):
                site = SequentialSite(site, target.dim)
                _replace(model, target.name, site)
            site.adapters[name] = kind(target.dim, config, seed, **dd)
        else:
            site = model.get_submodule(target.name)
            if not isinstance(site, ParallelSite):
                site = ParallelSite.beside(site, target.places)
                _replace(model, target.name, site)
            parts = [p for p in target.places if p in config.places]
            site.adapters[name] = nn.ModuleDict(
                {p: kind(target.dim, config, seed + i, **dd) for i, p in enumerate(parts)}
            )
        site.train(model.training)
    for target_name in saved:
        module: Any = model.get_submodule(target_name)
        if not isinstance(module, SavedModule):
            module = SavedModule(module).train(model.training)
            _replace(model, target_name, module)
        module.adapters[name] = copy.deepcopy(module.base).requires_grad_(True)
    configs = dict(getattr(model, "adapter_configs", {}))
    model.adapter_configs = {**configs, name: config}  # type: ignore[assignment]
    set_adapter(model, name)
    return model


add_adapter = inject_adapters


def _choose(model: nn.Module, config: AdapterConfig) -> tuple[list[_Target], list[str]]:
    """The modules that a configuration selects."""
    every = _targets(model)
    count = len({t.layer for t in every})
    if not every:
        raise ValueError(
            f"{type(model).__name__} has no layer that adapters know: a BERT-style encoder (attention.self.query, "
            "intermediate, output) or a timm vision transformer (attn.proj, mlp) is needed"
        )
    wanted = range(count)
    if config.layers_to_transform is not None:
        bad = [i for i in config.layers_to_transform if not -count <= i < count]
        if bad:
            raise ValueError(f"layers_to_transform: the model has {count} layers, there is no layer {bad[0]}")
        wanted = [i % count for i in config.layers_to_transform]  # type: ignore[assignment]
    skip = re.compile(config.exclude_modules) if config.exclude_modules else None
    chosen = [
        t
        for t in every
        if t.layer in wanted and set(t.places) & set(config.places) and not (skip and skip.search(t.name))
    ]
    if not chosen:
        raise ValueError(
            f"no module matches places={list(config.places)}, layers_to_transform={config.layers_to_transform}, "
            f"exclude_modules={config.exclude_modules!r}; there are {', '.join(t.name for t in every[:5])}, ..."
        )
    names = [name for name, _ in model.named_modules()]
    saved = []
    for last in config.modules_to_save:
        found = [n for n in names if (n == last or n.endswith(f".{last}")) and ".adapters." not in n]
        if not found:
            raise ValueError(f"modules_to_save: no module {last!r}{suggestion(last, [n for n in names if n])}")
        saved += found
    return chosen, saved


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the sets of adapters in a model."""
    return list(getattr(model, "adapter_configs", {}))


def _known(model: nn.Module, name: str) -> AdapterConfig:
    names = adapter_names(model)
    if name not in names:
        raise ValueError(f"there is no adapter {name!r}{suggestion(name, names) or '; there is none at all'}")
    return model.adapter_configs[name]  # type: ignore[index,return-value]


def set_adapter(model: nn.Module, name: str) -> None:
    """Make one set of adapters the active one, and the only thing that is trained.

    Raises:
        ValueError: There is none of this name.
    """
    _known(model, name)
    model.requires_grad_(False)
    for site in sites(model).values():
        site.active = name
        if name in site.adapters:
            site.adapters[name].requires_grad_(True)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove a set of adapters; another one, if there is any, becomes active.

    Raises:
        ValueError: There is none of this name.
    """
    _known(model, name)
    for site in sites(model).values():
        if name in site.adapters:
            del site.adapters[name]
    del cast("dict[str, AdapterConfig]", model.adapter_configs)[name]
    rest = adapter_names(model)
    if rest:
        set_adapter(model, rest[-1])
    else:
        unload_adapters(model)


def unload_adapters(model: nn.Module) -> nn.Module:
    """The base model again, every parameter trained, without any adapter; in place."""
    for name, site in sites(model).items():
        _replace(model, name, site.restored() if isinstance(site, ParallelSite) else site.base)
    if hasattr(model, "adapter_configs"):
        del model.adapter_configs
    return model.requires_grad_(True)


def merge_adapters(model: nn.Module) -> nn.Module:
    """Refused: these adapters are not linear, so that no weight of the base model can take them in.

    Raises:
        TypeError: Always; the message says what there is instead.
    """
    raise TypeError(
        "these adapters are not linear and cannot be merged into the base weights; zoo.to_deploy(model) makes each one "
        "a single matrix on random features, unload_adapters(model) removes them"
    )


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """A context in which the model computes exactly what the base model does."""
    found = list(sites(model).values())
    before = [site.enabled for site in found]
    for site in found:
        site.enabled = False
    try:
        yield
    finally:
        for site, enabled in zip(found, before, strict=True):
            site.enabled = enabled


class Counts(NamedTuple):
    """Numbers of a model: adapters that are trained, modules_to_save that are trained, fixed random ones, and all
    parameters.
    """

    adapters: int
    saved_modules: int
    random: int
    total: int


def count_parameters(model: nn.Module) -> Counts:
    """Count the active adapters of a model. Random projections are buffers; they are not part of `total`."""
    adapters = saved = random = 0
    for site in sites(model).values():
        if site.active is None or site.active not in site.adapters:
            continue
        own = site.adapters[site.active]
        trained = sum(p.numel() for p in own.parameters() if p.requires_grad)
        if isinstance(site, SavedModule):
            saved += trained
            continue
        adapters += trained
        random += sum(b.numel() for m in own.modules() if isinstance(m, ReLUFeatures) for b in m.buffers())
    return Counts(adapters, saved, random, sum(p.numel() for p in model.parameters()))


# ---- files -------------------------------------------------------------------------------------------------

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FORMAT = "kernel-zoo adapter 1"


def _state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Tensors of one set of adapters, by the name of their site."""
    found = {}
    for place, site in sites(model).items():
        if name in site.adapters:
            for key, value in site.adapters[name].state_dict().items():
                found[f"{place}.{key}"] = value
    return found


def save_adapter(model: nn.Module, folder: str | Path, name: str = "default") -> Path:
    """Write `adapter_model.safetensors` and `adapter_config.json`, both or neither.

    Raises:
        ValueError: There is no adapter of this name.
        CheckpointError: The folder cannot be written.
    """
    config = _known(model, name)
    state = {k: v.detach().cpu().contiguous().clone() for k, v in _state(model, name).items()}
    content = {"format": FORMAT, "base_model": type(model).__name__, **asdict(config)}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2).encode()
    write_all({folder / WEIGHTS: writer_of(to_safetensors(state)), folder / CONFIG: writer_of(text)})
    return folder


def load_adapter(model: nn.Module, folder: str | Path, name: str = "default") -> nn.Module:
    """Inject a saved set of adapters into the model it was trained on, and make it active; in place.

    Nothing is changed if anything is wrong.

    Raises:
        CheckpointError: A file is missing, damaged or no adapter, or it was saved for another model.
        ValueError: The name is taken.
    """
    folder = Path(folder)
    config, base, state = undisturbed(folder, lambda: _read(folder), (CONFIG, WEIGHTS))
    other = f"{folder} was saved for another model ({base}, this is {type(model).__name__})"
    before = _snapshot(model)
    try:
        inject_adapters(model, config, name)
    except ValueError as error:
        if name in adapter_names(model):
            raise
        raise CheckpointError(f"{other}: {error}") from None
    try:
        _fill(model, name, state, other)
    except CheckpointError:
        delete_adapter(model, name)
        _restore(model, before)
        raise
    return model


def _read(folder: Path) -> tuple[Any, str, dict[str, Any]]:
    """Configuration, name of the base model and weights of a saved set."""
    try:
        content = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder / CONFIG} cannot be read ({error}): it is no saved adapter, or damaged"
        ) from None
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise CheckpointError(f"{folder / CONFIG} is not the configuration of an adapter ({FORMAT!r} is missing)")
    base = content.pop("base_model", "another model")
    try:
        config = _config_from(content, str(folder / CONFIG))
    except (ValueError, TypeError) as error:
        raise CheckpointError(str(error)) from None
    return config, base, read_checkpoint(folder / WEIGHTS)


def _fill(model: nn.Module, name: str, state: Mapping[str, Tensor], other: str) -> None:
    own = _state(model, name)
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or unexpected or shapes:
        first = (
            f"{shapes[0]} has shape {tuple(state[shapes[0]].shape)} and should have {tuple(own[shapes[0]].shape)}"
            if shapes
            else f"{(missing or unexpected)[0]} is {'missing' if missing else 'not in this model'}"
        )
        raise CheckpointError(f"{other}: {first}")
    for place, site in sites(model).items():
        if name in site.adapters:
            part = {k.removeprefix(f"{place}."): v for k, v in state.items() if k.startswith(f"{place}.")}
            try:
                site.adapters[name].load_state_dict(part)
            except RuntimeError as error:
                raise CheckpointError(f"{place}: {error}") from None


def _snapshot(model: nn.Module) -> tuple[dict[str, bool], str | None]:
    active = next((site.active for site in sites(model).values()), None)
    return {name: p.requires_grad for name, p in model.named_parameters()}, active


def _restore(model: nn.Module, before: tuple[dict[str, bool], str | None]) -> None:
    trained, active = before
    if active is not None:
        set_adapter(model, active)
    for name, p in model.named_parameters():
        p.requires_grad_(trained.get(name, p.requires_grad))


def _config_from(content: Mapping[str, Any], origin: str) -> AdapterConfig:
    allowed = [f.name for f in fields(AdapterConfig)]
    unknown = [k for k in content if k not in allowed]
    if unknown:
        raise ValueError(f"{origin}: unknown entry {unknown[0]!r}{suggestion(unknown[0], allowed)}")
    return AdapterConfig(**content)
