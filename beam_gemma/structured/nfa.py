"""A language as a nondeterministic automaton over UTF-8, built only as far as texts reach.

A place is the remainder of a text: repetitions of a language, then the rest, which is another
place. Equal places are the same object: options with the same rest merge again, and a string of up
to 500 characters costs only the places that texts use.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from beam_gemma.errors import RecordError
from beam_gemma.structured.grammar import Chars, Concat, Language, Literal, OneOf, Range, Repeat

MAX_AT_ONCE = 20_000
"""Maximum places that may be looked at to go on by one byte."""


@dataclass(frozen=True, eq=False, slots=True)
class Bytes:
    """The UTF-8 of any one character of a set, or the part of it after its first bytes."""

    following: "Mapping[int, Bytes | None]"
    """Remainder after each possible first byte; None if that byte is the last."""


@dataclass(frozen=True, eq=False, slots=True)
class Texts:
    """Any of some different texts, in UTF-8, of which at least two are not empty."""

    texts: Sequence[bytes]


@dataclass(eq=False, repr=False, slots=True)
class Place:
    """A repeated language, then the rest; a head if it begins with a byte or is an end."""

    language: Language | Bytes | Texts | None
    """None for an end."""
    least: int
    most: int | None
    rest: "Place | None"
    """Place that follows; None for an end only."""
    following: "Mapping[int, Bytes | None] | None"
    """For a head: possible first bytes, and the remainder of their character; else None."""
    heads: "frozenset[Place] | None" = field(default=None, init=False)
    """See `Places.heads`; None until requested."""
    brief: "Place | None" = field(default=None, init=False)
    """See `Places.brief`; None until requested."""


class Places:
    """The places of one language.

    A place is brief if only brief texts may follow: they repeat nothing more often than required,
    and use only a few characters of a wide set. Optional parts stay optional.
    """

    def __init__(self, language: Language, narrow: Callable[[Chars], Chars]) -> None:
        """Create the start, which is the whole language, and the ends.

        Args:
            language: The language.
            narrow: Returns the characters of a set that brief texts may use.
        """
        self.work = 0
        """Number of places looked at so far, the same ones repeatedly."""
        self._narrow = narrow
        self._places: dict[tuple[int, int, int | None, int], Place] = {}
        self._groups: dict[int, list[tuple[bytes, Texts | None]]] = {}
        self.end = Place(None, 1, 1, None, {})
        self.brief_end = Place(None, 1, 1, None, {})
        for end in (self.end, self.brief_end):
            end.heads = frozenset([end])
            end.brief = self.brief_end
        self.start = self._before(self.end, language)

    def heads(self, place: Place) -> frozenset[Place]:
        """Return the heads that a place expands to.

        Raises:
            RecordError: they are too many.
        """
        if place.heads is None and place.following is not None:
            place.heads = frozenset([place])
        if place.heads is None:
            heads, seen, waiting = [], {place}, [place]
            while waiting:
                at = waiting.pop()
                if at.following is not None:
                    heads.append(at)
                    continue
                new = [p for p in self._unfold(at) if p not in seen]
                seen.update(new)
                waiting.extend(new)
                if len(seen) > MAX_AT_ONCE:
                    raise too_ambiguous()
            self.work += len(seen)
            place.heads = frozenset(heads)
        return place.heads

    def behind(self, head: Place, byte: int) -> frozenset[Place]:
        """Return the heads after a byte; none if `head` does not begin with it."""
        self.work += 1
        if not head.following or byte not in head.following:
            return frozenset()
        assert head.rest is not None
        left = head.following[byte]
        return self.heads(head.rest if left is None else self._before(head.rest, left))

    def brief(self, place: Place) -> Place:
        """Return a place reduced to its brief texts."""
        chain = []
        while place.brief is None:
            assert place.rest is not None
            chain.append(place)
            place = place.rest
        brief = place.brief
        for place in reversed(chain):
            assert place.language is not None
            brief = place.brief = self._before(brief, place.language, place.least, place.most)
        return brief

    def _before(
        self, rest: Place, language: Language | Bytes | Texts, least: int = 1, most: int | None = 1
    ) -> Place:
        """Return the one place for `least` to `most` times `language`, then `rest`."""
        is_brief = rest is rest.brief
        if is_brief and (least, most) != (0, 1):
            most = least
        if most == 0:
            return rest
        if isinstance(language, Repeat) and least == most == 1:
            return self._before(rest, language.body, language.min, language.max)
        if isinstance(language, Chars) and is_brief:
            language = self._narrow(language)
        # A place keeps its language and its rest alive, so that their ids are not reused.
        key = (id(language), least, most, id(rest))
        place = self._places.get(key)
        if place is None:
            following = _following(language) if least == most == 1 else None
            place = self._places[key] = Place(language, least, most, rest, following)
            place.brief = place if is_brief else None
        return place

    def _unfold(self, place: Place) -> Iterator[Place]:
        """Yield the places that a place is the union of, expanded by one level."""
        rest = place.rest
        assert rest is not None
        if (place.least, place.most) != (1, 1):
            yield from self._unfold_repeat(place, rest)
            return
        match place.language:
            case Literal(text):
                yield self._before_text(rest, text.encode())
            case Texts() as texts:
                yield from self._before_texts(rest, texts)
            case Concat(parts):
                yield self._before_all(rest, parts)
            case OneOf(options):
                yield from self._before_texts(rest, place.language)
                others = (option for option in options if not isinstance(option, Literal))
                yield from (self._before(rest, option) for option in others)

    def _unfold_repeat(self, place: Place, rest: Place) -> Iterator[Place]:
        assert place.language is not None
        most = None if place.most is None else place.most - 1
        others = self._before(rest, place.language, max(0, place.least - 1), most)
        yield self._before(others, place.language)
        if place.least == 0:
            yield rest

    def _before_all(self, rest: Place, parts: Sequence[Language]) -> Place:
        for part in reversed(parts):
            rest = self._before(rest, part)
        return rest

    def _before_text(self, rest: Place, text: bytes) -> Place:
        for byte in reversed(text):
            rest = self._before(rest, ONE_BYTE[byte])
        return rest

    def _before_texts(self, rest: Place, language: OneOf | Texts) -> Iterator[Place]:
        """Yield the places for the texts that are listed; some share those for their beginning."""
        # A place keeps its language alive, and both it and its brief form need the same tails.
        groups = self._groups.get(id(language))
        if groups is None:
            groups = self._groups[id(language)] = list(_grouped(_listed(language)))
        for prefix, tails in groups:
            after = rest if tails is None else self._before(rest, tails)
            yield self._before_text(after, prefix)


def too_ambiguous() -> RecordError:
    """Return the error of a text that may go on from too many places."""
    return RecordError(
        f"constraint: expected at most {MAX_AT_ONCE:,} ways to read the beginning of a text, got "
        "more; allow fewer repetitions of what may be empty or end in several places"
    )


def _listed(language: OneOf | Texts) -> Iterable[bytes]:
    if isinstance(language, Texts):
        return language.texts
    literals = (option for option in language.options if isinstance(option, Literal))
    return dict.fromkeys(option.text.encode() for option in literals)


def _grouped(texts: Iterable[bytes]) -> "Iterator[tuple[bytes, Texts | None]]":
    """Group different texts by their first byte, and yield what each group begins and ends with."""
    groups: dict[bytes, list[bytes]] = {}
    for text in texts:
        groups.setdefault(text[:1], []).append(text)
    for group in groups.values():
        prefix = _common_prefix(group)
        tails = [text[len(prefix) :] for text in group]
        yield prefix, Texts(tails) if len(tails) > 1 else None


def _common_prefix(texts: Sequence[bytes]) -> bytes:
    first, last = min(texts), max(texts)
    differing = (at for at, byte in enumerate(first) if byte != last[at])
    return first[: next(differing, len(first))]


ONE_BYTE = [Bytes({byte: None}) for byte in range(256)]
# Ranges of the characters with 1, 2, 3 and 4 bytes in UTF-8, in this order.
LENGTHS = ((0, 0x7F), (0x80, 0x7FF), (0x800, 0xFFFF), (0x10000, 0x10FFFF))


def _following(language: Language | Bytes | Texts) -> "Mapping[int, Bytes | None] | None":
    if isinstance(language, Bytes):
        return language.following
    return _utf8(language).following if isinstance(language, Chars) else None


@cache
def _utf8(chars: Chars) -> Bytes:
    """Return the one object for the UTF-8 of a set of characters."""
    return _bytes(
        tuple(
            sequence
            for first, last in chars.ranges
            for low, high in LENGTHS
            if max(first, low) <= min(last, high)
            for sequence in _sequences(chr(max(first, low)).encode(), chr(min(last, high)).encode())
        )
    )


@cache
def _bytes(sequences: tuple[tuple[Range, ...], ...]) -> Bytes:
    """Return the one object for the bytes that match one of some sequences of byte ranges."""
    tails: dict[int, list[tuple[Range, ...]]] = {}
    for (first, last), *tail in sequences:
        for byte in range(first, last + 1):
            tails.setdefault(byte, []).append(tuple(tail))
    return Bytes({b: _bytes(tuple(left)) if left[0] else None for b, left in tails.items()})


def _sequences(first: bytes, last: bytes) -> Iterator[tuple[Range, ...]]:
    """Yield byte ranges that match the characters from `first` to `last`, equally long."""
    start, stop, length = first[0], last[0], len(first) - 1
    if length == 0:
        yield ((start, stop),)
        return
    if start == stop:
        yield from (((start, stop), *tail) for tail in _sequences(first[1:], last[1:]))
        return
    lowest, highest = b"\x80" * length, b"\xbf" * length
    if first[1:] != lowest:
        yield from _sequences(first, bytes([start]) + highest)
        start += 1
    if last[1:] != highest:
        yield from _sequences(bytes([stop]) + lowest, last)
        stop -= 1
    if start <= stop:
        yield ((start, stop), *[(0x80, 0xBF)] * length)
