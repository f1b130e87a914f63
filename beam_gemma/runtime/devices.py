"""Devices that can run graphs on this machine: ONNX Runtime's providers, drivers and GPUs."""

from typing import Literal

from beam_gemma.errors import OptionsError
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.graph_tensors import Device, Head
from beam_gemma.runtime.device_memory import has_gpu, require_gpu

try:
    import onnxruntime as onnxruntime
except ModuleNotFoundError as error:
    # ONNX Runtime's CPU and GPU builds are two distributions of one package; a dependency cannot
    # require "either of them".
    raise ModuleNotFoundError(
        "onnxruntime: expected one of its builds, got none; install beam-gemma[cpu], or "
        "beam-gemma[gpu] for NVIDIA GPUs",
        name="onnxruntime",
    ) from error


PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
NUMERICS = 1
"""Version of our numerics; incremented when a request may give other bits than before."""
ONNXRUNTIME_VERSION = "1.31.1"
"""The version of ONNX Runtime in which its private parts were read."""


def _load_errors() -> tuple[type[Exception], ...]:
    # ONNX Runtime has no public names for its exceptions. Without these, a damaged graph would
    # fail a job with a traceback; `tests/test_private_parts.py` fails when they change.
    try:
        states = onnxruntime.capi.onnxruntime_pybind11_state
        return states.Fail, states.InvalidGraph, states.InvalidProtobuf, states.NoSuchFile
    except AttributeError as error:
        raise ImportError(
            f"onnxruntime {onnxruntime.__version__}: expected the exceptions of "
            f"onnxruntime_pybind11_state as in version {ONNXRUNTIME_VERSION}, got: {error}; "
            "install that version, as beam-gemma[cpu] and beam-gemma[gpu] do",
            name="onnxruntime",
        ) from error


LOAD_ERRORS = _load_errors()
"""Exceptions that ONNX Runtime raises when it cannot create a session."""


def numerics() -> str:
    """Return the versions of our numerics and of ONNX Runtime; either may change result bits."""
    return f"{NUMERICS}, onnxruntime {onnxruntime.__version__}"


def providers() -> list[str]:
    """Return the names of the providers of this machine's ONNX Runtime."""
    return onnxruntime.get_available_providers()


def require_device(device: Device) -> None:
    """Check that this machine and its ONNX Runtime have a device; nothing falls back silently.

    Raises:
        OptionsError: the device is missing; the message names the remedy.
    """
    have = providers()
    if PROVIDERS[device] not in have:
        raise OptionsError(
            f"device: expected {device}, got an ONNX Runtime with {', '.join(have)}; install "
            "onnxruntime-gpu on a machine with an NVIDIA GPU, or run with --device cpu"
        )
    if device == "cuda":
        require_gpu()


def has_device(device: Device) -> bool:
    """Return whether ONNX Runtime supports a device and the machine has one, usable or not."""
    return PROVIDERS[device] in providers() and (device == "cpu" or has_gpu())


DeviceChoice = Literal["auto", "cpu", "cuda"]


def choose_device(artifact: Artifact, head: Head, device: DeviceChoice) -> Device:
    """Return the device that runs a model's graph on this machine.

    Raises:
        ArtifactError: the model has no graph for the requested device.
        OptionsError: the machine lacks the device, or has one that is unusable.
    """
    if device != "auto":
        artifact.signature(head, device)
        require_device(device)
        return device
    if (head, "cuda") in artifact.signatures and has_device("cuda"):
        require_device("cuda")
        return "cuda"
    artifact.signature(head, "cpu")
    return "cpu"
