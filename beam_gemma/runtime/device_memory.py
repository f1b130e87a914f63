"""Memory of a device, and operations on it, run in call order on one stream.

`CudaMemory` uses NVIDIA's runtime. `HostMemory` is plain memory: it lets the CUDA session's code
run on a machine without a GPU.

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
from beam_gemma.model.signature import Signature

ALIGNMENT = 256
"""Alignment of every allocated address, in bytes; kernels read words of up to 16 bytes."""
MAX_PITCH = 2**31 - 1
"""Maximum distance between rows of one memset call, in bytes; the same on all GPUs."""
MIN_DRIVER = 13000
"""Minimum `driver_version`: CUDA 13, first supported by driver release 580."""
BF16_CAPABILITY = (8, 0)
"""Lowest compute capability with matrix units for bfloat16."""
FLASH_CAPABILITY = (8, 0)
"""Lowest compute capability with ONNX Runtime's flash attention."""


@dataclass(frozen=True, slots=True)
class Room:
    """Free and total memory of a device, in bytes."""

    free: int
    total: int


@runtime_checkable
class Mark(Protocol):
    """A point in the stream."""

    def wait(self) -> None:
        """Wait until the device has reached this mark; raise any error of the device."""

    def seconds_since(self, earlier: "Mark") -> float:
        """Return the device's time from an earlier mark to this one, which it must have reached."""


@runtime_checkable
class DeviceMemory(Protocol):
    """Memory operations that a session needs of a device."""

    kind: str
    """ONNX Runtime's name of the device that holds the memory."""
    stream: int
    """Handle of the stream that runs all operations in order; 0 if there is none."""

    def allocate(self, num_bytes: int) -> int:
        """Return the address of zeroed memory on the device."""

    def free(self, address: int) -> None:
        """Free memory from `allocate`, once all earlier operations have finished."""

    def allocate_host(self, num_bytes: int) -> UInt8[np.ndarray, " N"]:
        """Return host memory that can be copied asynchronously."""

    def copy_in(self, address: int, source: Shaped[np.ndarray, "..."]) -> None:
        """Copy from host memory, which must not change until a later mark is reached."""

    def copy_out(self, target: Shaped[np.ndarray, "..."], address: int) -> None:
        """Copy to host memory, whose content is complete once a later mark is reached."""

    def zero(self, address: int, *, width: int, pitch: int, height: int) -> None:
        """Zero `height` rows of `width` bytes, `pitch` bytes apart, the first at an address."""

    def copy(self, target: int, source: int, *, width: int, pitch: int, height: int) -> None:
        """Copy `height` rows of `width` bytes, `pitch` bytes apart at either address."""

    def mark(self) -> Mark:
        """Return a mark after all operations so far."""

    def room(self) -> Room:
        """Return the free and total memory."""


class CudaMemory:
    """Memory of one GPU, through NVIDIA's runtime."""

    kind = "cuda"

    def __init__(self) -> None:
        """Create a stream on the process's GPU.

        Raises:
            OptionsError: there is no GPU, or its driver is too old.
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
        """Free memory from `allocate`, once all earlier operations have finished."""
        _checked(self._cuda.cudaStreamSynchronize(self._stream))
        _checked(self._cuda.cudaFree(address))

    def allocate_host(self, num_bytes: int) -> UInt8[np.ndarray, " N"]:
        """Return pinned memory, which is never freed."""
        num_bytes = max(num_bytes, 1)
        flags = self._cuda.cudaHostAllocDefault
        address = int(_checked(self._cuda.cudaHostAlloc(num_bytes, flags)))
        return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))

    def copy_in(self, address: int, source: Shaped[np.ndarray, "..."]) -> None:
        """Copy from host memory, which must not change until a later mark is reached."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._copy(address, _address(source), source.nbytes, kind)

    def copy_out(self, target: Shaped[np.ndarray, "..."], address: int) -> None:
        """Copy to host memory, whose content is complete once a later mark is reached."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._copy(_address(target), address, target.nbytes, kind)

    def zero(self, address: int, *, width: int, pitch: int, height: int) -> None:
        """Zero `height` rows of `width` bytes, `pitch` bytes apart, the first at an address."""
        if pitch <= MAX_PITCH:
            stream = self._stream
            _checked(self._cuda.cudaMemset2DAsync(address, pitch, 0, width, height, stream))
            return
        for row in range(height):
            _checked(self._cuda.cudaMemsetAsync(address + row * pitch, 0, width, self._stream))

    def copy(self, target: int, source: int, *, width: int, pitch: int, height: int) -> None:
        """Copy `height` rows of `width` bytes, `pitch` bytes apart at either address."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        size, stream = (width, height), self._stream
        _checked(self._cuda.cudaMemcpy2DAsync(target, pitch, source, pitch, *size, kind, stream))

    def mark(self) -> Mark:
        """Return a mark after all operations so far."""
        return _CudaMark(self._cuda, self._stream)

    def room(self) -> Room:
        """Return the free and total memory."""
        free, total = _checked(self._cuda.cudaMemGetInfo())
        return Room(int(free), int(total))

    def _copy(self, target: int, source: int, num_bytes: int, kind: Any) -> None:
        _checked(self._cuda.cudaMemcpyAsync(target, source, num_bytes, kind, self._stream))


class _CudaMark:
    """A CUDA event, which records its time and is waited for without using a CPU core."""

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
        # CUDA defers the destruction of an event until the device has reached it.
        self._cuda.cudaEventDestroy(self._event)


class HostMemory:
    """Memory of this process; all operations are synchronous."""

    kind = "cpu"
    stream = 0

    def __init__(self, num_bytes: int = 1 << 32) -> None:
        """Create an empty memory.

        Args:
            num_bytes: Total memory of the simulated device.
        """
        self._held: dict[int, np.ndarray] = {}
        self._total = num_bytes

    def allocate(self, num_bytes: int) -> int:
        """Return the address of zeroed memory.

        Raises:
            DeviceError: the free memory does not suffice.
        """
        if num_bytes > (free := self.room().free):
            raise DeviceError(f"memory: expected {num_bytes:,} bytes, got {free:,}")
        held = np.zeros(num_bytes + ALIGNMENT, np.uint8)
        address = -(-_address(held) // ALIGNMENT) * ALIGNMENT
        self._held[address] = held
        return address

    def free(self, address: int) -> None:
        """Free memory from `allocate`."""
        del self._held[address]

    def allocate_host(self, num_bytes: int) -> UInt8[np.ndarray, " N"]:
        """Return zeroed host memory."""
        return np.zeros(max(num_bytes, 1), np.uint8)

    def copy_in(self, address: int, source: Shaped[np.ndarray, "..."]) -> None:
        """Copy from host memory."""
        ctypes.memmove(address, _address(source), source.nbytes)

    def copy_out(self, target: Shaped[np.ndarray, "..."], address: int) -> None:
        """Copy to host memory."""
        ctypes.memmove(_address(target), address, target.nbytes)

    def zero(self, address: int, *, width: int, pitch: int, height: int) -> None:
        """Zero `height` rows of `width` bytes, `pitch` bytes apart, the first at an address."""
        for row in range(height):
            ctypes.memset(address + row * pitch, 0, width)

    def copy(self, target: int, source: int, *, width: int, pitch: int, height: int) -> None:
        """Copy `height` rows of `width` bytes, `pitch` bytes apart at either address."""
        for row in range(height):
            ctypes.memmove(target + row * pitch, source + row * pitch, width)

    def mark(self) -> Mark:
        """Return a mark of the current time."""
        return _HostMark()

    def room(self) -> Room:
        """Return the free and total memory."""
        held = sum(array.nbytes - ALIGNMENT for array in self._held.values())
        return Room(self._total - held, self._total)


class _HostMark:
    """A point in time that has already been reached."""

    def __init__(self) -> None:
        self._time = time.monotonic()

    def wait(self) -> None:
        pass

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, _HostMark)
        return self._time - earlier._time


def driver_version() -> int:
    """Return the driver's CUDA version as 1000 * major + 10 * minor; 0 without a driver."""
    return int(_checked(_runtime().cudaDriverGetVersion()))


def cuda_release(version: int) -> str:
    """Return the display name of a `driver_version`, such as "CUDA 13.0"."""
    return f"CUDA {version // 1000}.{version % 1000 // 10}"


def num_gpus() -> int:
    """Return the number of GPUs visible to this process; 0 without a usable driver."""
    error, count = _runtime().cudaGetDeviceCount()
    return int(count) if int(error) == 0 else 0


def has_gpu() -> bool:
    """Return whether the machine has a GPU, even if its driver is too old."""
    version = driver_version()
    return 0 < version < MIN_DRIVER or num_gpus() > 0


def compute_capability() -> tuple[int, int]:
    """Return the compute capability of the process's GPU, as (major, minor)."""
    cuda = _runtime()
    names = ("cudaDevAttrComputeCapabilityMajor", "cudaDevAttrComputeCapabilityMinor")
    attributes = (getattr(cuda.cudaDeviceAttr, name) for name in names)
    major, minor = (int(_checked(cuda.cudaDeviceGetAttribute(a, 0))) for a in attributes)
    return major, minor


def require_gpu() -> None:
    """Check that the machine has a GPU and a driver for CUDA 13; nothing falls back silently.

    Raises:
        OptionsError: either is missing; the message names the remedy.
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
    """Check that the GPU supports bfloat16 if the graph computes in it.

    Raises:
        OptionsError: the GPU does not; the message names the remedy.
    """
    if dtype == "bfloat16" and (have := capability()) < BF16_CAPABILITY:
        raise OptionsError(
            "device: expected a GPU that computes in the model's bfloat16, of compute capability "
            f"8.0 or higher, got {have[0]}.{have[1]}; export the model with --precision fp16"
        )


def require_two_sided(signature: Signature, capability: Callable[[], tuple[int, int]]) -> None:
    """Check that the GPU has a kernel for attention in both directions if the graph takes spans.

    Below 8.0 ONNX Runtime has no flash attention. What it runs in its place counts a window from
    the first new token, not from the query's own position.

    Raises:
        OptionsError: the GPU does not; the message names the remedy.
    """
    if "span_ends" in signature.optional_inputs and (have := capability()) < FLASH_CAPABILITY:
        raise OptionsError(
            "device: expected a GPU that attends to pictures in both directions, of compute "
            f"capability 8.0 or higher, got {have[0]}.{have[1]}; take such a GPU, or --device cpu"
        )


def _address(array: Shaped[np.ndarray, "..."]) -> int:
    assert array.flags.c_contiguous
    return array.ctypes.data


def _runtime() -> Any:
    """Return the bindings of NVIDIA's runtime, which the extra `gpu` installs.

    Raises:
        OptionsError: the package is missing.
    """
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ModuleNotFoundError as error:
        raise OptionsError(
            "device: expected the package cuda-bindings, got none; install beam-gemma[gpu]"
        ) from error


def _checked(answer: tuple[Any, ...]) -> Any:
    """Return the values of a runtime call, without its error code.

    Raises:
        DeviceError: the call failed.
    """
    error, *values = answer
    if int(error) != 0:
        text = _runtime().cudaGetErrorString(error)[1]
        raise DeviceError(f"CUDA: {error.name}: {text.decode()}")
    return values[0] if len(values) == 1 else tuple(values)
