"""Per-layer embeddings: what each layer of a Gemma 3n, a Gemma 4 or an EmbeddingGemma 2 adds.

A token has one embedding for each layer. Half of it comes from a table of the vocabulary, which is
large and of which a step reads few rows; the other half is a projection of the token's embedding.
EmbeddingGemma 2 has the projection alone. The formulas follow `Gemma4TextModel` and
`Gemma3nTextModel` of transformers 5.23.

Dimensions: T tokens, L layers, D hidden, P width of per-layer embeddings.
"""

import torch
from torch import Tensor, nn

from beam_gemma.model.config import GemmaConfig
from export.modules.layers import RMSNorm, root_mean_square

LEAST_SQUARE = 1e-20
"""Least mean square that a row is divided by; only rows of zeros, or nearly, have less."""


class Table(nn.Embedding):
    """The table of per-layer embeddings [V, L * P], whose dtype may differ from the model's."""


def per_layer_inputs(
    ids: Tensor,
    x: Tensor,
    table: Table | None,
    projection: nn.Linear,
    norm: RMSNorm,
    table_factor: float,
) -> Tensor:
    """Return the per-layer embeddings [T, L, P] of tokens.

    Args:
        ids: [T], token ids. One that the table does not have takes its first row.
        x: [T, D], the tokens' embeddings, scaled.
        table: The table of the vocabulary; None if there is none.
        projection: The projection of x.
        norm: The norm of what is projected.
        table_factor: Factor of the table's rows.
    """
    projected = projection(x.to(projection.weight.dtype)).to(x.dtype) * x.shape[1] ** -0.5
    projected = norm(projected.view(x.shape[0], -1, len(norm.weight)))
    if table is None:
        return projected
    rows = table(torch.where(ids < table.num_embeddings, ids, 0)).to(x.dtype)
    return (projected + rows.view(projected.shape) * table_factor) * 0.5**0.5


class PerLayerGate(nn.Module):
    """The part of a layer that adds its per-layer embedding to the residual stream."""

    inner: torch.dtype | None

    def add_gate(self, config: GemmaConfig) -> None:
        """Make the matrices and the norm, under their names in checkpoints."""
        assert config.hidden_size_per_layer_input is not None
        hidden, width = config.hidden_size, config.hidden_size_per_layer_input
        self.per_layer_input_gate = nn.Linear(hidden, width, bias=False)
        self.per_layer_projection = nn.Linear(width, hidden, bias=False)
        self.post_per_layer_input_norm = RMSNorm(hidden, config.rms_norm_eps)

    def gated(self, x: Tensor, inputs: Tensor) -> Tensor:
        """Return what a layer's embeddings [T, P] add to a stream that is gated by x [T, D]."""
        gate = self._product(self.per_layer_input_gate, x)
        gate = nn.functional.gelu(gate, approximate="tanh") * inputs.to(gate.dtype)
        return self.post_per_layer_input_norm(self._product(self.per_layer_projection, gate))

    def _product(self, matrix: nn.Linear, x: Tensor) -> Tensor:
        """Return the product of a matrix with x [T, D], in the dtype of x.

        Where `inner` is float16, x is the residual stream or of its magnitude, which that dtype
        does not hold: each row is divided by its root mean square before, and multiplied after.
        """
        if self.inner is None:
            return matrix(x)
        size = root_mean_square(x, least=LEAST_SQUARE)
        return matrix((x / size).to(self.inner)).to(x.dtype) * size
