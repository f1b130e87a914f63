"""Sounds of a row: the values that a column may have, as the bytes of files.

Rows may name files by path or URI. `inference/media_files.py` reads those files and puts their
bytes into the row before this module gets it.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from beam_gemma.errors import RecordError
from beam_gemma.inputs.media_values import MediaSource, column_values, file_value
from beam_gemma.inputs.row import MediaFile, Row
from beam_gemma.inputs.sound_file import file_of_array


@runtime_checkable
class SoundSettings(Protocol):
    """The settings of sounds in rows, such as `PromptSettings`."""

    @property
    def audio_columns(self) -> tuple[str, ...]:
        """Columns with sounds."""

    @property
    def allow_missing_audio(self) -> bool:
        """True if a null means that the row has no sound; otherwise the row is an error."""

    @property
    def split_audio(self) -> bool:
        """True to split sounds that are too long into clips; otherwise such rows are errors."""


def row_sounds(row: Row, settings: SoundSettings) -> tuple[MediaFile, ...]:
    """Return all sounds of a row, in the order of its audio columns.

    Args:
        row: A mapping of columns, or a prompt, which has no sounds.
        settings: The columns.

    Raises:
        RecordError: a value is no sound, names a file that was not read, or is null where a sound
            is expected.

    Example:
        >>> settings = PromptSettings(prompt="Transcribe it.", audio_columns=("call",))
        >>> [sound] = row_sounds({"call": Path("call.wav").read_bytes()}, settings)
        >>> sound.kind
        'audio'
    """
    columns = settings.audio_columns
    return tuple(sound for column in columns for _, sound in column_sounds(row, column, settings))


def column_sounds(
    row: Row, column: str, settings: SoundSettings
) -> Iterator[tuple[str, MediaFile]]:
    """Yield what errors call each sound of one column, and the sound; see `row_sounds`."""
    for name, sound in column_values(row, column, "sound", sound_value):
        if sound is not None:
            yield name, sound_file(sound, name)
        elif not settings.allow_missing_audio:
            raise RecordError(
                f"{name}: expected a sound, got null; filter such rows out, or allow missing audio"
            )


def sound_value(value: Any, name: str) -> MediaSource | None:
    """Return the sound that one value stands for; None for a struct of nulls.

    Args:
        value: The bytes of a file, a path or URI, a struct {bytes, path} as `datasets` has it, a
            struct {array, sampling_rate} once it has decoded that, whose path is not read, a struct
            {bytes, error} of a file that was read, or BigQuery's ObjectRef {uri, version, ...}.
        name: What errors call the sound.

    Raises:
        RecordError: the value is something else, or holds the error that reading a file met.
    """
    if isinstance(value, Mapping) and value.get("array") is not None:
        return file_of_array(value["array"], value.get("sampling_rate"), name)
    return file_value(value, name, "a struct {array, sampling_rate}")


def sound_file(source: MediaSource, name: str) -> MediaFile:
    """Return the file of a sound whose bytes the row has.

    Raises:
        RecordError: the row has a path or URI, whose file was not read.
    """
    if isinstance(source, bytes):
        return MediaFile(source, "audio")
    raise RecordError(
        f"{name}: expected the bytes of a sound, got a path or URI, {source[:200]!r}; give its "
        "bytes"
    )
