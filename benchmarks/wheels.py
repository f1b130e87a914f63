"""Moves packages to a machine without a network: splits wheels into pieces and joins them.

    python -m benchmarks.wheels split --limit_mb 60 --output DIR WHEEL...
    python -m benchmarks.wheels join DIR --target SITE

The first command runs on a machine with a network. It splits wheels into pieces no larger than one
transfer to the other machine allows, and adds an index with checksums and a copy of this file. The
second command runs on the other machine (`python DIR/wheels.py join ...`; it needs only Python and
pip). It joins every wheel whose pieces have all arrived, checks it, and installs it with pip.
Pieces may arrive in several rounds, in one folder or several; missing pieces are listed, and are an
error only with `--complete`. Then put SITE on `PYTHONPATH`.

Get the wheels with `pip download --only-binary :all: --platform manylinux_2_28_x86_64
--python-version 3.12 PACKAGE`, for the other machine's Python.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

INDEX = "wheels.json"
CHUNK_BYTES = 1 << 20


def split(wheels: Sequence[Path], folder: Path, limit: int) -> list[Path]:
    """Split wheels into pieces of at most `limit` bytes; return the pieces."""
    folder.mkdir(parents=True, exist_ok=True)
    index, pieces = {}, []
    for wheel in wheels:
        if not zipfile.is_zipfile(wheel):
            raise SystemExit(f"{wheel}: expected a wheel, got something else")
        own = []
        with wheel.open("rb") as stream:
            while data := stream.read(limit):
                piece = folder / f"{wheel.name}.{len(own):03}"
                piece.write_bytes(data)
                own.append(piece)
        index[wheel.name] = {piece.name: sha256_of(piece) for piece in own}
        index[wheel.name][wheel.name] = sha256_of(wheel)
        pieces += own
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    shutil.copy(__file__, folder / "wheels.py")
    return pieces


def join(folders: Sequence[Path], target: Path) -> tuple[list[Path], list[str]]:
    """Join the pieces of wheels; return the complete wheels and the names of missing pieces."""
    index = json.loads(found(folders, INDEX).read_text())
    target.mkdir(parents=True, exist_ok=True)
    whole, missing = [], []
    for name, sums in index.items():
        wheel = target / name
        if wheel.exists() and sha256_of(wheel) == sums[name]:
            whole.append(wheel)
            continue
        pieces = {piece: at(folders, piece) for piece in sums if piece != name}
        if absent := [piece for piece, path in pieces.items() if path is None]:
            missing += absent
            continue
        with wheel.open("wb") as stream:
            for piece, path in pieces.items():
                check(path, sums[piece])
                with path.open("rb") as source:
                    shutil.copyfileobj(source, stream, CHUNK_BYTES)
        check(wheel, sums[name])
        whole.append(wheel)
    return whole, missing


def install(wheels: Sequence[Path], site: Path) -> None:
    """Install wheels into a folder, without a network and without their dependencies."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps",
               "--no-compile", "--no-cache-dir", "--upgrade", "--target", str(site)]  # fmt: skip
    subprocess.run([*command, *map(str, wheels)], check=True)


def at(folders: Sequence[Path], name: str) -> Path | None:
    """Return the path of a file, or None if it has not arrived."""
    return next((f / name for f in folders if (f / name).is_file()), None)


def found(folders: Sequence[Path], name: str) -> Path:
    """Return the path of a file; exit if it has not arrived."""
    path = at(folders, name)
    if path is None:
        raise SystemExit(f"{name}: expected in {', '.join(map(str, folders))}, got nothing")
    return path


def check(path: Path, sha256: str) -> None:
    """Check a file's checksum; if it is wrong, delete the file and exit."""
    if sha256_of(path) != sha256:
        path.unlink()
        raise SystemExit(f"{path}: expected sha256 {sha256}, got another; bring it again")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 checksum of a file in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the two commands; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    halves = parser.add_subparsers(dest="half", required=True)
    one = halves.add_parser("split", help="cut wheels into pieces")
    one.add_argument("wheels", nargs="+", type=Path)
    one.add_argument("--output", type=Path, required=True, help="folder for the pieces")
    one.add_argument("--limit_mb", type=float, required=True, help="size of a piece, in 10**6 B")
    other = halves.add_parser("join", help="put wheels together and install them")
    other.add_argument("folders", nargs="+", type=Path)
    other.add_argument("--target", type=Path, required=True, help="folder for the packages")
    other.add_argument("--complete", action="store_true", help="fail if anything is missing")
    args = parser.parse_args(argv)
    if args.half == "split":
        for piece in split(args.wheels, args.output, int(args.limit_mb * 1e6)):
            print(f"{piece.stat().st_size:>12,}  {piece}")
        return 0
    wheels, missing = join(args.folders, args.target.with_name(f"{args.target.name}-wheels"))
    if wheels:
        install(wheels, args.target)
    print(f"installed {len(wheels)} wheels in {args.target}")
    for piece in missing:
        print(f"missing: {piece}")
    return int(bool(missing) and args.complete)


if __name__ == "__main__":
    sys.exit(main())
