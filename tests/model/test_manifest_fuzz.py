"""Manifests with faults of every kind: a model that opens, or one sentence, within a time bound.

The faults are drawn in a process of their own, since type checks of a test run would find some of
them before the code that is tested.
"""

import copy
import hashlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from beam_gemma.errors import BeamGemmaError
from beam_gemma.model.artifact import MANIFEST, Artifact

ROOT = Path(__file__).parents[2]
EXPORTED = ROOT / "tests/data/manifests/0.7.0.json"
NUM_MANIFESTS = 3000
SEED = 16
MAX_SECS = 1.0
"""Longest time for one manifest; a deep or a large one takes the longest."""
MAX_CHARS = 1000
"""Most characters of a sentence, beside which a number or text of the manifest may be huge."""
ODD = (
    None, True, False, 0, -1, 1.5, -0.0, 1e308, float("nan"), float("inf"), 2**31, 2**63, 2**64,
    10**40, "", "x", "..", "/", "\0", "é" * 300, "9" * 5000, [], {}, [[]], [{}], {"": {}},
    [None] * 1000, {"a": [1, {"b": 2}]},
)  # fmt: skip
NAMES = (
    "../outside", "/etc/passwd", "weights/../../outside", "a/../b", "./tokenizer.model", "", ".",
    "a//b", "weights/", "weights\0", "\ud800", "n" * 5000, "weights", MANIFEST, "tokenizer.model/x",
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each value within a manifest."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield (*path, key)
        if isinstance(item, dict | list):
            yield from places(item, (*path, key))


def parent_of(manifest: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        manifest = manifest[key]
    return manifest


def other_value(manifest: Any, draw: random.Random) -> str:
    path = draw.choice(list(places(manifest)))
    parent_of(manifest, path)[path[-1]] = copy.deepcopy(draw.choice(ODD))
    return json.dumps(manifest)


def no_value(manifest: Any, draw: random.Random) -> str:
    path = draw.choice(list(places(manifest)))
    del parent_of(manifest, path)[path[-1]]
    return json.dumps(manifest)


def twice(manifest: Any, draw: random.Random) -> str:
    """Repeat an item of a list, or a name of an object."""
    path = draw.choice(list(places(manifest)))
    parent = parent_of(manifest, path)
    if isinstance(parent, list):
        parent.append(parent[path[-1]])
        return json.dumps(manifest)
    name = json.dumps(path[-1]) + ":"
    return json.dumps(manifest).replace(name, f"{name} 0, {name}")


def more(manifest: Any, draw: random.Random) -> str:
    path = draw.choice([p for p in places(manifest) if isinstance(p[-1], str)])
    parent_of(manifest, path)["unknown"] = draw.choice(ODD)
    return json.dumps(manifest)


def other_name(manifest: Any, draw: random.Random) -> str:
    name = draw.choice(list(manifest["files"]))
    manifest["files"][draw.choice(NAMES)] = manifest["files"].pop(name)
    return json.dumps(manifest)


def deep(manifest: Any, draw: random.Random) -> str:
    path = draw.choice(list(places(manifest)))
    parent_of(manifest, path)[path[-1]] = "DEEP"
    left, right = draw.choice(["[]", ('{"a":', "}")])
    depth = draw.choice([50, 900, 1100, 200_000])
    return json.dumps(manifest).replace('"DEEP"', left * depth + "0" + right * depth)


def huge(manifest: Any, draw: random.Random) -> str:
    path = draw.choice(list(places(manifest)))
    parent_of(manifest, path)[path[-1]] = "HUGE"
    return json.dumps(manifest).replace('"HUGE"', "9" * draw.choice([20, 400, 5000, 1_000_000]))


def other_bytes(manifest: Any, draw: random.Random) -> bytes:
    content = bytearray(json.dumps(manifest).encode())
    for _ in range(draw.randint(1, 4)):
        content[draw.randrange(len(content))] = draw.randrange(256)
    return bytes(content[: draw.choice([len(content), draw.randrange(len(content))])])


FAULTS: tuple[Callable[[Any, random.Random], str | bytes], ...] = (
    other_value, other_value, no_value, twice, more, other_name, deep, huge, other_bytes,
)  # fmt: skip


def make_model(folder: Path) -> Any:
    """Write a folder whose files are a few bytes each, and return its manifest."""
    manifest = json.loads(EXPORTED.read_text())
    for name in manifest["files"]:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
        digest = hashlib.sha256(name.encode()).hexdigest()
        manifest["files"][name] = {"num_bytes": len(name), "sha256": digest}
    return manifest


def use(folder: Path) -> None:
    """Open a model and read what its manifest says."""
    artifact = Artifact.open(folder)
    artifact.verify()
    for (head, device), signature in artifact.signatures.items():
        artifact.graph_path(head, device)
        signature.step_inputs()
        signature.outputs()
    for name in ("devices", "tokenizer_path", "chat_template", "digest"):
        getattr(artifact, name)


def outcome(folder: Path) -> str:
    """Return why a model does not open; an empty text if it does."""
    try:
        use(folder)
    except BeamGemmaError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    """Print the number of models that opened and of sentences; other errors end the process."""
    manifest = make_model(folder)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    use(folder)
    draw, opened, refused, slowest = random.Random(SEED), 0, 0, 0.0
    for _ in range(NUM_MANIFESTS):
        content = draw.choice(FAULTS)(copy.deepcopy(manifest), draw)
        as_bytes = content.encode() if isinstance(content, str) else content
        (folder / MANIFEST).write_bytes(as_bytes)
        began = time.monotonic()
        sentence = outcome(folder)
        assert len(sentence) < MAX_CHARS
        assert "\n" not in sentence
        opened += not sentence
        refused += bool(sentence)
        slowest = max(slowest, time.monotonic() - began)
    sys.stdout.write(f"{opened} {refused} {slowest}")


def test_a_manifest_with_any_fault_is_read_or_refused_in_a_sentence(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.model.test_manifest_fuzz", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    opened, refused, slowest = map(float, ended.stdout.split())
    assert opened + refused == NUM_MANIFESTS
    assert refused > opened > 0
    assert slowest < MAX_SECS


def test_the_whole_manifest_has_an_upper_size(tmp_path: Path) -> None:
    make_model(tmp_path)
    with (tmp_path / MANIFEST).open("wb") as stream:
        stream.truncate(1 << 30)
    with pytest.raises(BeamGemmaError, match="expected at most 16,777,216 bytes"):
        Artifact.open(tmp_path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
