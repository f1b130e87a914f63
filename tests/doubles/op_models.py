"""Models of a few nodes of the project's domain, with the bodies of its ops."""

from collections.abc import Iterable

import onnx
from onnxscript import OnnxFunction

OPSETS = {"": 23, "beam_gemma": 1, "com.microsoft": 1}


def op_model(
    nodes: Iterable[onnx.NodeProto],
    inputs: Iterable[onnx.ValueInfoProto],
    outputs: Iterable[onnx.ValueInfoProto],
    functions: Iterable[OnnxFunction],
) -> onnx.ModelProto:
    """Return a model of the nodes."""
    return onnx.helper.make_model(
        onnx.helper.make_graph(list(nodes), "op", list(inputs), list(outputs)),
        functions=[function.to_function_proto() for function in functions],
        opset_imports=[onnx.helper.make_opsetid(*opset) for opset in OPSETS.items()],
        ir_version=10,
    )
