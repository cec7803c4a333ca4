"""Shared memory of clients: names of files, ranges, and files that are truncated or removed while in use."""

import os
import secrets
from pathlib import Path

import pytest

from poolrpc.errors import (
    InvalidArgumentError,
    LimitExceededError,
    NotFoundError,
    PermissionDeniedError,
    UnsupportedError,
)
from poolrpc_server.protocols.triton.shared_memory import SharedMemoryRange, SharedMemoryRegion, SharedMemoryRegistry

SHM = Path("/dev/shm")  # noqa: S108 - where shm_open creates files


@pytest.fixture
def path():
    """Return a file of 64 bytes in /dev/shm."""
    made = SHM / f"poolrpc-test-{secrets.token_hex(8)}"
    made.write_bytes(bytes(range(64)))
    yield made
    made.unlink(missing_ok=True)


@pytest.fixture
def regions(path):
    """Return a registry with the file's last 48 bytes as the region "it"."""
    made = SharedMemoryRegistry(allowed=True)
    made.register("it", path.name, 16, 48)
    return made


def open_files():
    """Return the number of this process's open files."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - only the number of entries is needed


def test_region_is_read_and_written(path, regions):
    """Reads and writes use the offset of the region plus that of the range."""
    region = regions.find("it")
    into = bytearray(8)
    region.read(SharedMemoryRange("it", 4, 8), memoryview(into), "input")
    assert into == bytes(range(20, 28))
    region.write(SharedMemoryRange("it", 40, 8), memoryview(b"outputs!"), "output")
    assert path.read_bytes()[56:] == b"outputs!"
    region.read(SharedMemoryRange("it", 48, 0), memoryview(bytearray()), "input")


def test_files_are_not_mapped(path, regions):
    """Reading does not map the file into this process."""
    regions.find("it").read(SharedMemoryRange("it", 0, 48), memoryview(bytearray(48)), "input")
    assert path.name not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 49), (48, 1), (2**63, 8), (2**64 - 1, 2**64)])
def test_range_beyond_the_region_is_rejected(regions, offset, nbytes):
    """A range that is not within the region is rejected, even if it is within the file."""
    region, part = regions.find("it"), SharedMemoryRange("it", offset, nbytes)
    with pytest.raises(InvalidArgumentError, match=r"^input: expected a range within the region's 48 bytes"):
        region.read(part, memoryview(bytearray(1)), "input")
    with pytest.raises(InvalidArgumentError, match=r"^output: expected a range within the region's 48 bytes"):
        region.write(part, memoryview(b"x"), "output")


def test_truncated_file_is_an_error(path, regions):
    """Reads and writes of a truncated file fail, and the file is not extended."""
    region = regions.find("it")
    os.truncate(path, 24)
    into = memoryview(bytearray(48))
    with pytest.raises(InvalidArgumentError, match=r"^input: expected 48 bytes at 16 of .*, got a file of 24 bytes$"):
        region.read(SharedMemoryRange("it", 0, 48), into, "input")
    with pytest.raises(InvalidArgumentError, match=r"^output: .*got a file of 24 bytes$"):
        region.write(SharedMemoryRange("it", 0, 48), into, "output")
    assert path.stat().st_size == 24


def test_region_in_use_outlives_its_name(path, regions):
    """An unlinked file and an unregistered region stay usable for calls in flight; then the file is closed."""
    before = open_files()
    path.unlink()
    region = regions.find("it")
    regions.unregister("it")
    into = bytearray(1)
    region.read(SharedMemoryRange("it", 0, 1), memoryview(into), "input")
    assert into == bytes([16])
    del region
    assert open_files() == before - 1
    with pytest.raises(NotFoundError, match="'it'"):
        regions.find("it")


@pytest.mark.parametrize(
    "key",
    ["", "/", ".", "..", "/..", "//x", "a/b", "../etc/passwd", "dev/shm/x", "a\0b", "é", "a b", "x" * 256, "a\n"],
)
def test_key_must_be_a_plain_name(key):
    """A name that could lead out of /dev/shm is rejected before any file is opened."""
    with pytest.raises(InvalidArgumentError, match=r"^key: expected the name of a file in /dev/shm"):
        SharedMemoryRegion(key, 0, 1)


def test_key_may_start_with_a_slash(path):
    """Names have the same form as for shm_open."""
    assert SharedMemoryRegion(f"/{path.name}", 0, 64).nbytes == 64


def test_only_regular_files_are_opened(path):
    """A symbolic link, a folder, a pipe and a missing file are rejected without waiting."""
    odd = SHM / f"{path.name}-odd"
    makers = [
        lambda: odd.symlink_to(path),
        odd.mkdir,
        lambda: os.mkfifo(odd),
    ]
    for make in makers:
        make()
        try:
            with pytest.raises(InvalidArgumentError, match=r"^key: expected a file"):
                SharedMemoryRegion(odd.name, 0, 1)
        finally:
            odd.rmdir() if odd.is_dir() and not odd.is_symlink() else odd.unlink()
    with pytest.raises(NotFoundError, match="expected a file in /dev/shm"):
        SharedMemoryRegion(odd.name, 0, 1)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change the owner of a file")
def test_file_of_another_user_is_rejected(path):
    """A file of another user is rejected, even if the server could open it."""
    os.chown(path, 12345, -1)
    before = open_files()
    with pytest.raises(PermissionDeniedError, match="expected a file of the user that the server runs as"):
        SharedMemoryRegion(path.name, 0, 64)
    assert open_files() == before


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 65), (64, 1), (2**64 - 1, 1), (0, 0)])
def test_region_must_be_within_its_file(path, offset, nbytes):
    """A region that is empty or extends beyond its file is rejected."""
    with pytest.raises(InvalidArgumentError, match=r"^byte_size: expected "):
        SharedMemoryRegion(path.name, offset, nbytes)


def test_names_are_unique_until_unregistered(path, regions):
    """A registered name is rejected until it is unregistered; an unknown name may be unregistered; "" means all."""
    with pytest.raises(InvalidArgumentError, match=r"^name: expected a name that isn't registered, got 'it'"):
        regions.register("it", path.name, 0, 1)
    regions.unregister("it")
    regions.unregister("it")
    regions.register("it", path.name, 0, 1)
    regions.register("more", path.name, 1, 1)
    assert {name: region.offset for name, region in regions.regions().items()} == {"it": 0, "more": 1}
    assert list(regions.regions("more")) == ["more"]
    regions.unregister("")
    assert regions.regions() == {}
    for name in ("", "x" * 257):
        with pytest.raises(InvalidArgumentError, match=r"^name: expected 1 to 256"):
            regions.register(name, path.name, 0, 1)
        with pytest.raises(NotFoundError):
            regions.find(name)


def test_number_of_regions_is_limited(path):
    """A region over the limit is rejected with the limit, and its file is closed."""
    regions = SharedMemoryRegistry(allowed=True, max_regions=3)
    for i in range(3):
        regions.register(str(i), path.name, 0, 1)
    before = open_files()
    with pytest.raises(LimitExceededError, match="at most 3 regions"):
        regions.register("more", path.name, 0, 1)
    assert open_files() == before


def test_regions_are_rejected_unless_allowed(path):
    """Without permission, registering fails with the name of the flag, and unregistering all is still valid."""
    regions = SharedMemoryRegistry(allowed=False)
    with pytest.raises(UnsupportedError, match="--allow-client-shm"):
        regions.register("it", path.name, 0, 1)
    regions.unregister("")
    assert regions.regions() == {}
