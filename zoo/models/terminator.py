"""Terminator: slow networks generate the kernels of a fast network with a global receptive field in every layer.

Paper: Zhang, "HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction", 2024, arXiv 2401.17948.
The author published code for images in July 2024 and withdrew it; this is an independent implementation of that
network, equal to it in outputs, losses and gradients. No weights were ever published. The author's one-dimensional
networks were not released: :class:`Terminator` with `ndim=1` is ours.

There is no stem, residual or downsampling: block 0 takes the image itself, and every map keeps its size. A block (SFNE,
slow-fast neural encoding) of C channels is

    K    = slow network(coordinates)                             the global hyper-kernel
        W    = x * K                                                 the context-dependent kernel
    fast = IS( rgu_slow(W) + rgu_fast(x) );  mix = IS( mixer(x) );  hci = IS( x * sigmoid(channel scores of x) )
    G1, G2, G3 = W @ fast, W @ mix, W @ hci                      matrix products over rows and columns
    L_j  = GELU( BS( local_mix_j( depthwise(z_j, local slow network_j(context_j)) ) ) ) + local_bias_j
    H    = x * sigmoid( spatial score of G1 * channel score of G1 )
    out  = Dropout( GELU( G-IBS( bottleneck( concat of G's, L's, SiLU(G1), fast, H, earlier outputs ) ) ) + out_bias )

where IS, BS and G-IBS standardise by instance, by batch, and by both in turn, without affine parameters.

As published, statistics *and* local kernels are computed from the current batch in eval mode too, so a prediction
depends on the other images of its batch. With `standardise_eval="running"` and `local_context="running"` it depends on
its own image only. The published cost is high for the size: 1.1 GMACs for a 32 x 32 image, where a ResNet-18 of 11 M
parameters needs 0.56.
"""

from collections.abc import Sequence
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

from zoo.models.layers.recomputation import recompute_in_backward
from zoo.models.slow_nets import LocalSlowNet, SlowNet, uniform_
from zoo.ops.hyperzzw import (
    SLOW_LOSSES,
    causal_conv,
    channel_interaction,
    fold_product,
    hyper_interaction,
    local_conv,
    mean_over,
    same_conv,
    slow_loss,
    square_side,
)
from zoo.ops.pointwise import pointwise_conv, pointwise_twice
from zoo.ops.standardise import GROUPS, instance_standardise, split_groups, standard_gelu, standardised_gate
from zoo.support.suggest import suggestion

__all__ = ["RecursiveGatedUnit", "SlowFastBlock", "StandardGELU", "Terminator"]

for _operator in ("causal_conv", "same_conv", "fold_product", "local_conv"):
    torch.fx.wrap(_operator)
register_notrace_module(SlowNet)
register_notrace_module(LocalSlowNet)

#: Local branches: the map that determines the kernel, and the map that is convolved.
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
#: Earlier blocks whose outputs each block of the released network takes as further inputs.
REUSE = ((), (), (0,), (1,), (2, 1))
GLOBAL_1D = ("causal_conv", "same_conv", "fold")


# ---- layers ------------------------------------------------------------------------------------------------


class RecursiveGatedUnit(nn.Module):
    """RGU: Y( GELU( IS( K x * Q V x ) ) + pos_bias ), a gated channel mixer.

    Args:
        dim: channels C.
        pos_shape: shape of `pos_bias`, one value per pixel.
        **dd: device and dtype.
    """

    def __init__(self, dim: int, pos_shape: Sequence[int], **dd: Any) -> None:
        super().__init__()
        self.k, self.v, self.q, self.y = (nn.Linear(dim, dim, **dd) for _ in range(4))
        self.pos_bias = nn.Parameter(torch.zeros(tuple(pos_shape), **dd))
        for linear in (self.k, self.v, self.q, self.y):
            uniform_(linear)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        key = pointwise_conv([x], self.k.weight, self.k.bias)
        query = pointwise_twice(x, self.v.weight, self.v.bias, self.q.weight, self.q.bias)
        return pointwise_conv([standardised_gate(key, query, self.pos_bias)], self.y.weight, self.y.bias)


class StandardGELU(nn.BatchNorm2d):
    """GELU( BS(x) ) + bias, or GELU( G-IBS(x) ) + bias.

    Args:
        dim: channels C.
        groups: 1, or 12 for G-IBS, of which only the even groups are standardised by batch.
        running: keep running statistics, (C,) or (C / 2,), for eval mode; otherwise batch statistics are used there
            too.
        **dd: device and dtype.
    """

    def __init__(self, dim: int, groups: int = 1, running: bool = False, **dd: Any) -> None:
        super().__init__(dim if groups == 1 else dim // 2, affine=False, track_running_stats=running, **dd)
        self.groups = groups

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        """Map (B, C, H, W) and one number to (B, C, H, W)."""
        if not self.training and self.running_mean is not None:
            return standard_gelu(x, bias, self.groups, self.running_mean, self.running_var, self.eps)[0]
        y, mean, scale = standard_gelu(x, bias, self.groups, None, None, self.eps)
        if self.running_mean is not None:
            self.update_statistics(mean.detach(), scale.detach(), x.numel() // x.shape[1])
        return y

    def update_statistics(self, mean: Tensor, scale: Tensor, count: int) -> None:
        """Update the running statistics with those of a batch.

        Args:
            mean: of every plane, (B, C).
            scale: 1 / standard deviation, (B, C).
            count: elements per channel.
        """
        if self.groups > 1:
            mean, scale = split_groups(mean, self.groups)[0], split_groups(scale, self.groups)[0]
        var = (scale[0].pow(-2) - self.eps) * (count / (count - 1))
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.running_mean.lerp_(mean[0].to(self.running_mean.dtype), 0.1)
            self.running_var.lerp_(var.to(self.running_var.dtype), 0.1)
            self.num_batches_tracked.add_(1)


class SlowFastBlock(nn.Module):
    """SFNE block (equations in the module docstring), on maps (B, C, N, N), or (B, C, 1, L) in 1-D.

    Args:
        dim: channels C.
        out_dim: channels of the output, divisible by 12.
        size: height and width of the maps; 1 and L in 1-D.
        pre_dims: channels of the earlier outputs, at most two, each dividing C.
        drop_rate: probability of dropping a whole output channel while training.
        layout: "code" or "paper", see `ROLES` and `ORDER`.
        local_sizes: kernel sizes of the local branches.
        global_layers: layers of the global slow network.
        hidden: widths of the slow networks by name: `global`, `local`, `hci`, `hi_channel`, `hi_spatial`.
        layers: numbers of layers of the slow networks, except the global one.
        omega_0: frequency scale of all of them.
        running: keep running statistics for eval mode.
        local_context: see `LocalSlowNet`.
        global_1d: the global operator in 1-D.
        local_causal: whether local kernels in 1-D are causal.
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
        self.dim, self.out_dim, self.size = dim, out_dim, list(size)
        self.ndim = 1 if size[0] == 1 else 2
        self.drop_rate, self.global_1d, self.local_causal = drop_rate, global_1d, local_causal
        self.local_context = local_context
        self.roles = list(ROLES[layout])
        absent = ("pre0", "pre1")[len(pre_dims) :]
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

    def forward(self, x: Tensor, pre: list[Tensor]) -> Tensor:
        """Map (B, C, H, W) and earlier outputs to (B, out_dim, H, W)."""
        return F.dropout2d(self.out_norm(self.layer(x, pre), self.out_bias), self.drop_rate, self.training)

    def layer(self, x: Tensor, pre: list[Tensor]) -> Tensor:
        """All paths, and one linear layer over their concatenation (the bottleneck)."""
        w = x * self.global_kernel(x)
        fast = instance_standardise(self.rgu_slow(w) + self.rgu_fast(x))
        mix = instance_standardise(pointwise_conv([x], self.mixer.weight, self.mixer.bias))
        hci = instance_standardise(channel_interaction(x, self.hci_net().to(x.dtype)))

        g1, g2, g3 = self.global_operator(w, fast), self.global_operator(w, mix), self.global_operator(w, hci)
        paths = {"g1": g1, "g2": g2, "g3": g3, "silu": F.silu(g1), "fast": fast, "hi": self.hi(g1, x)}
        maps = {"x": x, "mix": mix, "hci": hci}
        biases = [bias for bias in self.local_bias]  # noqa: C416 (TorchScript has no list() of it)
        branches = zip(self.local_nets, self.local_mix, self.local_norm)  # noqa: B905 (their lengths are equal)
        for j, (net, mixer, norm) in enumerate(branches):
            context, convolved = self.roles[j]
            z = local_conv(maps[convolved], net(maps[context]).to(x.dtype), self.local_causal)
            paths[f"l{j}"] = norm(pointwise_conv([z], mixer.weight, mixer.bias), biases[j])  # type: ignore[arg-type]
        for i, earlier in enumerate(pre):
            paths[f"pre{i}"] = earlier
        return pointwise_conv([paths[name] for name in self.order], self.bottleneck.weight, self.bottleneck.bias)

    def global_kernel(self, like: Tensor) -> Tensor:
        """The global hyper-kernel (1, C, H, W), in the dtype of the map."""
        return self.global_net().view([1, self.dim] + self.size).to(like.dtype)  # noqa: RUF005 (TorchScript)

    def global_operator(self, w: Tensor, z: Tensor) -> Tensor:
        """A context-dependent kernel applied to a map, (B, C, H, W) all."""
        if self.ndim == 2:
            return w @ z
        if self.global_1d == "causal_conv":
            return causal_conv(w, z)
        return same_conv(w, z) if self.global_1d == "same_conv" else fold_product(w, z)

    def hi(self, y: Tensor, x: Tensor) -> Tensor:
        """Hyper interaction: x gated by channel and position, the gate computed from y; all (B, C, H, W)."""
        return hyper_interaction(y, x, self.hi_channel_net().to(y.dtype), self.hi_spatial_net().to(y.dtype))

    def reparameterize(self) -> None:
        """Convert to the fused form for inference, with the same parameters under the same names."""
        from zoo.models.terminator_deploy import fuse  # it imports this file

        fuse(self)


def normal_(linear: nn.Linear) -> None:
    """Weight from N(0, 2 / fan_in), bias 0."""
    nn.init.normal_(linear.weight, std=(2 / linear.in_features) ** 0.5)
    nn.init.zeros_(linear.bias)


# ---- the network -------------------------------------------------------------------------------------------


class Terminator(nn.Module):
    """Terminator for square images of a fixed size, or for their pixels as a sequence.

    Args:
        in_chans: channels of the input, which are those of block 0.
        num_classes: number of classes; 0 omits the head.
        global_pool: "avg", or "" for no pooling (the head then works per pixel).
        img_size: height and width of the images, pixels: one number or two equal ones.
        ndim: 2; or 1 for a sequence of pixels, row by row: inputs are images (B, in_chans, img_size, img_size) or
            sequences (B, in_chans, L).
        seq_len: length L of raw sequences, 1-D only; 0 means img_size^2.
        permute_seed: 1-D only: seed of a fixed random permutation of the pixels (pMNIST); -1 for row by row.
        dims: output channels of every block, each divisible by 12 and a multiple of the one before.
        reuse: for every block the earlier blocks whose outputs it also takes, at most two; None: as in the released
            network.
        layout: "code" (ten branches, as released) or "paper" (the nine of the paper's figure, no reuse).
        local_sizes: odd kernel sizes of the local branches; None: (3, 9, 5, 7), or (5, 7, 9) of the paper.
        hidden: widths of the slow networks `global`, `local`, `hci`, `hi_channel`, `hi_spatial`; defaults 64, 32, 32,
            16, 64.
        layers: their numbers of layers, for `global` also a list, one per block; default 2, and 3 for `global` of block
            0.
        omega_0: frequency scale of all slow networks; 2000 as released (white noise initially), or "grid" for
            frequencies that each grid can resolve.
        standardise_eval: statistics in eval mode: "batch", those of the current batch, as published; "running", moving
            averages over training.
        local_context: context of the local kernels: "batch" as published, "running", "sample".
        global_1d: the global operator in 1-D: "causal_conv", "same_conv", "fold" (L a square number).
        local_causal: 1-D only: causal local kernels.
        slow_loss: form of the slow networks' loss in `aux_losses`: "tile", "channel_sum", "none".
        norm_penalty: coefficient of the weight regulariser in `aux_losses`; 0 for none.
        block_drop_rate: dropout of whole channels after every block but the first.
        drop_rate: dropout before the head.
        device: device of the parameters ("meta" is supported).
        dtype: their dtype; slow networks stay in float32 at least.

    Raises:
        ValueError: an option is invalid; the message says what is allowed.
    """

    reuse: list[list[int]]  # annotated because TorchScript cannot infer the type of an empty list
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

    def aux_losses(self) -> dict[str, Tensor]:
        """Loss of the slow networks and weight regulariser, weighted; both depend on the parameters only."""
        losses = {}
        if self.slow_loss != "none":
            losses["slow_loss"] = slow_loss(self.global_kernels(), self.slow_loss)
        if self.norm_penalty:
            losses["norm_penalty"] = self.norm_penalty * self.weight_norms()
        return losses

    def global_kernels(self) -> list[Tensor]:
        """The global hyper-kernels of all blocks, (1, C, N, N) or (1, C, L)."""
        return [cast("SlowFastBlock", block).global_net() for block in self.blocks]

    def weight_norms(self) -> Tensor:
        """The authors' regulariser before its coefficient: a sum of L2 norms of tensors, not squared.

        Weights and biases of mixer, local branches and bottleneck have weight 1, the weights of the gated units and of
        the global, local and spatial slow networks 1e-6, everything else 0.
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

    def no_weight_decay(self) -> set[str]:
        """Position biases and the frequencies of the slow networks."""
        return {"*.pos_bias", "*.filters.*.weight"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters into consecutive layers."""
        return {"stem": r"^blocks\.0\.", "blocks": r"^blocks\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Activation checkpointing: keep only block outputs in training and recompute the rest in the backward pass."""
        self.grad_checkpointing = enable
        for block in self.blocks:
            recompute_in_backward(block, enable)

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one (none for 0 classes) and, if given, the pooling."""
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

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of the blocks; also the final features unless `intermediates_only`.

        Args:
            x: as for `forward`.
            indices: blocks: the last n if an int, all if None, else a list (negative indices count from the end).
            norm: no effect, there is no final norm.
            stop_early: stop after the last requested block.
            output_fmt: "NCHW", the only format.
            intermediates_only: return the list only.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        wanted, last = stage_indices(len(self.blocks), indices)
        maps = self.block_maps(x, last + 1 if stop_early else len(self.blocks))
        found = [as_input(maps[i], x, self.size, self.pixel_order) for i in wanted]
        return found if intermediates_only else (as_input(maps[-1], x, self.size, self.pixel_order), found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the blocks after the last requested one, and the head that no longer fits.

        Returns:
            The requested blocks, counted from 0.
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
        """Images or sequences to the outputs of the first `count` blocks (-1: all), (B, C, H, W) or (B, C, 1, L)."""
        x = as_maps(x, self.in_chans, self.size, self.pixel_order)
        maps: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if count < 0 or i < count:
                x = block(x, [maps[j] for j in self.reuse[i]])
                maps.append(x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """Images or sequences to the last block's map, with the input's spatial shape and num_features channels."""
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
            ValueError: the input has the wrong number of channels or size.
        """
        return self.forward_head(self.forward_features(x))


# ---- checks of the arguments ------------------------------------------------------------------------------


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
    """Earlier blocks that each block takes as inputs, checked together with the widths."""
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
    """Inputs as maps (B, C, H, W), or (B, C, 1, L) in the order of the sequence; raises an error for other shapes."""
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
    """Maps in the shape of the input, with every feature at its pixel."""
    if size[0] > 1:
        return y
    if order is not None:
        y = y.index_select(-1, order.argsort())
    return y.view(y.shape[:2] + x.shape[2:])


def stage_indices(stages: int, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
    """Blocks selected by `indices` (the last n, all, or a list, negative from the end), and the largest."""
    if indices is None:
        indices = stages
    wanted = list(range(-indices, 0)) if isinstance(indices, int) else list(indices)
    if not wanted or not all(-stages <= i < stages for i in wanted):
        raise ValueError(f"block indices {indices} do not exist: there are blocks 0 to {stages - 1}")
    wanted = [i % stages for i in wanted]
    return wanted, max(wanted)


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


#: Ours: predictions independent of the batch.
INDEPENDENT: dict[str, Any] = {"standardise_eval": "running", "local_context": "running"}
#: Ours, sized for two CPU cores.
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
    """Zepto for sequences of 196 pixels."""
    return _create("terminator_z_smnist", pretrained, kwargs, **ZEPTO, ndim=1)


@register_model
def terminator_z_pmnist(pretrained: bool = False, **kwargs: Any) -> Terminator:
    """Zepto for sequences of 196 pixels in a fixed random order."""
    return _create("terminator_z_pmnist", pretrained, kwargs, **ZEPTO, ndim=1, permute_seed=0)


@register_model
def test_terminator(pretrained: bool = False, **kwargs: Any) -> Terminator:  # noqa: PT028 (not a test)
    """Narrow slow networks and three blocks on 12 x 12 images, predictions independent of the batch, for tests."""
    small = {"global": 8, "local": 4, "hci": 4, "hi_channel": 4, "hi_spatial": 8}
    defaults = {**ZEPTO, "dims": (12, 12, 24), "reuse": ((), (0,), (1, 0)), "hidden": small}
    return _create("test_terminator", pretrained, kwargs, **defaults)
