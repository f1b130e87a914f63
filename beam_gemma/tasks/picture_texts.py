"""Texts with pictures on their way to the steps that embed them.

Pictures are decoded in the threads of a `MediaWindow`. The caller's thread gathers decoded rows
until they fill a step, or until no further row can start before some are finished, and runs it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from queue import SimpleQueue
from typing import TypeAlias

from beam_gemma.engine.embedding_engine import EmbeddingSteps, Result
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.sequence import Request
from beam_gemma.errors import RecordError
from beam_gemma.inputs.row import Prompt
from beam_gemma.tasks.engine_model import MAX_DECODED_BYTES
from beam_gemma.tasks.media_requests import MediaDecoder, MediaWindow, Work

MAX_ROWS = 256
"""Most rows that are decoded and not finished."""
DecodedRow: TypeAlias = tuple[Work, Callable[[Work], None] | None]
"""A decoded row and what to call once it is finished; None for a row that has a fault."""


def work_of(index: int, prompt: Prompt) -> Work:
    """Return the work of embedding one prompt.

    Args:
        index: Its index among those of the call.
        prompt: The prompt, with its pictures.
    """
    params = SamplingParams(max_tokens=1)  # an embedding draws no token
    request = Request(request_id=str(index), prompt_token_ids=prompt.token_ids, params=params)
    return Work(index=index, asked=[(prompt, request)])


def embedded(
    works: Sequence[Work], decoder: MediaDecoder, steps: EmbeddingSteps
) -> Iterator[tuple[int, Result]]:
    """Yield the index of each row and its embedding, or the error of its pictures.

    Args:
        works: Rows with pictures.
        decoder: The decoder of their pictures.
        steps: The steps that run the model.

    Raises:
        EngineError: the device failed.
    """
    decoded: SimpleQueue[DecodedRow] = SimpleQueue()

    def on_end(work: Work) -> None:
        if work.fault is not None:
            decoded.put((work, None))

    window = MediaWindow(
        works,
        decoder,
        send=lambda work, end: decoded.put((work, end)),
        on_end=on_end,
        max_rows=MAX_ROWS,
        max_bytes=MAX_DECODED_BYTES,
    )
    num_left = len(works)
    with closing(window):
        while num_left and not steps.is_drained:
            taken = _taken(decoded, window, steps.max_num_batched_tokens)
            num_left -= len(taken)
            yield from _run(taken, decoder, steps)


def _taken(
    decoded: SimpleQueue[DecodedRow], window: MediaWindow[Work], max_num_batched_tokens: int
) -> list[DecodedRow]:
    """Wait for decoded rows of one step, or as many as the window lets start."""
    taken: list[DecodedRow] = []
    num_tokens = num_held = 0
    while not taken or (num_tokens < max_num_batched_tokens and num_held < window.num_rows):
        work, end = decoded.get()
        taken.append((work, end))
        if end is not None:
            num_held += 1
            num_tokens += len(work.asked[0][0].token_ids)
    return taken


def _run(
    taken: Sequence[DecodedRow], decoder: MediaDecoder, steps: EmbeddingSteps
) -> Iterator[tuple[int, Result]]:
    """Embed decoded rows; let the window forget each of them."""
    for work, _ in taken:
        if isinstance(work.fault, RecordError):
            yield work.index, str(work.fault)
        elif work.fault is not None:
            raise work.fault
    held = [(work, end) for work, end in taken if end is not None]
    requests = [decoder.completed(*work.asked[0], work.decoded) for work, _ in held]
    texts = [request.prompt_token_ids for request in requests]
    media = {number: request.media for number, request in enumerate(requests)}
    for number, result in steps(texts, media):
        yield held[number][0].index, result
    for work, end in held:
        end(work)
