"""Reading `.pt` files of the original RecurrentGemma, and adapters and folders of one."""

import json
import random
from pathlib import Path

import numpy as np
import peft
import pytest
import safetensors.torch
import torch

from beam_gemma.errors import CheckpointError
from export.__main__ import export
from export.checkpoints import recurrent_file
from export.checkpoints.hf_folder import read_checkpoint
from export.checkpoints.lora import merge_adapter
from export.checkpoints.released_sizes import RECURRENT_SIZES, Size
from export.checkpoints.tensors import Checkpoint, StoredTensor
from tests.doubles.checkpoint_files import values
from tests.doubles.damage import damaged, judged
from tests.doubles.griffin import griffin_state
from tests.doubles.recurrent_models import recurrent_model
from tests.doubles.reference import save_checkpoint
from tests.doubles.tiny_tokenizer import tiny_tokenizer_model
from tests.export.test_fuzz_checkpoints import read_whole

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return recurrent_model(num_layers=3)


@pytest.fixture(scope="module")
def folder(model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(model, tmp_path_factory.mktemp("folder") / "tiny")


@pytest.fixture
def released(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    """The tiny model as if it were a released size."""
    raw = json.loads((folder / "config.json").read_text())
    sizes = (*RECURRENT_SIZES, Size(name="tiny", raw=raw))
    monkeypatch.setattr(recurrent_file, "RECURRENT_SIZES", sizes)
    return read_checkpoint(folder)


def write_pt(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer_model())
    torch.save(state, folder / "2b.pt")
    return folder / "2b.pt"


@pytest.mark.parametrize("by_columns", [False, True])
def test_a_pt_says_what_the_safetensors_say(
    released: Checkpoint, model: torch.nn.Module, tmp_path: Path, *, by_columns: bool
) -> None:
    """Also where its matrices lie by columns, as those that were converted from Flax do."""
    state = griffin_state(model)
    if by_columns:
        state |= {
            name: tensor.T.contiguous().T
            for name, tensor in state.items()
            if name.endswith(".weight")
        }
    found = read_checkpoint(write_pt(tmp_path, state))
    assert found.config == released.config
    assert found.norm_offset == released.norm_offset
    # Such a file lists no end tokens: the end of turn is one if the vocabulary has it.
    assert found.eos_token_ids == (1, 5)
    assert found.tensors.keys() == released.tensors.keys()
    for name, stored in found.tensors.items():
        np.testing.assert_array_equal(values(stored), values(released.tensors[name]))
        # All others can be linked, not copied.
        is_turned = any(part in name for part in ("gate_proj", "up_proj", "conv_1d.weight"))
        is_linear = len(stored.shape) == 2 and name.endswith(".weight") and "embed" not in name
        assert (stored.raw is None) == (is_turned or (by_columns and is_linear))


def test_a_slice_of_a_turned_matrix_is_that_of_the_whole(
    released: Checkpoint, model: torch.nn.Module, tmp_path: Path
) -> None:
    found = read_checkpoint(write_pt(tmp_path, griffin_state(model)))
    for name in ("layers.0.mlp_block.up_proj.weight", "layers.0.temporal_block.conv_1d.weight"):
        expected = values(released.tensors[name])[3:7]
        np.testing.assert_array_equal(found.tensors[name].rows(3, 7), expected)


@pytest.mark.usefixtures("released")
def test_a_pt_exports(model: torch.nn.Module, tmp_path: Path) -> None:
    path = write_pt(tmp_path, griffin_state(model))
    export(path, tmp_path / "exported", tasks=("generate",))
    assert path.samefile(tmp_path / "exported/weights/2b.pt")


@pytest.mark.parametrize("size", RECURRENT_SIZES, ids=lambda size: size.name)
def test_a_released_size_is_known_by_its_shapes(size: Size, tmp_path: Path) -> None:
    shapes = {**size.tensor_shapes(), "embed_tokens.weight": (256128, size.config.hidden_size)}
    tensors = {
        name: StoredTensor(name=name, shape=s, dtype="bfloat16", raw=None, rows=np.zeros)
        for name, s in shapes.items()
    }
    assert recurrent_file._config(tmp_path, tensors).vocab_size == 256128
    tensors["layers.0.odd"] = tensors["norm.weight"]
    with pytest.raises(CheckpointError, match="expected the weights of RecurrentGemma 2B or"):
        recurrent_file._config(tmp_path, tensors)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"blocks.0.odd": torch.ones(1)}, r"got \d+ tensors in 3 layers and an embedding"),
        ({"blocks.0.mlp_block.ffw_up.w": torch.ones(3, 96, 96)}, "expected the weights of"),
        ({"blocks.0.mlp_block.ffw_up.b": torch.ones(2, 96)}, "expected the weights of"),
        ({"blocks.0.recurrent_block.conv_1d.w": torch.ones(128)}, "expected the weights of"),
        ({"embedder.input_embedding": torch.ones(300)}, r"an embedding of shape \[300\]"),
        ({"norm": 1.0}, "expected a tensor under each name of the model's state, got 'norm'"),
        ({"final_norm.scale": torch.ones(96, dtype=torch.float64)}, "as a contiguous tensor of"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_other_weights_are_refused(
    released: Checkpoint, model: torch.nn.Module, tmp_path: Path, change: dict, sentence: str
) -> None:
    assert released.config.num_hidden_layers == 3
    path = write_pt(tmp_path, griffin_state(model) | change)
    with pytest.raises(CheckpointError, match=sentence):
        read_checkpoint(path)


def test_damaged_files_are_refused_in_a_sentence(
    released: Checkpoint, model: torch.nn.Module, tmp_path: Path
) -> None:
    assert released.config.num_hidden_layers == 3
    path = write_pt(tmp_path, griffin_state(model))
    intact = path.read_bytes()

    def read(content: bytes) -> None:
        path.write_bytes(content)
        read_whole(read_checkpoint(path))

    rng = random.Random(16)
    counts = judged((damaged(intact, rng) for _ in range(60)), read)
    assert counts["refused"] > 5


def test_a_folder_of_flax_is_named(tmp_path: Path) -> None:
    (tmp_path / "_METADATA").write_text("{}")
    with pytest.raises(CheckpointError, match="got a checkpoint of Flax, which is not read"):
        read_checkpoint(tmp_path)


def test_all_matrices_take_an_adapter(folder: Path, tmp_path: Path) -> None:
    targets = ["q_proj", "o_proj", "linear_x", "linear_y", "linear_out", "gate_proj", "down_proj"]
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    peft.get_peft_model(recurrent_model(num_layers=3), config).save_pretrained(tmp_path)
    adapted = peft.PeftModel.from_pretrained(recurrent_model(num_layers=3), tmp_path)
    expected = adapted.merge_and_unload().state_dict()
    merged = merge_adapter(read_checkpoint(folder), tmp_path)
    for name, stored in merged.tensors.items():
        theirs = "final_norm.weight" if name == "norm.weight" else name
        np.testing.assert_array_equal(values(stored), expected[f"model.{theirs}"].numpy())
        is_changed = name.endswith("weight") and any(target in name for target in targets)
        assert (stored.raw is None) == is_changed


@pytest.mark.parametrize(
    "part", ["conv_1d.lora_A.weight", "rg_lru.lora_A.weight", "conv_1d.weight"]
)
def test_an_adapter_of_convolutions_or_gates_is_refused(
    folder: Path, tmp_path: Path, part: str
) -> None:
    config = {"peft_type": "LORA", "lora_alpha": 1}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    name = f"base_model.model.model.layers.0.temporal_block.{part}"
    tensors = {name: torch.ones(4, 4), name.replace("lora_A", "lora_B"): torch.ones(4, 4)}
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=f"layers.0.temporal_block.{part.split('.')[0]}"):
        merge_adapter(read_checkpoint(folder), tmp_path)
