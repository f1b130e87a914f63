"""Toy graphs of the kinds that the family will need later: recurrent state, two-sided spans.

They have no weights: tokens are one-hot vectors, so what comes out can be said by hand.
"""

import torch

from beam_gemma.model.config import FULL
from beam_gemma.model.graph_tensors import PagedState, RecurrentState
from beam_gemma.model.signature import Signature
from export.modules.decoder import sequence_positions
from export.modules.heads import Named, generate_head
from export.ops.reference import NO_WINDOW, ragged_attention

VOCAB = 16
DECAY = 0.5


def toy_signature(**kwargs: object) -> Signature:
    return Signature(
        head="generate",
        device="cpu",
        dtype="float32",
        vocab_size=VOCAB,
        hidden_size=VOCAB,
        max_model_len=256,
        **kwargs,
    )


RECURRENT = toy_signature(states=(RecurrentState(name="memory", layers=(0,), shape=(VOCAB,)),))
SPAN = toy_signature(
    states=(PagedState(group=FULL, layers=(0,), num_key_value_heads=1, head_dim=VOCAB),),
    optional_inputs=("span_ends",),
)


class RecurrentToy(torch.nn.Module):
    """h[t] = DECAY * h[t - 1] + one_hot(token[t]); the logits are h."""

    def forward(self, step: Named, state: Named) -> tuple[Named, Named]:
        x = torch.nn.functional.one_hot(step["input_ids"], VOCAB).float()
        positions = sequence_positions(step)
        starts = step["cu_seqlens"].long()
        tokens = torch.arange(x.shape[0])
        owner = (tokens[:, None] >= starts[None, 1:]).sum(dim=1)
        # [T, T]: how much of token s is left at token t.
        distance = positions[:, None] - positions[None, :]
        same = (owner[:, None] == owner[None, :]) & (distance >= 0)
        weights = torch.where(same, DECAY ** distance.clamp(min=0).float(), 0.0)
        slots = step["state_slots"].long()
        fresh = step["past_seqlens"] == 0
        memory = state["memory.0"].index_select(0, slots).masked_fill(fresh[:, None], 0.0)
        steps = (tokens - starts.index_select(0, owner) + 1).float()
        hidden = weights @ x + DECAY ** steps[:, None] * memory.index_select(0, owner)
        last = hidden.index_select(0, starts[1:] - 1)
        updated = torch.index_put(state["memory.0"], (slots,), last)
        return generate_head(
            hidden.index_select(0, step["logit_rows"]), step["probability_rows"], RECURRENT
        ), {"memory.0": updated}


class SpanToy(torch.nn.Module):
    """The logits are the share of each token among the tokens in reach."""

    def forward(self, step: Named, state: Named) -> tuple[Named, Named]:
        values = torch.nn.functional.one_hot(step["input_ids"], VOCAB).float()
        zeros = torch.zeros_like(values)
        output, keys, cached = ragged_attention(
            zeros,
            zeros,
            values,
            state["key_cache.0"],
            state["value_cache.0"],
            step["cu_seqlens"],
            step["past_seqlens"],
            step[f"block_table.{FULL}"],
            step[f"slot_mapping.{FULL}"],
            torch.zeros_like(step["past_seqlens"]),
            torch.zeros_like(step["span_ends"]),
            step["span_ends"],
            1,
            1,
            NO_WINDOW,
            1.0,
            0.0,
            "cpu",
        )
        return generate_head(
            output.index_select(0, step["logit_rows"]), step["probability_rows"], SPAN
        ), {
            "key_cache.0": keys,
            "value_cache.0": cached,
        }
