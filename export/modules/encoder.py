"""The embedding model: a decoder's layers over whole packed sequences.

Pooling, dense layers and normalization follow the modules of sentence-transformers.

Dimensions: B sequences, T tokens, D hidden, W width of an embedding, N query heads, K key-value
heads, H head dimension, L padded text length.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from beam_gemma.model.config import GemmaConfig
from beam_gemma.model.embedding_config import EmbeddingConfig
from beam_gemma.model.signature import Signature
from export.modules.decoder import GemmaLayers, sequence_positions
from export.modules.heads import Named
from export.ops.reference import NO_WINDOW, packed_attention, packed_sum, padded_attention


class WholeTexts(GemmaLayers):
    """The layers over whole texts, bidirectional or causal depending on the model."""

    def states(self, step: Named) -> tuple[Tensor, Named]:
        """Return the residual stream [T, D] before the final norm, and the inputs of the step.

        On CUDA the latter have what `_masks` makes of them too.

        Args:
            step: `Signature.step_inputs` by name.
        """
        if self.signature.device == "cuda":
            step = step | _masks(step, self.config)
            attend = self._with_shared_rows(partial(self._attend_padded, step))
            return self.residual(step, step["position_ids"], attend), step
        attend = self._with_shared_rows(partial(self._attend, step))
        return self.residual(step, sequence_positions(step), attend), step

    def _with_shared_rows(self, attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return `attend` for layers that may give a query alone, to read another's keys."""
        shared: dict[int, tuple[Tensor, ...]] = {}

        def attend_or_share(layer: int, query: Tensor, *new: Tensor) -> Tensor:
            if new:
                shared[layer] = new
            return attend(layer, query, *shared[self.config.producer(layer)])

        return attend_or_share

    def _attend(self, step: Named, layer: int, *rows: Tensor) -> Tensor:
        """Attend within each text."""
        config = self.config
        kind = config.layer_types[layer]
        back, ahead = reach(config, kind)
        return packed_attention(
            *rows,
            step["cu_seqlens"],
            config.num_attention_heads,
            config.num_kv_heads_of(kind),
            back,
            ahead,
            config.attention_scale,
            config.attn_logit_softcapping or 0.0,
        )

    def _attend_padded(self, step: Named, layer: int, *rows: Tensor) -> Tensor:
        """Attend within each text, with the texts padded to one length."""
        config = self.config
        kind = config.layer_types[layer]
        return padded_attention(
            *rows,
            step[kind],
            step["rows"],
            step["token_places"],
            config.num_attention_heads,
            config.num_kv_heads_of(kind),
            config.attention_scale,
            config.attn_logit_softcapping or 0.0,
        )


class GemmaEncoder(WholeTexts):
    """One step over whole texts that makes an embedding of each."""

    def __init__(
        self, config: GemmaConfig, signature: Signature, embedding: EmbeddingConfig
    ) -> None:
        super().__init__(config, signature)
        self.embedding = embedding
        widths = (config.hidden_size, *embedding.dense_sizes)
        self.dense = nn.ModuleList(nn.Linear(*sizes, bias=False) for sizes in pairwise(widths))

    def forward(self, step: Named, state: Named) -> tuple[Named, Named]:
        """Run one step; names are those of `beam_gemma.model.signature`.

        Args:
            step: `Signature.step_inputs` by name.
            state: Empty.

        Returns:
            `Signature.outputs` by name, and the empty state.
        """
        x, step = self.states(step)
        wide = torch.promote_types(x.dtype, torch.float32)
        first = self.norm(x.index_select(0, step["cu_seqlens"][:-1]), wide)
        embedding = self._pooled(x, step, wide)
        for dense in self.dense:
            embedding = dense(embedding.to(self.embed_tokens.weight.dtype))
        embedding = embedding.to(wide)
        if self.embedding.normalize:
            # Same result as `normalize`, which would also expand the norm to the output's shape.
            norm = torch.linalg.vector_norm(embedding, dim=1, keepdim=True)
            embedding = embedding / norm.clamp(min=1e-12)
        return {"embedding": embedding, "first_state": first}, state

    def _pooled(self, x: Tensor, step: Named, dtype: torch.dtype) -> Tensor:
        """Return the pooled residual stream [B, D] of x [T, D]."""
        cu_seqlens = step["cu_seqlens"]
        if self.embedding.pooling == "lasttoken":
            return self.norm(x.index_select(0, cu_seqlens[1:] - 1), dtype)
        normed = self.norm(x, dtype)
        if self.signature.device == "cuda":
            places = nn.functional.embedding(step["rows"], normed)
            sums = torch.where(step["is_token"][:, :, None], places, 0.0).sum(dim=1)
        else:
            sums = packed_sum(normed, cu_seqlens, self.signature.max_model_len)
        return sums / (cu_seqlens[1:] - cu_seqlens[:-1])[:, None].to(sums.dtype)


def _masks(step: Named, config: GemmaConfig) -> Named:
    """Return a mask of real tokens, their packed rows, and an attention mask per layer type.

    Padding reads packed row 0 and attends to every real token of its text: a kernel may return NaN
    for a query that reaches nothing.
    """
    is_token = step["token_rows"] >= 0
    rows = step["token_rows"].clamp(min=0)
    positions = nn.functional.embedding(rows, step["position_ids"][:, None])[:, :, 0]
    distance = positions[:, None, None, :] - positions[:, None, :, None]
    masks = {}
    for group in config.groups:
        back, ahead = reach(config, group)
        near = (distance >= -back) & (distance <= ahead) | ~is_token[:, None, :, None]
        masks[group] = near & is_token[:, None, None, :]
    return {"is_token": is_token, "rows": rows, **masks}


_WINDOWS: dict[str, Callable[[int], tuple[int, int]]] = {
    "gemma3_text": lambda window: (window // 2, window // 2),
    "t5gemma": lambda window: (window, window),
    "t5gemma2": lambda window: ((window + 1) // 2 - 1, window // 2),
    "embedding_gemma2_text": lambda window: (window, window),
}
"""Positions before and after its own that a token of a two-sided model with a window attends to, as
transformers 5.23 has them: `create_bidirectional_sliding_window_mask` with half of Gemma 3's window
and with the whole one of T5Gemma and EmbeddingGemma 2, and `sliding_window_mask_function` of
T5Gemma 2."""


def reach(config: GemmaConfig, layer_type: str) -> tuple[int, int]:
    """Return the numbers of positions before and after its own that a token attends to."""
    window = config.window(layer_type)
    if window is None:
        return NO_WINDOW, NO_WINDOW if config.use_bidirectional_attention else 0
    if not config.use_bidirectional_attention:
        return window - 1, 0
    return _WINDOWS[config.model_type](window)
