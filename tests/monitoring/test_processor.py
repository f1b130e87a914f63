"""Processors: the names of this machine's CPU and GPU."""

from beam_gemma.monitoring import processor
from beam_gemma.monitoring.processor import cpu_name, processor_of


def test_processor_has_a_name_on_each_device():
    assert processor_of("cpu").endswith(" cores")
    assert processor_of("cuda")


def test_cpu_has_the_name_that_the_system_tells_first(tmp_path, monkeypatch):
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(processor, "CPU_INFO", info)
    assert cpu_name() is None
    info.write_text("processor\t: 0\nmodel name\t: AMD EPYC\n\nmodel name\t: another\n")
    assert cpu_name() == "AMD EPYC"
