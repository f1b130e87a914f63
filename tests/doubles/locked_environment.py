"""What our images hold and nothing else: locked packages in an environment of their own."""

import hashlib
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from apache_beam.options.pipeline_options import PipelineOptions, SetupOptions

from beam_gemma.dataflow.wheel import stage
from tests.doubles.once import kept

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "templates/requirements-cpu.txt"
INSTALL_SECS = 800


def locked_python() -> Path:
    """Return the interpreter of an environment with the packages of requirements-cpu.txt alone."""
    key = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:16]
    return kept(f"locked-{key}", _install) / "bin/python"


def _install(folder: Path) -> None:
    """Make the environment: with uv, or more slowly where uv does not know pip's settings."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=200)
    python = folder / "bin/python"
    packages = [
        "install",
        "--quiet",
        "--require-hashes",
        "--no-deps",
        "--requirement",
        REQUIREMENTS,
    ]
    uv = [Path(sys.executable).with_name("uv"), "pip", *packages, "--python", python]
    if subprocess.run(uv, check=False, timeout=INSTALL_SECS).returncode:
        subprocess.run([python, "-m", "pip", *packages], check=True, timeout=INSTALL_SECS)


@dataclass(frozen=True)
class Image:
    """The files of an image, as far as they are ours."""

    python: Path
    packages: Path
    """Holds beam_gemma."""
    template: Path
    """Holds the pipelines."""

    @classmethod
    def build(cls, folder: Path) -> "Image":
        """Install what a checkout has, as templates/Dockerfile does."""
        options = PipelineOptions([])
        stage(options)
        (wheel,) = options.view_as(SetupOptions).extra_packages
        image = cls(locked_python(), folder / "packages", folder / "template")
        pip = [image.python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        subprocess.run([*pip, "--target", image.packages, wheel], check=True, timeout=200)
        shutil.copytree(ROOT / "pipelines", image.template / "pipelines")
        return image
