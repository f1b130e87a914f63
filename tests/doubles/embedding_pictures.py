"""Texts with pictures as an EmbeddingGemma 2 reads them, for tests of its graphs and its engine."""

import functools
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers.models.embedding_gemma2.processing_embedding_gemma2 import (
    EmbeddingGemma2Processor,
)
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from beam_gemma.engine.sequence import Picture
from tests.doubles.embedding_gemma2_models import CHAT_TEMPLATE, embedding_of, seeing_model
from tests.doubles.gemma4_seeing import (
    BEGIN_ID,
    END_ID,
    IMAGE_ID,
    IMAGE_PROCESSOR,
    MARKERS,
    STEP,
)
from tests.doubles.sentence_model import tokenizer

BOS, EOS = 2, 1
LAST_TEXT_ID = 299


@dataclass(frozen=True)
class SeenText:
    """The token ids of a text, and its pictures."""

    token_ids: list[int]
    pictures: tuple[Picture, ...]

    @property
    def pixels(self) -> list[np.ndarray]:
        """The pixels of the pictures, in their order."""
        return [picture.values for picture in self.pictures]


def seen_text(sizes: Sequence[tuple[int, int]], num_words: int, *, seed: int) -> SeenText:
    """Return a text behind pictures, between `<bos>` and `<eos>`.

    Args:
        sizes: Heights and widths of the pictures in tokens; equal sizes and seeds are one picture.
        num_words: Number of tokens of the text.
        seed: What the pixels and the text are drawn from.
    """
    ids, pictures = [BOS], []
    for height, width in sizes:
        draw = np.random.default_rng([seed, height, width])
        pixels = draw.integers(0, 256, (3, height * STEP, width * STEP), np.uint8)
        digest = hashlib.blake2b(pixels.tobytes()).digest()
        ids.append(BEGIN_ID)
        pictures.append(Picture(len(ids), digest, pixels, height * width))
        ids += [IMAGE_ID] * (height * width) + [END_ID]
    ids += np.random.default_rng(seed).integers(3, LAST_TEXT_ID, num_words).tolist()
    return SeenText([*ids, EOS], tuple(pictures))


@dataclass(frozen=True)
class Read:
    """What transformers reads of a prompt, pictures and a text."""

    token_ids: list[int]
    pictures: dict[str, torch.Tensor]

    @torch.no_grad()
    def embedding(self) -> np.ndarray:
        """Return the reference's embedding [W]: the mean of all tokens, of length 1."""
        ids = torch.tensor([self.token_ids])
        output = seeing_model()(input_ids=ids, **self.pictures)
        return embedding_of(output.last_hidden_state[0].numpy())


@functools.cache
def seeing_tokenizer() -> transformers.GemmaTokenizer:
    """Return transformers' tokenizer with the markers of pictures and the release's template."""
    made = tokenizer(8192, MARKERS)
    made.chat_template = CHAT_TEMPLATE
    return made


def read(
    files: Sequence[bytes], text: str | None, *, prompt: str = "", max_soft_tokens: int = 70
) -> Read:
    """Return what transformers' tokenizer, its chat template and its processors make of a row.

    Args:
        files: The files of the pictures, which come before the text.
        text: The text; None if there is none.
        prompt: The system message.
        max_soft_tokens: Most tokens of a picture.
    """
    content: list[dict[str, Any]] = [{"type": "image"} for _ in files]
    content += [] if text is None else [{"type": "text", "text": text}]
    system = [{"role": "system", "content": prompt}] if prompt else []
    written = seeing_tokenizer().apply_chat_template(
        [*system, {"role": "user", "content": content}], tokenize=False
    )
    if not files:
        return Read(seeing_tokenizer()(written)["input_ids"], {})
    processor = Gemma4ImageProcessorPil(
        **IMAGE_PROCESSOR | {"max_soft_tokens": max_soft_tokens},
    )
    made = processor([Image.open(io.BytesIO(file)) for file in files], return_tensors="pt")
    begin, image, end = MARKERS
    names: Any = SimpleNamespace(boi_token=begin, image_token=image, eoi_token=end)
    counts = {"num_soft_tokens_per_image": made.pop("num_soft_tokens_per_image")}
    parts = written.split(image)
    shown = [
        EmbeddingGemma2Processor.replace_image_token(names, counts, number)
        for number in range(len(files))
    ]
    expanded = "".join(a + b for a, b in zip(parts, [*shown, ""], strict=True))
    return Read(seeing_tokenizer()(expanded)["input_ids"], dict(made))
