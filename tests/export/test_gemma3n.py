"""Gemma 3n from the reference to the exported graph: our module, then ONNX Runtime.

Every way to run a sequence (alone, packed, in chunks, token by token) must give the reference's
distribution at every position. Sequences are longer than the windows, chunks end inside of them,
and layers read caches that earlier ones have written in this step and in others.
"""

import functools

import numpy as np
import onnx
import pytest
import torch

from beam_gemma.model.graph_tensors import Device
from beam_gemma.runtime.capacity import Capacity
from beam_gemma.runtime.cpu_session import Session
from export.modules.altup import merged, spread
from tests.conftest import SEQUENCE_LENGTHS
from tests.doubles.gemma3n_models import (
    HIDDEN,
    MODELS,
    TABLE_ROWS,
    exact_model,
    gemma3n_decoder,
    gemma3n_model,
    sequences,
    tiny_gemma3n,
)
from tests.doubles.op_sessions import session_of
from tests.doubles.ragged import Feeder, Feeds, run_module, run_schedule, schedules
from tests.doubles.reference import logits_of

SCHEDULES = schedules(SEQUENCE_LENGTHS)
ALL = sequences(SEQUENCE_LENGTHS)


@functools.cache
def exact_logits(name: str) -> list[np.ndarray]:
    """Return the logits of each sequence by transformers in float64."""
    model = exact_model(name)
    return [logits_of(model, ids) for ids in ALL]


def largest_error(found: list[np.ndarray], exact: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", MODELS)
def test_module_in_float64_equals_the_reference(name: str, schedule: str, device: Device) -> None:
    """Both cache layouts; float64 leaves no room for a wrong formula."""
    module = gemma3n_decoder(tiny_gemma3n(name).checkpoint, device, torch.float64)
    ours = run_module(module, module.signature, SCHEDULES[schedule], ALL, np.float64)
    for got, expected in zip(ours, exact_logits(name), strict=True):
        # float64.
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9)


def test_ids_beyond_the_table_of_per_layer_embeddings_take_its_first_row() -> None:
    """The reference does so too; ids below the number of rows take their own."""
    assert any(max(ids) >= TABLE_ROWS for ids in ALL)
    module = gemma3n_decoder(tiny_gemma3n("gemma3n").checkpoint, "cpu", torch.float64)
    steps = SCHEDULES["prefill alone"]
    before = run_module(module, module.signature, steps, ALL, np.float64)
    with torch.no_grad():
        module.embed_tokens_per_layer.weight[0] += 1.0
    after = run_module(module, module.signature, steps, ALL, np.float64)
    for ids, one, other in zip(ALL, before, after, strict=True):
        first = next((i for i, token in enumerate(ids) if token >= TABLE_ROWS), len(ids))
        np.testing.assert_array_equal(one[:first], other[:first])
        assert first == len(ids) or np.abs(one[first] - other[first]).max() > 1e-3


def run_graph(name: str, steps: list, *, num_threads: int = 2) -> list[np.ndarray]:
    artifact = tiny_gemma3n(name).artifact
    signature = artifact.signature("generate", "cpu")
    feeder = Feeder(signature, len(ALL), max(SEQUENCE_LENGTHS))
    session = Session(
        str(artifact.graph_path("generate", "cpu")),
        signature,
        Capacity(
            num_blocks={s.group: feeder.num_blocks for s in signature.paged_states},
            num_state_slots=0,
        ),
        num_threads=num_threads,
    )

    def run(feeds: Feeds) -> np.ndarray:
        logits = session.run(feeds, with_logits=True).logits
        assert logits is not None
        return logits

    return run_schedule(steps, ALL, feeder, run)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", MODELS)
def test_graph_is_as_exact_as_the_reference(name: str, schedule: str) -> None:
    reference = tiny_gemma3n(name).reference
    ours = largest_error(run_graph(name, SCHEDULES[schedule]), exact_logits(name))
    theirs = largest_error([logits_of(reference, ids) for ids in ALL], exact_logits(name))
    assert ours <= 2 * theirs, f"{ours:.2e} against {theirs:.2e}, float32"


@pytest.mark.parametrize("num_threads", [2, 5])
@pytest.mark.parametrize("name", MODELS)
def test_every_way_to_run_a_sequence_gives_the_same_bits(name: str, num_threads: int) -> None:
    """Alone with one thread, or in company, in chunks of any size, with several."""
    alone = run_graph(name, SCHEDULES["prefill alone"], num_threads=1)
    chunked = [schedules(SEQUENCE_LENGTHS, n)["chunked prefill"] for n in (1, 3, 64)]
    for steps in [*SCHEDULES.values(), *chunked]:
        found = run_graph(name, steps, num_threads=num_threads)
        for got, expected in zip(found, alone, strict=True):
            np.testing.assert_array_equal(got, expected)


def test_only_layers_with_keys_and_values_have_caches() -> None:
    signature = tiny_gemma3n("gemma3n").artifact.signature("generate", "cpu")
    layers = {state.group: state.layers for state in signature.paged_states}
    assert layers == {"full_attention": (2,), "sliding_attention": (0, 1)}


@pytest.mark.parametrize(
    "setting",
    [
        {"altup_active_idx": 1},
        {"altup_correct_scale": True},
        {"activation_sparsity_pattern": [0.0, 0.0, 0.6]},
        {"sliding_window": 16},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_of_the_tiny_model_make_a_difference(setting: dict) -> None:
    """What these tests compare would not equal the reference with another value."""
    name, ids = "gemma3n_third_stream", ALL[1]
    before, after = (logits_of(gemma3n_model(name, **other), ids) for other in ({}, setting))
    # float32.
    assert np.abs(before - after).max() > 1e-3


def projections(dtype: torch.dtype, gain: float = 1.0) -> list[torch.nn.Linear]:
    torch.manual_seed(0)
    made = [torch.nn.Linear(HIDDEN, HIDDEN, bias=False).to(dtype) for _ in range(2)]
    with torch.no_grad():
        for projection in made:
            projection.weight *= gain
    return made


@torch.no_grad()
def test_streams_start_and_end_with_the_magnitude_of_the_first_one() -> None:
    x = torch.randn(5, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x *= torch.tensor([[1e-3], [1.0], [10.0], [1e3], [0.0]])
    streams = spread(x, projections(torch.float64))
    assert streams.shape == (5, 3, HIDDEN)
    torch.testing.assert_close(streams[:, 0], x, rtol=0, atol=0)
    sizes = streams.pow(2).mean(-1).sqrt()
    # float64; a row of zeros stays one, and one that is projected to less than 1e-5 on average
    # is divided by the root of 1e-5.
    torch.testing.assert_close(sizes[1:, 1:], sizes[1:, :1].expand(-1, 2), rtol=1e-12, atol=0)
    assert (sizes[0, 1:] < 0.5 * sizes[0, :1]).all()
    ends = [x, *(p(streams[:, i]) for i, p in enumerate(projections(torch.float64), 1))]
    least = [e.pow(2).mean(-1, keepdim=True).clamp(min=1e-5).sqrt() for e in ends[1:]]
    scaled = [e * sizes[:, :1] / m for e, m in zip(ends[1:], least, strict=True)]
    expected = torch.stack([x, *scaled]).mean(0)
    # float64.
    found = merged(streams, projections(torch.float64))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


@torch.no_grad()
def test_streams_beyond_float16_are_merged_by_float16_matrices() -> None:
    x = torch.randn(4, 3, HIDDEN, generator=torch.Generator().manual_seed(2)) * 1e5
    found = merged(x, projections(torch.float16))
    assert found.dtype == torch.float32
    expected = merged(x.double(), [p.double() for p in projections(torch.float16)])
    error = (found.double() - expected).abs().max() / expected.abs().max()
    # Products of float16.
    assert error < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_dtypes_are_as_exact_as_the_reference(dtype: torch.dtype) -> None:
    """In bfloat16, constants are rounded as there; sums and means are wider."""
    name, ids = "gemma3n_third_stream", ALL[2]
    module = gemma3n_decoder(tiny_gemma3n(name).checkpoint, "cpu", dtype)
    feeder = Feeder(module.signature, 1, len(ids))
    feeds = {k: torch.from_numpy(v) for k, v in feeder.feeds([(0, ids)]).items()}
    state = {k: torch.from_numpy(v).to(dtype) for k, v in feeder.state().items()}
    with torch.no_grad():
        ours = module(feeds, state)[0]["logits"].double().numpy()
        reference = gemma3n_model(name).to(dtype)
        theirs = reference(torch.tensor([ids]), use_cache=False).logits[0].double().numpy()
    exact = exact_logits(name)[2]
    errors = [float(np.sqrt(np.mean((found - exact) ** 2))) for found in (ours, theirs)]
    assert errors[0] <= 1.2 * errors[1], f"{errors}, {dtype}"


WIDTHS = [2048, 8192, 16384, HIDDEN, 1001]
"""Those of both releases, and some that are no multiple of 8."""


def test_means_of_rows_and_products_of_streams_depend_on_the_row_alone() -> None:
    """What a Gemma 3n has beside products with weights and norms, at the widths of releases."""
    rng = np.random.default_rng(5)
    make = onnx.helper.make_node
    axis = make("Constant", [], ["axis"], value_ints=[1])
    nodes = [axis, make("ReduceMean", ["x", "axis"], ["mean"]), make("MatMul", ["c", "s"], ["y"])]
    for width in WIDTHS:
        x = rng.standard_normal((70, width)).astype(np.float32)
        c = rng.standard_normal((70, 4, 4)).astype(np.float32)
        s = rng.standard_normal((70, 4, width)).astype(np.float32)
        rows = {"x": x, "c": c, "s": s}
        whole: list[np.ndarray] = []
        for num_threads in (1, 2, 5):
            session = session_of(nodes, rows, [], num_threads=num_threads, outputs=["mean", "y"])
            found = session.run(None, rows)
            whole = whole or found
            for start, end in ((0, 70), (0, 1), (3, 4), (69, 70), (5, 7), (1, 18), (31, 64)):
                some = session.run(None, {name: a[start:end] for name, a in rows.items()})
                for got, expected in zip(some, whole, strict=True):
                    np.testing.assert_array_equal(got, expected[start:end])
