"""Staging: without an image workers get this package as a wheel, and all that it needs by hash."""

import re
import shutil
import zipfile
from pathlib import Path

import pytest
from apache_beam.options.pipeline_options import PipelineOptions, SetupOptions

from beam_gemma.dataflow import wheel
from beam_gemma.dataflow.wheel import CHECKOUT, REQUIREMENTS, SOURCES, stage
from beam_gemma.errors import OptionsError


def staged(*flags):
    options = PipelineOptions(flags)
    stage(options)
    return options.view_as(SetupOptions)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout of our own, to break."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in (*SOURCES, "templates"):
        copy = shutil.copytree if (CHECKOUT / name).is_dir() else shutil.copy
        copy(CHECKOUT / name, folder / name)
    monkeypatch.setattr(wheel, "CHECKOUT", folder)
    return folder


def test_a_wheel_holds_the_package_and_nothing_else(checkout):
    # What an earlier build in place would have left.
    (checkout / "build/lib/beam_gemma").mkdir(parents=True)
    (checkout / "build/lib/beam_gemma/left_over.py").touch()
    setup = staged("--extra_package=mine.whl")
    mine, wheel = setup.extra_packages
    assert mine == "mine.whl"
    sources = checkout / "beam_gemma"
    files = {p for p in sources.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    names = {p.relative_to(checkout).as_posix() for p in files}
    inside = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert inside == names
    assert not (checkout / "beam_gemma.egg-info").exists()


def test_requirements_are_locked_and_downloaded_by_workers():
    setup = staged()
    assert setup.requirements_file == str(CHECKOUT / REQUIREMENTS)
    assert setup.requirements_cache == "skip"
    lines = Path(setup.requirements_file).read_text().split("\n")
    names = [line for line in lines if line and not line.startswith(("#", " "))]
    assert len(names) > 50
    assert all(re.match(r"[\w.-]+(\[[\w,-]+\])?==\S+", name) for name in names)
    # The ONNX Runtime of a worker comes by no requirement of the wheel's own.
    assert any(name.startswith("onnxruntime==") for name in names)
    assert staged("--requirements_file=own.txt").requirements_file == "own.txt"


def test_an_image_has_it_all():
    setup = staged("--sdk_container_image=i")
    assert (setup.extra_packages, setup.requirements_file) == (None, None)


@pytest.mark.parametrize("name", ["setup.py", REQUIREMENTS])
def test_a_package_that_is_installed_cannot_be_staged(checkout, name):
    (checkout / name).unlink()
    with pytest.raises(OptionsError) as caught:
        staged()
    assert str(caught.value).startswith(
        "--sdk_container_image: expected an image that holds beam_gemma, as this is no checkout to "
        f"build a wheel from ({checkout / name} is not there), got none; docs/dataflow.md"
    )


def test_a_build_that_fails_is_one_sentence(checkout):
    (checkout / "setup.py").write_text("raise SystemExit('no setuptools here')\n")
    with pytest.raises(OptionsError) as caught:
        staged()
    sentence = str(caught.value)
    assert sentence.startswith(f"{checkout}: expected to build a wheel for the workers, got ")
    assert "\n" not in sentence
    assert sentence.endswith("pass an image that holds beam_gemma as --sdk_container_image")
