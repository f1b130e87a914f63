"""Folders of models with an encoder: names, copies, adapters, sizes, and what is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from beam_gemma.errors import CheckpointError, OptionsError
from beam_gemma.model.signature import CROSS
from export.checkpoints.encoder_decoder_folder import stack_name
from export.checkpoints.hf_folder import check_names, expected_shapes, read_checkpoint
from export.checkpoints.lora import merge_adapter
from export.checkpoints.released_sizes import ENCODER_DECODER_SIZES, Size
from export.checkpoints.tensors import Checkpoint
from export.checkpoints.vision_tensors import PATCHES, is_of_pictures
from export.graph.quantize import quantize_graph
from export.graph.tasks import embedding_config, for_embeddings, graph_signatures
from tests.doubles.checkpoint_files import values
from tests.doubles.cuda_sources import exported_pair
from tests.doubles.encoder_decoder_models import (
    MODELS,
    save_encoder_decoder,
    tiny_encoder_decoder,
    tiny_pair,
)
from tests.doubles.reference import FULL, SLIDING

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
CLASSES = {
    "t5gemma": (transformers.T5GemmaConfig, transformers.T5GemmaForConditionalGeneration),
    "t5gemma2": (transformers.T5Gemma2Config, transformers.T5Gemma2ForConditionalGeneration),
}
SHARED = "model.encoder.embed_tokens."
"""Start of the names of what both sides of a T5Gemma 2 share, as transformers writes them."""
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a folder that a test may edit."""
    return lambda name: save_encoder_decoder(tiny_encoder_decoder(name), tmp_path / name)


def edit(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    file = folder / "model.safetensors"
    tensors = {n: t.clone().contiguous() for n, t in change(load_file(file)).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_tensors_of_a_folder_are_those_of_the_architecture(name: str) -> None:
    checkpoint = tiny_pair(name).checkpoint
    check_names(checkpoint.tensors, expected_shapes(checkpoint))
    assert ("lm_head.weight" in checkpoint.tensors) == (name == "t5gemma_untied")
    has_own = name != "t5gemma2"
    assert ("encoder.embed_tokens.weight" in checkpoint.tensors) == has_own
    assert ("eoi_embedding" in checkpoint.tensors) != has_own


def test_text_of_a_t5gemma_2_alone(saved: Callable[[str], Path]) -> None:
    checkpoint = read_checkpoint(saved("t5gemma2"), text_only=True)
    check_names(checkpoint.tensors, expected_shapes(checkpoint))
    assert checkpoint.vision is None
    assert not any(map(is_of_pictures, checkpoint.tensors))


def test_names_of_a_model_in_memory_are_read_too(saved: Callable[[str], Path]) -> None:
    parameters = dict(tiny_encoder_decoder("t5gemma2").named_parameters())
    assert "model.encoder.text_model.layers.0.self_attn.q_proj.weight" in parameters
    checkpoint = read_checkpoint(edit(saved("t5gemma2"), lambda _: parameters))
    check_names(checkpoint.tensors, expected_shapes(checkpoint))


@pytest.mark.parametrize("is_equal", [True, False])
@pytest.mark.parametrize(
    ("name", "original", "copy"),
    [
        ("t5gemma", "model.decoder.embed_tokens.weight", "lm_head.out_proj.weight"),
        ("t5gemma2", f"{SHARED}weight", "lm_head.out_proj.weight"),
        (
            "t5gemma2",
            f"{SHARED}weight",
            "model.decoder.embed_tokens.weight",
        ),
        (
            "t5gemma2",
            f"{SHARED}eoi_embedding",
            "model.decoder.embed_tokens.eoi_embedding",
        ),
    ],
)
def test_a_copy_is_left_out_and_another_tensor_is_refused(
    saved: Callable[[str], Path], name: str, original: str, copy: str, *, is_equal: bool
) -> None:
    folder = saved(name)
    edit(folder, lambda tensors: {**tensors, copy: tensors[original] + (0 if is_equal else 1)})
    if is_equal:
        checkpoint = read_checkpoint(folder)
        assert checkpoint.tensors.keys() == tiny_pair(name).checkpoint.tensors.keys()
    else:
        with pytest.raises(CheckpointError, match=f"expected {copy} equal to {original}"):
            read_checkpoint(folder)


def test_a_file_may_have_the_decoders_copy_alone(saved: Callable[[str], Path]) -> None:
    folder = edit(
        saved("t5gemma2"),
        lambda tensors: {
            n.replace(SHARED, "model.decoder.embed_tokens."): t for n, t in tensors.items()
        },
    )
    found = read_checkpoint(folder).tensors
    expected = tiny_pair("t5gemma2").checkpoint.tensors
    for name in ("embed_tokens.weight", "eoi_embedding"):
        np.testing.assert_array_equal(values(found[name]), values(expected[name]))


def test_a_classifier_is_refused_by_name(saved: Callable[[str], Path]) -> None:
    folder = edit(
        saved("t5gemma"), lambda tensors: {**tensors, "score.out_proj.weight": torch.ones(2, 96)}
    )
    with pytest.raises(CheckpointError, match=r"got score\.out_proj\.weight, the head of a class"):
        read_checkpoint(folder)


def test_a_tensor_without_a_place_is_named(saved: Callable[[str], Path]) -> None:
    name = "model.decoder.layers.0.cross_attn.q_norm.weight"
    folder = edit(saved("t5gemma"), lambda tensors: {**tensors, name: torch.ones(16)})
    checkpoint = read_checkpoint(folder)
    with pytest.raises(CheckpointError, match=f"the tensor {name} has no place"):
        check_names(checkpoint.tensors, expected_shapes(checkpoint))


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("generation_config.json", {"decoder_start_token_id": 0}, "expected 2, the bos_token_id"),
        ("modules.json", {}, "expected none beside a t5gemma model"),
    ],
)
def test_a_file_that_says_otherwise_is_refused(
    saved: Callable[[str], Path], file: str, content: dict[str, int], sentence: str
) -> None:
    folder = saved("t5gemma")
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=sentence):
        read_checkpoint(folder)


def test_a_decoder_starts_with_the_bos_of_the_tokenizer(saved: Callable[[str], Path]) -> None:
    folder = saved("t5gemma")
    raw = json.loads((folder / "config.json").read_text())
    raw["bos_token_id"] = raw["decoder"]["bos_token_id"] = 3
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"expected 3, the bos_token_id .* got \[2"):
        read_checkpoint(folder)


def test_a_list_of_ends_in_the_decoders_section_ends_texts(saved: Callable[[str], Path]) -> None:
    folder = saved("t5gemma")
    (folder / "generation_config.json").unlink()
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("eos_token_id", None)
    raw["decoder"]["eos_token_id"] = [1, 5]
    (folder / "config.json").write_text(json.dumps(raw))
    assert read_checkpoint(folder).eos_token_ids == (1, 5)


def test_states_of_t5gemma_are_those_of_gemma_2_and_one_group_of_sources() -> None:
    decoder, encoder = graph_signatures(
        tiny_pair("t5gemma").checkpoint, None, ["generate"], "cpu", "float32"
    )
    assert [(s.group, s.holds, s.layers) for s in decoder.paged_states] == [
        (FULL, "target", (1,)),
        (SLIDING, "target", (0,)),
        (CROSS, "source", (0, 1)),
    ]
    assert (decoder.source_size, decoder.max_source_len) == (64, 192)
    assert (encoder.head, encoder.max_model_len, encoder.states) == ("encode", 192, ())


def test_states_of_t5gemma_2_hold_both() -> None:
    decoder, encoder, tower = graph_signatures(
        tiny_pair("t5gemma2").checkpoint, None, ["generate"], "cpu", "float32"
    )
    assert [(s.group, s.holds) for s in decoder.paged_states] == [(FULL, "both"), (SLIDING, "both")]
    assert decoder.optional_inputs == ()
    assert encoder.optional_inputs == ("inputs_embeds",)
    assert tower.head == "vision"


def test_last_token_pooling_is_refused_for_an_encoder() -> None:
    checkpoint = tiny_pair("t5gemma").checkpoint
    assert embedding_config(checkpoint, None).max_tokens == 192
    with pytest.raises(OptionsError, match="--pooling: expected mean for a model with an encoder"):
        embedding_config(checkpoint, "lasttoken")


@pytest.mark.parametrize("name", ["t5gemma", "t5gemma2"])
def test_embeddings_need_the_encoder_alone(name: str) -> None:
    """An export refuses tensors that no graph has."""
    pair = tiny_pair(name)
    file = pair.artifact.graph_path("embed", "cpu")
    graph = onnx.load(file, load_external_data=False).graph
    needed = {value.name for value in graph.initializer if value.external_data}
    rotary = {f"encoder.rotary.{group}.inv_freq" for group in (FULL, SLIDING)}
    assert for_embeddings(pair.checkpoint).tensors.keys() | rotary == needed


def merged_by_peft(name: str, folder: Path, **settings: object) -> Tensors:
    """Save an adapter of a tiny model with random factors; return what PEFT merges."""
    torch.manual_seed(3)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **settings})
    model = peft.get_peft_model(tiny_encoder_decoder(name), config)
    model.save_pretrained(folder)
    merged = peft.PeftModel.from_pretrained(tiny_encoder_decoder(name), folder)
    return dict(merged.merge_and_unload().state_dict())


def check_merged(base: Checkpoint, folder: Path, theirs: Tensors, num_changed: int) -> None:
    merged = merge_adapter(base, folder)
    changed = 0
    expected = {stack_name(n, base.config.model_type): t for n, t in theirs.items()}
    for name, stored in merged.tensors.items():
        found = values(stored)
        np.testing.assert_array_equal(found, expected[name].numpy().reshape(found.shape))
        changed += stored.raw is None and base.tensors[name].raw is not None
    assert changed == num_changed


@pytest.mark.parametrize("name", ["t5gemma", "t5gemma2"])
def test_an_adapter_changes_matrices_of_both_sides_as_peft_does(tmp_path: Path, name: str) -> None:
    theirs = merged_by_peft(name, tmp_path, target_modules=["k_proj", "down_proj"])
    # Two layers on each side have both, T5Gemma's second attentions a key, and the tower's two.
    num_changed = {"t5gemma": 4 * 2 + 2, "t5gemma2": 4 * 2 + 2}[name]
    check_merged(tiny_pair(name).checkpoint, tmp_path, theirs, num_changed)


def test_an_adapter_changes_the_embeddings_of_both_sides(tmp_path: Path) -> None:
    theirs = merged_by_peft("t5gemma", tmp_path, target_modules=["embed_tokens"])
    check_merged(tiny_pair("t5gemma").checkpoint, tmp_path, theirs, 2)


def test_an_adapter_changes_a_head_of_its_own(tmp_path: Path) -> None:
    theirs = merged_by_peft("t5gemma_untied", tmp_path, target_modules=["out_proj"])
    check_merged(tiny_pair("t5gemma_untied").checkpoint, tmp_path, theirs, 1)
    merged_by_peft("t5gemma", tmp_path / "tied", target_modules=["out_proj"])
    with pytest.raises(CheckpointError, match="changes the head alone"):
        merge_adapter(tiny_pair("t5gemma").checkpoint, tmp_path / "tied")


@pytest.mark.parametrize(("name", "precision"), [("t5gemma", "bf16"), ("t5gemma2", "fp16")])
def test_matrices_of_both_sides_are_rounded(name: str, precision: str) -> None:
    """To 4 bits, embeddings to 8; the embedding of a picture's end is no matrix."""
    pair = exported_pair(name, "cuda", precision)
    bits: dict[str, int] = {}
    for head in ("generate", "encode"):
        graph = ir.load(pair.artifact.graph_path(head, "cuda"))
        for value in graph.graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):  # as before bytes are attached
                is_wide = value.const_value.dtype == ir.DataType.FLOAT
                kind = ir.DataType.FLOAT if is_wide else ir.DataType.FLOAT16
                value.shape, value.type = value.const_value.shape, ir.TensorType(kind)
                value.const_value = None
        quantize_graph(graph, 4)
        parts = (n.split(":") for n in graph.graph.initializers if n.endswith(":codes"))
        bits |= {matrix: int(number) for matrix, number, _ in parts}
    shapes = expected_shapes(tiny_pair(name).checkpoint)
    matrices = {n for n, s in shapes.items() if len(s) == 2 and not is_of_pictures(n)}
    assert {n: 8 if "embed" in n else 4 for n in matrices} == bits


@pytest.mark.parametrize("size", ENCODER_DECODER_SIZES, ids=lambda size: size.name)
def test_shapes_of_a_released_size_are_those_of_transformers(size: Size) -> None:
    """On a device without memory."""
    model_type = size.raw["model_type"]
    config_class, model_class = CLASSES[model_type]
    with torch.device("meta"):
        model = model_class(config_class(**size.raw))
    theirs = {}
    for parameter, value in model.named_parameters():
        name = stack_name(parameter, model_type)
        if name is not None and name != "lm_head.weight":
            theirs[name] = tuple(value.shape)
    if PATCHES in theirs:
        theirs[PATCHES] = (theirs[PATCHES][0], math.prod(theirs[PATCHES][1:]))
    assert theirs == size.tensor_shapes()
