"""The engine over graphs for CUDA: parity, windows, reuse, preemption, faults, replays, draws."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch

from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.sequence import Completion, Request
from beam_gemma.errors import DeviceError
from beam_gemma.runtime.bound_graph import UNCAPTURED
from tests.doubles.reference import VOCAB, WINDOW, logits_of
from tests.gpu.conftest import SLOTS, Place, PlaceOf

NEW_TOKENS = 12
RNG = np.random.default_rng(5)
PROMPTS = [RNG.integers(3, VOCAB, n).tolist() for n in (9, 150, 40, 3, 77, 24, 25, 60)]


def request_of(ids: Sequence[int], new: int = NEW_TOKENS, **params: float) -> Request:
    settings = SamplingParams(max_tokens=new, ignore_eos=True, **params)
    key = str(hash(tuple(ids)))
    return Request(
        request_id=key, prompt_token_ids=tuple(ids), params=settings, sampling_key=key, logprob=True
    )


def complete(place: Place, requests: Sequence[Request], session=None, **config) -> list[Completion]:
    with closing(place.engine(session, **config)) as engine:
        return engine.generate(requests)


def results(place: Place, completions: Sequence[Completion]) -> list[tuple]:
    """What must be equal: on a card to the bit; the CPU's sums in these graphs follow the step."""
    assert [c.error for c in completions] == [None] * len(completions)
    if place.is_card:
        return [(c.token_ids, c.logprob.hex()) for c in completions]
    return [(c.token_ids, pytest.approx(c.logprob, rel=1e-3, abs=1e-3)) for c in completions]


def gaps(place: Place, ids: Sequence[int], completion: Completion) -> np.ndarray:
    """How far each chosen token is below the best one, by the reference, of the logits' spread."""
    logits = logits_of(place.reference, [*ids, *completion.token_ids[:-1]])[len(ids) - 1 :]
    chosen = np.take_along_axis(logits, np.array(completion.token_ids)[:, None], axis=1)[:, 0]
    return (logits.max(axis=1) - chosen) / np.linalg.norm(logits, axis=1)


def assert_as_the_reference(place: Place) -> None:
    """Greedy tokens are its likeliest, or as near as logits may be apart; so are probabilities."""
    completions = complete(place, [request_of(ids) for ids in PROMPTS])
    for ids, completion in zip(PROMPTS, completions, strict=True):
        assert len(completion.token_ids) == NEW_TOKENS
        assert gaps(place, ids, completion).max() <= 2 * place.tolerance
        logits = logits_of(place.reference, [*ids, *completion.token_ids[:-1]])[len(ids) - 1 :]
        logprobs = torch.tensor(logits).double().log_softmax(-1).numpy()
        expected = np.take_along_axis(logprobs, np.array(completion.token_ids)[:, None], axis=1)
        assert completion.logprob == pytest.approx(
            expected.sum(), abs=float(NEW_TOKENS * place.tolerance * np.abs(logits).max())
        )


def test_tokens_and_their_probabilities_are_the_reference_s(place: Place) -> None:
    assert_as_the_reference(place)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["gemma", "gemma_mha", "gemma2", "gemma3_text", "vaultgemma"])
def test_every_model_in_either_precision(place_of: PlaceOf, name: str, precision: str) -> None:
    """On a card alone: `tests/export/test_cuda_graphs.py` has them on the host."""
    assert_as_the_reference(place_of("card", name, precision))


@pytest.mark.parametrize("around", [1, 16, WINDOW, 2 * WINDOW, 64, 128])
def test_edges_of_windows_and_blocks(place: Place, around: int) -> None:
    """Prompts that end beside an edge, and completions that go over it."""
    rng = np.random.default_rng(around)
    prompts = [rng.integers(3, VOCAB, max(around + d, 1)).tolist() for d in (-2, -1, 0, 1)]
    for ids, done in zip(prompts, complete(place, list(map(request_of, prompts))), strict=True):
        assert gaps(place, ids, done).max() <= 2 * place.tolerance


def test_a_row_has_the_same_bits_in_any_company(place: Place) -> None:
    requests = [request_of(ids) for ids in PROMPTS]
    together = results(place, complete(place, requests))
    with closing(place.engine()) as engine:
        alone = [results(place, engine.generate([request]))[0] for request in requests]
    backwards = results(place, complete(place, requests[::-1]))[::-1]
    assert alone == together == backwards


def test_reused_prefixes_change_nothing(place: Place) -> None:
    shared = np.random.default_rng(8).integers(3, VOCAB, 100).tolist()
    shared *= 2 if place.artifact.signature("generate", "cuda").block_size > 64 else 1
    requests = [request_of([*shared, *own]) for own in ([5], [6, 7], [8] * 9)]
    with closing(place.engine()) as engine:
        first = results(place, engine.generate(requests))
        again = results(place, engine.generate(requests))
        assert engine.stats.num_cached_tokens > 0
    without = results(place, complete(place, requests, enable_prefix_caching=False))
    assert first == again == without


def test_what_was_pushed_out_comes_back_the_same(place: Place) -> None:
    """Rows that each grow by more blocks than are kept for it."""
    session = place.session()
    size = session.signature.block_size
    new = 2 * size + 12
    rng = np.random.default_rng(9)
    requests = [request_of(rng.integers(3, VOCAB, 50).tolist(), new) for _ in range(SLOTS)]
    roomy = results(place, complete(place, requests, session))
    session = place.session()
    session.num_blocks = dict.fromkeys(session.num_blocks, SLOTS + 3)
    with closing(place.engine(session)) as engine:
        tight = results(place, engine.generate(requests))
        assert engine.stats.num_preemptions > 0
    assert tight == roomy


def test_a_replay_is_what_the_graph_computes(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [request_of(ids) for ids in PROMPTS]
    session = place.session()
    replayed = results(place, complete(place, requests, session))
    assert session.stats().replays > NEW_TOKENS / 2
    session = place.session()
    run = session._graph.run
    monkeypatch.setattr(session._graph, "run", lambda binding, _=0: run(binding, UNCAPTURED))
    assert results(place, complete(place, requests, session)) == replayed


def test_two_steps_in_flight_are_as_one(place: Place) -> None:
    requests = [request_of(ids) for ids in PROMPTS]
    session = place.session()
    assert session.max_steps_in_flight == 2
    two = results(place, complete(place, requests, session))
    session = place.session()
    session.max_steps_in_flight = 1
    assert results(place, complete(place, requests, session)) == two


def test_draws_are_those_of_their_seed_in_any_company(place: Place) -> None:
    params = [
        {"temperature": 60.0, "top_k": 1},
        {"temperature": 60.0, "top_k": 20},
        {"temperature": 60.0, "top_k": 64, "top_p": 0.8},
        {"temperature": 60.0, "top_k": 5, "seed": 3},
    ]
    requests = [request_of(ids, **params[i % 4]) for i, ids in enumerate(PROMPTS)]
    together = results(place, complete(place, requests))
    assert results(place, complete(place, requests[::-1]))[::-1] == together
    # Of one candidate the greedy choice is drawn.
    greedy = results(place, complete(place, [request_of(ids) for ids in PROMPTS]))
    assert [together[i][0] for i in (0, 4)] == [greedy[i][0] for i in (0, 4)]
    assert all(together[i][0] != greedy[i][0] for i in (1, 2, 3, 5, 6, 7))


def test_lack_of_memory_costs_no_row(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [request_of(ids) for ids in PROMPTS]
    expected = [c.token_ids for c in complete(place, requests)]
    session = place.session()
    run, left = session._graph.run, iter([True])

    def fails_once(binding: object, graph_id: int = UNCAPTURED) -> None:
        if next(left, False):
            raise DeviceError("CUDA: cudaErrorMemoryAllocation: out of memory")
        run(binding, graph_id)

    monkeypatch.setattr(session._graph, "run", fails_once)
    completions = complete(place, requests, session)
    assert [c.error for c in completions] == [None] * len(PROMPTS)
    assert [c.token_ids for c in completions] == expected


def test_what_is_not_finite_ends_one_row(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all rows, one whose caches are spoiled; its neighbours see nothing of it."""
    requests = [request_of(ids) for ids in PROMPTS]
    expected = results(place, complete(place, requests))
    session = place.session()
    start = session.start

    def spoiled(feeds, **options):
        pending = start(feeds, **options)
        rows = feeds["input_ids"][feeds["logit_rows"]] if len(feeds["logit_rows"]) else []
        bad = [i for i, token in enumerate(rows) if token == PROMPTS[2][-1]]
        result = pending.result

        def late():
            output = result()
            top = output.top_logits.copy()
            top[bad] = np.nan
            return replace(output, top_logits=top)

        pending.result = late
        return pending

    monkeypatch.setattr(session, "start", spoiled)
    completions = complete(place, requests, session, enable_prefix_caching=False)
    assert "expected finite logits" in completions[2].error
    good = [i for i in range(SLOTS) if i != 2]
    assert results(place, [completions[i] for i in good]) == [expected[i] for i in good]
