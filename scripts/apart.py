"""Run a command in a network of its own, which is a loopback and nothing else: Ray listens on every interface there is.

    python apart.py COMMAND...
    python apart.py --through FD PORT COMMAND...

By the second, whoever connects to FD, a socket that listens in the network outside, is put through to 127.0.0.1:PORT in
it. The command's standard input is ours, its exit status becomes ours. Linux's alone; root may, and most others too.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import os
import socket
import struct
import sys
from contextlib import suppress

NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000
GET_FLAGS, SET_FLAGS, UP = 0x8913, 0x8914, 1
APART = "POOLRPC_APART"
"""What the environment has in such a network."""

FLAGS = "16sh14x"
"""An interface's name and flags, as `struct ifreq` has them."""


def leave() -> None:
    """Leave the network that there is for a new one.

    Raises:
        OSError: This user may not.

    """
    libc = ctypes.CDLL(None, use_errno=True)
    os.environ[APART] = "1"
    # With users of its own, anybody may; but there root is nobody's.
    if libc.unshare(NEW_NETWORK if os.geteuid() == 0 else NEW_USER | NEW_NETWORK):
        raise OSError(ctypes.get_errno(), "expected to be let into a network of its own")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        name, flags = struct.unpack(FLAGS, fcntl.ioctl(asked, GET_FLAGS, struct.pack(FLAGS, b"lo", 0)))
        fcntl.ioctl(asked, SET_FLAGS, struct.pack(FLAGS, name, flags | UP))


async def put_through(listening: socket.socket, port: int, *command: str) -> int:
    """Run the command, and put connections through to its port for as long as it runs; give its exit status."""

    async def copy(source: asyncio.StreamReader, goal: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await source.read(2**20):
                goal.write(data)
                await goal.drain()
        goal.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            answers, calls = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(copy(reader, calls), copy(answers, writer))

    async with await asyncio.start_server(connected, sock=listening):
        process = await asyncio.create_subprocess_exec(*command)
        return await process.wait()


def main() -> None:
    """Do what the command line says."""
    arguments = sys.argv[1:]
    if arguments[0] != "--through":
        leave()
        os.execvp(arguments[0], arguments)  # noqa: S606 - our own commands
    with socket.socket(fileno=int(arguments[1])) as listening:
        leave()
        sys.exit(asyncio.run(put_through(listening, int(arguments[2]), *arguments[3:])))


if __name__ == "__main__":
    main()
