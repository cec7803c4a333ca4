"""The lifetime of arenas: killed clients, calls that still use the memory, the quota, and leaks."""

import gc
import os
import signal
import threading
from contextlib import ExitStack

import psutil
import pytest

from poolrpc.errors import LimitExceededError, NotFoundError
from tests.unit.server.transports.local.raw_client import (
    MIB,
    PATIENCE,
    attach_request,
    attached,
    client_process,
    listening,
    rejection,
    works,
)


def test_client_cannot_shrink_its_arena(listener, path):
    """In a client's process, ftruncate and further seals fail with EPERM, and the server can still read the arena."""
    program = """
import fcntl
connection, response, descriptor = attach(sys.argv[1], 8192)
say(response.arena_id.hex())
for size in (0, 4096, 1 << 20):
    try:
        os.ftruncate(descriptor, size)
    except OSError as error:
        say(errno.errorcode[error.errno])
try:
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
except OSError as error:
    say(errno.errorcode[error.errno])
sys.stdin.read()
"""
    with client_process(program, path) as process:
        arena_id = bytes.fromhex(process.stdout.readline())
        assert [process.stdout.readline().strip() for _ in range(4)] == ["EPERM"] * 4
        assert bytes(listener.find(arena_id).slice((0, 8192), "")) == bytes(8192)
    assert listener.wait_for(0, PATIENCE)
    assert works(listener, path)


def test_arena_of_a_killed_client_is_freed(path):
    """SIGKILL closes the connection, which frees the arena and its share of the quota."""
    program = "held = attach(sys.argv[1], 8192)\nsay(held[1].arena_id.hex())\nsys.stdin.read()"
    with listening(path, max_bytes=8192) as listener, client_process(program, path) as process:
        arena_id = bytes.fromhex(process.stdout.readline())
        assert type(rejection(path, attach_request(1))) is LimitExceededError
        process.send_signal(signal.SIGKILL)
        process.wait(PATIENCE)
        assert listener.wait_for(0, PATIENCE)
        assert listener.nbytes == 0
        with pytest.raises(NotFoundError):
            listener.find(arena_id)
        with attached(path, 8192):
            pass


def test_call_keeps_the_memory_that_it_uses(path):
    """A slice outlives its client and the listener, and its arena counts towards the quota as long as it exists."""
    with listening(path, max_bytes=MIB) as listener:
        with attached(path, MIB) as (arena_id, descriptor, _):
            os.pwrite(descriptor, b"abc", 64)
            part = listener.find(arena_id).slice((64, 3), "")
        assert listener.wait_for(0, PATIENCE)
        assert listener.nbytes == MIB
        assert rejection(path, attach_request(1)).reason == "ARENA_QUOTA"
        assert bytes(part) == b"abc"
        del part
        assert listener.nbytes == 0
        with attached(path, MIB) as (arena_id, _, _):
            part = listener.find(arena_id).slice((0, 64), "")
            listener.close()
            with pytest.raises(NotFoundError):
                listener.find(arena_id)
            assert bytes(part) == bytes(64)


def test_rejected_requests_leak_nothing(path):
    """Thousands of requests over the quota are rejected, and neither memory nor descriptors grow."""
    process = psutil.Process()
    with listening(path, max_arenas=4) as listener, ExitStack() as held:
        for _ in range(4):
            held.enter_context(attached(path, MIB))
        before = None
        for count in range(5000):
            error = rejection(path, attach_request(MIB))
            assert error.metadata == {"limit": "4", "actual": "5", "unit": "arenas"}
            if count == 1000:
                before = process.memory_info().rss, process.num_fds()
        rss, descriptors = before
        assert process.memory_info().rss - rss < 8 * MIB
        assert process.num_fds() <= descriptors  # earlier tests may still be closing theirs
        assert listener.live == 4
        assert listener.nbytes == 4 * MIB


def test_ended_arenas_and_listeners_leak_nothing(path):
    """Hundreds of arenas that were written and ended free their descriptors and memory, as do closed listeners."""
    process = psutil.Process()
    with listening(path) as listener:
        assert works(listener, path)
        gc.collect()
        before, rss = process.num_fds(), process.memory_info().rss
        for _ in range(200):
            with attached(path, MIB) as (arena_id, descriptor, _):
                os.pwrite(descriptor, b"\1" * MIB, 0)
                assert bytes(listener.find(arena_id).slice((MIB - 64, 64), "")) == b"\1" * 64
            assert listener.wait_for(0, PATIENCE)
        assert listener.nbytes == 0
        assert process.num_fds() <= before  # earlier tests may still be closing theirs
        assert process.memory_info().rss - rss < 32 * MIB
    threads = threading.active_count()
    for _ in range(20):
        with listening(path):
            pass
    assert threading.active_count() == threads
    assert process.num_fds() < before
