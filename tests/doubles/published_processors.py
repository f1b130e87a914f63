"""Transformers' own processors of pictures and prompts, for the tiny models that see."""

from typing import Any

from tokenizers import AddedToken
from transformers import Gemma3Processor, GemmaTokenizer, PaliGemmaProcessor
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.paligemma.processing_paligemma import EXTRA_TOKENS
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from beam_gemma.model.tokenizer import BYTE, NORMAL, SPACE, USER_DEFINED, Tokenizer, parsed_model
from beam_gemma.model.vision_config import VisionConfig
from tests.doubles.tiny_tokenizer import tiny_tokenizer_model

IMAGE_TOKENS = 4
"""Tokens of a picture."""
PICTURE_NAMES = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}
NAMES = {
    "gemma3": PICTURE_NAMES,
    "gemma3n": {
        **PICTURE_NAMES,
        "boa_token": "<start_of_audio>",
        "eoa_token": "<end_of_audio>",
        "audio_token": "<audio_soft_token>",
    },
}
MARKERS = {
    "gemma3": ("<end_of_image>", "<image_soft_token>"),
    "gemma3n": (
        "<end_of_image>",
        "<image_soft_token>",
        "<start_of_audio>",
        "<end_of_audio>",
        "<audio_soft_token>",
    ),
    "paligemma": (*(f"<loc{i:04}>" for i in range(1024)), *(f"<seg{i:03}>" for i in range(128))),
}
GEMMA3_VISION = VisionConfig(
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    image_size=28,
    patch_size=7,
    layer_norm_eps=1e-6,
    projector="pooled",
    num_image_tokens=IMAGE_TOKENS,
    bidirectional="picture",
    first_position=0,
    image_token_id=301,
    begin_token="<start_of_image>",
    end_token="<end_of_image>",
    resample="bilinear",
    image_mean=(0.5,) * 3,
    image_std=(0.5,) * 3,
)
PALIGEMMA_VISION = VisionConfig(
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    image_size=28,
    patch_size=14,
    layer_norm_eps=1e-6,
    projector="linear",
    num_image_tokens=IMAGE_TOKENS,
    bidirectional="prefix",
    first_position=1,
    image_token_id=300 + len(MARKERS["paligemma"]),
    begin_token=None,
    end_token=None,
    resample="bicubic",
    image_mean=(0.5,) * 3,
    image_std=(0.5,) * 3,
)
VISIONS = {"gemma3": GEMMA3_VISION, "paligemma": PALIGEMMA_VISION}


def our_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer of one of `VISIONS`."""
    return Tokenizer(tiny_tokenizer_model(MARKERS[name]))


def image_processor(vision: VisionConfig, *, pan_and_scan: bool = False) -> Any:
    """Return the processor that the model's class is published with, in its form for Pillow."""
    settings = {
        "size": {"height": vision.image_size, "width": vision.image_size},
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
        "image_seq_length": vision.num_image_tokens,
        "resample": {"bilinear": 2, "bicubic": 3}[vision.resample],
    }
    if vision.bidirectional == "prefix":
        return SiglipImageProcessorPil(**settings)
    return Gemma3ImageProcessorPil(
        **settings,
        do_pan_and_scan=pan_and_scan,
        pan_and_scan_min_crop_size=256,
        pan_and_scan_max_num_crops=4,
        pan_and_scan_min_ratio_to_activate=1.2,
    )


def processor(name: str) -> Any:
    """Return the published processor of one of `VISIONS`."""
    vision = VISIONS[name]
    images = image_processor(vision)
    tokenizer = published_tokenizer(name)
    if name == "paligemma":
        return PaliGemmaProcessor(images, tokenizer)
    return Gemma3Processor(images, tokenizer, image_seq_length=vision.num_image_tokens)


def published_tokenizer(name: str) -> GemmaTokenizer:
    """Return the tiny tokenizer as transformers holds it."""
    pieces = parsed_model(tiny_tokenizer_model(MARKERS[name])).pieces
    vocab = {piece.piece: token_id for token_id, piece in enumerate(pieces)}
    # `PaliGemmaProcessor` adds places and masks as tokens that are not special.
    added = [
        AddedToken(
            piece.piece,
            special=piece.type != USER_DEFINED and piece.piece not in EXTRA_TOKENS,
        )
        for piece in pieces
        if piece.type not in (NORMAL, BYTE) and SPACE not in piece.piece
    ]
    tokenizer = GemmaTokenizer(
        vocab,
        [
            (text[:end], text[end:])
            for text in vocab
            for end in range(1, len(text))
            if {text[:end], text[end:]} <= vocab.keys()
        ],
        extra_special_tokens=NAMES.get(name, {}),
        mask_token="<unk>",
        add_bos_token=True,
    )
    tokenizer.add_tokens(added)
    return tokenizer
