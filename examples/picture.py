"""Functions that draw the results of a job as one HTML page without scripts."""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
 body {{ font: 14px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 60em; color: #222 }}
 table {{ border-collapse: collapse; width: 100% }}
 td, th {{ padding: .2em .6em; text-align: left; vertical-align: top }}
 tr:nth-child(even) {{ background: #f6f7f9 }}
 i {{ display: inline-block; height: .8em; background: #9db4d6 }}
 i.new {{ background: #e07b39 }}
 .error {{ color: #b00020 }}
 svg text {{ font-size: 9px }}
</style>
<h1>{title}</h1>
<p>{summary}</p>
{body}
</html>
"""
LEGEND = (
    '<p><i style="width:1.5em"></i> {left} &nbsp; <i class="new" style="width:1.5em"></i> {right}; '
    "bars are to one scale.</p>"
)
ROW = (
    '<tr><td>{id}</td><td>{text}</td><td style="white-space:nowrap">{bars}</td>'
    '<td class="{kind}">{result}</td></tr>'
)
BAR_EMS = 14.0
"""Width of the longest bar, in em."""
MAP_SIZE = (920, 620)
MARGIN = 60


def draw_completions(table: pa.Table, path: Path) -> None:
    """Write a page with the tokens and text of each row in the output of `pipelines.generate`."""
    rows = table.to_pylist()
    counts = [(row["num_prompt_tokens"] or 0, row["num_completion_tokens"] or 0) for row in rows]
    scale = BAR_EMS / max(1, *map(sum, counts))
    lines = (
        _line(row, row["title"], (old * scale, new * scale), row["completion"])
        for row, (old, new) in zip(rows, counts, strict=True)
    )
    old, new = map(sum, zip(*counts, strict=True))
    _write(
        path,
        "Three keywords for each article, by Gemma 3 270M",
        f"{_balance(rows)}; {old:,} prompt tokens, {new:,} new tokens",
        LEGEND.format(left="prompt tokens", right="new tokens")
        + _table(["row", "title", "tokens", "completion"], lines),
    )


def draw_scores(table: pa.Table, truth: str, path: Path) -> None:
    """Write a page with each row's scores in the two-label output of `pipelines.classify`."""
    rows = table.to_pylist()
    right = sum(row["label"] == row[truth] for row in rows)
    lines = (
        _line(
            row,
            row["text"],
            [BAR_EMS * score for score in row["scores"] or (0, 0)],
            row["label"] if row["label"] == row[truth] else f"{row['label']}, not {row[truth]}",
        )
        for row in rows
    )
    _write(
        path,
        "Sentiment of each review, by Gemma 3 270M",
        f"{_balance(rows)}; {right} of {len(rows)} as a person labelled them",
        LEGEND.format(left="negative", right="positive")
        + _table(["row", "review", "probability", "label"], lines),
    )


def draw_values(table: pa.Table, truth: str, path: Path) -> None:
    """Write a page with the values that `pipelines.generate` extracted from each row.

    Args:
        table: The job's output, with a column for each field of `truth`.
        truth: Name of the column with the values that a person found in the text.
        path: Path of the page to write.
    """
    rows = table.to_pylist()
    names = [field.name for field in table.schema.field(truth).type]
    right = {name: sum(_is_right(row, truth, name) for row in rows) for name in names}
    lines = (
        f"<tr><td>{row['id']}</td><td>{html.escape(row['text'])}</td>{_values(row, truth)}</tr>"
        for row in rows
    )
    columns = [f"{name}<br>{table.schema.field(name).type}" for name in names]
    _write(
        path,
        "Sales from notes, as typed columns, by Gemma 3 270M",
        f"{_balance(rows)}; of {len(rows)} right: "
        + ", ".join(f"{name} {count}" for name, count in right.items()),
        _table(["row", "note", *columns], lines),
    )


def _values(row: dict[str, Any], truth: str) -> str:
    if row["error"] is not None:
        return f'<td class="error">{html.escape(row["error"])}</td>'
    return "".join(
        f"<td>{html.escape(f'{row[name]}')}</td>"
        if _is_right(row, truth, name)
        else f'<td class="error">{html.escape(f"{row[name]}, not {right}")}</td>'
        for name, right in row[truth].items()
    )


def _is_right(row: dict[str, Any], truth: str, name: str) -> bool:
    """Return whether a value equals the true one, as text, since dates in JSON are text."""
    return f"{row[name]}" == f"{row[truth][name]}"


def draw_map(table: pa.Table, path: Path) -> None:
    """Write a page that maps the output of `pipelines.embed` on its two principal directions."""
    rows = [row for row in table.to_pylist() if row["error"] is None]
    vectors = np.array([row["embedding"] for row in rows])
    vectors -= vectors.mean(axis=0)
    left, strength, _ = np.linalg.svd(vectors, full_matrices=False)
    places = left[:, :2] * strength[:2]
    low, high = places.min(axis=0), places.max(axis=0)
    places = MARGIN + (places - low) / (high - low) * (np.array(MAP_SIZE) - 2 * MARGIN)
    languages = sorted({row["language"] for row in rows})
    dots = "\n".join(_dot(row, x, y, languages) for row, (x, y) in zip(rows, places, strict=True))
    width, height = MAP_SIZE
    _write(
        path,
        "Articles by the embeddings of Gemma 3 270M",
        f"{_balance(table.to_pylist())}; the first two principal directions, a colour for each of "
        f"{len(languages)} languages",
        f'<svg width="{width}" height="{height}" role="img">{dots}</svg>',
    )


def _dot(row: dict[str, Any], x: float, y: float, languages: list[str]) -> str:
    hue = 360 * languages.index(row["language"]) // len(languages)
    return (
        f'<circle cx="{x:.0f}" cy="{y:.0f}" r="4" fill="hsl({hue} 60% 50%)"/>'
        f'<text x="{x + 6:.0f}" y="{y + 3:.0f}">{html.escape(row["title"])}</text>'
    )


def _line(row: dict[str, Any], text: str, widths: Sequence[float], result: str) -> str:
    bars = "".join(
        f'<i class="{kind}" style="width:{width:.2f}em"></i>'
        for kind, width in zip(("old", "new"), widths, strict=True)
    )
    return ROW.format(
        id=row["id"],
        text=html.escape(text),
        bars=bars,
        kind="error" if row["error"] else "result",
        result=html.escape(row["error"] or result),
    )


def _table(heads: Iterable[str], lines: Iterable[str]) -> str:
    head = "".join(f"<th>{text}</th>" for text in heads)
    return "<table>" + "\n".join([f"<tr>{head}</tr>", *lines]) + "</table>"


def _balance(rows: Sequence[dict[str, Any]]) -> str:
    failed = sum(row["error"] is not None for row in rows)
    return f"{len(rows)} rows, {failed} with an error"


def _write(path: Path, title: str, summary: str, body: str) -> None:
    path.write_text(PAGE.format(title=html.escape(title), summary=summary, body=body))
