"""Stage this package for workers whose image does not contain it."""

import atexit
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from apache_beam.options.pipeline_options import PipelineOptions, SetupOptions, WorkerOptions

from beam_gemma.errors import OptionsError

CHECKOUT = Path(__file__).parents[2]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "beam_gemma")
"""Files and folders that the wheel is built from."""
REQUIREMENTS = "templates/requirements-cpu.txt"
"""Requirements of the wheel, each pinned with its hash."""
BUILD_SECS = 120


def stage(options: PipelineOptions) -> None:
    """Add this package and its requirements to a job, unless the job has a worker image.

    The package is staged as a wheel, because each worker would have to build a source distribution,
    with build tools that it downloads.

    Raises:
        OptionsError: there is no image, and no wheel can be built.
    """
    if options.view_as(WorkerOptions).sdk_container_image is not None:
        return
    setup = options.view_as(SetupOptions)
    setup.extra_packages = [*(setup.extra_packages or []), str(_wheel(CHECKOUT))]
    if setup.requirements_file is None:
        setup.requirements_file = str(CHECKOUT / REQUIREMENTS)
    # Workers download the requirements; by default, this process would download and upload them.
    setup.requirements_cache = "skip"


def _wheel(checkout: Path) -> Path:
    """Build a wheel, which is deleted when this process ends, and return its path."""
    if missing := [name for name in (*SOURCES, REQUIREMENTS) if not (checkout / name).exists()]:
        raise OptionsError(
            "--sdk_container_image: expected an image that holds beam_gemma, as this is no "
            f"checkout to build a wheel from ({checkout / missing[0]} is not there), got none; "
            "docs/dataflow.md says how to build one"
        )
    folder = Path(tempfile.mkdtemp(prefix="beam-gemma-wheel-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # Build from a copy: a build in place would pick up files left by earlier builds.
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (checkout / name).is_dir() else shutil.copy
        copy(checkout / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--no-index", "--wheel-dir", str(folder), str(source)]
    pip = subprocess.run(command, capture_output=True, text=True, check=False, timeout=BUILD_SECS)
    if pip.returncode:
        raise OptionsError(
            f"{checkout}: expected to build a wheel for the workers, got "
            f"{pip.stderr.strip().rpartition(chr(10))[2]}; install setuptools, or pass an image "
            "that holds beam_gemma as --sdk_container_image"
        )
    (wheel,) = folder.glob("*.whl")
    return wheel
