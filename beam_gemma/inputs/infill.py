"""Text with a gap, as CodeGemma was trained to fill it.

The text before the gap and the text after it come first, then the model writes what belongs
between. Source: the prompt structure of CodeGemma at ai.google.dev/gemma/docs/codegemma.
"""

from collections.abc import Mapping
from typing import Any

from beam_gemma.errors import OptionsError
from beam_gemma.inputs.template import column_text
from beam_gemma.model.markup import Control, ControlPieces, Part

PREFIX, SUFFIX, MIDDLE = "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"
FILE_SEPARATOR = "<|file_separator|>"
PIECES = (PREFIX, SUFFIX, MIDDLE, FILE_SEPARATOR)
"""All end what the model writes, as its card says."""


class Infill:
    """A prompt made of what stands before a gap and after it, either of which may be empty.

    Args:
        prefix_column: Holds the text before the gap.
        suffix_column: Holds the text after the gap.
        control_pieces: Ids of the tokenizer's.
        allow_special_tokens: Find them in the values of rows as well.

    Raises:
        OptionsError: the tokenizer has no such pieces.
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
        """What ends a filling, beside the model's own end tokens."""
        self._markup = ControlPieces(control_pieces if allow_special_tokens else ())

    def render(self, row: Mapping[str, Any]) -> tuple[Part, ...]:
        """Return the prompt of one row.

        Raises:
            RecordError: a column is missing or null, or cannot be written as text.
        """
        before, after = (self._markup.split(column_text(row, column)) for column in self.fields)
        return (Control(PREFIX), *before, Control(SUFFIX), *after, Control(MIDDLE))
