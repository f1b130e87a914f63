"""Sessions of nodes of the project's domain on the CPU, as the exporter lowers them."""

from collections.abc import Iterable, Mapping

import numpy as np
import onnx
import onnxruntime
from onnxscript import OnnxFunction

from tests.doubles.op_models import op_model


def op_session(
    name: str,
    attributes: Mapping[str, int | float],
    inputs: Mapping[str, np.ndarray],
    functions: Iterable[OnnxFunction],
    *,
    num_threads: int = 1,
    outputs: Iterable[str] = ("output",),
) -> onnxruntime.InferenceSession:
    """Return a session of one node.

    Args:
        name: Op type of the node.
        attributes: Attributes of the node.
        inputs: Arrays by the names of inputs, in order; only their types and ranks matter.
        functions: Bodies of the node and of all it calls.
        num_threads: Threads of the session.
        outputs: Names of the outputs, which are float32.
    """
    node = onnx.helper.make_node(name, [*inputs], [*outputs], domain="beam_gemma", **attributes)
    return session_of([node], inputs, functions, num_threads=num_threads, outputs=outputs)


def session_of(
    nodes: Iterable[onnx.NodeProto],
    inputs: Mapping[str, np.ndarray],
    functions: Iterable[OnnxFunction],
    *,
    num_threads: int = 1,
    outputs: Iterable[str],
) -> onnxruntime.InferenceSession:
    """Return a session of several nodes; see `op_session`."""
    value, kind_of = onnx.helper.make_tensor_value_info, onnx.helper.np_dtype_to_tensor_dtype
    model = op_model(
        nodes,
        [value(n, kind_of(a.dtype), [None] * a.ndim) for n, a in inputs.items()],
        [value(n, onnx.TensorProto.FLOAT, None) for n in outputs],
        functions,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    providers = ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
