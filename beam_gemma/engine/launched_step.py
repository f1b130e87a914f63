"""A step between its start and its collection, and the counts of what it computed."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from beam_gemma.engine.sequence import Sequence, Status, Step
from beam_gemma.runtime.step_interface import (
    Failed,
    Feeds,
    Finished,
    Pending,
    ScoreOutput,
    StepOutput,
)
from beam_gemma.structured.constraint import MaskOf


class StepCount(NamedTuple):
    """Counts of a step, without its surplus work."""

    num_sequences: int
    """Sequences of the step, without those that ended while it was in flight."""
    num_prompt_tokens: int
    """Tokens computed by prefill."""
    num_completion_tokens: int
    """Tokens that completions gained: chosen ones, end tokens included, and forced ones."""


@dataclass(eq=False, kw_only=True, slots=True)
class Flight:
    """A step that was started, with the context needed to read its outputs."""

    step: Step
    rows: list[Sequence]
    """Sequences that get their next token, in the order of the outputs."""
    mask_of: MaskOf
    num_prompt_tokens: int
    is_last: bool
    """True if no other step may be started before this one is over."""
    feeds: Feeds = field(init=False)
    """Inputs of the step; not set if pictures of the step have no embeddings."""
    pending: Pending = field(init=False)
    is_over: bool = False

    def fail(self, error: Exception) -> None:
        """Record that the step failed."""
        self.pending = Failed(error)
        self.is_last = True

    def wait(self) -> None:
        """Wait for the step, and keep its result or error for later."""
        try:
            self.pending = Finished(self.pending.result())
        except Exception as error:  # a device may raise anything; raised again by result()
            self.fail(error)
        self.is_over = True

    def settle(self) -> int:
        """Settle the step's sequences, except those put back; return how many still run."""
        going = [item for item in self.step if item[0].is_in_flight]
        for sequence, num_new_tokens in going:
            sequence.settle(num_new_tokens)
        return sum(sequence.status is Status.RUNNING for sequence, _ in going)

    def full_row(self, row: int) -> int:
        """Return the index of a row in the outputs' full logits."""
        full_rows = self.feeds.get("full_rows")
        return row if full_rows is None else int(np.searchsorted(full_rows, row))


def is_finite(output: StepOutput | ScoreOutput) -> bool:
    """Return whether every row of a step's outputs is finite."""
    logits = output.target_logits if isinstance(output, ScoreOutput) else top_logits(output)
    return bool(np.isfinite(logits).all() and (output.top_probability > 0).all())


def top_logits(output: StepOutput) -> np.ndarray:
    """Return the logit of each row's likeliest token."""
    if output.top_logits is not None:
        return output.top_logits
    assert output.topk_logits is not None
    return output.topk_logits[:, 0]
