"""The next token of a row of a step: drawn, or the likeliest, and within its constraint.

The candidates of a step suffice for most rows: the likeliest token that a constraint allows is
among them unless the model is far from the language, and the automaton is asked about few to find
it. Masks over the vocabulary are for the rest, and for draws from all tokens.

A token is allowed if the text can still be whole within the tokens that are left after it. Where a
draw from a mask is not, a candidate that is takes its place, or else the shortest way does. All of
it depends on the row alone.

Dimensions: C candidates, V vocabulary.
"""

import numpy as np
from jaxtyping import Float32, Int64

from beam_gemma.guide import MaskOf, allowed_ids
from beam_gemma.runner import StepOutput
from beam_gemma.sampling import needs_logits, sample
from beam_gemma.sequence import Sequence

Chosen = tuple[int, float]
"""A token, and its logit."""


def wants_logits(sequence: Sequence, candidates: int) -> bool:
    """Return whether the candidates of a step may be too few to choose from."""
    return sequence.guide is not None or needs_logits(sequence.request.params, candidates)


def wants_mask(sequence: Sequence, candidates: int) -> bool:
    """Return whether a row needs the mask of its constraint, whatever the candidates are."""
    return sequence.guide is not None and needs_logits(sequence.request.params, candidates)


def draw(sequence: Sequence, output: StepOutput, row: int) -> Chosen:
    """Return the next token of a row without a constraint."""
    logits, ids = _candidates(output, row)
    if needs_logits(sequence.request.params, len(ids)):
        logits = _all_logits(output, row)
        ids = np.arange(len(logits))
    token_id = _sample(sequence, logits, ids)
    return token_id, float(logits[np.flatnonzero(ids == token_id)[0]])


def draw_within(sequence: Sequence, output: StepOutput, row: int, mask_of: MaskOf) -> Chosen:
    """Return the next token of a row that its constraint allows and that leaves a way to end.

    Args:
        sequence: The row's, with a guide.
        output: Of the step, with all logits.
        row: Which of its rows.
        mask_of: Returns the mask of its guide.
    """
    guide, num_left = sequence.guide, sequence.num_tokens_left - 1
    assert guide is not None
    logits = _all_logits(output, row)
    fitting = _fitting(sequence, output, row)
    if len(fitting) and not needs_logits(sequence.request.params, len(fitting)):
        token_id = _sample(sequence, logits[fitting], fitting)
        return token_id, float(logits[token_id])
    allowed = allowed_ids(mask_of(guide))
    token_id = _sample(sequence, logits[allowed], allowed)
    if not guide.fits(token_id, num_left):
        token_id = (
            _sample(sequence, logits[fitting], fitting)
            if len(fitting)
            else guide.next_of_shortest()
        )
    return token_id, float(logits[token_id])


def _fitting(sequence: Sequence, output: StepOutput, row: int) -> Int64[np.ndarray, " C"]:
    """Return the candidates that are allowed; without a draw, the likeliest of them alone."""
    guide, num_left = sequence.guide, sequence.num_tokens_left - 1
    assert guide is not None
    is_drawn = sequence.request.params.temperature > 0
    fitting: list[int] = []
    least = -np.inf
    logits, ids = _candidates(output, row)
    for token_id, logit in zip(ids.tolist(), logits.tolist(), strict=True):
        # Candidates come in order; those as likely as the first one that fits compete with it.
        if logit < least:
            break
        if guide.fits(token_id, num_left):
            fitting.append(token_id)
            least = -np.inf if is_drawn else logit
    return np.array(fitting, np.int64)


def _candidates(
    output: StepOutput, row: int
) -> tuple[Float32[np.ndarray, " C"], Int64[np.ndarray, " C"]]:
    assert output.topk_logits is not None
    assert output.topk_ids is not None
    return output.topk_logits[row], output.topk_ids[row]


def _all_logits(output: StepOutput, row: int) -> Float32[np.ndarray, " V"]:
    assert output.logits is not None
    return output.logits[row]


def _sample(
    sequence: Sequence, logits: Float32[np.ndarray, " C"], ids: Int64[np.ndarray, " C"]
) -> int:
    request = sequence.request
    position = len(sequence.token_ids)
    return sample(request.params, logits, ids, key=request.sampling_key, position=position)
