"""The decoders of T5Gemma and T5Gemma 2 for CUDA, where attention takes source tokens as rows.

The layers compute what those of `export.modules.encoder_decoder` do. Keys and values of the T new
tokens and of the C source tokens come from one product each, over rows put side by side with the
inputs of the step: ONNX Runtime's `Concat` copies sizes to the device, which a captured graph must
not do.

Dimensions: T new tokens, C source tokens of sequences that start in the step, D hidden, U width of
the encoder.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from beam_gemma.model.config import GemmaConfig
from export.modules.decoder import GemmaDecoder
from export.modules.encoder_decoder import MergedAttention, MergedLayer, SourceDecoder
from export.modules.heads import Named
from export.modules.layers import Attend, Rotation
from export.ops.source_attention import source_attention


@dataclass(frozen=True, slots=True)
class SourceRows:
    """The rows of a step's attention over sources: new tokens first, then source tokens."""

    states: Tensor
    """[T + C, U], the state of each source token; any state for new tokens."""
    is_source: Tensor
    """[T + C, 1], whether a row is a source token."""
    tokens: Tensor
    """[T + C], packed position of each new token; any valid one for source tokens."""
    rotations: dict[str, Rotation]
    """Rotation of all rows for each layer type; source tokens stay as they are."""

    def beside(self, x: Tensor) -> Tensor:
        """Return x [T, D] of the new tokens and the states of source tokens, [T + C, D]."""
        return torch.where(self.is_source, self.states, x.index_select(0, self.tokens))


class RowAttention(MergedAttention):
    """Attention over the source and the decoder's own tokens."""

    def __init__(self, config: GemmaConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.layer_type = config.layer_types[layer]

    def forward(  # type: ignore[override]
        self, x: Tensor, rotation: Rotation, attend: Attend, source: SourceRows
    ) -> Tensor:
        """Return the attention output [T, D] of x [T, D]."""
        query = self._heads(self.q_proj(x), self.num_heads, "q_norm", rotation)
        rows, rotation = source.beside(x), source.rotations[self.layer_type]
        key = self._heads(self.k_proj(rows), self.num_kv_heads, "k_norm", rotation)
        return self.o_proj(attend(query, key, self.v_proj(rows)))


class RowLayer(MergedLayer):
    """A layer of T5Gemma 2's decoder."""

    def __init__(self, config: GemmaConfig, layer: int, inner: torch.dtype | None) -> None:
        super().__init__(config, layer, inner)
        self.self_attn = RowAttention(config, layer)


class CudaSourceDecoder(SourceDecoder):
    """One ragged step of a decoder whose sequences have a source, for CUDA."""

    def layer(self, layer: int) -> nn.Module:
        """Return a new layer."""
        if self.config.merges_attention:
            return RowLayer(self.config, layer, self.inner)
        return super().layer(layer)

    def sources(self, step: Named) -> tuple[Any, ...]:
        """Return what layers take of a step's sources: the states alone, or all that rows need."""
        source_rows = step["source_rows"]
        states = step["source_states"].index_select(0, source_rows.clamp(min=0))
        if not self.config.merges_attention:
            return (states,)
        tokens = step["token_rows"].clamp(min=0)
        # A rotation at position 0 changes nothing.
        positions = torch.where(source_rows >= 0, 0, step["position_ids"].index_select(0, tokens))
        rotations = {group: self._rotation(group, positions) for group in self.config.groups}
        return (SourceRows(states, (source_rows >= 0)[:, None], tokens, rotations),)

    def _reach(self, step: Named, positions: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        return GemmaDecoder._reach(self, step, positions)

    def _attend(
        self,
        step: Named,
        reach: dict[str, tuple[Tensor, Tensor]],
        state: Named,
        layer: int,
        *rows: Tensor,
        group: str | None = None,
    ) -> Tensor:
        """Write what a step adds to a layer's cache and attend over it."""
        config = self.config
        group = group or config.layer_types[layer]
        if self.states[group].holds == "target":
            return super()._attend(step, reach, state, layer, *rows, group=group)
        names = self._cache_names(group, layer)
        output, *caches = source_attention(
            *rows,
            *(state[name] for name in names),
            step["token_cu_seqlens"],
            step[f"token_past_seqlens.{group}"],
            step[f"token_block_table.{group}"],
            step[f"token_slot_mapping.{group}"],
            step["token_rows"].clamp(min=0),
            step["token_places"],
            config.num_attention_heads,
            config.num_key_value_heads,
            config.attention_scale,
            config.attn_logit_softcapping or 0.0,
            step["attention_metadata"],
        )
        state.update(zip(names, caches, strict=True))
        return output
