"""Estimate the tokens, hours and cost of a job from a sample of its rows.

Each figure is computed from known values. A value that is neither measured nor given is None, and
so is every figure that depends on it.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

SECS_PER_HOUR = 3600

Sequences = tuple[tuple[int, ...], ...]
"""Token ids of each sequence that the model computes for a row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Sampled rows of a table, as the model would see them."""

    lengths: Sequence[int]
    """Prompt tokens of each valid row."""
    sequences: Sequence[Sequences]
    """Token sequences that the model would compute for each valid row."""
    sources: Sequence[Sequences] = ()
    """Sources that an encoder would read for each valid row; empty for a decoder alone."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Number of invalid rows per reason."""
    num_truncated: int = 0
    """Number of rows whose prompt would be truncated."""
    block_tokens: int | None = None
    """Tokens per block of a shared prefix, which is computed once; None without prefix reuse."""
    min_sharers: int = 2
    """Fewest sequences that have a prefix before it is computed once for all of them."""
    is_drawn: bool = False
    """True if results are sampled, so that equal rows are not merged."""

    @property
    def num_rows(self) -> int:
        """Number of rows in the sample."""
        return len(self.sequences) + self.reasons.total()

    @property
    def distinct(self) -> list[tuple[Sequences, Sequences]]:
        """Sequences and sources to compute, once for all rows that make the same request."""
        asked = list(zip(self.sequences, self.sources or [()] * len(self.sequences), strict=True))
        return asked if self.is_drawn else list(dict.fromkeys(asked))

    @property
    def num_duplicates(self) -> int:
        """Number of rows that repeat the request of another row."""
        return len(self.sequences) - len(self.distinct)

    @property
    def num_computed_tokens(self) -> int:
        """Prompt tokens to compute; equal requests, shared prefixes and sources count once."""
        sequences = [sequence for row, _ in self.distinct for sequence in row]
        sources = {source for row in self.sources for source in row}
        reused = 0
        if self.block_tokens is not None:
            reused = _num_reused(sequences, self.block_tokens, self.min_sharers)
        return sum(map(len, sequences)) - reused + sum(map(len, sources))

    @property
    def has_work_in_common(self) -> bool:
        """True if the rows together need fewer computed tokens than each on its own."""
        rows = (*self.sequences, *self.sources)
        return self.num_computed_tokens < sum(len(sequence) for row in rows for sequence in row)


class Distribution(NamedTuple):
    """Statistics of lengths, in tokens."""

    mean: float
    p95: int
    """95th percentile."""
    most: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Throughput:
    """Tokens per second that one worker computes, by kind of step; None if unknown."""

    prompt_tokens_per_sec: float | None
    completion_tokens_per_sec: float | None
    origin: str
    """Source of the figures, as a sentence for the report."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Means:
    """Throughput, workers and price that an estimate assumes; None if unknown."""

    throughput: Throughput
    num_workers: int | None
    worker_price: float | None
    """Price of one worker in US dollars per hour."""
    completion_tokens: float = 0.0
    """Average completion tokens per row."""
    completion_origin: str = ""
    """Source of `completion_tokens`, as text for the report."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Figures for a whole table, scaled up from its sample."""

    sample: Sample
    means: Means
    num_rows: int | None
    is_counted: bool
    """True if the rows have been counted, False if estimated from the size of the table."""

    @property
    def prompt_tokens(self) -> int | None:
        """Tokens of all prompts together."""
        return self._scaled(sum(self.sample.lengths))

    @property
    def computed_prompt_tokens(self) -> int | None:
        """Prompt tokens to compute, without duplicates and shared prefixes."""
        return self._scaled(self.sample.num_computed_tokens)

    @property
    def completion_tokens(self) -> int | None:
        """Tokens of all completions to compute."""
        completions = self._scaled(len(self.sample.distinct))
        return None if completions is None else round(completions * self.means.completion_tokens)

    @property
    def worker_hours(self) -> float | None:
        """Hours of work, summed over all workers."""
        rates = self.means.throughput
        parts = (
            _secs(self.computed_prompt_tokens, rates.prompt_tokens_per_sec),
            _secs(self.completion_tokens, rates.completion_tokens_per_sec),
        )
        known = [part for part in parts if part is not None]
        return sum(known) / SECS_PER_HOUR if len(known) == len(parts) else None

    @property
    def hours(self) -> float | None:
        """Elapsed hours with all workers at work in parallel."""
        if self.worker_hours is None or self.means.num_workers is None:
            return None
        return self.worker_hours / self.means.num_workers

    @property
    def cost(self) -> float | None:
        """Cost of the work in US dollars."""
        if self.worker_hours is None or self.means.worker_price is None:
            return None
        return self.worker_hours * self.means.worker_price

    @property
    def cost_per_million_rows(self) -> float | None:
        """Cost of a million such rows in US dollars."""
        if self.cost is None or not self.num_rows:
            return None
        return self.cost / self.num_rows * 1e6

    @property
    def assumptions(self) -> list[str]:
        """Assumptions behind the figures, one sentence each."""
        sample, means = self.sample, self.means
        said = ["the work alone counts, without the start of workers and of the model"]
        if self.num_rows is not None and not self.is_counted:
            said.append("the number of rows follows from the size of the table and of the sample")
        if self.num_rows != sample.num_rows:
            said.append("rows outside the sample are like those in it")
        if means.completion_tokens:
            said.append(
                f"{means.completion_tokens:g} tokens a completion: {means.completion_origin}"
            )
        if sample.has_work_in_common:
            said.append(
                "what rows have in common is computed once, with the share that it has in the "
                "sample; a larger table has rather more in common"
            )
        if (means.num_workers or 1) > 1:
            said.append(f"{means.num_workers:,} workers have work all the time")
        return [*said, means.throughput.origin]

    def as_json(self) -> dict[str, Any]:
        """Return all figures, without any row contents."""
        sample, means = self.sample, self.means
        lengths = distribution(sample.lengths)
        return {
            "rows": self.num_rows,
            "rows_counted": self.is_counted,
            "sample": {
                "rows": sample.num_rows,
                "failed": sample.reasons.total(),
                "reasons": dict(sample.reasons.most_common()),
                "truncated": sample.num_truncated,
                "duplicates": sample.num_duplicates,
                "prompt_tokens": lengths and lengths._asdict(),
            },
            "prompt_tokens": self.prompt_tokens,
            "computed_prompt_tokens": self.computed_prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "prompt_tokens_per_sec": means.throughput.prompt_tokens_per_sec,
            "completion_tokens_per_sec": means.throughput.completion_tokens_per_sec,
            "workers": means.num_workers,
            "worker_hours": self.worker_hours,
            "hours": self.hours,
            "worker_price_usd": means.worker_price,
            "cost_usd": self.cost,
            "cost_per_million_rows_usd": self.cost_per_million_rows,
            "assumptions": self.assumptions,
        }

    def _scaled(self, of_sample: int) -> int | None:
        """Return an amount in the sample scaled up to the table; None if that is not possible."""
        if self.num_rows is None or (self.num_rows and not self.sample.num_rows):
            return None
        return round(of_sample * self.num_rows / max(1, self.sample.num_rows))


def distribution(lengths: Sequence[int]) -> Distribution | None:
    """Return the statistics of lengths; None if there are no lengths."""
    if not lengths:
        return None
    ordered = sorted(lengths)
    p95 = ordered[math.ceil(0.95 * len(ordered)) - 1]
    return Distribution(mean=sum(ordered) / len(ordered), p95=p95, most=ordered[-1])


def _num_reused(sequences: Iterable[Sequence[int]], block_tokens: int, min_sharers: int) -> int:
    """Return the number of tokens in prefix blocks that an earlier sequence has computed.

    Args:
        sequences: Token ids of each sequence.
        block_tokens: Tokens of a block.
        min_sharers: Fewest sequences that have a block before it is reused.
    """
    known: dict[tuple[int, Sequence[int]], int] = {}
    num_sharers, num_reusers = Counter[int](), Counter[int]()
    for sequence in sequences:
        place = 0  # node of the blocks so far, in a tree of all prefixes
        for end in range(block_tokens, len(sequence) + 1, block_tokens):
            block = place, sequence[end - block_tokens : end]
            is_new = block not in known
            place = known.setdefault(block, len(known) + 1)
            num_sharers[place] += 1
            # The last token predicts the next one, so it must be computed.
            num_reusers[place] += not is_new and end < len(sequence)
    places = (place for place, number in num_sharers.items() if number >= min_sharers)
    return block_tokens * sum(num_reusers[place] for place in places)


def _secs(num_tokens: int | None, per_sec: float | None) -> float | None:
    """Return the seconds that the tokens take; zero tokens take 0 s even at an unknown rate."""
    if num_tokens == 0:
        return 0.0
    if num_tokens is None or per_sec is None:
        return None
    return num_tokens / per_sec
