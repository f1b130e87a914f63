"""Preview a job without running the model: sample prompts and an estimate for all rows."""

import json
from collections import Counter
from dataclasses import replace
from typing import Literal

import pyarrow as pa

from beam_gemma.errors import RecordError
from beam_gemma.inference.media_rows import with_files
from beam_gemma.inference.rows import rows_of
from beam_gemma.inference.task_handler import TaskHandler
from beam_gemma.inputs.row import Prompt
from beam_gemma.jobs.estimate import Estimate, Means, Sample, distribution
from beam_gemma.model.artifact import Artifact
from beam_gemma.monitoring.result_summary import reason_of
from beam_gemma.tables.source import SAMPLE_ROWS, Source
from beam_gemma.tasks.interface import Asked

Form = Literal["text", "json"]
SAMPLE_FILE_ROWS = 100
"""Rows to sample of a table with pictures or sounds, which are read."""
MIN_SNAPSHOT_SHARERS = 4
"""Fewest rows that share a prefix before the engine keeps its recurrent state, as
`engine.snapshots.MIN_SHARERS` says."""
SHOWN_PROMPTS = 3
SHOWN_REASONS = 3


def preview(
    source: Source, handler: TaskHandler, artifact: Artifact, means: Means, form: Form
) -> str:
    """Return a report on a table: figures, and in text form also the first prompts.

    Args:
        source: The table.
        handler: The handler of the task to preview.
        artifact: The model artifact.
        means: The throughput, workers and price to assume.
        form: Output form; `json` has only figures and no row contents.
    """
    asked, reasons = _ask(source, handler, artifact)
    signature = next(s for (head, _), s in artifact.signatures.items() if head == handler.head)
    # The decoder of a source has no prefixes in common with others: it reads the source.
    reuses = signature.paged_states and not signature.has_source
    sample = Sample(
        lengths=[sum(len(prompt.token_ids) for prompt in row.prompts) for row in asked],
        sequences=[row.sequences for row in asked],
        sources=[row.sources for row in asked if row.sources],
        reasons=reasons,
        num_truncated=sum(any(prompt.truncated for prompt in row.prompts) for row in asked),
        block_tokens=signature.block_size if reuses else None,
        min_sharers=MIN_SNAPSHOT_SHARERS if signature.has_recurrent_state else 2,
        is_drawn=handler.settings.is_sampled,
    )
    estimate = Estimate(
        sample=sample,
        means=means,
        num_rows=source.expected_rows,
        is_counted=source.num_rows is not None,
    )
    results = handler.settings.result_schema
    if form == "json":
        columns = {field.name: str(field.type) for field in results}
        return json.dumps({"columns_to_add": columns} | estimate.as_json(), indent=2) + "\n"
    lines = [
        f"rows: {_size(source)}, of which {sample.num_rows:,} sampled",
        f"columns to add: {_columns(results)}",
        *_sample_lines(sample),
        *_estimate_lines(estimate),
        *_prompt_lines([row.prompts[0] for row in asked[:SHOWN_PROMPTS]]),
    ]
    return "\n".join(lines) + "\n"


def _ask(
    source: Source, handler: TaskHandler, artifact: Artifact
) -> tuple[list[Asked], Counter[str]]:
    """Return the requests of the sampled rows, and the counts of reasons for failed rows."""
    settings, asks = handler.settings, handler.asks(artifact)
    asked = []
    reasons: Counter[str] = Counter()
    num_rows = SAMPLE_FILE_ROWS if settings.file_columns else SAMPLE_ROWS
    for batch in source.sample(num_rows):
        for row in with_files(rows_of(batch), settings, handler.reading):
            try:
                asked.append(_without_files(asks(row)))
            except RecordError as error:
                reasons[reason_of(str(error))] += 1
    return asked, reasons


def _without_files(asked: Asked) -> Asked:
    """Return a row's requests without their files, of which there may be many."""
    return replace(asked, prompts=tuple(replace(prompt, files=()) for prompt in asked.prompts))


def _size(source: Source) -> str:
    """Return the number of rows as text, or an estimate or the bytes to scan."""
    if source.num_rows is not None:
        return f"{source.num_rows:,}"
    if source.expected_rows is not None:
        return f"about {source.expected_rows:,}, in {source.num_bytes:,} bytes"
    return (
        f"not known, in {source.num_bytes:,} bytes to scan, with columns {_columns(source.schema)}"
    )


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)


def _sample_lines(sample: Sample) -> list[str]:
    lengths = distribution(sample.lengths)
    shown = "none"
    if lengths is not None:
        shown = f"mean {lengths.mean:,.1f}, 95th percentile {lengths.p95:,}, most {lengths.most:,}"
    reasons = sample.reasons
    lines = [
        f"prompt tokens: {shown}",
        f"rows that would fail: {reasons.total():,} of the sample",
        *(f"  {count:,} {reason}" for reason, count in reasons.most_common(SHOWN_REASONS)),
    ]
    if sample.num_truncated:
        lines.append(f"prompts that would be cut: {sample.num_truncated:,} of the sample")
    if sample.num_duplicates:
        lines.append(f"rows that ask what others ask: {sample.num_duplicates:,} of the sample")
    return lines


def _estimate_lines(estimate: Estimate) -> list[str]:
    means = estimate.means
    prompt = f"{_number(estimate.prompt_tokens)} prompt tokens"
    tokens = f"{prompt}, {_number(estimate.computed_prompt_tokens)} of them to compute"
    if means.completion_tokens:
        tokens += f", and {_number(estimate.completion_tokens)} completion tokens"
    cost = _number(estimate.cost, "; pass --worker_price" * (means.worker_price is None))
    if estimate.cost_per_million_rows is not None:
        cost += f" USD, {_number(estimate.cost_per_million_rows)} USD for a million rows"
    return [
        f"tokens in all: {tokens}",
        f"workers: {_number(means.num_workers, '; pass --max_num_workers')}",
        f"hours: {_number(estimate.hours)}, of all workers together "
        f"{_number(estimate.worker_hours)}",
        f"cost: {cost}",
        "assumptions:",
        *(f"  {sentence}" for sentence in estimate.assumptions),
    ]


def _prompt_lines(prompts: list[Prompt]) -> list[str]:
    lines = []
    for number, prompt in enumerate(prompts, start=1):
        lines += [f"prompt {number}, {len(prompt.token_ids):,} tokens:", prompt.text]
        if prompt.decoder_parts:
            num_tokens = len(prompt.decoder_token_ids)
            lines += [f"decoder prompt {number}, {num_tokens:,} tokens:", prompt.decoder_text]
    return lines


def _number(value: int | float | None, remedy: str = "") -> str:
    """Return a number as text, or `not known` followed by the remedy."""
    if value is None:
        return f"not known{remedy}"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.2f}" if value >= 1 else f"{value:.2g}"
