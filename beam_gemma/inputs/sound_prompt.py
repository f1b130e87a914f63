"""Sounds in prompts: the tokens that each of them takes, and what stands around these.

Token ids are those of transformers' `Gemma3nProcessor` and `Gemma4Processor`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from beam_gemma.errors import OptionsError
from beam_gemma.inputs.chat_template import media_key
from beam_gemma.inputs.row import MediaFile, MediaPart, Row
from beam_gemma.inputs.sound_processor import SoundProcessor
from beam_gemma.inputs.sounds import SoundSettings, column_sounds, sound_file, sound_value
from beam_gemma.model.markup import Control, Part, SoftTokens, Text
from beam_gemma.model.sound_config import SoundConfig

READABLE = "[sound]"
"""What people read in place of the tokens of a sound."""


class SoundPrompts:
    """Makes the sounds of rows parts of prompts, or refuses them if the model takes none.

    Args:
        sound: What the model says of sounds; None if it takes none.
        settings: The columns with sounds, and whether long ones are split.
        vocab_size: Number of token ids that the decoder knows.

    Raises:
        OptionsError: the model takes no sounds.
    """

    article, plural = "a sound", "sounds"

    def __init__(self, sound: SoundConfig | None, settings: SoundSettings, vocab_size: int) -> None:
        self._sound, self._settings = sound, settings
        self.columns = settings.audio_columns
        """Columns with sounds."""
        self.piece = None if sound is None else sound.audio_token
        """What chat templates write for a sound; None if the model takes none."""
        if sound is not None:
            self._token_id = sound.audio_token_id if sound.audio_token_id < vocab_size else 0
            self._processor = SoundProcessor(sound, split=settings.split_audio)
        elif self.columns or settings.split_audio:
            what = f"column {self.columns[0]!r}" if self.columns else "split_audio"
            raise OptionsError(
                f"{what}: expected no sounds, as the model takes none; choose another, such as "
                "Gemma 3n or Gemma 4 E2B, and export it without --text_only"
            )

    def in_column(self, row: Row, column: str) -> Iterator[tuple[str, MediaFile]]:
        """Yield what errors call each sound of a column, and the sound.

        Raises:
            RecordError: a value is no sound, or is missing.
        """
        return column_sounds(row, column, self._settings)

    def part(self, name: str, file: MediaFile, *, decode: bool = False) -> MediaPart:
        """Return a sound as a part of a prompt.

        Args:
            name: What errors call the sound.
            file: Its file.
            decode: True to decode it too, so that a damaged one is found here.

        Raises:
            RecordError: it is no sound that can be read, or is too long.
        """
        if decode:
            self._processor.frames(file.data, name)
        header = self._processor.read_header(file.data, name)
        num_tokens = self._processor.num_tokens(header, name)
        return MediaPart(self.piece or READABLE, file, num_tokens)

    def own(self, part: Mapping[str, Any], column: str, number: int) -> MediaPart | None:
        """Return the sound that a part of a message brings, if any.

        Raises:
            RecordError: what it brings is no sound.
        """
        name = f"column {column!r}, sound {number}"
        key = media_key(part)
        source = None if key is None else sound_value(part[key], name)
        return None if source is None else self.part(name, sound_file(source, name))

    def expanded(self, part: MediaPart) -> Iterator[Part]:
        """Yield the tokens of the clips of a sound, and what stands around them."""
        sound = self._sound
        assert sound is not None
        before: list[Part] = [Control(sound.begin_token)]
        behind: list[Part] = [] if sound.end_token is None else [Control(sound.end_token)]
        if sound.surround:
            before, behind = [Text(sound.surround), *before], [*behind, Text(sound.surround)]
        for num_tokens in part.num_tokens:
            yield from (*before, SoftTokens(READABLE, self._token_id, num_tokens), *behind)
