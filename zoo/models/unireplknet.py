"""UniRepLKNet: a convolutional network with a few large kernels that give it a global receptive field.

Paper: Ding, Zhang, Ge, Zhao, Song, Yue, Shan: "UniRepLKNet: A Universal Perception Large-Kernel ConvNet for
Audio, Video, Point Cloud, Time-Series and Image Recognition", CVPR 2024, arXiv 2311.15599; journal version:
Zhang, Ding, Yue, "Scaling Up Your Kernels: Large Kernel Design in ConvNets towards Universal
Representations", arXiv 2410.08049. Origin of architecture and published weights:
https://github.com/AILab-CVC/UniRepLKNet, Apache-2.0. The code below is an independent implementation that keeps the
authors' state-dict names, so that their checkpoints load unchanged.

Overview: a stem that downsamples by four, four stages of blocks with a stride-2 convolution before each of the last
three, mean pooling, LayerNorm, linear head. A block is

    y = BN( D(x) )                       depthwise: a Dilated Reparam Block (K >= 7) or a plain 3x3 / 5x5
    y = y * SE(y)                        channel attention
    z = BN( W2 GRN( GELU( W1 y + b1 )))  per-pixel feed-forward network, 4 times as wide inside
    x + DropPath( gamma * z )

In eval mode every normalisation of a block is constant, so `zoo.to_deploy` merges the branches, both normalisations
and gamma into the three weights of a :class:`MergedBlock` with the same outputs: the *deploy* form.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.models.layers.dilated_reparam import (
    BRANCHES,
    DepthwiseConv2d,
    DilatedReparamBlock,
    fuse_conv_bn,
    store_convolution,
)
from zoo.models.layers.recomputation import recompute_contexts
from zoo.ops import channel_norm, feed_forward, response_norm

__all__ = ["MergedBlock", "UniRepLKNet", "UniRepLKNetBlock", "checkpoint_filter_fn"]

#: Kernel size of every block, by the depths of the four stages (section 4.1 of the paper).
KERNEL_SIZES: dict[tuple[int, ...], tuple[tuple[int, ...], ...]] = {
    (2, 2, 6, 2): ((3,) * 2, (13,) * 2, (13,) * 6, (13,) * 2),
    (2, 2, 8, 2): ((3,) * 2, (13,) * 2, (13,) * 8, (13,) * 2),
    (3, 3, 18, 3): ((3,) * 3, (13,) * 3, (13, 3) * 9, (13,) * 3),
    (3, 3, 27, 3): ((3,) * 3, (13,) * 3, (13, 3, 3) * 9, (13,) * 3),
}

PLAIN_KERNELS = (3, 5)  # plain depthwise convolution; larger ones are Dilated Reparam Blocks, 0 is no layer
REPARAM_KERNELS = tuple(sorted(k for k in BRANCHES if k > max(PLAIN_KERNELS)))


# ---- layers ------------------------------------------------------------------------------------------------


class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation over the channels of each pixel of a (B, C, H, W) map, eps 1e-6; optionally with GELU."""

    def __init__(self, dim: int, *, gelu: bool = False, **dd: Any) -> None:
        super().__init__(dim, eps=1e-6, **dd)
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, H, W) over C."""
        return channel_norm(x, self.weight, self.bias, self.eps, self.gelu)

    def extra_repr(self) -> str:
        """Arguments, for printing."""
        return f"{super().extra_repr()}{', gelu=True' if self.gelu else ''}"


class ToChannelsLast(nn.Module):
    """(B, C, H, W) -> (B, H, W, C), a view."""

    def forward(self, x: Tensor) -> Tensor:
        """Move the channels to the end."""
        return x.permute(0, 2, 3, 1)


class ToChannelsFirst(nn.Module):
    """(B, H, W, C) -> (B, C, H, W), a view."""

    def forward(self, x: Tensor) -> Tensor:
        """Move the channels to the front."""
        return x.permute(0, 3, 1, 2)


class SqueezeExcite(nn.Module):
    """Channel attention (Hu et al., 2018): y * sigmoid(B relu(A mean(y) + a) + b), with C // 4 hidden units."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.down = nn.Conv2d(dim, dim // 4, 1, **dd)
        self.up = nn.Conv2d(dim // 4, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Rescale the channels of (B, C, H, W)."""
        scale = self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()  # (B, C, 1, 1)
        return x * scale


class GlobalResponseNorm(nn.Module):
    """Global response normalisation of (B, H, W, C), see :mod:`zoo.ops.feed_forward`."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim, **dd))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim, **dd))

    def forward(self, x: Tensor) -> Tensor:
        """Rescale and shift (B, H, W, C)."""
        return response_norm(x, self.gamma, self.beta)


def depthwise(dim: int, kernel_size: int, deploy: bool = False, **dd: Any) -> nn.Module:
    """Depthwise layer of a block; see :class:`UniRepLKNetBlock` for the kernel sizes."""
    if kernel_size == 0:
        return nn.Identity()
    if kernel_size in PLAIN_KERNELS:
        return DepthwiseConv2d(dim, kernel_size, bias=deploy, **dd)
    if kernel_size in REPARAM_KERNELS:
        return DilatedReparamBlock(dim, kernel_size, deploy=deploy, **dd)
    allowed = sorted((0, *PLAIN_KERNELS, *REPARAM_KERNELS))
    raise ValueError(f"kernel size {kernel_size} is not supported; choose one of {allowed} (0 leaves the layer out)")


# ---- the block ---------------------------------------------------------------------------------------------


class UniRepLKNetBlock(nn.Module):
    """Depthwise convolution, SE, feed-forward network with GRN, residual (equations in the module docstring).

    Args:
        dim: channels C.
        kernel_size: 0 for no depthwise layer, 3 or 5 for a plain one, 7 to 17 (odd) for a Dilated Reparam Block.
        drop_path: probability of dropping the residual branch of a sample while training.
        layer_scale_init_value: initial gamma; None or <= 0 omits gamma.
        device: device of the parameters.
        dtype: their dtype.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        *,
        drop_path: float = 0.0,
        layer_scale_init_value: float | None = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.kernel_size = dim, kernel_size
        self.dwconv = depthwise(dim, kernel_size, **dd)
        self.norm = nn.Identity() if kernel_size == 0 else nn.BatchNorm2d(dim, **dd)
        self.se = SqueezeExcite(dim, **dd)
        self.pwconv1 = nn.Sequential(ToChannelsLast(), nn.Linear(dim, 4 * dim, **dd))
        self.act = nn.Sequential(nn.GELU(), GlobalResponseNorm(4 * dim, **dd))
        self.pwconv2 = nn.Sequential(
            nn.Linear(4 * dim, dim, bias=False, **dd), ToChannelsFirst(), nn.BatchNorm2d(dim, **dd)
        )
        start = layer_scale_init_value or 0.0
        self.gamma = nn.Parameter(torch.full((dim,), start, **dd)) if start > 0 else None
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        y = self.norm(self.dwconv(x))
        y = self.pwconv2(self.act(self.pwconv1(self.se(y))))
        if self.gamma is not None:
            y = y * self.gamma.view(-1, 1, 1)
        return x + self.drop_path(y)

    @torch.no_grad()
    def reparameterize(self) -> "MergedBlock | None":
        """The block in deploy form; None, which keeps the block, if one of its layers was replaced."""
        if kinds(self) != kinds(UniRepLKNetBlock(self.dim, self.kernel_size, device="meta")):
            return None
        se, first, grn, second = self.se, self.pwconv1[1], self.act[1], self.pwconv2[0]
        merged = MergedBlock(self.dim, self.kernel_size, device="meta")  # all of its weights are set below
        if self.kernel_size:
            conv, origin = (b["lk_origin"] if isinstance(b, nn.ModuleDict) else b for b in (merged.dwconv, self.dwconv))
            store_convolution(conv, *self._merged_convolution(), like=origin)
        store_convolution(merged.pwconv2["0"], *self._merged_output(), like=second)
        for kept, layer in ((merged.se["down"], se.down), (merged.se["up"], se.up), (merged.pwconv1["1"], first)):
            kept.weight, kept.bias = layer.weight, layer.bias
        merged.act["1"].gamma = grn.gamma
        merged.drop_path = self.drop_path
        return merged.train(self.training)

    def fuse(self) -> nn.Module:
        """Name under which timm calls a method that returns a replacement."""
        return self.reparameterize() or self

    def _merged_convolution(self) -> tuple[Tensor, Tensor]:
        """Kernel and bias of BN(D(x)), float64."""
        conv: Any = self.dwconv
        norm: Any = self.norm
        kernel, bias = conv.merged() if isinstance(conv, DilatedReparamBlock) else (conv.weight, conv.bias)
        return fuse_conv_bn(kernel, bias, norm)

    def _merged_output(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of gamma * BN(W2 (h + beta)), which is affine in h, float64."""
        layers: tuple[Any, Any, Any] = self.pwconv2[0], self.act[1], self.pwconv2[2]
        linear, grn, bn = layers
        weight, bias = fuse_conv_bn(linear.weight, linear.weight.double() @ grn.beta.double().flatten(), bn)
        if self.gamma is None:
            return weight, bias
        return weight * self.gamma.double()[:, None], bias * self.gamma.double()


def kinds(block: nn.Module) -> dict[str, type[nn.Module]]:
    """Types of the layers of a block, which differ with adapters or quantisation."""
    return {name: type(layer) for name, layer in block.named_modules() if name != "drop_path"}


class Weights(nn.Module):
    """Weight and bias of a linear layer that is part of an operator."""

    def __init__(self, *shape: int, **dd: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, **dd))
        self.bias = nn.Parameter(torch.empty(shape[0], **dd))


class MergedBlock(nn.Module):
    """A block in deploy form: x + W2 GRN(GELU(W1 SE(DW(x)) + b1)) + b2; after the convolution a single operator.

    Arguments as for :class:`UniRepLKNetBlock`. Parameters have the names of the merged layers.
    """

    def __init__(self, dim: int, kernel_size: int, *, drop_path: float = 0.0, **dd: Any) -> None:
        super().__init__()
        self.dwconv = depthwise(dim, kernel_size, deploy=True, **dd)
        self.se = nn.ModuleDict({"down": Weights(dim // 4, dim, 1, 1, **dd), "up": Weights(dim, dim // 4, 1, 1, **dd)})
        self.pwconv1 = nn.ModuleDict({"1": Weights(4 * dim, dim, **dd)})
        self.act = nn.ModuleDict({"1": nn.Module()})
        self.act["1"].gamma = nn.Parameter(torch.zeros(1, 1, 1, 4 * dim, **dd))
        self.pwconv2 = nn.ModuleDict({"0": Weights(dim, 4 * dim, **dd)})
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        down, up, first, second = self.se["down"], self.se["up"], self.pwconv1["1"], self.pwconv2["0"]
        attention = [down.weight.flatten(1), down.bias, up.weight.flatten(1), up.bias]  # type: ignore[operator]
        gamma = self.act["1"].gamma.flatten()  # type: ignore[operator]
        network = [first.weight, first.bias, gamma, second.weight, second.bias]
        weights = attention + network
        y = self.dwconv(x)
        if self.training:
            return x + self.drop_path(feed_forward(y, weights))  # type: ignore[arg-type]
        return feed_forward(y, weights, x)  # type: ignore[arg-type]


# ---- the network -------------------------------------------------------------------------------------------


@torch.fx.wrap
def check_images(x: Tensor, in_chans: int) -> None:
    """Check for a batch of images with the right number of channels."""
    if x.dim() != 4:
        raise ValueError(f"expected images of shape (batch, {in_chans}, height, width), got a {x.dim()}-D tensor")
    if x.shape[1] != in_chans:
        raise ValueError(f"expected {in_chans} channels, got {x.shape[1]}: build the model with in_chans={x.shape[1]}")


def check_pooling(global_pool: str) -> None:
    """Check that :func:`pool` supports a pooling."""
    if global_pool not in ("avg", "max", "avgmax", ""):
        raise ValueError(f"global_pool must be 'avg', 'max', 'avgmax' or '' (none), got {global_pool!r}")


def pool(x: Tensor, how: str) -> Tensor:
    """Pool a map, (B, C, H, W) -> (B, C); with `how=""` only move the channels last, -> (B, H, W, C)."""
    if how == "avg":
        return x.mean((2, 3))
    if how == "max":
        return x.amax((2, 3))
    if how == "avgmax":
        return 0.5 * (x.mean((2, 3)) + x.amax((2, 3)))
    return x.permute(0, 2, 3, 1)


def kernel_table(depths: Sequence[int], kernel_sizes: Sequence[Sequence[int]] | None) -> tuple[tuple[int, ...], ...]:
    """Kernel size of every block, as published or as given, checked against `depths`."""
    depths = tuple(depths)
    if kernel_sizes is None:
        if depths not in KERNEL_SIZES:
            raise ValueError(
                f"no published kernel sizes for depths {depths} (there are some for {list(KERNEL_SIZES)}); "
                "pass kernel_sizes, one tuple per stage with one size per block"
            )
        return KERNEL_SIZES[depths]
    table = tuple(tuple(stage) for stage in kernel_sizes)
    if tuple(len(stage) for stage in table) != depths:
        raise ValueError(
            f"kernel_sizes must hold one size per block, so tuples of lengths {depths}, "
            f"got lengths {tuple(len(stage) for stage in table)}"
        )
    return table


class UniRepLKNet(nn.Module):
    """UniRepLKNet for images of any size, square or not (a stride-2 layer maps n pixels to ceil(n / 2)).

    Args:
        in_chans: channels of the input.
        num_classes: number of classes; 0 omits the head.
        global_pool: "avg", "max", "avgmax", or "" for no pooling (the head then works per pixel).
        depths: blocks per stage, four numbers.
        dims: channels per stage, four numbers; the first is even.
        kernel_sizes: kernel size of every block, one tuple per stage; None uses the published ones for `depths`.
        stem_strides: strides of the two stem convolutions; (2, 2) as published; (2, 1) or (1, 1) for tiny images.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 at the first.
        layer_scale_init_value: initial residual scale gamma; None or <= 0 omits it.
        head_init_scale: factor on the initial head weights (0.001 for fine-tuning in the paper).
        dense_output: for dense tasks: no head; `forward` returns the four stage maps, each with its own LayerNorm.
        deploy: build the deploy form, to load deploy-form weights.
        device: device of the parameters ("meta" is supported).
        dtype: their dtype.

    Raises:
        ValueError: an option is invalid; the message says what is allowed.
    """

    __constants__ = ("dense_output", "grad_checkpointing")

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (3, 3, 27, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        kernel_sizes: Sequence[Sequence[int]] | None = None,
        stem_strides: Sequence[int] = (2, 2),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float | None = 1e-6,
        head_init_scale: float = 1.0,
        dense_output: bool = False,
        deploy: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if len(depths) != 4 or len(dims) != 4:
            raise ValueError(f"depths and dims need four numbers each, one a stage, got {tuple(depths)}, {tuple(dims)}")
        kernel_sizes = kernel_table(depths, kernel_sizes)
        check_pooling(global_pool)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.num_classes = 0 if dense_output else num_classes
        self.num_features = self.head_hidden_size = dims[-1]
        self.global_pool = global_pool
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        reduction = stem_strides[0] * stem_strides[1]
        self.feature_info = [
            {"num_chs": dim, "reduction": reduction * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]

        def down(chans: int, dim: int, stride: int = 2, gelu: bool = False) -> list[nn.Module]:
            return [nn.Conv2d(chans, dim, 3, stride, 1, **dd), LayerNorm2d(dim, gelu=gelu, **dd)]

        half = dims[0] // 2
        stem = [*down(in_chans, half, stem_strides[0], gelu=True), nn.Identity()]  # index 2: the authors' GELU
        stem += down(half, dims[0], stem_strides[1])
        self.downsample_layers = nn.ModuleList([nn.Sequential(*stem)])
        for i in range(3):
            self.downsample_layers.append(nn.Sequential(*down(dims[i], dims[i + 1])))

        self.stages = nn.ModuleList()
        blocks_before, last = 0, max(sum(depths) - 1, 1)
        block = MergedBlock if deploy else partial(UniRepLKNetBlock, layer_scale_init_value=layer_scale_init_value)
        for dim, sizes in zip(dims, kernel_sizes, strict=True):
            blocks = [
                block(dim, size, drop_path=drop_path_rate * (blocks_before + j) / last, **dd)
                for j, size in enumerate(sizes)
            ]
            blocks_before += len(blocks)
            self.stages.append(nn.Sequential(*blocks))

        self.dense_output = dense_output
        if dense_output:
            self.norm0, self.norm1, self.norm2, self.norm3 = (LayerNorm2d(dim, **dd) for dim in dims)
        self.norm = nn.Identity() if dense_output else nn.LayerNorm(dims[-1], eps=1e-6, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(dims[-1], num_classes, **dd) if self.num_classes > 0 else nn.Identity()
        self.reset_parameters(head_init_scale)

    @torch.no_grad()
    def reset_parameters(self, head_init_scale: float = 1.0) -> None:
        """Initialise weights from N(0, 0.02) truncated at +-2, biases with zeros."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear, Weights)):
                init_layer(module)
        if isinstance(self.head, nn.Linear):
            self.head.weight.mul_(head_init_scale)
            self.head.bias.mul_(head_init_scale)

    def layer_ids(self) -> tuple[dict[str, int], int]:
        """Depth id of every parameter for layer-wise learning-rate decay, and the largest id, 13.

        The learning rate of a parameter is lr * decay ** (13 - id), with the ids of the authors' fine-tuning recipe.
        """
        return {name: layer_id(name) for name, _ in self.named_parameters()}, 13

    def no_weight_decay(self) -> set[str]:
        """Empty: no exceptions besides 1-D parameters; the authors decay the 2-D ones of GRN."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters into consecutive layers."""
        blocks = [
            (r"^downsample_layers\.(\d+)", (0,)),
            (r"^stages\.(\d+)\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {
            "stem": r"^downsample_layers\.0",
            "blocks": r"^(?:downsample_layers|stages)\.(\d+)" if coarse else blocks,
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Activation checkpointing: keep only block inputs in training and recompute the rest in the backward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one (none for 0 classes) and, if given, the pooling."""
        if self.dense_output:
            raise ValueError(
                "a model built with dense_output=True has no head to reset; build it with dense_output=False"
            )
        if global_pool is not None:
            check_pooling(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        training = self.head.training
        if num_classes > 0:
            like = self.downsample_layers[0][0].weight  # type: ignore[index]
            self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            init_layer(self.head)
        else:
            self.head = nn.Identity()
        self.head.train(training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Stage maps of an image batch; also the final features unless `intermediates_only`.

        Args:
            x: images, (B, in_chans, H, W).
            indices: stages: the last n if an int, all if None, else a list (negative indices count from the end).
            norm: normalise the maps; only a `dense_output` model has norms for all maps, others ignore it.
            stop_early: stop after the last requested stage.
            output_fmt: "NCHW", the only format.
            intermediates_only: return the list only.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        check_images(x, self.in_chans)
        wanted, last = stage_indices(len(self.stages), indices)
        maps = []
        for i, (down, stage) in enumerate(zip(self.downsample_layers, self.stages, strict=True)):
            x = self._run_stage(stage, down(x))
            if i in wanted:
                maps.append(getattr(self, f"norm{i}")(x) if norm and self.dense_output else x)
            if stop_early and i == last:
                break
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last requested one, and layers that no longer fit.

        Returns:
            The requested stages, counted from 0.
        """
        wanted, last = stage_indices(len(self.stages), indices)
        cut = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        self.downsample_layers = self.downsample_layers[: last + 1]
        if self.dense_output:
            for i in range(last + 1, 4):
                setattr(self, f"norm{i}", nn.Identity())
        if cut or prune_norm:
            self.norm = nn.Identity()
        if cut:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if (cut or prune_head) and not self.dense_output:
            self.reset_classifier(0, "")
        return wanted

    def _run_stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        if not self.grad_checkpointing:
            return stage(x)
        for block in stage.children():
            x = checkpoint(block, x, use_reentrant=False, context_fn=partial(recompute_contexts, block))
        return x

    def stage_maps(self, x: Tensor) -> list[Tensor]:
        """Images (B, in_chans, H, W) to the output of every stage, before any norm."""
        check_images(x, self.in_chans)
        maps: list[Tensor] = []
        for down, stage in zip(self.downsample_layers, self.stages):  # noqa: B905
            x = down(x)
            if self.grad_checkpointing:
                x = self._run_stage(stage, x)
            else:
                x = stage(x)
            maps.append(x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to the last stage's map (B, num_features, H / 32, W / 32)."""
        return self.stage_maps(x)[-1]

    def forward_dense(self, x: Tensor) -> list[Tensor]:
        """Images to the four normalised stage maps; the next stage gets the unnormalised map."""
        maps = self.stage_maps(x)
        return [self.norm0(maps[0]), self.norm1(maps[1]), self.norm2(maps[2]), self.norm3(maps[3])]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, normalise, classify: (B, C, H, W) to (B, num_classes), or to (B, C) with `pre_logits`."""
        x = pool(x, self.global_pool)  # (B, C), or unpooled (B, H, W, C)
        x = self.head_drop(self.norm(x))
        if not pre_logits:
            x = self.head(x)
        return x if self.global_pool else x.permute(0, 3, 1, 2)

    def forward(self, x: Tensor):
        """Images (B, in_chans, H, W) to logits (B, num_classes), or to four maps with `dense_output`."""
        if self.dense_output:
            return self.forward_dense(x)
        else:
            return self.forward_head(self.forward_features(x))


def init_layer(layer: nn.Conv2d | nn.Linear | Weights) -> None:
    """Weight from N(0, 0.02) truncated at +-2, bias 0."""
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def layer_id(name: str) -> int:
    """Depth id, 0 to 13, of a parameter: three blocks of stage 3 share one, each other stage is one."""
    parts = name.split(".")
    if parts[0] == "downsample_layers":
        return (0, 2, 3, 12)[int(parts[1])]
    if parts[0] == "stages":
        stage, block = int(parts[1]), int(parts[2])
        return min(3 + block // 3, 11) if stage == 2 else (1, 2, 3, 12)[stage]
    return 13


def stage_indices(stages: int, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
    """Stages selected by `indices` (the last n, all, or a list, negative from the end), and the largest."""
    if indices is None:
        indices = stages
    wanted = list(range(-indices, 0)) if isinstance(indices, int) else list(indices)
    if not wanted or not all(-stages <= i < stages for i in wanted):
        raise ValueError(f"stage indices {indices} do not exist: there are stages 0 to {stages - 1}")
    wanted = [i % stages for i in wanted]
    return wanted, max(wanted)


# ---- weights -----------------------------------------------------------------------------------------------


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Convert an authors' checkpoint to a state dict of this network.

    Parameter names are the same; only wrapping is removed: a `model` or `state_dict` entry around the weights, and the
    `module.` or `backbone.` prefix of a wrapped or dense-task model. The detector or decoder parts of a dense-task
    checkpoint are dropped.
    """
    for wrapper in ("model", "state_dict"):
        if isinstance(state_dict.get(wrapper), dict):
            state_dict = state_dict[wrapper]
    for prefix in ("module.", "backbone."):
        inside = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        state_dict = inside or state_dict
    return state_dict


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], **defaults: Any) -> UniRepLKNet:
    return build_model_with_cfg(
        UniRepLKNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **{**defaults, **kwargs},
    )


def _cfg(file: str = "", top1: float | None = None, sha256: str = "", **kwargs: Any) -> dict[str, Any]:
    """`pretrained_cfg` of a set of weights; `top1` is the published accuracy, `sha256` the file's digest."""
    notes = []
    if top1 is not None:
        notes.append(f"published ImageNet-1K top-1: {top1:.2f} %")
    if sha256:
        notes.append(f"sha256: {sha256}")
    hub = {"hf_hub_id": "DingXiaoH/UniRepLKNet", "hf_hub_filename": file} if file else {}
    return {
        **hub,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "downsample_layers.0.0",
        "classifier": "head",
        "license": "apache-2.0",
        "origin_url": "https://github.com/AILab-CVC/UniRepLKNet",
        "paper_ids": "arXiv:2311.15599",
        "paper_name": "UniRepLKNet: A Universal Perception Large-Kernel ConvNet",
        "notes": tuple(notes),
        **kwargs,
    }


#: ImageNet-22K pre-training: the classifier has 21841 classes.
IN22K: dict[str, Any] = {"num_classes": 21841}
IN22K_192: dict[str, Any] = {**IN22K, "input_size": (3, 192, 192), "pool_size": (6, 6)}
#: Fine-tuned at 384: evaluated on the whole image, resized to a square.
FT_384: dict[str, Any] = {
    "input_size": (3, 384, 384),
    "pool_size": (12, 12),
    "crop_pct": 1.0,
    "crop_mode": "squash",
}
#: MNIST digits.
MNIST: dict[str, Any] = {
    "num_classes": 10,
    "input_size": (1, 28, 28),
    "pool_size": (1, 1),
    "crop_pct": 1.0,
    "mean": (0.1307,),
    "std": (0.3081,),
}

default_cfgs = generate_default_cfgs(
    {
        "unireplknet_a.in1k": _cfg(
            "unireplknet_a_in1k_224_acc77.03.pth",
            top1=77.03,
            sha256="a0ef11d8514590413a11493850e4882bb2c15c4c0203f97481158c7c58d76128",
        ),
        "unireplknet_f.in1k": _cfg(
            "unireplknet_f_in1k_224_acc78.58.pth",
            top1=78.58,
            sha256="b070ba01e853df306ac9d945f3c3592506595908adc1333d09983209fef7d5c8",
        ),
        "unireplknet_p.in1k": _cfg(
            "unireplknet_p_in1k_224_acc80.23.pth",
            top1=80.23,
            sha256="36363a5df396c0550b67208c50cd1936d7154839ad8f791937e952b6093a83d4",
        ),
        "unireplknet_n.in1k": _cfg("unireplknet_n_in1k_224_acc81.64.pth", top1=81.64),
        "unireplknet_t.in1k": _cfg("unireplknet_t_in1k_224_acc83.21.pth", top1=83.21),
        "unireplknet_s.in1k": _cfg("unireplknet_s_in1k_224_acc83.91.pth", top1=83.91),
        "unireplknet_s.in22k_ft_in1k_384": _cfg(
            "unireplknet_s_in22k_to_in1k_384_acc86.44.pth",
            top1=86.44,
            sha256="120fd52aeb737512807600c53d89d86b0f2e81172b8049768e7ce52c389accfa",
            **FT_384,
        ),
        "unireplknet_s.in22k": _cfg("unireplknet_s_in22k_pretrain.pth", **IN22K),
        "unireplknet_b.in22k_ft_in1k_384": _cfg(
            "unireplknet_b_in22k_to_in1k_384_acc87.40.pth",
            top1=87.40,
            sha256="cb37d591f7eec89bc08b49b727798722aa9f4c465c7358936f6573d568dcab2a",
            **FT_384,
        ),
        "unireplknet_b.in22k": _cfg(
            "unireplknet_b_in22k_pretrain.pth",
            sha256="aa3d4d70eb992e5e9f4dee0a4542fbad71c3cea7e2f08c03720c7308c1d62c51",
            **IN22K,
        ),
        "unireplknet_l.in22k_ft_in1k_384": _cfg("unireplknet_l_in22k_to_in1k_384_acc87.88.pth", top1=87.88, **FT_384),
        "unireplknet_l.in22k": _cfg(
            "unireplknet_l_in22k_pretrain.pth",
            sha256="b46656fb33fab335b1a2844822c76b325ba4c404186303649d84762e08ef5fb2",
            **IN22K_192,
        ),
        "unireplknet_xl.in22k_ft_in1k_384": _cfg(
            "unireplknet_xl_in22k_to_in1k_384_acc87.96.pth",
            top1=87.96,
            sha256="a5fb3d98f978dc4925cd50d3f3f8fd0c7dc5e47a8b4f22a68decb0c56fadf268",
            **FT_384,
        ),
        "unireplknet_xl.in22k": _cfg("unireplknet_xl_in22k_pretrain.pth", **IN22K_192),
        "unireplknet_z": _cfg(**MNIST),
        "test_unireplknet": _cfg(input_size=(3, 64, 64), pool_size=(2, 2)),
    }
)


# ---- variants ----------------------------------------------------------------------------------------------


@register_model
def unireplknet_a(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-A (atto): 4.4 M parameters in deploy form, 0.6 GMACs at 224."""
    return _create("unireplknet_a", pretrained, kwargs, depths=(2, 2, 6, 2), dims=(40, 80, 160, 320))


@register_model
def unireplknet_f(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-F (femto): 6.2 M parameters in deploy form, 0.9 GMACs at 224."""
    return _create("unireplknet_f", pretrained, kwargs, depths=(2, 2, 6, 2), dims=(48, 96, 192, 384))


@register_model
def unireplknet_p(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-P (pico): 10.7 M parameters in deploy form, 1.6 GMACs at 224."""
    return _create("unireplknet_p", pretrained, kwargs, depths=(2, 2, 6, 2), dims=(64, 128, 256, 512))


@register_model
def unireplknet_n(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-N (nano): 18.3 M parameters in deploy form, 2.8 GMACs at 224."""
    return _create("unireplknet_n", pretrained, kwargs, depths=(2, 2, 8, 2), dims=(80, 160, 320, 640))


@register_model
def unireplknet_t(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-T (tiny): 31 M parameters in deploy form, 4.9 GMACs at 224."""
    return _create("unireplknet_t", pretrained, kwargs, depths=(3, 3, 18, 3), dims=(80, 160, 320, 640))


@register_model
def unireplknet_s(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-S (small): 55.6 M parameters in deploy form, 9.1 GMACs at 224."""
    return _create("unireplknet_s", pretrained, kwargs, depths=(3, 3, 27, 3), dims=(96, 192, 384, 768))


@register_model
def unireplknet_b(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-B (base): 98 M parameters in deploy form, 47 GMACs at 384."""
    return _create("unireplknet_b", pretrained, kwargs, depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024))


@register_model
def unireplknet_l(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-L (large): 218 M parameters in deploy form, 105 GMACs at 384."""
    return _create("unireplknet_l", pretrained, kwargs, depths=(3, 3, 27, 3), dims=(192, 384, 768, 1536))


@register_model
def unireplknet_xl(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-XL: 386 M parameters in deploy form, 187 GMACs at 384."""
    return _create("unireplknet_xl", pretrained, kwargs, depths=(3, 3, 27, 3), dims=(256, 512, 1024, 2048))


@register_model
def unireplknet_z(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-Z (zepto), ours: for 28 x 28 images on a CPU; stage maps of 7, 4, 2 and 1 pixels."""
    return _create(
        "unireplknet_z",
        pretrained,
        kwargs,
        depths=(1, 1, 1, 1),
        dims=(48, 96, 128, 160),
        kernel_sizes=((13,), (7,), (3,), (0,)),
    )


@register_model
def test_unireplknet(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:  # noqa: PT028 (not a test)
    """A few thousand parameters and one block of every kind, for tests."""
    return _create(
        "test_unireplknet",
        pretrained,
        kwargs,
        depths=(1, 2, 2, 1),
        dims=(8, 16, 24, 32),
        kernel_sizes=((3,), (13, 5), (0, 9), (7,)),
    )
