"""The original RecurrentGemma, Griffin, for one whole sequence: plain formulas over its weights.

`recurrentgemma` 1.0.1 requires a numpy older than ours, so what it computes is written anew here,
from `torch/layers.py`, `torch/modules.py` and `torch/griffin.py`, with its names of weights. Two
things differ: angles and softmax have the weights' dtype here, float32 there.

Dimensions: T tokens, D hidden, C channels of a recurrent block, N heads, H head dimension.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

State = Mapping[str, Tensor]
OWN_NAMES = {
    "embed_tokens.weight": "embedder.input_embedding",
    "final_norm.weight": "final_norm.scale",
    "temporal_pre_norm.weight": "temporal_pre_norm.scale",
    "channel_pre_norm.weight": "channel_pre_norm.scale",
    **{f"temporal_block.{x}_proj.weight": f"attention_block.proj_{x}.weight" for x in "qkv"},
    "temporal_block.o_proj.weight": "attention_block.proj_final.weight",
    "temporal_block.o_proj.bias": "attention_block.proj_final.bias",
    "temporal_block.conv_1d.weight": "recurrent_block.conv_1d.w",
    "temporal_block.conv_1d.bias": "recurrent_block.conv_1d.b",
    "temporal_block.rg_lru.recurrent_param": "recurrent_block.rg_lru.a_param",
    "temporal_block.rg_lru.input_gate_weight": "recurrent_block.rg_lru.input_gate.w",
    "temporal_block.rg_lru.input_gate_bias": "recurrent_block.rg_lru.input_gate.b",
    "temporal_block.rg_lru.recurrent_gate_weight": "recurrent_block.rg_lru.a_gate.w",
    "temporal_block.rg_lru.recurrent_gate_bias": "recurrent_block.rg_lru.a_gate.b",
    "mlp_block.down_proj.weight": "mlp_block.ffw_down.weight",
    "mlp_block.down_proj.bias": "mlp_block.ffw_down.bias",
}
"""Names of tensors in transformers, without the layer, and in the original."""


def griffin_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the weights of a model of transformers as the original names and lays them out."""
    theirs = {n.removeprefix("model."): t.detach() for n, t in model.state_dict().items()}
    theirs.pop("lm_head.weight")
    state = {}
    for name, tensor in theirs.items():
        layer = re.match(r"layers\.(\d+)\.", name)
        part = name.removeprefix(layer[0] if layer else "")
        prefix = f"blocks.{layer[1]}." if layer else ""
        if part == "temporal_block.conv_1d.weight":
            tensor = tensor[:, 0].T.contiguous()
        if part.startswith("mlp_block.gate_proj."):
            both = torch.stack([tensor, theirs[name.replace("gate_proj", "up_proj")]])
            kind, both = (
                ("w", both.transpose(1, 2)) if tensor.ndim == 2 else ("b", both[:, None, None])
            )
            state[f"{prefix}mlp_block.ffw_up.{kind}"] = both.contiguous()
        elif not part.startswith("mlp_block.up_proj."):
            own = OWN_NAMES.get(part, part.replace("temporal_block", "recurrent_block"))
            state[prefix + own] = tensor
    return state


def griffin_logits(
    state: State, token_ids: list[int], *, num_heads: int, window: int, softcap: float
) -> Tensor:
    """Return the logits [T, V] of one sequence, whose first token has position 0.

    Args:
        state: The weights.
        token_ids: The sequence.
        num_heads: Heads of attention and of the gates.
        window: How far back a token attends.
        softcap: Cap of the logits.
    """
    embedding = state["embedder.input_embedding"]
    factor = torch.tensor(embedding.shape[1] ** 0.5).bfloat16().to(embedding.dtype)
    x = embedding[torch.tensor(token_ids)] * factor
    layer = 0
    while f"blocks.{layer}.channel_pre_norm.scale" in state:
        prefix = f"blocks.{layer}."
        block = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        normed = _norm(x, block["temporal_pre_norm.scale"])
        if "attention_block.proj_q.weight" in block:
            x = x + _attention(block, normed, num_heads, window)
        else:
            x = x + _recurrent(block, normed)
        x = x + _feed_forward(block, _norm(x, block["channel_pre_norm.scale"]))
        layer += 1
    logits = _norm(x, state["final_norm.scale"]) @ embedding.T
    return torch.tanh(logits / softcap) * softcap


def inverse_frequencies(dim: int) -> Tensor:
    """Return the inverse frequencies of `dim` channels, in float32 as `_apply_rope` has them."""
    return 1.0 / 10_000 ** (2 * torch.arange(dim // 2) / dim)


def _norm(x: Tensor, scale: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (scale + 1)


def _gelu(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def _feed_forward(block: State, x: Tensor) -> Tensor:
    weight, bias = block["mlp_block.ffw_up.w"], block["mlp_block.ffw_up.b"]
    gate, value = (x @ weight[i] + bias[i, 0] for i in range(2))
    return _linear(block, "mlp_block.ffw_down", _gelu(gate) * value)


def _linear(block: State, name: str, x: Tensor) -> Tensor:
    product = x @ block[f"{name}.weight"].T
    return product + block[f"{name}.bias"] if f"{name}.bias" in block else product


def _attention(block: State, x: Tensor, num_heads: int, window: int) -> Tensor:
    """Return [T, D]: one key head; a token attends to `window` tokens before it and to itself."""
    names = (f"attention_block.proj_{part}" for part in "qkv")
    q, k, v = (_linear(block, name, x) for name in names)
    q = _rotated(q.view(len(x), num_heads, -1))
    k = _rotated(k[:, None])[:, 0]
    tokens = torch.arange(len(x))
    distance = tokens[:, None] - tokens
    scores = torch.einsum("tnh,sh->nts", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill((distance < 0) | (distance > window), -torch.inf)
    output = torch.einsum("nts,sh->tnh", scores.softmax(-1), v)
    return _linear(block, "attention_block.proj_final", output.reshape(x.shape[0], -1))


def _rotated(x: Tensor) -> Tensor:
    """Return x [T, N, H] with the first half of each head rotated, itself in halves."""
    turned, rest = x.chunk(2, dim=-1)
    angles = torch.arange(len(x))[:, None].to(x.dtype) * inverse_frequencies(turned.shape[-1])
    cos, sin = angles.cos()[:, None].to(x.dtype), angles.sin()[:, None].to(x.dtype)
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def _recurrent(block: State, x: Tensor) -> Tensor:
    """Return [T, D]: a GELU times a convolution and the RG-LRU."""
    part = {n.removeprefix("recurrent_block."): t for n, t in block.items()}
    gate = _gelu(_linear(part, "linear_y", x))
    x = _linear(part, "linear_x", x)
    width = len(part["conv_1d.w"])
    padded = torch.cat([x.new_zeros(width - 1, x.shape[1]), x])
    x = sum(padded[i : i + len(x)] * part["conv_1d.w"][i] for i in range(width)) + part["conv_1d.b"]
    return _linear(part, "linear_out", _rg_lru(part, x) * gate)


def _rg_lru(part: State, x: Tensor) -> Tensor:
    """Return h [T, C] of x [T, C], from formulas (3) and (4) of the Griffin paper."""
    heads = x.view(len(x), len(part["rg_lru.a_gate.w"]), -1)
    gate_x, gate_a = (
        torch.sigmoid(torch.einsum("thi,hij->thj", heads, part[f"{n}.w"]) + part[f"{n}.b"])
        for n in ("rg_lru.input_gate", "rg_lru.a_gate")
    )
    log_a = -8.0 * gate_a.reshape(x.shape) * torch.nn.functional.softplus(part["rg_lru.a_param"])
    a, factor = log_a.exp(), (1 - (2 * log_a).exp()).sqrt()
    a[0], factor[0] = 0.0, 1.0
    inputs = x * gate_x.reshape(x.shape) * factor
    hidden = []
    for t in range(len(x)):
        hidden.append(inputs[t] + (a[t] * hidden[-1] if hidden else 0.0))
    return torch.stack(hidden)
