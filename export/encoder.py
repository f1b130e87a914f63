"""Texts to embeddings: the same layers as a decoder's, over whole packed sequences.

Pooling, dense layers and normalization follow the modules of sentence-transformers.

Dimensions: B sequences, T tokens, D hidden, W width of an embedding, N query heads, K key-value
heads, H head dimension.
"""

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from beam_gemma.config import GemmaConfig
from beam_gemma.embedding_config import EmbeddingConfig
from beam_gemma.signature import Signature
from export.heads import Named
from export.model import GemmaLayers, sequence_positions
from export.ops import NO_WINDOW, packed_attention, packed_sum


class GemmaEncoder(GemmaLayers):
    """One step over whole texts, two-sided or causal as the model is."""

    def __init__(
        self, config: GemmaConfig, signature: Signature, embedding: EmbeddingConfig
    ) -> None:
        super().__init__(config, signature)
        self.embedding = embedding
        widths = (config.hidden_size, *embedding.dense_sizes)
        self.dense = nn.ModuleList(nn.Linear(*sizes, bias=False) for sizes in pairwise(widths))

    def forward(self, step: Named, state: Named) -> tuple[Named, Named]:
        """Run one step; names are those of `beam_gemma.signature`.

        Args:
            step: `Signature.step_inputs` by name.
            state: Empty.

        Returns:
            `Signature.outputs` by name, and the empty state.
        """
        x = self.residual(step, sequence_positions(step), partial(self._attend, step))
        wide = torch.promote_types(x.dtype, torch.float32)
        first = self.norm(x.index_select(0, step["cu_seqlens"][:-1]), wide)
        embedding = self._pooled(x, step["cu_seqlens"], wide)
        for dense in self.dense:
            embedding = dense(embedding.to(self.embed_tokens.weight.dtype))
        embedding = embedding.to(wide)
        if self.embedding.normalize:
            embedding = nn.functional.normalize(embedding)
        return {"embedding": embedding, "first_state": first}, state

    def _pooled(self, x: Tensor, cu_seqlens: Tensor, dtype: torch.dtype) -> Tensor:
        """Return [B, D] of the residual stream [T, D]."""
        if self.embedding.pooling == "lasttoken":
            return self.norm(x.index_select(0, cu_seqlens[1:] - 1), dtype)
        sums = packed_sum(self.norm(x, dtype), cu_seqlens, self.signature.max_model_len)
        return sums / cu_seqlens.diff()[:, None].to(sums.dtype)

    def _attend(self, step: Named, layer: int, *rows: Tensor) -> Tensor:
        """Attend within each text."""
        config = self.config
        back, ahead = reach(config, config.layer_types[layer])
        return packed_attention(
            *rows,
            step["cu_seqlens"],
            config.num_attention_heads,
            config.num_key_value_heads,
            back,
            ahead,
            config.attention_scale,
            config.attn_logit_softcapping or 0.0,
        )


def reach(config: GemmaConfig, layer_type: str) -> tuple[int, int]:
    """Return how many positions before and after its own a token of such a layer reaches."""
    window = config.window(layer_type)
    if config.use_bidirectional_attention:
        half = NO_WINDOW if window is None else window // 2
        return half, half
    return (NO_WINDOW if window is None else window - 1), 0
