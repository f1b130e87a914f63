"""Names, dtypes and shapes that exporter and engine agree on."""

import dataclasses

import pytest

from beam_gemma.errors import ArtifactError
from beam_gemma.model.graph_tensors import PagedState, RecurrentState
from beam_gemma.model.signature import Signature, block_size_for
from export.graph.signatures import decoder_signature
from tests.conftest import TinyModel

PAGED = PagedState(
    group="sliding_attention", layers=(0, 2), num_key_value_heads=4, head_dim=256, sliding_window=8
)
EVERYTHING = Signature(
    head="generate",
    device="cpu",
    dtype="float32",
    vocab_size=300,
    hidden_size=48,
    max_model_len=512,
    states=(
        PAGED,
        RecurrentState(name="conv_tail", layers=(1,), shape=(3, 48)),
        PagedState(
            group="cross_attention",
            layers=(0, 2),
            num_key_value_heads=4,
            head_dim=256,
            holds="source",
        ),
    ),
    optional_inputs=("inputs_embeds", "span_ends", "position_ids"),
    source_size=64,
    max_source_len=256,
)


def names(signature: Signature) -> list[str]:
    return [t.name for t in signature.step_inputs()]


def test_every_kind_of_state_and_input_has_a_name() -> None:
    assert names(EVERYTHING) == [
        "input_ids", "cu_seqlens", "past_seqlens", "logit_rows", "probability_rows",
        "block_table.sliding_attention",
        "slot_mapping.sliding_attention", "context_starts.sliding_attention",
        "block_table.cross_attention", "source_slots.cross_attention", "state_slots",
        "source_states", "source_seqlens", "inputs_embeds", "embeds_rows",
        "span_ends", "position_ids",
    ]  # fmt: skip
    assert [(t.input_name, t.output_name) for t in EVERYTHING.state_tensors()] == [
        ("key_cache.0", "key_cache_out.0"),
        ("value_cache.0", "value_cache_out.0"),
        ("key_cache.2", "key_cache_out.2"),
        ("value_cache.2", "value_cache_out.2"),
        ("conv_tail.1", "conv_tail_out.1"),
        ("cross_key_cache.0", "cross_key_cache_out.0"),
        ("cross_value_cache.0", "cross_value_cache_out.0"),
        ("cross_key_cache.2", "cross_key_cache_out.2"),
        ("cross_value_cache.2", "cross_value_cache_out.2"),
    ]


def test_the_device_decides_layout_and_bounds() -> None:
    cuda = dataclasses.replace(EVERYTHING, device="cuda", dtype="bfloat16")
    assert "attention_metadata" in names(cuda)
    assert "context_starts.sliding_attention" not in names(cuda)
    assert cuda.chooses
    assert {"token_slots", "logit_slots", "full_rows"} <= set(names(cuda)) - set(names(EVERYTHING))
    assert cuda.state_tensors()[-1].input_name == "next_ids"
    assert not dataclasses.replace(cuda, head="score").chooses
    assert PAGED.shape("cuda", 16) == ("P_sliding_attention", 16, 4, 256)
    assert PAGED.shape("cpu", 16) == (4, "P_sliding_attention", 16, 256)


def test_attention_over_sources_takes_tokens_on_cuda() -> None:
    """Groups that hold sources have inputs of their own there, and the others those they have."""
    cuda = dataclasses.replace(EVERYTHING, device="cuda", optional_inputs=("position_ids",))
    tensors = {t.name: t.shape for t in cuda.step_inputs()}
    given = {name: shape for name, shape in tensors.items() if "cross_attention" in name}
    assert given == {
        "token_past_seqlens.cross_attention": ("T1",),
        "token_block_table.cross_attention": ("T1", "M_cross_attention"),
        "token_slot_mapping.cross_attention": ("TC",),
    }
    assert tensors["source_rows"] == ("TC",)
    assert tensors["token_cu_seqlens"] == ("T2",)
    assert "source_seqlens" not in tensors
    assert "block_table.sliding_attention" in tensors
    assert (cuda.prefill_tokens(2048), EVERYTHING.prefill_tokens(2048)) == (256, 2048)
    assert cuda.prefill_tokens(100) == 100


def test_recurrent_state_takes_sequences_side_by_side_on_cuda() -> None:
    cuda = dataclasses.replace(
        EVERYTHING, device="cuda", source_size=0, states=EVERYTHING.states[:2]
    )
    tensors = {t.name: t.shape for t in cuda.step_inputs()}
    assert tensors["token_rows"] == ("B", "L")
    assert tensors["token_places"] == ("T",)


@pytest.mark.parametrize(("head_dim", "tokens"), [(64, 256), (128, 128), (256, 64)])
def test_blocks_are_as_large_as_the_fast_kernels_want(head_dim: int, tokens: int) -> None:
    assert block_size_for("cuda", head_dim) == tokens
    assert block_size_for("cpu", head_dim) == 16


def test_the_manifest_form_says_everything() -> None:
    assert Signature.from_json(EVERYTHING.to_json()) == EVERYTHING


def test_a_decoder_has_a_group_for_each_layer_type(tiny_gemma3: TinyModel) -> None:
    config = tiny_gemma3.checkpoint.config
    signature = decoder_signature(config, device="cpu", dtype="float32")
    assert [(s.group, s.layers, s.sliding_window) for s in signature.paged_states] == [
        ("full_attention", (5,), None),
        ("sliding_attention", (0, 1, 2, 3, 4, 6), 24),
    ]


def test_a_head_too_wide_for_one_sum_is_refused(tiny_gemma3: TinyModel) -> None:
    config = dataclasses.replace(tiny_gemma3.checkpoint.config, head_dim=514)
    with pytest.raises(ArtifactError, match="head_dim: expected at most 512"):
        decoder_signature(config, device="cpu", dtype="float32")


def test_an_unknown_optional_input_is_refused() -> None:
    with pytest.raises(ArtifactError, match="expected optional inputs of"):
        dataclasses.replace(EVERYTHING, optional_inputs=("span_end",))
