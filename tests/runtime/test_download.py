"""A model on Cloud Storage is copied once, checked, and taken up where a copy was cut short."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from google.cloud.storage import Client

from beam_gemma.errors import ArtifactError, StorageError
from beam_gemma.model.artifact import CHAT_TEMPLATE, MANIFEST, TOKENIZER
from beam_gemma.runtime import download
from beam_gemma.runtime.download import open_description, open_model

ROOT = Path(__file__).parents[2]
WEIGHTS = "weights/written.safetensors"
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
    outside = {**manifest["files"], "../../outside": {"num_bytes": 5, "sha256": "0" * 64}}
    blob.upload_from_string(json.dumps({**manifest, "files": outside}))
    with pytest.raises(ArtifactError, match=r"files inside the folder, got '\.\./\.\./outside'"):
        open_model(model)


def test_copies_that_others_can_reach_are_refused(model, downloads):
    copies = Path(tempfile.gettempdir()) / f"beam-gemma-models-{os.getuid()}"
    copies.mkdir()
    copies.chmod(0o777)
    with pytest.raises(StorageError, match=r"expected a folder of user .* got drwxrwxrwx"):
        open_model(model)
    copies.rmdir()
    copies.symlink_to(tempfile.gettempdir())
    with pytest.raises(StorageError, match=r"expected a folder of user .* got l"):
        open_model(model)
    assert downloads == []


def test_a_copy_of_version_0_7_0_is_used(model, downloads):
    copy = open_model(model).path
    copy.chmod(0o755)
    next(copy.parent.glob("*.verified.json")).unlink()
    downloads.clear()
    assert open_model(model).path == copy
    assert copy.stat().st_mode & 0o777 == 0o700
    assert downloads == []


@pytest.fixture
def hashed(monkeypatch):
    """The names of files whose checksum was taken."""
    names, original = [], download.sha256_of

    def counted(file):
        names.append(file.name)
        return original(file)

    monkeypatch.setattr(download, "sha256_of", counted)
    return names


def test_a_file_is_verified_once(model, hashed, downloads):
    weights = open_model(model).path / WEIGHTS
    hashed.clear()
    open_model(model)
    assert hashed == []
    os.utime(weights, ns=(0, 0))
    downloads.clear()
    open_model(model)
    assert (hashed, downloads) == ([weights.name], [])


def damaged(file: Path) -> None:
    """Flip a bit of a file; its size stays."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def with_its_old_time(file: Path) -> None:
    times = file.stat()
    damaged(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def replaced(file: Path) -> None:
    file.with_name("other").write_bytes(b"x" * file.stat().st_size)
    file.with_name("other").rename(file)


def linked(file: Path) -> None:
    elsewhere = file.parents[3] / "other"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


@pytest.mark.parametrize("change", [damaged, with_its_old_time, replaced, linked, Path.unlink])
@pytest.mark.parametrize("name", [WEIGHTS, "generate.cpu.onnx"])
def test_a_file_that_has_changed_is_fetched_again(
    model, tiny_gemma3, downloads, monkeypatch, change, name
):
    """Even one that is too large to be checked each time a folder is opened."""
    monkeypatch.setattr("beam_gemma.model.artifact.SMALL_FILE_BYTES", 0)
    file = open_model(model).path / name
    downloads.clear()
    change(file)
    open_model(model)
    assert downloads == [name]
    assert not file.is_symlink()
    assert file.read_bytes() == (tiny_gemma3.artifact.path / name).read_bytes()


def test_a_manifest_that_has_changed_is_written_again(model, downloads):
    manifest = open_model(model).path / MANIFEST
    as_it_was = manifest.read_bytes()
    fields = json.loads(as_it_was)
    fields["files"] = {n: {**e, "sha256": "0" * 64} for n, e in fields["files"].items()}
    downloads.clear()
    for content in (json.dumps(fields).encode(), b"{"):
        manifest.write_bytes(content)
        open_model(model)
        assert manifest.read_bytes() == as_it_was
    manifest.rename(manifest.with_name("other"))
    manifest.symlink_to("other")
    open_model(model)
    assert not manifest.is_symlink()
    assert downloads == []


@pytest.mark.parametrize("record", [b"", b"{", b"[1]", b'{"x": 1}', b"null", b"\xff"])
def test_a_damaged_record_of_checksums_costs_only_time(model, hashed, record):
    copy = open_model(model)
    file = copy.path.with_name(f"{copy.path.name}.verified.json")
    file.write_bytes(record)
    hashed.clear()
    open_model(model)
    assert len(hashed) == len(copy.files)


def test_a_folder_that_became_a_link_is_refused(model, tmp_path):
    copy = open_model(model).path
    (copy / "weights").rename(tmp_path / "weights")
    (copy / "weights").symlink_to(tmp_path / "weights")
    with pytest.raises(ArtifactError, match=r"weights: expected a folder .*, got a link; remove"):
        open_model(model)


@pytest.fixture
def baked(model, monkeypatch, tmp_path):
    """The folder of a model in a worker's image."""
    copy = open_model(model).path
    shutil.copytree(copy, tmp_path / "baked" / copy.name)
    shutil.rmtree(copy)
    monkeypatch.setattr(download, "BAKED", tmp_path / "baked")
    return tmp_path / "baked" / copy.name


def test_what_an_image_brings_along_is_verified_once(model, baked, hashed, monkeypatch):
    monkeypatch.setattr("beam_gemma.model.artifact.SMALL_FILE_BYTES", 0)
    open_model(model)
    hashed.clear()
    assert open_model(model).path == baked
    assert hashed == [MANIFEST]
    damaged(baked / WEIGHTS)
    with pytest.raises(ArtifactError, match=r"got another file; build the image again"):
        open_model(model)


def test_an_image_with_another_manifest_is_refused(model, baked):
    (baked / MANIFEST).write_text((baked / MANIFEST).read_text() + " ")
    with pytest.raises(ArtifactError, match=r"that its folder is named by, .* the image again"):
        open_description(model)
