"""Driving a ragged step by hand, for tests below the engine.

Every sequence owns a fixed, shuffled set of cache blocks, so a wrong table shows.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch

from beam_gemma.engine.packing import rows_as_sequences
from beam_gemma.model.signature import CONTEXT_ALIGNMENT, Signature
from beam_gemma.runtime.step_shapes import METADATA, StepShape, StepSizes, host_dtype, pad

Feeds = dict[str, np.ndarray]
Chunk = tuple[int, list[int]]
"""A sequence and its next tokens."""


class Feeder:
    """Builds the inputs of steps over sequences that never give blocks back."""

    def __init__(self, signature: Signature, num_seqs: int, max_length: int, seed: int = 0) -> None:
        self.signature = signature
        unit = max(CONTEXT_ALIGNMENT, signature.block_size)
        self.blocks_per_seq = -(-max_length // unit) * unit // signature.block_size
        self.num_blocks = 1 + num_seqs * self.blocks_per_seq
        order = 1 + np.random.default_rng(seed).permutation(self.num_blocks - 1)
        self.tables = order.reshape(num_seqs, self.blocks_per_seq).astype(np.int32)
        self.past = [0] * num_seqs

    def feeds(self, chunks: list[Chunk], *, all_rows: bool = True) -> Feeds:
        """Return the inputs of a step and move each sequence on; every token gets a logit row."""
        lengths = [len(tokens) for _, tokens in chunks]
        past = np.array([self.past[seq] for seq, _ in chunks], np.int32)
        ends = np.cumsum(lengths)
        positions = np.concatenate([p + np.arange(n) for p, n in zip(past, lengths, strict=True)])
        feeds = {
            "input_ids": np.concatenate([tokens for _, tokens in chunks]).astype(np.int64),
            "cu_seqlens": np.array([0, *ends], np.int32),
            "past_seqlens": past,
            "logit_rows": np.arange(ends[-1]) if all_rows else ends - 1,
        }
        feeds["probability_rows"] = np.arange(len(feeds["logit_rows"]))
        feeds |= self._tables([seq for seq, _ in chunks], past, lengths, positions)
        if self.signature.has_recurrent_state:
            feeds |= self._slots([seq for seq, _ in chunks], lengths)
        if "position_ids" in self.signature.optional_inputs:
            feeds["position_ids"] = positions.astype(np.int64)
        if self.signature.shares_caches and self.signature.device == "cuda":
            feeds |= rows_as_sequences(feeds)
        if self.signature.chooses:
            feeds |= greedy(len(positions), len(feeds["logit_rows"]))
        for (seq, _), length in zip(chunks, lengths, strict=True):
            self.past[seq] += length
        return feeds

    def _tables(
        self, seqs: list[int], past: np.ndarray, lengths: list[int], positions: np.ndarray
    ) -> Feeds:
        block = self.signature.block_size
        unit = max(CONTEXT_ALIGNMENT, block)
        width = -(-int((past + lengths).max()) // unit) * unit // block
        slots = self.tables[np.repeat(seqs, lengths), positions // block] * block
        feeds: Feeds = {}
        for state in self.signature.paged_states:
            feeds[f"block_table.{state.group}"] = self.tables[seqs, :width]
            feeds[f"slot_mapping.{state.group}"] = (slots + positions % block).astype(np.int32)
            if self.signature.takes_context_starts(state):
                feeds[f"context_starts.{state.group}"] = np.zeros(len(seqs), np.int32)
        if self.signature.device == "cuda":
            feeds["attention_metadata"] = np.array([max(lengths), width * block, 0], np.int32)
        return feeds

    def _slots(self, seqs: list[int], lengths: list[int]) -> Feeds:
        """Return each sequence's state slot, the later sequences' first; and where tokens lie."""
        feeds: Feeds = {"state_slots": np.array([len(self.past) - 1 - s for s in seqs], np.int32)}
        if self.signature.device == "cuda":
            width = max(lengths)
            places = np.concatenate([b * width + np.arange(n) for b, n in enumerate(lengths)])
            feeds["token_rows"] = np.full((len(seqs), width), -1)
            feeds["token_rows"].flat[places] = np.arange(sum(lengths))
            feeds["token_places"] = places
        return feeds

    def state(self, dtype: type = np.float32) -> Feeds:
        """Return caches and slots of zeros, as many slots as sequences and one for padding."""
        sizes = {"S": len(self.past) + 1}
        return {
            t.input_name: np.zeros(
                [sizes.get(d, self.num_blocks) if isinstance(d, str) else d for d in t.shape],
                t.dtype if t.input_name == "next_ids" else dtype,
            )
            for t in self.signature.state_tensors()
        }


def greedy(num_tokens: int, num_rows: int) -> Feeds:
    """Return what a graph that chooses takes: known tokens, most likely next ones, all logits."""
    return {
        "token_slots": np.full(num_tokens, -1, np.int32),
        "logit_slots": np.zeros(num_rows, np.int32),
        "temperatures": np.zeros(num_rows, np.float32),
        "uniforms": np.zeros(num_rows, np.float32),
        "top_ks": np.ones(num_rows, np.int32),
        "top_ps": np.ones(num_rows, np.float32),
        "full_rows": np.arange(num_rows),
    }


def schedules(lengths: list[int], chunk: int = 7) -> Mapping[str, list[list[tuple[int, int]]]]:
    """Return ways to run sequences of these lengths, as steps of (sequence, number of tokens)."""
    everything = list(enumerate(lengths))
    chunked, position = [], [0] * len(lengths)
    while any(p < n for p, n in zip(position, lengths, strict=True)):
        step = [(i, min(chunk, n - position[i])) for i, n in everything if position[i] < n]
        chunked.append(step)
        for i, count in step:
            position[i] += count
    prefill = [(i, n - 5) for i, n in everything]
    return {
        "prefill alone": [[item] for item in everything],
        "packed with others": [everything],
        "chunked prefill": chunked,
        "decode over cache": [prefill, *([[(i, 1) for i, _ in everything]] * 5)],
        "decode beside prefill": [[everything[0]], [(i, n - 1) for i, n in everything[1:]],
                                  [(i, 1) for i, _ in everything[1:]]],
    }  # fmt: skip


def run_schedule(
    steps: list[list[tuple[int, int]]],
    sequences: list[list[int]],
    feeder: Feeder,
    run: Callable[[Feeds], np.ndarray],
) -> list[np.ndarray]:
    """Run the steps; return for each sequence what `run` gave for each of its tokens."""
    rows: list[list[np.ndarray]] = [[] for _ in sequences]
    for step in steps:
        chunks = [(i, sequences[i][feeder.past[i] : feeder.past[i] + n]) for i, n in step]
        output = run(feeder.feeds(chunks))
        ends = np.cumsum([n for _, n in step])
        for (i, n), end in zip(step, ends, strict=True):
            rows[i].append(output[end - n : end])
    return [np.concatenate(parts) for parts in rows]


def run_module(
    module: torch.nn.Module,
    signature: Signature,
    steps: list[list[tuple[int, int]]],
    sequences: list[list[int]],
    dtype: type,
    *,
    leftovers: bool = False,
) -> list[np.ndarray]:
    """Run the steps on a PyTorch module; return the logits of each sequence's tokens.

    Args:
        module: The decoder.
        signature: Its contract.
        steps: Sequences of each step, each with its number of tokens.
        sequences: Token ids of each sequence.
        dtype: Type of the state.
        leftovers: Whether slots of recurrent state hold NaN, as others may have left there.
    """
    feeder = Feeder(signature, len(sequences), max(map(len, sequences)))
    state = {name: torch.from_numpy(a) for name, a in feeder.state(dtype).items()}
    for name in state if leftovers else ():
        if not name.startswith(("key", "value", "next")):
            state[name][:] = torch.nan

    @torch.no_grad()
    def run(feeds: Feeds) -> np.ndarray:
        nonlocal state
        outputs, state = module({k: torch.from_numpy(v) for k, v in feeds.items()}, state)
        return outputs["logits"].numpy()

    return run_schedule(steps, sequences, feeder, run)


def padded(
    feeds: Feeds,
    signature: Signature,
    sizes: StepSizes,
    *,
    spare_slot: int,
    with_logits: bool = False,
) -> tuple[StepShape, Feeds]:
    """Return the shape that a step is padded to, and its padded inputs."""
    shape = sizes.shape(feeds, signature, with_logits=with_logits)
    into = {
        t.name: np.full(shape.of(t), 77, host_dtype(t.dtype))
        for t in signature.step_inputs()
        if t.name != METADATA
    }
    pad(feeds, shape, into, spare_slot=spare_slot)
    return shape, into
