"""RecurrentGemma from the references to the exported graph: our module, then ONNX Runtime.

There are two references, the original and transformers, which differ in one thing: the original's
windows are one token wider. Every way to run a sequence (alone, packed, in chunks, token by token)
must give the original's distribution at every position.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import pytest
import torch
import transformers

from beam_gemma.model.artifact import Artifact
from beam_gemma.model.graph_tensors import Device, Head
from beam_gemma.model.layer_types import SLIDING
from beam_gemma.runtime.capacity import Capacity
from beam_gemma.runtime.cpu_session import Session
from export.checkpoints.hf_folder import read_checkpoint
from export.checkpoints.tensors import Checkpoint
from export.graph.signatures import decoder_signature
from export.graph.weights import inverse_frequencies
from export.modules.recurrent import RecurrentDecoder
from tests.conftest import SEQUENCE_LENGTHS
from tests.doubles.griffin import griffin_logits, griffin_state
from tests.doubles.ragged import Feeder, Feeds, run_module, run_schedule, schedules
from tests.doubles.recurrent_models import SHAPE, WINDOW, recurrent_model, tiny_recurrent
from tests.doubles.reference import VOCAB, logits_of

SCHEDULES = schedules(SEQUENCE_LENGTHS)


@dataclass(frozen=True)
class Tiny:
    """The tiny model, and what the references make of it; transformers, with wider windows."""

    checkpoint: Checkpoint
    artifact: Artifact
    sequences: list[list[int]]
    logits: list[np.ndarray]
    """Of transformers in float32."""
    exact_logits: list[np.ndarray]
    """Of transformers in float64."""
    original_logits: list[np.ndarray]
    """Of the original in float64."""


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    folder = tiny_recurrent()
    rng = np.random.default_rng(7)
    sequences = [rng.integers(3, VOCAB, n).tolist() for n in SEQUENCE_LENGTHS]
    reference = recurrent_model(WINDOW + 1)
    logits = [logits_of(reference, ids) for ids in sequences]
    return Tiny(
        checkpoint=read_checkpoint(folder / "checkpoint"),
        artifact=Artifact.open(folder / "artifact"),
        sequences=sequences,
        logits=logits,
        exact_logits=[exact(WINDOW + 1, ids) for ids in sequences],
        original_logits=[original(ids) for ids in sequences],
    )


@contextlib.contextmanager
def float64_scan() -> Iterator[None]:
    """Let transformers' recurrence, which is in float32 whatever its inputs are, be in float64."""
    scan = transformers.models.recurrent_gemma.modeling_recurrent_gemma.RecurrentGemmaRglru
    before = scan._rnn_scan.__defaults__
    scan._rnn_scan.__defaults__ = (torch.float64,)
    try:
        yield
    finally:
        scan._rnn_scan.__defaults__ = before


def exact(window: int, ids: list[int]) -> np.ndarray:
    """Return the logits [T, V] of one sequence by transformers in float64."""
    with float64_scan():
        return logits_of(recurrent_model(window).double(), ids)


def original(ids: list[int]) -> np.ndarray:
    """Return the logits [T, V] of one sequence by the original in float64."""
    state = {name: t.double() for name, t in griffin_state(recurrent_model()).items()}
    heads, softcap = SHAPE["num_attention_heads"], SHAPE["logits_soft_cap"]
    logits = griffin_logits(state, ids, num_heads=heads, window=WINDOW, softcap=softcap)
    return logits.numpy()


def decoder(tiny: Tiny, device: Device) -> RecurrentDecoder:
    """Return our module in float64 with the checkpoint's weights."""
    config = tiny.checkpoint.config
    signature = decoder_signature(config, device=device, dtype="float32")
    module = RecurrentDecoder(config, signature)
    state = {}
    for name, stored in tiny.checkpoint.tensors.items():
        values = np.concatenate(list(stored.chunks())).astype(np.float64)
        state[name] = torch.from_numpy(values + (1 if name.endswith("norm.weight") else 0))
    frequencies = inverse_frequencies(config, SLIDING)
    state[f"rotary.{SLIDING}.inv_freq"] = torch.from_numpy(frequencies)
    module = module.double()
    module.load_state_dict(state, strict=True)
    return module.eval()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_module_in_float64_equals_both_references(
    tiny: Tiny, device: Device, schedule: str
) -> None:
    """Both layouts of caches and of gates; float64 leaves no room for a wrong formula."""
    module, steps = decoder(tiny, device), SCHEDULES[schedule]
    # What others have left in a slot is nothing to a new sequence.
    ours = run_module(module, module.signature, steps, tiny.sequences, np.float64, leftovers=True)
    for references in (tiny.exact_logits, tiny.original_logits):
        for got, expected in zip(ours, references, strict=True):
            # float64.
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9)


def test_transformers_with_the_window_of_the_file_differs_beyond_it(tiny: Tiny) -> None:
    """The windows are the original's: a token attends to the WINDOW before it and to itself."""
    for ids, ours in zip(tiny.sequences, tiny.exact_logits, strict=True):
        theirs = exact(WINDOW, ids)
        # float64.
        np.testing.assert_allclose(theirs[:WINDOW], ours[:WINDOW], rtol=0, atol=1e-12)
        if len(ids) > WINDOW:
            assert np.abs(theirs[WINDOW] - ours[WINDOW]).max() > 1e-4


def session_of(tiny: Tiny, feeder: Feeder, num_threads: int = 2) -> Session:
    """Return the graph with as many slots as sequences, which others have left NaN in."""
    signature = tiny.artifact.signature("generate", "cpu")
    session = Session(
        str(tiny.artifact.graph_path("generate", "cpu")),
        signature,
        Capacity(
            num_blocks={s.group: feeder.num_blocks for s in signature.paged_states},
            num_state_slots=len(feeder.past),
        ),
        num_threads=num_threads,
    )
    for name, array in session._state.items():
        if not name.startswith(("key", "value")):
            array[:] = np.nan
    return session


def run_graph(tiny: Tiny, steps: list, *, num_threads: int = 2) -> list[np.ndarray]:
    signature = tiny.artifact.signature("generate", "cpu")
    feeder = Feeder(signature, len(tiny.sequences), max(SEQUENCE_LENGTHS))
    session = session_of(tiny, feeder, num_threads)

    def run(feeds: Feeds) -> np.ndarray:
        logits = session.run(feeds, with_logits=True).logits
        assert logits is not None
        return logits

    return run_schedule(steps, tiny.sequences, feeder, run)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_graph_is_as_exact_as_the_reference(tiny: Tiny, schedule: str) -> None:
    ours = run_graph(tiny, SCHEDULES[schedule])
    our_error, their_error = (
        max(float(np.abs(a - b).max()) for a, b in zip(found, tiny.exact_logits, strict=True))
        for found in (ours, tiny.logits)
    )
    assert our_error <= 2 * their_error, f"{our_error:.2e} against {their_error:.2e}, float32"


@pytest.mark.parametrize("num_threads", [2, 5])
def test_every_way_to_run_a_sequence_gives_the_same_bits(tiny: Tiny, num_threads: int) -> None:
    """Alone with one thread, or in company, in chunks of any size, with several."""
    alone = run_graph(tiny, SCHEDULES["prefill alone"], num_threads=1)
    chunked = [schedules(SEQUENCE_LENGTHS, n)["chunked prefill"] for n in (1, 3, 64)]
    for steps in [*SCHEDULES.values(), *chunked]:
        found = run_graph(tiny, steps, num_threads=num_threads)
        for got, expected in zip(found, alone, strict=True):
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("head", ["generate", "score"])
def test_states_are_written_in_place(tiny: Tiny, head: Head) -> None:
    """A state is given as input and as output, and ONNX Runtime copies it where it is not a
    ScatterND that goes from the one to the other."""
    graph = onnx.load(tiny.artifact.graph_path(head, "cpu"), load_external_data=False).graph
    makers = {name: node for node in graph.node for name in node.output}
    for state in tiny.artifact.signature(head, "cpu").state_tensors():
        if not state.input_name.startswith(("key", "value")):
            maker = makers[state.output_name]
            assert (maker.op_type, maker.input[0]) == ("ScatterND", state.input_name)
            # It is read before it is written: the new rows follow from the old ones.
            readers = [n for n in graph.node if state.input_name in n.input and n is not maker]
            assert [n.op_type for n in readers] == ["Gather"]


def test_nan_in_the_state_of_a_sequence_reaches_no_other(tiny: Tiny) -> None:
    """Not in the scan, which goes on from one sequence to the next, nor in the convolution."""
    signature = tiny.artifact.signature("generate", "cpu")
    feeder = Feeder(signature, len(tiny.sequences), max(SEQUENCE_LENGTHS))
    session = session_of(tiny, feeder)
    rows = {}
    for poisoned in (None, 1):
        feeder.past = [0] * len(tiny.sequences)
        session.run(feeder.feeds([(i, ids[:4]) for i, ids in enumerate(tiny.sequences)]))
        if poisoned is not None:
            slot = len(feeder.past) - 1 - poisoned
            for name, array in session._state.items():
                if not name.startswith(("key", "value")):
                    array[slot] = np.nan
        chunks = [(i, ids[4:9]) for i, ids in enumerate(tiny.sequences)]
        logits = session.run(feeder.feeds(chunks), with_logits=True).logits
        assert logits is not None
        rows[poisoned] = logits.reshape(len(chunks), 5, -1)
    assert np.isnan(rows[1][1]).all()
    np.testing.assert_array_equal(rows[1][[0, 2]], rows[None][[0, 2]])
