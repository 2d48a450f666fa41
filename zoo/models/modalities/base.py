"""Base class of networks for other modalities: an adapter in front of a backbone."""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, create_model, group_parameters
from torch import Tensor, nn

Arguments = dict[str, Any]


def check_shape(x: Tensor, what: str, *shape: int | str) -> None:
    """Check the rank and sizes of a tensor; a name in `shape` matches any size."""
    fits = x.dim() == len(shape) and all(isinstance(s, str) or s == n for s, n in zip(shape, x.shape, strict=True))
    if not fits:
        raise ValueError(f"expected {what} of shape ({', '.join(map(str, shape))}), got {tuple(x.shape)}")


class ModalityNet(nn.Module):
    """An adapter and a backbone; subclasses define `to_maps` and `input_shape`."""

    backbone: Any
    in_chans: int
    num_classes: int

    def __init__(self, backbone: str, backbone_args: Arguments | None, **arguments: Any) -> None:
        super().__init__()
        self.backbone = create_model(backbone, **{**arguments, **(backbone_args or {})})
        self.num_features = self.head_hidden_size = int(self.backbone.num_features)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of a typical input without batch, for examples and exports, from the model's configuration."""
        raise NotImplementedError(f"{type(self).__name__} must define input_shape")

    def to_maps(self, x: Tensor) -> Tensor:
        """Convert the input to maps for the backbone."""
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
        """Replace the head by a new one (none for 0 classes) and, if given, the pooling."""
        self.num_classes = num_classes
        self.backbone.reset_classifier(num_classes, global_pool)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Activation checkpointing in the backbone."""
        self.backbone.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Parameters exempted by the backbone, under their names here."""
        return {f"backbone.{name}" for name in getattr(self.backbone, "no_weight_decay", set)()}

    def _backbone_ids(self) -> tuple[dict[str, int], int]:
        if hasattr(self.backbone, "layer_ids"):
            return self.backbone.layer_ids()
        ids = group_parameters(self.backbone, self.backbone.group_matcher(coarse=False), reverse=True)  # of timm
        return ids, max(ids.values(), default=0)

    def layer_ids(self) -> tuple[dict[str, int], int]:
        """Depth of every parameter for layer-wise learning rates: the adapter counts as the stem."""
        ids, last = self._backbone_ids()
        inner = {f"backbone.{name}": depth for name, depth in ids.items()}
        outer = {name: last if name.startswith("head") else 0 for name, _ in self.named_parameters()}
        return {name: inner.get(name, depth) for name, depth in outer.items()}, last


def modality_cfg(input_size: tuple[int, int, int], num_classes: int = -1) -> dict[str, Any]:
    """`pretrained_cfg` without weights. timm expects three numbers in `input_size`, the channels first: here they are
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


#: Large kernels of 11 in the last stage, as in the authors' video and forecasting scripts.
LAST_11: Arguments = {"kernel_sizes": ((3,) * 3, (13,) * 3, (13, 3, 3) * 9, (11,) * 3)}


def create(kind: type[ModalityNet], variant: str, pretrained: bool, kwargs: Arguments, **defaults: Any) -> Any:
    if "backbone" in kwargs:  # the defaults are for another backbone
        defaults.pop("backbone_args", None)
    return build_model_with_cfg(kind, variant, pretrained, **{**defaults, **kwargs})


TINY: Arguments = {"backbone": "test_unireplknet"}
