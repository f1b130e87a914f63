"""Pictures and sounds in prompts: their places, and the tokens that each of them takes.

Token ids are those of transformers' processors. A picture or a sound is a part of a prompt, never
text: what a row writes, be it `<start_of_image>`, stays text.
"""

import itertools
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from beam_gemma.errors import RecordError
from beam_gemma.inputs.image_prompt import ImagePrompts
from beam_gemma.inputs.images import ImageSettings
from beam_gemma.inputs.row import MediaKind, MediaPart, MediaPlace, Prompt, Row
from beam_gemma.inputs.sound_prompt import SoundPrompts
from beam_gemma.inputs.sounds import SoundSettings
from beam_gemma.model.markup import Control, Part, SoftTokens
from beam_gemma.model.sound_config import SoundConfig
from beam_gemma.model.tokenizer import Tokenizer
from beam_gemma.model.vision_config import VisionConfig

RowMedia = Mapping[str, tuple[MediaPart, ...]]
"""The pictures and sounds of a row, by column."""


@runtime_checkable
class MediaSettings(ImageSettings, SoundSettings, Protocol):
    """The settings of pictures and sounds in rows, such as `PromptSettings`."""


class MediaPrompts:
    """Puts the pictures and sounds of rows into prompts, or refuses them if the model takes none.

    Args:
        tokenizer: The model's tokenizer.
        vision: What the model says of pictures; None if it takes none.
        sound: What the model says of sounds; None if it takes none.
        settings: The columns with pictures and sounds, and how they are taken.
        vocab_size: Number of token ids that the decoder knows; None for that of the tokenizer.

    Raises:
        OptionsError: the model does not take what the settings have, or cannot do without pictures.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vision: VisionConfig | None,
        sound: SoundConfig | None,
        settings: MediaSettings,
        *,
        vocab_size: int | None = None,
    ) -> None:
        size = tokenizer.vocab_size if vocab_size is None else vocab_size
        self._tokenizer, self._settings = tokenizer, settings
        self._images = ImagePrompts(vision, settings, size)
        self._kinds: dict[MediaKind, ImagePrompts | SoundPrompts] = {
            "image": self._images,
            "audio": SoundPrompts(sound, settings, size),
        }
        self.pieces = {k: each.piece for k, each in self._kinds.items() if each.piece is not None}
        """What chat templates write for each kind that the model takes."""

    def of_row(self, row: Row, *, decode: bool = False) -> dict[str, tuple[MediaPart, ...]]:
        """Return the pictures and sounds of each of their columns.

        Args:
            row: The row.
            decode: True to decode them too, so that a damaged one is found here.

        Raises:
            RecordError: a value is no picture or sound, or is missing.
        """
        return {
            column: tuple(
                each.part(name, file, decode=decode) for name, file in each.in_column(row, column)
            )
            for each in self._kinds.values()
            for column in each.columns
        }

    def of_messages(
        self, messages: Sequence[Mapping[str, Any]], of_row: Iterable[MediaPart], column: str
    ) -> list[MediaPart]:
        """Return the media of a conversation: those of its parts, or else the next of the row.

        Args:
            messages: The conversation, which a chat template has taken.
            of_row: The media of the row's own columns, in order.
            column: The column of the conversation.

        Raises:
            RecordError: there are more or fewer parts than media, or a part's is none.
        """
        contents = (m["content"] for m in messages if isinstance(m["content"], list))
        parts = [p for content in contents for p in content if p["type"] in self._kinds]
        left: dict[str, deque[MediaPart]] = defaultdict(deque)
        for part in of_row:
            left[part.file.kind].append(part)
        numbers: dict[str, Iterator[int]] = defaultdict(lambda: itertools.count(1))
        own = [self._kinds[p["type"]].own(p, column, next(numbers[p["type"]])) for p in parts]
        for kind, each in self._kinds.items():
            missing = sum(o is None and p["type"] == kind for o, p in zip(own, parts, strict=True))
            if missing != len(left[kind]):
                raise RecordError(
                    f"column {column!r}: expected as many parts of type {kind} without "
                    f"{each.article} of their own as the row has {each.plural}, which are "
                    f"{len(left[kind])}, got {missing}"
                )
        return [o or left[p["type"]].popleft() for o, p in zip(own, parts, strict=True)]

    def prompt(
        self, parts: Sequence[Part], media: Sequence[MediaPart], *, truncated: bool = False
    ) -> Prompt:
        """Return the prompt of parts in which media or their pieces stand.

        Args:
            parts: The parts.
            media: The pictures and sounds; those of a kind are in the order of their places.
            truncated: Whether a text was cut.

        Raises:
            RecordError: the parts have more or fewer places than there are media.
        """
        settings = self._settings
        if not (media or settings.image_columns or settings.audio_columns):
            parts = self._images.finished(parts)
            text_ids = tuple(self._tokenizer.encode(parts))
            return Prompt(parts=tuple(parts), token_ids=text_ids, truncated=truncated)
        parts = self._images.finished(self._placed(parts, media))
        media = [part for part in parts if isinstance(part, MediaPart)]
        files = {part.file.digest: part.file for part in media}
        written = tuple(self._expanded(parts))
        ids, starts = _encoded(self._tokenizer, written)
        indices = {digest: index for index, digest in enumerate(files)}
        views = (
            (indices[part.file.digest], view, num_tokens)
            for part in media
            for view, num_tokens in enumerate(part.num_tokens)
        )
        return Prompt(
            parts=written,
            token_ids=tuple(ids),
            truncated=truncated,
            places=tuple(MediaPlace(s, *view) for s, view in zip(starts, views, strict=True)),
            files=tuple(files.values()),
        )

    def _expanded(self, parts: Iterable[Part]) -> Iterator[Part]:
        """Yield parts with the tokens of media and what stands around them."""
        for part in parts:
            if isinstance(part, MediaPart):
                yield from self._kinds[part.file.kind].expanded(part)
            else:
                yield part

    def _placed(self, parts: Sequence[Part], media: Sequence[MediaPart]) -> list[Part]:
        """Return parts with the media in place of their pieces, each kind in its order."""
        placed = list(parts)
        for kind, each in self._kinds.items():
            own = [medium for medium in media if medium.file.kind == kind]
            places = [
                index
                for index, part in enumerate(parts)
                if isinstance(part, Control) and part.piece == each.piece
            ]
            if len(places) != len(own):
                raise RecordError(
                    f"prompt: expected as many places of {each.plural} ({each.piece}) as the row "
                    f"has {each.plural}, which are {len(own)}, got {len(places)}"
                )
            for index, medium in zip(places, own, strict=True):
                placed[index] = medium
        return placed


def _encoded(tokenizer: Tokenizer, parts: Sequence[Part]) -> tuple[list[int], list[int]]:
    """Return what the tokenizer gives for parts, and where the tokens of each medium start."""
    ids: list[int] = []
    starts: list[int] = []
    for are_soft, group in itertools.groupby(parts, lambda part: isinstance(part, SoftTokens)):
        for few in ([part] for part in group) if are_soft else [list(group)]:
            starts += [len(ids)] * are_soft
            ids += tokenizer.encode(few, add_bos=False)
    if not tokenizer.has_bos(parts, ids):
        ids.insert(0, tokenizer.bos_token_id)
        starts = [start + 1 for start in starts]
    return ids, starts
