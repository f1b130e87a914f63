"""Texts followed byte by byte, and the shortest ways to their ends."""

import itertools
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_gemma.errors import OptionsError
from beam_gemma.model.tokenizer import Tokenizer
from beam_gemma.structured import automaton as module
from beam_gemma.structured.automaton import DEAD, UNREACHABLE, Automaton, State, Vocabulary
from beam_gemma.structured.constraint import Constraint, MaskMaker, allowed_ids
from beam_gemma.structured.grammar import (
    ANY_CHAR,
    EMPTY,
    Concat,
    Language,
    Literal,
    OneOf,
    Repeat,
    chars,
    except_for,
    optional,
    to_regex,
)
from tests.doubles.tiny_tokenizer import tiny_tokenizer_model

# Beartype draws the element of a tuple that it looks at.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")

ALPHABET = 'ab"é😀'
TOKENIZER = Tokenizer(tiny_tokenizer_model())
MASKS = MaskMaker()
BYTES = Vocabulary([b"", *(bytes([byte]) for byte in range(256))])
SMALL = [b"", b"a", b"b", b'"', b"ab", b"aa", b"bb", b'a"', b"abab", "é".encode(), b"\xc3", b"\xa9"]
SMALL += [bytes([byte]) for byte in "😀".encode()]
DIGIT = chars((48, 57))
LOWER = chars((97, 122))


def subsets() -> st.SearchStrategy[Language]:
    letters = st.lists(st.sampled_from(ALPHABET), min_size=1, max_size=3)
    return letters.map(lambda some: chars(*((ord(c), ord(c)) for c in some)))


def languages() -> st.SearchStrategy[Language]:
    leaves = st.text(ALPHABET, max_size=3).map(Literal) | subsets() | st.just(ANY_CHAR)
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3).map(lambda parts: Concat(tuple(parts)))
            | st.lists(inner, min_size=1, max_size=3).map(lambda options: OneOf(tuple(options)))
            | st.builds(repeat, inner, st.integers(0, 2), st.none() | st.integers(0, 2))
        ),
        max_leaves=6,
    )


def repeat(body: Language, least: int, more: int | None) -> Repeat:
    return Repeat(body, least, None if more is None else least + more)


def literals(*texts: str) -> OneOf:
    return OneOf(tuple(map(Literal, texts)))


def state_of(automaton: Automaton, text: str) -> State:
    return automaton.advance(automaton.start, text.encode())


@settings(deadline=None)
@given(languages(), st.lists(st.text([*ALPHABET, "c"], max_size=6), max_size=20))
def test_it_holds_the_texts_that_the_regular_expression_matches(
    language: Language, texts: list[str]
) -> None:
    automaton, regex = Automaton(language, BYTES), re.compile(to_regex(language), re.DOTALL)
    for text in texts:
        assert automaton.is_accepting(state_of(automaton, text)) == bool(regex.fullmatch(text))


@settings(deadline=None)
@given(languages(), st.text([*ALPHABET, "c"], max_size=6))
def test_a_state_is_dead_when_no_text_goes_on(language: Language, text: str) -> None:
    """Every state that is not dead has a way to an end, of which each step is alive."""
    automaton = Automaton(language, BYTES)
    state = state_of(automaton, text)
    if state is DEAD:
        assert automaton.distance(state) == UNREACHABLE
        assert automaton.advance(state, b"a") is DEAD
        return
    while (distance := automaton.distance(state)) > 0:
        assert not automaton.is_accepting(state)
        state = automaton.step(state, automaton.next_token(state))
        assert automaton.distance(state) < distance
    assert automaton.is_accepting(state)


@settings(deadline=None)
@given(languages(), st.text(ALPHABET, max_size=3))
def test_a_final_state_has_nothing_behind_it(language: Language, text: str) -> None:
    automaton = Automaton(language, BYTES)
    state = state_of(automaton, text)
    follows = any(automaton.advance(state, bytes([byte])) is not DEAD for byte in range(256))
    assert automaton.is_final(state) == (automaton.is_accepting(state) and not follows)


@settings(max_examples=40, deadline=None)
@given(languages(), st.data())
def test_a_token_may_follow_if_llguidance_says_so(language: Language, data: st.DataObject) -> None:
    constraint = Constraint(language, TOKENIZER, [TOKENIZER.eos_token_id])
    automaton, guide, state = constraint.automaton, constraint.start(), constraint.automaton.start
    for _ in range(8):
        alive = {t for t in range(300) if automaton.step(state, t) is not DEAD}
        allowed = set(allowed_ids(MASKS.begin([guide])(guide)).tolist())
        assert (TOKENIZER.eos_token_id in allowed) == automaton.is_accepting(state)
        allowed.discard(TOKENIZER.eos_token_id)
        # Where a text must follow, llguidance allows only the token that a tokenizer would take.
        assert allowed <= alive if guide.matcher.compute_ff_tokens() else allowed == alive
        if not allowed:
            break
        token_id = data.draw(st.sampled_from(sorted(allowed)))
        guide.take(token_id)
        state = automaton.step(state, token_id)


@pytest.mark.parametrize("point", [0, 0x7F, 0x80, 0x7FF, 0x800, 0xD7FF, 0xE000, 0xFFFF, 0x10000])
def test_utf8_at_its_borders(point: int) -> None:
    """Ranges that begin or end beside a border hold what they say, and no other bytes."""
    for language in (chars((point, point)), chars((0, point)), chars((point, 0x10FFFF))):
        automaton = Automaton(language, BYTES)
        for other in {max(0, point - 1), point, point + 1} - {0xD800, 0xDFFF}:
            inside = any(first <= other <= last for first, last in language.ranges)
            assert automaton.is_accepting(state_of(automaton, chr(other))) == inside
    for wrong in (b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b"\x80", b"\xff"):
        automaton = Automaton(ANY_CHAR, BYTES)
        assert automaton.advance(automaton.start, wrong) is DEAD


def test_tokens_without_bytes_lead_nowhere() -> None:
    automaton = Automaton(Repeat(ANY_CHAR, 0, None), BYTES)
    assert automaton.step(automaton.start, 0) is DEAD
    assert automaton.step(automaton.start, 1 + ord("a")) is not DEAD


def shortest(language: Language, num_tokens: int) -> int:
    """Return the least number of small tokens that make a text of a language, by trying all."""
    regex = re.compile(to_regex(language).encode("utf-8"), re.DOTALL)
    texts = {b""}
    for distance in range(num_tokens + 1):
        if any(regex.fullmatch(text) for text in texts):
            return distance
        texts = {text + token for text in texts for token in SMALL if token}
    return UNREACHABLE


EXACT = st.recursive(
    st.text('ab"', min_size=1, max_size=3).map(Literal),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: Concat(tuple(parts)))
        | st.lists(inner, min_size=1, max_size=3).map(lambda options: OneOf(tuple(options)))
        | inner.map(optional)
        | inner.map(lambda body: Repeat(body, 2, 2))
    ),
    max_leaves=4,
)


@settings(max_examples=40, deadline=None)
@given(EXACT)
def test_distances_are_exact_where_nothing_is_repeated_at_will(language: Language) -> None:
    automaton = Automaton(language, Vocabulary(SMALL))
    expected = shortest(language, 3)
    distance = automaton.distance(automaton.start)
    assert distance == expected if expected < UNREACHABLE else distance > 3


@pytest.mark.parametrize(
    ("language", "tokens", "way"),
    [
        (literals("xqz", "positive"), ["x", "q", "z", "positive"], ["positive"]),
        (literals("no", "yes"), [*"noyes", "yes"], ["yes"]),
        (Concat((Literal("a"), optional(Literal("b")), Literal("c"))), [*"abc", "abc"], ["abc"]),
        (Repeat(LOWER, 10, 20), ["xxxx", *"abcdefghijklm", "x"], ["xxxx", "xxxx", "a", "a"]),
        (Repeat(chars((0x400, 0x4FF)), 2, 2), [*map(chr, range(0x400, 0x500)), "жж"], ["жж"]),
        (Repeat(DIGIT, 2, 2), [*"0123456789", "73"], ["73"]),
        (Repeat(chars((48, 57), (0x660, 0x669)), 2, 2), ["0", "1", "٣", "٣٣"], ["0", "0"]),
        (optional(Literal("a")), ["a"], []),
    ],
)  # fmt: skip
def test_next_tokens_are_a_shortest_way(
    language: Language, tokens: list[str], way: list[str]
) -> None:
    automaton = Automaton(language, Vocabulary([token.encode() for token in tokens]))
    state, found = automaton.start, []
    while automaton.distance(state):
        found.append(tokens[automaton.next_token(state)])
        assert automaton.distance(state) == len(way) - len(found) + 1
        state = automaton.step(state, automaton.next_token(state))
    assert found == way
    assert automaton.is_accepting(state)


def test_a_way_ends_a_character_that_tokens_began() -> None:
    automaton = Automaton(Concat((Literal('"'), Repeat(ANY_CHAR, 1, None), Literal('"'))), BYTES)
    state = automaton.advance(automaton.start, '"é😀'.encode()[:-2])
    assert automaton.distance(state) == 3


def test_what_the_tokens_cannot_write_is_refused_or_unreachable() -> None:
    """A state that no tokens lead out of is not dead, but never near enough to an end."""
    only_a = Vocabulary([b"a"])
    with pytest.raises(OptionsError, match="expected a text that tokens of the model can write"):
        Automaton(Literal("ab"), only_a)
    automaton = Automaton(OneOf((Literal("ab"), Literal("aaa"))), only_a)
    assert automaton.distance(automaton.start) == 3
    assert automaton.distance(state_of(automaton, "aa")) == 1
    assert automaton.distance(Automaton(literals("a", "b"), only_a).start) == 1


def test_a_text_that_must_be_long_is_refused() -> None:
    items = Repeat(Concat((Repeat(LOWER, 300, 500), Literal(","))), 100, None)
    with pytest.raises(
        OptionsError, match=r"at most 20,000 characters .*, got 30,100; lower minLength"
    ):
        Automaton(items, BYTES)


def json_object(num_properties: int, max_length: int) -> Language:
    plain = except_for(ANY_CHAR, chars((0, 31), (34, 34), (92, 92)))
    escape = Concat((Literal("\\"), chars(*((ord(c), ord(c)) for c in '"\\/bfnrt'))))
    value = Concat((Literal('"'), Repeat(OneOf((plain, escape)), 0, max_length), Literal('"')))
    pairs = [Concat((Literal(f'"name{i}":'), value)) for i in range(num_properties)]
    commas = [Literal(",")] * (num_properties - 1)
    between = [part for pair in zip(pairs[1:], commas, strict=True) for part in reversed(pair)]
    return Concat((Literal("{"), pairs[0], *between, Literal("}")))


def optional_properties(num_properties: int) -> Language:
    """Each is there or not; a comma is between those that are there."""
    rest: Language = EMPTY
    first: Language = EMPTY
    for i in reversed(range(num_properties)):
        pair = Concat((Literal(f'"name{i}":'), Repeat(LOWER, 1, 500)))
        first = OneOf((Concat((pair, rest)), first))
        rest = Concat((optional(Concat((Literal(","), pair))), rest))
    return Concat((Literal("{"), first, Literal("}")))


def test_size_follows_what_is_used_not_what_may_be() -> None:
    language = json_object(30, 100_000)
    automaton = Automaton(language, BYTES)
    assert num_places(automaton) < 3000
    text = "{" + ",".join(f'"name{i}":"some text"' for i in range(30)) + "}"
    assert automaton.is_final(state_of(automaton, text))
    assert num_places(automaton) < 6000


def test_ways_through_wide_choices_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 18,000 tokens of letters, those that repeat one of two letters are looked at."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["".join(some) for n in (1, 2, 3) for some in itertools.product(letters, repeat=n)]
    vocabulary = Vocabulary([token.encode() for token in tokens])
    num_looks = 0

    def find(prefix: bytes, start: int = 0) -> int | None:
        nonlocal num_looks
        num_looks += 1
        return Vocabulary.find(vocabulary, prefix, start)

    monkeypatch.setattr(vocabulary, "find", find)
    automaton = Automaton(Repeat(LOWER, 30, 30), vocabulary)
    assert automaton.distance(automaton.start) == 10
    assert num_looks < 30 * 26 * 27


def test_optional_properties_meet_again() -> None:
    sizes = [num_places(Automaton(optional_properties(n), BYTES)) for n in (20, 40, 80)]
    assert sizes[2] - sizes[1] == pytest.approx(2 * (sizes[1] - sizes[0]), rel=0.1)


def num_places(automaton: Automaton) -> int:
    return len(automaton._places._places)


def test_states_are_forgotten_beyond_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """(a|b)*a(a|b){12} has 2 ** 13 states; texts on their way go on as before."""
    monkeypatch.setattr(module, "MAX_STATES", 50)
    either = chars((97, 98))
    language = Concat((Repeat(either, 0, None), Literal("a"), Repeat(either, 12, 12)))
    automaton = Automaton(language, BYTES)
    for letters in itertools.islice(itertools.product("ab", repeat=14), 0, None, 97):
        text = "".join(letters)
        assert automaton.is_accepting(state_of(automaton, text)) == (text[1] == "a")
        assert len(automaton._states) <= 50
        # What is forgotten is within reach of nothing but texts on their way.
        assert len(reachable(automaton.start)) <= 100


def reachable(state: State) -> set[State]:
    seen, waiting = {state}, [state]
    while waiting:
        new = [s for s in waiting.pop().edges.values() if s not in seen]
        seen.update(new)
        waiting.extend(new)
    return seen


def test_a_repeat_of_texts_that_may_be_empty_ends() -> None:
    blank = Repeat(optional(Literal("a")), 0, None)
    automaton = Automaton(Concat((Repeat(blank, 2, 3), Literal("b"))), BYTES)
    assert automaton.is_final(state_of(automaton, "aaaab"))
    assert automaton.distance(automaton.start) == 1


def test_a_token_costs_microseconds() -> None:
    """The bound is generous, for a machine that does other things: two or three are usual."""
    automaton = Automaton(json_object(3, 500), BYTES)
    text = ('{"name0":"' + "some text " * 40).encode()
    state = automaton.advance(automaton.start, text)
    times = []
    for _ in range(5):
        start = time.process_time()
        assert automaton.advance(automaton.start, text) is state
        times.append(time.process_time() - start)
    assert min(times) < 2e-6 * len(text)
