"""Audio, video, point clouds and time series for image networks.

The approach of the UniRepLKNet paper (Ding et al., CVPR 2024, arXiv 2311.15599, section 3.4): convert every modality to
a (B, C, H, W) map and leave the network unchanged, except for the input channels of its first convolution. Each model
here is an adapter in front of a backbone, which may be any spatial model of the zoo or of timm:

    unireplknet_audio     waveform (B, samples)            -> log-mel spectrogram (B, 1, mel bins, frames)
    unireplknet_video     clip (B, C, T, H, W)             -> one image with all frames (B, C, p H, q W)
    unireplknet_point     points (B, P, 3 or more)         -> V rendered views (B V, 3, size, size)
    unireplknet_forecast  window (B, L, D), marks (B, L, F) -> embedding as an image (B, 1, side, side)

>>> model = zoo.create_model("unireplknet_audio", num_classes=35)                  # as in the paper, with UniRepLKNet-S
>>> model = zoo.create_model("unireplknet_audio", backbone="unireplknet_a", sample_rate=8000)

The adapters follow the authors' code where it differs from the paper.
"""

from zoo.models.modalities.audio import AudioNet, LogMel
from zoo.models.modalities.points import PointNet, PointViews
from zoo.models.modalities.series import ForecastNet, SeriesImage
from zoo.models.modalities.video import VideoNet, tile_frames

__all__ = ["AudioNet", "ForecastNet", "LogMel", "PointNet", "PointViews", "SeriesImage", "VideoNet", "tile_frames"]
