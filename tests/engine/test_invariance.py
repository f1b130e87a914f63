"""A row's result depends on the row alone: the same tokens, finish reason and bits in any company.

The graphs are real and the conditions those of `benchmarks/invariance.py`, whose record has more
rows of a larger model.
"""

import random
from contextlib import closing

import numpy as np
import pytest

from beam_gemma.engine.engine import Engine
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.sequence import Completion, Request
from beam_gemma.engine.stats import EngineStats
from beam_gemma.runtime.capacity import Capacity
from beam_gemma.runtime.cpu_session import Session
from benchmarks.conditions import CONDITIONS, Condition
from tests.conftest import TinyModel
from tests.doubles.reference import VOCAB

NUM_ROWS = 20
SMALL_CACHE = 24
"""Blocks: little more than the longest row needs."""
ONE_BASE = [name for name in CONDITIONS if name not in ("base", "sampled-base", "two-processes")]


def requests(*, sampled: bool) -> list[Request]:
    """Return prompts of 1 to 230 tokens, a third behind a shared prefix, and uneven completions."""
    rng = np.random.default_rng(11)
    shared = rng.integers(3, VOCAB, 80).tolist()
    draws = [{"top_k": 20}, {"top_p": 0.8}, {}]
    rows = []
    for i in range(NUM_ROWS):
        ids = rng.integers(3, VOCAB, rng.integers(1, 150)).tolist()
        params = SamplingParams(
            max_tokens=int(rng.integers(3, 32)),
            stop_token_ids=tuple(range(i % 4, VOCAB, 4)) if i % 3 else (),
            **({"temperature": 0.9, "seed": 3} | draws[i % 3] if sampled else {}),
        )
        rows.append(
            Request(
                request_id=str(i),
                prompt_token_ids=tuple(shared + ids if i % 3 == 0 else ids),
                params=params,
                sampling_key=str(i),
                logprob=True,
            )
        )
    return rows


def run(
    tiny: TinyModel, condition: Condition, *, small_cache: int = SMALL_CACHE
) -> tuple[list[Completion], EngineStats]:
    """Complete all rows under a condition; completions come in the order of the rows."""
    signature = tiny.artifact.signature("generate", "cpu")
    num_blocks = small_cache if condition.num_blocks else 2000
    session = Session(
        str(tiny.artifact.graph_path("generate", "cpu")),
        signature,
        Capacity(
            num_blocks={s.group: num_blocks for s in signature.paged_states}, num_state_slots=0
        ),
        num_threads=condition.num_threads or 2,
    )
    rows = requests(sampled=condition.sampled)
    order = list(range(NUM_ROWS))
    if condition.shuffled:
        random.Random(1).shuffle(order)
    batches = [[i] for i in order] if condition.alone else [order]
    done = {}
    with closing(Engine(session, condition.config)) as engine:
        for batch in batches:
            done |= zip(batch, engine.generate([rows[i] for i in batch]), strict=True)
        return [done[i] for i in range(NUM_ROWS)], engine.stats


@pytest.fixture(scope="module")
def bases(tiny: TinyModel) -> dict[bool, list[Completion]]:
    """Return the completions of one batch, greedy and sampled."""
    greedy, stats = run(tiny, CONDITIONS["base"])
    assert stats.num_cached_tokens > 0
    assert stats.num_preemptions == 0
    sampled, _ = run(tiny, CONDITIONS["sampled-base"])
    return {False: greedy, True: sampled}


def test_compared_rows_differ_in_tokens_and_finish_reasons(
    bases: dict[bool, list[Completion]],
) -> None:
    for completions in bases.values():
        assert {c.finish_reason for c in completions} == {"stop", "length"}
        assert len({c.token_ids for c in completions}) > NUM_ROWS // 2
        assert len({c.logprob for c in completions}) == NUM_ROWS


@pytest.mark.parametrize("name", ONE_BASE)
def test_rows_are_the_same_in_any_company(
    tiny: TinyModel, bases: dict[bool, list[Completion]], name: str
) -> None:
    condition = CONDITIONS[name]
    completions, stats = run(tiny, condition)
    assert condition.holds(stats), "the run was not what its name says"
    differing = [
        i
        for i, (one, other) in enumerate(zip(completions, bases[condition.sampled], strict=True))
        if one != other
    ]
    assert differing == []
