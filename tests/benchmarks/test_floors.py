"""Floors, against cases that were counted by hand."""

import dataclasses

import pytest

from beam_gemma.model.config import GemmaConfig
from beam_gemma.model.layer_types import FULL, SLIDING
from benchmarks import floors
from benchmarks.floors import Floor, Rates
from export.checkpoints.released_sizes import SIZES

TINY = GemmaConfig.from_hf(
    {
        "model_type": "gemma3_text",
        "num_hidden_layers": 2,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "intermediate_size": 16,
        "vocab_size": 10,
        "max_position_embeddings": 100,
        "sliding_window": 3,
        "query_pre_attn_scalar": 4,
        "layer_types": [SLIDING, FULL],
    }
)
# A layer: queries 8x8, keys and values 8x4 each, output 8x8, three of 8x16; the head 8x10.
LAYER_WEIGHTS = 64 + 32 + 32 + 64 + 3 * 128
WEIGHTS = 2 * LAYER_WEIGHTS + 80


def test_weights_of_a_step():
    assert floors.weight_bytes(TINY, "bf16") == 2 * WEIGHTS
    assert floors.weight_bytes(TINY, "fp32") == 4 * WEIGHTS
    assert floors.weight_bytes(TINY, "int8") == WEIGHTS + WEIGHTS // 16
    assert floors.weight_bytes(TINY, "int4") == WEIGHTS // 2 + WEIGHTS // 16


def test_a_window_reads_no_more_than_it_reaches():
    # A key and a value of 4 numbers, in each layer.
    assert floors.cache_bytes(TINY, 2, "bf16") == 2 * 8 * (2 + 2)
    assert floors.cache_bytes(TINY, 7, "bf16") == 2 * 8 * (3 + 7)
    assert floors.cache_bytes(TINY, 7, "fp32") == 4 * 8 * (3 + 7)
    assert floors.cache_bytes(TINY, 7, "int4") == 2 * 8 * (3 + 7)


def test_pairs_of_queries_and_keys():
    # Positions 0 to 4: the window of 3 reaches 1 + 2 + 3 + 3 + 3 keys, the other 1 + 2 + 3 + 4 + 5.
    per_pair = 4 * 2 * 4
    assert floors.attention_operations(TINY, 0, 5) == per_pair * (12 + 15)
    assert floors.attention_operations(TINY, 3, 5) == per_pair * (3 + 3 + 4 + 5)
    assert floors.attention_operations(TINY, 0, 1) == per_pair * 2
    assert floors.attention_operations(TINY, 2, 2) == 0


@pytest.mark.parametrize(
    ("new_tokens", "slots", "steps"),
    [
        ([5], 4, 4),  # the longest row
        ([5, 5, 5], 2, 6),  # 12 tokens, two at once
        ([1, 1], 2, 0),  # their prompts gave all
        ([9, 2, 2, 2], 4, 8),
        ([3, 3, 3, 2], 2, 4),  # 7 tokens, two at once
    ],
)
def test_fewest_steps(new_tokens, slots, steps):
    assert floors.num_decode_steps(new_tokens, slots) == steps


def test_floor_of_completions():
    rates = Rates(operations_per_sec=1e3, bytes_per_sec=1e2)
    floor = floors.generate_floor(TINY, [(2, 3), (1, 1)], slots=4, precision="bf16", rates=rates)
    # Prompts: 2 and 1 tokens through all layers, twice the head; pairs 1 + 2 in a layer, and 1.
    pairs = 2 * (1 + 2) + 2 * 1
    operations = 3 * 2 * 2 * LAYER_WEIGHTS + 2 * 2 * 80 + 4 * 2 * 4 * pairs
    assert floor.prefill == operations / 1e3
    # Two decode steps of the first row, at contexts of 3 and 4 tokens; one token is written each.
    per_token = 2 * 8
    num_bytes = 2 * 2 * WEIGHTS + per_token * (3 + 3 + 3 + 4) + 2 * per_token * 2
    assert floor.decode == num_bytes / 1e2
    assert (
        floor.seconds
        == floor.prefill + floor.decode
        == Floor(prefill=operations / 1e3, decode=num_bytes / 1e2).seconds
    )


def test_what_is_shared_is_computed_once():
    own = [2, 1]
    operations = 2 * 2 * LAYER_WEIGHTS * (3 + 2 + 1)
    # Shared: 1 + 2 + 3 keys in a layer. Then position 3 (3 and 4 keys), and position 4 (3, 5).
    pairs = 2 * 6 + (3 + 4 + 3 + 5) + (3 + 4)
    expected = operations + 4 * 2 * 4 * pairs + 2 * (2 * 8 * 3)
    assert floors.classify_operations(TINY, 3, own, labels=3) == expected


def test_the_largest_size_is_of_the_known_order():
    """Gemma 3 4B: 3.88e9 parameters, nearly all of them in matrices that a step reads."""
    size = next(size for size in SIZES if size.name == "Gemma 3 4B")
    assert floors.weight_bytes(size.config, "bf16") == pytest.approx(2 * 3.88e9, rel=0.005)


def test_a_model_without_windows():
    config = dataclasses.replace(TINY, layer_types=(FULL, FULL))
    assert floors.attention_operations(config, 0, 3) == 4 * 2 * 4 * 2 * 6
