"""Calls of functions in completions: every value exactly, and none lost without being counted."""

import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers.utils.chat_parsing.response_parser import parse_response

from beam_gemma.engine.engine import Engine
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.errors import OptionsError
from beam_gemma.inputs.prompt_encoder import PromptEncoder
from beam_gemma.model.markup import Text
from beam_gemma.runtime.limits import EngineConfig
from beam_gemma.structured.output import StructuredOutput
from beam_gemma.tasks.generate import GenerateSettings, Generator
from beam_gemma.tasks.tool_calls import CALL_TYPE, MAX_LEVELS, CallReader
from tests.doubles.tool_models import FAMILIES, STOP, WEATHER, ids_of, session_that_says

PIECES, TOKENIZER, TEMPLATE = FAMILIES["Gemma 4"]
READERS = {name: CallReader(tokenizer) for name, (_, tokenizer, _) in FAMILIES.items()}
REFERENCE = {
    "defaults": {"role": "assistant"},
    "start_anchor": ["<|turn>model\n"],
    "fields": {
        "tool_calls": {
            "open_pattern": r"<\|tool_call>call:(?P<name>\w+)",
            "close": "<tool_call|>",
            "repeats": True,
            "content": "json",
            "content_args": {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]},
            "transform": {"name": "{name}", "arguments": "{content}"},
        },
        "content": {"close": ["<turn|>"], "content": "text"},
    },
}
"""How transformers 5.23 reads a completion of Gemma 4 (`cli/serving/utils.py`)."""
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ['"', "}", "{a:1}", "],[", "a:b, c", "\n\t", "\\", "\\u0041", "null", "1", "\u2028\U0001f600"]
)
NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
NUMBERS = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    TEXTS | NUMBERS | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)
ARGUMENTS = st.dictionaries(NAMES, VALUES, max_size=4)


def written(value, quote):
    """Return a value as the models write it."""
    if isinstance(value, str):
        return f"{quote}{value}{quote}"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{written(v, quote)}' for key, v in value.items())}}}"
    if isinstance(value, list):
        return f"[{','.join(written(item, quote) for item in value)}]"
    return json.dumps(value)


def call(name, arguments, pieces=PIECES):
    return f"{pieces.start}call:{name}{written(arguments, pieces.quote)}{pieces.end}"


def read(markup, family="Gemma 4"):
    return READERS[family].read(ids_of(FAMILIES[family][1], markup))


@pytest.mark.parametrize("family", FAMILIES)
@given(several=st.lists(st.tuples(NAMES, ARGUMENTS), max_size=3), before=TEXTS, after=TEXTS)
def test_calls_come_back_as_they_were_written(family, several, before, after):
    """Quotes, braces, line feeds and all of Unicode in strings; numbers digit by digit."""
    markup = "".join(call(*each, FAMILIES[family][0]) for each in several)
    found = read(before + markup + after, family)
    assert [each["name"] for each in found.calls] == [name for name, _ in several]
    texts = [each["arguments"] for each in found.calls]
    expected = [
        json.dumps(arguments, ensure_ascii=False, separators=(",", ":")) for _, arguments in several
    ]
    assert texts == expected
    assert (found.text, found.num_unreadable) == (before + after, 0)


@given(several=st.lists(st.tuples(NAMES, ARGUMENTS), min_size=1, max_size=3))
def test_transformers_reads_the_same(several):
    markup = "".join(call(*each) for each in several)
    assume(not {"\x01", "\x02"} & {*markup})  # characters that its parser uses itself
    expected = parse_response(markup, REFERENCE, prefix="")["tool_calls"]
    calls = read(markup).calls
    assert [{**each, "arguments": json.loads(each["arguments"])} for each in calls] == expected


Q = PIECES.quote
READ = {
    "no arguments": ("call:f{}", "{}"),
    "empty texts and lists": (f"call:f{{a:{Q}{Q},b:[],c:{{}}}}", '{"a":"","b":[],"c":{}}'),
    "space between values": (
        f" call: f {{\n  a : {Q}x{Q} ,\n  b: [ 1 , 2\t] ,c:{{ d : null }}\n}} \n",
        '{"a":"x","b":[1,2],"c":{"d":null}}',
    ),
    "quoted names": (f'call:f{{{Q}a:b{Q}:1,"c \\"d":2}}', '{"a:b":1,"c \\"d":2}'),
    "a name without letters": (f"call:f{{{Q}{Q}:1}}", '{"":1}'),
    "names with space": ("call:f{big dog:1,x-y.z:2}", '{"big dog":1,"x-y.z":2}'),
    "strings of JSON": (
        'call:f{a:["x \\"y\\"\\u00e9\\n",{b:"{"}],c:"\\ud83d\\ude00"}',
        '{"a":["x \\"y\\"é\\n",{"b":"{"}],"c":"😀"}',
    ),
    "numbers as they are": (
        "call:f{a:1.0,b:-0,c:123456789012345678901234567890,d:1E-7}",
        '{"a":1.0,"b":-0,"c":123456789012345678901234567890,"d":1E-7}',
    ),
    "Python's null": ("call:f{a:None,b:[None]}", '{"a":null,"b":[null]}'),
    "other names": ("call:a.b-c_1{}", "{}"),
    "deep": (f"call:f{{a:{'[' * MAX_LEVELS}{']' * MAX_LEVELS}}}", None),
}


@pytest.mark.parametrize(("body", "arguments"), READ.values(), ids=READ)
def test_ways_to_write_a_call(body, arguments):
    found = read(f"<{PIECES.start}{body}{PIECES.end}>")
    ((each,), text) = found.calls, found.text
    assert text == "<>"
    assert found.num_unreadable == 0
    if arguments is not None:
        assert each["arguments"] == arguments
    json.loads(each["arguments"])


UNREADABLE = {
    "nothing": "",
    "no call": "f{}",
    "no name": "call:{}",
    "no braces": "call:f",
    "arguments of another kind": "call:f[]",
    "cut in a string": f"call:f{{a:{Q}x",
    "cut in a number": "call:f{a:1",
    "cut before a value": "call:f{a:",
    "bare text": "call:f{a:Rome}",
    "number with a leading zero": "call:f{a:01}",
    "word at a number": "call:f{a:1x}",
    "name without value": "call:f{a}",
    "equals sign": "call:f{a=1}",
    "empty name": "call:f{ :1}",
    "the same name twice": "call:f{a:1,a:2}",
    "comma at the end": "call:f{a:1,}",
    "comma at the start": "call:f{,a:1}",
    "two commas": "call:f{a:[1,,2]}",
    "no comma": f"call:f{{a:{Q}x{Q}b:1}}",
    "one quote too many": f"call:f{{a:{Q}x{Q}{Q}}}",
    "single quotes": "call:f{a:'x'}",
    "wrong escape": 'call:f{a:"\\x"}',
    "half a character": 'call:f{a:"\\ud83d"}',
    "brackets that cross": "call:f{a:[1}]",
    "text behind": "call:f{} and",
    "another piece": "call:f{a:<|turn>1}",
    "another piece in a string": f"call:f{{a:{Q}<|turn>{Q}}}",
    "too deep": f"call:f{{a:{'[' * 5000}{']' * 5000}}}",
    "literal names of numbers": "call:f{a:NaN}",
}


@pytest.mark.parametrize("body", UNREADABLE.values(), ids=UNREADABLE)
def test_what_is_no_call_is_counted_and_stays_as_the_model_wrote_it(body):
    good = call("g", {"a": [1]})
    markup = f"{PIECES.start}{body}{PIECES.end}"
    found = read(f"Hi {good}{markup}{good} end")
    assert [each["arguments"] for each in found.calls] == ['{"a":[1]}'] * 2
    assert found.num_unreadable == 1
    assert found.text == f"Hi {markup} end"


def test_a_call_ends_with_the_completion_or_at_the_next_one():
    """A model may leave out the end; what is whole without it is a call."""
    start = f"{PIECES.start}call:f{{a:1}}"
    assert [each["arguments"] for each in read(start + start).calls] == ['{"a":1}'] * 2
    cut = read(f"{start}{PIECES.start}call:f{{a:{Q}x")
    assert (len(cut.calls), cut.num_unreadable) == (1, 1)
    assert cut.text == f"{PIECES.start}call:f{{a:{Q}x"
    stray = read(f"{start}{PIECES.end}{PIECES.end}so")
    assert (len(stray.calls), stray.text, stray.num_unreadable) == (1, "so", 0)


def test_text_that_looks_like_pieces_is_text():
    """Pieces are told by token id: the same characters in other tokens begin no call."""
    markup = call("f", {"a": "x"})
    ids = TOKENIZER.encode([Text(markup)], add_bos=False)
    found = READERS["Gemma 4"].read(ids)
    assert (found.calls, found.num_unreadable, found.text) == ([], 0, markup)
    quoted = TOKENIZER.encode(
        [*TOKENIZER.split(f"{PIECES.start}call:f{{a:{Q}"), Text(f"{Q},b:{PIECES.end}"),
         *TOKENIZER.split(f"{Q}}}{PIECES.end}")],
        add_bos=False,
    )  # fmt: skip
    (each,) = READERS["Gemma 4"].read(quoted).calls
    assert json.loads(each["arguments"]) == {"a": f"{Q},b:{PIECES.end}"}


def test_a_character_cut_at_the_end_is_left_out():
    ids = ids_of(TOKENIZER, call("f", {}) + "a\u00e9")[:-1]
    assert READERS["Gemma 4"].read(ids).text == "a"


def settings_of(**fields):
    fields = {"prompt": "{t}", "tools": [WEATHER, STOP]} | fields
    return GenerateSettings(sampling=SamplingParams(max_tokens=fields.pop("max", 200)), **fields)


def answer(markup, **fields):
    """Return the result of a row whose completion is this."""
    settings = settings_of(**fields)
    encoder = PromptEncoder(
        TOKENIZER, settings, chat_template=TEMPLATE, max_tokens=700, tools=settings.openai_tools
    )
    session = session_that_says(TOKENIZER, ids_of(TOKENIZER, markup))
    engine = Engine(session, EngineConfig(eos_token_ids=(TOKENIZER.eos_token_id,)))
    generator = Generator(engine, encoder, settings, on_result=lambda _: None)
    good, bad = generator([{"t": "hi"}, {"t": None}])
    assert list(good) == list(bad) == settings.result_schema.names
    assert bad["tool_calls"] is bad["num_unreadable_calls"] is bad["finish_reason"] is None
    return good


def test_calls_are_a_column_beside_the_text():
    found = answer(f"So: {call('stop', {})}", token_ids=True)
    assert found["tool_calls"] == [{"name": "stop", "arguments": "{}"}]
    assert (found["completion"], found["finish_reason"]) == ("So: ", "tool_calls")
    assert found["num_unreadable_calls"] == 0
    assert found["completion_token_ids"] == ids_of(TOKENIZER, f"So: {call('stop', {})}")
    assert settings_of().result_schema.field("tool_calls").type == CALL_TYPE


def test_an_answer_without_calls_ends_as_without_tools():
    found = answer("None needed.")
    assert (found["tool_calls"], found["num_unreadable_calls"]) == ([], 0)
    assert (found["completion"], found["finish_reason"]) == ("None needed.", "stop")
    broken = answer(f"{PIECES.start}call:stop{{{PIECES.end}")
    assert (broken["num_unreadable_calls"], broken["finish_reason"]) == (1, "stop")


def test_a_completion_that_is_cut_keeps_its_whole_calls():
    markup = call("stop", {}) * 2
    found = answer(markup, max=len(ids_of(TOKENIZER, markup)) - 2)
    assert (len(found["tool_calls"]), found["num_unreadable_calls"]) == (1, 1)
    assert found["finish_reason"] == "length"


def test_the_result_of_a_function_is_never_written_by_the_model():
    found = answer(f"{call('stop', {})}{PIECES.response}response:stop{{}}")
    assert (found["completion"], len(found["tool_calls"])) == ("", 1)


def test_a_thought_before_a_call_is_none_of_it():
    thought = f"<|channel>thought\nI call {call('f', {})}<channel|>"
    found = answer(thought + call("stop", {}), thinking=True, thinking_tokens=100)
    assert [each["name"] for each in found["tool_calls"]] == ["stop"]
    assert (found["completion"], found["num_unreadable_calls"]) == ("", 0)
    assert found["thoughts"].startswith("I call")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"structured": StructuredOutput(choices=("a",))},
            "structured: expected none beside tools",
        ),
        ({"stop": ("x",)}, "stop: expected none beside tools, which alone say where a completion"),
        ({"statistics": True}, "statistics: expected none beside tools"),
        ({"boxes": True}, "boxes: expected none beside tools"),
        (
            {"prompt": None, "prefix_column": "a", "suffix_column": "b"},
            "prefix_column: expected none beside tools",
        ),
        ({"tools": (), "tool_choice": "required"}, "tool_choice: expected tools beside it"),
        ({"tools": [STOP, STOP]}, "tools: expected each name once"),
        (
            {"tools": [{"name": "f", "parameters": {"properties": {"a": {"type": "strin"}}}}]},
            "tools: parameters of f: #/properties/a/type: expected the shape of JSON Schema",
        ),
    ],
)
def test_contradictions_are_refused(fields, message):
    with pytest.raises(OptionsError, match=message):
        settings_of(**fields)


def test_what_functions_say_is_part_of_what_a_result_depends_on():
    """So another run resumes only with the same functions, in the same order."""
    variants = [
        settings_of(),
        settings_of(tools=[STOP, WEATHER]),
        settings_of(tools=[WEATHER, {**STOP, "description": "x"}]),
        settings_of(tool_choice="required"),
        settings_of(tools=()),
    ]
    texts = {json.dumps(settings.parameters) for settings in variants}
    assert len(texts) == len(variants)
    wrapped = [{"type": "function", "function": function} for function in (WEATHER, STOP)]
    assert settings_of(tools=wrapped).parameters == settings_of().parameters
    assert "llguidance" in settings_of(tool_choice="required").parameters
