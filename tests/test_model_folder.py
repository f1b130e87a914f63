"""A model on Cloud Storage is copied once, checked, and taken up where a copy was cut short."""

import json
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from google.cloud.storage import Blob, Client

from beam_gemma.artifact import CHAT_TEMPLATE, MANIFEST, TOKENIZER
from beam_gemma.errors import ArtifactError
from beam_gemma.model_folder import open_description, open_model

ROOT = Path(__file__).parent.parent
OPEN = """
import sys
from google.cloud.storage import Blob
import tests.cloud_clients
from beam_gemma.model_folder import open_model

download = Blob.download_to_filename
Blob.download_to_filename = lambda self, file: (print("download"), download(self, file))
open_model(sys.argv[1]).verify()
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
    names, download = [], Blob.download_to_filename

    def counted(self, filename):
        names.append(self.name.rpartition("/model/")[2])
        return download(self, filename)

    monkeypatch.setattr(Blob, "download_to_filename", counted)
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
    downloads = [worker.communicate(timeout=60)[0].count(b"download") for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    assert sorted(downloads) == [0, 0, len(tiny_gemma3.artifact.files)]


def test_a_copy_that_was_cut_short_is_taken_up(model, downloads, monkeypatch):
    whole, cut = Blob.download_to_filename, threading.Event()

    def killed(self, filename):
        if TOKENIZER in self.name:
            whole(self, filename)
            Path(filename).write_bytes(Path(filename).read_bytes()[:100])
            cut.set()
            raise KeyboardInterrupt
        return whole(self, filename)

    with monkeypatch.context() as patch:
        patch.setattr(Blob, "download_to_filename", killed)
        with pytest.raises(KeyboardInterrupt):
            open_description(model)
    assert cut.is_set()
    open_model(model).verify()
    assert downloads.count(TOKENIZER) == 2


def test_a_torn_download_is_repeated_once(model, downloads, monkeypatch):
    whole, torn = Blob.download_to_filename, []

    def tear(self, filename):
        whole(self, filename)
        if TOKENIZER in self.name and not torn:
            content = bytearray(Path(filename).read_bytes())
            content[50] ^= 1
            torn.append(Path(filename).write_bytes(content))

    monkeypatch.setattr(Blob, "download_to_filename", tear)
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
