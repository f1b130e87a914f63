"""The picture half of a model: its SigLIP tower, its projector, and how pictures join a prompt.

Facts follow the configuration classes and processors of transformers 5.23 (`models/siglip`,
`models/gemma3`, `models/paligemma`).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from beam_gemma.errors import ConfigError

Projector = Literal["pooled", "linear"]
Sight = Literal["picture", "prefix"]
Resample = Literal["bilinear", "bicubic"]


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """A tower of pictures, its projector, and the tokens around a picture in a prompt."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    """Height and width of the pictures that the tower takes, in pixels."""
    patch_size: int
    layer_norm_eps: float
    projector: Projector
    """`pooled`: means of patches, a norm and a matrix (Gemma 3); `linear`: a matrix and a bias for
    each patch (PaliGemma)."""
    num_image_tokens: int
    """Tokens of the decoder that one picture takes."""
    sight: Sight
    """Tokens with attention in both directions: those of each `picture`, within the window of a
    layer (Gemma 3), or the whole `prefix`, beyond any window (PaliGemma)."""
    first_position: int
    """Rotary position of the first token of a sequence: 0, or 1 in PaliGemma."""
    image_token_id: int
    """Token id that stands for each token of a picture."""
    begin_token: str | None
    """Control piece before the tokens of a picture, such as `<start_of_image>`; None for none."""
    end_token: str | None
    """Control piece after the tokens of a picture; None for none."""
    resample: Resample
    """Filter by which Pillow makes a picture `image_size` high and wide."""
    image_mean: tuple[float, ...]
    """Mean of each channel; a value from 0 to 1 becomes (value - mean) / std."""
    image_std: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"vision_config: expected a hidden_size that num_attention_heads "
                f"({self.num_attention_heads}) divides, got {self.hidden_size}"
            )
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"vision_config: expected an image_size that patch_size ({self.patch_size}) "
                f"divides, got {self.image_size}"
            )

    @property
    def num_patches(self) -> int:
        """Number of patches of a picture."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def head_dim(self) -> int:
        """Width of an attention head of the tower."""
        return self.hidden_size // self.num_attention_heads

    def to_json(self) -> dict[str, Any]:
        """Return a form for the manifest that `from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "VisionConfig":
        """Read what `to_json` wrote."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
        return cls(**values)
