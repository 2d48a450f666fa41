"""Video: the frames of a clip tiled into one image."""

from __future__ import annotations

from typing import Any, Literal

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor

from zoo.models.modalities.base import LAST_11, TINY, Arguments, ModalityNet, check_shape, create, modality_cfg

__all__ = ["VideoNet", "tile_frames"]


def tile_frames(clip: Tensor, how: Literal["tile", "reshape"] = "tile") -> Tensor:
    """Tile the frames of a clip into an image, (B, C, T, H, W) -> (B, C, p H, q W), p q = T, p <= q, as square as
    possible.

    `tile` arranges the frames in reading order. `reshape` follows the authors' code: the same memory read as rows of q
    W pixels, so that each frame becomes a band of H / q rows with q row-subsampled copies side by side (for 4 x 4:
    pixel (r, s) is pixel (4 (r mod H/4) + s // W, s mod W) of frame r // (H/4)).
    """
    if clip.dim() != 5:
        raise ValueError(f"expected clips of shape (batch, channels, frames, height, width), got {tuple(clip.shape)}")
    batch, chans, frames, height, width = clip.shape
    rows = int(frames**0.5)
    while frames % rows:
        rows -= 1
    columns = frames // rows
    if how == "tile":
        clip = clip.unflatten(2, (rows, columns)).transpose(3, 4)  # B C p H q W
    elif how != "reshape":
        raise ValueError(f"tiling must be 'tile' or 'reshape', got {how!r}")
    return clip.reshape(batch, chans, rows * height, columns * width)


class VideoNet(ModalityNet):
    """Video classifier: :func:`tile_frames`, then a spatial backbone that sees all frames at once.

    Args:
        num_classes: Outputs.
        in_chans: Channels of a frame.
        backbone: A spatial model of the zoo or of timm.
        backbone_args: Further arguments of the backbone.
        tiling: `tile`, or `reshape` as in the authors' code.
        drop_rate: Dropout before the head.
        drop_path_rate: Stochastic depth of the backbone.
        device: Device of the parameters.
        dtype: Their dtype.
    """

    def __init__(
        self,
        num_classes: int = 400,
        in_chans: int = 3,
        backbone: str = "unireplknet_s",
        backbone_args: Arguments | None = None,
        tiling: Literal["tile", "reshape"] = "tile",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if tiling not in ("tile", "reshape"):
            raise ValueError(f"tiling must be 'tile' or 'reshape', got {tiling!r}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        drop = {"drop_rate": drop_rate, "drop_path_rate": drop_path_rate}
        super().__init__(backbone, backbone_args, in_chans=in_chans, num_classes=num_classes, **drop, **dd)
        self.in_chans, self.num_classes, self.tiling = in_chans, num_classes, tiling

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Channels, frames, height and width."""
        _, frames, side = self.pretrained_cfg["input_size"]  # type: ignore[index]
        return self.in_chans, frames, side, side

    def to_maps(self, x: Tensor) -> Tensor:
        """Clips (B, in_chans, T, H, W) to (B, in_chans, p H, q W)."""
        check_shape(x, "clips", "batch", self.in_chans, "frames", "height", "width")
        return tile_frames(x, self.tiling)


default_cfgs = generate_default_cfgs(
    {
        "unireplknet_video": modality_cfg((3, 16, 224), 400),
        "test_unireplknet_video": modality_cfg((3, 4, 24), 400),
    }
)


@register_model
def unireplknet_video(pretrained: bool = False, **kwargs: Any) -> VideoNet:
    """UniRepLKNet-S on the frames of a clip side by side, 16 frames of 224 pixels as one image of 896."""
    return create(VideoNet, "unireplknet_video", pretrained, kwargs, backbone_args=LAST_11)


@register_model
def test_unireplknet_video(pretrained: bool = False, **kwargs: Any) -> VideoNet:  # noqa: PT028 (not a test)
    """A few thousand parameters, for tests."""
    return create(VideoNet, "test_unireplknet_video", pretrained, kwargs, **TINY)
