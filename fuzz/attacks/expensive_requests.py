"""Valid requests that cost much more time or memory than the limits estimate, and more of them than a fair share."""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING

from fuzz.attacks.attack import MIB, Target, attack, in_threads, repeat
from fuzz.attacks.expensive_messages import LARGE_MESSAGES
from fuzz.attacks.messages import MODEL_INFER, POOL, infer, pool
from poolrpc import AdaptiveMaxPool2d, FractionalMaxPool2d, LPPool2d, MaxPool2d, PoolClient
from poolrpc_server.resources import cpu_count

if TYPE_CHECKING:
    from collections.abc import Sequence
    from threading import Event

LEAVE_SECONDS = 1.0
"""Seconds after which a caller leaves: from then on its request is work for no caller."""

CALLERS = max(2, cpu_count())
"""As many as the server has slots: if each is freed when its caller leaves, others wait for about a second."""


def _calls(target: Target, until: Event, messages: Sequence[tuple[str, bytes]], threads: int) -> None:
    """Send requests in turn from several threads, each with a connection of its own."""

    def run(first: int) -> None:
        with target.channel(*LARGE_MESSAGES) as channel:
            order = [*messages[first % len(messages) :], *messages[: first % len(messages)]]

            def turn() -> None:
                for method, message in order:
                    call = channel.unary_unary(method).future(message, metadata=target.headers, timeout=LEAVE_SECONDS)
                    while not call.done() and not until.wait(0.02):
                        pass
                    call.cancel()

            repeat(until, turn)

    in_threads(*(partial(run, number) for number in range(threads)))


@cache
def _powers(branches: int) -> bytes:
    """Return a request of 8 MiB for long chains of LPPool2d with a norm that has no fast kernel."""
    chain = [LPPool2d(1.7, 3, stride=1)] * 8
    return pool((8, 4, 256, 256), *[chain] * branches).SerializeToString()


@attack()
def expensive_chains(target: Target, until: Event) -> None:
    """Send long chains of LPPool with a norm of 1.7, and leave (row H1: two held both slots for 100 s of CPU each).

    Sent: 8 MiB with up to seven branches of eight layers, under the limit on work; as many callers as slots, each of
    which leaves after a second.
    Aims at: the slots of the engine, and the end of the process, which waited for them.
    """
    expression = "[" + ", ".join(["LPPool2d(1.7, 3, stride=1)"] * 8) + "]"
    messages = [(POOL, _powers(branches)) for branches in (7, 5, 3)]
    messages.append((MODEL_INFER, infer(expression, (8, 4, 256, 256), "FP32", bytes(8 * MIB))))
    _calls(target, until, messages, CALLERS)


@attack()
def large_scratch(target: Target, until: Event) -> None:
    """Send tensors for which a layer needs many times their memory (row H2: 8.2 GiB for a float16 tensor, uncounted).

    Sent: FractionalMaxPool2d of float16 (1, 2^24, 1, 2), general LPPool2d, AdaptiveMaxPool2d with overlapping windows,
    and MaxPool2d of uint8 on large planes, 64 MiB each; two callers.
    Aims at: memory that a kernel takes in addition to its input and output.
    """
    tall = (1, 2**24, 1, 2)
    messages = [
        pool(tall, [FractionalMaxPool2d((1, 1), output_size=(1, 1))], dtype="float16"),
        pool((1, 4, 2048, 2048), [LPPool2d(1.7, 3, stride=2)]),
        pool((1, 4, 2048, 2048), [AdaptiveMaxPool2d(2047)]),
        pool((1, 1, 8192, 8192), [MaxPool2d(31, stride=1, padding=15)], dtype="uint8"),
        pool((1, 1, 8192, 8192), [MaxPool2d(3, stride=2, return_indices=True)], dtype="uint8"),
    ]
    _calls(target, until, [(POOL, message.SerializeToString()) for message in messages], 2)


@attack(variants=("unix", "insider"))
def expensive_arena_requests(target: Target, until: Event) -> None:
    """Send expensive requests through an arena, and leave (row H1, on the arena's path).

    Sent: our own client's calls on the unix socket, with 16 MiB in an arena and LPPool with a norm of 1.7.
    Aims at: the slots of the engine.
    """
    layers = [LPPool2d(1.7, 3, stride=1)] * 16

    def run() -> None:
        address = f"unix:{target.path}"
        options = {"grpc.use_local_subchannel_pool": 1, "grpc.enable_retries": 0}
        with PoolClient(address, token=target.token or None, timeout=LEAVE_SECONDS, options=options) as client:
            x = client.empty((8, 8, 256, 256), "float32")
            x[:] = 1
            while not until.is_set():
                try:
                    client.pool(x, layers)
                except Exception:  # noqa: BLE001 - rejected, or left
                    until.wait(0.02)

    in_threads(*[run] * CALLERS)


@attack()
def flood_of_valid_calls(target: Target, until: Event) -> None:
    """Send more valid calls at a time than are answered (of the kind of C6: one caller took every place).

    Sent: 300 concurrent calls of 1 MiB on one connection, of every priority, again as soon as they end.
    Aims at: call threads, the queue, and the share of everybody else.
    """
    message = pool((1, 16, 128, 128), [MaxPool2d(3, stride=1)]).SerializeToString()

    def flood(number: int) -> None:
        with target.channel(*LARGE_MESSAGES) as channel:
            method = channel.unary_unary(POOL)

            def calls() -> None:
                metadata = (*target.headers, ("priority", str(number % 3)))
                pending = [method.future(message, metadata=metadata, timeout=10) for _ in range(300)]
                for call in pending:
                    while not call.done() and not until.wait(0.01):
                        pass
                    call.cancel()

            repeat(until, calls)

    in_threads(*(partial(flood, number) for number in range(target.connections)))
