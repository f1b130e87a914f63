"""Which macros of a chat template write the same for the same arguments, and are run once."""

from unittest.mock import patch

import jinja2.nodes as nodes
import jinja2.runtime
import pytest

from beam_gemma.inputs.chat_template import ChatTemplate
from beam_gemma.inputs.pure_macros import pure_macros
from beam_gemma.inputs.template_sandbox import TemplateSandbox
from beam_gemma.inputs.tools import checked_tools
from tests.doubles.tool_models import STOP, WEATHER

PURE = {
    "its arguments": "{% macro m(x, y=1) %}{{ x.name ~ y }}{% endmacro %}",
    "what it sets": "{% macro m(x) %}{% set y = x %}{{ y }}{% endmacro %}{% set y = messages %}",
    "a branch's own": "{% macro m(x) %}{% if x %}{% set y = x %}{{ y }}{% endif %}{% endmacro %}",
    "all branches set it": "{% macro m(x) %}{% if x %}{% set y = 1 %}{% elif 1 %}{% set y = 2 %}"
    "{% else %}{% set y = 3 %}{% endif %}{{ y }}{% endmacro %}",
    "its own namespace": "{% macro m(x) %}{% set ns = namespace(a=0) %}{% set ns.a = x %}"
    "{{ ns.a }}{% endmacro %}{% set ns = namespace(a=messages) %}",
    "a loop": "{% macro m(x) %}{% for k, v in x | dictsort if k %}{{ k ~ v ~ loop.index }}"
    "{% endfor %}{% endmacro %}",
    "a list of constants": "{% set q = ['a', 2] %}{% macro m(x) %}{{ q ~ x }}{% endmacro %}",
    "a constant": "{% set q = 'a' %}{% macro m(x) %}{{ q ~ x }}{% endmacro %}",
    "itself": "{% macro m(x) %}{% if x.y %}{{ m(x.y) }}{% endif %}{% endmacro %}",
    "a pure macro": "{% macro n(x) %}{{ x }}{% endmacro %}{% macro m(x) %}{{ n(x) }}{% endmacro %}",
}
IMPURE = {
    "a row": "{% macro m(x) %}{{ messages[0].content }}{% endmacro %}",
    "a row by default": "{% macro m(x, y=messages) %}{{ y }}{% endmacro %}",
    "a variable": "{% set q = messages %}{% macro m(x) %}{{ q }}{% endmacro %}",
    "a changed constant": "{% set q = 1 %}{% macro m(x) %}{{ q }}{% endmacro %}{% set q = 2 %}",
    "a later constant": "{% macro m(x) %}{{ q }}{% endmacro %}{% set q = 2 %}",
    "a constant of chance": "{% set q = [1, 2] | random %}{% macro m(x) %}{{ q }}{% endmacro %}",
    "the time": "{% macro m(x) %}{{ strftime_now('%S') }}{% endmacro %}",
    "chance": "{% macro m(x) %}{{ [1, 2] | random }}{% endmacro %}",
    "its caller": "{% macro m(x) %}{{ caller() }}{% endmacro %}",
    "more arguments": "{% macro m(x) %}{{ varargs }}{% endmacro %}",
    "another's namespace": "{% set ns = namespace(a=0) %}{% macro m(x) %}{% set ns.a = x %}"
    "{% endmacro %}",
    "one branch sets it": "{% macro m(x) %}{% if x %}{% set y = 1 %}{% endif %}{{ y }}"
    "{% endmacro %}{% set y = messages %}",
    "a loop set it": "{% macro m(x) %}{% for y in x %}{% endfor %}{{ y }}{% endmacro %}",
    "it reads before": "{% macro m(x) %}{{ y }}{% set y = 1 %}{% endmacro %}",
    "a loop's list": "{% macro m(x) %}{% for y in messages %}{% endfor %}{% endmacro %}",
    "a condition": "{% macro m(x) %}{% if messages %}1{% endif %}{% endmacro %}",
    "a block": "{% macro m(x) %}{% set y %}{{ messages }}{% endset %}{{ y }}{% endmacro %}",
    "an impure macro": "{% macro n(x) %}{{ messages }}{% endmacro %}"
    "{% macro m(x) %}{{ n(x) }}{% endmacro %}",
    "another of its name": "{% macro m(x) %}{{ x }}{% endmacro %}{% macro m(x) %}1{% endmacro %}",
}


def parsed(source: str) -> nodes.Template:
    return TemplateSandbox().parse(source)


@pytest.mark.parametrize("reads", PURE)
def test_a_macro_is_pure_that_reads(reads):
    assert "m" in pure_macros(parsed(PURE[reads]))


@pytest.mark.parametrize("reads", IMPURE)
def test_a_macro_is_not_pure_that_reads(reads):
    assert "m" not in pure_macros(parsed(IMPURE[reads]))


DECLARING = """\
{%- macro each(keys) -%}
    {%- set seen = namespace(any=false) -%}
    {%- for key, value in keys | dictsort -%}
        {{ "," if seen.any }}{% set seen.any = true %}{{ key }}:{{ value }}
    {%- endfor -%}
{%- endmacro -%}
{%- macro declared(tool) -%}<tool>{{ each(tool.function) }}</tool>{%- endmacro -%}
{%- macro counted(tool) -%}{{ messages | length }}{%- endmacro -%}
{%- set seen = namespace(any=messages[0].content) -%}
{%- for tool in tools or [] -%}{{ declared(tool) ~ counted(tool) }}{%- endfor -%}
{%- for message in messages -%}[{{ message.role ~ ":" ~ message.content }}]{%- endfor -%}
"""


def test_functions_are_declared_once_and_rows_are_as_without_memory():
    tools = checked_tools([WEATHER, STOP])
    rows = [
        [{"role": "user", "content": text}] + 2 * [{"role": "user", "content": "b"}] * n
        for n, text in enumerate(["a <tool> b", "", "<bos>"])
    ]
    template = ChatTemplate(DECLARING, ["<tool>", "</tool>"], tools=tools)
    with patch.object(TemplateSandbox, "remember"):
        fresh = ChatTemplate(DECLARING, ["<tool>", "</tool>"], tools=tools)
    called = []
    invoke = jinja2.runtime.Macro._invoke

    def noting(macro, *args):
        called.append(macro.name)
        return invoke(macro, *args)

    with patch.object(jinja2.runtime.Macro, "_invoke", noting):
        rendered = [template.render(row) for row in rows]
    assert called == ["counted"] * 2 * len(rows)
    assert rendered == [fresh.render(row) for row in rows]
    assert len(set(rendered)) == len(rows)
