"""How a Gemma hears: frames of one clip to embeddings that take the place of those of tokens.

Parameters have the names of published files, `audio_tower` and `embed_audio`. The formulas follow
`models/gemma4`, `models/gemma4_unified` and `models/gemma3n` of transformers 5.23.

Dimensions: J frames of a clip, M features of a frame, C channels of the tower, L tokens of a clip,
D hidden size of the decoder.
"""

import torch
from torch import Tensor, nn

from beam_gemma.model.signature import Signature
from beam_gemma.model.sound_config import SoundConfig
from export.modules.conformer import Tower
from export.modules.gemma4_vision import Embedder
from export.modules.heads import Named
from export.modules.layers import RMSNorm, unit_norm


class TokenEmbedder(nn.Module):
    """The projector of a Gemma 3n, which makes every clip as many rows.

    Behind the rows of the tower come those of the last token id of sound, up to a fixed number, and
    one more of the first id, `<end_of_audio>`, which the text model's table does not embed.
    """

    def __init__(self, config: SoundConfig, hidden_size: int) -> None:
        super().__init__()
        width, self.epsilon = config.hidden_size, config.rms_norm_eps
        self.num_rows = config.num_audio_tokens
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.hard_embedding_norm, self.soft_embedding_norm = (
            RMSNorm(width, self.epsilon) for _ in range(2)
        )
        self.embedding_projection = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return rows of the decoder's width, as many for every x [L, C]."""
        table = self.embedding.weight
        heard = self._projected(self.soft_embedding_norm(x, table.dtype))
        end, filling = (
            self._projected(self.hard_embedding_norm(row)) for row in (table[:1], table[-1:])
        )
        most = self.num_rows - 1
        rows = torch.cat([heard, filling.expand(most, -1)])[:most]
        return torch.cat([rows, end])

    def _projected(self, x: Tensor) -> Tensor:
        return unit_norm(self.embedding_projection(x), self.epsilon, x.dtype)


class SoundModel(nn.Module):
    """A clip to embeddings that take the place of those of tokens."""

    def __init__(self, config: SoundConfig, signature: Signature) -> None:
        super().__init__()
        hidden_size = signature.hidden_size
        if config.encoder != "frames":
            self.audio_tower = Tower(config)
        self.embed_audio = (
            TokenEmbedder(config, hidden_size)
            if config.encoder == "usm"
            else Embedder(config.output_size, config.rms_norm_eps, hidden_size)
        )

    def forward(self, step: Named, state: Named) -> tuple[Named, Named]:
        """Compute features; names are those of `beam_gemma.model.signature`.

        Args:
            step: `sound_frames` of one clip.
            state: Empty.

        Returns:
            `sound_features`, and the empty state.
        """
        x = step["sound_frames"]
        if hasattr(self, "audio_tower"):
            x = self.audio_tower(x)
        return {"sound_features": self.embed_audio(x)}, state
