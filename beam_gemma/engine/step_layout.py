"""`StepLayout` lists the sequence, position and slot of each new token of a step.

Dimensions: B sequences, T new tokens.
"""

import numpy as np
from jaxtyping import Int32, Int64

from beam_gemma.engine.sequence import Sequence, Step


class StepLayout:
    """The sequence and position of each new token of a step."""

    input_ids: Int64[np.ndarray, " T"]
    """Token ids; 0 for a token that the device chooses and the host does not know yet."""
    token_slots: Int32[np.ndarray, " T"]
    """Slot where the device keeps such a token; -1 for all others."""
    rows: Int64[np.ndarray, " T"]
    """Index of each token's sequence in the step."""
    positions: Int32[np.ndarray, " T"]
    """Position of each token in its sequence."""
    num_new_tokens: Int32[np.ndarray, " B"]
    past_seqlens: Int32[np.ndarray, " B"]
    slots: Int32[np.ndarray, " B"]

    source_seqlens: Int32[np.ndarray, " B"]
    starting: list[tuple[int, Sequence]]
    """Sequences whose first tokens are in the step, with their indices in it."""

    def __init__(self, step: Step) -> None:
        self.num_new_tokens = np.array([n for _, n in step], np.int32)
        self.past_seqlens = np.array([s.num_computed_tokens for s, _ in step], np.int32)
        self.slots = np.array([s.slot for s, _ in step], np.int32)
        self.source_seqlens = np.array([s.num_source_tokens for s, _ in step], np.int32)
        self.starting = [(i, s) for i, (s, _) in enumerate(step) if not s.num_computed_tokens]
        self.cu_seqlens = np.zeros(len(step) + 1, np.int32)
        np.cumsum(self.num_new_tokens, out=self.cu_seqlens[1:])
        is_unknown = np.array([s.num_unknown_tokens > 0 for s, _ in step], bool)
        new_ids = (
            [0] if unknown else s.token_ids[s.num_computed_tokens : s.num_computed_tokens + n]
            for (s, n), unknown in zip(step, is_unknown.tolist(), strict=True)
        )
        self.input_ids = np.array([i for ids in new_ids for i in ids], np.int64)
        self.token_slots = np.full(len(self.input_ids), -1, np.int32)
        self.token_slots[self.cu_seqlens[:-1][is_unknown]] = self.slots[is_unknown]
        self.rows = np.repeat(np.arange(len(step)), self.num_new_tokens)
        shift = self.past_seqlens - self.cu_seqlens[:-1]
        self.positions = np.arange(len(self.rows), dtype=np.int32) + shift[self.rows]

    @property
    def seqlens(self) -> Int32[np.ndarray, " B"]:
        """Number of computed tokens of each sequence after the step."""
        return self.past_seqlens + self.num_new_tokens
