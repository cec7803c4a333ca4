"""Failures of the arena socket: other users, no free descriptors, and unexpected errors."""

import os
import resource
import secrets
import socket
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from poolrpc._wire.arena_packets import SUFFIX
from tests.unit.server.transports.local.raw_client import (
    PATIENCE,
    attach_request,
    attached,
    client_process,
    connect,
    listening,
    receive_error,
    receive_response,
    works,
)

PAUSED = "arena socket pauses accepting"


def test_other_user_is_rejected(path):
    """A client of another user than the allowed one is rejected, whether it has sent a request or not."""
    with listening(path, allowed_uid=os.geteuid() + 1) as listener:
        for _ in range(50):
            with connect(path) as connection:
                with suppress(BrokenPipeError):  # rejected already
                    connection.send(attach_request(4096))
                error = receive_error(connection)
                assert (error.code, error.reason) == ("PERMISSION_DENIED", "ARENA_USER")
        with connect(path) as connection:
            assert receive_error(connection).reason == "ARENA_USER"
        assert listener.live == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_process_of_another_user_is_rejected(listener, path):
    """The file's mode denies access to another user's process; with another mode, the listener rejects it."""
    program = """
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    say(attach(sys.argv[1], 4096)[1])
except OSError as error:
    say(errno.errorcode[error.errno])
"""
    with client_process(program, path) as process:
        assert process.stdout.readline() == "EACCES\n"
    Path(path + SUFFIX).chmod(0o666)
    program = """
os.setuid(65534)
say(attach(sys.argv[1], 4096)[1].error.message)
"""
    with client_process(program, path) as process:
        assert process.stdout.readline() == "expected the server's user, got another\n"
    assert listener.live == 0


def test_accepting_pauses_without_descriptors(path, log):
    """EMFILE is logged once, not in a loop, and when a connection ends, the next one is accepted."""
    with listening(path, pause_seconds=10 * PATIENCE) as listener, attached(path, 4096), ExitStack() as first:
        first.enter_context(attached(path, 4096))
        # Afterwards the listener has closed the descriptors that it sent.
        assert works(listener, path)
        with connect_without_descriptors(path) as pending:
            assert log.wait_for(PAUSED)
        pending.send(attach_request(4096))
        first.close()
        response, (descriptor,) = receive_response(pending)
        os.close(descriptor)
        assert listener.find(response.arena_id).size == 4096
        pending.close()
    assert log.lines.count(PAUSED) == 1


def test_accepting_resumes_after_the_pause(path, log):
    """If no connection ends, accepting resumes after `pause_seconds`."""
    with listening(path, pause_seconds=0.05):
        with connect_without_descriptors(path) as pending:
            assert log.wait_for(PAUSED)
        pending.send(attach_request(4096))
        _, (descriptor,) = receive_response(pending)
        os.close(descriptor)
        pending.close()


@contextmanager
def connect_without_descriptors(path):
    """Connect while this process cannot open another descriptor, until the context ends."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(PATIENCE)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(connection.fileno())
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
    try:
        connection.connect(path + SUFFIX)
        yield connection
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_unexpected_error_ends_only_its_connection(listener, path, log, monkeypatch):
    """An unexpected error is logged and closes its connection; the listener goes on."""
    with monkeypatch.context() as patch:
        patch.setattr(secrets, "token_bytes", lambda _: 1 / 0)
        with connect(path) as connection:
            connection.send(attach_request(4096))
            assert connection.recv(1) == b""
    assert log.wait_for("arena socket failed")
    assert works(listener, path)
