"""Pieces: what is written is there whole and for good, and says the same however often."""

import os
import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_gemma import storage
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.errors import StorageError
from beam_gemma.inference.saved_results import (
    MAX_ROWS,
    PieceWriter,
    list_pieces,
    merge,
    read_piece,
    run_digest,
    write_piece,
)
from beam_gemma.runtime import devices
from beam_gemma.tasks.generate import GenerateSettings
from beam_gemma.tasks.row_keys import KEY_BYTES, REQUEST_KEY
from tests.conftest import TinyModel

SCHEMA = pa.schema({"completion": pa.string(), "scores": pa.list_(pa.float64(), 2)})
SETTINGS = GenerateSettings(prompt_column="text")
LONG = 3600.0


def key_of(number: int) -> bytes:
    return number.to_bytes(KEY_BYTES, "big")


def result_of(number: int) -> dict[str, object]:
    return {"completion": f"row {number}", "scores": [number / 3, -0.0]}


def piece_of(*rows: dict[str, object], keys: tuple[int, ...] = (1,)) -> pa.RecordBatch:
    schema = pa.schema([pa.field(REQUEST_KEY, pa.binary(KEY_BYTES)), *SCHEMA])
    named = [{REQUEST_KEY: key_of(k), **row} for k, row in zip(keys, rows, strict=True)]
    return pa.RecordBatch.from_pylist(named, schema)


def durable_rows(folder: Path) -> dict[bytes, dict[str, object]]:
    return merge(map(read_piece, list_pieces(str(folder))))


def sizes(folder: Path) -> list[int]:
    return sorted(read_piece(path).num_rows for path in list_pieces(str(folder)))


def until(is_so) -> None:
    end = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_same_results_are_the_same_piece(tmp_path: Path) -> None:
    for _ in range(2):
        write_piece(str(tmp_path), piece_of(result_of(1)))
    write_piece(str(tmp_path), piece_of(result_of(2), keys=(2,)))
    pieces = list_pieces(str(tmp_path))
    assert [len(Path(path).stem) for path in pieces] == [32, 32]
    assert durable_rows(tmp_path) == {key_of(n): result_of(n) for n in (1, 2)}


def test_pieces_are_compressed(tmp_path: Path) -> None:
    rows = [{"completion": "the same words " * 10, "scores": None}] * 100
    write_piece(str(tmp_path), piece_of(*rows, keys=tuple(range(100))))
    (path,) = list_pieces(str(tmp_path))
    assert Path(path).stat().st_size < 5_000, "15,000 letters"


def test_a_folder_that_is_not_there_has_no_pieces(tmp_path: Path) -> None:
    assert list_pieces(f"{tmp_path}/none") == []


@given(st.lists(st.text(st.characters(codec="utf-8")), max_size=5))
def test_any_texts_come_back(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("pieces")
    rows = [{"completion": text, "scores": None} for text in texts]
    write_piece(str(folder), piece_of(*rows, keys=tuple(range(len(rows)))))
    assert list(durable_rows(folder).values()) == rows


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "renamed"])
def test_a_torn_or_foreign_file_is_named(tmp_path: Path, damage: str) -> None:
    write_piece(str(tmp_path), piece_of(result_of(1)))
    (path,) = map(Path, list_pieces(str(tmp_path)))
    content = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(content[:-1])
        case "empty":
            path.write_bytes(b"")
        case "flipped":
            path.write_bytes(content[:99] + bytes([content[99] ^ 1]) + content[100:])
        case "renamed":
            path = path.rename(path.with_name("results.arrow"))
    message = (
        f"{path}: expected a piece of results whose content has the hash in its name, got another; "
        "delete this file, and its rows are computed again"
    )
    with pytest.raises(StorageError, match=f"^{re.escape(message)}$"):
        read_piece(str(path))


def test_what_a_kill_leaves_half_written_is_no_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped just before the file gets its name, as by a kill."""
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(StorageError, match="killed"):
        write_piece(str(tmp_path), piece_of(result_of(1)))
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 1
    assert list_pieces(str(tmp_path)) == []


def test_a_file_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"expected to write \d+ bytes, got .* No space left"):
        storage.write_once(f"{tmp_path}/a/file", b"content " * 9)
    assert list((tmp_path / "a").iterdir()) == []


def test_other_file_systems_get_a_whole_file_or_none(tmp_path: Path) -> None:
    for _ in range(2):
        storage._write_and_rename(f"{tmp_path}/file", b"content")
    (file,) = tmp_path.iterdir()
    assert file.name == "file"
    assert file.read_bytes() == b"content"


@pytest.mark.parametrize(
    "other", [{"completion": "row"}, {"scores": [1 / 3, 0.0]}, {"scores": None}]
)
def test_two_results_of_one_request_are_loud(other: dict[str, object]) -> None:
    one = piece_of(result_of(1))
    assert merge([one, one]) == {key_of(1): result_of(1)}
    message = (
        f"pieces: expected one result of the request {key_of(1).hex()}, got two that differ, as "
        "from machines that do not compute alike; run the job without --resume"
    )
    with pytest.raises(StorageError, match=f"^{re.escape(message)}$"):
        merge([one, piece_of({**result_of(1), **other})])


def test_pieces_grow_with_what_is_done(tmp_path: Path) -> None:
    """At no time more than 2 % of what was done, or a few rows, is not durable yet."""
    writer = PieceWriter(str(tmp_path), SCHEMA, max_age_secs=LONG)
    for number in range(3000):
        writer.add(key_of(number), result_of(number))
        least = number + 1 - max(16, 0.02 * number)
        until(lambda least=least: writer._num_written >= least)
    writer.flush()
    assert durable_rows(tmp_path) == {key_of(n): result_of(n) for n in range(3000)}
    assert sizes(tmp_path)[-1] <= 0.02 * 3000
    assert len(sizes(tmp_path)) < 130


def test_no_piece_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    write = storage.write_once
    monkeypatch.setattr(
        "beam_gemma.inference.saved_results.write_once",
        lambda *piece: gate.wait(30) and write(*piece),
    )
    writer = PieceWriter(str(tmp_path), SCHEMA, max_age_secs=LONG)
    for number in range(2000):
        writer.add(key_of(number), result_of(number))
    gate.set()
    writer.flush()
    assert len(durable_rows(tmp_path)) == 2000
    assert max(sizes(tmp_path)) == MAX_ROWS


def test_a_row_does_not_wait_long_for_others(tmp_path: Path) -> None:
    writer = PieceWriter(str(tmp_path), SCHEMA, max_age_secs=0.2)
    started = time.monotonic()
    writer.add(key_of(1), result_of(1))
    until(lambda: list_pieces(str(tmp_path)))
    assert time.monotonic() - started >= 0.2
    assert durable_rows(tmp_path) == {key_of(1): result_of(1)}


def test_a_piece_has_the_types_of_the_job_whatever_its_rows_hold(tmp_path: Path) -> None:
    writer = PieceWriter(str(tmp_path), SCHEMA)
    writer.add(key_of(1), {"completion": None, "scores": None})
    writer.flush()
    (path,) = list_pieces(str(tmp_path))
    assert read_piece(path).schema == piece_of(result_of(1)).schema


def test_a_writer_does_not_keep_its_process_from_ending(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    PieceWriter(str(tmp_path), SCHEMA)
    (thread,) = set(threading.enumerate()) - before
    assert thread.name == "beam-gemma-pieces"
    assert thread.daemon


def test_flush_is_for_all_callers(tmp_path: Path) -> None:
    writer = PieceWriter(str(tmp_path), SCHEMA, max_age_secs=LONG)
    writer.flush()

    def call(caller: int) -> None:
        for number in range(caller, 800, 8):
            writer.add(key_of(number), result_of(number))
        writer.flush()
        assert {key_of(n) for n in range(caller, 800, 8)} <= set(durable_rows(tmp_path))

    errors: list[BaseException] = []
    threads = [
        threading.Thread(target=lambda c=c: _caught(call, c, errors), daemon=True) for c in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(durable_rows(tmp_path)) == 800


def _caught(call, caller: int, errors: list[BaseException]) -> None:
    try:
        call(caller)
    except BaseException as error:
        errors.append(error)


def test_an_error_of_the_storage_is_told_and_what_was_added_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = storage.write_once
    failing = threading.Event()
    failing.set()

    def flaky(path: str, content: bytes) -> None:
        if failing.is_set():
            raise StorageError("no storage")
        write(path, content)

    monkeypatch.setattr("beam_gemma.inference.saved_results.write_once", flaky)
    writer = PieceWriter(str(tmp_path), SCHEMA, max_age_secs=LONG)
    writer.add(key_of(1), result_of(1))
    for _ in range(2):
        with pytest.raises(StorageError, match="no storage"):
            writer.flush()
    failing.clear()
    writer.add(key_of(2), result_of(2))
    writer.flush()
    assert durable_rows(tmp_path) == {key_of(n): result_of(n) for n in (1, 2)}


def test_a_long_job_hears_of_a_failing_storage_before_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise StorageError("no storage")

    monkeypatch.setattr("beam_gemma.inference.saved_results.write_once", fail)
    writer = PieceWriter(str(tmp_path), SCHEMA, max_age_secs=LONG)
    for number in range(16):
        writer.add(key_of(number), result_of(number))
    until(lambda: writer._error)
    with pytest.raises(StorageError, match="no storage"):
        writer.add(key_of(16), result_of(16))


def test_a_run_is_named_by_all_that_results_depend_on(
    tiny_gemma3: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = tiny_gemma3.artifact
    one = run_digest(artifact, SETTINGS, "cpu")
    assert run_digest(artifact, replace(SETTINGS, prompt_column="body"), "cpu") == one
    others = [
        run_digest(artifact, SETTINGS, "cuda"),
        run_digest(artifact, replace(SETTINGS, sampling=SamplingParams(max_tokens=3)), "cpu"),
        run_digest(replace(artifact, eos_token_ids=(7,)), SETTINGS, "cpu"),
        run_digest(replace(artifact, files={}), SETTINGS, "cpu"),
    ]
    monkeypatch.setattr(devices, "NUMERICS", 0)
    others.append(run_digest(artifact, SETTINGS, "cpu"))
    assert len({one, *others}) == 6
    assert {len(digest) for digest in (one, *others)} == {32}


def test_a_result_that_cannot_be_written_is_heard_of(tmp_path: Path) -> None:
    writer = PieceWriter(str(tmp_path), SCHEMA)
    writer.add(key_of(1), {"completion": "\ud800", "scores": None})
    match = "^pieces: expected results that can be written, got UnicodeEncodeError: 'utf-8' codec"
    with pytest.raises(StorageError, match=match) as raised:
        writer.flush()
    assert isinstance(raised.value.__cause__, UnicodeEncodeError)
