"""Matrices of 4 and 8 bits: their numbers are ggml's, and those of a GGUF file stay as they are."""

from pathlib import Path

import gguf
import numpy as np
import onnx_ir as ir
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from beam_gemma.errors import CheckpointError
from export.checkpoints import tensors
from export.checkpoints.gguf_header import read_gguf_header
from export.checkpoints.gguf_tensors import stored_tensor
from export.checkpoints.tensors import StoredTensor
from export.graph.quantize import (
    BLOCK,
    EMBEDDING,
    Blocks,
    CodedMatrix,
    coded_matrices,
    quantize_graph,
)

KINDS = {4: GGMLQuantizationType.Q4_0, 8: GGMLQuantizationType.Q8_0}


@pytest.fixture(autouse=True)
def _small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut matrices of these tests into several slices."""
    monkeypatch.setattr(tensors, "CHUNK_BYTES", 4 * 64 * 10)


def matrix(kind: type = np.float32) -> np.ndarray:
    """Return [35, 64] with a block of zeros and outliers of both signs."""
    values = np.random.default_rng(5).standard_normal((35, 64)).astype(np.float32)
    values[3, :32] = 0
    values[4, 40], values[5, 41] = 50, -50
    return values.astype(kind)


def plain(values: np.ndarray) -> StoredTensor:
    def rows(start: int, stop: int) -> np.ndarray:
        return values[start:stop]

    return StoredTensor(name="x", shape=values.shape, dtype="float32", raw=None, rows=rows)


def from_gguf(folder: Path, values: np.ndarray, kind: GGMLQuantizationType) -> StoredTensor:
    """Return a matrix as a GGUF file holds it."""
    writer = gguf.GGUFWriter(folder / "x.gguf", "gemma3")
    writer.add_tensor("x", quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored_tensor(read_gguf_header(folder / "x.gguf").tensors[0])


def decoded(stored: StoredTensor, bits: int, name: str = "x") -> np.ndarray:
    """Return what ONNX Runtime's definition makes of codes and scales, in float32."""
    coded = CodedMatrix.of(name, bits, stored.shape)
    blocks = Blocks(stored, coded)
    codes = np.concatenate(list(blocks.codes()))
    scales = np.concatenate(list(blocks.scales()))
    assert (codes.dtype, scales.dtype) == (np.uint8, np.float16)
    assert codes.shape == (*scales.shape, BLOCK * bits // 8)
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*scales.shape, BLOCK)
    numbers = codes.astype(np.float32) - 2 ** (bits - 1)
    return (numbers * scales[..., None].astype(np.float32)).reshape(coded.shape)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_rounding_is_ggmls(bits: int, kind: type) -> None:
    values = matrix(kind)
    expected = dequantize(quantize(values.astype(np.float32), KINDS[bits]), KINDS[bits])
    np.testing.assert_array_equal(decoded(plain(values), bits), expected)


@pytest.mark.parametrize(("name", "bits"), [("Q4_0", 4), ("Q4_0", 8), ("Q8_0", 8)])
def test_numbers_of_a_gguf_file_are_not_rounded_again(tmp_path: Path, name: str, bits: int) -> None:
    """Q4_0 in 8 bits too, which have room for its numbers under the same scale."""
    kind = GGMLQuantizationType[name]
    values = matrix()
    stored = from_gguf(tmp_path, values, kind)
    expected = dequantize(quantize(values, kind), kind)
    np.testing.assert_array_equal(decoded(stored, bits), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_scales_that_no_rounding_would_choose_are_kept(bits: int) -> None:
    """No number of the block is as large as its scale allows."""
    kind = KINDS[bits]
    packed = np.zeros((1, 2 + 4 * bits), np.uint8)
    packed[0, :2] = np.array([0.125], np.float16).view(np.uint8)
    # Numbers from -2 to 2 in both halves of each byte, or from 0 to 31.
    packed[0, 2:] = 17 * (6 + np.arange(16) % 5) if bits == 4 else np.arange(32)

    def rows(start: int, stop: int) -> np.ndarray:
        return dequantize(packed[start:stop], kind)

    stored = StoredTensor(
        name="x",
        shape=(1, 32),
        dtype=kind.name,
        raw=None,
        rows=rows,
        coded_rows=lambda start, stop: packed[start:stop],
    )
    np.testing.assert_array_equal(decoded(stored, bits), rows(0, 1))
    blocks = Blocks(stored, CodedMatrix.of("x", bits, (1, 32)))
    list(blocks.codes())
    assert [scales.item() for scales in blocks.scales()] == [0.125]


@pytest.mark.parametrize("stores", ["numbers", "codes"])
def test_experts_outputs_are_below_each_other_and_then_their_inputs_side_by_side(
    tmp_path: Path, stores: str
) -> None:
    values = np.stack([matrix(), matrix()[::-1], 2 * matrix()])
    kind = KINDS[4]
    stored = plain(values) if stores == "numbers" else from_gguf(tmp_path, values, kind)
    expected = dequantize(quantize(values, kind), kind).reshape(values.shape)
    below = decoded(stored, 4, "layers.0.experts.gate_up_proj")
    np.testing.assert_array_equal(below, expected.reshape(3 * 35, 64))
    beside = decoded(stored, 4, "layers.0.experts.down_proj")
    np.testing.assert_array_equal(beside, np.concatenate(list(expected), axis=1))


@pytest.mark.parametrize("name", ["experts.gate_up_proj", "experts.down_proj", "proj.weight"])
def test_the_names_of_its_parts_say_what_a_matrix_is_in_a_checkpoint(name: str) -> None:
    shape = (35, 64) if name == "proj.weight" else (3, 35, 64)
    coded = CodedMatrix.of(name, 8, shape)
    assert coded.stored_shape == shape
    assert coded_matrices({coded.codes: coded.shape_of(coded.codes)}) == {name: coded}


def test_wider_numbers_of_a_gguf_file_are_rounded(tmp_path: Path) -> None:
    stored = from_gguf(tmp_path, matrix(), GGMLQuantizationType.Q8_0)
    values = np.concatenate(list(stored.chunks()))
    expected = dequantize(quantize(values, KINDS[4]), KINDS[4])
    np.testing.assert_array_equal(decoded(stored, 4), expected)


def float16(name: str, *shape: int) -> ir.Value:
    kind = ir.TensorType(ir.DataType.FLOAT16)
    return ir.Value(name=name, shape=ir.Shape(shape), type=kind)


def graph(width: int = 64) -> ir.Model:
    """Return a graph that looks rows up in an embedding, and multiplies with it and another."""
    ids = ir.Value(name="ids", shape=ir.Shape(["T"]), type=ir.TensorType(ir.DataType.INT64))
    embedding, proj = float16(EMBEDDING, 300, width), float16("proj.weight", 96, width)
    rows = ir.node("Gather", [embedding, ids], {"axis": 0})
    nodes = [
        rows,
        ir.node("Gemm", [rows.outputs[0], proj], {"transB": 1}),
        ir.node("Gemm", [rows.outputs[0], embedding], {"transB": 1}),
    ]
    outputs = [node.outputs[0] for node in nodes[1:]]
    for name, value in zip(("x", "logits"), outputs, strict=True):
        value.name, value.type = name, ir.TensorType(ir.DataType.FLOAT16)
    return ir.Model(
        ir.Graph([ids], outputs, nodes=nodes, initializers=[embedding, proj],
                 opset_imports={"": 23, "com.microsoft": 1}, name="graph"),
        ir_version=10,
    )  # fmt: skip


def test_products_and_look_ups_read_the_same_codes() -> None:
    """The embedding keeps 8 bits in a graph of 4, once for both of its uses."""
    model = graph()
    quantize_graph(model, 4)
    nodes = {node.op_type: node for node in model.graph}
    assert sorted(nodes) == ["GatherBlockQuantized", "MatMulNBits", "Reshape"]
    products = [n for n in model.graph if n.op_type == "MatMulNBits"]
    sizes = [tuple(n.attributes[a].as_int() for a in ("N", "K", "bits", "block_size"))
             for n in products]  # fmt: skip
    assert sizes == [(96, 64, 4, 32), (300, 64, 8, 32)]
    assert nodes["GatherBlockQuantized"].inputs[0] is products[1].inputs[1]
    shapes = {name: tuple(v.shape) for name, v in model.graph.initializers.items() if v.shape}
    assert shapes == {
        "proj.weight:4:codes": (96, 2, 16),
        "proj.weight:4:scales": (96, 2),
        "embed_tokens.weight:8:codes": (300, 2, 32),
        "embed_tokens.weight:8:scales": (300, 2),
        "embed_tokens.weight:8:lookup_scales": (300, 2, 1),
    }
    found = coded_matrices(shapes)
    assert {name: (m.bits, m.shape) for name, m in found.items()} == {
        "proj.weight": (4, (96, 64)),
        EMBEDDING: (8, (300, 64)),
    }


def test_inputs_must_make_whole_blocks() -> None:
    with pytest.raises(CheckpointError, match="expected a multiple of 32 inputs"):
        quantize_graph(graph(width=48), 8)


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.altup.correction_coefs.weight",
        "layers.0.altup.prediction_coefs.weight",
        "layers.0.altup.modality_router.weight",
        "layers.0.router.proj.weight",
    ],
)
def test_matrices_that_route_tokens_or_mix_streams_keep_their_numbers(name: str) -> None:
    """Coefficients of streams have 4 inputs, which make no block."""
    x, weight = (
        ir.Value(name=n, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT16))
        for n, shape in (("x", ["T", 4]), (name, [4, 4]))
    )
    product = ir.node("Gemm", [x, weight], {"transB": 1})
    nodes = ir.Graph(
        [x], product.outputs, nodes=[product], initializers=[weight], opset_imports={"": 23}
    )
    model = ir.Model(nodes, ir_version=10)
    quantize_graph(model, 4)
    assert list(model.graph.initializers) == [name]
    assert [node.op_type for node in model.graph] == ["Gemm"]


def test_another_use_of_a_matrix_is_no_product() -> None:
    model = graph()
    proj = model.graph.initializers["proj.weight"]
    model.graph.append(ir.node("Transpose", [proj], {"perm": [1, 0]}))
    with pytest.raises(AssertionError, match="Transpose of a matrix"):
        quantize_graph(model, 8)
