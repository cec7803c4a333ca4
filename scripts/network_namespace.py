"""Run a command in a network namespace of its own, with a loopback interface only: Ray listens on every interface.

    python network_namespace.py COMMAND...
    python network_namespace.py --forward FD PORT COMMAND...

The second form forwards connections to FD, a socket that listens in the outer namespace, to 127.0.0.1:PORT inside. The
command inherits standard input, and its exit status is passed on. For Linux: root may do this, and most other users.
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

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
VARIABLE = "POOLRPC_NETWORK_NAMESPACE"
"""The environment variable that is set inside such a namespace."""

IFREQ = "16sh14x"
"""The name and the flags of an interface, as in C's `struct ifreq`."""


def enter() -> None:
    """Move this process into a new network namespace.

    Raises:
        OSError: This user is not permitted to.

    """
    libc = ctypes.CDLL(None, use_errno=True)
    os.environ[VARIABLE] = "1"
    # A new user namespace makes it possible for any user. root does without, because it would lose its own user there.
    if libc.unshare(CLONE_NEWNET if os.geteuid() == 0 else CLONE_NEWUSER | CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "expected permission to make a network namespace")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        name, flags = struct.unpack(IFREQ, fcntl.ioctl(control, SIOCGIFFLAGS, struct.pack(IFREQ, b"lo", 0)))
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack(IFREQ, name, flags | IFF_UP))


async def forward(listener: socket.socket, port: int, *command: str) -> int:
    """Run the command, forward connections to its port until it ends, and return its exit status."""

    async def copy(source: asyncio.StreamReader, destination: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await source.read(2**20):
                destination.write(data)
                await destination.drain()
        destination.close()

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))

    async with await asyncio.start_server(on_connection, sock=listener):
        process = await asyncio.create_subprocess_exec(*command)
        return await process.wait()


def main() -> None:
    """Run the command that the command line names."""
    arguments = sys.argv[1:]
    if arguments[0] != "--forward":
        enter()
        os.execvp(arguments[0], arguments)  # noqa: S606 - our own commands
    with socket.socket(fileno=int(arguments[1])) as listener:
        enter()
        sys.exit(asyncio.run(forward(listener, int(arguments[2]), *arguments[3:])))


if __name__ == "__main__":
    main()
