"""Thoughts in rows: columns of their own, and a completion that holds none of them."""

import json

import pyarrow as pa
import pytest

from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.errors import OptionsError
from beam_gemma.model.markup import Text
from beam_gemma.structured.output import StructuredOutput
from beam_gemma.tasks.generate import GenerateSettings
from beam_gemma.tasks.open_model import prompt_encoder
from beam_gemma.tasks.questions import ClassifySettings
from beam_gemma.tasks.thoughts import check_thinking, parts_of, text_of, thinking_of
from tests.doubles import fake_models
from tests.doubles.fake_models import fake_encoder, fake_generator
from tests.doubles.thinking import (
    ALWAYS_BEGUN,
    BEGIN,
    END,
    EOS,
    LARGE_TEMPLATE,
    MAX_MODEL_LEN,
    SMALL_TEMPLATE,
    TOKENIZER,
    ids_of,
    scripted,
    text_ids,
)

THOUGHT = ids_of("<|channel>thought\nit is hot<channel|>")
ENDLESS = ids_of("<|channel>thought\nhm")
ANSWER = text_ids("the answer")


def settings_of(max_tokens=20, **fields):
    return GenerateSettings(sampling=SamplingParams(max_tokens=max_tokens), **fields)


def encoder_of(settings, template=SMALL_TEMPLATE):
    return fake_encoder(settings, template, TOKENIZER, MAX_MODEL_LEN)


def result_of(thought, answer, *, row="hi", template=SMALL_TEMPLATE, is_begun=False, **fields):
    """Return the result of a row from a model that says a thought and an answer."""
    session = scripted(thought, answer, is_begun=is_begun)
    generate = fake_generator(
        settings_of(**fields), chat_template=template, session=session, tokenizer=TOKENIZER
    )
    (result,) = generate([row])
    assert result["error"] is None
    return result


def test_the_thought_has_columns_of_its_own():
    result = result_of(THOUGHT, ANSWER, thinking=True, token_ids=True)
    assert result == {
        "completion": "the answer",
        "thoughts": "it is hot",
        "finish_reason": "stop",
        "num_prompt_tokens": result["num_prompt_tokens"],
        "num_thinking_tokens": len(THOUGHT),
        "num_completion_tokens": len(ANSWER),
        "completion_token_ids": ANSWER,
        "error": None,
    }
    assert list(result) == settings_of(thinking=True, token_ids=True).result_schema.names
    kinds = {field.name: field.type for field in settings_of(thinking=True).result_schema}
    assert (kinds["thoughts"], kinds["num_thinking_tokens"]) == (pa.string(), pa.int64())


def test_a_thought_is_ended_at_its_budget_and_the_answer_keeps_all_of_max_tokens():
    result = result_of(ENDLESS, text_ids("x" * 99), thinking=True, thinking_tokens=30)
    assert result["num_thinking_tokens"] == 30
    assert result["thoughts"] == "h" + "m" * (30 - len(ENDLESS))
    assert (result["completion"], result["finish_reason"]) == ("x" * 20, "length")


def test_without_a_budget_a_thought_has_1024_tokens():
    settings = settings_of(max_tokens=50, thinking=True)
    assert settings.max_new_tokens == 50 + 1024
    assert settings.max_prompt(2000) == 2000 - 50 - 1024
    with pytest.raises(OptionsError, match=r"max_tokens and thinking_tokens: .* got 1,074"):
        settings.max_prompt(1074)


def test_a_model_that_does_not_think_has_no_thoughts():
    result = result_of([], ANSWER, thinking=True)
    assert (result["completion"], result["thoughts"]) == ("the answer", None)
    assert result["num_thinking_tokens"] == 0


@pytest.mark.parametrize("text", ["<|channel>thought\n<channel|>", "<|channel><channel|>"])
def test_an_empty_thought_is_an_empty_text(text):
    result = result_of(ids_of(text), ANSWER, thinking=True)
    assert (result["completion"], result["thoughts"]) == ("the answer", "")


def test_with_thinking_off_a_thought_is_ended_at_once():
    result = result_of(ENDLESS, ANSWER, thinking=False)
    assert (result["completion"], result["finish_reason"]) == ("the answer", "stop")
    assert "thoughts" not in result


def test_without_a_setting_a_thought_is_left_out_and_counts_as_part_of_the_answer():
    result = result_of(THOUGHT, text_ids("x" * 99), max_tokens=len(THOUGHT) + 3)
    assert (result["completion"], result["finish_reason"]) == ("xxx", "length")
    assert result["num_completion_tokens"] == 3
    assert "thoughts" not in result


def test_a_thought_that_the_prompt_begins_is_none_of_the_answer():
    thought = ids_of("thought\nhm")
    result = result_of(
        thought, ANSWER, template=ALWAYS_BEGUN, is_begun=True, thinking=True, thinking_tokens=12
    )
    assert (result["completion"], result["num_thinking_tokens"]) == ("the answer", 12)


def test_a_turn_that_ends_within_a_thought_has_an_empty_answer():
    result = result_of([*ENDLESS, EOS], ANSWER, thinking=True)
    assert (result["completion"], result["thoughts"]) == ("", "hm")
    assert (result["finish_reason"], result["num_completion_tokens"]) == ("stop", 0)


def test_several_thoughts_are_lines_of_one_text_and_the_answer_is_what_is_between():
    token_ids = [*THOUGHT, *text_ids("a"), *THOUGHT, *text_ids("b")]
    parts = parts_of(token_ids, thinking_of(TOKENIZER, [], max_tokens=None))
    assert text_of(parts.thoughts, TOKENIZER) == "it is hot\n\nit is hot"
    assert TOKENIZER.decode(parts.answer) == "ab"


def test_text_that_looks_like_a_thought_is_text():
    """In the row, in the answer and in the thought: other tokens spell it."""
    spelled = text_ids("<|channel>thought\nx<channel|>")
    assert not {BEGIN, END} & set(spelled)
    thought = [*ids_of("<|channel>thought\n"), *spelled, END]
    row = "say <|channel>thought\nx<channel|> or <|channel>"
    result = result_of(thought, spelled, row=row, max_tokens=90, thinking=True)
    assert result["thoughts"] == result["completion"] == "<|channel>thought\nx<channel|>"
    prompt = encoder_of(settings_of())(row)
    assert BEGIN not in prompt.token_ids


@pytest.mark.parametrize(
    ("row", "is_begun"),
    [("hi<|channel>thought\n", False), ("hi<channel|>", False), ("hi", False)],
)
def test_special_tokens_of_rows_do_not_begin_the_models_thought(row, is_begun):
    settings = settings_of(thinking=True, allow_special_tokens=True)
    prompt = encoder_of(settings)(row)
    thinking = thinking_of(TOKENIZER, prompt.token_ids, max_tokens=9)
    assert thinking.is_begun is is_begun


def test_stop_texts_are_looked_for_in_the_answer_alone():
    thought = ids_of("<|channel>thought\nan end<channel|>")
    result = result_of(thought, text_ids("at the end."), stop=("end",), thinking=True)
    assert (result["completion"], result["thoughts"]) == ("at the ", "an end")
    assert result["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("thought", "text"),
    [(THOUGHT, "it is hot"), (ENDLESS, "h" + "m" * 35), ([], None), ([*ENDLESS, EOS], "hm")],
    ids=["ends", "never ends", "left out", "ends the turn"],
)
@pytest.mark.parametrize("max_tokens", [9, 40])
def test_json_is_valid_after_any_thought(thought, text, max_tokens):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["a"],
    }
    structured = StructuredOutput(json_schema=schema, completion=True)
    limit = {"thinking_tokens": 45} if thought is ENDLESS else {}
    result = result_of(
        thought,
        text_ids("Well, the answer is"),
        structured=structured,
        thinking=True,
        max_tokens=max_tokens,
        **limit,
    )
    assert json.loads(result["completion"]) == result["extracted"]
    assert 0 <= result["extracted"]["a"] <= 99
    assert result["thoughts"] == text
    assert result["finish_reason"] == "stop"


def test_structured_output_without_thinking_begins_at_once():
    structured = StructuredOutput(choices=("the", "in"))
    for thinking in (None, False):
        result = result_of(ENDLESS, ANSWER, structured=structured, thinking=thinking)
        assert result["completion"] in ("the", "in")


SYSTEM = "<bos><|turn>system\n{}<turn|>\n<|turn>user\nhi<turn|>\n<|turn>model\n"
BARE = "<bos><|turn>user\nhi<turn|>\n<|turn>model\n"


@pytest.mark.parametrize(
    ("template", "thinking", "system", "text"),
    [
        (SMALL_TEMPLATE, True, None, SYSTEM.format("<|think|>\n")),
        (SMALL_TEMPLATE, True, "be kind", SYSTEM.format("<|think|>\nbe kind")),
        (SMALL_TEMPLATE, False, None, BARE),
        (SMALL_TEMPLATE, None, None, BARE),
        (LARGE_TEMPLATE, True, None, SYSTEM.format("<|think|>\n")),
        (LARGE_TEMPLATE, False, None, BARE + "<|channel>thought\n<channel|>"),
        (LARGE_TEMPLATE, None, None, BARE + "<|channel>thought\n<channel|>"),
    ],
)
def test_the_chat_template_decides_what_the_prompt_is(template, thinking, system, text):
    settings = settings_of(thinking=thinking, system=system)
    prompt = encoder_of(settings, template)("hi")
    assert prompt.text == text
    assert list(prompt.token_ids) == ids_of(text)


def test_what_no_setting_says_is_left_to_the_template():
    thinks_unless_told = SMALL_TEMPLATE.replace(
        "{%- set has", "{%- set enable_thinking = enable_thinking | default(true) -%}{%- set has"
    )
    texts = {
        thinking: encoder_of(settings_of(thinking=thinking), thinks_unless_told)("hi")
        for thinking in (None, True, False)
    }
    assert texts[None] == texts[True] != texts[False]
    assert texts[False].text == BARE


IGNORES = "{{ bos_token }}{{ messages[0].content }}{# enable_thinking #}"


def test_a_template_that_ignores_thinking_is_refused():
    with pytest.raises(OptionsError, match="ignores it"):
        encoder_of(settings_of(thinking=True), IGNORES)
    for thinking in (None, False):
        prompt = encoder_of(settings_of(thinking=thinking), IGNORES)("hi")
        assert prompt.text == "<bos>hi"


def test_a_model_without_a_template_or_without_the_pieces_is_refused():
    with pytest.raises(OptionsError, match=r"thinking: .* got one without"):
        check_thinking(TOKENIZER, None)
    check_thinking(TOKENIZER, SMALL_TEMPLATE)
    with pytest.raises(OptionsError, match="in its vocabulary"):
        check_thinking(fake_models.TOKENIZER, SMALL_TEMPLATE)


def test_a_model_that_cannot_think_is_refused_before_the_job(tiny_gemma3):
    settings = settings_of(thinking=True, prompt="{a}", chat_template="gemma")
    with pytest.raises(OptionsError, match=r"<\|channel> and <channel\|> in its vocabulary"):
        prompt_encoder(tiny_gemma3.artifact, settings)
    off = settings_of(thinking=False, prompt="{a}")
    assert prompt_encoder(tiny_gemma3.artifact, off)({"a": "hi"}).text == "hi"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"thinking_tokens": 9}, "thinking_tokens: expected thinking beside it"),
        ({"thinking": False, "thinking_tokens": 9}, "thinking_tokens: expected thinking beside it"),
        ({"thinking": True, "thinking_tokens": 1}, "thinking_tokens: expected at least 2"),
        ({"thinking": True, "prompt_format": "raw"}, "got prompt_format raw"),
        (
            {"thinking": True, "prefix_column": "a", "suffix_column": "b"},
            "got prefix_column",
        ),
        ({"thinking": True, "boxes": True}, "got boxes"),
        ({"thinking": True, "decoder_prompt": "x"}, "got decoder_prompt"),
        (
            {"thinking": True, "source_lang": "cs", "target_lang": "en", "prompt_column": "a"},
            "got source_lang",
        ),
    ],
)
def test_settings_that_make_no_sense_together(fields, message):
    with pytest.raises(OptionsError, match=message):
        settings_of(**fields)


def test_a_schema_may_not_name_a_property_as_the_columns_are():
    schema = {"type": "object", "properties": {"thoughts": {"type": "string"}}}
    structured = StructuredOutput(json_schema=schema, flatten=True)
    settings_of(structured=structured)
    with pytest.raises(OptionsError, match="'thoughts'"):
        settings_of(structured=structured, thinking=True)


def test_classify_scores_labels_without_a_thought():
    with pytest.raises(TypeError, match="thinking"):
        ClassifySettings(prompt="{a}", labels=("a", "b"), thinking=True)


def test_results_are_saved_apart_for_each_setting():
    settings = [
        settings_of(),
        settings_of(thinking=False),
        settings_of(thinking=True, thinking_tokens=9),
        settings_of(thinking=True, thinking_tokens=10),
        settings_of(thinking=True),
        settings_of(thinking=True, max_tokens=21),
    ]
    parameters = {json.dumps(one.parameters, sort_keys=True) for one in settings}
    assert len(parameters) == len(settings)
    default = settings_of(thinking=True, thinking_tokens=1024)
    assert default.parameters == settings_of(thinking=True).parameters


@pytest.mark.parametrize(
    ("written", "text"),
    [("thought\nit is hot", "it is hot"), ("hot\nit is", "hot\nit is"), ("it is", "it is")],
)
def test_only_the_name_of_the_channel_of_thoughts_is_no_text(written, text):
    """Another first line is what the model has thought."""
    ids = TOKENIZER.encode([Text(written)], add_bos=False)
    assert text_of([ids], TOKENIZER) == text
