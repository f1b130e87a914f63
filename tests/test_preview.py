"""Preview: figures and prompts of a sample, from no more rows than it needs."""

import json

from beam_gemma import preview as preview_module
from beam_gemma.generate import GenerateSettings
from beam_gemma.preview import preview
from beam_gemma.prompt_encoder import PromptEncoder
from beam_gemma.tables import open_source
from tests.fake_models import TOKENIZER


def report_of(tmp_path, rows, *, max_tokens=1000, **settings):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = GenerateSettings(prompt="say {text}", **settings)
    encoder = PromptEncoder(TOKENIZER, settings, chat_template=None, max_tokens=max_tokens)
    return preview(open_source(str(path)), encoder, settings.result_schema)


def test_report(tmp_path):
    rows = [{"text": letter * n} for letter, n in (("x", 1), ("y", 2), ("z", 3), ("q", 4))]
    lengths = [
        1 + len(TOKENIZER.encode(TOKENIZER.split(f"say {r['text']}"), add_bos=False)) for r in rows
    ]
    assert report_of(tmp_path, rows) == (
        "rows: 4, of which 4 sampled\n"
        "columns to add: completion string, finish_reason string, num_prompt_tokens int64, "
        "num_completion_tokens int64, error string\n"
        f"prompt tokens: mean {sum(lengths) / 4:.1f}, 95th percentile {max(lengths)}, "
        f"most {max(lengths)}\n"
        "rows that would fail: 0 of the sample\n"
        f"prompt 1, {lengths[0]} tokens:\nsay x\n"
        f"prompt 2, {lengths[1]} tokens:\nsay yy\n"
        f"prompt 3, {lengths[2]} tokens:\nsay zzz\n"
    )


def test_percentile_is_exact(tmp_path):
    report = report_of(tmp_path, [{"text": "x" * n} for n in range(1, 101)])
    start = len(TOKENIZER.encode(TOKENIZER.split("say ")))
    assert f"95th percentile {start + 95}, most {start + 100}" in report


def test_failures_are_gathered_by_reason(tmp_path):
    rows = [{"text": None}] * 2 + [{"text": "x" * n} for n in (100, 200, 300)] + [{"text": "x"}]
    report = report_of(tmp_path, rows, max_tokens=50)
    assert "rows that would fail: 5 of the sample\n" in report
    assert report.index("  3 prompt: expected at most N tokens, got N;") < report.index(
        "  2 column"
    )


def test_cut_prompts_are_counted(tmp_path):
    rows = [{"text": "x" * n} for n in (100, 200, 3)]
    report = report_of(tmp_path, rows, max_tokens=50, truncate="left")
    assert "prompts that would be cut: 2 of the sample\n" in report
    assert "most 50\n" in report


def test_sample_of_a_long_table(tmp_path, monkeypatch):
    monkeypatch.setattr(preview_module, "SAMPLE_ROWS", 40)
    report = report_of(tmp_path, [{"text": f"row {i}"} for i in range(100)])
    assert report.startswith("rows: 100, of which 40 sampled\n")


def test_table_without_rows_that_work(tmp_path):
    assert "prompt tokens: none\n" in report_of(tmp_path, [{"text": None}])
