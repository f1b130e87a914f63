"""Pictures of rows: bytes stay, files are read within limits, and what fails is its row's error."""

import os
import threading
import time
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pytest
from apache_beam.io.filesystem import BeamIOError
from apache_beam.io.localfilesystem import LocalFileSystem

from beam_gemma.batches import JSON_TEXT
from beam_gemma.errors import OptionsError, RecordError
from beam_gemma.inference import media_files
from beam_gemma.inference.media_files import ImageReading, MediaReading, PendingFile
from beam_gemma.jobs import fetch_media
from beam_gemma.jobs.fetch_media import FILE_LIST, described, fetched, in_slices

HERE = ImageReading(allow_local=True)
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
OBJECT_REF = pa.struct(
    [
        ("uri", pa.string()),
        ("version", pa.string()),
        ("authorizer", pa.string()),
        ("details", pa.string()),
    ]
)


@pytest.fixture
def folder(tmp_path):
    """A table's folder with two files, and one file beside it."""
    table = tmp_path / "table"
    (table / "sub").mkdir(parents=True)
    (table / "a.png").write_bytes(b"picture a")
    (table / "sub/b.png").write_bytes(b"picture b")
    (tmp_path / "secret.png").write_bytes(b"secret")
    return table


def images_of(values, kind, reading=HERE):
    """Return the pictures of a column's values, each as bytes or as its error."""
    batch = pa.record_batch({"id": pa.array(range(len(values))), "photo": pa.array(values, kind)})
    limits = MediaReading(image=reading)
    slices = [rows for _, rows in fetched((0, batch), {"photo": "image"}, limits)]
    assert all(rows.schema.field("photo").type == FILE_LIST for rows in slices)
    table = pa.Table.from_batches(slices)
    assert table["id"].to_pylist() == list(range(len(values)))
    return [
        row and [image and (image["bytes"] or image["error"]) for image in row]
        for row in table["photo"].to_pylist()
    ]


def error_of(name, reading=HERE):
    """Return the error of reading a file."""
    with pytest.raises(RecordError) as caught:
        PendingFile(str(name), reading).result()
    return str(caught.value)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary(9), pa.binary_view()])
def test_bytes_stay(kind):
    assert images_of([b"picture a", None], kind) == [[b"picture a"], None]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
)
def test_paths_start_from_the_tables_folder(folder, kind):
    reading = ImageReading(allow_local=True, folder=str(folder))
    names = ["a.png", "sub/b.png", "sub/../a.png", f"{folder}/a.png", f"file://{folder}/a.png"]
    a, b = [b"picture a"], [b"picture b"]
    assert images_of([*names, None], kind, reading) == [a, b, a, a, a, None]


def test_structs_of_datasets_and_of_bigquery_and_lists_of_them(folder):
    reading = ImageReading(allow_local=True, folder=str(folder))
    both = {"bytes": b"own", "path": "a.png"}
    values = [both, {"bytes": None, "path": "a.png"}, {"bytes": None, "path": None}]
    assert images_of(values, STRUCT, reading) == [[b"own"], [b"picture a"], [None]]
    refs = [{"uri": f"{folder}/a.png", "version": None, "authorizer": "x.y", "details": "{}"}]
    assert images_of(refs, OBJECT_REF) == [[b"picture a"]]
    lists = [[*values[:2], None], [], None]
    wanted = [[b"own", b"picture a", None], [], None]
    assert images_of(lists, pa.list_(STRUCT), reading) == wanted
    assert images_of([["a.png"] * 2], pa.large_list(pa.string()), reading) == [[b"picture a"] * 2]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("none.png", "expected a file that is there, got none at 'none.png'"),
        ("a.png/x.png", "expected a file that is there, got none at 'a.png/x.png'"),
        ("sub", "expected a file, got a folder, pipe or device at 'sub'"),
        ("pipe", "expected a file, got a folder, pipe or device at 'pipe'"),
        ("/dev/zero", "expected a file, got a folder, pipe or device at '/dev/zero'"),
        ("", "expected a file, got a folder, pipe or device at ''"),
        ("../secret.png", "expected a path that stays in the folder of the table, got"),
        ("sub/../../secret.png", "expected a path that stays in the folder of the table, got"),
        ("..", "expected a path that stays in the folder of the table, got '..'"),
        ("http://localhost/a.png", "expected a path or a URI such as gs://, as web servers are"),
        ("HTTPS://a.b/c.png", "expected a path or a URI such as gs://, as web servers are"),
        ("file://elsewhere/a.png", "expected a file URI of this machine"),
        ("file://[/a.png", "expected a file URI of this machine"),
        ("nowhere://a/b.png", "expected a path or a URI of a known file system, got 'nowhere://"),
        ("a\0.png", "expected a file that can be read, got ValueError: embedded null byte for"),
        ("x" * 5000, "expected a file that can be read, got OSError: "),
    ],
)
def test_what_cannot_be_read_is_an_error_that_names_the_cause(folder, name, error):
    os.mkfifo(folder / "pipe")
    reading = ImageReading(allow_local=True, folder=str(folder))
    found = error_of(name, reading)
    assert found.startswith(error), found
    assert len(found) < 600
    (other, image), (good,) = images_of(
        [[name, "a.png"], ["a.png"]], pa.list_(pa.string()), reading
    )
    assert other == found
    assert image == good == b"picture a"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read all files")
def test_a_forbidden_file_says_so(folder):
    (folder / "a.png").chmod(0)
    assert "expected a file that may be read, got no permission for" in error_of(folder / "a.png")


def test_local_files_are_read_only_if_they_may_be(folder):
    remote = ImageReading(folder=str(folder))
    for name in (f"{folder}/a.png", "a.png", f"file://{folder}/a.png"):
        assert "expected a URI such as gs://, as files of a worker's own disk" in error_of(
            name, remote
        )
    assert error_of("a.png", ImageReading(allow_local=True)).startswith(
        "expected a URI such as gs://, as the table has no folder for paths, got"
    )


def test_a_large_file_is_refused_before_it_is_read(folder):
    reading = ImageReading(allow_local=True, max_bytes=8)
    with (folder / "huge.png").open("wb") as file:
        file.truncate(1 << 40)
    wanted = "expected at most 8 bytes, got a larger file; set max_image_bytes higher"
    assert error_of(folder / "huge.png", reading) == error_of(folder / "a.png", reading) == wanted
    assert images_of([b"12345678", b"123456789"], pa.binary(), reading) == [
        [b"12345678"],
        [wanted],
    ]
    with pytest.raises(OptionsError, match="max_image_bytes: expected at least 1, got 0"):
        ImageReading(max_bytes=0)
    with pytest.raises(OptionsError, match=r"max_secs: expected more than 0, got 0\.0"):
        ImageReading(max_secs=0.0)


class Elsewhere(LocalFileSystem):
    """A file system of its own scheme; what happens at the next openings is in `events`."""

    events: ClassVar[list] = []

    @classmethod
    def scheme(cls):
        return "elsewhere"

    def open(self, path, *options, **named):
        event = self.events.pop(0) if self.events else None
        if isinstance(event, Exception):
            raise event
        if event is not None:
            event.wait(20)
        return super().open(path.removeprefix("elsewhere:/"), *options, **named)

    def exists(self, path):
        return super().exists(path.removeprefix("elsewhere:/"))


@pytest.fixture
def elsewhere(monkeypatch):
    monkeypatch.setattr(Elsewhere, "events", [])
    monkeypatch.setattr(media_files, "PAUSE_SECS", 0.001)
    return Elsewhere.events


def test_passing_errors_are_passed_over_and_lasting_ones_are_told(folder, elsewhere):
    name = f"elsewhere:/{folder}/a.png"
    elsewhere += [BeamIOError("busy"), ConnectionResetError("gone")]
    assert PendingFile(name, ImageReading()).result() == b"picture a"
    elsewhere += [ConnectionResetError("gone")] * 3
    assert "got ConnectionResetError: gone for" in error_of(name, ImageReading())
    assert not elsewhere
    elsewhere += [PermissionError("no"), FileNotFoundError("no")]
    assert "got no permission for" in error_of(name, ImageReading())
    assert "got none at" in error_of(name, ImageReading())
    elsewhere += [BeamIOError("no")]
    assert "got none at" in error_of(f"elsewhere:/{folder}/none.png", ImageReading())
    # The limit holds where no size is known beforehand.
    assert "expected at most 8 bytes" in error_of(name, ImageReading(max_bytes=8))


def test_a_file_that_hangs_is_an_error_and_holds_up_no_other(folder, elsewhere, monkeypatch):
    monkeypatch.setattr(media_files, "_SLOTS", threading.BoundedSemaphore(1))
    release = threading.Event()
    elsewhere.append(release)
    name = f"elsewhere:/{folder}/a.png"
    reading = ImageReading(max_secs=0.05, allow_local=True)
    assert error_of(name, reading) == (
        f"expected a file that is read within 0.05 s, got no end of {name!r}"
    )
    assert PendingFile(name, HERE).result() == b"picture a"
    release.set()


def test_few_files_are_read_at_once_and_rows_stay_in_order(folder, monkeypatch):
    at_once, most, lock = 0, 0, threading.Lock()
    read = media_files._read

    def counted(*arguments):
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.001)
        found = read(*arguments)
        with lock:
            at_once -= 1
        return found

    monkeypatch.setattr(media_files, "_read", counted)
    monkeypatch.setattr(media_files, "_SLOTS", threading.BoundedSemaphore(3))
    for number in range(40):
        (folder / f"{number}.png").write_bytes(b"%d" % number)
    names = [f"{folder}/{number}.png" if number % 3 else None for number in range(40)]
    found = images_of([[name] * 2 for name in names], pa.list_(pa.string()))
    wanted = [[b"%d" % n] * 2 if n % 3 else [None] * 2 for n in range(40)]
    assert found == wanted
    assert 1 < most <= 3


def test_slices_are_small_and_later_rows_wait(monkeypatch):
    monkeypatch.setattr(fetch_media, "SLICE_BYTES", 1000)
    started = []

    begin = fetch_media._begin
    monkeypatch.setattr(fetch_media, "_begin", lambda *a: started.append(1) or begin(*a))
    batch = pa.record_batch({"photo": pa.array([b"x" * 400] * 100, pa.binary())})
    slices = fetched((50, batch), {"photo": "image"}, MediaReading(image=HERE))
    position, first = next(slices)
    assert (position, first.num_rows, len(started)) == (50, 3, 3)
    others = list(slices)
    assert [start for start, _ in others] == list(range(53, 150, 3))
    small = pa.record_batch({"photo": pa.array([b"x"] * 20, pa.binary())})
    assert [
        rows.num_rows
        for _, rows in fetched((0, small), {"photo": "image"}, MediaReading(image=HERE))
    ] == [16, 4]


def test_read_ahead_is_bounded_too(folder):
    reading = ImageReading(allow_local=True, folder=str(folder))
    begun = []

    def rows():
        for number in range(100):
            begun.append(number)
            yield {"photo": [PendingFile("a.png", reading)] if number % 2 else None}

    found = media_files.read_ahead(rows())
    next(found)
    assert len(begun) <= media_files.NUM_READ_AT_ONCE
    assert len(list(found)) == 99


PART = pa.struct([("type", pa.string()), ("text", pa.string()), ("path", pa.string())])


@pytest.mark.parametrize(
    ("part", "text", "is_cut"),
    [
        (PART, None, True),
        (pa.struct([("type", pa.string()), ("text", pa.string())]), None, False),
        (None, '[{"role": "user", "content": [{"type": "image"}]}]', True),
        (None, '[{"role": "user", "content": "an image"}]', False),
    ],
)
def test_conversations_with_pictures_are_cut_into_small_batches(part, text, is_cut):
    if part is None:
        field = pa.field("chat", pa.string(), metadata={JSON_TEXT: b""})
    else:
        message = pa.struct([("role", pa.string()), ("content", pa.list_(part))])
        field = pa.field("chat", pa.list_(message))
    batch = pa.RecordBatch.from_pylist([{"chat": text}] * 40, schema=pa.schema([field]))
    sizes = [(start, rows.num_rows) for start, rows in in_slices((7, batch), "chat")]
    assert sizes == ([(7, 16), (23, 16), (39, 8)] if is_cut else [(7, 40)])
    assert list(in_slices((7, batch), None)) == [(7, batch)]


def test_pictures_are_shown_by_their_size():
    rows = pa.record_batch(
        {
            "photo": pa.array([b"12345"] * 2, pa.binary()),
            "all": pa.array([[{"bytes": bytes(2000), "path": "a"}, None], None], pa.list_(STRUCT)),
            "name": ["a", "b"],
        }
    )
    assert described(rows, ("photo", "all", "name")).to_pylist() == [
        {
            "photo": "file, 5 bytes",
            "all": [{"bytes": "file, 2,000 bytes", "path": "a"}, None],
            "name": "a",
        },
        {"photo": "file, 5 bytes", "all": None, "name": "b"},
    ]


def test_a_path_that_holds_what_looks_like_a_scheme_is_a_path(tmp_path):
    (tmp_path / "a:").mkdir()
    (tmp_path / "1.png").write_bytes(b"x")
    name = f"{tmp_path}/a://../1.png"
    with pytest.raises(RecordError, match="files of a worker's own disk are read only with"):
        PendingFile(name, ImageReading()).result()
    assert PendingFile(name, ImageReading(allow_local=True)).result() == b"x"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RecordError, match="a folder, pipe or device"):
        PendingFile(f"{tmp_path}/a://../pipe", ImageReading(allow_local=True)).result()


@pytest.mark.parametrize("name", ["gs://", "gs://shop", "gs://shop/", "gs:///1.jpg"])
def test_a_uri_without_an_object_is_refused(name):
    with pytest.raises(RecordError, match="expected a URI with a bucket and the name of an object"):
        PendingFile(name, ImageReading()).result()


def test_the_folder_of_files_on_cloud_storage():
    reading = ImageReading(folder="gs://shop/products/")
    assert reading.place_of("shoes/1.jpg") == "gs://shop/products/shoes/1.jpg"
    assert ImageReading(folder="", allow_local=True).place_of("1.jpg") == "1.jpg"
    assert Path(HERE.place_of("file:///a%20b.jpg")) == Path("/a b.jpg")
