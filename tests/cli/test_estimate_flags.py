"""Options of the estimate: what flags say goes before what was measured, and nothing is guessed."""

import dataclasses

import pytest

from beam_gemma.cli import estimate_flags
from beam_gemma.cli.classify_flags import classify_parser, classify_settings
from beam_gemma.cli.estimate_flags import check_estimate, means_of
from beam_gemma.cli.flags import parse
from beam_gemma.cli.generate_flags import generate_parser, generate_settings
from beam_gemma.errors import OptionsError
from beam_gemma.inference.handlers import GemmaClassifyModelHandler, GemmaGenerateModelHandler
from beam_gemma.jobs.profiles import profiles
from export.checkpoints.released_sizes import SIZES
from tests.doubles.fakes import fake_signature
from tests.jobs.test_profiles import artifact_of

FILES = ["--model=m", "--input=i.parquet", "--output=o.parquet"]
[CONFIG] = [size.config for size in SIZES if size.name == "Gemma 3 270M"]
ARTIFACT = dataclasses.replace(
    artifact_of(CONFIG),
    signatures={(head, "cpu"): fake_signature(head=head) for head in ("generate", "score")},
)
BOTH = ["--prompt_tokens_per_sec=7", "--completion_tokens_per_sec=3.5"]
PROFILE = profiles()[0]


@pytest.fixture
def means_for(monkeypatch):
    def means_for(*flags, machine=PROFILE.machine, head="generate"):
        monkeypatch.setattr(estimate_flags, "this_machine", lambda: machine)
        if head == "generate":
            parser, asked, settings_of = generate_parser(), [], generate_settings
            handler_of = GemmaGenerateModelHandler
        else:
            parser, asked, settings_of = classify_parser(), ["--labels=a,b"], classify_settings
            handler_of = GemmaClassifyModelHandler
        flags, options = parse(parser, [*FILES, "--prompt=x", "--dry_run", *asked, *flags])
        handler = handler_of("m", settings_of(flags))
        return means_of(flags, options, handler, ARTIFACT, flags.device)

    return means_for


def test_what_was_measured_on_this_machine_is_found(means_for):
    throughput = means_for().throughput
    assert throughput.prompt_tokens_per_sec == PROFILE.prompt_tokens_per_sec
    assert throughput.completion_tokens_per_sec == PROFILE.completion_tokens_per_sec
    assert throughput.origin == PROFILE.origin


def test_flags_go_before_what_was_measured(means_for):
    throughput = means_for(*BOTH).throughput
    assert (throughput.prompt_tokens_per_sec, throughput.completion_tokens_per_sec) == (7, 3.5)
    assert "as given by --prompt_tokens_per_sec and --completion" in throughput.origin
    throughput = means_for(BOTH[0]).throughput
    assert throughput.prompt_tokens_per_sec == 7
    assert throughput.completion_tokens_per_sec == PROFILE.completion_tokens_per_sec
    assert throughput.origin == f"{PROFILE.origin}, but for --prompt_tokens_per_sec"


def test_what_nobody_measured_or_said_is_not_known(means_for):
    throughput = means_for(BOTH[1], machine="another").throughput
    assert throughput.prompt_tokens_per_sec is None
    assert throughput.completion_tokens_per_sec == 3.5
    assert throughput.origin.startswith("throughput is not known")
    assert throughput.origin.endswith("pass what it computes by --prompt_tokens_per_sec")


def test_workers_of_dataflow_are_not_this_machine(means_for):
    means = means_for("--runner=DataflowRunner")
    assert means.num_workers is None
    assert means.throughput.prompt_tokens_per_sec is None


def test_a_task_that_completes_nothing_needs_one_rate(means_for):
    means = means_for(head="score")
    assert means.throughput.completion_tokens_per_sec is None
    assert means.throughput.origin.startswith("throughput as measured")
    assert means.completion_tokens == 0


@pytest.mark.parametrize(
    ("flags", "number"),
    [
        ([], 1),
        (["--runner=DataflowRunner", "--num_workers=3"], 3),
        (["--runner=DataflowRunner", "--num_workers=3", "--max_num_workers=8"], 8),
    ],
)
def test_number_of_workers(means_for, flags, number):
    assert means_for(*flags).num_workers == number


def test_completions_are_as_long_as_they_may_be_unless_told_otherwise(means_for):
    means = means_for("--max_tokens=40")
    assert means.completion_tokens == 40
    assert "--expected_tokens" in means.completion_origin
    means = means_for("--max_tokens=40", "--expected_tokens=6.5", "--worker_price=0.75")
    assert (means.completion_tokens, means.completion_origin) == (6.5, "by --expected_tokens")
    assert means.worker_price == 0.75


@pytest.mark.parametrize("flag", [*BOTH, "--expected_tokens=3", "--worker_price=1"])
def test_flags_of_an_estimate_need_a_dry_run(flag):
    flags, _ = parse(generate_parser(), [*FILES, flag])
    with pytest.raises(OptionsError, match=rf"^{flag.split('=')[0]}: expected --dry_run beside it"):
        check_estimate(flags, 40)
    flags, _ = parse(generate_parser(), [*FILES, flag, "--dry_run=json"])
    check_estimate(flags, 40)


def test_no_more_can_be_expected_than_may_come():
    flags, _ = parse(generate_parser(), [*FILES, "--dry_run", "--expected_tokens=41"])
    with pytest.raises(OptionsError, match="expected at most --max_tokens 40, got 41"):
        check_estimate(flags, 40)
    check_estimate(flags, 41)


@pytest.mark.parametrize("value", ["0", "-1", "inf", "nan", "x"])
def test_rates_and_prices_are_numbers_above_0(value):
    with pytest.raises(OptionsError, match="expected a number above 0"):
        parse(generate_parser(), [*FILES, "--dry_run", f"--worker_price={value}"])
