"""Damages files at random, always the same way, and watches what reads them.

What comes from elsewhere may be cut, changed or made up. A reader takes it in full or refuses it
with one sentence, soon and in little memory, whatever the file says of its sizes.
"""

import contextlib
import copy
import json
import random
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from beam_gemma.errors import BeamGemmaError

Field = tuple[int, int]
"""Place and width in bytes of a number in a file."""
LENGTHS = (0, 1, 2, 3, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63 - 1, 2**63,
           2**64 - 1)  # fmt: skip
DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]
VALUES = (
    None, True, False, 0, 1, -1, 2, 3, 0.5, -0.0, 1e308, float("nan"), float("inf"), 2**31, 2**63,
    10**400, "", "x", "0", "../x", "..", "/etc/passwd", "a\0b", "\ud800", "x" * 5_000, "linear",
    [], {}, [[]], {"": None}, [1, 1], [-8, 0], [2**63] * 3, {"x": {"x": {}}}, DEEP,
)  # fmt: skip
TEXTS = (b"", b"{", b"[]", b"null", b'"x"', b"[" * 100_000, b'{"x":' * 5_000, b"\xff\xfe{}", b"NaN",
         b"9" * 5_000, b'{"a":1,"a":2}', b"\xef\xbb\xbf{}")  # fmt: skip
CASE_SECS = 3.0
"""Most seconds that one damaged file may take; they take milliseconds."""
MEMORY_BYTES = 160 << 20
"""Most memory that damaged files may take at once; intact ones take a few MB."""


class OverrunError(BaseException):
    """A reader took too long; no `except Exception` stops it."""


def damaged(content: bytes, rng: random.Random, fields: Sequence[Field] = ()) -> bytes:
    """Return a file with one kind of damage; of its numbers, one may say something else."""
    kind = rng.choice(["flip", "flip", "cut", "longer", "copy", "drop", *["number"] * 6])
    data = bytearray(content)
    if kind == "number" and fields:
        for _ in range(rng.choice([1, 1, 2])):
            _set_number(data, rng, *rng.choice(fields))
    elif kind == "cut":
        del data[rng.randrange(len(data)) :]
    elif kind == "longer":
        data += rng.randbytes(rng.choice([1, 8, 64, 5_000]))
    elif kind in ("copy", "drop"):
        start, length = rng.randrange(len(data)), rng.choice([1, 4, 8, 32, 200])
        block = data[start : start + length]
        if kind == "drop":
            del data[start : start + length]
        else:
            to = rng.randrange(len(data))
            data[to : to + rng.choice([0, len(block)])] = block
    else:
        for _ in range(rng.choice([1, 1, 2, 8])):
            data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def _set_number(data: bytearray, rng: random.Random, place: int, width: int) -> None:
    old = int.from_bytes(data[place : place + width], "little")
    new = rng.choice([*LENGTHS, old + 1, old - 1, old * 2, old // 2, rng.randrange(64)])
    data[place : place + width] = (new % 256**width).to_bytes(width, "little")


def damaged_json(value: Any, rng: random.Random) -> bytes:
    """Return the text of a JSON value, of which something was replaced, removed, added or moved."""
    kind = rng.choice(["text", "bytes", "twice", *["part"] * 9])
    if kind == "text":
        return rng.choice(TEXTS)
    value = copy.deepcopy(value)
    if kind == "part":
        for _ in range(rng.choice([1, 1, 2])):
            value = _with_damaged_part(value, rng)
    text = json.dumps(value)
    if kind == "twice" and (keys := re.findall(r'"[^"]*":', text)):
        text = text.replace(rng.choice(keys), rng.choice(keys))
    return damaged(text.encode(), rng) if kind == "bytes" else text.encode()


def _with_damaged_part(value: Any, rng: random.Random) -> Any:
    holders = [holder for holder in _holders(value) if holder]
    if not holders or rng.random() < 0.03:
        return rng.choice(VALUES)
    holder, other = rng.choice(holders), rng.choice(holders)
    key, their_key = (rng.choice(_keys(h)) for h in (holder, other))
    action = rng.choice(["replace"] * 5 + ["swap", "remove", "add"])
    if action == "replace":
        holder[key] = copy.deepcopy(rng.choice(VALUES))
    elif action == "swap":
        # Not into itself, which JSON cannot write.
        holder[key] = copy.deepcopy(other[their_key])
    elif action == "remove":
        del holder[key]
    elif isinstance(holder, dict):
        holder[rng.choice(["x", "", "../x", "x" * 300, "9" * 30])] = holder[key]
    else:
        holder.append(copy.deepcopy(holder[key]))
    return value


def _holders(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        yield value
        for part in value.values() if isinstance(value, dict) else value:
            yield from _holders(part)


def _keys(holder: Any) -> list[Any]:
    return list(holder) if isinstance(holder, dict) else list(range(len(holder)))


def judged(cases: Iterable[bytes], read: Callable[[bytes], object]) -> Counter[str]:
    """Read each case; return how many were read in full and how many refused.

    Raises:
        AssertionError: a case ended in another way, took too long, or took too much memory.
    """
    counts: Counter[str] = Counter()
    before = _reset_peak()
    for number, case in enumerate(cases):
        try:
            with _limited(CASE_SECS):
                read(case)
            counts["read"] += 1
        except BeamGemmaError as error:
            message = str(error)
            assert "\n" not in message, f"case {number}: more than a line: {message}"
            assert len(message) < 2_000, f"case {number}: {message[:200]}"
            counts["refused"] += 1
        except (Exception, OverrunError) as error:
            raise AssertionError(f"case {number}: {type(error).__name__}: {error}") from error
    grown = _peak_bytes() - before
    assert grown < MEMORY_BYTES, f"{grown:,} bytes for damaged files"
    return counts


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise OverrunError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _reset_peak() -> int:
    """Begin to measure the largest memory anew; return what is in use."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak_bytes()


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    assert found is not None
    return int(found[1]) << 10
