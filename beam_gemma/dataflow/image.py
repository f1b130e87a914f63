"""Check worker images against this machine's versions, by the labels in their registry.

Registries speak the Open Container Initiative's distribution protocol. An image's manifest names
its configuration, which holds the labels that templates/Dockerfile sets.
"""

import hashlib
import json
import logging
import re
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import google.auth
import requests
from google.auth.exceptions import GoogleAuthError
from google.auth.transport.requests import AuthorizedSession

from beam_gemma.errors import OptionsError
from beam_gemma.versions import check_versions

VERSIONS = {"beam-gemma": "version", "Beam": "beam", "Python": "python"}
"""Label in templates/Dockerfile that holds the version of each component."""
GOOGLE = (".pkg.dev", ".gcr.io")
"""Suffixes of the only hosts that receive Google Cloud credentials."""
SCOPE = "https://www.googleapis.com/auth/cloud-platform"
TIMEOUT_SECS = 20
INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
"""Media types of indexes, which list one image per platform."""
MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_HOST = re.compile(r"[A-Za-z0-9.-]+(:[0-9]+)?")
PLATFORM = {"os": "linux", "architecture": "amd64"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """A registry's description of an image."""

    digest: str
    """Hash of the image's manifest, or of its index; identifies the image."""
    labels: dict[str, str]

    def label(self, name: str) -> str:
        """Return the value of a `beam-gemma` label, or `unknown`."""
        return self.labels.get(f"beam-gemma.{name}", "unknown")


def check(image: str, *, device: Literal["cpu", "gpu"]) -> str:
    """Check an image's versions and device; return its name with a digest in place of the tag.

    If the registry cannot be read from here, log a warning and return the name unchanged: each
    worker checks the versions again when it loads the model.

    Args:
        image: The image's name in Docker's form, HOST/REPOSITORY:TAG.
        device: The device that the image's ONNX Runtime must support.

    Raises:
        OptionsError: the image does not exist, has other versions than this machine, or does not
            support the device.
    """
    try:
        described = _describe(image)
    except (requests.RequestException, GoogleAuthError, KeyError, ValueError) as error:
        logging.getLogger(__name__).warning(
            "--sdk_container_image %s: its versions are left for the workers to check, as its "
            "registry cannot be read here: %s",
            image,
            str(error).partition("\n")[0] or type(error).__name__,
        )
        return image
    where = f"--sdk_container_image {image}"
    check_versions(where, {name: described.label(of) for name, of in VERSIONS.items()})
    # ONNX Runtime for GPUs also runs on the CPU.
    if (got := described.label("device")) not in (device, "gpu"):
        raise OptionsError(
            f"{where}: expected an image for the {device}, got one for {got}; build it with "
            f"--build-arg DEVICE={device}"
        )
    return f"{_name(image)}@{described.digest}"


def _describe(image: str) -> Image:
    """Return the digest and labels of an image from its registry.

    Raises:
        OptionsError: the registry has no such image.
        ValueError, KeyError: the name has no registry host, or the answer has an unexpected form.
        RequestException, GoogleAuthError: the registry does not answer or denies access.
    """
    host, _, repository = _name(image).partition("/")
    if not repository or not ("." in host or ":" in host or host == "localhost"):
        raise ValueError("the name begins with no host")
    # Characters such as ? or \ end the host of a URL, which the name's first part would go beyond.
    if not _HOST.fullmatch(host):
        raise ValueError("the name begins with no host that a URL can have")
    is_here = host.partition(":")[0] in ("localhost", "127.0.0.1")
    url = f"{'http' if is_here else 'https'}://{host}/v2/{repository}"
    with _session(url) as session:
        content = _get(session, f"{url}/manifests/{_reference(image)}", image)
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        manifest = json.loads(content)
        if "manifests" in manifest:
            manifest = json.loads(_get(session, f"{url}/manifests/{_one_of(manifest)}", image))
        config = json.loads(_get(session, f"{url}/blobs/{manifest['config']['digest']}", image))
    return Image(digest=digest, labels=config["config"].get("Labels") or {})


def _one_of(index: dict[str, Any]) -> str:
    """Return the digest of the index's image for `PLATFORM`, that of Dataflow workers."""
    for entry in index["manifests"]:
        if entry.get("platform", {}).items() >= PLATFORM.items():
            digest: str = entry["digest"]
            return digest
    raise ValueError("none of its images is for Linux on x86-64")


def _session(url: str) -> requests.Session:
    """Return a session for a registry; only Google's get this machine's credentials."""
    if not f".{urlsplit(url).hostname}".endswith(GOOGLE):
        return requests.Session()
    credentials, _ = google.auth.default(scopes=[SCOPE])
    return AuthorizedSession(credentials)


def _get(session: requests.Session, url: str, image: str) -> bytes:
    accept = {"Accept": ", ".join((*MANIFESTS, *INDEXES))}
    answer = session.get(url, headers=accept, timeout=TIMEOUT_SECS)
    if answer.status_code == requests.codes.not_found:
        raise OptionsError(
            f"--sdk_container_image {image}: expected an image, got none; push it first, or check "
            "the name"
        )
    answer.raise_for_status()
    return answer.content


def _name(image: str) -> str:
    """Return an image's name without its tag and digest."""
    name = image.partition("@")[0]
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{last.partition(':')[0]}"


def _reference(image: str) -> str:
    """Return the digest in an image's name, else its tag, else `latest`."""
    name, _, digest = image.partition("@")
    return digest or name.rpartition("/")[2].partition(":")[2] or "latest"
