"""Checkpoints of models that see: folders in each layout, `.ckpt` files, adapters, and exports."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import peft
import pytest
import safetensors.torch
import torch

from beam_gemma.errors import BeamGemmaError, CheckpointError, ConfigError, OptionsError
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.vision_config import VisionConfig
from export.__main__ import export
from export.checkpoints import ckpt_file
from export.checkpoints.hf_folder import check_names, expected_shapes, read_checkpoint
from export.checkpoints.lora import merge_adapter
from export.checkpoints.released_sizes import Size
from export.checkpoints.tensors import Checkpoint, StoredTensor
from export.checkpoints.vision_tensors import is_of_pictures
from export.graph.signatures import decoder_signature
from tests.doubles.checkpoint_files import values, write_ckpt
from tests.doubles.damage import damaged_json, judged
from tests.doubles.vision_models import (
    MODEL_CLASSES,
    MODELS,
    Layout,
    drawn,
    save_vision_checkpoint,
    tiny_vision_model,
    vision_model_config,
    vision_tokenizer_model,
)

CASES = 600
"""Damaged files of each kind."""


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's weights under our names, with the kernel of patches as a matrix."""
    state = {}
    for name, value in model.named_parameters():
        ours = name.removeprefix("model.").removeprefix("model.").removeprefix("language_model.")
        state[ours] = value.detach()
    kernel = state["vision_tower.embeddings.patch_embedding.weight"]
    state["vision_tower.embeddings.patch_embedding.weight"] = kernel.flatten(1)
    return state


def assert_equal(checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    assert checkpoint.tensors.keys() == expected.keys()
    for name, stored in checkpoint.tensors.items():
        np.testing.assert_array_equal(values(stored), expected[name].float().numpy(), name)


def content(stored: StoredTensor) -> bytes:
    """Return the bytes that a graph would link to."""
    assert stored.raw is not None
    where = np.fromfile(stored.raw.file, np.uint8, stored.raw.length, "", stored.raw.offset)
    return where.tobytes()


@pytest.mark.parametrize("layout", ["hub", "new", "saved"])
@pytest.mark.parametrize("name", MODELS)
def test_each_layout_is_read_whole(tmp_path: Path, name: str, layout: Layout) -> None:
    model = tiny_vision_model(name)
    checkpoint = read_checkpoint(save_vision_checkpoint(model, tmp_path, layout=layout))
    check_names(checkpoint.tensors, expected_shapes(checkpoint))
    expected = parameters(model)
    assert_equal(checkpoint, expected)
    for ours, stored in checkpoint.tensors.items():
        assert content(stored) == expected[ours].numpy().tobytes(), ours
    kinds = {"gemma3": "gemma3_text", "shieldgemma2": "gemma3_text", "paligemma": "gemma",
             "paligemma2": "gemma2"}  # fmt: skip
    assert checkpoint.config.model_type == kinds[name]
    assert not checkpoint.config.use_bidirectional_attention
    caps = 2.0 if name == "paligemma2" else None
    assert checkpoint.config.final_logit_softcapping == caps
    assert checkpoint.vision is not None
    assert checkpoint.vision.image_token_id in range(checkpoint.config.vocab_size)


def test_what_published_files_of_paligemma_2_omit(tmp_path: Path) -> None:
    """The 3B's text_config names sizes that differ from Gemma 2's class; these are the others."""
    folder = save_vision_checkpoint(tiny_vision_model("paligemma2"), tmp_path)
    raw = json.loads((folder / "config.json").read_text())
    for key in ("num_attention_heads", "num_key_value_heads", "max_position_embeddings",
                "sliding_window", "layer_types", "rope_parameters", "rms_norm_eps", "head_dim",
                "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar",
                "use_bidirectional_attention"):  # fmt: skip
        raw["text_config"].pop(key)
    (folder / "config.json").write_text(json.dumps(raw))
    config = read_checkpoint(folder).config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 4, 256)
    assert (config.sliding_window, config.max_position_embeddings) == (4096, 8192)
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50.0, 30.0)


def test_settings_of_the_image_processor_are_read(tmp_path: Path) -> None:
    """From either of the files that releases of transformers write."""
    folder = save_vision_checkpoint(tiny_vision_model("paligemma"), tmp_path)
    file = folder / "preprocessor_config.json"
    settings = json.loads(file.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}
    file.unlink()
    assert read_checkpoint(folder).vision.image_mean == (0.5, 0.5, 0.5)  # type: ignore[union-attr]
    other = {"image_processor": settings, "processor_class": "PaliGemmaProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(other))
    assert read_checkpoint(folder).vision.image_mean == (0.1, 0.2, 0.3)  # type: ignore[union-attr]
    file.write_text(json.dumps(settings | {"image_std": [1.0] * 3}))
    assert read_checkpoint(folder).vision.image_std == (1.0, 1.0, 1.0)  # type: ignore[union-attr]


def test_the_pooling_head_of_siglip_is_left_out(tmp_path: Path) -> None:
    folder = save_vision_checkpoint(tiny_vision_model("gemma3"), tmp_path)
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["vision_tower.vision_model.head.probe"] = torch.ones(1, 1, 36)
    safetensors.torch.save_file(tensors, file)
    checkpoint = read_checkpoint(folder)
    check_names(checkpoint.tensors, expected_shapes(checkpoint))


def edited(folder: Path, file: str, **changes: Any) -> None:
    raw = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(raw | changes))


def renamed(folder: Path, name: str, new: str | None, shape: tuple[int, ...] = ()) -> None:
    """Rename a tensor, take it out, or give it another shape."""
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensor = tensors.pop(name)
    if new is not None:
        tensors[new] = torch.zeros(shape) if shape else tensor
    safetensors.torch.save_file(tensors, file)


TOWER = "vision_tower.vision_model."


@pytest.mark.parametrize(
    ("name", "damage", "sentence"),
    [
        (
            "gemma3",
            lambda f: renamed(f, f"{TOWER}post_layernorm.bias", None),
            "expected the tensor vision_tower.post_layernorm.bias, got none",
        ),
        (
            "gemma3",
            lambda f: renamed(f, f"{TOWER}post_layernorm.bias", f"{TOWER}post_norm.bias"),
            "expected the tensor vision_tower.post_layernorm.bias, got none.*post_norm.bias",
        ),
        (
            "gemma3",
            lambda f: renamed(
                f, f"{TOWER}embeddings.patch_embedding.weight",
                f"{TOWER}embeddings.patch_embedding.weight", (36, 3, 7, 6),
            ),
            r"patch_embedding.weight of shape \[36, 147\].*got \[36, 3, 7, 6\]",
        ),
        (
            "gemma3",
            lambda f: renamed(
                f, "multi_modal_projector.mm_input_projection_weight",
                "multi_modal_projector.mm_input_projection_weight", (48, 36),
            ),
            r"mm_input_projection_weight of shape \[36, 48\].*got \[48, 36\]",
        ),
        (
            "paligemma",
            lambda f: renamed(f, "multi_modal_projector.linear.bias", None),
            "expected the tensor multi_modal_projector.linear.bias, got none",
        ),
        (
            "gemma3",
            lambda f: edited(f, "config.json", boi_token_index=7),
            "boi_token_index .* the tokenizer's piece <start_of_image>, 6, got 7",
        ),
        (
            "gemma3",
            lambda f: edited(f, "config.json", eoi_token_index=None),
            "eoi_token_index .* the tokenizer's piece <end_of_image>, 300, got None",
        ),
        (
            "gemma3",
            lambda f: edited(f, "preprocessor_config.json", do_resize=False),
            "do_resize: expected True, got False",
        ),
        (
            "paligemma",
            lambda f: edited(f, "config.json", text_config={"model_type": "gemma3_text"}),
            "a model_type of gemma or gemma2 in a paligemma model, got 'gemma3_text'",
        ),
        (
            "paligemma",
            lambda f: edited(f, "config.json", text_config={"use_bidirectional_attention": False}),
            "use_bidirectional_attention: expected true in a paligemma model, got False",
        ),
        (
            "paligemma",
            lambda f: edited(f, "config.json", text_config=3),
            "text_config: expected a dictionary, got 3",
        ),
    ],
)  # fmt: skip
def test_a_fault_is_named(
    tmp_path: Path, name: str, damage: Callable[[Path], None], sentence: str
) -> None:
    folder = save_vision_checkpoint(tiny_vision_model(name), tmp_path / "checkpoint")
    damage(folder)
    with pytest.raises(BeamGemmaError, match=sentence):
        export(folder, tmp_path / "model")
    assert not list(tmp_path.glob("model*"))


@pytest.mark.parametrize("layout", ["hub", "new"])
def test_the_text_model_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, layout: Layout
) -> None:
    model = tiny_vision_model("gemma3")
    checkpoint = read_checkpoint(
        save_vision_checkpoint(model, tmp_path, layout=layout), text_only=True
    )
    assert "what it has for images is left out" in caplog.text
    assert checkpoint.vision is None
    text = {n: t for n, t in parameters(model).items() if not is_of_pictures(n)}
    assert_equal(checkpoint, text)


def test_paligemma_has_no_text_model_of_its_own(tmp_path: Path) -> None:
    folder = save_vision_checkpoint(tiny_vision_model("paligemma"), tmp_path)
    with pytest.raises(ConfigError, match=r"--text_only: .* works with pictures alone"):
        read_checkpoint(folder, text_only=True)
    with pytest.raises(OptionsError, match="expected generate or classify for a PaliGemma"):
        export(folder, tmp_path / "model", tasks=("embed",))


@pytest.mark.parametrize(
    ("name", "device", "expected"),
    [
        ("gemma3", "cpu", ("inputs_embeds", "span_ends")),
        ("paligemma", "cpu", ("inputs_embeds", "span_ends")),
        ("paligemma2", "cpu", ("inputs_embeds", "span_ends", "first_keys")),
        ("gemma3", "cuda", ("inputs_embeds", "span_ends", "position_ids")),
        ("paligemma2", "cuda", ("inputs_embeds", "span_ends", "position_ids")),
    ],
)
def test_optional_inputs_of_a_decoder(
    tmp_path: Path, name: str, device: Any, expected: tuple[str, ...]
) -> None:
    checkpoint = read_checkpoint(save_vision_checkpoint(tiny_vision_model(name), tmp_path))
    signature = decoder_signature(
        checkpoint.config, device=device, dtype="float32", vision=checkpoint.vision
    )
    assert signature.optional_inputs == expected
    text = decoder_signature(checkpoint.config, device=device, dtype="float32")
    assert text.optional_inputs == (("position_ids",) if device == "cuda" else ())


def test_an_export_has_a_graph_for_pictures(tmp_path: Path) -> None:
    folder = save_vision_checkpoint(tiny_vision_model("gemma3"), tmp_path / "checkpoint")
    export(folder, tmp_path / "model", tasks=("classify",))
    artifact = Artifact.open(tmp_path / "model")
    assert artifact.vision == read_checkpoint(folder).vision
    signature = artifact.signature("vision", "cpu")
    assert (signature.image_size, signature.num_image_tokens) == (56, 16)
    assert artifact.graph_path("vision", "cpu").name == "vision.cpu.onnx"
    assert "inputs_embeds" in artifact.signature("score", "cpu").optional_inputs
    linked = tmp_path / "model/weights/model.safetensors"
    assert linked.samefile(folder / "model.safetensors")
    graph = onnx.load(artifact.graph_path("vision", "cpu"), load_external_data=False).graph
    written = {
        value.name
        for value in graph.initializer
        if any(entry.value.endswith("written.safetensors") for entry in value.external_data)
    }
    assert written == {"multi_modal_projector.mm_soft_emb_norm.weight"}


def test_a_tower_keeps_its_precision_where_the_decoder_is_quantized(tmp_path: Path) -> None:
    config = vision_model_config("gemma3")
    config.text_config.hidden_size = 64  # a multiple of the 32 inputs that share a scale
    model = drawn(MODEL_CLASSES["gemma3"](config))
    folder = save_vision_checkpoint(model, tmp_path / "checkpoint")
    export(folder, tmp_path / "model", device="cuda", precision="int4", tasks=("classify",))
    artifact = Artifact.open(tmp_path / "model")
    kinds = {}
    for head in ("score", "vision"):
        graph = onnx.load(artifact.graph_path(head, "cuda"), load_external_data=False).graph
        kinds[head] = {node.op_type for node in graph.node}
    assert "MatMulNBits" in kinds["score"]
    assert not {"MatMulNBits", "GatherBlockQuantized"} & kinds["vision"]
    assert artifact.signature("vision", "cuda").dtype == "float16"


def gemma_pytorch_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights of a Gemma 3 with pictures as gemma_pytorch names and fuses them."""
    theirs = (
        ("vision_tower.embeddings.", "siglip_vision_model."),
        ("vision_tower.encoder.layers.", "siglip_vision_model.encoder_blocks."),
        ("vision_tower.post_layernorm.", "siglip_vision_model.final_norm."),
        ("multi_modal_projector.mm_soft_emb_norm.", "mm_soft_embedding_norm."),
    )
    ours = parameters(model)
    kernel = ours.pop("vision_tower.embeddings.patch_embedding.weight")
    state = {
        "siglip_vision_model.patch_embedding.weight": kernel.view(-1, 3, 7, 7),
        "mm_input_projection.weight": ours.pop(
            "multi_modal_projector.mm_input_projection_weight"
        ).T.contiguous(),
        "text_token_embedder.weight": ours.pop("embed_tokens.weight"),
        "local_freqs_cis": torch.ones(2, 2) + 0j,
    }
    for i in range(4):
        fused = [ours.pop(f"layers.{i}.self_attn.{part}_proj.weight") for part in "qkv"]
        state[f"model.layers.{i}.self_attn.qkv_proj.weight"] = torch.cat(fused)
    for name, tensor in ours.items():
        for start, other in theirs:
            if name.startswith(start):
                state[name.replace(start, other).replace("out_proj", "o_proj")] = tensor
        if not is_of_pictures(name):
            text = name.replace("q_norm", "query_norm").replace("k_norm", "key_norm")
            state[f"model.{text}"] = tensor
    return state


def test_a_ckpt_says_what_the_folder_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_vision_model("gemma3")
    folder = save_vision_checkpoint(model, tmp_path / "folder")
    raw = json.loads((folder / "config.json").read_text())
    monkeypatch.setattr(ckpt_file, "SIZES", (Size(name="tiny", raw=raw["text_config"]),))
    monkeypatch.setattr(ckpt_file, "VISION_SIZES", (Size(name="tiny", raw=raw),))
    path = write_ckpt(tmp_path, gemma_pytorch_state(model))
    (tmp_path / "tokenizer.model").write_bytes(vision_tokenizer_model("gemma3"))
    checkpoint = read_checkpoint(path)
    check_names(checkpoint.tensors, expected_shapes(checkpoint))
    assert_equal(checkpoint, parameters(model))
    assert checkpoint.vision is not None
    assert read_checkpoint(path, text_only=True).vision is None


def test_an_adapter_changes_the_tower_too(tmp_path: Path) -> None:
    """What PEFT merges: factors of projections of both halves, and a whole projector."""
    model = tiny_vision_model("gemma3")
    base = read_checkpoint(save_vision_checkpoint(model, tmp_path / "base"))
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "out_proj", "fc1", "gate_proj"],
        init_lora_weights=False, modules_to_save=["multi_modal_projector"],
    )  # fmt: skip
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = merge_adapter(base, tmp_path / "adapter")
    expected = parameters(adapted.merge_and_unload())
    for name, stored in merged.tensors.items():
        np.testing.assert_allclose(values(stored), expected[name].numpy(), rtol=0, atol=2e-6)
        projected = ("self_attn.q_proj.", "out_proj.", "fc1.", "gate_proj.")
        changes = name.startswith("multi_modal") or (
            any(part in name for part in projected) and name.endswith("weight")
        )
        assert (stored is base.tensors[name]) != changes, name


def test_an_adapter_of_another_tower_is_refused(tmp_path: Path) -> None:
    base = read_checkpoint(save_vision_checkpoint(tiny_vision_model("gemma3"), tmp_path / "base"))
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 1}')
    prefix = "base_model.model.model.vision_tower.encoder.layers.7.self_attn.q_proj"
    factors = {
        f"{prefix}.lora_A.weight": torch.ones(1, 36),
        f"{prefix}.lora_B.weight": torch.ones(36, 1),
    }
    safetensors.torch.save_file(factors, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.7\..* which the checkpoint has not"):
        merge_adapter(base, folder)


@pytest.mark.parametrize("name", ["gemma3", "paligemma2"])
@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_damaged_settings_are_read_in_full_or_refused_in_a_sentence(
    tmp_path: Path, name: str, file: str
) -> None:
    folder = save_vision_checkpoint(tiny_vision_model(name), tmp_path)
    intact, rng = json.loads((folder / file).read_text()), random.Random(3)

    def read(case: bytes) -> None:
        (folder / file).write_bytes(case)
        checkpoint = read_checkpoint(folder)
        check_names(checkpoint.tensors, expected_shapes(checkpoint))
        if checkpoint.vision is not None:
            VisionConfig.from_json(json.loads(json.dumps(checkpoint.vision.to_json())))

    counts = judged((damaged_json(intact, rng) for _ in range(CASES)), read)
    assert min(counts["refused"], counts["read"]) > CASES // 50, counts
