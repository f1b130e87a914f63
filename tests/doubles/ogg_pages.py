"""Pages of OGG files that are made up, with the right checksums."""

import struct
from collections.abc import Iterable

FIRST, LAST = 2, 4
"""Flags of a page."""


def _bits_of(byte: int) -> int:
    total = byte << 24
    for _ in range(8):
        total = (total << 1 & 0xFFFFFFFF) ^ (0x04C11DB7 if total >> 31 else 0)
    return total


_SUMS = [_bits_of(byte) for byte in range(256)]


def crc(data: bytes) -> int:
    """Return the checksum of a page, byte by byte as the specification has it."""
    total = 0
    for byte in data:
        total = (total << 8 & 0xFFFFFFFF) ^ _SUMS[total >> 24 ^ byte]
    return total


def page(packets: Iterable[bytes], flags: int, number: int, *, position: int = 0, serial: int = 7):
    """Return a page with whole packets."""
    sizes, body = b"", b""
    for packet in packets:
        sizes += b"\xff" * (len(packet) // 255) + bytes([len(packet) % 255])
        body += packet
    head = struct.pack("<4sBBqIII", b"OggS", 0, flags, position, serial, number, 0)
    return repaired(head + bytes([len(sizes)]) + sizes + body)


def repaired(data: bytes) -> bytes:
    """Return pages with right checksums, of which some may be damaged."""
    result, at = bytearray(data), 0
    while (at := result.find(b"OggS", at)) >= 0 and at + 27 <= len(result):
        end = at + 27 + result[at + 26]
        end += sum(result[at + 27 : end])
        if end > len(result):
            break
        result[at + 22 : at + 26] = bytes(4)
        result[at + 22 : at + 26] = struct.pack("<I", crc(result[at:end]))
        at = end
    return bytes(result)


def vorbis(num_books: int, log_entries: int, *, num_dimensions: int = 1) -> list[bytes]:
    """Return the three first packets of a Vorbis file, whose books have 2**log_entries entries."""
    setup = [(byte, 8) for byte in b"\5vorbis"] + [(num_books - 1, 8)]
    for _ in range(num_books):
        entries = 1 << log_entries
        setup += [(0x564342, 24), (num_dimensions, 16), (entries, 24), (1, 1)]
        setup += [(log_entries - 1, 5), (entries, log_entries + 1), (0, 4)]
    setup += [(0, 6), (0, 16)]  # times
    setup += [(0, 6), (1, 16), (0, 5), (0, 2), (1, 4)]  # floors
    setup += [(0, 6), (0, 16), (0, 24), (16, 24), (7, 24), (0, 6), (0, 8), (0, 4)]  # residues
    setup += [(0, 6), (0, 16), (0, 4), (0, 8), (0, 8), (0, 8)]  # mappings
    setup += [(0, 6), (0, 1), (0, 16), (0, 16), (0, 8), (1, 1)]  # modes
    value = width = 0
    for number, bits in setup:
        value |= number << width
        width += bits
    about = b"\1vorbis" + struct.pack("<IBIiiiBB", 0, 1, 16_000, 0, 64_000, 0, 0xB8, 1)
    notes = b"\3vorbis" + struct.pack("<IcIB", 1, b"x", 0, 1)
    return [about, notes, value.to_bytes(-(-width // 8), "little")]


def vorbis_file(num_books: int, log_entries: int, **options: int) -> bytes:
    """Return a Vorbis file of a little silence; see `vorbis`."""
    about, *more = vorbis(num_books, log_entries, **options)
    sound = page([bytes(10)] * 5, LAST, 2, position=1_000)
    return page([about], FIRST, 0) + page(more, 0, 1) + sound
