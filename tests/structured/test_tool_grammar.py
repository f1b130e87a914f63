"""Required calls: whatever a model prefers, what comes out is calls of what is declared."""

import json
from contextlib import closing

import jsonschema
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from beam_gemma.engine.engine import Engine
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.sequence import Request
from beam_gemma.errors import OptionsError
from beam_gemma.runtime.limits import EngineConfig
from beam_gemma.structured.constraint import MaskMaker, allowed_ids
from beam_gemma.structured.tool_grammar import calls_language, check_parameters
from beam_gemma.tasks.tool_calls import CallReader, calls_constraint
from tests.doubles.fakes import STATES, FakeSession, fake_signature
from tests.doubles.schemas import SCHEMAS
from tests.doubles.tool_models import FAMILIES, STOP, WEATHER, ids_of

PIECES, TOKENIZER, _ = FAMILIES["Gemma 4"]
END = TOKENIZER.eos_token_id
RESPONSE = TOKENIZER.control_pieces[PIECES.response]
READER = CallReader(TOKENIZER)
CALLS = calls_constraint([WEATHER, STOP], TOKENIZER, [END])


def function(schema, name="f"):
    return {"name": name, "parameters": schema}


def of_objects(properties, **keywords):
    return {"type": "object", "properties": properties, **keywords}


def walk(constraint, seed, max_tokens):
    """Return the tokens of a completion that is random among those that the mask allows."""
    rng = np.random.default_rng(seed)
    guide = constraint.start()
    mask_of = MaskMaker().begin([])
    ids = guide.take_forced(max_tokens)
    while not guide.is_final:
        token_id = int(rng.choice(allowed_ids(mask_of(guide))))
        assert guide.fits(token_id, 10**6), "the mask and the automaton differ"
        if not guide.fits(token_id, max_tokens - len(ids) - 1):
            token_id = guide.next_of_shortest()
        if token_id in constraint.end_token_ids:
            break
        guide.take(token_id)
        ids.append(token_id)
        ids += guide.take_forced(max_tokens - len(ids), limit=15)
    assert len(ids) <= max_tokens
    return ids


def check(ids, functions):
    """Check that tokens are calls of declared functions alone, with valid arguments."""
    found = READER.read(ids)
    assert (found.text, found.num_unreadable) == ("", 0)
    assert found.calls
    declared = {each["name"]: each.get("parameters", {}) for each in functions}
    for each in found.calls:
        arguments = json.loads(each["arguments"])
        jsonschema.validate(arguments, declared[each["name"]])
        names = declared[each["name"]].get("properties", {})
        assert list(arguments) == sorted(arguments, key=str.lower)
        assert arguments.keys() <= names.keys()
    return found.calls


@pytest.mark.parametrize("seed", range(40))
def test_any_way_ends_as_valid_calls(seed):
    """Also where the budget forces the end, down to the shortest call."""
    check(walk(CALLS, seed, CALLS.num_shortest + seed * seed), [WEATHER, STOP])


def test_all_functions_and_properties_occur():
    calls = [each for seed in range(60) for each in check(walk(CALLS, seed, 400), [WEATHER, STOP])]
    assert {each["name"] for each in calls} == {"get_weather", "stop"}
    written = [json.loads(each["arguments"]) for each in calls]
    for name in WEATHER["parameters"]["properties"]:
        assert {name in arguments for arguments in written if arguments} >= {True}
    assert {arguments["at"].get("note", 1) is None for arguments in written if "at" in arguments}


@settings(max_examples=15, deadline=None)
@given(schema=SCHEMAS, seed=st.integers(0, 99), extra=st.integers(0, 60))
def test_what_json_schemas_know_calls_know(schema, seed, extra):
    """Any value of the schemas of structured output is an argument of a call."""
    assume(max(json.dumps(schema, ensure_ascii=False)) < "\U00100000")
    definitions = {key: schema[key] for key in schema.keys() & {"$defs"}}
    declared = [function(of_objects({"x": schema}, required=["x"], **definitions))]
    constraint = calls_constraint(declared, TOKENIZER, [END])
    check(walk(constraint, seed, constraint.num_shortest + extra), declared)


SPECIAL = {
    "names in quotes": of_objects({"a:b": {"const": 1}, "c d": {"const": 2}}, required=["a:b"]),
    "constants with signs": of_objects({"a": {"enum": ['"}', "{a:1}\n", "<|\"|>", "\u00e9"]}},
                                       required=["a"]),
    "pattern of any character": of_objects({"a": {"type": "string", "pattern": "^.{3,6}$"}},
                                           required=["a"]),
    "a date": of_objects({"a": {"type": "string", "format": "date"}}, required=["a"]),
    "references": {
        "$defs": {"n": {"type": "integer"}},
        **of_objects({"b": {"$ref": "#/$defs/n"}, "a": {"$ref": "#/$defs/n"}}, required=["b", "a"]),
    },
    "either of two objects": {
        "anyOf": [of_objects({"a": {"const": 1}}, required=["a"]),
                  of_objects({"b": {"const": 2}}, required=["b"])],
    },
    "no properties": of_objects({}),
    "any object": {"type": "object"},
}  # fmt: skip


@pytest.mark.parametrize("schema", SPECIAL.values(), ids=SPECIAL)
def test_schemas_at_the_edge(schema):
    constraint = calls_constraint([function(schema)], TOKENIZER, [END])
    for seed in range(8):
        found = READER.read(walk(constraint, seed, constraint.num_shortest + 20))
        assert (found.text, found.num_unreadable) == ("", 0)
        for each in found.calls:
            jsonschema.validate(json.loads(each["arguments"]), schema)


def test_a_map_has_names_in_quotes():
    schema = {"type": "object", "additionalProperties": {"type": "boolean"}}
    constraint = calls_constraint([function(schema)], TOKENIZER, [END])
    for seed in range(20):
        for each in READER.read(walk(constraint, seed, 60)).calls:
            assert all(type(value) is bool for value in json.loads(each["arguments"]).values())


def test_control_pieces_come_only_where_the_form_has_them():
    """In a string, only its end; no token of bytes can write what stands for a piece."""
    ids = dict(TOKENIZER.control_pieces)
    quote = ids[PIECES.quote]
    guide = CALLS.start()
    for token_id in ids_of(TOKENIZER, f"{PIECES.start}call:get_weather{{place:{PIECES.quote}ab"):
        guide.take(token_id)
    allowed = set(allowed_ids(MaskMaker().begin([])(guide)).tolist())
    assert allowed & set(ids.values()) == {quote}
    private = [i for i in range(TOKENIZER.vocab_size) if b"\xf4" in TOKENIZER.token_bytes(i)]
    assert private
    assert not allowed & set(private)
    assert not any(guide.fits(token_id, 500) for token_id in private)
    assert guide.fits(quote, 500)


def test_the_first_tokens_are_forced():
    """They are computed with the prompt: the piece itself and all that every call begins with."""
    guide = CALLS.start()
    assert guide.take_forced(100) == ids_of(TOKENIZER, f"{PIECES.start}call:")


def test_a_call_may_end_with_the_start_of_its_result():
    """That is how the models end their turn after a call."""
    guide = CALLS.start()
    stop = ids_of(TOKENIZER, f"{PIECES.start}call:stop{{}}{PIECES.end}")
    for token_id in stop[:-1]:
        assert not guide.fits(RESPONSE, 100)
        guide.take(token_id)
    guide.take(stop[-1])
    assert guide.fits(RESPONSE, 100)
    assert guide.fits(END, 100)
    assert guide.fits(TOKENIZER.control_pieces[PIECES.start], 100)
    assert not guide.fits(TOKENIZER.control_pieces["<turn|>"], 100)


def test_rows_depend_on_themselves_alone():
    signature = fake_signature(states=STATES[:2], vocab_size=TOKENIZER.vocab_size + 9)

    def run(requests):
        session = FakeSession(signature, num_blocks=256)
        config = EngineConfig(eos_token_ids=(END,), max_num_seqs=3)
        with closing(Engine(session, config)) as engine:
            completions = engine.generate(requests)
        assert session.faults == []
        return completions

    requests = [
        Request(
            request_id=str(seed),
            prompt_token_ids=tuple(np.random.default_rng(seed).integers(10, 290, 9).tolist()),
            params=SamplingParams(
                max_tokens=60, temperature=seed % 3 * 20.0, stop_token_ids=(RESPONSE,)
            ),
            sampling_key=str(seed),
            constraint=CALLS,
        )
        for seed in range(7)
    ]
    together = run(requests)
    for request, completion in zip(requests, together, strict=True):
        assert run([request]) == [completion]
        check(completion.token_ids, [WEATHER, STOP])


def test_too_few_tokens_for_any_call_are_told():
    assert CALLS.num_shortest == len(ids_of(TOKENIZER, f"{PIECES.start}call:stop{{}}{PIECES.end}"))
    assert CALLS.shortage(CALLS.num_shortest) is None
    assert "max_tokens: expected at least" in CALLS.shortage(CALLS.num_shortest - 1)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (
            of_objects({"a": {"type": "string", "minLenth": 1}}),
            "tools: parameters of f: #/properties/a/minLenth: .* did you mean minLength?",
        ),
        (of_objects({"a": {"not": {"type": "null"}}}), "f: #/properties/a/not: expected a keyword"),
        (of_objects({"a": {}}), "tools: parameters of f: #/properties/a: expected a type"),
        (
            of_objects({"a": {"type": ["string", "number"]}}),
            "f: #/properties/a: expected values of one Arrow type",
        ),
        ({"nullable": True, **of_objects({"a": {"const": 1}})}, "expected a schema of objects"),
        (
            of_objects({"a": {"const": "x\U0010fffd"}}),
            "tools: expected names and constants without characters for private use",
        ),
        (
            of_objects({"a": {"type": "string", "pattern": "^\U0010fffd$"}}),
            "tools: expected .* private use",
        ),
        (
            of_objects({"a": {"type": "string", "pattern": "^[\U0010fff0-\U0010ffff]$"}}),
            "tools: expected a pattern of other characters",
        ),
    ],
)
def test_what_decoding_cannot_keep_to_is_refused_by_its_place(schema, message):
    with pytest.raises(OptionsError, match=message):
        calls_language([function(schema)])


def test_parameters_of_free_calls_must_be_schemas_alone():
    check_parameters([function(of_objects({"a": {"not": {}}, "b": {"x-y": 1}})), STOP])
    with pytest.raises(
        OptionsError, match="tools: parameters of f: #/required: expected the shape"
    ):
        check_parameters([STOP, function({"required": "a"})])
