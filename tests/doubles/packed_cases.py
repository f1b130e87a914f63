"""Calls of `packed_attention`, with its reference and its lowering."""

import dataclasses

import numpy as np
import onnxruntime
import torch

from export.ops import lowering_packed, lowering_wide
from export.ops.lowering_wide import WIDEST_SLICE, slices_of
from export.ops.reference import NO_WINDOW, packed_attention
from tests.doubles.op_sessions import op_session

LENGTHS = (5, 1, 37, 300, 64, 2, 130)


@dataclasses.dataclass(frozen=True)
class PackedCase:
    """One call of the op."""

    num_heads: int = 3
    num_kv_heads: int = 1
    head_dim: int = 256
    back: int = NO_WINDOW
    ahead: int = NO_WINDOW
    softcap: float = 0.0
    lengths: tuple[int, ...] = LENGTHS

    @property
    def scale(self) -> float:
        """Factor under which scores differ by a few units, as in a trained model."""
        return self.head_dim**-0.5

    def inputs(self) -> dict[str, np.ndarray]:
        """Return random inputs."""
        rng = np.random.default_rng(3)
        shape = {"query": self.num_heads, "key": self.num_kv_heads, "value": self.num_kv_heads}
        tensors = {
            name: rng.standard_normal((sum(self.lengths), heads * self.head_dim), np.float32)
            for name, heads in shape.items()
        }
        return tensors | {"cu_seqlens": np.cumsum([0, *self.lengths]).astype(np.int32)}

    def eager(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Return the reference in float64."""
        tensors = [torch.from_numpy(a) for a in inputs.values()]
        tensors = [t.double() if t.is_floating_point() else t for t in tensors]
        heads = (self.num_heads, self.num_kv_heads)
        reach = (self.back, self.ahead)
        return packed_attention(*tensors, *heads, *reach, self.scale, self.softcap).numpy()

    def session(self, num_threads: int) -> onnxruntime.InferenceSession:
        """Return the lowering, ready to run."""
        attributes = {
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "num_slices": -(-self.head_dim // 64),
            "back": self.back,
            "ahead": self.ahead,
            "scale": self.scale,
        }
        name = "PackedAttention"
        if self.softcap:
            name, attributes["softcap"] = "PackedAttentionSoftcap", self.softcap
        if self.head_dim > WIDEST_SLICE:
            name, attributes["num_score_slices"] = "WidePackedAttention", slices_of(self.head_dim)
        functions = (*lowering_packed.FUNCTIONS, *lowering_wide.FUNCTIONS)
        return op_session(name, attributes, self.inputs(), functions, num_threads=num_threads)
