"""Encoder states of sources, computed just before the step that needs them and kept for later ones.

The decoder needs the states of a source once for each row, in the step that computes the row's
first tokens: the caches hold their keys and values from then on. Rows often share a source, and a
preempted row needs its own again. So states are kept by the digest of the source, up to a number of
bytes; those that no step has needed for the longest time go first. A step's own states stay until
the next step, however many bytes they take.

Missing states are computed in steps of whole sources, longest first. A source longer than the token
budget runs alone.

Dimensions: T tokens of a step of the encoder, N tokens of a source, U width of the encoder.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Shaped

from beam_gemma.engine.embedding_engine import feeds, whole_text_steps
from beam_gemma.engine.media_store import MediaStore
from beam_gemma.engine.packing import NO_FEATURES, place_embeddings
from beam_gemma.engine.sequence import Sequence as Row
from beam_gemma.errors import ArtifactError, DeviceError
from beam_gemma.model.signature import Signature
from beam_gemma.runtime.step_interface import SourceEncoder
from beam_gemma.runtime.step_shapes import num_texts

MAX_BYTES = 256 << 20
"""Default bound of kept states: about 40,000 tokens of a 2B model in 32 bits."""
States: TypeAlias = Shaped[np.ndarray, "N U"]
"""States of a source; bfloat16, which numpy lacks, as uint16."""


class SourceStore:
    """Keeps encoder states of sources; only one thread at a time may use it."""

    def __init__(
        self,
        encoder: SourceEncoder,
        *,
        max_num_batched_tokens: int,
        media: MediaStore | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """Start empty.

        Args:
            encoder: The session that computes states.
            max_num_batched_tokens: Maximum tokens of a step, unless a single source has more.
            media: The embeddings of pictures and sounds; None if no source has any.
            max_bytes: Most bytes to keep beyond those that one step needs.
        """
        self.num_computed = 0
        """Number of sources computed."""
        self.num_reused = 0
        """Number of sources that rows needed and that were not computed for them."""
        self._encoder = encoder
        self._budget = max_num_batched_tokens
        is_cuda = encoder.signature.device == "cuda"
        self._max_num_sources = num_texts(self._budget) if is_cuda else None
        self._media = media
        self._max_bytes = max_bytes
        self._kept: OrderedDict[bytes, States] = OrderedDict()  # the latest needed last
        self._num_bytes = 0
        self._num_new_tokens = 0

    @property
    def num_bytes(self) -> int:
        """Size of the kept states in bytes."""
        return self._num_bytes

    def prepare(self, rows: Sequence[Row]) -> dict[bytes, States]:
        """Return the states of rows' sources by digest; compute those that are not kept.

        Args:
            rows: Rows that start in a step; equal sources are computed once.

        Raises:
            DeviceError: the encoder failed; the sources that it computed before are kept.
            Exception: the vision encoder's own.
        """
        needed = {row.source_digest: row for row in rows}
        missing = [row for digest, row in needed.items() if digest not in self._kept]
        self._compute(missing)
        self.num_computed += len(missing)
        self.num_reused += len(rows) - len(missing)
        for digest in needed:
            self._kept.move_to_end(digest)
        while self._num_bytes > self._max_bytes and len(self._kept) > len(needed):
            _, states = self._kept.popitem(last=False)
            self._num_bytes -= states.nbytes
        return {digest: self._kept[digest] for digest in needed}

    def take_num_new_tokens(self) -> int:
        """Return the number of tokens that the encoder has computed since the last call."""
        num_new_tokens, self._num_new_tokens = self._num_new_tokens, 0
        return num_new_tokens

    def _compute(self, rows: Sequence[Row]) -> None:
        """Compute and keep the states of rows' sources, which differ."""
        lengths = [row.num_source_tokens for row in rows]
        for step in whole_text_steps(lengths, self._budget, self._max_num_sources):
            together = [rows[i] for i in step]
            for row, states in zip(together, self._encode(together), strict=True):
                self._kept[row.source_digest] = states
                self._num_bytes += states.nbytes

    def _encode(self, rows: Sequence[Row]) -> list[States]:
        """Return the states of rows' sources, computed in one step."""
        sources = [row.request.source_token_ids for row in rows]
        inputs = feeds(sources)
        num_tokens = len(inputs["input_ids"])
        signature = self._encoder.signature
        if "inputs_embeds" in signature.optional_inputs:
            media = [medium for row in rows for medium in row.request.media]
            features = NO_FEATURES
            if self._media is not None and media:
                features = self._media.prepare(media)
            starts = inputs["cu_seqlens"].tolist()
            ranges = [
                (begin, 0, len(source), row.request.media)
                for begin, source, row in zip(starts, sources, rows, strict=False)
            ]
            inputs |= place_embeddings(ranges, num_tokens, signature, features)
        try:
            states = self._encoder.encode(inputs)
        except Exception as error:  # a device may raise any type; only the rows at fault end
            raise DeviceError(
                f"encoder: expected the states of {len(rows)} sources of {num_tokens:,} tokens, "
                f"got {type(error).__name__}: {error}"
            ) from error
        self._num_new_tokens += num_tokens
        ends = inputs["cu_seqlens"].tolist()[1:]
        return [states[end - len(s) : end].copy() for end, s in zip(ends, sources, strict=True)]


def check_source_encoder(encoder: Signature | None, decoder: Signature) -> None:
    """Check that a graph's states of sources suit a decoder.

    Raises:
        ArtifactError: their types or widths differ, or one of the two graphs is without the other.
    """
    expected = (decoder.source_size, decoder.dtype) if decoder.has_source else "none"
    got = (encoder.hidden_size, encoder.dtype) if encoder else "none"
    if got != expected:
        raise ArtifactError(
            f"graph of sources: expected states as the decoder takes them, {expected}, got {got}; "
            "export the model again"
        )
