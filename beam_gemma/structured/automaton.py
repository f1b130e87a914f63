"""Track a text's state in its language, byte by byte, and the tokens that it needs to end.

The search for a way to the end considers brief texts only: they repeat nothing more often than
required, and use only two characters of a wide set. So each way found is real, whatever was written
before it, and a shorter one exists only where further repetitions, or rare characters, take fewer
tokens. Brief texts are finite in number, so each place is measured once, backwards.
"""

import sys
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from beam_gemma.errors import OptionsError, RecordError
from beam_gemma.structured.grammar import Chars, Language, chars
from beam_gemma.structured.limits import check_limits
from beam_gemma.structured.nfa import MAX_AT_ONCE, Place, Places, too_ambiguous

UNREACHABLE = sys.maxsize
"""Distance of a state from which no tokens lead to an end."""
MAX_WORK = 1_500_000
"""Maximum places that may be looked at to measure a state; about 200,000 take a second."""
MAX_STATES = 50_000
"""Number of cached states; at this limit, all are dropped except those that texts are in."""
MAX_HELD = 2_000_000
"""Number of heads of all cached states, a second limit for the same."""
FEW, MANY = 10, 1000
"""Two characters stand for a set of more than FEW, chosen among its first MANY characters."""


class Vocabulary:
    """Tokens sorted by their bytes, so that tokens with a common prefix are adjacent."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        """Sort tokens.

        Args:
            tokens: The bytes of each token, by token id; a token without bytes is never in a text.
                Of tokens with the same bytes, ways to the end use the last one.
        """
        self.tokens = tokens
        self._ids = {data: token_id for token_id, data in enumerate(tokens) if data}
        self._sorted = sorted(self._ids)
        self._narrow: dict[Chars, Chars] = {}

    def find(self, prefix: bytes, start: int = 0) -> int | None:
        """Return the index of the first token that begins with `prefix`; None if there is none.

        Args:
            prefix: The first bytes of the token.
            start: The index at which to begin: that of a shorter prefix of the same bytes.
        """
        at = bisect_left(self._sorted, prefix, start)
        found = at < len(self._sorted) and self._sorted[at].startswith(prefix)
        return at if found else None

    def token_id(self, data: bytes) -> int | None:
        """Return the id of the token with exactly these bytes; None if there is none."""
        return self._ids.get(data)

    def narrow(self, wide: Chars) -> Chars:
        """Return a small set as it is; of a large one, the two that one token repeats most often.

        ASCII characters are preferred: "0" represents digits better than a Bengali digit does.
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
    """A way to the end. Ways sort by number of tokens, then by the id of the first token."""

    num_tokens: int
    token_id: int
    """Id of the first token; -1 if there is none."""


NO_WAY = _Way(UNREACHABLE, -1)
_Move = tuple[int, frozenset[Place]]
"""A token id, and the heads after that token."""
ONE = [bytes([byte]) for byte in range(256)]


@dataclass(eq=False, slots=True)
class State:
    """The places at which a text may be in its language."""

    heads: frozenset[Place]
    edges: "dict[int, State]" = field(default_factory=dict, init=False)
    """States after each next byte that was requested so far."""
    way: _Way | None = field(default=None, init=False)
    """Way to the end; None until requested."""


DEAD = State(frozenset())
"""State after bytes that no text of the language begins with."""


class Automaton:
    """A language as a deterministic automaton over UTF-8, for one thread at a time."""

    def __init__(self, language: Language, vocabulary: Vocabulary) -> None:
        """Measure the way from the start to the end.

        Raises:
            OptionsError: the language exceeds a limit, or the tokens cannot write any text.
        """
        check_limits(language)
        self._vocabulary = vocabulary
        self._places = Places(language, vocabulary.narrow)
        self._states: dict[frozenset[Place], State] = {}
        self._num_held = 0
        self._ways: dict[Place, _Way] = {self._places.brief_end: _Way(0, -1)}
        try:
            self.start = State(self._places.heads(self._places.start))
            distance = self.distance(self.start)
        except RecordError as error:
            raise OptionsError(str(error)) from error
        if distance == UNREACHABLE:
            raise OptionsError(
                "constraint: expected a text that tokens of the model can write, got none"
            )

    def advance(self, state: State, data: bytes) -> State:
        """Return the state after `data`."""
        for byte in data:
            state = state.edges.get(byte) or self._follow(state, byte)
        return state

    def step(self, state: State, token_id: int) -> State:
        """Return the state after a token; `DEAD` for a token without bytes."""
        data = self._vocabulary.tokens[token_id]
        return self.advance(state, data) if data else DEAD

    def is_accepting(self, state: State) -> bool:
        """Return whether the text may end here."""
        return self._places.end in state.heads

    def is_final(self, state: State) -> bool:
        """Return whether the text must end here."""
        return state.heads == {self._places.end}

    def distance(self, state: State) -> int:
        """Return the number of tokens on the way to an end; `UNREACHABLE` if there is none.

        Raises:
            RecordError: to measure them takes more work than is allowed.
        """
        return self._way(state).num_tokens

    def next_token(self, state: State) -> int:
        """Return the first token on the way to an end; the state after it is nearer to the end."""
        return self._way(state).token_id

    def _follow(self, state: State, byte: int) -> State:
        limit = self._places.work + MAX_AT_ONCE
        behind = []
        for head in state.heads:
            behind.append(self._places.behind(head, byte))
            if self._places.work > limit:
                raise too_ambiguous()
        heads = behind[0] if len(behind) == 1 else frozenset[Place]().union(*behind)
        following = state.edges[byte] = self._state(heads) if heads else DEAD
        return following

    def _state(self, heads: frozenset[Place]) -> State:
        state = self._states.get(heads)
        if state is None:
            if len(self._states) >= MAX_STATES or self._num_held >= MAX_HELD:
                self._states.clear()
                self.start.edges.clear()
                self._num_held = 0
            self._num_held += len(heads)
            state = self._states[heads] = State(heads)
        return state

    def _way(self, state: State) -> _Way:
        if state.way is None:
            briefs = [self._places.brief(head) for head in state.heads]
            self._measure(briefs)
            state.way = min((self._ways[brief] for brief in briefs), default=NO_WAY)
        return state.way

    def _measure(self, briefs: Iterable[Place]) -> None:
        """Compute the ways of some brief heads, and of all heads after them.

        Raises:
            RecordError: they are too many.
        """
        limit = self._places.work + MAX_WORK
        moves: dict[Place, list[_Move]] = {}
        waiting = list(briefs)
        while waiting:
            place = waiting.pop()
            if place in moves:
                self._ways[place] = self._shortest(moves.pop(place))
            elif place not in self._ways:
                moves[place] = self._moves(place)
                if self._places.work > limit:
                    raise RecordError(
                        f"constraint: expected at most {MAX_WORK:,} steps to find the shortest way "
                        "to an end, got more; allow fewer choices, optional properties or "
                        "repetitions within each other"
                    )
                # The place is popped again once all heads after it are measured.
                waiting.append(place)
                for _, heads in moves[place]:
                    waiting += heads

    def _shortest(self, moves: Iterable[_Move]) -> _Way:
        best = NO_WAY
        for token_id, heads in moves:
            num_tokens = min([self._ways[head].num_tokens for head in heads])
            if (num_tokens, token_id) < (best.num_tokens - 1, best.token_id):
                best = _Way(num_tokens + 1, token_id)
        return best

    def _moves(self, place: Place) -> list[_Move]:
        """Return the tokens that may follow at a brief place, and the heads after them."""
        moves = []
        find, token_id = self._vocabulary.find, self._vocabulary.token_id
        waiting = [(self._places.heads(place), b"", 0)]
        while waiting:
            heads, data, start = waiting.pop()
            for byte in _first_bytes(heads):
                longer = data + ONE[byte]
                found = find(longer, start)
                if found is not None:
                    following = self._behind(heads, byte)
                    waiting.append((following, longer, found))
                    if (token := token_id(longer)) is not None:
                        moves.append((token, following))
        return moves

    def _behind(self, heads: frozenset[Place], byte: int) -> frozenset[Place]:
        """Return the heads after a byte that some of the heads begin with."""
        if len(heads) == 1:
            (head,) = heads
            return self._places.behind(head, byte)
        state = self._state(heads)
        return (state.edges.get(byte) or self._follow(state, byte)).heads


def _first_bytes(heads: frozenset[Place]) -> Iterable[int]:
    if len(heads) == 1:
        (head,) = heads
        return head.following or ()
    return {byte for head in heads for byte in head.following or ()}
