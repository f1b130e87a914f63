"""Pads rows of token ids to one width, for systems that compute whole batches."""

from collections.abc import Sequence

import torch


def padded(
    rows: Sequence[Sequence[int]], device: torch.device | str = "cpu", *, left: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the token ids of a batch with zeros as padding, and a mask that is 1 for tokens.

    Args:
        rows: Token ids of each row.
        device: Device of both tensors.
        left: Whether padding comes before a row's tokens, else after them.
    """
    width = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        zeros = [0] * (width - len(row))
        ids.append([*zeros, *row] if left else [*row, *zeros])
        ones = [1] * len(row)
        mask.append([*zeros, *ones] if left else [*ones, *zeros])
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
