"""Images of workers, as their registry describes them: what they hold, and which exactly.

Registries speak the Open Container Initiative's distribution protocol. An image is described by a
manifest, which names its configuration, which has the labels that templates/Dockerfile has set.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from typing import Any, Literal

import google.auth
import requests
from google.auth.exceptions import GoogleAuthError
from google.auth.transport.requests import AuthorizedSession

from beam_gemma.errors import OptionsError
from beam_gemma.versions import check_versions

VERSIONS = {"beam-gemma": "version", "Beam": "beam", "Python": "python"}
"""Labels of templates/Dockerfile that have the versions of each."""
GOOGLE = (".pkg.dev", ".gcr.io")
"""Ends of the hosts that get the credentials of Google Cloud; no other host does."""
SCOPE = "https://www.googleapis.com/auth/cloud-platform"
TIMEOUT_SECS = 20
INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
"""Descriptions of images for several kinds of machine."""
MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
PLATFORM = {"os": "linux", "architecture": "amd64"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """What a registry says of an image."""

    digest: str
    """The hash of its manifest, which no other image has."""
    labels: dict[str, str]

    def label(self, name: str) -> str:
        """Return what one of our labels says."""
        return self.labels.get(f"beam-gemma.{name}", "unknown")


def check(image: str, *, device: Literal["cpu", "gpu"]) -> str:
    """Compare an image with this side; return its name with the digest in place of the tag.

    Where the registry does not let it be read here, that is said in the log and the name comes
    back as it is: each worker compares the versions again when it loads the model.

    Args:
        image: As Docker names it, HOST/REPOSITORY:TAG.
        device: What the image's ONNX Runtime has to run on.

    Raises:
        OptionsError: there is no such image, or it holds other versions than this side.
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
    # ONNX Runtime for a GPU runs on the CPU as well.
    if (got := described.label("device")) not in (device, "gpu"):
        raise OptionsError(
            f"{where}: expected an image for the {device}, got one for {got}; build it with "
            f"--build-arg DEVICE={device}"
        )
    return f"{_name(image)}@{described.digest}"


def _describe(image: str) -> Image:
    """Ask the registry of an image what is in it.

    Raises:
        OptionsError: it has no such image.
        ValueError, KeyError: the name has no registry, or the answer is of another form.
        RequestException, GoogleAuthError: the registry does not answer, or not us.
    """
    host, _, repository = _name(image).partition("/")
    if not repository or not ("." in host or ":" in host or host == "localhost"):
        raise ValueError("the name begins with no host")
    is_here = host.partition(":")[0] in ("localhost", "127.0.0.1")
    url = f"{'http' if is_here else 'https'}://{host}/v2/{repository}"
    with _session(host) as session:
        content = _get(session, f"{url}/manifests/{_reference(image)}", image)
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        manifest = json.loads(content)
        if "manifests" in manifest:
            manifest = json.loads(_get(session, f"{url}/manifests/{_one_of(manifest)}", image))
        config = json.loads(_get(session, f"{url}/blobs/{manifest['config']['digest']}", image))
    return Image(digest=digest, labels=config["config"].get("Labels") or {})


def _one_of(index: dict[str, Any]) -> str:
    """Return the digest of the image for the machines of Dataflow."""
    for entry in index["manifests"]:
        if entry.get("platform", {}).items() >= PLATFORM.items():
            digest: str = entry["digest"]
            return digest
    raise ValueError("none of its images is for Linux on x86-64")


def _session(host: str) -> requests.Session:
    if not f".{host}".endswith(GOOGLE):
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
    """Return the name of an image without tag and digest."""
    name = image.partition("@")[0]
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{last.partition(':')[0]}"


def _reference(image: str) -> str:
    """Return the digest of an image where its name has one, else its tag."""
    name, _, digest = image.partition("@")
    return digest or name.rpartition("/")[2].partition(":")[2] or "latest"
