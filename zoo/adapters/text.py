"""Text classification: a small pretrained encoder, fine-tuned through adapters, and a linear classifier.

The encoder is BERT from Hugging Face transformers; its weights come with the data (`zoo.data.FoodReviews` provides
MiniLM-L6). Whatever the tuning method, the model initially equals the published encoder.

>>> model = create_model("minilm_l6", num_classes=2, tuning="snnk")
>>> model.load_encoder(fetch_minilm() / "model.safetensors")
>>> model(tokens)                                  # int64 (B, L), 0 pads -> (B, 2)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeFloat, PositiveInt
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.adapters.api import inject_adapters
from zoo.ops.numerics import without_padding
from zoo.support.files import CheckpointError, read_checkpoint
from zoo.support.suggest import suggestion
from zoo.support.tensors import not_held

__all__ = ["TUNINGS", "TextClassifier"]

Tuning = Literal["snnk", "houlsby", "lora", "head", "full"]

#: Tuning methods: arguments of `zoo.adapters.AdapterConfig`, or of PEFT's `LoraConfig`.
TUNINGS: dict[str, dict[str, Any]] = {
    "snnk": {"form": "vector", "num_features": 16},
    "houlsby": {"form": "houlsby", "bottleneck": 32},
    "lora": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": ["query", "value"]},
    "head": {},
    "full": {},
}

#: Entries of `tuning_args` allowed for PEFT; others of `LoraConfig` import modules or open files.
_LORA: tuple[str, ...] = ("r", "lora_alpha", "lora_dropout", "lora_bias", "target_modules", "exclude_modules", "bias")
_LORA += ("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
_LORA += ("modules_to_save",)


class TextClassifier(nn.Module):
    """A BERT-style encoder, the mean over its tokens, and a linear classifier.

    Args:
        num_classes: Number of outputs; 0 returns the pooled states.
        in_chans: Unused, for compatibility with other models.
        max_length: Maximum number of tokens.
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: Size of the encoder; the
            names are Hugging Face's.
        tuning: What is trained besides the classifier: adapters (`"snnk"`, `"houlsby"`, `"lora"`), nothing (`"head"`)
            or the whole encoder (`"full"`).
        tuning_args: Further arguments of the adapters, see :data:`TUNINGS`; `layers_to_transform` selects the layers.
        drop_rate: Dropout before the classifier.

    Raises:
        ValueError: `tuning` or an entry of `tuning_args` is unknown.
        ImportError: transformers is missing, or PEFT for `"lora"`.
    """

    def __init__(
        self,
        num_classes: int = 2,
        in_chans: int = 1,
        max_length: PositiveInt = 64,
        vocab_size: PositiveInt = 30522,
        hidden_size: PositiveInt = 384,
        num_hidden_layers: PositiveInt = 6,
        num_attention_heads: PositiveInt = 12,
        intermediate_size: PositiveInt = 1536,
        tuning: Tuning = "snnk",
        tuning_args: dict[str, Any] | None = None,
        drop_rate: NonNegativeFloat = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        try:
            from transformers import BertConfig, BertModel
        except ImportError:
            raise ImportError("texts need transformers: pip install 'kernel-zoo[text]'") from None
        self.num_classes, self.in_chans = num_classes, in_chans
        self.max_length, self.vocab_size = max_length, vocab_size
        self.num_features = self.head_hidden_size = hidden_size
        config = BertConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            intermediate_size=intermediate_size,
        )
        self.bert = BertModel(config, add_pooling_layer=False)
        self._tune(tuning, tuning_args or {})
        self.head_drop = nn.Dropout(drop_rate)
        self.classifier: nn.Module = nn.Linear(hidden_size, num_classes) if num_classes else nn.Identity()
        self.to(device=device, dtype=dtype)

    def _tune(self, tuning: str, arguments: dict[str, Any]) -> None:
        """Freeze the encoder and inject adapters, according to the method."""
        if tuning not in TUNINGS:
            raise ValueError(f"tuning={tuning!r}{suggestion(tuning, list(TUNINGS))}")
        if not TUNINGS[tuning] and arguments:
            raise ValueError(f"tuning={tuning!r} has no adapters: tuning_args must be null")
        config = {**TUNINGS[tuning], **arguments}
        if tuning == "lora":
            if unknown := [name for name in arguments if name not in _LORA]:
                raise ValueError(f"tuning_args has {unknown[0]!r}{suggestion(unknown[0], _LORA)}")
            try:
                from peft import LoraConfig, inject_adapter_in_model
            except ImportError:
                raise ImportError("tuning='lora' needs peft: pip install peft") from None
            inject_adapter_in_model(LoraConfig(**config), self.bert)
        elif tuning == "head":
            self.bert.requires_grad_(False)
        elif tuning != "full":
            inject_adapters(self.bert, config)

    @property
    def input_shape(self) -> tuple[int]:
        """Number of tokens."""
        return (self.max_length,)

    def load_encoder(self, path: str | Path) -> None:
        """Load a pretrained encoder; adapters and classifier are unchanged.

        Raises:
            CheckpointError: The file cannot be read, or has no encoder of this size; the message gives an example.
        """
        state = read_checkpoint(path)
        own = {k: v for k, v in self.bert.state_dict().items() if ".adapters." not in k and ".lora_" not in k}
        theirs = {k: k.replace(".base_layer.", ".") for k in own}  # PEFT moves the layers that it wraps
        for name, value in own.items():
            found = state.get(theirs[name])
            if getattr(found, "shape", None) != value.shape:
                raise CheckpointError(
                    f"{path} holds no encoder of this size: {theirs[name]} is missing or of another shape"
                )
        chosen = {name: state[other] for name, other in theirs.items()}
        if problem := not_held(own, chosen):
            raise CheckpointError(f"{path}: {problem}")
        self.bert.load_state_dict(chosen, strict=False)

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens (B, L), 0 is padding, to mean states (B, d)."""
        x = without_padding(x)  # skip columns that are padding in every text
        mask = x != 0
        seen = mask[:, None, None].expand(-1, 1, x.shape[1], -1)  # (B, 1, L, L): transformers inspects others
        states = self.bert(input_ids=x, attention_mask=seen).last_hidden_state
        weight = mask.unsqueeze(-1).to(states.dtype)
        return (states * weight).sum(1) / weight.sum(1).clamp(min=1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Mean states (B, d) to logits (B, num_classes)."""
        x = self.head_drop(x)
        return x if pre_logits else self.classifier(x)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, L), int64, 0 is padding, to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.classifier

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a new one; none for 0 classes."""
        self.num_classes, like = num_classes, next(self.bert.parameters())
        self.classifier = nn.Identity()
        if num_classes:
            self.classifier = nn.Linear(self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype)


# ---- registered models -------------------------------------------------------------------------------------


def _cfg(length: int, num_classes: int = 2) -> dict[str, Any]:
    """`pretrained_cfg` of a model whose weights come with the data; `input_size` is (1, 1, tokens)."""
    return {
        "num_classes": num_classes,
        "input_size": (1, 1, length),
        "pool_size": None,
        "classifier": "classifier",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2002.10957",
        "paper_name": "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression",
    }


default_cfgs = generate_default_cfgs({"minilm_l6": _cfg(64), "test_minilm": _cfg(8)})


@register_model
def minilm_l6(pretrained: bool = False, **kwargs: Any) -> TextClassifier:
    """MiniLM-L6, six layers of width 384; SNNK adapters and the classifier are trained."""
    return build_model_with_cfg(TextClassifier, "minilm_l6", pretrained, **kwargs)


@register_model
def test_minilm(pretrained: bool = False, **kwargs: Any) -> TextClassifier:  # noqa: PT028 (not a test)
    """Two layers of width 16 on eight words, for tests."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    defaults: dict[str, Any] = {"vocab_size": 8, "max_length": 8, **sizes}
    return build_model_with_cfg(TextClassifier, "test_minilm", pretrained, **{**defaults, **kwargs})
