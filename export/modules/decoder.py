"""A stack of layers in PyTorch, and the decoder as one ragged step.

Dimensions: T new tokens, R packed positions that need a head, B sequences, L layers, D hidden, N
query heads, K key-value heads, H head dimension, P width of per-layer embeddings.
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
from export.modules.altup import AltUpLayer, merged, spread
from export.modules.gemma4 import Gemma4Layer
from export.modules.heads import Named, generate_head, score_head, suppressed
from export.modules.layers import Layer, RMSNorm, Rotary, Rotation
from export.modules.per_layer import Table, per_layer_inputs
from export.modules.token_choice import choosing_head
from export.ops.reference import NO_WINDOW, ragged_attention, rotate, rotate_heads
from export.ops.span_attention import span_attention


class GemmaLayers(nn.Module):
    """The part shared by decoders and encoders: everything from token ids to the last layer."""

    def __init__(
        self, config: GemmaConfig, signature: Signature, vision: VisionConfig | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.signature = signature
        self.first_position = vision.first_position if vision else 0
        self.spans_keep_windows = vision is not None and vision.bidirectional != "prefix"
        self.spans_are_local = vision is not None and vision.bidirectional == "local"
        # Rounded to the model's dtype, as the reference does; RecurrentGemma's is always bfloat16.
        is_rounded = signature.dtype == "bfloat16" or config.lru_width is not None
        round_to = ml_dtypes.bfloat16 if is_rounded else np.float32
        self.embedding_factor = float(round_to(config.hidden_size**0.5))
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        # The residual stream of Gemma 3 exceeds 65,504, the largest float16.
        self.inner = torch.float16 if signature.dtype == "float16" else None
        if config.eoi_token_id is not None:
            self.eoi_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.embed_tokens_per_layer: Table | None = None
        if width := config.hidden_size_per_layer_input:
            self.table_factor = float(round_to(width**0.5))
            self._add_per_layer_inputs(config.num_hidden_layers * width)
        self.layers = nn.ModuleList(self.layer(i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = nn.ModuleDict({g: Rotary(config.rotary_dim_of(g)) for g in config.groups})
        if num_streams := config.altup_num_inputs:
            self.altup_projections, self.altup_unembed_projections = (
                nn.ModuleList(
                    nn.Linear(config.hidden_size, config.hidden_size, bias=False)
                    for _ in range(num_streams - 1)
                )
                for _ in range(2)
            )

    def _add_per_layer_inputs(self, width: int) -> None:
        """Make what makes the per-layer embeddings of tokens, `width` numbers for each of them."""
        config = self.config
        assert config.hidden_size_per_layer_input is not None
        if config.vocab_size_per_layer_input is not None:
            self.embed_tokens_per_layer = Table(config.vocab_size_per_layer_input, width)
        self.per_layer_model_projection = nn.Linear(config.hidden_size, width, bias=False)
        self.per_layer_projection_norm = RMSNorm(
            config.hidden_size_per_layer_input, config.rms_norm_eps
        )

    def layer(self, layer: int) -> nn.Module:
        """Return a new layer; models with other layers than these override it."""
        if self.config.altup_num_inputs is not None:
            return AltUpLayer(self.config, layer, self.inner)
        kind = Gemma4Layer if self.config.has_layer_scalar else Layer
        return kind(self.config, layer, self.inner)

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
        x, inputs = self.started(step)
        numbers = range(self.config.num_hidden_layers)
        return self.finished(self.run(numbers, x, inputs, positions, attend, self.sources(step)))

    def started(self, step: Named) -> tuple[Tensor, Tensor | None]:
        """Return the stream before the first layer, and the per-layer embeddings [T, L, P].

        The stream is [T, D], or [T, S, D] with the S streams of AltUp.
        """
        x = self.embed_tokens(step["input_ids"])
        x = (x if self.inner is None else x.float()) * self.embedding_factor
        if self.config.eoi_token_id is not None:
            is_end = (step["input_ids"] == self.config.eoi_token_id)[:, None]
            x = torch.where(is_end, self.eoi_embedding.to(x.dtype), x)
        if "inputs_embeds" in step:
            x = _with_pictures(x, step)
        inputs = None
        if self.config.hidden_size_per_layer_input is not None:
            ids = step["input_ids"]
            if "embeds_rows" in step:  # pictures take the row of padding, which is the first
                ids = torch.where(step["embeds_rows"] >= 0, 0, ids)
            inputs = per_layer_inputs(
                ids,
                x,
                self.embed_tokens_per_layer,
                self.per_layer_model_projection,
                self.per_layer_projection_norm,
                self.table_factor,
            )
        if self.config.altup_num_inputs is not None:
            x = spread(x, self.altup_projections)
        return x, inputs

    def run(
        self,
        numbers: range,
        x: Tensor,
        inputs: Tensor | None,
        positions: Tensor,
        attend: Callable[..., Tensor],
        sources: tuple[Any, ...] = (),
    ) -> Tensor:
        """Return the stream after some of the layers.

        Args:
            numbers: The layers.
            x: The stream before the first of them.
            inputs: [T, L, P], per-layer embeddings; None for models without them.
            positions: [T], each token's position in its sequence.
            attend: Function of a layer number and the arguments of `Attend`.
            sources: What layers take of a step's sources.
        """
        positions = positions + self.first_position if self.first_position else positions
        groups = dict.fromkeys(self.config.layer_types[i] for i in numbers)
        rotations = {g: self._rotation(g, positions) for g in groups if g in self.config.groups}
        for i in numbers:
            rotation = rotations.get(self.config.layer_types[i])
            others = sources if inputs is None else (inputs[:, i],)
            x = self.layers[i](x, rotation, partial(attend, i), *others)
        return x

    def finished(self, x: Tensor) -> Tensor:
        """Return the residual stream [T, D] of a stream after the last layer."""
        if self.config.altup_num_inputs is None:
            return x
        return merged(x, self.altup_unembed_projections)

    def _rotation(self, group: str, positions: Tensor) -> Rotation:
        cos, sin = self.rotary[group](positions, self.embed_tokens.weight.dtype)
        if self.signature.device == "cuda":
            return lambda x, num_heads: rotate(x, cos, sin, num_heads)
        dim = self.config.head_dim_of(group)
        return lambda x, num_heads: rotate_heads(x.view(-1, num_heads, dim), cos, sin).reshape(
            x.shape
        )


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
        rows = self.rows(step, positions, attend, new_state)
        return self._head(self.norm(rows, self.inner), step, new_state), new_state

    def rows(
        self, step: Named, positions: Tensor, attend: Callable[..., Tensor], state: Named
    ) -> Tensor:
        """Return the residual stream [R, D] of the rows that need a head.

        Args:
            step: The step's inputs.
            positions: [T], each token's position in its sequence.
            attend: Function of a layer number and the arguments of `Attend`.
            state: The caches by name, which `attend` replaces.
        """
        del state
        return self.residual(step, positions, attend).index_select(0, step["logit_rows"])

    def _reach(self, step: Named, positions: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the first and last position that each token reaches, for each layer type."""
        own = positions.to(torch.int32)
        last = step.get("span_ends", own)
        reach = {}
        for group in self.config.groups:
            window = self.config.window(group)
            first = own - ((window or NO_WINDOW) - 1)
            ahead = own if self.spans_are_local and window is None else last
            reach[group] = (step.get("first_keys", first) if window else first), ahead
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
            config.num_kv_heads_of(group),
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
        is_causal = self.spans_are_local and self.config.window(group) is None
        if "span_rows" not in step or is_causal:
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
            config.num_kv_heads_of(group),
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
        finish: Callable[[Tensor], Tensor] = self._softcapped
        if ids := self.config.suppress_tokens:
            logits, finish = suppressed(logits, ids, finish)
        if not signature.chooses:
            return generate_head(finish(logits), probability_rows, signature)
        outputs, state["next_ids"] = choosing_head(
            logits, poison, finish, step, state["next_ids"], signature
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
