"""Conversations with calls of functions and their results, as transformers renders them."""

import pytest

from beam_gemma.errors import RecordError
from beam_gemma.inputs.chat_template import GEMMA_CHAT_TEMPLATE, ChatTemplate
from beam_gemma.model.markup import Control, Text
from tests.doubles.chat_reference import hugging_face, markup

PIECES = ["<bos>", "<|turn>", "<turn|>", "<|call>", "<call|>", "<|response>", "<response|>"]
SOURCE = """\
{%- macro shown(value) -%}
    {%- if value is mapping -%}{
        {%- for key, inner in value | dictsort -%}
            {{ key ~ ":" ~ shown(inner) ~ ("" if loop.last else ",") }}
        {%- endfor -%} }
    {%- elif value is sequence and value is not string -%}{{ value | map("string") | join("+") }}
    {%- else -%}{{ value }}{%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role == "tool" -%}
        {%- set names = namespace(found=message.name | default("unknown")) -%}
        {%- for other in messages -%}
            {%- for call in other.get("tool_calls") or [] -%}
                {%- if call.id == message.get("tool_call_id") -%}
                    {%- set names.found = call.function.name -%}
                {%- endif -%}
            {%- endfor -%}
        {%- endfor -%}
        {{- "<|response>" ~ names.found ~ "=" ~ message.content ~ "<response|>" -}}
    {%- else -%}
        {{- "<|turn>" ~ message.role ~ ":" ~ message.content -}}
        {%- for call in message.tool_calls or [] -%}
            {{- "<|call>" ~ call.function.name ~ shown(call.function.arguments) ~ "<call|>" -}}
        {%- endfor -%}
        {{- "<turn|>" -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1].role != "tool" -%}<|turn>assistant:{%- endif -%}
"""
ASKED = {"role": "user", "content": "How warm is it?"}


def call(name="warmth", arguments=None, **others):
    arguments = (
        {"place": "Oslo", "days": 2, "at": {"sea": True}} if arguments is None else arguments
    )
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **others}


def calling(*calls, content=""):
    return {"role": "assistant", "content": content, "tool_calls": [*calls]}


def result(text="7 degrees", **names):
    return {"role": "tool", "content": text, **names}


CONVERSATIONS = {
    "a call and its result": [ASKED, calling(call(id="a")), result(tool_call_id="a")],
    "two calls": [ASKED, calling(call(id="a"), call("wind", {}, id="b")),
                  result(tool_call_id="b"), result("3", tool_call_id="a")],
    "a name for an id": [ASKED, calling(call()), result(name="warmth")],
    "arguments as a text": [ASKED, calling(call(arguments='{"a": 1}')), result(name="warmth")],
    "lists and numbers": [ASKED, calling(call(arguments={"a": [1, 2.5], "b": None})), result()],
    "a text beside the call": [ASKED, calling(call(), content="Let me see."), result()],
    "the answer after it": [ASKED, calling(call()), result(), {"role": "assistant", "content": "7"},
                            {"role": "user", "content": "Thanks"}],
    "an answer to continue": [ASKED, calling(call()), result(), {"role": "model", "content": "It"}],
}  # fmt: skip


@pytest.fixture(scope="module")
def template():
    return ChatTemplate(SOURCE, PIECES)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_calls_and_results_are_rendered_as_transformers_renders_them(template, name):
    messages = CONVERSATIONS[name]
    roles = [{**m, "role": "assistant"} if m["role"] == "model" else m for m in messages]
    assert markup(template.render(messages)) == hugging_face(SOURCE, roles)


def test_keys_without_a_value_are_as_if_they_were_not_there(template):
    """A table has every key in each message."""
    none = {"tool_calls": None, "name": None, "tool_call_id": None}
    plain = CONVERSATIONS["two calls"]
    wide = [none | message for message in plain]
    assert template.render(wide) == template.render(plain)
    assert template.render([ASKED | {"tool_calls": []}]) == template.render([ASKED])


def test_control_pieces_in_calls_and_results_are_text(template):
    inside = call("<|call>", {"<turn|>": "<call|>"}, id="<bos>")
    parts = template.render([ASKED, calling(inside), result("<|response>", tool_call_id="<bos>")])
    controls = [part.piece for part in parts if isinstance(part, Control)]
    assert controls == [
        "<bos>", "<|turn>", "<turn|>", "<|turn>", "<|call>", "<call|>", "<turn|>", "<|response>",
        "<response|>",
    ]  # fmt: skip
    texts = [part.text for part in parts if isinstance(part, Text)]
    assert texts[2:] == ["<|call>{<turn|>:<call|>}", "<|call>=<|response>"]


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([ASKED, calling(call(id=7)), result()], "type function, and a text as id"),
        ([ASKED, calling(call() | {"type": "code"}), result()], "type function, and a text as id"),
        (
            [ASKED, calling(call() | {"functoin": 1}), result()],
            "id, type, function, got 'functoin'",
        ),
        ([ASKED, calling("warmth"), result()], "each of tool_calls as an object"),
        ([ASKED, calling(call(name=3)), result()], "a call's function with a name"),
        ([ASKED, calling(call(arguments=[1])), result()], "arguments as an object or a text"),
        ([ASKED, calling({"id": "a"}), result()], "a call's function as an object"),
        ([ASKED, ASKED | {"tool_calls": [call()]}], "tool_calls in messages of the assistant"),
        ([ASKED, calling() | {"tool_calls": {"a": 1}}], "tool_calls as a list"),
        ([ASKED, calling(call()), result(name=3)], "a text as name and tool_call_id"),
        ([ASKED, calling(call()), result(None)], "each with a text"),
        ([ASKED, calling(call())], "results after the last calls"),
    ],
)
def test_what_are_no_calls_is_refused(template, messages, match):
    with pytest.raises(RecordError, match=match):
        template.render(messages)


@pytest.mark.parametrize("more", [calling(call()), result(name="warmth")])
def test_a_template_that_writes_no_calls_refuses_them(more):
    template = ChatTemplate(GEMMA_CHAT_TEMPLATE, ["<bos>", "<start_of_turn>", "<end_of_turn>"])
    with pytest.raises(RecordError, match="no calls of functions, which the chat template"):
        template.render([ASKED, more, result(name="warmth")])
