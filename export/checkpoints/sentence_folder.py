"""Reads a sentence-transformers folder: the steps before and after a model's layers.

`modules.json` lists a transformer, a pooling, dense layers and a normalization, each with a
`config.json`. Unsupported modules and settings are refused by name, because a slightly wrong
embedding would go unnoticed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from beam_gemma.errors import CheckpointError, nearest
from beam_gemma.model.config import GemmaConfig
from beam_gemma.model.embedding_config import EmbeddingConfig, Pooling
from export.checkpoints.sidecar_files import read_json, read_optional_json

MODULES = "modules.json"
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
ONLY_TEXT = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
SENTENCE = "sentence_embedding"
IDENTITY = ("torch.nn.modules.linear.Identity", "torch.nn.Identity")


class _Settings:
    """A settings file in which `finish` refuses keys that nobody has read."""

    def __init__(self, file: Path, raw: Mapping[str, Any]) -> None:
        self._file = file
        self._left = dict(raw)
        self._seen: set[str] = set()

    def take(self, key: str, default: Any = None) -> Any:
        self._seen.add(key)
        return self._left.pop(key, default)

    def require(self, **expected: Any) -> None:
        """Check that each setting has its only supported value, or one of a tuple of them."""
        for key, allowed in expected.items():
            values = allowed if isinstance(allowed, tuple) else (allowed,)
            value = self.take(key, values[0])
            if value not in values:
                raise CheckpointError(f"{self._file}: expected {key} {values[0]!r}, got {value!r}")

    def finish(self) -> None:
        for key in self._left:
            raise CheckpointError(
                f"{self._file}: the setting {key!r} is not known{nearest(key, self._seen)}"
            )


def read_sentence_folder(folder: Path, config: GemmaConfig) -> tuple[EmbeddingConfig, list[Path]]:
    """Return the embedding settings and the folders of the dense layers.

    Raises:
        CheckpointError: a module or a setting is not supported.
    """
    paths: dict[str, list[Path]] = {"Transformer": [], "Pooling": [], "Dense": [], "Normalize": []}
    modules: Any = read_json(folder / MODULES)
    kinds = [_kind(folder, module, paths) for module in modules]
    expected = ["Transformer", "Pooling", *["Dense"] * len(paths["Dense"])]
    if kinds not in (expected, [*expected, "Normalize"]) or paths["Transformer"] != [folder]:
        raise CheckpointError(
            f"{folder / MODULES}: expected a Transformer in the folder itself, a Pooling, Dense "
            f"layers and a Normalize, got {', '.join(kinds)}"
        )
    for path in paths["Normalize"]:
        _check_normalize(path / "config.json")
    prompts = _settings(folder / "config_sentence_transformers.json")
    prompts.take("__version__")
    prompts.require(model_type="SentenceTransformer")
    embedding = EmbeddingConfig(
        pooling=_pooling(paths["Pooling"][0] / "config.json"),
        dense_sizes=_dense_sizes(paths["Dense"], config.hidden_size),
        normalize=bool(paths["Normalize"]),
        max_tokens=_max_tokens(folder, config),
        add_bos=_adds(folder, "bos", default=True),
        add_eos=_adds(folder, "eos", default=False),
        prompts=prompts.take("prompts", {}),
        default_prompt_name=prompts.take("default_prompt_name"),
        similarity=prompts.take("similarity_fn_name") or "cosine",
    )
    prompts.finish()
    return embedding, paths["Dense"]


def _kind(folder: Path, module: Mapping[str, Any], paths: dict[str, list[Path]]) -> str:
    """Return the kind of a module and add its folder to `paths`."""
    kind = module["type"].rpartition(".")[2]
    if kind not in paths or not module["type"].startswith("sentence_transformers."):
        raise CheckpointError(
            f"{folder / MODULES}: expected modules of {', '.join(paths)}, got {module['type']}"
        )
    paths[kind].append(folder / module["path"])
    return kind


def _settings(file: Path) -> _Settings:
    """Open a settings file; a missing file means all defaults."""
    return _Settings(file, read_optional_json(file))


def _check_normalize(file: Path) -> None:
    settings = _settings(file)
    settings.require(module_input_name=SENTENCE, module_output_name=(SENTENCE, None))
    settings.finish()


def _pooling(file: Path) -> Pooling:
    settings = _settings(file)
    settings.take("embedding_dimension")
    settings.take("word_embedding_dimension")
    settings.require(include_prompt=True)
    old = [mode for key, mode in OLD_POOLINGS.items() if settings.take(key, False)]
    modes = settings.take("pooling_mode", old or "mean")
    settings.finish()
    [mode, *others] = [modes] if isinstance(modes, str) else modes
    if mode not in POOLINGS or others:
        raise CheckpointError(f"{file}: expected pooling by {' or '.join(POOLINGS)}, got {modes!r}")
    return POOLINGS[mode]


def _dense_sizes(folders: list[Path], width: int) -> tuple[int, ...]:
    sizes = []
    for folder in folders:
        settings = _settings(folder / "config.json")
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
            raise CheckpointError(
                f"{folder / 'config.json'}: expected activation_function {IDENTITY[0]}, "
                f"got {activation}"
            )
        width = settings.take("out_features")
        settings.finish()
        sizes.append(width)
    return tuple(sizes)


def _max_tokens(folder: Path, config: GemmaConfig) -> int:
    """Return the longest text in tokens that the model and its settings or tokenizer allow."""
    settings = _settings(folder / "sentence_bert_config.json")
    limit = settings.take("max_seq_length")
    settings.require(
        do_lower_case=False,
        transformer_task="feature-extraction",
        modality_config=ONLY_TEXT,
        module_output_name="token_embeddings",
    )
    settings.finish()
    if limit is None:
        limit = _tokenizer_config(folder).get("model_max_length")
    most = config.max_position_embeddings
    return most if limit is None else min(int(limit), most)


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    return read_optional_json(folder / "tokenizer_config.json")


def _adds(folder: Path, token: str, *, default: bool) -> bool:
    """Return whether the tokenizer adds `<bos>` or `<eos>`, from its setting or its template."""
    setting = _tokenizer_config(folder).get(f"add_{token}_token")
    if setting is not None:
        return bool(setting)
    processor = read_optional_json(folder / "tokenizer.json").get("post_processor")
    if not processor:
        return default
    template = processor.get("single", ())
    return any(part.get("SpecialToken", {}).get("id") == f"<{token}>" for part in template)
