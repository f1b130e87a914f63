"""Where a text stands in its language, byte by byte, and how many tokens it needs to end.

Ways to the end are looked for among brief texts only: nothing in them is repeated more often than
it must, and two characters stand for a wide choice. So a way is always a real one, whatever was
written before it, and a shorter one can exist only where further repetitions, or rare characters,
make fewer tokens. Brief texts are finite in number, so places are measured backwards, each once.
"""

import sys
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from beam_gemma.errors import OptionsError
from beam_gemma.structured.grammar import Chars, Concat, Language, Literal, OneOf, Repeat, chars
from beam_gemma.structured.nfa import Place, Places

UNREACHABLE = sys.maxsize
"""The distance from which no tokens lead to an end."""
MAX_BRIEF_LENGTH = 20_000
"""Characters of a brief text, each of which is measured."""
MAX_STATES = 50_000
"""States that are remembered. Beyond, all are forgotten but those that texts are in."""
FEW, MANY = 10, 1000
"""Two characters stand for more than a few; they are chosen among no more than many."""


class Vocabulary:
    """The bytes of tokens, in order: tokens that begin with the same bytes lie together."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        """Sort tokens.

        Args:
            tokens: By token id; no text has one without bytes. Where tokens have the same bytes,
                ways to the end take the last one.
        """
        self.tokens = tokens
        self._ids = {data: token_id for token_id, data in enumerate(tokens) if data}
        self._sorted = sorted(self._ids)
        self._narrow: dict[Chars, Chars] = {}

    def find(self, prefix: bytes, start: int = 0) -> int | None:
        """Return where the tokens begin that begin with some bytes; None if there are none.

        Args:
            prefix: The bytes.
            start: Where the tokens begin that begin with the first few of them.
        """
        at = bisect_left(self._sorted, prefix, start)
        found = at < len(self._sorted) and self._sorted[at].startswith(prefix)
        return at if found else None

    def token_id(self, data: bytes) -> int | None:
        """Return the token of just these bytes."""
        return self._ids.get(data)

    def narrow(self, wide: Chars) -> Chars:
        """Return some characters; of many, the two that a single token repeats most often.

        They are of ASCII if any are: a digit that stands for others is better none of Bengali.
        """
        if sum(last - first + 1 for first, last in wide.ranges) <= FEW:
            return wide
        if wide not in self._narrow:
            every = (p for first, last in wide.ranges for p in range(first, last + 1))
            points = [*islice(every, MANY)]
            plain = [point for point in points if chr(point).isascii()]
            best = sorted(plain or points, key=self._longest_run, reverse=True)[:2]
            self._narrow[wide] = chars(*((point, point) for point in best))
        return self._narrow[wide]

    def _longest_run(self, point: int) -> int:
        data, length = chr(point).encode(), 0
        while self.find(data * (length + 1)) is not None:
            length += 1
        return length


class _Way(NamedTuple):
    """A way to the end; of two with as many tokens the smaller first token comes first."""

    num_tokens: int
    token_id: int
    """The first of them; -1 if there is none."""


NO_WAY = _Way(UNREACHABLE, -1)


@dataclass(eq=False, slots=True)
class State:
    """Where a text may be in its language."""

    heads: frozenset[Place]
    edges: "dict[int, State]" = field(default_factory=dict, init=False)
    """States behind a byte, as far as they were asked for."""
    way: _Way | None = field(default=None, init=False)
    """None until asked for."""


DEAD = State(frozenset())
"""The state of bytes that no text of the language begins with."""


class Automaton:
    """A language as a deterministic automaton over UTF-8, for one thread at a time."""

    def __init__(self, language: Language, vocabulary: Vocabulary) -> None:
        """Measure the way to the end.

        Raises:
            OptionsError: the shortest text is too long, or the tokens cannot write any.
        """
        _check_length(language)
        self._vocabulary = vocabulary
        self._places = Places(language, vocabulary.narrow)
        self._states: dict[frozenset[Place], State] = {}
        self._ways: dict[Place, _Way] = {self._places.brief_end: _Way(0, -1)}
        self.start = State(self._places.heads(self._places.start))
        if self.distance(self.start) == UNREACHABLE:
            raise OptionsError(
                "constraint: expected a text that tokens of the model can write, got none"
            )

    def advance(self, state: State, data: bytes) -> State:
        """Return the state behind some more bytes."""
        for byte in data:
            state = state.edges.get(byte) or self._follow(state, byte)
        return state

    def step(self, state: State, token_id: int) -> State:
        """Return the state behind a token; one without bytes leads nowhere."""
        data = self._vocabulary.tokens[token_id]
        return self.advance(state, data) if data else DEAD

    def is_accepting(self, state: State) -> bool:
        """Whether the text may end here."""
        return self._places.end in state.heads

    def is_final(self, state: State) -> bool:
        """Whether the text must end here."""
        return state.heads == {self._places.end}

    def distance(self, state: State) -> int:
        """Return how many tokens lead to an end; UNREACHABLE if none do."""
        return self._way(state).num_tokens

    def next_token(self, state: State) -> int:
        """Return the first of these tokens; the state behind it is nearer to an end."""
        return self._way(state).token_id

    def _follow(self, state: State, byte: int) -> State:
        heads = frozenset[Place]().union(*(self._places.behind(h, byte) for h in state.heads))
        following = state.edges[byte] = self._state(heads) if heads else DEAD
        return following

    def _state(self, heads: frozenset[Place]) -> State:
        state = self._states.get(heads)
        if state is None:
            if len(self._states) >= MAX_STATES:
                self._states.clear()
                self.start.edges.clear()
            state = self._states[heads] = State(heads)
        return state

    def _way(self, state: State) -> _Way:
        if state.way is None:
            briefs = [self._places.brief(head) for head in state.heads]
            self._measure(briefs)
            state.way = min((self._ways[brief] for brief in briefs), default=NO_WAY)
        return state.way

    def _measure(self, briefs: Iterable[Place]) -> None:
        """Find the ways of places that begin with a byte, and of all behind them."""
        moves: dict[Place, list[tuple[int, State]]] = {}
        waiting = list(briefs)
        while waiting:
            place = waiting.pop()
            if place in moves:
                self._ways[place] = self._shortest(moves.pop(place))
            elif place not in self._ways:
                moves[place] = self._moves(place)
                # It comes again once all behind it are measured.
                waiting.append(place)
                waiting += [head for _, state in moves[place] for head in state.heads]

    def _shortest(self, moves: Iterable[tuple[int, State]]) -> _Way:
        ways = [
            _Way(1 + min(self._ways[head].num_tokens for head in state.heads), token_id)
            for token_id, state in moves
        ]
        return min([*ways, NO_WAY])

    def _moves(self, place: Place) -> list[tuple[int, State]]:
        """Return tokens that go on from a brief place, and the states behind them."""
        moves = []
        waiting = [(self._state(frozenset([place])), b"", 0)]
        while waiting:
            state, data, start = waiting.pop()
            for byte in {byte for head in state.heads for byte in head.following or ()}:
                longer = data + bytes([byte])
                found = self._vocabulary.find(longer, start)
                if found is None:
                    continue
                following = state.edges.get(byte) or self._follow(state, byte)
                waiting.append((following, longer, found))
                token_id = self._vocabulary.token_id(longer)
                if token_id is not None:
                    moves.append((token_id, following))
        return moves


def _check_length(language: Language) -> None:
    length = _brief_length(language, {})
    if length > MAX_BRIEF_LENGTH:
        raise OptionsError(
            f"constraint: expected at most {MAX_BRIEF_LENGTH} characters that texts must have, got "
            f"{length}; lower minLength, minItems, or the counts of the regex"
        )


def _brief_length(language: Language, known: dict[int, int]) -> int:
    """Return the length of a longest text in which nothing is repeated more often than it must.

    Args:
        language: The language.
        known: Lengths of parts, by their identity: parts of a tree may be the same object.
    """
    if id(language) not in known:
        match language:
            case Literal(text):
                length = len(text)
            case Concat(parts):
                length = sum(_brief_length(part, known) for part in parts)
            case OneOf(options):
                length = max(_brief_length(option, known) for option in options)
            case Repeat(body, least):
                length = max(1, least) * _brief_length(body, known)
            case _:
                length = 1
        known[id(language)] = length
    return known[id(language)]
