"""The shell scripts of the templates: linted, and run with gcloud up to what it asks for."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from apache_beam.io.filesystems import FileSystems

from templates.metadata import PARSERS, metadata
from tests.doubles.dataflow_service import LAUNCH_TEMPLATE, dataflow_service
from tests.doubles.emulators import PROJECT, ROOT

SCRIPTS = sorted([*ROOT.glob("templates/*.sh"), ROOT / ".ci/run"])
REPOSITORY = "europe-west4-docker.pkg.dev/test-project/beam-gemma"
REAL_GCLOUD = shutil.which("gcloud")
GCLOUD = f"""\
#!{sys.executable}
import json, os, sys
with open(os.environ["GCLOUD_LOG"], "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
if sys.argv[1] == "artifacts":
    print(sys.argv[5].partition(":")[0] + "@sha256:0123")
elif sys.argv[1] != "builds":
    os.execv(os.environ["GCLOUD_REAL"], ["gcloud", *sys.argv[1:]])
"""
"""Cloud Build and Artifact Registry have no stand-in here; all else is the real gcloud's."""


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Run a script; return its calls of gcloud, which answers nothing unless it is the real one."""
    (tmp_path / "gcloud").write_text(GCLOUD)
    (tmp_path / "gcloud").chmod(0o755)
    log = tmp_path / "gcloud.log"
    monkeypatch.setenv("GCLOUD_LOG", str(log))
    monkeypatch.setenv("GCLOUD_REAL", shutil.which("true"))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def run(name, *arguments, code=0):
        done = subprocess.run(
            [ROOT / "templates" / name, *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stderr
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    return run


@pytest.fixture
def cloud(gcp, monkeypatch, tmp_path):
    """The real gcloud, with Cloud Storage and Dataflow on this machine."""
    if REAL_GCLOUD is None:
        pytest.skip("gcloud is not installed here")
    with dataflow_service() as dataflow:
        settings = {
            "CONFIG": tmp_path / "gcloud-config",
            "CORE_PROJECT": PROJECT,
            "CORE_DISABLE_PROMPTS": "1",
            "CORE_DISABLE_USAGE_REPORTING": "true",
            "AUTH_DISABLE_CREDENTIALS": "true",
            "COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "true",
            "API_ENDPOINT_OVERRIDES_STORAGE": f"{os.environ['STORAGE_EMULATOR_HOST']}/storage/v1/",
            "API_ENDPOINT_OVERRIDES_DATAFLOW": f"http://127.0.0.1:{dataflow.port}/",
        }
        for name, value in settings.items():
            monkeypatch.setenv(f"CLOUDSDK_{name}", str(value))
        monkeypatch.setenv("GCLOUD_REAL", REAL_GCLOUD)
        yield gcp, dataflow


def image(name):
    return f"{REPOSITORY}/{name}@sha256:0123"


def read(uri):
    with FileSystems.open(uri) as stream:
        return stream.read()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shell_is_linted(path):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    check = subprocess.run([shellcheck, path], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout


def test_templates_name_images_by_digest(script):
    calls = script("build.sh", REPOSITORY, "gs://bucket/templates/", "cpu")
    (build,) = [call for call in calls if call[0] == "builds"]
    assert "--config=templates/cloudbuild.yaml" in build
    assert f"_REPOSITORY={REPOSITORY},_TAG=" in build[-1]
    assert build[-1].endswith(",_DEVICE=cpu")
    described = [call[4].partition(":")[0] for call in calls if call[0] == "artifacts"]
    launchers = [f"launcher-{task}" for task in PARSERS]
    assert described == [f"{REPOSITORY}/{name}" for name in ("worker-cpu", *launchers)]
    assert [call for call in calls if call[0] == "dataflow"] == [
        [
            "dataflow", "flex-template", "build", f"gs://bucket/templates/{task}.json",
            f"--image={image(f'launcher-{task}')}", "--sdk-language=PYTHON",
            f"--metadata-file=templates/{task}.json",
        ]
        for task in PARSERS
    ]  # fmt: skip


def test_cloud_build_makes_the_images_that_templates_name():
    build = yaml.safe_load((ROOT / "templates/cloudbuild.yaml").read_text())
    names = ["worker-$_DEVICE", *(f"launcher-{task}" for task in PARSERS)]
    assert build["images"] == [f"$_REPOSITORY/{name}:$_TAG" for name in names]
    for step, image, task in zip(build["steps"], build["images"], ["", *PARSERS], strict=True):
        target, argument = ("launcher", f"TASK={task}") if task else ("worker", "DEVICE=$_DEVICE")
        assert step["args"] == [
            "build", "--file=templates/Dockerfile", f"--target={target}",
            f"--build-arg={argument}", f"--tag={image}", ".",
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("build.sh", [REPOSITORY]),
        ("build.sh", [REPOSITORY, "gs://bucket/templates", "tpu"]),
        ("run.sh", ["gs://bucket/templates", "generate", "model=gs://b/m"]),
        ("run.sh", ["gs://bucket/templates", "generate", "--", "--model"]),
    ],
)
def test_wrong_use_is_told_apart(script, name, arguments):
    assert script(name, *arguments, code=2) == []


def test_real_gcloud_makes_templates_that_it_runs(script, cloud):
    gcp, dataflow = cloud
    folder = f"{gcp.bucket}/templates"
    script("build.sh", REPOSITORY, folder)
    for task in PARSERS:
        template = json.loads(read(f"{folder}/{task}.json"))
        assert template["image"] == image(f"launcher-{task}")
        assert template["sdkInfo"] == {"language": "PYTHON"}
        found = metadata(task)
        assert template["metadata"]["parameters"] == found["parameters"]
        assert template["metadata"]["description"] == found["description"]
    parameters = {
        "model": "gs://b/m",
        "prompt": "Say, in a line:\n'{text}' = ~",
        "overwrite": "true",
    }
    script(
        "run.sh", folder, "generate", "--region=europe-west4", "--max-workers=3",
        f"--temp-location={gcp.bucket}/tmp", "--", *(f"{k}={v}" for k, v in parameters.items()),
    )  # fmt: skip
    (launch,) = [request for request in dataflow.requests if request.method == "POST"]
    assert LAUNCH_TEMPLATE.fullmatch(launch.path)
    asked = launch.body["launchParameter"]
    assert asked["containerSpecGcsPath"] == f"{folder}/generate.json"
    assert asked["parameters"] == {**parameters, "sdk_container_image": image("worker-gpu")}
    assert asked["environment"]["maxWorkers"] == 3
    assert asked["environment"]["stagingLocation"] == f"{folder}/staging"
    assert asked["environment"]["tempLocation"] == f"{gcp.bucket}/tmp"


def test_an_image_that_is_given_is_taken(script):
    calls = script(
        "run.sh", "gs://bucket/templates", "embed", "--region=europe-west4", "--",
        "model=gs://b/m", "sdk_container_image=mine:1",
    )  # fmt: skip
    (run,) = calls
    assert run[-2:] == [
        f"--parameters=^\x1f^{p}" for p in ("model=gs://b/m", "sdk_container_image=mine:1")
    ]
