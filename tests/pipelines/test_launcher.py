"""Jobs of Flex Templates: what a launcher asks for, and that workers of their own can run it."""

import functools
import json
import os
import re
import subprocess
import sys

import pytest
from apache_beam.io.filesystems import FileSystems
from google.cloud import bigquery

from beam_gemma.cli import run as cli
from beam_gemma.storage import delete_folder
from pipelines import classify, embed, generate
from tests.doubles.dataflow_service import Job, dataflow_service
from tests.doubles.locked_environment import Image, locked_python
from tests.doubles.worker_pool import run_submitted, worker_pool

# The first test makes an environment, which takes a minute or five.
pytestmark = pytest.mark.timeout(1200)
TASKS = {
    "generate": (generate, {"prompt": "in short: {text}", "max_tokens": "4", "logprob": "true"}),
    "classify": (classify, {"prompt": "{text}: ", "logliks": "true"}),
    "embed": (embed, {"text_column": "text", "truncate": "true", "verbose": "false"}),
}
JOB_LABELS = {"goog-dataflow-provided-template-type": "flex"}


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """What the launcher's image holds."""
    return Image.build(tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="module")
def table(gcp):
    """A table of short texts."""
    return gcp.fill("launched", "x AS id, CONCAT('text ', x) AS text", 30)


@pytest.fixture(scope="module")
def settings_of(request, gcp, table):
    """Return what a task's job is to do, as names and values."""

    @functools.cache
    def settings(task):
        if task == "embed":
            _, artifact = request.getfixturevalue("two_sided")
        else:
            artifact = request.getfixturevalue("tiny_gemma3").artifact
        model = f"{gcp.bucket}/launched/{task}"
        gcp.upload(artifact.path, model)
        return {
            **TASKS[task][1], "model": model, "input": table,
            "temp_location": f"{gcp.bucket}/tmp", "beam_plugins": "tests.doubles.cloud_clients",
        }  # fmt: skip

    return settings


def flags_of(values):
    return [f"--{name}={value}" for name, value in values.items()]


def on_dataflow(gcp, name):
    """Return the settings of a launch."""
    return {
        "output": gcp.table(name), "project": gcp.project, "region": "us-central1",
        "staging_location": f"{gcp.bucket}/staging", "job_name": name.replace("_", "-"),
    }  # fmt: skip


def run_here(task, flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [task, *flags])
        assert cli.exit_code(TASKS[task][0].main) == cli.SUCCESS


def submitted(task, flags):
    """Submit a job from this process; return it."""
    with dataflow_service() as service:
        run_here(task, [*flags, *service.flags])
    (job,) = service.jobs
    return job


def launched(image, task, flags, place, folder):
    """Run the launcher's command; return the job that it leaves for Dataflow to take."""
    # Flags come in any order, since the launcher has them in a map.
    command = [image.python, image.template / f"pipelines/{task}.py", *reversed(flags)]
    environment = {**os.environ, "PYTHONPATH": str(image.packages)}
    with dataflow_service() as service:
        done = subprocess.run(
            [*command, *service.flags, f"--template_location={place}"],
            cwd=folder, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    # Dataflow takes the job from its place, and nobody waits for it.
    assert service.requests == []
    with FileSystems.open(place) as stream:
        return Job(json.loads(stream.read()))


@pytest.fixture(scope="module", params=TASKS)
def both_ways(request, gcp, image, settings_of, tmp_path_factory):
    """A task, and its job as launched from a template and as submitted from here."""
    task = request.param
    values = {**settings_of(task), **on_dataflow(gcp, f"launched_{task}")}
    values |= {"sdk_container_image": "worker:1", "labels": json.dumps(JOB_LABELS, indent=3)}
    # Classes are labels too.
    flags = [*flags_of(values), *(["--labels=a,b"] if task == "classify" else [])]
    place = f"{gcp.bucket}/staging/template_launches/{task}/job_object"
    direct = submitted(task, flags)
    # That job never runs; as nobody here can tell, it would hold the output.
    table = values["output"].removeprefix("bq://")
    delete_folder(f"{gcp.bucket}/tmp/beam-gemma/{table}.work")
    job = launched(image, task, flags, place, tmp_path_factory.mktemp(task))
    return task, job, direct


def settled(job):
    """Return what a job asks for, without what differs each time or between the two ways."""
    name = job.body["name"]
    text = re.sub(rf"{name}\.\d+\.\d+", name, json.dumps(job.body))
    body = json.loads(re.sub(r"http://localhost:\d+", "service", text))
    settings = body["environment"]["sdkPipelineOptions"]
    for fields, names in (
        (body, ("clientRequestId", "type")),
        (settings["options"], ("pipelineProtoHash", "template_location")),
    ):
        for name in names:
            fields.pop(name, None)
    # Beam keeps these in a set, and with them the file systems of test modules that are imported.
    plugins = settings["options"]["beam_plugins"]
    settings["options"]["beam_plugins"] = sorted(p for p in plugins if not p.startswith("tests."))
    left_out = ("beam_plugins", "template_location")
    shown = settings["display_data"]
    settings["display_data"] = [item for item in shown if item["key"] not in left_out]
    return body


def graph(job):
    """Return the pipeline without its pickled functions, which name files of their side."""
    components = job.pipeline().components
    for environment in components.environments.values():
        for artifact in environment.dependencies:
            artifact.type_payload = b""  # a place with the time in its name
    for transform in components.transforms.values():
        transform.spec.payload = b""
        transform.annotations.clear()
    return components


def rows_of(name):
    rows = bigquery.Client().query_and_wait(f"SELECT * FROM dataset.{name} ORDER BY id")
    return [dict(row) for row in rows]


@pytest.fixture(scope="module")
def rows_here(gcp, settings_of):
    """Return the rows that a task has when it runs in this process."""

    @functools.cache
    def rows(task):
        flags = flags_of({**settings_of(task), "output": gcp.table(f"here_{task}")})
        run_here(task, [*flags, *(["--labels=a,b"] if task == "classify" else [])])
        return rows_of(f"here_{task}")

    return rows


def test_a_launcher_asks_for_the_job_of_a_direct_submission(both_ways):
    _, job, direct = both_ways
    assert settled(job) == settled(direct)
    assert graph(job) == graph(direct)
    assert job.body["labels"] == JOB_LABELS
    assert set(job.staged) == {"submission_environment_dependencies.txt"}


def test_the_launched_job_runs_in_workers_of_the_image(both_ways, image, rows_here, tmp_path):
    task, job, _ = both_ways
    with worker_pool(image.python, tmp_path, image.packages) as pool:
        run_submitted(job, pool)
    assert rows_of(f"launched_{task}") == rows_here(task)


def test_without_an_image_a_job_runs_with_what_it_takes_along(
    gcp, settings_of, rows_here, tmp_path
):
    values = {**settings_of("generate"), **on_dataflow(gcp, "taken_along")}
    job = submitted("generate", flags_of(values))
    with worker_pool(locked_python(), tmp_path) as pool:
        with pytest.raises(RuntimeError, match="No module named 'beam_gemma'"):
            run_submitted(job, pool, without=".whl")
        run_submitted(job, pool)
    assert rows_of("taken_along") == rows_here("generate")
