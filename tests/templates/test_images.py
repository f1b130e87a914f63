"""What images are built from: the Dockerfile, locked requirements and their SBOMs agree."""

import json
import re
import subprocess
import sys
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import beam_gemma
from beam_gemma.model.artifact import MANIFEST
from beam_gemma.runtime.download import BAKED
from tests.test_architecture import NOT_ON_A_WORKER

ROOT = Path(__file__).parents[2]
TEMPLATES = ROOT / "templates"
DOCKERFILE = (TEMPLATES / "Dockerfile").read_text()
DEVICES = ("cpu", "gpu")
BUILT_BY_THE_IMAGE = {"google-apitools"}
"""Packages that are published as source alone."""


def pins(text: str) -> dict[str, str]:
    """Return the versions that a file of requirements pins, by name."""
    found = re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE)
    return {canonicalize_name(name): version.split("+")[0] for name, version in found}


def lock(device: str) -> str:
    return (TEMPLATES / f"requirements-{device}.txt").read_text()


def sbom(device: str) -> list[dict]:
    return json.loads((TEMPLATES / f"sbom-{device}.json").read_text())["components"]


@pytest.mark.parametrize("device", DEVICES)
def test_images_install_what_the_tests_run(device: str) -> None:
    tested = pins((ROOT / "constraints.txt").read_text())
    locked = pins(lock(device))
    assert len(locked) > 100
    # Only CUDA is not installed where the tests run.
    only_here = {name: version for name, version in locked.items() if name not in tested}
    assert all(name.startswith(("nvidia-", "onnxruntime-gpu")) for name in only_here)
    assert {name: tested[name] for name in locked.keys() - only_here} == {
        name: locked[name] for name in locked.keys() - only_here
    }


@pytest.mark.parametrize("device", DEVICES)
def test_images_install_all_that_the_package_needs(device: str) -> None:
    locked = pins(lock(device))
    needed = [Requirement(line) for line in metadata.requires("beam-gemma")]
    needed = [r for r in needed if r.marker is None or r.marker.evaluate({"extra": device})]
    assert any(r.name.startswith("onnxruntime") for r in needed)
    for requirement in needed:
        assert locked[canonicalize_name(requirement.name)] in requirement.specifier, requirement


@pytest.mark.parametrize("device", DEVICES)
def test_every_package_has_its_hashes(device: str) -> None:
    text = lock(device)
    blocks = re.findall(r"^[\w.-]+==\S+( \\\n +--hash=sha256:[0-9a-f]{64})+$", text, re.MULTILINE)
    assert len(blocks) == len(pins(text))


def test_a_gpu_adds_cuda_and_nothing_else() -> None:
    cpu, gpu = (set(pins(lock(device)).items()) for device in DEVICES)
    assert {name for name, _ in cpu - gpu} == {"onnxruntime"}
    added = {name for name, _ in gpu - cpu} - {"onnxruntime-gpu"}
    assert {"nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-cuda-runtime"} <= added
    assert all(name.startswith(("nvidia-", "cuda-")) for name in added)
    assert not NOT_ON_A_WORKER & {name for name, _ in gpu}


@pytest.mark.parametrize("device", DEVICES)
def test_the_sbom_lists_what_is_locked(device: str) -> None:
    listed = {canonicalize_name(c["name"]): c["version"] for c in sbom(device)}
    assert listed == pins(lock(device))
    assert all(c["purl"].startswith("pkg:pypi/") for c in sbom(device))


def test_the_dockerfile_passes_its_linter() -> None:
    linter = Path(sys.executable).parent / "hadolint"
    result = subprocess.run(
        [linter, TEMPLATES / "Dockerfile"], capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 0, result.stdout


def test_images_say_the_versions_that_they_hold() -> None:
    """The build compares these with what is installed; here they are those of the project."""
    defaults = dict(re.findall(r"^ARG (\w+)=(\S+)$", DOCKERFILE, re.MULTILINE))
    assert defaults["VERSION"] == beam_gemma.__version__
    assert defaults["BEAM"] == pins(lock("cpu"))["apache-beam"]
    python = re.search(r"--python-version (\S+)", (TEMPLATES / "lock.sh").read_text())
    assert python
    assert defaults["PYTHON"] == python[1]
    assert f"python{python[1].replace('.', '')}-" in defaults["LAUNCHER_IMAGE"]


def test_every_image_turns_off_telemetry() -> None:
    """The stage of packages, which the others are built from, sets what `beam_gemma` sets."""
    packages = DOCKERFILE.split(" AS packages\n")[1].split("\nFROM ")[0]
    assert "ENV ORT_DISABLE_TELEMETRY=1\n" in packages
    bases = {name: base for base, name in re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.M)}
    assert bases["launcher"] == bases["worker"] == "packages"
    assert bases["worker-with-model"] == "worker"


def test_images_install_by_hash_and_from_wheels() -> None:
    installs = re.findall(r"pip install ((?:.|\\\n)+?[^\\])\n", DOCKERFILE)
    assert len(installs) == 2
    for flag in ("--require-hashes", "--only-binary :all:", "--no-build-isolation"):
        assert flag in installs[0]
    assert set(re.findall(r"--no-binary (\S+)", installs[0])) == BUILT_BY_THE_IMAGE
    assert "--no-index" in installs[1]


def test_a_model_is_put_where_workers_look_for_it() -> None:
    assert DOCKERFILE.endswith(f"COPY --from=model /models {BAKED}\n")
    command = re.search(
        r'digest=\$\(sha256sum /model/(\S+)\) .* mv .*/\$\{digest%% \*}"', DOCKERFILE
    )
    assert command
    assert command[1] == MANIFEST


def test_the_loader_finds_the_driver_and_cuda() -> None:
    """Wheels of CUDA have a folder for each of its major versions, which their names say too."""
    path = re.search(r"LD_LIBRARY_PATH=(\S+)", DOCKERFILE)
    assert path
    (major,) = re.findall(r"^nvidia-cudnn-(cu\d+)==", lock("gpu"), re.MULTILINE)
    wheels = "/usr/local/lib/python${PYTHON}/site-packages/nvidia"
    assert f"ARG NVIDIA={wheels}\n" in DOCKERFILE
    assert path[1].split(":") == [
        "/usr/local/nvidia/lib64",
        f"${{NVIDIA}}/{major}/lib",
        "${NVIDIA}/cudnn/lib",
    ]


def test_the_context_of_a_build_has_what_is_copied() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    allowed = [line[1:] for line in lines if line.startswith("!")]
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    names = {
        name.replace("${DEVICE}", device).replace("${MODEL}", "models")
        for line in copied
        for name in line.split()
        for device in DEVICES
    }
    assert all(any(fnmatch(name, pattern) for pattern in allowed) for name in names)
    assert all(any(fnmatch(name, pattern) for name in names) for pattern in allowed)
    assert all((ROOT / name).exists() for name in names - {"models"})
