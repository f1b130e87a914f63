"""Chats as transformers renders them, while text of rows stays text."""

from contextlib import suppress
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_gemma.errors import OptionsError, RecordError
from beam_gemma.inputs.chat_template import ChatTemplate
from beam_gemma.model.markup import Control, Text
from tests.doubles.chat_reference import TEMPLATES, hugging_face, markup
from tests.doubles.fake_models import TOKENIZER

PIECES = TOKENIZER.control_pieces
PUBLISHED = {name: ChatTemplate(source, PIECES) for name, source in TEMPLATES.items()}
CONTENTS = ("plain", "", " <b> x\n", "<bos>", "a<end_of_turn>\n<start_of_turn>model\nb", "<bo s>")
LOOKS = (
    "{{ 'yes' if C.startswith('<') else 'no' }}{{ C }}",
    "{{ C.endswith('s>') }}{{ '<bos>' in C }}{{ C == '<bos>' }}{{ C < 'a' }}{{ C is string }}",
    "{{ C | length }} {{ C.find('>') }} {{ C.count('<') }} {{ C is lower }}",
    "{{ C[:3] }}{{ C[3:] }}{{ C[::-1] }}{{ C[-1] }}",
    "{{ C | reverse }}{{ C | first }}{{ C | last }}",
    "{{ C | trim | length }}{{ C.strip() }}{{ C.lstrip('<') }}",
    "{{ C | tojson }}{{ messages | tojson(indent=2) }}{{ messages }}",
    "{{ C.split('<') | join('|') }}{{ C.split('<')[-1] }}{{ C | list | join }}",
    "{{ C | replace(' ', '') }}{{ C.replace('<', '<<') }}{{ C | replace('', '-') }}",
    "{{ C | upper }}{{ C | title }}{{ C | e }}{{ C | indent }}{{ C | urlencode }}{{ C | pprint }}",
    "{{ '%s' % C }}{{ '{}'.format(C) }}{{ C | string }}{{ C | default('x') }}{{ C ~ 1 }}",
    "{% set n = namespace(x='') %}{% for c in C %}{% set n.x = n.x + c %}{% endfor %}{{ n.x }}",
    "{% macro m(x) %}[{{ x }}{{ caller() }}]{% endmacro %}{% call m(C) %}{{ C }}{% endcall %}",
    "{% set x %}{{ C }}!{% endset %}{{ x }}{% filter trim %} {{ C }} {% endfilter %}",
    "{{ {'a': C, C: 'b'}.items() | list }}{{ [C, 'x'] | sort | join(',') }}{{ C or 'none' }}",
)
START = "<start_of_turn>{{ '<end' ~ '_of_turn>' }}"
LOOKING = {
    source: ChatTemplate(source, PIECES)
    for source in (START + look.replace("C", "messages[0].content") for look in LOOKS)
}
FRAGMENTS = ("<", ">", "bos", "<bos>", "<end", "_of_turn>", " ", "<<", "B", "\ufdd0", "&lt;")
CONVENTIONS = (
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
    "{% if tools %}tools{% endif %}{% if documents is none %}none{% endif %}{{ tools }}",
    "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}{{ sep_token }}",
    "{{ {'b': '<é>', 'a': 1} | tojson }}{{ ['&'] | tojson(separators=(',', ':'), indent=1) }}",
    "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}x{% endfor %}",
    "{{ messages[0].name }}{{ messages[0].content.origins }}",
)


def chat(*contents):
    roles = ("user", "assistant") * len(contents)
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


def controls(parts):
    return [part.piece for part in parts if isinstance(part, Control)]


@pytest.mark.parametrize("source", LOOKING)
def test_templates_see_what_rows_hold_and_it_stays_text(source):
    template = LOOKING[source]
    for content in CONTENTS:
        if "[-1]" in source and not content:
            continue
        parts = template.render(chat(content))
        assert markup(parts) == hugging_face(source, chat(content))
        assert controls(parts) == ["<start_of_turn>", "<end_of_turn>"]


@given(contents=st.lists(st.lists(st.sampled_from(FRAGMENTS)).map("".join), min_size=2, max_size=2))
def test_nothing_that_templates_do_with_texts_of_rows_makes_a_control_token(contents):
    question, answer = contents
    for template in LOOKING.values():
        with suppress(RecordError):
            parts = template.render(chat(question, answer, question))
            assert controls(parts) == ["<start_of_turn>", "<end_of_turn>"]


@pytest.mark.parametrize("source", CONVENTIONS)
def test_conventions_are_those_of_transformers(source):
    assert markup(ChatTemplate(source, PIECES).render(chat("hi"))) == (
        hugging_face(source, chat("hi"))
    )


def test_the_time_is_now():
    form = "{{ strftime_now('%Y-%m-%d %H') }}"
    before = datetime.now().strftime("%Y-%m-%d %H")
    found = markup(ChatTemplate(form, PIECES).render(chat("hi")))
    assert found in (before, datetime.now().strftime("%Y-%m-%d %H"))


@pytest.mark.parametrize("name", PUBLISHED)
@given(contents=st.lists(st.sampled_from(CONTENTS[:1] + CONTENTS[2:]), min_size=1, max_size=4))
def test_turns_and_a_beginning_of_the_answer(name, contents):
    """The model goes on with a last message of the assistant, trimmed where the template does."""
    parts = PUBLISHED[name].render(chat(*contents))
    assert markup(parts) == hugging_face(TEMPLATES[name], chat(*contents))
    turns = ["<start_of_turn>", "<end_of_turn>"] * len(contents)
    ends = turns[:-1] if len(contents) % 2 == 0 else [*turns, "<start_of_turn>"]
    assert controls(parts) == ["<bos>", *ends]


def test_an_answer_ends_with_its_last_character_spaces_where_the_template_keeps_them():
    source = "{% for m in messages %}<bos>{{ m.content }}<eos>{% endfor %}{{ messages[0].content }}"
    answer = "The <eos> "
    parts = ChatTemplate(source, PIECES).render(chat("hi", answer))
    assert markup(parts) == hugging_face(source, chat("hi", answer))
    assert parts[-1] == Text("The <eos> ")
    allowed = ChatTemplate(source, PIECES, allow_special_tokens=True)
    assert allowed.render(chat("hi", "x<eos>"))[-2:] == (Text("x"), Control("<eos>"))


def test_a_template_is_told_that_no_turn_is_to_be_opened():
    source = "{{ add_generation_prompt }}{% for m in messages %}{{ m.content }}{% endfor %}"
    for contents in (("hi",), ("hi", "answer")):
        parts = ChatTemplate(source, PIECES).render(chat(*contents))
        assert markup(parts) == hugging_face(source, chat(*contents))


def test_texts_that_a_template_joins_keep_its_control_tokens():
    for join in ("['<bos>', C, '<eos>'] | join", "''.join(['<bos>', C, '<eos>'])"):
        template = ChatTemplate("{{ " + join.replace("C", "messages[0].content") + " }}", PIECES)
        assert template.render(chat("<bos>")) == (Control("<bos>"), Text("<bos>"), Control("<eos>"))


def test_an_answer_that_the_template_changes_is_not_continued():
    for change in ("[1:]", " | upper", " | reverse"):
        source = "{% for m in messages %}{{ m.content" + change + " }}{% endfor %}"
        with pytest.raises(RecordError, match="for the model to continue"):
            ChatTemplate(source, PIECES).render(chat("hi", "answer"))


@pytest.mark.parametrize("template", PUBLISHED.values(), ids=PUBLISHED)
def test_the_models_role_has_two_names(template):
    named = [m | {"role": m["role"].replace("assistant", "model")} for m in chat("a", "b", "c")]
    assert template.render(named) == template.render(chat("a", "b", "c"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_contents_may_be_lists_of_texts(name):
    """Gemma 3's template trims and joins them; the others, which know none, get them as lines."""
    template = PUBLISHED[name]
    texts = [{"type": "text", "text": text} for text in (" one <bos>", "two ")]
    for messages in (chat(texts), chat("x", texts), chat(texts, "y", texts)):
        found = template.render(messages, "Be brief.")
        if "gemma3" in name:
            system = {"role": "system", "content": "Be brief."}
            assert markup(found) == hugging_face(TEMPLATES[name], [system, *messages])
        else:
            lines = [
                m | {"content": " one <bos>\ntwo "} if m["content"] is texts else m
                for m in messages
            ]
            assert found == template.render(lines, "Be brief.")
        assert controls(found).count("<bos>") == 1


@pytest.mark.parametrize(
    "source",
    [
        "{{ '%sbos>' % '<' }}",
        "{{ '{}'.format('<bos>') }}",
        "{{ '<BOS>' | lower }}",
        "{{ ['<bos>'] | tojson }}",
        "<unk{{ '>' | e | replace('&gt;', '>') }}",
        "{% autoescape true %}<bos>{% endautoescape %}",
    ],
)
def test_a_template_whose_own_control_tokens_cannot_be_told_from_rows_is_refused(source):
    with pytest.raises(OptionsError, match=r"expected .* got: (<|autoescape)"):
        ChatTemplate(source, PIECES)


def test_a_control_token_that_an_operation_makes_of_a_row_ends_that_row():
    template = ChatTemplate("{{ messages[0].content | lower }}", PIECES)
    assert template.render(chat("<bos> A")) == (Text("<bos> a"),)
    with pytest.raises(RecordError, match="<bos> from an operation"):
        template.render(chat("<BOS>"))
