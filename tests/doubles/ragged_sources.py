"""Driving a ragged step of a decoder with sources by hand, for tests below the engine."""

from collections.abc import Sequence

import numpy as np

from beam_gemma.engine.cuda_source_packing import as_tokens
from beam_gemma.model.signature import CONTEXT_ALIGNMENT, Signature
from tests.doubles.ragged import Chunk, Feeder, Feeds


class SourceFeeder(Feeder):
    """Builds the inputs of steps over sequences with sources that never give blocks back."""

    def __init__(
        self, signature: Signature, states: Sequence[np.ndarray], max_length: int, seed: int = 0
    ) -> None:
        """Describe the sequences.

        Args:
            signature: Of the decoder.
            states: The encoder's states [C, U] of each sequence's source.
            max_length: Most tokens of a sequence.
            seed: Of the order of the blocks.
        """
        longest = max(len(s) for s in states) + max_length
        super().__init__(signature, len(states), longest, seed)
        self.states = states

    def feeds(self, chunks: list[Chunk], *, all_rows: bool = True) -> Feeds:
        """Return the inputs of a step and move each sequence on; every token gets a logit row."""
        starting = [seq for seq, _ in chunks if self.past[seq] == 0]
        feeds = super().feeds(chunks, all_rows=all_rows)
        nothing = np.zeros((1, self.signature.source_size), self.states[0].dtype)
        states = [self.states[seq] for seq in starting]
        feeds["source_states"] = np.concatenate(states or [nothing])
        lengths = [len(self.states[seq]) for seq, _ in chunks]
        feeds["source_seqlens"] = np.array(lengths, np.int32)
        for state in self.signature.paged_states:
            if state.holds != "target":
                slots = [self._cells(seq, np.arange(len(self.states[seq]))) for seq in starting]
                written = np.concatenate(slots or [np.array([-1])])
                feeds[f"source_slots.{state.group}"] = written.astype(np.int32)
        on_cuda = self.signature.device == "cuda"
        return as_tokens(feeds, self.signature) if on_cuda else feeds

    def _tables(
        self, seqs: list[int], past: np.ndarray, lengths: list[int], positions: np.ndarray
    ) -> Feeds:
        feeds = super()._tables(seqs, past, lengths, positions)
        block = self.signature.block_size
        owners = np.repeat(seqs, lengths)
        num_source = np.array([len(states) for states in self.states])
        for state in self.signature.paged_states:
            if state.holds == "target":
                continue
            last = [
                state.num_cells(len(self.states[seq]), int(p) + n)
                for seq, p, n in zip(seqs, past, lengths, strict=True)
            ]
            unit = max(CONTEXT_ALIGNMENT, block)
            width = -(-int(max(last)) // unit) * unit // block
            feeds[f"block_table.{state.group}"] = self.tables[seqs, :width]
            feeds.pop(f"slot_mapping.{state.group}", None)
            if state.holds == "both":
                ring = positions % (state.sliding_window or len(self.tables[0]) * block)
                cells = num_source[owners] + ring
                feeds[f"slot_mapping.{state.group}"] = np.array(
                    [self._cells(seq, cell) for seq, cell in zip(owners, cells, strict=True)],
                    np.int32,
                )
        return feeds

    def _cells(self, seq: int, cells: np.ndarray) -> np.ndarray:
        """Return the flat slots of cells of a sequence."""
        block = self.signature.block_size
        return self.tables[seq, cells // block] * block + cells % block
