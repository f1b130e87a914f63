"""GPU types for Dataflow workers, with their machine types and regions.

Sources, as of 2026:

- types: Google's cloud.google.com/dataflow/docs/gpu/gpu-support; memory, machine types and the
  number of GPUs of each: Compute Engine's docs/gpus;
- bfloat16: NVIDIA's CUDA programming guide, which requires compute capability 8.0 or higher;
- regions: zones with Compute Engine prices in the SkyPilot catalog (catalogs/v8/gcp/vms.csv); an
  account's quota limits its use of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from beam_gemma.model.graph_tensors import MOST_TABLE_SHARE

WEIGHTS_FRACTION = 0.85
"""Share of a GPU's memory for weights; the rest is for caches, a step's tensors and the driver."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A GPU type that Dataflow offers."""

    name: str
    """Name of the type in Dataflow's spelling."""
    memory_gib: int
    has_bfloat16: bool
    machines: Mapping[int, tuple[str, ...]]
    """Machine types by number of these GPUs; the first one of each number is the default."""
    regions: frozenset[str]
    """Regions that offer the type; empty if unknown."""

    def computes(self, precision: str) -> bool:
        """Return whether the GPU supports the number format of a model's precision."""
        return self.has_bfloat16 or precision != "bf16"

    def held(self, num_bytes: int, table_bytes: int = 0) -> int:
        """Return how much of a model's weights its memory holds, in bytes.

        Args:
            num_bytes: All weights.
            table_bytes: Those of tables among them, which lie in host memory if they are large.
        """
        is_large = table_bytes > self.memory_gib * 2**30 * MOST_TABLE_SHARE
        return num_bytes - table_bytes if is_large else num_bytes

    def holds(self, num_bytes: int, table_bytes: int = 0) -> bool:
        """Return whether weights fit into `WEIGHTS_FRACTION` of the memory; see `held`."""
        limit = self.memory_gib * 2**30 * WEIGHTS_FRACTION
        return self.held(num_bytes, table_bytes) <= limit


_TYPES = (
    Gpu(
        name="nvidia-l4",
        memory_gib=24,
        has_bfloat16=True,
        machines={
            1: (
                "g2-standard-8", "g2-standard-4", "g2-standard-12", "g2-standard-16",
                "g2-standard-32",
            ),
            2: ("g2-standard-24",),
            4: ("g2-standard-48",),
            8: ("g2-standard-96",),
        },
        regions=frozenset([
            "asia-east1", "asia-northeast1", "asia-northeast3", "asia-south1", "asia-southeast1",
            "europe-west1", "europe-west2", "europe-west3", "europe-west4", "europe-west6",
            "me-central2", "northamerica-northeast1", "northamerica-northeast2", "us-central1",
            "us-east1", "us-east4", "us-west1", "us-west4",
        ]),
    ),
    Gpu(
        name="nvidia-tesla-a100",
        memory_gib=40,
        has_bfloat16=True,
        machines={
            1: ("a2-highgpu-1g",),
            2: ("a2-highgpu-2g",),
            4: ("a2-highgpu-4g",),
            8: ("a2-highgpu-8g",),
            16: ("a2-megagpu-16g",),
        },
        regions=frozenset([
            "asia-northeast1", "asia-northeast3", "asia-southeast1", "europe-west4", "me-west1",
            "us-central1", "us-east1", "us-west1", "us-west3", "us-west4",
        ]),
    ),
    Gpu(
        name="nvidia-a100-80gb",
        memory_gib=80,
        has_bfloat16=True,
        machines={
            1: ("a2-ultragpu-1g",),
            2: ("a2-ultragpu-2g",),
            4: ("a2-ultragpu-4g",),
            8: ("a2-ultragpu-8g",),
        },
        regions=frozenset([
            "asia-southeast1", "europe-west4", "us-central1", "us-east4", "us-east5",
        ]),
    ),
    Gpu(
        name="nvidia-h100-80gb",
        memory_gib=80,
        has_bfloat16=True,
        machines={
            1: ("a3-highgpu-1g",),
            2: ("a3-highgpu-2g",),
            4: ("a3-highgpu-4g",),
            8: ("a3-highgpu-8g",),
        },
        regions=frozenset([
            "asia-east1", "asia-northeast1", "asia-northeast3", "asia-south1", "asia-south2",
            "asia-southeast1", "australia-southeast1", "europe-north1", "europe-west1",
            "europe-west2", "europe-west3", "europe-west4", "europe-west8", "europe-west9",
            "northamerica-northeast2", "us-central1", "us-east4", "us-east5", "us-west1",
            "us-west4",
        ]),
    ),
    Gpu(
        name="nvidia-tesla-t4",
        memory_gib=16,
        has_bfloat16=False,
        machines={
            1: ("n1-standard-8", "n1-standard-4", "n1-standard-16"),
            2: ("n1-standard-16", "n1-standard-8", "n1-standard-32"),
            4: ("n1-standard-32", "n1-standard-16", "n1-standard-64"),
        },
        regions=frozenset(),
    ),
)  # fmt: skip
GPUS: Mapping[str, Gpu] = {gpu.name: gpu for gpu in _TYPES}
"""GPU types by name, from cheapest to dearest, except that T4, without bfloat16, is last."""


def smallest_gpu(precision: str, num_bytes: int, table_bytes: int = 0) -> Gpu | None:
    """Return the GPU with the least memory that computes in a precision and holds the weights.

    Args:
        precision: The model's precision.
        num_bytes: All weights, in bytes.
        table_bytes: Those of tables among them; see `Gpu.held`.
    """
    able = (gpu for gpu in GPUS.values() if gpu.computes(precision))
    fit = (gpu for gpu in able if gpu.holds(num_bytes, table_bytes))
    return min(fit, key=lambda gpu: gpu.memory_gib, default=None)
