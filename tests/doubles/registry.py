"""A registry of images on this machine."""

import hashlib
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from importlib import metadata

import beam_gemma
from beam_gemma.dataflow.image import INDEXES, MANIFESTS
from tests.doubles.http_server import Quiet, serving_http

PYTHON = ".".join(platform.python_version_tuple()[:2])
LABELS = {
    "beam-gemma.version": beam_gemma.__version__,
    "beam-gemma.beam": metadata.version("apache-beam"),
    "beam-gemma.python": PYTHON,
    "beam-gemma.device": "gpu",
    "maintainer": "somebody",
}


class Registry:
    """The images `team/worker` of a registry on this machine."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.content: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        """What requests say of who they are from."""
        self.status = 200
        """Of every answer, where it is an error."""

    def push(self, tag: str, labels: dict[str, str] | None, *, in_index: bool = False) -> str:
        """Add an image, among others where it is in an index; return its digest."""
        config = self._add("blobs", {"config": {"Labels": labels}})
        manifest = {"mediaType": MANIFESTS[0], "config": {"digest": config}}
        digest = self._add("manifests", manifest)
        if in_index:
            other = {"os": "linux", "architecture": "arm64"}
            ours = {"os": "linux", "architecture": "amd64", "os.version": "12"}
            entries = [("sha256:none", {}), ("sha256:other", other), (digest, ours)]
            manifests = [{"digest": d, "platform": p} for d, p in entries]
            index = {"mediaType": INDEXES[0], "manifests": manifests}
            digest = self._add("manifests", index)
        self.content[f"/v2/team/worker/manifests/{tag}"] = self.content[
            f"/v2/team/worker/manifests/{digest}"
        ]
        return digest

    def digest(self, tag: str) -> str:
        """Return what names the image of a tag for good."""
        content = self.content[f"/v2/team/worker/manifests/{tag}"]
        return f"sha256:{hashlib.sha256(content).hexdigest()}"

    def _add(self, kind: str, value: dict) -> str:
        content = json.dumps(value, indent=1).encode()
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        self.content[f"/v2/team/worker/{kind}/{digest}"] = content
        return digest


@contextmanager
def serving() -> Iterator[Registry]:
    """Run the registry until the block ends."""

    class Handler(Quiet, BaseHTTPRequestHandler):
        def do_GET(self):
            registry.tokens.add(self.headers.get("Authorization"))
            content = registry.content.get(self.path)
            known = content is not None and MANIFESTS[0] in self.headers["Accept"]
            status = registry.status if registry.status != 200 else 200 if known else 404
            self.send_response(status)
            self.end_headers()
            if status == 200:
                self.wfile.write(content)

    with serving_http(Handler) as server:
        registry = Registry(f"127.0.0.1:{server.server_port}")
        yield registry
