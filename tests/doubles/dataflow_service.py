"""Dataflow's REST API on this machine: it takes jobs, writes down what was asked, and runs nothing.

Beam talks REST, and to a plain HTTP server, where the name of the endpoint has localhost in it.
"""

import gzip
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from apache_beam.io.filesystems import FileSystems
from apache_beam.portability import common_urns
from apache_beam.portability.api import beam_runner_api_pb2

from tests.doubles.http_server import Quiet, serving_http

CREATE_JOB = re.compile(r"/v1b3/projects/[^/]+/(locations/[^/]+/)?jobs(\?.*)?")
LAUNCH_TEMPLATE = re.compile(r"/v1b3/projects/[^/]+/locations/[^/]+/flexTemplates:launch(\?.*)?")
JOB_ID = "2026-01-01_00_00_00-1234567890"
ACCELERATOR = "beam:resources:accelerator:v1"


@dataclass(frozen=True)
class Request:
    """One request, as it came."""

    method: str
    path: str
    body: Any


@dataclass(frozen=True)
class Job:
    """A job as Dataflow is asked to run it."""

    body: dict[str, Any]

    @property
    def environment(self) -> dict[str, Any]:
        return self.body["environment"]

    @property
    def options(self) -> dict[str, Any]:
        """Beam's options, as workers get them."""
        return self.environment["sdkPipelineOptions"]["options"]

    @property
    def workers(self) -> dict[str, Any]:
        """The only pool of workers."""
        (pool,) = self.environment["workerPools"]
        return pool

    @property
    def staged(self) -> dict[str, str]:
        """Where on Cloud Storage the files are that workers get, by their names."""
        packages = self.workers.get("packages", [])
        return {p["name"]: f"gs://{p['location'].partition('/')[2]}" for p in packages}

    def pipeline(self) -> beam_runner_api_pb2.Pipeline:
        """Read the pipeline that was staged on Cloud Storage."""
        with FileSystems.open(self.options["pipelineUrl"]) as stream:
            return beam_runner_api_pb2.Pipeline.FromString(stream.read())


def accelerators(pipeline: beam_runner_api_pb2.Pipeline) -> dict[str, str]:
    """Return the accelerator that each step of a pipeline asks for, by the step's name."""
    environments = pipeline.components.environments
    steps = pipeline.components.transforms.values()
    asked = {s.unique_name: environments[s.environment_id].resource_hints for s in steps}
    return {name: hints[ACCELERATOR].decode() for name, hints in asked.items() if hints}


def display_of(step: beam_runner_api_pb2.PTransform) -> dict[str, Any]:
    """Return what a step of a pipeline shows of itself, by key."""
    payloads = [d.payload for d in step.display_data]
    labels = map(beam_runner_api_pb2.LabelledPayload.FromString, payloads)
    return {label.key: getattr(label, label.WhichOneof("value")) for label in labels}


def image_of(environment: beam_runner_api_pb2.Environment) -> str:
    """Return the image that an environment of a pipeline is."""
    assert environment.urn == common_urns.environments.DOCKER.urn
    return beam_runner_api_pb2.DockerPayload.FromString(environment.payload).container_image


@dataclass
class Dataflow:
    """The service while it runs."""

    port: int
    requests: list[Request] = field(default_factory=list)
    """All that came, in order."""
    refusal: str | None = None
    """Why it takes no job, where it takes none."""

    @property
    def flags(self) -> Sequence[str]:
        """Of a pipeline, so that it is submitted here."""
        return ("--runner=DataflowRunner", f"--dataflow_endpoint=http://localhost:{self.port}")

    @property
    def jobs(self) -> list[Job]:
        """What was submitted."""
        return [
            Job(request.body)
            for request in self.requests
            if request.method == "POST" and CREATE_JOB.fullmatch(request.path)
        ]

    def answer(self, request: Request) -> dict[str, Any]:
        """Write a request down and return the service's answer."""
        self.requests.append(request)
        job = {"id": JOB_ID, "currentState": "JOB_STATE_PENDING"}
        if CREATE_JOB.fullmatch(request.path):
            return {**request.body, **job}
        return {"job": job} if LAUNCH_TEMPLATE.fullmatch(request.path) else job


@contextmanager
def dataflow_service() -> Iterator[Dataflow]:
    """Run the service until the block ends."""
    with serving_http(_Handler) as server:
        server.service = Dataflow(server.server_port)
        yield server.service


class _Handler(Quiet, BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            content = gzip.decompress(content)
        request = Request(self.command, self.path, json.loads(content) if content else None)
        service = self.server.service
        status, body = 200, service.answer(request)
        if service.refusal is not None:
            status, body = 403, {"error": {"code": 403, "message": service.refusal}}
        answer = json.dumps(body, indent=2).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
