"""Devices that this machine can run graphs on: ONNX Runtime's providers, drivers and GPUs."""

from typing import Literal

from beam_gemma.errors import OptionsError
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.graph_tensors import Device, Head
from beam_gemma.runtime.device_memory import has_gpu, require_gpu

try:
    import onnxruntime
except ModuleNotFoundError as error:
    # Its two builds are one package under two names, of which no dependency can ask for either.
    raise ModuleNotFoundError(
        "onnxruntime: expected one of its builds, got none; install beam-gemma[cpu], or "
        "beam-gemma[gpu] for NVIDIA GPUs",
        name="onnxruntime",
    ) from error


PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
NUMERICS = 1
"""Raised where a request may give other bits than with the version before."""
_STATES = onnxruntime.capi.onnxruntime_pybind11_state
LOAD_ERRORS = (
    _STATES.Fail,
    _STATES.InvalidGraph,
    _STATES.InvalidProtobuf,
    _STATES.NoSuchFile,
)
"""What ONNX Runtime raises where it cannot make a session."""


def numerics() -> str:
    """Return whose arithmetic results are made with: ours, and ONNX Runtime's."""
    return f"{NUMERICS}, onnxruntime {onnxruntime.__version__}"


def providers() -> list[str]:
    """Return what this machine's ONNX Runtime can run on, by its own names."""
    return onnxruntime.get_available_providers()


def require_device(device: Device) -> None:
    """Refuse a device that this machine or its ONNX Runtime does not have.

    Raises:
        OptionsError: with the remedy; nothing falls back in silence.
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
    """Return whether ONNX Runtime knows of a device and the machine has one, fit for use or not."""
    return PROVIDERS[device] in providers() and (device == "cpu" or has_gpu())


DeviceChoice = Literal["auto", "cpu", "cuda"]


def choose_device(artifact: Artifact, head: Head, device: DeviceChoice) -> Device:
    """Return the device that a graph of a model runs on, on this machine.

    Raises:
        ArtifactError: the model has no graph for the device that was asked for.
        OptionsError: the machine does not have that device, or has one that is of no use.
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
