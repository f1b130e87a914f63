"""Embeddings of pictures, computed just before the step that needs them and kept for later ones.

Rows often share a picture, and a preempted row needs its pictures again. So embeddings are kept by
the digest of the pictures, up to a number of bytes; those that no step has needed for the longest
time go first. A step's own embeddings stay until the next step, however many bytes they take.

Dimensions: I height and J width in pixels, L tokens of a picture, D hidden.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Shaped, UInt8

from beam_gemma.engine.sequence import Picture
from beam_gemma.errors import ArtifactError
from beam_gemma.model.signature import Signature

MAX_BYTES = 256 << 20
"""Default bound of kept embeddings: about 200 pictures of a 4B model in 16 bits."""


@runtime_checkable
class PictureEncoder(Protocol):
    """Interface of the session that makes embeddings of pictures."""

    signature: Signature

    def encode(
        self, pixels: Sequence[UInt8[np.ndarray, "3 _ _"]]
    ) -> list[Shaped[np.ndarray, "_ D"]]:
        """Return the embeddings of each picture, which do not depend on the other pictures."""


class PictureStore:
    """Keeps embeddings of pictures; only one thread at a time may use it."""

    def __init__(self, encoder: PictureEncoder, *, max_bytes: int = MAX_BYTES) -> None:
        """Start empty.

        Args:
            encoder: The session that computes embeddings.
            max_bytes: Most bytes to keep beyond those that one step needs.
        """
        self.num_computed = 0
        """Number of pictures computed."""
        self.num_reused = 0
        """Number of pictures that steps needed and that were not computed for them."""
        self._encoder = encoder
        self._max_bytes = max_bytes
        self._kept: OrderedDict[bytes, np.ndarray] = OrderedDict()  # the latest needed last
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Size of the kept embeddings in bytes."""
        return self._num_bytes

    def prepare(self, pictures: Sequence[Picture]) -> dict[bytes, Shaped[np.ndarray, "_ D"]]:
        """Return the embeddings of a step's pictures by digest; compute those that are not kept.

        Args:
            pictures: Pictures of all sequences of the step; equal ones are computed once.

        Raises:
            Exception: the encoder's own; nothing changes then.
        """
        needed = {picture.digest: picture for picture in pictures}
        missing = [digest for digest in needed if digest not in self._kept]
        if missing:
            computed = self._encoder.encode([needed[digest].pixels for digest in missing])
            for digest, features in zip(missing, computed, strict=True):
                self._kept[digest] = features
                self._num_bytes += features.nbytes
        self.num_computed += len(missing)
        self.num_reused += len(pictures) - len(missing)
        for digest in needed:
            self._kept.move_to_end(digest)
        while self._num_bytes > self._max_bytes and len(self._kept) > len(needed):
            _, features = self._kept.popitem(last=False)
            self._num_bytes -= features.nbytes
        return {digest: self._kept[digest] for digest in needed}


def check_encoder(encoder: Signature, decoder: Signature) -> None:
    """Check that a graph's embeddings of pictures suit a decoder.

    Raises:
        ArtifactError: their types or widths differ, or the decoder takes no embeddings.
    """
    takes = "inputs_embeds" in decoder.optional_inputs
    expected = (decoder.hidden_size, decoder.dtype if takes else "no embeddings")
    got = (encoder.hidden_size, encoder.dtype)
    if got != expected:
        raise ArtifactError(
            f"graph of pictures: expected embeddings as the decoder takes them, {expected}, got "
            f"{got}; export the model again"
        )
