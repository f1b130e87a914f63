"""A SentencePiece model of 300 pieces, built as the official one is, for tests without weights."""

from collections.abc import Sequence

from beam_gemma.model.tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from export.checkpoints.tokenizer_model import sentencepiece_model

SPECIAL = {"<pad>": CONTROL, "<eos>": CONTROL, "<bos>": CONTROL, "<unk>": UNKNOWN}
MARKERS = ("<start_of_turn>", "<end_of_turn>", "<start_of_image>")
TEXT_PIECES = ("\n", "\n\n", "\n\n\n", "  ", "</b>")
LETTERS = "\u2581abcdefghijklmnopqrstuvwxyz"
MERGES = ("he", "\u2581t", "\u2581the", "th", "in")


def tiny_tokenizer_model(more_markers: Sequence[str] = ()) -> bytes:
    """Return the model: ids 0 to 299, always the same bytes; more markers have the next ids."""
    pieces = [
        *SPECIAL.items(),
        *((marker, CONTROL) for marker in MARKERS),
        *((piece, USER_DEFINED) for piece in TEXT_PIECES),
        *((f"<0x{byte:02X}>", BYTE) for byte in range(256)),
        *((piece, NORMAL) for piece in (*MERGES, *LETTERS)),
    ]
    assert len(pieces) == 300
    pieces += [(marker, CONTROL) for marker in more_markers]
    names = [name for name, _ in pieces]
    kinds = [kind for _, kind in pieces]
    scores = [-float(names.index(name)) for name in names]
    return sentencepiece_model(names, scores, kinds)
