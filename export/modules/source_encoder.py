"""The encoder of an encoder-decoder: states of whole sources, or an embedding of each.

Its parameters have the prefix `encoder.`, beside those of the decoder, which have none. What both
share in T5Gemma 2, the embedding and that of a picture's end, has the decoder's name in files.
"""

from torch import nn

from beam_gemma.model.config import GemmaConfig
from beam_gemma.model.embedding_config import EmbeddingConfig
from beam_gemma.model.signature import Signature
from export.modules.encoder import GemmaEncoder, WholeTexts
from export.modules.heads import Named

PREFIX = "encoder."
SHARED = ("embed_tokens.weight", "eoi_embedding")
"""Parameters of T5Gemma 2 that the encoder shares with the decoder."""


class _OfEncoder(nn.Module):
    """A module whose parameters are those of an encoder."""

    def __init__(self, encoder: WholeTexts) -> None:
        super().__init__()
        self.encoder = encoder

    def stored_name(self, name: str) -> str:
        """Return the name that a checkpoint has for a parameter."""
        own = name.removeprefix(PREFIX)
        is_shared = self.encoder.config.model_type == "t5gemma2" and own in SHARED
        return own if is_shared else name


class SourceEncoder(_OfEncoder):
    """One step over whole sources."""

    def __init__(self, config: GemmaConfig, signature: Signature) -> None:
        super().__init__(WholeTexts(config, signature))

    def forward(self, step: Named, state: Named) -> tuple[Named, Named]:
        """Run one step; names are those of `beam_gemma.model.signature`.

        Args:
            step: `Signature.step_inputs` by name.
            state: Empty.

        Returns:
            `source_states`, and the empty state.
        """
        x, _ = self.encoder.states(step)
        dtype = self.encoder.embed_tokens.weight.dtype
        return {"source_states": self.encoder.norm(x, dtype)}, state


class SourceEmbedder(_OfEncoder):
    """One step over whole texts that makes an embedding of each."""

    def __init__(
        self, config: GemmaConfig, signature: Signature, embedding: EmbeddingConfig
    ) -> None:
        super().__init__(GemmaEncoder(config, signature, embedding))

    def forward(self, step: Named, state: Named) -> tuple[Named, Named]:
        """Run one step; see `GemmaEncoder.forward`."""
        outputs: tuple[Named, Named] = self.encoder(step, state)
        return outputs
