"""The generate task: every row comes back, in order, and is worth the same in any company."""

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.errors import EngineError, OptionsError
from beam_gemma.monitoring.progress import Count, Meter
from beam_gemma.tasks.generate import GenerateSettings
from tests.doubles.fake_models import (
    STATES,
    TOKENIZER,
    completion_of,
    fake_generator,
    next_letter,
)
from tests.doubles.fakes import FakeSession, fake_signature


def settings_of(max_tokens=3, **fields):
    sampling = SamplingParams(max_tokens=max_tokens, **fields.pop("sampling", {}))
    return GenerateSettings(sampling=sampling, **({"prompt_column": "text"} | fields))


def session_that_says(text):
    """Return a session that completes any prompt with a text or bytes, one by one, then ends."""
    data = text if isinstance(text, bytes) else text.encode()
    ids = [*map(byte_id, data), TOKENIZER.eos_token_id]
    prompt_length = None

    def next_token(tokens):
        nonlocal prompt_length
        prompt_length = prompt_length or len(tokens)
        return ids[len(tokens) - prompt_length]

    signature = fake_signature(
        states=STATES, optional_inputs=(), vocab_size=TOKENIZER.vocab_size, max_model_len=200
    )
    return FakeSession(signature, num_blocks=100, next_token=next_token)


def byte_id(byte):
    return next(i for i in range(TOKENIZER.vocab_size) if TOKENIZER.token_bytes(i) == bytes([byte]))


def test_statistics_of_a_completion_are_columns():
    text = 'of [__DC__("how many?") --> "39"] people'
    session = session_that_says(text)
    (result,) = fake_generator(settings_of(100, statistics=True), session=session)([{"text": "a"}])
    assert result["completion"] == text
    assert (result["statistic_queries"], result["statistic_values"]) == (["how many?"], ["39"])
    (failed,) = fake_generator(settings_of(statistics=True))([{"text": None}])
    assert failed["statistic_queries"] is None


def test_result_columns():
    generate = fake_generator(settings_of(logprob=True, token_ids=True, truncate="left"))
    (result,) = generate([{"text": "abc"}])
    settings = settings_of(logprob=True, token_ids=True, truncate="left")
    assert list(result) == settings.result_schema.names
    assert result["completion"] == completion_of("abc")
    assert result["finish_reason"] == "length"
    assert result["num_prompt_tokens"] == 4
    assert result["num_completion_tokens"] == 3
    assert TOKENIZER.decode(result["completion_token_ids"]) == result["completion"]
    assert -1e-3 < result["logprob"] <= 0
    assert result["truncated"] is False
    assert result["error"] is None
    assert list(fake_generator(settings_of())(["abc"])[0]) == settings_of().result_schema.names


def test_rows_keep_their_order_and_bad_ones_their_neighbours():
    rows = [{"text": f"row {i}"} for i in range(100)]
    rows[17] = {"text": None}
    rows[42] = {"other": "x"}
    rows[99] = {"text": "x" * 300}
    results = fake_generator(settings_of())(rows)
    assert [i for i, r in enumerate(results) if r["error"]] == [17, 42, 99]
    for i, result in enumerate(results):
        if i in (17, 42, 99):
            assert result["completion"] is result["finish_reason"] is None
        else:
            assert result["completion"] == completion_of(f"row {i}")
    assert "at most 197 tokens, got 301" in results[99]["error"]


def test_no_rows():
    assert fake_generator(settings_of())([]) == []


@pytest.mark.parametrize(
    ("stop", "completion"),
    [
        (("lo wo",), "hel"),
        (("ld", "o"), "hell"),
        (("world", "hello w"), ""),
        (("h",), ""),
        (("d",), "hello worl"),
        (("xyz",), "hello world"),
        (("wor", "o w"), "hell"),
    ],
)
def test_stop_texts_end_a_completion_and_are_no_part_of_it(stop, completion):
    generate = fake_generator(settings_of(50, stop=stop), session=session_that_says("hello world"))
    (result,) = generate([{"text": "abc"}])
    assert result["completion"] == completion
    assert result["finish_reason"] == "stop"


def test_stop_text_of_several_bytes_a_character():
    generate = fake_generator(settings_of(50, stop=("ü",)), session=session_that_says("aéüz"))
    (result,) = generate([{"text": "abc"}])
    assert result["completion"] == "aé"
    assert result["num_completion_tokens"] == 5


@pytest.mark.parametrize(
    ("max_tokens", "completion"),
    [(1, "a"), (3, "a"), (4, "a€"), (7, "a€"), (8, "a€😀"), (9, "a€😀\ufffd"), (11, "a€😀\ufffd")],
)
def test_a_completion_has_no_part_of_a_character_at_its_end(max_tokens, completion):
    """All of its tokens are counted. The model may write the replacement character itself."""
    said = "a€😀".encode() + b"\xff" + b"\xe2\x82"
    for settings in ({}, {"stop": ("xyz",)}):
        generate = fake_generator(
            settings_of(max_tokens, token_ids=True, **settings), session=session_that_says(said)
        )
        (result,) = generate([{"text": "abc"}])
        assert result["completion"] == completion
        assert result["num_completion_tokens"] == len(result["completion_token_ids"])
        assert result["num_completion_tokens"] == max_tokens


def test_conversations_of_parts_and_a_beginning_of_the_answer_are_completed():
    settings = settings_of(prompt_column=None, messages_column="chat", chat_template="gemma")
    parts = [{"type": "text", "text": "hi", "image": None}]
    chats = [
        [{"role": "user", "content": content}, {"role": role, "content": "The"}]
        for content in ("hi", parts)
        for role in ("assistant", "model")
    ]
    results = fake_generator(settings)([{"chat": chat} for chat in chats])
    prompt = "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\nThe"
    ids = TOKENIZER.encode(TOKENIZER.split(prompt))
    assert [r["error"] for r in results] == [None] * 4
    assert {r["num_prompt_tokens"] for r in results} == {len(ids)}
    assert len({r["completion"] for r in results}) == 1


def test_end_token_ends_unless_it_is_ignored():
    generate = fake_generator(settings_of(50), session=session_that_says("hi"))
    (result,) = generate([{"text": "abc"}])
    assert (result["completion"], result["finish_reason"]) == ("hi", "stop")
    generate = fake_generator(
        settings_of(3, sampling={"ignore_eos": True}), session=session_that_says("hi")
    )
    (result,) = generate([{"text": "abc"}])
    assert (result["completion"], result["finish_reason"]) == ("hi", "length")


def test_draws_depend_on_the_key_or_else_on_the_prompt():
    settings = settings_of(8, sampling={"temperature": 5.0, "seed": 1}, key_column="id")
    session = FakeSession(
        fake_signature(
            states=STATES, optional_inputs=(), vocab_size=TOKENIZER.vocab_size, max_model_len=200
        )
    )
    generate = fake_generator(settings, session=session)
    rows = [{"id": i, "text": text} for i, text in ((1, "a"), (2, "a"), (None, "a"), (None, "a"))]
    one, two, three, four = (result["completion"] for result in generate(rows))
    assert one != two
    assert three == four
    assert [r["completion"] for r in generate(rows[::-1])] == [four, three, two, one]


def test_missing_key_is_the_error_of_its_row():
    results = fake_generator(settings_of(key_column="id"))([{"text": "a"}, {"text": "b", "id": 1}])
    assert "'id'" in results[0]["error"]
    assert results[1]["error"] is None


def test_a_row_is_worth_the_same_alone_in_any_batch_and_order_and_beside_other_callers():
    settings = settings_of(8, sampling={"temperature": 1.5, "top_k": 20})
    session = FakeSession(
        fake_signature(
            states=STATES, optional_inputs=(), vocab_size=TOKENIZER.vocab_size, max_model_len=200
        )
    )
    generate = fake_generator(settings, session=session)
    rows = [{"text": "ab" * (i % 30) + str(i)} for i in range(60)]
    together = generate(rows)
    assert [generate([row])[0] for row in rows[:10]] == together[:10]
    order = list(range(60))
    random.Random(5).shuffle(order)
    shuffled = generate([rows[i] for i in order])
    assert [shuffled[order.index(i)] for i in range(60)] == together
    with ThreadPoolExecutor(4) as pool:
        parts = pool.map(generate, [rows[i::4] for i in range(4)])
        assert list(parts) == [together[i::4] for i in range(4)]


def test_results_are_counted_as_they_come():
    meter = Meter()
    generate = fake_generator(settings_of(), on_result=meter.add)
    generate([{"text": "abc"}, {"text": None}, {"text": "de"}])
    assert meter.read() == Count(rows=3, failed=1, prompt_tokens=7, completion_tokens=6)


def test_samples_of_the_engine():
    generate = fake_generator(settings_of(4), max_num_seqs=2)
    generate([{"text": "a"}, {"text": "b"}, {"text": "c"}])
    samples = generate.take_pulse()["samples"]
    # Tokens of prompts, computed and cached, of completions, and slots of decode steps: used, all.
    assert [samples[0][1:6], samples[-1][1:6]] == [(0, 0, 0, 0, 0), (3 * 2, 0, 12, 9, 12)]


def test_every_count_of_the_engine_is_given_once():
    generate = fake_generator(settings_of(4), max_num_seqs=2)
    assert generate.take_counts() == {}
    generate([{"text": "a"}, {"text": "b"}, {"text": "c"}])
    counts = generate.take_counts()
    assert 0 < counts.pop("used_cache") < counts.pop("cache")
    # The first token of each row is its prefill step's; the third row waits for the others.
    assert counts == {
        "decode_rows": 9, "decode_slots": 12, "backlog_decode_rows": 6, "backlog_decode_slots": 6
    }  # fmt: skip
    assert generate.take_counts() == {}
    rows = [{"text": f"row {i}"} for i in range(20)]

    def complete_and_take(part):
        generate(part)
        return Counter(generate.take_counts())

    with ThreadPoolExecutor(4) as pool:
        taken = sum(pool.map(complete_and_take, [rows[i::4] for i in range(4)]), Counter())
    assert taken["decode_rows"] == 3 * 20


def test_engine_that_stops_is_nobodys_row_error():
    signature = fake_signature(
        states=STATES, optional_inputs=(), vocab_size=TOKENIZER.vocab_size, max_model_len=200
    )
    session = FakeSession(signature, next_token=next_letter)
    session.fails = lambda *_: True
    with pytest.raises(EngineError):
        fake_generator(settings_of(), session=session)([{"text": "a"}])


def test_settings_are_checked():
    with pytest.raises(OptionsError, match="empty"):
        GenerateSettings(stop=("a", ""))
    with pytest.raises(OptionsError, match="one source"):
        GenerateSettings(prompt="x", prompt_column="y")
    with pytest.raises(OptionsError, match="less than the 200 tokens"):
        settings_of(max_tokens=200).max_prompt(200)
    assert settings_of(max_tokens=199).max_prompt(200) == 1
