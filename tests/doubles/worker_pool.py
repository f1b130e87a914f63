"""Runs a job as it was submitted, with its staged files, in workers of their own.

Beam's local runner takes Dataflow's place. Workers are processes that are started by the contract
of containers, so they have the packages of an image and what was staged, and nothing of the tests.
"""

import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability import common_urns
from apache_beam.portability.api import beam_provision_api_pb2, beam_runner_api_pb2, endpoints_pb2
from apache_beam.runners.portability.fn_api_runner import fn_runner
from apache_beam.runners.worker.worker_pool_main import BeamFnExternalWorkerPoolServicer
from google.protobuf import struct_pb2

from tests.doubles.dataflow_service import Job
from tests.doubles.locked_environment import ROOT


@contextmanager
def worker_pool(python: Path, folder: Path, *packages: Path) -> Iterator[str]:
    """Start workers of an interpreter on demand; yield the address to ask.

    Args:
        python: Of an environment with the packages of an image.
        folder: For the files of the pool.
        packages: Folders of further packages that the image has.
    """
    plugins = folder / "plugins"
    plugins.joinpath("tests/doubles").mkdir(parents=True)
    shutil.copy(ROOT / "tests/doubles/cloud_clients.py", plugins / "tests/doubles")
    shutil.copy(ROOT / "tests/doubles/boot.py", folder)
    path = os.pathsep.join(map(str, (plugins, *packages)))
    entry = folder / "entry.sh"
    variables = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "TMPDIR": str(folder)}
    settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
    entry.write_text(f'#!/bin/sh\nexec env {settings} {python} {folder}/boot.py "$@"\n')
    entry.chmod(0o755)
    address, server = BeamFnExternalWorkerPoolServicer.start(
        use_process=True, container_executable=str(entry)
    )
    try:
        yield address
    finally:
        server.stop(0)


def run_submitted(job: Job, pool: str, *, without: str | None = None) -> None:
    """Run a job to its end.

    Args:
        job: As Dataflow was asked to run it.
        pool: Address of the workers.
        without: End of the name of a staged file that gets lost.
    """
    pipeline = job.pipeline()
    for environment in pipeline.components.environments.values():
        payload = beam_runner_api_pb2.ExternalPayload(
            endpoint=endpoints_pb2.ApiServiceDescriptor(url=pool)
        )
        environment.urn = common_urns.environments.EXTERNAL.urn
        environment.payload = payload.SerializeToString()
        staged = [artifact for artifact in environment.dependencies if not _ends(artifact, without)]
        del environment.dependencies[:]
        environment.dependencies.extend(map(_readable, staged))
    info = beam_provision_api_pb2.ProvisionInfo(pipeline_options=_struct(job.options))
    runner = fn_runner.FnApiRunner(provision_info=fn_runner.ExtendedProvisionInfo(info))
    runner.run_via_runner_api(pipeline, PipelineOptions([])).wait_until_finish()


def _ends(artifact: beam_runner_api_pb2.ArtifactInformation, end: str | None) -> bool:
    role = beam_runner_api_pb2.ArtifactStagingToRolePayload.FromString(artifact.role_payload)
    return end is not None and role.staged_name.endswith(end)


def _readable(
    artifact: beam_runner_api_pb2.ArtifactInformation,
) -> beam_runner_api_pb2.ArtifactInformation:
    """Let a URL on Cloud Storage be read as a file: the local runner knows no other way to it."""
    url = beam_runner_api_pb2.ArtifactUrlPayload.FromString(artifact.type_payload)
    file = beam_runner_api_pb2.ArtifactFilePayload(path=url.url, sha256=url.sha256)
    return beam_runner_api_pb2.ArtifactInformation(
        type_urn=common_urns.artifact_types.FILE.urn,
        type_payload=file.SerializeToString(),
        role_urn=artifact.role_urn,
        role_payload=artifact.role_payload,
    )


def _struct(options: Mapping[str, object]) -> struct_pb2.Struct:
    """Return options as the service gives them to workers."""
    struct = struct_pb2.Struct()
    for name, value in options.items():
        # Numbers of a Struct are floats, which Beam does not take for whole ones.
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        is_whole = is_number and value == int(value)
        struct[f"beam:option:{name}:v1"] = str(int(value)) if is_whole else value
    return struct
