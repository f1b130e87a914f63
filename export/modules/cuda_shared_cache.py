"""The decoder of a Gemma 3n or a Gemma 4 with shared caches for CUDA, whose rows are inputs.

A captured graph computes no shape, so which sequence a row belongs to, and where each row starts,
come with the step.

Dimensions: R packed positions that need a head.
"""

from collections.abc import Callable

from torch import Tensor

from export.modules.heads import Named
from export.modules.shared_cache import SharedCacheDecoder


class CudaSharedCacheDecoder(SharedCacheDecoder):
    """One ragged step of a decoder whose last layers read the caches of earlier ones, for CUDA."""

    def rows(
        self, step: Named, positions: Tensor, attend: Callable[..., Tensor], state: Named
    ) -> Tensor:
        """Return the residual stream [R, D] of the rows that need a head; a step is padded to some.

        The arguments are those of `SharedCacheDecoder.rows`.
        """
        return self._rows(step, positions, attend, state)

    def _reach_of_rows(self, step: Named, positions: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the first and last position that each row reaches, for each layer type."""
        return self._reach(step, positions)

    def _as_sequences(self, step: Named, positions: Tensor) -> Named:
        """Return a step's inputs with a sequence of one token for each row that needs a head.

        Args:
            step: The step's inputs.
            positions: [R], each row's position; attention takes `row_past_seqlens`, which is 0
                for padding rows, so that these read one cell of the cache.
        """
        del positions
        tables = {
            name: tensor.index_select(0, step["row_sequences"])
            for name, tensor in step.items()
            if name.startswith("block_table.")
        }
        return {
            **tables,
            "cu_seqlens": step["row_cu_seqlens"],
            "past_seqlens": step["row_past_seqlens"],
            "no_slots": step["logit_rows"].clamp(max=-1).int(),
        }
