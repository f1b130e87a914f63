"""Hostile schemas, patterns and choices: compiled within a bound, or refused in one sentence."""

import random
import re
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_gemma.errors import OptionsError, RecordError
from beam_gemma.model.tokenizer import Tokenizer
from beam_gemma.structured import automaton as module
from beam_gemma.structured.constraint import Constraint, Guide, MaskMaker, allowed_ids
from beam_gemma.structured.grammar import (
    EMPTY,
    Concat,
    Language,
    Literal,
    OneOf,
    Repeat,
    is_same,
    optional,
    repeated,
    to_regex,
)
from beam_gemma.structured.json_schema import compile_schema
from beam_gemma.structured.lark import to_lark
from beam_gemma.structured.output import StructuredOutput
from beam_gemma.structured.regex import parse_regex
from tests.budgets import read_budgets, yardstick
from tests.doubles.tiny_tokenizer import tiny_tokenizer_model

TOKENIZER = Tokenizer(tiny_tokenizer_model())
WHOLE = {"type": "integer"}
FLAG = {"type": "boolean"}


def constraint_of(structured: StructuredOutput) -> Constraint:
    return Constraint(structured.language, TOKENIZER, [TOKENIZER.eos_token_id])


def family(length: int, first: dict, grow) -> dict:
    """Return a schema of definitions, each of which is made of references to the one before."""
    schemas = {"L0": first}
    for i in range(1, length + 1):
        schemas[f"L{i}"] = grow({"$ref": f"#/$defs/L{i - 1}"})
    return {"$ref": f"#/$defs/L{length}", "$defs": schemas}


def pair(inner: dict) -> dict:
    return {"type": "object", "properties": {"a": inner, "b": inner}}


def arrays(levels: int) -> dict:
    schema = WHOLE
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


def flags(number: int) -> dict:
    return {"type": "object", "properties": {f"p{i}": FLAG for i in range(number)}}


WORK = {
    "references": family(9, FLAG, pair),
    "allOf": family(30, pair(WHOLE), lambda inner: {"allOf": [inner, inner]}),
    "anyOf": family(30, pair(WHOLE), lambda inner: {"anyOf": [inner, inner]}),
    "arrays": arrays(30),
    "oneOf": {"oneOf": [{"const": i} for i in range(300)]},
    "constants": {"enum": [f"value {i:05}" for i in range(10_000)]},
    "no real limit": {"type": "string", "maxLength": 4_294_967_295},
    "properties": flags(200),
}


@pytest.mark.parametrize("name", WORK)
def test_what_doubles_or_is_wide_compiles_at_once(name: str) -> None:
    start = time.process_time()
    constraint = constraint_of(StructuredOutput(json_schema=WORK[name]))
    guide = constraint.start()
    MaskMaker().begin([guide])(guide)
    assert guide.matcher.get_error() == ""
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (arrays(300), "at most 70 levels of JSON within each other"),
        (arrays(40), "at most 32 schemas within each other, got more"),
        (
            family(5000, WHOLE, lambda inner: inner),
            "at most 5,000 objects",
        ),
        (
            family(300, WHOLE, lambda inner: inner),
            "at most 32 references that lead to each other, got more",
        ),
        (family(20, WHOLE, pair), "at most 5,000 fields, nested ones among them, got 8,191"),
        (
            {
                "anyOf": [
                    {"type": "object", "properties": {f"{j}": inner, f"{j} b": inner}}
                    for j in range(9)
                    for inner in [{"$ref": "#/$defs/big"}]
                ],
                "$defs": {"big": flags(400)},
            },
            "options with at most 5,000 fields, got 7,2",
        ),
        ({"enum": ["x" * 100 + str(i) for i in range(6000)]}, "500,000 characters and parts"),
        ({"enum": list(range(100_001))}, "at most 100,000 values"),
        ({"type": "string", "minLength": 10**3000}, "20,000 characters .*, got more; lower"),
        ({"$ref": "#/default", "default": {"type": 5}}, "the shape of JSON Schema 2020-12, got"),
        ({"type": "string", "pattern": "a" * 10_001}, "at most 10,000 characters, got 10,001"),
    ],
)  # fmt: skip
def test_what_is_too_large_is_refused_in_one_sentence(schema: dict, message: str) -> None:
    start = time.process_time()
    with pytest.raises(OptionsError, match=message) as caught:
        constraint_of(StructuredOutput(json_schema=schema))
    assert "\n" not in str(caught.value)
    assert time.process_time() - start < 15


def test_levels_are_counted_through_what_is_known_already() -> None:
    """Each part of this schema is near its place, and their types are within each other."""
    schemas = {"N0": WHOLE}
    for i in range(1, 60):
        schemas[f"N{i}"] = {"type": "array", "items": {"$ref": f"#/$defs/N{i - 1}"}}
    properties = {f"p{i}": {"$ref": f"#/$defs/N{i}"} for i in range(60)}
    with pytest.raises(OptionsError, match=r"at most 32 levels of objects and arrays, got 33"):
        compile_schema({"type": "object", "properties": properties, "$defs": schemas})


def test_a_schema_at_the_limits_needs_a_part_of_the_stack() -> None:
    """A worker calls from within many functions already."""
    frames = len(traceback_of_here())
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(frames + 600)
    try:
        found = StructuredOutput(json_schema=arrays(32))
        assert found.values_of("[" * 32 + "]" * 32)["extracted"] is not None
    finally:
        sys.setrecursionlimit(limit)


def traceback_of_here() -> list[object]:
    frame, frames = sys._getframe(), []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def test_ten_thousand_choices_work_and_too_much_text_is_refused() -> None:
    rng = random.Random(1)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = list({"".join(rng.choices(letters, k=rng.randint(8, 16))) for _ in range(10_000)})
    start = time.process_time()
    constraint = constraint_of(StructuredOutput(choices=tuple(words)))
    taken = time.process_time() - start
    # As budgets of files are: 5 s on the processor that they were recorded on.
    assert taken < 5 * max(1, yardstick() / read_budgets()["yardstick_secs"])
    guide = constraint.start()
    for token_id in TOKENIZER.encode([*TOKENIZER.split(words[77])], add_bos=False)[1:]:
        assert not guide.fits(token_id, 0) or guide.is_final
    with pytest.raises(OptionsError, match="at most 500,000 characters and parts, got"):
        constraint_of(StructuredOutput(choices=tuple(f"{i:090}" for i in range(6000))))


def test_choices_that_begin_with_each_other_all_work() -> None:
    constraint = constraint_of(StructuredOutput(choices=tuple("a" * n for n in range(1, 900))))
    state = constraint.automaton.start
    for _ in range(899):
        state = constraint.automaton.advance(state, b"a")
        assert constraint.automaton.is_accepting(state)
    assert constraint.automaton.is_final(state)


@pytest.mark.parametrize(
    ("pattern", "same"),
    [
        ("((a?){50}){50}a", "a{0,2500}a"),
        ("(a{0,1000}){0,1000}", "a{0,1000000}"),
        ("(a{2}){3}", "a{6}"),
        ("((a+)+)*", "a*"),
        ("(a{2,3}){2,}", "a{4,}"),
    ],
)
def test_repetitions_within_each_other_become_one(pattern: str, same: str) -> None:
    assert parse_regex(pattern) == parse_regex(same)


COUNTS = st.tuples(st.integers(0, 3), st.none() | st.integers(0, 3)).map(
    lambda pair: (pair[0], None if pair[1] is None else pair[0] + pair[1])
)


@given(COUNTS, COUNTS)
def test_repetitions_become_one_only_if_the_texts_are_the_same(inner, outer) -> None:
    body = Literal("a")
    written = re.compile(to_regex(Repeat(Repeat(body, *inner), *outer)))
    found = re.compile(to_regex(repeated(Repeat(body, *inner), *outer)))
    for number in range(40):
        assert bool(written.fullmatch("a" * number)) == bool(found.fullmatch("a" * number))


def test_what_takes_too_long_to_measure_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(module, "MAX_WORK", 10_000)
    with pytest.raises(OptionsError, match="at most 10,000 steps to find the shortest way"):
        constraint_of(StructuredOutput(json_schema=flags(200)))


@pytest.mark.parametrize("pattern", ["((a?b?){50}){50}a", "((a|aa|){9}){2500}"])
def test_a_pattern_with_too_many_ways_is_refused(pattern: str) -> None:
    with pytest.raises(OptionsError, match=r"^constraint: expected at most"):
        constraint_of(StructuredOutput(regex=pattern))


def test_a_row_whose_text_has_too_many_ways_fails_with_a_reason(monkeypatch) -> None:
    constraint = constraint_of(StructuredOutput(regex="(a|b)*a(a|b){300}"))
    guide = constraint.start()
    token_id = TOKENIZER.vocabulary().index(b"a")
    for _ in range(5):
        guide.take(token_id)
    monkeypatch.setattr(module, "MAX_AT_ONCE", 20)
    with pytest.raises(RecordError, match="ways to read the beginning of a text, got more"):
        take_all(guide, [token_id] * 50)


def take_all(guide: Guide, token_ids: list[int]) -> None:
    for token_id in token_ids:
        assert guide.fits(token_id, 10_000)
        guide.take(token_id)


def test_parts_in_several_places_are_written_once() -> None:
    item: Language = Literal("a long text that stands in many places")
    for _ in range(60):
        item = Concat((Literal("["), item, Repeat(Concat((Literal(","), item)), 0, None)))
    assert len(to_lark(item)) < 20_000
    other: Language = Literal("a long text that stands in many places")
    for _ in range(60):
        other = Concat((Literal("["), other, Repeat(Concat((Literal(","), other)), 0, None)))
    assert is_same(item, other)
    assert not is_same(item, Concat((other,)))


@pytest.mark.parametrize("body", [OneOf((Literal("ab"), EMPTY)), Literal("x/y"), EMPTY])
@pytest.mark.parametrize("counts", [(0, 0), (0, 1), (2, 2), (1, None), (0, 60)])
def test_named_parts_have_the_texts_of_those_that_are_not(body: Language, counts) -> None:
    """All texts of up to 8 characters, as llguidance takes them."""
    part = Concat((Repeat(body, *counts), Literal("-" * 40)))
    language = Concat((part, optional(part)))
    assert "P0" in to_lark(language)
    constraint = Constraint(language, TOKENIZER, [TOKENIZER.eos_token_id])
    guide = constraint.start()
    state = constraint.automaton.start
    mask_of, rng = MaskMaker().begin([]), random.Random(0)
    for _ in range(12):
        ids = [i for i in allowed_ids(mask_of(guide)).tolist() if i != TOKENIZER.eos_token_id]
        every = [i for i in range(300) if constraint.automaton.step(state, i) is not module.DEAD]
        assert set(ids) <= set(every)
        if not ids:
            break
        token_id = rng.choice(ids)
        guide.take(token_id)
        state = constraint.automaton.step(state, token_id)


def hostile(rng: random.Random) -> dict:
    """Return a schema that is deep, wide, or refers to its own definitions, maybe in a circle."""
    names = [f"D{i}" for i in range(rng.randint(1, 40))]

    def schema(depth: int) -> object:
        kind = rng.randrange(10) if depth else rng.choice([0, 1, 2])
        inner = lambda: schema(depth - 1)  # noqa: E731
        if kind == 0:
            return rng.choice([WHOLE, FLAG, {"type": "string", "pattern": "((a?){9}b*){9}"}, True])
        if kind <= 2:
            return {"$ref": f"#/$defs/{rng.choice(names)}"}
        if kind == 3:
            return {"type": "array", "items": inner(), "minItems": rng.choice([0, 3, 10**6])}
        if kind == 4:
            return {rng.choice(["anyOf", "oneOf", "allOf"]): [inner(), inner(), inner()]}
        if kind == 5:
            return {"enum": list(range(rng.choice([1, 3000])))}
        if kind == 6:
            return {"type": "string", "maxLength": 10 ** rng.randrange(12)}
        width = rng.choice([2, 3, 40])
        return {"type": "object", "properties": {f"p{i}": inner() for i in range(width)}}

    defs = {name: schema(rng.randint(0, 3)) for name in names}
    nested = schema(rng.randint(0, 3))
    for _ in range(rng.choice([0, 0, 5, 30, 400])):
        nested = {"type": "array", "items": nested}
    return {"allOf": [nested], "$defs": defs} if isinstance(nested, dict) else {"$defs": defs}


def test_hostile_schemas_compile_in_time_or_are_refused_in_one_sentence() -> None:
    refused = []
    for seed in range(15):
        start = time.process_time()
        try:
            constraint_of(StructuredOutput(json_schema=hostile(random.Random(seed)))).start()
        except OptionsError as error:
            refused.append(str(error))
        assert time.process_time() - start < 15
    assert 0 < len(refused) < 15
    assert not any("\n" in message for message in refused)
