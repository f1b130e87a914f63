"""How a model makes an embedding of a text, beside its layers: what its export settled.

Names follow the modules of sentence-transformers.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Pooling = Literal["mean", "lasttoken"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingConfig:
    """From token states to one embedding, and what a text is given before it is encoded."""

    pooling: Pooling
    """`mean` of all tokens' states, or the state of the last token."""
    dense_sizes: tuple[int, ...] = ()
    """Width after each dense layer."""
    normalize: bool = True
    """Whether embeddings have length 1."""
    max_tokens: int
    """Longest text, with its prompt and control tokens."""
    add_bos: bool = True
    """Whether `<bos>` comes before a text."""
    add_eos: bool = False
    """Whether `<eos>` comes after it."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """What is put before a text, by the name of a task."""
    default_prompt_name: str | None = None
    """The prompt of those who name none."""
    similarity: str = "cosine"
    """How embeddings are compared: a note for whoever reads them."""

    def size(self, hidden_size: int) -> int:
        """Return the width of an embedding."""
        return (hidden_size, *self.dense_sizes)[-1]

    def to_json(self) -> dict[str, Any]:
        """Return a form for the manifest that `from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "EmbeddingConfig":
        """Read what `to_json` wrote."""
        return cls(**{**raw, "dense_sizes": tuple(raw["dense_sizes"])})
