"""Pictures in prompts: their places, and the tokens that each of them takes.

Token ids are those of transformers' `Gemma3Processor` and `PaliGemmaProcessor`. A picture is a part
of a prompt, never text: what a row writes, be it `<start_of_image>`, stays text.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from beam_gemma.errors import OptionsError, RecordError
from beam_gemma.inputs.chat_template import picture_key
from beam_gemma.inputs.image_processor import ImageProcessor, read_header
from beam_gemma.inputs.images import ImageSettings, column_images, image_file, image_value
from beam_gemma.inputs.row import ImageFile, ImagePlace, Prompt, Row
from beam_gemma.model.markup import Control, Part, SoftTokens, Text
from beam_gemma.model.tokenizer import Tokenizer
from beam_gemma.model.vision_config import IMAGE_TOKENS, VisionConfig

READABLE = "[picture]"
"""What people read in place of the tokens of a picture."""
_BEFORE, _BETWEEN = (
    "Here is the original image ",
    " and here are some crops to help you see better ",
)
"""Texts around a picture that has crops, as `Gemma3Processor` writes them."""


@dataclass(frozen=True, slots=True)
class PicturePart(Control):
    """A picture among the parts of a prompt; chat templates see its `piece`."""

    image: ImageFile
    num_crops: int
    """Number of crops that the prompt shows beside the whole picture."""
    num_tokens: int
    """Number of tokens of the picture, and of each crop."""


class ImagePrompts:
    """Puts the pictures of rows into prompts, or refuses them if the model takes none.

    Args:
        tokenizer: The model's tokenizer.
        vision: What the model says of pictures; None if it takes none.
        settings: The columns with pictures, and whether crops are added.
        vocab_size: Number of token ids that the decoder knows; None for that of the tokenizer.

    Raises:
        OptionsError: the model takes no pictures, or cannot do without.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vision: VisionConfig | None,
        settings: ImageSettings,
        *,
        vocab_size: int | None = None,
    ) -> None:
        self._tokenizer, self._vision, self._settings = tokenizer, vision, settings
        _check(vision, settings)
        self.piece = None if vision is None else vision.piece or READABLE
        """What chat templates write for a picture; None if the model takes none."""
        if vision is not None:
            size = tokenizer.vocab_size if vocab_size is None else vocab_size
            self._token_id = vision.image_token_id if vision.image_token_id < size else 0
            self._processor = ImageProcessor(
                vision, settings.pan_and_scan, image_tokens=settings.image_tokens
            )

    def of_row(self, row: Row, *, decode: bool = False) -> dict[str, tuple[PicturePart, ...]]:
        """Return the pictures of each image column.

        Args:
            row: The row.
            decode: True to decode the pictures too, so that a damaged one is found here.

        Raises:
            RecordError: a value is no picture, or is missing.
        """
        settings = self._settings
        return {
            column: tuple(
                self._picture(name, image, decode=decode)
                for name, image in column_images(row, column, settings)
            )
            for column in settings.image_columns
        }

    def of_messages(
        self, messages: Sequence[Mapping[str, Any]], of_row: Iterable[PicturePart], column: str
    ) -> list[PicturePart]:
        """Return the pictures of a conversation: those of its parts, or else the next of the row.

        Args:
            messages: The conversation, which a chat template has taken.
            of_row: The pictures of the row's image columns, in order.
            column: The column of the conversation.

        Raises:
            RecordError: there are more or fewer parts than pictures, or a part's is no picture.
        """
        contents = (m["content"] for m in messages if isinstance(m["content"], list))
        parts = [p for content in contents for p in content if p["type"] == "image"]
        own = [self._own(p, column, number) for number, p in enumerate(parts, 1)]
        left = list(of_row)
        if own.count(None) != len(left):
            raise RecordError(
                f"column {column!r}: expected as many parts of type image without a picture of "
                f"their own as the row has pictures, which are {len(left)}, got {own.count(None)}"
            )
        return [picture or left.pop(0) for picture in own]

    def prompt(
        self, parts: Sequence[Part], pictures: Sequence[PicturePart], *, truncated: bool = False
    ) -> Prompt:
        """Return the prompt of parts in which pictures or their pieces stand.

        Args:
            parts: The parts.
            pictures: The pictures in the order of their places.
            truncated: Whether a text was cut.

        Raises:
            RecordError: the parts have more or fewer places than pictures.
        """
        if self._vision is None or not (pictures or self._settings.image_columns):
            parts = self._finished(parts)
            text_ids = tuple(self._tokenizer.encode(parts))
            return Prompt(parts=tuple(parts), token_ids=text_ids, truncated=truncated)
        parts = self._finished(_placed(parts, pictures, self.piece))
        images = {picture.image.digest: picture.image for picture in pictures}
        written = tuple(self._expanded(parts, self._vision))
        ids, starts = _encoded(self._tokenizer, written)
        indices = {digest: index for index, digest in enumerate(images)}
        crops = (
            (indices[picture.image.digest], crop, picture.num_tokens)
            for picture in pictures
            for crop in range(1 + picture.num_crops)
        )
        return Prompt(
            parts=written,
            token_ids=tuple(ids),
            truncated=truncated,
            places=tuple(ImagePlace(s, *c) for s, c in zip(starts, crops, strict=True)),
            images=tuple(images.values()),
        )

    def _picture(self, name: str, image: ImageFile, *, decode: bool = False) -> PicturePart:
        if decode:
            self._processor.pixels(image.data, name)
        header = read_header(image.data, name=name)
        numbers = self._processor.num_crops(header), self._processor.num_tokens(header)
        return PicturePart(self.piece or READABLE, image, *numbers)

    def _own(self, part: Mapping[str, Any], column: str, number: int) -> PicturePart | None:
        """Return the picture that a part of a message brings."""
        name = f"column {column!r}, picture {number}"
        key = picture_key(part)
        source = None if key is None else image_value(part[key], name)
        return None if source is None else self._picture(name, image_file(source, name))

    def _finished(self, parts: Sequence[Part]) -> Sequence[Part]:
        """Return the parts of a prompt with what PaliGemma has around its text."""
        if self._vision is None or self._vision.bidirectional != "prefix":
            return parts
        are_pictures = [isinstance(part, PicturePart) for part in parts]
        start = len(parts) - are_pictures[::-1].index(True) if any(are_pictures) else 0
        return (*parts[:start], Control("<bos>"), *parts[start:], Text("\n"))

    def _expanded(self, parts: Iterable[Part], vision: VisionConfig) -> Iterator[Part]:
        """Yield parts with the tokens of pictures and what stands around them."""
        before: tuple[Part, ...] = ()
        behind: tuple[Part, ...] = ()
        if vision.begin_token is not None and vision.end_token is not None:
            before, behind = (Control(vision.begin_token),), (Control(vision.end_token),)
        if vision.projector == "pooled":  # Gemma 3's processor adds empty lines
            before, behind = (Text("\n\n"), *before), (*behind, Text("\n\n"))
        for part in parts:
            if not isinstance(part, PicturePart):
                yield part
                continue
            one = (*before, SoftTokens(READABLE, self._token_id, part.num_tokens), *behind)
            if not part.num_crops:
                yield from one
            else:
                yield from (Text(_BEFORE), *one, Text(_BETWEEN), *one)
                for _ in range(part.num_crops - 1):
                    yield from (Text(" "), *one)


def _check(vision: VisionConfig | None, settings: ImageSettings) -> None:
    """Refuse settings that the model does not support."""
    if vision is None:
        if settings.image_columns or settings.pan_and_scan:
            what = (
                f"column {settings.image_columns[0]!r}"
                if settings.image_columns
                else "pan_and_scan"
            )
            raise OptionsError(
                f"{what}: expected no pictures, as the model takes none; choose another, such "
                "as Gemma 3 4B or PaliGemma"
            )
        return
    if vision.projector != "pooled" and settings.pan_and_scan:
        raise OptionsError(
            "pan_and_scan: expected none for a PaliGemma or a Gemma 4, which takes no crops"
        )
    if settings.image_tokens is not None and not vision.image_step:
        raise OptionsError(
            f"image_tokens: expected none for a model whose pictures all take "
            f"{vision.num_image_tokens} tokens, got {settings.image_tokens}"
        )
    if settings.image_tokens not in (None, *IMAGE_TOKENS):
        raise OptionsError(
            f"image_tokens: expected one of {', '.join(map(str, IMAGE_TOKENS))}, got "
            f"{settings.image_tokens}"
        )
    has_pictures = settings.image_columns or settings.allow_missing_images
    if vision.bidirectional == "prefix" and not has_pictures:
        raise OptionsError(
            "image_columns: expected a column with pictures for PaliGemma, got none; pass "
            "--image_column"
        )


def _placed(
    parts: Sequence[Part], pictures: Sequence[PicturePart], piece: str | None
) -> list[Part]:
    """Return parts with a picture in place of each of its pieces."""
    places = [
        index
        for index, part in enumerate(parts)
        if isinstance(part, Control) and part.piece == piece
    ]
    if len(places) != len(pictures):
        raise RecordError(
            f"prompt: expected as many places of pictures ({piece}) as the row has pictures, which "
            f"are {len(pictures)}, got {len(places)}"
        )
    placed = list(parts)
    for index, picture in zip(places, pictures, strict=True):
        placed[index] = picture
    return placed


def _encoded(tokenizer: Tokenizer, parts: Sequence[Part]) -> tuple[list[int], list[int]]:
    """Return what the tokenizer gives for parts, and where the tokens of each picture start."""
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
