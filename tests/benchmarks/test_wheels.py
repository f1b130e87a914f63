"""Wheels that travel in pieces are the same wheels when they arrive, or are refused."""

import json
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks import wheels

LIMIT = 3000


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A package of one module and some bytes that do not compress."""
    path = tmp_path / "brought-1.0-py3-none-any.whl"
    info = "brought-1.0.dist-info"
    files = {
        "brought.py": "ANSWER = 42\n",
        "brought.bin": random.Random(1).randbytes(10_000),
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: brought\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (files | {f"{info}/RECORD": record}).items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def pieces(wheel: Path, tmp_path: Path) -> list[Path]:
    return wheels.split([wheel], tmp_path / "pieces", LIMIT)


def test_pieces_are_no_larger_than_the_limit(wheel: Path, pieces: list[Path]) -> None:
    sizes = [piece.stat().st_size for piece in pieces]
    assert sizes[:-1] == [LIMIT] * (len(sizes) - 1)
    assert 0 < sizes[-1] <= LIMIT
    assert sum(sizes) == wheel.stat().st_size


def test_pieces_in_several_folders_make_the_wheel(
    wheel: Path, pieces: list[Path], tmp_path: Path
) -> None:
    later = tmp_path / "later"
    later.mkdir()
    for piece in pieces[2:]:
        piece.rename(later / piece.name)
    first = pieces[0].parent
    whole, missing = wheels.join([first], tmp_path / "whole")
    assert (whole, missing) == ([], [piece.name for piece in pieces[2:]])
    (whole,), missing = wheels.join([first, later], tmp_path / "whole")
    assert missing == []
    assert whole.read_bytes() == wheel.read_bytes()
    for piece in later.iterdir():
        piece.unlink()
    assert wheels.join([first], tmp_path / "whole") == ([whole], [])


def test_a_damaged_piece_is_refused_and_asked_for_again(pieces: list[Path], tmp_path: Path) -> None:
    damaged = bytearray(pieces[1].read_bytes())
    damaged[7] ^= 1
    pieces[1].write_bytes(damaged)
    with pytest.raises(SystemExit, match="bring it again"):
        wheels.join([pieces[0].parent], tmp_path / "whole")
    assert wheels.join([pieces[0].parent], tmp_path / "whole2") == ([], [pieces[1].name])


def test_an_index_that_says_otherwise_of_the_whole_is_refused(
    wheel: Path, pieces: list[Path], tmp_path: Path
) -> None:
    index = pieces[0].parent / wheels.INDEX
    told = json.loads(index.read_text())
    told[wheel.name][wheel.name] = "0" * 64
    index.write_text(json.dumps(told))
    with pytest.raises(SystemExit, match="expected sha256 0000"):
        wheels.join([index.parent], tmp_path / "whole")


def test_what_is_no_wheel_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.whl").write_text("<html>not found</html>")
    with pytest.raises(SystemExit, match="expected a wheel"):
        wheels.split([tmp_path / "page.whl"], tmp_path / "pieces", LIMIT)


def test_the_other_side_needs_only_what_was_brought(pieces: list[Path], tmp_path: Path) -> None:
    """As there: the script that lies beside the pieces, in no checkout, by a bare Python."""
    site = tmp_path / "site"
    command = [sys.executable, "-I", pieces[0].parent / "wheels.py", "join", pieces[0].parent]
    run = subprocess.run(
        [*command, "--target", site, "--complete"],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert run.stdout == f"installed 1 wheels in {site}\n"
    code = f"import sys; sys.path.insert(0, {str(site)!r}); import brought; print(brought.ANSWER)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "42\n"
    pieces[0].unlink()
    again = [*command, "--target", tmp_path / "site2"]
    assert subprocess.run(again, capture_output=True, check=False).returncode == 0
    run = subprocess.run([*again, "--complete"], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout.splitlines()[-1]) == (1, f"missing: {pieces[0].name}")
