"""Checks of a table's columns against a task's settings, before a job starts."""

import pyarrow as pa

from beam_gemma.batches import is_json_text
from beam_gemma.errors import OptionsError, nearest
from beam_gemma.inputs.media_values import STRUCT_KEYS
from beam_gemma.inputs.row import ColumnUse
from beam_gemma.model.artifact import Artifact
from beam_gemma.tasks.interface import Settings


def check_columns(settings: Settings, schema: pa.Schema) -> None:
    """Check that a table's columns fit the settings of a task.

    Raises:
        OptionsError: a column is missing, repeated, of a wrong type, or named like a result column.
    """
    for column, use in settings.columns.items():
        if column not in schema.names:
            raise OptionsError(
                f"column {column!r}: expected in the table, got {', '.join(schema.names)}"
                f"{nearest(column, schema.names)}"
            )
        if schema.names.count(column) > 1:
            raise OptionsError(f"column {column!r}: expected once in the table, got it twice")
        _check_type(schema.field(column), use)
    for name in settings.result_schema.names:
        if name in schema.names:
            raise OptionsError(
                f"column {name!r}: expected a table without it, because a result has that name; "
                "rename it in the input"
            )


def check_media(settings: Settings, artifact: Artifact, image_size: int | None = None) -> None:
    """Check that a model takes pictures and sounds, if a task has some for it.

    Args:
        settings: The settings of the task.
        artifact: The model.
        image_size: Height and width that its pictures must have, in pixels; None for any.

    Raises:
        OptionsError: the model takes no pictures, its pictures do not have this size, or it takes
            no sounds.
    """
    vision = artifact.vision
    if vision is None and (settings.image_columns or image_size is not None):
        what = ", ".join(settings.image_columns) or f"image_size {image_size}"
        raise OptionsError(
            f"image_columns: expected a model that takes pictures, for {what}, got "
            f"{artifact.path}, which reads text only; export a checkpoint that has a vision tower"
        )
    if vision is not None and image_size not in (None, vision.image_size):
        raise OptionsError(_of_another_size(artifact, vision.image_size, image_size))
    if artifact.sound is None and settings.audio_columns:
        raise OptionsError(
            f"audio_columns: expected a model that takes sounds, for "
            f"{', '.join(settings.audio_columns)}, got {artifact.path}, which takes none; export a "
            "checkpoint such as Gemma 3n or Gemma 4 E2B without --text_only"
        )


def _of_another_size(artifact: Artifact, expected: int, got: int | None) -> str:
    """Return the sentence on a size that a model's pictures do not have; 0 if they vary."""
    if not expected:
        return (
            f"image_size: expected none for {artifact.path}, whose pictures vary in size, got "
            f"{got}; leave it out, or set image_tokens"
        )
    return (
        f"image_size: expected {expected}, that of {artifact.path}, got {got}; export the "
        f"checkpoint for {got}"
    )


def _check_type(field: pa.Field, use: ColumnUse) -> None:
    kind, is_json = field.type, is_json_text(field)
    fits, wanted = {
        # Messages with keys of their own are JSON text, and checked row by row.
        "messages": (is_messages(kind) or is_json, "list<struct<role: string, content: string>>"),
        "text": (is_text(kind) and not is_json, "string"),
        "value": (not _is_bytes(kind), "a type that can be written as text"),
        "key": (True, "any type"),
        "images": (
            is_images(kind) and not is_json,
            "bytes, a path or URI as string, struct<bytes, path>, an ObjectRef with its uri, or a "
            "list of these",
        ),
        "audio": (
            is_sounds(kind) and not is_json,
            "bytes, a path or URI as string, struct<bytes, path>, struct<array, sampling_rate>, an "
            "ObjectRef with its uri, or a list of these",
        ),
    }[use]
    if not fits:
        found = "JSON values of several types" if is_json else kind
        raise OptionsError(f"column {field.name!r}: expected {wanted}, got {found}")


def is_text(kind: pa.DataType) -> bool:
    """Return whether a column type holds strings."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return kind in (pa.string(), pa.large_string(), pa.string_view())


def is_messages(kind: pa.DataType) -> bool:
    """Return whether a column type holds conversations: lists of `role` and `content`.

    A content is a text, or a list of parts with `type` and `text`.
    """
    message = inner_fields(kind)
    parts = inner_fields(message.get("content"))
    return _is_texts(message, "role") and (
        _is_texts(message, "content") or _is_texts(parts, "type", "text")
    )


def is_images(kind: pa.DataType) -> bool:
    """Return whether a column type holds pictures: bytes, paths, structs, or lists of these."""
    if _is_list(kind):
        kind = kind.value_type
    if not pa.types.is_struct(kind):
        return _is_bytes(kind) or is_text(kind)
    fields = {field.name: field.type for field in kind}
    return bool(fields.keys() & set(STRUCT_KEYS)) and all(
        fits(fields[name])
        for name, fits in (("bytes", _is_bytes_or_null), ("path", _is_path), ("uri", _is_path))
        if name in fields
    )


def is_sounds(kind: pa.DataType) -> bool:
    """Return whether a column type holds sounds: as pictures, or arrays with their rate."""
    if _is_list(kind):
        kind = kind.value_type
    fields = {f.name: f.type for f in kind} if pa.types.is_struct(kind) else {}
    is_array = "array" in fields and "sampling_rate" in fields
    return is_images(kind) or (is_array and _is_list(fields["array"]))


def _is_list(kind: pa.DataType) -> bool:
    checks = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(check(kind) for check in checks)


def _is_bytes_or_null(kind: pa.DataType) -> bool:
    return _is_bytes(kind) or pa.types.is_null(kind)


def _is_path(kind: pa.DataType) -> bool:
    return is_text(kind) or pa.types.is_null(kind)


def inner_fields(kind: pa.DataType | None) -> dict[str, pa.DataType]:
    """Return the fields of the structs in a type of lists, or none for any other type."""
    if kind is None or not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return {}
    item = kind.value_type
    return {field.name: field.type for field in item} if pa.types.is_struct(item) else {}


def _is_texts(fields: dict[str, pa.DataType], *names: str) -> bool:
    return all(name in fields and is_text(fields[name]) for name in names)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_fixed_size_binary(kind) or kind in (
        pa.binary(), pa.large_binary(), pa.binary_view()
    )  # fmt: skip
