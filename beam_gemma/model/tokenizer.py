"""Conversion of text to token ids and back, by SentencePiece.

Gemma's vocabulary types markers such as `<start_of_turn>` as user-defined pieces, which ordinary
text would match. Here they become control pieces, so only a `Control` part yields one, never text.
HTML tags and runs of white space remain text.
"""

import codecs
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from beam_gemma.errors import ArtifactError, RecordError, one_line
from beam_gemma.model.markup import Control, ControlPieces, Part, SoftTokens, Text

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Piece types, numbered as in SentencePiece and GGUF."""
BPE = 2
"""SentencePiece's number for byte-pair encoding, which every Gemma uses."""
MAX_MODEL_BYTES = 16 << 20
"""Largest SentencePiece model; Gemma's have 4 to 5 MB."""
SPACE = "\u2581"
"""Character for a space in pieces."""
SPECIAL_PIECES = ("unk", "bos", "eos", "pad")
"""Names of a model's special pieces, in the order of their field numbers."""
VISIBLE_CONTROL = re.compile("<loc[0-9]{4}>|<seg[0-9]{3}>")
"""Control pieces that completions show: the locations and segments that PaliGemma answers with."""
HTML_TAG = re.compile(
    r"</?(a|b|bbox|blockquote|body|caption|code|div|em|footer|h[1-6]|html|i|iframe|img|li|s|span"
    r"|strong|sub|sup|table|tbody|td|tfoot|th|thead|tr|u|ul)>"
)


class Tokenizer:
    """SentencePiece tokenizer in which text never yields a control piece."""

    def __init__(self, model_proto: bytes) -> None:
        """Load a SentencePiece model.

        Raises:
            ArtifactError: the bytes are none, or not one of Gemma's kind.
        """
        model = parsed_model(model_proto)
        self.control_pieces: dict[str, int] = {}
        """Token id of each control piece."""
        for token_id, piece in enumerate(model.pieces):
            if _is_control(piece):
                self.control_pieces[piece.piece] = token_id
                piece.type = UNKNOWN if piece.type == UNKNOWN else CONTROL
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model.SerializeToString())
        except (RuntimeError, UnicodeDecodeError) as error:
            raise _no_model(error) from error
        for name, token_id in (("<bos>", self.bos_token_id), ("<eos>", self.eos_token_id)):
            if token_id < 0:
                raise ArtifactError(f"expected a SentencePiece model with {name}, got none")
        self._markup = ControlPieces(self.control_pieces)
        self._hidden_ids = frozenset(
            token_id
            for piece, token_id in self.control_pieces.items()
            if not VISIBLE_CONTROL.fullmatch(piece)
        )

    @classmethod
    def from_file(cls, path: Path) -> "Tokenizer":
        """Read a `tokenizer.model`.

        Raises:
            ArtifactError: the file is missing or is no SentencePiece model.
        """
        try:
            size = path.stat().st_size
            if size > MAX_MODEL_BYTES:
                raise ArtifactError(
                    f"expected a SentencePiece model of at most {MAX_MODEL_BYTES:,} bytes, "
                    f"got {size:,}"
                )
            return cls(path.read_bytes())
        except OSError as error:
            raise ArtifactError(
                f"{path}: expected a SentencePiece model, got an error: {error}; export again"
            ) from error
        except ArtifactError as error:
            raise ArtifactError(f"{path}: {error}; export again") from error

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return self._processor.vocab_size()

    @property
    def bos_token_id(self) -> int:
        """Id of `<bos>`."""
        return self._processor.bos_id()

    @property
    def eos_token_id(self) -> int:
        """Id of `<eos>`."""
        return self._processor.eos_id()

    @property
    def pad_token_id(self) -> int:
        """Id of `<pad>`."""
        return self._processor.pad_id()

    def split(self, markup: str) -> tuple[Part, ...]:
        """Split trusted markup into text and control pieces."""
        return self._markup.split(markup)

    def encode(self, parts: Sequence[Part], *, add_bos: bool = True) -> list[int]:
        """Return the token ids of a prompt; with `add_bos`, exactly one `<bos>` is put first.

        A prompt with pictures may have its `<bos>` behind them, as PaliGemma's do.

        Raises:
            RecordError: the text contains half of a surrogate pair, which has no UTF-8 form.
        """
        ids = [token_id for part in _joined(parts) for token_id in self._encode_part(part)]
        if add_bos and not self.has_bos(parts, ids):
            ids.insert(0, self.bos_token_id)
        return ids

    def has_bos(self, parts: Sequence[Part], ids: Sequence[int]) -> bool:
        """Return whether the token ids of parts have their `<bos>` where it belongs."""
        is_behind = any(isinstance(part, SoftTokens) for part in parts)
        return self.bos_token_id in (ids if is_behind else ids[:1])

    def decode(self, ids: Iterable[int], *, final: bool = True) -> str:
        """Return the text of tokens; control pieces yield none, and no space is stripped.

        Those of `VISIBLE_CONTROL` yield their text. Bytes of an incomplete character at the end are
        replaced, or left out unless `final`.
        """
        data = b"".join(map(self.token_bytes, ids))
        return codecs.getincrementaldecoder("utf-8")(errors="replace").decode(data, final)

    def token_bytes(self, token_id: int) -> bytes:
        """Return a token's text in UTF-8; a byte piece may be only part of a character."""
        # Some checkpoints pad the embedding with rows that have no piece.
        if token_id in self._hidden_ids or token_id >= self.vocab_size:
            return b""
        piece = self._processor.id_to_piece(token_id)
        if self._processor.is_byte(token_id):
            return bytes([int(piece[3:-1], 16)])
        return piece.replace(SPACE, " ").encode()

    def vocabulary(self) -> list[bytes]:
        """Return the text of every token in UTF-8, in the order of ids; see `token_bytes`."""
        ids = list(range(self.vocab_size))
        pieces = self._processor.id_to_piece(ids)
        vocabulary: list[bytes] = [piece.replace(SPACE, " ").encode() for piece in pieces]
        # Few remain: byte pieces, and control pieces, which have no text.
        for token_id in itertools.chain(
            self._hidden_ids, itertools.compress(ids, self._processor.is_byte(ids))
        ):
            vocabulary[token_id] = self.token_bytes(token_id)
        return vocabulary

    def _encode_part(self, part: Part) -> list[int]:
        if isinstance(part, SoftTokens):
            return [part.token_id] * part.num_tokens
        if isinstance(part, Control):
            return [self.control_pieces[part.piece]]
        try:
            return self._processor.encode(part.text.encode())
        except UnicodeEncodeError as error:
            raise RecordError(
                f"text: expected Unicode, got half of a surrogate pair at character {error.start}"
            ) from error


class StreamingDecoder:
    """Incremental decoder for a growing sequence, at constant cost per token.

    The joined chunks equal the result of `Tokenizer.decode` for all tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._chunks: list[str] = []

    def add(self, token_id: int) -> str:
        """Add a token and return new text; bytes of an incomplete character are held back."""
        return self._append(self._tokenizer.token_bytes(token_id), final=False)

    def finish(self) -> str:
        """Return the replacement for held-back bytes, or an empty string if there are none."""
        return self._append(b"", final=True)

    @property
    def text(self) -> str:
        """Complete text so far."""
        self._chunks = ["".join(self._chunks)]
        return self._chunks[0]

    def _append(self, data: bytes, *, final: bool) -> str:
        chunk = self._decoder.decode(data, final)
        self._chunks.append(chunk)
        return chunk


def parsed_model(model_proto: bytes) -> Any:
    """Return a SentencePiece model as a message, checked as far as this module relies on it.

    Raises:
        ArtifactError: the bytes are no such model.
    """
    if len(model_proto) > MAX_MODEL_BYTES:
        raise ArtifactError(
            f"expected a SentencePiece model of at most {MAX_MODEL_BYTES:,} bytes, "
            f"got {len(model_proto):,}"
        )
    try:
        model = ModelProto.FromString(model_proto)
        names = [piece.piece for piece in model.pieces]
    except DecodeError as error:
        raise _no_model(error) from error
    if model.trainer_spec.model_type != BPE:
        raise ArtifactError(
            f"expected a SentencePiece model of byte pairs (type {BPE}), "
            f"got type {model.trainer_spec.model_type}"
        )
    # What is no UTF-8 is read as bytes.
    if not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise ArtifactError("expected a SentencePiece model with another text for each piece")
    if not all(NORMAL <= piece.type <= BYTE for piece in model.pieces):
        raise ArtifactError(
            f"expected a SentencePiece model with pieces of types {NORMAL} to {BYTE}, got others"
        )
    if not all(math.isfinite(piece.score) for piece in model.pieces):
        raise ArtifactError("expected a SentencePiece model with finite scores, got others")
    return model


def _no_model(error: Exception) -> ArtifactError:
    return ArtifactError(f"expected a SentencePiece model, got an error: {one_line(error)[:300]}")


def _is_control(piece: Any) -> bool:
    if piece.type != USER_DEFINED:
        return piece.type in (CONTROL, UNKNOWN)
    is_space = piece.piece.replace(SPACE, " ").isspace()
    return not is_space and HTML_TAG.fullmatch(piece.piece) is None


def _joined(parts: Iterable[Part]) -> Iterator[Part]:
    """Join adjacent texts, so that ids do not depend on bounds of template and values."""
    texts: list[str] = []
    for part in parts:
        if isinstance(part, Text):
            texts.append(part.text)
            continue
        yield Text("".join(texts))
        yield part
        texts.clear()
    yield Text("".join(texts))


def _model_proto_class() -> Any:
    """Return a message class with the SentencePiece model fields that are read or written here.

    The module that `sentencepiece` ships needs a newer protobuf than `onnx` allows. Other fields
    survive a round trip as unknown fields.
    """
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="beam_gemma.proto", package="beam_gemma")

    def message(name: str, *fields: Any) -> None:
        file.message_type.add(name=name).field.extend(fields)

    def scalar(name: str, number: int, kind: int, default: str | None = None) -> Any:
        optional = field.LABEL_OPTIONAL
        return field(name=name, number=number, type=kind, label=optional, default_value=default)

    def nested(name: str, number: int, type_name: str, label: int) -> Any:
        return field(name=name, number=number, type_name=f".beam_gemma.{type_name}", label=label)

    message(
        "Piece",
        scalar("piece", 1, field.TYPE_STRING),
        scalar("score", 2, field.TYPE_FLOAT),
        scalar("type", 3, field.TYPE_INT32, default=str(NORMAL)),
    )
    message(
        "TrainerSpec",
        scalar("model_type", 3, field.TYPE_INT32),
        scalar("vocab_size", 4, field.TYPE_INT32),
        scalar("byte_fallback", 35, field.TYPE_BOOL),
        *(scalar(f"{n}_id", 40 + i, field.TYPE_INT32) for i, n in enumerate(SPECIAL_PIECES)),
        *(scalar(f"{n}_piece", 45 + i, field.TYPE_STRING) for i, n in enumerate(SPECIAL_PIECES)),
    )
    message(
        "NormalizerSpec",
        scalar("name", 1, field.TYPE_STRING),
        scalar("add_dummy_prefix", 3, field.TYPE_BOOL),
        scalar("remove_extra_whitespaces", 4, field.TYPE_BOOL),
    )
    message(
        "ModelProto",
        nested("pieces", 1, "Piece", field.LABEL_REPEATED),
        nested("trainer_spec", 2, "TrainerSpec", field.LABEL_OPTIONAL),
        nested("normalizer_spec", 3, "NormalizerSpec", field.LABEL_OPTIONAL),
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("beam_gemma.ModelProto"))


ModelProto = _model_proto_class()
"""Message class of a SentencePiece model: `pieces`, `trainer_spec`, `normalizer_spec`."""
