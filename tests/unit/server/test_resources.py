"""The CPUs and memory of a process: simulated trees of cgroup v1 and v2, as seen in containers, and a real cgroup."""

from __future__ import annotations

import mmap
import os
import resource
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from poolrpc_server.resources import cpu_count, max_descriptors, memory_bytes, resident_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

MIB = 2**20
HOST_CPUS, HOST_MEMORY = 64, 8192 * MIB
NO_V1_LIMIT = 0x7FFFFFFFFFFFF000
"""The value of memory.limit_in_bytes if there is no limit."""


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, int]]:
    """Return a function that simulates a machine of 64 CPUs and 8 GiB, and returns the CPUs and memory found there.

    Its arguments are the content of /proc/self/cgroup, the lines of /proc/self/mountinfo for cgroups, and the files in
    the cgroups' folders.
    """
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(HOST_CPUS), raising=False)

    def make(cgroup: str, mounts: list[str], files: Mapping[str, str]) -> tuple[int, int]:
        lines = [f"3{number} 24 0:2{number} {each}" for number, each in enumerate(mounts)]
        proc = {
            "proc/meminfo": f"MemTotal:        {HOST_MEMORY // 1024} kB\nMemFree:         1 kB\n",
            "proc/self/cgroup": cgroup,
            "proc/self/mountinfo": "\n".join(["22 1 8:1 / / rw - ext4 /dev/sda1 rw,errors=remount-ro", *lines]),
        }
        root = Path(tempfile.mkdtemp(dir=tmp_path))
        for name, text in {**proc, **files}.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(f"{text}\n" if text else "")
        return cpu_count(root), memory_bytes(root)

    return make


def v1(controllers: str, mount_root: str = "/") -> str:
    """Return the mount of a v1 hierarchy."""
    return f"{mount_root} /sys/fs/cgroup/{controllers} rw,nosuid shared:9 - cgroup cgroup rw,{controllers}"


def v2(mount_root: str = "/", mount_point: str = "/sys/fs/cgroup") -> str:
    """Return the mount of the v2 hierarchy."""
    return f"{mount_root} {mount_point} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"


def test_without_a_cgroup_the_whole_machine_is_available(tree):
    """Without cgroups, or with unreadable files, the process may use all CPUs and all memory of the machine."""
    assert tree("", [], {}) == (HOST_CPUS, HOST_MEMORY)
    assert tree("0::/gone (deleted)", [v2()], {}) == (HOST_CPUS, HOST_MEMORY)


def test_without_proc_the_values_are_those_of_sysconf(tmp_path):
    """Without /proc, as on other systems than Linux, the memory is that of sysconf."""
    assert cpu_count(tmp_path) == len(os.sched_getaffinity(0))
    assert memory_bytes(tmp_path) == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("max 100000", HOST_CPUS),
        ("50000 100000", 1),
        ("1000 100000", 1),
        ("100000 100000", 1),
        ("100001 100000", 2),
        ("150000 100000", 2),
        ("75000 50000", 2),
        ("400000 100000", 4),
        ("6400000 50000", HOST_CPUS),
    ],
)
def test_a_quota_is_rounded_up(tree, quota, expected):
    """A CPU quota is rounded up to whole CPUs: at least one, and at most the machine's."""
    name = "sys/fs/cgroup/cpu.max"
    assert tree("0::/", [v2()], {name: quota})[0] == expected
    quota_us, period = quota.replace("max", "-1").split()
    folder = "sys/fs/cgroup/cpu,cpuacct"
    files = {f"{folder}/cpu.cfs_quota_us": quota_us, f"{folder}/cpu.cfs_period_us": period}
    assert tree("4:cpu,cpuacct:/", [v1("cpu,cpuacct")], files)[0] == expected


def test_v2_in_its_own_namespace(tree):
    """A container sees its own cgroup as the root, so its limits are at the mount point."""
    files = {"sys/fs/cgroup/cpu.max": "200000 100000", "sys/fs/cgroup/memory.max": str(512 * MIB)}
    assert tree("0::/", [v2()], files) == (2, 512 * MIB)


def test_v2_on_the_host_includes_the_limits_of_ancestors(tree):
    """The lowest limit of the process's cgroup and all its ancestors applies."""
    folder = "sys/fs/cgroup"
    files = {
        f"{folder}/user.slice/memory.max": str(700 * MIB),
        f"{folder}/user.slice/cpu.max": "max 100000",
        f"{folder}/user.slice/a.service/memory.max": "max",
        f"{folder}/user.slice/a.service/cpu.max": "300000 100000",
        f"{folder}/user.slice/a.service/b/memory.max": str(900 * MIB),
        f"{folder}/user.slice/a.service/b/cpu.max": "500000 100000",
        f"{folder}/other/memory.max": str(MIB),  # not an ancestor
        f"{folder}/other/cpu.max": "1000 100000",
    }
    assert tree("0::/user.slice/a.service/b", [v2()], files) == (3, 700 * MIB)


def test_v2_memory_high_is_a_limit(tree):
    """memory.high is a limit like memory.max, because a process stalls above it."""
    files = {"sys/fs/cgroup/memory.high": str(300 * MIB), "sys/fs/cgroup/memory.max": str(512 * MIB)}
    assert tree("0::/", [v2()], files)[1] == 300 * MIB


V1_GROUPS = "11:memory:{path}\n4:cpu,cpuacct:{path}\n1:name=systemd:{path}\n0::/"
V1_FILES = {
    "memory/memory.limit_in_bytes": str(512 * MIB),
    "cpu,cpuacct/cpu.cfs_quota_us": "250000",
    "cpu,cpuacct/cpu.cfs_period_us": "100000",
}


@pytest.mark.parametrize(
    ("path", "mount_root", "relative"),
    [
        ("/docker/4f2a", "/docker/4f2a", ""),
        ("/", "/", ""),
        ("/docker/4f2a", "/", "docker/4f2a/"),
        ("/docker/4f2a/app", "/docker/4f2a", "app/"),
        ("/", "/..", ""),
        ("/", "/docker/4f2a", ""),
        ("/../other", "/", ""),
        ("/kubepods/pod1/c1", "/docker/9/kubepods/pod1/c1", ""),
    ],
    ids=[
        "bind mount of the host's path",
        "namespace",
        "host",
        "deeper",
        "mount from outside the namespace",
        "namespace with the host's mount",
        "moved out of the namespace",
        "nested runtimes",
    ],
)
def test_v1_is_found_through_its_mount(tree, path, mount_root, relative):
    """The cgroup's path is relative to the mount's root; if it is outside that root, the mount point applies."""
    files = {}
    for name, text in V1_FILES.items():
        controller, _, file = name.partition("/")
        files[f"sys/fs/cgroup/{controller}/{relative}{file}"] = text
    mounts = [v1("memory", mount_root), v1("cpu,cpuacct", mount_root), v1("cpuset")]
    assert tree(V1_GROUPS.format(path=path), mounts, files) == (3, 512 * MIB)


def test_v1_has_a_huge_number_for_no_limit(tree):
    """V1's values for "no limit" leave the machine's values; the limits of an ancestor still apply."""
    folder = "sys/fs/cgroup"
    files = {
        f"{folder}/memory/app/memory.limit_in_bytes": str(NO_V1_LIMIT),
        f"{folder}/cpu/app/cpu.cfs_quota_us": "-1",
        f"{folder}/cpu/app/cpu.cfs_period_us": "100000",
    }
    groups = "5:memory:/app\n3:cpu:/app"
    assert tree(groups, [v1("memory"), v1("cpu")], files) == (HOST_CPUS, HOST_MEMORY)
    files |= {
        f"{folder}/memory/memory.limit_in_bytes": str(100 * MIB),
        f"{folder}/cpu/cpu.cfs_quota_us": "20000",
        f"{folder}/cpu/cpu.cfs_period_us": "10000",
    }
    assert tree(groups, [v1("memory"), v1("cpu")], files) == (2, 100 * MIB)


def test_a_hybrid_hierarchy_has_each_controller_in_one_version(tree):
    """If both versions are mounted, the limits of a controller are found in the version that has it."""
    folder = "sys/fs/cgroup"
    files = {
        f"{folder}/memory/app/memory.limit_in_bytes": str(256 * MIB),
        f"{folder}/unified/app/cpu.max": "350000 100000",
        f"{folder}/unified/app/cgroup.procs": "1",
    }
    mounts = [v1("memory"), v1("pids"), v2(mount_point="/sys/fs/cgroup/unified")]
    assert tree("9:memory:/app\n8:pids:/app\n0::/app", mounts, files) == (4, 256 * MIB)


def test_a_path_with_spaces(tree):
    """Spaces in a mount point and in a mount's root, which mountinfo escapes, are decoded."""
    files = {"a b/c d/memory.max": str(64 * MIB)}
    assert tree("0::/x y/c d", [v2("/x\\040y", "/a\\040b")], files)[1] == 64 * MIB


def test_invalid_values_are_not_limits(tree):
    """Empty files, words, and a period of zero are ignored."""
    folder = "sys/fs/cgroup"
    for quota, limit in [("", ""), ("some", "many"), ("1000 0", "0"), ("max", "-1")]:
        files = {f"{folder}/cpu.max": quota, f"{folder}/memory.max": limit}
        assert tree("0::/", [v2()], files) == (HOST_CPUS, HOST_MEMORY)


@contextmanager
def real_cgroup(controller: str) -> Iterator[Path]:
    """Make a cgroup with a child, yield the outer one, and remove both; skip the test if that is not permitted.

    Only if this process is in the root of the controller's hierarchy: another program that made a cgroup for this
    process must be able to remove it.
    """
    folder = Path("/sys/fs/cgroup")
    version_2 = (folder / "cgroup.controllers").exists()
    top = folder if version_2 else folder / controller
    groups = Path("/proc/self/cgroup").read_text() if Path("/proc/self/cgroup").exists() else ""
    entries = [each.split(":", 2) for each in groups.splitlines()]
    at_root = any(path == "/" and (version_2 or controller in names.split(",")) for _, names, path in entries)
    outer = top / f"poolrpc-test-{os.getpid()}"
    try:
        if not at_root:
            raise PermissionError(f"this process is in a {controller} cgroup that another program made")
        outer.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    try:
        if version_2 and controller not in (outer / "cgroup.controllers").read_text().split():
            pytest.skip(f"no cgroup can be made here: the {controller} controller isn't enabled at {top}")
        (outer / "inner").mkdir()
        yield outer
    finally:
        for each in (outer / "inner", outer):
            if each.exists():
                each.rmdir()


def measured_in(cgroup: Path) -> int:
    """Return the number of CPUs that a process in a cgroup finds."""
    program = (
        "import sys, pathlib, os\n"
        "pathlib.Path(sys.argv[1], 'cgroup.procs').write_text(str(os.getpid()))\n"
        "from poolrpc_server.resources import cpu_count\n"
        "print(cpu_count())"
    )
    command = [sys.executable, "-c", program, str(cgroup)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)  # noqa: S603 - ours


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cgroups are Linux's")
def test_a_real_cgroup_of_one_cpu():
    """A process in a cgroup whose parent has a quota of half a CPU finds one CPU; without the quota, all."""
    with real_cgroup("cpu") as outer:
        before = measured_in(outer / "inner")
        assert before == cpu_count()
        if (outer / "cpu.max").exists():
            (outer / "cpu.max").write_text("50000 100000")
        else:
            (outer / "cpu.cfs_quota_us").write_text("50000")
        assert measured_in(outer / "inner") == 1


def test_the_real_machine_has_memory():
    """The memory found is at most the machine's, and enough for this process."""
    assert 64 * MIB < memory_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(("hard", "expected"), [(256, 256), (resource.RLIM_INFINITY, 2**31 - 1)])
def test_open_files_are_limited_by_the_hard_limit(monkeypatch, hard, expected):
    """The process can raise its soft limit; without a hard limit, the number is as large as gRPC's options allow."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, hard))
    assert max_descriptors() == expected


def test_the_real_process_may_open_files():
    """The number is at least the soft limit."""
    assert max_descriptors() >= resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 0


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("VmRSS:\t    9000 kB\nRssAnon:\t    5000 kB\nRssFile:\t    4000 kB\n", 5000 * 1024),
        ("VmRSS:\t    9000 kB\n", 0),
        ("", 0),
    ],
)
def test_the_memory_of_the_process_is_its_own(tmp_path, status, expected):
    """Memory of files and shared memory is not counted; where the system does not report it, the value is 0."""
    folder = tmp_path / "proc/self"
    folder.mkdir(parents=True)
    (folder / "status").write_text(status)
    assert resident_bytes(tmp_path) == expected
    assert resident_bytes(tmp_path / "nowhere") == 0


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_the_real_process_uses_memory():
    """Private memory that is written counts."""
    before = resident_bytes()
    with mmap.mmap(-1, 64 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapping:
        mapping.write(b"x" * len(mapping))
        assert resident_bytes() - before > 32 * MIB
    assert before > 0
