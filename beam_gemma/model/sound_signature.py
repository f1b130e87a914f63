"""The part of a graph's contract that is about sound, for the head `sound`.

Dimensions: J frames of a clip, L tokens of a clip, D hidden size.
"""

from dataclasses import dataclass

from beam_gemma.model.graph_tensors import Tensor
from beam_gemma.model.picture_signature import PictureSignature


@dataclass(frozen=True, kw_only=True, slots=True)
class SoundSignature(PictureSignature):
    """Sizes of the clips that a graph takes, beside those of pictures; 0 if it takes none."""

    num_features: int = 0
    """Mel bins, or samples, of a frame."""
    num_audio_tokens: int = 0
    """Tokens of every clip; 0 if they depend on its length."""

    def sound_inputs(self) -> tuple[Tensor, ...]:
        """Return the inputs of the head `sound`."""
        return (Tensor(name="sound_frames", dtype="float32", shape=("J", self.num_features)),)

    def sound_outputs(self, hidden_size: int, dtype: str) -> tuple[Tensor, ...]:
        """Return the outputs of the head `sound`, for a decoder of a width."""
        shape: tuple[int | str, ...] = (self.num_audio_tokens or "L", hidden_size)
        return (Tensor(name="sound_features", dtype=dtype, shape=shape),)
