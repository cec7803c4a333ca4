"""What an attack is: its name, the servers to which it applies, and the function that attacks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from threading import Event

import grpc
import h2.exceptions

MIB = 2**20
NETWORK = ("tcp", "unix", "tokens", "insider", "workers")
"""The variants of an attack that any peer may try. VARIANTS in fuzz.attacks.server describes each."""

OWN_CHANNEL = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.max_receive_message_length", -1),
]
ENDED = (OSError, grpc.RpcError, h2.exceptions.ProtocolError, ValueError)
"""How the server, or the system, may end a connection or a call of an attack: the attack goes on with another one.
ValueError: gRPC's, for a channel that is closed."""


@dataclass(frozen=True, slots=True)
class Target:
    """The server that is attacked.

    Attributes:
        address: The address that the attack uses, "host:port" or "unix:PATH".
        path: The path of the server's unix socket.
        metrics: The address of its metrics, "host:port".
        explorer: The address of its explorer, "host:port".
        token: The attacker's own token; empty if it has none.
        pids: The processes that serve.
        log_pid: The process that reads the server's log; 0 if the log is a file.

    """

    address: str
    path: str
    metrics: str
    explorer: str
    token: str = ""
    pids: tuple[int, ...] = ()
    log_pid: int = 0

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """The metadata of a call: the attacker's token, if it has one."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    @property
    def connections(self) -> int:
        """The connections of an attack that holds something: a share is counted by token, or else by connection."""
        return 4 if self.token else 1

    def channel(self, *options: tuple[str, int]) -> grpc.Channel:
        """Return a channel with a connection of its own, which neither retries nor limits messages."""
        return grpc.insecure_channel(self.address, [*OWN_CHANNEL, *options])


Run = Callable[[Target, Event], "list[str] | None"]


@dataclass(frozen=True, slots=True)
class Attack:
    """An attack.

    Attributes:
        name: The name, for the command line.
        run: Attacks a target until the event is set, closes everything, and may return what it found.
        variants: The variants of the server to which it applies.
        descriptors: The limit on its server's descriptors (`ulimit -n`); 0 for the limit of this process.
        log: Where its server's log goes: a "file", or a "pipe" to a process that writes the file.
        wait_seconds: Seconds that a call of the good client, or a probe, may take.
        alone: Whether it harms the server's process itself, or needs a server of its own, so that no other attack can
            run at the same time.
        new_connections_fail: Whether new connections may fail during it: it takes all that the server may have, or
            stops a process that gets some of them.
        watchdog_seconds: Its server's --watchdog-seconds.

    """

    name: str
    run: Run
    variants: tuple[str, ...] = NETWORK
    descriptors: int = 0
    log: str = "file"
    wait_seconds: float = 2.0
    alone: bool = False
    new_connections_fail: bool = False
    watchdog_seconds: int = 30

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return (self.run.__doc__ or "").partition("\n")[0]


ATTACKS: dict[str, Attack] = {}
"""Every attack, by name; fuzz.attacks.catalogue imports the modules that define them."""


def attack(**settings: object) -> Callable[[Run], Run]:
    """Return a decorator that registers a function as an attack, with the settings of Attack."""

    def register(run: Run) -> Run:
        name = run.__name__.replace("_", "-")
        ATTACKS[name] = Attack(name, run, **settings)  # type: ignore[arg-type]  # fields of Attack
        return run

    return register


def repeat(until: Event, step: Callable[[], object], pause: float = 0.0) -> None:
    """Call `step` again and again until the event is set, whatever the server does to it.

    Args:
        until: Ends the attack.
        step: One attempt.
        pause: Seconds between two attempts, which the event cuts short.

    """
    while not until.is_set():
        with suppress(*ENDED):
            step()
            until.wait(pause)
            continue
        until.wait(max(pause, 0.02))  # a server that rejects everyone is not asked in a busy loop


def in_threads(*steps: Callable[[], object]) -> None:
    """Call each function in a thread of its own, and wait for all of them."""
    threads = [threading.Thread(target=step, daemon=True) for step in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
