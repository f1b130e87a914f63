"""The layers of Gemma 1, 2 and 3 in PyTorch, and the decoder as one ragged step.

Parameters have the names of Hugging Face checkpoints without the leading `model.`; a norm's
weight is the effective one (1 + w). The formulas follow `models/gemma*/modeling_*.py` of
transformers 5.23.

Dimensions: T new tokens, R packed positions that need a head, D hidden, F feed-forward, N query
heads, K key-value heads, H head dimension.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

from beam_gemma.model.config import GemmaConfig
from beam_gemma.model.graph_tensors import cache_names
from beam_gemma.model.signature import Signature
from beam_gemma.model.vision_config import VisionConfig
from export.modules.heads import Named, generate_head, score_head
from export.modules.token_choice import choosing_head
from export.ops.reference import NO_WINDOW, ragged_attention, rms_norm, rotate, rotate_heads
from export.ops.span_attention import span_attention


class RMSNorm(nn.Module):
    """Root mean square normalization; the weight is float32 for every model dtype."""

    def __init__(self, dim: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dtype=torch.float32))
        self.epsilon = epsilon

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return the normalized x [..., D] in `dtype`, by default the dtype of x."""
        return rms_norm(x, self.weight, self.epsilon, dtype or x.dtype)


PACKET = 8
"""ONNX Runtime computes cosines and sines in packets of at most so many numbers, and what is left
at the end of a tensor by other code, whose last bits differ."""


class Rotary(nn.Module):
    """Cosines and sines of one layer type's rotary embedding."""

    def __init__(self, rotary_dim: int) -> None:
        super().__init__()
        self.inv_freq = nn.Parameter(torch.empty(rotary_dim // 2, dtype=torch.float32))

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cos and sin of half of the channels that turn, each [T, 1, H / 2], in float32."""
        angles = positions.to(self.inv_freq.dtype)[:, None, None] * self.inv_freq
        width = len(self.inv_freq)
        if width % PACKET:  # no token may be the one at the end whose packet is not full
            angles = nn.functional.pad(angles, (0, -width % PACKET))
            cos, sin = angles.cos()[:, :, :width], angles.sin()[:, :, :width]
            return cos.to(dtype), sin.to(dtype)
        return angles.cos().to(dtype), angles.sin().to(dtype)


Rotation = Callable[[Tensor, int], Tensor]
"""Function of x [T, N * H] and N that rotates each head by its token's position."""
Attend = Callable[..., Tensor]
"""Function of rotated query [T, N * H], rotated key and value [T, K * H]; returns [T, N * H]. The
keyword `group` names other caches than those of the layer's type."""


class Attention(nn.Module):
    """Grouped-query attention; the caller's `attend` stores and reads the keys and values."""

    def __init__(self, config: GemmaConfig, *, bias: bool = False) -> None:
        """Make the matrices; `bias` adds one to the output, which RecurrentGemma has."""
        super().__init__()
        self.config = config
        hidden, dim = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(hidden, heads * dim, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * dim, bias=False)
        self.o_proj = nn.Linear(heads * dim, hidden, bias=bias)
        if config.has_qk_norm:
            self.q_norm = RMSNorm(dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(dim, config.rms_norm_eps)

    def forward(self, x: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        """Return the attention output [T, D]."""
        config = self.config
        query = self._heads(self.q_proj(x), config.num_attention_heads, "q_norm", rotation)
        key = self._heads(self.k_proj(x), config.num_key_value_heads, "k_norm", rotation)
        return self.o_proj(attend(query, key, self.v_proj(x)))

    def _heads(self, x: Tensor, num_heads: int, norm: str, rotation: Rotation) -> Tensor:
        """Normalize and rotate each head of x [T, N * H]."""
        heads = x.view(-1, num_heads, self.config.head_dim)
        if self.config.has_qk_norm:
            heads = getattr(self, norm)(heads)
        return rotation(heads.reshape(x.shape), num_heads)


class FeedForward(nn.Module):
    """GeGLU with the tanh approximation of GELU."""

    def __init__(self, config: GemmaConfig, *, bias: bool = False) -> None:
        """Make the matrices, with biases where the model has them."""
        super().__init__()
        hidden, wide = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, wide, bias=bias)
        self.up_proj = nn.Linear(hidden, wide, bias=bias)
        self.down_proj = nn.Linear(wide, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the feed-forward output [T, D] of x [T, D]."""
        gate = nn.functional.gelu(self.gate_proj(x), approximate="tanh")
        return self.down_proj(gate * self.up_proj(x))


class Layer(nn.Module):
    """Attention and feed-forward, with a norm before each and, from Gemma 2 on, after each.

    As in the checkpoints, `post_attention_layernorm` names the norm *before* the feed-forward in
    Gemma 1 and the norm *after* attention from Gemma 2 on.

    The residual stream may have a wider dtype than `inner`, in which attention and feed-forward
    compute; the norms convert between the two.
    """

    def __init__(self, config: GemmaConfig, inner: torch.dtype | None) -> None:
        super().__init__()
        self.inner = inner
        dim, epsilon = config.hidden_size, config.rms_norm_eps
        self.has_post_norms = config.has_post_norms
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(dim, epsilon)
        self.post_attention_layernorm = RMSNorm(dim, epsilon)
        if self.has_post_norms:
            self.pre_feedforward_layernorm = RMSNorm(dim, epsilon)
            self.post_feedforward_layernorm = RMSNorm(dim, epsilon)

    def forward(self, x: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        """Return the residual stream [T, D]."""
        attended = self.self_attn(self.input_layernorm(x, self.inner), rotation, attend)
        if not self.has_post_norms:
            x = x + attended.to(x.dtype)
            return x + self.mlp(self.post_attention_layernorm(x, self.inner)).to(x.dtype)
        return self.fed_forward(x + self.post_attention_layernorm(attended, x.dtype))

    def fed_forward(self, x: Tensor) -> Tensor:
        """Return the residual stream [T, D] after the feed-forward, with a norm on both sides."""
        wide = self.mlp(self.pre_feedforward_layernorm(x, self.inner))
        return x + self.post_feedforward_layernorm(wide, x.dtype)


class GemmaLayers(nn.Module):
    """The part shared by decoders and encoders: everything from token ids to the last layer."""

    def __init__(
        self, config: GemmaConfig, signature: Signature, vision: VisionConfig | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.signature = signature
        self.first_position = vision.first_position if vision else 0
        self.spans_keep_windows = vision is not None and vision.bidirectional == "picture"
        # Rounded to the model's dtype, as the reference does; RecurrentGemma's is always bfloat16.
        is_rounded = signature.dtype == "bfloat16" or config.lru_width is not None
        round_to = ml_dtypes.bfloat16 if is_rounded else np.float32
        self.embedding_factor = float(round_to(config.hidden_size**0.5))
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        # The residual stream of Gemma 3 exceeds 65,504, the largest float16.
        self.inner = torch.float16 if signature.dtype == "float16" else None
        if config.eoi_token_id is not None:
            self.eoi_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.layers = nn.ModuleList(self.layer(kind) for kind in config.layer_types)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = nn.ModuleDict({group: Rotary(config.rotary_dim) for group in config.groups})

    def layer(self, layer_type: str) -> nn.Module:
        """Return a new layer of a type; models with other layers than `Layer` override it."""
        del layer_type
        return Layer(self.config, self.inner)

    def sources(self, step: Named) -> tuple[Any, ...]:
        """Return what layers take of a step's sources beside the others' arguments."""
        del step
        return ()

    def residual(self, step: Named, positions: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        """Return the residual stream [T, D] after the last layer, before the final norm.

        Args:
            step: `Signature.step_inputs` by name.
            positions: [T], each token's position in its sequence.
            attend: Function of a layer number and the arguments of `Attend`.
        """
        x = self.embed_tokens(step["input_ids"])
        x = (x if self.inner is None else x.float()) * self.embedding_factor
        if self.config.eoi_token_id is not None:
            is_end = (step["input_ids"] == self.config.eoi_token_id)[:, None]
            x = torch.where(is_end, self.eoi_embedding.to(x.dtype), x)
        if "inputs_embeds" in step:
            x = _with_pictures(x, step)
        rotary_positions = positions + self.first_position if self.first_position else positions
        rotations = {g: self._rotation(g, rotary_positions) for g in self.config.groups}
        sources = self.sources(step)
        for i, layer in enumerate(self.layers):
            x = layer(x, rotations.get(self.config.layer_types[i]), partial(attend, i), *sources)
        return x

    def _rotation(self, group: str, positions: Tensor) -> Rotation:
        cos, sin = self.rotary[group](positions, self.embed_tokens.weight.dtype)
        if self.signature.device == "cuda":
            return lambda x, num_heads: rotate(x, cos, sin, num_heads)
        return lambda x, num_heads: rotate_heads(
            x.view(-1, num_heads, self.config.head_dim), cos, sin
        ).reshape(x.shape)


class GemmaDecoder(GemmaLayers):
    """One ragged step of a Gemma decoder, with the head that the signature names."""

    def __init__(
        self, config: GemmaConfig, signature: Signature, vision: VisionConfig | None = None
    ) -> None:
        super().__init__(config, signature, vision)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """Matrix [V, D] of the head: the embedding, unless the two are not tied."""
        return (self.embed_tokens if self.config.tie_word_embeddings else self.lm_head).weight

    def forward(self, step: Named, state: Named) -> tuple[Named, Named]:
        """Run one step; names are those of `beam_gemma.model.signature`.

        Args:
            step: `Signature.step_inputs` by name.
            state: `Signature.state_tensors` by input name.

        Returns:
            `Signature.outputs` by name, and the updated state by input name.
        """
        positions = step["position_ids"] if "position_ids" in step else sequence_positions(step)
        new_state = dict(state)
        if "span_rows" in step:
            step = step | _of_spans(step)
        attend = partial(self._attend, step, self._reach(step, positions), new_state)
        if self.signature.chooses:
            step = step | {"input_ids": _token_ids(step, state["next_ids"])}
        x = self.residual(step, positions, attend)
        rows = self.norm(x.index_select(0, step["logit_rows"]), self.inner)
        return self._head(rows, step, new_state), new_state

    def _reach(self, step: Named, positions: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the first and last position that each token reaches, for each layer type."""
        own = positions.to(torch.int32)
        last = step.get("span_ends", own)
        reach = {}
        for group in self.config.groups:
            window = self.config.window(group)
            first = own - ((window or NO_WINDOW) - 1)
            reach[group] = (step.get("first_keys", first) if window else first), last
        return reach

    def _attend(
        self,
        step: Named,
        reach: dict[str, tuple[Tensor, Tensor]],
        state: Named,
        layer: int,
        *rows: Tensor,
        group: str | None = None,
    ) -> Tensor:
        """Write the new tokens to a layer's cache and attend over it.

        Args:
            step: The step's inputs.
            reach: First and last position that each token reaches, for each group.
            state: The caches by name, which are replaced.
            layer: Number of the layer.
            rows: Query, key and value.
            group: Group of the caches; by default that of the layer's type.
        """
        config = self.config
        group = group or config.layer_types[layer]
        names = self._cache_names(group, layer)
        output, *caches = ragged_attention(
            *rows,
            *(state[name] for name in names),
            step["cu_seqlens"],
            step["past_seqlens"],
            step[f"block_table.{group}"],
            self._slots(step, group),
            step.get(f"context_starts.{group}", torch.zeros_like(step["past_seqlens"])),
            *reach[group],
            config.num_attention_heads,
            config.num_key_value_heads,
            self._window(group) or NO_WINDOW,
            config.attention_scale,
            config.attn_logit_softcapping or 0.0,
            self.signature.device,
            step.get("attention_metadata"),
        )
        state.update(zip(names, caches, strict=True))
        return self._attend_in_spans(step, group, output, *rows[:2], *caches)

    def _cache_names(self, group: str, layer: int) -> tuple[str, str]:
        """Return the names of a layer's caches in a group."""
        del group
        return cache_names(layer)

    def _slots(self, step: Named, group: str) -> Tensor:
        """Return the cache slot of each row of key and value that a step writes to a group."""
        return step[f"slot_mapping.{group}"]

    def _window(self, group: str) -> int | None:
        """Return how many cells a query of a group reaches, the last one included; or None."""
        return self.config.window(group)

    def _attend_in_spans(self, step: Named, group: str, output: Tensor, *rows: Tensor) -> Tensor:
        """Return the attention output, with two-sided attention inside spans where they are input.

        Args:
            step: The step's inputs, and what `_of_spans` made of them.
            group: The layer's group.
            output: [T, N * H], what each token attended to causally.
            rows: Query, key, key cache and value cache.
        """
        if "span_rows" not in step:
            return output
        config = self.config
        return span_attention(
            output,
            *rows,
            step["span_cu_seqlens"],
            step["span_past_seqlens"],
            step[f"span_block_table.{group}"],
            step["span_rows"],
            step["no_slots"],
            step["is_inside"],
            step["places"],
            config.num_attention_heads,
            config.num_key_value_heads,
            (config.window(group) if self.spans_keep_windows else None) or NO_WINDOW,
            config.attention_scale,
            config.attn_logit_softcapping or 0.0,
            step["attention_metadata"],
        )

    def _head(self, rows: Tensor, step: Named, state: Named) -> Named:
        """Return the outputs for normalized rows [R, D]; store chosen tokens in the state."""
        signature = self.signature
        weight, probability_rows = self.head_weight, step["probability_rows"]
        poison = torch.zeros(())
        if signature.device == "cuda":
            rows, poison = _split_poison(rows)
        if signature.head == "score":
            return self._scores(rows, poison, step)
        logits = nn.functional.linear(rows, weight)
        if not signature.chooses:
            return generate_head(self._softcapped(logits), probability_rows, signature)
        outputs, state["next_ids"] = choosing_head(
            logits, poison, self._softcapped, step, state["next_ids"], signature
        )
        return outputs

    def _scores(self, rows: Tensor, poison: Tensor, step: Named) -> Named:
        """Return the outputs of the `score` head for normalized rows [R, D] and poison [R]."""
        weight, probability_rows = self.head_weight, step["probability_rows"]
        # One product per target avoids computing the other columns of the vocabulary.
        targets = rows.index_select(0, step["target_rows"])[:, None, :]
        products = targets @ weight.index_select(0, step["target_ids"])[:, :, None]
        logits = nn.functional.linear(rows.index_select(0, probability_rows), weight)
        target_logits = self._softcapped(products[:, 0, 0])
        outputs = score_head(target_logits, self._softcapped(logits), self.signature.device)
        if self.signature.device == "cuda":
            outputs["top_logits"] += poison.index_select(0, probability_rows)
            outputs["target_logits"] += poison.index_select(0, step["target_rows"])
        return outputs

    def _softcapped(self, logits: Tensor) -> Tensor:
        """Return the logits in float32 or wider, soft-capped if the model has a cap."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        cap = self.config.final_logit_softcapping
        return torch.tanh(logits / cap) * cap if cap else logits


def _token_ids(step: Named, next_ids: Tensor) -> Tensor:
    """Return the packed tokens [T]: given ids, or ids chosen by the previous step."""
    slots = step["token_slots"]
    chosen = next_ids.index_select(0, slots.clamp(min=0))
    return torch.where(slots >= 0, chosen, step["input_ids"])


def _with_pictures(x: Tensor, step: Named) -> Tensor:
    """Return x [T, D] with the embeddings of pictures in place of those of their token ids."""
    rows = step["embeds_rows"]
    given = step["inputs_embeds"].index_select(0, rows.clamp(min=0)).to(x.dtype)
    return torch.where((rows >= 0)[:, None], given, x)


def _of_spans(step: Named) -> Named:
    """Return what all layers take of a step's spans, by the names of `span_attention`."""
    places, rows = step["span_places"], step["span_rows"]
    return {
        "is_inside": (places >= 0)[:, None],
        "places": places.clamp(min=0),
        "no_slots": rows.clamp(max=-1).to(torch.int32),
    }


def _split_poison(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows [R, D] with non-finite rows zeroed, and a marker [R]: NaN for those, else 0.

    This keeps NaN out of sort kernels and out of products with other rows.
    """
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    poison = (wide - wide).sum(dim=1)
    return torch.where(poison.isnan()[:, None], 0.0, rows), poison


def sequence_positions(step: Named) -> Tensor:
    """Return the position [T] of each packed token in its sequence, int64."""
    cu_seqlens = step["cu_seqlens"].long()
    tokens = torch.arange(step["input_ids"].shape[0])
    offsets = step.get("past_seqlens", torch.zeros(1)).long() - cu_seqlens[:-1]
    return tokens + offsets.index_select(0, owners(step))


def owners(step: Named) -> Tensor:
    """Return the sequence [T] of each packed token, int64."""
    tokens = torch.arange(step["input_ids"].shape[0])
    return (tokens[:, None] >= step["cu_seqlens"].long()[None, 1:]).sum(dim=1)
