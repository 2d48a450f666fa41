"""Point clouds: rendered from several views."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from zoo.models.modalities.base import TINY, Arguments, ModalityNet, check_shape, create, modality_cfg
from zoo.ops.attention import transformable_attention

__all__ = ["PointNet", "PointViews"]


class PointFeatures(nn.Module):
    """Point features from the k nearest neighbours (an edge convolution), (B, P, in_chans) -> (B, P, dim)."""

    def __init__(self, in_chans: int, dim: int, neighbours: int, **dd: Any) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.lift = nn.Linear(in_chans, 8, **dd)
        self.edge = nn.Conv2d(16, dim, 1, bias=False, **dd)
        self.norm = nn.GroupNorm(4, dim, **dd)
        self.out = nn.Linear(dim, dim, **dd)

    def forward(self, points: Tensor) -> Tensor:
        """Points (B, P, in_chans) to features (B, P, dim)."""
        places = points[..., :3].detach()
        places = places.to(torch.promote_types(places.dtype, torch.float32))
        index = torch.cdist(places, places).topk(self.neighbours, largest=False).indices  # B P k
        x = self.lift(points)
        neighbours = x.flatten(0, 1)[self._flat(index)]  # B P k 8
        edges = torch.cat([neighbours - x[:, :, None], x[:, :, None].expand_as(neighbours)], -1)
        edges = F.leaky_relu(self.norm(self.edge(edges.permute(0, 3, 1, 2))), 0.2)  # B dim P k
        return self.out(edges.amax(-1).transpose(1, 2))

    @staticmethod
    def _flat(index: Tensor) -> Tensor:
        """Flat row indices into the batch for the indices (B, P, k) within each sample."""
        batch, points, _ = index.shape
        return index + points * torch.arange(batch, device=index.device)[:, None, None]


class CrossViews(nn.Module):
    """Attention across the views of an object: patches of all views go through one transformer layer."""

    def __init__(self, dim: int, views: int, patch: int = 7, **dd: Any) -> None:
        super().__init__()
        self.views = views
        self.patch = nn.Conv2d(dim, 2 * dim, patch, patch, **dd)
        self.block = Block(2 * dim, num_heads=8 if 2 * dim % 8 == 0 else 1, mlp_ratio=2.0, qkv_bias=True, **dd)
        self.up = nn.Conv2d(2 * dim, dim, 3, padding=1, **dd)
        self.mix = nn.Conv2d(2 * dim, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B V, dim, S, S) -> the same shape."""
        patches = self.patch(x)  # BV 2dim s s
        views, chans, height, width = patches.shape
        tokens = patches.flatten(2).transpose(1, 2).reshape(-1, self.views * height * width, chans)
        with transformable_attention(tokens):
            tokens = self.block(tokens)
        tokens = tokens.reshape(views, height * width, chans)
        seen = tokens.transpose(1, 2).reshape(views, chans, height, width)
        seen = F.gelu(self.up(F.interpolate(seen, x.shape[-2:], mode="nearest")))
        return F.gelu(self.mix(torch.cat([x, seen], 1)))


class PointViews(nn.Module):
    """Point clouds as images from several views: point features, projected, fused across views, mapped to RGB.

    View i rotates the object about x by i * 90 degrees and then about z by 90 degrees; the depth is dropped, and each
    point adds its features to the 3 x 3 pixels around it, on a grid that just encloses the object.

    Args:
        in_chans: Values per point: three coordinates, then any attributes.
        num_views: V, from 1 to 4.
        size: Side of an image in pixels.
        dim: Channels of the features.
        neighbours: k of the nearest-neighbour graph.
        mean: Subtracted from the three output channels.
        std: The difference is divided by this.
        device: Device of the parameters.
        dtype: Their dtype.
    """

    turns: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        in_chans: int = 3,
        num_views: int = 4,
        size: int = 224,
        dim: int = 64,
        neighbours: int = 32,
        mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        std: tuple[float, ...] = (0.229, 0.224, 0.225),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_chans < 3:
            raise ValueError(f"in_chans={in_chans}: a point needs three coordinates")
        if not 1 <= num_views <= 4:
            raise ValueError(f"num_views must be 1 to 4, got {num_views}")
        if size < 7 or dim % 4:
            raise ValueError(f"size must be at least 7 and dim a multiple of 4, got {size} and {dim}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_chans, self.num_views, self.size, self.neighbours = in_chans, num_views, size, neighbours
        self.features = PointFeatures(in_chans, dim, neighbours, **dd)
        self.refine = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1, **dd), nn.GELU(), nn.Conv2d(dim, dim, 3, padding=1, **dd)
        )
        self.project = nn.Conv2d(dim, dim, 1, **dd)
        self.fuse = CrossViews(dim, num_views, **dd)
        self.paint = nn.Conv2d(dim, 3, 1, **dd)
        self.register_buffer("turns", _view_rotations(num_views).to(**dd), persistent=False)  # V 3 3
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, device="cpu").view(3, 1, 1).to(**dd), persistent=False)

    def splat(self, points: Tensor, features: Tensor) -> Tensor:
        """Add features (N, P, dim) of points (N, P, 3), projected along z, to maps (N, dim, size, size)."""
        flat = points[..., :2].detach()
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
        cell = ((high - low).amax(-1, keepdim=True) / (self.size - 3)).clamp_min(1e-12)
        pixel = ((flat - (low + high) / 2) / cell + (self.size - 1) / 2).round().long()  # within [1, size - 2]
        around = torch.arange(-1, 2, device=points.device)
        x, y = pixel[..., 0, None, None] + around[:, None], pixel[..., 1, None, None] + around
        batch = points.shape[0]
        samples = torch.arange(batch, device=points.device)[:, None, None, None]
        index = (samples * self.size + x) * self.size + y  # N P 3 3
        spread = features[:, :, None].expand(-1, -1, 9, -1)
        maps = features.new_zeros(batch * self.size**2, features.shape[-1])
        maps = maps.index_add(0, index.flatten(), spread.flatten(0, 2))
        return maps.view(batch, self.size, self.size, -1).permute(0, 3, 1, 2)

    def forward(self, points: Tensor) -> Tensor:
        """Points (B, P, in_chans) to images (B V, 3, size, size), the views of an object one after the other.

        Raises:
            ValueError: The shape is wrong, or there are fewer points than neighbours.
        """
        check_shape(points, "points", "batch", "points", self.in_chans)
        if points.shape[1] < self.neighbours:
            raise ValueError(f"{points.shape[1]} points have no {self.neighbours} neighbours each")
        turned = torch.einsum("bpi,vji->bvpj", points[..., :3], self.turns).flatten(0, 1)
        features = self.features(points)
        x = self.splat(turned, features.repeat_interleave(self.num_views, 0))
        x = self.project(x + self.refine(x))
        x = self.paint(self.fuse(x)).sigmoid()
        return (x - self.mean.to(x.dtype)) / self.std.to(x.dtype)


def _view_rotations(views: int) -> Tensor:
    """Rotation matrices of the views: about x by i * 90 degrees, then about z by 90 degrees, (V, 3, 3)."""
    matrices = []
    for i in range(views):
        c, s = (1, 0, -1, 0)[i], (0, 1, 0, -1)[i]
        matrices.append([[0, -c, s], [1, 0, 0], [0, s, c]])
    return torch.tensor(matrices, dtype=torch.float32, device="cpu")


class PointNet(ModalityNet):
    """Point cloud classifier: :class:`PointViews`, the backbone on each view, and one head on all views.

    Args:
        num_classes: Outputs.
        in_chans: Values per point: three coordinates, then any attributes.
        backbone: A spatial model of the zoo or of timm.
        backbone_args: Further arguments of the backbone.
        num_views: Number of views, from 1 to 4.
        size: Side of a view in pixels.
        dim: Channels of the point features.
        neighbours: k of the nearest-neighbour graph.
        drop_rate: Dropout before the head.
        drop_path_rate: Stochastic depth of the backbone.
        device: Device of the parameters.
        dtype: Their dtype.
    """

    def __init__(
        self,
        num_classes: int = 40,
        in_chans: int = 3,
        backbone: str = "unireplknet_s",
        backbone_args: Arguments | None = None,
        num_views: int = 4,
        size: int = 224,
        dim: int = 64,
        neighbours: int = 32,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(backbone, backbone_args, in_chans=3, num_classes=0, drop_path_rate=drop_path_rate, **dd)
        if hasattr(self.backbone, "norm") and isinstance(self.backbone.norm, nn.LayerNorm):
            self.backbone.norm = nn.Identity()  # the norm comes after concatenating the views
        self.in_chans, self.num_views = in_chans, num_views
        self.adapter = PointViews(in_chans, num_views, size, dim, neighbours, **dd)
        self.num_features = self.head_hidden_size = num_views * self.backbone.num_features
        self.head_norm = nn.LayerNorm(self.num_features, eps=1e-6, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Identity()
        self.reset_classifier(num_classes)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Number of points and values per point."""
        return self.pretrained_cfg["input_size"][2], self.in_chans  # type: ignore[index, return-value]

    def to_maps(self, x: Tensor) -> Tensor:
        """Points (B, P, in_chans) to images (B V, 3, size, size)."""
        return self.adapter(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Points to the concatenated last maps of all views, (B, V C, h, w)."""
        x = super().forward_features(x)
        return x.reshape(-1, self.num_features, *x.shape[-2:])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, normalise, classify: (B, V C, h, w) to (B, num_classes), or to (B, V C) with `pre_logits`."""
        x = self.head_drop(self.head_norm(x.mean((2, 3))))
        return x if pre_logits else self.head(x)

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one (none for 0 classes); views are always average-pooled."""
        like, training = self.head_norm.weight, self.head.training
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        self.head.train(training)


default_cfgs = generate_default_cfgs(
    {
        "unireplknet_point": modality_cfg((3, 1, 4096), 40),
        "test_unireplknet_point": modality_cfg((3, 1, 64), 40),
    }
)


@register_model
def unireplknet_point(pretrained: bool = False, **kwargs: Any) -> PointNet:
    """UniRepLKNet-S on four rendered views of a point cloud, as for ModelNet-40."""
    return create(PointNet, "unireplknet_point", pretrained, kwargs)


@register_model
def test_unireplknet_point(pretrained: bool = False, **kwargs: Any) -> PointNet:  # noqa: PT028 (not a test)
    """A few thousand parameters, for tests."""
    defaults: Arguments = {"num_views": 2, "size": 32, "dim": 16, "neighbours": 8}
    return create(PointNet, "test_unireplknet_point", pretrained, kwargs, **TINY, **defaults)
