"""Reads a sentence-transformers folder: the steps before and after a model's layers.

`modules.json` lists a transformer, a pooling, dense layers and a normalization, each with a
`config.json`. Unsupported modules and settings are refused by name, because a slightly wrong
embedding would go unnoticed. An EmbeddingGemma 2 may come without these files: the module list and
the prompts are then those of its release (`embedding_gemma2.py`).
"""

import math
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from beam_gemma.errors import CheckpointError, nearest
from beam_gemma.model.config import GemmaConfig
from beam_gemma.model.embedding_config import EmbeddingConfig, Pooling
from export.checkpoints.bounds import inside, read_file
from export.checkpoints.embedding_gemma2 import (
    CONTEXT,
    EMBEDDING_GEMMA2,
    PROMPTS,
    adds_markers,
    check_template,
    projection_width,
)
from export.checkpoints.sidecar_files import (
    are_texts,
    chat_template,
    json_value,
    read_optional_json,
)

MODULES, TOKENIZER_CONFIG = "modules.json", "tokenizer_config.json"
MAX_MODULES = 64
MAX_DENSE_SIZE = 1 << 17
POOLINGS: dict[str, Pooling] = {"mean": "mean", "lasttoken": "lasttoken"}
OLD_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Older settings, one switch per mode, that `pooling_mode` replaced."""
FORWARD = {"method": "forward", "method_output_name": "last_hidden_state"}
ONLY_TEXT = {"text": FORWARD}
MODALITIES = {
    **dict.fromkeys(("text", "image", "audio", "video"), FORWARD),
    "message": {**FORWARD, "format": "structured"},
}
"""What the transformer of an EmbeddingGemma 2 may take; as messages, texts go through a chat
template."""
SENTENCE = "sentence_embedding"
IDENTITY = ("torch.nn.modules.linear.Identity", "torch.nn.Identity")
PROMPTS_FILE = "config_sentence_transformers.json"
RELEASED = (
    {"type": "sentence_transformers.models.Transformer", "path": ""},
    {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
    {"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"},
)
"""Modules of an EmbeddingGemma 2, whose folder may lack their list."""


class _Settings:
    """A settings file in which `finish` refuses keys that nobody has read."""

    def __init__(self, folder: Path, name: str) -> None:
        """Open a file of a checkpoint's folder; a missing one means all defaults."""
        self._file = folder / name
        self._left = read_optional_json(folder, name)
        self._seen: set[str] = set()

    def take(self, key: str, default: Any = None) -> Any:
        self._seen.add(key)
        return self._left.pop(key, default)

    def refuse(self, key: str, expected: str, got: Any) -> CheckpointError:
        """Return the error of a setting that is not as expected."""
        return CheckpointError(f"{self._file}: expected {key} {expected}, got {reprlib.repr(got)}")

    def text(self, key: str) -> str | None:
        """Take a string, or None if there is none."""
        value = self.take(key)
        if not isinstance(value, str | None):
            raise self.refuse(key, "as text", value)
        return value

    def length(self, key: str) -> float | None:
        """Take a number from 1, or None if there is none."""
        value = self.take(key)
        if value is not None and (type(value) not in (int, float) or not 1 <= value < math.inf):
            raise self.refuse(key, "as a number from 1", value)
        return value

    def require(self, **expected: Any) -> None:
        """Check that each setting has its only supported value, or one of a tuple of them."""
        for key, allowed in expected.items():
            values = allowed if isinstance(allowed, tuple) else (allowed,)
            value = self.take(key, values[0])
            if value not in values:
                raise self.refuse(key, repr(values[0]), value)

    def finish(self) -> None:
        for key in self._left:
            raise CheckpointError(
                f"{self._file}: the setting {reprlib.repr(key)} is not known"
                f"{nearest(key, self._seen)}"
            )


def read_sentence_folder(
    folder: Path, config: GemmaConfig, raw: Mapping[str, Any]
) -> tuple[EmbeddingConfig, list[str]]:
    """Return the embedding settings and the folders of the dense layers, relative to this one.

    The projection of an EmbeddingGemma 2 is a dense layer before those, without a folder.

    Args:
        folder: The checkpoint's folder.
        config: Its architecture.
        raw: Content of its `config.json`.

    Raises:
        CheckpointError: a module or a setting is not supported.
        ConfigError: the width of an EmbeddingGemma 2's projection is no size.
    """
    is_gemma2 = config.model_type == EMBEDDING_GEMMA2
    paths: dict[str, list[str]] = {"Transformer": [], "Pooling": [], "Dense": [], "Normalize": []}
    kinds = [_kind(folder, module, paths) for module in _modules(folder, is_gemma2=is_gemma2)]
    expected = ["Transformer", "Pooling", *["Dense"] * len(paths["Dense"])]
    if kinds not in (expected, [*expected, "Normalize"]) or [
        folder / path for path in paths["Transformer"]
    ] != [folder]:
        raise CheckpointError(
            f"{folder / MODULES}: expected a Transformer in the folder itself, a Pooling, Dense "
            f"layers and a Normalize, got {', '.join(kinds)}"
        )
    for path in paths["Normalize"]:
        _check_normalize(_Settings(folder, f"{path}/config.json"))
    widths = (config.hidden_size, *([projection_width(raw)] if is_gemma2 else []))
    limit, modalities = _transformer(folder, is_gemma2=is_gemma2)
    if "message" in modalities:
        check_template(folder, chat_template(folder))
    has_markers = not is_gemma2 or adds_markers(folder, raw, modalities)
    embedding = EmbeddingConfig(
        pooling=_pooling(_Settings(folder, f"{paths['Pooling'][0]}/config.json")),
        dense_sizes=(*widths[1:], *_dense_sizes(folder, paths["Dense"], widths[-1])),
        normalize=bool(paths["Normalize"]),
        max_tokens=_max_tokens(folder, config, limit),
        add_bos=has_markers and _adds(folder, "bos", default=True),
        add_eos=has_markers and _adds(folder, "eos", default=is_gemma2),
        **_prompt_settings(folder, PROMPTS if is_gemma2 else {}),
    )
    return embedding, paths["Dense"]


def _prompt_settings(folder: Path, released: Mapping[str, str]) -> dict[str, Any]:
    """Return the prompts, the default one's name and the similarity of `EmbeddingConfig`.

    Args:
        folder: The checkpoint's folder.
        released: Prompts of a folder without settings of them.
    """
    settings = _Settings(folder, PROMPTS_FILE)
    settings.take("__version__")
    settings.require(model_type="SentenceTransformer")
    default = {} if (folder / PROMPTS_FILE).exists() else dict(released)
    prompts = settings.take("prompts", default)
    if not isinstance(prompts, dict) or not are_texts(prompts):
        raise settings.refuse("prompts", "as texts by name", prompts)
    default_name = settings.text("default_prompt_name")
    similarity = settings.text("similarity_fn_name") or "cosine"
    settings.finish()
    return {"prompts": prompts, "default_prompt_name": default_name, "similarity": similarity}


def _modules(folder: Path, *, is_gemma2: bool) -> Sequence[Mapping[str, str]]:
    """Return the type and the path of each module."""
    file = inside(folder, MODULES)
    if is_gemma2 and not file.exists():
        return RELEASED
    modules = json_value(read_file(file), file)
    if (
        isinstance(modules, list)
        and len(modules) <= MAX_MODULES
        and all(
            isinstance(m, dict)
            and isinstance(m.get("type"), str)
            and isinstance(m.get("path"), str)
            for m in modules
        )
    ):
        return modules
    raise CheckpointError(
        f"{file}: expected a list of at most {MAX_MODULES} modules with type and path, got "
        f"{reprlib.repr(modules)}"
    )


def _kind(folder: Path, module: Mapping[str, str], paths: dict[str, list[str]]) -> str:
    """Return the kind of a module and add its folder to `paths`."""
    kind = module["type"].rpartition(".")[2]
    if kind not in paths or not module["type"].startswith("sentence_transformers."):
        raise CheckpointError(
            f"{folder / MODULES}: expected modules of {', '.join(paths)}, got {module['type'][:80]}"
        )
    paths[kind].append(module["path"])
    return kind


def _check_normalize(settings: _Settings) -> None:
    settings.require(module_input_name=SENTENCE, module_output_name=(SENTENCE, None))
    settings.finish()


def _pooling(settings: _Settings) -> Pooling:
    settings.take("embedding_dimension")
    settings.take("word_embedding_dimension")
    settings.require(include_prompt=True)
    old = [mode for key, mode in OLD_POOLINGS.items() if settings.take(key, False)]
    modes = settings.take("pooling_mode", old or "mean")
    settings.finish()
    for mode, pooling in POOLINGS.items():
        if modes in (mode, [mode]):
            return pooling
    raise settings.refuse("pooling", f"by {' or '.join(POOLINGS)}", modes)


def _dense_sizes(folder: Path, paths: list[str], width: int) -> tuple[int, ...]:
    sizes = []
    for path in paths:
        settings = _Settings(folder, f"{path}/config.json")
        settings.require(
            in_features=width,
            bias=False,
            use_residual=False,
            module_input_name=SENTENCE,
            module_output_name=(SENTENCE, None),
        )
        # The default activation is tanh.
        activation = settings.take("activation_function", "torch.nn.Tanh")
        if activation not in IDENTITY:
            raise settings.refuse("activation_function", IDENTITY[0], activation)
        width = settings.take("out_features")
        if type(width) is not int or not 1 <= width <= MAX_DENSE_SIZE:
            raise settings.refuse(
                "out_features", f"as a whole number from 1 to {MAX_DENSE_SIZE:,}", width
            )
        settings.finish()
        sizes.append(width)
    return tuple(sizes)


def _transformer(folder: Path, *, is_gemma2: bool) -> tuple[float | None, Mapping[str, Any]]:
    """Return the longest text in tokens that the transformer allows, and what it takes, by name."""
    settings = _Settings(folder, "sentence_bert_config.json")
    limit = settings.length("max_seq_length")
    modalities = settings.take("modality_config", ONLY_TEXT)
    settings.require(
        do_lower_case=False,
        transformer_task="feature-extraction",
        module_output_name="token_embeddings",
    )
    settings.finish()
    known = MODALITIES if is_gemma2 else ONLY_TEXT
    if not isinstance(modalities, dict) or not (
        "text" in modalities and all(known.get(key) == value for key, value in modalities.items())
    ):
        raise settings.refuse("modality_config", f"with text, of {known}", modalities)
    return limit, modalities


def _max_tokens(folder: Path, config: GemmaConfig, limit: float | None) -> int:
    """Return the longest text in tokens that the model and its settings or tokenizer allow."""
    if limit is None:
        limit = _Settings(folder, TOKENIZER_CONFIG).length("model_max_length")
    most = config.max_position_embeddings
    if config.model_type == EMBEDDING_GEMMA2:
        most = min(most, CONTEXT)
    return most if limit is None else min(int(limit), most)


def _adds(folder: Path, token: str, *, default: bool) -> bool:
    """Return whether the tokenizer adds `<bos>` or `<eos>`, from its setting or its template."""
    settings = _Settings(folder, TOKENIZER_CONFIG)
    setting = settings.take(f"add_{token}_token")
    if not isinstance(setting, bool | None):
        raise settings.refuse(f"add_{token}_token", "as true or false", setting)
    if setting is not None:
        return setting
    settings = _Settings(folder, "tokenizer.json")
    processor = settings.take("post_processor")
    if not processor:
        return default
    template = processor.get("single", []) if isinstance(processor, dict) else None
    if not isinstance(template, list) or not all(isinstance(part, dict) for part in template):
        raise settings.refuse("post_processor", "with a list of single parts", processor)
    special = (part.get("SpecialToken") for part in template)
    return any(isinstance(part, dict) and part.get("id") == f"<{token}>" for part in special)
