"""Counts the operations of a model's matrices and measures this machine's matrix rate."""

import time
from dataclasses import dataclass

import numpy as np
import onnx

from beam_gemma.model.config import GemmaConfig
from beam_gemma.runtime.devices import onnxruntime

ROWS, INNER, COLUMNS = 512, 2048, 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class Operations:
    """Floating-point operations of a model's matrices, without attention over the context."""

    layers: int
    """Operations of all layers per token."""
    head: int
    """Operations of the output matrix per chosen token."""

    @classmethod
    def of(cls, config: GemmaConfig) -> "Operations":
        """Return the counts for a model, from the shapes of its matrices."""
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        attention = config.hidden_size * config.head_dim * (2 * heads + 2 * kv_heads)
        feed_forward = 3 * config.hidden_size * config.intermediate_size
        return cls(
            layers=2 * config.num_hidden_layers * (attention + feed_forward),
            head=2 * config.hidden_size * config.vocab_size,
        )


def pair_operations(config: GemmaConfig) -> int:
    """Return the floating-point operations of a query-key pair in all heads of one layer."""
    return 4 * config.num_attention_heads * config.head_dim


def matrix_rate() -> float:
    """Return the float32 operations per second of a large product in ONNX Runtime, best of 20."""
    session = onnxruntime.InferenceSession(_product(), providers=["CPUExecutionProvider"])
    feeds = {"x": np.ones((ROWS, INNER), np.float32)}
    session.run(None, feeds)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        session.run(None, feeds)
        seconds.append(time.perf_counter() - start)
    return 2 * ROWS * INNER * COLUMNS / min(seconds)


def _product() -> bytes:
    """Return a serialized graph of one product with constant weights."""
    shapes = {"x": (ROWS, INNER), "y": (ROWS, COLUMNS)}
    x, y = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
    )
    weight = onnx.numpy_helper.from_array(np.ones((COLUMNS, INNER), np.float32), "w")
    node = onnx.helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)
    graph = onnx.helper.make_graph([node], "rate", [x], [y], [weight])
    opset = onnx.helper.make_opsetid("", 23)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
    return model.SerializeToString()
