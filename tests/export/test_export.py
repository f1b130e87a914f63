"""The export command: what it links, what it writes, and what it refuses."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from beam_gemma.model.artifact import MANIFEST, Artifact
from export.__main__ import export, main
from export.graph.signatures import decoder_signature
from export.graph.weights import inverse_frequencies
from tests.conftest import TinyModel
from tests.doubles.reference import save_checkpoint, tiny_model

SMALL = ("generate",)
"""Of two layers one graph, where any will do: to trace it takes most of an export's time."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A small model, whose checkpoint lies beside it."""
    folder = tmp_path_factory.mktemp("small")
    save_checkpoint(tiny_model("gemma_mha"), folder / "checkpoint")
    export(folder / "checkpoint", folder / "model", tasks=SMALL)
    return Artifact.open(folder / "model")


def checkpoint_of(small: Artifact) -> Path:
    return small.path.with_name("checkpoint")


def files_of(folder: Path) -> dict[str, os.stat_result]:
    return {f.relative_to(folder).as_posix(): f.stat() for f in folder.rglob("*") if f.is_file()}


def test_matrices_are_not_copied(tiny_gemma3: TinyModel) -> None:
    """A float32 checkpoint on the CPU: only norms and frequencies are written."""
    files = files_of(tiny_gemma3.artifact.path)
    source = tiny_gemma3.checkpoint.path / "model.safetensors"
    assert files["weights/model.safetensors"].st_ino == source.stat().st_ino
    written = sum(s.st_size for n, s in files.items() if n.endswith("written.safetensors"))
    norms = sum(
        4 * int(np.prod(s.shape))
        for n, s in tiny_gemma3.checkpoint.tensors.items()
        if n.endswith("norm.weight")
    )
    assert norms < written < norms + 16_000  # the header and two rows of frequencies


def test_a_bfloat16_checkpoint_links_for_cuda_and_converts_for_the_cpu(tmp_path: Path) -> None:
    import torch

    model = tiny_model("gemma").to(torch.bfloat16)
    source = save_checkpoint(model, tmp_path / "checkpoint")
    export(source, tmp_path / "cuda", device="cuda", checksums="later", tasks=SMALL)
    export(source, tmp_path / "cpu", tasks=SMALL)
    cuda, cpu = files_of(tmp_path / "cuda"), files_of(tmp_path / "cpu")
    assert cuda["weights/model.safetensors"].st_nlink == 2
    assert "weights/model.safetensors" not in cpu
    assert cpu["weights/written.safetensors"].st_size > 2 * source.stat().st_size
    entries = json.loads((tmp_path / "cuda" / MANIFEST).read_text())["files"]
    assert entries["weights/model.safetensors"]["sha256"] is None
    assert entries["weights/written.safetensors"]["sha256"] is not None
    Artifact.open(tmp_path / "cuda").verify()
    graph = onnx.load(tmp_path / "cuda" / "generate.cuda.onnx", load_external_data=False)
    signature = decoder_signature(
        Artifact.open(tmp_path / "cuda").config, device="cuda", dtype="bfloat16"
    )
    assert [i.name for i in graph.graph.input] == [
        *(t.name for t in signature.step_inputs()),
        *(t.input_name for t in signature.state_tensors()),
    ]
    attention = [n for n in graph.graph.node if n.op_type == "RaggedAttention"]
    assert len(attention) == 3
    weights = {i.name for i in graph.graph.initializer if i.data_location}
    # A MatMul would need its weight transposed, and so copied.
    assert not [n for n in graph.graph.node if n.op_type == "MatMul" and weights & set(n.input)]


def test_another_file_system_gets_a_copy_and_says_so(
    small: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "another device")

    monkeypatch.setattr("export.graph.weights.os.link", refuse)
    export(checkpoint_of(small), tmp_path / "model", tasks=SMALL)
    copy = tmp_path / "model" / "weights" / "model.safetensors"
    assert copy.read_bytes() == (checkpoint_of(small) / "model.safetensors").read_bytes()
    assert "cannot be linked" in caplog.text
    assert Artifact.open(tmp_path / "model").digest == small.digest


def test_symbolic_dimensions_carry_the_signature(tiny_gemma3: TinyModel) -> None:
    path = tiny_gemma3.artifact.graph_path("generate", "cpu")
    graph = onnx.load(path, load_external_data=False).graph
    signature = tiny_gemma3.artifact.signature("generate", "cpu")
    shapes = {t.name: t.shape for t in (*signature.step_inputs(), *signature.outputs())}
    for state in signature.state_tensors():
        shapes |= {state.input_name: state.shape, state.output_name: state.shape}
    for value in (*graph.input, *graph.output):
        dims = tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
        assert dims == shapes[value.name], value.name


def test_frequencies_are_the_references(tiny_gemma3: TinyModel) -> None:
    """To the last bit: an angle is a frequency times a position of up to 131,072."""
    rotary = tiny_gemma3.reference.model.rotary_emb
    config = tiny_gemma3.checkpoint.config
    for group in config.groups:
        expected = getattr(rotary, f"{group}_inv_freq").numpy()
        np.testing.assert_array_equal(inverse_frequencies(config, group), expected)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--precison", "fp32"], "unknown flag --precison; did you mean --precision?"),
        (["--precision", "bf16"], "expected auto or fp32 for --device cpu, got bf16"),
        (["--checkpoint", "nowhere"], "nowhere: expected a folder with config.json"),
    ],
)
def test_a_bad_setting_is_one_sentence(
    tiny_gemma3: TinyModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    sentence: str,
) -> None:
    checkpoint = str(tiny_gemma3.checkpoint.path)
    code = main(["--checkpoint", checkpoint, "--output", str(tmp_path / "model"), *flags])
    error = capsys.readouterr().err
    assert code == 2
    assert sentence in error
    assert error.count("\n") == 1
    assert not (tmp_path / "model").exists()


def test_an_output_is_replaced_only_on_request(small: Artifact, tmp_path: Path) -> None:
    output = tmp_path / "model"
    output.mkdir()
    (output / "precious.txt").write_text("keep")
    flags = ["--checkpoint", str(checkpoint_of(small)), "--output", str(output)]
    flags += ["--tasks", *SMALL]
    assert main(flags) == 2
    assert (output / "precious.txt").exists()
    assert main([*flags, "--overwrite"]) == 0
    assert Artifact.open(output).digest == small.digest


def test_a_failed_export_leaves_no_model(small: Artifact, tmp_path: Path) -> None:
    source = Path(shutil.copytree(checkpoint_of(small), tmp_path / "checkpoint"))
    (source / "tokenizer.model").unlink()
    flags = ["--checkpoint", str(source), "--output", str(tmp_path / "model"), "--tasks", *SMALL]
    assert main(flags) == 2
    assert not (tmp_path / "model").exists()
