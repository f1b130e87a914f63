"""The session: capacity, refusals, and blocks that are really zeroed."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from beam_gemma.errors import ArtifactError, OptionsError
from beam_gemma.runtime.capacity import Capacity, block_bytes, plan_capacity
from beam_gemma.runtime.cpu_session import Session
from beam_gemma.runtime.devices import has_device, require_device
from tests.conftest import TinyModel
from tests.doubles.ragged import Feeder


def open_session(tiny: TinyModel, num_blocks: int = 60, **changes: object) -> Session:
    signature = dataclasses.replace(tiny.artifact.signature("generate", "cpu"), **changes)
    capacity = Capacity(
        num_blocks={s.group: num_blocks for s in signature.paged_states}, num_state_slots=0
    )
    path = str(tiny.artifact.graph_path("generate", "cpu"))
    return Session(path, signature, capacity, num_threads=1)


def test_a_nan_does_not_outlive_its_row(tiny_gemma3: TinyModel) -> None:
    """0 * NaN is NaN: the next user of a block that held one must find zeros."""
    session = open_session(tiny_gemma3)
    feeder = Feeder(session.signature, num_seqs=2, max_length=40)
    ids = tiny_gemma3.sequences[2]
    clean = session.run(feeder.feeds([(0, ids)])).top_probability
    blocks = sorted(set(feeder.tables[0].tolist()))
    for name, array in session._state.items():
        if name.startswith("value"):
            array[:, blocks] = np.nan
    feeder.past[0] = 0
    assert np.isnan(session.run(feeder.feeds([(0, ids)])).top_probability).any()
    for state in session.signature.paged_states:
        session.zero_blocks(state.group, blocks)
    feeder.past[0] = 0
    np.testing.assert_array_equal(session.run(feeder.feeds([(0, ids)])).top_probability, clean)


def test_logits_come_only_when_asked_for(tiny_gemma3: TinyModel) -> None:
    session = open_session(tiny_gemma3)
    feeder = Feeder(session.signature, num_seqs=3, max_length=150)
    for count in (1, 3):  # other shapes than before must not meet old buffers
        chunks = [(i, tiny_gemma3.sequences[i][:8]) for i in range(count)]
        feeder.past = [0, 0, 0]
        assert session.run(feeder.feeds(chunks)).logits is None
        feeder.past = [0, 0, 0]
        output = session.run(feeder.feeds(chunks), with_logits=True)
        assert output.logits is not None
        best = np.take_along_axis(output.logits, output.topk_ids, axis=1)
        np.testing.assert_array_equal(best, output.topk_logits)
        exact = 1 / np.exp(output.logits - output.topk_logits[:, :1], dtype=np.float64).sum(axis=1)
        # float32.
        np.testing.assert_allclose(output.top_probability, exact, rtol=1e-6, atol=0)


def test_probabilities_are_of_the_rows_that_ask(tiny_gemma3: TinyModel) -> None:
    session = open_session(tiny_gemma3)
    feeder = Feeder(session.signature, num_seqs=3, max_length=150)
    feeds = feeder.feeds([(i, tiny_gemma3.sequences[i][:8]) for i in range(3)])
    every = session.run(feeds).top_probability
    assert len(set(every.tolist())) == len(every) == 24
    for rows in ([], [5], [3, 20]):
        some = session.run(feeds | {"probability_rows": np.array(rows, np.int64)}).top_probability
        np.testing.assert_array_equal(some, every[rows])


def test_a_graph_of_another_signature_is_refused(tiny_gemma3: TinyModel) -> None:
    with pytest.raises(ArtifactError, match=r"expected the inputs \['position_ids'\]"):
        open_session(tiny_gemma3, optional_inputs=("position_ids",))


def test_a_gpu_that_is_absent_is_an_error() -> None:
    with pytest.raises(OptionsError, match=r"expected cuda, got an ONNX Runtime with .*CPU"):
        require_device("cuda")


def test_a_gpu_without_its_driver_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime lists what it was built for, whatever the machine has."""
    monkeypatch.setattr(
        "beam_gemma.runtime.devices.onnxruntime.get_available_providers",
        lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
    )
    for version, words in ((0, "without its driver"), (12080, "580 or newer.* for CUDA 12.8")):
        monkeypatch.setattr("beam_gemma.runtime.device_memory.driver_version", lambda v=version: v)
        with pytest.raises(OptionsError, match=f"expected an NVIDIA .*{words}"):
            require_device("cuda")
        assert has_device("cuda") is (version > 0)


def test_a_window_on_cuda_takes_blocks_for_itself_and_a_chunk(tiny_gemma3: TinyModel) -> None:
    signature = dataclasses.replace(
        tiny_gemma3.artifact.signature("generate", "cpu"),
        device="cuda",
        block_size=64,
        max_model_len=100_000,
    )
    plan = plan_capacity(signature, num_bytes=1 << 30, max_num_seqs=4, max_num_batched_tokens=64)
    full, sliding = (plan.num_blocks[state.group] for state in signature.paged_states)
    # 24 of the window, 64 new ones and two blocks for where these begin and end.
    assert sliding == 4 * 4 + 1
    assert full > 1000


def test_capacity_gives_windows_only_what_they_can_use(tiny_gemma3: TinyModel) -> None:
    signature = dataclasses.replace(
        tiny_gemma3.artifact.signature("generate", "cpu"), max_model_len=100_000
    )
    full, sliding = signature.paged_states
    budget = 1 << 30
    plan = plan_capacity(signature, num_bytes=budget, max_num_seqs=4, max_num_batched_tokens=64)
    # 24 of the window, 64 new ones and two alignments of 64, in blocks of 16.
    assert plan.num_blocks[sliding.group] == 4 * 14 + 1
    used = sum(plan.num_blocks[s.group] * block_bytes(signature, s) for s in (full, sliding))
    assert used <= budget
    assert plan.num_blocks[full.group] == 4 * 6254 + 1
    small = plan_capacity(
        signature, num_bytes=budget >> 4, max_num_seqs=4, max_num_batched_tokens=64
    )
    used = sum(small.num_blocks[s.group] * block_bytes(signature, s) for s in (full, sliding))
    assert 0.95 * (budget >> 4) < used <= budget >> 4


def test_too_little_memory_is_an_error(tiny_gemma3: TinyModel) -> None:
    signature = tiny_gemma3.artifact.signature("generate", "cpu")
    with pytest.raises(OptionsError, match="expected memory for at least 2 blocks"):
        plan_capacity(signature, num_bytes=10_000, max_num_seqs=4, max_num_batched_tokens=64)


def test_without_onnxruntime_the_error_says_what_to_install() -> None:
    """In a process that has neither of its builds."""
    code = "import sys; sys.modules['onnxruntime'] = None; import beam_gemma.runtime.cpu_session"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: onnxruntime: expected one of its builds, got none; install "
        "beam-gemma[cpu], or beam-gemma[gpu] for NVIDIA GPUs"
    )
