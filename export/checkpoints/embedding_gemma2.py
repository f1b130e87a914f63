"""Reads the parts of an EmbeddingGemma 2 folder that folders of other embedding models lack.

The stack ends with a projection of each token's state. It is linear, so projecting their mean gives
the same embedding, and the projection is the first dense layer. sentence-transformers writes each
text by a chat template, which in the release puts a prompt and a text side by side. Sources: the
class `EmbeddingGemma2TextModel` and the documentation of transformers 5.23.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes

from beam_gemma.errors import CheckpointError
from beam_gemma.model.config_reader import check_size
from beam_gemma.model.newer_config import OUTER_TYPES

EMBEDDING_GEMMA2 = "embedding_gemma2_text"
PROJECTION = "embedding_projection.weight"
"""Name of the projection, after `language_model.`."""
CONTEXT = 8192
"""Longest text in tokens, by the model card; `config.json` states Gemma 4's 262,144 positions."""
PROCESSOR = "processor_config.json"
"""File of the processor, which puts `<bos>` and `<eos>` around what the chat template writes."""
MEDIA = ("<|image|>", "<|video|>", "<|audio|>")
"""Pieces that the chat template writes for what is no text."""
CONTENTS = ("content", "text")
"""Keys of a message and of its parts whose values the chat template writes."""
_SEARCH, _SIMILARITY = (
    "task: search result | query: ",
    "task: sentence similarity | query: ",
)
_CODE, _CLASS = "task: code retrieval | query: ", "task: classification | query: "
_DOCUMENT = "title: none | text: "
PROMPTS = {
    "query": _SEARCH,
    "document": _DOCUMENT,
    "BitextMining": _SEARCH,
    "Classification": _CLASS,
    "Clustering": "task: clustering | query: ",
    "CodeRetrieval": _CODE,
    "Document": _DOCUMENT,
    "FactChecking": "task: fact checking | query: ",
    "InstructionRetrieval": _CODE,
    "MultilabelClassification": _CLASS,
    "PairClassification": _SIMILARITY,
    "QuestionAnswering": "task: question answering | query: ",
    "Reranking": _SEARCH,
    "Retrieval": _SEARCH,
    "Retrieval-document": _DOCUMENT,
    "Retrieval-query": _SEARCH,
    "STS": _SIMILARITY,
    "SearchQuery": _SEARCH,
    "SentenceSimilarity": _SIMILARITY,
    "Summarization": _SIMILARITY,
}
"""The released prompts, for a folder that holds the model without the settings of
sentence-transformers."""


def projection_width(raw: Mapping[str, Any]) -> int:
    """Return the width of the projection's output.

    Args:
        raw: Content of `config.json`.

    Raises:
        ConfigError: the width is no size.
    """
    text = raw["text_config"] if raw["model_type"] in OUTER_TYPES else raw
    return check_size("hidden_size", text.get("embedding_dim", 768))


def adds_markers(folder: Path, raw: Mapping[str, Any], modalities: Mapping[str, Any]) -> bool:
    """Return whether the tokenizer's `<bos>` and `<eos>` come around a text.

    A tokenizer that writes texts by a chat template without a processor adds neither.

    Args:
        folder: The folder.
        raw: Content of its `config.json`.
        modalities: What sentence-transformers takes, by name.
    """
    has_processor = raw["model_type"] in OUTER_TYPES or (folder / PROCESSOR).exists()
    return has_processor or "message" not in modalities


def check_template(file: Path, template: str | None) -> None:
    """Check that a chat template writes a prompt and a text as they are, one after the other.

    The template is parsed and not run: it may write contents of messages, and pieces that stand for
    what is no text.

    Args:
        file: The file that an error names.
        template: The template; None if there is none.

    Raises:
        CheckpointError: the template writes something else, or there is none.
    """
    # transformers 5.23 compiles templates with these settings.
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False)
    try:
        tree = environment.parse(template or "")
    except (jinja2.TemplateError, RecursionError) as error:
        raise CheckpointError(f"{file}: expected a Jinja template, got {error}") from error
    written = [part for output in tree.find_all(nodes.Output) for part in output.nodes]
    lines = [part.lineno for part in written if not _is_content(part)]
    if lines or not written:
        got = f"one that writes something else in line {lines[0]}" if lines else "none"
        raise CheckpointError(
            f"{file}: expected a chat template that writes the contents of messages as they are, "
            f"got {got}; take the one that is published with EmbeddingGemma 2"
        )


def _is_content(part: nodes.Expr) -> bool:
    """Return whether a template writes a message's content, or a piece for what is no text."""
    if isinstance(part, nodes.TemplateData):
        return part.data in MEDIA
    if isinstance(part, nodes.Getattr):
        return part.attr in CONTENTS
    return (
        isinstance(part, nodes.Getitem)
        and isinstance(part.arg, nodes.Const)
        and part.arg.value in CONTENTS
    )
