"""Flags: complete help, nothing unknown, values where they belong."""

import json
import re

import pytest
from apache_beam.options.pipeline_options import (
    GoogleCloudOptions,
    PipelineOptions,
    PrismRunnerOptions,
    StandardOptions,
    WorkerOptions,
)

from beam_gemma.cli.classify_flags import classify_parser
from beam_gemma.cli.flags import in_one_process, is_local, parse
from beam_gemma.cli.generate_flags import generate_parser, generate_settings
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.errors import OptionsError
from beam_gemma.structured.output import StructuredOutput
from beam_gemma.tasks.generate import GenerateSettings

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
        "--key_column", "id", "--logprob", "--token_ids", "--decoder_prompt", "{a}:",
    ) == GenerateSettings(
        messages_column="chat",
        decoder_prompt="{a}:",
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


def test_structured_output(tmp_path):
    schema = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "boolean"}}}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    (tmp_path / "choices.txt").write_text("very good\nnot so, good\n")
    asked = {
        ("--json_schema", str(tmp_path / "schema.json")): {"json_schema": schema},
        ("--choices", "yes,no"): {"choices": ("yes", "no")},
        ("--choices_file", str(tmp_path / "choices.txt")): {
            "choices": ("very good", "not so, good")
        },
        ("--regex", "[0-9]+"): {"regex": "[0-9]+"},
    }
    for flags, fields in asked.items():
        assert settings_of("--prompt=x", *flags).structured == StructuredOutput(**fields)
    flags, fields = next(iter(asked.items()))
    settings = settings_of("--prompt=x", *flags, "--flatten", "--completion")
    assert settings.structured == StructuredOutput(**fields, flatten=True, completion=True)
    assert settings.result_schema.names[:3] == ["b", "a", "completion"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"type": "string"', "--json_schema PATH: expected a JSON Schema, got an error: "),
        (b'{"type": "string", "type": "null"}', "the name 'type' is twice in an object"),
        (b'["string"]', "--json_schema PATH: expected an object of JSON, got a list"),
        (b"\xff", "--json_schema PATH: expected a text file that can be read, got an error: "),
        (b'{"type": "object"}', "json_schema: #: expected "),
        (b'{"type": "string", "minLenght": 1}', "did you mean minLength?"),
    ],
)
def test_bad_schemas(tmp_path, content, message):
    path = tmp_path / "schema.json"
    path.write_bytes(content)
    with pytest.raises(OptionsError) as caught:
        settings_of("--prompt=x", f"--json_schema={path}")
    assert message in str(caught.value).replace(str(path), "PATH")


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
        (["--prompt=x", "--choices=a,b", "--regex=a"], "got --choices and --regex"),
        (["--prompt=x", "--choices=a,b", "--choices_file=f"], "and --choices_file"),
        (["--prompt=x", "--choices="], "choices: expected texts that are not empty"),
        (["--prompt=x", "--choices=a, b"], "no space .* got ' b'; write .* --choices_file"),
        (["--prompt=x", "--choices=a,a"], "choices: expected each text once"),
        (["--prompt=x", "--choices_file=none.txt"], "--choices_file none.txt"),
        (["--prompt=x", "--choices_file=/dev/null"], "--choices_file /dev/null: .* got none"),
        (["--prompt=x", "--json_schema=none.json"], "--json_schema none.json"),
        (["--prompt=x", "--flatten"], "--flatten: expected --json_schema"),
        (["--prompt=x", "--regex=a", "--completion"], "completion: expected a json_schema"),
        (["--prompt=x", "--regex=a", "--stop=b"], "stop: expected none beside structured output"),
        (["--prompt=x", "--regex=a", "--ignore_eos"], "ignore_eos: expected none"),
        (["--prompt=x", "--regex=(a"], "regex: "),
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


def test_labels_of_a_job_are_no_classes():
    """The launcher of a template labels a job by a flag that classify has too."""
    of_job = '{\n   "team" : "a"\n}\n'
    argv = [*FILES, "--labels=a,b", f"--labels={of_job}"]
    for order in (argv, argv[::-1]):
        flags, options = parse(classify_parser(), order)
        assert flags.labels == "a,b"
        assert options.view_as(GoogleCloudOptions).labels == [of_job]


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
    assert len(re.findall("python -m pipelines.generate", examples)) == 4
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


@pytest.mark.parametrize(
    ("flags", "is_on"),
    [
        (["--logprob"], True),
        (["--logprob=true"], True),
        (["--logprob", "--max_tokens=3"], True),
        (["--logprob=false"], False),
        ([], False),
    ],
)
def test_a_switch_stands_alone_or_has_a_value(flags, is_on):
    """Launchers of templates write the value of every parameter."""
    assert settings_of("--prompt=x", *flags).logprob == is_on


def test_a_switch_has_no_other_values():
    with pytest.raises(OptionsError, match=re.escape("expected true or false, got 'yes'")):
        settings_of("--prompt=x", "--logprob=yes")
