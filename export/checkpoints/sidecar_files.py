"""Reads the files beside the weights in a checkpoint folder: tokenizer, chat template, terms."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from beam_gemma.errors import CheckpointError
from beam_gemma.model.tokenizer import USER_DEFINED, ModelProto

UNUSED_PIECE = re.compile(r"<unused\d+>")


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON settings file."""
    if not file.is_file():
        raise CheckpointError(f"{file}: expected a checkpoint's file, got nothing")
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file}: expected JSON, got {error}") from error


def read_optional_json(file: Path) -> dict[str, Any]:
    """Read a JSON settings file; one that is missing has no settings."""
    return read_json(file) if file.exists() else {}


def tokenizer_bytes(folder: Path) -> bytes:
    """Return the SentencePiece model, with pieces renamed as in `tokenizer_config.json`.

    CodeGemma and other models give names to unused pieces; not all their `tokenizer.model` files
    contain these names.
    """
    file = folder / "tokenizer.model"
    if not file.is_file():
        raise CheckpointError(
            f"{file}: expected the SentencePiece model of the checkpoint, got nothing; "
            "it is one of the files published with every Gemma model"
        )
    model = ModelProto.FromString(file.read_bytes())
    settings = read_optional_json(folder / "tokenizer_config.json")
    for token_id, token in settings.get("added_tokens_decoder", {}).items():
        # Ids beyond the model's vocabulary belong to images.
        if int(token_id) < len(model.pieces):
            piece = model.pieces[int(token_id)]
            if UNUSED_PIECE.fullmatch(piece.piece):
                piece.piece, piece.type = token["content"], USER_DEFINED
    return bytes(model.SerializeToString())


def eos_token_ids(folder: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the ids that end a text; generation_config.json overrides config.json."""
    generation = read_optional_json(folder / "generation_config.json")
    ids = generation.get("eos_token_id", config.get("eos_token_id", 1))
    return tuple(ids) if isinstance(ids, list) else (ids,)


def chat_template(folder: Path) -> str | None:
    """Return the Jinja chat template, or None if the folder has none."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text()
    template = read_optional_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template


def legal_files(folder: Path) -> tuple[Path, ...]:
    """Return the license, terms and notice files."""
    names = ("license", "notice", "terms", "use_policy", "prohibited")
    return tuple(
        file
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name.lower().startswith(names)
    )
