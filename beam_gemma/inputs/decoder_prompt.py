"""The decoder of an encoder-decoder starts with `<bos>` and the decoder prompt, the user's text.

The prompt of such a model is the source, which its encoder reads. The decoder prompt is apart from
it: it is never part of a chat turn, and it is not cut.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from beam_gemma.errors import OptionsError, PromptTooLongError, RecordError
from beam_gemma.inputs.row import Prompt, Row
from beam_gemma.inputs.template import Template
from beam_gemma.model.markup import Part
from beam_gemma.model.tokenizer import Tokenizer

REMEDY = "pass the start of its answer as decoder_prompt (--decoder_prompt)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoder:
    """The properties of a decoder that its prompts must respect."""

    model_type: str
    """Architecture, for messages."""
    max_tokens: int
    """Most tokens that the decoder takes before its answer, `<bos>` included."""


class DecoderPrompts:
    """Adds to prompts what the decoder starts with.

    Args:
        tokenizer: The model's tokenizer.
        template: Markup with column names in braces; None for `<bos>` alone.
        decoder: The model's decoder.
        allow_special_tokens: Whether to recognize control pieces in the values of rows.

    Raises:
        OptionsError: the template is malformed.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str | None,
        decoder: Decoder,
        *,
        allow_special_tokens: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._decoder = decoder
        self._template = Template(
            template or "",
            tokenizer.control_pieces,
            allow_special_tokens=allow_special_tokens,
            name="decoder_prompt",
        )

    def parts(self, row: Row) -> tuple[Part, ...]:
        """Return the decoder prompt of a row, without `<bos>`.

        Raises:
            RecordError: a column is missing or null, or cannot be written as text.
        """
        fields = self._template.fields
        if isinstance(row, str) and fields:
            raise RecordError(
                f"row: expected columns {', '.join(fields)} for the decoder prompt, got a text"
            )
        values: Mapping[str, Any] = {} if isinstance(row, str) else row
        return self._template.render(values)

    def started(self, prompt: Prompt, row: Row, *, num_answer_tokens: int) -> Prompt:
        """Return the prompt of a row with what the decoder starts with.

        Args:
            prompt: The source.
            row: The row.
            num_answer_tokens: Number of the decoder's tokens to reserve for the answer.

        Raises:
            RecordError: the row makes no decoder prompt, or one that is too long.
        """
        parts = self.parts(row)
        token_ids = tuple(self._tokenizer.encode(parts))
        most = self._decoder.max_tokens - num_answer_tokens
        if len(token_ids) > most:
            raise PromptTooLongError(
                f"decoder_prompt: expected at most {most:,} tokens with <bos>, so that the answer "
                f"has room, got {len(token_ids):,}; shorten it or the answer"
            )
        return replace(prompt, decoder_token_ids=token_ids, decoder_parts=parts)

    def check_conversation(self, role: str) -> None:
        """Check that the last message of a conversation is none that the decoder should continue.

        Args:
            role: Role of the last message.

        Raises:
            RecordError: it is the assistant's.
        """
        if role in ("assistant", "model"):
            raise RecordError(
                f"messages: expected the last one to be the user's, as the encoder of a "
                f"{self._decoder.model_type} model reads the whole conversation, got {role!r}; "
                f"{REMEDY}"
            )


def decoder_prompts(
    tokenizer: Tokenizer,
    template: str | None,
    decoder: Decoder | None,
    *,
    allow_special_tokens: bool,
) -> DecoderPrompts | None:
    """Return what adds to prompts the start of a decoder; None for a model without an encoder."""
    if decoder is None:
        return None
    return DecoderPrompts(tokenizer, template, decoder, allow_special_tokens=allow_special_tokens)


def check_decoder(
    decoder: Decoder | None, *, decoder_prompt: str | None, prefix_column: str | None
) -> None:
    """Check the settings of prompts against the architecture of a model.

    Args:
        decoder: The decoder of an encoder-decoder; None for other models.
        decoder_prompt: Template of the text that the decoder starts with.
        prefix_column: Column with the text before a gap.

    Raises:
        OptionsError: the architecture cannot do what a setting asks for.
    """
    if decoder is None and decoder_prompt is not None:
        raise OptionsError(
            "decoder_prompt: expected an encoder-decoder such as T5Gemma, got a model that "
            "continues its prompt; put the text at the end of the prompt"
        )
    if decoder is not None and prefix_column is not None:
        raise OptionsError(
            f"prefix_column: expected a model that fills gaps, such as CodeGemma, got an "
            f"encoder-decoder of type {decoder.model_type}; pass a prompt"
        )
