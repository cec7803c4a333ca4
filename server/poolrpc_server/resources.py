"""The CPUs and the memory that this process may use, within the limits of its cgroups."""

from __future__ import annotations

import math
import os
import re
import resource
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

UNKNOWN_MEMORY = 4 * 2**30
"""Bytes of memory assumed for a system that does not report its own."""

ROOT = Path("/")


def cpu_count(root: Path = ROOT) -> int:
    """Return the number of CPUs this process may keep busy: those of its affinity mask, or its CPU quota if smaller.

    Args:
        root: The folder that contains /proc and the cgroups.

    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *(math.ceil(quota) for quota in _cpu_quotas(root))]))


def memory_bytes(root: Path = ROOT) -> int:
    """Return the bytes of memory this process may use: the machine's, or the limit of its cgroups if smaller.

    Args:
        root: The folder that contains /proc and the cgroups.

    """
    return min([_installed_memory(root), *_memory_limits(root)])


def max_descriptors() -> int:
    """Return the number of files that this process may have open, if it raises its soft limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**31 - 1 if hard == resource.RLIM_INFINITY else hard


def resident_bytes(root: Path = ROOT) -> int:
    """Return the bytes of memory that this process has for itself, without files and shared memory; 0 if unknown.

    Args:
        root: The folder that contains /proc.

    """
    anonymous = re.search(r"^RssAnon:\s+(\d+) kB$", _read_text(root / "proc/self/status"), re.MULTILINE)
    return int(anonymous[1]) * 1024 if anonymous else 0


def _cpu_quotas(root: Path) -> Iterator[float]:
    """Yield every CPU quota that applies to this process, in CPUs."""
    for folder in _cgroup_folders(root, "cpu"):
        # The CPU time and the period in which it may be used: one file in cgroup v2, two files in v1.
        for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            numbers = [number for name in names for number in _read_numbers(folder / name)]
            if len(numbers) == 2:  # noqa: PLR2004 - fewer if there is no quota: "max" in v2, -1 in v1
                yield numbers[0] / numbers[1]


def _memory_limits(root: Path) -> Iterator[int]:
    """Yield every memory limit that applies to this process; "no limit" is "max" in v2 and a huge number in v1."""
    for folder in _cgroup_folders(root, "memory"):
        # A process over memory.high is not killed, but slowed down so much that it is of no use.
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            yield from _read_numbers(folder / name)


def _installed_memory(root: Path) -> int:
    total = re.search(r"^MemTotal: +(\d+) kB$", _read_text(root / "proc/meminfo"), re.MULTILINE)
    if total:
        return int(total[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return UNKNOWN_MEMORY


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's cgroup and of all its visible ancestors, for a controller, in v1 and v2.

    A machine may mount both versions, with a controller in either. The folders of the version that lacks the controller
    lack its files.
    """
    paths = _cgroup_paths(root, controller)
    for line in _read_text(root / "proc/self/mountinfo").splitlines():
        mount, _, filesystem = line.partition(" - ")
        mount_root, mount_point = (_unescape(word) for word in mount.split(" ")[3:5])
        filesystem_type, _, options = filesystem.split(" ")[:3]
        if filesystem_type == "cgroup2":
            path = paths.get(2)
        elif filesystem_type == "cgroup" and controller in options.split(","):
            path = paths.get(1)
        else:
            continue
        if path is None:
            continue
        folder = root / mount_point.lstrip("/")
        try:
            relative = PurePosixPath(path).relative_to(mount_root)
        except ValueError:
            # The mount is from outside the namespace, or a container runtime bind-mounted the container's own cgroup:
            # the mount point is our cgroup or one of its ancestors.
            relative = PurePosixPath()
        if ".." in relative.parts:  # the process was moved out of the namespace after the namespace was made
            relative = PurePosixPath()
        yield folder
        for part in relative.parts:
            folder /= part
            yield folder


def _cgroup_paths(root: Path, controller: str) -> dict[int, str]:
    """Return the path of this process's cgroup for a controller, by cgroup version."""
    paths = {}
    for line in _read_text(root / "proc/self/cgroup").splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0":
            paths[2] = path
        elif controller in controllers.split(","):
            paths[1] = path
    return paths


def _read_numbers(file: Path) -> list[int]:
    """Return the positive numbers in a file; an empty list if the file is not readable."""
    return [int(word) for word in _read_text(file).split() if word.isdecimal() and int(word)]


def _read_text(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


def _unescape(path: str) -> str:
    """Return a path as mountinfo means it: a space, for example, is written as its octal code."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)
