"""What engines ask of a session, and what its steps return; no device is named here.

A step is started, and waited for later: where a device works by itself the next step can be started
in between. Two steps never run at once: each reads what the one before it has written.

Dimensions: R packed positions that need a head, Q of these that need a probability, F of these that
need the whole distribution, Y targets, V vocabulary, C candidates, B sequences, W width of an
embedding, D hidden.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64

from beam_gemma.model.signature import Signature

Feeds: TypeAlias = Mapping[str, np.ndarray]
"""Exactly the arrays of `Signature.step_inputs`."""


@runtime_checkable
class Logits(Protocol):
    """The whole distribution of each row of a step, until the next one is started."""

    def __getitem__(self, row: int, /) -> Float32[np.ndarray, " V"]:
        """Return that of one row."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What the `generate` head says of each row of `logit_rows`."""

    topk_logits: Float32[np.ndarray, "R C"] | None
    """None, like the ids, where the device chooses and nobody asked for the candidates."""
    topk_ids: Int64[np.ndarray, "R C"] | None
    top_probability: Float32[np.ndarray, " Q"]
    logits: Logits | None = None
    """Only where somebody asked for them: of `full_rows`, or of all rows where a graph takes none.
    """
    chosen_ids: Int64[np.ndarray, " R"] | None = None
    """None, like what follows, where the host chooses."""
    chosen_logits: Float32[np.ndarray, " R"] | None = None
    top_logits: Float32[np.ndarray, " R"] | None = None
    """Of the likeliest token; NaN where a row is not finite."""


@dataclass(frozen=True, slots=True)
class ScoreOutput:
    """What the `score` head says of targets, and of the rows of `probability_rows`."""

    target_logits: Float32[np.ndarray, " Y"]
    top_logits: Float32[np.ndarray, " Q"]
    top_probability: Float32[np.ndarray, " Q"]


@dataclass(frozen=True, slots=True)
class EmbedOutput:
    """What the `embed` head says of each sequence."""

    embedding: Float32[np.ndarray, "B W"]
    first_state: Float32[np.ndarray, "B D"]


@runtime_checkable
class Pending(Protocol):
    """A step that was started."""

    def result(self) -> StepOutput | ScoreOutput:
        """Wait for the step and return its outputs; what went wrong on the device is raised."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A step that was over when `start` returned."""

    output: StepOutput | ScoreOutput

    def result(self) -> StepOutput | ScoreOutput:
        """Return the outputs."""
        return self.output


@dataclass(frozen=True, slots=True)
class Failed:
    """A step that is known to have failed."""

    error: Exception

    def result(self) -> StepOutput | ScoreOutput:
        """Raise what went wrong."""
        raise self.error


@runtime_checkable
class Runner(Protocol):
    """What an engine asks of a session."""

    signature: Signature
    num_blocks: dict[str, int]
    num_state_slots: int
    max_steps_in_flight: int
    """Steps that may be started before the first of them is waited for."""

    def start(
        self, feeds: Feeds, *, with_logits: bool = False, with_candidates: bool = True
    ) -> Pending:
        """Start one step, which updates the state in place.

        Args:
            feeds: The step.
            with_logits: Whether to return the whole distribution of each row.
            with_candidates: Whether to return candidates even where the device chooses.
        """

    def zero_blocks(self, group: str, blocks: list[int]) -> None:
        """Overwrite cache blocks with zeros, after the steps that were started before."""
