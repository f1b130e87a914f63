"""What the benchmarks say of a run, by hand, and that their systems do the same work."""

import dataclasses
import json
import random

import pytest

from beam_gemma.engine.sequence import Completion
from beam_gemma.model.config import GemmaConfig
from beam_gemma.model.markup import Text
from beam_gemma.monitoring.progress import Count
from benchmarks import classify, generate, run_engine, run_transformers
from benchmarks.comparison import Comparison
from benchmarks.conditions import CONDITIONS, base_of, chosen, draw_requests
from benchmarks.invariance import Record
from benchmarks.prefix import Turn, report, requests
from benchmarks.rate import Operations
from benchmarks.runs import Job, Run, Step, Timeline, run_from_json, run_system
from benchmarks.table import table
from benchmarks.workload import REGIMES, Passages, Regime, Row, draw_rows
from tests.conftest import TinyModel
from tests.doubles.fake_models import TOKENIZER
from tests.doubles.reference import logits_of

OPERATIONS = Operations(layers=10, head=5)
STEPS = [Step(2.0, 30, 0), Step(1.0, 10, 3), Step(1.0, 0, 4), Step(3.0, 0, 2)]
SMALL = Regime(name="small", num_rows=6, prompt_tokens=(5, 30), new_tokens=(2, 9))


def run_of(steps, work_secs=7.0, token_ids=((1, 2), (3,)), batch_size=4):
    return Run(
        batch_size=batch_size,
        token_ids=[list(ids) for ids in token_ids],
        steps=steps,
        startup_secs=1.0,
        work_secs=work_secs,
        tail_secs=0.0,
        peak_bytes=10**9,
    )


def comparison_of(regime, **runs):
    return Comparison(regime=regime, runs=runs, operations=OPERATIONS, rate=100.0)


def test_figures_of_a_run() -> None:
    run = run_of(STEPS)
    assert run.prompt_rate == 40 / 3
    assert run.decode_rate == 6 / 4
    assert run.occupancy == 6 / (2 * 4)
    assert run.rows_per_sec == 2 / 7
    assert run.decode_operations_per_sec(OPERATIONS) == 1.5 * 15
    assert run.operations_per_sec(OPERATIONS) == (46 * 10 + 9 * 5) / 7
    assert run.operations_per_sec(OPERATIONS, skip=1) == (16 * 10 + 9 * 5) / 5


def test_operations_are_two_for_each_weight_of_a_matrix(tiny_gemma3: TinyModel) -> None:
    model, config = tiny_gemma3.reference, tiny_gemma3.artifact.config
    assert isinstance(config, GemmaConfig)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    operations = Operations.of(config)
    assert operations.layers == 2 * sum(matrix.numel() for matrix in matrices)
    assert operations.head == 2 * model.get_input_embeddings().weight.numel()


def test_timeline_takes_steps_and_no_rows() -> None:
    timeline = Timeline()
    timeline.add(Count(prompt_tokens=5))
    timeline.restart()
    for count in (Count(prompt_tokens=3, completion_tokens=1), Count(rows=2), Count(rows=1)):
        timeline.add(count)
    timeline.add(Count(completion_tokens=1))
    assert [(s.prompt_tokens, s.new_tokens) for s in timeline.steps] == [(3, 1), (0, 1)]
    assert sum(s.seconds for s in timeline.steps) == pytest.approx(timeline.work_secs, abs=1e-9)


def test_bars_compare_the_best_runs() -> None:
    slow, fast = run_of(STEPS, work_secs=9.0), run_of([Step(1.0, 5, 1), Step(1.0, 0, 6)])
    comparison = comparison_of("fixed", engine=[slow, fast], transformers=[slow])
    bars = {bar.name: bar for bar in comparison.bars()}
    assert set(bars) == {"engine / transformers, new tok/s", "engine, decode, of the matrix rate"}
    assert bars["engine / transformers, new tok/s"].value == 6 / 1.5
    assert bars["engine, decode, of the matrix rate"].value == 6 * 15 / 100
    natural = comparison_of("natural", engine=[fast], transformers=[slow]).bars()
    assert [bar.value for bar in natural] == [pytest.approx(9 / 7, rel=1e-12)]


def test_the_first_step_is_no_steady_state() -> None:
    late = [Step(100.0, 40, 4), Step(2.0, 0, 4)]
    early = [Step(1.0, 40, 4), Step(1.0, 0, 4)]
    [bar] = comparison_of("table", engine=[run_of(early)], pipeline=[run_of(late)]).bars()
    assert bar.value == 0.5


def test_a_line_counts_rows_that_equal_ours() -> None:
    other = run_of(STEPS, token_ids=((1, 2), (4,)))
    lines = comparison_of("fixed", engine=[run_of(STEPS)], transformers=[other]).lines()
    assert "1/2" in lines.splitlines()[3]
    assert "2/2" in lines.splitlines()[2]
    assert "/2" not in comparison_of("fixed", transformers=[other]).lines()


def test_table_aligns_columns() -> None:
    assert table(("a", "bb"), [("long", "1")]) == "| a    | bb |\n| ---- | -: |\n| long |  1 |"


def test_passages_have_exact_lengths_and_are_the_text_they_say() -> None:
    rows = draw_rows(SMALL, TOKENIZER)
    assert rows == draw_rows(SMALL, TOKENIZER)
    assert draw_rows(SMALL, TOKENIZER, 2) == rows[:2]
    for row in rows:
        assert TOKENIZER.encode([Text(row.text)]) == list(row.prompt_token_ids)
    passages = Passages(TOKENIZER, random.Random(1))
    assert [len(passages.draw(n)[1]) for n in range(3, 40)] == list(range(3, 40))


def test_prefix_rows_share_their_prefix_alone() -> None:
    prompts = [request.prompt_token_ids for request in requests(TOKENIZER, 5)]
    assert {len(prompt) for prompt in prompts} == {540}
    assert len({prompt[:500] for prompt in prompts}) == 1
    assert len({prompt[500:] for prompt in prompts}) == 5


def test_prefix_report_compares_best_turns_and_bits() -> None:
    done = Completion(token_ids=(1,), finish_reason="length", logprob=-0.5)
    other = dataclasses.replace(done, logprob=-0.5 - 2**-53)
    on = [Turn(secs=s, num_computed=9, num_reused=8, completions=[done, done]) for s in (3.0, 2.0)]
    off = [Turn(secs=11.0, num_computed=17, num_reused=0, completions=[done, other])]
    text = report(on, off)
    assert "5.50" in text
    assert "| on    |   1.00 |    2.0 |     3.0 |" in text
    assert text.endswith("rows that differ: 1 of 2")


def test_systems_take_part_where_they_can() -> None:
    assert not generate.fits("pipeline", REGIMES["natural"])
    assert generate.fits("pipeline", REGIMES["fixed"])
    assert not generate.fits("transformers", REGIMES["table"])


def test_other_systems_need_the_checkpoint() -> None:
    with pytest.raises(SystemExit):
        generate.parse(["--model", "m", "--systems", "engine,transformers"])
    assert generate.parse(["--model", "m", "--systems", "engine"]).systems == ["engine"]


def test_engine_and_transformers_do_the_same_work(tiny_gemma3: TinyModel) -> None:
    rows = [
        Row(text="", prompt_token_ids=tuple(ids[:n]), max_tokens=m)
        for ids, n, m in zip(tiny_gemma3.sequences, (9, 60, 33), (6, 3, 1), strict=True)
    ]
    job = Job(
        model=str(tiny_gemma3.artifact.path),
        weights=str(tiny_gemma3.checkpoint.path),
        rows=rows,
        batch_size=2,
    )
    ours, theirs = run_engine.run(job), run_transformers.run(job)
    by_new = run_transformers.run(dataclasses.replace(job, sort_by="max_tokens"))
    assert theirs.steps[0].prompt_tokens == 60 + 33
    assert by_new.steps[0].prompt_tokens == 9 + 60
    for run in (ours, theirs, by_new):
        assert run.token_ids == ours.token_ids
        assert [len(ids) for ids in run.token_ids] == [6, 3, 1]
        assert sum(step.prompt_tokens for step in run.steps) == 9 + 60 + 33
        assert sum(step.new_tokens for step in run.steps) == 10
        assert run.startup_secs > 0
        assert run.peak_bytes > 10**8


def test_pipeline_reports_its_steps(tiny_gemma3: TinyModel) -> None:
    rows = [
        Row(text=text, prompt_token_ids=tuple(TOKENIZER.encode([Text(text)])), max_tokens=4)
        for text in ("one", "and another", "three")
    ]
    job = Job(model=str(tiny_gemma3.artifact.path), weights="", rows=rows, batch_size=8)
    run = run_system("benchmarks.run_pipeline", job)
    assert run.token_ids == run_system("benchmarks.run_engine", job).token_ids
    assert sum(step.new_tokens for step in run.steps) == 12
    assert sum(s.prompt_tokens for s in run.steps) == sum(len(r.prompt_token_ids) for r in rows)
    assert run.work_secs > 0 < run.tail_secs


def test_a_system_that_breaks_says_why() -> None:
    with pytest.raises(RuntimeError, match="nowhere"):
        run_system("benchmarks.run_engine", Job(model="nowhere", weights="", rows=[], batch_size=1))


def test_runs_survive_the_way_between_processes() -> None:
    run = run_of(STEPS)
    fields = json.loads(json.dumps(dataclasses.asdict(run)))
    assert run_from_json(fields) == run


def test_conditions_cover_every_row_once() -> None:
    def rows(name: str, num_rows: int = 11, part: int = 0) -> list[int]:
        return chosen(CONDITIONS[name], num_rows, sample=5, part=part)

    both = rows("two-processes") + rows("two-processes", part=1)
    assert sorted(both) == rows("base") == list(range(11))
    assert sorted(rows("shuffled")) == list(range(11)) != rows("shuffled")
    assert len(set(rows("alone"))) == 5
    assert rows("alone", num_rows=4) == list(range(4))
    assert base_of("sampled-shuffled") == "sampled-base"


def test_rows_of_the_record_share_prefixes_and_are_repeatable() -> None:
    rows = draw_requests(TOKENIZER, 60, sampled=True)
    assert rows == draw_requests(TOKENIZER, 60, sampled=True)
    assert len({row.prompt_token_ids[:64] for row in rows[:51:3]}) == 1
    assert len(rows[51].prompt_token_ids) == 539
    assert {row.params.top_k for row in rows} == {0, 40}
    greedy = draw_requests(TOKENIZER, 60, sampled=False)
    assert [row.prompt_token_ids for row in greedy] == [row.prompt_token_ids for row in rows]
    assert {row.params.temperature for row in greedy} == {0.0}


def answer_of(*, differing=0, holds=True):
    outcomes = {str(i): [[i], "length", (0.5).hex()] for i in range(12)}
    for i in range(differing):
        outcomes[str(i)][2] = (0.5 + 2**-53).hex()
    return {
        "outcomes": outcomes, "seconds": 1.0, "preemptions": 0, "cached_tokens": 0, "holds": holds,
    }  # fmt: skip


def test_record_counts_rows_that_differ_in_a_bit(tmp_path) -> None:
    record = Record(tmp_path / "r.json", {"rows": 12})
    record.add("base", answer_of())
    record.add("shuffled", answer_of())
    assert record.is_clean()
    record.add("threads-1", answer_of(differing=3))
    assert not record.is_clean()
    again = Record(tmp_path / "r.json", {"rows": 12})
    assert again.base("base") == answer_of()["outcomes"]
    assert again.lines() == record.lines()
    assert again.lines().splitlines()[-1].split("|")[3].strip() == "3"
    with pytest.raises(ValueError, match="expected a record of"):
        Record(tmp_path / "r.json", {"rows": 13})


def test_record_is_not_clean_if_a_run_was_not_what_it_should_be(tmp_path) -> None:
    record = Record(tmp_path / "r.json", {})
    record.add("base", answer_of(holds=False))
    assert not record.is_clean()


def test_classification_of_padded_batches_is_that_of_rows_alone(tiny_gemma3):
    rng = random.Random(3)
    prompts = [tuple(rng.choices(range(3, 300), k=rng.randrange(2, 60))) for _ in range(9)]
    loop = classify.Loop(tiny_gemma3.checkpoint.path, [40, 50, 60])
    labels = loop.run(prompts, 4)
    assert len(set(labels)) > 1
    for prompt, label in zip(prompts, labels, strict=True):
        logits = logits_of(tiny_gemma3.reference, list(prompt))[-1]
        assert label == int(logits[[40, 50, 60]].argmax())


def test_classification_report_compares_rates_over_the_rows_that_each_had():
    theirs = [classify.Turn(system="theirs", labels=[1, 0], secs=4.0)]
    ours = classify.Turn(system="ours", labels=[1, 1, 1, 0], secs=1.0)
    text = classify.report(theirs, ours, [1, 1, 1, 1])
    assert "| rows/s, ours / transformers |     8.00 | 8.00 | met |" in text
    assert "labels that are equal: 1 of 2" in text
    assert "| ours   |    4 | 1.0 |    4.0 |    0.750 |" in text
