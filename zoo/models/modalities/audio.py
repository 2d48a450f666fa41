"""Audio: waveforms as log-mel spectrograms."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.models.modalities.base import TINY, Arguments, ModalityNet, check_shape, create, modality_cfg

__all__ = ["AudioNet", "LogMel"]


class LogMel(nn.Module):
    """Log-mel spectrogram with Kaldi's conventions, cut or padded to a number of frames, and standardised.

    The filter bank is that of audio transformers: Hann window, pre-emphasis 0.97, no dither, power spectrum with the
        next
    power of two as length, natural logarithm. In training mode, SpecAugment masks one band of frequencies and one span
    of time before the standardisation, and noise and a circular shift are applied after it.

    Args:
        sample_rate: Hz.
        num_mel_bins: Mel filters F, from 20 Hz to half the sample rate.
        frame_length: Window length, ms.
        frame_shift: Hop, ms.
        num_frames: Number of frames T; shorter clips are padded with zeros at the end.
        mean: Subtracted from the logarithms.
        std: The difference is divided by twice this.
        freq_mask: Largest frequency mask in training, bins; 0 for none.
        time_mask: Largest time mask in training, frames; 0 for none.
        noise: Largest amplitude of uniform noise in training; the amplitude is itself uniform up to this.
        time_shift: Largest circular shift in training, frames.
        device: Device of the tables.
        dtype: Their dtype.

    Raises:
        ValueError: A number is not positive, or there are too many filters for the spectrum.
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
        """Number of samples that exactly fill the frames."""
        return (self.num_frames - 1) * self.hop + self.length

    def extra_repr(self) -> str:
        """Main settings."""
        return f"sample_rate={self.sample_rate}, num_mel_bins={self.num_mel_bins}, num_frames={self.num_frames}"

    def fbank(self, waveform: Tensor) -> Tensor:
        """Log-mel energies of all complete frames, (..., samples) -> (..., frames, F)."""
        frames = waveform.unfold(-1, self.length, self.hop)  # ... T length
        frames = frames - frames.mean(-1, keepdim=True)
        frames = frames - 0.97 * torch.cat([frames[..., :1], frames[..., :-1]], -1)
        power = torch.fft.rfft(frames * self.window.to(frames.dtype), self.padded).abs().square()
        return (power @ self.bank.to(frames.dtype).t()).clamp_min(torch.finfo(torch.float32).eps).log()

    def forward(self, waveform: Tensor) -> Tensor:
        """Waveforms (B, C, samples) in [-1, 1], or (B, samples) for one channel, to (B, C, F, T).

        Raises:
            ValueError: The shape is wrong, or the clip is shorter than a frame.
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
    """Audio classifier: :class:`LogMel`, then a spatial backbone with its own head.

    Args:
        num_classes: Outputs.
        in_chans: Channels of the recording.
        backbone: A spatial model of the zoo or of timm.
        backbone_args: Further arguments of the backbone.
        sample_rate: Hz; this and what follows as in :class:`LogMel`.
        num_mel_bins: Mel filters.
        frame_length: Window length, ms.
        frame_shift: Hop, ms.
        num_frames: Frames of the spectrogram.
        mean: Subtracted from the log-mel energies.
        std: The difference is divided by twice this.
        freq_mask: Largest frequency mask in training, bins; 48 in the paper.
        time_mask: Largest time mask in training, frames; 48 in the paper.
        noise: Largest noise amplitude in training; 0.1 in the paper.
        time_shift: Largest circular shift in training, frames; 10 in the paper.
        drop_rate: Dropout before the head.
        drop_path_rate: Stochastic depth of the backbone.
        device: Device of the parameters.
        dtype: Their dtype.
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


default_cfgs = generate_default_cfgs(
    {
        "unireplknet_audio": modality_cfg((1, 1, 20720), 35),
        "test_unireplknet_audio": modality_cfg((1, 1, 5360), 35),
    }
)


@register_model
def unireplknet_audio(pretrained: bool = False, **kwargs: Any) -> AudioNet:
    """UniRepLKNet-S on log-mel spectrograms of 128 bins and 128 frames, as for Speech Commands."""
    return create(AudioNet, "unireplknet_audio", pretrained, kwargs)


@register_model
def test_unireplknet_audio(pretrained: bool = False, **kwargs: Any) -> AudioNet:  # noqa: PT028 (not a test)
    """A few thousand parameters, for tests."""
    defaults: Arguments = {"num_mel_bins": 32, "num_frames": 32}
    return create(AudioNet, "test_unireplknet_audio", pretrained, kwargs, **TINY, **defaults)
