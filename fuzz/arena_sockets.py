"""The handshake of arenas over its unix socket, descriptors included, against the server and against the client."""

from __future__ import annotations

import array
import fcntl
import os
import socket
import tempfile
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fuzz.findings import FoundError
from fuzz.seeds import CLOSE, FDS, GIVEN_BYTES, NEW, READ, SHORT, SHUT, UNSEALED
from poolrpc._transport.arena_memory import Arenas
from poolrpc._wire.arena_packets import SUFFIX, decode_attach_response
from poolrpc.errors import InternalError, PoolError
from poolrpc.tensors import ALIGNMENT

if TYPE_CHECKING:
    from fuzz.mutate import Case

DEADLINE = 20.0
MAX_OPEN = 4
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def converse(path: str, case: Case) -> str:
    """Hold a conversation with an arenas' socket, and return how it ended.

    Raises:
        FoundError: It ended in a way that is a bug.

    """
    ending = "silent"
    with ExitStack() as opened:
        peers: list[socket.socket] = []
        for step in case:
            flags, packet = (step or b"\0")[0], step[1:]
            if not peers or (flags & NEW and len(peers) < MAX_OPEN):
                peer = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                peer.settimeout(DEADLINE)
                peer.connect(path)
                peers.append(peer)
            peer = peers[-1]
            with suppress(ConnectionError):
                send(peer, packet, flags & FDS)
                if flags & SHUT:
                    peer.shutdown(socket.SHUT_WR)
                if flags & READ:
                    ending = _response_of(peer)
            if flags & CLOSE:
                peers.pop().close()
    return ending


def send(peer: socket.socket, packet: bytes, count: int) -> None:
    """Send a packet with so many descriptors."""
    descriptors = [os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC) for _ in range(count)]
    try:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        peer.sendmsg([packet], rights)
    finally:
        for each in descriptors:
            os.close(each)


def _response_of(peer: socket.socket) -> str:
    try:
        packet, descriptors, _, _ = socket.recv_fds(peer, 4096, 4)
    except TimeoutError:
        raise FoundError("neither a response nor the end of the connection") from None
    try:
        if not packet:
            return "ended"
        response = decode_attach_response(packet)
        arena_id, size = response.arena_id, response.size
        if response.calls and not (descriptors or arena_id or size):
            return "calls"
        if len(descriptors) != 1 or not arena_id or not size:
            raise FoundError(f"an arena of {size} bytes with {len(descriptors)} descriptors")
        if fcntl.fcntl(descriptors[0], fcntl.F_GET_SEALS) & SEALS != SEALS or os.fstat(descriptors[0]).st_size != size:
            raise FoundError("an arena without its seals, or of another size")
    except InternalError as error:
        raise FoundError(f"INTERNAL: {error.message}") from None
    except PoolError as error:
        return f"{error.code}/{error.reason}"
    else:
        return "OK"
    finally:
        for each in descriptors:
            os.close(each)


class HostileArenas:
    """A server of arenas that sends what a case says, and a client that must survive it."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="poolrpc-fuzz-")
        self._path = str(Path(self._folder.name) / "pool.sock")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind(self._path + SUFFIX)
        self._socket.listen()
        self._case: Case = ()
        self._served = threading.Semaphore(0)
        threading.Thread(target=self._serve, daemon=True).start()

    def judge(self, case: Case) -> str:
        """Let a client attach an arena, respond as the case says, and return how that ended.

        Raises:
            FoundError: It ended in a way that is a bug.

        """
        self._case = case
        arenas = Arenas(self._path, arena_bytes=GIVEN_BYTES)
        try:
            ending = self._allocated(arenas)
        finally:
            arenas.close()
        if not self._served.acquire(timeout=DEADLINE):
            raise FoundError("a client that keeps its connection")
        return ending

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
        self._folder.cleanup()

    @staticmethod
    def _allocated(arenas: Arenas) -> str:
        span = arenas.allocate(100)
        if span is None:
            return f"rejected/{arenas.rejection.code}" if arenas.rejection else "rejected"
        if span.offset % ALIGNMENT or len(span.arena.memory) < GIVEN_BYTES:
            raise FoundError("a span that is not aligned, or whose arena is too small")
        span.array(np.dtype("uint8"), (100,))[:] = 1
        return "OK"

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:
                return
            with peer, suppress(OSError):
                for step in self._case:
                    self._respond(peer, (step or b"\0")[0], step[1:])
                peer.shutdown(socket.SHUT_WR)
                while peer.recv(4096):
                    pass
            self._served.release()

    @staticmethod
    def _respond(peer: socket.socket, flags: int, packet: bytes) -> None:
        descriptors = []
        try:
            for _ in range(flags & FDS):
                descriptors.append(os.memfd_create("fuzz", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
                os.ftruncate(descriptors[-1], 100 if flags & SHORT else GIVEN_BYTES)
                if not flags & UNSEALED:
                    fcntl.fcntl(descriptors[-1], fcntl.F_ADD_SEALS, SEALS)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
            peer.sendmsg([packet], rights)
        finally:
            for each in descriptors:
                os.close(each)
