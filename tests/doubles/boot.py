"""Becomes a worker, as the entry of an SDK image does: Beam's container contract, in Python.

Beam's own entry is a program that comes with its images alone. As it does, this one asks the runner
for what was staged, installs it and starts the harness; the packages of the image are those of the
interpreter that runs this file.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import grpc
from apache_beam.portability.api import (
    beam_artifact_api_pb2,
    beam_artifact_api_pb2_grpc,
    beam_provision_api_pb2,
    beam_provision_api_pb2_grpc,
    beam_runner_api_pb2,
    endpoints_pb2,
)
from google.protobuf import json_format, text_format

REQUIREMENTS = "requirements.txt"
PIP = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index")


def main() -> None:
    flags = _flags()
    metadata = [("worker_id", flags.id)]
    channel = grpc.insecure_channel(flags.provision_endpoint)
    info = (
        beam_provision_api_pb2_grpc.ProvisionServiceStub(channel)
        .GetProvisionInfo(beam_provision_api_pb2.GetProvisionInfoRequest(), metadata=metadata)
        .info
    )
    folder = Path(tempfile.mkdtemp(prefix=f"{flags.id}-"))
    endpoint = info.artifact_endpoint.url or flags.artifact_endpoint
    staged = _fetch(endpoint, info.dependencies, metadata, folder / "staged")
    packages = folder / "packages"
    _install(staged, packages)
    os.environ |= {
        "PYTHONPATH": os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")]),
        "WORKER_ID": flags.id,
        "SEMI_PERSISTENT_DIRECTORY": str(folder),
        "PIPELINE_OPTIONS": json_format.MessageToJson(info.pipeline_options),
        "RUNNER_CAPABILITIES": " ".join(info.runner_capabilities),
        "LOGGING_API_SERVICE_DESCRIPTOR": _descriptor(flags.logging_endpoint),
        "CONTROL_API_SERVICE_DESCRIPTOR": _descriptor(flags.control_endpoint),
    }
    harness = "apache_beam.runners.worker.sdk_worker_main"
    os.execv(sys.executable, [sys.executable, "-m", harness])


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for name in ("id", *(f"{n}_endpoint" for n in ("provision", "artifact", "logging", "control"))):
        parser.add_argument(f"--{name}", required=True)
    return parser.parse_args()


def _fetch(endpoint, dependencies, metadata, folder: Path) -> list[Path]:
    """Get what was staged, by the names that it was staged under."""
    folder.mkdir()
    service = beam_artifact_api_pb2_grpc.ArtifactRetrievalServiceStub(
        grpc.insecure_channel(endpoint)
    )
    wanted = beam_artifact_api_pb2.ResolveArtifactsRequest(artifacts=dependencies)
    files = []
    for artifact in service.ResolveArtifacts(wanted, metadata=metadata).replacements:
        role = beam_runner_api_pb2.ArtifactStagingToRolePayload.FromString(artifact.role_payload)
        request = beam_artifact_api_pb2.GetArtifactRequest(artifact=artifact)
        files.append(folder / role.staged_name)
        with files[-1].open("wb") as file:
            for chunk in service.GetArtifact(request, metadata=metadata):
                file.write(chunk.data)
    return files


def _install(staged: list[Path], packages: Path) -> None:
    """Install what was staged; requirements must be among the packages of the image already."""
    for file in staged:
        if file.name == REQUIREMENTS:
            subprocess.run([*PIP, "--require-hashes", "-r", file], check=True)
        elif file.suffix == ".whl":
            subprocess.run([*PIP, "--no-deps", "--target", packages, file], check=True)


def _descriptor(url: str) -> str:
    return text_format.MessageToString(endpoints_pb2.ApiServiceDescriptor(url=url))


if __name__ == "__main__":
    main()
