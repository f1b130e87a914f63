"""Choice of a row's next token: drawn or likeliest, and allowed by the row's constraint.

The candidates of a step suffice for most rows: they include the likeliest token that a constraint
allows, unless the model is far from the language, and the automaton checks only a few to find it.
Masks over the vocabulary serve the other rows, and draws from all tokens.

A token fits if the text can still be completed within the tokens left after it. If a token drawn
from a mask does not fit, it is replaced by a candidate that does, or else by the next token of the
shortest completion. The choice depends on the row alone.

A constraint holds for the answer only. The first token may begin a thought instead, within which
all tokens are allowed; one that would end the completion there ends the thought.

Dimensions: C candidates, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int64

from beam_gemma.engine.sampling import needs_logits, sample
from beam_gemma.engine.sequence import Sequence
from beam_gemma.runtime.step_interface import StepOutput
from beam_gemma.structured.constraint import Guide, MaskOf, allowed_ids

Chosen = tuple[int, float]
"""A token id and its logit."""


class Candidates(NamedTuple):
    """Outputs of a step for one row."""

    logits: Float32[np.ndarray, " C"]
    """Logits of the likeliest tokens, highest first."""
    ids: Int64[np.ndarray, " C"]
    every: Float32[np.ndarray, " V"] | None
    """Logits of all tokens, for rows whose candidates may be too few."""


def candidates_of(output: StepOutput, row: int, full_row: int) -> Candidates:
    """Return the outputs of a step for one row.

    Args:
        output: The outputs of the step.
        row: Index of the row.
        full_row: Index of the row in `output.logits`, if the step has those.
    """
    assert output.topk_logits is not None
    assert output.topk_ids is not None
    every = None if output.logits is None else output.logits[full_row]
    return Candidates(output.topk_logits[row], output.topk_ids[row], every)


def wants_mask(sequence: Sequence, candidates: int) -> bool:
    """Return whether a row needs its constraint's mask regardless of the candidates."""
    is_held = sequence.guide is not None and not sequence.is_thinking
    return is_held and needs_logits(sequence.request.params, candidates)


def next_token(sequence: Sequence, candidates: Candidates, mask_of: MaskOf) -> Chosen:
    """Return the next token of a row and its logit.

    Args:
        sequence: The sequence of the row.
        candidates: The step's outputs for the row.
        mask_of: Function that returns the mask of a guide.
    """
    if sequence.guide is None:
        return _draw_freely(sequence, candidates)
    if sequence.thoughts is None:
        return _draw_within(sequence, sequence.guide, candidates, mask_of)
    if not sequence.is_thinking:
        first_id = sequence.thoughts.first_id
        return _draw_within(sequence, sequence.guide, candidates, mask_of, first_id=first_id)
    token_id, logit = _draw_freely(sequence, candidates)
    if token_id in sequence.end_token_ids:
        token_id = sequence.thoughts.end_id
        logit = float(_all_logits(candidates)[token_id])
    return token_id, logit


def _draw_freely(sequence: Sequence, candidates: Candidates) -> Chosen:
    """Return a next token among all tokens."""
    logits, ids, _ = candidates
    if needs_logits(sequence.request.params, len(ids)):
        logits = _all_logits(candidates)
        ids = np.arange(len(logits))
    token_id = _sample(sequence, logits, ids)
    return token_id, float(logits[np.flatnonzero(ids == token_id)[0]])


def _draw_within(
    sequence: Sequence,
    guide: Guide,
    candidates: Candidates,
    mask_of: MaskOf,
    *,
    first_id: int | None = None,
) -> Chosen:
    """Return a next token that the constraint allows and that leaves enough tokens to end.

    Args:
        sequence: The sequence of the row.
        guide: State of the row's answer in the language of its constraint.
        candidates: The step's outputs for the row.
        mask_of: Function that returns the mask of a guide.
        first_id: Token that may come before the answer, as one that begins a thought; or None.
    """
    num_left = sequence.num_tokens_left - 1

    def fits(token_id: int) -> bool:
        return token_id == first_id or guide.fits(token_id, num_left)

    logits = _all_logits(candidates)
    is_drawn = sequence.request.params.temperature > 0
    fitting = _fitting(fits, candidates, is_drawn=is_drawn)
    if len(fitting) and not needs_logits(sequence.request.params, len(fitting)):
        token_id = _sample(sequence, logits[fitting], fitting)
        return token_id, float(logits[token_id])
    allowed = allowed_ids(mask_of(guide))
    if first_id is not None:
        allowed = np.union1d(allowed, first_id)
    token_id = _sample(sequence, logits[allowed], allowed)
    if not fits(token_id):
        token_id = (
            _sample(sequence, logits[fitting], fitting)
            if len(fitting)
            else guide.next_of_shortest()
        )
    return token_id, float(logits[token_id])


def _fitting(
    fits: Callable[[int], bool], candidates: Candidates, *, is_drawn: bool
) -> Int64[np.ndarray, " C"]:
    """Return the candidates that fit; without a draw, only the likeliest of them."""
    fitting: list[int] = []
    least = -np.inf
    for token_id, logit in zip(candidates.ids.tolist(), candidates.logits.tolist(), strict=True):
        # Candidates are sorted; only those equal to the first one that fits still compete with it.
        if logit < least:
            break
        if fits(token_id):
            fitting.append(token_id)
            least = -np.inf if is_drawn else logit
    return np.array(fitting, np.int64)


def _all_logits(candidates: Candidates) -> Float32[np.ndarray, " V"]:
    assert candidates.every is not None
    return candidates.every


def _sample(
    sequence: Sequence, logits: Float32[np.ndarray, " C"], ids: Int64[np.ndarray, " C"]
) -> int:
    request = sequence.request
    position = len(sequence.token_ids)
    return sample(request.params, logits, ids, key=request.sampling_key, position=position)
