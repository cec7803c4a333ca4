"""An arena socket whose server answers as a test has it do."""

import fcntl
import os
import socket
import threading
from contextlib import ExitStack, closing, contextmanager

from poolrpc._wire.arena_packets import SUFFIX
from poolrpc.v1 import pool_pb2
from tests.unit.server.transports.local.raw_client import MIB, PATIENCE

SEAL_SHRINK, SEAL_GROW = fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW


class HostileServer:
    """A server that answers each request with a function of the connection."""

    def __init__(self, path, answer):
        self.failure = None
        self._answer = answer
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind(path + SUFFIX)
        self._socket.listen(100)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        while True:
            connection, _ = self._socket.accept()
            with connection:
                if connection.recv(100) == b"end":
                    return
                try:
                    self._answer(connection)
                except Exception as error:  # noqa: BLE001 - raised by close() in the test's thread
                    self.failure = error

    def close(self):
        """Stop the server, and raise what `answer` raised."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(self._socket.getsockname())
            connection.send(b"end")
            self._thread.join(PATIENCE)
        self._socket.close()
        if self.failure:
            raise self.failure


@contextmanager
def hostile(path, answer):
    """Run a server that answers each request with answer(connection)."""
    with closing(HostileServer(path, answer)) as server:
        yield server


def sends(  # noqa: PLR0913 - one argument per fault
    *, size=MIB, claim=MIB, seals=SEAL_SHRINK | SEAL_GROW, count=1, arena_id=bytes(16), file=None, call_socket=""
):
    """Return an answer with `count` descriptors of a memfd, with the faults that the arguments describe."""

    def answer(connection):
        with ExitStack() as stack:
            descriptor = (
                os.memfd_create("hostile", os.MFD_ALLOW_SEALING) if file is None else os.open(file, os.O_RDONLY)
            )
            stack.callback(os.close, descriptor)
            if file is None:
                os.ftruncate(descriptor, size)
                fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
            packet = pool_pb2.AttachResponse(arena_id=arena_id, size=claim, socket=call_socket).SerializeToString()
            socket.send_fds(connection, [packet], [descriptor] * count)

    return answer
