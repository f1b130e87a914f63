"""Runs llama.cpp through llama-cpp-python: batched decode over its low-level interface.

Weights are the same numbers, in float32 or as quantized in the GGUF file; with quantized weights
llama.cpp also rounds activations to eight bits. The cache is float16 and llama.cpp chooses the
attention kernel, which is its default and fastest setting. A free slot is filled at once; prompts
are computed in batches of their own, several at a time, before decoding continues.
"""

import ctypes
import os
import time
from collections import deque
from dataclasses import dataclass, field

import llama_cpp
import numpy as np

from benchmarks.runs import Job, Run, Step, serve, timed_run
from benchmarks.workload import Row

MAX_BATCH_TOKENS = 2048
PAGE = 256
"""Number of tokens to a multiple of which llama.cpp rounds up a sequence's cache."""


@dataclass(slots=True)
class Slot:
    """A sequence of llama.cpp's cache in use by a row."""

    number: int
    row: int
    max_tokens: int
    position: int
    token_ids: list[int] = field(default_factory=list)


class Model:
    """A loaded model with a cache for `num_sequences` sequences of at most `longest` tokens."""

    def __init__(self, path: str, *, num_sequences: int, longest: int) -> None:
        self._silent = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silent, None)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        self.num_tokens = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        context = llama_cpp.llama_context_default_params()
        context.n_seq_max = num_sequences
        context.n_ctx = num_sequences * -(-longest // PAGE) * PAGE
        context.n_batch = MAX_BATCH_TOKENS
        context.n_outputs_max = num_sequences
        context.n_threads = context.n_threads_batch = os.cpu_count()
        context.swa_full = False
        self._context = llama_cpp.llama_init_from_model(model, context)
        self._batch = llama_cpp.llama_batch_init(MAX_BATCH_TOKENS, 0, 1)

    def choose(self, chunks: list[tuple[int, int, list[int]]]) -> list[int]:
        """Compute (sequence, position, token ids) chunks; return the best next token of each."""
        last = []
        batch, n = self._batch, 0
        for sequence, position, token_ids in chunks:
            for offset, token_id in enumerate(token_ids):
                batch.token[n], batch.pos[n] = token_id, position + offset
                batch.n_seq_id[n], batch.seq_id[n][0], batch.logits[n] = 1, sequence, False
                n += 1
            batch.logits[n - 1] = True
            last.append(n - 1)
        batch.n_tokens = n
        if code := llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode: expected 0, got {code}")
        return [int(self._logits(i).argmax()) for i in last]

    def forget(self, sequence: int) -> None:
        """Remove a sequence's tokens from the cache."""
        memory = llama_cpp.llama_get_memory(self._context)
        llama_cpp.llama_memory_seq_rm(memory, sequence, -1, -1)

    def _logits(self, position: int) -> np.ndarray:
        pointer = llama_cpp.llama_get_logits_ith(self._context, position)
        address = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(address, shape=(self.num_tokens,))


class Batcher:
    """Completes rows with continuous batching: a free sequence takes the next row."""

    def __init__(self, model: Model, num_sequences: int) -> None:
        self._model = model
        self._free = list(range(num_sequences))
        self._running: list[Slot] = []

    def complete(self, rows: list[Row]) -> tuple[list[list[int]], list[Step]]:
        """Return the new tokens of each row, and the steps."""
        # Longest completion first, like our engine, to keep the slots full to the end.
        waiting = deque(sorted(enumerate(rows), key=lambda item: -item[1].max_tokens))
        self._done: list[list[int]] = [[] for _ in rows]
        steps, before = [], time.perf_counter()
        while waiting or self._running:
            num_prompt_tokens, num_rows = (
                self._prefill(waiting) if waiting and self._free else self._decode()
            )
            now = time.perf_counter()
            steps.append(Step(now - before, num_prompt_tokens, num_rows))
            before = now
        return self._done, steps

    def _prefill(self, waiting: deque[tuple[int, Row]]) -> tuple[int, int]:
        """Compute as many whole prompts as fit into the free slots and one batch."""
        slots, chunks, room = [], [], MAX_BATCH_TOKENS
        while waiting and self._free and len(waiting[0][1].prompt_token_ids) <= room:
            number, row = waiting.popleft()
            prompt = list(row.prompt_token_ids)
            room -= len(prompt)
            slots.append(Slot(self._free.pop(), number, row.max_tokens, len(prompt)))
            chunks.append((slots[-1].number, 0, prompt))
        self._running += slots
        self._accept(slots, self._model.choose(chunks))
        return MAX_BATCH_TOKENS - room, len(slots)

    def _decode(self) -> tuple[int, int]:
        slots = list(self._running)
        chunks = [(slot.number, slot.position, slot.token_ids[-1:]) for slot in slots]
        for slot in slots:
            slot.position += 1
        self._accept(slots, self._model.choose(chunks))
        return 0, len(slots)

    def _accept(self, slots: list[Slot], token_ids: list[int]) -> None:
        for slot, token_id in zip(slots, token_ids, strict=True):
            slot.token_ids.append(token_id)
            if len(slot.token_ids) == slot.max_tokens:
                self._done[slot.row] = slot.token_ids
                self._running.remove(slot)
                self._model.forget(slot.number)
                self._free.append(slot.number)


def run(job: Job) -> Run:
    """Complete all rows."""
    longest = max(len(row.prompt_token_ids) + row.max_tokens for row in job.rows)
    model = Model(job.weights, num_sequences=job.batch_size, longest=longest)
    return timed_run(job, Batcher(model, job.batch_size).complete)


if __name__ == "__main__":
    serve(run)
