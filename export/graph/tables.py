"""Makes a graph's table of per-layer embeddings an input.

The table is as large as half of a model, and a step reads a few rows of it. ONNX Runtime copies
weights to the device; an input may lie wherever a device can read.
"""

from dataclasses import replace

import onnx_ir as ir

from beam_gemma.model.graph_tensors import Table
from beam_gemma.model.signature import Signature
from export.checkpoints.tensors import TABLE
from export.graph.weights import IR_DTYPES


def with_tables_as_inputs(model: ir.Model, signature: Signature) -> Signature:
    """Turn the table of a graph for CUDA into inputs: its numbers, or its codes and their scales.

    Args:
        model: The graph, whose weights are attached; changed in place.
        signature: Its contract.

    Returns:
        The contract with these inputs.
    """
    graph, tables = model.graph, list(signature.tables)
    for name, value in list(graph.initializers.items()):
        external = value.const_value
        if signature.device == "cpu" or not name.startswith(TABLE):
            continue
        if isinstance(external, ir.ExternalTensor):
            tables.append(_table(name, external))
            value.const_value = None
            del graph.initializers[name]
            graph.inputs.append(value)
    return replace(signature, tables=tuple(tables))


def _table(name: str, external: ir.ExternalTensor) -> Table:
    return Table(
        name=name,
        dtype=next(dtype for dtype, kind in IR_DTYPES.items() if kind == external.dtype),
        shape=external.shape.numpy(),
        file=str(external.location),
        offset=external.offset or 0,
    )
