"""Questions: prompts with shots before them, labels of the settings or of the row."""

import json
import math

import pytest

from beam_gemma.errors import OptionsError, PromptTooLongError, RecordError
from beam_gemma.inputs.decoder_prompt import Decoder
from beam_gemma.model.markup import Control
from beam_gemma.model.tokenizer import Tokenizer
from beam_gemma.tasks.questions import Answer, ClassifySettings, QuestionEncoder, Shot
from tests.doubles.nested import nested
from tests.doubles.tiny_tokenizer import tiny_tokenizer_model

TOKENIZER = Tokenizer(tiny_tokenizer_model())
SHOTS = tuple(Shot(row={"text": text}, label=i) for i, text in enumerate(["aa", "bb"]))


def settings_of(**fields) -> ClassifySettings:
    return ClassifySettings(**{"prompt": "{text}: ", "labels": ("no", "yes")} | fields)


def encoder_of(*, max_model_len=200, **fields) -> QuestionEncoder:
    settings = settings_of(**fields)
    return QuestionEncoder(TOKENIZER, settings, chat_template=None, max_model_len=max_model_len)


def test_a_question_has_a_prompt_and_its_labels():
    question = encoder_of()({"text": "the"})
    assert question.prompt.text == "the: "
    assert question.labels == ("no", "yes")
    assert question.num_label_tokens == [2, 3]
    assert [TOKENIZER.decode(path.token_ids) for path in question.plan.paths] == [
        "the: n", "the: ye"
    ]  # fmt: skip


def test_labels_of_the_row():
    encode = encoder_of(labels=("{first}", "not {second}"))
    assert encode({"text": "x", "first": "a", "second": 5}).labels == ("a", "not 5")
    assert encoder_of(labels=("{first}", "{{x}}")).__call__({"text": "x", "first": "a"}).labels == (
        "a",
        "{x}",
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x", "first": None, "second": "b"}, "'first'.*null"),
        ({"text": "x", "first": "a"}, "'second'"),
        ({"text": "x", "first": "a", "second": "a"}, "each once, got 'a' twice"),
        ({"text": "x", "first": "a", "second": ""}, "some text, got none"),
        ({"text": None, "first": "a", "second": "b"}, "'text'.*null"),
        ({"text": "x", "first": "a", "second": object}, None),
        ("x", "expected columns"),
    ],
)
def test_a_row_without_a_question_says_why(row, message):
    encode = encoder_of(labels=("{first}", "{second}"))
    if message is None:
        assert encode(row).labels[1] == str(object)
        return
    with pytest.raises(RecordError, match=message):
        encode(row)


class Broken:
    def __str__(self) -> str:
        raise ZeroDivisionError("no text")


def test_a_value_that_breaks_is_its_rows_error():
    with pytest.raises(RecordError, match="ZeroDivisionError"):
        encoder_of(labels=("{a}", "b"))({"text": "x", "a": Broken()})


def test_a_row_cannot_write_a_control_token_into_a_label():
    encode = encoder_of(labels=("{a}", "b<end_of_turn>"))
    ids = [p.token_ids for p in encode({"text": "x", "a": "c<end_of_turn>"}).plan.paths]
    end = TOKENIZER.control_pieces["<end_of_turn>"]
    assert not any(end in path for path in ids)
    targets = {token for p in encode({"text": "x", "a": "c"}).plan.paths for _, token in p.targets}
    assert end in targets


def test_a_string_is_the_prompt_itself():
    assert encoder_of(prompt=None)("what? ").prompt.text == "what? "


def test_labels_fit_into_the_model_with_their_prompt():
    encode = encoder_of(max_model_len=10)
    # <bos>, the text, colon and space, and `yes` are 7 tokens more than the text.
    assert len(encode({"text": "xxx"}).prompt.token_ids) == 6
    with pytest.raises(PromptTooLongError, match="at most 7 tokens, got 8"):
        encode({"text": "xxxxx"})
    question = encoder_of(max_model_len=10, truncate="right")({"text": "xzzzz"})
    assert question.prompt.text == "xzzz: "
    assert question.prompt.truncated
    with pytest.raises(RecordError, match="at most 10 tokens"):
        encoder_of(max_model_len=10, labels=("a", "{b}"))({"text": "x", "b": "x" * 20})


@pytest.mark.parametrize(
    ("fields", "normalized"),
    [
        ({"labels": ("a", "b")}, False),
        ({"labels": ("a", "b"), "label_norm": "tokens"}, False),
        ({"labels": ("a", "b"), "label_norm": "chars"}, True),
        ({"labels": ("a", "b"), "logliks": True}, True),
        ({"labels": ("a", "bc")}, True),
    ],
)
def test_logits_do_where_all_labels_are_single_tokens(fields, normalized):
    assert encoder_of(**fields)({"text": "x"}).normalized is normalized


def test_shots_come_before_each_prompt():
    encode = encoder_of(shots=SHOTS, fewshot_delimiter="\n")
    assert encode({"text": "cc"}).prompt.text == "aa: no\nbb: yes\ncc: "
    with_choices = encoder_of(
        labels=("{a}", "{b}"), shots=(Shot(row={"text": "q", "a": "x", "b": "y"}, label=1),)
    )
    assert with_choices({"text": "r", "a": "v", "b": "w"}).prompt.text == "q: y\n\nr: "


def test_a_row_is_never_among_its_own_shots():
    encode = encoder_of(shots=SHOTS, fewshot_delimiter="\n")
    assert encode({"text": "aa"}).prompt.text == "bb: yes\naa: "
    spare = (*SHOTS, Shot(row={"text": "dd"}, label=0))
    encode = encoder_of(shots=spare, num_fewshot=2, fewshot_delimiter="\n")
    assert encode({"text": "cc"}).prompt.text == "aa: no\nbb: yes\ncc: "
    assert encode({"text": "aa"}).prompt.text == "bb: yes\ndd: no\naa: "


def test_a_row_is_not_shown_to_itself_when_it_is_cut():
    long = Shot(row={"text": "the " * 8}, label=0)
    encode = encoder_of(shots=(*SHOTS, long), num_fewshot=2, truncate="right", max_prompt_tokens=35)
    assert encode({"text": "bb"}).prompt.text.count("the") == 8
    question = encode({"text": "the " * 20})
    assert question.prompt.truncated
    assert question.prompt.text.startswith("aa: no\n\nbb: yes\n\nthe the")
    assert len(question.prompt.token_ids) <= 35


def test_shots_are_turns_of_a_chat():
    question = encoder_of(
        shots=SHOTS[1:], prompt="{text}", chat_template="gemma", system="be kind"
    )({"text": "<end_of_turn>"})
    assert question.prompt.text == (
        "<bos><start_of_turn>user\nbe kind\n\nbb<end_of_turn>\n<start_of_turn>model\nyes"
        "<end_of_turn>\n<start_of_turn>user\n<end_of_turn><end_of_turn>\n<start_of_turn>model\n"
    )
    assert question.prompt.parts.count(Control("<end_of_turn>")) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": ("a",)}, "at least two"),
        ({"labels": ("a", "")}, "not empty"),
        ({"labels": ("a", "b", "a")}, "'a' twice"),
        ({"shots": (Shot(row={}, label=2),)}, "from 0 to 1"),
        ({"shots": SHOTS, "prompt": None, "messages_column": "m"}, "messages_column"),
        ({"num_fewshot": -1}, "num_fewshot"),
    ],
)
def test_settings_are_checked(fields, message):
    with pytest.raises(OptionsError, match=message):
        settings_of(**fields)


def test_a_picture_is_no_label():
    settings_of(labels=("{photo}", "x"))
    with pytest.raises(
        OptionsError, match="labels: expected texts, got 'photo', a column of files"
    ):
        settings_of(labels=("{photo}", "x"), image_columns=("photo",))


@pytest.mark.parametrize("row", [{"text": None}, {}, {"text": "x", "label": None}])
def test_a_shot_without_a_prompt_is_a_wrong_setting(row):
    with pytest.raises(OptionsError, match="shots"):
        encoder_of(shots=(Shot(row=row, label=0),), labels=("{label}", "x"))


class Rude:
    """A value whose text cannot be written; the error says what it holds."""

    def __str__(self):
        raise ValueError("hush")


@pytest.mark.parametrize("value", [{"hush": [b"hush"]}, ["hush", None, nested(100_000)], Rude()])
@pytest.mark.parametrize("column", ["text", "label"])
def test_a_shot_that_cannot_be_written_is_not_shown(value, column):
    """It is a row, and the error is one of the launch."""
    shot = Shot(row={"text": "x", "label": "y"} | {column: value}, label=0)
    with pytest.raises(
        OptionsError, match=r"^shots: expected rows that make a prompt .*got"
    ) as error:
        encoder_of(shots=(shot,), labels=("{label}", "x"))
    assert "hush" not in str(error.value)


def test_columns_and_results():
    settings = settings_of(labels=("{a}", "b{b}"), logliks=True, truncate="left")
    assert settings.columns == {"a": "value", "b": "value", "text": "value"}
    assert settings.result_schema.names == [
        "label", "label_index", "scores", "num_prompt_tokens", "logliks", "truncated", "error"
    ]  # fmt: skip
    names = ["label", "label_index", "scores", "num_prompt_tokens", "error"]
    assert settings_of().result_schema.names == names


def test_characters_of_a_label_are_those_of_acc_norm():
    """The harness divides by the length of the choice, without the space before it."""
    labels = (" a", " very long", " spaced ", " é🙂")
    question = encoder_of(prompt="{text}", labels=labels)({"text": "x:"})
    assert question.num_label_characters == [1, 9, 7, 2]
    # With the spaces counted, the first label would be the best one.
    scores = Answer(question, [-1.7, -9.0, -14.0, -3.0]).scores("chars")
    assert scores.index(max(scores)) == 1
    odd = encoder_of(labels=(" ", "\n\nb"))({"text": "x"})
    assert odd.num_label_characters == [1, 1]


@pytest.mark.parametrize(
    ("norm", "means"), [("none", (-12, -6)), ("tokens", (-6, -2)), ("chars", (-4, -2))]
)
def test_norms(norm, means):
    question = encoder_of(labels=("hen", "yes"), prompt="{text}")({"text": "x"})
    assert question.num_label_tokens == [2, 3]
    scores = Answer(question, [-12.0, -6.0]).scores(norm)
    assert scores[0] / scores[1] == pytest.approx(math.exp(means[0] - means[1]), rel=1e-12)
    assert sum(scores) == pytest.approx(1.0, rel=1e-12)


def of_a_source(*, source_len=200, decoder_len=50, **fields) -> QuestionEncoder:
    return QuestionEncoder(
        TOKENIZER,
        settings_of(**fields),
        chat_template=None,
        max_model_len=source_len,
        decoder=Decoder(model_type="t5gemma", max_tokens=decoder_len),
    )


def test_labels_of_a_decoder_with_a_source_follow_what_it_starts_with():
    bare = of_a_source()({"text": "the"})
    assert TOKENIZER.decode(bare.prompt.token_ids) == "the: "
    assert [TOKENIZER.decode(path.token_ids) for path in bare.plan.paths] == ["n", "ye"]
    assert {path.token_ids[0] for path in bare.plan.paths} == {TOKENIZER.bos_token_id}
    encode = of_a_source(decoder_prompt="{text} is", labels=(" a", " b"))
    question = encode({"text": "the"})
    assert [TOKENIZER.decode(path.token_ids) for path in question.plan.paths] == ["the is "]
    assert question.num_label_tokens == [2, 2]
    restored = encode.restore(json.loads(json.dumps(question.identity)))
    assert restored.plan.paths == question.plan.paths
    assert restored.prompt.decoder_token_ids == question.prompt.decoder_token_ids
    assert restored.prompt.token_ids == question.prompt.token_ids


def test_labels_take_no_room_from_a_source_but_from_the_decoder():
    encode = of_a_source(source_len=7, decoder_len=6, decoder_prompt="{text}")
    # <bos>, the text, colon and space; then <bos>, the text and the 3 tokens of `yes`.
    assert len(encode({"text": "xx"}).prompt.token_ids) == 5
    with pytest.raises(PromptTooLongError, match=r"decoder_prompt: expected at most 3 tokens"):
        encode({"text": "xxx"})
    with pytest.raises(PromptTooLongError, match=r"^prompt: expected at most 7 tokens, got 8"):
        of_a_source(source_len=7)({"text": "xxxxx"})
    with pytest.raises(RecordError, match="labels: expected at most 3 tokens"):
        of_a_source(decoder_len=3)({"text": "x"})


def test_shots_of_a_source_show_what_the_decoder_starts_with():
    encode = of_a_source(shots=SHOTS, fewshot_delimiter="\n", decoder_prompt="<{text}>")
    question = encode({"text": "cc"})
    assert question.prompt.text == "aa: <aa>no\nbb: <bb>yes\ncc: "
    assert question.prompt.decoder_text == "<cc>"
