"""Control pieces with which models call functions.

Gemma 4 and FunctionGemma write a call alike, as `call:NAME{key:value}` between two control pieces,
with a third one at either end of each string. They differ in the names of these pieces.
Sources: Gemma 4's chat template, and the formatting page of FunctionGemma at ai.google.dev.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CallPieces:
    """Names of the control pieces of one family of models."""

    start: str
    """Stands before a call."""
    end: str
    """Stands behind a call."""
    quote: str
    """Stands at either end of a string."""
    response: str
    """Starts the result of a function, which no model may write: it ends a completion."""


GEMMA_4 = CallPieces("<|tool_call>", "<tool_call|>", '<|"|>', "<|tool_response>")
FUNCTION_GEMMA = CallPieces(
    "<start_function_call>", "<end_function_call>", "<escape>", "<start_function_response>"
)


def call_pieces(control_pieces: Iterable[str]) -> CallPieces | None:
    """Return the pieces of calls that a vocabulary has; None for a model that calls nothing.

    Args:
        control_pieces: The tokenizer's control pieces.
    """
    known = set(control_pieces)
    for pieces in (GEMMA_4, FUNCTION_GEMMA):
        if known >= {pieces.start, pieces.end, pieces.quote}:
            return pieces
    return None


def response_ids(control_pieces: Mapping[str, int]) -> tuple[int, ...]:
    """Return the token ids, if any, that start the result of a function.

    Args:
        control_pieces: The tokenizer's control pieces with their token ids.
    """
    names = (pieces.response for pieces in (GEMMA_4, FUNCTION_GEMMA))
    return tuple(control_pieces[name] for name in names if name in control_pieces)
