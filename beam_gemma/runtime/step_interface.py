"""Device-independent interface between engines and sessions, and the outputs of steps.

A step is started first and waited for later; if the device works asynchronously, the next step can
be started in between. Steps never run in parallel: each reads what the previous one wrote.

Dimensions: R packed positions that need a head, Q of these that need a probability, F of these that
need the full distribution, Y targets, V vocabulary, C candidates, B sequences, W width of an
embedding, D hidden, T tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64, Shaped

from beam_gemma.model.signature import Signature

Feeds: TypeAlias = Mapping[str, np.ndarray]
"""Inputs of a step by name: exactly the arrays of `Signature.step_inputs`."""


@runtime_checkable
class Logits(Protocol):
    """Full logits of each row of a step, valid until the next step is started."""

    def __getitem__(self, row: int, /) -> Float32[np.ndarray, " V"]:
        """Return the logits of one row."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Output of the `generate` head for each row of `logit_rows`."""

    topk_logits: Float32[np.ndarray, "R C"] | None
    """Candidates' logits; None, like `topk_ids`, if the device chose and none were requested."""
    topk_ids: Int64[np.ndarray, "R C"] | None
    top_probability: Float32[np.ndarray, " Q"]
    logits: Logits | None = None
    """Full logits, if requested: of `full_rows`, or of all rows if the graph lacks that input."""
    chosen_ids: Int64[np.ndarray, " R"] | None = None
    """Tokens chosen by the device; None, like the fields below, if the host chooses."""
    chosen_logits: Float32[np.ndarray, " R"] | None = None
    top_logits: Float32[np.ndarray, " R"] | None = None
    """Logit of the most likely token; NaN if the row's hidden state is not finite."""


@dataclass(frozen=True, slots=True)
class ScoreOutput:
    """Output of the `score` head for the targets and for the rows of `probability_rows`."""

    target_logits: Float32[np.ndarray, " Y"]
    top_logits: Float32[np.ndarray, " Q"]
    top_probability: Float32[np.ndarray, " Q"]


@dataclass(frozen=True, slots=True)
class EmbedOutput:
    """Output of the `embed` head for each sequence."""

    embedding: Float32[np.ndarray, "B W"]
    first_state: Float32[np.ndarray, "B D"]


@runtime_checkable
class SourceEncoder(Protocol):
    """Interface that an engine needs of the session of an encoder, with the head `encode`."""

    signature: Signature

    def encode(self, feeds: Feeds) -> Shaped[np.ndarray, "T D"]:
        """Run one step over whole sources and return the state of each token.

        States of bfloat16, which numpy lacks, are returned as uint16.
        """


@runtime_checkable
class Pending(Protocol):
    """A started step."""

    def result(self) -> StepOutput | ScoreOutput:
        """Wait for the step and return its outputs, or raise the device's error."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A step that had finished when `start` returned."""

    output: StepOutput | ScoreOutput

    def result(self) -> StepOutput | ScoreOutput:
        """Return the outputs."""
        return self.output


@dataclass(frozen=True, slots=True)
class Failed:
    """A step that is known to have failed."""

    error: Exception

    def result(self) -> StepOutput | ScoreOutput:
        """Raise the step's error."""
        raise self.error


@runtime_checkable
class Runner(Protocol):
    """Interface that an engine needs of a session."""

    signature: Signature
    num_blocks: dict[str, int]
    num_state_slots: int
    """Slots for state of a fixed size: one for each sequence, then those for snapshots; the last
    one of a session on CUDA is spare, for padding."""
    max_steps_in_flight: int
    """Number of steps that may be started before the first of them is waited for."""

    def start(
        self, feeds: Feeds, *, with_logits: bool = False, with_candidates: bool = True
    ) -> Pending:
        """Start one step, which updates the state in place.

        Args:
            feeds: The step's inputs.
            with_logits: Whether the full distributions of rows can be fetched.
            with_candidates: Whether to return candidates even if the device chooses tokens.
        """

    def zero_blocks(self, group: str, blocks: list[int]) -> None:
        """Overwrite cache blocks with zeros, after all steps started so far."""

    def copy_slot(self, source: int, target: int) -> None:
        """Copy the recurrent state of a slot to another one, after all steps started so far."""
