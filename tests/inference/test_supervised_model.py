"""Supervision: what is finished is durable, and a job that leads nowhere ends early and cleanly."""

import pickle
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.errors import BudgetError, EngineError, FailuresError, OptionsError, StorageError
from beam_gemma.inference import saved_results
from beam_gemma.inference.rows import rows_of
from beam_gemma.inference.supervised_model import MIN_ROWS, SupervisedModel, Supervision
from beam_gemma.tasks.generate import GenerateSettings
from beam_gemma.tasks.row_keys import KEY_BYTES, REQUEST_KEY
from tests.doubles.fake_models import (
    SIGNATURE,
    FakeHandler,
    completion_of,
    fake_generator,
    next_letter,
)
from tests.doubles.fakes import FakeSession

SETTINGS = GenerateSettings(prompt_column="text", sampling=SamplingParams(max_tokens=3))
SLOTS = 4


def key_of(number: int) -> bytes:
    return number.to_bytes(KEY_BYTES, "big")


def rows(texts, start=0):
    keys = [key_of(start + number) for number in range(len(texts))]
    batch = pa.record_batch(
        {REQUEST_KEY: pa.array(keys, pa.binary(KEY_BYTES)), "text": pa.array(texts, pa.string())}
    )
    return rows_of(batch)


def texts_of(number):
    return [f"row {i}" for i in range(number)]


def supervised(folder: Path, *, session=None, max_tokens=3, **limits):
    settings = replace(SETTINGS, sampling=SamplingParams(max_tokens=max_tokens))
    model = fake_generator(settings, session=session, max_num_seqs=SLOTS)
    supervision = Supervision(pieces=str(folder), **limits)
    return SupervisedModel(model, supervision, settings.result_schema)


def durable(folder: Path):
    return saved_results.merge(
        map(saved_results.read_piece, saved_results.list_pieces(str(folder)))
    )


class UnhurriedSession(FakeSession):
    """Takes longer for a step than anybody for its results, as a model does."""

    def run(self, feeds, *, with_logits=False):
        time.sleep(0.005)
        return super().run(feeds, with_logits=with_logits)


def test_results_are_durable_when_they_are_returned(tmp_path: Path) -> None:
    model = supervised(tmp_path)
    results = model(rows(["a", None, "bc", "a"]))
    wanted = [completion_of("a"), None, completion_of("bc"), completion_of("a")]
    assert [result["completion"] for result in results] == wanted
    assert durable(tmp_path) == {key_of(i): results[i] for i in (0, 2, 3)}
    assert model.take_counts()["decode_rows"] == 6
    assert model.take_pulse()


def test_results_are_durable_while_others_are_computed(tmp_path: Path) -> None:
    """A kill at any time would leave all but a few of the rows that had come to their end."""
    session = FakeSession(SIGNATURE, num_blocks=2000, next_token=next_letter)
    model = supervised(tmp_path, session=session)
    run = session.run

    def slowed(feeds, **options):
        if len(session.steps) == 240:  # of some 300
            time.sleep(0.5)
            seen.append(len(durable(tmp_path)))
        return run(feeds, **options)

    seen: list[int] = []
    session.run = slowed
    model(rows(texts_of(400)))
    assert 300 - 16 - 2 * SLOTS <= seen[0] <= 330


def test_the_budget_of_tokens(tmp_path: Path) -> None:
    """What has begun is finished and kept, nothing begins after, and the rest can go on."""
    session = UnhurriedSession(SIGNATURE, num_blocks=2000, next_token=next_letter)
    model = supervised(tmp_path, session=session, max_cost_tokens=300)
    asked = rows(texts_of(100))
    with pytest.raises(BudgetError, match=r"expected to do with 300 tokens, got (\d+) for") as told:
        model(asked)
    kept = durable(tmp_path)
    assert 0 < len(kept) < 100
    for key, result in kept.items():
        assert result["completion"] == completion_of(f"row {int.from_bytes(key, 'big')}")
    tokens = sum(r["num_prompt_tokens"] + r["num_completion_tokens"] for r in kept.values())
    longest = max(r["num_prompt_tokens"] + r["num_completion_tokens"] for r in kept.values())
    # Nothing that was computed is lost.
    assert str(tokens) in str(told.value).replace(",", "")
    assert 300 <= tokens <= 300 + 2 * SLOTS * longest
    assert f" {len(kept)} requests" in str(told.value)
    num_steps = len(session.steps)
    with pytest.raises(BudgetError):
        model(asked)
    assert len(session.steps) == num_steps
    rest = [row for row in asked if row[REQUEST_KEY] not in kept]
    supervised(tmp_path)(rest)
    assert len(durable(tmp_path)) == 100


def test_a_budget_that_is_just_enough_stops_nothing(tmp_path: Path) -> None:
    model = supervised(tmp_path, max_cost_tokens=8)
    assert len(model(rows(["a"]))) == 1
    model = supervised(tmp_path, max_cost_tokens=5)
    assert len(model(rows(["a"]))) == 1
    with pytest.raises(BudgetError):
        model(rows(["b"]))


def test_every_caller_hears_of_a_spent_budget(tmp_path: Path) -> None:
    model = supervised(tmp_path, max_cost_tokens=500)

    def call(caller: int):
        try:
            model(rows(texts_of(200), start=200 * caller))
        except BudgetError as error:
            return error
        return None

    with ThreadPoolExecutor(4) as pool:
        errors = list(pool.map(call, range(4)))
    assert all(isinstance(error, BudgetError) for error in errors)


def test_a_job_that_fails_wholesale_is_stopped_with_the_reasons(tmp_path: Path) -> None:
    session = UnhurriedSession(SIGNATURE, num_blocks=2000, next_token=next_letter)
    model = supervised(tmp_path, session=session, max_error_fraction=0.1)
    texts = [None if i % 3 else f"row {i}" for i in range(600)]
    texts[:7] = ["x" * (300 + i) for i in range(7)]
    with pytest.raises(FailuresError) as told:
        model(rows(texts))
    assert "at most 0.1 of them to fail, got " in str(told.value)
    assert " of the first 600: " in str(told.value)
    assert reasons(told.value)[0] > reasons(told.value)[1] == 7
    assert "7 x prompt: expected at most N tokens" in str(told.value)
    assert len(session.steps) < 600 / 3 / SLOTS
    with pytest.raises(FailuresError):
        model(rows(["a"]))


def reasons(error: FailuresError) -> list[int]:
    """Return how many rows each reason has."""
    return [int(number) for number in re.findall(r"(\d+) x ", str(error))]


def test_few_failures_among_many_rows_stop_nothing(tmp_path: Path) -> None:
    """Although they are known before any row is computed."""
    model = supervised(tmp_path, max_error_fraction=0.1)
    texts = [None if i % 11 == 5 else f"row {i}" for i in range(330)]
    results = model(rows(texts))
    assert [r["error"] is not None for r in results] == [text is None for text in texts]
    assert supervised(tmp_path, max_error_fraction=0.5)(rows([None] * (MIN_ROWS // 2)))


def test_failed_rows_are_not_durable(tmp_path: Path) -> None:
    supervised(tmp_path)(rows([None, "x" * 1000]))
    assert durable(tmp_path) == {}


def test_an_engine_that_stops_leaves_what_was_done(tmp_path: Path) -> None:
    session = FakeSession(SIGNATURE, num_blocks=2000, next_token=next_letter)
    session.fails = lambda step, _: step > 20
    model = supervised(tmp_path, session=session)
    with pytest.raises(EngineError, match="the device is gone"):
        model(rows(texts_of(100)))
    assert 10 <= len(durable(tmp_path)) < 100


def test_storage_that_fails_is_the_error_of_the_call(tmp_path: Path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise StorageError("no space")

    monkeypatch.setattr(saved_results, "write_once", full)
    with pytest.raises(StorageError, match="no space"):
        supervised(tmp_path)(rows(texts_of(40)))


def test_a_handler_brings_its_supervision_along(tmp_path: Path) -> None:
    handler = FakeHandler(SETTINGS)
    handler.supervise(Supervision(pieces=str(tmp_path)))
    handler = pickle.loads(pickle.dumps(handler))
    batch = pa.record_batch({REQUEST_KEY: pa.array([key_of(1)]), "text": ["a"]})
    (result,) = handler.run_inference([batch], handler.load_model())
    assert result.inference.column("completion").to_pylist() == [completion_of("a")]
    assert list(durable(tmp_path)) == [key_of(1)]


@pytest.mark.parametrize("wrong", [{"max_error_fraction": 1.5}, {"max_cost_tokens": 0}])
def test_impossible_limits_are_refused(wrong) -> None:
    with pytest.raises(OptionsError, match=next(iter(wrong))):
        Supervision(pieces="pieces", **wrong)


def test_callers_share_one_model(tmp_path: Path) -> None:
    model = supervised(tmp_path)
    barrier = threading.Barrier(4)

    def call(caller: int):
        barrier.wait(10)
        return model(rows(texts_of(50), start=50 * caller))

    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(call, range(4)))
    assert all(len(part) == 50 for part in parts)
    assert len(durable(tmp_path)) == 200
