"""Summaries of results: counts that can be added up across any parts of a table.

Summaries contain no data of rows: errors are counted by reason, which quotes no value.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

MAX_REASONS = 100
"""Most reasons kept, the most frequent; others count only in the number of failed rows."""
MAX_REASON_CHARS = 200
LENGTH_BITS = 7
"""Leading bits of a length kept by its bin: exact below 128, else at most 1/64 wide."""
PROMPT_LENGTHS = ("num_prompt_tokens", "num_tokens")
"""Result columns with the number of tokens of a prompt, or of a text to embed."""
# An error quotes row data only after "got" and a quotation mark, bracket or colon.
_QUOTED = r"""(?s)(, got[^'"\[({:;]*)['"\[({:].*"""
_FIGURES = r"[0-9][0-9,]*"


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Counts over finished rows."""

    rows: int = 0
    failed: int = 0
    truncated: int = 0
    """Rows whose prompt or text was cut."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    thinking_tokens: int = 0
    prompt_lengths: Counter[int] = field(default_factory=Counter)
    """Rows by prompt length in tokens; each key is the smallest length of its bin."""
    completion_lengths: Counter[int] = field(default_factory=Counter)
    finish_reasons: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    """Rows by index of their label, or by each policy they violate."""
    unreadable_boxes: int = 0
    """Entries of completions that are no box."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Failed rows by their reason; see `reason_of`."""

    @classmethod
    def of(cls, results: pa.RecordBatch) -> "Summary":
        """Return the summary of a batch with a task's result columns; others are ignored."""
        prompt_lengths = sum((_values(results, name) for name in PROMPT_LENGTHS), Counter())
        completion_lengths = _values(results, "num_completion_tokens")
        labels = _values(results, "label_index") + _values(results, "violations")
        errors = results.column("error").drop_null()
        return cls(
            rows=results.num_rows,
            failed=len(errors),
            truncated=_values(results, "truncated")[True],
            prompt_tokens=_total(prompt_lengths),
            completion_tokens=_total(completion_lengths),
            thinking_tokens=_total(_values(results, "num_thinking_tokens")),
            prompt_lengths=_binned(prompt_lengths),
            completion_lengths=_binned(completion_lengths),
            finish_reasons=_values(results, "finish_reason"),
            labels=Counter({str(label): count for label, count in labels.items()}),
            unreadable_boxes=_total(_values(results, "num_unreadable_boxes")),
            reasons=_reasons(errors),
        )

    def __add__(self, other: "Summary") -> "Summary":
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Summary(**sums | {"reasons": _commonest(sums["reasons"])})

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-serializable form; lengths ascend, other counts start with the largest."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: _plain(v) if isinstance(v, Counter) else v for name, v in values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Summary":
        """Return the summary from the output of `as_dict`."""
        lengths = {
            name: Counter({int(length): count for length, count in values[name].items()})
            for name in ("prompt_lengths", "completion_lengths")
        }
        others = {name: Counter(values[name]) for name in ("finish_reasons", "labels", "reasons")}
        return cls(**{**values, **lengths, **others})


def reason_of(error: str) -> str:
    """Return an error message without row data, so that similar failures share one reason.

    Numbers become N, and values quoted from a row are left out.
    """
    reason = re.sub(_FIGURES, "N", re.sub(_QUOTED, r"\1…", error))
    return reason[:MAX_REASON_CHARS]


def length_bin(length: int) -> int:
    """Return the smallest length in the bin of this length."""
    return length // bin_width(length) * bin_width(length)


def bin_width(length: int) -> int:
    """Return the number of lengths in the bin of this length."""
    return 1 << max(length.bit_length() - LENGTH_BITS, 0)


def _values(results: pa.RecordBatch, name: str) -> Counter[Any]:
    """Return the count of each value in a column or in its lists; empty without such a column."""
    if name not in results.schema.names:
        return Counter()
    column = results.column(name)
    if pa.types.is_list(column.type):
        column = column.flatten()
    counted = column.drop_null().value_counts()
    values, counts = (counted.field(i).to_pylist() for i in (0, 1))
    return Counter(dict(zip(values, counts, strict=True)))


def _reasons(errors: pa.StringArray) -> Counter[str]:
    """Return the count of each reason among errors; see `reason_of`."""
    reasons = pc.replace_substring_regex(errors, pattern=_QUOTED, replacement=r"\1…")
    reasons = pc.replace_substring_regex(reasons, pattern=_FIGURES, replacement="N")
    reasons = pc.utf8_slice_codeunits(reasons, 0, MAX_REASON_CHARS)
    batch = pa.RecordBatch.from_arrays([reasons], ["reason"])
    return _commonest(_values(batch, "reason"))


def _commonest(counts: Counter[str]) -> Counter[str]:
    return Counter(dict(_ordered(counts)[:MAX_REASONS]))


def _ordered(counts: Counter[Any]) -> list[tuple[Any, int]]:
    """Return counts from the largest; equal ones are sorted by value, so order is deterministic."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _total(lengths: Counter[int]) -> int:
    return sum(length * count for length, count in lengths.items())


def _binned(lengths: Counter[int]) -> Counter[int]:
    bins: Counter[int] = Counter()
    for length, count in lengths.items():
        bins[length_bin(length)] += count
    return bins


def _plain(counts: Counter[Any]) -> dict[str, int]:
    is_lengths = all(isinstance(value, int) for value in counts)
    items = sorted(counts.items()) if is_lengths else _ordered(counts)
    return {str(value): count for value, count in items}
