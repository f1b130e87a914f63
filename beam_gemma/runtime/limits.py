"""Limits on step sizes and GPU memory: the user's settings and the defaults per device."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from beam_gemma.errors import OptionsError
from beam_gemma.model.graph_tensors import Device
from beam_gemma.model.vision_config import VisionConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Limits on the work of one step."""

    max_num_seqs: int = 64
    """Maximum number of sequences that run at once."""
    max_num_batched_tokens: int = 1024
    """Maximum number of new tokens in one step."""
    eos_token_ids: tuple[int, ...] = ()
    """The model's end tokens; they end a completion unless its request ignores them."""
    enable_prefix_caching: bool = True
    """If true, prompts that start with the same tokens share these tokens' cache blocks."""

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise OptionsError(f"max_num_seqs: expected at least 1, got {self.max_num_seqs}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise OptionsError(
                f"max_num_batched_tokens: expected at least max_num_seqs ({self.max_num_seqs}), "
                f"one token for each sequence, got {self.max_num_batched_tokens}"
            )


MAX_NUM_SEQS = {"cpu": EngineConfig().max_num_seqs, "cuda": 256}
MAX_NUM_BATCHED_TOKENS = {"cpu": EngineConfig().max_num_batched_tokens, "cuda": 2048}
EMBED_TOKENS = {"cpu": 1024, "cuda": 8192}
"""Default token budget of a step over whole texts, by device."""
TEXT_BESIDE_PICTURE = 1024
"""Tokens that a step has room for beside a picture if the whole prompt must fit into the step."""
GPU_MEMORY_UTILIZATION = 0.9
FOR_CUDA = ("cudagraph_capture_sizes", "gpu_memory_utilization")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Limits set by the user; None selects the device's default.

    Example:
        >>> limits = Limits(max_num_seqs=16)
        >>> limits.engine_config("cpu").max_num_seqs
        16
        >>> limits.engine_config("cpu").max_num_batched_tokens
        1024
    """

    max_num_seqs: int | None = None
    """Maximum number of sequences that run at once."""
    max_num_batched_tokens: int | None = None
    """Maximum number of new tokens in one step."""
    cudagraph_capture_sizes: tuple[int, ...] | None = None
    """CUDA: sizes that decode steps are padded to, in sequences; the last is `max_num_seqs`. With
    several sizes, a row's last bits may depend on the sizes of its steps."""
    gpu_memory_utilization: float | None = None
    """CUDA: share of the GPU's memory to use, above 0 and at most 1."""

    def __post_init__(self) -> None:
        sizes = self.cudagraph_capture_sizes
        if sizes is not None and (not sizes or sizes[0] < 1 or list(sizes) != sorted(set(sizes))):
            raise OptionsError(
                f"cudagraph_capture_sizes: expected rising numbers from 1, got {list(sizes)}"
            )
        share = self.gpu_memory_utilization
        if share is not None and not 0 < share <= 1:
            raise OptionsError(
                f"gpu_memory_utilization: expected above 0 and at most 1, got {share}"
            )

    def check(self, device: Device) -> None:
        """Check the limits against a device.

        Raises:
            OptionsError: a limit is not for this device, or two limits contradict each other.
        """
        for name in FOR_CUDA if device == "cpu" else ():
            if getattr(self, name) is not None:
                raise OptionsError(f"{name}: expected none on the CPU, got one; leave it out")
        config = self.engine_config(device)
        if device == "cuda" and self.capture_sizes[-1] != config.max_num_seqs:
            raise OptionsError(
                "cudagraph_capture_sizes: expected max_num_seqs as the last of them, "
                f"{config.max_num_seqs}, got {self.capture_sizes[-1]}"
            )

    def check_choice(self, device: Literal["auto", "cpu", "cuda"]) -> None:
        """Check the limits; with `auto`, as for the CPU, or not yet if a limit for CUDA is set.

        Raises:
            OptionsError: the device cannot have such limits, or they contradict each other.
        """
        if device != "auto":
            self.check(device)
        elif all(getattr(self, name) is None for name in FOR_CUDA):
            self.check("cpu")

    def check_whole_texts(self) -> None:
        """Check limits for steps over whole texts.

        Raises:
            OptionsError: a limit is set that does not apply to such steps.
        """
        for name in ("max_num_seqs", "cudagraph_capture_sizes"):
            if getattr(self, name) is not None:
                raise OptionsError(f"{name}: expected none for embeddings, got one; leave it out")

    def for_pictures(self, vision: VisionConfig | None, device: Device) -> "Limits":
        """Return these limits with a step size that a prompt with a picture fits into.

        The user's own step size stays as it is, as does the default where it suffices.

        Args:
            vision: What the model needs for pictures; None if it takes none.
            device: Device of the default step size.
        """
        if (
            vision is None
            or vision.bidirectional != "prefix"
            or self.max_num_batched_tokens is not None
            or (least := vision.num_image_tokens + TEXT_BESIDE_PICTURE)
            <= MAX_NUM_BATCHED_TOKENS[device]
        ):
            return self
        return dataclasses.replace(self, max_num_batched_tokens=least)

    def engine_config(self, device: Device) -> EngineConfig:
        """Return the limits of an engine's steps on a device."""
        return EngineConfig(
            max_num_seqs=_or(self.max_num_seqs, MAX_NUM_SEQS[device]),
            max_num_batched_tokens=_or(self.max_num_batched_tokens, MAX_NUM_BATCHED_TOKENS[device]),
        )

    def embed_tokens(self, device: Device) -> int:
        """Return the token budget of a step over whole texts on a device."""
        return _or(self.max_num_batched_tokens, EMBED_TOKENS[device])

    @property
    def capture_sizes(self) -> tuple[int, ...]:
        """Sizes that decode steps on CUDA are padded to, in sequences."""
        return self.cudagraph_capture_sizes or (self.engine_config("cuda").max_num_seqs,)

    @property
    def memory_utilization(self) -> float:
        """Share of a GPU's memory to use."""
        share = self.gpu_memory_utilization
        return GPU_MEMORY_UTILIZATION if share is None else share


def _or(number: int | None, default: int) -> int:
    return default if number is None else number
