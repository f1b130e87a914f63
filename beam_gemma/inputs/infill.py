"""Infill prompts in CodeGemma's format, for text with a gap.

A prompt consists of the text before the gap and the text after it; the model then generates the
text in between. Source: the prompt structure of CodeGemma at ai.google.dev/gemma/docs/codegemma.
"""

from collections.abc import Mapping
from typing import Any

from beam_gemma.errors import OptionsError
from beam_gemma.inputs.template import column_text
from beam_gemma.model.markup import Control, ControlPieces, Part

PREFIX, SUFFIX, MIDDLE = "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"
FILE_SEPARATOR = "<|file_separator|>"
PIECES = (PREFIX, SUFFIX, MIDDLE, FILE_SEPARATOR)
"""Control pieces of infilling; each ends the generated text, according to the model card."""


class Infill:
    """Prompt made of the text before a gap and the text after it; either may be empty.

    Args:
        prefix_column: Column with the text before the gap.
        suffix_column: Column with the text after the gap.
        control_pieces: Token ids of the tokenizer's control pieces.
        allow_special_tokens: Whether to recognize control pieces in the values of rows.

    Raises:
        OptionsError: the tokenizer lacks one of `PIECES`.
    """

    def __init__(
        self,
        prefix_column: str,
        suffix_column: str,
        control_pieces: Mapping[str, int],
        *,
        allow_special_tokens: bool = False,
    ) -> None:
        for piece in PIECES:
            if piece not in control_pieces:
                raise OptionsError(
                    f"prefix_column: expected a model that fills gaps, such as CodeGemma, got one "
                    f"whose tokenizer has no {piece}"
                )
        self.fields = (prefix_column, suffix_column)
        self.stop_token_ids = tuple(control_pieces[piece] for piece in PIECES)
        """Token ids that end generated text, in addition to the model's own end tokens."""
        self._markup = ControlPieces(control_pieces if allow_special_tokens else ())

    def render(self, row: Mapping[str, Any]) -> tuple[Part, ...]:
        """Return the prompt of one row.

        Raises:
            RecordError: a column is missing or null, or cannot be written as text.
        """
        before, after = (self._markup.split(column_text(row, column)) for column in self.fields)
        return (Control(PREFIX), *before, Control(SUFFIX), *after, Control(MIDDLE))
