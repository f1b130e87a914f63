"""The ladder of T5Gemma and T5Gemma 2: from the reference to our modules, then to ONNX Runtime.

Every way to run a sequence must give the reference's distribution at every position, whatever its
source: shorter than the window, longer, of one token, or shorter than what the decoder starts with.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from beam_gemma.runtime.capacity import Capacity
from beam_gemma.runtime.cpu_session import Session
from export.modules import encoder as encoder_module
from tests.doubles.encoder_decoder_models import (
    ENCODER_WIDTH,
    MODELS,
    VOCAB,
    WINDOWS,
    TinyPair,
    encoder_decoder_outputs,
    source_decoder,
    source_encoder,
    tiny_encoder_decoder,
    tiny_pair,
)
from tests.doubles.ragged import Feeds, run_schedule
from tests.doubles.ragged_sources import SourceFeeder
from tests.doubles.vision_models import END_ID

SOURCE_LENGTHS = (9, 70, 1, 5)
TARGET_LENGTHS = (3, 31, 12, 8)
"""Up to five windows; the last two are longer than their sources."""
WINDOW = WINDOWS["decoder"]
Steps = list[list[tuple[int, int]]]
Outputs = list[tuple[np.ndarray, np.ndarray]]
"""States of the encoder and logits of the decoder for each sequence."""


def sequences(name: str, lengths: Sequence[int], seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    found = [rng.integers(3, VOCAB[name] - 20, n).tolist() for n in lengths]
    for ids in found if name == "t5gemma2" else ():
        if len(ids) > 2:
            ids[2] = END_ID  # whose embedding is a tensor of its own
    return found


def sources(name: str) -> list[list[int]]:
    return sequences(name, SOURCE_LENGTHS, seed=7)


def targets(name: str) -> list[list[int]]:
    return [[2, *ids[1:]] for ids in sequences(name, TARGET_LENGTHS, seed=8)]


@functools.cache
def expected(name: str, dtype: torch.dtype) -> Outputs:
    model = tiny_encoder_decoder(name).to(dtype)
    pairs = zip(sources(name), targets(name), strict=True)
    return [encoder_decoder_outputs(model, source, target) for source, target in pairs]


def schedule(of: Sequence[int], first: int) -> Steps:
    """Return steps of sequences: so many tokens of each at first, then one by one.

    A step of a merged attention has the first tokens up to the window, or one token.
    """
    rest = range(first, max(TARGET_LENGTHS[i] for i in of))
    return [
        [(i, min(first, TARGET_LENGTHS[i])) for i in of],
        *([(i, 1) for i in of if place < TARGET_LENGTHS[i]] for place in rest),
    ]


EVERYONE = range(len(TARGET_LENGTHS))
SCHEDULES: dict[str, Steps] = {
    "token by token": schedule(EVERYONE, 1),
    "first tokens at once": schedule(EVERYONE, WINDOW),
    "each alone": [step for i in EVERYONE for step in schedule([i], WINDOW - 1)],
    "two first tokens, then up to the window": [
        [(1, 2), (3, 2)],
        [(1, WINDOW - 2), (0, 3), (3, WINDOW - 2)],
        [(3, 1), (1, 1), (2, WINDOW)],
        *([(1, 1), (2, 1)] for _ in range(6)),
        *([(1, 1)] for _ in range(18)),
        [(3, 1)],
    ],
}
CHUNKS: Steps = [[(0, 3), (1, 17), (2, 12)], [(1, 14), (3, 8)]]
"""Beyond windows, which only a model without merged attention takes."""


def schedules(name: str) -> dict[str, Steps]:
    return SCHEDULES if name == "t5gemma2" else {**SCHEDULES, "long chunks": CHUNKS}


CASES = [(name, way) for name in MODELS for way in schedules(name)]


def packed(texts: Sequence[list[int]]) -> Feeds:
    ends = np.cumsum([len(ids) for ids in texts])
    ids = np.concatenate(texts).astype(np.int64)
    return {"input_ids": ids, "cu_seqlens": np.array([0, *ends], np.int32)}


def without_pictures(feeds: Feeds, pair: TinyPair, dtype: type = np.float32) -> Feeds:
    """Return the feeds of an encoder, and what one that takes pictures gets without any."""
    if pair.checkpoint.vision is None:
        return feeds
    nothing = {
        "inputs_embeds": np.zeros((1, ENCODER_WIDTH), dtype),
        "embeds_rows": np.full(len(feeds["input_ids"]), -1, np.int64),
    }
    return feeds | nothing


@torch.no_grad()
def encoded(pair: TinyPair, texts: Sequence[list[int]]) -> list[np.ndarray]:
    """Return the states of each text in our encoder in float64."""
    module = source_encoder(pair, torch.float64)
    feeds = without_pictures(packed(texts), pair, np.float64)
    outputs, _ = module({k: torch.from_numpy(v) for k, v in feeds.items()}, {})
    return np.split(outputs["source_states"].numpy(), feeds["cu_seqlens"][1:-1])


def decoded(pair: TinyPair, states: Sequence[np.ndarray], steps: Steps) -> list[np.ndarray]:
    """Return the logits of each sequence in our decoder in float64."""
    module = source_decoder(pair, torch.float64)
    feeder = SourceFeeder(module.signature, states, max(TARGET_LENGTHS))
    state = {name: torch.from_numpy(a) for name, a in feeder.state(np.float64).items()}

    @torch.no_grad()
    def run(feeds: Feeds) -> np.ndarray:
        nonlocal state
        outputs, state = module({k: torch.from_numpy(v) for k, v in feeds.items()}, state)
        return outputs["logits"].numpy()

    return run_schedule(steps, targets(pair.name), feeder, run)


@pytest.mark.parametrize("name", MODELS)
def test_encoder_in_float64_equals_the_reference(name: str) -> None:
    got = encoded(tiny_pair(name), sources(name))
    for ours, (states, _) in zip(got, expected(name, torch.float64), strict=True):
        # float64.
        np.testing.assert_allclose(ours, states, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("name", "way"), CASES)
def test_decoder_in_float64_equals_the_reference(name: str, way: str) -> None:
    """Float64 leaves no room for a wrong formula."""
    exact = expected(name, torch.float64)
    got = decoded(tiny_pair(name), [states for states, _ in exact], schedules(name)[way])
    for ours, (_, logits) in zip(got, exact, strict=True):
        # float64.
        np.testing.assert_allclose(ours, logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize("side", [0, 1], ids=["behind", "ahead"])
@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize("name", ["t5gemma", "t5gemma2"])
def test_an_encoder_window_one_off_on_one_side_shows(
    name: str, change: int, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T5Gemma 2 reaches as far as transformers' mask: fewer tokens behind than ahead."""
    right = encoder_module._WINDOWS[name]

    def wrong(window: int) -> tuple[int, int]:
        reach = list(right(window))
        reach[side] += change
        return reach[0], reach[1]

    monkeypatch.setitem(encoder_module._WINDOWS, name, wrong)
    got = encoded(tiny_pair(name), sources(name))
    exact = expected(name, torch.float64)
    for i in (0, 1):  # float64; the other sources are too short
        assert np.abs(got[i] - exact[i][0]).max() > 1e-3


@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize("name", ["t5gemma", "t5gemma2"])
def test_a_decoder_window_one_off_shows(name: str, change: int) -> None:
    pair = tiny_pair(name)
    config = dataclasses.replace(pair.checkpoint.config, sliding_window=WINDOW + change)
    wrong = dataclasses.replace(
        pair, checkpoint=dataclasses.replace(pair.checkpoint, config=config)
    )
    exact = expected(name, torch.float64)
    got = decoded(wrong, [states for states, _ in exact], SCHEDULES["token by token"])
    for i in (1, 2, 3):  # float64; the first sequence is shorter than the window
        assert np.abs(got[i] - exact[i][1]).max() > 1e-3


def run_encoder(
    pair: TinyPair, texts: Sequence[list[int]], num_threads: int = 1
) -> list[np.ndarray]:
    """Return the states of each text in the exported graph."""
    session = _session(pair, "encode", 1, num_threads)
    feeds = without_pictures(packed(texts), pair)
    states = session._run(feeds, with_logits=False)["source_states"]
    return np.split(states, feeds["cu_seqlens"][1:-1])


def run_decoder(
    pair: TinyPair, states: Sequence[np.ndarray], steps: Steps, num_threads: int = 1
) -> list[np.ndarray]:
    """Return the logits of each sequence in the exported graph."""
    signature = pair.artifact.signature("generate", "cpu")
    feeder = SourceFeeder(signature, states, max(TARGET_LENGTHS))
    session = _session(pair, "generate", feeder.num_blocks, num_threads)
    return run_schedule(
        steps, targets(pair.name), feeder, lambda feeds: session.run(feeds, with_logits=True).logits
    )


def _session(pair: TinyPair, head: str, num_blocks: int, num_threads: int) -> Session:
    signature = pair.artifact.signature(head, "cpu")
    blocks = {state.group: num_blocks for state in signature.paged_states}
    return Session(
        str(pair.artifact.graph_path(head, "cpu")),
        signature,
        Capacity(num_blocks=blocks, num_state_slots=0),
        num_threads=num_threads,
    )


@functools.cache
def graph_states(name: str) -> list[np.ndarray]:
    return run_encoder(tiny_pair(name), sources(name))


def errors(found: Sequence[np.ndarray], exact: Sequence[np.ndarray]) -> list[float]:
    return [float(np.abs(a - b).max()) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("name", MODELS)
def test_encoder_graph_is_as_exact_as_the_reference(name: str) -> None:
    exact = [states for states, _ in expected(name, torch.float64)]
    theirs = errors([states for states, _ in expected(name, torch.float32)], exact)
    # float32: at most twice the reference's error.
    assert max(errors(graph_states(name), exact)) <= 2 * max(theirs)


@pytest.mark.parametrize(("name", "way"), CASES)
def test_decoder_graph_is_as_exact_as_the_reference(name: str, way: str) -> None:
    exact = [logits for _, logits in expected(name, torch.float64)]
    theirs = errors([logits for _, logits in expected(name, torch.float32)], exact)
    got = run_decoder(tiny_pair(name), graph_states(name), schedules(name)[way])
    # float32: at most twice the reference's error.
    assert max(errors(got, exact)) <= 2 * max(theirs)


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_the_logits_of_targets(name: str) -> None:
    """Each token scored after those before it."""
    pair, of_all = tiny_pair(name), targets(name)
    exact = [logits for _, logits in expected(name, torch.float64)]
    theirs = errors([logits for _, logits in expected(name, torch.float32)], exact)
    feeder = SourceFeeder(
        pair.artifact.signature("score", "cpu"), graph_states(name), max(TARGET_LENGTHS)
    )
    session = _session(pair, "score", feeder.num_blocks, 1)
    for i in (0, 3):
        feeds = feeder.feeds([(i, of_all[i][:WINDOW])])
        target_ids = np.array(of_all[i][1 : WINDOW + 1], np.int64)
        rows = np.arange(len(target_ids))
        feeds |= {"target_rows": rows, "target_ids": target_ids}
        scores = session.run(feeds)
        logits = exact[i][rows, target_ids]
        # float32: at most twice the reference's error.
        assert np.abs(scores.target_logits - logits).max() <= 2 * max(theirs)
        top = exact[i][: len(scores.top_logits)].max(axis=1)
        assert np.abs(scores.top_logits - top).max() <= 2 * max(theirs)


@pytest.mark.parametrize("name", ["t5gemma", "t5gemma2"])
def test_bits_of_states_do_not_depend_on_company_or_threads(name: str) -> None:
    pair, texts = tiny_pair(name), sources(name)
    for num_threads in (1, 3):
        for i, text in enumerate(texts):
            [alone] = run_encoder(pair, [text], num_threads)
            # float32, bit for bit.
            np.testing.assert_array_equal(alone, graph_states(name)[i])


@pytest.mark.parametrize("name", ["t5gemma", "t5gemma2"])
def test_bits_of_logits_do_not_depend_on_company_chunks_or_threads(name: str) -> None:
    pair, states = tiny_pair(name), graph_states(name)
    first, *others = (run_decoder(pair, states, steps) for steps in schedules(name).values())
    threaded = run_decoder(pair, states, SCHEDULES["first tokens at once"], num_threads=3)
    for other in (*others, threaded):
        for ours, theirs in zip(first, other, strict=True):
            # float32, bit for bit.
            np.testing.assert_array_equal(ours, theirs)
