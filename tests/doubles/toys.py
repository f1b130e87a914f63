"""A toy graph with spans that are attended both ways.

It has no weights: tokens are one-hot vectors, so what comes out can be said by hand.
"""

import torch

from beam_gemma.model.graph_tensors import PagedState
from beam_gemma.model.layer_types import FULL
from beam_gemma.model.signature import Signature
from export.modules.heads import Named, generate_head
from export.ops.reference import NO_WINDOW, ragged_attention

VOCAB = 16


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


SPAN = toy_signature(
    states=(PagedState(group=FULL, layers=(0,), num_key_value_heads=1, head_dim=VOCAB),),
    optional_inputs=("span_ends",),
)


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
