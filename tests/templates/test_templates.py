"""The forms of the Flex Templates: as the flags are, by the published rules, and back to flags."""

import functools
import subprocess

import pytest
from apache_beam.options.pipeline_options import WorkerOptions
from hypothesis import given
from hypothesis import strategies as st

from beam_gemma.cli.flags import parse
from beam_gemma.errors import OptionsError
from templates.metadata import FOLDER, PARSERS, WORKER_IMAGE, metadata, write

# TemplateMetadata and ParameterMetadata of the Dataflow API, v1b3.
TEMPLATE_KEYS = {
    "name", "description", "parameters", "streaming", "supportsAtLeastOnce",
    "supportsExactlyOnce", "defaultStreamingMode", "yamlDefinition",
}  # fmt: skip
PARAMETER_KEYS = {
    "name": str, "label": str, "helpText": str, "isOptional": bool, "regexes": list,
    "paramType": str, "defaultValue": str, "enumOptions": list, "groupName": str,
    "parentName": str, "parentTriggerValues": list, "hiddenUi": bool, "customMetadata": dict,
}  # fmt: skip
PARAM_TYPES = {
    "DEFAULT", "TEXT", "GCS_READ_BUCKET", "GCS_WRITE_BUCKET", "GCS_READ_FILE", "GCS_WRITE_FILE",
    "GCS_READ_FOLDER", "GCS_WRITE_FOLDER", "PUBSUB_TOPIC", "PUBSUB_SUBSCRIPTION", "BIGQUERY_TABLE",
    "JAVASCRIPT_UDF_FILE", "SERVICE_ACCOUNT", "MACHINE_TYPE", "KMS_KEY_NAME", "WORKER_REGION",
    "WORKER_ZONE", "BOOLEAN", "ENUM", "NUMBER", "KAFKA_TOPIC", "KAFKA_READ_TOPIC",
    "KAFKA_WRITE_TOPIC",
}  # fmt: skip
REQUIRED = {"model": "gs://b/m", "output": "gs://b/o.parquet", "input": "gs://b/i.parquet"}
NUMBERS = ("0", "1", "-1", "7", "64", "0.5", "1.5", "1.0", "0.0", "-0.25", "00", "1e3")
NOT_VALUES = ("", "x", "+", "1 2", "0,5")
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)
"""What a command line can hold."""


def parameters(task):
    return {parameter["name"]: parameter for parameter in metadata(task)["parameters"]}


@functools.cache
def matches(pattern, value):
    """Return whether a value matches as Dataflow would have it: by POSIX's extended patterns."""
    grep = subprocess.run(["grep", "-qE", pattern], input=value + "\n", text=True, check=False)
    assert grep.returncode in (0, 1), f"{pattern} is no pattern"
    return grep.returncode == 0


def is_allowed(parameter, value):
    if options := parameter.get("enumOptions"):
        return value in [option["value"] for option in options]
    return all(matches(pattern, value) for pattern in parameter.get("regexes", ()))


def flags_of(task, values):
    """Return the flags that a launch with these parameters gives."""
    others = {k: v for k, v in REQUIRED.items() if not (k == "input" and "query" in values)}
    return PARSERS[task]().parse_args([f"--{k}={v}" for k, v in (others | values).items()])


def examples(parameter):
    """Return values that a form allows, and what their flag makes of them."""
    options = [option["value"] for option in parameter.get("enumOptions", ())]
    match parameter["paramType"]:
        case "ENUM":
            kind = int if parameter["name"] == "image_tokens" else str
            found = {option: kind(option) for option in options}
        case "BOOLEAN":
            found = {"true": True, "false": False}
        case "NUMBER":
            found = {text: float(text) for text in NUMBERS if is_allowed(parameter, text)}
        case _ if parameter["name"] == "cudagraph_capture_sizes":
            found = {"8,64": (8, 64)}
            assert not any(is_allowed(parameter, text) for text in ("", "0,1", "1,", "a"))
            assert is_allowed(parameter, "8,64")
        case _:
            found = {text: text for text in ("gs://b/a b/c", "gs://b/{x}=1", "gs://b/--x")}
    return found


def test_the_files_are_what_the_flags_make_of_them(tmp_path):
    for file in write(tmp_path):
        written = (FOLDER / file.name).read_text()
        assert written == file.read_text(), "flags have changed: python -m templates.metadata"


@pytest.mark.parametrize("task", PARSERS)
def test_every_flag_is_a_parameter(task):
    flags = {action.dest: action for action in PARSERS[task]()._actions if action.dest != "help"}
    names = [parameter["name"] for parameter in metadata(task)["parameters"]]
    assert names == [*flags, WORKER_IMAGE["name"]]
    required = {name for name, action in flags.items() if action.required}
    given = {name for name, found in parameters(task).items() if not found["isOptional"]}
    assert given == required | {WORKER_IMAGE["name"]}


@pytest.mark.parametrize("task", PARSERS)
def test_templates_keep_the_published_rules(task):
    found = metadata(task)
    assert found["name"]
    assert found.keys() <= TEMPLATE_KEYS
    for parameter in found["parameters"]:
        assert all(parameter[key] for key in ("name", "label", "helpText", "groupName"))
        for key, value in parameter.items():
            assert isinstance(value, PARAMETER_KEYS[key]), (parameter["name"], key)
        assert parameter["paramType"] in PARAM_TYPES
        assert ("enumOptions" in parameter) == (parameter["paramType"] == "ENUM")
        for option in parameter.get("enumOptions", ()):
            assert option.keys() == {"value", "label"}
        for pattern in parameter.get("regexes", ()):
            assert (pattern[0], pattern[-1]) == ("^", "$")  # a part of a value is not enough
        if "defaultValue" in parameter:
            assert parameter["isOptional"]
            assert is_allowed(parameter, parameter["defaultValue"]), parameter["name"]


@pytest.mark.parametrize("task", PARSERS)
def test_the_defaults_of_a_form_change_nothing(task):
    defaults = {k: p["defaultValue"] for k, p in parameters(task).items() if "defaultValue" in p}
    assert len(defaults) > 5
    assert flags_of(task, defaults) == flags_of(task, {})


@pytest.mark.parametrize("task", PARSERS)
def test_each_parameter_reaches_its_flag_and_no_other(task):
    before = vars(flags_of(task, {}))
    for name, parameter in parameters(task).items():
        if parameter == WORKER_IMAGE:
            continue
        for text, value in examples(parameter).items():
            after = vars(flags_of(task, {name: text}))
            assert after[name] in (value, [value], (value,)), (name, text)
            others = before.keys() - {name, "input"}
            assert {k: after[k] for k in others} == {k: before[k] for k in others}, name


@given(TEXTS)
def test_any_text_arrives_as_it_is(text):
    flags = flags_of("generate", {"prompt": text, "stop": text})
    assert (flags.prompt, flags.stop) == (text, [text])


@pytest.mark.parametrize("task", PARSERS)
def test_what_a_form_allows_its_flag_takes(task):
    """A form may be stricter than a flag, never more lenient."""
    for name, parameter in parameters(task).items():
        if parameter["paramType"] in ("NUMBER", "BOOLEAN", "ENUM"):
            assert examples(parameter), name
            for text in NOT_VALUES:
                assert not is_allowed(parameter, text), (name, text)
                with pytest.raises(OptionsError):
                    flags_of(task, {name: text})


@pytest.mark.parametrize("task", PARSERS)
def test_places_are_not_on_the_launcher(task):
    places = [
        p for p in parameters(task).values() if any("gs://" in r for r in p.get("regexes", ()))
    ]
    assert {"model", "input", "output", "errors", "report"} <= {p["name"] for p in places}
    for parameter in places:
        assert is_allowed(parameter, "gs://bucket/folder/name.parquet")
        assert not is_allowed(parameter, "out/name.parquet")
        is_table = parameter["name"] in ("input", "output", "errors", "fewshot_file")
        assert is_allowed(parameter, "bq://project.dataset.table") == is_table
        assert parameter["paramType"].startswith("GCS_") == (not is_table)


def test_the_image_of_workers_reaches_beam():
    image = "europe-docker.pkg.dev/project/repository/worker@sha256:0123"
    assert is_allowed(WORKER_IMAGE, image)
    assert not is_allowed(WORKER_IMAGE, "worker")  # of no version
    argv = [f"--{k}={v}" for k, v in {**REQUIRED, "sdk_container_image": image}.items()]
    _, options = parse(PARSERS["embed"](), argv)
    assert options.view_as(WorkerOptions).sdk_container_image == image


def test_a_type_without_a_kind_is_named(monkeypatch):
    parser = PARSERS["embed"]()
    parser.add_argument("--phase", type=complex)
    monkeypatch.setitem(PARSERS, "embed", lambda: parser)
    with pytest.raises(LookupError, match="--phase"):
        metadata("embed")
