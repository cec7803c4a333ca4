"""What this process may use of its machine: CPUs and memory, as its cgroups bound them, in a container or not."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

UNKNOWN_MEMORY = 4 * 2**30
"""What is assumed of a system that doesn't tell."""

ROOT = Path("/")


def cpus(root: Path = ROOT) -> int:
    """Give how many CPUs this process may keep busy: those that it may run on, or its CPU quota where that is less.

    Args:
        root: Where /proc and the cgroups are.

    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *(math.ceil(each) for each in _quotas(root))]))


def memory_bytes(root: Path = ROOT) -> int:
    """Give the bytes of memory that this process may use: the machine's, or a limit on its cgroups where that is less.

    Args:
        root: Where /proc and the cgroups are.

    """
    return min([_installed(root), *_memory_limits(root)])


def _quotas(root: Path) -> Iterator[float]:
    """Give every CPU quota on this process, in CPUs."""
    for folder in _folders(root, "cpu"):
        # A time and the period in which it may be used: v2 has both in one file, v1 in two.
        for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            numbers = [each for name in names for each in _numbers(folder / name)]
            if len(numbers) == 2:  # noqa: PLR2004 - there is a quota, and it is no "max" of v2's or -1 of v1's
                yield numbers[0] / numbers[1]


def _memory_limits(root: Path) -> Iterator[int]:
    """Give every memory limit on this process; none is "max" in v2, a number over any machine's memory in v1."""
    for folder in _folders(root, "memory"):
        # A process over memory.high isn't killed, but slowed down until it is of no use.
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            yield from _numbers(folder / name)


def _installed(root: Path) -> int:
    total = re.search(r"^MemTotal: +(\d+) kB$", _text(root / "proc/meminfo"), re.MULTILINE)
    if total:
        return int(total[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return UNKNOWN_MEMORY


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """Give the folders of this process's cgroups for a controller, in v1 and v2, each with all above it that are shown.

    A machine may have both versions, with a controller in either: where it isn't, its files aren't.
    """
    paths = _cgroups(root, controller)
    for line in _text(root / "proc/self/mountinfo").splitlines():
        mount, _, kind = line.partition(" - ")
        shown, point = (_unescaped(each) for each in mount.split(" ")[3:5])
        version, _, options = kind.split(" ")[:3]
        if version == "cgroup2":
            path = paths.get(2)
        elif version == "cgroup" and controller in options.split(","):
            path = paths.get(1)
        else:
            continue
        if path is None:
            continue
        top = root / point.lstrip("/")
        try:
            inside = PurePosixPath(path).relative_to(shown)
        except ValueError:
            # A mount from outside of the namespace, or one that a container's runtime made of the container's cgroup:
            # what it shows is above us, or is us.
            inside = PurePosixPath()
        if ".." in inside.parts:  # moved out of the namespace since it was made
            inside = PurePosixPath()
        yield top
        for each in inside.parts:
            top /= each
            yield top


def _cgroups(root: Path, controller: str) -> dict[int, str]:
    """Give the path of this process's cgroup for a controller, by the version."""
    paths = {}
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            paths[2] = path
        elif controller in controllers.split(","):
            paths[1] = path
    return paths


def _numbers(file: Path) -> list[int]:
    """Give the positive numbers in a file; none where it can't be read."""
    return [int(each) for each in _text(file).split() if each.isdecimal() and int(each)]


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


def _unescaped(path: str) -> str:
    """Give a path of mountinfo, where a space is written as the octal of its code."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)
