"""Reference embeddings: sentence-transformers' own model with random weights that matter.

Two-sided, with a window smaller than the texts; the folder is what its `save` writes, with the
tiny SentencePiece model beside it.
"""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from beam_gemma.model.tokenizer import ModelProto
from tests.doubles.reference import MODELS, SHAPE, draw_weights
from tests.doubles.tiny_tokenizer import tiny_tokenizer_model

MERGES = [("h", "e"), ("\u2581", "t"), ("\u2581t", "he"), ("t", "h"), ("i", "n")]
PROMPTS = {
    "query": "task: search result | query: ",
    "document": "title: none | text: ",
    "Classification": "task: classification | query: ",
}
DENSE_SIZES = (96, 160)


def sentence_model(
    folder: Path,
    *,
    pooling: str = "mean",
    dense_sizes: Sequence[int] = DENSE_SIZES,
    attention: str = "eager",
    **changes: Any,
) -> SentenceTransformer:
    """Write a folder of sentence-transformers and return the model that reads it.

    Args:
        folder: To make.
        pooling: By name.
        dense_sizes: Width after each dense layer.
        attention: How transformers computes it.
        **changes: To the configuration of the layers.
    """
    base = folder / "base"
    config = transformers.Gemma3TextConfig(
        **{**SHAPE, **MODELS["gemma3_text"], "use_bidirectional_attention": True, **changes}
    )
    draw_weights(transformers.Gemma3TextModel(config)).save_pretrained(base)
    tokenizer(config.max_position_embeddings).save_pretrained(base)
    widths = [config.hidden_size, *dense_sizes]
    dense = [
        Dense(*sizes, bias=False, activation_function=torch.nn.Identity())
        for sizes in itertools.pairwise(widths)
    ]
    for number, layer in enumerate(dense):
        generator = torch.Generator().manual_seed(number)
        layer.linear.weight.data.normal_(generator=generator)
    model = SentenceTransformer(
        modules=[
            Transformer(str(base), model_kwargs={"attn_implementation": attention}),
            Pooling(config.hidden_size, pooling),
            *dense,
            Normalize(),
        ],
        prompts=PROMPTS,
        device="cpu",
    )
    model.save(str(folder))
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer_model())
    return model


def tokenizer(max_length: int, markers: Sequence[str] = ()) -> transformers.GemmaTokenizer:
    """Return transformers' tokenizer of the tiny vocabulary, as EmbeddingGemma sets it up.

    Args:
        max_length: Longest text in tokens.
        markers: Control pieces behind the others.
    """
    model = ModelProto.FromString(tiny_tokenizer_model(markers))
    pieces = [piece.piece for piece in model.pieces]
    return transformers.GemmaTokenizer(
        vocab={piece: token_id for token_id, piece in enumerate(pieces)},
        merges=MERGES,
        mask_token=None,
        add_bos_token=True,
        add_eos_token=True,
        padding_side="right",
        model_max_length=max_length,
        extra_special_tokens=list(markers),
    )


def texts(number: int = 24, seed: int = 0) -> list[str]:
    """Return texts of 1 to about 700 characters, most of them short.

    Spaces come alone, and not at an end, where a prompt may have one: runs of them are pieces that
    only one of the two tokenizers knows.
    """
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz     \u00e9"))
    lengths = np.exp(rng.normal(3.5, 1.3, number)).clip(1, 700).astype(int)
    drawn = ("".join(rng.choice(letters, length)) for length in lengths)
    return [re.sub(" +", " ", text).strip() or "a" for text in drawn]


def encode(model: SentenceTransformer, batch: Sequence[str], **options: Any) -> np.ndarray:
    """Return the reference's embeddings."""
    return model.encode(list(batch), batch_size=7, show_progress_bar=False, **options)
