"""Embedding configuration of an exported model: pooling, dense layers and prompts.

Names follow the modules of sentence-transformers.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Pooling = Literal["mean", "lasttoken"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingConfig:
    """Settings to turn token states into an embedding, and to prepare texts for encoding."""

    pooling: Pooling
    """`mean` of all tokens' states, or `lasttoken` for the state of the last token."""
    dense_sizes: tuple[int, ...] = ()
    """Width after each dense layer."""
    normalize: bool = True
    """True if embeddings are scaled to length 1."""
    max_tokens: int
    """Longest text in tokens, including its prompt and control tokens."""
    add_bos: bool = True
    """True if `<bos>` comes before a text."""
    add_eos: bool = False
    """True if `<eos>` comes after a text."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """Prefixes for texts, by task name."""
    default_prompt_name: str | None = None
    """Name of the prompt to use if none is requested; None for no prompt."""
    similarity: str = "cosine"
    """Recommended similarity function, for information only."""

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
