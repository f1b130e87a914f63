"""Gemma 4 text models: the names of their files, what is linked, and what leaves a trace.

The ladder from the reference to the graph is in `test_parity.py`, for all decoders.
"""

import dataclasses
import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from beam_gemma.errors import CheckpointError, ConfigError
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.config import GemmaConfig
from beam_gemma.model.embedding_config import Pooling
from beam_gemma.model.layer_types import FULL, SLIDING
from beam_gemma.model.rope import RopeParameters
from beam_gemma.runtime.capacity import Capacity
from beam_gemma.runtime.cpu_session import Session
from export.__main__ import export
from export.checkpoints.hf_folder import check_names, expected_shapes, read_checkpoint
from export.checkpoints.tensors import TABLE, Checkpoint, is_norm
from export.graph.signatures import decoder_signature
from export.graph.tasks import embedding_config, graph_module, graph_signature
from export.graph.weights import inverse_frequencies
from tests.conftest import TinyModel
from tests.doubles.gemma4_models import gemma4_model
from tests.doubles.ragged import Feeder, run_module
from tests.doubles.reference import VOCAB, float64_throughout, logits_of, save_checkpoint

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def e2b(tiny_of: Callable[[str], TinyModel]) -> TinyModel:
    """A model with per-layer embeddings, whose layers 3 to 5 have no keys and values."""
    return tiny_of("gemma4_e2b")


@pytest.fixture(scope="module")
def dense(tiny_of: Callable[[str], TinyModel]) -> TinyModel:
    """A model whose full layers have keys for values."""
    return tiny_of("gemma4_dense")


def arrays(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {n: np.concatenate(list(t.chunks())) for n, t in checkpoint.tensors.items()}


def as_published(tiny: TinyModel, folder: Path, change: Callable[[Tensors], None]) -> Path:
    """Write a model as the text model of one that takes pictures and sound, as releases are.

    Args:
        tiny: The model.
        folder: Folder to write.
        change: Function that adds to the tensors, or takes of them.
    """
    source = tiny.checkpoint.path
    folder.mkdir()
    tensors = {
        f"model.language_{name}" if name.startswith("model.") else name: tensor
        for name, tensor in load_file(source / "model.safetensors").items()
    }
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((source / "config.json").read_text())
    raw = {"model_type": "gemma4", "text_config": text, "audio_config": {}, "audio_token_id": 9}
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "tokenizer.model").write_bytes((source / "tokenizer.model").read_bytes())
    return folder


def leftovers(tensors: Tensors) -> None:
    """Add what releases have for sound, and keys and values that no layer uses."""
    tensors["model.audio_tower.layers.0.norm_out.weight"] = torch.ones(3)
    tensors["model.audio_tower.layers.0.self_attn.q_proj.input_min"] = torch.tensor(-torch.inf)
    tensors["model.embed_audio.embedding_projection.weight"] = torch.ones(2, 3)
    for layer in (3, 5):
        for name in ("k_proj", "v_proj", "k_norm"):
            own = f"model.language_model.layers.{layer}.self_attn.{name}.weight"
            tensors[own] = torch.ones(16, 48)


def test_a_published_folder_is_its_text_model(
    e2b: TinyModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="export"):
        found = read_checkpoint(
            as_published(e2b, tmp_path / "published", leftovers), text_only=True
        )
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'published'}: exporting the model without what it has for sound"
    ]
    check_names(found.tensors, expected_shapes(found))
    assert found.config == e2b.checkpoint.config
    assert found.norm_offset == 0.0
    expected = arrays(e2b.checkpoint)
    for name, array in arrays(found).items():
        np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize(
    "name",
    [
        "layers.3.self_attn.v_norm.weight",
        "layers.2.self_attn.q_proj.bias",
        "layers.6.self_attn.k_proj.weight",
        "layers.0.experts.down_proj",
        "depth_tower.weight",
    ],
)
def test_a_tensor_without_a_place_is_refused(e2b: TinyModel, tmp_path: Path, name: str) -> None:
    def add(tensors: Tensors) -> None:
        tensors[f"model.language_model.{name}"] = torch.ones(3)

    found = read_checkpoint(as_published(e2b, tmp_path / "x", add), text_only=True)
    with pytest.raises(CheckpointError, match=f"language_model.{name} has no place"):
        check_names(found.tensors, expected_shapes(found))


def test_keys_of_a_layer_with_a_cache_are_needed(e2b: TinyModel, tmp_path: Path) -> None:
    def take(tensors: Tensors) -> None:
        del tensors["model.language_model.layers.2.self_attn.k_norm.weight"]

    found = read_checkpoint(as_published(e2b, tmp_path / "x", take), text_only=True)
    with pytest.raises(CheckpointError, match=r"tensor layers\.2\.self_attn\.k_norm\.weight, got"):
        check_names(found.tensors, expected_shapes(found))


def test_values_beside_keys_for_values_are_refused(dense: TinyModel, tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors["model.language_model.layers.1.self_attn.v_proj.weight"] = torch.ones(32, 48)

    found = read_checkpoint(as_published(dense, tmp_path / "x", add), text_only=True)
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.v_proj\.weight has no place"):
        check_names(found.tensors, expected_shapes(found))


def test_a_head_that_is_not_the_embedding_is_refused(e2b: TinyModel, tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = torch.ones(VOCAB, 48)

    with pytest.raises(CheckpointError, match=r"expected lm_head\.weight equal to"):
        read_checkpoint(as_published(e2b, tmp_path / "x", add), text_only=True)


def test_an_unknown_key_beside_the_text_model_is_refused(e2b: TinyModel, tmp_path: Path) -> None:
    folder = as_published(e2b, tmp_path / "x", leftovers)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "image_token": 7}))
    with pytest.raises(ConfigError, match="the key 'image_token' is not known"):
        read_checkpoint(folder)


def test_the_table_is_linked_as_the_checkpoint_has_it(tmp_path: Path) -> None:
    """On the CPU too, where all other matrices become float32."""
    model = gemma4_model("gemma4_e2b").to(torch.bfloat16)
    source = save_checkpoint(model, tmp_path / "checkpoint")
    export(source, tmp_path / "model", tasks=("generate",))
    artifact = Artifact.open(tmp_path / "model")
    linked = tmp_path / "model/weights/model.safetensors"
    assert linked.stat().st_ino == (source / "model.safetensors").stat().st_ino
    path = artifact.graph_path("generate", "cpu")
    graph = onnx.load(path, load_external_data=False).graph
    kinds = {value.name: value.data_type for value in graph.initializer if value.data_location}
    assert kinds.pop(TABLE) == onnx.TensorProto.BFLOAT16
    assert {*kinds.values()} == {onnx.TensorProto.FLOAT}
    rounded = gemma4_model("gemma4_e2b")
    rounded.load_state_dict({name: t.float() for name, t in model.state_dict().items()})
    ids = np.random.default_rng(3).integers(3, VOCAB, 70).tolist()
    [logits] = run_graph(artifact, [ids], [[(0, 70)]])
    # float32.
    np.testing.assert_allclose(logits, logits_of(rounded, ids), rtol=0, atol=1e-4)


def run_graph(
    artifact: Artifact, sequences: list[list[int]], steps: list[list[tuple[int, int]]]
) -> list[np.ndarray]:
    """Return the logits of each sequence's last token in each step of (sequence, tokens)."""
    signature = artifact.signature("generate", "cpu")
    feeder = Feeder(signature, len(sequences), max(map(len, sequences)))
    blocks = {state.group: feeder.num_blocks for state in signature.paged_states}
    path = str(artifact.graph_path("generate", "cpu"))
    session = Session(path, signature, Capacity(num_blocks=blocks, num_state_slots=0))
    rows = []
    for step in steps:
        chunks = [(i, sequences[i][feeder.past[i] : feeder.past[i] + n]) for i, n in step]
        feeds = feeder.feeds(chunks)
        if step is not steps[-1]:
            feeds |= {"logit_rows": np.arange(0), "probability_rows": np.arange(0)}
        logits = session.run(feeds, with_logits=True).logits
        assert logits is not None
        assert logits.shape == (len(feeds["logit_rows"]), VOCAB)
        rows.append(logits)
    return rows[-1:]


def test_steps_that_need_no_head_fill_the_caches(e2b: TinyModel) -> None:
    """Layers that read others' caches have no row to compute in them."""
    ids = e2b.sequences[1]
    [whole] = run_graph(e2b.artifact, [ids], [[(0, len(ids))]])
    chunks = [[(0, 7)], [(0, 64)], [(0, 1)], [(0, len(ids) - 72)]]
    [last] = run_graph(e2b.artifact, [ids], chunks)
    np.testing.assert_array_equal(last, whole[72:])


def test_layers_that_share_caches_write_none(e2b: TinyModel) -> None:
    signature = e2b.artifact.signature("generate", "cpu")
    layers = {state.group: state.layers for state in signature.paged_states}
    assert layers == {SLIDING: (0, 1), FULL: (2,)}
    sizes = {state.group: state.head_dim for state in signature.paged_states}
    assert sizes == {SLIDING: 16, FULL: 32}


def module_of(tiny: TinyModel, config: GemmaConfig, pooling: Pooling | None = None) -> Any:
    """Return our module in float64 with a checkpoint's weights: a decoder, or one that embeds."""
    checkpoint = tiny.checkpoint
    embedding = None if pooling is None else embedding_config(checkpoint, pooling)
    task = "generate" if embedding is None else "embed"
    signature = graph_signature(task, config, embedding, "cpu", "float32")
    module = graph_module(config, embedding, signature).double()
    state = {f"rotary.{g}.inv_freq": inverse_frequencies(config, g) for g in config.groups}
    state |= arrays(checkpoint)
    module.load_state_dict({n: torch.from_numpy(a) for n, a in state.items()}, strict=True)
    assert not any(is_norm(name) for name in state) or checkpoint.norm_offset == 0
    return module.eval()


def logits(tiny: TinyModel, config: GemmaConfig, module: torch.nn.Module) -> list[np.ndarray]:
    signature = decoder_signature(config, device="cpu", dtype="float32")
    steps = [[(i, len(ids)) for i, ids in enumerate(tiny.sequences)]]
    return run_module(module, signature, steps, tiny.sequences, np.float64)


LINEAR = RopeParameters(rope_theta=1e6, partial_rotary_factor=1.0)
OTHER_SETTINGS: dict[str, dict[str, Any]] = {
    "a window of one token more": {"sliding_window": 25},
    "a rotation of all channels": {
        "rope_parameters": ((SLIDING, RopeParameters(rope_theta=1e4)), (FULL, LINEAR))
    },
    "another base": {
        "rope_parameters": (
            (SLIDING, RopeParameters(rope_theta=1e4)),
            (FULL, RopeParameters(rope_theta=1e4, partial_rotary_factor=0.25)),
        )
    },
    "another scale": {"query_pre_attn_scalar": 2.0},
    "no cap of logits": {"final_logit_softcapping": None},
    "another epsilon": {"rms_norm_eps": 1e-2},
}


@pytest.mark.parametrize("change", OTHER_SETTINGS)
def test_each_setting_leaves_a_trace(e2b: TinyModel, change: str) -> None:
    config = dataclasses.replace(e2b.checkpoint.config, **OTHER_SETTINGS[change])
    got = logits(e2b, config, module_of(e2b, config))[1]
    # float64; right settings give the same to 1e-9.
    assert np.abs(got - e2b.exact_logits[1]).max() > 1e-3


@pytest.mark.parametrize(
    "name",
    [
        "layers.4.layer_scalar",
        "layers.1.per_layer_input_gate.weight",
        "layers.5.post_per_layer_input_norm.weight",
        "layers.2.self_attn.q_norm.weight",
        "layers.0.self_attn.k_norm.weight",
        "layers.4.mlp.up_proj.weight",
        "per_layer_projection_norm.weight",
        "per_layer_model_projection.weight",
        TABLE,
    ],
)
def test_each_kind_of_weight_leaves_a_trace(e2b: TinyModel, name: str) -> None:
    config = e2b.checkpoint.config
    module = module_of(e2b, config)
    weight = module.get_parameter(name)
    with torch.no_grad():  # every other row, as a norm takes out what all have in common
        weight[::2] *= 1.5
    got = logits(e2b, config, module)[1]
    # float64; right weights give the same to 1e-9.
    assert np.abs(got - e2b.exact_logits[1]).max() > 1e-3


@functools.cache
def exact_states(name: str, ids: tuple[int, ...]) -> np.ndarray:
    """Return transformers' last states [T, D] of a text in float64."""
    model = gemma4_model(name).double()
    with float64_throughout(), torch.no_grad():
        return model.model(torch.tensor([ids])).last_hidden_state[0].numpy()


@pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
@pytest.mark.parametrize("name", ["gemma4_e2b", "gemma4_moe", "gemma4_wide_heads"])
def test_embeddings_are_of_the_last_states(
    tiny_of: Callable[[str], TinyModel], name: str, pooling: Pooling
) -> None:
    tiny = tiny_of(name)
    module = module_of(tiny, tiny.checkpoint.config, pooling)
    ends = np.cumsum([len(ids) for ids in tiny.sequences])
    step = {
        "input_ids": torch.tensor([i for ids in tiny.sequences for i in ids]),
        "cu_seqlens": torch.tensor([0, *ends], dtype=torch.int32),
    }
    with torch.no_grad():
        found = module(step, {})[0]["embedding"].numpy()
    for got, ids in zip(found, tiny.sequences, strict=True):
        states = exact_states(name, tuple(ids))
        vector = states.mean(axis=0) if pooling == "mean" else states[-1]
        # float64.
        np.testing.assert_allclose(got, vector / np.linalg.norm(vector), rtol=0, atol=1e-9)
