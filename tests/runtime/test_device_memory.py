"""Memory of devices: what NVIDIA's own package says here, and what plain memory does."""

import importlib
import math
from dataclasses import replace

import numpy as np
import pytest

from beam_gemma.errors import DeviceError, OptionsError
from beam_gemma.model.graph_tensors import RecurrentState
from beam_gemma.runtime import device_memory
from beam_gemma.runtime.capacity import Capacity
from beam_gemma.runtime.device_memory import (
    ALIGNMENT,
    CudaMemory,
    HostMemory,
    has_gpu,
    require_bfloat16,
    require_gpu,
    require_two_sided,
)
from beam_gemma.runtime.device_state import DeviceState
from beam_gemma.runtime.open_session import PIECE_BYTES, read_ahead
from tests.doubles.fakes import STATES, fake_signature


class Runtime:
    """A runtime that notes its calls; each gives what it is told to."""

    def __init__(self, **values):
        self.values = values
        self.calls = []
        self.real = importlib.import_module("cuda.bindings.runtime")

    def __getattr__(self, name):
        real = getattr(self.real, name)  # what NVIDIA's package lacks fails here
        if not callable(real) or isinstance(real, type):
            return real

        def call(*arguments):
            self.calls.append((name, *arguments))
            error, *value = self.values.get(name, (0,))
            return self.real.cudaError_t(error), *value

        return call


@pytest.fixture
def runtime(monkeypatch):
    fake = Runtime(
        cudaDriverGetVersion=(0, 13000),
        cudaGetDeviceCount=(0, 1),
        cudaStreamCreateWithFlags=(0, 7),
        cudaMalloc=(0, 4096),
        cudaMemGetInfo=(0, 10, 100),
        cudaEventCreateWithFlags=(0, 5),
        cudaEventElapsedTime=(0, 1500.0),
        cudaGetErrorString=(0, b"out of memory"),
    )
    monkeypatch.setattr(device_memory, "_runtime", lambda: fake)
    return fake


def test_without_a_driver_nvidias_package_says_so():
    """The package itself, which needs no GPU to be imported."""
    if has_gpu():
        pytest.skip("this machine has a GPU")
    with pytest.raises(OptionsError, match="expected an NVIDIA GPU, got a machine without"):
        CudaMemory()


def test_everything_goes_to_one_stream(runtime):
    memory = CudaMemory()
    assert memory.stream == 7
    runtime.calls.clear()
    address = memory.allocate(100)
    array = np.arange(10, dtype=np.int32)
    memory.copy_in(address, array)
    memory.copy_out(array[2:], address)
    memory.zero(address, width=3, pitch=8, height=2)
    memory.copy(address + 3, address, width=3, pitch=8, height=2)
    kinds = runtime.cudaMemcpyKind
    assert runtime.calls == [
        ("cudaMalloc", 100),
        ("cudaMemsetAsync", 4096, 0, 100, 7),
        ("cudaMemcpyAsync", 4096, array.ctypes.data, 40, kinds.cudaMemcpyHostToDevice, 7),
        ("cudaMemcpyAsync", array.ctypes.data + 8, 4096, 32, kinds.cudaMemcpyDeviceToHost, 7),
        ("cudaMemset2DAsync", 4096, 8, 0, 3, 2, 7),
        ("cudaMemcpy2DAsync", 4099, 8, 4096, 8, 3, 2, kinds.cudaMemcpyDeviceToDevice, 7),
    ]
    runtime.calls.clear()
    begin, end = memory.mark(), memory.mark()
    end.wait()
    assert end.seconds_since(begin) == 1.5
    assert [name for name, *_ in runtime.calls] == [
        *["cudaEventCreateWithFlags", "cudaEventRecord"] * 2,
        "cudaEventSynchronize",
        "cudaEventElapsedTime",
    ]
    assert runtime.calls[1] == ("cudaEventRecord", 5, 7)
    assert memory.room() == device_memory.Room(free=10, total=100)


def test_rows_too_far_apart_for_one_call_are_zeroed_one_by_one(runtime):
    memory = CudaMemory()
    runtime.calls.clear()
    pitch = 3 << 30
    memory.zero(64, width=16, pitch=pitch, height=3)
    assert runtime.calls == [("cudaMemsetAsync", 64 + i * pitch, 0, 16, 7) for i in range(3)]


def test_an_error_of_the_runtime_is_raised(runtime):
    memory = CudaMemory()
    runtime.values["cudaMalloc"] = (2, 0)
    with pytest.raises(DeviceError, match="cudaErrorMemoryAllocation: out of memory"):
        memory.allocate(1 << 40)


MACHINES = {
    "no driver": ((0, 0), (35, None), "got a machine without its driver", False),
    "an old driver": ((0, 12080), (35, None), "release 580 or newer.* CUDA 12.8", True),
    "no GPU": ((0, 13000), (100, None), "got a driver that shows none", False),
}


@pytest.mark.parametrize(("version", "count", "words", "has"), MACHINES.values(), ids=MACHINES)
def test_a_machine_without_a_gpu_that_can_be_used_is_refused(runtime, version, count, words, has):
    runtime.values |= {"cudaDriverGetVersion": version, "cudaGetDeviceCount": count}
    assert has_gpu() is has
    with pytest.raises(OptionsError, match=words):
        require_gpu()


def test_a_gpu_without_bfloat16_is_refused():
    require_bfloat16("float16", lambda: (7, 5))
    require_bfloat16("bfloat16", lambda: (8, 0))
    with pytest.raises(OptionsError, match=r"8\.0 or higher, got 7\.5; .*--precision fp16"):
        require_bfloat16("bfloat16", lambda: (7, 5))


def test_a_gpu_without_attention_in_both_directions_is_refused():
    text = fake_signature(device="cuda", optional_inputs=("position_ids",))
    sees = replace(text, optional_inputs=("span_ends", "position_ids"))
    require_two_sided(text, lambda: (7, 5))
    require_two_sided(sees, lambda: (8, 0))
    with pytest.raises(OptionsError, match=r"8\.0 or higher, got 7\.5; .*--device cpu"):
        require_two_sided(sees, lambda: (7, 5))


def test_plain_memory_is_zeroed_aligned_and_limited():
    memory = HostMemory(1000)
    address = memory.allocate(600)
    assert address % ALIGNMENT == 0
    out = np.ones(600, np.uint8)
    memory.copy_out(out, address)
    assert not out.any()
    with pytest.raises(DeviceError, match="expected 401 bytes, got 400"):
        memory.allocate(401)
    memory.copy_in(address, np.arange(1, 13, dtype=np.uint8))
    memory.zero(address + 1, width=2, pitch=5, height=2)
    memory.copy_out(out[:12], address)
    assert out[:12].tolist() == [1, 0, 0, 4, 5, 6, 0, 0, 9, 10, 11, 12]
    memory.copy(address + 1, address + 3, width=2, pitch=5, height=2)
    memory.copy_out(out[:12], address)
    assert out[:12].tolist() == [1, 4, 5, 4, 5, 6, 9, 10, 9, 10, 11, 12]
    memory.free(address)
    assert memory.room().free == 1000


def test_a_slot_is_copied_in_all_layers_of_recurrent_state_and_nothing_else_is():
    states = (
        RecurrentState(name="tail", layers=(0, 2), shape=(3, 4), dtype="float32"),
        RecurrentState(name="memory", layers=(0, 2, 3), shape=(5,), dtype="bfloat16"),
    )
    signature = fake_signature(device="cuda", states=(*STATES[:2], *states))
    memory = HostMemory(1 << 20)
    capacity = Capacity(num_blocks={"full": 2, "sliding": 2}, num_state_slots=6)
    state = DeviceState(signature, capacity, memory)
    before = []
    for placed in state:
        size = math.prod(placed.shape) * (2 if placed.tensor.dtype == "bfloat16" else 4)
        array = np.random.default_rng(size).integers(0, 255, size, np.uint8)
        memory.copy_in(placed.address, array)
        before.append(array)
    state.copy_slot(1, 4)
    for placed, old in zip(state, before, strict=True):
        now = np.empty_like(old)
        memory.copy_out(now, placed.address)
        if placed.tensor.input_name.startswith(("tail", "memory")):
            rows = old.reshape(6, -1)
            rows[4] = rows[1]
        np.testing.assert_array_equal(now, old)


def test_files_are_read_once_and_whole(tmp_path, monkeypatch):
    big, small = tmp_path / "big", tmp_path / "small"
    big.write_bytes(bytes(PIECE_BYTES + 5))
    small.write_bytes(b"abc")
    (tmp_path / "link").hardlink_to(big)
    read = []

    def pread(_, count, offset):
        read.append((count, offset))
        return b""

    monkeypatch.setattr("os.pread", pread)
    read_ahead([big, tmp_path / "link", small])
    assert sorted(read) == [(PIECE_BYTES, 0), (PIECE_BYTES, 0), (PIECE_BYTES, PIECE_BYTES)]
