"""Gemma 3n in the engine: a row's bits in any company, with shared blocks and a small cache."""

import pytest

from beam_gemma.engine.sequence import Completion
from benchmarks.conditions import CONDITIONS
from tests.doubles.gemma3n_models import tiny_gemma3n
from tests.engine.test_invariance import NUM_ROWS, ONE_BASE, run

FEW_BLOCKS = 19
"""Two more than the longest row needs."""


@pytest.fixture(scope="module")
def bases() -> dict[bool, list[Completion]]:
    """Return the completions of one batch, greedy and sampled."""
    tiny = tiny_gemma3n("gemma3n")
    greedy, stats = run(tiny, CONDITIONS["base"])
    assert stats.num_cached_tokens > 0
    assert len({c.token_ids for c in greedy}) > NUM_ROWS // 2
    return {False: greedy, True: run(tiny, CONDITIONS["sampled-base"])[0]}


@pytest.mark.parametrize("condition", ONE_BASE)
def test_rows_are_the_same_in_any_company(
    bases: dict[bool, list[Completion]], condition: str
) -> None:
    """Layers that read the caches of others compute only rows that need a head, in any chunks."""
    how = CONDITIONS[condition]
    completions, stats = run(tiny_gemma3n("gemma3n"), how, small_cache=FEW_BLOCKS)
    assert how.holds(stats), "the run was not what its name says"
    assert completions == bases[how.sampled]
