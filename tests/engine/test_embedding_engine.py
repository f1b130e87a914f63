"""Steps over whole texts: packing, failures that end one text alone, devices that are dead."""

from collections.abc import Callable, Mapping
from operator import itemgetter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_gemma.engine.embedding_engine import EmbeddingSteps, Result, check_sight
from beam_gemma.errors import ArtifactError, EngineError
from beam_gemma.model.signature import Signature
from beam_gemma.runtime.step_interface import EmbedOutput

BAD = 13
EMBEDS = Signature(
    head="embed",
    device="cpu",
    dtype="float32",
    vocab_size=100,
    hidden_size=1,
    max_model_len=100,
    states=(),
    embedding_size=1,
)


class FakeSession:
    """Embeds a text as its length; a step with `BAD` in it fails, or all of them do."""

    signature = EMBEDS

    def __init__(self, *, is_two_sided: bool = True, is_dead: bool = False) -> None:
        self.steps: list[list[list[int]]] = []
        self.is_two_sided = is_two_sided
        self.is_dead = is_dead

    def embed(self, feeds: Mapping[str, np.ndarray]) -> EmbedOutput:
        texts = [t.tolist() for t in np.split(feeds["input_ids"], feeds["cu_seqlens"][1:-1])]
        self.steps.append(texts)
        if self.is_dead or BAD in feeds["input_ids"]:
            raise MemoryError("too much")
        seen = [sum(text) if self.is_two_sided else text[0] for text in texts]
        return EmbedOutput(
            np.array([[len(text)] for text in texts], np.float32),
            np.array([[value] for value in seen], np.float32),
        )


def steps(session: FakeSession, budget: int = 10) -> Callable[[list[list[int]]], list[Result]]:
    """Return what embeds texts and gives the results in their order."""
    task = EmbeddingSteps(session, max_num_batched_tokens=budget, on_step=lambda _: None)
    return lambda texts: [result for _, result in sorted(task(texts), key=itemgetter(0))]


@given(lengths=st.lists(st.integers(1, 30), max_size=40), budget=st.integers(1, 40))
def test_steps_keep_to_their_tokens_and_results_to_their_rows(
    lengths: list[int], budget: int
) -> None:
    session = FakeSession()
    results = steps(session, budget)([[1] * n for n in lengths])
    assert [float(result[0]) for result in results] == lengths
    for step in session.steps:
        assert len(step) == 1 or sum(map(len, step)) <= budget
    packed = [len(text) for step in session.steps for text in step]
    assert packed == sorted(lengths, reverse=True)


def test_a_text_that_fails_ends_alone_and_is_tried_twice() -> None:
    session = FakeSession()
    results = steps(session)([[1], [1, BAD], [1, 1, 1]])
    assert [isinstance(result, str) for result in results] == [False, True, False]
    assert results[1] == "model: expected an embedding, got twice MemoryError: too much"
    assert session.steps.count([[1, BAD]]) == 2


def test_texts_that_fail_among_others_are_not_the_device() -> None:
    texts = [[1, BAD] if i % 2 else [1, 1] for i in range(20)]
    results = steps(FakeSession(), budget=100)(texts)
    assert [isinstance(result, str) for result in results] == [bool(i % 2) for i in range(20)]


def test_a_dead_device_stops_the_engine() -> None:
    with pytest.raises(EngineError, match="3 texts failed one after another"):
        steps(FakeSession(is_dead=True))([[1]] * 8)
    one_at_a_time = steps(FakeSession(is_dead=True))
    assert isinstance(one_at_a_time([[1]])[0], str)
    assert isinstance(one_at_a_time([[1]])[0], str)
    with pytest.raises(EngineError):
        one_at_a_time([[1]])


def test_tokens_of_steps_are_counted() -> None:
    counted: list[int] = []
    task = EmbeddingSteps(FakeSession(), max_num_batched_tokens=4, on_step=counted.append)
    assert len(dict(task([[1, 1], [1], [1, 1, 1]]))) == 3
    assert counted == [3, 3]
    assert task.num_tokens == 6


def test_drain_ends_with_the_step_that_runs() -> None:
    session = FakeSession()
    task = EmbeddingSteps(session, max_num_batched_tokens=4, on_step=lambda _: None)
    stream = task([[1], [1, 1], [1, 1], [1, 1]])
    first, _ = next(stream)
    task.drain()
    assert [first, *(index for index, _ in stream)] == [1, 2]
    assert session.steps == [[[1, 1], [1, 1]]]


def test_no_texts_need_no_step() -> None:
    session = FakeSession()
    assert steps(session)([]) == []
    assert session.steps == []


@pytest.mark.parametrize("is_two_sided", [False, True])
def test_a_graph_of_the_wrong_attention_is_refused(is_two_sided: bool) -> None:
    session = FakeSession(is_two_sided=is_two_sided)
    check_sight(session, [5, 6, 7], is_two_sided=is_two_sided)
    with pytest.raises(ArtifactError, match=r"graph: expected (causal|two-sided) attention"):
        check_sight(session, [5, 6, 7], is_two_sided=not is_two_sided)


def test_steps_have_no_more_texts_than_they_may():
    counted = []
    task = EmbeddingSteps(
        FakeSession(), max_num_batched_tokens=100, max_num_seqs=2, on_step=counted.append
    )
    assert len(list(task([[1], [2, 3], [4], [5], [6]]))) == 5
    assert counted == [3, 2, 1]
