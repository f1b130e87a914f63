"""Flags of pictures and sounds, which several tasks share."""

import argparse
from typing import Any

from beam_gemma.cli.flag_types import SWITCH, positive
from beam_gemma.cli.flags import ArgumentGroup
from beam_gemma.inference.media_files import (
    MAX_AUDIO_BYTES,
    MAX_IMAGE_BYTES,
    AudioReading,
    ImageReading,
    MediaReading,
)
from beam_gemma.model.vision_config import IMAGE_TOKENS


def media_settings(flags: argparse.Namespace) -> dict[str, Any]:
    """Return the values of the flags as fields of `PromptSettings`."""
    return {
        "image_columns": tuple(flags.image_column),
        "pan_and_scan": flags.pan_and_scan,
        "image_tokens": flags.image_tokens,
        "allow_missing_images": flags.allow_missing_images,
        "audio_columns": tuple(flags.audio_column),
        "split_audio": flags.split_audio,
        "allow_missing_audio": flags.allow_missing_audio,
    }


def media_reading(flags: argparse.Namespace, folder: str | None, *, is_local: bool) -> MediaReading:
    """Return the limits of reading pictures and sounds that flags describe.

    Args:
        flags: The flags; those of a task without files give the default limits.
        folder: The folder of the table, from which relative paths start; None if it has none.
        is_local: True if files are read on this machine, so that paths are what a user sees.
    """
    image, audio = ImageReading(), AudioReading()
    if "max_image_bytes" in flags:
        allow = is_local or flags.allow_local_images
        image = ImageReading(max_bytes=flags.max_image_bytes, allow_local=allow, folder=folder)
    if "max_audio_bytes" in flags:
        allow = is_local or flags.allow_local_audio
        audio = AudioReading(max_bytes=flags.max_audio_bytes, allow_local=allow, folder=folder)
    return MediaReading(image=image, audio=audio)


def add_pictures(parser: argparse.ArgumentParser) -> None:
    """Add the flags of pictures in prompts."""
    group = add_image_columns(
        parser,
        "For models that see. A prompt template puts a picture where it names its column;\n"
        "pictures of other columns come before the text.",
    )
    add = group.add_argument
    add(
        "--pan_and_scan",
        **SWITCH,
        help="Gemma 3 and T5Gemma 2 only: add crops of a picture that is much wider than high, or "
        "higher than wide. Use it for small text in such pictures. (default: false)",
    )
    add(
        "--image_size",
        type=positive,
        metavar="N",
        help="Height and width in pixels of the pictures that the model takes, such as 448. Set it "
        "to make sure of the export; a model folder with another size is refused. "
        "(default: that of the model folder)",
    )


def add_image_columns(parser: argparse.ArgumentParser, description: str) -> ArgumentGroup:
    """Add the flags of pictures that all tasks have, and return their group.

    Args:
        parser: The parser to add the flags to.
        description: What the help says of the group.
    """
    group = parser.add_argument_group("pictures", description)
    add = group.add_argument
    add(
        "--image_column",
        action="append",
        default=[],
        metavar="COLUMN",
        help="Column with a picture: the bytes of a file, a path or URI, a struct with one of "
        "them, or a list of these; may be repeated. Paths start from the folder of the table. "
        "(default: none)",
    )
    add(
        "--image_tokens",
        type=int,
        choices=IMAGE_TOKENS,
        metavar="N",
        help="Gemma 4 and EmbeddingGemma 2 only: most tokens of a picture, one of "
        f"{', '.join(map(str, IMAGE_TOKENS))}. More tokens show smaller details and take longer. "
        "(default: that of the model folder)",
    )
    add(
        "--allow_missing_images",
        **SWITCH,
        help="Take a null as no picture. Without this flag, a row with a null gets an error. "
        "(default: false)",
    )
    add(
        "--max_image_bytes",
        type=positive,
        default=MAX_IMAGE_BYTES,
        metavar="N",
        help="Maximum size of a picture's file in bytes. A row with a larger file gets an error. "
        "(default: %(default)s)",
    )
    add(
        "--allow_local_images",
        **SWITCH,
        help="Let rows name files of the workers' own disks. Without this flag, only a job on this "
        "machine reads them; other workers read URIs such as gs://. (default: false)",
    )
    return group


def add_sounds(parser: argparse.ArgumentParser) -> None:
    """Add the flags of sounds."""
    group = parser.add_argument_group(
        "sounds",
        "For models that hear: Gemma 3n, and Gemma 4 E2B, E4B and 12B. A prompt template puts a\n"
        "sound where it names its column; sounds of other columns come before the text.",
    )
    add = group.add_argument
    add(
        "--audio_column",
        action="append",
        default=[],
        metavar="COLUMN",
        help="Column with a sound: the bytes of a WAV, FLAC, OGG or MP3 file, a path or URI, a "
        "struct with one of them, or a list of these; may be repeated. Paths start from the folder "
        "of the table. (default: none)",
    )
    add(
        "--split_audio",
        **SWITCH,
        help="Split a sound of more than 30 seconds into clips, which the model hears one after "
        "another. Without this flag, a row with a longer sound gets an error. (default: false)",
    )
    add(
        "--allow_missing_audio",
        **SWITCH,
        help="Take a null as no sound. Without this flag, a row with a null gets an error. "
        "(default: false)",
    )
    add(
        "--max_audio_bytes",
        type=positive,
        default=MAX_AUDIO_BYTES,
        metavar="N",
        help="Maximum size of a sound's file in bytes. A row with a larger file gets an error. "
        "(default: %(default)s)",
    )
    add(
        "--allow_local_audio",
        **SWITCH,
        help="Let rows name files of the workers' own disks. Without this flag, only a job on this "
        "machine reads them; other workers read URIs such as gs://. (default: false)",
    )
