"""The sound half of a model: its tower, and how clips of sound join a prompt.

Facts follow the configuration classes, feature extractors and processors of transformers 5.23
(`models/gemma4`, `models/gemma4_unified`, `models/gemma3n`).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from beam_gemma.errors import ConfigError

Encoder = Literal["conformer", "usm", "frames"]

MAX_SAMPLES = 480_000
"""Most samples of a clip, 30 seconds: the `max_length` of the feature extractors."""
PAD_TO_MULTIPLE_OF = 128
"""Zeros are added behind a clip until a multiple of so many samples, before it is cut in frames."""
SUBSAMPLING = 2
"""Convolutions before the layers of a tower, of which each halves the frames."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MelConfig:
    """How samples become frames of mel bins; lengths are in samples, frequencies in Hz."""

    frame_length: int
    hop_length: int
    fft_length: int
    min_frequency: float
    max_frequency: float
    preemphasis: float
    """Share of the sample before that is subtracted from each sample; 0 for none."""
    preemphasis_htk_flavor: bool
    """True if a frame's first sample is scaled instead, as it has none before it in its frame."""
    mel_floor: float
    adds_floor: bool
    """True for log(mel + floor), as in Gemma 4; false for log(max(mel, floor)), as in Gemma 3n."""
    pads_left: int
    """Zeros before the first sample: half a frame in Gemma 4, none in Gemma 3n."""
    input_scale_factor: float
    """Factor of all samples."""
    per_bin_mean: tuple[float, ...] | None
    """What is subtracted from the logarithm of each bin; None for nothing."""
    per_bin_stddev: tuple[float, ...] | None
    """What the logarithm of each bin is then divided by; None for nothing."""

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "MelConfig":
        """Read what `SoundConfig.to_json` wrote."""
        return cls(**_with_tuples(raw))


@dataclass(frozen=True, kw_only=True, slots=True)
class SoundConfig:
    """A tower of sound, its projector, and the tokens around a clip in a prompt."""

    encoder: Encoder
    """`conformer`: the tower of Gemma 4 and EmbeddingGemma 2; `usm`: that of Gemma 3n; `frames`: no
    tower, a projection of each frame of samples (Gemma 4 12B)."""
    num_features: int
    """Mel bins, or samples, of a frame."""
    sampling_rate: int = 16_000
    """Samples of a second."""
    max_samples: int = MAX_SAMPLES
    """Most samples of a clip."""
    num_audio_tokens: int
    """Most tokens of a clip, or the tokens of every clip if `is_fixed`."""
    audio_token_id: int
    """Token id that stands for each token of a clip."""
    begin_token: str
    """Control piece before the tokens of a clip, such as `<|audio>`."""
    end_token: str | None
    """Control piece after the tokens of a clip; None in Gemma 3n, where a clip's last token is that
    piece's own embedding, which is not in the table of the text model."""
    audio_token: str
    """Control piece that chat templates write for a clip."""
    mel: MelConfig | None
    """How samples become frames; None if frames are made of the samples themselves."""
    hidden_size: int
    """Channels of the tower, or samples of a frame without one."""
    output_size: int
    """Channels of what the projector takes."""
    rms_norm_eps: float
    num_hidden_layers: int = 0
    num_attention_heads: int = 1
    subsampling_conv_channels: tuple[int, ...] = ()
    """Channels of the convolutions before the layers."""
    conv_kernel_size: int = 1
    """Tokens that the convolution in a layer sees, the last of which is its own."""
    attention_chunk_size: int = 1
    """Tokens of a block of queries, which have their keys in common."""
    attention_context_left: int = 1
    """Tokens that a token can attend to on its left, among them itself; one less in Gemma 4."""
    attention_context_right: int = 0
    """Tokens that a token can attend to on its right; one less in Gemma 4."""
    attention_logit_cap: float = 1.0
    residual_weight: float = 1.0
    """Factor of what a feed-forward part adds."""
    gradient_clipping: float = 1.0
    """Largest magnitude that goes into norms."""
    use_clipped_linears: bool = False
    """True if products have bounds for what goes in and comes out."""
    group_norm_eps: float = 1e-3
    """What Gemma 3n adds to the variance in the norms of its convolutions."""
    reduction_factor: int = 1
    """Of so many tokens of the last layer one goes on."""
    vocab_size: int = 0
    """Token ids with an embedding in the projector: those of sound in Gemma 3n; else 0."""

    def __post_init__(self) -> None:
        width, heads = self.hidden_size, self.num_attention_heads
        if width % heads or width % 2:
            raise ConfigError(
                f"audio_config: expected an even hidden_size that num_attention_heads ({heads}) "
                f"divides, got {width}"
            )
        is_conformer = self.encoder == "conformer"
        if is_conformer and self.subsampled(self.num_features) != self._bins_of_projection:
            raise ConfigError(
                "audio_config: expected as many subsampling_conv_channels in the first convolution "
                f"as feature_size, {self.num_features}, got {self.subsampling_conv_channels}"
            )

    @property
    def is_fixed(self) -> bool:
        """Whether every clip takes as many tokens."""
        return self.encoder == "usm"

    @property
    def surround(self) -> str:
        """Text before `begin_token` and behind the end of a clip."""
        return "\n\n" if self.encoder == "usm" else ""

    @property
    def head_dim(self) -> int:
        """Width of an attention head of the tower."""
        return self.hidden_size // self.num_attention_heads

    def subsampled(self, number: int) -> int:
        """Return how many frames, or bins, the convolutions make of a number of them."""
        for _ in range(SUBSAMPLING):
            number = -(-number // 2)
        return number

    def num_frames_of(self, num_samples: int) -> int:
        """Return how many frames a clip is; 0 for a clip that is too short.

        A frame of Gemma 4 ends within the clip, with one sample more. A frame of Gemma 3n may end
        in the zeros up to a multiple of `PAD_TO_MULTIPLE_OF` samples. Source: the masks of
        `Gemma4AudioFeatureExtractor` and `Gemma3nAudioFeatureExtractor`.

        Args:
            num_samples: Samples of the clip, at most `max_samples`.
        """
        if self.mel is None:
            return -(-num_samples // self.num_features)
        if self.encoder == "usm":
            num_samples = -(-num_samples // PAD_TO_MULTIPLE_OF) * PAD_TO_MULTIPLE_OF
        free = self.mel.pads_left + num_samples - self.mel.frame_length - 1
        return max(0, free // self.mel.hop_length + 1)

    def tokens_of(self, num_samples: int) -> int:
        """Return how many tokens of the decoder a clip is; 0 for a clip that is too short.

        Args:
            num_samples: Samples of the clip, at most `max_samples`.
        """
        return self.tokens_of_frames(self.num_frames_of(num_samples))

    def num_tower_tokens(self, num_frames: int) -> int:
        """Return how many tokens the tower makes of frames."""
        return -(-self.subsampled(num_frames) // self.reduction_factor)

    def tokens_of_frames(self, num_frames: int) -> int:
        """Return how many tokens of the decoder a number of frames is."""
        if self.is_fixed:
            return self.num_audio_tokens if num_frames else 0
        return num_frames if self.encoder == "frames" else self.subsampled(num_frames)

    @property
    def _bins_of_projection(self) -> int:
        """Bins that the projection behind the convolutions expects in Gemma 4."""
        return self.subsampling_conv_channels[0] // 2**SUBSAMPLING

    def to_json(self) -> dict[str, Any]:
        """Return a form for the manifest that `from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "SoundConfig":
        """Read what `to_json` wrote."""
        mel = None if raw["mel"] is None else MelConfig.from_json(raw["mel"])
        return cls(**_with_tuples(raw) | {"mel": mel})


def _with_tuples(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in raw.items()}
