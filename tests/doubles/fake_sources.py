"""Signatures of decoders whose sequences have a source, and an encoder without a model.

The state of a source token is a number that depends on the whole source, so a `FakeSession` shows
whether each sequence reads the whole of its own source.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from beam_gemma.model.graph_tensors import Head, PagedState
from beam_gemma.model.signature import Signature
from tests.doubles.fakes import STATES, fake_signature, read_source, with_pictures

WINDOW = 40
MAX_SOURCE_LEN = 300
APART = (
    *STATES[:2],
    PagedState(group="cross", layers=(0, 1), num_key_value_heads=1, head_dim=8, holds="source"),
)
"""As in T5Gemma: the source has caches of its own."""
MERGED = tuple(replace(state, holds="both") for state in STATES[:2])
"""As in T5Gemma 2: the source lies in front of the tokens, which go round in the window."""
KINDS = {"apart": APART, "merged": MERGED}
NAN_TOKEN = 95
"""A token that makes the states of its source NaN."""


def source_signature(kind: str, *, head: Head = "generate", max_model_len: int = 200) -> Signature:
    """Return the signature of a decoder with sources: `apart` or `merged`."""
    signature = fake_signature(
        states=KINDS[kind], optional_inputs=(), max_model_len=max_model_len, head=head
    )
    return replace(signature, source_size=8, max_source_len=MAX_SOURCE_LEN)


class FakeSourceEncoder:
    """Stands in for the session of an encoder."""

    def __init__(self, *, takes_pictures: bool = False) -> None:
        inputs = ("inputs_embeds",) if takes_pictures else ()
        signature = fake_signature(states=(), optional_inputs=inputs, head="encode")
        self.signature = signature
        self.steps: list[list[int]] = []
        """Lengths of the sources of each step."""
        self.fails: Callable[[int, list[int]], bool] = lambda _, __: False
        """Whether a step raises, by its number (from 1) and its tokens."""

    def encode(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return states made of the sources."""
        assert sorted(feeds) == sorted(t.name for t in self.signature.step_inputs())
        ids = feeds["input_ids"] if "embeds_rows" not in feeds else with_pictures(feeds)
        bounds = feeds["cu_seqlens"].tolist()
        sources = [ids[begin:end].tolist() for begin, end in itertools.pairwise(bounds)]
        assert all(sources)
        self.steps.append([len(source) for source in sources])
        if self.fails(len(self.steps), ids.tolist()):
            raise RuntimeError("the encoder is gone")
        states = np.zeros((len(ids), 8), np.float32)
        states[:, 0] = [i for source in sources for i in read_source(source)]
        for begin, source in zip(bounds, sources, strict=False):
            if NAN_TOKEN in source:
                states[begin : begin + len(source)] = np.nan
        return states
