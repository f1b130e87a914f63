"""Attention in both directions inside spans: on CUDA two give what one with any reach does."""

import numpy as np
import pytest
import torch

from export.ops.reference import NO_WINDOW, ragged_attention
from export.ops.span_attention import span_attention

HEADS, KV_HEADS, DIM, BLOCK = 4, 2, 8, 16
NEW, PAST = (30, 1, 12), (0, 20, 37)
SPANS = {0: [(2, 18), (18, 25)], 2: [(30, 45)]}
"""Spans of each sequence; the last began before the step."""


@pytest.mark.parametrize("window", [NO_WINDOW, 5])
@pytest.mark.parametrize("keeps_window", [True, False])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_what_spans_attend_to_replaces_what_they_attended_to_causally(
    window: int, keeps_window: bool, softcap: float
) -> None:
    """In float64, where equal is equal; outside of spans nothing changes."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    total, starts = sum(NEW), np.cumsum([0, *NEW])
    query, key, value = draw(total, HEADS * DIM), draw(total, KV_HEADS * DIM), draw(total, 16)
    caches = draw(13, BLOCK, KV_HEADS, DIM), draw(13, BLOCK, KV_HEADS, DIM)
    table = 1 + torch.randperm(12, generator=generator).reshape(3, 4).int()
    positions = np.concatenate([p + np.arange(n) for p, n in zip(PAST, NEW, strict=True)])
    owners = np.repeat(np.arange(3), NEW)
    slots = table.numpy()[owners, positions // BLOCK] * BLOCK + positions % BLOCK
    first, last = positions - window + 1, positions.copy()
    rows, lengths, pasts, span_owners = [], [], [], []
    for owner, spans in SPANS.items():
        for start, end in spans:
            begin = max(start, PAST[owner])
            own = starts[owner] + np.arange(begin, end) - PAST[owner]
            rows.append(own)
            lengths.append(len(own))
            pasts.append(begin)
            span_owners.append(owner)
            last[own] = end - 1
            if not keeps_window:
                first[own] = 0
    places = np.full(total, -1)
    places[np.concatenate(rows)] = np.arange(sum(lengths))

    def attend(reach: tuple[np.ndarray, np.ndarray]) -> tuple[torch.Tensor, ...]:
        return ragged_attention(
            query, key, value, *caches, torch.from_numpy(starts), torch.tensor(PAST), table,
            torch.from_numpy(slots), torch.zeros(3), *map(torch.from_numpy, reach), HEADS, KV_HEADS,
            window, 0.3, softcap, "cuda",
        )  # fmt: skip

    expected, *_ = attend((first, last))
    causal, *written = attend((positions - window + 1, positions))
    assert not torch.allclose(causal, expected)
    output = span_attention(
        causal, query, key, *written, torch.tensor([0, *np.cumsum(lengths)]), torch.tensor(pasts),
        table[span_owners], torch.from_numpy(np.concatenate(rows)),
        torch.full((sum(lengths),), -1), torch.from_numpy(places >= 0)[:, None],
        torch.from_numpy(places).clamp(min=0), HEADS, KV_HEADS,
        window if keeps_window else NO_WINDOW, 0.3, softcap, torch.tensor([64, 64, 0]),
    )  # fmt: skip
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(output[places < 0], causal[places < 0], rtol=0, atol=0)
