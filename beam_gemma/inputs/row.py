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


ColumnUse = Literal["text", "messages", "value", "key", "images", "audio"]
"""Use of a column in a task: a text, a conversation, a value for a template, a key that names its
row, pictures, or sounds."""
MediaKind = Literal["image", "audio"]
"""Kind of a file in a row: a picture or a sound. Parts of messages have these types."""


@dataclass(frozen=True)
class MediaFile:
    """The bytes of a file with a picture or a sound, as a row has them."""

    data: bytes
    kind: MediaKind = "image"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the bytes, in hex, behind the kind of a sound; computed once, when needed."""
        digest = hashlib.sha256(self.data).hexdigest()
        return digest if self.kind == "image" else f"{self.kind}:{digest}"


@dataclass(frozen=True, slots=True)
class MediaPart(Control):
    """A picture or a sound among the parts of a prompt; chat templates see its `piece`."""

    file: MediaFile
    num_tokens: tuple[int, ...]
    """Number of tokens of each of its views: the whole picture and each crop, or each clip."""


class MediaPlace(NamedTuple):
    """Position in a prompt of the tokens of a picture, a crop of one, or a clip of a sound."""

    start: int
    """Position of its first token."""
    file: int
    """Index of its file among those of the prompt."""
    view: int
    """0 for the whole picture or the first clip; else the number of the crop, in the order of pan
    and scan, or of the clip."""
    num_tokens: int
    """Number of its tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """Prompt of one row, as parts and as token ids."""

    parts: tuple[Part, ...]
    token_ids: tuple[int, ...]
    truncated: bool = False
    places: tuple[MediaPlace, ...] = ()
    """Where pictures and sounds are among the tokens, in order."""
    files: tuple[MediaFile, ...] = ()
    """The files of these, each once."""
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
        digests = [file.digest for file in self.files] if self.places else []
        return [self.token_ids, self.truncated, self.places, digests, *start]

    @classmethod
    def of_identity(
        cls, identity: list[Any], files: Sequence[bytes] = (), others: Iterable[MediaFile] = ()
    ) -> "Prompt":
        """Return the prompt of an identity, without its parts.

        Args:
            identity: What `identity` returned, also after a round trip through JSON.
            files: The bytes of the row's pictures and sounds, in any order.
            others: Files of the prompt that are not the row's, such as those of examples.

        Raises:
            RecordError: a file of the prompt is missing.
        """
        token_ids, truncated, *more = identity
        places, digests, *start = more or ((), ())
        found = {file.digest: file for file in others}
        kinds = {_kind_of(digest) for digest in digests}
        found |= {f.digest: f for data in files for f in (MediaFile(data, kind) for kind in kinds)}
        if missing := [digest for digest in digests if digest not in found]:
            raise RecordError(
                f"media: expected the files of {len(digests)} beside the request, got none of "
                f"{len(missing)}"
            )
        return cls(
            parts=(),
            token_ids=tuple(token_ids),
            truncated=truncated,
            places=tuple(MediaPlace(*place) for place in places),
            files=tuple(found[digest] for digest in digests),
            decoder_token_ids=tuple(start[0]) if start else (),
        )


def _kind_of(digest: str) -> MediaKind:
    """Return the kind of the file that a digest is of."""
    return "audio" if digest.startswith("audio:") else "image"


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
