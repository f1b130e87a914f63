"""Reads a GGUF file of Gemma 1, 2, 3, 3n or 4, or of an EmbeddingGemma.

GGUF stores the effective weights of norms, 1 + w in the models that have w, and its own names of
tensors. Metadata keys: llama.cpp's `gguf-py/gguf/constants.py`.
"""

import re
import reprlib
from dataclasses import replace
from pathlib import Path

from beam_gemma.errors import CheckpointError
from export.checkpoints.bounds import inside
from export.checkpoints.gguf_config import gguf_config, gguf_embedding
from export.checkpoints.gguf_header import GgufFile, read_gguf_header
from export.checkpoints.gguf_names import named
from export.checkpoints.sidecar_files import license_line
from export.checkpoints.tensors import Checkpoint, by_name, without_head
from export.checkpoints.tokenizer_model import TURN_ENDS, sentencepiece_from_gguf, strings

LICENSE_ENDS = ("", ".name", ".link")
"""Ends of the keys in which a file names its license."""
PART = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")
"""Name of one of several files that a model is split into."""


def read_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file, with its other parts if it is one of several.

    Raises:
        CheckpointError: the file is damaged, or lacks what a Gemma has.
        ConfigError: its architecture is not supported.
    """
    file = _whole(read_gguf_header(path))
    config = gguf_config(file)
    return Checkpoint(
        name=path.stem,
        path=path,
        format="gguf",
        config=config,
        tensors=without_head(by_name(path, named(config, file.tensors))),
        norm_offset=0.0,
        tokenizer_model=lambda: sentencepiece_from_gguf(file),
        eos_token_ids=_eos_token_ids(file, config.vocab_size),
        chat_template=_chat_template(file),
        license=license_line(*(file.value(f"general.license{end}", None) for end in LICENSE_ENDS)),
        embedding=gguf_embedding(file, config),
    )


def _whole(part: GgufFile) -> GgufFile:
    """Return a file with the tensors of all its parts, as llama.cpp's `gguf-split` names them.

    The metadata of the model is in the first part.

    Raises:
        CheckpointError: a part is missing or belongs to another file.
    """
    count = part.value("split.count", 0)
    if not count or count == 1:
        return part
    name = PART.fullmatch(part.path.name)
    if name is None or type(count) is not int or int(name["count"]) != count:
        raise CheckpointError(
            f"{part.path}: expected the name of one of {reprlib.repr(count)} parts, as in "
            f"model-00001-of-00002.gguf, got another; give all parts the names that they came with"
        )
    parts = []
    for i in range(count):
        path = inside(part.path.parent, f"{name['stem']}-{i + 1:05}-of-{count:05}.gguf")
        parts.append(part if path == part.path else read_gguf_header(path))
        numbers = [parts[i].value(f"split.{key}", None) for key in ("no", "count", "tensors.count")]
        expected = [i, count, part.value("split.tensors.count", None)]
        if numbers != expected:
            raise CheckpointError(
                f"{path}: expected the part that says {expected} of its number, the number of "
                f"parts and of all tensors, got {reprlib.repr(numbers)}; copy all parts again"
            )
    tensors = tuple(tensor for one in parts for tensor in one.tensors)
    if len(tensors) != part.value("split.tensors.count", None):
        raise CheckpointError(
            f"{parts[0].path}: expected {part.value('split.tensors.count'):,} tensors in all "
            f"parts, got {len(tensors):,}; copy all parts again"
        )
    return replace(parts[0], tensors=tensors)


def _eos_token_ids(file: GgufFile, vocab_size: int) -> tuple[int, ...]:
    """Return the ids that end a text; for files with a chat template, these include end of turn.

    Not every such file declares that id; some declare it in place of `<eos>`.
    """
    pieces = strings(file, "tokenizer.ggml.tokens", [])
    ids = {1}
    for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"):
        token_id = file.value(key, 1)
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise CheckpointError(
                f"{file.path}: expected {key} below {vocab_size:,}, got {reprlib.repr(token_id)}"
            )
        ids.add(token_id)
    if _chat_template(file):
        ids.update(pieces.index(piece) for piece in TURN_ENDS if piece in pieces)
    return tuple(sorted(ids))


def _chat_template(file: GgufFile) -> str | None:
    template = file.value("tokenizer.chat_template", None)
    if template is not None and not isinstance(template, str):
        raise CheckpointError(
            f"{file.path}: expected the chat template as text, got {reprlib.repr(template)}"
        )
    return template
