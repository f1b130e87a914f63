"""The part of a graph's contract that is about pictures, for the head `vision`.

Dimensions: N pictures, I pixels of a side, S pixels of a patch's side, L tokens of a picture, D
hidden size.
"""

from dataclasses import dataclass

from beam_gemma.model.graph_tensors import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureSignature:
    """Sizes of the pictures that a graph takes; all are 0 for a graph that takes none."""

    image_size: int = 0
    """Height and width of a picture in pixels; 0 if they vary."""
    num_image_tokens: int = 0
    """Tokens of the decoder that one picture takes, or most of them if sizes vary."""
    image_step: int = 0
    """Side in pixels of a square of a picture that is one token, if sizes vary: height and width
    are multiples of it. 0 for pictures of one size."""
    patch_size: int = 0
    """Side in pixels of the patches that such a square consists of."""

    def picture_inputs(self) -> tuple[Tensor, ...]:
        """Return the inputs of the head `vision`."""
        if not self.image_step:
            pixels = ("N", 3, self.image_size, self.image_size)
            return (Tensor(name="pixels", dtype="uint8", shape=pixels),)
        number = (self.image_step // self.patch_size) ** 2
        return (
            Tensor(name="patches", dtype="uint8", shape=("L", number, 3 * self.patch_size**2)),
            Tensor(name="patch_places", dtype="int64", shape=("L", number, 2)),
        )

    def picture_outputs(self, hidden_size: int, dtype: str) -> tuple[Tensor, ...]:
        """Return the outputs of the head `vision`, for a decoder of a width."""
        shape: tuple[int | str, ...] = ("N", self.num_image_tokens, hidden_size)
        if self.image_step:
            shape = ("L", hidden_size)
        return (Tensor(name="image_features", dtype=dtype, shape=shape),)

    def tokens_of(self, height: int, width: int) -> int | None:
        """Return the number of tokens of a picture; None if it has no size that the graph takes."""
        if not self.image_step:
            return self.num_image_tokens if height == width == self.image_size else None
        step, found = self.image_step, (height // self.image_step) * (width // self.image_step)
        is_whole = not (height % step or width % step)
        return found if is_whole and 0 < found <= self.num_image_tokens else None

    @property
    def sizes_of_pictures(self) -> str:
        """The height and width of the graph's pictures in words, for errors."""
        if not self.image_step:
            return f"{self.image_size} by {self.image_size} pixels"
        return (
            f"a height and width in multiples of {self.image_step} pixels with at most "
            f"{self.num_image_tokens:,} such squares"
        )
