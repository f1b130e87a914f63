"""A model on Cloud Storage is copied once, checked, and taken up where a copy was cut short."""

import json
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from google.cloud.storage import Client

from beam_gemma.errors import ArtifactError
from beam_gemma.model.artifact import CHAT_TEMPLATE, MANIFEST, TOKENIZER
from beam_gemma.runtime import download
from beam_gemma.runtime.download import open_description, open_model

ROOT = Path(__file__).parents[2]
OPEN = """
import sys
import tests.doubles.cloud_clients
from beam_gemma.runtime import download

original = download._download
download._download = lambda blob, file: (print("download"), original(blob, file))
download.open_model(sys.argv[1]).verify()
"""


@pytest.fixture
def model(gcp, tiny_gemma3, tmp_path, monkeypatch):
    """A model on Cloud Storage, and a machine that has no copy of it."""
    machine = tmp_path / "machine"
    machine.mkdir()
    monkeypatch.setenv("TMPDIR", str(machine))
    monkeypatch.setattr(tempfile, "tempdir", None)
    uri = f"{gcp.bucket}/{tmp_path.name}/model"
    gcp.upload(tiny_gemma3.artifact.path, uri)
    return uri


@pytest.fixture
def downloads(monkeypatch):
    """The names of files that are downloaded."""
    names, original = [], download._download

    def counted(blob, file):
        names.append(blob.name.rpartition("/model/")[2])
        return original(blob, file)

    monkeypatch.setattr(download, "_download", counted)
    return names


def test_the_copy_is_the_model(model, tiny_gemma3, downloads):
    copy = open_model(model)
    copy.verify()
    assert copy.digest == tiny_gemma3.artifact.digest
    assert sorted(downloads) == sorted(copy.files)
    assert open_model(model + "/").path == copy.path
    assert len(downloads) == len(copy.files)


def test_what_a_model_is_comes_without_its_weights(model, downloads):
    description = open_description(model)
    assert sorted(downloads) == sorted({TOKENIZER, CHAT_TEMPLATE} & description.files.keys())
    assert description.tokenizer_path.is_file()
    assert open_model(model).digest == description.digest
    assert sorted(downloads) == sorted(description.files)


@pytest.mark.parametrize("part_bytes", [1000, 1 << 16])
def test_a_file_comes_in_parts(model, tiny_gemma3, monkeypatch, part_bytes):
    """Of a size that no file is a multiple of, and one larger than the smallest file."""
    monkeypatch.setattr(download, "PART_BYTES", part_bytes)
    assert open_model(model).digest == tiny_gemma3.artifact.digest


def test_an_image_may_bring_the_copy_along(model, downloads, monkeypatch, tmp_path):
    copy = open_model(model).path
    baked = tmp_path / "baked"
    shutil.copytree(copy, baked / copy.name)
    shutil.rmtree(copy)
    downloads.clear()
    monkeypatch.setattr(download, "BAKED", baked)
    assert open_model(model).path == baked / copy.name
    assert open_description(model).path == baked / copy.name
    assert downloads == []


def test_threads_wait_for_one_copy(model, downloads):
    with ThreadPoolExecutor(4) as pool:
        paths = {copy.path for copy in pool.map(open_model, [model] * 4)}
    assert len(paths) == 1
    assert len(downloads) == len(set(downloads))


def test_processes_wait_for_one_copy(model, tiny_gemma3):
    workers = [
        subprocess.Popen([sys.executable, "-c", OPEN, model], cwd=ROOT, stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    downloads = [worker.communicate(timeout=200)[0].count(b"download") for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    assert sorted(downloads) == [0, 0, len(tiny_gemma3.artifact.files)]


def test_a_copy_that_was_cut_short_is_taken_up(model, downloads, monkeypatch):
    whole, cut = download._download, threading.Event()

    def killed(blob, file):
        whole(blob, file)
        if TOKENIZER in blob.name:
            file.write_bytes(file.read_bytes()[:100])
            cut.set()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(download, "_download", killed)
        with pytest.raises(KeyboardInterrupt):
            open_description(model)
    assert cut.is_set()
    open_model(model).verify()
    assert downloads.count(TOKENIZER) == 2


def test_a_torn_download_is_repeated_once(model, downloads, monkeypatch):
    whole, torn = download._download, []

    def tear(blob, file):
        whole(blob, file)
        if TOKENIZER in blob.name and not torn:
            content = bytearray(file.read_bytes())
            content[50] ^= 1
            torn.append(file.write_bytes(content))

    monkeypatch.setattr(download, "_download", tear)
    open_model(model).verify()
    assert downloads.count(TOKENIZER) == 2


@pytest.mark.usefixtures("downloads")
def test_damage_that_stays_is_one_sentence(model, gcp):
    blob = (
        Client()
        .bucket(gcp.bucket.removeprefix("gs://"))
        .blob(f"{model.removeprefix(gcp.bucket + '/')}/{TOKENIZER}")
    )
    blob.upload_from_string(b"short")
    with pytest.raises(
        ArtifactError, match=r"model/tokenizer\.model: .* got other content, 5 bytes"
    ):
        open_description(model)
    blob.delete()
    with pytest.raises(ArtifactError, match=r"tokenizer\.model: .* got NotFound: 404 .* again$"):
        open_model(model)


def test_what_is_no_model_is_one_sentence(model, gcp):
    for uri in (f"{gcp.bucket}/nothing", "gs://no-such-bucket/model"):
        with pytest.raises(ArtifactError, match=f"{uri}: expected a model folder with {MANIFEST}"):
            open_description(uri)
    name = f"{model.removeprefix(gcp.bucket + '/')}/{MANIFEST}"
    blob = Client().bucket(gcp.bucket.removeprefix("gs://")).blob(name)
    manifest = json.loads(blob.download_as_bytes())
    outside = {"../../outside": {"num_bytes": 5, "sha256": None}}
    blob.upload_from_string(json.dumps({**manifest, "files": outside}))
    with pytest.raises(ArtifactError, match=r"files inside the folder, got '\.\./\.\./outside'"):
        open_model(model)
