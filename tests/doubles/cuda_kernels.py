"""Whether the CUDA provider has a kernel for each node of a graph, by a table of what it has.

`data/cuda_kernels.json` lists kernels of onnxruntime-gpu 1.31.1 by op: versions of the op's schema,
the last one null where the kernel is for no other, and element types by type parameter or by input.
"""

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto
from onnx.inliner import inline_local_functions
from onnx.shape_inference import infer_shapes
from onnxruntime.capi import onnxruntime_pybind11_state as runtime

TABLE = Path(__file__).parents[1] / "data" / "cuda_kernels.json"
AS_CAST = "CastLike"
"""An ONNX function, which ONNX Runtime turns into a `Cast`."""

Types = Mapping[str, str]
"""Element types of a graph's values."""


def unplaced(model: onnx.ModelProto) -> list[str]:
    """Return each node of a graph that has no kernel for CUDA, with its element types."""
    flat = _typed(inline_local_functions(model))
    types = _types(flat)
    opset = next(entry.version for entry in flat.opset_import if not entry.domain)
    return [
        f"{node.op_type} {used}"
        for node in flat.graph.node
        if node.op_type != "Constant"
        and not _has_kernel(node, used := _bound(node, types, opset), opset)
    ]


def _typed(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph with the types of all values.

    ONNX does not know ONNX Runtime's own ops; an output has the type of an input of its parameter.
    """
    while True:
        model = infer_shapes(model, strict_mode=False)
        types = _types(model)
        found = {
            name: kind
            for node in model.graph.node
            if node.domain
            for name, kind in _output_types(node, types)
            if name not in types
        }
        if not found:
            return model
        for name, kind in found.items():
            elem_type = TensorProto.DataType.Value(kind.upper())
            model.graph.value_info.append(onnx.helper.make_tensor_value_info(name, elem_type, None))


def _output_types(node: onnx.NodeProto, types: Types) -> Iterator[tuple[str, str]]:
    """Yield the outputs of a node whose types follow from those of its inputs."""
    inputs, outputs = _parameters(node, 1)
    known = {
        parameter: types[name]
        for name, (_, parameter) in zip(node.input, inputs, strict=False)
        if name in types
    }
    for name, (_, parameter) in zip(node.output, outputs, strict=False):
        if name and parameter in known:
            yield name, known[parameter]


def _types(model: onnx.ModelProto) -> dict[str, str]:
    graph = model.graph
    infos = (*graph.input, *graph.output, *graph.value_info)
    types = {v.name: _name(v.type.tensor_type.elem_type) for v in infos}
    return types | {t.name: _name(t.data_type) for t in graph.initializer}


def _name(elem_type: int) -> str:
    return TensorProto.DataType.Name(elem_type).lower()  # type: ignore[arg-type]


def _bound(node: onnx.NodeProto, types: Types, opset: int) -> dict[str, str]:
    """Return the element type of each input and output, and of each type parameter.

    One that would be two types is both, which no kernel takes.
    """
    bound: dict[str, str] = {}
    for parameters, names in zip(_parameters(node, opset), (node.input, node.output), strict=True):
        for i, name in enumerate(names):
            if name:
                formal, parameter = parameters[min(i, len(parameters) - 1)]
                assert name in types, f"{node.op_type}: {name} has no type"
                kind = types[name]
                for key in (formal, parameter):
                    known = bound.setdefault(key, kind)
                    bound[key] = kind if known == kind else f"{known} and {kind}"
    return bound


def _has_kernel(node: onnx.NodeProto, bound: Types, opset: int) -> bool:
    op_type = "Cast" if node.op_type == AS_CAST else node.op_type
    if node.op_type == AS_CAST:
        bound = {"T1": bound["input"], "T2": bound["output"]}
    since = 1 if node.domain else onnx.defs.get_schema(op_type, opset).since_version
    name = f"{node.domain}:{op_type}" if node.domain else op_type
    return any(
        _is_for(since, *kernel["versions"])
        and all(bound.get(key, kinds[0]) in kinds for key, kinds in kernel["types"].items())
        for kernel in _table().get(name, ())
    )


def _is_for(since: int, first: int, last: int | None) -> bool:
    return since == first if last is None else first <= since <= last


def _parameters(node: onnx.NodeProto, opset: int) -> Iterator[list[tuple[str, str]]]:
    """Yield the names and type parameters of an op's inputs, and of its outputs."""
    if node.domain:
        schema: Any = _contributed()[node.domain, node.op_type]
        yield [(p.name, p.typeStr) for p in schema.inputs]
        yield [(p.name, p.typeStr) for p in schema.outputs]
    else:
        schema = onnx.defs.get_schema(node.op_type, opset)
        yield [(p.name, p.type_str) for p in schema.inputs]
        yield [(p.name, p.type_str) for p in schema.outputs]


@cache
def _table() -> dict[str, list[dict[str, Any]]]:
    return json.loads(TABLE.read_text())


@cache
def _contributed() -> dict[tuple[str, str], Any]:
    """Return ONNX Runtime's own ops, which its packages for the CPU describe too."""
    return {(s.domain, s.name): s for s in runtime.get_all_operator_schema()}
