"""Sound, video, point clouds and time series for networks that look at images.

The principle of UniRepLKNet's paper (Ding et al., CVPR 2024, arXiv 2311.15599, section 3.4): bring every modality to a
(B, C, H, W) map and leave the network as it is; only its first convolution knows how many channels come in. An adapter
does the bringing, and a model here is an adapter in front of a backbone, which may be any spatial model of the zoo or
of timm:

    unireplknet_audio     waveform (B, samples)            -> log-mel spectrogram (B, 1, mel bins, frames)
    unireplknet_video     clip (B, C, T, H, W)             -> one image with all frames (B, C, p H, q W)
    unireplknet_point     points (B, P, 3 or more)         -> V rendered views (B V, 3, size, size)
    unireplknet_forecast  window (B, L, D), marks (B, L, F) -> embedding as an image (B, 1, side, side)

>>> model = zoo.create_model("unireplknet_audio", num_classes=35)                  # the paper's, with UniRepLKNet-S
>>> model = zoo.create_model("unireplknet_audio", backbone="unireplknet_a", sample_rate=8000)

The adapters follow the authors' code where it and the paper differ; what was left open there is said below.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, create_model, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from zoo.ops.attention import transformable_attention

__all__ = [
    "AudioNet",
    "ForecastNet",
    "LogMel",
    "PointNet",
    "PointViews",
    "SeriesImage",
    "VideoNet",
    "tile_frames",
]

Arguments = dict[str, Any]


def check_shape(x: Tensor, what: str, *shape: int | str) -> None:
    """Refuse a tensor of another rank or size; a name in `shape` stands for any size."""
    fits = x.dim() == len(shape) and all(isinstance(s, str) or s == n for s, n in zip(shape, x.shape, strict=True))
    if not fits:
        raise ValueError(f"expected {what} of shape ({', '.join(map(str, shape))}), got {tuple(x.shape)}")


class ModalityNet(nn.Module):
    """An adapter and a backbone; subclasses say what goes in between and after."""

    backbone: Any
    in_chans: int
    num_classes: int

    def __init__(self, backbone: str, backbone_args: Arguments | None, **arguments: Any) -> None:
        super().__init__()
        self.backbone = create_model(backbone, **{**arguments, **(backbone_args or {})})
        self.num_features = self.head_hidden_size = int(self.backbone.num_features)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one usual input, for examples and exports, from the model's record."""
        raise NotImplementedError(f"{type(self).__name__} must define input_shape")

    def to_maps(self, x: Tensor) -> Tensor:
        """Turn the input into what the backbone sees."""
        raise NotImplementedError(f"{type(self).__name__} must define to_maps(x)")

    def forward_features(self, x: Tensor) -> Tensor:
        """Input to the backbone's last map, (B, C, h, w)."""
        return self.backbone.forward_features(self.to_maps(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, normalise, classify."""
        return self.backbone.forward_head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Input to logits, (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.backbone.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a fresh one (0 classes: none) and, if given, the pooling."""
        self.num_classes = num_classes
        self.backbone.reset_classifier(num_classes, global_pool)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's activations in the backward pass instead of keeping them."""
        self.backbone.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """What the backbone exempts, under its names here."""
        return {f"backbone.{name}" for name in getattr(self.backbone, "no_weight_decay", set)()}

    def layer_ids(self) -> tuple[dict[str, int], int]:
        """Depth of every parameter for layer-wise learning rates: the adapter is as deep as the stem."""
        ids, last = self.backbone.layer_ids()
        inner = {f"backbone.{name}": depth for name, depth in ids.items()}
        outer = {name: last if name.startswith("head") else 0 for name, _ in self.named_parameters()}
        return {name: inner.get(name, depth) for name, depth in outer.items()}, last


# ---- sound -------------------------------------------------------------------------------------------------


class LogMel(nn.Module):
    """Log-mel spectrogram after Kaldi's conventions, cut or padded to a number of frames, and standardised.

    The filter bank is the one that audio transformers use: Hann window, pre-emphasis 0.97, no dither, power spectrum of
    the next power of two, natural logarithm. In training mode SpecAugment masks one band of frequencies and one span of
    time before, and noise and a circular shift follow after, the standardisation.

    Args:
        sample_rate: Hz.
        num_mel_bins: Mel filters F, from 20 Hz to half the sample rate.
        frame_length: Window, ms.
        frame_shift: Hop, ms.
        num_frames: Frames T of the result; shorter clips get zeros at the end.
        mean: Subtracted from the logarithms.
        std: They are divided by twice this.
        freq_mask: Largest band that training masks, in bins; 0 for none.
        time_mask: Largest span that training masks, in frames; 0 for none.
        noise: Largest amplitude of the uniform noise that training adds; its own amplitude is uniform below it.
        time_shift: Largest circular shift in training, in frames.
        device: Where the tables live.
        dtype: Their type.

    Raises:
        ValueError: A number is not positive, or so many filters do not fit the spectrum.
    """

    window: Tensor
    bank: Tensor

    def __init__(
        self,
        sample_rate: int = 16000,
        num_mel_bins: int = 128,
        frame_length: float = 25.0,
        frame_shift: float = 10.0,
        num_frames: int = 128,
        mean: float = -6.845978,
        std: float = 5.5654526,
        freq_mask: int = 0,
        time_mask: int = 0,
        noise: float = 0.0,
        time_shift: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        from torchaudio.compliance.kaldi import get_mel_banks
        from torchaudio.transforms import FrequencyMasking, TimeMasking

        self.length, self.hop = int(sample_rate * frame_length / 1000), int(sample_rate * frame_shift / 1000)
        if min(self.length, self.hop, num_mel_bins, num_frames) < 1:
            raise ValueError("sample_rate, frame_length, frame_shift, num_mel_bins and num_frames must be positive")
        self.padded = 2 ** math.ceil(math.log2(self.length))
        self.sample_rate, self.num_mel_bins, self.num_frames = sample_rate, num_mel_bins, num_frames
        self.mean, self.std, self.noise, self.time_shift = mean, std, noise, time_shift
        with torch.device("cpu"):
            window = torch.hann_window(self.length, periodic=False)
            bank = get_mel_banks(num_mel_bins, self.padded, float(sample_rate), 20.0, 0.0, 100.0, -500.0, 1.0)[0]
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.register_buffer("window", window.to(**dd), persistent=False)
        self.register_buffer("bank", F.pad(bank, (0, 1)).to(**dd), persistent=False)  # (F, padded / 2 + 1)
        masks = [FrequencyMasking(freq_mask, iid_masks=True)] if freq_mask else []
        masks += [TimeMasking(time_mask, iid_masks=True)] if time_mask else []
        self.masks = nn.Sequential(*masks)

    @property
    def samples(self) -> int:
        """Samples that just fill the frames."""
        return (self.num_frames - 1) * self.hop + self.length

    def extra_repr(self) -> str:
        """Shown in the model's text."""
        return f"sample_rate={self.sample_rate}, num_mel_bins={self.num_mel_bins}, num_frames={self.num_frames}"

    def fbank(self, waveform: Tensor) -> Tensor:
        """Log-mel energies of all whole frames, (..., samples) -> (..., frames, F)."""
        frames = waveform.unfold(-1, self.length, self.hop)  # ... T length
        frames = frames - frames.mean(-1, keepdim=True)
        frames = frames - 0.97 * torch.cat([frames[..., :1], frames[..., :-1]], -1)
        power = torch.fft.rfft(frames * self.window.to(frames.dtype), self.padded).abs().square()
        return (power @ self.bank.to(frames.dtype).t()).clamp_min(torch.finfo(torch.float32).eps).log()

    def forward(self, waveform: Tensor) -> Tensor:
        """Waveforms (B, C, samples) in [-1, 1], or (B, samples) of one channel, to (B, C, F, T).

        Raises:
            ValueError: The shape is another one, or the clip is shorter than a frame.
        """
        waveform = waveform[:, None] if waveform.dim() == 2 else waveform
        check_shape(waveform, "waveforms", "batch", "channels", "samples")
        if waveform.shape[-1] < self.length:
            raise ValueError(f"clips of {waveform.shape[-1]} samples are shorter than a frame of {self.length}")
        exact = torch.promote_types(waveform.dtype, torch.float32)
        with torch.autocast("cuda" if waveform.is_cuda else "cpu", enabled=False):
            x = waveform.to(exact)
            x = self.fbank(x - x.mean(-1, keepdim=True))
        x = F.pad(x, (0, 0, 0, max(0, self.num_frames - x.shape[-2])))[..., : self.num_frames, :]
        x = x.transpose(-1, -2)  # the authors' code has frequency first, their paper time
        if self.training:
            x = self.masks(x)
        x = (x - self.mean) / (2 * self.std)
        if self.training and self.noise:
            x = x + torch.rand_like(x) * torch.rand(len(x), 1, 1, 1, device=x.device, dtype=x.dtype) * self.noise
        if self.training and self.time_shift:
            x = x.roll(int(torch.randint(-self.time_shift, self.time_shift, ())), -1)
        return x.to(waveform.dtype)


class AudioNet(ModalityNet):
    """A spatial model that hears: :class:`LogMel`, then the backbone with its own head.

    Args:
        num_classes: Outputs.
        in_chans: Channels of the recording.
        backbone: A spatial model of the zoo or of timm.
        backbone_args: Further arguments of the backbone.
        sample_rate: See :class:`LogMel`, as for all that follow.
        num_mel_bins: Mel filters.
        frame_length: Window, ms.
        frame_shift: Hop, ms.
        num_frames: Frames of the spectrogram.
        mean: Subtracted from the log-mel energies.
        std: They are divided by twice this.
        freq_mask: Largest masked band in training, bins; the paper's recipe is 48.
        time_mask: Largest masked span in training, frames; the paper's recipe is 48.
        noise: Largest noise in training; the paper's recipe is 0.1.
        time_shift: Largest circular shift in training, frames; the paper's recipe is 10.
        drop_rate: Dropout before the head.
        drop_path_rate: Stochastic depth of the backbone.
        device: Where the parameters live.
        dtype: Their type.
    """

    def __init__(
        self,
        num_classes: int = 35,
        in_chans: int = 1,
        backbone: str = "unireplknet_s",
        backbone_args: Arguments | None = None,
        sample_rate: int = 16000,
        num_mel_bins: int = 128,
        frame_length: float = 25.0,
        frame_shift: float = 10.0,
        num_frames: int = 128,
        mean: float = -6.845978,
        std: float = 5.5654526,
        freq_mask: int = 0,
        time_mask: int = 0,
        noise: float = 0.0,
        time_shift: int = 0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        drop = {"drop_rate": drop_rate, "drop_path_rate": drop_path_rate}
        super().__init__(backbone, backbone_args, in_chans=in_chans, num_classes=num_classes, **drop, **dd)
        self.in_chans, self.num_classes = in_chans, num_classes
        self.adapter = LogMel(
            sample_rate, num_mel_bins, frame_length, frame_shift, num_frames, mean, std,
            freq_mask, time_mask, noise, time_shift, **dd,
        )  # fmt: skip

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Channels and samples."""
        return self.in_chans, self.adapter.samples

    def to_maps(self, x: Tensor) -> Tensor:
        """Waveforms (B, in_chans, samples), or (B, samples), to (B, in_chans, F, T)."""
        x = x[:, None] if x.dim() == 2 else x
        check_shape(x, "waveforms", "batch", self.in_chans, "samples")
        return self.adapter(x)


# ---- video -------------------------------------------------------------------------------------------------


def tile_frames(clip: Tensor, how: Literal["tile", "reshape"] = "tile") -> Tensor:
    """All frames of a clip as one image, (B, C, T, H, W) -> (B, C, p H, q W) with p q = T and p <= q as near as can be.

    `tile` lays the frames out in reading order. `reshape` is what the authors' code does: the same memory read as rows
    of q W pixels, so that each frame becomes a band of H / q rows in which q row-subsampled copies stand side by side
    (for 4 x 4: pixel (r, s) is pixel (4 (r mod H/4) + s // W, s mod W) of frame r // (H/4)).
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
    """A spatial model that sees all frames of a clip at once: :func:`tile_frames`, then the backbone.

    Args:
        num_classes: Outputs.
        in_chans: Channels of a frame.
        backbone: A spatial model of the zoo or of timm.
        backbone_args: Further arguments of the backbone.
        tiling: `tile`, or `reshape` as in the authors' code.
        drop_rate: Dropout before the head.
        drop_path_rate: Stochastic depth of the backbone.
        device: Where the parameters live.
        dtype: Their type.
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


# ---- point clouds ------------------------------------------------------------------------------------------


class PointFeatures(nn.Module):
    """A vector for every point from its k nearest neighbours (an edge convolution), (B, P, in_chans) -> (B, P, dim)."""

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
        """Rows of the flattened batch that `index` (B, P, k) names within each sample."""
        batch, points, _ = index.shape
        return index + points * torch.arange(batch, device=index.device)[:, None, None]


class CrossViews(nn.Module):
    """Let the views of an object see each other: patches of all of them go through one transformer layer."""

    def __init__(self, dim: int, views: int, patch: int = 7, **dd: Any) -> None:
        super().__init__()
        self.views = views
        self.patch = nn.Conv2d(dim, 2 * dim, patch, patch, **dd)
        self.block = Block(2 * dim, num_heads=8 if 2 * dim % 8 == 0 else 1, mlp_ratio=2.0, qkv_bias=True, **dd)
        self.up = nn.Conv2d(2 * dim, dim, 3, padding=1, **dd)
        self.mix = nn.Conv2d(2 * dim, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B V, dim, S, S) to the same shape."""
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
    """Point clouds as pictures from several sides: per-point features, projected, fused across views, painted.

    The views turn the object about x by i * 90 degrees and then about z by 90 degrees; the depth is dropped, and a
    point adds its features to the 3 x 3 pixels around its own, on a grid that just holds the object.

    Args:
        in_chans: Numbers of a point: three coordinates, then any attributes.
        num_views: V, from 1 to 4.
        size: Side of a picture in pixels.
        dim: Channels of the features.
        neighbours: k of the nearest-neighbour graph.
        mean: Of the three painted channels.
        std: Likewise.
        device: Where the parameters live.
        dtype: Their type.
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
        self.register_buffer("turns", _turns(num_views).to(**dd), persistent=False)  # V 3 3
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, device="cpu").view(3, 1, 1).to(**dd), persistent=False)

    def splat(self, points: Tensor, features: Tensor) -> Tensor:
        """Add features (N, P, dim) of points (N, P, 3), seen along z, to maps (N, dim, size, size)."""
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
        """Points (B, P, in_chans) to pictures (B V, 3, size, size), the views of an object one after the other.

        Raises:
            ValueError: The shape is another one, or there are fewer points than neighbours.
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


def _turns(views: int) -> Tensor:
    """Rotation matrices of the views: about x by i * 90 degrees, then about z by 90 degrees, (V, 3, 3)."""
    matrices = []
    for i in range(views):
        c, s = (1, 0, -1, 0)[i], (0, 1, 0, -1)[i]
        matrices.append([[0, -c, s], [1, 0, 0], [0, s, c]])
    return torch.tensor(matrices, dtype=torch.float32, device="cpu")


class PointNet(ModalityNet):
    """A spatial model that walks around a point cloud: :class:`PointViews`, the backbone on each view, one head on all.

    Args:
        num_classes: Outputs.
        in_chans: Numbers of a point: three coordinates, then any attributes.
        backbone: A spatial model of the zoo or of timm.
        backbone_args: Further arguments of the backbone.
        num_views: Views, from 1 to 4.
        size: Side of a view in pixels.
        dim: Channels of the point features.
        neighbours: k of the nearest-neighbour graph.
        drop_rate: Dropout before the head.
        drop_path_rate: Stochastic depth of the backbone.
        device: Where the parameters live.
        dtype: Their type.
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
            self.backbone.norm = nn.Identity()  # the norm follows the concatenation of the views
        self.in_chans, self.num_views = in_chans, num_views
        self.adapter = PointViews(in_chans, num_views, size, dim, neighbours, **dd)
        self.num_features = self.head_hidden_size = num_views * self.backbone.num_features
        self.head_norm = nn.LayerNorm(self.num_features, eps=1e-6, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Identity()
        self.reset_classifier(num_classes)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Points and their numbers."""
        return self.pretrained_cfg["input_size"][2], self.in_chans  # type: ignore[index, return-value]

    def to_maps(self, x: Tensor) -> Tensor:
        """Points (B, P, in_chans) to pictures (B V, 3, size, size)."""
        return self.adapter(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Points to the last maps of all views side by side, (B, V C, h, w)."""
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
        """Replace the head by a fresh one (0 classes: none); views are always averaged over their pixels."""
        like, training = self.head_norm.weight, self.head.training
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        self.head.train(training)


# ---- time series -------------------------------------------------------------------------------------------


class SeriesImage(nn.Module):
    """Embedding of a multivariate window, written row by row into a square image.

    Value embedding (circular convolution over three steps), time embedding (linear, of calendar features) and, where
    stations have places, a place embedding (linear), summed to (B, L, embed_dim) as in Corrformer. The L embed_dim
    numbers are then read as an image without any transposition, so an image row lies within one time step.

    Args:
        in_chans: Variables D.
        seq_len: Steps L.
        embed_dim: Features of a step; L embed_dim must be a square.
        time_features: Calendar features F of a step; 0 for none.
        place_features: Features of the window's place, for example three coordinates of each of its stations.
        dropout: Of the embedding.
        device: Where the parameters live.
        dtype: Their type.

    Raises:
        ValueError: L embed_dim is no square; the message names embed_dims that fit.
    """

    def __init__(
        self,
        in_chans: int,
        seq_len: int = 48,
        embed_dim: int = 768,
        time_features: int = 4,
        place_features: int = 0,
        dropout: float = 0.05,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.side = math.isqrt(seq_len * embed_dim)
        if self.side**2 != seq_len * embed_dim:
            fitting = [d for d in range(1, 1025) if math.isqrt(seq_len * d) ** 2 == seq_len * d]
            close = sorted(sorted(fitting, key=lambda d: abs(d - embed_dim))[:4])
            raise ValueError(
                f"seq_len * embed_dim = {seq_len} * {embed_dim} is no square and makes no image; "
                f"for {seq_len} steps use embed_dim = {', '.join(map(str, close))}"
            )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_chans, self.seq_len, self.embed_dim, self.time_features = in_chans, seq_len, embed_dim, time_features
        self.value = nn.Conv1d(in_chans, embed_dim, 3, padding=1, padding_mode="circular", bias=False, **dd)
        self.time = nn.Linear(time_features, embed_dim, bias=False, **dd) if time_features else None
        self.place = nn.Linear(place_features, embed_dim, **dd) if place_features else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, marks: Tensor | None = None, place: Tensor | None = None) -> Tensor:
        """Windows (B, L, D), marks (B, L, F) and places (B, place_features) to images (B, 1, side, side).

        Marks or a place that are not given count as zeros.
        """
        check_shape(x, "windows", "batch", self.seq_len, self.in_chans)
        x = self.value(x.transpose(1, 2)).transpose(1, 2)
        if self.time is not None and marks is not None:
            check_shape(marks, "calendar marks", x.shape[0], self.seq_len, self.time_features)
            x = x + self.time(marks)
        if self.place is not None and place is not None:
            x = x + self.place(place)[:, None]
        return self.dropout(x).reshape(-1, 1, self.side, self.side)


class ForecastNet(ModalityNet):
    """A spatial model that forecasts: instance normalisation, :class:`SeriesImage`, the backbone, a linear read-out.

    Each window is standardised per variable with a learned affine map (as in RevIN, Kim et al., 2022), and the
    forecast is put back on the window's scale. With `linear_skip` the network only corrects a linear forecast of each
    variable from its own past, one matrix for all variables (Zeng et al., "Are Transformers Effective for Time Series
    Forecasting?", AAAI 2023); `initialize` solves for that matrix in closed form, and the correction starts at zero.
    The authors' own read-out, Corrformer's decoder, is not part of their code and not of this.

    Args:
        in_chans: Variables D.
        seq_len: Steps L that are seen.
        pred_len: Steps H that are forecast.
        backbone: A spatial model of the zoo or of timm.
        backbone_args: Further arguments of the backbone.
        embed_dim: Features of a step; `seq_len * embed_dim` must be a square.
        time_features: Calendar features of a step; 0 for none.
        dropout: Of the embedding.
        linear_skip: Correct a linear forecast instead of making one from nothing.
        drop_rate: Dropout before the read-out.
        drop_path_rate: Stochastic depth of the backbone.
        device: Where the parameters live.
        dtype: Their type.
    """

    def __init__(
        self,
        in_chans: int = 11,
        seq_len: int = 48,
        pred_len: int = 24,
        backbone: str = "unireplknet_s",
        backbone_args: Arguments | None = None,
        embed_dim: int = 768,
        time_features: int = 4,
        dropout: float = 0.05,
        linear_skip: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        drop = {"drop_rate": drop_rate, "drop_path_rate": drop_path_rate}
        super().__init__(backbone, backbone_args, in_chans=1, num_classes=pred_len * in_chans, **drop, **dd)
        self.in_chans, self.seq_len, self.pred_len = in_chans, seq_len, pred_len
        self.adapter = SeriesImage(in_chans, seq_len, embed_dim, time_features, dropout=dropout, **dd)
        self.scale = nn.Parameter(torch.ones(in_chans, **dd))
        self.shift = nn.Parameter(torch.zeros(in_chans, **dd))
        self.linear = nn.Linear(seq_len, pred_len, **dd) if linear_skip else None
        if self.linear is not None:
            for parameter in self.backbone.get_classifier().parameters():
                nn.init.zeros_(parameter)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Steps and variables."""
        return self.seq_len, self.in_chans

    @torch.no_grad()
    def initialize(self, windows: Tensor, targets: Tensor, ridge: float = 1.0) -> None:
        """Solve for the linear forecast: ridge regression of (N, H, D) on (N, L, D), variables as further samples."""
        if self.linear is None:
            return
        x, y = windows.double().transpose(1, 2).flatten(0, 1), targets.double().transpose(1, 2).flatten(0, 1)
        x_mean, y_mean = x.mean(0), y.mean(0)
        x, y = x - x_mean, y - y_mean
        gram = x.T @ x + ridge * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        weight = torch.linalg.solve(gram, x.T @ y).T
        self.linear.weight.copy_(weight)
        self.linear.bias.copy_(y_mean - weight @ x_mean)

    def forward(self, x: Tensor, marks: Tensor | None = None) -> Tensor:
        """Windows (B, L, D), and their calendar marks (B, L, F), to forecasts (B, H, D)."""
        check_shape(x, "windows", "batch", self.seq_len, self.in_chans)
        mean = x.mean(1, keepdim=True)
        std = (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
        image = self.adapter((x - mean) / std * self.scale + self.shift, marks)
        out = self.backbone(image).view(-1, self.pred_len, self.in_chans)
        if self.linear is not None:
            return self.linear(x.transpose(1, 2)).transpose(1, 2) + out * std
        return (out - self.shift) / self.scale * std + mean


# ---- registered models -------------------------------------------------------------------------------------


def _cfg(input_size: tuple[int, int, int], num_classes: int = -1) -> dict[str, Any]:
    """Record of a model without weights. timm wants three numbers in `input_size`, the channels first: here they are
    (channels, 1, samples), (channels, frames, side), (channels, 1, points) and (variables, 1, steps).
    """
    return {
        "num_classes": num_classes,
        "input_size": input_size,
        "pool_size": None,
        "license": "apache-2.0",
        "origin_url": "https://github.com/AILab-CVC/UniRepLKNet",
        "paper_ids": "arXiv:2311.15599",
        "paper_name": "UniRepLKNet: A Universal Perception Large-Kernel ConvNet",
    }


default_cfgs = generate_default_cfgs(
    {
        "unireplknet_audio": _cfg((1, 1, 20720), 35),
        "unireplknet_video": _cfg((3, 16, 224), 400),
        "unireplknet_point": _cfg((3, 1, 4096), 40),
        "unireplknet_forecast": _cfg((11, 1, 48)),
        "test_unireplknet_audio": _cfg((1, 1, 5360), 35),
        "test_unireplknet_video": _cfg((3, 4, 24), 400),
        "test_unireplknet_point": _cfg((3, 1, 64), 40),
        "test_unireplknet_forecast": _cfg((3, 1, 12)),
    }
)

#: The authors' video and forecasting scripts give the last stage kernels of 11.
LAST_11: Arguments = {"kernel_sizes": ((3,) * 3, (13,) * 3, (13, 3, 3) * 9, (11,) * 3)}


def _create(kind: type[ModalityNet], variant: str, pretrained: bool, kwargs: Arguments, **defaults: Any) -> Any:
    if "backbone" in kwargs:  # the defaults are another backbone's
        defaults.pop("backbone_args", None)
    return build_model_with_cfg(kind, variant, pretrained, **{**defaults, **kwargs})


@register_model
def unireplknet_audio(pretrained: bool = False, **kwargs: Any) -> AudioNet:
    """UniRepLKNet-S on log-mel spectrograms of 128 bins and 128 frames, as for Speech Commands."""
    return _create(AudioNet, "unireplknet_audio", pretrained, kwargs)


@register_model
def unireplknet_video(pretrained: bool = False, **kwargs: Any) -> VideoNet:
    """UniRepLKNet-S on the frames of a clip side by side, 16 frames of 224 pixels as one image of 896."""
    return _create(VideoNet, "unireplknet_video", pretrained, kwargs, backbone_args=LAST_11)


@register_model
def unireplknet_point(pretrained: bool = False, **kwargs: Any) -> PointNet:
    """UniRepLKNet-S on four rendered views of a point cloud, as for ModelNet-40."""
    return _create(PointNet, "unireplknet_point", pretrained, kwargs)


@register_model
def unireplknet_forecast(pretrained: bool = False, **kwargs: Any) -> ForecastNet:
    """UniRepLKNet-S on an embedded window of 48 steps as an image of 192 pixels, as for the global weather."""
    return _create(ForecastNet, "unireplknet_forecast", pretrained, kwargs, backbone_args=LAST_11)


_TINY: Arguments = {"backbone": "test_unireplknet"}


@register_model
def test_unireplknet_audio(pretrained: bool = False, **kwargs: Any) -> AudioNet:  # noqa: PT028 (not a test)
    """A few thousand parameters, for tests."""
    defaults: Arguments = {"num_mel_bins": 32, "num_frames": 32}
    return _create(AudioNet, "test_unireplknet_audio", pretrained, kwargs, **_TINY, **defaults)


@register_model
def test_unireplknet_video(pretrained: bool = False, **kwargs: Any) -> VideoNet:  # noqa: PT028 (not a test)
    """A few thousand parameters, for tests."""
    return _create(VideoNet, "test_unireplknet_video", pretrained, kwargs, **_TINY)


@register_model
def test_unireplknet_point(pretrained: bool = False, **kwargs: Any) -> PointNet:  # noqa: PT028 (not a test)
    """A few thousand parameters, for tests."""
    defaults: Arguments = {"num_views": 2, "size": 32, "dim": 16, "neighbours": 8}
    return _create(PointNet, "test_unireplknet_point", pretrained, kwargs, **_TINY, **defaults)


@register_model
def test_unireplknet_forecast(pretrained: bool = False, **kwargs: Any) -> ForecastNet:  # noqa: PT028 (not a test)
    """A few thousand parameters, for tests."""
    defaults: Arguments = {"in_chans": 3, "seq_len": 12, "pred_len": 6, "embed_dim": 48}
    return _create(ForecastNet, "test_unireplknet_forecast", pretrained, kwargs, **_TINY, **defaults)
