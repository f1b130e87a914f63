"""A tiny tokenizer as Gemma 4's: `tokenizer.json` alone, with markers as its only added tokens.

Runs of white space are pieces like any other. Like the official ones, they have the score 0, which
mixes the pairs that make them up.
"""

from pathlib import Path

from transformers import GemmaTokenizer
from transformers.convert_slow_tokenizer import generate_merges

from beam_gemma.model.tokenizer import SPACE, ModelProto
from tests.doubles.tiny_tokenizer import tiny_tokenizer_model

MARKERS = {
    "sot_token": "<|turn>",
    "eot_token": "<turn|>",
    "soc_token": "<|channel>",
    "eoc_token": "<channel|>",
    "think_token": "<|think|>",
    "escape_token": '<|"|>',
    "str_token": "<|tool_response>",
    "etr_token": "<tool_response|>",
    "stc_token": "<|tool_call>",
    "etc_token": "<tool_call|>",
    "std_token": "<|tool>",
    "etd_token": "<tool|>",
    "image_token": "<|image|>",
}
"""Markers by the names that `tokenizer_config.json` gives them."""
RENAMED = {"<start_of_turn>": "<|turn>", "<end_of_turn>": "<turn|>"}
RUNS = [SPACE * n for n in range(2, 6)] + ["\n" * n for n in range(2, 5)] + ["\t" * 3, "\t" * 4]
"""Runs with the score 0. That of two tabs has one of its own, as in the official tokenizer."""


def write_tokenizer(folder: Path) -> GemmaTokenizer:
    """Save the tokenizer as transformers' converter of Gemma 4 does, and return it."""
    pieces = ModelProto.FromString(tiny_tokenizer_model()).pieces
    scores = {RENAMED.get(piece.piece, piece.piece): piece.score for piece in pieces}
    scores |= dict.fromkeys(["<mask>", *MARKERS.values(), *RUNS], 0.0)
    scores |= {"\t": -400.0, "\t\t": -350.0, "</b>": 0.0}
    vocabulary = {piece: i for i, piece in enumerate(scores)}
    tokenizer = GemmaTokenizer(
        vocab=vocabulary,
        merges=generate_merges(vocabulary, scores),
        add_bos_token=False,
        padding_side="left",
        extra_special_tokens=MARKERS,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer
