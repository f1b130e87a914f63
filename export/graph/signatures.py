"""Signatures of exported models: the inputs, state and outputs of each graph."""

from beam_gemma.errors import ArtifactError
from beam_gemma.model.config import GemmaConfig
from beam_gemma.model.graph_tensors import Device, Head, PagedState, RecurrentState, State
from beam_gemma.model.layer_types import FULL, RECURRENT, SLIDING
from beam_gemma.model.signature import CROSS, WIDEST_FLASH_HEAD, Signature, block_size_for
from beam_gemma.model.sound_config import SoundConfig
from beam_gemma.model.vision_config import MAX_IMAGE_TOKENS, VisionConfig
from export.modules.recurrent import CONV_STATE, LRU_STATE

LONGEST_TEXT = 8192
"""Longest text that is read in full in one step, to be embedded or as a source, in tokens, unless
the model's limit is lower. Its full attention scores are in memory at once, and grow quadratically:
4 bytes for each pair of tokens and each query head, so 1 GB at this length with 4 heads and 4 GB
with 16. Masks and copies come on top: with 4 heads, a process grew by 3 GB for 4,096 tokens, eleven
times its scores."""
MAX_HEAD_DIM = 512
"""Widest head on the CPU, that of a Gemma 4; of more than 256 channels, so many are summed at once
(`export.ops.lowering_wide`)."""


def decoder_signature(
    config: GemmaConfig,
    *,
    device: Device,
    dtype: str,
    head: Head = "generate",
    vision: VisionConfig | None = None,
    sound: SoundConfig | None = None,
    encoder: GemmaConfig | None = None,
) -> Signature:
    """Return the signature of a decoder, with one group of paged layers per layer type.

    A decoder that attends to sources apart from its own tokens has one more group, of all layers.

    Args:
        config: The decoder.
        device: Device of the graph.
        dtype: Dtype of matrices and caches.
        head: Head of the graph.
        vision: The tower of a model that takes pictures; its decoder then takes embeddings of them.
        sound: The same for sound.
        encoder: The encoder that reads the sources of the decoder's sequences; None for none.
    """
    _check_head_dim(config, device)
    states: tuple[State, ...] = tuple(
        PagedState(
            group=group,
            layers=config.cached_layers_of(group),
            num_key_value_heads=config.num_kv_heads_of(group),
            head_dim=config.head_dim_of(group),
            sliding_window=config.window(group),
            holds="both" if config.merges_attention else "target",
        )
        for group in (FULL, SLIDING)
        if config.layers_of(group)
    )
    if config.reads_source and not config.merges_attention:
        states = (*states, _source_state(config))
    states = (*states, *_recurrent_states(config, dtype))
    return Signature(
        head=head,
        device=device,
        dtype=dtype,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        max_model_len=config.max_position_embeddings,
        states=states,
        block_size=block_size_for(device, min(map(config.head_dim_of, config.groups))),
        optional_inputs=_optional_inputs(config, device, vision, sound),
        source_size=0 if encoder is None else encoder.hidden_size,
        max_source_len=0 if encoder is None else max_source_len(encoder),
        shares_caches=config.num_kv_shared_layers > 0,
        gathered_heads=_gathered_heads(config, device),
    )


def _gathered_heads(config: GemmaConfig, device: Device) -> int:
    """Return the query heads of layers whose keys and values prefill steps gather."""
    is_wide = max(map(config.head_dim_of, config.groups)) > WIDEST_FLASH_HEAD
    return config.num_attention_heads if device == "cuda" and is_wide else 0


def _source_state(config: GemmaConfig) -> PagedState:
    """Return the caches of a decoder's second attention, which are those of sources."""
    return PagedState(
        group=CROSS,
        layers=tuple(range(config.num_hidden_layers)),
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        holds="source",
    )


def _recurrent_states(config: GemmaConfig, dtype: str) -> tuple[RecurrentState, ...]:
    """Return the states of recurrent blocks: tokens that a convolution still spans, and h."""
    if not config.is_recurrent:
        return ()
    assert config.lru_width is not None
    assert config.conv1d_width is not None
    layers = config.layers_of(RECURRENT)
    tail = (config.conv1d_width - 1, config.lru_width)
    return (
        RecurrentState(name=CONV_STATE, layers=layers, shape=tail, dtype=dtype),
        RecurrentState(name=LRU_STATE, layers=layers, shape=(config.lru_width,)),
    )


def max_source_len(encoder: GemmaConfig) -> int:
    """Return how many tokens a source may have; see `LONGEST_TEXT`."""
    return min(encoder.max_position_embeddings, LONGEST_TEXT)


def source_signature(
    encoder: GemmaConfig, *, device: Device, dtype: str, vision: VisionConfig | None = None
) -> Signature:
    """Return the signature of the encoder of a decoder with sources.

    Args:
        encoder: The encoder.
        device: Device of the graph.
        dtype: Dtype of matrices and states.
        vision: The tower of a model whose sources have pictures.
    """
    _check_head_dim(encoder, device)
    return Signature(
        head="encode",
        device=device,
        dtype=dtype,
        vocab_size=encoder.vocab_size,
        hidden_size=encoder.hidden_size,
        max_model_len=max_source_len(encoder),
        states=(),
        optional_inputs=() if vision is None else ("inputs_embeds",),
    )


def vision_signature(
    config: GemmaConfig, vision: VisionConfig, *, device: Device, dtype: str
) -> Signature:
    """Return the signature of the tower of a decoder."""
    return Signature(
        head="vision",
        device=device,
        dtype=dtype,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        max_model_len=config.max_position_embeddings,
        states=(),
        image_size=vision.image_size,
        num_image_tokens=MAX_IMAGE_TOKENS if vision.image_step else vision.num_image_tokens,
        image_step=vision.image_step,
        patch_size=vision.graph_patch_size if vision.image_step else 0,
    )


def sound_signature(
    config: GemmaConfig, sound: SoundConfig, *, device: Device, dtype: str
) -> Signature:
    """Return the signature of what a model has for sound."""
    return Signature(
        head="sound",
        device=device,
        dtype=dtype,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        max_model_len=config.max_position_embeddings,
        states=(),
        num_features=sound.num_features,
        num_audio_tokens=sound.num_audio_tokens if sound.is_fixed else 0,
    )


def encoder_signature(
    config: GemmaConfig,
    *,
    device: Device,
    dtype: str,
    embedding_size: int,
    max_model_len: int,
    vision: VisionConfig | None = None,
) -> Signature:
    """Return the signature of a model that returns one embedding per text.

    Args:
        config: The layers.
        device: Device of the graph.
        dtype: Dtype of matrices, and of embeddings of pictures.
        embedding_size: Width of an embedding.
        max_model_len: Longest text in tokens, its pictures included.
        vision: The tower of a model whose texts have pictures.
    """
    _check_head_dim(config, device)
    return Signature(
        head="embed",
        device=device,
        dtype=dtype,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        max_model_len=max_model_len,
        states=(),
        optional_inputs=() if vision is None else ("inputs_embeds",),
        embedding_size=embedding_size,
    )


def _optional_inputs(
    config: GemmaConfig, device: Device, vision: VisionConfig | None, sound: SoundConfig | None
) -> tuple[str, ...]:
    """Return the optional inputs of a decoder, in the order of `OPTIONAL_INPUTS`."""
    names = ["inputs_embeds"] if vision is not None or sound is not None else []
    if vision is not None and vision.bidirectional != "none":
        names.append("span_ends")
    # On CUDA, each kind of reach is an attention of its own, so that none is input.
    is_wide = vision is not None and vision.bidirectional == "prefix" and SLIDING in config.groups
    if is_wide and device == "cpu":
        names.append("first_keys")
    return (*names, "position_ids") if device == "cuda" else tuple(names)


def _check_head_dim(config: GemmaConfig, device: Device) -> None:
    widest = max(map(config.head_dim_of, config.groups))
    if device == "cpu" and widest > MAX_HEAD_DIM:
        raise ArtifactError(f"head_dim: expected at most {MAX_HEAD_DIM} on the CPU, got {widest}")
