"""Clients' shared memory: which files may be named, and files that shrink or go while they are used."""

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
from poolrpc_server.protocols.triton.shared_memory import MAX_REGIONS, Place, Region, SharedMemoryRegistry

SHM = Path("/dev/shm")  # noqa: S108 - where they are


@pytest.fixture
def path():
    """A file of 64 bytes in /dev/shm, which is gone afterwards."""
    made = SHM / f"poolrpc-test-{secrets.token_hex(8)}"
    made.write_bytes(bytes(range(64)))
    yield made
    made.unlink(missing_ok=True)


@pytest.fixture
def regions(path):
    """A store with that file's last 48 bytes as the region "it"."""
    made = SharedMemoryRegistry(allowed=True)
    made.register("it", path.name, 16, 48)
    return made


def open_files():
    """Count this process's open files."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - the shortest way


def test_a_region_is_read_and_written(path, regions):
    """A tensor is where its region and its own offset say, and the file has what was written."""
    region = regions.find("it")
    into = bytearray(8)
    region.read(Place("it", 4, 8), memoryview(into), "input")
    assert into == bytes(range(20, 28))
    region.write(Place("it", 40, 8), memoryview(b"outputs!"), "output")
    assert path.read_bytes()[56:] == b"outputs!"
    region.read(Place("it", 48, 0), memoryview(bytearray()), "input")


def test_nothing_is_mapped(path, regions):
    """Reading and writing leave no map of the file in this process."""
    regions.find("it").read(Place("it", 0, 48), memoryview(bytearray(48)), "input")
    assert path.name not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 49), (48, 1), (2**63, 8), (2**64 - 1, 2**64)])
def test_a_tensor_lies_within_its_region(regions, offset, nbytes):
    """What reaches past the region is refused, though the file may go on."""
    region, place = regions.find("it"), Place("it", offset, nbytes)
    with pytest.raises(InvalidArgumentError, match=r"^input: expected a range within the region's 48 bytes"):
        region.read(place, memoryview(bytearray(1)), "input")
    with pytest.raises(InvalidArgumentError, match=r"^output: expected a range within the region's 48 bytes"):
        region.write(place, memoryview(b"x"), "output")


def test_a_file_that_was_cut_short_is_an_error(path, regions):
    """A region whose file shrank under the server is refused, read or written, and the file stays as short."""
    region = regions.find("it")
    os.truncate(path, 24)
    into = memoryview(bytearray(48))
    with pytest.raises(InvalidArgumentError, match=r"^input: expected 48 bytes at 16 of .*, got a file of 24 bytes$"):
        region.read(Place("it", 0, 48), into, "input")
    with pytest.raises(InvalidArgumentError, match=r"^output: .*got a file of 24 bytes$"):
        region.write(Place("it", 0, 48), into, "output")
    assert path.stat().st_size == 24


def test_a_region_outlives_its_name(path, regions):
    """A file that was unlinked, or a region unregistered, is there for those that use it; then it is closed."""
    before = open_files()
    path.unlink()
    region = regions.find("it")
    regions.unregister("it")
    into = bytearray(1)
    region.read(Place("it", 0, 1), memoryview(into), "input")
    assert into == bytes([16])
    del region
    assert open_files() == before - 1
    with pytest.raises(NotFoundError, match="'it'"):
        regions.find("it")


@pytest.mark.parametrize(
    "key",
    ["", "/", ".", "..", "/..", "//x", "a/b", "../etc/passwd", "dev/shm/x", "a\0b", "é", "a b", "x" * 256, "a\n"],
)
def test_a_key_is_a_plain_name(key):
    """A name that could lead out of /dev/shm, or hide something, is refused before any file is looked for."""
    with pytest.raises(InvalidArgumentError, match=r"^key: expected the name of a file in /dev/shm"):
        Region(key, 0, 1)


def test_a_key_may_begin_with_a_slash(path):
    """Names are taken as shm_open takes them."""
    assert Region(f"/{path.name}", 0, 64).nbytes == 64


def test_only_plain_files_are_opened(path):
    """A link, a folder or a pipe is refused, and none of them is waited for; so is what isn't there."""
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
                Region(odd.name, 0, 1)
        finally:
            odd.rmdir() if odd.is_dir() and not odd.is_symlink() else odd.unlink()
    with pytest.raises(NotFoundError, match="expected a file in /dev/shm"):
        Region(odd.name, 0, 1)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file of another user's")
def test_another_users_file_is_refused(path):
    """A file that isn't the server's user's is refused, though the server could open it."""
    os.chown(path, 12345, -1)
    before = open_files()
    with pytest.raises(PermissionDeniedError, match="expected a file of the user that the server runs as"):
        Region(path.name, 0, 64)
    assert open_files() == before


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 65), (64, 1), (2**64 - 1, 1), (0, 0)])
def test_a_region_lies_within_its_file(path, offset, nbytes):
    """A region that is empty, or reaches past its file, is refused."""
    with pytest.raises(InvalidArgumentError, match=r"^byte_size: expected "):
        Region(path.name, offset, nbytes)


def test_names_are_taken_once_and_given_back(path, regions):
    """A name that is taken is refused until it is unregistered; an unknown one may be unregistered; "" means all."""
    with pytest.raises(InvalidArgumentError, match=r"^name: expected a name that isn't registered, got 'it'"):
        regions.register("it", path.name, 0, 1)
    regions.unregister("it")
    regions.unregister("it")
    regions.register("it", path.name, 0, 1)
    regions.register("more", path.name, 1, 1)
    assert {name: each.offset for name, each in regions.known("").items()} == {"it": 0, "more": 1}
    assert list(regions.known("more")) == ["more"]
    regions.unregister("")
    assert regions.known("") == {}
    for name in ("", "x" * 257):
        with pytest.raises(InvalidArgumentError, match=r"^name: expected 1 to 256"):
            regions.register(name, path.name, 0, 1)
        with pytest.raises(NotFoundError):
            regions.find(name)


def test_there_is_a_most_of_regions(path, regions):
    """Each region has a file open, so there is a limit, which says itself; what is refused leaves nothing open."""
    for i in range(MAX_REGIONS - 1):
        regions.register(str(i), path.name, 0, 1)
    before = open_files()
    with pytest.raises(LimitExceededError, match=f"at most {MAX_REGIONS} regions"):
        regions.register("more", path.name, 0, 1)
    assert open_files() == before


def test_none_are_taken_unless_allowed(path):
    """A server that wasn't told to has no regions, and says which flag it wants; unregistering none is no error."""
    regions = SharedMemoryRegistry(allowed=False)
    with pytest.raises(UnsupportedError, match="--allow-client-shm"):
        regions.register("it", path.name, 0, 1)
    regions.unregister("")
    assert regions.known("") == {}
