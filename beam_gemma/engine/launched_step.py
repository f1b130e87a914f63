"""A step between its start and its collection, and what it turns out to have computed."""

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
    """What a step has computed, without what nobody wanted by then."""

    num_sequences: int
    """Those that had ended since it was started are left out."""
    num_prompt_tokens: int
    """Computed by prefill."""
    num_completion_tokens: int
    """By which completions grew: those chosen, end tokens included, and those forced after them."""


@dataclass(eq=False, kw_only=True, slots=True)
class Flight:
    """A step that was started, and what it takes to understand its outputs."""

    step: Step
    feeds: Feeds
    rows: list[Sequence]
    """Those that get their next token, in the order of the outputs."""
    mask_of: MaskOf
    num_prompt_tokens: int
    is_last: bool
    """Whether nothing may be started before it is over."""
    pending: Pending = field(init=False)
    is_over: bool = False

    def fail(self, error: Exception) -> None:
        """Note that the step failed."""
        self.pending = Failed(error)
        self.is_last = True

    def wait(self) -> None:
        """Wait for the step; what comes of it is kept until it is asked for."""
        try:
            self.pending = Finished(self.pending.result())
        except Exception as error:  # a device may raise anything, and it is raised again
            self.fail(error)
        self.is_over = True

    def settle(self) -> int:
        """Have the sequences follow, all but those put back; return how many have not ended."""
        going = [item for item in self.step if item[0].is_in_flight]
        for sequence, num_new_tokens in going:
            sequence.settle(num_new_tokens)
        return sum(sequence.status is Status.RUNNING for sequence, _ in going)

    def full_row(self, row: int) -> int:
        """Return where the outputs have the whole distribution of a row."""
        full_rows = self.feeds.get("full_rows")
        return row if full_rows is None else int(np.searchsorted(full_rows, row))


def is_finite(output: StepOutput | ScoreOutput) -> bool:
    """Return whether every row of a step is."""
    logits = output.target_logits if isinstance(output, ScoreOutput) else top_logits(output)
    return bool(np.isfinite(logits).all() and (output.top_probability > 0).all())


def top_logits(output: StepOutput) -> np.ndarray:
    """Return the logit of each row's likeliest token."""
    if output.top_logits is not None:
        return output.top_logits
    assert output.topk_logits is not None
    return output.topk_logits[:, 0]
