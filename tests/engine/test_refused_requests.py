"""Requests that a scheduler refuses, each with a message that says why, and those at the limits."""

from dataclasses import replace

import pytest

from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.sequence import Request
from beam_gemma.errors import PromptTooLongError, RecordError
from beam_gemma.structured.constraint import Constraint
from tests.engine.test_scheduler import make_request, make_scheduler


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (make_request(0), RecordError, "^prompt: expected at least one token, got none$"),
        (make_request(996, 5), PromptTooLongError, "prompt of 996 tokens.*at most 1,000.*1,001"),
        (make_request(200, 58), PromptTooLongError, "17 cache blocks of full, the cache has 16"),
        (
            make_request(200, spans=((10, 111),)),
            PromptTooLongError,
            "at most 100 that attend in both directions, got 101; .*--max_num_batched_tokens 101",
        ),
    ],
)
def test_a_request_that_could_never_run_is_refused(request_, error, message):
    scheduler = make_scheduler(num_blocks=17)
    with pytest.raises(error, match=message):
        scheduler.check(request_)


def test_a_request_that_just_fits_is_not_refused():
    scheduler = make_scheduler(num_blocks=17)
    scheduler.check(make_request(200, 57))
    scheduler.check(make_request(200, spans=((10, 110),)))
    make_scheduler().check(make_request(995, 5))
    for token in (0, 96):
        make_scheduler().check(make_request(5, token=token))


@pytest.mark.parametrize("token", [-1, 97])
def test_a_token_that_the_model_lacks_is_refused(token):
    request = Request(
        request_id="r", prompt_token_ids=(3, token), params=SamplingParams(max_tokens=1)
    )
    with pytest.raises(RecordError, match=f"ids from 0 to 96, got .*{token}"):
        make_scheduler().check(request)


def test_spans_are_refused_where_the_model_takes_none():
    with pytest.raises(
        RecordError, match=r"^spans: expected none, since the model attends one way"
    ):
        make_scheduler(optional_inputs=()).check(make_request(20, spans=((0, 10),)))


class TooShort(Constraint):
    def __init__(self) -> None: ...

    def shortage(self, max_tokens: int) -> str:
        return f"schema: needs more than {max_tokens} tokens"


def test_a_constraint_that_needs_more_tokens_is_refused():
    request = replace(make_request(20, 7), constraint=TooShort())
    with pytest.raises(RecordError, match=r"^schema: needs more than 7 tokens$"):
        make_scheduler().check(request)


def score_request(*token_ids):
    targets = tuple((1, token_id) for token_id in token_ids)
    return Request(
        request_id="r",
        prompt_token_ids=(3, 4),
        params=SamplingParams(max_tokens=1),
        targets=targets,
    )


@pytest.mark.parametrize(
    ("head", "token_ids", "message"),
    [
        ("score", (), "targets: expected some for the head score, got 0"),
        ("generate", (5, 6), "targets: expected none for the head generate, got 2"),
        ("score", (5, -1), "targets: expected token ids from 0 to 96, got -1"),
        ("score", (97, 5), "targets: expected token ids from 0 to 96, got 97"),
    ],
)
def test_targets_that_the_model_cannot_score_are_refused(head, token_ids, message):
    with pytest.raises(RecordError, match=f"^{message}$"):
        make_scheduler(head=head).check(score_request(*token_ids))


def test_targets_of_the_first_and_the_last_token_id_are_not_refused():
    make_scheduler(head="score").check(score_request(0, 96))
