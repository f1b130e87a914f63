"""Reads the files beside the weights in a checkpoint folder: tokenizer, chat template, terms."""

import json
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from beam_gemma.errors import CheckpointError
from beam_gemma.model.tokenizer import (
    MAX_MODEL_BYTES,
    SPACE,
    USER_DEFINED,
    Tokenizer,
    parsed_model,
)
from export.checkpoints.bounds import MAX_FILE_BYTES, file_bytes, inside, is_file, read_file
from export.checkpoints.tokenizer_json import sentencepiece_from_json
from export.checkpoints.tokenizer_model import loaded, turn_ends

UNUSED_PIECE = re.compile(r"<unused\d+>")
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""How JSON writes half of a surrogate pair, of which only whole pairs have a UTF-8 form."""
MAX_LEGAL_BYTES = 1 << 20
CARD_HEAD = re.compile(r"---\n(.*?)\n---", re.DOTALL)
"""The lines at the start of a model card that programs read."""
CARD_LICENSE = re.compile(r"^license(?:_name|_link)?: *(\S.*)$", re.MULTILINE)
MAX_CARD_BYTES, MAX_LICENSE_CHARS = 1 << 16, 200
"""How much of a model card is read for its license, and how much of a license's name is kept."""
LIMITS = {"tokenizer.json": 64 << 20}
"""Largest size of a settings file that is larger than others; Gemma's has 33 MB."""


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON settings file of a checkpoint's folder.

    Raises:
        CheckpointError: there is none, or it is no JSON object.
    """
    file = inside(folder, name)
    return json_object(read_file(file, LIMITS.get(name, MAX_FILE_BYTES)), file)


def read_optional_json(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON settings file; one that is missing has no settings."""
    return read_json(folder, name) if inside(folder, name).exists() else {}


def json_object(content: bytes, file: Path) -> dict[str, Any]:
    """Return the JSON object that a file, or a part of it, consists of.

    Raises:
        CheckpointError: it is no JSON object.
    """
    value = json_value(content, file)
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {reprlib.repr(value)}")
    return value


def json_value(content: bytes, file: Path) -> Any:
    """Return the value that JSON stands for.

    Raises:
        CheckpointError: it is no JSON, names a key of an object twice, or is no Unicode.
    """
    try:
        value = json.loads(
            content.decode(), object_pairs_hook=_object, parse_constant=_refuse_constant
        )
        if SURROGATE.search(content):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise CheckpointError(f"{file}: expected JSON, got too many brackets") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: expected JSON, got {error}; copy it again") from error
    return value


def are_texts(values: Mapping[str, Any]) -> bool:
    """Return whether all values of a JSON object are strings."""
    return all(isinstance(value, str) for value in values.values())


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        [(again, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {again[:80]!r} twice")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name}, which is no number")


def tokenizer_bytes(folder: Path, vocab_size: int = 0) -> bytes:
    """Return the SentencePiece model, with the names of pieces that the folder's settings give.

    Raises:
        CheckpointError: there is no such model, or the settings do not fit it; see `with_names`.
    """
    file, other = inside(folder, "tokenizer.model"), inside(folder, "tokenizer.json")
    if not is_file(file) and is_file(other):
        settings = read_json(folder, other.name)
        return sentencepiece_from_json(settings, other, vocab_size)
    if not is_file(file):
        raise CheckpointError(
            f"{file}: expected the SentencePiece model of the checkpoint, got nothing; "
            "it is one of the files published with every Gemma model"
        )
    model = loaded(file, read_file(file, MAX_MODEL_BYTES))
    return with_names(model, folder, vocab_size)


def with_names(model_proto: bytes, folder: Path, vocab_size: int) -> bytes:
    """Return a SentencePiece model with the names of pieces that a folder's settings give.

    Fine-tuned models give names of their own to pieces, as CodeGemma and ChatML do, or add pieces.
    Not all their `tokenizer.model` files contain these names.

    Args:
        model_proto: The SentencePiece model.
        folder: With the tokenizer's settings.
        vocab_size: Rows of the embedding; pieces that have none, as some for images, are left out.

    Raises:
        CheckpointError: the settings do not fit the model.
    """
    model = parsed_model(model_proto)
    ids = {piece.piece: token_id for token_id, piece in enumerate(model.pieces)}
    for token_id, name in sorted(_added_tokens(folder).items()):
        piece_name = name.replace(" ", SPACE)
        if token_id >= max(len(model.pieces), vocab_size) or ids.get(piece_name) == token_id:
            continue
        if piece_name in ids or not _may_have_name(model, token_id):
            raise CheckpointError(
                f"{folder}: expected the piece {token_id} of tokenizer.model under its name or a "
                f"new one, got {name!r:.80} in the settings of the tokenizer"
            )
        if token_id == len(model.pieces):
            model.pieces.add(score=0.0)
        piece = model.pieces[token_id]
        piece.piece, piece.type = piece_name, USER_DEFINED
        ids[piece_name] = token_id
    return loaded(folder, bytes(model.SerializeToString()))


def _may_have_name(model: Any, token_id: int) -> bool:
    """Return whether a piece is a marker, not used, or the next one, and so may have a new name."""
    if token_id >= len(model.pieces):
        return token_id == len(model.pieces)
    piece = model.pieces[token_id]
    return piece.type == USER_DEFINED or UNUSED_PIECE.fullmatch(piece.piece) is not None


def _added_tokens(folder: Path) -> dict[int, str]:
    """Return the names that the tokenizer's settings give to tokens, by their ids.

    Newer folders have them in `tokenizer.json` alone.
    """
    file = "tokenizer_config.json"
    added = read_optional_json(folder, file).get("added_tokens_decoder")
    if added is None:
        file = "tokenizer.json"
        added = read_optional_json(folder, file).get("added_tokens", [])
        if isinstance(added, list) and all(isinstance(token, dict) for token in added):
            added = {str(token.get("id")): token for token in added}
    if isinstance(added, dict) and all(
        re.fullmatch(r"\d{1,9}", token_id, re.ASCII)
        and isinstance(token, dict)
        and isinstance(token.get("content"), str)
        and token["content"]
        for token_id, token in added.items()
    ):
        return {int(token_id): token["content"] for token_id, token in added.items()}
    raise CheckpointError(
        f"{folder / file}: expected the added tokens as token ids with a content each, got "
        f"{reprlib.repr(added)}"
    )


def eos_token_ids(
    folder: Path,
    config: Mapping[str, Any],
    vocab_size: int,
    chat_tokenizer: Callable[[], bytes] | None,
) -> tuple[int, ...]:
    """Return the ids that end a text; generation_config.json overrides config.json.

    Where generation_config.json has none, the end of a turn ends the text of a chat model too.

    Args:
        folder: With the settings files.
        config: Content of config.json.
        vocab_size: Rows of the embedding.
        chat_tokenizer: Returns the SentencePiece model; None if the model has no chat template.

    Raises:
        CheckpointError: they are no ids of the vocabulary.
    """
    given = read_optional_json(folder, "generation_config.json").get("eos_token_id")
    sections = config, *(_section(config, key) for key in ("text_config", "decoder"))
    others = (*(section.get("eos_token_id") for section in sections), 1)
    found = next(ids for ids in (given, *others) if ids is not None)
    ids = found if isinstance(found, list) else [found]
    if given is None and chat_tokenizer is not None:
        ids = [*ids, *turn_ends(Tokenizer(chat_tokenizer()))]
    if not ids or not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise CheckpointError(
            f"{folder}: expected eos_token_id as token ids below {vocab_size:,}, got "
            f"{reprlib.repr(found)}"
        )
    return tuple(dict.fromkeys(ids))


def suppress_tokens(folder: Path, vocab_size: int) -> tuple[int, ...]:
    """Return the ids that a model never writes, by its generation_config.json.

    Gemma 4 12B has the ends of pictures and sounds there, which the model would write at times.

    Raises:
        CheckpointError: they are no ids of the vocabulary.
    """
    ids = read_optional_json(folder, "generation_config.json").get("suppress_tokens") or []
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise CheckpointError(
            f"{folder}: expected suppress_tokens as token ids below {vocab_size:,}, got "
            f"{reprlib.repr(ids)}"
        )
    return tuple(sorted(set(ids)))


def _section(settings: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = settings.get(key)
    return value if isinstance(value, Mapping) else {}


def chat_template(folder: Path) -> str | None:
    """Return the Jinja chat template, or None if the folder has none.

    Raises:
        CheckpointError: the template is no text.
    """
    file = inside(folder, "chat_template.jinja")
    if file.exists():
        try:
            return read_file(file).decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{file}: expected text in UTF-8, got {error}") from error
    template = read_optional_json(folder, "tokenizer_config.json").get("chat_template")
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        named = [entry.get("template") for entry in template if entry.get("name") == "default"]
        template = named[-1] if named else None
    if template is not None and not isinstance(template, str):
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: expected chat_template as text, got "
            f"{reprlib.repr(template)}"
        )
    return template


def legal_files(folder: Path) -> tuple[Path, ...]:
    """Return the license, terms and notice files.

    Raises:
        CheckpointError: one of them is a link out of the folder, or no text but something large.
    """
    names = ("license", "notice", "terms", "use_policy", "prohibited")
    files = [file for file in sorted(folder.iterdir()) if file.name.lower().startswith(names)]
    found = tuple(file for file in files if is_file(inside(folder, file.name)))
    for file in found:
        if (size := file_bytes(file)) > MAX_LEGAL_BYTES:
            raise CheckpointError(
                f"{file}: expected a text of at most {MAX_LEGAL_BYTES:,} bytes, got {size:,}"
            )
    return found


def stated_license(folder: Path) -> str | None:
    """Return the license that the model card names, in one line, or None if it names none."""
    file = inside(folder, "README.md")
    if not is_file(file):
        return None
    with file.open("rb") as stream:
        card = stream.read(MAX_CARD_BYTES).decode(errors="replace")
    head = CARD_HEAD.match(card)
    return license_line(*CARD_LICENSE.findall(head[1])) if head else None


def license_line(*names: Any) -> str | None:
    """Return names of licenses in one line of printable characters, or None if there are none."""
    texts = (name for name in names if isinstance(name, str))
    lines = ("".join(filter(str.isprintable, text)).strip("\"' ") for text in texts)
    return ", ".join(line[:MAX_LICENSE_CHARS] for line in lines if line) or None
