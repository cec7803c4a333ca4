"""Attaching an arena: servers that send something else, send nothing, or are another user's."""

import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing

import psutil
import pytest

from poolrpc import PoolError
from poolrpc._transport.arena_memory import Arenas
from poolrpc.v1 import pool_pb2
from tests.unit.client.transport.hostile import SEAL_GROW, SEAL_SHRINK, hostile, sends
from tests.unit.server.transports.local.raw_client import MIB, PATIENCE, client_process

ANOTHER_USER = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


HOSTILE = {
    "no seals": (sends(seals=0), "memory without seals"),
    "may shrink": (sends(seals=SEAL_GROW), "memory without seals"),
    "may grow": (sends(seals=SEAL_SHRINK), "memory without seals"),
    "shorter than claimed": (
        sends(size=MIB - 4096),
        f"expected {MIB} bytes, got {MIB}, of which {MIB - 4096} exist",
    ),
    "shorter than requested": (sends(claim=4096), f"expected {MIB} bytes, got 4096"),
    "a size of 2^64 - 1": (sends(claim=2**64 - 1), f"expected {MIB} bytes, got {2**64 - 1}"),
    "two descriptors": (sends(count=2), "2 descriptors"),
    "many descriptors": (sends(count=200), "2 descriptors"),
    "no descriptor": (sends(count=0), "0 descriptors"),
    "no id": (sends(arena_id=b""), "1 descriptors"),
    "a socket elsewhere": (sends(call_socket="../x.sock"), "expected the name of a socket in the folder of"),
    "a missing socket": (sends(call_socket="x.sock"), "expected the name of a socket in the folder of"),
    "a device": (sends(file="/dev/zero"), "Invalid argument"),
    "a file": (sends(file=sys.executable), "Invalid argument"),
    "garbage": (lambda connection: connection.send(b"\xff" * 50), "expected an AttachResponse, got another packet"),
    "too much": (lambda connection: connection.send(bytes(10_000)), "expected an AttachResponse, got another packet"),
    "an empty packet": (lambda connection: connection.send(b""), "got 0 bytes and 0 descriptors"),
    "the end": (lambda connection: connection.close(), "got 0 bytes and 0 descriptors"),
    "an error without a code": (
        lambda connection: connection.send(
            pool_pb2.AttachResponse(error=pool_pb2.AttachResponse().error).SerializeToString()
        ),
        "UNKNOWN: ",
    ),
    "an error with a descriptor": (
        lambda connection: socket.send_fds(
            connection,
            [pool_pb2.AttachResponse(error=pool_pb2.AttachResponse().error).SerializeToString()],
            [connection.fileno()],
        ),
        "UNKNOWN: ",
    ),
}


@pytest.mark.parametrize(("answer", "expected"), HOSTILE.values(), ids=HOSTILE)
def test_an_invalid_answer_is_rejected(path, answer, expected):
    """Memory that could shrink is never mapped, and no descriptor of such an answer stays open."""
    before = psutil.Process().num_fds()
    with hostile(path, answer), closing(Arenas(path, arena_bytes=MIB)) as arenas:
        assert arenas.allocate(1) is None
        assert isinstance(arenas.rejection, PoolError)
        assert expected in str(arenas.rejection)
        assert arenas.nbytes == 0
    assert psutil.Process().num_fds() <= before  # earlier tests may still be closing theirs


def test_a_valid_answer_is_accepted(path):
    """The same answer without a fault attaches an arena."""
    with hostile(path, sends()), closing(Arenas(path, arena_bytes=MIB)) as arenas:
        assert arenas.allocate(1).arena_id == bytes(16)


def test_a_server_that_does_not_answer_costs_its_timeout_once(path):
    """After the timeout, no arena is requested for a while."""
    done = threading.Event()
    with hostile(path, lambda _: done.wait(PATIENCE)), closing(Arenas(path, attach_timeout=0.05)) as arenas:
        started = time.monotonic()
        assert arenas.allocate(1) is None
        assert arenas.allocate(1) is None
        assert 0.05 <= time.monotonic() - started < PATIENCE
        assert str(arenas.rejection).endswith("timed out")
        done.set()


@as_root
def test_a_server_of_another_user_is_not_trusted(path, folder):
    """A socket that another user has put at the path gets no request."""
    os.chown(folder, ANOTHER_USER, ANOTHER_USER)
    program = """
os.setuid(65534)
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.bind(sys.argv[1] + ".arena")
server.listen(1)
say("ready")
say(server.accept()[0].recv(100))
"""
    with client_process(program, path) as process, closing(Arenas(path)) as arenas:
        assert process.stdout.readline() == "ready\n"
        assert arenas.allocate(1) is None
        assert str(arenas.rejection) == "arena: expected a server of user 0 or 0, got one of user 65534"
        assert process.stdout.readline() == "b''\n"


def test_an_arena_that_is_attached_after_close_is_detached(path):
    """An arena that arrives while the client is closed is not kept."""
    with closing(Arenas(path, arena_bytes=MIB)) as arenas:

        def answer(connection):
            arenas.close()
            sends()(connection)

        with hostile(path, answer):
            assert arenas.allocate(1) is None
            assert arenas.nbytes == 0


def test_arenas_are_rejected_on_other_systems():
    """If the system is not Linux, the module can be imported, and there are no arenas."""
    program = """
import sys, grpc, numpy, google.protobuf.json_format, socket, mmap
sys.platform, sys.modules["fcntl"] = "darwin", None
from poolrpc._transport.arena_memory import Arenas
arenas = Arenas("/nowhere")
print(arenas.allocate(1), arenas.rejection)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)  # noqa: S603 - a program of the test
    assert ended.stdout == "None arenas need Linux: other systems have no memfd\n"
    assert ended.stderr == ""
