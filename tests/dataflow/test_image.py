"""An image is compared with this side before a job is submitted, by its registry's word."""

import json
import logging
from unittest import mock

import pytest
import requests

from beam_gemma.dataflow import image
from beam_gemma.dataflow.image import check
from beam_gemma.errors import OptionsError
from tests.doubles.emulators import CREDENTIALS
from tests.doubles.registry import LABELS, serving


@pytest.fixture
def registry():
    with serving() as registry:
        yield registry


@pytest.mark.parametrize("in_index", [False, True])
def test_an_image_that_is_as_this_side_comes_back_by_digest(registry, in_index, caplog):
    digest = registry.push("1", LABELS, in_index=in_index)
    by_digest = f"{registry.host}/team/worker@{digest}"
    assert check(f"{registry.host}/team/worker:1", device="gpu") == by_digest
    assert check(by_digest, device="gpu") == by_digest
    assert not caplog.records


def test_without_a_tag_it_is_the_latest(registry):
    digest = registry.push("latest", LABELS)
    assert check(f"{registry.host}/team/worker", device="gpu").endswith(digest)


@pytest.mark.parametrize(
    ("label", "value", "expected"),
    [
        ("version", "0.0.1", "got beam-gemma 0.0.1, Beam "),
        ("beam", "2.0.0", "Beam 2.0.0, Python "),
        ("python", "3.8", "Python 3.8; build the image"),
        ("device", "cpu", "expected an image for the gpu, got one for cpu; build it with"),
        ("device", "launcher", "expected an image for the gpu, got one for launcher; build it"),
    ],
)
def test_an_image_of_other_versions_is_refused(registry, label, value, expected):
    registry.push("1", {**LABELS, f"beam-gemma.{label}": value})
    with pytest.raises(OptionsError) as error:
        check(f"{registry.host}/team/worker:1", device="gpu")
    assert str(error.value).startswith(f"--sdk_container_image {registry.host}/team/worker:1: ")
    assert expected in str(error.value)


@pytest.mark.parametrize(("device", "runs"), [("cpu", True), ("gpu", True), ("launcher", False)])
def test_what_runs_a_job_for_the_cpu(registry, device, runs):
    registry.push("1", {**LABELS, "beam-gemma.device": device})
    if runs:
        check(f"{registry.host}/team/worker:1", device="cpu")
    else:
        with pytest.raises(
            OptionsError, match=r"expected an image for the cpu, got one for launcher"
        ):
            check(f"{registry.host}/team/worker:1", device="cpu")


@pytest.mark.parametrize("labels", [None, {}, {"maintainer": "somebody"}])
def test_an_image_that_is_none_of_ours_is_refused(registry, labels):
    registry.push("1", labels)
    with pytest.raises(OptionsError, match="got beam-gemma unknown, Beam unknown, Python unknown;"):
        check(f"{registry.host}/team/worker:1", device="cpu")


def test_an_image_that_is_not_there_is_refused(registry):
    registry.push("1", LABELS)
    with pytest.raises(OptionsError, match=r"worker:2: expected an image, got none; push it"):
        check(f"{registry.host}/team/worker:2", device="gpu")


def warning_of(caplog) -> str:
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    return record.getMessage()


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_registry_that_refuses_leaves_the_check_to_workers(registry, status, caplog):
    registry.push("1", LABELS)
    registry.status = status
    image = f"{registry.host}/team/worker:1"
    assert check(image, device="gpu") == image
    assert str(status) in warning_of(caplog)
    assert "\n" not in warning_of(caplog)


def test_a_registry_that_is_not_there_leaves_the_check_to_workers(caplog):
    image = "127.0.0.1:1/team/worker:1"
    assert check(image, device="cpu") == image
    assert f"{image}: its versions are left for the workers" in warning_of(caplog)


@pytest.fixture
def no_session(monkeypatch):
    """No request is sent: a session would fail the test."""
    refused = mock.Mock(side_effect=AssertionError("a session was opened"))
    monkeypatch.setattr(image, "_session", refused)


@pytest.mark.parametrize("name", ["worker", "team/worker:1", "worker:1", "library/worker@sha256:0"])
@pytest.mark.usefixtures("no_session")
def test_a_name_without_a_host_is_asked_of_nobody(name, caplog):
    assert check(name, device="cpu") == name
    assert warning_of(caplog).endswith("the name begins with no host")


@pytest.mark.parametrize(
    "host",
    [
        "evil.com?.pkg.dev",
        "evil.com#.pkg.dev",
        r"evil.com\.pkg.dev",
        "evil.com%2f.pkg.dev",
        "evil.com\t.pkg.dev",
        "evil.com:80:.gcr.io",
        "user:word.pkg.dev",
        "[::1].pkg.dev",
        "évil.gcr.io",
    ],
)
@pytest.mark.usefixtures("no_session")
def test_a_host_that_a_url_would_cut_is_asked_nothing(host, caplog):
    name = f"{host}/team/worker:1"
    assert check(name, device="cpu") == name
    assert warning_of(caplog).endswith("the name begins with no host that a URL can have")


def test_a_warning_is_one_line(monkeypatch, caplog):
    error = requests.ConnectionError("no route\nand much more")
    monkeypatch.setattr(image, "_describe", mock.Mock(side_effect=error))
    check("localhost/worker", device="cpu")
    assert warning_of(caplog).endswith("its registry cannot be read here: no route")


def test_an_index_for_other_machines_leaves_the_check_to_workers(registry, caplog):
    index = {"manifests": [{"digest": "sha256:x", "platform": {"os": "linux"}}]}
    registry.content["/v2/team/worker/manifests/1"] = json.dumps(index).encode()
    image = f"{registry.host}/team/worker:1"
    assert check(image, device="cpu") == image
    assert "x86-64" in warning_of(caplog)


def test_only_google_gets_the_credentials(registry, tmp_path, monkeypatch):
    credentials = tmp_path / "credentials.json"
    credentials.write_text(json.dumps(CREDENTIALS))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(credentials))
    registry.push("1", LABELS)
    check(f"{registry.host}/team/worker:1", device="gpu")
    assert registry.tokens == {None}
    registry.tokens.clear()
    monkeypatch.setattr(image, "GOOGLE", (".127.0.0.1",))
    check(f"{registry.host}/team/worker:1", device="gpu")
    assert registry.tokens == {"Bearer emulated"}


@pytest.mark.parametrize(
    ("host", "is_google"),
    [
        ("europe-docker.pkg.dev", True),
        ("gcr.io", True),
        ("eu.gcr.io", True),
        ("pkg.dev.example.com", False),
        ("notgcr.io", False),
        ("localhost:5000", False),
        ("EU.GCR.IO", True),
        ("europe-docker.pkg.dev:443", True),
        ("evil.com?.pkg.dev", False),
        ("evil.com#.gcr.io", False),
        ("evil.com/x.gcr.io", False),
    ],
)
def test_which_hosts_are_google(host, is_google, tmp_path, monkeypatch):
    credentials = tmp_path / "credentials.json"
    credentials.write_text(json.dumps(CREDENTIALS))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(credentials))
    assert hasattr(image._session(f"https://{host}/v2/x"), "credentials") == is_google
