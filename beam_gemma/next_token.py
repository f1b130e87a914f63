"""The next token of a row of a step: drawn, or the likeliest, and within its constraint.

A constrained row takes what its mask allows, as a free one takes what there is. Where too few
tokens are left to end the text after that, it takes one of the step's candidates after which enough
are, and where no candidate is such, the shortest way. All of it depends on the row alone.

Dimensions: C candidates, V vocabulary.
"""

import numpy as np
from jaxtyping import Float32, Int64

from beam_gemma.guide import Mask, allowed_ids, allows
from beam_gemma.sampling import SamplingParams, needs_logits, sample
from beam_gemma.sequence import Sequence
from beam_gemma.session import StepOutput

Chosen = tuple[int, float]
"""A token, and its logit."""


def wants_logits(sequence: Sequence, candidates: int) -> bool:
    """Return whether the candidates of a step may be too few to choose from."""
    return sequence.guide is not None or needs_logits(sequence.request.params, candidates)


def draw(sequence: Sequence, output: StepOutput, row: int) -> Chosen:
    """Return the next token of a row without a constraint."""
    logits, ids = output.topk_logits[row], output.topk_ids[row]
    if needs_logits(sequence.request.params, len(ids)):
        logits = _all_logits(output, row)
        ids = np.arange(len(logits))
    token_id = _sample(sequence, logits, ids)
    return token_id, float(logits[np.flatnonzero(ids == token_id)[0]])


def draw_within(sequence: Sequence, output: StepOutput, row: int, mask: Mask) -> Chosen:
    """Return the next token of a row that its constraint allows and that leaves a way to end."""
    guide, num_left = sequence.guide, sequence.num_tokens_left - 1
    assert guide is not None
    logits = _all_logits(output, row)
    near = output.topk_ids[row]
    near = near[allows(mask, near)]
    pool = near if _suffice(sequence.request.params, len(near)) else allowed_ids(mask)
    token_id = _sample(sequence, logits[pool], pool)
    if not guide.fits(token_id, num_left):
        fitting = np.array([i for i in near.tolist() if guide.fits(i, num_left)], np.int64)
        token_id = (
            _sample(sequence, logits[fitting], fitting)
            if len(fitting)
            else guide.next_of_shortest()
        )
    return token_id, float(logits[token_id])


def _suffice(params: SamplingParams, num_candidates: int) -> bool:
    """Return whether a draw from all tokens that are allowed needs no more than the likeliest."""
    return num_candidates > 0 and not needs_logits(params, num_candidates)


def _all_logits(output: StepOutput, row: int) -> Float32[np.ndarray, " V"]:
    assert output.logits is not None
    return output.logits[row]


def _sample(
    sequence: Sequence, logits: Float32[np.ndarray, " C"], ids: Int64[np.ndarray, " C"]
) -> int:
    request = sequence.request
    position = len(sequence.token_ids)
    return sample(request.params, logits, ids, key=request.sampling_key, position=position)
