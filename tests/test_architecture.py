"""The house as its own source says it is: arrows, sizes, legends, no torch on a worker."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("beam_gemma", "export", "pipelines", "templates", "examples", "benchmarks")
# Each module of beam_gemma may import only modules named on an earlier line.
LAYERS = [
    "errors owner progress data_commons summary pulse charts keys batches language machines",
    "config embedding_config prompt report durable partitions places prefix regex_language staging",
    "signature tokenizer sampling jsonl block_pool infill bigquery_client bigquery_schema versions",
    "kv_cache artifact runner text_rows prompt_encoder source sink labels subschema automaton",
    "capacity padding device_memory read_ahead start_up",
    "guide session parquet_source jsonl_source bigquery_source file_sink bigquery_sink",
    "device_state bound_graph",
    "sequence layout model_folder json_formats flag_types container_image profiles estimate",
    "scheduler packing next_token flight examples task json_values json_numbers step_buffers",
    "executor columns questions text_encoder embedding_steps tables requests shard pieces",
    "engine policy embed run_record supervision json_scalars cuda_session",
    "tally json_schema limits",
    "structured open_session",
    "generate classify fewshot flags task_handler",
    "handlers dataflow",
    "transforms ask write_table table_flags estimate_options",
    "generate_options embed_options classify_options text_embeddings",
    "preview preflight",
    "launch",
]
LEVEL = {name: i for i, line in enumerate(LAYERS) for name in line.split()}
EXPORT_MAY_USE = {"errors", "config", "embedding_config", "signature", "tokenizer", "artifact"}
USERS_OF_BEAM = (
    "durable pieces batches source sink parquet_source jsonl_source bigquery_source file_sink "
    "bigquery_sink tables table_flags examples task_handler handlers transforms ask write_table "
    "text_embeddings flags dataflow staging estimate_options launch"
)
HOME_OF_BEAM = set(USERS_OF_BEAM.split())
NOT_ON_A_WORKER = {"torch", "transformers", "onnx", "onnxscript", "onnx_ir", "safetensors", "gguf"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
ANNOTATION = re.compile(r"(Float|Int|UInt|Bool|Shaped)\d*")


def sources(*folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> Iterator[str]:
    """Yield the dotted names that a file imports, inside functions too."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def library_imports(path: Path) -> set[str]:
    return {n.split(".")[1] for n in imports(path) if n.startswith("beam_gemma.")}


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    return (n for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef))


def ids(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_design_page_shows_the_layers() -> None:
    page = (ROOT / "docs/design.md").read_text()
    assert "```\n" + "\n".join("  ".join(line.split()) for line in LAYERS) + "\n```" in page


def test_every_module_has_its_layer() -> None:
    modules = {p.stem for p in sources("beam_gemma")} - {"__init__"}
    assert modules == set(LEVEL)


@pytest.mark.parametrize("path", sources("beam_gemma"), ids=ids)
def test_library_imports_point_down(path: Path) -> None:
    if path.stem == "__init__":
        assert not list(imports(path))
        return
    upward = {m for m in library_imports(path) if LEVEL[m] >= LEVEL[path.stem]}
    assert not upward, f"imports {sorted(upward)}"


def test_export_uses_only_the_seams() -> None:
    for path in sources("export"):
        assert library_imports(path) <= EXPORT_MAY_USE | {"__version__"}, path
    above = {"export", "pipelines", "templates"}
    for path in sources("beam_gemma", "pipelines"):
        assert not {n.split(".")[0] for n in imports(path)} & above, path


@pytest.mark.parametrize(
    ("package", "home"),
    [
        ("onnxruntime", {"session", "bound_graph"}),
        ("cuda", {"device_memory"}),
        ("sentencepiece", {"tokenizer"}),
        ("jinja2", {"prompt"}),
        ("llguidance", {"guide"}),
        ("jsonschema", {"subschema"}),
        ("apache_beam", HOME_OF_BEAM),
    ],
)
def test_a_package_has_one_home(package: str, home: set[str]) -> None:
    users = {
        p.stem for p in sources("beam_gemma") if package in {n.split(".")[0] for n in imports(p)}
    }
    assert users <= home


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
            *(f"import beam_gemma.{module}" for module in LEVEL),
        ]
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=200)


@pytest.mark.parametrize("path", sources(*PACKAGES, "tests"), ids=ids)
def test_files_and_functions_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_FILE_LINES
    for function in functions(path):
        assert function.end_lineno is not None
        length = function.end_lineno - function.lineno + 1
        assert length <= MAX_FUNCTION_LINES, f"{function.name} has {length} lines"


@pytest.mark.parametrize("path", sources("beam_gemma", "export", "pipelines", "templates"), ids=ids)
def test_dimension_letters_are_in_the_legend(path: Path) -> None:
    used = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Subscript) and ANNOTATION.fullmatch(ast.unparse(node.value)):
            assert isinstance(node.slice, ast.Tuple)
            used |= set(str(ast.literal_eval(node.slice.elts[1])).split())
    docstring = ast.get_docstring(tree(path)) or ""
    legend = re.search(r"Dimensions: (.*?)(\n\n|\Z)", docstring, re.DOTALL)
    explained = set(re.findall(r"\b[A-Z]\b", legend[1])) if legend else set()
    assert {letter for letter in used if letter.isalpha()} <= explained


@pytest.mark.parametrize("path", sources("beam_gemma", "export", "pipelines", "templates"), ids=ids)
def test_everything_is_caught_only_where_a_row_ends(path: Path) -> None:
    """`except Exception` needs a comment that says why: the row boundary, or a waiting caller."""
    lines = path.read_text().splitlines()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, "a bare except"
            if ast.unparse(node.type) in ("Exception", "BaseException"):
                assert "#" in lines[node.lineno - 1], f"line {node.lineno}"


def test_no_open_ends() -> None:
    words = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    for path in sources(*PACKAGES, "tests"):
        if path != Path(__file__):
            assert not words.search(path.read_text()), path
