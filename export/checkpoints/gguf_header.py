"""Reads what a GGUF file says of itself: its metadata, and where each tensor lies.

The format is ggml's `docs/gguf.md`: a count of tensors and of metadata, the metadata, the tensors'
names, shapes, types and offsets, then their bytes. Every count and length is compared with what is
left of the file before anything is read or allocated for it, so a damaged file costs no more than
an intact one of its size.
"""

import mmap
import reprlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from beam_gemma.errors import CheckpointError
from export.checkpoints.bounds import (
    Span,
    check_count,
    check_name,
    check_shape,
    check_spans,
    file_bytes,
)

MAGIC, VERSIONS = b"GGUF", (2, 3)
MAX_HEADER_BYTES = 64 << 20
"""Longest header; Gemma's, with its vocabulary, has about 7 MB."""
MAX_KEYS, MAX_KEY_BYTES = 4_096, 65_535
MAX_ITEMS = 1 << 22
"""Most numbers or strings in one array of metadata."""
MAX_DIMS = 4
ALIGNMENT = 32
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
           12: "d"}  # fmt: skip
"""`struct` codes of the types of numbers."""
STRING, ARRAY = 8, 9
LEAST_KEY_BYTES, LEAST_TENSOR_BYTES = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8
"""Sizes of the shortest entries: of one metadata key, and of one tensor."""


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """One tensor of a GGUF file, not read yet."""

    file: Path
    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    """Outermost dimension first; GGUF lists dimensions innermost first."""
    offset: int
    """Place of its first byte in the file."""
    length: int
    """Size in bytes."""


@dataclass(frozen=True, kw_only=True)
class GgufFile:
    """The header of a GGUF file."""

    path: Path
    values: Mapping[str, Any]
    """Metadata by key: numbers, strings, and lists of either."""
    tensors: tuple[GgufTensor, ...]

    def value(self, key: str, *default: Any) -> Any:
        """Return the metadata of a key, or the default.

        Raises:
            CheckpointError: there is no such key, and no default.
        """
        if key in self.values:
            return self.values[key]
        if default:
            return default[0]
        raise CheckpointError(f"{self.path}: expected the key {key} in its metadata, got none")


def read_gguf_header(path: Path) -> GgufFile:
    """Read the header of a GGUF file.

    Raises:
        CheckpointError: the file is none, or what it says does not fit its size.
    """
    size = file_bytes(path)
    if size < len(MAGIC):
        raise CheckpointError(f"{path}: expected a GGUF file, got one of {size} bytes")
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _Header(path, data, size).read()


class _Header:
    """A place in the header; every step forward is checked first."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self._path, self._data, self._size = path, data, size
        self._end = min(size, MAX_HEADER_BYTES)
        self._place = 0

    def read(self) -> GgufFile:
        magic = self._data[self._skip(len(MAGIC), "its first bytes") : self._place]
        version = self._number("I") if magic == MAGIC else None
        if version not in VERSIONS:
            raise CheckpointError(
                f"{self._path}: expected a GGUF file of version {' or '.join(map(str, VERSIONS))} "
                f"in little-endian order, got {magic!r} of version {version}"
            )
        num_tensors, num_keys = self._number("Q"), self._number("Q")
        if num_keys > MAX_KEYS:
            raise self._fault(f"at most {MAX_KEYS:,} metadata keys, got {num_keys:,}")
        self._check_room(num_keys, LEAST_KEY_BYTES, "metadata keys")
        values: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string("a metadata key", MAX_KEY_BYTES)
            if key in values:
                raise self._fault(f"each metadata key once, got {key!r:.80} again")
            values[key] = self._value(self._number("I"), key)
        check_count(self._path, num_tensors)
        self._check_room(num_tensors, LEAST_TENSOR_BYTES, "tensors")
        alignment = values.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self._fault(f"general.alignment as a power of two, got {reprlib.repr(alignment)}")
        found = [self._tensor(alignment) for _ in range(num_tensors)]
        start = self._place + -self._place % alignment
        tensors = tuple(
            GgufTensor(
                file=self._path, name=n, kind=k, shape=s, offset=start + offset, length=length
            )
            for n, k, s, offset, length in found
        )
        spans = (Span(t.offset, t.offset + t.length, t.name) for t in tensors)
        check_spans(self._path, spans, self._place, self._size, gaps=True)
        if len({t.name for t in tensors}) < len(tensors):
            raise self._fault("each tensor once, got one again")
        return GgufFile(path=self._path, values=values, tensors=tensors)

    def _value(self, kind: int, key: str) -> Any:
        if kind in NUMBERS:
            return self._number(NUMBERS[kind])
        if kind == STRING:
            return self._string(key, self._end)
        if kind != ARRAY:
            raise self._fault(f"a type of GGUF for {key!r:.80}, got {kind}")
        item, count = self._number("I"), self._number("Q")
        if count > MAX_ITEMS:
            raise self._fault(f"at most {MAX_ITEMS:,} items in {key!r:.80}, got {count:,}")
        if item == STRING:
            self._check_room(count, 8, f"strings of {key!r:.80}")
            return [self._string(key, self._end) for _ in range(count)]
        if item not in NUMBERS:
            raise self._fault(f"numbers or strings in the array {key!r:.80}, got type {item}")
        code = NUMBERS[item]
        width = struct.calcsize(f"<{code}")
        self._check_room(count, width, f"numbers of {key!r:.80}")
        place = self._skip(count * width, key)
        return list(struct.unpack_from(f"<{count}{code}", self._data, place))

    def _tensor(
        self, alignment: int
    ) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int, int]:
        """Return name, type, shape, offset in the data and length of the next tensor."""
        name = self._string("a tensor's name", self._end)
        check_name(self._path, name)
        num_dims = self._number("I")
        if not 1 <= num_dims <= MAX_DIMS:
            raise self._fault(f"1 to {MAX_DIMS} dimensions of {name}, got {num_dims:,}")
        shape = tuple(self._number("Q") for _ in range(num_dims))[::-1]
        check_shape(self._path, name, shape)
        number, offset = self._number("I"), self._number("Q")
        if number not in GGML_QUANT_SIZES:
            raise self._fault(f"a type of ggml for {name}, got {number}")
        kind = GGMLQuantizationType(number)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise self._fault(f"a multiple of {block} columns in {name}, got {shape[-1]:,}")
        if offset % alignment:
            raise self._fault(f"{name} at a multiple of {alignment} bytes, got {offset:,}")
        length = block_bytes
        for dim in (*shape[:-1], shape[-1] // block):
            length *= dim
        return name, kind, shape, offset, length

    def _number(self, code: str) -> Any:
        place = self._skip(struct.calcsize(f"<{code}"), "a number")
        return struct.unpack_from(f"<{code}", self._data, place)[0]

    def _string(self, what: str, limit: int) -> str:
        length = self._number("Q")
        if length > limit:
            raise self._fault(f"at most {limit:,} bytes of {what!r:.80}, got {length:,}")
        place = self._skip(length, what)
        try:
            return self._data[place : place + length].decode()
        except UnicodeDecodeError as error:
            raise self._fault(f"UTF-8 in {what!r:.80}, got {error}") from error

    def _check_room(self, count: int, least: int, what: str) -> None:
        """Check that the rest of the header has room for so many entries of so many bytes."""
        if count > (self._end - self._place) // least:
            raise self._fault(f"no more {what} than fit into the file, got {count:,}")

    def _skip(self, num_bytes: int, what: str) -> int:
        """Go on by so many bytes; return the place before them."""
        place = self._place
        if num_bytes > self._end - place:
            raise self._fault(
                f"{num_bytes:,} bytes of {what!r:.80} at {place:,}, got the end of the "
                + ("file" if self._end == self._size else f"{MAX_HEADER_BYTES:,} bytes allowed")
            )
        self._place += num_bytes
        return place

    def _fault(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: expected {reason}; copy the file again")
