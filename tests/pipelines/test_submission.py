"""Jobs as Dataflow is asked to run them, of all three pipelines, from submission to the request."""

import io
import itertools
import json
import shutil
import sys
import zipfile
from typing import NamedTuple

import pytest
from apache_beam.io.filesystems import FileSystems
from google.cloud.dataflow import WorkerIPAddressConfiguration

import beam_gemma
from beam_gemma.cli import run as cli
from beam_gemma.dataflow.wheel import CHECKOUT, REQUIREMENTS
from beam_gemma.versions import versions
from pipelines import classify, embed, generate
from tests.doubles.dataflow_service import (
    JOB_ID,
    Dataflow,
    accelerators,
    dataflow_service,
    display_of,
    image_of,
)
from tests.doubles.registry import LABELS, serving

pytestmark = pytest.mark.timeout(600)
TEXT = "what a row says and nobody else should see"
PROMPT = "what is asked of a row"
IMAGES = "images-host"
"""In flags, stands for the registry that runs here."""
KEY = "projects/p/locations/l/keyRings/r/cryptoKeys/k"
ACCOUNT = "worker@p.iam.gserviceaccount.com"
GPU = ("--gpu_type=nvidia-l4", f"--sdk_container_image={IMAGES}/team/worker:gpu")
L4 = "type:nvidia-l4;count:1;machine_type:g2-standard-8;install-nvidia-driver:latest"
TASKS = {
    "generate": (generate, "Generate", [f"--prompt={PROMPT}: {{text}}", "--max_tokens=4"]),
    "classify": (classify, "Classify", [f"--prompt={PROMPT}: {{text}}", "--labels=a,b"]),
    "embed": (embed, "Embed", ["--text_column=text", f"--prompt={PROMPT}: "]),
}
NAMES = (f"submitted_{i}" for i in itertools.count())


@pytest.fixture(scope="module")
def table(gcp):
    """A table whose rows all have the same text."""
    return gcp.fill("private", f"x AS id, '{TEXT}' AS text", 10)


@pytest.fixture(scope="module")
def model_of(gcp, tiny_gemma3, two_sided, tmp_path_factory):
    """Put a model on Cloud Storage that says that its graphs are for a device."""

    def model(task, device):
        artifact = two_sided[1] if task == "embed" else tiny_gemma3.artifact
        folder = tmp_path_factory.mktemp("model") / "model"
        shutil.copytree(artifact.path, folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        for signature in manifest["signatures"]:
            signature["device"] = device
        manifest["files"] = {
            name.replace(".cpu.onnx", f".{device}.onnx"): entry
            for name, entry in manifest["files"].items()
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))
        uri = f"{gcp.bucket}/models/{task}-{device}"
        gcp.upload(folder, uri)
        return uri

    return model


@pytest.fixture(scope="module")
def registry():
    """Images for both devices, by the names of these."""
    with serving() as registry:
        for device in ("cpu", "gpu"):
            registry.push(device, {**LABELS, "beam-gemma.device": device})
        yield registry


class Outcome(NamedTuple):
    """What came of a command line."""

    code: int
    out: str
    err: str
    service: Dataflow


@pytest.fixture
def run(gcp, table, model_of, registry, monkeypatch, capsys):
    """Run a task's command line in this process, by default with a model for what it asks for."""

    def run_with(task, *flags, device=None, refusal=None):
        module, _, settings = TASKS[task]
        device = device or ("cuda" if set(GPU) <= set(flags) else "cpu")
        with dataflow_service() as service:
            service.refusal = refusal
            command = [
                module.__name__, *settings, f"--model={model_of(task, device)}",
                f"--input={table}", f"--output={gcp.table(next(NAMES))}",
                f"--project={gcp.project}", "--region=us-central1",
                f"--temp_location={gcp.bucket}/tmp", *service.flags,
                *(flag.replace(IMAGES, registry.host) for flag in flags),
            ]  # fmt: skip
            monkeypatch.setattr(sys, "argv", command)
            code = cli.exit_code(module.main)
        return Outcome(code, *capsys.readouterr(), service)

    return run_with


@pytest.fixture
def submit(run):
    """Submit a job of a task; return it as Dataflow was asked to run it."""

    def submitted(task, *flags):
        code, out, err, service = run(task, *flags)
        assert (code, err) == (cli.SUCCESS, "")
        assert out == f"submitted the job {JOB_ID}\n"
        # Nobody asks how it goes.
        assert [request.method for request in service.requests] == ["POST"]
        (job,) = service.jobs
        return job

    return submitted


@pytest.mark.parametrize("task", TASKS)
def test_a_job_with_gpus(submit, registry, task):
    job = submit(task, *GPU)
    assert "no_use_multiple_sdk_containers" in job.environment["experiments"]
    assert "use_multiple_sdk_containers" not in job.environment["experiments"]
    # These would exclude the hint.
    assert "serviceOptions" not in job.environment
    assert job.workers["numThreadsPerWorker"] == 8
    assert job.workers["diskSizeGb"] == 51
    # The other steps run on machines that Dataflow chooses.
    assert "machineType" not in job.workers
    # The image by what it holds, whatever becomes of its tag.
    image = f"{registry.host}/team/worker@{registry.digest('gpu')}"
    assert {i["containerImage"] for i in job.workers["sdkHarnessContainerImages"]} == {image}
    # Beam's own list, of what is installed here.
    assert list(job.staged) == ["submission_environment_dependencies.txt"]
    pipeline = job.pipeline()
    assert {image_of(e) for e in pipeline.components.environments.values()} == {image}
    asked = accelerators(pipeline)
    assert set(asked.values()) == {L4}
    step = f"{TASKS[task][1]}/Infer/BeamML_RunInference"
    assert step in asked
    assert all(name.startswith(step) for name in asked)


@pytest.mark.parametrize("task", TASKS)
def test_a_job_without_an_image_takes_this_package_along(submit, task):
    job = submit(task)
    assert job.workers["diskSizeGb"] == 31
    assert accelerators(job.pipeline()) == {}
    wheel = f"beam_gemma-{beam_gemma.__version__}-py3-none-any.whl"
    assert {wheel, "requirements.txt", "extra_packages.txt"} <= set(job.staged)
    assert not [name for name in job.staged if name.endswith(".tar.gz")]
    with FileSystems.open(job.staged[wheel]) as stream:
        assert "beam_gemma/cli/plan.py" in zipfile.ZipFile(io.BytesIO(stream.read())).namelist()
    with FileSystems.open(job.staged["requirements.txt"]) as stream:
        assert stream.read() == (CHECKOUT / REQUIREMENTS).read_bytes()


@pytest.mark.parametrize("task", TASKS)
def test_nothing_of_rows_or_prompts_is_in_options_or_on_display(submit, task):
    job = submit(task, *GPU)
    pipeline = job.pipeline()
    steps = {s.unique_name: display_of(s) for s in pipeline.components.transforms.values()}
    step = steps[f"{TASKS[task][1]}/Key"]
    assert (step["task"], step["model"]) == (task, f"gs://bucket/models/{task}-cuda")
    assert {name: step[name] for name in versions()} == versions()
    annotations = [dict(t.annotations) for t in pipeline.components.transforms.values()]
    for told, known in (
        (json.dumps(job.body), job.options["pipelineUrl"]),
        (str(steps), step["model"]),
        (str(annotations), step["model"]),
    ):
        assert known in told
        assert TEXT not in told
        assert PROMPT not in told


def test_what_an_administrator_asks_for_reaches_the_job(submit):
    job = submit(
        "generate", *GPU, "--machine_type=g2-standard-4", "--no_use_public_ips",
        f"--service_account_email={ACCOUNT}", f"--dataflow_kms_key={KEY}",
        "--labels=team=search", "--labels=cost=low", "--max_num_workers=3",
        "--subnetwork=regions/us-central1/subnetworks/s", "--experiments=mine",
    )  # fmt: skip
    assert job.workers["machineType"] == "g2-standard-4"
    private = WorkerIPAddressConfiguration.WORKER_IP_PRIVATE
    assert job.workers["ipConfiguration"] == private
    assert job.workers["subnetwork"] == "regions/us-central1/subnetworks/s"
    assert job.workers["autoscalingSettings"]["maxNumWorkers"] == 3
    assert job.environment["serviceAccountEmail"] == ACCOUNT
    assert job.environment["serviceKmsKeyName"] == KEY
    assert job.body["labels"] == {"team": "search", "cost": "low"}
    assert "mine" in job.environment["experiments"]
    (hint,) = set(accelerators(job.pipeline()).values())
    assert hint == L4.replace("g2-standard-8", "g2-standard-4")


@pytest.mark.parametrize(
    ("task", "flags", "sentence"),
    [
        ("generate", ["--input=pubsub://p/t"], "--input pubsub://p/t: expected a table, which has"),
        (
            "embed",
            ["--input=projects/p/subscriptions/s"],
            "--input projects/p/subscriptions/s: expected a table, which has an end, got a stream",
        ),
        ("classify", GPU[:1], "--sdk_container_image: expected an image with CUDA"),
        (
            "classify",
            [GPU[0], f"--sdk_container_image={IMAGES}/team/worker:cpu"],
            f"--sdk_container_image {IMAGES}/team/worker:cpu: expected an image for the gpu, got",
        ),
    ],
)
def test_what_cannot_work_is_one_sentence_and_no_request(run, registry, task, flags, sentence):
    code, out, err, service = run(task, *flags)
    err = err.replace(registry.host, IMAGES)
    assert (code, out) == (cli.USAGE, "")
    assert err.startswith(f"error: {sentence}")
    assert err.count("\n") == 1
    assert service.requests == []


def test_a_model_without_a_graph_for_the_gpu_is_refused(run):
    code, _, err, service = run("generate", *GPU, device="cpu")
    assert code == cli.USAGE
    assert "export the model again with --tasks generate --device cuda" in err
    assert service.requests == []


def test_a_dry_run_asks_for_no_job(run):
    code, out, _, service = run("generate", *GPU, "--dry_run")
    assert code == cli.SUCCESS
    assert "10" in out.partition("\n")[0]
    assert service.requests == []


def test_a_job_that_dataflow_does_not_take_is_one_sentence(run):
    """Whatever its clients raise."""
    refusal = "the account may not create jobs"
    code, out, err, _ = run(
        "generate", f"--sdk_container_image={IMAGES}/team/worker:cpu", refusal=refusal
    )
    assert (code, out) == (cli.USAGE, "")
    sentence = next(line for line in err.splitlines() if line.startswith("error: "))
    assert sentence.startswith("error: Dataflow: expected the job to be taken, got ")
    assert refusal in sentence
    assert sentence.endswith("; docs/dataflow.md names the roles and settings that it takes")
    assert "Traceback" not in err


def test_a_job_that_dataflow_does_not_take_can_be_submitted_again(run, gcp):
    """It holds no lease of its output."""
    flags = f"--sdk_container_image={IMAGES}/team/worker:cpu", f"--output={gcp.table(next(NAMES))}"
    assert run("generate", *flags, refusal="try again").code == cli.USAGE
    again = run("generate", *flags)
    assert (again.code, again.err) == (cli.SUCCESS, "")
