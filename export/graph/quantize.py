"""Rounds, lays out and multiplies with matrices of 4 or 8 bits per number.

A block is 32 numbers along a matrix's inputs, with one float16 scale; code c of b bits stands for
scale * (c - 2^(b - 1)). These are the numbers of ggml's Q4_0 and Q8_0, so a matrix stored in that
form in a GGUF file is kept exactly; any other is rounded to the nearest code, by ggml's rule.

ONNX Runtime's `MatMulNBits` and `GatherBlockQuantized` read the same codes, so a matrix that is
both embedding and head is stored once. The two ops expect different shapes for the scales.

Experts' matrices are coded as one for all experts: their outputs are below each other in the first
product, and their inputs side by side in the second (`export.ops.lowering_experts`).

Dimensions: N outputs of a matrix, K inputs, J = K / 32 blocks of an output, T tokens, E experts, D
hidden, F an expert's feed-forward.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from beam_gemma.errors import CheckpointError
from export.checkpoints.tensors import EMBEDDING, HEAD, TABLE, StoredTensor
from export.ops.lowering_experts import CodedExpertMlp, ExpertMlp

BLOCK = 32
BITS = {"int8": 8, "int4": 4}
"""Bits per number of a matrix, by precision."""
EMBEDDING_BITS = 8
"""Fewest bits per number of an embedding or a head, which lose most with fewer bits."""
DOWN = "experts.down_proj"
"""End of the names of the experts' second matrices."""
Q4, Q8 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0
ROUTING = re.compile(r"\.(altup\.\w+|router\.proj)\.weight$")
"""Ends of the names of small matrices that route tokens to experts or mix the streams of a token.

Those of Gemma 3n have as few as 4 inputs, which make no block.
"""


@dataclass(frozen=True, kw_only=True)
class CodedMatrix:
    """A matrix that graphs read in blocks, and the names of its parts."""

    name: str
    bits: int
    shape: tuple[int, int]
    """[N, K]."""
    experts: int = 0
    """Matrices of a checkpoint that are one here; 0 for a matrix by itself."""

    @classmethod
    def of(cls, name: str, bits: int, shape: tuple[int, ...]) -> "CodedMatrix":
        """Return a coded matrix of at least `bits` bits per number.

        Raises:
            CheckpointError: the number of inputs is not a multiple of `BLOCK`.
        """
        *experts, outputs, inputs = shape
        if inputs % BLOCK:
            raise CheckpointError(
                f"{name}: expected a multiple of {BLOCK} inputs, of which so many share a "
                f"scale, got {inputs}; export with another --precision"
            )
        least = EMBEDDING_BITS if name.endswith((EMBEDDING, HEAD, TABLE)) else 0
        matrix = cls(name=name, bits=max(bits, least), shape=(outputs, inputs))
        for count in experts:
            beside, below = (outputs, count * inputs), (count * outputs, inputs)
            shape_of_all = beside if matrix.is_side_by_side else below
            matrix = replace(matrix, shape=shape_of_all, experts=count)
        return matrix

    @property
    def is_side_by_side(self) -> bool:
        """True if the inputs of all experts are those of one output."""
        return self.name.endswith(DOWN)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape in a checkpoint."""
        outputs, inputs = self.shape
        if not self.experts:
            return self.shape
        if self.is_side_by_side:
            return self.experts, outputs, inputs // self.experts
        return self.experts, outputs // self.experts, inputs

    @property
    def codes(self) -> str:
        """Name of the codes, uint8 [N, J, 4 * bits]."""
        return self._part("codes")

    @property
    def scales(self) -> str:
        """Name of the scales, float16 [N, J]."""
        return self._part("scales")

    @property
    def lookup_scales(self) -> str:
        """Name of the same scales for look-ups, float16 [N, J, 1]."""
        return self._part("lookup_scales")

    def _part(self, kind: str) -> str:
        return f"{self.name}:{self.bits}:{kind}" + (f":{self.experts}" if self.experts else "")

    def shape_of(self, part: str) -> tuple[int, ...]:
        """Return the shape of the part with this name."""
        outputs, num_blocks = self.shape[0], self.shape[1] // BLOCK
        last = {self.codes: (BLOCK * self.bits // 8,), self.lookup_scales: (1,)}
        return outputs, num_blocks, *last.get(part, ())


def coded_matrices(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, CodedMatrix]:
    """Return the coded matrices, by name, whose parts are among these initializers."""
    found = {}
    for part, (outputs, num_blocks, *_) in ((p, s) for p, s in shapes.items() if is_part(p)):
        name, bits, _, *experts = part.split(":")
        shape = outputs, num_blocks * BLOCK
        count = int(experts[0]) if experts else 0
        found[name] = CodedMatrix(name=name, bits=int(bits), shape=shape, experts=count)
    return found


def is_part(name: str) -> bool:
    """Return whether an initializer is part of a coded matrix."""
    return ":" in name


def keeps_numbers(name: str) -> bool:
    """Return whether a matrix has 16 bits per number in any precision."""
    return ROUTING.search(name) is not None


def quantize_graph(model: ir.Model, bits: int) -> None:
    """Make each product with a float16 matrix, and each look-up in one, read coded blocks instead.

    Args:
        model: The graph, changed in place; its weights are not attached yet.
        bits: Bits per number; embeddings and heads have at least `EMBEDDING_BITS`.

    Raises:
        CheckpointError: a matrix's number of inputs is not a multiple of `BLOCK`.
    """
    for name, value in list(model.graph.initializers.items()):
        if value.const_value is None and value.dtype == ir.DataType.FLOAT16:
            assert value.shape is not None
            # One embedding and the gates of heads are no matrices either.
            if len(value.shape) != 2 or name.endswith("bias") or keeps_numbers(name):
                continue
            matrix = CodedMatrix.of(name, bits, value.shape.numpy())
            for node, index in list(value.uses()):
                _replace(model.graph, node, index, matrix)
            del model.graph.initializers[name]
    # Afterwards, since the parts of experts' matrices are no matrices themselves.
    for node in [node for node in model.graph if node.op_type == ExpertMlp.name]:
        _replace_experts(model, node, bits)


def _replace(graph: ir.Graph, node: ir.Node, index: int, matrix: CodedMatrix) -> None:
    """Replace a node that reads the matrix by nodes that read its blocks."""
    if (node.op_type, index) == ("Gemm", 1):
        assert node.attributes["transB"].as_int() == 1
        x, _, *bias = node.inputs
        new = [_product(graph, x, matrix, *bias)]
    else:
        assert (node.op_type, index) == ("Gather", 0), f"{node.op_type} of a matrix"
        new = _rows(graph, node.inputs[1], matrix)
    ir.convenience.replace_nodes_and_values(graph, node, [node], new, node.outputs, new[-1].outputs)


def _replace_experts(model: ir.Model, node: ir.Node, bits: int) -> None:
    """Replace a node that computes with matrices of experts by one that reads blocks of them."""
    x, gate_up, down, *choice, _ = node.inputs
    matrices = []
    for value in (gate_up, down):
        assert value is not None
        assert value.name is not None
        assert value.shape is not None
        matrices.append(CodedMatrix.of(value.name, bits, value.shape.numpy()))
        del model.graph.initializers[value.name]
    first, second = matrices
    parts = (
        _part(model.graph, matrix, part)
        for matrix in matrices
        for part in (matrix.codes, matrix.scales)
    )
    rows = [-1, first.experts, first.shape[0] // first.experts]
    attributes = {
        "gate_up_size": first.shape[0],
        "hidden_size": first.shape[1],
        "inner_size": second.shape[1],
        "gate_up_bits": first.bits,
        "down_bits": second.bits,
        "block_size": BLOCK,
        "to": node.attributes["to"].as_int(),
    }
    inputs = [x, *parts, *choice, _shape(model.graph, f"{first.name}:rows", rows)]
    new = ir.node(CodedExpertMlp.name, inputs, attributes, domain=node.domain)
    ir.convenience.replace_nodes_and_values(
        model.graph, node, [node], [new], node.outputs, new.outputs
    )
    body = ir.serde.deserialize_function(CodedExpertMlp.to_function_proto())
    model.functions[body.identifier()] = body


def _product(
    graph: ir.Graph, x: ir.Value | None, matrix: CodedMatrix, bias: ir.Value | None = None
) -> ir.Node:
    """Return the node for x [T, K] times the matrix, plus a bias [N] if there is one."""
    parts = (_part(graph, matrix, part) for part in (matrix.codes, matrix.scales))
    outputs, inputs = matrix.shape
    shape = {"N": outputs, "K": inputs, "bits": matrix.bits, "block_size": BLOCK}
    rest = [] if bias is None else [None, None, bias]  # zero points, an index of groups
    return ir.node("MatMulNBits", [x, *parts, *rest], shape, domain="com.microsoft")


def _rows(graph: ir.Graph, places: ir.Value | None, matrix: CodedMatrix) -> list[ir.Node]:
    """Return nodes that look up the rows at indices [T] as blocks and reshape them to rows."""
    codes, scales = (_part(graph, matrix, p) for p in (matrix.codes, matrix.lookup_scales))
    axes = {"gather_axis": 0, "quantize_axis": 2, "bits": matrix.bits, "block_size": BLOCK}
    inputs = [codes, places, scales]
    rows = ir.node("GatherBlockQuantized", inputs, axes, domain="com.microsoft")
    rows.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
    shape = _shape(graph, f"{matrix.name}:row", [0, matrix.shape[1]])
    return [rows, ir.node("Reshape", [rows.outputs[0], shape])]


def _shape(graph: ir.Graph, name: str, sizes: list[int]) -> ir.Value:
    """Return the initializer of a shape, created on first use."""
    value = ir.Value(name=name, const_value=ir.tensor(sizes, name=name))
    return graph.initializers.setdefault(name, value)


def _part(graph: ir.Graph, matrix: CodedMatrix, part: str) -> ir.Value:
    """Return the initializer of a part, created on first use; its bytes are attached later."""
    kind = ir.DataType.UINT8 if part == matrix.codes else ir.DataType.FLOAT16
    shape, type_ = ir.Shape(matrix.shape_of(part)), ir.TensorType(kind)
    return graph.initializers.setdefault(part, ir.Value(name=part, shape=shape, type=type_))


class Blocks:
    """The blocks of a stored matrix, computed slice by slice."""

    def __init__(self, stored: StoredTensor, matrix: CodedMatrix) -> None:
        """Describe the blocks; nothing is read yet.

        Args:
            stored: The matrix [N, K], or those of all experts.
            matrix: The matrix that graphs read.
        """
        self._stored, self._matrix, self._bits = stored, matrix, matrix.bits
        self._scales: list[np.ndarray] = []

    def codes(self) -> Iterator[np.ndarray]:
        """Yield uint8 [N, J, 4 * bits] in slices; the low half of a byte holds the first code."""
        yield from self._in_order(self._codes())

    def scales(self) -> Iterator[np.ndarray]:
        """Yield float16 [N, J] in slices; `codes` must have been read to its end before."""
        found, self._scales = self._scales, []
        yield from self._in_order(iter(found))

    def _in_order(self, slices: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield slices of outputs; those of experts that are side by side, as one slice."""
        matrix = self._matrix
        if not matrix.is_side_by_side:
            yield from slices
            return
        whole = np.concatenate(list(slices))
        experts, outputs, _ = matrix.stored_shape
        by_expert = whole.reshape(experts, outputs, *whole.shape[1:])
        yield np.moveaxis(by_expert, 0, 1).reshape(outputs, -1, *whole.shape[2:])

    def _codes(self) -> Iterator[np.ndarray]:
        for codes, scales in self._slices():
            self._scales.append(scales)
            yield codes[..., 0::2] | codes[..., 1::2] << 4 if self._bits == 4 else codes

    def _slices(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield codes, uint8 [N, J, 32], and scales, float16 [N, J], as they are stored."""
        stored, num_blocks = self._stored, self._stored.shape[-1] // BLOCK
        if stored.coded_rows is not None and stored.dtype == Q4.name:
            for packed in stored.slices(stored.coded_rows):
                codes, scales = _unpacked_q4(packed, num_blocks)
                yield codes + np.uint8(2 ** (self._bits - 1) - 8), scales
        elif stored.coded_rows is not None and (stored.dtype, self._bits) == (Q8.name, 8):
            for packed in stored.slices(stored.coded_rows):
                yield _unpacked_q8(packed, num_blocks)
        else:
            kind, unpacked = (Q4, _unpacked_q4) if self._bits == 4 else (Q8, _unpacked_q8)
            for rows in stored.chunks():
                packed = quantize(rows.astype(np.float32, copy=False), kind)
                yield unpacked(packed, num_blocks)


def _unpacked_q4(packed: np.ndarray, num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Return codes [N, J, 32] and scales [N, J]; byte i of a block holds codes i and i + 16."""
    blocks = packed.reshape(-1, num_blocks, 2 + BLOCK // 2)
    halves = blocks[..., 2:] & 15, blocks[..., 2:] >> 4
    return np.concatenate(halves, axis=-1), _scales(blocks)


def _unpacked_q8(packed: np.ndarray, num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Return codes [N, J, 32] and scales [N, J]; stored numbers are signed, codes are not."""
    blocks = packed.reshape(-1, num_blocks, 2 + BLOCK)
    return blocks[..., 2:] ^ 128, _scales(blocks)


def _scales(blocks: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
