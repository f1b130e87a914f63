"""Thoughts that a model such as Gemma 4 writes before its answer, apart from the completion.

A thought stands between two control tokens and begins with the name of its channel. It is told
apart by token ids, never by text: a row that quotes these pieces, or an answer that spells them,
has other tokens.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from beam_gemma.engine.thoughts import Thinking, Thoughts
from beam_gemma.errors import OptionsError
from beam_gemma.model.tokenizer import Tokenizer

BEGIN, END = "<|channel>", "<channel|>"
"""Control pieces around a thought."""
CHANNEL = "thought"
"""Name of the channel, which is the first line of a thought and not part of its text."""
DEFAULT_TOKENS = 1024
"""Most tokens of thoughts if the settings name no limit."""


class Parts(NamedTuple):
    """The token ids of a completion, by what they belong to."""

    thoughts: list[list[int]]
    """Those within each thought, without its control tokens."""
    answer: list[int]


def thinking_of(
    tokenizer: Tokenizer, prompt_token_ids: Sequence[int], *, max_tokens: int | None
) -> Thinking | None:
    """Return how a completion's thoughts are recognized; None for a model that has none.

    Args:
        tokenizer: The tokenizer of the model.
        prompt_token_ids: The tokens that the model continues.
        max_tokens: The limit of thoughts; see `Thinking.max_tokens`.
    """
    pieces = tokenizer.control_pieces
    if not pieces.keys() >= {BEGIN, END}:
        return None
    controls = frozenset(pieces.values())
    last = next((i for i in reversed(prompt_token_ids) if i in controls), None)
    return Thinking(
        begin_id=pieces[BEGIN],
        end_id=pieces[END],
        max_tokens=max_tokens,
        is_begun=last == pieces[BEGIN],
    )


def parts_of(token_ids: Iterable[int], thinking: Thinking | None) -> Parts:
    """Return the thoughts and the answer of a completion."""
    if thinking is None:
        return Parts([], list(token_ids))
    state = Thoughts(thinking)
    parts = Parts([[]] if state.is_open else [], [])
    for token_id in token_ids:
        was_open = state.is_open
        if state.take(token_id):
            parts.answer.append(token_id)
        elif not was_open:
            parts.thoughts.append([])
        elif state.is_open:
            parts.thoughts[-1].append(token_id)
    return parts


def text_of(thoughts: Sequence[Sequence[int]], tokenizer: Tokenizer) -> str | None:
    """Return the text of thoughts, without the names of channels; None for no thoughts."""
    texts = []
    for token_ids in thoughts:
        # The last token may be only part of a character.
        name, newline, text = tokenizer.decode(token_ids, final=False).partition("\n")
        texts.append((text if name == CHANNEL else name + newline + text).strip())
    return "\n\n".join(texts) if texts else None


def check_thinking(tokenizer: Tokenizer, chat_template: str | None) -> None:
    """Check that a model can think; its chat template is tried when prompts are made.

    Args:
        tokenizer: The tokenizer of the model.
        chat_template: The chat template of its prompts; None for prompts without a chat.

    Raises:
        OptionsError: the model has no chat template, or no control pieces of thoughts.
    """
    if chat_template is None:
        raise OptionsError(
            "thinking: expected a model with a chat template, such as Gemma 4, got one without"
        )
    if not tokenizer.control_pieces.keys() >= {BEGIN, END}:
        raise OptionsError(
            f"thinking: expected a model such as Gemma 4, with {BEGIN} and {END} in its "
            "vocabulary, got one without; leave thinking out"
        )
