"""What a job would do: a sample of its rows as prompts, without a model run."""

import math
from collections import Counter
from collections.abc import Iterable

import pyarrow as pa

from beam_gemma.errors import RecordError
from beam_gemma.examples import rows_of
from beam_gemma.prompt_encoder import Prompt
from beam_gemma.source import SAMPLE_ROWS, Source
from beam_gemma.summary import reason_of
from beam_gemma.task import Encoder

SHOWN_PROMPTS = 3
SHOWN_REASONS = 3


def preview(source: Source, encoder: Encoder, results: pa.Schema) -> str:
    """Return a report: rows, new columns, prompt tokens, rows that would fail, first prompts."""
    prompts, reasons = _encode(source, encoder)
    num_sampled = len(prompts) + reasons.total()
    lines = [
        f"rows: {_size(source)}, of which {num_sampled:,} sampled",
        f"columns to add: {_columns(results)}",
        f"prompt tokens: {_distribution([len(prompt.token_ids) for prompt in prompts])}",
        f"rows that would fail: {reasons.total():,} of the sample",
    ]
    lines += [f"  {count:,} {reason}" for reason, count in reasons.most_common(SHOWN_REASONS)]
    if num_cut := sum(prompt.truncated for prompt in prompts):
        lines.append(f"prompts that would be cut: {num_cut:,} of the sample")
    for number, prompt in enumerate(prompts[:SHOWN_PROMPTS], start=1):
        lines += [f"prompt {number}, {len(prompt.token_ids):,} tokens:", prompt.text]
    return "\n".join(lines) + "\n"


def _size(source: Source) -> str:
    """Return how many rows there are, or what is known in place of that."""
    if source.num_rows is not None:
        return f"{source.num_rows:,}"
    return (
        f"not known, in {source.num_bytes:,} bytes to scan, with columns {_columns(source.schema)}"
    )


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)


def _encode(source: Source, encoder: Encoder) -> tuple[list[Prompt], Counter[str]]:
    """Return the prompts of the sample, and why rows have none."""
    prompts = []
    reasons: Counter[str] = Counter()
    for batch in source.head(SAMPLE_ROWS):
        for row in rows_of(batch):
            try:
                prompts.append(encoder(row))
            except RecordError as error:
                reasons[reason_of(str(error))] += 1
    return prompts, reasons


def _distribution(lengths: Iterable[int]) -> str:
    ordered = sorted(lengths)
    if not ordered:
        return "none"
    mean = sum(ordered) / len(ordered)
    p95 = ordered[math.ceil(0.95 * len(ordered)) - 1]
    return f"mean {mean:,.1f}, 95th percentile {p95:,}, most {ordered[-1]:,}"
