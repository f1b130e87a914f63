"""Rows with pictures and sounds: their files are read, and carried beside requests.

A row may name files in its columns of pictures and sounds and in the parts of a conversation. Rows
go to a model in parts, so that the files of all of them are never held together.
"""

from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from beam_gemma.errors import RecordError
from beam_gemma.inference.media_files import (
    VALUE_OF,
    MediaReading,
    PendingFile,
    begin_reading,
    read_ahead,
)
from beam_gemma.inference.rows import num_bytes
from beam_gemma.inputs.chat_template import MEDIA_KEYS, media_key
from beam_gemma.inputs.images import row_images
from beam_gemma.inputs.row import MediaKind, Row
from beam_gemma.inputs.sounds import row_sounds
from beam_gemma.tasks.interface import Settings
from beam_gemma.tasks.row_keys import ENCODED


def messages_column(settings: Settings) -> str | None:
    """Return the column of conversations that a task reads; None if it reads none."""
    return next((name for name, use in settings.columns.items() if use == "messages"), None)


def with_files(rows: Sequence[Row], settings: Settings, reading: MediaReading) -> Iterator[Row]:
    """Yield rows with the files that they name; files of the next rows are read meanwhile.

    Args:
        rows: The rows.
        settings: The settings of the task, which name its columns.
        reading: The limits of reading files.
    """
    conversation = messages_column(settings)
    kinds = kinds_of(settings)
    begun = (_begun(row, kinds, conversation, reading) for row in rows)
    for row, found in zip(rows, read_ahead(begun), strict=True):
        if isinstance(row, str) or not found:
            yield row
            continue
        read: dict[str, Any] = dict(found)
        if conversation in read:
            files = iter(read[conversation])
            read[conversation] = list(_with_files(row[conversation], files))
        # What is read stands before the columns of the row.
        yield ChainMap(read, row)  # type: ignore[arg-type]


def in_parts(
    rows: Sequence[Row], settings: Settings, reading: MediaReading, part_bytes: int
) -> Iterator[list[Row]]:
    """Yield rows `with_files` in parts.

    Args:
        rows: The rows.
        settings: The settings of the task.
        reading: The limits of reading files.
        part_bytes: Bytes of read files that end a part.
    """
    part: list[Row] = []
    size = 0
    for row in with_files(rows, settings, reading):
        part.append(row)
        size += num_bytes(row.maps[0]) if isinstance(row, ChainMap) else 0
        if size >= part_bytes:
            yield part
            part, size = [], 0
    if part:
        yield part


def files_of(row: Row, settings: Settings) -> list[bytes]:
    """Return the files of a row's pictures and sounds, each once; none if one cannot be had.

    Args:
        row: The row, `with_files`.
        settings: The settings of the task.
    """
    try:
        files = [file.data for file in (*row_images(row, settings), *row_sounds(row, settings))]
        conversation = messages_column(settings)
        if conversation is not None and not isinstance(row, str):
            brought = _brought(row.get(conversation))
            found = (VALUE_OF[kind](value, conversation) for kind, value in brought)
            files += [file for file in found if isinstance(file, bytes)]
    except RecordError:
        return []
    return files if len(files) < 2 else list(dict.fromkeys(files))


def kinds_of(settings: Settings) -> dict[str, MediaKind]:
    """Return the columns of a task whose values are files, with the kind of these."""
    kinds: dict[str, MediaKind] = dict.fromkeys(settings.image_columns, "image")
    return kinds | dict.fromkeys(settings.audio_columns, "audio")


def _begun(
    row: Row, kinds: Mapping[str, MediaKind], conversation: str | None, reading: MediaReading
) -> dict[str, list[Any] | None]:
    """Return the media of a row in the columns that name files; these are begun to be read."""
    found: dict[str, list[Any] | None] = {}
    if isinstance(row, str) or ENCODED in row:
        return found
    items: dict[str, list[tuple[MediaKind, Any]]] = {}
    for name, kind in kinds.items():
        value = _value(row, name)
        values = list(value) if isinstance(value, list | tuple) else [value]
        items[name] = [(kind, each) for each in values]
    if conversation is not None:
        items[conversation] = list(_brought(_value(row, conversation)))
    for name, own in items.items():
        files = [
            begin_reading(item, reading.of(kind)) if _names_file(item) else item
            for kind, item in own
        ]
        if any(isinstance(file, PendingFile) for file in files):
            found[name] = files
    return found


def _value(row: Mapping[str, Any], name: str) -> Any:
    try:
        return row.get(name)
    except RecordError:
        return None  # it is the row's error when it is encoded


def _names_file(item: Any) -> bool:
    return isinstance(item, str) or (isinstance(item, Mapping) and item.get("bytes") is None)


def _brought(messages: Any) -> Iterator[tuple[MediaKind, Any]]:
    """Yield what parts of a conversation bring, with its kind; none if the value is none."""
    for message in messages if isinstance(messages, list | tuple) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list | tuple) else ():
            if (key := _media_key(part)) is not None:
                yield part["type"], part[key]


def _media_key(part: Any) -> str | None:
    is_medium = isinstance(part, Mapping) and part.get("type") in tuple(MEDIA_KEYS)
    return media_key(part) if is_medium else None


def _with_files(messages: Iterable[Any], files: Iterator[Any]) -> Iterator[Any]:
    """Yield the messages of a conversation with files in place of what parts name."""
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, list | tuple):
            yield message
            continue
        keys = [_media_key(part) for part in content]
        yield {
            **message,
            "content": [
                part if key is None else {**part, key: next(files)}
                for key, part in zip(keys, content, strict=True)
            ],
        }
