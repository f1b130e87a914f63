"""Private parts of other libraries: each is as in the version that the code names.

After an upgrade, read each part anew, then change the version in the module that uses it.
"""

import argparse
import ast
import importlib
import os
import re
import string
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import apache_beam as beam
import onnxruntime
import psutil
import pytest
from apache_beam.ml.inference.base import ModelHandler
from apache_beam.ml.transforms.base import EmbeddingsManager
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability import common_urns
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.portability.fn_api_runner import worker_handlers
from apache_beam.runners.portability.prism_runner import PrismJobServer, PrismRunner
from apache_beam.runners.worker.data_plane import (
    ClosableOutputStream,
    TimeBasedBufferingClosableOutputStream,
)
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.typehints.row_type import RowTypeConstraint

from beam_gemma import beam_internals
from beam_gemma.cli.flags import ArgumentGroup, FlagParser, beam_flag_parser
from beam_gemma.errors import BudgetError, OptionsError
from beam_gemma.runtime import devices
from beam_gemma.runtime.bound_graph import is_lack_of_memory
from tests.doubles.fake_models import local_pipeline

ROOT = Path(__file__).parent.parent
OF_OTHERS = {
    "beam_internals": {"_add_argparse_args", "_environments", "_grpc_server"},
    "cli.flags": {"_ArgumentGroup", "_get_value", "_option_string_actions"},
    "cli.stop": {"_run_exitfuncs"},
    "inputs.image_processor": {"_imaging"},
}
"""Private names of others, by module of beam_gemma; a method also overrides `_get_values`."""
PUBLIC = {"_asdict", "_exit"}
"""Names with an underscore that Python documents, of named tuples and of `os`."""
SENTENCE = "row 7: expected a text, got a number; cast it"


class Lengths(EmbeddingsManager):
    """Embeds a text by its length."""

    def get_model_handler(self):
        return LengthHandler()

    def get_ptransform_for_processing(self, **_):
        raise NotImplementedError


class LengthHandler(ModelHandler):
    def load_model(self):
        return len

    def run_inference(self, batch, model, inference_args=None):  # noqa: ARG002
        return [[float(model(text))] for text in batch]


def test_versions_are_those_that_the_code_names() -> None:
    assert version("apache-beam") == beam_internals.BEAM_VERSION == "2.77.0"
    assert onnxruntime.__version__ == devices.ONNXRUNTIME_VERSION == "1.31.1"


def test_workers_take_their_time_limit_from_the_part(monkeypatch) -> None:
    monkeypatch.undo()
    source = Path(worker_handlers.__file__).read_text()
    assert re.search(r"^DATA_BUFFER_TIME_LIMIT_MS = 1000$", source, re.MULTILINE)
    assert source.count("DATA_BUFFER_TIME_LIMIT_MS") == 3
    monkeypatch.setattr(worker_handlers, "DATA_BUFFER_TIME_LIMIT_MS", 1000)
    for is_timed in (True, False):
        stream = ClosableOutputStream.create(None, None, worker_handlers.DATA_BUFFER_TIME_LIMIT_MS)
        assert isinstance(stream, TimeBasedBufferingClosableOutputStream) == is_timed
        beam_internals.send_whole()


def test_a_run_on_this_machine_does_not_download_prism(monkeypatch) -> None:
    options = beam_internals.without_prism(["--runner=DirectRunner"])
    with pytest.raises(ValueError, match=r"Unable to parse binary URL \"/nonexistent\""):
        PrismJobServer(options).path_to_binary()
    with_prism = PrismJobServer(PipelineOptions([]))
    monkeypatch.setattr(PrismJobServer, "_prepare_executable", lambda _, url: url, raising=False)
    assert with_prism._resolve_source_path().startswith("https://github.com/apache/beam/")


def test_a_run_on_this_machine_does_not_try_prism(monkeypatch) -> None:
    """An attempt, though it fails, opens a port at which anybody can start a worker."""
    tried = []
    monkeypatch.setattr(PrismRunner, "run_pipeline", lambda *_: tried.append(1))
    pipeline = beam.Pipeline(options=beam_internals.without_prism(["--runner=DirectRunner"]))
    _ = pipeline | beam.Create([1])
    pipeline.run().wait_until_finish()
    assert tried == []


def addresses_of(pid: int) -> list[str]:
    """Return the addresses at which a process listens."""
    found = psutil.Process(pid).net_connections("inet")
    return sorted({c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN})


@pytest.mark.parametrize("mode", ["multi_threading", "multi_processing"])
def test_workers_of_the_local_runner_are_reached_by_this_user_alone(
    mode, monkeypatch, tmp_path
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    beam_internals.private_ports()
    before = set(Path("/tmp").glob("beam-gemma-workers-*"))
    runner, folders = os.getpid(), tmp_path / "folders"
    pipeline = local_pipeline(f"--direct_running_mode={mode}")

    def look(_):
        made = set(Path("/tmp").glob("beam-gemma-workers-*")) - before
        folders.write_text("".join(f"{path.stat().st_mode & 0o777:o}" for path in made))
        return addresses_of(runner)

    logs = {"::1", "::ffff:127.0.0.1", "127.0.0.1"} if mode == "multi_processing" else set()
    addresses = pipeline | beam.Create([1]) | beam.FlatMap(look) | beam.combiners.ToSet()
    assert_that(addresses | beam.Map(lambda found: found - logs), equal_to([set()]))
    pipeline.run().wait_until_finish()
    assert "700" in folders.read_text()


def test_workers_elsewhere_keep_their_ports() -> None:
    beam_internals.private_ports()
    beam_internals.private_ports()  # once is enough
    environments = {"a": beam_runner_api_pb2.Environment(urn=common_urns.environments.DOCKER.urn)}
    manager = worker_handlers.WorkerHandlerManager(environments, None)
    server = worker_handlers.GrpcServer(manager.state_servicer, None, manager)
    try:
        assert isinstance(server.control_port, int)
        handler = object.__new__(worker_handlers.GrpcWorkerHandler)
        handler._grpc_server = server
        assert handler.host_from_worker() == "localhost"
    finally:
        server.close()


@pytest.fixture
def long_path(tmp_path, monkeypatch):
    """A folder for temporary files whose path is too long for a socket in it."""
    beam_internals.private_ports()
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))


@pytest.mark.usefixtures("long_path")
def test_a_path_too_long_for_a_socket_gives_way_to_a_short_one() -> None:
    manager = worker_handlers.WorkerHandlerManager({}, None)
    server = worker_handlers.GrpcServer(manager.state_servicer, None, manager)
    server.close()
    assert Path(server.control_port).parent.parent == Path("/tmp")
    assert Path(server.control_port).parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.usefixtures("long_path")
def test_no_place_for_a_socket_is_one_sentence(monkeypatch) -> None:
    monkeypatch.setattr(beam_internals.os, "access", lambda *_: False)
    manager = worker_handlers.WorkerHandlerManager({}, None)
    with pytest.raises(OptionsError, match=r"^TMPDIR: expected .*; set it to .* shorter path$"):
        worker_handlers.GrpcServer(manager.state_servicer, None, manager)


def test_beams_parser_takes_the_flags_of_all_groups() -> None:
    parser = beam_flag_parser()
    base = beam.options.pipeline_options._BeamArgumentParser
    assert isinstance(parser, FlagParser)
    assert isinstance(parser, base)
    assert callable(base.add_value_provider_argument)
    assert {"--runner", "--project", "--prism_location"} <= set(parser.names())


def test_the_handler_of_text_columns_embeds_texts_of_the_manager() -> None:
    handler = beam_internals.text_embedding_handler(Lengths(columns=["a", "b"]))
    assert isinstance(handler, ModelHandler)
    rows = [{"id": 1, "a": "bread", "b": ""}, {"id": 2, "a": "tea", "b": "x"}]
    assert handler.run_inference(rows, handler.load_model()) == [
        {"id": 1, "a": [5.0], "b": [0.0]},
        {"id": 2, "a": [3.0], "b": [1.0]},
    ]


def test_fields_of_rows_have_names_and_types() -> None:
    rows = RowTypeConstraint.from_fields([("id", int), ("text", str)])
    assert beam_internals.row_fields(rows) == (("id", int), ("text", str))
    assert beam_internals.row_fields(dict[str, int]) is None


@pytest.mark.parametrize("mode", ["in_memory", "multi_threading", "multi_processing"])
def test_an_error_of_ours_is_found_in_a_workers_failure(mode, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pipeline = local_pipeline(f"--direct_running_mode={mode}")

    def fail(_):
        raise BudgetError(SENTENCE)

    _ = pipeline | beam.Create([1]) | "Fail" >> beam.Map(fail)
    with pytest.raises((RuntimeError, BudgetError)) as caught:
        pipeline.run().wait_until_finish()
    if mode == "in_memory":
        assert isinstance(caught.value, BudgetError)
        found = str(caught.value)
    else:
        found = beam_internals.sentence_of_worker(caught.value)
    assert beam_internals.without_step(found) == SENTENCE
    assert BudgetError.__name__ in repr(caught.value)


def test_the_last_error_of_ours_in_a_text_is_the_one() -> None:
    name = "beam_gemma.errors"
    text = f"Traceback\n{name}.OptionsError: first\n{name}.BudgetError: {SENTENCE}"
    assert beam_internals.sentence_of_worker(RuntimeError(text)) == SENTENCE
    assert beam_internals.sentence_of_worker(RuntimeError("ValueError: x")) is None


@pytest.mark.parametrize(
    ("owner", "name", "use"),
    [
        (worker_handlers, "DATA_BUFFER_TIME_LIMIT_MS", beam_internals.send_whole),
        (
            "options.pipeline_options",
            "PrismRunnerOptions",
            lambda: beam_internals.without_prism([]),
        ),
        ("options.pipeline_options", "TypeOptions", lambda: beam_internals.without_prism([])),
        (worker_handlers, "GrpcServer", beam_internals.private_ports),
        ("options.pipeline_options", "_BeamArgumentParser", beam_flag_parser),
        (
            "ml.transforms.base",
            "_TextEmbeddingHandler",
            lambda: beam_internals.text_embedding_handler(None),
        ),
    ],
    ids=["time limit", "Prism", "triggers", "servers", "parser", "handler"],
)
def test_a_part_that_is_gone_is_one_sentence(owner, name, use, monkeypatch) -> None:
    module = importlib.import_module(f"apache_beam.{owner}") if isinstance(owner, str) else owner
    monkeypatch.delattr(module, name)
    expected = (
        f"apache-beam 2.77.0: expected {module.__name__}.{name} as in version 2.77.0, got: .*; "
        "install apache-beam==2.77.0"
    )
    with pytest.raises(OptionsError, match=expected):
        use()


def test_argparse_takes_what_our_parser_overrides() -> None:
    parser = FlagParser(allow_abbrev=False)
    group = parser.add_argument_group("a")
    group.add_argument("--stop", action="append")
    assert isinstance(group, ArgumentGroup)
    assert parser.names() == ["-h", "--help", "--stop"]
    assert parser.parse_args(["--stop=--", "--stop=a"]).stop == ["--", "a"]
    assert callable(argparse.ArgumentParser._get_values)


def test_argparse_of_this_python_drops_the_value_of_two_dashes() -> None:
    """Where this fails, Python takes `--flag=--` itself, and `_get_values` can go."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--stop")
    if sys.version_info[:2] == (3, 11):
        assert parser.parse_args(["--stop=--"]).stop == []


def test_exceptions_of_onnx_runtime_are_what_a_bad_graph_raises(tmp_path) -> None:
    assert [error.__name__ for error in devices.LOAD_ERRORS] == [
        "Fail", "InvalidGraph", "InvalidProtobuf", "NoSuchFile",
    ]  # fmt: skip
    assert all(issubclass(error, Exception) for error in devices.LOAD_ERRORS)
    (tmp_path / "bad.onnx").write_bytes(string.ascii_letters.encode())
    for name in ("bad.onnx", "none.onnx"):
        with pytest.raises(devices.LOAD_ERRORS):
            onnxruntime.InferenceSession(tmp_path / name, providers=["CPUExecutionProvider"])


def test_onnx_runtime_without_its_exceptions_is_one_sentence(monkeypatch) -> None:
    monkeypatch.delattr(onnxruntime.capi.onnxruntime_pybind11_state, "InvalidGraph")
    with pytest.raises(ImportError, match=r"onnxruntime 1\.31\.1: expected .* as in version 1\.31"):
        devices._load_errors()


def test_onnx_runtime_says_that_memory_has_run_out() -> None:
    with pytest.raises(MemoryError) as caught:
        onnxruntime.OrtValue.ortvalue_from_shape_and_type([1 << 46], "float32")
    assert is_lack_of_memory(caught.value)


def trees() -> Iterator[tuple[str, ast.Module]]:
    folder = ROOT / "beam_gemma"
    for path in sorted(folder.rglob("*.py")):
        yield ".".join(path.relative_to(folder).with_suffix("").parts), ast.parse(path.read_text())


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def defined(tree: ast.Module) -> Iterator[str]:
    """Yield the names that a module defines, among them attributes that it assigns."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def used(tree: ast.Module) -> Iterator[str]:
    """Yield the private names that a module imports, or reads from an object."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        else:
            names = [node.attr] if isinstance(node, ast.Attribute) else []
        yield from filter(is_private, names)


def test_private_names_of_others_stand_where_they_are_guarded() -> None:
    ours = {name for _, tree in trees() for name in defined(tree)} | PUBLIC
    found = {module: set(used(tree)) - ours for module, tree in trees()}
    assert {module: names for module, names in found.items() if names} == OF_OTHERS


@pytest.mark.parametrize(
    ("text", "module"),
    [
        ("prism_location=", "beam_internals"),
        ("allow_unsafe_triggers", "beam_internals"),
        ("GrpcServer", "beam_internals"),
        ("DATA_BUFFER_TIME_LIMIT_MS", "beam_internals"),
        ("_BeamArgumentParser", "beam_internals"),
        ("_TextEmbeddingHandler", "beam_internals"),
        ("pybind11_state", "runtime.devices"),
        (r"beam_gemma\.errors", "beam_internals"),
    ],
)
def test_a_part_is_named_in_one_module(text, module) -> None:
    paths = (ROOT / "beam_gemma").rglob("*.py")
    users = {path.relative_to(ROOT / "beam_gemma") for path in paths if text in path.read_text()}
    assert users == {Path(module.replace(".", "/")).with_suffix(".py")}


def test_beam_internals_imports_only_beam_and_errors() -> None:
    tree = next(tree for module, tree in trees() if module == "beam_internals")
    froms = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    plain = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    others = {name.partition(".")[0] for name in froms | plain} - sys.stdlib_module_names
    assert others == {"apache_beam", "beam_gemma"}
    assert {name for name in froms if name.startswith("beam_gemma")} == {"beam_gemma.errors"}
