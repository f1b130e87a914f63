"""The decoder of Gemma 1, 2 and 3 as one ragged step, in PyTorch.

Parameters carry the names of Hugging Face checkpoints without the leading `model.`; a norm's
weight is the effective one (1 + w). The formulas follow `models/gemma*/modeling_*.py` of
transformers 5.23.

Dimensions: T new tokens, R packed positions that need a head, D hidden, F feed-forward, N query
heads, H head dimension.
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

from beam_gemma.config import GemmaConfig
from beam_gemma.signature import Signature
from export.heads import Named, generate_head, score_head
from export.ops import NO_WINDOW, ragged_attention, rms_norm


class RMSNorm(nn.Module):
    """Normalization by the root mean square; the weight is float32 whatever the model's dtype."""

    def __init__(self, dim: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dtype=torch.float32))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., D], normalized."""
        return rms_norm(x, self.weight, self.epsilon)


class Rotary(nn.Module):
    """Cosines and sines of one layer type's rotary embedding."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.inv_freq = nn.Parameter(torch.empty(head_dim // 2, dtype=torch.float32))

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cos and sin, each [T, 1, H / 2], computed in float32."""
        angles = positions.to(self.inv_freq.dtype)[:, None, None] * self.inv_freq
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of the last dimension: x [T, N, H]."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


@dataclass(frozen=True)
class StepContext:
    """What every layer of one type needs to know of the step."""

    cos: Tensor
    sin: Tensor
    cu_seqlens: Tensor
    past_seqlens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    context_starts: Tensor
    last_keys: Tensor
    attention_metadata: Tensor | None


class Attention(nn.Module):
    """Grouped-query attention over the paged cache."""

    def __init__(self, config: GemmaConfig, layer_type: str, layout: str) -> None:
        super().__init__()
        self.config = config
        self.window = config.window(layer_type) or NO_WINDOW
        self.layout = layout
        hidden, dim = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(hidden, heads * dim, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * dim, bias=False)
        self.o_proj = nn.Linear(heads * dim, hidden, bias=False)
        if config.has_qk_norm:
            self.q_norm = RMSNorm(dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(dim, config.rms_norm_eps)

    def forward(
        self, x: Tensor, key_cache: Tensor, value_cache: Tensor, step: StepContext
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the attention output [T, D] and the updated caches."""
        config = self.config
        query = self._heads(self.q_proj(x), config.num_attention_heads, "q_norm", step)
        key = self._heads(self.k_proj(x), config.num_key_value_heads, "k_norm", step)
        output, key_cache, value_cache = ragged_attention(
            query,
            key,
            self.v_proj(x),
            key_cache,
            value_cache,
            step.cu_seqlens,
            step.past_seqlens,
            step.block_table,
            step.slot_mapping,
            step.context_starts,
            step.last_keys,
            config.num_attention_heads,
            config.num_key_value_heads,
            self.window,
            config.attention_scale,
            config.attn_logit_softcapping or 0.0,
            self.layout,
            step.attention_metadata,
        )
        return self.o_proj(output), key_cache, value_cache

    def _heads(self, x: Tensor, num_heads: int, norm: str, step: StepContext) -> Tensor:
        """Normalize and rotate each head of x [T, N * H]."""
        heads = x.view(-1, num_heads, self.config.head_dim)
        if self.config.has_qk_norm:
            heads = getattr(self, norm)(heads)
        return rotate(heads, step.cos, step.sin).reshape(x.shape)


class FeedForward(nn.Module):
    """GeGLU with the tanh approximation of GELU."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        hidden, wide = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, wide, bias=False)
        self.up_proj = nn.Linear(hidden, wide, bias=False)
        self.down_proj = nn.Linear(wide, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return x [T, D] through F and back."""
        gate = nn.functional.gelu(self.gate_proj(x), approximate="tanh")
        return self.down_proj(gate * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each normalized before, and after from Gemma 2 on.

    `post_attention_layernorm` is the norm *before* the feed-forward in Gemma 1 and the one *after*
    attention from Gemma 2 on: the checkpoints' names, kept.
    """

    def __init__(self, config: GemmaConfig, layer_type: str, layout: str) -> None:
        super().__init__()
        dim, epsilon = config.hidden_size, config.rms_norm_eps
        self.has_post_norms = config.has_post_norms
        self.self_attn = Attention(config, layer_type, layout)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(dim, epsilon)
        self.post_attention_layernorm = RMSNorm(dim, epsilon)
        if self.has_post_norms:
            self.pre_feedforward_layernorm = RMSNorm(dim, epsilon)
            self.post_feedforward_layernorm = RMSNorm(dim, epsilon)

    def forward(
        self, x: Tensor, key_cache: Tensor, value_cache: Tensor, step: StepContext
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the residual stream [T, D] and the updated caches."""
        attended, key_cache, value_cache = self.self_attn(
            self.input_layernorm(x), key_cache, value_cache, step
        )
        if not self.has_post_norms:
            x = x + attended
            return x + self.mlp(self.post_attention_layernorm(x)), key_cache, value_cache
        x = x + self.post_attention_layernorm(attended)
        wide = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(wide), key_cache, value_cache


class GemmaDecoder(nn.Module):
    """One ragged step of a Gemma decoder, with the head that the signature names."""

    def __init__(self, config: GemmaConfig, signature: Signature) -> None:
        super().__init__()
        self.config = config
        self.signature = signature
        # Rounded to the model's dtype, as the reference does.
        round_to = ml_dtypes.bfloat16 if signature.dtype == "bfloat16" else np.float32
        self.embedding_factor = float(round_to(config.hidden_size**0.5))
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer_type, signature.device) for layer_type in config.layer_types
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = nn.ModuleDict({group: Rotary(config.head_dim) for group in config.groups})

    def forward(self, step: Named, state: Named) -> tuple[Named, Named]:
        """Run one step; names are those of `beam_gemma.signature`.

        Args:
            step: `Signature.step_inputs` by name.
            state: `Signature.state_tensors` by input name.

        Returns:
            `Signature.outputs` by name, and the updated state by input name.
        """
        x = self.embed_tokens(step["input_ids"]) * self.embedding_factor
        contexts = self._contexts(step, x.dtype)
        new_state: Named = {}
        for i, layer in enumerate(self.layers):
            context = contexts[self.config.layer_types[i]]
            names = (f"key_cache.{i}", f"value_cache.{i}")
            x, *caches = layer(x, state[names[0]], state[names[1]], context)
            new_state.update(zip(names, caches, strict=True))
        outputs = self._head(self.norm(x.index_select(0, step["logit_rows"])), step)
        return outputs, {name: new_state[name] for name in state}

    def _contexts(self, step: Named, dtype: torch.dtype) -> dict[str, StepContext]:
        positions = sequence_positions(step)
        contexts = {}
        for group in self.config.groups:
            cos, sin = self.rotary[group](positions, dtype)
            contexts[group] = StepContext(
                cos=cos,
                sin=sin,
                cu_seqlens=step["cu_seqlens"],
                past_seqlens=step["past_seqlens"],
                block_table=step[f"block_table.{group}"],
                slot_mapping=step[f"slot_mapping.{group}"],
                context_starts=step.get(
                    f"context_starts.{group}", torch.zeros_like(step["past_seqlens"])
                ),
                last_keys=positions.to(torch.int32),
                attention_metadata=step.get("attention_metadata"),
            )
        return contexts

    def _head(self, rows: Tensor, step: Named) -> Named:
        """Return the outputs for normalized rows [R, D]."""
        weight, probability_rows = self.embed_tokens.weight, step["probability_rows"]
        if self.signature.head == "generate":
            logits = self._softcapped(nn.functional.linear(rows, weight))
            return generate_head(logits, probability_rows, self.signature)
        # One product for each target, so that no other column of the vocabulary is computed.
        targets = rows.index_select(0, step["target_rows"])[:, None, :]
        products = targets @ weight.index_select(0, step["target_ids"])[:, :, None]
        logits = nn.functional.linear(rows.index_select(0, probability_rows), weight)
        return score_head(self._softcapped(products[:, 0, 0]), self._softcapped(logits))

    def _softcapped(self, logits: Tensor) -> Tensor:
        """Return logits in float32 or wider, capped where the model does so."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        cap = self.config.final_logit_softcapping
        return torch.tanh(logits / cap) * cap if cap else logits


def sequence_positions(step: Named) -> Tensor:
    """Return the position [T] of each packed token in its sequence, int64."""
    cu_seqlens = step["cu_seqlens"].long()
    tokens = torch.arange(step["input_ids"].shape[0])
    owner = (tokens[:, None] >= cu_seqlens[None, 1:]).sum(dim=1)
    offsets = step["past_seqlens"].long() - cu_seqlens[:-1]
    return tokens + offsets.index_select(0, owner)
