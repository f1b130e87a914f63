"""Rows that carry the request they were encoded to: the result of the row, without its columns."""

import json

import pyarrow as pa
import pytest

from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.errors import RecordError
from beam_gemma.inference.rows import rows_of
from beam_gemma.inputs.row import Prompt
from beam_gemma.tasks.encoded_rows import request_in, request_of
from beam_gemma.tasks.generate import GenerateSettings
from beam_gemma.tasks.moderate import ModerateSettings, Policy
from beam_gemma.tasks.questions import ClassifySettings, QuestionEncoder
from beam_gemma.tasks.row_keys import ENCODED, ROW_KEY
from tests.doubles.fake_models import TOKENIZER, fake_encoder, fake_generator
from tests.tasks.test_classify import MAX_MODEL_LEN, classifier_of

ROWS = [{"text": "the cat"}, {"text": None}, {"text": "a" * 90}, {"text": "é"}]


def carried(rows, identify, **columns):
    """Return rows that hold nothing but their requests and some columns."""
    requests = [request_of(row, identify) for row in rows]
    return rows_of(pa.record_batch({ENCODED: pa.array(requests, pa.binary()), **columns}))


def generate_settings(**fields):
    sampling = SamplingParams(max_tokens=5, **fields)
    return GenerateSettings(
        prompt="Say {text}", max_prompt_tokens=40, truncate="right", sampling=sampling
    )


def test_carried_prompt_gives_the_completion_of_its_row():
    settings = generate_settings()
    encode = fake_encoder(settings)
    rows = carried(ROWS, lambda row: encode(row).identity)
    expected = fake_generator(settings)(ROWS)
    assert fake_generator(settings)(rows) == expected
    assert [result["truncated"] for result in expected] == [False, None, True, False]
    assert "null" in expected[1]["error"]


def test_carried_prompt_is_sampled_by_its_row_key():
    settings = generate_settings(temperature=50.0)
    encode = fake_encoder(settings)
    keys = ["1", "2", "1"]
    rows = [{"text": "a", ROW_KEY: key} for key in keys]
    same = carried(rows, lambda row: encode(row).identity, **{ROW_KEY: keys})
    one, two, again = fake_generator(settings)(same)
    assert fake_generator(settings)(rows) == [one, two, again]
    assert one["completion"] == again["completion"] != two["completion"]


@pytest.mark.parametrize(
    "settings",
    [
        ClassifySettings(prompt="{text}: ", labels=("no", "yes {text}"), logliks=True),
        ClassifySettings(prompt="{text}: ", labels=("n", "y"), label_norm="tokens"),
        ModerateSettings(
            policies=(Policy(name="a", guideline="No."), Policy(name="b", guideline="Never.")),
            prompt_column="text",
        ),
    ],
    ids=["labels of several tokens", "one token", "policies"],
)
def test_carried_questions_give_the_scores_of_their_row(settings):
    encoders = [
        QuestionEncoder(TOKENIZER, asked, chat_template=None, max_model_len=MAX_MODEL_LEN)
        for asked in settings.questions
    ]
    rows = carried(ROWS, lambda row: [encode(row).identity for encode in encoders])
    classify, session = classifier_of(settings)
    expected = classify(ROWS)
    classify, carried_session = classifier_of(settings)
    assert classify(rows) == expected
    assert carried_session.steps == session.steps
    assert [result["error"] is None for result in expected] == [True, False, True, True]


def test_error_of_a_row_is_carried():
    def encode(row):
        raise RecordError(f"column 'text': {row}")

    (row,) = carried([{"text": "a"}], encode)
    with pytest.raises(RecordError, match=r"column 'text': \{'text': 'a'\}"):
        request_in(row, pytest.fail, pytest.fail)


def test_row_without_a_request_is_encoded():
    assert request_in({"text": "a"}, lambda row: row["text"], pytest.fail) == "a"
    assert request_in("a", str.upper, pytest.fail) == "A"


def test_request_of_a_row_is_json_of_its_identity():
    prompt = Prompt(parts=(), token_ids=(2, 5), truncated=True)
    content = request_of({}, lambda _: prompt.identity)
    assert content == b"[[2, 5], true]"
    assert Prompt.of_identity(json.loads(content)) == prompt
