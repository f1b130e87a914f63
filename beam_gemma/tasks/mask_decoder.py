"""Decoder of PaliGemma's segment tokens: 16 codes become the mask inside a box.

It is the decoder of the VQ-VAE that google-research/big_vision publishes as `vae-oid.npz`, with the
layers and names of `evaluators/proj/paligemma/transfers/segmentation.py` there: 4 x 4 entries of a
codebook, a convolution, two residual blocks, and four transposed convolutions to 64 x 64 values
from -1 (not the object) to 1. It runs in NumPy, for one box at a time, and on any worker.

Dimensions: H height, W width.
"""

import functools
import hashlib
import io
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import numpy as np
from jaxtyping import Float, UInt8

from beam_gemma.errors import OptionsError, one_line
from beam_gemma.tasks.boxes import NUM_SEGMENT_CODES

CODEBOOK = "_vq_vae._embedding"
MASK_SIZE = 64
"""Height and width of a mask."""
MAX_FILE_BYTES = 64 << 20
"""Largest file; the published one, whose other half encodes masks, has a few megabytes."""
_WIDTH = 128
_SIDE = 4
_UPSAMPLED = (128, 64, 32, 16)
"""Channels after each transposed convolution."""
_EMBEDDING = 512

Activations = Float[np.ndarray, "_ _ _"]
"""Values by channel, line and column."""


class MaskDecoder:
    """Turns the segment tokens of a box into its mask.

    Example:
        >>> weights = {name: np.zeros(shape, np.float32) for name, shape in TENSORS.items()}
        >>> MaskDecoder(weights).mask(range(16)).shape
        (64, 64)
    """

    def __init__(self, weights: Mapping[str, np.ndarray]) -> None:
        """Keep the decoder's weights, in float32.

        Args:
            weights: Tensors by their published names; those of the encoder are left out.

        Raises:
            OptionsError: a tensor is missing, or has another shape or a type without fractions.
        """
        self._weights: dict[str, np.ndarray] = {}
        for name, shape in TENSORS.items():
            if name not in weights:
                raise OptionsError(
                    f"mask decoder: expected a tensor {name}, got none; take vae-oid.npz as "
                    "big_vision publishes it"
                )
            tensor = weights[name]
            if tensor.shape != shape or tensor.dtype.kind != "f":
                raise OptionsError(
                    f"mask decoder: expected numbers with fractions of shape {shape} as {name}, "
                    f"got {tensor.dtype} of shape {tensor.shape}; take vae-oid.npz as big_vision "
                    "publishes it"
                )
            self._weights[name] = tensor.astype(np.float32)

    @classmethod
    def from_file(cls, path: str | Path) -> "MaskDecoder":
        """Read the weights from an `.npz` file on this machine or on gs://.

        Raises:
            OptionsError: the file cannot be read, or has other tensors.
        """
        with _faults(path), np.load(io.BytesIO(_content(path)), allow_pickle=False) as file:
            return cls({name: file[name] for name in TENSORS if name in file})

    def mask(self, codes: Sequence[int]) -> Float[np.ndarray, "64 64"]:
        """Return a mask, about -1 to 1; values above 0 belong to the object.

        Args:
            codes: The numbers of a box's 16 segment tokens.
        """
        entries = self._weights[CODEBOOK][list(codes)]
        values = entries.reshape(_SIDE, _SIDE, _EMBEDDING).transpose(2, 0, 1)
        values = _relu(self._convolved("decoder.0", values))
        for block in ("decoder.2", "decoder.3"):
            inner = values
            for layer in (0, 2):
                inner = _relu(self._convolved(f"{block}.net.{layer}", inner))
            values = values + self._convolved(f"{block}.net.4", inner)
        for layer in (4, 6, 8, 10):
            values = _relu(self._upsampled(f"decoder.{layer}", values))
        (mask,) = self._convolved("decoder.12", values)
        return mask

    def png(self, codes: Sequence[int]) -> bytes:
        """Return a mask as a grey picture of 64 x 64 pixels, to be stretched over its box.

        -1 becomes 0, and 1 becomes 255; pixels of 128 and more belong to the object.
        """
        grey = np.clip(np.floor((self.mask(codes) + 1) * 127.5 + 0.5), 0, 255)
        return _png(grey.astype(np.uint8))

    def _convolved(self, name: str, values: Activations) -> Activations:
        """Return a convolution that keeps the size."""
        weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        reach = weight.shape[-1] // 2
        padded = np.pad(values, ((0, 0), (reach, reach), (reach, reach)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[2:], axis=(1, 2))
        return np.tensordot(weight, windows, axes=((1, 2, 3), (0, 3, 4))) + bias[:, None, None]

    def _upsampled(self, name: str, values: Activations) -> Activations:
        """Return a transposed convolution of stride 2, which doubles the size."""
        weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        _, height, width = values.shape
        spread = np.tensordot(weight, values, axes=((0,), (0,)))
        # The kernel reaches one pixel beyond each edge.
        sums = np.zeros((weight.shape[1], 2 * height + 2, 2 * width + 2), np.float32)
        for y in range(weight.shape[2]):
            for x in range(weight.shape[3]):
                sums[:, y : y + 2 * height : 2, x : x + 2 * width : 2] += spread[:, y, x]
        return sums[:, 1:-1, 1:-1] + bias[:, None, None]


@functools.lru_cache(maxsize=8)
def digest_of(path: str) -> str:
    """Return a digest of a decoder's file, on which the masks of a job depend.

    Raises:
        OptionsError: the file cannot be read.
    """
    with _faults(path):
        return hashlib.sha256(_content(path)).hexdigest()


def _content(path: str | Path) -> bytes:
    # Imports Beam, which this module does without otherwise.
    from beam_gemma.storage import open_file

    with open_file(str(path)) as stream:
        content = stream.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"more than {MAX_FILE_BYTES:,} bytes")
    return bytes(content)


@contextmanager
def _faults(path: str | Path) -> Iterator[None]:
    """Context manager that names the file in whatever a file system or NumPy raises of it."""
    try:
        yield
    except OptionsError:
        raise
    except Exception as error:  # a damaged file may raise anything
        raise OptionsError(
            f"mask decoder {path}: expected the .npz file of a decoder, got {one_line(error)[:300]}"
        ) from error


def _tensors() -> dict[str, tuple[int, ...]]:
    """Return the shapes of the decoder's tensors; a transposed one has its inputs first."""
    shapes = {"decoder.0": (_WIDTH, _EMBEDDING, 1, 1)}
    for block in ("decoder.2.net", "decoder.3.net"):
        for layer, size in ((0, 3), (2, 3), (4, 1)):
            shapes[f"{block}.{layer}"] = (_WIDTH, _WIDTH, size, size)
    before = _WIDTH
    biases = {name: shape[:1] for name, shape in shapes.items()}
    for layer, after in zip((4, 6, 8, 10), _UPSAMPLED, strict=True):
        shapes[f"decoder.{layer}"] = (before, after, 4, 4)
        biases[f"decoder.{layer}"] = (after,)
        before = after
    shapes["decoder.12"], biases["decoder.12"] = (1, before, 1, 1), (1,)
    tensors: dict[str, tuple[int, ...]] = {CODEBOOK: (NUM_SEGMENT_CODES, _EMBEDDING)}
    for name, shape in shapes.items():
        tensors |= {f"{name}.weight": shape, f"{name}.bias": biases[name]}
    return tensors


TENSORS: Mapping[str, tuple[int, ...]] = MappingProxyType(_tensors())
"""Shape of each of the decoder's tensors, by name."""


def _relu(values: Activations) -> Activations:
    return np.maximum(values, 0)


def _png(grey: UInt8[np.ndarray, "H W"]) -> bytes:
    """Return a grey picture as a PNG file; see the W3C's specification of PNG."""
    height, width = grey.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    # Each line begins with the number of its filter; 0 is none.
    lines = np.pad(grey, ((0, 0), (1, 0))).tobytes()
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
