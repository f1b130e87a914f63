"""How large steps may be, and how much of a GPU they may use: what was said, and what was not."""

import dataclasses
from dataclasses import dataclass

from beam_gemma.errors import OptionsError
from beam_gemma.model.graph_tensors import Device


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How much work a step may hold."""

    max_num_seqs: int = 64
    """Sequences that run at once."""
    max_num_batched_tokens: int = 1024
    """New tokens of one step."""
    eos_token_ids: tuple[int, ...] = ()
    """The model's own end tokens; they end a completion unless its request ignores them."""
    enable_prefix_caching: bool = True
    """Whether prompts with the same first tokens share what the caches hold of them."""

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
"""Of a step over whole texts."""
GPU_MEMORY_UTILIZATION = 0.9
FOR_CUDA = ("cudagraph_capture_sizes", "gpu_memory_utilization")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What somebody asked for; None leaves it to the device."""

    max_num_seqs: int | None = None
    """Sequences that run at once."""
    max_num_batched_tokens: int | None = None
    """New tokens of one step."""
    cudagraph_capture_sizes: tuple[int, ...] | None = None
    """CUDA: what the sequences of a decode step are padded to, the last one `max_num_seqs`. A row's
    last bits may depend on which of several sizes its steps have."""
    gpu_memory_utilization: float | None = None
    """CUDA: share of the GPU's memory to use."""

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
        """Refuse what a device cannot do.

        Raises:
            OptionsError: it is not for this device, or contradicts itself.
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

    def engine_config(self, device: Device) -> EngineConfig:
        """Return how much work a step of an engine may hold on a device."""
        return EngineConfig(
            max_num_seqs=_or(self.max_num_seqs, MAX_NUM_SEQS[device]),
            max_num_batched_tokens=_or(self.max_num_batched_tokens, MAX_NUM_BATCHED_TOKENS[device]),
        )

    def embed_tokens(self, device: Device) -> int:
        """Return the tokens of a step over whole texts on a device."""
        return _or(self.max_num_batched_tokens, EMBED_TOKENS[device])

    @property
    def capture_sizes(self) -> tuple[int, ...]:
        """The sizes of decode steps on CUDA."""
        return self.cudagraph_capture_sizes or (self.engine_config("cuda").max_num_seqs,)

    @property
    def memory_utilization(self) -> float:
        """The share of a GPU's memory to use."""
        share = self.gpu_memory_utilization
        return GPU_MEMORY_UTILIZATION if share is None else share


def _or(number: int | None, default: int) -> int:
    return default if number is None else number
