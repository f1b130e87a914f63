"""A model that processes share: no way in, nothing unpickled, nobody waits for ever."""

import json
import multiprocessing
import os
import pickle
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import apache_beam as beam
import psutil
import pyarrow as pa
import pytest
from apache_beam.ml.inference.base import RunInference
from apache_beam.utils import multi_process_shared

from beam_gemma import errors
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.errors import EngineError
from beam_gemma.inference import model_server, shared_model, wire
from beam_gemma.inference.carried_rows import RowCarrier
from beam_gemma.inference.handlers import (
    GemmaClassifyModelHandler,
    GemmaEmbedModelHandler,
    GemmaGenerateModelHandler,
)
from beam_gemma.inference.shared_model import SharedModel
from beam_gemma.inference.wire import ERRORS, HEADER, Kind
from beam_gemma.structured.output import StructuredOutput
from beam_gemma.tasks.generate import GenerateSettings
from beam_gemma.tasks.questions import ClassifySettings
from beam_gemma.tasks.text_encoder import EmbedSettings
from tests.doubles.fake_models import FakeHandler, completion_of, local_pipeline
from tests.doubles.workers_path import NO_TORCH

KEY = "key"
SCHEMA = pa.schema({"said": pa.string(), "error": pa.string()})
NOBODY = 65534
"""Another user."""
SLOW_ROWS, SLOW_SECS = 7, 2.5
"""Rows that take longer than an owner may be silent, if they are asked for at once."""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The folder of all seats, in a temporary directory of the test's own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"beam-gemma-engines-{os.geteuid()}"


@pytest.fixture
def brief(monkeypatch):
    """Waits of seconds, not minutes."""
    monkeypatch.setattr(wire, "TICK_SECS", 0.05)
    monkeypatch.setattr(shared_model, "WARNING_SECS", 0.6)
    monkeypatch.setattr(shared_model, "LIMIT_SECS", 2.0)


class Echo:
    """A model that says what is asked; it raises an error that is to be raised."""

    def __init__(self, error=None):
        self.error = error
        self.counts = {"rows": 0}

    def __call__(self, rows):
        if self.error is not None:
            raise self.error
        self.counts["rows"] += len(rows)
        if len(rows) == SLOW_ROWS:
            time.sleep(SLOW_SECS)
        return [{"said": json.loads(row["__encoded"]), "error": None} for row in rows]

    def take_counts(self):
        counts, self.counts = self.counts, {"rows": 0}
        return counts

    def take_pulse(self):
        return {"samples": [], "pid": os.getpid()}


class Asked(dict):
    """A row that has been encoded."""

    def __init__(self, text):
        super().__init__(__encoded=json.dumps(text).encode())


def carrier():
    return RowCarrier(lambda row: row, lambda _: None)


def shared(model=None):
    """Return the model, in this process the first time, then through the socket."""
    return SharedModel(KEY, lambda: model or Echo(), carrier, SCHEMA)


def own(load_secs, beat_secs, begun):
    """Be the process that has the model, until killed."""
    model_server.BEAT_SECS = beat_secs

    def load():
        begun.set()
        time.sleep(load_secs)
        return Echo()

    _model = SharedModel(KEY, load, carrier, SCHEMA)
    signal.pause()


@pytest.fixture
def owner(folder, monkeypatch):
    """A function that starts a process that has the model, once it has begun to load it."""
    monkeypatch.setenv("TMPDIR", str(folder.parent))
    monkeypatch.syspath_prepend(NO_TORCH)
    started = []

    def start(load_secs=0.0, beat_secs=0.1):
        spawn = multiprocessing.get_context("spawn")
        begun = spawn.Event()
        process = spawn.Process(target=own, args=(load_secs, beat_secs, begun))
        process.start()
        started.append(process)
        assert begun.wait(60)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def test_a_second_user_of_the_model_is_answered_through_the_socket():
    first = shared()
    second = SharedModel(KEY, lambda: pytest.fail("loaded twice"), carrier, SCHEMA)
    assert second([Asked("a"), Asked("ü")]) == [
        {"said": "a", "error": None}, {"said": "ü", "error": None},
    ]  # fmt: skip
    assert first([Asked("b")])[0]["said"] == "b"
    assert second([]) == []
    assert (second.take_counts(), first.take_counts()) == ({"rows": 3}, {"rows": 0})
    assert second.take_pulse() == {"samples": [], "pid": os.getpid()}


def test_a_model_lives_as_long_as_a_process_uses_it(folder):
    first = shared()
    second = shared()
    del first
    assert second([Asked("a")])[0]["said"] == "a"
    del second
    deadline = time.monotonic() + 10
    while list(folder.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("name", ERRORS)
def test_errors_of_ours_keep_their_type_and_sentence(name):
    sentence = "row 7: expected ü, got \udc80"
    first = shared(Echo(getattr(errors, name)(sentence)))
    for model in (first, shared()):
        with pytest.raises(getattr(errors, name)) as caught:
            model([Asked("a")])
        assert type(caught.value).__name__ == name
        assert str(caught.value) == sentence


def test_errors_of_others_are_an_engines_in_one_sentence():
    _first = shared(Echo(ValueError("two\nlines")))
    with pytest.raises(EngineError, match=r"^engine: .* got ValueError: two lines; see the log"):
        shared()([Asked("a")])


def test_only_errors_of_ours_are_looked_up_by_name():
    for name in ("SystemExit", "os", "one_line", "difflib"):
        assert type(wire.failure_of(json.dumps([name, "x"]).encode())) is EngineError


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", [None, 0, 255, *Kind])
def test_a_pickle_that_is_sent_is_not_run(folder, tmp_path, kind):
    model = shared()
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    message = bomb if kind is None else HEADER.pack(kind, len(bomb)) + bomb
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(folder / "key.socket"))
        client.settimeout(10)
        ready = client.recv(HEADER.size)
        assert ready == HEADER.pack(Kind.READY, 0)
        client.sendall(message)
        client.shutdown(socket.SHUT_WR)
        with suppress(ConnectionError):
            while client.recv(1 << 16):
                pass
    assert not (tmp_path / "exploded").exists()
    assert model([Asked("a")])[0]["said"] == "a"
    assert shared()([Asked("a")])[0]["said"] == "a"


INTRUDER = """
import os, socket, sys
os.setgroups([]); os.setgid({user}); os.setuid({user})
client = socket.socket(socket.AF_UNIX)
client.settimeout(20)
try:
    client.connect({path!r})
    print("connected", client.recv(100))
except Exception as error:
    print(type(error).__name__)
"""


def intrude(path):
    code = INTRUDER.format(user=NOBODY, path=str(path))
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    ).stdout.strip()


@pytest.fixture
def open_folder(monkeypatch):
    """The folder of all seats, in a temporary directory that all users can enter, as /tmp is."""
    with tempfile.TemporaryDirectory(dir="/tmp") as parent:
        Path(parent).chmod(0o755)
        monkeypatch.setattr(tempfile, "tempdir", parent)
        yield Path(parent) / f"beam-gemma-engines-{os.geteuid()}"


def test_another_user_cannot_connect(open_folder, monkeypatch, caplog):
    model = shared()
    assert stat.S_IMODE(open_folder.stat().st_mode) == 0o700
    if os.geteuid():  # nobody else to be
        monkeypatch.setattr(wire, "peer_of", lambda _: (1, NOBODY))
        with pytest.raises(EngineError, match=f"got process 1 of user {NOBODY}"):
            shared()
        return
    assert intrude(open_folder / "key.socket") == "PermissionError"
    # Even if somebody opened the folder.
    open_folder.chmod(0o755)
    (open_folder / "key.socket").chmod(0o777)
    assert intrude(open_folder / "key.socket") == "connected b''"
    deadline = time.monotonic() + 10
    while f"of user {NOBODY}" not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert model([Asked("a")])[0]["said"] == "a"


class Watching(FakeHandler):
    """Notes the ports at which this process listens while rows are computed."""

    ports: tuple[int, ...] | None = None

    def run_inference(self, batch, model, inference_args=None):
        found = psutil.Process().net_connections("inet")
        Watching.ports = tuple(c.laddr.port for c in found if c.status == psutil.CONN_LISTEN)
        return super().run_inference(batch, model, inference_args)


def test_no_server_of_beam_is_opened_and_no_port_listens(folder, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("Beam's server unpickles what any user sends to it")

    monkeypatch.setattr(multi_process_shared.MultiProcessShared, "__init__", refuse)
    settings = GenerateSettings(prompt_column="text", sampling=SamplingParams(max_tokens=3))
    handler = Watching(settings)
    assert not handler.share_model_across_processes()
    with local_pipeline() as pipeline:
        _ = pipeline | beam.Create([{"text": "a"}]) | RunInference(handler)
    assert Watching.ports == ()
    for file in folder.rglob("*"):
        assert not file.stat().st_mode & 0o077 or file.is_socket()


@pytest.mark.usefixtures("brief")
def test_a_stopped_owner_is_noted_then_an_error_and_can_go_on(owner, caplog):
    process = owner()
    model = shared()
    assert model([Asked("a")])[0]["said"] == "a"
    os.kill(process.pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(EngineError) as caught:
        model([Asked("a")])
    assert 2 <= time.monotonic() - began < 6
    assert re.fullmatch(
        r"engine: expected a sign of life from the process that runs it for this machine "
        rf"\({process.pid}, stopped\) within 2 s, got none; continue or end that process, "
        r"then run the job again",
        str(caught.value),
    )
    (warning,) = caplog.messages
    assert re.match(rf"engine: .*\({process.pid}, stopped\) has given no sign of life", warning)
    with pytest.raises(EngineError, match="sign of life"):  # nor is it awaited by new connections
        shared()
    os.kill(process.pid, signal.SIGCONT)
    assert model([Asked("b")])[0]["said"] == "b"


@pytest.mark.usefixtures("brief")
def test_an_owner_that_is_stopped_for_a_while_answers_later(owner, caplog):
    process = owner()
    model = shared()
    os.kill(process.pid, signal.SIGSTOP)
    threading.Timer(1.2, os.kill, (process.pid, signal.SIGCONT)).start()
    assert model([Asked("x" * 1_000_000)] * 3)[2]["said"] == "x" * 1_000_000
    (warning,) = caplog.messages
    assert "has given no sign of life for" in warning


@pytest.mark.usefixtures("brief")
def test_rows_that_a_stopped_owner_does_not_take_are_an_error_too(owner):
    process = owner()
    model = shared()
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(EngineError, match="sign of life"):
        model([Asked("x" * 3_000_000)])


@pytest.mark.usefixtures("brief")
def test_an_owner_that_takes_long_is_not_stopped(owner, caplog):
    owner(load_secs=SLOW_SECS + 1)
    model = shared()
    assert model([Asked("a")] * SLOW_ROWS)[0]["said"] == "a"
    assert not caplog.messages


def test_an_owner_that_dies_while_it_loads_is_followed(owner, caplog):
    process = owner(load_secs=60.0)
    threading.Timer(0.5, process.kill).start()
    model = shared()
    assert model([Asked("a")])[0]["said"] == "a"
    (warning,) = caplog.messages
    assert f"process {process.pid}, which ran it for this machine, has died" in warning


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_of_the_owner_is_answered_by_it(folder):
    """A forked process has a copy of the model, but none of its threads."""
    model = shared()
    context = multiprocessing.get_context("fork")
    said = context.SimpleQueue()
    child = context.Process(target=lambda: said.put(model.take_pulse()["pid"]))
    child.start()
    assert said.get() == os.getpid()
    child.join(20)
    assert (folder / "key.lock").exists()
    assert model([Asked("b")])[0]["said"] == "b"


GREEDY = SamplingParams(max_tokens=8)
STRUCTURED = StructuredOutput(
    json_schema={
        "type": "object",
        "properties": {"n": {"type": "number"}, "day": {"type": "string", "format": "date"}},
        "required": ["n"],
        "additionalProperties": False,
    }
)
SETTINGS = GenerateSettings(
    prompt="{text} {when}",
    key_column="id",
    sampling=SamplingParams(max_tokens=8, temperature=50.0),
)


class Opaque:
    """A value that cannot be pickled."""

    def __str__(self):
        return "opaque"

    def __reduce__(self):
        raise TypeError


def test_rows_of_any_values_have_the_results_that_they_have_in_the_models_process():
    handler = FakeHandler(SETTINGS)
    when = time.gmtime(0)
    rows = [
        {"text": "a", "when": 1.0, "id": 1},
        {"text": "a", "when": 1, "id": 1},
        {"text": "a", "when": 1, "id": 2},
        {"text": "a", "when": 1, "id": None},
        {"text": "a", "when": 1},
        {"text": None, "when": 1},
        {"text": "a", "when": [when, {"b": b"\xff"}], "id": "x"},
        {"text": "a", "when": 1, "__row_key": "7"},
        {"text": "a", "when": Opaque(), "id": 10**30},
    ]
    own, other = handler.load_model(), handler.load_model()
    results = other(rows)
    assert results == own(rows)
    assert sum(result["error"] is not None for result in results) >= 2
    assert len({result["completion"] for result in results}) >= 5
    plain = FakeHandler(GenerateSettings(sampling=SamplingParams(max_tokens=3)))
    _own, other = plain.load_model(), plain.load_model()
    assert other(["a"])[0]["completion"] == completion_of("a")


@pytest.mark.parametrize(
    ("handler_of", "settings"),
    [
        (GemmaGenerateModelHandler, GenerateSettings(prompt="{text}", sampling=GREEDY)),
        (GemmaGenerateModelHandler, GenerateSettings(prompt="{text}", structured=STRUCTURED)),
        (GemmaClassifyModelHandler, ClassifySettings(prompt="{text}", labels=("a", "{id}"))),
        (GemmaEmbedModelHandler, EmbedSettings(text_column="text")),
        (GemmaEmbedModelHandler, EmbedSettings(text_column="text", embedding_dtype="float16")),
    ],
    ids=["generate", "structured", "classify", "embed", "embed float16"],
)
def test_results_are_those_of_the_models_process(all_tasks_model, handler_of, settings):
    handler = handler_of(all_tasks_model, settings)
    own, other = handler.load_model(), handler.load_model()
    rows = [{"text": text, "id": 1} for text in ("a", "some words", None)]
    batch = pa.RecordBatch.from_pylist(rows)
    (expected,), (found,) = (handler.run_inference([batch], model) for model in (own, other))
    assert found.inference == expected.inference
    assert found.inference.schema == handler.settings.result_schema
    for one, two in zip(*(handler.run_inference(rows, m) for m in (own, other)), strict=True):
        assert two.inference == one.inference
    assert [result["error"] is None for result in found.inference.to_pylist()] == [1, 1, 0]
