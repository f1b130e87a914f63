"""The decoders of T5Gemma and T5Gemma 2, which attend to an encoder's states of a source.

T5Gemma has a second attention in each layer, over the source alone. In T5Gemma 2, one attention
reads the source and the decoder's own tokens. The states of a source are given in the step that
computes a sequence's first tokens: each layer makes keys and values of them and writes these to its
cache, where later steps find them. The formulas follow `models/t5gemma/modeling_t5gemma.py` and
`models/t5gemma2/modeling_t5gemma2.py` of transformers 5.23.

Dimensions: T new tokens, C source tokens of sequences that start in the step, D hidden, U width of
the encoder, N query heads, K key-value heads, H head dimension.
"""

from typing import Any

import torch
from torch import Tensor, nn

from beam_gemma.model.config import GemmaConfig
from beam_gemma.model.signature import CROSS, Signature
from export.modules.decoder import GemmaDecoder, owners
from export.modules.heads import Named
from export.modules.layers import Attend, Attention, Layer, RMSNorm, Rotation
from export.ops.reference import NO_WINDOW


class CrossAttention(nn.Module):
    """Attention over the source alone: keys and values have no position."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        assert config.cross_attention_hidden_size is not None
        hidden, source = config.hidden_size, config.cross_attention_hidden_size
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(hidden, queries, bias=False)
        self.k_proj = nn.Linear(source, keys, bias=False)
        self.v_proj = nn.Linear(source, keys, bias=False)
        self.o_proj = nn.Linear(queries, hidden, bias=False)

    def forward(self, x: Tensor, attend: Attend, source: Tensor) -> Tensor:
        """Return the attention output [T, D] of x [T, D] over sources, of which C are new."""
        rows = self.q_proj(x), self.k_proj(source), self.v_proj(source)
        return self.o_proj(attend(*rows, group=CROSS))


class CrossLayer(Layer):
    """A layer of T5Gemma's decoder: attention, attention over the source, feed-forward."""

    def __init__(self, config: GemmaConfig, layer: int, inner: torch.dtype | None) -> None:
        super().__init__(config, layer, inner)
        self.cross_attn = CrossAttention(config)
        self.pre_cross_attn_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_cross_attn_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(  # type: ignore[override]
        self, x: Tensor, rotation: Rotation, attend: Attend, source: Tensor
    ) -> Tensor:
        """Return the residual stream [T, D]; source is [C, U]."""
        attended = self.self_attn(self.input_layernorm(x, self.inner), rotation, attend)
        x = x + self.post_attention_layernorm(attended, x.dtype)
        crossed = self.cross_attn(self.pre_cross_attn_layernorm(x, self.inner), attend, source)
        return self.fed_forward(x + self.post_cross_attn_layernorm(crossed, x.dtype))


class MergedAttention(Attention):
    """Attention over the source and the decoder's own tokens.

    The source's keys are normalized as the others, but not rotated.
    """

    def forward(  # type: ignore[override]
        self, x: Tensor, rotation: Rotation, attend: Attend, source: Tensor
    ) -> Tensor:
        """Return the attention output [T, D] of x [T, D] over sources, of which C are new."""
        query = self._heads(self.q_proj(x), self.num_heads, "q_norm", rotation)
        # One product for both, since a step of few tokens costs what reading the weights costs.
        rows = torch.cat([x, source])
        keys = self._heads(self.k_proj(rows), self.num_kv_heads, "k_norm", _not_rotated)
        own, others = keys[: x.shape[0]], keys[x.shape[0] :]
        key = torch.cat([rotation(own, self.num_kv_heads), others])
        return self.o_proj(attend(query, key, self.v_proj(rows)))


class MergedLayer(Layer):
    """A layer of T5Gemma 2's decoder: attention and feed-forward."""

    def __init__(self, config: GemmaConfig, layer: int, inner: torch.dtype | None) -> None:
        super().__init__(config, layer, inner)
        self.self_attn = MergedAttention(config, layer)

    def forward(  # type: ignore[override]
        self, x: Tensor, rotation: Rotation, attend: Attend, source: Tensor
    ) -> Tensor:
        """Return the residual stream [T, D]; source is [C, U]."""
        attended = self.self_attn(self.input_layernorm(x, self.inner), rotation, attend, source)
        return self.fed_forward(x + self.post_attention_layernorm(attended, x.dtype))


class SourceDecoder(GemmaDecoder):
    """One ragged step of a decoder whose sequences have a source."""

    def __init__(self, config: GemmaConfig, signature: Signature) -> None:
        super().__init__(config, signature)
        self.states = {state.group: state for state in signature.paged_states}

    def layer(self, layer: int) -> nn.Module:
        """Return a new layer."""
        kind = MergedLayer if self.config.merges_attention else CrossLayer
        return kind(self.config, layer, self.inner)

    def sources(self, step: Named) -> tuple[Any, ...]:
        """Return what layers take of a step's sources: the states of those that start in it."""
        return (step["source_states"],)

    def _reach(self, step: Named, positions: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the first and last cell of its sequence that each token reaches, for each group.

        In a group that holds both, the source's cells come first, and the tokens of a window go
        round behind them. A token then reaches all cells up to its own, or all that there are.
        """
        reach = super()._reach(step, positions)
        num_source = step["source_seqlens"].index_select(0, owners(step))  # [T]
        own = positions.to(torch.int32)
        everything = own - NO_WINDOW
        for group, state in self.states.items():
            if state.holds == "source":
                reach[group] = everything, num_source - 1
            elif state.holds == "both":
                last = own.clamp(max=(state.sliding_window or NO_WINDOW) - 1)
                reach[group] = everything, num_source + last
        return reach

    def _cache_names(self, group: str, layer: int) -> tuple[str, str]:
        return self.states[group].names(layer)

    def _slots(self, step: Named, group: str) -> Tensor:
        holds = self.states[group].holds
        if holds == "target":
            return step[f"slot_mapping.{group}"]
        sources = step[f"source_slots.{group}"]
        return sources if holds == "source" else torch.cat([step[f"slot_mapping.{group}"], sources])

    def _window(self, group: str) -> int | None:
        state = self.states[group]
        return state.sliding_window if state.holds == "target" else None


def _not_rotated(x: Tensor, num_heads: int) -> Tensor:
    del num_heads
    return x
