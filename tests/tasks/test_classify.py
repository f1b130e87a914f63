"""The classify task on the real engine over a fake model: every row comes back, in order."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_gemma.engine.engine import Engine
from beam_gemma.errors import EngineError
from beam_gemma.model.markup import Text
from beam_gemma.monitoring.progress import METER, Meter
from beam_gemma.runtime.limits import EngineConfig
from beam_gemma.tasks.classify import Classifier
from beam_gemma.tasks.moderate import ModerateSettings, Policy
from beam_gemma.tasks.questions import ClassifySettings, QuestionEncoder, Shot
from tests.doubles.fake_models import STATES, TOKENIZER
from tests.doubles.fakes import FakeSession, fake_signature, logits_of, logsumexp

MAX_MODEL_LEN = 800
SIGNATURE = fake_signature(
    states=STATES,
    optional_inputs=(),
    vocab_size=TOKENIZER.vocab_size,
    max_model_len=MAX_MODEL_LEN,
    head="score",
)


def settings_of(**fields):
    return ClassifySettings(**{"prompt": "{text}: ", "labels": ("no", "yes")} | fields)


def classifier_of(task, *, session=None, on_result=METER.add, **config):
    encoders = [
        QuestionEncoder(TOKENIZER, asked, chat_template=None, max_model_len=MAX_MODEL_LEN)
        for asked in task.questions
    ]
    session = session or FakeSession(SIGNATURE, num_blocks=2000)
    engine = Engine(session, EngineConfig(**config), on_step=on_result)
    return Classifier(engine, encoders, task, on_result=on_result), session


def loglik(prompt, label):
    """Return a label's log-likelihood from the definition alone; its letters stand alone."""
    ids = TOKENIZER.encode([Text(prompt)])
    total = 0.0
    for token in TOKENIZER.encode([Text(label)], add_bos=False):
        logits = logits_of([np.array(ids, np.float64)], 0, TOKENIZER.vocab_size, None)
        total += float(logits[token] - logsumexp(logits[None])[0])
        ids.append(token)
    return total


def test_results_follow_from_the_definition():
    task = settings_of(labels=("no", "my"), logliks=True)
    classify, _ = classifier_of(task)
    rows = [{"text": f"row {i}"} for i in range(20)]
    results = classify(rows)
    for row, result in zip(rows, results, strict=True):
        assert list(result) == task.result_schema.names
        prompt = f"{row['text']}: "
        logliks = [loglik(prompt, label) for label in task.labels]
        # Sums of three logits near 5 in float32.
        assert result["logliks"] == pytest.approx(logliks, abs=1e-5)
        odds = math.exp(logliks[1] - logliks[0])
        assert result["scores"] == pytest.approx([1 / (1 + odds), odds / (1 + odds)], abs=1e-5)
        assert result["label_index"] == int(odds > 1)
        assert result["label"] == task.labels[result["label_index"]]
        assert result["num_prompt_tokens"] == len(TOKENIZER.encode([Text(prompt)]))
        assert result["error"] is None
    assert len({result["label"] for result in results}) == 2


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.text("abn ", min_size=1, max_size=30), min_size=1, max_size=6),
    st.lists(st.text("abn", min_size=1, max_size=4), min_size=2, max_size=5, unique=True),
    st.sampled_from(["none", "tokens", "chars"]),
)
def test_any_labels_of_any_lengths(texts, labels, norm):
    task = settings_of(labels=tuple(labels), label_norm=norm, logliks=True)
    classify, session = classifier_of(task, max_num_seqs=3, max_num_batched_tokens=32)
    for text, result in zip(texts, classify([{"text": text} for text in texts]), strict=True):
        logliks = [loglik(f"{text}: ", label) for label in labels]
        assert result["logliks"] == pytest.approx(logliks, abs=1e-5)
        lengths = [1 if norm == "none" else len(label) for label in labels]
        divided = [x / n for x, n in zip(logliks, lengths, strict=True)]
        assert result["label_index"] in np.flatnonzero(np.array(divided) > max(divided) - 1e-5)
    assert session.faults == []


def test_single_tokens_take_one_step_and_no_normalizer():
    seen = []

    class Watched(FakeSession):
        def run(self, feeds, *, with_logits=False):
            seen.append(feeds)
            return super().run(feeds, with_logits=with_logits)

    rows = [{"text": f"row {i}"} for i in range(5)]
    results = {}
    for logliks in (False, True):
        seen.clear()
        task = settings_of(labels=("n", "y", "m"), logliks=logliks)
        classify, _ = classifier_of(task, session=Watched(SIGNATURE))
        results[logliks] = classify(rows)
        (step,) = seen
        assert len(step["logit_rows"]) == 5
        assert len(step["target_ids"]) == 15
        assert len(step["probability_rows"]) == (5 if logliks else 0)
    for quick, full in zip(results[False], results[True], strict=True):
        assert quick["scores"] == pytest.approx(full["scores"], abs=1e-6)


def test_shots_are_computed_once():
    shots = tuple(Shot(row={"text": "word " * 8}, label=0) for _ in range(4))
    rows = [{"text": f"row {i}"} for i in range(30)]
    classify, _ = classifier_of(settings_of(shots=shots))
    assert {result["error"] for result in classify(rows)} == {None}
    counts = classify.take_counts()
    num_prefix = len(TOKENIZER.encode([Text(("word " * 8 + ": no\n\n") * 4)]))
    assert counts["cached_tokens"] >= 59 * (num_prefix - 16)
    assert classify.take_counts() == {}


def test_rows_keep_their_order_and_bad_ones_their_neighbours():
    rows = [{"text": f"row {i}", "a": "no", "b": "yes"} for i in range(40)]
    rows[7]["text"] = None
    rows[11]["b"] = None
    rows[20]["b"] = "no"
    rows[39]["text"] = "x" * 900
    meter = Meter()
    task = settings_of(labels=("{a}", "{b}"))
    classify, _ = classifier_of(task, on_result=meter.add)
    results = classify(rows)
    assert [i for i, result in enumerate(results) if result["error"]] == [7, 11, 20, 39]
    fixed, _ = classifier_of(settings_of())
    for i in (0, 8, 38):
        assert results[i] == fixed([rows[i]])[0]
    assert results[7] == dict.fromkeys(results[7]) | {"error": results[7]["error"]}
    counted = meter.read()
    assert (counted.rows, counted.failed) == (40, 4)


def test_a_row_that_is_not_finite_fails_once_and_alone():
    poison = TOKENIZER.encode([Text("q")], add_bos=False)[0]
    session = FakeSession(SIGNATURE, num_blocks=2000, poison=("full_attention", poison))
    meter = Meter()
    classify, _ = classifier_of(settings_of(), session=session, on_result=meter.add)
    texts = ["a", "q", "b"]
    results = classify([{"text": text} for text in texts])
    assert [result["error"] is not None for result in results] == [False, True, False]
    assert results[1]["scores"] is None
    assert results[1]["num_prompt_tokens"] == 4
    assert (meter.read().rows, meter.read().failed) == (3, 1)


def test_a_row_is_worth_the_same_alone_in_any_batch_and_order():
    task = settings_of(labels=("{a}", "yes", "m"), logliks=True)
    rows = [{"text": "ab" * (i % 9) + str(i), "a": "n" * (1 + i % 3)} for i in range(40)]
    classify, _ = classifier_of(task)
    together = classify(rows)
    assert [classify([row])[0] for row in rows] == together
    order = random.Random(2).sample(range(40), 40)
    shuffled = classify([rows[i] for i in order])
    assert [shuffled[order.index(i)] for i in range(40)] == together


def test_policies():
    policies = (Policy(name="harassment"), Policy(name="own", guideline="nothing bad"))
    task = ModerateSettings(policies=policies, prompt_column="text", threshold=0.3)
    classify, session = classifier_of(task)
    rows = [{"text": f"row {i}"} for i in range(30)]
    results = classify([*rows, {"text": None}])
    assert session.faults == []
    assert results[-1]["error"] is not None
    assert classify(["a text"])[0]["error"] == "row: expected columns text, got a text"
    assert len({tuple(result["violations"]) for result in results[:-1]}) >= 3
    for row, result in zip(rows, results, strict=False):
        assert list(result) == task.result_schema.names
        prompts = [p.prompt("text", None).format(**row) for p in policies]
        prompts = [TOKENIZER.split(prompt) for prompt in prompts]
        assert result["num_prompt_tokens"] == sum(len(TOKENIZER.encode(p)) for p in prompts)
        wanted = [p.name for p, s in zip(policies, result["scores"], strict=True) if s >= 0.3]
        assert result["violations"] == wanted


def test_engine_that_stops_is_nobodys_row_error():
    session = FakeSession(SIGNATURE)
    session.fails = lambda *_: True
    classify, _ = classifier_of(settings_of(), session=session)
    with pytest.raises(EngineError):
        classify([{"text": "a"}])


def test_no_rows():
    assert classifier_of(settings_of())[0]([]) == []
