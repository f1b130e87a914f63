"""The public face: what `beam_gemma` exports, and its documentation."""

import ast
import doctest
import subprocess
import sys
from pathlib import Path

import apache_beam as beam
import pytest

import beam_gemma

ROOT = Path(__file__).parent.parent
NAMES = {
    "ArtifactError", "AudioReading", "BalanceError", "BeamGemmaError", "BudgetError",
    "CheckpointError", "Classify", "ClassifySettings", "ConfigError", "DeviceError", "Embed",
    "EmbedSettings", "EngineError", "FailuresError", "GemmaClassifyModelHandler",
    "GemmaEmbedModelHandler", "GemmaGenerateModelHandler", "GemmaTextEmbeddings", "Generate",
    "GenerateSettings", "ImageReading", "InferTable", "Limits", "ModerateSettings", "OptionsError",
    "Policy", "PromptTooLongError", "ReadTable", "RecordError", "SamplingParams", "Shot",
    "StorageError", "StructuredOutput", "WriteTable",
}  # fmt: skip


def test_the_public_names_are_these() -> None:
    assert set(beam_gemma.PUBLIC) == NAMES
    assert set(dir(beam_gemma)) >= NAMES | {"__version__"}


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(beam_gemma.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == beam_gemma.PUBLIC


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_public_name_is_the_class_of_its_module(name: str) -> None:
    value = getattr(beam_gemma, name)
    assert (value.__module__, value.__name__) == (beam_gemma.PUBLIC[name], name)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_public_name_has_a_docstring_whose_example_runs(
    name: str, all_tasks_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors are documented by one example, of their base."""
    monkeypatch.chdir(ROOT)
    value = getattr(beam_gemma, name)
    names = {"beam": beam, "MODEL": all_tasks_model, "OUT": str(tmp_path / "out")}
    names |= {other: getattr(beam_gemma, other) for other in NAMES}
    (example,) = doctest.DocTestFinder(recurse=False).find(value, name, globs=names)
    is_error = issubclass(value, beam_gemma.BeamGemmaError)
    assert example.docstring
    assert example.examples or (is_error and name != "BeamGemmaError")
    assert doctest.DocTestRunner().run(example).failed == 0


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Generates'"):
        _ = beam_gemma.Generates


def test_the_package_loads_neither_beam_nor_onnxruntime() -> None:
    code = "import sys, beam_gemma; print({'apache_beam', 'onnxruntime'} & set(sys.modules))"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ran.stdout == "set()\n"


def test_examples_and_readme_use_the_public_face_alone() -> None:
    readme = (ROOT / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    for source in (readme, (ROOT / "examples/one_pass.py").read_text()):
        nodes = ast.walk(ast.parse(source))
        used = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
        assert {module for module in used if module.startswith("beam_gemma")} == {"beam_gemma"}
