"""The exported model: one folder, any device.

manifest.json          format, architecture, signatures, checksums, where the model comes from
generate.cpu.onnx      one graph for each head and device, without weights
weights/               external data of all graphs: links to the checkpoint's files, and newly
                       written files
tokenizer.model        SentencePiece
chat_template.jinja    if the checkpoint has one
legal/                 license, terms and notices of the model
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from beam_gemma.errors import ArtifactError, BeamGemmaError, one_line
from beam_gemma.model.config import ENCODER_DECODERS, GemmaConfig
from beam_gemma.model.embedding_config import EmbeddingConfig
from beam_gemma.model.field_types import first_fault
from beam_gemma.model.graph_tensors import Device, Head
from beam_gemma.model.rope import RopeParameters
from beam_gemma.model.signature import HEADS, Signature
from beam_gemma.model.sound_config import SoundConfig
from beam_gemma.model.vision_config import VisionConfig

FORMAT = 1
"""Format number; increased when workers of older versions cannot run new exports."""
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
CHAT_TEMPLATE = "chat_template.jinja"
LEGAL = "legal"
DESCRIPTION = frozenset([TOKENIZER, CHAT_TEMPLATE])
"""Files that, with the manifest, suffice to build prompts for a model."""
WEIGHTS = "weights"
"""Folder of the external data of all graphs."""
MANIFEST_BYTES = 16 << 20
"""Largest manifest that is read."""
MAX_NAME = 1000
"""Longest name of a file, with its folders, in characters."""
SMALL_FILE_BYTES = 16 << 20
"""Files up to this size are checked in full each time a folder is opened."""
PURPOSES: Mapping[Head, str] = {
    **{head: task for task, head in HEADS.items()}, "encode": "encode", "vision": "see",
    "sound": "hear",
}  # fmt: skip
"""What the graph of each head is for: a task, or to encode sources, see pictures or hear clips for
one."""
LOGGER = logging.getLogger(__name__)
_SHA256 = re.compile("[0-9a-f]{64}")
# What a description raises while it is built from a field of another type or value.
_FAULTS = (
    BeamGemmaError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """Manifest entry of one file."""

    num_bytes: int
    sha256: str | None
    """Checksum in hex; None for weights whose checksum the exporter was told to skip."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Artifact:
    """An opened model folder."""

    path: Path
    name: str
    config: GemmaConfig
    precision: str
    signatures: Mapping[tuple[Head, Device], Signature]
    eos_token_ids: tuple[int, ...]
    """Token ids that end a generated text."""
    source: Mapping[str, str]
    """Checkpoint name, its format and exporter version."""
    files: Mapping[str, FileEntry]
    """Manifest entries by path relative to the folder."""
    embedding: EmbeddingConfig | None = None
    """Embedding configuration; None if the model makes no embeddings."""
    vision: VisionConfig | None = None
    """What the model needs for pictures; None if it takes none."""
    sound: SoundConfig | None = None
    """What the model needs for sound; None if it takes none."""
    encoder: GemmaConfig | None = None
    """Encoder of an encoder-decoder, whose decoder is `config`; None for a decoder alone."""

    @classmethod
    def open(cls, path: str | Path, *, of_weights: bool = True) -> "Artifact":
        """Open a folder and verify the sizes of all files and the checksums of small ones.

        Args:
            path: Model folder.
            of_weights: Whether to verify all files, not only those in `DESCRIPTION`.

        Raises:
            ArtifactError: there is no such folder, it is of another format, or a file is damaged.
        """
        artifact = cls.read(Path(path))
        names = artifact.files.keys() if of_weights else artifact.files.keys() & DESCRIPTION
        if of_weights:
            artifact._check_strays()
        artifact._check_sizes(names)
        artifact._check_sums(n for n in names if artifact.files[n].num_bytes <= SMALL_FILE_BYTES)
        return artifact

    @classmethod
    def read(cls, folder: Path) -> "Artifact":
        """Read a folder's manifest without verifying its files.

        Raises:
            ArtifactError: there is no manifest, or it is of another format.
        """
        manifest = _read_manifest(folder)
        try:
            artifact = cls(
                path=folder,
                name=manifest["name"],
                config=_config_from_json(manifest["config"]),
                precision=manifest["precision"],
                signatures={
                    (s.head, s.device): s for s in map(Signature.from_json, manifest["signatures"])
                },
                eos_token_ids=tuple(manifest["eos_token_ids"]),
                source=manifest["source"],
                files={name: FileEntry(**entry) for name, entry in manifest["files"].items()},
                embedding=_embedding_from_json(manifest.get("embedding")),
                vision=_vision_from_json(manifest.get("vision")),
                sound=_sound_from_json(manifest.get("sound")),
                encoder=_encoder_from_json(manifest.get("encoder")),
            )
        except _FAULTS as error:
            raise _not_of_the_format(folder, " ".join(str(error).split())[:200]) from error
        if fault := first_fault(artifact):
            raise _not_of_the_format(folder, fault)
        artifact._check_encoder()
        artifact._check_entries()
        return artifact

    def verify(self) -> None:
        """Verify all checksums, including those of weights.

        Files of weights that were exported with `--checksums later` have none; a warning says so,
        as only their sizes were checked.

        Raises:
            ArtifactError: a file differs from the exported one.
        """
        self._check_sums(self.files)
        if num_without := sum(entry.sha256 is None for entry in self.files.values()):
            LOGGER.warning(
                "%s: %d files of weights have no checksum, so that only their sizes are checked; "
                "export the model with --checksums now",
                self.path,
                num_without,
            )

    @property
    def reader(self) -> GemmaConfig:
        """The stack that reads prompts: the encoder of an encoder-decoder, or else the decoder."""
        return self.encoder or self.config

    @property
    def devices(self) -> tuple[Device, ...]:
        """Devices that the folder has graphs for."""
        return tuple(dict.fromkeys(device for _, device in self.signatures))

    @property
    def tokenizer_path(self) -> Path:
        """Path of the SentencePiece model."""
        return self.path / TOKENIZER

    @property
    def chat_template(self) -> str | None:
        """Chat template of the checkpoint; None if it has none."""
        file = self.path / CHAT_TEMPLATE
        return file.read_text() if CHAT_TEMPLATE in self.files else None

    @property
    def digest(self) -> str:
        """Hash over all files, which identifies the model's exact content."""
        entries = {name: (e.num_bytes, e.sha256) for name, e in sorted(self.files.items())}
        return hashlib.sha256(json.dumps(entries).encode()).hexdigest()

    def signature(self, head: Head, device: Device) -> Signature:
        """Return the signature of one graph.

        Raises:
            ArtifactError: the folder was exported without that graph.
        """
        if (head, device) not in self.signatures:
            have = ", ".join(f"{PURPOSES[h]} on {d}" for h, d in self.signatures)
            task = "generate" if head == "encode" else PURPOSES[head]
            is_tower = head in ("vision", "sound")
            how = "without --text_only, with" if is_tower else f"with --tasks {task}"
            raise ArtifactError(
                f"{self.path}: expected a graph to {PURPOSES[head]} on {device}, got {have}; "
                f"export the model again {how} --device {device}"
            )
        return self.signatures[head, device]

    def graph_path(self, head: Head, device: Device) -> Path:
        """Return the path of one graph's ONNX file."""
        self.signature(head, device)
        return self.path / graph_name(head, device)

    def _check_encoder(self) -> None:
        """Check that a model's two stacks suit each other, and that there are two if one needs it.

        Raises:
            ArtifactError: an encoder is missing, is not of this decoder, or has none.
        """
        config, encoder = self.config, self.encoder
        width = None if encoder is None else encoder.hidden_size
        is_pair = encoder is not None and (
            encoder.model_type == config.model_type
            and encoder.use_bidirectional_attention
            and encoder.cross_attention_hidden_size is None
        )
        has_two = config.model_type in ENCODER_DECODERS
        if has_two != is_pair or config.cross_attention_hidden_size != width:
            got = "no encoder" if encoder is None else "an encoder of another model"
            raise _not_of_the_format(self.path, f"{got} beside a config of {config.model_type}")

    def _check_entries(self) -> None:
        """Check that the manifest says enough of each file to verify it, and stays in its folder.

        Raises:
            ArtifactError: a file is outside the folder, unknown, or without a checksum.
        """
        manifest = self.path / MANIFEST
        for name, entry in self.files.items():
            if not _is_inside(name):
                raise ArtifactError(
                    f"{manifest}: expected files inside the folder, got {name!r:.200}; export the "
                    "model again"
                )
            is_without = entry.sha256 is None and name.startswith(f"{WEIGHTS}/")
            if not is_without and not _SHA256.fullmatch(entry.sha256 or ""):
                raise ArtifactError(
                    f"{manifest}: expected the sha256 of {name}, got {entry.sha256!r:.80}; export "
                    "the model again"
                )
        graphs = (graph_name(head, device) for head, device in self.signatures)
        if missing := {TOKENIZER, *graphs} - self.files.keys():
            raise ArtifactError(
                f"{manifest}: expected an entry for {min(missing)}, got none; export the model "
                "again"
            )

    def _check_strays(self) -> None:
        """Check that the manifest knows all files of weights, of which graphs name some."""
        for file in sorted((self.path / WEIGHTS).rglob("*")):
            name = file.relative_to(self.path).as_posix()
            if name not in self.files and not file.is_dir():
                raise ArtifactError(
                    f"{file}: expected only files of the model's {MANIFEST}, got another; remove it"
                )

    def _check_sizes(self, names: Iterable[str]) -> None:
        for name in names:
            file, entry = self.path / name, self.files[name]
            if not file.is_file():
                raise ArtifactError(f"{file}: expected a file of the model, got nothing")
            if file.stat().st_size != entry.num_bytes:
                raise ArtifactError(
                    f"{file}: expected {entry.num_bytes:,} bytes, got {file.stat().st_size:,}; "
                    "the folder is damaged, copy or export it again"
                )

    def _check_sums(self, names: Iterable[str]) -> None:
        for name in names:
            sha256 = self.files[name].sha256
            if sha256 is not None and sha256_of(self.path / name) != sha256:
                raise ArtifactError(
                    f"{self.path / name}: expected sha256 {sha256}, got another; "
                    "the folder is damaged, copy or export it again"
                )


def graph_name(head: Head, device: Device) -> str:
    """Return the file name of a graph."""
    return f"{head}.{device}.onnx"


def write_manifest(
    folder: Path,
    *,
    name: str,
    config: GemmaConfig,
    precision: str,
    signatures: tuple[Signature, ...],
    eos_token_ids: tuple[int, ...],
    source: Mapping[str, str],
    embedding: EmbeddingConfig | None = None,
    vision: VisionConfig | None = None,
    sound: SoundConfig | None = None,
    encoder: GemmaConfig | None = None,
    without_checksum: frozenset[str] = frozenset(),
) -> None:
    """Write the manifest of a finished folder, so that `Artifact.open` accepts it."""
    names = sorted(
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.is_file() and file.name != MANIFEST
    )
    summed = [n for n in names if n not in without_checksum]
    with ThreadPoolExecutor() as pool:
        sums = dict(zip(summed, pool.map(lambda n: sha256_of(folder / n), summed), strict=True))
    manifest = {
        "format": FORMAT,
        "name": name,
        "config": asdict(config),
        "precision": precision,
        "signatures": [signature.to_json() for signature in signatures],
        "eos_token_ids": list(eos_token_ids),
        "source": dict(source),
        "embedding": None if embedding is None else embedding.to_json(),
        "vision": None if vision is None else vision.to_json(),
        "sound": None if sound is None else sound.to_json(),
        "encoder": None if encoder is None else asdict(encoder),
        "files": {
            n: {"num_bytes": (folder / n).stat().st_size, "sha256": sums.get(n)} for n in names
        },
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def sha256_of(file: Path) -> str:
    """Return the checksum of a file in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_inside(name: str) -> bool:
    """Return whether a name is a plain path within a folder, which file systems accept."""
    parts = name.split("/")
    is_plain = name.isprintable() and not {"", ".", ".."} & set(parts)
    return is_plain and len(name) <= MAX_NAME and all(len(p.encode()) <= 255 for p in parts)


def _not_of_the_format(folder: Path, got: str) -> ArtifactError:
    return ArtifactError(
        f"{folder / MANIFEST}: expected the fields of format {FORMAT}, got {got}; "
        "export the model again"
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    if not file.is_file():
        found = "another folder" if folder.is_dir() else "nothing"
        raise ArtifactError(
            f"{folder}: expected a model folder with {MANIFEST}, got {found}; "
            "make one with python -m export"
        )
    if (num_bytes := file.stat().st_size) > MANIFEST_BYTES:
        raise ArtifactError(
            f"{file}: expected at most {MANIFEST_BYTES:,} bytes, got {num_bytes:,}; export the "
            "model again"
        )
    try:
        manifest = json.loads(file.read_bytes(), object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{file}: expected JSON, got {one_line(error)}; export the model again"
        ) from error
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise ArtifactError(f"{file}: expected the field format, got none; export the model again")
    if manifest["format"] != FORMAT:
        raise ArtifactError(
            f"{file}: format {manifest['format']!r:.40}, this version reads {FORMAT}; "
            "export the model again or install the version that wrote it"
        )
    return manifest


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object; of two equal names, Python would take the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name that is twice in an object")
    return found


def _embedding_from_json(raw: Mapping[str, Any] | None) -> EmbeddingConfig | None:
    return None if raw is None else EmbeddingConfig.from_json(raw)


def _vision_from_json(raw: Mapping[str, Any] | None) -> VisionConfig | None:
    return None if raw is None else VisionConfig.from_json(raw)


def _sound_from_json(raw: Mapping[str, Any] | None) -> SoundConfig | None:
    return None if raw is None else SoundConfig.from_json(raw)


def _encoder_from_json(raw: Mapping[str, Any] | None) -> GemmaConfig | None:
    return None if raw is None else _config_from_json(raw)


def _config_from_json(raw: Mapping[str, Any]) -> GemmaConfig:
    rope = tuple((kind, RopeParameters(**values)) for kind, values in raw["rope_parameters"])
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
    return GemmaConfig(**fields | {"rope_parameters": rope})
