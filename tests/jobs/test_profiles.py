"""Profiles: the measured figures are those of the benchmarks' page, and found for such models."""

import re
from pathlib import Path

import pytest

from beam_gemma.jobs.profiles import find_profile, profiles, this_machine
from beam_gemma.model.artifact import Artifact
from beam_gemma.monitoring import processor
from export.checkpoints.released_sizes import SIZES

PAGE = (Path(__file__).parents[2] / "docs/benchmarks.md").read_text()
SECTIONS = {
    part.partition("\n")[0]: " ".join(part.split()) for part in re.split(r"^#+ ", PAGE, flags=re.M)
}


def artifact_of(config, precision="fp32"):
    """Return what a profile is found by."""
    return Artifact(
        path=Path("model"),
        name="my own weights",
        config=config,
        precision=precision,
        signatures={},
        eos_token_ids=(),
        source={},
        files={},
    )


@pytest.mark.parametrize("profile", profiles(), ids=lambda p: f"{p.model}-{p.head}")
def test_figures_are_those_of_the_page(profile):
    """In the section that is named, which also has the command."""
    section = SECTIONS[profile.section]
    for rate in (profile.prompt_tokens_per_sec, profile.completion_tokens_per_sec):
        assert rate is None or re.search(rf"(?<![\d.,]){rate:g}(?![\d.,])", section), rate
    module, *flags = re.findall(r"benchmarks\.\w+|--\w+ [^ -][^ ]*", profile.command)
    assert all(words in section.replace("\\ ", "") for words in (module, *flags)), flags
    assert profile.date in PAGE


@pytest.mark.parametrize("profile", profiles(), ids=lambda p: f"{p.model}-{p.head}")
def test_a_profile_is_of_one_released_shape(profile):
    def fits(config):
        return profile.fits(artifact_of(config), profile.head, "cpu")

    assert [size.name for size in SIZES if fits(size.config)] == [profile.model]


def test_a_profile_is_found_for_the_same_in_everything():
    [config] = [size.config for size in SIZES if size.name == "Gemma 3 270M"]
    machine = profiles()[0].machine
    found = find_profile(artifact_of(config), "generate", "cpu", machine)
    assert found is profiles()[0]
    assert find_profile(artifact_of(config), "score", "cpu", machine).head == "score"
    assert find_profile(artifact_of(config, "bf16"), "generate", "cpu", machine) is None
    assert find_profile(artifact_of(config), "generate", "cuda", machine) is None
    assert find_profile(artifact_of(config), "generate", "cpu", "n2-standard-2") is None
    assert find_profile(artifact_of(config), "generate", "cpu", None) is None


def test_a_machine_is_its_cores_and_their_kind(tmp_path, monkeypatch):
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(processor, "CPU_INFO", info)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert this_machine() == "2 cores of an unknown kind"
    info.write_text("processor\t: 0\nmodel name\t: AMD EPYC\n\nmodel name\t: AMD EPYC\n")
    assert this_machine() == profiles()[0].machine
