"""The benchmark of GPUs, tried on the CPU with tiny models: only the card is unproven here."""

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import pytest

from beam_gemma.model.artifact import Artifact
from benchmarks.floors import Rates
from benchmarks.gpu import compare, models, rows, systems, work
from benchmarks.gpu.compare import SMOKE_SIZES, Bench, Line, in_turn, report
from benchmarks.gpu.work import FULL_SCALE, SMOKE, Job
from tests.doubles.cuda_models import exported

CARD = {"card": "abacus", "operations_per_sec": 2e12, "bytes_per_sec": 1e12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where models are made once."""
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def job_of(folder: Path):
    bench = Bench(compare.parse(smoke_flags(folder)), until=time.monotonic() + 1000)
    bench.card = CARD
    return bench._job


def smoke_flags(folder: Path, *more: str) -> list[str]:
    return ["--smoke", "--folder", str(folder), "--output", str(folder / "out.json"), *more]


def test_from_command_to_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every case, in processes of their own; of the other systems one, since they take long."""
    systems = ("engine", "engine, scores", "embedder", "transformers forward", "vLLM")
    asked = [word for system in systems for word in ("--systems", system)]
    assert compare.main(smoke_flags(folder, *asked)) == 0
    figures = json.loads((folder / "out.json").read_text())
    lines = {(line["case"], line["system"]): line for line in figures["lines"]}
    assert list(lines) == [
        ("tiny", "engine"),
        ("tiny", "vLLM"),
        ("classify", "engine, scores"),
        ("classify", "transformers forward"),
        ("embed", "embedder"),
    ]
    assert lines.pop(("tiny", "vLLM"))["left_out"] == "not installed"
    for line in lines.values():
        assert 0 < line["answer"]["seconds"] < line["answer"]["startup_secs"] + 60
        assert line["floor_secs"] > 0
    ours = lines["tiny", "engine"]["answer"]
    assert 0 < ours["decode_secs"] < ours["seconds"]
    assert ours["decode_steps"] >= 11 - 1
    assert figures["card"]["operations_per_sec"] > 1e9
    text = capsys.readouterr().out
    assert text.startswith("cpu: one large product ")
    assert "vLLM: not installed" in text


@pytest.mark.parametrize(
    ("case", "system"),
    [
        ("tiny", "transformers generate"),
        ("tiny", "transformers generate_batch"),
        ("embed", "transformers embed"),
    ],
)
def test_other_systems_do_the_work(case: str, system: str, job_of) -> None:
    answer = systems.SYSTEMS[system](job_of(case)[0])
    assert answer["seconds"] > 0


def test_the_work_is_what_the_issue_says() -> None:
    prompts, new = work.completions(1000, FULL_SCALE)
    assert len(prompts) == len(new) == 256
    for lengths in (list(map(len, prompts)), new):
        assert 100 <= min(lengths) < 120
        assert 1000 < max(lengths) <= 1024
    assert (prompts, new) == work.completions(1000, FULL_SCALE)
    prompts, labels = work.classifications(1000, FULL_SCALE)
    assert len(prompts) == 2000
    assert len(set(labels)) == 3
    assert len({tuple(ids[:512]) for ids in prompts}) == 1
    assert len({tuple(ids[512:]) for ids in prompts}) == 2000
    lengths = [len(ids) for ids in work.texts(1000, FULL_SCALE)]
    assert np.median(lengths) == pytest.approx(128, rel=0.05)
    assert min(map(min, prompts)) >= 3


def test_a_job_survives_the_way_between_processes(job_of) -> None:
    job, _ = job_of("classify")
    assert Job.from_json(json.loads(json.dumps(dataclasses.asdict(job)))) == job


def test_models_have_numbers_in_them_and_are_kept(folder: Path) -> None:
    options = {"device": "cpu", "task": "embed", "precision": "fp32"}
    model = models.ready(SMOKE_SIZES[1], folder / "embed", **options)
    manifest = (model / "manifest.json").stat().st_mtime_ns
    entries = Artifact.open(model).files
    (name,) = [n for n, entry in entries.items() if entry.sha256 is None and "Dense" not in n][:1]
    numbers = np.fromfile(model / name, np.float32, offset=models.header_bytes(model / name))
    assert 0.01 < numbers.std() < 0.03
    (model / name).unlink()
    again = models.ready(SMOKE_SIZES[1], folder / "embed", **options)
    assert (again / "manifest.json").stat().st_mtime_ns == manifest
    numbers = np.fromfile(model / name, np.float32)
    assert 0.01 < numbers.std() < 0.03
    assert numbers.nbytes == entries[name].num_bytes


def test_bfloat16_is_the_upper_half(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(20_001))
    models.fill(file, 1, "bfloat16")
    halves = np.frombuffer(file.read_bytes()[1:], np.uint16).astype(np.uint32) << 16
    assert 0.018 < halves.view(np.float32).std() < 0.022
    assert file.stat().st_size == 20_001


def test_ours_come_first_of_all_cases() -> None:
    pairs = in_turn(compare.CASES, None)
    assert pairs[:5] == [
        ["270M", "engine"],
        ["1B", "engine"],
        ["4B", "engine"],
        ["classify", "engine, scores"],
        ["embed", "embedder"],
    ]
    assert pairs[-1] == ["4B", "transformers generate"]
    assert len(pairs) == 3 * 4 + 2 + 2
    assert in_turn(compare.CASES, ["vLLM"]) == [[case, "vLLM"] for case in ("270M", "1B", "4B")]


def test_what_does_not_fit_into_the_time_is_left_out(folder: Path, job_of) -> None:
    bench = Bench(compare.parse(smoke_flags(folder)), until=time.monotonic() + 5)
    assert bench.line("tiny", "engine").left_out == "no time was left"
    job, line = job_of("tiny")
    bench = Bench(compare.parse(smoke_flags(folder)), until=time.monotonic() + 0.2)
    stopped = bench._run(job, dataclasses.replace(line, system="engine"))
    assert stopped.left_out == "stopped after 0 s"
    broken = dataclasses.replace(job, model="nowhere")
    bench = Bench(compare.parse(smoke_flags(folder)), until=time.monotonic() + 100)
    failed = bench._run(broken, dataclasses.replace(line, system="engine"))
    assert failed.left_out.startswith("failed: ")
    assert "nowhere" in failed.left_out


def test_the_table_compares_with_the_floor_and_with_ours() -> None:
    line = Line(
        case="1B", system="engine", rows=100, tokens=5000, floor_secs=6.0, decode_floor_secs=4.0,
        answer={"startup_secs": 3.0, "seconds": 10.0, "decode_secs": 8.0},
    )  # fmt: skip
    answer = {"startup_secs": 3.0, "seconds": 55.0}
    theirs = dataclasses.replace(line, system="transformers generate_batch", answer=answer)
    other = Line(case="1B", system="vLLM", left_out="not installed")
    lines = report(CARD, [line, theirs, other]).splitlines()
    assert lines[0] == ("abacus: one large product 2 TFLOP/s, a copy 1 TB/s read and written")
    cells = [[cell.strip() for cell in text.split("|")[1:-1]] for text in lines[4:]]
    assert cells[0] == [
        "1B", "engine", "3.0", "10.00", "10.0", "500", "6", "0.60", "0.50", ""
    ]  # fmt: skip
    assert cells[1][-3:] == ["0.11", "", "5.5 x"]
    assert cells[2][:3] == ["1B", "vLLM: not installed", ""]


def test_the_floor_of_a_case_is_that_of_its_work(job_of) -> None:
    _, line = job_of("tiny")
    config = SMOKE_SIZES[0].config
    prompts, new = work.completions(config.vocab_size, SMOKE)
    rows = list(zip(map(len, prompts), new, strict=True))
    rates = Rates(operations_per_sec=2e12, bytes_per_sec=1e12)
    floor = compare.generate_floor(config, rows, slots=4, precision="fp32", rates=rates)
    assert (line.floor_secs, line.decode_floor_secs) == (floor.seconds, floor.decode)
    assert line.tokens == sum(new)


@pytest.fixture
def rows_flags() -> list[str]:
    """Flags for a model of two layers on the CPU."""
    model = exported("gemma3_text", "cpu", "fp32", ("generate",))
    return ["--model", str(model.path), "--device", "cpu"]


def test_rows_do_not_differ_with_their_company(
    rows_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the CPU, with few rows: that the command finds out what it says."""
    output = tmp_path / "rows.json"
    flags = [*rows_flags, "--rows", "10", "--slots", "10"]
    assert rows.main([*flags, "--output", str(output)]) == 0
    results = {result["run"]: result for result in json.loads(output.read_text())}
    assert list(results) == ["all at once", "each alone", "shuffled", "pushed out"]
    assert [r["differ"] for r in results.values()] == [0, 0, 0, 0]
    assert results["pushed out"]["preemptions"] > 0
    assert "pushed out" in capsys.readouterr().out


def test_rows_that_differ_are_counted(
    rows_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits = iter(range(1000))
    monkeypatch.setattr(rows, "outcome", lambda completion: (completion.token_ids, next(bits)))
    flags = [*rows_flags, "--rows", "3", "--slots", "2"]
    output = tmp_path / "rows.json"
    assert rows.main([*flags, "--output", str(output)]) == 1
    assert [r["differ"] for r in json.loads(output.read_text())] == [0, 3, 3, 3]
