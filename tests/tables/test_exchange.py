"""Replacing an output: no reader sees rows of two jobs, and a job that breaks off can be undone."""

import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.io.filesystems import FileSystems

from beam_gemma.errors import StorageError
from beam_gemma.storage import match_files
from beam_gemma.tables import exchange, file_sink
from beam_gemma.tables.file_sink import open_sink, stage
from beam_gemma.tables.lease import Standing
from tests.doubles.leases import hold

OLD, NEW, OTHER = "old", "new", "other"
NUM_SHARDS = [(2, 2), (3, 2), (1, 3)]
ROWS = 6


class Killed(BaseException):
    """Ends a job in a test."""


def shards_of(sink, job, number):
    """Stage the shards of a job, whose rows bear its name; return their paths."""
    paths = []
    for shard in range(number):
        table = pa.table({"job": [job] * (ROWS // number)})
        path, file = stage(sink, shard, table.schema)
        file.write(table.to_batches()[0])
        file.close()
        paths.append(path)
    return paths


def write(sink, job, number, *, up_to=Standing.ENDED):
    """Publish an output as a job does."""
    hold(sink, job, up_to=up_to)
    sink.publish(shards_of(sink, job, number), {"job": job})
    sink.clear()


def seen(sink):
    """Return what a reader of `x-*-of-*.parquet` sees, and whose record there is."""
    rows = []
    for path in match_files(f"{sink.prefix}-*-of-*.parquet"):
        with FileSystems.open(path) as stream:
            rows += pq.read_table(stream)["job"].to_pylist()
    return rows, sink._published_by()


def assert_is_whole(sink, job):
    assert seen(sink) == ([job] * ROWS, job)


@pytest.fixture
def sink(tmp_path):
    return open_sink(f"{tmp_path}/x.parquet")


@pytest.fixture
def each_rename(monkeypatch):
    """Have a function called before each rename of a file, with the rename's number."""
    move = exchange.move

    def before(call):
        count = itertools.count()

        def one_by_one(pairs):
            for pair in pairs:
                call(next(count))
                move([pair])

        monkeypatch.setattr(exchange, "move", one_by_one)

    return before


def nothing(_):
    """Let a rename pass."""


@pytest.fixture(params=NUM_SHARDS, ids=lambda numbers: "{} to {}".format(*numbers))
def replaced(request, sink):
    """Return the staged shards of a job that holds the lease of an earlier job's output."""
    earlier, number = request.param
    write(sink, OLD, earlier)
    hold(sink, NEW)
    return shards_of(sink, NEW, number), earlier + 1 + number


def test_a_reader_never_sees_rows_of_two_jobs(sink, replaced, each_rename):
    staged, num_renames = replaced
    views = []
    each_rename(lambda _: views.append(seen(sink)))
    sink.publish(staged, {"job": NEW})
    views.append(seen(sink))
    assert len(views) == num_renames + 1
    for rows, record in views:
        assert len(set(rows)) <= 1
        # A record says that the output is whole.
        assert record is None or rows == [record] * ROWS
    assert_is_whole(sink, NEW)


def test_a_rename_that_fails_leaves_the_earlier_output_whole(sink, replaced, each_rename):
    staged, num_renames = replaced

    def fail(number):
        if number == failing:
            raise OSError(5, "Input/output error")

    for failing in range(num_renames):  # noqa: B007 - `fail` reads it
        each_rename(fail)
        with pytest.raises(StorageError, match=r"x\.parquet: expected to rename its files, got"):
            sink.publish(staged, {"job": NEW})
        assert_is_whole(sink, OLD)
    # Beam tries it again with the same shards.
    each_rename(nothing)
    sink.publish(staged, {"job": NEW})
    assert_is_whole(sink, NEW)


def test_a_record_that_cannot_be_written_leaves_the_earlier_output_whole(
    sink, replaced, monkeypatch
):
    staged, _ = replaced
    monkeypatch.setattr(file_sink, "write_once", lambda *_: (_ for _ in ()).throw(OSError(28)))
    with pytest.raises(StorageError):
        sink.publish(staged, {"job": NEW})
    assert_is_whole(sink, OLD)


def test_the_next_job_puts_back_what_a_killed_one_replaced(
    sink, replaced, each_rename, monkeypatch
):
    staged, num_renames = replaced

    def kill(number):
        if number == killed:
            raise Killed

    monkeypatch.setattr(file_sink.FileSink, "_undo", lambda *_: None)
    for killed in range(num_renames):
        each_rename(kill)
        with pytest.raises(Killed):
            sink.publish(staged, {"job": NEW})
        rows, record = seen(sink)
        assert record is None or killed == 0
        assert len(set(rows)) <= 1
        each_rename(nothing)
        hold(sink, OTHER)
        assert_is_whole(sink, OLD)
        hold(sink, NEW)
        staged = shards_of(sink, NEW, len(staged))
    write(sink, OTHER, 2)
    assert_is_whole(sink, OTHER)


def test_beam_goes_on_with_an_exchange_that_broke_off(sink, replaced, each_rename, monkeypatch):
    """On another worker, with the same shards."""
    staged, num_renames = replaced
    monkeypatch.setattr(file_sink.FileSink, "_undo", lambda *_: None)

    def kill(number):
        if number == 1:  # one more rename each time
            raise Killed

    for _ in range(num_renames - 1):
        each_rename(kill)
        with pytest.raises(Killed):
            sink.publish(staged, {"job": NEW})
    sink.publish(staged, {"job": NEW})
    assert_is_whole(sink, NEW)


def test_a_job_whose_place_was_taken_renames_nothing_more(sink, replaced, monkeypatch):
    """It stands still somewhere, and goes on when another job has published."""
    staged, num_renames = replaced
    check_held = file_sink.check_held
    for paused in range(num_renames + 2):
        count = itertools.count()

        def take_over(*args, paused=paused, count=count):
            if next(count) == paused:
                monkeypatch.setattr(file_sink, "check_held", check_held)
                write(sink, OTHER, 2, up_to=Standing.RUNNING)
            check_held(*args)

        monkeypatch.setattr(file_sink, "check_held", take_over)
        with pytest.raises(StorageError, match="expected the lease of this job, got none"):
            sink.publish(staged, {"job": NEW})
        assert_is_whole(sink, OTHER)
        write(sink, OLD, 3)
        hold(sink, NEW)
        staged = shards_of(sink, NEW, len(staged))


def test_a_staged_shard_that_is_missing_was_not_published(sink, replaced):
    """Although files of an earlier output have the names that the shards would get."""
    staged, _ = replaced
    FileSystems.delete(staged[-1:])
    with pytest.raises(StorageError, match="expected a staged shard to publish, got none"):
        sink.publish(staged, {"job": NEW})
    assert_is_whole(sink, OLD)


def test_a_job_without_the_lease_publishes_nothing(sink):
    write(sink, OLD, 2)
    with pytest.raises(StorageError, match="expected the lease of this job, got none"):
        sink.publish(shards_of(sink, NEW, 2), {"job": NEW})
    hold(sink, OTHER)
    with pytest.raises(StorageError, match="expected the lease of this job, got a job of process"):
        sink.publish(shards_of(sink, NEW, 2), {"job": NEW})
    assert_is_whole(sink, OLD)


def test_a_job_that_a_runner_begins_anew_publishes_its_new_shards(sink, monkeypatch):
    write(sink, OLD, 2)
    hold(sink, NEW)
    with monkeypatch.context() as patch:
        patch.setattr(file_sink.FileSink, "_undo", lambda *_: None)
        patch.setattr(file_sink, "write_once", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            sink.publish(shards_of(sink, NEW, 3), {"job": NEW})
    sink.publish(shards_of(sink, NEW, 2), {"job": NEW})
    sink.clear()
    assert_is_whole(sink, NEW)


@pytest.mark.parametrize("numbers", NUM_SHARDS)
def test_outputs_on_cloud_storage_are_replaced_and_restored(gcp, tmp_path, monkeypatch, numbers):
    sink = open_sink(f"{gcp.bucket}/{tmp_path.name}/x.parquet")
    write(sink, OLD, numbers[0])
    hold(sink, NEW)
    staged = shards_of(sink, NEW, numbers[1])
    with monkeypatch.context() as patch:
        patch.setattr(file_sink, "write_once", lambda *_: (_ for _ in ()).throw(OSError(28)))
        with pytest.raises(StorageError):
            sink.publish(staged, {"job": NEW})
    assert_is_whole(sink, OLD)
    # A worker that copied and did not come to delete.
    written = json.loads(exchange.read_file(f"{sink.work}/publish/{NEW}.json"))
    FileSystems.copy(*map(list, zip(*written["old"], strict=True)))
    sink.publish(staged, {"job": NEW})
    assert_is_whole(sink, NEW)
    sink.clear()
    assert len(match_files(f"{sink.prefix.rpartition('/')[0]}/**")) == numbers[1] + 1
