"""Draws what a job did, as one HTML page without scripts: each row, its tokens, its result."""

import html
from pathlib import Path
from typing import Any

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
</style>
<h1>{title}</h1>
<p>{summary}</p>
<p><i style="width:1.5em"></i> prompt tokens &nbsp; <i class="new" style="width:1.5em"></i> new
tokens; bars are to one scale.</p>
<table><tr><th>row</th><th>title</th><th>tokens</th><th>completion</th></tr>
{rows}
</table></html>
"""
ROW = (
    '<tr><td>{id}</td><td>{title}</td><td style="white-space:nowrap">{bars}</td>'
    '<td class="{kind}">{result}</td></tr>'
)
BAR_EMS = 14.0
"""Width of the longest bar."""


def draw(table: pa.Table, path: Path, title: str) -> None:
    """Write a page about the output of `pipelines.generate`."""
    rows = table.select(
        ["id", "title", "completion", "error", "num_prompt_tokens", "num_completion_tokens"]
    ).to_pylist()
    longest = max(_num_tokens(row) for row in rows)
    failed = sum(row["error"] is not None for row in rows)
    summary = (
        f"{len(rows)} rows, {failed} with an error; "
        f"{sum(row['num_prompt_tokens'] or 0 for row in rows):,} prompt tokens, "
        f"{sum(row['num_completion_tokens'] or 0 for row in rows):,} new tokens"
    )
    lines = "\n".join(_line(row, BAR_EMS / max(longest, 1)) for row in rows)
    path.write_text(PAGE.format(title=html.escape(title), summary=summary, rows=lines))


def _num_tokens(row: dict[str, Any]) -> int:
    return (row["num_prompt_tokens"] or 0) + (row["num_completion_tokens"] or 0)


def _line(row: dict[str, Any], ems_per_token: float) -> str:
    bars = "".join(
        f'<i class="{kind}" style="width:{(row[column] or 0) * ems_per_token:.2f}em"></i>'
        for kind, column in (("old", "num_prompt_tokens"), ("new", "num_completion_tokens"))
    )
    return ROW.format(
        id=row["id"],
        title=html.escape(row["title"]),
        bars=bars,
        kind="error" if row["error"] else "completion",
        result=html.escape(row["error"] or row["completion"]),
    )
