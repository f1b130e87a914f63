"""Rows and their prompts: types for both, uses of columns, and errors of rows."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from beam_gemma.errors import BeamGemmaError, OptionsError, RecordError
from beam_gemma.model.markup import Control, Part

Row = Mapping[str, Any] | str


ColumnUse = Literal["text", "messages", "value", "key", "images"]
"""Use of a column in a task: a text, a conversation, a value for a template, a key that names its
row, or pictures."""


@dataclass(frozen=True)
class ImageFile:
    """The bytes of a picture's file, as a row has them."""

    data: bytes

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the bytes, in hex; it is computed once, where it is needed."""
        return hashlib.sha256(self.data).hexdigest()


class ImagePlace(NamedTuple):
    """Position in a prompt of the tokens of a picture, or of one of its crops."""

    start: int
    """Position of its first token."""
    image: int
    """Index of the picture among those of the row."""
    crop: int = 0
    """0 for the whole picture, else the number of the crop, in the order of pan and scan."""
    num_tokens: int = 0
    """Number of its tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """Prompt of one row, as parts and as token ids."""

    parts: tuple[Part, ...]
    token_ids: tuple[int, ...]
    truncated: bool = False
    places: tuple[ImagePlace, ...] = ()
    """Where pictures are among the tokens, in order."""
    images: tuple[ImageFile, ...] = ()
    """All pictures of the row."""
    decoder_token_ids: tuple[int, ...] = ()
    """Tokens that the decoder of an encoder-decoder starts with, `<bos>` included; `token_ids` is
    then the source, which its encoder reads. Empty for other models."""
    decoder_parts: tuple[Part, ...] = ()
    """What the decoder starts with, as parts, without `<bos>`."""

    @property
    def source_token_ids(self) -> tuple[int, ...]:
        """Tokens that the encoder of an encoder-decoder reads; empty for other models."""
        return self.token_ids if self.decoder_token_ids else ()

    @property
    def start_token_ids(self) -> tuple[int, ...]:
        """Tokens that the model continues: the prompt, or what a decoder with an encoder has."""
        return self.decoder_token_ids or self.token_ids

    @property
    def text(self) -> str:
        """Readable text of the prompt."""
        return as_text(self.parts)

    @property
    def decoder_text(self) -> str:
        """Readable text of what the decoder starts with, without `<bos>`."""
        return as_text(self.decoder_parts)

    @property
    def identity(self) -> list[Any]:
        """JSON-serializable value that is equal only for equal prompts."""
        start = [self.decoder_token_ids] if self.decoder_token_ids else []
        if not self.places and not start:
            return [self.token_ids, self.truncated]
        digests = [image.digest for image in self.images] if self.places else []
        return [self.token_ids, self.truncated, self.places, digests, *start]

    @classmethod
    def of_identity(
        cls, identity: list[Any], images: Sequence[bytes] = (), others: Iterable[ImageFile] = ()
    ) -> "Prompt":
        """Return the prompt of an identity, without its parts.

        Args:
            identity: What `identity` returned, also after a round trip through JSON.
            images: The bytes of the row's pictures, in any order.
            others: Pictures of the prompt that are not the row's, such as those of examples.

        Raises:
            RecordError: a picture of the prompt is missing.
        """
        token_ids, truncated, *more = identity
        places, digests, *start = more or ((), ())
        files = {image.digest: image for image in (*map(ImageFile, images), *others)}
        if missing := [digest for digest in digests if digest not in files]:
            raise RecordError(
                f"pictures: expected the files of {len(digests)} beside the request, got none of "
                f"{len(missing)}"
            )
        return cls(
            parts=(),
            token_ids=tuple(token_ids),
            truncated=truncated,
            places=tuple(ImagePlace(*place) for place in places),
            images=tuple(files[digest] for digest in digests),
            decoder_token_ids=tuple(start[0]) if start else (),
        )


def as_text(parts: Sequence[Part]) -> str:
    """Return parts as readable text, including control pieces."""
    return "".join(part.piece if isinstance(part, Control) else part.text for part in parts)


@contextmanager
def rows_own_errors() -> Iterator[None]:
    """Context manager that turns unexpected exceptions into an error of the current row.

    Raises:
        RecordError: the block raised an exception that is no `BeamGemmaError`.
    """
    try:
        yield
    except BeamGemmaError:
        raise
    except Exception as error:  # converting a row's values to text may raise anything
        raise RecordError(
            f"row: expected one that makes a prompt, got {type(error).__name__}: {error}"
        ) from error


@contextmanager
def shots_own_errors() -> Iterator[None]:
    """Context manager that turns exceptions into an error of the few-shot examples.

    It quotes no row: a `RecordError` about a value names only its column, and of other exceptions,
    whose messages may hold anything, it gives the type.

    Raises:
        OptionsError: the block raised an exception.
    """
    expected = "shots: expected rows that make a prompt and a label, got"
    try:
        yield
    except RecordError as error:
        raise OptionsError(f"{expected}: {error}") from error
    except BeamGemmaError:
        raise
    except Exception as error:  # converting a row's values to text may raise anything
        raise OptionsError(f"{expected} {type(error).__name__} from one of them") from error
