"""Streams: each row as soon as it is done, none twice, and no part of one that was given up."""

import threading
import time

import pytest

from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.tasks.generate import GenerateSettings
from beam_gemma.tasks.questions import ClassifySettings
from tests.doubles.fake_models import SIGNATURE, fake_generator, next_letter
from tests.doubles.fakes import FakeSession
from tests.tasks.test_classify import SIGNATURE as SCORE_SIGNATURE
from tests.tasks.test_classify import classifier_of

GENERATE = GenerateSettings(prompt_column="text", sampling=SamplingParams(max_tokens=5))
CLASSIFY = ClassifySettings(prompt_column="text", labels=("yes", "no", "never mind"))
ROWS = [{"text": None if i % 5 == 2 else "ab" * (1 + i % 7)} for i in range(20)]


def generator(session=None):
    session = session or FakeSession(SIGNATURE, num_blocks=2000, next_token=next_letter)
    return fake_generator(GENERATE, session=session, max_num_seqs=2), session


def classifier(session=None):
    session = session or FakeSession(SCORE_SIGNATURE, num_blocks=2000)
    return classifier_of(CLASSIFY, session=session, max_num_seqs=2)


@pytest.mark.parametrize("make", [generator, classifier])
def test_a_stream_holds_the_results_of_a_call(make) -> None:
    model, _ = make()
    called = model(ROWS)
    streamed = list(model.stream(ROWS))
    assert sorted(index for index, _ in streamed) == list(range(len(ROWS)))
    assert all(result == called[index] for index, result in streamed)
    assert model.num_tokens() > 0
    assert list(model.stream([])) == []


@pytest.mark.parametrize("make", [generator, classifier])
def test_rows_come_while_others_are_computed(make) -> None:
    model, session = make()
    run, gate, num_steps = session.run, threading.Event(), len(session.steps)

    def held(feeds, **options):
        assert len(session.steps) < num_steps + 8 or gate.wait(30)
        return run(feeds, **options)

    session.run = held
    rows = [{"text": "ab" * (1 + i)} for i in range(30)]
    stream = model.stream(rows)
    first, _ = next(stream)
    gate.set()
    assert {first, *(index for index, _ in stream)} == set(range(30))


@pytest.mark.parametrize("make", [generator, classifier])
def test_what_is_given_up_is_left_out(make) -> None:
    model, session = make()
    run = session.run

    def slow(feeds, **options):
        time.sleep(0.01)
        return run(feeds, **options)

    session.run = slow
    rows = [{"text": "ab" * (1 + i % 9) + str(i)} for i in range(60)]
    undisturbed, _ = make()
    wanted = undisturbed(rows)
    stream = model.stream(rows)
    come = [next(stream)]
    model.drain()
    come += stream
    assert 0 < len(come) < 60
    assert all(result == wanted[index] for index, result in come)
