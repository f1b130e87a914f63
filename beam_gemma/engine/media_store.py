"""Embeddings of pictures and sounds, computed just before the step that needs them and then kept.

Rows often share a picture, and a preempted row needs its pictures again. So embeddings are kept by
the digest of what they are made of, up to a number of bytes; those that no step has needed for the
longest time go first. A step's own embeddings stay until the next step, however many bytes they
take.

Dimensions: L tokens of a medium, D hidden.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Shaped

from beam_gemma.engine.sequence import Medium
from beam_gemma.errors import ArtifactError
from beam_gemma.model.artifact import PURPOSES
from beam_gemma.model.signature import Signature

MAX_BYTES = 256 << 20
"""Default bound of kept embeddings: about 200 pictures of a 4B model in 16 bits."""


@runtime_checkable
class MediaEncoder(Protocol):
    """Interface of the session that makes embeddings of pictures, or of sounds."""

    signature: Signature

    def encode(
        self, values: Sequence[Shaped[np.ndarray, "..."]]
    ) -> list[Shaped[np.ndarray, "_ D"]]:
        """Return the embeddings of each medium, which do not depend on the other ones."""


class MediaStore:
    """Keeps embeddings of pictures and sounds; only one thread at a time may use it."""

    def __init__(
        self, encoders: Mapping[type[Medium], MediaEncoder], *, max_bytes: int = MAX_BYTES
    ) -> None:
        """Start empty.

        Args:
            encoders: The sessions that compute embeddings, by the kind of what they take.
            max_bytes: Most bytes to keep beyond those that one step needs.
        """
        self.num_computed: Counter[type[Medium]] = Counter()
        """Number of media computed, by kind."""
        self.num_reused: Counter[type[Medium]] = Counter()
        """Number of media that steps needed and that were not computed for them, by kind."""
        self._encoders = encoders
        self._max_bytes = max_bytes
        self._kept: OrderedDict[bytes, np.ndarray] = OrderedDict()  # the latest needed last
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Size of the kept embeddings in bytes."""
        return self._num_bytes

    def prepare(self, media: Sequence[Medium]) -> dict[bytes, Shaped[np.ndarray, "_ D"]]:
        """Return the embeddings of a step's media by digest; compute those that are not kept.

        Args:
            media: Pictures and sounds of all sequences of the step; equal ones are computed once.

        Raises:
            Exception: an encoder's own; nothing changes then.
        """
        needed = {medium.digest: medium for medium in media}
        computed = [self._computed(kind, needed.values()) for kind in self._encoders]
        self.num_reused.update(map(type, media))
        for kind, features in zip(self._encoders, computed, strict=True):
            self.num_computed[kind] += len(features)
            self.num_reused[kind] -= len(features)
            self._kept |= features
            self._num_bytes += sum(each.nbytes for each in features.values())
        for digest in needed:
            self._kept.move_to_end(digest)
        while self._num_bytes > self._max_bytes and len(self._kept) > len(needed):
            _, gone = self._kept.popitem(last=False)
            self._num_bytes -= gone.nbytes
        return {digest: self._kept[digest] for digest in needed}

    def _computed(self, kind: type[Medium], media: Iterable[Medium]) -> dict[bytes, np.ndarray]:
        """Return the embeddings of media of one kind that are not kept."""
        missing = [m for m in media if type(m) is kind and m.digest not in self._kept]
        if not missing:
            return {}
        features = self._encoders[kind].encode([medium.values for medium in missing])
        return {medium.digest: each for medium, each in zip(missing, features, strict=True)}


def check_encoder(encoder: Signature, decoder: Signature) -> None:
    """Check that a graph's embeddings suit a decoder.

    Raises:
        ArtifactError: their types or widths differ, or the decoder takes no embeddings.
    """
    takes = "inputs_embeds" in decoder.optional_inputs
    expected = (decoder.hidden_size, decoder.dtype if takes else "no embeddings")
    got = (encoder.hidden_size, encoder.dtype)
    if got != expected:
        raise ArtifactError(
            f"graph to {PURPOSES[encoder.head]}: expected embeddings as the decoder takes them, "
            f"{expected}, got {got}; export the model again"
        )
