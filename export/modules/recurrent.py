"""The layers of RecurrentGemma, and its decoder as one ragged step.

Of three layers, two are recurrent blocks and one attends within a window. A recurrent block joins
two branches: one is a GELU; the other is a causal convolution of each channel over a few tokens,
then the RG-LRU, a linear recurrence whose decay and input depend on the token.

    log a = -8 sigmoid(gate_a) softplus(recurrent_param)
    h[t]  = a h[t - 1] + sqrt(1 - a^2) sigmoid(gate_x) x[t]        without the root at position 0

Parameters have the names of Hugging Face checkpoints. The formulas follow
`models/recurrent_gemma/modeling_recurrent_gemma.py` of transformers 5.23, and `torch/layers.py` and
`torch/modules.py` of `recurrentgemma` 1.0.1, the original.

A 16-bit model computes what follows the products of the gates in float32, and so is the state h: a
decay of 0.999 has no like in bfloat16.

Dimensions: B sequences, T new tokens, D hidden, C channels of a recurrent block, W tokens that the
convolution spans, N heads, S slots.
"""

import torch
from torch import Tensor, nn

from beam_gemma.model.config import GemmaConfig
from beam_gemma.model.layer_types import RECURRENT
from export.modules.decoder import GemmaDecoder, owners, sequence_positions
from export.modules.heads import Named
from export.modules.layers import Attend, Attention, FeedForward, RMSNorm, Rotation
from export.ops.linear_recurrence import linear_recurrence

CONV_STATE, LRU_STATE = "conv_state", "rg_lru_state"
"""Names of a recurrent block's states: the last inputs of its convolution, and h."""


class Convolution(nn.Module):
    """A causal convolution of each channel by itself."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        assert config.lru_width is not None
        assert config.conv1d_width is not None
        self.weight = nn.Parameter(torch.empty(config.lru_width, 1, config.conv1d_width))
        self.bias = nn.Parameter(torch.empty(config.lru_width))

    def forward(self, taps: list[Tensor]) -> Tensor:
        """Return [T, C] in float32 or wider; `taps` has W times [T, C], the oldest first."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        weight = self.weight.to(wide)
        total = taps[0].to(wide) * weight[:, 0, 0]
        for i, tap in enumerate(taps[1:], start=1):
            total = total + tap.to(wide) * weight[:, 0, i]
        return total + self.bias.to(wide)


class RgLru(nn.Module):
    """The gates of the real-gated linear recurrent unit; they multiply heads of channels."""

    def __init__(self, config: GemmaConfig, *, one_by_one: bool) -> None:
        """Make the unit.

        Args:
            config: The model.
            one_by_one: Whether to multiply each head by itself. ONNX Runtime on the CPU packs a
                matrix of weights when it loads a graph, and then no row depends on the others; it
                does not pack a batch of them.
        """
        super().__init__()
        assert config.lru_width is not None
        heads, width = config.num_attention_heads, config.lru_width // config.num_attention_heads
        self.one_by_one = one_by_one
        self.recurrent_param = nn.Parameter(torch.empty(config.lru_width))
        self.input_gate_weight = nn.Parameter(torch.empty(heads, width, width))
        self.input_gate_bias = nn.Parameter(torch.empty(heads, width))
        self.recurrent_gate_weight = nn.Parameter(torch.empty(heads, width, width))
        self.recurrent_gate_bias = nn.Parameter(torch.empty(heads, width))

    def forward(self, x: Tensor, is_start: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs and the logarithm of the decays of the recurrence, both [T, C].

        1 - a^2 is computed as -2 t / (1 - t) with t = tanh(log a), which is as exact where a is
        near 1.

        Args:
            x: [T, C] in float32 or wider.
            is_start: [T, 1], whether a token is the first of its whole sequence.
        """
        inner = x.to(self.input_gate_weight.dtype)
        gate_x = self._gate(inner, self.input_gate_weight, self.input_gate_bias).to(x.dtype)
        gate_a = self._gate(inner, self.recurrent_gate_weight, self.recurrent_gate_bias)
        rate = -8.0 * nn.functional.softplus(self.recurrent_param.to(x.dtype))
        log_decay = torch.sigmoid(gate_a.to(x.dtype)) * rate
        t = torch.tanh(log_decay)
        factor = torch.where(is_start, 1.0, torch.sqrt(-2.0 * t / (1.0 - t)))
        return x * torch.sigmoid(gate_x) * factor, log_decay

    def _gate(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Return the product of each head of x [T, C] with its matrix, plus the bias."""
        heads, width = bias.shape
        if not self.one_by_one:
            products = x.view(-1, heads, width).transpose(0, 1) @ weight
            return products.transpose(0, 1).reshape(x.shape) + bias.flatten()
        parts = torch.split(x, width, dim=1)
        return torch.cat([torch.addmm(bias[n], parts[n], weight[n]) for n in range(heads)], dim=1)


class RecurrentBlock(nn.Module):
    """Two branches, of which one remembers; the caller's `attend` runs that one over its state."""

    def __init__(self, config: GemmaConfig, *, one_by_one: bool) -> None:
        super().__init__()
        assert config.lru_width is not None
        self.linear_x = nn.Linear(config.hidden_size, config.lru_width)
        self.linear_y = nn.Linear(config.hidden_size, config.lru_width)
        self.linear_out = nn.Linear(config.lru_width, config.hidden_size)
        self.conv_1d = Convolution(config)
        self.rg_lru = RgLru(config, one_by_one=one_by_one)

    def forward(self, x: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
        """Return the block's output [T, D] of x [T, D]."""
        del rotation
        gate = nn.functional.gelu(self.linear_y(x), approximate="tanh")
        return self.linear_out(attend(self.linear_x(x)) * gate)


class GriffinLayer(nn.Module):
    """A block over time, attention or recurrent, and a feed-forward, with a norm before each."""

    def __init__(
        self, config: GemmaConfig, layer: int, inner: torch.dtype | None, *, one_by_one: bool
    ) -> None:
        super().__init__()
        self.inner = inner
        self.temporal_pre_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.temporal_block = (
            RecurrentBlock(config, one_by_one=one_by_one)
            if config.layer_types[layer] == RECURRENT
            else Attention(config, layer, bias=True)
        )
        self.channel_pre_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp_block = FeedForward(config, layer, bias=True)

    def forward(self, x: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
        """Return the residual stream [T, D]."""
        mixed = self.temporal_block(self.temporal_pre_norm(x, self.inner), rotation, attend)
        x = x + mixed.to(x.dtype)
        return x + self.mlp_block(self.channel_pre_norm(x, self.inner)).to(x.dtype)


class RecurrentDecoder(GemmaDecoder):
    """One ragged step of a RecurrentGemma, with the head that the signature names."""

    def layer(self, layer: int) -> nn.Module:
        """Return a new layer."""
        one_by_one = self.signature.device == "cpu"
        return GriffinLayer(self.config, layer, self.inner, one_by_one=one_by_one)

    def forward(self, step: Named, state: Named) -> tuple[Named, Named]:
        """Run one step; see `GemmaDecoder.forward`."""
        assert self.config.conv1d_width is not None
        return super().forward(step | _of_sequences(step, self.config.conv1d_width - 1), state)

    def _attend(
        self,
        step: Named,
        reach: dict[str, tuple[Tensor, Tensor]],
        state: Named,
        layer: int,
        *rows: Tensor,
        group: str | None = None,
    ) -> Tensor:
        """Mix the new tokens over time: attend, or run a recurrent block's branch over its state.

        The branch [T, C] is the only one of `rows` of a recurrent block.
        """
        if self.config.layer_types[layer] != RECURRENT:
            return super()._attend(step, reach, state, layer, *rows, group=group)
        [x] = rows
        block = self.get_submodule(f"layers.{layer}.temporal_block")
        assert isinstance(block, RecurrentBlock)
        x = block.conv_1d(self._taps(step, state, f"{CONV_STATE}.{layer}", x))
        inputs, log_decay = block.rg_lru(x, step["is_start"])
        before = initial(step, state, f"{LRU_STATE}.{layer}")
        hidden = self._recurrence(step, inputs, log_decay, before)
        last = hidden.index_select(0, step["last_rows"])
        store(step, state, f"{LRU_STATE}.{layer}", last)
        return hidden.to(rows[0].dtype)

    def _recurrence(self, step: Named, inputs: Tensor, log_decay: Tensor, before: Tensor) -> Tensor:
        """Return h [T, C] for inputs and decays [T, C] and each sequence's state [B, C]."""
        return linear_recurrence(inputs, log_decay, before, step["owner"], step["is_first"])

    def _taps(self, step: Named, state: Named, name: str, x: Tensor) -> list[Tensor]:
        """Return what the convolution spans, W times [T, C]; store the last of it.

        Args:
            step: The step's inputs, and what `_of_sequences` made of them.
            state: The states; that of the convolution is updated.
            name: Its name.
            x: [T, C], the new tokens.
        """
        tails = initial(step, state, name)
        rows = torch.cat([tails.flatten(0, 1), x])
        store(step, state, name, rows[step["tail_rows"]])
        return [*(rows.index_select(0, taps) for taps in step["taps"].unbind()), x]


def _of_sequences(step: Named, num_before: int) -> Named:
    """Return what all recurrent blocks take of a step's sequences.

    With the tails of all sequences before the new tokens, in rows of their own, both the tokens
    before a new one and a sequence's new tail are rows of one tensor.

    Args:
        step: The step's inputs.
        num_before: Tokens before its own that the convolution spans, W - 1.

    Returns:
        `owner` [T] and `is_first` [T], the sequence of each token, and whether it is the first new
        one; `is_start` [T, 1], whether it is the first of all; `is_new` [B], whether a sequence
        has none before; `last_rows` [B]; `taps` [W - 1, T] and `tail_rows` [B, W - 1], rows of
        that tensor.
    """
    starts = step["cu_seqlens"].long()
    lengths = starts[1:] - starts[:-1]
    tokens = torch.arange(step["input_ids"].shape[0])
    sequences = torch.arange(lengths.shape[0])
    owner = owners(step)
    positions = sequence_positions(step)
    index = tokens - starts.index_select(0, owner)
    back = torch.arange(num_before, 0, -1)[:, None]
    num_tails = sequences.shape[0] * num_before
    in_tail = owner * num_before + num_before + index - back
    last = lengths[:, None] - torch.arange(num_before, 0, -1)
    in_old_tail = sequences[:, None] * num_before + num_before + last
    return {
        "owner": owner,
        "is_first": index == 0,
        "is_start": (positions == 0)[:, None],
        "is_new": step["past_seqlens"] == 0,
        "last_rows": starts[1:] - 1,
        "taps": torch.where(index >= back, num_tails + tokens - back, in_tail),
        "tail_rows": torch.where(last >= 0, num_tails + starts[:-1, None] + last, in_old_tail),
    }


def initial(step: Named, state: Named, name: str) -> Tensor:
    """Return a state of each sequence [B, ...]; of a new one, zeros, whatever its slot holds."""
    rows = state[name].index_select(0, step["state_slots"].long())
    is_new = step["is_new"].view(-1, *[1] * (rows.ndim - 1))
    return torch.where(is_new, 0.0, rows)


def store(step: Named, state: Named, name: str, rows: Tensor) -> None:
    """Write the state of each sequence, rows [B, ...], to its slot."""
    slots = step["state_slots"].long()
    state[name] = torch.index_put(state[name], (slots,), rows.to(state[name].dtype))
