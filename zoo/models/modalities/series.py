"""Time series: an embedded window as an image."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.models.modalities.base import LAST_11, TINY, Arguments, ModalityNet, check_shape, create, modality_cfg

__all__ = ["ForecastNet", "SeriesImage"]


class SeriesImage(nn.Module):
    """Embedding of a multivariate window, written row by row into a square image.

    Value embedding (circular convolution over three steps), time embedding (linear, of calendar features) and, if
    places are given, a place embedding (linear), summed to (B, L, embed_dim) as in Corrformer. The L embed_dim values
    are then reshaped to an image without transposition, so each image row belongs to a single time step.

    Args:
        in_chans: Number of variables D.
        seq_len: Number of steps L.
        embed_dim: Features per step; L embed_dim must be a square.
        time_features: Calendar features F per step; 0 for none.
        place_features: Features of the window's place, for example three coordinates of each of its stations.
        dropout: Dropout of the embedding.
        device: Device of the parameters.
        dtype: Their dtype.

    Raises:
        ValueError: L embed_dim is not a square; the message suggests values that fit.
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
                f"seq_len * embed_dim = {seq_len} * {embed_dim} is not a square, so it makes no image; "
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

        Missing marks or places count as zeros.
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
    """Forecaster: instance normalisation, :class:`SeriesImage`, a spatial backbone, and a linear read-out.

    Each window is standardised per variable with a learned affine map (as in RevIN, Kim et al., 2022), which is
    inverted for the forecast. With `linear_skip` the network only corrects a linear forecast of each variable from its
    own past, one matrix for all variables (Zeng et al., "Are Transformers Effective for Time Series Forecasting?", AAAI
    2023); `initialize` computes that matrix in closed form, and the correction is initially zero. The authors' own
    read-out, Corrformer's decoder, is not part of their code nor of this.

    Args:
        in_chans: Number of variables D.
        seq_len: Number of input steps L.
        pred_len: Number of forecast steps H.
        backbone: A spatial model of the zoo or of timm.
        backbone_args: Further arguments of the backbone.
        embed_dim: Features per step; `seq_len * embed_dim` must be a square.
        time_features: Calendar features per step; 0 for none.
        dropout: Dropout of the embedding.
        linear_skip: Correct a linear forecast instead of forecasting from scratch.
        drop_rate: Dropout before the read-out.
        drop_path_rate: Stochastic depth of the backbone.
        device: Device of the parameters.
        dtype: Their dtype.
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
        """Number of steps and variables."""
        return self.seq_len, self.in_chans

    @torch.no_grad()
    def initialize(self, windows: Tensor, targets: Tensor, ridge: float = 1.0) -> None:
        """Compute the linear forecast: ridge regression of (N, H, D) on (N, L, D), variables as further samples."""
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


default_cfgs = generate_default_cfgs(
    {
        "unireplknet_forecast": modality_cfg((11, 1, 48)),
        "test_unireplknet_forecast": modality_cfg((3, 1, 12)),
    }
)


@register_model
def unireplknet_forecast(pretrained: bool = False, **kwargs: Any) -> ForecastNet:
    """UniRepLKNet-S on an embedded window of 48 steps as an image of 192 pixels, as for the global weather data."""
    return create(ForecastNet, "unireplknet_forecast", pretrained, kwargs, backbone_args=LAST_11)


@register_model
def test_unireplknet_forecast(pretrained: bool = False, **kwargs: Any) -> ForecastNet:  # noqa: PT028 (not a test)
    """A few thousand parameters, for tests."""
    defaults: Arguments = {"in_chans": 3, "seq_len": 12, "pred_len": 6, "embed_dim": 48}
    return create(ForecastNet, "test_unireplknet_forecast", pretrained, kwargs, **TINY, **defaults)
