"""Memory is what a container's limit leaves, in both versions of control groups."""

import psutil
import pytest

from beam_gemma.runtime.host_memory import host_memory

GIB = 1 << 30
NO_LIMIT = {"1": "9223372036854771712", "2": "max"}


def write_group(folder, version, *, limit, usage, inactive=0):
    """Write a group's files as the kernel shows them."""
    folder.mkdir(parents=True, exist_ok=True)
    limits, usages = {
        "1": ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        "2": ("memory.max", "memory.current"),
    }[version]
    (folder / limits).write_text(f"{limit}\n")
    (folder / usages).write_text(f"{usage}\n")
    key = {"1": "total_inactive_file", "2": "inactive_file"}[version]
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {inactive}\n{key} {inactive}\n")


@pytest.fixture(params=["1", "2"])
def version(request):
    return request.param


@pytest.fixture
def groups(tmp_path, version):
    """The folder of groups in a root whose process is in /pods/one."""
    (tmp_path / "proc/self").mkdir(parents=True)
    line = {"1": "9:cpu,cpuacct:/\n4:memory:/pods/one\n", "2": "0::/pods/one\n"}[version]
    (tmp_path / "proc/self/cgroup").write_text(line)
    folder = tmp_path / "sys/fs/cgroup" / {"1": "memory", "2": ""}[version]
    folder.mkdir(parents=True)
    return folder


def test_limit_of_the_process_group_leaves_what_is_not_in_use(tmp_path, groups, version):
    write_group(groups / "pods/one", version, limit=3 * GIB, usage=2 * GIB, inactive=GIB // 2)
    assert host_memory(tmp_path) == (3 * GIB - 2 * GIB + GIB // 2, 3 * GIB)


def test_limit_of_a_group_around_it_counts_where_it_is_less(tmp_path, groups, version):
    write_group(groups / "pods/one", version, limit=NO_LIMIT[version], usage=GIB)
    write_group(groups / "pods", version, limit=2 * GIB, usage=GIB)
    assert host_memory(tmp_path) == (GIB, 2 * GIB)


def test_container_that_sees_its_own_group_as_the_root_has_its_limit(tmp_path, groups, version):
    write_group(groups, version, limit=GIB, usage=GIB // 4)
    assert host_memory(tmp_path) == (GIB - GIB // 4, GIB)


def test_use_beyond_the_limit_leaves_nothing(tmp_path, groups, version):
    write_group(groups / "pods/one", version, limit=GIB, usage=2 * GIB)
    assert host_memory(tmp_path).available == 0


def test_no_limit_leaves_the_machines_memory(tmp_path, groups, version):
    write_group(groups / "pods/one", version, limit=NO_LIMIT[version], usage=GIB)
    assert host_memory(tmp_path).total == psutil.virtual_memory().total


def test_system_without_groups_has_the_machines_memory(tmp_path):
    assert host_memory(tmp_path).total == psutil.virtual_memory().total
