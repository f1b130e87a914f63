"""Memory of a device, and what is done with it on one stream, in the order of the calls.

`CudaMemory` is NVIDIA's runtime. `HostMemory` is plain memory: the session above is the same
code on a machine without a GPU.

Dimensions: N bytes.
"""

import ctypes
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Shaped, UInt8

from beam_gemma.errors import DeviceError, OptionsError

ALIGNMENT = 256
"""Of whatever an address is given for, in bytes; kernels read words of up to 16."""
MAX_PITCH = 2**31 - 1
"""Bytes between rows of one call, as all GPUs have it."""
MIN_DRIVER = 13000
"""What a driver says of itself from release 580 on, the first with CUDA 13."""
BF16_CAPABILITY = (8, 0)
"""The first compute capability with matrix units for bfloat16."""


@dataclass(frozen=True, slots=True)
class Room:
    """How much memory a device has, in bytes."""

    free: int
    total: int


@runtime_checkable
class Mark(Protocol):
    """A place in the stream."""

    def wait(self) -> None:
        """Return when the device has come here; errors of the device surface then."""

    def seconds_since(self, earlier: "Mark") -> float:
        """Return how long the device took from another place to this one; it has come here."""


@runtime_checkable
class DeviceMemory(Protocol):
    """What a session asks of a device."""

    kind: str
    """ONNX Runtime's name for where the memory lies."""
    stream: int
    """All of this happens on it, in order; 0 if there is none."""

    def allocate(self, num_bytes: int) -> int:
        """Return the address of zeroed memory on the device."""

    def free(self, address: int) -> None:
        """Give memory of `allocate` back, once the stream has come here."""

    def allocate_host(self, num_bytes: int) -> UInt8[np.ndarray, " N"]:
        """Return memory of the host that copies need not wait for."""

    def copy_in(self, address: int, source: Shaped[np.ndarray, "..."]) -> None:
        """Copy from host memory, which must stay as it is until a later mark."""

    def copy_out(self, target: Shaped[np.ndarray, "..."], address: int) -> None:
        """Copy to host memory, which is complete at a later mark."""

    def zero(self, address: int, *, width: int, pitch: int, height: int) -> None:
        """Zero `width` bytes at an address, and at each of `height` places `pitch` apart."""

    def mark(self) -> Mark:
        """Return the place that the stream has come to."""

    def room(self) -> Room:
        """Return how much memory there is."""


class CudaMemory:
    """One GPU, by NVIDIA's runtime."""

    kind = "cuda"

    def __init__(self) -> None:
        """Take the process's GPU.

        Raises:
            OptionsError: there is none, or its driver is too old.
        """
        require_gpu()
        self._cuda = _runtime()
        flags = self._cuda.cudaStreamNonBlocking
        self._stream = _checked(self._cuda.cudaStreamCreateWithFlags(flags))
        self.stream = int(self._stream)

    def allocate(self, num_bytes: int) -> int:
        """Return the address of zeroed memory on the device."""
        address = int(_checked(self._cuda.cudaMalloc(max(num_bytes, 1))))
        _checked(self._cuda.cudaMemsetAsync(address, 0, num_bytes, self._stream))
        return address

    def free(self, address: int) -> None:
        """Give memory of `allocate` back, once the stream has come here."""
        _checked(self._cuda.cudaStreamSynchronize(self._stream))
        _checked(self._cuda.cudaFree(address))

    def allocate_host(self, num_bytes: int) -> UInt8[np.ndarray, " N"]:
        """Return pinned memory; it lasts as long as the process."""
        num_bytes = max(num_bytes, 1)
        flags = self._cuda.cudaHostAllocDefault
        address = int(_checked(self._cuda.cudaHostAlloc(num_bytes, flags)))
        return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))

    def copy_in(self, address: int, source: Shaped[np.ndarray, "..."]) -> None:
        """Copy from host memory, which must stay as it is until a later mark."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._copy(address, _address(source), source.nbytes, kind)

    def copy_out(self, target: Shaped[np.ndarray, "..."], address: int) -> None:
        """Copy to host memory, which is complete at a later mark."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._copy(_address(target), address, target.nbytes, kind)

    def zero(self, address: int, *, width: int, pitch: int, height: int) -> None:
        """Zero `width` bytes at an address, and at each of `height` places `pitch` apart."""
        if pitch <= MAX_PITCH:
            stream = self._stream
            _checked(self._cuda.cudaMemset2DAsync(address, pitch, 0, width, height, stream))
            return
        for row in range(height):
            _checked(self._cuda.cudaMemsetAsync(address + row * pitch, 0, width, self._stream))

    def mark(self) -> Mark:
        """Return the place that the stream has come to."""
        return _CudaMark(self._cuda, self._stream)

    def room(self) -> Room:
        """Return how much memory there is."""
        free, total = _checked(self._cuda.cudaMemGetInfo())
        return Room(int(free), int(total))

    def _copy(self, target: int, source: int, num_bytes: int, kind: Any) -> None:
        _checked(self._cuda.cudaMemcpyAsync(target, source, num_bytes, kind, self._stream))


class _CudaMark:
    """An event, which waits without a core of its own and takes the time."""

    def __init__(self, cuda: Any, stream: Any) -> None:
        self._cuda = cuda
        self._event = _checked(cuda.cudaEventCreateWithFlags(cuda.cudaEventBlockingSync))
        _checked(cuda.cudaEventRecord(self._event, stream))

    def wait(self) -> None:
        _checked(self._cuda.cudaEventSynchronize(self._event))

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, _CudaMark)
        return _checked(self._cuda.cudaEventElapsedTime(earlier._event, self._event)) / 1000

    def __del__(self) -> None:
        # An event that the device has not come to yet goes when it has.
        self._cuda.cudaEventDestroy(self._event)


class HostMemory:
    """Memory of this process; everything is done at once."""

    kind = "cpu"
    stream = 0

    def __init__(self, num_bytes: int = 1 << 32) -> None:
        """Begin with nothing allocated.

        Args:
            num_bytes: What the device is to have.
        """
        self._held: dict[int, np.ndarray] = {}
        self._total = num_bytes

    def allocate(self, num_bytes: int) -> int:
        """Return the address of zeroed memory.

        Raises:
            DeviceError: there is not so much left.
        """
        if num_bytes > (free := self.room().free):
            raise DeviceError(f"memory: expected {num_bytes:,} bytes, got {free:,}")
        held = np.zeros(num_bytes + ALIGNMENT, np.uint8)
        address = -(-_address(held) // ALIGNMENT) * ALIGNMENT
        self._held[address] = held
        return address

    def free(self, address: int) -> None:
        """Give memory of `allocate` back."""
        del self._held[address]

    def allocate_host(self, num_bytes: int) -> UInt8[np.ndarray, " N"]:
        """Return memory of the host."""
        return np.zeros(max(num_bytes, 1), np.uint8)

    def copy_in(self, address: int, source: Shaped[np.ndarray, "..."]) -> None:
        """Copy from host memory."""
        ctypes.memmove(address, _address(source), source.nbytes)

    def copy_out(self, target: Shaped[np.ndarray, "..."], address: int) -> None:
        """Copy to host memory."""
        ctypes.memmove(_address(target), address, target.nbytes)

    def zero(self, address: int, *, width: int, pitch: int, height: int) -> None:
        """Zero `width` bytes at an address, and at each of `height` places `pitch` apart."""
        for row in range(height):
            ctypes.memset(address + row * pitch, 0, width)

    def mark(self) -> Mark:
        """Return the present."""
        return _HostMark()

    def room(self) -> Room:
        """Return how much memory there is."""
        held = sum(array.nbytes - ALIGNMENT for array in self._held.values())
        return Room(self._total - held, self._total)


class _HostMark:
    """A moment, which has come."""

    def __init__(self) -> None:
        self._time = time.monotonic()

    def wait(self) -> None:
        pass

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, _HostMark)
        return self._time - earlier._time


def driver_version() -> int:
    """Return the CUDA version that the driver has, as 1000 * major + 10 * minor; 0 without one."""
    return int(_checked(_runtime().cudaDriverGetVersion()))


def cuda_release(version: int) -> str:
    """Return what people call a `driver_version`."""
    return f"CUDA {version // 1000}.{version % 1000 // 10}"


def num_gpus() -> int:
    """Return how many GPUs the driver shows to this process; 0 without a driver for them."""
    error, count = _runtime().cudaGetDeviceCount()
    return int(count) if int(error) == 0 else 0


def has_gpu() -> bool:
    """Return whether the machine has a GPU, be its driver new enough or not."""
    version = driver_version()
    return 0 < version < MIN_DRIVER or num_gpus() > 0


def compute_capability() -> tuple[int, int]:
    """Return the generation of the process's GPU."""
    cuda = _runtime()
    names = ("cudaDevAttrComputeCapabilityMajor", "cudaDevAttrComputeCapabilityMinor")
    attributes = (getattr(cuda.cudaDeviceAttr, name) for name in names)
    major, minor = (int(_checked(cuda.cudaDeviceGetAttribute(a, 0))) for a in attributes)
    return major, minor


def require_gpu() -> None:
    """Refuse a machine without a GPU, or with a driver that is too old for CUDA 13.

    Raises:
        OptionsError: with the remedy; nothing falls back in silence.
    """
    version = driver_version()
    if version == 0:
        raise OptionsError(
            "device: expected an NVIDIA GPU, got a machine without its driver; run where there is "
            "one, or with --device cpu"
        )
    if version < MIN_DRIVER:
        raise OptionsError(
            "device: expected an NVIDIA driver of release 580 or newer, for CUDA 13, got one for "
            f"{cuda_release(version)}; install a newer driver, on Dataflow with --gpu_driver"
        )
    if num_gpus() == 0:
        raise OptionsError(
            "device: expected an NVIDIA GPU, got a driver that shows none; give the process one, "
            "or run with --device cpu"
        )


def require_bfloat16(dtype: str, capability: Callable[[], tuple[int, int]]) -> None:
    """Refuse a GPU without bfloat16 for a graph that computes in it.

    Raises:
        OptionsError: with the remedy.
    """
    if dtype == "bfloat16" and (have := capability()) < BF16_CAPABILITY:
        raise OptionsError(
            "device: expected a GPU that computes in the model's bfloat16, of compute capability "
            f"8.0 or higher, got {have[0]}.{have[1]}; export the model with --precision fp16"
        )


def _address(array: Shaped[np.ndarray, "..."]) -> int:
    assert array.flags.c_contiguous
    return array.ctypes.data


def _runtime() -> Any:
    """Return NVIDIA's runtime, whose package comes with the GPU's."""
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ModuleNotFoundError as error:
        raise OptionsError(
            "device: expected the package cuda-bindings, got none; install beam-gemma[gpu]"
        ) from error


def _checked(answer: tuple[Any, ...]) -> Any:
    """Return what a call gave beside its error.

    Raises:
        DeviceError: there was one.
    """
    error, *values = answer
    if int(error) != 0:
        text = _runtime().cudaGetErrorString(error)[1]
        raise DeviceError(f"CUDA: {error.name}: {text.decode()}")
    return values[0] if len(values) == 1 else tuple(values)
