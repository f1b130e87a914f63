"""Looks at the start of an OGG before libsndfile does, whose decoder of Vorbis may not survive it.

A Vorbis file begins with the code books of its encoder. libvorbis puts 8 bytes on the stack for
each entry of a book, so 250 bytes of file, whose book claims a million entries, end the process.
"""

import re
import zlib
from collections.abc import Iterator

from beam_gemma.errors import RecordError

MAX_ENTRIES = 1 << 14
"""Most entries of a code book; libvorbis writes up to 6,561."""
MAX_VALUES = 1 << 22
"""Most values of all code books, which take 4 bytes each; libvorbis writes up to about 90,000."""
MAX_SETUP_BYTES = 1 << 18
"""Most bytes of the packet with the code books; libvorbis writes up to about 11,000."""
FIRST_PAGE = 2
"""Flag of a sound's first page."""
_CONTINUED = 1
"""Flag of a page that begins within a packet."""
_FIRST_PAGE = re.compile(
    b"OggS\0[%b]" % b"".join(re.escape(bytes([n])) for n in range(256) if n & FIRST_PAGE), re.DOTALL
)
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
"""Each byte with its bits in the other order."""
_SYNC = 0x564342
"""What each code book begins with."""


def check_ogg(data: bytes, name: str) -> None:
    """Refuse an OGG that ends early, has several sounds, or would harm its decoder.

    Args:
        data: The bytes of the file, which begins with `OggS`.
        name: What errors call the sound.

    Raises:
        RecordError: as above, or the file is neither Vorbis nor Opus.
    """
    last = data.rindex(b"OggS")
    if _end_of_page(data, last) is None:
        raise RecordError(
            f"{name}: expected a whole page at the end of an OGG, got a part of one, as the file "
            "is cut off; copy it once more"
        )
    number = len(_FIRST_PAGE.findall(data))
    if number > 1:
        raise RecordError(
            f"{name}: expected one sound in an OGG, got {number:,} behind or beside one another; "
            "write each to a file of its own"
        )
    packets = _packets(data)
    first = next(packets, b"")
    if first.startswith(b"OpusHead"):
        return
    if not first.startswith(b"\1vorbis"):
        raise RecordError(
            f"{name}: expected Vorbis or Opus, got an OGG with something else; convert it to one "
            "of these"
        )
    next(packets, b"")  # comments
    setup = next(packets, b"")
    if not setup.startswith(b"\5vorbis") or not _is_harmless(setup):
        raise RecordError(
            f"{name}: expected code books of Vorbis with at most {MAX_ENTRIES:,} entries each and "
            f"{MAX_VALUES:,} values in all, got others, or damaged ones; write the file anew"
        )


def _end_of_page(data: bytes, start: int) -> int | None:
    """Return where a page ends; None if the data ends before."""
    sizes = start + 27
    if sizes > len(data) or sizes + data[start + 26] > len(data):
        return None
    end = sizes + data[start + 26]
    end += sum(data[sizes:end])
    return end if end <= len(data) else None


def _packets(data: bytes) -> Iterator[bytes]:
    """Yield packets from the start on, as long as pages are whole and follow one another.

    A decoder passes over pages that are damaged or of another sound. Where one stands, nothing more
    is yielded, so that what is looked at is what the decoder gets.
    """
    at, number, packet = 0, 0, bytearray()
    while data.startswith(b"OggS\0", at) and (end := _end_of_page(data, at)) is not None:
        page = data[at:end]
        is_next = page[14:18] == data[14:18] and int.from_bytes(page[18:22], "little") == number
        if not is_next or bool(page[5] & _CONTINUED) != bool(packet) or not _is_sound(page):
            return
        begin = 27 + page[26]
        for size in page[27:begin]:
            packet += page[begin : begin + size]
            begin += size
            if size < 255:
                yield bytes(packet)
                packet.clear()
        at, number = end, number + 1


def _is_sound(page: bytes) -> bool:
    """Return whether the checksum of a page is right: that of zip files, with all bits reversed."""
    bits = (page[:22] + bytes(4) + page[26:]).translate(_REVERSED)
    found = zlib.crc32(bits, 0xFFFFFFFF) ^ 0xFFFFFFFF
    return found.to_bytes(4).translate(_REVERSED) == page[22:26]


class _Bits:
    """The bits of a packet, of each byte the lowest first."""

    def __init__(self, packet: bytes) -> None:
        self._bits = f"{int.from_bytes(packet, 'little'):0{8 * len(packet)}b}"[::-1]
        self._at = 0

    def read(self, number: int) -> int:
        """Return a number of so many bits; of those behind the end, zeros."""
        self.skip(number)
        return int(self._bits[self._at - number : self._at][::-1] or "0", 2)

    def skip(self, number: int) -> None:
        """Go on by so many bits."""
        self._at += number

    def skip_lengths(self, number: int) -> None:
        """Go on by a bit for each entry, and five more behind each 1."""
        lengths = re.compile(f"(?:0|1.{{5}}){{{number}}}+")
        found = lengths.match(self._bits, self._at)
        self._at = len(self._bits) if found is None else found.end()


def _is_harmless(setup: bytes) -> bool:
    """Return whether all code books can be read and are small.

    Source: section 3.2.1 of the Vorbis I specification.
    """
    if len(setup) > MAX_SETUP_BYTES:
        return False
    bits = _Bits(setup[7:])
    num_values = 0
    for _ in range(bits.read(8) + 1):
        if bits.read(24) != _SYNC:
            return False
        num_dimensions, num_entries = bits.read(16), bits.read(24)
        num_values += num_dimensions * num_entries
        if not num_dimensions or num_entries > MAX_ENTRIES or num_values > MAX_VALUES:
            return False
        _skip_code(bits, num_entries)
        _skip_values(bits, num_dimensions, num_entries)
    return True


def _skip_code(bits: _Bits, num_entries: int) -> None:
    """Go on behind the lengths of a book's code words."""
    if bits.read(1):  # in ascending order, of each length how many
        bits.skip(5)
        left = num_entries
        for _ in range(32):
            if left > 0:
                left -= bits.read(left.bit_length())
    elif bits.read(1):  # with entries that are not used
        bits.skip_lengths(num_entries)
    else:
        bits.skip(5 * num_entries)


def _skip_values(bits: _Bits, num_dimensions: int, num_entries: int) -> None:
    """Go on behind the values that a book's entries stand for."""
    kind = bits.read(4)
    if kind not in (1, 2):
        return
    bits.skip(64)
    width = bits.read(4) + 1
    bits.skip(1)
    number = num_dimensions * num_entries
    if kind == 1:  # of each dimension the same, so that their power is at most the entries
        number = round(num_entries ** (1 / num_dimensions)) + 1
        while number**num_dimensions > num_entries:
            number -= 1
    bits.skip(width * number)
