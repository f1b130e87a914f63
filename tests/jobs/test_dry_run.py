"""Preview: figures and prompts of a sample, from no more rows than it needs."""

import dataclasses
import json

import pytest

from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.inference.handlers import GemmaGenerateModelHandler
from beam_gemma.inputs.prompt_encoder import PromptEncoder
from beam_gemma.jobs import dry_run as preview_module
from beam_gemma.jobs.dry_run import preview
from beam_gemma.jobs.estimate import Means, Throughput
from beam_gemma.model.config import GemmaConfig
from beam_gemma.tables import jsonl_source
from beam_gemma.tables.open_table import open_source
from beam_gemma.tasks.generate import GenerateSettings
from export.checkpoints.released_sizes import SIZES
from tests.doubles.fake_models import TOKENIZER
from tests.doubles.fakes import fake_signature
from tests.jobs.test_profiles import artifact_of

ARTIFACT = dataclasses.replace(
    artifact_of(GemmaConfig.from_hf(SIZES[0].raw)),
    signatures={
        ("embed", "cpu"): fake_signature(states=()),
        ("generate", "cpu"): dataclasses.replace(fake_signature(), block_size=4),
    },
)
MEANS = Means(
    throughput=Throughput(
        prompt_tokens_per_sec=10.0, completion_tokens_per_sec=5.0, origin="measured here"
    ),
    num_workers=1,
    worker_price=3600.0,
    completion_tokens=2.0,
    completion_origin="by a flag",
)
UNKNOWN = Means(
    throughput=Throughput(
        prompt_tokens_per_sec=None, completion_tokens_per_sec=None, origin="measure it"
    ),
    num_workers=None,
    worker_price=None,
)


class Handler(GemmaGenerateModelHandler):
    """Needs no model folder."""

    def __init__(self, settings, max_tokens):
        super().__init__("nowhere", settings)
        self._max_tokens = max_tokens

    def encoder(self, artifact):
        assert artifact is ARTIFACT
        return PromptEncoder(
            TOKENIZER, self.settings, chat_template=None, max_tokens=self._max_tokens
        )


def length_of(text):
    return 1 + len(TOKENIZER.encode(TOKENIZER.split(f"say {text}"), add_bos=False))


@pytest.fixture
def report_of(tmp_path):
    def report_of(rows, *, max_tokens=1000, means=MEANS, form="text", **settings):
        path = tmp_path / "in.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = GenerateSettings(prompt="say {text}", **settings)
        source = open_source(str(path), dry_run=True)
        return preview(source, Handler(settings, max_tokens), ARTIFACT, means, form)

    return report_of


def test_report(report_of):
    texts = ["x", "yy", "zzz", "qqqq"]
    lengths = [length_of(text) for text in texts]
    shared = (length_of("") - 1) // 4 * 4
    computed = sum(lengths) - 3 * shared
    secs = computed / 10 + 8 / 5
    assert report_of([{"text": text} for text in texts]) == (
        "rows: 4, of which 4 sampled\n"
        "columns to add: completion string, finish_reason string, num_prompt_tokens int64, "
        "num_completion_tokens int64, error string\n"
        f"prompt tokens: mean {sum(lengths) / 4:.1f}, 95th percentile {max(lengths)}, "
        f"most {max(lengths)}\n"
        "rows that would fail: 0 of the sample\n"
        f"tokens in all: {sum(lengths)} prompt tokens, {computed} of them to compute, and 8 "
        "completion tokens\n"
        "workers: 1\n"
        f"hours: {secs / 3600:.2g}, of all workers together {secs / 3600:.2g}\n"
        f"cost: {secs:.2f} USD, {secs / 4 * 1e6:,.2f} USD for a million rows\n"
        "assumptions:\n"
        "  the work alone counts, without the start of workers and of the model\n"
        "  2 tokens a completion: by a flag\n"
        "  what rows have in common is computed once, with the share that it has in the sample; "
        "a larger table has rather more in common\n"
        "  measured here\n"
        f"prompt 1, {lengths[0]} tokens:\nsay x\n"
        f"prompt 2, {lengths[1]} tokens:\nsay yy\n"
        f"prompt 3, {lengths[2]} tokens:\nsay zzz\n"
    )


def test_what_is_not_known_says_what_to_pass(report_of):
    report = report_of([{"text": "x"}], means=UNKNOWN)
    assert "\nworkers: not known; pass --max_num_workers\n" in report
    assert "\nhours: not known, of all workers together not known\n" in report
    assert "\ncost: not known; pass --worker_price\n" in report
    assert "\n  measure it\n" in report


def test_json_has_no_row_in_it(report_of):
    rows = [{"text": "secret words"}, {"text": None}, {"text": "secret words"}]
    report = json.loads(report_of(rows, form="json"))
    assert (report["rows"], report["completion_tokens"]) == (3, 2)
    assert report["sample"]["failed"] == report["sample"]["duplicates"] == 1
    assert report["columns_to_add"]["completion"] == "string"
    assert "secret" not in json.dumps(report)


def test_failures_are_gathered_by_reason(report_of):
    rows = [{"text": None}] * 2 + [{"text": "x" * n} for n in (100, 200, 300)] + [{"text": "x"}]
    report = report_of(rows, max_tokens=50)
    assert "rows that would fail: 5 of the sample\n" in report
    assert report.index("  3 prompt: expected at most N tokens, got N;") < report.index(
        "  2 column"
    )


def test_cut_prompts_and_rows_that_ask_the_same_are_counted(report_of):
    rows = [{"text": "x" * n} for n in (100, 200, 3, 3)]
    report = report_of(rows, max_tokens=50, truncate="left")
    assert "prompts that would be cut: 2 of the sample\n" in report
    assert "rows that ask what others ask: 2 of the sample\n" in report
    assert "most 50\n" in report
    drawn = report_of(rows, sampling=SamplingParams(temperature=1.0))
    assert "ask what others ask" not in drawn


def test_sample_of_a_long_table(report_of, monkeypatch):
    for module in (preview_module, jsonl_source):
        monkeypatch.setattr(module, "SAMPLE_ROWS", 40)
    report = report_of([{"text": f"row {i:03}"} for i in range(100)])
    assert report.startswith("rows: about 100, in 2,000 bytes, of which 40 sampled\n")
    assert "\n  the number of rows follows from the size of the table" in report
    assert "\n  rows outside the sample are like those in it\n" in report
    assert "\nsay row 000\n" in report


def test_table_without_rows_that_work(report_of):
    report = report_of([{"text": None}])
    assert "prompt tokens: none\n" in report
    assert "tokens in all: 0 prompt tokens, 0 of them to compute, and 0 completion" in report
