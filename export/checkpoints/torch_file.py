"""Reads a file of `torch.save` as data: nothing in it is imported or called.

The file is a zip archive: a pickle, and one record for each storage of numbers. A pickle is a
program for a stack machine. The one here knows the instructions that `torch.save` writes for
weights, and of the functions that they name the three that say where a tensor lies; it describes
their results instead of calling them. Every other instruction or call is refused.
"""

import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beam_gemma.errors import CheckpointError, one_line
from export.checkpoints.bounds import Span, check_count, check_spans, file_bytes

PICKLE = "data.pkl"
MAX_PICKLE_BYTES = 16 << 20
"""Longest pickle; that of the largest Gemma has about 200 KB."""
LOCAL_HEADER = struct.Struct("<4s22xHH")
"""What stands before a record: its signature, and the lengths of its name and an extra field."""

REBUILD = "torch._utils _rebuild_tensor_v2"
PARAMETER = "torch._utils _rebuild_parameter"
ORDERED = "collections OrderedDict"


@dataclass(frozen=True)
class Name:
    """Something that the pickle names, as module and name; it is not imported."""

    text: str


@dataclass(frozen=True)
class Storage:
    """Numbers of one type, which fill one record of the file."""

    kind: str
    """Such as `FloatStorage`."""
    key: str
    """Name of the record below `data/`."""
    num_items: int


@dataclass(frozen=True)
class SavedTensor:
    """A view of a storage: offset and strides in items."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def torch_records(path: Path) -> dict[str, Span]:
    """Return the place of each record in a file of `torch.save`, by its name in the archive.

    Raises:
        CheckpointError: the file is no such archive, or a record does not fit into it.
    """
    size = file_bytes(path)
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except Exception as error:  # of many types: zipfile names few of those that it raises
        raise CheckpointError(
            f"{path}: expected the zip format of torch.save, got another: {one_line(error)}"
        ) from error
    check_count(path, len(infos))
    roots = [i.filename.removesuffix(PICKLE) for i in infos if i.filename.endswith(f"/{PICKLE}")]
    if len(roots) != 1:
        raise CheckpointError(f"{path}: expected one {PICKLE} of torch.save, got {len(roots)}")
    records: dict[str, Span] = {}
    with path.open("rb") as stream:
        for info in infos:
            name = info.filename.removeprefix(roots[0])
            stream.seek(info.header_offset if 0 <= info.header_offset < size else size)
            header = stream.read(LOCAL_HEADER.size)
            if len(header) < LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
                raise CheckpointError(f"{path}: expected the record {name[:80]!r}, got none")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise CheckpointError(
                    f"{path}: expected the record {name[:80]!r} as torch.save stores it, got it "
                    f"compressed to {info.compress_size:,} of {info.file_size:,} bytes"
                )
            if name in records:
                raise CheckpointError(f"{path}: expected one record {name[:80]!r}, got more")
            _, name_bytes, extra_bytes = LOCAL_HEADER.unpack(header)
            start = info.header_offset + LOCAL_HEADER.size + name_bytes + extra_bytes
            records[name] = Span(start, start + info.file_size, name)
    check_spans(path, records.values(), 0, size, gaps=True)
    return records


def saved_content(path: Path, records: Mapping[str, Span]) -> Any:
    """Return what was saved; tensors are described by `SavedTensor`.

    Raises:
        CheckpointError: it is more than weights, or damaged.
    """
    place = records[PICKLE]
    if place.end - place.start > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{path}: expected a {PICKLE} of at most {MAX_PICKLE_BYTES:,} bytes, got "
            f"{place.end - place.start:,}"
        )
    with path.open("rb") as stream:
        stream.seek(place.start)
        data = stream.read(place.end - place.start)
        order = records.get("byteorder", Span(0, 0, ""))
        stream.seek(order.start)
        if stream.read(min(order.end - order.start, 16)) not in (b"", b"little"):
            raise CheckpointError(f"{path}: expected numbers in little-endian order, got others")
    machine = _Machine()
    try:
        for instruction, argument, _ in pickletools.genops(data):
            machine.run(instruction.name, argument)
        return machine.result()
    except (ValueError, TypeError, LookupError) as error:
        raise CheckpointError(
            f"{path}: expected a file of weights alone, as torch.load reads with weights_only, "
            f"got a pickle that is damaged or does more: {one_line(error)}"
        ) from error


VALUES: dict[str, Callable[[Any], Any]] = {
    "BINUNICODE": str, "SHORT_BINSTRING": str, "BININT": int, "BININT1": int, "BININT2": int,
    "LONG1": int, "BINFLOAT": float, "GLOBAL": Name, "NONE": lambda _: None,
    "NEWTRUE": lambda _: True, "NEWFALSE": lambda _: False, "EMPTY_TUPLE": lambda _: (),
    "EMPTY_DICT": lambda _: {}, "EMPTY_LIST": lambda _: [],
}  # fmt: skip
"""Instructions that put a value on the stack, and the value for their argument."""
TUPLES = {"TUPLE": None, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
FILLS = {"SETITEMS": None, "SETITEM": 2, "APPENDS": None, "APPEND": 1}
"""Instructions that take so many values, or all since the last mark."""


class _Machine:
    """The stack, the marks on it, and the numbered results."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def result(self) -> Any:
        [result] = self._stack
        return result

    def run(self, name: str, argument: Any) -> None:
        """Carry out one instruction."""
        if name in VALUES:
            self._stack.append(VALUES[name](argument))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self._stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self._stack.append(self._memo[argument])
        elif name == "MARK":
            self._marks.append(len(self._stack))
        elif name in TUPLES:
            self._stack.append(tuple(self._take(TUPLES[name])))
        elif name in FILLS:
            self._fill(name)
        elif name in ("BINPERSID", "REDUCE", "BUILD"):
            self._make(name)
        elif name not in ("PROTO", "STOP"):
            raise ValueError(f"the instruction {name}")

    def _take(self, count: int | None) -> list[Any]:
        """Remove and return the last values: so many, or all since the last mark."""
        start = self._marks.pop() if count is None else len(self._stack) - count
        if start < (self._marks[-1] if self._marks else 0):
            raise IndexError("too few values")
        taken = self._stack[start:]
        del self._stack[start:]
        return taken

    def _fill(self, name: str) -> None:
        """Put values into the dictionary or list before them."""
        values = self._take(FILLS[name])
        target = self._stack[-1]
        if isinstance(target, list) and name.startswith("APPEND"):
            target.extend(values)
        elif isinstance(target, dict) and name.startswith("SETITEM"):
            for key, value in zip(values[::2], values[1::2], strict=True):
                # The hash of a nested tuple can take longer than anyone waits.
                if not isinstance(key, str | int):
                    raise TypeError("expected a string as key")
                target[key] = value
        else:
            raise TypeError("expected a dictionary or a list")

    def _make(self, name: str) -> None:
        if name == "BUILD":  # attributes of what was made before, such as versions of modules
            self._take(1)
        elif name == "BINPERSID":
            self._stack.append(_storage(self._take(1)[0]))
        else:
            function, arguments = self._take(2)
            self._stack.append(_called(function, arguments))


def _storage(saved_id: Any) -> Storage:
    tag, kind, key, _, num_items = saved_id
    if tag != "storage" or not isinstance(kind, Name) or not _are_sizes([num_items]):
        raise TypeError("expected a storage")
    if not isinstance(key, str):
        raise TypeError("expected a string as key of a storage")
    return Storage(kind.text.rpartition(" ")[2], key, num_items)


def _called(function: Any, arguments: Any) -> Any:
    """Return what a call stands for."""
    if not isinstance(function, Name) or not isinstance(arguments, tuple):
        raise TypeError("expected a function and its arguments")
    if function.text == ORDERED and not arguments:
        return {}
    if function.text == PARAMETER and arguments and isinstance(arguments[0], SavedTensor):
        return arguments[0]
    if function.text != REBUILD:
        raise ValueError(f"a call of {function.text.replace(' ', '.')!r:.80}")
    storage, offset, shape, strides = arguments[:4]
    if not isinstance(storage, Storage) or not _are_sizes([offset]):
        raise TypeError("expected a storage and an offset")
    if not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise TypeError("expected a shape and strides")
    if len(shape) != len(strides) or not _are_sizes([*shape, *strides]):
        raise TypeError("expected a shape and as many strides")
    return SavedTensor(storage, offset, shape, strides)


def _are_sizes(values: list[Any]) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 63 for value in values)
