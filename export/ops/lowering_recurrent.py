"""Lowerings of the recurrence: a Scan on the CPU, ONNX Runtime's own kernel on CUDA.

On the CPU the Scan goes over the packed tokens of all sequences. At the first token of each it
takes the sequence's own state in place of the one before, by a Where: a product would let a NaN of
one sequence into the next.

The decay exp(x) is computed as (1 + t) / (1 - t) with t = tanh(x / 2), since the bits of ONNX
Runtime's elementwise `Exp` depend on a number's place in the tensor and those of its `Tanh` do not.

On CUDA, `com.microsoft::LinearAttention` with the rule `gated` and a head for each channel, whose
queries and keys are 1, computes the same recurrence over sequences side by side.

Dimensions: B sequences, T new tokens, C channels, L places of a sequence.
"""

# Names are bound when the source is parsed into ONNX, so types here are tensors, not Python values.
# mypy: ignore-errors
# ruff: noqa: N802

from typing import Any

from onnxscript import graph, script
from onnxscript.onnx_opset import opset23 as op
from onnxscript.onnx_types import TensorType
from onnxscript.values import OnnxFunction, Opset

DOMAIN = Opset("beam_gemma", 1)
MICROSOFT = Opset("com.microsoft", 1)


@script(DOMAIN, default_opset=op)
def LinearRecurrence(inputs, log_decay, initial, owner, is_first) -> TensorType:
    """Return h [T, C] with one iteration of a Scan per packed token."""
    one = op.Constant(value_float=1.0)
    t = op.Tanh(log_decay * op.Constant(value_float=0.5))
    decay = (one + t) / (one - t)
    starts = op.Gather(initial, owner)
    firsts = op.Unsqueeze(is_first, op.Constant(value_ints=[1]))

    @graph()
    def after_token(hidden, factor, added, start, first):
        before = op.Where(first, start, hidden)
        after = factor * before + added
        return after, op.Identity(after)

    none = op.Gather(initial, op.Constant(value_int=0))
    _, hidden = op.Scan(none, decay, inputs, starts, firsts, body=after_token, num_scan_inputs=4)
    return hidden


@script(DOMAIN, default_opset=op)
def PaddedRecurrence(
    inputs, log_decay, initial, ones, num_channels: int
) -> tuple[TensorType, TensorType]:
    """Return h [B, L, C] and its last row of each sequence [B, C, 1, 1].

    `initial` is [B, C, 1, 1]; `ones` [B, L, C] are queries and keys.
    """
    hidden, last = MICROSOFT.LinearAttention(
        ones, ones, inputs, initial, log_decay,
        q_num_heads=num_channels, kv_num_heads=num_channels, update_rule="gated", scale=1.0,
    )  # fmt: skip
    return hidden, last


FUNCTIONS: dict[str, tuple[OnnxFunction[..., Any], ...]] = {
    "cpu": (LinearRecurrence,),
    "cuda": (PaddedRecurrence,),
}
"""The functions that graphs call, by device."""
