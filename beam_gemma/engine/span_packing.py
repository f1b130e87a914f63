"""The inputs by which a CUDA decoder attends in both directions inside spans.

Each span with tokens in the step is a sequence of its own, whose new tokens are those of the span
(`export.ops.span_attention`). The beginning of a span may lie before the step, in blocks that
another sequence has computed; its end never lies behind it.

Dimensions: T new tokens, X of these inside spans, Z spans, B sequences, M blocks in a table row.
"""

from collections.abc import Mapping

import numpy as np

from beam_gemma.engine.sequence import Step
from beam_gemma.model.signature import Signature


def span_inputs(
    step: Step, signature: Signature, feeds: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return the inputs of the step's spans; without any, all but `span_places` are empty.

    Args:
        step: The sequences of the step, with the number of new tokens of each.
        signature: Contract of a CUDA decoder that takes spans.
        feeds: The step's other inputs; starts, past tokens and tables are read.
    """
    owners, pasts, rows = [], [], [np.zeros(0, np.int64)]
    for owner, (sequence, num_new_tokens) in enumerate(step):
        past = sequence.num_computed_tokens
        begin = int(feeds["cu_seqlens"][owner])
        for start, end in sequence.spans_within(num_new_tokens):
            first = max(start, past)
            owners.append(owner)
            pasts.append(first)
            rows.append(np.arange(begin + first - past, begin + end - past))
    span_rows = np.concatenate(rows)
    places = np.full(len(feeds["input_ids"]), -1, np.int64)
    places[span_rows] = np.arange(len(span_rows))
    tables = {
        f"span_block_table.{state.group}": feeds[f"block_table.{state.group}"][owners]
        for state in signature.paged_states
    }
    return {
        "span_rows": span_rows,
        "span_places": places,
        "span_cu_seqlens": np.cumsum([len(part) for part in rows]).astype(np.int32),
        "span_past_seqlens": np.array(pasts, np.int32),
        **tables,
    }
