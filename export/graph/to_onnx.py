"""Exports a PyTorch module as an ONNX graph without loading weights into memory.

The module is built and traced under fake tensors, so a 27B model exports on a laptop. Weights are
attached later as references to files (`export.graph.weights`).
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript.optimizer import optimize
from onnxscript.values import OnnxFunction
from torch._subclasses.fake_tensor import FakeTensorMode

from beam_gemma.model.graph_tensors import StateTensor, Tensor
from beam_gemma.model.signature import Signature
from export.graph.translations import translations
from export.modules.conformer import CumulativeNorm
from export.modules.layers import RMSNorm, Rotary
from export.modules.mobilenet_v5 import Convolution, LayerScale
from export.modules.per_layer import Table
from export.modules.source_encoder import SourceEmbedder, SourceEncoder
from export.modules.vision import LayerNorm
from export.ops import (
    lowering_cpu,
    lowering_cuda,
    lowering_expert_loop,
    lowering_experts,
    lowering_packed,
    lowering_recurrent,
    lowering_wide,
)

OPSET = 23
LONG_CLIP = 301
"""Frames of an example clip: enough for several blocks of attention."""
TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
}
KEPT = (RMSNorm, LayerNorm, CumulativeNorm, Rotary, Convolution, LayerScale)
"""Modules whose parameters are float32 in every graph."""
VISION_LOWERINGS: dict[str, tuple[OnnxFunction[..., Any], ...]] = {
    "cpu": (lowering_cpu.VisionAttention, lowering_cpu.RmsNorm),
    "cuda": (lowering_cuda.VisionAttention, lowering_cuda.RmsNorm, lowering_cuda.HalfRmsNorm),
}
SOUND_LOWERINGS: dict[str, tuple[OnnxFunction[..., Any], ...]] = {
    "cpu": (lowering_cpu.RmsNorm,),
    "cuda": (lowering_cuda.RmsNorm, lowering_cuda.HalfRmsNorm),
}
DECODER_LOWERINGS = {"cpu": lowering_cpu.FUNCTIONS, "cuda": lowering_cuda.FUNCTIONS}
SOME_LOWERINGS: dict[str, tuple[OnnxFunction[..., Any], ...]] = {
    "cpu": (*lowering_cpu.CACHED, *lowering_wide.FUNCTIONS, *lowering_expert_loop.FUNCTIONS),
    "cuda": (*lowering_cuda.CACHED, *lowering_experts.FUNCTIONS),
}
"""Functions that only those graphs have which call them."""


def trace(
    build: Callable[[], torch.nn.Module], signature: Signature, table_dtype: str | None = None
) -> ir.Model:
    """Export a module as the graph that `signature` describes.

    Args:
        build: Function that makes a module with `GemmaDecoder`'s `forward`; called under fake
            tensors.
        signature: Inputs, state and outputs of the graph.
        table_dtype: Dtype of the table of per-layer embeddings; None for that of the matrices.

    Returns:
        A graph whose parameters are initializers without a value, named as in the module; those
        that an encoder shares with its decoder have the decoder's names.
    """
    with FakeTensorMode(), warnings.catch_warnings():
        # Hide deprecation warnings from inside the exporter.
        warnings.simplefilter("ignore")
        module = _typed(build(), signature.dtype, table_dtype or signature.dtype).eval()
        sizes = _Sizes()
        step = {t.name: sizes.example(t) for t in signature.step_inputs()}
        state = {t.input_name: sizes.example(t) for t in signature.state_tensors()}
        program = torch.export.export(
            module,
            (step, state),
            dynamic_shapes=(
                {t.name: _dynamic(t.shape) for t in signature.step_inputs()},
                {t.input_name: _dynamic(t.shape) for t in signature.state_tensors()},
            ),
            strict=False,
        )
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verify=False,
            verbose=False,
            input_names=[*step, *state],
            output_names=_output_names(signature),
            custom_translation_table=translations(signature.device),
        )
    assert exported is not None
    finished = _finished(exported.model, signature, {n for n, _ in module.named_parameters()})
    if isinstance(module, SourceEncoder | SourceEmbedder):
        _rename(finished, module.stored_name)
    return finished


def _finished(model: ir.Model, signature: Signature, parameters: set[str]) -> ir.Model:
    """Optimize the graph, then add the bodies of its custom ops.

    The order matters: the optimizer must see neither fake values nor the bodies of custom ops.
    """
    for name in parameters & set(model.graph.initializers):
        model.graph.initializers[name].const_value = None
    optimize(model)
    model.opset_imports.update({"beam_gemma": 1, "com.microsoft": 1})
    for function in (*_lowering(signature), *_called(model, SOME_LOWERINGS[signature.device])):
        body = ir.serde.deserialize_function(function.to_function_proto())
        model.functions[body.identifier()] = body
    _name_dimensions(model, signature)
    model.producer_name = "beam_gemma"
    return model


def _rename(model: ir.Model, stored_name: Callable[[str], str]) -> None:
    """Give initializers the names that a checkpoint has for them."""
    for name, value in list(model.graph.initializers.items()):
        if (stored := stored_name(name)) != name:
            del model.graph.initializers[name]
            value.name = stored
            model.graph.initializers[stored] = value


def _lowering(signature: Signature) -> Iterable[OnnxFunction[..., Any]]:
    """Return the bodies of the custom ops in a graph."""
    if signature.head == "vision":
        return VISION_LOWERINGS[signature.device]
    if signature.head == "sound":
        return SOUND_LOWERINGS[signature.device]
    if signature.head in ("embed", "encode") and signature.device == "cpu":
        return lowering_packed.FUNCTIONS
    if signature.has_recurrent_state:
        device = signature.device
        return (*DECODER_LOWERINGS[device], *lowering_recurrent.FUNCTIONS[device])
    return DECODER_LOWERINGS[signature.device]


def _called(
    model: ir.Model, functions: Iterable[OnnxFunction[..., Any]]
) -> Iterator[OnnxFunction[..., Any]]:
    """Yield those of `functions` that the graph calls, or that one of them calls."""
    by_name = {function.name: function for function in functions}
    names = [node.op_type for node in model.graph]
    while names:
        if function := by_name.pop(names.pop(), None):
            yield function
            names += _ops_of(function.to_function_proto().node)


def _ops_of(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    """Yield the types of nodes, and of those in the bodies of loops."""
    for node in nodes:
        yield node.op_type
        for attribute in node.attribute:
            yield from _ops_of(attribute.g.node)


def _typed(module: torch.nn.Module, dtype: str, table_dtype: str) -> torch.nn.Module:
    """Convert the module's matrices to a dtype; those of `KEPT` keep theirs."""
    for child in module.modules():
        if not isinstance(child, KEPT):
            kind = TORCH_DTYPES[table_dtype if isinstance(child, Table) else dtype]
            for name, parameter in child.named_parameters(recurse=False):
                parameter = torch.nn.Parameter(parameter.to(kind))
                setattr(child, name, parameter)
    return module


class _Sizes:
    """Distinct example sizes for a signature's letters, so the exporter never merges two."""

    def __init__(self) -> None:
        self._sizes = {"B": 3, "B1": 4, "J": LONG_CLIP}

    def example(self, tensor: Tensor | StateTensor) -> torch.Tensor:
        shape = [
            dim if isinstance(dim, int) else self._sizes.setdefault(dim, 11 + 2 * len(self._sizes))
            for dim in tensor.shape
        ]
        return torch.zeros(shape, dtype=TORCH_DTYPES[tensor.dtype])


def _dynamic(shape: tuple[int | str, ...]) -> dict[int, Any]:
    return {i: torch.export.Dim.DYNAMIC for i, dim in enumerate(shape) if isinstance(dim, str)}


def _output_names(signature: Signature) -> list[str]:
    return [
        *(tensor.name for tensor in signature.outputs()),
        *(tensor.output_name for tensor in signature.state_tensors()),
    ]


def _name_dimensions(model: ir.Model, signature: Signature) -> None:
    """Replace the exporter's symbols by the signature's letters throughout the graph."""
    shapes = {t.name: t.shape for t in (*signature.step_inputs(), *signature.outputs())}
    for state in signature.state_tensors():
        shapes |= dict.fromkeys((state.input_name, state.output_name), state.shape)
    letters: dict[str, str] = {}
    for value in model.graph.inputs:
        for symbol, letter in zip(value.shape or (), shapes[value.name or ""], strict=True):
            if isinstance(symbol, ir.SymbolicDim) and isinstance(letter, str):
                letters[str(symbol.value)] = letter
    for value in _values(model):
        if value.shape is not None and not value.shape.frozen:
            for axis, symbol in enumerate(value.shape):
                if isinstance(symbol, ir.SymbolicDim):
                    value.shape[axis] = letters.get(str(symbol.value), symbol.value)
    for value in model.graph.outputs:
        value.shape = ir.Shape(shapes[value.name or ""])


def _values(model: ir.Model) -> Iterable[ir.Value]:
    yield from model.graph.inputs
    for node in model.graph:
        yield from node.outputs
