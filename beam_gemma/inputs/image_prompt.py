"""Pictures in prompts: the tokens that each of them takes, and what stands around these.

Token ids are those of transformers' `Gemma3Processor`, `PaliGemmaProcessor` and `Gemma4Processor`,
and of `Gemma3nProcessor` but for the token behind a picture, which counts as one of the picture.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from beam_gemma.errors import OptionsError
from beam_gemma.inputs.chat_template import media_key
from beam_gemma.inputs.image_processor import ImageProcessor, read_header
from beam_gemma.inputs.images import ImageSettings, column_images, image_file, image_value
from beam_gemma.inputs.row import MediaFile, MediaPart, Row
from beam_gemma.model.markup import Control, Part, SoftTokens, Text
from beam_gemma.model.vision_config import IMAGE_TOKENS, VisionConfig

READABLE = "[picture]"
"""What people read in place of the tokens of a picture."""
_BEFORE, _BETWEEN = (
    "Here is the original image ",
    " and here are some crops to help you see better ",
)
"""Texts around a picture that has crops, as `Gemma3Processor` writes them."""


class ImagePrompts:
    """Makes the pictures of rows parts of prompts, or refuses them if the model takes none.

    Args:
        vision: What the model says of pictures; None if it takes none.
        settings: The columns with pictures, and whether crops are added.
        vocab_size: Number of token ids that the decoder knows.

    Raises:
        OptionsError: the model takes no pictures, or cannot do without.
    """

    article, plural = "a picture", "pictures"

    def __init__(
        self, vision: VisionConfig | None, settings: ImageSettings, vocab_size: int
    ) -> None:
        self._vision, self._settings = vision, settings
        _check(vision, settings)
        self.columns = settings.image_columns
        """Columns with pictures."""
        self.piece = None if vision is None else vision.piece or READABLE
        """What chat templates write for a picture; None if the model takes none."""
        if vision is not None:
            self._token_id = vision.image_token_id if vision.image_token_id < vocab_size else 0
            self._processor = ImageProcessor(
                vision, settings.pan_and_scan, image_tokens=settings.image_tokens
            )

    def in_column(self, row: Row, column: str) -> Iterator[tuple[str, MediaFile]]:
        """Yield what errors call each picture of a column, and the picture.

        Raises:
            RecordError: a value is no picture, or is missing.
        """
        return column_images(row, column, self._settings)

    def part(self, name: str, file: MediaFile, *, decode: bool = False) -> MediaPart:
        """Return a picture as a part of a prompt.

        Args:
            name: What errors call the picture.
            file: Its file.
            decode: True to decode it too, so that a damaged one is found here.

        Raises:
            RecordError: it is no picture that can be read.
        """
        if decode:
            self._processor.pixels(file.data, name)
        header = read_header(file.data, name=name)
        num_views = 1 + self._processor.num_crops(header)
        num_tokens = (self._processor.num_tokens(header),) * num_views
        return MediaPart(self.piece or READABLE, file, num_tokens)

    def own(self, part: Mapping[str, Any], column: str, number: int) -> MediaPart | None:
        """Return the picture that a part of a message brings, if any.

        Raises:
            RecordError: what it brings is no picture.
        """
        name = f"column {column!r}, picture {number}"
        key = media_key(part)
        source = None if key is None else image_value(part[key], name)
        return None if source is None else self.part(name, image_file(source, name))

    def finished(self, parts: Sequence[Part]) -> Sequence[Part]:
        """Return the parts of a prompt with what PaliGemma has around its text."""
        if self._vision is None or self._vision.bidirectional != "prefix":
            return parts
        are_pictures = [isinstance(part, MediaPart) for part in parts]
        start = len(parts) - are_pictures[::-1].index(True) if any(are_pictures) else 0
        return (*parts[:start], Control("<bos>"), *parts[start:], Text("\n"))

    def expanded(self, part: MediaPart) -> Iterator[Part]:
        """Yield the tokens of a picture and of its crops, and what stands around them."""
        vision = self._vision
        assert vision is not None
        before: tuple[Part, ...] = ()
        behind: tuple[Part, ...] = ()
        if vision.begin_token is not None:
            before = (Control(vision.begin_token),)
        if vision.end_token is not None:
            behind = (Control(vision.end_token),)
        if vision.projector in ("pooled", "mobilenet"):  # processors of Gemma 3 and 3n add lines
            before, behind = (Text("\n\n"), *before), (*behind, Text("\n\n"))
        views = [
            (*before, SoftTokens(READABLE, self._token_id, num_tokens), *behind)
            for num_tokens in part.num_tokens
        ]
        if len(views) == 1:
            yield from views[0]
            return
        whole, first, *others = views
        yield from (Text(_BEFORE), *whole, Text(_BETWEEN), *first)
        for crop in others:
            yield from (Text(" "), *crop)


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
            "pan_and_scan: expected none for a PaliGemma, a Gemma 3n or a Gemma 4, which takes no "
            "crops"
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
