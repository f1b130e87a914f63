"""The architecture, held by the source itself: wings, sizes, legends, and no torch on a worker."""

import ast
import functools
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = ("beam_gemma", "export", "pipelines", "templates")
PACKAGES = (*CODE, "examples", "benchmarks")
# A wing of beam_gemma may import the ground and the wings named with it, nothing else of ours.
GROUND = ("errors", "beam_internals", "batches", "versions", "storage")
WINGS = {
    "monitoring": "",
    "model": "",
    "inputs": "model",
    "structured": "model",
    "runtime": "monitoring model",
    "engine": "monitoring model structured runtime",
    "tasks": "monitoring model inputs structured runtime engine",
    "tables": "monitoring",
    "inference": "monitoring model inputs structured runtime engine tasks",
    "jobs": "monitoring model inputs tasks tables inference",
    "dataflow": "model tables",
    "cli": "monitoring model inputs structured runtime engine tasks tables inference jobs dataflow",
}
EXPORT_MAY_USE = {"errors", "model"}
HOMES = {
    "PIL": {"inputs.image_processor", "inputs.images"},
    "apache_beam": {
        "beam_internals", "storage", "batches", "tables.source", "tables.sink",
        "tables.parquet_source", "tables.jsonl_source", "tables.bigquery_source",
        "tables.file_sink", "tables.bigquery_sink", "tables.open_table", "inference.*",
        "jobs.infer_table", "jobs.write_table", "dataflow.*", "cli.*",
    },
    "cuda": {"runtime.device_memory"},
    "jinja2": {
        "inputs.chat_template", "inputs.pure_macros", "inputs.template_sandbox",
        "monitoring.html_report",
    },
    "jsonschema": {"structured.schema_node"},
    "llguidance": {"structured.constraint"},
    "onnxruntime": {"runtime.devices", "runtime.cpu_session", "runtime.bound_graph"},
    "sentencepiece": {"model.tokenizer"},
    "soundfile": {"inputs.sound_file"},
    "soxr": {"inputs.sound_file"},
}  # fmt: skip
"""Packages of others that few modules may import; `wing.*` is all of a wing."""
NOT_ON_A_WORKER = {"torch", "transformers", "onnx", "onnxscript", "onnx_ir", "safetensors", "gguf"}
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
ANNOTATION = re.compile(r"(Float|Int|UInt|Bool|Shaped)\d*")


@functools.cache
def sources(*folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> Iterator[str]:
    """Yield the dotted names that a file imports, inside functions too."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(path: Path) -> str:
    """Return a module's name within beam_gemma: `errors`, `engine.kv_cache`."""
    return ".".join(path.relative_to(ROOT / "beam_gemma").with_suffix("").parts)


MODULES = {module_of(p) for p in sources("beam_gemma") if p.stem != "__init__"}


def library_imports(path: Path) -> set[str]:
    """Return the modules of beam_gemma that a file imports."""
    names = (n.removeprefix("beam_gemma.") for n in imports(path) if n.startswith("beam_gemma."))
    return {m for name in names for m in (name, name.rpartition(".")[0]) if m in MODULES}


def wing_of(module: str) -> str:
    return module.partition(".")[0]


def test_each_wing_imports_only_the_wings_it_names() -> None:
    order = [*GROUND, *WINGS]
    for wing, names in WINGS.items():
        assert all(order.index(name) < order.index(wing) for name in names.split()), wing
        for path in sources(f"beam_gemma/{wing}"):
            used = {wing_of(m) for m in library_imports(path)} - {wing, *GROUND}
            assert used <= set(names.split()), f"{path} imports {sorted(used)}"
    for name in GROUND:
        used = {wing_of(m) for m in library_imports(ROOT / f"beam_gemma/{name}.py")}
        assert used <= set(GROUND), name


def test_every_module_lies_in_a_wing_or_on_the_ground() -> None:
    assert {wing_of(module) for module in MODULES} == {*GROUND, *WINGS, "preflight"}
    for wing in WINGS:
        assert ast.get_docstring(tree(ROOT / "beam_gemma" / wing / "__init__.py"))


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        module_of(path): library_imports(path)
        for path in sources("beam_gemma")
        if path.stem != "__init__"
    }
    graphlib.TopologicalSorter(graph).prepare()


def test_the_design_page_shows_the_wings() -> None:
    page = (ROOT / "docs/design.md").read_text()
    for wing, names in WINGS.items():
        assert f"| `{wing}` |" in page
        row = next(line for line in page.splitlines() if line.startswith(f"| `{wing}` |"))
        assert row.split("|")[-2].split() == names.split(), row


def test_export_uses_only_errors_and_the_model_wing() -> None:
    for path in sources("export"):
        assert {wing_of(m) for m in library_imports(path)} <= EXPORT_MAY_USE, path
    above = {"export", "pipelines", "templates"}
    for path in sources("beam_gemma", "pipelines"):
        assert not {n.split(".")[0] for n in imports(path)} & above, path


@pytest.mark.parametrize("package", HOMES)
def test_a_package_of_others_is_imported_only_where_it_is_at_home(package: str) -> None:
    homes = HOMES[package]
    users = {
        module_of(p)
        for p in sources("beam_gemma")
        if package in {n.split(".")[0] for n in imports(p)}
    }
    assert {m for m in users if m not in homes and f"{wing_of(m)}.*" not in homes} == set()


def test_the_library_imports_without_torch() -> None:
    """In a process where what a worker lacks cannot be imported."""
    code = "\n".join(
        [
            "import sys",
            "class Block:",
            "    def find_spec(self, name, path=None, target=None):",
            f"        if name.split('.')[0] in {NOT_ON_A_WORKER | {'export', 'pipelines'}}:",
            "            raise ModuleNotFoundError(name, name=name)",
            "sys.meta_path.insert(0, Block())",
            *(f"import beam_gemma.{module}" for module in sorted(MODULES)),
        ]
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=200)


def test_files_and_functions_stay_small() -> None:
    for path in sources(*PACKAGES, "tests"):
        assert len(path.read_text().splitlines()) <= MAX_FILE_LINES, path
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                length = node.end_lineno - node.lineno + 1
                assert length <= MAX_FUNCTION_LINES, f"{path}: {node.name} has {length} lines"


def test_dimension_letters_are_in_the_legend() -> None:
    for path in sources(*CODE):
        used = set()
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Subscript) and ANNOTATION.fullmatch(ast.unparse(node.value)):
                assert isinstance(node.slice, ast.Tuple)
                used |= set(str(ast.literal_eval(node.slice.elts[1])).split())
        docstring = ast.get_docstring(tree(path)) or ""
        legend = re.search(r"Dimensions: (.*?)(\n\n|\Z)", docstring, re.DOTALL)
        explained = set(re.findall(r"\b[A-Z]\b", legend[1])) if legend else set()
        assert {letter for letter in used if letter.isalpha()} <= explained, path


def test_everything_is_caught_only_where_a_row_ends() -> None:
    """`except Exception` needs a comment that says why: the row boundary, or a waiting caller."""
    for path in sources(*CODE):
        lines = path.read_text().splitlines()
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{path}: a bare except"
                if ast.unparse(node.type) in ("Exception", "BaseException"):
                    assert "#" in lines[node.lineno - 1], f"{path}: line {node.lineno}"


def test_no_open_ends() -> None:
    words = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    for path in sources(*PACKAGES, "tests"):
        if path != Path(__file__):
            assert not words.search(path.read_text()), path
