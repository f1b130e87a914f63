"""The ops of graphs for CUDA, a node at a time, in bfloat16 and float16 beside float64.

Numbers go in and come out as float32, and are rounded by nodes around the op. On the host these
nodes round nothing, so what the reference gets is rounded beforehand.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from beam_gemma.model.signature import block_size_for
from beam_gemma.runtime.device_memory import CudaMemory
from export.ops import lowering_cuda
from export.ops.reference import NO_WINDOW, padded_attention, rms_norm
from export.ops.vision_attention import vision_attention
from tests.doubles.attention_cases import CASES
from tests.doubles.cuda_on_cpu import cuda_on_cpu
from tests.doubles.op_models import op_model

Arrays = Mapping[str, np.ndarray]
F32 = onnx.TensorProto.FLOAT
TYPES = {"bfloat16": onnx.TensorProto.BFLOAT16, "float16": onnx.TensorProto.FLOAT16}
DIGITS = {"bfloat16": 8, "float16": 11}
"""Binary ones, of a number."""
CAUSAL = [name for name, case in CASES.items() if not case.spans and not any(case.starts)]
SPANS = [name for name, case in CASES.items() if case.spans]
CACHES = {"key_cache": "key_out", "value_cache": "value_out"}

on_host_and_card = pytest.mark.parametrize(
    "place", ["host", pytest.param("card", marks=pytest.mark.gpu)]
)


def tolerance(place: str, dtype: str) -> float:
    """What an average of values up to about 4 may be off by.

    On a card each weight is rounded, each value as it is added up, and the result.
    """
    return 4e-6 if place == "host" else 4 * 2.0 ** (1 - DIGITS[dtype])


def rounded(arrays: Arrays, dtype: str) -> dict[str, np.ndarray]:
    kind = getattr(torch, dtype)
    return {
        name: torch.from_numpy(a).to(kind).float().numpy() if a.dtype == np.float32 else a
        for name, a in arrays.items()
    }


def run(
    place: str,
    node: onnx.NodeProto,
    feeds: Arrays,
    dtype: str,
    *,
    exact: tuple[str, ...] = (),
    state: Mapping[str, str] = MappingProxyType({}),
) -> list[np.ndarray]:
    """Run one node.

    Args:
        place: Host or card.
        node: Of the project's domain.
        feeds: Its inputs.
        dtype: Of floats as the node has them.
        exact: Inputs that it has in float32.
        state: Outputs by the inputs that they overwrite.
    """
    model = one_node(node, feeds, dtype, exact, state)
    if place == "card":
        return run_on_card(model, feeds, dtype, state)
    proto = ir.to_proto(cuda_on_cpu(ir.from_proto(model))).SerializeToString()
    session = onnxruntime.InferenceSession(proto, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feeds))


def one_node(
    node: onnx.NodeProto,
    feeds: Arrays,
    dtype: str,
    exact: tuple[str, ...],
    state: Mapping[str, str],
) -> onnx.ModelProto:
    """Return a model of the node between nodes that round, but for state."""
    make, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    half = TYPES[dtype]
    into = [n for n, a in feeds.items() if a.dtype == np.float32 and n not in (*exact, *state)]
    out = [name for name in node.output if name not in state.values()]
    body = onnx.NodeProto()
    body.CopyFrom(node)
    body.input[:] = [f"{name}:half" if name in into else name for name in node.input]
    body.output[:] = [f"{name}:half" if name in out else name for name in node.output]
    casts = [make("Cast", [name], [f"{name}:half"], to=half) for name in into]
    backs = [make("Cast", [f"{name}:half"], [name], to=F32) for name in out]
    kind_of = onnx.helper.np_dtype_to_tensor_dtype
    kinds = {name: half if name in state else kind_of(a.dtype) for name, a in feeds.items()}
    return op_model(
        [*casts, body, *backs],
        [value(name, kinds[name], a.shape) for name, a in feeds.items()],
        [value(name, F32 if name in out else half, None) for name in node.output],
        (*lowering_cuda.FUNCTIONS, *lowering_cuda.CACHED),
    )


def run_on_card(
    model: onnx.ModelProto, feeds: Arrays, dtype: str, state: Mapping[str, str]
) -> list[np.ndarray]:
    """Run a model; what it overwrites has one address for input and output."""
    memory, kind = CudaMemory(), getattr(torch, dtype)
    onnxruntime.preload_dlls()
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    settings = {"use_tf32": "0", "user_compute_stream": str(memory.stream)}
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=[("CUDAExecutionProvider", settings)]
    )
    binding, kept = session.io_binding(), {}
    for name, array in feeds.items():
        if name not in state:
            binding.bind_cpu_input(name, array)
            continue
        bits = torch.from_numpy(array).to(kind).view(torch.int16).numpy()
        address = memory.allocate(bits.nbytes)
        memory.copy_in(address, bits)
        binding.bind_input(name, "cuda", 0, TYPES[dtype], bits.shape, address)
        binding.bind_output(state[name], "cuda", 0, TYPES[dtype], bits.shape, address)
        kept[state[name]] = bits, address
    names = [output.name for output in session.get_outputs()]
    for name in (n for n in names if n not in kept):
        binding.bind_output(name)
    session.run_with_iobinding(binding)
    for bits, address in kept.values():
        memory.copy_out(bits, address)
    memory.mark().wait()
    fetched = iter(binding.get_outputs()[len(kept) :])
    return [
        torch.from_numpy(kept[name][0]).view(kind).float().numpy()
        if name in kept
        else next(fetched).numpy()
        for name in names
    ]


@on_host_and_card
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", CAUSAL)
def test_attention_over_blocks(place: str, dtype: str, name: str) -> None:
    case = replace(CASES[name], layout="cuda", block=block_size_for("cuda", CASES[name].head_dim))
    inputs = rounded(case.inputs(), dtype)
    expected = case.eager(inputs)
    of_cpu = ("context_starts", "first_keys", "last_keys")
    feeds = {k: a for k, a in inputs.items() if k not in of_cpu}
    longest = feeds["block_table"].shape[1] * case.block
    feeds["attention_metadata"] = np.array([max(case.new), longest, 0], np.int32)
    node = onnx.helper.make_node(
        "RaggedAttention",
        list(feeds),
        ["output", "key_out", "value_out"],
        domain="beam_gemma",
        num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads,
        window=-1 if case.window == NO_WINDOW else case.window,
        scale=case.head_dim**-0.5,
        softcap=case.softcap,
    )
    output, *caches = run(place, node, feeds, dtype, state=CACHES)
    np.testing.assert_allclose(output, expected[0], rtol=0, atol=tolerance(place, dtype))
    for cache, stored in zip(caches, expected[1:], strict=True):
        np.testing.assert_array_equal(cache[1:], stored[1:])


@on_host_and_card
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", SPANS)
@pytest.mark.parametrize("softcap", [0.0, 0.7])
def test_attention_in_both_directions(place: str, dtype: str, name: str, softcap: float) -> None:
    """Over caches that have the keys already; nothing is written to them."""
    block = block_size_for("cuda", 256)
    case = replace(CASES[name], layout="cuda", block=block, head_dim=256, softcap=softcap)
    inputs = rounded(case.inputs(), dtype)
    expected, *caches = case.eager(inputs)
    kept = ("query", "key", "cu_seqlens", "past_seqlens", "block_table", "slot_mapping")
    inputs |= {"slot_mapping": np.full_like(inputs["slot_mapping"], -1)}
    feeds = {n: inputs[n] for n in kept[:2]}
    feeds |= dict(zip(CACHES, (c.astype(np.float32) for c in caches), strict=True))
    feeds |= {n: inputs[n] for n in kept[2:]}
    longest = feeds["block_table"].shape[1] * case.block
    feeds["attention_metadata"] = np.array([max(case.new), longest, 0], np.int32)
    node = onnx.helper.make_node(
        "CachedAttention",
        list(feeds),
        ["output"],
        domain="beam_gemma",
        num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads,
        window=-1 if case.beyond or case.window == NO_WINDOW else case.window,
        scale=case.head_dim**-0.5,
        softcap=softcap,
        is_causal=0,
    )
    [output] = run(place, node, feeds, dtype)
    np.testing.assert_allclose(output, expected, rtol=0, atol=tolerance(place, dtype))


@on_host_and_card
@pytest.mark.parametrize("dtype", TYPES)
def test_attention_among_patches(place: str, dtype: str) -> None:
    """With heads as wide as those of SigLIP."""
    rng = np.random.default_rng(6)
    count, patches, heads, dim = 3, 64, 4, 72
    shape = (count, patches, heads * dim)
    feeds = {n: rng.standard_normal(shape, np.float32) for n in ("query", "key", "value")}
    feeds = rounded(feeds, dtype)
    attributes = {"num_heads": heads, "scale": dim**-0.5}
    node = onnx.helper.make_node(
        "VisionAttention", list(feeds), ["y"], domain="beam_gemma", **attributes
    )
    [output] = run(place, node, feeds, dtype)
    packed = [torch.from_numpy(a).double().flatten(0, 1) for a in feeds.values()]
    expected = vision_attention(*packed, patches, *attributes.values()).view(shape)
    np.testing.assert_allclose(output, expected, rtol=0, atol=tolerance(place, dtype))


@on_host_and_card
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("softcap", [0.0, 0.7])
def test_attention_where_a_mask_says_what_is_reached(
    place: str, dtype: str, softcap: float
) -> None:
    """Two-sided with a window, over texts of 24, 11 and 1 tokens; padding reaches what it may."""
    rng = np.random.default_rng(5)
    lengths, longest, heads, dim = np.array([24, 11, 1]), 24, (4, 2), 256
    places = np.arange(longest)
    is_token = places < lengths[:, None]
    near = np.abs(places - places[:, None]) <= 6
    mask = (near | ~is_token[:, :, None]) & is_token[:, None, :]
    feeds = {
        name: rng.standard_normal((3, longest, n * dim), np.float32)
        for name, n in (("query", heads[0]), ("key", heads[1]), ("value", heads[1]))
    }
    feeds = rounded(feeds, dtype) | {"mask": mask[:, None]}
    attributes = {"num_heads": 4, "num_kv_heads": 2, "scale": dim**-0.5, "softcap": softcap}
    node = onnx.helper.make_node(
        "PaddedAttention", list(feeds), ["y"], domain="beam_gemma", **attributes
    )
    [output] = run(place, node, feeds, dtype)
    packed = [torch.from_numpy(feeds[n]).double().flatten(0, 1) for n in ("query", "key", "value")]
    rows = torch.arange(3 * longest)
    expected = padded_attention(
        *packed, torch.from_numpy(mask[:, None]), rows.view(3, -1), rows, *attributes.values()
    )
    expected = expected.view(output.shape).numpy()[is_token]
    np.testing.assert_allclose(output[is_token], expected, rtol=0, atol=tolerance(place, dtype))


@on_host_and_card
@pytest.mark.parametrize(
    ("name", "dtype"), [("RmsNorm", "bfloat16"), ("RmsNorm", "float16"), ("HalfRmsNorm", "float16")]
)
def test_norms(place: str, name: str, dtype: str) -> None:
    rng = np.random.default_rng(0)
    feeds = rounded({"x": rng.standard_normal((5, 640)).astype(np.float32)}, dtype)
    feeds["weight"] = rng.standard_normal(640).astype(np.float32)
    if name == "HalfRmsNorm":
        feeds |= rounded({"weight": feeds["weight"]}, dtype)
    node = onnx.helper.make_node(
        name, ["x", "weight"], ["y"], domain="beam_gemma", epsilon=1e-6, to=TYPES[dtype]
    )
    [output] = run(place, node, feeds, dtype, exact=("weight",))
    arrays = (torch.from_numpy(feeds[n]).double() for n in ("x", "weight"))
    expected = rms_norm(*arrays, 1e-6, torch.float64).numpy()
    # One rounding on a card, of a number computed in float32; float32 throughout on the host.
    relative = 2e-6 if place == "host" else 1.01 * 2.0 ** -DIGITS[dtype]
    np.testing.assert_allclose(output, expected, rtol=relative, atol=1e-7)
