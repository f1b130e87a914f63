"""The check of graphs against the kernels that the CUDA provider has."""

import onnx
import pytest
from onnx import TensorProto, helper

from tests.doubles.cuda_kernels import unplaced

CONTRIB = "com.microsoft"


def graph_of(op_type: str, kinds: list[int], output: int, **attributes: object) -> onnx.ModelProto:
    """Return a graph of one node."""
    names = [f"x{i}" for i in range(len(kinds))]
    domain = str(attributes.get("domain", ""))
    inputs = [
        helper.make_tensor_value_info(name, kind, ["T"])
        for name, kind in zip(names, kinds, strict=True)
    ]
    node = helper.make_node(op_type, names, ["y"], **attributes)
    outputs = [helper.make_tensor_value_info("y", output, None)]
    opsets = [helper.make_opsetid("", 23), *([helper.make_opsetid(domain, 1)] if domain else [])]
    graph = helper.make_graph([node], "graph", inputs, outputs)
    return helper.make_model(graph, opset_imports=opsets)


FLOAT, HALF, BFLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
INT64, UINT8 = TensorProto.INT64, TensorProto.UINT8


@pytest.mark.parametrize(
    ("op_type", "kinds", "output", "attributes"),
    [
        ("Add", [BFLOAT16, BFLOAT16], BFLOAT16, {}),
        ("Greater", [HALF, HALF], TensorProto.BOOL, {}),
        ("CumSum", [FLOAT, INT64], FLOAT, {}),
        ("RMSNormalization", [FLOAT, HALF], HALF, {}),
        ("CastLike", [FLOAT, BFLOAT16], BFLOAT16, {}),
        ("MatMulNBits", [HALF, UINT8, HALF], HALF, {"domain": CONTRIB}),
    ],
)
def test_a_node_with_a_kernel_is_placed(
    op_type: str, kinds: list[int], output: int, attributes: dict[str, object]
) -> None:
    assert unplaced(graph_of(op_type, kinds, output, **attributes)) == []


@pytest.mark.parametrize(
    ("op_type", "kinds", "output", "attributes"),
    [
        ("Greater", [BFLOAT16, BFLOAT16], TensorProto.BOOL, {}),
        ("CumSum", [BFLOAT16, INT64], BFLOAT16, {}),
        ("RMSNormalization", [BFLOAT16, FLOAT], FLOAT, {}),
        ("Acos", [FLOAT], FLOAT, {}),
        ("MatMulNBits", [HALF, UINT8, FLOAT], HALF, {"domain": CONTRIB}),
    ],
)
def test_a_node_without_one_is_not(
    op_type: str, kinds: list[int], output: int, attributes: dict[str, object]
) -> None:
    """The last: one type parameter cannot be two types."""
    found = unplaced(graph_of(op_type, kinds, output, **attributes))
    assert len(found) == 1
    assert found[0].startswith(op_type)


def test_a_kernel_is_for_versions_of_an_op() -> None:
    """Of RMSNormalization there is none before opset 23."""
    model = graph_of("RMSNormalization", [FLOAT, FLOAT], FLOAT)
    assert unplaced(model) == []
    model = graph_of("Attention", [HALF, HALF, HALF], HALF)
    assert unplaced(model) == []
    model.opset_import[0].version = 24
    assert len(unplaced(model)) == 1  # the table is of opset 23
