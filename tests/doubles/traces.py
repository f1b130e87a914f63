"""Traced graphs, made once in a run: a graph depends on settings, never on weights.

Checkpoints of one shape, in other files, with an adapter or as codes, have the same traced graph.
"""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnx
import onnx_ir as ir
import torch

from beam_gemma.model.signature import Signature
from export.graph.to_onnx import trace
from tests.doubles.once import kept, source_digest

ORDER = "initializers"
"""Key of a file's metadata under which the names of all initializers stand, in their order."""


def kept_trace(
    build: Callable[[], torch.nn.Module], signature: Signature, table_dtype: str | None = None
) -> ir.Model:
    """Return what `export.graph.to_onnx.trace` does, traced by whichever process is first.

    Args:
        build: A partial of a function whose arguments show all that they hold in their text.
        signature: As of `trace`.
        table_dtype: As of `trace`.
    """
    assert isinstance(build, partial)
    shown = repr((build.func.__qualname__, build.args, build.keywords, signature, table_dtype))
    assert " at 0x" not in shown

    def make(folder: Path) -> None:
        graph = trace(build, signature, table_dtype)
        folder.mkdir()
        graph.metadata_props[ORDER] = " ".join(graph.graph.initializers)
        onnx.save(with_weights_as_inputs(graph), folder / "graph.onnx")

    digest = hashlib.sha256((source_digest() + shown).encode()).hexdigest()[:24]
    model = load_graph(kept(f"traced-{digest}", make) / "graph.onnx", signature)
    values = dict(model.graph.initializers)
    model.graph.initializers.clear()
    model.graph.initializers.update({n: values[n] for n in model.metadata_props.pop(ORDER).split()})
    return model


def with_weights_as_inputs(graph: ir.Model) -> onnx.ModelProto:
    """Serialize a graph; ONNX has no initializers without values."""
    proto = ir.to_proto(graph)
    for value in graph.graph.initializers.values():
        if value.const_value is None:
            proto.graph.input.append(ir.serde.serialize_value(value))
    return proto


def load_graph(file: Path, signature: Signature) -> ir.Model:
    """Return the graph of a file whose weights are inputs, or have values, without the values."""
    model = ir.load(file)
    graph, names = model.graph, {t.name for t in signature.step_inputs()}
    names |= {t.input_name for t in signature.state_tensors()}
    for value in [value for value in graph.inputs if value.name not in names]:
        graph.inputs.remove(value)
        graph.initializers.add(value)
    for value in graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = None
    return model
