"""Tiny models that see, exported once in a run, and requests with pictures for them."""

import functools
import hashlib
from pathlib import Path

import numpy as np
import torch

from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.sequence import Picture, Request
from beam_gemma.model.artifact import Artifact
from export.__main__ import export
from tests.doubles.once import exporter_digest, kept
from tests.doubles.vision_models import (
    BEGIN_ID,
    END_ID,
    IMAGE_ID,
    IMAGE_SIZE,
    NUM_IMAGE_TOKENS,
    SOFT_ID,
    save_vision_checkpoint,
    tiny_vision_model,
)

MODELS = ("gemma3", "paligemma", "paligemma2")


@functools.cache
def model_of(name: str) -> tuple[torch.nn.Module, Artifact]:
    """Return the reference and what we made of it."""
    reference = tiny_vision_model(name).eval()

    def make(folder: Path) -> None:
        checkpoint = save_vision_checkpoint(reference, folder / "checkpoint")
        export(checkpoint, folder / "artifact", tasks=["generate"])

    folder = kept(f"pictures-{name}-{exporter_digest()}", make)
    return reference, Artifact.open(folder / "artifact")


def picture_pixels(name: str, number: int) -> np.ndarray:
    size = IMAGE_SIZE[name]
    return np.random.default_rng(number).integers(0, 256, (3, size, size), np.uint8)


def make_request(
    name: str, parts: list[int | list[int]], *, max_tokens: int = 8, **params: float
) -> Request:
    """Return a request of texts, as lists of ids, with pictures, as numbers, in between.

    PaliGemma's pictures must come first.
    """
    ids: list[int] = []
    pictures = []
    pali = name != "gemma3"
    for part in parts:
        if isinstance(part, list):
            ids += part
            continue
        ids += [] if pali else [BEGIN_ID]
        pixels = picture_pixels(name, part)
        digest = hashlib.blake2b(pixels.tobytes()).digest()
        pictures.append(Picture(len(ids), digest, pixels, NUM_IMAGE_TOKENS))
        ids += [IMAGE_ID if pali else SOFT_ID] * NUM_IMAGE_TOKENS
        ids += [] if pali else [END_ID]
    spans = tuple((p.start, p.end) for p in pictures)
    return Request(
        request_id="row",
        prompt_token_ids=tuple(ids),
        params=SamplingParams(max_tokens=max_tokens, ignore_eos=True, **params),
        sampling_key="row",
        logprob=True,
        media=tuple(pictures),
        spans=((0, len(ids)),) if pali else spans,
    )
