"""Flags: complete help, nothing unknown, values where they belong."""

import re

import pytest
from apache_beam.options.pipeline_options import (
    PipelineOptions,
    PrismRunnerOptions,
    StandardOptions,
    WorkerOptions,
)

from beam_gemma.errors import OptionsError
from beam_gemma.flags import in_one_process, is_local, parse
from beam_gemma.generate import GenerateSettings
from beam_gemma.generate_options import generate_parser, generate_settings
from beam_gemma.sampling import SamplingParams

FILES = ["--model=m", "--input=a.jsonl", "--output=b.jsonl"]


def settings_of(*flags):
    return generate_settings(parse(generate_parser(), [*FILES, *flags])[0])


def test_defaults_are_those_of_the_settings():
    assert settings_of("--prompt=x") == GenerateSettings(prompt="x")


def test_every_setting_has_a_flag(tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("own template")
    assert settings_of(
        "--messages_column", "chat", "--system", "be kind", "--prompt_format", "chat",
        "--chat_template", str(template), "--allow_special_tokens", "--max_prompt_tokens", "9",
        "--truncate", "right", "--max_tokens", "5", "--temperature", "0.5", "--top_k", "3",
        "--top_p", "0.9", "--seed", "8", "--stop", "a b", "--stop=--", "--ignore_eos",
        "--key_column", "id", "--logprob", "--token_ids",
    ) == GenerateSettings(
        messages_column="chat",
        system="be kind",
        prompt_format="chat",
        chat_template="own template",
        allow_special_tokens=True,
        max_prompt_tokens=9,
        truncate="right",
        sampling=SamplingParams(
            max_tokens=5, temperature=0.5, top_k=3, top_p=0.9, seed=8, ignore_eos=True
        ),
        stop=("a b", "--"),
        key_column="id",
        logprob=True,
        token_ids=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_tokenz=5"], "unknown flag --max_tokenz; did you mean --max_tokens?"),
        (["--max_tokenz", "5"], "unknown flag --max_tokenz; did you mean --max_tokens?"),
        (["--runer=DirectRunner"], "unknown flag --runer; did you mean --runner?"),
        (["--max_num_worker=3"], "unknown flag --max_num_worker; did you mean --max_num_workers?"),
        (["--max_tok=5"], "unknown flag --max_tok; did you mean --max_tokens?"),
        (["--qqqqqqqqq"], "unknown flag --qqqqqqqqq"),
        (["stray"], "'stray': expected a flag before it, got none"),
        (["--max_tokens=many"], "argument --max_tokens: invalid int value: 'many'"),
        (["--limit=0"], "argument --limit: expected a whole number from 1, got '0'"),
        (["--num_shards=-1"], "argument --num_shards: expected a whole number from 0, got '-1'"),
        (["--num_workers=x"], "argument --num_workers: invalid int value: 'x'"),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises(OptionsError) as caught:
        parse(generate_parser(), [*FILES, *flags])
    assert str(caught.value) == message


def test_misspelt_required_flag_is_called_unknown_rather_than_missing():
    with pytest.raises(OptionsError, match="unknown flag --modle; did you mean --model"):
        parse(generate_parser(), ["--modle=m", "--input=a", "--output=b"])
    with pytest.raises(OptionsError, match="required: --model"):
        parse(generate_parser(), ["--input=a", "--output=b"])


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ([], "expected one of --prompt, .* and --prefix_column"),
        (["--prompt=x", "--prompt_column=y"], "one source"),
        (["--prompt=x", "--stop="], "stop: expected texts that are not empty"),
        (["--prompt=x", "--max_tokens=0"], "max_tokens: expected at least 1"),
        (["--prompt=x", "--top_p=0"], "top_p"),
        (["--prompt=x", "--chat_template=none.jinja"], "--chat_template none.jinja"),
    ],
)
def test_bad_settings(flags, match):
    with pytest.raises(OptionsError, match=match):
        settings_of(*flags)


def test_other_flags_go_to_beam():
    _, options = parse(
        generate_parser(), [*FILES, "--runner=DataflowRunner", "--max_num_workers", "3"]
    )
    assert options.view_as(WorkerOptions).max_num_workers == 3
    assert options.view_as(StandardOptions).runner == "DataflowRunner"
    assert not is_local(options)
    assert options.view_as(PrismRunnerOptions).prism_location is None


@pytest.mark.parametrize("flags", [[], ["--runner=DirectRunner"]])
def test_local_runs_choose_the_engine_in_this_process(flags):
    _, options = parse(generate_parser(), [*FILES, *flags])
    assert is_local(options)
    assert options.view_as(PrismRunnerOptions).prism_location == "/nonexistent"
    _, options = parse(generate_parser(), [*FILES, *flags, "--prism_location=here"])
    assert options.view_as(PrismRunnerOptions).prism_location == "here"


def test_our_flags_are_not_beams():
    _, options = parse(generate_parser(), [*FILES, "--prompt=my words"])
    assert "my words" not in str(options.get_all_options())
    known = set(PipelineOptions([]).get_all_options())
    ours = {action.dest for action in generate_parser()._actions} - {"help"}
    # Beam has one of this name for tests of its runners; ours comes first.
    assert ours & known == {"dry_run"}


def test_every_help_line_ends_with_its_default():
    for action in generate_parser()._actions:
        assert action.help
        text = action.help.replace("%(default)s", str(action.default))
        if not action.required and action.dest != "help":
            assert re.search(r"\(default: [^()]+\)$", text), action.dest
        if action.nargs != 0 and not action.choices:
            assert action.metavar, action.dest


def test_help_has_groups_and_examples_of_known_flags():
    text = generate_parser().format_help()
    for group in ("input and output", "prompt", "sampling", "engine", "job", "examples"):
        assert f"\n{group}:\n" in text
    examples = text.partition("examples:")[2].partition("Any other")[0]
    used = set(re.findall(r"--\w+", examples))
    assert len(re.findall("python -m pipelines.generate", examples)) == 2
    assert used <= set(generate_parser()._option_string_actions)


@pytest.mark.parametrize(
    ("flags", "one"),
    [
        ([], True),
        (["--direct_running_mode=multi_threading", "--direct_num_workers=3"], True),
        (["--direct_running_mode=multi_processing", "--direct_num_workers=3"], False),
        (["--runner=DataflowRunner"], False),
    ],
)
def test_processes_of_a_job(flags, one):
    _, options = parse(generate_parser(), [*FILES, "--prompt=x", *flags])
    assert in_one_process(options) is one
