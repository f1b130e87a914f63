"""A decoder whose last layers read the caches of earlier ones.

These layers write nothing, so that a step computes only those of its rows in them that need a head:
of a prompt, the last one. Each such row attends as a sequence of its own.

Dimensions: T new tokens, R packed positions that need a head, B sequences, L layers, D hidden, K
key-value heads, H head dimension, P width of per-layer embeddings.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from beam_gemma.model.graph_tensors import cache_names
from export.modules.decoder import GemmaDecoder, owners
from export.modules.heads import Named
from export.ops.cached_attention import cached_attention
from export.ops.reference import NO_WINDOW


class SharedCacheDecoder(GemmaDecoder):
    """One ragged step of a Gemma 3n or a Gemma 4 with shared keys and values."""

    def rows(
        self, step: Named, positions: Tensor, attend: Callable[..., Tensor], state: Named
    ) -> Tensor:
        """Return the residual stream [R, D] of the rows that need a head.

        The first token is computed as one row more, since a step may have none that needs a head,
        and the products of attention need one.
        """
        rows = step["logit_rows"]
        one_more = torch.cat([rows, torch.zeros(1, dtype=rows.dtype)])
        return self._rows(step | {"logit_rows": one_more}, positions, attend, state)[:-1]

    def _rows(
        self, step: Named, positions: Tensor, attend: Callable[..., Tensor], state: Named
    ) -> Tensor:
        """Return the residual stream [R, D] of a step's `logit_rows`, of which there are some."""
        config, rows = self.config, step["logit_rows"]
        first = config.first_shared_layer
        keys: dict[int, Tensor] = {}

        def attend_and_keep(layer: int, *new: Tensor) -> Tensor:
            keys[layer] = new[1]
            return attend(layer, *new)

        x, inputs = self.started(step)
        x = self.run(range(first), x, inputs, positions, attend_and_keep)
        x, positions = x.index_select(0, rows), positions.index_select(0, rows)
        inputs = None if inputs is None else inputs.index_select(0, rows)
        step = step | self._as_sequences(step, positions)
        read = partial(self._read, step, self._reach_of_rows(step, positions), state, keys)
        last = range(first, config.num_hidden_layers)
        return self.finished(self.run(last, x, inputs, positions, read))

    def _reach_of_rows(self, step: Named, positions: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the first and last position that each row reaches, for each layer type.

        The last row, which `rows` adds, reaches itself alone, so that it takes hardly any time.
        """
        return {
            group: (torch.cat([first[:-1], last[-1:]]), last)
            for group, (first, last) in self._reach(step, positions).items()
        }

    def _as_sequences(self, step: Named, positions: Tensor) -> Named:
        """Return a step's inputs with a sequence of one token for each row that needs a head.

        Args:
            step: The step's inputs.
            positions: [R], each row's position in its sequence.
        """
        rows = step["logit_rows"]
        owner = owners(step).index_select(0, rows)
        of_tokens = {k: step[k].index_select(0, rows) for k in ("span_ends",) if k in step}
        of_sequences = {
            name: tensor.index_select(0, owner)
            for name, tensor in step.items()
            if name.startswith(("block_table.", "context_starts."))
        }
        return {
            **of_tokens,
            **of_sequences,
            "cu_seqlens": torch.arange(rows.shape[0] + 1, dtype=torch.int32),
            "past_seqlens": positions.to(torch.int32),
            "no_slots": rows.clamp(max=-1).to(torch.int32),
        }

    def _read(
        self,
        step: Named,
        reach: dict[str, tuple[Tensor, Tensor]],
        state: Named,
        keys: dict[int, Tensor],
        layer: int,
        query: Tensor,
    ) -> Tensor:
        """Attend over the caches of the layer that a layer shares them with.

        Args:
            step: The step's inputs, with a sequence for each row.
            reach: First and last position that each row reaches, for each group.
            state: The caches by name, which hold the step's tokens.
            keys: The new keys [T, K * H] of the layers before.
            layer: Number of the layer.
            query: [R, N * H].
        """
        config = self.config
        group, producer = config.layer_types[layer], config.producer(layer)
        return cached_attention(
            query,
            keys[producer].index_select(0, step["logit_rows"]),
            *(state[name] for name in cache_names(producer)),
            step["cu_seqlens"],
            step["past_seqlens"],
            step[f"block_table.{group}"],
            step["no_slots"],
            step.get(f"context_starts.{group}", torch.zeros_like(step["past_seqlens"])),
            *reach[group],
            config.num_attention_heads,
            config.num_kv_heads_of(group),
            config.window(group) or NO_WINDOW,
            config.attention_scale,
            config.attn_logit_softcapping or 0.0,
            self.signature.device,
            step.get("attention_metadata"),
        )
