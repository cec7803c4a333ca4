"""A client of the arena socket that uses nothing of the client package, so that it can also break the rules."""

import os
import socket
import subprocess
import sys
from array import array
from contextlib import closing, contextmanager

from poolrpc._wire.arena_packets import SUFFIX
from poolrpc._wire.status import STATUS_NUMBERS, decode_error
from poolrpc.v1 import pool_pb2
from poolrpc_server.transports.local.arenas import ArenaListener

MIB = 2**20
PATIENCE = 30
"""Seconds after which a waiting test fails."""


@contextmanager
def listening(path, *, max_bytes=64 * MIB, max_arenas=8, **options):
    """Run a listener on the arena socket of a server's path."""
    with closing(ArenaListener(path, max_bytes=max_bytes, max_arenas=max_arenas, **options)) as listener:
        yield listener


def connect(path):
    """Connect to the arena socket."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(PATIENCE)
    connection.connect(path + SUFFIX)
    return connection


def attach_request(size):
    """Return the packet that requests an arena."""
    return pool_pb2.AttachRequest(size=size).SerializeToString()


def receive_response(connection):
    """Receive an AttachResponse and its descriptors."""
    packet, ancillary, _, _ = connection.recvmsg(8192, socket.CMSG_SPACE(64))
    descriptors = array("i")
    for _, _, data in ancillary:
        descriptors.frombytes(data)
    return pool_pb2.AttachResponse.FromString(packet), list(descriptors)


def receive_error(connection):
    """Receive an error, after which the server must close the connection."""
    response, descriptors = receive_response(connection)
    assert not descriptors
    assert not response.arena_id
    assert connection.recv(1) == b""
    names = {number: name for name, number in STATUS_NUMBERS.items()}
    return decode_error(names[response.error.code], response.error.message, response.error.SerializeToString())


@contextmanager
def attached(path, size):
    """Attach an arena and yield its id, its descriptor and the connection."""
    with connect(path) as connection:
        connection.send(attach_request(size))
        response, (descriptor,) = receive_response(connection)
        try:
            yield response.arena_id, descriptor, connection
        finally:
            os.close(descriptor)


def rejection(path, packet, *ancillary):
    """Send a packet that the server rejects, and return the error."""
    with connect(path) as connection:
        connection.sendmsg([packet], ancillary)
        return receive_error(connection)


def works(listener, path):
    """Return whether the listener attaches an arena and notices its end."""
    before = listener.live
    with attached(path, MIB) as (arena_id, _, _):
        found = listener.find(arena_id).size == MIB
    return found and listener.wait_for(before, PATIENCE)


PRELUDE = """
import array, contextlib, errno, os, socket, sys
from poolrpc.v1 import pool_pb2

def say(*words):
    print(*words, flush=True)

def attach(path, size):
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(path + ".arena")
    with contextlib.suppress(BrokenPipeError):  # rejected already
        connection.send(pool_pb2.AttachRequest(size=size).SerializeToString())
    packet, ancillary, _, _ = connection.recvmsg(8192, socket.CMSG_SPACE(4))
    descriptor = array.array("i", ancillary[0][2][:4])[0] if ancillary else None
    return connection, pool_pb2.AttachResponse.FromString(packet), descriptor
"""


@contextmanager
def client_process(program, *arguments):
    """Run a program, after PRELUDE, in a second process with pipes to and from it."""
    command = [sys.executable, "-c", PRELUDE + program, *map(str, arguments)]
    with subprocess.Popen(  # noqa: S603 - the program is the test's own
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()
