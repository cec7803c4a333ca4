"""Attaching arenas: valid requests, invalid packets, and the number of arenas and pending connections."""

import array
import errno
import mmap
import os
import socket
from contextlib import suppress

import psutil
import pytest

from poolrpc.errors import InvalidArgumentError, LimitExceededError, NotFoundError
from poolrpc.v1 import pool_pb2
from poolrpc_server.transports.local.arenas import arena_finder
from tests.unit.server.transports.local.raw_client import (
    MIB,
    PATIENCE,
    attach_request,
    attached,
    connect,
    listening,
    receive_error,
    receive_response,
    rejection,
    works,
)


def test_arena_is_the_same_memory_on_both_sides(listener, path):
    """The server reads what the client writes and vice versa; the size is rounded up to whole pages."""
    with attached(path, 5000) as (arena_id, descriptor, _):
        arena = listener.find(arena_id)
        assert arena.size == os.fstat(descriptor).st_size == 2 * mmap.PAGESIZE
        with mmap.mmap(descriptor, 0) as mapping:
            mapping[64:67] = b"abc"
            part = arena.slice((64, 4), "arena.input")
            assert bytes(part) == b"abc\0"
            part[3] = ord("d")
            assert mapping[64:68] == b"abcd"


def test_response_names_the_socket_for_calls(path):
    """A listener that is configured with a socket for calls sends its name with each arena."""
    with listening(path, call_socket="worker.sock"), connect(path) as connection:
        connection.send(attach_request(4096))
        response, (descriptor,) = receive_response(connection)
        os.close(descriptor)
        assert response.socket == "worker.sock"


@pytest.mark.parametrize(
    ("size", "actual"),
    [(64 * MIB + 1, 64 * MIB + mmap.PAGESIZE), (2**63, 2**63), (2**64 - 1, 2**64)],
    ids=["over the quota", "2^63", "negative"],
)
def test_size_over_the_quota_is_rejected(listener, path, size, actual):
    """A size over the quota, 2^63 and -1, which is 2^64 - 1 on the wire, are rejected with limit and actual size."""
    error = rejection(path, attach_request(size))
    assert type(error) is LimitExceededError
    assert error.reason == "ARENA_QUOTA"
    assert error.metadata == {"limit": str(64 * MIB), "actual": str(actual), "unit": "bytes"}
    assert str(error) == f"expected at most {64 * MIB} bytes of arenas, got 0 and {actual} more"
    assert works(listener, path)


@pytest.mark.parametrize("packet", [b"", b"\x08\x00"], ids=["empty packet", "zero"])
def test_size_of_0_is_rejected(listener, path, packet):
    """A size of 0, explicit or by default, is rejected."""
    error = rejection(path, packet)
    assert type(error) is InvalidArgumentError
    assert str(error) == "size: expected at least 1 byte, got 0"
    assert works(listener, path)


@pytest.mark.parametrize(
    "packet",
    [
        b"\xff" * 40,
        b"\x08" + b"\x80" * 11,
        b"GET / HTTP/1.1\r\n\r\n",
        attach_request(4096) + b"\x12\x40" + b"x" * 64,
        attach_request(MIB) * 17,
        bytes(65),
    ],
    ids=["garbage", "endless varint", "HTTP", "too long", "too long, valid prefix", "zeros"],
)
def test_invalid_packet_is_rejected(listener, path, packet):
    """A packet that is not an AttachRequest, or is too long, is rejected, and the listener goes on."""
    error = rejection(path, packet)
    assert type(error) is InvalidArgumentError
    assert str(error).startswith("request: expected a")
    assert works(listener, path)


def test_error_arrives_whatever_else_was_sent(listener, path):
    """A client that sends more packets reads the error, not ECONNRESET."""
    for _ in range(50):
        with connect(path) as connection:
            with suppress(BrokenPipeError):
                for _ in range(5):
                    connection.send(b"\xff")
            assert type(receive_error(connection)) is InvalidArgumentError
    assert works(listener, path)


def test_packet_of_a_megabyte_is_rejected(listener, path):
    """Only the first bytes of a huge packet are read."""
    with connect(path) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MIB)
        try:
            connection.send(bytes(MIB))
        except OSError as error:
            assert error.errno == errno.EMSGSIZE  # noqa: PT017 - some systems have a lower limit
        else:
            assert type(receive_error(connection)) is InvalidArgumentError
    assert works(listener, path)


@pytest.mark.parametrize("count", [1, 253])
def test_descriptors_from_a_client_are_closed(listener, path, count):
    """Descriptors that accompany a request are closed by the kernel, and the request is rejected."""
    assert works(listener, path)
    before = psutil.Process().num_fds()
    with open("/dev/null") as file:  # noqa: PTH123 - only its number is used
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file.fileno()] * count))
        for _ in range(10):
            assert type(rejection(path, attach_request(4096), rights)) is InvalidArgumentError
    assert psutil.Process().num_fds() <= before  # earlier tests may still be closing theirs


def test_second_packet_ends_the_arena(listener, path):
    """A connection has one arena: a second request ends the first arena and gets none."""
    with attached(path, 4096) as (arena_id, _, connection):
        connection.send(attach_request(4096))
        assert listener.wait_for(0, PATIENCE)
        with pytest.raises(NotFoundError):
            listener.find(arena_id)
    assert works(listener, path)


def test_two_packets_at_once_leave_no_arena(listener, path):
    """A client that sends two requests without waiting gets at most one arena, which ends at once."""
    assert works(listener, path)
    before = psutil.Process().num_fds()
    for _ in range(20):
        with connect(path) as connection:
            connection.send(attach_request(4096))
            connection.send(attach_request(4096))
            with suppress(ConnectionResetError):  # the second packet was not read
                while packet := connection.recv(8192):
                    assert not pool_pb2.AttachResponse.FromString(packet).HasField("error")
    assert listener.wait_for(0, PATIENCE)
    assert psutil.Process().num_fds() <= before  # earlier tests may still be closing theirs


def test_silent_connection_is_closed(path):
    """A connection without a request is closed after `attach_seconds`; one with an arena is not."""
    with (
        listening(path, attach_seconds=0.05) as listener,
        attached(path, 4096) as (arena_id, _, _),
        connect(path) as silent,
    ):
        assert silent.recv(1) == b""
        assert listener.find(arena_id).size == 4096


def test_pending_connections_are_limited(path):
    """Connections over `max_pending` are closed at once; when one attaches, there is room again."""
    with listening(path, max_pending=2) as listener, connect(path), connect(path) as second:
        with connect(path) as third:
            assert third.recv(1) == b""
        second.send(attach_request(4096))
        _, (descriptor,) = receive_response(second)
        os.close(descriptor)
        assert works(listener, path)


def test_unknown_or_ended_arena_is_not_found(listener, path):
    """A guessed id and the id of an ended arena are not found, and ids are not repeated."""
    with attached(path, 4096) as (arena_id, _, _), attached(path, 4096) as (other, _, _):
        assert arena_id != other
        assert len(arena_id) == 16
        for wrong in (os.urandom(16), b"", arena_id[:-1], bytes(16)):
            with pytest.raises(NotFoundError, match="got an unknown or ended one") as caught:
                listener.find(wrong)
            assert caught.value.reason == "ARENA"
    assert listener.wait_for(0, PATIENCE)
    for ended in (arena_id, other):
        with pytest.raises(NotFoundError):
            listener.find(ended)


def test_arena_finder_searches_all_listeners(path):
    """The finder searches listeners that were added after it was made; without any, the error says so."""
    listeners = []
    find = arena_finder(listeners)
    with pytest.raises(NotFoundError, match="this server has none"):
        find(bytes(16))
    with listening(path) as first, listening(f"{path}2") as second:
        listeners += first, second
        with attached(path, 4096) as (one, _, _), attached(f"{path}2", 8192) as (two, _, _):
            assert (find(one).size, find(two).size) == (4096, 8192)
            with pytest.raises(NotFoundError, match="got an unknown or ended one"):
                find(bytes(16))
