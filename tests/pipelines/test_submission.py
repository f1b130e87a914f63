"""Jobs as Dataflow is asked to run them, of all three pipelines, from submission to the request."""

import itertools
import json
import shutil
import sys

import pytest
from google.cloud import bigquery

from beam_gemma import launch
from pipelines import classify, embed, generate
from tests.dataflow_service import accelerators, dataflow_service, image_of

pytestmark = pytest.mark.timeout(240)
TEXT = "what a row says and nobody else should see"
PROMPT = "what is asked of a row"
IMAGE = "europe-docker.pkg.dev/p/r/worker@sha256:0123"
KEY = "projects/p/locations/l/keyRings/r/cryptoKeys/k"
ACCOUNT = "worker@p.iam.gserviceaccount.com"
GPU = ("--gpu_type=nvidia-l4", f"--sdk_container_image={IMAGE}")
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
    bigquery.Client().query_and_wait(
        f"CREATE TABLE {gcp.dataset}.private AS SELECT x AS id, '{TEXT}' AS text "
        "FROM UNNEST(GENERATE_ARRAY(0, 9)) AS x"
    )
    return gcp.table("private")


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
        (folder / "manifest.json").write_text(json.dumps(manifest))
        uri = f"{gcp.bucket}/models/{task}-{device}"
        gcp.upload(folder, uri)
        return uri

    return model


@pytest.fixture
def submit(gcp, table, model_of, monkeypatch, capsys):
    """Submit a job of a task; return it as Dataflow was asked to run it."""

    def submitted(task, *flags):
        module, _, settings = TASKS[task]
        device = "cuda" if any("gpu_type" in flag for flag in flags) else "cpu"
        with dataflow_service() as service:
            places = [
                f"--model={model_of(task, device)}", f"--input={table}",
                f"--output={gcp.table(next(NAMES))}", f"--project={gcp.project}",
                "--region=us-central1", f"--temp_location={gcp.bucket}/tmp",
            ]  # fmt: skip
            command = [module.__name__, *settings, *places, *service.flags, *flags]
            monkeypatch.setattr(sys, "argv", command)
            code = launch.exit_code(module.main)
        out, err = capsys.readouterr()
        assert (code, err) == (0, "")
        assert out.startswith("submitted the job ")
        # It is submitted, and nobody waits for it.
        assert [request.method for request in service.requests] == ["POST"]
        (job,) = service.jobs
        return job

    return submitted


@pytest.mark.parametrize("task", TASKS)
def test_a_job_with_gpus(submit, task):
    job = submit(task, *GPU)
    assert {"no_use_multiple_sdk_containers"} <= set(job.environment["experiments"])
    assert "use_multiple_sdk_containers" not in job.environment["experiments"]
    assert "serviceOptions" not in job.environment
    assert job.workers["numThreadsPerWorker"] == 8
    assert job.workers["diskSizeGb"] == 51
    assert "machineType" not in job.workers
    images = {i["containerImage"] for i in job.workers["sdkHarnessContainerImages"]}
    assert images == {IMAGE}
    assert {"beam_gemma", "requirements"} & {name.partition(".")[0] for name in job.staged} == set()
    pipeline = job.pipeline()
    assert {image_of(e) for e in pipeline.components.environments.values()} == {IMAGE}
    step = f"{TASKS[task][1]}/Infer/BeamML_RunInference"
    asked = accelerators(pipeline)
    assert set(asked.values()) == {L4}
    assert step in asked
    assert all(name.startswith(step) for name in asked)
