"""The decoder of RecurrentGemma for CUDA, whose rows are found without any shape of the step.

What all recurrent blocks take of a step follows from its inputs alone, and no tensors are joined:
ONNX Runtime computes shapes on the host, and its `Concat` copies sizes to the device. A captured
graph must do neither.

Dimensions: B sequences, T new tokens, C channels of a recurrent block, W tokens that the
convolution spans, L places of a sequence.
"""

import torch
from torch import Tensor, nn

from export.modules.decoder import GemmaDecoder
from export.modules.heads import Named
from export.modules.recurrent import RecurrentDecoder, initial, store
from export.ops.linear_recurrence import padded_recurrence


class CudaRecurrentDecoder(RecurrentDecoder):
    """One ragged step of a RecurrentGemma, for CUDA."""

    def forward(self, step: Named, state: Named) -> tuple[Named, Named]:
        """Run one step; see `GemmaDecoder.forward`."""
        assert self.config.conv1d_width is not None
        step = step | _of_rows(step, self.config.conv1d_width - 1)
        return GemmaDecoder.forward(self, step, state)

    def _recurrence(self, step: Named, inputs: Tensor, log_decay: Tensor, before: Tensor) -> Tensor:
        """Return h [T, C], computed with the sequences side by side.

        Behind a sequence's end, the input is 0 and the decay 1.
        """
        rows = (nn.functional.embedding(step["rows"], x) for x in (inputs, log_decay))
        padded = (torch.where(step["is_token"], x, 0.0) for x in rows)
        return padded_recurrence(*padded, before, step["token_places"])

    def _taps(self, step: Named, state: Named, name: str, x: Tensor) -> list[Tensor]:
        tails = initial(step, state, name).flatten(0, 1)
        found = [
            torch.where(
                step[f"{kind}_is_new"][..., None],
                nn.functional.embedding(step[f"{kind}_tokens"], x),
                nn.functional.embedding(step[f"{kind}_tails"], tails),
            )
            for kind in ("tap", "end")
        ]
        store(step, state, name, found[1])
        return [*found[0].unbind(), x]


def _of_rows(step: Named, num_before: int) -> Named:
    """Return what all recurrent blocks take of a step's sequences.

    A token before another one is a new token of the step, or lies in the tail that the state keeps
    of its sequence.

    Args:
        step: The step's inputs.
        num_before: Tokens before its own that the convolution spans, W - 1.

    Returns:
        `rows` [B, L], the packed position of each place, and `is_token` [B, L, 1], whether it is no
        padding; `owner` [T], `is_first` [T], `is_start` [T, 1], `is_new` [B] and `last_rows` [B],
        as in `export.modules.recurrent`; where the tokens before each one lie, [W - 1, T]: whether
        they are new, `tap_is_new`, their packed position, `tap_tokens`, and their row in the tails
        of all sequences, `tap_tails`; the same of each sequence's new tail, [B, W - 1], as
        `end_...`.
    """
    starts, past = step["cu_seqlens"].long(), step["past_seqlens"].long()
    lengths = starts[1:] - starts[:-1]
    # 0, 1, ... up to B - 1: `arange` would ask for the shape.
    sequences = torch.cumsum((lengths >= 0).float(), 0).long() - 1
    rows = torch.where(step["token_rows"] >= 0, sequences[:, None], 0)
    owner = rows.reshape(-1).index_select(0, step["token_places"])
    positions = step["position_ids"]
    # Padding tokens have any place and any position.
    index = (positions - past.index_select(0, owner)).clamp(min=0)
    back = torch.arange(num_before, 0, -1)
    tap = index - back[:, None]
    end = lengths[:, None] - back
    return {
        "rows": step["token_rows"].clamp(min=0),
        "is_token": (step["token_rows"] >= 0)[:, :, None],
        "owner": owner,
        "is_first": index == 0,
        "is_start": (positions == 0)[:, None],
        "is_new": past == 0,
        "last_rows": starts[1:] - 1,
        **_place("tap", tap, starts.index_select(0, owner), owner, num_before),
        **_place("end", end, starts[:-1, None], sequences[:, None], num_before),
    }


def _place(
    kind: str, index: Tensor, starts: Tensor, sequences: Tensor, num_before: int
) -> dict[str, Tensor]:
    """Return where tokens lie, by their index among the new ones, which is below 0 for others."""
    return {
        f"{kind}_is_new": index >= 0,
        f"{kind}_tokens": starts + index.clamp(min=0),
        f"{kind}_tails": sequences * num_before + (index + num_before).clamp(0, num_before - 1),
    }
