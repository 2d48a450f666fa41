"""Terminator: slow networks write the kernels of a fast network that sees the whole image in every layer.

Paper: Zhang, "HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction", 2024, arXiv 2401.17948.
The author published code for images in July 2024 and withdrew it; what follows is an independent implementation of that
network, equal to it in outputs, losses and gradients. No weights were ever published. The author's one-dimensional
networks were not released: :class:`Terminator` with `ndim=1` is ours.

No stem, no residuals, no downsampling: block 0 eats the image itself, and every map keeps its size. A block (SFNE,
slow-fast neural encoding) of C channels is

    K    = slow network(coordinates)                             the global hyper-kernel
    W    = x * K                                                 made context-dependent
    fast = IS( rgu_slow(W) + rgu_fast(x) );  mix = IS( mixer(x) );  hci = IS( x * sigmoid(channel scores of x) )
    G1, G2, G3 = W @ fast, W @ mix, W @ hci                      matrix products over rows and columns
    L_j  = GELU( BS( local_mix_j( depthwise(z_j, local slow network_j(context_j)) ) ) ) + local_bias_j
    H    = x * sigmoid( spatial score of G1 * channel score of G1 )
    out  = Dropout( GELU( G-IBS( bottleneck( concat of G's, L's, SiLU(G1), fast, H, earlier outputs ) ) ) + out_bias )

with IS, BS and G-IBS standardising by instance, by batch, and by both in turn, without affine parameters.

As published, statistics *and* local kernels come from the batch at hand in eval mode too, so a prediction depends on
the other images of its batch. `standardise_eval="running"` with `local_context="running"` makes it depend on its own
image alone. Published compute is high for the size: 1.1 GMACs for a 32 x 32 image, where a ResNet-18 of 11 M parameters
needs 0.56.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from itertools import pairwise
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_notrace_module,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.kernels import native
from zoo.kernels.hyperzzw import (
    GROUPS,
    SLOW_LOSSES,
    LocalSlowNet,
    SlowNet,
    StandardGELU,
    by_samples,
    causal_conv,
    channel_interaction,
    fold_product,
    gate,
    global_products,
    hyper_interaction,
    instance_standardise,
    local_conv,
    mean_over,
    mix_channels,
    same_conv,
    slow_loss,
    square_side,
    uniform_,
)
from zoo.kernels.watching import is_recorded
from zoo.support.suggest import suggestion

__all__ = ["RecursiveGatedUnit", "SlowFastBlock", "Terminator"]

for _operator in ("causal_conv", "same_conv", "fold_product", "local_conv"):
    torch.fx.wrap(_operator)
register_notrace_module(SlowNet)
register_notrace_module(LocalSlowNet)

#: What local branch j is made of: the map that makes its kernel, and the map that is convolved.
ROLES: dict[str, tuple[tuple[str, str], ...]] = {
    "code": (("x", "hci"), ("hci", "x"), ("mix", "x"), ("x", "mix")),
    "paper": (("x", "hci"), ("x", "mix"), ("mix", "x")),
}
LOCAL_SIZES = {"code": (3, 9, 5, 7), "paper": (5, 7, 9)}
#: Order of the concatenation: global products g1 to g3, local branches l0 to l3, earlier outputs pre0 and pre1.
ORDER = {
    "code": ("g1", "l1", "pre0", "fast", "g2", "l0", "silu", "l2", "g3", "l3", "pre1", "hi"),
    "paper": ("fast", "silu", "g1", "g2", "g3", "l0", "l1", "l2", "hi"),
}
#: Output channels of the blocks of the released network.
DIMS = (12, 36, 72, 144, 288)
#: Earlier outputs that each block of the released network sees again.
REUSE = ((), (), (0,), (1,), (2, 1))
GLOBAL_1D = ("causal_conv", "same_conv", "fold")


# ---- layers ------------------------------------------------------------------------------------------------


class RecursiveGatedUnit(nn.Module):
    """RGU: Y( GELU( IS( K x * Q V x ) ) + pos_bias ), a mixer of channels with a gate.

    Args:
        dim: channels C.
        size: height and width of the map.
        pos_shape: shape of `pos_bias`, one number for each pixel.
        **dd: device and dtype.
    """

    def __init__(self, dim: int, pos_shape: Sequence[int], **dd: Any) -> None:
        super().__init__()
        self.k, self.v, self.q, self.y = (nn.Linear(dim, dim, **dd) for _ in range(4))
        self.pos_bias = nn.Parameter(torch.zeros(tuple(pos_shape), **dd))
        for linear in (self.k, self.v, self.q, self.y):
            uniform_(linear)

    def gate(self, x: Tensor) -> Tensor:
        """Everything before Y, (B, C, H, W) to the same; Q V is one matrix."""
        weight, bias = self.q.weight @ self.v.weight, self.q.weight @ self.v.bias + self.q.bias
        if torch.is_grad_enabled():
            key, query = mix_channels([x], [self.k.weight], self.k.bias), mix_channels([x], [weight], bias)
            return gate(key, query, self.pos_bias)
        key, query = mix_channels([x], [self.k.weight]), mix_channels([x], [weight])
        return gate(key, query, self.pos_bias, [self.k.bias, bias], overwrite=True)  # no pass over the maps for them

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        return mix_channels([self.gate(x)], [self.y.weight], self.y.bias)


class SlowFastBlock(nn.Module):
    """SFNE block (equations in the file's head), on maps (B, C, N, N), or (B, C, 1, L) in 1-D.

    Args:
        dim: channels C.
        out_dim: channels of the output, divisible by 12.
        size: height and width of the maps; 1 and L in 1-D.
        pre_dims: channels of the earlier outputs it sees, at most two, each dividing C.
        drop_rate: probability of dropping a whole output channel while training.
        layout: "code" or "paper", see `ROLES` and `ORDER`.
        local_sizes: kernel sizes of the local branches.
        global_layers: layers of the global slow network.
        hidden: widths of the slow networks by name: `global`, `local`, `hci`, `hi_channel`, `hi_spatial`.
        layers: their layers, the global one's excepted.
        omega_0: frequency scale of all of them.
        running: keep running statistics for eval mode.
        local_context: see `LocalSlowNet`.
        global_1d: the global operator in 1-D.
        local_causal: whether local kernels in 1-D look back only.
        **dd: device and dtype.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        size: tuple[int, int],
        *,
        pre_dims: Sequence[int],
        drop_rate: float,
        layout: str,
        local_sizes: Sequence[int],
        global_layers: int,
        hidden: dict[str, int],
        layers: dict[str, int],
        omega_0: float | Literal["grid"],
        running: bool,
        local_context: Literal["batch", "running", "sample"],
        global_1d: str,
        local_causal: bool,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.dim, self.out_dim, self.size = dim, out_dim, size
        self.ndim = 1 if size[0] == 1 else 2
        self.pre_dims = list(pre_dims)
        self.drop_rate, self.global_1d, self.local_causal = drop_rate, global_1d, local_causal
        self.running = running
        self.batch_context, self.sample_context = local_context == "batch", local_context == "sample"
        self.roles = list(ROLES[layout])
        absent = ("pre0", "pre1")[len(self.pre_dims) :]
        self.order = [name for name in ORDER[layout] if name not in absent]
        points = size[-1]
        pos_shape = size[-self.ndim :]

        def slow(points: int, dims: int, name: str, depth: int, out: int) -> SlowNet:
            return SlowNet(points, dims, hidden[name], depth, out, omega_0=omega_0, **dd)

        self.global_net = slow(points, self.ndim, "global", global_layers, dim)
        self.hci_net = slow(dim, 1, "hci", layers["hci"], 1)
        self.hi_channel_net = slow(dim, 1, "hi_channel", layers["hi_channel"], 1)
        self.hi_spatial_net = slow(points, self.ndim, "hi_spatial", layers["hi_spatial"], 1)
        self.local_nets = nn.ModuleList(
            LocalSlowNet(
                k, self.ndim, hidden["local"], layers["local"], dim, context=local_context, omega_0=omega_0, **dd
            )
            for k in local_sizes
        )
        self.rgu_slow = RecursiveGatedUnit(dim, pos_shape, **dd)
        self.rgu_fast = RecursiveGatedUnit(dim, pos_shape, **dd)
        self.mixer = nn.Linear(dim, dim, **dd)
        self.local_mix = nn.ModuleList(nn.Linear(dim, dim, **dd) for _ in local_sizes)
        self.local_norm = nn.ModuleList(StandardGELU(dim, running=running, **dd) for _ in local_sizes)
        self.local_bias = nn.ParameterList(nn.Parameter(torch.zeros(1, **dd)) for _ in local_sizes)
        self.bottleneck = nn.Linear(dim * len(self.order), out_dim, **dd)
        self.out_norm = StandardGELU(out_dim, GROUPS, running, **dd)
        self.out_bias = nn.Parameter(torch.zeros(1, **dd))
        for linear in (self.mixer, *self.local_mix, self.bottleneck):
            normal_(linear)

    def hi(self, y: Tensor, x: Tensor) -> Tensor:
        """Hyper interaction: x gated by channel and place, the gate made of y; (B, C, H, W) all."""
        return hyper_interaction(y, x, self.hi_channel_net().to(y.dtype), self.hi_spatial_net().to(y.dtype))

    def global_operator(self, w: Tensor, z: list[Tensor]) -> list[Tensor]:
        """A context-dependent kernel applied to three maps, (B, C, H, W) all, and SiLU of the first result."""
        if self.ndim == 2:
            return global_products(w, z)
        if self.global_1d == "causal_conv":
            products = [causal_conv(w, part) for part in z]
        elif self.global_1d == "same_conv":
            products = [same_conv(w, part) for part in z]
        else:
            products = [fold_product(w, part) for part in z]
        return products + [F.silu(products[0])]  # noqa: RUF005 (TorchScript)

    def local_kernel(self, kernel: Tensor) -> Tensor:
        """What a local slow network wrote as 2-D taps."""
        if self.ndim == 2:
            return kernel
        if self.local_causal:  # nothing to the right of the centre
            kernel = F.pad(kernel, (0, kernel.shape[-1] - 1))
        return kernel.unsqueeze(2)

    def layer(self, x: Tensor, pre: list[Tensor], kernel: Tensor) -> Tensor:
        """Up to the bottleneck: (B, C, H, W), earlier outputs and the hyper-kernel to (B, out_dim, H, W)."""
        weights = self.bottleneck_weights(pre)
        w = kernel.view([1, self.dim, self.size[0], self.size[1]]).to(x.dtype)
        means: list[Tensor] = []
        hci = channel_interaction(x, self.hci_net().to(x.dtype), True, means)
        by_thread = False if torch.jit.is_scripting() else self._suits_threads(x, pre)

        # each image alone
        found = self._global_part(x, hci, pre, w, weights) if by_thread else None
        if found is not None:
            mixed, y = found
        else:
            mixed = mix_channels([x], [self.mixer.weight], standardised_bias(self.mixer.bias))
            mixed = instance_standardise(mixed, overwrite=True)
            maps = [x, mixed, hci] + pre  # noqa: RUF005 (TorchScript)
            if torch.jit.is_scripting():
                y = self.global_part(maps, w, weights)
            else:
                y = by_samples(partial(self.global_part, kernel=w, weights=weights), maps, self.out_dim)

        # together with the others of its batch
        named = {"x": x, "hci": hci, "mix": mixed}
        context = named
        if self.batch_context or (self.training and not self.sample_context):
            known = len(means) > 0
            context = {
                "x": means[0] if known else x.mean(0, keepdim=True),
                "hci": means[1] if known else hci.mean(0, keepdim=True),
                "mix": mixed.mean(0, keepdim=True),
            }
        convolved = [named[name] for _, name in self.roles]
        taps: list[Tensor] = []
        for j, net in enumerate(self.local_nets):
            taps.append(self.local_kernel(net(context[self.roles[j][0]]).to(x.dtype)))
        columns = [weights[f"l{j}"] for j in range(len(convolved))]
        done = self._local_branches(convolved, taps, columns, y) if by_thread else None
        if done is not None:
            return done
        branches: list[Tensor] = []
        biases = [bias for bias in self.local_bias]  # noqa: C416 (TorchScript has no list() of it)
        for j, (mix, norm) in enumerate(zip(self.local_mix, self.local_norm)):  # noqa: B905
            offset = standardised_bias(mix.bias, self.running)  # type: ignore[arg-type]
            moments: list[Tensor] = []
            if torch.jit.is_scripting() or self.sample_context:
                z = self.local_part([convolved[j]], taps[j], mix.weight, offset)  # type: ignore[arg-type]
            else:
                local = partial(self.local_part, taps=taps[j], weight=mix.weight, bias=offset)  # type: ignore[arg-type]
                z = by_samples(local, [convolved[j]], self.dim, moments)
            branches.append(norm(z, biases[j], True, moments))
        return mix_channels(branches, columns, onto=y)

    @torch.jit.ignore
    def _suits_threads(self, x: Tensor, pre: list[Tensor]) -> bool:
        """Whether the loops that give whole images to threads are for this input: inference in float32 on a CPU."""
        if is_recorded(x) or torch.is_grad_enabled() or self.training or self.sample_context:
            return False
        threads = torch.get_num_threads()
        shared = threads <= 2 or len(x) >= 4 * threads or len(x) % threads == 0  # few are idle
        fits = 1 < self.size[0] <= 64 and native.suits_planes(x)
        return shared and fits and native.available(x, *pre, *self._fast_parameters())

    def _fast_parameters(self) -> Iterator[Tensor]:
        """Those that are not a slow network's."""
        for name, module in self.named_children():
            yield from () if "net" in name else module.parameters()

    @torch.jit.ignore
    def _global_part(
        self, x: Tensor, hci: Tensor, pre: list[Tensor], kernel: Tensor, columns: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        """The mixed map, and what :meth:`global_part` answers; None where the loops don't take it."""
        weights: list[Tensor | None] = [self.mixer.weight, kernel]
        for unit in (self.rgu_slow, self.rgu_fast):
            weights += [t for linear in (unit.k, unit.v, unit.q) for t in (linear.weight, linear.bias)]
            weights += [unit.pos_bias]
        weights += [self.rgu_slow.y.weight, self.rgu_fast.y.weight]
        weights += [net().to(x.dtype) for net in (self.hi_channel_net, self.hi_spatial_net)]
        weights += [standardised_bias(self.bottleneck.bias, self.running)]
        names = ["fast", "hi", "g1", "g2", "g3", "silu", *(f"pre{i}" for i in range(len(pre)))]
        with suppress(native.Unsuited):
            return native.global_part(x, hci, pre, weights, [columns[name] for name in names])
        return None

    @torch.jit.ignore
    def _local_branches(
        self, maps: list[Tensor], taps: list[Tensor], columns: list[Tensor], y: Tensor
    ) -> Tensor | None:
        """The output of the block; None where the loops don't take it."""
        mixes = cast("list[nn.Linear]", list(self.local_mix))
        biases = [standardised_bias(mix.bias, self.running) for mix in mixes]
        norms = cast("list[StandardGELU]", list(self.local_norm))
        with suppress(native.Unsuited):
            z, moments = native.local_branches(maps, taps, [mix.weight for mix in mixes], biases)
            scales = [norm.scales(known) for norm, known in zip(norms, moments, strict=True)]
            return native.local_outputs_(z, scales, list(self.local_bias), columns, y)
        return None

    def global_part(
        self, maps: list[Tensor], kernel: Tensor, weights: dict[str, Tensor], out: Tensor | None = None
    ) -> Tensor:
        """What the bottleneck makes of all but the local branches; `maps` are x, mix, hci and the earlier outputs."""
        x = maps[0]
        w = x * kernel
        gates = [self.rgu_slow.gate(w), self.rgu_fast.gate(x)]
        y_bias = standardised_bias(self.rgu_slow.y.bias + self.rgu_fast.y.bias)
        fast = mix_channels(gates, [self.rgu_slow.y.weight, self.rgu_fast.y.weight], y_bias)
        fast = instance_standardise(fast, overwrite=True)
        found = self.global_operator(w, [fast, maps[1], maps[2]])
        parts = {"fast": fast, "hi": self.hi(found[0], x)}
        for i, name in enumerate(["g1", "g2", "g3", "silu"]):
            parts[name] = found[i]
        for i, earlier in enumerate(maps[3:]):
            parts[f"pre{i}"] = earlier
        names = list(parts.keys())
        columns = [weights[name] for name in names]
        offset = standardised_bias(self.bottleneck.bias, self.running)
        return mix_channels([parts[name] for name in names], columns, offset, out=out)

    def local_part(
        self, maps: list[Tensor], taps: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None
    ) -> Tensor:
        """A local branch before its standardisation; `maps` is the one that is convolved."""
        return mix_channels([local_conv(maps[0], taps)], [weight], bias, out=out)

    def bottleneck_weights(self, pre: list[Tensor]) -> dict[str, Tensor]:
        """The columns of the bottleneck for every part of its input."""
        weights: dict[str, Tensor] = {}
        for i, name in enumerate(self.order):  # not split(), which torch.fx cannot iterate over
            weights[name] = self.bottleneck.weight.narrow(1, i * self.dim, self.dim)
        for i, earlier in enumerate(pre):  # as if the map were repeated to C channels
            weights[f"pre{i}"] = weights[f"pre{i}"].unflatten(1, (-1, earlier.shape[1])).sum(1)
        return weights

    def forward(self, x: Tensor, pre: list[Tensor], kernel: Tensor) -> Tensor:
        """Map (B, C, H, W), earlier outputs and the global hyper-kernel to (B, out_dim, H, W)."""
        x = self.out_norm(self.layer(x, pre, kernel), self.out_bias, overwrite=True)
        return F.dropout2d(x, self.drop_rate, self.training)


def standardised_bias(bias: Tensor, known: bool = False) -> Tensor | None:
    """None where nobody wants gradients: standardisation takes a channel's constant away, except by `known` moments."""
    return bias if known or torch.is_grad_enabled() else None


def normal_(linear: nn.Linear) -> None:
    """Weight from N(0, 2 / fan_in), bias 0."""
    nn.init.normal_(linear.weight, std=(2 / linear.in_features) ** 0.5)
    nn.init.zeros_(linear.bias)


class Recent(list[Tensor]):
    """Tensors of the last training pass, with their graph; copies and files of a model do not take them along."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Recent":
        return Recent()

    def __reduce__(self) -> tuple[type["Recent"], tuple[()]]:
        return Recent, ()


# ---- the network -------------------------------------------------------------------------------------------


class Terminator(nn.Module):
    """Terminator for square images of one fixed size, or for the pixels of such images as a sequence.

    Args:
        in_chans: channels of the input, which are those of block 0.
        num_classes: classes; 0 leaves the head out.
        global_pool: "avg", or "" for no pooling (the head then works per pixel).
        img_size: height and width of the images, pixels: one number or two equal ones.
        ndim: 2; or 1 for a sequence of pixels, row by row: images (B, in_chans, img_size, img_size) or sequences
            (B, in_chans, L) come in.
        seq_len: length L of raw sequences, 1-D only; 0 means img_size^2.
        permute_seed: 1-D only: the pixels are read in a fixed random order drawn from this seed (pMNIST); -1 means
            row by row.
        dims: output channels of every block, each divisible by 12 and a multiple of the one before.
        reuse: for every block which earlier blocks' outputs it sees again, at most two; None: those of the released
            network.
        layout: "code" (ten branches, as released) or "paper" (the nine of the paper's figure, no reuse).
        local_sizes: odd kernel sizes of the local branches; None: (3, 9, 5, 7), or (5, 7, 9) of the paper.
        hidden: widths of the slow networks `global`, `local`, `hci`, `hi_channel`, `hi_spatial`; those left out keep
            64, 32, 32, 16, 64.
        layers: their layers, one number each, or for `global` one for each block; 2, and 3 for `global` of block 0.
        omega_0: frequency scale of all slow networks; 2000 as released (white noise at first), or "grid" for
            frequencies that the grid of each can resolve.
        standardise_eval: "batch": statistics of the batch at hand in eval mode too, as published; "running": moving
            averages over training.
        local_context: what the local kernels are made of: "batch" as published, "running", "sample".
        global_1d: the global operator in 1-D: "causal_conv", "same_conv", "fold" (L a square number).
        local_causal: 1-D: local kernels look back only.
        slow_loss: form of the slow networks' loss in `aux_losses`: "tile", "channel_sum", "none".
        norm_penalty: coefficient of the weight regulariser in `aux_losses`; 0 for none.
        block_drop_rate: dropout of whole channels after every block but the first.
        drop_rate: dropout before the head.
        device: where the parameters live ("meta" works).
        dtype: their type; slow networks stay in float32 at least.

    Raises:
        ValueError: an option is outside of what is allowed; the message names both.
    """

    reuse: list[list[int]]  # TorchScript cannot tell from an empty list
    pixel_order: Tensor | None

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 10,
        global_pool: str = "avg",
        img_size: int | Sequence[int] = 32,
        ndim: int = 2,
        seq_len: int = 0,
        permute_seed: int = -1,
        dims: Sequence[int] = DIMS,
        reuse: Sequence[Sequence[int]] | None = None,
        layout: str = "code",
        local_sizes: Sequence[int] | None = None,
        hidden: dict[str, int] | None = None,
        layers: dict[str, Any] | None = None,
        omega_0: float | Literal["grid"] = 2000.0,
        standardise_eval: Literal["batch", "running"] = "batch",
        local_context: Literal["batch", "running", "sample"] = "batch",
        global_1d: str = "causal_conv",
        local_causal: bool = False,
        slow_loss: str = "tile",
        norm_penalty: float = 5e-5,
        block_drop_rate: float = 0.05,
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_choice("layout", layout, ORDER)
        _check_choice("global_1d", global_1d, GLOBAL_1D)
        _check_choice("slow_loss", slow_loss, SLOW_LOSSES)
        _check_choice("standardise_eval", standardise_eval, ("batch", "running"))
        _check_choice("local_context", local_context, ("batch", "running", "sample"))
        _check_choice("global_pool", global_pool, ("avg", ""))
        self.size = _map_size(img_size, ndim, seq_len, global_1d)
        dims, reuse = tuple(dims), _reuse(reuse, dims, layout, in_chans)
        local_sizes = tuple(local_sizes or LOCAL_SIZES[layout])
        if len(local_sizes) != len(ROLES[layout]) or any(k % 2 == 0 or k < 1 for k in local_sizes):
            raise ValueError(f"layout {layout!r} needs {len(ROLES[layout])} odd local_sizes, got {local_sizes}")
        widths = _by_name("hidden", {"global": 64, "local": 32, "hci": 32, "hi_channel": 16, "hi_spatial": 64}, hidden)
        depths = _by_name("layers", dict.fromkeys(widths, 2) | {"global": (3,) + (2,) * (len(dims) - 1)}, layers)
        global_layers = depths["global"]
        global_layers = [global_layers] * len(dims) if isinstance(global_layers, int) else list(global_layers)
        if len(global_layers) != len(dims):
            raise ValueError(f"layers['global'] needs a number for each of {len(dims)} blocks, got {global_layers}")

        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_chans, self.num_classes, self.ndim = in_chans, num_classes, ndim
        self.global_pool, self.drop_rate = global_pool, drop_rate
        self.num_features = self.head_hidden_size = dims[-1]
        self.slow_loss, self.norm_penalty = slow_loss, norm_penalty
        self.batch_dependent = standardise_eval == "batch" or local_context == "batch"
        self.reuse = [list(earlier) for earlier in reuse]
        self.grad_checkpointing = False
        self._recent = Recent()
        self.feature_info = [{"num_chs": dim, "reduction": 1, "module": f"blocks.{i}"} for i, dim in enumerate(dims)]
        inputs = (in_chans, *dims)
        self.blocks = nn.ModuleList(
            SlowFastBlock(
                inputs[i],
                dim,
                self.size,
                pre_dims=[dims[j] for j in reuse[i]],
                drop_rate=block_drop_rate if i else 0.0,
                layout=layout,
                local_sizes=local_sizes,
                global_layers=global_layers[i],
                hidden=widths,
                layers=depths,
                omega_0=omega_0,
                running=standardise_eval == "running",
                local_context=local_context,
                global_1d=global_1d,
                local_causal=local_causal,
                **dd,
            )
            for i, dim in enumerate(dims)
        )
        order = None if permute_seed < 0 else _pixel_order(self.size, permute_seed, device)
        self.register_buffer("pixel_order", order)
        self.head = nn.Linear(dims[-1], num_classes, **dd) if num_classes > 0 else nn.Identity()
        if isinstance(self.head, nn.Linear):
            normal_(self.head)

    # ---- training

    @torch.jit.ignore
    def aux_losses(self) -> dict[str, Tensor]:
        """Slow loss and weight regulariser, weighted, of the last training pass; without one, of the parameters."""
        losses = {}
        kernels = list(self._recent) or self.global_kernels()
        self._recent.clear()
        if self.slow_loss != "none":
            losses["slow_loss"] = slow_loss(kernels, self.slow_loss)
        if self.norm_penalty:
            losses["norm_penalty"] = self.norm_penalty * self.weight_norms()
        return losses

    @torch.jit.ignore
    def global_kernels(self) -> list[Tensor]:
        """The global hyper-kernels of all blocks, (1, C, N, N) or (1, C, L)."""
        return [cast("SlowFastBlock", block).global_net() for block in self.blocks]

    @torch.jit.ignore
    def weight_norms(self) -> Tensor:
        """The authors' regulariser before its coefficient: a sum of L2 norms of tensors, not squared.

        Weights and biases of mixer, local branches and bottleneck count fully, weights of the gated units and of the
        global, local and spatial slow networks 1e-6 times, everything else not at all.
        """
        full = ("local_bias.", "local_mix.", "mixer.", "bottleneck.")
        little = ("rgu_fast.", "rgu_slow.", "global_net.", "local_nets.", "hi_spatial_net.")
        sums: list[list[Tensor]] = [[], []]
        for block in self.blocks:
            for name, p in block.named_parameters():
                if name.startswith(full):
                    sums[0].append(p)
                elif name.startswith(little) and name.endswith(".weight"):
                    sums[1].append(p)
        first, second = (torch.stack(torch._foreach_norm(tensors)).sum() for tensors in sums)
        return first + 1e-6 * second

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Position biases and the frequencies of the slow networks."""
        return {"*.pos_bias", "*.filters.*.weight"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into consecutive layers."""
        return {"stem": r"^blocks\.0\.", "blocks": r"^blocks\.(\d+)"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory: keep only block outputs while training and recompute the rest in backward."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a fresh one (0 classes: none) and, if given, the pooling."""
        if global_pool is not None:
            _check_choice("global_pool", global_pool, ("avg", ""))
            self.global_pool = global_pool
        self.num_classes = num_classes
        training = self.head.training
        if num_classes > 0:
            like = cast("SlowFastBlock", self.blocks[0]).mixer.weight
            self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            normal_(self.head)
        else:
            self.head = nn.Identity()
        self.head.train(training)

    # ---- forward

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of the blocks, and the last one once more as the final features.

        Args:
            x: as for `forward`.
            indices: which blocks: the last n if an int, all if None, else a list (negative ones count from the end).
            norm: no effect, there is no final norm.
            stop_early: stop after the last wanted block.
            output_fmt: "NCHW", the only format.
            intermediates_only: return the list alone.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        wanted, last = stage_indices(len(self.blocks), indices)
        maps = self.block_maps(x, last + 1 if stop_early else len(self.blocks))
        found = [as_input(maps[i], x, self.size, self.pixel_order) for i in wanted]
        return found if intermediates_only else (as_input(maps[-1], x, self.size, self.pixel_order), found)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Cut off the blocks after the last wanted one, and the head that no longer fits.

        Returns:
            The wanted blocks, counted from 0.
        """
        wanted, last = stage_indices(len(self.blocks), indices)
        cut = last < len(self.blocks) - 1
        self.blocks = self.blocks[: last + 1]
        if cut:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]  # type: ignore[assignment]
        if cut or prune_head:
            self.reset_classifier(0, "")
        return wanted

    def block_maps(self, x: Tensor, count: int = -1) -> list[Tensor]:
        """Images or sequences to the outputs of the first `count` blocks (all: -1), (B, C, H, W) or (B, C, 1, L)."""
        x = as_maps(x, self.in_chans, self.size, self.pixel_order)
        maps: list[Tensor] = []
        kernels: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if count < 0 or i < count:
                pre = [maps[j] for j in self.reuse[i]]
                kernels.append(block.global_net())  # type: ignore[operator]
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    x = self._recomputed(block, x, pre, kernels[i])
                else:
                    x = block(x, pre, kernels[i])
                maps.append(x)
        if not torch.jit.is_scripting():
            self._remember(kernels)
        return maps

    @torch.jit.ignore
    def _recomputed(self, block: nn.Module, x: Tensor, pre: list[Tensor], kernel: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return block(x, pre, kernel)
        return checkpoint(block, x, pre, kernel, use_reentrant=False, context_fn=partial(recompute_contexts, block))

    @torch.jit.ignore
    def _remember(self, kernels: list[Tensor]) -> None:
        """Have the hyper-kernels of a training pass at hand for its slow loss."""
        if self.training and torch.is_grad_enabled() and not is_recorded(kernels[0]):
            self._recent[:] = kernels

    def forward_features(self, x: Tensor) -> Tensor:
        """Images or sequences to the last block's map, in the shape of the input and num_features channels."""
        return as_input(self.block_maps(x)[-1], x, self.size, self.pixel_order)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify: (B, C, ...) to (B, num_classes), or to (B, C) with `pre_logits`."""
        x = mean_over(x.flatten(2), [2], False) if self.global_pool else x.movedim(1, -1)
        x = F.dropout(x, self.drop_rate, self.training)
        if not pre_logits:
            x = self.head(x)
        return x if self.global_pool else x.movedim(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Classify.

        Args:
            x: images (B, in_chans, N, N); in 1-D also sequences (B, in_chans, L).

        Returns:
            Logits (B, num_classes).

        Raises:
            ValueError: the input has other channels or another size.
        """
        return self.forward_head(self.forward_features(x))


# ---- what a network may be ---------------------------------------------------------------------------------


def _check_choice(name: str, value: str, allowed: Any) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")


def _by_name(what: str, defaults: dict[str, Any], given: dict[str, Any] | None) -> dict[str, Any]:
    for name in given or {}:
        if name not in defaults:
            raise ValueError(f"{what} has no slow network {name!r}{suggestion(name, defaults)}")
    return defaults | (given or {})


def _map_size(img_size: int | Sequence[int], ndim: int, seq_len: int, global_1d: str) -> tuple[int, int]:
    sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if ndim not in (1, 2):
        raise ValueError(f"ndim must be 1 (sequences) or 2 (images), got {ndim}")
    if len(sides) != 2 or sides[0] != sides[1] or sides[0] < 2:
        raise ValueError(f"images must be square and at least 2 x 2 pixels, got img_size={img_size}")
    if ndim == 2:
        if seq_len:
            raise ValueError("seq_len is for sequences: set ndim=1")
        return sides[0], sides[1]
    length = seq_len or sides[0] * sides[1]
    if global_1d == "fold":
        square_side(length)
    return 1, length


def _reuse(
    reuse: Sequence[Sequence[int]] | None, dims: tuple[int, ...], layout: str, in_chans: int
) -> tuple[tuple[int, ...], ...]:
    """Which earlier outputs each block sees, checked together with the widths."""
    if not dims or any(dim < 1 or dim % GROUPS for dim in dims):
        raise ValueError(f"dims must be multiples of {GROUPS} (group standardisation), got {dims}")
    for before, dim in pairwise(dims):
        if dim % before:
            raise ValueError(f"every width of dims must be a multiple of the one before, got {before} before {dim}")
    if reuse is None:
        reuse = [()] * len(dims) if layout == "paper" else [*REUSE, *[()] * len(dims)][: len(dims)]
    checked = tuple(tuple(earlier) for earlier in reuse)
    if len(checked) != len(dims):
        raise ValueError(f"reuse needs an entry for each of {len(dims)} blocks, got {len(checked)}")
    for i, earlier in enumerate(checked):
        if len(earlier) > (0 if layout == "paper" else 2):
            raise ValueError(f"layout {layout!r} has no room for {len(earlier)} earlier outputs in block {i}")
        for j in earlier:
            width = (in_chans, *dims)[i]
            if not 0 <= j < i or width % dims[j]:
                raise ValueError(
                    f"block {i} of {width} channels cannot see block {j} again: it must be an earlier one "
                    "whose width divides its own"
                )
    return checked


def _pixel_order(size: tuple[int, int], seed: int, device: Any) -> Tensor:
    if size[0] != 1:
        raise ValueError("permute_seed is for sequences: set ndim=1")
    order = np.random.Generator(np.random.PCG64(seed)).permutation(size[1])
    return torch.from_numpy(order).to(device)


@torch.fx.wrap
def as_maps(x: Tensor, in_chans: int, size: tuple[int, int], order: Tensor | None) -> Tensor:
    """What comes in as maps (B, C, H, W), or (B, C, 1, L) in the order of the sequence; anything else is refused."""
    height, width = size
    if x.dim() == 4 and x.shape[1] == in_chans:
        fits = (
            (x.shape[2] == height and x.shape[3] == width)
            if height > 1
            else (x.shape[2] == x.shape[3] and x.shape[2] * x.shape[3] == width)
        )
    else:
        fits = x.dim() == 3 and x.shape[1] == in_chans and height == 1 and x.shape[2] == width
    if not fits:
        wanted = f"square images or sequences (batch, {in_chans}, {width})"
        if height > 1:
            wanted = f"images (batch, {in_chans}, {height}, {width})"
        raise ValueError(
            f"this network takes {wanted} only, got {list(x.shape)}; its kernels are made for one size and number of "
            "channels: build another with img_size and in_chans"
        )
    x = x.reshape([x.shape[0], in_chans, height, width])
    return x if order is None else x.index_select(-1, order)


@torch.fx.wrap
def as_input(y: Tensor, x: Tensor, size: tuple[int, int], order: Tensor | None) -> Tensor:
    """Maps back in the shape of the input: every feature at its pixel."""
    if size[0] > 1:
        return y
    if order is not None:
        y = y.index_select(-1, order.argsort())
    return y.view(y.shape[:2] + x.shape[2:])


def stage_indices(stages: int, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
    """Blocks named by `indices` (the last n, all, or a list, negative from the end), and the largest."""
    if indices is None:
        indices = stages
    wanted = list(range(-indices, 0)) if isinstance(indices, int) else list(indices)
    if not wanted or not all(-stages <= i < stages for i in wanted):
        raise ValueError(f"block indices {indices} do not exist: there are blocks 0 to {stages - 1}")
    wanted = [i % stages for i in wanted]
    return wanted, max(wanted)


@contextmanager
def borrowed_statistics(block: nn.Module) -> Iterator[None]:
    """Let a block record running statistics into copies of its buffers."""
    kept = [(m, name, b) for m in block.modules() for name, b in m.named_buffers(recurse=False)]
    for module, name, buffer in kept:
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, name, buffer in kept:
            setattr(module, name, buffer)


def recompute_contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a checkpointed forward pass and of its repetition, which must not count a batch twice."""
    return nullcontext(), borrowed_statistics(block)


# ---- variants ----------------------------------------------------------------------------------------------


def _cfg(size: int, chans: int = 3, classes: int = 10, **kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": classes,
        "input_size": (chans, size, size),
        "pool_size": (size, size),
        "fixed_input_size": True,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.4914, 0.4822, 0.4465) if chans == 3 else (0.1307,),
        "std": (0.2470, 0.2435, 0.2616) if chans == 3 else (0.3081,),
        "first_conv": "blocks.0.mixer",
        "classifier": "head",
        "paper_ids": "arXiv:2401.17948",
        "paper_name": "HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "terminator_cifar10": _cfg(32),
        "terminator_cifar100": _cfg(32, classes=100),
        "terminator_mnist": _cfg(28, 1),
        "terminator_stl10": _cfg(96),
        "terminator_paper": _cfg(32),
        "terminator_scifar10": _cfg(32),
        "terminator_smnist": _cfg(28, 1),
        "terminator_pmnist": _cfg(28, 1),
        "terminator_z": _cfg(14, 1),
        "terminator_z_smnist": _cfg(14, 1),
        "terminator_z_pmnist": _cfg(14, 1),
        "test_terminator": _cfg(12),
    }
)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], **defaults: Any) -> Terminator:
    arguments = {**defaults, **kwargs}
    depth = len(arguments.get("dims", DIMS))
    return build_model_with_cfg(
        Terminator,
        variant,
        pretrained,
        feature_cfg={"out_indices": tuple(range(depth)), "feature_cls": "getter"},
        **arguments,
    )


#: Ours, so that an image's prediction depends on nothing else.
INDEPENDENT: dict[str, Any] = {"standardise_eval": "running", "local_context": "running"}
#: Ours, for two CPU cores.
ZEPTO: dict[str, Any] = {
    **INDEPENDENT,
    "omega_0": "grid",
    "dims": (12, 24),
    "hidden": {"global": 16, "local": 8, "hci": 8, "hi_channel": 8, "hi_spatial": 16},
    "layers": {"global": 2},
    "block_drop_rate": 0.0,
}


@register_model
def terminator_cifar10(pretrained: bool = False, **kwargs: Any) -> Terminator:
    """The released network: 1,336,855 parameters, 1.1 GMACs at 32 x 32."""
    return _create("terminator_cifar10", pretrained, kwargs)


@register_model
def terminator_cifar100(pretrained: bool = False, **kwargs: Any) -> Terminator:
    """The released network with 100 classes and its weaker regulariser: 1,362,865 parameters."""
    return _create("terminator_cifar100", pretrained, kwargs, norm_penalty=4e-5)


@register_model
def terminator_mnist(pretrained: bool = False, **kwargs: Any) -> Terminator:
    """The released widths for 28 x 28 grey images (sizes ours): 1,331,031 parameters."""
    return _create("terminator_mnist", pretrained, kwargs)


@register_model
def terminator_stl10(pretrained: bool = False, **kwargs: Any) -> Terminator:
    """The released widths for 96 x 96 images (sizes ours): 1,500,695 parameters."""
    return _create("terminator_stl10", pretrained, kwargs)


@register_model
def terminator_paper(pretrained: bool = False, **kwargs: Any) -> Terminator:
    """The nine branches of the paper's figure, no earlier outputs; otherwise as `terminator_cifar10`."""
    return _create("terminator_paper", pretrained, kwargs, layout="paper")


@register_model
def terminator_scifar10(pretrained: bool = False, **kwargs: Any) -> Terminator:
    """CIFAR-10 pixel by pixel, 1,024 steps (ours): 1,332,251 parameters."""
    return _create("terminator_scifar10", pretrained, kwargs, ndim=1)


@register_model
def terminator_smnist(pretrained: bool = False, **kwargs: Any) -> Terminator:
    """MNIST pixel by pixel, 784 steps (ours): 1,326,427 parameters."""
    return _create("terminator_smnist", pretrained, kwargs, ndim=1)


@register_model
def terminator_pmnist(pretrained: bool = False, **kwargs: Any) -> Terminator:
    """MNIST pixel by pixel in a fixed random order (ours): 1,326,427 parameters."""
    return _create("terminator_pmnist", pretrained, kwargs, ndim=1, permute_seed=0)


@register_model
def terminator_z(pretrained: bool = False, **kwargs: Any) -> Terminator:
    """Zepto, ours: two narrow blocks for 14 x 14 grey images on a CPU, predictions independent of the batch."""
    return _create("terminator_z", pretrained, kwargs, **ZEPTO)


@register_model
def terminator_z_smnist(pretrained: bool = False, **kwargs: Any) -> Terminator:
    """Zepto for 196 pixels one by one."""
    return _create("terminator_z_smnist", pretrained, kwargs, **ZEPTO, ndim=1)


@register_model
def terminator_z_pmnist(pretrained: bool = False, **kwargs: Any) -> Terminator:
    """Zepto for 196 pixels one by one in a fixed random order."""
    return _create("terminator_z_pmnist", pretrained, kwargs, **ZEPTO, ndim=1, permute_seed=0)


@register_model
def test_terminator(pretrained: bool = False, **kwargs: Any) -> Terminator:  # noqa: PT028 (not a test)
    """Narrow slow networks and three blocks on 12 x 12 images, independent of the batch, for tests."""
    small = {"global": 8, "local": 4, "hci": 4, "hi_channel": 4, "hi_spatial": 8}
    defaults = {**ZEPTO, "dims": (12, 12, 24), "reuse": ((), (0,), (1, 0)), "hidden": small}
    return _create("test_terminator", pretrained, kwargs, **defaults)
