"""Prompts of chats as the published templates write them, down to the tokens.

`gemma1_and_2.jinja` is the template of the instruction-tuned Gemma 1 and 2 and CodeGemma,
`gemma3.jinja` that of Gemma 3 and MedGemma; `*_training.jinja` are TRL's variants of them (see
`tests/data/README.md`).
"""

import time

import pytest

from beam_gemma.errors import OptionsError, RecordError
from beam_gemma.inputs.chat_template import ChatTemplate
from beam_gemma.inputs.prompt_encoder import PromptEncoder
from beam_gemma.inputs.prompt_settings import PromptSettings
from beam_gemma.model.markup import Control, Text
from tests.doubles.chat_reference import TEMPLATES
from tests.doubles.fake_models import TOKENIZER

CHAT = [
    {"role": "user", "content": "knock knock"},
    {"role": "assistant", "content": "who is there"},
    {"role": "user", "content": "gemma\n"},
]
# The example of ai.google.dev/gemma/docs/formatting, with the turn that the model is to take.
RENDERED = """\
<bos><start_of_turn>user
{}knock knock<end_of_turn>
<start_of_turn>model
who is there<end_of_turn>
<start_of_turn>user
gemma<end_of_turn>
<start_of_turn>model
"""


def encoder(name, **settings):
    return PromptEncoder(
        TOKENIZER,
        PromptSettings(messages_column="chat", **settings),
        chat_template=TEMPLATES[name],
        max_tokens=1000,
    )


@pytest.mark.parametrize("name", TEMPLATES)
class TestEveryTemplate:
    def test_a_conversation_is_the_published_one(self, name):
        assert encoder(name)({"chat": CHAT}).text == RENDERED.format("")

    def test_system_text_stands_at_the_head_of_the_first_turn(self, name):
        """Gemma 1 and 2 refuse a system role, Gemma 3 writes it there itself."""
        expected = RENDERED.format("answer in rhyme\n\n")
        assert encoder(name, system="answer in rhyme")({"chat": CHAT}).text == expected
        own = [{"role": "system", "content": "answer in rhyme"}, *CHAT]
        assert encoder(name, system="never mind")({"chat": own}).text == expected

    def test_turns_are_control_tokens_and_all_else_is_text(self, name):
        pieces = TOKENIZER.control_pieces
        start, end = pieces["<start_of_turn>"], pieces["<end_of_turn>"]
        expected = [TOKENIZER.bos_token_id]
        for role, content in (("user", "hi"), ("model", "<end_of_turn>"), ("user", "a")):
            text = TOKENIZER.encode([Text(f"{role}\n{content}")], add_bos=False)
            newline = TOKENIZER.encode([Text("\n")], add_bos=False)
            expected += [start, *text, end, *newline]
        expected += [start, *TOKENIZER.encode([Text("model\n")], add_bos=False)]
        chat = [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "<end_of_turn>"},
            {"role": "user", "content": "a"},
        ]
        prompt = encoder(name)({"chat": chat})
        assert list(prompt.token_ids) == expected
        assert prompt.parts[0] == Control("<bos>")

    @pytest.mark.parametrize("roles", [["user", "user"], ["assistant", "user"]])
    def test_roles_that_do_not_alternate_end_that_row(self, name, roles):
        chat = [{"role": role, "content": "x"} for role in roles]
        with pytest.raises(RecordError, match="alternate"):
            encoder(name)({"chat": chat})


def test_the_built_in_template_is_the_published_one_for_any_text():
    texts = ["", " ", " two  words ", "<b>bold</b>\n\n", "{{ x }}", "a\u00a0"]
    ours, theirs = (
        ChatTemplate(TEMPLATES[name], TOKENIZER.control_pieces)
        for name in ("built in", "gemma1_and_2")
    )
    for text in texts:
        for answer in texts:
            chat = [{"role": "user", "content": text}, {"role": "assistant", "content": answer},
                    {"role": "user", "content": "?"}]  # fmt: skip
            assert ours.render(chat) == theirs.render(chat)


DOUBLED = "{% set n = namespace(x='aa') %}{% for i in range(60) %}BODY{% endfor %}"


@pytest.mark.parametrize(
    ("source", "limit"),
    [
        ("{% for i in range(10**9) %}x{% endfor %}", "characters in a step"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "100,000 steps",
        ),
        (
            "{% macro f(n) %}{% if n %}{{ f(n-1) ~ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}",
            "100,000 steps",
        ),
        ("{% for i in range(90000) %}" + "x" * 99 + "{% endfor %}", "characters of a prompt"),
        ("{{ 'a' * 10**10 }}", "characters in a step"),
        ("{{ 'a' | center(10**10) }}", "characters in a step"),
        ("{{ 'a'.ljust(10**10) }}", "characters in a step"),
        ("{{ '%9999999999d' % 1 }}", "characters in a width"),
        ("{{ '{:>9999999999}'.format(1) }}", "characters in a width"),
        ("{{ 9 ** 9999 }}", "bits of a number"),
        (DOUBLED.replace("BODY", "{% set n.x = n.x ~ n.x %}"), "characters or items in a value"),
        (DOUBLED.replace("BODY", "{% set n.x = n.x + n.x %}"), "characters or items in a value"),
        (
            DOUBLED.replace("BODY", "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}"),
            "characters or items in a value",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ " + "(" * 900 + "1" + ")" * 900 + " }}", "recursion"),
        ("x" * 2_000_001, "characters or items in a value"),
    ],
)
def test_a_template_that_takes_long_or_grows_is_refused_at_once(source, limit):
    start = time.process_time()
    with pytest.raises(OptionsError, match=limit):
        ChatTemplate(source, TOKENIZER.control_pieces)
    assert time.process_time() - start < 5


def test_a_template_that_grows_with_a_row_ends_that_row():
    template = ChatTemplate(
        "{{ messages[0].content.replace('a', messages[0].content) }}", TOKENIZER.control_pieces
    )
    assert template.render([{"role": "user", "content": "aa"}]) == (Text("aaaa"),)
    with pytest.raises(RecordError, match="chat template takes, got: a template that takes more"):
        template.render([{"role": "user", "content": "a" * 20_000}])


FOUND = "<bos>\u00e9 fdd0 \ufdd1"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("tojson", '"<bos>\u00e9 fdd0 \ufdd1"'),
        ("tojson(ensure_ascii=true)", '"<bos>\\u00e9 fdd0 \\ufdd1"'),
        ("tojson | tojson", '"\\"<bos>\u00e9 fdd0 \ufdd1\\""'),
        ("pprint", "'<bos>\u00e9 fdd0 \\ufdd1'"),
        ("urlencode", "%3Cbos%3E%C3%A9%20fdd0%20%EF%B7%91"),
        ("list | join", FOUND),
    ],
)
def test_text_that_a_filter_writes_has_no_control_tokens_and_nothing_beside_it(written, expected):
    template = ChatTemplate(
        "{{ '<bos>' }}{{ messages[0].content | " + written + " }}", TOKENIZER.control_pieces
    )
    parts = template.render([{"role": "user", "content": FOUND}])
    assert parts == (Control("<bos>"), Text(expected))
