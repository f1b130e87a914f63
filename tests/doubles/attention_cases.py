"""Calls of attention over paged caches, in either layout, and its lowerings on the CPU."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from beam_gemma.model.signature import CONTEXT_ALIGNMENT
from export.ops import lowering_cpu, lowering_wide
from export.ops.lowering_wide import WIDEST_SLICE, slices_of
from export.ops.reference import NO_WINDOW, ragged_attention
from tests.doubles.op_sessions import op_session

BLOCK = 16
Lowered = Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]


@dataclass(frozen=True)
class Case:
    """One call of the op: sequences of `new` tokens after `past` ones."""

    num_heads: int = 4
    num_kv_heads: int = 1
    head_dim: int = 16
    window: int = NO_WINDOW
    softcap: float = 0.0
    new: tuple[int, ...] = (5, 1, 37)
    past: tuple[int, ...] = (0, 140, 20)
    starts: tuple[int, ...] = (0, 0, 0)
    spans: bool = False
    beyond: bool = False
    """True if tokens reach the start of their sequence in spite of a window."""
    query_tile: int = 64
    layout: Literal["cpu", "cuda"] = "cpu"
    block: int = BLOCK

    def inputs(self) -> dict[str, np.ndarray]:
        """Return random inputs."""
        rng = np.random.default_rng(3)
        total, align, block = sum(self.new), max(CONTEXT_ALIGNMENT, self.block), self.block
        cache = (self.num_kv_heads, 64, block, self.head_dim)
        if self.layout == "cuda":
            cache = (64, block, self.num_kv_heads, self.head_dim)
        normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
        positions = [np.arange(p, p + n) for p, n in zip(self.past, self.new, strict=True)]
        last = [np.full_like(p, p[-1]) if self.spans else p for p in positions]
        reach = [p[-1] + 1 - s for p, s in zip(positions, self.starts, strict=True)]
        table = np.zeros((len(self.new), -(-max(reach) // align) * align // block), np.int32)
        free = iter(rng.permutation(np.arange(1, 64)))
        slots = []
        for row, (count, start, p) in enumerate(zip(reach, self.starts, positions, strict=True)):
            for column in range(-(-count // block)):
                table[row, column] = next(free)
            slots.append(table[row, (p - start) // block] * block + (p - start) % block)
        return {
            "query": normal(total, self.num_heads * self.head_dim),
            "key": normal(total, self.num_kv_heads * self.head_dim),
            "value": normal(total, self.num_kv_heads * self.head_dim),
            "key_cache": normal(*cache),
            "value_cache": normal(*cache),
            "cu_seqlens": np.cumsum([0, *self.new]).astype(np.int32),
            "past_seqlens": np.array(self.past, np.int32),
            "block_table": table,
            "slot_mapping": np.concatenate(slots).astype(np.int32),
            "context_starts": np.array(self.starts, np.int32),
            "first_keys": np.concatenate([self._first(p) for p in positions]).astype(np.int32),
            "last_keys": np.concatenate(last).astype(np.int32),
        }

    def _first(self, positions: np.ndarray) -> np.ndarray:
        """Return the first position that each of a sequence's tokens reaches."""
        return np.zeros_like(positions) if self.beyond else positions - self.window + 1

    def eager(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Return the reference in float64."""
        tensors = [torch.from_numpy(a) for a in inputs.values()]
        tensors = [t.double() if t.is_floating_point() else t for t in tensors]
        heads, scale = (self.num_heads, self.num_kv_heads), self.head_dim**-0.5
        outputs = ragged_attention(*tensors, *heads, self.window, scale, self.softcap, self.layout)
        return [t.numpy() for t in outputs]

    def written(self) -> dict[str, np.ndarray]:
        """Return random inputs of which the caches hold the new tokens already."""
        inputs = self.inputs()
        caches = [cache.astype(np.float32) for cache in self.eager(inputs)[1:]]
        return inputs | dict(zip(("key_cache", "value_cache"), caches, strict=True))

    def attributes(self) -> dict[str, int | float]:
        """Return the attributes of a node of this case, by the CPU's lowering."""
        attributes = {
            "num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads,
            "block_size": self.block, "query_tile": self.query_tile, "scale": self.head_dim**-0.5,
        }  # fmt: skip
        if self.head_dim > WIDEST_SLICE:
            attributes["num_slices"] = slices_of(self.head_dim)
        return attributes | ({"softcap": self.softcap} if self.softcap else {})

    def lowered(self, op: str, *, num_threads: int = 1) -> Lowered:
        """Return a function that runs `RaggedAttention` or `CachedAttention` as a node.

        It takes inputs by name, which may have more of them, and returns the outputs.
        """
        ragged = op == "RaggedAttention"
        inputs = self.inputs()
        del inputs["past_seqlens"]
        if not ragged:
            inputs = {n: a for n, a in inputs.items() if n not in ("key", "value", "slot_mapping")}
        session = op_session(
            ("Wide" if self.head_dim > WIDEST_SLICE else "") + op + "Softcap" * bool(self.softcap),
            self.attributes(),
            inputs,
            (*lowering_cpu.FUNCTIONS, *lowering_cpu.CACHED, *lowering_wide.FUNCTIONS),
            num_threads=num_threads,
            outputs=("output", "key_out", "value_out") if ragged else ("output",),
        )
        return lambda given: session.run(None, {name: given[name] for name in inputs})


CASES = {
    "grouped queries": Case(num_heads=8, num_kv_heads=4),
    "one query head for each key head": Case(num_heads=4, num_kv_heads=4),
    "one key head": Case(),
    "widest heads": Case(head_dim=256),
    "window": Case(window=8),
    "window of one token": Case(window=1),
    "softcap": Case(softcap=0.7),
    "softcap and window": Case(softcap=0.7, window=30, num_heads=8, num_kv_heads=4, head_dim=256),
    "table without its first blocks": Case(window=60, past=(0, 300, 200), starts=(0, 128, 0)),
    "span attended both ways": Case(spans=True),
    "span within a window": Case(spans=True, window=8),
    "span beyond a window": Case(spans=True, window=8, beyond=True),
    "decode alone": Case(new=(1,), past=(77,), starts=(0,), num_heads=4, num_kv_heads=4),
    "long chunks": Case(new=(300, 2), past=(0, 0), starts=(0, 0)),
}
